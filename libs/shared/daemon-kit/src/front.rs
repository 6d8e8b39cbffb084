//! What a daemon shows to the outside: its listeners, its certificate, its audit log, and the
//! files that these follow.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use owned_tasks::Loops;
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::audit::{Audit, AuditError};
use crate::auth::Gate;
use crate::calls::Calls;
use crate::config;
use crate::connections::{self, ConnLimits, Counts, ServeOptions, Streaming};
use crate::serve::{self, Edge};
use crate::tls::{Tls, TlsError, TlsPaths};

/// How long open connections may linger once everything has ended.
const LINGER: Duration = Duration::from_secs(1);

/// How long connecting to a collector may take.
const COLLECTOR_WITHIN: Duration = Duration::from_secs(2);

/// Why nothing is shown. Each names the variable.
#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    #[error("{variable}: cannot listen on {addr}: {source}")]
    Listen {
        variable: String,
        addr: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Audit(#[from] AuditError),
    #[error(transparent)]
    Spans(#[from] span_export::StartError),
    #[error("LLORCH_OTLP_ENDPOINT: the HTTP client cannot be made")]
    SpanClient(#[source] reqwest::Error),
}

/// The settings of it.
#[derive(Debug)]
pub struct FrontSettings {
    /// Of the daemon's variables, without an underscore at its end.
    pub prefix: &'static str,
    pub addr: SocketAddr,
    /// A second listener, which asks for no token.
    pub metrics_addr: Option<SocketAddr>,
    /// Of the first one, at once; absent: as many as files allow, within reason.
    pub max_connections: Option<u32>,
    pub tls: TlsPaths,
    pub audit_log: Option<PathBuf>,
    /// Where spans go; absent: nowhere.
    pub spans: Option<SpanSettings>,
}

/// What a daemon calls itself to a collector, and where that is.
#[derive(Debug)]
pub struct SpanSettings {
    pub service: &'static str,
    /// Which of them it is; absent: by host and port.
    pub instance: Option<String>,
    pub export: span_export::Settings,
}

/// Everything that can fail is done; nothing is served yet.
#[derive(Debug)]
pub struct Front {
    pub tls: Tls,
    pub bound: SocketAddr,
    /// What runs for as long as the daemon does, for its `/health/ready`.
    pub loops: Loops,
    prefix: &'static str,
    listener: TcpListener,
    metrics: Option<TcpListener>,
    audit: Audit,
    connections: usize,
}

/// What is served where.
#[derive(Debug)]
pub struct Shown {
    pub routes: Router,
    /// The path of a page that shows them, where there is one.
    pub page: Option<&'static str>,
    pub gate: Gate,
    pub counts: Arc<Counts>,
    pub calls: Arc<Calls>,
    pub limits: ConnLimits,
    pub streaming: Streaming,
    /// [`ServeOptions::answers_after_end`].
    pub answers_after_end: Option<fn(&str) -> bool>,
    /// The routes of the second listener.
    pub open_routes: Router,
}

impl Front {
    pub async fn open(settings: &FrontSettings) -> Result<Self, FrontError> {
        let prefix = settings.prefix;
        let (listener, bound) = listen(format!("{prefix}_ADDR"), settings.addr)?;
        let metrics = match settings.metrics_addr {
            Some(addr) => Some(listen(format!("{prefix}_METRICS_ADDR"), addr)?.0),
            None => None,
        };
        let tls = Tls::load(prefix, &settings.tls)?;
        let loops = Loops::default();
        let audit = settings.audit_log.as_deref().map(|path| Audit::open(path, &loops));
        let audit = audit.transpose()?.unwrap_or_default();
        if let Some(SpanSettings { service, instance, export }) = &settings.spans {
            let client = tls.client.reqwest(reqwest::Client::builder()).connect_timeout(COLLECTOR_WITHIN);
            let client = client.redirect(reqwest::redirect::Policy::none()).build();
            let by_address = || format!("{}:{}", config::host_name(), bound.port());
            let instance = instance.clone().unwrap_or_else(by_address);
            let client = client.map_err(FrontError::SpanClient)?;
            span_export::start(export, client, service, instance, env!("CARGO_PKG_VERSION"))?;
        }
        let connections = connections::most_connections(settings.max_connections);
        Ok(Self { tls, bound, loops, prefix, listener, metrics, audit, connections })
    }

    /// Serves until `stop`. Returns the main listener's end; what runs beside it is the tracker's.
    pub fn serve(
        self,
        shown: Shown,
        tracker: &TaskTracker,
        stop: &CancellationToken,
    ) -> JoinHandle<io::Result<()>> {
        let (prefix, loops) = (self.prefix, self.loops);
        if self.tls.server.is_none() && !self.bound.ip().is_loopback() {
            tracing::warn!(
                "plain HTTP on a network: whoever listens there reads tokens and prompts; set {prefix}_TLS_CERT and {prefix}_TLS_KEY"
            );
        }
        let (tokens, ended) = (shown.gate.tokens.clone(), stop.clone());
        loops.start(tracker, "file of tokens", stop, move || tokens.clone().follow(ended.clone()));
        if let Some(own) = self.tls.own {
            let ended = stop.clone();
            loops.start(tracker, "TLS files", stop, move || Arc::clone(&own).follow(ended.clone()));
        }
        if let Some(listener) = self.metrics {
            let edge =
                Edge { gate: Gate::open(), audit: Audit::default(), calls: Arc::default(), page: None };
            let app = serve::with_layers(shown.open_routes, edge);
            let options = ServeOptions { loops: loops.clone(), ..ServeOptions::default() };
            let serving = connections::run(listener, app, options, stop.clone(), LINGER);
            owned_tasks::task(tracker, "connections for metrics", async move {
                if let Err(error) = serving.await {
                    tracing::error!(%error, "the listener of the metrics has ended");
                }
            });
        }
        let edge = Edge { gate: shown.gate, audit: self.audit, calls: shown.calls, page: shown.page };
        let app = serve::with_layers(shown.routes, edge);
        let (tls, counts) = (self.tls.server, shown.counts);
        // How many there may be is the process's to say.
        let limits = ConnLimits { connections: self.connections, ..shown.limits };
        let streaming = Some(shown.streaming);
        let answers_after_end = shown.answers_after_end;
        let options = ServeOptions { tls, counts, limits, loops, streaming, answers_after_end };
        owned_tasks::watched(
            "connections",
            connections::run(self.listener, app, options, stop.clone(), LINGER),
        )
    }
}

/// Connections that wait to be accepted, as far as the kernel lets them: while a burst of them fills that, a
/// peer's first packet is dropped, and its next one comes a second later.
const BACKLOG: u32 = 4096;

fn listen(variable: String, addr: SocketAddr) -> Result<(TcpListener, SocketAddr), FrontError> {
    let listening = || {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // A daemon that is started again does not wait for connections of its former life.
        socket.set_reuseaddr(true)?;
        socket.bind(addr)?;
        let listener = socket.listen(BACKLOG)?;
        let bound = listener.local_addr()?;
        Ok((listener, bound))
    };
    listening().map_err(|source| FrontError::Listen { variable, addr, source })
}
