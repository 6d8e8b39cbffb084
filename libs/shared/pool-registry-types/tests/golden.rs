//! The golden bodies of `contracts/examples/v2` parse, and are written again as they stand.

use std::path::Path;

use pool_registry_types::ErrorBody;
use pool_registry_types::error::EndCause;
use pool_registry_types::node::{Heartbeat, HeartbeatAnswer, IntentOrder, RegisterAnswer, RegisterRequest};
use pool_registry_types::placement::Explanation;
use pool_registry_types::pool::{PoolOrdered, PoolReport};
use pool_registry_types::task::{
    EmbeddingResult, End, InferRequest, Metrics, RerankResult, SessionView, Started, TaskAccepted, TaskPage,
    TaskRequest, Token,
};
use pool_registry_types::view::{CatalogAvailability, ClusterChange, ClusterView, PoolList};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

fn example(name: &str) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../contracts/examples/v2").join(name);
    std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

fn stands<T: DeserializeOwned + Serialize>(name: &str) {
    let text = example(name);
    let parsed: T = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
    let written = serde_json::to_value(parsed).unwrap();
    assert_eq!(written, serde_json::from_str::<Value>(&text).unwrap(), "{name}");
}

// CLOUD-1106
#[test]
fn every_golden_body_is_read_and_written_as_it_stands() {
    stands::<TaskRequest>("task_request.json");
    stands::<TaskRequest>("task_request_embedding.json");
    stands::<TaskRequest>("task_request_rerank.json");
    stands::<EmbeddingResult>("result_embedding.json");
    stands::<RerankResult>("result_rerank.json");
    stands::<TaskRequest>("task_request_chat.json");
    stands::<Token>("reasoning.json");
    stands::<Token>("token.json");
    stands::<Started>("started.json");
    stands::<End>("end.json");
    stands::<PoolReport>("pool_loadable.json");
    stands::<TaskAccepted>("task_accepted.json");
    stands::<RegisterRequest>("register_request.json");
    stands::<RegisterAnswer>("register_answer.json");
    stands::<Heartbeat>("heartbeat.json");
    stands::<HeartbeatAnswer>("heartbeat_answer.json");
    stands::<InferRequest>("infer_request.json");
    stands::<ErrorBody>("error.json");
    stands::<CatalogAvailability>("availability.json");
    stands::<ClusterView>("nodes.json");
    stands::<PoolList>("pools.json");
    stands::<TaskPage>("tasks.json");
    stands::<SessionView>("session.json");
    stands::<Explanation>("explanation.json");
    stands::<Metrics>("metrics.json");
    stands::<IntentOrder>("intent_order.json");
    stands::<PoolOrdered>("pool_ordered.json");
    stands::<ClusterChange>("change_node.json");
    stands::<ClusterChange>("change_pool.json");
    stands::<ClusterChange>("change_task.json");
}

#[test]
fn an_old_reader_meets_a_new_writer_between_the_daemons() {
    let mut newer: Value = serde_json::from_str(&example("heartbeat.json")).unwrap();
    newer["something_new"] = Value::Bool(true);
    newer["pools"][0]["something_new"] = Value::Bool(true);
    let beat: Heartbeat = serde_json::from_value(newer).unwrap();
    assert_eq!(beat.seq, 42);
    let cause: ErrorBody =
        serde_json::from_str(r#"{"code":"WORKER_RESET","message":"","retriable":true,"cause":"bored"}"#)
            .unwrap();
    assert_eq!(cause.cause, Some(EndCause::Unknown), "a newer writer says why in words of its own");
    let task = example("task_request.json").replacen('{', "{\"something_new\":1,", 1);
    assert!(serde_json::from_str::<TaskRequest>(&task).is_err(), "a client's misspelt option is not ignored");
}

// CLOUD-3013
#[test]
fn the_state_of_a_task_is_taken_in_either_case_and_said_in_lower_case() {
    use pool_registry_types::task::TaskState;
    for text in ["queued", "Queued", "QUEUED"] {
        let state: TaskState = serde_json::from_str(&format!("{text:?}")).unwrap();
        assert_eq!(serde_json::to_string(&state).unwrap(), "\"queued\"");
    }
}
