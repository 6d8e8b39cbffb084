//! How an attempt ends, as far as its relay has seen.

use pool_registry_types::{ErrorBody, ErrorCode, limits};

use crate::watch::Overdue;

/// The relay's evidence about the end of an attempt.
#[derive(Debug, Clone, PartialEq)]
pub enum HowEnded {
    /// The node's `end` frame is in the log.
    Finished,
    /// The node answered that it does not take the attempt: full, not ready, or not its own.
    Refused(ErrorBody),
    /// The node itself does not let the control plane in (401, 403), or is none (404).
    Denied(String),
    /// The node finds the request itself wrong (400, 413), and took nothing.
    Rejected(ErrorBody),
    /// The node failed before it took anything (5xx).
    NodeFailed(String),
    /// We could not dial for want of something of our own: descriptors, memory, or ports.
    OwnShortage {
        reason: String,
        /// No other node can be dialled either.
        everywhere: bool,
    },
    /// A defect of ours ended it.
    OwnDefect(String),
    /// No connection could be made: nothing ran.
    NeverSent(String),
    /// A connection was made, and reset before the response headers.
    NoAnswer(String),
    /// The answer is no stream of frames, or the stream broke after acceptance.
    Broken(String),
    /// The node's `error` frame.
    NodeError(ErrorBody),
    TimedOut(Overdue),
    /// The stream grew past what a log keeps.
    TooLong,
    /// It was to generate a stream again, and made another one.
    Differs(String),
    /// The core asked for it.
    Closed,
}

impl HowEnded {
    /// What the answer of a node means for an attempt that it has not taken, by its HTTP status; `error` is
    /// what it says itself.
    pub fn answered(status: u16, error: Option<ErrorBody>) -> Self {
        let says = |code| {
            let message = format!("the node answered HTTP {status} without an error body");
            error.clone().unwrap_or_else(|| ErrorBody::new(code, message))
        };
        // A newer node's own reason: it did not take the attempt, and says that another time it may.
        let newer = error.as_ref().is_some_and(|error| error.code == ErrorCode::Unknown && error.retriable);
        match status {
            401 | 403 | 404 => Self::Denied(denial(status, error.as_ref())),
            409 | 429 | 503 => Self::Refused(says(ErrorCode::PoolUnready)),
            _ if newer => Self::Refused(says(ErrorCode::Unknown)),
            413 => Self::Rejected(says(ErrorCode::PayloadTooLarge)),
            400 => Self::Rejected(says(ErrorCode::InvalidParams)),
            // Without a body of ours something else answers there, and knows nothing of the request.
            401..=499 if error.is_some() => Self::Rejected(says(ErrorCode::InvalidParams)),
            _ => Self::NodeFailed(format!("the node failed: {}", says(ErrorCode::Internal))),
        }
    }

    /// The same of a refusal that comes without a status.
    pub fn refused(error: ErrorBody) -> Self {
        Self::answered(error.code.http_status(), Some(error))
    }

    /// Within what is kept of the texts of other processes: whoever is told of an end keeps it.
    pub(crate) fn cut(&mut self) {
        match self {
            Self::Refused(error) | Self::Rejected(error) | Self::NodeError(error) => error.cut(),
            Self::Denied(text)
            | Self::NodeFailed(text)
            | Self::OwnShortage { reason: text, .. }
            | Self::OwnDefect(text)
            | Self::NeverSent(text)
            | Self::NoAnswer(text)
            | Self::Broken(text)
            | Self::Differs(text) => limits::cut(text),
            Self::Finished | Self::TimedOut(_) | Self::TooLong | Self::Closed => {}
        }
    }

    /// A word for logs, without what a node or an engine wrote: that may quote a prompt.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Refused(_) => "refused",
            Self::Denied(_) => "denied",
            Self::Rejected(_) => "rejected",
            Self::NodeFailed(_) => "node failed",
            Self::OwnShortage { .. } => "own shortage",
            Self::OwnDefect(_) => "own defect",
            Self::NeverSent(_) => "never sent",
            Self::NoAnswer(_) => "no answer",
            Self::Broken(_) => "broken",
            Self::NodeError(_) => "node error",
            Self::TimedOut(_) => "timed out",
            Self::TooLong => "too long",
            Self::Differs(_) => "differs",
            Self::Closed => "closed",
        }
    }

    /// Whether the node may work on the attempt still, so that it must be told to stop.
    pub(crate) fn may_still_run(&self) -> bool {
        match self {
            Self::Finished
            | Self::Refused(_)
            | Self::Denied(_)
            | Self::Rejected(_)
            | Self::NodeFailed(_)
            | Self::OwnShortage { .. }
            | Self::NeverSent(_)
            | Self::NodeError(_) => false,
            Self::OwnDefect(_)
            | Self::NoAnswer(_)
            | Self::Broken(_)
            | Self::TimedOut(_)
            | Self::TooLong
            | Self::Differs(_)
            | Self::Closed => true,
        }
    }
}

/// What a node says that does not let us in.
pub fn denial(status: u16, error: Option<&ErrorBody>) -> String {
    let why = match status {
        401 | 403 => "it does not take the control plane's token",
        404 => "it has no such route",
        _ => "it does not say whether it lets the control plane in",
    };
    let code = error.map(|error| format!(", {}", error.code)).unwrap_or_default();
    format!("it answers HTTP {status}{code}: {why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-1109
    #[test]
    fn a_newer_nodes_refusal_is_understood_by_its_status_and_whether_it_may_be_tried_again() {
        let reported = |retriable: bool| {
            let body = format!(r#"{{"code":"PAGED_OUT","message":"not now","retriable":{retriable}}}"#);
            serde_json::from_str::<ErrorBody>(&body).unwrap()
        };
        let free = [(409, false), (429, false), (503, false), (418, true), (500, true)];
        for (status, retriable) in free {
            let ended = HowEnded::answered(status, Some(reported(retriable)));
            assert_eq!(ended, HowEnded::Refused(reported(retriable)), "{status} {retriable}");
        }
        for status in [400, 418] {
            let ended = HowEnded::answered(status, Some(reported(false)));
            assert!(matches!(&ended, HowEnded::Rejected(body) if body.message == "not now"), "{ended:?}");
        }
        let failed = HowEnded::answered(500, Some(reported(false)));
        assert!(matches!(&failed, HowEnded::NodeFailed(reason) if reason.contains("not now")), "{failed:?}");
    }

    // CLOUD-1314
    // CLOUD-1315
    // CLOUD-1550
    // CLOUD-1551
    #[test]
    fn what_a_node_answers_before_it_takes_an_attempt_is_judged_by_its_status() {
        let kind = |status: u16| match HowEnded::answered(status, None) {
            HowEnded::Denied(reason) => {
                assert!(reason.contains(&status.to_string()), "{reason}");
                "denied"
            }
            HowEnded::Refused(_) => "refused",
            HowEnded::Rejected(_) => "rejected",
            HowEnded::NodeFailed(_) => "failed",
            other => panic!("{status} is {other:?}"),
        };
        assert_eq!([401, 403, 404].map(kind), ["denied"; 3]);
        assert_eq!([409, 429, 503].map(kind), ["refused"; 3]);
        assert_eq!([400, 413].map(kind), ["rejected"; 2]);
        // Something that is no node answers there.
        assert_eq!([405, 407, 451, 500, 502, 504].map(kind), ["failed"; 6]);
    }
}
