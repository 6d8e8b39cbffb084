//! The pools by model, the free ones in the order in which a strategy takes them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use pool_registry_types::placement::Labels;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::{ModelRef, PoolKey};

/// In which order pools that fit are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Strategy {
    /// The smallest share of busy slots, then the most free GPU memory.
    #[default]
    LeastLoaded,
    /// The most free GPU memory, then the smallest share of busy slots.
    MostFreeVram,
    /// The one that was taken longest ago.
    RoundRobin,
    /// Any, by the draw that comes with the task.
    Random,
}

impl Strategy {
    pub const ALL: [(&'static str, Self); 4] = [
        ("least-loaded", Self::LeastLoaded),
        ("most-free-vram", Self::MostFreeVram),
        ("round-robin", Self::RoundRobin),
        ("random", Self::Random),
    ];

    pub fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(_, strategy)| *strategy == self).map_or("", |(name, _)| name)
    }
}

/// What stands between a pool and any task at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// The node is online and serving, the pool ready.
    Placeable,
    Offline,
    Suspect,
    Draining,
    NotReady,
    /// Its engine is about to be ready.
    Loading,
    /// No engine of it runs, and one can be started.
    Loadable,
    /// No engine of it runs, and its node has no memory for one.
    NoMemory,
    /// Its engine failed too often lately, or one task is out to show whether it is well.
    Tripped,
}

/// The facts about one pool that placement uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub key: PoolKey,
    pub standing: Standing,
    /// Absent: of a kind that is not known, which no task can use.
    pub engine: Option<EngineKind>,
    pub models: Vec<ModelRef>,
    /// Tokens; unknown fits everything, and the engine decides.
    pub ctx_max: Option<u32>,
    pub device_mask: Option<String>,
    /// Of the node.
    pub labels: Arc<Labels>,
    pub slots_total: u32,
    pub slots_busy: u32,
    /// Refused a dispatch lately: counts as full.
    pub held: bool,
    /// Unknown is not zero: it only ranks behind every known amount.
    pub vram_free_bytes: Option<u64>,
    /// Milliseconds that starting an engine of it took last; unknown before.
    pub load_estimate_ms: Option<u64>,
    /// Bytes that an engine of it takes and that are free already.
    pub fits_now: bool,
}

impl Candidate {
    pub fn has_free_slot(&self) -> bool {
        !self.held && self.slots_busy < self.slots_total
    }
}

/// Smaller is better; the order of a variant's fields is their priority. An index holds one
/// variant only, that of its strategy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    LeastLoaded {
        /// Busy slots of all slots, in millionths.
        busy_share_ppm: u64,
        most_free_vram: Reverse<Option<u64>>,
    },
    MostFreeVram {
        most_free_vram: Reverse<Option<u64>>,
        busy_share_ppm: u64,
    },
    RoundRobin {
        last_taken: u64,
    },
    /// The draw decides, not the order.
    Random,
}

/// The key comes last, so ties are broken the same way every time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Score {
    pub rank: Rank,
    pub key: PoolKey,
}

#[derive(Debug)]
struct Entry {
    candidate: Candidate,
    /// The number of the choice that took it last; 0 for never.
    last_taken: u64,
}

/// Pools of which any can be drawn at once: a list, and the place of each in it.
#[derive(Debug, Default)]
pub(crate) struct Bag {
    list: Vec<PoolKey>,
    places: BTreeMap<PoolKey, usize>,
}

impl Bag {
    fn insert(&mut self, key: PoolKey) {
        if !self.places.contains_key(&key) {
            self.places.insert(key.clone(), self.list.len());
            self.list.push(key);
        }
    }

    fn remove(&mut self, key: &PoolKey) {
        let Some(place) = self.places.remove(key) else { return };
        self.list.swap_remove(place);
        if let Some(moved) = self.list.get(place) {
            self.places.insert(moved.clone(), place);
        }
    }

    /// All of them, from a drawn one on.
    fn from(&self, draw: u64) -> impl Iterator<Item = &PoolKey> {
        let len = self.list.len() as u64;
        let start = if len == 0 { 0 } else { usize::try_from(draw % len).unwrap_or(0) };
        self.list[start..].iter().chain(&self.list[..start])
    }
}

#[derive(Debug, Default)]
pub(crate) struct ModelPools {
    /// Placeable pools with a free slot, best first.
    free: BTreeSet<Score>,
    /// The same ones, for the random strategy only.
    bag: Bag,
    /// Placeable pools, full ones included.
    pub(crate) placeable: BTreeSet<PoolKey>,
    /// Pools that load, or could be loaded.
    pub(crate) unloaded: BTreeSet<PoolKey>,
}

impl ModelPools {
    /// The placeable pools with a free slot, in the order in which the strategy takes them.
    pub(crate) fn free(&self, draw: u64) -> impl Iterator<Item = &PoolKey> {
        // One of the two is empty.
        self.free.iter().map(|score| &score.key).chain(self.bag.from(draw))
    }
}

/// All pools of the cluster, kept ordered as facts arrive.
#[derive(Debug, Default)]
pub struct PoolIndex {
    strategy: Strategy,
    pools: BTreeMap<PoolKey, Entry>,
    by_model: BTreeMap<ModelRef, ModelPools>,
    taken: u64,
}

impl PoolIndex {
    pub fn new(strategy: Strategy) -> Self {
        Self { strategy, ..Self::default() }
    }

    fn score(&self, candidate: &Candidate, last_taken: u64) -> Score {
        let busy_share_ppm =
            u64::from(candidate.slots_busy) * 1_000_000 / u64::from(candidate.slots_total.max(1));
        let most_free_vram = Reverse(candidate.vram_free_bytes);
        let rank = match self.strategy {
            Strategy::LeastLoaded => Rank::LeastLoaded { busy_share_ppm, most_free_vram },
            Strategy::MostFreeVram => Rank::MostFreeVram { most_free_vram, busy_share_ppm },
            Strategy::RoundRobin => Rank::RoundRobin { last_taken },
            Strategy::Random => Rank::Random,
        };
        Score { rank, key: candidate.key.clone() }
    }

    /// Takes the facts of a pool, new or changed.
    pub fn upsert(&mut self, candidate: Candidate) {
        let before = self.pools.get(&candidate.key);
        if before.is_some_and(|entry| entry.candidate == candidate) {
            return;
        }
        let last_taken = before.map_or(0, |entry| entry.last_taken);
        self.remove(&candidate.key.clone());
        self.insert(candidate, last_taken);
    }

    fn insert(&mut self, candidate: Candidate, last_taken: u64) {
        if candidate.standing == Standing::Placeable {
            let score = candidate.has_free_slot().then(|| self.score(&candidate, last_taken));
            for model in &candidate.models {
                let pools = self.by_model.entry(model.clone()).or_default();
                pools.placeable.insert(candidate.key.clone());
                match &score {
                    Some(score) if score.rank == Rank::Random => pools.bag.insert(score.key.clone()),
                    Some(score) => drop(pools.free.insert(score.clone())),
                    None => {}
                }
            }
        }
        if matches!(candidate.standing, Standing::Loading | Standing::Loadable) {
            for model in &candidate.models {
                self.by_model.entry(model.clone()).or_default().unloaded.insert(candidate.key.clone());
            }
        }
        self.pools.insert(candidate.key.clone(), Entry { candidate, last_taken });
    }

    pub fn remove(&mut self, key: &PoolKey) {
        let Some(old) = self.pools.remove(key) else { return };
        let score = self.score(&old.candidate, old.last_taken);
        for model in &old.candidate.models {
            if let Some(pools) = self.by_model.get_mut(model) {
                pools.placeable.remove(key);
                pools.free.remove(&score);
                pools.bag.remove(key);
                pools.unloaded.remove(key);
                if pools.placeable.is_empty() && pools.unloaded.is_empty() {
                    self.by_model.remove(model);
                }
            }
        }
    }

    /// The pool was given a task: under round robin it goes to the end.
    pub fn taken(&mut self, key: &PoolKey) {
        self.taken += 1;
        if self.strategy == Strategy::RoundRobin
            && let Some(candidate) = self.get(key).cloned()
        {
            self.remove(key);
            self.insert(candidate, self.taken);
        }
    }

    pub fn get(&self, key: &PoolKey) -> Option<&Candidate> {
        self.pools.get(key).map(|entry| &entry.candidate)
    }

    /// Whether any placeable pool of the model has a free slot.
    pub fn has_free(&self, model: &ModelRef) -> bool {
        self.by_model.get(model).is_some_and(|pools| pools.free(0).next().is_some())
    }

    /// The placeable pools of the model, full ones included.
    pub fn placeable(&self, model: &ModelRef) -> impl Iterator<Item = &Candidate> {
        let keys = self.by_model.get(model).into_iter().flat_map(|pools| &pools.placeable);
        keys.filter_map(|key| self.get(key))
    }

    /// Whether any pool of the model could be loaded.
    pub fn has_loadable(&self, model: &ModelRef) -> bool {
        let unloaded = self.by_model.get(model).into_iter().flat_map(|pools| &pools.unloaded);
        unloaded.filter_map(|key| self.get(key)).any(|pool| pool.standing == Standing::Loadable)
    }

    /// Milliseconds that the fastest pool of the model took to load; nothing where no pool is
    /// loadable or none says.
    pub fn load_estimate_ms(&self, model: &ModelRef) -> Option<u64> {
        let unloaded = self.by_model.get(model).into_iter().flat_map(|pools| &pools.unloaded);
        unloaded.filter_map(|key| self.get(key)?.load_estimate_ms).min()
    }

    pub(crate) fn of_model(&self, model: &ModelRef) -> Option<&ModelPools> {
        self.by_model.get(model)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Candidate> {
        self.pools.values().map(|entry| &entry.candidate)
    }
}
