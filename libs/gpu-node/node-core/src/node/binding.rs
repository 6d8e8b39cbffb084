//! Which replicas and pools the node has: bound, declared, drained, opened again.

use std::collections::{BTreeMap, BTreeSet};

use pool_registry_types::pool::EngineKind;
use pool_registry_types::{AttemptId, Moment, PoolId, ReplicaId};

use super::NodeCore;
use super::pools::{Declared, Drain, Pool};
use super::replica::{BindError, Replica, ReplicaSpec};

impl NodeCore {
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
    pub(super) fn sweep(&mut self, pool_id: &PoolId) {
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

    /// Those with engines, those that may get some, and those whose engines cannot be bound.
    pub(super) fn known_pool_ids(&self) -> BTreeSet<&PoolId> {
        self.pools.keys().chain(self.declared.keys()).chain(self.problems.pools()).collect()
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
        let (drain, is_expected) = (Drain { deadline }, self.is_expected(pool_id));
        match self.pools.get_mut(pool_id) {
            Some(pool) => pool.drain = Some(drain),
            // It holds for the engine that comes.
            None if is_expected => {
                self.drains_away.insert(pool_id.clone(), drain);
            }
            None => return false,
        }
        self.session.poke(now);
        true
    }

    /// The pool takes work again.
    pub fn reopen_pool(&mut self, now: Moment, pool_id: &PoolId) -> bool {
        let is_expected = self.is_expected(pool_id);
        let drained = match self.pools.get_mut(pool_id) {
            Some(pool) => pool.drain.take(),
            None if is_expected => self.drains_away.remove(pool_id),
            None => return false,
        };
        if drained.is_some() {
            self.session.poke(now);
        }
        true
    }

    /// Whether the pool is shown, though no engine of it is bound.
    fn is_expected(&self, pool_id: &PoolId) -> bool {
        self.declared.contains_key(pool_id) || self.problems.pools().any(|of| of == pool_id)
    }

    /// The attempts that a drain has given time enough.
    pub fn past_their_drain(&self, now: Moment) -> Vec<AttemptId> {
        let over = |pool: &&Pool| pool.drain.and_then(|drain| drain.deadline).is_some_and(|at| at <= now);
        self.pools.values().filter(over).flat_map(Pool::running).copied().collect()
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
}
