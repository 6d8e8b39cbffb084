//! A pool as placement is told of it.

use std::sync::Arc;

use pool_registry_types::placement::Labels;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::{ModelRef, PoolKey};

/// What stands between a pool and any task at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Availability {
    /// The node is online and serving, the pool ready.
    Placeable,
    Offline,
    Suspect,
    Draining,
    NotReady,
    /// Its engine is about to be ready.
    Loading,
    /// No engine of it runs, and one can be started.
    Loadable,
    /// No engine of it runs, and its node has no memory for one.
    NoMemory,
    /// Its engine failed too often lately, or one task is out to show whether it is well.
    Tripped,
}

/// The facts about one pool that placement uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub key: PoolKey,
    pub availability: Availability,
    /// Absent: of a kind that is not known, which no task can use.
    pub engine: Option<EngineKind>,
    pub models: Vec<ModelRef>,
    /// Tokens; unknown fits everything, and the engine decides.
    pub ctx_max: Option<u32>,
    pub device_mask: Option<String>,
    /// Of the node.
    pub labels: Arc<Labels>,
    pub slots_total: u32,
    pub slots_busy: u32,
    /// Refused a dispatch lately: counts as full.
    pub held: bool,
    /// Unknown is not zero: it only ranks behind every known amount.
    pub vram_free_bytes: Option<u64>,
    /// Milliseconds that starting an engine of it took last; unknown before.
    pub load_estimate_ms: Option<u64>,
    /// Bytes that an engine of it takes and that are free already.
    pub fits_now: bool,
    /// Its node passes bodies on to engines as they come.
    pub passes_on: bool,
}

impl Candidate {
    pub fn has_free_slot(&self) -> bool {
        !self.held && self.slots_busy < self.slots_total
    }

    /// Whether both may take the same tasks, how busy they are and what memory is free left out.
    pub(crate) fn takes_the_same(&self, other: &Self) -> bool {
        let of = |c: &Self| (c.availability == Availability::Placeable, c.engine, c.ctx_max, c.passes_on);
        of(self) == of(other)
            && self.models == other.models
            && self.device_mask == other.device_mask
            && self.labels == other.labels
    }
}
