//! The moments at which all streams make their next token together.
//!
//! They are whole multiples of the pace on the wall clock, so that engines of one machine share them.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// One moment on both clocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Steps {
    begun: Instant,
    /// Since the epoch of Unix.
    begun_wall: Duration,
}

impl Steps {
    pub(crate) fn begin() -> Self {
        let begun_wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { begun: Instant::now(), begun_wall }
    }

    /// The first step after `now`; `pace` is the span between two.
    pub(crate) fn next(&self, now: Instant, pace: Duration) -> Instant {
        let pace = pace.as_nanos().max(1);
        let wall = self.begun_wall.as_nanos() + now.saturating_duration_since(self.begun).as_nanos();
        let next = (wall / pace + 1) * pace - self.begun_wall.as_nanos();
        self.begun + Duration::from_nanos(u64::try_from(next).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_waits_within_one_step_wakes_at_its_end_and_engines_share_it() {
        let pace = Duration::from_millis(100);
        let begun = Instant::now();
        let at = |ms: u64| begun + Duration::from_millis(ms);
        let one = Steps { begun, begun_wall: Duration::from_millis(1_234_070) };
        assert_eq!([0, 10, 29].map(|ms| one.next(at(ms), pace)), [at(30); 3]);
        assert_eq!([30, 129].map(|ms| one.next(at(ms), pace)), [at(130); 2]);
        let later = Steps { begun: at(55), begun_wall: Duration::from_millis(1_234_125) };
        assert_eq!(later.next(at(60), pace), at(130));
    }
}
