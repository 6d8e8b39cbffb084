//! Bytes of requests, or of answers, that are held at a time: counted from the first byte that is read until whoever
//! holds them lets them go, and never more than a bound, of which no holder takes more than half.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use pool_registry_types::{ErrorBody, ErrorCode, HolderId};

/// When somebody who was refused may try again, milliseconds.
const RETRY_AFTER_MS: u64 = 1_000;

/// So many bytes for all who ask.
#[derive(Debug)]
pub struct ByteBudget {
    /// What holds them, for those who find no room.
    what: &'static str,
    most: usize,
    held: Mutex<Counted>,
}

#[derive(Debug, Default)]
struct Counted {
    all: usize,
    /// Of those that hold something.
    by: HashMap<HolderId, usize>,
}

impl ByteBudget {
    pub fn new(most: usize) -> Arc<Self> {
        Self::of("requests", most)
    }

    /// Of what is called so.
    pub fn of(what: &'static str, most: usize) -> Arc<Self> {
        Arc::new(Self { what, most, held: Mutex::default() })
    }

    /// The most of one holder.
    pub fn share(&self) -> usize {
        self.most / 2
    }

    /// Nothing yet, for this holder; without one nobody is told apart.
    pub fn begin(self: &Arc<Self>, holder: Option<HolderId>) -> HeldBytes {
        HeldBytes { of: Some((Arc::clone(self), holder)), bytes: 0 }
    }

    /// Bytes that are held.
    pub fn held(&self) -> usize {
        self.held.lock().all
    }
}

/// Bytes that somebody holds; given back when it is dropped. The default counts nothing.
#[derive(Debug, Default)]
pub struct HeldBytes {
    of: Option<(Arc<ByteBudget>, Option<HolderId>)>,
    bytes: usize,
}

impl HeldBytes {
    /// So many more, which are about to be held.
    ///
    /// # Errors
    /// `OVERLOADED` where there is no room for them; nothing is counted then.
    pub fn add(&mut self, bytes: usize) -> Result<(), ErrorBody> {
        let Some((budget, who)) = &self.of else { return Ok(()) };
        let mut held = budget.held.lock();
        let full = |whose: &str, most: usize| {
            let message = format!("{} {whose}hold {most} bytes together, which is the most", budget.what);
            Err(ErrorBody::new(ErrorCode::Overloaded, message).retry_after_ms(RETRY_AFTER_MS))
        };
        if let Some(who) = who {
            let own = held.by.get(who).copied().unwrap_or(0);
            if own.saturating_add(bytes) > budget.share() {
                return full("of this token's holder ", budget.share());
            }
        }
        if held.all.saturating_add(bytes) > budget.most {
            return full("", budget.most);
        }
        held.all += bytes;
        if let Some(who) = who.filter(|_| bytes > 0) {
            *held.by.entry(who).or_default() += bytes;
        }
        drop(held);
        self.bytes += bytes;
        Ok(())
    }

    /// So many are held from now on, which are what is left of those that were read. A little more, as of
    /// defaults that are written out, is counted and not refused.
    pub fn set(&mut self, bytes: usize) {
        let before = std::mem::replace(&mut self.bytes, bytes);
        let Some((budget, who)) = &self.of else { return };
        let mut held = budget.held.lock();
        held.all = held.all - before + bytes;
        let Some(who) = who else { return };
        let own = held.by.entry(*who).or_default();
        *own = *own - before + bytes;
        if *own == 0 {
            held.by.remove(who);
        }
    }

    /// Bytes that are counted.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for HeldBytes {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// What the bodies of a daemon's requests may take while they are read. In the extensions of its
/// requests, as an `Arc`; without it nothing is counted.
#[derive(Debug)]
pub struct BodyBudgets {
    /// Of clients and operators. What waits for an engine counts on.
    pub clients: Arc<ByteBudget>,
    /// Of nodes: what clients send keeps no report out.
    pub nodes: Arc<ByteBudget>,
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    // CLOUD-2725
    #[test]
    fn all_have_one_bound_one_holder_half_of_it_and_what_is_dropped_is_given_back() {
        let budget = ByteBudget::new(100);
        let [a, b] = [1, 2].map(|n| Some(HolderId(Uuid::from_u128(n))));
        let mut first = budget.begin(a);
        first.add(30).unwrap();
        first.add(20).unwrap();
        let refused = first.add(1).unwrap_err();
        assert_eq!((refused.code, refused.retry_after_ms), (ErrorCode::Overloaded, Some(1_000)));
        assert!(refused.message.contains("this token"), "{}", refused.message);
        assert!(budget.begin(a).add(1).is_err(), "another request of the holder");
        let mut second = budget.begin(b);
        second.add(40).unwrap();
        // Without a token nobody is told apart, and there is one bound.
        let mut open = budget.begin(None);
        open.add(10).unwrap();
        assert!(!open.add(1).unwrap_err().message.contains("this token"));
        assert_eq!((budget.held(), open.bytes()), (100, 10));
        first.set(20);
        assert_eq!(budget.held(), 70);
        drop((first, second));
        assert_eq!(budget.held(), 10);
        open.add(90).unwrap();
        open.set(105);
        drop(open);
        assert_eq!((budget.held(), budget.held.lock().by.len()), (0, 0));
        let mut uncounted = HeldBytes::default();
        uncounted.add(usize::MAX).unwrap();
        uncounted.set(5);
    }
}
