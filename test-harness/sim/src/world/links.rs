//! Attempts over the links of their nodes: the production `ControlLane` and `NodeLanes` at both ends,
//! the network between them, and what is promised of all three.
//!
//! [`lanes`] is the control plane's shell around its lanes, as `services/link/lanes.rs` of
//! `orchestratord` is, [`relays`] what their attempts hear, [`node`] a node's, as `link.rs` of
//! `node-agent` is, [`wire`] the connections between, and [`watch`] the oracle.

mod lanes;
mod node;
mod relays;
mod watch;
mod wire;

use pool_registry_types::{LifeId, NodeId};
use uuid::Uuid;

pub(crate) use lanes::Lanes;
pub(crate) use relays::Linked;
pub(crate) use watch::Watch;
pub(crate) use wire::{Down, Get, Up, Wire};

/// Its place among the nodes. Simulated ids are n<number>.
pub(crate) fn number_of(node_id: &NodeId) -> usize {
    node_id.as_str()[1..].parse().expect("simulated ids are n<number>")
}

pub(crate) fn life_id(life: u64) -> LifeId {
    LifeId(Uuid::from_u128(u128::from(life)))
}
