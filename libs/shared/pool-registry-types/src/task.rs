//! Tasks: the request, the answers, the events of its stream, and the hop to a node.
//!
//! A client's body rejects unknown fields, because a misspelt option must not be ignored.
//! [`TaskRequest::check`] finds what the types cannot: ranges and contradictions.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::{ErrorBody, ErrorCode};
use crate::ids::{AttemptId, BootId, LogId, ModelRef, NodeId, PoolId, ReplicaId, TaskId};
use crate::pool::EngineKind;

/// Largest request body, bytes. Source: .specs/01 CLOUD-1201.
pub const MAX_BODY_BYTES: usize = 4 * 1024 * 1024;
/// What the hop to a node adds to a task at most: ids and defaults.
pub const INFER_OVERHEAD_BYTES: usize = 64 * 1024;
/// Most texts in `stop`.
pub const MAX_STOP_TEXTS: usize = 16;
/// Longest wait a client may ask for: one day.
pub const MAX_WAIT_MS: u64 = 24 * 3600 * 1000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    #[default]
    Interactive,
    /// Gets at least one start in eight while both wait.
    Batch,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Workload {
    #[default]
    Completion,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    System,
    User,
    Assistant,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChatMessage {
    pub role: Role,
    pub content: String,
}

/// Time limits of one task, milliseconds; absent: the server's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Timeouts {
    /// From the dispatch to the first token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_token_ms: Option<u64>,
    /// Between two tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_idle_ms: Option<u64>,
}

/// `POST /v2/tasks`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TaskRequest {
    /// Makes the request idempotent; drawn by the server when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_id: Option<TaskId>,
    #[serde(default)]
    pub workload: Workload,
    pub model_ref: ModelRef,
    /// Only pools with this engine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineKind>,
    /// Only pools whose context holds at least this many tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ctx: Option<u32>,
    #[serde(default)]
    pub priority: Priority,
    /// Exactly one of `prompt` and `messages`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub messages: Option<Vec<ChatMessage>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u32>,
    /// 0 to 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// GBNF; llama.cpp only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grammar: Option<String>,
    /// Milliseconds from admission to the end of the stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeouts: Option<Timeouts>,
}

impl TaskRequest {
    /// A completion of `prompt` with every option at its default.
    pub fn completion(model_ref: ModelRef, prompt: impl Into<String>) -> Self {
        Self {
            task_id: None,
            workload: Workload::Completion,
            model_ref,
            engine: None,
            ctx: None,
            priority: Priority::Interactive,
            prompt: Some(prompt.into()),
            messages: None,
            max_tokens: None,
            seed: None,
            temperature: None,
            top_p: None,
            top_k: None,
            min_p: None,
            stop: Vec::new(),
            grammar: None,
            deadline_ms: None,
            timeouts: None,
        }
    }

    /// Finds what the types cannot. The error is `INVALID_PARAMS` or `UNSUPPORTED` and names the field.
    pub fn check(&self) -> Result<(), ErrorBody> {
        let invalid = |message: String| Err(ErrorBody::new(ErrorCode::InvalidParams, message));
        match (&self.prompt, &self.messages) {
            (Some(_), Some(_)) => return invalid("prompt and messages: give exactly one of them".into()),
            (None, None) => return invalid("prompt or messages: one of them is required".into()),
            (None, Some(messages)) if messages.is_empty() => {
                return invalid("messages: at least one message is required".into());
            }
            _ => {}
        }
        for (field, value, most) in
            [("temperature", self.temperature, 5.0), ("top_p", self.top_p, 1.0), ("min_p", self.min_p, 1.0)]
        {
            if let Some(value) = value
                && !(0.0..=most).contains(&value)
            {
                return invalid(format!("{field}: must be between 0 and {most}"));
            }
        }
        for (field, value) in [("max_tokens", self.max_tokens), ("ctx", self.ctx)] {
            if value == Some(0) {
                return invalid(format!("{field}: must be at least 1"));
            }
        }
        if self.stop.len() > MAX_STOP_TEXTS {
            return invalid(format!("stop: at most {MAX_STOP_TEXTS} texts"));
        }
        if self.stop.iter().any(String::is_empty) {
            return invalid("stop: an empty text would stop at once".into());
        }
        let timeouts = self.timeouts.unwrap_or_default();
        for (field, value) in [
            ("deadline_ms", self.deadline_ms),
            ("timeouts.first_token_ms", timeouts.first_token_ms),
            ("timeouts.token_idle_ms", timeouts.token_idle_ms),
        ] {
            if let Some(value) = value
                && !(1..=MAX_WAIT_MS).contains(&value)
            {
                return invalid(format!("{field}: must be between 1 and {MAX_WAIT_MS} milliseconds"));
            }
        }
        if self.grammar.is_some() && self.engine == Some(EngineKind::OpenAi) {
            return Err(ErrorBody::new(ErrorCode::Unsupported, "grammar: only llamacpp takes one"));
        }
        Ok(())
    }

    /// The engine that can serve the task, when only one can.
    pub fn required_engine(&self) -> Option<EngineKind> {
        self.engine.or(self.grammar.as_ref().map(|_| EngineKind::LlamaCpp))
    }
}

/// `202` of `POST /v2/tasks`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskAccepted {
    pub task_id: TaskId,
    /// Tasks of the lane that start before this one; 0 when it starts now.
    pub queue_position: u32,
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
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    Queued,
    Running,
    Completed,
    Failed,
    Canceled,
}

/// `GET /v2/tasks/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskView {
    pub task_id: TaskId,
    pub log_id: LogId,
    pub model_ref: ModelRef,
    pub priority: Priority,
    pub state: TaskState,
    /// Present while queued.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_position: Option<u32>,
    /// Milliseconds from admission to the last dispatch, or until now while queued.
    pub queue_wait_ms: u64,
    /// Milliseconds from admission to the end, or until now.
    pub elapsed_ms: u64,
    pub attempts: Vec<AttemptView>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
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

/// Event `started`: comes with the first token of an attempt that sends any.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Started {
    pub queue_wait_ms: u64,
    pub node_id: NodeId,
    pub pool_id: PoolId,
    pub replica_id: ReplicaId,
    /// 1 for the first attempt of the task.
    pub attempt: u32,
}

/// Event `token`: one chunk of the engine's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Token {
    pub t: String,
    /// 0, 1, 2, … over the whole task.
    pub i: u64,
}

/// Event `end`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct End {
    /// The engine's own count.
    pub tokens_out: u64,
    /// Milliseconds from the acceptance of the attempt to its last token.
    pub decode_time_ms: u64,
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

/// `POST /v2/pools/{id}/infer` of a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct InferRequest {
    pub task_id: TaskId,
    pub attempt_id: AttemptId,
    pub node_id: NodeId,
    pub boot_id: BootId,
    pub log_id: LogId,
    /// The index of the first frame that this attempt writes.
    pub first_index: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica_hint: Option<ReplicaId>,
    pub task: TaskRequest,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> TaskRequest {
        TaskRequest::completion(ModelRef::new("m").unwrap(), "hello")
    }

    #[test]
    fn a_plain_completion_is_valid() {
        assert_eq!(request().check(), Ok(()));
    }

    // CLOUD-1203
    #[test]
    fn each_value_out_of_range_is_refused_by_its_name() {
        let cases: Vec<(&str, TaskRequest)> = vec![
            ("prompt", TaskRequest { prompt: None, ..request() }),
            ("messages", TaskRequest { messages: Some(vec![]), ..request() }),
            ("messages", TaskRequest { prompt: None, messages: Some(vec![]), ..request() }),
            ("temperature", TaskRequest { temperature: Some(-0.1), ..request() }),
            ("temperature", TaskRequest { temperature: Some(f64::NAN), ..request() }),
            ("top_p", TaskRequest { top_p: Some(1.1), ..request() }),
            ("min_p", TaskRequest { min_p: Some(2.0), ..request() }),
            ("max_tokens", TaskRequest { max_tokens: Some(0), ..request() }),
            ("ctx", TaskRequest { ctx: Some(0), ..request() }),
            ("stop", TaskRequest { stop: vec!["x".into(); 17], ..request() }),
            ("stop", TaskRequest { stop: vec![String::new()], ..request() }),
            ("deadline_ms", TaskRequest { deadline_ms: Some(0), ..request() }),
            (
                "timeouts.token_idle_ms",
                TaskRequest {
                    timeouts: Some(Timeouts { first_token_ms: None, token_idle_ms: Some(0) }),
                    ..request()
                },
            ),
        ];
        for (field, case) in cases {
            let error = case.check().expect_err(field);
            assert_eq!(error.code, ErrorCode::InvalidParams);
            assert!(error.message.contains(field), "{field}: {}", error.message);
        }
    }

    // CLOUD-1204
    #[test]
    fn a_misspelt_option_is_not_ignored() {
        let error = serde_json::from_str::<TaskRequest>(r#"{"model_ref":"m","prompt":"x","max_token":3}"#)
            .unwrap_err();
        assert!(error.to_string().contains("max_token"), "{error}");
    }

    // CLOUD-1205
    #[test]
    fn a_grammar_asks_for_llamacpp() {
        let task = TaskRequest { grammar: Some("root ::= \"a\"".into()), ..request() };
        assert_eq!(task.required_engine(), Some(EngineKind::LlamaCpp));
        let contradiction = TaskRequest { engine: Some(EngineKind::OpenAi), ..task };
        assert_eq!(contradiction.check().unwrap_err().code, ErrorCode::Unsupported);
    }
}
