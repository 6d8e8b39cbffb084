//! What time alone changes: leases, waits, backoffs, retention.

use super::ends::causes;
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
                let mut attempts = self.registry.attempts_of(&transition.node_id);
                if self.registry.is_link_interrupted(&transition.node_id) {
                    // What would be lost is given the time that its link has to come back.
                    attempts.retain(|id| self.loses_nothing(*id));
                }
                self.close_all(now, &attempts, CloseReason::NodeOffline, effects);
            }
        }
        for node_id in self.registry.take_forgotten() {
            self.sync_node(&node_id);
        }
        for pool in self.registry.take_lifted_holds() {
            self.sync_pool(&pool);
        }
        for (node_id, address, authorized) in self.registry.take_due_probes(now) {
            effects.push(Effect::Probe { node_id, address, authorized });
        }
        self.wake_loads(now);
        if self.short_until.is_some_and(|until| until <= now) {
            self.short_until = None;
            self.dirty.extend(self.queue.models().cloned());
        }
        let mut counted = BTreeMap::new();
        while let Some((at, id)) = self.alarms.first().copied()
            && at <= now
        {
            self.alarms.pop_first();
            self.alarm(now, id, &mut counted, effects);
        }
        while let Some((at, id)) = self.vanishing.first().copied()
            && at <= now
        {
            self.vanishing.pop_first();
            let Some(node_id) = self.attempts.get(&id).map(|attempt| &attempt.pool.node_id) else { continue };
            if self.registry.is_link_interrupted(node_id) {
                // When it is back the node itself says what became of it.
                self.vanishing.insert((now + REPORT_PATIENCE, id));
            } else if self.registry.liveness(node_id).is_some() {
                self.counters.vanished += 1;
                self.close(now, id, CloseReason::Vanished, effects);
            } else {
                self.close(now, id, CloseReason::NodeLeft, effects);
            }
        }
        self.end_gone_lanes(now, effects);
        self.sessions.expire(now);
        while self.ended.front().is_some_and(|(at, _)| *at + self.policy.task_retention <= now) {
            self.forget_oldest(effects);
        }
    }

    /// A queued task's wait, or its backoff, is over.
    ///
    /// Tasks that came together are over together: what refused them is counted once for all that ask
    /// for the same.
    fn alarm(
        &mut self,
        now: Moment,
        id: TaskId,
        counted: &mut BTreeMap<(ModelRef, Ask), String>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(task) = self.tasks.get(&id) else { return };
        if !task.is_queued() {
            return;
        }
        self.dirty.insert(task.model.clone());
        if task.wait_until > now {
            return;
        }
        if let Some(rejection) = &task.rejection {
            let (error, bound) = (rejection.error.clone(), rejection.bound);
            let another = self.ask_until(now, id) == Some(Moment::NEVER);
            if another && bound > now {
                // One that was suspect takes tasks again: the whole wait is for it.
                self.alarms.insert((bound, id));
                if let Some(task) = self.tasks.get_mut(&id) {
                    task.wait_until = bound;
                }
                return;
            }
            if !another {
                self.leave_queue(id);
                self.fail(now, id, error, effects);
                return;
            }
        }
        let Some(task) = self.tasks.get(&id) else { return };
        let waited = now.millis_since(task.admitted);
        let count = || {
            let shape = self.shape(now, task, None);
            shape.map_or_else(String::new, |shape| count_refusals(&self.index, &shape))
        };
        let why = match task.ask(&self.policy) {
            Some(ask) => counted.entry((task.model.clone(), ask)).or_insert_with(count).clone(),
            None => count(),
        };
        let mut message = format!("not started within {waited} ms ({why})");
        if let Some(before) = self.tasks.get(&id).filter(|task| !task.attempts.is_empty()) {
            message.push_str(&format!("; before: {}", causes(before)));
        }
        self.leave_queue(id);
        self.fail(now, id, ErrorBody::new(ErrorCode::DeadlineExceeded, message), effects);
    }
}
