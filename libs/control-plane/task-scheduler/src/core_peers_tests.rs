//! Peers that refuse, fail, crash or only say too much: what that decides, and what it does not.

use pool_registry_types::error::EngineCrash;

use super::*;

const DENIED: &str = "it answers HTTP 401: it does not take the control plane's token";

fn pool(node_id: &str, pool_id: &str) -> PoolKey {
    PoolKey::new(node(node_id), PoolId::new(pool_id).unwrap())
}

fn model(name: &str) -> ModelRef {
    ModelRef::new(name).unwrap()
}

fn denied() -> HowEnded {
    HowEnded::Denied(DENIED.into())
}

fn rejected(code: ErrorCode) -> HowEnded {
    HowEnded::Rejected(ErrorBody::new(code, "no such thing"))
}

/// The engine was brought down while so many had just been accepted; this one is among them or not.
fn crashed(suspects: u32, suspect: bool) -> HowEnded {
    let crash = EngineCrash { signal: "SIGSEGV".into(), suspects, suspect };
    let died = ErrorBody::new(ErrorCode::WorkerReset, "the engine is gone").with_cause(EndCause::EngineDied);
    HowEnded::NodeError(ErrorBody { crash: Some(crash), ..died })
}

impl Bench {
    fn liveness(&self, name: &str) -> Liveness {
        self.core.registry().liveness(&node(name)).expect("it is known")
    }

    fn tries(&self, id: TaskId) -> u32 {
        self.core.tasks.get(&id).unwrap().tries
    }

    fn is_tripped(&self, key: &PoolKey) -> bool {
        self.core.registry().pool_facts(key).expect("it was reported").tripped
    }

    /// Lets the time come while these nodes, each with one slot, go on speaking.
    fn live_to(&mut self, millis: u64, names: &[&str]) {
        while self.now < millis {
            self.advance_to((self.now + 5_000).min(millis));
            for name in names {
                self.beat(name, self.now, 1, &[]);
            }
        }
    }

    /// Lets the time come, and counts the deadlines on the way, of which none may be one of the past.
    fn timers_to(&mut self, millis: u64) -> u32 {
        let mut timers = 0;
        while let Some(next) = self.core.next_deadline()
            && next <= at(millis)
        {
            self.now = next.as_millis();
            self.apply(Event::Timer);
            timers += 1;
            let next = self.core.next_deadline();
            assert!(next.is_none_or(|next| next > at(self.now)), "{next:?} is not after {}", self.now);
        }
        self.now = millis;
        timers
    }

    /// Ends the last attempt in this way, and the next, until one is at the node that is well.
    /// Returns how many it has ended.
    fn fail_until_at(&mut self, well: &str, how: &HowEnded) -> usize {
        let mut failed = 0;
        while self.last_dispatch().pool.node_id.as_str() != well {
            assert!(failed < 8, "the task goes nowhere else");
            self.end(self.last_dispatch().attempt, 0, how.clone());
            failed += 1;
        }
        failed
    }
}

// CLOUD-1314
#[test]
fn a_node_that_denies_us_is_suspect_until_a_probe_with_the_token_is_let_in() {
    let mut b = Bench::new();
    b.authorization = Err(Denied(DENIED.into()));
    b.join("a", 1);
    b.join("b", 1);
    let (id, _) = b.submit(task());
    assert_eq!(b.node_of(0), "a");
    b.probes.clear();
    b.end(b.dispatches[0].attempt, 0, denied());
    assert_eq!((b.liveness("a"), b.liveness("b")), (Liveness::Suspect, Liveness::Online));
    let view = b.core.view(at(b.now));
    assert_eq!(view.nodes[0].reason.as_deref(), Some(DENIED));
    assert_eq!((b.dispatches.len(), b.node_of(1), b.tries(id)), (2, "b", 0));
    // Neither a heartbeat nor a probe that shows no token lifts it.
    b.live_to(92_000, &["a", "b"]);
    assert_eq!(b.liveness("a"), Liveness::Suspect);
    let probes: Vec<(u64, bool)> =
        b.probes.iter().filter(|(_, id, _)| *id == node("a")).map(|(at, _, token)| (*at, *token)).collect();
    let expected = [1_000, 3_000, 7_000, 15_000, 31_000, 61_000, 91_000].map(|at| (at, true));
    assert_eq!(probes, expected, "after 1 s, 2, 4, ... and at most 30 s");
    let live = LiveAnswer { boot_id: boot(), node_id: node("a") };
    let outcome = ProbeOutcome::Answered { live, authorized: None };
    b.apply(Event::Probed { node_id: node("a"), address: "http://a".into(), outcome });
    assert_eq!(b.liveness("a"), Liveness::Suspect);
    // Our own tokens have changed: it is asked at once, and then from the shortest pause on.
    b.probes.clear();
    b.apply(Event::TokensChanged);
    b.advance_to(b.now + 1_000);
    assert_eq!(b.probes, [(92_000, node("a"), true), (93_000, node("a"), true)]);
    assert_eq!(b.liveness("a"), Liveness::Suspect);
    b.authorization = Ok(());
    b.apply(Event::TokensChanged);
    assert_eq!(b.liveness("a"), Liveness::Online);
    // The task that it has denied does not go back, although the other node is the one that is full.
    let full = ErrorBody::new(ErrorCode::ReplicaExhausted, "full");
    b.end(b.dispatches[1].attempt, 0, HowEnded::Refused(full));
    b.advance_to(b.now + 250);
    assert_eq!((b.dispatches.len(), b.node_of(2), b.tries(id)), (3, "b", 0));
}

// CLOUD-1314
#[test]
fn three_nodes_that_deny_us_beside_one_that_is_well_take_one_attempt_each_and_no_task() {
    let mut b = Bench::new();
    b.authorization = Err(Denied(DENIED.into()));
    for name in ["a", "b", "c", "d"] {
        b.join(name, 4);
    }
    for _ in 0..24 {
        b.now += 10;
        b.submit(task()).1.unwrap();
        b.fail_until_at("d", &denied());
        b.end(b.last_dispatch().attempt, 1, HowEnded::Finished);
    }
    let counters = b.core.counters();
    assert_eq!((counters.denials, counters.suspects, counters.completed), (3, 3, 24));
    assert!(b.terminal.is_empty(), "{:?}", b.terminal);
}

// CLOUD-1315
#[test]
fn a_node_that_fails_before_acceptance_three_times_is_tripped_with_all_its_pools() {
    let failures = [
        (HowEnded::NodeFailed("the node failed: INTERNAL".into()), 0),
        (HowEnded::NoAnswer("reset".into()), 3),
        (HowEnded::TimedOut(Overdue::Acceptance), 3),
    ];
    for (how, tries) in failures {
        let mut b = Bench::new();
        b.join("a", 1);
        let other = PoolReport {
            pool_id: PoolId::new("pool-1").unwrap(),
            models: vec![model("other")],
            ..report(1, &[])
        };
        b.report_pools("a", 2, vec![report(1, &[]), other]);
        let (id, _) = b.submit(task());
        for n in 0..3 {
            b.advance_to(b.now + 2_000);
            assert_eq!((b.dispatches.len(), b.core.counters().trips), (n + 1, 0), "{how:?}");
            b.end(b.last_dispatch().attempt, 0, how.clone());
        }
        assert_eq!((b.core.counters().trips, b.tries(id)), (1, tries), "{how:?}");
        assert!(b.is_tripped(&pool("a", "pool-0")) && b.is_tripped(&pool("a", "pool-1")), "{how:?}");
        assert_eq!(b.terminal.contains_key(&id), tries == 3, "{how:?}");
    }
}

// CLOUD-1315
#[test]
fn three_nodes_that_fail_beside_one_that_is_well_lose_no_task_and_are_left_alone() {
    let mut b = Bench::new();
    for name in ["a", "b", "c", "d"] {
        b.join(name, 4);
    }
    let mut failed = 0;
    for _ in 0..24 {
        b.advance_to(b.now + 300);
        b.submit(task()).1.unwrap();
        failed += b.fail_until_at("d", &HowEnded::NodeFailed("the node failed: INTERNAL".into()));
        b.end(b.last_dispatch().attempt, 1, HowEnded::Finished);
    }
    assert_eq!(b.core.counters().completed, 24);
    assert!(b.core.counters().trips >= 3 && failed < 24, "{failed} went there");
}

fn short() -> HowEnded {
    HowEnded::OwnShortage { reason: "too many open files".into(), everywhere: true }
}

// CLOUD-1316
#[test]
fn attempts_that_meet_one_shortage_together_wait_for_one_pause_and_an_accepted_one_ends_it() {
    let mut b = Bench::new();
    b.join("a", 8);
    for _ in 0..8 {
        b.submit(task()).1.unwrap();
    }
    for n in 1..8 {
        b.end(b.dispatches[n].attempt, 0, short());
    }
    b.advance_to(b.now + 249);
    assert_eq!(b.dispatches.len(), 8);
    b.advance_to(b.now + 1);
    assert_eq!(b.dispatches.len(), 15, "all again after one pause");
    b.end(b.dispatches[8].attempt, 0, short());
    assert_eq!(b.dispatches.len(), 15);
    let (attempt, replica_id) = (b.dispatches[0].attempt, ReplicaId::new("r0").unwrap());
    b.apply(Event::Accepted { attempt, replica_id, report_seq: 1 });
    assert_eq!(b.dispatches.len(), 16, "who is taken shows that it is over");
}

// CLOUD-1316
#[test]
fn what_is_short_for_one_node_only_keeps_no_other_waiting() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 1);
    let (id, _) = b.submit(task());
    let how = HowEnded::OwnShortage { reason: "no port is left".into(), everywhere: false };
    b.end(b.dispatches[0].attempt, 0, how);
    assert_eq!((b.dispatches.len(), b.tries(id)), (2, 0), "at once");
    assert_ne!(b.node_of(0), b.node_of(1));
    assert_eq!((b.liveness("a"), b.liveness("b")), (Liveness::Online, Liveness::Online));
}

// CLOUD-1550
#[test]
fn whoever_rejects_what_others_take_is_not_believed_and_is_left_alone_after_three_tasks() {
    let mut b = Bench::new();
    b.join("a", 4);
    b.join("b", 4);
    let first_a = || {
        let placement = Some(serde_json::from_str(r#"{"prefer_pools":["a/pool-0"]}"#).unwrap());
        TaskSpec { placement, ..task() }
    };
    for n in 1..=3 {
        assert!(!b.is_tripped(&pool("a", "pool-0")), "before task {n}");
        b.submit(first_a()).1.unwrap();
        b.now += 10;
        b.end(b.last_dispatch().attempt, 0, rejected(ErrorCode::InvalidParams));
        let taken = b.last_dispatch().clone();
        assert_eq!(taken.pool, pool("b", "pool-0"));
        let replica_id = ReplicaId::new("r0").unwrap();
        b.apply(Event::Accepted { attempt: taken.attempt, replica_id, report_seq: 1 });
        // It breaks, and waits for the one that had taken it: the other's word is worth nothing now.
        b.end(taken.attempt, 0, HowEnded::NodeError(ErrorBody::new(ErrorCode::PoolUnready, "reloading")));
        b.advance_to(b.now + 250);
        assert_eq!(b.last_dispatch().pool, pool("b", "pool-0"));
        b.end(b.last_dispatch().attempt, 1, HowEnded::Finished);
    }
    assert!(b.is_tripped(&pool("a", "pool-0")));
    assert_eq!(b.core.counters().completed, 3);
}

// CLOUD-1316
#[test]
fn what_we_could_not_do_ourselves_is_held_against_no_node_and_costs_no_try() {
    let mut b = Bench::new();
    b.join("a", 1);
    let (id, _) = b.submit(task());
    b.probes.clear();
    for (n, pause) in [250, 500, 1_000, 2_000, 4_000, 4_000].into_iter().enumerate() {
        b.now += 10;
        b.end(b.last_dispatch().attempt, 0, short());
        assert_eq!(b.liveness("a"), Liveness::Online);
        assert!(!b.is_tripped(&pool("a", "pool-0")));
        b.advance_to(b.now + pause - 1);
        assert_eq!(b.dispatches.len(), n + 1, "not at once, which would be a loop");
        b.advance_to(b.now + 1);
        assert_eq!(b.dispatches.len(), n + 2);
    }
    let counters = b.core.counters();
    assert_eq!((counters.own_shortages, counters.trips, counters.suspects), (6, 0, 0));
    assert_eq!((b.tries(id), b.probes.len()), (0, 0));
}

// CLOUD-1550
#[test]
fn what_one_node_rejects_is_asked_of_another_before_it_is_believed() {
    for code in [ErrorCode::InvalidParams, ErrorCode::PayloadTooLarge] {
        let mut b = Bench::new();
        b.join("a", 1);
        b.join("b", 1);
        let (served, _) = b.submit(task());
        b.end(b.dispatches[0].attempt, 0, rejected(code));
        assert_eq!(b.dispatches.len(), 2, "at once");
        assert_ne!(b.node_of(0), b.node_of(1));
        b.end(b.dispatches[1].attempt, 1, HowEnded::Finished);
        assert_eq!((b.core.counters().completed, b.tries(served)), (1, 0));
        let (bad, _) = b.submit(task());
        b.end(b.dispatches[2].attempt, 0, rejected(code));
        assert!(!b.terminal.contains_key(&bad));
        b.end(b.dispatches[3].attempt, 0, rejected(code));
        assert_eq!(b.terminal[&bad], code, "all say so");
        assert_eq!(b.view(bad).unwrap().error.unwrap().message, "no such thing");
        assert_eq!((b.dispatches.len(), b.tries(bad)), (4, 0));
    }
}

// CLOUD-1550
#[test]
fn a_rejection_is_not_believed_while_a_node_that_may_take_the_task_is_only_suspect() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 1);
    let (id, _) = b.submit(task());
    let away = b.node_of(0).to_owned();
    b.end(b.dispatches[0].attempt, 0, HowEnded::NeverSent("refused".into()));
    b.end(b.dispatches[1].attempt, 0, rejected(ErrorCode::InvalidParams));
    assert!(b.terminal.is_empty(), "{away} may take it");
    b.advance_to(1_000);
    assert_eq!((b.dispatches.len(), b.node_of(2)), (3, away.as_str()));
    b.end(b.dispatches[2].attempt, 0, rejected(ErrorCode::InvalidParams));
    assert_eq!(b.terminal[&id], ErrorCode::InvalidParams);
}

// CLOUD-1550
#[test]
fn a_task_that_a_node_has_taken_waits_for_it_whatever_the_others_find_wrong() {
    let mut b = Bench::new();
    b.join("a", 4);
    b.join("b", 4);
    let died = ErrorBody::new(ErrorCode::WorkerReset, "the engine is gone").with_cause(EndCause::EngineDied);
    let first_a = || {
        let placement = Some(serde_json::from_str(r#"{"prefer_pools":["a/pool-0"]}"#).unwrap());
        TaskSpec { placement, ..task() }
    };
    for n in 1..=3 {
        let (id, _) = b.submit(first_a());
        let taken = b.last_dispatch().clone();
        assert_eq!(taken.pool, pool("a", "pool-0"));
        b.apply(Event::Accepted {
            attempt: taken.attempt,
            replica_id: ReplicaId::new("r0").unwrap(),
            report_seq: n * 10,
        });
        let away = PoolReport { ready: false, state: PoolState::Failed, ..report(4, &[]) };
        b.report("a", n * 10 + 1, away);
        b.end(taken.attempt, 0, HowEnded::NodeError(died.clone()));
        assert_eq!(b.last_dispatch().pool, pool("b", "pool-0"));
        b.now += 10;
        b.end(b.last_dispatch().attempt, 0, rejected(ErrorCode::InvalidParams));
        assert!(b.terminal.is_empty(), "a has taken it");
        assert_eq!(b.is_tripped(&pool("b", "pool-0")), n == 3, "as by three that its engine fails");
        b.advance_to(b.now + 1_000);
        b.beat("a", n * 10 + 2, 4, &[]);
        assert_eq!(b.last_dispatch().pool, pool("a", "pool-0"));
        b.end(b.last_dispatch().attempt, 1, HowEnded::Finished);
        assert_eq!((b.view(id).unwrap().state, b.tries(id)), (TaskState::Completed, 1));
    }
}

// CLOUD-1550
#[test]
fn a_node_that_knows_its_engine_lacks_what_is_asked_is_believed_though_another_has_taken_the_task() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 1);
    for _ in 0..4 {
        let (id, _) = b.submit(task());
        let taken = b.last_dispatch().attempt;
        b.apply(Event::Accepted { attempt: taken, replica_id: ReplicaId::new("r0").unwrap(), report_seq: 1 });
        let lacking = ErrorBody::new(ErrorCode::Unsupported, "404").with_cause(EndCause::Engine4xx);
        b.end(taken, 0, HowEnded::NodeError(lacking));
        assert_ne!(b.last_dispatch().attempt, taken, "another one may have it");
        b.end(b.last_dispatch().attempt, 0, rejected(ErrorCode::Unsupported));
        assert_eq!(b.terminal[&id], ErrorCode::Unsupported, "nobody is left to ask");
    }
    assert!(["a", "b"].iter().all(|node| !b.is_tripped(&pool(node, "pool-0"))));
}

// CLOUD-1550
#[test]
fn a_task_that_a_suspect_node_takes_at_last_may_wait_as_long_as_any_other() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 1);
    let (id, _) = b.submit(task());
    let suspect = b.node_of(0).to_owned();
    b.end(b.dispatches[0].attempt, 0, HowEnded::NeverSent("refused".into()));
    b.end(b.dispatches[1].attempt, 0, rejected(ErrorCode::InvalidParams));
    b.advance_to(1_000);
    let taken = b.last_dispatch().clone();
    assert_eq!(taken.pool.node_id.as_str(), suspect);
    b.apply(Event::Accepted {
        attempt: taken.attempt,
        replica_id: ReplicaId::new("r0").unwrap(),
        report_seq: 1,
    });
    let seq = 1_000;
    b.report(&suspect, seq, PoolReport { ready: false, state: PoolState::Loading, ..report(1, &[]) });
    b.end(taken.attempt, 0, HowEnded::NodeError(ErrorBody::new(ErrorCode::PoolUnready, "reloading")));
    while b.now < TIMEOUT_MS * 3 {
        b.advance_to(b.now + 5_000);
        for name in ["a", "b"] {
            let is_ready = name != suspect;
            let state = if is_ready { PoolState::Ready } else { PoolState::Loading };
            b.report(name, seq + b.now, PoolReport { ready: is_ready, state, ..report(1, &[]) });
        }
    }
    assert!(b.terminal.is_empty(), "the wait for a suspect node is over with its acceptance");
    b.beat(&suspect, seq + b.now + 1, 1, &[]);
    assert_eq!((b.dispatches.len(), b.node_of(3)), (4, suspect.as_str()));
    b.end(b.dispatches[3].attempt, 1, HowEnded::Finished);
    assert_eq!(b.view(id).unwrap().state, TaskState::Completed);
}

// CLOUD-1551
#[test]
fn a_conflict_of_any_kind_costs_no_try() {
    let codes = [ErrorCode::WrongNode, ErrorCode::AttemptDuplicate, ErrorCode::Unknown];
    let mut b = Bench::new();
    b.join("a", 1);
    let (id, _) = b.submit(task());
    for (n, code) in codes.into_iter().cycle().take(9).enumerate() {
        b.end(b.last_dispatch().attempt, 0, HowEnded::Refused(ErrorBody::new(code, "not now")));
        b.advance_to(b.now + 250);
        assert_eq!(b.dispatches.len(), n + 2, "{code}");
    }
    assert_eq!(b.tries(id), 0);
}

// CLOUD-1552
#[test]
fn the_only_suspect_of_a_crash_is_given_no_second_engine() {
    for (request, tokens) in [(task(), 0), (task(), 3), (continued(), 0), (continued(), 3)] {
        let mut b = Bench::new();
        b.join("a", 1);
        b.join("b", 1);
        let (id, _) = b.submit(request);
        b.end(b.dispatches[0].attempt, tokens, crashed(1, true));
        b.advance_to(2_000);
        assert_eq!(b.terminal[&id], ErrorCode::PoolUnavailable);
        let error = b.view(id).unwrap().error.unwrap();
        assert!(!error.retriable && error.message.contains("SIGSEGV"), "{error:?}");
        assert_eq!((b.dispatches.len(), b.core.counters().culprits), (1, 1));
    }
}

// CLOUD-1503
// CLOUD-1552
#[test]
fn the_victims_of_another_task_did_not_kill_their_engines() {
    let mut b = Bench::new();
    for name in ["a", "b", "c"] {
        b.join(name, 1);
    }
    let (id, _) = b.submit(task());
    for n in 0..2 {
        assert_eq!(b.dispatches.len(), n + 1);
        b.end(b.dispatches[n].attempt, 0, crashed(1, false));
    }
    assert_eq!((b.dispatches.len(), b.tries(id), b.core.counters().culprits), (3, 2, 0));
    b.end(b.dispatches[2].attempt, 1, HowEnded::Finished);
    assert_eq!(b.view(id).unwrap().state, TaskState::Completed);
    // Each death is a try all the same.
    let (id, _) = b.submit(task());
    for n in 3..6 {
        assert_eq!(b.dispatches.len(), n + 1);
        b.end(b.dispatches[n].attempt, 0, crashed(1, false));
    }
    assert_eq!(b.terminal[&id], ErrorCode::PoolUnavailable);
    assert!(b.view(id).unwrap().error.unwrap().message.contains("all 3 tries failed"));
}

// CLOUD-1552
#[test]
fn two_suspects_of_one_crash_run_once_more_and_never_on_one_pool_at_a_time() {
    let mut b = Bench::new();
    b.join("a", 2);
    let (first, _) = b.submit(task());
    let (second, _) = b.submit(task());
    for n in 0..2 {
        b.end(b.dispatches[n].attempt, 0, crashed(2, true));
    }
    assert!(b.terminal.is_empty());
    b.advance_to(1_000);
    assert_eq!((b.dispatches.len(), b.last_dispatch().task), (3, first), "the other one waits");
    // Who is no suspect may have the slot.
    let (third, _) = b.submit(task());
    assert_eq!((b.dispatches.len(), b.last_dispatch().task), (4, third));
    b.end(b.dispatches[3].attempt, 1, HowEnded::Finished);
    b.advance_to(5_000);
    assert_eq!(b.dispatches.len(), 4);
    // Now one of them is known to have done it.
    b.end(b.dispatches[2].attempt, 0, crashed(1, true));
    assert_eq!(b.terminal, BTreeMap::from([(first, ErrorCode::PoolUnavailable)]));
    assert_eq!((b.dispatches.len(), b.last_dispatch().task), (5, second));
    b.end(b.dispatches[4].attempt, 1, HowEnded::Finished);
    assert_eq!(b.view(second).unwrap().state, TaskState::Completed);
    assert!(b.core.suspects_at.is_empty());
}

/// A node that is suspect beyond the lease of its model: it says nothing, and its tokens come.
fn suspect_beyond_the_lease() -> Bench {
    let mut b = Bench::new();
    b.join("a", 1);
    b.advance_to(25_000);
    b.apply(Event::Alive { node_id: node("a") });
    assert_eq!(b.liveness("a"), Liveness::Suspect);
    b
}

// CLOUD-1704
#[test]
fn a_task_pinned_to_a_suspect_node_waits_beyond_the_lease_of_its_model_until_the_node_is_offline() {
    let mut b = suspect_beyond_the_lease();
    let (early, answer) = b.submit(pinned_to("a"));
    answer.unwrap();
    assert!(b.timers_to(31_000) <= 20);
    assert_eq!(code(b.submit(task()).1), Some(ErrorCode::ModelNotAvailable));
    let (late, answer) = b.submit(pinned_to("a"));
    answer.unwrap();
    // The node is dialled each second.
    assert!(b.timers_to(54_999) <= 60);
    assert!(b.terminal.is_empty(), "{:?}", b.terminal);
    b.timers_to(55_000);
    assert_eq!(b.liveness("a"), Liveness::Offline);
    let ended = [early, late].map(|id| (id, ErrorCode::NodeUnavailable));
    assert_eq!(b.terminal, BTreeMap::from(ended));
    assert!(b.timers_to(120_000) <= 4, "nothing is left to wait for");
}

// CLOUD-1704
#[test]
fn a_task_that_waited_beyond_the_lease_ends_or_starts_with_what_its_node_has_when_it_is_back() {
    for has_it in [false, true] {
        let mut b = suspect_beyond_the_lease();
        let (id, _) = b.submit(pinned_to("a"));
        b.timers_to(40_000);
        let models = vec![model(if has_it { "m" } else { "other" })];
        b.report("a", 2, PoolReport { models, ..report(1, &[]) });
        assert_eq!(b.liveness("a"), Liveness::Online);
        assert_eq!(b.dispatches.len(), usize::from(has_it));
        let ended = (!has_it).then_some(ErrorCode::ModelNotAvailable);
        assert_eq!(b.terminal.get(&id).copied(), ended);
    }
}

// CLOUD-1704
#[test]
fn a_task_pinned_to_the_only_node_with_its_model_ends_with_the_node_and_not_with_the_model() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.submit(pinned_to("a")).1.unwrap();
    let (waiting, _) = b.submit(pinned_to("a"));
    // The leases of both end at the same moment.
    b.advance_to(TIMEOUT_MS);
    assert_eq!(b.liveness("a"), Liveness::Offline);
    assert_eq!(b.terminal, BTreeMap::from([(waiting, ErrorCode::NodeUnavailable)]));
}

// CLOUD-1207
#[test]
fn a_cancel_that_was_asked_for_before_the_end_of_the_daemon_ends_the_task_as_canceled() {
    let mut b = Bench::new();
    b.join("a", 2);
    let (canceled, _) = b.submit(task());
    let (running, _) = b.submit(task());
    let reply = b.reply();
    b.apply(Event::Cancel { reply, task_id: canceled });
    b.apply(Event::CutOff);
    for n in 0..2 {
        b.end(b.dispatches[n].attempt, 2, HowEnded::Closed);
    }
    assert_eq!(b.replies[&reply], Ok(Answer::Canceled));
    let ended = [(canceled, ErrorCode::Canceled), (running, ErrorCode::Draining)];
    assert_eq!(b.terminal, BTreeMap::from(ended));
}
