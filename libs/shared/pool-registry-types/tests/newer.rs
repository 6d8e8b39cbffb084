//! The bodies of `contracts/examples/newer`: what a newer writer says, and what is read of it.

use std::path::Path;

use pool_registry_types::node::{
    Heartbeat, HeartbeatAnswer, IntentOrder, LiveAnswer, RegisterAnswer, RegisterRequest,
};
use pool_registry_types::pool::PoolOrdered;
use pool_registry_types::task::{InferRequest, TaskRequest};
use pool_registry_types::{ErrorBody, ErrorCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

fn example(name: &str) -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../contracts/examples/newer").join(name);
    let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    serde_json::from_str(&text).unwrap()
}

/// Reads the body from its text, as a daemon does, and checks what was read by what it is written as.
fn reads<T: DeserializeOwned + Serialize>(name: &str, expected: Value) -> T {
    let text = example(name).to_string();
    let read: T = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(serde_json::to_value(&read).unwrap(), expected, "{name}");
    read
}

// CLOUD-1109
#[test]
fn a_newer_writer_says_who_it_is() {
    reads::<RegisterRequest>(
        "register_request.json",
        json!({
            "node_id": "gpu-node-1", "machine_id": "machine-alpha",
            "boot_id": "0d5c6a34-90f1-4b7e-8d7c-1d4a1d2f9c10", "address": "http://10.0.0.5:9200",
            "version": "9.0.0", "intent": "draining", "labels": {"zone": "a"}, "pools": ["pool-0"],
            "capabilities": {
                "gpus": [{
                    "device_id": 1, "uuid": "GPU-1b2c", "name": "RTX 3090",
                    "vram_total_bytes": 25_769_803_776_u64, "compute_capability": "8.6",
                }],
                "cpu_cores": 16, "ram_total_bytes": 68_719_476_736_u64,
            },
            "features": ["link", "lanes"],
        }),
    );
    reads::<RegisterAnswer>(
        "register_answer.json",
        json!({
            "node_id": "gpu-node-1", "epoch": "51c2a7be93d04f18-7", "heartbeat_interval_ms": 10_000,
            "node_timeout_ms": 30_000, "intent": "draining", "intent_order": 4,
        }),
    );
    reads::<LiveAnswer>(
        "live_answer.json",
        json!({"node_id": "gpu-node-1", "boot_id": "0d5c6a34-90f1-4b7e-8d7c-1d4a1d2f9c10"}),
    );
}

// CLOUD-1109
#[test]
fn a_newer_writer_says_how_its_node_is() {
    let replica = |id: &str, slots: u32, attempt: &str| {
        json!({
            "replica_id": id, "ready": true, "slots_total": slots, "slots_free": 0, "slots_foreign": 0,
            "attempts": [attempt],
        })
    };
    let mut with_held = replica("r1", 2, "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b13");
    with_held["held"] = json!(["7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b15"]);
    let beat: Heartbeat = reads(
        "heartbeat.json",
        json!({
            "epoch": "51c2a7be93d04f18-7", "seq": 42, "timestamp": "2031-09-30T12:00:00Z",
            "intent": "serving",
            "pools": [
                {
                    "pool_id": "pool-0", "state": "ready", "ready": true, "draining": false,
                    "models": ["smollm2-135m"],
                    "replicas": [replica("r0", 4, "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b12")],
                },
                {
                    "pool_id": "pool-2", "state": "unknown", "ready": false, "draining": false,
                    "engine": "llamacpp", "models": ["smollm2-135m"],
                    "replicas": [with_held],
                    "supervised": {"fits": true, "restarts": 0, "unloads": 0, "log_tail": ["a line"]},
                },
            ],
            "gpus": [{"device_id": 1, "vram_used_bytes": 1, "vram_total_bytes": 2, "health": "unknown"}],
            "models": [{
                "model_id": "smollm2-135m", "bytes": 98_400_000,
                "digest": "sha256:0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a",
            }],
        }),
    );
    assert_eq!(beat.pools[0].engine, None, "a pool of an unknown kind of engine is still shown");
    let mut no_list = example("heartbeat.json");
    no_list["pools"] = json!({"pool-0": {}});
    assert!(
        serde_json::from_value::<Heartbeat>(no_list).is_err(),
        "an empty list would say that every pool is gone"
    );
}

// CLOUD-1109
#[test]
fn a_newer_writer_says_what_is_to_be_done() {
    reads::<HeartbeatAnswer>(
        "heartbeat_answer.json",
        json!({
            "heartbeat_interval_ms": 10_000, "cancel_attempts": ["7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b13"],
            "waiting": ["pool-0"], "intent": "draining", "intent_order": 4,
        }),
    );
    reads::<IntentOrder>(
        "intent_order.json",
        json!({"epoch": "51c2a7be93d04f18-7", "number": 4, "intent": "draining"}),
    );
    reads::<PoolOrdered>(
        "pool_ordered.json",
        json!({"node_id": "gpu-node-1", "pool_id": "pool-0", "state": "unknown"}),
    );
}

// CLOUD-1109
#[test]
fn a_newer_writer_says_why_not() {
    let refusal: ErrorBody = reads(
        "refusal.json",
        json!({
            "code": "UNKNOWN", "message": "the model is being paged in", "retriable": true,
            "pool_id": "pool-0",
        }),
    );
    assert_eq!(refusal.code, ErrorCode::Unknown);
    reads::<ErrorBody>(
        "error_frame.json",
        json!({
            "code": "WORKER_RESET", "message": "the engine was moved", "retriable": true,
            "cause": "unknown",
        }),
    );
}

// CLOUD-1109
#[test]
fn a_newer_writer_says_what_is_to_be_run() {
    let infer: InferRequest = reads(
        "infer_request.json",
        json!({
            "task_id": "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11",
            "attempt_id": "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b12", "node_id": "gpu-node-1",
            "boot_id": "0d5c6a34-90f1-4b7e-8d7c-1d4a1d2f9c10",
            "log_id": "7f3b1c52-64a5-8c56-9e1e-0a3e0f3d2b14", "first_index": 0,
            "task": {
                "workload": "completion", "model_ref": "smollm2-135m", "priority": "interactive",
                "messages": [{"role": "user", "content": "Once upon a time"}], "max_tokens": 8,
                "stop": ["."], "timeouts": {"token_idle_ms": 500},
            },
        }),
    );
    assert_eq!(infer.check(), Ok(()));
    // What nothing can be made of is refused, and not run as something else.
    let cases = [
        ("/task/workload", json!("transcription")),
        ("/task/messages/0/role", json!("tool")),
        ("/task/messages/0/content", json!([{"image": "…"}])),
        ("/task/max_tokens", json!("few")),
    ];
    for (place, value) in cases {
        let mut body = example("infer_request.json");
        *body.pointer_mut(place).unwrap() = value;
        assert!(serde_json::from_value::<InferRequest>(body).is_err(), "{place}");
    }
    let mut resumed = example("infer_request.json");
    resumed["resume"] = json!({"mode": "graft", "text": "a", "tokens": 1});
    assert!(serde_json::from_value::<InferRequest>(resumed).is_err());
}

// CLOUD-1109
// CLOUD-1204
#[test]
fn a_client_is_held_to_every_word() {
    let plain = json!({"model_ref": "m", "prompt": "x"});
    assert!(serde_json::from_value::<TaskRequest>(plain.clone()).is_ok());
    let words = [
        ("engine", "sglang"),
        ("priority", "background"),
        ("workload", "transcription"),
        ("determinism", "bitwise"),
        ("recovery", "hedge"),
        ("reasoning", "summarise"),
        ("kv_hint", "pin"),
        ("tier", "gold"),
    ];
    for (field, word) in words {
        let mut task = plain.clone();
        task[field] = json!(word);
        let error = serde_json::from_value::<TaskRequest>(task).expect_err(field).to_string();
        assert!(error.contains(word) || error.contains(field), "{field}: {error}");
    }
}
