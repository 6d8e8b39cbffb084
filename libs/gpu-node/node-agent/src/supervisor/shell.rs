//! [`Supervision`]: the supervisor in the world. It reads the file of pools, looks at memory,
//! owns the guards, announces engines in process and leaves their handoff files for other programs,
//! and tells the node's core how each pool stands.
//!
//! One loop owns all decisions. What takes time (preparing, living) is a task that reports to
//! the loop's mailbox; the loop itself only waits for small files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use handoff_watcher::EngineHosts;
use node_core::supervisor::{
    Device, DeviceReading, GpuUuid, Happened, Ordered, PoolPlan, Prepared, ReplicaKey, RunId, Supervisor,
    Unprepared, Work,
};
use node_core::{Problem, Source};
use owned_tasks::{Panicked, blocking, caught};
use parking_lot::Mutex;
use pool_registry_types::node::GpuMemory;
use pool_registry_types::pool::{PoolPurge, PoolReload};
use pool_registry_types::{ErrorBody, ErrorCode, ModelRef, PoolId};
use secrecy::SecretString;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;
use crate::download::Hub;
use crate::gpu;
use crate::machine;
use crate::models::{Models, projector_name};
use crate::pools_file::{
    GpuName, LoadWhen, MAX_BYTES, ModelSpec, PoolSpec, PoolsFile, PoolsFileError, Provision, Provisioning,
};
use crate::source::ModelSource;
use crate::supervisor::launch::{self, Launch, PrepareError, Spec};
use crate::supervisor::provision::{self, Sources};
use crate::supervisor::state::State;

/// Pause between two looks at the file of pools and at memory.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Reports of lives and demands that may wait for the loop.
const MAILBOX: usize = 1024;

/// Where things lie and what is allowed.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The file of pools.
    pub pools: PathBuf,
    pub runtime_dir: PathBuf,
    /// Where engines may be that others run.
    pub engine_hosts: EngineHosts,
    pub models_dir: PathBuf,
    /// Engines from the package index.
    pub packages_dir: PathBuf,
    /// What engines write.
    pub logs_dir: PathBuf,
    /// This program, which is started again as a guard.
    pub program: PathBuf,
    /// Whatever the file says, nothing is downloaded or installed.
    pub forbid_provisioning: bool,
    /// The hub of `hf:` sources.
    pub hub: String,
    pub hub_token: Option<SecretString>,
}

/// What the loop is told.
#[derive(Debug)]
struct Inbox {
    mailbox: mpsc::Receiver<Happened>,
    /// The pools for which tasks wait at the control plane: what it has said last counts.
    waited_for: watch::Receiver<BTreeSet<PoolId>>,
    /// Times that the daemon was told to read its files again.
    hangups: watch::Receiver<u64>,
}

/// The engines of a node at work.
#[derive(Debug)]
pub(crate) struct Supervision {
    pub(crate) agent: Arc<Agent>,
    pub(crate) settings: Settings,
    core: Mutex<Supervisor>,
    pub(super) state: Mutex<State>,
    pub(crate) mailbox: mpsc::Sender<Happened>,
    downloads: reqwest::Client,
    stopped: CancellationToken,
}

impl Supervision {
    /// Starts the loop; the agent answers for its pools from now on.
    pub(crate) fn start(
        agent: &Arc<Agent>,
        settings: Settings,
        hangups: watch::Receiver<u64>,
        seed: u64,
    ) -> reqwest::Result<Arc<Self>> {
        let (mailbox, heard) = mpsc::channel(MAILBOX);
        let supervision = Arc::new(Self {
            agent: Arc::clone(agent),
            settings,
            core: Mutex::new(Supervisor::new(0, seed)),
            state: Mutex::default(),
            mailbox,
            downloads: crate::download::client()?,
            stopped: CancellationToken::new(),
        });
        let inbox = Inbox { mailbox: heard, waited_for: agent.waited_for(), hangups };
        let (own, inbox) = (Arc::clone(&supervision), Arc::new(tokio::sync::Mutex::new(inbox)));
        let mut is_first = true;
        let make = move || {
            let is_first = std::mem::replace(&mut is_first, false);
            Arc::clone(&own).run(Arc::clone(&inbox), is_first)
        };
        // The stop is an event of the loop, after a panic too: it ends the engines.
        agent.loops().start(&agent.tracker, "supervisor", &CancellationToken::new(), make);
        Ok(supervision)
    }

    /// `is_first`: not started again after a panic, when what an earlier daemon left is ours already.
    async fn run(self: Arc<Self>, inbox: Arc<tokio::sync::Mutex<Inbox>>, is_first: bool) {
        let mut inbox = inbox.lock().await;
        let Inbox { mailbox, waited_for, hangups } = &mut *inbox;
        if is_first {
            if let Some(plans) = self.read_file(false).await {
                self.handle_event(Happened::Configured(plans)).await;
            }
            self.take_over_kept().await;
        } else {
            // What it says may not have been taken.
            self.state.lock().text = None;
        }
        let mut stopping = false;
        let mut staged = self.agent.models();
        let mut next_look = tokio::time::Instant::now();
        loop {
            let now = self.agent.now();
            let timer = self.core.lock().next_deadline(now);
            let timer = timer.map_or(Duration::from_secs(3600), |at| at.since(now));
            // Whatever is said lets time pass; a look that is due comes first, however much is said.
            let looks = next_look <= tokio::time::Instant::now();
            let happened = tokio::select! {
                biased;
                () = self.stopped.cancelled(), if !stopping => {
                    stopping = true;
                    self.release_kept_engines();
                    Happened::Shutdown
                }
                Ok(()) = waited_for.changed(), if !looks => {
                    Happened::Waiting(waited_for.borrow_and_update().clone())
                }
                happened = mailbox.recv(), if !looks => happened.unwrap_or(Happened::Timer),
                () = self.agent.work_ended(), if !looks => Happened::Timer,
                () = tokio::time::sleep_until(next_look) => {
                    next_look = tokio::time::Instant::now() + LOOK_EVERY;
                    self.write_again().await;
                    let plans = if stopping { None } else { self.read_file(false).await };
                    match plans {
                        Some(plans) => Happened::Configured(plans),
                        None if self.agent.models() != staged => {
                            staged = self.agent.models();
                            Happened::Mended
                        }
                        None => Happened::Timer,
                    }
                }
                Ok(()) = hangups.changed(), if !stopping => {
                    self.read_file(true).await.map_or(Happened::Timer, Happened::Configured)
                }
                () = tokio::time::sleep(timer) => Happened::Timer,
            };
            self.handle_event(happened).await;
            if stopping && self.state.lock().lives.is_empty() {
                return;
            }
        }
    }

    /// Tells the core what is and what happened, and does what it asks for.
    async fn handle_event(self: &Arc<Self>, happened: Happened) {
        let mut next = Some(happened);
        while let Some(happened) = next.take() {
            let now = self.agent.now();
            let (devices, work) = (self.devices(), self.work());
            let mut orders = Vec::new();
            {
                let mut core = self.core.lock();
                // The work first: idle is decided by it, and what is withdrawn in this round was
                // not yet withdrawn when it was read.
                orders.extend(core.apply(now, Happened::Used(work)));
                orders.extend(core.apply(now, Happened::Devices(devices)));
                orders.extend(core.apply(now, happened));
            }
            // Who sees an engine gone from a pool sees why.
            self.declare();
            for order in orders {
                // What a withdrawn engine still runs is read anew before anything is stopped.
                if matches!(order, Ordered::Withdraw { .. }) {
                    next = Some(Happened::Timer);
                }
                self.carry_out(order).await;
            }
        }
        self.declare();
    }

    fn declare(&self) {
        let declared = self.core.lock().declared(&self.state.lock().under_way);
        self.agent.declare(declared);
    }

    async fn carry_out(self: &Arc<Self>, order: Ordered) {
        match order {
            Ordered::Prepare { pool_id, plan } => self.prepare(pool_id, &plan),
            Ordered::Start { run, replica_key, fingerprint } => {
                tracing::info!(pool_id = %replica_key.pool_id, replica_id = %replica_key.replica_id, run = run.0, "an engine starts");
                self.begin(run, replica_key, fingerprint);
            }
            Ordered::Publish { run, replica_key } => self.publish(run, &replica_key).await,
            Ordered::Withdraw { run, replica_key } => self.withdraw(run, &replica_key).await,
            Ordered::Stop { run } => {
                if let Some(life) = self.state.lock().lives.get(&run) {
                    life.stop.cancel();
                }
            }
            Ordered::Purged { pool_id } => self.remove_purged(pool_id),
            Ordered::LookAtDevices => self.agent.look_at_gpus(),
            Ordered::AskWaiting => self.agent.report_now(),
        }
    }

    // ---- what is there ----

    fn devices(&self) -> BTreeMap<Device, DeviceReading> {
        let host_bytes = self.state.lock().file.memory.host_bytes;
        let mut devices = BTreeMap::new();
        devices.extend(host(host_bytes).map(|reading| (Device::Host, reading)));
        // One that nobody has seen says nothing of engines: on machines with other makers' GPUs none is.
        for gpu in self.agent.gpus().into_iter().filter(gpu::is_seen) {
            let is_own = gpu.memory == GpuMemory::Own;
            let reading = DeviceReading {
                total_bytes: is_own.then_some(gpu.vram_total_bytes),
                free_bytes: is_own.then(|| gpu.vram_total_bytes.saturating_sub(gpu.vram_used_bytes)),
                shares: (gpu.memory == GpuMemory::Shared).then_some(Device::Host),
                healthy: gpu.health.takes_work(),
                faults: self.agent.gpu_faults(gpu.device_id),
            };
            let device = Device::Gpu(gpu.device_id);
            devices.insert(device, reading);
            if let Some(uuid) = gpu.uuid.as_deref().and_then(GpuUuid::new) {
                let shares = reading.shares.or(Some(device));
                devices.insert(Device::Named(uuid), DeviceReading { shares, ..reading });
            }
        }
        devices
    }

    fn work(&self) -> BTreeMap<ReplicaKey, Work> {
        let replica_key = |((pool_id, replica_id), (running, served))| {
            let silent = !self.agent.is_ready(&pool_id, &replica_id);
            (ReplicaKey { pool_id, replica_id }, Work { running, served, silent })
        };
        self.agent.work().into_iter().map(replica_key).collect()
    }

    // ---- the file ----

    /// The plans of the file, where it says something new that can be taken. `is_asked`: the log says also
    /// that it says nothing new.
    async fn read_file(&self, is_asked: bool) -> Option<BTreeMap<PoolId, PoolPlan>> {
        let path = self.settings.pools.clone();
        let read = blocking("file of pools", move || read_bounded(&path)).await;
        let text = read.unwrap_or_else(|panicked| Err(ReadError::Panicked(panicked)));
        let outcome = match text {
            Ok(text) if self.state.lock().text.as_ref() == Some(&text) => {
                if is_asked {
                    self.report_unchanged();
                }
                return None;
            }
            Ok(text) => {
                let parsed = PoolsFile::parse(&text);
                self.state.lock().text = Some(text);
                parsed
            }
            Err(error) => {
                // Read again when it can be.
                self.state.lock().text = None;
                let path = self.settings.pools.clone();
                Err(PoolsFileError::Unreadable { path, reason: error.to_string() })
            }
        };
        match outcome {
            Ok(file) => {
                tracing::info!(pools = file.pools.len(), "the file of pools is taken");
                self.set_file_problem(None);
                Some(self.take_file(file))
            }
            Err(error) => {
                let error = error.to_string();
                if is_asked || self.agent.pools_file_problem().as_ref() != Some(&error) {
                    tracing::error!(%error, "the file of pools is not taken, what was there before stands");
                }
                self.set_file_problem(Some(error));
                None
            }
        }
    }

    /// The file was read again and is as it was.
    fn report_unchanged(&self) {
        match self.agent.pools_file_problem() {
            None => tracing::info!("the file of pools was read again: nothing in it is new"),
            Some(error) => tracing::error!(error, "the file of pools is still not taken"),
        }
    }

    fn take_file(&self, file: PoolsFile) -> BTreeMap<PoolId, PoolPlan> {
        let devices = file.pools.values().flat_map(|pool| &pool.devices);
        self.agent.expect_gpus(devices.filter_map(GpuName::number).collect());
        let mut core = self.core.lock();
        core.set_reserve(file.memory.reserve_bytes);
        let mut state = self.state.lock();
        if state.file.memory != file.memory {
            core.reconsider_memory();
        }
        let mut plans = BTreeMap::new();
        for id in file.pools.keys() {
            let Some(own) = spec_of(&file, id) else { continue };
            // A reload holds until the file says something else of its pool.
            let same = spec_of(&state.file, id).as_ref() == Some(&own);
            let reloaded =
                core.target(id).filter(|_| same).and_then(|target| state.specs.get(&target).cloned());
            let spec = reloaded.unwrap_or(own);
            plans.insert(id.clone(), plan(&spec));
            state.specs.insert(spec.fingerprint(), spec);
        }
        state.file = file;
        // What neither the file nor a reload names any more, and nothing lives by, is forgotten.
        let mut kept = core.plans();
        kept.extend(plans.values().map(|plan| plan.fingerprint));
        kept.extend(state.lives.values().map(|life| life.fingerprint));
        state.specs.retain(|fingerprint, _| kept.contains(fingerprint));
        state.launches.retain(|fingerprint, _| kept.contains(fingerprint));
        plans
    }

    fn set_file_problem(&self, why: Option<String>) {
        let problem = why.map(|message| Problem { pool_id: None, message, is_left_over: false });
        // The control plane shows it to those who do not know where this process runs.
        let pools = std::path::absolute(&self.settings.pools).unwrap_or_else(|_| self.settings.pools.clone());
        self.agent.set_problem(Source::PoolsFile(pools.display().to_string()), problem);
    }

    // ---- preparing ----

    fn prepare(self: &Arc<Self>, pool_id: PoolId, plan: &PoolPlan) {
        let fingerprint = plan.fingerprint;
        let spec = self.state.lock().specs.get(&fingerprint).cloned();
        let supervision = Arc::clone(self);
        owned_tasks::task(&self.agent.tracker, "preparing of a pool", async move {
            let find = async {
                let spec = spec.ok_or(PrepareError::UnknownPlan)?;
                supervision.find_everything(&pool_id, &spec).await
            };
            let outcome = tokio::select! {
                () = supervision.stopped.cancelled() => return,
                outcome = caught("preparing of a pool", find) => outcome,
            };
            let outcome = outcome.unwrap_or_else(|panicked| Err(PrepareError::Panicked(panicked)));
            supervision.state.lock().under_way.remove(&pool_id);
            let outcome = outcome.map(|(prepared, launch)| {
                supervision.state.lock().launches.insert(fingerprint, launch);
                prepared
            });
            let outcome = outcome.map_err(|error| {
                let reason = error.to_string();
                if error.is_operators() {
                    tracing::error!(%pool_id, reason, "the pool cannot be started");
                } else {
                    tracing::warn!(%pool_id, reason, "the pool cannot be started");
                }
                Unprepared { reason }
            });
            supervision.send(Happened::Prepared { pool_id, fingerprint, outcome }).await;
        });
    }

    async fn find_everything(
        &self,
        pool_id: &PoolId,
        spec: &Spec,
    ) -> Result<(Prepared, Launch), PrepareError> {
        let mut allowed = self.state.lock().file.provisioning;
        if self.settings.forbid_provisioning {
            allowed = Provisioning::default();
        }
        let sources = Sources {
            models_dir: &self.settings.models_dir,
            packages_dir: &self.settings.packages_dir,
            allowed,
            hub: Hub { endpoint: &self.settings.hub, token: self.settings.hub_token.as_ref() },
            client: &self.downloads,
        };
        let progress = |what: String| {
            let before = self.state.lock().under_way.insert(pool_id.clone(), what.clone());
            if before.is_none() {
                tracing::info!(%pool_id, what, "the pool is prepared");
            }
        };
        launch::prepare(spec, &sources, &progress).await
    }

    pub(crate) async fn send(&self, happened: Happened) {
        // The loop ends after all that speak to it.
        let _ = self.mailbox.send(happened).await;
    }

    // ---- orders ----

    /// A task waits for the pool. Errors: `NOT_FOUND`, `OVERLOADED`.
    pub(crate) fn load(&self, pool_id: &PoolId) -> Result<(), ErrorBody> {
        self.known(pool_id)?;
        self.post(Happened::Load { pool_id: pool_id.clone() })
    }

    /// The pool as it is, or will be when its reload is done.
    fn known(&self, pool_id: &PoolId) -> Result<Spec, ErrorBody> {
        let target = self.core.lock().target(pool_id);
        let state = self.state.lock();
        let own = spec_of(&state.file, pool_id)
            .ok_or_else(|| ErrorBody::new(ErrorCode::NotFound, format!("no pool {pool_id} in the file")))?;
        Ok(target.and_then(|target| state.specs.get(&target).cloned()).unwrap_or(own))
    }

    fn post(&self, happened: Happened) -> Result<(), ErrorBody> {
        let full = |_| ErrorBody::new(ErrorCode::Overloaded, "the node's supervisor has too much to do");
        self.mailbox.try_send(happened).map_err(full)
    }

    /// Whether the pool's engines are this node's own.
    pub(crate) fn supervises(&self, pool_id: &PoolId) -> bool {
        self.state.lock().file.pools.contains_key(pool_id)
    }

    /// Another model for the pool, or another chance for the one that it has.
    /// Errors: `NOT_FOUND`, `UNSUPPORTED`, `INVALID_PARAMS` for a model that is not there, `OVERLOADED`.
    pub(crate) async fn reload(&self, pool_id: &PoolId, order: &PoolReload) -> Result<(), ErrorBody> {
        let now = self.known(pool_id)?;
        if let Provision::External { .. } = now.pool.provision {
            return match order.new_model_ref {
                Some(_) => Err(ErrorBody::new(
                    ErrorCode::Unsupported,
                    "new_model_ref: the pool's engine is an external one, which is changed where it was started",
                )),
                None => Ok(()),
            };
        }
        let Some(model) = &order.new_model_ref else {
            self.post(Happened::Revive { pool_id: pool_id.clone() })?;
            return self.post(Happened::Reload { pool_id: pool_id.clone(), plan: Box::new(plan(&now)) });
        };
        let mut next = now.clone();
        next.pool.model = model.clone();
        let entry = self.state.lock().file.models.get(model).cloned();
        // A name is looked for among the staged models, anything else is a source itself.
        next.model = entry.or_else(|| {
            let is_source = model.as_str().contains([':', '/']) && ModelSource::parse(model.as_str()).is_ok();
            is_source.then(|| ModelSpec { source: model.to_string(), digest: None, mmproj: None })
        });
        // The model that it has is there, wherever its engine finds it.
        if *model != now.pool.model {
            let lacks = launch::lacks_file(&next, &self.settings.models_dir).await;
            if let Some(refusal) = launch::reload_refusal(&next, lacks.as_ref()) {
                return Err(refusal);
            }
        }
        self.state.lock().specs.insert(next.fingerprint(), next.clone());
        self.post(Happened::Reload { pool_id: pool_id.clone(), plan: Box::new(plan(&next)) })
    }

    /// Errors: `NOT_FOUND`, `UNSUPPORTED`, `OVERLOADED`.
    pub(crate) fn purge(&self, pool_id: &PoolId, order: PoolPurge) -> Result<(), ErrorBody> {
        if let Provision::External { .. } = self.known(pool_id)?.pool.provision {
            let message = "the pool's engine is an external one, which is removed where it was started";
            return Err(ErrorBody::new(ErrorCode::Unsupported, message));
        }
        self.state.lock().purges.insert(pool_id.clone(), order);
        self.post(Happened::Purge { pool_id: pool_id.clone() })
    }

    /// The engines are gone: what belongs to them alone goes too.
    fn remove_purged(self: &Arc<Self>, pool_id: PoolId) {
        let Ok(spec) = self.known(&pool_id) else { return };
        let (order, others) = {
            let mut state = self.state.lock();
            let order = state.purges.remove(&pool_id).unwrap_or_default();
            let others = state.file.pools.keys().filter(|id| **id != pool_id);
            (order, others.cloned().collect::<Vec<PoolId>>())
        };
        // As they are by now, whatever the file says.
        let in_use: Vec<PoolSpec> = others.iter().filter_map(|id| Some(self.known(id).ok()?.pool)).collect();
        let version = match &spec.pool.provision {
            Provision::Package { version } => Some(version.clone()),
            _ => None,
        };
        let shared = in_use
            .iter()
            .any(|other| other.provision == spec.pool.provision && other.engine == spec.pool.engine);
        let package = version.filter(|_| order.engine_files && !shared).map(|version| {
            self.settings.packages_dir.join(provision::folder_name(spec.pool.engine, version.as_deref()))
        });
        let is_gone = order.model_files && !in_use.iter().any(|other| other.model == spec.pool.model);
        let mmproj = spec.model.as_ref().and_then(|model| model.mmproj.as_deref());
        let projector = mmproj.map(|source| projector_name(&spec.pool.model, source));
        let gone: Vec<ModelRef> =
            std::iter::once(spec.pool.model.clone()).chain(projector).filter(|_| is_gone).collect();
        let models = Models::new(&self.settings.models_dir);
        let remove = move || {
            if let Some(folder) = package {
                match std::fs::remove_dir_all(&folder) {
                    Ok(()) => {
                        tracing::info!(%pool_id, folder = %folder.display(), "an engine's environment is removed")
                    }
                    Err(error) => tracing::warn!(%pool_id, %error, "an engine's environment is not removed"),
                }
            }
            for model in gone {
                match models.remove(&model) {
                    Ok(()) => tracing::info!(%pool_id, %model, "a model's files are removed"),
                    Err(error) => tracing::warn!(%pool_id, %error, "a model's files are not removed"),
                }
            }
        };
        owned_tasks::task(&self.agent.tracker, "purge of a pool", async move {
            // A panic is logged, and nobody waits for more.
            let _ = blocking("purge of a pool", remove).await;
        });
    }

    /// Where the replicas of a pool write, by their ids.
    pub(crate) fn logs(&self, pool_id: &PoolId) -> BTreeMap<String, PathBuf> {
        let prefix = format!("{pool_id}-");
        let entries = std::fs::read_dir(&self.settings.logs_dir).into_iter().flatten().flatten();
        let name = |entry: std::fs::DirEntry| {
            let name = entry.file_name().into_string().ok()?;
            let replica = name.strip_prefix(&prefix)?.strip_suffix(".log")?;
            // Of pool `a` and not of pool `a-b`: replicas have no dash in their ids.
            (!replica.contains('-')).then(|| (replica.to_owned(), entry.path()))
        };
        entries.filter_map(name).collect()
    }

    // ---- the end ----

    /// Ends every engine that is not to be kept. What runs on them was given its time before.
    pub(crate) async fn stop(&self) {
        self.stopped.cancel();
        let longest =
            self.state.lock().file.pools.values().map(|pool| pool.stop_grace_secs).max().unwrap_or(0);
        let patience = Duration::from_secs(longest + 3);
        let all_gone = async {
            while !self.state.lock().lives.is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(patience, all_gone).await.is_err() {
            tracing::warn!("some engines did not end in time; their guards see to them");
        }
    }

    /// Engines that are kept lose their owner and live on.
    fn release_kept_engines(&self) {
        let mut state = self.state.lock();
        state.lives.retain(|_, life| {
            if life.keep {
                life.release.cancel();
            }
            !life.keep
        });
    }

    pub(crate) fn core_adopt(&self, replica_key: &ReplicaKey, fingerprint: u64) -> Option<RunId> {
        self.core.lock().adopt(self.agent.now(), replica_key, fingerprint)
    }
}

/// A pool of the file with what the file says of its model.
fn spec_of(file: &PoolsFile, id: &PoolId) -> Option<Spec> {
    let pool = file.pools.get(id)?.clone();
    Some(Spec { model: file.models.get(&pool.model).cloned(), pool })
}

/// Why the file of pools cannot be read.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("{0}")]
    Io(io::Error),
    #[error("larger than {MAX_BYTES} bytes")]
    TooLarge,
    #[error("{0}")]
    Panicked(Panicked),
}

fn read_bounded(path: &Path) -> Result<String, ReadError> {
    let mut text = String::new();
    let file = File::open(path).map_err(ReadError::Io)?;
    file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(ReadError::Io)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(ReadError::TooLarge);
    }
    Ok(text)
}

/// The machine's own memory. Source: proc(5).
fn host(limit: Option<u64>) -> Option<DeviceReading> {
    let (total, free_bytes) = machine::memory()?;
    let total_bytes = Some(limit.map_or(total, |limit| limit.min(total)));
    Some(DeviceReading { total_bytes, free_bytes, shares: None, healthy: true, faults: 0 })
}

/// What the supervisor needs to know of a pool.
fn plan(spec: &Spec) -> PoolPlan {
    let pool = &spec.pool;
    PoolPlan {
        engine: pool.engine,
        models: pool.models(),
        device_mask: pool.mask(),
        ctx_max: pool.ctx,
        replicas: pool.replicas,
        on_demand: pool.load == LoadWhen::OnDemand,
        ttl: pool.ttl_secs.map(Duration::from_secs),
        min_resident: Duration::from_secs(pool.min_resident_secs),
        load_timeout: Duration::from_secs(pool.load_timeout_secs),
        drain_timeout: Duration::from_secs(pool.drain_timeout_secs),
        exit_limit: pool.exit_limit,
        fingerprint: spec.fingerprint(),
    }
}
