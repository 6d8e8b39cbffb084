//! The cluster under virtual time: the production cores, a network that misbehaves, and a
//! oracle that believes nobody.
//!
//! [`world`] runs `ControlCore`, `NodeCore`, `TaskLog` and `Relay` as they are; there is
//! no second model of them. What is modelled is the rest: engines, sockets, lost messages,
//! crashes. [`oracle`] checks the invariants after every step from what it saw itself. One
//! seed is one schedule, and the same seed is the same run to the last event.

pub mod coverage;
pub mod draw;
pub mod oracle;
pub mod runner;
pub mod scenario;
mod transcript;
pub mod world;

pub use coverage::Coverage;
pub use runner::{run_mutants, run_seed, run_seeds};
