//! What a node is taken for, by what it says and what it does not, and what is wanted of it.

use pool_registry_types::node::{Capabilities, LiveAnswer};
use pool_registry_types::pool::{EngineKind, PoolState, ReplicaReport};
use pool_registry_types::{MachineId, ReplicaId};
use proptest::prelude::*;
use uuid::Uuid;

use super::*;

#[path = "registry_order_tests.rs"]
mod order;
#[path = "registry_slots_tests.rs"]
mod slots;

const INTERVAL_MS: u64 = 1_000;
const TIMEOUT_MS: u64 = 5_000;
const MAX_NODES: usize = 100;

fn at(millis: u64) -> Moment {
    Moment::from_millis(millis)
}

fn node_id(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

fn attempt(n: u128) -> AttemptId {
    AttemptId(Uuid::from_u128(n))
}

fn registry() -> ServiceRegistry {
    registry_of(1, None)
}

fn registry_of(incarnation: u64, switched_off: Option<Rule>) -> ServiceRegistry {
    let timing = Timing {
        heartbeat_interval: Duration::from_millis(INTERVAL_MS),
        node_timeout: Duration::from_millis(TIMEOUT_MS),
    };
    ServiceRegistry::new(Settings { timing, max_nodes: MAX_NODES, incarnation, switched_off })
}

fn request(name: &str, boot: u128, address: &str) -> RegisterRequest {
    RegisterRequest {
        node_id: node_id(name),
        machine_id: MachineId::new("m").unwrap(),
        boot_id: BootId(Uuid::from_u128(boot)),
        address: address.into(),
        version: "0".into(),
        intent: Intent::Serving,
        labels: Labels::new(),
        pools: vec![],
        capabilities: Capabilities::default(),
        features: Vec::new(),
    }
}

fn report(slots: u32, attempts: &[AttemptId]) -> PoolReport {
    PoolReport {
        pool_id: PoolId::new("pool-0").unwrap(),
        state: PoolState::Ready,
        ready: true,
        draining: false,
        engine: Some(EngineKind::LlamaCpp),
        engine_version: None,
        models: vec![ModelRef::new("m").unwrap()],
        device_mask: None,
        ctx_max: None,
        vram_free_bytes: None,
        replicas: vec![ReplicaReport {
            replica_id: ReplicaId::new("r0").unwrap(),
            ready: true,
            slots_total: slots,
            slots_free: 0,
            slots_foreign: 0,
            attempts: attempts.to_vec(),
            held: vec![],
        }],
        last_error: None,
        warning: None,
        drain: None,
        supervised: None,
    }
}

fn beat(epoch: &Epoch, seq: u64, attempts: &[AttemptId]) -> Heartbeat {
    Heartbeat {
        epoch: epoch.clone(),
        seq,
        timestamp: String::new(),
        intent: Intent::Serving,
        intent_order: 0,
        tokens_changed: 0,
        pools: vec![report(4, attempts)],
        gpus: vec![],
        models: vec![],
        problems: vec![],
    }
}

fn live(name: &str, boot: u128) -> ProbeOutcome {
    let live = LiveAnswer { node_id: node_id(name), boot_id: BootId(Uuid::from_u128(boot)) };
    ProbeOutcome::Answered { live, authorized: None }
}

/// A node that is online since `now`.
fn join(registry: &mut ServiceRegistry, now: Moment, name: &str) -> Epoch {
    let address = format!("http://{name}");
    let epoch = registry.register(now, request(name, 1, &address), None).unwrap().epoch;
    registry.take_due_probes(now);
    registry.probed(now, &node_id(name), &address, live(name, 1));
    assert_eq!(registry.liveness(&node_id(name)), Some(Liveness::Online));
    epoch
}

fn pool(name: &str) -> PoolKey {
    PoolKey::new(node_id(name), PoolId::new("pool-0").unwrap())
}

fn busy(registry: &ServiceRegistry, name: &str) -> u32 {
    registry.pool_facts(&pool(name)).unwrap().slots_busy
}

fn taken(outcome: Result<HeartbeatOutcome, NodeNotKnown>) -> (Vec<AttemptId>, Vec<AttemptId>) {
    match outcome {
        Ok(HeartbeatOutcome::Taken { vanished, orphans, .. }) => (vanished, orphans),
        other => panic!("the heartbeat was not taken: {other:?}"),
    }
}

// CLOUD-1302
#[test]
fn a_registered_node_is_suspect_until_its_address_answers_with_its_identity() {
    let mut r = registry();
    r.register(at(0), request("a", 1, "http://a"), None).unwrap();
    assert_eq!(r.liveness(&node_id("a")), Some(Liveness::Suspect));
    assert_eq!(r.take_due_probes(at(0)), vec![(node_id("a"), "http://a".into(), false)]);
    r.probed(at(1), &node_id("a"), "http://a", live("b", 1));
    assert!(r.view(at(1)).nodes[0].reason.as_ref().unwrap().contains("b answered there"));
    assert!(r.take_due_probes(at(1000)).is_empty());
    assert_eq!(r.take_due_probes(at(1001)).len(), 1);
    r.probed(at(1002), &node_id("a"), "http://a", live("a", 2));
    assert_eq!(r.liveness(&node_id("a")), Some(Liveness::Suspect));
    r.probed(at(1003), &node_id("a"), "http://a", live("a", 1));
    assert_eq!(r.liveness(&node_id("a")), Some(Liveness::Online));
}

// CLOUD-1303
#[test]
fn a_silent_node_is_suspect_after_two_intervals_and_offline_after_the_timeout() {
    let mut r = registry();
    join(&mut r, at(0), "a");
    assert_eq!(r.next_deadline(), Some(at(2 * INTERVAL_MS)));
    assert!(r.expire(at(1_999)).is_empty());
    assert_eq!(r.expire(at(2_000)), vec![Transition { node_id: node_id("a"), to: Liveness::Suspect }]);
    assert_eq!(r.take_due_probes(at(2_000)).len(), 1);
    r.probed(at(2_001), &node_id("a"), "http://a", live("a", 1));
    assert_eq!(r.liveness(&node_id("a")), Some(Liveness::Suspect), "a probe does not lift silence");
    assert!(r.expire(at(4_999)).is_empty());
    assert_eq!(r.expire(at(5_000)), vec![Transition { node_id: node_id("a"), to: Liveness::Offline }]);
}

// CLOUD-1308
#[test]
fn node_returns_online_when_heartbeats_resume_after_expiry() {
    let mut r = registry();
    let epoch = join(&mut r, at(0), "a");
    r.expire(at(5_000));
    assert_eq!(r.liveness(&node_id("a")), Some(Liveness::Offline));
    taken(r.heartbeat(at(6_000), &node_id("a"), beat(&epoch, 1, &[])));
    assert_eq!(r.liveness(&node_id("a")), Some(Liveness::Online));
}

// CLOUD-1304
#[test]
fn a_token_postpones_offline_but_does_not_lift_suspicion() {
    let mut r = registry();
    join(&mut r, at(0), "a");
    r.expire(at(2_000));
    r.alive(at(4_000), &node_id("a"));
    assert_eq!(r.liveness(&node_id("a")), Some(Liveness::Suspect));
    assert!(r.expire(at(8_999)).is_empty());
    assert_eq!(r.expire(at(9_000)).len(), 1);
}

// CLOUD-1305
#[test]
fn a_failed_connection_makes_a_node_suspect_at_once_and_a_probe_lifts_it() {
    let mut r = registry();
    let epoch = join(&mut r, at(0), "a");
    let transition = r.dial_failed(at(10), &node_id("a"), "connection refused".into());
    assert_eq!(transition, Some(Transition { node_id: node_id("a"), to: Liveness::Suspect }));
    taken(r.heartbeat(at(20), &node_id("a"), beat(&epoch, 1, &[])));
    assert_eq!(r.liveness(&node_id("a")), Some(Liveness::Suspect), "a heartbeat does not lift a failed dial");
    assert_eq!(r.take_due_probes(at(1_010)).len(), 1);
    r.probed(at(1_011), &node_id("a"), "http://a", live("a", 1));
    assert_eq!(r.liveness(&node_id("a")), Some(Liveness::Online));
}

// CLOUD-1003
#[test]
fn a_live_id_from_another_address_is_a_conflict_and_from_the_same_a_restart() {
    let mut r = registry();
    let epoch = join(&mut r, at(0), "a");
    taken(r.heartbeat(at(1), &node_id("a"), beat(&epoch, 1, &[])));
    r.reserve(&pool("a"), attempt(1));
    let conflict = r.register(at(2), request("a", 2, "http://elsewhere"), None);
    assert!(matches!(conflict, Err(NodeConflict::IdTaken { .. })));
    let restarted = r.register(at(3), request("a", 2, "http://a"), None).unwrap();
    assert_eq!(restarted.ended, vec![attempt(1)]);
    assert_ne!(restarted.epoch, epoch);
    assert_eq!(r.heartbeat(at(4), &node_id("a"), beat(&epoch, 2, &[])), Err(NodeNotKnown));
}

// CLOUD-2666
#[test]
fn a_node_that_is_well_is_dialled_once_a_minute() {
    let mut r = registry();
    let epoch = join(&mut r, at(0), "a");
    let mut dials = Vec::new();
    for ms in (500..=180_000).step_by(500) {
        taken(r.heartbeat(at(ms), &node_id("a"), beat(&epoch, ms, &[])));
        r.expire(at(ms));
        for (id, address, _) in r.take_due_probes(at(ms)) {
            dials.push(ms);
            r.probed(at(ms), &id, &address, live("a", 1));
        }
        assert_eq!(r.check_order(), Ok(()));
    }
    assert_eq!(dials.len(), 3, "{dials:?}");
    // A firewall that comes shows at the next of them.
    let ms = dials[2] + 60_500;
    taken(r.heartbeat(at(ms), &node_id("a"), beat(&epoch, ms, &[])));
    assert_eq!(r.take_due_probes(at(ms)).len(), 1);
    r.probed(at(ms), &node_id("a"), "http://a", ProbeOutcome::Failed("no route".into()));
    assert_eq!(r.liveness(&node_id("a")), Some(Liveness::Suspect));
}

// CLOUD-2690
#[test]
fn a_node_that_died_yields_to_its_successor_elsewhere_and_a_living_one_to_nobody() {
    let failed = || ProbeOutcome::Failed("refused".into());
    let begun = |last_heartbeat: u64| {
        let mut r = registry();
        let epoch = join(&mut r, at(0), "a");
        taken(r.heartbeat(at(last_heartbeat), &node_id("a"), beat(&epoch, 1, &[])));
        r.reserve(&pool("a"), attempt(1));
        (r, epoch)
    };
    let claims = |r: &mut ServiceRegistry, ms: u64| {
        r.register(at(ms), request("a", 2, "http://elsewhere"), None).map(|taken| taken.ended)
    };
    let probe = |r: &mut ServiceRegistry, ms: u64, outcome: ProbeOutcome| {
        assert_eq!(r.take_due_probes(at(ms)).len(), 1, "at {ms}");
        r.probed(at(ms), &node_id("a"), "http://a", outcome);
    };
    // It died: a heartbeat is missing, and two dials failed.
    let (mut r, _) = begun(10);
    assert!(claims(&mut r, 100).is_err());
    probe(&mut r, 100, failed());
    probe(&mut r, 1_100, failed());
    assert_eq!(claims(&mut r, 1_101), Ok(vec![attempt(1)]));
    // One packet was lost.
    let (mut r, _) = begun(10);
    assert!(claims(&mut r, 100).is_err());
    probe(&mut r, 100, failed());
    assert!(claims(&mut r, 1_050).is_err(), "one dial failed");
    probe(&mut r, 1_100, live("a", 1));
    assert!(claims(&mut r, 1_500).is_err());
    // It cannot be dialled, and a heartbeat or a token shows that it lives.
    for token in [false, true] {
        let (mut r, epoch) = begun(10);
        assert!(claims(&mut r, 100).is_err());
        probe(&mut r, 100, failed());
        if token {
            r.alive(at(900), &node_id("a"));
        } else {
            taken(r.heartbeat(at(900), &node_id("a"), beat(&epoch, 2, &[])));
        }
        probe(&mut r, 1_100, failed());
        assert!(claims(&mut r, 1_950).is_err());
        assert_eq!(r.check_order(), Ok(()));
    }
    // The heartbeat is not due yet.
    let (mut r, epoch) = begun(10);
    taken(r.heartbeat(at(99), &node_id("a"), beat(&epoch, 2, &[])));
    assert!(claims(&mut r, 100).is_err());
    probe(&mut r, 100, failed());
    probe(&mut r, 1_100, failed());
    assert!(claims(&mut r, 1_098).is_err());
    // A probe that was under way says nothing of the time after, and another claimant begins anew.
    let (mut r, _) = begun(10);
    r.want_probe(at(50), &node_id("a"));
    assert_eq!(r.take_due_probes(at(50)).len(), 1);
    assert!(claims(&mut r, 100).is_err());
    r.probed(at(101), &node_id("a"), "http://a", failed());
    probe(&mut r, 1_101, failed());
    assert!(claims(&mut r, 1_102).is_err());
    let other = r.register(at(1_103), request("a", 3, "http://third"), None);
    assert!(other.is_err());
    probe(&mut r, 2_101, failed());
    assert!(claims(&mut r, 2_102).is_err(), "the first claim is forgotten");
}

// CLOUD-1013
#[test]
fn an_offline_id_may_come_back_from_another_address() {
    let mut r = registry();
    join(&mut r, at(0), "a");
    r.expire(at(5_000));
    assert!(r.register(at(5_001), request("a", 2, "http://elsewhere"), None).is_ok());
}

// CLOUD-1004
#[test]
fn the_same_boot_keeps_its_attempts_and_its_report_numbers_when_it_registers_again() {
    let mut r = registry();
    let epoch = join(&mut r, at(0), "a");
    taken(r.heartbeat(at(1), &node_id("a"), beat(&epoch, 7, &[])));
    r.reserve(&pool("a"), attempt(1));
    let again = r.register(at(2), request("a", 1, "http://a"), None).unwrap();
    assert!(again.ended.is_empty());
    assert_eq!(r.liveness(&node_id("a")), Some(Liveness::Online));
    assert_eq!(r.heartbeat(at(3), &node_id("a"), beat(&again.epoch, 7, &[])), Ok(HeartbeatOutcome::Ignored));
}

// CLOUD-1005
#[test]
fn an_old_report_is_ignored_and_does_not_renew_the_lease() {
    let mut r = registry();
    let epoch = join(&mut r, at(0), "a");
    taken(r.heartbeat(at(1), &node_id("a"), beat(&epoch, 2, &[])));
    assert_eq!(r.heartbeat(at(1_900), &node_id("a"), beat(&epoch, 2, &[])), Ok(HeartbeatOutcome::Ignored));
    assert_eq!(r.expire(at(2_001)).len(), 1);
}

// CLOUD-1006
#[test]
fn epochs_differ_between_two_lives_of_the_control_plane() {
    let first = join(&mut registry_of(1, None), at(0), "a");
    let second = join(&mut registry_of(2, None), at(0), "a");
    assert_ne!(first, second);
}

// CLOUD-1007
#[test]
fn a_late_deregistration_of_an_old_epoch_has_no_effect() {
    let mut r = registry();
    let old = join(&mut r, at(0), "a");
    let new = r.register(at(1), request("a", 1, "http://a"), None).unwrap().epoch;
    assert_eq!(r.deregister(&node_id("a"), Some(&old)), None);
    assert_eq!(r.deregister(&node_id("a"), Some(&new)), Some(vec![]));
    assert_eq!(r.heartbeat(at(2), &node_id("a"), beat(&new, 1, &[])), Err(NodeNotKnown));
}

// CLOUD-1401
// CLOUD-1408
#[test]
fn a_report_that_crossed_a_dispatch_does_not_free_the_slot() {
    let mut r = registry();
    let epoch = join(&mut r, at(0), "a");
    taken(r.heartbeat(at(1), &node_id("a"), beat(&epoch, 1, &[])));
    r.reserve(&pool("a"), attempt(1));
    let (vanished, _) = taken(r.heartbeat(at(2), &node_id("a"), beat(&epoch, 2, &[])));
    assert!(vanished.is_empty(), "not accepted yet: the report says nothing about it");
    assert_eq!(busy(&r, "a"), 1);
    r.accepted(&pool("a"), &attempt(1), 3);
    let (vanished, _) = taken(r.heartbeat(at(3), &node_id("a"), beat(&epoch, 3, &[])));
    assert!(vanished.is_empty(), "report 3 was made before the acceptance");
    let (vanished, _) = taken(r.heartbeat(at(4), &node_id("a"), beat(&epoch, 4, &[attempt(1)])));
    assert!(vanished.is_empty());
    assert_eq!(busy(&r, "a"), 1, "reported and reserved is one slot");
    let (vanished, _) = taken(r.heartbeat(at(5), &node_id("a"), beat(&epoch, 5, &[])));
    assert_eq!(vanished, vec![attempt(1)]);
}

// CLOUD-1402
#[test]
fn a_report_from_before_the_end_makes_no_orphan_and_a_later_one_does() {
    let mut r = registry();
    let epoch = join(&mut r, at(0), "a");
    taken(r.heartbeat(at(1), &node_id("a"), beat(&epoch, 1, &[])));
    r.reserve(&pool("a"), attempt(1));
    r.accepted(&pool("a"), &attempt(1), 1);
    r.release(&pool("a"), &attempt(1), Some(2));
    let (_, orphans) = taken(r.heartbeat(at(2), &node_id("a"), beat(&epoch, 2, &[attempt(1)])));
    assert!(orphans.is_empty());
    assert_eq!(busy(&r, "a"), 0, "the node said that it has ended");
    let (_, orphans) = taken(r.heartbeat(at(3), &node_id("a"), beat(&epoch, 3, &[attempt(1)])));
    assert_eq!(orphans, vec![attempt(1)]);
    assert_eq!(busy(&r, "a"), 1, "an orphan holds its slot until it is gone");
}

// CLOUD-1403
#[test]
fn a_refused_pool_counts_as_full_until_its_next_report_or_the_hold_ends() {
    let mut r = registry();
    let epoch = join(&mut r, at(0), "a");
    taken(r.heartbeat(at(1), &node_id("a"), beat(&epoch, 1, &[])));
    r.hold(&pool("a"), at(251));
    assert!(r.pool_facts(&pool("a")).unwrap().held);
    assert_eq!(r.next_deadline(), Some(at(251)));
    r.expire(at(251));
    assert!(!r.pool_facts(&pool("a")).unwrap().held);
    r.hold(&pool("a"), at(600));
    taken(r.heartbeat(at(300), &node_id("a"), beat(&epoch, 2, &[])));
    assert!(!r.pool_facts(&pool("a")).unwrap().held);
}

// CLOUD-1306
#[test]
fn when_most_nodes_fall_silent_at_once_nobody_goes_offline_for_one_more_timeout() {
    let mut r = registry();
    for name in ["a", "b", "c", "d"] {
        join(&mut r, at(0), name);
    }
    assert_eq!(r.expire(at(2_000)).len(), 4);
    assert!(r.mass_silence_since().is_some());
    assert!(r.expire(at(9_999)).is_empty());
    assert_eq!(r.expire(at(10_000)).len(), 4);
}

// CLOUD-1306
#[test]
fn mass_silence_with_a_failed_connection_is_not_ours() {
    let mut r = registry();
    for name in ["a", "b", "c"] {
        join(&mut r, at(0), name);
    }
    r.expire(at(2_000));
    r.dial_failed(at(2_001), &node_id("a"), "refused".into());
    assert_eq!(r.mass_silence_since(), None);
    assert_eq!(r.expire(at(5_000)).len(), 3);
}

// CLOUD-1306
#[test]
fn a_node_that_was_not_well_neither_prevents_nor_ends_the_guard_and_one_that_was_does() {
    let mut r = registry();
    for name in ["a", "b", "c"] {
        join(&mut r, at(0), name);
    }
    // One that could never be dialled, and one that could not long before the others fell silent.
    r.register(at(0), request("new", 1, "http://new"), None).unwrap();
    r.dial_failed(at(1), &node_id("c"), "refused".into());
    let again = |r: &mut ServiceRegistry, now: u64| {
        let refused = || ProbeOutcome::Failed("refused".into());
        r.probed(at(now), &node_id("new"), "http://new", refused());
        r.probed(at(now), &node_id("c"), "http://c", refused());
        r.dial_failed(at(now), &node_id("c"), "refused".into());
    };
    again(&mut r, 1_500);
    again(&mut r, 1_999);
    r.expire(at(2_000));
    assert!(r.mass_silence_since().is_some(), "nobody who had been well was lost");
    again(&mut r, 2_500);
    assert!(r.mass_silence_since().is_some());
    r.dial_failed(at(2_600), &node_id("a"), "refused".into());
    assert_eq!(r.mass_silence_since(), None);
    let mut r = registry();
    for name in ["a", "b", "c"] {
        join(&mut r, at(0), name);
    }
    r.dial_failed(at(1_500), &node_id("a"), "refused".into());
    r.expire(at(2_000));
    assert_eq!(r.mass_silence_since(), None, "a fresh failure of one that was well");
}

// CLOUD-1316
#[test]
fn a_probe_that_we_could_not_make_changes_nothing_and_is_made_again_after_a_second() {
    let mut r = registry();
    r.register(at(0), request("a", 1, "http://a"), None).unwrap();
    let inconclusive = |r: &mut ServiceRegistry, now: u64| {
        let before = format!("{:?}", r.view(at(now)));
        assert_eq!(r.take_due_probes(at(now)).len(), 1, "at {now}");
        assert_eq!(r.probed(at(now), &node_id("a"), "http://a", ProbeOutcome::Inconclusive), None);
        assert_eq!(format!("{:?}", r.view(at(now))), before);
        assert!(r.take_due_probes(at(now + 999)).is_empty());
    };
    inconclusive(&mut r, 0);
    assert_eq!(r.liveness(&node_id("a")), Some(Liveness::Suspect));
    assert_eq!(r.take_due_probes(at(1_000)).len(), 1);
    r.probed(at(1_000), &node_id("a"), "http://a", live("a", 1));
    r.want_probe(at(1_500), &node_id("a"));
    inconclusive(&mut r, 1_500);
    assert_eq!(r.liveness(&node_id("a")), Some(Liveness::Online));
    inconclusive(&mut r, 2_500);
}

// CLOUD-1307
#[test]
fn a_stall_of_the_control_plane_extends_every_lease() {
    let mut r = registry();
    join(&mut r, at(0), "a");
    r.stalled(at(20_000), Duration::from_millis(19_500));
    assert!(r.expire(at(20_000)).is_empty());
    assert_eq!(r.liveness(&node_id("a")), Some(Liveness::Online));
}

// CLOUD-1017
#[test]
fn what_one_node_says_never_changes_another() {
    let mut r = registry();
    let a = join(&mut r, at(0), "a");
    let b = join(&mut r, at(0), "b");
    taken(r.heartbeat(at(1), &node_id("b"), beat(&b, 1, &[])));
    r.reserve(&pool("b"), attempt(9));
    r.accepted(&pool("b"), &attempt(9), 1);
    let before = format!("{:?}", r.view(at(5)).nodes[1]);
    let (vanished, orphans) = taken(r.heartbeat(at(5), &node_id("a"), beat(&a, 1, &[attempt(3)])));
    assert!(vanished.is_empty());
    assert_eq!(orphans, vec![attempt(3)]);
    assert_eq!(format!("{:?}", r.view(at(5)).nodes[1]), before);
}

fn registrar(name: &str, max_nodes: usize) -> Registrar {
    Registrar { name: name.into(), max_nodes }
}

// CLOUD-1009
#[test]
fn the_registry_is_bounded_and_an_offline_node_makes_room() {
    let mut r = registry();
    for n in 0..MAX_NODES {
        join(&mut r, at(0), &format!("n{n}"));
    }
    let late = || request("late", 1, "http://x");
    assert_eq!(r.register(at(1), late(), None), Err(NodeConflict::TooMany(MAX_NODES)));
    // All are silent at once, which is taken for our own fault for one more timeout.
    r.expire(at(10_000));
    r.register(at(10_001), late(), None).unwrap();
    assert_eq!(r.take_forgotten().len(), 1);
    assert_eq!(r.view(at(10_001)).nodes.len(), MAX_NODES);
}

// CLOUD-2756
#[test]
fn nodes_that_were_never_dialled_well_give_their_places_first_and_in_the_order_in_which_they_came() {
    let mut r = registry();
    join(&mut r, at(0), "well");
    for n in 1..MAX_NODES {
        r.register(at(1), request(&format!("n{n:03}"), 1, "http://x"), None).unwrap();
    }
    // Offline for long, and known for what it is.
    r.expire(at(10_000));
    assert_eq!(r.liveness(&node_id("well")), Some(Liveness::Offline));
    join(&mut r, at(10_001), "late");
    assert_eq!(r.take_forgotten(), vec![node_id("n001")]);
    // One that is known takes nobody's place.
    r.register(at(10_002), request("n002", 1, "http://x"), None).unwrap();
    assert_eq!(r.take_forgotten(), vec![]);
    for n in 1..MAX_NODES - 1 {
        r.register(at(10_003), request(&format!("new{n}"), 1, "http://x"), None).unwrap();
    }
    let gone = r.take_forgotten();
    assert_eq!((gone.len(), &gone[0]), (MAX_NODES - 2, &node_id("n002")));
    let left = [node_id("well"), node_id("late")].map(|node_id| r.liveness(&node_id));
    assert_eq!(left, [Some(Liveness::Offline), Some(Liveness::Online)]);
}

// CLOUD-2757
#[test]
fn a_bounded_registrar_takes_its_own_places_only_and_its_offline_nodes_make_room() {
    let mut r = registry();
    let (one, other) = (registrar("one", 2), registrar("other", 2));
    let register = |r: &mut ServiceRegistry, now, name: &str, by: Option<&Registrar>| {
        r.register(at(now), request(name, 1, "http://x"), by)
    };
    let full = Err(NodeConflict::RegistrarFull { name: "one".into(), most: 2 });
    register(&mut r, 0, "a", Some(&one)).unwrap();
    register(&mut r, 0, "b", Some(&one)).unwrap();
    assert_eq!(register(&mut r, 1, "c", Some(&one)), full);
    // Its own nodes come again, others have places of their own, and an operator has as many as fit.
    register(&mut r, 1, "a", Some(&one)).unwrap();
    register(&mut r, 1, "c", Some(&other)).unwrap();
    register(&mut r, 1, "d", None).unwrap();
    assert_eq!(register(&mut r, 2, "c", Some(&one)), full, "a node of another's is one more");
    // One that leaves, or comes by another token, leaves its place.
    r.deregister(&node_id("a"), None).unwrap();
    register(&mut r, 3, "e", Some(&one)).unwrap();
    register(&mut r, 3, "b", Some(&other)).unwrap();
    register(&mut r, 3, "f", Some(&one)).unwrap();
    assert_eq!(register(&mut r, 4, "g", Some(&one)), full);
    r.expire(at(20_000));
    register(&mut r, 20_001, "g", Some(&one)).unwrap();
    assert_eq!(r.take_forgotten(), vec![node_id("e")]);
    assert_eq!(r.check_order(), Ok(()));
}

// CLOUD-1020
#[test]
fn an_offline_node_is_forgotten_after_a_day() {
    let mut r = registry();
    join(&mut r, at(0), "a");
    r.expire(at(5_000));
    let day = 24 * 3600 * 1000;
    r.expire(at(5_000 + day - 1));
    assert_eq!(r.view(at(0)).nodes.len(), 1);
    r.expire(at(5_000 + day));
    assert!(r.view(at(0)).nodes.is_empty());
    assert_eq!(r.take_forgotten(), vec![node_id("a")]);
}

// CLOUD-1320
// CLOUD-1323
#[test]
fn a_drained_node_takes_nothing_new_before_it_says_so_and_is_told_until_it_does() {
    let mut r = registry();
    let epoch = join(&mut r, at(0), "a");
    r.heartbeat(at(1), &node_id("a"), beat(&epoch, 1, &[])).unwrap();
    let (address, drain) = r.want(&node_id("a"), Intent::Draining).unwrap();
    assert_eq!((address.as_str(), &drain.epoch), ("http://a", &epoch));
    assert_eq!(r.pool_facts(&pool("a")).unwrap().intent, Intent::Draining);
    let reported = |outcome| match outcome {
        Ok(HeartbeatOutcome::Taken { intent, .. }) => intent,
        other => panic!("{other:?}"),
    };
    let says = |seq, intent, intent_order| Heartbeat { intent, intent_order, ..beat(&epoch, seq, &[]) };
    let of =
        |r: &mut ServiceRegistry, beat: Heartbeat| reported(r.heartbeat(at(beat.seq), &node_id("a"), beat));
    assert_eq!(of(&mut r, says(2, Intent::Serving, 0)), (Intent::Draining, drain.number));
    assert_eq!(of(&mut r, says(3, Intent::Draining, drain.number)), (Intent::Draining, 0));
    // It serves again only when both sides say so.
    let (_, resume) = r.want(&node_id("a"), Intent::Serving).unwrap();
    assert!(resume.number > drain.number);
    assert_eq!(r.intent(&node_id("a")), Some(Intent::Draining));
    assert_eq!(of(&mut r, says(4, Intent::Draining, drain.number)), (Intent::Serving, resume.number));
    r.intent_taken(&node_id("a"), &resume);
    assert_eq!(r.intent(&node_id("a")), Some(Intent::Serving));
    // Neither a report that was made before the node took the last order, nor the word that it
    // took an earlier one, undoes the last one.
    let (_, last) = r.want(&node_id("a"), Intent::Draining).unwrap();
    r.intent_taken(&node_id("a"), &resume);
    assert_eq!(of(&mut r, says(5, Intent::Serving, resume.number)), (Intent::Draining, last.number));
    assert_eq!(r.intent(&node_id("a")), Some(Intent::Draining));
    assert_eq!(r.want(&node_id("nobody"), Intent::Draining), None);
}

// CLOUD-1320
#[test]
fn an_intent_belongs_to_the_node_and_not_to_one_life_of_it() {
    let mut r = registry();
    join(&mut r, at(0), "a");
    let (_, order) = r.want(&node_id("a"), Intent::Draining).unwrap();
    let again = r.register(at(10), request("a", 2, "http://a"), None).unwrap();
    assert_eq!(again.intent, (Intent::Draining, order.number), "the restarted node is told");
    assert_eq!(r.intent(&node_id("a")), Some(Intent::Draining));
    // Not even when it leaves, or is removed, before it was told.
    r.deregister(&node_id("a"), None).unwrap();
    let back = r.register(at(15), request("a", 2, "http://a"), None).unwrap();
    assert_eq!(back.intent, (Intent::Draining, order.number));
    let kept = RegisterRequest { intent: Intent::Draining, ..request("a", 3, "http://a") };
    assert_eq!(
        r.register(at(20), kept, None).unwrap().intent,
        (Intent::Draining, 0),
        "it has it in its file"
    );
}

// CLOUD-1324
#[test]
fn a_drain_that_was_asked_of_a_node_that_is_away_holds_however_long_it_stays_away() {
    let mut r = registry();
    join(&mut r, at(0), "a");
    r.expire(at(5_000));
    assert_eq!(r.liveness(&node_id("a")), Some(Liveness::Offline));
    let (_, order) = r.want(&node_id("a"), Intent::Draining).unwrap();
    let day = 24 * 3600 * 1000;
    r.expire(at(5_000 + day));
    assert_eq!((r.take_forgotten(), r.liveness(&node_id("a"))), (vec![node_id("a")], None));
    let back = r.register(at(3 * day), request("a", 2, "http://elsewhere"), None).unwrap();
    assert_eq!(back.intent, (Intent::Draining, order.number));
    assert_eq!(r.intent(&node_id("a")), Some(Intent::Draining));
}
