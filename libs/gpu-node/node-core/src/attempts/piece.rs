//! What a driver gives at a time: bytes, and where frames end in them.

use attempt_link::content::FrameTokens;
use bytes::Bytes;

use super::PIECE_BYTES;

/// Where frames end in the bytes of a piece.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ends {
    /// Of all frames but the last one; mostly none, which allocates nothing.
    inner: Vec<u32>,
    last: Option<u32>,
    /// Each byte is a frame: of an answer that is no event stream.
    each_byte: bool,
}

impl Ends {
    /// Of so many bytes, each of which is a frame.
    pub fn each_byte(bytes: usize) -> Self {
        let mut ends = Self { each_byte: true, ..Self::default() };
        if bytes > 0 {
            ends.push(bytes);
        }
        ends
    }

    /// One frame more ends at this byte.
    pub fn push(&mut self, end: usize) {
        let end = u32::try_from(end).expect("a piece is far below 4 GiB");
        self.inner.extend(self.last.replace(end));
    }

    pub fn frames(&self) -> u64 {
        if self.each_byte {
            return self.last.unwrap_or(0).into();
        }
        self.inner.len() as u64 + u64::from(self.last.is_some())
    }

    /// Where the first `frames` frames end.
    pub(super) fn end_of(&self, frames: u64) -> usize {
        if self.each_byte {
            return usize::try_from(frames.min(self.frames())).unwrap_or(usize::MAX);
        }
        let Some(index) = frames.checked_sub(1).and_then(|index| usize::try_from(index).ok()) else {
            return 0;
        };
        self.inner.get(index).copied().or(self.last).unwrap_or(0) as usize
    }

    /// Only the first `frames` frames are left.
    pub(super) fn truncate(&mut self, frames: u64) {
        if self.each_byte {
            return *self = Self::each_byte(self.end_of(frames));
        }
        let Some(inner) = frames.checked_sub(1).and_then(|inner| usize::try_from(inner).ok()) else {
            return *self = Self::default();
        };
        if let Some(last) = self.inner.get(inner).copied() {
            self.inner.truncate(inner);
            self.last = Some(last);
        }
    }

    /// The frames that end up to this byte.
    pub(super) fn frames_within(&self, bytes: usize) -> u64 {
        if self.each_byte {
            return self.frames().min(bytes as u64);
        }
        let is_within = |end: &u32| *end as usize <= bytes;
        self.inner.partition_point(is_within) as u64 + u64::from(self.last.as_ref().is_some_and(is_within))
    }
}

/// Bytes that came together: whole frames, each with the comments before it, and comments that
/// belong to the frame that comes next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub(super) first: u64,
    pub(super) bytes: Bytes,
    pub(super) ends: Ends,
    /// The tokens of some of its frames, by the frames' indices, in order.
    pub(super) tokens: Vec<(u64, FrameTokens)>,
    /// Memory that the bytes and the tokens take.
    room: usize,
}

impl Piece {
    /// `first` is the index of the first frame in it, or of the next one where there is none.
    pub fn new(first: u64, bytes: Vec<u8>, ends: Ends) -> Self {
        Self { first, room: bytes.capacity(), bytes: bytes.into(), ends, tokens: Vec::new() }
    }

    /// With the tokens of its frames, by their indices, in order: for an attempt on a link.
    #[must_use]
    pub fn with_tokens(mut self, tokens: Vec<(u64, FrameTokens)>) -> Self {
        let ids: usize = tokens.iter().map(|(_, tokens)| tokens.ids.capacity() * size_of::<u32>()).sum();
        self.room += ids + tokens.capacity() * size_of::<(u64, FrameTokens)>();
        self.tokens = tokens;
        self
    }

    /// Whether it has nothing.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub fn first(&self) -> u64 {
        self.first
    }

    /// The index behind the last frame.
    pub fn next(&self) -> u64 {
        self.first + self.ends.frames()
    }

    pub(super) fn cost(&self) -> usize {
        self.room + PIECE_BYTES
    }
}
