//! What readers and metrics see.

use super::waiting::Waiting;
use super::*;

impl ControlCore {
    /// `first`: the task has just come, and what it is told now is held against what becomes of it.
    pub(super) fn accepted_body(&mut self, now: Moment, id: TaskId, first: bool) -> TaskAccepted {
        let task = self.tasks.get(&id).expect("a task that was just found or admitted");
        let (queued, model, priority) = (task.is_queued(), task.model.clone(), task.priority);
        let position = if queued { self.queue.position(&model, task.priority, task.number) } else { 0 };
        let waiting = if queued {
            Waiting::of(position, self.count_wait(now, id))
        } else {
            Waiting { queue_position: Some(0), waiting_for: None }
        };
        let could_start = waiting.queue_position.is_some();
        let (predicted_start_ms, backoff_ms) = match (queued, could_start) {
            (false, _) => (Some(0), 0),
            (true, true) => (self.predict_ms(now, id), self.backoff_ms(now, &model, priority)),
            (true, false) => (None, self.stuck_backoff_ms()),
        };
        if first
            && queued
            && let Some(task) = self.tasks.get_mut(&id)
        {
            task.predicted_ms = predicted_start_ms;
        }
        let id = self.tasks.get(&id).map_or(id, |task| task.id);
        let sse = routes::task_events(id);
        TaskAccepted {
            task_id: id,
            queue_position: waiting.queue_position,
            waiting_for: waiting.waiting_for,
            predicted_start_ms,
            backoff_ms,
            streams: TaskStreams { sse_verbose: format!("{sse}?verbose=true"), sse },
        }
    }

    /// The nodes as of now; only what has changed since the last time is made anew.
    pub fn snapshot(&mut self, now: Moment) -> ClusterSnapshot {
        self.registry.snapshot(now)
    }

    /// The same, all of it made anew: what a snapshot is held against.
    pub fn view(&self, now: Moment) -> ClusterView {
        self.registry.view(now)
    }

    /// The task as it is now; nothing for one that is not kept.
    pub fn record(&self, id: TaskId) -> Option<TaskRecord> {
        let task = self.tasks.get(&id)?;
        let (end, error) = match &task.stage {
            Stage::Queued | Stage::Running(_) => (None, None),
            Stage::Ended { at, error, .. } => (Some(*at), error.clone()),
        };
        let attempts = task.attempts.iter().map(|record| AttemptView {
            attempt_id: record.id,
            node_id: record.pool.node_id.clone(),
            pool_id: record.pool.pool_id.clone(),
            replica_id: record.replica.clone(),
            outcome: record.outcome.clone().into_owned(),
        });
        let waiting = task.is_queued().then(|| {
            let position = self.queue.position(&task.model, task.priority, task.number);
            Waiting::of(position, self.answered_wait(task))
        });
        Some(TaskRecord {
            key: id,
            id: task.id,
            holder: task.holder,
            number: task.number,
            waiting,
            log: task.log,
            model: task.model.clone(),
            priority: task.priority,
            origin: Arc::clone(&task.origin),
            session: task.session.map(|session| session.session_id),
            state: task.state(),
            admitted: task.admitted,
            last_dispatch: task.last_dispatch,
            end,
            error,
            dispatches: task.dispatches,
            attempts: attempts.collect(),
        })
    }

    /// The keys of the tasks and the sessions that have come, gone or changed since the last time.
    pub fn take_changed(&mut self) -> (BTreeSet<TaskId>, BTreeSet<SessionKey>) {
        (std::mem::take(&mut self.touched), self.sessions.take_changed())
    }

    /// What each pool says to a task that is known, or nothing for one that is not. Errors:
    /// `NOT_FOUND` for one that has ended.
    pub fn explain_task(&self, now: Moment, id: TaskId) -> Result<Explanation, ErrorBody> {
        let gone = || ErrorBody::new(ErrorCode::NotFound, "the task is not kept any more");
        let task = self.tasks.get(&id).ok_or_else(gone)?;
        let spread = task.spec.as_ref().and_then(|spec| self.spread_of(task.session, spec));
        let shape = self.shape(now, task, spread.as_ref()).ok_or_else(|| {
            let message = format!("task {} has ended: its request is not kept", task.id);
            ErrorBody::new(ErrorCode::NotFound, message)
        })?;
        Ok(self.explanation(Some(task.id), &shape))
    }

    /// The same for a task that nobody has submitted.
    pub fn explain_request(&self, spec: &TaskSpec) -> Explanation {
        let spread = self.spread_of(spec.session(), spec);
        self.explanation(None, &self.shape_of(spec, spec.session(), spread.as_ref()))
    }

    fn explanation(&self, task_id: Option<TaskId>, shape: &TaskShape<'_>) -> Explanation {
        let choice = choose(&self.index, shape);
        let is =
            |of: fn(&pool_registry_types::placement::PlacementConstraints, &PoolKey) -> bool,
             key: &PoolKey| { shape.constraints.is_some_and(|constraints| of(constraints, key)) };
        let pools = explain(&self.index, shape).map(|verdict| {
            let candidate = verdict.candidate;
            PoolVerdict {
                node_id: candidate.key.node_id.clone(),
                pool_id: candidate.key.pool_id.clone(),
                engine: candidate.engine,
                eligible: verdict.refusal.is_none(),
                refusal: verdict.refusal,
                preferred: is(|constraints, key| constraints.prefers(key), &candidate.key),
                avoided: is(|constraints, key| constraints.avoids(key), &candidate.key),
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

    pub fn session_view(&self, now: Moment, id: SessionKey) -> Option<SessionView> {
        self.sessions.view(now, id)
    }

    /// Whether the session is there and none of its tasks is open.
    pub fn session_is_idle(&self, id: SessionKey) -> bool {
        self.sessions.is_idle(id)
    }

    pub fn session_count(&self) -> usize {
        self.sessions.len()
    }

    /// Tokens a second of one slot of each pool that was measured.
    pub fn paces(&self) -> Vec<(PoolKey, f64)> {
        self.paces.tokens_per_second().map(|(pool, pace)| (pool.clone(), pace)).collect()
    }

    pub fn heartbeat_interval(&self) -> Duration {
        self.policy.timing.heartbeat_interval
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

/// What readers see of a task: as it was when it last changed.
#[derive(Debug, Clone)]
pub struct TaskRecord {
    /// What it goes by within the cluster; mostly its id.
    pub key: TaskId,
    /// As its holder knows it.
    pub id: TaskId,
    pub holder: HolderId,
    /// Rises from task to task.
    pub number: u64,
    /// As it was when it came to wait, if it does.
    pub waiting: Option<Waiting>,
    log: LogId,
    model: ModelRef,
    priority: Priority,
    origin: Arc<Origin>,
    session: Option<pool_registry_types::SessionId>,
    pub state: TaskState,
    admitted: Moment,
    last_dispatch: Option<Moment>,
    end: Option<Moment>,
    error: Option<Box<ErrorBody>>,
    dispatches: u32,
    attempts: Vec<AttemptView>,
}

impl TaskRecord {
    /// `waiting` is for a task that waits.
    pub fn view(&self, now: Moment, waiting: Option<Waiting>) -> TaskView {
        let end = self.end.unwrap_or(now);
        let queued = self.state == TaskState::Queued;
        let Waiting { queue_position, waiting_for } = waiting.filter(|_| queued).unwrap_or_default();
        let wait_end = if queued { now } else { self.last_dispatch.unwrap_or(end) };
        TaskView {
            task_id: self.id,
            log_id: self.log,
            model_ref: self.model.clone(),
            priority: self.priority,
            state: self.state,
            queue_position,
            waiting_for,
            queue_wait_ms: wait_end.millis_since(self.admitted),
            elapsed_ms: end.millis_since(self.admitted),
            attempts: self.attempts.clone(),
            error: self.error.as_deref().cloned(),
            // Tokens never pass through the core.
            tokens_in: None,
            tokens_out: None,
            finish_reason: None,
            holder: None,
            correlation_id: self.correlation_id(),
            caller: self.origin.caller.clone(),
        }
    }

    /// Its attempts that are kept, running or not.
    pub fn attempts(&self) -> impl Iterator<Item = AttemptId> + '_ {
        self.attempts.iter().map(|attempt| attempt.attempt_id)
    }

    fn summary(&self, now: Moment, holder: Option<String>) -> TaskSummary {
        TaskSummary {
            task_id: self.id,
            model_ref: self.model.clone(),
            priority: self.priority,
            state: self.state,
            node_id: self.last_node().cloned(),
            session_id: self.session,
            attempts: self.dispatches,
            age_ms: now.millis_since(self.admitted),
            holder,
            correlation_id: self.correlation_id(),
            caller: self.origin.caller.clone(),
        }
    }

    fn correlation_id(&self) -> Option<String> {
        Some(self.origin.correlation_id.clone()).filter(|id| !id.is_empty())
    }

    fn last_node(&self) -> Option<&NodeId> {
        self.attempts.last().map(|attempt| &attempt.node_id)
    }
}

/// All tasks that are kept, oldest first.
#[derive(Debug, Clone, Default)]
pub struct TaskList(pub Vec<Arc<TaskRecord>>);

impl TaskList {
    /// The tasks that the filter lets through, newest first, those from the number on left out;
    /// `at_most` of them, each with what the name of its holder is for whoever asks. Where tasks of all
    /// holders are listed, the next page begins behind a key.
    pub fn page(
        &self,
        now: Moment,
        filter: &TaskFilter,
        below: u64,
        at_most: usize,
        name: impl Fn(HolderId) -> Option<String>,
    ) -> TaskPage {
        let older = self.0.partition_point(|task| task.number < below);
        let mut found = self.0[..older].iter().rev().filter(|task| filter.lets_through(task));
        let shown: Vec<_> = found.by_ref().take(at_most).collect();
        let next = found.next().and(shown.last());
        let next = next.map(|last| if filter.holder.is_some() { last.id } else { last.key });
        let tasks = shown.into_iter().map(|task| task.summary(now, name(task.holder))).collect();
        TaskPage { tasks, next }
    }
}

/// Which tasks a list shows.
#[derive(Debug, Clone, Default)]
pub struct TaskFilter {
    /// Whose tasks; absent: everybody's.
    pub holder: Option<HolderId>,
    pub state: Option<TaskState>,
    /// Of the last attempt.
    pub node_id: Option<NodeId>,
    pub model: Option<ModelRef>,
    /// The name of the token that the task was submitted with.
    pub caller: Option<String>,
    pub correlation_id: Option<String>,
}

impl TaskFilter {
    fn lets_through(&self, task: &TaskRecord) -> bool {
        self.holder.is_none_or(|holder| holder == task.holder)
            && self.state.is_none_or(|state| state == task.state)
            && self.model.as_ref().is_none_or(|model| *model == task.model)
            && self.caller.as_ref().is_none_or(|caller| task.origin.caller.as_ref() == Some(caller))
            && self.correlation_id.as_ref().is_none_or(|id| task.origin.correlation_id == *id)
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
}
