//! What readers are answered from, outside of the control loop.
//!
//! Each task and each session is written here by the loop when it has changed, before the answer to
//! what has changed it goes out: a read that begins after that answer sees it. What nobody waits for is
//! written once for all messages that are there. Lists, the view of
//! the cluster, of which only what has changed is made anew, and the numbers are snapshots: made by
//! the loop when somebody asks for one, at most each 100 ms whoever asks, and shared by all. Only a
//! change of the nodes that was answered makes the snapshot before it too old, however young it is,
//! and a report does for whoever asks for its node, or for a pool.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use daemon_kit::Clock;
use parking_lot::{Mutex, RwLock};
use pool_registry_types::node::Liveness;
use pool_registry_types::snapshot::ClusterSnapshot;
use pool_registry_types::task::{Metrics, Priority, SessionView, TaskState};
use pool_registry_types::view::NodeView;
use pool_registry_types::{
    AttemptId, ErrorBody, ErrorCode, HolderId, ModelRef, Moment, NodeId, PoolKey, SessionId, SessionKey,
    TaskId,
};
use task_scheduler::{ControlCore, Counters, TaskList, TaskRecord, Waiting, WaitingTasks};
use tokio::sync::{Notify, watch};
use uuid::Uuid;

/// How old a snapshot may be that readers are shown. Source: .specs/01 CLOUD-1771.
pub(crate) const MOST_AGE: Duration = Duration::from_millis(100);

/// Numbers for the metrics and the probes.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) counters: Counters,
    pub(crate) nodes: Vec<(Liveness, u32)>,
    pub(crate) queues: Vec<(ModelRef, Priority, usize)>,
    pub(crate) running: usize,
    pub(crate) queued: usize,
    pub(crate) sessions: usize,
    /// Milliseconds since each node's last heartbeat.
    pub(crate) heartbeat_ages: Vec<(NodeId, u64)>,
    pub(crate) heartbeat_interval: Duration,
    pub(crate) mass_silence: bool,
    pub(crate) draining: bool,
    /// Which tasks wait; counted when the control plane stops.
    pub(crate) waiting: Option<WaitingTasks>,
}

impl Facts {
    pub(crate) fn of(core: &mut ControlCore, now: Moment) -> Self {
        Self {
            counters: core.counters(),
            nodes: core.registry().counts().into_iter().collect(),
            queues: core.queue_depths(),
            running: core.running(),
            queued: core.queued(),
            sessions: core.session_count(),
            heartbeat_ages: core.registry().heartbeat_ages(now).map(|(id, age)| (id.clone(), age)).collect(),
            heartbeat_interval: core.heartbeat_interval(),
            mass_silence: core.registry().mass_silence_since().is_some(),
            draining: core.is_draining(),
            waiting: core.is_draining().then(|| core.waiting_tasks(now)),
        }
    }
}

/// Tokens a second of one slot, pool by pool; of all pools, and so only for who shows them.
pub(crate) type AllPaces = Vec<(PoolKey, f64)>;

/// Where every task that has not ended stands, by its key.
pub(crate) type AllMetrics = BTreeMap<TaskId, (TaskState, Metrics)>;

/// A snapshot, and when it was made.
#[derive(Debug)]
struct Made<T> {
    at: Moment,
    /// The number of the last change of the nodes that it knows.
    nodes_changed: u64,
    value: Arc<T>,
}

/// The latest snapshot of one kind.
#[derive(Debug)]
struct Snapshot<T> {
    latest: watch::Sender<Option<Arc<Made<T>>>>,
    asked: AtomicBool,
}

impl<T> Default for Snapshot<T> {
    fn default() -> Self {
        Self { latest: watch::Sender::new(None), asked: AtomicBool::new(false) }
    }
}

impl<T> Snapshot<T> {
    /// Makes a new one where one was asked for. Returns whether it did.
    fn serve(&self, at: Moment, nodes_changed: u64, make: impl FnOnce() -> T) -> bool {
        let asked = self.asked.swap(false, Ordering::AcqRel);
        if asked {
            let made = Made { at, nodes_changed, value: Arc::new(make()) };
            self.latest.send_replace(Some(Arc::new(made)));
        }
        asked
    }
}

/// The tasks that are kept.
#[derive(Debug, Default)]
struct Tasks {
    by_key: HashMap<TaskId, Arc<TaskRecord>>,
    by_id: BTreeMap<(TaskId, HolderId), Arc<TaskRecord>>,
    /// Whose their attempts are.
    attempts: HashMap<AttemptId, HolderId>,
}

impl Tasks {
    fn put(&mut self, record: &Arc<TaskRecord>) {
        // A record is dropped with its task before another task goes under its key.
        let before = self.by_key.insert(record.key, Arc::clone(record));
        // Mostly its attempts are those that it had.
        if before.as_ref().is_none_or(|before| !before.attempts().eq(record.attempts())) {
            for attempt in before.iter().flat_map(|before| before.attempts()) {
                self.attempts.remove(&attempt);
            }
            self.attempts.extend(record.attempts().map(|attempt| (attempt, record.holder)));
        }
        self.by_id.insert((record.id, record.holder), Arc::clone(record));
    }

    fn remove(&mut self, key: TaskId) -> Option<Arc<TaskRecord>> {
        let gone = self.by_key.remove(&key)?;
        self.by_id.remove(&(gone.id, gone.holder));
        for attempt in gone.attempts() {
            self.attempts.remove(&attempt);
        }
        Some(gone)
    }
}

/// Where every holder's things of one id stand among all of them.
fn of_any<I: Copy>(id: I) -> std::ops::RangeInclusive<(I, HolderId)> {
    (id, HolderId(Uuid::nil()))..=(id, HolderId(Uuid::max()))
}

/// A session as it was when it last changed.
#[derive(Debug, Clone)]
struct WrittenSession {
    as_of: Moment,
    /// No task of it is open: its time to live runs.
    is_idle: bool,
    view: SessionView,
}

/// Most nodes that are told apart between two snapshots of the cluster.
const MOST_WRITTEN: usize = 1024;

/// The nodes that something was written of.
#[derive(Debug, Default)]
struct Written {
    nodes: BTreeSet<NodeId>,
    /// More than are told apart: any may be.
    too_many: bool,
}

impl Written {
    fn add(&mut self, node_id: NodeId) {
        if self.nodes.len() < MOST_WRITTEN {
            self.nodes.insert(node_id);
        } else {
            self.too_many |= !self.nodes.contains(&node_id);
        }
    }
}

/// All that readers are shown.
#[derive(Debug)]
pub(crate) struct Published {
    clock: Clock,
    tasks: RwLock<Tasks>,
    sessions: RwLock<BTreeMap<(SessionId, HolderId), WrittenSession>>,
    /// Rises with every answered change of the nodes but their reports.
    nodes_changed: AtomicU64,
    /// Nodes that were written of, their reports included, since the last snapshot of the cluster.
    written: RwLock<Written>,
    cluster: Snapshot<ClusterSnapshot>,
    facts: Snapshot<Facts>,
    paces: Snapshot<AllPaces>,
    list: Snapshot<TaskList>,
    metrics: Snapshot<AllMetrics>,
    backlog: Snapshot<WaitingTasks>,
    /// Some snapshot was asked for.
    wanted: Notify,
    /// The loop has ended: nothing new comes.
    over: AtomicBool,
    /// By number, for the list; only the loop touches it.
    by_number: Mutex<BTreeMap<u64, Arc<TaskRecord>>>,
}

impl Published {
    pub(crate) fn new(clock: Clock) -> Self {
        Self {
            clock,
            tasks: RwLock::default(),
            sessions: RwLock::default(),
            nodes_changed: AtomicU64::new(0),
            written: RwLock::default(),
            cluster: Snapshot::default(),
            facts: Snapshot::default(),
            paces: Snapshot::default(),
            list: Snapshot::default(),
            metrics: Snapshot::default(),
            backlog: Snapshot::default(),
            wanted: Notify::new(),
            over: AtomicBool::new(false),
            by_number: Mutex::default(),
        }
    }

    pub(crate) fn now(&self) -> Moment {
        self.clock.now()
    }

    // ---- what readers ask ----

    /// The holder's task as it is; nothing for one that is not kept.
    pub(crate) fn task(&self, holder: HolderId, id: TaskId) -> Option<Arc<TaskRecord>> {
        self.tasks.read().by_id.get(&(id, holder)).cloned()
    }

    pub(crate) fn task_by_key(&self, key: TaskId) -> Option<Arc<TaskRecord>> {
        self.tasks.read().by_key.get(&key).cloned()
    }

    /// Who has a task of this id.
    pub(crate) fn holders_of_task(&self, id: TaskId) -> Vec<HolderId> {
        self.tasks.read().by_id.range(of_any(id)).map(|((_, holder), _)| *holder).collect()
    }

    /// Who has a session of this id.
    pub(crate) fn holders_of_session(&self, id: SessionId) -> Vec<HolderId> {
        self.sessions.read().range(of_any(id)).map(|((_, holder), _)| *holder).collect()
    }

    /// Leaves of attempts those of the holder's tasks, and nothing of what engines have written.
    pub(crate) fn show_own(&self, holder: HolderId, node: &mut NodeView) {
        let tasks = self.tasks.read();
        let is_own = |attempt: &AttemptId| tasks.attempts.get(attempt) == Some(&holder);
        node.running_attempts.retain(is_own);
        for pool in &mut node.pools {
            for replica in &mut pool.report.replicas {
                replica.attempts.retain(is_own);
                replica.held.retain(is_own);
            }
            if let Some(supervised) = &mut pool.report.supervised {
                supervised.log_tail.clear();
            }
        }
    }

    pub(crate) fn session(&self, key: SessionKey) -> Option<SessionView> {
        let known = self.sessions.read().get(&(key.session_id, key.holder)).cloned();
        let WrittenSession { as_of, is_idle, mut view } = known?;
        if is_idle {
            view.ttl_ms = view.ttl_ms.saturating_sub(self.clock.now().millis_since(as_of));
        }
        Some(view)
    }

    /// The nodes and their pools, with every change of them that was answered.
    pub(crate) async fn cluster(&self) -> Result<Arc<ClusterSnapshot>, ErrorBody> {
        self.latest(&self.cluster, MOST_AGE).await
    }

    /// The same, and what was answered of this node, or of any, in its reports too.
    pub(crate) async fn cluster_with(
        &self,
        node_id: Option<&NodeId>,
    ) -> Result<Arc<ClusterSnapshot>, ErrorBody> {
        let written = {
            let written = self.written.read();
            written.too_many || node_id.map_or(!written.nodes.is_empty(), |id| written.nodes.contains(id))
        };
        if written { self.latest(&self.cluster, Duration::ZERO).await } else { self.cluster().await }
    }

    pub(crate) async fn facts(&self) -> Result<Arc<Facts>, ErrorBody> {
        self.latest(&self.facts, MOST_AGE).await
    }

    /// The numbers as of a moment after this call.
    pub(crate) async fn facts_now(&self) -> Result<Arc<Facts>, ErrorBody> {
        self.latest(&self.facts, Duration::ZERO).await
    }

    pub(crate) async fn paces(&self) -> Result<Arc<AllPaces>, ErrorBody> {
        self.latest(&self.paces, MOST_AGE).await
    }

    pub(crate) async fn list(&self) -> Result<Arc<TaskList>, ErrorBody> {
        self.latest(&self.list, MOST_AGE).await
    }

    pub(crate) async fn metrics(&self) -> Result<Arc<AllMetrics>, ErrorBody> {
        self.latest(&self.metrics, MOST_AGE).await
    }

    /// How many tasks wait, and what for.
    pub(crate) async fn backlog(&self) -> Result<Arc<WaitingTasks>, ErrorBody> {
        self.latest(&self.backlog, MOST_AGE).await
    }

    /// Where a task stands that waits.
    pub(crate) async fn waiting(&self, task: &TaskRecord) -> Result<Option<Waiting>, ErrorBody> {
        let all = self.metrics().await?;
        // One that is not there has come since.
        Ok(all.get(&task.key).map_or_else(
            || task.waiting.clone(),
            |(_, metrics)| {
                let Metrics { queue_position, waiting_for, .. } = metrics;
                Some(Waiting { queue_position: *queue_position, waiting_for: waiting_for.clone() })
            },
        ))
    }

    /// A snapshot that was made at most so long before this call, and after every change of the
    /// nodes that was answered before it. Errors: `DRAINING` when the loop has ended.
    async fn latest<T>(&self, snapshot: &Snapshot<T>, age: Duration) -> Result<Arc<T>, ErrorBody> {
        let oldest = self.clock.now().before(age);
        let nodes_changed = self.nodes_changed.load(Ordering::Acquire);
        let mut latest = snapshot.latest.subscribe();
        loop {
            if let Some(made) = latest.borrow_and_update().as_ref()
                && made.nodes_changed >= nodes_changed
                && (made.at > oldest || (age > Duration::ZERO && made.at == oldest))
            {
                return Ok(Arc::clone(&made.value));
            }
            if self.over.load(Ordering::Acquire) {
                let message = "the control plane is shutting down";
                return Err(ErrorBody::new(ErrorCode::Draining, message));
            }
            if !snapshot.asked.swap(true, Ordering::AcqRel) {
                self.wanted.notify_one();
            }
            // The sender lives as long as this does.
            let _ = latest.changed().await;
        }
    }

    // ---- what the loop tells ----

    /// Until a reader wants a snapshot.
    pub(crate) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Makes the snapshots that were asked for.
    pub(crate) fn serve(&self, now: Moment, core: &mut ControlCore) {
        let nodes_changed = self.nodes_changed.load(Ordering::Acquire);
        if self.cluster.serve(now, nodes_changed, || core.snapshot(now)) {
            *self.written.write() = Written::default();
        }
        self.facts.serve(now, nodes_changed, || Facts::of(core, now));
        self.paces.serve(now, nodes_changed, || core.paces());
        self.list.serve(now, nodes_changed, || TaskList(self.by_number.lock().values().cloned().collect()));
        self.metrics.serve(now, nodes_changed, || core.metrics(now));
        self.backlog.serve(now, nodes_changed, || core.waiting_tasks(now));
    }

    /// A node has reported.
    pub(crate) fn node_reported(&self, node_id: NodeId) {
        self.written.write().add(node_id);
    }

    /// A node has come, gone, or was given an order: what was made before is too old.
    pub(crate) fn node_changed(&self, node_id: NodeId) {
        self.written.write().add(node_id);
        self.nodes_changed.fetch_add(1, Ordering::AcqRel);
    }

    /// Writes down what an event has changed of tasks and sessions.
    pub(crate) fn take(&self, now: Moment, core: &mut ControlCore) {
        let (tasks, sessions) = core.take_changed();
        if !tasks.is_empty() {
            let (mut kept, mut by_number) = (self.tasks.write(), self.by_number.lock());
            for key in tasks {
                if let Some(record) = core.record(key).map(Arc::new) {
                    kept.put(&record);
                    by_number.insert(record.number, record);
                } else if let Some(gone) = kept.remove(key) {
                    by_number.remove(&gone.number);
                }
            }
        }
        if !sessions.is_empty() {
            let mut written = self.sessions.write();
            for key in sessions {
                let (is_idle, id) = (core.session_is_idle(key), (key.session_id, key.holder));
                match core.session_view(now, key) {
                    Some(view) => drop(written.insert(id, WrittenSession { as_of: now, is_idle, view })),
                    None => drop(written.remove(&id)),
                }
            }
        }
    }

    /// The loop has ended: whoever waits is told.
    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Release);
        self.cluster.latest.send_modify(|_| {});
        self.facts.latest.send_modify(|_| {});
        self.paces.latest.send_modify(|_| {});
        self.list.latest.send_modify(|_| {});
        self.metrics.latest.send_modify(|_| {});
        self.backlog.latest.send_modify(|_| {});
    }
}
