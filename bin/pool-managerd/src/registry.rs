//! What fills the node's registry of pools: the callback of handoff events, and the engines that
//! the node runs itself. Each change updates the pools, and through them the session says it to
//! the control plane at once.

use std::sync::Arc;

use handoff_watcher::Change;
use node_agent::Agent;
use node_agent::supervisor::{Settings, Supervision};
use tokio::sync::mpsc;

use crate::bootstrap::StartError;
use crate::config::{Config, Supervised};

/// Feeds the changes to the node until the watcher ends.
pub(crate) async fn follow(agent: Arc<Agent>, mut changes: mpsc::Receiver<Change>) {
    while let Some(change) = changes.recv().await {
        agent.on_handoff(change);
    }
}

/// Starts the engines of the file of pools, and whatever the file says later.
pub(crate) fn supervise(
    agent: &Arc<Agent>,
    config: &Config,
    own: &Supervised,
    seed: u64,
) -> Result<Arc<Supervision>, StartError> {
    let settings = Settings {
        pools: own.pools.clone(),
        runtime_dir: config.runtime_dir.clone(),
        models_dir: config.models_dir.clone(),
        packages_dir: own.packages_dir.clone(),
        logs_dir: own.logs_dir.clone(),
        // This very program, also after its file was replaced by a newer one.
        program: "/proc/self/exe".into(),
        forbid_provisioning: own.forbid_provisioning,
        hub: own.hub.clone(),
        hub_token: own.hub_token.clone(),
    };
    Supervision::start(agent, settings, seed).map_err(|_| StartError::Client)
}
