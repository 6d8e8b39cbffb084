//! The pools by model, the free ones ordered by [`Score`].

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use pool_registry_types::pool::EngineKind;
use pool_registry_types::{ModelRef, PoolKey};

/// What stands between a pool and any task at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// The node is online and serving, the pool ready.
    Placeable,
    Offline,
    Suspect,
    Draining,
    NotReady,
}

/// The facts about one pool that placement uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub key: PoolKey,
    pub standing: Standing,
    pub engine: EngineKind,
    pub models: Vec<ModelRef>,
    /// Tokens; unknown fits everything, and the engine decides.
    pub ctx_max: Option<u32>,
    pub slots_total: u32,
    pub slots_busy: u32,
    /// Refused a dispatch lately: counts as full.
    pub held: bool,
    /// Unknown is not zero: it only ranks behind every known amount.
    pub vram_free_bytes: Option<u64>,
}

impl Candidate {
    pub fn has_free_slot(&self) -> bool {
        !self.held && self.slots_busy < self.slots_total
    }

    fn score(&self) -> Score {
        let share = u64::from(self.slots_busy) * 1_000_000 / u64::from(self.slots_total.max(1));
        Score { busy_share_ppm: share, most_free_vram: Reverse(self.vram_free_bytes), key: self.key.clone() }
    }
}

/// Smaller is better; the order of the fields is their priority. The key comes last, so ties
/// are broken the same way every time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Score {
    /// Busy slots of all slots, in millionths.
    pub busy_share_ppm: u64,
    pub most_free_vram: Reverse<Option<u64>>,
    pub key: PoolKey,
}

#[derive(Debug, Default)]
pub(crate) struct ModelPools {
    /// Placeable pools with a free slot, best first.
    pub(crate) free: BTreeSet<Score>,
    /// Placeable pools, full ones included.
    pub(crate) placeable: BTreeSet<PoolKey>,
}

/// All pools of the cluster, kept ordered as facts arrive.
#[derive(Debug, Default)]
pub struct PoolIndex {
    pools: BTreeMap<PoolKey, Candidate>,
    by_model: BTreeMap<ModelRef, ModelPools>,
}

impl PoolIndex {
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the facts of a pool, new or changed.
    pub fn upsert(&mut self, candidate: Candidate) {
        if self.pools.get(&candidate.key) == Some(&candidate) {
            return;
        }
        self.remove(&candidate.key.clone());
        if candidate.standing == Standing::Placeable {
            for model in &candidate.models {
                let pools = self.by_model.entry(model.clone()).or_default();
                pools.placeable.insert(candidate.key.clone());
                if candidate.has_free_slot() {
                    pools.free.insert(candidate.score());
                }
            }
        }
        self.pools.insert(candidate.key.clone(), candidate);
    }

    pub fn remove(&mut self, key: &PoolKey) {
        let Some(old) = self.pools.remove(key) else { return };
        let score = old.score();
        for model in &old.models {
            if let Some(pools) = self.by_model.get_mut(model) {
                pools.placeable.remove(key);
                pools.free.remove(&score);
                if pools.placeable.is_empty() {
                    self.by_model.remove(model);
                }
            }
        }
    }

    pub fn get(&self, key: &PoolKey) -> Option<&Candidate> {
        self.pools.get(key)
    }

    /// Whether any placeable pool of the model has a free slot.
    pub fn has_free(&self, model: &ModelRef) -> bool {
        self.by_model.get(model).is_some_and(|pools| !pools.free.is_empty())
    }

    /// Slots of all placeable pools of the model, busy ones included.
    pub fn slots_of(&self, model: &ModelRef) -> u32 {
        self.by_model.get(model).map_or(0, |pools| {
            pools
                .placeable
                .iter()
                .filter_map(|key| self.pools.get(key))
                .map(|c| c.slots_total)
                .fold(0, u32::saturating_add)
        })
    }

    pub(crate) fn of_model(&self, model: &ModelRef) -> Option<&ModelPools> {
        self.by_model.get(model)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Candidate> {
        self.pools.values()
    }
}
