//! Every answer says which request it belongs to.
//!
//! A correlation id is taken over from the request or drawn; a trace id is taken over from
//! `traceparent` or drawn. Error bodies carry the correlation id too, and the line that the log has
//! of the request names both.

use axum::Json;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use axum::response::{IntoResponse, Response};
use pool_registry_types::routes::{self, headers};
use pool_registry_types::trace::{read_traceparent, read_tracestate, traceparent};
use pool_registry_types::{ErrorBody, ErrorCode, TraceContext};
use span_export::{GONE, Kind, Span, flags_of_new_trace};
use uuid::Uuid;

use crate::answer_room;
use crate::auth::Shapes;
use crate::calls::Arrived;

/// Longest correlation id that is taken over, bytes.
const MAX_ID_BYTES: usize = 128;

/// The end of paths that attempts are sent to.
const ATTEMPTS: &str = "/infer";

/// The ids of one request, for handlers that pass them on.
#[derive(Debug, Clone)]
pub struct RequestIds {
    pub correlation_id: String,
    /// W3C trace context, complete.
    pub traceparent: String,
    /// As it came with the request's own `traceparent`; empty without.
    pub tracestate: String,
}

impl RequestIds {
    /// What goes along with whatever is done for the request.
    pub fn trace(&self) -> TraceContext {
        TraceContext {
            traceparent: self.traceparent.clone(),
            correlation_id: self.correlation_id.clone(),
            tracestate: self.tracestate.clone(),
        }
    }
}

/// A request whose answer is to say which it belongs to.
#[derive(Debug)]
pub(crate) struct Answering {
    ids: RequestIds,
    method: Method,
    uri: Uri,
    /// Of a request that asks for work, where that is recorded.
    span: Option<Span>,
}

impl Answering {
    /// Reads or draws the ids, and tells handlers of them.
    pub(crate) fn begin(request: &mut Request, arrived: &Arrived) -> Self {
        let given = given_trace(request.headers());
        let tracestate = given.as_ref().and_then(|_| given_state(request.headers())).unwrap_or_default();
        let is_first = given.is_none();
        let mut ids = RequestIds {
            correlation_id: given_id(request.headers()).unwrap_or_else(|| Uuid::new_v4().to_string()),
            traceparent: given.unwrap_or_else(new_trace),
            tracestate,
        };
        let is_work = request.method() == Method::POST && is_work(request.uri().path());
        let span = (is_work && span_export::is_on()).then(|| span_of(&ids, is_first, arrived)).flatten();
        if let Some(span) = &span {
            // What is done for the request is done within its span.
            ids.traceparent = ids.trace().child(span.id()).traceparent;
        }
        request.extensions_mut().insert(ids.clone());
        Self { ids, method: request.method().clone(), uri: request.uri().clone(), span }
    }

    /// The gate does not let it in: a crowd of strangers does not take the place of tasks.
    pub(crate) fn is_refused(&mut self) {
        self.span = None;
    }

    pub(crate) fn ids(&self) -> &RequestIds {
        &self.ids
    }

    /// Writes the ids on the answer, gives an error the shape of its path, and logs that it was given.
    pub(crate) fn finish(mut self, mut response: Response, shapes: Option<Shapes>) -> Response {
        let span = self.span.take();
        let (ids, method, uri) = (&self.ids, &self.method, &self.uri);
        let trace_id = ids.traceparent.get(3..35).unwrap_or_default();
        let error = response.extensions_mut().remove::<ErrorBody>();
        tracing::debug!(
            %method,
            path = uri.path(),
            status = response.status().as_u16(),
            code = error.as_ref().map(|body| body.code.as_str()),
            // What is wrong with a body may quote it.
            reason = error.as_ref().filter(|body| body.code != ErrorCode::InvalidParams).map(|body| body.message.as_str()),
            correlation_id = ids.correlation_id,
            trace_id,
            "a request is answered"
        );
        if let Some(span) = span {
            let span = span.with("http.response.status_code", i64::from(response.status().as_u16()));
            let span = span.with("llorch.correlation_id", ids.correlation_id.clone());
            match &error {
                // What is a client's fault is none of the server's.
                Some(body) if response.status().is_server_error() => span.failed(body.code.as_str()).end(),
                Some(body) => span.with("error.type", body.code.as_str()).end(),
                None => span.end(),
            }
        }
        if let Some(mut body) = error {
            body.correlation_id = Some(ids.correlation_id.clone());
            let (parts, _) = response.into_parts();
            let theirs = shapes.and_then(|shapes| (shapes.shape)(uri.path(), parts.status, &body));
            let is_ours = theirs.is_none();
            response = theirs.unwrap_or_else(|| (parts.status, Json(body)).into_response());
            for (name, value) in &parts.headers {
                // What another API says of an error in its own way stands.
                if name != "content-length" && (is_ours || !response.headers().contains_key(name)) {
                    response.headers_mut().insert(name, value.clone());
                }
            }
        }
        if shapes.is_some_and(|shapes| (shapes.is_theirs)(uri.path())) {
            name_request(response.headers_mut(), &ids.correlation_id);
        }
        set(response.headers_mut(), headers::CORRELATION_ID, &ids.correlation_id);
        set(response.headers_mut(), headers::TRACE_ID, trace_id);
        response
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        if let Some(span) = self.span.take() {
            let span = span.with("llorch.correlation_id", self.ids.correlation_id.clone());
            span.failed(GONE).end();
        }
    }
}

/// Whether a `POST` there asks for a task, or steers a pool.
fn is_work(path: &str) -> bool {
    let of_pool = path.strip_prefix(routes::POOLS).and_then(|path| path.strip_prefix('/'));
    // An attempt has spans of its own.
    let steers = of_pool.is_some_and(|path| !path.ends_with(ATTEMPTS));
    path == routes::TASKS || steers || answer_room::is_others(path)
}

/// The span of the request until the head of its answer. `is_first`: its trace begins here.
fn span_of(ids: &RequestIds, is_first: bool, arrived: &Arrived) -> Option<Span> {
    let name = format!("POST {}", arrived.route());
    let span = Span::of(&ids.trace(), name, Kind::Server)?.since(arrived.at());
    let span = span.with("http.request.method", "POST").with("http.route", arrived.route().to_owned());
    Some(if is_first { span.within(0) } else { span })
}

/// What clients of other APIs name a request by: its task's id, where it has one.
fn name_request(map: &mut HeaderMap, correlation_id: &str) {
    if !map.contains_key(headers::REQUEST_ID) {
        set(map, headers::REQUEST_ID, correlation_id);
    }
    if let Some(id) = map.get(headers::REQUEST_ID).cloned() {
        map.insert(headers::ANTHROPIC_REQUEST_ID, id);
    }
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

/// The request's own trace. Of two nobody knows which one holds.
fn given_trace(map: &HeaderMap) -> Option<String> {
    let mut given = map.get_all(headers::TRACEPARENT).iter();
    let (only, None) = (given.next()?, given.next()) else { return None };
    read_traceparent(only.to_str().ok()?)
}

/// What vendors say of it.
fn given_state(map: &HeaderMap) -> Option<String> {
    let all: Result<Vec<&str>, _> =
        map.get_all(headers::TRACESTATE).iter().map(HeaderValue::to_str).collect();
    read_tracestate(all.ok()?)
}

fn new_trace() -> String {
    let (trace, parent) = (Uuid::new_v4(), Uuid::new_v4());
    traceparent(trace.as_u128(), parent.as_u64_pair().1, flags_of_new_trace(trace.as_u128()))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::Arc;

    use axum::body::Body;
    use axum::routing::get;
    use axum::{Extension, Router};
    use pool_registry_types::ErrorCode;
    use tower::ServiceExt;

    use super::*;
    use crate::ApiError;
    use crate::audit::Audit;
    use crate::auth::Gate;
    use crate::serve::{Edge, with_layers};

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    async fn ask(path: &str, headers: &[(&str, &str)]) -> Response {
        let routes = Router::new()
            .route("/ids", get(|Extension(ids): Extension<RequestIds>| async move { Json(ids.trace()) }))
            .route("/bad", get(|| async { ApiError::new(ErrorCode::InvalidParams, "seed: a number") }))
            .route("/full", get(|| async { ApiError::new(ErrorCode::Overloaded, "too much to do") }));
        let edge = Edge { gate: Gate::open(), audit: Audit::default(), calls: Arc::default(), page: None };
        let mut request = axum::http::Request::builder().uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        with_layers(routes, edge).oneshot(request.body(Body::empty()).unwrap()).await.unwrap()
    }

    async fn trace_of(response: Response) -> TraceContext {
        let body = axum::body::to_bytes(response.into_body(), 4096).await.unwrap();
        serde_json::from_slice(&body).unwrap()
    }

    // CLOUD-1150
    #[tokio::test]
    async fn a_good_trace_is_handed_to_the_handler_and_a_bad_or_a_doubled_one_replaced() {
        let (parent, other) = (format!("00-{TRACE}-00f067aa0ba902b7-00"), format!("00-{TRACE}-01-01"));
        let trace =
            trace_of(ask("/ids", &[("x-correlation-id", "abc"), ("traceparent", &parent)]).await).await;
        let expected = TraceContext {
            traceparent: parent.clone(),
            correlation_id: "abc".into(),
            tracestate: String::new(),
        };
        assert_eq!(trace, expected);
        let state = [("traceparent", parent.as_str()), ("tracestate", "a=1"), ("tracestate", "b=2")];
        assert_eq!(trace_of(ask("/ids", &state).await).await.tracestate, "a=1,b=2");
        assert_eq!(trace_of(ask("/ids", &state[1..]).await).await.tracestate, "", "it is of no trace");
        let doubled = [("traceparent", parent.as_str()), ("traceparent", parent.as_str())];
        for headers in [&doubled[..], &[("traceparent", other.as_str())], &[]] {
            let response = ask("/ids", headers).await;
            let shown = response.headers()["x-trace-id"].to_str().unwrap().to_owned();
            let drawn = trace_of(response).await;
            assert_eq!(
                read_traceparent(&drawn.traceparent).as_ref(),
                Some(&drawn.traceparent),
                "it is valid"
            );
            assert!(drawn.trace_id() == shown && shown != TRACE, "{drawn:?} {shown}");
        }
    }

    // CLOUD-1152
    #[tokio::test]
    async fn the_line_of_a_request_names_its_ids_and_an_error_its_reason_unless_that_may_quote_a_body() {
        // Beside a single subscriber, what other threads log first is nobody's from then on.
        let _other = tracing::Dispatch::new(tracing_subscriber::registry());
        let (mut reader, writer) = std::io::pipe().unwrap();
        let subscriber = tracing_subscriber::fmt()
            .json()
            .flatten_event(true)
            .with_max_level(tracing::Level::DEBUG)
            .with_writer(std::sync::Mutex::new(writer))
            .finish();
        let logging = tracing::subscriber::set_default(subscriber);
        let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
        let headers = [("x-correlation-id", "order-7"), ("traceparent", parent.as_str())];
        for path in ["/ids", "/bad?token=x", "/full"] {
            ask(path, &headers).await;
        }
        drop(logging);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let reported: Vec<_> = lines
            .iter()
            .map(|line| {
                assert_eq!((&line["correlation_id"], &line["trace_id"]), (&"order-7".into(), &TRACE.into()));
                (line["path"].as_str().unwrap(), line["status"].as_u64().unwrap(), line["code"].as_str())
            })
            .collect();
        let (bad, full) = (("/bad", 400, Some("INVALID_PARAMS")), ("/full", 503, Some("OVERLOADED")));
        assert_eq!(reported, [("/ids", 200, None), bad, full], "{text}");
        assert!(!text.contains("seed: a number"), "it may quote what came: {text}");
        assert_eq!(lines[2]["reason"], "too much to do");
    }
}
