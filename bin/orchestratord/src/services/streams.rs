//! The tasks' logs: opened, written, kept after their end, and dropped. Beside each log stands the
//! task's payload, until its end.
//!
//! Each log has its own lock, held while references to its bytes are taken. Who reads them is not known
//! here.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use daemon_kit::byte_budget::HeldBytes;
use owned_tasks::StreamThread;
use parking_lot::Mutex;
use pool_registry_types::sse::{self, Decoder, write_frame};
use pool_registry_types::task::{Resume, ResumeMode};
use pool_registry_types::{AttemptId, ErrorBody, ErrorCode, LogId, TaskId, TraceContext};
use task_stream::{AppendError, Fence, Payload, Staged, TaskLog};
use tokio::sync::futures::Notified;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Readers of one stream at once.
const MOST_READERS: usize = 64;
/// Bytes that a reader is given at once.
const READ_BYTES: usize = 64 * 1024;

/// What the shell keeps of a submission, where the core keeps its facts.
#[derive(Debug)]
pub(crate) struct Submitted {
    pub(crate) payload: Payload,
    /// What counts for it.
    pub(crate) held: HeldBytes,
    pub(crate) trace: TraceContext,
    pub(crate) thread: StreamThread,
}

#[cfg(test)]
impl Submitted {
    /// Of a task whose relays are run by the test.
    pub(crate) fn with(payload: Payload) -> Self {
        let threads = owned_tasks::StreamThreads::start(1).expect("a thread for streams");
        let trace = TraceContext { traceparent: String::new(), correlation_id: "c-1".into() };
        Self { payload, held: HeldBytes::default(), trace, thread: threads.first().clone() }
    }
}

/// One task's log, and whoever waits for more of it.
#[derive(Debug)]
pub(crate) struct TaskStream {
    log: Mutex<TaskLog>,
    /// Dropped when the task has ended.
    payload: Mutex<Option<(Payload, HeldBytes)>>,
    /// That of the submission, for the log's lines of the task.
    pub(crate) trace: TraceContext,
    /// On which its relays run.
    pub(crate) thread: StreamThread,
    changed: Notify,
    /// Among the tasks of its token; free when the task has ended.
    permit: Mutex<Option<OwnedSemaphorePermit>>,
    readers: Arc<Semaphore>,
}

impl TaskStream {
    /// A place among the readers.
    ///
    /// # Errors
    /// `RATE_LIMITED` when so many read it that one more would be too many.
    pub(crate) fn reader(&self) -> Result<OwnedSemaphorePermit, ErrorBody> {
        Arc::clone(&self.readers).try_acquire_owned().map_err(|_| {
            ErrorBody::new(
                ErrorCode::RateLimited,
                format!("{MOST_READERS} read this stream, which is the most"),
            )
        })
    }

    /// Changes the log and wakes its readers.
    pub(crate) fn write<T>(&self, change: impl FnOnce(&mut TaskLog) -> T) -> T {
        let result = change(&mut self.log.lock());
        self.changed.notify_waiters();
        result
    }

    /// Takes over what a relay has read, and wakes the readers where there is something for them.
    pub(crate) fn take(&self, staged: &mut Staged) -> Result<(), AppendError> {
        let has_frames = staged.has_frames();
        let taken = staged.append_to(&mut self.log.lock());
        if has_frames {
            self.changed.notify_waiters();
        }
        taken
    }

    /// The attempt may write no more.
    pub(crate) fn fence(&self, attempt: AttemptId) -> Fence {
        self.log.lock().fence(attempt)
    }

    /// The stream begins anew, thoughts that were left out of it included.
    pub(crate) fn forget_unlogged(&self, attempt: AttemptId) {
        self.log.lock().forget_unlogged(attempt);
    }

    /// The frames from `next` on, the index to read after them, and whether that was the end; or
    /// the next change, when there are none yet.
    pub(crate) fn read(&self, next: u64) -> Result<(Bytes, u64, bool), Notified<'_>> {
        // Before the look: it hears of every change from its making on, so none is missed.
        let changed = self.changed.notified();
        let read = self.log.lock().read_from(next, READ_BYTES);
        if read.is_empty() && !read.finished {
            return Err(changed);
        }
        let (next, finished) = (read.next, read.finished);
        Ok((read.into_bytes(), next, finished))
    }

    /// What has been sent so far, for the attempt that goes on from it.
    pub(crate) fn sent(&self, mode: ResumeMode) -> Resume {
        #[derive(serde::Deserialize)]
        struct Text<'t> {
            #[serde(borrow)]
            t: Cow<'t, str>,
        }
        let (mut decoder, mut text, mut reasoning) = (Decoder::new(), String::new(), String::new());
        let (read, tokens, token_ids) = {
            let log = self.log.lock();
            let frames = log.next_index();
            let known = log.token_ids();
            // An engine that does not say how many tokens a frame has sends one in each, mostly.
            let tokens = known.count(frames).unwrap_or_else(|| frames.saturating_add(log.unlogged()));
            let token_ids = known.all(frames).map(<[u32]>::to_vec).unwrap_or_default();
            (log.read_from(0, usize::MAX), tokens, token_ids)
        };
        read.pieces().for_each(|piece| decoder.push(piece));
        // Every frame in the log was read before it was put there.
        while let Ok(Some(frame)) = decoder.next_frame() {
            let piece = frame.data.as_deref().and_then(|data| serde_json::from_str::<Text<'_>>(data).ok());
            match (frame.event, piece) {
                ("token", Some(piece)) => text.push_str(&piece.t),
                ("reasoning", Some(piece)) => reasoning.push_str(&piece.t),
                _ => {}
            }
        }
        Resume { mode, text, reasoning, token_ids, tokens }
    }

    /// What the task's engine is to work on; nothing when the task has ended.
    pub(crate) fn payload(&self) -> Option<Payload> {
        self.payload.lock().as_ref().map(|(payload, _)| payload.clone())
    }
}

#[derive(Debug)]
enum Entry {
    Stream(Arc<TaskStream>),
    /// Its stream is whole, and counts for the room that ended ones take.
    Ended(Arc<TaskStream>),
    /// The stream made room for newer ones.
    Evicted,
}

#[derive(Debug, Default)]
struct Table {
    tasks: HashMap<TaskId, Entry>,
    /// Ended streams, oldest first, each with its log and its size: a task may be forgotten and come
    /// again under its id.
    ended: VecDeque<(TaskId, LogId, usize)>,
    ended_bytes: usize,
}

impl Table {
    /// Whether the log is that of the task, and counts as ended.
    fn has_ended(&self, task: TaskId, log: LogId) -> bool {
        matches!(self.tasks.get(&task), Some(Entry::Ended(stream)) if stream.log.lock().id() == log)
    }
}

/// All logs.
#[derive(Debug)]
pub(crate) struct Streams {
    table: Mutex<Table>,
    ended_bytes_at_most: usize,
}

impl Streams {
    pub(crate) fn new(ended_bytes_at_most: usize) -> Self {
        Self { table: Mutex::default(), ended_bytes_at_most }
    }

    pub(crate) fn open(&self, task: TaskId, log: LogId, submitted: Submitted) {
        let stream = TaskStream {
            log: Mutex::new(TaskLog::new(log)),
            payload: Mutex::new(Some((submitted.payload, submitted.held))),
            trace: submitted.trace,
            thread: submitted.thread,
            changed: Notify::new(),
            permit: Mutex::default(),
            readers: Arc::new(Semaphore::new(MOST_READERS)),
        };
        self.table.lock().tasks.insert(task, Entry::Stream(Arc::new(stream)));
    }

    /// The task has the place until it ends; at once no more if it has ended already.
    pub(crate) fn hold_permit(&self, task: TaskId, permit: OwnedSemaphorePermit) {
        if let Some(Entry::Stream(stream)) = self.table.lock().tasks.get(&task) {
            stream.permit.lock().get_or_insert(permit);
        }
    }

    pub(crate) fn get(&self, task: TaskId) -> Option<Arc<TaskStream>> {
        match self.table.lock().tasks.get(&task)? {
            Entry::Stream(stream) | Entry::Ended(stream) => Some(Arc::clone(stream)),
            Entry::Evicted => None,
        }
    }

    /// Ends an attempt's right to write.
    pub(crate) fn fence(&self, task: TaskId, attempt: AttemptId) -> Fence {
        let none = Fence { tokens_written: 0, unlogged: 0, finished: false };
        self.get(task).map_or(none, |stream| stream.fence(attempt))
    }

    /// Appends the control plane's own terminal error.
    pub(crate) fn close(&self, task: TaskId, error: &ErrorBody) {
        let Some(stream) = self.get(task) else { return };
        let data = serde_json::to_string(error).unwrap_or_default();
        stream.write(|log| {
            let mut frame = Vec::with_capacity(data.len() + 64);
            write_frame(&mut frame, Some((&log.id(), log.next_index())), "error", &data);
            log.close(frame.into());
        });
        self.ended(task);
    }

    /// The task's stream is whole: it counts for the room that ended ones take.
    pub(crate) fn ended(&self, task: TaskId) {
        let mut table = self.table.lock();
        // A cancel that crosses an end says so twice.
        let Some(Entry::Stream(stream)) = table.tasks.get(&task) else { return };
        let stream = Arc::clone(stream);
        let over = (stream.permit.lock().take(), stream.payload.lock().take());
        let (log, size) = {
            let log = stream.log.lock();
            (log.id(), log.len_bytes())
        };
        table.tasks.insert(task, Entry::Ended(stream));
        table.ended.push_back((task, log, size));
        table.ended_bytes += size;
        let mut evicted = Vec::new();
        while table.ended_bytes > self.ended_bytes_at_most
            && let Some((oldest, log, size)) = table.ended.pop_front()
        {
            table.ended_bytes -= size;
            if table.has_ended(oldest, log)
                && let Some(entry) = table.tasks.get_mut(&oldest)
            {
                evicted.push(std::mem::replace(entry, Entry::Evicted));
            }
        }
        // What they hold is given back when nobody waits for the table.
        drop(table);
        drop((over, evicted));
    }

    /// The task's retention is over.
    pub(crate) fn forget(&self, task: TaskId) {
        let mut table = self.table.lock();
        let forgotten = table.tasks.remove(&task);
        // Tasks are forgotten in the order in which they ended.
        while let Some((oldest, log, size)) = table.ended.front().copied()
            && !table.has_ended(oldest, log)
        {
            table.ended_bytes -= size;
            table.ended.pop_front();
        }
        drop(table);
        drop(forgotten);
    }

    /// The task's stream, and the frame with which a reader begins: the first, or the one after
    /// `last_event_id`. Errors: `NOT_FOUND`, and `EVENTS_EXPIRED` where the stream or that place in
    /// it is not kept.
    pub(crate) fn find(
        &self,
        task: TaskId,
        last_event_id: Option<&str>,
    ) -> Result<(Arc<TaskStream>, u64), ErrorBody> {
        let expired = |message: &str| ErrorBody::new(ErrorCode::EventsExpired, message);
        let stream = match self.table.lock().tasks.get(&task) {
            None => return Err(ErrorBody::new(ErrorCode::NotFound, format!("no task {task}"))),
            Some(Entry::Evicted) => return Err(expired("the stream made room for newer ones")),
            Some(Entry::Stream(stream) | Entry::Ended(stream)) => Arc::clone(stream),
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
        Ok((stream, next))
    }
}

#[cfg(test)]
mod tests {
    use task_stream::{PayloadFormat, Segment};
    use uuid::Uuid;

    use super::*;

    fn payload(bytes: usize) -> Payload {
        Payload { format: PayloadFormat::Native, bytes: vec![b'x'; bytes].into() }
    }

    fn ended(streams: &Streams, n: u128, bytes: usize) -> TaskId {
        let (task, attempt) = (TaskId(Uuid::from_u128(n)), AttemptId(Uuid::from_u128(n)));
        streams.open(task, LogId(Uuid::from_u128(n)), Submitted::with(payload(0)));
        let stream = streams.get(task).unwrap();
        stream.write(|log| {
            log.open(attempt);
            log.finish(attempt, Segment::frame(0, vec![b'x'; bytes].into())).unwrap();
        });
        streams.ended(task);
        streams.ended(task);
        task
    }

    fn code(streams: &Streams, task: TaskId) -> Option<ErrorCode> {
        streams.find(task, None).err().map(|error| error.code)
    }

    // CLOUD-1534
    #[test]
    fn what_was_sent_is_read_from_the_log_with_its_ids_where_they_are_all_known() {
        let (task, attempt) = (TaskId(Uuid::from_u128(1)), AttemptId(Uuid::from_u128(1)));
        let streams = Streams::new(1_000);
        streams.open(task, LogId(Uuid::from_u128(1)), Submitted::with(payload(0)));
        let stream = streams.get(task).unwrap();
        stream.write(|log| log.open(attempt));
        for (n, text) in ["{\"t\":\"a \\\"b\\\"\",\"i\":0}", "{\"t\":\" c\",\"i\":1}"].iter().enumerate() {
            let mut frame = Vec::new();
            if n == 0 {
                write_frame(&mut frame, None, "started", "{\"t\":\"not a token\"}");
            }
            write_frame(&mut frame, Some((&LogId(Uuid::from_u128(1)), n as u64)), "token", text);
            stream.write(|log| log.append(attempt, Segment::frame(n as u64, frame.into()))).unwrap();
        }
        stream.write(|log| log.keep_ids(0, 2, &[7, 8]));
        let sent = stream.sent(ResumeMode::Append);
        assert_eq!((sent.text.as_str(), sent.token_ids.len(), sent.tokens), ("a \"b\" c", 0, 2));
        stream.write(|log| log.keep_ids(1, 3, &[9]));
        let sent = stream.sent(ResumeMode::Append);
        assert_eq!((sent.token_ids, sent.tokens), (vec![7, 8, 9], 3));
        // Half a character has a token and no frame, and its id never comes.
        let half = Segment::frame(2, "event: token\ndata: {\"t\":\"x\",\"i\":2}\n\n".into());
        stream.write(|log| log.append(attempt, half)).unwrap();
        stream.write(|log| log.keep_ids(2, 5, &[10]));
        let sent = stream.sent(ResumeMode::Append);
        assert_eq!((sent.token_ids.len(), sent.tokens), (0, 5));
    }

    // CLOUD-1609
    #[test]
    fn a_task_that_comes_again_under_its_id_is_not_evicted_for_the_one_before() {
        let streams = Streams::new(350);
        // The second has ended before the first in the core's books, and is forgotten first.
        let (first, second) = (ended(&streams, 1, 100), ended(&streams, 2, 100));
        streams.forget(second);
        streams.open(second, LogId(Uuid::from_u128(9)), Submitted::with(payload(0)));
        // Room is made twice: of the first, and of what was the second's.
        let third = ended(&streams, 3, 100);
        let fourth = ended(&streams, 4, 100);
        assert_eq!(code(&streams, first), Some(ErrorCode::EventsExpired));
        assert_eq!([second, third, fourth].map(|task| code(&streams, task)), [None; 3]);
        assert!(streams.get(second).unwrap().payload().is_some(), "it runs");
    }

    // CLOUD-1217
    #[test]
    fn a_payload_is_kept_until_its_task_ends_however_it_ends_and_no_longer() {
        let streams = Streams::new(1_000);
        let attempt = AttemptId(Uuid::from_u128(1));
        for closed in [false, true] {
            let task = TaskId(Uuid::from_u128(u128::from(closed)));
            let payload = payload(10);
            let bytes = payload.bytes.clone();
            streams.open(task, LogId(Uuid::from_u128(1)), Submitted::with(payload));
            let stream = streams.get(task).unwrap();
            stream.write(|log| log.open(attempt));
            assert_eq!(stream.payload().unwrap().bytes.as_ptr(), bytes.as_ptr());
            streams.fence(task, attempt);
            assert!(stream.payload().is_some(), "another attempt may need it");
            assert!(!bytes.is_unique());
            if closed {
                streams.close(task, &ErrorBody::new(ErrorCode::Canceled, "canceled"));
            } else {
                streams.ended(task);
            }
            assert_eq!(stream.payload(), None);
            assert!(bytes.is_unique(), "the bytes are free");
        }
    }

    // CLOUD-1609
    #[test]
    fn ended_streams_take_so_much_room_and_the_oldest_goes_first() {
        // Each takes 100 bytes and what its segment costs.
        let streams = Streams::new(400);
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

    // CLOUD-2725
    #[test]
    fn what_counts_for_a_payload_counts_until_its_task_has_ended() {
        let (streams, budget) = (Streams::new(1_000), daemon_kit::byte_budget::ByteBudget::new(100));
        let task = TaskId(Uuid::from_u128(1));
        let mut held = budget.begin(None);
        held.add(60).unwrap();
        streams.open(task, LogId(Uuid::from_u128(1)), Submitted { held, ..Submitted::with(payload(60)) });
        assert_eq!(budget.held(), 60);
        streams.close(task, &ErrorBody::new(ErrorCode::Canceled, "canceled"));
        assert_eq!((budget.held(), streams.get(task).is_some()), (0, true));
    }
}
