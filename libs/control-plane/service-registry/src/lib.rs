//! Which nodes are alive, what their pools hold, which slots are taken.
//!
//! A [`ServiceRegistry`] is a value that is told what happened and when; it performs nothing. It does
//! not know what tasks ask for: an attempt is an id that holds a slot, and a task an id by which failures
//! are told apart. The idea needed to read it: the node
//! reports what it runs, the control plane remembers what it sent, and the truth about a slot
//! is the union of the two, fenced by the number of the report (see [`reservations`]).

mod breaker;
mod liveness;
mod mismatch;
mod registry;
mod reservations;
mod rules;

pub use liveness::{Denied, ProbeOutcome, Suspicion, Timing, Transition};
pub use mismatch::IndexMismatch;
pub use registry::{
    HeartbeatOutcome, NodeConflict, NodeNotKnown, PoolFacts, Registered, Registrar, ServiceRegistry, Settings,
};
pub use rules::Rule;
