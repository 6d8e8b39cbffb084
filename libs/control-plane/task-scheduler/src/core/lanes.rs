//! How long lanes wait for their models, and what becomes of them then.
//!
//! The lanes stand in the order of when their models were last seen. A report does not move its
//! lanes: an entry may say too early a moment and never too late a one, and the first ones are put
//! right before anybody relies on them.

use super::*;

/// The lanes that are waited for, by when their models were seen; without the lease, which is the
/// same for all.
#[derive(Debug, Default)]
pub(super) struct Leases {
    order: BTreeSet<(Moment, ModelRef)>,
    entered: BTreeMap<ModelRef, Moment>,
    /// Lanes that may be over whatever their leases say: their first task has come, or their model was
    /// retired.
    fresh: BTreeSet<ModelRef>,
    /// The lease by which lapsed lanes were last looked at; none where they must be.
    lease: Option<Duration>,
}

impl Leases {
    fn enter(&mut self, model: &ModelRef, seen: Moment) {
        self.forget(model);
        self.order.insert((seen, model.clone()));
        self.entered.insert(model.clone(), seen);
    }

    fn forget(&mut self, model: &ModelRef) {
        if let Some(before) = self.entered.remove(model) {
            self.order.remove(&(before, model.clone()));
        }
    }

    /// When the model was seen for which it is longest ago.
    pub(super) fn first(&self) -> Option<Moment> {
        self.order.first().map(|(seen, _)| *seen)
    }

    /// Every lease is longer, by a stall of our own.
    pub(super) fn extended(&mut self) {
        self.lease = None;
    }
}

impl ControlCore {
    /// A task has come to the model's lane: one that has lapsed is looked at again for it, and one that is
    /// not waited for yet.
    pub(super) fn joined_lane(&mut self, model: &ModelRef) {
        let is_watched = self.leases.entered.contains_key(model);
        if !is_watched || self.lapsed.contains(model) || self.retired.contains(model) {
            self.watch_lane(model);
        }
    }

    /// A lane is waited for, and looked at once.
    pub(super) fn watch_lane(&mut self, model: &ModelRef) {
        self.lapsed.remove(model);
        self.leases.enter(model, self.model_seen(model));
        self.leases.fresh.insert(model.clone());
    }

    pub(super) fn set_retired(&mut self, model: ModelRef, retired: bool) {
        if self.queue.lane(&model).is_some() {
            self.watch_lane(&model);
        }
        if retired {
            self.retired.insert(model);
        } else {
            self.retired.remove(&model);
        }
    }

    /// The node has reported: lanes of its models may be waited for again.
    pub(super) fn revive_lanes(&mut self, now: Moment, node_id: &NodeId) {
        if self.lapsed.is_empty() {
            return;
        }
        let is_back = |model: &&ModelRef| self.lapsed.contains(*model) && !self.is_lapsed(now, model);
        let back: Vec<ModelRef> =
            self.pools_of(node_id).flat_map(|pool| &pool.models).filter(is_back).cloned().collect();
        for model in back {
            self.watch_lane(&model);
        }
    }

    /// A task has left the model's lane.
    pub(super) fn left_lane(&mut self, model: &ModelRef) {
        self.lane_changed(model);
        if self.queue.lane(model).is_none() {
            self.lapsed.remove(model);
        }
    }

    /// Ends the lanes whose models are gone.
    pub(super) fn end_gone_lanes(&mut self, now: Moment, effects: &mut Vec<Effect>) {
        let lease = self.registry.lease();
        if self.leases.lease.replace(lease) != Some(lease) {
            for model in std::mem::take(&mut self.lapsed) {
                if self.queue.lane(&model).is_none() {
                    continue;
                }
                if self.is_lapsed(now, &model) {
                    self.lapsed.insert(model);
                } else {
                    self.watch_lane(&model);
                }
            }
        }
        let mut due = std::mem::take(&mut self.leases.fresh);
        while let Some((seen, model)) = self.leases.order.first().cloned()
            && seen + lease <= now
        {
            self.leases.forget(&model);
            due.insert(model);
        }
        due.retain(|model| self.queue.lane(model).is_some() && !self.lapsed.contains(model));
        let (gone, waited_for): (Vec<ModelRef>, Vec<ModelRef>) =
            due.into_iter().partition(|model| self.is_gone(now, model));
        for model in waited_for {
            self.leases.enter(&model, self.model_seen(&model));
        }
        for model in gone {
            self.end_lane(now, &model, effects);
        }
    }

    /// Puts the first of the leases right.
    pub(super) fn review_leases(&mut self) {
        while let Some((entered, model)) = self.leases.order.first().cloned() {
            if self.queue.lane(&model).is_none() || self.lapsed.contains(&model) {
                self.leases.forget(&model);
                continue;
            }
            let seen = self.model_seen(&model);
            if seen == entered {
                return;
            }
            self.leases.enter(&model, seen);
        }
    }

    /// When the model was last reported, or our own start, when the nodes have yet to come.
    fn model_seen(&self, model: &ModelRef) -> Moment {
        let started = self.started.unwrap_or_default();
        self.registry.model_reported(model).map_or(started, |at| at.max(started))
    }

    /// Until when a task may wait for the model: as long as a node's lease after it was last seen.
    pub(super) fn model_lease(&self, model: &ModelRef) -> Moment {
        self.model_seen(model) + self.registry.lease()
    }

    /// Compares what is ordered and counted with a walk over everything, for the simulator and tests:
    /// as of the last event, which was at `now` or before.
    ///
    /// # Errors
    /// What differs.
    pub fn check_order(&self, now: Moment) -> Result<(), IndexMismatch> {
        self.registry.check_order()?;
        self.check_synced()?;
        let waiting = self.queue.models().filter(|model| !self.lapsed.contains(*model));
        let walked = waiting.map(|model| self.model_lease(model)).min();
        let kept = self.leases.first().map(|seen| seen + self.registry.lease());
        IndexMismatch::unless_equal("the end of the first lane", &kept, &walked)?;
        let back = |model: &&ModelRef| self.queue.lane(model).is_some() && !self.is_lapsed(now, model);
        match self.lapsed.iter().find(back) {
            Some(model) => Err(IndexMismatch::new("lapsed lanes", model, &"one that is none")),
            None => Ok(()),
        }
    }

    /// Nothing is placed for the model, and it is not waited for any more.
    pub(super) fn is_gone(&self, now: Moment, model: &ModelRef) -> bool {
        self.retired.contains(model) || self.model_lease(model) <= now
    }

    /// The same, as far as only the lease says so.
    fn is_lapsed(&self, now: Moment, model: &ModelRef) -> bool {
        !self.retired.contains(model) && self.model_lease(model) <= now
    }

    /// Ends the tasks that wait for a model that is gone; those whose own node is suspect wait on.
    pub(super) fn end_lane(&mut self, now: Moment, model: &ModelRef, effects: &mut Vec<Effect>) {
        let Some(lane) = self.queue.lane(model) else { return };
        let retired = self.retired.contains(model);
        let waiting: Vec<TaskId> =
            lane.waiting(Priority::Interactive).chain(lane.waiting(Priority::Batch)).collect();
        for id in waiting {
            let Some(task) = self.tasks.get(&id) else { continue };
            if !retired && self.waits_for_suspect(task) {
                continue;
            }
            let pinned = task.pinned_node().filter(|_| !retired && self.enforces(Rule::PinBeforeLease));
            let refusal = pinned.and_then(|node_id| self.pin_refusal(now, node_id));
            self.leave_queue(id);
            self.fail(now, id, refusal.unwrap_or_else(|| self.model_not_available(model)), effects);
        }
        if self.queue.lane(model).is_some() {
            self.leases.forget(model);
            self.lapsed.insert(model.clone());
        }
    }
}
