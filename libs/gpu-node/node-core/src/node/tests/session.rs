//! What is reported when, and what the answers order.

use super::*;

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
        observed: None,
    };
    assert_eq!(waiting(&mut node, Ok(answer(vec![pool_id()]))), Some(vec![pool_id()]));
    assert_eq!(waiting(&mut node, Err(BeatFailure::Failed("no route".into()))), None);
    assert_eq!(waiting(&mut node, Ok(answer(vec![]))), Some(vec![]), "now it does");
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
        life: None,
    };
    node.registered(at(1), Ok(answer));
    assert!(matches!(node.due(at(1)), Some(NodeEffect::Heartbeat(_))));
    let taken = HeartbeatAnswer {
        heartbeat_interval_ms: 10_000,
        waiting: Vec::new(),
        cancel_attempts: vec![],
        intent: Intent::Serving,
        intent_order: 0,
        observed: None,
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
        observed: None,
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
        life: None,
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
        observed: None,
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
