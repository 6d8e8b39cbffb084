//! The slot of an attempt, and the attempt's entry in the node's books: given back whatever happens.

use std::sync::Arc;

use handoff_watcher::HandoffName;
use node_core::{Ending, Piece, Readiness, TooLong};
use pool_registry_types::pool::EngineKind;
use pool_registry_types::{AttemptId, ErrorBody};

use crate::agent::{Agent, Signals};
use crate::attempt_log::AttemptLog;
use crate::engines::{Endpoint, Refusal, Whose};

/// The slot of an attempt. Dropped without an end, it is given back once the engine is done with it.
pub(crate) struct Slot {
    pub(crate) agent: Arc<Agent>,
    pub(crate) attempt: AttemptId,
    pub(crate) log: AttemptLog,
    pub(crate) name: HandoffName,
    pub(crate) engine: EngineKind,
    pub(crate) at: Endpoint,
    pub(crate) signals: Arc<Signals>,
    open: bool,
    /// Why it ends without a final frame, where its link says so.
    pub(crate) error: Option<ErrorBody>,
    /// The number of the last report before its end.
    report_seq: u64,
    /// Its last bytes are in the buffer.
    finished: bool,
    /// The connection to the engine is lost: it has nothing more to do with the attempt.
    pub(crate) lost: bool,
}

impl Slot {
    pub(crate) fn new(
        agent: Arc<Agent>,
        attempt: AttemptId,
        signals: Arc<Signals>,
        log: AttemptLog,
        name: HandoffName,
        engine: EngineKind,
        at: Endpoint,
    ) -> Self {
        Self {
            agent,
            attempt,
            log,
            name,
            engine,
            at,
            signals,
            open: true,
            error: None,
            report_seq: 0,
            finished: false,
            lost: false,
        }
    }

    /// Appends what was made to the attempt's buffer.
    pub(crate) fn append(&mut self, piece: Piece) -> Result<(), TooLong> {
        let appended = self.agent.change_held(|core, now| core.held_mut().append(now, &self.attempt, piece));
        self.log.brought();
        self.there_is_more();
        appended
    }

    /// The attempt has ended, with these bytes or, where the driver is dropped, without any.
    pub(crate) fn finish(&mut self, last: Option<Piece>) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        let last = last.filter(|piece| !piece.is_empty());
        let ending = Ending { error: self.error.take(), report_seq: self.report_seq };
        self.agent.change_held(|core, now| core.held_mut().finish(now, &self.attempt, last, ending));
        self.agent.drivers.lock().remove(&self.attempt);
        self.there_is_more();
    }

    /// Whoever reads is told. One that polls the driver is awake.
    fn there_is_more(&self) {
        if !self.signals.read_here {
            self.agent.appended_to_link(self.attempt);
        } else if !self.signals.is_polled_by_reader() {
            self.signals.appended.notify_waiters();
        }
    }

    /// Whether all was said of its end, and the buffer does not know.
    pub(crate) fn is_ending(&self) -> bool {
        !self.open && !self.finished
    }

    /// Whether it was stopped: nobody wants to know how it ends.
    pub(crate) fn is_stopped(&self) -> bool {
        !self.agent.core.lock().held().contains(&self.attempt)
    }

    /// Waits until the reader is not too far behind, or the attempt is to end.
    pub(crate) async fn room(&self) {
        while !self.agent.core.lock().held().has_room(&self.attempt) {
            tokio::select! {
                () = self.signals.cancel.cancelled() => return,
                () = self.signals.taken.notified() => {}
            }
        }
    }

    /// Ends the attempt at its engine. Returns the final report number.
    pub(crate) fn end(&mut self, engine_idle: bool) -> u64 {
        self.open = false;
        if engine_idle {
            self.report_seq = self.agent.core.lock().ended(&self.attempt);
            self.agent.notify_work_ended();
        } else {
            self.report_seq = self.agent.with_core(|core, now| core.ended_before_release(now, &self.attempt));
            self.agent.watch_slots(self.name.clone(), self.at.key.clone());
        }
        self.report_seq
    }

    /// The engine cannot be reached: said before the attempt's end, so that nothing is sent there.
    pub(crate) fn engine_gone(&self, readiness: Readiness) {
        self.agent.observed(&self.name.pool_id, &self.name.replica_id, readiness);
        self.agent.look_now(&self.name);
    }

    /// The attempt has failed at its engine. Returns what is said of that, and the final report number.
    pub(crate) fn fail(&mut self, mut error: ErrorBody, engine_idle: bool) -> (ErrorBody, u64) {
        error.cut();
        error.engine = Some(self.engine);
        let identity = self.agent.identity();
        error = error.at(&identity.node_id, &self.name.pool_id);
        let seq = self.end(engine_idle);
        self.agent.counters.lock().failed += 1;
        self.log.failed(&error);
        (error, seq)
    }

    /// The attempt is not begun, for this reason: the slot is free again.
    pub(crate) fn refuse(&mut self, error: ErrorBody) -> ErrorBody {
        self.cleared();
        self.end(true);
        self.agent.stop_attempt(&self.attempt);
        self.finish(None);
        self.log.refused(&error);
        error
    }

    /// The engine does not do what was asked of it. `path`: what it answered with this status; what
    /// it says inside of an answer is not about that. Returns the attempt's error.
    pub(crate) fn refused(&self, refusal: Refusal, path: Option<&str>) -> ErrorBody {
        let Refusal { whose, mut error } = refusal;
        if let Some(key) = &self.at.key {
            error.message = key.hidden_in(&error.message);
        }
        let attempt = self.attempt;
        match whose {
            Whose::Operator => {
                self.agent.change(|core, now| core.refused_operator(now, &attempt, &error.message));
            }
            Whose::Missing => {
                if let Some(path) = path {
                    self.agent.with_core(|core, now| core.lacks(now, &attempt, path));
                }
            }
            Whose::Client | Whose::Engine | Whose::Busy | Whose::Nobody => {}
        }
        self.cleared();
        error
    }

    /// The engine lives, whatever looks at it say.
    pub(crate) fn heard(&self) {
        if self.agent.with_core(|core, now| core.heard(now, &self.attempt)) {
            self.agent.report_now();
        }
    }

    /// The engine is done with the attempt, or never had it.
    pub(crate) fn cleared(&self) {
        self.agent.with_core(|core, _| core.cleared(&self.attempt));
    }

    /// Its connection was lost: whether it lives is looked at now.
    pub(crate) fn engine_suspected(&self) {
        self.agent.look_now(&self.name);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.open {
            self.agent.counters.lock().canceled += 1;
            self.log.abandoned();
            self.end(self.lost);
        }
        self.finish(None);
    }
}
