//! The link and its POSTs: all attempts of a thread of the control plane on one endless response.
//!
//! What is decided stands in `attempt-link`, what runs in the agent; here are their bytes and statuses.

use attempt_link::node::{GetRefusal, PostRefusal};
use attempt_link::wire::{
    ControlAnswer, ControlBody, LinkQuery, MAX_LINE_BYTES, MAX_POST_BYTES, StartsAnswer, read_single,
    read_starts,
};
use axum::Json;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use daemon_kit::extract::parse;
use daemon_kit::tokens::Scope;
use daemon_kit::{ApiError, Caller, PathId, RawBody};
use pool_registry_types::task::MAX_PASSED_BYTES;
use pool_registry_types::{AttemptId, BootId, ErrorBody, ErrorCode, LifeId, routes as paths};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

use crate::state::AppState;

/// A proxy that keeps the response back breaks the link.
const UNBUFFERED: HeaderName = HeaderName::from_static("x-accel-buffering");

fn link_error(refusal: GetRefusal) -> ApiError {
    let code = match refusal {
        GetRefusal::WrongBoot => ErrorCode::WrongNode,
        GetRefusal::Stale => ErrorCode::StaleLink,
        GetRefusal::Lane => ErrorCode::InvalidParams,
        GetRefusal::Leaving => ErrorCode::Draining,
    };
    ApiError::new(code, refusal.to_string())
}

fn post_error(refusal: PostRefusal) -> ApiError {
    let code = match refusal {
        PostRefusal::Stale => ErrorCode::StaleLink,
        PostRefusal::Credential => ErrorCode::BadToken,
    };
    ApiError::new(code, refusal.to_string())
}

fn unreadable(error: impl std::error::Error) -> ApiError {
    let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
    ApiError::new(ErrorCode::InvalidParams, format!("the body: {error}{cause}"))
}

/// The records of all attempts of a lane, as `contracts/examples/link/records.json` has each kind. It
/// never ends; the first one says who writes. A second GET of a lane displaces the first one, once a POST
/// names it.
#[utoipa::path(get, path = paths::LINK,
    params(("boot_id" = BootId, Query), ("life" = LifeId, Query), ("lane" = u16, Query), ("n" = u64, Query)),
    responses((status = 200, content_type = "application/octet-stream"), (status = 400, body = ErrorBody),
              (status = 401, body = ErrorBody), (status = 409, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn link(
    State(node): State<AppState>,
    caller: Caller,
    query: Result<Query<LinkQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(query) = query.map_err(|bad| ApiError::new(ErrorCode::InvalidParams, bad.body_text()))?;
    let tokens = node.tokens.clone();
    let admits = move || tokens.still_admit_to(&caller, Scope::Control);
    let reader = node.agent.open_link(&query, admits).map_err(link_error)?;
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        (UNBUFFERED, HeaderValue::from_static("no")),
    ];
    Ok((headers, Body::from_stream(reader)).into_response())
}

/// Of the document only: any object. What is in it `contracts/examples/link` shows.
pub(crate) enum LinkJson {}

impl PartialSchema for LinkJson {
    fn schema() -> RefOr<Schema> {
        let description = "As `contracts/examples/link` has it.";
        ObjectBuilder::new().schema_type(Type::Object).description(Some(description)).build().into()
    }
}

impl ToSchema for LinkJson {}

/// Starts, what was seen and what is done. That it was read is all that the answer says: the link answers
/// each start.
#[utoipa::path(post, path = paths::ATTEMPTS, request_body = LinkJson,
    responses((status = 200, body = LinkJson), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
              (status = 409, body = ErrorBody), (status = 413, body = ErrorBody)))]
pub(crate) async fn starts(
    State(node): State<AppState>,
    RawBody(body): RawBody<MAX_POST_BYTES>,
) -> Result<Json<StartsAnswer>, ApiError> {
    let starts = read_starts(&body).map_err(unreadable)?;
    node.agent.take_starts(starts).map_err(post_error)?;
    Ok(Json(StartsAnswer {}))
}

/// One start whose payload is large: a line of JSON, and the payload's bytes behind it.
#[utoipa::path(post, path = paths::ATTEMPT, params(("attempt_id" = AttemptId, Path)),
    request_body(content = String, content_type = "application/octet-stream"),
    responses((status = 200, body = LinkJson), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
              (status = 409, body = ErrorBody), (status = 413, body = ErrorBody)))]
pub(crate) async fn start(
    State(node): State<AppState>,
    PathId(attempt): PathId<AttemptId>,
    RawBody(body): RawBody<{ MAX_LINE_BYTES + 1 + MAX_PASSED_BYTES }>,
) -> Result<Json<StartsAnswer>, ApiError> {
    let start = read_single(&body).map_err(unreadable)?;
    node.agent.take_start(attempt, start).map_err(post_error)?;
    Ok(Json(StartsAnswer {}))
}

/// Stops, and attempts that are to be read again. Named in the answer are those that the link will not
/// answer.
#[utoipa::path(post, path = paths::ATTEMPTS_CONTROL, request_body = LinkJson,
    responses((status = 200, body = LinkJson), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
              (status = 409, body = ErrorBody), (status = 413, body = ErrorBody)))]
pub(crate) async fn control(
    State(node): State<AppState>,
    RawBody(body): RawBody<MAX_POST_BYTES>,
) -> Result<Json<ControlAnswer>, ApiError> {
    let orders: ControlBody = parse(&body)?;
    node.agent.take_orders(&orders).map(Json).map_err(post_error)
}

#[cfg(test)]
#[path = "link_tests.rs"]
mod tests;
