//! An attempt whose request goes to the engine as it came, and whose answer comes back as the engine
//! gave it: nobody on the way reads more of it than where its parts end.
//!
//! Of an event stream whole events are passed on, of another answer its bytes. What a client did wrong,
//! in the engine's own words, is an answer too; every other refusal is the attempt's error, as it is on
//! the native path, and its task is placed again. A stream that ends without an end of its own is the
//! end of its engine.

mod events;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use attempt_link::content::{Acceptance, AnswerHead};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use http::header::{HeaderName, HeaderValue};
use http::{HeaderMap, Response};
use hyper::body;
use node_core::{Accepted, Ask, Cursor, Ends, Piece};
use pool_registry_types::error::EndCause;
use pool_registry_types::{
    AttemptId, BootId, ErrorBody, ErrorCode, LogId, ModelRef, NodeId, PoolId, ReplicaId, TaskId, TraceContext,
};
use task_stream::{MAX_PASSED_EVENT_BYTES, OpenAiRoute, Passage, TaskCaller};
use tokio::time::{Instant, timeout_at};

use crate::agent::{Agent, Signals};
use crate::attempt_log::AttemptLog;
use crate::driver::{HEARD_EVERY, first_of_its_process, polled, unsent};
use crate::engines::client::with_causes;
use crate::engines::{self, Answer, Whose, longer_than};
use crate::infer::ReadBy;
use crate::pieces::{IN_A_ROW, MOST_PIECES_AT_ONCE, Pieces, behind_what_is_ready, pieces};
use crate::slot::Slot;

use events::{EventCutter, Events};

/// How long an engine may take for the orderly end of a stream whose last event has come: then its
/// connection can be used again. Later it is closed, whatever comes on it. Source: .specs/01 CLOUD-2850.
const LEFT_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest wait for how an engine has ended whose connection was lost.
const END_TIMEOUT: Duration = Duration::from_secs(1);
/// What is read of a refusal before it is known whose it is, bytes, and longest wait for that.
pub(crate) const MAX_REFUSAL_BYTES: usize = 64 * 1024;
pub(crate) const REFUSAL_TIMEOUT: Duration = Duration::from_secs(3);
/// Most headers of an answer that are passed on, and their bytes.
const MAX_HEADERS: usize = 64;
const MAX_HEADER_BYTES: usize = 16 * 1024;
/// Headers that are about a connection, or about how long a body is on it. Source: RFC 9110, section 7.6.1.
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "content-length",
    "keep-alive",
    "proxy-authenticate",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// A request that is passed on.
#[derive(Debug)]
pub struct PassedRequest {
    pub task_id: TaskId,
    pub attempt_id: AttemptId,
    pub node_id: NodeId,
    pub boot_id: BootId,
    pub log_id: LogId,
    pub replica_hint: Option<ReplicaId>,
    pub model: ModelRef,
    pub passage: Passage,
    pub body: Bytes,
}

impl Agent {
    /// Takes a slot for the attempt and passes its request on. It is read by its link, or by records.
    /// Errors: those of [`Agent::infer`], and `INVALID_PARAMS` for a body that is not what is said of it.
    pub(crate) fn begin_passing(
        self: &Arc<Self>,
        pool_id: &PoolId,
        request: PassedRequest,
        read_by: ReadBy,
        trace: Option<&TraceContext>,
        caller: Option<&TaskCaller>,
    ) -> Result<(Acceptance, Arc<Signals>), ErrorBody> {
        let attempt = request.attempt_id;
        let log = AttemptLog::new(pool_id, request.task_id, attempt, trace, caller);
        let ask = Ask {
            node_id: &request.node_id,
            boot_id: request.boot_id,
            attempt,
            model: Some(&request.model),
            task: Some(request.task_id),
            hint: request.replica_hint.as_ref(),
            first_index: 0,
            retention: read_by.retention(),
        };
        let (mut slot, accepted) = self.take_slot(pool_id, &ask, request.body.len(), read_by, trace, log)?;
        let acceptance =
            Acceptance { replica_id: accepted.replica_id.clone(), report_seq: accepted.report_seq };
        let path = request.passage.route.path();
        if self.with_core(|core, now| core.is_lacking(now, &attempt, path)) {
            let message = format!("the engine has no {path}");
            return Err(slot.refuse(ErrorBody::new(ErrorCode::Unsupported, message)));
        }
        let Some(body) = request.passage.with_model(&request.body, &accepted.model) else {
            return Err(slot.refuse(ErrorBody::invalid("model_at: is not where the model stands")));
        };
        self.counters.lock().accepted += 1;
        slot.log.accepted(&accepted.replica_id, accepted.engine, &accepted.model);
        slot.error = Some(ErrorBody::new(ErrorCode::WorkerReset, "the attempt was stopped on its node"));
        slot.at.headers.extend(to_engine(&request.passage));
        let signals = Arc::clone(&slot.signals);
        self.change_held(|core, _| core.held_mut().link(&attempt, request.log_id, Cursor::first()));
        let driver =
            Passthrough { slot, route: request.passage.route, next: 0, has_brought: false, heard: None };
        self.drive(driver.run(request.passage.target(), body, request.model, accepted));
        Ok((acceptance, signals))
    }
}

/// The client's headers, whose names are those that the control plane passes on.
pub(crate) fn to_engine(passage: &Passage) -> HeaderMap {
    let header = |(name, value): &(String, String)| {
        Some((name.parse::<HeaderName>().ok()?, HeaderValue::from_bytes(value.as_bytes()).ok()?))
    };
    passage.headers.iter().filter_map(header).collect()
}

/// Works on one attempt until it has ended.
struct Passthrough {
    slot: Slot,
    route: OpenAiRoute,
    /// The index of the next event, or byte.
    next: u64,
    has_brought: bool,
    heard: Option<Instant>,
}

/// Why an attempt ends without a whole answer.
struct Failure {
    error: ErrorBody,
    engine_idle: bool,
}

impl Failure {
    fn died(reason: &str) -> Self {
        let error = ErrorBody::new(ErrorCode::WorkerReset, format!("the engine died: {reason}"));
        Self { error: error.with_cause(EndCause::EngineDied), engine_idle: true }
    }

    fn broke(message: String) -> Self {
        let error = ErrorBody::new(ErrorCode::WorkerReset, message);
        Self { error: error.with_cause(EndCause::Engine5xx), engine_idle: false }
    }
}

impl Passthrough {
    async fn run(mut self, target: String, body: Bytes, model: ModelRef, accepted: Accepted) {
        let (agent, signals) = (Arc::clone(&self.slot.agent), Arc::clone(&self.slot.signals));
        let cancel = signals.cancel.clone();
        let work = pin!(async move {
            let passed = tokio::select! {
                biased;
                () = cancel.cancelled() => None,
                passed = self.pass(target, body, model, &accepted) => Some(passed),
            };
            self.end(passed).await;
        });
        polled(&agent, &signals, work).await;
    }

    /// Asks the engine and passes on what it answers, to its end. Returns whether the engine is done with it.
    async fn pass(
        &mut self,
        target: String,
        body: Bytes,
        model: ModelRef,
        accepted: &Accepted,
    ) -> Result<bool, Failure> {
        let at = self.slot.at.clone();
        let client = self.slot.agent.client().clone();
        let sent = client.pass(&at, &target, body).await;
        let attempt = self.slot.attempt;
        self.slot.agent.with_core(|core, _| core.held_mut().count_payload(&attempt, 0));
        let answer = sent.map_err(|error| {
            let (error, engine_idle) = unsent(&self.slot, error);
            Failure { error, engine_idle }
        })?;
        if accepted.names_from_engine {
            let named = (accepted.engine, model, accepted.model.clone());
            if let Err(why) = first_of_its_process(&answer, &client, &at, &named).await {
                self.slot.engine_suspected();
                let error = ErrorBody::new(ErrorCode::PoolUnready, why);
                return Err(Failure { error, engine_idle: false });
            }
        }
        self.heard();
        let head = head_of(&answer.response);
        if !(200..300).contains(&head.status) {
            return self.refused(head, answer).await.map(|()| true);
        }
        let is_event_stream = head.is_event_stream();
        self.slot.agent.with_core(|core, _| core.held_mut().set_head(&attempt, head));
        if is_event_stream {
            return self.events(pieces(answer)).await;
        }
        self.bytes(Incoming::new(pieces(answer))).await.map(|()| true)
    }

    /// What the engine says of a request that it does not take.
    async fn refused(&mut self, head: AnswerHead, answer: Answer) -> Result<(), Failure> {
        let status = head.status;
        let (mut incoming, mut begun, mut end) = (Incoming::new(pieces(answer)), Vec::new(), None);
        let beginning = async {
            while begun.len() < MAX_REFUSAL_BYTES && end.is_none() {
                end = incoming.take(None, |piece| begun.extend_from_slice(piece)).await;
            }
        };
        // What has come says whose it is.
        let _ = tokio::time::timeout(REFUSAL_TIMEOUT, beginning).await;
        let known = &begun[..begun.len().min(MAX_REFUSAL_BYTES)];
        let refusal = engines::refusal(status, &String::from_utf8_lossy(known));
        if refusal.whose != Whose::Client {
            let error = self.slot.refused(refusal, Some(self.route.path()));
            return Err(Failure { error, engine_idle: true });
        }
        let attempt = self.slot.attempt;
        self.slot.agent.with_core(|core, _| core.held_mut().set_head(&attempt, head));
        self.append_bytes(begun)?;
        match end {
            None => self.bytes(incoming).await,
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(self.lost(&with_causes(&error))),
        }
    }

    /// An answer that is no event stream.
    async fn bytes(&mut self, mut incoming: Incoming) -> Result<(), Failure> {
        loop {
            self.slot.room().await;
            let mut all = Vec::new();
            let end = incoming.take(None, |piece| all.extend_from_slice(piece)).await;
            self.heard();
            self.append_bytes(all)?;
            match end {
                None => {}
                Some(Ok(())) => return Ok(()),
                Some(Err(error)) => return Err(self.lost(&with_causes(&error))),
            }
        }
    }

    fn append_bytes(&mut self, bytes: Vec<u8>) -> Result<(), Failure> {
        let ends = Ends::each_byte(bytes.len());
        self.append(bytes, ends)
    }

    /// Returns whether the engine has ended its answer too, once its last event has come.
    async fn events(&mut self, pieces: Pieces) -> Result<bool, Failure> {
        let mut cutter = EventCutter::new(self.route.end_marker());
        let mut incoming = Incoming::new(pieces);
        // It is whole: what stands behind its end is waited for, so that its connection is kept.
        let mut left_until = None;
        loop {
            match left_until {
                None => self.slot.room().await,
                Some(at) if Instant::now() >= at || timeout_at(at, self.slot.room()).await.is_err() => {
                    return Ok(false);
                }
                Some(_) => {}
            }
            let end = incoming.take(left_until, |piece| cutter.push(piece)).await;
            self.heard();
            let in_order = matches!(end, Some(Ok(())));
            let too_long = |_| Failure { error: longer_than(MAX_PASSED_EVENT_BYTES), engine_idle: false };
            let Events { bytes, ends } = cutter.take(in_order).map_err(too_long)?;
            self.append(bytes, ends)?;
            if left_until.is_none() && cutter.has_ended() {
                left_until = Some(Instant::now() + LEFT_TIMEOUT);
            }
            match end {
                None => {}
                _ if cutter.has_ended() => return Ok(in_order),
                Some(Err(error)) => return Err(self.lost(&with_causes(&error))),
                Some(Ok(())) => return Err(self.lost("it closed the stream without its end marker")),
            }
        }
    }

    fn append(&mut self, bytes: Vec<u8>, ends: Ends) -> Result<(), Failure> {
        if bytes.is_empty() {
            return Ok(());
        }
        if !std::mem::replace(&mut self.has_brought, true) {
            let attempt = self.slot.attempt;
            self.slot.agent.with_core(|core, _| core.succeeded(&attempt));
        }
        let piece = Piece::new(self.next, bytes, ends);
        self.next = piece.next();
        self.slot.append(piece).map_err(|error| Failure::broke(error.to_string()))
    }

    fn lost(&mut self, reason: &str) -> Failure {
        self.slot.lost = true;
        self.slot.engine_suspected();
        Failure::died(reason)
    }

    /// The engine lives, whatever looks at it say.
    fn heard(&mut self) {
        if self.heard.is_none_or(|reported| reported.elapsed() >= HEARD_EVERY) {
            self.heard = Some(Instant::now());
            self.slot.heard();
        }
    }

    /// Nothing where it was told to end.
    async fn end(mut self, passed: Option<Result<bool, Failure>>) {
        let (mut error, engine_idle) = match passed {
            // Nobody wants to know how it ends.
            None if self.slot.is_stopped() => return,
            None => {
                let error = ErrorBody::new(ErrorCode::Canceled, "the node was told to end this attempt");
                (error.with_cause(EndCause::Canceled), false)
            }
            Some(Err(Failure { error, engine_idle })) => (error, engine_idle),
            Some(Ok(engine_idle)) => return self.finish(engine_idle),
        };
        if error.cause == Some(EndCause::EngineDied) {
            self.slot.lost = true;
            error.crash = self.slot.agent.crash_of(&self.slot.attempt, Instant::now() + END_TIMEOUT).await;
        }
        let (error, _) = self.slot.fail(error, engine_idle);
        self.slot.error = Some(error);
        self.slot.finish(None);
    }

    fn finish(mut self, engine_idle: bool) {
        let attempt = self.slot.attempt;
        self.slot.agent.with_core(|core, _| core.succeeded(&attempt));
        self.slot.cleared();
        self.slot.end(engine_idle);
        self.slot.agent.counters.lock().finished += 1;
        self.slot.log.ended(self.next, false);
        self.slot.error = None;
        self.slot.finish(None);
    }
}

/// The pieces of an engine's answer.
struct Incoming {
    pieces: Pieces,
    /// One that has arrived and was not handed out; nothing in it where that is the end.
    ready: Option<Option<hyper::Result<Bytes>>>,
    /// When one came by itself last, if none came together since.
    last: Option<Instant>,
}

impl Incoming {
    fn new(pieces: Pieces) -> Self {
        Self { pieces, ready: None, last: None }
    }

    /// Waits for a piece, until this moment at most, and hands it out with what has arrived already. Returns
    /// the end, if that has come.
    async fn take(
        &mut self,
        until: Option<Instant>,
        mut give: impl FnMut(&[u8]),
    ) -> Option<hyper::Result<()>> {
        let mut next = match self.ready.take() {
            Some(next) => Some(next),
            None => match until {
                None => Some(self.pieces.next().await),
                Some(until) => timeout_at(until, self.pieces.next()).await.ok(),
            },
        };
        // Also where a turn takes long: those that come together are taken together the next time.
        let in_a_row = self.last.is_none_or(|last| last.elapsed() < IN_A_ROW);
        self.last = Some(Instant::now());
        for nth in 0..MOST_PIECES_AT_ONCE {
            if nth == 1 && next.is_some() {
                self.last = None;
            }
            match next {
                Some(Some(Ok(piece))) => give(&piece),
                Some(Some(Err(error))) => return Some(Err(error)),
                Some(None) => return Some(Ok(())),
                None => return None,
            }
            next = self.pieces.next().now_or_never();
            if next.is_none() && in_a_row {
                behind_what_is_ready().await;
                next = self.pieces.next().now_or_never();
            }
        }
        self.ready = next;
        None
    }
}

/// What of an answer's head is passed on.
pub(crate) fn head_of(response: &Response<body::Incoming>) -> AnswerHead {
    let mut left = MAX_HEADER_BYTES;
    let passed = response.headers().iter().filter_map(|(name, value)| {
        let is_own = HOP_BY_HOP.contains(&name.as_str());
        // What is no text cannot be told on the way.
        let value = std::str::from_utf8(value.as_bytes()).ok().filter(|_| !is_own)?;
        left = left.checked_sub(name.as_str().len() + value.len())?;
        Some((name.as_str().to_owned(), value.to_owned()))
    });
    AnswerHead { status: response.status().as_u16(), headers: passed.take(MAX_HEADERS).collect() }
}

#[cfg(test)]
#[path = "passthrough_tests.rs"]
mod tests;
