//! Probes and metrics.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use daemon_kit::ApiError;
use pool_registry_types::{ErrorBody, ErrorCode, routes as paths};

use crate::app::state::AppState;
use crate::metrics;

/// The process answers.
#[utoipa::path(get, path = paths::HEALTH_LIVE, tag = "observe", responses((status = 200)))]
pub(crate) async fn live() -> StatusCode {
    StatusCode::OK
}

/// Whether new tasks are taken.
#[utoipa::path(get, path = paths::HEALTH_READY, tag = "observe", responses((status = 200), (status = 503, body = ErrorBody)))]
pub(crate) async fn ready(State(state): State<AppState>) -> Result<StatusCode, ApiError> {
    let facts = state.control.facts().await?;
    if facts.draining {
        return Err(ApiError::new(ErrorCode::Draining, "the control plane is shutting down"));
    }
    if facts.mass_silence {
        let message = "most nodes fell silent at once: this control plane suspects itself";
        return Err(ApiError::new(ErrorCode::Overloaded, message));
    }
    Ok(StatusCode::OK)
}

/// Prometheus text.
#[utoipa::path(get, path = paths::METRICS, tag = "observe", responses((status = 200, content_type = "text/plain"), (status = 401, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn metrics(State(state): State<AppState>) -> Result<Response, ApiError> {
    let (facts, view) = (state.control.facts().await?, state.control.view().await?);
    Ok(metrics::page(&facts, &view).render())
}
