//! What holds when there are many nodes.

use super::*;

fn model(name: &str) -> ModelRef {
    ModelRef::new(name).unwrap()
}

fn fleet(nodes: usize) -> Bench {
    let mut b = Bench::new();
    b.core = ControlCore::new(Policy { max_nodes: nodes, admission_capacity: 10_000, ..policy() }, 7);
    for n in 0..nodes {
        b.join(&format!("n{n}"), 1);
    }
    b
}

// CLOUD-1776
#[test]
fn some_of_very_many_pools_stand_for_the_others_in_a_forecast() {
    const NODES: usize = 300;
    let mut b = fleet(NODES);
    b.submit(task()).1.unwrap();
    b.serve(0, 100, 900, 10);
    for _ in 0..NODES {
        b.submit(task()).1.unwrap();
    }
    assert_eq!(b.dispatches.len(), NODES + 1);
    // Each slot takes a second for a task: so many start after one, and the others after two.
    let starts: Vec<u64> =
        (0..NODES * 3 / 2).map(|_| b.submit(task()).1.unwrap().predicted_start_ms.unwrap()).collect();
    assert!(starts[..NODES].iter().all(|start| *start == 1_000), "{starts:?}");
    assert!(starts[NODES..].iter().all(|start| *start == 2_000), "{starts:?}");
}

// CLOUD-1781
#[test]
fn a_pool_is_indexed_as_it_is_known_whatever_changes_its_slots() {
    let mut b = fleet(2);
    let slots = |b: &Bench| -> Vec<(u32, bool)> {
        // After each event all of it is held against the registry too.
        let nodes = [node("n0"), node("n1")];
        nodes.iter().flat_map(|id| b.core.pools_of(id)).map(|pool| (pool.slots_busy, pool.held)).collect()
    };
    assert_eq!(slots(&b), [(0, false), (0, false)]);
    b.submit(task()).1.unwrap();
    b.submit(task()).1.unwrap();
    assert_eq!(slots(&b), [(1, false), (1, false)], "two were dispatched");
    let first = b.dispatches[0].attempt;
    let refused = ErrorBody::new(ErrorCode::ReplicaExhausted, "full");
    b.end(first, 0, HowEnded::Refused(refused));
    assert_eq!(slots(&b).iter().filter(|pool| **pool == (0, true)).count(), 1, "it is held");
    b.advance_to(b.now + 1_000);
    assert_eq!(b.dispatches.len(), 3, "and takes the task when that is over");
    assert_eq!(slots(&b), [(1, false), (1, false)]);
    b.end(b.dispatches[1].attempt, 1, HowEnded::Finished);
    assert_eq!(slots(&b).iter().filter(|pool| **pool == (0, false)).count(), 1);
}

// CLOUD-1774
#[test]
fn a_refusal_names_some_of_very_many_nodes() {
    let mut b = fleet(100);
    let other = TaskSpec { model_ref: ModelRef::new("other").unwrap(), ..task() };
    b.advance_to(20_000);
    for n in 0..100 {
        b.beat(&format!("n{n}"), 2, 1, &[]);
    }
    b.advance_to(TIMEOUT_MS + 1_000);
    let error = b.submit(other).1.unwrap_err();
    assert_eq!(error.code, ErrorCode::ModelNotAvailable);
    assert_eq!(error.message.matches(", n").count(), 15, "{}", error.message);
}

// CLOUD-3001
#[test]
fn a_refusal_names_the_models_that_stand_nearest_and_no_more_than_its_bound() {
    let mut b = Bench::new();
    b.join("a", 1);
    let models = (0..500).map(|n| model(&format!("llama-{n:03}"))).chain([model("qwen2.5-7b")]).collect();
    b.advance_to(TIMEOUT_MS + 1);
    b.report("a", 2, PoolReport { models, ..report(1, &[]) });
    let refused =
        |b: &mut Bench, name: &str| b.submit(TaskSpec { model_ref: model(name), ..task() }).1.unwrap_err();
    let error = refused(&mut b, "qwen2.5-8b");
    assert!(error.message.contains("(models: qwen2.5-7b, llama-"), "{error}");
    assert_eq!(error.message.matches("llama-").count(), 7, "{error}");
    assert!(refused(&mut b, "llama-1000").message.contains("(models: llama-100, "));
}

// CLOUD-3002
#[test]
fn a_name_that_nobody_has_had_is_not_to_be_tried_again_and_one_that_may_come_back_is() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.advance_to(TIMEOUT_MS + 1);
    let retriable = |b: &mut Bench, name: &str| {
        let error = b.submit(TaskSpec { model_ref: model(name), ..task() }).1.unwrap_err();
        assert_eq!(error.code, ErrorCode::ModelNotAvailable);
        error.retriable
    };
    assert!(!retriable(&mut b, "never-had"));
    assert!(retriable(&mut b, "m"), "its node is silent and not forgotten");
    b.apply(Event::SetNamed { model: model("named"), named: true });
    assert!(retriable(&mut b, "named"));
    b.apply(Event::SetNamed { model: model("named"), named: false });
    assert!(!retriable(&mut b, "named"));
}

// CLOUD-3002
#[test]
fn a_task_that_waited_for_a_name_that_nobody_has_ends_so_too() {
    let mut b = Bench::new();
    let (early, _) = b.submit(task());
    b.advance_to(TIMEOUT_MS);
    let ended = b.view(early).unwrap().error.unwrap();
    assert_eq!((ended.code, ended.retriable), (ErrorCode::ModelNotAvailable, false));
}

// CLOUD-1774
#[test]
fn a_lane_waits_as_long_as_its_model_is_reported_and_ends_with_its_lease() {
    let mut b = fleet(2);
    for _ in 0..3 {
        b.submit(task()).1.unwrap();
    }
    let (waits, _) = b.submit(task());
    for beat in 2..=6 {
        b.advance_to(beat * 10_000);
        b.beat("n0", beat, 1, &[b.dispatches[0].attempt]);
    }
    assert!(!b.terminal.contains_key(&waits));
    let without_model = PoolReport { models: vec![ModelRef::new("other").unwrap()], ..report(1, &[]) };
    b.now = 60_001;
    b.report("n0", 7, without_model);
    b.advance_to(60_000 + TIMEOUT_MS - 1);
    assert!(!b.terminal.contains_key(&waits));
    b.advance_to(60_000 + TIMEOUT_MS);
    assert_eq!(b.terminal.get(&waits), Some(&ErrorCode::ModelNotAvailable));
}
