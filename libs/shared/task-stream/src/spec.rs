//! [`TaskSpec`]: the facts of a task.
//!
//! They are taken from the client's request once, where it comes in. What they are written with may
//! be read by a later version: what it does not know is passed over, and what it adds has a default.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use pool_registry_types::engines::EngineSet;
use pool_registry_types::placement::PlacementConstraints;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::task::{KvHint, Priority, Reasoning, ResumeMode, TaskRequest, Workload};
use pool_registry_types::trace::TraceContext;
use pool_registry_types::{HolderId, ModelRef, SessionId, SessionKey, TaskId};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// All that schedulers know of a task. What its engine works on is its [`crate::Payload`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskSpec {
    /// As its holder knows it: another holder may have given the same one.
    pub task_id: TaskId,
    /// Whose it is.
    #[serde(default)]
    pub holder: HolderId,
    pub model_ref: ModelRef,
    /// The kinds of engines that can do it, and that it does not rule out.
    pub engines: EngineSet,
    /// What other kinds cannot do of it, whether or not it rules them out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lacking: Vec<Lacking>,
    /// Its body goes to the engine as it came, which not every node does.
    #[serde(default, skip_serializing_if = "is_false")]
    pub passes_on: bool,
    /// Tokens that a pool's context must hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ctx: Option<u32>,
    #[serde(default)]
    pub priority: Priority,
    /// Strict within itself: a constraint that is not known cannot be kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<PlacementConstraints>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<SessionId>,
    #[serde(default)]
    pub kv_hint: KvHint,
    #[serde(default)]
    pub workload: Workload,
    /// The client's bound on tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// The client's estimate of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_tokens: Option<u32>,
    /// Milliseconds from admission to the end of the stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Milliseconds from a dispatch to the first token; absent: the server's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_token_ms: Option<u64>,
    /// Milliseconds between two tokens; absent: the server's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_idle_ms: Option<u64>,
    /// How its stream goes on when it is lost after tokens; absent: it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continuation: Option<ResumeMode>,
    #[serde(default)]
    pub reasoning: Reasoning,
    /// Who submitted it; absent where no tokens are configured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caller: Option<TaskCaller>,
    pub trace: TraceContext,
    pub digest: BodyDigest,
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// What engines of a kind cannot do of a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lacking {
    pub engine: EngineKind,
    /// The first field of the request that they cannot honour.
    pub field: Cow<'static, str>,
}

/// Who submitted a task: the holder of a token, never the token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskCaller {
    pub name: String,
    /// The first six hexadecimal digits of the token's SHA-256.
    pub fingerprint: String,
}

impl TaskSpec {
    /// The facts of a checked request, of the open holder's. `task_id` counts, whatever the request has.
    pub fn of(
        request: &TaskRequest,
        task_id: TaskId,
        digest: BodyDigest,
        caller: Option<TaskCaller>,
        trace: TraceContext,
    ) -> Self {
        let lacks = |engine| request.lacks(engine).map(|field| Lacking { engine, field: field.into() });
        let timeouts = request.timeouts.unwrap_or_default();
        Self {
            task_id,
            holder: HolderId::OPEN,
            model_ref: request.model_ref.clone(),
            engines: request.engines(),
            lacking: EngineKind::ALL.into_iter().filter_map(lacks).collect(),
            passes_on: false,
            ctx: request.ctx,
            priority: request.priority,
            placement: request.placement.clone(),
            session_id: request.session_id,
            kv_hint: request.kv_hint,
            workload: request.workload,
            max_tokens: request.max_tokens,
            expected_tokens: request.expected_tokens,
            deadline_ms: request.deadline_ms,
            first_token_ms: timeouts.first_token_ms,
            token_idle_ms: timeouts.token_idle_ms,
            continuation: request.continuation(),
            reasoning: request.reasoning,
            caller,
            trace,
            digest,
        }
    }

    /// The session that it belongs to: its holder's own.
    pub fn session(&self) -> Option<SessionKey> {
        self.session_id.map(|session_id| SessionKey { holder: self.holder, session_id })
    }

    /// The first field that engines of the kind cannot honour; nothing when they can do it all.
    pub fn lacks(&self, engine: EngineKind) -> Option<&str> {
        let known = self.lacking.iter().find(|lacking| lacking.engine == engine)?;
        Some(&known.field)
    }
}

/// Bytes of a SHA-256.
const DIGEST_BYTES: usize = 32;

/// The SHA-256 of a task's body, by which a repeated `task_id` is told from a conflict; what it is
/// taken of is for whoever reads the body to say. Written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct BodyDigest([u8; DIGEST_BYTES]);

/// Why a text is no [`BodyDigest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a digest must be 64 hexadecimal digits in lower case")]
pub struct InvalidDigest;

impl BodyDigest {
    pub const fn new(sha256: [u8; DIGEST_BYTES]) -> Self {
        Self(sha256)
    }
}

impl fmt::Display for BodyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BodyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for BodyDigest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        let half = |digit: u8| match digit {
            b'0'..=b'9' => Ok(digit - b'0'),
            b'a'..=b'f' => Ok(digit - b'a' + 10),
            _ => Err(InvalidDigest),
        };
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if pairs.len() != DIGEST_BYTES || !rest.is_empty() {
            return Err(InvalidDigest);
        }
        let mut digest = [0; DIGEST_BYTES];
        for (byte, [high, low]) in digest.iter_mut().zip(pairs) {
            *byte = half(*high)? << 4 | half(*low)?;
        }
        Ok(Self(digest))
    }
}

impl Serialize for BodyDigest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BodyDigest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use pool_registry_types::task::{ChatMessage, Recovery, Role, Timeouts};
    use serde_json::{Value, json};
    use uuid::Uuid;

    use super::*;

    fn request() -> TaskRequest {
        TaskRequest::completion(ModelRef::new("m").unwrap(), "a secret prompt")
    }

    fn spec(request: &TaskRequest) -> TaskSpec {
        let caller = TaskCaller { name: "ci".into(), fingerprint: "0a1b2c".into() };
        let trace = TraceContext {
            traceparent: "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01".into(),
            correlation_id: "c-1".into(),
            tracestate: String::new(),
        };
        let digest = BodyDigest::new([0xa5; DIGEST_BYTES]);
        TaskSpec::of(request, TaskId(Uuid::from_u128(7)), digest, Some(caller), trace)
    }

    /// A request with everything that counts in a spec.
    fn rich() -> TaskRequest {
        TaskRequest {
            session_id: Some(SessionId(Uuid::from_u128(9))),
            ctx: Some(4_096),
            priority: Priority::Batch,
            placement: Some(serde_json::from_value(json!({"mode": "pin", "node_id": "a"})).unwrap()),
            kv_hint: KvHint::Cold,
            workload: Workload::Embedding,
            max_tokens: Some(10),
            expected_tokens: Some(5),
            deadline_ms: Some(1_000),
            timeouts: Some(Timeouts { first_token_ms: Some(20), token_idle_ms: Some(30) }),
            recovery: Recovery::Continue,
            reasoning: Reasoning::Drop,
            ..request()
        }
    }

    // CLOUD-1217
    #[test]
    fn a_spec_holds_the_facts_of_a_request_and_nothing_of_its_prompt() {
        let spec = spec(&rich());
        let timeouts = (spec.first_token_ms, spec.token_idle_ms, spec.deadline_ms);
        assert_eq!(timeouts, (Some(20), Some(30), Some(1_000)));
        assert_eq!((spec.max_tokens, spec.expected_tokens, spec.ctx), (Some(10), Some(5), Some(4_096)));
        assert_eq!((spec.continuation, spec.workload), (Some(ResumeMode::Append), Workload::Embedding));
        assert_eq!((spec.priority, spec.reasoning), (Priority::Batch, Reasoning::Drop));
        assert_eq!((spec.kv_hint, spec.placement.clone()), (KvHint::Cold, rich().placement));
        let written = serde_json::to_string(&spec).unwrap();
        assert!(!written.contains("secret"), "{written}");
    }

    // CLOUD-2481
    #[test]
    fn a_spec_says_which_engines_can_do_the_task_and_what_the_others_lack() {
        let message = ChatMessage { role: Role::User, content: "x".into() };
        let cases = [
            request(),
            TaskRequest { grammar: Some("root ::= \"a\"".into()), ..request() },
            TaskRequest { engine: Some(EngineKind::Vllm), min_p: Some(0.1), ..request() },
            TaskRequest { prompt: None, messages: Some(vec![message]), top_k: Some(1), ..request() },
        ];
        for case in cases {
            let spec = spec(&case);
            assert_eq!(spec.engines, case.engines());
            for engine in EngineKind::ALL {
                assert_eq!(spec.lacks(engine), case.lacks(engine), "{engine}");
            }
        }
        assert_eq!(spec(&request()).lacking, []);
    }

    #[test]
    fn a_spec_is_read_as_it_was_written_and_by_an_older_and_a_newer_reader_too() {
        for request in [rich(), request()] {
            let spec = spec(&request);
            let mut written = serde_json::to_value(&spec).unwrap();
            assert_eq!(serde_json::from_value::<TaskSpec>(written.clone()).unwrap(), spec);
            written["something_new"] = Value::Bool(true);
            written["engines"].as_array_mut().unwrap().push("an_engine_to_come".into());
            assert_eq!(serde_json::from_value::<TaskSpec>(written).unwrap(), spec);
        }
        let plain = spec(&request());
        let least = json!({
            "task_id": plain.task_id, "model_ref": "m", "engines": plain.engines, "trace": plain.trace,
            "digest": "a5".repeat(DIGEST_BYTES),
        });
        let read: TaskSpec = serde_json::from_value(least).unwrap();
        assert_eq!(read, TaskSpec { caller: None, ..plain });
    }

    #[test]
    fn a_digest_is_64_hexadecimal_digits_and_nothing_else() {
        let digest = BodyDigest::new(std::array::from_fn(|n| u8::try_from(n * 8).unwrap()));
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert!(digest.to_string().starts_with("0008101820"), "{digest}");
        for bad in ["", "a5", &"a5".repeat(31), &"a5".repeat(33), &"A5".repeat(32), &"g5".repeat(32)] {
            assert_eq!(bad.parse::<BodyDigest>(), Err(InvalidDigest), "{bad}");
        }
    }
}
