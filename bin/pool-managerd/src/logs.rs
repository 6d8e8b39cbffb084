//! `GET /v2/pools/{id}/logs`: what an engine has written, and, followed, what it writes.

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use daemon_kit::{ApiError, Caller, PathId};
use futures::stream;
use pool_registry_types::{ErrorBody, ErrorCode, PoolId, ReplicaId, routes as paths};
use serde::Deserialize;
use utoipa::IntoParams;

use crate::state::AppState;

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Which {
    /// Needed where the pool has several replicas.
    #[param(value_type = ReplicaId, required = false)]
    replica_id: Option<ReplicaId>,
    /// Goes on until the client goes away.
    #[serde(default)]
    follow: bool,
}

/// What an engine of the pool has written last.
#[utoipa::path(get, path = paths::POOL_LOGS, params(("pool_id" = PoolId, Path), Which),
    responses((status = 200, content_type = "text/plain"), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub(crate) async fn logs(
    State(node): State<AppState>,
    PathId(id): PathId<PoolId>,
    caller: Caller,
    which: Result<Query<Which>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(which) = which.map_err(|bad| ApiError::new(ErrorCode::InvalidParams, bad.body_text()))?;
    let reader = node.own.open_log(&id, which.replica_id.as_ref())?;
    let (tokens, follow) = (node.tokens.clone(), which.follow);
    let pieces = stream::unfold((reader, tokens, caller), move |(mut reader, tokens, caller)| async move {
        let piece = reader.next(|| follow && tokens.still_admit(&caller)).await?;
        Some((Ok::<_, std::io::Error>(piece), (reader, tokens, caller)))
    });
    Ok((
        [(header::CONTENT_TYPE, "text/plain; charset=utf-8"), (header::CACHE_CONTROL, "no-store")],
        Body::from_stream(pieces),
    )
        .into_response())
}
