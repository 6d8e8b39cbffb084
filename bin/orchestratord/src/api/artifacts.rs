//! Artifacts: JSON documents by the digest of their bytes.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use daemon_kit::{ApiError, Caller, PathId, RawBody};
use pool_registry_types::{Digest, ErrorBody, routes as paths};
use serde::Serialize;
use utoipa::ToSchema;

use super::on_disk;
use crate::app::state::AppState;

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ArtifactCreated {
    id: Digest,
    bytes: usize,
}

/// Keeps a JSON document for its holder. The same bytes have the same id.
#[utoipa::path(post, path = paths::ARTIFACTS, tag = "artifacts", request_body = serde_json::Value,
    responses((status = 201, body = ArtifactCreated), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 413, body = ErrorBody), (status = 500, body = ErrorBody)))]
pub(crate) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    RawBody(document): RawBody,
) -> Result<(StatusCode, Json<ArtifactCreated>), ApiError> {
    let (artifacts, bytes) = (Arc::clone(&state.artifacts), document.len());
    let id = on_disk(move || artifacts.put(caller.holder_id(), &document)).await?;
    Ok((StatusCode::CREATED, Json(ArtifactCreated { id, bytes })))
}

/// A document, byte for byte.
#[utoipa::path(get, path = paths::ARTIFACT, tag = "artifacts", params(("digest" = Digest, Path)),
    responses((status = 200, body = serde_json::Value), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 500, body = ErrorBody)))]
pub(crate) async fn get(
    State(state): State<AppState>,
    PathId(id): PathId<Digest>,
    caller: Caller,
) -> Result<Response, ApiError> {
    let artifacts = Arc::clone(&state.artifacts);
    let holder = (!caller.is_admin()).then(|| caller.holder_id());
    let document = on_disk(move || artifacts.get(holder, &id)).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], document).into_response())
}
