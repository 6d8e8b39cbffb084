//! What the control plane does besides answering: deciding, dispatching, keeping streams.

pub(crate) mod addresses;
pub(crate) mod artifacts;
pub(crate) mod attempt_body;
pub(crate) mod catalog;
pub(crate) mod control;
pub(crate) mod departures;
pub(crate) mod dispatch;
pub(crate) mod expected;
mod feed;
pub(crate) mod followers;
pub(crate) mod gateway;
pub(crate) mod handoff;
pub(crate) mod link;
pub(crate) mod measured;
mod notes;
pub(crate) mod placement;
pub(crate) mod published;
pub(crate) mod reader_permits;
pub(crate) mod readers;
pub(crate) mod registry;
pub(crate) mod report_shares;
mod spans;
pub(crate) mod streams;
pub(crate) mod usage;
