//! What happens in the world, each at its time: calls, pieces of streams, faults and their ends.

use attempt_link::control::{PostId, PostOutcome};
use attempt_link::node::ConnectionId;
use node_core::supervisor::RunId;
use pool_registry_types::node::{Heartbeat, HeartbeatAnswer, IntentOrder, RegisterAnswer, RegisterRequest};
use pool_registry_types::{AttemptId, BootId, Epoch, ErrorBody, Moment, NodeId, ReplicaId, TaskId};
use task_scheduler::{Event, HowEnded, ProbeOutcome, ReplyTo};

use super::held::Keeps;
use super::links::{Down, Up};
use super::streams::Stop;
use crate::draw::{LinkFault, Step};

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
    /// What has arrived of an attempt's stream is read at last.
    ReadDue {
        life: u64,
        attempt: AttemptId,
    },
    /// A reader at a node takes something again.
    ReaderBack {
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
    /// Something of a link, on its way to its node or back.
    UpArrives {
        node: usize,
        up: Up,
    },
    DownArrives {
        get: u64,
        piece: Down,
    },
    /// Its node may write more to a link.
    LinkTakes {
        node: usize,
        boot: BootId,
        conn: ConnectionId,
    },
    LinkBroke {
        life: u64,
        node: usize,
        n: u64,
        get: u64,
    },
    /// Nothing that was written was acknowledged for a while.
    LinkUnacknowledged {
        node: usize,
    },
    /// A connection has taken of a POST, or the whole of it.
    PostTaken {
        life: u64,
        node: usize,
        id: PostId,
        whole: bool,
    },
    PostEnds {
        life: u64,
        node: usize,
        id: PostId,
        outcome: PostOutcome,
    },
    LiveAnswered {
        life: u64,
        node: usize,
        boot: BootId,
    },
    LaneTimer {
        life: u64,
        node: usize,
        armed: Moment,
    },
    LanesTimer {
        node: usize,
        boot: BootId,
        armed: Moment,
    },
    /// What a lane says of its node.
    LinkSays {
        life: u64,
        event: Box<Event>,
    },
    /// The node was to hear that an attempt is done.
    DoneDue(DoneDue),
    /// A link of which nothing comes any more was to be noticed.
    DeadDue {
        life: u64,
        node: usize,
        n: u64,
    },
    /// An attempt that stands still was to be noticed.
    StuckDue {
        life: u64,
        node: usize,
        boot: BootId,
        attempt: AttemptId,
    },
    /// What a control plane has run is to be over.
    LifeDue {
        life: u64,
    },
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
    Link { node: usize, fault: LinkFault },
}

/// What a node was told is done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DoneDue {
    /// Of the control plane that told it.
    pub(crate) life: u64,
    pub(crate) node: usize,
    pub(crate) boot: BootId,
    /// Of [`World::lane_boots`] at that time.
    pub(crate) boots: u32,
    pub(crate) attempt: AttemptId,
}
