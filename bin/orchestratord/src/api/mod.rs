//! HTTP in: each handler reads a request, asks the control loop, and writes the answer.

pub(crate) mod catalog;
pub(crate) mod meta;
pub(crate) mod nodes;
pub(crate) mod observe;
pub(crate) mod tasks;

use daemon_kit::ApiError;
use pool_registry_types::ErrorCode;
use task_scheduler::Answer;

/// The core answered something else than what was asked: a defect.
fn unexpected(answer: &Answer) -> ApiError {
    tracing::error!(?answer, "not the answer that was asked for");
    ApiError::new(ErrorCode::Internal, "a defect in the server, see its log")
}
