//! How long to pause between tries, and when to give up: one rule for whatever tries again.
//!
//! Both are told how many tries have failed and keep no count of their own: what a failure is, and
//! what wipes the count, is for whoever tries. Chance is no part of it either: who belongs to a
//! fleet spreads the pause by a seeded source of its own.

use std::time::Duration;

/// The first pause, doubled with each failure before, and never longer than the longest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
}

impl Backoff {
    pub const fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest }
    }

    /// The pause after a failure that `earlier` others came before: the first one after none.
    pub fn after(&self, earlier: u32) -> Duration {
        let doubled = 1_u32.checked_shl(earlier).unwrap_or(u32::MAX);
        self.first.saturating_mul(doubled).min(self.longest)
    }
}

/// Some tries, with growing pauses between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    tries: u32,
    pauses: Backoff,
}

impl RetryPolicy {
    /// `tries`: all of them, the first one included; 0 is as good as 1.
    pub const fn new(tries: u32, pauses: Backoff) -> Self {
        Self { tries, pauses }
    }

    /// The pause before the next try, when so many have failed in a row; absent when that were all.
    /// Where the last one has failed but does not count, since it got somewhere, there are none.
    pub fn pause_after(&self, failures: u32) -> Option<Duration> {
        (failures == 0 || failures < self.tries).then(|| self.pauses.after(failures))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn pauses_double_up_to_the_longest_however_many_failures_there_are() {
        let pauses = Backoff::new(SECOND, SECOND * 30);
        let secs = |earlier| pauses.after(earlier).as_secs();
        assert_eq!([0, 1, 2, 4, 5, 6, 31, 32, u32::MAX].map(secs), [1, 2, 4, 16, 30, 30, 30, 30, 30]);
        assert_eq!(Backoff::new(SECOND, Duration::MAX).after(u32::MAX), SECOND * u32::MAX);
        assert_eq!(Backoff::new(SECOND, SECOND / 2).after(0), SECOND / 2, "the longest counts");
    }

    #[test]
    fn a_policy_ends_with_its_last_try() {
        let policy = RetryPolicy::new(3, Backoff::new(SECOND, SECOND * 3));
        let pauses = [0, 1, 2, 3, u32::MAX].map(|failures| policy.pause_after(failures));
        assert_eq!(pauses, [Some(SECOND), Some(SECOND * 2), Some(SECOND * 3), None, None]);
    }
}
