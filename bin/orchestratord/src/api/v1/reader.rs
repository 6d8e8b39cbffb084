//! A reader of an answer that is passed on: the one of its task, or one of several of a task that a key
//! names.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use pool_registry_types::{ErrorBody, ErrorCode, TaskId};
use task_stream::{PassedHead, Read};
use tokio::runtime::Handle;
use tokio::sync::futures::Notified;

use super::running::cancel;
use crate::services::control::Control;
use crate::services::streams::{Awaited, ReadFrames, ReadPosition, ReaderPlace, TaskStream};

/// How long the last reader of a task that a key names may be away. Source: .specs/01 CLOUD-2915.
const AWAY: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct AnswerReader {
    stream: Arc<TaskStream>,
    shared: Option<SharedReader>,
}

/// Says when it is left.
#[derive(Debug)]
struct SharedReader {
    place: ReaderPlace,
    task_id: TaskId,
    control: Control,
    /// Where the client's connection lives.
    runtime: Handle,
    made_room: OnceLock<ErrorBody>,
}

impl Drop for SharedReader {
    fn drop(&mut self) {
        let Some(awaited) = self.place.leave() else { return };
        let waiting = wait_for_readers(awaited, self.control.clone(), self.task_id);
        drop(owned_tasks::watched_on(&self.runtime, "wait for clients of a key that are away", waiting));
    }
}

/// Ends the task when nobody has come for so long.
async fn wait_for_readers(awaited: Awaited, control: Control, task_id: TaskId) {
    if awaited.may_come {
        tokio::time::sleep(AWAY).await;
    }
    if awaited.is_alone() {
        cancel(&control, task_id).await;
    }
}

impl AnswerReader {
    pub(super) fn alone(stream: Arc<TaskStream>) -> Self {
        Self { stream, shared: None }
    }

    pub(super) fn shared(place: ReaderPlace, task_id: TaskId, control: Control, runtime: &Handle) -> Self {
        let stream = Arc::clone(place.stream());
        let runtime = runtime.clone();
        Self {
            stream,
            shared: Some(SharedReader { place, task_id, control, runtime, made_room: OnceLock::new() }),
        }
    }

    /// What is there from `at` on, or the next change. What is before it is not kept for this reader.
    pub(super) fn pass(&self, at: ReadPosition) -> Result<ReadFrames, Notified<'_>> {
        let Some(shared) = &self.shared else { return self.stream.pass(at) };
        let passed = shared.place.pass(at);
        if passed.as_ref().is_ok_and(|piece| piece.is_last) && shared.place.has_made_room() {
            let message = "the answer was read so slowly that it made room for its other readers";
            let _ = shared.made_room.set(ErrorBody::new(ErrorCode::Overloaded, message));
        }
        passed
    }

    /// How many bytes wait for a reader that has read none, and whether these are all; or the next change.
    pub(super) fn unread(&self) -> Result<(usize, bool), Notified<'_>> {
        self.stream.unread()
    }

    /// All of an answer of which this reader has read nothing, once it has ended; or the next change.
    pub(super) fn whole(&self) -> Result<Read, Notified<'_>> {
        self.stream.whole()
    }

    /// Whether there may be a wait between events.
    pub(super) fn is_repeatable(&self) -> bool {
        self.stream.is_repeatable()
    }

    /// Whether what was passed on is generated again at this time.
    pub(super) fn is_catching_up(&self) -> bool {
        self.stream.is_catching_up()
    }

    /// Why the answer has ended without being whole.
    pub(super) fn error(&self) -> Option<&ErrorBody> {
        let made_room = self.shared.as_ref().and_then(|shared| shared.made_room.get());
        made_room.or_else(|| self.stream.error())
    }

    /// The head of the answer, once any of it is here.
    pub(super) fn head(&self) -> Option<PassedHead> {
        self.stream.head()
    }

    /// Whether nobody else reads the answer, or may come to.
    pub(super) fn is_the_last(&self) -> bool {
        self.shared.as_ref().is_none_or(|shared| shared.place.is_the_last())
    }
}
