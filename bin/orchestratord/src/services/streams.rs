//! The tasks' logs and their readers.
//!
//! Each log has its own lock, held while bytes are copied. A reader keeps an index and nothing
//! else: a slow one slows nobody, and one that goes is not missed.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, stream};
use parking_lot::Mutex;
use pool_registry_types::sse::{self, write_frame};
use pool_registry_types::{AttemptId, ErrorBody, ErrorCode, LogId, TaskId};
use task_scheduler::{Fence, TaskLog};
use tokio::sync::Notify;

/// Pause between two comments on a quiet stream.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(10);

/// One task's log, and whoever waits for more of it.
#[derive(Debug)]
pub(crate) struct TaskStream {
    log: Mutex<TaskLog>,
    changed: Notify,
}

impl TaskStream {
    /// Changes the log and wakes its readers.
    pub(crate) fn write<T>(&self, change: impl FnOnce(&mut TaskLog) -> T) -> T {
        let result = change(&mut self.log.lock());
        self.changed.notify_waiters();
        result
    }
}

#[derive(Debug)]
enum Kept {
    Stream(Arc<TaskStream>),
    /// Its stream is whole, and counts for the room that ended ones take.
    Ended(Arc<TaskStream>),
    /// The stream made room for newer ones.
    Evicted,
}

#[derive(Debug, Default)]
struct Shelf {
    tasks: HashMap<TaskId, Kept>,
    /// Ended streams, oldest first, with their sizes.
    ended: VecDeque<(TaskId, usize)>,
    ended_bytes: usize,
}

/// All logs.
#[derive(Debug)]
pub(crate) struct Streams {
    shelf: Mutex<Shelf>,
    ended_bytes_at_most: usize,
}

impl Streams {
    pub(crate) fn new(ended_bytes_at_most: usize) -> Self {
        Self { shelf: Mutex::default(), ended_bytes_at_most }
    }

    pub(crate) fn open(&self, task: TaskId, log: LogId) {
        let stream = TaskStream { log: Mutex::new(TaskLog::new(log)), changed: Notify::new() };
        self.shelf.lock().tasks.insert(task, Kept::Stream(Arc::new(stream)));
    }

    pub(crate) fn get(&self, task: TaskId) -> Option<Arc<TaskStream>> {
        match self.shelf.lock().tasks.get(&task)? {
            Kept::Stream(stream) | Kept::Ended(stream) => Some(Arc::clone(stream)),
            Kept::Evicted => None,
        }
    }

    /// Ends an attempt's right to write.
    pub(crate) fn fence(&self, task: TaskId, attempt: AttemptId) -> Fence {
        self.get(task)
            .map_or(Fence { tokens_written: 0, finished: false }, |stream| stream.log.lock().fence(attempt))
    }

    /// Appends the control plane's own terminal error.
    pub(crate) fn close(&self, task: TaskId, error: &ErrorBody) {
        let Some(stream) = self.get(task) else { return };
        let data = serde_json::to_string(error).unwrap_or_default();
        stream.write(|log| {
            let mut frame = Vec::with_capacity(data.len() + 64);
            write_frame(&mut frame, Some((&log.id(), log.next_index())), "error", &data);
            log.close(&frame);
        });
        self.ended(task);
    }

    /// The task's stream is whole: it counts for the room that ended ones take.
    pub(crate) fn ended(&self, task: TaskId) {
        let mut shelf = self.shelf.lock();
        // A cancel that crosses an end says so twice.
        let Some(Kept::Stream(stream)) = shelf.tasks.get(&task) else { return };
        let stream = Arc::clone(stream);
        let size = stream.log.lock().len_bytes();
        shelf.tasks.insert(task, Kept::Ended(stream));
        shelf.ended.push_back((task, size));
        shelf.ended_bytes += size;
        while shelf.ended_bytes > self.ended_bytes_at_most
            && let Some((oldest, size)) = shelf.ended.pop_front()
        {
            shelf.ended_bytes -= size;
            if let Some(kept) = shelf.tasks.get_mut(&oldest) {
                *kept = Kept::Evicted;
            }
        }
    }

    /// The task's retention is over.
    pub(crate) fn forget(&self, task: TaskId) {
        let mut shelf = self.shelf.lock();
        shelf.tasks.remove(&task);
        // Tasks are forgotten in the order in which they ended.
        while let Some((oldest, size)) = shelf.ended.front().copied()
            && !shelf.tasks.contains_key(&oldest)
        {
            shelf.ended_bytes -= size;
            shelf.ended.pop_front();
        }
    }

    /// The task's events from the start, or after `last_event_id`. Errors: `NOT_FOUND`, and
    /// `EVENTS_EXPIRED` where the stream or that place in it is not kept.
    pub(crate) fn read(
        &self,
        task: TaskId,
        last_event_id: Option<&str>,
    ) -> Result<impl Stream<Item = Result<Bytes, Infallible>> + Send + use<>, ErrorBody> {
        let expired = |message: &str| ErrorBody::new(ErrorCode::EventsExpired, message);
        let stream = match self.shelf.lock().tasks.get(&task) {
            None => return Err(ErrorBody::new(ErrorCode::NotFound, format!("no task {task}"))),
            Some(Kept::Evicted) => return Err(expired("the stream made room for newer ones")),
            Some(Kept::Stream(stream) | Kept::Ended(stream)) => Arc::clone(stream),
        };
        let next = match last_event_id {
            None => 0,
            Some(id) => {
                let log = stream.log.lock();
                match sse::parse_event_id(id) {
                    Some((of, n)) if of == log.id() && n < log.next_index() => n + 1,
                    _ => return Err(expired("Last-Event-ID is not of this stream")),
                }
            }
        };
        Ok(follow(stream, next))
    }
}

fn follow(stream: Arc<TaskStream>, next: u64) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    stream::unfold((stream, next, false), |(stream, next, done)| async move {
        if done {
            return None;
        }
        let (bytes, next, finished) = more(&stream, next).await;
        (!bytes.is_empty()).then_some((Ok(bytes), (stream, next, finished)))
    })
}

/// What stands in the log from `next` on, waiting for it if need be; a comment when nothing
/// comes for a while, and no bytes when nothing will.
async fn more(stream: &TaskStream, next: u64) -> (Bytes, u64, bool) {
    loop {
        let changed = stream.changed.notified();
        tokio::pin!(changed);
        // Before the look, or a change between the look and the wait would be missed.
        changed.as_mut().enable();
        {
            let log = stream.log.lock();
            let read = log.read_from(next);
            if !read.bytes.is_empty() || read.finished {
                return (Bytes::copy_from_slice(read.bytes), read.next, read.finished);
            }
        }
        if tokio::time::timeout(KEEP_ALIVE_EVERY, changed).await.is_err() {
            return (Bytes::from_static(b": ka\n\n"), next, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn ended(streams: &Streams, n: u128, bytes: usize) -> TaskId {
        let (task, attempt) = (TaskId(Uuid::from_u128(n)), AttemptId(Uuid::from_u128(n)));
        streams.open(task, LogId(Uuid::from_u128(n)));
        let stream = streams.get(task).unwrap();
        stream.write(|log| {
            log.open(attempt);
            log.finish(attempt, 0, &vec![b'x'; bytes]).unwrap();
        });
        streams.ended(task);
        streams.ended(task);
        task
    }

    fn code(streams: &Streams, task: TaskId) -> Option<ErrorCode> {
        streams.read(task, None).err().map(|error| error.code)
    }

    // CLOUD-1609
    #[test]
    fn ended_streams_take_so_much_room_and_the_oldest_goes_first() {
        let streams = Streams::new(250);
        let tasks: Vec<TaskId> = (1..=3).map(|n| ended(&streams, n, 100)).collect();
        assert_eq!(code(&streams, tasks[0]), Some(ErrorCode::EventsExpired));
        assert_eq!(code(&streams, tasks[1]), None);
        streams.forget(tasks[0]);
        streams.forget(tasks[1]);
        assert_eq!(code(&streams, tasks[1]), Some(ErrorCode::NotFound));
        let fourth = ended(&streams, 4, 100);
        assert_eq!(
            (code(&streams, tasks[2]), code(&streams, fourth)),
            (None, None),
            "forgotten ones left room"
        );
    }
}
