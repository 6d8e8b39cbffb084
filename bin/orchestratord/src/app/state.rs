//! What every handler knows.

use std::sync::Arc;

use daemon_kit::Tokens;
use daemon_kit::byte_budget::BodyBudgets;
use daemon_kit::calls::Calls;
use daemon_kit::connections::Counts;
use daemon_kit::quota::Quota;
use daemon_kit::tls::OwnCertificate;
use owned_tasks::{Loops, Worker};

use crate::services::addresses::NodeAddresses;
use crate::services::artifacts::Artifacts;
use crate::services::catalog::Catalog;
use crate::services::control::Control;
use crate::services::dispatch::Relays;
use crate::services::expected::ExpectedNodes;
use crate::services::gateway::Gateway;
use crate::services::registry::ServiceRegistryHandle;
use crate::services::report_shares::ReportShares;
use crate::services::streams::{Keys, Streams};

/// Shared by all requests.
pub(crate) type AppState = Arc<App>;

#[derive(Debug)]
pub(crate) struct App {
    /// The nodes: the registry itself lives in the control core, in its one owner.
    pub(crate) service_registry: ServiceRegistryHandle,
    /// Tasks and sessions.
    pub(crate) control: Control,
    pub(crate) streams: Arc<Streams>,
    /// Names that clients give their requests.
    pub(crate) keys: Arc<Keys>,
    /// The way to the nodes.
    pub(crate) relays: Arc<Relays>,
    pub(crate) catalog: Arc<Catalog>,
    /// One change of the catalog at a time, its news to the control loop included.
    pub(crate) catalog_order: Arc<tokio::sync::Mutex<()>>,
    pub(crate) artifacts: Arc<Artifacts>,
    pub(crate) gateway: Gateway,
    /// On which they are written and read.
    pub(crate) artifact_worker: Worker,
    pub(crate) cloud_profile: bool,
    pub(crate) node_addresses: Arc<NodeAddresses>,
    /// What one holder may have at once.
    pub(crate) quota: Arc<Quota>,
    /// What the reports of one token's nodes may take.
    pub(crate) report_shares: Arc<ReportShares>,
    /// What requests may take of memory.
    pub(crate) bodies: Arc<BodyBudgets>,
    pub(crate) expected: Arc<ExpectedNodes>,
    pub(crate) tokens: Tokens,
    pub(crate) connections: Arc<Counts>,
    pub(crate) calls: Arc<Calls>,
    pub(crate) certificate: Option<Arc<OwnCertificate>>,
    pub(crate) loops: Loops,
}
