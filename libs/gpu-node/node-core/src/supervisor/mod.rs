//! The engines that a node runs itself: which run, which wait, which make room.
//!
//! [`Supervisor`] decides and is told the time; its parts are the plans, the memory's ledger, the
//! pools, the exits of engines, the driver's errors and what follows from an event. Who starts and
//! ends processes is the shell.

mod core;
mod driver;
mod driver_errors;
mod exits;
mod ledger;
mod plan;
mod pool;
mod reading;
mod reconcile;

#[cfg(test)]
mod tests;

pub use core::{Happened, Ordered, Supervisor, Work};
pub use driver_errors::fatal_driver_error;
pub use ledger::DeviceReading;
pub use plan::{Claim, Device, PoolPlan, Prepared, ReplicaKey, RunId};
