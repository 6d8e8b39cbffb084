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
use pool_registry_types::error::EndCause;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::sse::{Decoder, TOKEN_IDS, write_comment, write_frame};
use pool_registry_types::task::{End, FinishReason, InferRequest, MAX_RESULT_BYTES, ResumeMode};
use pool_registry_types::{AttemptId, ErrorBody, ErrorCode, LogId, PoolId, ReplicaId};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;
use crate::core::{Ask, Health, Readiness};
use crate::engines::documents::{self, Document, DocumentError};
use crate::engines::{self, Reader, Reply, Said};

/// Pieces of an engine's stream that are taken together when they have arrived already.
const MOST_PIECES_AT_ONCE: usize = 64;
/// Pause between two comments.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(1);
/// How long the slot of a dropped attempt is kept at most: an engine that is busy with others
/// cannot tell that it is done with this one.
const SETTLE_AT_MOST: Duration = Duration::from_millis(500);
const SETTLE_LOOK_EVERY: Duration = Duration::from_millis(25);

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

type EngineBody = Pin<Box<dyn Stream<Item = Result<Bytes, reqwest::Error>> + Send>>;
type EngineAnswer = Pin<Box<dyn Future<Output = Result<reqwest::Response, reqwest::Error>> + Send>>;

enum Phase {
    /// Everything was sent before; only the end was lost.
    Complete,
    Opening(EngineAnswer),
    Refused(Pin<Box<dyn Future<Output = ErrorBody> + Send>>),
    Streaming(EngineBody),
    /// The answer is one document, of which nothing is given out before it is whole.
    Reading(Pin<Box<dyn Future<Output = Result<Document, DocumentError>> + Send>>),
    /// The last bytes were given out.
    Over,
}

/// Everything that one attempt needs while it runs.
struct Generation {
    slot: Slot,
    phase: Phase,
    decoder: Decoder,
    reader: Reader,
    reply: Reply,
    /// Results that a document must have.
    asked: usize,
    log_id: LogId,
    index: u64,
    /// What was sent before and has not come again; only where the stream is replayed.
    unrepeated: Option<String>,
    /// Tokens that earlier attempts have sent and this one does not make again.
    tokens_before: u64,
    started: Instant,
    first_token: Option<Instant>,
    keep_alive: Interval,
    cancel: CancellationToken,
}

/// The slot of an attempt. Dropped without an end, it is given back once the engine is idle.
struct Slot {
    agent: Arc<Agent>,
    attempt: AttemptId,
    pool_id: PoolId,
    replica_id: ReplicaId,
    engine: EngineKind,
    url: String,
    open: bool,
}

impl Slot {
    /// Ends the attempt. Returns the closing word.
    fn end(&mut self, engine_idle: bool) -> u64 {
        self.open = false;
        self.agent.cancels.lock().remove(&self.attempt);
        if engine_idle {
            let seq = self.agent.core.lock().ended(&self.attempt);
            self.agent.tell_work_ended();
            return seq;
        }
        let seq = self.agent.core.lock().ended_unsettled(&self.attempt);
        let settling = settle(Arc::clone(&self.agent), self.attempt, self.engine, self.url.clone());
        self.agent.tracker.spawn(settling);
        seq
    }

    /// The engine cannot be reached: said before the attempt's end, so that nothing is sent there.
    fn engine_gone(&self, reason: String) {
        let health = Health { readiness: Readiness::Failed(reason), busy: None };
        self.agent.observed(&self.pool_id, &self.replica_id, health);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.open {
            self.agent.counters.lock().canceled += 1;
            self.end(false);
        }
    }
}

async fn settle(agent: Arc<Agent>, attempt: AttemptId, engine: EngineKind, url: String) {
    let deadline = Instant::now() + SETTLE_AT_MOST;
    while Instant::now() < deadline {
        tokio::time::sleep(SETTLE_LOOK_EVERY).await;
        let look = tokio::time::timeout_at(deadline, engines::busy(agent.client(), engine, &url)).await;
        // Idle altogether is the only thing that a count of requests can prove of one of them.
        if look == Ok(Some(0)) {
            break;
        }
    }
    agent.settled(&attempt);
}

impl Agent {
    /// Takes a slot for the attempt and starts it, or says why not. Errors: those of
    /// [`crate::NodeCore::accept`], and `UNSUPPORTED` for what the engine cannot do.
    pub fn infer(
        self: &Arc<Self>,
        pool_id: &PoolId,
        request: InferRequest,
        traceparent: Option<&str>,
    ) -> Result<Inference, ErrorBody> {
        request.check()?;
        let ask = Ask {
            node_id: &request.node_id,
            boot_id: request.boot_id,
            attempt: request.attempt_id,
            hint: request.replica_hint.as_ref(),
        };
        let now = self.now();
        let accepted = self.core.lock().accept(now, pool_id, &ask);
        let accepted = accepted.inspect_err(|_| self.counters.lock().refused += 1)?;
        let mut slot = Slot {
            agent: Arc::clone(self),
            attempt: request.attempt_id,
            pool_id: pool_id.clone(),
            replica_id: accepted.replica_id.clone(),
            engine: accepted.engine,
            url: accepted.url.clone(),
            open: true,
        };
        let (ctx_max, resume) = (self.ctx_of(pool_id), request.resume);
        let sent = resume.as_ref().filter(|resume| resume.mode == ResumeMode::Append);
        let asked = match engines::request(accepted.engine, &request.task, ctx_max, resume.as_ref()) {
            Ok(asked) => asked,
            Err(error) => {
                slot.end(true);
                return Err(error);
            }
        };
        self.counters.lock().accepted += 1;
        let cancel = CancellationToken::new();
        self.cancels.lock().insert(request.attempt_id, cancel.clone());
        let left = engines::tokens_left(&request.task, ctx_max, sent);
        let complete = sent.is_some() && left == Some(0);
        let tokens_before = sent.map_or(0, |sent| sent.tokens);
        let unrepeated = resume.filter(|resume| resume.mode == ResumeMode::Replay).map(|resume| resume.text);
        let reply = asked.reply;
        let reader = Reader::new(reply, asked.wants_ids).bounded_by(left);
        let inputs = request.task.inputs.as_ref().map_or(0, |inputs| inputs.texts().len());
        let traceparent = traceparent.map(str::to_owned);
        let phase = if complete {
            Phase::Complete
        } else {
            Phase::Opening(Box::pin(asked.send(self.client().clone(), accepted.url, traceparent)))
        };
        let mut keep_alive = interval_at(Instant::now() + KEEP_ALIVE_EVERY, KEEP_ALIVE_EVERY);
        keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let generation = Generation {
            slot,
            phase,
            decoder: Decoder::new(),
            reader,
            reply,
            asked: inputs,
            log_id: request.log_id,
            index: request.first_index,
            unrepeated,
            tokens_before,
            started: Instant::now(),
            first_token: None,
            keep_alive,
            cancel,
        };
        let frames = stream::unfold(generation, |mut generation| async move {
            generation.next().await.map(|bytes| (Ok(bytes), generation))
        });
        Ok(Inference {
            replica_id: accepted.replica_id,
            report_seq: accepted.report_seq,
            frames: Box::pin(frames),
        })
    }

    fn ctx_of(&self, pool_id: &PoolId) -> Option<u32> {
        self.core.lock().ctx_max(pool_id)
    }
}

enum Happened {
    Answered(Result<reqwest::Response, reqwest::Error>),
    Refused(ErrorBody),
    Chunk(Option<Result<Bytes, reqwest::Error>>),
    Document(Result<Document, DocumentError>),
    Tick,
    Canceled,
}

impl Generation {
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
                Phase::Streaming(body) => tokio::select! {
                    biased;
                    () = self.cancel.cancelled() => Happened::Canceled,
                    chunk = body.next() => Happened::Chunk(chunk),
                    _ = self.keep_alive.tick() => Happened::Tick,
                },
                Phase::Reading(document) => tokio::select! {
                    biased;
                    () = self.cancel.cancelled() => Happened::Canceled,
                    document = document => Happened::Document(document),
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
                Happened::Refused(error) => Some(self.fail(error, true)),
                Happened::Chunk(chunk) => Some(self.chunks(chunk).await),
                Happened::Document(document) => Some(self.document(document)),
            };
            if let Some(out) = out.filter(|out| !out.is_empty()) {
                return Some(Bytes::from(out));
            }
        }
    }

    fn answered(&mut self, answer: Result<reqwest::Response, reqwest::Error>) -> Option<Vec<u8>> {
        let response = match answer {
            Ok(response) => response,
            Err(error) => {
                let connecting = error.is_connect();
                let reason = engines::describe(error);
                self.slot.engine_gone(reason.clone());
                let error = if connecting {
                    ErrorBody::new(ErrorCode::PoolUnready, format!("the engine cannot be reached: {reason}"))
                } else {
                    let message = format!("the engine's connection was lost: {reason}");
                    ErrorBody::new(ErrorCode::WorkerReset, message).with_cause(EndCause::EngineDied)
                };
                return Some(self.fail(error, true));
            }
        };
        if !response.status().is_success() {
            self.phase = Phase::Refused(Box::pin(engines::refusal(response)));
            return None;
        }
        let kind = response.headers().get("content-type").and_then(|value| value.to_str().ok());
        let due = self.reply.media_type();
        if !kind.is_some_and(|kind| kind.starts_with(due)) {
            let message = format!("the engine answered {} instead of {due}", kind.unwrap_or("nothing"));
            let error = ErrorBody::new(ErrorCode::WorkerReset, message).with_cause(EndCause::Engine5xx);
            return Some(self.fail(error, false));
        }
        if self.reply.ends_by_closing() && !response.headers().contains_key("transfer-encoding") {
            // A message without a length ends where its connection does, by death too.
            let message = "the engine's stream has neither an end marker nor an end of its own";
            let error = ErrorBody::new(ErrorCode::WorkerReset, message).with_cause(EndCause::Engine5xx);
            return Some(self.fail(error, false));
        }
        self.phase = if self.reply.is_document() {
            Phase::Reading(Box::pin(documents::read(response, self.reply, self.asked)))
        } else {
            Phase::Streaming(Box::pin(response.bytes_stream()))
        };
        None
    }

    /// Takes a piece of the engine's stream, and with it what has arrived already.
    async fn chunks(&mut self, first: Option<Result<Bytes, reqwest::Error>>) -> Vec<u8> {
        let mut out = self.chunk(first);
        let mut patient = true;
        for _ in 0..MOST_PIECES_AT_ONCE {
            let Phase::Streaming(body) = &mut self.phase else { break };
            match body.next().now_or_never() {
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

    fn chunk(&mut self, chunk: Option<Result<Bytes, reqwest::Error>>) -> Vec<u8> {
        let in_order = chunk.is_none() && !self.decoder.has_partial_frame();
        if in_order && let Some(end) = self.reader.closed() {
            let mut out = Vec::new();
            self.said(&mut out, end);
            return out;
        }
        let bytes = match chunk {
            Some(Ok(bytes)) => bytes,
            lost => {
                let reason = match lost {
                    Some(Err(error)) => engines::describe(error),
                    _ => "it closed the stream without its end marker".to_owned(),
                };
                let error = ErrorBody::new(ErrorCode::WorkerReset, format!("the engine died: {reason}"));
                return self.fail(error.with_cause(EndCause::EngineDied), true);
            }
        };
        self.decoder.push(&bytes);
        let mut out = Vec::with_capacity(bytes.len() + 128);
        loop {
            let said = match self.decoder.next_frame() {
                Ok(Some(frame)) => self.reader.read(&frame),
                Ok(None) => return out,
                Err(error) => Said::Failed(error.to_string()),
            };
            if !self.said(&mut out, said) {
                return out;
            }
        }
    }

    /// Takes what an event of the engine says. Returns whether the stream goes on.
    fn said(&mut self, out: &mut Vec<u8>, said: Said) -> bool {
        match said {
            Said::Nothing => true,
            Said::Text(text) => self.text(out, &text),
            Said::End { text, tokens_out, finish_reason } => {
                if !self.text(out, text.as_deref().unwrap_or_default()) {
                    return false;
                }
                if self.unrepeated.as_ref().is_some_and(|rest| !rest.is_empty()) {
                    self.replay_differs(out);
                } else {
                    self.finish(out, tokens_out, None, finish_reason);
                }
                false
            }
            Said::Failed(reason) => {
                let error = ErrorBody::new(ErrorCode::WorkerReset, format!("the engine failed: {reason}"));
                out.extend(self.fail(error.with_cause(EndCause::Engine5xx), false));
                false
            }
            Said::Refused(error) => {
                out.extend(self.fail(*error, true));
                false
            }
        }
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

    /// Takes a text of the engine: what has been sent before is compared, what is new is sent.
    /// Returns whether the stream goes on.
    fn text(&mut self, out: &mut Vec<u8>, text: &str) -> bool {
        let Some(rest) = self.unrepeated.as_mut().filter(|rest| !rest.is_empty()) else {
            if !text.is_empty() {
                self.token(out, text);
            }
            return true;
        };
        if rest.starts_with(text) {
            rest.drain(..text.len());
            return true;
        }
        match text.strip_prefix(rest.as_str()) {
            Some(new) => {
                rest.clear();
                self.token(out, new);
                true
            }
            None => {
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

    /// The final frame of a token: it is passed on, never written again.
    fn token(&mut self, out: &mut Vec<u8>, text: &str) {
        use std::io::Write;
        self.first_token.get_or_insert_with(Instant::now);
        if let Some((ids, count)) = self.reader.take_ids() {
            let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
            write_comment(out, &format!("{TOKEN_IDS}{} {}", self.tokens_before + count, ids.join(",")));
        }
        // Writing to a Vec cannot fail, and a text is always JSON.
        let _ = write!(out, "id: {}:{}\nevent: token\ndata: {{\"t\":", self.log_id, self.index);
        let _ = serde_json::to_writer(&mut *out, text);
        let _ = write!(out, ",\"i\":{}}}\n\n", self.index);
        self.index += 1;
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
        let tokens_out = tokens_out + self.tokens_before;
        let end = End { tokens_out, tokens_in, decode_time_ms, decode_ms, finish_reason };
        let data = serde_json::to_string(&end).unwrap_or_default();
        let seq = self.slot.end(true);
        let mut counters = self.slot.agent.counters.lock();
        counters.finished += 1;
        counters.tokens += made_here;
        drop(counters);
        self.last_words(out, "end", &data, seq);
    }

    fn fail(&mut self, mut error: ErrorBody, engine_idle: bool) -> Vec<u8> {
        error.engine = Some(self.slot.engine);
        let identity = self.slot.agent.identity();
        error = error.at(&identity.node_id, &self.slot.pool_id);
        let data = serde_json::to_string(&error).unwrap_or_default();
        let seq = self.slot.end(engine_idle);
        self.slot.agent.counters.lock().failed += 1;
        let mut out = Vec::new();
        self.last_words(&mut out, "error", &data, seq);
        out
    }

    fn last_words(&mut self, out: &mut Vec<u8>, event: &str, data: &str, seq: u64) {
        write_frame(out, Some((&self.log_id, self.index)), event, data);
        write_comment(out, &format!("report-seq {seq}"));
        // The engine's connection is dropped here, not when the reader is done.
        self.phase = Phase::Over;
    }
}
