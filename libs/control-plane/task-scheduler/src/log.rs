//! The stream of one task: frames by index, one writing attempt at a time.
//!
//! Frames are kept as they go over the wire, end to end in one buffer, so that reading on from
//! an index is a copy of bytes and nothing is encoded twice. The log knows no time and no
//! readers; waking them is the shell's.

use pool_registry_types::{AttemptId, LogId};

/// Longest stream of a task, bytes. Source: .specs/01 CLOUD-1603.
pub const MAX_LOG_BYTES: usize = 8 * 1024 * 1024;

/// Why a frame was not appended. The attempt is over in each case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    #[error("the attempt may not write to this log any more")]
    Fenced,
    #[error("frame {got} came where {expected} was next")]
    Gap { expected: u64, got: u64 },
    #[error("the stream is longer than {MAX_LOG_BYTES} bytes")]
    Full,
}

/// What stood in the log when an attempt was fenced off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fence {
    /// Frames before a terminal one.
    pub tokens_written: u64,
    /// The terminal frame had been written already.
    pub finished: bool,
}

/// The frames from an index on.
#[derive(Debug, PartialEq, Eq)]
pub struct Read<'l> {
    pub bytes: &'l [u8],
    /// The index to read from next.
    pub next: u64,
    /// No frame will follow.
    pub finished: bool,
}

/// The frames of one task.
#[derive(Debug)]
pub struct TaskLog {
    id: LogId,
    bytes: Vec<u8>,
    /// Where each frame ends in `bytes`.
    ends: Vec<usize>,
    writer: Option<AttemptId>,
    finished: bool,
}

impl TaskLog {
    pub fn new(id: LogId) -> Self {
        Self { id, bytes: Vec::new(), ends: Vec::new(), writer: None, finished: false }
    }

    pub fn id(&self) -> LogId {
        self.id
    }

    /// The index of the next frame.
    pub fn next_index(&self) -> u64 {
        self.ends.len() as u64
    }

    pub fn is_finished(&self) -> bool {
        self.finished
    }

    pub fn len_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Lets an attempt write. The one before it must have been fenced.
    pub fn open(&mut self, attempt: AttemptId) {
        assert!(self.writer.is_none(), "log {} has a writing attempt already", self.id);
        assert!(!self.finished, "log {} is finished", self.id);
        self.writer = Some(attempt);
    }

    /// Appends frame `index` of the attempt; `frame` may hold events without an index before it.
    pub fn append(&mut self, attempt: AttemptId, index: u64, frame: &[u8]) -> Result<(), AppendError> {
        if self.finished || self.writer != Some(attempt) {
            return Err(AppendError::Fenced);
        }
        let expected = self.next_index();
        if index != expected {
            return Err(AppendError::Gap { expected, got: index });
        }
        if self.bytes.len() + frame.len() > MAX_LOG_BYTES {
            return Err(AppendError::Full);
        }
        self.push(frame);
        Ok(())
    }

    /// Appends the attempt's terminal frame.
    pub fn finish(&mut self, attempt: AttemptId, index: u64, frame: &[u8]) -> Result<(), AppendError> {
        self.append(attempt, index, frame)?;
        self.finished = true;
        self.writer = None;
        Ok(())
    }

    /// Ends the attempt's right to write.
    pub fn fence(&mut self, attempt: AttemptId) -> Fence {
        if self.writer == Some(attempt) {
            self.writer = None;
        }
        Fence { tokens_written: self.next_index() - u64::from(self.finished), finished: self.finished }
    }

    /// Appends the control plane's own terminal frame. No attempt may be writing.
    pub fn close(&mut self, frame: &[u8]) {
        assert!(self.writer.is_none(), "log {} is closed under a writing attempt", self.id);
        assert!(!self.finished, "log {} is finished already", self.id);
        self.push(frame);
        self.finished = true;
    }

    fn push(&mut self, frame: &[u8]) {
        self.bytes.extend_from_slice(frame);
        self.ends.push(self.bytes.len());
    }

    /// All frames from `index` on; none when it is past the end.
    pub fn read_from(&self, index: u64) -> Read<'_> {
        let next = self.next_index();
        let start = match usize::try_from(index) {
            Ok(0) => 0,
            Ok(n) if n <= self.ends.len() => self.ends[n - 1],
            _ => self.bytes.len(),
        };
        Read { bytes: &self.bytes[start..], next, finished: self.finished }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn attempt(n: u128) -> AttemptId {
        AttemptId(Uuid::from_u128(n))
    }

    fn log() -> TaskLog {
        TaskLog::new(LogId(Uuid::from_u128(9)))
    }

    // CLOUD-1601
    #[test]
    fn frames_of_a_fenced_attempt_are_discarded() {
        let mut log = log();
        log.open(attempt(1));
        log.append(attempt(1), 0, b"a").unwrap();
        assert_eq!(log.fence(attempt(1)), Fence { tokens_written: 1, finished: false });
        assert_eq!(log.append(attempt(1), 1, b"b"), Err(AppendError::Fenced));
        log.open(attempt(2));
        assert_eq!(log.append(attempt(1), 1, b"b"), Err(AppendError::Fenced));
        log.append(attempt(2), 1, b"c").unwrap();
        assert_eq!(log.read_from(0).bytes, b"ac");
    }

    // CLOUD-1605
    #[test]
    fn an_index_out_of_order_is_refused() {
        let mut log = log();
        log.open(attempt(1));
        assert_eq!(log.append(attempt(1), 1, b"a"), Err(AppendError::Gap { expected: 0, got: 1 }));
        log.append(attempt(1), 0, b"a").unwrap();
        assert_eq!(log.append(attempt(1), 0, b"a"), Err(AppendError::Gap { expected: 1, got: 0 }));
    }

    // CLOUD-1602
    #[test]
    fn nothing_is_appended_after_the_terminal_frame() {
        let mut log = log();
        log.open(attempt(1));
        log.append(attempt(1), 0, b"a").unwrap();
        log.finish(attempt(1), 1, b"end").unwrap();
        assert_eq!(log.append(attempt(1), 2, b"b"), Err(AppendError::Fenced));
        assert_eq!(log.fence(attempt(1)), Fence { tokens_written: 1, finished: true });
        assert_eq!(log.read_from(2), Read { bytes: b"", next: 2, finished: true });
    }

    // CLOUD-1603
    #[test]
    fn a_stream_is_bounded() {
        let mut log = log();
        log.open(attempt(1));
        log.append(attempt(1), 0, &vec![b'x'; MAX_LOG_BYTES]).unwrap();
        assert_eq!(log.append(attempt(1), 1, b"y"), Err(AppendError::Full));
    }

    proptest! {
        // CLOUD-1606
        #[test]
        fn a_reader_that_resumes_at_any_index_sees_each_frame_once(
            frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..5), 0..20),
            split in 0_usize..20,
        ) {
            let mut log = log();
            log.open(attempt(1));
            for (n, frame) in frames.iter().enumerate() {
                log.append(attempt(1), n as u64, frame).unwrap();
            }
            let split = split.min(frames.len());
            prop_assert_eq!(log.read_from(split as u64).bytes, frames[split..].concat());
            prop_assert_eq!(log.read_from(u64::MAX).bytes, b"");
        }
    }
}
