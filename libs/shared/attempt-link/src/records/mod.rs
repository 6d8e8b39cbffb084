//! The records of a link as bytes: how they are written, found in pieces, joined and read.
//!
//! Both ends use this; who only uses an end does not need it.

mod content;
mod decoder;
mod parts;
mod record;

pub(crate) use content::POSITION_BYTES;
pub use content::{Content, ContentError, write_positions, write_token_ids};
pub use decoder::RecordDecoder;
pub use parts::{MAX_PARTS_BYTES, PartError, Parts};
pub use record::{HEADER_BYTES, Kind, MAX_RECORD_BYTES, MAX_WHOLE_BYTES, Record, RecordError, RecordHead};
