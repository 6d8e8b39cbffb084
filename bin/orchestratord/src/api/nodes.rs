//! Nodes: register, heartbeat, deregister, list.

use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use daemon_kit::{ApiError, Body, PathId};
use pool_registry_types::node::{Heartbeat, HeartbeatAnswer, RegisterAnswer, RegisterRequest};
use pool_registry_types::view::ClusterView;
use pool_registry_types::{Epoch, ErrorBody, ErrorCode, NodeId, routes as paths};
use serde::Deserialize;
use task_scheduler::{Answer, Event};
use utoipa::IntoParams;

use super::unexpected;
use crate::app::state::AppState;

fn require_cloud(state: &AppState) -> Result<(), ApiError> {
    if state.cloud_profile {
        return Ok(());
    }
    let message =
        "this control plane runs in the home profile: start it with ORCHESTRATORD_CLOUD_PROFILE=true";
    Err(ApiError::new(ErrorCode::CloudProfileDisabled, message))
}

/// All nodes: what is observed of them and what they report.
#[utoipa::path(get, path = paths::NODES, tag = "nodes", responses((status = 200, body = ClusterView), (status = 401, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn list(State(state): State<AppState>) -> Result<Json<ClusterView>, ApiError> {
    Ok(Json((*state.control.view().await?).clone()))
}

/// A node joins, or joins again. Idempotent.
#[utoipa::path(post, path = paths::NODE_REGISTER, tag = "nodes", request_body = RegisterRequest,
    responses((status = 200, body = RegisterAnswer), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 413, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn register(
    State(state): State<AppState>,
    Body(request): Body<RegisterRequest>,
) -> Result<Json<RegisterAnswer>, ApiError> {
    require_cloud(&state)?;
    check_address(&request.address)?;
    let node_id = request.node_id.clone();
    let answer = state.control.call(move |reply| Event::Register { reply, request }).await;
    match answer.inspect_err(|error| tracing::warn!(%node_id, code = %error.code, reason = error.message, "a registration was refused"))? {
        Answer::Registered(answer) => {
            tracing::info!(%node_id, epoch = %answer.epoch, "a node registered");
            Ok(Json(answer))
        }
        other => Err(unexpected(&other)),
    }
}

/// Where a node may be: a plain `http://host:port`.
fn check_address(address: &str) -> Result<(), ApiError> {
    let rest = address.strip_prefix("http://");
    let good = rest.is_some_and(|rest| {
        !rest.is_empty()
            && rest.len() <= 255
            && rest.bytes().all(|b| b.is_ascii_graphic() && !b"/@?#\\".contains(&b))
    });
    if good {
        Ok(())
    } else {
        Err(ApiError::new(ErrorCode::InvalidParams, "address: must be http://host:port"))
    }
}

/// A node's whole report.
#[utoipa::path(post, path = paths::NODE_HEARTBEAT, tag = "nodes", params(("id" = String, Path)), request_body = Heartbeat,
    responses((status = 200, body = HeartbeatAnswer), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 413, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn heartbeat(
    State(state): State<AppState>,
    PathId(id): PathId<NodeId>,
    Body(beat): Body<Heartbeat>,
) -> Result<Json<HeartbeatAnswer>, ApiError> {
    require_cloud(&state)?;
    let node_id = id;
    match state.control.call(move |reply| Event::Heartbeat { reply, node_id, beat }).await? {
        Answer::Heartbeat(answer) => Ok(Json(answer)),
        other => Err(unexpected(&other)),
    }
}

#[derive(Debug, Deserialize, IntoParams)]
pub(crate) struct Deregistration {
    /// The node's own registration; without it, whichever there is.
    #[param(value_type = Option<String>)]
    epoch: Option<Epoch>,
}

/// A node leaves. With an old epoch nothing happens.
#[utoipa::path(delete, path = paths::NODE, tag = "nodes", params(("id" = String, Path), Deregistration),
    responses((status = 204), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn deregister(
    State(state): State<AppState>,
    PathId(id): PathId<NodeId>,
    query: Result<Query<Deregistration>, axum::extract::rejection::QueryRejection>,
) -> Result<StatusCode, ApiError> {
    require_cloud(&state)?;
    let node_id = id;
    let Query(Deregistration { epoch }) =
        query.map_err(|error| ApiError::new(ErrorCode::InvalidParams, format!("epoch: {error}")))?;
    tracing::info!(%node_id, "a node is deregistered");
    match state.control.call(move |reply| Event::Deregister { reply, node_id, epoch }).await? {
        Answer::Deregistered => Ok(StatusCode::NO_CONTENT),
        other => Err(unexpected(&other)),
    }
}
