//! Which models were reported lately, and with which engines.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use pool_registry_types::limits::{MAX_KNOWN_MODELS, MAX_NEW_MODELS};
use pool_registry_types::pool::EngineKind;
use pool_registry_types::{ModelRef, Moment, NodeId};

use crate::mismatch::IndexMismatch;

/// What was last reported of one model.
#[derive(Debug, Default)]
struct Reported {
    /// A pool that has or loads it.
    has_model: Option<Moment>,
    engines: BTreeMap<EngineKind, Moment>,
    /// Where it stands in the order: at the oldest of these moments, or before.
    entered: Moment,
}

impl Reported {
    fn oldest(&self) -> Option<Moment> {
        self.engines.values().copied().chain(self.has_model).min()
    }
}

/// The models of all reports that are not too old.
#[derive(Debug, Default)]
pub(super) struct Models {
    reported: BTreeMap<ModelRef, Reported>,
    /// One entry a model. A report does not move it: it is looked at when it is due, and goes on.
    order: BTreeSet<(Moment, ModelRef)>,
    /// Who has named a model that no report had, the first within a lease first, and how many each has:
    /// names that are invented anew with each report are not all remembered.
    brought: VecDeque<(Moment, NodeId)>,
    brought_by: BTreeMap<NodeId, usize>,
}

impl Models {
    /// A report of the node names an engine of the model. Beyond the bounds a new name is not remembered.
    pub(super) fn seen(
        &mut self,
        now: Moment,
        node_id: &NodeId,
        model: &ModelRef,
        engine: EngineKind,
        has_model: bool,
    ) {
        let known = self.reported.len();
        let reported = match self.reported.get_mut(model) {
            Some(reported) => reported,
            None => {
                let own = self.brought_by.get(node_id).copied().unwrap_or(0);
                if known >= MAX_KNOWN_MODELS || own >= MAX_NEW_MODELS {
                    return;
                }
                self.brought.push_back((now, node_id.clone()));
                self.brought_by.insert(node_id.clone(), own + 1);
                self.order.insert((now, model.clone()));
                self.reported.entry(model.clone()).or_insert(Reported { entered: now, ..Reported::default() })
            }
        };
        if has_model {
            reported.has_model = Some(now);
        }
        reported.engines.insert(engine, now);
    }

    /// When any node last reported a pool that has or loads it.
    pub(super) fn had(&self, model: &ModelRef) -> Option<Moment> {
        self.reported.get(model)?.has_model
    }

    /// Models that pools have or load, those that stand beside the name in their order: at most so many on
    /// each side.
    pub(super) fn beside(&self, model: &ModelRef, most: usize) -> impl Iterator<Item = &ModelRef> {
        let has = |(_, reported): &(&ModelRef, &Reported)| reported.has_model.is_some();
        let before = self.reported.range::<ModelRef, _>(..model).rev().take(most);
        let after = self.reported.range::<ModelRef, _>(model..).take(most);
        before.chain(after).filter(has).map(|(name, _)| name)
    }

    pub(super) fn engines(&self, model: &ModelRef) -> impl Iterator<Item = (EngineKind, Moment)> {
        let engines = self.reported.get(model).into_iter().flat_map(|reported| &reported.engines);
        engines.map(|(engine, at)| (*engine, *at))
    }

    /// Forgets what was last reported so long ago.
    pub(super) fn expire(&mut self, now: Moment, lease: Duration) {
        while let Some((_, node_id)) = self.brought.pop_front_if(|(at, _)| *at + lease <= now) {
            match self.brought_by.get_mut(&node_id) {
                Some(own) if *own > 1 => *own -= 1,
                _ => drop(self.brought_by.remove(&node_id)),
            }
        }
        while let Some((entered, _)) = self.order.first()
            && *entered + lease <= now
            && let Some((_, model)) = self.order.pop_first()
        {
            let Some(reported) = self.reported.get_mut(&model) else { continue };
            reported.has_model = reported.has_model.filter(|at| now < *at + lease);
            reported.engines.retain(|_, at| now < *at + lease);
            match reported.oldest() {
                Some(oldest) => {
                    reported.entered = oldest;
                    self.order.insert((oldest, model));
                }
                None => drop(self.reported.remove(&model)),
            }
        }
    }

    /// Our own loop stood still: every report is younger by as much.
    pub(super) fn extend(&mut self, stall: Duration, now: Moment) {
        for reported in self.reported.values_mut() {
            for at in reported.engines.values_mut().chain(&mut reported.has_model) {
                *at = (*at + stall).min(now);
            }
        }
    }

    /// Compares the order with what it orders.
    ///
    /// # Errors
    /// What differs.
    pub(super) fn check(&self) -> Result<(), IndexMismatch> {
        let entries = self.reported.iter().map(|(model, reported)| (reported.entered, model.clone()));
        IndexMismatch::unless_equal("models by their age", &self.order, &entries.collect())?;
        match self.reported.values().find(|reported| reported.oldest().is_none_or(|at| at < reported.entered))
        {
            Some(late) => Err(IndexMismatch::new("the entry of a model", &late.entered, &late.oldest())),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(30);

    fn at(secs: u64) -> Moment {
        Moment::ZERO + Duration::from_secs(secs)
    }

    fn name(text: &str, n: usize) -> ModelRef {
        ModelRef::new(&format!("{text}-{n}")).unwrap()
    }

    fn report(models: &mut Models, now: Moment, node: &str, names: impl Iterator<Item = ModelRef>) {
        let node_id = NodeId::new(node).unwrap();
        for name in names {
            models.seen(now, &node_id, &name, EngineKind::Vllm, true);
        }
    }

    // CLOUD-2723
    #[test]
    fn a_node_that_invents_names_is_remembered_with_no_more_than_its_bound_and_costs_others_nothing() {
        let mut models = Models::default();
        for second in 0..60 {
            let now = at(second);
            models.expire(now, LEASE);
            let invented = (0..MAX_NEW_MODELS).map(|n| name(&format!("invented-{second}"), n));
            report(&mut models, now, "liar", invented);
            report(&mut models, now, "honest", (0..8).map(|n| name("honest", n)));
            report(&mut models, now, "new", std::iter::once(name("new", usize::try_from(second).unwrap())));
            assert!(models.reported.len() <= 2 * MAX_NEW_MODELS + 200, "{}", models.reported.len());
            assert!((0..8).all(|n| models.had(&name("honest", n)) == Some(now)));
        }
        models.expire(at(200), LEASE);
        assert!(models.reported.is_empty() && models.brought.is_empty() && models.brought_by.is_empty());
        models.check().unwrap();
    }

    // CLOUD-2723
    #[test]
    fn however_many_nodes_invent_names_all_of_them_are_bounded() {
        let mut models = Models::default();
        for n in 0..2 * MAX_KNOWN_MODELS / MAX_NEW_MODELS {
            let names = (0..MAX_NEW_MODELS).map(|it| name(&format!("of-{n}"), it));
            report(&mut models, at(1), &format!("n{n}"), names);
        }
        assert_eq!((models.reported.len(), models.order.len()), (MAX_KNOWN_MODELS, MAX_KNOWN_MODELS));
    }
}
