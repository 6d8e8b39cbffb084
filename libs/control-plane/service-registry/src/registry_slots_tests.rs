//! Which slots are taken, and which pools are left alone, whatever a node reports.

use super::*;

// CLOUD-1412
#[test]
fn a_report_that_names_a_pool_twice_loses_no_reservation_and_frees_no_slot() {
    let mine = [attempt(1), attempt(2)];
    let named_twice = [
        [report(4, &mine[..1]), report(4, &mine[1..])],
        [report(4, &mine), report(4, &[])],
        [report(4, &[]), report(4, &mine)],
        [report(4, &[]), report(4, &[])],
    ];
    let mut r = registry();
    let epoch = join(&mut r, at(0), "a");
    taken(r.heartbeat(at(1), &node_id("a"), beat(&epoch, 1, &[])));
    for id in mine {
        r.reserve(&pool("a"), id);
    }
    for (seq, pools) in (2..).zip(named_twice) {
        let reported = format!("{pools:?}");
        let beat = Heartbeat { pools: pools.to_vec(), ..beat(&epoch, seq, &[]) };
        let (vanished, orphans) = taken(r.heartbeat(at(seq), &node_id("a"), beat));
        assert_eq!((vanished, orphans), (vec![], vec![]), "{reported}");
        let facts = r.pool_facts(&pool("a")).unwrap();
        assert_eq!((facts.slots_total, facts.slots_busy), (4, 2), "{reported}");
    }
    for id in mine {
        r.release(&pool("a"), &id, None);
    }
    assert_eq!((r.reservation_count(), busy(&r, "a")), (0, 0));
}

// CLOUD-1401
#[test]
fn what_is_reserved_and_what_is_reported_are_counted_as_one_set() {
    let mut r = registry();
    let epoch = join(&mut r, at(0), "a");
    for id in [attempt(1), attempt(2)] {
        r.reserve(&pool("a"), id);
    }
    // Of the reported ones one is ours, and one is nobody's.
    taken(r.heartbeat(at(1), &node_id("a"), beat(&epoch, 1, &[attempt(2), attempt(3)])));
    assert_eq!(busy(&r, "a"), 3);
    r.release(&pool("a"), &attempt(1), None);
    assert_eq!(busy(&r, "a"), 2);
}

// CLOUD-1413
#[test]
fn an_attempt_at_a_replica_that_is_not_ready_takes_no_slot_of_the_one_that_is() {
    let replica = |name: &str, ready: bool, attempts: &[AttemptId]| ReplicaReport {
        replica_id: ReplicaId::new(name).unwrap(),
        ready,
        slots_total: 1,
        slots_free: 0,
        slots_foreign: 0,
        attempts: attempts.to_vec(),
        held: vec![],
    };
    let mut r = registry();
    let epoch = join(&mut r, at(0), "a");
    let send = |r: &mut ServiceRegistry, seq: u64, replicas: Vec<ReplicaReport>| {
        let pools = vec![PoolReport { replicas, ..report(1, &[]) }];
        taken(r.heartbeat(at(seq), &node_id("a"), Heartbeat { pools, ..beat(&epoch, seq, &[]) }));
        let facts = r.pool_facts(&pool("a")).unwrap();
        (facts.slots_total, facts.slots_busy)
    };
    let (gone, here) = (attempt(1), attempt(2));
    assert_eq!(send(&mut r, 1, vec![replica("r0", true, &[]), replica("r1", true, &[])]), (2, 0));
    r.reserve(&pool("a"), gone);
    assert_eq!(send(&mut r, 2, vec![replica("r0", false, &[gone]), replica("r1", true, &[])]), (1, 0));
    r.reserve(&pool("a"), here);
    assert_eq!(busy(&r, "a"), 1, "what was sent and is not reported yet takes the slot");
    assert_eq!(send(&mut r, 3, vec![replica("r0", false, &[gone]), replica("r1", true, &[here])]), (1, 1));
    assert_eq!(send(&mut r, 4, vec![replica("r0", true, &[gone]), replica("r1", true, &[here])]), (2, 2));
}

// CLOUD-1566
#[test]
fn an_attempt_whose_end_its_node_has_kept_has_not_vanished() {
    for (switched_off, vanishes) in [(None, false), (Some(Rule::HeldIsListed), true)] {
        let mut r = registry_of(1, switched_off);
        let epoch = join(&mut r, at(0), "a");
        r.heartbeat(at(0), &node_id("a"), beat(&epoch, 1, &[])).unwrap();
        r.reserve(&pool("a"), attempt(1));
        r.accepted(&pool("a"), &attempt(1), 1);
        let mut kept = report(4, &[]);
        kept.replicas[0].held = vec![attempt(1), attempt(9)];
        let kept = Heartbeat { pools: vec![kept], ..beat(&epoch, 2, &[]) };
        let (vanished, orphans) = taken(r.heartbeat(at(1), &node_id("a"), kept));
        assert_eq!((vanished == [attempt(1)], orphans), (vanishes, vec![]), "{switched_off:?}");
        let (vanished, _) = taken(r.heartbeat(at(2), &node_id("a"), beat(&epoch, 3, &[])));
        assert_eq!(vanished, [attempt(1)], "it is in neither list");
    }
}

// CLOUD-1310
#[test]
fn a_pool_whose_engine_fails_again_and_again_gets_one_attempt_until_one_gets_through() {
    let mut r = registry();
    let epoch = join(&mut r, at(0), "a");
    r.heartbeat(at(0), &node_id("a"), beat(&epoch, 1, &[])).unwrap();
    for n in 1..=3_u64 {
        let id = attempt(u128::from(n));
        r.reserve(&pool("a"), id);
        let tripped =
            r.pool_failed(at(n * 10 + 5), &pool("a"), &id, TaskId(Uuid::from_u128(n.into())), at(n * 10));
        assert_eq!(tripped, n == 3);
        r.release(&pool("a"), &id, None);
    }
    assert!(r.pool_facts(&pool("a")).unwrap().tripped);
    assert_eq!(r.next_deadline(), Some(at(1_035)));
    r.expire(at(1_035));
    assert_eq!(r.take_lifted_holds(), [pool("a")]);
    assert!(!r.pool_facts(&pool("a")).unwrap().tripped);
    r.reserve(&pool("a"), attempt(9));
    assert!(r.pool_facts(&pool("a")).unwrap().tripped, "one at a time");
    r.proven(&pool("a"));
    assert!(!r.pool_facts(&pool("a")).unwrap().tripped);
}

// CLOUD-1312
#[test]
fn broken_streams_trip_the_node_with_all_its_pools_and_a_new_boot_starts_afresh() {
    let mut r = registry();
    let epoch = join(&mut r, at(0), "a");
    r.heartbeat(at(0), &node_id("a"), beat(&epoch, 1, &[])).unwrap();
    for n in 1..=3_u64 {
        r.stream_failed(at(n * 10 + 5), &node_id("a"), &attempt(u128::from(n)), at(n * 10));
    }
    assert!(r.pool_facts(&pool("a")).unwrap().tripped && r.has_open_breaker(&node_id("a")));
    r.expire(at(1_035));
    assert_eq!(r.take_lifted_holds().first(), Some(&pool("a")));
    assert!(r.has_open_breaker(&node_id("a")), "until an attempt has got through");
    r.register(at(1_040), request("a", 2, "http://a"), None).unwrap();
    assert!(!r.has_open_breaker(&node_id("a")));
}

#[derive(Debug, Clone)]
enum Action {
    Reserve(u8),
    Accept(u8),
    Release(u8, bool),
    Beat(Vec<u8>),
    Tick(u16),
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        (0_u8..12).prop_map(Action::Reserve),
        (0_u8..12).prop_map(Action::Accept),
        (0_u8..12, any::<bool>()).prop_map(|(n, closed)| Action::Release(n, closed)),
        prop::collection::vec(0_u8..12, 0..4).prop_map(Action::Beat),
        (0_u16..3_000).prop_map(Action::Tick),
    ];
    prop::collection::vec(action, 0..60)
}

proptest! {
    // CLOUD-1409
    /// Reservations are counted until released exactly once, whatever the node reports.
    #[test]
    fn a_reserved_slot_is_never_free_and_a_released_one_never_reserved(actions in actions()) {
        let mut r = registry();
        let epoch = join(&mut r, at(0), "a");
        taken(r.heartbeat(at(0), &node_id("a"), beat(&epoch, 1, &[])));
        let (mut now, mut seq) = (0, 1);
        let mut reserved = BTreeSet::new();
        for action in actions {
            match action {
                Action::Reserve(n) => {
                    if reserved.insert(n) {
                        r.reserve(&pool("a"), attempt(n.into()));
                    }
                }
                Action::Accept(n) => r.accepted(&pool("a"), &attempt(n.into()), seq),
                Action::Release(n, closed) => {
                    let released = r.release(&pool("a"), &attempt(n.into()), closed.then_some(seq));
                    prop_assert_eq!(released, reserved.remove(&n));
                }
                Action::Beat(listed) => {
                    seq += 1;
                    let listed: Vec<AttemptId> = listed.into_iter().map(|n| attempt(n.into())).collect();
                    let (vanished, orphans) = taken(r.heartbeat(at(now), &node_id("a"), beat(&epoch, seq, &listed)));
                    for gone in vanished {
                        prop_assert!(!listed.contains(&gone));
                    }
                    for orphan in orphans {
                        prop_assert!(listed.contains(&orphan));
                    }
                }
                Action::Tick(millis) => {
                    now += u64::from(millis);
                    r.expire(at(now));
                }
            }
            prop_assert_eq!(r.reservation_count(), reserved.len());
            prop_assert!(busy(&r, "a") as usize >= reserved.len());
            prop_assert!(r.next_deadline().is_none_or(|next| next > at(now) || !r.take_due_probes(at(now)).is_empty()));
        }
    }
}
