//! How much one holder may ask: requests a second, and tasks at once.
//!
//! Tokens of one name share their holder's bounds, as they share its tasks: a second token of a name,
//! of which one replaces the other, is no second share.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue};
use governor::clock::{Clock, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::keyed::DefaultKeyedStateStore;
use governor::{Quota as Rate, RateLimiter};
use parking_lot::Mutex;
use pool_registry_types::routes::headers;
use pool_registry_types::{ErrorBody, ErrorCode, HolderId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::answer::ApiError;
use crate::caller::Caller;

/// Holders that are remembered before those that have been quiet are forgotten.
const MANY: usize = 1024;

/// Requests of each holder, which says what it leaves.
type Limiter =
    RateLimiter<HolderId, DefaultKeyedStateStore<HolderId>, DefaultClock, StateInformationMiddleware>;

/// The bounds of one holder. What is absent is not bounded.
#[derive(Debug)]
pub struct Quota {
    rate: Option<(NonZeroU32, Limiter)>,
    tasks: Option<usize>,
    permits: Mutex<HashMap<HolderId, Arc<Semaphore>>>,
}

impl Quota {
    /// `rate`: requests a second, as many at once at most. `tasks`: tasks that wait or run.
    pub fn new(rate: Option<NonZeroU32>, tasks: Option<usize>) -> Self {
        let limiter = |rate| RateLimiter::keyed(Rate::per_second(rate)).with_middleware();
        let rate = rate.map(|rate| (rate, limiter(rate)));
        Self { rate, tasks, permits: Mutex::default() }
    }

    /// Counts a request. Returns how many more there could be at once, where that is bounded.
    ///
    /// # Errors
    /// `RATE_LIMITED` with the time until the next request is taken.
    pub fn request(&self, holder: HolderId) -> Result<Option<u32>, ApiError> {
        let Some((_, rate)) = &self.rate else { return Ok(None) };
        if rate.len() > MANY {
            rate.retain_recent();
        }
        let counted = rate.check_key(&holder);
        counted.map(|state| Some(state.remaining_burst_capacity())).map_err(|until| {
            let wait = until.wait_time_from(DefaultClock::default().now());
            let millis = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).max(1);
            let mut body =
                ErrorBody::new(ErrorCode::RateLimited, "the holder of this token makes too many requests");
            body.retry_after_ms = Some(millis);
            ApiError(body)
        })
    }

    /// A place for one more task of the caller; it is free again when what is returned is dropped.
    /// Callers without a token are not bounded.
    ///
    /// # Errors
    /// `RATE_LIMITED`.
    pub fn task(&self, caller: &Caller) -> Result<Option<OwnedSemaphorePermit>, ApiError> {
        let (Some(most), Some(holder)) = (self.tasks, &caller.holder) else { return Ok(None) };
        let permits = {
            let mut all = self.permits.lock();
            if all.len() > MANY {
                all.retain(|_, permits| permits.available_permits() < most);
            }
            Arc::clone(all.entry(holder.id).or_insert_with(|| Arc::new(Semaphore::new(most))))
        };
        permits.try_acquire_owned().map(Some).map_err(|_| {
            let message = format!("the holder of this token has {most} tasks already, which is the most");
            ApiError::new(ErrorCode::RateLimited, message)
        })
    }
}

impl Quota {
    /// What the caller's bounds leave it now, of which the one that leaves less is told: of its requests a
    /// second, `left` of them, or of its tasks at once. Nothing for a caller without bounds.
    pub(crate) fn limits(&self, caller: &Caller, left: Option<u32>) -> Option<Limits> {
        let holder = caller.holder.as_ref()?;
        let rate = self.rate.as_ref().zip(left).map(|((rate, _), left)| {
            let used = rate.get().saturating_sub(left);
            let reset = Duration::from_secs(1) * used / rate.get();
            Limits { limit: u64::from(rate.get()), remaining: u64::from(left), reset: Some(reset) }
        });
        let tasks = self.tasks.map(|most| {
            let permits = self.permits.lock();
            let free = permits.get(&holder.id).map_or(most, |permits| permits.available_permits());
            Limits { limit: most as u64, remaining: free as u64, reset: None }
        });
        rate.into_iter().chain(tasks).min_by_key(|limits| limits.remaining)
    }
}

/// What a bound leaves of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Requests at once, or in a second.
    limit: u64,
    remaining: u64,
    /// Until all of them are free again, where time alone does it.
    reset: Option<Duration>,
}

impl Limits {
    /// Under the names that OpenAI's clients read.
    pub(crate) fn show(self, out: &mut HeaderMap) {
        out.insert(headers::RATE_LIMIT, HeaderValue::from(self.limit));
        out.insert(headers::RATE_REMAINING, HeaderValue::from(self.remaining));
        let reset = self.reset.map(|reset| match reset.as_millis() {
            millis if millis % 1000 == 0 => format!("{}s", millis / 1000),
            millis => format!("{millis}ms"),
        });
        if let Some(reset) = reset.and_then(|text| HeaderValue::from_str(&text).ok()) {
            out.insert(headers::RATE_RESET, reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::tokens::{TokenSet, Verdict};

    fn callers(set: &TokenSet) -> impl Fn(&str) -> Caller {
        move |token| match set.look_up(token, jiff::Timestamp::now()) {
            Verdict::Known(holder) => Caller { holder: Some(holder), ..Caller::default() },
            other => panic!("{other:?}"),
        }
    }

    // CLOUD-2883
    #[test]
    fn the_bound_that_leaves_less_is_told_in_the_headers_that_clients_know() {
        let set = TokenSet::parse(Some("token-of-a, token-of-b"), None).unwrap();
        let a = callers(&set)("token-of-a");
        let shown = |quota: &Quota, left| {
            let mut out = HeaderMap::new();
            quota.limits(&a, left)?.show(&mut out);
            let value = |name: &str| out.get(name).map(|value| value.to_str().unwrap().to_owned());
            Some(["limit", "remaining", "reset"].map(|what| value(&format!("x-ratelimit-{what}-requests"))))
        };
        let texts =
            |texts: [&str; 3]| Some(texts.map(|text| Some(text.to_owned()).filter(|text| !text.is_empty())));
        let holder = a.holder.as_ref().unwrap().id;
        let rate = Quota::new(NonZeroU32::new(4), None);
        let left = rate.request(holder).unwrap();
        assert_eq!((left, rate.request(holder).unwrap()), (Some(3), Some(2)));
        assert_eq!(shown(&rate, left), texts(["4", "3", "250ms"]));
        assert_eq!(shown(&rate, Some(0)), texts(["4", "0", "1s"]));
        let both = Quota::new(NonZeroU32::new(4), Some(2));
        assert_eq!(shown(&both, Some(3)), texts(["2", "2", ""]));
        let running = both.task(&a).unwrap();
        assert_eq!(shown(&both, Some(3)), texts(["2", "1", ""]));
        assert_eq!(shown(&both, Some(0)), texts(["4", "0", "1s"]));
        drop(running);
        assert_eq!(shown(&both, None), texts(["2", "2", ""]), "a route that is not counted");
        assert_eq!(shown(&Quota::new(None, None), None), None);
        assert!(both.limits(&Caller::default(), None).is_none(), "nobody is told apart");
    }

    // CLOUD-1120
    #[test]
    fn one_holder_cannot_take_the_requests_of_another() {
        let (a, b) = (HolderId(Uuid::from_u128(1)), HolderId(Uuid::from_u128(2)));
        let quota = Quota::new(NonZeroU32::new(2), None);
        assert!(quota.request(a).is_ok() && quota.request(a).is_ok());
        let refused = quota.request(a).unwrap_err().0;
        assert_eq!(refused.code, ErrorCode::RateLimited);
        assert!((1..=1000).contains(&refused.retry_after_ms.unwrap()), "{refused:?}");
        assert!(quota.request(b).is_ok());
        let unbounded = Quota::new(None, None);
        assert!((0..100).all(|_| unbounded.request(a).is_ok()));
    }

    // CLOUD-1121
    #[test]
    fn a_task_that_ends_makes_place_for_the_next_of_its_holder() {
        let set = TokenSet::parse(Some("token-of-a, token-of-b"), None).unwrap();
        let caller = callers(&set);
        let quota = Quota::new(None, Some(1));
        let running = quota.task(&caller("token-of-a")).unwrap();
        assert!(running.is_some());
        assert_eq!(quota.task(&caller("token-of-a")).unwrap_err().0.code, ErrorCode::RateLimited);
        assert!(quota.task(&caller("token-of-b")).unwrap().is_some());
        drop(running);
        assert!(quota.task(&caller("token-of-a")).unwrap().is_some());
        assert!(quota.task(&Caller::default()).unwrap().is_none(), "without tokens nobody is told apart");
    }

    // CLOUD-2765
    #[test]
    fn tokens_of_one_name_have_one_share_together() {
        let entry = |name: &str, token: &str| {
            format!("[[token]]\nname = \"{name}\"\ntoken = \"{token}\"\nscopes = [\"client\"]\n")
        };
        let file = [
            entry("ann", "old-token-of-ann"),
            entry("ann", "new-token-of-ann"),
            entry("bob", "token-of-bob"),
        ];
        let set = TokenSet::parse(None, Some(&file.concat())).unwrap();
        let caller = callers(&set);
        let quota = Quota::new(NonZeroU32::new(1), Some(1));
        let _running = quota.task(&caller("old-token-of-ann")).unwrap();
        let refused = quota.task(&caller("new-token-of-ann")).unwrap_err().0;
        assert_eq!(refused.code, ErrorCode::RateLimited);
        assert!(quota.task(&caller("token-of-bob")).unwrap().is_some());
        assert!(quota.request(caller("old-token-of-ann").holder_id()).is_ok());
        assert!(quota.request(caller("new-token-of-ann").holder_id()).is_err());
        assert!(quota.request(caller("token-of-bob").holder_id()).is_ok());
    }
}
