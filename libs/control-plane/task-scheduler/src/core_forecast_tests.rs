//! What is foretold of waiting tasks, and that neither forecasts nor readers change what is decided.

use proptest::prelude::{Strategy as _, any, prop, prop_assert_eq, prop_oneof, proptest};

use super::*;

// CLOUD-1211
#[test]
fn what_others_expect_of_themselves_gets_nobodys_deadline_refused() {
    let mut b = Bench::new();
    b.join("a", 2);
    b.submit(task()).1.unwrap();
    b.serve(0, 100, 1_000, 11);
    for _ in 0..2 {
        b.submit(TaskSpec { expected_tokens: Some(u32::MAX), ..task() }).1.unwrap();
    }
    assert_eq!(b.dispatches.len(), 3, "both run");
    let due = |deadline_ms| TaskSpec { deadline_ms: Some(deadline_ms), ..task() };
    b.submit(due(60_000)).1.unwrap();
    // Each counts for eight times the mean of 11 tokens: 100 ms and 87 times 100 ms.
    let error = b.submit(due(1_000)).1.unwrap_err();
    assert_eq!(error.code, ErrorCode::AdmissionReject);
    assert!(error.retry_after_ms.is_some_and(|wait| (1..=8_800).contains(&wait)), "{error:?}");
}

// CLOUD-1211
#[test]
fn nobody_is_told_to_wait_longer_than_a_task_may() {
    let mut b = Bench::new();
    b.core.policy.queue_timeout = Duration::from_secs(5);
    b.join("a", 1);
    b.submit(task()).1.unwrap();
    b.serve(0, 100, 1_000, 11);
    for _ in 0..5 {
        let huge = TaskSpec { expected_tokens: Some(u32::MAX), ..task() };
        assert!(b.submit(huge).1.unwrap().backoff_ms <= 5_000);
    }
    let error = b.submit(task()).1.unwrap_err();
    assert_eq!((error.code, error.retry_after_ms), (ErrorCode::AdmissionReject, Some(5_000)));
}

// CLOUD-1734
#[test]
fn a_task_that_runs_longer_than_predicted_makes_no_wait_behind_it_look_short() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.submit(task()).1.unwrap();
    b.serve(0, 100, 1_000, 11);
    b.submit(task()).1.unwrap();
    assert_eq!(b.submit(task()).1.unwrap().predicted_start_ms, Some(1_100));
    // Nothing has happened since, and the first one still runs.
    b.now += 10_000;
    let error = b.submit(TaskSpec { deadline_ms: Some(100), ..task() }).1.unwrap_err();
    assert_eq!(error.policy_label.as_deref(), Some("deadline"));
    assert!(error.retry_after_ms.is_some_and(|wait| wait >= 1_100), "{error:?}");
}

// CLOUD-2314
#[test]
fn two_equal_nodes_share_tasks_evenly_that_come_one_after_the_other() {
    let mut b = Bench::new();
    b.join("a", 2);
    b.join("b", 2);
    for _ in 0..10 {
        b.now += 10;
        b.submit(task()).1.unwrap();
        b.end(b.last_dispatch().attempt, 1, HowEnded::Finished);
    }
    let on_a = (0..10).filter(|n| b.node_of(*n) == "a").count();
    assert_eq!((b.dispatches.len(), on_a), (10, 5));
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Submit { deadline_ms: Option<u64>, expected_tokens: Option<u32>, batch: bool },
    Start(usize),
    Finish(usize, u64),
    Lose(usize),
    Cancel(usize),
    Beat { both: bool },
    Wait(u64),
}

fn step() -> impl proptest::strategy::Strategy<Value = Step> {
    let asked = (prop::option::of(1_u64..5_000), prop::option::of(1_u32..200), any::<bool>());
    let submit = asked.prop_map(|(deadline_ms, expected_tokens, batch)| Step::Submit {
        deadline_ms,
        expected_tokens,
        batch,
    });
    prop_oneof![
        4 => submit,
        2 => (0_usize..8).prop_map(Step::Start),
        2 => (0_usize..8, 1_u64..60).prop_map(|(n, tokens)| Step::Finish(n, tokens)),
        1 => (0_usize..8).prop_map(Step::Lose),
        1 => (0_usize..40).prop_map(Step::Cancel),
        1 => any::<bool>().prop_map(|both| Step::Beat { both }),
        3 => (1_u64..3_000).prop_map(Step::Wait),
    ]
}

/// One of them, where there are any.
fn one_of<T: Copy>(all: &[T], n: usize) -> Option<T> {
    all.get(n % all.len().max(1)).copied()
}

fn effects_of(steps: &[Step], is_read: bool) -> Vec<Effect> {
    let mut b = Bench { is_read, ..Bench::new() };
    b.join("a", 2);
    b.join("b", 1);
    let mut seq = 1;
    for step in steps {
        let running: Vec<AttemptId> = b.core.attempts.in_order().map(|(id, _)| *id).collect();
        match *step {
            Step::Submit { deadline_ms, expected_tokens, batch } => {
                let priority = if batch { Priority::Batch } else { Priority::Interactive };
                drop(b.submit(TaskSpec { deadline_ms, expected_tokens, priority, ..task() }));
            }
            Step::Start(n) => {
                if let Some(attempt) = one_of(&running, n) {
                    let replica_id = ReplicaId::new("r0").unwrap();
                    b.apply(Event::Accepted { attempt, replica_id, report_seq: seq });
                    b.apply(Event::Started { attempt });
                }
            }
            Step::Finish(n, tokens) => {
                if let Some(attempt) = one_of(&running, n) {
                    b.end(attempt, tokens, HowEnded::Finished);
                }
            }
            Step::Lose(n) => {
                if let Some(attempt) = one_of(&running, n) {
                    b.end(attempt, 0, HowEnded::Broken("reset".into()));
                }
            }
            Step::Cancel(n) => {
                let tasks: Vec<TaskId> = b.core.tasks.in_order().map(|(id, _)| *id).collect();
                if let Some(task_id) = one_of(&tasks, n) {
                    let reply = b.reply();
                    b.apply(Event::Cancel { reply, task_id });
                }
            }
            Step::Beat { both } => {
                seq += 1;
                b.beat("a", seq, 2, &[]);
                if both {
                    b.beat("b", seq, 1, &[]);
                }
            }
            Step::Wait(millis) => b.advance_to(b.now + millis),
        }
        for attempt in std::mem::take(&mut b.closed) {
            b.end(attempt, 0, HowEnded::Closed);
        }
    }
    b.effects
}

proptest! {
    // CLOUD-1770
    #[test]
    fn a_run_with_readers_decides_what_the_same_run_without_them_decides(
        steps in prop::collection::vec(step(), 1..80)
    ) {
        prop_assert_eq!(effects_of(&steps, true), effects_of(&steps, false));
    }
}
