//! What time alone changes: leases, waits, backoffs, retention.

use super::*;

impl ControlCore {
    pub(super) fn pass_time(&mut self, now: Moment, effects: &mut Vec<Effect>) {
        let guarded = self.registry.mass_silence_since().is_some();
        let transitions = self.registry.expire(now);
        if !guarded && self.registry.mass_silence_since().is_some() {
            self.counters.mass_silences += 1;
        }
        self.note(&transitions);
        for transition in transitions {
            self.sync_node(&transition.node_id);
            if transition.to == Liveness::Offline {
                let attempts = self.registry.attempts_of(&transition.node_id);
                self.close_all(now, &attempts, CloseReason::NodeOffline, effects);
            }
        }
        for node_id in self.registry.take_forgotten() {
            self.sync_node(&node_id);
        }
        for pool in self.registry.take_lifted_holds() {
            self.sync_pool(&pool);
        }
        for (node_id, address) in self.registry.take_due_probes(now) {
            effects.push(Effect::Probe { node_id, address });
        }
        self.stir_loads(now);
        while let Some((at, id)) = self.alarms.first().copied()
            && at <= now
        {
            self.alarms.pop_first();
            self.alarm(now, id, effects);
        }
        while let Some((at, id)) = self.vanishing.first().copied()
            && at <= now
        {
            self.vanishing.pop_first();
            let Some(node_id) = self.attempts.get(&id).map(|attempt| &attempt.pool.node_id) else { continue };
            if self.registry.liveness(node_id).is_some() {
                self.counters.vanished += 1;
                self.close(now, id, CloseReason::Vanished, effects);
            } else {
                self.close(now, id, CloseReason::NodeLeft, effects);
            }
        }
        let is_gone = |model: &&ModelRef| self.retired.contains(*model) || self.model_lease(model) <= now;
        let gone: Vec<ModelRef> = self.queue.models().filter(is_gone).cloned().collect();
        for model in gone {
            self.end_lane(now, &model, effects);
        }
        self.sessions.expire(now);
        while self.ended.front().is_some_and(|(at, _)| *at + self.policy.task_retention <= now) {
            self.forget_oldest(effects);
        }
    }

    /// A queued task's wait, or its backoff, is over.
    pub(super) fn alarm(&mut self, now: Moment, id: TaskId, effects: &mut Vec<Effect>) {
        let Some(task) = self.tasks.get(&id) else { return };
        if !task.is_queued() {
            return;
        }
        self.stirred.insert(task.model.clone());
        if task.wait_until > now {
            return;
        }
        let waited = now.millis_since(task.admitted);
        let shape = self.shape(now, task, None);
        let why = shape.map_or_else(String::new, |shape| count_refusals(&self.index, &shape));
        let message = format!("not started within {waited} ms ({why})");
        self.leave_queue(id);
        self.fail(now, id, ErrorBody::new(ErrorCode::DeadlineExceeded, message), effects);
    }

    /// Ends every task that waits for the model.
    pub(super) fn end_lane(&mut self, now: Moment, model: &ModelRef, effects: &mut Vec<Effect>) {
        let Some(lane) = self.queue.lane(model) else { return };
        let waiting: Vec<TaskId> =
            lane.waiting(Priority::Interactive).chain(lane.waiting(Priority::Batch)).collect();
        for id in waiting {
            self.leave_queue(id);
            self.fail(now, id, self.model_not_available(model), effects);
        }
    }
}
