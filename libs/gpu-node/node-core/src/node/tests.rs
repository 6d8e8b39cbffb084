//! The node's books, by hand.

mod crash;
mod looks;
mod session;
mod streams;

use std::time::Duration;

use pool_registry_types::pool::PoolState;
use pool_registry_types::{ErrorCode, ModelRef};
use proptest::prelude::*;
use streams::read_to_its_end;
use uuid::Uuid;

use super::*;

pub(super) fn at(millis: u64) -> Moment {
    Moment::from_millis(millis)
}

fn attempt(n: u128) -> AttemptId {
    AttemptId(Uuid::from_u128(n))
}

fn boot() -> BootId {
    BootId(Uuid::from_u128(1))
}

pub(super) fn pool_id() -> PoolId {
    PoolId::new("pool-0").unwrap()
}

pub(super) fn replica_id(n: u32) -> ReplicaId {
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
        features: Vec::new(),
    };
    NodeCore::new(identity, Session::new(at(0), Duration::from_secs(10), 1), Intent::Serving)
}

pub(super) fn serving(replicas: u32, slots: u32) -> NodeCore {
    let mut node = node();
    for n in 0..replicas {
        node.bind(at(0), &pool_id(), spec(n, slots)).unwrap();
        node.observed(at(0), &pool_id(), &replica_id(n), Readiness::Ready);
    }
    node
}

/// For whatever model, from the first frame on.
fn ask(node_id: &NodeId, n: u128) -> Ask<'_> {
    Ask {
        node_id,
        boot_id: boot(),
        attempt: attempt(n),
        model: None,
        task: None,
        hint: None,
        first_index: 0,
        retention: Retention::Attached,
    }
}

fn accept_at(node: &mut NodeCore, millis: u64, n: u128) -> Result<Accepted, ErrorCode> {
    let node_id = NodeId::new("a").unwrap();
    node.accept(at(millis), &pool_id(), &ask(&node_id, n)).map_err(|error| error.code)
}

fn accept(node: &mut NodeCore, n: u128) -> Result<Accepted, ErrorCode> {
    accept_at(node, 0, n)
}

fn counted(node: &mut NodeCore, now: u64, busy: Busy) {
    node.counted(at(now), at(now), &pool_id(), &replica_id(0), busy);
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
        let ask = Ask { hint: Some(&hint), ..ask(&node_id, n) };
        assert_eq!(node.accept(at(0), &pool_id(), &ask).unwrap().replica_id, hint);
    }
    let ask = Ask { hint: Some(&hint), ..ask(&node_id, 3) };
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
    read_to_its_end(&mut node, 1);
    counted(&mut node, 0, Busy::Reported(0));
    assert!(node.pool_reports(at(0)).is_empty());
    assert_eq!(node.running_count(), 0);
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
    read_to_its_end(&mut node, 1);
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
