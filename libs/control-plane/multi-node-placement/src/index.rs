//! The pools by model, the free ones in the order in which a strategy takes them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use fixedbitset::FixedBitSet;
use pool_registry_types::{Lookup, ModelRef, PoolKey};

use crate::candidate::{Availability, Candidate};
use crate::offers::{Lack, Offers};
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
pub(crate) enum Rank {
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

/// Where a pool stands in the index while it is there: whoever has kept this finds it at once. The row
/// of one that has gone is given to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolRow(usize);

impl PoolRow {
    /// For tables beside the index; rows are dense.
    pub fn place(self) -> usize {
        self.0
    }
}

/// The key comes before the row, so ties are broken the same way every time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Score {
    rank: Rank,
    key: PoolKey,
    row: PoolRow,
}

#[derive(Debug)]
struct Entry {
    candidate: Candidate,
    row: PoolRow,
    /// The number of the choice that took it last; 0 for never.
    last_taken: u64,
    /// While it is placeable, its numbers among the pools of its models, in the order of these.
    numbers: Vec<usize>,
}

impl Entry {
    fn score(&self, strategy: Strategy) -> Score {
        let Self { candidate, row, last_taken, .. } = self;
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
        Score { rank, key: candidate.key.clone(), row: *row }
    }
}

/// Pools of which any can be drawn at once: a list, and the place of each in it.
#[derive(Debug, Default)]
pub(crate) struct Bag {
    list: Vec<PoolRow>,
    places: Lookup<PoolRow, usize>,
}

impl Bag {
    fn insert(&mut self, row: PoolRow) {
        if !self.places.contains_key(&row) {
            self.places.insert(row, self.list.len());
            self.list.push(row);
        }
    }

    fn remove(&mut self, row: PoolRow) {
        let Some(place) = self.places.remove(&row) else { return };
        self.list.swap_remove(place);
        if let Some(moved) = self.list.get(place) {
            self.places.insert(*moved, place);
        }
    }

    /// All of them, from a drawn one on.
    fn from(&self, draw: u64) -> impl Iterator<Item = &PoolRow> {
        let len = self.list.len() as u64;
        let start = if len == 0 { 0 } else { usize::try_from(draw % len).unwrap_or(0) };
        self.list[start..].iter().chain(&self.list[..start])
    }
}

/// The number of a placeable pool among those of a model, which is that of its bit.
#[derive(Debug, Default)]
struct Numbered {
    /// Absent while no pool has the number.
    pool: Option<PoolRow>,
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
    /// Placeable pools, full ones included, in their order.
    pub(crate) placeable: BTreeSet<PoolKey>,
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
    /// What these can do.
    offers: Offers,
}

impl ModelPools {
    /// The placeable pools with a free slot, in the order in which the strategy takes them.
    pub(crate) fn free(&self, draw: u64) -> impl Iterator<Item = PoolRow> {
        // One of the two is empty.
        self.free.iter().map(|score| score.row).chain(self.bag.from(draw).copied())
    }

    /// Gives a placeable pool a number.
    fn number(&mut self, key: &PoolKey, row: PoolRow) -> usize {
        let number = self.vacant.pop().unwrap_or_else(|| {
            self.numbered.push(Numbered::default());
            self.free_bits.grow(self.numbered.len());
            self.numbered.len() - 1
        });
        self.numbered[number].pool = Some(row);
        self.placeable.insert(key.clone());
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
    /// By their rows.
    pools: Vec<Option<Box<Entry>>>,
    row_of: Lookup<PoolKey, PoolRow>,
    /// Rows that no pool has.
    vacant: Vec<PoolRow>,
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

    /// Takes the facts of a pool, new or changed. Returns its row, which stays its own.
    pub fn upsert(&mut self, candidate: Candidate) -> PoolRow {
        let Some(row) = self.row(&candidate.key) else {
            let row = self.vacant.pop().unwrap_or_else(|| {
                self.pools.push(None);
                PoolRow(self.pools.len() - 1)
            });
            self.row_of.insert(candidate.key.clone(), row);
            self.keys.insert(candidate.key.clone());
            self.version += 1;
            self.insert(Entry { candidate, row, last_taken: 0, numbers: Vec::new() });
            return row;
        };
        let Some(entry) = self.entry(row) else { return row };
        if entry.candidate == candidate {
            return row;
        }
        if !entry.candidate.takes_the_same(&candidate) {
            let last_taken = entry.last_taken;
            self.vacate(row);
            self.version += 2;
            self.insert(Entry { candidate, row, last_taken, numbers: Vec::new() });
        } else if entry.candidate.availability == candidate.availability {
            self.reorder(row, |entry| entry.candidate = candidate);
        } else if let Some(old) = self.take_out(row) {
            self.insert(Entry { candidate, ..*old });
        }
        row
    }

    fn entry(&self, row: PoolRow) -> Option<&Entry> {
        self.pools.get(row.0)?.as_deref()
    }

    /// Changes a known pool that stands as before and takes the same tasks: only its order among the
    /// free ones may be another.
    fn reorder(&mut self, row: PoolRow, change: impl FnOnce(&mut Entry)) {
        let Some(entry) = self.pools.get_mut(row.0).and_then(Option::as_deref_mut) else { return };
        let (before, was_free) = (entry.score(self.strategy), entry.candidate.has_free_slot());
        change(entry);
        let (score, is_free) = (entry.score(self.strategy), entry.candidate.has_free_slot());
        if entry.candidate.availability != Availability::Placeable || !(was_free || is_free) {
            return;
        }
        for (model, number) in entry.candidate.models.iter().zip(&entry.numbers) {
            let Some(pools) = self.by_model.get_mut(model) else { continue };
            if score.rank == Rank::Random {
                // What has changed goes to the end: another draw is another pool.
                pools.bag.remove(row);
                if is_free {
                    pools.bag.insert(row);
                }
            } else if !is_free || score != before {
                pools.free.remove(&before);
                if is_free {
                    pools.free.insert(score.clone());
                }
            } else if !was_free {
                pools.free.insert(score.clone());
            }
            if was_free != is_free {
                pools.free_bits.set(*number, is_free);
            }
        }
    }

    /// A known pool is as full as this, and otherwise as it was; `taken` as by [`PoolIndex::taken`].
    pub fn set_slots(&mut self, row: PoolRow, slots_busy: u32, held: bool, taken: bool) {
        self.taken += u64::from(taken);
        let number = taken.then_some(self.taken);
        self.reorder(row, |entry| {
            entry.last_taken = number.unwrap_or(entry.last_taken);
            entry.candidate.slots_busy = slots_busy;
            entry.candidate.held = held;
        });
    }

    /// Puts a pool into its row, which is empty, and orders it by its facts.
    fn insert(&mut self, mut entry: Entry) {
        let (version, row) = (self.version, entry.row);
        let candidate = &entry.candidate;
        if candidate.availability == Availability::Placeable {
            let score = candidate.has_free_slot().then(|| entry.score(self.strategy));
            for (n, model) in candidate.models.iter().enumerate() {
                let pools = self.by_model.entry(model.clone()).or_default();
                let number = match entry.numbers.get(n) {
                    Some(number) => *number,
                    None => {
                        // A node may name a model twice.
                        let same = candidate.models[..n].iter().position(|other| other == model);
                        let number = same.map(|n| entry.numbers[n]).unwrap_or_else(|| {
                            let number = pools.number(&candidate.key, row);
                            pools.changed(number, version);
                            number
                        });
                        entry.numbers.push(number);
                        number
                    }
                };
                pools.free_bits.set(number, score.is_some());
                match &score {
                    Some(score) if score.rank == Rank::Random => pools.bag.insert(row),
                    Some(score) => drop(pools.free.insert(score.clone())),
                    None => {}
                }
            }
        }
        *self.standings.entry(candidate.availability).or_default() += 1;
        for model in &candidate.models {
            let pools = self.by_model.entry(model.clone()).or_default();
            if pools.all.insert(candidate.key.clone()) {
                pools.offers.add(candidate);
            }
            if matches!(candidate.availability, Availability::Loading | Availability::Loadable)
                && pools.unloaded.insert(candidate.key.clone())
            {
                pools.loadable += usize::from(candidate.availability == Availability::Loadable);
            }
        }
        self.pools[row.0] = Some(Box::new(entry));
    }

    /// Takes a pool out of what is ordered by its facts; its numbers stay its own.
    fn take_out(&mut self, row: PoolRow) -> Option<Box<Entry>> {
        let old = self.pools.get_mut(row.0)?.take()?;
        let score = old.score(self.strategy);
        if let Some(count) = self.standings.get_mut(&old.candidate.availability) {
            *count -= 1;
        }
        for model in &old.candidate.models {
            if let Some(pools) = self.by_model.get_mut(model) {
                pools.free.remove(&score);
                pools.bag.remove(row);
                if pools.unloaded.remove(&score.key) {
                    pools.loadable -= usize::from(old.candidate.availability == Availability::Loadable);
                }
            }
        }
        Some(old)
    }

    /// Takes a pool out of its row, with its numbers.
    fn vacate(&mut self, row: PoolRow) {
        let Some(old) = self.take_out(row) else { return };
        let Candidate { key, models, .. } = &old.candidate;
        for (n, model) in models.iter().enumerate() {
            let Some(pools) = self.by_model.get_mut(model) else { continue };
            // One that was named twice has one number.
            if let Some(number) = old.numbers.get(n)
                && pools.numbered[*number].pool.take_if(|of| *of == row).is_some()
            {
                pools.placeable.remove(key);
                pools.vacant.push(*number);
                pools.free_bits.set(*number, false);
                pools.changed(*number, self.version + 1);
            }
            if pools.all.remove(key) {
                pools.offers.remove(&old.candidate);
            }
            if pools.all.is_empty() {
                self.by_model.remove(model);
            }
        }
    }

    pub fn remove(&mut self, key: &PoolKey) {
        let Some(row) = self.row_of.remove(key) else { return };
        self.vacate(row);
        self.version += 1;
        self.keys.remove(key);
        self.vacant.push(row);
    }

    /// The pool was given a task: it is the last among its equals.
    pub fn taken(&mut self, key: &PoolKey) {
        self.taken += 1;
        let taken = self.taken;
        if let Some(row) = self.row(key) {
            self.reorder(row, |entry| entry.last_taken = taken);
        }
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
            let candidate = pools.numbered[*number].pool.and_then(|row| self.at(row));
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

    pub fn row(&self, key: &PoolKey) -> Option<PoolRow> {
        self.row_of.get(key).copied()
    }

    pub fn at(&self, row: PoolRow) -> Option<&Candidate> {
        self.entry(row).map(|entry| &entry.candidate)
    }

    pub fn get(&self, key: &PoolKey) -> Option<&Candidate> {
        self.at(self.row(key)?)
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

    /// Every so manieth of the placeable pools of the model, in no order that means anything: of many
    /// some that stand for the others. Cost: a step for each of these.
    pub fn some_placeable(&self, model: &ModelRef, step: usize) -> impl Iterator<Item = &Candidate> {
        let pools = self.by_model.get(model).into_iter();
        let numbered = pools.flat_map(move |pools| pools.numbered.iter().step_by(step));
        numbered.filter_map(|numbered| self.at(numbered.pool?))
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

    /// What of the task's own words every pool of its model lacks, however these stand. Nothing where there
    /// is no such pool. Cost: a step for each kind of engine.
    pub fn lack(&self, shape: &TaskShape<'_>) -> Option<Lack> {
        self.by_model.get(shape.model)?.offers.lack(shape)
    }

    /// How many pools the model has, however they stand.
    pub fn count_of(&self, model: &ModelRef) -> usize {
        self.by_model.get(model).map_or(0, |pools| pools.all.len())
    }

    /// Whether there is a pool of the model, however it stands: those of offline nodes too.
    pub fn knows(&self, model: &ModelRef) -> bool {
        self.all_of(model).next().is_some()
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
