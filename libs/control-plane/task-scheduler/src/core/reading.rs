//! What readers and metrics see.

use super::*;

impl ControlCore {
    pub(super) fn accepted_body(&self, id: TaskId) -> TaskAccepted {
        let task = &self.tasks[&id];
        let position = match task.stage {
            Stage::Queued => self.queue.position(&task.model, task.priority, task.number),
            Stage::Running(_) | Stage::Ended { .. } => 0,
        };
        let queued = matches!(task.stage, Stage::Queued);
        TaskAccepted {
            task_id: id,
            queue_position: u32::try_from(position).unwrap_or(u32::MAX),
            predicted_start_ms: if queued { self.predict_ms(&task.model, position + 1) } else { Some(0) },
            backoff_ms: if queued { self.backoff_ms(&task.model) } else { 0 },
            streams: TaskStreams { sse: routes::TASK_EVENTS.replace("{id}", &id.to_string()) },
        }
    }

    /// Milliseconds until `starts` more tasks of the model have started, by the mean service
    /// time and the slots there are; nothing before either is known.
    pub(super) fn predict_ms(&self, model: &ModelRef, starts: usize) -> Option<u64> {
        let mean = *self.service_ms.get(model)?;
        let slots = self.index.slots_of(model);
        if slots == 0 {
            return None;
        }
        let predicted = mean * starts as f64 / f64::from(slots);
        Some(Duration::try_from_secs_f64(predicted / 1e3).map_or(u64::MAX, millis))
    }

    pub(super) fn backoff_ms(&self, model: &ModelRef) -> u64 {
        self.predict_ms(model, 1).unwrap_or(DEFAULT_BACKOFF_MS)
    }

    /// The nodes as of now.
    pub fn view(&self, now: Moment) -> ClusterView {
        self.registry.view(now)
    }

    pub fn task_view(&self, now: Moment, id: TaskId) -> Option<TaskView> {
        let task = self.tasks.get(&id)?;
        let (state, end, error) = match &task.stage {
            Stage::Queued => (TaskState::Queued, now, None),
            Stage::Running(_) => (TaskState::Running, now, None),
            Stage::Ended { at, state, error } => (*state, *at, error.clone()),
        };
        let queued = state == TaskState::Queued;
        let position = self.queue.position(&task.model, task.priority, task.number);
        let wait_end = if queued { now } else { task.last_dispatch.unwrap_or(end) };
        let attempts = task.attempts.iter().map(|record| AttemptView {
            attempt_id: record.id,
            node_id: record.pool.node_id.clone(),
            pool_id: record.pool.pool_id.clone(),
            replica_id: record.replica.clone(),
            outcome: record.outcome.clone(),
        });
        Some(TaskView {
            task_id: id,
            log_id: task.log,
            model_ref: task.model.clone(),
            priority: task.priority,
            state,
            queue_position: queued.then(|| u32::try_from(position).unwrap_or(u32::MAX)),
            queue_wait_ms: wait_end.millis_since(task.admitted),
            elapsed_ms: end.millis_since(task.admitted),
            attempts: attempts.collect(),
            error,
        })
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Waiting tasks of each lane and priority.
    pub fn queue_depths(&self) -> Vec<(ModelRef, Priority, usize)> {
        let of = |model: &ModelRef, priority| (model.clone(), priority, self.queue.depth(model, priority));
        self.queue.models().flat_map(|m| [of(m, Priority::Interactive), of(m, Priority::Batch)]).collect()
    }

    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    pub fn running(&self) -> usize {
        self.attempts.len()
    }

    /// Where an attempt that has not ended runs.
    pub fn attempt_pool(&self, attempt: &AttemptId) -> Option<&PoolKey> {
        self.attempts.get(attempt).map(|attempt| &attempt.pool)
    }

    pub fn is_draining(&self) -> bool {
        self.draining
    }
}
