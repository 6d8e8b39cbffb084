//! An error as an HTTP answer: the one conversion, at the edge.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use pool_registry_types::routes::{self, headers};
use pool_registry_types::{ErrorBody, ErrorCode};

/// The error of every handler.
#[derive(Debug)]
pub struct ApiError(pub ErrorBody);

impl ApiError {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self(ErrorBody::new(code, message))
    }
}

impl From<ErrorBody> for ApiError {
    fn from(body: ErrorBody) -> Self {
        Self(body)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = self.0;
        let status =
            StatusCode::from_u16(body.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(&body)).into_response();
        let out = response.headers_mut();
        if status == StatusCode::UNAUTHORIZED {
            out.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(millis) = body.retry_after_ms {
            // Retry-After counts whole seconds: round up, so that nobody comes too early.
            out.insert(header::RETRY_AFTER, HeaderValue::from(millis.div_ceil(1000)));
            out.insert(headers::BACKOFF_MS, HeaderValue::from(millis));
        }
        // The correlation layer adds the id to the body.
        response.extensions_mut().insert(body);
        response
    }
}

/// What is not routed; `shown`: where the page is that shows what is.
pub(crate) fn not_found(shown: Option<&str>) -> ApiError {
    let page = shown.map_or_else(String::new, |page| format!("; {page}/ shows those that there are"));
    ApiError::new(ErrorCode::NotFound, format!("no such path{page}"))
}

/// What is routed, with another method.
pub(crate) async fn method_not_allowed() -> ApiError {
    ApiError::new(ErrorCode::MethodNotAllowed, "this path does not take that method")
}

/// A body in a coding that is not taken; it says which one is. Source: RFC 9110, 15.5.16.
pub(crate) fn encoded() -> Response {
    let message = "Content-Encoding: a body is taken as it is, and not compressed";
    let mut response = ApiError::new(ErrorCode::Unsupported, message).into_response();
    *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
    response.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    response
}

/// A handler panicked: the text goes to the log, not to the client.
pub fn panicked(_panic: Box<dyn std::any::Any + Send>) -> Response {
    tracing::error!("a request handler panicked");
    ApiError::new(ErrorCode::Internal, "a defect in the server, see its log").into_response()
}

/// Whether the path is of the static API page.
pub(crate) fn is_page(path: &str) -> bool {
    path == routes::API_PAGE || path.strip_prefix(routes::API_PAGE).is_some_and(|rest| rest.starts_with('/'))
}

/// The headers of every answer. What a handler has said of caching stands.
pub(crate) fn set_headers(response: &mut Response, is_page: bool) {
    let out = response.headers_mut();
    out.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if !is_page {
        out.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    }
}
