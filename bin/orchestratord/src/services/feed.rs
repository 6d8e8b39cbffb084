//! The end of an attempt's stream in this process: its relay, which the attempt's task shares with the
//! lane of its node.
//!
//! What a lane brings goes through the relay into the log in the lane's own turn, so that a token wakes
//! its readers and nobody else. The attempt's task is woken where the relay wants something done.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use attempt_link::control::{Action as LaneAction, Relayed};
use parking_lot::Mutex;
use pool_registry_types::Moment;
use task_stream::{Action, Relay};
use tokio::sync::Notify;

use crate::services::link::AttemptSink;
use crate::services::streams::TaskStream;

/// An attempt's relay and what was said of the attempt.
#[derive(Debug)]
pub(crate) struct Feed {
    state: Mutex<State>,
    stream: Arc<TaskStream>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    relay: Relay,
    relayed: Relayed,
    /// Something was taken that is not in the log yet.
    is_dirty: bool,
}

impl Feed {
    pub(crate) fn new(relay: Relay, stream: Arc<TaskStream>) -> Arc<Self> {
        let state = State { relay, relayed: Relayed::default(), is_dirty: false };
        Arc::new(Self { state: Mutex::new(state), stream, changed: Notify::new() })
    }

    /// Returns when a lane has brought something that the attempt's task is to look at.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Tells the relay something. What comes of it are actions.
    pub(crate) fn relay(&self, tell: impl FnOnce(&mut Relay)) {
        tell(&mut self.state.lock().relay);
    }

    /// What is to be done next, once all that was taken is in the log.
    pub(crate) fn next_action(&self, now: Moment) -> Option<Action> {
        let mut state = self.state.lock();
        state.flush(now, &self.stream);
        state.relay.next_action()
    }

    /// The same where nothing more is to be taken.
    pub(crate) fn last_action(&self) -> Option<Action> {
        self.state.lock().relay.next_action()
    }

    /// Whether no byte of its start has gone.
    pub(crate) fn never_sent(&self) -> bool {
        self.state.lock().relayed.never_sent()
    }

    /// Whether its node has said that the attempt is over, and keeps it.
    pub(crate) fn has_ended(&self) -> bool {
        self.state.lock().relayed.has_ended()
    }
}

impl AttemptSink for Feed {
    fn take(&self, now: Moment, action: LaneAction) -> bool {
        let mut state = self.state.lock();
        if state.relayed.is_over() {
            return false;
        }
        let was_dirty = std::mem::replace(&mut state.is_dirty, true);
        // Others go by the same lane.
        let State { relay, relayed, .. } = &mut *state;
        match catch_unwind(AssertUnwindSafe(|| relayed.hear(now, relay, action))) {
            Ok(None) => {}
            Ok(Some(wrong)) => tracing::error!(reason = wrong, "a defect in a lane"),
            Err(_) => {
                tracing::error!("a relay has panicked over what a link has brought");
                relay.failed("a defect in the relay".into());
            }
        }
        !was_dirty
    }

    fn flush(&self, now: Moment) {
        let mut state = self.state.lock();
        state.flush(now, &self.stream);
        let is_wanted = state.relay.has_actions() || state.relayed.never_sent();
        drop(state);
        if is_wanted {
            self.changed.notify_one();
        }
    }

    fn release(&self) {
        let mut state = self.state.lock();
        if !state.relayed.is_over() {
            state.relay.failed("its lane brings no more".into());
            drop(state);
            self.changed.notify_one();
        }
    }
}

impl State {
    fn flush(&mut self, now: Moment, stream: &TaskStream) {
        self.is_dirty = false;
        let relay = &mut self.relay;
        let written = catch_unwind(AssertUnwindSafe(|| relay.flush(now, |staged| stream.take(staged))));
        if written.is_err() {
            tracing::error!("a relay has panicked over its log");
            relay.failed("a defect in the relay".into());
        }
    }
}
