//! The pools of one node: who of their replicas gets work, their drains, and what is reported of them.

use std::collections::BTreeMap;

use pool_registry_types::pool::{DrainProgress, EngineKind, PoolReport, PoolState, Supervised};
use pool_registry_types::{AttemptId, ModelRef, Moment, PoolId, ReplicaId};

use super::replica::{Busy, Readiness, Replica, ReplicaSpec};

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
            engine: Some(self.engine),
            engine_version: None,
            models: self.models.clone(),
            device_mask: self.device_mask.clone(),
            ctx_max: self.ctx_max,
            vram_free_bytes: self.vram_free_bytes.or(around.vram_free_bytes),
            replicas: Vec::new(),
            last_error: self.last_error.clone(),
            warning: None,
            drain: None,
            supervised: Some(self.supervised.clone()),
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
    /// A replica that is bound anew keeps the attempts that still run on it; at another address they
    /// take none of its slots. Where it says the same as before, nothing changes. Returns whether anything did.
    pub(crate) fn bind(&mut self, spec: ReplicaSpec) -> bool {
        let mut replica = Replica::new(spec);
        if let Some(before) = self.replicas.remove(&replica.spec.replica_id) {
            if before.spec == replica.spec && !before.leaving {
                self.replicas.insert(replica.spec.replica_id.clone(), before);
                return false;
            }
            replica.served = before.served;
            replica.elsewhere = before.elsewhere;
            if before.spec.url == replica.spec.url {
                replica.attempts = before.attempts;
                replica.releasing = before.releasing;
                (replica.reported, replica.cannot_tell, replica.heard) =
                    (before.reported, before.cannot_tell, before.heard);
            } else {
                replica.elsewhere.extend(before.attempts);
            }
        }
        self.replicas.insert(replica.spec.replica_id.clone(), replica);
        true
    }

    /// Returns whether the change is worth a report at once.
    pub(crate) fn observed(&mut self, now: Moment, replica_id: &ReplicaId, readiness: Readiness) -> bool {
        let Some(replica) = self.replicas.get_mut(replica_id).filter(|replica| !replica.leaving) else {
            return false;
        };
        let was = (replica.ready, replica.loading);
        replica.observed(now, readiness);
        was != (replica.ready, replica.loading)
    }

    /// A byte of an attempt came from the replica. Returns whether that brought it back, after looks
    /// that were not answered.
    pub(crate) fn heard(&mut self, now: Moment, replica_id: &ReplicaId) -> bool {
        let Some(replica) = self.replicas.get(replica_id) else { return false };
        // Another one may have come up meanwhile with other models: the next look decides.
        let differs = |other: &Replica| other.ready && other.spec.models != replica.spec.models;
        let back = replica.silent && !replica.leaving && !self.replicas.values().any(differs);
        let Some(replica) = self.replicas.get_mut(replica_id) else { return false };
        replica.heard = replica.heard.max(now);
        if back {
            replica.observed(now, Readiness::Ready);
        }
        back
    }

    /// Returns whether the change is worth a report at once.
    pub(crate) fn counted(
        &mut self,
        now: Moment,
        began: Moment,
        replica_id: &ReplicaId,
        known: u32,
        busy: Busy,
    ) -> bool {
        let Some(replica) = self.replicas.get_mut(replica_id) else { return false };
        let was = (replica.foreign, replica.releasing.len());
        replica.counted(now, began, known, busy);
        was != (replica.foreign, replica.releasing.len())
    }

    /// Frees the slots of attempts that were broken off long enough ago. Returns whether there were
    /// any.
    pub(crate) fn expire_releases(&mut self, now: Moment) -> bool {
        let mut any = false;
        for replica in self.replicas.values_mut() {
            let over = |since: Moment| replica.slot_due_at(since) <= now;
            let gone: Vec<AttemptId> =
                replica.releasing.iter().filter(|(_, since)| over(**since)).map(|(id, _)| *id).collect();
            any |= !gone.is_empty();
            for id in gone {
                replica.releasing.remove(&id);
            }
        }
        any
    }

    /// When [`Pool::expire_releases`] has something to do for the replica; nothing while no slot of
    /// it is being released.
    pub(crate) fn slot_due_at(&self, replica_id: &ReplicaId) -> Option<Moment> {
        let replica = self.replicas.get(replica_id)?;
        replica.releasing.values().map(|since| replica.slot_due_at(*since)).min()
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
        model: Option<&ModelRef>,
        hint: Option<&ReplicaId>,
    ) -> Option<(ReplicaId, &Replica)> {
        let takes = |replica: &Replica| {
            replica.has_free_slot() && model.is_none_or(|model| replica.spec.models.contains(model))
        };
        let hinted = hint.filter(|id| self.replicas.get(*id).is_some_and(takes));
        let least_busy = || {
            let free = self.replicas.iter().filter(|(_, replica)| takes(replica));
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

    /// Whether tasks may ask for the model here now.
    pub(crate) fn serves(&self, model: &ModelRef) -> bool {
        self.replicas.values().any(|replica| replica.ready && replica.spec.models.contains(model))
    }

    /// Whether it may be given work now.
    pub(crate) fn takes_work(&self) -> bool {
        self.drain.is_none() && self.is_ready()
    }

    pub(crate) fn running(&self) -> impl Iterator<Item = &AttemptId> {
        self.replicas.values().flat_map(|replica| replica.attempts.iter().chain(&replica.elsewhere))
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
                replicas: self.replicas.values().flat_map(Replica::reports).collect(),
                drain: self.progress(around),
                ..report
            };
        }
        let serving = self.replicas.values().find(|replica| replica.ready);
        let staying = serving.or(self.replicas.values().find(|replica| !replica.leaving));
        let first = staying.or(self.replicas.values().next()).expect("a pool without replicas is removed");
        let last_error = self.replicas.values().find_map(|replica| replica.last_error.clone());
        let ready = self.is_ready() && !draining;
        let loading =
            self.replicas.values().any(|replica| (replica.loading && !replica.leaving) || replica.works());
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
            engine: Some(first.spec.engine),
            engine_version: first.spec.engine_version.clone(),
            models: first.spec.models.clone(),
            device_mask: first.spec.device_mask.clone(),
            ctx_max,
            vram_free_bytes: declared
                .and_then(|declared| declared.vram_free_bytes)
                .or(around.vram_free_bytes),
            replicas: self.replicas.values().flat_map(Replica::reports).collect(),
            last_error,
            warning: self.replicas.values().find_map(|replica| replica.spec.warning.clone()),
            drain: self.progress(around),
            supervised: declared.map(|declared| declared.supervised.clone()),
        }
    }
}
