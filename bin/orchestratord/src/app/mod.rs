//! The parts put together: from configuration to a serving control plane.

pub(crate) mod bootstrap;
mod examples;
pub(crate) mod router;
pub(crate) mod state;
