//! The shell around [`NodeCore`]: time, tasks and calls.
//!
//! The core stands behind a mutex that is held for microseconds and never across an await:
//! accepting an attempt and ending it are two short critical sections, without a task switch.

mod handoffs;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use handoff_watcher::{Handoff, HandoffName};
use node_core::{
    BeatFailure, BindError, Busy, Declared, Identity, NodeCore, NodeEffect, Readiness, ReplicaSpec, Session,
};
use node_registration::{CallError, ControlPlane};
use owned_tasks::{Loops, blocking, caught};
use parking_lot::Mutex;
use pool_registry_types::node::{GpuHealth, GpuReport, Intent, IntentOrder, StagedModel};
use pool_registry_types::pool::{EngineKind, PoolReport};
use pool_registry_types::{AttemptId, Moment, PoolId, ReplicaId};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::handoffs::Announced;
use crate::engines::{ApiKey, Endpoint, EngineClient};
use crate::gpu::{self, GpuWatch};
use crate::guard::processes;
use crate::intent::IntentFile;
use crate::models::Models;
use crate::replica;
use crate::slot::Signals;

/// Pause between two looks at the GPUs.
const LOOK_AT_GPUS_EVERY: Duration = Duration::from_secs(5);
/// How long one of them may take.
const GPU_PATIENCE: Duration = Duration::from_secs(3);
/// Pause between two looks at the folder of models.
const LOOK_AT_MODELS_EVERY: Duration = Duration::from_secs(2);
/// Counts of what happened on the node; only ever rise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NodeCounters {
    pub accepted: u64,
    pub refused: u64,
    pub finished: u64,
    pub failed: u64,
    pub canceled: u64,
    pub tokens: u64,
}

/// A handoff that is watched.
#[derive(Debug)]
struct Watched {
    handoff: Handoff,
    stop: CancellationToken,
    /// Told when the engine is to be looked at now.
    look: Arc<Notify>,
    /// What its engine asks for.
    key: Option<ApiKey>,
}

/// One node at work.
#[derive(Debug)]
pub struct Agent {
    start: Instant,
    pub(crate) core: Mutex<NodeCore>,
    wake: Notify,
    client: EngineClient,
    /// Who follows the slots of a replica that are to be released, and learns of more.
    slot_watchers: Mutex<BTreeMap<HandoffName, Arc<Notify>>>,
    /// Of the attempts that run.
    pub(crate) drivers: Mutex<HashMap<AttemptId, Arc<Signals>>>,
    replicas: Mutex<BTreeMap<HandoffName, Watched>>,
    announced: Mutex<Announced>,
    /// What is wrong with handoff files, and with engines that cannot be bound.
    file_problems: Mutex<BTreeMap<String, String>>,
    binding_problems: Mutex<BTreeMap<HandoffName, String>>,
    intent_file: IntentFile,
    taking_intent: tokio::sync::Mutex<()>,
    pub(crate) counters: Mutex<NodeCounters>,
    pub(crate) tracker: TaskTracker,
    loops: Loops,
    stop: CancellationToken,
    /// An attempt has ended, or memory was looked at: somebody may be idle, or fit, now.
    work_ended: Notify,
    /// Somebody wants the GPUs looked at before it is time.
    look_at_gpus: Notify,
    /// Errors that the driver has told of each GPU so far, by its number.
    gpu_faults: Mutex<BTreeMap<u32, u64>>,
    /// An engine that this node has started has ended.
    pub(crate) engine_has_ended: Notify,
    /// The pools for which tasks wait, as the control plane has named them last.
    waited_for: watch::Sender<BTreeSet<PoolId>>,
}

impl Agent {
    /// The session is made with the same zero of time that this agent starts with. `loops` are the
    /// daemon's, which is not ready while one of them is down.
    pub fn new(
        identity: Identity,
        interval: Duration,
        seed: u64,
        intent_file: IntentFile,
        loops: Loops,
    ) -> Arc<Self> {
        let session = Session::new(Moment::ZERO, interval, seed);
        Arc::new(Self {
            start: Instant::now(),
            core: Mutex::new(NodeCore::new(identity, session, intent_file.read())),
            intent_file,
            taking_intent: tokio::sync::Mutex::default(),
            wake: Notify::new(),
            client: EngineClient::new(),
            slot_watchers: Mutex::new(BTreeMap::new()),
            drivers: Mutex::new(HashMap::new()),
            replicas: Mutex::new(BTreeMap::new()),
            announced: Mutex::default(),
            file_problems: Mutex::default(),
            binding_problems: Mutex::default(),
            counters: Mutex::new(NodeCounters::default()),
            tracker: TaskTracker::new(),
            loops,
            stop: CancellationToken::new(),
            work_ended: Notify::new(),
            look_at_gpus: Notify::new(),
            gpu_faults: Mutex::default(),
            engine_has_ended: Notify::new(),
            waited_for: watch::Sender::default(),
        })
    }

    pub fn now(&self) -> Moment {
        Moment::from_millis(u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// What runs for as long as the node does, for its `/health/ready`.
    pub fn loops(&self) -> &Loops {
        &self.loops
    }

    pub(crate) fn client(&self) -> &EngineClient {
        &self.client
    }

    /// The streams that are kept take at most so many bytes together.
    pub fn bound_held(&self, bytes: usize) {
        self.with_core(|core, _| core.bound_held(bytes));
    }

    // ---- replicas ----

    /// The engine's key, as it was read at the last look.
    pub(crate) fn set_key(&self, name: &HandoffName, key: Option<ApiKey>) {
        let changed = self.replicas.lock().get_mut(name).is_some_and(|watched| {
            let changed = watched.key != key;
            watched.key = key;
            changed
        });
        if changed {
            self.with_core(|core, _| core.key_changed(&name.pool_id, &name.replica_id));
        }
    }

    /// Where a replica is and what it is asked with.
    pub(crate) fn endpoint(&self, name: &HandoffName, url: &str) -> Endpoint {
        let key = self.replicas.lock().get(name).and_then(|watched| watched.key.clone());
        Endpoint { key, ..Endpoint::new(url) }
    }

    /// The replica's engine is looked at now, not at the next tick.
    pub(crate) fn look_now(&self, name: &HandoffName) {
        if let Some(watched) = self.replicas.lock().get(name) {
            watched.look.notify_one();
        }
    }

    pub(crate) fn set_binding_problem(&self, name: &HandoffName, problem: Option<String>) {
        let mut problems = self.binding_problems.lock();
        match problem {
            Some(problem) => problems.insert(name.clone(), problem),
            None => problems.remove(name),
        };
    }

    /// Binds unless the watch was stopped: watches are stopped under the same lock, so a handoff
    /// that is gone or was rewritten never binds late. What the same look says of its readiness
    /// counts in the same step, so that a change takes nothing out of service.
    pub(crate) fn bind_unless(
        &self,
        stop: &CancellationToken,
        pool_id: &PoolId,
        spec: ReplicaSpec,
        readiness: Option<Readiness>,
    ) -> Result<(), BindError> {
        let _watches = self.replicas.lock();
        if stop.is_cancelled() {
            return Ok(());
        }
        let replica_id = spec.replica_id.clone();
        self.change(|core, now| {
            core.bind(now, pool_id, spec)?;
            if let Some(readiness) = readiness {
                core.observed(now, pool_id, &replica_id, readiness);
            }
            Ok(())
        })
    }

    pub(crate) fn observed_unless(
        &self,
        stop: &CancellationToken,
        pool_id: &PoolId,
        replica_id: &ReplicaId,
        readiness: Readiness,
    ) {
        let _watches = self.replicas.lock();
        if !stop.is_cancelled() {
            self.observed(pool_id, replica_id, readiness);
        }
    }

    pub(crate) fn is_ready(&self, pool_id: &PoolId, replica_id: &ReplicaId) -> bool {
        self.core.lock().is_ready(pool_id, replica_id)
    }

    pub(crate) fn counted(&self, pool_id: &PoolId, replica_id: &ReplicaId, began: Moment, busy: Busy) {
        self.change(|core, now| core.counted(now, began, pool_id, replica_id, busy));
    }

    // ---- slots that are to be released ----

    /// An attempt was broken off: its slot is followed until it is free.
    pub(crate) fn watch_slots(self: &Arc<Self>, name: HandoffName, key: Option<ApiKey>) {
        let mut slot_watchers = self.slot_watchers.lock();
        if let Some(again) = slot_watchers.get(&name) {
            again.notify_one();
            return;
        }
        let again = Arc::new(Notify::new());
        slot_watchers.insert(name.clone(), Arc::clone(&again));
        drop(slot_watchers);
        let agent = Arc::clone(self);
        let make = move || Arc::clone(&agent).follow_releases(name.clone(), key.clone(), Arc::clone(&again));
        // Until it runs again the slots stay taken.
        owned_tasks::start(&self.tracker, "slots that are to be released", &self.stop, make, |_| {});
    }

    async fn follow_releases(self: Arc<Self>, name: HandoffName, key: Option<ApiKey>, again: Arc<Notify>) {
        loop {
            let watching = replica::watch_slots(&self, &name, key.clone(), &again);
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = watching => {}
            }
            // Under the lock: whoever comes now starts another one.
            let mut slot_watchers = self.slot_watchers.lock();
            let more = self.slot_due_at(&name.pool_id, &name.replica_id).is_some();
            if !more || self.stop.is_cancelled() {
                slot_watchers.remove(&name);
                return;
            }
        }
    }

    /// The replica's engine as it is now, which may be another one than an attempt was sent to.
    pub(crate) fn engine_of(&self, name: &HandoffName) -> Option<(EngineKind, Endpoint)> {
        let (engine, url) = self.core.lock().engine_of(&name.pool_id, &name.replica_id)?;
        Some((engine, self.endpoint(name, &url)))
    }

    pub(crate) fn is_watched(&self, name: &HandoffName) -> bool {
        self.slot_watchers.lock().contains_key(name)
    }

    pub(crate) fn slot_due_at(&self, pool_id: &PoolId, replica_id: &ReplicaId) -> Option<Moment> {
        self.core.lock().slot_due_at(pool_id, replica_id)
    }

    pub(crate) fn expire_releases(&self) {
        self.change(NodeCore::expire_releases);
    }

    pub(crate) fn unbind(&self, pool_id: &PoolId, replica_id: &ReplicaId) {
        self.change(|core, now| core.unbind(now, pool_id, replica_id));
    }

    // ---- engines that this node runs itself ----

    /// The pools for which tasks wait at the control plane, whenever it names them.
    pub(crate) fn waited_for(&self) -> watch::Receiver<BTreeSet<PoolId>> {
        self.waited_for.subscribe()
    }

    pub(crate) fn declare(&self, declared: BTreeMap<PoolId, Declared>) {
        self.change(|core, now| core.declare(now, declared));
    }

    pub(crate) fn work(&self) -> BTreeMap<(PoolId, ReplicaId), (u32, u64)> {
        self.core.lock().work()
    }

    /// Waits until an attempt has ended since the last call.
    pub(crate) async fn work_ended(&self) {
        self.work_ended.notified().await;
    }

    pub(crate) fn notify_work_ended(&self) {
        self.work_ended.notify_one();
    }

    /// A report goes out now; its answer says for which pools tasks wait.
    pub(crate) fn report_now(&self) {
        self.change(NodeCore::report_now);
    }

    /// The GPUs are looked at now, not at the next tick.
    pub(crate) fn look_at_gpus(&self) {
        self.look_at_gpus.notify_one();
    }

    pub(crate) fn observed(&self, pool_id: &PoolId, replica_id: &ReplicaId, readiness: Readiness) {
        self.change(|core, now| core.observed(now, pool_id, replica_id, readiness));
    }

    /// Changes the core where nothing of it is reported by itself.
    pub(crate) fn with_core<T>(&self, change: impl FnOnce(&mut NodeCore, Moment) -> T) -> T {
        let now = self.now();
        change(&mut self.core.lock(), now)
    }

    /// Changes the core, and wakes the session where something is due sooner by it.
    pub(crate) fn change_deadlines<T>(&self, change: impl FnOnce(&mut NodeCore, Moment) -> T) -> T {
        let now = self.now();
        let mut core = self.core.lock();
        let before = core.next_deadline();
        let result = change(&mut core, now);
        let after = core.next_deadline();
        drop(core);
        if after.is_some_and(|after| before.is_none_or(|before| after < before)) {
            self.wake.notify_one();
        }
        result
    }

    /// Changes the core, and wakes the session, which may have something to say about it.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut NodeCore, Moment) -> T) -> T {
        let now = self.now();
        let result = change(&mut self.core.lock(), now);
        self.wake.notify_one();
        result
    }

    /// The tokens that this node accepts are others now: the control plane is told.
    pub fn tokens_changed(&self) {
        self.change(NodeCore::tokens_changed);
    }

    // ---- the session ----

    /// Keeps the session with the control plane until it has left, and then the handle ends.
    pub fn keep_session(self: &Arc<Self>, control: impl ControlPlane) -> JoinHandle<()> {
        let (agent, control) = (Arc::clone(self), Arc::new(control));
        let make = move || Arc::clone(&agent).run_session(Arc::clone(&control));
        // It leaves before the agent stops; it is its own tracker's, whose end nobody awaits.
        self.loops.start(&TaskTracker::new(), "session", &self.stop, make)
    }

    async fn run_session(self: Arc<Self>, control: Arc<impl ControlPlane>) {
        loop {
            let now = self.now();
            let (due, next, left) = {
                let mut core = self.core.lock();
                (core.due(now), core.next_deadline(), core.session().has_left())
            };
            if left {
                return;
            }
            match due {
                Some(effect) => self.call(&*control, effect).await,
                None => {
                    let pause = next.map_or(Duration::from_secs(3600), |at| at.since(self.now()));
                    tokio::select! {
                        () = self.wake.notified() => {}
                        () = tokio::time::sleep(pause) => {}
                    }
                }
            }
        }
    }

    async fn call(self: &Arc<Self>, control: &impl ControlPlane, effect: NodeEffect) {
        match effect {
            NodeEffect::Register(request) => {
                let node_id = request.node_id.clone();
                let answer = answered(control.register(request)).await;
                match &answer {
                    Ok(answer) => tracing::info!(%node_id, epoch = %answer.epoch, "registered"),
                    Err(error) => tracing::warn!(%node_id, %error, "not registered, trying again"),
                }
                let now = self.now();
                let effects = self.core.lock().registered(now, answer.map_err(CallError::refusal));
                self.carry_out(effects).await;
            }
            NodeEffect::Heartbeat(mut beat) => {
                beat.timestamp = jiff::Timestamp::now().to_string();
                let node_id = self.core.lock().identity().node_id.clone();
                let answer = answered(control.heartbeat(&node_id, beat)).await;
                let answer = answer.map_err(|error| {
                    if error.is_unknown_node() {
                        tracing::info!(%node_id, "the control plane does not know this node: registering again");
                        return BeatFailure::Unknown;
                    }
                    tracing::warn!(%node_id, %error, "a heartbeat failed");
                    BeatFailure::Failed
                });
                let now = self.now();
                let effects = self.core.lock().heartbeat_answered(now, answer);
                self.carry_out(effects).await;
            }
            NodeEffect::Deregister(epoch) => {
                let node_id = self.core.lock().identity().node_id.clone();
                if let Err(error) = answered(control.deregister(&node_id, &epoch)).await {
                    tracing::warn!(%node_id, %error, "not deregistered: the lease will run out");
                }
                self.core.lock().deregistered();
            }
            other => self.carry_out(vec![other]).await,
        }
    }

    /// What the control plane's answers ask for.
    async fn carry_out(self: &Arc<Self>, effects: Vec<NodeEffect>) {
        for effect in effects {
            match effect {
                NodeEffect::Cancel(attempt) => self.cancel(&attempt, "the control plane does not know it"),
                NodeEffect::Unread(attempt) => self.cancel(&attempt, "nobody has read it for its time"),
                NodeEffect::TakeIntent(order) => {
                    // A disk that hangs must not keep the next heartbeat.
                    let agent = Arc::clone(self);
                    owned_tasks::task(&self.tracker, "intent", async move {
                        if let Err(error) = agent.take_intent(order).await {
                            tracing::error!(%error, "the intent cannot be written down, and is not taken");
                        }
                    });
                }
                NodeEffect::Waiting(pools) => {
                    // Where this node runs no engines nobody listens.
                    self.waited_for.send_replace(pools.into_iter().collect());
                }
                NodeEffect::Register(_) | NodeEffect::Heartbeat(_) | NodeEffect::Deregister(_) => {
                    unreachable!("calls are made one at a time, when they are due")
                }
            }
        }
    }

    /// Writes the operator's order down and follows it. Returns whether the order is for this
    /// registration; one that a later one has overtaken has no effect.
    pub async fn take_intent(self: &Arc<Self>, order: IntentOrder) -> std::io::Result<bool> {
        // Whoever asked may go away; what was begun is finished.
        let taking = self.tracker.track_future(Arc::clone(self).write_intent(order));
        let taken = owned_tasks::uninterrupted("intent", taking).await;
        taken.unwrap_or_else(|panicked| Err(std::io::Error::other(panicked)))
    }

    async fn write_intent(self: Arc<Self>, order: IntentOrder) -> std::io::Result<bool> {
        // One at a time: the file must say what the last order says.
        let _one = self.taking_intent.lock().await;
        let (of_now, counts) = {
            let core = self.core.lock();
            (core.session().epoch() == Some(&order.epoch), core.counts(&order))
        };
        if !counts {
            return Ok(of_now);
        }
        self.keep_intent(order.intent).await?;
        let taken = self.change(|core, now| core.set_intent(now, &order));
        if !taken {
            // The node registered anew meanwhile: the file says again what holds.
            let asked = self.core.lock().asked();
            self.keep_intent(asked).await?;
            return Ok(false);
        }
        tracing::info!(intent = ?order.intent, "the operator's intent is taken");
        Ok(true)
    }

    async fn keep_intent(&self, intent: Intent) -> std::io::Result<()> {
        let file = self.intent_file.clone();
        let written = blocking("file of the intent", move || file.write(intent)).await;
        written.unwrap_or_else(|panicked| Err(std::io::Error::other(panicked)))
    }

    /// Ends an attempt at its engine.
    fn cancel(&self, attempt: &AttemptId, reason: &str) {
        if let Some(signals) = self.drivers.lock().get(attempt) {
            tracing::info!(attempt_id = %attempt, reason, "an attempt is ended");
            signals.cancel.cancel();
        }
    }

    // ---- stopping ----

    /// Takes no new work, lets what runs finish and its end be read for `grace`, leaves the cluster.
    pub(crate) async fn drain_and_leave(&self, grace: Duration) {
        self.change(NodeCore::drain);
        let finished = async {
            while self.with_core(|core, now| core.running_count() > 0 || core.held().awaits_done(now)) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(grace, finished).await.is_err() {
            tracing::warn!(
                attempts = self.core.lock().running_count(),
                "the grace is over, attempts end as lost"
            );
        }
        self.change(|core, _| core.leave());
    }

    /// Ends everything that is left.
    pub async fn stop(&self) {
        self.stop.cancel();
        for signals in self.drivers.lock().values() {
            signals.cancel.cancel();
        }
        self.tracker.close();
        if tokio::time::timeout(Duration::from_secs(5), self.tracker.wait()).await.is_err() {
            tracing::warn!("some tasks did not end in time");
        }
    }

    /// Looks at the GPUs until the agent stops.
    pub fn watch_gpus(self: &Arc<Self>, watch: GpuWatch) {
        if watch.inventory().is_empty() {
            return;
        }
        let (agent, watch) = (Arc::clone(self), Arc::new(tokio::sync::Mutex::new(watch)));
        let make = move || Arc::clone(&agent).run_gpu_watch(Arc::clone(&watch));
        self.loops.start(&self.tracker, "GPUs", &self.stop, make);
    }

    async fn run_gpu_watch(self: Arc<Self>, watch: Arc<tokio::sync::Mutex<GpuWatch>>) {
        let mut watch = watch.lock().await;
        let mut healths = BTreeMap::new();
        loop {
            let readings = tokio::select! {
                () = self.stop.cancelled() => return,
                readings = watch.look(GPU_PATIENCE) => readings,
            };
            let engines: Vec<u32> =
                self.replicas.lock().values().filter_map(|watched| watched.handoff.pid).collect();
            let is_ours = |pid: u32| processes::belongs_to(pid, &engines);
            let gpus: Vec<GpuReport> =
                readings.iter().map(|reading| gpu::report(reading, &is_ours)).collect();
            for gpu in &gpus {
                let before = healths.insert(gpu.device_id, gpu.health);
                if before.unwrap_or(GpuHealth::Ok) != gpu.health {
                    let problem = gpu.problem.as_deref().unwrap_or("none");
                    tracing::warn!(device_id = gpu.device_id, health = ?gpu.health, problem, "the health of a GPU has changed");
                }
            }
            *self.gpu_faults.lock() =
                readings.iter().map(|reading| (reading.device_id, reading.faults)).collect();
            self.gpus_observed(gpus);
            self.notify_work_ended();
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.look_at_gpus.notified() => {}
                () = tokio::time::sleep(LOOK_AT_GPUS_EVERY) => {}
            }
        }
    }

    /// No new work on the pool; what still runs after `grace` is ended. Returns whether there is
    /// such a pool.
    pub(crate) fn drain_pool(self: &Arc<Self>, pool_id: &PoolId, grace: Option<Duration>) -> bool {
        let known = self.change(|core, now| core.drain_pool(now, pool_id, grace.map(|grace| now + grace)));
        if let Some(grace) = grace.filter(|_| known) {
            let agent = Arc::clone(self);
            owned_tasks::task(&self.tracker, "end of a drain", async move {
                tokio::select! {
                    () = agent.stop.cancelled() => return,
                    // The core counts whole milliseconds.
                    () = tokio::time::sleep(grace + Duration::from_millis(1)) => {}
                }
                let over = agent.core.lock().past_their_drain(agent.now());
                for attempt in over {
                    agent.cancel(&attempt, "its pool has drained for long enough");
                }
            });
        }
        known
    }

    /// The pool takes work again. Returns whether there is such a pool.
    pub(crate) fn reopen_pool(&self, pool_id: &PoolId) -> bool {
        self.change(|core, now| core.reopen_pool(now, pool_id))
    }

    /// Looks at the folder of models until the agent stops, each look on a blocking thread.
    pub fn watch_models(self: &Arc<Self>, folder: PathBuf) {
        let (agent, models) = (Arc::clone(self), Models::new(folder));
        let make = move || Arc::clone(&agent).run_models_watch(models.clone());
        self.loops.start(&self.tracker, "models", &self.stop, make);
    }

    async fn run_models_watch(self: Arc<Self>, models: Models) {
        let mut problem = None;
        loop {
            let looking = models.clone();
            let looked = tokio::select! {
                () = self.stop.cancelled() => return,
                looked = blocking("folder of models", move || looking.report()) => looked,
            };
            match looked.unwrap_or_else(|panicked| panicked.resume()) {
                Ok(found) => {
                    problem = None;
                    self.change(|core, now| core.models_observed(now, found));
                }
                // What was seen last stands: a share that is away for a moment has not lost its models.
                Err(error) => {
                    let reported = problem.replace(error.to_string());
                    if reported != problem {
                        tracing::warn!(%error, "the folder of models cannot be read");
                    }
                }
            }
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(LOOK_AT_MODELS_EVERY) => {}
            }
        }
    }

    fn gpus_observed(&self, gpus: Vec<GpuReport>) {
        self.change(|core, now| core.gpus_observed(now, gpus));
    }

    // ---- reading ----

    /// What the streams that are kept take together, bytes.
    pub fn held_bytes(&self) -> usize {
        self.core.lock().held().bytes()
    }

    pub fn identity(&self) -> Identity {
        self.core.lock().identity().clone()
    }

    pub fn pools(&self) -> Vec<PoolReport> {
        self.core.lock().pool_reports(self.now())
    }

    pub fn gpus(&self) -> Vec<GpuReport> {
        self.core.lock().gpus().to_vec()
    }

    /// Errors that the driver has told of the GPU so far.
    pub(crate) fn gpu_faults(&self, device_id: u32) -> u64 {
        self.gpu_faults.lock().get(&device_id).copied().unwrap_or(0)
    }

    pub fn models(&self) -> Vec<StagedModel> {
        self.core.lock().models().to_vec()
    }

    pub fn intent(&self) -> Intent {
        self.core.lock().intent()
    }

    pub fn running(&self) -> usize {
        self.core.lock().running_count()
    }

    pub fn counters(&self) -> NodeCounters {
        *self.counters.lock()
    }

    /// Why the node is not registered, or nothing when it is.
    pub fn session_problem(&self) -> Option<String> {
        let core = self.core.lock();
        if core.session().is_registered() {
            return None;
        }
        Some(core.session().problem().unwrap_or("not registered yet").to_owned())
    }

    /// Handoff files that bind nothing, and why.
    pub fn problems(&self) -> BTreeMap<String, String> {
        let mut problems = self.file_problems.lock().clone();
        let binding = self.binding_problems.lock();
        problems.extend(binding.iter().map(|(name, problem)| (format!("{name}.json"), problem.clone())));
        problems
    }
}

/// A call that panics is one without an answer: the session must not wait for it for ever.
async fn answered<T>(call: impl Future<Output = Result<T, CallError>>) -> Result<T, CallError> {
    let answer = caught("call to the control plane", call).await;
    answer.unwrap_or_else(|panicked| Err(CallError::Unreachable(panicked.to_string())))
}

#[cfg(test)]
#[path = "agent_tests.rs"]
mod tests;
