//! One record of the link, and how it is written.
//!
//! A record is a header of [`HEADER_BYTES`] and its bytes; all numbers are unsigned and big-endian:
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 4 | length of what follows this field: 22 and the record's own bytes |
//! | 4 | 1 | kind |
//! | 5 | 1 | flags: bit 0, more parts of the same follow; a reader ignores the others |
//! | 6 | 8 | number of the attempt; 0 where the record is the link's own |
//! | 14 | 8 | first: the index of its first frame, or what its kind says |
//! | 22 | 4 | count of what it brings |
//! | 26 | … | its own bytes |
//!
//! A kind that is not known is skipped by its length. A newer writer may add flags, kinds, bytes behind
//! what a kind has, and fields to its JSON; it may not change what stands here.

use bytes::Bytes;

/// Bytes before a record's own.
pub const HEADER_BYTES: usize = 26;
/// Bytes of the field that says how long the rest is.
pub(super) const LENGTH_BYTES: usize = 4;
/// Most bytes of its own that a record has, of any kind. Source: .specs/01 CLOUD-2601.
pub const MAX_RECORD_BYTES: usize = 64 * 1024;
/// Most bytes of parts that belong together: an event that is passed on, which is longer than any frame of
/// ours and the comments before it.
pub const MAX_WHOLE_BYTES: usize = 8 * 1024 * 1024;
/// The flag of a part that is not the last.
const MORE: u8 = 1;

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The first record of a link: who writes it.
    Hello,
    /// The node has the attempt.
    Accepted,
    /// The node does not take the attempt.
    Refused,
    /// Status and headers of an answer that is passed on as the engine gave it.
    Head,
    /// Whole frames with the comments before them: `count` from `first` on. Of a body that is no event
    /// stream both are bytes.
    Frames,
    /// The ids of the tokens of `count` frames from `first` on, which follow.
    TokenIds,
    /// Why the attempt ended without a final frame.
    Error,
    /// The attempt is over, `first` being the index behind its last frame.
    End,
    /// The attempts that run, and how far each has come.
    Alive,
    /// The node closes the link.
    Bye,
}

impl Kind {
    pub const ALL: [Self; 10] = [
        Self::Hello,
        Self::Accepted,
        Self::Refused,
        Self::Head,
        Self::Frames,
        Self::TokenIds,
        Self::Error,
        Self::End,
        Self::Alive,
        Self::Bye,
    ];

    /// As it stands on the wire.
    pub const fn number(self) -> u8 {
        match self {
            Self::Hello => 1,
            Self::Accepted => 2,
            Self::Refused => 3,
            Self::Head => 4,
            Self::Frames => 5,
            Self::TokenIds => 6,
            Self::Error => 7,
            Self::End => 8,
            Self::Alive => 9,
            Self::Bye => 10,
        }
    }

    /// Nothing for a kind of a newer writer.
    pub fn of(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.number() == number)
    }
}

/// All of a record but its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHead {
    pub kind: Kind,
    /// More parts of the same follow.
    pub more: bool,
    /// The number of the attempt; 0 where it is the link's own.
    pub number: u64,
    pub first: u64,
    pub count: u32,
}

impl RecordHead {
    /// Of a whole record.
    pub const fn new(kind: Kind, number: u64, first: u64, count: u32) -> Self {
        Self { kind, more: false, number, first, count }
    }

    /// Appends the record. What is longer than a record may be is written in parts, of at most `part`
    /// bytes each. The bytes are copied once. Errors: it is longer than a reader joins.
    pub fn write(self, out: &mut Vec<u8>, bytes: &[u8], part: usize) -> Result<(), RecordError> {
        let part = part.clamp(1, MAX_RECORD_BYTES);
        if bytes.len() > MAX_WHOLE_BYTES {
            return Err(RecordError::TooLong(bytes.len() as u64));
        }
        if bytes.len() <= part {
            self.append(out, bytes);
            return Ok(());
        }
        out.reserve(bytes.len() + bytes.len().div_ceil(part) * HEADER_BYTES);
        let mut parts = bytes.chunks(part).peekable();
        while let Some(bytes) = parts.next() {
            let more = self.more || parts.peek().is_some();
            Self { more, ..self }.append(out, bytes);
        }
        Ok(())
    }

    /// Appends the record as it is. Errors: it has more than [`MAX_RECORD_BYTES`].
    pub fn write_one(self, out: &mut Vec<u8>, bytes: &[u8]) -> Result<(), RecordError> {
        if bytes.len() > MAX_RECORD_BYTES {
            return Err(RecordError::TooLong(bytes.len() as u64));
        }
        self.append(out, bytes);
        Ok(())
    }

    /// The same of what is short by its kind, or was cut.
    pub(crate) fn write_short(self, out: &mut Vec<u8>, bytes: &[u8]) {
        self.write_one(out, bytes).expect("it is short by its kind, or was cut");
    }

    fn append(self, out: &mut Vec<u8>, bytes: &[u8]) {
        out.extend_from_slice(&self.header(bytes.len()));
        out.extend_from_slice(bytes);
    }

    fn header(self, bytes: usize) -> [u8; HEADER_BYTES] {
        let length = u32::try_from(HEADER_BYTES - LENGTH_BYTES + bytes).unwrap_or(u32::MAX);
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&length.to_be_bytes());
        header[4] = self.kind.number();
        header[5] = if self.more { MORE } else { 0 };
        header[6..14].copy_from_slice(&self.number.to_be_bytes());
        header[14..22].copy_from_slice(&self.first.to_be_bytes());
        header[22..].copy_from_slice(&self.count.to_be_bytes());
        header
    }

    /// Reads a header behind its length. Nothing for a kind of a newer writer.
    pub(super) fn read(header: [u8; HEADER_BYTES - LENGTH_BYTES]) -> Option<Self> {
        let [kind, flags, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t] = header;
        Some(Self {
            kind: Kind::of(kind)?,
            more: flags & MORE != 0,
            number: u64::from_be_bytes([a, b, c, d, e, f, g, h]),
            first: u64::from_be_bytes([i, j, k, l, m, n, o, p]),
            count: u32::from_be_bytes([q, r, s, t]),
        })
    }
}

/// A record as it was read: its bytes are shared with what it was read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub head: RecordHead,
    pub bytes: Bytes,
}

/// Why bytes are no records. The link that they came by is of no more use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("a record of {0} bytes is longer than one may be")]
    TooLong(u64),
    #[error("a record is shorter than its header")]
    TooShort,
}
