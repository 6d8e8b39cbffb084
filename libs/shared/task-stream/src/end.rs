//! How an attempt ends, as far as its relay has seen.

use pool_registry_types::ErrorBody;

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
    /// The core asked for it.
    Closed,
}

impl HowEnded {
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
            | Self::Closed => true,
        }
    }
}
