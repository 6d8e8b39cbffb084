//! Artifacts: JSON documents by the digest of their bytes.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use daemon_kit::{ApiError, Caller, PathId, RawBody};
use owned_tasks::NotDone;
use pool_registry_types::{Digest, ErrorBody, ErrorCode, routes as paths};
use serde::Serialize;
use utoipa::ToSchema;

use super::defect;
use crate::app::state::AppState;

/// How long to wait before an artifact is sent again that found no room to wait, milliseconds.
const RETRY_AFTER_MS: u64 = 1_000;

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ArtifactCreated {
    id: Digest,
    bytes: usize,
}

/// Keeps a JSON document for its holder.
///
/// The same bytes have the same id.
#[utoipa::path(post, path = paths::ARTIFACTS, tag = "artifacts", request_body = serde_json::Value,
    responses((status = 201, body = ArtifactCreated), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 413, body = ErrorBody), (status = 500, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    RawBody(document): RawBody,
) -> Result<(StatusCode, Json<ArtifactCreated>), ApiError> {
    let (artifacts, bytes) = (Arc::clone(&state.artifacts), document.len());
    let id = on_worker(&state, move || artifacts.put(caller.holder_id(), &document)).await?;
    Ok((StatusCode::CREATED, Json(ArtifactCreated { id, bytes })))
}

/// Shows a document that was kept, byte for byte.
#[utoipa::path(get, path = paths::ARTIFACT, tag = "artifacts", params(("digest" = Digest, Path)),
    responses((status = 200, body = serde_json::Value), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 500, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn get(
    State(state): State<AppState>,
    PathId(id): PathId<Digest>,
    caller: Caller,
) -> Result<Response, ApiError> {
    let artifacts = Arc::clone(&state.artifacts);
    let holder = (!caller.is_admin()).then(|| caller.holder_id());
    let document = on_worker(&state, move || artifacts.get(holder, &id)).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], document).into_response())
}

/// What artifacts ask of the disk is done one after the other: many at once take no threads from others.
async fn on_worker<T: Send + 'static>(
    state: &AppState,
    work: impl FnOnce() -> Result<T, ErrorBody> + Send + 'static,
) -> Result<T, ApiError> {
    match state.artifact_worker.run(work).await {
        Ok(result) => result.map_err(ApiError::from),
        Err(NotDone::Full(_)) => {
            let message = "more artifacts wait for the disk than there may";
            Err(ErrorBody::new(ErrorCode::Overloaded, message).retry_after_ms(RETRY_AFTER_MS).into())
        }
        Err(NotDone::Panicked(_)) => Err(defect()),
    }
}
