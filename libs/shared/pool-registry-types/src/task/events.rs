//! The events of a task's stream.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::{NodeId, PoolId, ReplicaId, TaskId};
use crate::placement::WaitingFor;

/// Event `started`: comes with the first token of an attempt that sends any.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Started {
    /// As its client knows it.
    pub task_id: TaskId,
    pub queue_wait_ms: u64,
    pub node_id: NodeId,
    pub pool_id: PoolId,
    pub replica_id: ReplicaId,
    /// 1 for the first attempt of the task.
    pub attempt: u32,
    /// The replica has served this session before, and nothing is known to have emptied its cache.
    #[serde(default)]
    pub kv_warmth: bool,
}

/// Event `metrics`: comes while a task waits. It is not kept: a resumed reader gets newer ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Metrics {
    /// Tasks of the lane that start before this one, 0 when it runs. Absent while no pool could take it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_position: Option<u32>,
    /// Present while it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<WaitingFor>,
    /// From measured paces; absent before there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_start_ms: Option<u64>,
    /// Waiting tasks of the lane.
    pub queue_depth: u32,
    /// That the task starts before its deadline, 0 to 1, by how right earlier predictions were;
    /// absent without a deadline and before there were enough of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_time_probability: Option<f64>,
    /// The session's replica is still warm.
    #[serde(default)]
    pub kv_warmth: bool,
    /// Of the session; absent where tokens are not limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_budget_remaining: Option<u64>,
}

/// Events `token` and `reasoning`: the text, or the thoughts, of one chunk of the engine's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Token {
    pub t: String,
    /// 0, 1, 2, … over the whole task, tokens and thoughts together.
    pub i: u64,
}

/// Event `end`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct End {
    /// The engine's own count; 0 where nothing is generated.
    pub tokens_out: u64,
    /// Tokens of the inputs, where the engine says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_in: Option<u64>,
    /// Milliseconds from the acceptance of the attempt to its last token.
    pub decode_time_ms: u64,
    /// Milliseconds from its first token to its last.
    #[serde(default)]
    pub decode_ms: u64,
    pub finish_reason: FinishReason,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended by itself, or a stop text came.
    Stop,
    /// `max_tokens` or the context is used up.
    Length,
}
