//! Streams that are generated again by whoever passes them on: on what, and in what time.
//!
//! What was sent is known beside the log only. Here a task is one that may be generated again, until it is
//! said that it cannot be: then it ends where its attempt does.

use super::*;

impl ControlCore {
    /// What the task has sent cannot be generated again.
    pub(super) fn cannot_be_repeated(&mut self, attempt: AttemptId) {
        if !self.enforces(Rule::UnrepeatableIsFinal) {
            return;
        }
        if let Some(attempt) = self.attempts.get(&attempt)
            && let Some(task) = self.tasks.get_mut(&attempt.task)
        {
            task.continuation = None;
        }
    }

    /// What makes tokens of the model there.
    pub(super) fn maker_on(&self, pool: &PoolKey, model: Option<&ModelRef>) -> Maker {
        Maker {
            engine: self.index.get(pool).and_then(|pool| pool.engine),
            digest: model.and_then(|model| self.registry.model_digest(&pool.node_id, model)).cloned(),
        }
    }

    /// What has made what the task has sent, where that is to be made again and compared here.
    fn maker_of<'t>(&self, task: &'t Task) -> Option<&'t Maker> {
        let passes_on = task.spec.as_ref().is_some_and(|spec| spec.passes_on);
        let again = passes_on && task.sent > 0 && self.enforces(Rule::RepeatedByTheSameKind);
        task.maker.as_ref().filter(|_| again)
    }

    /// The engines that can do what the task asks: once it has sent something, those of the kind that made
    /// it.
    pub(super) fn engines_of(&self, task: &Task, spec: &TaskSpec) -> EngineSet {
        let made = self.maker_of(task).and_then(|maker| maker.engine);
        made.map_or(spec.engines, |engine| [engine].into_iter().collect())
    }

    /// Whether the task may be started on the pool that was chosen for it. Where another pool may take it
    /// it waits for that, and where time is too short for what was sent it ends.
    pub(super) fn may_repeat_there(
        &mut self,
        now: Moment,
        id: TaskId,
        choice: &Choice,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let pool = &choice.pool;
        let Some(task) = self.tasks.get(&id) else { return true };
        let passes_on = task.spec.as_ref().is_some_and(|spec| spec.passes_on);
        if task.sent == 0 || !passes_on {
            return true;
        }
        let there = self.maker_on(pool, Some(&task.model));
        if self.maker_of(task).is_some_and(|maker| maker.differs(&there)) {
            if let Some(task) = self.tasks.get_mut(&id) {
                task.lacking.push(pool.clone());
            }
            return false;
        }
        let tokens = task.sent.saturating_add(1) as f64;
        let needed = self.paces.service_ms(pool, &task.model, tokens).unwrap_or_default();
        let left = task.deadline.map(|deadline| deadline.millis_since(now));
        let is_late = left.is_some_and(|left| needed > left as f64);
        if !is_late {
            return true;
        }
        let message = format!(
            "its attempt was lost after {} tokens, and to generate them again takes longer than its deadline",
            task.sent
        );
        let error = ErrorBody::new(ErrorCode::WorkerReset, message).at(&pool.node_id, &pool.pool_id);
        self.leave_queue(id);
        self.fail(now, id, error, effects);
        false
    }
}
