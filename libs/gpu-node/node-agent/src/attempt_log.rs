//! What the node's log says of an attempt: that it was accepted or refused, and how it ended.
//!
//! Each line names the attempt, and the client's request by its correlation id and its trace id, so
//! that one search finds it in both daemons. How it ended is an `info` line, of a failure with its code and
//! no more: an engine's message may quote a prompt; what comes before is `debug`.

use std::time::Instant;

use pool_registry_types::{AttemptId, ErrorBody, PoolId, ReplicaId, TaskId, TraceContext};
use tracing::field::debug;

/// Writes the lines of one attempt.
#[derive(Debug)]
pub(crate) struct AttemptLog {
    task_id: TaskId,
    attempt_id: AttemptId,
    pool_id: PoolId,
    /// Absent where whoever asked for the attempt has none.
    trace: Option<TraceContext>,
    began: Instant,
}

/// One line: level and message, the fields of every attempt, and those of its own.
macro_rules! line {
    ($level:ident, $log:ident, $message:literal $(, $($field:tt)+)?) => {
        tracing::$level!(
            task_id = %$log.task_id,
            attempt_id = %$log.attempt_id,
            pool_id = %$log.pool_id,
            $($($field)+,)?
            correlation_id = $log.trace.as_ref().map(|trace| trace.correlation_id.as_str()),
            trace_id = $log.trace.as_ref().map(TraceContext::trace_id),
            $message
        )
    };
}

impl AttemptLog {
    pub(crate) fn new(
        pool_id: &PoolId,
        task_id: TaskId,
        attempt_id: AttemptId,
        trace: Option<&TraceContext>,
    ) -> Self {
        Self { task_id, attempt_id, pool_id: pool_id.clone(), trace: trace.cloned(), began: Instant::now() }
    }

    pub(crate) fn accepted(&self, replica_id: &ReplicaId) {
        line!(debug, self, "an attempt is accepted", replica_id = %replica_id);
    }

    pub(crate) fn refused(&self, error: &ErrorBody) {
        line!(debug, self, "an attempt is refused", code = %error.code);
    }

    pub(crate) fn ended(&self, tokens_out: u64) {
        line!(info, self, "an attempt has ended", tokens_out, elapsed_ms = self.elapsed_ms());
    }

    pub(crate) fn failed(&self, error: &ErrorBody) {
        let cause = error.cause.map(debug);
        line!(info, self, "an attempt has failed", code = %error.code, cause, elapsed_ms = self.elapsed_ms());
    }

    /// It was stopped before its end: by its reader, by an order, or by a defect.
    pub(crate) fn abandoned(&self) {
        line!(info, self, "an attempt is stopped before its end", elapsed_ms = self.elapsed_ms());
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
#[path = "attempt_log_tests.rs"]
pub(crate) mod tests;
