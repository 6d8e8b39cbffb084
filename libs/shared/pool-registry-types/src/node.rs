//! What a node says to the control plane, and what it is told.
//!
//! In messages between the daemons unknown fields are ignored, new ones are optional, and unknown
//! words cost only what they stand in, so that an old reader meets a new writer and the other way
//! round.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::{AttemptId, BootId, Digest, Epoch, LifeId, MachineId, ModelRef, NodeId, PoolId};
use crate::newer;
use crate::placement::{Labels, labels_of_newer};
use crate::pool::PoolReport;

/// What the control plane observes of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Liveness {
    Online,
    /// No new work until it is probed or heard again.
    Suspect,
    Offline,
}

impl fmt::Display for Liveness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Online => "online",
            Self::Suspect => "suspect",
            Self::Offline => "offline",
        })
    }
}

/// What the operator, or the node itself, asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Intent {
    #[default]
    Serving,
    /// Also what a newer daemon says beside these: no new work is the smaller harm.
    #[serde(other)]
    Draining,
}

/// Of [`RegisterRequest::features`]: the node has a link (`GET /v2/link`).
pub const LINK_FEATURE: &str = "link";
/// The node passes the bodies of clients on to its engines as they come, and their answers back.
pub const OPENAI_FEATURE: &str = "openai";

/// `POST /v2/nodes/register`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RegisterRequest {
    pub node_id: NodeId,
    pub machine_id: MachineId,
    pub boot_id: BootId,
    /// Where the control plane reaches the node: `http://host:port` or `https://host:port`. The
    /// pattern leaves addresses of IPv6, in brackets, to the check.
    #[schema(
        pattern = "^https?://(([A-Za-z0-9]([A-Za-z0-9_-]{0,30}[A-Za-z0-9])?[.]){0,3}[A-Za-z]([A-Za-z0-9_-]{0,30}[A-Za-z0-9])?|((25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])[.]){3}(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9]))(:[1-9][0-9]{0,3})?$"
    )]
    pub address: String,
    pub version: String,
    #[serde(default)]
    pub intent: Intent,
    #[serde(default, deserialize_with = "labels_of_newer", skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    #[serde(default, deserialize_with = "newer::entries")]
    #[schema(max_items = 2048)]
    pub pools: Vec<PoolId>,
    #[serde(default)]
    pub capabilities: Capabilities,
    /// What the node can do that an older one cannot.
    #[serde(default, deserialize_with = "newer::entries", skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 64)]
    pub features: Vec<String>,
}

/// What the node's machine has.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Capabilities {
    #[serde(default, deserialize_with = "newer::entries")]
    #[schema(max_items = 256)]
    pub gpus: Vec<GpuCapability>,
    #[serde(default)]
    pub cpu_cores: u32,
    #[serde(default)]
    pub ram_total_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GpuCapability {
    /// As in the reports of the GPU.
    pub device_id: u32,
    pub uuid: String,
    pub name: String,
    /// 0 where the driver does not tell.
    pub vram_total_bytes: u64,
    /// CUDA compute capability, `8.6`.
    pub compute_capability: String,
    /// Whether it is split into instances; absent where it cannot be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mig: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RegisterAnswer {
    pub node_id: NodeId,
    pub epoch: Epoch,
    pub heartbeat_interval_ms: u64,
    pub node_timeout_ms: u64,
    /// What the node is to do, where the order is a new one.
    pub intent: Intent,
    /// The number of the operator's last order for the node; 0 for none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub intent_order: u64,
    /// Whose links the node takes. Absent from a control plane that has none.
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub life: Option<LifeId>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// `POST /v2/nodes/{id}/heartbeat`: the node's whole state, never a difference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Heartbeat {
    pub epoch: Epoch,
    /// The number of this report; rises for the life of a boot.
    pub seq: u64,
    /// RFC 3339, UTC, of the node's clock; shown, never compared.
    pub timestamp: String,
    #[serde(default)]
    pub intent: Intent,
    /// The number of the last order under this epoch that the node has taken; 0 for none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub intent_order: u64,
    /// Times that the tokens which the node accepts have changed in this boot: where it rises, a
    /// node that refused the control plane is asked again.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub tokens_changed: u64,
    /// With 8,192 models, 4,096 replicas and 100,000 attempts of all of them together at most.
    #[serde(default, deserialize_with = "newer::entries")]
    #[schema(max_items = 2048)]
    pub pools: Vec<PoolReport>,
    #[serde(default, deserialize_with = "newer::entries")]
    #[schema(max_items = 256)]
    pub gpus: Vec<GpuReport>,
    /// The models that lie on the node's disk.
    #[serde(default, deserialize_with = "newer::entries", skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 8192)]
    pub models: Vec<StagedModel>,
    /// What the node's operator has to mend; that of a pool stands in the pool's own `last_error`.
    #[serde(default, deserialize_with = "newer::entries", skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 64)]
    pub problems: Vec<NodeProblem>,
}

/// A file of a node that is not taken as it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeProblem {
    pub kind: ProblemKind,
    /// The path of the file of pools; the name of a handoff file in the runtime directory.
    pub file: String,
    /// The pool that the file would have an engine for, where that can be read.
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub pool_id: Option<PoolId>,
    /// Why it is not taken.
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// What the file of pools stated before holds.
    PoolsFile,
    /// The engine that it announces gets no tasks.
    Handoff,
    /// Something that a newer node reports.
    #[serde(other)]
    Unknown,
}

/// A model on a node's disk, whole and verified when it was staged.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub struct StagedModel {
    pub model_id: ModelRef,
    pub digest: Digest,
    pub bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GpuReport {
    /// The driver's number; of an instance of a GPU (MIG) 1,000 × (the GPU's number + 1) + its own.
    pub device_id: u32,
    /// The driver's identity, `GPU-…` or `MIG-…`; absent where it never was seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// What the two figures of memory are of.
    #[serde(default, skip_serializing_if = "GpuMemory::is_own")]
    pub memory: GpuMemory,
    pub vram_used_bytes: u64,
    pub vram_total_bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub utilization_pct: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature_c: Option<u32>,
    /// What it takes now, milliwatts; absent where the driver does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power_mw: Option<u32>,
    /// What it has taken since the driver was loaded, millijoules; absent where the driver does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy_mj: Option<u64>,
    /// Uncorrected memory errors since the driver was loaded; absent where they are not counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ecc_uncorrected: Option<u64>,
    /// Memory of processes that are none of the node's engines; absent where the driver does not
    /// list processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unaccounted_vram_bytes: Option<u64>,
    pub health: GpuHealth,
    /// What a person should know of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Whose memory a GPU has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GpuMemory {
    #[default]
    Own,
    /// The machine's: the figures are the machine's, and engines on the GPU are counted there.
    Shared,
    /// The driver does not tell: the figures are 0 and mean nothing.
    #[serde(other)]
    Unknown,
}

impl GpuMemory {
    fn is_own(&self) -> bool {
        *self == Self::Own
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GpuHealth {
    Ok,
    /// It works, and reports errors that a person should look at.
    Degraded,
    /// The device, or its driver, is gone.
    Lost,
    /// The driver did not answer in time.
    Unresponsive,
    /// Something that a newer node says.
    #[serde(other)]
    Unknown,
}

impl GpuHealth {
    /// Whether engines may be started on it.
    pub const fn takes_work(self) -> bool {
        matches!(self, Self::Ok | Self::Degraded | Self::Unknown)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HeartbeatAnswer {
    pub heartbeat_interval_ms: u64,
    /// Attempts that the control plane does not know: the node ends them.
    #[serde(default, deserialize_with = "newer::entries")]
    pub cancel_attempts: Vec<AttemptId>,
    /// The node's pools for which a task waits.
    #[serde(default, deserialize_with = "newer::entries", skip_serializing_if = "Vec::is_empty")]
    pub waiting: Vec<PoolId>,
    /// What the node is to do from now on, where the order is a new one.
    #[serde(default)]
    pub intent: Intent,
    /// The number of the operator's last order for the node; 0 for none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub intent_order: u64,
    /// What the node is taken for; absent from an older control plane.
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub observed: Option<ObservedLiveness>,
}

/// What the control plane takes a node for, and why it gets no tasks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ObservedLiveness {
    pub liveness: Liveness,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// `POST /v2/nodes/{id}/drain` and `…/resume`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct IntentAnswer {
    pub node_id: NodeId,
    pub intent: Intent,
    /// The node has written it down. Otherwise it is told with the answer to its next call, and
    /// a control plane that restarts before that forgets it.
    pub kept_by_node: bool,
    /// Attempts that still run there.
    pub running: u32,
}

/// `POST /v2/intent` of a node: what its operator wants from now on.
///
/// Orders reach a node on several ways, and overtake each other. One counts only under the
/// registration it was given for, and when no later one has been taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct IntentOrder {
    pub epoch: Epoch,
    /// Rises with each order of one life of the control plane.
    pub number: u64,
    pub intent: Intent,
}

/// `GET /health/live` of a node: who answers at this address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LiveAnswer {
    pub node_id: NodeId,
    pub boot_id: BootId,
}
