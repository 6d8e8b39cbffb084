//! What is wrong with the engine, for every request that comes while it is set.

use serde::Deserialize;

/// One fault. `after` counts tokens that are still sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Fault {
    None,
    /// The connection is closed without an answer.
    Refuse,
    /// HTTP 500.
    Error500,
    /// HTTP 400, as for too long a prompt.
    ContextTooLong,
    /// Accepted, and then nothing.
    Hang {
        after: u64,
    },
    /// The connection breaks.
    Cut {
        after: u64,
    },
    /// The stream ends cleanly, without its end marker.
    CleanClose {
        after: u64,
    },
    /// Another pace.
    Slow {
        pace_ms: u64,
    },
    /// Another pace, and the tokens of all streams are made at the same moments, as by continuous
    /// batching; also those of other engines on this machine.
    Steps {
        pace_ms: u64,
    },
    /// The words of another version: `x0 x1 x2 …`.
    OtherWords,
    /// A web page instead of a stream.
    WrongContentType,
    /// The health call answers 503.
    Unhealthy,
    /// How busy it is is not answered, and whether it is up after a while; requests go on.
    Busy {
        health_ms: u64,
    },
    /// What is broken off keeps its slot for a while.
    Lingers {
        ms: u64,
    },
    /// One event of more than 1 MiB.
    Huge,
    /// The text of each token is so long, in the stream of a chat.
    Long {
        bytes: usize,
    },
    /// Refuses with this status, in the words of vLLM.
    Status {
        status: u16,
    },
    /// Thinks for as many tokens before it answers.
    Thinks {
        tokens: u64,
    },
}
