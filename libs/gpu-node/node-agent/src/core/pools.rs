//! Pools and replicas of one node: who is ready, and who holds a slot.

use std::collections::{BTreeMap, BTreeSet};

use pool_registry_types::pool::{
    DrainProgress, EngineKind, PoolReport, PoolState, ReplicaReport, Supervised,
};
use pool_registry_types::{AttemptId, ModelRef, Moment, PoolId, ReplicaId};

/// A replica as its handoff and its engine describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaSpec {
    pub replica_id: ReplicaId,
    pub engine: EngineKind,
    pub engine_version: Option<String>,
    /// `http://host:port`, without a trailing slash.
    pub url: String,
    pub models: Vec<ModelRef>,
    /// Requests that the engine serves at a time; at least 1.
    pub slots: u32,
    pub ctx_max: Option<u32>,
    pub device_mask: Option<String>,
}

/// One look at an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    pub readiness: Readiness,
    /// Requests that it works on, ours included; unknown where it does not tell.
    pub busy: Option<u32>,
}

/// Whether an engine takes requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    /// Up, with the model not in memory yet: the pool counts as having it.
    Loading,
    /// Not up, and why.
    Failed(String),
}

/// A pool whose engines this node runs, bound or not, as its supervisor sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Declared {
    pub engine: EngineKind,
    pub models: Vec<ModelRef>,
    pub device_mask: Option<String>,
    pub ctx_max: Option<u32>,
    /// What the pool is while no replica of it is bound.
    pub state: PoolState,
    pub last_error: Option<String>,
    /// Bytes free on its devices; absent where nobody knows.
    pub vram_free_bytes: Option<u64>,
    pub supervised: Supervised,
}

impl Declared {
    /// The report of the pool while nothing is bound.
    pub(crate) fn report(&self, id: &PoolId, around: &Circumstances) -> PoolReport {
        let draining = around.node_drains;
        PoolReport {
            pool_id: id.clone(),
            state: if draining { PoolState::Draining } else { self.state },
            ready: false,
            draining,
            engine: self.engine,
            engine_version: None,
            models: self.models.clone(),
            device_mask: self.device_mask.clone(),
            ctx_max: self.ctx_max,
            vram_free_bytes: self.vram_free_bytes.or(around.vram_free_bytes),
            replicas: Vec::new(),
            last_error: self.last_error.clone(),
            drain: None,
            supervised: Some(self.supervised.clone()),
        }
    }
}

/// A replica was not bound.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BindError {
    #[error("its engine or models differ from those of pool {pool_id}")]
    DiffersFromPool { pool_id: PoolId },
}

#[derive(Debug)]
pub(crate) struct Replica {
    pub(crate) spec: ReplicaSpec,
    ready: bool,
    /// Its handoff is gone; it stays until what runs on it has ended.
    pub(crate) leaving: bool,
    /// Up, and not yet able to serve.
    loading: bool,
    last_error: Option<String>,
    /// Seen busy beyond our own, in the last look and in the one before: a single look may
    /// have crossed the end of an attempt.
    foreign: u32,
    foreign_seen_once: u32,
    pub(crate) attempts: BTreeSet<AttemptId>,
    /// Attempts that it was given since it was bound.
    pub(crate) served: u64,
    /// Ended, and the engine has not been seen idle yet.
    pub(crate) settling: BTreeSet<AttemptId>,
}

impl Replica {
    fn new(spec: ReplicaSpec) -> Self {
        Self {
            spec,
            ready: false,
            leaving: false,
            loading: true,
            last_error: None,
            foreign: 0,
            foreign_seen_once: 0,
            attempts: BTreeSet::new(),
            served: 0,
            settling: BTreeSet::new(),
        }
    }

    pub(crate) fn has_left(&self) -> bool {
        self.leaving && self.attempts.is_empty() && self.settling.is_empty()
    }

    pub(crate) fn ours(&self) -> u32 {
        u32::try_from(self.attempts.len() + self.settling.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn busy(&self) -> u32 {
        self.ours().saturating_add(self.foreign)
    }

    fn has_free_slot(&self) -> bool {
        self.ready && self.busy() < self.spec.slots
    }

    fn report(&self) -> ReplicaReport {
        let settling = u32::try_from(self.settling.len()).unwrap_or(u32::MAX);
        ReplicaReport {
            replica_id: self.spec.replica_id.clone(),
            ready: self.ready,
            slots_total: self.spec.slots,
            slots_free: if self.ready { self.spec.slots.saturating_sub(self.busy()) } else { 0 },
            // A slot that settles is busy with nothing of ours any more.
            slots_foreign: self.foreign.saturating_add(settling).min(self.spec.slots),
            attempts: self.attempts.iter().copied().collect(),
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Pool {
    pub(crate) replicas: BTreeMap<ReplicaId, Replica>,
    pub(crate) drain: Option<Drain>,
}

/// An operator wants no new work on the pool.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Drain {
    /// When what still runs is ended.
    pub(crate) deadline: Option<Moment>,
}

/// What a report says of the pool besides what the pool knows itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Circumstances {
    pub(crate) now: Moment,
    /// The whole node takes no work.
    pub(crate) node_drains: bool,
    pub(crate) vram_free_bytes: Option<u64>,
    /// When the oldest attempt that runs on the pool was accepted.
    pub(crate) oldest: Option<Moment>,
}

impl Pool {
    /// A replica that is bound anew keeps the attempts that still run on it.
    pub(crate) fn bind(&mut self, spec: ReplicaSpec) {
        let mut replica = Replica::new(spec);
        if let Some(before) = self.replicas.remove(&replica.spec.replica_id) {
            replica.attempts = before.attempts;
            replica.served = before.served;
            replica.settling = before.settling;
        }
        self.replicas.insert(replica.spec.replica_id.clone(), replica);
    }

    /// Returns whether the change is worth a report at once.
    pub(crate) fn observed(&mut self, replica_id: &ReplicaId, health: Health) -> bool {
        let Some(replica) = self.replicas.get_mut(replica_id).filter(|replica| !replica.leaving) else {
            return false;
        };
        let was = (replica.ready, replica.loading, replica.foreign);
        replica.ready = health.readiness == Readiness::Ready;
        replica.loading = health.readiness == Readiness::Loading;
        replica.last_error = match health.readiness {
            Readiness::Failed(reason) => Some(reason),
            Readiness::Ready | Readiness::Loading => None,
        };
        let foreign = health.busy.unwrap_or(0).saturating_sub(replica.ours());
        replica.foreign = foreign.min(replica.foreign_seen_once);
        replica.foreign_seen_once = foreign;
        was != (replica.ready, replica.loading, replica.foreign)
    }

    /// Takes a replica out of service. Returns whether there was one.
    pub(crate) fn leave(&mut self, replica_id: &ReplicaId) -> bool {
        self.replicas.get_mut(replica_id).is_some_and(|replica| {
            replica.leaving = true;
            replica.ready = false;
            true
        })
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.replicas.values().any(|replica| replica.ready)
    }

    /// The hinted replica if it has a free slot, else the least busy one.
    pub(crate) fn take_slot(
        &mut self,
        attempt: AttemptId,
        hint: Option<&ReplicaId>,
    ) -> Option<(ReplicaId, &Replica)> {
        let hinted = hint.filter(|id| self.replicas.get(*id).is_some_and(Replica::has_free_slot));
        let least_busy = || {
            let free = self.replicas.iter().filter(|(_, replica)| replica.has_free_slot());
            free.min_by_key(|(_, replica)| {
                u64::from(replica.busy()) * 1_000_000 / u64::from(replica.spec.slots)
            })
        };
        let chosen = match hinted {
            Some(id) => id.clone(),
            None => least_busy()?.0.clone(),
        };
        let replica = self.replicas.get_mut(&chosen)?;
        replica.attempts.insert(attempt);
        replica.served += 1;
        Some((chosen, replica))
    }

    /// Whether it may be given work now.
    pub(crate) fn takes_work(&self) -> bool {
        self.drain.is_none() && self.is_ready()
    }

    pub(crate) fn running(&self) -> impl Iterator<Item = &AttemptId> {
        self.replicas.values().flat_map(|replica| &replica.attempts)
    }

    fn progress(&self, around: &Circumstances) -> Option<DrainProgress> {
        let drain = self.drain?;
        Some(DrainProgress {
            tasks_left: u32::try_from(self.running().count()).unwrap_or(u32::MAX),
            oldest_age_ms: around.oldest.map(|oldest| around.now.millis_since(oldest)),
            deadline_ms: drain.deadline.map(|deadline| deadline.millis_since(around.now)),
        })
    }

    pub(crate) fn report(
        &self,
        id: &PoolId,
        around: &Circumstances,
        declared: Option<&Declared>,
    ) -> PoolReport {
        let draining = around.node_drains || self.drain.is_some();
        if let Some(declared) = declared.filter(|_| self.replicas.values().all(|replica| replica.leaving)) {
            // What runs on engines that leave is still told; what may come is its supervisor's to say.
            let report = declared.report(id, around);
            return PoolReport {
                state: if draining { PoolState::Draining } else { report.state },
                draining,
                replicas: self.replicas.values().map(Replica::report).collect(),
                drain: self.progress(around),
                ..report
            };
        }
        let staying = self.replicas.values().find(|replica| !replica.leaving);
        let first = staying.or(self.replicas.values().next()).expect("a pool without replicas is removed");
        let last_error = self.replicas.values().find_map(|replica| replica.last_error.clone());
        let ready = self.is_ready() && !draining;
        let loading = self.replicas.values().any(|replica| replica.loading && !replica.leaving);
        let state = match (draining, self.is_ready(), loading) {
            (true, ..) => PoolState::Draining,
            (false, true, _) => PoolState::Ready,
            (false, false, true) => PoolState::Loading,
            (false, false, false) => PoolState::Failed,
        };
        let ctx_max = self.replicas.values().map(|replica| replica.spec.ctx_max).min().flatten();
        PoolReport {
            pool_id: id.clone(),
            state,
            ready,
            draining,
            engine: first.spec.engine,
            engine_version: first.spec.engine_version.clone(),
            models: first.spec.models.clone(),
            device_mask: first.spec.device_mask.clone(),
            ctx_max,
            vram_free_bytes: declared
                .and_then(|declared| declared.vram_free_bytes)
                .or(around.vram_free_bytes),
            replicas: self.replicas.values().map(Replica::report).collect(),
            last_error,
            drain: self.progress(around),
            supervised: declared.map(|declared| declared.supervised.clone()),
        }
    }
}
