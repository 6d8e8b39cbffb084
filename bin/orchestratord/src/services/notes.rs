//! What the log says of tasks and nodes: one line a task that ended, a re-placement, and a change of liveness.
//!
//! A line has no text of a client's or an engine's: what either says may quote a prompt.

use pool_registry_types::node::Liveness;
use task_scheduler::{Note, TaskEnd};

pub(super) fn write(note: &Note) {
    match note {
        Note::TaskEnded(end) => ended(end),
        Note::Replaced { task, attempt, pool, why, code } => {
            let code = code.map(tracing::field::display);
            tracing::info!(task_id = %task, attempt_id = %attempt, node_id = %pool.node_id, pool_id = %pool.pool_id, why, code, "a task waits for a place again");
        }
        Note::LivenessChanged { node_id, observed, evidence_age_ms } => {
            let (liveness, reason) = (observed.liveness, observed.reason.as_deref());
            if liveness == Liveness::Online {
                tracing::info!(%node_id, %liveness, evidence_age_ms, "a node gets tasks");
            } else {
                tracing::warn!(%node_id, %liveness, reason, evidence_age_ms, "a node gets no tasks");
            }
        }
    }
}

fn ended(end: &TaskEnd) {
    let spec = &end.spec;
    tracing::info!(
        task_id = %spec.task_id,
        correlation_id = spec.trace.correlation_id,
        trace_id = spec.trace.trace_id(),
        caller = spec.caller.as_ref().map(|caller| caller.name.as_str()),
        model = %spec.model_ref,
        node_id = end.pool.as_ref().map(|pool| pool.node_id.as_str()),
        pool_id = end.pool.as_ref().map(|pool| pool.pool_id.as_str()),
        state = ?end.state,
        code = end.code.map(tracing::field::display),
        attempts = end.attempts,
        queue_wait_ms = end.queue_wait_ms,
        first_token_ms = end.first_token_ms,
        elapsed_ms = end.elapsed_ms,
        tokens = end.sent,
        "a task ended"
    );
}
