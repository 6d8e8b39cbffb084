//! The catalog: which models can be asked for, where they are, and what operators say of them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use daemon_kit::{ApiError, Body, PathId};
use pool_registry_types::view::CatalogAvailability;
use pool_registry_types::{Digest, ErrorBody, ErrorCode, ModelRef, routes as paths};
use serde::{Deserialize, Serialize};
use task_scheduler::Event;
use utoipa::ToSchema;

use super::query::{Known, NoParameters};
use super::{defect, on_disk};
use crate::app::state::AppState;
use crate::services::catalog::{Catalog, ModelEntry, ModelState, Verification};

/// Longest description, characters.
const MAX_DESCRIPTION_CHARS: usize = 4096;

/// Lists the models of all ready pools on online nodes, and those that lie on disks.
#[utoipa::path(get, path = paths::CATALOG_AVAILABILITY, tag = "catalog", responses((status = 200, body = CatalogAvailability), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn availability(
    State(state): State<AppState>,
    _: Known<NoParameters>,
) -> Result<Json<CatalogAvailability>, ApiError> {
    Ok(Json(state.service_registry.view().await?.availability()))
}

/// A new entry, or one that replaces another.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewModel {
    model_id: ModelRef,
    /// What the model's file must be.
    #[serde(default)]
    digest: Option<Digest>,
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    state: ModelState,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelList {
    models: Vec<ModelEntry>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewState {
    state: ModelState,
}

/// Puts an entry of a model into the catalog.
///
/// 201 for a new entry, 200 for one that replaces another.
#[utoipa::path(post, path = paths::CATALOG_MODELS, tag = "catalog", request_body = NewModel,
    responses((status = 201, body = ModelEntry), (status = 200, body = ModelEntry), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 413, body = ErrorBody), (status = 503, body = ErrorBody), (status = 500, body = ErrorBody)))]
pub(crate) async fn create(
    State(state): State<AppState>,
    Body(new): Body<NewModel>,
) -> Result<(StatusCode, Json<ModelEntry>), ApiError> {
    let NewModel { model_id, digest, description, state: model_state } = new;
    if description.as_ref().is_some_and(|text| text.chars().count() > MAX_DESCRIPTION_CHARS) {
        let message = format!("description: at most {MAX_DESCRIPTION_CHARS} characters");
        return Err(ApiError::new(ErrorCode::InvalidParams, message));
    }
    let entry = ModelEntry { model_id, digest, description, state: model_state };
    let kept = entry.clone();
    let new = change(&state, move |catalog| {
        let changed = (kept.model_id.clone(), Some(kept.state));
        Ok((catalog.put(kept)?, changed))
    });
    let new = new.await?;
    Ok((if new { StatusCode::CREATED } else { StatusCode::OK }, Json(entry)))
}

/// Changes the catalog and lets the control loop know which model may be placed or not any more, and
/// which has no entry any more: one after the other, and to the end, also when whoever asked has gone.
async fn change<T: Send + 'static>(
    state: &AppState,
    work: impl FnOnce(&Catalog) -> Result<(T, (ModelRef, Option<ModelState>)), ErrorBody> + Send + 'static,
) -> Result<T, ApiError> {
    let (catalog, control) = (Arc::clone(&state.catalog), state.control.clone());
    let (order, aliased) = (Arc::clone(&state.catalog_order), state.gateway.names());
    let changing = owned_tasks::uninterrupted("change of the catalog", async move {
        let _one = order.lock().await;
        let (result, (model, now)) = on_disk(move || work(&catalog)).await?;
        let named = now.is_some() || aliased.contains(&model);
        control.send(Event::SetNamed { model: model.clone(), named }).await;
        control.send(Event::SetRetired { model, retired: now == Some(ModelState::Retired) }).await;
        Ok(result)
    });
    changing.await.unwrap_or_else(|_| Err(defect()))
}

/// Lists all entries of the catalog.
#[utoipa::path(get, path = paths::CATALOG_MODELS, tag = "catalog", responses((status = 200, body = ModelList), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody)))]
pub(crate) async fn list(State(state): State<AppState>, _: Known<NoParameters>) -> Json<ModelList> {
    Json(ModelList { models: state.catalog.list() })
}

/// Shows one entry of the catalog.
#[utoipa::path(get, path = paths::CATALOG_MODEL, tag = "catalog", params(("model_id" = ModelRef, Path)),
    responses((status = 200, body = ModelEntry), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub(crate) async fn get(
    State(state): State<AppState>,
    PathId(id): PathId<ModelRef>,
) -> Result<Json<ModelEntry>, ApiError> {
    Ok(Json(state.catalog.get(&id)?))
}

/// Removes an entry of the catalog.
///
/// The model itself stays where it is, and may be placed.
#[utoipa::path(delete, path = paths::CATALOG_MODEL, tag = "catalog", params(("model_id" = ModelRef, Path)),
    responses((status = 204), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 500, body = ErrorBody)))]
pub(crate) async fn delete(
    State(state): State<AppState>,
    PathId(id): PathId<ModelRef>,
) -> Result<StatusCode, ApiError> {
    change(&state, move |catalog| Ok((catalog.remove(&id)?, (id, None)))).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Compares the digest of a model's entry with what each node has on disk.
#[utoipa::path(post, path = paths::CATALOG_MODEL_VERIFY, tag = "catalog", params(("model_id" = ModelRef, Path)),
    responses((status = 200, body = Verification), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn verify(
    State(state): State<AppState>,
    PathId(id): PathId<ModelRef>,
) -> Result<Json<Verification>, ApiError> {
    let view = state.service_registry.view().await?;
    Ok(Json(state.catalog.verify(&id, &view)?))
}

/// Retires a model, or takes it up again.
///
/// A retired model gets no task any more; those that wait for it end.
#[utoipa::path(post, path = paths::CATALOG_MODEL_STATE, tag = "catalog", params(("model_id" = ModelRef, Path)), request_body = NewState,
    responses((status = 200, body = ModelEntry), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 413, body = ErrorBody), (status = 500, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn set_state(
    State(state): State<AppState>,
    PathId(id): PathId<ModelRef>,
    Body(new): Body<NewState>,
) -> Result<Json<ModelEntry>, ApiError> {
    let entry =
        change(&state, move |catalog| Ok((catalog.set_state(&id, new.state)?, (id, Some(new.state)))));
    Ok(Json(entry.await?))
}
