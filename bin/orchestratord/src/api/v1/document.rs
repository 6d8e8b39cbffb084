//! An engine's whole answer to a request for a stream, as one event.
//!
//! It stays in the log, where it is looked at, and goes from there to the client part by part: nobody has a
//! copy of all of it.

use std::io;

use bytes::Bytes;
use serde::de::IgnoredAny;
use task_stream::Read;

/// Before the document, which is the event's only line.
pub(super) const BEFORE: &[u8] = b"data: ";
/// Behind it.
pub(super) const BEHIND: &[u8] = b"\n\n";

/// Whether it is one JSON document, which can be an event's data.
pub(super) fn is_json(all: &Read) -> bool {
    let bytes = Pieces { pieces: all.pieces(), at: &[] };
    serde_json::from_reader::<_, IgnoredAny>(io::BufReader::new(bytes)).is_ok()
}

/// A part of it as a part of one line. A line end in JSON stands between two of its tokens.
pub(super) fn in_line(part: &Bytes) -> Bytes {
    if !part.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
        return part.clone();
    }
    part.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }).collect()
}

/// Reads pieces one behind the other.
struct Pieces<'b, I> {
    pieces: I,
    at: &'b [u8],
}

impl<'b, I: Iterator<Item = &'b Bytes>> io::Read for Pieces<'b, I> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.at.is_empty() {
            let Some(next) = self.pieces.next() else { return Ok(0) };
            self.at = next;
        }
        io::Read::read(&mut self.at, out)
    }
}

#[cfg(test)]
mod tests {
    use pool_registry_types::{AttemptId, LogId};
    use task_stream::{Segment, TaskLog};
    use uuid::Uuid;

    use super::*;

    fn all(pieces: &[&'static str]) -> Read {
        let (mut log, attempt) = (TaskLog::new(LogId(Uuid::nil())), AttemptId(Uuid::nil()));
        log.open(attempt);
        for (n, piece) in (0..).zip(pieces) {
            log.append(attempt, Segment::frame(n, Bytes::from_static(piece.as_bytes()))).unwrap();
        }
        log.read_from(0, usize::MAX)
    }

    // CLOUD-2856
    #[test]
    fn a_document_in_pieces_is_known_and_becomes_one_line() {
        assert!(is_json(&all(&[" {\"a\"", ":\n", "1.50}\r\n"])));
        for wrong in ["<html>", "{\"a\":", "{} {}", ""] {
            assert!(!is_json(&all(&[wrong])), "{wrong}");
        }
        assert_eq!(in_line(&Bytes::from_static(b"{\"a\":\r\n1.50}")), "{\"a\":  1.50}");
        let plain = Bytes::from_static(b"{\"a\": 1.50}");
        assert_eq!(in_line(&plain).as_ptr(), plain.as_ptr());
    }
}
