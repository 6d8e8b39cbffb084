//! What follows from how things stand: who is prepared, who leaves, who starts.

use std::collections::BTreeSet;
use std::time::Duration;

use pool_registry_types::{Moment, PoolId};

use crate::supervisor::core::Supervisor;
use crate::supervisor::event::Ordered;
use crate::supervisor::ledger::{Ledger, Shortage};
use crate::supervisor::plan::{Claim, Device, ReplicaKey};
use crate::supervisor::pool::{
    Blame, Generation, Pool, Preparation, Reload, Slot, Stage, Way, add, leave_all,
};

/// Pause between two questions for which pools tasks wait.
const ASK_WAITING_EVERY: Duration = Duration::from_secs(1);

impl Supervisor {
    pub(super) fn reconcile(&mut self, now: Moment, out: &mut Vec<Ordered>) {
        for (id, pool) in &mut self.pools {
            if pool.demand.is_some_and(|until| until <= now) {
                pool.demand = None;
            }
            pool.try_again(now);
            if self.stopping || pool.removed || pool.purging {
                // What still runs when the daemon ends was given its time before.
                let patience = if self.stopping { Duration::ZERO } else { pool.serving.plan.drain_timeout };
                pool.leave_altogether(now, id, patience, out);
            } else {
                prepare(now, id, pool, out);
                pool.unload_when_idle(now, id, out);
            }
            pool.stop_what_has_left(now, out);
            pool.stop_what_never_loads(now, id, out);
        }
        if !self.stopping {
            self.advance_reloads(now, out);
            for pool in self.pools.values_mut() {
                pool.line_up(now);
            }
            self.start_waiting(now, out);
        }
        for (id, pool) in &mut self.pools {
            if pool.purging && pool.slots().all(|slot| slot.stage.run().is_none()) && !pool.purged {
                pool.purged = true;
                out.push(Ordered::Purged { pool_id: id.clone() });
            }
        }
        let gone = |pool: &Pool| pool.removed && pool.slots().all(|slot| slot.stage.run().is_none());
        self.pools.retain(|_, pool| !gone(pool));
    }

    fn advance_reloads(&mut self, now: Moment, out: &mut Vec<Ordered>) {
        let ids: Vec<PoolId> =
            self.pools.iter().filter(|(_, pool)| pool.reload.is_some()).map(|(id, _)| id.clone()).collect();
        for id in ids {
            self.choose_way(now, &id, out);
            let Some(pool) = self.pools.get_mut(&id) else { continue };
            let is_ready = |reload: &Reload| reload.next.as_ref().is_some_and(Generation::is_ready);
            if pool.reload.as_ref().is_some_and(is_ready) {
                pool.switch(now, &id, out);
            }
        }
    }

    /// Beside the old replicas where the memory allows it, else after them.
    fn choose_way(&mut self, now: Moment, id: &PoolId, out: &mut Vec<Ordered>) {
        let Some(pool) = self.pools.get(id) else { return };
        let Some(Reload { next: Some(next), way: Way::NotChosen }) = &pool.reload else { return };
        if next.prepared().is_none() {
            return;
        }
        let beside = self.ledger.fits(&next.whole_claim(), &Claim::new());
        if let Err(short) = &beside
            && short.for_ever
        {
            let why = short.to_string();
            let Some(pool) = self.pools.get_mut(id) else { return };
            pool.reload_error = Some(why);
            pool.reload = None;
            return;
        }
        if !pool.serving.slots.iter().any(|slot| slot.stage.is_ready()) {
            // Nothing serves that could go on serving meanwhile.
            let Some(pool) = self.pools.get_mut(id) else { return };
            let Some(next) = pool.reload.take().and_then(|reload| reload.next) else { return };
            let before = std::mem::replace(&mut pool.serving, next);
            pool.retire(now, id, before.slots, Duration::ZERO, out);
            return;
        }
        let replicas = next.plan.replicas;
        if beside.is_ok() {
            for n in 0..replicas {
                let run = self.next_run();
                let Some(pool) = self.pools.get_mut(id) else { return };
                let replica_id = pool.free_replica_id(n);
                let Some(Reload { next: Some(next), way }) = &mut pool.reload else { return };
                *way = Way::Beside;
                let mut slot = Slot::new(replica_id);
                start(now, id, next, &mut slot, run, &mut self.ledger, out);
                next.slots.push(slot);
            }
            return;
        }
        if self.ledger.will_fit(now, &next.whole_claim(), &self.coming_free()) {
            // Room for both is on its way.
            return;
        }
        if !self.could_fit(id, &next.whole_claim()) {
            let why = beside.err().map(|short| short.to_string());
            let Some(pool) = self.pools.get_mut(id) else { return };
            (pool.reload, pool.reload_error) = (None, why);
            return;
        }
        let Some(pool) = self.pools.get_mut(id) else { return };
        let Some(Reload { next: Some(next), .. }) = pool.reload.take() else { return };
        let mut before = std::mem::replace(&mut pool.serving, next);
        let patience = before.plan.drain_timeout;
        let slots = std::mem::take(&mut before.slots);
        pool.retire(now, id, slots, patience, out);
        pool.reload = Some(Reload { next: None, way: Way::After { before: Box::new(before), since: now } });
        pool.demand = Some(Moment::NEVER).filter(|_| pool.serving.plan.on_demand);
        pool.demand_since = now;
    }

    /// Gives memory to who waits longest; who does not get it may have others make room.
    fn start_waiting(&mut self, now: Moment, out: &mut Vec<Ordered>) {
        let mut waiting: Vec<(Moment, PoolId, usize)> = Vec::new();
        for (id, pool) in &self.pools {
            for (n, slot) in pool.serving.slots.iter().enumerate() {
                if let Stage::Waiting { since } = slot.stage {
                    waiting.push((since, id.clone(), n));
                }
            }
        }
        waiting.sort();
        // Who comes later does not take what is being freed for who came earlier.
        let mut promised: BTreeSet<Device> = BTreeSet::new();
        for (since, id, n) in waiting {
            let Some(pool) = self.pools.get(&id) else { continue };
            let Some(prepared) = pool.serving.prepared() else { continue };
            let claim = prepared.claim.clone();
            let accounts = self.ledger.accounts_of(&claim);
            if !accounts.is_disjoint(&promised) {
                continue;
            }
            match self.ledger.fits(&claim, &Claim::new()) {
                Ok(()) => {
                    let run = self.next_run();
                    let Some(pool) = self.pools.get_mut(&id) else { continue };
                    let mut slots = std::mem::take(&mut pool.serving.slots);
                    start(now, &id, &pool.serving, &mut slots[n], run, &mut self.ledger, out);
                    pool.serving.slots = slots;
                    pool.waits_for = None;
                }
                Err(short) => {
                    // Who can have no room at all keeps nobody else from it.
                    let others = |other: &PoolId, pool: &Pool| *other != id && pool.serving.plan.on_demand;
                    if self.fits_without(&claim, others) {
                        promised.extend(accounts);
                        self.make_room(now, &id, since, &claim, out);
                    }
                    self.say_shortage(&id, &short);
                }
            }
        }
    }

    fn say_shortage(&mut self, id: &PoolId, short: &Shortage) {
        let Some(pool) = self.pools.get_mut(id) else { return };
        if short.for_ever {
            pool.failed = Some(short.to_string());
            pool.never_fits = true;
            for slot in &mut pool.serving.slots {
                if matches!(slot.stage, Stage::Waiting { .. }) {
                    slot.stage = Stage::Down;
                }
            }
        } else {
            pool.waits_for = Some(short.to_string());
        }
    }

    /// Unloads others for the claim: idle ones at once, the least recently used first; busy ones
    /// when they have been there long enough and somebody has waited long enough.
    fn make_room(&mut self, now: Moment, id: &PoolId, since: Moment, claim: &Claim, out: &mut Vec<Ordered>) {
        let mut freed = self.coming_free();
        if self.ledger.will_fit(now, claim, &freed) {
            return;
        }
        let accounts = self.ledger.accounts_of(claim);
        let helps = |pool: &Pool| {
            let prepared = pool.serving.prepared();
            prepared.is_some_and(|of| !self.ledger.accounts_of(&of.claim).is_disjoint(&accounts))
        };
        let others = || self.pools.iter().filter(|(other, pool)| *other != id && helps(pool));
        let mut victims: Vec<(bool, Moment, PoolId)> = Vec::new();
        let mut kept_unconfirmed = false;
        for (other, pool) in others() {
            kept_unconfirmed |= pool.has_no_work(now) && !pool.is_idle(now);
            if pool.is_idle(now) {
                victims.push((false, pool.idle_since(), other.clone()));
            } else if let Some(resident) = pool.resident_since()
                && now >= resident.max(since) + pool.serving.plan.min_resident
            {
                victims.push((true, resident, other.clone()));
            }
        }
        if kept_unconfirmed && self.asked_waiting.is_none_or(|at| now >= at + ASK_WAITING_EVERY) {
            self.asked_waiting = Some(now);
            out.push(Ordered::AskWaiting);
        }
        victims.sort();
        let mut chosen = Vec::new();
        for (_, _, victim) in victims {
            let Some(pool) = self.pools.get(&victim) else { continue };
            add(&mut freed, &pool.serving.whole_claim());
            chosen.push(victim);
            if self.ledger.fits(claim, &freed).is_ok() {
                break;
            }
        }
        if self.ledger.fits(claim, &freed).is_err() {
            return;
        }
        for victim in chosen {
            if let Some(pool) = self.pools.get_mut(&victim) {
                pool.unloads += 1;
                // Who still wants it asks again, behind who waits now.
                pool.demand = None;
                let patience = pool.serving.plan.drain_timeout;
                pool.withdraw_all(now, &victim, patience, out);
            }
        }
    }

    /// When [`crate::supervisor::event::Happened::Timer`] is due.
    pub fn next_deadline(&self, now: Moment) -> Option<Moment> {
        // What is past was reconciled, or waits for something else than time.
        self.pools.values().flat_map(Pool::deadlines).filter(|at| *at > now).min()
    }
}

fn prepare(now: Moment, id: &PoolId, pool: &mut Pool, out: &mut Vec<Ordered>) {
    let next = pool.reload.iter_mut().filter_map(|reload| reload.next.as_mut());
    for generation in std::iter::once(&mut pool.serving).chain(next) {
        let due = match &generation.preparation {
            Preparation::Wanted => true,
            Preparation::Failed { again, .. } => *again <= now,
            Preparation::UnderWay | Preparation::Done(_) => false,
        };
        if due {
            generation.preparation = Preparation::UnderWay;
            out.push(Ordered::Prepare { pool_id: id.clone(), plan: Box::new(generation.plan.clone()) });
        }
    }
}

fn start(
    now: Moment,
    pool_id: &PoolId,
    generation: &Generation,
    slot: &mut Slot,
    run: crate::supervisor::plan::RunId,
    ledger: &mut Ledger,
    out: &mut Vec<Ordered>,
) {
    let replica_key = ReplicaKey { pool_id: pool_id.clone(), replica_id: slot.replica_id.clone() };
    if let Some(prepared) = generation.prepared() {
        ledger.hold(run, &prepared.claim, &replica_key.to_string());
        slot.claim.clone_from(&prepared.claim);
    }
    slot.stage = Stage::Starting { run, since: now };
    (slot.faults, slot.report) = (ledger.faults(), None);
    out.push(Ordered::Start { run, replica_key, fingerprint: generation.plan.fingerprint });
}

impl Pool {
    /// The new generation takes over: it is published in the same step in which the old one is
    /// withdrawn, and what runs on that one finishes there.
    fn switch(&mut self, now: Moment, id: &PoolId, out: &mut Vec<Ordered>) {
        let Some(next) = self.reload.take().and_then(|reload| reload.next) else { return };
        let patience = self.serving.plan.drain_timeout;
        let before = std::mem::replace(&mut self.serving, next);
        self.retire(now, id, before.slots, patience, out);
        for slot in &mut self.serving.slots {
            if let Stage::Ready { run, published, .. } = &mut slot.stage {
                *published = true;
                let replica_key = ReplicaKey { pool_id: id.clone(), replica_id: slot.replica_id.clone() };
                out.push(Ordered::Publish { run: *run, replica_key });
            }
        }
        self.reload_error = None;
        self.proven = true;
        self.last_error = None;
        // What the old engines did is not held against the new ones.
        self.forgive();
    }

    fn withdraw_all(&mut self, now: Moment, id: &PoolId, patience: Duration, out: &mut Vec<Ordered>) {
        leave_all(now, id, &mut self.serving.slots, patience, out);
    }

    fn leave_altogether(&mut self, now: Moment, id: &PoolId, patience: Duration, out: &mut Vec<Ordered>) {
        self.give_up_beside(now, id, out);
        self.withdraw_all(now, id, patience, out);
    }

    fn unload_when_idle(&mut self, now: Moment, id: &PoolId, out: &mut Vec<Ordered>) {
        let Some(ttl) = self.serving.plan.ttl.filter(|_| self.is_idle(now)) else { return };
        if now >= self.idle_since() + ttl {
            self.unloads += 1;
            self.withdraw_all(now, id, self.serving.plan.drain_timeout, out);
        }
    }

    /// What leaves is stopped when nothing runs on it any more, or when its time is over.
    fn stop_what_has_left(&mut self, now: Moment, out: &mut Vec<Ordered>) {
        for slot in self.slots_mut() {
            if let Stage::Leaving { run, until, blame, reported } = slot.stage
                && ((reported && slot.work.running == 0) || now >= until)
            {
                slot.stage = Stage::Stopping { run, blame };
                out.push(Ordered::Stop { run });
            }
        }
    }

    fn stop_what_never_loads(&mut self, now: Moment, id: &PoolId, out: &mut Vec<Ordered>) {
        let patience = self.serving.plan.load_timeout;
        let mut late = false;
        for slot in &mut self.serving.slots {
            if let Stage::Starting { run, since } = slot.stage
                && now >= since + patience
            {
                slot.stage = Stage::Leaving { run, until: now, blame: Blame::Engine, reported: true };
                late = true;
            }
        }
        let reported = |patience: Duration| format!("not ready within {} s of its start", patience.as_secs());
        if late {
            self.last_error = Some(reported(patience));
        }
        if let Some(Reload { way: Way::After { since, .. }, .. }) = &self.reload
            && now >= *since + patience + self.serving.plan.drain_timeout
            && self.serving.prepared().is_some()
            && !self.serving.is_ready()
        {
            self.reload_error = self.waits_for.clone().or_else(|| Some(reported(patience)));
            self.go_back(now, id, out);
            return;
        }
        let Some(next) = self.reload.as_mut().and_then(|reload| reload.next.as_mut()) else { return };
        let patience = next.plan.load_timeout;
        let overdue =
            |slot: &Slot| matches!(slot.stage, Stage::Starting { since, .. } if now >= since + patience);
        if next.slots.iter().any(overdue) {
            self.reload_error = Some(reported(patience));
            self.give_up_beside(now, id, out);
        }
    }

    /// Who is to run and does not, waits.
    fn line_up(&mut self, now: Moment) {
        let wanted = self.is_wanted() && self.serving.prepared().is_some();
        let replicas = usize::try_from(self.serving.plan.replicas).unwrap_or(usize::MAX);
        if wanted {
            while self.serving.slots.len() < replicas {
                let n = u32::try_from(self.serving.slots.len()).unwrap_or(u32::MAX);
                let slot = Slot::new(self.free_replica_id(n));
                self.serving.slots.push(slot);
            }
        }
        let since = if self.serving.plan.on_demand { self.demand_since } else { now };
        for slot in &mut self.serving.slots {
            match slot.stage {
                Stage::Down if wanted => slot.stage = Stage::Waiting { since },
                Stage::Backoff { until } if wanted && until <= now => slot.stage = Stage::Waiting { since },
                Stage::Waiting { .. } | Stage::Backoff { .. } if !wanted => slot.stage = Stage::Down,
                _ => {}
            }
        }
        if !self.serving.slots.iter().any(|slot| matches!(slot.stage, Stage::Waiting { .. })) {
            self.waits_for = None;
        }
    }

    fn deadlines(&self) -> Vec<Moment> {
        let mut all = Vec::new();
        if let Some(Reload { way: Way::After { since, .. }, .. }) = &self.reload
            && self.serving.prepared().is_some()
        {
            all.push(*since + self.serving.plan.load_timeout + self.serving.plan.drain_timeout);
        }
        all.extend(self.demand.filter(|at| *at != Moment::NEVER));
        all.extend(self.waited_for.map(|reported| reported + super::pool::DEMAND_LIFE));
        all.extend(self.cool_down.until.filter(|_| !self.purging));
        let next = self.reload.iter().filter_map(|reload| reload.next.as_ref());
        for generation in std::iter::once(&self.serving).chain(next) {
            if let Preparation::Failed { again, .. } = generation.preparation {
                all.push(again);
            }
            for slot in &generation.slots {
                match slot.stage {
                    Stage::Backoff { until } => all.push(until),
                    Stage::Starting { since, .. } => all.push(since + generation.plan.load_timeout),
                    Stage::Ready { since, .. } if generation.plan.on_demand => {
                        all.push(since + super::pool::FIRST_WORK_PATIENCE);
                        all.push(slot.idle_since + super::pool::IDLE_AFTER);
                        all.push(since + generation.plan.min_resident);
                        all.extend(generation.plan.ttl.map(|ttl| slot.idle_since + ttl));
                    }
                    // Others may have to make room once it has waited for long enough.
                    Stage::Waiting { since } => all.push(since + generation.plan.min_resident),
                    _ => {}
                }
            }
        }
        for slot in self.slots() {
            if let Stage::Leaving { until, .. } = slot.stage {
                all.push(until);
            }
        }
        all
    }
}
