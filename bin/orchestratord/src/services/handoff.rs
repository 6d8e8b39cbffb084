//! The home profile: this machine as the cluster's one node, in process.
//!
//! The same agent that `pool-managerd` runs, fed by the same handoff files, with the control
//! loop where the network would be. The core cannot tell the difference.

use std::path::Path;
use std::time::Duration;

use handoff_watcher::watch::WatchError;
use handoff_watcher::{EngineHosts, HandoffWatcher};
use node_agent::{Agent, HELD_BYTES, Identity, IntentFile, Node, gpu};
use node_registration::{CallError, ControlPlane};
use owned_tasks::Loops;
use pool_registry_types::node::{
    Capabilities, Heartbeat, HeartbeatAnswer, OPENAI_FEATURE, RegisterAnswer, RegisterRequest,
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
    /// Looks at this machine. `interval` is the heartbeat's; `runtime_dir` also keeps what the
    /// operator wants of the node.
    pub(crate) fn new(interval: Duration, runtime_dir: &Path, loops: Loops) -> Self {
        let boot_id = BootId(Uuid::new_v4());
        let identity = Identity {
            node_id: NodeId::new(HOME_NODE).expect("a valid node id"),
            machine_id: MachineId::new(HOME_NODE).expect("a valid machine id"),
            boot_id,
            address: IN_PROCESS.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            labels: Labels::new(),
            capabilities: daemon_kit::config::machine(),
            features: vec![OPENAI_FEATURE.into()],
        };
        let gpus = gpu::GpuWatch::start(None, &loops);
        let capabilities = Capabilities { gpus: gpus.inventory().to_vec(), ..identity.capabilities.clone() };
        let intent_file = IntentFile::new(runtime_dir, &identity.node_id);
        let identity = Identity { capabilities, ..identity };
        let agent = Agent::new(identity, interval, boot_id.0.as_u64_pair().0, intent_file, loops);
        agent.watch_gpus(gpus);
        agent.keep_streams(HELD_BYTES);
        Self { node: Node::new(agent) }
    }

    /// Watches the runtime directory and joins the control loop.
    pub(crate) fn start(&self, runtime_dir: &Path, control: Control) -> Result<Running, WatchError> {
        let stop = CancellationToken::new();
        let watcher = HandoffWatcher::new(runtime_dir, EngineHosts::default(), WATCH_INTERVAL)?;
        let agent = self.node.agent();
        let (changes, watching) = watcher.start(agent.loops(), stop.clone());
        agent.follow_handoffs(changes);
        let session = agent.keep_session(InProcess { control });
        Ok(Running { node: self.node.clone(), session, watching, stop })
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
