//! One attempt on one engine, and who reads its stream.
//!
//! The answer's headers go out when the slot is taken, before any prefill. From then on a comment every
//! second proves that the node lives. The attempt's [`Driver`] appends to a buffer, and an
//! [`AttemptReader`] follows it. While there is a reader that the attempt was accepted with, the driver
//! is polled by it: no task, no channel and no wake-up stand between them. A reader that is dropped ends
//! nothing: the driver then gets a task of its own, and another reader may come. What ends an attempt is
//! its driver, or a stop.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use handoff_watcher::HandoffName;
use node_core::{Ask, Cursor, ResumeError, Retention, Taken};
use pool_registry_types::task::InferRequest;
use pool_registry_types::{AttemptId, ErrorBody, PoolId, ReplicaId, TraceContext};
use uuid::Uuid;

use crate::agent::{Agent, Signals};
use crate::attempt_log::AttemptLog;
use crate::driver::{Driver, KEEP_ALIVE_EVERY, Step};
use crate::engines::client::attempt_headers;
use crate::slot::Slot;

/// Proves that the node lives; made for each reader, and not kept.
const KEEP_ALIVE: &[u8] = b": ka\n\n";

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

/// A reader's place in its attempt, and the driver for as long as nobody else polls it.
struct Following {
    agent: Arc<Agent>,
    attempt: AttemptId,
    cursor: Cursor,
    driver: Option<Driver>,
    /// Absent where the attempt has ended: then all is there.
    signals: Option<Arc<Signals>>,
}

impl Following {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            let taken = self.agent.core.lock().held_mut().take(&self.attempt, &mut self.cursor);
            match taken {
                Taken::Bytes(bytes) => {
                    if let Some(signals) = self.signals.as_ref().filter(|_| self.driver.is_none()) {
                        signals.taken.notify_one();
                    }
                    return Some(bytes);
                }
                Taken::Over | Taken::Replaced => return None,
                Taken::Waiting => {}
            }
            let lives = || Some(Bytes::from_static(KEEP_ALIVE));
            if let Some(driver) = &mut self.driver {
                match driver.step().await {
                    Step::Appended => {}
                    Step::Quiet => return lives(),
                    Step::Over => self.driver = None,
                }
                continue;
            }
            let appended = self.signals.as_ref()?.appended.notified();
            if tokio::time::timeout(KEEP_ALIVE_EVERY, appended).await.is_err() {
                return lives();
            }
        }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let goes_on =
            self.agent.change_deadlines(|core, now| core.held_mut().detach(now, &self.attempt, &self.cursor));
        // Without anybody who polls it, it would stand still. One that was stopped is dropped, which ends
        // what it does.
        if let Some(driver) = self.driver.take().filter(|_| goes_on) {
            owned_tasks::task(&self.agent.tracker, "attempt without the reader it began with", driver.run());
        }
    }
}

impl Agent {
    /// Takes a slot for the attempt and starts it, or says why not. `trace` is that of whoever asks:
    /// the log names it, and a child of it goes to the engine with every request of the attempt.
    /// Errors: those of [`node_core::NodeCore::accept`], and `UNSUPPORTED` for what the engine cannot do.
    pub fn infer(
        self: &Arc<Self>,
        pool_id: &PoolId,
        request: InferRequest,
        retention: Retention,
        trace: Option<&TraceContext>,
    ) -> Result<Inference, ErrorBody> {
        request.check()?;
        let attempt = request.attempt_id;
        let log = AttemptLog::new(pool_id, &request, trace);
        let ask = Ask {
            node_id: &request.node_id,
            boot_id: request.boot_id,
            attempt,
            model: Some(&request.task.model_ref),
            task: Some(request.task_id),
            hint: request.replica_hint.as_ref(),
            first_index: request.first_index,
            retention,
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
            at.headers = attempt_headers(&trace.child(span_id), &attempt);
        }
        let slot = Slot::new(Arc::clone(self), attempt, log, name, accepted.engine, at);
        let signals = Arc::clone(&slot.signals);
        let (replica_id, report_seq) = (accepted.replica_id.clone(), accepted.report_seq);
        let driver = Driver::begin(slot, accepted, request)?;
        let reader = self.reader(attempt, Cursor::first(), Some(driver), Some(signals));
        Ok(Inference { replica_id, report_seq, reader })
    }

    /// Another reader follows the attempt, from its record `from` on. The one before it ends without a
    /// final frame.
    pub fn resume(self: &Arc<Self>, attempt: &AttemptId, from: u64) -> Result<Inference, ResumeError> {
        let signals = self.drivers.lock().get(attempt).cloned();
        let resumed = self.change_deadlines(|core, _| core.resume(attempt, from))?;
        let reader = self.reader(*attempt, resumed.cursor, None, signals);
        Ok(Inference { replica_id: resumed.replica_id, report_seq: resumed.report_seq, reader })
    }

    /// Ends the attempt: whoever wanted it has no use for its end either. One that has not come yet is
    /// refused when it does.
    pub fn stop_attempt(&self, attempt: &AttemptId) {
        self.with_core(|core, _| core.stopped(attempt));
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
        let following = Following { agent: Arc::clone(self), attempt, cursor, driver, signals };
        let bytes = stream::unfold(following, |mut following| async move {
            following.next().await.map(|bytes| (bytes, following))
        });
        AttemptReader { agent: Arc::clone(self), attempt, bytes: Box::pin(bytes) }
    }
}

#[cfg(test)]
#[path = "infer_tests.rs"]
mod tests;
