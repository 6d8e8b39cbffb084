//! Tasks: what is accepted is within its ranges, and means the same after the hop to a node.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::task::{MAX_INPUTS, MAX_STOP_TEXTS, MAX_WAIT_MS, TaskRequest, Workload};

/// What serialising may add: defaults that the client left out, and longer ways to write an id.
const DEFAULTS: usize = 512;

fuzz_target!(|body: &[u8]| {
    let Some(task) = fuzz::read_json::<TaskRequest>(body, DEFAULTS) else { return };
    let engines = task.engines();
    for engine in EngineKind::ALL {
        let able = task.lacks(engine).is_none() && task.engine.is_none_or(|named| named == engine);
        assert_eq!(engines.contains(engine), able, "{engine}");
    }
    let checked = task.check();
    let text = serde_json::to_vec(&task).expect("what was read can be written");
    let again: TaskRequest = serde_json::from_slice(&text).expect("what was written can be read");
    assert_eq!(again.check(), checked, "another verdict after the hop");
    if checked.is_err() {
        return;
    }
    assert!(!engines.is_empty(), "no engine can run it");
    let inputs = [task.prompt.is_some(), task.messages.is_some(), task.inputs.is_some()];
    assert_eq!(inputs.iter().filter(|given| **given).count(), 1, "exactly one input");
    assert_eq!(task.inputs.is_some(), task.workload != Workload::Completion);
    if let Some(inputs) = &task.inputs {
        assert!((1..=MAX_INPUTS).contains(&inputs.texts().len()));
        assert!(inputs.texts().iter().all(|text| !text.is_empty()));
        assert!(task.continuation().is_none() && task.stop.is_empty() && task.grammar.is_none());
    }
    for (value, most) in [(task.temperature, 5.0), (task.top_p, 1.0), (task.min_p, 1.0)] {
        assert!(value.is_none_or(|value| value.is_finite() && value >= 0.0 && value <= most), "{value:?}");
    }
    assert!(task.stop.len() <= MAX_STOP_TEXTS && task.stop.iter().all(|text| !text.is_empty()));
    let timeouts = task.timeouts.unwrap_or_default();
    for wait in [task.deadline_ms, timeouts.first_token_ms, timeouts.token_idle_ms] {
        assert!(wait.is_none_or(|wait| (1..=MAX_WAIT_MS).contains(&wait)), "{wait:?}");
    }
    if let Some(constraints) = &task.placement
        && let Some(pool) = &constraints.pin_pool_id
        && let (Some(of), Some(node)) = (&pool.node_id, &constraints.node_id)
    {
        assert_eq!(of, node, "a pin to two nodes");
    }
});
