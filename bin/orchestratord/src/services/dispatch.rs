//! Relays: one task for each attempt, from the node's stream into the log.
//!
//! A relay looks at frames, it does not rewrite them. It ends with one word to the control loop
//! ([`Event::Ended`]), and only after it has fenced its log.

use std::sync::Arc;
use std::time::Duration;

use daemon_kit::Clock;
use futures::{FutureExt, StreamExt};
use pool_registry_types::sse::{
    Decoder, ENGINE_WORKS, Frame, TOKEN_IDS, UNLOGGED_THOUGHT, parse_event_id, write_frame,
};
use pool_registry_types::task::{ResumeMode, Started};
use pool_registry_types::{ErrorBody, Moment, ReplicaId};
use task_scheduler::{AppendError, Dispatch, Event, HowEnded, StreamWatch, TaskLog};
use tokio_util::sync::CancellationToken;

use crate::services::link::{NodeLink, Taken};
use crate::services::placement::Control;
use crate::services::streams::{Streams, TaskStream};

/// Pieces of a stream that are taken together when they have arrived already.
const MOST_PIECES_AT_ONCE: usize = 64;
/// The events of a node that are kept, each with its place in the log.
const NUMBERED: [&str; 4] = ["token", "reasoning", "result", "end"];
const NO_FINAL_FRAME: &str = "it ended without a final frame";
/// Tokens prove that a node lives; telling so once in this span is enough.
const ALIVE_EVERY: Duration = Duration::from_secs(1);

/// What every relay uses.
#[derive(Debug)]
pub(crate) struct Relays {
    pub(crate) clock: Clock,
    pub(crate) link: NodeLink,
    pub(crate) streams: Arc<Streams>,
}

impl Relays {
    /// Runs one attempt to its end, unless it is closed from above: then the log is fenced
    /// already, and nobody waits for a word.
    pub(crate) async fn run(
        self: Arc<Self>,
        dispatch: Dispatch,
        control: Control,
        closed: CancellationToken,
    ) {
        let Some(stream) = self.streams.get(dispatch.task) else {
            // It is opened before the first dispatch, and kept while the task has not ended.
            let trace = &dispatch.spec.trace;
            tracing::error!(task_id = %dispatch.task, correlation_id = trace.correlation_id, trace_id = trace.trace_id(), "a task that runs has no log");
            let how = HowEnded::OwnDefect("a defect in the relay".into());
            let (attempt, tokens_written) = (dispatch.attempt, dispatch.first_index);
            let ended = Event::Ended { attempt, tokens_written, unlogged: 0, how, final_report: None };
            return control.send(ended).await;
        };
        let relay = owned_tasks::caught("relay", self.relay(&dispatch, &control, &stream));
        let (how, final_report) = tokio::select! {
            biased;
            () = closed.cancelled() => return,
            outcome = relay => outcome.unwrap_or_else(|panicked| {
                (HowEnded::OwnDefect(panicked.to_string()), None)
            }),
        };
        let fence = stream.write(|log| log.fence(dispatch.attempt));
        let how = if fence.finished { HowEnded::Finished } else { how };
        if fence.finished {
            self.streams.ended(dispatch.task);
        }
        let (attempt, tokens_written) = (dispatch.attempt, fence.tokens_written);
        let unlogged = stream.unlogged();
        let trace = &dispatch.spec.trace;
        tracing::debug!(task_id = %dispatch.task, attempt_id = %attempt, node_id = %dispatch.pool.node_id, how = how.as_str(), correlation_id = trace.correlation_id, trace_id = trace.trace_id(), "the stream of an attempt has ended");
        control.send(Event::Ended { attempt, tokens_written, unlogged, how, final_report }).await;
    }

    async fn relay(
        &self,
        dispatch: &Dispatch,
        control: &Control,
        stream: &TaskStream,
    ) -> (HowEnded, Option<u64>) {
        let Some(payload) = stream.payload() else {
            // The task has ended before this began: nobody waits for a word.
            return (HowEnded::Closed, None);
        };
        let mut watch = StreamWatch::new(self.clock.now(), dispatch.deadlines, dispatch.task_deadline);
        let resume = dispatch.resume.map(|mode| stream.sent(mode));
        if dispatch.resume != Some(ResumeMode::Append) {
            // They come again.
            stream.forget_unlogged();
        }
        let infer = self.link.infer(dispatch, &payload, resume);
        let accepting = tokio::time::timeout_at(self.instant(watch.next_deadline()), infer);
        let taken = match accepting.await {
            Ok(Ok(taken)) => taken,
            Ok(Err(how)) => return (how, None),
            Err(_) => {
                let overdue = watch.overdue(self.clock.now() + Duration::from_millis(1));
                return (HowEnded::TimedOut(overdue.unwrap_or(task_scheduler::Overdue::Acceptance)), None);
            }
        };
        let Taken { replica_id, report_seq, mut frames } = taken;
        watch.accepted(self.clock.now());
        let attempt = dispatch.attempt;
        control.send(Event::Accepted { attempt, replica_id: replica_id.clone(), report_seq }).await;

        let mut reading = Reading {
            decoder: Decoder::new(),
            dispatch,
            replica_id,
            started: false,
            last: None,
            final_report: None,
            ids: None,
        };
        let mut alive_sent = self.clock.now();
        // Armed once and moved only when it fires: a token does not touch it.
        let alarm = tokio::time::sleep_until(self.instant(watch.next_deadline()));
        tokio::pin!(alarm);
        loop {
            let chunk = tokio::select! {
                biased;
                chunk = frames.next() => chunk,
                () = &mut alarm => {
                    let now = self.clock.now();
                    if let Some(overdue) = watch.overdue(now) {
                        return reading.end(HowEnded::TimedOut(overdue));
                    }
                    if watch.grows_quiet(now) {
                        control.send(Event::Quiet { attempt }).await;
                    }
                    alarm.as_mut().reset(self.instant(watch.next_deadline()));
                    continue;
                }
            };
            let bytes = match chunk {
                Some(Ok(bytes)) => bytes,
                Some(Err(reason)) => return reading.end(HowEnded::Broken(reason)),
                None => return reading.end(HowEnded::Broken(NO_FINAL_FRAME.into())),
            };
            let now = self.clock.now();
            if watch.bytes(now) {
                control.send(Event::Heard { attempt }).await;
                alarm.as_mut().reset(self.instant(watch.next_deadline()));
            }
            reading.decoder.push(&bytes);
            // What has arrived already goes into the log, and to the readers, in one piece.
            let mut after = None;
            let mut patient = true;
            for _ in 0..MOST_PIECES_AT_ONCE {
                match frames.next().now_or_never() {
                    Some(Some(Ok(bytes))) => {
                        patient = true;
                        reading.decoder.push(&bytes);
                    }
                    Some(end) => {
                        after = Some(end);
                        break;
                    }
                    // The connection hands over one piece at a time: let it, once, before giving up.
                    None if patient => {
                        patient = false;
                        tokio::task::yield_now().await;
                    }
                    None => break,
                }
            }
            let news = match reading.take(stream) {
                Ok(news) => news,
                Err(how) => return reading.end(how),
            };
            if news.unlogged {
                watch.unlogged(now);
            } else if news.works {
                watch.works(now);
            }
            if news.tokens || news.unlogged {
                if news.tokens && watch.token(now) {
                    control.send(Event::Started { attempt }).await;
                    alarm.as_mut().reset(self.instant(watch.next_deadline()));
                } else if now.since(alive_sent) >= ALIVE_EVERY {
                    control.send(Event::Alive { node_id: dispatch.pool.node_id.clone() }).await;
                }
                alive_sent = if now.since(alive_sent) >= ALIVE_EVERY { now } else { alive_sent };
            }
            // A stream that never pauses never lets the alarm ring.
            if let Some(overdue) = watch.overdue(now) {
                return reading.end(HowEnded::TimedOut(overdue));
            }
            match after {
                Some(Some(Err(reason))) => return reading.end(HowEnded::Broken(reason)),
                Some(None) => return reading.end(HowEnded::Broken(NO_FINAL_FRAME.into())),
                Some(Some(Ok(_))) | None => {}
            }
            if reading.final_report.is_some() {
                return reading
                    .end(HowEnded::Broken("its final report number came without a final frame".into()));
            }
        }
    }

    fn instant(&self, at: Moment) -> tokio::time::Instant {
        self.clock.instant(at).into()
    }
}

/// What a chunk brought.
#[derive(Debug, Clone, Copy, Default)]
struct News {
    /// Tokens, thoughts or results that are in the log now.
    tokens: bool,
    /// Thoughts that are left out of it.
    unlogged: bool,
    /// Events of the engine that bring nothing.
    works: bool,
}

/// The node's stream as far as it was read.
struct Reading<'d> {
    decoder: Decoder,
    dispatch: &'d Dispatch,
    replica_id: ReplicaId,
    started: bool,
    /// The final frame, once it came.
    last: Option<HowEnded>,
    /// The number of the node's last report before the end.
    final_report: Option<u64>,
    /// The tokens of the task up to the frame that comes next, and the engine's ids of its own.
    ids: Option<(u64, Vec<u32>)>,
}

impl Reading<'_> {
    /// The end of the attempt: its final frame if one came, else what broke it.
    fn end(self, otherwise: HowEnded) -> (HowEnded, Option<u64>) {
        (self.last.unwrap_or(otherwise), self.final_report)
    }

    /// Moves all whole frames into the log, under one lock.
    fn take(&mut self, stream: &TaskStream) -> Result<News, HowEnded> {
        let mut news = News::default();
        let mut taken = Ok(());
        stream.write(|log| {
            while taken.is_ok() {
                let frame = match self.decoder.next_frame() {
                    Ok(Some(frame)) => frame,
                    Ok(None) => break,
                    Err(error) => {
                        taken = Err(HowEnded::Broken(error.to_string()));
                        break;
                    }
                };
                let mut sink = FrameSink {
                    dispatch: self.dispatch,
                    replica_id: &self.replica_id,
                    started: &mut self.started,
                    last: &mut self.last,
                    final_report: &mut self.final_report,
                    ids: &mut self.ids,
                };
                taken = sink.put(&frame, log, stream, &mut news);
            }
        });
        taken.map(|()| news)
    }
}

/// Where a frame goes: the parts of [`Reading`] beside the decoder that the frame borrows from.
struct FrameSink<'r> {
    dispatch: &'r Dispatch,
    replica_id: &'r ReplicaId,
    started: &'r mut bool,
    last: &'r mut Option<HowEnded>,
    final_report: &'r mut Option<u64>,
    ids: &'r mut Option<(u64, Vec<u32>)>,
}

impl FrameSink<'_> {
    fn put(
        &mut self,
        frame: &Frame<'_>,
        log: &mut TaskLog,
        stream: &TaskStream,
        news: &mut News,
    ) -> Result<(), HowEnded> {
        let Some(data) = &frame.data else {
            if let Some(text) = frame.comment.and_then(|text| text.strip_prefix(TOKEN_IDS)) {
                let (count, ids) = text.split_once(' ').unwrap_or((text, ""));
                let ids = ids.split(',').filter_map(|id| id.parse().ok()).collect();
                *self.ids = count.parse().ok().map(|count| (count, ids));
            } else if let Some(seq) = frame.comment.and_then(|text| text.strip_prefix("report-seq ")) {
                // A newer node may say more after the number.
                *self.final_report = seq.split(' ').next().and_then(|seq| seq.parse().ok());
            } else if frame.comment == Some(UNLOGGED_THOUGHT) {
                stream.count_unlogged();
                news.unlogged = true;
            } else if frame.comment == Some(ENGINE_WORKS) {
                news.works = true;
            }
            return Ok(());
        };
        if self.last.is_some() {
            return Err(HowEnded::Broken("something followed the final frame".into()));
        }
        if frame.event == "error" {
            // Not written: the core may place the task again, and writes what is final itself.
            let error: ErrorBody = serde_json::from_str(data)
                .map_err(|error| HowEnded::Broken(format!("an unreadable error frame: {error}")))?;
            *self.last = Some(HowEnded::NodeError(error));
            return Ok(());
        }
        if frame.id.is_none() && !NUMBERED.contains(&frame.event) {
            // Of a newer node, and no part of what is kept.
            return Ok(());
        }
        let index = match frame.id.and_then(parse_event_id) {
            Some((log_id, n)) if log_id == self.dispatch.log => n,
            _ => return Err(HowEnded::Broken("a frame without its id".into())),
        };
        let mut with_started;
        let bytes = if *self.started {
            frame.raw
        } else {
            *self.started = true;
            with_started = self.started_frame();
            with_started.extend_from_slice(frame.raw);
            &with_started
        };
        let attempt = self.dispatch.attempt;
        match frame.event {
            "token" | "reasoning" | "result" => {
                log.append(attempt, index, bytes).map_err(append_error)?;
                if let Some((count, ids)) = self.ids.take() {
                    stream.keep_ids(index, count, &ids);
                }
                news.tokens = true;
                Ok(())
            }
            "end" => {
                log.finish(attempt, index, bytes).map_err(append_error)?;
                *self.last = Some(HowEnded::Finished);
                Ok(())
            }
            other => Err(HowEnded::Broken(format!("an unknown event {other:?}"))),
        }
    }

    fn started_frame(&self) -> Vec<u8> {
        let started = Started {
            queue_wait_ms: self.dispatch.queue_wait_ms,
            node_id: self.dispatch.pool.node_id.clone(),
            pool_id: self.dispatch.pool.pool_id.clone(),
            replica_id: self.replica_id.clone(),
            attempt: self.dispatch.attempt_number,
            kv_warmth: self.dispatch.warm_replica.as_ref() == Some(self.replica_id),
        };
        let mut frame = Vec::with_capacity(256);
        write_frame(&mut frame, None, "started", &serde_json::to_string(&started).unwrap_or_default());
        frame
    }
}

fn append_error(error: AppendError) -> HowEnded {
    match error {
        AppendError::Full => HowEnded::TooLong,
        AppendError::Fenced => HowEnded::Closed,
        AppendError::Gap { .. } => HowEnded::Broken(error.to_string()),
    }
}
