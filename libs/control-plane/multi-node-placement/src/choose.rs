//! The choice itself, and its explanation.
//!
//! What a task must have ([`fits`]) decides which pools count at all; what it prefers
//! ([`Preference`]) orders those that count; the strategy orders the rest.

use std::collections::BTreeMap;

use pool_registry_types::PoolKey;
use pool_registry_types::placement::{PlacementMode, Refusal, WaitingFor};

use crate::candidate::{Availability, Candidate};
use crate::index::{ModelPools, PoolIndex, PoolRow};
use crate::shape::{TaskShape, fits, misfit};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    pub pool: PoolKey,
    pub row: PoolRow,
}

/// Why no pool was chosen now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoPlacement {
    /// No placeable pool fits the task.
    NoPool,
    /// At least one fits, and all that may be taken are full.
    Full,
    /// Only pools that failed this task are left, and its backoff is not over.
    BackingOff,
}

impl std::fmt::Display for NoPlacement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NoPool => "no pool that takes tasks fits",
            Self::Full => "every pool that fits is full",
            Self::BackingOff => "every pool that fits has failed this task, and its pause is not over",
        })
    }
}

/// How far a pool is from what the task prefers; smaller is better, and the order of the fields
/// is their priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Preference {
    avoided: bool,
    not_preferred: bool,
    not_warm: bool,
    /// Running tasks of the session on the same label's value.
    neighbours: u32,
}

impl Preference {
    const GRANTED: Self = Self { avoided: false, not_preferred: false, not_warm: false, neighbours: 0 };

    fn of(candidate: &Candidate, shape: &TaskShape<'_>) -> Self {
        let (key, constraints) = (&candidate.key, shape.constraints);
        let has_preference = constraints.is_some_and(|w| {
            !w.prefer_pools.is_empty() || (w.mode == PlacementMode::Prefer && w.node_id.is_some())
        });
        let group = || constraints.and_then(|w| candidate.labels.get(w.spread_by.as_ref()?)).cloned();
        Self {
            avoided: constraints.is_some_and(|w| w.avoids(key)),
            not_preferred: has_preference && constraints.is_some_and(|w| !w.prefers(key)),
            not_warm: shape.warm.is_some_and(|warm| warm != key),
            neighbours: shape.spread.map_or(0, |spread| spread.get(&group()).copied().unwrap_or(0)),
        }
    }
}

/// Takes the best pool for the task. Cost: without a preference, one step for each free pool of the
/// model that is better than the chosen one and does not fit; with one, a step for each free pool
/// until all that is preferred is found.
pub fn choose(index: &PoolIndex, shape: &TaskShape<'_>) -> Result<Choice, NoPlacement> {
    let Some(pools) = index.of_model(shape.model) else { return Err(NoPlacement::NoPool) };
    let fits = |candidate: &Candidate| fits(candidate, shape);
    let untried = |candidate: &Candidate| !shape.tried.contains(&candidate.key) && fits(candidate);
    if let Some(choice) = best(index, pools, shape, &untried) {
        return Ok(choice);
    }
    let mut placeable = pools.placeable.iter().filter_map(|key| index.get(key));
    if placeable.clone().any(untried) {
        return Err(NoPlacement::Full);
    }
    if !placeable.any(fits) {
        return Err(NoPlacement::NoPool);
    }
    if !shape.may_repeat {
        return Err(NoPlacement::BackingOff);
    }
    best(index, pools, shape, &fits).ok_or(NoPlacement::Full)
}

fn best(
    index: &PoolIndex,
    pools: &ModelPools,
    shape: &TaskShape<'_>,
    eligible: &dyn Fn(&Candidate) -> bool,
) -> Option<Choice> {
    let mut best: Option<(Preference, PoolRow, &Candidate)> = None;
    for row in pools.free(shape.draw) {
        let candidate = index.at(row)?;
        if !eligible(candidate) || shape.apart_from.contains(&candidate.key) {
            continue;
        }
        let preference = Preference::of(candidate, shape);
        if best.is_none_or(|(least, ..)| preference < least) {
            best = Some((preference, row, candidate));
        }
        if preference == Preference::GRANTED {
            break;
        }
    }
    best.map(|(_, row, candidate)| Choice { pool: candidate.key.clone(), row })
}

/// What could be loaded for a task that no pool takes now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ToLoad<'i> {
    /// The best pool that could be loaded.
    pub best: Option<&'i PoolKey>,
    /// One that fits the task loads already, as its node says.
    pub under_way: bool,
}

/// Chooses among the pools that could be loaded: those `unanswered` last, which were asked again and
/// again; where nobody must make room before others; then where it is fastest.
pub fn choose_to_load<'i>(
    index: &'i PoolIndex,
    shape: &TaskShape<'_>,
    unanswered: &dyn Fn(&PoolKey) -> bool,
) -> ToLoad<'i> {
    let pools = index.of_model(shape.model).into_iter().flat_map(|pools| &pools.unloaded);
    let fitting =
        || pools.clone().filter_map(|key| index.get(key)).filter(|candidate| fits(candidate, shape));
    let order = |candidate: &&Candidate| {
        let key = &candidate.key;
        let slow = candidate.load_estimate_ms.unwrap_or(u64::MAX);
        let preference = Preference::of(candidate, shape);
        (shape.tried.contains(key), unanswered(key), preference, !candidate.fits_now, slow, key.clone())
    };
    let loadable = fitting().filter(|candidate| candidate.availability == Availability::Loadable);
    ToLoad {
        best: loadable.min_by_key(order).map(|candidate| &candidate.key),
        under_way: fitting().any(|candidate| candidate.availability == Availability::Loading),
    }
}

/// What one pool says to a task.
#[derive(Debug, Clone, Copy)]
pub struct Verdict<'i> {
    pub candidate: &'i Candidate,
    /// Nothing for a pool that is eligible.
    pub refusal: Option<Refusal>,
}

/// What each pool of the cluster says to the task.
pub fn explain<'i>(index: &'i PoolIndex, shape: &TaskShape<'_>) -> impl Iterator<Item = Verdict<'i>> {
    index.all().map(move |candidate| Verdict { candidate, refusal: refusal(candidate, shape) })
}

/// Whether any pool might take the task soon: one that has the model and is not known to
/// lack what the task must have.
pub fn might_take(index: &PoolIndex, shape: &TaskShape<'_>) -> bool {
    index.all_of(shape.model).any(|candidate| might(candidate, shape))
}

fn might(candidate: &Candidate, shape: &TaskShape<'_>) -> bool {
    let soon = match candidate.availability {
        Availability::Placeable | Availability::Loadable | Availability::Loading => true,
        Availability::Suspect | Availability::Tripped => true,
        Availability::Offline | Availability::Draining | Availability::NoMemory | Availability::NotReady => {
            false
        }
    };
    soon && fits(candidate, shape)
}

/// The pools that take nothing for the moment, because they or their nodes are suspect or tripped,
/// and would fit the task.
pub fn temporarily_unavailable<'i>(
    index: &'i PoolIndex,
    shape: &TaskShape<'_>,
) -> impl Iterator<Item = &'i PoolKey> {
    let may = |candidate: &&Candidate| {
        let temporarily_unavailable =
            matches!(candidate.availability, Availability::Suspect | Availability::Tripped);
        temporarily_unavailable && fits(candidate, shape)
    };
    index.all_of(shape.model).filter(may).map(|candidate| &candidate.key)
}

/// What one pool says to the task; nothing where there is no such pool.
pub fn explain_one<'i>(index: &'i PoolIndex, key: &PoolKey, shape: &TaskShape<'_>) -> Option<Verdict<'i>> {
    index.get(key).map(|candidate| Verdict { candidate, refusal: refusal(candidate, shape) })
}

/// How many pools refuse the task for which reason, for an error's message. Cost: a step for each
/// pool of the model; what the others say follows from how many stand how.
pub fn count_refusals(index: &PoolIndex, shape: &TaskShape<'_>) -> String {
    let mut counts: BTreeMap<Refusal, u32> = BTreeMap::new();
    let mut others = index.standings().clone();
    for candidate in index.all_of(shape.model) {
        others.entry(candidate.availability).and_modify(|count| *count -= 1);
        if let Some(refusal) = refusal(candidate, shape) {
            *counts.entry(refusal).or_default() += 1;
        }
    }
    for (availability, count) in others.into_iter().filter(|(_, count)| *count > 0) {
        *counts.entry(refusal_of(availability).unwrap_or(Refusal::ModelMissing)).or_default() += count;
    }
    if counts.is_empty() {
        return "no pools known".into();
    }
    let parts: Vec<String> = counts.iter().map(|(refusal, n)| format!("{n} {refusal}")).collect();
    format!("pools: {}", parts.join(", "))
}

/// What the pools say to a task that waits.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Refused {
    pub waiting_for: WaitingFor,
    /// Some pool might take it soon, as [`might_take`] has it.
    pub might_be_taken: bool,
}

/// Counts what the pools of the model say to the task; where there are none, what all of the cluster
/// do. Cost: a step for each pool of the model.
pub fn refused(index: &PoolIndex, shape: &TaskShape<'_>) -> Refused {
    let mut counts: BTreeMap<Refusal, u32> = BTreeMap::new();
    let (mut any, mut might_be_taken) = (false, false);
    for candidate in index.all_of(shape.model) {
        any = true;
        might_be_taken |= might(candidate, shape);
        if let Some(refusal) = refusal(candidate, shape) {
            *counts.entry(refusal).or_default() += 1;
        }
    }
    if !any {
        for (availability, count) in index.standings().iter().filter(|(_, count)| **count > 0) {
            *counts.entry(refusal_of(*availability).unwrap_or(Refusal::ModelMissing)).or_default() += count;
        }
    }
    Refused { waiting_for: WaitingFor::of(counts), might_be_taken }
}

/// What a pool that stands so says to every task.
fn refusal_of(availability: Availability) -> Option<Refusal> {
    match availability {
        Availability::Placeable | Availability::Loadable => None,
        Availability::Offline => Some(Refusal::Offline),
        Availability::Suspect => Some(Refusal::Suspect),
        Availability::Draining => Some(Refusal::Draining),
        Availability::NoMemory => Some(Refusal::VramShort),
        Availability::NotReady | Availability::Loading => Some(Refusal::NotReady),
        Availability::Tripped => Some(Refusal::Tripped),
    }
}

fn refusal(candidate: &Candidate, shape: &TaskShape<'_>) -> Option<Refusal> {
    if let Some(refusal) = refusal_of(candidate.availability) {
        return Some(refusal);
    }
    if !candidate.models.contains(shape.model) {
        return Some(Refusal::ModelMissing);
    }
    if candidate.availability == Availability::Loadable {
        return misfit(candidate, shape).or(Some(Refusal::NotLoaded));
    }
    if let Some(misfit) = misfit(candidate, shape) {
        return Some(misfit);
    }
    if shape.tried.contains(&candidate.key) {
        return Some(Refusal::Tried);
    }
    let full = !candidate.has_free_slot() || shape.apart_from.contains(&candidate.key);
    full.then_some(Refusal::SlotsFull)
}
