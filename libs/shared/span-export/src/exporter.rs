//! The way to the collector, one a process.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, Response};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{ExporterBuildError, Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanExporter as Exports, SpanProcessor,
};
use parking_lot::Mutex;
use prost::Message;
use tokio::runtime::Handle;

use crate::WAITING;

/// How often spans go to the collector, unless a batch is full before.
const EVERY: Duration = Duration::from_secs(1);
/// Spans of one request to it.
const BATCH: usize = 512;
/// How long it may take to answer.
const WITHIN: Duration = Duration::from_secs(5);
/// Longest answer that is read.
const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// A collector that takes nothing has a line this often.
const LINE_EVERY: Duration = Duration::from_secs(60);
/// How long the end of a daemon waits for it.
const LAST: Duration = Duration::from_secs(2);
/// Where a collector takes traces. Source: OTLP 1.x, "OTLP/HTTP Request".
const PATH: &str = "/v1/traces";

static EXPORTER: OnceLock<Exporter> = OnceLock::new();

/// Where spans go, and which.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The collector: `http://` or `https://`, a host and a port, maybe a path before `/v1/traces`.
    pub endpoint: String,
    /// Share of new traces that is recorded, 0 to 1. A trace that came with a request is recorded where its
    /// `traceparent` says so.
    pub sample: f64,
}

/// Why nothing is exported.
#[derive(Debug, thiserror::Error)]
#[error("LLORCH_OTLP_ENDPOINT: {0}")]
pub struct StartError(#[from] ExporterBuildError);

pub(crate) struct Exporter {
    processor: BatchSpanProcessor,
    pub(crate) scope: InstrumentationScope,
    pub(crate) sample: f64,
    waiting: AtomicUsize,
    lost: AtomicU64,
    endpoint: String,
    /// When the log last had a line of it.
    last_line: Mutex<Option<Instant>>,
    is_stopped: AtomicBool,
}

impl fmt::Debug for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exporter").field("sample", &self.sample).finish_non_exhaustive()
    }
}

/// Begins to export the spans of this process, which calls itself `service` and this one of them `instance`.
/// Requests are made by `client` on the runtime of whoever calls. Headers that the collector wants are those
/// of `OTEL_EXPORTER_OTLP_HEADERS`.
///
/// # Errors
/// That the endpoint is none.
pub fn start(
    settings: &Settings,
    client: reqwest::Client,
    service: &'static str,
    instance: String,
    version: &'static str,
) -> Result<(), StartError> {
    let endpoint = format!("{}{PATH}", settings.endpoint.trim_end_matches('/').trim_end_matches(PATH));
    let why = Arc::<Mutex<Option<String>>>::default();
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(Client { client, runtime: Handle::current(), why: Arc::clone(&why) })
        .with_endpoint(&endpoint)
        .with_protocol(Protocol::HttpBinary)
        .with_timeout(WITHIN)
        .build()?;
    let config = BatchConfigBuilder::default()
        // What waits is bounded here, where it is counted.
        .with_max_queue_size(WAITING + BATCH)
        .with_max_export_batch_size(BATCH)
        .with_scheduled_delay(EVERY)
        .build();
    let batches = Batches { exporter, why };
    let mut processor = BatchSpanProcessor::builder(batches).with_batch_config(config).build();
    let resource = Resource::builder_empty()
        .with_service_name(service)
        .with_attributes([
            KeyValue::new("service.instance.id", instance),
            KeyValue::new("service.version", version),
            KeyValue::new("service.namespace", "llama-orch"),
        ])
        .build();
    processor.set_resource(&resource);
    let started = Exporter {
        processor,
        scope: InstrumentationScope::builder("llama-orch").with_version(version).build(),
        sample: settings.sample,
        waiting: AtomicUsize::new(0),
        endpoint: endpoint.clone(),
        last_line: Mutex::new(None),
        lost: AtomicU64::new(0),
        is_stopped: AtomicBool::new(false),
    };
    // Only a second start in one process finds it set: the first one goes on.
    let _ = EXPORTER.set(started);
    tracing::info!(endpoint, sample = settings.sample, "spans go to a collector");
    Ok(())
}

/// Sends what waits, for a bounded time. Spans that end later are gone.
pub async fn stop() {
    let Some(exporter) = EXPORTER.get() else { return };
    exporter.is_stopped.store(true, Ordering::Relaxed);
    match owned_tasks::blocking("spans", || exporter.processor.shutdown_with_timeout(LAST)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the last spans are lost"),
        Err(error) => tracing::error!(%error, "spans are not stopped"),
    }
}

/// Spans of this process that no collector has.
pub fn lost() -> u64 {
    EXPORTER.get().map_or(0, |exporter| exporter.lost.load(Ordering::Relaxed))
}

impl Exporter {
    /// The one of this process, where there is one.
    pub(crate) fn get() -> Option<&'static Self> {
        EXPORTER.get().filter(|exporter| !exporter.is_stopped.load(Ordering::Relaxed))
    }

    pub(crate) fn take(&self, span: SpanData) {
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= WAITING {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            self.lose(1, "more wait for it than there is room for");
            return;
        }
        self.processor.on_end(span);
    }

    /// They are not delivered.
    fn lose(&self, spans: u64, why: &str) {
        self.lost.fetch_add(spans, Ordering::Relaxed);
        let mut last = self.last_line.lock();
        if last.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
            *last = Some(Instant::now());
            let endpoint = &self.endpoint;
            tracing::warn!(endpoint, why, spans, "a collector has not taken spans");
        }
    }
}

/// Counts what leaves, and what is lost on the way.
struct Batches {
    exporter: SpanExporter,
    /// Why the last request failed: the SDK does not say it.
    why: Arc<Mutex<Option<String>>>,
}

impl fmt::Debug for Batches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batches").finish_non_exhaustive()
    }
}

impl Exports for Batches {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let count = batch.len();
        let exported = self.exporter.export(batch).await;
        if let Some(exporter) = EXPORTER.get() {
            exporter.waiting.fetch_sub(count, Ordering::Relaxed);
            if let Err(error) = &exported {
                let why = self.why.lock().take();
                exporter.lose(count as u64, &why.unwrap_or_else(|| error.to_string()));
            }
        }
        exported
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// Makes its requests on a runtime: batches are made on a thread that has none.
#[derive(Debug)]
struct Client {
    client: reqwest::Client,
    runtime: Handle,
    why: Arc<Mutex<Option<String>>>,
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (client, request) = (self.client.clone(), reqwest::Request::try_from(request)?);
        // Its timer is the runtime's too.
        let asking = async move { tokio::time::timeout(WITHIN, ask(client, request)).await };
        let asked = owned_tasks::elsewhere(&self.runtime, "spans", asking).await?;
        let answered = asked.map_err(|_| format!("no answer within {} s", WITHIN.as_secs()).into());
        let answered = answered.and_then(|answered| answered);
        *self.why.lock() = match &answered {
            Ok(response) if response.status().is_success() => None,
            Ok(response) => Some(format!("it answers {}", response.status())),
            Err(error) => Some(with_causes(&**error)),
        };
        if let Ok(response) = &answered
            && response.status().is_success()
            && let Ok(taken) = ExportTraceServiceResponse::decode(&response.body()[..])
            && let Some(partial) = taken.partial_success
            && let Ok(rejected @ 1..) = u64::try_from(partial.rejected_spans)
            && let Some(exporter) = EXPORTER.get()
        {
            exporter.lose(rejected, "it refuses them");
        }
        answered
    }
}

/// An error with what it comes from.
fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

async fn ask(client: reqwest::Client, request: reqwest::Request) -> Result<Response<Bytes>, HttpError> {
    let mut answer = client.execute(request).await.map_err(reqwest::Error::without_url)?;
    let mut response = Response::builder().status(answer.status());
    if let Some(headers) = response.headers_mut() {
        *headers = answer.headers().clone();
    }
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        if body.len() + chunk.len() > MAX_ANSWER_BYTES {
            return Err(format!("an answer of more than {MAX_ANSWER_BYTES} bytes").into());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(response.body(body.into())?)
}
