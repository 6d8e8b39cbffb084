//! The link between a control plane and a node: everything about it but the bytes' way.
//!
//! All attempts of one control-plane thread on one node share one endless response, the *link*: a
//! sequence of [records] that the node writes. Starts, resumes, stops and what was seen go the other
//! way, in batched POSTs ([`wire`]). [`control::ControlLane`] is the control plane's end of it and
//! [`node::NodeLanes`] the node's: values that are told what has happened and when, and say what is to
//! be done. They do no I/O, read no clock and know no engine, no log and no scheduler.
//!
//! Two ideas are needed to read it. *An attempt is named by a number that is never used again*: whoever
//! asks for it anew gives it a new one, and what still comes under the old one is nobody's. And *the
//! link answers, the POST does not*: that a POST was answered says only that it was read.

pub mod content;
pub mod control;
pub mod node;
pub mod records;
mod resume_gate;
mod rules;
pub mod wire;

pub use resume_gate::{MAX_RESUMING_LINKS, ResumeGate};
pub use rules::Rule;
