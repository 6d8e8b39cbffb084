//! A node's session with the control plane.
//!
//! [`session`] is pure: it says when to register, to heartbeat or to leave, and is told the
//! answers. [`client`] carries the calls over HTTP. Neither knows what is in a report.

pub mod client;
pub mod jitter;
pub mod session;

pub use client::{CallError, ControlPlane, HttpControlPlane};
pub use jitter::Jitter;
pub use session::{Action, BeatFailure, Session};
