//! What stands between a relay and its log: frames that were read and are not written yet.

use pool_registry_types::AttemptId;

use crate::log::{AppendError, Segment, TaskLog};
use crate::passage::PassedHead;

/// What a node says of one frame's tokens before it comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokensOfFrame {
    /// All tokens of the task, this frame's included.
    pub total: u64,
    pub ids: Vec<u32>,
}

/// What a relay has taken and the log has not yet.
#[derive(Debug)]
pub struct Staged {
    pub(crate) attempt: AttemptId,
    pub(crate) segments: Vec<Segment>,
    /// The last segment ends with the terminal frame.
    pub(crate) terminal: bool,
    /// For each frame whose tokens are known: its index, the count of all, and how many of `ids`.
    pub(crate) counted: Vec<(u64, u64, usize)>,
    pub(crate) ids: Vec<u32>,
    pub(crate) unlogged: u64,
    /// Of an answer that is passed on as it comes, with its first segment.
    pub(crate) head: Option<Box<PassedHead>>,
    /// What is in the log could be generated again, and cannot any more.
    pub(crate) cannot_be_repeated: bool,
}

impl Staged {
    pub(crate) fn new(attempt: AttemptId) -> Self {
        Self {
            attempt,
            segments: Vec::new(),
            terminal: false,
            counted: Vec::new(),
            ids: Vec::new(),
            unlogged: 0,
            head: None,
            cannot_be_repeated: false,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        !self.has_frames() && self.unlogged == 0
    }

    /// Whether there is something that readers wait for.
    pub fn has_frames(&self) -> bool {
        !self.segments.is_empty()
    }

    /// What the log will take for it, bytes.
    pub fn len_bytes(&self) -> usize {
        self.segments.iter().map(Segment::len_bytes).sum()
    }

    /// Moves everything into the log.
    pub fn append_to(&mut self, log: &mut TaskLog) -> Result<(), AppendError> {
        let appended = self.append(log);
        self.cannot_be_repeated = log.cannot_be_repeated();
        appended
    }

    fn append(&mut self, log: &mut TaskLog) -> Result<(), AppendError> {
        log.count_unlogged(self.attempt, std::mem::take(&mut self.unlogged));
        if let Some(head) = self.head.take() {
            log.check_head(self.attempt, &head.head)?;
            log.set_head(self.attempt, head);
        }
        let last = self.segments.len().saturating_sub(1);
        for (n, segment) in self.segments.drain(..).enumerate() {
            let Some(segment) = log.compared(self.attempt, segment)? else { continue };
            if self.terminal && n == last {
                log.finish(self.attempt, segment)?;
            } else {
                log.append(self.attempt, segment)?;
            }
        }
        let mut ids = self.ids.as_slice();
        for (index, count, brought) in self.counted.drain(..) {
            let (own, others) = ids.split_at(brought);
            log.keep_ids(index, count, own);
            ids = others;
        }
        self.ids.clear();
        Ok(())
    }
}
