//! What fills the node's registry of pools beside the handoff files: the engines that the node runs
//! itself. Each change updates the pools, and through them the session says it to the control plane
//! at once.

use node_agent::supervisor::Settings;

use crate::config::{Config, Supervised};

/// For the engines of the file of pools, and whatever the file says later.
pub(crate) fn supervision(config: &Config, own: &Supervised) -> Settings {
    Settings {
        pools: own.pools.clone(),
        runtime_dir: config.runtime_dir.clone(),
        engine_hosts: config.engine_hosts.clone(),
        models_dir: config.models_dir.clone(),
        packages_dir: own.packages_dir.clone(),
        logs_dir: own.logs_dir.clone(),
        // This very program, also after its file was replaced by a newer one.
        program: "/proc/self/exe".into(),
        forbid_provisioning: own.forbid_provisioning,
        hub: own.hub.clone(),
        hub_token: own.hub_token.clone(),
    }
}
