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

    pub(super) fn hold_pin(&mut self, id: TaskId) {
        let Some(node_id) = self.tasks.get(&id).and_then(Task::pinned_node).cloned() else { return };
        self.unsettled_pins.insert(node_id.clone());
        self.pinned.entry(node_id).or_default().insert(id);
    }

    pub(super) fn release_pin(&mut self, id: TaskId) {
        let Some(node_id) = self.tasks.get(&id).and_then(Task::pinned_node).cloned() else { return };
        if let Some(waiting) = self.pinned.get_mut(&node_id) {
            waiting.remove(&id);
            if waiting.is_empty() {
                self.pinned.remove(&node_id);
            }
        }
    }

    /// Ends the tasks that wait for a node which will not take them.
    pub(super) fn settle_pins(&mut self, now: Moment, effects: &mut Vec<Effect>) {
        if !self.grace_over && self.grace_end() <= now {
            self.grace_over = true;
            self.unsettled_pins.extend(self.pinned.keys().cloned());
        }
        for node_id in std::mem::take(&mut self.unsettled_pins) {
            let Some(error) = self.pin_refusal(now, &node_id) else { continue };
            let waiting: Vec<TaskId> = self.pinned.get(&node_id).into_iter().flatten().copied().collect();
            for id in waiting {
                self.leave_queue(id);
                self.fail(now, id, error.clone(), effects);
            }
        }
    }
}
