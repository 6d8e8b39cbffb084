//! What the node's log says of an attempt, and its spans: that it was accepted or refused, and how it ended.
//!
//! Each line names the attempt, and the client's request by its correlation id and its trace id, so
//! that one search finds it in both daemons. How it ended is an `info` line, of a failure with its code and
//! no more: an engine's message may quote a prompt; what comes before is `debug`.

use std::time::Instant;

use pool_registry_types::pool::EngineKind;
use pool_registry_types::{AttemptId, ErrorBody, PoolId, ReplicaId, TaskId, TraceContext};
use span_export::{Kind, Span, id_of};
use task_stream::TaskCaller;
use tracing::field::debug;
use uuid::Uuid;

/// Writes the lines of one attempt.
#[derive(Debug)]
pub(crate) struct AttemptLog {
    task_id: TaskId,
    attempt_id: AttemptId,
    pool_id: PoolId,
    /// Absent where whoever asked for the attempt has none.
    trace: Option<TraceContext>,
    began: Instant,
    /// Until it has ended, where it is recorded.
    spans: Option<Box<Spans>>,
}

/// The attempt's span within whoever asks, and the one of its requests to the engine within that.
#[derive(Debug)]
struct Spans {
    attempt: Span,
    engine: Span,
    first: Option<Instant>,
}

impl Spans {
    fn begin(
        pool_id: &PoolId,
        task_id: TaskId,
        attempt_id: AttemptId,
        trace: &TraceContext,
        caller: Option<&TaskCaller>,
    ) -> Option<Self> {
        let attempt = Span::of(trace, "node attempt", Kind::Server)?
            .with("llorch.task_id", task_id.to_string())
            .with("llorch.attempt_id", attempt_id.to_string())
            .with("llorch.pool_id", pool_id.to_string())
            .with("llorch.correlation_id", trace.correlation_id.clone())
            .maybe("llorch.caller", caller.map(|caller| caller.name.clone()));
        let engine = Span::of(trace, "engine request", Kind::Client)?.within(attempt.id());
        Some(Self { attempt, engine, first: None })
    }

    fn end(self, tokens_out: Option<u64>, why: Option<&'static str>) {
        let Self { attempt, mut engine, first } = self;
        if let Some(first) = first {
            engine.event("first bytes", first);
        }
        let tokens = tokens_out.map(|tokens| i64::try_from(tokens).unwrap_or(i64::MAX));
        let engine = engine.maybe("gen_ai.usage.output_tokens", tokens);
        match why {
            None => {
                engine.end();
                attempt.end();
            }
            Some(why) => {
                engine.failed(why).end();
                attempt.failed(why).end();
            }
        }
    }
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
        caller: Option<&TaskCaller>,
    ) -> Self {
        let spans = trace.and_then(|trace| Spans::begin(pool_id, task_id, attempt_id, trace, caller));
        Self {
            task_id,
            attempt_id,
            pool_id: pool_id.clone(),
            trace: trace.cloned(),
            began: Instant::now(),
            spans: spans.map(Box::new),
        }
    }

    /// The id of the span of its requests to the engine.
    pub(crate) fn engine_span_id(&self) -> u64 {
        self.spans.as_ref().map_or_else(|| id_of(Uuid::new_v4()), |spans| spans.engine.id())
    }

    pub(crate) fn accepted(&mut self, replica_id: &ReplicaId, engine: EngineKind, model: &str) {
        line!(debug, self, "an attempt is accepted", replica_id = %replica_id);
        if let Some(spans) = &mut self.spans {
            spans.attempt.set("llorch.replica_id", replica_id.to_string());
            spans.attempt.set("gen_ai.request.model", model.to_owned());
            spans.engine.restart();
            spans.engine.set("gen_ai.provider.name", engine.as_str());
            spans.engine.set("gen_ai.request.model", model.to_owned());
        }
    }

    /// Something of the answer is there.
    pub(crate) fn brought(&mut self) {
        if let Some(spans) = &mut self.spans {
            spans.first.get_or_insert_with(Instant::now);
        }
    }

    pub(crate) fn refused(&mut self, error: &ErrorBody) {
        line!(debug, self, "an attempt is refused", code = %error.code);
        if let Some(spans) = self.spans.take() {
            // The engine was not asked.
            spans.attempt.failed(error.code.as_str()).end();
        }
    }

    /// `tokens_out`: of what is passed on it is events, or bytes, and no span says that.
    pub(crate) fn ended(&mut self, tokens_out: u64, are_tokens: bool) {
        self.end(are_tokens.then_some(tokens_out), None);
        line!(info, self, "an attempt has ended", tokens_out, elapsed_ms = self.elapsed_ms());
    }

    pub(crate) fn failed(&mut self, error: &ErrorBody) {
        self.end(None, Some(error.code.as_str()));
        let cause = error.cause.map(debug);
        line!(info, self, "an attempt has failed", code = %error.code, cause, elapsed_ms = self.elapsed_ms());
    }

    /// It was stopped before its end: by its reader, by an order, or by a defect.
    pub(crate) fn abandoned(&mut self) {
        self.end(None, Some("stopped"));
        line!(info, self, "an attempt is stopped before its end", elapsed_ms = self.elapsed_ms());
    }

    fn end(&mut self, tokens_out: Option<u64>, why: Option<&'static str>) {
        if let Some(spans) = self.spans.take() {
            spans.end(tokens_out, why);
        }
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
#[path = "attempt_log_tests.rs"]
pub(crate) mod tests;
