//! Requests that take no slot: they are no tasks, wait in no queue and count against no quota of tasks. A
//! node with the model is asked, and another one where that has no answer.

use std::time::{Duration, Instant};

use axum::body::Body;
use axum::response::Response;
use daemon_kit::ApiError;
use pool_registry_types::node::Liveness;
use pool_registry_types::routes::headers;
use pool_registry_types::snapshot::ClusterSnapshot;
use pool_registry_types::{ErrorBody, ErrorCode, ModelRef, NodeId};
use span_export::{Asked, id_of};
use task_stream::{OpenAiRoute, PassedHead, PayloadFormat, SlotlessRequest};
use uuid::Uuid;

use super::answer::{failed, passed};
use super::request::{Call, admit};
use crate::api::defect;
use crate::app::state::AppState;
use crate::services::gateway::Gateway;

/// Nodes that are asked at most.
const TRIES: usize = 3;
/// Longest wait for the answer, unless the client says another one.
const WITHIN: Duration = Duration::from_secs(60);
/// When a client may come again for which no node had a place, milliseconds.
const RETRY_AFTER_MS: u64 = 1_000;

pub(super) async fn answer(state: &AppState, route: OpenAiRoute, call: Call) -> Result<Response, ApiError> {
    let admitted = admit(state, route, call).await?;
    let PayloadFormat::OpenAi(passage) = admitted.payload.format else { return Err(defect()) };
    let (id, model, body) = (admitted.spec.task_id, admitted.spec.model_ref, admitted.payload.bytes);
    let within = admitted.spec.deadline_ms.map_or(WITHIN, Duration::from_millis);
    let begun = Instant::now();
    let cluster = state.service_registry.view().await?;
    let request = SlotlessRequest { model, passage: *passage };
    let outcome = match nodes(&state.gateway, &cluster, &request.model, route) {
        Ok(nodes) => {
            // Each is asked first as often as another.
            let first = usize::try_from(Uuid::new_v4().as_u64_pair().0 % nodes.len() as u64).unwrap_or(0);
            let order = (0..TRIES.max(nodes.len())).map(|n| &nodes[(first + n) % nodes.len()]).take(TRIES);
            let mut last = Err(ErrorBody::new(ErrorCode::PoolUnavailable, "no node was asked"));
            for (node_id, address) in order {
                let Some(left) = within.checked_sub(begun.elapsed()) else {
                    let message = format!("no answer within {} ms", within.as_millis());
                    last = Err(ErrorBody::new(ErrorCode::DeadlineExceeded, message));
                    break;
                };
                let span = Asked::of(&admitted.spec.trace, "attempt");
                let span_id = span.id().unwrap_or_else(|| id_of(Uuid::new_v4()));
                let trace = admitted.spec.trace.child(span_id);
                let asked = state.relays.link.pass_slotless(address, &request, &body, &trace, left).await;
                span.answered(asked.as_ref().err().map(|error| error.code.as_str()), |span| {
                    let span = span.with("llorch.node_id", node_id.to_string());
                    span.with("gen_ai.request.model", request.model.to_string())
                });
                last = asked.map(|(head, bytes)| (PassedHead { head, node_id: node_id.clone() }, bytes));
                if last.as_ref().map_or_else(is_final, |_| true) {
                    break;
                }
            }
            last.map_err(shown)
        }
        Err(error) => Err(error),
    };
    drop(admitted.held);
    let mut response = match outcome {
        Ok((head, bytes)) => passed(&head, id, Body::from(bytes)),
        Err(error) => failed(error, id, None),
    };
    // It names a request and no task.
    response.headers_mut().remove(headers::TASK_ID);
    Ok(response)
}

/// Whether another node would say so too.
fn is_final(error: &ErrorBody) -> bool {
    use ErrorCode::{ContextTooLong, InvalidParams, PayloadTooLarge};
    matches!(error.code, InvalidParams | ContextTooLong | PayloadTooLarge)
}

/// What a client is told of the last node's word.
fn shown(error: ErrorBody) -> ErrorBody {
    match error.code {
        ErrorCode::ReplicaExhausted => {
            let message = "as many requests of this kind run as may at once";
            ErrorBody::new(ErrorCode::Overloaded, message).retry_after_ms(RETRY_AFTER_MS)
        }
        ErrorCode::Unsupported | ErrorCode::DecodeTimeout | ErrorCode::DeadlineExceeded => error,
        _ if is_final(&error) => error,
        _ => ErrorBody::new(ErrorCode::PoolUnavailable, error.message).retry_after_ms(RETRY_AFTER_MS),
    }
}

/// The nodes that can be asked, with their addresses. Errors: `MODEL_NOT_AVAILABLE`, `UNSUPPORTED` and
/// `POOL_UNREADY`.
fn nodes(
    gateway: &Gateway,
    cluster: &ClusterSnapshot,
    model: &ModelRef,
    route: OpenAiRoute,
) -> Result<Vec<(NodeId, String)>, ErrorBody> {
    let (mut known, mut lacking, mut found) = (false, None, Vec::new());
    for (node, _) in cluster.nodes().filter(|(node, _)| node.liveness != Liveness::Offline) {
        for pool in node.pools.iter().filter(|pool| pool.report.models.contains(model)) {
            known = true;
            match pool.report.engine {
                Some(engine) if !route.is_of(engine) => lacking = Some(engine),
                _ if node.serves(pool) => {
                    found.push((node.node_id.clone(), node.address.clone()));
                    break;
                }
                _ => lacking = None,
            }
        }
    }
    if !found.is_empty() {
        return Ok(found);
    }
    Err(match (known, lacking) {
        (false, _) => gateway.unknown_model(cluster, model.as_str()),
        (true, Some(engine)) => {
            let message = format!("{}: {} has no such route", route.path(), engine.as_str());
            ErrorBody::new(ErrorCode::Unsupported, message)
        }
        (true, None) => {
            let message = format!("no node is ready with the model {model}");
            ErrorBody::new(ErrorCode::PoolUnready, message).retry_after_ms(RETRY_AFTER_MS)
        }
    })
}
