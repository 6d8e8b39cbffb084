//! What readers and metrics see.

use super::*;

impl ControlCore {
    /// `first`: the task has just come, and what it is told now is held against what becomes of it.
    pub(super) fn accepted_body(&mut self, now: Moment, id: TaskId, first: bool) -> TaskAccepted {
        let task = &self.tasks[&id];
        let (queued, model, priority) = (task.is_queued(), task.model.clone(), task.priority);
        let position = if queued { self.queue.position(&model, task.priority, task.number) } else { 0 };
        let predicted_start_ms = if queued { self.predict_ms(now, id) } else { Some(0) };
        if first
            && queued
            && let Some(task) = self.tasks.get_mut(&id)
        {
            task.predicted_ms = predicted_start_ms;
        }
        let sse = routes::task_events(id);
        TaskAccepted {
            task_id: id,
            queue_position: u32::try_from(position).unwrap_or(u32::MAX),
            predicted_start_ms,
            backoff_ms: if queued { self.backoff_ms(now, &model, priority) } else { 0 },
            streams: TaskStreams { sse_verbose: format!("{sse}?verbose=true"), sse },
        }
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

    /// The tasks that the filter lets through, newest first, after the one named; `at_most` of them.
    pub fn task_page(
        &self,
        now: Moment,
        filter: &TaskFilter,
        after: Option<TaskId>,
        at_most: usize,
    ) -> Result<TaskPage, ErrorBody> {
        let below = match after {
            None => u64::MAX,
            Some(id) => match self.tasks.get(&id) {
                Some(task) => task.number,
                None => {
                    let message = format!("after: task {id} is not kept any more");
                    return Err(ErrorBody::new(ErrorCode::NotFound, message));
                }
            },
        };
        let mut page = TaskPage::default();
        for id in self.by_number.range(..below).rev().map(|(_, id)| *id) {
            let Some(task) = self.tasks.get(&id) else { continue };
            if !filter.lets_through(task) {
                continue;
            }
            if page.tasks.len() == at_most {
                page.next = page.tasks.last().map(|last| last.task_id);
                break;
            }
            page.tasks.push(TaskSummary {
                task_id: id,
                model_ref: task.model.clone(),
                priority: task.priority,
                state: task.state(),
                node_id: task.last_node().cloned(),
                session_id: task.session,
                attempts: task.dispatches,
                age_ms: now.millis_since(task.admitted),
            });
        }
        Ok(page)
    }

    /// What each pool says to a task that is known, or nothing for one that is not. Errors:
    /// `NOT_FOUND` for one whose request is not kept any more.
    pub fn explain_task(&self, now: Moment, id: TaskId) -> Result<Explanation, ErrorBody> {
        let task = self.tasks.get(&id);
        let task = task.ok_or_else(|| ErrorBody::new(ErrorCode::NotFound, format!("no task {id}")))?;
        let spread = task.request.as_ref().and_then(|request| self.spread_of(task.session, request));
        let shape = self.shape(now, task, spread.as_ref()).ok_or_else(|| {
            ErrorBody::new(ErrorCode::NotFound, format!("task {id} has ended: its request is not kept"))
        })?;
        Ok(self.explanation(Some(id), &shape))
    }

    /// The same for a request that nobody has submitted.
    pub fn explain_request(&self, request: &TaskRequest) -> Explanation {
        let spread = self.spread_of(request.session_id, request);
        self.explanation(None, &self.shape_of(request, request.session_id, spread.as_ref()))
    }

    fn explanation(&self, task_id: Option<TaskId>, shape: &TaskShape<'_>) -> Explanation {
        let choice = choose(&self.index, shape);
        let is = |of: fn(&pool_registry_types::placement::Wishes, &PoolKey) -> bool, key: &PoolKey| {
            shape.wishes.is_some_and(|wishes| of(wishes, key))
        };
        let pools = explain(&self.index, shape).map(|verdict| {
            let candidate = verdict.candidate;
            PoolVerdict {
                node_id: candidate.key.node_id.clone(),
                pool_id: candidate.key.pool_id.clone(),
                engine: candidate.engine,
                eligible: verdict.refusal.is_none(),
                refusal: verdict.refusal,
                preferred: is(|wishes, key| wishes.prefers(key), &candidate.key),
                avoided: is(|wishes, key| wishes.avoids(key), &candidate.key),
                warm: shape.warm == Some(&candidate.key),
                slots_total: candidate.slots_total,
                slots_busy: candidate.slots_busy,
                vram_free_bytes: candidate.vram_free_bytes,
            }
        });
        Explanation {
            task_id,
            model_ref: shape.model.clone(),
            pools: pools.collect(),
            reason: choice.as_ref().err().map(ToString::to_string),
            choice: choice.ok().map(|choice| PoolName::from(&choice.pool)),
        }
    }

    pub fn session_view(&self, now: Moment, id: SessionId) -> Option<SessionView> {
        self.sessions.view(now, id)
    }

    pub fn session_count(&self) -> usize {
        self.sessions.len()
    }

    /// Tokens a second of one slot of each pool that was measured.
    pub fn paces(&self) -> Vec<(PoolKey, f64)> {
        self.paces.tokens_per_second().map(|(pool, pace)| (pool.clone(), pace)).collect()
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    pub fn registry(&self) -> &ServiceRegistry {
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

/// Which tasks a list shows.
#[derive(Debug, Clone, Default)]
pub struct TaskFilter {
    pub state: Option<TaskState>,
    /// Of the last attempt.
    pub node_id: Option<NodeId>,
    pub model: Option<ModelRef>,
}

impl TaskFilter {
    fn lets_through(&self, task: &Task) -> bool {
        self.state.is_none_or(|state| state == task.state())
            && self.model.as_ref().is_none_or(|model| *model == task.model)
            && self.node_id.as_ref().is_none_or(|node_id| task.last_node() == Some(node_id))
    }
}

impl Task {
    pub(super) fn state(&self) -> TaskState {
        match &self.stage {
            Stage::Queued => TaskState::Queued,
            Stage::Running(_) => TaskState::Running,
            Stage::Ended { state, .. } => *state,
        }
    }

    fn last_node(&self) -> Option<&NodeId> {
        self.attempts.last().map(|attempt| &attempt.pool.node_id)
    }
}
