//! What waiting tasks are told to wait for, and what is refused instead.

use pool_registry_types::placement::{Refusal, WaitingFor};

use super::loading::unloaded;
use super::*;

fn pools(counts: &[(Refusal, u32)]) -> WaitingFor {
    WaitingFor::of(counts.iter().copied().collect())
}

fn placed(json: &str) -> TaskSpec {
    TaskSpec { placement: Some(serde_json::from_str(json).unwrap()), ..task() }
}

fn labelled(zone: &str) -> TaskSpec {
    placed(&format!(r#"{{"require_labels":{{"zone":"{zone}"}}}}"#))
}

fn small(ctx_max: u32) -> PoolReport {
    PoolReport { ctx_max: Some(ctx_max), ..report(2, &[]) }
}

// CLOUD-2970
#[test]
fn a_task_that_waits_says_in_every_place_how_many_pools_refuse_it_for_what() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 1);
    let first = b.submit(task()).1.unwrap();
    assert_eq!((first.waiting_for, first.queue_position), (None, Some(0)), "it starts at once");
    b.submit(task()).1.unwrap();
    let (id, answer) = b.submit(task());
    let full = pools(&[(Refusal::SlotsFull, 2)]);
    assert_eq!(full.reason, Some(Refusal::SlotsFull));
    let answer = answer.unwrap();
    assert_eq!((answer.waiting_for, answer.queue_position), (Some(full.clone()), Some(0)));
    let (_, metrics) = b.core.metrics(at(b.now)).remove(&id).unwrap();
    assert_eq!((metrics.waiting_for.as_ref(), metrics.queue_position), (Some(&full), Some(0)));
    let record = b.core.record(id).unwrap();
    let view = record.view(at(b.now), record.waiting.clone());
    assert_eq!((view.waiting_for, view.queue_position), (Some(full), Some(0)));
    b.serve(0, 1, 1, 1);
    assert_eq!(b.core.record(id).unwrap().waiting, None, "it runs");
    let (_, metrics) = b.core.metrics(at(b.now)).remove(&id).unwrap();
    assert_eq!((metrics.waiting_for, metrics.queue_position), (None, Some(0)));
}

// CLOUD-2970
#[test]
fn only_pools_that_have_the_model_count_and_where_none_has_it_all_do() {
    let mut b = Bench::new();
    b.join("a", 1);
    for node in ["b", "c"] {
        let other = PoolReport { models: vec![ModelRef::new("other").unwrap()], ..report(1, &[]) };
        let reply = b.reply();
        b.apply(Event::Register { reply, request: register(node), registrar: None });
        b.report(node, 1, other);
    }
    b.submit(task()).1.unwrap();
    assert_eq!(b.submit(task()).1.unwrap().waiting_for, Some(pools(&[(Refusal::SlotsFull, 1)])));
    let third = TaskSpec { model_ref: ModelRef::new("third").unwrap(), ..task() };
    let answer = b.submit(third).1.unwrap();
    assert_eq!(answer.waiting_for, Some(pools(&[(Refusal::ModelMissing, 3)])));
    assert_eq!(answer.queue_position, None);
}

// CLOUD-2970
#[test]
fn of_equally_common_refusals_the_reason_is_the_one_that_is_checked_last() {
    let both = pools(&[(Refusal::Offline, 2), (Refusal::SlotsFull, 2), (Refusal::Labels, 1)]);
    assert_eq!(both.reason, Some(Refusal::SlotsFull));
    assert_eq!(pools(&[(Refusal::Offline, 3), (Refusal::SlotsFull, 2)]).reason, Some(Refusal::Offline));
    assert_eq!(pools(&[]).reason, None);
}

// CLOUD-2971
#[test]
fn what_nothing_could_take_has_no_place_in_the_queue_until_something_can() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.submit(task()).1.unwrap();
    let (id, answer) = b.submit(labelled("far"));
    let answer = answer.unwrap();
    assert_eq!((answer.queue_position, answer.waiting_for), (None, Some(pools(&[(Refusal::Labels, 1)]))));
    assert_eq!(b.core.metrics(at(b.now)).remove(&id).unwrap().1.queue_position, None);
    assert_eq!(b.core.waiting_tasks(at(b.now)).stuck, 1);
    let reply = b.reply();
    let request =
        RegisterRequest { labels: serde_json::from_str(r#"{"zone":"far"}"#).unwrap(), ..register("b") };
    b.apply(Event::Register { reply, request, registrar: None });
    b.report("b", 1, unloaded(PoolState::Loadable, true));
    b.now += 100;
    let (_, metrics) = b.core.metrics(at(b.now)).remove(&id).unwrap();
    assert_eq!(metrics.queue_position, Some(0), "an engine is started for it");
    assert_eq!(metrics.waiting_for, Some(pools(&[(Refusal::Labels, 1), (Refusal::NotLoaded, 1)])));
}

// CLOUD-2971
#[test]
fn what_nothing_could_take_is_told_no_start_and_to_come_back_in_a_second() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.submit(task()).1.unwrap();
    b.serve(0, 100, 1_000, 11);
    let near = b.submit(task()).1.unwrap();
    assert_eq!((near.predicted_start_ms, near.backoff_ms), (Some(0), 0));
    b.serve(1, 100, 1_000, 11);
    // A slot is free, which is of no use to it.
    let far = b.submit(labelled("far")).1.unwrap();
    assert_eq!((far.predicted_start_ms, far.backoff_ms), (None, 1_000));
    let refused = b.submit(placed(r#"{"wait":false,"require_labels":{"zone":"far"}}"#)).1.unwrap_err();
    assert_eq!(refused.retry_after_ms, Some(1_000));
}

// CLOUD-2972
#[test]
fn a_task_that_is_not_to_wait_starts_at_once_or_is_refused_with_the_counts() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.submit(placed(r#"{"wait":false}"#)).1.unwrap();
    assert_eq!(b.dispatches.len(), 1);
    let (id, refused) = b.submit(placed(r#"{"wait":false}"#));
    let error = refused.unwrap_err();
    assert_eq!((error.code, error.retriable), (ErrorCode::PoolUnavailable, true));
    assert_eq!(error.detail.as_deref(), Some(&pools(&[(Refusal::SlotsFull, 1)])));
    assert!(error.message.starts_with("placement.wait: "), "{error}");
    assert!(error.message.contains("pools: 1 full"), "{error}");
    assert!(b.core.record(id).is_none() && b.core.queued() == 0, "nothing is left of it");
    let far = b.submit(placed(r#"{"wait":false,"require_labels":{"zone":"far"}}"#)).1.unwrap_err();
    assert_eq!(far.detail.as_deref(), Some(&pools(&[(Refusal::Labels, 1)])));
    b.serve(0, 1, 1, 1);
    b.submit(placed(r#"{"wait":false}"#)).1.unwrap();
    assert_eq!(b.dispatches.len(), 2);
}

// CLOUD-2973
#[test]
fn a_context_longer_than_every_pools_is_refused_after_the_first_node_timeout_and_labels_wait() {
    let mut b = Bench::new();
    for (node, ctx_max) in [("a", 2_048), ("b", 4_096)] {
        let reply = b.reply();
        b.apply(Event::Register { reply, request: register(node), registrar: None });
        b.report(node, 1, small(ctx_max));
    }
    let long = TaskSpec { ctx: Some(8_192), ..task() };
    let (id, early) = b.submit(long.clone());
    assert_eq!(early.unwrap().waiting_for, Some(pools(&[(Refusal::ContextShort, 2)])));
    b.advance_to(TIMEOUT_MS / 2);
    b.report("a", 2, small(2_048));
    b.advance_to(TIMEOUT_MS + 1);
    // Node b is offline by now, and not forgotten.
    b.report("a", 3, small(2_048));
    assert_eq!(b.core.registry.liveness(&node("b")), Some(Liveness::Offline));
    let error = b.submit(long.clone()).1.unwrap_err();
    assert_eq!(error.code, ErrorCode::ContextTooLong);
    assert!(error.message.starts_with("ctx: 8192 ") && error.message.contains("(4096)"), "{error}");
    assert!(b.view(id).unwrap().error.is_none(), "what waits already waits on");
    let fits_offline = b.submit(TaskSpec { ctx: Some(4_096), ..task() }).1.unwrap();
    assert_eq!(fits_offline.waiting_for, Some(pools(&[(Refusal::Offline, 1), (Refusal::ContextShort, 1)])));
    assert!(b.submit(labelled("far")).1.is_ok());
    let masked = placed(r#"{"require_device_mask":"GPU9"}"#);
    assert!(b.submit(masked).1.is_ok());
}

// CLOUD-2973
#[test]
fn an_engine_that_no_pool_of_the_model_has_is_refused_though_nothing_else_is_asked() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.advance_to(TIMEOUT_MS + 1);
    b.report("a", 2, report(2, &[]));
    let vllm = TaskSpec { engines: [EngineKind::Vllm].into_iter().collect(), ..task() };
    let error = b.submit(vllm.clone()).1.unwrap_err();
    assert_eq!((error.code, error.engine), (ErrorCode::Unsupported, Some(EngineKind::LlamaCpp)));
    assert!(error.message.starts_with("engine: "), "{error}");
    let reply = b.reply();
    b.apply(Event::Register { reply, request: register("b"), registrar: None });
    b.report("b", 1, PoolReport { engine: Some(EngineKind::Vllm), ..report(2, &[]) });
    b.submit(vllm.clone()).1.unwrap();
    // Its pool is gone from a report for a moment: it is waited for.
    b.report_pools("b", 2, Vec::new());
    assert!(b.submit(vllm).1.is_ok());
}

// CLOUD-2974
#[test]
fn what_nothing_could_take_is_told_from_what_a_stop_waits_for() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.submit(task()).1.unwrap();
    b.submit(task()).1.unwrap();
    b.submit(labelled("far")).1.unwrap();
    b.submit(labelled("farther")).1.unwrap();
    b.apply(Event::Drain);
    let waiting = b.core.waiting_tasks(at(b.now));
    assert_eq!((waiting.startable, waiting.stuck, waiting.reason), (1, 2, Some(Refusal::Labels)));
    b.serve(0, 1, 1, 1);
    b.now += 100;
    assert_eq!(b.core.waiting_tasks(at(b.now)).startable, 0, "it runs");
}

// CLOUD-2975
#[test]
fn counts_are_made_for_tasks_that_wait_once_for_all_that_ask_for_the_same() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.submit(task()).1.unwrap();
    assert_eq!(b.core.waits.answered.len(), 0, "what starts at once is not counted for");
    for _ in 0..3 {
        b.submit(task()).1.unwrap();
    }
    assert_eq!(b.core.waits.answered.len(), 1);
    b.submit(labelled("far")).1.unwrap();
    assert_eq!(b.core.waits.answered.len(), 2);
    b.now += 100;
    let full = b.submit(placed(r#"{"wait":false}"#));
    assert!(full.1.is_err());
    assert_eq!(b.core.waits.answered.len(), 2);
}
