//! How fast pools are, as measured, and when a waiting task will start.
//!
//! A pace is two running means: the time to the first token and the time of each further one.
//! A forecast lets the waiting tasks of a lane start one after the other on the slots there
//! are, as they would if every task took as long as its pool's pace says.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};

use pool_registry_types::{Lookup, ModelRef, Moment, PoolKey, TaskId};

/// Weight of the newest measurement in a running mean.
const WEIGHT: f64 = 0.2;
/// Predictions that are remembered with what became of them.
const REMEMBERED: usize = 256;
/// Fewer say nothing about how right predictions are.
const ENOUGH: usize = 8;
/// An estimate counts for at most so many times the measured mean. Source: .specs/01 CLOUD-1211.
const MOST_MEANS: f64 = 8.0;
/// What a task that runs longer than expected is still given, as a part of what was expected.
const OVERTIME: f64 = 0.1;

/// Milliseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Pace {
    first_token: f64,
    token: f64,
}

impl Pace {
    fn measure(&mut self, newest: Self) {
        self.first_token += WEIGHT * (newest.first_token - self.first_token);
        self.token += WEIGHT * (newest.token - self.token);
    }

    fn service_ms(&self, tokens: f64) -> f64 {
        self.first_token + self.token * (tokens - 1.0).max(0.0)
    }
}

/// One finished attempt.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measurement {
    pub(crate) first_token_ms: u64,
    /// From the first token to the end.
    pub(crate) decode_ms: u64,
    pub(crate) tokens: u64,
}

/// All measured paces.
#[derive(Debug, Default)]
pub(crate) struct Paces {
    pools: Lookup<PoolKey, Pace>,
    models: BTreeMap<ModelRef, (Pace, f64)>,
    /// Actual wait over predicted wait.
    ratios: VecDeque<f64>,
}

impl Paces {
    pub(crate) fn measure(&mut self, pool: &PoolKey, model: &ModelRef, seen: Measurement) {
        let tokens = seen.tokens as f64;
        let token = seen.decode_ms as f64 / (tokens - 1.0).max(1.0);
        let newest = Pace { first_token: seen.first_token_ms as f64, token };
        self.pools.get_or_insert_with(pool.clone(), || newest).measure(newest);
        let (pace, mean) = self.models.entry(model.clone()).or_insert((newest, tokens));
        pace.measure(newest);
        *mean += WEIGHT * (tokens - *mean);
    }

    pub(crate) fn forget(&mut self, pool: &PoolKey) {
        self.pools.remove(pool);
    }

    /// Tokens a second of one slot, pool by pool.
    pub(crate) fn tokens_per_second(&self) -> impl Iterator<Item = (&PoolKey, f64)> {
        self.pools.in_order().map(|(pool, pace)| (pool, 1e3 / pace.token.max(1e-3)))
    }

    /// How many tokens a task will take: its own estimate, or the model's mean, at most its bound
    /// and the context, and never far from what tasks of the model take.
    pub(crate) fn tokens(
        &self,
        model: &ModelRef,
        estimate: Option<u32>,
        bound: Option<u32>,
        ctx_max: Option<u32>,
    ) -> Option<f64> {
        let mean = self.models.get(model).map(|(_, tokens)| *tokens);
        let bound = bound.into_iter().chain(ctx_max).min().map(f64::from);
        let expected = estimate.map(f64::from).or(mean).or(bound)?;
        let expected = bound.map_or(expected, |bound| expected.min(bound));
        Some(mean.map_or(expected, |mean| expected.min(MOST_MEANS * mean.max(1.0))))
    }

    /// Milliseconds from dispatch to end on the pool; by the model's pace where the pool's is unknown.
    pub(crate) fn service_ms(&self, pool: &PoolKey, model: &ModelRef, tokens: f64) -> Option<f64> {
        let pace = self.pools.get(pool).or_else(|| self.models.get(model).map(|(pace, _)| pace))?;
        Some(pace.service_ms(tokens))
    }

    /// A task that was predicted to start after `predicted` ms has started after `actual`.
    pub(crate) fn record_outcome(&mut self, predicted_ms: u64, actual_ms: u64) {
        if self.ratios.len() == REMEMBERED {
            self.ratios.pop_front();
        }
        self.ratios.push_back((actual_ms as f64 + 1.0) / (predicted_ms as f64 + 1.0));
    }

    /// How probable it is that a start predicted in `predicted` ms comes within `left` ms.
    pub(crate) fn on_time(&self, predicted_ms: u64, left_ms: u64) -> Option<f64> {
        let most = (left_ms as f64 + 1.0) / (predicted_ms as f64 + 1.0);
        let good = self.ratios.iter().filter(|ratio| **ratio <= most).count();
        (self.ratios.len() >= ENOUGH).then(|| good as f64 / self.ratios.len() as f64)
    }
}

/// When slots are free, whose pool they are of, and how many. Milliseconds from the making of the
/// forecast, in thousandths, so that they are ordered.
type FreeAt = Reverse<(u64, usize, usize)>;

/// When each waiting task of a lane starts, as of the moment at which it was made.
#[derive(Debug)]
pub(crate) struct Forecast {
    made: Moment,
    /// Changes of the lane since it was made that it does not know.
    pub(crate) behind: usize,
    pools: Vec<PoolKey>,
    slots: BinaryHeap<FreeAt>,
    starts: BTreeMap<TaskId, Moment>,
}

impl Forecast {
    pub(crate) fn new(now: Moment) -> Self {
        Self { made: now, behind: 0, pools: Vec::new(), slots: BinaryHeap::new(), starts: BTreeMap::new() }
    }

    /// Adds a pool with the milliseconds until its slots are free, and how many are at once.
    pub(crate) fn pool(&mut self, key: PoolKey, free_in_ms: impl IntoIterator<Item = (f64, usize)>) {
        let place = self.pools.len();
        self.pools.push(key);
        let slots = free_in_ms.into_iter().filter(|(_, slots)| *slots > 0);
        self.slots.extend(slots.map(|(ms, slots)| Reverse((thousandths(ms), place, slots))));
    }

    /// When one more task would start; nothing without a slot.
    pub(crate) fn next_start(&self) -> Option<Moment> {
        let Reverse((at, ..)) = self.slots.peek()?;
        Some(self.moment(*at))
    }

    /// Lets a task start on the slot that is free first.
    pub(crate) fn start(
        &mut self,
        task: TaskId,
        service_ms: impl FnOnce(&PoolKey) -> Option<f64>,
    ) -> Option<Moment> {
        let Reverse((at, place, slots)) = self.slots.pop()?;
        if slots > 1 {
            self.slots.push(Reverse((at, place, slots - 1)));
        }
        let start = self.moment(at);
        self.starts.insert(task, start);
        // A slot whose pool's pace is not known starts nothing more that can be said.
        if let Some(took) = service_ms(&self.pools[place]) {
            self.slots.push(Reverse((at.saturating_add(thousandths(took)), place, 1)));
        }
        Some(start)
    }

    /// Whether the task that is to start first should have begun before now, or without one a slot
    /// should have come free.
    pub(crate) fn is_overdue(&self, now: Moment, first: Option<&TaskId>) -> bool {
        let start = first.and_then(|task| self.start_of(task)).or_else(|| self.next_start());
        start.is_some_and(|start| start < now)
    }

    pub(crate) fn age(&self, now: Moment) -> std::time::Duration {
        now.since(self.made)
    }

    pub(crate) fn start_of(&self, task: &TaskId) -> Option<Moment> {
        self.starts.get(task).copied()
    }

    fn moment(&self, thousandths: u64) -> Moment {
        self.made + std::time::Duration::from_micros(thousandths)
    }
}

/// What is left of a task that runs already.
pub(crate) fn remaining_ms(service_ms: f64, elapsed_ms: u64) -> f64 {
    (service_ms - elapsed_ms as f64).max(service_ms * OVERTIME)
}

fn thousandths(ms: f64) -> u64 {
    // Saturates far beyond any wait: a forecast is no promise.
    std::time::Duration::try_from_secs_f64(ms.max(0.0) / 1e3)
        .map_or(u64::MAX / 4, |span| u64::try_from(span.as_micros()).unwrap_or(u64::MAX / 4))
}

#[cfg(test)]
mod tests {
    use pool_registry_types::{NodeId, PoolId};
    use uuid::Uuid;

    use super::*;

    fn pool(name: &str) -> PoolKey {
        PoolKey::new(NodeId::new(name).unwrap(), PoolId::new("p").unwrap())
    }

    fn model() -> ModelRef {
        ModelRef::new("m").unwrap()
    }

    // CLOUD-1730
    #[test]
    fn a_pools_own_pace_counts_before_the_models() {
        let mut paces = Paces::default();
        assert_eq!(paces.service_ms(&pool("a"), &model(), 10.0), None, "nothing measured, nothing said");
        paces.measure(&pool("a"), &model(), Measurement { first_token_ms: 100, decode_ms: 900, tokens: 10 });
        assert_eq!(paces.service_ms(&pool("a"), &model(), 10.0), Some(1_000.0));
        assert_eq!(paces.service_ms(&pool("b"), &model(), 10.0), Some(1_000.0));
        paces.measure(&pool("b"), &model(), Measurement { first_token_ms: 10, decode_ms: 90, tokens: 10 });
        assert_eq!(paces.service_ms(&pool("b"), &model(), 10.0), Some(100.0));
        assert_eq!(paces.tokens_per_second().last(), Some((&pool("b"), 100.0)));
        assert_eq!(paces.tokens(&model(), None, Some(4), None), Some(4.0));
        assert_eq!(paces.tokens(&model(), Some(3), Some(4), None), Some(3.0));
    }

    // CLOUD-1211
    #[test]
    fn an_estimate_counts_for_no_more_than_the_context_and_a_multiple_of_the_mean() {
        let mut paces = Paces::default();
        let huge = Some(u32::MAX);
        assert_eq!(paces.tokens(&model(), huge, huge, Some(4096)), Some(4096.0));
        paces.measure(&pool("a"), &model(), Measurement { first_token_ms: 100, decode_ms: 900, tokens: 10 });
        assert_eq!(paces.tokens(&model(), huge, None, Some(4096)), Some(80.0));
        assert_eq!(paces.tokens(&model(), huge, Some(50), Some(4096)), Some(50.0));
        assert_eq!(paces.tokens(&model(), huge, None, Some(20)), Some(20.0));
        assert_eq!(paces.tokens(&model(), Some(30), None, None), Some(30.0));
    }

    // CLOUD-1731
    #[test]
    fn waiting_tasks_start_one_after_the_other_on_the_slots_there_are() {
        let mut forecast = Forecast::new(Moment::from_millis(1_000));
        forecast.pool(pool("slow"), [(0.0, 1)]);
        forecast.pool(pool("fast"), [(50.0, 1)]);
        let service = |pool: &PoolKey| Some(if pool.node_id.as_str() == "slow" { 1_000.0 } else { 100.0 });
        let starts: Vec<u64> = (0..4)
            .map(|n| forecast.start(TaskId(Uuid::from_u128(n)), service).unwrap().as_millis() - 1_000)
            .collect();
        assert_eq!(starts, [0, 50, 150, 250]);
        assert_eq!(forecast.next_start(), Some(Moment::from_millis(1_350)));
    }

    // CLOUD-1731
    #[test]
    fn slots_that_are_free_at_once_are_taken_one_by_one() {
        let mut forecast = Forecast::new(Moment::from_millis(0));
        forecast.pool(pool("many"), [(0.0, 2), (30.0, 1)]);
        forecast.pool(pool("none"), [(0.0, 0)]);
        let mut next = |n| forecast.start(TaskId(Uuid::from_u128(n)), |_| Some(100.0)).unwrap().as_millis();
        assert_eq!([0, 1, 2, 3, 4, 5].map(&mut next), [0, 0, 30, 100, 100, 130]);
    }

    // CLOUD-1732
    #[test]
    fn the_chance_to_be_on_time_comes_from_how_right_earlier_predictions_were() {
        let mut paces = Paces::default();
        assert_eq!(paces.on_time(100, 100), None);
        for n in 0..8 {
            paces.record_outcome(99, if n < 6 { 99 } else { 199 });
        }
        assert_eq!(paces.on_time(99, 99), Some(0.75));
        assert_eq!(paces.on_time(99, 199), Some(1.0));
        assert_eq!(paces.on_time(99, 9), Some(0.0));
    }
}
