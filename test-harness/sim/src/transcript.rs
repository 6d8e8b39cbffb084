//! What a client has read of one stream, and whether it is one stream.
//!
//! Simulated nodes write into each token which attempt made it, on which node and in which place. A
//! [`Transcript`] holds that against the attempts that were given the log: each goes on exactly
//! where it was to begin, announced by its `started`, and none comes back after another.

use pool_registry_types::sse::{Decoder, Frame, parse_event_id, write_comment, write_frame};
use pool_registry_types::task::Started;
use pool_registry_types::{AttemptId, ErrorBody, LogId, NodeId};
use serde_json::Value;
use task_stream::TaskLog;

use crate::oracle::Broken;

/// An attempt that may write to a log.
#[derive(Debug, Clone)]
pub(crate) struct Writer {
    pub(crate) attempt: AttemptId,
    pub(crate) node_id: NodeId,
    pub(crate) first_index: u64,
    pub(crate) number: u32,
}

/// What was read of one log.
#[derive(Debug, Default)]
pub(crate) struct Transcript {
    pub(crate) log: Option<LogId>,
    decoder: Decoder,
    /// The index of the next frame.
    pub(crate) next: u64,
    /// Frames before a terminal one.
    pub(crate) tokens: u64,
    /// Bytes of all frames but the control plane's own terminal one.
    pub(crate) bytes: usize,
    /// Who wrote the last token, as a place among the writers.
    writer: Option<usize>,
    /// The last attempt that was announced.
    announced: Option<u32>,
    pub(crate) terminal: Option<String>,
}

impl Transcript {
    /// Of a log that is known already.
    pub(crate) fn of(log: LogId) -> Self {
        Self { log: Some(log), ..Self::default() }
    }

    /// Reads on, at most so many bytes but one frame. Returns whether there was anything.
    pub(crate) fn read(&mut self, log: &TaskLog, at_most: usize, writers: &[Writer]) -> Result<bool, Broken> {
        if *self.log.get_or_insert(log.id()) != log.id() {
            return Err("a reader goes on in another log".into());
        }
        let read = log.read_from(self.next, at_most);
        let (was, upto) = (self.next, read.next);
        read.pieces().for_each(|piece| self.decoder.push(piece));
        let mut decoder = std::mem::take(&mut self.decoder);
        while let Some(frame) = decoder.next_frame().map_err(|error| format!("[3] {error}"))? {
            self.take(&frame, writers)?;
        }
        self.decoder = decoder;
        if self.decoder.has_partial_frame() || self.next != upto {
            return Err(format!("[3] a reader has {} frames of {upto}", self.next));
        }
        Ok(upto > was)
    }

    fn take(&mut self, frame: &Frame<'_>, writers: &[Writer]) -> Result<(), Broken> {
        let data = frame.data.as_deref().ok_or("[3] a comment in a log")?;
        if let Some(terminal) = &self.terminal {
            return Err(format!("[2] {} after the terminal {terminal:?}", frame.event));
        }
        self.bytes += if frame.event == "error" { 0 } else { frame.raw.len() };
        if frame.event == "started" {
            let started: Started = serde_json::from_str(data).map_err(|error| error.to_string())?;
            self.announced = Some(started.attempt);
            return Ok(());
        }
        let id = frame.id.and_then(parse_event_id).ok_or("[3] a frame without an id")?;
        if Some(id.0) != self.log || id.1 != self.next {
            return Err(format!("[3] frame {:?} where {} was next", frame.id, self.next));
        }
        self.next += 1;
        match frame.event {
            "token" => self.token(id.1, data, writers),
            "end" => {
                self.terminal = Some("end".into());
                Ok(())
            }
            "error" => {
                let error: ErrorBody = serde_json::from_str(data).map_err(|error| error.to_string())?;
                self.terminal = Some(format!("error {}", error.code));
                Ok(())
            }
            other => Err(format!("[3] an event {other:?} in a log")),
        }
    }

    fn token(&mut self, index: u64, data: &str, writers: &[Writer]) -> Result<(), Broken> {
        let value: Value = serde_json::from_str(data).map_err(|error| error.to_string())?;
        let made = value["t"].as_str().unwrap_or_default();
        let (attempt, node) = made.split_once(' ').unwrap_or_default();
        let by = writers.iter().rposition(|writer| writer.attempt.to_string() == attempt);
        let by = by.ok_or_else(|| format!("[3] token {index} of a foreign attempt: {made:?}"))?;
        let writer = &writers[by];
        if writer.node_id.as_str() != node || value["i"].as_u64() != Some(index) {
            return Err(format!("[3] token {index} is {data}"));
        }
        if self.writer != Some(by) {
            let is_later = self.writer.is_none_or(|before| before < by);
            if !is_later || writer.first_index != index || self.announced != Some(writer.number) {
                return Err(format!(
                    "[3] a splice: token {index} is of {writer:?}, announced {:?}, after {:?}",
                    self.announced,
                    self.writer.map(|before| &writers[before])
                ));
            }
            self.writer = Some(by);
        }
        self.tokens += 1;
        Ok(())
    }
}

/// The frame of a token, with its engine's id of it where it may have to be continued from that, and
/// longer by so many bytes.
pub(crate) fn token(
    log: LogId,
    attempt: AttemptId,
    node_id: &NodeId,
    index: u64,
    with_id: bool,
    pad: usize,
) -> Vec<u8> {
    let mut frame = Vec::with_capacity(192);
    if with_id {
        write_comment(&mut frame, &format!("token-ids {} {index}", index + 1));
    }
    let mut data = format!("{{\"t\":\"{attempt} {node_id}\",\"i\":{index}}}");
    if pad > 0 {
        data.pop();
        data = format!("{data},\"p\":\"{}\"}}", "x".repeat(pad));
    }
    write_frame(&mut frame, Some((&log, index)), "token", &data);
    frame
}

#[cfg(test)]
mod tests {
    use task_stream::Segment;
    use uuid::Uuid;

    use super::*;

    const LOG: LogId = LogId(Uuid::from_u128(7));

    fn writer(n: u32, first_index: u64) -> Writer {
        let node_id = NodeId::new(&format!("n{n}")).unwrap();
        Writer { attempt: AttemptId(Uuid::from_u128(u128::from(n))), node_id, first_index, number: n }
    }

    /// What a reader finds who is given one token after another of these writers.
    fn read(tokens: &[u32], writers: &[Writer]) -> Result<bool, Broken> {
        let mut log = TaskLog::new(LOG);
        let mut last = None;
        for (index, n) in (0..).zip(tokens) {
            let mut bytes = Vec::new();
            if last != Some(n) {
                let started = format!(
                    r#"{{"task_id":"{LOG}","queue_wait_ms":0,"node_id":"n{n}","pool_id":"p","replica_id":"r","attempt":{n}}}"#
                );
                write_frame(&mut bytes, None, "started", &started);
                if let Some(before) = last {
                    log.fence(writer(*before, 0).attempt);
                }
                log.open(writer(*n, 0).attempt);
            }
            last = Some(n);
            let by = writer(*n, 0);
            bytes.extend(token(LOG, by.attempt, &by.node_id, index, false, 0));
            log.append(by.attempt, Segment::frame(index, bytes.into())).unwrap();
        }
        Transcript::default().read(&log, usize::MAX, writers)
    }

    // CLOUD-1905
    #[test]
    fn tokens_of_two_attempts_are_a_splice_unless_one_goes_on_where_it_was_to() {
        let writers = [writer(1, 0), writer(2, 2), writer(3, 0)];
        assert_eq!(read(&[1, 1, 2, 2], &writers), Ok(true));
        assert_eq!(read(&[3, 3], &writers), Ok(true));
        for spliced in [&[1, 2][..], &[1, 1, 1, 2], &[1, 1, 2, 1], &[1, 3], &[2], &[1, 4]] {
            assert!(read(spliced, &writers).is_err(), "{spliced:?}");
        }
    }
}
