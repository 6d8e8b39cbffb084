//! What the pools of a model can do at all, counted as pools come and go: whether every one of them
//! lacks what a task asks for by its own words is found without asking each.
//!
//! Labels, device masks and memory are none of it: what they exclude may be let in by an operator, or
//! when others have gone.

use std::collections::BTreeMap;

use pool_registry_types::pool::EngineKind;

use crate::candidate::Candidate;
use crate::shape::TaskShape;

/// What every pool of a model lacks for a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lack {
    /// The engines are of other kinds; one of these.
    Engine(EngineKind),
    /// No node passes bodies on as they come.
    PassesOn,
    /// The longest context, tokens, of those engines that can do the rest.
    Context(u32),
}

/// Stands for a context that is not known: it fits everything.
const UNKNOWN: u32 = u32::MAX;

/// How many pools have which context, by their kind of engine and whether their node passes bodies on.
#[derive(Debug, Default)]
pub(crate) struct Offers(BTreeMap<(Option<EngineKind>, bool), BTreeMap<u32, u32>>);

impl Offers {
    pub(crate) fn add(&mut self, pool: &Candidate) {
        let contexts = self.0.entry((pool.engine, pool.passes_on)).or_default();
        *contexts.entry(pool.ctx_max.unwrap_or(UNKNOWN)).or_default() += 1;
    }

    /// Takes a pool out that was added as it is.
    pub(crate) fn remove(&mut self, pool: &Candidate) {
        let (kind, context) = ((pool.engine, pool.passes_on), pool.ctx_max.unwrap_or(UNKNOWN));
        let Some(contexts) = self.0.get_mut(&kind) else { return };
        if let Some(count) = contexts.get_mut(&context) {
            *count -= 1;
            if *count == 0 {
                contexts.remove(&context);
            }
        }
        if contexts.is_empty() {
            self.0.remove(&kind);
        }
    }

    pub(crate) fn lack(&self, shape: &TaskShape<'_>) -> Option<Lack> {
        let passing = |passes_on: bool| passes_on || !shape.passes_on;
        if !self.0.is_empty() && !self.0.keys().any(|(_, passes_on)| passing(*passes_on)) {
            return Some(Lack::PassesOn);
        }
        let (mut other, mut longest) = (None, None);
        for ((engine, passes_on), contexts) in &self.0 {
            // A kind that is not known here is of a newer version, and promises nothing.
            let Some(engine) = engine.filter(|_| passing(*passes_on)) else { continue };
            if shape.engines.contains(engine) {
                longest = longest.max(contexts.last_key_value().map(|(context, _)| *context));
            } else {
                other.get_or_insert(engine);
            }
        }
        match longest {
            Some(longest) => shape.ctx.filter(|asked| *asked > longest).map(|_| Lack::Context(longest)),
            None => other.map(Lack::Engine),
        }
    }
}
