//! The settings of a node that both daemons have: `pool-managerd`, and `orchestratord` where it is
//! its own node in the home profile.
//!
//! Those without a variable here have the daemon's prefix before their names. Where a directory is that
//! is not given is the daemon's to say, as the default of the setting.

use std::path::PathBuf;

use clap::Args;
use handoff_watcher::EngineHosts;
use pool_registry_types::LabelName;
use pool_registry_types::placement::{Labels, MAX_CONSTRAINTS};
use secrecy::SecretString;

use crate::download::Hub;
use crate::pools_file::{PoolsFile, PoolsFileError};
use crate::supervisor;

/// The settings as they are given.
#[derive(Debug, Clone, Args)]
pub struct NodeSettings {
    /// What the operator says of this node, for placement: zone=a,tier=fast.
    #[arg(long)]
    labels: Option<String>,
    /// The directory of the models on this node's disk, one folder each.
    #[arg(long, global = true)]
    models_dir: Option<PathBuf>,
    /// The directory of the engines' handoff files, and of the sockets to engines that are kept.
    #[arg(long)]
    runtime_dir: Option<PathBuf>,
    /// Hosts on which engines may be, comma-separated [default: this machine].
    #[arg(long)]
    engine_hosts: Option<String>,
    /// A TOML file of the pools whose engines this node runs itself [default: none, engines are only found].
    #[arg(long)]
    pools: Option<PathBuf>,
    /// Where engines from the package index are installed.
    #[arg(long)]
    packages_dir: Option<PathBuf>,
    /// Where the engines' output goes.
    #[arg(long)]
    logs_dir: Option<PathBuf>,
    /// Download and install nothing, whatever the file of pools allows.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    forbid_provisioning: bool,
    /// The hub that hf: sources of models name.
    #[arg(long, env = "HF_ENDPOINT", default_value = "https://huggingface.co", global = true)]
    hf_endpoint: String,
    /// A token for the hub.
    #[arg(long, env = "HF_TOKEN", hide_env_values = true, value_parser = secret, global = true)]
    hf_token: Option<SecretString>,
    /// NVIDIA's management library [default: where the system keeps it].
    #[arg(long)]
    nvml_lib: Option<PathBuf>,
}

fn secret(text: &str) -> Result<SecretString, std::convert::Infallible> {
    Ok(text.into())
}

/// The settings as they hold together.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    pub labels: Labels,
    pub models_dir: PathBuf,
    pub runtime_dir: PathBuf,
    pub engine_hosts: EngineHosts,
    pub nvml_lib: Option<PathBuf>,
    /// Absent: this node runs no engines of its own.
    pub engines: Option<supervisor::Settings>,
}

/// Why the settings do not hold together. Each names the variable, by the daemon's prefix.
#[derive(Debug, thiserror::Error)]
pub enum NodeSettingsError {
    #[error("{prefix}_LABELS: {text:?} is not name=value, comma-separated, of [A-Za-z0-9._-]")]
    Labels { prefix: &'static str, text: String },
    #[error("{prefix}_LABELS: {text:?} names a label twice, or is one more than {MAX_CONSTRAINTS}")]
    LabelTwice { prefix: &'static str, text: String },
    #[error("{prefix}_POOLS: {error}")]
    Pools { prefix: &'static str, error: PoolsFileError },
    #[error("HF_ENDPOINT: {0:?} is not http://host:port")]
    Hub(String),
    #[error("{prefix}_{setting}: no directory for it can be written here, set one")]
    NoDirectory { prefix: &'static str, setting: &'static str },
}

impl NodeSettings {
    /// The file of pools, where one is given.
    pub fn pools(&self) -> Option<&PathBuf> {
        self.pools.as_ref()
    }

    pub fn models_dir(&self) -> Option<&PathBuf> {
        self.models_dir.as_ref()
    }

    pub fn packages_dir(&self) -> Option<&PathBuf> {
        self.packages_dir.as_ref()
    }

    pub fn forbids_provisioning(&self) -> bool {
        self.forbid_provisioning
    }

    pub fn hub(&self) -> Hub<'_> {
        Hub { endpoint: &self.hf_endpoint, token: self.hf_token.as_ref() }
    }

    /// Checks the settings, and reads the file of pools: one that is wrong from the start stops the
    /// daemon, one that is made wrong later does not.
    pub fn check(self, prefix: &'static str) -> Result<NodeConfig, NodeSettingsError> {
        let labels = self.labels.as_deref().map(|text| labels(prefix, text)).transpose()?;
        let needed = |directory: Option<PathBuf>, setting: &'static str| {
            directory.ok_or(NodeSettingsError::NoDirectory { prefix, setting })
        };
        let runtime_dir = needed(self.runtime_dir, "RUNTIME_DIR")?;
        let models_dir = needed(self.models_dir, "MODELS_DIR")?;
        let engine_hosts =
            self.engine_hosts.map_or_else(EngineHosts::default, |list| EngineHosts::parse(&list));
        let engines = match self.pools {
            None => None,
            Some(pools) => {
                PoolsFile::read(&pools).map_err(|error| NodeSettingsError::Pools { prefix, error })?;
                Some(supervisor::Settings {
                    pools,
                    runtime_dir: runtime_dir.clone(),
                    engine_hosts: engine_hosts.clone(),
                    models_dir: models_dir.clone(),
                    packages_dir: needed(self.packages_dir, "PACKAGES_DIR")?,
                    logs_dir: needed(self.logs_dir, "LOGS_DIR")?,
                    // This very program, also after its file was replaced by a newer one.
                    program: "/proc/self/exe".into(),
                    forbid_provisioning: self.forbid_provisioning,
                    hub: hub(self.hf_endpoint)?,
                    hub_token: self.hf_token,
                })
            }
        };
        Ok(NodeConfig {
            labels: labels.unwrap_or_default(),
            models_dir,
            runtime_dir,
            engine_hosts,
            nvml_lib: self.nvml_lib,
            engines,
        })
    }
}

fn hub(url: String) -> Result<String, NodeSettingsError> {
    let trimmed = url.trim_end_matches('/');
    let host = trimmed.strip_prefix("http://").or_else(|| trimmed.strip_prefix("https://"));
    match host {
        Some(host) if !host.is_empty() && !host.contains(['/', '@', '?', '#', ' ']) => Ok(trimmed.to_owned()),
        _ => Err(NodeSettingsError::Hub(url)),
    }
}

fn labels(prefix: &'static str, text: &str) -> Result<Labels, NodeSettingsError> {
    let pair = |pair: &str| {
        let (name, value) = pair.trim().split_once('=')?;
        Some((LabelName::new(name).ok()?, LabelName::new(value).ok()?))
    };
    let mut labels = Labels::new();
    for part in text.split(',').filter(|part| !part.trim().is_empty()) {
        let (name, value) =
            pair(part).ok_or_else(|| NodeSettingsError::Labels { prefix, text: part.to_owned() })?;
        if labels.insert(name, value).is_some() || labels.len() > MAX_CONSTRAINTS {
            return Err(NodeSettingsError::LabelTwice { prefix, text: part.to_owned() });
        }
    }
    Ok(labels)
}
