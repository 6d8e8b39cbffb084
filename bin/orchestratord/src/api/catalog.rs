//! The catalog: which models can be asked for, and where they are.

use axum::Json;
use axum::extract::State;
use daemon_kit::ApiError;
use pool_registry_types::view::Availability;
use pool_registry_types::{ErrorBody, routes as paths};

use crate::app::state::AppState;

/// The models of all ready pools on online nodes.
#[utoipa::path(get, path = paths::CATALOG_AVAILABILITY, tag = "catalog", responses((status = 200, body = Availability), (status = 401, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn availability(State(state): State<AppState>) -> Result<Json<Availability>, ApiError> {
    Ok(Json(state.control.view().await?.availability()))
}
