//! The bounds of what one side of a connection can make the other one keep.
//!
//! Whoever can send something can send too much of it. What a peer, an engine or a client can fill
//! has its bound here, and whoever holds it counts it. Bounds that only one crate can reach (a
//! frame's, a record's, a file's) stand beside what they bound.

/// Longest answer of a daemon to the other one that is read, bytes: to a registration, a heartbeat,
/// an order, a probe.
pub const MAX_ANSWER_BYTES: usize = 1024 * 1024;
