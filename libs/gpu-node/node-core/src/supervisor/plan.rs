//! What is to run: the pools of a node as the supervisor decides about them.
//!
//! A plan says nothing of programs, files and flags: those are the shell's, which knows a plan
//! by its fingerprint.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use pool_registry_types::pool::EngineKind;
use pool_registry_types::{ModelRef, PoolId, ReplicaId};

/// Where an engine's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Device {
    /// The machine's own memory: engines without a GPU.
    Host,
    /// The GPU of this number.
    Gpu(u32),
    /// The GPU, or the instance of one (MIG), with this identity.
    Named(GpuUuid),
}

/// The identity that the driver gives a GPU, `GPU-…`, or an instance of one, `MIG-…`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GpuUuid {
    text: [u8; Self::MOST],
    length: u8,
}

impl GpuUuid {
    /// Longest one, bytes. The driver's have 40; those of older drivers for instances some more.
    pub const MOST: usize = 95;

    /// Nothing where the text is empty, too long or no plain ASCII.
    pub fn new(text: &str) -> Option<Self> {
        let is_plain = text.bytes().all(|b| b.is_ascii_graphic());
        let length = u8::try_from(text.len()).ok().filter(|_| is_plain && !text.is_empty())?;
        let mut own = Self { text: [0; Self::MOST], length };
        own.text.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
        Some(own)
    }

    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.text[..usize::from(self.length)]).unwrap_or_default()
    }
}

impl fmt::Debug for GpuUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host memory"),
            Self::Gpu(n) => write!(f, "GPU{n}"),
            Self::Named(uuid) => f.write_str(uuid.as_str()),
        }
    }
}

/// Bytes that one replica takes, by device.
pub type Claim = BTreeMap<Device, u64>;

/// One pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolPlan {
    pub engine: EngineKind,
    /// The names by which tasks ask for it.
    pub models: Vec<ModelRef>,
    pub device_mask: Option<String>,
    pub ctx_max: Option<u32>,
    /// At least 1.
    pub replicas: u32,
    /// Started when a task waits for it, not before.
    pub on_demand: bool,
    /// An on-demand pool without work for this long is unloaded; absent: only to make room.
    pub ttl: Option<Duration>,
    /// What others must wait at most before a pool that is never idle makes room for them.
    pub min_resident: Duration,
    /// From the start of the process to its first good health call.
    pub load_timeout: Duration,
    /// How long attempts may still run when the pool is unloaded or replaced.
    pub drain_timeout: Duration,
    /// Exits within a minute after which the pool is given up.
    pub exit_limit: u32,
    /// Everything that makes two engines different ones.
    pub fingerprint: u64,
}

/// What the shell found out about a plan before the first start.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prepared {
    pub claim: Claim,
    /// From the model's own header, where the plan says nothing.
    pub ctx_max: Option<u32>,
}

/// A plan could not be prepared; it is tried again after a while.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Unprepared {
    /// For the pool's operator: what is missing, and what brings it.
    pub reason: String,
}

/// One life of one engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunId(pub u64);

/// Which replica of which pool, whatever runs there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaKey {
    pub pool_id: PoolId,
    pub replica_id: ReplicaId,
}

impl fmt::Display for ReplicaKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.pool_id, self.replica_id)
    }
}
