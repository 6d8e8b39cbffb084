//! Probes, metrics, and what changes in the cluster.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::body::Body as HttpBody;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use daemon_kit::{ApiError, Caller};
use pool_registry_types::node::Liveness;
use pool_registry_types::sse::{write_comment, write_frame};
use pool_registry_types::view::NodeView;
use pool_registry_types::{ErrorBody, ErrorCode, NodeId, routes as paths};
use reqwest::Url;
use serde::Serialize;
use utoipa::ToSchema;

use super::UNBUFFERED;
use super::query::{Known, NoParameters};
use crate::app::state::AppState;
use crate::metrics;
use crate::services::followers::Update;

/// Says that the process answers.
#[utoipa::path(get, path = paths::HEALTH_LIVE, tag = "observe", responses((status = 200)))]
pub(crate) async fn live() -> StatusCode {
    StatusCode::OK
}

/// Says whether new tasks are taken.
#[utoipa::path(get, path = paths::HEALTH_READY, tag = "observe", responses((status = 200), (status = 503, body = ErrorBody)))]
pub(crate) async fn ready(State(state): State<AppState>) -> Result<StatusCode, ApiError> {
    let facts = state.control.published.facts().await?;
    if facts.draining {
        return Err(ApiError::new(ErrorCode::Draining, "the control plane is shutting down"));
    }
    if let Some(problem) = state.loops.problem() {
        return Err(ApiError::new(ErrorCode::Overloaded, problem));
    }
    if facts.mass_silence {
        let message = "most nodes fell silent at once: this control plane suspects itself";
        return Err(ApiError::new(ErrorCode::Overloaded, message));
    }
    Ok(StatusCode::OK)
}

/// Shows the metrics as Prometheus text.
///
/// At most 100 ms old.
#[utoipa::path(get, path = paths::METRICS, tag = "observe", responses((status = 200, content_type = "text/plain"), (status = 401, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn metrics(State(state): State<AppState>) -> Result<Response, ApiError> {
    let (facts, paces) = (state.control.published.facts().await?, state.control.published.paces().await?);
    let view = state.service_registry.view().await?;
    let links = state.relays.link.links().map(|links| &*links.table);
    let backlog = state.control.published.backlog().await?;
    let mut page = metrics::page(&facts, &paces, &view, links, (&state.relays.measured, &backlog));
    let held_answers = state.relays.held_answers.held();
    metrics::held(&mut page, state.bodies.clients.held(), state.streams.live_bytes(), held_answers);
    if state.cloud_profile {
        metrics::expected(&mut page, &state.expected.all());
    }
    page.expiries(state.certificate.as_deref(), &state.tokens);
    page.edge(&state.calls, &state.connections);
    Ok(page.render(env!("CARGO_PKG_VERSION")).await)
}

/// Nodes to scrape, as Prometheus' `http_sd` has them.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Targets {
    /// A host with its port.
    targets: [String; 1],
    labels: TargetLabels,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TargetLabels {
    #[serde(rename = "__scheme__")]
    scheme: String,
    #[serde(rename = "__metrics_path__")]
    path: String,
    /// For relabelling: the node's own series have its id.
    #[serde(rename = "__meta_llorch_node_id")]
    node_id: NodeId,
    #[serde(rename = "__meta_llorch_liveness")]
    liveness: Liveness,
}

impl Targets {
    /// Nothing for an address that is none.
    fn of(node: &NodeView) -> Option<Self> {
        let url = Url::parse(&node.address).ok()?;
        let (host, port) = (url.host_str()?, url.port_or_known_default()?);
        let labels = TargetLabels {
            scheme: url.scheme().to_owned(),
            path: format!("{}{}", url.path().trim_end_matches('/'), paths::METRICS),
            node_id: node.node_id.clone(),
            liveness: node.liveness,
        };
        Some(Self { targets: [format!("{host}:{port}")], labels })
    }
}

/// Lists the nodes for Prometheus (`http_sd`).
///
/// Those too that are not online: they are down there as well.
#[utoipa::path(get, path = paths::TARGETS, tag = "observe", responses((status = 200, body = Vec<Targets>), (status = 401, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn targets(
    State(state): State<AppState>,
    _: Known<NoParameters>,
) -> Result<Json<Vec<Targets>>, ApiError> {
    let cluster = state.service_registry.view().await?;
    let dialled = cluster.nodes().filter(|_| state.cloud_profile);
    Ok(Json(dialled.filter_map(|(node, _)| Targets::of(node)).collect()))
}

/// Pause between two comments on a quiet stream.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(10);

/// Streams the changes of nodes, pools and tasks as they happen from now on.
///
/// A client hears of its own tasks only. Whoever reads too slowly is told with an event `missed` how many of those were lost, and looks at the
/// lists again. Ends with the token.
#[utoipa::path(get, path = paths::EVENTS, tag = "observe", responses((status = 200, content_type = "text/event-stream"), (status = 401, body = ErrorBody)))]
pub(crate) async fn events(State(state): State<AppState>, caller: Caller) -> Response {
    let only = (!caller.sees_all()).then(|| caller.holder_id());
    let following = (state.control.follow(only), state.tokens.clone(), caller);
    let stream = futures::stream::unfold(following, |(mut changes, tokens, caller)| async move {
        if !tokens.still_admit(&caller) {
            return None;
        }
        let update = tokio::time::timeout(KEEP_ALIVE_EVERY, changes.next()).await;
        if !tokens.still_admit(&caller) {
            return None;
        }
        let mut out = Vec::with_capacity(256);
        match update {
            Ok(Some(Update::Change(change))) => {
                let data = serde_json::to_string(&change).unwrap_or_default();
                write_frame(&mut out, None, change.name(), &data);
            }
            Ok(Some(Update::Missed(missed))) => {
                write_frame(&mut out, None, "missed", &format!("{{\"changes\":{missed}}}"));
            }
            Ok(None) => return None,
            Err(_) => write_comment(&mut out, "ka"),
        }
        Some((Ok::<_, Infallible>(Bytes::from(out)), (changes, tokens, caller)))
    });
    let kind = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store"), UNBUFFERED];
    (StatusCode::OK, kind, HttpBody::from_stream(stream)).into_response()
}
