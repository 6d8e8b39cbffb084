//! Starts, written without a copy of their payloads but the one into the body, and read without any.

use bytes::Bytes;
use pool_registry_types::task::{Reasoning, Resume, Workload};
use pool_registry_types::{AttemptId, LogId, ModelRef, PoolId, ReplicaId, TaskId, TraceContext};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use task_stream::{Payload, PayloadFormat, TaskCaller, TaskSpec};

use super::{LifeId, LinkKey, MAX_IDS, MAX_SEEN, MAX_STARTS, MAX_STARTS_BYTES, Seen, lists};

/// Longest start that goes with others, bytes of its JSON. Source: .specs/01 CLOUD-2604.
pub const MAX_INLINE_BYTES: usize = 64 * 1024;
/// Longest line of JSON before a payload that goes alone: what a log has sent before may be in it.
pub const MAX_LINE_BYTES: usize = 16 * 1024 * 1024;
/// What stands around the payload of a start.
const BEFORE_PAYLOAD: &[u8] = b",\"payload\":";

/// All of a start but its payload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StartFacts {
    /// Of the attempt, on the link that answers.
    pub number: u64,
    pub pool_id: PoolId,
    pub attempt_id: AttemptId,
    pub task_id: TaskId,
    pub log_id: LogId,
    /// The index of the first frame that this attempt writes.
    #[serde(default)]
    pub first_index: u64,
    /// Milliseconds that are left.
    #[serde(default, deserialize_with = "lenient", skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    #[serde(default, deserialize_with = "lenient", skip_serializing_if = "Option::is_none")]
    pub replica_hint: Option<ReplicaId>,
    /// What an earlier attempt has sent, where this one goes on from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<Resume>,
    pub spec: StartSpec,
    pub payload_format: PayloadFormat,
    /// The whole stream is kept until it is done; else what was not seen (`attached`).
    #[serde(default, skip_serializing_if = "is_false")]
    pub keep: bool,
    #[serde(default)]
    pub traceparent: String,
    #[serde(default)]
    pub correlation_id: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tracestate: String,
    #[serde(default, deserialize_with = "lenient", skip_serializing_if = "Option::is_none")]
    pub caller: Option<TaskCaller>,
}

impl StartFacts {
    pub fn trace(&self) -> TraceContext {
        TraceContext {
            traceparent: self.traceparent.clone(),
            correlation_id: self.correlation_id.clone(),
            tracestate: self.tracestate.clone(),
        }
    }
}

/// Of a task's facts those that a node acts on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StartSpec {
    pub model_ref: ModelRef,
    /// Says how the task is run: one that is not known is refused.
    #[serde(default)]
    pub workload: Workload,
    #[serde(default, deserialize_with = "lenient", skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<Reasoning>,
    /// The bound on tokens, where the payload has none of its own.
    #[serde(default, deserialize_with = "lenient", skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
}

impl StartSpec {
    /// `max_tokens` is the bound that the control plane adds.
    pub fn of(spec: &TaskSpec, max_tokens: Option<u32>) -> Self {
        let (model_ref, workload) = (spec.model_ref.clone(), spec.workload);
        Self { model_ref, workload, reasoning: Some(spec.reasoning), max_tokens }
    }
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// What this reader does not know reads as absent.
fn lenient<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<Option<T>, D::Error> {
    Ok(serde_json::from_value(Value::deserialize(deserializer)?).ok())
}

/// An attempt that is to begin. Clones share the payload.
#[derive(Debug, Clone, PartialEq)]
pub struct Start {
    pub facts: StartFacts,
    pub payload: Bytes,
}

impl Start {
    /// A payload that is not one JSON value and nothing else goes alone, as it is.
    pub fn new(facts: StartFacts, payload: &Payload) -> Self {
        Self {
            facts: StartFacts { payload_format: payload.format.clone(), ..facts },
            payload: payload.bytes.clone(),
        }
    }

    fn json(&self) -> Vec<u8> {
        serde_json::to_vec(&self.facts).expect("ids, numbers and texts are always JSON")
    }

    /// Whether the payload can stand inside of other JSON, and is the same when it is read there.
    pub(crate) fn has_json(&self) -> bool {
        let value = serde_json::from_slice::<&RawValue>(&self.payload);
        self.payload.len() <= MAX_INLINE_BYTES
            && value.is_ok_and(|value| value.get().len() == self.payload.len())
    }
}

/// A start that is written already, to be sent with others or alone.
#[derive(Debug, Clone)]
pub struct WrittenStart {
    facts: Vec<u8>,
    payload: Bytes,
    has_json: bool,
}

impl WrittenStart {
    pub fn new(start: &Start) -> Self {
        Self::checked(start, start.has_json())
    }

    /// The same where the payload was looked at before.
    pub(crate) fn checked(start: &Start, has_json: bool) -> Self {
        Self { facts: start.json(), payload: start.payload.clone(), has_json }
    }

    /// What it takes in a batch.
    pub fn bytes(&self) -> usize {
        self.facts.len() + BEFORE_PAYLOAD.len() + self.payload.len() + 1
    }

    /// Whether it goes alone: it is large, or its payload is no JSON.
    pub fn goes_alone(&self) -> bool {
        !self.has_json || self.bytes() > MAX_INLINE_BYTES
    }
}

#[derive(Serialize)]
struct Envelope<'s> {
    life: LifeId,
    lane: u16,
    n: u64,
    #[serde(skip_serializing_if = "<[Seen]>::is_empty")]
    seen: &'s [Seen],
    #[serde(skip_serializing_if = "<[AttemptId]>::is_empty")]
    done: &'s [AttemptId],
}

/// Why a body is not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    #[error("a POST of {0} starts, of more than {MAX_SEEN} positions, or of more than {MAX_IDS} ids")]
    TooMany(usize),
    #[error("starts of {0} bytes, of which {MAX_STARTS_BYTES} go together")]
    TooLong(usize),
    #[error("a start that goes alone")]
    Alone,
    #[error("all of a start but its payload takes {0} bytes, more than {MAX_LINE_BYTES}")]
    Line(usize),
}

/// The body of `POST /v2/attempts`. Errors: it would be refused where it is read.
pub fn write_starts(
    key: LinkKey,
    starts: &[WrittenStart],
    seen: &[Seen],
    done: &[AttemptId],
) -> Result<Bytes, WriteError> {
    if starts.len() > MAX_STARTS || seen.len() > MAX_SEEN || done.len() > MAX_IDS {
        return Err(WriteError::TooMany(starts.len()));
    }
    if starts.iter().any(WrittenStart::goes_alone) {
        return Err(WriteError::Alone);
    }
    let bytes: usize = starts.iter().map(WrittenStart::bytes).sum();
    if bytes > MAX_STARTS_BYTES {
        return Err(WriteError::TooLong(bytes));
    }
    let LinkKey { life, lane, n } = key;
    let mut body = to_object(&Envelope { life, lane, n, seen, done });
    body.reserve(bytes + 2 * starts.len() + 16);
    body.extend_from_slice(b",\"start\":[");
    for (before, start) in starts.iter().enumerate() {
        if before > 0 {
            body.push(b',');
        }
        body.extend_from_slice(&start.facts[..start.facts.len() - 1]);
        body.extend_from_slice(BEFORE_PAYLOAD);
        body.extend_from_slice(&start.payload);
        body.push(b'}');
    }
    body.extend_from_slice(b"]}");
    Ok(body.into())
}

/// The body of `POST /v2/attempts/{attempt_id}`: a line, and the payload as it came. Errors: the line
/// would be longer than one is read.
pub fn write_single(key: LinkKey, start: &WrittenStart) -> Result<[Bytes; 2], WriteError> {
    let LinkKey { life, lane, n } = key;
    let mut line = to_object(&Envelope { life, lane, n, seen: &[], done: &[] });
    line.extend_from_slice(b",\"start\":");
    line.extend_from_slice(&start.facts);
    line.extend_from_slice(b"}\n");
    if line.len() > MAX_LINE_BYTES {
        return Err(WriteError::Line(line.len()));
    }
    Ok([line.into(), start.payload.clone()])
}

/// JSON of an object that goes on.
fn to_object<T: Serialize>(value: &T) -> Vec<u8> {
    let mut json = crate::content::to_json(value);
    json.pop();
    json
}

/// Why a start cannot be read. It is refused under its number, where it has one.
#[derive(Debug, thiserror::Error)]
#[error("a start that cannot be read")]
pub struct StartError {
    pub number: Option<u64>,
    #[source]
    pub source: serde_json::Error,
}

/// Why the body of a single start cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SingleError {
    #[error("the line before the payload cannot be read")]
    Line(#[source] serde_json::Error),
    #[error("there is no line of at most {MAX_LINE_BYTES} bytes before the payload")]
    NoLine,
}

/// `POST /v2/attempts` as it was read.
#[derive(Debug)]
pub struct StartsBody {
    pub key: LinkKey,
    pub start: Vec<Result<Start, StartError>>,
    pub seen: Vec<Seen>,
    pub done: Vec<AttemptId>,
}

/// `POST /v2/attempts/{attempt_id}` as it was read.
#[derive(Debug)]
pub struct SingleBody {
    pub key: LinkKey,
    pub start: Result<Start, StartError>,
}

#[derive(Deserialize)]
struct RawStarts<'b> {
    life: LifeId,
    lane: u16,
    n: u64,
    #[serde(default, borrow, deserialize_with = "raw_starts")]
    start: Vec<&'b RawValue>,
    #[serde(default, deserialize_with = "lists::seen")]
    seen: Vec<Seen>,
    #[serde(default, deserialize_with = "lists::ids")]
    done: Vec<AttemptId>,
}

fn raw_starts<'de: 'b, 'b, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<&'b RawValue>, D::Error> {
    let starts: Vec<&RawValue> = lists::bounded(deserializer, MAX_STARTS)?;
    let bytes: usize = starts.iter().map(|start| start.get().len()).sum();
    if bytes > MAX_STARTS_BYTES {
        return Err(D::Error::custom(format_args!(
            "starts of {bytes} bytes, of which {MAX_STARTS_BYTES} go together"
        )));
    }
    Ok(starts)
}

#[derive(Deserialize)]
struct RawSingle<'b> {
    life: LifeId,
    lane: u16,
    n: u64,
    #[serde(borrow)]
    start: &'b RawValue,
}

#[derive(Deserialize)]
struct RawPayload<'b> {
    #[serde(borrow)]
    payload: &'b RawValue,
}

#[derive(Deserialize)]
struct Number {
    number: u64,
}

/// Reads the body of `POST /v2/attempts`; the payloads are slices of it.
pub fn read_starts(body: &Bytes) -> Result<StartsBody, serde_json::Error> {
    let raw: RawStarts<'_> = serde_json::from_slice(body)?;
    let read = |start: &&RawValue| {
        let facts = read_facts(start)?;
        let raw: RawPayload<'_> = serde_json::from_str(start.get())
            .map_err(|source| StartError { number: Some(facts.number), source })?;
        Ok(Start { facts, payload: body.slice_ref(raw.payload.get().as_bytes()) })
    };
    Ok(StartsBody {
        key: LinkKey { life: raw.life, lane: raw.lane, n: raw.n },
        start: raw.start.iter().map(read).collect(),
        seen: raw.seen,
        done: raw.done,
    })
}

/// Where the line of a single start's body ends; absent while it has not come.
pub fn line_end(body: &[u8]) -> Option<usize> {
    body.iter().take(MAX_LINE_BYTES + 1).position(|byte| *byte == b'\n')
}

/// Reads the body of `POST /v2/attempts/{attempt_id}`; the payload is a slice of it.
pub fn read_single(body: &Bytes) -> Result<SingleBody, SingleError> {
    let end = line_end(body).ok_or(SingleError::NoLine)?;
    let raw: RawSingle<'_> = serde_json::from_slice(&body[..end]).map_err(SingleError::Line)?;
    let start = read_facts(raw.start).map(|facts| Start { facts, payload: body.slice(end + 1..) });
    Ok(SingleBody { key: LinkKey { life: raw.life, lane: raw.lane, n: raw.n }, start })
}

fn read_facts(start: &RawValue) -> Result<StartFacts, StartError> {
    serde_json::from_str(start.get()).map_err(|source| {
        let number = serde_json::from_str::<Number>(start.get()).ok().map(|start| start.number);
        StartError { number, source }
    })
}
