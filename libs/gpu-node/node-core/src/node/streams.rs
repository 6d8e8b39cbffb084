//! The streams of a node's attempts: who may read on, and what a report says of those that are kept.

use attempt_link::Rule;
use attempt_link::content::Acceptance;
use attempt_link::node::NotResumed;
use attempt_link::wire::ResumeOrder;
use pool_registry_types::pool::{PoolReport, PoolState, ReplicaReport};
use pool_registry_types::{AttemptId, Moment, PoolId};

use super::NodeCore;
use crate::attempts::{Held, ResumeError, Resumed};

impl NodeCore {
    /// Only for the simulator: see [`Rule`].
    pub fn switch_off(&mut self, rule: Option<Rule>) {
        self.switched_off = rule;
    }

    /// What is kept of the attempts' streams.
    pub fn held(&self) -> &Held {
        &self.held
    }

    pub fn held_mut(&mut self) -> &mut Held {
        &mut self.held
    }

    /// All attempts together take at most so many bytes.
    pub fn bound_held(&mut self, bytes: usize) {
        self.held.set_bound(bytes);
    }

    /// Of one attempt at most so many bytes are kept, and its reader is at most so far behind.
    pub fn bound_attempts(&mut self, bytes: usize) {
        self.held.set_attempt_bound(bytes);
    }

    /// A reader goes on with the attempt, from the record `from` on. What was never accepted never will
    /// be: whoever asks for it places its task elsewhere.
    pub fn resume(&mut self, now: Moment, attempt: &AttemptId, from: u64) -> Result<Resumed, ResumeError> {
        if !self.was_accepted(attempt) {
            if self.switched_off != Some(Rule::UnknownRemembered) {
                self.refused.remember(now, *attempt);
            }
            return Err(ResumeError::Unknown);
        }
        self.held.resume(attempt, from)
    }

    /// A link goes on with the attempt, which must be one of the log that it says.
    pub fn resume_by_link(&mut self, now: Moment, order: &ResumeOrder) -> Result<Acceptance, NotResumed> {
        let attempt = &order.attempt_id;
        if self.held.contains(attempt) && self.held.log(attempt) != Some(order.log_id) {
            return Err(NotResumed::Gone);
        }
        let resumed = self.resume(now, attempt, order.from).map_err(|error| match error {
            ResumeError::Unknown => NotResumed::Unknown,
            ResumeError::Gone => NotResumed::Gone,
        })?;
        self.held.link(attempt, order.log_id, resumed.cursor);
        self.held.seen(attempt, order.from);
        Ok(Acceptance { replica_id: resumed.replica_id, report_seq: resumed.report_seq })
    }

    /// Whether the attempt was accepted in this boot, as far as that is remembered: what runs or is held
    /// is whatever came since.
    pub(super) fn was_accepted(&self, attempt: &AttemptId) -> bool {
        self.running.contains_key(attempt) || self.held.contains(attempt) || self.accepted.contains(attempt)
    }

    /// Nobody wants the attempt any more, whether or not it has come: the shell ends what runs of it.
    pub fn stopped(&mut self, now: Moment, attempt: &AttemptId) {
        if !self.was_accepted(attempt) {
            self.refused.remember(now, *attempt);
        }
        self.held.remove(attempt);
    }

    /// Adds the attempts that have ended and are kept for a reader, and that there is room for no other.
    pub(super) fn report_held(&self, reports: &mut Vec<PoolReport>) {
        let runs = |attempt: &AttemptId| self.running.get(attempt).is_some_and(|running| !running.over);
        for (attempt, pool_id, replica_id) in self.held.iter().filter(|(attempt, ..)| !runs(attempt)) {
            let index = reports.iter().position(|report| report.pool_id == *pool_id).unwrap_or_else(|| {
                reports.push(removed(pool_id));
                reports.len() - 1
            });
            let report = &mut reports[index];
            match report.replicas.iter_mut().find(|replica| replica.replica_id == *replica_id) {
                Some(replica) => replica.held.push(*attempt),
                // It is gone, and what it has made is not.
                None => report.replicas.push(ReplicaReport {
                    held: vec![*attempt],
                    ..ReplicaReport::without_slots(replica_id.clone())
                }),
            }
        }
        if self.held.is_full() {
            for report in reports {
                report.warning.get_or_insert_with(|| held_is_full(&self.held));
            }
        }
    }
}

/// A pool whose engines are gone, and not what they have made.
fn removed(pool_id: &PoolId) -> PoolReport {
    PoolReport {
        pool_id: pool_id.clone(),
        state: PoolState::Draining,
        ready: false,
        draining: true,
        engine: None,
        engine_version: None,
        models: Vec::new(),
        device_mask: None,
        ctx_max: None,
        vram_free_bytes: None,
        replicas: Vec::new(),
        last_error: None,
        warning: None,
        drain: None,
        supervised: None,
    }
}

/// Why nothing new is taken.
pub(super) fn held_is_full(held: &Held) -> String {
    format!(
        "streams and requests that are kept take {} bytes of memory, the most is {}",
        held.bytes(),
        held.bound()
    )
}
