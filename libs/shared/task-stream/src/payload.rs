//! The bytes of a task, on their way to an engine.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::passage::Passage;

/// What the bytes of a [`Payload`] are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PayloadFormat {
    /// A `TaskRequest` as JSON, with the fields that a node reads; the object is never empty.
    Native,
    /// The body of a client that speaks one of the engines' own languages, as it came: nobody reads it.
    #[serde(rename = "openai")]
    OpenAi(Box<Passage>),
}

impl PayloadFormat {
    /// Whether what the engine answers is passed on as it comes.
    pub fn passes(&self) -> bool {
        matches!(self, Self::OpenAi(_))
    }
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
        let format = if self.format.passes() { "OpenAi" } else { "Native" };
        write!(f, "{format} payload of {} bytes", self.bytes.len())
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
