//! Readers of the tasks' streams.
//!
//! A reader keeps an index into a log and nothing else of it: a slow one slows nobody, and one
//! that goes is not missed. While its task waits, it is told where the task stands.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, stream};
use pool_registry_types::TaskId;
use pool_registry_types::sse::write_frame;
use pool_registry_types::task::{Metrics, TaskState};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use crate::services::control::Control;
use crate::services::streams::TaskStream;

/// Pause between two comments on a quiet stream.
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
    permit: OwnedSemaphorePermit,
    next: u64,
    task: TaskId,
    gauge: Gauge,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + use<> {
    let reader = Reader { stream, _permit: permit, next, finished: false, task, gauge };
    stream::unfold(reader, |mut reader| async move { reader.more().await.map(|bytes| (Ok(bytes), reader)) })
}

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

    /// How long the log may be quiet before the gauge is looked at.
    fn pause(&self, started: bool) -> Duration {
        match (started && !self.verbose, self.looked) {
            // What runs seldom waits again.
            (true, _) => SAME_METRICS_EVERY,
            (false, None) => FIRST_METRICS_AFTER,
            (false, Some(_)) => METRICS_EVERY,
        }
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
        let moved =
            self.reported.as_ref().is_none_or(|reported| reported.queue_position != metrics.queue_position);
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
    _permit: OwnedSemaphorePermit,
    next: u64,
    /// The terminal frame was given out.
    finished: bool,
    task: TaskId,
    gauge: Gauge,
}

impl Reader {
    /// What stands in the log from `next` on, waiting for it if need be; where the task stands,
    /// or a comment, when nothing comes for a while; nothing at the end.
    async fn more(&mut self) -> Option<Bytes> {
        if self.finished {
            return None;
        }
        let bytes = loop {
            if self.gauge.is_due()
                && let Some(metrics) = self.gauge.look(self.task).await
            {
                break metrics;
            }
            let changed = match self.stream.read(self.next) {
                Ok((bytes, next, finished)) => {
                    (self.next, self.finished) = (next, finished);
                    break bytes;
                }
                Err(changed) => changed,
            };
            if tokio::time::timeout(self.gauge.pause(self.next > 0), changed).await.is_ok() {
                continue;
            }
            if let Some(metrics) = self.gauge.look(self.task).await {
                break metrics;
            }
            if self.gauge.spoke.elapsed() >= KEEP_ALIVE_EVERY {
                break Bytes::from_static(b": ka\n\n");
            }
        };
        self.gauge.spoke = Instant::now();
        (!bytes.is_empty()).then_some(bytes)
    }
}
