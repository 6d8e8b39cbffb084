//! A task of a client that waits for its answer here: when the client goes, the task ends.

use std::sync::Arc;
use std::time::Duration;

use daemon_kit::ApiError;
use pool_registry_types::{ErrorBody, ErrorCode, HolderId, TaskId};
use task_scheduler::TaskRecord;
use task_stream::PassedHead;
use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::request::Admitted;
use crate::api::defect;
use crate::app::state::AppState;
use crate::services::control::Control;
use crate::services::streams::{ReadFrames, ReadPosition, Streams, TaskStream};

/// Before a control loop that could not take a cancel is asked again.
const AGAIN_AFTER: Duration = Duration::from_millis(100);

/// Ends its task when it is dropped before the task's end.
#[derive(Debug)]
struct Departure {
    control: Control,
    streams: Arc<Streams>,
    task_id: TaskId,
    holder: HolderId,
    /// Where the client's connection lives.
    runtime: Handle,
    left: CancellationToken,
    is_over: bool,
}

impl Departure {
    fn over(&mut self) {
        self.is_over = true;
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        self.left.cancel();
        let (control, streams, task_id) = (self.control.clone(), Arc::clone(&self.streams), self.task_id);
        let canceling = end(control, streams, task_id);
        drop(owned_tasks::watched_on(&self.runtime, "cancel of a task whose client has gone", canceling));
    }
}

async fn end(control: Control, streams: Arc<Streams>, task_id: TaskId) {
    // One that has not come yet is ended by its admission.
    while let Err(error) = control.cancel(task_id).await
        && error.code == ErrorCode::Overloaded
    {
        tokio::time::sleep(AGAIN_AFTER).await;
    }
    streams.release(task_id);
}

/// A task on its way, and the one reader of its answer.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) stream: Arc<TaskStream>,
    pub(super) control: Control,
    departure: Departure,
}

/// Submits the task. Errors: those of its admission.
pub(super) async fn submit(state: &AppState, admitted: Admitted) -> Result<Running, ApiError> {
    let Admitted { spec, payload, held, caller, .. } = admitted;
    let (task_id, holder) = (spec.task_id, spec.holder);
    state.streams.check_room()?;
    let permit: Option<OwnedSemaphorePermit> = state.quota.task(&caller)?;
    let thread = state.relays.threads.here();
    let (control, streams) = (state.control.clone(), Arc::clone(&state.streams));
    let left = CancellationToken::new();
    let mut departure = Departure {
        control: control.clone(),
        streams: Arc::clone(&streams),
        task_id,
        holder,
        runtime: Handle::current(),
        left: left.clone(),
        is_over: false,
    };
    let admission = owned_tasks::uninterrupted("admission of a task", async move {
        control.submit(spec, payload, held, thread).await?;
        if let Some(permit) = permit {
            streams.hold_permit(task_id, permit);
        }
        if left.is_cancelled() {
            end(control, streams, task_id).await;
        }
        Ok::<_, ErrorBody>(())
    });
    let admitted = admission.await.map_err(|_| defect())?;
    if let Err(error) = admitted {
        departure.over();
        return Err(error.into());
    }
    let stream = state.streams.get(task_id).ok_or_else(defect)?;
    Ok(Running { stream, control: state.control.clone(), departure })
}

impl Running {
    pub(super) fn task_id(&self) -> TaskId {
        self.departure.task_id
    }

    /// As readers are shown it.
    pub(super) fn record(&self) -> Option<Arc<TaskRecord>> {
        self.control.published.task(self.departure.holder, self.departure.task_id)
    }

    pub(super) fn head(&self) -> Option<PassedHead> {
        self.stream.head()
    }

    /// What of the answer is to be read next, once it is here.
    pub(super) async fn next_piece(&self, at: ReadPosition) -> ReadFrames {
        loop {
            match self.stream.pass(at) {
                Ok(piece) => return piece,
                Err(changed) => changed.await,
            }
        }
    }

    /// The bytes of the answer once any are here, of which none was read, and whether these are all.
    pub(super) async fn unread(&self) -> (usize, bool) {
        loop {
            match self.stream.unread() {
                Ok(unread) => return unread,
                Err(changed) => changed.await,
            }
        }
    }

    /// The engine's own end was passed on: a client that goes from now on cuts nothing short.
    pub(super) fn passed_end(&mut self) {
        self.departure.over();
    }

    /// The task has ended, and its answer was read.
    pub(super) fn finish(&mut self) {
        self.departure.over();
        self.departure.streams.release(self.departure.task_id);
    }
}
