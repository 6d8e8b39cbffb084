//! The heads of answers: the engine's own, with what is ours.

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use daemon_kit::ApiError;
use pool_registry_types::routes::headers;
use pool_registry_types::{ErrorBody, TaskId};
use task_stream::PassedHead;

/// Names the task, and the node where one has answered.
pub(super) fn name(out: &mut HeaderMap, task_id: TaskId, head: Option<&PassedHead>) {
    if let Ok(id) = HeaderValue::from_str(&task_id.to_string()) {
        out.insert(HeaderName::from_static(headers::TASK_ID), id.clone());
        out.insert(HeaderName::from_static(headers::REQUEST_ID), id);
    }
    if let Some(node) = head.and_then(|head| HeaderValue::from_str(head.node_id.as_str()).ok()) {
        out.insert(HeaderName::from_static(headers::NODE), node);
    }
}

/// An answer with the engine's status and headers.
pub(super) fn passed(head: &PassedHead, task_id: TaskId, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(head.head.status).unwrap_or(StatusCode::BAD_GATEWAY);
    let out = response.headers_mut();
    for (name, value) in &head.head.headers {
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_bytes(value.as_bytes()))
        {
            out.append(name, value);
        }
    }
    name(out, task_id, Some(head));
    response
}

/// The error of a task.
pub(super) fn failed(error: ErrorBody, task_id: TaskId, head: Option<&PassedHead>) -> Response {
    let mut response = ApiError::from(error).into_response();
    name(response.headers_mut(), task_id, head);
    response
}
