//! A node's decisions: values that are told the time, and that the simulator drives as they are.
//!
//! [`NodeCore`] is the node as the control plane knows it: its pools, who holds which slot, and
//! with [`Session`] what is reported when. [`attempts`] is what is kept of the attempts' streams.
//! [`supervisor`] is which engines run. None knows a process, a file, a socket or a clock;
//! `node-agent` is the shell around them.

pub mod attempts;
mod jitter;
mod node;
mod session;
pub mod supervisor;

pub use attempts::{Cursor, Ending, Ends, Held, Piece, ResumeError, Resumed, Retention, Taken, TooLong};
pub use node::{
    Accepted, Ask, BindError, Busy, Declared, Identity, NodeCore, NodeEffect, Problem, Readiness,
    ReplicaSpec, Serving, Source, Verdict,
};
pub use session::{BeatFailure, RegisterFailure, Session};
