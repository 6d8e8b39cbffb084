//! [`NodeCore`]: what runs on this node, who holds which slot, and what is said of it.
//!
//! It is the final arbiter of its slots: whatever the control plane believes, an attempt runs
//! only if [`NodeCore::accept`] gives it one. Each report has a number, given when the report
//! is made; acceptance and end of an attempt name the last number before them, and that is all
//! the control plane needs to reconcile the two books.
//!
//! This file has the types and the session; the rest stands by its subject: what is bound, what looks
//! bring, who holds a slot, what is kept, and what can be read.

mod binding;
mod crash;
mod looks;
mod pools;
mod problems;
mod reading;
mod remembered;
mod replica;
mod slotless;
mod slots;
mod streams;

use std::collections::BTreeMap;

use pool_registry_types::node::{
    Capabilities, GpuReport, Heartbeat, HeartbeatAnswer, Intent, IntentOrder, ObservedLiveness,
    RegisterAnswer, RegisterRequest, StagedModel,
};
use pool_registry_types::placement::Labels;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::{
    AttemptId, BootId, Epoch, MachineId, ModelRef, Moment, NodeId, PoolId, ReplicaId, TaskId,
};

use crate::attempts::{Held, Retention};
use crate::session::{Action, BeatFailure, RegisterFailure, Session};
use crash::Engines;
pub use crash::Verdict;
pub use pools::Declared;
use pools::{Drain, Pool};
use problems::Problems;
pub use problems::{Problem, Source};
use remembered::Remembered;
pub use replica::{BindError, Busy, Readiness, ReplicaSpec};
pub use slotless::Serving;

/// Who this node is.
#[derive(Debug, Clone)]
pub struct Identity {
    pub node_id: NodeId,
    pub machine_id: MachineId,
    pub boot_id: BootId,
    /// Where the control plane reaches it.
    pub address: String,
    pub version: String,
    /// What its operator says of it.
    pub labels: Labels,
    pub capabilities: Capabilities,
    /// What it can do that an older node cannot.
    pub features: Vec<String>,
}

/// What the shell is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum NodeEffect {
    Register(RegisterRequest),
    /// The shell fills in the timestamp.
    Heartbeat(Heartbeat),
    Deregister(Epoch),
    /// End the attempt at its engine; the control plane does not know it.
    Cancel(AttemptId),
    /// Write down what the operator wants, then call [`NodeCore::set_intent`].
    TakeIntent(IntentOrder),
    /// The pools for which tasks wait at the control plane; all of them.
    Waiting(Vec<PoolId>),
}

/// The node took an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    pub replica_id: ReplicaId,
    pub engine: EngineKind,
    pub url: String,
    /// The engine's own name for the task's model; empty where none was asked for.
    pub model: String,
    /// The names are the engine's own: whoever answers at its URL must still have them.
    pub names_from_engine: bool,
    pub ctx_max: Option<u32>,
    /// The number of the last report made before.
    pub report_seq: u64,
}

/// Who asks for a slot.
#[derive(Debug, Clone)]
pub struct Ask<'a> {
    pub node_id: &'a NodeId,
    pub boot_id: BootId,
    pub attempt: AttemptId,
    /// What the task asks for.
    pub model: Option<&'a ModelRef>,
    pub task: Option<TaskId>,
    pub hint: Option<&'a ReplicaId>,
    /// The index of its first frame.
    pub first_index: u64,
    pub retention: Retention,
}

/// Where an attempt runs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct RunningAttempt {
    pool: PoolId,
    replica: ReplicaId,
    task: Option<TaskId>,
    accepted: Moment,
    /// It has ended here, and its engine may still work on it.
    over: bool,
}

/// The node's whole state.
#[derive(Debug)]
pub struct NodeCore {
    identity: Identity,
    session: Session,
    /// What the operator wants; outlives this process.
    asked: Intent,
    /// The process is about to end.
    leaving: bool,
    /// The number of the last order that was taken under the present registration.
    order_taken: u64,
    seq: u64,
    pools: BTreeMap<PoolId, Pool>,
    running: BTreeMap<AttemptId, RunningAttempt>,
    held: Held,
    /// Attempts that were, and those that never will be.
    accepted: Remembered,
    refused: Remembered,
    gpus: Vec<GpuReport>,
    models: Vec<StagedModel>,
    problems: Problems,
    /// Drains of pools whose engines are away: they hold for those that come next.
    drains_away: BTreeMap<PoolId, Drain>,
    /// The pools whose engines this node runs itself.
    declared: BTreeMap<PoolId, Declared>,
    /// The last answer named pools for which tasks wait.
    waited_for: bool,
    engines: Engines,
    /// Times that the tokens which this node accepts have changed.
    tokens_changed: u64,
    switched_off: Option<attempt_link::Rule>,
}

impl NodeCore {
    /// `asked` is what the operator wanted when the process before this one ended.
    pub fn new(identity: Identity, session: Session, asked: Intent) -> Self {
        Self {
            identity,
            session,
            asked,
            leaving: false,
            order_taken: 0,
            seq: 0,
            pools: BTreeMap::new(),
            running: BTreeMap::new(),
            held: Held::default(),
            accepted: Remembered::default(),
            refused: Remembered::default(),
            gpus: Vec::new(),
            models: Vec::new(),
            problems: Problems::default(),
            drains_away: BTreeMap::new(),
            declared: BTreeMap::new(),
            waited_for: false,
            engines: Engines::default(),
            tokens_changed: 0,
            switched_off: None,
        }
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn session(&self) -> &Session {
        &self.session
    }

    // ---- the session ----

    /// What is due now; to be asked for after every change and at [`NodeCore::next_deadline`].
    pub fn due(&mut self, now: Moment) -> Option<NodeEffect> {
        let action = self.session.next_action(now)?;
        Some(match action {
            Action::Register => NodeEffect::Register(RegisterRequest {
                node_id: self.identity.node_id.clone(),
                machine_id: self.identity.machine_id.clone(),
                boot_id: self.identity.boot_id,
                address: self.identity.address.clone(),
                version: self.identity.version.clone(),
                intent: self.intent(),
                labels: self.identity.labels.clone(),
                pools: self.known_pool_ids().into_iter().cloned().collect(),
                capabilities: self.identity.capabilities.clone(),
                features: self.identity.features.clone(),
            }),
            Action::Heartbeat { epoch } => NodeEffect::Heartbeat(self.report(now, epoch)),
            Action::Deregister { epoch } => NodeEffect::Deregister(epoch),
        })
    }

    pub fn next_deadline(&self) -> Option<Moment> {
        self.session.next_deadline()
    }

    fn report(&mut self, now: Moment, epoch: Epoch) -> Heartbeat {
        self.seq += 1;
        let mut beat = Heartbeat {
            epoch,
            seq: self.seq,
            timestamp: String::new(),
            intent: self.intent(),
            intent_order: self.order_taken,
            tokens_changed: self.tokens_changed,
            pools: self.pool_reports(now),
            gpus: self.gpus.clone(),
            models: self.models.clone(),
            problems: self.problem_reports(),
        };
        beat.cut_lists();
        beat.cut_texts();
        beat
    }

    /// Takes the answer in; returns what the control plane wants done.
    pub fn registered(
        &mut self,
        now: Moment,
        answer: Result<RegisterAnswer, RegisterFailure>,
    ) -> Vec<NodeEffect> {
        let reported = answer.as_ref().ok().map(|answer| (answer.intent, answer.intent_order));
        self.session.registered(now, answer);
        if reported.is_some() {
            self.order_taken = 0;
        }
        self.reported(reported).into_iter().collect()
    }

    /// What an answer says is an order where its number is a new one.
    fn reported(&self, reported: Option<(Intent, u64)>) -> Option<NodeEffect> {
        let ((intent, number), epoch) = reported.zip(self.session.epoch().cloned())?;
        let order = IntentOrder { epoch, number, intent };
        self.counts(&order).then_some(NodeEffect::TakeIntent(order))
    }

    /// Whether the order is for this registration and no later one was taken.
    pub fn counts(&self, order: &IntentOrder) -> bool {
        self.session.epoch() == Some(&order.epoch) && order.number > self.order_taken
    }

    /// Takes the answer in; returns what the control plane wants done: a change of intent, the end
    /// of attempts that run here and that it does not know, and for which pools tasks wait.
    pub fn heartbeat_answered(
        &mut self,
        now: Moment,
        answer: Result<HeartbeatAnswer, BeatFailure>,
    ) -> Vec<NodeEffect> {
        self.session.heartbeat_answered(now, answer.as_ref());
        let reported = answer.as_ref().ok().map(|answer| (answer.intent, answer.intent_order));
        let intent = self.reported(reported);
        // Said again as long as it holds, and once when it does no more. Without an answer nothing
        // is known: what was said last holds for its time.
        let waiting = answer.as_ref().ok().and_then(|answer| {
            let was_waited_for = std::mem::replace(&mut self.waited_for, !answer.waiting.is_empty());
            (was_waited_for || self.waited_for).then(|| NodeEffect::Waiting(answer.waiting.clone()))
        });
        let canceled = answer.map(|answer| answer.cancel_attempts).unwrap_or_default();
        let running = canceled.into_iter().filter(|id| self.running.contains_key(id));
        running.map(NodeEffect::Cancel).chain(intent).chain(waiting).collect()
    }

    /// What the control plane takes this node for, where that is news.
    pub fn take_news(&mut self) -> Option<ObservedLiveness> {
        self.session.take_news()
    }

    pub fn deregistered(&mut self) {
        self.session.deregistered();
    }

    /// The process is about to end: no new work from now on, and what runs may finish.
    pub fn drain(&mut self, now: Moment) {
        self.leaving = true;
        self.session.poke(now);
    }

    /// The tokens that this node accepts are others now: who was refused may be let in.
    pub fn tokens_changed(&mut self, now: Moment) {
        self.tokens_changed += 1;
        self.session.poke(now);
    }

    /// The control plane is to be heard before the next tick.
    pub fn report_now(&mut self, now: Moment) {
        self.session.poke(now);
    }

    /// The operator wants this, and it is written down. What does not count has no effect.
    /// Returns whether it was taken.
    pub fn set_intent(&mut self, now: Moment, order: &IntentOrder) -> bool {
        let counts = self.counts(order);
        if counts {
            self.order_taken = order.number;
            self.asked = order.intent;
            self.session.poke(now);
        }
        counts
    }

    /// What the operator wants, whatever the process itself is about to do.
    pub fn asked(&self) -> Intent {
        self.asked
    }

    pub fn intent(&self) -> Intent {
        if self.leaving { Intent::Draining } else { self.asked }
    }

    /// Leaves the cluster.
    pub fn leave(&mut self) {
        self.session.leave();
    }
}

#[cfg(test)]
mod tests;
