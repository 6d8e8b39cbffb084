//! What looks at engines, GPUs and the disk say, and what attempts show of their engines.

use std::time::Duration;

use pool_registry_types::node::{GpuCapability, GpuReport, StagedModel};
use pool_registry_types::{AttemptId, Moment, PoolId, ReplicaId, limits};

use super::NodeCore;
use super::replica::{Busy, Readiness};

/// How long an accepted attempt may take to reach its engine.
const REACHES_ENGINE: Duration = Duration::from_millis(100);

impl NodeCore {
    /// What a look at the engine said. Reported at once when it matters.
    pub fn observed(
        &mut self,
        now: Moment,
        pool_id: &PoolId,
        replica_id: &ReplicaId,
        mut readiness: Readiness,
    ) {
        if let Readiness::Failed(why) | Readiness::Gone(why) | Readiness::Silent(why) = &mut readiness {
            limits::cut(why);
        }
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

    pub(super) fn forget_released(&mut self) {
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
            let mut reason = reason.to_owned();
            limits::cut(&mut reason);
            replica.refuses(now, task, reason);
            self.session.poke(now);
        }
    }

    /// The engine has no such route.
    pub fn lacks(&mut self, now: Moment, attempt: &AttemptId, path: &str) {
        if let Some(replica) = self.replica_of(attempt) {
            replica.lacks(now, path);
        }
    }

    /// Whether the attempt's engine is known to have no such route.
    pub fn is_lacking(&self, now: Moment, attempt: &AttemptId, path: &str) -> bool {
        let running = self.running.get(attempt);
        let replica =
            running.and_then(|running| self.pools.get(&running.pool)?.replicas.get(&running.replica));
        replica.is_some_and(|replica| replica.is_lacking(now, path))
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

    /// What GPUs there are. Others than before are told by registering again.
    pub fn gpus_found(&mut self, now: Moment, gpus: Vec<GpuCapability>) {
        if self.identity.capabilities.gpus != gpus {
            self.identity.capabilities.gpus = gpus;
            self.session.register_again(now);
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
}
