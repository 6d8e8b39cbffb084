//! From configuration to a serving node, and back down.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use daemon_kit::auth::Gate;
use daemon_kit::calls::Calls;
use daemon_kit::connections::{ConnLimits, Counts, Streaming};
use daemon_kit::directories::{self, DirectoryError};
use daemon_kit::directory_lock::{DirectoryLock, InUse};
use daemon_kit::front::{Front, FrontError, Shown};
use daemon_kit::hosts::AllowedHosts;
use daemon_kit::serve;
use handoff_watcher::watch::WatchError;
use node_agent::{Assembled, Assembly, AssemblyError, Identity};
use node_registration::HttpControlPlane;
use owned_tasks::StreamThreads;
use pool_registry_types::BootId;
use pool_registry_types::node::{LINK_FEATURE, OPENAI_FEATURE};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::field;
use uuid::Uuid;

use crate::api;
use crate::config::Config;
use crate::state::App;

/// How long leaving the cluster may take, once attempts have finished.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(6);
/// How long watchers of files may take to end.
const LINGER: Duration = Duration::from_secs(1);

/// Why the node does not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    Front(#[from] FrontError),
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error(transparent)]
    InUse(#[from] InUse),
    #[error("POOL_MANAGERD_RUNTIME_DIR: {0}")]
    RuntimeDir(#[source] WatchError),
    #[error("POOL_MANAGERD_STREAM_THREADS: a thread cannot be started: {0}")]
    Threads(#[source] io::Error),
    #[error("the HTTP client cannot be made")]
    Client,
    #[error("serving failed")]
    Serve(#[source] io::Error),
}

impl From<AssemblyError> for StartError {
    fn from(error: AssemblyError) -> Self {
        match error {
            AssemblyError::RuntimeDir(error) => Self::RuntimeDir(error),
            AssemblyError::Client(_) => Self::Client,
        }
    }
}

pub(crate) async fn run(config: Config) -> Result<(), StartError> {
    // Only the first installation in a process can fail, and this is the first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let writable = |setting, path: &Path| directories::writable("POOL_MANAGERD", setting, path);
    writable("STATE_DIR", &config.state_dir)?;
    if let Some(engines) = &config.node.engines {
        writable("RUNTIME_DIR", &engines.runtime_dir)?;
        writable("LOGS_DIR", &engines.logs_dir)?;
    }
    let who = format!("pool-managerd {}", config.node_id);
    let hold = async |setting, path: &Path| DirectoryLock::hold("POOL_MANAGERD", setting, path, &who).await;
    let _runtime = hold("RUNTIME_DIR", &config.node.runtime_dir).await?;
    let _logs = match &config.node.engines {
        Some(engines) => hold("LOGS_DIR", &engines.logs_dir).await?,
        None => None,
    };
    let front = Front::open(&config.shared.front).await?;
    let (bound, loops) = (front.bound, front.loops.clone());
    let boot_id = BootId(Uuid::new_v4());
    let identity = Identity {
        node_id: config.node_id.clone(),
        machine_id: config.machine_id.clone(),
        boot_id,
        address: config.address(bound),
        version: env!("CARGO_PKG_VERSION").into(),
        labels: config.node.labels.clone(),
        capabilities: daemon_kit::config::machine(),
        features: vec![LINK_FEATURE.into(), OPENAI_FEATURE.into()],
    };
    tracing::info!(
        node_id = %identity.node_id, %boot_id, address = identity.address, %bound,
        control_plane = config.control_plane.as_deref().unwrap_or("none"),
        runtime_dir = %config.node.runtime_dir.display(), state_dir = %config.state_dir.display(),
        models_dir = %config.node.models_dir.display(),
        pools = config.node.engines.as_ref().map(|engines| field::display(engines.pools.display())),
        logs_dir = config.node.engines.as_ref().map(|engines| field::display(engines.logs_dir.display())),
        packages_dir = config.node.engines.as_ref().map(|engines| field::display(engines.packages_dir.display())),
        "pool-managerd starts"
    );
    let assembly = Assembly {
        identity,
        state_dir: config.state_dir,
        heartbeat_interval: config.heartbeat_interval,
        watch_interval: config.watch_interval,
        held_bytes: config.held_bytes,
        hangups: daemon_kit::hangups::subscribe(),
    };
    let stop = CancellationToken::new();
    let Assembled { node: own, watching } = assembly.start(&config.node, &loops, &stop)?;
    let agent = Arc::clone(own.agent());
    agent.keep_links();
    let session = match &config.control_plane {
        Some(url) => {
            let client = front.tls.client.reqwest(HttpControlPlane::client()).build();
            let client = client.map_err(|_| StartError::Client)?;
            let tokens = config.shared.tokens.clone();
            let credentials = Arc::new(move || tokens.authorization());
            let control = HttpControlPlane::new(url, client, credentials, daemon_kit::tls::explain);
            Some(agent.keep_session(control))
        }
        None => None,
    };
    let (counts, calls) = (Arc::new(Counts::default()), Arc::new(Calls::default()));
    let node = Arc::new(App {
        agent: Arc::clone(&agent),
        own: own.clone(),
        alone: session.is_none(),
        tokens: config.shared.tokens.clone(),
        connections: Arc::clone(&counts),
        calls: Arc::clone(&calls),
        certificate: front.tls.own.clone(),
    });
    let gate = Gate {
        tokens: config.shared.tokens.clone(),
        needs: api::needs,
        certificate: config.shared.front.tls.client_ca.as_ref().map(|_| config.control_name.clone()),
        nodes_show_certificates: false,
        quota: None,
        origins: Vec::new(),
        hosts: AllowedHosts::default(),
        shapes: None,
    };
    let beside = TaskTracker::new();
    let (tokens, reported, ended) = (config.shared.tokens.clone(), Arc::clone(&agent), stop.clone());
    let telling = move || {
        let reported = Arc::clone(&reported);
        tokens.clone().notify_changes(ended.clone(), move || {
            reported.check_links();
            reported.tokens_changed();
            std::future::ready(())
        })
    };
    loops.start(&beside, "changes of tokens", &stop, telling);
    let open_routes = api::open_router(node.clone());
    let threads = StreamThreads::start(config.stream_threads).map_err(StartError::Threads)?;
    agent.stream_on(threads.clone());
    let streaming = Streaming { threads, is_stream: api::is_stream };
    let limits = ConnLimits::default();
    let shown = Shown {
        routes: api::router(node),
        page: None,
        gate,
        counts,
        calls,
        limits,
        streaming,
        answers_after_end: None,
        open_routes,
    };
    let server = front.serve(shown, &beside, &stop);

    serve::stop_signal().await;
    tracing::info!("stopping: no new work");
    own.drain_and_leave(config.shared.shutdown_grace).await;
    if let Some(session) = session
        && tokio::time::timeout(LEAVE_TIMEOUT, session).await.is_err()
    {
        tracing::warn!("the control plane did not answer the deregistration in time");
    }
    stop.cancel();
    agent.stop().await;
    beside.close();
    let ended = server.await;
    // A look at a dead mount may never end.
    let _ = tokio::time::timeout(LINGER, async { tokio::join!(watching, beside.wait()) }).await;
    match ended {
        Ok(result) => result.map_err(StartError::Serve),
        Err(_) => Ok(()),
    }
}
