//! How an attempt ends, and what that means for its task.
//!
//! One function, [`classify`], holds the whole rule: it is given the evidence and says whether the
//! task is over, is tried again at a cost, or goes back to its place for free.

use std::borrow::Cow;

use multi_node_placement::PoolRow;
use pool_registry_types::error::{EndCause, EngineCrash};
use pool_registry_types::pool::EngineKind;
use pool_registry_types::{AttemptId, Digest, ErrorBody, ErrorCode, Moment, PoolKey, ReplicaId, TaskId};
use task_stream::{HowEnded, Overdue};

/// Most attempts of a task that count. Source: .specs/01 CLOUD-1502.
pub(crate) const MAX_TRIES: u32 = 3;
/// Most attempts in which the engine died: a prompt that kills engines must not walk through
/// the fleet. Source: .specs/01 CLOUD-1503.
pub(crate) const MAX_ENGINE_DEATHS: u32 = 2;

/// Why the core closed an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CloseReason {
    Canceled,
    NodeOffline,
    NodeRestarted,
    NodeLeft,
    /// The node's report does not list it.
    Vanished,
    /// Its stream is quiet, and its node does not answer a fresh connection either.
    NodeSilent,
    /// The control plane ends.
    CutOff,
    /// Only with [`crate::Rule::OwnLiveness`] switched off.
    Neighbour,
}

/// One attempt that has not ended.
#[derive(Debug, Clone)]
pub(crate) struct Attempt {
    pub(crate) task: TaskId,
    pub(crate) pool: PoolKey,
    /// Where the pool stood at its dispatch.
    pub(crate) row: PoolRow,
    pub(crate) dispatched: Moment,
    pub(crate) first_token: Option<Moment>,
    /// Frames that stood in the log before.
    pub(crate) first_index: u64,
    pub(crate) replica: Option<ReplicaId>,
    /// What makes its tokens.
    pub(crate) maker: Maker,
    /// Its stream is quiet.
    pub(crate) quiet: bool,
    pub(crate) closing: Option<CloseReason>,
    /// A report did not list it; its end is awaited.
    pub(crate) vanishing: bool,
}

/// What makes a task's tokens: another one of these makes others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Maker {
    pub(crate) engine: Option<EngineKind>,
    /// Of the model; unknown where it lies on no disk that its node looks at.
    pub(crate) digest: Option<Digest>,
}

impl Maker {
    /// Whether both are known to be different.
    pub(crate) fn differs(&self, other: &Self) -> bool {
        let digests = self.digest.as_ref().zip(other.digest.as_ref());
        self.engine != other.engine || digests.is_some_and(|(own, others)| own != others)
    }
}

/// One attempt in the task's history.
#[derive(Debug, Clone)]
pub(crate) struct AttemptRecord {
    pub(crate) id: AttemptId,
    pub(crate) pool: PoolKey,
    pub(crate) replica: Option<ReplicaId>,
    /// For people; mostly one of two texts.
    pub(crate) outcome: Cow<'static, str>,
}

/// What an ended attempt means for its task.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Outcome {
    Completed,
    Canceled,
    /// Over, with this error.
    Failed(ErrorBody),
    /// Back to its place in the lane; the pool counts as full for a moment.
    FreeRefusal,
    /// Back to its place in the lane, at no cost; the node is suspect, or nothing is known of it.
    FreeReplace,
    /// The same, and the pool has failed it: others are taken before.
    FreeElsewhere,
    /// The engine does not have what the task needs, which another one may: asked for free.
    AskAnother(ErrorBody),
    /// Tried and failed without a token, or with tokens after which it may go on.
    Retry {
        engine_died: bool,
        /// It is one of several of which one brought the engine down.
        suspect: bool,
        error: ErrorBody,
    },
}

/// What is known at the end of an attempt.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Evidence<'a> {
    pub how: &'a HowEnded,
    pub closing: Option<CloseReason>,
    /// Frames in the log, of this attempt and of those before it.
    pub tokens_written: u64,
    /// Those before it.
    pub first_index: u64,
    /// The task goes on after tokens.
    pub may_continue: bool,
    /// How its engine was brought down, where that is known and counts.
    pub crash: Option<&'a EngineCrash>,
    pub pool: &'a PoolKey,
}

/// Classifies the end of an attempt by its evidence.
pub(crate) fn classify(evidence: &Evidence<'_>) -> Outcome {
    let Evidence { how, closing, tokens_written, pool: engine, .. } = *evidence;
    let has_sent = tokens_written > evidence.first_index;
    let crash = evidence.crash;
    if *how == HowEnded::Finished {
        return Outcome::Completed;
    }
    if closing == Some(CloseReason::Canceled) {
        return Outcome::Canceled;
    }
    if closing == Some(CloseReason::CutOff) {
        let message = "the control plane was shut down while the task was running";
        return Outcome::Failed(ErrorBody::new(ErrorCode::Draining, message));
    }
    let at = |code, message: String| ErrorBody::new(code, message).at(&engine.node_id, &engine.pool_id);
    if let Some(crash) = crash.filter(|crash| crash.suspect && crash.suspects == 1) {
        let message = format!(
            "the engine ended by {}, and this was the only request that it had taken lately",
            crash.signal
        );
        let error = at(ErrorCode::PoolUnavailable, message);
        return Outcome::Failed(ErrorBody { retriable: false, ..error });
    }
    let (cause, engine_died, error) = match how {
        HowEnded::Refused(_) => return Outcome::FreeRefusal,
        HowEnded::NeverSent(_) | HowEnded::OwnShortage { everywhere: true, .. } => {
            return Outcome::FreeReplace;
        }
        HowEnded::Denied(_) | HowEnded::NodeFailed(_) | HowEnded::OwnShortage { .. } => {
            return Outcome::FreeElsewhere;
        }
        HowEnded::Rejected(error) => {
            return Outcome::AskAnother(at(of_the_request(error.code), error.message.clone()));
        }
        HowEnded::TooLong => {
            let message = "the stream is longer than what is kept of a task".to_owned();
            return Outcome::Failed(at(ErrorCode::PayloadTooLarge, message));
        }
        HowEnded::Differs(reason) => {
            let message = format!("{reason}, so the stream could not go on");
            return Outcome::Failed(at(ErrorCode::WorkerReset, message));
        }
        HowEnded::TimedOut(Overdue::Task) => {
            let message = "the task's deadline passed while it was running".to_owned();
            return Outcome::Failed(at(ErrorCode::DeadlineExceeded, message));
        }
        HowEnded::NodeError(body) => match (body.code, body.cause) {
            (ErrorCode::PoolUnready | ErrorCode::ReplicaExhausted, _) if !has_sent => {
                return Outcome::FreeRefusal;
            }
            // What is wrong with the request is wrong on every node.
            (
                code @ (ErrorCode::InvalidParams | ErrorCode::PayloadTooLarge | ErrorCode::Unsupported),
                None,
            ) => return Outcome::Failed(at(code, body.message.clone())),
            (_, Some(EndCause::ReplayDiffers)) => {
                let message = format!("{}, so the stream could not go on", body.message);
                return Outcome::Failed(at(ErrorCode::WorkerReset, message));
            }
            (code, Some(EndCause::Engine4xx)) => {
                return Outcome::Failed(at(of_the_request(code), body.message.clone()));
            }
            (_, cause) => {
                let died = matches!(cause, Some(EndCause::EngineDied | EndCause::EngineTimeout));
                let code = if cause == Some(EndCause::EngineTimeout) {
                    ErrorCode::DecodeTimeout
                } else {
                    ErrorCode::WorkerReset
                };
                (body.message.clone(), died, code)
            }
        },
        HowEnded::TimedOut(Overdue::FirstToken) => {
            ("no token came in time".to_owned(), true, ErrorCode::DecodeTimeout)
        }
        HowEnded::TimedOut(Overdue::TokenIdle) => {
            ("the engine fell silent between tokens".to_owned(), true, ErrorCode::DecodeTimeout)
        }
        HowEnded::TimedOut(Overdue::Acceptance) => {
            ("the node did not answer in time".to_owned(), false, ErrorCode::WorkerReset)
        }
        HowEnded::TimedOut(Overdue::Silence) => {
            ("the node fell silent".to_owned(), false, ErrorCode::WorkerReset)
        }
        HowEnded::NoAnswer(reason) => {
            (format!("the node gave no answer: {reason}"), false, ErrorCode::WorkerReset)
        }
        HowEnded::Broken(reason) => (format!("the stream broke: {reason}"), false, ErrorCode::WorkerReset),
        HowEnded::OwnDefect(reason) => (reason.clone(), false, ErrorCode::WorkerReset),
        HowEnded::Closed | HowEnded::Finished => {
            let reason = match closing {
                Some(CloseReason::NodeOffline) => "the node went offline",
                Some(CloseReason::NodeRestarted) => "the node restarted",
                Some(CloseReason::NodeLeft) => "the node left",
                Some(CloseReason::NodeSilent) => "the node fell silent",
                Some(CloseReason::Vanished) => "the node does not run it any more",
                Some(CloseReason::Neighbour) => "a neighbour's stream broke",
                Some(CloseReason::Canceled | CloseReason::CutOff) | None => "the attempt was closed",
            };
            (reason.to_owned(), false, ErrorCode::WorkerReset)
        }
    };
    if tokens_written > 0 && !evidence.may_continue {
        return Outcome::Failed(at(error, format!("{cause} after {tokens_written} tokens")));
    }
    // Another task alone is known to have done it: that is not this one's death.
    let anothers = crash.is_some_and(|crash| crash.suspects == 1);
    let suspect = crash.is_some_and(|crash| crash.suspect);
    Outcome::Retry { engine_died: engine_died && !anothers, suspect, error: at(error, cause) }
}

/// What a peer may say of a request: no word of its own makes it canceled, or the control plane's.
fn of_the_request(code: ErrorCode) -> ErrorCode {
    match code {
        ErrorCode::InvalidParams
        | ErrorCode::Unsupported
        | ErrorCode::ContextTooLong
        | ErrorCode::PayloadTooLarge => code,
        _ => ErrorCode::InvalidParams,
    }
}
