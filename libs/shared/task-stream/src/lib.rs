//! A task apart from its client's connection: what is known of it, and its bytes.
//!
//! [`TaskSpec`] is what schedulers know of a task: small, copied at little cost, and serialisable.
//! [`Payload`] is what its engine is to work on: opaque bytes that no core reads. There is no I/O,
//! no clock and no decision here. The idea needed to read it: *the core holds facts, the stream
//! holds bytes*.

mod payload;
mod spec;

pub use payload::{Payload, PayloadFormat};
pub use spec::{BodyDigest, InvalidDigest, Lacking, TaskCaller, TaskSpec};
