//! The engines that this node runs itself: started, watched, restarted, replaced, unloaded.
//!
//! `node-core` decides ([`node_core::supervisor`]). [`shell`] is the supervisor in the world:
//! [`launch`] finds what a start needs, [`provision`] installs, and [`life`] follows one engine from
//! its guard to its end. [`check`] says what they would lack. What several of them use is below them: [`programs`] of others, and the
//! [`state`] of the loop.

mod check;
mod launch;
mod life;
mod programs;
mod provision;
mod shell;
mod state;

pub use check::{Finding, check};
pub use shell::Settings;
pub(crate) use shell::Supervision;
