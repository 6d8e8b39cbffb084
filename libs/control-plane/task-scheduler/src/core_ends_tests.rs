//! How attempts end, what their tasks are given then, and what a cancel does.

use super::*;

// CLOUD-1504
#[test]
fn a_task_without_a_token_moves_to_another_node_when_its_stream_breaks() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 1);
    b.submit(task()).1.unwrap();
    let first = b.node_of(0).to_owned();
    b.end(b.dispatches[0].attempt, 0, HowEnded::Broken("reset".into()));
    assert_eq!(b.dispatches.len(), 2);
    assert_ne!(b.node_of(1), first);
    assert_eq!(b.dispatches[1].attempt_number, 2);
    assert!(b.terminal.is_empty());
}

// CLOUD-1505
#[test]
fn a_task_with_tokens_ends_with_worker_reset_when_its_stream_breaks() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 1);
    let (id, _) = b.submit(task());
    b.end(b.dispatches[0].attempt, 3, HowEnded::Broken("reset".into()));
    assert_eq!(b.terminal[&id], ErrorCode::WorkerReset);
    assert_eq!(b.dispatches.len(), 1);
}

// CLOUD-1511
#[test]
fn one_broken_stream_does_not_end_its_neighbours() {
    let mut b = Bench::new();
    b.join("a", 4);
    b.submit(task()).1.unwrap();
    b.submit(task()).1.unwrap();
    b.end(b.dispatches[0].attempt, 3, HowEnded::Broken("reset".into()));
    assert!(b.closed.is_empty());
    assert_eq!(b.core.running(), 1);
}

// CLOUD-1506
#[test]
fn refusals_cost_no_try_and_the_pool_rests_for_a_moment() {
    let mut b = Bench::new();
    b.join("a", 1);
    let (id, _) = b.submit(task());
    for n in 0..10 {
        let refusal = ErrorBody::new(ErrorCode::ReplicaExhausted, "full");
        b.end(b.dispatches[n].attempt, 0, HowEnded::Refused(refusal));
        assert_eq!(b.dispatches.len(), n + 1, "the pool counts as full");
        b.advance_to(b.now + 250);
        assert_eq!(b.dispatches.len(), n + 2);
    }
    assert!(!b.terminal.contains_key(&id));
}

#[test]
fn refusals_without_end_end_with_the_wait_that_a_task_may_have() {
    let mut b = Bench::new();
    b.join("a", 1);
    let (id, _) = b.submit(task());
    while !b.terminal.contains_key(&id) {
        let attempt = b.last_dispatch().attempt;
        let busy = ErrorBody::new(ErrorCode::ReplicaExhausted, "the engine answered 429");
        b.end(attempt, 0, HowEnded::NodeError(busy));
        let seq = b.now + 2;
        b.advance_to(b.now + 250);
        b.beat("a", seq, 1, &[]);
    }
    assert_eq!(b.terminal[&id], ErrorCode::DeadlineExceeded);
    assert!(b.now >= 600_000 && b.now < 601_000, "{}", b.now);
    assert!(b.view(id).unwrap().attempts.len() <= 33);
}

#[test]
fn a_tried_pool_is_taken_again_when_the_untried_one_goes() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 1);
    b.submit(task()).1.unwrap();
    b.submit(task()).1.unwrap();
    let first = b.dispatches[0].clone();
    b.end(first.attempt, 0, HowEnded::Broken("reset".into()));
    b.advance_to(1_000);
    assert_eq!(b.dispatches.len(), 2, "the untried pool is full, and waited for");
    let other = b.dispatches[1].pool.node_id.clone();
    let reply = b.reply();
    b.apply(Event::Deregister { reply, node_id: other, epoch: None });
    assert_eq!(b.last_dispatch().pool, first.pool);
}

// CLOUD-2488
#[test]
fn what_one_engine_was_not_started_for_is_asked_of_another_pool_before_it_is_refused() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 1);
    let cannot = || {
        let body = ErrorBody::new(ErrorCode::Unsupported, "the engine answered 501: no embeddings");
        HowEnded::NodeError(body.with_cause(EndCause::Engine4xx))
    };
    let (id, _) = b.submit(task());
    b.end(b.dispatches[0].attempt, 0, cannot());
    b.advance_to(1_000);
    assert_eq!(b.dispatches.len(), 2);
    assert_ne!(b.node_of(0), b.node_of(1));
    assert!(!b.terminal.contains_key(&id));
    b.end(b.dispatches[1].attempt, 0, cannot());
    assert_eq!(b.terminal[&id], ErrorCode::Unsupported, "none is left, and none is asked twice");
    assert_eq!(b.dispatches.len(), 2);
}

#[test]
fn a_control_plane_that_ends_gives_every_task_its_terminal_event() {
    let mut b = Bench::new();
    b.join("a", 1);
    let (running, _) = b.submit(task());
    let (queued, _) = b.submit(task());
    b.apply(Event::CutOff);
    assert_eq!(b.terminal[&queued], ErrorCode::Draining);
    assert_eq!(b.closed, vec![b.dispatches[0].attempt]);
    b.end(b.dispatches[0].attempt, 0, HowEnded::Closed);
    assert_eq!(b.terminal[&running], ErrorCode::Draining);
}

// CLOUD-1502
#[test]
fn the_third_failure_is_the_last_and_names_the_causes() {
    let mut b = Bench::new();
    for name in ["a", "b", "c", "d"] {
        b.join(name, 1);
    }
    let (id, _) = b.submit(task());
    for n in 0..3 {
        b.end(b.dispatches[n].attempt, 0, HowEnded::Broken("reset".into()));
    }
    assert_eq!(b.dispatches.len(), 3);
    assert_eq!(b.terminal[&id], ErrorCode::PoolUnavailable);
    let view = b.view(id).unwrap();
    assert!(view.error.unwrap().message.contains("a/pool-0: the stream broke"));
}

// CLOUD-1503
#[test]
fn a_task_that_killed_two_engines_is_not_given_a_third() {
    let mut b = Bench::new();
    for name in ["a", "b", "c"] {
        b.join(name, 1);
    }
    let (id, _) = b.submit(task());
    for n in 0..2 {
        let died = ErrorBody::new(ErrorCode::WorkerReset, "gone").with_cause(EndCause::EngineDied);
        b.end(b.dispatches[n].attempt, 0, HowEnded::NodeError(died));
    }
    assert_eq!(b.dispatches.len(), 2);
    assert_eq!(b.terminal[&id], ErrorCode::PoolUnavailable);
}

// CLOUD-1509
#[test]
fn a_connection_that_was_never_made_costs_no_try_and_makes_the_node_suspect() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 1);
    b.join("c", 1);
    b.submit(task()).1.unwrap();
    b.end(b.dispatches[0].attempt, 0, HowEnded::NeverSent("refused".into()));
    assert_eq!(b.core.registry().liveness(&b.dispatches[0].pool.node_id), Some(Liveness::Suspect));
    assert_eq!(b.dispatches.len(), 2);
    assert_ne!(b.node_of(0), b.node_of(1));
}

// CLOUD-1510
#[test]
fn a_reset_before_the_headers_makes_the_node_suspect_and_costs_a_try() {
    let mut b = Bench::new();
    for name in ["a", "b", "c", "d"] {
        b.join(name, 1);
    }
    let (id, _) = b.submit(task());
    for n in 0..3 {
        b.end(b.dispatches[n].attempt, 0, HowEnded::NoAnswer("reset".into()));
        assert_eq!(b.core.registry().liveness(&b.dispatches[n].pool.node_id), Some(Liveness::Suspect));
    }
    assert_eq!(b.terminal[&id], ErrorCode::PoolUnavailable);
}

// CLOUD-1407
#[test]
fn a_report_that_overtook_the_end_of_a_stream_waits_for_it() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.submit(task()).1.unwrap();
    let attempt = b.dispatches[0].attempt;
    b.apply(Event::Accepted { attempt, replica_id: ReplicaId::new("r0").unwrap(), report_seq: 1 });
    b.beat("a", 2, 1, &[]);
    b.advance_to(b.now + 1_999);
    assert!(b.closed.is_empty());
    b.advance_to(b.now + 1);
    assert_eq!(b.closed, vec![attempt]);
}

// CLOUD-1604
#[test]
fn a_lost_nodes_task_is_placed_again_only_after_its_log_is_fenced() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.submit(task()).1.unwrap();
    b.advance_to(20_000);
    b.join("b", 1);
    b.advance_to(TIMEOUT_MS);
    let first = b.dispatches[0].attempt;
    assert_eq!(b.closed, vec![first]);
    assert_eq!(b.dispatches.len(), 1, "closed is not yet ended");
    b.end(first, 0, HowEnded::Closed);
    assert_eq!(b.dispatches.len(), 2);
    assert_eq!(b.node_of(1), "b");
}

// CLOUD-1801
#[test]
fn a_cancel_is_answered_after_the_log_is_fenced() {
    let mut b = Bench::new();
    b.join("a", 1);
    let (id, _) = b.submit(task());
    let reply = b.reply();
    b.apply(Event::Cancel { reply, task_id: id });
    assert!(!b.replies.contains_key(&reply));
    b.end(b.dispatches[0].attempt, 2, HowEnded::Closed);
    assert_eq!(b.replies[&reply], Ok(Answer::Canceled));
    assert_eq!(b.terminal[&id], ErrorCode::Canceled);
    let again = b.reply();
    b.apply(Event::Cancel { reply: again, task_id: id });
    assert_eq!(b.replies[&again], Ok(Answer::Canceled));
}

// CLOUD-1802
#[test]
fn a_cancel_that_comes_after_the_end_changes_nothing() {
    let mut b = Bench::new();
    b.join("a", 1);
    let (id, _) = b.submit(task());
    let reply = b.reply();
    b.apply(Event::Cancel { reply, task_id: id });
    b.end(b.dispatches[0].attempt, 2, HowEnded::Finished);
    assert_eq!(b.replies[&reply], Ok(Answer::Canceled));
    assert_eq!(b.view(id).unwrap().state, TaskState::Completed);
}

// CLOUD-1945
#[test]
fn a_task_that_was_taken_once_waits_whatever_is_found_wrong_with_it_and_its_end_says_what() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 1);
    let (id, _) = b.submit(task());
    assert_eq!(b.node_of(0), "a");
    let (attempt, replica_id) = (b.dispatches[0].attempt, ReplicaId::new("r0").unwrap());
    b.apply(Event::Accepted { attempt, replica_id, report_seq: 1 });
    b.end(attempt, 0, HowEnded::Broken("reset".into()));
    let wrong = || HowEnded::Rejected(ErrorBody::new(ErrorCode::InvalidParams, "no such thing"));
    assert_eq!(b.node_of(1), "b");
    b.end(b.dispatches[1].attempt, 0, wrong());
    for second in 1..700 {
        b.advance_to(second * 1_000);
        for name in ["a", "b"] {
            b.beat(name, second + 1, 1, &[]);
        }
        if b.dispatches.len() == 3 && b.core.running() == 1 {
            assert_eq!((b.node_of(2), b.terminal.len()), ("a", 0), "it may take it again");
            b.end(b.dispatches[2].attempt, 0, wrong());
        }
        if b.terminal.contains_key(&id) {
            break;
        }
        assert!(second < 620, "it waits without an end");
    }
    assert_eq!((b.terminal[&id], b.dispatches.len()), (ErrorCode::DeadlineExceeded, 3));
    let Some(Stage::Ended { error: Some(error), .. }) = b.core.tasks.get(&id).map(|task| task.stage.clone())
    else {
        panic!("it has ended with an error")
    };
    let before =
        "before: a/pool-0: the stream broke: reset; b/pool-0: no such thing; a/pool-0: no such thing";
    assert!(error.message.ends_with(before), "{}", error.message);
}

// CLOUD-1946
#[test]
fn an_end_on_a_pool_that_has_gone_counts_for_its_task_and_the_pool_comes_back_with_nothing_against_it() {
    let mut b = Bench::new();
    b.join("a", 1);
    let (id, _) = b.submit(task());
    let (attempt, replica_id) = (b.dispatches[0].attempt, ReplicaId::new("r0").unwrap());
    b.apply(Event::Accepted { attempt, replica_id, report_seq: 1 });
    let reply = b.reply();
    b.apply(Event::Deregister { reply, node_id: node("a"), epoch: None });
    b.apply(Event::Started { attempt });
    b.end(attempt, 3, HowEnded::Finished);
    assert!(b.terminal.is_empty() && matches!(b.core.tasks.get(&id).unwrap().stage, Stage::Ended { .. }));
    assert_eq!(b.core.counters().completed, 1);
    // It is another pool that has its name from now on: it is chosen, shown and explained as any other.
    b.join("a", 1);
    b.submit(task()).1.unwrap();
    assert_eq!((b.dispatches.len(), b.node_of(1)), (2, "a"));
    b.end(b.dispatches[1].attempt, 3, HowEnded::Finished);
    assert_eq!(b.core.counters().completed, 2);
    b.core.check_order(at(b.now)).unwrap();
}
