//! [`NodeCore`]: what runs on this node, who holds which slot, and what is said of it.
//!
//! It is the final arbiter of its slots: whatever the control plane believes, an attempt runs
//! only if [`NodeCore::accept`] gives it one. Each report has a number, given when the report
//! is made; acceptance and end of an attempt name the last number before them, and that is all
//! the control plane needs to reconcile the two books.

mod crash;
mod pools;
mod streams;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use pool_registry_types::node::{
    Capabilities, GpuReport, Heartbeat, HeartbeatAnswer, Intent, IntentOrder, RegisterAnswer,
    RegisterRequest, StagedModel,
};
use pool_registry_types::placement::Labels;
use pool_registry_types::pool::{EngineKind, PoolReport};
use pool_registry_types::{
    AttemptId, BootId, Epoch, ErrorBody, ErrorCode, MachineId, ModelRef, Moment, NodeId, PoolId, ReplicaId,
    TaskId,
};

use crate::attempts::{Held, Retention, Start};
use crate::session::{Action, BeatFailure, Session};
use crash::Engines;
pub use crash::Verdict;
pub use pools::{BindError, Busy, Declared, Readiness, ReplicaSpec};
use pools::{Circumstances, Drain, Pool, Replica};
use streams::held_is_full;

/// How many attempt ids are remembered, so that none runs twice. Source: .specs/01 CLOUD-1507.
const REMEMBERED_ATTEMPTS: usize = 10_000;
/// How long an accepted attempt may take to reach its engine.
const REACHES_ENGINE: Duration = Duration::from_millis(100);

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
    /// End the attempt at its engine; nobody has read it for its time.
    Unread(AttemptId),
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
    seen: BTreeSet<AttemptId>,
    seen_order: VecDeque<AttemptId>,
    gpus: Vec<GpuReport>,
    models: Vec<StagedModel>,
    /// Drains of pools whose engines are away: they hold for those that come next.
    drains_away: BTreeMap<PoolId, Drain>,
    /// The pools whose engines this node runs itself.
    declared: BTreeMap<PoolId, Declared>,
    /// The last answer named pools for which tasks wait.
    waited_for: bool,
    engines: Engines,
    /// Times that the tokens which this node accepts have changed.
    tokens_changed: u64,
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
            seen: BTreeSet::new(),
            seen_order: VecDeque::new(),
            gpus: Vec::new(),
            models: Vec::new(),
            drains_away: BTreeMap::new(),
            declared: BTreeMap::new(),
            waited_for: false,
            engines: Engines::default(),
            tokens_changed: 0,
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
        if let Some(attempt) = self.held.expired(now) {
            return Some(NodeEffect::Unread(attempt));
        }
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
                pools: self.pool_ids().into_iter().cloned().collect(),
                capabilities: self.identity.capabilities.clone(),
            }),
            Action::Heartbeat { epoch } => NodeEffect::Heartbeat(self.report(now, epoch)),
            Action::Deregister { epoch } => NodeEffect::Deregister(epoch),
        })
    }

    pub fn next_deadline(&self) -> Option<Moment> {
        self.session.next_deadline().into_iter().chain(self.held.next_deadline()).min()
    }

    fn report(&mut self, now: Moment, epoch: Epoch) -> Heartbeat {
        self.seq += 1;
        Heartbeat {
            epoch,
            seq: self.seq,
            timestamp: String::new(),
            intent: self.intent(),
            intent_order: self.order_taken,
            tokens_changed: self.tokens_changed,
            pools: self.pool_reports(now),
            gpus: self.gpus.clone(),
            models: self.models.clone(),
        }
    }

    /// Takes the answer in; returns what the control plane wants done.
    pub fn registered(
        &mut self,
        now: Moment,
        answer: Result<RegisterAnswer, Option<ErrorBody>>,
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
        self.session.heartbeat_answered(now, answer.as_ref().map_err(|failure| *failure));
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

    // ---- replicas ----

    /// Takes a replica in, or anew after a change of its handoff or of what its engine says. It is
    /// not ready until told so.
    pub fn bind(&mut self, now: Moment, pool_id: &PoolId, spec: ReplicaSpec) -> Result<(), BindError> {
        let others_agree = |pool: &Pool| {
            // Engines of one pool are changed one after the other: while their own words are all
            // that is known, one that does not serve holds no other to what it said before.
            let reported = |other: &Replica| spec.names_from_engine && other.spec.names_from_engine;
            let stays = |id: &ReplicaId, other: &Replica| {
                *id != spec.replica_id && !other.leaving && (other.is_ready() || !reported(other))
            };
            let agrees =
                |other: &Replica| other.spec.engine == spec.engine && other.spec.models == spec.models;
            pool.replicas.iter().all(|(id, other)| !stays(id, other) || agrees(other))
        };
        if self.pools.get(pool_id).is_some_and(|pool| !others_agree(pool)) {
            return Err(BindError::DiffersFromPool { pool_id: pool_id.clone() });
        }
        let pool = self.pools.entry(pool_id.clone()).or_default();
        pool.drain = pool.drain.or(self.drains_away.remove(pool_id));
        // It is asked at each look, and mostly says the same.
        if pool.bind(spec) {
            self.forget_released();
            self.session.poke(now);
        }
        Ok(())
    }

    /// The replica's handoff is gone: it takes nothing new, and what runs on it ends by itself.
    pub fn unbind(&mut self, now: Moment, pool_id: &PoolId, replica_id: &ReplicaId) {
        let Some(pool) = self.pools.get_mut(pool_id) else { return };
        if pool.leave(replica_id) {
            self.sweep(pool_id);
            self.session.poke(now);
        }
    }

    /// Drops replicas that leave and have nothing running any more.
    fn sweep(&mut self, pool_id: &PoolId) {
        if let Some(pool) = self.pools.get_mut(pool_id) {
            pool.replicas.retain(|_, replica| !replica.has_left());
            if pool.replicas.is_empty()
                && let Some(drain) = self.pools.remove(pool_id).and_then(|pool| pool.drain)
            {
                self.drains_away.insert(pool_id.clone(), drain);
            }
        }
    }

    /// Which pools this node runs itself, and how each of them stands. A change is reported at
    /// once: tasks may wait for it.
    pub fn declare(&mut self, now: Moment, declared: BTreeMap<PoolId, Declared>) {
        // What changes with every look at the memory goes with the next report.
        let essence = |all: &BTreeMap<PoolId, Declared>| -> Vec<(PoolId, Declared)> {
            let plain = |d: &Declared| Declared { vram_free_bytes: None, ..d.clone() };
            all.iter().map(|(id, declared)| (id.clone(), plain(declared))).collect()
        };
        let changed = essence(&self.declared) != essence(&declared);
        self.declared = declared;
        self.engines.keep(|pool_id| self.declared.contains_key(pool_id));
        if changed {
            self.session.poke(now);
        }
    }

    fn pool_ids(&self) -> BTreeSet<&PoolId> {
        self.pools.keys().chain(self.declared.keys()).collect()
    }

    /// What each bound replica runs, and how many attempts it was given since it was bound.
    pub fn work(&self) -> BTreeMap<(PoolId, ReplicaId), (u32, u64)> {
        let of = |(id, pool): (&PoolId, &Pool)| {
            let id = id.clone();
            let each =
                |(replica, r): (&ReplicaId, &Replica)| ((id.clone(), replica.clone()), (r.ours(), r.served));
            pool.replicas.iter().map(each).collect::<Vec<_>>()
        };
        self.pools.iter().flat_map(of).collect()
    }

    /// No new work on this pool; what runs may finish until the deadline. Returns whether there
    /// is such a pool.
    pub fn drain_pool(&mut self, now: Moment, pool_id: &PoolId, deadline: Option<Moment>) -> bool {
        let drain = Drain { deadline };
        match self.pools.get_mut(pool_id) {
            Some(pool) => pool.drain = Some(drain),
            // It holds for the engine that comes.
            None if self.declared.contains_key(pool_id) => {
                self.drains_away.insert(pool_id.clone(), drain);
            }
            None => return false,
        }
        self.session.poke(now);
        true
    }

    /// The pool takes work again.
    pub fn reopen_pool(&mut self, now: Moment, pool_id: &PoolId) -> bool {
        let drained = match self.pools.get_mut(pool_id) {
            Some(pool) => pool.drain.take(),
            None if self.declared.contains_key(pool_id) => self.drains_away.remove(pool_id),
            None => return false,
        };
        if drained.is_some() {
            self.session.poke(now);
        }
        true
    }

    /// The attempts that a drain has given time enough.
    pub fn past_their_drain(&self, now: Moment) -> Vec<AttemptId> {
        let over = |pool: &&Pool| pool.drain.and_then(|drain| drain.deadline).is_some_and(|at| at <= now);
        self.pools.values().filter(over).flat_map(Pool::running).copied().collect()
    }

    /// What a look at the engine said. Reported at once when it matters.
    pub fn observed(&mut self, now: Moment, pool_id: &PoolId, replica_id: &ReplicaId, readiness: Readiness) {
        let Some(pool) = self.pools.get_mut(pool_id) else { return };
        if pool.observed(now, replica_id, readiness) {
            self.session.poke(now);
        }
    }

    /// How busy the engine says it is, asked at `began`. Slots to be released are given back by it, and
    /// a change of foreign load is reported at once.
    pub fn counted(
        &mut self,
        now: Moment,
        began: Moment,
        pool_id: &PoolId,
        replica_id: &ReplicaId,
        busy: Busy,
    ) {
        // What was accepted since may not have reached the engine when it counted.
        let known = self.running.iter().filter(|(id, running)| {
            let there = running.accepted + REACHES_ENGINE <= began && !running.over;
            there && running.pool == *pool_id && running.replica == *replica_id && !self.is_elsewhere(id)
        });
        let known = u32::try_from(known.count()).unwrap_or(u32::MAX);
        let Some(pool) = self.pools.get_mut(pool_id) else { return };
        if pool.counted(now, began, replica_id, known, busy) {
            self.forget_released();
            self.sweep(pool_id);
            self.session.poke(now);
        }
    }

    /// Gives back the slots of attempts that were broken off long enough ago.
    pub fn expire_releases(&mut self, now: Moment) {
        let mut any = false;
        for pool in self.pools.values_mut() {
            any |= pool.expire_releases(now);
        }
        if any {
            self.forget_released();
            let ids: Vec<PoolId> = self.pools.keys().cloned().collect();
            ids.iter().for_each(|id| self.sweep(id));
            self.session.poke(now);
        }
    }

    /// When a slot of the replica that is to be released is given back whatever its engine says; nothing
    /// where none is.
    pub fn slot_due_at(&self, pool_id: &PoolId, replica_id: &ReplicaId) -> Option<Moment> {
        self.pools.get(pool_id)?.slot_due_at(replica_id)
    }

    fn forget_released(&mut self) {
        let pools = &self.pools;
        self.running.retain(|id, running| {
            let replica = pools.get(&running.pool).and_then(|pool| pool.replicas.get(&running.replica));
            !running.over || replica.is_some_and(|replica| replica.releasing.contains_key(id))
        });
    }

    /// A byte of the attempt came from its engine: it lives, whatever looks at it say. Returns
    /// whether that is news, which a report at once should tell.
    pub fn heard(&mut self, now: Moment, attempt: &AttemptId) -> bool {
        if self.is_elsewhere(attempt) {
            return false;
        }
        let Some(running) = self.running.get(attempt) else { return false };
        self.pools.get_mut(&running.pool).is_some_and(|pool| pool.heard(now, &running.replica))
    }

    /// The engine did what the attempt asked.
    pub fn succeeded(&mut self, attempt: &AttemptId) {
        if let Some(replica) = self.replica_of(attempt) {
            replica.succeeded(attempt);
        }
    }

    /// The engine has refused what is its operator's: a key, or a model that it should have.
    pub fn refused_operator(&mut self, now: Moment, attempt: &AttemptId, reason: &str) {
        let task = self.running.get(attempt).and_then(|running| running.task);
        if let Some(replica) = self.replica_of(attempt) {
            replica.refuses(now, task, reason.to_owned());
            self.session.poke(now);
        }
    }

    /// The engine has no such route.
    pub fn lacks(&mut self, now: Moment, attempt: &AttemptId, path: &str) {
        if let Some(replica) = self.replica_of(attempt) {
            replica.lacks(now, path);
        }
    }

    /// The replica is asked with another key from now on.
    pub fn key_changed(&mut self, pool_id: &PoolId, replica_id: &ReplicaId) {
        if let Some(replica) = self.pools.get_mut(pool_id).and_then(|pool| pool.replicas.get_mut(replica_id))
        {
            replica.key_changed();
        }
    }

    /// Where the replica's engine is now.
    pub fn engine_of(&self, pool_id: &PoolId, replica_id: &ReplicaId) -> Option<(EngineKind, String)> {
        let spec = &self.pools.get(pool_id)?.replicas.get(replica_id)?.spec;
        Some((spec.engine, spec.url.clone()))
    }

    /// Whether the attempt's engine is known to have no such route.
    pub fn is_lacking(&self, now: Moment, attempt: &AttemptId, path: &str) -> bool {
        let running = self.running.get(attempt);
        let replica =
            running.and_then(|running| self.pools.get(&running.pool)?.replicas.get(&running.replica));
        replica.is_some_and(|replica| replica.is_lacking(now, path))
    }

    /// The replica whose engine the attempt runs on.
    fn replica_of(&mut self, attempt: &AttemptId) -> Option<&mut Replica> {
        let running = self.running.get(attempt)?;
        let replica = self.pools.get_mut(&running.pool)?.replicas.get_mut(&running.replica)?;
        (!replica.is_elsewhere(attempt)).then_some(replica)
    }

    /// Whether the attempt runs at the old address of its replica.
    fn is_elsewhere(&self, attempt: &AttemptId) -> bool {
        let running = self.running.get(attempt);
        let replica =
            running.and_then(|running| self.pools.get(&running.pool)?.replicas.get(&running.replica));
        replica.is_some_and(|replica| replica.is_elsewhere(attempt))
    }

    /// What the GPU probe said. Only a change of health or presence is reported at once.
    pub fn gpus_observed(&mut self, now: Moment, gpus: Vec<GpuReport>) {
        let essence =
            |gpus: &[GpuReport]| gpus.iter().map(|gpu| (gpu.device_id, gpu.health)).collect::<Vec<_>>();
        let changed = essence(&self.gpus) != essence(&gpus);
        self.gpus = gpus;
        if changed {
            self.session.poke(now);
        }
    }

    /// What lies on the disk. A change is reported at once: tasks may wait for it.
    pub fn models_observed(&mut self, now: Moment, models: Vec<StagedModel>) {
        if self.models != models {
            self.models = models;
            self.session.poke(now);
        }
    }

    pub fn models(&self) -> &[StagedModel] {
        &self.models
    }

    // ---- slots ----

    /// Gives the attempt a slot, or says why not. Errors: `WRONG_NODE`, `ATTEMPT_DUPLICATE`,
    /// `POOL_UNREADY`, `REPLICA_EXHAUSTED`.
    pub fn accept(&mut self, now: Moment, pool_id: &PoolId, ask: &Ask<'_>) -> Result<Accepted, ErrorBody> {
        let refuse =
            |code, message: String| Err(ErrorBody::new(code, message).at(&self.identity.node_id, pool_id));
        if *ask.node_id != self.identity.node_id || ask.boot_id != self.identity.boot_id {
            let message = format!("this is {} in boot {}", self.identity.node_id, self.identity.boot_id);
            return refuse(ErrorCode::WrongNode, message);
        }
        if self.seen.contains(&ask.attempt) {
            return refuse(ErrorCode::AttemptDuplicate, format!("attempt {} was seen before", ask.attempt));
        }
        if self.intent() == Intent::Draining {
            return refuse(ErrorCode::PoolUnready, "the node is draining".into());
        }
        let Some(pool) = self.pools.get_mut(pool_id) else {
            return refuse(ErrorCode::PoolUnready, format!("no pool {pool_id} here"));
        };
        if pool.drain.is_some() {
            return refuse(ErrorCode::PoolUnready, format!("{pool_id} is draining"));
        }
        if !pool.takes_work() {
            return refuse(ErrorCode::PoolUnready, format!("no replica of {pool_id} is ready"));
        }
        // The caller may not have heard yet that the engine is another one.
        if let Some(model) = ask.model.filter(|model| !pool.serves(model)) {
            return refuse(ErrorCode::PoolUnready, format!("{pool_id} does not serve {model}"));
        }
        if self.held.is_full() {
            return refuse(ErrorCode::ReplicaExhausted, held_is_full(&self.held));
        }
        let Some((replica_id, replica)) = pool.take_slot(ask.attempt, ask.model, ask.hint) else {
            return refuse(ErrorCode::ReplicaExhausted, format!("every slot of {pool_id} is taken"));
        };
        let accepted = Accepted {
            replica_id: replica_id.clone(),
            engine: replica.spec.engine,
            url: replica.spec.url.clone(),
            model: ask.model.map(|model| replica.engine_name(model)).unwrap_or_default(),
            names_from_engine: replica.spec.names_from_engine,
            ctx_max: replica.spec.ctx_max,
            report_seq: self.seq,
        };
        let replica_key = (pool_id.clone(), replica_id);
        self.engines.accepted(now, &replica_key, ask.attempt);
        let (pool, replica) = replica_key;
        let running = RunningAttempt { pool, replica, task: ask.task, accepted: now, over: false };
        self.running.insert(ask.attempt, running);
        let start = Start {
            pool_id: pool_id.clone(),
            replica_id: accepted.replica_id.clone(),
            report_seq: self.seq,
            first_index: ask.first_index,
            retention: ask.retention,
        };
        self.held.begin(ask.attempt, start);
        self.remember(ask.attempt);
        Ok(accepted)
    }

    /// It is never accepted from now on.
    fn remember(&mut self, attempt: AttemptId) {
        if !self.seen.insert(attempt) {
            return;
        }
        self.seen_order.push_back(attempt);
        if self.seen_order.len() > REMEMBERED_ATTEMPTS
            && let Some(oldest) = self.seen_order.pop_front()
        {
            self.seen.remove(&oldest);
        }
    }

    /// The attempt has ended and its engine's slot is free. Returns the final report number: that
    /// of the last report made before.
    pub fn ended(&mut self, attempt: &AttemptId) -> u64 {
        if let Some(running) = self.running.remove(attempt) {
            if let Some(replica) = self.replica_mut(&running) {
                replica.ended(attempt);
            }
            self.sweep(&running.pool);
        }
        self.seq
    }

    /// The attempt has ended, and its engine may still be busy with it: the slot stays taken until
    /// the engine's word ([`NodeCore::counted`]) or time ([`NodeCore::expire_releases`]) gives it
    /// back. Returns the final report number.
    pub fn ended_before_release(&mut self, now: Moment, attempt: &AttemptId) -> u64 {
        if self.is_elsewhere(attempt) {
            // Its engine's slots are nobody's here any more.
            return self.ended(attempt);
        }
        if let Some(running) = self.running.get(attempt).cloned()
            && let Some(replica) = self.replica_mut(&running)
            && replica.attempts.remove(attempt)
        {
            replica.releasing.insert(*attempt, now);
            if let Some(running) = self.running.get_mut(attempt) {
                running.over = true;
            }
        }
        self.seq
    }

    fn replica_mut(&mut self, running: &RunningAttempt) -> Option<&mut Replica> {
        self.pools.get_mut(&running.pool)?.replicas.get_mut(&running.replica)
    }

    // ---- reading ----

    pub fn is_running(&self, attempt: &AttemptId) -> bool {
        self.running.contains_key(attempt)
    }

    pub fn running_count(&self) -> usize {
        self.running.values().filter(|running| !running.over).count()
    }

    pub fn pool_reports(&self, now: Moment) -> Vec<PoolReport> {
        let report = |id: &PoolId| {
            let (pool, declared) = (self.pools.get(id), self.declared.get(id));
            let accepted = |id| self.running.get(id).map(|running| running.accepted);
            let drains = pool.filter(|pool| pool.drain.is_some());
            let around = Circumstances {
                now,
                node_drains: self.intent() == Intent::Draining,
                vram_free_bytes: self.vram_free_bytes(),
                // Only a drain shows it.
                oldest: drains.and_then(|pool| pool.running().filter_map(accepted).min()),
            };
            let drained = self.drains_away.contains_key(id);
            let around =
                Circumstances { node_drains: around.node_drains || (pool.is_none() && drained), ..around };
            match (pool, declared) {
                (Some(pool), declared) => Some(pool.report(id, &around, declared)),
                (None, Some(declared)) => Some(declared.report(id, &around)),
                (None, None) => None,
            }
        };
        let mut reports: Vec<PoolReport> = self.pool_ids().into_iter().filter_map(report).collect();
        self.report_held(&mut reports);
        reports
    }

    /// Free memory of all healthy GPUs, bytes; unknown without any.
    fn vram_free_bytes(&self) -> Option<u64> {
        let free = |gpu: &GpuReport| gpu.vram_total_bytes.saturating_sub(gpu.vram_used_bytes);
        (!self.gpus.is_empty()).then(|| self.gpus.iter().map(free).sum())
    }

    pub fn gpus(&self) -> &[GpuReport] {
        &self.gpus
    }

    /// Whether the replica takes attempts.
    pub fn is_ready(&self, pool_id: &PoolId, replica_id: &ReplicaId) -> bool {
        let replica = self.pools.get(pool_id).and_then(|pool| pool.replicas.get(replica_id));
        replica.is_some_and(Replica::is_ready)
    }

    /// Requests of one replica at the moment: running here, being released, foreign.
    pub fn slots_in_use(&self, pool_id: &PoolId, replica_id: &ReplicaId) -> Option<u32> {
        Some(self.pools.get(pool_id)?.replicas.get(replica_id)?.busy())
    }
}

#[cfg(test)]
mod tests;
