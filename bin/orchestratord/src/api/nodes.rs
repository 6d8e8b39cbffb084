//! Nodes: register, heartbeat, deregister, list, drain, resume.

use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use daemon_kit::{ApiError, Caller, NodeBody, OwnNode, PathId, SizedNodeBody};
use pool_registry_types::node::{
    Heartbeat, HeartbeatAnswer, Intent, IntentAnswer, RegisterAnswer, RegisterRequest,
};
use pool_registry_types::view::{ClusterView, NodeView};
use pool_registry_types::{Epoch, ErrorBody, ErrorCode, NodeId, routes as paths};
use serde::Deserialize;
use task_scheduler::Registrar;
use utoipa::IntoParams;

use super::query::{Known, NoParameters};
use super::{checked, defect};
use crate::app::state::AppState;
use crate::services::report_shares;

fn require_cloud(state: &AppState) -> Result<(), ApiError> {
    if state.cloud_profile {
        return Ok(());
    }
    let message =
        "this control plane runs in the home profile: start it with ORCHESTRATORD_CLOUD_PROFILE=true";
    Err(ApiError::new(ErrorCode::CloudProfileDisabled, message))
}

/// Lists all nodes: what is observed of them and what they report.
///
/// At most 100 ms old.
#[utoipa::path(get, path = paths::NODES, tag = "nodes", responses((status = 200, body = ClusterView), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    caller: Caller,
    _: Known<NoParameters>,
) -> Result<Json<ClusterView>, ApiError> {
    let mut view = state.service_registry.view().await?.view();
    view.nodes.iter_mut().for_each(|node| show(&state, &caller, node));
    Ok(Json(view))
}

/// A client is shown its own attempts only, and nothing that quotes files or logs of the node: keys and
/// prompts of others may stand in them.
fn show(state: &AppState, caller: &Caller, node: &mut NodeView) {
    if caller.sees_all() {
        return;
    }
    state.control.published.show_own(caller.holder_id(), node);
    node.problems.clear();
    for supervised in node.pools.iter_mut().flat_map(|pool| &mut pool.report.supervised) {
        supervised.log_tail.clear();
    }
}

/// Registers a node, or registers it again; called by `pool-managerd`.
///
/// Idempotent.
#[utoipa::path(post, path = paths::NODE_REGISTER, tag = "nodes", request_body = RegisterRequest,
    responses((status = 200, body = RegisterAnswer), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 413, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn register(
    State(state): State<AppState>,
    caller: Caller,
    NodeBody(mut request): NodeBody<RegisterRequest>,
) -> Result<Json<RegisterAnswer>, ApiError> {
    require_cloud(&state)?;
    caller.authorize_node(&request.node_id)?;
    state
        .node_addresses
        .check(&request.address)
        .map_err(|why| ApiError::new(ErrorCode::InvalidParams, format!("address: {why}")))?;
    request.check()?;
    request.cut_texts();
    let node_id = request.node_id.clone();
    let bounded = caller.holder.as_ref().and_then(|holder| holder.max_nodes.map(|most| (holder, most)));
    let registrar = bounded.map(|(holder, max_nodes)| Registrar {
        name: holder.name.as_str().into(),
        max_nodes: usize::try_from(max_nodes).unwrap_or(usize::MAX),
    });
    let answer = state.control.register(request, registrar).await.inspect_err(|error| {
        tracing::warn!(%node_id, code = %error.code, reason = error.message, "a registration was refused");
    })?;
    tracing::info!(%node_id, epoch = %answer.epoch, "a node registered");
    state.expected.registered(&node_id);
    let life = state.relays.link.links().map(|links| links.life);
    Ok(Json(RegisterAnswer { life, ..answer }))
}

/// Takes the whole report of a node; called by `pool-managerd`.
#[utoipa::path(post, path = paths::NODE_HEARTBEAT, tag = "nodes", params(("node_id" = NodeId, Path)), request_body = Heartbeat,
    responses((status = 200, body = HeartbeatAnswer), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 413, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn heartbeat(
    State(state): State<AppState>,
    OwnNode(id): OwnNode,
    caller: Caller,
    SizedNodeBody(mut beat, body_bytes): SizedNodeBody<Heartbeat>,
) -> Result<Json<HeartbeatAnswer>, ApiError> {
    require_cloud(&state)?;
    beat.check()?;
    beat.cut_texts();
    let shares = &state.report_shares;
    let bounded = caller.holder.as_ref().filter(|holder| holder.max_nodes.is_some());
    let bytes = report_shares::cost(&beat, body_bytes);
    if let Some(holder) = bounded
        && shares.check(holder.id, &holder.name, &id, bytes).is_err()
    {
        // Some of its nodes may have gone.
        let cluster = state.service_registry.view().await?;
        shares.retain(holder.id, |id| cluster.has_node(id));
        shares.check(holder.id, &holder.name, &id, bytes)?;
    }
    let answer = state.control.heartbeat(id.clone(), beat).await?;
    if let Some(holder) = bounded {
        shares.set(holder.id, id, bytes);
    }
    Ok(Json(answer))
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Deregistration {
    /// The node's own registration; without it, whichever there is.
    #[param(value_type = Epoch, required = false)]
    epoch: Option<Epoch>,
    /// It is not expected to come again.
    #[serde(default)]
    forget: bool,
}

/// Deregisters a node.
///
/// With an old epoch nothing happens. The node stays expected (`llorch_node_expected`) unless it is forgotten,
/// which may be done to one that is not there too.
#[utoipa::path(delete, path = paths::NODE, tag = "nodes", params(("node_id" = NodeId, Path), Deregistration),
    responses((status = 204), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn deregister(
    State(state): State<AppState>,
    PathId(id): PathId<NodeId>,
    caller: Caller,
    query: Result<Query<Deregistration>, axum::extract::rejection::QueryRejection>,
) -> Result<StatusCode, ApiError> {
    require_cloud(&state)?;
    caller.may_send_away(&id)?;
    let Deregistration { epoch, forget } = checked(query)?;
    tracing::info!(node_id = %id, "a node is deregistered");
    // Whoever hangs up now has sent it away all the same.
    let done = owned_tasks::uninterrupted("deregistration", async move {
        state.control.deregister(id.clone(), epoch).await?;
        let is_there = async || Ok::<_, ErrorBody>(state.service_registry.view().await?.has_node(&id));
        // One that is there still, by a newer registration, is expected, also where that came meanwhile.
        if forget && !is_there().await? {
            state.expected.forget(&id).await?;
            if is_there().await? {
                state.expected.registered(&id);
            }
        }
        Ok::<_, ErrorBody>(())
    });
    done.await.map_err(|_| defect())??;
    Ok(StatusCode::NO_CONTENT)
}

/// Shows one node: what is observed of it and what it reports.
#[utoipa::path(get, path = paths::NODE, tag = "nodes", params(("node_id" = NodeId, Path)),
    responses((status = 200, body = NodeView), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn get(
    State(state): State<AppState>,
    PathId(id): PathId<NodeId>,
    caller: Caller,
) -> Result<Json<NodeView>, ApiError> {
    let mut node = state.service_registry.node(&id).await?;
    show(&state, &caller, &mut node);
    Ok(Json(node))
}

/// Drains a node: it takes no new work until it is resumed.
///
/// What runs there may finish.
#[utoipa::path(post, path = paths::NODE_DRAIN, tag = "nodes", params(("node_id" = NodeId, Path)),
    responses((status = 202, body = IntentAnswer), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn drain(
    State(state): State<AppState>,
    PathId(id): PathId<NodeId>,
) -> Result<(StatusCode, Json<IntentAnswer>), ApiError> {
    let answer = state.control.want(id.clone(), Intent::Draining).await?;
    tracing::info!(node_id = %id, "a node is drained");
    Ok((StatusCode::ACCEPTED, Json(answer)))
}

/// Resumes a drained node: it takes work again.
#[utoipa::path(post, path = paths::NODE_RESUME, tag = "nodes", params(("node_id" = NodeId, Path)),
    responses((status = 202, body = IntentAnswer), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn resume(
    State(state): State<AppState>,
    PathId(id): PathId<NodeId>,
) -> Result<(StatusCode, Json<IntentAnswer>), ApiError> {
    let answer = state.control.want(id.clone(), Intent::Serving).await?;
    tracing::info!(node_id = %id, "a node is resumed");
    Ok((StatusCode::ACCEPTED, Json(answer)))
}
