//! The world: virtual time, a network, nodes with engines, and the control plane's shell.
//!
//! Calls (register, heartbeat) may be lost, doubled, late and overtake each other. Streams are
//! TCP: in order, held back by a partition, broken by a death; but a piece of one, or a node's answer
//! to a dispatch, may be lost without a sign. Everything random comes from the plan's seed.

mod control;
mod events;
mod held;
mod links;
mod network;
mod node;
mod steps;
mod streams;
mod supervised;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use pool_registry_types::node::Intent;
use pool_registry_types::{AttemptId, LogId, Moment, NodeId, TaskId};
use uuid::Uuid;

use crate::coverage::Coverage;
use crate::draw::{NodeFault, Plan};
use crate::oracle::{Broken, Oracle};
use crate::transcript::Writer;
use control::Control;
pub(crate) use events::{Call, CallAnswer, Caller, DoneDue, Heal, Piece, What};
use links::{Get, Watch, Wire};
pub(crate) use network::{Conn, Link};
use node::SimNode;
use steps::is_for_control;
use streams::Client;

/// Longest that a loadable pool may be left alone while a task waits for it.
const LOAD_PATIENCE: std::time::Duration = std::time::Duration::from_secs(12);

/// What the control plane believes of pools that are not loaded, and which it asked for.
#[derive(Debug, Default)]
pub(crate) struct Loads {
    /// Nodes that are online with a loadable pool, and since when.
    pub(crate) loadable: BTreeMap<usize, Moment>,
    /// Whether each node is online and serves, and whether its pool is loadable.
    pub(crate) shown: BTreeMap<usize, (bool, bool)>,
    pub(crate) asked: BTreeMap<usize, Moment>,
    /// When the control plane last stood still or was new.
    pub(crate) disturbed: Option<Moment>,
}

struct Queued {
    at: Moment,
    order: u64,
    what: What,
}

impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// Everything there is.
pub struct World {
    pub(crate) plan: Plan,
    pub(crate) now: Moment,
    pub(crate) random: fastrand::Rng,
    queue: BinaryHeap<Reverse<Queued>>,
    order: u64,
    pub(crate) control: Option<Control>,
    pub(crate) lives: u64,
    pub(crate) stall_until: Option<Moment>,
    pub(crate) stalled: Vec<What>,
    pub(crate) nodes: Vec<SimNode>,
    pub(crate) links: Vec<Link>,
    pub(crate) heartbeats_lost: u32,
    /// What nodes themselves make of attempts, and how many faults of theirs last.
    pub(crate) node_faults: Vec<(Option<NodeFault>, u32)>,
    pub(crate) shortage: u32,
    pub(crate) double_reports: Vec<u32>,
    /// Draws what readers look at, so that they change nothing else.
    pub(crate) readers: fastrand::Rng,
    /// Draws which attempts are kept, and what becomes of their connections.
    pub(crate) keeping: fastrand::Rng,
    /// Draws what becomes of streams.
    pub(crate) streams: fastrand::Rng,
    /// Draws what is lost without a sign, read late, or not taken for a while.
    pub(crate) losing: fastrand::Rng,
    /// The attempts that were given each log, in their order.
    pub(crate) writers: BTreeMap<LogId, Vec<Writer>>,
    pub(crate) clients: BTreeMap<TaskId, Client>,
    /// Of all effects so far.
    pub(crate) digest: u64,
    pub(crate) conns: BTreeMap<u64, Conn>,
    pub(crate) next_conn: u64,
    pub(crate) next_call: u64,
    /// Draws what becomes of links.
    pub(crate) linking: fastrand::Rng,
    pub(crate) wires: Vec<Wire>,
    pub(crate) watches: Vec<Watch>,
    pub(crate) gets: BTreeMap<u64, Get>,
    pub(crate) next_get: u64,
    /// Nodes of whose links something had come when a stall ended, and is not read yet.
    pub(crate) unread_links: BTreeSet<usize>,
    /// Attempts for which an engine was asked.
    pub(crate) asked: BTreeSet<AttemptId>,
    pub(crate) next_boot: u64,
    pub(crate) oracle: Oracle,
    pub(crate) coverage: Coverage,
    pub(crate) broken: Option<Broken>,
    /// Notable events, kept when asked for.
    pub(crate) trace: Option<Vec<String>>,
    pub(crate) liveness_seen: BTreeMap<NodeId, pool_registry_types::node::Liveness>,
    /// Which task is which, for people.
    pub(crate) names: BTreeMap<TaskId, usize>,
    /// Whether an odd engine sent the first tokens of a task's stream.
    pub(crate) voices: BTreeMap<TaskId, bool>,
    /// What operators want of nodes, on the nodes' disks.
    pub(crate) loads: Loads,
    pub(crate) stored_intents: Vec<Intent>,
    /// What the nodes' wall clocks are off, milliseconds.
    pub(crate) clocks: Vec<i64>,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World").field("seed", &self.plan.seed).field("now", &self.now).finish_non_exhaustive()
    }
}

impl World {
    pub fn new(plan: Plan, traced: bool) -> Self {
        let mut world = Self {
            now: Moment::ZERO,
            random: fastrand::Rng::with_seed(plan.seed ^ 0x9e37_79b9_7f4a_7c15),
            queue: BinaryHeap::new(),
            order: 0,
            control: None,
            lives: 0,
            stall_until: None,
            stalled: Vec::new(),
            nodes: Vec::new(),
            links: vec![Link::default(); plan.nodes.len()],
            heartbeats_lost: 0,
            node_faults: vec![(None, 0); plan.nodes.len()],
            shortage: 0,
            double_reports: vec![0; plan.nodes.len()],
            readers: fastrand::Rng::with_seed(plan.seed),
            streams: fastrand::Rng::with_seed(plan.seed ^ 0x7374_7265),
            keeping: fastrand::Rng::with_seed(plan.seed ^ 0x6b65_6570),
            losing: fastrand::Rng::with_seed(plan.seed ^ 0x6c6f_7369),
            writers: BTreeMap::new(),
            clients: BTreeMap::new(),
            digest: 0,
            conns: BTreeMap::new(),
            next_conn: 0,
            next_call: 0,
            linking: fastrand::Rng::with_seed(plan.seed ^ 0x6c69_6e65),
            wires: plan.nodes.iter().map(|_| Wire::default()).collect(),
            watches: vec![Watch::default(); plan.nodes.len()],
            gets: BTreeMap::new(),
            next_get: 0,
            unread_links: BTreeSet::new(),
            asked: BTreeSet::new(),
            next_boot: 0,
            oracle: Oracle::default(),
            coverage: Coverage::default(),
            broken: None,
            trace: traced.then(Vec::new),
            liveness_seen: BTreeMap::new(),
            names: BTreeMap::new(),
            voices: BTreeMap::new(),
            loads: Loads::default(),
            stored_intents: vec![Intent::Serving; plan.nodes.len()],
            clocks: vec![0; plan.nodes.len()],
            plan,
        };
        world.start_control();
        for node in 0..world.plan.nodes.len() {
            world.nodes.push(SimNode::down());
            world.start_node(node);
        }
        for (at, step) in world.plan.steps.clone() {
            world.at(Moment::from_millis(at), What::Step(step));
        }
        world
    }

    /// Runs to the end; the error is the broken invariant, with the time.
    pub fn run(&mut self) -> Result<(), String> {
        let rest = self.plan.queue_timeout.as_secs() * 2_000 + 400_000;
        let end = Moment::from_millis(self.plan.horizon_ms + rest);
        while let Some(Reverse(queued)) = self.queue.pop() {
            if queued.at > end || self.is_at_rest() {
                break;
            }
            self.now = queued.at;
            self.coverage.events += 1;
            self.handle(queued.what);
            if let Some(broken) = self.broken.take() {
                return Err(format!("at {} ms: {broken}", self.now.as_millis()));
            }
        }
        self.coverage.simulated_ms += self.now.as_millis();
        self.coverage.schedules += 1;
        self.oracle
            .at_rest()
            .and_then(|()| self.clients_at_rest())
            .and_then(|()| self.links_at_rest())
            .map_err(|broken| format!("at rest: {broken}"))
    }

    /// The horizon has passed, and every task has its end.
    fn is_at_rest(&self) -> bool {
        self.now.as_millis() > self.plan.horizon_ms && self.oracle.at_rest().is_ok()
    }

    /// A task that never started ends for want of time: where pools could be loaded for it, one of
    /// them was asked for.
    pub(crate) fn was_asked_for(&self, task: TaskId) -> Result<(), String> {
        let plan = &self.plan.tasks[self.names[&task]];
        if plan.constraints.is_some() || !self.oracle.waited_since(task, self.now, LOAD_PATIENCE) {
            return Ok(());
        }
        let long_ago = |at: &Moment| *at + LOAD_PATIENCE <= self.now;
        if self.loads.disturbed.is_some_and(|at| !long_ago(&at)) {
            return Ok(());
        }
        let has_model = |node: &usize| self.plan.nodes[*node].model == plan.model;
        if self.loads.asked.iter().any(|(node, at)| has_model(node) && !long_ago(at)) {
            return Ok(());
        }
        let left_alone = |(node, since): (&usize, &Moment)| has_model(node) && long_ago(since);
        match self.loads.loadable.iter().find(|entry| left_alone(*entry)) {
            Some((node, since)) => Err(format!(
                "{task} ended for want of time, and n{node}, loadable since {} ms, was not asked",
                since.as_millis()
            )),
            None => Ok(()),
        }
    }

    pub(crate) fn at(&mut self, at: Moment, what: What) {
        self.order += 1;
        self.queue.push(Reverse(Queued { at: at.max(self.now), order: self.order, what }));
    }

    pub(crate) fn after_ms(&mut self, millis: u64, what: What) {
        self.at(self.now + std::time::Duration::from_millis(millis), what);
    }

    pub(crate) fn note(&mut self, text: impl FnOnce(&Self) -> String) {
        if self.trace.is_some() {
            let line = format!("{:>9.3} {}", self.now.as_millis() as f64 / 1e3, text(self));
            self.trace.get_or_insert_default().push(line);
        }
    }

    /// The notable events so far.
    pub fn take_trace(&mut self) -> Vec<String> {
        self.trace.take().unwrap_or_default()
    }

    /// A number that two runs share only where the control plane has done the same in both.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    pub fn coverage(&self) -> &Coverage {
        &self.coverage
    }

    pub(crate) fn check(&mut self, result: Result<(), Broken>) {
        if let Err(broken) = result
            && self.broken.is_none()
        {
            self.broken = Some(broken);
        }
    }

    // ---- what happens ----

    fn handle(&mut self, what: What) {
        if self.stall_until.is_some() && is_for_control(&what) {
            self.stalled.push(what);
            return;
        }
        match what {
            What::Step(step) => self.step(&step),
            What::Heal(heal) => self.heal(heal),
            What::CallArrives { caller, call } => self.call_arrives(caller, call),
            What::ControlTimer { life, armed } => self.control_timer(life, armed),
            What::RelayTimer { life, attempt, armed } => self.relay_timer(life, attempt, armed),
            What::StopDue { node, boot, attempt, since, stop } => {
                self.stop_due(node, boot, attempt, since, stop);
            }
            What::ReadDue { life, attempt } => self.read_due(life, attempt),
            What::ResumeDue { life, attempt } => self.resume_due(life, attempt),
            What::HeldDue { node, boot, attempt, since, keeps } => {
                self.held_due(node, boot, attempt, since, keeps);
            }
            What::ClientLooks { task, look } => self.client_looks(task, look),
            What::Fence { life, task, attempt } => self.fence(life, task, attempt),
            What::StreamArrives { conn, piece } => self.stream_arrives(conn, piece),
            What::ProbeAnswered { life, node_id, address, outcome } => {
                self.probe_answered(life, node_id, address, outcome);
            }
            What::IntentAnswered { life, node_id, to, order, outcome } => {
                self.intent_answered(life, node_id, to, order, outcome);
            }
            What::ControlBack => {
                self.oracle.next_life();
                self.start_control();
            }
            What::CutOff { life, down_ms } => self.cut_off(life, down_ms),
            What::ControlEnds { life, down_ms } => self.control_ends(life, down_ms),
            What::NodeBack { node } => self.start_node(node),
            What::DownArrives { get, piece } => self.down_arrives(get, piece),
            What::LinkBroke { life, node, n, get } => self.link_broke(life, node, n, get),
            What::LinkUnacknowledged { node } => self.link_unacknowledged(node),
            What::PostTaken { life, node, id, whole } => self.post_taken(life, node, id, whole),
            What::PostEnds { life, node, id, outcome } => self.post_ends(life, node, id, outcome),
            What::LiveAnswered { life, node, boot } => self.live_answered(life, node, boot),
            What::LaneTimer { life, node, armed } => self.lane_timer(life, node, armed),
            What::LinkSays { life, event } => self.link_says(life, *event),
            What::DoneDue(due) => self.done_due(due),
            What::DeadDue { life, node, n } => self.dead_due(life, node, n),
            What::StuckDue { life, node, boot, attempt } => self.stuck_due(life, node, boot, attempt),
            What::LifeDue { life } => self.life_due(life),
            other => self.handle_at_node(other),
        }
    }

    pub(crate) fn node_id(&self, node: usize) -> NodeId {
        NodeId::new(&format!("n{node}")).expect("a valid node id")
    }

    pub(crate) fn task_id(task: usize) -> TaskId {
        TaskId(Uuid::from_u128(task as u128 + 1))
    }
}
