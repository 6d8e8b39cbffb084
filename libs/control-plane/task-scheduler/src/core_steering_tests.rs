//! What operators and clients steer: drains, pins, sessions, continuation, deadlines, the full lane.

use super::*;
use crate::core::reading::{TaskFilter, TaskList, TaskRecord};

fn of_session(n: u128) -> TaskSpec {
    TaskSpec { session_id: Some(pool_registry_types::SessionId(Uuid::from_u128(n))), ..task() }
}

impl Bench {
    fn want(&mut self, name: &str, intent: Intent) -> Result<IntentAnswer, ErrorBody> {
        let reply = self.reply();
        self.apply(Event::Want { reply, node_id: node(name), intent });
        match self.replies[&reply].clone() {
            Ok(Answer::Intent(answer)) => Ok(answer),
            Ok(other) => panic!("not an answer to an order: {other:?}"),
            Err(error) => Err(error),
        }
    }
}

// CLOUD-1320
#[test]
fn a_drained_node_gets_no_task_from_that_moment_on_and_a_resumed_one_does() {
    let mut b = Bench::new();
    b.join("a", 4);
    b.submit(task()).1.unwrap();
    let answer = b.want("a", Intent::Draining).unwrap();
    assert_eq!((answer.kept_by_node, answer.running), (true, 1), "what runs goes on");
    b.submit(task()).1.unwrap();
    assert_eq!(b.dispatches.len(), 1);
    b.want("a", Intent::Serving).unwrap();
    assert_eq!(b.dispatches.len(), 2, "the waiting task starts with the resume");
    assert_eq!(b.want("nobody", Intent::Draining).unwrap_err().code, ErrorCode::NodeUnknown);
    b.node_takes_intents = false;
    assert!(!b.want("a", Intent::Draining).unwrap().kept_by_node);
    b.submit(task()).1.unwrap();
    assert_eq!(b.dispatches.len(), 2, "it counts here although the node does not know yet");
}

// CLOUD-1751
#[test]
fn a_task_pinned_to_a_drained_node_ends_and_one_to_a_suspect_node_waits() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 1);
    b.submit(pinned_to("a")).1.unwrap();
    assert_eq!(b.node_of(0), "a");
    let (waiting, answer) = b.submit(pinned_to("a"));
    answer.unwrap();
    assert_eq!(b.dispatches.len(), 1, "the other node is free, and is not its node");
    b.end(b.dispatches[0].attempt, 0, HowEnded::NeverSent("refused".into()));
    assert!(!b.terminal.contains_key(&waiting), "a suspect node is waited for");
    b.want("a", Intent::Draining).unwrap();
    assert_eq!(b.terminal[&waiting], ErrorCode::NodeUnavailable);
    assert_eq!(code(b.submit(pinned_to("a")).1), Some(ErrorCode::NodeUnavailable));
    assert_eq!(code(b.submit(pinned_to("b")).1), None);
}

// CLOUD-1752
#[test]
fn a_task_pinned_to_a_dead_node_ends_when_the_node_is_offline() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 1);
    b.submit(pinned_to("a")).1.unwrap();
    let (waiting, _) = b.submit(pinned_to("a"));
    // Only b goes on speaking.
    for seq in 2..6 {
        b.advance_to(b.now + 9_000);
        b.beat("b", seq, 1, &[]);
    }
    assert_eq!(b.terminal[&waiting], ErrorCode::NodeUnavailable);
    assert_eq!(code(b.submit(pinned_to("a")).1), Some(ErrorCode::NodeUnavailable));
}

// CLOUD-1704
// CLOUD-1752
#[test]
fn a_task_pinned_to_a_node_that_dies_with_its_model_ends_by_its_pin() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.submit(pinned_to("a")).1.unwrap();
    let (waiting, answer) = b.submit(pinned_to("a"));
    answer.unwrap();
    b.advance_to(TIMEOUT_MS);
    assert_eq!(b.terminal[&waiting], ErrorCode::NodeUnavailable);
}

// CLOUD-1753
#[test]
fn a_task_pinned_to_an_unknown_node_waits_for_one_node_timeout_after_the_start_and_no_longer() {
    let mut b = Bench::new();
    b.join("a", 1);
    let (early, answer) = b.submit(pinned_to("late"));
    answer.unwrap();
    let (never, answer) = b.submit(pinned_to("nobody"));
    answer.unwrap();
    b.advance_to(5_000);
    b.join("late", 1);
    assert_eq!(b.last_dispatch().task, early, "the node has come");
    b.beat("a", 2, 1, &[]);
    b.advance_to(TIMEOUT_MS);
    assert_eq!(b.terminal[&never], ErrorCode::NodeUnavailable);
    b.beat("a", 3, 1, &[]);
    assert_eq!(code(b.submit(pinned_to("nobody")).1), Some(ErrorCode::NodeUnavailable));
}

// CLOUD-1531
#[test]
fn a_task_that_continues_goes_on_at_the_log_on_another_node() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 1);
    let (id, _) = b.submit(continued());
    b.end(b.dispatches[0].attempt, 3, HowEnded::Broken("reset".into()));
    let second = b.last_dispatch().clone();
    assert_eq!((second.first_index, second.resume), (3, Some(ResumeMode::Append)));
    assert_ne!(b.node_of(1), b.node_of(0));
    let strict = TaskSpec { continuation: Some(ResumeMode::Replay), ..task() };
    b.end(second.attempt, 9, HowEnded::Finished);
    assert!(!b.terminal.contains_key(&id));
    b.submit(strict).1.unwrap();
    let first_token = b.last_dispatch().deadlines.first_token;
    b.now += 7_000;
    b.end(b.last_dispatch().attempt, 1, HowEnded::TimedOut(Overdue::TokenIdle));
    assert_eq!(b.last_dispatch().resume, Some(ResumeMode::Replay));
    let more = b.last_dispatch().deadlines.first_token.checked_sub(first_token);
    assert_eq!(more, Some(Duration::from_secs(7)), "what was sent has to be made again first");
}

// CLOUD-1532
#[test]
fn a_continued_task_has_no_more_tries_than_another_and_ends_with_worker_reset() {
    let mut b = Bench::new();
    for name in ["a", "b", "c", "d"] {
        b.join(name, 1);
    }
    let (id, _) = b.submit(continued());
    for n in 0..3 {
        assert_eq!(b.dispatches.len(), n + 1);
        b.end(b.dispatches[n].attempt, 2, HowEnded::Broken("reset".into()));
    }
    assert_eq!(b.terminal[&id], ErrorCode::WorkerReset);
}

// CLOUD-1533
#[test]
fn a_replay_that_differs_ends_the_task_and_a_refusal_after_tokens_is_free() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 1);
    let (id, _) = b.submit(continued());
    b.end(b.dispatches[0].attempt, 3, HowEnded::Broken("reset".into()));
    let unready = ErrorBody::new(ErrorCode::PoolUnready, "not ready");
    b.end(b.dispatches[1].attempt, 3, HowEnded::NodeError(unready));
    assert!(!b.terminal.contains_key(&id));
    b.advance_to(b.now + 300);
    assert_eq!(b.dispatches.len(), 3);
    let differs = ErrorBody::new(ErrorCode::WorkerReset, "x").with_cause(EndCause::ReplayDiffers);
    b.end(b.dispatches[2].attempt, 3, HowEnded::NodeError(differs));
    assert_eq!(b.terminal[&id], ErrorCode::WorkerReset);
}

// CLOUD-1721
// CLOUD-1310
#[test]
fn a_pool_that_answers_with_errors_is_left_alone_until_one_task_gets_through() {
    let mut b = Bench::new();
    b.join("a", 1);
    for n in 0..3 {
        b.now += 10;
        b.submit(task()).1.unwrap();
        assert_eq!(b.dispatches.len(), n + 1);
        b.now += 10;
        b.end(b.dispatches[n].attempt, 0, engine_failure("500"));
    }
    assert_eq!(b.core.counters().trips, 1);
    b.submit(task()).1.unwrap();
    assert_eq!(b.dispatches.len(), 3, "nothing is sent there");
    b.advance_to(b.now + 1_000);
    assert_eq!(b.dispatches.len(), 4, "one is let through");
    b.apply(Event::Started { attempt: b.dispatches[3].attempt });
    b.end(b.dispatches[3].attempt, 2, HowEnded::Finished);
    assert_eq!(b.dispatches.len(), 5);
}

fn engine_failure(answer: &str) -> HowEnded {
    HowEnded::NodeError(ErrorBody::new(ErrorCode::WorkerReset, answer).with_cause(EndCause::Engine5xx))
}

// CLOUD-1310
#[test]
fn the_tries_of_one_task_trip_nothing_and_others_are_served_beside_it() {
    let mut b = Bench::new();
    b.join("a", 1);
    let (id, _) = b.submit(task());
    for n in 0..3 {
        b.advance_to(b.now + 2_000);
        assert_eq!(b.dispatches.len(), n + 1);
        b.now += 10;
        b.end(b.dispatches[n].attempt, 0, engine_failure("500"));
    }
    assert_eq!(b.terminal[&id], ErrorCode::PoolUnavailable);
    assert_eq!(b.core.counters().trips, 0);
    b.submit(task()).1.unwrap();
    assert_eq!(b.dispatches.len(), 4, "the pool takes the next at once");
}

// CLOUD-1313
#[test]
fn what_only_one_request_is_failed_for_is_its_own_fault_and_counts_against_nobody() {
    for pools in [vec!["a"], vec!["a", "b"]] {
        let mut b = Bench::new();
        for name in &pools {
            b.join(name, 2);
        }
        let retriable = |b: &Bench, id: TaskId| {
            let reading = b.view(id).expect("it is kept");
            reading.error.map(|error| (error.code, error.retriable))
        };
        let (bad, _) = b.submit(task());
        let first = b.last_dispatch().attempt;
        b.now += 10;
        b.end(first, 0, engine_failure("the prompt divides by zero"));
        // Meanwhile others are served, wherever the bad one goes next.
        b.advance_to(b.now + 300);
        for _ in 0..2 * pools.len() {
            b.submit(task()).1.unwrap();
        }
        let others: Vec<AttemptId> =
            b.dispatches.iter().filter(|d| d.task != bad).map(|d| d.attempt).collect();
        b.now += 10;
        for attempt in others {
            b.apply(Event::Started { attempt });
        }
        let again = b.dispatches.iter().rev().find(|d| d.task == bad).unwrap().attempt;
        assert_ne!(again, first, "{pools:?}: it was tried again");
        b.end(again, 0, engine_failure("the prompt divides by zero"));
        assert_eq!(retriable(&b, bad), Some((ErrorCode::PoolUnavailable, false)), "{pools:?}");
        assert_eq!(b.core.counters().trips, 0);
    }
}

// CLOUD-1313
#[test]
fn an_engine_that_fails_everybody_is_tripped_by_three_tasks_which_are_served_elsewhere() {
    let mut b = Bench::new();
    b.join("b", 1);
    b.submit(task()).1.unwrap();
    b.join("a", 4);
    let mut failed = 0;
    while b.core.counters().trips == 0 {
        b.now += 10;
        let (id, _) = b.submit(task());
        let dispatch = b.dispatches.iter().find(|d| d.task == id).unwrap();
        assert_eq!(dispatch.pool.node_id.as_str(), "a", "b is full");
        b.now += 10;
        b.end(dispatch.attempt, 0, engine_failure("EngineCore died"));
        failed += 1;
        assert!(!b.terminal.contains_key(&id));
    }
    assert_eq!(failed, 3);
    // The one that b had is over: it takes the others, one after the other.
    for _ in 0..4 {
        let on_b = b.dispatches.iter().rev().find(|d| d.pool.node_id.as_str() == "b").unwrap().attempt;
        b.apply(Event::Started { attempt: on_b });
        b.end(on_b, 2, HowEnded::Finished);
    }
    assert_eq!(b.core.counters().completed, 4);
    assert!(b.terminal.is_empty(), "{:?}", b.terminal);
}

// CLOUD-2488
#[test]
fn every_pool_is_asked_for_what_some_do_not_have_and_it_costs_no_try() {
    let mut b = Bench::new();
    for name in ["a", "b", "c", "d", "e"] {
        b.join(name, 1);
    }
    let (id, _) = b.submit(task());
    for n in 0..4 {
        let body = ErrorBody::new(ErrorCode::Unsupported, "404").with_cause(EndCause::Engine4xx);
        b.end(b.dispatches[n].attempt, 0, HowEnded::NodeError(body));
        assert_eq!(b.dispatches.len(), n + 2, "at once, and elsewhere");
    }
    b.apply(Event::Started { attempt: b.dispatches[4].attempt });
    b.end(b.dispatches[4].attempt, 1, HowEnded::Finished);
    assert!(!b.terminal.contains_key(&id));
    assert_eq!((b.core.counters().completed, b.core.counters().trips), (1, 0));
}

// CLOUD-2488
#[test]
fn a_failure_beside_an_engine_that_lacks_something_is_tried_again_and_not_where_it_is_lacking() {
    let mut b = Bench::new();
    b.join("a", 1);
    let (id, _) = b.submit(task());
    b.join("b", 1);
    let lacking = || {
        let body = ErrorBody::new(ErrorCode::Unsupported, "404").with_cause(EndCause::Engine4xx);
        HowEnded::NodeError(body)
    };
    b.end(b.dispatches[0].attempt, 0, lacking());
    assert_eq!(b.dispatches[1].pool.node_id.as_str(), "b");
    b.now += 10;
    b.end(b.dispatches[1].attempt, 0, engine_failure("500"));
    b.advance_to(b.now + 2_000);
    assert_eq!(b.dispatches.len(), 3);
    assert_eq!(b.dispatches[2].pool.node_id.as_str(), "b", "the other one is known to lack it");
    b.end(b.dispatches[2].attempt, 0, lacking());
    assert_eq!(b.terminal[&id], ErrorCode::Unsupported, "now nobody has it");
}

// CLOUD-2492
#[test]
fn what_is_the_operators_is_never_the_requests_own_fault() {
    let mut b = Bench::new();
    for name in ["a", "b", "c"] {
        b.join(name, 2);
    }
    let (id, _) = b.submit(task());
    let mut asked = BTreeSet::new();
    for n in 0..3 {
        let mine = b.dispatches.iter().rev().find(|d| d.task == id).unwrap();
        let (attempt, pool) = (mine.attempt, mine.pool.clone());
        assert!(asked.insert(pool), "each pool once");
        b.now += 10;
        // Meanwhile every pool serves others.
        let before = b.dispatches.len();
        for _ in 0..5 {
            b.submit(task()).1.unwrap();
        }
        let others: Vec<AttemptId> = b.dispatches[before..].iter().map(|d| d.attempt).collect();
        for other in others {
            b.apply(Event::Started { attempt: other });
            b.end(other, 1, HowEnded::Finished);
        }
        if n == 2 {
            b.apply(Event::Started { attempt });
            b.end(attempt, 1, HowEnded::Finished);
            break;
        }
        let body = ErrorBody::new(ErrorCode::WorkerReset, "the engine answered 404: no such adapter");
        b.end(attempt, 0, HowEnded::NodeError(body.with_cause(EndCause::EngineDenied)));
        assert!(!b.terminal.contains_key(&id), "{n}");
        b.advance_to(b.now + 2_000);
    }
    assert!(!b.terminal.contains_key(&id), "the third one has it");
}

// CLOUD-1740
// CLOUD-1741
#[test]
fn a_sessions_budgets_are_enforced_before_the_queue() {
    let mut b = Bench::new();
    b.core.policy.admission_capacity = 100;
    b.join("a", 16);
    for _ in 0..8 {
        b.submit(TaskSpec { max_tokens: Some(10), ..of_session(1) }).1.unwrap();
    }
    assert_eq!(code(b.submit(of_session(1)).1), Some(ErrorCode::BudgetExceeded));
    assert_eq!(b.last_dispatch().max_tokens, None, "bounded by the client");
    b.submit(of_session(2)).1.unwrap();
    assert_eq!(b.last_dispatch().max_tokens, Some(1_000), "bounded by what is left");
    assert_eq!(code(b.submit(of_session(2)).1), Some(ErrorCode::BudgetExceeded));
    b.end(b.last_dispatch().attempt, 400, HowEnded::Finished);
    b.submit(of_session(2)).1.unwrap();
    assert_eq!(b.last_dispatch().max_tokens, Some(600));
    // What makes no tokens knows no bound of them, and holds none.
    let workload = Workload::Embedding;
    b.submit(TaskSpec { workload, ..of_session(2) }).1.unwrap();
    assert_eq!((b.last_dispatch().spec.workload, b.last_dispatch().max_tokens), (workload, None));
    let reply = b.reply();
    b.apply(Event::DeleteSession { reply, session: of_session(2).session().unwrap() });
    assert_eq!(b.replies[&reply], Ok(Answer::SessionDeleted));
    b.submit(of_session(2)).1.unwrap();
}

// CLOUD-1719
// CLOUD-1744
#[test]
fn a_session_returns_to_its_replica_until_the_engine_was_away() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 2);
    b.submit(task()).1.unwrap();
    b.submit(of_session(1)).1.unwrap();
    assert_eq!(b.node_of(1), "b");
    b.serve(1, 10, 10, 2);
    b.end(b.dispatches[0].attempt, 1, HowEnded::Finished);
    b.submit(of_session(1)).1.unwrap();
    let warm = b.last_dispatch().clone();
    assert_eq!(warm.warm_replica.as_ref().map(ReplicaId::as_str), Some("r0"));
    assert_eq!(b.node_of(2), "b", "a is as free");
    b.end(warm.attempt, 1, HowEnded::Finished);
    b.submit(TaskSpec { kv_hint: KvHint::Cold, ..of_session(1) }).1.unwrap();
    assert_eq!(b.node_of(3), "a", "who wants it cold is bound to nothing");
    b.end(b.last_dispatch().attempt, 1, HowEnded::Finished);
    let away = PoolReport { ready: false, state: PoolState::Loading, ..report(2, &[]) };
    b.report("b", 8, away);
    b.report("b", 9, report(2, &[]));
    b.submit(of_session(1)).1.unwrap();
    assert_eq!((b.last_dispatch().warm_replica.clone(), b.node_of(4)), (None, "b"), "by turn");
}

// CLOUD-1734
#[test]
fn a_start_is_predicted_from_measured_paces_and_a_deadline_before_it_is_refused_at_once() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.submit(TaskSpec { max_tokens: Some(11), ..task() }).1.unwrap();
    assert_eq!(b.submit(task()).1.unwrap().predicted_start_ms, None, "nothing was measured yet");
    b.serve(0, 100, 1_000, 11);
    // The second runs now, and was expected to take as long as the first.
    let (id, answer) = b.submit(task());
    assert_eq!(answer.unwrap().predicted_start_ms, Some(1_100));
    b.now += 500;
    let (state, metrics) = b.core.metrics(at(b.now)).remove(&id).unwrap();
    assert_eq!(state, TaskState::Queued);
    assert_eq!((metrics.queue_position, metrics.queue_depth), (Some(0), 1));
    assert_eq!(metrics.predicted_start_ms, Some(600));
    let error = b.submit(TaskSpec { deadline_ms: Some(1_000), ..task() }).1.unwrap_err();
    assert_eq!((error.code, error.policy_label.as_deref()), (ErrorCode::AdmissionReject, Some("deadline")));
    assert_eq!(error.retry_after_ms, Some(1_700));
    assert_eq!(code(b.submit(TaskSpec { deadline_ms: Some(1_800), ..task() }).1), None);
}

// CLOUD-1734
#[test]
fn what_was_canceled_is_in_no_forecast_though_a_report_lists_it_still() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.submit(task()).1.unwrap();
    b.serve(0, 100, 9_000, 10);
    let (long, _) = b.submit(task());
    let attempt = b.last_dispatch().attempt;
    b.beat("a", 2, 1, &[attempt]);
    assert_eq!(b.submit(task()).1.unwrap().predicted_start_ms, Some(9_100));
    let reply = b.reply();
    b.apply(Event::Cancel { reply, task_id: long });
    b.end(attempt, 0, HowEnded::Closed);
    assert_eq!(code(b.submit(TaskSpec { deadline_ms: Some(1_000), ..task() }).1), None);
}

// CLOUD-1735
#[test]
fn a_full_lane_may_drop_the_one_that_waits_longest_and_has_not_run() {
    let mut b = Bench::new();
    b.core.policy.full_lane = FullLane::DropLru;
    b.join("a", 1);
    b.submit(task()).1.unwrap();
    let (second, _) = b.submit(task());
    for _ in 0..3 {
        b.submit(task()).1.unwrap();
    }
    // The first is back in the queue, and the lane holds one more than it takes.
    let refusal = ErrorBody::new(ErrorCode::ReplicaExhausted, "full");
    b.end(b.dispatches[0].attempt, 0, HowEnded::Refused(refusal));
    b.submit(task()).1.unwrap();
    assert_eq!(b.terminal, BTreeMap::from([(second, ErrorCode::QueueFullDropLru)]));
}

// CLOUD-1621
#[test]
fn a_retired_model_is_refused_and_its_waiting_tasks_end() {
    let mut b = Bench::new();
    b.join("a", 1);
    let (running, _) = b.submit(task());
    let (waiting, _) = b.submit(task());
    b.apply(Event::SetRetired { model: ModelRef::new("m").unwrap(), retired: true });
    assert_eq!(b.terminal, BTreeMap::from([(waiting, ErrorCode::ModelNotAvailable)]));
    assert_eq!(code(b.submit(task()).1), Some(ErrorCode::ModelNotAvailable));
    b.apply(Event::SetRetired { model: ModelRef::new("m").unwrap(), retired: false });
    b.submit(task()).1.unwrap();
    b.end(b.dispatches[0].attempt, 1, HowEnded::Finished);
    assert_eq!(b.view(running).unwrap().state, TaskState::Completed);
}

// CLOUD-1760
#[test]
fn tasks_are_listed_newest_first_page_by_page_through_a_filter() {
    let mut b = Bench::new();
    b.core.policy.admission_capacity = 100;
    b.join("a", 2);
    let ids: Vec<TaskId> = (0..7).map(|_| b.submit(task()).0).collect();
    let queued = TaskFilter { state: Some(TaskState::Queued), ..TaskFilter::default() };
    let page = |b: &Bench, filter: &TaskFilter, after: Option<TaskId>| {
        let mut tasks: Vec<TaskRecord> =
            b.core.tasks.in_order().filter_map(|(id, _)| b.core.record(*id)).collect();
        tasks.sort_by_key(|task| task.number);
        let below = after.map_or(u64::MAX, |id| b.core.record(id).unwrap().number);
        TaskList(tasks.into_iter().map(Arc::new).collect()).page(at(b.now), filter, below, 3, |_| None)
    };
    let first = page(&b, &queued, None);
    assert_eq!(first.tasks.iter().map(|t| t.task_id).collect::<Vec<_>>(), [ids[6], ids[5], ids[4]]);
    let second = page(&b, &queued, first.next);
    assert_eq!(second.tasks.iter().map(|t| t.task_id).collect::<Vec<_>>(), [ids[3], ids[2]]);
    assert_eq!(second.next, None);
    let on_a = TaskFilter { node_id: Some(node("a")), ..TaskFilter::default() };
    assert_eq!(page(&b, &on_a, None).tasks.len(), 2);
}

// CLOUD-2698
#[test]
fn a_task_is_found_by_the_correlation_id_of_its_request_and_by_its_caller() {
    let mut b = Bench::new();
    let from = |name: &str, id: &str| {
        let mut spec = task();
        spec.caller = Some(task_stream::TaskCaller { name: name.into(), fingerprint: "f".into() });
        spec.trace.correlation_id = id.into();
        spec
    };
    let [first, _, third] =
        [("shop", "c-1"), ("shop", "c-2"), ("ci", "c-1")].map(|(name, id)| b.submit(from(name, id)).0);
    let (bare, _) = b.submit(task());
    let page = |b: &Bench, filter: TaskFilter| {
        let tasks = b.core.tasks.in_order().filter_map(|(id, _)| b.core.record(*id)).map(Arc::new);
        let mut tasks: Vec<_> = tasks.collect();
        tasks.sort_by_key(|task| task.number);
        TaskList(tasks).page(at(b.now), &filter, u64::MAX, 10, |_| None).tasks
    };
    let ids = |tasks: Vec<TaskSummary>| tasks.iter().map(|task| task.task_id).collect::<Vec<_>>();
    let of = |correlation_id: &str| TaskFilter {
        correlation_id: Some(correlation_id.into()),
        ..Default::default()
    };
    assert_eq!(ids(page(&b, of("c-1"))), [third, first]);
    let of_ci = TaskFilter { caller: Some("ci".into()), ..of("c-1") };
    let found = page(&b, of_ci);
    assert_eq!((found[0].caller.as_deref(), found[0].correlation_id.as_deref()), (Some("ci"), Some("c-1")));
    assert_eq!(ids(found), [third]);
    let view = b.core.record(bare).unwrap().view(at(b.now), None);
    assert_eq!((view.caller, view.correlation_id), (None, None));
}

// CLOUD-1722
#[test]
fn an_explanation_has_a_verdict_for_every_pool_and_the_choice_that_would_be_made() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 1);
    b.want("b", Intent::Draining).unwrap();
    let (id, _) = b.submit(task());
    let of =
        |explanation: &Explanation| explanation.pools.iter().map(|pool| pool.refusal).collect::<Vec<_>>();
    use pool_registry_types::placement::Refusal;
    let explained = b.core.explain_task(at(b.now), id).unwrap();
    assert_eq!(of(&explained), [Some(Refusal::SlotsFull), Some(Refusal::Draining)]);
    assert_eq!((explained.choice, explained.reason.as_deref()), (None, Some("every pool that fits is full")));
    b.end(b.dispatches[0].attempt, 1, HowEnded::Finished);
    assert_eq!(b.core.explain_task(at(b.now), id).unwrap_err().code, ErrorCode::NotFound);
    let dry = b.core.explain_request(&task());
    assert_eq!(dry.choice.map(|pool| pool.node_id), Some(node("a")));
}

// CLOUD-1761
#[test]
fn followers_are_told_each_change_of_a_node_a_pool_and_a_task_once() {
    let mut b = Bench::new();
    b.join("a", 1);
    let reported = |b: &mut Bench| std::mem::take(&mut b.changes);
    let joined = reported(&mut b);
    assert_eq!(joined.iter().filter(|c| c.name() == "pool").count(), 1, "{joined:?}");
    assert!(matches!(joined.last(), Some(ClusterChange::Pool { ready: true, .. })), "{joined:?}");
    b.beat("a", 2, 1, &[]);
    assert_eq!(reported(&mut b), [], "nothing has changed");
    b.submit(task()).1.unwrap();
    b.end(b.dispatches[0].attempt, 1, HowEnded::Finished);
    let states: Vec<_> = reported(&mut b)
        .into_iter()
        .filter_map(|change| match change {
            ClusterChange::Task { state, .. } => Some(state),
            _ => None,
        })
        .collect();
    assert_eq!(states, [TaskState::Queued, TaskState::Running, TaskState::Completed]);
}

// CLOUD-1540
#[test]
fn a_quiet_stream_is_moved_when_its_node_cannot_be_dialled_and_loses_nothing_by_it() {
    let mut b = Bench::new();
    b.join("a", 3);
    for request in [task(), continued(), task()] {
        b.submit(request).1.unwrap();
    }
    let [fresh, continues, started] = [0, 1, 2].map(|n| b.dispatches[n].attempt);
    b.apply(Event::Started { attempt: continues });
    b.apply(Event::Started { attempt: started });
    for attempt in [fresh, continues, started] {
        b.apply(Event::Quiet { attempt });
    }
    assert!(b.closed.is_empty(), "the node was dialled, and answered");
    let probed = |outcome| Event::Probed { node_id: node("a"), address: "http://a".into(), outcome };
    b.core.registry.want_probe(at(b.now), &node("a"));
    b.core.registry.take_due_probes(at(b.now));
    b.apply(Event::Heard { attempt: fresh });
    b.apply(probed(ProbeOutcome::Failed("no answer in time".into())));
    assert_eq!(b.closed, [continues], "one has spoken, and the other would lose what was sent");
    b.apply(Event::Quiet { attempt: fresh });
    assert_eq!(b.closed, [continues, fresh]);
}

// CLOUD-1541
#[test]
fn a_deregistration_takes_the_end_of_no_attempt_away() {
    let mut b = Bench::new();
    b.join("a", 2);
    let (early, _) = b.submit(task());
    let (lost, _) = b.submit(task());
    let reply = b.reply();
    b.apply(Event::Deregister { reply, node_id: node("a"), epoch: None });
    assert!(b.closed.is_empty());
    b.end(b.dispatches[0].attempt, 5, HowEnded::Finished);
    assert_eq!(b.view(early).unwrap().state, TaskState::Completed);
    b.advance_to(b.now + 2_000);
    assert_eq!(b.closed, [b.dispatches[1].attempt]);
    b.end(b.dispatches[1].attempt, 5, HowEnded::Closed);
    assert_eq!(b.terminal[&lost], ErrorCode::WorkerReset);
}
