//! Tasks: the request, the answers, the events of its stream, and the hop to a node.

mod answers;
mod events;
mod infer;
mod request;

pub use answers::{
    AttemptView, SessionView, TaskAccepted, TaskPage, TaskState, TaskStreams, TaskSummary, TaskView,
};
pub use events::{End, FinishReason, Metrics, Started, Token};
pub use infer::{INFER_OVERHEAD_BYTES, InferRequest, Resume, read_task};
pub use request::{
    ChatMessage, Determinism, KvHint, MAX_BODY_BYTES, MAX_PASSED_BYTES, MAX_RESULT_BYTES, MAX_STOP_TEXTS,
    MAX_WAIT_MS, OnDisconnect, Priority, Reasoning, Recovery, ResumeMode, Role, TaskRequest, Timeouts,
    unsupported,
};

pub use crate::inputs::{
    EmbeddingResult, Inputs, MAX_INPUTS, NonEmptyText, RerankInputs, RerankResult, Workload,
};
