//! A node put together, the same for `pool-managerd` and for the home profile: its agent, what it
//! looks at, and its engines. What differs is who it speaks to: the session is the daemon's to begin.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use handoff_watcher::HandoffWatcher;
use handoff_watcher::watch::WatchError;
use node_core::Identity;
use owned_tasks::Loops;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;
use crate::gpu::GpuWatch;
use crate::intent::IntentFile;
use crate::node::Node;
use crate::settings::NodeConfig;

/// What a daemon says of the node that it runs, beside the node's settings.
#[derive(Debug)]
pub struct Assembly {
    /// Its GPUs and labels are put in here.
    pub identity: Identity,
    /// What the operator wants of the node is kept there.
    pub state_dir: PathBuf,
    pub heartbeat_interval: Duration,
    /// Pause between two scans of the runtime directory.
    pub watch_interval: Duration,
    /// Bytes of attempts' streams that are kept for their readers.
    pub held_bytes: usize,
    /// Times that the daemon was told to read its files again (SIGHUP).
    pub hangups: watch::Receiver<u64>,
}

/// A node at work that speaks to no control plane yet.
#[derive(Debug)]
pub struct Assembled {
    pub node: Node,
    /// Ends once `stop` was asked for; a look at a dead mount may never end.
    pub watching: JoinHandle<()>,
}

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum AssemblyError {
    #[error(transparent)]
    RuntimeDir(#[from] WatchError),
    #[error("the HTTP client for downloads cannot be made")]
    Client(#[from] reqwest::Error),
}

impl Assembly {
    /// Looks at this machine, watches the runtime directory until `stop`, and starts the engines of the
    /// file of pools. `loops` are the daemon's.
    pub fn start(
        self,
        config: &NodeConfig,
        loops: &Loops,
        stop: &CancellationToken,
    ) -> Result<Assembled, AssemblyError> {
        let Self { mut identity, state_dir, heartbeat_interval, watch_interval, held_bytes, hangups } = self;
        let gpus = GpuWatch::start(config.nvml_lib.clone(), loops);
        identity.labels.clone_from(&config.labels);
        identity.capabilities.gpus = gpus.inventory().to_vec();
        let seed = identity.boot_id.0.as_u64_pair().0;
        let intent_file = IntentFile::new(&state_dir, &config.runtime_dir, &identity.node_id);
        let agent = Agent::new(identity, heartbeat_interval, seed, intent_file, loops.clone());
        agent.keep_streams(held_bytes);
        agent.watch_models(config.models_dir.clone());
        let watcher = HandoffWatcher::new(&config.runtime_dir, config.engine_hosts.clone(), watch_interval)?;
        let (changes, watching) = watcher.start(loops, stop.clone());
        let node = match &config.engines {
            None => Node::new(Arc::clone(&agent)),
            Some(settings) => Node::with_engines(Arc::clone(&agent), settings.clone(), hangups, seed)?,
        };
        agent.follow_handoffs(changes);
        agent.watch_gpus(gpus);
        Ok(Assembled { node, watching })
    }
}
