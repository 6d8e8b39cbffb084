//! What fills the node's registry of pools beside the handoff files: the engines that the node runs
//! itself. Each change updates the pools, and through them the session says it to the control plane
//! at once.

use std::sync::Arc;

use node_agent::Agent;
use node_agent::supervisor::{Settings, Supervision};

use crate::bootstrap::StartError;
use crate::config::{Config, Supervised};

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
