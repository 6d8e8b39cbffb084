//! Tasks that may run on one node only: they wait for it, and end when it will not come.

use super::*;

impl ControlCore {
    /// Until when a node that is not known may still come.
    pub(super) fn grace_end(&self) -> Moment {
        self.started.unwrap_or_default() + self.policy.timing.node_timeout
    }

    /// Why nothing can run on the node, as far as it can be known. A suspect node is waited for.
    pub(super) fn pin_refusal(&self, now: Moment, node_id: &NodeId) -> Option<ErrorBody> {
        let why = match (self.registry.liveness(node_id), self.registry.intent(node_id)) {
            (None, _) if now < self.grace_end() => return None,
            (None, _) => "is not known",
            (Some(Liveness::Offline), _) => "is offline",
            (Some(_), Some(Intent::Draining)) => "is draining",
            (Some(_), _) => return None,
        };
        let message = format!("node {node_id} {why}, and the task is pinned to it");
        let mut error = ErrorBody::new(ErrorCode::NodeUnavailable, message);
        error.node_id = Some(node_id.clone());
        Some(error)
    }

    /// Whether the task waits for a node that is suspect: what that has is not known until it is back.
    pub(super) fn waits_for_suspect(&self, task: &Task) -> bool {
        let suspect = |node_id| self.registry.liveness(node_id) == Some(Liveness::Suspect);
        self.enforces(Rule::PinBeforeLease) && task.pinned_node().is_some_and(suspect)
    }

    pub(super) fn hold_pin(&mut self, node_id: NodeId, id: TaskId) {
        self.dirty_pins.insert(node_id.clone());
        self.pinned.entry(node_id).or_default().insert(id);
    }

    pub(super) fn release_pin(&mut self, id: TaskId) {
        if self.pinned.is_empty() {
            return;
        }
        let Some(node_id) = self.tasks.get(&id).and_then(|task| task.pinned_node()).cloned() else { return };
        if let Some(waiting) = self.pinned.get_mut(&node_id) {
            waiting.remove(&id);
            if waiting.is_empty() {
                self.pinned.remove(&node_id);
            }
        }
    }

    /// Ends the tasks that wait for a node which will not take them.
    pub(super) fn review_pins(&mut self, now: Moment, effects: &mut Vec<Effect>) {
        if !self.grace_over && self.grace_end() <= now {
            self.grace_over = true;
            self.dirty_pins.extend(self.pinned.keys().cloned());
        }
        for node_id in std::mem::take(&mut self.dirty_pins) {
            let refusal = self.pin_refusal(now, &node_id);
            if refusal.is_none() && self.lapsed.is_empty() {
                continue;
            }
            let waiting: Vec<TaskId> = self.pinned.get(&node_id).into_iter().flatten().copied().collect();
            for id in waiting {
                let Some(task) = self.tasks.get(&id) else { continue };
                let lapsed = || {
                    let gone = self.lapsed.contains(&task.model) && self.is_gone(now, &task.model);
                    (gone && !self.waits_for_suspect(task)).then(|| self.model_not_available(&task.model))
                };
                if let Some(error) = refusal.clone().or_else(lapsed) {
                    self.leave_queue(id);
                    self.fail(now, id, error, effects);
                }
            }
        }
    }
}
