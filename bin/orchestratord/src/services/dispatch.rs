//! The shell of the relays: one task for each attempt, from the node's stream into the log.
//!
//! What a stream means, and when it takes too long, [`Relay`] decides; here are its connection, its
//! timer and the way to the control loop. Where its node has a link, the attempt's stream is what the
//! lane says of it. An attempt's last event is [`Event::Ended`], and it is told
//! only after its log was fenced.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use attempt_link::control::Lost;
use attempt_link::node::Supply;
use daemon_kit::Clock;
use futures::FutureExt;
use owned_tasks::StreamThreads;
use pool_registry_types::Moment;
use pool_registry_types::task::ResumeMode;
use task_scheduler::{CloseReason, Dispatch, Event, HowEnded};
use task_stream::{Action, HoldBudget, PayloadFormat, Relay};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

use crate::services::control::Control;
use crate::services::feed::Feed;
use crate::services::link::{Exchange, LinkError, NodeLink, Piece, Taken};
use crate::services::measured::Measured;
use crate::services::spans::AttemptSpan;
use crate::services::streams::{Streams, TaskStream};

/// Pieces of a stream that are taken together when they have arrived already.
const MOST_PIECES_AT_ONCE: usize = 64;
/// A piece that comes so soon after the one before may have more behind it.
const IN_A_ROW: Duration = Duration::from_millis(2);
const NO_FINAL_FRAME: &str = "it ended without a final frame";

/// What every relay uses.
#[derive(Debug)]
pub(crate) struct Relays {
    pub(crate) clock: Clock,
    pub(crate) link: NodeLink,
    pub(crate) streams: Arc<Streams>,
    pub(crate) threads: StreamThreads,
    /// What whole answers hold back together.
    pub(crate) held_answers: Arc<HoldBudget>,
    pub(crate) measured: Arc<Measured>,
}

/// By what an attempt is closed from above.
#[derive(Debug, Clone, Default)]
pub(crate) struct Closing {
    pub(crate) closed: CancellationToken,
    why: Arc<OnceLock<CloseReason>>,
}

impl Closing {
    pub(crate) fn close(self, why: CloseReason) {
        // It is closed once.
        let _ = self.why.set(why);
        self.closed.cancel();
    }
}

/// How an attempt ended, and the number of its node's last report before that.
type End = (HowEnded, Option<u64>);

/// One attempt under way: the relay and what carries its actions out.
struct Carrier {
    clock: Clock,
    control: Control,
    stream: Arc<TaskStream>,
    held_answers: Arc<HoldBudget>,
    dispatch: Arc<Dispatch>,
    feed: Arc<Feed>,
    exchange: Option<Exchange>,
    /// Armed by the relay; a token mostly does not touch it.
    timer: Pin<Box<Sleep>>,
    /// When the stream last brought something, if that was one piece.
    last_pieces: Option<Moment>,
    measured: Arc<Measured>,
    /// Until its node has said that it has the attempt.
    sent: Option<Instant>,
    /// Until it has ended, where it is recorded.
    span: Option<Box<AttemptSpan>>,
}

impl Relays {
    /// Runs one attempt to its end, unless it is closed from above: then the log is fenced
    /// already, and nobody waits for a word.
    pub(crate) async fn run(self: Arc<Self>, dispatch: Dispatch, control: Control, closing: Closing) {
        let (task, attempt) = (dispatch.task, dispatch.attempt);
        let Some(stream) = self.streams.get(task) else {
            // It is opened before the first dispatch, and kept while the task has not ended.
            let trace = &dispatch.spec.trace;
            tracing::error!(task_id = %task, correlation_id = trace.correlation_id, trace_id = trace.trace_id(), "a task that runs has no log");
            let how = HowEnded::OwnDefect("a defect in the relay".into());
            let tokens_written = dispatch.first_index;
            let ended = Event::Ended { attempt, tokens_written, unlogged: 0, how, final_report: None };
            return control.send(ended).await;
        };
        let span = AttemptSpan::begin(&dispatch);
        let relay = Relay::new(self.clock.now(), dispatch.assignment());
        let feed = Feed::new(relay, Arc::clone(&stream));
        let timer = Box::pin(tokio::time::sleep(Duration::ZERO));
        let (clock, dispatch) = (self.clock, Arc::new(dispatch));
        let held_answers = Arc::clone(&self.held_answers);
        let mut carrier = Carrier {
            clock,
            control,
            stream,
            held_answers,
            dispatch,
            feed,
            exchange: None,
            timer,
            last_pieces: None,
            measured: Arc::clone(&self.measured),
            sent: Some(Instant::now()),
            span,
        };
        let outcome = tokio::select! {
            biased;
            () = closing.closed.cancelled() => None,
            outcome = owned_tasks::caught("relay", carrier.carry(&self.link)) => Some(outcome),
        };
        let (how, final_report) = match outcome {
            None => {
                carrier.feed.relay(Relay::close);
                carrier.conclude();
                carrier.done();
                // Its end is in the log, and its node is about to say that it is over.
                carrier.stop();
                carrier.ended(&HowEnded::Closed, closing.why.get().copied());
                return;
            }
            Some(Ok(end)) => end,
            Some(Err(panicked)) => {
                carrier.feed.relay(|relay| relay.failed(panicked.to_string()));
                let end = carrier.conclude();
                end.unwrap_or_else(|| (HowEnded::OwnDefect(panicked.to_string()), None))
            }
        };
        let fence = carrier.stream.fence(attempt);
        carrier.done();
        let how = match how {
            _ if fence.finished => HowEnded::Finished,
            HowEnded::Finished => HowEnded::OwnDefect("an end that its log does not have".into()),
            how => how,
        };
        if fence.finished {
            self.streams.ended(task);
        }
        carrier.ended(&how, None);
        let (tokens_written, unlogged) = (fence.tokens_written, fence.unlogged);
        let (node_id, trace) = (&carrier.dispatch.pool.node_id, &carrier.dispatch.spec.trace);
        tracing::debug!(task_id = %task, attempt_id = %attempt, %node_id, how = how.as_str(), correlation_id = trace.correlation_id, trace_id = trace.trace_id(), "a relay has ended");
        let ended = Event::Ended { attempt, tokens_written, unlogged, how, final_report };
        carrier.control.send(ended).await;
    }
}

impl Carrier {
    /// Carries the attempt from its dispatch to its end.
    async fn carry(&mut self, link: &NodeLink) -> End {
        if let Some(end) = self.open(link).await {
            return end;
        }
        loop {
            let piece = match self.exchange.as_mut() {
                None => None,
                Some(exchange) => tokio::select! {
                    biased;
                    piece = exchange.next() => piece,
                    () = &mut self.timer => {
                        self.feed.relay(|relay| relay.timer(self.clock.now()));
                        if let Some(end) = self.act().await {
                            return end;
                        }
                        continue;
                    }
                },
            };
            let now = self.clock.now();
            self.take(now, piece);
            let more = self.take_what_is_there(now).await;
            // Also where a turn takes long: those that come together are taken together the next time.
            self.last_pieces = (more == 0).then(|| self.clock.now());
            if let Some(end) = self.act().await {
                return end;
            }
            if self.feed.never_sent()
                && let Some(end) = self.go_without(link).await
            {
                return end;
            }
        }
    }

    /// Sends the attempt to its node. Returns its end if it was not taken.
    async fn open(&mut self, link: &NodeLink) -> Option<End> {
        let passes = self.stream.passes();
        // An engine that is asked as it was the first time is told nothing of that.
        let resume = self.dispatch.resume.filter(|_| !passes).map(|mode| self.stream.sent(mode));
        if self.dispatch.resume != Some(ResumeMode::Append) {
            // They come again.
            self.stream.forget_unlogged(self.dispatch.attempt);
        }
        let pool = &self.dispatch.pool;
        let lane = link.links().and_then(|links| links.lane(&pool.node_id, self.dispatch.attempt));
        if lane.is_some() || passes {
            let relay = Relay::linked(self.clock.now(), self.dispatch.assignment());
            let relay = if passes { relay.passing_on(Arc::clone(&self.held_answers)) } else { relay };
            self.feed = Feed::new(relay, Arc::clone(&self.stream));
        }
        if let Some(end) = self.act().await {
            return Some(end);
        }
        let Some(payload) = self.stream.payload() else {
            // The task has ended before this began: nobody waits for its end.
            return Some((HowEnded::Closed, None));
        };
        let dispatch = Arc::clone(&self.dispatch);
        if let Some(lane) = lane {
            let feed = Arc::clone(&self.feed);
            let linked = lane.start(self.clock.now(), &dispatch, &payload, resume, feed);
            self.exchange = Some(Exchange::Linked(linked));
            return None;
        }
        if let PayloadFormat::OpenAi(passage) = payload.format {
            let taken = link.pass_on(&dispatch, *passage, payload.bytes);
            return self.taken(taken).await;
        }
        // To drop it is the stop of an attempt whose node has not answered.
        let mut accepting = Box::pin(link.infer(&dispatch, &payload, resume));
        let taken = loop {
            tokio::select! {
                biased;
                taken = &mut accepting => break taken,
                () = &mut self.timer => {
                    self.feed.relay(|relay| relay.timer(self.clock.now()));
                    if let Some(end) = self.act().await {
                        return Some(end);
                    }
                }
            }
        };
        self.taken(taken).await
    }

    /// The node has answered. Returns the attempt's end if it was not taken.
    async fn taken(&mut self, taken: Result<Taken, HowEnded>) -> Option<End> {
        match taken {
            Ok(Taken { replica_id, report_seq, exchange }) => {
                self.exchange = Some(exchange);
                self.feed.relay(|relay| relay.accepted(self.clock.now(), replica_id, report_seq));
            }
            Err(how) => self.feed.relay(|relay| relay.not_accepted(how)),
        }
        self.act().await
    }

    /// Nothing was sent by the link. A node that turns out to have none is served without.
    async fn go_without(&mut self, link: &NodeLink) -> Option<End> {
        let node_id = &self.dispatch.pool.node_id;
        if link.links().is_some_and(|links| links.lane(node_id, self.dispatch.attempt).is_some()) {
            let how = HowEnded::NeverSent(Lost::NotResumed.as_str().into());
            self.feed.relay(|relay| relay.not_accepted(how));
            return self.act().await;
        }
        let relay = Relay::new(self.clock.now(), self.dispatch.assignment());
        (self.feed, self.exchange) = (Feed::new(relay, Arc::clone(&self.stream)), None);
        self.open(link).await
    }

    fn take(&mut self, now: Moment, piece: Option<Result<Piece, LinkError>>) {
        self.feed.relay(|relay| match piece {
            Some(Ok(Piece::Bytes(bytes))) => relay.chunk(now, &bytes),
            Some(Ok(Piece::Record(supply))) => match supply {
                Supply::Head(head) => relay.head(head),
                Supply::Frames { first, count, bytes } => relay.frames(now, first, count, &bytes),
                Supply::Error(error) => relay.error(error),
                Supply::End { report_seq, .. } => relay.over(report_seq),
                // What is passed on has no tokens that are known.
                Supply::TokenIds { .. } | Supply::Waiting | Supply::Gone => {}
            },
            Some(Ok(Piece::Taken)) => {}
            Some(Err(broken)) => relay.closed(broken.to_string()),
            None => relay.closed(NO_FINAL_FRAME.into()),
        });
    }

    /// What has arrived already goes into the log, and to the readers, in one piece. Returns how many
    /// pieces there were.
    async fn take_what_is_there(&mut self, now: Moment) -> usize {
        let mut more = 0;
        // A token that comes by itself is not to wait for others, nor to cost a second turn.
        let mut patient = self.last_pieces.is_none_or(|last| now.since(last) < IN_A_ROW);
        for _ in 0..MOST_PIECES_AT_ONCE {
            let Some(exchange) = self.exchange.as_mut().filter(|exchange| exchange.brings_bytes()) else {
                break;
            };
            match exchange.next().now_or_never() {
                Some(piece) => {
                    let is_end = !matches!(piece, Some(Ok(_)));
                    (patient, more) = (true, more + 1);
                    self.take(now, piece);
                    if is_end {
                        break;
                    }
                }
                // The connection hands over one piece at a time: let it, once, before giving up.
                None if patient => {
                    patient = false;
                    tokio::task::yield_now().await;
                }
                None => break,
            }
        }
        more
    }

    /// Carries out what the relay asks for. Returns the end of the attempt, once it has come.
    async fn act(&mut self) -> Option<End> {
        while let Some(action) = self.feed.next_action(self.clock.now()) {
            let attempt = self.dispatch.attempt;
            let event = match action {
                Action::Accepted { replica_id, report_seq } => {
                    if let Some(sent) = self.sent.take() {
                        self.measured.accepted(sent.elapsed());
                    }
                    if let Some(span) = &mut self.span {
                        span.accepted();
                    }
                    Event::Accepted { attempt, replica_id, report_seq }
                }
                Action::Started => {
                    if let Some(span) = &mut self.span {
                        span.started();
                    }
                    Event::Started { attempt }
                }
                Action::Alive => Event::Alive { node_id: self.dispatch.pool.node_id.clone() },
                Action::Quiet => Event::Quiet { attempt },
                Action::Heard => Event::Heard { attempt },
                Action::CannotBeRepeated => Event::CannotBeRepeated { attempt },
                Action::Arm(at) => {
                    self.timer.as_mut().reset(self.clock.instant(at).into());
                    continue;
                }
                Action::Stop => {
                    self.stop();
                    continue;
                }
                Action::Ended { how, final_report } => return Some((how, final_report)),
            };
            self.control.send(event).await;
        }
        None
    }

    /// The same where only the end is left to carry out: nobody is told anything else.
    fn conclude(&mut self) -> Option<End> {
        while let Some(action) = self.feed.last_action() {
            match action {
                Action::Stop => self.stop(),
                Action::Ended { how, final_report } => return Some((how, final_report)),
                _ => {}
            }
        }
        None
    }

    /// The node need not keep what it has said the end of.
    fn done(&mut self) {
        if let Some(Exchange::Linked(linked)) = self.exchange.take_if(|_| self.feed.has_ended()) {
            linked.done();
        }
    }

    fn ended(&mut self, how: &HowEnded, why: Option<CloseReason>) {
        if let Some(span) = self.span.take() {
            span.ended(how, why);
        }
    }

    fn stop(&mut self) {
        if let Some(exchange) = self.exchange.take() {
            exchange.stop();
        }
    }
}
