//! What the control plane reads of OpenAI's and Anthropic's APIs, and says in them.
//!
//! Bodies and answers pass as they came; this crate finds in them what queueing, quotas and retries
//! need, and changes nothing but what it names: [`request`] reads a body's facts and puts a model's
//! name into it, [`events`] cuts an engine's stream into its events, [`meter`] counts them, [`replay`] compares a second
//! attempt's with what was passed on, [`error`] is the table of our codes in the shapes that clients
//! know. All are values and functions of bytes: no I/O, no clock, no HTTP. The idea needed to read it:
//! bytes of clients and engines are measured and never made anew.

pub mod error;
pub mod events;
pub mod meter;
pub mod replay;
pub mod request;
