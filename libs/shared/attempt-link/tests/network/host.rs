//! The attempts of a node, as a model: what is kept, what is remembered, and engines that write.

use std::collections::BTreeMap;

use attempt_link::content::{Acceptance, FrameTokens};
use attempt_link::node::{AttemptHost, NotResumed, Progress, Supply};
use attempt_link::wire::{ResumeOrder, Start};
use bytes::Bytes;
use pool_registry_types::{AttemptId, ErrorBody, ErrorCode, LogId, Moment, ReplicaId};

/// A node ends what nobody reads for so long, milliseconds.
const DETACHED: u64 = 15_000;
/// Of a frame: its attempt, its run, its index and its length.
pub(crate) const FRAME_HEADER: usize = 28;

/// One frame, which says whose it is.
pub(crate) fn frame(attempt: &AttemptId, run: u64, index: u64, len: usize) -> Bytes {
    let len = len.max(FRAME_HEADER);
    let mut bytes = Vec::with_capacity(len);
    bytes.extend_from_slice(&u64::try_from(attempt.0.as_u128() & 0xffff).unwrap().to_be_bytes());
    bytes.extend_from_slice(&run.to_be_bytes());
    bytes.extend_from_slice(&index.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(len).unwrap().to_be_bytes());
    bytes.resize(len, b'.');
    bytes.into()
}

/// An attempt that the node has taken.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) run: u64,
    log: LogId,
    /// The index of the first frame that is kept.
    first: u64,
    frames: Vec<Bytes>,
    keep: bool,
    with_ids: bool,
    fails: bool,
    reader: u64,
    ids_to: u64,
    error_given: bool,
    failed: Option<ErrorBody>,
    pub(crate) ended: bool,
    pub(crate) detached: Option<u64>,
    pub(crate) stuck: bool,
    /// The next frame is passed over.
    skips: bool,
}

impl Run {
    pub(crate) fn next(&self) -> u64 {
        self.first + self.frames.len() as u64
    }

    fn drop_before(&mut self, next: u64) {
        if !self.keep {
            let gone = usize::try_from(next.saturating_sub(self.first)).unwrap().min(self.frames.len());
            self.frames.drain(..gone);
            self.first += gone as u64;
        }
    }
}

/// What a node keeps.
#[derive(Debug, Default)]
pub(crate) struct Host {
    pub(crate) runs: BTreeMap<AttemptId, Run>,
    /// Ids that are remembered, and whether the attempt was ever accepted.
    pub(crate) seen: BTreeMap<AttemptId, bool>,
    pub(crate) accepted: BTreeMap<AttemptId, u32>,
    pub(crate) last_run: u64,
    /// Attempts that were taken since this was looked at.
    pub(crate) begun: Vec<AttemptId>,
    pub(crate) full: bool,
}

impl Host {
    pub(crate) fn append(&mut self, attempt: &AttemptId, len: usize) {
        let Some(run) = self.runs.get_mut(attempt).filter(|run| !run.ended) else { return };
        run.frames.push(frame(attempt, run.run, run.next(), len));
    }

    pub(crate) fn end(&mut self, attempt: &AttemptId) {
        if let Some(run) = self.runs.get_mut(attempt) {
            run.ended = true;
        }
    }

    /// A defect of the node: its reader passes over a frame, or comes to one again.
    pub(crate) fn misread(&mut self, which: usize, again: bool) {
        let runs = self.runs.len().max(1);
        let Some(run) = self.runs.values_mut().nth(which % runs) else { return };
        if again && run.reader > run.first {
            run.reader -= 1;
        } else if !again {
            run.skips = true;
        }
    }

    /// Ends what nobody reads.
    pub(crate) fn expire(&mut self, now: u64) {
        self.runs.retain(|_, run| run.detached.is_none_or(|since| now < since + DETACHED));
    }

    pub(crate) fn is_running(&self, attempt: &AttemptId) -> bool {
        self.runs.get(attempt).is_some_and(|run| !run.ended)
    }
}

impl AttemptHost for Host {
    fn accept(&mut self, _: Moment, start: &Start) -> Result<Acceptance, ErrorBody> {
        let attempt = start.facts.attempt_id;
        if self.seen.contains_key(&attempt) {
            return Err(ErrorBody::new(ErrorCode::AttemptDuplicate, "seen before"));
        }
        if self.full {
            return Err(ErrorBody::new(ErrorCode::ReplicaExhausted, "full"));
        }
        self.seen.insert(attempt, true);
        *self.accepted.entry(attempt).or_default() += 1;
        self.last_run += 1;
        let first = start.facts.first_index;
        let kind = attempt.0.as_u128() % 4;
        let run = Run {
            run: self.last_run,
            log: start.facts.log_id,
            first,
            frames: Vec::new(),
            keep: start.facts.keep,
            with_ids: kind == 1,
            fails: kind == 2,
            reader: first,
            ids_to: first,
            error_given: false,
            failed: None,
            ended: false,
            detached: None,
            stuck: false,
            skips: false,
        };
        self.runs.insert(attempt, run);
        self.begun.push(attempt);
        Ok(Acceptance { replica_id: ReplicaId::new("r0").unwrap(), report_seq: self.last_run })
    }

    fn resume(&mut self, _: Moment, order: &ResumeOrder) -> Result<Acceptance, NotResumed> {
        // The answer may be lost: asked again, it is the same.
        if !*self.seen.entry(order.attempt_id).or_insert(false) {
            return Err(NotResumed::Unknown);
        }
        let run = self.runs.get_mut(&order.attempt_id).ok_or(NotResumed::Gone)?;
        if run.log != order.log_id || order.from < run.first || order.from > run.next() {
            return Err(NotResumed::Gone);
        }
        (run.reader, run.ids_to, run.error_given, run.detached) = (order.from, order.from, false, None);
        run.drop_before(order.from);
        Ok(Acceptance { replica_id: ReplicaId::new("r0").unwrap(), report_seq: run.run })
    }

    fn stop(&mut self, _: Moment, attempt: &AttemptId) {
        self.seen.entry(*attempt).or_insert(false);
        self.runs.remove(attempt);
    }

    fn done(&mut self, _: Moment, attempt: &AttemptId) {
        if self.runs.get(attempt).is_some_and(|run| run.ended) {
            self.runs.remove(attempt);
        }
    }

    fn seen(&mut self, _: Moment, attempt: &AttemptId, next: u64) {
        if let Some(run) = self.runs.get_mut(attempt) {
            assert!(next <= run.next(), "more was seen than is there");
            run.drop_before(next.min(run.reader));
        }
    }

    fn detach(&mut self, now: Moment, attempt: &AttemptId) {
        if let Some(run) = self.runs.get_mut(attempt) {
            run.detached = Some(now.as_millis());
        }
    }

    fn fail(&mut self, _: Moment, attempt: &AttemptId, next: u64, error: ErrorBody) {
        if let Some(run) = self.runs.get_mut(attempt) {
            run.frames.truncate(usize::try_from(next - run.first).unwrap());
            (run.failed, run.error_given, run.ended) = (Some(error), false, true);
            (run.reader, run.ids_to) = (next, next);
        }
    }

    fn supply(&mut self, attempt: &AttemptId, most: usize) -> Supply {
        let Some(run) = self.runs.get_mut(attempt) else { return Supply::Gone };
        if run.reader < run.next() && std::mem::take(&mut run.skips) {
            run.reader += 1;
        }
        let from = usize::try_from(run.reader - run.first).unwrap();
        let (mut bytes, mut count) = (Vec::new(), 0_u32);
        for frame in &run.frames[from..] {
            if count > 0 && bytes.len() + frame.len() > most {
                break;
            }
            bytes.extend_from_slice(frame);
            count += 1;
        }
        let first = run.reader;
        if count == 0 {
            if !run.ended {
                return Supply::Waiting;
            }
            if let Some(error) = run.failed.clone().filter(|_| !std::mem::replace(&mut run.error_given, true))
            {
                return Supply::Error(error);
            }
            if run.fails && !std::mem::replace(&mut run.error_given, true) {
                return Supply::Error(ErrorBody::new(ErrorCode::WorkerReset, "the engine died"));
            }
            return Supply::End { next: first, report_seq: run.run };
        }
        let next = first + u64::from(count);
        if run.with_ids && run.ids_to < next {
            let frames = (first..next).map(|index| u32::try_from(index).unwrap());
            let frames = frames.map(|index| FrameTokens { total: index + 1, ids: vec![index] }).collect();
            run.ids_to = next;
            return Supply::TokenIds { first, frames };
        }
        run.reader = next;
        Supply::Frames { first, count, bytes: bytes.into() }
    }

    fn progress(&self, _: Moment, attempt: &AttemptId) -> Option<Progress> {
        let run = self.runs.get(attempt)?;
        Some(Progress { next: run.next(), ended: run.ended, lives: !run.stuck })
    }
}
