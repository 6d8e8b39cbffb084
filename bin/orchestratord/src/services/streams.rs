//! The tasks' logs: opened, written, kept after their end, and dropped. Beside each log stands the
//! task's payload, until its end.
//!
//! Each log has its own lock, held while references to its bytes are taken. Of who reads them only is
//! known when somebody did last.
//!
//! Every log counts in one of two sums: those of ended tasks in the room of their own setting, and all
//! others, which are *live*: those that may be written still, and those that left the table while somebody
//! read them. Where live ones take more than they may, those that left the table are let go, the one that
//! nobody has read for longest first, and no new task is taken. What runs goes on.

mod keyed;

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use bytes::Bytes;
use daemon_kit::Caller;
use daemon_kit::byte_budget::HeldBytes;
use openai_gateway::replay::StreamReplay;
use owned_tasks::StreamThread;
use parking_lot::Mutex;
use pool_registry_types::sse::{self, Decoder, write_frame};
use pool_registry_types::task::{Resume, ResumeMode};
use pool_registry_types::{AttemptId, ErrorBody, ErrorCode, HolderId, LogId, TaskId, TraceContext};
use task_stream::{AppendError, Fence, PassedHead, Payload, PayloadFormat, Read, Staged, TaskLog};
use tokio::sync::futures::Notified;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::Instant;

use crate::services::measured::{CountedTokens, ModelSeries};
use crate::services::reader_permits::{ReaderPermit, ReaderPermits};
use crate::services::usage::{AnswerMeter, TaskUsage};

use keyed::Shared;
pub(crate) use keyed::{Awaited, Claim, HeldKey, IdempotencyKey, Keys, ReaderPlace};

/// Bytes that a reader is given at once.
const READ_BYTES: usize = 64 * 1024;
/// Of these so many are a reader's own: frames that lie apart, joined, or a part of one that is longer than
/// a reader is given. A connection holds 16 pieces for a peer that takes none.
const OWN_BYTES: usize = 4 * 1024;
/// When a new task may come again that had no room, milliseconds.
const RETRY_AFTER_MS: u64 = 1_000;
/// What a client is told whose `Last-Event-ID` is none.
const EVENT_ID_FORM: &str = "Last-Event-ID is no id of an event: give the id of the last event that was seen as it came, <uuid>:<number>; without it the stream is read from its start";

/// Of an answer that is passed on so much waits for its reader, bytes: of a stream, and of a whole answer,
/// of which what was held back comes at once.
const UNREAD_STREAM_BYTES: usize = 8 * 1024 * 1024;
const UNREAD_WHOLE_BYTES: usize = 64 * 1024 * 1024;

/// What the shell keeps of a submission, where the core keeps its facts.
#[derive(Debug)]
pub(crate) struct Submitted {
    pub(crate) payload: Payload,
    pub(crate) owner: HolderId,
    /// What counts for it.
    pub(crate) held: HeldBytes,
    pub(crate) trace: TraceContext,
    pub(crate) thread: StreamThread,
    /// What is passed on may be generated again.
    pub(crate) is_repeatable: bool,
}

#[cfg(test)]
impl Submitted {
    /// Of a task whose relays are run by the test.
    pub(crate) fn with(payload: Payload) -> Self {
        let threads = owned_tasks::StreamThreads::start(1).expect("a thread for streams");
        let trace = TraceContext { correlation_id: "c-1".into(), ..Default::default() };
        Self {
            payload,
            held: HeldBytes::default(),
            owner: HolderId::OPEN,
            trace,
            thread: threads.first().clone(),
            is_repeatable: false,
        }
    }
}

/// One task's log, and whoever waits for more of it.
#[derive(Debug)]
pub(crate) struct TaskStream {
    kept: Mutex<CountedLog>,
    /// Of all live logs.
    live_bytes: Arc<AtomicUsize>,
    /// Dropped when the task has ended.
    payload: Mutex<Option<(Payload, HeldBytes)>>,
    /// That of the submission, for the log's lines of the task.
    pub(crate) trace: TraceContext,
    /// On which its relays run.
    pub(crate) thread: StreamThread,
    /// What was passed on may be generated again, which its reader may have to wait for.
    is_repeatable: bool,
    /// Why there is no whole answer; only where it is passed on.
    error: OnceLock<Box<ErrorBody>>,
    changed: Notify,
    /// Among the tasks of its token; free when the task has ended.
    permit: Mutex<Option<OwnedSemaphorePermit>>,
    owner: HolderId,
    readers: Arc<ReaderPermits>,
    /// Nobody is to work on the task once nobody reads it.
    is_canceled_unread: AtomicBool,
    /// Of an answer that is passed on as it comes; nothing of any other.
    meter: Option<Box<AnswerMeter>>,
    /// In which its tokens count, once it was sent to a node.
    measured: OnceLock<ModelSeries>,
    counted: Mutex<CountedTokens>,
}

/// A log, and what of it counts as live.
#[derive(Debug)]
struct CountedLog {
    log: TaskLog,
    is_live: bool,
    counted: usize,
    /// Nobody is given any more of it.
    is_released: bool,
    /// Its one reader has gone: nothing of it is kept.
    is_left: bool,
    read: Instant,
    /// Of an answer that is passed on to all who come with its key.
    shared: Option<Shared>,
}

impl CountedLog {
    /// The log was written to.
    fn changed(&mut self, live_bytes: &AtomicUsize) {
        if self.is_left {
            self.log.drop_before(u64::MAX);
        }
        self.count(live_bytes);
    }

    /// Brings the sum of live logs up to what this one takes now.
    fn count(&mut self, live_bytes: &AtomicUsize) {
        let is = if self.is_live { self.log.len_bytes() } else { 0 };
        let was = std::mem::replace(&mut self.counted, is);
        if is >= was {
            live_bytes.fetch_add(is - was, Ordering::Relaxed);
        } else {
            live_bytes.fetch_sub(was - is, Ordering::Relaxed);
        }
    }
}

impl Drop for TaskStream {
    fn drop(&mut self) {
        let kept = self.kept.get_mut();
        kept.is_live = false;
        kept.count(&self.live_bytes);
    }
}

/// What a reader finds in a log.
pub(crate) enum ReadOutcome<'s> {
    Frames(ReadFrames),
    /// Nothing yet, and the next change.
    Nothing(Notified<'s>),
    /// The stream was let go to make room.
    Released,
}

/// Frames, or a part of a long one.
#[derive(Debug)]
pub(crate) struct ReadFrames {
    pub(crate) bytes: Bytes,
    /// Where to read after them.
    pub(crate) place: ReadPosition,
    /// Nothing follows.
    pub(crate) is_last: bool,
}

/// Where a reader stands in a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReadPosition {
    /// The frame that it reads next.
    pub(crate) frame: u64,
    /// Bytes of it that it has.
    pub(crate) part: usize,
}

impl ReadPosition {
    pub(crate) const BEGIN: Self = Self { frame: 0, part: 0 };
}

impl TaskStream {
    /// A place among the readers, which whoever submitted the task always gets.
    ///
    /// # Errors
    /// `RATE_LIMITED` when so many read it that one more would be too many.
    pub(crate) fn reader(&self, caller: &Caller) -> Result<ReaderPermit, ErrorBody> {
        let is_owner = caller.holder_id() == self.owner;
        let permit = self.readers.take(is_owner)?;
        // For the one that may have had to make room.
        self.changed.notify_waiters();
        Ok(permit)
    }

    fn change<T>(&self, change: impl FnOnce(&mut TaskLog) -> T) -> T {
        let mut kept = self.kept.lock();
        let result = change(&mut kept.log);
        kept.changed(&self.live_bytes);
        result
    }

    /// Whether the log counts as live, from now on.
    fn set_live(&self, is_live: bool) {
        let mut kept = self.kept.lock();
        kept.is_live = is_live;
        kept.count(&self.live_bytes);
    }

    /// Drops the log, whoever reads it.
    fn release(&self) {
        if self.passes() {
            let message = "the answer was not read for long, and made room for others";
            let _ = self.error.set(Box::new(ErrorBody::new(ErrorCode::Overloaded, message)));
        }
        let mut kept = self.kept.lock();
        let id = kept.log.id();
        let dropped = std::mem::replace(&mut kept.log, TaskLog::new(id));
        kept.is_released = true;
        if let Some(shared) = &mut kept.shared {
            shared.free_key();
        }
        kept.count(&self.live_bytes);
        drop(kept);
        drop(dropped);
        self.changed.notify_waiters();
    }

    /// Changes the log and wakes its readers.
    pub(crate) fn write<T>(&self, change: impl FnOnce(&mut TaskLog) -> T) -> T {
        let result = self.change(change);
        self.changed.notify_waiters();
        result
    }

    /// Takes over what a relay has read, and wakes the readers where there is something for them.
    pub(crate) fn take(&self, staged: &mut Staged) -> Result<(), AppendError> {
        let has_frames = staged.has_frames();
        let (taken, appended, tokens) = {
            let mut kept = self.kept.lock();
            let kept = &mut *kept;
            kept.make_way(staged.len_bytes());
            let from = kept.log.next_index();
            let taken = staged.append_to(&mut kept.log);
            let appended = self.meter.as_ref().map(|meter| {
                let is_event_stream = kept.log.head().is_some_and(|head| head.head.is_event_stream());
                (meter, kept.log.read_from(from, usize::MAX), is_event_stream)
            });
            kept.changed(&self.live_bytes);
            // The last frame is none.
            let tokens = kept.log.next_index().saturating_sub(u64::from(kept.log.is_finished()));
            (taken, appended, tokens)
        };
        let tokens = match appended {
            Some((meter, appended, is_event_stream)) => meter.follow(&appended, is_event_stream),
            None => tokens,
        };
        if let Some(series) = self.measured.get() {
            series.count(&mut self.counted.lock(), tokens);
        }
        if has_frames {
            self.changed.notify_waiters();
        }
        taken
    }

    /// A node is given the task, whose tokens count in these series from now on.
    pub(crate) fn measure(&self, series: impl FnOnce() -> ModelSeries) {
        self.measured.get_or_init(series);
    }

    /// Its tokens count as its engine has counted them.
    fn count_all(&self) {
        if let Some(series) = self.measured.get() {
            let TaskUsage { tokens_in, tokens_out, .. } = self.usage();
            series.total(&mut self.counted.lock(), tokens_in, tokens_out);
        }
    }

    /// The attempt may write no more.
    pub(crate) fn fence(&self, attempt: AttemptId) -> Fence {
        self.kept.lock().log.fence(attempt)
    }

    /// The stream begins anew, thoughts that were left out of it included.
    pub(crate) fn forget_unlogged(&self, attempt: AttemptId) {
        self.kept.lock().log.forget_unlogged(attempt);
    }

    /// The frames from `at` on, if there are any.
    pub(crate) fn read(&self, at: ReadPosition) -> ReadOutcome<'_> {
        // Before the look: it hears of every change from its making on, so none is missed.
        let changed = self.changed.notified();
        let read = {
            let mut kept = self.kept.lock();
            if kept.is_released {
                return ReadOutcome::Released;
            }
            kept.read = Instant::now();
            // What is copied is not copied under the lock; what lies in one piece is not copied at all.
            let read = kept.log.read_from(at.frame, READ_BYTES);
            if read.is_in_pieces() { kept.log.read_from(at.frame, OWN_BYTES) } else { read }
        };
        if read.is_empty() && !read.finished {
            return ReadOutcome::Nothing(changed);
        }
        let (next, finished) = (ReadPosition { frame: read.next, part: 0 }, read.finished);
        let bytes = read.into_bytes();
        if bytes.len() <= READ_BYTES {
            return ReadOutcome::Frames(ReadFrames { bytes, place: next, is_last: finished });
        }
        ReadOutcome::Frames(part_of(&bytes, at, next, finished))
    }

    /// What is there of an answer that is passed on from `at` on, or the next change. What is before it is
    /// kept for nobody, so that all of this is the reader's own: it is copied, and as little as a reader may
    /// have.
    pub(crate) fn pass(&self, at: ReadPosition) -> Result<ReadFrames, Notified<'_>> {
        let changed = self.changed.notified();
        let read = {
            let mut kept = self.kept.lock();
            if kept.is_released {
                // Its error says why.
                return Ok(ReadFrames { bytes: Bytes::new(), place: at, is_last: true });
            }
            kept.read = Instant::now();
            kept.log.drop_before(at.frame);
            kept.count(&self.live_bytes);
            kept.log.read_from(at.frame, OWN_BYTES)
        };
        own_part(read, at).ok_or(changed)
    }

    /// How many bytes of an answer that is passed on wait for its reader, and whether these are all; or the
    /// next change.
    pub(crate) fn unread(&self) -> Result<(usize, bool), Notified<'_>> {
        let changed = self.changed.notified();
        let kept = self.kept.lock();
        let is_over = kept.log.is_finished() || kept.is_released;
        let bytes = kept.log.frame_bytes();
        if bytes == 0 && !is_over { Err(changed) } else { Ok((bytes, is_over)) }
    }

    /// All of an answer that is passed on and of which nothing was read, once it has ended; or the next
    /// change. It stays in the log.
    pub(crate) fn whole(&self) -> Result<Read, Notified<'_>> {
        let changed = self.changed.notified();
        let mut kept = self.kept.lock();
        kept.read = Instant::now();
        let is_over = kept.log.is_finished() || kept.is_released;
        if is_over { Ok(kept.log.read_from(0, usize::MAX)) } else { Err(changed) }
    }

    /// Whether the engine's answer is passed on as it comes.
    pub(crate) fn passes(&self) -> bool {
        self.meter.is_some()
    }

    /// Whether its reader may have to wait between events.
    pub(crate) fn is_repeatable(&self) -> bool {
        self.is_repeatable
    }

    /// Whether what was passed on is generated again at this time.
    pub(crate) fn is_catching_up(&self) -> bool {
        self.kept.lock().log.is_catching_up()
    }

    /// The head of the answer that is passed on, once any of it is here.
    pub(crate) fn head(&self) -> Option<PassedHead> {
        self.kept.lock().log.head().cloned()
    }

    /// Why the answer that was passed on has ended without being whole.
    pub(crate) fn error(&self) -> Option<&ErrorBody> {
        self.error.get().map(Box::as_ref)
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
            let kept = self.kept.lock();
            let log = &kept.log;
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

    /// What the task has cost by now.
    fn usage(&self) -> TaskUsage {
        self.meter.as_deref().map_or_else(|| TaskUsage::of_log(&self.kept.lock().log), AnswerMeter::usage)
    }

    /// From now on nobody is to work on the task once nobody reads it.
    pub(crate) fn cancel_unread(&self) {
        self.is_canceled_unread.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_canceled_unread(&self) -> bool {
        self.is_canceled_unread.load(Ordering::Relaxed)
    }

    /// Whether its task runs or waits, and nobody reads it.
    pub(crate) fn is_left(&self) -> bool {
        self.readers.is_empty() && !self.kept.lock().log.is_finished()
    }

    /// What the task's engine is to work on; nothing when the task has ended.
    pub(crate) fn payload(&self) -> Option<Payload> {
        self.payload.lock().as_ref().map(|(payload, _)| payload.clone())
    }
}

/// What was read for a reader of which all is its own; nothing where there is nothing yet.
fn own_part(read: Read, at: ReadPosition) -> Option<ReadFrames> {
    if read.is_empty() && !read.finished {
        return None;
    }
    let (next, is_last) = (ReadPosition { frame: read.next, part: 0 }, read.finished);
    if read.is_in_pieces() {
        return Some(ReadFrames { bytes: read.into_bytes(), place: next, is_last });
    }
    Some(part_of(&read.into_bytes(), at, next, is_last))
}

/// Of one frame, or of frames that are short, what stands behind `at`, copied, and at most what a reader may
/// have of its own: it does not hold all of a long one. `next` and `is_last` are of their end.
fn part_of(bytes: &Bytes, at: ReadPosition, next: ReadPosition, is_last: bool) -> ReadFrames {
    let rest = &bytes[at.part.min(bytes.len())..];
    if rest.len() <= OWN_BYTES {
        return ReadFrames { bytes: Bytes::copy_from_slice(rest), place: next, is_last };
    }
    let bytes = Bytes::copy_from_slice(&rest[..OWN_BYTES]);
    let place = ReadPosition { frame: at.frame, part: at.part + OWN_BYTES };
    ReadFrames { bytes, place, is_last: false }
}

#[derive(Debug)]
enum Entry {
    Stream(Arc<TaskStream>),
    /// Its stream is whole, and counts for the room that ended ones take.
    Ended(Arc<TaskStream>),
    /// The stream made room for newer ones.
    Evicted(Box<TaskUsage>),
}

impl Entry {
    fn usage(&self) -> TaskUsage {
        match self {
            Self::Stream(stream) | Self::Ended(stream) => stream.usage(),
            Self::Evicted(usage) => (**usage).clone(),
        }
    }

    /// What stays of it when its stream goes.
    fn evicted(&self) -> Self {
        Self::Evicted(Box::new(self.usage()))
    }
}

#[derive(Debug, Default)]
struct Table {
    tasks: HashMap<TaskId, Entry>,
    /// Ended streams, oldest first, each with its log and its size: a task may be forgotten and come
    /// again under its id.
    ended: VecDeque<(TaskId, LogId, usize)>,
    ended_bytes: usize,
    /// Streams that are no task's any more and were read when they left.
    left: Vec<Weak<TaskStream>>,
}

impl Table {
    /// Whether the log is that of the task, and counts as ended.
    fn has_ended(&self, task: TaskId, log: LogId) -> bool {
        matches!(self.tasks.get(&task), Some(Entry::Ended(stream)) if stream.kept.lock().log.id() == log)
    }

    /// The entry is no task's any more: its stream goes with its last reader.
    fn leaves(&mut self, entry: &Entry) {
        let (Entry::Stream(stream) | Entry::Ended(stream)) = entry else { return };
        stream.free_key();
        if Arc::strong_count(stream) > 1 {
            stream.set_live(true);
            self.left.retain(|stream| stream.strong_count() > 0);
            self.left.push(Arc::downgrade(stream));
        }
    }
}

/// All logs.
#[derive(Debug)]
pub(crate) struct Streams {
    table: Mutex<Table>,
    ended_bytes_at_most: usize,
    live_bytes: Arc<AtomicUsize>,
    /// What is on its way into live logs and not whole: counted by whoever receives it.
    coming_bytes: Arc<AtomicUsize>,
    live_bytes_at_most: usize,
}

impl Streams {
    pub(crate) fn new(ended_bytes_at_most: usize, live_bytes_at_most: usize) -> Self {
        Self {
            table: Mutex::default(),
            ended_bytes_at_most,
            live_bytes: Arc::default(),
            coming_bytes: Arc::default(),
            live_bytes_at_most,
        }
    }

    /// The same, with this beside what its logs take.
    pub(crate) fn counting(self, coming_bytes: &Arc<AtomicUsize>) -> Self {
        Self { coming_bytes: Arc::clone(coming_bytes), ..self }
    }

    /// Bytes of the logs that are live, and of what is on its way into them.
    pub(crate) fn live_bytes(&self) -> usize {
        self.live_bytes.load(Ordering::Relaxed) + self.coming_bytes.load(Ordering::Relaxed)
    }

    /// Whether there is room for the stream of one task more.
    ///
    /// # Errors
    /// `OVERLOADED`.
    pub(crate) fn check_room(&self) -> Result<(), ErrorBody> {
        let most = self.live_bytes_at_most;
        if self.live_bytes() < most {
            return Ok(());
        }
        self.make_room();
        if self.live_bytes() < most {
            return Ok(());
        }
        let message = format!("the streams of tasks that run take {most} bytes, which is the most");
        Err(ErrorBody::new(ErrorCode::Overloaded, message).retry_after_ms(RETRY_AFTER_MS))
    }

    /// Where live logs take more than they may: lets go of those that are no task's any more, the one first
    /// that was read longest ago.
    fn make_room(&self) {
        if self.live_bytes() < self.live_bytes_at_most {
            return;
        }
        let left = std::mem::take(&mut self.table.lock().left);
        let mut left: Vec<_> = left.iter().filter_map(Weak::upgrade).collect();
        left.sort_by_cached_key(|stream| stream.kept.lock().read);
        let mut left = VecDeque::from(left);
        while self.live_bytes() >= self.live_bytes_at_most
            && let Some(stream) = left.pop_front()
        {
            stream.release();
        }
        self.table.lock().left.extend(left.iter().map(Arc::downgrade));
    }

    pub(crate) fn open(&self, task: TaskId, log: LogId, submitted: Submitted) {
        let (meter, mut log) = match &submitted.payload.format {
            PayloadFormat::Native => (None, TaskLog::new(log)),
            PayloadFormat::OpenAi(passage) => {
                let most = if passage.stream { UNREAD_STREAM_BYTES } else { UNREAD_WHOLE_BYTES };
                (Some(Box::new(AnswerMeter::new(passage))), TaskLog::bounded(log, most))
            }
        };
        let is_repeatable = submitted.is_repeatable;
        if is_repeatable && let PayloadFormat::OpenAi(passage) = &submitted.payload.format {
            log.compare_with(Box::new(StreamReplay::new(passage.route)));
        }
        let stream = TaskStream {
            kept: Mutex::new(CountedLog {
                log,
                is_live: true,
                counted: 0,
                is_released: false,
                is_left: false,
                read: Instant::now(),
                shared: None,
            }),
            live_bytes: Arc::clone(&self.live_bytes),
            payload: Mutex::new(Some((submitted.payload, submitted.held))),
            trace: submitted.trace,
            thread: submitted.thread,
            is_repeatable,
            error: OnceLock::new(),
            changed: Notify::new(),
            permit: Mutex::default(),
            owner: submitted.owner,
            readers: Arc::default(),
            is_canceled_unread: AtomicBool::new(false),
            meter,
            measured: OnceLock::new(),
            counted: Mutex::default(),
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
            Entry::Evicted(_) => None,
        }
    }

    /// What a task has cost by now; nothing where it is not kept.
    pub(crate) fn usage(&self, task: TaskId) -> Option<TaskUsage> {
        self.table.lock().tasks.get(&task).map(Entry::usage)
    }

    /// Ends an attempt's right to write.
    pub(crate) fn fence(&self, task: TaskId, attempt: AttemptId) -> Fence {
        let none = Fence { tokens_written: 0, unlogged: 0, finished: false };
        self.get(task).map_or(none, |stream| stream.fence(attempt))
    }

    /// Appends the control plane's own terminal error.
    pub(crate) fn close(&self, task: TaskId, error: &ErrorBody) {
        let Some(stream) = self.get(task) else { return };
        if stream.passes() {
            // Whoever reads says it in the language of its client.
            let _ = stream.error.set(Box::new(error.clone()));
            stream.free_key();
            stream.write(|log| log.close(Bytes::new()));
            return self.ended(task);
        }
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
        if let Some(stream) = self.end(task) {
            stream.count_all();
            self.make_room();
        }
    }

    /// Returns the stream, where it had not ended before.
    fn end(&self, task: TaskId) -> Option<Arc<TaskStream>> {
        let mut table = self.table.lock();
        // A cancel that crosses an end says so twice.
        let Some(Entry::Stream(stream)) = table.tasks.get(&task) else { return None };
        let stream = Arc::clone(stream);
        let over = (stream.permit.lock().take(), stream.payload.lock().take());
        if stream.passes() && !stream.has_key() {
            // Its one reader has it, and nobody else will: it takes no room of others. It counts as live
            // until it was read, and may be let go of when memory is short.
            let is_left = {
                let mut kept = stream.kept.lock();
                kept.read = Instant::now();
                kept.is_left
            };
            let entry = Entry::Ended(Arc::clone(&stream));
            let entry = if is_left { entry.evicted() } else { entry };
            table.tasks.insert(task, entry);
            table.left.retain(|stream| stream.strong_count() > 0);
            table.left.push(Arc::downgrade(&stream));
            drop(table);
            drop(over);
            return Some(stream);
        }
        stream.set_live(false);
        let (log, size) = {
            let log = &stream.kept.lock().log;
            (log.id(), log.len_bytes())
        };
        table.tasks.insert(task, Entry::Ended(Arc::clone(&stream)));
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
                let left_over = entry.evicted();
                let entry = std::mem::replace(entry, left_over);
                table.leaves(&entry);
                evicted.push(entry);
            }
        }
        // What they hold is given back when nobody waits for the table.
        drop(table);
        drop((over, evicted));
        Some(stream)
    }

    /// Nobody will read the answer any more, which was passed on: what is there of it is let go of, and what
    /// is written still.
    pub(crate) fn release(&self, task: TaskId) {
        let stream = {
            let mut table = self.table.lock();
            let Some(entry) = table.tasks.get_mut(&task) else { return };
            let stream = match entry {
                // It goes when it ends.
                Entry::Stream(stream) => Arc::clone(stream),
                Entry::Ended(stream) => {
                    let stream = Arc::clone(stream);
                    *entry = entry.evicted();
                    stream
                }
                Entry::Evicted(_) => return,
            };
            stream.kept.lock().is_left = true;
            stream
        };
        // Freed when nobody waits for the table.
        stream.change(|_| ());
    }

    /// The task's retention is over.
    pub(crate) fn forget(&self, task: TaskId) {
        let mut table = self.table.lock();
        let forgotten = table.tasks.remove(&task);
        forgotten.iter().for_each(|entry| table.leaves(entry));
        // Tasks are forgotten in the order in which they ended.
        while let Some((oldest, log, size)) = table.ended.front().copied()
            && !table.has_ended(oldest, log)
        {
            table.ended_bytes -= size;
            table.ended.pop_front();
        }
        drop(table);
        drop(forgotten);
        self.make_room();
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
            Some(Entry::Evicted(_)) => return Err(expired("the stream made room for newer ones")),
            Some(Entry::Stream(stream) | Entry::Ended(stream)) if stream.passes() => {
                return Err(expired("the answer of this task is given to whoever asked for it only"));
            }
            Some(Entry::Stream(stream) | Entry::Ended(stream)) => Arc::clone(stream),
        };
        let next = match last_event_id {
            None => 0,
            Some(id) => {
                let log = &stream.kept.lock().log;
                match sse::parse_event_id(id) {
                    Some((of, n)) if of == log.id() && n < log.next_index() => n + 1,
                    Some((of, _)) if of == log.id() => {
                        return Err(expired("Last-Event-ID: the stream has no such event yet"));
                    }
                    Some(_) => {
                        return Err(expired(
                            "Last-Event-ID is of another stream; without it this one is read from its start",
                        ));
                    }
                    None => return Err(expired(EVENT_ID_FORM)),
                }
            }
        };
        Ok((stream, next))
    }
}

#[cfg(test)]
#[path = "streams_tests.rs"]
mod tests;
