//! Sessions: look, evict. They are made by their first task.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use daemon_kit::{ApiError, Caller, PathId};
use pool_registry_types::task::SessionView;
use pool_registry_types::{ErrorBody, ErrorCode, SessionId, routes as paths};

use super::checked;
use super::holders::{self, OfHolder, Reach};
use crate::app::state::AppState;

/// Shows what a session may still use, and where it is warm.
#[utoipa::path(get, path = paths::SESSION, tag = "sessions", params(("session_id" = Uuid, Path), OfHolder),
    responses((status = 200, body = SessionView), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn get(
    State(state): State<AppState>,
    PathId(id): PathId<SessionId>,
    caller: Caller,
    of: Result<Query<OfHolder>, QueryRejection>,
) -> Result<Json<SessionView>, ApiError> {
    let key = holders::session(&state, &caller, Reach::Metadata, id, &checked(of)?)?;
    let session = state.control.published.session(key);
    session.map(Json).ok_or_else(|| ApiError::new(ErrorCode::NotFound, format!("no session {id}")))
}

/// Forgets a session; its tasks go on.
#[utoipa::path(delete, path = paths::SESSION, tag = "sessions", params(("session_id" = Uuid, Path), OfHolder),
    responses((status = 204), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn delete(
    State(state): State<AppState>,
    PathId(id): PathId<SessionId>,
    caller: Caller,
    of: Result<Query<OfHolder>, QueryRejection>,
) -> Result<StatusCode, ApiError> {
    let key = holders::session(&state, &caller, Reach::Contents, id, &checked(of)?)?;
    state.control.delete_session(key).await?;
    Ok(StatusCode::NO_CONTENT)
}
