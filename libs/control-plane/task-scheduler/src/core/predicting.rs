//! When a waiting task will start, from the paces that were measured.
//!
//! A lane's forecast holds until the lane changes: it is made and kept while an event is handled,
//! and whoever reads makes one of its own.

use super::waiting::Waiting;
use super::*;

/// A forecast that is behind by one change for so many tasks that wait, or pools, is made anew, and
/// one that time has shown wrong after a millisecond for so many pools: what it costs is spread over
/// them.
const CHANGES_A_TASK: usize = 16;
/// Pools that a forecast looks at; of a model with more, every second, third and so on.
const MOST_POOLS: usize = 64;
/// Lanes with a forecast at a time; a forecast is cheap to make again.
const MAX_FORECASTS: usize = 256;

/// Something of the lane has changed that its forecast does not know.
pub(super) fn note_change(forecasts: &mut BTreeMap<ModelRef, Forecast>, model: &ModelRef) {
    if let Some(forecast) = forecasts.get_mut(model) {
        forecast.behind += 1;
    }
}

impl ControlCore {
    /// Milliseconds from dispatch to end that the task will take on the pool.
    fn service_ms(&self, pool: &PoolKey, id: TaskId) -> Option<f64> {
        let task = self.tasks.get(&id)?;
        let spec = task.spec.as_ref()?;
        let pools = self.index.get(pool).and_then(|pool| pool.ctx_max);
        let ctx_max = spec.ctx.into_iter().chain(pools).min();
        let (estimate, bound) = (spec.expected_tokens, spec.max_tokens.or(task.budget_bound));
        let tokens = self.paces.tokens(&task.model, estimate, bound, ctx_max)?;
        self.paces.service_ms(pool, &task.model, tokens)
    }

    /// Something of the lane has changed that its forecast does not know.
    pub(super) fn lane_changed(&mut self, model: &ModelRef) {
        note_change(&mut self.forecasts, model);
    }

    /// The lane's forecast, made anew where the lane has changed.
    fn forecast(&mut self, now: Moment, model: &ModelRef) -> &mut Forecast {
        let pools = self.index.placeable_count(model);
        let most = self.lane_depth(model).max(pools) / CHANGES_A_TASK;
        // What should have begun by now and has not shows that a task takes longer than was thought.
        let waits = !self.index.has_free(model);
        let first = self.queue.lane(model).and_then(Lane::first);
        let patience = Duration::from_millis((pools / CHANGES_A_TASK) as u64);
        let is_overdue =
            |known: &Forecast| known.is_overdue(now, first.as_ref()) && known.age(now) >= patience;
        let is_old = |known: &Forecast| known.behind > most || (waits && is_overdue(known));
        if self.forecasts.get(model).is_none_or(is_old) {
            if self.forecasts.len() >= MAX_FORECASTS {
                self.forecasts.clear();
            }
            let made = self.make_forecast(now, model);
            self.forecasts.insert(model.clone(), made);
        }
        self.forecasts.get_mut(model).expect("made above")
    }

    /// Milliseconds until each attempt on the pool ends.
    fn left_on(&self, now: Moment, pool: &PoolKey) -> impl Iterator<Item = f64> {
        let attempts = self.registry.reserved_on(pool).filter_map(|id| self.attempts.get(id));
        attempts.filter_map(move |attempt| {
            let service = self.service_ms(&attempt.pool, attempt.task)?;
            Some(remaining_ms(service, now.millis_since(attempt.dispatched)))
        })
    }

    fn make_forecast(&self, now: Moment, model: &ModelRef) -> Forecast {
        let mut forecast = Forecast::new(now);
        let waiting = u32::try_from(self.lane_depth(model) + 1).unwrap_or(u32::MAX);
        // Of very many pools some stand for the others.
        let each = self.index.placeable_count(model).div_ceil(MOST_POOLS).max(1);
        let mut candidates: Vec<&Candidate> = self.index.some_placeable(model, each).collect();
        // Which of two slots that are free together is taken does not hang on when their pools came.
        candidates.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        for candidate in candidates {
            let taken = self.left_on(now, &candidate.key);
            let free = candidate.slots_total.saturating_sub(candidate.slots_busy);
            // More free slots than tasks that wait make no difference, and a node may say any number.
            let free = (0.0, usize::try_from(free.min(waiting)).unwrap_or(usize::MAX));
            // Slots that somebody else has are not counted on.
            let slots = taken.map(|ms| (ms, 1)).chain([free]);
            forecast.pool(candidate.key.clone(), slots.map(|(ms, slots)| (ms, slots.saturating_mul(each))));
        }
        for id in self.queue.lane(model).map(|lane| lane.in_order()).unwrap_or_default() {
            // Who asks for certain pools may wait for them while others are idle.
            let has_constraints =
                |task: &Task| task.spec.as_ref().is_some_and(|spec| spec.placement.is_some());
            if !self.tasks.get(&id).is_some_and(|task| has_constraints(task)) {
                forecast.start(id, |pool| self.service_ms(pool, id));
            }
        }
        forecast
    }

    pub(super) fn lane_depth(&self, model: &ModelRef) -> usize {
        Priority::BOTH.iter().map(|priority| self.queue.depth(model, *priority)).sum()
    }

    /// Milliseconds until the task that has just come to wait starts; nothing before a pace was
    /// measured.
    pub(super) fn predict_ms(&mut self, now: Moment, id: TaskId) -> Option<u64> {
        let task = self.tasks.get(&id)?;
        let (model, own) = (task.model.clone(), self.queue.depth(&task.model, task.priority));
        // With both priorities in the lane, one that came after the forecast may start before
        // others that are in it.
        let stale = self.forecasts.get(&model).is_some_and(|forecast| forecast.start_of(&id).is_none());
        if stale && own < self.lane_depth(&model) {
            self.forecasts.remove(&model);
        }
        let known = self.forecast(now, &model).start_of(&id);
        let start = match known {
            Some(start) => start,
            // It came after the forecast was made: it starts after all that are in it.
            None => {
                let mut forecast = self.forecasts.remove(&model)?;
                let start = forecast.start(id, |pool| self.service_ms(pool, id));
                self.forecasts.insert(model, forecast);
                start?
            }
        };
        Some(start.millis_since(now))
    }

    /// Milliseconds until one more task of the model and priority would start.
    pub(super) fn next_start_ms(&mut self, now: Moment, model: &ModelRef, priority: Priority) -> Option<u64> {
        // It would push back the tasks from its place on: the first of them starts when it would.
        let pushed_back = self.queue.lane(model).and_then(|lane| {
            let rank = lane.rank(priority, lane.len(priority));
            (rank < lane.len(Priority::Interactive) + lane.len(Priority::Batch))
                .then(|| lane.in_order().get(rank).copied())
                .flatten()
        });
        let forecast = self.forecast(now, model);
        let start = pushed_back.and_then(|id| forecast.start_of(&id)).or_else(|| forecast.next_start())?;
        Some(start.millis_since(now))
    }

    /// What a client is told to wait; never longer than a task may.
    pub(super) fn backoff_ms(&mut self, now: Moment, model: &ModelRef, priority: Priority) -> u64 {
        let longest = millis(self.policy.queue_timeout).max(1);
        self.next_start_ms(now, model, priority).unwrap_or(DEFAULT_BACKOFF_MS).clamp(1, longest)
    }

    /// The same for a task that no pool could take: how the free slots fare says nothing of it.
    pub(super) fn stuck_backoff_ms(&self) -> u64 {
        DEFAULT_BACKOFF_MS.min(millis(self.policy.queue_timeout).max(1))
    }

    /// What the clients of all tasks that have not ended are told while these wait, or run.
    pub fn metrics(&mut self, now: Moment) -> BTreeMap<TaskId, (TaskState, Metrics)> {
        self.count_waits(now);
        let to_u32 = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let mut reported = BTreeMap::new();
        for model in self.queue.models() {
            let forecast = self.make_forecast(now, model);
            let queue_depth = to_u32(self.lane_depth(model));
            let in_order = self.queue.lane(model).map(|lane| lane.in_order()).unwrap_or_default();
            for (position, id) in in_order.into_iter().enumerate() {
                let Some(task) = self.tasks.get(&id) else { continue };
                let predicted_start_ms = forecast.start_of(&id).map(|start| start.millis_since(now));
                let on_time_probability =
                    predicted_start_ms.zip(task.deadline).and_then(|(predicted, deadline)| {
                        self.paces.on_time(predicted, deadline.millis_since(now))
                    });
                let waiting = Waiting::of(position, self.counted_wait(task));
                let metrics = Metrics {
                    queue_position: waiting.queue_position,
                    waiting_for: waiting.waiting_for,
                    predicted_start_ms,
                    queue_depth,
                    on_time_probability,
                    ..self.metrics_of_session(task.session)
                };
                reported.insert(id, (TaskState::Queued, metrics));
            }
        }
        for (_, attempt) in self.attempts.in_order() {
            let Some(task) = self.tasks.get(&attempt.task) else { continue };
            let queue_depth = to_u32(self.lane_depth(&task.model));
            let metrics = Metrics { queue_depth, ..self.metrics_of_session(task.session) };
            reported.insert(attempt.task, (TaskState::Running, metrics));
        }
        reported
    }

    /// The metrics of a task of the session that does not wait.
    fn metrics_of_session(&self, session: Option<SessionKey>) -> Metrics {
        Metrics {
            queue_position: Some(0),
            waiting_for: None,
            predicted_start_ms: None,
            queue_depth: 0,
            on_time_probability: None,
            kv_warmth: session.is_some_and(|session| self.sessions.warm_replica(session).is_some()),
            tokens_budget_remaining: session.and_then(|session| self.sessions.tokens_left(session)),
        }
    }
}
