//! One pool and its replicas, as far as they have come.

use std::collections::BTreeMap;
use std::time::Duration;

use pool_registry_types::{Moment, PoolId, ReplicaId};

use crate::supervisor::driver_reports::{Report, Reported};
use crate::supervisor::event::{Ordered, Work};
use crate::supervisor::exits::{CoolDown, Exits, STORM_WINDOW};
use crate::supervisor::plan::{Claim, Device, PoolPlan, Prepared, ReplicaKey, RunId};

/// How long a demand to load holds without being repeated. Source: .specs/01 CLOUD-2422.
pub(super) const DEMAND_LIFE: Duration = Duration::from_secs(15);
/// A pool that was loaded for somebody may wait this long for its first attempt before it
/// counts as idle.
pub(super) const FIRST_WORK_PATIENCE: Duration = Duration::from_secs(5);
/// A gap between two requests is no idleness before this. Source: .specs/01 CLOUD-2424.
pub(super) const IDLE_AFTER: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Down,
    /// It is to run, and has no memory yet.
    Waiting {
        since: Moment,
    },
    Backoff {
        until: Moment,
    },
    Starting {
        run: RunId,
        since: Moment,
    },
    /// `published`: it takes attempts.
    Ready {
        run: RunId,
        since: Moment,
        published: bool,
    },
    /// Withdrawn: what runs may finish.
    /// `reported`: what runs was read since nothing new comes, so that idle means idle.
    Leaving {
        run: RunId,
        until: Moment,
        blame: Blame,
        reported: bool,
    },
    Stopping {
        run: RunId,
        blame: Blame,
    },
}

/// Why an engine that leaves is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Blame {
    /// It is not wanted there any more.
    Nobody,
    /// Its driver or its GPU has a problem: it is started again, and that does not count.
    Driver,
    /// It does not do what it should.
    Engine,
}

impl Stage {
    pub(super) fn run(self) -> Option<RunId> {
        match self {
            Self::Down | Self::Waiting { .. } | Self::Backoff { .. } => None,
            Self::Starting { run, .. }
            | Self::Ready { run, .. }
            | Self::Leaving { run, .. }
            | Self::Stopping { run, .. } => Some(run),
        }
    }

    pub(super) fn is_ready(self) -> bool {
        matches!(self, Self::Ready { .. })
    }
}

#[derive(Debug)]
pub(super) struct Slot {
    pub(super) replica_id: ReplicaId,
    pub(super) stage: Stage,
    pub(super) work: Work,
    /// What its engine takes; empty while it has none.
    pub(super) claim: Claim,
    /// When it last became idle, or ready.
    pub(super) idle_since: Moment,
    /// Faults that the driver had told of each GPU when its engine started.
    pub(super) faults: BTreeMap<Device, u64>,
    /// What its engine says of its driver, not confirmed yet.
    pub(super) report: Option<Report>,
}

impl Slot {
    pub(super) fn new(replica_id: ReplicaId) -> Self {
        Self {
            replica_id,
            stage: Stage::Down,
            work: Work::default(),
            claim: Claim::new(),
            idle_since: Moment::ZERO,
            faults: BTreeMap::new(),
            report: None,
        }
    }

    /// No new attempts; what runs may finish until the time. Returns what is to be withdrawn.
    pub(super) fn leave(&mut self, now: Moment, patience: Duration, blame: Blame) -> Option<RunId> {
        match self.stage {
            Stage::Ready { run, published, .. } => {
                self.stage = Stage::Leaving { run, until: now + patience, blame, reported: false };
                published.then_some(run)
            }
            Stage::Starting { run, .. } => {
                self.stage = Stage::Leaving { run, until: now, blame, reported: false };
                None
            }
            Stage::Down | Stage::Waiting { .. } | Stage::Backoff { .. } => {
                self.stage = Stage::Down;
                None
            }
            Stage::Leaving { .. } | Stage::Stopping { .. } => None,
        }
    }
}

#[derive(Debug)]
pub(super) enum Preparation {
    Wanted,
    UnderWay,
    Done(Prepared),
    Failed { why: String, again: Moment },
}

#[derive(Debug)]
pub(super) struct Generation {
    pub(super) plan: PoolPlan,
    pub(super) preparation: Preparation,
    pub(super) slots: Vec<Slot>,
}

impl Generation {
    pub(super) fn new(plan: PoolPlan) -> Self {
        Self { plan, preparation: Preparation::Wanted, slots: Vec::new() }
    }

    pub(super) fn prepared(&self) -> Option<&Prepared> {
        match &self.preparation {
            Preparation::Done(prepared) => Some(prepared),
            _ => None,
        }
    }

    /// What all replicas take together.
    pub(super) fn whole_claim(&self) -> Claim {
        let mut whole = Claim::new();
        for (device, bytes) in self.prepared().into_iter().flat_map(|prepared| &prepared.claim) {
            whole.insert(*device, bytes.saturating_mul(u64::from(self.plan.replicas)));
        }
        whole
    }

    pub(super) fn is_ready(&self) -> bool {
        !self.slots.is_empty() && self.slots.iter().all(|slot| slot.stage.is_ready())
    }
}

/// How a reload goes on once its plan is prepared.
#[derive(Debug)]
pub(super) enum Way {
    NotChosen,
    /// The new replicas start beside the old ones.
    Beside,
    /// The old ones go first; their plan is kept for the way back.
    After {
        before: Box<Generation>,
        since: Moment,
    },
}

#[derive(Debug)]
pub(super) struct Reload {
    /// While the way is not [`Way::After`], the new generation.
    pub(super) next: Option<Generation>,
    pub(super) way: Way,
}

#[derive(Debug)]
pub(super) struct Pool {
    pub(super) serving: Generation,
    pub(super) reload: Option<Reload>,
    /// Of earlier generations, on their way out.
    pub(super) retired: Vec<Slot>,
    /// When it was heard that tasks wait for it, loaded or not.
    pub(super) waited_for: Option<Moment>,
    /// Somebody waits for it to be loaded, until this.
    pub(super) demand: Option<Moment>,
    pub(super) demand_since: Moment,
    pub(super) exits: Exits,
    pub(super) proven: bool,
    /// Given up, and why.
    pub(super) failed: Option<String>,
    pub(super) cool_down: CoolDown,
    pub(super) reported: Reported,
    /// It was given up because it is larger than the device.
    pub(super) never_fits: bool,
    pub(super) last_error: Option<String>,
    pub(super) tail: Vec<String>,
    pub(super) load_ms: Option<u64>,
    pub(super) restarts: u64,
    pub(super) reload_error: Option<String>,
    /// Not in the file any more.
    pub(super) removed: bool,
    pub(super) purging: bool,
    pub(super) purged: bool,
    /// What a start lacks, in numbers.
    pub(super) waits_for: Option<String>,
    /// Times that it was unloaded.
    pub(super) unloads: u64,
}

impl Pool {
    pub(super) fn new(plan: PoolPlan) -> Self {
        Self {
            serving: Generation::new(plan),
            reload: None,
            retired: Vec::new(),
            waited_for: None,
            demand: None,
            demand_since: Moment::ZERO,
            exits: Exits::default(),
            proven: false,
            failed: None,
            cool_down: CoolDown::default(),
            reported: Reported::default(),
            never_fits: false,
            last_error: None,
            tail: Vec::new(),
            load_ms: None,
            restarts: 0,
            reload_error: None,
            removed: false,
            purging: false,
            purged: false,
            waits_for: None,
            unloads: 0,
        }
    }

    pub(super) fn slots(&self) -> impl Iterator<Item = &Slot> {
        let next = self.reload.iter().filter_map(|reload| reload.next.as_ref());
        self.serving.slots.iter().chain(next.flat_map(|next| &next.slots)).chain(&self.retired)
    }

    pub(super) fn slots_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        let next = self.reload.iter_mut().filter_map(|reload| reload.next.as_mut());
        self.serving.slots.iter_mut().chain(next.flat_map(|next| &mut next.slots)).chain(&mut self.retired)
    }

    /// Its present plan, the one of its reload, and the one that this may have to go back to.
    pub(super) fn plans(&self) -> impl Iterator<Item = &PoolPlan> {
        let before = self.reload.as_ref().and_then(|reload| match &reload.way {
            Way::After { before, .. } => Some(&before.plan),
            Way::NotChosen | Way::Beside => None,
        });
        [Some(&self.serving.plan), Some(self.target()), before].into_iter().flatten()
    }

    /// The plan that the pool has, or will have when its reload is done.
    pub(super) fn target(&self) -> &PoolPlan {
        let next = self.reload.as_ref().and_then(|reload| reload.next.as_ref());
        &next.unwrap_or(&self.serving).plan
    }

    pub(super) fn is_wanted(&self) -> bool {
        let asked = !self.serving.plan.on_demand || self.demand.is_some();
        // While the old generation leaves for the new one, nothing of it starts.
        asked && self.failed.is_none() && !self.removed && !self.purging
    }

    /// A replica id that no living replica of the pool has.
    pub(super) fn free_replica_id(&self, n: u32) -> ReplicaId {
        let plain = format!("r{n}");
        let names = std::iter::once(plain.clone()).chain((1..).map(|k| format!("{plain}.{k}")));
        let mut ids = names.filter_map(|name| ReplicaId::new(&name).ok());
        let taken = |id: &ReplicaId| self.slots().any(|slot| slot.replica_id == *id);
        ids.find(|id| !taken(id)).expect("there are more names than replicas")
    }

    /// Whether it may be unloaded for others at once: it has no work, and nobody waits for it.
    pub(super) fn is_idle(&self, now: Moment) -> bool {
        self.has_no_work(now) && self.waited_for.is_none_or(|reported| now >= reported + DEMAND_LIFE)
    }

    /// Whether nothing has run on it for a while.
    pub(super) fn has_no_work(&self, now: Moment) -> bool {
        let idle = |slot: &Slot| match slot.stage {
            Stage::Ready { since, .. } => {
                slot.work.running == 0
                    && now >= slot.idle_since + IDLE_AFTER
                    && (slot.work.served > 0 || now >= since + FIRST_WORK_PATIENCE)
            }
            Stage::Down | Stage::Waiting { .. } | Stage::Backoff { .. } => true,
            Stage::Starting { .. } | Stage::Leaving { .. } | Stage::Stopping { .. } => false,
        };
        self.serving.plan.on_demand
            && self.reload.is_none()
            && self.serving.slots.iter().any(|slot| slot.stage.is_ready())
            && self.serving.slots.iter().all(idle)
    }

    /// Since when all of its replicas that run have been ready; nothing while one starts or goes.
    pub(super) fn resident_since(&self) -> Option<Moment> {
        let movable = self.serving.plan.on_demand && self.reload.is_none();
        let mut since = None;
        for slot in &self.serving.slots {
            match slot.stage {
                Stage::Ready { since: ready, .. } => since = since.max(Some(ready)),
                Stage::Down | Stage::Waiting { .. } | Stage::Backoff { .. } => {}
                Stage::Starting { .. } | Stage::Leaving { .. } | Stage::Stopping { .. } => return None,
            }
        }
        since.filter(|_| movable)
    }

    pub(super) fn idle_since(&self) -> Moment {
        self.serving.slots.iter().map(|slot| slot.idle_since).max().unwrap_or_default()
    }

    /// Slots of a generation that is not wanted any more: they leave, and are followed until their
    /// engines are gone.
    pub(super) fn retire(
        &mut self,
        now: Moment,
        id: &PoolId,
        mut slots: Vec<Slot>,
        patience: Duration,
        out: &mut Vec<Ordered>,
    ) {
        leave_all(now, id, &mut slots, patience, out);
        self.retired.extend(slots.into_iter().filter(|slot| slot.stage.run().is_some()));
    }

    /// Another plan in the place of one that nobody will want back.
    pub(super) fn replace_serving(
        &mut self,
        now: Moment,
        id: &PoolId,
        plan: PoolPlan,
        out: &mut Vec<Ordered>,
    ) {
        let before = std::mem::replace(&mut self.serving, Generation::new(plan));
        self.retire(now, id, before.slots, Duration::ZERO, out);
    }

    /// The plan that a reload has taken the place of starts again.
    pub(super) fn go_back(&mut self, now: Moment, id: &PoolId, out: &mut Vec<Ordered>) {
        let Some(Reload { way: Way::After { before, .. }, .. }) = self.reload.take() else { return };
        let broken = std::mem::replace(&mut self.serving, *before);
        self.retire(now, id, broken.slots, broken.plan.drain_timeout, out);
    }

    /// The new replicas of a reload go; the old ones have served all the time.
    pub(super) fn give_up_beside(&mut self, now: Moment, id: &PoolId, out: &mut Vec<Ordered>) {
        if let Some(next) = self.reload.as_mut().and_then(|reload| reload.next.take()) {
            self.reload = None;
            self.retire(now, id, next.slots, Duration::ZERO, out);
        }
    }

    /// Gives it another chance, as if it had never been given up.
    pub(super) fn forgive(&mut self) {
        (self.failed, self.never_fits) = (None, false);
        self.cool_down = CoolDown::default();
        self.exits.clear();
    }

    /// What could not be prepared is tried at once.
    pub(super) fn prepare_again(&mut self, now: Moment) {
        if let Preparation::Failed { again, .. } = &mut self.serving.preparation {
            *again = now;
        }
    }

    /// Its engines end too often: none is started before a cool-down is over.
    pub(super) fn give_up(&mut self, now: Moment) {
        let (window, limit) = (STORM_WINDOW.as_secs(), self.serving.plan.exit_limit);
        let (exits, again) = (self.exits.counted(), self.cool_down.begin(now).as_secs());
        let why = self.last_error.clone().unwrap_or_default();
        self.never_fits = false;
        self.failed = Some(format!(
            "it ended {exits} times within {window} s, the limit is {limit}, and is tried again in {again} s: {why}"
        ));
    }

    /// Tries it again once its cool-down is over.
    pub(super) fn try_again(&mut self, now: Moment) {
        if !self.purging && self.cool_down.is_over(now) {
            self.failed = None;
            self.exits.clear();
        }
    }

    /// What of the pool's memory comes free when what leaves has left.
    pub(super) fn coming_free(&self, sum: &mut Claim) {
        let leaving = |slot: &&Slot| matches!(slot.stage, Stage::Leaving { .. } | Stage::Stopping { .. });
        for slot in self.slots().filter(leaving) {
            add(sum, &slot.claim);
        }
    }
}

/// No new attempts on any of the slots; what runs may finish within the patience.
pub(super) fn leave_all(
    now: Moment,
    id: &PoolId,
    slots: &mut [Slot],
    patience: Duration,
    out: &mut Vec<Ordered>,
) {
    for slot in slots {
        let withdrawn = slot.leave(now, patience, Blame::Nobody);
        let replica_key =
            |slot: &Slot| ReplicaKey { pool_id: id.clone(), replica_id: slot.replica_id.clone() };
        out.extend(withdrawn.map(|run| Ordered::Withdraw { run, replica_key: replica_key(slot) }));
    }
}

pub(super) fn add(sum: &mut Claim, claim: &Claim) {
    for (device, bytes) in claim {
        let entry = sum.entry(*device).or_default();
        *entry = entry.saturating_add(*bytes);
    }
}
