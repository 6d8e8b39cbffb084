//! One replica: whether it is ready, who holds its slots, and what its engine has shown of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pool_registry_types::pool::{EngineKind, ReplicaReport};
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

/// A replica was not bound.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BindError {
    #[error("its engine or models differ from those of pool {pool_id}")]
    DiffersFromPool { pool_id: PoolId },
}

#[derive(Debug)]
pub(crate) struct Replica {
    pub(crate) spec: ReplicaSpec,
    pub(super) ready: bool,
    /// Its handoff is gone; it stays until what runs on it has ended.
    pub(crate) leaving: bool,
    /// Up, and not yet able to serve.
    pub(super) loading: bool,
    pub(super) last_error: Option<String>,
    /// Seen busy beyond our own, in the last look and in the one before: a single look may
    /// have crossed the end of an attempt.
    pub(super) foreign: u32,
    foreign_seen_once: u32,
    pub(crate) attempts: BTreeSet<AttemptId>,
    /// Attempts at its old address: they run on, and have nothing of the engine at the present one.
    pub(super) elsewhere: BTreeSet<AttemptId>,
    /// Attempts that it was given since it was bound.
    pub(crate) served: u64,
    /// Ended, the engine may still work on it, and since when.
    pub(crate) releasing: BTreeMap<AttemptId, Moment>,
    /// When the engine last said how busy it is.
    pub(super) reported: Moment,
    pub(super) cannot_tell: bool,
    /// Looks in a row that were not answered.
    unanswered: u32,
    /// The last sign of life: an answer to a look, or a byte of an attempt.
    pub(super) heard: Moment,
    /// It is not ready because it does not answer.
    pub(super) silent: bool,
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
    pub(super) fn new(spec: ReplicaSpec) -> Self {
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
    pub(super) fn observed(&mut self, now: Moment, readiness: Readiness) {
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
    pub(super) fn counted(&mut self, now: Moment, began: Moment, known: u32, busy: Busy) {
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
    pub(super) fn slot_due_at(&self, since: Moment) -> Moment {
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
    pub(super) fn works(&self) -> bool {
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

    pub(super) fn has_free_slot(&self) -> bool {
        self.ready && self.busy() < self.spec.slots
    }

    /// The replica, and what runs at its old address: that takes no slot.
    pub(super) fn reports(&self) -> impl Iterator<Item = ReplicaReport> {
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
