//! Our errors as the clients of each API know them: the one place where they take that shape.

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use openai_gateway::error;
use pool_registry_types::routes::headers;
use pool_registry_types::{ErrorBody, ErrorCode};
use serde::Serialize;
use task_stream::{ApiDialect, OpenAiRoute};
use utoipa::ToSchema;

/// An error, in OpenAI's shape; Anthropic's has `type` beside it, and no `param` nor `code`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct GatewayError {
    error: GatewayErrorDetail,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct GatewayErrorDetail {
    message: String,
    r#type: String,
    /// The field at fault.
    param: Option<String>,
    /// OpenAI's where it has one, else ours.
    code: Option<String>,
}

/// Whether the errors of the path have the shapes of other APIs.
pub(crate) fn is_ours(path: &str) -> bool {
    path == "/v1" || path.starts_with("/v1/") || OpenAiRoute::of_path(path).is_some()
}

/// The error as a client of this path knows it; nothing for a path of our own API. `status` is what was to
/// be answered.
pub(crate) fn shape(path: &str, status: StatusCode, body: &ErrorBody) -> Option<Response> {
    if !is_ours(path) {
        return None;
    }
    let is_anthropic = path == "/v1/messages" || path.starts_with("/v1/messages/");
    let dialect = if is_anthropic { ApiDialect::Anthropic } else { ApiDialect::OpenAi };
    let shape = error::shape(body.code);
    let is_plain = status.as_u16() == body.code.http_status();
    let status = if is_plain { StatusCode::from_u16(shape.status).unwrap_or(status) } else { status };
    let json = [(header::CONTENT_TYPE, "application/json")];
    let mut response = (status, json, error::body(dialect, body, param(body))).into_response();
    let out = response.headers_mut();
    out.insert(HeaderName::from_static(headers::ERROR), HeaderValue::from_static(body.code.as_str()));
    if let Some(wait) = error::retry_wait(body) {
        out.insert(header::RETRY_AFTER, HeaderValue::from(wait.seconds));
        out.insert(headers::BACKOFF_MS, HeaderValue::from(wait.millis));
    }
    if error::should_retry(body) == Some(false) {
        out.insert("x-should-retry", HeaderValue::from_static("false"));
    }
    Some(response)
}

/// The field at fault: a message about one begins with its name.
fn param(body: &ErrorBody) -> Option<&str> {
    if !matches!(body.code, ErrorCode::InvalidParams | ErrorCode::Unsupported) {
        return None;
    }
    let (field, _) = body.message.split_once(": ")?;
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'[' | b']' | b'-');
    (!field.is_empty() && field.bytes().all(is_name)).then_some(field)
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;
    use serde_json::{Value, json};

    use super::*;

    async fn shown(path: &str, status: u16, body: &ErrorBody) -> (Response, Value) {
        let response = shape(path, StatusCode::from_u16(status).unwrap(), body).unwrap();
        let (parts, body) = response.into_parts();
        let bytes = to_bytes(body, 10_000).await.unwrap();
        (Response::from_parts(parts, axum::body::Body::empty()), serde_json::from_slice(&bytes).unwrap())
    }

    // CLOUD-2840
    #[tokio::test]
    async fn an_error_has_the_shape_of_its_path_and_ours_stands_in_a_header() {
        let full = ErrorBody::new(ErrorCode::AdmissionReject, "the queue is full").retry_after_ms(1_500);
        let (response, body) = shown("/v1/chat/completions", 429, &full).await;
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["x-llorch-error"], "ADMISSION_REJECT");
        assert_eq!(
            (&response.headers()["retry-after"], &response.headers()["x-backoff-ms"]),
            (&"2".parse().unwrap(), &"1500".parse().unwrap())
        );
        assert_eq!(body["error"]["code"], "rate_limit_exceeded");
        let (_, body) = shown("/v1/messages", 429, &full).await;
        assert_eq!(
            body,
            json!({"type": "error", "error": {"type": "rate_limit_error", "message": "the queue is full"}})
        );
        let missing = ErrorBody::new(ErrorCode::ModelNotAvailable, "no such model");
        let (response, body) = shown("/v1/completions", 503, &missing).await;
        assert_eq!((response.status().as_u16(), &body["error"]["code"]), (404, &json!("model_not_found")));
        let (_, body) = shown("/v1/completions", 400, &ErrorBody::invalid("model: given twice")).await;
        assert_eq!(body["error"]["param"], "model");
        let media = ErrorBody::new(ErrorCode::Unsupported, "the body is compressed");
        let (response, body) = shown("/v1/unknown", 415, &media).await;
        assert_eq!((response.status().as_u16(), &body["error"]["param"]), (415, &Value::Null));
        assert!(shape("/v2/tasks", StatusCode::BAD_REQUEST, &media).is_none());
        assert!(shape("/v10", StatusCode::BAD_REQUEST, &media).is_none());
    }
}
