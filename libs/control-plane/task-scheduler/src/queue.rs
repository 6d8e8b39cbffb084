//! The waiting tasks: a lane for each model, two priorities in each, oldest first.
//!
//! A task keeps its admission number for life, so one that is placed again goes back to where
//! it was. Which task may take which slot is not known here.

use std::collections::{BTreeMap, BTreeSet};

use pool_registry_types::task::Priority;
use pool_registry_types::{ModelRef, TaskId};

use crate::groups::{Ask, Groups};

/// While both priorities wait, every eighth start is a batch task. Source: .specs/01 CLOUD-1702.
pub(crate) const BATCH_EVERY: u32 = 8;

/// Lanes without a task of which something is still known; it is cheap to learn again.
const MAX_IDLE: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct Lane {
    interactive: BTreeSet<(u64, TaskId)>,
    batch: BTreeSet<(u64, TaskId)>,
    interactive_starts_in_a_row: u32,
    pub(crate) groups: Groups,
}

impl Lane {
    /// Waiting tasks of the priority.
    pub(crate) fn len(&self, priority: Priority) -> usize {
        self.of(priority).len()
    }

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

    /// All waiting tasks, by priority and age.
    pub(crate) fn all(&self) -> impl Iterator<Item = TaskId> + '_ {
        Priority::BOTH.into_iter().flat_map(|priority| self.waiting(priority))
    }

    /// The task that starts first, if it may take every slot.
    pub(crate) fn first(&self) -> Option<TaskId> {
        self.order().into_iter().find_map(|priority| self.waiting(priority).next())
    }

    /// How many tasks start before one that has this many older ones of its priority.
    pub(crate) fn rank(&self, priority: Priority, older: usize) -> usize {
        const IN_A_ROW: usize = BATCH_EVERY as usize - 1;
        let row = (self.interactive_starts_in_a_row as usize).min(IN_A_ROW);
        let others = match priority {
            Priority::Interactive => self.batch.len().min((row + older) / IN_A_ROW),
            Priority::Batch => self.interactive.len().min(IN_A_ROW * (older + 1) - row),
        };
        older + others
    }

    /// The waiting tasks in the order in which they start, if each may take every slot.
    pub(crate) fn in_order(&self) -> Vec<TaskId> {
        let of = |priority| {
            let tasks = self.waiting(priority).enumerate();
            tasks.map(move |(older, id)| (self.rank(priority, older), id))
        };
        let mut ranked: Vec<(usize, TaskId)> = of(Priority::Interactive).chain(of(Priority::Batch)).collect();
        ranked.sort_unstable();
        ranked.into_iter().map(|(_, id)| id).collect()
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
    /// What lanes knew that nobody waits in any more: which pools take whom.
    idle: BTreeMap<ModelRef, Groups>,
    len: usize,
}

impl Queue {
    /// Takes a task in. `ask` is what decides which pools may take it; absent for one that has
    /// had a try.
    pub(crate) fn push(
        &mut self,
        model: &ModelRef,
        priority: Priority,
        number: u64,
        task: TaskId,
        ask: Option<Ask>,
    ) {
        let lane = self.lanes.entry(model.clone()).or_insert_with(|| Lane {
            groups: self.idle.remove(model).unwrap_or_default(),
            ..Lane::default()
        });
        let new = lane.of_mut(priority).insert((number, task));
        assert!(new, "task {task} queued twice");
        lane.groups.push(priority, number, task, ask);
        self.len += 1;
    }

    /// Takes a task out without starting it.
    pub(crate) fn remove(&mut self, model: &ModelRef, priority: Priority, number: u64, task: TaskId) {
        let Some(lane) = self.lanes.get_mut(model) else { return };
        if lane.of_mut(priority).remove(&(number, task)) {
            lane.groups.remove(priority, number, task);
            self.len -= 1;
        }
        if lane.is_empty()
            && let Some(lane) = self.lanes.remove(model)
        {
            if self.idle.len() >= MAX_IDLE {
                self.idle.clear();
            }
            self.idle.insert(model.clone(), lane.groups);
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

    pub(crate) fn lane_mut(&mut self, model: &ModelRef) -> Option<&mut Lane> {
        self.lanes.get_mut(model)
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
        let waiting = lane.of(priority);
        // Mostly it is asked of the one that has just come.
        let is_last = waiting.last().is_some_and(|(last, _)| *last == number);
        let older = if is_last {
            waiting.len() - 1
        } else {
            waiting.iter().take_while(|(other, _)| *other < number).count()
        };
        lane.rank(priority, older)
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    // CLOUD-1733
    #[test]
    fn a_position_is_the_number_of_starts_before_it() {
        let model = ModelRef::new("m").unwrap();
        for started_before in 0..8 {
            let mut queue = Queue::default();
            let mut numbers = BTreeMap::new();
            for n in 0..40_u64 {
                let id = TaskId(Uuid::from_u128(u128::from(n)));
                let priority = if n % 4 == 3 { Priority::Batch } else { Priority::Interactive };
                numbers.insert(id, (priority, n));
                queue.push(&model, priority, n, id, None);
            }
            let start = |queue: &mut Queue| {
                let lane = queue.lane(&model)?;
                let id = lane.order().into_iter().find_map(|priority| lane.waiting(priority).next())?;
                let (priority, n) = numbers[&id];
                queue.start(&model, priority, n, id);
                Some(id)
            };
            for _ in 0..started_before {
                start(&mut queue).unwrap();
            }
            let reported = queue.lane(&model).unwrap().in_order();
            let positions: Vec<usize> =
                reported.iter().map(|id| queue.position(&model, numbers[id].0, numbers[id].1)).collect();
            assert_eq!(positions, (0..reported.len()).collect::<Vec<_>>());
            let happened: Vec<TaskId> = std::iter::from_fn(|| start(&mut queue)).collect();
            assert_eq!(reported, happened, "{started_before} started before");
        }
    }
}
