//! The driver of one attempt: it owns the exchange with the engine, and appends what comes of it to
//! the attempt's buffer as final frames.
//!
//! It is a value that somebody polls: a task of its own ([`Driver::run`]), or the only reader of an
//! attached attempt, so that a token wakes one task and not two. A reader that does not read holds its
//! engine back as its connection always did; a driver with a task of its own waits for the reader of an
//! attached attempt that is more than 8 MiB behind.

mod answer;

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use attempt_link::content::FrameTokens;
use bytes::Bytes;
use futures::StreamExt;
use node_core::{Accepted, Ends, Piece, Readiness};
use pool_registry_types::error::EndCause;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::sse::{Decoder, write_frame};
use pool_registry_types::task::{FinishReason, InferRequest, Reasoning, ResumeMode, TaskRequest};
use pool_registry_types::{ErrorBody, ErrorCode, LogId, ModelRef};
use tokio::time::{Instant, sleep};

use crate::agent::{Agent, Signals};
use crate::engines::documents::{self, Document, DocumentError};
use crate::engines::{
    self, Answer, CallError, Endpoint, EngineClient, EngineRequest, Look, NotReady, Reader, Refusal, Reply,
    Sent, Unsent,
};
use crate::pieces::{Pieces, pieces};
use crate::slot::Slot;

/// Longest wait for the word of an engine that it still has the model, beside which its answer waits.
const IDENTITY_TIMEOUT: Duration = Duration::from_secs(1);
/// A driver with a task of its own shows that it is polled, which is said of it by its link.
const POLLED_EVERY: Duration = Duration::from_secs(1);
/// Bytes prove that an engine lives; saying so once in this span is enough.
pub(crate) const HEARD_EVERY: Duration = Duration::from_millis(500);

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
    /// The answer is one document, of which nothing is appended before it is whole.
    Reading(Pin<Box<dyn Future<Output = Result<Document, DocumentError>> + Send>>),
    /// The engine's connection was lost, and how it has ended is to be said with it.
    Lost {
        error: Box<ErrorBody>,
        until: Instant,
    },
    /// The last bytes were made.
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

/// Works on one attempt until it has ended, and appends what its engine makes to its buffer.
pub(crate) struct Driver {
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
    /// What was made and is not appended yet.
    out: Output,
    /// Only where the stream is replayed.
    unrepeated: Unrepeated,
    /// Thoughts are written into the log.
    keeps_thoughts: bool,
    /// Tokens that earlier attempts have sent and this one does not make again.
    tokens_before: u64,
    started: Instant,
    first_token: Option<Instant>,
    heard_sent: Option<Instant>,
    /// When the engine's stream last brought something, if that was one piece.
    last_pieces: Option<Instant>,
}

/// What one step of a driver has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// There is more in the buffer.
    Appended,
    /// The attempt has ended, and its last bytes are in the buffer.
    Over,
}

/// Frames and comments on their way into the buffer.
#[derive(Debug)]
struct Output {
    first: u64,
    bytes: Vec<u8>,
    ends: Ends,
    /// The tokens of its frames, by their indices, where a link says them apart.
    tokens: Vec<(u64, FrameTokens)>,
}

impl Output {
    /// `first` is the index of the next frame.
    fn new(first: u64) -> Self {
        Self { first, bytes: Vec::new(), ends: Ends::default(), tokens: Vec::new() }
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The index of the next frame.
    fn next(&self) -> u64 {
        self.first + self.ends.frames()
    }

    fn frame(&mut self, log_id: &LogId, event: &str, data: &str) {
        let index = self.next();
        write_frame(&mut self.bytes, Some((log_id, index)), event, data);
        self.ends.push(self.bytes.len());
    }

    fn take(&mut self) -> Piece {
        let taken = std::mem::replace(self, Self::new(self.next()));
        Piece::new(taken.first, taken.bytes, taken.ends).with_tokens(taken.tokens)
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
    match named {
        // In a box of its own, because it is large and mostly not needed.
        Some(named) if is_to_be_asked(&sent.answer) => {
            let looked = Box::pin(first_of_its_process(&sent.answer, &client, &at, &named)).await;
            looked.map(|()| sent).map_err(NotSent::Changed)
        }
        Some(_) | None => Ok(sent),
    }
}

/// Whether it is not known of who has answered that it has the model. A refusal speaks for itself, unless
/// it is that there is no such thing.
fn is_to_be_asked(answer: &Answer) -> bool {
    answer.fresh && matches!(answer.status(), 200..=299 | 404)
}

/// Over a connection that is new whoever answers is asked whether it still has the model by this name.
/// Errors: it has not.
pub(crate) async fn first_of_its_process(
    answer: &Answer,
    client: &EngineClient,
    at: &Endpoint,
    (engine, model, own): &(EngineKind, ModelRef, String),
) -> Result<(), String> {
    if !is_to_be_asked(answer) {
        return Ok(());
    }
    let look = Look { client, at, models: &[] };
    let looking = engines::facts(*engine, &look);
    let late = |_| Err(NotReady::Silent(String::new()));
    let looked = tokio::time::timeout(IDENTITY_TIMEOUT, looking).await.unwrap_or_else(late);
    let changed = match looked {
        Ok(facts) => facts.models.get(model) != Some(own),
        // A busy one is not another one.
        Err(NotReady::Silent(_) | NotReady::Unasked(_)) => false,
        Err(NotReady::Loading | NotReady::Failed(_) | NotReady::Gone(_)) => true,
    };
    if changed { Err(format!("the engine does not have {model} any more")) } else { Ok(()) }
}

enum Happened {
    Answered(Result<Sent, NotSent>),
    Refused(Refusal),
    Chunk(Option<hyper::Result<Bytes>>),
    Document(Result<Document, DocumentError>),
    /// It is known how the engine has ended, or will not be.
    Ended(Box<ErrorBody>),
    Canceled,
}

impl Driver {
    /// Asks the engine, or says why not: then the slot is free again.
    pub(crate) fn begin(
        mut slot: Slot,
        accepted: Accepted,
        request: InferRequest,
    ) -> Result<Self, ErrorBody> {
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
                return Err(slot.refuse(error));
            }
        };
        slot.agent.counters.lock().accepted += 1;
        slot.log.accepted(&accepted.replica_id, accepted.engine, &accepted.model);
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
            out: Output::new(first_index),
            unrepeated: unrepeated.unwrap_or_default(),
            keeps_thoughts: thoughts,
            tokens_before,
            started: Instant::now(),
            first_token: None,
            heard_sent: None,
            last_pieces: None,
        })
    }

    /// Goes on until there is something to append, and appends it. Dropped while it waits, it loses
    /// nothing: the next call goes on.
    pub(crate) async fn step(&mut self) -> Step {
        loop {
            if !self.out.is_empty() || self.slot.is_ending() {
                match self.flush() {
                    Some(step) => return step,
                    None => continue,
                }
            }
            let cancel = &self.slot.signals.cancel;
            let happened = match &mut self.phase {
                Phase::Over => return Step::Over,
                Phase::Complete => {
                    self.finish(0, None, FinishReason::Length);
                    continue;
                }
                Phase::Opening(answer) => tokio::select! {
                    biased;
                    () = cancel.cancelled() => Happened::Canceled,
                    answer = answer => Happened::Answered(answer),
                },
                Phase::Refused(reading) => Happened::Refused(reading.await),
                Phase::Streaming(pieces) => tokio::select! {
                    biased;
                    () = cancel.cancelled() => Happened::Canceled,
                    chunk = pieces.next() => Happened::Chunk(chunk),
                },
                Phase::Reading(document) => tokio::select! {
                    biased;
                    () = cancel.cancelled() => Happened::Canceled,
                    document = document => Happened::Document(document),
                },
                Phase::Lost { error, until } => {
                    let crash = self.slot.agent.crash_of(&self.slot.attempt, *until).await;
                    Happened::Ended(Box::new(ErrorBody { crash, ..(**error).clone() }))
                }
            };
            match happened {
                Happened::Canceled if self.slot.is_stopped() => self.phase = Phase::Over,
                Happened::Canceled => {
                    let error = ErrorBody::new(ErrorCode::Canceled, "the node was told to end this attempt");
                    self.fail(error.with_cause(EndCause::Canceled), false);
                }
                Happened::Answered(answer) => self.answered(answer),
                Happened::Refused(refusal) => {
                    let path = self.path.clone();
                    self.refused(refusal, Some(&path));
                }
                Happened::Chunk(chunk) => self.chunks(chunk).await,
                Happened::Document(document) => self.document(document),
                Happened::Ended(error) => self.close(*error, true),
            }
        }
    }

    /// Appends what was made. Nothing where it did not fit, and the attempt ends with that.
    fn flush(&mut self) -> Option<Step> {
        let piece = self.out.take();
        if matches!(self.phase, Phase::Over) {
            self.slot.finish(Some(piece));
            return Some(Step::Over);
        }
        let first = piece.first();
        match self.slot.append(piece) {
            Ok(()) => Some(Step::Appended),
            Err(error) => {
                self.out = Output::new(first);
                self.close(ErrorBody::new(ErrorCode::PayloadTooLarge, error.to_string()), false);
                None
            }
        }
    }

    /// Goes on without being asked, until the attempt has ended.
    pub(crate) async fn run(mut self) {
        let (agent, signals) = (Arc::clone(&self.slot.agent), Arc::clone(&self.slot.signals));
        let work = pin!(async move {
            loop {
                self.slot.room().await;
                if self.step().await == Step::Over {
                    return;
                }
            }
        });
        polled(&agent, &signals, work).await;
    }

    fn answered(&mut self, sent: Result<Sent, NotSent>) {
        let attempt = self.slot.attempt;
        self.slot.agent.with_core(|core, _| core.held_mut().count_payload(&attempt, 0));
        let Sent { answer, splitter } = match sent {
            Ok(sent) => sent,
            Err(NotSent::Unsent(Unsent::Refused { path, refusal })) => {
                return self.refused(refusal, Some(path));
            }
            Err(NotSent::Unsent(Unsent::Call(error))) => {
                let (error, engine_idle) = unsent(&self.slot, error);
                return self.fail(error, engine_idle);
            }
            Err(NotSent::Changed(why)) => {
                self.slot.engine_suspected();
                return self.fail(ErrorBody::new(ErrorCode::PoolUnready, why), false);
            }
        };
        self.heard();
        self.reader.split_by(splitter);
        if !(200..300).contains(&answer.status()) {
            self.phase = Phase::Refused(Box::pin(engines::refused(answer)));
            return;
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
            return self.fail(error, false);
        }
        self.framing = if kind == "text/event-stream" { Framing::Events } else { Framing::Open };
        self.phase = if self.reply.is_document {
            let (agent, attempt) = (Arc::clone(&self.slot.agent), self.slot.attempt);
            let (reply, asked) = (self.reply, self.asked);
            Phase::Reading(Box::pin(async move {
                let room = Arc::clone(agent.documents());
                let permit = room.take(&answer).await;
                let count = |bytes| agent.with_core(|core, _| core.held_mut().count_payload(&attempt, bytes));
                count(permit.bytes);
                let document = documents::read(answer, reply, asked, &room).await;
                // Its results count as they are appended; without them it ends, and nothing is counted.
                count(0);
                document
            }))
        } else {
            Phase::Streaming(pieces(answer))
        };
    }

    /// The engine does not do what was asked of it.
    fn refused(&mut self, refusal: Refusal, path: Option<&str>) {
        let error = self.slot.refused(refusal, path);
        self.fail(error, true);
    }

    /// The engine lives, whatever looks at it say.
    fn heard(&mut self) {
        if self.heard_sent.is_none_or(|reported| reported.elapsed() >= HEARD_EVERY) {
            self.heard_sent = Some(Instant::now());
            self.slot.heard();
        }
    }
}

/// Polls what works on an attempt, and shows that it is polled.
pub(crate) async fn polled(agent: &Agent, signals: &Signals, mut work: Pin<&mut impl Future<Output = ()>>) {
    let (mut quiet, mut set_at) = (pin!(sleep(POLLED_EVERY)), agent.now());
    poll_fn(|cx| {
        let now = agent.now();
        signals.polled_at.store(now.as_millis(), Ordering::Relaxed);
        let polled = work.as_mut().poll(cx);
        if polled.is_pending() {
            // Moved on each half of its time, and not for each token: it wakes only whom nothing else does.
            if now.since(set_at) >= POLLED_EVERY / 2 {
                quiet.as_mut().reset(Instant::now() + POLLED_EVERY);
                set_at = now;
            }
            let _ = quiet.as_mut().poll(cx);
        }
        polled
    })
    .await;
}

/// The engine could not be asked: the attempt's error, and whether the engine has nothing to do with it.
pub(crate) fn unsent(slot: &Slot, error: CallError) -> (ErrorBody, bool) {
    let unready = |why: String| ErrorBody::new(ErrorCode::PoolUnready, why);
    if matches!(error, CallError::Refused(_) | CallError::Unreachable(_) | CallError::Ours(_)) {
        slot.cleared();
    }
    match error {
        CallError::Refused(why) => {
            slot.engine_gone(Readiness::Gone(why.clone()));
            (unready(format!("the engine cannot be reached: {why}")), true)
        }
        CallError::Unreachable(why) => {
            slot.engine_gone(Readiness::Failed(why.clone()));
            (unready(format!("the engine cannot be reached: {why}")), true)
        }
        CallError::Silent(why) => {
            slot.engine_gone(Readiness::Silent(why.clone()));
            (unready(format!("the engine does not answer: {why}")), false)
        }
        CallError::Ours(why) => (unready(format!("the node cannot reach its engine: {why}")), true),
        CallError::Lost(why) => {
            slot.engine_gone(Readiness::Failed(why.clone()));
            let message = format!("the engine's connection was lost: {why}");
            (ErrorBody::new(ErrorCode::WorkerReset, message).with_cause(EndCause::EngineDied), true)
        }
    }
}
