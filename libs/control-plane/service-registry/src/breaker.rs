//! A breaker: after some failures in a row nothing more is sent, until one attempt shows that
//! it is well again.
//!
//! A pool has one for answers of its engine (5xx), a node one for its streams. Failures of
//! attempts that ran side by side count once: one death must not trip what has come back. So do
//! all failures of one task at a pool: what comes from one request proves nothing of others.

use std::time::Duration;

use pool_registry_types::{AttemptId, Backoff, Moment, TaskId};

/// Failures in a row that trip it. Source: .specs/01 CLOUD-1310.
const FAILURES_TO_TRIP: usize = 3;
/// By the trials that have failed.
const PAUSES: Backoff = Backoff::new(FIRST_PAUSE, Duration::from_secs(30));
const FIRST_PAUSE: Duration = Duration::from_secs(1);

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

/// Of what has not failed since its last success nothing is known: mostly it is that.
#[derive(Debug, Clone, Default)]
pub(crate) struct Breaker(Option<Box<Failing>>);

/// What has failed, and is not known to be well again.
#[derive(Debug, Clone, Default)]
struct Failing {
    state: State,
    /// Failures that count since the last success, each with its task where one is known.
    failures: Vec<Option<TaskId>>,
    last_failure: Option<Moment>,
    /// Trips since the last success.
    trips: u32,
    /// The task whose attempt was the trial that failed last.
    failed_trial: Option<TaskId>,
}

impl Breaker {
    /// An attempt failed; those of one task count once. Returns until when nothing is sent, if this
    /// tripped it.
    pub(crate) fn failed(
        &mut self,
        now: Moment,
        attempt: &AttemptId,
        task: Option<TaskId>,
        dispatched: Moment,
    ) -> Option<Moment> {
        self.0.get_or_insert_default().failed(now, attempt, task, dispatched)
    }

    /// What the task had counted was its own fault. Returns whether this lets tasks through again.
    pub(crate) fn withdraw(&mut self, task: TaskId) -> bool {
        self.0.as_mut().is_some_and(|failing| failing.withdraw(task))
    }

    /// An attempt got through.
    pub(crate) fn succeeded(&mut self) {
        self.0 = None;
    }

    /// Lets one attempt through when the pause is over. Returns whether it just ended.
    pub(crate) fn rest(&mut self, now: Moment) -> bool {
        self.0.as_mut().is_some_and(|failing| failing.rest(now))
    }

    /// When [`Breaker::rest`] has something to do.
    pub(crate) fn rests_until(&self) -> Option<Moment> {
        match self.state() {
            State::Open { until } => Some(until),
            State::Closed | State::HalfOpen { .. } => None,
        }
    }

    /// Nothing has failed since its last success.
    pub(crate) fn is_well(&self) -> bool {
        self.0.is_none()
    }

    fn state(&self) -> State {
        self.0.as_ref().map_or(State::Closed, |failing| failing.state)
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state() == State::Closed
    }

    /// An attempt goes out.
    pub(crate) fn sent(&mut self, attempt: AttemptId) {
        if let Some(State::HalfOpen { trial }) = self.0.as_mut().map(|failing| &mut failing.state) {
            trial.get_or_insert(attempt);
        }
    }

    /// The attempt is over; when it was the trial and has shown nothing, another may go.
    pub(crate) fn over(&mut self, attempt: &AttemptId) {
        if let Some(State::HalfOpen { trial }) = self.0.as_mut().map(|failing| &mut failing.state)
            && *trial == Some(*attempt)
        {
            *trial = None;
        }
    }

    /// Nothing may be sent now.
    pub(crate) fn blocks(&self) -> bool {
        matches!(self.state(), State::Open { .. } | State::HalfOpen { trial: Some(_) })
    }
}

impl Failing {
    fn failed(
        &mut self,
        now: Moment,
        attempt: &AttemptId,
        task: Option<TaskId>,
        dispatched: Moment,
    ) -> Option<Moment> {
        let side_by_side = self.last_failure.is_some_and(|last| dispatched <= last);
        let again = task.is_some() && self.failures.contains(&task);
        let is_trial = matches!(self.state, State::HalfOpen { trial: Some(trial) } if trial == *attempt);
        if (side_by_side || again) && !is_trial {
            return None;
        }
        self.last_failure = Some(now);
        if self.failures.len() < FAILURES_TO_TRIP {
            self.failures.push(task);
        }
        if !is_trial && (self.state != State::Closed || self.failures.len() < FAILURES_TO_TRIP) {
            return None;
        }
        self.failed_trial = task.filter(|_| is_trial);
        let until = now + PAUSES.after(self.trips);
        self.trips = self.trips.saturating_add(1);
        self.state = State::Open { until };
        Some(until)
    }

    fn withdraw(&mut self, task: TaskId) -> bool {
        self.failures.retain(|failed| *failed != Some(task));
        if self.failures.is_empty() {
            self.last_failure = None;
        }
        if self.failed_trial == Some(task) && matches!(self.state, State::Open { .. }) {
            // As it was before the trial, which has shown nothing.
            (self.state, self.trips) = (State::HalfOpen { trial: None }, self.trips.saturating_sub(1));
            self.failed_trial = None;
            return true;
        }
        let reopens = matches!(self.state, State::Open { .. })
            && self.trips == 1
            && self.failures.len() < FAILURES_TO_TRIP;
        if reopens {
            (self.state, self.trips) = (State::Closed, 0);
        }
        reopens
    }

    fn rest(&mut self, now: Moment) -> bool {
        let over = matches!(self.state, State::Open { until } if until <= now);
        if over {
            self.state = State::HalfOpen { trial: None };
        }
        over
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
        assert_eq!(breaker.failed(at(10), &attempt(1), None, at(0)), None);
        assert_eq!(breaker.failed(at(20), &attempt(2), None, at(11)), None);
        let until = breaker.failed(at(30), &attempt(3), None, at(21)).unwrap();
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
        assert_eq!(breaker.failed(at(1_100), &attempt(4), None, until), Some(at(3_100)), "twice as long");
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

    // CLOUD-1310
    #[test]
    fn the_tries_of_one_task_count_once_and_three_different_tasks_trip_it() {
        let task = |n: u128| Some(TaskId(Uuid::from_u128(n)));
        let mut breaker = Breaker::default();
        for n in 0..9 {
            assert_eq!(breaker.failed(at(10 * n + 5), &attempt(u128::from(n)), task(1), at(10 * n)), None);
        }
        assert!(breaker.failed(at(205), &attempt(21), task(2), at(200)).is_none());
        assert!(breaker.failed(at(305), &attempt(31), task(3), at(300)).is_some());
    }

    // CLOUD-1312
    #[test]
    fn a_trial_that_failed_by_its_requests_own_fault_was_none() {
        let task = |n: u128| TaskId(Uuid::from_u128(n));
        let (mut breaker, until) = tripped();
        assert!(breaker.rest(until));
        breaker.sent(attempt(4));
        let again = breaker.failed(until + Duration::from_millis(5), &attempt(4), Some(task(4)), until);
        assert!(again.is_some() && breaker.blocks());
        assert!(!breaker.withdraw(task(5)), "of another task");
        assert!(breaker.withdraw(task(4)) && !breaker.blocks(), "the next one may try at once");
        let first = breaker.rests_until();
        assert_eq!(first, None);
        breaker.sent(attempt(5));
        let later = until + Duration::from_secs(1);
        let pause = breaker.failed(later, &attempt(5), Some(task(5)), later).unwrap();
        assert_eq!(pause, later + 2 * FIRST_PAUSE, "and it did not double the pause");
    }

    // CLOUD-1312
    #[test]
    fn what_was_the_requests_own_fault_is_taken_back() {
        let task = |n: u128| TaskId(Uuid::from_u128(n));
        let mut breaker = Breaker::default();
        for n in 1..=3 {
            let id = attempt(u128::from(n));
            let tripped = breaker.failed(at(10 * n + 5), &id, Some(task(u128::from(n))), at(10 * n));
            assert_eq!(tripped.is_some(), n == 3);
        }
        assert!(breaker.withdraw(task(3)) && !breaker.blocks());
        assert!(!breaker.withdraw(task(2)));
        assert_eq!(
            breaker.failed(at(105), &attempt(9), Some(task(4)), at(100)),
            None,
            "the second that counts"
        );
    }

    // CLOUD-1311
    #[test]
    fn failures_side_by_side_count_once_and_a_success_forgets_them() {
        let mut breaker = Breaker::default();
        for n in 0..10 {
            assert_eq!(breaker.failed(at(100 + n), &attempt(u128::from(n)), None, at(n)), None);
        }
        assert_eq!(breaker.failed(at(200), &attempt(20), None, at(150)), None);
        breaker.succeeded();
        assert_eq!(breaker.failed(at(300), &attempt(21), None, at(250)), None);
        assert!(!breaker.blocks());
    }
}
