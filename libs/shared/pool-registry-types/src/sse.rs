//! Server-sent events, written and read incrementally.
//!
//! The decoder is fed bytes as they arrive, split anywhere, and yields frames that borrow
//! from its buffer, with the raw bytes beside the parsed fields: a relay passes the raw bytes
//! on and looks only at what it needs. It does not know what events mean. Lines end with LF
//! or CRLF (a lone CR, which the standard also allows, is written by none of the engines).

use std::borrow::Cow;

/// Longest frame that is read, bytes. A stream that exceeds it is broken off.
pub const MAX_FRAME_BYTES: usize = 1024 * 1024;

/// Between the daemons only: a comment before a token's frame with the number of all tokens of the
/// task so far and, comma-separated, the engine's ids of those since the frame before, where the
/// task may have to be continued from them.
pub const TOKEN_IDS: &str = "token-ids ";

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
}

impl Decoder {
    pub fn new() -> Self {
        Self::default()
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
        let end = self.find_end();
        // Whether its end has come or not: how the bytes were cut decides nothing.
        if end.unwrap_or(self.buffer.len()) - self.start > MAX_FRAME_BYTES {
            return Err(SseError::TooLong);
        }
        let Some(end) = end else { return Ok(None) };
        let raw = &self.buffer[self.start..end];
        self.start = end;
        self.searched = end;
        parse(raw).map(Some)
    }

    /// The end of the first empty line at or after `start`.
    fn find_end(&mut self) -> Option<usize> {
        let bytes = &self.buffer;
        let mut at = self.searched;
        while let Some(offset) = bytes[at..].iter().position(|b| *b == b'\n') {
            let newline = at + offset;
            let line = &bytes[self.start..newline];
            let empty = match line {
                [] | [b'\r'] => true,
                _ => line.ends_with(b"\n") || line.ends_with(b"\n\r"),
            };
            at = newline + 1;
            if empty {
                return Some(at);
            }
        }
        self.searched = at;
        None
    }
}

fn parse(raw: &[u8]) -> Result<Frame<'_>, SseError> {
    let text = std::str::from_utf8(raw).map_err(|_| SseError::NotUtf8)?;
    let mut frame = Frame { raw, id: None, event: "message", data: None, comment: None };
    for line in text.split('\n') {
        let line = line.strip_suffix('\r').unwrap_or(line);
        if line.is_empty() {
            continue;
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "" => frame.comment = Some(value),
            "id" => frame.id = Some(value),
            "event" => frame.event = value,
            "data" => match &mut frame.data {
                None => frame.data = Some(Cow::Borrowed(value)),
                Some(before) => {
                    let text = before.to_mut();
                    text.push('\n');
                    text.push_str(value);
                }
            },
            _ => {}
        }
    }
    Ok(frame)
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
