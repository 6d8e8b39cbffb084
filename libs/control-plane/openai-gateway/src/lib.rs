//! What the control plane reads of OpenAI's and Anthropic's APIs, and says in them.
//!
//! Bodies and answers pass as they came; this crate finds in them what queueing, quotas and retries
//! need, and changes nothing but what it names: [`request`] reads a body's facts and puts a model's
//! name into it, [`error`] is the table of our codes in the shapes that clients know. All are values
//! and functions of bytes: no I/O, no clock, no HTTP. The idea needed to read it: a client's bytes
//! are measured and never made anew.

pub mod error;
pub mod request;
