//! Attempts: asking for their end, and what the end means for the task.

use std::borrow::Cow;

use super::predicting::note_change;
use super::*;

impl ControlCore {
    pub(super) fn record_mut(&mut self, attempt: AttemptId) -> Option<&mut AttemptRecord> {
        let task = self.attempts.get(&attempt)?.task;
        self.tasks.get_mut(&task)?.attempts.iter_mut().find(|record| record.id == attempt)
    }

    pub(super) fn close_all(
        &mut self,
        now: Moment,
        attempts: &[AttemptId],
        why: CloseReason,
        effects: &mut Vec<Effect>,
    ) {
        for attempt in attempts {
            self.close(now, *attempt, why, effects);
        }
    }

    /// Gives the streams of attempts that a report does not list time to bring their ends.
    pub(super) fn await_ends(&mut self, now: Moment, vanished: &[AttemptId]) {
        let patience = if self.enforces(Rule::ReportPatience) { REPORT_PATIENCE } else { Duration::ZERO };
        for id in vanished {
            if let Some(attempt) = self.attempts.get_mut(id)
                && !attempt.vanishing
            {
                attempt.vanishing = true;
                self.vanishing.insert((now + patience, *id));
            }
        }
    }

    /// Asks for the end of an attempt. The first reason stands, except that a cancel overrides, and the end of the daemon all but that.
    pub(super) fn close(&mut self, now: Moment, id: AttemptId, why: CloseReason, effects: &mut Vec<Effect>) {
        let Some(attempt) = self.attempts.get_mut(&id) else { return };
        let closing = attempt.closing.is_some();
        let overrides = match why {
            CloseReason::Canceled => true,
            CloseReason::CutOff => attempt.closing != Some(CloseReason::Canceled),
            _ => false,
        };
        if !closing || overrides {
            attempt.closing = Some(why);
        }
        if closing {
            return;
        }
        effects.push(Effect::CloseAttempt { task: attempt.task, attempt: id, why });
        if !self.enforces(Rule::FenceBeforePlace) {
            self.ended(now, id, 0, &HowEnded::Closed, None, effects);
        }
    }

    /// The first token of an attempt is in the log.
    pub(super) fn started(&mut self, now: Moment, id: AttemptId) {
        let Some(attempt) = self.attempts.get_mut(&id) else { return };
        attempt.first_token = Some(now);
        let (task, pool, replica) = (attempt.task, attempt.pool.clone(), attempt.replica.clone());
        let row = self.attempts.get(&id).and_then(|attempt| self.row_of(attempt));
        self.served(now, row, task);
        self.registry.alive(now, &pool.node_id);
        if self.registry.proven(&pool) {
            self.sync_node(&pool.node_id);
        }
        let task_itself = self.tasks.get_mut(&task);
        let session = task_itself.and_then(|of| {
            of.first_token.get_or_insert(now);
            of.session
        });
        if let Some((session, replica)) = session.zip(replica) {
            self.sessions.record_replica(session, task, pool, replica);
        }
    }

    /// The stream of an attempt fell quiet: its node is looked at.
    pub(super) fn quiet(&mut self, now: Moment, id: AttemptId, effects: &mut Vec<Effect>) {
        let Some(attempt) = self.attempts.get_mut(&id) else { return };
        attempt.quiet = true;
        let node_id = attempt.pool.node_id.clone();
        self.registry.want_probe(now, &node_id);
        self.move_quiet(now, &node_id, effects);
    }

    /// Takes the quiet attempts away from a node that does not answer a fresh connection either:
    /// two ways say the same. Only where nothing is lost by it; what has sent tokens and may not
    /// go on elsewhere is given all the time that a stream has.
    pub(super) fn move_quiet(&mut self, now: Moment, node_id: &NodeId, effects: &mut Vec<Effect>) {
        if self.registry.dial_failing(node_id) {
            self.move_those(now, node_id, |attempt| attempt.quiet, effects);
        }
    }

    /// The same of all that run on the node, where it is a link that says that it is quiet.
    pub(super) fn move_linked(&mut self, now: Moment, node_id: &NodeId, effects: &mut Vec<Effect>) {
        self.move_those(now, node_id, |_| true, effects);
    }

    fn move_those(
        &mut self,
        now: Moment,
        node_id: &NodeId,
        is_quiet: impl Fn(&Attempt) -> bool,
        effects: &mut Vec<Effect>,
    ) {
        let mut moved = self.registry.attempts_of(node_id);
        moved.retain(|id| self.attempts.get(id).is_some_and(|a| is_quiet(a) && a.closing.is_none()));
        moved.retain(|id| self.loses_nothing(*id));
        self.counters.moved += moved.len() as u64;
        self.close_all(now, &moved, CloseReason::NodeSilent, effects);
    }

    /// Whether the attempt's task can be placed elsewhere without a loss: no token was sent, or it may be
    /// continued.
    pub(super) fn loses_nothing(&self, id: AttemptId) -> bool {
        self.attempts.get(&id).is_some_and(|attempt| {
            attempt.first_token.is_none()
                || self.tasks.get(&attempt.task).is_some_and(|task| task.continuation.is_some())
        })
    }

    /// What the end of an attempt says of its pool and its node; before its slot is released.
    fn learn_from(&mut self, now: Moment, id: AttemptId, attempt: &Attempt, how: &HowEnded) {
        let (pool, dispatched) = (&attempt.pool, attempt.dispatched);
        let tripped = match how {
            HowEnded::NodeError(error) => {
                // It came whole, over a stream that is well.
                self.registry.stream_well(&pool.node_id);
                matches!(error.cause, Some(EndCause::Engine5xx | EndCause::EngineDenied))
                    && self.registry.pool_failed(now, pool, &id, attempt.task, dispatched)
            }
            HowEnded::Broken(_)
            | HowEnded::NoAnswer(_)
            | HowEnded::NodeFailed(_)
            | HowEnded::TimedOut(Overdue::Silence | Overdue::Acceptance) => {
                self.registry.stream_failed(now, &pool.node_id, &id, dispatched)
            }
            HowEnded::Finished => {
                self.served(now, self.row_of(attempt), attempt.task);
                self.registry.proven(pool);
                false
            }
            HowEnded::Rejected(error) if self.is_wrongly_rejected(attempt.task, error) => {
                self.registry.pool_failed(now, pool, &id, attempt.task, dispatched)
            }
            _ => false,
        };
        self.counters.trips += u64::from(tripped);
    }

    /// The pool's engine did what a task asked.
    fn served(&mut self, now: Moment, pool: Option<PoolRow>, task: TaskId) {
        let Some(served) = pool.and_then(|row| self.served_at(row)) else { return };
        let another_at =
            served.and_then(|last| if last.task == task { last.another_at } else { Some(last.at) });
        *served = Some(Served { task, at: now, another_at });
    }

    /// Whether the pool has served another task than this one since then.
    fn served_another(&self, pool: &PoolKey, task: TaskId, since: Moment) -> bool {
        let row = self.index.row(pool);
        row.and_then(|row| self.served_by(row)).is_some_and(|served| {
            let at = if served.task == task { served.another_at } else { Some(served.at) };
            at.is_some_and(|at| at > since)
        })
    }

    /// Whether an engine's failure is the request's own: the pool served another task since one of
    /// its own failures with this one, or since another pool's with the same answer. Remembers it,
    /// and takes back what was counted where it is.
    fn is_the_requests(&mut self, now: Moment, id: TaskId, pool: &PoolKey, answer: &str) -> bool {
        let Some(task) = self.tasks.get(&id) else { return false };
        let own = task.engine_failures.iter().any(|before| {
            let same = before.pool == *pool || before.answer == answer;
            same && self.served_another(pool, id, before.at)
        });
        let Some(task) = self.tasks.get_mut(&id) else { return false };
        task.engine_failures.push(EngineFailure { pool: pool.clone(), at: now, answer: answer.to_owned() });
        if !own {
            return false;
        }
        let pools: BTreeSet<PoolKey> = task.engine_failures.drain(..).map(|failure| failure.pool).collect();
        for pool in pools {
            if self.registry.pool_absolved(&pool, id) {
                self.sync_pool(&pool);
            }
        }
        true
    }

    /// Whether a node has found wrong what another one has taken. That its engine cannot do it, it may
    /// know better: whoever takes a task has not asked its own yet.
    fn is_wrongly_rejected(&self, id: TaskId, error: &ErrorBody) -> bool {
        error.code != ErrorCode::Unsupported && self.tasks.get(&id).is_some_and(|task| task.taken)
    }

    /// Until when another pool may be asked than those that have found the task wrong: as long as one
    /// takes tasks, full or not, and else while one is only suspect, for a node timeout.
    pub(super) fn ask_until(&self, now: Moment, id: TaskId) -> Option<Moment> {
        let task = self.tasks.get(&id)?;
        let shape = self.shape(now, task, None)?;
        let taken = choose(&self.index, &shape);
        if matches!(taken, Ok(_) | Err(NoPlacement::Full | NoPlacement::BackingOff)) {
            return Some(Moment::NEVER);
        }
        let comes_back =
            temporarily_unavailable(&self.index, &shape).any(|key| !self.registry.is_denied(&key.node_id));
        comes_back.then(|| now + self.policy.timing.node_timeout)
    }

    /// A pool has found the task wrong. Returns whether it may be right.
    fn rejected(&mut self, id: TaskId, by: &PoolKey, error: &ErrorBody) -> bool {
        let is_wrong = self.is_wrongly_rejected(id, error);
        let Some(task) = self.tasks.get_mut(&id) else { return true };
        for list in [&mut task.lacking, &mut task.tried] {
            if !list.contains(by) {
                list.push(by.clone());
            }
        }
        if is_wrong {
            return false;
        }
        let before = task.rejection.take();
        let bound = before.as_ref().map_or(task.wait_until, |before| before.bound);
        let mut pools = before.map(|before| before.by).unwrap_or_default();
        pools.push(by.clone());
        task.rejection = Some(Box::new(Rejection { error: error.clone(), by: pools, bound }));
        true
    }

    /// The node took the task: who has found it wrong before was wrong itself, and counts as failing. So
    /// is whoever does from now on.
    pub(super) fn taken(&mut self, now: Moment, attempt: AttemptId) {
        let Some(id) = self.attempts.get(&attempt).map(|attempt| attempt.task) else { return };
        let Some(task) = self.tasks.get_mut(&id) else { return };
        task.taken = true;
        let Some(rejection) = task.rejection.take() else { return };
        // What was to end it sooner is not believed.
        task.wait_until = rejection.bound;
        for pool in rejection.by {
            if self.registry.pool_failed(now, &pool, &attempt, id, now) {
                self.counters.trips += 1;
                self.sync_pool(&pool);
            }
        }
    }

    /// Whether a pool might take the task whose engine is not known to lack what it asks: an engine
    /// may have been started without what another one of the same kind has.
    fn another_may(&mut self, now: Moment, id: TaskId, lacking: &PoolKey) -> bool {
        let Some(task) = self.tasks.get_mut(&id) else { return false };
        for list in [&mut task.lacking, &mut task.tried] {
            if !list.contains(lacking) {
                list.push(lacking.clone());
            }
        }
        let Some(task) = self.tasks.get(&id) else { return false };
        self.shape(now, task, None).is_some_and(|shape| might_take(&self.index, &shape))
    }

    /// The attempt of a task that may have brought an engine down makes room for the next one.
    fn leaves_suspects(&mut self, at: &PoolKey) {
        if let Some(at) = self.suspects_at.iter().position(|pool| pool == at) {
            self.suspects_at.swap_remove(at);
        }
    }

    pub(super) fn ended(
        &mut self,
        now: Moment,
        id: AttemptId,
        tokens_written: u64,
        how: &HowEnded,
        final_report: Option<u64>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(attempt) = self.attempts.remove(&id) else { return };
        let node_id = attempt.pool.node_id.clone();
        self.touched.insert(attempt.task);
        // Where a report lists it, its slot stays taken until the next one, and its pool is as before:
        // only this tells the lane's forecast.
        if let Some(task) = self.tasks.get(&attempt.task) {
            note_change(&mut self.forecasts, &task.model);
            if task.suspect {
                self.leaves_suspects(&attempt.pool);
            }
        }
        let was_open = self.registry.has_open_breaker(&node_id);
        self.learn_from(now, id, &attempt, how);
        self.registry.release(&attempt.pool, &id, final_report);
        if was_open || self.registry.has_open_breaker(&node_id) {
            self.sync_node(&node_id);
        }
        match how {
            HowEnded::NeverSent(reason) => {
                let transition = self.registry.dial_failed(now, &node_id, reason.clone());
                self.note(transition.as_slice());
                self.registry.hold(&attempt.pool, now + HOLD);
                self.sync_node(&node_id);
            }
            HowEnded::Denied(reason) => {
                self.counters.denials += 1;
                let transition = self.registry.denied(now, &node_id, attempt.dispatched, reason.clone());
                self.note(transition.as_slice());
                self.registry.hold(&attempt.pool, now + HOLD);
                self.sync_node(&node_id);
            }
            HowEnded::NodeFailed(_) => self.registry.hold(&attempt.pool, now + HOLD),
            HowEnded::OwnShortage { reason, everywhere } => {
                self.counters.own_shortages += 1;
                if !self.enforces(Rule::OwnShortageIsNoEvidence) {
                    let transition = self.registry.dial_failed(now, &node_id, reason.clone());
                    self.note(transition.as_slice());
                    self.sync_node(&node_id);
                }
                if !everywhere {
                    self.registry.hold(&attempt.pool, now + HOLD);
                } else if self.short_until.is_none() {
                    // Those that were under way together are one shortage.
                    self.short_until = Some(now + SHORTAGE_PAUSES.after(self.shortages));
                    self.shortages = self.shortages.saturating_add(1);
                }
            }
            HowEnded::NoAnswer(_) | HowEnded::TimedOut(Overdue::Acceptance) => {
                let reason = "it took a connection and gave no answer".to_owned();
                let transition = self.registry.dial_failed(now, &node_id, reason);
                self.note(transition.as_slice());
                self.sync_node(&node_id);
            }
            HowEnded::Broken(_) | HowEnded::TimedOut(Overdue::Silence) => {
                self.registry.want_probe(now, &node_id);
                if !self.enforces(Rule::OwnLiveness) {
                    let neighbours = self.registry.attempts_of(&node_id);
                    self.close_all(now, &neighbours, CloseReason::Neighbour, effects);
                }
            }
            HowEnded::Refused(error) => {
                self.registry.hold(&attempt.pool, now + HOLD);
                if error.code == ErrorCode::WrongNode {
                    self.registry.want_probe(now, &node_id);
                }
            }
            HowEnded::NodeError(error)
                if matches!(error.code, ErrorCode::PoolUnready | ErrorCode::ReplicaExhausted) =>
            {
                self.registry.hold(&attempt.pool, now + HOLD);
            }
            _ => {}
        }
        self.sync_pool_of(&attempt);

        let continuation = self.tasks.get(&attempt.task).and_then(|task| task.continuation);
        let crash = match how {
            HowEnded::NodeError(body) if body.cause == Some(EndCause::EngineDied) => body.crash.as_ref(),
            _ => None,
        };
        let mut outcome = classify(&Evidence {
            how,
            closing: attempt.closing,
            tokens_written,
            first_index: attempt.first_index,
            may_continue: continuation.is_some(),
            crash: crash.filter(|_| self.enforces(Rule::CulpritIsFinal)),
            pool: &attempt.pool,
        });
        self.counters.culprits += u64::from(crash.is_some_and(|crash| crash.suspect && crash.suspects == 1));
        if outcome == Outcome::FreeRefusal {
            self.counters.refused_dispatches += 1;
            if !self.enforces(Rule::RefusalIsFree) {
                let error = ErrorBody::new(ErrorCode::ReplicaExhausted, "refused");
                outcome = Outcome::Retry { engine_died: false, suspect: false, error };
            }
        }
        if outcome == Outcome::FreeElsewhere && !self.enforces(Rule::NodeFailureIsFree) {
            let error = ErrorBody::new(ErrorCode::WorkerReset, "the node failed");
            outcome = Outcome::Retry { engine_died: false, suspect: false, error };
        }
        let id_of_task = attempt.task;
        let mut rejected_until = Moment::NEVER;
        if let Outcome::AskAnother(error) = &outcome {
            let ask = self.enforces(Rule::RejectionIsAskedElsewhere);
            let until = match self.rejected(id_of_task, &attempt.pool, error) {
                true => self.ask_until(now, id_of_task),
                // Whoever has taken it may again.
                false => Some(Moment::NEVER),
            };
            match until.filter(|_| ask) {
                Some(until) => rejected_until = until,
                None => outcome = Outcome::Failed(error.clone()),
            }
        }
        if let Outcome::Failed(error) = &outcome
            && error.code == ErrorCode::Unsupported
            && tokens_written == 0
            && self.another_may(now, id_of_task, &attempt.pool)
        {
            outcome = Outcome::AskAnother(error.clone());
        }
        if let HowEnded::NodeError(body) = how
            && body.cause == Some(EndCause::Engine5xx)
            && let Outcome::Retry { error, .. } = &outcome
            && self.is_the_requests(now, id_of_task, &attempt.pool, &body.message)
        {
            let message = format!("the engines serve others and fail this request: {}", error.message);
            let error =
                ErrorBody { code: ErrorCode::PoolUnavailable, message, retriable: false, ..error.clone() };
            outcome = Outcome::Failed(error);
        }
        let replaced = (outcome != Outcome::FreeRefusal).then(|| {
            let (why, code) = in_a_word(how);
            Note::Replaced { task: id_of_task, attempt: id, pool: attempt.pool.clone(), why, code }
        });
        let Some(task) = self.tasks.get_mut(&id_of_task) else { return };
        if let Some(record) = task.attempts.iter_mut().find(|record| record.id == id) {
            record.outcome = describe(how, &outcome);
        }
        task.sent = tokens_written;
        if tokens_written > 0 {
            task.maker.get_or_insert(attempt.maker);
        }
        task.ran += now.since(attempt.dispatched);
        if let Some(session) = task.session {
            self.sessions.runs_on(session, id_of_task, None);
        }
        match outcome {
            Outcome::Completed => {
                self.counters.completed += 1;
                let model = task.model.clone();
                // A resumed stream has skipped what a measurement would count.
                let is_there = self.registry.pool_facts(&attempt.pool).is_some();
                let measured = attempt.first_token.filter(|_| attempt.first_index == 0 && is_there);
                if let Some(first_token) = measured {
                    let seen = Measurement {
                        first_token_ms: first_token.millis_since(attempt.dispatched),
                        decode_ms: now.millis_since(first_token),
                        tokens: tokens_written,
                    };
                    self.paces.measure(&attempt.pool, &model, seen);
                }
                self.finish(now, id_of_task, TaskState::Completed, None, effects);
            }
            Outcome::Canceled => {
                let error = ErrorBody::new(ErrorCode::Canceled, "canceled while running");
                self.fail(now, id_of_task, error, effects);
            }
            Outcome::Failed(error) => {
                let differs =
                    matches!(how, HowEnded::NodeError(body) if body.cause == Some(EndCause::ReplayDiffers));
                let differs = differs || matches!(how, HowEnded::Differs(_));
                self.counters.replays_differed += u64::from(differs);
                self.fail(now, id_of_task, error, effects);
            }
            Outcome::FreeRefusal | Outcome::FreeReplace | Outcome::FreeElsewhere => {
                self.counters.replaced += u64::from(outcome != Outcome::FreeRefusal);
                if outcome == Outcome::FreeElsewhere {
                    // The node has failed it, whichever pool of it is asked.
                    let of_node = self.synced.get(&node_id).into_iter().flatten();
                    let of_node = of_node.filter_map(|(_, row)| self.index.at(*row)).map(|pool| &pool.key);
                    let more: Vec<PoolKey> = of_node
                        .chain([&attempt.pool])
                        .filter(|key| !task.tried.contains(key))
                        .cloned()
                        .collect();
                    task.tried.extend(more);
                }
                // What costs no try must not go on for ever: the wait goes on where it was.
                let wait_until = task.wait_until;
                if task.attempts.len() > MAX_RECORDS {
                    task.attempts.retain(|record| record.id != id);
                }
                self.enqueue(now, id_of_task, wait_until);
            }
            Outcome::AskAnother(_) => {
                // As often as there are pools.
                self.counters.replaced += 1;
                if task.attempts.len() > MAX_RECORDS {
                    task.attempts.retain(|record| record.id != id);
                }
                let bound = task.rejection.as_ref().map_or(task.wait_until, |rejection| rejection.bound);
                let wait_until = bound.min(rejected_until);
                self.enqueue(now, id_of_task, wait_until);
            }
            Outcome::Retry { engine_died, suspect, error } => {
                task.tries += 1;
                task.suspect |= suspect;
                task.engine_deaths += u32::from(engine_died);
                if !task.tried.contains(&attempt.pool) {
                    task.tried.push(attempt.pool.clone());
                }
                let poisoned = task.engine_deaths >= MAX_ENGINE_DEATHS;
                let tries = task.tries;
                if poisoned && self.policy.switched_off != Some(Rule::PoisonLimit) || tries >= MAX_TRIES {
                    self.counters.poisoned += u64::from(poisoned);
                    let error = exhausted(task, error);
                    self.fail(now, id_of_task, error, effects);
                } else {
                    task.not_before = now + RETRY_PAUSES.after(tries - 1);
                    self.counters.replaced += 1;
                    self.enqueue(now, id_of_task, now + self.policy.queue_timeout);
                }
            }
        }
        if self.tasks.get(&id_of_task).is_some_and(|task| task.is_queued()) {
            effects.extend(replaced.map(Effect::Note));
        }
    }
}

/// How the task's attempts have ended, for an error's message.
pub(super) fn causes(task: &Task) -> String {
    let causes: Vec<String> = task.attempts.iter().map(|a| format!("{}: {}", a.pool, a.outcome)).collect();
    causes.join("; ")
}

fn exhausted(task: &Task, last: ErrorBody) -> ErrorBody {
    if last.code == ErrorCode::DecodeTimeout {
        return last;
    }
    let message = format!("all {} tries failed ({})", task.tries, causes(task));
    let code = if task.sent > 0 { ErrorCode::WorkerReset } else { ErrorCode::PoolUnavailable };
    ErrorBody { code, message, retriable: true, ..last }
}

/// How the attempt ended, for the log.
fn in_a_word(how: &HowEnded) -> (&'static str, Option<ErrorCode>) {
    match how {
        HowEnded::Finished => ("finished", None),
        HowEnded::Refused(error) => ("the node refused it", Some(error.code)),
        HowEnded::Denied(_) => ("the node does not let us in", None),
        HowEnded::Rejected(error) => ("the node finds the request wrong", Some(error.code)),
        HowEnded::NodeFailed(_) => ("the node failed", None),
        HowEnded::OwnShortage { .. } => ("descriptors, ports or memory are short here", None),
        HowEnded::OwnDefect(_) => ("a defect of the control plane", None),
        HowEnded::NeverSent(_) => ("the node could not be dialled", None),
        HowEnded::NoAnswer(_) => ("the node did not answer", None),
        HowEnded::Broken(_) => ("its stream broke", None),
        HowEnded::NodeError(error) => ("the engine failed it", Some(error.code)),
        HowEnded::TimedOut(_) => ("it took too long", None),
        HowEnded::TooLong => ("its stream is too long", None),
        HowEnded::Differs(_) => ("it answered something else than before", None),
        HowEnded::Closed => ("it was closed", None),
    }
}

fn describe(how: &HowEnded, outcome: &Outcome) -> Cow<'static, str> {
    match (how, outcome) {
        (_, Outcome::Completed) => "finished".into(),
        (_, Outcome::Canceled) => "canceled".into(),
        (HowEnded::Refused(error), _) => format!("refused: {}", error.code).into(),
        (HowEnded::NeverSent(reason) | HowEnded::OwnShortage { reason, .. }, _) => {
            format!("not connected: {reason}").into()
        }
        (HowEnded::Denied(reason) | HowEnded::NodeFailed(reason), _) => reason.clone().into(),
        (_, Outcome::FreeRefusal) => "refused: POOL_UNREADY".into(),
        (_, Outcome::FreeReplace | Outcome::FreeElsewhere) => "not connected".into(),
        (_, Outcome::Failed(error) | Outcome::AskAnother(error) | Outcome::Retry { error, .. }) => {
            error.message.clone().into()
        }
    }
}
