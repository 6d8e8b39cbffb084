//! The stream of one task: frames by index, one writing attempt at a time.
//!
//! Frames are kept as they go over the wire, in shared segments: a reader takes references, and
//! nothing is copied for it while the log is locked. The log knows no time and no readers; waking
//! them is the shell's.
//!
//! Memory: a segment costs [`SEGMENT_BYTES`] beside its frames, and each further frame in it four
//! bytes. So that this stays a fraction, the writer joins small segments once some dozens stand in a
//! row: each byte is moved once more, some 64 KiB at a time.
//!
//! A segment comes as a slice of what a socket was read into, and keeps all of that. What a writer sends
//! between its frames, and nobody keeps, must not cost more than they do: so segments that are small beside
//! such a block are joined too, and before a larger one follows them.

use bytes::Bytes;
use pool_registry_types::{AttemptId, LogId};

use crate::passage::PassedHead;
use crate::token_ids::TokenIds;

mod repeating;

use repeating::Repeating;
pub use repeating::StreamComparer;

/// Longest stream of a task, bytes. Source: .specs/01 CLOUD-1603.
pub const MAX_LOG_BYTES: usize = 8 * 1024 * 1024;
/// What a segment costs beside its bytes.
const SEGMENT_BYTES: usize = size_of::<Segment>();
/// Segments below this are joined: a quarter of what a connection of ours to a node reads at once. ...
const SMALL_BYTES: usize = 16 * 1024;
/// ... so many at once, ...
const JOINED_AT_ONCE: usize = 64;
/// ... or once they have so many bytes.
const JOINED_BYTES: usize = 64 * 1024;
/// A log that ends with fewer bytes is joined whole.
const COMPACT_BYTES: usize = 64 * 1024;

/// Why frames were not appended. The attempt is over in each case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    #[error("the attempt may not write to this log any more")]
    Fenced,
    #[error("frame {got} came where {expected} was next")]
    Gap { expected: u64, got: u64 },
    /// Those before the one that would be too much were appended.
    #[error("the stream is longer than its log may be")]
    Full,
    /// It generates the stream again, and makes another one.
    #[error("the stream that was generated again differs: {0}")]
    Differs(&'static str),
}

/// What stood in the log when an attempt was fenced off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fence {
    /// Frames before a terminal one.
    pub tokens_written: u64,
    /// Tokens so far that are left out of the log.
    pub unlogged: u64,
    /// The terminal frame had been written already.
    pub finished: bool,
}

/// Whole frames, end to end. The first may have events without an index before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// The index of the first frame.
    first: u64,
    bytes: Bytes,
    /// Where each frame ends in `bytes`, without the last one.
    ends: Box<[u32]>,
}

impl Segment {
    /// `ends`: where each frame ends in `bytes`, the last one included.
    pub fn new(first: u64, bytes: Bytes, ends: &[u32]) -> Self {
        let (last, inner) = ends.split_last().expect("a segment has a frame");
        assert_eq!(*last as usize, bytes.len(), "the last frame of a segment ends it");
        Self { first, bytes, ends: inner.into() }
    }

    /// A single frame.
    pub fn frame(first: u64, bytes: Bytes) -> Self {
        Self { first, bytes, ends: Box::default() }
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.bytes.len()
    }

    fn frames(&self) -> usize {
        self.ends.len() + 1
    }

    /// The index behind the last frame.
    fn next(&self) -> u64 {
        self.first + self.frames() as u64
    }

    /// Where the first `frames` frames end.
    fn end_of(&self, frames: usize) -> usize {
        match frames.checked_sub(1) {
            None => 0,
            Some(last) => self.ends.get(last).map_or(self.bytes.len(), |end| *end as usize),
        }
    }

    /// How many frames end within the first `bytes` bytes.
    fn frames_within(&self, bytes: usize) -> usize {
        let inner = self.ends.partition_point(|end| *end as usize <= bytes);
        inner + usize::from(self.bytes.len() <= bytes)
    }

    /// The first `frames` frames.
    fn cut(&self, frames: usize) -> Self {
        let inner = &self.ends[..frames.saturating_sub(1)];
        Self { first: self.first, bytes: self.bytes.slice(..self.end_of(frames)), ends: inner.into() }
    }
}

/// The frames from an index on, as far as they were asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    first: Bytes,
    /// What follows the first piece; mostly nothing, which allocates nothing.
    rest: Vec<Bytes>,
    /// The index to read from next.
    pub next: u64,
    /// No frame will follow.
    pub finished: bool,
}

impl Read {
    pub fn is_empty(&self) -> bool {
        self.first.is_empty()
    }

    /// They lie apart.
    pub fn is_in_pieces(&self) -> bool {
        !self.rest.is_empty()
    }

    /// The bytes in their order.
    pub fn pieces(&self) -> impl Iterator<Item = &Bytes> {
        std::iter::once(&self.first).chain(&self.rest)
    }

    /// All bytes as one piece, copied only where there are several: not to be called under the lock.
    pub fn into_bytes(self) -> Bytes {
        if self.rest.is_empty() {
            return self.first;
        }
        let mut joined = Vec::with_capacity(self.pieces().map(Bytes::len).sum());
        self.pieces().for_each(|piece| joined.extend_from_slice(piece));
        joined.into()
    }

    fn push(&mut self, piece: Bytes) {
        if self.first.is_empty() {
            self.first = piece;
        } else if !piece.is_empty() {
            self.rest.push(piece);
        }
    }
}

/// The frames of one task, and what else its next attempt needs to know of them.
#[derive(Debug)]
pub struct TaskLog {
    id: LogId,
    /// Most bytes of all frames.
    max_bytes: usize,
    segments: Vec<Segment>,
    /// The index of the next frame where there is no segment.
    next: u64,
    /// Of these the last ones that are small and were not joined.
    small: usize,
    /// Bytes of those.
    small_bytes: usize,
    /// Bytes of all frames.
    bytes: usize,
    /// Ends of frames that the segments keep.
    ends: usize,
    token_ids: TokenIds,
    /// Tokens so far that are left out.
    unlogged: u64,
    writer: Option<AttemptId>,
    finished: bool,
    /// Of an answer that is passed on as it came.
    head: Option<Box<PassedHead>>,
    /// Of a stream that may be generated again.
    repeating: Option<Box<Repeating>>,
}

impl TaskLog {
    pub fn new(id: LogId) -> Self {
        Self::bounded(id, MAX_LOG_BYTES)
    }

    /// A log of at most so many bytes: a simulated stream reaches a small bound sooner.
    pub fn bounded(id: LogId, max_bytes: usize) -> Self {
        Self {
            id,
            max_bytes,
            segments: Vec::new(),
            next: 0,
            small: 0,
            small_bytes: 0,
            bytes: 0,
            ends: 0,
            token_ids: TokenIds::default(),
            unlogged: 0,
            writer: None,
            finished: false,
            head: None,
            repeating: None,
        }
    }

    pub fn id(&self) -> LogId {
        self.id
    }

    /// The index of the next frame.
    pub fn next_index(&self) -> u64 {
        self.segments.last().map_or(self.next, Segment::next)
    }

    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// The head of the answer that is passed on, once any of it is here.
    pub fn head(&self) -> Option<&PassedHead> {
        self.head.as_deref()
    }

    /// The attempt's answer has this head.
    pub(crate) fn set_head(&mut self, attempt: AttemptId, head: Box<PassedHead>) {
        if self.writer == Some(attempt) {
            // The first one counts, also where another attempt goes on with its answer.
            self.head.get_or_insert(head);
        }
    }

    /// Lets go of what stands before the index and will not be read again, as far as it ends a segment.
    pub fn drop_before(&mut self, index: u64) {
        let gone = self.segments.partition_point(|segment| segment.next() <= index);
        if gone == 0 {
            return;
        }
        self.next = self.next_index();
        for segment in self.segments.drain(..gone) {
            self.bytes -= segment.bytes.len();
            self.ends -= segment.ends.len();
        }
        if self.small > self.segments.len() {
            self.small = self.segments.len();
            self.small_bytes = self.segments.iter().map(|segment| segment.bytes.len()).sum();
        }
        // A reader that was far behind leaves none of the room that it took.
        if self.segments.is_empty() && self.segments.capacity() > JOINED_AT_ONCE {
            self.segments = Vec::new();
        }
    }

    /// What the log takes, bytes: frames, what their segments cost, ids of tokens, and what is kept to be
    /// compared.
    pub fn len_bytes(&self) -> usize {
        let segments = self.segments.len() * SEGMENT_BYTES + self.ends * size_of::<u32>();
        let compared = self.repeating.as_ref().map_or(0, |repeating| repeating.len_bytes());
        self.bytes + segments + self.token_ids.len_bytes() + compared
    }

    /// Bytes of all frames that are kept.
    pub fn frame_bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes of frames that it takes before it is full.
    pub fn room(&self) -> usize {
        self.max_bytes - self.bytes
    }

    pub fn token_ids(&self) -> &TokenIds {
        &self.token_ids
    }

    /// Tokens so far that are left out of the log.
    pub fn unlogged(&self) -> u64 {
        self.unlogged
    }

    /// The attempt begins the stream anew, thoughts that were left out of it included.
    pub fn forget_unlogged(&mut self, attempt: AttemptId) {
        if self.writer == Some(attempt) {
            self.unlogged = 0;
        }
    }

    /// Lets an attempt write. The one before it must have been fenced.
    pub fn open(&mut self, attempt: AttemptId) {
        assert!(self.writer.is_none(), "log {} has a writing attempt already", self.id);
        assert!(!self.finished, "log {} is finished", self.id);
        self.writer = Some(attempt);
    }

    /// Appends frames of the attempt, which the log keeps as they are.
    pub fn append(&mut self, attempt: AttemptId, segment: Segment) -> Result<(), AppendError> {
        if self.finished || self.writer != Some(attempt) {
            return Err(AppendError::Fenced);
        }
        let expected = self.next_index();
        if segment.first != expected {
            return Err(AppendError::Gap { expected, got: segment.first });
        }
        let room = self.max_bytes - self.bytes;
        if segment.bytes.len() <= room {
            self.push(segment);
            return Ok(());
        }
        let fit = segment.frames_within(room);
        if fit > 0 {
            self.push(segment.cut(fit));
        }
        Err(AppendError::Full)
    }

    /// Appends the attempt's last frames, of which the last one is terminal.
    pub fn finish(&mut self, attempt: AttemptId, segment: Segment) -> Result<(), AppendError> {
        self.append(attempt, segment)?;
        self.writer = None;
        self.end();
        Ok(())
    }

    /// Remembers the engine's ids of the tokens of a frame, and the count of all so far.
    pub fn keep_ids(&mut self, index: u64, count: u64, ids: &[u32]) {
        // The last ones come together with the end.
        if !self.finished {
            self.token_ids.keep(index, count, ids);
        }
    }

    /// Counts tokens of the attempt that are left out.
    pub(crate) fn count_unlogged(&mut self, attempt: AttemptId, tokens: u64) {
        if self.writer == Some(attempt) {
            self.unlogged += tokens;
        }
    }

    /// Ends the attempt's right to write.
    pub fn fence(&mut self, attempt: AttemptId) -> Fence {
        if self.writer == Some(attempt) {
            self.writer = None;
        }
        let tokens_written = self.next_index() - u64::from(self.finished);
        Fence { tokens_written, unlogged: self.unlogged, finished: self.finished }
    }

    /// Appends the control plane's own terminal frame. No attempt may be writing.
    pub fn close(&mut self, frame: Bytes) {
        assert!(self.writer.is_none(), "log {} is closed under a writing attempt", self.id);
        assert!(!self.finished, "log {} is finished already", self.id);
        self.push(Segment::frame(self.next_index(), frame));
        self.end();
    }

    /// Nothing goes on from the ids of its tokens any more. If it is short it takes one allocation as
    /// long as it is: the blocks that its frames were read into may be much longer.
    fn end(&mut self) {
        self.finished = true;
        self.token_ids = TokenIds::default();
        self.repeating = None;
        if self.bytes <= COMPACT_BYTES {
            self.small = self.segments.len();
        }
        self.join_small();
        // It is kept for long, and mostly as one.
        self.segments.shrink_to_fit();
    }

    fn push(&mut self, segment: Segment) {
        self.bytes += segment.bytes.len();
        self.ends += segment.ends.len();
        let is_small = segment.bytes.len() < SMALL_BYTES;
        if is_small {
            self.small += 1;
            self.small_bytes += segment.bytes.len();
        } else {
            self.join_small();
        }
        self.segments.push(segment);
        if self.small == JOINED_AT_ONCE || self.small_bytes >= JOINED_BYTES {
            self.join_small();
        }
    }

    fn join_small(&mut self) {
        self.small_bytes = 0;
        let small = self.segments.split_off(self.segments.len() - std::mem::take(&mut self.small));
        let Some(first) = small.first().map(|segment| segment.first) else { return };
        let frames = small.iter().map(Segment::frames).sum();
        let (mut bytes, mut ends) = (
            Vec::with_capacity(small.iter().map(|segment| segment.bytes.len()).sum()),
            Vec::with_capacity(frames),
        );
        // One segment's last end is not kept, where each had one before.
        self.ends += small.len() - 1;
        for segment in &small {
            let before = u32::try_from(bytes.len()).expect("small segments are some 64 KiB together");
            ends.extend(segment.ends.iter().map(|end| before + end));
            bytes.extend_from_slice(&segment.bytes);
            ends.push(u32::try_from(bytes.len()).expect("small segments are some 64 KiB together"));
        }
        self.segments.push(Segment::new(first, bytes.into(), &ends));
    }

    /// The frames from `index` on, or from the first one that is kept, at most `at_most` bytes but one frame
    /// where there is one; none when it is past the end.
    pub fn read_from(&self, index: u64, at_most: usize) -> Read {
        let end = self.next_index();
        let begin = self.segments.first().map_or(end, |segment| segment.first);
        let next = index.clamp(begin, end);
        let mut read = Read { first: Bytes::new(), rest: Vec::new(), next, finished: false };
        let mut left = at_most;
        let from = self.segments.partition_point(|segment| segment.next() <= index);
        for segment in &self.segments[from..] {
            let skipped = usize::try_from(read.next - segment.first).unwrap_or(usize::MAX);
            let start = segment.end_of(skipped);
            let least = if read.is_empty() { skipped + 1 } else { skipped };
            let upto = segment.frames_within(start.saturating_add(left)).max(least);
            if upto == skipped {
                break;
            }
            let piece = segment.bytes.slice(start..segment.end_of(upto));
            left = left.saturating_sub(piece.len());
            read.next = segment.first + upto as u64;
            read.push(piece);
            if read.next < segment.next() {
                break;
            }
        }
        read.finished = self.finished && read.next == end;
        read
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    const ALL: usize = usize::MAX;

    fn attempt(n: u128) -> AttemptId {
        AttemptId(Uuid::from_u128(n))
    }

    fn log() -> TaskLog {
        TaskLog::new(LogId(Uuid::from_u128(9)))
    }

    fn frame(index: u64, bytes: &[u8]) -> Segment {
        Segment::frame(index, Bytes::copy_from_slice(bytes))
    }

    fn segment(first: u64, frames: &[Vec<u8>]) -> Segment {
        let ends = frames.iter().scan(0, |end, frame| {
            *end += u32::try_from(frame.len()).unwrap();
            Some(*end)
        });
        Segment::new(first, frames.concat().into(), &ends.collect::<Vec<_>>())
    }

    fn read(log: &TaskLog, index: u64) -> Vec<u8> {
        log.read_from(index, ALL).into_bytes().to_vec()
    }

    // CLOUD-1601
    #[test]
    fn frames_of_a_fenced_attempt_are_discarded() {
        let mut log = log();
        log.open(attempt(1));
        log.append(attempt(1), frame(0, b"a")).unwrap();
        log.count_unlogged(attempt(1), 2);
        assert_eq!(log.fence(attempt(1)), Fence { tokens_written: 1, unlogged: 2, finished: false });
        assert_eq!(log.append(attempt(1), frame(1, b"b")), Err(AppendError::Fenced));
        log.open(attempt(2));
        assert_eq!(log.append(attempt(1), frame(1, b"b")), Err(AppendError::Fenced));
        log.count_unlogged(attempt(1), 7);
        log.append(attempt(2), frame(1, b"c")).unwrap();
        assert_eq!((read(&log, 0), log.unlogged()), (b"ac".to_vec(), 2));
    }

    // CLOUD-1605
    #[test]
    fn an_index_out_of_order_is_refused() {
        let mut log = log();
        log.open(attempt(1));
        assert_eq!(log.append(attempt(1), frame(1, b"a")), Err(AppendError::Gap { expected: 0, got: 1 }));
        log.append(attempt(1), frame(0, b"a")).unwrap();
        assert_eq!(log.append(attempt(1), frame(0, b"a")), Err(AppendError::Gap { expected: 1, got: 0 }));
    }

    // CLOUD-1602
    #[test]
    fn nothing_is_appended_after_the_terminal_frame() {
        let mut log = log();
        log.open(attempt(1));
        log.append(attempt(1), frame(0, b"a")).unwrap();
        log.finish(attempt(1), frame(1, b"end")).unwrap();
        assert_eq!(log.append(attempt(1), frame(2, b"b")), Err(AppendError::Fenced));
        assert_eq!(log.fence(attempt(1)), Fence { tokens_written: 1, unlogged: 0, finished: true });
        let end = log.read_from(2, ALL);
        assert_eq!((end.is_empty(), end.next, end.finished), (true, 2, true));
        assert!(!log.read_from(0, 1).finished, "a reader that has not come so far is not at the end");
    }

    // CLOUD-1603
    #[test]
    fn a_stream_is_bounded_at_a_frame() {
        let mut log = log();
        log.open(attempt(1));
        log.append(attempt(1), frame(0, &vec![b'x'; MAX_LOG_BYTES - 5])).unwrap();
        let three = segment(1, &[b"ab".to_vec(), b"cd".to_vec(), b"ef".to_vec()]);
        assert_eq!(log.append(attempt(1), three), Err(AppendError::Full));
        assert_eq!((read(&log, 1), log.next_index()), (b"abcd".to_vec(), 3));
        assert_eq!(log.append(attempt(1), frame(3, b"yz")), Err(AppendError::Full));
        log.append(attempt(1), frame(3, b"y")).unwrap();
    }

    // CLOUD-1611
    #[test]
    fn a_reader_takes_what_the_log_holds_and_copies_nothing() {
        let mut log = log();
        log.open(attempt(1));
        let bytes = Bytes::from(vec![b'x'; 5_000]);
        log.append(attempt(1), Segment::frame(0, bytes.clone())).unwrap();
        let read = log.read_from(0, ALL).into_bytes();
        assert_eq!(read.as_ptr(), bytes.as_ptr());
    }

    // CLOUD-1611
    #[test]
    fn small_segments_are_joined_and_cost_a_fraction_of_their_bytes() {
        let mut log = log();
        log.open(attempt(1));
        for n in 0..6_400 {
            log.append(attempt(1), frame(n, &[b'x'; 100])).unwrap();
        }
        assert_eq!(log.segments.len(), 100);
        assert!((640_000..680_000).contains(&log.len_bytes()), "{}", log.len_bytes());
        assert_eq!(log.read_from(6_399, ALL).into_bytes().len(), 100);
    }

    // CLOUD-2770
    #[test]
    fn few_of_the_blocks_stay_that_segments_are_small_parts_of_however_they_follow_each_other() {
        /// What a socket was read into.
        struct Block(Vec<u8>, Arc<AtomicUsize>);
        impl AsRef<[u8]> for Block {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        impl Drop for Block {
            fn drop(&mut self) {
                self.1.fetch_sub(1, Ordering::Relaxed);
            }
        }
        for lengths in [vec![60], vec![1_025], vec![8_000], vec![60, 60, SMALL_BYTES], vec![SMALL_BYTES - 1]]
        {
            let (mut log, blocks) = (log(), Arc::<AtomicUsize>::default());
            log.open(attempt(1));
            let small = |length: &usize| *length < SMALL_BYTES;
            for (n, length) in (0..400).zip(lengths.iter().cycle()) {
                let of_small = if small(length) { Arc::clone(&blocks) } else { Arc::default() };
                of_small.fetch_add(1, Ordering::Relaxed);
                let block = Bytes::from_owner(Block(vec![b'x'; 64 * 1024], of_small));
                log.append(attempt(1), Segment::frame(n, block.slice(..*length))).unwrap();
                assert!(blocks.load(Ordering::Relaxed) <= JOINED_AT_ONCE, "{lengths:?}, {n}");
            }
            let fence = log.fence(attempt(1));
            log.close(Bytes::from_static(b"end"));
            assert_eq!((blocks.load(Ordering::Relaxed), fence.tokens_written), (0, 400), "{lengths:?}");
        }
    }

    // CLOUD-2832
    #[test]
    fn what_was_read_of_a_stream_that_is_passed_on_makes_room_for_the_rest() {
        let mut log = TaskLog::bounded(LogId(Uuid::from_u128(9)), 1_000);
        log.open(attempt(1));
        for n in 0..500 {
            log.append(attempt(1), frame(n, &[b'x'; 100])).unwrap();
            let read = log.read_from(n, ALL);
            assert_eq!((read.next, read.into_bytes().len()), (n + 1, 100));
            log.drop_before(n + 1);
        }
        assert_eq!((log.segments.len(), log.len_bytes()), (0, 0), "all of it is given back");
        for n in 500..510 {
            log.append(attempt(1), frame(n, &[b'x'; 100])).unwrap();
        }
        assert_eq!(log.append(attempt(1), frame(510, b"x")), Err(AppendError::Full));
        assert_eq!(log.read_from(500, ALL).into_bytes().len(), 1_000);
    }

    // CLOUD-2851
    #[test]
    fn ends_of_frames_that_were_read_are_counted_no_more_and_what_follows_has_the_next_index() {
        let mut log = log();
        log.open(attempt(1));
        let frames = vec![vec![b'x'; 10]; 300];
        log.append(attempt(1), segment(0, &frames)).unwrap();
        log.drop_before(299);
        assert_eq!(log.read_from(299, ALL).into_bytes().len(), 10, "a part of a segment stays with it");
        log.drop_before(300);
        assert_eq!((log.len_bytes(), log.next_index()), (0, 300));
        log.drop_before(300);
        log.append(attempt(1), frame(300, b"y")).unwrap();
        assert_eq!(log.read_from(300, ALL).into_bytes(), "y");
        assert_eq!(log.read_from(0, ALL).into_bytes(), "y", "what is kept");
        assert_eq!(log.fence(attempt(1)).tokens_written, 301);
    }

    proptest! {
        // CLOUD-1606
        // CLOUD-1611
        #[test]
        fn a_reader_that_resumes_at_any_index_sees_each_frame_once_however_little_it_takes(
            segments in prop::collection::vec(
                prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 1..5), 0..150),
            split in 0_usize..400,
            at_most in 1_usize..200,
        ) {
            let mut log = log();
            log.open(attempt(1));
            for frames in &segments {
                log.append(attempt(1), segment(log.next_index(), frames)).unwrap();
            }
            let frames: Vec<Vec<u8>> = segments.concat();
            prop_assert_eq!(log.next_index(), frames.len() as u64);
            let split = split.min(frames.len());
            prop_assert_eq!(read(&log, split as u64), frames[split..].concat());
            prop_assert!(log.read_from(u64::MAX, ALL).is_empty());
            let (mut next, mut seen) = (split as u64, Vec::new());
            loop {
                let read = log.read_from(next, at_most);
                if read.is_empty() {
                    break;
                }
                let taken = usize::try_from(read.next - next).unwrap();
                let bytes = read.clone().into_bytes();
                prop_assert!(bytes.len() <= at_most || taken == 1);
                prop_assert!(taken > 0);
                next = read.next;
                seen.extend_from_slice(&bytes);
            }
            prop_assert_eq!(seen, frames[split..].concat());
        }
    }
}
