//! Every answer says which request it belongs to.
//!
//! A correlation id is taken over from the request or drawn; a trace id is taken over from
//! `traceparent` or drawn. Error bodies carry the correlation id too.

use axum::Json;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use pool_registry_types::ErrorBody;
use pool_registry_types::routes::headers;
use uuid::Uuid;

/// Longest correlation id that is taken over, bytes.
const MAX_ID_BYTES: usize = 128;

/// The ids of one request, for handlers that pass them on.
#[derive(Debug, Clone)]
pub struct RequestIds {
    pub correlation_id: String,
    /// W3C trace context, complete.
    pub traceparent: String,
}

/// Reads or draws the ids, and writes them on the answer.
pub async fn layer(mut request: Request, next: Next) -> Response {
    let ids = RequestIds {
        correlation_id: given_id(request.headers()).unwrap_or_else(|| Uuid::new_v4().to_string()),
        traceparent: given_trace(request.headers()).unwrap_or_else(new_trace),
    };
    request.extensions_mut().insert(ids.clone());
    let mut response = next.run(request).await;
    if let Some(mut body) = response.extensions_mut().remove::<ErrorBody>() {
        tracing::debug!(code = %body.code, correlation_id = ids.correlation_id, reason = body.message, "answered with an error");
        body.correlation_id = Some(ids.correlation_id.clone());
        let (parts, _) = response.into_parts();
        response = (parts.status, Json(body)).into_response();
        for (name, value) in &parts.headers {
            if name != "content-length" {
                response.headers_mut().insert(name, value.clone());
            }
        }
    }
    let trace_id = ids.traceparent.get(3..35).unwrap_or_default();
    set(response.headers_mut(), headers::CORRELATION_ID, &ids.correlation_id);
    set(response.headers_mut(), headers::TRACE_ID, trace_id);
    response
}

fn set(map: &mut HeaderMap, name: &'static str, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        map.insert(HeaderName::from_static(name), value);
    }
}

fn given_id(map: &HeaderMap) -> Option<String> {
    let id = map.get(headers::CORRELATION_ID)?.to_str().ok()?;
    let good = (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic());
    good.then(|| id.to_owned())
}

/// `00-<32 hex>-<16 hex>-<2 hex>`.
fn given_trace(map: &HeaderMap) -> Option<String> {
    let text = map.get(headers::TRACEPARENT)?.to_str().ok()?;
    let parts: Vec<&str> = text.split('-').collect();
    let hex = |part: &str, len| part.len() == len && part.bytes().all(|b| b.is_ascii_hexdigit());
    match parts.as_slice() {
        [version, trace, parent, flags]
            if hex(version, 2) && hex(trace, 32) && hex(parent, 16) && hex(flags, 2) =>
        {
            Some(text.to_owned())
        }
        _ => None,
    }
}

fn new_trace() -> String {
    let (trace, parent) = (Uuid::new_v4().simple().to_string(), Uuid::new_v4().simple().to_string());
    format!("00-{trace}-{}-01", &parent[..16])
}
