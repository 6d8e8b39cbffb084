//! What waiting tasks wait for: the pools that refuse them, counted by refusal.
//!
//! A count walks the pools of a model, and so is made for tasks that wait only, once in a while for all
//! that ask for the same. A task that starts at once pays nothing.

use super::*;

/// A count is given to others that ask for the same for so long.
const FRESH: Duration = Duration::from_millis(100);
/// Pools that are looked at for one snapshot of all waiting tasks; those that were counted longest ago
/// come first, and what is left keeps its older counts.
const MOST_STEPS: usize = 1 << 16;
/// Counts that are kept between two snapshots.
const MOST_COUNTS: usize = 4096;

type Key = (ModelRef, Ask);

/// What was counted and when, by what tasks ask for.
type Counts = BTreeMap<Key, (Moment, Refused)>;

/// Whoever reads has counts of its own: what is answered does not hang on who has read.
#[derive(Debug, Default)]
pub(super) struct Waits {
    /// For answers to those who submit.
    pub(super) answered: Counts,
    /// For snapshots; of the tasks that wait.
    read: Counts,
}

impl Waits {
    fn fresh(&self, now: Moment, key: &Key) -> Option<&Refused> {
        self.answered.get(key).filter(|(at, _)| *at + FRESH > now).map(|(_, refused)| refused)
    }

    fn put(&mut self, now: Moment, key: Key, refused: Refused) {
        if self.answered.len() >= MOST_COUNTS {
            self.answered.retain(|_, (at, _)| *at + FRESH > now);
        }
        if self.answered.len() >= MOST_COUNTS {
            self.answered.clear();
        }
        self.answered.insert(key, (now, refused));
    }
}

/// Where a task stands that waits.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Waiting {
    /// Tasks of the lane that start before it; absent while nothing could take it.
    pub queue_position: Option<u32>,
    /// Absent until it was counted.
    pub waiting_for: Option<WaitingFor>,
}

impl Waiting {
    pub(super) fn of(position: usize, counted: Option<&Refused>) -> Self {
        let could = counted.is_none_or(|refused| refused.might_be_taken);
        Self {
            queue_position: could.then(|| u32::try_from(position).unwrap_or(u32::MAX)),
            waiting_for: counted.map(|refused| refused.waiting_for.clone()),
        }
    }
}

impl ControlCore {
    /// What the task asks of pools; neither its pauses nor its session's other tasks say which refuse it.
    fn wait_shape<'a>(&'a self, task: &'a Task) -> Option<TaskShape<'a>> {
        self.shape(Moment::NEVER, task, None)
    }

    fn key_of_wait(&self, task: &Task) -> Option<Key> {
        Some((task.model.clone(), Ask::of_shape(&self.wait_shape(task)?)))
    }

    /// What the pools say to a task that waits; counted where that was not done just now.
    pub(super) fn count_wait(&mut self, now: Moment, id: TaskId) -> Option<&Refused> {
        let task = self.tasks.get(&id)?;
        let key = self.key_of_wait(task)?;
        if self.waits.fresh(now, &key).is_none() {
            let counted = refused(&self.index, &self.wait_shape(task)?);
            self.waits.put(now, key.clone(), counted);
        }
        self.waits.fresh(now, &key)
    }

    /// What whoever has submitted such a task was told last.
    pub(super) fn answered_wait(&self, task: &Task) -> Option<&Refused> {
        self.waits.answered.get(&self.key_of_wait(task)?).map(|(_, refused)| refused)
    }

    /// The last count for the snapshots, if there was one.
    pub(super) fn counted_wait(&self, task: &Task) -> Option<&Refused> {
        self.waits.read.get(&self.key_of_wait(task)?).map(|(_, refused)| refused)
    }

    /// Counts for all tasks that wait, as far as one snapshot may cost.
    pub(super) fn count_waits(&mut self, now: Moment) {
        let mut asked: BTreeMap<Key, TaskId> = BTreeMap::new();
        for model in self.queue.models() {
            for id in self.queue.lane(model).into_iter().flat_map(Lane::all) {
                let key = self.tasks.get(&id).and_then(|task| self.key_of_wait(task));
                asked.extend(key.map(|key| (key, id)));
            }
        }
        self.waits.read.retain(|key, _| asked.contains_key(key));
        let counted_at = |key: &Key| self.waits.read.get(key).map(|(at, _)| *at);
        let is_due = |(at, ..): &(Option<Moment>, _, _)| at.is_none_or(|at| at + FRESH <= now);
        let due = asked.into_iter().map(|(key, id)| (counted_at(&key), key, id));
        let mut due: Vec<(Option<Moment>, Key, TaskId)> = due.filter(is_due).collect();
        due.sort_unstable();
        let mut steps = 0;
        for (_, key, id) in due {
            steps += 1 + self.index.count_of(&key.0);
            if steps > MOST_STEPS && steps > 1 + self.index.count_of(&key.0) {
                break;
            }
            let shape = self.tasks.get(&id).and_then(|task| self.wait_shape(task));
            if let Some(counted) = shape.map(|shape| refused(&self.index, &shape)) {
                self.waits.read.insert(key, (now, counted));
            }
        }
    }

    /// Waiting tasks that some pool might take soon, and those that none could; these with what most of
    /// them wait for.
    pub fn waiting_tasks(&mut self, now: Moment) -> WaitingTasks {
        self.count_waits(now);
        let mut found = WaitingTasks::default();
        let mut reasons: BTreeMap<Refusal, usize> = BTreeMap::new();
        for model in self.queue.models() {
            for id in self.queue.lane(model).into_iter().flat_map(Lane::all) {
                let waited = self.tasks.get(&id).map(|task| now.millis_since(task.admitted));
                found.oldest_ms = found.oldest_ms.max(waited.unwrap_or_default());
                let counted = self.tasks.get(&id).and_then(|task| self.counted_wait(task));
                match counted.filter(|refused| !refused.might_be_taken) {
                    None => found.startable += 1,
                    Some(refused) => {
                        found.stuck += 1;
                        if let Some(reason) = refused.waiting_for.reason {
                            *reasons.entry(reason).or_default() += 1;
                        }
                    }
                }
            }
        }
        found.reason = reasons.into_iter().max_by_key(|(_, tasks)| *tasks).map(|(reason, _)| reason);
        found
    }

    /// The refusal of a task that is not to wait, where it would have to.
    pub(super) fn refusal_to_wait(&mut self, now: Moment, spec: &TaskSpec) -> Option<ErrorBody> {
        if spec.placement.as_ref().is_none_or(|constraints| constraints.wait) {
            return None;
        }
        let spread = self.spread_of(spec.session(), spec);
        let shape = self.shape_of(spec, spec.session(), spread.as_ref());
        // Whoever waits already, and could take a free slot, has it.
        if self.short_until.is_none() && choose(&self.index, &shape).is_ok() {
            return None;
        }
        let Refused { waiting_for, might_be_taken } = refused(&self.index, &shape);
        let message = format!("placement.wait: the task would have to wait ({waiting_for})");
        let mut error = ErrorBody::new(ErrorCode::PoolUnavailable, message);
        error.detail = Some(Box::new(waiting_for));
        Some(error.retry_after_ms(match might_be_taken {
            true => self.backoff_ms(now, &spec.model_ref, spec.priority),
            false => self.stuck_backoff_ms(),
        }))
    }
}

/// How many tasks wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WaitingTasks {
    /// Some pool might take them soon.
    pub startable: usize,
    /// None could.
    pub stuck: usize,
    /// What most of these wait for.
    pub reason: Option<Refusal>,
    /// Milliseconds since the admission of the one that came first.
    pub oldest_ms: u64,
}
