//! The home profile: this machine as the cluster's one node, in process.
//!
//! The same node that `pool-managerd` runs, put together by the same hand: engines of handoff files, and
//! those of a file of pools, with the control loop where the network would be. The core cannot tell
//! the difference.

use std::path::Path;
use std::time::Duration;

use node_agent::settings::NodeConfig;
use node_agent::{Assembled, Assembly, AssemblyError, HELD_BYTES, Identity, Node};
use node_registration::{CallError, ControlPlane};
use owned_tasks::Loops;
use pool_registry_types::node::{
    Heartbeat, HeartbeatAnswer, OPENAI_FEATURE, RegisterAnswer, RegisterRequest,
};
use pool_registry_types::placement::Labels;
use pool_registry_types::{BootId, Epoch, MachineId, NodeId};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::services::control::Control;

/// The one node's name, and what stands for its address.
const HOME_NODE: &str = "home";
const IN_PROCESS: &str = "in-process";
/// Pause between two scans of the runtime directory.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// The local machine as a node.
#[derive(Debug)]
pub(crate) struct Home {
    pub(crate) node: Node,
    watching: JoinHandle<()>,
    stop: CancellationToken,
}

/// The tasks of a running home node.
#[derive(Debug)]
pub(crate) struct Running {
    node: Node,
    session: JoinHandle<()>,
    watching: JoinHandle<()>,
    stop: CancellationToken,
}

impl Home {
    /// Looks at this machine, and starts its engines. `interval` is the heartbeat's; `data_dir` also keeps
    /// what the operator wants of the node.
    pub(crate) fn new(
        config: &NodeConfig,
        data_dir: &Path,
        interval: Duration,
        loops: &Loops,
    ) -> Result<Self, AssemblyError> {
        let identity = Identity {
            node_id: NodeId::new(HOME_NODE).expect("a valid node id"),
            machine_id: MachineId::new(HOME_NODE).expect("a valid machine id"),
            boot_id: BootId(Uuid::new_v4()),
            address: IN_PROCESS.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            labels: Labels::new(),
            capabilities: daemon_kit::config::machine(),
            features: vec![OPENAI_FEATURE.into()],
        };
        let assembly = Assembly {
            identity,
            state_dir: data_dir.to_owned(),
            heartbeat_interval: interval,
            watch_interval: WATCH_INTERVAL,
            held_bytes: HELD_BYTES,
            hangups: daemon_kit::hangups::subscribe(),
        };
        let stop = CancellationToken::new();
        let Assembled { node, watching } = assembly.start(config, loops, &stop)?;
        Ok(Self { node, watching, stop })
    }

    /// Joins the control loop.
    pub(crate) fn start(self, control: Control) -> Running {
        let Self { node, watching, stop } = self;
        let session = node.agent().keep_session(InProcess { control });
        Running { node, session, watching, stop }
    }
}

impl Running {
    /// Takes no new work, lets what runs finish for `grace`, leaves.
    pub(crate) async fn leave(self, grace: Duration) {
        self.node.drain_and_leave(grace).await;
        // The control loop answers in process; the bound is for the case that it is gone.
        let left = tokio::time::timeout(Duration::from_secs(1), self.session).await;
        if left.is_err() {
            tracing::warn!("the home node could not deregister");
        }
        self.stop.cancel();
        self.node.agent().stop().await;
        // A look at a dead mount may never end.
        let _ = tokio::time::timeout(Duration::from_secs(1), self.watching).await;
    }
}

/// The control plane as the home node sees it.
struct InProcess {
    control: Control,
}

impl ControlPlane for InProcess {
    async fn register(&self, request: RegisterRequest) -> Result<RegisterAnswer, CallError> {
        self.control.register(request, None).await.map_err(CallError::Refused)
    }

    async fn heartbeat(&self, node_id: &NodeId, beat: Heartbeat) -> Result<HeartbeatAnswer, CallError> {
        self.control.heartbeat(node_id.clone(), beat).await.map_err(CallError::Refused)
    }

    async fn deregister(&self, node_id: &NodeId, epoch: &Epoch) -> Result<(), CallError> {
        let left = self.control.deregister(node_id.clone(), Some(epoch.clone())).await;
        left.map_err(CallError::Refused)
    }
}
