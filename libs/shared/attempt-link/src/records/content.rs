//! What stands in the bytes of a record, kind by kind.
//!
//! What is rare is JSON, whose unknown fields are passed over; what comes often is numbers. Bytes behind
//! what a kind has are a newer writer's, and are passed over too.

use pool_registry_types::ErrorBody;
use serde::de::DeserializeOwned;

use super::record::{Kind, Record};
use crate::content::{Acceptance, AnswerHead, Bye, End, FrameTokens, Hello, Position};

/// Bytes of a number and an index.
pub(crate) const POSITION_BYTES: usize = 16;

/// Why the bytes of a record are not what its kind says.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    #[error("a record of kind {0:?} that cannot be read")]
    Json(Kind, #[source] serde_json::Error),
    #[error("a record of kind {0:?} that is cut off")]
    CutOff(Kind),
}

fn json<T: DeserializeOwned>(record: &Record) -> Result<T, ContentError> {
    serde_json::from_slice(&record.bytes).map_err(|error| ContentError::Json(record.head.kind, error))
}

/// What a whole record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    Hello(Hello),
    Accepted(Acceptance),
    Refused(ErrorBody),
    Head(AnswerHead),
    /// The bytes are the record's.
    Frames,
    TokenIds(Vec<FrameTokens>),
    Error(ErrorBody),
    End(End),
    Alive(Vec<Position>),
    Bye(Bye),
}

impl Content {
    /// Reads the bytes of a record that is whole.
    pub fn read(record: &Record) -> Result<Self, ContentError> {
        Ok(match record.head.kind {
            Kind::Hello => Self::Hello(json(record)?),
            Kind::Accepted => Self::Accepted(json(record)?),
            Kind::Refused => Self::Refused(json(record)?),
            Kind::Head => Self::Head(json(record)?),
            Kind::Frames => Self::Frames,
            Kind::TokenIds => Self::TokenIds(read_token_ids(record)?),
            Kind::Error => Self::Error(json(record)?),
            Kind::End => Self::End(json(record)?),
            Kind::Alive => Self::Alive(read_positions(record)?),
            Kind::Bye => Self::Bye(json(record)?),
        })
    }
}

/// Appends the bytes of an `alive`: 8 bytes for each number and 8 for its index.
pub fn write_positions(out: &mut Vec<u8>, positions: impl IntoIterator<Item = Position>) {
    for position in positions {
        out.extend_from_slice(&position.number.to_be_bytes());
        out.extend_from_slice(&position.next.to_be_bytes());
    }
}

fn read_positions(record: &Record) -> Result<Vec<Position>, ContentError> {
    let (pairs, _) = record.bytes.as_chunks::<POSITION_BYTES>();
    let count = usize::try_from(record.head.count).unwrap_or(usize::MAX);
    let named = pairs.get(..count).ok_or(ContentError::CutOff(Kind::Alive))?;
    Ok(named
        .iter()
        .map(|&[a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]| Position {
            number: u64::from_be_bytes([a, b, c, d, e, f, g, h]),
            next: u64::from_be_bytes([i, j, k, l, m, n, o, p]),
        })
        .collect())
}

/// Appends the ids of one frame's tokens: 4 bytes for the count of all, 4 for how many ids follow, 4
/// for each of them.
pub fn write_token_ids(out: &mut Vec<u8>, total: u32, ids: &[u32]) {
    out.extend_from_slice(&total.to_be_bytes());
    out.extend_from_slice(&u32::try_from(ids.len()).unwrap_or(u32::MAX).to_be_bytes());
    for id in ids {
        out.extend_from_slice(&id.to_be_bytes());
    }
}

fn read_token_ids(record: &Record) -> Result<Vec<FrameTokens>, ContentError> {
    let (words, _) = record.bytes.as_chunks::<4>();
    let mut words = words.iter().map(|word| u32::from_be_bytes(*word));
    let mut frames = Vec::new();
    for _ in 0..record.head.count {
        let (Some(total), Some(ids)) = (words.next(), words.next()) else {
            return Err(ContentError::CutOff(Kind::TokenIds));
        };
        let ids = usize::try_from(ids).unwrap_or(usize::MAX);
        if words.len() < ids {
            return Err(ContentError::CutOff(Kind::TokenIds));
        }
        frames.push(FrameTokens { total, ids: words.by_ref().take(ids).collect() });
    }
    Ok(frames)
}
