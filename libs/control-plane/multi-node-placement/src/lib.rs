//! Which pool gets a task: an index of pools, ordered by score, and a choice on it.
//!
//! The index is told facts ([`Candidate`]) and never asks for any; it does not know nodes,
//! leases or queues. [`choose`] walks the free pools of one model from the best score on and
//! takes the first that fits, so that its cost does not grow with the fleet. [`explain`] walks
//! every pool and says of each why it was or was not eligible; it is the slow truth that
//! `choose` is tested against.

mod candidate;
mod choose;
mod index;
mod offers;
mod shape;

pub use candidate::{Availability, Candidate};
pub use choose::{
    Choice, NoPlacement, Refused, ToLoad, Verdict, choose, choose_to_load, count_refusals, explain,
    explain_one, might_take, refused, temporarily_unavailable,
};
pub use index::{Eligible, PoolIndex, PoolRow, Strategy};
pub use offers::Lack;
pub use shape::{Spread, TaskShape};

#[cfg(test)]
mod tests;
