//! A collector of spans: takes OTLP over HTTP as one of the field's does, and keeps what it was sent.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use bytes::Bytes;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::AnyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::{Span, status::StatusCode as Code};
use prost::Message;
use std::sync::Mutex;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::eventually;

/// Longer than spans wait in a daemon.
const PATIENCE: Duration = Duration::from_secs(10);
/// The largest request that is taken.
const MOST_BYTES: usize = 16 * 1024 * 1024;

/// A span as it came. Ids are hexadecimal, that of no parent is empty.
#[derive(Debug, Clone)]
pub struct Received {
    /// `service.name` of whoever sent it.
    pub service: String,
    /// `service.instance.id` of it.
    pub instance: String,
    pub name: String,
    pub trace: String,
    pub id: String,
    pub parent: String,
    /// Nanoseconds since 1970.
    pub from: u64,
    pub to: u64,
    pub attributes: BTreeMap<String, String>,
    pub events: Vec<String>,
    /// Ids of the spans that it is linked with.
    pub links: Vec<String>,
    pub failed: bool,
}

impl Received {
    /// An attribute; empty where it has none of this name.
    pub fn of(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }
}

#[derive(Debug, Default)]
struct Taken {
    spans: Mutex<Vec<Received>>,
    calls: AtomicUsize,
    refuses: AtomicBool,
}

/// One on loopback; gone when dropped.
#[derive(Debug)]
pub struct Collector {
    /// Its base URL.
    pub url: String,
    taken: Arc<Taken>,
    serving: JoinHandle<()>,
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Collector {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has free ports");
        let url = format!("http://{}", listener.local_addr().expect("a bound address"));
        let taken = Arc::new(Taken::default());
        let app = Router::new()
            .route("/v1/traces", post(take))
            .layer(DefaultBodyLimit::max(MOST_BYTES))
            .with_state(Arc::clone(&taken));
        let serving = tokio::spawn(async move { axum::serve(listener, app).await.expect("it serves") });
        Self { url, taken, serving }
    }

    /// From now on it takes nothing, or takes again.
    pub fn refuse(&self, refuses: bool) {
        self.taken.refuses.store(refuses, Ordering::Relaxed);
    }

    /// Requests that have come.
    pub fn calls(&self) -> usize {
        self.taken.calls.load(Ordering::Relaxed)
    }

    /// What has come of a trace.
    pub fn trace(&self, trace: &str) -> Vec<Received> {
        self.all().into_iter().filter(|span| span.trace == trace).collect()
    }

    pub fn all(&self) -> Vec<Received> {
        self.taken.spans.lock().expect("nobody panics with it").clone()
    }

    /// Waits until the trace has so many spans of these names, and returns all of it.
    pub async fn wait(&self, trace: &str, names: &[(&str, usize)]) -> Vec<Received> {
        let mut last = Vec::new();
        for _ in 0..PATIENCE.as_millis() / 50 {
            last = self.trace(trace);
            let count = |name: &str| last.iter().filter(|span| span.name == name).count();
            if names.iter().all(|(name, count_of)| count(name) == *count_of) {
                return last;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let of = |span: &Received| format!("{} {} {}", span.service, span.name, span.of("error.type"));
        panic!("no {names:?} of {trace}: {:#?}", last.iter().map(of).collect::<Vec<_>>());
    }

    /// Waits for the first span of this name, of whatever trace.
    pub async fn wait_for(&self, name: &str) -> Received {
        eventually(name, PATIENCE, || async { self.all().into_iter().find(|span| span.name == name) }).await
    }
}

/// Whether every span but the first ones belongs to one of the others. `root`: the parent of the first ones.
///
/// # Panics
/// Where one does not.
pub fn assert_connected(spans: &[Received], root: &str) {
    let ids: BTreeSet<&str> = spans.iter().map(|span| span.id.as_str()).collect();
    assert_eq!(ids.len(), spans.len(), "each has an id of its own: {spans:#?}");
    for span in spans {
        let is_known = span.parent == root || ids.contains(span.parent.as_str());
        assert!(is_known, "{} of {} belongs to nothing: {spans:#?}", span.name, span.service);
        assert!(span.from <= span.to, "{} ends before it begins", span.name);
        for link in &span.links {
            assert!(ids.contains(link.as_str()), "{} follows nothing: {spans:#?}", span.name);
        }
    }
}

async fn take(State(taken): State<Arc<Taken>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    taken.calls.fetch_add(1, Ordering::Relaxed);
    if taken.refuses.load(Ordering::Relaxed) {
        return StatusCode::SERVICE_UNAVAILABLE;
    }
    let is_protobuf = headers.get("content-type").is_some_and(|kind| kind == "application/x-protobuf");
    let Ok(request) = ExportTraceServiceRequest::decode(body) else { return StatusCode::BAD_REQUEST };
    if !is_protobuf {
        return StatusCode::UNSUPPORTED_MEDIA_TYPE;
    }
    for of_resource in request.resource_spans {
        let resource = of_resource.resource.unwrap_or_default();
        let of = |key: &str| {
            let found = resource.attributes.iter().find(|one| one.key == key);
            found.map(|one| text(one.value.as_ref())).unwrap_or_default()
        };
        let from = [of("service.name"), of("service.instance.id")];
        for span in of_resource.scope_spans.into_iter().flat_map(|of_scope| of_scope.spans) {
            taken.spans.lock().expect("nobody panics with it").push(received(&from, span));
        }
    }
    StatusCode::OK
}

fn received([service, instance]: &[String; 2], span: Span) -> Received {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let attributes = span.attributes.iter();
    Received {
        service: service.clone(),
        instance: instance.clone(),
        name: span.name,
        trace: hex(&span.trace_id),
        id: hex(&span.span_id),
        parent: hex(&span.parent_span_id),
        from: span.start_time_unix_nano,
        to: span.end_time_unix_nano,
        attributes: attributes.map(|one| (one.key.clone(), text(one.value.as_ref()))).collect(),
        events: span.events.into_iter().map(|event| event.name).collect(),
        links: span.links.iter().map(|link| hex(&link.span_id)).collect(),
        failed: span.status.is_some_and(|status| status.code == i32::from(Code::Error as u8)),
    }
}

fn text(value: Option<&AnyValue>) -> String {
    match value.and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::DoubleValue(number)) => number.to_string(),
        Some(Value::BoolValue(flag)) => flag.to_string(),
        Some(Value::ArrayValue(array)) => {
            array.values.iter().map(|value| text(Some(value))).collect::<Vec<_>>().join(", ")
        }
        _ => String::new(),
    }
}
