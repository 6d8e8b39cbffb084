//! What looks at engines and their refusals mean for the slots.

use super::*;

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

#[test]
fn a_loading_engine_has_its_model_and_takes_nothing() {
    let mut node = serving(1, 1);
    let loading = Readiness::Loading;
    node.observed(at(0), &pool_id(), &replica_id(0), loading);
    let report = &node.pool_reports(at(0))[0];
    assert_eq!((report.state, report.ready, report.last_error.clone()), (PoolState::Loading, false, None));
    assert_eq!(accept(&mut node, 1), Err(ErrorCode::PoolUnready));
}
