//! Serving the queue: the oldest task for which there is a slot starts.

use super::*;

impl ControlCore {
    /// Starts what can start, in the lanes that a slot or a task has stirred.
    pub(super) fn place(&mut self, now: Moment, effects: &mut Vec<Effect>) {
        let mut models: Vec<ModelRef> = std::mem::take(&mut self.stirred).into_iter().collect();
        models.retain(|model| self.queue.lane(model).is_some());
        models.sort_by_key(|model| self.queue.oldest(model));
        for model in models {
            while let Some((id, pool)) = self.next_start(now, &model) {
                self.start(now, id, pool, effects);
            }
        }
        // Starting tasks changes pools, which stirs lanes that were just served.
        self.stirred.clear();
    }

    /// The oldest task, in the order of priorities, for which there is a slot.
    pub(super) fn next_start(&self, now: Moment, model: &ModelRef) -> Option<(TaskId, PoolKey)> {
        let lane = self.queue.lane(model)?;
        if !self.index.has_free(model) {
            return None;
        }
        lane.order().into_iter().flat_map(|priority| lane.waiting(priority)).find_map(|id| {
            let shape = shape(self.tasks.get(&id)?, now)?;
            Some((id, choose(&self.index, &shape).ok()?.pool))
        })
    }

    pub(super) fn start(&mut self, now: Moment, id: TaskId, pool: PoolKey, effects: &mut Vec<Effect>) {
        let attempt = AttemptId(self.next_id());
        let Some((address, boot_id)) = self.registry.address(&pool.node_id) else { return };
        let address = address.to_owned();
        self.leave_queue_to_start(id);
        let deadlines = self.deadlines(id);
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let Some(request) = task.request.clone() else { return };
        task.stage = Stage::Running(attempt);
        task.last_dispatch = Some(now);
        task.dispatches += 1;
        task.attempts.push(AttemptRecord {
            id: attempt,
            pool: pool.clone(),
            replica: None,
            outcome: "running".into(),
        });
        effects.push(Effect::Dispatch(Box::new(Dispatch {
            task: id,
            attempt,
            log: task.log,
            pool: pool.clone(),
            address,
            boot_id,
            first_index: 0,
            attempt_number: task.dispatches,
            queue_wait_ms: now.millis_since(task.admitted),
            deadlines,
            task_deadline: task.deadline,
            request,
        })));
        self.counters.dispatched += 1;
        self.attempts.insert(
            attempt,
            Attempt { task: id, pool: pool.clone(), dispatched: now, closing: None, vanishing: false },
        );
        self.registry.reserve(&pool, attempt);
        self.sync_pool(&pool);
    }

    pub(super) fn leave_queue_to_start(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get(&id) else { return };
        self.queue.start(&task.model, task.priority, task.number, id);
        self.alarms.remove(&(task.wait_until, id));
        self.alarms.remove(&(task.not_before, id));
    }

    pub(super) fn deadlines(&self, id: TaskId) -> AttemptDeadlines {
        if !self.enforces(Rule::AttemptDeadlines) {
            return AttemptDeadlines::UNBOUNDED;
        }
        let asked = self.tasks.get(&id).and_then(|task| task.request.as_ref()?.timeouts).unwrap_or_default();
        let or = |asked: Option<u64>, default: Duration| asked.map_or(default, Duration::from_millis);
        AttemptDeadlines {
            acceptance: ACCEPTANCE_TIMEOUT,
            first_token: or(asked.first_token_ms, self.policy.first_token_timeout),
            token_idle: or(asked.token_idle_ms, self.policy.token_idle_timeout),
            silence: SILENCE_TIMEOUT,
        }
    }

    pub(super) fn next_id(&mut self) -> Uuid {
        self.ids_given += 1;
        let mut bytes = [0_u8; 16];
        bytes[..8].copy_from_slice(&self.incarnation.to_be_bytes());
        bytes[8..].copy_from_slice(&self.ids_given.to_be_bytes());
        Uuid::new_v8(bytes)
    }
}

pub(super) fn shape(task: &Task, now: Moment) -> Option<TaskShape<'_>> {
    let request = task.request.as_ref()?;
    Some(TaskShape {
        model: &task.model,
        engine: request.required_engine(),
        ctx: request.ctx,
        tried: &task.tried,
        may_repeat: task.not_before <= now,
    })
}
