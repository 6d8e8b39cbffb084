//! Requests that take no slot, as the control plane passes them on.

use axum::extract::{Extension, FromRequest, Request, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use daemon_kit::correlation::RequestIds;
use daemon_kit::{ApiError, RawBody};
use pool_registry_types::task::MAX_PASSED_BYTES;
use pool_registry_types::{ErrorBody, routes as paths};

use crate::state::AppState;

/// Longest line before a body.
const MAX_LINE_BYTES: usize = 256 * 1024;

/// Passes a request on to an engine that is ready, whoever has its slots: a line of JSON with the model and
/// the route, and the body's bytes behind it. The answer is a line with the engine's status and headers, and
/// its bytes.
#[utoipa::path(post, path = paths::SLOTLESS, request_body(content = String, content_type = "application/octet-stream"),
    responses((status = 200, content_type = "application/octet-stream"), (status = 400, body = ErrorBody),
              (status = 401, body = ErrorBody), (status = 413, body = ErrorBody), (status = 503, body = ErrorBody),
              (status = 504, body = ErrorBody)))]
pub(crate) async fn pass(
    State(node): State<AppState>,
    Extension(ids): Extension<RequestIds>,
    request: Request,
) -> Result<Response, ApiError> {
    // Before the body, so that so many are read at once.
    let place = node.agent.slotless_place()?;
    let RawBody(framed) =
        RawBody::<{ MAX_LINE_BYTES + MAX_PASSED_BYTES }>::from_request(request, &node).await?;
    let answer = node.agent.pass_framed(&place, &framed, &ids.trace()).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], answer).into_response())
}
