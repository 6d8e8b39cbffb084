//! What holds of every event stream: the frames do not depend on how the bytes arrive, and memory
//! and work are bounded by the longest frame and the length of the stream.

use pool_registry_types::sse::{Decoder, Frame, MAX_FRAME_BYTES, SseError, parse_event_id};

use crate::measure;

/// Decodes the stream in several ways, and panics where a property does not hold. `finest` is the
/// length of the smallest pieces.
pub fn check(bytes: &[u8], finest: usize) {
    let whole = decode(std::iter::once(bytes));
    assert_eq!(decode(bytes.chunks(finest)), whole, "the frames depend on the pieces");
    assert_eq!(decode(uneven(bytes, 16 * finest)), whole, "the frames depend on the pieces");

    // A byte order mark is no part of the first frame.
    let mut at = if bytes.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
    let mut longest = 0;
    for frame in &whole.frames {
        assert!(is_one_frame(&frame.raw), "{frame:?} is not one frame");
        assert!(frame.raw.len() <= MAX_FRAME_BYTES, "a frame of {} bytes", frame.raw.len());
        assert_eq!(frame.raw, bytes[at..at + frame.raw.len()], "what is relayed is not what came");
        at += frame.raw.len();
        longest = longest.max(frame.raw.len());
        if let Some((log, n)) = frame.id.as_deref().and_then(parse_event_id) {
            assert_eq!(parse_event_id(&format!("{log}:{n}")), Some((log, n)));
        }
    }
    if whole.end.is_ok() {
        let rest = bytes.get(at..).unwrap_or_default();
        longest = longest.max(rest.len());
        // A CR at the very end may be half of a line end.
        let rest = rest.strip_suffix(b"\r").unwrap_or(rest);
        assert!(!lines(rest).into_iter().any(is_empty), "a whole frame was held back");
    }
    longest = if whole.end.is_err() { MAX_FRAME_BYTES.min(bytes.len()) } else { longest };

    let ((), spent) = measure(|| {
        let mut decoder = Decoder::new();
        for piece in bytes.chunks(finest) {
            decoder.push(piece);
            while let Ok(Some(frame)) = decoder.next_frame() {
                std::hint::black_box(frame);
            }
        }
    });
    // Buffers double, and stand twice while they move: of the stream, and of several data lines.
    let most = 8 * (longest + finest) + 1024;
    assert!(spent.highest <= most, "{} bytes held for frames of {longest}", spent.highest);
    let most = 16 * bytes.len() + 1024;
    assert!(spent.taken <= most, "{} bytes allocated for {} bytes", spent.taken, bytes.len());
}

/// A frame that outlives its decoder.
#[derive(Debug, PartialEq, Eq)]
struct OwnedFrame {
    raw: Vec<u8>,
    id: Option<String>,
    event: String,
    data: Option<String>,
    comment: Option<String>,
}

impl From<Frame<'_>> for OwnedFrame {
    fn from(frame: Frame<'_>) -> Self {
        Self {
            raw: frame.raw.to_vec(),
            id: frame.id.map(str::to_owned),
            event: frame.event.to_owned(),
            data: frame.data.map(|data| data.into_owned()),
            comment: frame.comment.map(str::to_owned),
        }
    }
}

/// All frames, and what breaks the stream off.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    frames: Vec<OwnedFrame>,
    end: Result<(), SseError>,
}

fn decode<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Outcome {
    let mut decoder = Decoder::new();
    let mut frames = Vec::new();
    for piece in pieces {
        decoder.push(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(OwnedFrame::from(frame)),
                Ok(None) => break,
                Err(error) => return Outcome { frames, end: Err(error) },
            }
        }
    }
    Outcome { frames, end: Ok(()) }
}

/// Pieces of 1 to `most` bytes, their lengths drawn from the bytes themselves.
fn uneven(bytes: &[u8], most: usize) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    let mut state = 1_usize;
    std::iter::from_fn(move || {
        let first = *rest.first()?;
        state = state.wrapping_mul(31).wrapping_add(usize::from(first) + 7);
        let (piece, left) = rest.split_at((1 + state % most).min(rest.len()));
        rest = left;
        Some(piece)
    })
}

/// Lines with their ends: LF, CRLF or CR.
fn lines(bytes: &[u8]) -> Vec<&[u8]> {
    let (mut lines, mut rest) = (Vec::new(), bytes);
    while !rest.is_empty() {
        let line_end = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
        let end = line_end.map_or(rest.len(), |at| if rest[at..].starts_with(b"\r\n") { at + 2 } else { at + 1 });
        let (line, left) = rest.split_at(end);
        lines.push(line);
        rest = left;
    }
    lines
}

fn is_empty(line: &[u8]) -> bool {
    matches!(line, b"\n" | b"\r\n" | b"\r")
}

/// An empty line ends a frame, and there is none before.
fn is_one_frame(raw: &[u8]) -> bool {
    let mut lines = lines(raw);
    lines.pop().is_some_and(is_empty) && !lines.into_iter().any(is_empty)
}
