//! Everything a node does short of serving HTTP.
//!
//! [`core`] decides: pools, slots and the session, told the time and the events. The rest is a
//! shell around it.

pub mod core;

pub use crate::core::{NodeCore, NodeEffect};
