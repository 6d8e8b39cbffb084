//! One attempt on one engine, and who reads its stream.
//!
//! Whoever asks has its answer when the slot is taken, before any prefill. From then on a comment after
//! each second in which the reader was given nothing proves that the node lives. The attempt's
//! [`Driver`] appends to a buffer, and an [`AttemptReader`] follows it. The driver of an attached attempt
//! is polled by the reader that the attempt was accepted with, for as long as there is that: no task, no
//! channel and no wake-up stand between them. Any other driver has a task of its own. A reader that is
//! dropped ends nothing, and another one may come. What ends an attempt is its driver, or a stop.

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use handoff_watcher::HandoffName;
use node_core::{Accepted, Ask, Cursor, ResumeError, Retention, Taken};
use pool_registry_types::task::InferRequest;
use pool_registry_types::{AttemptId, ErrorBody, PoolId, ReplicaId, TraceContext};
use task_stream::TaskCaller;
use tokio::time::{Instant, Sleep, sleep};

use crate::agent::{Agent, Signals};
use crate::attempt_log::AttemptLog;
use crate::driver::{Driver, Step};
use crate::engines::client::attempt_headers;
use crate::slot::Slot;

/// Proves that the node lives; made for each reader, and not kept.
const KEEP_ALIVE: &[u8] = b": ka\n\n";
/// A reader that was given nothing for so long is given that. Source: .specs/01 CLOUD-1515.
const KEEP_ALIVE_AFTER: Duration = Duration::from_secs(1);

/// An accepted attempt, or one that a reader comes to again.
#[derive(Debug)]
pub struct Inference {
    pub replica_id: ReplicaId,
    /// The number of the last report made before the acceptance.
    pub report_seq: u64,
    pub reader: AttemptReader,
}

/// Follows the stream of an attempt: frames and comments, in as many pieces as they came. Dropped, it
/// ends nothing.
pub struct AttemptReader {
    agent: Arc<Agent>,
    attempt: AttemptId,
    bytes: Pin<Box<dyn Stream<Item = Bytes> + Send>>,
}

impl std::fmt::Debug for AttemptReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AttemptReader").field("attempt", &self.attempt).finish_non_exhaustive()
    }
}

impl AttemptReader {
    /// The next bytes; nothing after the last, nor once another reader follows the attempt.
    pub async fn next(&mut self) -> Option<Bytes> {
        self.bytes.next().await
    }

    /// Ends the attempt, if it has not ended by itself.
    pub fn stop(self) {
        self.agent.stop_attempt(&self.attempt);
    }

    /// The same over an exchange whose end, before the attempt's, is the stop.
    pub fn into_exchange(self) -> ExchangeBody {
        ExchangeBody(Some(self))
    }
}

/// The stream of an attempt as the body of an answer: there is no word for a stop but its end.
#[derive(Debug)]
pub struct ExchangeBody(Option<AttemptReader>);

impl Stream for ExchangeBody {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(reader) = &mut self.0 else { return Poll::Ready(None) };
        let polled = reader.bytes.poll_next_unpin(cx);
        if let Poll::Ready(None) = polled {
            self.0 = None;
        }
        polled.map(|bytes| bytes.map(Ok))
    }
}

impl Drop for ExchangeBody {
    fn drop(&mut self) {
        if let Some(reader) = self.0.take() {
            reader.stop();
        }
    }
}

/// Who is to read an attempt.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ReadBy {
    /// An [`AttemptReader`].
    Reader(Retention),
    /// A link: all of it is kept, or what was not seen.
    Link { keep: bool },
    /// A [`crate::RecordReader`].
    Records,
}

impl ReadBy {
    pub(crate) fn retention(self) -> Retention {
        match self {
            Self::Reader(retention) => retention,
            Self::Link { keep: true } => Retention::Keep,
            Self::Link { keep: false } | Self::Records => Retention::Unseen,
        }
    }
}

/// An attempt that was accepted, and is not driven yet.
pub(crate) struct Begun {
    pub(crate) replica_id: ReplicaId,
    pub(crate) report_seq: u64,
    pub(crate) driver: Driver,
    signals: Arc<Signals>,
}

/// A reader's place in its attempt, and the driver for as long as nobody else polls it.
struct Following {
    agent: Arc<Agent>,
    attempt: AttemptId,
    cursor: Cursor,
    driver: Option<Driver>,
    /// Absent where the attempt has ended: then all is there.
    signals: Option<Arc<Signals>>,
    /// Rings when the reader was given nothing for a while. What it is given moves it to later, which
    /// takes no lock and wakes nobody.
    quiet: Pin<Box<Sleep>>,
}

impl Following {
    /// The next bytes of the attempt, or a comment where there are none for a while.
    async fn next(&mut self) -> Option<Bytes> {
        let bytes = self.bytes().await;
        self.quiet.as_mut().reset(Instant::now() + KEEP_ALIVE_AFTER);
        bytes
    }

    async fn bytes(&mut self) -> Option<Bytes> {
        let lives = || Some(Bytes::from_static(KEEP_ALIVE));
        loop {
            // What a driver of its own has made it has taken before.
            if let Some(driver) = &mut self.driver {
                let step = tokio::select! {
                    biased;
                    step = driver.step() => step,
                    () = &mut self.quiet => return lives(),
                };
                match step {
                    Step::Appended => {}
                    Step::Over => self.driver = None,
                }
            }
            let signals = self.signals.as_ref().filter(|_| self.driver.is_none());
            // Before the look, so that nothing is appended between it and the wait.
            let mut appended = pin!(signals.map(|signals| signals.appended.notified()));
            if let Some(appended) = appended.as_mut().as_pin_mut() {
                appended.enable();
            }
            let taken = self.agent.core.lock().held_mut().take(&self.attempt, &mut self.cursor);
            if let Some(signals) = signals {
                signals.taken.notify_one();
            }
            match taken {
                Taken::Bytes(bytes) => return Some(bytes),
                Taken::Over | Taken::Replaced => return None,
                Taken::Waiting if self.driver.is_some() => continue,
                Taken::Waiting => {}
            }
            tokio::select! {
                biased;
                () = appended.as_pin_mut()? => {}
                () = &mut self.quiet => return lives(),
            }
        }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        if let (Some(_), Some(signals)) = (&self.driver, &self.signals) {
            signals.polled_by_reader.store(false, Ordering::Relaxed);
        }
        let goes_on =
            self.agent.change_held(|core, now| core.held_mut().detach(now, &self.attempt, &self.cursor));
        // Without anybody who polls it, it would stand still. One that was stopped is dropped, which ends
        // what it does.
        if let Some(driver) = self.driver.take().filter(|_| goes_on) {
            self.agent.drive(driver.run());
        }
    }
}

impl Agent {
    /// Takes a slot for the attempt and starts it, or says why not. `trace` is that of whoever asks:
    /// the log names it, and a child of it goes to the engine with every request of the attempt. Until
    /// the engine has answered, the request takes `payload_bytes` of what may be held.
    /// Errors: those of [`node_core::NodeCore::accept`], and `UNSUPPORTED` for what the engine cannot do.
    pub fn infer(
        self: &Arc<Self>,
        pool_id: &PoolId,
        request: InferRequest,
        payload_bytes: usize,
        retention: Retention,
        trace: Option<&TraceContext>,
    ) -> Result<Inference, ErrorBody> {
        let attempt = request.attempt_id;
        // Only a link says who has submitted the task.
        let begun = self.begin(pool_id, request, payload_bytes, ReadBy::Reader(retention), trace, None)?;
        let polled = match retention {
            Retention::Attached => Some(begun.driver),
            // Another reader may come while this one stands still, and must not stand still with it.
            Retention::Keep | Retention::Unseen => {
                self.drive(begun.driver.run());
                None
            }
        };
        let reader = self.reader(attempt, Cursor::first(), polled, Some(begun.signals));
        Ok(Inference { replica_id: begun.replica_id, report_seq: begun.report_seq, reader })
    }

    /// Takes a slot for the attempt, whoever is to read it. Errors: those of [`Agent::infer`].
    pub(crate) fn begin(
        self: &Arc<Self>,
        pool_id: &PoolId,
        request: InferRequest,
        payload_bytes: usize,
        read_by: ReadBy,
        trace: Option<&TraceContext>,
        caller: Option<&TaskCaller>,
    ) -> Result<Begun, ErrorBody> {
        request.check()?;
        let attempt = request.attempt_id;
        let log = AttemptLog::new(pool_id, request.task_id, attempt, trace, caller);
        let ask = Ask {
            node_id: &request.node_id,
            boot_id: request.boot_id,
            attempt,
            model: Some(&request.task.model_ref),
            task: Some(request.task_id),
            hint: request.replica_hint.as_ref(),
            first_index: request.first_index,
            retention: read_by.retention(),
        };
        let (slot, accepted) = self.take_slot(pool_id, &ask, payload_bytes, read_by, trace, log)?;
        let (replica_id, report_seq) = (accepted.replica_id.clone(), accepted.report_seq);
        let signals = Arc::clone(&slot.signals);
        let driver = Driver::begin(slot, accepted, request)?;
        Ok(Begun { replica_id, report_seq, driver, signals })
    }

    /// Takes a slot for whoever asks. Errors: those of [`node_core::NodeCore::accept`].
    pub(crate) fn take_slot(
        self: &Arc<Self>,
        pool_id: &PoolId,
        ask: &Ask<'_>,
        payload_bytes: usize,
        read_by: ReadBy,
        trace: Option<&TraceContext>,
        mut log: AttemptLog,
    ) -> Result<(Slot, Accepted), ErrorBody> {
        let (attempt, now) = (ask.attempt, self.now());
        let signals = Arc::new(Signals::of(now, read_by));
        let accepted = {
            // Whoever asks for the attempt as soon as it is accepted finds what it is followed by.
            let mut drivers = self.drivers.lock();
            let mut core = self.core.lock();
            let accepted = core.accept(now, pool_id, ask);
            if accepted.is_ok() {
                core.held_mut().count_payload(&attempt, payload_bytes);
                drivers.insert(attempt, Arc::clone(&signals));
            }
            accepted
        };
        let accepted = accepted.inspect_err(|error| {
            self.counters.lock().refused += 1;
            log.refused(error);
        })?;
        let name = HandoffName { pool_id: pool_id.clone(), replica_id: accepted.replica_id.clone() };
        let mut at = self.endpoint(&name, &accepted.url);
        if let Some(trace) = trace {
            at.headers = attempt_headers(&trace.child(log.engine_span_id()), &attempt);
        }
        let slot = Slot::new(Arc::clone(self), attempt, signals, log, name, accepted.engine, at);
        Ok((slot, accepted))
    }

    /// The driver goes on by itself.
    pub(crate) fn drive(&self, driving: impl Future<Output = ()> + Send + 'static) {
        let (tracker, name) = (&self.tracker, "driver of an attempt");
        match self.threads.get() {
            Some(threads) => owned_tasks::task_on(tracker, &threads.here(), name, driving),
            None => owned_tasks::task(tracker, name, driving),
        }
    }

    /// Another reader follows the attempt, from its record `from` on. The one before it ends without a
    /// final frame. An attached attempt is its first reader's until that is dropped: until then `Gone`.
    pub fn resume(self: &Arc<Self>, attempt: &AttemptId, from: u64) -> Result<Inference, ResumeError> {
        // No attempt is accepted or ends between the two looks.
        let drivers = self.drivers.lock();
        let signals = drivers.get(attempt).cloned();
        if signals.as_ref().is_some_and(|signals| signals.is_polled_by_reader()) {
            return Err(ResumeError::Gone);
        }
        let resumed = self.change_held(|core, now| core.resume(now, attempt, from))?;
        drop(drivers);
        if let Some(signals) = &signals {
            // The one before it learns that it is that.
            signals.appended.notify_waiters();
        }
        let reader = self.reader(*attempt, resumed.cursor, None, signals);
        Ok(Inference { replica_id: resumed.replica_id, report_seq: resumed.report_seq, reader })
    }

    /// Ends the attempt: whoever wanted it has no use for its end either. One that has not come yet is
    /// refused when it does.
    pub(crate) fn stop_attempt(&self, attempt: &AttemptId) {
        self.with_core(|core, now| core.stopped(now, attempt));
        if let Some(signals) = self.drivers.lock().get(attempt) {
            signals.cancel.cancel();
        }
    }

    /// The attempt's end has come to whoever wanted it: its bytes may go.
    pub fn done(&self, attempt: &AttemptId) {
        self.with_core(|core, _| core.held_mut().done(attempt));
    }

    fn reader(
        self: &Arc<Self>,
        attempt: AttemptId,
        cursor: Cursor,
        driver: Option<Driver>,
        signals: Option<Arc<Signals>>,
    ) -> AttemptReader {
        let quiet = Box::pin(sleep(KEEP_ALIVE_AFTER));
        let following = Following { agent: Arc::clone(self), attempt, cursor, driver, signals, quiet };
        let bytes = stream::unfold(following, |mut following| async move {
            following.next().await.map(|bytes| (bytes, following))
        });
        AttemptReader { agent: Arc::clone(self), attempt, bytes: Box::pin(bytes.fuse()) }
    }
}

#[cfg(test)]
#[path = "infer_tests.rs"]
pub(crate) mod tests;
