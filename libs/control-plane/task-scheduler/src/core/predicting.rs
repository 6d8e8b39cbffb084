//! When a waiting task will start, from the paces that were measured.

use super::*;

/// How long a forecast is used before it is made anew.
const FORECAST_FOR: Duration = Duration::from_millis(100);
/// Lanes with a forecast at a time; a forecast is cheap to make again.
const MAX_FORECASTS: usize = 256;

impl ControlCore {
    /// Milliseconds from dispatch to end that the task will take on the pool.
    fn service_ms(&self, pool: &PoolKey, id: TaskId) -> Option<f64> {
        let task = self.tasks.get(&id)?;
        let request = task.request.as_ref()?;
        let tokens = self.paces.tokens(&task.model, request.expected_tokens, request.max_tokens)?;
        self.paces.service_ms(pool, &task.model, tokens)
    }

    /// The forecast of a lane, at most [`FORECAST_FOR`] old.
    fn forecast(&mut self, now: Moment, model: &ModelRef) -> &mut Forecast {
        let fresh = self.forecasts.get(model).is_some_and(|known| now.since(known.made) < FORECAST_FOR);
        if !fresh {
            if self.forecasts.len() >= MAX_FORECASTS {
                self.forecasts.clear();
            }
            let made = self.make_forecast(now, model);
            self.forecasts.insert(model.clone(), made);
        }
        self.forecasts.get_mut(model).expect("made above")
    }

    fn make_forecast(&self, now: Moment, model: &ModelRef) -> Forecast {
        let mut busy: BTreeMap<&PoolKey, Vec<f64>> = BTreeMap::new();
        for attempt in self.attempts.values() {
            if let Some(service) = self.service_ms(&attempt.pool, attempt.task) {
                let left = remaining_ms(service, now.millis_since(attempt.dispatched));
                busy.entry(&attempt.pool).or_default().push(left);
            }
        }
        let mut forecast = Forecast::new(now);
        let waiting = u32::try_from(self.lane_depth(model) + 1).unwrap_or(u32::MAX);
        for candidate in self.index.placeable(model) {
            let taken = busy.remove(&candidate.key).unwrap_or_default();
            let free = candidate.slots_total.saturating_sub(candidate.slots_busy);
            // More free slots than tasks that wait make no difference, and a node may say any number.
            let free = (0..free.min(waiting)).map(|_| 0.0);
            // Slots that somebody else has are not counted on.
            forecast.pool(candidate.key.clone(), taken.into_iter().chain(free));
        }
        for id in self.queue.lane(model).map(|lane| lane.in_order()).unwrap_or_default() {
            // Who wishes for certain pools may wait for them while others are idle.
            let has_wishes = |task: &Task| task.request.as_ref().is_some_and(|r| r.placement.is_some());
            if !self.tasks.get(&id).is_some_and(has_wishes) {
                forecast.start(id, |pool| self.service_ms(pool, id));
            }
        }
        forecast
    }

    fn lane_depth(&self, model: &ModelRef) -> usize {
        Priority::BOTH.iter().map(|priority| self.queue.depth(model, *priority)).sum()
    }

    /// Milliseconds until the waiting task starts; nothing before a pace was measured.
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
            let place = lane.place(priority, lane.waiting(priority).count());
            lane.in_order().get(place).copied()
        });
        let forecast = self.forecast(now, model);
        let start = pushed_back.and_then(|id| forecast.start_of(&id)).or_else(|| forecast.next_start())?;
        Some(start.millis_since(now))
    }

    pub(super) fn backoff_ms(&mut self, now: Moment, model: &ModelRef, priority: Priority) -> u64 {
        self.next_start_ms(now, model, priority).unwrap_or(DEFAULT_BACKOFF_MS).max(1)
    }

    /// What a client is told while its task waits, or runs; nothing once it has ended.
    pub fn metrics(&mut self, now: Moment, id: TaskId) -> Option<(TaskState, Metrics)> {
        let task = self.tasks.get(&id)?;
        let state = task.state();
        if matches!(task.stage, Stage::Ended { .. }) {
            return None;
        }
        let (session, deadline) = (task.session, task.deadline);
        let queued = task.is_queued();
        let position = if queued { self.queue.position(&task.model, task.priority, task.number) } else { 0 };
        let depth = self.lane_depth(&task.model);
        let to_u32 = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let predicted_start_ms = if queued { self.predict_ms(now, id) } else { None };
        let on_time_probability = predicted_start_ms
            .zip(deadline)
            .and_then(|(predicted, deadline)| self.paces.on_time(predicted, deadline.millis_since(now)));
        let metrics = Metrics {
            queue_position: to_u32(position),
            predicted_start_ms,
            queue_depth: to_u32(depth),
            on_time_probability,
            kv_warmth: session.is_some_and(|session| self.sessions.warm_place(session).is_some()),
            tokens_budget_remaining: session.and_then(|session| self.sessions.tokens_left(session)),
        };
        Some((state, metrics))
    }
}
