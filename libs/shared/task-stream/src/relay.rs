//! The relay of one attempt: from the node's stream into the task's log.
//!
//! A [`Relay`] is told what comes of the node and when, and says what is to be done, as [`Action`]s;
//! the shell around it owns the connection, the log's lock and the timer. It looks at frames and does
//! not rewrite them: it adds the event `started` before the first one and leaves out what is meant for
//! the control plane only; one that a client could read otherwise ends the attempt. Bytes are given with [`Relay::chunk`] as they arrive, and what has arrived
//! together goes into the log together, with [`Relay::flush`].
//!
//! A stream of its own brings everything in its bytes. Where the attempt goes by its node's link
//! ([`Relay::linked`]), the bytes are frames, and what is no frame is said with calls: that the start was
//! sent, the ids of tokens, an error, the end, silence.
//!
//! An attempt ends in one place, [`Relay::end`]: by its node's own end, error or refusal, or with an
//! [`Action::Stop`] before it. To let go of a stream stops nothing by itself.

mod passing;

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use pool_registry_types::sse::{
    ENGINE_WORKS, Frame, TOKEN_IDS, UNLOGGED_THOUGHT, parse_event_id, write_frame,
};
use pool_registry_types::task::Started;
use pool_registry_types::{AttemptId, ErrorBody, LogId, Moment, PoolKey, ReplicaId, TaskId, limits};

use crate::end::HowEnded;
use crate::frames::FrameBuffer;
use crate::log::{AppendError, Segment};
use crate::shape::{self, TokenShape};
use crate::staged::{Staged, TokensOfFrame};
use crate::watch::{AttemptDeadlines, Overdue, StreamWatch};

use passing::Passing;

/// The events of a node that are kept, each with its place in the log.
const NUMBERED: [&str; 4] = ["token", "reasoning", "result", "end"];
/// Tokens prove that a node lives; telling so once in this span is enough.
const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// Most ids that are known before their frames come, each frame being as ten: a node says them just before.
const MOST_COMING: usize = 64 * 1024;
const COMING_FRAME: usize = 10;
/// Most tokens of a task, which is more than any log shows.
const MOST_TOKENS: u64 = u32::MAX as u64;
/// Longest run of frames that is kept as one segment, bytes, before the frame that ends it.
const RUN_BYTES: usize = 64 * 1024;

/// What a relay is to carry, and how long each step may take.
#[derive(Debug, Clone, PartialEq)]
pub struct Assignment {
    /// As its client knows it.
    pub task_id: TaskId,
    pub attempt: AttemptId,
    pub log: LogId,
    pub pool: PoolKey,
    /// Frames that stand in the log already.
    pub first_index: u64,
    /// 1 for the first attempt of the task.
    pub attempt_number: u32,
    /// Milliseconds from admission to the dispatch.
    pub queue_wait_ms: u64,
    /// Where the session's context is, if it is on this pool.
    pub warm_replica: Option<ReplicaId>,
    /// Its stream may go on from the ids of its tokens; else they are passed over.
    pub keeps_ids: bool,
    pub deadlines: AttemptDeadlines,
    pub task_deadline: Option<Moment>,
    /// Whether an attempt that is over in time is stopped too; false in a mutant only.
    pub stops_overdue: bool,
}

/// What the shell is to do, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Tell the core: the node took the attempt.
    Accepted { replica_id: ReplicaId, report_seq: u64 },
    /// Tell the core: the first token that a reader sees is in the log.
    Started,
    /// Tell the core: tokens come (told at most once a second).
    Alive,
    /// Tell the core: nothing came for [`crate::QUIET`].
    Quiet,
    /// Tell the core: something came on a stream that had been quiet.
    Heard,
    /// Tell the core: what was sent cannot be generated again, whatever becomes of the attempt.
    CannotBeRepeated,
    /// Call [`Relay::timer`] at this moment, and not at the one named before.
    Arm(Moment),
    /// End the attempt at its node, which may work on it still.
    Stop,
    /// The attempt is over: fence the log, then tell the core.
    Ended {
        how: HowEnded,
        /// The number of the node's last report before the end, if it has said so.
        final_report: Option<u64>,
    },
}

/// What the frames since the last flush brought.
#[derive(Debug, Clone, Copy, Default)]
struct News {
    /// Tokens, thoughts or results for the log.
    tokens: bool,
    /// Thoughts that are left out of it.
    unlogged: bool,
    /// Events of the engine that bring nothing.
    works: bool,
}

/// The node's stream as far as it was read.
#[derive(Debug)]
struct Reading {
    shape: TokenShape,
    replica_id: Option<ReplicaId>,
    /// The next frame of the attempt: what stands before it was taken.
    taken: u64,
    started: bool,
    /// The final frame, once it came.
    last: Option<HowEnded>,
    final_report: Option<u64>,
    /// What ends the attempt, once what was taken before it is in the log.
    broken: Option<HowEnded>,
    /// The count of all tokens up to the frame that comes next, and the ids of its own.
    count: Option<u64>,
    ids: Vec<u32>,
    /// The count at the last frame that said it; none where nobody has.
    tokens: Option<u64>,
    /// Events of the engine since the last frame that have brought none.
    quiet_events: u64,
    /// The same of frames that are to come, by their index.
    coming: VecDeque<(u64, TokensOfFrame)>,
    /// Thoughts since the last frame that are left out of the log, and how many of them come again.
    thoughts: u64,
    repeated: u64,
    news: News,
    /// Where the frames of the present run end in it.
    ends: Vec<u32>,
    staged: Staged,
}

/// What becomes of a frame.
enum FrameSink {
    /// It is for the log, with the bytes of the event `started` before it.
    First(Vec<u8>),
    Next,
    /// It ends the log.
    Last(Option<Vec<u8>>),
    Nowhere,
}

/// One attempt's way into its log.
#[derive(Debug)]
pub struct Relay {
    assignment: Assignment,
    watch: StreamWatch,
    frames: FrameBuffer,
    reading: Reading,
    /// Where the engine's answer is passed on as it comes.
    passing: Option<Box<Passing>>,
    alive_sent: Moment,
    armed: Moment,
    /// Why the node's stream has ended.
    closed: Option<String>,
    ended: bool,
    actions: VecDeque<Action>,
}

impl Relay {
    /// The attempt is about to be sent. Its timer is to be armed by the first action.
    pub fn new(now: Moment, assignment: Assignment) -> Self {
        let watch = StreamWatch::new(now, assignment.deadlines, assignment.task_deadline);
        Self::watched(now, assignment, watch)
    }

    /// The same by its node's link, where its start may wait.
    pub fn linked(now: Moment, assignment: Assignment) -> Self {
        let watch = StreamWatch::linked(now, assignment.deadlines, assignment.task_deadline);
        Self::watched(now, assignment, watch)
    }

    fn watched(now: Moment, assignment: Assignment, watch: StreamWatch) -> Self {
        let armed = watch.next_deadline();
        let reading = Reading {
            shape: TokenShape::new(assignment.log),
            replica_id: None,
            taken: assignment.first_index,
            started: false,
            last: None,
            final_report: None,
            broken: None,
            count: None,
            ids: Vec::new(),
            // Where it goes on from other attempts' tokens, the first frame says how many those were.
            tokens: (assignment.first_index == 0).then_some(0),
            quiet_events: 0,
            coming: VecDeque::new(),
            thoughts: 0,
            repeated: 0,
            news: News::default(),
            ends: Vec::new(),
            staged: Staged::new(assignment.attempt),
        };
        Self {
            assignment,
            watch,
            frames: FrameBuffer::default(),
            reading,
            passing: None,
            alive_sent: now,
            armed,
            closed: None,
            ended: false,
            actions: VecDeque::from([Action::Arm(armed)]),
        }
    }

    /// Whether something is to be done.
    pub fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }

    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The node took the attempt. Where its stream is resumed it says so again, which changes nothing.
    pub fn accepted(&mut self, now: Moment, replica_id: ReplicaId, report_seq: u64) {
        if self.ended || self.reading.replica_id.is_some() {
            return;
        }
        self.watch.accepted(now);
        self.alive_sent = now;
        self.reading.replica_id = Some(replica_id.clone());
        self.actions.push_back(Action::Accepted { replica_id, report_seq });
        self.arm_sooner();
    }

    /// The node did not take the attempt, or it is not known whether it did.
    pub fn not_accepted(&mut self, how: HowEnded) {
        self.end(how);
    }

    /// On a link: the last byte of the attempt's start was taken, from which on its answer is awaited.
    pub fn sent(&mut self, now: Moment) {
        if !self.ended {
            self.watch.sent(now);
            self.arm_sooner();
        }
    }

    /// On a link: the tokens of the frames from `first` on, which follow.
    pub fn token_ids(&mut self, first: u64, frames: impl IntoIterator<Item = TokensOfFrame>) {
        if !self.assignment.keeps_ids {
            return;
        }
        let coming = &mut self.reading.coming;
        let mut room = MOST_COMING;
        let all = coming.drain(..).chain((first..).zip(frames));
        let fitting = all.map_while(|(of, tokens)| {
            room = room.checked_sub(COMING_FRAME + tokens.ids.len())?;
            Some((of, tokens))
        });
        *coming = fitting.collect();
    }

    /// On a link: the node's error, which counts with the next [`Relay::flush`] after its end.
    pub fn error(&mut self, error: ErrorBody) {
        self.reading.last.get_or_insert(HowEnded::NodeError(error));
    }

    /// On a link: the attempt is over at its node, after its report of this number. What has come of it
    /// counts with the next [`Relay::flush`].
    pub fn over(&mut self, report_seq: u64) {
        self.reading.final_report = Some(report_seq);
        self.passed_whole();
    }

    /// On a link: the node lives, and does not say that the attempt does.
    pub fn silent(&mut self) {
        self.end(HowEnded::TimedOut(Overdue::Silence));
    }

    /// Bytes of the node's stream have arrived; they count with the next [`Relay::flush`].
    pub fn chunk(&mut self, now: Moment, bytes: &[u8]) {
        if self.ended {
            return;
        }
        if self.watch.bytes(now) {
            self.actions.push_back(Action::Heard);
        }
        self.frames.push(bytes);
        self.read();
    }

    /// The node's stream has ended, which counts with the next [`Relay::flush`].
    pub fn closed(&mut self, reason: String) {
        self.closed.get_or_insert(reason);
    }

    /// The node's stream has broken, and its node may have kept it: the next bytes are of another stream
    /// of the same attempt. Returns the record with which that is to begin, comments before it included;
    /// nothing where the attempt is over.
    pub fn resume(&mut self) -> Option<u64> {
        if self.ended || self.reading.broken.is_some() {
            return None;
        }
        self.seal();
        self.frames.restart();
        self.closed = None;
        let reading = &mut self.reading;
        // What stands behind the last frame that was taken comes again.
        if matches!(reading.last, Some(HowEnded::NodeError(_))) {
            (reading.last, reading.final_report) = (None, None);
        }
        reading.count = None;
        reading.ids.clear();
        reading.coming.clear();
        reading.repeated = reading.thoughts;
        Some(reading.taken)
    }

    /// Nothing more has arrived for now. `write` is called where there is something for the log, and
    /// hands it over with [`Staged::append_to`].
    pub fn flush(&mut self, now: Moment, write: impl FnOnce(&mut Staged) -> Result<(), AppendError>) {
        if self.ended {
            return;
        }
        self.seal();
        let news = std::mem::take(&mut self.reading.news);
        let written = if self.reading.staged.is_empty() { Ok(()) } else { write(&mut self.reading.staged) };
        self.note_repeatable();
        if let Err(error) = written {
            // The final frame is not in the log either.
            self.reading.last = None;
            return self.end(append_error(error));
        }
        if let Some(how) = self.reading.broken.take() {
            return self.end(how);
        }
        if news.unlogged {
            self.watch.unlogged(now);
        } else if news.works {
            self.watch.works(now);
        }
        if news.tokens || news.unlogged {
            let is_due = now.since(self.alive_sent) >= ALIVE_EVERY;
            if news.tokens && self.watch.token(now) {
                self.actions.push_back(Action::Started);
            } else if is_due {
                self.actions.push_back(Action::Alive);
            }
            if is_due {
                self.alive_sent = now;
            }
        }
        // A stream that never pauses never lets the timer ring.
        if let Some(overdue) = self.watch.overdue(now) {
            return self.end(HowEnded::TimedOut(overdue));
        }
        if let Some(reason) = self.closed.take() {
            return self.end(HowEnded::Broken(reason));
        }
        if self.reading.final_report.is_some() {
            return self.end(HowEnded::Broken("its last report number came without a final frame".into()));
        }
        self.arm_sooner();
    }

    /// The moment of [`Action::Arm`] has come.
    pub fn timer(&mut self, now: Moment) {
        if self.ended {
            return;
        }
        if let Some(overdue) = self.watch.overdue(now) {
            return self.end(HowEnded::TimedOut(overdue));
        }
        if self.watch.grows_quiet(now) {
            self.actions.push_back(Action::Quiet);
        }
        self.armed = self.watch.next_deadline();
        self.actions.push_back(Action::Arm(self.armed));
    }

    /// The core wants the attempt's end, whatever came of it but an end that readers have.
    pub fn close(&mut self) {
        self.reading.last.take_if(|last| *last != HowEnded::Finished);
        self.end(HowEnded::Closed);
    }

    /// The shell has failed by a defect of its own.
    pub fn failed(&mut self, reason: String) {
        self.end(HowEnded::OwnDefect(reason));
    }

    /// The end of the attempt: the node's final frame if one came, else what is known.
    fn end(&mut self, otherwise: HowEnded) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let mut how = match self.reading.last.take() {
            // Taken, and not in the log: the readers have no end yet.
            Some(HowEnded::Finished) if self.has_unwritten_end() => otherwise,
            Some(last) => last,
            None => otherwise,
        };
        how.cut();
        let is_mutant = !self.assignment.stops_overdue && matches!(how, HowEnded::TimedOut(_));
        if how.may_still_run() && !is_mutant {
            self.actions.push_back(Action::Stop);
        }
        self.actions.push_back(Action::Ended { how, final_report: self.reading.final_report });
    }

    /// Whether the terminal frame waits for the log.
    fn has_unwritten_end(&self) -> bool {
        let reading = &self.reading;
        reading.staged.terminal && (reading.staged.has_frames() || !reading.ends.is_empty())
    }

    /// Arms the timer anew where it would ring too late; a token mostly moves it to later.
    fn arm_sooner(&mut self) {
        let next = self.watch.next_deadline();
        if next < self.armed {
            self.armed = next;
            self.actions.push_back(Action::Arm(next));
        }
    }

    /// Takes all whole frames.
    fn read(&mut self) {
        while self.reading.broken.is_none() {
            let reading = &mut self.reading;
            if reading.last.is_none()
                && let Some(len) = self.frames.token(&reading.shape, reading.taken)
            {
                match reading.take(&self.assignment, len) {
                    Ok(started) => self.keep(len, started),
                    Err(how) => reading.broken = Some(how),
                }
                continue;
            }
            let frame = match self.frames.frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(error) => {
                    self.reading.broken = Some(HowEnded::Broken(error.to_string()));
                    break;
                }
            };
            let len = frame.raw.len();
            let sink = match self.reading.sink(&self.assignment, &frame) {
                Ok(sink) => sink,
                Err(how) => {
                    self.reading.broken = Some(how);
                    break;
                }
            };
            let (started, is_last) = match sink {
                FrameSink::Nowhere => {
                    self.seal();
                    self.frames.skip(len);
                    continue;
                }
                FrameSink::First(started) => (Some(started), false),
                FrameSink::Last(started) => (started, true),
                FrameSink::Next => (None, false),
            };
            self.reading.staged.terminal |= is_last;
            self.keep(len, started);
        }
    }

    /// The frame of `len` bytes is for the log, with the bytes of the event `started` before it where it is
    /// the attempt's first.
    fn keep(&mut self, len: usize, started: Option<Vec<u8>>) {
        self.reading.taken += 1;
        (self.reading.thoughts, self.reading.repeated) = (0, 0);
        let run = self.frames.keep(len);
        self.reading.ends.push(u32::try_from(run).expect("a run is at most 64 KiB and one frame long"));
        if let Some(mut bytes) = started {
            // The only frame that is copied once more.
            bytes.extend_from_slice(&self.frames.take_run());
            self.reading.ends.clear();
            let segment = Segment::frame(self.reading.taken - 1, bytes.into());
            self.reading.staged.segments.push(segment);
        } else if run >= RUN_BYTES {
            self.seal();
        }
    }

    /// The frames that were kept in a row become a segment.
    fn seal(&mut self) {
        let reading = &mut self.reading;
        if reading.ends.is_empty() {
            return;
        }
        let first = reading.taken - reading.ends.len() as u64;
        let bytes: Bytes = self.frames.take_run();
        reading.staged.segments.push(Segment::new(first, bytes, &reading.ends));
        reading.ends.clear();
    }
}

impl Reading {
    /// Looks at a frame once and says where it goes. The error ends the attempt.
    fn sink(&mut self, assignment: &Assignment, frame: &Frame<'_>) -> Result<FrameSink, HowEnded> {
        let Some(data) = &frame.data else {
            self.comment(frame.comment.unwrap_or_default(), assignment.keeps_ids);
            return Ok(FrameSink::Nowhere);
        };
        if self.last.is_some() {
            return Err(HowEnded::Broken("something followed the final frame".into()));
        }
        if frame.event == "error" {
            // Not written: the core may place the task again, and writes what is final itself.
            let error: ErrorBody = serde_json::from_str(data)
                .map_err(|error| HowEnded::Broken(format!("an unreadable error frame: {error}")))?;
            self.last = Some(HowEnded::NodeError(error));
            return Ok(FrameSink::Nowhere);
        }
        if frame.id.is_none() && !NUMBERED.contains(&frame.event) {
            // Of a newer node, and no part of what is kept.
            return Ok(FrameSink::Nowhere);
        }
        let index = match frame.id.and_then(parse_event_id) {
            Some((log, index)) if log == assignment.log => index,
            _ => return Err(HowEnded::Broken("a frame without its id".into())),
        };
        let is_last = match frame.event {
            "token" | "reasoning" | "result" => false,
            "end" => true,
            other => return Err(HowEnded::Broken(format!("an unknown event {other:?}"))),
        };
        if index < self.taken {
            // It came before; so did the ids of its tokens.
            self.count = None;
            return Ok(FrameSink::Nowhere);
        }
        if index > self.taken {
            let error = AppendError::Gap { expected: self.taken, got: index };
            return Err(HowEnded::Broken(error.to_string()));
        }
        shape::check(frame, index).map_err(|error| HowEnded::Broken(error.to_string()))?;
        if is_last {
            self.count = None;
            self.last = Some(HowEnded::Finished);
            return Ok(FrameSink::Last(self.begin(assignment)));
        }
        Ok(self.take(assignment, frame.raw.len())?.map_or(FrameSink::Next, FrameSink::First))
    }

    /// The next frame is a good one of `len` bytes, and not the last. Returns what stands before it in the
    /// log. The error ends the attempt.
    fn take(&mut self, assignment: &Assignment, len: usize) -> Result<Option<Vec<u8>>, HowEnded> {
        let index = self.taken;
        let started = self.begin(assignment);
        if let Some(count) = self.count.take() {
            let ids = std::mem::take(&mut self.ids);
            self.brought(index, count, &ids, len)?;
            self.ids = ids;
        }
        while let Some((of, tokens)) = self.coming.pop_front_if(|(of, _)| *of <= index) {
            if of == index {
                self.brought(index, tokens.total, &tokens.ids, len)?;
            }
        }
        self.quiet_events = 0;
        self.news.tokens = true;
        Ok(started)
    }

    /// The event `started`, before the attempt's first frame.
    fn begin(&mut self, assignment: &Assignment) -> Option<Vec<u8>> {
        (!std::mem::replace(&mut self.started, true)).then(|| self.started(assignment))
    }

    /// Takes what the node says of the tokens of a frame of so many bytes, where they can be its.
    fn brought(&mut self, index: u64, total: u64, ids: &[u32], frame_bytes: usize) -> Result<(), HowEnded> {
        let (named, most) = (ids.len() as u64, limits::most_tokens(frame_bytes, self.quiet_events + 1));
        let grown = match self.tokens {
            Some(before) => total.checked_sub(before).filter(|new| *new <= most),
            None => Some(total),
        };
        if total > MOST_TOKENS || named > most || grown.is_none_or(|new| named > new) {
            let why = format!("frame {index} cannot have brought {named} ids of {total} tokens");
            return Err(HowEnded::Broken(why));
        }
        self.tokens = Some(total);
        self.staged.counted.push((index, total, ids.len()));
        self.staged.ids.extend_from_slice(ids);
        Ok(())
    }

    fn comment(&mut self, text: &str, keeps_ids: bool) {
        self.quiet_events += u64::from(matches!(text, UNLOGGED_THOUGHT | ENGINE_WORKS));
        if let Some(text) = text.strip_prefix(TOKEN_IDS) {
            if !keeps_ids {
                return;
            }
            let (count, ids) = text.split_once(' ').unwrap_or((text, ""));
            self.count = count.parse().ok();
            self.ids.clear();
            self.ids.extend(ids.split(',').filter_map(|id| id.parse::<u32>().ok()));
        } else if let Some(seq) = text.strip_prefix("report-seq ") {
            // A newer node may say more after the number.
            self.final_report = seq.split(' ').next().and_then(|seq| seq.parse().ok());
        } else if text == UNLOGGED_THOUGHT && self.repeated > 0 {
            self.repeated -= 1;
        } else if text == UNLOGGED_THOUGHT {
            self.thoughts += 1;
            self.staged.unlogged += 1;
            self.news.unlogged = true;
        } else if text == ENGINE_WORKS {
            self.news.works = true;
        }
    }

    fn started(&self, assignment: &Assignment) -> Vec<u8> {
        let mut frame = Vec::with_capacity(512);
        let Some(replica_id) = self.replica_id.clone() else { return frame };
        let started = Started {
            task_id: assignment.task_id,
            queue_wait_ms: assignment.queue_wait_ms,
            node_id: assignment.pool.node_id.clone(),
            pool_id: assignment.pool.pool_id.clone(),
            kv_warmth: assignment.warm_replica.as_ref() == Some(&replica_id),
            replica_id,
            attempt: assignment.attempt_number,
        };
        write_frame(&mut frame, None, "started", &serde_json::to_string(&started).unwrap_or_default());
        frame
    }
}

fn append_error(error: AppendError) -> HowEnded {
    match error {
        AppendError::Full => HowEnded::TooLong,
        AppendError::Differs(_) => HowEnded::Differs(error.to_string()),
        AppendError::Fenced => HowEnded::Closed,
        AppendError::Gap { .. } => HowEnded::Broken(error.to_string()),
    }
}

#[cfg(test)]
#[path = "relay_tests.rs"]
mod tests;
