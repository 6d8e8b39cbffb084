//! The pools by model, the free ones in the order in which a strategy takes them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use fixedbitset::FixedBitSet;
use pool_registry_types::{Lookup, ModelRef, PoolKey};

use crate::candidate::{Availability, Candidate};
use crate::shape::{TaskShape, fits};

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

/// Free memory is told apart in steps of so many bytes: less is the noise of two readings.
/// Source: .specs/01 CLOUD-1707.
const VRAM_STEP: u64 = 256 << 20;

/// Smaller is better; the order of a variant's fields is their priority, and what is equal goes by
/// turn. An index holds one variant only, that of its strategy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    LeastLoaded {
        /// Busy slots of all slots, in millionths.
        busy_share_ppm: u64,
        /// In steps of [`VRAM_STEP`].
        most_free_vram: Reverse<Option<u64>>,
        last_taken: u64,
    },
    MostFreeVram {
        most_free_vram: Reverse<Option<u64>>,
        busy_share_ppm: u64,
        last_taken: u64,
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

impl Entry {
    fn score(&self, strategy: Strategy) -> Score {
        let Self { candidate, last_taken } = self;
        let last_taken = *last_taken;
        let busy_share_ppm =
            u64::from(candidate.slots_busy) * 1_000_000 / u64::from(candidate.slots_total.max(1));
        let free = candidate.vram_free_bytes;
        let rank = match strategy {
            Strategy::LeastLoaded => {
                let most_free_vram = Reverse(free.map(|bytes| bytes / VRAM_STEP));
                Rank::LeastLoaded { busy_share_ppm, most_free_vram, last_taken }
            }
            Strategy::MostFreeVram => {
                Rank::MostFreeVram { most_free_vram: Reverse(free), busy_share_ppm, last_taken }
            }
            Strategy::RoundRobin => Rank::RoundRobin { last_taken },
            Strategy::Random => Rank::Random,
        };
        Score { rank, key: candidate.key.clone() }
    }
}

/// Pools of which any can be drawn at once: a list, and the place of each in it.
#[derive(Debug, Default)]
pub(crate) struct Bag {
    list: Vec<PoolKey>,
    places: Lookup<PoolKey, usize>,
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

/// The number of a placeable pool among those of a model, which is that of its bit.
#[derive(Debug, Default)]
struct Numbered {
    /// Absent while no pool has the number.
    pool: Option<PoolKey>,
    /// The version of the index at which the pool came, went or changed what it takes.
    changed: u64,
}

#[derive(Debug, Default)]
pub(crate) struct ModelPools {
    /// Placeable pools with a free slot, best first.
    free: BTreeSet<Score>,
    /// The same ones, for the random strategy only.
    bag: Bag,
    /// The same ones as bits.
    free_bits: FixedBitSet,
    /// Placeable pools, full ones included, in their order and with their numbers.
    pub(crate) placeable: BTreeSet<PoolKey>,
    number_of: Lookup<PoolKey, usize>,
    numbered: Vec<Numbered>,
    /// Numbers that no pool has.
    vacant: Vec<usize>,
    /// The numbers in the order in which they changed last.
    changes: BTreeSet<(u64, usize)>,
    /// The version of the index at which any of them changed last.
    version: u64,
    /// Pools that load, or could be loaded, and how many of them could be.
    pub(crate) unloaded: BTreeSet<PoolKey>,
    loadable: usize,
    /// Pools of the model, however they stand.
    pub(crate) all: BTreeSet<PoolKey>,
}

impl ModelPools {
    /// The placeable pools with a free slot, in the order in which the strategy takes them.
    pub(crate) fn free(&self, draw: u64) -> impl Iterator<Item = &PoolKey> {
        // One of the two is empty.
        self.free.iter().map(|score| &score.key).chain(self.bag.from(draw))
    }

    fn number(&mut self, key: &PoolKey) -> usize {
        if let Some(number) = self.number_of.get(key) {
            return *number;
        }
        let number = self.vacant.pop().unwrap_or_else(|| {
            self.numbered.push(Numbered::default());
            self.free_bits.grow(self.numbered.len());
            self.numbered.len() - 1
        });
        self.numbered[number].pool = Some(key.clone());
        self.placeable.insert(key.clone());
        self.number_of.insert(key.clone(), number);
        number
    }

    fn changed(&mut self, number: usize, version: u64) {
        let before = std::mem::replace(&mut self.numbered[number].changed, version);
        self.changes.remove(&(before, number));
        self.changes.insert((version, number));
        self.version = version;
    }
}

/// Which placeable pools of one model take tasks that ask for the same; kept up to date by
/// [`PoolIndex::review`], at the cost of what has changed.
#[derive(Debug, Default, Clone)]
pub struct Eligible {
    pools: FixedBitSet,
    /// The version of the index up to which it is right.
    seen: u64,
}

impl Eligible {
    /// No placeable pool takes them, full ones included.
    pub fn is_nowhere(&self) -> bool {
        self.pools.is_clear()
    }
}

/// All pools of the cluster, kept ordered as facts arrive.
#[derive(Debug, Default)]
pub struct PoolIndex {
    strategy: Strategy,
    pools: Lookup<PoolKey, Box<Entry>>,
    /// Their keys in order, for readers.
    keys: BTreeSet<PoolKey>,
    by_model: BTreeMap<ModelRef, ModelPools>,
    /// How many pools stand how.
    standings: BTreeMap<Availability, u32>,
    taken: u64,
    /// Rises with each change of which tasks a pool takes.
    version: u64,
}

impl PoolIndex {
    pub fn new(strategy: Strategy) -> Self {
        Self { strategy, ..Self::default() }
    }

    /// Takes the facts of a pool, new or changed.
    pub fn upsert(&mut self, candidate: Candidate) {
        let before = self.pools.get(&candidate.key).map(Box::as_ref);
        if before.is_some_and(|entry| entry.candidate == candidate) {
            return;
        }
        let last_taken = before.map_or(0, |entry| entry.last_taken);
        let stays = |entry: &Entry| {
            entry.candidate.availability == candidate.availability
                && entry.candidate.takes_the_same(&candidate)
        };
        if before.is_some_and(stays) {
            self.reorder(&candidate.key.clone(), |entry| entry.candidate = candidate);
            return;
        }
        if before.is_some_and(|entry| entry.candidate.takes_the_same(&candidate)) {
            self.take_out(&candidate.key.clone());
        } else {
            self.remove(&candidate.key.clone());
            self.version += 1;
        }
        self.insert(candidate, last_taken);
    }

    /// Changes a known pool that stands as before and takes the same tasks: only its order among the
    /// free ones may be another.
    fn reorder(&mut self, key: &PoolKey, change: impl FnOnce(&mut Entry)) {
        let Some(entry) = self.pools.get_mut(key) else { return };
        let (before, was_free) = (entry.score(self.strategy), entry.candidate.has_free_slot());
        change(entry);
        let (score, is_free) = (entry.score(self.strategy), entry.candidate.has_free_slot());
        if entry.candidate.availability != Availability::Placeable || !(was_free || is_free) {
            return;
        }
        for model in &entry.candidate.models {
            let Some(pools) = self.by_model.get_mut(model) else { continue };
            if score.rank == Rank::Random {
                // What has changed goes to the end: another draw is another pool.
                pools.bag.remove(&score.key);
                if is_free {
                    pools.bag.insert(score.key.clone());
                }
            } else if !is_free || score != before {
                pools.free.remove(&before);
                if is_free {
                    pools.free.insert(score.clone());
                }
            } else if !was_free {
                pools.free.insert(score.clone());
            }
            if was_free != is_free
                && let Some(number) = pools.number_of.get(&score.key)
            {
                pools.free_bits.set(*number, is_free);
            }
        }
    }

    /// A known pool is as full as this, and otherwise as it was; `taken` as by [`PoolIndex::taken`].
    pub fn set_slots(&mut self, key: &PoolKey, slots_busy: u32, held: bool, taken: bool) {
        self.taken += u64::from(taken);
        let number = taken.then_some(self.taken);
        self.reorder(key, |entry| {
            entry.last_taken = number.unwrap_or(entry.last_taken);
            entry.candidate.slots_busy = slots_busy;
            entry.candidate.held = held;
        });
    }

    fn insert(&mut self, candidate: Candidate, last_taken: u64) {
        let version = self.version;
        let entry = Box::new(Entry { candidate, last_taken });
        let candidate = &entry.candidate;
        if candidate.availability == Availability::Placeable {
            let score = candidate.has_free_slot().then(|| entry.score(self.strategy));
            for model in &candidate.models {
                let pools = self.by_model.entry(model.clone()).or_default();
                let is_new = !pools.number_of.contains_key(&candidate.key);
                let number = pools.number(&candidate.key);
                if is_new {
                    pools.changed(number, version);
                }
                pools.free_bits.set(number, score.is_some());
                match &score {
                    Some(score) if score.rank == Rank::Random => pools.bag.insert(score.key.clone()),
                    Some(score) => drop(pools.free.insert(score.clone())),
                    None => {}
                }
            }
        }
        *self.standings.entry(candidate.availability).or_default() += 1;
        for model in &candidate.models {
            let pools = self.by_model.entry(model.clone()).or_default();
            pools.all.insert(candidate.key.clone());
            if matches!(candidate.availability, Availability::Loading | Availability::Loadable)
                && pools.unloaded.insert(candidate.key.clone())
            {
                pools.loadable += usize::from(candidate.availability == Availability::Loadable);
            }
        }
        let key = candidate.key.clone();
        if self.pools.insert(key.clone(), entry).is_none() {
            self.keys.insert(key);
        }
    }

    /// Takes a pool out of what is ordered by its facts; its numbers stay its own.
    fn take_out(&mut self, key: &PoolKey) -> Option<Box<Entry>> {
        let old = self.pools.remove(key)?;
        let score = old.score(self.strategy);
        if let Some(count) = self.standings.get_mut(&old.candidate.availability) {
            *count -= 1;
        }
        for model in &old.candidate.models {
            if let Some(pools) = self.by_model.get_mut(model) {
                pools.free.remove(&score);
                pools.bag.remove(key);
                if pools.unloaded.remove(key) {
                    pools.loadable -= usize::from(old.candidate.availability == Availability::Loadable);
                }
            }
        }
        Some(old)
    }

    pub fn remove(&mut self, key: &PoolKey) {
        let Some(old) = self.take_out(key) else { return };
        self.keys.remove(key);
        self.version += 1;
        for model in &old.candidate.models {
            let Some(pools) = self.by_model.get_mut(model) else { continue };
            if let Some(number) = pools.number_of.remove(key) {
                pools.placeable.remove(key);
                pools.numbered[number].pool = None;
                pools.vacant.push(number);
                pools.free_bits.set(number, false);
                pools.changed(number, self.version);
            }
            pools.all.remove(key);
            if pools.all.is_empty() {
                self.by_model.remove(model);
            }
        }
    }

    /// The pool was given a task: it is the last among its equals.
    pub fn taken(&mut self, key: &PoolKey) {
        self.taken += 1;
        let taken = self.taken;
        self.reorder(key, |entry| entry.last_taken = taken);
    }

    /// Brings up to date which pools take tasks of this shape. Returns whether anything had changed.
    pub fn review(&self, shape: &TaskShape<'_>, eligible: &mut Eligible) -> bool {
        let Some(pools) = self.by_model.get(shape.model) else {
            let had_any = !eligible.is_nowhere();
            eligible.pools.clear();
            return had_any;
        };
        if pools.version <= eligible.seen {
            return false;
        }
        eligible.pools.grow(pools.numbered.len());
        for (_, number) in pools.changes.range((eligible.seen + 1, 0)..) {
            let candidate = pools.numbered[*number].pool.as_ref().and_then(|key| self.get(key));
            eligible.pools.set(*number, candidate.is_some_and(|candidate| fits(candidate, shape)));
        }
        eligible.seen = pools.version;
        true
    }

    /// The version of what the pools of the model take; another one after each change of that.
    pub fn version(&self, model: &ModelRef) -> u64 {
        self.by_model.get(model).map_or(0, |pools| pools.version)
    }

    /// Whether one of these pools has a free slot.
    pub fn has_free_of(&self, model: &ModelRef, eligible: &Eligible) -> bool {
        self.by_model.get(model).is_some_and(|pools| !pools.free_bits.is_disjoint(&eligible.pools))
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

    /// How many placeable pools the model has, full ones included.
    pub fn placeable_count(&self, model: &ModelRef) -> usize {
        self.by_model.get(model).map_or(0, |pools| pools.placeable.len())
    }

    /// Every so manieth of the placeable pools of the model.
    pub fn placeable_by(&self, model: &ModelRef, step: usize) -> impl Iterator<Item = &Candidate> {
        let keys = self.by_model.get(model).into_iter().flat_map(|pools| &pools.placeable);
        keys.step_by(step).filter_map(|key| self.get(key))
    }

    /// Whether any pool of the model could be loaded.
    pub fn has_loadable(&self, model: &ModelRef) -> bool {
        self.by_model.get(model).is_some_and(|pools| pools.loadable > 0)
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

    /// Whether the node of any pool of the model, however that stands, passes bodies on as they come.
    /// Nothing where there is no such pool.
    pub fn passes_on(&self, model: &ModelRef) -> Option<bool> {
        let mut pools = self.all_of(model).peekable();
        pools.peek()?;
        Some(pools.any(|pool| pool.passes_on))
    }

    /// The pools of the model, however they stand.
    pub(crate) fn all_of(&self, model: &ModelRef) -> impl Iterator<Item = &Candidate> {
        let keys = self.by_model.get(model).into_iter().flat_map(|pools| &pools.all);
        keys.filter_map(|key| self.get(key))
    }

    /// How many pools stand how, whatever their models.
    pub(crate) fn standings(&self) -> &BTreeMap<Availability, u32> {
        &self.standings
    }

    /// In the order of their keys; for readers.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Candidate> {
        self.keys.iter().filter_map(|key| self.get(key))
    }
}
