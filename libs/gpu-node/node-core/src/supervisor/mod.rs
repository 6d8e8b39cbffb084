//! The engines that a node runs itself: which run, which wait, which make room.
//!
//! [`Supervisor`] decides and is told the time; its parts are the plans, the memory's ledger, the
//! pools, the exits of engines, the driver's errors and what follows from an event. Who starts and
//! ends processes is the shell.

mod core;
mod driver;
mod driver_errors;
mod driver_reports;
mod event;
mod exits;
mod ledger;
mod plan;
mod pool;
mod reading;
mod reconcile;

#[cfg(test)]
mod tests;

pub use core::Supervisor;
pub use driver_errors::fatal_driver_error;
pub use event::{Happened, Ordered, Work};
pub use ledger::DeviceReading;
pub use plan::{Claim, Device, GpuUuid, PoolPlan, Prepared, ReplicaKey, RunId, Unprepared};
