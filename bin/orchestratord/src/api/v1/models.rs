//! The list of models, as OpenAI's clients read it.

use axum::Json;
use axum::extract::{Path, State};
use daemon_kit::ApiError;
use serde::Serialize;
use utoipa::ToSchema;

use super::GatewayError;
use crate::app::state::AppState;
use crate::services::gateway::NamedModel;

const OWNER: &str = "llama-orch";

/// A model that can be asked for.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct GatewayModel {
    id: String,
    object: &'static str,
    /// When it was first seen here, seconds since 1970.
    created: i64,
    owned_by: &'static str,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct GatewayModels {
    object: &'static str,
    data: Vec<GatewayModel>,
}

fn shown(model: NamedModel) -> GatewayModel {
    GatewayModel { id: model.id, object: "model", created: model.created, owned_by: OWNER }
}

/// Lists the models that can be asked for, and their aliases.
#[utoipa::path(get, path = "/v1/models", tag = "openai", responses((status = 200, body = GatewayModels), (status = 401, body = GatewayError), (status = 503, body = GatewayError)))]
pub(crate) async fn list(State(state): State<AppState>) -> Result<Json<GatewayModels>, ApiError> {
    let cluster = state.service_registry.view().await?;
    let data = state.gateway.models(&cluster).into_iter().map(shown).collect();
    Ok(Json(GatewayModels { object: "list", data }))
}

/// Shows one model that can be asked for; its name may have slashes.
#[utoipa::path(get, path = "/v1/models/{*model}", tag = "openai", params(("model" = String, Path)),
    responses((status = 200, body = GatewayModel), (status = 401, body = GatewayError), (status = 404, body = GatewayError), (status = 503, body = GatewayError)))]
pub(crate) async fn get(
    State(state): State<AppState>,
    Path(name): Path<String>,
) -> Result<Json<GatewayModel>, ApiError> {
    let cluster = state.service_registry.view().await?;
    let found = state.gateway.models(&cluster).into_iter().find(|model| model.id == name);
    let unknown = || ApiError::from(state.gateway.unknown_model(&cluster, &name));
    found.map(|model| Json(shown(model))).ok_or_else(unknown)
}
