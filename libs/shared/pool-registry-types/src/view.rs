//! What readers see of the cluster: a copy, made by the control core when asked.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::{AttemptId, BootId, MachineId, ModelRef, NodeId};
use crate::node::{Capabilities, GpuReport, Intent, Liveness};
use crate::pool::PoolReport;

/// `GET /v2/nodes`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct ClusterView {
    pub nodes: Vec<NodeView>,
}

/// One node as the control plane sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NodeView {
    pub node_id: NodeId,
    pub machine_id: MachineId,
    pub boot_id: BootId,
    pub address: String,
    pub version: String,
    pub liveness: Liveness,
    pub intent: Intent,
    /// Why the node is not online.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Milliseconds since the last heartbeat or token.
    pub last_evidence_age_ms: u64,
    /// The number of the last report taken; absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report_seq: Option<u64>,
    pub pools: Vec<PoolView>,
    pub gpus: Vec<GpuReport>,
    pub capabilities: Capabilities,
    /// Attempts that hold a slot here in the control plane's books.
    pub running_attempts: Vec<AttemptId>,
}

/// A pool as reported, and what the control plane makes of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolView {
    pub report: PoolReport,
    pub slots_total: u32,
    /// total − |reported attempts ∪ reservations| − foreign.
    pub slots_free: u32,
    pub reservations: u32,
}

/// `GET /v2/catalog/availability`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Availability {
    pub models: Vec<ModelAvailability>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelAvailability {
    pub model_id: ModelRef,
    /// Online nodes with a ready pool of the model.
    pub nodes: Vec<NodeId>,
    pub total_nodes: u32,
    /// Slots of those pools, busy ones included.
    pub total_capacity: u32,
}

impl ClusterView {
    /// Which models can be asked for right now, and where they are.
    pub fn availability(&self) -> Availability {
        let mut models: BTreeMap<&ModelRef, (BTreeSet<&NodeId>, u32)> = BTreeMap::new();
        for node in
            self.nodes.iter().filter(|n| n.liveness == Liveness::Online && n.intent == Intent::Serving)
        {
            for pool in node.pools.iter().filter(|p| p.report.ready && !p.report.draining) {
                for model in &pool.report.models {
                    let entry = models.entry(model).or_default();
                    entry.0.insert(&node.node_id);
                    entry.1 += pool.slots_total;
                }
            }
        }
        let models = models
            .into_iter()
            .map(|(model, (nodes, total_capacity))| ModelAvailability {
                model_id: model.clone(),
                total_nodes: u32::try_from(nodes.len()).unwrap_or(u32::MAX),
                nodes: nodes.into_iter().cloned().collect(),
                total_capacity,
            })
            .collect();
        Availability { models }
    }
}
