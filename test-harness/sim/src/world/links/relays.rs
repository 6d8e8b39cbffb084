//! Attempts by a link, as their relays hear of them: the shell of `dispatch.rs` in `orchestratord`.

use attempt_link::control::{Action as LaneAction, Relayed};
use attempt_link::wire::{Start, StartFacts, StartSpec};
use pool_registry_types::AttemptId;
use pool_registry_types::task::Resume;
use task_scheduler::Dispatch;
use task_stream::{Payload, PayloadFormat};

use super::super::{What, World};
use super::number_of;

/// What is over 64 KiB goes alone.
const LARGE_BYTES: usize = 70_000;

/// Of an attempt that goes by a link: what its lane has said.
#[derive(Debug)]
pub(crate) struct Linked {
    pub(crate) dispatch: Box<Dispatch>,
    pub(crate) heard: Vec<LaneAction>,
    pub(crate) relayed: Relayed,
}

impl Linked {
    pub(crate) fn new(dispatch: Dispatch) -> Self {
        let dispatch = Box::new(dispatch);
        Self { dispatch, heard: Vec::new(), relayed: Relayed::default() }
    }
}

impl World {
    /// The attempt's start goes to its node's lane.
    pub(crate) fn start_by_link(&mut self, dispatch: &Dispatch) {
        let node = number_of(&dispatch.pool.node_id);
        let keep = self.linking.u32(..1_000) >= self.plan.links.unseen;
        let is_large = self.linking.u32(..1_000) < self.plan.links.large_payloads;
        let prompt = if is_large { "x".repeat(LARGE_BYTES) } else { "x".into() };
        let payload = Payload {
            format: PayloadFormat::Native,
            bytes: format!("{{\"prompt\":\"{prompt}\"}}").into_bytes().into(),
        };
        let (text, reasoning) = (String::new(), String::new());
        let resume = dispatch.resume.map(|mode| Resume {
            mode,
            text,
            reasoning,
            token_ids: Vec::new(),
            tokens: dispatch.first_index,
        });
        let facts = StartFacts {
            number: 0,
            pool_id: dispatch.pool.pool_id.clone(),
            attempt_id: dispatch.attempt,
            task_id: dispatch.task,
            log_id: dispatch.log,
            first_index: dispatch.first_index,
            deadline_ms: dispatch.task_deadline.map(|at| at.millis_since(self.now)),
            replica_hint: dispatch.warm_replica.clone(),
            resume,
            spec: StartSpec::of(&dispatch.spec, dispatch.max_tokens),
            payload_format: PayloadFormat::Native,
            keep,
            traceparent: String::new(),
            correlation_id: String::new(),
            tracestate: String::new(),
            caller: None,
        };
        self.lane_starts(node, Start::new(facts, &payload));
    }

    /// The lane has said something of the attempt: its relay takes it in, at once or later.
    pub(super) fn relay_hears(&mut self, attempt: AttemptId, action: LaneAction) {
        let life = self.lives;
        self.check_frames(attempt, &action);
        let Some(linked) = self.control.as_mut().and_then(|control| control.linked_mut(attempt)) else {
            return;
        };
        if matches!(action, LaneAction::Resumed { .. }) {
            self.coverage.hit("link: attempt resumed");
        }
        linked.heard.push(action);
        let is_late = self.plan.late_reads > 0 && self.linking.u32(..1_000) < self.plan.late_reads;
        let wait = if is_late { self.linking.u64(1..40) } else { 0 };
        self.after_ms(wait, What::ReadDue { life, attempt });
    }
}
