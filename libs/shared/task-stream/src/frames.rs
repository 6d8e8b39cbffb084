//! The bytes of one attempt's stream, cut into frames.
//!
//! Bytes are copied once, out of the connection's buffer into blocks of the attempt's own: a piece
//! of a connection's buffer, kept in a log, would keep the whole buffer (8 KiB and more for a token
//! of 100 bytes). From then on they are shared: a run of frames leaves as one [`Bytes`].

use bytes::{Buf, Bytes, BytesMut};
use pool_registry_types::sse::{BYTE_ORDER_MARK, Frame, MAX_FRAME_BYTES, SseError, frame_end, read_frame};

use crate::shape::TokenShape;

/// Bytes of a block; some dozens of tokens share one allocation.
const BLOCK_BYTES: usize = 4 * 1024;

/// Whole frames at its front that belong together, then what was not looked at yet.
#[derive(Debug, Default)]
pub(crate) struct FrameBuffer {
    bytes: BytesMut,
    /// Bytes of the frames at the front that are kept.
    run: usize,
    /// Bytes behind those that were searched for the end of a frame.
    searched: usize,
    /// The stream's first bytes were looked at.
    begun: bool,
}

impl FrameBuffer {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        if self.bytes.capacity() == 0 {
            // What is allocated later, once this is used up, is as large.
            self.bytes.reserve(BLOCK_BYTES);
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The length of the next frame, where it is a token's with this number and written as nodes write it;
    /// it is then kept. Where it is not, [`FrameBuffer::frame`] says what there is, also of one that comes in
    /// pieces: it is not looked at anew with each.
    pub(crate) fn token(&self, shape: &TokenShape, index: u64) -> Option<usize> {
        if !self.begun || self.searched > 0 {
            return None;
        }
        shape.len_at(&self.bytes[self.run..], index)
    }

    /// The next whole frame, if there is one; it is then kept or skipped.
    pub(crate) fn frame(&mut self) -> Result<Option<Frame<'_>>, SseError> {
        if !self.begun {
            if self.bytes.len() < BYTE_ORDER_MARK.len() && BYTE_ORDER_MARK.starts_with(&self.bytes) {
                return Ok(None);
            }
            self.begun = true;
            if self.bytes.starts_with(BYTE_ORDER_MARK) {
                self.bytes.advance(BYTE_ORDER_MARK.len());
            }
        }
        let rest = &self.bytes[self.run..];
        let end = frame_end(rest, &mut self.searched);
        // Whether its end has come or not: how the bytes were cut decides nothing.
        if end.unwrap_or(rest.len()) > MAX_FRAME_BYTES {
            return Err(SseError::TooLong);
        }
        end.map(|end| read_frame(&rest[..end])).transpose()
    }

    /// The frame of `len` bytes joins the run. Returns the length of the run.
    pub(crate) fn keep(&mut self, len: usize) -> usize {
        self.searched = 0;
        self.run += len;
        self.run
    }

    /// The frame of `len` bytes is left out. The run before it must have been taken.
    pub(crate) fn skip(&mut self, len: usize) {
        debug_assert_eq!(self.run, 0, "a frame is skipped behind a run that was not taken");
        self.searched = 0;
        self.bytes.advance(len);
    }

    /// What comes next is another stream: what was not taken of this one is left. A run must have been
    /// taken.
    pub(crate) fn restart(&mut self) {
        debug_assert_eq!(self.run, 0, "a run that was not taken is left");
        self.bytes.clear();
        (self.searched, self.begun) = (0, false);
    }

    /// The run, which begins anew.
    pub(crate) fn take_run(&mut self) -> Bytes {
        self.bytes.split_to(std::mem::take(&mut self.run)).freeze()
    }
}

#[cfg(test)]
mod tests {
    use pool_registry_types::sse::Decoder;
    use proptest::prelude::*;

    use super::*;

    /// Frames as the shared decoder sees them, and whether the stream was good.
    fn expected(bytes: &[u8]) -> (Vec<Vec<u8>>, bool) {
        let (mut decoder, mut frames) = (Decoder::new(), Vec::new());
        decoder.push(bytes);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame.raw.to_vec()),
                Ok(None) => return (frames, true),
                Err(_) => return (frames, false),
            }
        }
    }

    proptest! {
        // CLOUD-1607
        #[test]
        fn frames_are_the_decoders_wherever_their_bytes_are_split(
            pieces in prop::collection::vec(
                prop_oneof![
                    Just("data: a\n\n"), Just("\n"), Just("\r"), Just("\r\n\r\n"), Just(": ka\n\n"),
                    Just("id: x:1\ndata: ß\r\n\r\n"), Just("data: half"), Just("\u{feff}"),
                ],
                0..12,
            ),
            cuts in prop::collection::vec(0_usize..80, 0..4),
            kept in any::<u32>(),
        ) {
            let bytes = pieces.concat().into_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|at| at.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut buffer = FrameBuffer::default();
            let (mut frames, mut good, mut runs) = (Vec::new(), true, Vec::new());
            for cut in cuts.windows(2) {
                buffer.push(&bytes[cut[0]..cut[1]]);
                while good {
                    let raw = match buffer.frame() {
                        Ok(Some(frame)) => frame.raw.to_vec(),
                        Ok(None) => break,
                        Err(_) => { good = false; break }
                    };
                    if kept >> (frames.len() % 32) & 1 == 1 {
                        buffer.keep(raw.len());
                    } else {
                        runs.push(buffer.take_run());
                        buffer.skip(raw.len());
                    }
                    frames.push(raw);
                }
            }
            runs.push(buffer.take_run());
            let kept: Vec<u8> = frames.iter().enumerate()
                .filter(|(n, _)| kept >> (n % 32) & 1 == 1).flat_map(|(_, raw)| raw.clone()).collect();
            prop_assert_eq!((frames, good), expected(&bytes));
            prop_assert_eq!(runs.concat(), kept);
        }
    }

    // CLOUD-1608
    #[test]
    fn a_frame_without_end_is_bounded() {
        let mut buffer = FrameBuffer::default();
        buffer.push(&vec![b'x'; MAX_FRAME_BYTES + 1]);
        assert_eq!(buffer.frame(), Err(SseError::TooLong));
    }
}
