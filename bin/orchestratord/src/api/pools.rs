//! Pools: list, health, and the orders that are handed over to their node.

use std::time::Duration;

use axum::Json;
use axum::body::Body as HttpBody;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use daemon_kit::connections::PeerEnd;
use daemon_kit::correlation::RequestIds;
use daemon_kit::{ApiError, Body, Caller, PathId};
use futures::StreamExt;
use pool_registry_types::pool::{PoolDrain, PoolOrdered, PoolPurge, PoolReload};
use pool_registry_types::view::{PoolList, PoolOfNode};
use pool_registry_types::{ErrorBody, NodeId, PoolId, ReplicaId, routes as paths};
use serde::Deserialize;
use utoipa::IntoParams;

use super::query::{Known, NoParameters};
use super::{UNBUFFERED, checked, departs_at_its_end};
use crate::app::state::AppState;
use crate::services::link::PoolOrder;

/// Pause between two looks at the token of whoever follows a log.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Which of several pools of one name.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct OnNode {
    /// Needed where several nodes have a pool of this name.
    #[param(value_type = NodeId, required = false)]
    node_id: Option<NodeId>,
}

type NodeQuery = Result<Query<OnNode>, QueryRejection>;
type Ordered = Result<(StatusCode, Json<PoolOrdered>), ApiError>;

/// Lists all pools of all nodes.
///
/// At most 100 ms old.
#[utoipa::path(get, path = paths::POOLS, tag = "pools", responses((status = 200, body = PoolList), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    caller: Caller,
    _: Known<NoParameters>,
) -> Result<Json<PoolList>, ApiError> {
    let view = state.service_registry.view().await?;
    let mut list = PoolList { pools: view.pools().collect(), problems: Vec::new() };
    // They quote files in which keys may stand.
    if caller.sees_all() {
        list.problems.extend(view.problems());
    }
    Ok(Json(list))
}

/// Shows whether one pool takes tasks, and why not.
#[utoipa::path(get, path = paths::POOL_HEALTH, tag = "pools", params(("pool_id" = PoolId, Path), OnNode),
    responses((status = 200, body = PoolOfNode), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn health(
    State(state): State<AppState>,
    PathId(id): PathId<PoolId>,
    query: NodeQuery,
) -> Result<Json<PoolOfNode>, ApiError> {
    let OnNode { node_id } = checked(query)?;
    Ok(Json(state.service_registry.pool(&id, node_id.as_ref()).await?.0))
}

async fn order(
    state: &AppState,
    id: PoolId,
    query: NodeQuery,
    ids: &RequestIds,
    order: PoolOrder,
) -> Ordered {
    let OnNode { node_id } = checked(query)?;
    let (pool, address) = state.service_registry.pool(&id, node_id.as_ref()).await?;
    let ordered = state.relays.link.order_pool(&address, &id, &order, Some(&ids.trace())).await.map_err(
        |mut error| {
            error.node_id.get_or_insert(pool.node_id.clone());
            error
        },
    )?;
    tracing::info!(node_id = %pool.node_id, pool_id = %id, ?order, "a pool was given an order");
    Ok((StatusCode::ACCEPTED, Json(ordered)))
}

/// Drains a pool: it takes no new work until it is reloaded.
///
/// What runs may finish until the deadline.
#[utoipa::path(post, path = paths::POOL_DRAIN, tag = "pools", params(("pool_id" = PoolId, Path), OnNode), request_body = PoolDrain,
    responses((status = 202, body = PoolOrdered), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 413, body = ErrorBody), (status = 503, body = ErrorBody), (status = 500, body = ErrorBody)))]
pub(crate) async fn drain(
    State(state): State<AppState>,
    PathId(id): PathId<PoolId>,
    query: NodeQuery,
    Extension(ids): Extension<RequestIds>,
    Body(drain): Body<PoolDrain>,
) -> Ordered {
    drain.check()?;
    order(&state, id, query, &ids, PoolOrder::Drain(drain)).await
}

/// Reloads a pool: it takes work again, with another model where one is named.
///
/// Another model is for pools whose engines their node has started.
#[utoipa::path(post, path = paths::POOL_RELOAD, tag = "pools", params(("pool_id" = PoolId, Path), OnNode), request_body = PoolReload,
    responses((status = 202, body = PoolOrdered), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 413, body = ErrorBody), (status = 503, body = ErrorBody), (status = 500, body = ErrorBody)))]
pub(crate) async fn reload(
    State(state): State<AppState>,
    PathId(id): PathId<PoolId>,
    query: NodeQuery,
    Extension(ids): Extension<RequestIds>,
    Body(reload): Body<PoolReload>,
) -> Ordered {
    reload.check()?;
    order(&state, id, query, &ids, PoolOrder::Reload(reload)).await
}

/// Purges a pool: its engines end, and what is named is removed.
///
/// Of pools whose engines their node has started.
#[utoipa::path(post, path = paths::POOL_PURGE, tag = "pools", params(("pool_id" = PoolId, Path), OnNode), request_body = PoolPurge,
    responses((status = 202, body = PoolOrdered), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 413, body = ErrorBody), (status = 503, body = ErrorBody), (status = 500, body = ErrorBody)))]
pub(crate) async fn purge(
    State(state): State<AppState>,
    PathId(id): PathId<PoolId>,
    query: NodeQuery,
    Extension(ids): Extension<RequestIds>,
    Body(purge): Body<PoolPurge>,
) -> Ordered {
    order(&state, id, query, &ids, PoolOrder::Purge(purge)).await
}

/// Which log.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Log {
    /// Needed where several nodes have a pool of this name.
    #[param(value_type = NodeId, required = false)]
    node_id: Option<NodeId>,
    /// Needed where the pool has several replicas.
    #[param(value_type = ReplicaId, required = false)]
    replica_id: Option<ReplicaId>,
    /// Goes on until whoever asked goes away.
    #[serde(default)]
    follow: bool,
}

/// Shows what an engine of a pool has written last, as its node has it.
///
/// A log that is followed ends with the token.
#[utoipa::path(get, path = paths::POOL_LOGS, tag = "pools", params(("pool_id" = PoolId, Path), Log),
    responses((status = 200, content_type = "text/plain"), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn logs(
    State(state): State<AppState>,
    PathId(id): PathId<PoolId>,
    caller: Caller,
    end: Option<Extension<PeerEnd>>,
    query: Result<Query<Log>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Log { node_id, replica_id, follow } = checked(query)?;
    // An engine may write nothing for days, and its node stand still: nothing else shows that the reader is gone.
    departs_at_its_end(end.as_deref());
    let (pool, address) = state.service_registry.pool(&id, node_id.as_ref()).await?;
    let pieces = state.relays.link.pool_logs(&address, &id, replica_id.as_ref(), follow).await;
    let pieces = pieces.map_err(|mut error| {
        error.node_id.get_or_insert(pool.node_id);
        error
    })?;
    let following = (pieces, state.tokens.clone(), caller);
    let stream = futures::stream::unfold(following, |(mut pieces, tokens, caller)| async move {
        while tokens.still_admit(&caller) {
            // A piece that comes late is not lost.
            if let Ok(piece) = tokio::time::timeout(LOOK_EVERY, pieces.next()).await {
                let piece = piece?.map_err(|broken| std::io::Error::other(broken.to_string()));
                return Some((piece, (pieces, tokens, caller)));
            }
        }
        None
    });
    let kind = [
        (header::CONTENT_TYPE, "text/plain; charset=utf-8"),
        (header::CACHE_CONTROL, "no-store"),
        UNBUFFERED,
    ];
    Ok((StatusCode::OK, kind, HttpBody::from_stream(stream)).into_response())
}
