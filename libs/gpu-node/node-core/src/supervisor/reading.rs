//! What the node reports of the pools that it runs.

use std::collections::BTreeMap;

use pool_registry_types::PoolId;
use pool_registry_types::pool::{PoolReloading, PoolState, Supervised};

use crate::node::Declared;
use crate::supervisor::core::Supervisor;
use crate::supervisor::plan::Claim;
use crate::supervisor::pool::{Pool, Preparation, Stage, Way, add};

impl Supervisor {
    /// Every pool as it stands; `under_way` says what its preparation does at the moment.
    pub fn declared(&self, under_way: &BTreeMap<PoolId, String>) -> BTreeMap<PoolId, Declared> {
        let declare = |(id, pool): (&PoolId, &Pool)| (id.clone(), self.declare(id, pool, under_way.get(id)));
        self.pools.iter().filter(|(_, pool)| !pool.removed).map(declare).collect()
    }

    fn declare(&self, id: &PoolId, pool: &Pool, under_way: Option<&String>) -> Declared {
        let serving = &pool.serving;
        let prepared = serving.prepared();
        let claim = serving.whole_claim();
        let unprepared = match &serving.preparation {
            Preparation::Failed { why, .. } => Some(why.clone()),
            _ => None,
        };
        let any = |test: fn(&Stage) -> bool| serving.slots.iter().any(|slot| test(&slot.stage));
        // Who waits for memory, or for its next try, is still to be asked for.
        let idle = !any(|stage| matches!(stage, Stage::Starting { .. } | Stage::Ready { .. }));
        let fits = self.could_fit(id, &claim);
        let state = if pool.failed.is_some() || unprepared.is_some() {
            PoolState::Failed
        } else if prepared.is_none() || !idle || !serving.plan.on_demand {
            PoolState::Loading
        } else {
            PoolState::Loadable
        };
        // It is found out before a task waits for it.
        let of_one = prepared.filter(|_| state == PoolState::Loadable).map(|prepared| &prepared.claim);
        let short = of_one.and_then(|claim| self.ledger.fits(claim, &Claim::new()).err());
        let never = short.filter(|short| short.for_ever);
        let last_error = pool
            .failed
            .clone()
            .or(unprepared)
            .or_else(|| pool.waits_for.as_ref().map(|waits| format!("waits for memory: {waits}")))
            .or_else(|| never.map(|short| format!("cannot be loaded: {short}")))
            .or_else(|| pool.last_error.clone());
        let free = claim.keys().map(|device| self.ledger.available(*device));
        let free: Option<u64> = free.collect::<Option<Vec<u64>>>().map(|all| all.iter().sum());
        Declared {
            engine: serving.plan.engine,
            models: serving.plan.models.clone(),
            device_mask: serving.plan.device_mask.clone(),
            ctx_max: serving.plan.ctx_max.or(prepared.and_then(|prepared| prepared.ctx_max)),
            state,
            last_error,
            vram_free_bytes: free.filter(|_| !claim.is_empty()),
            supervised: Supervised {
                load_estimate_ms: pool.load_ms,
                memory_required_bytes: prepared.map(|_| claim.values().sum()),
                fits,
                restarts: pool.restarts,
                unloads: pool.unloads,
                log_tail: pool.tail.clone(),
                reload: reloading(pool),
                preparation: under_way.cloned(),
            },
        }
    }

    /// Whether the claim of a pool fits now, or would if its own engines and every pool that may be
    /// unloaded made room.
    pub(super) fn could_fit(&self, id: &PoolId, claim: &Claim) -> bool {
        self.fits_without(claim, |other, pool| other == id || pool.serving.plan.on_demand)
    }

    /// Whether the claim fits once everything is gone that leaves, or that these pools have.
    pub(super) fn fits_without(&self, claim: &Claim, goes: impl Fn(&PoolId, &Pool) -> bool) -> bool {
        let mut freed = self.coming_free();
        let lives = |stage| matches!(stage, Stage::Ready { .. } | Stage::Starting { .. });
        for (_, pool) in self.pools.iter().filter(|(id, pool)| goes(id, pool)) {
            for slot in pool.serving.slots.iter().filter(|slot| lives(slot.stage)) {
                add(&mut freed, &slot.claim);
            }
        }
        self.ledger.fits(claim, &freed).is_ok()
    }

    /// What comes free when everything that leaves has left.
    pub(super) fn coming_free(&self) -> Claim {
        let mut sum = Claim::new();
        for pool in self.pools.values() {
            pool.coming_free(&mut sum);
        }
        sum
    }

    /// For the tests: how each slot of a pool stands, in a word.
    #[cfg(test)]
    pub(super) fn stages(&self, id: &PoolId) -> Vec<&'static str> {
        let word = |stage: Stage| match stage {
            Stage::Down => "down",
            Stage::Waiting { .. } => "waiting",
            Stage::Backoff { .. } => "backoff",
            Stage::Starting { .. } => "starting",
            Stage::Ready { .. } => "ready",
            Stage::Leaving { .. } => "leaving",
            Stage::Stopping { .. } => "stopping",
        };
        self.pools.get(id).into_iter().flat_map(|pool| pool.slots()).map(|slot| word(slot.stage)).collect()
    }
}

fn reloading(pool: &Pool) -> Option<PoolReloading> {
    let Some(reload) = &pool.reload else {
        let error = pool.reload_error.clone()?;
        return Some(PoolReloading { error: Some(error), ..PoolReloading::default() });
    };
    let next = reload.next.as_ref().unwrap_or(&pool.serving);
    Some(PoolReloading {
        to: next.plan.models.clone(),
        beside: matches!(reload.way, Way::Beside),
        error: None,
    })
}
