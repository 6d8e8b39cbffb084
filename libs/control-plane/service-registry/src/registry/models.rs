//! Which models were reported lately, and with which engines.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pool_registry_types::pool::EngineKind;
use pool_registry_types::{ModelRef, Moment};

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
}

impl Models {
    /// A report names an engine of the model.
    pub(super) fn seen(&mut self, now: Moment, model: &ModelRef, engine: EngineKind, has_model: bool) {
        let reported = match self.reported.get_mut(model) {
            Some(reported) => reported,
            None => {
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

    pub(super) fn engines(&self, model: &ModelRef) -> impl Iterator<Item = (EngineKind, Moment)> {
        let engines = self.reported.get(model).into_iter().flat_map(|reported| &reported.engines);
        engines.map(|(engine, at)| (*engine, *at))
    }

    /// Forgets what was last reported so long ago.
    pub(super) fn expire(&mut self, now: Moment, lease: Duration) {
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
