//! The node's HTTP API: probes, pools, and the hop on which attempts run.

use std::collections::BTreeMap;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Query, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use daemon_kit::auth::Need;
use daemon_kit::correlation::RequestIds;
use daemon_kit::tokens::Scope;
use daemon_kit::{ApiError, Body, PathId, WrappedBody, stream_body};
use node_agent::Retention;
use pool_registry_types::node::{GpuReport, Intent, IntentOrder, LiveAnswer, StagedModel};
use pool_registry_types::pool::{PoolDrain, PoolOrdered, PoolPurge, PoolReload, PoolReport};
use pool_registry_types::routes::headers;
use pool_registry_types::task::InferRequest;
use pool_registry_types::{ErrorBody, ErrorCode, PoolId, routes as paths};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, OpenApi, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::metrics;
use crate::state::AppState;

/// What each route needs. Only the control plane and operators call a node.
pub(crate) fn needs(_: &Method, path: &str) -> Need {
    match path {
        paths::METRICS => Need::Any,
        paths::LOG_LEVEL => Need::Scope(Scope::Admin),
        _ => Need::Scope(Scope::Control),
    }
}

/// Whether a request is for a link or for an attempt's stream, by its method and path.
pub(crate) fn is_stream(method: &Method, path: &str) -> bool {
    let is_attempt = path.starts_with(paths::POOLS) && path.ends_with("/infer");
    match *method {
        Method::GET => path == paths::LINK,
        Method::POST => is_attempt || path.starts_with(paths::ATTEMPTS),
        _ => false,
    }
}

/// The second listener: the metrics and the probes.
pub(crate) fn open_router(node: AppState) -> Router {
    Router::new()
        .route(paths::METRICS, get(metrics))
        .route(paths::HEALTH_LIVE, get(live))
        .route(paths::HEALTH_READY, get(ready))
        .with_state(node)
}

#[derive(OpenApi)]
#[openapi(info(
    title = "pool-managerd",
    description = "One node of the cluster. Everything but /health/* needs the bearer token."
))]
struct Document;

pub(crate) fn router(node: AppState) -> Router {
    parts().0.with_state(node)
}

/// The OpenAPI document of what is served, as JSON.
pub(crate) fn document() -> String {
    let document = serde_json::to_value(parts().1).expect("the document is always JSON");
    format!("{:#}", daemon_kit::document::finish(document, needs))
}

fn parts() -> (Router<AppState>, utoipa::openapi::OpenApi) {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(live))
        .routes(routes!(ready))
        .routes(routes!(metrics))
        .routes(routes!(pools))
        .routes(routes!(status))
        .routes(routes!(infer))
        .routes(routes!(crate::link::link))
        .routes(routes!(crate::link::starts))
        .routes(routes!(crate::link::start))
        .routes(routes!(crate::link::control))
        .routes(routes!(crate::slotless::pass))
        .routes(routes!(drain))
        .routes(routes!(reload))
        .routes(routes!(purge))
        .routes(routes!(load))
        .routes(routes!(crate::logs::logs))
        .routes(routes!(intent))
        .routes(routes!(models))
        .routes(routes!(daemon_kit::log_level::put_log_level))
        .split_for_parts()
}

/// Who answers here.
#[utoipa::path(get, path = paths::HEALTH_LIVE, responses((status = 200, body = LiveAnswer)))]
async fn live(State(node): State<AppState>) -> Json<LiveAnswer> {
    let identity = node.agent.identity();
    Json(LiveAnswer { node_id: identity.node_id, boot_id: identity.boot_id })
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ReadyQuery {
    /// Leaves out what the control plane takes the node for.
    #[serde(default)]
    local: bool,
}

/// Whether the node is part of the cluster and gets its tasks, and looks after all that it should.
#[utoipa::path(get, path = paths::HEALTH_READY, params(ReadyQuery),
    responses((status = 200), (status = 400, body = ErrorBody), (status = 503, body = ErrorBody)))]
async fn ready(
    State(node): State<AppState>,
    asked: Result<Query<ReadyQuery>, QueryRejection>,
) -> Result<StatusCode, ApiError> {
    let Query(asked) = asked.map_err(|bad| ApiError::new(ErrorCode::InvalidParams, bad.body_text()))?;
    if let Some(problem) = node.agent.loops().problem() {
        return Err(ApiError::new(ErrorCode::PoolUnready, problem));
    }
    match node.agent.session_problem().filter(|_| !node.alone && !asked.local) {
        None => Ok(StatusCode::OK),
        Some(problem) => {
            Err(ApiError::new(ErrorCode::PoolUnready, format!("not part of the cluster: {problem}")))
        }
    }
}

/// Prometheus text.
#[utoipa::path(get, path = paths::METRICS, responses((status = 200, content_type = "text/plain"), (status = 401, body = ErrorBody)))]
async fn metrics(State(node): State<AppState>) -> Response {
    let mut page = metrics::page(&node.agent);
    page.expiries(node.certificate.as_deref(), &node.tokens);
    page.edge(&node.calls, &node.connections);
    page.render(env!("CARGO_PKG_VERSION")).await
}

/// What runs on the node.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct NodePools {
    pools: Vec<PoolReport>,
    gpus: Vec<GpuReport>,
    /// Whether the node takes work.
    intent: Intent,
    /// Handoff files that bind nothing, and why.
    handoff_problems: BTreeMap<String, String>,
    /// Why the file of pools is not taken as it stands; what it said before holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pools_file_problem: Option<String>,
}

#[utoipa::path(get, path = paths::POOLS, responses((status = 200, body = NodePools), (status = 401, body = ErrorBody)))]
async fn pools(State(node): State<AppState>) -> Json<NodePools> {
    Json(NodePools {
        pools: node.agent.pools(),
        gpus: node.agent.gpus(),
        intent: node.agent.intent(),
        handoff_problems: node.agent.problems(),
        pools_file_problem: node.agent.pools_file_problem(),
    })
}

/// One pool.
#[utoipa::path(get, path = paths::POOL_STATUS, params(("pool_id" = PoolId, Path)),
    responses((status = 200, body = PoolReport), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody)))]
async fn status(
    State(node): State<AppState>,
    PathId(id): PathId<PoolId>,
) -> Result<Json<PoolReport>, ApiError> {
    let pool = node.agent.pools().into_iter().find(|pool| pool.pool_id == id);
    pool.map(Json).ok_or_else(|| ApiError::new(ErrorCode::NotFound, format!("no pool {id} on this node")))
}

type Ordered = Result<(StatusCode, Json<PoolOrdered>), ApiError>;

/// No new work on the pool; what runs may finish until the deadline.
#[utoipa::path(post, path = paths::POOL_DRAIN, params(("pool_id" = PoolId, Path)), request_body = PoolDrain,
    responses((status = 202, body = PoolOrdered), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 413, body = ErrorBody)))]
async fn drain(
    State(node): State<AppState>,
    PathId(id): PathId<PoolId>,
    Body(drain): Body<PoolDrain>,
) -> Ordered {
    drain.check()?;
    Ok((StatusCode::ACCEPTED, Json(node.own.order_drain(&id, drain)?)))
}

/// The pool takes work again.
#[utoipa::path(post, path = paths::POOL_RELOAD, params(("pool_id" = PoolId, Path)), request_body = PoolReload,
    responses((status = 202, body = PoolOrdered), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 413, body = ErrorBody)))]
async fn reload(
    State(node): State<AppState>,
    PathId(id): PathId<PoolId>,
    Body(reload): Body<PoolReload>,
) -> Ordered {
    Ok((StatusCode::ACCEPTED, Json(node.own.order_reload(&id, &reload).await?)))
}

/// Ends the engines that this node has started, and removes what is named.
#[utoipa::path(post, path = paths::POOL_PURGE, params(("pool_id" = PoolId, Path)), request_body = PoolPurge,
    responses((status = 202, body = PoolOrdered), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 413, body = ErrorBody), (status = 503, body = ErrorBody)))]
async fn purge(
    State(node): State<AppState>,
    PathId(id): PathId<PoolId>,
    Body(purge): Body<PoolPurge>,
) -> Ordered {
    Ok((StatusCode::ACCEPTED, Json(node.own.order_purge(&id, purge)?)))
}

/// A task waits for a pool that is `loadable`: its engines are started, and others make room.
#[utoipa::path(post, path = paths::POOL_LOAD, params(("pool_id" = PoolId, Path)),
    responses((status = 202, body = PoolOrdered), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 503, body = ErrorBody)))]
async fn load(State(node): State<AppState>, PathId(id): PathId<PoolId>) -> Ordered {
    Ok((StatusCode::ACCEPTED, Json(node.own.order_load(&id)?)))
}

/// What the operator wants of this node from now on; written down when the answer comes.
#[utoipa::path(post, path = paths::INTENT, request_body = IntentOrder,
    responses((status = 204), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 409, body = ErrorBody), (status = 413, body = ErrorBody), (status = 500, body = ErrorBody)))]
async fn intent(
    State(node): State<AppState>,
    Body(order): Body<IntentOrder>,
) -> Result<StatusCode, ApiError> {
    match node.agent.take_intent(order).await {
        Ok(true) => Ok(StatusCode::NO_CONTENT),
        Ok(false) => Err(ApiError::new(ErrorCode::WrongNode, "epoch: not the registration that holds")),
        Err(error) => {
            tracing::error!(%error, "the intent cannot be written down, and is not taken");
            Err(ApiError::new(ErrorCode::Internal, "the intent cannot be written down, see the node's log"))
        }
    }
}

/// The models on this node's disk.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct NodeModels {
    models: Vec<StagedModel>,
}

#[utoipa::path(get, path = paths::MODELS, responses((status = 200, body = NodeModels), (status = 401, body = ErrorBody)))]
async fn models(State(node): State<AppState>) -> Json<NodeModels> {
    Json(NodeModels { models: node.agent.models() })
}

/// Runs an attempt: 200 when its slot is taken, then its frames.
#[utoipa::path(post, path = paths::POOL_INFER, params(("pool_id" = PoolId, Path)), request_body = InferRequest,
    responses((status = 200, content_type = "text/event-stream"), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
              (status = 409, body = ErrorBody), (status = 413, body = ErrorBody), (status = 503, body = ErrorBody)))]
async fn infer(
    State(node): State<AppState>,
    PathId(id): PathId<PoolId>,
    Extension(ids): Extension<RequestIds>,
    body: WrappedBody<InferRequest>,
) -> Result<Response, ApiError> {
    let pool_id = id;
    let trace = ids.trace();
    let inference = node.agent.infer(&pool_id, body.value, body.bytes, Retention::Attached, Some(&trace))?;
    let body = stream_body(inference.reader.into_exchange()).await;
    let mut response = (StatusCode::OK, body).into_response();
    let map = response.headers_mut();
    map.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    map.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    map.insert(HeaderName::from_static(headers::REPORT_SEQ), HeaderValue::from(inference.report_seq));
    if let Ok(replica) = HeaderValue::from_str(inference.replica_id.as_str()) {
        map.insert(HeaderName::from_static(headers::REPLICA_ID), replica);
    }
    Ok(response)
}
