//! The way to the lanes for everybody but them: which nodes are served by a link, attempts that begin
//! there, and how the links stand.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use attempt_link::control::Action;
use attempt_link::wire::{Start, StartFacts, StartSpec};
use owned_tasks::StreamThread;
use parking_lot::Mutex;
use pool_registry_types::node::{LINK_FEATURE, RegisterRequest};
use pool_registry_types::task::Resume;
use pool_registry_types::view::{LinkState, LinkView};
use pool_registry_types::{AttemptId, BootId, LifeId, Moment, NodeId};
use task_scheduler::Dispatch;
use task_stream::Payload;
use tokio::sync::mpsc;

use crate::services::feed::Feed;
use crate::services::spans::trace_of;

const DOES_NOT_SPEAK_IT: &str = "the node does not say that it speaks it";

/// Where what a lane brings of an attempt goes, in the lane's own turn.
pub(crate) trait AttemptSink: std::fmt::Debug + Send + Sync {
    /// Takes it. Returns whether it is the first since [`AttemptSink::flush`], which is to follow.
    fn take(&self, now: Moment, action: Action) -> bool;
    /// Nothing more has arrived for now.
    fn flush(&self, now: Moment);
    /// The lane brings no more.
    fn release(&self);
}

/// A lane's hold on a sink, which hears of its end.
#[derive(Debug)]
pub(super) struct SinkOfLane(Arc<dyn AttemptSink>);

impl SinkOfLane {
    pub(super) fn new(sink: Arc<dyn AttemptSink>) -> Self {
        Self(sink)
    }

    /// Takes it. Returns the sink where it is to be flushed and was not before.
    pub(super) fn take(&self, now: Moment, action: Action) -> Option<Arc<dyn AttemptSink>> {
        self.0.take(now, action).then(|| Arc::clone(&self.0))
    }
}

impl Drop for SinkOfLane {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// What lanes are told. Each attempt and each registration brings a few of them, whose number the
/// control loop's own mailbox bounds; so this way may be without a bound, and nobody waits on it.
#[derive(Debug)]
pub(super) enum Order {
    Registered { node_id: NodeId, address: String, boot_id: BootId },
    Gone { node_id: NodeId },
    Start { node_id: NodeId, start: Box<Start>, sink: SinkOfLane },
    Cancel { node_id: NodeId, attempt: AttemptId },
    Done { node_id: NodeId, attempt: AttemptId },
}

/// One of a node's lanes as it is shown.
#[derive(Debug, Clone)]
pub(super) struct Shown {
    pub(super) link: LinkView,
    /// The node has no link: it is served by exchanges until it registers again.
    pub(super) serves_without: bool,
}

/// How all links stand, and what became of them so far.
#[derive(Debug, Default)]
pub(crate) struct LinkTable {
    nodes: Mutex<BTreeMap<NodeId, Box<[Shown]>>>,
    resumes: AtomicU64,
    interrupted_ms: AtomicU64,
    pub(super) dropped: AtomicU64,
    pub(super) own_shortages: AtomicU64,
    /// What the lanes keep of records whose last parts have not come, bytes. Counts as live streams do.
    pub(super) parts_bytes: Arc<AtomicUsize>,
}

impl LinkTable {
    pub(super) fn change(&self, node_id: &NodeId, lane: u16, change: impl FnOnce(&mut Shown)) {
        let mut nodes = self.nodes.lock();
        if let Some(shown) = nodes.get_mut(node_id).and_then(|lanes| lanes.get_mut(usize::from(lane))) {
            change(shown);
        }
    }

    pub(super) fn was_interrupted(&self, span: Duration, is_up: bool) {
        let span_ms = u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
        self.interrupted_ms.fetch_add(span_ms, Ordering::Relaxed);
        self.resumes.fetch_add(u64::from(is_up), Ordering::Relaxed);
    }

    /// What is kept of records that are not whole.
    pub(crate) fn parts_bytes(&self) -> &Arc<AtomicUsize> {
        &self.parts_bytes
    }

    // ---- for metrics ----

    pub(crate) fn states(&self) -> Vec<(NodeId, LinkState)> {
        let nodes = self.nodes.lock();
        let state = |lanes: &[Shown]| {
            let link = LinkView::of_lanes(lanes.iter().map(|shown| &shown.link));
            link.map(|link| link.state)
        };
        nodes.iter().filter_map(|(node_id, lanes)| Some((node_id.clone(), state(lanes)?))).collect()
    }

    /// Times that an interrupted link came up again.
    pub(crate) fn resumes(&self) -> u64 {
        self.resumes.load(Ordering::Relaxed)
    }

    /// Whole seconds of all interruptions that are over.
    pub(crate) fn interrupted_seconds(&self) -> u64 {
        self.interrupted_ms.load(Ordering::Relaxed) / 1_000
    }

    /// Connections that could not be made for want of something of our own.
    pub(crate) fn own_shortages(&self) -> u64 {
        self.own_shortages.load(Ordering::Relaxed)
    }

    /// Records of attempts that nobody knows.
    pub(crate) fn dropped_records(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// The way to the lanes.
#[derive(Debug)]
pub(crate) struct Links {
    pub(crate) life: LifeId,
    pub(crate) table: Arc<LinkTable>,
    drivers: Vec<mpsc::UnboundedSender<Order>>,
}

impl Links {
    /// The lanes are driven by so many; the other ends of the ways to them.
    pub(super) fn new(life: LifeId, drivers: usize) -> (Self, Vec<mpsc::UnboundedReceiver<Order>>) {
        let (drivers, orders) = (0..drivers).map(|_| mpsc::unbounded_channel()).unzip();
        (Self { life, table: Arc::default(), drivers }, orders)
    }

    /// The node has registered. Returns how its link stands where no lane will tell.
    pub(crate) fn registered(&self, request: &RegisterRequest) -> Option<LinkView> {
        if !request.features.iter().any(|feature| feature == LINK_FEATURE) {
            self.gone(&request.node_id);
            return Some(LinkView { state: LinkState::None, reason: Some(DOES_NOT_SPEAK_IT.to_owned()) });
        }
        let connecting =
            Shown { link: LinkView { state: LinkState::Connecting, reason: None }, serves_without: false };
        {
            let mut nodes = self.table.nodes.lock();
            let lanes = nodes
                .entry(request.node_id.clone())
                .or_insert_with(|| vec![connecting; self.drivers.len()].into());
            for shown in lanes.iter_mut() {
                shown.serves_without = false;
            }
        }
        for driver in &self.drivers {
            let (node_id, address) = (request.node_id.clone(), request.address.clone());
            order(driver, Order::Registered { node_id, address, boot_id: request.boot_id });
        }
        None
    }

    /// The node is not known any more, or has registered without a link.
    pub(crate) fn gone(&self, node_id: &NodeId) {
        let was_known = self.table.nodes.lock().remove(node_id).is_some();
        for driver in self.drivers.iter().filter(|_| was_known) {
            order(driver, Order::Gone { node_id: node_id.clone() });
        }
    }

    /// The node's lane of the thread for streams that this runs on, for an attempt; nothing where it is
    /// served without.
    pub(crate) fn lane(&self, node_id: &NodeId, attempt: AttemptId) -> Option<Lane> {
        let here = StreamThread::current().map_or(0, |thread| thread.index()) % self.drivers.len();
        {
            let nodes = self.table.nodes.lock();
            nodes.get(node_id)?.get(here).filter(|shown| !shown.serves_without)?;
        }
        let orders = self.drivers.get(here)?.clone();
        Some(Lane { node_id: node_id.clone(), attempt, orders })
    }
}

fn order(driver: &mpsc::UnboundedSender<Order>, order: Order) {
    // Without lanes the process ends.
    let _ = driver.send(order);
}

/// The way of one attempt to its node's lane.
#[derive(Debug)]
pub(crate) struct Lane {
    node_id: NodeId,
    attempt: AttemptId,
    orders: mpsc::UnboundedSender<Order>,
}

impl Lane {
    /// Begins the attempt.
    pub(crate) fn start(
        self,
        now: Moment,
        dispatch: &Dispatch,
        payload: &Payload,
        resume: Option<Resume>,
        feed: Arc<Feed>,
    ) -> LinkedAttempt {
        let start = Box::new(start_of(now, dispatch, payload, resume));
        let sink = SinkOfLane::new(Arc::clone(&feed) as Arc<dyn AttemptSink>);
        let order = Order::Start { node_id: self.node_id.clone(), start, sink };
        // Without its lane it is released at once.
        let _ = self.orders.send(order);
        LinkedAttempt { lane: self, feed }
    }
}

/// What goes up. Its number is the lane's.
fn start_of(now: Moment, dispatch: &Dispatch, payload: &Payload, resume: Option<Resume>) -> Start {
    // One span an attempt, however often it goes.
    let trace = trace_of(dispatch);
    let facts = StartFacts {
        number: 0,
        pool_id: dispatch.pool.pool_id.clone(),
        attempt_id: dispatch.attempt,
        task_id: dispatch.task,
        log_id: dispatch.log,
        // Of an answer that is passed on its own events count.
        first_index: if payload.format.passes() { 0 } else { dispatch.first_index },
        deadline_ms: dispatch.task_deadline.map(|at| at.millis_since(now)),
        replica_hint: dispatch.warm_replica.clone(),
        resume,
        spec: StartSpec::of(&dispatch.spec, dispatch.max_tokens),
        payload_format: payload.format.clone(),
        // What a client of `/v1` has been given is not asked for again.
        keep: !payload.format.passes(),
        traceparent: trace.traceparent,
        correlation_id: trace.correlation_id,
        tracestate: trace.tracestate,
        caller: dispatch.spec.caller.clone(),
    };
    Start::new(facts, payload)
}

/// An attempt that goes by its node's link. It ends there by [`LinkedAttempt::stop`] or by its node.
#[derive(Debug)]
pub(crate) struct LinkedAttempt {
    lane: Lane,
    feed: Arc<Feed>,
}

impl LinkedAttempt {
    /// Returns when its lane has brought something that is to be looked at.
    pub(crate) async fn changed(&self) {
        self.feed.changed().await;
    }

    /// Ends it at its node.
    pub(crate) fn stop(self) {
        let Lane { node_id, attempt, orders } = self.lane;
        let _ = orders.send(Order::Cancel { node_id, attempt });
    }

    /// Its end is in its log: the node need not keep it.
    pub(crate) fn done(self) {
        let Lane { node_id, attempt, orders } = self.lane;
        let _ = orders.send(Order::Done { node_id, attempt });
    }
}
