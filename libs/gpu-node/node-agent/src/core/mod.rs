//! [`NodeCore`]: what runs on this node, who holds which slot, and what is said of it.
//!
//! It is the final arbiter of its slots: whatever the control plane believes, an attempt runs
//! only if [`NodeCore::accept`] gives it one. Each report has a number, given when the report
//! is made; acceptance and end of an attempt name the last number before them, and that is all
//! the control plane needs to reconcile the two books.

mod pools;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use node_registration::{Action, BeatFailure, Session};
use pool_registry_types::node::{
    Capabilities, GpuReport, Heartbeat, HeartbeatAnswer, Intent, IntentOrder, RegisterAnswer,
    RegisterRequest, StagedModel,
};
use pool_registry_types::placement::Labels;
use pool_registry_types::pool::{EngineKind, PoolReport};
use pool_registry_types::{
    AttemptId, BootId, Epoch, ErrorBody, ErrorCode, MachineId, Moment, NodeId, PoolId, ReplicaId,
};

pub use pools::{BindError, Declared, Health, Readiness, ReplicaSpec};
use pools::{Circumstances, Drain, Pool, Replica};

/// How many attempt ids are remembered, so that none runs twice. Source: .specs/01 CLOUD-1507.
pub const REMEMBERED_ATTEMPTS: usize = 10_000;

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
    /// Write down what the operator wants, then call [`NodeCore::set_intent`].
    TakeIntent(IntentOrder),
}

/// The node took an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    pub replica_id: ReplicaId,
    pub engine: EngineKind,
    pub url: String,
    /// The number of the last report made before.
    pub report_seq: u64,
}

/// Who asks for a slot.
#[derive(Debug, Clone)]
pub struct Ask<'a> {
    pub node_id: &'a NodeId,
    pub boot_id: BootId,
    pub attempt: AttemptId,
    pub hint: Option<&'a ReplicaId>,
}

/// Where an attempt runs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    pool: PoolId,
    replica: ReplicaId,
    accepted: Moment,
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
    running: BTreeMap<AttemptId, Place>,
    seen: BTreeSet<AttemptId>,
    seen_order: VecDeque<AttemptId>,
    gpus: Vec<GpuReport>,
    models: Vec<StagedModel>,
    /// Drains of pools whose engines are away: they hold for those that come next.
    drains_away: BTreeMap<PoolId, Drain>,
    /// The pools whose engines this node runs itself.
    declared: BTreeMap<PoolId, Declared>,
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
            seen: BTreeSet::new(),
            seen_order: VecDeque::new(),
            gpus: Vec::new(),
            models: Vec::new(),
            drains_away: BTreeMap::new(),
            declared: BTreeMap::new(),
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
                pools: self.pool_ids().into_iter().cloned().collect(),
                capabilities: self.identity.capabilities.clone(),
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
        Heartbeat {
            epoch,
            seq: self.seq,
            timestamp: String::new(),
            intent: self.intent(),
            intent_order: self.order_taken,
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
        let told = answer.as_ref().ok().map(|answer| (answer.intent, answer.intent_order));
        self.session.registered(now, answer);
        if told.is_some() {
            self.order_taken = 0;
        }
        self.told(told).into_iter().collect()
    }

    /// What an answer says is an order where its number is a new one.
    fn told(&self, told: Option<(Intent, u64)>) -> Option<NodeEffect> {
        let ((intent, number), epoch) = told.zip(self.session.epoch().cloned())?;
        let order = IntentOrder { epoch, number, intent };
        self.counts(&order).then_some(NodeEffect::TakeIntent(order))
    }

    /// Whether the order is for this registration and no later one was taken.
    pub fn counts(&self, order: &IntentOrder) -> bool {
        self.session.epoch() == Some(&order.epoch) && order.number > self.order_taken
    }

    /// Takes the answer in; returns what the control plane wants done: a change of intent, and
    /// the end of attempts that run here and that it does not know.
    pub fn heartbeat_answered(
        &mut self,
        now: Moment,
        answer: Result<HeartbeatAnswer, BeatFailure>,
    ) -> Vec<NodeEffect> {
        self.session.heartbeat_answered(now, answer.as_ref().map_err(|failure| *failure));
        let told = answer.as_ref().ok().map(|answer| (answer.intent, answer.intent_order));
        let intent = self.told(told);
        let canceled = answer.map(|answer| answer.cancel_attempts).unwrap_or_default();
        let running = canceled.into_iter().filter(|id| self.running.contains_key(id));
        running.map(NodeEffect::Cancel).chain(intent).collect()
    }

    pub fn deregistered(&mut self) {
        self.session.deregistered();
    }

    /// The process is about to end: no new work from now on, and what runs may finish.
    pub fn drain(&mut self, now: Moment) {
        self.leaving = true;
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

    /// Takes a replica in, or anew after a change of its handoff. It is not ready until told so.
    pub fn bind(&mut self, now: Moment, pool_id: &PoolId, spec: ReplicaSpec) -> Result<(), BindError> {
        let others_agree = |pool: &Pool| {
            let stays = |id: &ReplicaId, other: &Replica| *id != spec.replica_id && !other.leaving;
            let agrees =
                |other: &Replica| other.spec.engine == spec.engine && other.spec.models == spec.models;
            pool.replicas.iter().all(|(id, other)| !stays(id, other) || agrees(other))
        };
        if self.pools.get(pool_id).is_some_and(|pool| !others_agree(pool)) {
            return Err(BindError::DiffersFromPool { pool_id: pool_id.clone() });
        }
        let pool = self.pools.entry(pool_id.clone()).or_default();
        pool.drain = pool.drain.or(self.drains_away.remove(pool_id));
        pool.bind(spec);
        self.session.poke(now);
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

    /// What the engine's health call and its gauges said. Reported at once when it matters.
    pub fn observed(&mut self, now: Moment, pool_id: &PoolId, replica_id: &ReplicaId, health: Health) {
        let Some(pool) = self.pools.get_mut(pool_id) else { return };
        if pool.observed(replica_id, health) {
            self.session.poke(now);
        }
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
        let Some((replica_id, replica)) = pool.take_slot(ask.attempt, ask.hint) else {
            return refuse(ErrorCode::ReplicaExhausted, format!("every slot of {pool_id} is taken"));
        };
        let accepted = Accepted {
            replica_id: replica_id.clone(),
            engine: replica.spec.engine,
            url: replica.spec.url.clone(),
            report_seq: self.seq,
        };
        self.running.insert(ask.attempt, Place { pool: pool_id.clone(), replica: replica_id, accepted: now });
        self.seen.insert(ask.attempt);
        self.seen_order.push_back(ask.attempt);
        if self.seen_order.len() > REMEMBERED_ATTEMPTS
            && let Some(oldest) = self.seen_order.pop_front()
        {
            self.seen.remove(&oldest);
        }
        Ok(accepted)
    }

    /// The attempt has ended and its engine's slot is free. Returns the closing word: the number
    /// of the last report made before.
    pub fn ended(&mut self, attempt: &AttemptId) -> u64 {
        if let Some(place) = self.running.remove(attempt) {
            if let Some(replica) = self.replica_mut(&place) {
                replica.attempts.remove(attempt);
                replica.settling.remove(attempt);
            }
            self.sweep(&place.pool);
        }
        self.seq
    }

    /// The attempt has ended, and its engine may still be busy with it: the slot stays taken
    /// until [`NodeCore::settled`]. Returns the closing word.
    pub fn ended_unsettled(&mut self, attempt: &AttemptId) -> u64 {
        if let Some(place) = self.running.get(attempt).cloned()
            && let Some(replica) = self.replica_mut(&place)
            && replica.attempts.remove(attempt)
        {
            replica.settling.insert(*attempt);
        }
        self.seq
    }

    /// The engine shows the slot of an ended attempt idle. That is reported at once: unlike a
    /// normal end, no closing word has said it. Says nothing about an attempt that runs.
    pub fn settled(&mut self, now: Moment, attempt: &AttemptId) {
        let Some(place) = self.running.get(attempt).cloned() else { return };
        let runs = self.replica_mut(&place).is_some_and(|replica| {
            replica.settling.remove(attempt);
            replica.attempts.contains(attempt)
        });
        if !runs {
            self.running.remove(attempt);
            self.sweep(&place.pool);
            self.session.poke(now);
        }
    }

    fn replica_mut(&mut self, place: &Place) -> Option<&mut Replica> {
        self.pools.get_mut(&place.pool)?.replicas.get_mut(&place.replica)
    }

    // ---- reading ----

    pub fn is_running(&self, attempt: &AttemptId) -> bool {
        self.running.contains_key(attempt)
    }

    pub fn running_count(&self) -> usize {
        self.running.len()
    }

    pub fn pool_reports(&self, now: Moment) -> Vec<PoolReport> {
        let report = |id: &PoolId| {
            let (pool, declared) = (self.pools.get(id), self.declared.get(id));
            let accepted = |id| self.running.get(id).map(|place| place.accepted);
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
        self.pool_ids().into_iter().filter_map(report).collect()
    }

    /// Free memory of all healthy GPUs, bytes; unknown without any.
    fn vram_free_bytes(&self) -> Option<u64> {
        let free = |gpu: &GpuReport| gpu.vram_total_bytes.saturating_sub(gpu.vram_used_bytes);
        (!self.gpus.is_empty()).then(|| self.gpus.iter().map(free).sum())
    }

    pub fn gpus(&self) -> &[GpuReport] {
        &self.gpus
    }

    /// Tokens that a request to the pool may hold, where it is known.
    pub fn ctx_max(&self, pool_id: &PoolId) -> Option<u32> {
        self.pools.get(pool_id)?.replicas.values().find_map(|replica| replica.spec.ctx_max)
    }

    /// Requests of one replica at the moment: running here, settling, foreign.
    pub fn slots_in_use(&self, pool_id: &PoolId, replica_id: &ReplicaId) -> Option<u32> {
        Some(self.pools.get(pool_id)?.replicas.get(replica_id)?.busy())
    }
}

#[cfg(test)]
mod tests;
