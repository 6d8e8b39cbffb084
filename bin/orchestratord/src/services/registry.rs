//! The way to the `ServiceRegistry`.
//!
//! The registry itself is embedded in the control core, whose one owner is the control loop
//! (`services/placement.rs`). Nodes and pools are read here from the copies that this loop hands out
//! ([`crate::services::published`]).

use std::sync::Arc;

use pool_registry_types::snapshot::ClusterSnapshot;
use pool_registry_types::view::{NodeView, PoolOfNode};
use pool_registry_types::{ErrorBody, ErrorCode, NodeId, PoolId};

use crate::services::control::Control;

/// The registry of nodes, as handlers use it.
#[derive(Debug, Clone)]
pub(crate) struct ServiceRegistryHandle {
    control: Control,
}

impl ServiceRegistryHandle {
    pub(crate) fn new(control: Control) -> Self {
        Self { control }
    }

    /// All nodes, at most 100 ms old, with every change of them that was answered.
    pub(crate) async fn view(&self) -> Result<Arc<ClusterSnapshot>, ErrorBody> {
        self.control.published.cluster().await
    }

    /// Errors: `NODE_UNKNOWN`.
    pub(crate) async fn node(&self, node_id: &NodeId) -> Result<NodeView, ErrorBody> {
        let view = self.control.published.cluster_with(Some(node_id)).await?;
        view.node(node_id).ok_or_else(|| {
            let mut error = ErrorBody::new(ErrorCode::NodeUnknown, format!("no node {node_id}"));
            error.node_id = Some(node_id.clone());
            error
        })
    }

    /// The one pool of this name, on the node where one is named; with the node's address.
    /// Errors: `NOT_FOUND`, and `POOL_AMBIGUOUS` where several nodes have one.
    pub(crate) async fn pool(
        &self,
        pool_id: &PoolId,
        node_id: Option<&NodeId>,
    ) -> Result<(PoolOfNode, String), ErrorBody> {
        let view = self.control.published.cluster_with(node_id).await?;
        let mut found = view.pools_named(pool_id, node_id);
        if found.len() > 1 {
            let nodes: Vec<&str> = found.iter().map(|(pool, _)| pool.node_id.as_str()).collect();
            let message = format!("pool {pool_id} is on {}: say which with ?node_id=", nodes.join(", "));
            return Err(ErrorBody::new(ErrorCode::PoolAmbiguous, message));
        }
        found.pop().ok_or_else(|| {
            let place = node_id.map(|node_id| format!(" on {node_id}")).unwrap_or_default();
            ErrorBody::new(ErrorCode::NotFound, format!("no pool {pool_id}{place}"))
        })
    }
}
