//! What a task asks of a pool, and whether the pool has it: [`fits`] knows neither the other pools
//! nor how full this one is.

use std::collections::BTreeMap;

use pool_registry_types::engines::EngineSet;
use pool_registry_types::placement::{PlacementConstraints, Refusal};
use pool_registry_types::{LabelName, ModelRef, PoolKey};

use crate::candidate::Candidate;

/// Running tasks of a session on each value of the label that it spreads by; nodes without the
/// label are one group.
pub type Spread = BTreeMap<Option<LabelName>, u32>;

/// What a task asks of a pool.
#[derive(Debug, Clone, Copy)]
pub struct TaskShape<'a> {
    pub model: &'a ModelRef,
    /// The engines that can do what it asks.
    pub engines: EngineSet,
    /// Its body is passed on as it came, which not every node does.
    pub passes_on: bool,
    /// Tokens that the pool's context must hold.
    pub ctx: Option<u32>,
    pub constraints: Option<&'a PlacementConstraints>,
    /// The pool that holds the session's context.
    pub warm: Option<&'a PoolKey>,
    pub spread: Option<&'a Spread>,
    /// Pools that failed this task before.
    pub tried: &'a [PoolKey],
    /// Pools whose engines have shown that they cannot do what it asks.
    pub lacking: &'a [PoolKey],
    /// Pools that it must not share with what runs there now: they count as full.
    pub apart_from: &'a [PoolKey],
    /// The backoff since the last failure is over.
    pub may_repeat: bool,
    /// Decides under the random strategy.
    pub draw: u64,
}

impl<'a> TaskShape<'a> {
    /// A task that only names its model.
    pub fn plain(model: &'a ModelRef) -> Self {
        Self {
            model,
            engines: EngineSet::ALL,
            passes_on: false,
            ctx: None,
            constraints: None,
            warm: None,
            spread: None,
            tried: &[],
            lacking: &[],
            apart_from: &[],
            may_repeat: true,
            draw: 0,
        }
    }
}

pub(crate) fn fits(candidate: &Candidate, shape: &TaskShape<'_>) -> bool {
    misfit(candidate, shape).is_none()
}

/// What the task must have and the pool has not, whatever its availability and its slots.
pub(crate) fn misfit(candidate: &Candidate, shape: &TaskShape<'_>) -> Option<Refusal> {
    let able = candidate.engine.is_some_and(|engine| shape.engines.contains(engine));
    let able = able && (candidate.passes_on || !shape.passes_on);
    if !able || shape.lacking.contains(&candidate.key) {
        return Some(Refusal::EngineDiffers);
    }
    if shape.ctx.zip(candidate.ctx_max).is_some_and(|(asked, has)| asked > has) {
        return Some(Refusal::ContextShort);
    }
    let constraints = shape.constraints?;
    let mask = constraints.require_device_mask.as_ref();
    if mask.is_some_and(|mask| candidate.device_mask.as_ref() != Some(mask)) {
        return Some(Refusal::DeviceMask);
    }
    if !constraints.require_labels.iter().all(|(name, value)| candidate.labels.get(name) == Some(value)) {
        return Some(Refusal::Labels);
    }
    if !constraints.pin_allows(&candidate.key) {
        return Some(Refusal::NotPinned);
    }
    if constraints.only_preferred() && !constraints.prefers(&candidate.key) {
        return Some(Refusal::NotPreferred);
    }
    (!constraints.allow_fallback && constraints.avoids(&candidate.key)).then_some(Refusal::Avoided)
}
