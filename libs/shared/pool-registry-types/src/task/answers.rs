//! What a client is answered about its tasks and its sessions.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::ErrorBody;
use crate::ids::{AttemptId, LogId, ModelRef, NodeId, PoolId, ReplicaId, SessionId, TaskId};
use crate::placement::WaitingFor;
use crate::task::request::Priority;

/// `202` of `POST /v2/tasks`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskAccepted {
    pub task_id: TaskId,
    /// Tasks of the lane that start before this one; 0 when it starts now. Absent while no pool could take
    /// it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_position: Option<u32>,
    /// Present where it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<WaitingFor>,
    /// From measured service times; absent before there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_start_ms: Option<u64>,
    /// How long a polite client waits before it submits again.
    pub backoff_ms: u64,
    pub streams: TaskStreams,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskStreams {
    pub sse: String,
    /// The same with `metrics` each second also while the task runs.
    pub sse_verbose: String,
}

/// Taken in lower and upper case, and said in lower case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    #[serde(alias = "Queued", alias = "QUEUED")]
    Queued,
    #[serde(alias = "Running", alias = "RUNNING")]
    Running,
    #[serde(alias = "Completed", alias = "COMPLETED")]
    Completed,
    #[serde(alias = "Failed", alias = "FAILED")]
    Failed,
    #[serde(alias = "Canceled", alias = "CANCELED")]
    Canceled,
}

/// One task in `GET /v2/tasks`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskSummary {
    pub task_id: TaskId,
    pub model_ref: ModelRef,
    pub priority: Priority,
    pub state: TaskState,
    /// Of the last attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_id: Option<NodeId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<SessionId>,
    pub attempts: u32,
    /// Milliseconds since admission.
    pub age_ms: u64,
    /// The name of its holder; shown to those who see the tasks of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<String>,
    /// Of the request that submitted it: the client's own, or one that was drawn for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// The name of the token that it was submitted with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caller: Option<String>,
}

/// `GET /v2/tasks`: newest first.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct TaskPage {
    pub tasks: Vec<TaskSummary>,
    /// Where the next page begins: `?after=`; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<TaskId>,
}

/// `GET /v2/tasks/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskView {
    pub task_id: TaskId,
    pub log_id: LogId,
    pub model_ref: ModelRef,
    pub priority: Priority,
    pub state: TaskState,
    /// Present while it waits and some pool could take it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_position: Option<u32>,
    /// Present while it waits; at most some hundred milliseconds old.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<WaitingFor>,
    /// Milliseconds from admission to the last dispatch, or until now while queued.
    pub queue_wait_ms: u64,
    /// Milliseconds from admission to the end, or until now.
    pub elapsed_ms: u64,
    pub attempts: Vec<AttemptView>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
    /// Tokens of the inputs, where the engine says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_in: Option<u64>,
    /// Tokens of the answer so far: the engine's own count where it says one, else events are counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_out: Option<u64>,
    /// Why the answer ended; of a request under `/v1` in the words of its API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<String>,
    /// The name of its holder; shown to those who see the tasks of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<String>,
    /// Of the request that submitted it: the client's own, or one that was drawn for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// The name of the token that it was submitted with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caller: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AttemptView {
    pub attempt_id: AttemptId,
    pub node_id: NodeId,
    pub pool_id: PoolId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica_id: Option<ReplicaId>,
    /// `running`, `finished`, or what ended it.
    pub outcome: String,
}

/// `GET /v2/sessions/{id}`: metadata only, never content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SessionView {
    pub session_id: SessionId,
    /// Milliseconds until it is forgotten, unless it is used again.
    pub ttl_ms: u64,
    pub turns: u32,
    pub turns_max: u32,
    pub tokens_used: u64,
    /// Absent where tokens are not limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_budget_remaining: Option<u64>,
    /// Milliseconds of running that are left; absent where time is not limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_budget_remaining_ms: Option<u64>,
    pub kv_warmth: bool,
    /// Where its last task ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_id: Option<NodeId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_id: Option<PoolId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica_id: Option<ReplicaId>,
}
