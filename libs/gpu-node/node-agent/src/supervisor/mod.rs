//! The engines that this node runs itself: started, watched, restarted, replaced, unloaded.
//!
//! [`core`] decides and is told the time ([`plan`], [`ledger`], [`pool`], [`exits`], [`driver`] and
//! [`reconcile`] are its parts, [`reading`] shows it). [`shell`] is the supervisor in the world: [`launch`] finds what
//! a start needs, [`provision`] installs, and [`life`] follows one engine from its guard to its end.

pub mod core;
mod driver;
mod exits;
mod launch;
pub mod ledger;
mod life;
pub mod plan;
mod pool;
mod provision;
mod reading;
mod reconcile;
mod shell;

#[cfg(test)]
mod tests;

pub use core::{Happened, Ordered, Supervisor, Work};
pub use ledger::DeviceReading;
pub use plan::{Claim, Device, PoolPlan, Prepared, ReplicaKey, RunId};
pub use shell::{Settings, Supervision};
