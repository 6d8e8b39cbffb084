//! Server-sent events, written and read incrementally.
//!
//! The decoder is fed bytes as they arrive, split anywhere, and yields frames that borrow
//! from its buffer, with the raw bytes beside the parsed fields: a relay passes the raw bytes
//! on and looks only at what it needs. It does not know what events mean. Lines end with LF,
//! CRLF or CR, and a byte order mark before the first one is skipped, as the standard says.
//! Between the daemons an event must be valid UTF-8; of engines, whose tokens may be half a
//! character, a [`Decoder::lossy`] one takes what browsers would.

use std::borrow::Cow;

use memchr::memchr2;
use uuid::fmt::Hyphenated;

/// Longest frame that is read, bytes. A stream that exceeds it is broken off.
pub const MAX_FRAME_BYTES: usize = 1024 * 1024;

/// Between the daemons only: a comment before a token's frame with the number of all tokens of the
/// task so far and, comma-separated, the engine's ids of those since the frame before, where the
/// task may have to be continued from them.
pub const TOKEN_IDS: &str = "token-ids ";

/// Between the daemons only: a comment for a thought that is left out of the log. It is a token as
/// far as time and budgets go.
pub const UNLOGGED_THOUGHT: &str = "thought";

/// Between the daemons only: a comment for an event of the engine that brings nothing to read.
pub const ENGINE_WORKS: &str = "works";

/// Appends one frame. `data` must not hold a line break (JSON text never does).
pub fn write_frame(out: &mut Vec<u8>, id: Option<(&dyn std::fmt::Display, u64)>, event: &str, data: &str) {
    use std::io::Write;
    debug_assert!(!data.contains(['\n', '\r']), "event data holds a line break");
    if let Some((log, n)) = id {
        // Writing to a Vec cannot fail.
        let _ = writeln!(out, "id: {log}:{n}");
    }
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(event.as_bytes());
    out.extend_from_slice(b"\ndata: ");
    out.extend_from_slice(data.as_bytes());
    out.extend_from_slice(b"\n\n");
}

/// Appends the frame of a token or a thought, as relays know it without reading it. It is written
/// in pieces: to format it takes longer than all the rest.
pub fn write_token(out: &mut Vec<u8>, log: crate::LogId, index: u64, event: &str, text: &str) {
    let (mut id, mut number) = ([0; Hyphenated::LENGTH], itoa::Buffer::new());
    let (id, number) = (&*log.0.hyphenated().encode_lower(&mut id), number.format(index));
    for part in ["id: ", id, ":", number, "\nevent: ", event, "\ndata: {\"t\":"] {
        out.extend_from_slice(part.as_bytes());
    }
    // Writing to a Vec cannot fail, and a text is always JSON.
    let _ = serde_json::to_writer(&mut *out, text);
    for part in [",\"i\":", number, "}\n\n"] {
        out.extend_from_slice(part.as_bytes());
    }
}

/// Appends a comment, which readers of events never see.
pub fn write_comment(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(b": ");
    out.extend_from_slice(text.as_bytes());
    out.extend_from_slice(b"\n\n");
}

/// One frame: everything up to an empty line.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// All bytes of the frame, the closing empty line included.
    pub raw: &'a [u8],
    pub id: Option<&'a str>,
    /// `message` when the frame names none. Meaningful only where `data` is present.
    pub event: &'a str,
    /// Several data lines are joined with a line feed.
    pub data: Option<Cow<'a, str>>,
    /// The text of the last comment line.
    pub comment: Option<&'a str>,
    /// The last line whose field the standard does not know: readers of events pass it over.
    pub unknown: Option<&'a str>,
}

/// Why a byte stream is not an event stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SseError {
    #[error("an event is longer than {MAX_FRAME_BYTES} bytes")]
    TooLong,
    #[error("an event is not valid UTF-8")]
    NotUtf8,
}

/// Turns chunks of bytes into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes before this were yielded.
    start: usize,
    /// Bytes before this were searched for an empty line.
    searched: usize,
    /// What is not valid UTF-8 becomes U+FFFD.
    lossy: bool,
    /// The stream's first bytes were looked at.
    begun: bool,
}

/// What may stand before the first line.
pub const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

impl Decoder {
    pub fn new() -> Self {
        Self::default()
    }

    /// One that reads text that is not valid Unicode as browsers do.
    pub fn lossy() -> Self {
        Self { lossy: true, ..Self::default() }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.searched -= self.start;
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether bytes of an unfinished frame are held.
    pub fn has_partial_frame(&self) -> bool {
        self.start < self.buffer.len()
    }

    /// The next whole frame, if there is one.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, SseError> {
        if !self.begun {
            let held = &self.buffer[self.start..];
            if held.len() < BYTE_ORDER_MARK.len() && BYTE_ORDER_MARK.starts_with(held) {
                return Ok(None);
            }
            self.begun = true;
            if held.starts_with(BYTE_ORDER_MARK) {
                self.start += BYTE_ORDER_MARK.len();
                self.searched = self.start;
            }
        }
        let end = self.find_end();
        // Whether its end has come or not: how the bytes were cut decides nothing.
        if end.unwrap_or(self.buffer.len()) - self.start > MAX_FRAME_BYTES {
            return Err(SseError::TooLong);
        }
        let Some(end) = end else { return Ok(None) };
        Ok(Some(self.take(end)?))
    }

    /// What stands after the last whole frame when the stream has ended in order: a frame whose
    /// empty line was left out.
    pub fn last_frame(&mut self) -> Result<Option<Frame<'_>>, SseError> {
        if !self.has_partial_frame() {
            return Ok(None);
        }
        Ok(Some(self.take(self.buffer.len())?))
    }

    fn take(&mut self, mut end: usize) -> Result<Frame<'_>, SseError> {
        let start = self.start;
        // Asked first, because a lossy reading of what is valid takes several times as long.
        if self.lossy && std::str::from_utf8(&self.buffer[start..end]).is_err() {
            let text = String::from_utf8_lossy(&self.buffer[start..end]).into_owned();
            self.buffer.splice(start..end, text.bytes());
            end = start + text.len();
        }
        (self.start, self.searched) = (end, end);
        read_frame(&self.buffer[start..end])
    }

    /// The end of the first empty line at or after `start`.
    fn find_end(&mut self) -> Option<usize> {
        let mut searched = self.searched - self.start;
        let end = frame_end(&self.buffer[self.start..], &mut searched);
        self.searched = self.start + searched;
        end.map(|end| self.start + end)
    }
}

/// Where the frame ends with which `bytes` begin, its empty line included; nothing while that has not
/// come. What lies before `searched` was looked at the last time, which spares looking twice.
pub fn frame_end(bytes: &[u8], searched: &mut usize) -> Option<usize> {
    let mut at = *searched;
    while let Some(offset) = memchr2(b'\n', b'\r', &bytes[at..]) {
        let line_end = at + offset;
        let empty = bytes[..line_end].last().is_none_or(|before| matches!(before, b'\n' | b'\r'));
        at = line_end + 1;
        if bytes[line_end] == b'\r' {
            match bytes.get(at) {
                Some(b'\n') => at += 1,
                Some(_) => {}
                // The other half of a line end may come.
                None => {
                    *searched = line_end;
                    return None;
                }
            }
        }
        if empty {
            return Some(at);
        }
    }
    *searched = bytes.len();
    None
}

/// Reads one whole frame. Errors: [`SseError::NotUtf8`].
pub fn read_frame(raw: &[u8]) -> Result<Frame<'_>, SseError> {
    std::str::from_utf8(raw).map(|text| parse(raw, text)).map_err(|_| SseError::NotUtf8)
}

fn parse<'a>(raw: &'a [u8], text: &'a str) -> Frame<'a> {
    let mut frame = Frame { raw, id: None, event: "message", data: None, comment: None, unknown: None };
    let mut rest = text;
    while !rest.is_empty() {
        let line_end = memchr2(b'\n', b'\r', rest.as_bytes());
        let (line, behind) = line_end.map_or((rest, ""), |end| (&rest[..end], &rest[end + 1..]));
        rest = behind;
        // The two halves of a CRLF are an empty line between them, which says nothing inside a frame.
        if line.is_empty() {
            continue;
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "" => frame.comment = Some(value),
            "id" => frame.id = Some(value),
            "event" => frame.event = value,
            "retry" => {}
            "data" => match &mut frame.data {
                None => frame.data = Some(Cow::Borrowed(value)),
                Some(before) => {
                    let text = before.to_mut();
                    text.push('\n');
                    text.push_str(value);
                }
            },
            _ => frame.unknown = Some(line),
        }
    }
    frame
}

/// Splits `<log id>:<n>` as it stands in the `id` of a frame and in `Last-Event-ID`.
pub fn parse_event_id(id: &str) -> Option<(crate::LogId, u64)> {
    let (log, n) = id.rsplit_once(':')?;
    Some((log.parse().ok()?, n.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A frame as it was meant, for comparison.
    #[derive(Debug, Clone, PartialEq, Eq)]
    struct Owned {
        id: Option<String>,
        event: String,
        data: Option<String>,
        comment: Option<String>,
    }

    fn decode(chunks: &[&[u8]]) -> (Vec<Owned>, Vec<u8>) {
        let mut decoder = Decoder::new();
        let (mut frames, mut raw) = (Vec::new(), Vec::new());
        for chunk in chunks {
            decoder.push(chunk);
            while let Some(frame) = decoder.next_frame().unwrap() {
                raw.extend_from_slice(frame.raw);
                frames.push(Owned {
                    id: frame.id.map(Into::into),
                    event: frame.event.into(),
                    data: frame.data.map(Into::into),
                    comment: frame.comment.map(Into::into),
                });
            }
        }
        (frames, raw)
    }

    #[test]
    fn several_data_lines_are_one_text_and_crlf_is_a_line_end() {
        let (frames, _) = decode(&[b"event: x\r\ndata: a\r\ndata:b\r\n\r\n: ka\n\n"]);
        assert_eq!(frames[0].event, "x");
        assert_eq!(frames[0].data.as_deref(), Some("a\nb"));
        assert_eq!(frames[1].comment.as_deref(), Some("ka"));
        assert_eq!(frames[1].data, None);
    }

    // CLOUD-1608
    #[test]
    fn a_frame_without_end_is_bounded() {
        let mut decoder = Decoder::new();
        decoder.push(&vec![b'x'; MAX_FRAME_BYTES + 1]);
        assert_eq!(decoder.next_frame(), Err(SseError::TooLong));
    }

    // CLOUD-1608
    #[test]
    fn a_frame_that_arrives_whole_is_bounded_too() {
        let mut decoder = Decoder::new();
        decoder.push(&vec![b'x'; MAX_FRAME_BYTES - 2]);
        decoder.push(b"\n\n: next\n\n");
        assert_eq!(decoder.next_frame().map(|frame| frame.is_some()), Ok(true));
        assert_eq!(decoder.next_frame().map(|frame| frame.is_some()), Ok(true));
        decoder.push(&vec![b'x'; MAX_FRAME_BYTES - 1]);
        decoder.push(b"\n\n");
        assert_eq!(decoder.next_frame(), Err(SseError::TooLong));
        assert_eq!(decoder.next_frame(), Err(SseError::TooLong));
    }

    // CLOUD-1607
    #[test]
    fn a_byte_order_mark_is_skipped_once_wherever_it_is_split() {
        let bytes = b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n";
        for split in 0..bytes.len() {
            let (frames, _) = decode(&[&bytes[..split], &bytes[split..]]);
            assert_eq!(frames[0].data.as_deref(), Some("a"), "{split}");
            assert_eq!(frames[1].data, None, "{split}: anywhere else it is a part of the line");
        }
    }

    // CLOUD-1607
    #[test]
    fn a_lone_carriage_return_ends_a_line() {
        let bytes = b"event: x\rdata: a\r\rdata: b\r\n\rdata: c\n\r\n";
        for split in 0..bytes.len() {
            let (frames, raw) = decode(&[&bytes[..split], &bytes[split..]]);
            let data: Vec<_> = frames.iter().filter_map(|frame| frame.data.as_deref()).collect();
            assert_eq!((data, frames[0].event.as_str()), (vec!["a", "b", "c"], "x"), "{split}");
            assert_eq!(raw, bytes, "{split}");
        }
    }

    // CLOUD-1607
    #[test]
    fn a_last_event_without_its_empty_line_is_there_at_an_orderly_end() {
        for end in ["data: b", "data: b\n", "data: b\r\n", "data: b\r"] {
            let mut decoder = Decoder::new();
            decoder.push(format!("data: a\n\n{end}").as_bytes());
            assert!(decoder.next_frame().unwrap().is_some());
            assert_eq!(decoder.next_frame().unwrap(), None, "{end:?}");
            let last = decoder.last_frame().unwrap().expect("a frame");
            assert_eq!(last.data.as_deref(), Some("b"), "{end:?}");
            assert_eq!(decoder.last_frame().unwrap(), None, "{end:?}");
        }
    }

    // CLOUD-1607
    #[test]
    fn a_line_of_no_known_field_is_shown_and_changes_nothing() {
        let mut decoder = Decoder::new();
        decoder.push(b"retry: 5\nerror: {}\ndata: a\n\n");
        let frame = decoder.next_frame().unwrap().unwrap();
        assert_eq!((frame.unknown, frame.data.as_deref()), (Some("error: {}"), Some("a")));
    }

    // CLOUD-1607
    #[test]
    fn a_lossy_reader_replaces_what_is_no_text_and_keeps_the_rest() {
        let mut decoder = Decoder::lossy();
        decoder.push(b"data: a\xf0\x9f\n\ndata: \x98\x80b\n\ndata: \xc3\xa4\n\n");
        let mut texts = Vec::new();
        while let Some(frame) = decoder.next_frame().unwrap() {
            texts.push(frame.data.unwrap().into_owned());
        }
        assert_eq!(texts, ["a\u{fffd}", "\u{fffd}\u{fffd}b", "\u{e4}"]);
    }

    // CLOUD-1608
    #[test]
    fn bytes_that_are_no_text_are_refused() {
        let mut decoder = Decoder::new();
        decoder.push(b"data: \xff\xfe\n\n");
        assert_eq!(decoder.next_frame(), Err(SseError::NotUtf8));
    }

    #[test]
    fn an_event_id_is_a_log_and_a_number() {
        let id = "6b1a4e0c-4f0c-8d2e-9a3b-000000000001:17";
        let (log, n) = parse_event_id(id).unwrap();
        assert_eq!((format!("{log}:{n}").as_str(), n), (id, 17));
        for bad in [
            "",
            ":",
            "x:1",
            "6b1a4e0c-4f0c-8d2e-9a3b-000000000001",
            "6b1a4e0c-4f0c-8d2e-9a3b-000000000001:-1",
        ] {
            assert_eq!(parse_event_id(bad), None, "{bad}");
        }
    }

    proptest! {
        // CLOUD-1607
        #[test]
        fn what_was_written_is_read_at_every_split_point(
            texts in prop::collection::vec("[ -~äß€😀]{0,24}", 1..5),
            crlf in any::<bool>(),
        ) {
            let log = crate::LogId(uuid::Uuid::from_u128(7));
            let mut bytes = Vec::new();
            let mut expected = Vec::new();
            for (n, text) in texts.iter().enumerate() {
                let data = serde_json::to_string(text).unwrap();
                write_frame(&mut bytes, Some((&log, n as u64)), "token", &data);
                expected.push(Owned {
                    id: Some(format!("{log}:{n}")), event: "token".into(), data: Some(data), comment: None,
                });
                write_comment(&mut bytes, "ka");
                expected.push(Owned {
                    id: None, event: "message".into(), data: None, comment: Some("ka".into()),
                });
            }
            if crlf {
                bytes = String::from_utf8(bytes).unwrap().replace('\n', "\r\n").into_bytes();
            }
            for split in 0..=bytes.len() {
                let (frames, raw) = decode(&[&bytes[..split], &bytes[split..]]);
                prop_assert_eq!(&frames, &expected);
                prop_assert_eq!(&raw, &bytes);
            }
            let single: Vec<&[u8]> = bytes.chunks(1).collect();
            prop_assert_eq!(decode(&single).0, expected);
        }

        // CLOUD-1607
        #[test]
        fn no_bytes_make_the_decoder_panic(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..8)) {
            let mut decoder = Decoder::new();
            for chunk in &chunks {
                decoder.push(chunk);
                while let Ok(Some(_)) = decoder.next_frame() {}
            }
        }
    }
}
