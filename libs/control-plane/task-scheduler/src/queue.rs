//! The waiting tasks: a lane for each model, two priorities in each, oldest first.
//!
//! A task keeps its admission number for life, so one that is placed again goes back to where
//! it was. Which task may take which slot is not known here.

use std::collections::{BTreeMap, BTreeSet};

use pool_registry_types::task::Priority;
use pool_registry_types::{ModelRef, TaskId};

/// While both priorities wait, every eighth start is a batch task. Source: .specs/01 CLOUD-1702.
pub const BATCH_EVERY: u32 = 8;

#[derive(Debug, Default)]
pub(crate) struct Lane {
    interactive: BTreeSet<(u64, TaskId)>,
    batch: BTreeSet<(u64, TaskId)>,
    interactive_starts_in_a_row: u32,
}

impl Lane {
    fn of(&self, priority: Priority) -> &BTreeSet<(u64, TaskId)> {
        match priority {
            Priority::Interactive => &self.interactive,
            Priority::Batch => &self.batch,
        }
    }

    fn of_mut(&mut self, priority: Priority) -> &mut BTreeSet<(u64, TaskId)> {
        match priority {
            Priority::Interactive => &mut self.interactive,
            Priority::Batch => &mut self.batch,
        }
    }

    /// The priorities in the order in which they may start now.
    pub(crate) fn order(&self) -> [Priority; 2] {
        if self.interactive_starts_in_a_row + 1 >= BATCH_EVERY && !self.batch.is_empty() {
            [Priority::Batch, Priority::Interactive]
        } else {
            [Priority::Interactive, Priority::Batch]
        }
    }

    pub(crate) fn waiting(&self, priority: Priority) -> impl Iterator<Item = TaskId> + '_ {
        self.of(priority).iter().map(|(_, id)| *id)
    }

    fn is_empty(&self) -> bool {
        self.interactive.is_empty() && self.batch.is_empty()
    }

    fn oldest(&self) -> u64 {
        let first = |set: &BTreeSet<(u64, TaskId)>| set.first().map_or(u64::MAX, |(number, _)| *number);
        first(&self.interactive).min(first(&self.batch))
    }
}

/// All lanes.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    lanes: BTreeMap<ModelRef, Lane>,
    len: usize,
}

impl Queue {
    pub(crate) fn push(&mut self, model: &ModelRef, priority: Priority, number: u64, task: TaskId) {
        let lane = self.lanes.entry(model.clone()).or_default();
        let new = lane.of_mut(priority).insert((number, task));
        assert!(new, "task {task} queued twice");
        self.len += 1;
    }

    /// Takes a task out without starting it.
    pub(crate) fn remove(&mut self, model: &ModelRef, priority: Priority, number: u64, task: TaskId) {
        let Some(lane) = self.lanes.get_mut(model) else { return };
        if lane.of_mut(priority).remove(&(number, task)) {
            self.len -= 1;
        }
        if lane.is_empty() {
            self.lanes.remove(model);
        }
    }

    /// Takes a task out because it starts, and counts it for the batch share.
    pub(crate) fn start(&mut self, model: &ModelRef, priority: Priority, number: u64, task: TaskId) {
        if let Some(lane) = self.lanes.get_mut(model) {
            match priority {
                Priority::Interactive if lane.batch.is_empty() => lane.interactive_starts_in_a_row = 0,
                Priority::Interactive => lane.interactive_starts_in_a_row += 1,
                Priority::Batch => lane.interactive_starts_in_a_row = 0,
            }
        }
        self.remove(model, priority, number, task);
    }

    pub(crate) fn lane(&self, model: &ModelRef) -> Option<&Lane> {
        self.lanes.get(model)
    }

    /// Models with waiting tasks.
    pub(crate) fn models(&self) -> impl Iterator<Item = &ModelRef> {
        self.lanes.keys()
    }

    /// The admission number of the oldest task that waits for the model.
    pub(crate) fn oldest(&self, model: &ModelRef) -> u64 {
        self.lanes.get(model).map_or(u64::MAX, Lane::oldest)
    }

    /// Waiting tasks of the lane and priority.
    pub(crate) fn depth(&self, model: &ModelRef, priority: Priority) -> usize {
        self.lanes.get(model).map_or(0, |lane| lane.of(priority).len())
    }

    /// Tasks of the lane that start before this one, if nothing changes.
    pub(crate) fn position(&self, model: &ModelRef, priority: Priority, number: u64) -> usize {
        let Some(lane) = self.lanes.get(model) else { return 0 };
        let older = lane.of(priority).iter().take_while(|(other, _)| *other < number).count();
        match priority {
            Priority::Interactive => older,
            Priority::Batch => older + lane.interactive.len(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }
}
