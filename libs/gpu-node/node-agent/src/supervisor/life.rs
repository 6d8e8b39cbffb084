//! One life of one engine: its guard, its first good health call, its handoff, its end.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use handoff_watcher::{HandoffName, handoff};
use node_core::supervisor::{Happened, ReplicaKey, RunId};
use owned_tasks::{Panicked, blocking, caught};
use pool_registry_types::{PoolId, ReplicaId};
use serde::{Deserialize, Serialize};
use serde_json::json;
use span_export::{Kind, Span};
use tokio_util::sync::CancellationToken;

use crate::engines::{self, EngineFacts, Look};
use crate::guard::link::Guarded;
use crate::guard::{GuardReport, GuardSpec, crash_name, output, processes};
use crate::pools_file::Provision;
use crate::replica::endpoint;
use crate::supervisor::launch::{self, Launch, Spec};
use crate::supervisor::shell::Supervision;
use crate::supervisor::state::Life;

/// Pause between two looks at an engine that loads.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Bytes of output after which a log is turned over.
const LOG_BYTES: u64 = 10 * 1024 * 1024;
/// Lines of an engine that has ended which its pool shows.
const TAIL_LINES: usize = 20;
/// Longest path of a Unix socket, bytes. Source: unix(7).
const LONGEST_SOCKET: usize = 107;

/// Why an engine was not started.
#[derive(Debug, thiserror::Error)]
enum LaunchError {
    #[error("its guard does not start: {0}")]
    Guard(io::Error),
    #[error("keep_on_exit: {0}")]
    Folder(io::Error),
    #[error(
        "keep_on_exit: {} is longer than {LONGEST_SOCKET} bytes, which is the most for a socket: choose a shorter POOL_MANAGERD_RUNTIME_DIR",
        .0.display()
    )]
    LongSocket(PathBuf),
    #[error("ports: {0} is in use by another program; find it with: ss -ltnp sport = :{0}")]
    PortTaken(u16),
    #[error("ports: {port}: {error}")]
    Port { port: u16, error: io::Error },
    #[error("no free port: {0}")]
    NoPort(io::Error),
}

/// How a life has ended.
struct Ended {
    how: String,
    /// Its last lines.
    tail: Vec<String>,
    /// It has crashed, and one task alone may have made it.
    has_culprit: bool,
}

impl Ended {
    fn plainly(how: impl Into<String>) -> Self {
        Self { how: how.into(), tail: Vec::new(), has_culprit: false }
    }

    fn happened(self, run: RunId) -> Happened {
        let Self { how, tail, has_culprit } = self;
        Happened::Exited { run, how, tail, has_culprit }
    }
}

/// What a kept engine's guard tells the next daemon.
#[derive(Debug, Serialize, Deserialize)]
struct About {
    pool_id: PoolId,
    replica_id: ReplicaId,
    fingerprint: u64,
    url: String,
}

impl Supervision {
    /// Where guards of kept engines are found.
    fn guards(&self) -> PathBuf {
        self.settings.runtime_dir.join(format!(".guards-{}", self.agent.identity().node_id))
    }

    /// All run tags of this node's engines begin with this.
    fn run_tag_prefix(&self) -> String {
        let folder = self.settings.runtime_dir.canonicalize().unwrap_or(self.settings.runtime_dir.clone());
        format!("{}@{}#", self.agent.identity().node_id, folder.display())
    }

    pub(crate) fn begin(self: &Arc<Self>, run: RunId, replica_key: ReplicaKey, fingerprint: u64) {
        let (spec, launch) = {
            let state = self.state.lock();
            (state.specs.get(&fingerprint).cloned(), state.launches.get(&fingerprint).cloned())
        };
        let (Some(spec), Some(launch)) = (spec, launch) else {
            // Plans that are started were prepared, and kept; a pool must not wait for ever if not.
            let supervision = Arc::clone(self);
            owned_tasks::task(&self.agent.tracker, "engine without a plan", async move {
                let ended = Ended::plainly("its plan is not known any more");
                supervision.send(ended.happened(run)).await;
            });
            return;
        };
        let (stop, release) = self.enlist(run, Life::new(spec.pool.keep_on_exit, fingerprint));
        let supervision = Arc::clone(self);
        owned_tasks::task(&self.agent.tracker, "life of an engine", async move {
            let life = async {
                let starting = starting(&replica_key, &spec);
                match supervision.open(run, &replica_key, &spec, &launch).await {
                    Ok(Opened::Guard(guarded)) => {
                        supervision.live(run, &replica_key, &spec, (*guarded, starting), stop, release).await
                    }
                    Ok(Opened::Elsewhere) => supervision.live_elsewhere(run, stop, release).await,
                    Err(error) => {
                        if let Some(span) = starting {
                            span.failed("not launched").end();
                        }
                        Some(Ended::plainly(error.to_string()))
                    }
                }
            };
            let ended = caught("life of an engine", life).await.unwrap_or_else(defect);
            supervision.over(run, &replica_key, ended).await;
        });
    }

    /// Returns what the loop stops the life by, and what it lets it go by.
    fn enlist(&self, run: RunId, life: Life) -> (CancellationToken, CancellationToken) {
        let tokens = (life.stop.clone(), life.release.clone());
        self.state.lock().lives.insert(run, life);
        tokens
    }

    /// The engine is gone, unless it was released.
    async fn over(&self, run: RunId, replica_key: &ReplicaKey, ended: Option<Ended>) {
        let Some(ended) = ended else { return };
        let life = self.state.lock().lives.remove(&run);
        let (pool_id, replica_id, how) = (&replica_key.pool_id, &replica_key.replica_id, &ended.how);
        // One that this daemon has ended itself is nothing to be warned of.
        if life.is_some_and(|life| life.stop.is_cancelled()) {
            tracing::info!(%pool_id, %replica_id, run = run.0, how, "an engine is ended");
        } else {
            let has_culprit = ended.has_culprit;
            tracing::warn!(%pool_id, %replica_id, run = run.0, how, has_culprit, "an engine is gone");
        }
        self.send(ended.happened(run)).await;
    }

    async fn open(
        &self,
        run: RunId,
        replica_key: &ReplicaKey,
        spec: &Spec,
        launch: &Launch,
    ) -> Result<Opened, LaunchError> {
        let program = match launch {
            Launch::External { url } => {
                let url = url.as_deref().unwrap_or_default().trim_end_matches('/').to_owned();
                self.with_life(run, |life| life.url = url);
                return Ok(Opened::Elsewhere);
            }
            Launch::Program(program) => program,
        };
        let port = port(spec, &replica_key.replica_id)?;
        let url = format!("http://127.0.0.1:{port}");
        self.with_life(run, |life| life.url.clone_from(&url));
        let (path, args) = program.command(spec, replica_key, port);
        let about = About {
            pool_id: replica_key.pool_id.clone(),
            replica_id: replica_key.replica_id.clone(),
            fingerprint: spec.fingerprint(),
            url,
        };
        let life_id = uuid::Uuid::new_v4();
        let keep_at = match spec.pool.keep_on_exit {
            true => Some(self.socket(replica_key, life_id)?),
            false => None,
        };
        let guard_spec = GuardSpec {
            program: path,
            args,
            env: program.env.clone(),
            log: launch::log_path(
                &self.settings.logs_dir,
                &replica_key.pool_id,
                replica_key.replica_id.as_str(),
            ),
            log_bytes: LOG_BYTES,
            grace_ms: spec.pool.stop_grace_secs.saturating_mul(1_000),
            keep_at,
            about: serde_json::to_string(&about).unwrap_or_default(),
            run_tag: format!("{}{life_id}", self.run_tag_prefix()),
        };
        let guarded = Guarded::start(&self.settings.program, &guard_spec).await;
        guarded.map(|guarded| Opened::Guard(Box::new(guarded))).map_err(LaunchError::Guard)
    }

    /// Of this one life: the guard of another one that ends meanwhile takes only its own away.
    fn socket(&self, replica_key: &ReplicaKey, life_id: uuid::Uuid) -> Result<PathBuf, LaunchError> {
        let folder = self.guards();
        let folder = folder.canonicalize().or_else(|_| {
            std::fs::create_dir_all(&folder)?;
            folder.canonicalize()
        });
        let (short, ..) = life_id.as_fields();
        let path = folder.map_err(LaunchError::Folder)?;
        let path = path.join(format!("{replica_key}.{short:08x}.sock"));
        if path.as_os_str().len() > LONGEST_SOCKET {
            return Err(LaunchError::LongSocket(path));
        }
        Ok(path)
    }

    fn with_life(&self, run: RunId, change: impl FnOnce(&mut Life)) {
        if let Some(life) = self.state.lock().lives.get_mut(&run) {
            change(life);
        }
    }

    /// Follows an engine until it is gone, or released. Returns how it ended. The span is that of its start,
    /// until it is ready for the first time, or over before.
    async fn live(
        &self,
        run: RunId,
        replica_key: &ReplicaKey,
        spec: &Spec,
        (mut guarded, mut starting): (Guarded, Option<Span>),
        stop: CancellationToken,
        release: CancellationToken,
    ) -> Option<Ended> {
        // Known as soon as the engine itself is gone, which its helpers may outlive.
        let mut has_culprit = None;
        let mut ready = false;
        let mut stopped = false;
        let looking = self.until_ready(run, spec);
        tokio::pin!(looking);
        loop {
            tokio::select! {
                () = release.cancelled() => return None,
                reported = guarded.heard() => match reported {
                    GuardReport::Started { pid, .. } => self.with_life(run, |life| life.pid = Some(pid)),
                    GuardReport::Alarm { line } => {
                        // The line may be a client's text.
                        tracing::warn!(pool_id = %replica_key.pool_id, replica_id = %replica_key.replica_id, "an engine's log shows a fatal driver error");
                        self.send(Happened::Alarmed { run, line }).await;
                    }
                    GuardReport::Crashed { signal } => {
                        // Its helpers may hold its address for a moment longer.
                        self.agent.withdraw(&replica_key.pool_id, &replica_key.replica_id);
                        has_culprit = Some(self.agent.engine_ended(replica_key, crash_name(signal)));
                    }
                    GuardReport::Ended { how, signal } => {
                        let ended = || self.agent.engine_ended(replica_key, signal.and_then(crash_name));
                        let has_culprit = has_culprit.unwrap_or_else(ended);
                        let log = launch::log_path(&self.settings.logs_dir, &replica_key.pool_id, replica_key.replica_id.as_str());
                        let tail = blocking("log of an engine", move || output::tail(&log, TAIL_LINES)).await;
                        guarded.reap().await;
                        if let Some(span) = starting.take() {
                            span.failed(if stopped { "stopped" } else { "ended" }).end();
                        }
                        return Some(Ended { how, tail: tail.unwrap_or_default(), has_culprit });
                    }
                },
                () = stop.cancelled(), if !stopped => {
                    stopped = true;
                    guarded.stop().await;
                }
                facts = &mut looking, if !ready && !stopped => {
                    ready = true;
                    if let Some(span) = starting.take() {
                        span.end();
                    }
                    self.with_life(run, |life| life.facts = facts);
                    self.send(Happened::Ready { run }).await;
                }
            }
        }
    }

    /// An engine that somebody else runs: it is there as long as it is wanted. Whether it answers
    /// is watched as for every handoff.
    async fn live_elsewhere(
        &self,
        run: RunId,
        stop: CancellationToken,
        release: CancellationToken,
    ) -> Option<Ended> {
        self.send(Happened::Ready { run }).await;
        tokio::select! {
            () = release.cancelled() => None,
            () = stop.cancelled() => Some(Ended::plainly("it is not wanted any more")),
        }
    }

    async fn until_ready(&self, run: RunId, spec: &Spec) -> EngineFacts {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let url = self.state.lock().lives.get(&run).map(|life| life.url.clone()).unwrap_or_default();
            let Ok(at) = endpoint(&url, spec.pool.api_key_file.as_deref()).await else { continue };
            let models = std::slice::from_ref(&spec.pool.model);
            let look = Look { client: self.agent.client(), at: &at, models };
            if let Ok(facts) = engines::probe(spec.pool.engine, &look).await {
                return facts;
            }
        }
    }

    // ---- handoff files ----

    fn handoff_path(&self, replica_key: &ReplicaKey) -> PathBuf {
        self.settings.runtime_dir.join(format!("{replica_key}.json"))
    }

    /// The engine takes attempts from now on.
    pub(crate) async fn publish(&self, run: RunId, replica_key: &ReplicaKey) {
        let Some(published) = self.published(run, replica_key) else { return };
        match published {
            // An external engine that announces itself, and may have done so before.
            Published::ByItself => self.agent.bind_announced(&replica_key.pool_id),
            Published::ByUs { handoff, is_started } => {
                if is_started {
                    self.agent.engine_began(replica_key);
                }
                // By the rules for files: an external engine may be where none may be.
                match handoff::parse(
                    &replica_key.to_string(),
                    handoff.as_bytes(),
                    &self.settings.engine_hosts,
                ) {
                    Ok(own) => self.agent.announce(own),
                    Err(fault) => {
                        tracing::warn!(pool_id = %replica_key.pool_id, replica_id = %replica_key.replica_id, reason = %fault, "an engine is not bound");
                        let (pool_id, replica_id) =
                            (replica_key.pool_id.clone(), replica_key.replica_id.clone());
                        let name = HandoffName { pool_id, replica_id };
                        self.agent.set_binding_problem(&name, Some(fault.to_string()));
                    }
                }
                self.write_handoff(run, replica_key, handoff).await;
            }
        }
    }

    /// What is to be told of the engine; nothing of one that is gone.
    fn published(&self, run: RunId, replica_key: &ReplicaKey) -> Option<Published> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let life = state.lives.get(&run)?;
        let spec = state.specs.get(&life.fingerprint)?;
        if life.url.is_empty() {
            return Some(Published::ByItself);
        }
        let ctx = match state.launches.get(&life.fingerprint) {
            Some(Launch::Program(program)) => program.ctx(),
            _ => spec.pool.ctx,
        };
        let mut handoff = json!({
            "pool_id": replica_key.pool_id, "replica_id": replica_key.replica_id, "engine": spec.pool.engine,
            "url": life.url, "models": spec.pool.models(),
            "slots": life.facts.slots.unwrap_or(spec.pool.slots),
        });
        engines::set(&mut handoff, "engine_version", life.facts.version.clone());
        engines::set(&mut handoff, "device_mask", spec.pool.mask());
        engines::set(&mut handoff, "ctx_max", life.facts.ctx_max.or(ctx));
        engines::set(&mut handoff, "pid", life.pid);
        engines::set(&mut handoff, "api_key_file", spec.pool.api_key_file.clone());
        let is_started = !matches!(spec.pool.provision, Provision::External { .. });
        let of = (life.url.clone(), life.pid);
        state.published.insert(run, of);
        Some(Published::ByUs { handoff: handoff.to_string(), is_started })
    }

    /// For other programs: the engine serves before it is written.
    async fn write_handoff(&self, run: RunId, replica_key: &ReplicaKey, text: String) {
        let path = self.handoff_path(replica_key);
        let written = blocking("handoff file", move || {
            atomic_file::replace_in_memory(&path, text.as_bytes(), atomic_file::BY_UMASK)
                .map_err(io::Error::from)
        })
        .await;
        let was_missing = self.state.lock().unwritten.remove(&run).is_some();
        let written = written.unwrap_or_else(|panicked| Err(io::Error::other(panicked)));
        if let Err(error) = written {
            if !was_missing {
                tracing::error!(pool_id = %replica_key.pool_id, replica_id = %replica_key.replica_id, %error, "the handoff file is not written, and is tried again: the engine serves, and other programs do not find it");
            }
            self.state.lock().unwritten.insert(run, replica_key.clone());
        }
    }

    /// Handoff files that could not be written before.
    pub(crate) async fn write_again(&self) {
        let missing = self.state.lock().unwritten.clone();
        for (run, replica_key) in missing {
            match self.published(run, &replica_key) {
                Some(Published::ByUs { handoff, .. }) => self.write_handoff(run, &replica_key, handoff).await,
                _ => drop(self.state.lock().unwritten.remove(&run)),
            }
        }
    }

    pub(crate) async fn withdraw(&self, run: RunId, replica_key: &ReplicaKey) {
        self.state.lock().unwritten.remove(&run);
        // The core first: nothing new is accepted from here on.
        self.agent.withdraw(&replica_key.pool_id, &replica_key.replica_id);
        let published = self.state.lock().published.remove(&run);
        // One that announces itself has a file of its own.
        if let Some((url, pid)) = published {
            self.remove_handoff(replica_key, &url, pid).await;
        }
    }

    /// Removes the file of an engine. Another's under its name stays: whoever has written it answers for it.
    async fn remove_handoff(&self, replica_key: &ReplicaKey, url: &str, pid: Option<u32>) {
        let path = self.handoff_path(replica_key);
        // One that is gone already is as good.
        let Ok(text) = tokio::fs::read(&path).await else { return };
        let says: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
        let is_own = says["url"] == url && pid.is_none_or(|pid| says["pid"] == pid);
        if is_own {
            let _ = tokio::fs::remove_file(path).await;
        } else {
            tracing::warn!(file = %path.display(), "the handoff file is another engine's by now, and stays");
        }
    }

    // ---- what an earlier daemon has left ----

    /// Takes kept engines over where they are still wanted, and ends everything else that is
    /// left of this node's engines.
    pub(crate) async fn take_over_kept(self: &Arc<Self>) {
        let mut adopted = Vec::new();
        let entries = std::fs::read_dir(self.guards()).into_iter().flatten().flatten();
        let sockets: Vec<PathBuf> = entries
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|e| e == "sock"))
            .collect();
        for socket in sockets {
            match Guarded::take_over(&socket).await {
                Ok((guarded, pid, about)) => {
                    if let Some(replica_key) = self.take_over(guarded, pid, &about).await {
                        adopted.push(replica_key);
                    }
                }
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) =>
                {
                    tracing::info!(socket = %socket.display(), %error, "no guard answers there any more");
                    // One that is gone already is as good.
                    let _ = std::fs::remove_file(&socket);
                }
                // A guard that is slow, or another daemon's, is there: the next daemon finds it.
                Err(error) => {
                    tracing::warn!(socket = %socket.display(), %error, "a guard was not taken over");
                }
            }
        }
        let prefix = self.run_tag_prefix();
        let kept = adopted.len();
        let left = blocking("search of engines", move || {
            // A guard that lives sees to its own.
            let unguarded = |pid: &u32| !processes::is_guarded(*pid);
            let left: Vec<u32> = processes::tagged(&prefix).into_iter().filter(unguarded).collect();
            processes::signal_all(&left, nix::sys::signal::Signal::SIGKILL);
            left.len()
        })
        .await;
        if kept > 0 || left.as_ref().is_ok_and(|left| *left > 0) {
            tracing::info!(
                kept,
                killed = left.unwrap_or(0),
                "engines of an earlier daemon are taken over or ended"
            );
        }
    }

    /// Ends a kept engine.
    fn dismiss(&self, mut guarded: Guarded) {
        owned_tasks::task(&self.agent.tracker, "end of a kept engine", async move {
            guarded.stop().await;
            while !matches!(guarded.heard().await, GuardReport::Ended { .. }) {}
        });
    }

    async fn take_over(self: &Arc<Self>, guarded: Guarded, pid: u32, about: &str) -> Option<ReplicaKey> {
        let about: About = match serde_json::from_str(about) {
            Ok(about) => about,
            Err(error) => {
                // Left alone it would hold its memory for ever, and nobody would use it.
                tracing::warn!(pid, %error, "a kept engine is ended: what its guard says of it is unreadable");
                self.dismiss(guarded);
                return None;
            }
        };
        let replica_key = ReplicaKey { pool_id: about.pool_id, replica_id: about.replica_id };
        let spec = self.state.lock().specs.get(&about.fingerprint).cloned();
        let run = self.core_adopt(&replica_key, about.fingerprint);
        let (Some(spec), Some(run)) = (spec, run) else {
            tracing::info!(pool_id = %replica_key.pool_id, replica_id = %replica_key.replica_id, "a kept engine is not wanted any more");
            self.remove_handoff(&replica_key, &about.url, Some(pid)).await;
            self.dismiss(guarded);
            return None;
        };
        let life = Life { url: about.url, pid: Some(pid), ..Life::new(true, about.fingerprint) };
        let (stop, release) = self.enlist(run, life);
        let supervision = Arc::clone(self);
        let own = replica_key.clone();
        owned_tasks::task(&self.agent.tracker, "life of an engine", async move {
            let life = supervision.live(run, &own, &spec, (guarded, None), stop, release);
            let ended = caught("life of an engine", life).await.unwrap_or_else(defect);
            supervision.over(run, &own, ended).await;
        });
        Some(replica_key)
    }
}

/// A life that panicked has released its guard, which ends the engine, or keeps it for the next
/// daemon.
/// The span of an engine's start, which begins now.
fn starting(replica_key: &ReplicaKey, spec: &Spec) -> Option<Span> {
    let span = Span::first("engine start", Kind::Internal)?;
    Some(
        span.with("llorch.pool_id", replica_key.pool_id.to_string())
            .with("llorch.replica_id", replica_key.replica_id.to_string())
            .with("gen_ai.provider.name", spec.pool.engine.as_str())
            .with("gen_ai.request.model", spec.pool.model.to_string()),
    )
}

fn defect(panicked: Panicked) -> Option<Ended> {
    Some(Ended::plainly(panicked.to_string()))
}

/// By whom an engine becomes known.
enum Published {
    ByItself,
    ByUs {
        /// The content of its handoff file.
        handoff: String,
        /// This node has started it.
        is_started: bool,
    },
}

enum Opened {
    Guard(Box<Guarded>),
    /// Nothing was started.
    Elsewhere,
}

/// The replica's own port, or any that is free.
fn port(spec: &Spec, replica_id: &ReplicaId) -> Result<u16, LaunchError> {
    let n = replica_id.as_str().strip_prefix('r').and_then(|n| n.parse::<usize>().ok());
    // Beside the replica that it replaces it cannot have the same one.
    let wanted = n.and_then(|n| spec.pool.ports.get(n)).copied();
    let listener = std::net::TcpListener::bind(("127.0.0.1", wanted.unwrap_or(0)));
    let port = listener.and_then(|listener| listener.local_addr()).map(|at| at.port());
    port.map_err(|error| match wanted {
        Some(port) if error.kind() == io::ErrorKind::AddrInUse => LaunchError::PortTaken(port),
        Some(port) => LaunchError::Port { port, error },
        None => LaunchError::NoPort(error),
    })
}
