//! When to register, when to report, when to try again: a value that is told the time.
//!
//! One rule covers a restarted control plane, a restarted node and a healed partition: an
//! unknown registration means *register again, now*. Pauses between tries grow, with jitter,
//! and never exceed the heartbeat interval.

use std::time::Duration;

use pool_registry_types::node::{HeartbeatAnswer, Liveness, ObservedLiveness, RegisterAnswer};
use pool_registry_types::{Backoff, Epoch, ErrorBody, ErrorCode, Moment};

use crate::jitter::Jitter;

/// First pause after a failed call; doubles up to the heartbeat interval.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// First pause of a node that gets no tasks, to the heartbeat that may say it does; doubles up to the interval.
const FIRST_ASK: Duration = Duration::from_millis(250);
/// Changes within this span go into one report. Source: .specs/01 CLOUD-1011.
const COALESCE: Duration = Duration::from_millis(50);

/// What the shell is to do now. One call is under way at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    Register,
    Heartbeat { epoch: Epoch },
    Deregister { epoch: Epoch },
}

/// Why a heartbeat was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BeatFailure {
    /// Unknown node or an old epoch.
    Unknown,
    /// No answer, or one that says nothing about the registration, and why.
    Failed(String),
}

/// Why a registration was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegisterFailure {
    Refused(ErrorBody),
    /// There was no answer, and why.
    Unreachable(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Unregistered { next_try: Moment },
    Registering,
    Registered { epoch: Epoch, next_beat: Moment, beating: bool },
    Leaving { epoch: Epoch, sent: bool },
    Left,
}

/// The session as far as it has come.
#[derive(Debug, Clone)]
pub struct Session {
    state: State,
    interval: Duration,
    failures: u32,
    /// Why the last registration was refused.
    problem: Option<String>,
    /// What the last heartbeat was answered.
    observed: Option<ObservedLiveness>,
    /// The last liveness of [`Session::take_news`].
    shown: Option<Liveness>,
    /// Heartbeats in a row whose answers said that the node gets no tasks.
    asks: u32,
    /// Why the last heartbeat was not taken.
    unheard: Option<String>,
    /// What only a registration says has changed since the last one was sent.
    again: bool,
    jitter: Jitter,
}

impl Session {
    /// `interval` is the node's own; the control plane's answer replaces it. `seed` decides the jitter.
    pub fn new(now: Moment, interval: Duration, seed: u64) -> Self {
        let jitter = Jitter::new(seed);
        let state = State::Unregistered { next_try: now };
        Self {
            state,
            interval,
            failures: 0,
            problem: None,
            observed: None,
            shown: None,
            asks: 0,
            unheard: None,
            again: false,
            jitter,
        }
    }

    /// What is due now. The caller performs it and tells the outcome.
    pub(crate) fn next_action(&mut self, now: Moment) -> Option<Action> {
        match &mut self.state {
            State::Unregistered { next_try } if *next_try <= now => {
                (self.state, self.again) = (State::Registering, false);
                Some(Action::Register)
            }
            State::Registered { beating: false, .. } if self.again => {
                (self.state, self.again) = (State::Registering, false);
                Some(Action::Register)
            }
            State::Registered { epoch, next_beat, beating } if !*beating && *next_beat <= now => {
                *beating = true;
                // Only a change while the call is under way sets a moment before its answer does.
                *next_beat = Moment::NEVER;
                Some(Action::Heartbeat { epoch: epoch.clone() })
            }
            State::Leaving { epoch, sent } if !*sent => {
                *sent = true;
                Some(Action::Deregister { epoch: epoch.clone() })
            }
            _ => None,
        }
    }

    /// When [`Session::next_action`] has something next.
    pub(crate) fn next_deadline(&self) -> Option<Moment> {
        match &self.state {
            State::Unregistered { next_try } => Some(*next_try),
            State::Registered { next_beat, beating: false, .. } => Some(*next_beat),
            _ => None,
        }
    }

    /// The answer to [`Action::Register`]; `Err(RegisterFailure::Unreachable("no route".into()))` when none came.
    pub(crate) fn registered(&mut self, now: Moment, answer: Result<RegisterAnswer, RegisterFailure>) {
        if self.state != State::Registering {
            return;
        }
        match answer {
            Ok(answer) => {
                self.interval = Duration::from_millis(answer.heartbeat_interval_ms.max(1));
                self.failures = 0;
                self.problem = None;
                (self.observed, self.asks, self.unheard) = (None, 0, None);
                // The first report goes at once: until then the control plane knows no pool.
                self.state = State::Registered { epoch: answer.epoch, next_beat: now, beating: false };
            }
            Err(refusal) => {
                let conflict = matches!(&refusal, RegisterFailure::Refused(body) if body.code == ErrorCode::NodeIdConflict);
                let pause = if conflict { self.interval } else { self.pause() };
                self.problem = Some(match refusal {
                    RegisterFailure::Refused(body) => body.to_string(),
                    RegisterFailure::Unreachable(why) => format!("the control plane does not answer: {why}"),
                });
                self.state = State::Unregistered { next_try: now + pause };
            }
        }
    }

    /// The answer to [`Action::Heartbeat`].
    pub(crate) fn heartbeat_answered(&mut self, now: Moment, answer: Result<&HeartbeatAnswer, &BeatFailure>) {
        let State::Registered { beating, .. } = &mut self.state else { return };
        *beating = false;
        self.unheard = match answer {
            Err(BeatFailure::Failed(why)) => Some(why.clone()),
            // It registers anew.
            Err(BeatFailure::Unknown) | Ok(_) => None,
        };
        if let Ok(answer) = answer {
            self.observed.clone_from(&answer.observed);
            self.asks = if self.gets_no_tasks() { self.asks.saturating_add(1) } else { 0 };
        }
        let tick = self.tick();
        let State::Registered { next_beat, .. } = &mut self.state else { return };
        match answer {
            Ok(answer) => {
                self.failures = 0;
                self.interval = Duration::from_millis(answer.heartbeat_interval_ms.max(1));
                *next_beat = (*next_beat).min(now + tick);
            }
            Err(BeatFailure::Unknown) => {
                self.failures = 0;
                self.state = State::Unregistered { next_try: now };
            }
            Err(BeatFailure::Failed(_)) => {
                let pause = self.pause();
                if let State::Registered { next_beat, .. } = &mut self.state {
                    *next_beat = now + pause;
                }
            }
        }
    }

    /// Something worth a report at once has changed.
    pub(crate) fn poke(&mut self, now: Moment) {
        if let State::Registered { next_beat, .. } = &mut self.state {
            let soon = now + COALESCE;
            *next_beat = (*next_beat).min(soon);
        }
    }

    /// What only a registration says has changed.
    pub(crate) fn register_again(&mut self, now: Moment) {
        // A registration that is under way says what was before; one that is to come says this.
        self.again = true;
        if let State::Registered { next_beat, .. } = &mut self.state {
            *next_beat = (*next_beat).min(now);
        }
    }

    /// Ends the session: deregisters when there is a registration.
    pub(crate) fn leave(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Left) {
            State::Registered { epoch, .. } => State::Leaving { epoch, sent: false },
            _ => State::Left,
        };
    }

    /// The outcome of [`Action::Deregister`] does not matter: the node goes.
    pub(crate) fn deregistered(&mut self) {
        self.state = State::Left;
    }

    pub fn is_registered(&self) -> bool {
        matches!(self.state, State::Registered { .. })
    }

    /// The registration that holds now.
    pub fn epoch(&self) -> Option<&Epoch> {
        match &self.state {
            State::Registered { epoch, .. } => Some(epoch),
            _ => None,
        }
    }

    pub fn has_left(&self) -> bool {
        self.state == State::Left
    }

    /// Why the node gets no tasks from the control plane, for `/health/ready`.
    pub fn problem(&self) -> Option<String> {
        if !self.is_registered() {
            return Some(self.problem.clone().unwrap_or_else(|| "not registered yet".into()));
        }
        if let Some(why) = &self.unheard {
            return Some(format!("the last heartbeat was not taken: {why}"));
        }
        let observed = self.observed.as_ref().filter(|_| self.gets_no_tasks())?;
        let reason = observed.reason.as_deref().unwrap_or("no reason is given");
        Some(format!("the control plane takes it for {}: {reason}", observed.liveness))
    }

    /// What the control plane takes the node for, where that is another liveness than was returned before.
    /// One that gets no tasks yet after its first heartbeat is not dialled yet, and that is no news.
    pub fn take_news(&mut self) -> Option<ObservedLiveness> {
        let observed = self.observed.as_ref().filter(|_| self.asks != 1)?;
        let is_news = self.shown.replace(observed.liveness) != Some(observed.liveness);
        is_news.then(|| observed.clone())
    }

    fn pause(&mut self) -> Duration {
        let pause = Backoff::new(FIRST_PAUSE, self.interval).after(self.failures);
        self.failures = self.failures.saturating_add(1);
        self.jitter.spread(pause)
    }

    /// Until the next heartbeat. One that gets no tasks asks sooner whether it does again.
    fn tick(&mut self) -> Duration {
        let tick = match self.asks.checked_sub(1) {
            Some(asks) => Backoff::new(FIRST_ASK, self.interval).after(asks).min(self.interval),
            None => self.interval,
        };
        self.jitter.spread(tick)
    }

    fn gets_no_tasks(&self) -> bool {
        self.observed.as_ref().is_some_and(|observed| observed.liveness != Liveness::Online)
    }
}

#[cfg(test)]
mod tests {
    use pool_registry_types::NodeId;
    use pool_registry_types::node::Intent;

    use super::*;

    fn at(millis: u64) -> Moment {
        Moment::from_millis(millis)
    }

    fn session() -> Session {
        Session::new(at(0), Duration::from_secs(10), 42)
    }

    fn answer() -> RegisterAnswer {
        RegisterAnswer {
            node_id: NodeId::new("a").unwrap(),
            epoch: Epoch::new("e1").unwrap(),
            heartbeat_interval_ms: 2_000,
            node_timeout_ms: 6_000,
            intent: Intent::Serving,
            intent_order: 0,
            life: None,
        }
    }

    fn beat_answer() -> HeartbeatAnswer {
        HeartbeatAnswer {
            waiting: Vec::new(),
            heartbeat_interval_ms: 2_000,
            cancel_attempts: vec![],
            intent: Intent::Serving,
            intent_order: 0,
            observed: None,
        }
    }

    // CLOUD-2694
    #[test]
    fn what_changes_while_it_registers_is_told_by_the_next_registration() {
        let mut s = session();
        assert_eq!(s.next_action(at(0)), Some(Action::Register));
        s.register_again(at(1));
        s.registered(at(2), Ok(answer()));
        assert_eq!(s.next_action(at(2)), Some(Action::Register));
        s.registered(at(3), Ok(answer()));
        assert!(matches!(s.next_action(at(3)), Some(Action::Heartbeat { .. })), "and then no more");
        s.register_again(at(4));
        assert_eq!(s.next_action(at(4)), None, "one call at a time");
        s.heartbeat_answered(at(5), Ok(&beat_answer()));
        assert!(s.is_registered() && s.next_deadline().is_some_and(|next| next <= at(5)));
        assert_eq!(s.next_action(at(5)), Some(Action::Register));
    }

    // CLOUD-2665
    #[test]
    fn a_node_that_gets_no_tasks_says_why_and_asks_sooner_until_it_does() {
        let mut s = registered();
        assert_eq!(s.problem(), None);
        let stands = |liveness, reason: Option<&str>| HeartbeatAnswer {
            observed: Some(ObservedLiveness { liveness, reason: reason.map(str::to_owned) }),
            heartbeat_interval_ms: 10_000,
            ..beat_answer()
        };
        let mut now = 1;
        let mut pauses = Vec::new();
        for _ in 0..8 {
            assert!(matches!(s.next_action(at(now)), Some(Action::Heartbeat { .. })));
            s.heartbeat_answered(at(now), Ok(&stands(Liveness::Suspect, Some("a firewall"))));
            assert_eq!(s.problem().unwrap(), "the control plane takes it for suspect: a firewall");
            let next = s.next_deadline().unwrap();
            pauses.push(next.millis_since(at(now)));
            now += pauses[pauses.len() - 1];
        }
        assert_eq!(s.take_news().map(|news| news.liveness), Some(Liveness::Suspect));
        assert_eq!(s.take_news(), None, "it is no news twice");
        assert!(pauses[0] <= 250 && pauses.iter().all(|pause| *pause <= 10_000), "{pauses:?}");
        assert!(pauses[7] > 8_000, "ever less often: {pauses:?}");
        assert!(s.next_action(at(now)).is_some());
        s.heartbeat_answered(at(now), Ok(&stands(Liveness::Online, None)));
        assert_eq!((s.problem(), s.take_news().map(|news| news.liveness)), (None, Some(Liveness::Online)));
        assert!(s.next_deadline().unwrap() > at(now + 8_000));
        // A heartbeat that nobody answers is one that nobody hears; what was said before is not shown for it.
        assert!(s.next_action(at(now + 10_000)).is_some());
        s.heartbeat_answered(at(now + 10_001), Err(&BeatFailure::Failed("no route".into())));
        assert_eq!(s.problem().unwrap(), "the last heartbeat was not taken: no route");
        assert!(s.next_action(at(now + 20_000)).is_some());
        s.heartbeat_answered(at(now + 20_001), Ok(&beat_answer()));
        assert_eq!(s.problem(), None, "an older control plane says nothing of it");
    }

    fn registered() -> Session {
        let mut s = session();
        assert_eq!(s.next_action(at(0)), Some(Action::Register));
        s.registered(at(1), Ok(answer()));
        s
    }

    // CLOUD-1010
    #[test]
    fn the_first_report_follows_the_registration_at_once_and_the_servers_interval_wins() {
        let mut s = registered();
        assert!(matches!(s.next_action(at(1)), Some(Action::Heartbeat { .. })));
        s.heartbeat_answered(at(2), Ok(&beat_answer()));
        let next = s.next_deadline().unwrap();
        assert!(next >= at(2 + 1_800) && next <= at(2 + 2_000), "{next:?}");
    }

    // CLOUD-1008
    #[test]
    fn an_unknown_registration_registers_again_now() {
        let mut s = registered();
        s.next_action(at(1));
        s.heartbeat_answered(at(50), Err(&BeatFailure::Unknown));
        assert_eq!(s.next_action(at(50)), Some(Action::Register));
    }

    // CLOUD-1015
    #[test]
    fn pauses_grow_and_never_exceed_the_interval() {
        let mut s = session();
        let (mut now, mut last) = (0, 0);
        for _ in 0..20 {
            assert_eq!(s.next_action(at(now)), Some(Action::Register));
            s.registered(at(now), Err(RegisterFailure::Unreachable("no route".into())));
            let next = s.next_deadline().unwrap().as_millis();
            last = next - now;
            assert!((90..=10_000).contains(&last), "{last}");
            now = next;
        }
        assert!(last >= 9_000);
    }

    // CLOUD-1014
    #[test]
    fn a_conflict_is_tried_again_at_the_interval_and_is_shown() {
        let mut s = session();
        s.next_action(at(0));
        s.registered(
            at(0),
            Err(RegisterFailure::Refused(ErrorBody::new(ErrorCode::NodeIdConflict, "taken"))),
        );
        assert_eq!(s.next_deadline(), Some(at(10_000)));
        assert!(s.problem().unwrap().contains("NODE_ID_CONFLICT"));
    }

    // CLOUD-1011
    #[test]
    fn changes_go_into_one_report_within_50_ms() {
        let mut s = registered();
        s.next_action(at(1));
        s.heartbeat_answered(at(2), Ok(&beat_answer()));
        s.poke(at(100));
        s.poke(at(120));
        assert_eq!(s.next_deadline(), Some(at(150)));
    }

    // CLOUD-1011
    #[test]
    fn a_change_while_a_report_is_under_way_makes_another() {
        let mut s = registered();
        s.next_action(at(1));
        s.poke(at(10));
        assert_eq!(s.next_action(at(100)), None, "one call at a time");
        s.heartbeat_answered(at(20), Ok(&beat_answer()));
        assert_eq!(s.next_deadline(), Some(at(60)));
        let mut late = registered();
        late.next_action(at(1));
        late.poke(at(10));
        late.heartbeat_answered(at(500), Ok(&beat_answer()));
        assert_eq!(late.next_deadline(), Some(at(60)), "its moment has passed: it goes now");
    }

    // CLOUD-1016
    #[test]
    fn leaving_deregisters_once_and_an_unregistered_session_just_ends() {
        let mut s = registered();
        s.leave();
        assert!(matches!(s.next_action(at(5)), Some(Action::Deregister { .. })));
        assert_eq!(s.next_action(at(5)), None);
        s.deregistered();
        assert!(s.has_left());
        let mut never = session();
        never.leave();
        assert!(never.has_left());
    }
}
