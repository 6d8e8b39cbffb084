//! What came in parts, joined.
//!
//! Parts of one attempt follow each other, with records of other attempts between them. All have the
//! head of the whole. They are joined before anybody acts on them: a resume begins at the whole.

use std::collections::BTreeMap;

use super::record::{MAX_WHOLE_BYTES, Record, RecordHead};

/// Most bytes of parts that a link keeps, of all its attempts.
pub const MAX_PARTS_BYTES: usize = 32 * 1024 * 1024;

/// Most attempts of which parts are kept. A writer has fewer at a time: see CLOUD-2635.
const MAX_BEGUN: usize = 64;

/// Why parts are none of one whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PartError {
    #[error("a part that does not belong to the one before it")]
    Mixed,
    #[error("parts of more than {MAX_WHOLE_BYTES} bytes")]
    TooLong,
    #[error("the parts of a link take more than {MAX_PARTS_BYTES} bytes")]
    TooMuch,
    #[error("parts of more than {MAX_BEGUN} attempts at a time")]
    TooMany,
}

/// The parts of a link whose last one has not come.
#[derive(Debug, Default)]
pub struct Parts {
    begun: BTreeMap<u64, (RecordHead, Vec<u8>)>,
    bytes: usize,
}

impl Parts {
    /// Returns the whole record, once it is. One that has no parts is itself, and is not copied. An
    /// error is the link's end.
    pub fn join(&mut self, record: Record) -> Result<Option<Record>, PartError> {
        let head = record.head;
        if !head.more && !self.begun.contains_key(&head.number) {
            return Ok(Some(record));
        }
        if self.begun.len() >= MAX_BEGUN && !self.begun.contains_key(&head.number) {
            return Err(PartError::TooMany);
        }
        let whole = RecordHead { more: false, ..head };
        let (begun, joined) = self.begun.entry(head.number).or_insert_with(|| (whole, Vec::new()));
        if *begun != whole {
            return Err(PartError::Mixed);
        }
        if joined.len() + record.bytes.len() > MAX_WHOLE_BYTES {
            return Err(PartError::TooLong);
        }
        if self.bytes + record.bytes.len() > MAX_PARTS_BYTES {
            return Err(PartError::TooMuch);
        }
        joined.extend_from_slice(&record.bytes);
        self.bytes += record.bytes.len();
        if head.more {
            return Ok(None);
        }
        let bytes = self.begun.remove(&head.number).map(|(_, joined)| joined).unwrap_or_default();
        self.bytes -= bytes.len();
        Ok(Some(Record { head: whole, bytes: bytes.into() }))
    }

    /// Nothing more of this number counts.
    pub fn forget(&mut self, number: u64) {
        if let Some((_, joined)) = self.begun.remove(&number) {
            self.bytes -= joined.len();
        }
    }

    /// Bytes that are kept.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}
