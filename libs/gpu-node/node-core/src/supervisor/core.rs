//! [`Supervisor`]: which engines run, which wait, which make room. A value that is told the time.
//!
//! Every event is taken in, then everything is reconciled: what was prepared, what is idle, what
//! leaves, what may start again, and last, in the order of their waiting, who gets memory. A
//! reload is a second generation of the pool beside the first one, or after it where the memory
//! does not allow both.
//!
//! It knows no process, no file and no network. The shell carries out [`Ordered`] and tells
//! what [`Happened`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pool_registry_types::{Moment, PoolId};

use crate::jitter::Jitter;
use crate::supervisor::event::{Happened, Ordered, Work};
use crate::supervisor::exits::STORM_WINDOW;
use crate::supervisor::ledger::Ledger;
use crate::supervisor::plan::{PoolPlan, Prepared, ReplicaKey, RunId, Unprepared};
use crate::supervisor::pool::{Blame, DEMAND_LIFE, Generation, Pool, Preparation, Reload, Slot, Stage, Way};

/// Pause before a preparation that failed is tried again.
const PREPARE_AGAIN: Duration = Duration::from_secs(30);

/// The engines of one node.
#[derive(Debug)]
pub struct Supervisor {
    pub(super) ledger: Ledger,
    pub(super) pools: BTreeMap<PoolId, Pool>,
    runs_given: u64,
    jitter: Jitter,
    pub(super) stopping: bool,
    /// When it was last asked for which pools tasks wait.
    pub(super) asked_waiting: Option<Moment>,
}

impl Supervisor {
    /// `seed` decides the jitter of pauses.
    pub fn new(reserve_bytes: u64, seed: u64) -> Self {
        Self {
            ledger: Ledger::new(reserve_bytes),
            pools: BTreeMap::new(),
            runs_given: 0,
            jitter: Jitter::new(seed),
            stopping: false,
            asked_waiting: None,
        }
    }

    /// The fingerprint of the plan that a pool has, or will have when its reload is done.
    pub fn target(&self, pool_id: &PoolId) -> Option<u64> {
        self.pools.get(pool_id).map(|pool| pool.target().fingerprint)
    }

    /// The plans that may still be started: also those that a reload may have to go back to.
    pub fn plans(&self) -> BTreeSet<u64> {
        self.pools.values().flat_map(Pool::plans).map(|plan| plan.fingerprint).collect()
    }

    pub fn set_reserve(&mut self, reserve_bytes: u64) {
        self.ledger.set_reserve(reserve_bytes);
    }

    /// Takes an event in and says what is to be done.
    pub fn apply(&mut self, now: Moment, happened: Happened) -> Vec<Ordered> {
        let mut out = Vec::new();
        match happened {
            Happened::Configured(plans) => self.configured(now, plans, &mut out),
            Happened::Devices(readings) => self.devices(now, &readings, &mut out),
            Happened::Prepared { pool_id, fingerprint, outcome } => {
                self.prepared(now, &pool_id, fingerprint, outcome, &mut out);
            }
            Happened::Ready { run } => self.ready(now, run, &mut out),
            Happened::Exited { run, how, tail, has_culprit } => {
                self.exited(now, run, Ended { how, tail, has_culprit }, &mut out);
            }
            Happened::Alarmed { run, line } => self.alarmed(now, run, line),
            Happened::Used(work) => self.used(now, &work),
            Happened::Load { pool_id } => self.load(now, &pool_id),
            Happened::Waiting(pools) => {
                for (id, pool) in &mut self.pools {
                    pool.waited_for = pools.contains(id).then_some(now);
                }
            }
            Happened::Reload { pool_id, plan } => self.reload(now, &pool_id, *plan, &mut out),
            Happened::Mended => self.pools.values_mut().for_each(|pool| pool.prepare_again(now)),
            Happened::Revive { pool_id } => {
                if let Some(pool) = self.pools.get_mut(&pool_id).filter(|pool| !pool.purging) {
                    pool.forgive();
                    pool.prepare_again(now);
                }
            }
            Happened::Purge { pool_id } => {
                if let Some(pool) = self.pools.get_mut(&pool_id) {
                    // A second purge may name more than the first.
                    (pool.purging, pool.purged) = (true, false);
                    pool.failed = Some("its operator has purged it; a reload starts it again".into());
                }
            }
            Happened::Shutdown => self.stopping = true,
            Happened::Timer => {}
        }
        self.confirm_reports(now, &mut out);
        self.reconcile(now, &mut out);
        out
    }

    // ---- what is said ----

    fn configured(&mut self, now: Moment, plans: BTreeMap<PoolId, PoolPlan>, out: &mut Vec<Ordered>) {
        for (id, pool) in &mut self.pools {
            pool.removed = !plans.contains_key(id);
        }
        for (id, plan) in plans {
            match self.pools.get(&id).map(|pool| *pool.target() == plan) {
                None => drop(self.pools.insert(id, Pool::new(plan))),
                Some(true) => {}
                Some(false) => self.reload(now, &id, plan, out),
            }
        }
        // What the file allows now is not in a plan.
        self.pools.values_mut().for_each(|pool| pool.prepare_again(now));
    }

    fn prepared(
        &mut self,
        now: Moment,
        pool_id: &PoolId,
        fingerprint: u64,
        outcome: Result<Prepared, Unprepared>,
        out: &mut Vec<Ordered>,
    ) {
        let Some(pool) = self.pools.get_mut(pool_id) else { return };
        let next = pool.reload.as_mut().and_then(|reload| reload.next.as_mut());
        if let Some(next) = next.filter(|next| next.plan.fingerprint == fingerprint) {
            match outcome {
                Ok(prepared) => next.preparation = Preparation::Done(prepared),
                Err(error) => {
                    pool.reload_error = Some(error.reason);
                    pool.reload = None;
                }
            }
            return;
        }
        if pool.serving.plan.fingerprint != fingerprint {
            return;
        }
        if let Some(Reload { way: Way::After { since, .. }, .. }) = &mut pool.reload {
            match outcome {
                // Its time runs from when it could start.
                Ok(_) => *since = now,
                Err(error) => {
                    pool.reload_error = Some(error.reason);
                    pool.go_back(now, pool_id, out);
                    return;
                }
            }
        }
        pool.serving.preparation = match outcome {
            Ok(prepared) => {
                // Engines that an earlier daemon has left are running already.
                for slot in &mut pool.serving.slots {
                    if let Some(run) = slot.stage.run() {
                        slot.claim.clone_from(&prepared.claim);
                        self.ledger.hold(run, &prepared.claim, &format!("{pool_id}-{}", slot.replica_id));
                        if slot.stage.is_ready() {
                            self.ledger.loaded(run);
                        }
                    }
                }
                Preparation::Done(prepared)
            }
            Err(error) => Preparation::Failed { why: error.reason, again: now + PREPARE_AGAIN },
        };
    }

    /// An engine of an earlier daemon lives on: it is that replica's, if the plan is still the same
    /// one. It is published when it answers.
    pub fn adopt(&mut self, now: Moment, replica_key: &ReplicaKey, fingerprint: u64) -> Option<RunId> {
        let run = self.next_run();
        let faults = self.ledger.faults();
        let pool = self.pools.get_mut(&replica_key.pool_id)?;
        let fits = pool.serving.plan.fingerprint == fingerprint
            && pool.serving.slots.len() < usize::try_from(pool.serving.plan.replicas).unwrap_or(usize::MAX)
            && pool.slots().all(|slot| slot.replica_id != replica_key.replica_id);
        fits.then(|| {
            let stage = Stage::Starting { run, since: now };
            pool.serving.slots.push(Slot { stage, faults, ..Slot::new(replica_key.replica_id.clone()) });
            run
        })
    }

    pub(super) fn next_run(&mut self) -> RunId {
        self.runs_given += 1;
        RunId(self.runs_given)
    }

    fn ready(&mut self, now: Moment, run: RunId, out: &mut Vec<Ordered>) {
        self.ledger.loaded(run);
        let Some((pool_id, pool)) = find(&mut self.pools, run) else { return };
        let is_new = pool.reload.as_ref().and_then(|reload| reload.next.as_ref());
        let is_new = is_new.is_some_and(|next| next.slots.iter().any(|slot| slot.stage.run() == Some(run)));
        let Some(slot) = pool.slots_mut().find(|slot| slot.stage.run() == Some(run)) else { return };
        let Stage::Starting { since, .. } = slot.stage else { return };
        slot.stage = Stage::Ready { run, since: now, published: !is_new };
        slot.work = Work::default();
        slot.idle_since = now;
        let replica_key = ReplicaKey { pool_id, replica_id: slot.replica_id.clone() };
        pool.load_ms = Some(now.millis_since(since));
        if is_new {
            return;
        }
        pool.proven = true;
        pool.last_error = None;
        pool.tail.clear();
        out.push(Ordered::Publish { run, replica_key });
        if pool.serving.is_ready() {
            pool.demand = None;
            if matches!(pool.reload, Some(Reload { way: Way::After { .. }, .. })) {
                pool.reload = None;
                pool.reload_error = None;
            }
        }
    }

    fn exited(&mut self, now: Moment, run: RunId, ended: Ended, out: &mut Vec<Ordered>) {
        let Ended { how, tail, has_culprit } = ended;
        self.ledger.release(now, run);
        out.push(Ordered::LookAtDevices);
        let Some((pool_id, pool)) = find(&mut self.pools, run) else { return };
        let is_it = |slot: &Slot| slot.stage.run() == Some(run);
        if let Some(at) = pool.retired.iter().position(is_it) {
            pool.retired.remove(at);
            return;
        }
        let beside = pool.reload.as_ref().and_then(|reload| reload.next.as_ref());
        if beside.is_some_and(|next| next.slots.iter().any(is_it)) {
            pool.reload_error = Some(with_tail(&how, &tail));
            // Its own slot has nothing left that could leave.
            for slot in pool.slots_mut().filter(|slot| slot.stage.run() == Some(run)) {
                slot.stage = Stage::Down;
            }
            pool.give_up_beside(now, &pool_id, out);
            return;
        }
        let Some(slot) = pool.serving.slots.iter_mut().find(|slot| is_it(slot)) else { return };
        let stage = std::mem::replace(&mut slot.stage, Stage::Down);
        let (blame, why) = match stage {
            // Why it was stopped says more than how it ended.
            Stage::Leaving { blame, .. } | Stage::Stopping { blame, .. } => {
                (blame, pool.last_error.clone().unwrap_or(how))
            }
            Stage::Ready { published: true, since, .. } => {
                let replica_key =
                    ReplicaKey { pool_id: pool_id.clone(), replica_id: slot.replica_id.clone() };
                out.push(Ordered::Withdraw { run, replica_key });
                if now >= since + STORM_WINDOW {
                    pool.cool_down.reset();
                }
                (Blame::Engine, how)
            }
            _ => (Blame::Engine, how),
        };
        if blame == Blame::Nobody {
            return;
        }
        if matches!(pool.reload, Some(Reload { way: Way::After { .. }, .. })) {
            pool.reload_error = Some(with_tail(&why, &tail));
            pool.go_back(now, &pool_id, out);
            return;
        }
        pool.last_error = Some(why);
        pool.tail = tail;
        pool.restarts += 1;
        let counts = blame == Blame::Engine && !has_culprit;
        pool.exits.add(now, counts);
        if counts && pool.exits.counted() >= pool.serving.plan.exit_limit {
            pool.give_up(now);
            return;
        }
        let until = now + self.jitter.spread(pool.exits.pause(pool.proven));
        let until = if blame == Blame::Driver { until.max(pool.reported.earliest()) } else { until };
        if let Some(slot) = pool.serving.slots.iter_mut().find(|slot| slot.stage == Stage::Down) {
            slot.stage = Stage::Backoff { until };
        }
    }

    fn used(&mut self, now: Moment, work: &BTreeMap<ReplicaKey, Work>) {
        for (pool_id, pool) in &mut self.pools {
            for slot in pool.slots_mut() {
                let replica_key =
                    ReplicaKey { pool_id: pool_id.clone(), replica_id: slot.replica_id.clone() };
                let is = work.get(&replica_key).copied().unwrap_or_default();
                if is.running > 0 || slot.work.running > 0 || is.served != slot.work.served {
                    slot.idle_since = now;
                }
                slot.work = is;
                if let Stage::Leaving { reported, .. } = &mut slot.stage {
                    *reported = true;
                }
            }
        }
    }

    fn load(&mut self, now: Moment, pool_id: &PoolId) {
        let Some(pool) = self.pools.get_mut(pool_id) else { return };
        if pool.serving.plan.on_demand && !pool.serving.is_ready() && pool.failed.is_none() {
            if pool.demand.is_none() {
                pool.demand_since = now;
            }
            pool.demand = Some(now + DEMAND_LIFE);
        }
    }

    /// The newest order counts; the same one again changes nothing that is under way.
    fn reload(&mut self, now: Moment, pool_id: &PoolId, plan: PoolPlan, out: &mut Vec<Ordered>) {
        let Some(pool) = self.pools.get_mut(pool_id) else { return };
        let given_up = pool.failed.is_some() || pool.purging;
        pool.reload_error = None;
        (pool.purging, pool.purged) = (false, false);
        pool.forgive();
        if *pool.target() == plan {
            return;
        }
        pool.give_up_beside(now, pool_id, out);
        if pool.serving.plan == plan {
            return;
        }
        match &mut pool.reload {
            Some(Reload { way: Way::After { before, .. }, .. }) if before.plan == plan => {
                pool.go_back(now, pool_id, out);
            }
            Some(Reload { way: Way::After { since, .. }, .. }) => {
                // What it replaces has proven nothing: the way back is still to the first one.
                *since = now;
                pool.replace_serving(now, pool_id, plan, out);
            }
            _ if pool.serving.prepared().is_some() && !given_up => {
                pool.reload = Some(Reload { next: Some(Generation::new(plan)), way: Way::NotChosen });
            }
            // There is nothing to go back to.
            _ => pool.replace_serving(now, pool_id, plan, out),
        }
    }

    /// The limits of memory are others now: who was given up for want of it gets another chance.
    pub fn reconsider_memory(&mut self) {
        for pool in self.pools.values_mut().filter(|pool| pool.never_fits && !pool.purging) {
            (pool.failed, pool.never_fits) = (None, false);
        }
    }
}

/// How a run has ended.
struct Ended {
    how: String,
    tail: Vec<String>,
    has_culprit: bool,
}

pub(super) fn find(pools: &mut BTreeMap<PoolId, Pool>, run: RunId) -> Option<(PoolId, &mut Pool)> {
    let has = |pool: &Pool| pool.slots().any(|slot| slot.stage.run() == Some(run));
    pools.iter_mut().find(|(_, pool)| has(pool)).map(|(id, pool)| (id.clone(), pool))
}

fn with_tail(how: &str, tail: &[String]) -> String {
    tail.iter().fold(how.to_owned(), |text, line| format!("{text}\n{line}"))
}
