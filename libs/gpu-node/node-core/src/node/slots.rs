//! Who holds a slot: attempts are accepted, and end, by themselves or with their engine.

use pool_registry_types::node::Intent;
use pool_registry_types::{AttemptId, ErrorBody, ErrorCode, Moment, PoolId, ReplicaId};

use super::crash::Verdict;
use super::replica::Replica;
use super::streams::held_is_full;
use super::{Accepted, Ask, NodeCore, RunningAttempt};
use crate::attempts::Start;

impl NodeCore {
    /// Gives the attempt a slot, or says why not. Errors: `WRONG_NODE`, `ATTEMPT_DUPLICATE`,
    /// `POOL_UNREADY`, `REPLICA_EXHAUSTED`.
    pub fn accept(&mut self, now: Moment, pool_id: &PoolId, ask: &Ask<'_>) -> Result<Accepted, ErrorBody> {
        let refuse =
            |code, message: String| Err(ErrorBody::new(code, message).at(&self.identity.node_id, pool_id));
        if *ask.node_id != self.identity.node_id || ask.boot_id != self.identity.boot_id {
            let message = format!("this is {} in boot {}", self.identity.node_id, self.identity.boot_id);
            return refuse(ErrorCode::WrongNode, message);
        }
        if self.was_accepted(&ask.attempt) || self.refused.contains(&ask.attempt) {
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
        self.accepted.remember(now, ask.attempt);
        Ok(accepted)
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

    /// The replica whose engine the attempt runs on.
    pub(super) fn replica_of(&mut self, attempt: &AttemptId) -> Option<&mut Replica> {
        let running = self.running.get(attempt)?;
        let replica = self.pools.get_mut(&running.pool)?.replicas.get_mut(&running.replica)?;
        (!replica.is_elsewhere(attempt)).then_some(replica)
    }

    /// Whether the attempt runs at the old address of its replica.
    pub(super) fn is_elsewhere(&self, attempt: &AttemptId) -> bool {
        let running = self.running.get(attempt);
        let replica =
            running.and_then(|running| self.pools.get(&running.pool)?.replicas.get(&running.replica));
        replica.is_some_and(|replica| replica.is_elsewhere(attempt))
    }

    // ---- the ends of engines ----

    /// An engine that this node has started takes attempts from now on.
    pub fn engine_began(&mut self, pool_id: &PoolId, replica_id: &ReplicaId) {
        self.engines.began((pool_id.clone(), replica_id.clone()));
    }

    /// The engine has ended; `signal` is that of a crash. Returns how many attempts may have brought
    /// the crash about.
    pub fn engine_ended(
        &mut self,
        now: Moment,
        pool_id: &PoolId,
        replica_id: &ReplicaId,
        signal: Option<&'static str>,
    ) -> usize {
        self.engines.ended(now, &(pool_id.clone(), replica_id.clone()), signal)
    }

    /// The engine has done all that the attempt asked, or was never reached by it: whatever ends the
    /// engine later, it was not this.
    pub fn cleared(&mut self, attempt: &AttemptId) {
        let Some(running) = self.running.get(attempt) else { return };
        self.engines.cleared(&(running.pool.clone(), running.replica.clone()), attempt);
    }

    /// How the engine has ended that a running attempt was given to.
    pub fn verdict(&self, attempt: &AttemptId) -> Verdict {
        let Some(running) = self.running.get(attempt) else { return Verdict::Known(None) };
        self.engines.verdict(running.accepted, &(running.pool.clone(), running.replica.clone()), attempt)
    }
}
