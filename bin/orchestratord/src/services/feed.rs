//! The end of an attempt's stream in this process: its relay, which the attempt's task shares with the
//! lane of its node.
//!
//! What a lane brings goes through the relay into the log in the lane's own turn, so that a token wakes
//! its readers and nobody else. The attempt's task is woken where the relay wants something done.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use attempt_link::control::{Action as LaneAction, Lost};
use parking_lot::Mutex;
use pool_registry_types::{ErrorBody, ErrorCode, Moment};
use task_scheduler::HowEnded;
use task_stream::{Action, Relay, TokensOfFrame};
use tokio::sync::Notify;

use crate::services::link::{AttemptSink, denial, refusal};
use crate::services::streams::TaskStream;

pub(crate) const NOT_IN_TIME: &str = "its link was not up in time";

/// An attempt's relay and what was said of the attempt.
#[derive(Debug)]
pub(crate) struct Feed {
    state: Mutex<State>,
    stream: Arc<TaskStream>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    relay: Relay,
    reported: Reported,
    /// Something was taken that is not in the log yet.
    is_dirty: bool,
}

/// What a lane has said of the attempt.
#[derive(Debug, Default)]
struct Reported {
    accepted: bool,
    /// No byte of its start has gone.
    never_sent: bool,
    /// The node's end, which it keeps until it hears that it is in the log.
    ended: bool,
    /// Nothing more is said.
    over: bool,
    /// With which the node has answered a POST while the start waited.
    status: Option<u16>,
}

impl Feed {
    pub(crate) fn new(relay: Relay, stream: Arc<TaskStream>) -> Arc<Self> {
        let state = State { relay, reported: Reported::default(), is_dirty: false };
        Arc::new(Self { state: Mutex::new(state), stream, changed: Notify::new() })
    }

    /// Returns when a lane has brought something that the attempt's task is to look at.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Tells the relay something. What comes of it are actions.
    pub(crate) fn relay(&self, tell: impl FnOnce(&mut Relay)) {
        tell(&mut self.state.lock().relay);
    }

    /// What is to be done next, once all that was taken is in the log.
    pub(crate) fn next_action(&self, now: Moment) -> Option<Action> {
        let mut state = self.state.lock();
        state.flush(now, &self.stream);
        state.relay.next_action()
    }

    /// The same where nothing more is to be taken.
    pub(crate) fn last_action(&self) -> Option<Action> {
        self.state.lock().relay.next_action()
    }

    /// Whether no byte of its start has gone; true once.
    pub(crate) fn take_never_sent(&self) -> bool {
        std::mem::take(&mut self.state.lock().reported.never_sent)
    }

    /// Whether its node has said that the attempt is over, and keeps it.
    pub(crate) fn has_ended(&self) -> bool {
        self.state.lock().reported.ended
    }
}

impl AttemptSink for Feed {
    fn take(&self, now: Moment, action: LaneAction) -> bool {
        let mut state = self.state.lock();
        if state.reported.over {
            return false;
        }
        let was_dirty = std::mem::replace(&mut state.is_dirty, true);
        // Others go by the same lane.
        let taken = catch_unwind(AssertUnwindSafe(|| state.hear(now, action)));
        if taken.is_err() {
            tracing::error!("a relay has panicked over what a link has brought");
            state.relay.failed("a defect in the relay".into());
        }
        !was_dirty
    }

    fn flush(&self, now: Moment) {
        let mut state = self.state.lock();
        state.flush(now, &self.stream);
        let is_wanted = state.relay.has_actions() || state.reported.never_sent;
        drop(state);
        if is_wanted {
            self.changed.notify_one();
        }
    }

    fn release(&self) {
        let mut state = self.state.lock();
        if !state.reported.over {
            state.relay.failed("its lane brings no more".into());
            drop(state);
            self.changed.notify_one();
        }
    }
}

impl State {
    fn flush(&mut self, now: Moment, stream: &TaskStream) {
        self.is_dirty = false;
        let relay = &mut self.relay;
        let written = catch_unwind(AssertUnwindSafe(|| relay.flush(now, |staged| stream.take(staged))));
        if written.is_err() {
            tracing::error!("a relay has panicked over its log");
            relay.failed("a defect in the relay".into());
        }
    }

    /// What its node's lane says of the attempt.
    fn hear(&mut self, now: Moment, action: LaneAction) {
        let (relay, reported) = (&mut self.relay, &mut self.reported);
        match action {
            LaneAction::Sent { .. } => relay.sent(now),
            LaneAction::Accepted { acceptance, .. } => {
                reported.accepted = true;
                relay.accepted(now, acceptance.replica_id, acceptance.report_seq);
            }
            LaneAction::Restart { from, .. } => {
                let wanted = relay.resume();
                if wanted.is_some_and(|wanted| wanted != from) {
                    relay.closed("its link does not go on where its log stands".into());
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
                reported.over = true;
                relay.not_accepted(HowEnded::Denied(denial(status, None)));
            }
            LaneAction::PostStatus { status } => reported.status = Some(status),
            LaneAction::Ended { report_seq, .. } => {
                (reported.over, reported.ended) = (true, true);
                relay.over(report_seq);
            }
            LaneAction::NeverSent { .. } => (reported.over, reported.never_sent) = (true, true),
            LaneAction::Refused { error, .. } => {
                reported.over = true;
                relay.not_accepted(refusal(error.code.http_status(), Some(error)));
            }
            LaneAction::Unknown { again, .. } => {
                reported.over = true;
                relay.not_accepted(match reported.status {
                    _ if again => HowEnded::NoAnswer("its start did not arrive, twice in a row".into()),
                    Some(status) => HowEnded::NodeFailed(format!("the node answered HTTP {status}")),
                    None => {
                        let message = "the start did not arrive, and is not taken any more";
                        HowEnded::Refused(ErrorBody::new(ErrorCode::PoolUnready, message))
                    }
                });
            }
            LaneAction::Gone { .. } => {
                reported.over = true;
                relay.closed("its node does not hold it any more".into());
            }
            LaneAction::Lost { reason: Lost::NotResumed, .. } if !reported.accepted => {
                reported.over = true;
                relay.not_accepted(HowEnded::NoAnswer(NOT_IN_TIME.into()));
            }
            LaneAction::Lost { reason, .. } => {
                reported.over = true;
                relay.closed(lost(reason).into());
            }
            // A head is of answers that are no event streams; the rest is of links.
            _ => {}
        }
    }
}

/// Why an attempt is lost, for people.
const fn lost(reason: Lost) -> &'static str {
    match reason {
        Lost::NotResumed => NOT_IN_TIME,
        Lost::OtherBoot => "the node has restarted",
        Lost::Left => "the node has left",
        Lost::Closed => "its link is closed",
        Lost::Unusable => "its link brings nothing that can be used",
    }
}
