//! One attempt on one engine, as a stream of final frames.
//!
//! The answer's headers go out when the slot is taken, before any prefill. From then on a
//! comment every second proves that the node lives. The stream is driven by whoever reads it:
//! there is no task and no channel of its own, and dropping it drops the engine's request.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{FutureExt, Stream, StreamExt, stream};
use handoff_watcher::HandoffName;
use http_body_util::BodyStream;
use hyper::body::Incoming;
use node_core::{Accepted, Ask, Readiness};
use pool_registry_types::error::EndCause;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::sse::{
    Decoder, ENGINE_WORKS, MAX_FRAME_BYTES, SseError, TOKEN_IDS, UNLOGGED_THOUGHT, write_comment, write_frame,
};
use pool_registry_types::task::{
    End, FinishReason, InferRequest, MAX_RESULT_BYTES, Reasoning, ResumeMode, TaskRequest,
};
use pool_registry_types::{
    AttemptId, ErrorBody, ErrorCode, LogId, ModelRef, PoolId, ReplicaId, TraceContext,
};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::agent::Agent;
use crate::attempt_log::AttemptLog;
use crate::engines::client::{attempt_headers, with_causes};
use crate::engines::documents::{self, Document, DocumentError};
use crate::engines::{
    self, Answer, CallError, Delta, Endpoint, EngineClient, EngineEvent, EngineRequest, Look, NotReady,
    Reader, Refusal, Reply, Sent, Unsent, Whose,
};

/// What some servers begin a text with.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Pieces of an engine's stream that are taken together when they have arrived already.
const MOST_PIECES_AT_ONCE: usize = 64;
/// Longest wait for the word of an engine that it still has the model, beside which its answer waits.
const IDENTITY_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause between two comments.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(1);
/// Bytes prove that an engine lives; saying so once in this span is enough.
const HEARD_EVERY: Duration = Duration::from_millis(500);
/// What may follow the end of an answer before its connection is given up, bytes and time.
const MOST_LEFT_BYTES: usize = 64 * 1024;
const LEFT_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest wait for how an engine has ended whose connection was lost.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// The stream of an attempt: frames and comments, in as many pieces as they came.
pub type Frames = Pin<Box<dyn Stream<Item = Result<Bytes, Infallible>> + Send>>;

/// An accepted attempt.
pub struct Inference {
    pub replica_id: ReplicaId,
    /// The number of the last report made before the acceptance.
    pub report_seq: u64,
    pub frames: Frames,
}

impl std::fmt::Debug for Inference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inference").field("replica_id", &self.replica_id).finish_non_exhaustive()
    }
}

type Pieces = Pin<Box<dyn Stream<Item = Result<Bytes, String>> + Send>>;
type Opening = Pin<Box<dyn Future<Output = Result<Sent, NotSent>> + Send>>;

/// Why the engine has not answered the attempt.
enum NotSent {
    Unsent(Unsent),
    /// Another engine answers at its place than the one that was bound.
    Changed(String),
}

enum Phase {
    /// Everything was sent before; only the end was lost.
    Complete,
    Opening(Opening),
    Refused(Pin<Box<dyn Future<Output = Refusal> + Send>>),
    Streaming(Pieces),
    /// The answer is one document, of which nothing is given out before it is whole.
    Reading(Pin<Box<dyn Future<Output = Result<Document, DocumentError>> + Send>>),
    /// The engine's connection was lost, and how it has ended is to be said with it.
    Lost {
        error: Box<ErrorBody>,
        until: Instant,
    },
    /// The last bytes were given out.
    Over,
}

/// How the bytes of an answer are cut into events.
enum Framing {
    /// Its first byte will show it.
    Open,
    Events,
    /// One JSON object, whose end is that of the message.
    Whole(Vec<u8>),
}

/// What was sent before and has not come again.
#[derive(Debug, Default)]
struct Unrepeated {
    thought: String,
    text: String,
}

/// Which event a piece becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Token,
    Reasoning,
}

/// Everything that one attempt needs while it runs.
struct Generation {
    slot: Slot,
    phase: Phase,
    framing: Framing,
    decoder: Decoder,
    reader: Reader,
    reply: &'static Reply,
    /// For an engine that turns out not to have it.
    path: String,
    /// Results that a document must have.
    asked: usize,
    log_id: LogId,
    index: u64,
    /// Only where the stream is replayed.
    unrepeated: Unrepeated,
    /// Thoughts are written into the log.
    keeps_thoughts: bool,
    /// Tokens that earlier attempts have sent and this one does not make again.
    tokens_before: u64,
    started: Instant,
    first_token: Option<Instant>,
    heard_sent: Option<Instant>,
    keep_alive: Interval,
    cancel: CancellationToken,
}

/// The slot of an attempt. Dropped without an end, it is given back once the engine is done with it.
struct Slot {
    agent: Arc<Agent>,
    attempt: AttemptId,
    log: AttemptLog,
    name: HandoffName,
    engine: EngineKind,
    at: Endpoint,
    open: bool,
    /// The connection to the engine is lost: it has nothing more to do with the attempt.
    lost: bool,
}

impl Slot {
    /// Ends the attempt. Returns the final report number.
    fn end(&mut self, engine_idle: bool) -> u64 {
        self.open = false;
        self.agent.cancels.lock().remove(&self.attempt);
        if engine_idle {
            let seq = self.agent.core.lock().ended(&self.attempt);
            self.agent.notify_work_ended();
            return seq;
        }
        let seq = self.agent.with_core(|core, now| core.ended_before_release(now, &self.attempt));
        self.agent.watch_slots(self.name.clone(), self.at.key.clone());
        seq
    }

    /// The engine cannot be reached: said before the attempt's end, so that nothing is sent there.
    fn engine_gone(&self, readiness: Readiness) {
        self.agent.observed(&self.name.pool_id, &self.name.replica_id, readiness);
        self.agent.look_now(&self.name);
    }

    /// The engine is done with the attempt, or never had it.
    fn cleared(&self) {
        self.agent.with_core(|core, _| core.cleared(&self.attempt));
    }

    /// Its connection was lost: whether it lives is looked at now.
    fn engine_suspected(&self) {
        self.agent.look_now(&self.name);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.open {
            self.agent.counters.lock().canceled += 1;
            self.log.abandoned();
            self.end(self.lost);
        }
    }
}

/// Sends the request. A name that came from the engine holds for the process that gave it: over a
/// connection that is new, whoever answers is asked whether it still has it.
async fn open(
    request: EngineRequest,
    client: EngineClient,
    at: Endpoint,
    named: Option<(EngineKind, ModelRef, String)>,
) -> Result<Sent, NotSent> {
    let sent = request.send(client.clone(), at.clone()).await.map_err(NotSent::Unsent)?;
    // A refusal speaks for itself, unless it is that there is no such thing.
    let in_question = sent.answer.fresh && matches!(sent.answer.status(), 200..=299 | 404);
    if let Some((engine, model, own)) = named.filter(|_| in_question) {
        let look = Look { client: &client, at: &at, models: &[] };
        let looking = engines::facts(engine, &look);
        let late = |_| Err(NotReady::Silent(String::new()));
        let looked = tokio::time::timeout(IDENTITY_TIMEOUT, looking).await.unwrap_or_else(late);
        let changed = match looked {
            Ok(facts) => facts.models.get(&model) != Some(&own),
            // A busy one is not another one.
            Err(NotReady::Silent(_) | NotReady::Unasked(_)) => false,
            Err(NotReady::Loading | NotReady::Failed(_) | NotReady::Gone(_)) => true,
        };
        if changed {
            return Err(NotSent::Changed(format!("the engine does not have {model} any more")));
        }
    }
    Ok(sent)
}

impl Agent {
    /// Takes a slot for the attempt and starts it, or says why not. `trace` is that of whoever asks:
    /// the log names it, and a child of it goes to the engine with every request of the attempt.
    /// Errors: those of [`node_core::NodeCore::accept`], and `UNSUPPORTED` for what the engine cannot do.
    pub fn infer(
        self: &Arc<Self>,
        pool_id: &PoolId,
        request: InferRequest,
        trace: Option<&TraceContext>,
    ) -> Result<Inference, ErrorBody> {
        request.check()?;
        let log = AttemptLog::new(pool_id, &request, trace);
        let ask = Ask {
            node_id: &request.node_id,
            boot_id: request.boot_id,
            attempt: request.attempt_id,
            model: Some(&request.task.model_ref),
            task: Some(request.task_id),
            hint: request.replica_hint.as_ref(),
        };
        let now = self.now();
        let accepted = self.core.lock().accept(now, pool_id, &ask);
        let accepted = accepted.inspect_err(|error| {
            self.counters.lock().refused += 1;
            log.refused(error);
        })?;
        let name = HandoffName { pool_id: pool_id.clone(), replica_id: accepted.replica_id.clone() };
        let mut at = self.endpoint(&name, &accepted.url);
        if let Some(trace) = trace {
            let (_, span_id) = Uuid::new_v4().as_u64_pair();
            at.headers = attempt_headers(&trace.child(span_id), &request.attempt_id);
        }
        let slot = Slot {
            agent: Arc::clone(self),
            attempt: request.attempt_id,
            log,
            name,
            engine: accepted.engine,
            at,
            open: true,
            lost: false,
        };
        let (replica_id, report_seq) = (accepted.replica_id.clone(), accepted.report_seq);
        let generation = Generation::begin(slot, accepted, request)?;
        let frames = stream::unfold(generation, |mut generation| async move {
            generation.next().await.map(|bytes| (Ok(bytes), generation))
        });
        Ok(Inference { replica_id, report_seq, frames: Box::pin(frames) })
    }
}

enum Happened {
    Answered(Result<Sent, NotSent>),
    Refused(Refusal),
    Chunk(Option<Result<Bytes, String>>),
    Document(Result<Document, DocumentError>),
    /// It is known how the engine has ended, or will not be.
    Ended(Box<ErrorBody>),
    Tick,
    Canceled,
}

impl Generation {
    /// Asks the engine, or says why not: then the slot is free again.
    fn begin(mut slot: Slot, accepted: Accepted, request: InferRequest) -> Result<Self, ErrorBody> {
        let InferRequest { task, resume, log_id, first_index, thoughts, .. } = request;
        // An older control plane does not read them.
        let reasoning = if thoughts { Reasoning::Keep } else { Reasoning::Drop };
        let task = TaskRequest { reasoning, ..task };
        let asked =
            engines::request(accepted.engine, &task, &accepted.model, accepted.ctx_max, resume.as_ref());
        let asked = asked.and_then(|asked| {
            if slot.agent.with_core(|core, now| core.is_lacking(now, &slot.attempt, &asked.path)) {
                let message = format!("the engine has no {}", asked.path);
                return Err(ErrorBody::new(ErrorCode::Unsupported, message));
            }
            Ok(asked)
        });
        let asked = match asked {
            Ok(asked) => asked,
            Err(error) => {
                slot.cleared();
                slot.end(true);
                slot.log.refused(&error);
                return Err(error);
            }
        };
        slot.agent.counters.lock().accepted += 1;
        slot.log.accepted(&accepted.replica_id);
        let cancel = CancellationToken::new();
        slot.agent.cancels.lock().insert(slot.attempt, cancel.clone());
        let sent = resume.as_ref().filter(|resume| resume.mode == ResumeMode::Append);
        let left = engines::tokens_left(&task, accepted.ctx_max, sent);
        let complete = sent.is_some() && left == Some(0);
        let tokens_before = sent.map_or(0, |sent| sent.tokens);
        let replayed = resume.filter(|resume| resume.mode == ResumeMode::Replay);
        let unrepeated = replayed.map(|resume| Unrepeated { thought: resume.reasoning, text: resume.text });
        let (reply, path) = (asked.reply, asked.path.clone().into_owned());
        let reader = Reader::new(reply, asked.wants_ids).bounded_by(left);
        let inputs = task.inputs.as_ref().map_or(0, |inputs| inputs.texts().len());
        let named = accepted
            .names_from_engine
            .then(|| (accepted.engine, task.model_ref.clone(), accepted.model.clone()));
        let phase = if complete {
            Phase::Complete
        } else {
            let client = slot.agent.client().clone();
            Phase::Opening(Box::pin(open(asked, client, slot.at.clone(), named)))
        };
        let mut keep_alive = interval_at(Instant::now() + KEEP_ALIVE_EVERY, KEEP_ALIVE_EVERY);
        keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            slot,
            phase,
            framing: Framing::Events,
            decoder: Decoder::lossy(),
            reader,
            reply,
            path,
            asked: inputs,
            log_id,
            index: first_index,
            unrepeated: unrepeated.unwrap_or_default(),
            keeps_thoughts: thoughts,
            tokens_before,
            started: Instant::now(),
            first_token: None,
            heard_sent: None,
            keep_alive,
            cancel,
        })
    }

    /// The next bytes of the stream; nothing after the last.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            let happened = match &mut self.phase {
                Phase::Over => return None,
                Phase::Complete => {
                    let mut out = Vec::new();
                    self.finish(&mut out, 0, None, FinishReason::Length);
                    return Some(Bytes::from(out));
                }
                Phase::Opening(answer) => tokio::select! {
                    biased;
                    () = self.cancel.cancelled() => Happened::Canceled,
                    answer = answer => Happened::Answered(answer),
                    _ = self.keep_alive.tick() => Happened::Tick,
                },
                Phase::Refused(reading) => tokio::select! {
                    biased;
                    body = reading => Happened::Refused(body),
                    _ = self.keep_alive.tick() => Happened::Tick,
                },
                Phase::Streaming(pieces) => tokio::select! {
                    biased;
                    () = self.cancel.cancelled() => Happened::Canceled,
                    chunk = pieces.next() => Happened::Chunk(chunk),
                    _ = self.keep_alive.tick() => Happened::Tick,
                },
                Phase::Reading(document) => tokio::select! {
                    biased;
                    () = self.cancel.cancelled() => Happened::Canceled,
                    document = document => Happened::Document(document),
                    _ = self.keep_alive.tick() => Happened::Tick,
                },
                Phase::Lost { error, until } => tokio::select! {
                    biased;
                    crash = self.slot.agent.crash_of(&self.slot.attempt, *until) => {
                        Happened::Ended(Box::new(ErrorBody { crash, ..(**error).clone() }))
                    }
                    _ = self.keep_alive.tick() => Happened::Tick,
                },
            };
            let out = match happened {
                Happened::Tick => {
                    let mut out = Vec::with_capacity(8);
                    write_comment(&mut out, "ka");
                    Some(out)
                }
                Happened::Canceled => {
                    let error = ErrorBody::new(ErrorCode::Canceled, "the node was told to end this attempt");
                    Some(self.fail(error.with_cause(EndCause::Canceled), false))
                }
                Happened::Answered(answer) => self.answered(answer),
                Happened::Refused(refusal) => {
                    let path = self.path.clone();
                    Some(self.refused(refusal, Some(&path)))
                }
                Happened::Chunk(chunk) => Some(self.chunks(chunk).await),
                Happened::Document(document) => Some(self.document(document)),
                Happened::Ended(error) => Some(self.close(*error, true)),
            };
            if let Some(out) = out.filter(|out| !out.is_empty()) {
                return Some(Bytes::from(out));
            }
        }
    }

    fn answered(&mut self, sent: Result<Sent, NotSent>) -> Option<Vec<u8>> {
        let Sent { answer, splitter } = match sent {
            Ok(sent) => sent,
            Err(NotSent::Unsent(Unsent::Refused { path, refusal })) => {
                return Some(self.refused(refusal, Some(path)));
            }
            Err(NotSent::Unsent(Unsent::Call(error))) => return Some(self.not_sent(error)),
            Err(NotSent::Changed(why)) => {
                self.slot.engine_suspected();
                return Some(self.fail(ErrorBody::new(ErrorCode::PoolUnready, why), false));
            }
        };
        self.heard();
        self.reader.split_by(splitter);
        if !(200..300).contains(&answer.status()) {
            self.phase = Phase::Refused(Box::pin(engines::refused(answer)));
            return None;
        }
        let headers = answer.response.headers();
        let kind = headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let bad = |message: String| {
            Some(ErrorBody::new(ErrorCode::WorkerReset, message).with_cause(EndCause::Engine5xx))
        };
        let problem = match kind.as_str() {
            "application/json" | "" => None,
            "text/event-stream" | "text/plain" | "application/octet-stream" if !self.reply.is_document => {
                None
            }
            _ => bad(format!("the engine answered {kind}, which is not {}", self.reply.name)),
        };
        // A message without a length ends where its connection does, by death too.
        let ends_by_itself =
            ["transfer-encoding", "content-length"].into_iter().any(|name| headers.contains_key(name));
        let problem = problem.or_else(|| match self.reply.ends_by_closing && !ends_by_itself {
            true => bad("the engine's stream has neither an end marker nor an end of its own".to_owned()),
            false => None,
        });
        if let Some(error) = problem {
            return Some(self.fail(error, false));
        }
        self.framing = if kind == "text/event-stream" { Framing::Events } else { Framing::Open };
        self.phase = if self.reply.is_document {
            Phase::Reading(Box::pin(documents::read(answer, self.reply, self.asked)))
        } else {
            Phase::Streaming(pieces(answer))
        };
        None
    }

    /// The engine could not be asked.
    fn not_sent(&mut self, error: CallError) -> Vec<u8> {
        let unready = |why: String| ErrorBody::new(ErrorCode::PoolUnready, why);
        if matches!(error, CallError::Refused(_) | CallError::Unreachable(_) | CallError::Ours(_)) {
            self.slot.cleared();
        }
        let (error, idle) = match error {
            CallError::Refused(why) => {
                self.slot.engine_gone(Readiness::Gone(why.clone()));
                (unready(format!("the engine cannot be reached: {why}")), true)
            }
            CallError::Unreachable(why) => {
                self.slot.engine_gone(Readiness::Failed(why.clone()));
                (unready(format!("the engine cannot be reached: {why}")), true)
            }
            CallError::Silent(why) => {
                self.slot.engine_gone(Readiness::Silent(why.clone()));
                (unready(format!("the engine does not answer: {why}")), false)
            }
            CallError::Ours(why) => (unready(format!("the node cannot reach its engine: {why}")), true),
            CallError::Lost(why) => {
                self.slot.engine_gone(Readiness::Failed(why.clone()));
                let message = format!("the engine's connection was lost: {why}");
                let error = ErrorBody::new(ErrorCode::WorkerReset, message);
                (error.with_cause(EndCause::EngineDied), true)
            }
        };
        self.fail(error, idle)
    }

    /// The engine does not do what was asked of it. `path`: what it answered with this status; what
    /// it says inside of an answer is not about that.
    fn refused(&mut self, refusal: Refusal, path: Option<&str>) -> Vec<u8> {
        let Refusal { whose, mut error } = refusal;
        if let Some(key) = &self.slot.at.key {
            error.message = key.hidden_in(&error.message);
        }
        let attempt = self.slot.attempt;
        match whose {
            Whose::Operator => {
                self.slot.agent.change(|core, now| core.refused_operator(now, &attempt, &error.message));
            }
            Whose::Missing => {
                if let Some(path) = path {
                    self.slot.agent.with_core(|core, now| core.lacks(now, &attempt, path));
                }
            }
            Whose::Client | Whose::Engine | Whose::Busy | Whose::Nobody => {}
        }
        self.slot.cleared();
        self.fail(error, true)
    }

    /// The engine lives, whatever looks at it say.
    fn heard(&mut self) {
        if self.heard_sent.is_none_or(|reported| reported.elapsed() >= HEARD_EVERY) {
            self.heard_sent = Some(Instant::now());
            let attempt = self.slot.attempt;
            if self.slot.agent.with_core(|core, now| core.heard(now, &attempt)) {
                self.slot.agent.report_now();
            }
        }
    }

    /// Takes a piece of the engine's stream, and with it what has arrived already.
    async fn chunks(&mut self, first: Option<Result<Bytes, String>>) -> Vec<u8> {
        let mut out = self.chunk(first);
        let mut patient = true;
        for _ in 0..MOST_PIECES_AT_ONCE {
            let Phase::Streaming(pieces) = &mut self.phase else { break };
            match pieces.next().now_or_never() {
                Some(next) => {
                    patient = true;
                    out.extend(self.chunk(next));
                }
                // The connection hands over one piece at a time: let it, once, before giving up.
                None if patient => {
                    patient = false;
                    tokio::task::yield_now().await;
                }
                None => break,
            }
        }
        out
    }

    fn chunk(&mut self, chunk: Option<Result<Bytes, String>>) -> Vec<u8> {
        let mut out = Vec::new();
        let bytes = match chunk {
            Some(Ok(bytes)) => bytes,
            Some(Err(why)) => {
                self.ended(&mut out, Some(why));
                return out;
            }
            None => {
                if self.last_events(&mut out) {
                    self.ended(&mut out, None);
                }
                return out;
            }
        };
        self.heard();
        out.reserve(bytes.len() + 128);
        if matches!(self.framing, Framing::Open)
            && let Some(first) = first_sign(&bytes)
        {
            self.framing = if first == b'{' { Framing::Whole(Vec::new()) } else { Framing::Events };
        }
        match &mut self.framing {
            Framing::Whole(held) => {
                held.extend_from_slice(&bytes);
                if held.len() > MAX_FRAME_BYTES {
                    return self.fail(engines::too_long(), false);
                }
            }
            Framing::Open | Framing::Events => {
                self.decoder.push(&bytes);
                self.events(&mut out);
            }
        }
        out
    }

    /// Takes the whole events that are there. Returns whether the stream goes on.
    fn events(&mut self, out: &mut Vec<u8>) -> bool {
        loop {
            let reported = match self.decoder.next_frame() {
                Ok(Some(frame)) => self.reader.read(&frame),
                Ok(None) => return true,
                Err(error) => {
                    out.extend(self.unreadable(error));
                    return false;
                }
            };
            if !self.reported(out, reported) {
                return false;
            }
        }
    }

    /// The message has ended in order: what stands at its end without an empty line counts. Returns
    /// whether no end was in it.
    fn last_events(&mut self, out: &mut Vec<u8>) -> bool {
        if let Framing::Whole(held) = &mut self.framing {
            let mut event = b"data: ".to_vec();
            // Line breaks between the parts of an object are white space.
            let held = held.strip_prefix(BYTE_ORDER_MARK).unwrap_or(held);
            event.extend(held.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }));
            event.extend_from_slice(b"\n\n");
            self.decoder.push(&event);
            if self.events(out) {
                let end = self.reader.closed_whole();
                self.reported(out, end);
            }
            return false;
        }
        if !self.events(out) {
            return false;
        }
        let reported = match self.decoder.last_frame() {
            Ok(Some(frame)) => self.reader.read_last(&frame),
            Ok(None) => return true,
            Err(error) => {
                out.extend(self.unreadable(error));
                return false;
            }
        };
        self.reported(out, reported)
    }

    fn unreadable(&mut self, error: SseError) -> Vec<u8> {
        match error {
            SseError::TooLong => self.fail(engines::too_long(), false),
            SseError::NotUtf8 => {
                let error = ErrorBody::new(ErrorCode::WorkerReset, format!("the engine failed: {error}"));
                self.fail(error.with_cause(EndCause::Engine5xx), false)
            }
        }
    }

    /// Nothing follows: in order, or because the connection was lost.
    fn ended(&mut self, out: &mut Vec<u8>, lost: Option<String>) {
        let end = if lost.is_some() { self.reader.lost() } else { self.reader.closed() };
        if let Some(end) = end {
            self.reported(out, end);
            return;
        }
        self.slot.engine_suspected();
        let reason = lost.unwrap_or_else(|| "it closed the stream without its end marker".to_owned());
        let error = ErrorBody::new(ErrorCode::WorkerReset, format!("the engine died: {reason}"));
        out.extend(self.fail(error.with_cause(EndCause::EngineDied), true));
    }

    /// Takes what an event of the engine says. Returns whether the stream goes on.
    fn reported(&mut self, out: &mut Vec<u8>, reported: EngineEvent) -> bool {
        match reported {
            EngineEvent::Nothing => true,
            EngineEvent::Delta(delta) => {
                if delta.is_empty() {
                    write_comment(out, ENGINE_WORKS);
                }
                self.delta(out, &delta)
            }
            EngineEvent::End { delta, tokens_out, finish_reason } => {
                if !self.delta(out, &delta) {
                    return false;
                }
                if self.unrepeated.thought.is_empty() && self.unrepeated.text.is_empty() {
                    self.finish(out, tokens_out, None, finish_reason);
                } else {
                    self.replay_differs(out);
                }
                false
            }
            EngineEvent::Failed(reason) => {
                let error = ErrorBody::new(ErrorCode::WorkerReset, format!("the engine failed: {reason}"));
                out.extend(self.fail(error.with_cause(EndCause::Engine5xx), false));
                false
            }
            EngineEvent::Refused(refusal) => {
                out.extend(self.refused(*refusal, None));
                false
            }
        }
    }

    /// Takes thoughts and text. Returns whether the stream goes on.
    fn delta(&mut self, out: &mut Vec<u8>, delta: &Delta) -> bool {
        self.piece(out, Kind::Reasoning, &delta.thought) && self.piece(out, Kind::Token, &delta.text)
    }

    /// Gives out the whole answer, or none of it.
    fn document(&mut self, document: Result<Document, DocumentError>) -> Vec<u8> {
        let document = match document {
            Ok(document) => document,
            Err(error) => {
                let (cause, idle) = match &error {
                    DocumentError::Lost(_) => (EndCause::EngineDied, true),
                    DocumentError::TooLong => {
                        // Every engine would say as much.
                        let message = format!("inputs: {error}: send fewer");
                        return self.fail(ErrorBody::new(ErrorCode::PayloadTooLarge, message), false);
                    }
                    DocumentError::Unreadable(_) => (EndCause::Engine5xx, true),
                };
                let error = ErrorBody::new(ErrorCode::WorkerReset, format!("the engine failed: {error}"));
                return self.fail(error.with_cause(cause), idle);
            }
        };
        self.first_token.get_or_insert_with(Instant::now);
        let mut out = Vec::new();
        let first = self.index;
        for data in &document.results {
            write_frame(&mut out, Some((&self.log_id, self.index)), "result", data);
            self.index += 1;
        }
        if out.len() > MAX_RESULT_BYTES {
            self.index = first;
            let message = format!(
                "inputs: {} results take {} bytes, and a task keeps at most {MAX_RESULT_BYTES}: send fewer",
                document.results.len(),
                out.len()
            );
            return self.fail(ErrorBody::new(ErrorCode::PayloadTooLarge, message), true);
        }
        self.finish(&mut out, 0, document.tokens_in, FinishReason::Stop);
        out
    }

    /// Takes what the engine wrote: what has been sent before is compared, what is new is sent.
    /// Returns whether the stream goes on.
    fn piece(&mut self, out: &mut Vec<u8>, kind: Kind, text: &str) -> bool {
        if text.is_empty() {
            return true;
        }
        if kind == Kind::Reasoning && !self.keeps_thoughts {
            self.brought();
            write_comment(out, UNLOGGED_THOUGHT);
            return true;
        }
        let Unrepeated { thought, text: sent } = &mut self.unrepeated;
        let (rest, other) = match kind {
            Kind::Reasoning => (thought, &*sent),
            Kind::Token => (sent, &*thought),
        };
        if rest.starts_with(text) {
            rest.drain(..text.len());
            return true;
        }
        match text.strip_prefix(rest.as_str()) {
            // Nothing new comes before all that was sent has come again.
            Some(new) if other.is_empty() => {
                rest.clear();
                self.token(out, kind, new)
            }
            _ => {
                self.replay_differs(out);
                false
            }
        }
    }

    /// Never a splice: a reader would get the end of another answer.
    fn replay_differs(&mut self, out: &mut Vec<u8>) {
        let message = "the engine's second run differs from what had been sent";
        let error = ErrorBody::new(ErrorCode::WorkerReset, message).with_cause(EndCause::ReplayDiffers);
        out.extend(self.fail(error, false));
    }

    /// The first output shows that the engine does what was asked.
    fn brought(&mut self) {
        if self.first_token.is_none() {
            self.first_token = Some(Instant::now());
            let attempt = self.slot.attempt;
            self.slot.agent.with_core(|core, _| core.succeeded(&attempt));
        }
    }

    /// The final frame of a token: it is passed on, never written again. Returns whether the stream
    /// goes on.
    fn token(&mut self, out: &mut Vec<u8>, kind: Kind, text: &str) -> bool {
        use std::io::Write;
        self.brought();
        if let Some((ids, count)) = self.reader.take_ids() {
            let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
            let count = self.tokens_before.saturating_add(count);
            write_comment(out, &format!("{TOKEN_IDS}{count} {}", ids.join(",")));
        }
        let begins = out.len();
        let event = if kind == Kind::Token { "token" } else { "reasoning" };
        // Writing to a Vec cannot fail, and a text is always JSON.
        let _ = write!(out, "id: {}:{}\nevent: {event}\ndata: {{\"t\":", self.log_id, self.index);
        let _ = serde_json::to_writer(&mut *out, text);
        let _ = write!(out, ",\"i\":{}}}\n\n", self.index);
        if out.len() - begins > MAX_FRAME_BYTES {
            // Written out it is longer than it came.
            out.truncate(begins);
            out.extend(self.fail(engines::too_long(), false));
            return false;
        }
        self.index += 1;
        true
    }

    fn finish(
        &mut self,
        out: &mut Vec<u8>,
        tokens_out: u64,
        tokens_in: Option<u64>,
        finish_reason: FinishReason,
    ) {
        let since = |at: Instant| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX);
        let (decode_time_ms, decode_ms) = (since(self.started), self.first_token.map_or(0, since));
        let made_here = tokens_out;
        let tokens_out = tokens_out.saturating_add(self.tokens_before);
        let end = End { tokens_out, tokens_in, decode_time_ms, decode_ms, finish_reason };
        let data = serde_json::to_string(&end).unwrap_or_default();
        let attempt = self.slot.attempt;
        self.slot.agent.with_core(|core, _| core.succeeded(&attempt));
        self.slot.cleared();
        let seq = self.slot.end(true);
        let mut counters = self.slot.agent.counters.lock();
        counters.finished += 1;
        counters.tokens = counters.tokens.saturating_add(made_here);
        drop(counters);
        self.slot.log.ended(tokens_out);
        self.last_words(out, "end", &data, seq);
    }

    /// Ends the attempt with the error; where its engine may have died, once it is known how.
    fn fail(&mut self, error: ErrorBody, engine_idle: bool) -> Vec<u8> {
        if error.cause != Some(EndCause::EngineDied) {
            return self.close(error, engine_idle);
        }
        self.slot.lost = true;
        self.phase = Phase::Lost { error: Box::new(error), until: Instant::now() + END_TIMEOUT };
        Vec::new()
    }

    fn close(&mut self, mut error: ErrorBody, engine_idle: bool) -> Vec<u8> {
        error.engine = Some(self.slot.engine);
        let identity = self.slot.agent.identity();
        error = error.at(&identity.node_id, &self.slot.name.pool_id);
        let data = serde_json::to_string(&error).unwrap_or_default();
        let seq = self.slot.end(engine_idle);
        self.slot.agent.counters.lock().failed += 1;
        self.slot.log.failed(&error);
        let mut out = Vec::new();
        self.last_words(&mut out, "error", &data, seq);
        out
    }

    fn last_words(&mut self, out: &mut Vec<u8>, event: &str, data: &str, seq: u64) {
        write_frame(out, Some((&self.log_id, self.index)), event, data);
        write_comment(out, &format!("report-seq {seq}"));
        // Its connection is dropped here, not when the reader is done.
        let phase = std::mem::replace(&mut self.phase, Phase::Over);
        if let Phase::Streaming(pieces) = phase
            && event == "end"
        {
            owned_tasks::task(&self.slot.agent.tracker, "rest of an answer", read_out(pieces));
        }
    }
}

/// The body of an answer, piece by piece.
fn pieces(answer: Answer) -> Pieces {
    let frames = BodyStream::new(answer.response.into_body());
    Box::pin(frames.filter_map(
        |frame: Result<hyper::body::Frame<Bytes>, <Incoming as hyper::body::Body>::Error>| {
            std::future::ready(match frame {
                Ok(frame) => frame.into_data().ok().map(Ok),
                Err(error) => Some(Err(with_causes(&error))),
            })
        },
    ))
}

/// The first byte of an answer that is neither white space nor a byte order mark.
fn first_sign(bytes: &[u8]) -> Option<u8> {
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
    bytes.iter().find(|byte| !byte.is_ascii_whitespace()).copied()
}

/// Reads what may stand behind the end of an answer, so that its connection can be used again.
async fn read_out(mut pieces: Pieces) {
    let reading = async {
        let mut left = MOST_LEFT_BYTES;
        while let Some(Ok(piece)) = pieces.next().await {
            left = left.saturating_sub(piece.len());
            if left == 0 {
                return;
            }
        }
    };
    // Whatever it is that does not end, its connection is given up.
    let _ = tokio::time::timeout(LEFT_TIMEOUT, reading).await;
}
