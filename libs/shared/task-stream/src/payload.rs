//! The bytes of a task, on their way to an engine.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// What the bytes of a [`Payload`] are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PayloadFormat {
    /// A `TaskRequest` as JSON, with the fields that a node reads; the object is never empty.
    Native,
}

/// What a task's engine is to work on. Made once, where the task comes in; clones share the bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Payload {
    pub format: PayloadFormat,
    pub bytes: Bytes,
}

/// Without its content, which may be a prompt.
impl std::fmt::Debug for Payload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} payload of {} bytes", self.format, self.bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_that_is_printed_shows_no_prompt() {
        let payload = Payload { format: PayloadFormat::Native, bytes: Bytes::from_static(b"{\"prompt\":1}") };
        assert_eq!(format!("{payload:?}"), "Native payload of 12 bytes");
    }
}
