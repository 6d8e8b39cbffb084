use std::time::Duration;

use crate::attempts::{Cursor, Piece};
use pool_registry_types::ModelRef;
use pool_registry_types::pool::PoolState;
use proptest::prelude::*;
use uuid::Uuid;

use super::*;

fn at(millis: u64) -> Moment {
    Moment::from_millis(millis)
}

fn attempt(n: u128) -> AttemptId {
    AttemptId(Uuid::from_u128(n))
}

fn boot() -> BootId {
    BootId(Uuid::from_u128(1))
}

fn pool_id() -> PoolId {
    PoolId::new("pool-0").unwrap()
}

fn replica_id(n: u32) -> ReplicaId {
    ReplicaId::new(&format!("r{n}")).unwrap()
}

fn spec(n: u32, slots: u32) -> ReplicaSpec {
    ReplicaSpec {
        replica_id: replica_id(n),
        engine: EngineKind::LlamaCpp,
        engine_version: None,
        url: format!("http://127.0.0.1:{}", 9000 + n),
        models: vec![ModelRef::new("m").unwrap()],
        engine_names: BTreeMap::new(),
        names_from_engine: false,
        slots,
        ctx_max: Some(2048),
        device_mask: None,
        warning: None,
    }
}

fn node() -> NodeCore {
    let identity = Identity {
        node_id: NodeId::new("a").unwrap(),
        machine_id: MachineId::new("m").unwrap(),
        boot_id: boot(),
        address: "http://127.0.0.1:9200".into(),
        version: "0".into(),
        labels: pool_registry_types::placement::Labels::new(),
        capabilities: Capabilities::default(),
    };
    NodeCore::new(identity, Session::new(at(0), Duration::from_secs(10), 1), Intent::Serving)
}

fn serving(replicas: u32, slots: u32) -> NodeCore {
    let mut node = node();
    for n in 0..replicas {
        node.bind(at(0), &pool_id(), spec(n, slots)).unwrap();
        node.observed(at(0), &pool_id(), &replica_id(n), Readiness::Ready);
    }
    node
}

fn accept(node: &mut NodeCore, n: u128) -> Result<Accepted, ErrorCode> {
    let node_id = NodeId::new("a").unwrap();
    let ask = Ask {
        node_id: &node_id,
        boot_id: boot(),
        attempt: attempt(n),
        model: None,
        task: None,
        hint: None,
        first_index: 0,
        retention: Retention::Attached,
    };
    node.accept(at(0), &pool_id(), &ask).map_err(|error| error.code)
}

// CLOUD-1404
#[test]
fn the_node_never_runs_more_than_its_slots() {
    let mut node = serving(2, 1);
    let first = accept(&mut node, 1).unwrap().replica_id;
    let second = accept(&mut node, 2).unwrap().replica_id;
    assert_ne!(first, second, "the least busy replica is taken");
    assert_eq!(accept(&mut node, 3), Err(ErrorCode::ReplicaExhausted));
    node.ended(&attempt(1));
    assert!(accept(&mut node, 3).is_ok());
}

// CLOUD-1410
#[test]
fn a_hinted_replica_is_taken_while_it_has_a_slot() {
    let mut node = serving(2, 2);
    let node_id = NodeId::new("a").unwrap();
    let hint = replica_id(1);
    for n in 1..=2 {
        let ask = Ask {
            node_id: &node_id,
            boot_id: boot(),
            attempt: attempt(n),
            model: None,
            task: None,
            hint: Some(&hint),
            first_index: 0,
            retention: Retention::Attached,
        };
        assert_eq!(node.accept(at(0), &pool_id(), &ask).unwrap().replica_id, hint);
    }
    let ask = Ask {
        node_id: &node_id,
        boot_id: boot(),
        attempt: attempt(3),
        model: None,
        task: None,
        hint: Some(&hint),
        first_index: 0,
        retention: Retention::Attached,
    };
    assert_eq!(node.accept(at(0), &pool_id(), &ask).unwrap().replica_id, replica_id(0));
}

// CLOUD-1507
#[test]
fn an_attempt_never_runs_twice() {
    let mut node = serving(1, 4);
    accept(&mut node, 1).unwrap();
    node.ended(&attempt(1));
    assert_eq!(accept(&mut node, 1), Err(ErrorCode::AttemptDuplicate));
}

// CLOUD-1513
#[test]
fn requests_for_another_node_or_boot_are_refused() {
    let mut node = serving(1, 4);
    let (me, other) = (NodeId::new("a").unwrap(), NodeId::new("b").unwrap());
    let ask = |node_id, boot| Ask {
        node_id,
        boot_id: BootId(Uuid::from_u128(boot)),
        attempt: attempt(1),
        model: None,
        task: None,
        hint: None,
        first_index: 0,
        retention: Retention::Attached,
    };
    assert_eq!(node.accept(at(0), &pool_id(), &ask(&other, 1)).unwrap_err().code, ErrorCode::WrongNode);
    assert_eq!(node.accept(at(0), &pool_id(), &ask(&me, 2)).unwrap_err().code, ErrorCode::WrongNode);
}

// CLOUD-1514
#[test]
fn unknown_unready_and_draining_pools_are_unready() {
    let mut node = node();
    assert_eq!(accept(&mut node, 1), Err(ErrorCode::PoolUnready));
    node.bind(at(0), &pool_id(), spec(0, 1)).unwrap();
    assert_eq!(accept(&mut node, 1), Err(ErrorCode::PoolUnready));
    assert_eq!(node.pool_reports(at(0))[0].state, PoolState::Loading);
    node.observed(at(0), &pool_id(), &replica_id(0), Readiness::Ready);
    accept(&mut node, 1).unwrap();
    node.drain(at(0));
    assert_eq!(accept(&mut node, 2), Err(ErrorCode::PoolUnready));
    assert_eq!(node.pool_reports(at(0))[0].state, PoolState::Draining);
    assert_eq!(node.running_count(), 1, "what runs may finish");
}

fn counted(node: &mut NodeCore, now: u64, busy: Busy) {
    node.counted(at(now), at(now), &pool_id(), &replica_id(0), busy);
}

// CLOUD-1405
#[test]
fn a_canceled_slot_is_taken_until_the_engine_is_idle() {
    let mut node = serving(1, 1);
    accept(&mut node, 1).unwrap();
    node.ended_before_release(at(1_000), &attempt(1));
    assert_eq!(accept(&mut node, 2), Err(ErrorCode::ReplicaExhausted));
    let report = &node.pool_reports(at(0))[0].replicas[0];
    assert_eq!((report.attempts.len(), report.slots_foreign, report.slots_free), (0, 1, 0));
    for now in [1_100, 5_000, 60_000] {
        counted(&mut node, now, Busy::Reported(1));
        node.expire_releases(at(now));
        assert_eq!(accept(&mut node, 2), Err(ErrorCode::ReplicaExhausted), "it says that it works: {now}");
    }
    counted(&mut node, 60_100, Busy::Reported(0));
    assert!(accept(&mut node, 2).is_ok());
}

// CLOUD-1405
#[test]
fn a_canceled_slot_is_given_back_by_time_where_the_engine_does_not_say() {
    for (busy, after) in [(Busy::CannotTell, 500), (Busy::NoAnswer, 30_000)] {
        let mut node = serving(1, 1);
        accept(&mut node, 1).unwrap();
        counted(&mut node, 900, Busy::Reported(1));
        node.ended_before_release(at(1_000), &attempt(1));
        counted(&mut node, 1_001, busy);
        assert_eq!(node.slot_due_at(&pool_id(), &replica_id(0)), Some(at(1_000 + after)), "{busy:?}");
        node.expire_releases(at(999 + after));
        assert_eq!(accept(&mut node, 2), Err(ErrorCode::ReplicaExhausted), "{busy:?}");
        node.expire_releases(at(1_000 + after));
        assert!(accept(&mut node, 2).is_ok(), "{busy:?}");
        assert_eq!(node.slot_due_at(&pool_id(), &replica_id(0)), None);
    }
}

// CLOUD-1405
#[test]
fn more_requests_than_our_other_attempts_are_those_that_were_broken_off() {
    let mut node = serving(1, 4);
    for n in 1..=3 {
        accept(&mut node, n).unwrap();
    }
    node.ended_before_release(at(1_000), &attempt(1));
    node.ended_before_release(at(1_010), &attempt(2));
    let foreign = |node: &NodeCore| node.pool_reports(at(0))[0].replicas[0].slots_foreign;
    counted(&mut node, 1_100, Busy::Reported(3));
    assert_eq!(foreign(&node), 2, "both may still run");
    counted(&mut node, 1_200, Busy::Reported(2));
    assert_eq!(foreign(&node), 1, "one of them does");
    // One that has just been accepted may not have been counted.
    node.counted(at(1_300), at(50), &pool_id(), &replica_id(0), Busy::Reported(1));
    assert_eq!(foreign(&node), 1);
    counted(&mut node, 1_400, Busy::Reported(1));
    assert_eq!((foreign(&node), node.running_count()), (0, 1));
}

// CLOUD-2495
#[test]
fn looks_that_are_not_answered_are_no_verdict_while_attempts_bring_bytes() {
    let silent = || Readiness::Silent("no answer".into());
    let state = |node: &NodeCore| node.pool_reports(at(0))[0].state;
    let mut node = serving(1, 2);
    accept(&mut node, 1).unwrap();
    for now in (4_000..=60_000).step_by(4_000) {
        node.heard(at(now - 1), &attempt(1));
        node.observed(at(now), &pool_id(), &replica_id(0), silent());
        assert_eq!(state(&node), PoolState::Ready, "{now}");
    }
    // No byte any more: it takes nothing new, and still has its model, for a prefill is no death.
    for now in [64_000, 68_000, 72_000] {
        node.observed(at(now), &pool_id(), &replica_id(0), silent());
    }
    assert_eq!(state(&node), PoolState::Loading);
    assert!(accept(&mut node, 2).is_err());
    node.ended(&attempt(1));
    assert_eq!(state(&node), PoolState::Failed);
    node.observed(at(73_000), &pool_id(), &replica_id(0), Readiness::Ready);
    assert_eq!(state(&node), PoolState::Ready);
    // A prefill of 40 s, and then its tokens: they show that it lives, without any look.
    accept(&mut node, 3).unwrap();
    for now in (76_000..=112_000).step_by(4_000) {
        node.observed(at(now), &pool_id(), &replica_id(0), silent());
    }
    assert_eq!(state(&node), PoolState::Loading);
    assert!(node.heard(at(113_000), &attempt(3)), "news");
    assert!(!node.heard(at(113_100), &attempt(3)));
    node.ended(&attempt(3));
    node.observed(at(116_000), &pool_id(), &replica_id(0), silent());
    assert_eq!(state(&node), PoolState::Ready);
}

// CLOUD-2495
#[test]
fn one_look_that_is_not_answered_is_no_verdict_on_an_engine_that_loads() {
    let mut node = node();
    node.bind(at(0), &pool_id(), spec(0, 1)).unwrap();
    let mut state = |now, readiness| {
        node.observed(at(now), &pool_id(), &replica_id(0), readiness);
        node.pool_reports(at(now))[0].state
    };
    assert_eq!(state(20_000, Readiness::Loading), PoolState::Loading);
    for now in [23_000, 26_000, 29_000] {
        assert_eq!(state(now, Readiness::Silent("no answer".into())), PoolState::Loading, "{now}");
    }
    assert_eq!(state(32_000, Readiness::Silent("no answer".into())), PoolState::Failed);
}

// CLOUD-2495
#[test]
fn an_idle_engine_that_does_not_answer_is_not_ready_after_three_looks_and_ten_seconds() {
    let mut node = serving(1, 1);
    let mut ready = |now: u64| {
        node.observed(at(now), &pool_id(), &replica_id(0), Readiness::Silent("no answer".into()));
        node.pool_reports(at(now))[0].ready
    };
    assert!(ready(3_000) && ready(7_000) && ready(9_999));
    assert!(!ready(10_000));
    let mut node = serving(1, 1);
    let mut ready = |now: u64| {
        node.observed(at(now), &pool_id(), &replica_id(0), Readiness::Silent("no answer".into()));
        node.pool_reports(at(now))[0].ready
    };
    assert!(ready(20_000) && ready(24_000) && !ready(28_000), "three looks, however late they are");
    let mut node = serving(1, 1);
    node.observed(at(1), &pool_id(), &replica_id(0), Readiness::Failed("connection refused".into()));
    assert!(!node.pool_reports(at(1))[0].ready, "who refuses is not ready at once");
}

// CLOUD-2485
#[test]
fn a_change_of_what_the_engine_says_takes_nothing_out_of_service_and_counts_for_the_next_task() {
    let model = |name: &str| ModelRef::new(name).unwrap();
    let mut node = serving(1, 4);
    accept(&mut node, 1).unwrap();
    let beta = ReplicaSpec { models: vec![model("beta")], slots: 1, ctx_max: Some(64), ..spec(0, 4) };
    node.bind(at(10), &pool_id(), beta.clone()).unwrap();
    node.observed(at(10), &pool_id(), &replica_id(0), Readiness::Ready);
    let report = &node.pool_reports(at(10))[0];
    assert_eq!((&report.models, report.ready, report.ctx_max), (&vec![model("beta")], true, Some(64)));
    let node_id = NodeId::new("a").unwrap();
    let (old, new) = (model("m"), model("beta"));
    let ask = |n, model| Ask {
        node_id: &node_id,
        boot_id: boot(),
        attempt: attempt(n),
        model,
        task: None,
        hint: None,
        first_index: 0,
        retention: Retention::Attached,
    };
    let refused = node.accept(at(11), &pool_id(), &ask(2, Some(&old))).unwrap_err();
    assert_eq!(refused.code, ErrorCode::PoolUnready, "asked for by a report of before");
    node.ended(&attempt(1));
    assert_eq!(node.accept(at(12), &pool_id(), &ask(3, Some(&new))).unwrap().model, "beta");
    let refused = node.accept(at(13), &pool_id(), &ask(4, Some(&new))).unwrap_err();
    assert_eq!(refused.code, ErrorCode::ReplicaExhausted, "one slot, not four");
    // The same words again change nothing.
    node.bind(at(20), &pool_id(), beta).unwrap();
    assert!(node.pool_reports(at(20))[0].ready);
}

// CLOUD-2492
#[test]
fn a_replica_that_refuses_its_operator_and_serves_nobody_is_failed_and_tried_again_later() {
    let state = |node: &NodeCore, now| {
        let report = &node.pool_reports(at(now))[0];
        (report.state, report.last_error.clone())
    };
    let why = || Some("HTTP 401".to_owned());
    let look =
        |node: &mut NodeCore, now| node.observed(at(now), &pool_id(), &replica_id(0), Readiness::Ready);
    let mut node = serving(1, 2);
    accept(&mut node, 1).unwrap();
    node.refused_operator(at(100), &attempt(1), "HTTP 401");
    node.ended(&attempt(1));
    look(&mut node, 1_000);
    assert_eq!(state(&node, 1_000), (PoolState::Failed, why()), "its health call is well all the same");
    look(&mut node, 10_100);
    assert_eq!(state(&node, 10_100), (PoolState::Ready, why()), "one may try");
    accept(&mut node, 2).unwrap();
    node.refused_operator(at(10_200), &attempt(2), "HTTP 401");
    look(&mut node, 30_199);
    assert_eq!(state(&node, 30_199).0, PoolState::Failed, "twice as long");
    look(&mut node, 30_200);
    node.ended(&attempt(2));
    accept(&mut node, 3).unwrap();
    node.succeeded(&attempt(3));
    assert_eq!(state(&node, 30_300), (PoolState::Ready, None));
    node.ended(&attempt(3));
    // While others get through it is one request's bad luck.
    accept(&mut node, 4).unwrap();
    node.refused_operator(at(30_400), &attempt(4), "HTTP 404");
    look(&mut node, 31_000);
    assert_eq!(state(&node, 31_000), (PoolState::Ready, Some("HTTP 404".into())));
    for now in [32_000, 33_000] {
        node.refused_operator(at(now), &attempt(4), "HTTP 404");
    }
    look(&mut node, 34_000);
    assert_eq!(state(&node, 34_000).0, PoolState::Failed, "three in a row, and nothing got through");
    // It is started anew, or asked with another key: what was known of it is not.
    node.observed(at(35_000), &pool_id(), &replica_id(0), Readiness::Loading);
    look(&mut node, 36_000);
    assert_eq!(state(&node, 36_000), (PoolState::Ready, None));
}

// CLOUD-2492
#[test]
fn the_tries_of_one_task_are_one_refusal_and_a_stream_that_runs_is_a_success() {
    let node_id = NodeId::new("a").unwrap();
    let refused = |node: &mut NodeCore, n: u32, task: u32| {
        let (id, now) = (attempt(n.into()), at(n.into()));
        let task = Some(TaskId(Uuid::from_u128(task.into())));
        let ask = Ask {
            node_id: &node_id,
            boot_id: boot(),
            attempt: id,
            model: None,
            task,
            hint: None,
            first_index: 0,
            retention: Retention::Attached,
        };
        node.accept(at(0), &pool_id(), &ask).unwrap();
        node.refused_operator(now, &id, "HTTP 404");
        node.ended(&id);
        node.pool_reports(now)[0].ready
    };
    let mut node = serving(1, 4);
    accept(&mut node, 1).unwrap();
    node.succeeded(&attempt(1));
    node.ended(&attempt(1));
    assert!((10..13).all(|n| refused(&mut node, n, 7)), "the same task thrice");
    assert!(refused(&mut node, 20, 8));
    assert!(!refused(&mut node, 21, 9), "three different ones");
    let mut node = serving(1, 4);
    accept(&mut node, 1).unwrap();
    node.succeeded(&attempt(1));
    assert!((10..20).all(|n| refused(&mut node, n, n)), "while another stream runs");
}

// CLOUD-2488
#[test]
fn what_an_engine_lacks_is_forgotten_with_its_process_and_after_a_while() {
    let mut node = serving(1, 4);
    accept(&mut node, 1).unwrap();
    let path = "/v1/embeddings";
    node.lacks(at(1_000), &attempt(1), path);
    assert!(
        node.is_lacking(at(60_000), &attempt(1), path) && !node.is_lacking(at(61_000), &attempt(1), path)
    );
    assert!(!node.is_lacking(at(2_000), &attempt(1), "/completion"));
    node.observed(at(3_000), &pool_id(), &replica_id(0), Readiness::Gone("connection refused".into()));
    node.observed(at(4_000), &pool_id(), &replica_id(0), Readiness::Ready);
    assert!(!node.is_lacking(at(4_000), &attempt(1), path));
}

// CLOUD-2485
#[test]
fn engines_of_one_pool_are_changed_one_after_the_other() {
    let reported = |n, names: &[&str]| ReplicaSpec {
        models: names.iter().map(|name| ModelRef::new(name).unwrap()).collect(),
        names_from_engine: true,
        ..spec(n, 1)
    };
    let mut node = node();
    let mut look = |now, n, names: &[&str]| {
        let bound = node.bind(at(now), &pool_id(), reported(n, names));
        let readiness =
            bound.as_ref().map_or_else(|e| Readiness::Failed(e.to_string()), |()| Readiness::Ready);
        node.observed(at(now), &pool_id(), &replica_id(n), readiness);
        let report = &node.pool_reports(at(now))[0];
        let names: Vec<String> = report.models.iter().map(ToString::to_string).collect();
        (bound.is_ok(), report.ready, names)
    };
    let (base, both) = (["base"], ["base", "lora"]);
    assert!(look(0, 0, &base).0 && look(0, 1, &base).0);
    assert_eq!(look(1_000, 0, &both), (false, true, vec!["base".to_owned()]), "the other one serves");
    assert_eq!(look(1_100, 1, &both), (true, true, vec!["base".to_owned(), "lora".to_owned()]));
    assert!(look(1_350, 0, &both).0, "and the first one follows");
}

// CLOUD-2485
#[test]
fn a_task_goes_to_the_replica_that_has_its_model_and_to_no_other_of_its_pool() {
    let reported = |n, name: &str| ReplicaSpec {
        models: vec![ModelRef::new(name).unwrap()],
        names_from_engine: true,
        ..spec(n, 1)
    };
    let (x, y) = (ModelRef::new("x").unwrap(), ModelRef::new("y").unwrap());
    let node_id = NodeId::new("a").unwrap();
    let mut node = node();
    for n in 0..2 {
        node.bind(at(0), &pool_id(), reported(n, "x")).unwrap();
        node.observed(at(0), &pool_id(), &replica_id(n), Readiness::Ready);
    }
    let ask = |n, model| Ask {
        node_id: &node_id,
        boot_id: boot(),
        attempt: attempt(n),
        model: Some(model),
        task: None,
        hint: None,
        first_index: 0,
        retention: Retention::Attached,
    };
    // A stream runs on the second one, which answers no looks; the first one comes back as another.
    let second = Ask { hint: Some(&replica_id(1)), ..ask(1, &x) };
    node.accept(at(0), &pool_id(), &second).unwrap();
    for now in [10_000, 13_000, 16_000] {
        node.observed(at(now), &pool_id(), &replica_id(1), Readiness::Silent("no answer".into()));
    }
    node.bind(at(17_000), &pool_id(), reported(0, "y")).unwrap();
    node.observed(at(17_000), &pool_id(), &replica_id(0), Readiness::Ready);
    let refused = node.accept(at(17_001), &pool_id(), &ask(2, &x)).unwrap_err();
    assert_eq!(refused.code, ErrorCode::PoolUnready, "the other one's model");
    assert!(!node.heard(at(17_002), &attempt(1)), "they differ now");
    assert!(node.accept(at(17_003), &pool_id(), &ask(3, &x)).is_err());
    assert_eq!(node.accept(at(17_004), &pool_id(), &ask(4, &y)).unwrap().replica_id, replica_id(0));
}

// CLOUD-2495
#[test]
fn a_byte_does_not_overrule_what_an_engine_says_of_itself() {
    let mut node = serving(1, 2);
    accept(&mut node, 1).unwrap();
    node.observed(at(1_000), &pool_id(), &replica_id(0), Readiness::Failed("HTTP 500".into()));
    node.observed(at(4_000), &pool_id(), &replica_id(0), Readiness::Silent("no answer".into()));
    assert!(!node.heard(at(4_100), &attempt(1)));
    assert_eq!(accept(&mut node, 2), Err(ErrorCode::PoolUnready));
}

// CLOUD-2421
#[test]
fn a_report_without_an_answer_says_nothing_of_who_waits() {
    let mut node = node();
    let waiting = |node: &mut NodeCore, answer: Result<HeartbeatAnswer, BeatFailure>| {
        let effects = node.heartbeat_answered(at(0), answer);
        effects.into_iter().find_map(|effect| match effect {
            NodeEffect::Waiting(pools) => Some(pools),
            _ => None,
        })
    };
    let answer = |waiting| HeartbeatAnswer {
        heartbeat_interval_ms: 1_000,
        cancel_attempts: Vec::new(),
        waiting,
        intent: Intent::Serving,
        intent_order: 0,
    };
    assert_eq!(waiting(&mut node, Ok(answer(vec![pool_id()]))), Some(vec![pool_id()]));
    assert_eq!(waiting(&mut node, Err(BeatFailure::Failed)), None);
    assert_eq!(waiting(&mut node, Ok(answer(vec![]))), Some(vec![]), "now it does");
}

// CLOUD-1406
#[test]
fn foreign_load_counts_when_seen_twice() {
    let mut node = serving(1, 4);
    accept(&mut node, 1).unwrap();
    counted(&mut node, 0, Busy::Reported(3));
    assert_eq!(node.pool_reports(at(0))[0].replicas[0].slots_foreign, 0, "one look may have crossed an end");
    counted(&mut node, 0, Busy::Reported(4));
    assert_eq!(node.pool_reports(at(0))[0].replicas[0].slots_foreign, 2);
    accept(&mut node, 2).unwrap();
    assert_eq!(accept(&mut node, 3), Err(ErrorCode::ReplicaExhausted));
}

// CLOUD-1411
#[test]
fn acceptance_and_end_name_the_last_report_before_them() {
    let mut node = serving(1, 4);
    let report = |node: &mut NodeCore| node.report(at(0), Epoch::new("e").unwrap());
    assert_eq!(accept(&mut node, 1).unwrap().report_seq, 0);
    let first = report(&mut node);
    assert_eq!((first.seq, first.pools[0].replicas[0].attempts.clone()), (1, vec![attempt(1)]));
    assert_eq!(node.ended(&attempt(1)), 1);
    let second = report(&mut node);
    assert_eq!((second.seq, second.pools[0].replicas[0].attempts.len()), (2, 0));
}

#[test]
fn a_removed_handoff_lets_what_runs_finish_and_gives_its_slots_to_nobody_twice() {
    let mut node = serving(1, 1);
    accept(&mut node, 1).unwrap();
    node.unbind(at(0), &pool_id(), &replica_id(0));
    let report = &node.pool_reports(at(0))[0];
    assert_eq!((report.ready, report.replicas[0].attempts.clone()), (false, vec![attempt(1)]));
    assert_eq!(accept(&mut node, 2), Err(ErrorCode::PoolUnready));
    node.bind(at(0), &pool_id(), spec(0, 1)).unwrap();
    node.observed(at(0), &pool_id(), &replica_id(0), Readiness::Ready);
    assert_eq!(accept(&mut node, 3), Err(ErrorCode::ReplicaExhausted), "the slot is still taken");
    node.unbind(at(0), &pool_id(), &replica_id(0));
    node.ended_before_release(at(0), &attempt(1));
    counted(&mut node, 0, Busy::Reported(0));
    assert!(node.pool_reports(at(0)).is_empty());
    assert_eq!(node.running_count(), 0);
}

#[test]
fn a_loading_engine_has_its_model_and_takes_nothing() {
    let mut node = serving(1, 1);
    let loading = Readiness::Loading;
    node.observed(at(0), &pool_id(), &replica_id(0), loading);
    let report = &node.pool_reports(at(0))[0];
    assert_eq!((report.state, report.ready, report.last_error.clone()), (PoolState::Loading, false, None));
    assert_eq!(accept(&mut node, 1), Err(ErrorCode::PoolUnready));
}

// CLOUD-2008
#[test]
fn a_replica_that_differs_from_its_pool_is_not_bound() {
    let mut node = serving(1, 4);
    let other = ReplicaSpec { models: vec![ModelRef::new("other").unwrap()], ..spec(1, 4) };
    assert!(node.bind(at(0), &pool_id(), other.clone()).is_err());
    let rebound = ReplicaSpec { replica_id: replica_id(0), ..other };
    assert!(node.bind(at(0), &pool_id(), rebound).is_ok(), "the only replica may change its pool");
}

// CLOUD-1011
#[test]
fn a_change_of_readiness_is_reported_within_50_ms_and_an_attempt_is_not() {
    let mut node = serving(1, 4);
    assert!(matches!(node.due(at(0)), Some(NodeEffect::Register(_))));
    let answer = RegisterAnswer {
        node_id: NodeId::new("a").unwrap(),
        epoch: Epoch::new("e").unwrap(),
        heartbeat_interval_ms: 10_000,
        node_timeout_ms: 30_000,
        intent: Intent::Serving,
        intent_order: 0,
    };
    node.registered(at(1), Ok(answer));
    assert!(matches!(node.due(at(1)), Some(NodeEffect::Heartbeat(_))));
    let taken = HeartbeatAnswer {
        heartbeat_interval_ms: 10_000,
        waiting: Vec::new(),
        cancel_attempts: vec![],
        intent: Intent::Serving,
        intent_order: 0,
    };
    node.heartbeat_answered(at(2), Ok(taken));
    accept(&mut node, 1).unwrap();
    assert!(node.next_deadline().unwrap() > at(9_000));
    let gone = Readiness::Failed("connection refused".into());
    node.observed(at(100), &pool_id(), &replica_id(0), gone);
    assert_eq!(node.next_deadline(), Some(at(150)));
    let Some(NodeEffect::Heartbeat(beat)) = node.due(at(150)) else { panic!("no report was due") };
    assert_eq!((beat.pools[0].state, beat.pools[0].ready), (PoolState::Failed, false));
    assert_eq!(beat.pools[0].last_error.as_deref(), Some("connection refused"));
}

// CLOUD-1803
#[test]
fn only_attempts_that_run_here_are_canceled() {
    let mut node = serving(1, 4);
    accept(&mut node, 1).unwrap();
    let answer = HeartbeatAnswer {
        heartbeat_interval_ms: 1,
        waiting: Vec::new(),
        cancel_attempts: vec![attempt(1), attempt(2)],
        intent: Intent::Serving,
        intent_order: 0,
    };
    assert_eq!(node.heartbeat_answered(at(0), Ok(answer)), vec![NodeEffect::Cancel(attempt(1))]);
}

// CLOUD-1320
// CLOUD-1321
// CLOUD-1323
#[test]
fn an_operators_order_counts_once_it_is_written_down_and_when_no_later_one_was_taken() {
    let mut node = serving(1, 4);
    node.due(at(0));
    let epoch = |name| Epoch::new(name).unwrap();
    let order = |number, intent| IntentOrder { epoch: epoch("e"), number, intent };
    let registered = |name, intent, intent_order| RegisterAnswer {
        node_id: NodeId::new("a").unwrap(),
        epoch: epoch(name),
        heartbeat_interval_ms: 10_000,
        node_timeout_ms: 30_000,
        intent,
        intent_order,
    };
    let effects = node.registered(at(1), Ok(registered("e", Intent::Draining, 5)));
    assert_eq!(effects, [NodeEffect::TakeIntent(order(5, Intent::Draining))]);
    assert_eq!(node.intent(), Intent::Serving, "not before it is written down");
    let Some(NodeEffect::Heartbeat(beat)) = node.due(at(1)) else { panic!("the first report") };
    assert_eq!((beat.intent, beat.intent_order), (Intent::Serving, 0));
    node.set_intent(at(2), &order(5, Intent::Draining));
    assert!(accept(&mut node, 1).is_err());
    // The next order came on another way, and the answer repeats the one before it.
    node.set_intent(at(3), &order(7, Intent::Serving));
    let answer = |intent, intent_order| HeartbeatAnswer {
        heartbeat_interval_ms: 10_000,
        waiting: Vec::new(),
        cancel_attempts: vec![],
        intent,
        intent_order,
    };
    assert_eq!(node.heartbeat_answered(at(4), Ok(answer(Intent::Draining, 5))), []);
    node.set_intent(at(5), &order(6, Intent::Draining));
    assert_eq!(node.intent(), Intent::Serving, "it was overtaken");
    assert!(accept(&mut node, 1).is_ok());
    let Some(NodeEffect::Heartbeat(beat)) = node.due(at(60)) else { panic!("a change is reported") };
    assert_eq!((beat.intent, beat.intent_order), (Intent::Serving, 7));
    node.heartbeat_answered(at(61), Err(BeatFailure::Unknown));
    node.due(at(61));
    node.registered(at(62), Ok(registered("e2", Intent::Serving, 0)));
    node.set_intent(at(63), &order(9, Intent::Draining));
    assert_eq!(node.intent(), Intent::Serving, "it was for another registration");
    node.drain(at(70));
    assert_eq!(node.intent(), Intent::Draining, "a process that ends takes nothing, whatever is wanted");
}

// CLOUD-1620
#[test]
fn a_drained_pool_takes_nothing_shows_what_is_left_and_reopens() {
    let mut node = serving(1, 4);
    accept(&mut node, 1).unwrap();
    assert!(node.drain_pool(at(100), &pool_id(), Some(at(1_100))));
    assert!(!node.drain_pool(at(100), &PoolId::new("other").unwrap(), None));
    assert_eq!(accept(&mut node, 2).unwrap_err(), ErrorCode::PoolUnready);
    let report = node.pool_reports(at(300)).remove(0);
    let progress = report.drain.unwrap();
    assert_eq!((report.state, report.ready, report.draining), (PoolState::Draining, false, true));
    assert_eq!(
        (progress.tasks_left, progress.oldest_age_ms, progress.deadline_ms),
        (1, Some(300), Some(800))
    );
    assert_eq!(node.past_their_drain(at(1_099)), []);
    assert_eq!(node.past_their_drain(at(1_100)), [attempt(1)]);
    // Its engine is exchanged: the drain holds for the new one, until the pool is opened again.
    node.ended(&attempt(1));
    let spec = spec(0, 4);
    node.unbind(at(1_150), &pool_id(), &spec.replica_id);
    assert!(node.pool_reports(at(1_150)).is_empty());
    node.bind(at(1_160), &pool_id(), spec).unwrap();
    node.observed(at(1_170), &pool_id(), &replica_id(0), Readiness::Ready);
    assert_eq!(accept(&mut node, 2).unwrap_err(), ErrorCode::PoolUnready);
    assert!(node.reopen_pool(at(1_200), &pool_id()));
    assert!(accept(&mut node, 2).is_ok());
}

proptest! {
    // CLOUD-1404
    #[test]
    fn slots_are_conserved(actions in prop::collection::vec((0_u8..4, 0_u128..12), 0..80), slots in 1_u32..4) {
        let mut node = serving(2, slots);
        for (action, n) in actions {
            match action {
                0 => { let _ = accept(&mut node, n); }
                1 => { node.ended(&attempt(n)); }
                2 => { node.ended_before_release(at(0), &attempt(n)); }
                _ => node.expire_releases(at(u64::try_from(n).unwrap() * 100_000)),
            }
            let report = &node.pool_reports(at(0))[0];
            let mut listed = 0;
            for replica in &report.replicas {
                let busy = u32::try_from(replica.attempts.len()).unwrap() + replica.slots_foreign;
                prop_assert!(busy <= slots);
                prop_assert_eq!(busy + replica.slots_free, slots);
                listed += busy as usize;
            }
            prop_assert_eq!(listed, node.running.len());
        }
    }
}

fn accept_at(node: &mut NodeCore, millis: u64, n: u128) {
    let node_id = NodeId::new("a").unwrap();
    let ask = Ask {
        node_id: &node_id,
        boot_id: boot(),
        attempt: attempt(n),
        model: None,
        task: None,
        hint: None,
        first_index: 0,
        retention: Retention::Attached,
    };
    node.accept(at(millis), &pool_id(), &ask).unwrap();
}

fn crash(node: &NodeCore, n: u128) -> Option<(String, u32, bool)> {
    match node.verdict(&attempt(n)) {
        Verdict::Known(crash) => crash.map(|crash| (crash.signal, crash.suspects, crash.suspect)),
        Verdict::Awaited => panic!("the end of attempt {n} is not known"),
    }
}

// CLOUD-2416
#[test]
fn a_crash_names_the_attempts_of_the_last_two_seconds_the_same_to_all() {
    let mut node = serving(1, 8);
    node.engine_began(&pool_id(), &replica_id(0));
    accept_at(&mut node, 1_000, 1);
    accept_at(&mut node, 3_000, 2);
    accept_at(&mut node, 4_000, 3);
    accept_at(&mut node, 4_500, 4);
    accept_at(&mut node, 4_600, 5);
    // One ends well, one never came to its engine, one is broken off: only this one may have done it.
    node.cleared(&attempt(3));
    node.ended(&attempt(3));
    node.cleared(&attempt(4));
    node.ended_before_release(at(4_700), &attempt(5));
    assert_eq!(node.verdict(&attempt(1)), Verdict::Awaited);
    assert_eq!(node.engine_ended(at(5_000), &pool_id(), &replica_id(0), Some("SIGSEGV")), 2);
    node.ended(&attempt(5));
    assert_eq!(crash(&node, 1), Some(("SIGSEGV".into(), 2, false)), "it had run for 4 s");
    assert_eq!(crash(&node, 2), Some(("SIGSEGV".into(), 2, true)));
    assert_eq!(crash(&node, 4), Some(("SIGSEGV".into(), 2, false)));
    let again = node.engine_ended(at(5_100), &pool_id(), &replica_id(0), Some("SIGSEGV"));
    assert_eq!(again, 0, "an end is told once");
}

// CLOUD-2416
#[test]
fn an_end_that_is_no_crash_or_another_engines_names_nobody() {
    let mut node = serving(1, 8);
    accept_at(&mut node, 0, 1);
    assert_eq!(crash(&node, 1), None, "of an engine that was not started here nothing is waited for");
    node.engine_began(&pool_id(), &replica_id(0));
    accept_at(&mut node, 100, 2);
    assert_eq!(node.engine_ended(at(200), &pool_id(), &replica_id(0), None), 0);
    assert_eq!(crash(&node, 2), None);
    // The next one of the replica has nothing of the one before.
    node.engine_began(&pool_id(), &replica_id(0));
    accept_at(&mut node, 1_000, 3);
    assert_eq!(node.verdict(&attempt(3)), Verdict::Awaited);
    assert_eq!(node.engine_ended(at(1_500), &pool_id(), &replica_id(0), Some("SIGABRT")), 1);
    assert_eq!(crash(&node, 3), Some(("SIGABRT".into(), 1, true)));
}

/// What an attempt has made, so many bytes in one frame.
fn made(bytes: usize) -> Piece {
    let mut ends = crate::Ends::default();
    ends.push(bytes);
    Piece::new(0, vec![b'x'; bytes].into(), ends)
}

// CLOUD-1566
#[test]
fn a_report_lists_what_runs_and_what_has_ended_and_is_kept_and_never_one_twice() {
    let mut node = serving(1, 4);
    accept(&mut node, 1).unwrap();
    accept(&mut node, 2).unwrap();
    let lists = |node: &NodeCore| {
        let replica = node.pool_reports(at(1))[0].replicas[0].clone();
        (replica.attempts, replica.held)
    };
    assert_eq!(lists(&node), (vec![attempt(1), attempt(2)], vec![]));
    node.ended(&attempt(1));
    // No report falls between the end and the last bytes.
    assert_eq!(lists(&node), (vec![attempt(2)], vec![attempt(1)]));
    node.held_mut().finish(at(1), &attempt(1), Some(made(4)));
    node.ended_before_release(at(1), &attempt(2));
    assert_eq!(lists(&node), (vec![], vec![attempt(1), attempt(2)]));
    node.held_mut().done(&attempt(1));
    node.stopped(&attempt(2));
    assert_eq!(lists(&node), (vec![], vec![]));
}

// CLOUD-1565
#[test]
fn a_node_whose_memory_for_streams_is_full_refuses_what_is_new_and_says_why() {
    let mut node = serving(1, 4);
    node.bound_held(4_000);
    accept(&mut node, 1).unwrap();
    node.held_mut().append(at(0), &attempt(1), made(4_000)).unwrap();
    assert_eq!(accept(&mut node, 2), Err(ErrorCode::ReplicaExhausted));
    let warning = node.pool_reports(at(0))[0].warning.clone().unwrap();
    assert!(warning.contains("the most is 4000"), "{warning}");
    node.ended(&attempt(1));
    node.held_mut().finish(at(1), &attempt(1), None);
    accept(&mut node, 2).unwrap();
    assert_eq!(node.pool_reports(at(0))[0].warning, None);
}

// CLOUD-1563
#[test]
fn a_node_asks_for_the_end_of_what_nobody_reads_when_it_is_due() {
    let mut node = serving(1, 4);
    while node.due(at(0)).is_some() {}
    accept(&mut node, 1).unwrap();
    node.held_mut().detach(at(0), &attempt(1), &Cursor::first());
    assert!(node.next_deadline().is_some_and(|due| due <= at(15_000)));
    let unread: Vec<NodeEffect> = std::iter::from_fn(|| node.due(at(15_000)))
        .filter(|effect| matches!(effect, NodeEffect::Unread(_)))
        .take(2)
        .collect();
    assert_eq!(unread, [NodeEffect::Unread(attempt(1))]);
}
