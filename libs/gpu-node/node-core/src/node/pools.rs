//! Pools and replicas of one node: who is ready, and who holds a slot.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pool_registry_types::pool::{
    DrainProgress, EngineKind, PoolReport, PoolState, ReplicaReport, Supervised,
};
use pool_registry_types::{AttemptId, Backoff, ModelRef, Moment, PoolId, ReplicaId, TaskId};

/// Looks in a row without an answer, and the time without a byte of ours, after which an engine is
/// not busy but away. Source: .specs/01 CLOUD-2495.
const UNANSWERED_LOOKS: u32 = 3;
const UNANSWERED_FOR: Duration = Duration::from_secs(10);
/// How long the slot of an attempt that was broken off is kept where the engine cannot tell, and
/// without its word where it can. Source: .specs/01 CLOUD-1405.
const RELEASED_UNCOUNTED: Duration = Duration::from_millis(500);
const RELEASED_WITHOUT_ANSWER: Duration = Duration::from_secs(30);
/// Refusals in a row after which it counts no more that requests succeeded before.
const REFUSALS_IN_A_ROW: usize = 3;
/// How long a replica that refuses its operator is not tried; doubles each time.
const REFUSED_PAUSES: Backoff = Backoff::new(Duration::from_secs(10), Duration::from_secs(300));

/// A replica as its handoff and its engine describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaSpec {
    pub replica_id: ReplicaId,
    pub engine: EngineKind,
    pub engine_version: Option<String>,
    /// `http://host:port`, without a trailing slash.
    pub url: String,
    /// The names by which tasks ask for it.
    pub models: Vec<ModelRef>,
    /// Those of them that the engine has another name for.
    pub engine_names: BTreeMap<ModelRef, String>,
    /// The names are the engine's own, and hold for the process that gave them.
    pub names_from_engine: bool,
    /// Requests that the engine serves at a time; at least 1.
    pub slots: u32,
    pub ctx_max: Option<u32>,
    pub device_mask: Option<String>,
    /// What its operator should look at although it serves.
    pub warning: Option<String>,
}

/// One look at whether an engine takes requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    /// Up, with the model not in memory yet: the pool counts as having it.
    Loading,
    /// Not up, and why.
    Failed(String),
    /// Nothing listens there: what comes next is another process.
    Gone(String),
    /// No answer in time, as of one that is busy: no verdict by itself.
    Silent(String),
}

/// One look at how many requests are in an engine, ours included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Busy {
    Reported(u32),
    /// It does not say so.
    CannotTell,
    /// It would, and did not in time.
    NoAnswer,
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
    /// Attempts at its old address: they run on, and have nothing of the engine at the present one.
    elsewhere: BTreeSet<AttemptId>,
    /// Attempts that it was given since it was bound.
    pub(crate) served: u64,
    /// Ended, the engine may still work on it, and since when.
    pub(crate) releasing: BTreeMap<AttemptId, Moment>,
    /// When the engine last said how busy it is.
    reported: Moment,
    cannot_tell: bool,
    /// Looks in a row that were not answered.
    unanswered: u32,
    /// The last sign of life: an answer to a look, or a byte of an attempt.
    heard: Moment,
    /// It is not ready because it does not answer.
    silent: bool,
    /// A request has succeeded since its engine came up.
    proven: bool,
    /// Attempts that have brought something; those that ended are dropped with the next one.
    flowing: BTreeSet<AttemptId>,
    refused: Option<Refused>,
    /// What requests have shown that it does not have, by their paths, and when.
    lacks: BTreeMap<String, Moment>,
}

/// It does not let its operator in, or does not have what its operator says.
#[derive(Debug)]
struct Refused {
    reason: String,
    /// Not tried before; nothing while others get through.
    until: Option<Moment>,
    /// The last tasks that were refused since the last success: the tries of one count once.
    tasks: Vec<Option<TaskId>>,
    /// Times that it was not tried for a while since then.
    times: u32,
}

/// Paths that a replica is remembered not to have, and for how long: another process, or what
/// stands before it, may have them.
const MOST_LACKING: usize = 32;
const LACKS_FOR: Duration = Duration::from_secs(60);

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
            elsewhere: BTreeSet::new(),
            served: 0,
            releasing: BTreeMap::new(),
            reported: Moment::ZERO,
            cannot_tell: false,
            unanswered: 0,
            heard: Moment::ZERO,
            silent: false,
            proven: false,
            flowing: BTreeSet::new(),
            refused: None,
            lacks: BTreeMap::new(),
        }
    }

    /// Takes a look in.
    fn observed(&mut self, now: Moment, readiness: Readiness) {
        if let Readiness::Silent(reason) = readiness {
            self.unanswered += 1;
            let away = self.unanswered >= UNANSWERED_LOOKS && now >= self.heard + UNANSWERED_FOR;
            if away || !(self.ready || self.loading) {
                self.silent |= self.ready;
                (self.ready, self.loading) = (false, false);
                self.last_error = Some(reason);
            }
            return;
        }
        (self.unanswered, self.heard, self.silent) = (0, now, false);
        if matches!(readiness, Readiness::Loading | Readiness::Gone(_)) {
            // What comes up is another process, maybe with other options and another key.
            (self.proven, self.refused) = (false, None);
            self.lacks.clear();
        }
        self.ready = readiness == Readiness::Ready;
        self.loading = readiness == Readiness::Loading;
        self.last_error = match readiness {
            Readiness::Failed(reason) | Readiness::Gone(reason) => Some(reason),
            _ => None,
        };
        if let Some(refused) = &self.refused {
            self.last_error.get_or_insert_with(|| refused.reason.clone());
            self.ready &= refused.until.is_none_or(|until| until <= now);
        }
    }

    /// Takes the engine's word for how busy it is in, asked for at `began`. `known` attempts of
    /// ours were at the engine by then.
    fn counted(&mut self, now: Moment, began: Moment, known: u32, busy: Busy) {
        match busy {
            Busy::Reported(count) => {
                (self.reported, self.cannot_tell) = (now, false);
                let foreign = count.saturating_sub(self.ours());
                self.foreign = foreign.min(self.foreign_seen_once);
                self.foreign_seen_once = foreign;
                // Each request beyond our other attempts may be one that was broken off.
                let busy_with = usize::try_from(count.saturating_sub(known)).unwrap_or(usize::MAX);
                let mut oldest: Vec<(Moment, AttemptId)> =
                    self.releasing.iter().map(|(id, since)| (*since, *id)).collect();
                oldest.sort();
                let over = oldest.len().saturating_sub(busy_with);
                for (_, id) in oldest.into_iter().filter(|(since, _)| *since <= began).take(over) {
                    self.releasing.remove(&id);
                }
            }
            Busy::CannotTell => {
                self.cannot_tell = true;
                (self.foreign, self.foreign_seen_once) = (0, 0);
            }
            Busy::NoAnswer => {}
        }
    }

    /// When the slot of an attempt that was broken off at `since` is free whatever the engine says.
    fn slot_due_at(&self, since: Moment) -> Moment {
        if self.cannot_tell {
            since + RELEASED_UNCOUNTED
        } else {
            since.max(self.reported) + RELEASED_WITHOUT_ANSWER
        }
    }

    /// The engine's own name for a model.
    pub(crate) fn engine_name(&self, model: &ModelRef) -> String {
        self.spec.engine_names.get(model).map_or_else(|| model.to_string(), Clone::clone)
    }

    pub(crate) fn succeeded(&mut self, attempt: &AttemptId) {
        self.flowing.retain(|id| self.attempts.contains(id));
        if self.attempts.contains(attempt) {
            self.flowing.insert(*attempt);
        }
        self.proven = true;
        if self.refused.take().is_some() && self.ready {
            self.last_error = None;
        }
    }

    /// It has refused what is its operator's. Where nothing else gets through it is not tried for a
    /// while.
    pub(crate) fn refuses(&mut self, now: Moment, task: Option<TaskId>, reason: String) {
        let before = self.refused.take();
        if before.as_ref().and_then(|before| before.until).is_some_and(|until| until > now) {
            // Of an attempt that was under way when the last one was refused.
            self.refused = before;
            return;
        }
        let (times, mut tasks) = before.map_or((0, Vec::new()), |before| (before.times, before.tasks));
        if tasks.len() < REFUSALS_IN_A_ROW && (task.is_none() || !tasks.contains(&task)) {
            tasks.push(task);
        }
        let flows = self.flowing.iter().any(|id| self.attempts.contains(id));
        let others = flows || (self.proven && tasks.len() < REFUSALS_IN_A_ROW);
        let pause = REFUSED_PAUSES.after(times);
        self.last_error = Some(reason.clone());
        self.ready &= others;
        let (until, times) = if others { (None, 0) } else { (Some(now + pause), times + 1) };
        self.refused = Some(Refused { reason, until, tasks, times });
    }

    pub(crate) fn lacks(&mut self, now: Moment, path: &str) {
        self.lacks.retain(|_, seen| now < *seen + LACKS_FOR);
        if self.lacks.len() < MOST_LACKING {
            self.lacks.insert(path.to_owned(), now);
        }
    }

    pub(crate) fn is_lacking(&self, now: Moment, path: &str) -> bool {
        self.lacks.get(path).is_some_and(|seen| now < *seen + LACKS_FOR)
    }

    /// Its key is another one than that which was refused.
    pub(crate) fn key_changed(&mut self) {
        self.refused = None;
    }

    /// It has its model although it answers nobody: attempts run on it inside their deadlines.
    fn works(&self) -> bool {
        self.silent && !self.attempts.is_empty() && !self.leaving
    }

    pub(crate) fn has_left(&self) -> bool {
        self.leaving && self.attempts.is_empty() && self.elsewhere.is_empty() && self.releasing.is_empty()
    }

    /// Whether the attempt runs at its old address.
    pub(crate) fn is_elsewhere(&self, attempt: &AttemptId) -> bool {
        self.elsewhere.contains(attempt)
    }

    /// The attempt is over, and the engine with it.
    pub(crate) fn ended(&mut self, attempt: &AttemptId) {
        self.attempts.remove(attempt);
        self.elsewhere.remove(attempt);
        self.releasing.remove(attempt);
    }

    pub(crate) fn ours(&self) -> u32 {
        u32::try_from(self.attempts.len() + self.releasing.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn busy(&self) -> u32 {
        self.ours().saturating_add(self.foreign)
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.ready
    }

    fn has_free_slot(&self) -> bool {
        self.ready && self.busy() < self.spec.slots
    }

    /// The replica, and what runs at its old address: that takes no slot.
    fn reports(&self) -> impl Iterator<Item = ReplicaReport> {
        let elsewhere = (!self.elsewhere.is_empty()).then(|| ReplicaReport {
            attempts: self.elsewhere.iter().copied().collect(),
            ..ReplicaReport::without_slots(self.spec.replica_id.clone())
        });
        std::iter::once(self.report()).chain(elsewhere)
    }

    fn report(&self) -> ReplicaReport {
        let releasing = u32::try_from(self.releasing.len()).unwrap_or(u32::MAX);
        ReplicaReport {
            replica_id: self.spec.replica_id.clone(),
            ready: self.ready,
            slots_total: self.spec.slots,
            slots_free: if self.ready { self.spec.slots.saturating_sub(self.busy()) } else { 0 },
            // A slot that is being released is busy with nothing of ours any more.
            slots_foreign: self.foreign.saturating_add(releasing).min(self.spec.slots),
            attempts: self.attempts.iter().copied().collect(),
            held: Vec::new(),
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
