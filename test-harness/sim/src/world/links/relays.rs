//! Attempts by a link, as their relays hear of them: the shell of `dispatch.rs` in `orchestratord`.

use attempt_link::control::{Action as LaneAction, Lost};
use attempt_link::wire::{Start, StartFacts, StartSpec};
use pool_registry_types::task::Resume;
use pool_registry_types::{AttemptId, ErrorBody, ErrorCode, Moment};
use task_scheduler::{Dispatch, HowEnded};
use task_stream::{Payload, PayloadFormat, Relay, TokensOfFrame};

use super::super::{What, World};
use super::number_of;

const NOT_IN_TIME: &str = "its link was not up in time";
const NOT_THERE: &str = "its link does not go on where its log stands";
/// What is over 64 KiB goes alone.
const LARGE_BYTES: usize = 70_000;

/// Of an attempt that goes by a link: what its lane has said.
#[derive(Debug)]
pub(crate) struct Linked {
    pub(crate) dispatch: Box<Dispatch>,
    pub(crate) heard: Vec<LaneAction>,
    pub(crate) accepted: bool,
    /// No byte of its start has gone.
    pub(crate) never_sent: bool,
    /// The node's end, which it keeps until it hears that it is in the log.
    pub(crate) ended: bool,
    /// With which the node has answered a POST while the start waited.
    status: Option<u16>,
}

impl Linked {
    pub(crate) fn new(dispatch: Dispatch) -> Self {
        let dispatch = Box::new(dispatch);
        Self { dispatch, heard: Vec::new(), accepted: false, never_sent: false, ended: false, status: None }
    }

    /// Returns what is wrong with it, where its relay must not hear it at all.
    pub(crate) fn hear(
        &mut self,
        now: Moment,
        relay: &mut Relay,
        action: LaneAction,
    ) -> Option<&'static str> {
        match action {
            LaneAction::Sent { .. } => relay.sent(now),
            LaneAction::Accepted { acceptance, .. } => {
                self.accepted = true;
                relay.accepted(now, acceptance.replica_id, acceptance.report_seq);
            }
            LaneAction::Restart { from, .. } => {
                let wanted = relay.resume();
                if wanted.is_some_and(|wanted| wanted != from) {
                    relay.closed(NOT_THERE.into());
                    return Some(NOT_THERE);
                }
            }
            LaneAction::Frames { bytes, .. } => relay.chunk(now, &bytes),
            LaneAction::TokenIds { first, frames, .. } => {
                let tokens = frames.into_iter().map(|f| TokensOfFrame { total: f.total.into(), ids: f.ids });
                relay.token_ids(first, tokens);
            }
            LaneAction::Error { error, .. } => relay.error(error),
            LaneAction::Silent { .. } => relay.silent(),
            LaneAction::PostStatus { status } if matches!(status, 401 | 403) => {
                relay.not_accepted(HowEnded::Denied(format!("it answers HTTP {status}")));
            }
            LaneAction::PostStatus { status } => self.status = Some(status),
            LaneAction::Ended { report_seq, .. } => {
                self.ended = true;
                relay.over(report_seq);
            }
            LaneAction::NeverSent { .. } => self.never_sent = true,
            LaneAction::Refused { error, .. } => relay.not_accepted(refusal(error)),
            LaneAction::Unknown { again, .. } => relay.not_accepted(match self.status {
                _ if again => HowEnded::NoAnswer("its start did not arrive, twice in a row".into()),
                Some(status) => HowEnded::NodeFailed(format!("the node answered HTTP {status}")),
                None => {
                    let message = "the start did not arrive, and is not taken any more";
                    HowEnded::Refused(ErrorBody::new(ErrorCode::PoolUnready, message))
                }
            }),
            LaneAction::Gone { .. } => relay.closed("its node does not hold it any more".into()),
            LaneAction::Lost { reason: Lost::NotResumed, .. } if !self.accepted => {
                relay.not_accepted(HowEnded::NoAnswer(NOT_IN_TIME.into()));
            }
            LaneAction::Lost { reason, .. } => relay.closed(lost(reason).into()),
            _ => {}
        }
        None
    }
}

const fn lost(reason: Lost) -> &'static str {
    match reason {
        Lost::NotResumed => NOT_IN_TIME,
        Lost::OtherBoot => "the node has restarted",
        Lost::Left => "the node has left",
        Lost::Closed => "its link is closed",
        Lost::Unusable => "its link brings nothing that can be used",
    }
}

/// What a node's refusal means for the attempt.
fn refusal(error: ErrorBody) -> HowEnded {
    match error.code.http_status() {
        401 | 403 | 404 => HowEnded::Denied(error.message),
        409 | 429 | 503 => HowEnded::Refused(error),
        400 | 413 => HowEnded::Rejected(error),
        _ => HowEnded::NodeFailed(error.message),
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
