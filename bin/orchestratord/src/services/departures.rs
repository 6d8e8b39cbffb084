//! Clients that go away from the stream of a task which nobody is to work on once nobody reads it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pool_registry_types::{ErrorCode, HolderId, TaskId};
use tokio::runtime::Handle;

use crate::services::control::Control;
use crate::services::streams::Streams;

/// Before a control loop that could not take a cancel is asked again.
const AGAIN_AFTER: Duration = Duration::from_millis(100);

/// How far a submission and whoever waits for it have come. Each writes its own and then reads the other's,
/// so that one of the two sees that both are true.
#[derive(Debug, Default)]
struct Progress {
    is_admitted: AtomicBool,
    has_left: AtomicBool,
}

/// Ends its task when it is dropped, unless others read the stream or it has ended.
#[derive(Debug)]
pub(crate) struct Departure {
    task: LeftTask,
    /// Where the client's connection lives.
    runtime: Handle,
    progress: Arc<Progress>,
}

/// The other end of a submitter's [`Departure`]: for whoever admits its task.
#[derive(Debug)]
pub(crate) struct Admission {
    task: LeftTask,
    progress: Arc<Progress>,
}

#[derive(Debug, Clone)]
struct LeftTask {
    control: Control,
    streams: Arc<Streams>,
    holder: HolderId,
    id: TaskId,
}

impl Departure {
    /// Of a client whose task may not be admitted yet. A task of that id which is not its own stays.
    pub(crate) fn of_submitter(
        control: Control,
        streams: Arc<Streams>,
        holder: HolderId,
        id: TaskId,
    ) -> Self {
        let task = LeftTask { control, streams, holder, id };
        Self { task, runtime: Handle::current(), progress: Arc::default() }
    }

    /// Of a client that reads a task which there is.
    pub(crate) fn of_reader(control: Control, streams: Arc<Streams>, holder: HolderId, id: TaskId) -> Self {
        let departure = Self::of_submitter(control, streams, holder, id);
        departure.progress.is_admitted.store(true, Ordering::SeqCst);
        departure
    }

    pub(crate) fn admission(&self) -> Admission {
        Admission { task: self.task.clone(), progress: Arc::clone(&self.progress) }
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        self.progress.has_left.store(true, Ordering::SeqCst);
        if self.progress.is_admitted.load(Ordering::SeqCst) {
            let ending = self.task.clone().end();
            drop(owned_tasks::watched_on(&self.runtime, "cancel of a task that nobody reads", ending));
        }
    }
}

impl Admission {
    /// The task is admitted. Its submitter may have gone meanwhile.
    pub(crate) async fn done(self) {
        self.progress.is_admitted.store(true, Ordering::SeqCst);
        if self.progress.has_left.load(Ordering::SeqCst) {
            self.task.end().await;
        }
    }
}

impl LeftTask {
    async fn end(self) {
        let Some(key) = self.control.published.task(self.holder, self.id).map(|record| record.key) else {
            return;
        };
        let is_left = || self.streams.get(key).is_some_and(|stream| stream.is_left());
        while is_left()
            && let Err(error) = self.control.cancel(key).await
            && error.code == ErrorCode::Overloaded
        {
            tokio::time::sleep(AGAIN_AFTER).await;
        }
    }
}
