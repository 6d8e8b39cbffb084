//! Home or cloud is decided here and nowhere else.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use daemon_kit::auth::{Gate, Shapes};
use daemon_kit::byte_budget::{BodyBudgets, ByteBudget};
use daemon_kit::calls::Calls;
use daemon_kit::connections::{ConnLimits, Counts, Streaming};
use daemon_kit::directories::{self, DirectoryError};
use daemon_kit::directory_lock::{DirectoryLock, InUse};
use daemon_kit::front::{Front, FrontError, Shown};
use daemon_kit::quota::Quota;
use daemon_kit::{Clock, serve};
use handoff_watcher::watch::WatchError;
use node_agent::AssemblyError;
use owned_tasks::{StreamThreads, Unfinished, Worker};
use pool_registry_types::routes;
use task_scheduler::{ControlCore, Event, WaitingTasks};
use task_stream::HoldBudget;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::field;
use uuid::Uuid;

use crate::api::v1;
use crate::app::router;
use crate::app::state::App;
use crate::config::Config;
use crate::services::artifacts::Artifacts;
use crate::services::catalog::{Catalog, CatalogError, ModelState};
use crate::services::control::{self, Control};
use crate::services::dispatch::Relays;
use crate::services::expected::{ExpectedError, ExpectedNodes};
use crate::services::handoff::Home;
use crate::services::link::{HttpLink, NodeLink};
use crate::services::measured::Measured;
use crate::services::placement;
use crate::services::registry::ServiceRegistryHandle;
use crate::services::streams::Streams;

/// Bytes of nodes' requests that are read at a time, half of them of one token.
const NODE_BODY_BYTES: usize = 32 * 1024 * 1024;

/// How often a stopping daemon looks whether its tasks have ended.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How often it says what it waits for, where that has changed.
const SAY_EVERY: Duration = Duration::from_secs(1);

/// Artifacts that wait to be written or read at most; each may hold 4 MiB. Source: .specs/01 CLOUD-2758.
const WAITING_ARTIFACTS: usize = 16;

/// What links are waited for at the end; each waits for less.
const LINKS_BOUND: Duration = Duration::from_secs(2);

/// Why the control plane does not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    Front(#[from] FrontError),
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error(transparent)]
    InUse(#[from] InUse),
    #[error("ORCHESTRATORD_RUNTIME_DIR: {0}")]
    RuntimeDir(#[source] WatchError),
    #[error("ORCHESTRATORD_DATA_DIR: {0}")]
    DataDir(#[from] CatalogError),
    #[error("ORCHESTRATORD_DATA_DIR: {0}")]
    Expected(#[from] ExpectedError),
    #[error("the HTTP client cannot be made")]
    Client(#[from] reqwest::Error),
    #[error("ORCHESTRATORD_STREAM_THREADS: a thread cannot be started: {0}")]
    Threads(#[source] io::Error),
    #[error("the thread for artifacts cannot be started: {0}")]
    Worker(#[source] io::Error),
    #[error("the control loop ended by a defect, see the log")]
    LoopEnded,
    #[error("serving failed")]
    Serve(#[source] io::Error),
}

impl From<AssemblyError> for StartError {
    fn from(error: AssemblyError) -> Self {
        match error {
            AssemblyError::RuntimeDir(error) => Self::RuntimeDir(error),
            AssemblyError::Client(error) => Self::Client(error),
        }
    }
}

/// One line with what is in use.
fn say_start(config: &Config, bound: SocketAddr) {
    let scheme = if config.shared.serves_tls() { "https" } else { "http" };
    let url = format!("{scheme}://{bound}");
    let (data_dir, strategy) = (config.data_dir.display(), config.policy.strategy.as_str());
    let Some(home) = &config.home else {
        tracing::info!(url, %bound, profile = "cloud", strategy, %data_dir, "orchestratord starts");
        return;
    };
    let engines = home.engines.as_ref();
    tracing::info!(
        url, %bound, profile = "home", strategy, %data_dir,
        runtime_dir = %home.runtime_dir.display(), models_dir = %home.models_dir.display(),
        pools = engines.map(|engines| field::display(engines.pools.display())),
        logs_dir = engines.map(|engines| field::display(engines.logs_dir.display())),
        packages_dir = engines.map(|engines| field::display(engines.packages_dir.display())),
        "orchestratord starts"
    );
}

/// Keeps other daemons from the directories that this one writes.
async fn hold_directories(config: &Config) -> Result<Vec<DirectoryLock>, InUse> {
    let mut directories = vec![("DATA_DIR", &config.data_dir)];
    if let Some(home) = &config.home {
        directories.push(("RUNTIME_DIR", &home.runtime_dir));
        directories.extend(home.engines.as_ref().map(|engines| ("LOGS_DIR", &engines.logs_dir)));
    }
    let mut held = Vec::new();
    for (setting, path) in directories {
        held.extend(DirectoryLock::hold("ORCHESTRATORD", setting, path, "orchestratord").await?);
    }
    Ok(held)
}

pub(crate) async fn run(config: Config) -> Result<(), StartError> {
    // Only the first installation in a process can fail, and this is the first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let writable = |setting, path: &Path| directories::writable("ORCHESTRATORD", setting, path);
    writable("DATA_DIR", &config.data_dir)?;
    if let Some(engines) = config.home.as_ref().and_then(|home| home.engines.as_ref()) {
        writable("RUNTIME_DIR", &engines.runtime_dir)?;
        writable("LOGS_DIR", &engines.logs_dir)?;
    }
    let _held = hold_directories(&config).await?;
    let front = Front::open(&config.shared.front).await?;
    say_start(&config, front.bound);
    let tokens = config.shared.tokens;
    let interval = config.policy.timing.heartbeat_interval;
    let catalog = Arc::new(Catalog::open(&config.data_dir)?);
    let expected = Arc::new(ExpectedNodes::open(&config.data_dir, config.policy.max_nodes)?);
    let home = config.home.as_ref();
    let home = home.map(|home| Home::new(home, &config.data_dir, interval, &front.loops)).transpose()?;
    let clock = Clock::default();
    let threads = StreamThreads::start(config.stream_threads).map_err(StartError::Threads)?;
    let (link, drivers) = match &home {
        Some(home) => (NodeLink::Local(home.node.clone()), Vec::new()),
        None => {
            let (http, drivers) = HttpLink::new(&front.tls.client, tokens.clone(), clock, &threads)?;
            (NodeLink::Http(Box::new(http)), drivers)
        }
    };
    let streams = Streams::new(config.event_log_bytes, config.live_log_bytes);
    let streams = Arc::new(match link.links() {
        Some(links) => streams.counting(links.table.parts_bytes()),
        None => streams,
    });
    let relays = Arc::new(Relays {
        clock,
        link,
        streams: Arc::clone(&streams),
        threads: threads.clone(),
        held_answers: HoldBudget::new(config.held_answer_bytes),
        measured: Arc::new(Measured::new(config.metrics_callers)),
    });
    let core = ControlCore::new(config.policy, Uuid::new_v4().as_u64_pair().0);
    let (control, inbox) = control::mailbox(clock);
    let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
    let loop_stop = CancellationToken::new();
    let deciding =
        placement::run(core, Arc::clone(&relays), control.clone(), inbox, tracker.clone(), loop_stop.clone());
    // Not started again: what it had decided may be half done. The daemon ends with it.
    let deciding = owned_tasks::watched_on(threads.first().handle(), "control loop", deciding);
    for model in config.gateway.names() {
        control.send(Event::SetNamed { model, named: true }).await;
    }
    for entry in catalog.list() {
        control.send(Event::SetNamed { model: entry.model_id.clone(), named: true }).await;
        if entry.state == ModelState::Retired {
            control.send(Event::SetRetired { model: entry.model_id, retired: true }).await;
        }
    }
    // They end last: the stops of what is cut off go by them.
    let (links, links_stop) = (TaskTracker::new(), CancellationToken::new());
    for (driver, thread) in drivers.into_iter().zip(threads.iter()) {
        let thread = thread.handle().clone();
        let (control, calls, stop) = (control.clone(), links.clone(), links_stop.clone());
        // What it knows outlives a defect in it.
        let driver = Arc::new(Mutex::new(driver));
        let drive = move || {
            let (driver, control, calls) = (Arc::clone(&driver), control.clone(), calls.clone());
            let stop = stop.clone();
            let run = async move { driver.lock().await.run(control, calls, stop).await };
            let thread = thread.clone();
            async move {
                match owned_tasks::elsewhere(&thread, "links", run).await {
                    Ok(()) | Err(Unfinished::CutOff(_)) => {}
                    Err(Unfinished::Panicked(panicked)) => panicked.resume(),
                }
            }
        };
        front.loops.start(&links, "links", &links_stop, drive);
    }
    let home = home.map(|home| home.start(control.clone()));
    let quota = Arc::new(Quota::new(config.requests_per_second, config.tasks_per_token));
    let (counts, calls) = (Arc::new(Counts::default()), Arc::new(Calls::default()));
    let state = Arc::new(App {
        service_registry: ServiceRegistryHandle::new(control.clone()),
        control: control.clone(),
        streams,
        keys: Arc::default(),
        relays,
        catalog,
        catalog_order: Arc::default(),
        artifacts: Arc::new(Artifacts::new(&config.data_dir)),
        gateway: config.gateway,
        artifact_worker: Worker::start("artifacts", WAITING_ARTIFACTS).map_err(StartError::Worker)?,
        cloud_profile: config.home.is_none(),
        node_addresses: Arc::new(config.node_addresses),
        quota: Arc::clone(&quota),
        report_shares: Arc::default(),
        bodies: Arc::new(BodyBudgets {
            clients: ByteBudget::new(config.queue_bytes),
            nodes: ByteBudget::new(NODE_BODY_BYTES),
        }),
        expected: Arc::clone(&expected),
        tokens: tokens.clone(),
        connections: Arc::clone(&counts),
        calls: Arc::clone(&calls),
        certificate: front.tls.own.clone(),
        loops: front.loops.clone(),
    });
    let gate = Gate {
        tokens,
        needs: router::needs,
        certificate: None,
        nodes_show_certificates: config.shared.front.tls.client_ca.is_some(),
        quota: Some(quota),
        origins: config.origins,
        hosts: config.hosts,
        shapes: Some(Shapes { is_theirs: v1::is_ours, shape: v1::shape }),
    };
    let (tokens, reported, ended) = (state.tokens.clone(), control.clone(), stop.clone());
    let telling = move || {
        let reported = reported.clone();
        tokens.clone().notify_changes(ended.clone(), move || {
            let reported = reported.clone();
            async move { reported.send(Event::TokensChanged).await }
        })
    };
    state.loops.start(&tracker, "changes of tokens", &stop, telling);
    if state.cloud_profile {
        let ended = stop.clone();
        let keep = move || Arc::clone(&expected).keep(ended.clone());
        state.loops.start(&tracker, "expected nodes", &stop, keep);
    }
    let open_routes = router::metrics(state.clone());
    let streaming = Streaming { threads: threads.clone(), is_stream: router::is_stream };
    let limits = ConnLimits { stalled: config.stalled_write, ..ConnLimits::default() };
    let shown = Shown {
        routes: router::router(state),
        page: Some(routes::API_PAGE),
        gate,
        counts,
        calls,
        limits,
        streaming,
        answers_after_end: Some(|path| path.starts_with("/v2/")),
        open_routes,
    };
    let server = front.serve(shown, &tracker, &stop);

    tokio::pin!(deciding);
    tokio::select! {
        () = serve::stop_signal() => {}
        // Without its one owner nothing here can be trusted: whoever watches us starts us anew.
        _ = &mut deciding => return Err(StartError::LoopEnded),
    }
    tracing::info!("stopping: nothing new is admitted");
    control.send(Event::Drain).await;
    finish_tasks(&control, config.shared.shutdown_grace).await;
    control.send(Event::CutOff).await;
    if let Some(home) = home {
        home.leave(Duration::ZERO).await;
    }
    stop.cancel();
    let ended = server.await;
    loop_stop.cancel();
    tracker.close();
    let all = async { tokio::join!(tracker.wait(), deciding) };
    if tokio::time::timeout(Duration::from_secs(3), all).await.is_err() {
        tracing::warn!("some relays did not end in time");
    }
    links_stop.cancel();
    links.close();
    if tokio::time::timeout(LINKS_BOUND, links.wait()).await.is_err() {
        tracing::warn!("some links did not end in time");
    }
    // Whatever else was on them has ended; links run there to their own end.
    drop(threads);
    ended.map_or(Ok(()), |result| result.map_err(StartError::Serve))
}

/// Waits until every task has ended that runs or that some pool might take, for `grace` at most, and
/// says meanwhile what is waited for.
async fn finish_tasks(control: &Control, grace: Duration) {
    let finished = async {
        let mut reported = None;
        loop {
            // A full mailbox is no answer: look again.
            if let Ok(facts) = control.published.facts_now().await {
                let unknown = WaitingTasks { startable: facts.queued, ..WaitingTasks::default() };
                let WaitingTasks { startable, stuck, reason, .. } = facts.waiting.unwrap_or(unknown);
                if facts.running + startable == 0 {
                    if stuck > 0 {
                        let waiting_for = reason.map(tracing::field::display);
                        tracing::warn!(tasks = stuck, waiting_for, "tasks that no pool could take are ended");
                    }
                    return;
                }
                let now = (facts.running, startable, stuck);
                let due = reported
                    .is_none_or(|(before, at): (_, Instant)| before != now && at.elapsed() >= SAY_EVERY);
                if due {
                    let (running, waiting) = (facts.running, startable);
                    tracing::info!(running, waiting, no_pool = stuck, "waiting for tasks to end");
                    reported = Some((now, Instant::now()));
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    if tokio::time::timeout(grace, finished).await.is_err() {
        tracing::warn!("the grace is over: running tasks are cut off");
    }
}
