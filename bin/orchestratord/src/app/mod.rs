//! The parts put together: from configuration to a serving control plane.

pub(crate) mod bootstrap;
pub(crate) mod router;
pub(crate) mod state;
