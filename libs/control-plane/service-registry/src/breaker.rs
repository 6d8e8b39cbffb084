//! A breaker: after some failures in a row nothing more is sent, until one attempt shows that
//! it is well again.
//!
//! A pool has one for answers of its engine (5xx), a node one for its streams. Failures of
//! attempts that ran side by side count once: one death must not trip what has come back.

use std::time::Duration;

use pool_registry_types::{AttemptId, Moment};

/// Failures in a row that trip it. Source: .specs/01 CLOUD-1310.
pub(crate) const FAILURES_TO_TRIP: u32 = 3;
/// First pause; doubles with each trial that fails, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Closed,
    Open {
        until: Moment,
    },
    /// One attempt may go; this one has gone.
    HalfOpen {
        trial: Option<AttemptId>,
    },
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Breaker {
    state: State,
    failures: u32,
    last_failure: Option<Moment>,
    /// Trips since the last success.
    trips: u32,
}

impl Breaker {
    /// An attempt failed. Returns until when nothing is sent, if this tripped it.
    pub(crate) fn failed(&mut self, now: Moment, attempt: &AttemptId, dispatched: Moment) -> Option<Moment> {
        let side_by_side = self.last_failure.is_some_and(|last| dispatched <= last);
        let is_trial = matches!(self.state, State::HalfOpen { trial: Some(trial) } if trial == *attempt);
        if side_by_side && !is_trial {
            return None;
        }
        self.last_failure = Some(now);
        self.failures += 1;
        if !is_trial && (self.state != State::Closed || self.failures < FAILURES_TO_TRIP) {
            return None;
        }
        let until = now + (FIRST_PAUSE * 2_u32.pow(self.trips.min(8))).min(LONGEST_PAUSE);
        self.trips += 1;
        self.state = State::Open { until };
        Some(until)
    }

    /// An attempt got through.
    pub(crate) fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// Lets one attempt through when the pause is over. Returns whether it just ended.
    pub(crate) fn rest(&mut self, now: Moment) -> bool {
        let over = matches!(self.state, State::Open { until } if until <= now);
        if over {
            self.state = State::HalfOpen { trial: None };
        }
        over
    }

    /// When [`Breaker::rest`] has something to do.
    pub(crate) fn rests_until(&self) -> Option<Moment> {
        match self.state {
            State::Open { until } => Some(until),
            State::Closed | State::HalfOpen { .. } => None,
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// An attempt goes out.
    pub(crate) fn sent(&mut self, attempt: AttemptId) {
        if let State::HalfOpen { trial } = &mut self.state {
            trial.get_or_insert(attempt);
        }
    }

    /// The attempt is over; when it was the trial and has shown nothing, another may go.
    pub(crate) fn over(&mut self, attempt: &AttemptId) {
        if let State::HalfOpen { trial } = &mut self.state
            && *trial == Some(*attempt)
        {
            *trial = None;
        }
    }

    /// Nothing may be sent now.
    pub(crate) fn blocks(&self) -> bool {
        matches!(self.state, State::Open { .. } | State::HalfOpen { trial: Some(_) })
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn at(millis: u64) -> Moment {
        Moment::from_millis(millis)
    }

    fn attempt(n: u128) -> AttemptId {
        AttemptId(Uuid::from_u128(n))
    }

    fn tripped() -> (Breaker, Moment) {
        let mut breaker = Breaker::default();
        assert_eq!(breaker.failed(at(10), &attempt(1), at(0)), None);
        assert_eq!(breaker.failed(at(20), &attempt(2), at(11)), None);
        let until = breaker.failed(at(30), &attempt(3), at(21)).unwrap();
        (breaker, until)
    }

    // CLOUD-1310
    #[test]
    fn three_failures_in_a_row_trip_it_and_one_attempt_is_let_through_afterwards() {
        let (mut breaker, until) = tripped();
        assert_eq!(until, at(1_030));
        assert!(!breaker.rest(at(1_029)));
        assert!(breaker.blocks());
        breaker.rest(until);
        assert!(!breaker.blocks());
        breaker.sent(attempt(4));
        assert!(breaker.blocks(), "one is out");
        assert_eq!(breaker.failed(at(1_100), &attempt(4), until), Some(at(3_100)), "twice as long");
        breaker.rest(at(3_100));
        breaker.sent(attempt(5));
        breaker.succeeded();
        assert!(!breaker.blocks());
    }

    // CLOUD-1310
    #[test]
    fn a_trial_that_shows_nothing_makes_room_for_another() {
        let (mut breaker, until) = tripped();
        breaker.rest(until);
        breaker.sent(attempt(4));
        breaker.over(&attempt(4));
        assert!(!breaker.blocks());
    }

    // CLOUD-1311
    #[test]
    fn failures_side_by_side_count_once_and_a_success_forgets_them() {
        let mut breaker = Breaker::default();
        for n in 0..10 {
            assert_eq!(breaker.failed(at(100 + n), &attempt(u128::from(n)), at(n)), None);
        }
        assert_eq!(breaker.failed(at(200), &attempt(20), at(150)), None);
        breaker.succeeded();
        assert_eq!(breaker.failed(at(300), &attempt(21), at(250)), None);
        assert!(!breaker.blocks());
    }
}
