//! What every handler knows.

use std::sync::Arc;

use daemon_kit::Tokens;
use daemon_kit::connections::Counts;
use node_agent::Agent;
use node_agent::supervisor::Supervision;

/// Shared by all requests.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) agent: Arc<Agent>,
    /// Absent: this node runs no engines of its own.
    pub(crate) supervision: Option<Arc<Supervision>>,
    /// This node joins no cluster.
    pub(crate) alone: bool,
    pub(crate) tokens: Tokens,
    pub(crate) connections: Arc<Counts>,
}
