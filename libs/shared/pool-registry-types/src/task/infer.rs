//! The hop of an attempt to its node.
//!
//! A node takes the task of a newer control plane without what it does not know of it.

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::engines::EngineKind;
use crate::error::ErrorBody;
use crate::ids::{AttemptId, BootId, LogId, NodeId, ReplicaId, TaskId};
use crate::inputs::RerankInputs;
use crate::newer::{self, drop_unknown, keep_fields_of};
use crate::task::request::{
    ChatMessage, Determinism, KvHint, Priority, Reasoning, Recovery, ResumeMode, TaskRequest, Timeouts,
    is_default,
};

/// What the hop to a node adds to a task at most: ids, defaults, and what an earlier attempt has
/// sent, which is a stream of at most 8 MiB and at most 256 Ki ids of its tokens, 11 bytes each.
pub const INFER_OVERHEAD_BYTES: usize = 12 * 1024 * 1024;

/// `POST /v2/pools/{id}/infer` of a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct InferRequest {
    pub task_id: TaskId,
    pub attempt_id: AttemptId,
    pub node_id: NodeId,
    pub boot_id: BootId,
    pub log_id: LogId,
    /// The index of the first frame that this attempt writes.
    #[schema(maximum = 4_294_967_295_u64)]
    pub first_index: u64,
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub replica_hint: Option<ReplicaId>,
    /// What an earlier attempt has sent, where this one goes on from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<Resume>,
    /// `reasoning` events are read and wanted; else thoughts are left out.
    #[serde(default, skip_serializing_if = "is_default")]
    pub thoughts: bool,
    /// As the client wrote it, with its defaults; a node leaves out what it does not know.
    #[serde(deserialize_with = "task_of_newer")]
    pub task: TaskRequest,
}

/// More frames than any log holds.
const MAX_INDEX: u64 = u32::MAX as u64;

impl InferRequest {
    /// Checks what the types cannot hold, the task's own rules included. Errors: `INVALID_PARAMS`,
    /// naming the field.
    pub fn check(&self) -> Result<(), ErrorBody> {
        let counts = [
            ("first_index", self.first_index),
            ("resume.tokens", self.resume.as_ref().map_or(0, |resume| resume.tokens)),
        ];
        if let Some((field, _)) = counts.into_iter().find(|(_, count)| *count > MAX_INDEX) {
            let message = format!("{field}: must be at most {MAX_INDEX}");
            return Err(ErrorBody::invalid(message));
        }
        self.task.check()
    }
}

/// The task of an attempt, which a client wrote and a control plane has checked: what this node
/// does not know of it is left out. What says how the task is to be run, and not only how well (its
/// workload, its inputs, the role of a message), must be known.
fn task_of_newer<'de, D: Deserializer<'de>>(deserializer: D) -> Result<TaskRequest, D::Error> {
    let mut task = Map::<String, Value>::deserialize(deserializer)?;
    keep_fields_of::<TaskRequest>(&mut task);
    // That it came here is all that its constraints were for.
    task.remove("placement");
    drop_unknown::<EngineKind>(&mut task, "engine");
    drop_unknown::<Priority>(&mut task, "priority");
    drop_unknown::<Determinism>(&mut task, "determinism");
    drop_unknown::<Recovery>(&mut task, "recovery");
    drop_unknown::<Reasoning>(&mut task, "reasoning");
    drop_unknown::<KvHint>(&mut task, "kv_hint");
    if let Some(Value::Object(timeouts)) = task.get_mut("timeouts") {
        keep_fields_of::<Timeouts>(timeouts);
    }
    for message in task.get_mut("messages").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Value::Object(message) = message {
            keep_fields_of::<ChatMessage>(message);
        }
    }
    if let Some(Value::Object(rerank)) = task.get_mut("inputs").and_then(|inputs| inputs.get_mut("rerank")) {
        keep_fields_of::<RerankInputs>(rerank);
    }
    serde_json::from_value(Value::Object(task)).map_err(D::Error::custom)
}

/// Reads a task as the one of an [`InferRequest`].
pub fn read_task(json: &[u8]) -> serde_json::Result<TaskRequest> {
    let mut json = serde_json::Deserializer::from_slice(json);
    let task = task_of_newer(&mut json)?;
    json.end()?;
    Ok(task)
}

/// What had been sent when an attempt was lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resume {
    pub mode: ResumeMode,
    pub text: String,
    /// The thoughts that had been sent.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reasoning: String,
    /// The engine's ids of all tokens so far; empty where they are not all known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub token_ids: Vec<u32>,
    /// Tokens that this has cost, thoughts that were left out included.
    #[schema(maximum = 4_294_967_295_u64)]
    pub tokens: u64,
}
