//! Readers of the tasks' streams.
//!
//! A reader keeps an index into a log and nothing else of it: a slow one slows nobody, and one
//! that goes is not missed. While its task waits, it is told where the task stands.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, stream};
use pool_registry_types::TaskId;
use pool_registry_types::sse::write_frame;
use pool_registry_types::task::{Metrics, TaskState};
use tokio::time::{Instant, Sleep, sleep};

use crate::services::control::Control;
use crate::services::departures::Departure;
use crate::services::reader_permits::ReaderPermit;
use crate::services::streams::{ReadOutcome, ReadPosition, TaskStream};

/// A reader that was given nothing for so long is given a comment. Source: .specs/01 CLOUD-1940.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(10);
/// A stream that is quiet for so long from its start belongs to a task that waits.
const FIRST_METRICS_AFTER: Duration = Duration::from_millis(200);
const METRICS_EVERY: Duration = Duration::from_secs(1);
/// Longest wait for the control loop's answer.
const PATIENCE: Duration = Duration::from_millis(100);
/// A waiting client hears this often that nothing has changed.
const SAME_METRICS_EVERY: Duration = Duration::from_secs(5);

/// The task's events from frame `next` on; `gauge` tells what the log does not.
pub(crate) fn follow(
    stream: Arc<TaskStream>,
    follower: Follower,
    next: u64,
    task: TaskId,
    gauge: Gauge,
) -> impl Stream<Item = Result<Bytes, StreamReleased>> + Send + use<> {
    let timer = Box::pin(sleep(FIRST_METRICS_AFTER));
    let place = ReadPosition { frame: next, part: 0 };
    let reader = Reader { stream, follower, place, finished: false, task, gauge, timer };
    stream::unfold(reader, |mut reader| async move { reader.more().await.map(|read| (read, reader)) })
}

/// A place among the readers of a stream, and what its end may bring with it.
#[derive(Debug)]
pub(crate) struct Follower {
    permit: ReaderPermit,
    /// Dropped after the permit, so that it sees whether anybody reads still.
    _departure: Option<Departure>,
}

impl Follower {
    pub(crate) fn new(permit: ReaderPermit, departure: Option<Departure>) -> Self {
        Self { permit, _departure: departure }
    }
}

/// The stream made room before its reader had all of it.
#[derive(Debug, thiserror::Error)]
#[error("the stream was not read for long, and made room for others")]
pub(crate) struct StreamReleased;

/// What a reader is told besides the log: where a waiting task stands.
#[derive(Debug)]
pub(crate) struct Gauge {
    control: Control,
    /// Also while the task runs.
    verbose: bool,
    reported: Option<Metrics>,
    /// When something was last sent to the reader, and when the gauge was last looked at.
    spoke: Instant,
    looked: Option<Instant>,
}

impl Gauge {
    pub(crate) fn new(control: Control, verbose: bool) -> Self {
        Self { control, verbose, reported: None, spoke: Instant::now(), looked: None }
    }

    /// When the gauge is looked at, if the reader is given nothing before.
    fn look_at(&self, started: bool) -> Instant {
        let pause = match (started && !self.verbose, self.looked) {
            // What runs seldom waits again.
            (true, _) => SAME_METRICS_EVERY,
            (false, None) => FIRST_METRICS_AFTER,
            (false, Some(_)) => METRICS_EVERY,
        };
        self.looked.map_or(self.spoke, |looked| looked.max(self.spoke)) + pause
    }

    /// When the reader is to hear that its stream lives, if it is given nothing before.
    fn keep_alive_at(&self) -> Instant {
        self.spoke + KEEP_ALIVE_EVERY
    }

    fn is_due(&self) -> bool {
        self.verbose && self.looked.is_none_or(|looked| looked.elapsed() >= METRICS_EVERY)
    }

    /// A `metrics` event, where there is something new to say.
    async fn look(&mut self, task: TaskId) -> Option<Bytes> {
        self.looked = Some(Instant::now());
        // A loop that is busy, or stands still, has more to do than this; tokens do not wait for it.
        let asked = tokio::time::timeout(PATIENCE, self.control.published.metrics()).await;
        let (state, metrics) = asked.ok()?.ok()?.get(&task)?.clone();
        if state != TaskState::Queued && !self.verbose {
            return None;
        }
        let moved = self.reported.as_ref().is_none_or(|reported| {
            let reason = |metrics: &Metrics| metrics.waiting_for.as_ref().and_then(|of| of.reason);
            reported.queue_position != metrics.queue_position || reason(reported) != reason(&metrics)
        });
        if !moved && !self.verbose && self.spoke.elapsed() < SAME_METRICS_EVERY {
            return None;
        }
        let mut frame = Vec::with_capacity(256);
        write_frame(&mut frame, None, "metrics", &serde_json::to_string(&metrics).unwrap_or_default());
        self.reported = Some(metrics);
        Some(Bytes::from(frame))
    }
}

/// One reader of one stream.
struct Reader {
    stream: Arc<TaskStream>,
    follower: Follower,
    place: ReadPosition,
    /// The terminal frame was given out.
    finished: bool,
    task: TaskId,
    gauge: Gauge,
    /// Rings when there may be something to say besides the log. A token does not touch it: it rings too
    /// early then, and is set anew.
    timer: Pin<Box<Sleep>>,
}

impl Reader {
    /// What stands in the log from `next` on, waiting for it if need be; where the task stands,
    /// or a comment, when nothing comes for a while; nothing at the end.
    async fn more(&mut self) -> Option<Result<Bytes, StreamReleased>> {
        if self.finished {
            return None;
        }
        let bytes = loop {
            // Nothing stands within a frame.
            if self.place.part == 0
                && self.gauge.is_due()
                && let Some(metrics) = self.gauge.look(self.task).await
            {
                break metrics;
            }
            // Another reader took its place, which wakes this one.
            if self.follower.permit.has_ended() {
                self.finished = true;
                return Some(Err(StreamReleased));
            }
            let changed = match self.stream.read(self.place) {
                ReadOutcome::Frames(piece) => {
                    (self.place, self.finished) = (piece.place, piece.is_last);
                    break piece.bytes;
                }
                ReadOutcome::Released => {
                    self.finished = true;
                    return Some(Err(StreamReleased));
                }
                ReadOutcome::Nothing(changed) => changed,
            };
            tokio::select! {
                biased;
                () = changed => continue,
                () = &mut self.timer => {}
            }
            let started = self.place.frame > 0;
            if Instant::now() >= self.gauge.look_at(started)
                && let Some(metrics) = self.gauge.look(self.task).await
            {
                break metrics;
            }
            if Instant::now() >= self.gauge.keep_alive_at() {
                break Bytes::from_static(b": ka\n\n");
            }
            let next = self.gauge.look_at(started).min(self.gauge.keep_alive_at());
            self.timer.as_mut().reset(next);
        };
        self.gauge.spoke = Instant::now();
        (!bytes.is_empty()).then_some(Ok(bytes))
    }
}

#[cfg(test)]
mod tests {
    use daemon_kit::{Caller, Clock};
    use futures::StreamExt;
    use pool_registry_types::{AttemptId, LogId};
    use task_stream::{Payload, PayloadFormat, Segment};
    use tokio::time::interval;
    use uuid::Uuid;

    use super::*;
    use crate::services::control::mailbox;
    use crate::services::streams::{Streams, Submitted};

    const TASK: TaskId = TaskId(Uuid::from_u128(1));

    fn opened() -> Arc<TaskStream> {
        let streams = Streams::new(1_000, usize::MAX);
        let payload = Payload { format: PayloadFormat::Native, bytes: Bytes::new() };
        streams.open(TASK, LogId(Uuid::from_u128(1)), Submitted::with(payload));
        streams.get(TASK).unwrap()
    }

    // CLOUD-1940
    #[tokio::test(start_paused = true)]
    async fn a_quiet_reader_hears_every_ten_seconds_that_its_stream_lives_whatever_wakes_it_meanwhile() {
        for started in [false, true] {
            let stream = opened();
            let attempt = AttemptId(Uuid::from_u128(1));
            stream.write(|log| log.open(attempt));
            let (control, _inbox) = mailbox(Clock::default());
            let permit = stream.reader(&Caller::default()).unwrap();
            let follower = Follower::new(permit, None);
            let gauge = Gauge::new(control, false);
            let mut reader = Box::pin(follow(Arc::clone(&stream), follower, 0, TASK, gauge));
            if started {
                let frame = Segment::frame(0, "event: token\ndata: {}\n\n".into());
                stream.write(|log| log.append(attempt, frame)).unwrap();
                assert!(reader.next().await.unwrap().unwrap().starts_with(b"event: token"));
            }
            let begun = Instant::now();
            let node = tokio::spawn(async move {
                let mut each = interval(Duration::from_millis(900));
                loop {
                    each.tick().await;
                    stream.write(|_| ());
                }
            });
            for n in 1..=3 {
                let comment = reader.next().await.unwrap().unwrap();
                assert_eq!(comment, ": ka\n\n");
                // A look at where the task stands may lie before it, and is bounded.
                let late = begun.elapsed() - KEEP_ALIVE_EVERY * n;
                assert!(late <= PATIENCE * n, "comment {n} is late by {late:?}");
            }
            node.abort();
        }
    }
}
