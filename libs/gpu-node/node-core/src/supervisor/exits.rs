//! The ends of a pool's engines: how long until the next start, when the pool is given up, and when
//! it is tried again.

use std::collections::VecDeque;
use std::time::Duration;

use pool_registry_types::{Backoff, Moment};

/// Exits are counted over this span. Source: .specs/01 CLOUD-2412.
pub(super) const STORM_WINDOW: Duration = Duration::from_secs(60);
/// First pause before a restart. Source: .specs/01 CLOUD-2411.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Before the restart of an engine that had been ready; by the exits of the last minute.
const PROVEN: Backoff = Backoff::new(FIRST_PAUSE, Duration::from_secs(5));
/// Before the restart of an engine that has never been ready.
const UNPROVEN: Backoff = Backoff::new(FIRST_PAUSE, Duration::from_secs(60));
/// How long a pool that was given up is left alone. Source: .specs/01 CLOUD-2412.
const COOL_DOWNS: Backoff = Backoff::new(Duration::from_secs(60), Duration::from_secs(15 * 60));

#[derive(Debug)]
struct Exit {
    at: Moment,
    /// Towards the limit.
    counts: bool,
}

/// The exits of the last [`STORM_WINDOW`].
#[derive(Debug, Default)]
pub(super) struct Exits(VecDeque<Exit>);

impl Exits {
    pub(super) fn add(&mut self, now: Moment, counts: bool) {
        self.0.push_back(Exit { at: now, counts });
        while self.0.front().is_some_and(|exit| exit.at + STORM_WINDOW <= now) {
            self.0.pop_front();
        }
    }

    /// How many of them count towards the limit.
    pub(super) fn counted(&self) -> u32 {
        let counted = self.0.iter().filter(|exit| exit.counts).count();
        u32::try_from(counted).unwrap_or(u32::MAX)
    }

    /// Until the next start, before jitter. `proven`: an engine of the pool had been ready.
    pub(super) fn pause(&self, proven: bool) -> Duration {
        let earlier = u32::try_from(self.0.len().saturating_sub(1)).unwrap_or(u32::MAX);
        if proven { PROVEN.after(earlier) } else { UNPROVEN.after(earlier) }
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// How long a pool is left alone whose engines end too often.
#[derive(Debug, Default)]
pub(super) struct CoolDown {
    /// How often there was one since the last reset.
    times: u32,
    pub(super) until: Option<Moment>,
}

impl CoolDown {
    /// Begins the next one. Returns how long it is.
    pub(super) fn begin(&mut self, now: Moment) -> Duration {
        let span = COOL_DOWNS.after(self.times);
        self.times = self.times.saturating_add(1);
        self.until = Some(now + span);
        span
    }

    /// Whether one has come to its end since the last question.
    pub(super) fn is_over(&mut self, now: Moment) -> bool {
        let over = self.until.is_some_and(|until| until <= now);
        if over {
            self.until = None;
        }
        over
    }

    /// An engine has served for long enough: the next one is the first again.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }
}
