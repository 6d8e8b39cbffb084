//! A task of a client that waits for its answer here: when the client goes, the task ends. One that a key
//! names ends when the last of its clients has been away for a while.

use std::sync::Arc;
use std::time::Duration;

use daemon_kit::ApiError;
use pool_registry_types::{ErrorBody, ErrorCode, HolderId, TaskId};
use task_scheduler::TaskRecord;
use task_stream::PassedHead;
use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::reader::AnswerReader;
use super::request::Admitted;
use crate::api::defect;
use crate::app::state::AppState;
use crate::services::control::Control;
use crate::services::streams::{HeldKey, ReadFrames, ReadPosition, ReaderPlace, Streams};

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
    cancel(&control, task_id).await;
    streams.release(task_id);
}

/// One that has not come yet is ended by its admission.
pub(super) async fn cancel(control: &Control, task_id: TaskId) {
    while let Err(error) = control.cancel(task_id).await
        && error.code == ErrorCode::Overloaded
    {
        tokio::time::sleep(AGAIN_AFTER).await;
    }
}

/// A task on its way, and a reader of its answer: the only one, unless a key names the task.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) stream: AnswerReader,
    pub(super) control: Control,
    departure: Departure,
}

/// Submits the task, which has the key's name where there is one. Errors: those of its admission.
pub(super) async fn submit(
    state: &AppState,
    admitted: Admitted,
    key: Option<HeldKey>,
) -> Result<Running, ApiError> {
    let wants_stream = admitted.stream;
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
        // Of one that a key names the reader says when it is left.
        is_over: key.is_some(),
    };
    let runtime = Handle::current();
    let admission = owned_tasks::uninterrupted("admission of a task", async move {
        control.submit(spec, payload, held, thread).await?;
        if let Some(permit) = permit {
            streams.hold_permit(task_id, permit);
        }
        let stream = streams.get(task_id);
        if let Some(key) = key {
            let place = stream.map(|stream| stream.keep_for(key, task_id, wants_stream));
            return Ok(place.map(|place| AnswerReader::shared(place, task_id, control, &runtime)));
        }
        if left.is_cancelled() {
            end(control, streams, task_id).await;
        }
        Ok::<_, ErrorBody>(stream.map(AnswerReader::alone))
    });
    let admitted = admission.await.map_err(|_| defect())?;
    let stream = match admitted {
        Ok(stream) => stream.ok_or_else(defect)?,
        Err(error) => {
            departure.over();
            return Err(error.into());
        }
    };
    Ok(Running { stream, control: state.control.clone(), departure })
}

impl Running {
    /// One more reader of a task that a key names.
    pub(super) fn attached(state: &AppState, holder: HolderId, task_id: TaskId, place: ReaderPlace) -> Self {
        let (control, runtime) = (state.control.clone(), Handle::current());
        let departure = Departure {
            control: control.clone(),
            streams: Arc::clone(&state.streams),
            task_id,
            holder,
            runtime: runtime.clone(),
            left: CancellationToken::new(),
            is_over: true,
        };
        let stream = AnswerReader::shared(place, task_id, control.clone(), &runtime);
        Self { stream, control, departure }
    }

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
        // What a key names is kept for whoever comes with it.
        if self.stream.is_the_last() {
            self.departure.streams.release(self.departure.task_id);
        }
    }
}
