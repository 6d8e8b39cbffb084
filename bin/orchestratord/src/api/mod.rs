//! HTTP in: each handler reads a request, asks the control loop, and writes the answer.

pub(crate) mod artifacts;
pub(crate) mod catalog;
mod holders;
pub(crate) mod meta;
pub(crate) mod nodes;
pub(crate) mod observe;
pub(crate) mod pools;
mod query;
pub(crate) mod sessions;
mod submission;
pub(crate) mod tasks;
pub(crate) mod turns;
pub(crate) mod v1;

use axum::extract::Query;
use axum::extract::rejection::QueryRejection;
use axum::http::HeaderName;
use daemon_kit::ApiError;
use daemon_kit::connections::PeerEnd;
use pool_registry_types::{ErrorBody, ErrorCode};

/// Of every stream: a proxy before us is not to gather it.
const UNBUFFERED: (HeaderName, &str) = (HeaderName::from_static("x-accel-buffering"), "no");

/// Of an answer that nobody is to be made for whose client has ended its side of the connection: that client
/// has left. `end` is absent where every client that does has.
fn departs_at_its_end(end: Option<&PeerEnd>) {
    if let Some(end) = end {
        end.is_departure();
    }
}

/// The query of a request, or `INVALID_PARAMS` with what is wrong in it.
fn checked<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, ApiError> {
    let Query(query) =
        query.map_err(|error| ApiError::new(ErrorCode::InvalidParams, format!("query: {error}")))?;
    Ok(query)
}

/// Work that waits for the disk, on a thread that may.
async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ErrorBody> + Send + 'static,
) -> Result<T, ApiError> {
    match owned_tasks::blocking("work on the disk", work).await {
        Ok(result) => result.map_err(ApiError::from),
        Err(_) => Err(defect()),
    }
}

/// What whoever asked hears of a panic, which is logged where it was caught.
fn defect() -> ApiError {
    ApiError::new(ErrorCode::Internal, "a defect in the server, see its log")
}
