//! What a lane brings of an attempt, as the attempt's relay takes it.

use pool_registry_types::{ErrorBody, ErrorCode, Moment};
use task_stream::{HowEnded, Relay, TokensOfFrame, denial};

use super::{Action, Lost};

const NOT_THERE: &str = "its link does not go on where its log stands";

/// What a lane has said of an attempt beside its frames.
#[derive(Debug, Default)]
pub struct Relayed {
    accepted: bool,
    never_sent: bool,
    ended: bool,
    over: bool,
    /// With which the node has answered a POST while the start waited.
    status: Option<u16>,
}

impl Relayed {
    /// The node has taken it.
    pub fn is_accepted(&self) -> bool {
        self.accepted
    }

    /// No byte of its start has gone.
    pub fn never_sent(&self) -> bool {
        self.never_sent
    }

    /// The node has said how it ended, and keeps it until it hears that its end is in the log.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Nothing more is said of it.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Hands what the lane says to the relay. An action that is not about an attempt changes nothing.
    /// Returns what is wrong with it, where its relay must not hear it at all.
    pub fn hear(&mut self, now: Moment, relay: &mut Relay, action: Action) -> Option<&'static str> {
        self.over |= action.attempt().is_some_and(|(_, is_last)| is_last);
        match action {
            Action::Sent { .. } => relay.sent(now),
            Action::Accepted { acceptance, .. } => {
                self.accepted = true;
                relay.accepted(now, acceptance.replica_id, acceptance.report_seq);
            }
            Action::Restart { from, .. } => return goes_on(relay, from),
            Action::Head { head, .. } => relay.head(head),
            Action::Frames { first, count, bytes, .. } => relay.frames(now, first, count, &bytes),
            Action::TokenIds { first, frames, .. } => {
                let tokens = frames.into_iter().map(|f| TokensOfFrame { total: f.total.into(), ids: f.ids });
                relay.token_ids(first, tokens);
            }
            Action::Error { error, .. } => relay.error(error),
            Action::Silent { .. } => relay.silent(),
            Action::PostStatus { status } if matches!(status, 401 | 403) => {
                self.over = true;
                relay.not_accepted(HowEnded::Denied(denial(status, None)));
            }
            Action::PostStatus { status } => self.status = Some(status),
            Action::Ended { report_seq, .. } => {
                self.ended = true;
                relay.over(report_seq);
            }
            Action::NeverSent { .. } => self.never_sent = true,
            Action::Refused { error, .. } => relay.not_accepted(HowEnded::refused(error)),
            Action::Unknown { again, .. } => relay.not_accepted(self.unknown(again)),
            Action::Gone { .. } => relay.closed("its node does not hold it any more".into()),
            Action::Lost { reason: Lost::NotResumed, .. } if !self.accepted => {
                relay.not_accepted(HowEnded::NoAnswer(Lost::NotResumed.as_str().into()));
            }
            Action::Lost { reason, .. } => relay.closed(reason.as_str().into()),
            // The rest is of links.
            _ => {}
        }
        None
    }

    fn unknown(&self, again: bool) -> HowEnded {
        match self.status {
            _ if again => HowEnded::NoAnswer("its start did not arrive, twice in a row".into()),
            Some(status) => HowEnded::NodeFailed(format!("the node answered HTTP {status}")),
            None => {
                let message = "the start did not arrive, and is not taken any more";
                HowEnded::Refused(ErrorBody::new(ErrorCode::PoolUnready, message))
            }
        }
    }
}

/// The stream goes on at this record. Returns what is wrong, where the relay wants another one.
fn goes_on(relay: &mut Relay, from: u64) -> Option<&'static str> {
    relay.resume().filter(|wanted| *wanted != from)?;
    relay.closed(NOT_THERE.into());
    Some(NOT_THERE)
}
