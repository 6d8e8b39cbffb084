//! Bytes of a link, cut anywhere, into records.
//!
//! What lies in one piece as it came is handed out as a slice of that piece, and copied only where a
//! record was cut. A length is checked before anything is set aside for it, and no more is held than one
//! record and the piece that came last.

use std::collections::VecDeque;

use bytes::{Buf, Bytes};

use super::record::{HEADER_BYTES, LENGTH_BYTES, MAX_RECORD_BYTES, Record, RecordError, RecordHead};

/// Bytes of a header behind its length.
const REST_BYTES: u32 = 22;

/// Turns pieces of bytes into records.
#[derive(Debug, Default)]
pub struct RecordDecoder {
    pieces: VecDeque<Bytes>,
    /// Bytes of all of them.
    held: usize,
    /// The record whose header was read, and how many bytes it has of its own; no head for one that is
    /// skipped.
    open: Option<(Option<RecordHead>, usize)>,
    /// What came is no sequence of records.
    broken: Option<RecordError>,
    skipped: u64,
}

impl RecordDecoder {
    pub fn new() -> Self {
        Self::default()
    }

    /// The next bytes of the link. All records that are whole are to be taken before more is given.
    pub fn push(&mut self, bytes: Bytes) {
        if self.broken.is_none() && !bytes.is_empty() {
            self.held += bytes.len();
            self.pieces.push_back(bytes);
        }
    }

    /// Bytes that came and were not handed out.
    pub fn held_bytes(&self) -> usize {
        self.held
    }

    /// Records of kinds that are not known, so far.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// The next whole record. An error is the link's end, and stays.
    pub fn next_record(&mut self) -> Result<Option<Record>, RecordError> {
        if let Some(error) = self.broken {
            return Err(error);
        }
        self.read().inspect_err(|error| {
            self.broken = Some(*error);
            self.pieces.clear();
            self.held = 0;
        })
    }

    fn read(&mut self) -> Result<Option<Record>, RecordError> {
        loop {
            let (head, length) = match self.open {
                Some(open) => open,
                None => {
                    let Some(open) = self.read_header()? else { return Ok(None) };
                    self.open = Some(open);
                    open
                }
            };
            let Some(head) = head else {
                let gone = length.min(self.held);
                self.skip(gone);
                if gone < length {
                    self.open = Some((None, length - gone));
                    return Ok(None);
                }
                self.open = None;
                self.skipped += 1;
                continue;
            };
            if self.held < length {
                return Ok(None);
            }
            self.open = None;
            return Ok(Some(Record { head, bytes: self.take(length) }));
        }
    }

    fn read_header(&mut self) -> Result<Option<(Option<RecordHead>, usize)>, RecordError> {
        let mut header = [0; HEADER_BYTES];
        let seen = self.peek(&mut header);
        let [a, b, c, d, rest @ ..] = header;
        if seen >= LENGTH_BYTES {
            // Before the rest has come: a stranger's bytes are known as such at once.
            let length = u32::from_be_bytes([a, b, c, d]);
            let Some(own) = length.checked_sub(REST_BYTES) else {
                return Err(RecordError::TooShort);
            };
            let bytes = usize::try_from(own).unwrap_or(usize::MAX);
            if bytes > MAX_RECORD_BYTES {
                return Err(RecordError::TooLong(u64::from(own)));
            }
            if seen == HEADER_BYTES {
                self.skip(HEADER_BYTES);
                return Ok(Some((RecordHead::read(rest), bytes)));
            }
        }
        Ok(None)
    }

    /// Copies what is there of the next bytes. Returns how many.
    fn peek(&self, out: &mut [u8; HEADER_BYTES]) -> usize {
        let mut seen = 0;
        for piece in &self.pieces {
            let more = piece.len().min(HEADER_BYTES - seen);
            out[seen..seen + more].copy_from_slice(&piece[..more]);
            seen += more;
            if seen == HEADER_BYTES {
                break;
            }
        }
        seen
    }

    fn skip(&mut self, mut bytes: usize) {
        self.held -= bytes;
        while let Some(piece) = self.pieces.front_mut() {
            let gone = piece.len().min(bytes);
            piece.advance(gone);
            bytes -= gone;
            if !piece.is_empty() {
                return;
            }
            self.pieces.pop_front();
        }
    }

    /// The next `length` bytes, which are there: shared where they are in one piece.
    fn take(&mut self, length: usize) -> Bytes {
        let whole = match self.pieces.front_mut() {
            Some(piece) if piece.len() >= length => piece.split_to(length),
            _ => {
                let mut joined = Vec::with_capacity(length);
                for piece in &self.pieces {
                    let more = piece.len().min(length - joined.len());
                    joined.extend_from_slice(&piece[..more]);
                }
                self.skip(length);
                return joined.into();
            }
        };
        self.held -= length;
        if self.pieces.front().is_some_and(Bytes::is_empty) {
            self.pieces.pop_front();
        }
        whole
    }
}
