//! What a collector is told of tasks and their attempts, where their traces are recorded.
//!
//! A task's span belongs to that of the request, and everything else to the task's; the ids of both are made
//! of theirs, so that the node's spans find the attempt's. Of a client's words a span has those that name its
//! task, and of a prompt, an answer or an error's message none.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use pool_registry_types::placement::{Explanation, PoolVerdict};
use pool_registry_types::task::{ResumeMode, Workload};
use pool_registry_types::{AttemptId, ErrorCode, PoolKey, TaskId, TraceContext};
use span_export::{Kind, Span, StringValue, Value, id_of, is_recorded};
use task_scheduler::{CloseReason, Dispatch, HowEnded, TaskEnd};
use task_stream::TaskSpec;

use crate::metrics::task_state;
use crate::services::usage::TaskUsage;

/// Pools of which a span says why they were not taken.
const REFUSALS: usize = 16;

/// The tasks that are recorded and have not ended, by the core's keys.
#[derive(Debug, Default)]
pub(super) struct TaskSpans {
    tasks: HashMap<TaskId, Task>,
    /// Whose the attempts are that have not ended.
    attempts: HashMap<AttemptId, TaskId>,
}

#[derive(Debug)]
struct Task {
    spec: Arc<TaskSpec>,
    admitted: Instant,
    waits: Wait,
    last: Option<AttemptId>,
}

/// Since when a task waits for a place, and why again.
#[derive(Debug)]
struct Wait {
    since: Instant,
    why: Option<(&'static str, Option<ErrorCode>)>,
}

impl TaskSpans {
    /// The task waits from now on. `begun`: when deciding began. `places`: what the core says of every pool,
    /// where the task has none.
    pub(super) fn admitted(
        &mut self,
        task: TaskId,
        spec: &Arc<TaskSpec>,
        begun: Instant,
        places: impl FnOnce() -> Option<Explanation>,
    ) {
        if !is_recorded(&spec.trace) {
            return;
        }
        let waits = Wait { since: begun, why: None };
        self.tasks.insert(task, Task { spec: Arc::clone(spec), admitted: begun, waits, last: None });
        if let Some(span) = places().and_then(|places| placement(spec, begun, &places, None)) {
            span.end();
        }
    }

    /// An attempt is sent. `begun`: when deciding on it began.
    pub(super) fn placed(
        &mut self,
        dispatch: &Dispatch,
        begun: Instant,
        places: impl FnOnce() -> Option<Explanation>,
    ) {
        let Some(task) = self.tasks.get_mut(&dispatch.task) else { return };
        let name = match (task.last.is_some(), dispatch.resume) {
            (false, _) => "queue",
            (true, None) => "retry",
            (true, Some(_)) => "continuation",
        };
        if let Some(span) = task.wait(name) {
            let span = span.maybe("llorch.resume", dispatch.resume.map(resume));
            span.maybe("llorch.tokens_before", dispatch.resume.and(i64::try_from(dispatch.first_index).ok()))
                .end_at(begun);
        }
        if let Some(span) =
            places().and_then(|places| placement(&task.spec, begun, &places, Some(&dispatch.pool)))
        {
            span.with("llorch.node_id", dispatch.pool.node_id.to_string())
                .with("llorch.pool_id", dispatch.pool.pool_id.to_string())
                .end();
        }
        task.last = Some(dispatch.attempt);
        self.attempts.insert(dispatch.attempt, dispatch.task);
    }

    /// An attempt has ended, and with it its task or not. `begun`: when deciding on that began.
    pub(super) fn attempt_ended(&mut self, attempt: AttemptId, begun: Instant) {
        if self.attempts.is_empty() {
            return;
        }
        if let Some(task) = self.attempts.remove(&attempt).and_then(|task| self.tasks.get_mut(&task)) {
            task.waits = Wait { since: begun, why: None };
        }
    }

    /// The task waits for a place again.
    pub(super) fn replaced(&mut self, task: TaskId, why: &'static str, code: Option<ErrorCode>) {
        if let Some(task) = self.tasks.get_mut(&task) {
            task.waits.why = Some((why, code));
        }
    }

    /// `begun`: when deciding on its end began. `usage`: what is known of its tokens.
    pub(super) fn ended(&mut self, end: &TaskEnd, begun: Instant, usage: impl FnOnce() -> Option<TaskUsage>) {
        let Some(task) = self.tasks.remove(&end.key) else { return };
        // While it waits for a place, its first or another one: no attempt of it runs, nor has one just ended.
        let runs = task.last.is_some_and(|last| self.attempts.contains_key(&last));
        if !runs && task.waits.since != begun {
            let name = match (task.last, end.sent) {
                (None, _) => "queue",
                (Some(_), 0) => "retry",
                (Some(_), _) => "continuation",
            };
            if let Some(span) = task.wait(name) {
                span.end();
            }
        }
        let spec = &task.spec;
        let Some(span) = Span::of(&spec.trace, "task", Kind::Internal) else { return };
        let usage = usage().unwrap_or_default();
        let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let span = span
            .named(id_of(spec.task_id.0))
            .since(task.admitted)
            .with("llorch.task_id", spec.task_id.to_string())
            .with("llorch.correlation_id", spec.trace.correlation_id.clone())
            .maybe("llorch.caller", spec.caller.as_ref().map(|caller| caller.name.clone()))
            .with("gen_ai.operation.name", operation(spec))
            .with("gen_ai.request.model", spec.model_ref.to_string())
            .maybe("gen_ai.request.max_tokens", spec.max_tokens.map(i64::from))
            .maybe("gen_ai.usage.input_tokens", usage.tokens_in.map(number))
            .maybe("gen_ai.usage.output_tokens", usage.tokens_out.map(number))
            .maybe(
                "gen_ai.response.finish_reasons",
                usage.finish_reason.filter(|reason| is_a_word(reason)).map(|reason| strings([reason])),
            )
            .with("llorch.state", task_state(end.state))
            .with("llorch.attempts", i64::from(end.attempts))
            .with("llorch.queue_wait_ms", number(end.queue_wait_ms))
            .maybe("llorch.first_token_ms", end.first_token_ms.map(number))
            .maybe("llorch.node_id", end.pool.as_ref().map(|pool| pool.node_id.to_string()));
        match end.code {
            Some(code) => span.failed(code.as_str()).end(),
            None => span.end(),
        }
    }
}

impl Task {
    /// Its wait, which has come to an end.
    fn wait(&self, name: &'static str) -> Option<Span> {
        let span = of_task(&self.spec, name, Kind::Internal)?.since(self.waits.since);
        let span = match self.last {
            Some(last) => span.after(id_of(last.0)),
            None => span,
        };
        Some(match self.waits.why {
            Some((why, code)) => {
                span.with("llorch.why", why).maybe("llorch.code", code.map(|code| code.as_str()))
            }
            None => span,
        })
    }
}

/// A span of the task's.
fn of_task(spec: &TaskSpec, name: &'static str, kind: Kind) -> Option<Span> {
    Some(Span::of(&spec.trace, name, kind)?.within(id_of(spec.task_id.0)))
}

/// What was decided on the pools. `chosen`: it has taken its slot by now.
fn placement(
    spec: &TaskSpec,
    begun: Instant,
    places: &Explanation,
    chosen: Option<&PoolKey>,
) -> Option<Span> {
    let span = of_task(spec, "placement", Kind::Internal)?.since(begun);
    let is_chosen = |verdict: &PoolVerdict| {
        chosen.is_some_and(|pool| pool.node_id == verdict.node_id && pool.pool_id == verdict.pool_id)
    };
    let refused = |verdict: &PoolVerdict| {
        let (node_id, pool_id) = (&verdict.node_id, &verdict.pool_id);
        let refusal = verdict.refusal.filter(|_| !is_chosen(verdict))?;
        // As the API calls it.
        let refusal = serde_json::to_value(refusal).ok()?;
        Some(format!("{node_id}/{pool_id}: {}", refusal.as_str()?))
    };
    let refusals = strings(places.pools.iter().filter_map(refused).take(REFUSALS));
    let eligible = places.pools.iter().filter(|verdict| verdict.eligible || is_chosen(verdict)).count();
    let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
    Some(
        span.with("llorch.pools", number(places.pools.len()))
            .with("llorch.pools_eligible", number(eligible))
            .with("llorch.refusals", refusals),
    )
}

fn strings(texts: impl IntoIterator<Item = String>) -> Value {
    Value::Array(texts.into_iter().map(StringValue::from).collect::<Vec<_>>().into())
}

/// Whether an engine's word is one: what else it says may quote a prompt.
fn is_a_word(text: &str) -> bool {
    (1..=32).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

/// As the conventions for generative AI call it, where they do.
const fn operation(spec: &TaskSpec) -> &'static str {
    match spec.workload {
        Workload::Completion => "generate_content",
        Workload::Embedding => "embeddings",
        Workload::Rerank => "rerank",
    }
}

const fn resume(mode: ResumeMode) -> &'static str {
    match mode {
        ResumeMode::Replay => "replay",
        ResumeMode::Append => "append",
    }
}

/// What goes to a node with an attempt: one span, however often it is sent.
pub(super) fn trace_of(dispatch: &Dispatch) -> TraceContext {
    dispatch.spec.trace.child(id_of(dispatch.attempt.0))
}

/// One attempt, from its dispatch to its end.
#[derive(Debug)]
pub(super) struct AttemptSpan {
    span: Span,
    trace: TraceContext,
    sent: Instant,
    accepted: Option<Instant>,
    first: Option<Instant>,
}

impl AttemptSpan {
    /// Nothing where the task's trace is not recorded.
    pub(super) fn begin(dispatch: &Dispatch) -> Option<Box<Self>> {
        let spec = &dispatch.spec;
        let span = of_task(spec, "attempt", Kind::Client)?
            .named(id_of(dispatch.attempt.0))
            .with("llorch.task_id", spec.task_id.to_string())
            .with("llorch.attempt_id", dispatch.attempt.to_string())
            .with("llorch.attempt", i64::from(dispatch.attempt_number))
            .with("llorch.node_id", dispatch.pool.node_id.to_string())
            .with("llorch.pool_id", dispatch.pool.pool_id.to_string())
            .with("llorch.correlation_id", spec.trace.correlation_id.clone())
            .maybe("llorch.caller", spec.caller.as_ref().map(|caller| caller.name.clone()))
            .with("gen_ai.operation.name", operation(spec))
            .with("gen_ai.request.model", spec.model_ref.to_string())
            .maybe("llorch.resume", dispatch.resume.map(resume));
        let trace = spec.trace.child(span.id());
        Some(Box::new(Self { span, trace, sent: Instant::now(), accepted: None, first: None }))
    }

    /// Its node has it.
    pub(super) fn accepted(&mut self) {
        self.accepted.get_or_insert_with(Instant::now);
    }

    /// Its first token has come.
    pub(super) fn started(&mut self) {
        self.first.get_or_insert_with(Instant::now);
    }

    /// `why`: it was closed from above.
    pub(super) fn ended(self, how: &HowEnded, why: Option<CloseReason>) {
        let Self { mut span, trace, sent, accepted, first } = self;
        let now = Instant::now();
        let part = |name, from: Instant, to: Instant| {
            if let Some(span) = Span::of(&trace, name, Kind::Internal) {
                span.since(from).end_at(to);
            }
        };
        // What it did not come to has no span: how far it came is what the last one is.
        part("dispatch", sent, accepted.or(first).unwrap_or(now));
        if let Some(accepted) = accepted.or(first) {
            part("first token", accepted, first.unwrap_or(now));
        }
        if let Some(first) = first {
            span.event("first token", first);
            part("stream", first, now);
        }
        span.set("llorch.ended", how.as_str());
        match how {
            HowEnded::Finished => span.end_at(now),
            HowEnded::Closed => match why {
                None | Some(CloseReason::Canceled) => span.end_at(now),
                Some(why) => span.with("llorch.why", format!("{why:?}")).failed(how.as_str()).end_at(now),
            },
            _ => span.failed(how.as_str()).end_at(now),
        }
    }
}
