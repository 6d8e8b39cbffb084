//! What readers see of the cluster, as it goes over the wire. The control core makes a view of a node
//! anew when the node has changed; how readers share them is [`crate::snapshot`]'s.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::{AttemptId, BootId, Digest, MachineId, ModelRef, NodeId, PoolId, TaskId};
use crate::node::{Capabilities, GpuReport, Intent, Liveness, NodeProblem, ProblemKind, StagedModel};
use crate::placement::Labels;
use crate::pool::{DrainProgress, PoolReloading, PoolReport, PoolState};
use crate::task::TaskState;

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
    /// What the operator asked for, or the node itself.
    pub intent: Intent,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Why the node is not online.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Absent where nodes are called in process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<LinkView>,
    /// Milliseconds since the last heartbeat or token.
    pub last_evidence_age_ms: u64,
    /// The number of the last report taken; absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report_seq: Option<u64>,
    pub pools: Vec<PoolView>,
    pub gpus: Vec<GpuReport>,
    /// Models on its disk.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<StagedModel>,
    /// Files there that are not taken as they stand.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<NodeProblem>,
    pub capabilities: Capabilities,
    /// Attempts that hold a slot here in the control plane's books.
    pub running_attempts: Vec<AttemptId>,
}

/// The control plane's link to a node: the response that all attempts there share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LinkView {
    pub state: LinkState,
    /// Why it is not up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl LinkView {
    /// How a link of these lanes stands: as the one that is farthest from being up. None without lanes.
    pub fn of_lanes<'a>(lanes: impl IntoIterator<Item = &'a Self>) -> Option<&'a Self> {
        lanes.into_iter().min_by_key(|lane| match lane.state {
            LinkState::Interrupted => 0,
            LinkState::Connecting => 1,
            LinkState::None => 2,
            LinkState::Unknown => 3,
            LinkState::Up => 4,
        })
    }
}

/// How a link stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LinkState {
    /// It is dialled, and was never up since the node registered.
    Connecting,
    Up,
    /// It was up, and is dialled again.
    Interrupted,
    /// It is not dialled before the node registers again.
    None,
    /// Something that a newer control plane says.
    #[serde(other)]
    Unknown,
}

/// A pool as reported, and what the control plane makes of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolView {
    pub report: PoolReport,
    pub slots_total: u32,
    /// total − |reported attempts ∪ reservations| − foreign.
    pub slots_free: u32,
    pub reservations: u32,
    /// Its engine has failed too often lately: it gets no task, or one to show that it is well.
    #[serde(default)]
    pub tripped: bool,
}

/// `GET /v2/pools`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct PoolList {
    pub pools: Vec<PoolOfNode>,
    /// What keeps pools from being here, or from being as they were last written; not for a client's token.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<ProblemOfNode>,
}

/// A [`NodeProblem`] with the node that reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProblemOfNode {
    pub node_id: NodeId,
    pub kind: ProblemKind,
    /// The path of the file of pools; the name of a handoff file in the node's runtime directory.
    pub file: String,
    /// The pool that the file would have an engine for, where that can be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_id: Option<PoolId>,
    /// Why it is not taken.
    pub message: String,
}

/// A pool with the node it is on; also `GET /v2/pools/{id}/health`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolOfNode {
    pub node_id: NodeId,
    pub pool_id: PoolId,
    /// The node is online.
    pub live: bool,
    /// Takes tasks: live, ready and not draining.
    pub ready: bool,
    pub draining: bool,
    pub state: PoolState,
    pub models: Vec<ModelRef>,
    pub slots_total: u32,
    pub slots_free: u32,
    pub tripped: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// What its operator should change, though it serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// How far its own drain had come at its node's last report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainProgress>,
    /// The reload that is under way, or why the last one was given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reload: Option<PoolReloading>,
}

/// One event of `GET /v2/events`: what changed, and to what. The name of the event is `node`,
/// `pool` or `task`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ClusterChange {
    /// Without a liveness, the node is not known any more.
    Node {
        node_id: NodeId,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        liveness: Option<Liveness>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        intent: Option<Intent>,
    },
    /// Without a state, the pool is not reported any more.
    Pool {
        node_id: NodeId,
        pool_id: PoolId,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        state: Option<PoolState>,
        ready: bool,
        /// What is done before a start: an installation or a download, and how far it has come.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        preparation: Option<String>,
    },
    Task {
        task_id: TaskId,
        state: TaskState,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        node_id: Option<NodeId>,
    },
}

impl ClusterChange {
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Node { .. } => "node",
            Self::Pool { .. } => "pool",
            Self::Task { .. } => "task",
        }
    }
}

/// `GET /v2/catalog/availability`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct CatalogAvailability {
    pub models: Vec<ModelAvailability>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelAvailability {
    pub model_id: ModelRef,
    /// What a task for it finds; absent where it is staged and no pool has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<ModelReadiness>,
    /// Online nodes with a ready pool of the model; where there is none, those that load it.
    pub nodes: Vec<NodeId>,
    pub total_nodes: u32,
    /// Slots of the ready pools, busy ones included.
    pub total_capacity: u32,
    /// Live nodes that have the model on disk, whether they serve it or not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub staged: Vec<StagedAt>,
}

/// Whether an engine serves a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ModelReadiness {
    Ready,
    /// A pool starts its engine when a task waits for it.
    Loadable,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StagedAt {
    pub node_id: NodeId,
    pub digest: Digest,
    pub bytes: u64,
}

impl NodeView {
    /// Whether the pool, which is the node's, takes tasks.
    pub fn serves(&self, pool: &PoolView) -> bool {
        self.liveness == Liveness::Online
            && self.intent == Intent::Serving
            && pool.report.engine.is_some()
            && pool.report.ready
            && !pool.report.draining
    }

    /// Whether the pool, which is the node's, starts an engine when a task waits for it.
    pub(crate) fn loads(&self, pool: &PoolView) -> bool {
        self.liveness == Liveness::Online
            && self.intent == Intent::Serving
            && pool.report.state == PoolState::Loadable
            && pool.report.supervised.as_ref().is_some_and(|own| own.fits)
            && !pool.report.draining
    }

    pub(crate) fn pool(&self, pool: &PoolView) -> PoolOfNode {
        PoolOfNode {
            node_id: self.node_id.clone(),
            pool_id: pool.report.pool_id.clone(),
            live: self.liveness == Liveness::Online,
            ready: self.serves(pool),
            draining: pool.report.draining || self.intent == Intent::Draining,
            state: pool.report.state,
            models: pool.report.models.clone(),
            slots_total: pool.slots_total,
            slots_free: pool.slots_free,
            tripped: pool.tripped,
            last_error: pool.report.last_error.clone(),
            warning: pool.report.warning.clone(),
            drain: pool.report.drain,
            reload: pool.report.supervised.as_ref().and_then(|supervised| supervised.reload.clone()),
        }
    }

    pub(crate) fn problems(&self) -> impl Iterator<Item = ProblemOfNode> + '_ {
        self.problems.iter().map(|problem| ProblemOfNode {
            node_id: self.node_id.clone(),
            kind: problem.kind,
            file: problem.file.clone(),
            pool_id: problem.pool_id.clone(),
            message: problem.message.clone(),
        })
    }
}
