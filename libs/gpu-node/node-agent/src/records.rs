//! The records of an attempt for a control plane in this process: what a link would be given, without
//! a link.

use std::pin::pin;
use std::sync::Arc;

use attempt_link::node::Supply;
use pool_registry_types::{AttemptId, ErrorBody, PoolId, TraceContext};

use crate::agent::{Agent, Signals};
use crate::infer::ReadBy;
use crate::passthrough::PassedRequest;

/// Bytes that are handed over at a time.
const TURN_BYTES: usize = 64 * 1024;

/// Follows an attempt whose answer is passed on. Dropped, it ends nothing.
#[derive(Debug)]
pub struct RecordReader {
    agent: Arc<Agent>,
    attempt: AttemptId,
    signals: Arc<Signals>,
    /// Of the frames that were handed over last, the index behind them: whoever asks for more has taken
    /// them.
    taken: Option<u64>,
    is_over: bool,
}

/// An accepted attempt with its records.
#[derive(Debug)]
pub struct PassedOn {
    pub acceptance: attempt_link::content::Acceptance,
    pub reader: RecordReader,
}

impl Agent {
    /// Takes a slot for the attempt and passes its request on. Errors: those of [`Agent::infer`].
    pub fn pass_on(
        self: &Arc<Self>,
        pool_id: &PoolId,
        request: PassedRequest,
        trace: Option<&TraceContext>,
    ) -> Result<PassedOn, ErrorBody> {
        let attempt = request.attempt_id;
        let (acceptance, signals) = self.begin_passing(pool_id, request, ReadBy::Records, trace, None)?;
        let reader = RecordReader { agent: Arc::clone(self), attempt, signals, taken: None, is_over: false };
        Ok(PassedOn { acceptance, reader })
    }
}

impl RecordReader {
    /// What comes next; nothing after the attempt's end, nor where it is not held any more.
    pub async fn next(&mut self) -> Option<Supply> {
        if self.is_over {
            return None;
        }
        loop {
            // Before the look, so that nothing is appended between it and the wait.
            let mut appended = pin!(self.signals.appended.notified());
            appended.as_mut().enable();
            let taken = self.taken.take();
            let supply = self.agent.change_held(|core, _| {
                let held = core.held_mut();
                if let Some(next) = taken {
                    held.seen(&self.attempt, next);
                }
                held.supply(&self.attempt, TURN_BYTES)
            });
            if taken.is_some() {
                self.signals.taken.notify_one();
            }
            match supply {
                Supply::Waiting => appended.await,
                Supply::Gone => {
                    self.is_over = true;
                    return None;
                }
                Supply::End { .. } => {
                    self.is_over = true;
                    self.agent.done(&self.attempt);
                    return Some(supply);
                }
                Supply::Frames { first, count, .. } => {
                    self.taken = Some(first + u64::from(count));
                    return Some(supply);
                }
                Supply::Head(_) | Supply::TokenIds { .. } | Supply::Error(_) => return Some(supply),
            }
        }
    }

    /// Ends the attempt, if it has not ended by itself.
    pub fn stop(self) {
        self.agent.stop_attempt(&self.attempt);
    }
}

impl Drop for RecordReader {
    fn drop(&mut self) {
        if !self.is_over {
            self.agent.change_held(|core, now| core.held_mut().unlink(now, &self.attempt));
        }
    }
}
