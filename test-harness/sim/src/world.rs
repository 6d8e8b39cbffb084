//! The world: virtual time, a network, nodes with engines, and the control plane's shell.
//!
//! Calls (register, heartbeat) may be lost, doubled, late and overtake each other. Streams are
//! TCP: in order, held back by a partition, broken by a death. Everything random comes from
//! the plan's seed.

mod control;
mod held;
mod node;
mod streams;
mod supervised;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use pool_registry_types::node::{
    Heartbeat, HeartbeatAnswer, Intent, IntentOrder, RegisterAnswer, RegisterRequest,
};
use pool_registry_types::{AttemptId, BootId, Epoch, ErrorBody, LogId, Moment, NodeId, ReplicaId, TaskId};
use task_scheduler::{Dispatch, HowEnded, ProbeOutcome, ReplyTo};
use uuid::Uuid;

use crate::coverage::Coverage;
use crate::draw::{NodeFault, Plan, Step};
use crate::oracle::{Broken, Oracle};
use crate::transcript::Writer;
use control::Control;
use held::{Closing, Keeps};
use node::SimNode;
use node_core::supervisor::RunId;
use streams::{Client, Stop};

/// A call of a node to the control plane.
#[derive(Debug, Clone)]
pub(crate) enum Call {
    Register(RegisterRequest),
    Heartbeat(Heartbeat),
    Deregister(Epoch),
}

#[derive(Debug, Clone)]
pub(crate) enum CallAnswer {
    Registered(Result<RegisterAnswer, ErrorBody>),
    Heartbeat {
        answer: Result<HeartbeatAnswer, ErrorBody>,
        /// The report was taken, and not older than one taken before.
        taken: bool,
    },
    Deregistered,
}

/// Who waits for the answer to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Caller {
    pub(crate) node: usize,
    pub(crate) boot: BootId,
    pub(crate) call: u64,
}

/// What comes back over a stream.
#[derive(Debug, Clone)]
pub(crate) enum Piece {
    Headers {
        report_seq: u64,
        replica_id: ReplicaId,
    },
    Refusal(ErrorBody),
    /// The node's answer before it takes an attempt.
    Answer(Box<HowEnded>),
    /// Bytes of the node's event stream, cut anywhere.
    Bytes(Vec<u8>),
    /// The connection is gone.
    Reset(&'static str),
}

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

#[derive(Debug)]
pub(crate) enum What {
    Step(Step),
    /// A partition or another lasting fault ends.
    Heal(Heal),
    CallArrives {
        caller: Caller,
        call: Call,
    },
    AnswerArrives {
        caller: Caller,
        answer: CallAnswer,
    },
    CallTimesOut {
        caller: Caller,
    },
    ControlTimer {
        life: u64,
        armed: Moment,
    },
    RelayTimer {
        life: u64,
        attempt: AttemptId,
        armed: Moment,
    },
    /// The attempt has been over for a while.
    StopDue {
        node: usize,
        boot: BootId,
        attempt: AttemptId,
        since: Moment,
        stop: Stop,
    },
    ClientLooks {
        task: TaskId,
        look: u64,
    },
    Fence {
        life: u64,
        task: TaskId,
        attempt: AttemptId,
    },
    StreamArrives {
        conn: u64,
        piece: Piece,
    },
    OpenArrives {
        conn: u64,
    },
    DropArrives {
        conn: u64,
    },
    /// The stream of a kept attempt is to be asked for, and is asked for from a record on.
    ResumeDue {
        life: u64,
        attempt: AttemptId,
    },
    ResumeArrives {
        conn: u64,
        from: u64,
    },
    /// A stop comes once more.
    StopAgain {
        node: usize,
        boot: BootId,
        attempt: AttemptId,
    },
    /// What a node keeps is to be gone by now.
    HeldDue {
        node: usize,
        boot: BootId,
        attempt: AttemptId,
        since: Moment,
        keeps: Keeps,
    },
    ProbeArrives {
        life: u64,
        node: usize,
        address: String,
        authorized: bool,
    },
    IntentArrives {
        life: u64,
        node: usize,
        to: ReplyTo,
        order: IntentOrder,
    },
    IntentAnswered {
        life: u64,
        node_id: NodeId,
        to: ReplyTo,
        order: IntentOrder,
        outcome: Result<(), String>,
    },
    ProbeAnswered {
        life: u64,
        node_id: NodeId,
        address: String,
        outcome: ProbeOutcome,
    },
    NodeTimer {
        node: usize,
        boot: BootId,
        armed: Moment,
    },
    EngineStep {
        node: usize,
        boot: BootId,
        attempt: AttemptId,
    },
    SlotReleased {
        node: usize,
        boot: BootId,
        attempt: AttemptId,
    },
    KeepAlive {
        conn: u64,
    },
    /// A task waits for the node's pool.
    LoadArrives {
        node: usize,
    },
    EngineLoaded {
        node: usize,
        boot: BootId,
        run: RunId,
    },
    EngineGone {
        node: usize,
        boot: BootId,
        run: RunId,
    },
    EngineBack {
        node: usize,
        boot: BootId,
    },
    Observe {
        node: usize,
        boot: BootId,
    },
    /// It leaves once nothing runs any more, or when its grace is over.
    LeaveNow {
        node: usize,
        boot: BootId,
        down_ms: u64,
        grace_end: Moment,
    },
    NodeBack {
        node: usize,
    },
    /// The grace of a control plane that shuts down is over.
    CutOff {
        life: u64,
        down_ms: u64,
    },
    /// It ends.
    ControlEnds {
        life: u64,
        down_ms: u64,
    },
    ControlBack,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Heal {
    Partition { node: usize, to_cp: bool, to_node: bool },
    Stop { node: usize },
    Heartbeats,
    HangEngine { node: usize },
    SlowEngine { node: usize },
    SickEngine { node: usize },
    ForeignLoad { node: usize },
    BusyEngine { node: usize },
    NodeFault { node: usize },
    Shortage,
    DoubleReports { node: usize },
    Retire { model: usize },
    Stall,
}

/// One connection of an attempt.
#[derive(Debug)]
pub(crate) struct Conn {
    pub(crate) node: usize,
    pub(crate) dispatch: Dispatch,
    pub(crate) life: u64,
    pub(crate) cp_open: bool,
    pub(crate) node_open: bool,
    /// TCP keeps the order: nothing arrives before this.
    pub(crate) not_before: Moment,
    /// What waits for the partition to heal.
    pub(crate) held: Vec<Piece>,
    pub(crate) drop_held: bool,
    /// The node has sent its final frame, or the `end` frame.
    pub(crate) ended_at_node: bool,
    pub(crate) ended_well: bool,
    /// Bytes that were cut off and come with the next ones.
    pub(crate) tail: Vec<u8>,
    /// It was lost on its way: nothing more comes through.
    pub(crate) broken: bool,
    /// Its node keeps the attempt, whatever becomes of the connection.
    pub(crate) keeps: bool,
    /// Where its reader stands; absent while there is none.
    pub(crate) cursor: Option<node_core::Cursor>,
    pub(crate) closing: Closing,
}

/// Blocked directions of a node's link, counted.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Link {
    pub(crate) to_cp: u32,
    pub(crate) to_node: u32,
    pub(crate) healed: Moment,
}

impl Link {
    /// Whether streams have flowed for so long that nothing of a partition is still on its way.
    pub(crate) fn is_calm(&self, now: Moment) -> bool {
        !self.blocked() && (self.healed == Moment::ZERO || now.millis_since(self.healed) > 3_000)
    }

    pub(crate) fn blocked(&self) -> bool {
        self.to_cp > 0 || self.to_node > 0
    }
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
    /// The attempts that were given each log, in their order.
    pub(crate) writers: BTreeMap<LogId, Vec<Writer>>,
    pub(crate) clients: BTreeMap<TaskId, Client>,
    /// Of all effects so far.
    pub(crate) digest: u64,
    pub(crate) conns: BTreeMap<u64, Conn>,
    pub(crate) next_conn: u64,
    pub(crate) next_call: u64,
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
            writers: BTreeMap::new(),
            clients: BTreeMap::new(),
            digest: 0,
            conns: BTreeMap::new(),
            next_conn: 0,
            next_call: 0,
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

    fn per_mille(&mut self, rate: u32) -> bool {
        rate > 0 && self.random.u32(..1_000) < rate
    }

    // ---- the network ----

    /// Carries a call of a node, or loses it.
    pub(crate) fn send_call(&mut self, caller: Caller, call: Call) {
        self.after_ms(5_000, What::CallTimesOut { caller });
        let blackhole = self.heartbeats_lost > 0 && matches!(call, Call::Heartbeat(_));
        if self.links[caller.node].to_cp > 0 || blackhole {
            return;
        }
        if self.control.is_none() {
            // The connection is refused.
            let delay = self.delay();
            return self.after_ms(delay, What::CallTimesOut { caller });
        }
        if self.per_mille(self.plan.lost) {
            return self.coverage.hit("message: lost");
        }
        if self.per_mille(self.plan.doubled) {
            self.coverage.hit("message: doubled");
            let delay = self.delay() + self.random.u64(..3_000);
            self.after_ms(delay, What::CallArrives { caller, call: call.clone() });
        }
        let call = match call {
            Call::Heartbeat(mut beat) if self.double_reports[caller.node] > 0 => {
                beat.pools.extend(beat.pools.clone());
                Call::Heartbeat(beat)
            }
            call => call,
        };
        let mut delay = self.delay();
        if self.per_mille(self.plan.late) {
            self.coverage.hit("message: late");
            delay += self.random.u64(1_000..9_000);
        }
        self.after_ms(delay, What::CallArrives { caller, call });
    }

    pub(crate) fn send_answer(&mut self, caller: Caller, answer: CallAnswer) {
        if self.links[caller.node].to_node > 0 {
            return;
        }
        if self.per_mille(self.plan.lost) {
            return self.coverage.hit("message: lost");
        }
        let delay = self.delay();
        self.after_ms(delay, What::AnswerArrives { caller, answer });
    }

    /// Sends a piece of a stream to the control plane, in order, or holds it back.
    pub(crate) fn send_piece(&mut self, conn: u64, piece: Piece) {
        let delay = self.delay();
        let Some(c) = self.conns.get_mut(&conn) else { return };
        if self.links[c.node].blocked() {
            c.held.push(piece);
            return;
        }
        let at = (self.now + std::time::Duration::from_millis(delay)).max(c.not_before);
        c.not_before = at;
        self.at(at, What::StreamArrives { conn, piece });
    }

    pub(crate) fn delay(&mut self) -> u64 {
        if self.random.u8(..16) == 0 { self.random.u64(1..200) } else { self.random.u64(1..12) }
    }

    fn release_held(&mut self, node: usize) {
        if self.links[node].blocked() {
            return;
        }
        let held: Vec<u64> = self.conns.iter().filter(|(_, c)| c.node == node).map(|(id, _)| *id).collect();
        for conn in held {
            let Some(c) = self.conns.get_mut(&conn) else { continue };
            let (pieces, dropped) = (std::mem::take(&mut c.held), std::mem::take(&mut c.drop_held));
            for piece in pieces {
                self.send_piece(conn, piece);
            }
            if dropped {
                let delay = self.delay();
                self.after_ms(delay, What::DropArrives { conn });
            }
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
            other => self.handle_at_node(other),
        }
    }

    fn step(&mut self, step: &Step) {
        self.note(|_| format!("-- {step:?}"));
        match *step {
            Step::Submit { task } => self.submit(task, false),
            Step::SubmitAgain { task } => self.submit(task, true),
            Step::Cancel { task } => self.cancel(task),
            Step::CrashNode { node, down_ms } => {
                self.coverage.hit("fault: node crashed");
                self.crash_node(node, down_ms);
            }
            Step::LeaveNode { node, down_ms } => self.leave_node(node, down_ms),
            Step::StopNode { node, for_ms } => {
                if self.nodes[node].core.is_some() {
                    self.coverage.hit("fault: node stopped");
                    self.nodes[node].stopped += 1;
                    self.after_ms(for_ms, What::Heal(Heal::Stop { node }));
                }
            }
            Step::Partition { node, to_cp, to_node, for_ms } => {
                self.coverage.hit(match (to_cp, to_node) {
                    (true, true) => "fault: partition both ways",
                    (true, false) => "fault: partition towards the control plane",
                    _ => "fault: partition towards the node",
                });
                self.links[node].to_cp += u32::from(to_cp);
                self.links[node].to_node += u32::from(to_node);
                self.after_ms(for_ms, What::Heal(Heal::Partition { node, to_cp, to_node }));
            }
            Step::LoseHeartbeats { for_ms } => {
                self.coverage.hit("fault: heartbeats of all nodes lost");
                self.heartbeats_lost += 1;
                self.after_ms(for_ms, What::Heal(Heal::Heartbeats));
            }
            Step::KillEngine { node, down_ms } => {
                self.coverage.hit("fault: engine killed");
                self.kill_engine(node, down_ms);
            }
            Step::HangEngine { node, for_ms } => {
                self.coverage.hit("fault: engine hung");
                self.hang_engine(node);
                self.after_ms(for_ms, What::Heal(Heal::HangEngine { node }));
            }
            Step::SlowEngine { node, for_ms } => {
                self.coverage.hit("fault: engine slow");
                self.nodes[node].slow += 1;
                self.after_ms(for_ms, What::Heal(Heal::SlowEngine { node }));
            }
            Step::ForeignLoad { node, slots, for_ms } => {
                self.coverage.hit("fault: foreign load");
                self.nodes[node].foreign = slots;
                self.after_ms(for_ms, What::Heal(Heal::ForeignLoad { node }));
            }
            Step::SickEngine { node, for_ms } => {
                self.coverage.hit("fault: engine sick");
                self.nodes[node].sick += 1;
                self.after_ms(for_ms, What::Heal(Heal::SickEngine { node }));
            }
            Step::BusyEngine { node, for_ms } => {
                self.coverage.hit("fault: engine busy");
                self.nodes[node].busy += 1;
                self.after_ms(for_ms, What::Heal(Heal::BusyEngine { node }));
            }
            Step::Drain { node } => self.want(node, Intent::Draining),
            Step::Resume { node } => self.want(node, Intent::Serving),
            Step::ClockStep { node, by_ms } => {
                self.coverage.hit("fault: clock stepped");
                self.clocks[node] += by_ms;
            }
            Step::Twin { node } => self.twin(node),
            Step::RestartControl { down_ms } => {
                if self.control.is_some() && self.stall_until.is_none() {
                    self.coverage.hit("fault: control plane restarted");
                    self.stop_control();
                    self.after_ms(down_ms, What::ControlBack);
                }
            }
            Step::NodeFault { node, fault, for_ms } => {
                self.coverage.hit(match fault {
                    NodeFault::Denies => "fault: node denies",
                    NodeFault::Rejects => "fault: node rejects",
                    NodeFault::Fails => "fault: node fails",
                    NodeFault::Refuses(_) => "fault: node refuses",
                    NodeFault::Resets => "fault: node resets",
                    NodeFault::SaysNothing => "fault: node says nothing",
                });
                let (present, lasting) = &mut self.node_faults[node];
                *present = Some(fault);
                *lasting += 1;
                self.after_ms(for_ms, What::Heal(Heal::NodeFault { node }));
            }
            Step::Shortage { for_ms } => {
                self.coverage.hit("fault: own shortage");
                self.shortage += 1;
                self.after_ms(for_ms, What::Heal(Heal::Shortage));
            }
            Step::DoubleReports { node, for_ms } => {
                self.coverage.hit("fault: reports doubled");
                self.double_reports[node] += 1;
                self.after_ms(for_ms, What::Heal(Heal::DoubleReports { node }));
            }
            Step::ShutdownControl { grace_ms, down_ms } => self.shut_down(grace_ms, down_ms),
            Step::Retire { model, for_ms } => {
                self.coverage.hit("fault: model retired");
                self.retire(model, true);
                self.after_ms(for_ms, What::Heal(Heal::Retire { model }));
            }
            Step::DeleteSession { session } => self.delete_session(session),
            Step::StallControl { for_ms } => {
                let until = self.now + std::time::Duration::from_millis(for_ms);
                // A shorter one within a longer one ends nothing.
                self.loads.disturbed = self.loads.disturbed.max(Some(until));
                if self.control.is_some() && self.stall_until.is_none() {
                    self.coverage.hit("fault: control plane stalled");
                    let until = self.now + std::time::Duration::from_millis(for_ms);
                    self.stall_until = Some(until);
                    self.oracle.stalled_until = until;
                    self.oracle.stall_total_ms += for_ms;
                    self.after_ms(for_ms, What::Heal(Heal::Stall));
                }
            }
        }
    }

    fn heal(&mut self, heal: Heal) {
        match heal {
            Heal::Partition { node, to_cp, to_node } => {
                self.links[node].to_cp -= u32::from(to_cp);
                self.links[node].to_node -= u32::from(to_node);
                self.links[node].healed = self.now;
                self.release_held(node);
            }
            Heal::Stop { node } => self.continue_node(node),
            Heal::Heartbeats => self.heartbeats_lost -= 1,
            Heal::HangEngine { node } => self.nodes[node].hung = self.nodes[node].hung.saturating_sub(1),
            Heal::SlowEngine { node } => self.nodes[node].slow -= 1,
            Heal::SickEngine { node } => self.nodes[node].sick -= 1,
            Heal::ForeignLoad { node } => self.nodes[node].foreign = 0,
            Heal::BusyEngine { node } => self.nodes[node].busy -= 1,
            Heal::NodeFault { node } => {
                let (present, lasting) = &mut self.node_faults[node];
                *lasting -= 1;
                if *lasting == 0 {
                    let denied = *present == Some(NodeFault::Denies);
                    *present = None;
                    // A rotation of tokens is finished here, or there.
                    if denied && self.random.bool() {
                        self.tokens_changed();
                    }
                }
            }
            Heal::Shortage => self.shortage -= 1,
            Heal::DoubleReports { node } => self.double_reports[node] -= 1,
            Heal::Retire { model } => self.retire(model, false),
            Heal::Stall => {
                self.stall_until = None;
                // What is due comes before the mailbox.
                let (timers, messages): (Vec<What>, Vec<What>) = std::mem::take(&mut self.stalled)
                    .into_iter()
                    .partition(|what| matches!(what, What::ControlTimer { .. }));
                for what in timers.into_iter().chain(messages) {
                    self.handle(what);
                }
            }
        }
    }

    pub(crate) fn node_id(&self, node: usize) -> NodeId {
        NodeId::new(&format!("n{node}")).expect("a valid node id")
    }

    pub(crate) fn task_id(task: usize) -> TaskId {
        TaskId(Uuid::from_u128(task as u128 + 1))
    }
}

fn is_for_control(what: &What) -> bool {
    matches!(
        what,
        What::CallArrives { .. }
            | What::ControlTimer { .. }
            | What::RelayTimer { .. }
            | What::ResumeDue { .. }
            | What::Fence { .. }
            | What::StreamArrives { .. }
            | What::ProbeAnswered { .. }
            | What::IntentAnswered { .. }
            | What::Step(
                Step::Submit { .. }
                    | Step::SubmitAgain { .. }
                    | Step::Cancel { .. }
                    | Step::Drain { .. }
                    | Step::Resume { .. }
                    | Step::Twin { .. }
                    | Step::ShutdownControl { .. }
                    | Step::Retire { .. }
                    | Step::DeleteSession { .. }
            )
            | What::CutOff { .. }
            | What::Heal(Heal::Retire { .. } | Heal::NodeFault { .. })
    )
}
