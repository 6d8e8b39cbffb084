//! Serving the queue: the oldest task for which there is a slot starts.

use super::*;

impl ControlCore {
    /// Starts what can start, in the lanes that a slot or a task has made dirty.
    pub(super) fn place(&mut self, now: Moment, effects: &mut Vec<Effect>) {
        if self.short_until.is_some() {
            // It would fail as the last one did; all lanes are served when this is over.
            return;
        }
        let mut models: Vec<ModelRef> = std::mem::take(&mut self.dirty).into_iter().collect();
        models.retain(|model| self.queue.lane(model).is_some());
        models.sort_by_key(|model| self.queue.oldest(model));
        for model in models {
            while let Some((id, choice)) = self.next_start(now, &model) {
                if self.may_repeat_there(now, id, &choice, effects) {
                    self.start(now, id, choice, effects);
                }
            }
            if self.queue.lane(&model).is_some() {
                self.ask_to_load(now, &model, effects);
            }
        }
        // Starting tasks changes pools, which makes lanes dirty that were just served.
        self.dirty.clear();
    }

    /// The oldest task, in the order of priorities, for which there is a slot.
    pub(super) fn next_start(&mut self, now: Moment, model: &ModelRef) -> Option<(TaskId, Choice)> {
        if !self.index.has_free(model) {
            return None;
        }
        self.queue.lane_mut(model)?.groups.review(&self.index, model);
        let lane = self.queue.lane(model)?;
        for next in lane.order().into_iter().flat_map(|priority| lane.groups.oldest_first(priority)) {
            let id = match next {
                Next::Group(_, eligible) if !self.index.has_free_of(model, eligible) => continue,
                Next::Group(id, _) | Next::OnItsOwn(id) => id,
            };
            let Some(task) = self.tasks.get(&id) else { continue };
            let Some(spec) = task.spec.as_deref() else { continue };
            if task.pinned_node().is_some_and(|node_id| !self.has_free_on(node_id)) {
                continue;
            }
            let spread = self.spread_of(task.session, spec);
            let Some(shape) = self.shape(now, task, spread.as_ref()) else { continue };
            if let Ok(choice) = choose(&self.index, &shape) {
                return Some((id, choice));
            }
        }
        None
    }

    /// What the task asks of a pool.
    pub(super) fn shape<'a>(
        &'a self,
        now: Moment,
        task: &'a Task,
        spread: Option<&'a Spread>,
    ) -> Option<TaskShape<'a>> {
        let spec = task.spec.as_deref()?;
        let shape = self.shape_of(spec, task.session, spread);
        let engines = self.engines_of(task, spec);
        let may_repeat = task.not_before <= now;
        let apart = task.suspect && self.enforces(Rule::SuspectsApart);
        let apart_from: &[PoolKey] = if apart { &self.suspects_at } else { &[] };
        Some(TaskShape {
            engines,
            tried: &task.tried,
            lacking: &task.lacking,
            apart_from,
            may_repeat,
            ..shape
        })
    }

    pub(super) fn shape_of<'a>(
        &'a self,
        spec: &'a TaskSpec,
        session: Option<SessionKey>,
        spread: Option<&'a Spread>,
    ) -> TaskShape<'a> {
        let warm = session.filter(|_| spec.kv_hint == KvHint::Reuse);
        TaskShape {
            engines: spec.engines,
            passes_on: spec.passes_on,
            ctx: spec.ctx,
            constraints: spec.placement.as_ref().filter(|_| self.enforces(Rule::PinsHold)),
            warm: warm.and_then(|session| self.sessions.warm_replica(session)).map(|place| &place.pool),
            spread,
            draw: self.draw(),
            ..TaskShape::plain(&spec.model_ref)
        }
    }

    /// Whether any pool of the node takes tasks and has a free slot.
    fn has_free_on(&self, node_id: &NodeId) -> bool {
        self.pools_of(node_id)
            .any(|pool| pool.availability == Availability::Placeable && pool.has_free_slot())
    }

    /// Where the running tasks of the session are, by the label that the task spreads by.
    pub(super) fn spread_of(&self, session: Option<SessionKey>, spec: &TaskSpec) -> Option<Spread> {
        let spread_by = spec.placement.as_ref()?.spread_by.as_ref()?;
        let mut spread = Spread::new();
        for node_id in self.sessions.running_on(session?) {
            let value = self.registry.labels(node_id).and_then(|labels| labels.get(spread_by)).cloned();
            *spread.entry(value).or_default() += 1;
        }
        Some(spread)
    }

    /// The next number of the random strategy: another one after each dispatch.
    fn draw(&self) -> u64 {
        // SplitMix64: neighbouring counts give unrelated numbers.
        let mut z = self.incarnation ^ self.ids_given.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn start(&mut self, now: Moment, id: TaskId, choice: Choice, effects: &mut Vec<Effect>) {
        let attempt = AttemptId(self.next_id());
        let pool = &choice.pool;
        let Some((address, boot_id)) = self.registry.address(&pool.node_id) else { return };
        let maker = self.maker_on(pool, self.tasks.get(&id).map(|task| &task.model));
        let address = address.to_owned();
        self.leave_queue_to_start(id);
        let Some(spec) = self.tasks.get(&id).and_then(|task| task.spec.clone()) else { return };
        let mut deadlines = self.deadlines(&spec);
        let at_the_log = self.enforces(Rule::ContinueAtTheLog);
        let stops_overdue = self.enforces(Rule::OverdueIsStopped);
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let first_index = if at_the_log { task.sent } else { 0 };
        let resume = task.continuation.filter(|_| task.sent > 0);
        if resume == Some(ResumeMode::Replay) && !spec.passes_on {
            // What was sent has to be made again before the first new token can come; where it is passed on,
            // each is seen.
            deadlines.first_token += task.ran;
        }
        let waited = now.millis_since(task.admitted);
        if let Some(predicted) = task.predicted_ms.take() {
            self.paces.record_outcome(predicted, waited);
        }
        let warm_replica = task.session.and_then(|session| {
            self.sessions.runs_on(session, id, Some(pool.node_id.clone()));
            let place = self.sessions.warm_replica(session).filter(|place| place.pool == *pool)?;
            Some(place.replica.clone())
        });
        task.stage = Stage::Running(attempt);
        task.last_dispatch = Some(now);
        task.dispatches += 1;
        if task.attempts.is_empty() {
            // Mostly it is the only one, and it is kept for as long as the task.
            task.attempts.reserve_exact(1);
        }
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
            first_index,
            resume,
            warm_replica: warm_replica.filter(|_| spec.kv_hint == KvHint::Reuse),
            attempt_number: task.dispatches,
            queue_wait_ms: waited,
            deadlines,
            task_deadline: task.deadline,
            stops_overdue,
            max_tokens: task.budget_bound,
            spec,
        })));
        self.counters.dispatched += 1;
        self.counters.continued += u64::from(resume.is_some());
        let node_id = Some(pool.node_id.clone());
        if task.suspect {
            self.suspects_at.push(pool.clone());
        }
        let state = TaskState::Running;
        let change = ClusterChange::Task { task_id: task.id, state, node_id };
        self.changes.push((Some(task.holder), change));
        self.touched.insert(id);
        self.attempts.insert(
            attempt,
            Attempt {
                task: id,
                pool: pool.clone(),
                row: choice.row,
                dispatched: now,
                first_token: None,
                first_index,
                replica: None,
                maker,
                quiet: false,
                closing: None,
                vanishing: false,
            },
        );
        self.registry.reserve(pool, attempt);
        self.sync_taken(&choice);
    }

    pub(super) fn leave_queue_to_start(&mut self, id: TaskId) {
        self.release_pin(id);
        let Some(task) = self.tasks.get(&id) else { return };
        self.queue.start(&task.model, task.priority, task.number, id);
        self.alarms.remove(&(task.wait_until, id));
        self.alarms.remove(&(task.not_before, id));
        let model = task.model.clone();
        self.left_lane(&model);
    }

    fn deadlines(&self, spec: &TaskSpec) -> AttemptDeadlines {
        if !self.enforces(Rule::AttemptDeadlines) {
            return AttemptDeadlines::UNBOUNDED;
        }
        let or = |asked: Option<u64>, default: Duration| asked.map_or(default, Duration::from_millis);
        AttemptDeadlines {
            acceptance: ACCEPTANCE_TIMEOUT,
            first_token: or(spec.first_token_ms, self.policy.first_token_timeout),
            token_idle: or(spec.token_idle_ms, self.policy.token_idle_timeout),
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

/// Whether two tasks that failed on no pool yet have the same eligible ones.
pub(super) fn asks_for_the_same(a: &TaskSpec, b: &TaskSpec) -> bool {
    a.engines == b.engines && a.passes_on == b.passes_on && a.ctx == b.ctx && a.placement == b.placement
}
