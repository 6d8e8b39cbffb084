//! One table: error code → HTTP status → whether the same request may be sent again.
//!
//! The code is the contract; messages are for people and may change.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::engines::EngineKind;
use crate::ids::{NodeId, PoolId};
use crate::limits;
use crate::newer;
use crate::placement::WaitingFor;

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal, $status:literal, $retriable:literal;)*) => {
        /// Every error that either daemon says. Source: .specs/01 CLOUD-1100.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
        // The document has these names too; a test holds them against the table.
        #[serde(rename_all = "SCREAMING_SNAKE_CASE")]
        pub enum ErrorCode {
            $($(#[$doc])* $variant,)*
        }

        impl ErrorCode {
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The code as it stands on the wire.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// The HTTP status of an answer with this code.
            pub const fn http_status(self) -> u16 {
                match self { $(Self::$variant => $status,)* }
            }

            /// Whether the same request may succeed later.
            pub const fn retriable(self) -> bool {
                match self { $(Self::$variant => $retriable,)* }
            }
        }
    };
}

codes! {
    /// Malformed or out of range; the message names the field.
    InvalidParams = "INVALID_PARAMS", 400, false;
    /// The engine cannot do what was asked.
    Unsupported = "UNSUPPORTED", 400, false;
    /// The prompt does not fit into the model's context.
    ContextTooLong = "CONTEXT_TOO_LONG", 400, false;
    MissingToken = "MISSING_TOKEN", 401, false;
    BadToken = "BAD_TOKEN", 401, false;
    /// The token is known and may not do this.
    Forbidden = "FORBIDDEN", 403, false;
    NotFound = "NOT_FOUND", 404, false;
    /// Unknown node or an old epoch: the node registers again.
    NodeUnknown = "NODE_UNKNOWN", 404, true;
    MethodNotAllowed = "METHOD_NOT_ALLOWED", 405, false;
    /// Another live process has this node id.
    NodeIdConflict = "NODE_ID_CONFLICT", 409, true;
    /// The task id is taken by a task with another body.
    TaskConflict = "TASK_CONFLICT", 409, false;
    /// The request was meant for another node or another life of this one.
    WrongNode = "WRONG_NODE", 409, false;
    /// The link that a request names is not the one in use; nothing is wrong with the node.
    StaleLink = "STALE_LINK", 409, false;
    /// This attempt was seen before.
    AttemptDuplicate = "ATTEMPT_DUPLICATE", 409, false;
    /// The stream or the place in it is not kept any more.
    EventsExpired = "EVENTS_EXPIRED", 410, false;
    PayloadTooLarge = "PAYLOAD_TOO_LARGE", 413, false;
    /// The queue is full, or the deadline cannot be met.
    AdmissionReject = "ADMISSION_REJECT", 429, true;
    /// The token makes more requests, or has more tasks, than it may.
    RateLimited = "RATE_LIMITED", 429, true;
    /// The session's turns, tokens or time are used up.
    BudgetExceeded = "BUDGET_EXCEEDED", 429, false;
    /// Dropped from a full queue for a newer task.
    QueueFullDropLru = "QUEUE_FULL_DROP_LRU", 429, true;
    /// The pool id is on several nodes: name one.
    PoolAmbiguous = "POOL_AMBIGUOUS", 409, false;
    /// Several holders have a task or a session of this id, and whoever asks sees them all: name one.
    HolderAmbiguous = "HOLDER_AMBIGUOUS", 409, false;
    /// The one node that may do it is offline, draining or not known.
    NodeUnavailable = "NODE_UNAVAILABLE", 503, true;
    /// No node reported a pool with this model within the last node timeout.
    ModelNotAvailable = "MODEL_NOT_AVAILABLE", 503, true;
    PoolUnready = "POOL_UNREADY", 503, true;
    /// All tries are used up; the message has the causes.
    PoolUnavailable = "POOL_UNAVAILABLE", 503, true;
    /// No free slot at this moment.
    ReplicaExhausted = "REPLICA_EXHAUSTED", 503, true;
    CloudProfileDisabled = "CLOUD_PROFILE_DISABLED", 503, false;
    /// The control loop's mailbox, or another bounded queue, is full.
    Overloaded = "OVERLOADED", 503, true;
    /// Shutting down.
    Draining = "DRAINING", 503, true;
    DeadlineExceeded = "DEADLINE_EXCEEDED", 504, true;
    /// The engine fell silent, before or between tokens.
    DecodeTimeout = "DECODE_TIMEOUT", 504, true;
    /// Node or engine lost after tokens had been sent.
    WorkerReset = "WORKER_RESET", 502, true;
    /// Canceled on the client's demand.
    Canceled = "CANCELED", 499, false;
    /// A defect of ours.
    Internal = "INTERNAL", 500, false;
    /// What a newer daemon says to this one: the status and `retriable` tell what it means.
    #[serde(other)]
    Unknown = "UNKNOWN", 502, false;
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The body of every failing answer, and the data of every `error` event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{code}: {message}")]
pub struct ErrorBody {
    pub code: ErrorCode,
    /// For people; names the field, file, node or pool at fault.
    pub message: String,
    pub retriable: bool,
    /// Milliseconds.
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineKind>,
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub node_id: Option<NodeId>,
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub pool_id: Option<PoolId>,
    /// Which rule refused an admission.
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub policy_label: Option<String>,
    /// Of a task that was not to wait: what it would have waited for.
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub detail: Option<Box<WaitingFor>>,
    /// Between the daemons only: what ended an attempt on its node.
    #[serde(default, deserialize_with = "cause", skip_serializing_if = "Option::is_none")]
    pub cause: Option<EndCause>,
    /// Between the daemons only: how the engine ended, where its node has started it.
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub crash: Option<EngineCrash>,
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
}

/// A cause that is more than a word is a newer node's too.
fn cause<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<EndCause>, D::Error> {
    let reported = Value::deserialize(deserializer)?;
    Ok((!reported.is_null()).then(|| serde_json::from_value(reported).unwrap_or(EndCause::Unknown)))
}

impl ErrorBody {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            retriable: code.retriable(),
            retry_after_ms: None,
            engine: None,
            node_id: None,
            pool_id: None,
            policy_label: None,
            detail: None,
            cause: None,
            crash: None,
            correlation_id: None,
        }
    }

    /// `INVALID_PARAMS`; the message begins with the name of the field.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidParams, message)
    }

    #[must_use]
    pub fn at(mut self, node_id: &NodeId, pool_id: &PoolId) -> Self {
        self.node_id = Some(node_id.clone());
        self.pool_id = Some(pool_id.clone());
        self
    }

    #[must_use]
    pub fn with_cause(mut self, cause: EndCause) -> Self {
        self.cause = Some(cause);
        self
    }

    /// As another process has it, within what is kept of its texts.
    pub fn cut(&mut self) {
        let Self { message, policy_label, crash, correlation_id, .. } = self;
        limits::cut(message);
        let signal = crash.as_mut().map(|crash| &mut crash.signal);
        policy_label.iter_mut().chain(correlation_id).chain(signal).for_each(limits::cut);
    }

    #[must_use]
    pub fn retry_after_ms(mut self, millis: u64) -> Self {
        self.retry_after_ms = Some(millis);
        self
    }
}

/// Why a node ended an attempt with an `error` frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EndCause {
    /// The engine's connection was lost, or closed without its end marker.
    EngineDied,
    #[serde(rename = "engine_5xx")]
    Engine5xx,
    /// The engine refused the request itself: final, passed to the client.
    #[serde(rename = "engine_4xx")]
    Engine4xx,
    /// The engine does not let its operator in, or lacks what its operator says that it has: nothing
    /// of the request's.
    EngineDenied,
    EngineTimeout,
    /// A replayed stream did not begin with what had been sent.
    ReplayDiffers,
    Canceled,
    /// Something that a newer node says.
    #[serde(other)]
    Unknown,
}

/// The end of an engine by a signal that its own code, or its input, brings about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EngineCrash {
    /// As in `SIGSEGV`.
    pub signal: String,
    /// Attempts that the engine had accepted within the 2 s before its end and had not finished well;
    /// the same number for each attempt of one end. Source: .specs/01 CLOUD-2416.
    pub suspects: u32,
    /// Whether this attempt is one of them.
    pub suspect: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-1100
    #[test]
    fn every_code_is_spelt_on_the_wire_as_in_the_table() {
        for code in ErrorCode::ALL {
            let json = serde_json::to_string(code).unwrap();
            assert_eq!(json, format!("\"{}\"", code.as_str()));
            assert_eq!(serde_json::from_str::<ErrorCode>(&json).unwrap(), *code);
            assert!((400..600).contains(&code.http_status()));
        }
    }

    // CLOUD-2416
    #[test]
    fn a_crash_is_read_whatever_its_signal_and_a_body_without_one_is_read_too() {
        let crash = EngineCrash { signal: "SIGSEGV".into(), suspects: 1, suspect: true };
        let body = ErrorBody { crash: Some(crash), ..ErrorBody::new(ErrorCode::WorkerReset, "it died") };
        let mut json = serde_json::to_value(&body).unwrap();
        assert_eq!(json["crash"], serde_json::json!({"signal":"SIGSEGV","suspects":1,"suspect":true}));
        json["crash"]["signal"] = "SIGNEW".into();
        let read: ErrorBody = serde_json::from_value(json).unwrap();
        assert_eq!(read.crash.unwrap().signal, "SIGNEW");
        let old = r#"{"code":"WORKER_RESET","message":"it died","retriable":true}"#;
        assert_eq!(serde_json::from_str::<ErrorBody>(old).unwrap().crash, None);
    }

    // CLOUD-2721
    #[test]
    fn no_text_of_a_foreign_error_is_kept_beyond_its_bound() {
        let long = || "x".repeat(1_000_000);
        let mut body = ErrorBody {
            policy_label: Some(long()),
            correlation_id: Some(long()),
            crash: Some(EngineCrash { signal: long(), suspects: 1, suspect: true }),
            ..ErrorBody::new(ErrorCode::WorkerReset, long())
        };
        body.cut();
        assert!(serde_json::to_string(&body).unwrap().len() < 4 * limits::MAX_MESSAGE_BYTES + 256);
    }

    #[test]
    fn absent_fields_stay_off_the_wire() {
        let json = serde_json::to_value(ErrorBody::new(ErrorCode::NotFound, "no such task")).unwrap();
        assert_eq!(json, serde_json::json!({"code":"NOT_FOUND","message":"no such task","retriable":false}));
    }
}
