//! What the core is told, and what it asks for.

use std::sync::Arc;

use pool_registry_types::node::{
    Heartbeat, HeartbeatAnswer, Intent, IntentAnswer, IntentOrder, ObservedLiveness, RegisterAnswer,
    RegisterRequest,
};
use pool_registry_types::task::{ResumeMode, TaskAccepted, TaskState};
use pool_registry_types::view::{ClusterChange, LinkView};
use pool_registry_types::{
    AttemptId, BootId, Epoch, ErrorBody, ErrorCode, HolderId, LogId, ModelRef, Moment, NodeId, PoolKey,
    ReplicaId, SessionKey, TaskId,
};
use service_registry::{ProbeOutcome, Registrar};
use task_stream::{Assignment, AttemptDeadlines, HowEnded, TaskSpec};

use crate::attempts::CloseReason;

/// Whom an answer is for; the shell gives the number and keeps what it stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplyTo(pub u64);

/// Something happened.
#[derive(Debug, Clone)]
pub enum Event {
    Register {
        reply: ReplyTo,
        request: RegisterRequest,
        /// Absent where whoever registers may have as many nodes as fit.
        registrar: Option<Registrar>,
    },
    Heartbeat {
        reply: ReplyTo,
        node_id: NodeId,
        beat: Heartbeat,
    },
    Deregister {
        reply: ReplyTo,
        node_id: NodeId,
        epoch: Option<Epoch>,
    },
    /// The outcome of [`Effect::Probe`]; comes exactly once for each.
    Probed {
        node_id: NodeId,
        address: String,
        outcome: ProbeOutcome,
    },
    /// How a lane of the link to a node stands, told when it changes.
    Link {
        node_id: NodeId,
        lane: u16,
        link: LinkView,
    },
    /// What the link to a node says of it beside that.
    LinkEvidence {
        node_id: NodeId,
        lane: u16,
        evidence: LinkEvidence,
    },
    /// The tokens that the control plane sends have changed.
    TokensChanged,
    /// A token of an attempt on this node arrived (told at most once a second for an attempt).
    Alive {
        node_id: NodeId,
    },
    /// The facts of a checked request.
    Submit {
        reply: ReplyTo,
        spec: Arc<TaskSpec>,
    },
    Cancel {
        reply: ReplyTo,
        /// Its key here, as in [`crate::TaskRecord`].
        task_id: TaskId,
    },
    /// The node took the attempt: response headers came.
    Accepted {
        attempt: AttemptId,
        replica_id: ReplicaId,
        report_seq: u64,
    },
    /// The first token of the attempt is in the log.
    Started {
        attempt: AttemptId,
    },
    /// Three seconds without a byte on the attempt's stream.
    Quiet {
        attempt: AttemptId,
    },
    /// A byte came on a stream that had been quiet.
    Heard {
        attempt: AttemptId,
    },
    /// What the task has sent cannot be generated again, whatever becomes of its attempt.
    CannotBeRepeated {
        attempt: AttemptId,
    },
    /// The attempt's log is fenced or finished, with this many frames in it before a terminal one.
    /// `final_report` is the number of the node's last report before the end.
    Ended {
        attempt: AttemptId,
        tokens_written: u64,
        /// Tokens of the task so far that are left out of its log.
        unlogged: u64,
        how: HowEnded,
        final_report: Option<u64>,
    },
    /// An operator wants a node to drain or to serve again.
    Want {
        reply: ReplyTo,
        node_id: NodeId,
        intent: Intent,
    },
    /// The outcome of [`Effect::DeliverIntent`]; comes exactly once for each.
    IntentDelivered {
        reply: ReplyTo,
        node_id: NodeId,
        order: IntentOrder,
        /// The node has written it down.
        kept_by_node: bool,
    },
    /// A model may be placed, or not any more.
    SetRetired {
        model: ModelRef,
        retired: bool,
    },
    /// The catalog, or an alias, names a model: it may be waited for though no pool has it. Or neither
    /// does any more.
    SetNamed {
        model: ModelRef,
        named: bool,
    },
    DeleteSession {
        reply: ReplyTo,
        session: SessionKey,
    },
    /// A deadline has come.
    Timer,
    /// The control plane shuts down: nothing new is admitted.
    Drain,
    /// The grace is over: what has not ended gets its terminal event now.
    CutOff,
}

/// What a link says of its node. Reasons are for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEvidence {
    /// A fresh connection could not be made.
    CannotConnect(String),
    /// Neither could one, nor does anything come on the link: what loses nothing by it is moved.
    Quiet(String),
    /// The node itself does not let the control plane in.
    Denied(String),
    /// No POST is answered, though the lane lives. Lifted by its [`LinkEvidence::OrdersArrive`] only.
    OrdersDoNotArrive,
    OrdersArrive,
}

/// Something is to be done. Effects of one `apply` are carried out in their order. Tasks are named by
/// their keys here, which are unlike those of other holders' tasks of the same id.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    Reply {
        to: ReplyTo,
        answer: Result<Answer, ErrorBody>,
    },
    /// A task was admitted: make its log, before the reply is sent.
    OpenLog {
        task: TaskId,
        log: LogId,
    },
    Dispatch(Box<Dispatch>),
    /// Fence the log against the attempt, drop its connection, answer with [`Event::Ended`].
    CloseAttempt {
        task: TaskId,
        attempt: AttemptId,
        why: CloseReason,
    },
    /// Append this terminal error to the task's log.
    CloseTask {
        task: TaskId,
        error: ErrorBody,
    },
    /// The task's retention is over: drop its log.
    Forget {
        task: TaskId,
    },
    /// Dial the node on a fresh connection, answer with [`Event::Probed`].
    Probe {
        node_id: NodeId,
        address: String,
        /// Ask also whether it lets the control plane in.
        authorized: bool,
    },
    /// A task waits for a pool that is not loaded: tell its node. An order that is lost is given
    /// again.
    Load {
        pool: PoolKey,
        address: String,
    },
    /// Tell the node what it is to do, answer with [`Event::IntentDelivered`].
    DeliverIntent {
        to: ReplyTo,
        node_id: NodeId,
        address: String,
        order: IntentOrder,
    },
    /// For the log.
    Note(Note),
    /// For those who follow what happens in the cluster; of a task with whose it is.
    Changed {
        holder: Option<HolderId>,
        change: ClusterChange,
    },
}

/// What an operator reads of it in the log; nothing follows from it.
#[derive(Debug, Clone, PartialEq)]
pub enum Note {
    TaskEnded(Box<TaskEnd>),
    /// The task waits for a place again.
    Replaced {
        task: TaskId,
        attempt: AttemptId,
        pool: PoolKey,
        /// In a few words of ours: what nodes and engines say may quote a prompt.
        why: &'static str,
        code: Option<ErrorCode>,
    },
    /// A node is taken for something else than before.
    LivenessChanged {
        node_id: NodeId,
        observed: ObservedLiveness,
        /// Milliseconds since its last heartbeat or token.
        evidence_age_ms: u64,
    },
}

/// What became of a task.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskEnd {
    /// As effects name it.
    pub key: TaskId,
    pub spec: Arc<TaskSpec>,
    pub state: TaskState,
    /// Absent where it ended well.
    pub code: Option<ErrorCode>,
    /// Of its last attempt; absent where it had none.
    pub pool: Option<PoolKey>,
    pub attempts: u32,
    /// Milliseconds from admission to the last dispatch, or to the end.
    pub queue_wait_ms: u64,
    /// Milliseconds from admission to the first token of the answer; absent without one.
    pub first_token_ms: Option<u64>,
    pub elapsed_ms: u64,
    /// Frames of the answer that were sent to its readers.
    pub sent: u64,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    Registered(RegisterAnswer),
    Heartbeat(HeartbeatAnswer),
    Deregistered,
    Submitted(TaskAccepted),
    Canceled,
    Intent(IntentAnswer),
    SessionDeleted,
}

/// One attempt to be made.
#[derive(Debug, Clone, PartialEq)]
pub struct Dispatch {
    pub task: TaskId,
    pub attempt: AttemptId,
    pub log: LogId,
    pub pool: PoolKey,
    pub address: String,
    pub boot_id: BootId,
    /// Frames that stand in the log already.
    pub first_index: u64,
    /// How the attempt goes on after them; absent when there are none.
    pub resume: Option<ResumeMode>,
    /// Where the session's context is, if it is on this pool.
    pub warm_replica: Option<ReplicaId>,
    /// 1 for the first attempt of the task.
    pub attempt_number: u32,
    /// Milliseconds from admission to this dispatch.
    pub queue_wait_ms: u64,
    pub deadlines: AttemptDeadlines,
    /// When the task must be over; absent without a `deadline_ms`.
    pub task_deadline: Option<Moment>,
    /// What the session's budget leaves, where the client set no bound on tokens.
    pub max_tokens: Option<u32>,
    /// Only false with [`crate::Rule::OverdueIsStopped`] switched off.
    pub stops_overdue: bool,
    pub spec: Arc<TaskSpec>,
}

impl Dispatch {
    /// What the attempt's relay needs to know of it.
    pub fn assignment(&self) -> Assignment {
        Assignment {
            task_id: self.spec.task_id,
            attempt: self.attempt,
            log: self.log,
            pool: self.pool.clone(),
            first_index: self.first_index,
            attempt_number: self.attempt_number,
            queue_wait_ms: self.queue_wait_ms,
            warm_replica: self.warm_replica.clone(),
            keeps_ids: self.spec.continuation == Some(ResumeMode::Append),
            deadlines: self.deadlines,
            task_deadline: self.task_deadline,
            stops_overdue: self.stops_overdue,
        }
    }
}
