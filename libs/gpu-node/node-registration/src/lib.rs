//! A node's calls to the control plane: register, heartbeat, deregister.
//!
//! [`body`] reads what comes back, of whatever is called.
//! [`client`] carries them over HTTP; the home profile has its own way in process. When each is
//! due, and what is in a report, is `node-core`'s.

pub mod body;
pub mod client;

pub use client::{CallError, ControlPlane, HttpControlPlane};
