//! What every handler knows.

use std::sync::Arc;

use daemon_kit::Tokens;
use daemon_kit::calls::Calls;
use daemon_kit::connections::Counts;
use daemon_kit::tls::OwnCertificate;
use node_agent::Agent;

/// Shared by all requests.
pub(crate) type AppState = Arc<App>;

#[derive(Debug)]
pub(crate) struct App {
    pub(crate) agent: Arc<Agent>,
    /// The agent's owner, for what its supervision has a say in.
    pub(crate) own: node_agent::Node,
    /// This node joins no cluster.
    pub(crate) alone: bool,
    pub(crate) tokens: Tokens,
    pub(crate) connections: Arc<Counts>,
    pub(crate) calls: Arc<Calls>,
    pub(crate) certificate: Option<Arc<OwnCertificate>>,
}
