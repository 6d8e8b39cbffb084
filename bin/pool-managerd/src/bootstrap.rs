//! From configuration to a serving node, and back down.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use daemon_kit::audit::{Audit, AuditError};
use daemon_kit::auth::Gate;
use daemon_kit::connections::{self, Counts, ServeOptions};
use daemon_kit::serve::{self, Edge};
use daemon_kit::tls::{Tls, TlsError};
use handoff_watcher::{HandoffWatcher, watch::WatchError};
use node_agent::core::Identity;
use node_agent::{Agent, IntentFile, gpu};
use node_registration::HttpControlPlane;
use pool_registry_types::BootId;
use pool_registry_types::node::Capabilities;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::config::Config;
use crate::{api, registry};

/// How long leaving the cluster may take, once attempts have finished.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(6);
/// How long open connections may linger once everything has ended.
const LINGER: Duration = Duration::from_secs(1);

/// Why the node does not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    Listen(#[from] serve::ListenError),
    #[error("POOL_MANAGERD_RUNTIME_DIR: {0}")]
    RuntimeDir(#[from] WatchError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Audit(#[from] AuditError),
    #[error("the HTTP client cannot be made")]
    Client,
    #[error("serving failed")]
    Serve(#[source] io::Error),
}

pub(crate) async fn run(config: Config) -> Result<(), StartError> {
    // Only the first installation in a process can fail, and this is the first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let listener = serve::bind("POOL_MANAGERD_ADDR", config.addr).await?;
    let bound = listener.local_addr().map_err(StartError::Serve)?;
    let metrics_listener = match config.metrics_addr {
        Some(addr) => Some(serve::bind("POOL_MANAGERD_METRICS_ADDR", addr).await?),
        None => None,
    };
    let tls = Tls::load("POOL_MANAGERD", &config.tls)?;
    let audit = config.audit_log.as_deref().map(Audit::open).transpose()?.unwrap_or_default();
    let gpus = gpu::GpuWatch::start(config.nvml_lib.clone());
    let boot_id = BootId(Uuid::new_v4());
    let identity = Identity {
        node_id: config.node_id.clone(),
        machine_id: config.machine_id.clone(),
        boot_id,
        address: config.address(bound),
        version: env!("CARGO_PKG_VERSION").into(),
        labels: config.labels.clone(),
        capabilities: Capabilities { gpus: gpus.inventory().to_vec(), ..daemon_kit::config::machine() },
    };
    tracing::info!(node_id = %identity.node_id, %boot_id, address = identity.address, %bound, "pool-managerd starts");
    let seed = boot_id.0.as_u64_pair().0;
    let intent_file = IntentFile::new(&config.runtime_dir, &config.node_id);
    let agent =
        Agent::new(identity, config.heartbeat_interval, seed, intent_file).map_err(|_| StartError::Client)?;
    agent.watch_models(config.models_dir.clone());
    let stop = CancellationToken::new();

    let watcher =
        HandoffWatcher::new(&config.runtime_dir, config.engine_hosts.clone(), config.watch_interval)?;
    let (changes, watching) = watcher.start(stop.clone());
    let supervision = config.supervision.as_ref();
    let supervision = supervision.map(|own| registry::supervise(&agent, &config, own, seed)).transpose()?;
    let following = tokio::spawn(registry::follow(Arc::clone(&agent), changes));
    agent.watch_gpus(gpus);
    let session = match &config.control_plane {
        Some(url) => {
            let client = tls.client.reqwest(HttpControlPlane::client()).build();
            let client = client.map_err(|_| StartError::Client)?;
            let tokens = config.tokens.clone();
            let credentials = Arc::new(move || tokens.authorization());
            let control = HttpControlPlane::new(url, client, credentials, daemon_kit::tls::explain);
            Some(tokio::spawn(Arc::clone(&agent).keep_session(control)))
        }
        None => None,
    };
    let counts = Arc::new(Counts::default());
    let node = api::Node {
        agent: Arc::clone(&agent),
        supervision: supervision.clone(),
        alone: session.is_none(),
        tokens: config.tokens.clone(),
        connections: Arc::clone(&counts),
    };
    if tls.server.is_none() && !daemon_kit::config::is_loopback(config.addr) {
        tracing::warn!(
            "plain HTTP on a network: whoever listens there reads tokens and prompts; set POOL_MANAGERD_TLS_CERT and POOL_MANAGERD_TLS_KEY"
        );
    }
    let gate = Gate {
        tokens: config.tokens.clone(),
        needs: api::needs,
        certificate: config.tls.client_ca.as_ref().map(|_| config.control_name.clone()),
        nodes_show_certificates: false,
        quota: None,
        origins: Vec::new(),
    };
    let app = serve::with_layers(api::router(node.clone()), Edge { gate, audit });
    let options = ServeOptions { tls: tls.server, counts, ..ServeOptions::default() };
    let server = tokio::spawn(connections::run(listener, app, options, stop.clone(), LINGER));
    let beside = TaskTracker::new();
    if let Some(listener) = metrics_listener {
        let app =
            serve::with_layers(api::open_router(node), Edge { gate: Gate::open(), audit: Audit::default() });
        beside.spawn(connections::run(listener, app, ServeOptions::default(), stop.clone(), LINGER));
    }
    beside.spawn(config.tokens.clone().follow(stop.clone()));
    if let Some(own) = tls.own {
        beside.spawn(own.follow(stop.clone()));
    }

    serve::stop_signal().await;
    tracing::info!("stopping: no new work");
    agent.drain_and_leave(config.shutdown_grace).await;
    if let Some(supervision) = &supervision {
        supervision.stop().await;
    }
    if let Some(session) = session
        && tokio::time::timeout(LEAVE_TIMEOUT, session).await.is_err()
    {
        tracing::warn!("the control plane did not answer the farewell in time");
    }
    stop.cancel();
    agent.stop().await;
    beside.close();
    let ended = server.await;
    // The follower ends with the watcher's channel; a look at a dead mount may never end.
    let _ = tokio::time::timeout(LINGER, async { tokio::join!(watching, following, beside.wait()) }).await;
    match ended {
        Ok(result) => result.map_err(StartError::Serve),
        Err(_) => Ok(()),
    }
}
