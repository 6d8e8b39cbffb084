//! The choice itself, and its explanation.

use std::collections::BTreeMap;
use std::fmt;

use pool_registry_types::pool::EngineKind;
use pool_registry_types::{ModelRef, PoolKey};

use crate::index::{Candidate, PoolIndex, Standing};

/// What a task asks of a pool.
#[derive(Debug, Clone, Copy)]
pub struct TaskShape<'a> {
    pub model: &'a ModelRef,
    pub engine: Option<EngineKind>,
    /// Tokens that the pool's context must hold.
    pub ctx: Option<u32>,
    /// Pools that failed this task before.
    pub tried: &'a [PoolKey],
    /// The backoff since the last failure is over.
    pub may_repeat: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    pub pool: PoolKey,
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

/// Why one pool is not eligible for a task. The order is the order of the checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    Offline,
    Suspect,
    Draining,
    NotReady,
    ModelMissing,
    EngineDiffers,
    ContextShort,
    Tried,
    SlotsFull,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Offline => "on an offline node",
            Self::Suspect => "on a suspect node",
            Self::Draining => "draining",
            Self::NotReady => "not ready",
            Self::ModelMissing => "without the model",
            Self::EngineDiffers => "with another engine",
            Self::ContextShort => "with too short a context",
            Self::Tried => "that failed this task before",
            Self::SlotsFull => "full",
        })
    }
}

/// Takes the best pool for the task. Cost: one step for each free pool of the model that is
/// better than the chosen one and does not fit.
pub fn choose(index: &PoolIndex, shape: &TaskShape<'_>) -> Result<Choice, NoPlacement> {
    let Some(pools) = index.of_model(shape.model) else { return Err(NoPlacement::NoPool) };
    let fits = |key: &PoolKey| index.get(key).is_some_and(|candidate| fits(candidate, shape));
    let untried = |key: &PoolKey| !shape.tried.contains(key);
    if let Some(score) = pools.free.iter().find(|score| untried(&score.key) && fits(&score.key)) {
        return Ok(Choice { pool: score.key.clone() });
    }
    if pools.placeable.iter().any(|key| untried(key) && fits(key)) {
        return Err(NoPlacement::Full);
    }
    if !pools.placeable.iter().any(&fits) {
        return Err(NoPlacement::NoPool);
    }
    if !shape.may_repeat {
        return Err(NoPlacement::BackingOff);
    }
    match pools.free.iter().find(|score| fits(&score.key)) {
        Some(score) => Ok(Choice { pool: score.key.clone() }),
        None => Err(NoPlacement::Full),
    }
}

/// What each pool of the cluster says to the task: nothing (it is eligible), or one refusal.
pub fn explain<'i>(
    index: &'i PoolIndex,
    shape: &TaskShape<'_>,
) -> impl Iterator<Item = (&'i PoolKey, Option<Refusal>)> {
    index.all().map(move |candidate| (&candidate.key, refusal(candidate, shape)))
}

/// How many pools refuse the task for which reason, for an error's message.
pub fn count_refusals(index: &PoolIndex, shape: &TaskShape<'_>) -> String {
    let mut counts: BTreeMap<Refusal, u32> = BTreeMap::new();
    for refusal in explain(index, shape).filter_map(|(_, refusal)| refusal) {
        *counts.entry(refusal).or_default() += 1;
    }
    if counts.is_empty() {
        return "no pools known".into();
    }
    let parts: Vec<String> = counts.iter().map(|(refusal, n)| format!("{n} {refusal}")).collect();
    format!("pools: {}", parts.join(", "))
}

fn refusal(candidate: &Candidate, shape: &TaskShape<'_>) -> Option<Refusal> {
    match candidate.standing {
        Standing::Placeable => {}
        Standing::Offline => return Some(Refusal::Offline),
        Standing::Suspect => return Some(Refusal::Suspect),
        Standing::Draining => return Some(Refusal::Draining),
        Standing::NotReady => return Some(Refusal::NotReady),
    }
    if !candidate.models.contains(shape.model) {
        return Some(Refusal::ModelMissing);
    }
    if shape.engine.is_some_and(|engine| engine != candidate.engine) {
        return Some(Refusal::EngineDiffers);
    }
    if shape.ctx.zip(candidate.ctx_max).is_some_and(|(asked, has)| asked > has) {
        return Some(Refusal::ContextShort);
    }
    if shape.tried.contains(&candidate.key) {
        return Some(Refusal::Tried);
    }
    (!candidate.has_free_slot()).then_some(Refusal::SlotsFull)
}

fn fits(candidate: &Candidate, shape: &TaskShape<'_>) -> bool {
    shape.engine.is_none_or(|engine| engine == candidate.engine)
        && shape.ctx.zip(candidate.ctx_max).is_none_or(|(asked, has)| asked <= has)
}
