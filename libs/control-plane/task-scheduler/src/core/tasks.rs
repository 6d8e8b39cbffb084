//! Tasks on their way in and out: admission, the queue, cancels, terminal events.

use pool_registry_types::nearest::nearest;

use super::*;

/// Nodes that a message names.
const MOST_NAMED: usize = 16;
/// Models that a message names, and those on each side of the missing one among which the nearest are
/// looked for. Source: .specs/01 CLOUD-3001.
const MOST_NAMED_MODELS: usize = 8;
const MOST_COMPARED_MODELS: usize = 32;

impl ControlCore {
    /// Returns whom to tell of the task's place once the queue was served.
    pub(super) fn submit(
        &mut self,
        now: Moment,
        to: ReplyTo,
        spec: Arc<TaskSpec>,
        effects: &mut Vec<Effect>,
    ) -> Option<(ReplyTo, TaskId)> {
        if let Some(id) = self.key_of(spec.holder, spec.task_id) {
            let is_same = self.tasks.get(&id).is_some_and(|task| task.digest == spec.digest);
            let answer = if is_same {
                self.counters.attached += 1;
                Ok(Answer::Submitted(self.accepted_body(now, id, false)))
            } else {
                let message = format!("task_id {} is taken by a task with another body", spec.task_id);
                Err(ErrorBody::new(ErrorCode::TaskConflict, message))
            };
            effects.push(Effect::Reply { to, answer });
            return None;
        }
        let id = self.free_key(spec.task_id);
        let admitted = self.admissible(now, &spec).and_then(|dropped| {
            let allowed = match spec.session() {
                // To its client a session is a preference, which no budget comes with.
                Some(session) if spec.passes_on => {
                    self.sessions.join(now, session, id);
                    None
                }
                // Only a completion makes tokens, and knows a bound of them.
                Some(session) if spec.workload == Workload::Completion => {
                    self.sessions.admit(now, session, id, spec.max_tokens)?
                }
                Some(session) => {
                    self.sessions.admit(now, session, id, Some(0))?;
                    None
                }
                None => None,
            };
            Ok((dropped, allowed))
        });
        let (dropped, allowed) = match admitted {
            Ok(admitted) => admitted,
            Err(error) => {
                self.counters.rejected += 1;
                effects.push(Effect::Reply { to, answer: Err(error) });
                return None;
            }
        };
        if let Some(victim) = dropped {
            self.drop_for_a_newer(now, victim, effects);
        }
        let unbounded = allowed.filter(|_| spec.max_tokens.is_none());
        let budget_bound = unbounded.map(|allowed| u32::try_from(allowed).unwrap_or(u32::MAX));
        self.counters.submitted += 1;
        self.ids_given += 1;
        let deadline = spec.deadline_ms.map(|left| now + Duration::from_millis(left));
        let log = LogId(self.next_id());
        let caller = spec.caller.as_ref().map(|caller| caller.name.clone());
        let origin = Origin { correlation_id: spec.trace.correlation_id.clone(), caller };
        let task = Task {
            id: spec.task_id,
            holder: spec.holder,
            log,
            model: spec.model_ref.clone(),
            priority: spec.priority,
            sent: 0,
            unlogged: 0,
            engine_failures: Vec::new(),
            ran: Duration::ZERO,
            predicted_ms: None,
            session: spec.session(),
            continuation: spec.continuation,
            maker: None,
            digest: spec.digest,
            budget_bound,
            origin: Arc::new(origin),
            spec: Some(spec),
            number: self.ids_given,
            admitted: now,
            last_dispatch: None,
            first_token: None,
            stage: Stage::Queued,
            wait_until: Moment::NEVER,
            deadline,
            not_before: now,
            tries: 0,
            engine_deaths: 0,
            tried: Vec::new(),
            lacking: Vec::new(),
            suspect: false,
            rejection: None,
            taken: false,
            attempts: Vec::new(),
            dispatches: 0,
            cancel_waits: Vec::new(),
        };
        // With its log, two changes of its state, a dispatch and the reply: one allocation.
        effects.reserve(5);
        if task.id != id {
            self.renamed.insert((task.id, task.holder), id);
        }
        self.by_number.insert(task.number, id);
        self.tasks.insert(id, Box::new(task));
        effects.push(Effect::OpenLog { task: id, log });
        self.enqueue(now, id, now + self.policy.queue_timeout);
        Some((to, id))
    }

    /// The key of the holder's task of this id.
    fn key_of(&self, holder: HolderId, id: TaskId) -> Option<TaskId> {
        let is_own =
            |key: &TaskId| self.tasks.get(key).is_some_and(|task| (task.holder, task.id) == (holder, id));
        Some(id).filter(is_own).or_else(|| self.renamed.get(&(id, holder)).copied())
    }

    /// A key that no task has: the id itself unless another holder's task goes under it. Nodes know
    /// tasks by their keys, and so tell those of two holders apart.
    fn free_key(&mut self, id: TaskId) -> TaskId {
        let mut key = id;
        while self.tasks.contains_key(&key) {
            key = TaskId(self.next_id());
        }
        key
    }

    /// Whether the task may be queued, and which waiting one has to go for it.
    fn admissible(&mut self, now: Moment, spec: &TaskSpec) -> Result<Option<TaskId>, ErrorBody> {
        let model = &spec.model_ref;
        if self.draining {
            return Err(ErrorBody::new(ErrorCode::Draining, "the control plane is shutting down"));
        }
        let pinned = spec.placement.as_ref().and_then(|constraints| constraints.pinned_node());
        let first = pinned.filter(|_| self.enforces(Rule::PinBeforeLease));
        if let Some(refusal) = first.and_then(|node_id| self.pin_refusal(now, node_id)) {
            return Err(refusal);
        }
        // What a suspect node has is not known until it is back.
        let suspect = |node_id| self.registry.liveness(node_id) == Some(Liveness::Suspect);
        let waits = !self.retired.contains(model) && first.is_some_and(suspect);
        if self.is_gone(now, model) && !waits {
            return Err(self.model_not_available(model));
        }
        if let Some(refusal) = self.engine_refusal(now, spec) {
            return Err(refusal);
        }
        if let Some(refusal) = pinned.and_then(|node_id| self.pin_refusal(now, node_id)) {
            return Err(refusal);
        }
        if let Some(refusal) = self.refusal_to_wait(now, spec) {
            return Err(refusal);
        }
        let reject = |core: &mut Self, label: &str, message: String| {
            let mut error = ErrorBody::new(ErrorCode::AdmissionReject, message);
            error.retry_after_ms = Some(core.backoff_ms(now, model, spec.priority));
            error.policy_label = Some(label.into());
            error
        };
        // Where a task asks for certain pools, the lane's forecast says little about it.
        if let Some(deadline_ms) = spec.deadline_ms.filter(|_| spec.placement.is_none())
            && !self.index.has_free(model)
            // What could be loaded may be faster than the forecast, which knows nothing of it.
            && !self.index.has_loadable(model)
            && let Some(start_ms) = self.next_start_ms(now, model, spec.priority)
            && start_ms > deadline_ms
        {
            let message =
                format!("deadline_ms: {deadline_ms} cannot be met, the task would start after {start_ms} ms");
            return Err(reject(self, "deadline", message));
        }
        if let Some(deadline_ms) = spec.deadline_ms
            && self.index.placeable(model).next().is_none()
            && let Some(estimate) = self.index.load_estimate_ms(model)
            && estimate > deadline_ms
        {
            let message =
                format!("deadline_ms: {deadline_ms} cannot be met, the model loads in {estimate} ms");
            return Err(reject(self, "deadline", message));
        }
        if self.queue.depth(model, spec.priority) < self.policy.admission_capacity {
            return Ok(None);
        }
        let (label, victim) = match self.policy.full_lane {
            FullLane::Reject => ("reject", None),
            FullLane::DropLru => ("drop-lru", self.longest_waiting(model, spec.priority)),
        };
        if victim.is_some() {
            return Ok(victim);
        }
        let full = format!("the queue of {model} holds {} tasks", self.policy.admission_capacity);
        let error = reject(self, label, full);
        self.counters.full += 1;
        Err(error)
    }

    /// What every pool of the model lacks of the task's own words: it would wait for nothing. Pools of
    /// nodes that are offline count until these are forgotten; while nodes may still come back, nothing is
    /// known of what they lack.
    fn engine_refusal(&self, now: Moment, spec: &TaskSpec) -> Option<ErrorBody> {
        if now < self.grace_end() {
            return None;
        }
        let TaskSpec { engines, passes_on, ctx, model_ref, .. } = spec;
        let shape =
            TaskShape { engines: *engines, passes_on: *passes_on, ctx: *ctx, ..TaskShape::plain(model_ref) };
        match self.index.lack(&shape)? {
            Lack::PassesOn => Some(ErrorBody::new(
                ErrorCode::Unsupported,
                "the nodes that have this model are of an older version, which passes no requests on",
            )),
            Lack::Context(longest) => {
                let asked = ctx.unwrap_or_default();
                let message =
                    format!("ctx: {asked} tokens are more than any pool of {model_ref} has ({longest})");
                Some(ErrorBody::new(ErrorCode::ContextTooLong, message))
            }
            Lack::Engine(engine) => {
                // A pool that is gone from its node's report for a moment is not known to lack anything.
                let since = now.before(self.policy.timing.node_timeout);
                let mut lately = self.registry.engines_since(model_ref, since);
                if lately.any(|engine| engines.contains(engine)) {
                    return None;
                }
                Some(unsupported(spec.lacks(engine).unwrap_or("engine"), engine))
            }
        }
    }

    /// The task of the lane that waits longest and has not run yet: what has begun is not dropped.
    fn longest_waiting(&self, model: &ModelRef, priority: Priority) -> Option<TaskId> {
        let fresh = |id: &TaskId| self.tasks.get(id).is_some_and(|task| task.dispatches == 0);
        self.queue.lane(model)?.waiting(priority).find(fresh)
    }

    fn drop_for_a_newer(&mut self, now: Moment, victim: TaskId, effects: &mut Vec<Effect>) {
        self.counters.dropped += 1;
        self.leave_queue(victim);
        let message = "the queue was full, and a newer task came";
        let mut error = ErrorBody::new(ErrorCode::QueueFullDropLru, message);
        error.policy_label = Some("drop-lru".into());
        self.fail(now, victim, error, effects);
    }

    pub(super) fn model_not_available(&self, model: &ModelRef) -> ErrorBody {
        if self.retired.contains(model) {
            return ErrorBody::new(ErrorCode::ModelNotAvailable, format!("model {model} is retired"));
        }
        let mut online = self.registry.online_nodes();
        let mut named: Vec<String> = online.by_ref().take(MOST_NAMED).map(ToString::to_string).collect();
        named.extend(online.next().map(|_| "…".to_owned()));
        let nodes = if named.is_empty() { "none".into() } else { named.join(", ") };
        let beside = self.registry.models_beside(model, MOST_COMPARED_MODELS).map(ModelRef::as_str);
        let models = nearest(model.as_str(), beside, MOST_NAMED_MODELS);
        let models = if models.is_empty() { "none".into() } else { models.join(", ") };
        let message = format!(
            "no node has reported a pool with model {model} lately (models: {models}; online nodes: {nodes})"
        );
        let mut error = ErrorBody::new(ErrorCode::ModelNotAvailable, message);
        // Whoever says a name that nobody has had will not be served later either.
        error.retriable = self.named.contains(model) || self.index.knows(model);
        error
    }

    pub(super) fn enqueue(&mut self, now: Moment, id: TaskId, bound: Moment) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        task.stage = Stage::Queued;
        task.wait_until = task.deadline.map_or(bound, |deadline| deadline.min(bound));
        self.alarms.insert((task.wait_until, id));
        if task.not_before > now {
            self.alarms.insert((task.not_before, id));
        }
        let ask = task.ask(&self.policy);
        self.queue.push(&task.model, task.priority, task.number, id, ask);
        self.dirty.insert(task.model.clone());
        self.touched.insert(id);
        let again = task.last_dispatch.is_some();
        let (model, pinned) = (task.model.clone(), task.pinned_node().cloned());
        self.joined_lane(&model);
        if again {
            self.lane_changed(&model);
        }
        if let Some(node_id) = pinned {
            self.hold_pin(node_id, id);
        }
        self.task_changed(id, TaskState::Queued, None);
    }

    fn task_changed(&mut self, id: TaskId, state: TaskState, node_id: Option<NodeId>) {
        let Some(task) = self.tasks.get(&id) else { return };
        let change = ClusterChange::Task { task_id: task.id, state, node_id };
        self.changes.push((Some(task.holder), change));
    }

    pub(super) fn cancel(&mut self, now: Moment, to: ReplyTo, id: TaskId, effects: &mut Vec<Effect>) {
        let canceled = Ok(Answer::Canceled);
        match self.tasks.get_mut(&id).map(Box::as_mut) {
            None => {
                let error = ErrorBody::new(ErrorCode::NotFound, format!("no task {id}"));
                effects.push(Effect::Reply { to, answer: Err(error) });
            }
            Some(Task { stage: Stage::Ended { .. }, .. }) => {
                effects.push(Effect::Reply { to, answer: canceled });
            }
            Some(Task { stage: Stage::Queued, .. }) => {
                self.leave_queue(id);
                self.fail(now, id, ErrorBody::new(ErrorCode::Canceled, "canceled while queued"), effects);
                effects.push(Effect::Reply { to, answer: canceled });
            }
            Some(task @ Task { stage: Stage::Running(_), .. }) => {
                let Stage::Running(attempt) = task.stage else { unreachable!("matched as running") };
                task.cancel_waits.push(to);
                self.close(now, attempt, CloseReason::Canceled, effects);
            }
        }
    }

    /// The daemon ends: every task that has not ended gets its terminal event.
    pub(super) fn cut_off(&mut self, now: Moment, effects: &mut Vec<Effect>) {
        self.draining = true;
        let queued: Vec<TaskId> =
            self.tasks.in_order().filter(|(_, task)| task.is_queued()).map(|(id, _)| *id).collect();
        for id in queued {
            self.leave_queue(id);
            let error = ErrorBody::new(
                ErrorCode::Draining,
                "the control plane was shut down before the task started",
            );
            self.fail(now, id, error, effects);
        }
        let running: Vec<AttemptId> = self.attempts.in_order().map(|(id, _)| *id).collect();
        self.close_all(now, &running, CloseReason::CutOff, effects);
    }

    pub(super) fn leave_queue(&mut self, id: TaskId) {
        self.release_pin(id);
        let Some(task) = self.tasks.get(&id) else { return };
        self.queue.remove(&task.model, task.priority, task.number, id);
        self.alarms.remove(&(task.wait_until, id));
        self.alarms.remove(&(task.not_before, id));
        let model = task.model.clone();
        self.left_lane(&model);
    }

    /// Ends a task that has no attempt with a terminal error of ours.
    pub(super) fn fail(&mut self, now: Moment, id: TaskId, error: ErrorBody, effects: &mut Vec<Effect>) {
        let state = if error.code == ErrorCode::Canceled {
            self.counters.canceled += 1;
            TaskState::Canceled
        } else {
            self.counters.failed += 1;
            self.counters.worker_resets += u64::from(error.code == ErrorCode::WorkerReset);
            TaskState::Failed
        };
        effects.push(Effect::CloseTask { task: id, error: error.clone() });
        self.finish(now, id, state, Some(error), effects);
    }

    pub(super) fn finish(
        &mut self,
        now: Moment,
        id: TaskId,
        state: TaskState,
        error: Option<ErrorBody>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let code = error.as_ref().map(|error| error.code);
        task.stage = Stage::Ended { at: now, state, error: error.map(Box::new) };
        if let Some(spec) = task.spec.take() {
            let end = TaskEnd {
                key: id,
                spec,
                state,
                code,
                pool: task.attempts.last().map(|attempt| attempt.pool.clone()),
                attempts: task.dispatches,
                queue_wait_ms: task.last_dispatch.unwrap_or(now).millis_since(task.admitted),
                first_token_ms: task.first_token.map(|at| at.millis_since(task.admitted)),
                elapsed_ms: now.millis_since(task.admitted),
                sent: task.sent,
            };
            effects.push(Effect::Note(Note::TaskEnded(Box::new(end))));
        }
        self.touched.insert(id);
        if let Some(session) = task.session {
            self.sessions.ended(now, session, id, task.sent.saturating_add(task.unlogged), task.ran);
        }
        let node_id = task.attempts.last().map(|attempt| attempt.pool.node_id.clone());
        for to in std::mem::take(&mut task.cancel_waits) {
            effects.push(Effect::Reply { to, answer: Ok(Answer::Canceled) });
        }
        self.task_changed(id, state, node_id);
        self.ended.push_back((now, id));
        if self.ended.len() > self.policy.retained_tasks {
            self.forget_oldest(effects);
        }
    }

    pub(super) fn forget_oldest(&mut self, effects: &mut Vec<Effect>) {
        if let Some((_, id)) = self.ended.pop_front() {
            if let Some(task) = self.tasks.remove(&id) {
                self.by_number.remove(&task.number);
                self.renamed.remove(&(task.id, task.holder));
            }
            self.touched.insert(id);
            effects.push(Effect::Forget { task: id });
        }
    }
}
