//! What an engine's answer becomes: its events are taken, and the attempt's frames made of them.

use futures::FutureExt;
use pool_registry_types::sse::{
    ENGINE_WORKS, MAX_FRAME_BYTES, SseError, TOKEN_IDS, UNLOGGED_THOUGHT, write_comment, write_token,
};
use pool_registry_types::task::{End, MAX_RESULT_BYTES};

use super::*;
use crate::engines::client::with_causes;
use crate::engines::{Delta, EngineEvent};
use crate::pieces::{IN_A_ROW, MOST_PIECES_AT_ONCE, behind_what_is_ready};

/// What some servers begin a text with.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();
/// What may follow the end of an answer before its connection is given up, bytes and time.
const MOST_LEFT_BYTES: usize = 64 * 1024;
const LEFT_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest wait for how an engine has ended whose connection was lost.
const END_TIMEOUT: Duration = Duration::from_secs(1);

impl Driver {
    /// Takes a piece of the engine's stream, and with it what has arrived already.
    pub(super) async fn chunks(&mut self, first: Option<hyper::Result<Bytes>>) {
        if matches!(first, Some(Ok(_))) {
            self.heard();
        }
        self.chunk(first);
        let more = self.what_is_there().await;
        // Also where a turn takes long: those that come together are taken together the next time.
        self.last_pieces = (more == 0).then(Instant::now);
    }

    /// Returns how many pieces there were.
    async fn what_is_there(&mut self) -> usize {
        let mut more = 0;
        // A token that comes by itself is not to wait for others, nor to cost a second turn.
        let mut patient = self.last_pieces.is_none_or(|last| last.elapsed() < IN_A_ROW);
        for _ in 0..MOST_PIECES_AT_ONCE {
            let Phase::Streaming(pieces) = &mut self.phase else { break };
            match pieces.next().now_or_never() {
                Some(next) => {
                    (patient, more) = (true, more + 1);
                    self.chunk(next);
                }
                None if patient => {
                    patient = false;
                    behind_what_is_ready().await;
                }
                None => break,
            }
        }
        more
    }

    fn chunk(&mut self, chunk: Option<hyper::Result<Bytes>>) {
        let bytes = match chunk {
            Some(Ok(bytes)) => bytes,
            Some(Err(error)) => return self.ended(Some(&error)),
            None => {
                if self.last_events() {
                    self.ended(None);
                }
                return;
            }
        };
        self.out.bytes.reserve(bytes.len() + 128);
        if matches!(self.framing, Framing::Open)
            && let Some(first) = first_sign(&bytes)
        {
            self.framing = if first == b'{' { Framing::Whole(Vec::new()) } else { Framing::Events };
        }
        match &mut self.framing {
            Framing::Whole(held) => {
                held.extend_from_slice(&bytes);
                if held.len() > MAX_FRAME_BYTES {
                    self.fail(engines::too_long(), false);
                }
            }
            Framing::Open | Framing::Events => {
                self.decoder.push(&bytes);
                self.events();
            }
        }
    }

    /// Takes the whole events that are there. Returns whether the stream goes on.
    fn events(&mut self) -> bool {
        loop {
            let reported = match self.decoder.next_frame() {
                Ok(Some(frame)) => self.reader.read(&frame),
                Ok(None) => return true,
                Err(error) => {
                    self.unreadable(error);
                    return false;
                }
            };
            if !self.reported(reported) {
                return false;
            }
        }
    }

    /// The message has ended in order: what stands at its end without an empty line counts. Returns
    /// whether no end was in it.
    fn last_events(&mut self) -> bool {
        if let Framing::Whole(held) = &mut self.framing {
            let mut event = b"data: ".to_vec();
            // Line breaks between the parts of an object are white space.
            let held = held.strip_prefix(BYTE_ORDER_MARK).unwrap_or(held);
            event.extend(held.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }));
            event.extend_from_slice(b"\n\n");
            self.decoder.push(&event);
            if self.events() {
                let end = self.reader.closed_whole();
                self.reported(end);
            }
            return false;
        }
        if !self.events() {
            return false;
        }
        let reported = match self.decoder.last_frame() {
            Ok(Some(frame)) => self.reader.read_last(&frame),
            Ok(None) => return true,
            Err(error) => {
                self.unreadable(error);
                return false;
            }
        };
        self.reported(reported)
    }

    fn unreadable(&mut self, error: SseError) {
        match error {
            SseError::TooLong => self.fail(engines::too_long(), false),
            SseError::NotUtf8 => {
                let error = ErrorBody::new(ErrorCode::WorkerReset, format!("the engine failed: {error}"));
                self.fail(error.with_cause(EndCause::Engine5xx), false);
            }
        }
    }

    /// Nothing follows: in order, or because the connection was lost.
    fn ended(&mut self, lost: Option<&hyper::Error>) {
        let end = if lost.is_some() { self.reader.lost() } else { self.reader.closed() };
        if let Some(end) = end {
            self.reported(end);
            return;
        }
        self.slot.engine_suspected();
        let unmarked = || "it closed the stream without its end marker".to_owned();
        let reason = lost.map_or_else(unmarked, |error| with_causes(error));
        let error = ErrorBody::new(ErrorCode::WorkerReset, format!("the engine died: {reason}"));
        self.fail(error.with_cause(EndCause::EngineDied), true);
    }

    /// Takes what an event of the engine says. Returns whether the stream goes on.
    fn reported(&mut self, reported: EngineEvent) -> bool {
        match reported {
            EngineEvent::Nothing => true,
            EngineEvent::Delta(delta) => {
                if delta.is_empty() {
                    write_comment(&mut self.out.bytes, ENGINE_WORKS);
                }
                self.delta(&delta)
            }
            EngineEvent::End { delta, tokens_out, finish_reason } => {
                if !self.delta(&delta) {
                    return false;
                }
                if self.unrepeated.thought.is_empty() && self.unrepeated.text.is_empty() {
                    self.finish(tokens_out, None, finish_reason);
                } else {
                    self.replay_differs();
                }
                false
            }
            EngineEvent::Failed(reason) => {
                let error = ErrorBody::new(ErrorCode::WorkerReset, format!("the engine failed: {reason}"));
                self.fail(error.with_cause(EndCause::Engine5xx), false);
                false
            }
            EngineEvent::Refused(refusal) => {
                self.refused(*refusal, None);
                false
            }
        }
    }

    /// Takes thoughts and text. Returns whether the stream goes on.
    fn delta(&mut self, delta: &Delta) -> bool {
        self.piece(Kind::Reasoning, &delta.thought) && self.piece(Kind::Token, &delta.text)
    }

    /// Gives out the whole answer, or none of it.
    pub(super) fn document(&mut self, document: Result<Document, DocumentError>) {
        let document = match document {
            Ok(document) => document,
            Err(error) => {
                let (cause, idle) = match &error {
                    DocumentError::Lost(_) => (EndCause::EngineDied, true),
                    DocumentError::TooLong | DocumentError::TooMany => {
                        // Every engine would say as much.
                        let message = format!("inputs: {error}: send fewer");
                        return self.fail(ErrorBody::new(ErrorCode::PayloadTooLarge, message), false);
                    }
                    DocumentError::Unreadable(_) => (EndCause::Engine5xx, true),
                };
                let error = ErrorBody::new(ErrorCode::WorkerReset, format!("the engine failed: {error}"));
                return self.fail(error.with_cause(cause), idle);
            }
        };
        self.first_token.get_or_insert_with(Instant::now);
        let first = self.out.next();
        for data in &document.results {
            self.out.frame(&self.log_id, "result", data);
        }
        let made = self.out.bytes.len();
        if made > MAX_RESULT_BYTES {
            self.out = Output::new(first);
            let message = format!(
                "inputs: {} results take {made} bytes, and a task keeps at most {MAX_RESULT_BYTES}: send fewer",
                document.results.len(),
            );
            return self.fail(ErrorBody::new(ErrorCode::PayloadTooLarge, message), true);
        }
        self.finish(0, document.tokens_in, FinishReason::Stop);
    }

    /// Takes what the engine wrote: what has been sent before is compared, what is new is sent.
    /// Returns whether the stream goes on.
    fn piece(&mut self, kind: Kind, text: &str) -> bool {
        if text.is_empty() {
            return true;
        }
        if kind == Kind::Reasoning && !self.keeps_thoughts {
            self.brought();
            write_comment(&mut self.out.bytes, UNLOGGED_THOUGHT);
            return true;
        }
        let Unrepeated { thought, text: sent } = &mut self.unrepeated;
        let (rest, other) = match kind {
            Kind::Reasoning => (thought, &*sent),
            Kind::Token => (sent, &*thought),
        };
        if rest.starts_with(text) {
            rest.drain(..text.len());
            return true;
        }
        match text.strip_prefix(rest.as_str()) {
            // Nothing new comes before all that was sent has come again.
            Some(new) if other.is_empty() => {
                rest.clear();
                self.token(kind, new)
            }
            _ => {
                self.replay_differs();
                false
            }
        }
    }

    /// Never a splice: a reader would get the end of another answer.
    fn replay_differs(&mut self) {
        let message = "the engine's second run differs from what had been sent";
        let error = ErrorBody::new(ErrorCode::WorkerReset, message).with_cause(EndCause::ReplayDiffers);
        self.fail(error, false);
    }

    /// The first output shows that the engine does what was asked.
    fn brought(&mut self) {
        if self.first_token.is_none() {
            self.first_token = Some(Instant::now());
            let attempt = self.slot.attempt;
            self.slot.agent.with_core(|core, _| core.succeeded(&attempt));
        }
    }

    /// The final frame of a token: it is passed on, never written again. Returns whether the stream
    /// goes on.
    fn token(&mut self, kind: Kind, text: &str) -> bool {
        self.brought();
        let (log_id, index) = (self.log_id, self.out.next());
        if let Some((ids, count)) = self.reader.take_ids(text) {
            let count = self.tokens_before.saturating_add(count);
            if self.slot.signals.by_link {
                let total = u32::try_from(count).unwrap_or(u32::MAX);
                self.out.tokens.push((index, FrameTokens { total, ids }));
            } else {
                let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
                write_comment(&mut self.out.bytes, &format!("{TOKEN_IDS}{count} {}", ids.join(",")));
            }
        }
        let out = &mut self.out.bytes;
        let begins = out.len();
        let event = if kind == Kind::Token { "token" } else { "reasoning" };
        write_token(out, log_id, index, event, text);
        if out.len() - begins > MAX_FRAME_BYTES {
            // Written out it is longer than it came.
            out.truncate(begins);
            self.out.tokens.pop_if(|(of, _)| *of == index);
            self.fail(engines::too_long(), false);
            return false;
        }
        self.out.ends.push(self.out.bytes.len());
        true
    }

    pub(super) fn finish(&mut self, tokens_out: u64, tokens_in: Option<u64>, finish_reason: FinishReason) {
        let since = |at: Instant| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX);
        let (decode_time_ms, decode_ms) = (since(self.started), self.first_token.map_or(0, since));
        let made_here = tokens_out;
        let tokens_out = tokens_out.saturating_add(self.tokens_before);
        let end = End { tokens_out, tokens_in, decode_time_ms, decode_ms, finish_reason };
        let data = serde_json::to_string(&end).unwrap_or_default();
        let attempt = self.slot.attempt;
        self.slot.agent.with_core(|core, _| core.succeeded(&attempt));
        self.slot.cleared();
        let seq = self.slot.end(true);
        let mut counters = self.slot.agent.counters.lock();
        counters.finished += 1;
        counters.tokens = counters.tokens.saturating_add(made_here);
        drop(counters);
        self.slot.log.ended(tokens_out, true);
        self.out.frame(&self.log_id, "end", &data);
        self.over(seq, true);
    }

    /// Ends the attempt with the error; where its engine may have died, once it is known how.
    pub(super) fn fail(&mut self, error: ErrorBody, engine_idle: bool) {
        if error.cause != Some(EndCause::EngineDied) {
            return self.close(error, engine_idle);
        }
        self.slot.lost = true;
        self.phase = Phase::Lost { error: Box::new(error), until: Instant::now() + END_TIMEOUT };
    }

    pub(super) fn close(&mut self, error: ErrorBody, engine_idle: bool) {
        let (error, seq) = self.slot.fail(error, engine_idle);
        if self.slot.signals.by_link {
            self.slot.error = Some(error);
        } else {
            let data = serde_json::to_string(&error).unwrap_or_default();
            self.out.frame(&self.log_id, "error", &data);
        }
        self.over(seq, false);
    }

    /// Nothing more is made. `in_order`: the engine's answer has ended with it.
    fn over(&mut self, seq: u64, in_order: bool) {
        if !self.slot.signals.by_link {
            write_comment(&mut self.out.bytes, &format!("report-seq {seq}"));
        }
        // Its connection is dropped here, not when the reader is done.
        let phase = std::mem::replace(&mut self.phase, Phase::Over);
        if let Phase::Streaming(pieces) = phase
            && in_order
        {
            owned_tasks::task(&self.slot.agent.tracker, "rest of an answer", read_out(pieces));
        }
    }
}

/// Reads what may stand behind the end of an answer, so that its connection can be used again.
async fn read_out(mut pieces: Pieces) {
    let reading = async {
        let mut left = MOST_LEFT_BYTES;
        while let Some(Ok(piece)) = pieces.next().await {
            left = left.saturating_sub(piece.len());
            if left == 0 {
                return;
            }
        }
    };
    // Whatever it is that does not end, its connection is given up.
    let _ = tokio::time::timeout(LEFT_TIMEOUT, reading).await;
}

/// The first byte of an answer that is neither white space nor a byte order mark.
fn first_sign(bytes: &[u8]) -> Option<u8> {
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
    bytes.iter().find(|byte| !byte.is_ascii_whitespace()).copied()
}
