//! A node's decisions: values that are told the time, and that the simulator drives as they are.
//!
//! [`NodeCore`] is the node as the control plane knows it: its pools, who holds which slot, and
//! with [`Session`] what is reported when. [`supervisor`] is which engines run. Neither knows a
//! process, a file, a socket or a clock; `node-agent` is the shell around both.

mod jitter;
mod node;
mod session;
pub mod supervisor;

pub use node::{
    Accepted, Ask, BindError, Busy, Declared, Identity, NodeCore, NodeEffect, Readiness, ReplicaSpec, Verdict,
};
pub use session::{BeatFailure, Session};
