//! What a task has cost, for its view: tokens in and out, and why its answer ended.
//!
//! Of a task of ours its log says that; of an answer that is passed on a meter does, which follows it on
//! its way into the log. What is known outlives the stream.

use openai_gateway::meter::{Meter, Metered};
use parking_lot::Mutex;
use pool_registry_types::sse::Decoder;
use serde::Deserialize;
use task_stream::{Passage, Read, TaskLog};

/// What is known of a task.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct TaskUsage {
    pub(crate) tokens_in: Option<u64>,
    pub(crate) tokens_out: Option<u64>,
    pub(crate) finish_reason: Option<String>,
}

/// Of event `end`, as far as it counts here: a newer node may end for more reasons.
#[derive(Deserialize)]
struct End {
    tokens_out: Option<u64>,
    tokens_in: Option<u64>,
    finish_reason: Option<String>,
}

impl TaskUsage {
    /// By a log of ours: what its end says, else the tokens that stand in it and those left out.
    pub(crate) fn of_log(log: &TaskLog) -> Self {
        let frames = log.next_index();
        let last = frames.checked_sub(1).filter(|_| log.is_finished());
        if let Some(end) = last.and_then(|last| frame::<End>(log, last, "end")) {
            let End { tokens_out, tokens_in, finish_reason } = end;
            return Self { tokens_in, tokens_out, finish_reason };
        }
        let tokens = last.unwrap_or(frames);
        // Vectors and ranks are no tokens.
        let is_results = tokens > 0 && frame::<serde::de::IgnoredAny>(log, 0, "result").is_some();
        let counted = log.token_ids().count(tokens).unwrap_or_else(|| tokens.saturating_add(log.unlogged()));
        Self { tokens_out: Some(if is_results { 0 } else { counted }), ..Self::default() }
    }
}

/// The data of the frame, where it is one of this event.
fn frame<T: for<'d> Deserialize<'d>>(log: &TaskLog, index: u64, event: &str) -> Option<T> {
    let mut decoder = Decoder::new();
    decoder.push(&log.read_from(index, 0).into_bytes());
    // Events without an index may stand before it.
    while let Ok(Some(frame)) = decoder.next_frame() {
        if frame.event == event {
            return serde_json::from_str(frame.data.as_deref()?).ok();
        }
    }
    None
}

/// The meter of an answer that is passed on.
#[derive(Debug)]
pub(super) struct AnswerMeter(Mutex<Meter>);

impl AnswerMeter {
    pub(super) fn new(passage: &Passage) -> Self {
        Self(Mutex::new(Meter::new(passage.route)))
    }

    /// What was appended, on its way to the reader; where it is read to its end, that is all. Returns how many
    /// tokens were counted by now, without the last few.
    pub(super) fn follow(&self, appended: &Read, is_event_stream: bool) -> u64 {
        let mut meter = self.0.lock();
        for piece in appended.pieces().filter(|piece| !piece.is_empty()) {
            if is_event_stream {
                meter.events(piece);
            } else {
                meter.whole(piece);
            }
        }
        if appended.finished {
            meter.finish();
        }
        meter.counted()
    }

    pub(super) fn usage(&self) -> TaskUsage {
        let Metered { usage, finish_reason } = self.0.lock().metered();
        TaskUsage { tokens_in: usage.tokens_in, tokens_out: usage.tokens_out, finish_reason }
    }
}

#[cfg(test)]
mod tests {
    use pool_registry_types::{AttemptId, LogId};
    use task_stream::Segment;
    use uuid::Uuid;

    use super::*;

    const ATTEMPT: AttemptId = AttemptId(Uuid::from_u128(1));

    fn log(frames: &[&str], is_finished: bool) -> TaskLog {
        let mut log = TaskLog::new(LogId(Uuid::from_u128(1)));
        log.open(ATTEMPT);
        for (index, frame) in (0..).zip(frames) {
            let segment = Segment::frame(index, (*frame).to_owned().into());
            if is_finished && index + 1 == frames.len() as u64 {
                log.finish(ATTEMPT, segment).unwrap();
            } else {
                log.append(ATTEMPT, segment).unwrap();
            }
        }
        log
    }

    // CLOUD-2881
    #[test]
    fn a_log_tells_what_its_end_says_and_else_how_many_tokens_stand_in_it() {
        let token = "event: started\ndata: {}\n\nevent: token\ndata: {\"t\":\"x\",\"i\":0}\n\n";
        let end = "event: end\ndata: {\"tokens_out\":9,\"tokens_in\":4,\"finish_reason\":\"stop\"}\n\n";
        let known = TaskUsage { tokens_in: Some(4), tokens_out: Some(9), finish_reason: Some("stop".into()) };
        assert_eq!(TaskUsage::of_log(&log(&[token, end], true)), known);
        let counted = |tokens_out| TaskUsage { tokens_out: Some(tokens_out), ..TaskUsage::default() };
        let error = "event: error\ndata: {\"code\":\"CANCELED\"}\n\n";
        assert_eq!(TaskUsage::of_log(&log(&[token, token, error], true)), counted(2));
        assert_eq!(TaskUsage::of_log(&log(&[token, token], false)), counted(2));
        assert_eq!(TaskUsage::of_log(&log(&[], false)), counted(0));
        assert_eq!(TaskUsage::of_log(&log(&["event: result\ndata: {\"i\":0}\n\n"], false)), counted(0));
    }
}
