//! The shell around [`NodeCore`]: time, tasks and calls. Its session, its replicas and what it looks at
//! have files of their own.
//!
//! The core stands behind a mutex that is held for microseconds and never across an await:
//! accepting an attempt and ending it are two short critical sections, without a task switch.

mod announced;
mod handoffs;
mod replicas;
mod session;
mod watches;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use handoff_watcher::{Handoff, HandoffName};
use node_core::{Declared, Identity, NodeCore, Problem, Retention, Session, Source};
use owned_tasks::{Loops, StreamThread, StreamThreads};
use parking_lot::Mutex;
use pool_registry_types::node::{GpuReport, Intent, ProblemKind, StagedModel};
use pool_registry_types::pool::PoolReport;
use pool_registry_types::{AttemptId, Moment, PoolId, ReplicaId};
use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::announced::Announced;
use crate::engines::documents::DocumentRoom;
use crate::engines::{ApiKey, EngineClient};
use crate::infer::ReadBy;
use crate::intent::IntentFile;
use crate::link::Links;
use crate::slotless;

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

/// What an attempt's driver and its reader tell each other, and others the driver.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    /// The driver is to end the attempt.
    pub(crate) cancel: CancellationToken,
    /// There is more in the buffer, or its end.
    pub(crate) appended: Notify,
    /// There is less in it.
    pub(crate) taken: Notify,
    /// The reader that the attempt was accepted with polls the driver.
    pub(crate) polled_by_reader: AtomicBool,
    /// What is no frame is said apart, as it is on a link.
    pub(crate) by_link: bool,
    /// It is read in this process.
    pub(crate) read_here: bool,
    /// When the driver's own task was polled last, milliseconds of the agent's time.
    pub(crate) polled_at: AtomicU64,
}

impl Signals {
    /// Of an attempt that is accepted.
    pub(crate) fn of(now: Moment, read_by: ReadBy) -> Self {
        Self {
            polled_by_reader: AtomicBool::new(read_by.retention() == Retention::Attached),
            by_link: matches!(read_by, ReadBy::Link { .. } | ReadBy::Records),
            read_here: !matches!(read_by, ReadBy::Link { .. }),
            polled_at: AtomicU64::new(now.as_millis()),
            ..Self::default()
        }
    }

    pub(crate) fn is_polled_by_reader(&self) -> bool {
        self.polled_by_reader.load(Ordering::Relaxed)
    }
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
    /// A stream that is kept is due sooner than any was.
    held_sooner: Notify,
    /// For the answers of engines that are documents.
    documents: OnceLock<Arc<DocumentRoom>>,
    pub(crate) links: Links,
    replicas: Mutex<BTreeMap<HandoffName, Watched>>,
    announced: Mutex<Announced>,
    intent_file: IntentFile,
    taking_intent: tokio::sync::Mutex<()>,
    pub(crate) counters: Mutex<NodeCounters>,
    pub(crate) tracker: TaskTracker,
    /// Where drivers run that are nobody's, if not where they begin.
    pub(crate) threads: OnceLock<StreamThreads>,
    /// By the index of the thread.
    thread_clients: OnceLock<Box<[EngineClient]>>,
    loops: Loops,
    /// Places of requests that take no slot.
    pub(crate) slotless: Arc<Semaphore>,
    stop: CancellationToken,
    /// An attempt has ended, or memory was looked at: somebody may be idle, or fit, now.
    work_ended: Notify,
    /// Somebody wants the GPUs looked at before it is time.
    look_at_gpus: Notify,
    /// Errors that the driver has told of each GPU so far, by its number.
    gpu_faults: Mutex<BTreeMap<u32, u64>>,
    expected_gpus: Mutex<BTreeSet<u32>>,
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
        let links = Links::new(&identity);
        Arc::new(Self {
            start: Instant::now(),
            core: Mutex::new(NodeCore::new(identity, session, intent_file.read())),
            intent_file,
            taking_intent: tokio::sync::Mutex::default(),
            wake: Notify::new(),
            client: EngineClient::new(),
            slot_watchers: Mutex::new(BTreeMap::new()),
            drivers: Mutex::new(HashMap::new()),
            held_sooner: Notify::new(),
            documents: OnceLock::new(),
            links,
            replicas: Mutex::new(BTreeMap::new()),
            announced: Mutex::default(),
            counters: Mutex::new(NodeCounters::default()),
            tracker: TaskTracker::new(),
            threads: OnceLock::new(),
            thread_clients: OnceLock::new(),
            loops,
            slotless: Arc::new(Semaphore::new(slotless::AT_ONCE)),
            stop: CancellationToken::new(),
            work_ended: Notify::new(),
            look_at_gpus: Notify::new(),
            gpu_faults: Mutex::default(),
            expected_gpus: Mutex::default(),
            engine_has_ended: Notify::new(),
            waited_for: watch::Sender::default(),
        })
    }

    pub(crate) fn now(&self) -> Moment {
        Moment::from_millis(u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// What runs for as long as the node does, for its `/health/ready`.
    pub fn loops(&self) -> &Loops {
        &self.loops
    }

    /// Threads for streams: drivers that are nobody's run on them, and each has connections of its own
    /// to the engines. Only the first call counts.
    pub fn stream_on(&self, threads: StreamThreads) {
        let _ = self.thread_clients.set(threads.iter().map(|_| self.client.apart()).collect());
        let _ = self.threads.set(threads);
    }

    /// Calls engines from the thread that this runs on.
    pub(crate) fn client(&self) -> &EngineClient {
        let own = || self.thread_clients.get()?.get(StreamThread::current()?.index());
        own().unwrap_or(&self.client)
    }

    /// Keeps attempts' streams until the agent stops: at most so many bytes together, and each for its
    /// time.
    pub fn keep_streams(self: &Arc<Self>, bytes: usize) {
        self.with_core(|core, _| core.bound_held(bytes));
        let _ = self.documents.set(DocumentRoom::within(bytes));
        let agent = Arc::clone(self);
        let make = move || Arc::clone(&agent).run_held();
        self.loops.start(&self.tracker, "streams that are kept", &self.stop, make);
    }

    /// Runs attempts for those who open links, until the agent stops.
    pub fn keep_links(self: &Arc<Self>) {
        let agent = Arc::clone(self);
        let make = move || Arc::clone(&agent).run_links(agent.stop.clone());
        self.loops.start(&self.tracker, "links", &self.stop, make);
    }

    /// Ends what nobody has read for its time, and drops what has been kept for its time. Returns when
    /// something is due next.
    pub(crate) fn expire_held(&self, now: Moment) -> Option<Moment> {
        while let Some(attempt) = self.with_core(|core, _| core.held_mut().expired(now)) {
            self.cancel(&attempt, "nobody has read it for its time");
        }
        self.core.lock().held().next_deadline()
    }

    async fn run_held(self: Arc<Self>) {
        loop {
            let next = self.expire_held(self.now());
            let pause = next.map_or(Duration::from_secs(3600), |at| at.since(self.now()));
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.held_sooner.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
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

    /// Changes the core where nothing of it is reported by itself.
    pub(crate) fn with_core<T>(&self, change: impl FnOnce(&mut NodeCore, Moment) -> T) -> T {
        let now = self.now();
        let mut core = self.core.lock();
        let result = change(&mut core, now);
        let removed = core.held_mut().take_removed();
        drop(core);
        // Megabytes in small pieces, at times: nobody waits for the core meanwhile.
        drop(removed);
        result
    }

    /// Changes what is kept of the streams, and sees to it that what is due sooner by that is done then.
    pub(crate) fn change_held<T>(&self, change: impl FnOnce(&mut NodeCore, Moment) -> T) -> T {
        let (result, is_sooner) = self.with_core(|core, now| {
            let before = core.held().next_deadline();
            let result = change(core, now);
            let after = core.held().next_deadline();
            (result, after.is_some_and(|after| before.is_none_or(|before| after < before)))
        });
        if is_sooner {
            self.held_sooner.notify_one();
        }
        result
    }

    /// Changes the core, and wakes the session, which may have something to say about it.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut NodeCore, Moment) -> T) -> T {
        let result = self.with_core(change);
        self.wake.notify_one();
        result
    }

    /// The tokens that this node accepts are others now: the control plane is told.
    pub fn tokens_changed(&self) {
        self.change(NodeCore::tokens_changed);
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
        let is_over = tokio::time::timeout(grace, finished).await.is_err();
        let attempts = self.core.lock().running_count();
        if is_over && attempts > 0 {
            tracing::warn!(attempts, "the grace is over, attempts end as lost");
        }
        self.leave_links();
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

    // ---- reading ----

    pub(crate) fn documents(&self) -> &Arc<DocumentRoom> {
        self.documents.get_or_init(|| DocumentRoom::within(node_core::attempts::HELD_BYTES))
    }

    /// What the streams that are kept take together, bytes.
    pub fn held_bytes(&self) -> usize {
        self.core.lock().held().bytes()
    }

    /// How many there are, running or ended.
    pub fn held_attempts(&self) -> usize {
        self.core.lock().held().attempts()
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

    /// The numbers of GPUs that engines are to have: one that is not seen is told as lost.
    pub(crate) fn expect_gpus(&self, numbers: BTreeSet<u32>) {
        if *self.expected_gpus.lock() != numbers {
            *self.expected_gpus.lock() = numbers;
            self.look_at_gpus();
        }
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
        self.core.lock().session().problem()
    }

    /// Handoff files that bind nothing, and why.
    pub fn problems(&self) -> BTreeMap<String, String> {
        let core = self.core.lock();
        let of_handoff = |(source, problem): (&Source, &Problem)| {
            let (kind, file) = source.file();
            (kind == ProblemKind::Handoff).then(|| (file, problem.message.clone()))
        };
        core.problems().filter_map(of_handoff).collect()
    }

    /// Why the file of pools is not taken as it stands, if it is not.
    pub fn pools_file_problem(&self) -> Option<String> {
        let core = self.core.lock();
        let mut problems = core.problems();
        problems.find_map(|(source, problem)| {
            matches!(source, Source::PoolsFile(_)).then(|| problem.message.clone())
        })
    }

    /// Takes in that something has a problem, or none any more.
    pub(crate) fn set_problem(&self, source: Source, problem: Option<Problem>) {
        self.change(|core, now| core.set_problem(now, source, problem));
    }
}

#[cfg(test)]
#[path = "agent_tests.rs"]
mod tests;
