//! [`Node`]: the owner of an agent and of the supervision of the engines that the node runs itself.
//!
//! The supervision works on the agent; the agent knows nothing of it. What concerns both is asked
//! here: orders for pools, and the end.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pool_registry_types::PoolId;
use tokio::sync::watch;

use crate::agent::Agent;
use crate::supervisor::{Settings, Supervision};

/// One node: its agent, and its engines where it runs any.
#[derive(Debug, Clone)]
pub struct Node {
    agent: Arc<Agent>,
    supervision: Option<Arc<Supervision>>,
}

impl Node {
    /// A node that serves the engines of others only.
    pub fn new(agent: Arc<Agent>) -> Self {
        Self { agent, supervision: None }
    }

    /// Starts the engines of the file of pools, and whatever the file says later. `seed` decides the
    /// jitter of pauses; each of `hangups` has the file read at once, and the log say what came of it.
    /// Error: the client for downloads cannot be made.
    pub fn with_engines(
        agent: Arc<Agent>,
        settings: Settings,
        hangups: watch::Receiver<u64>,
        seed: u64,
    ) -> reqwest::Result<Self> {
        let supervision = Supervision::start(&agent, settings, hangups, seed)?;
        Ok(Self { agent, supervision: Some(supervision) })
    }

    pub fn agent(&self) -> &Arc<Agent> {
        &self.agent
    }

    /// The supervision, where the pool's engines are this node's own.
    pub(crate) fn supervising(&self, pool_id: &PoolId) -> Option<&Arc<Supervision>> {
        self.supervision.as_ref().filter(|supervision| supervision.supervises(pool_id))
    }

    /// Where the replicas of a pool write, by their ids.
    pub fn logs(&self, pool_id: &PoolId) -> BTreeMap<String, PathBuf> {
        self.supervision.as_ref().map(|supervision| supervision.logs(pool_id)).unwrap_or_default()
    }

    /// Takes no new work, lets what runs finish for `grace`, leaves the cluster, and ends the engines
    /// that are not to be kept.
    pub async fn drain_and_leave(&self, grace: Duration) {
        self.agent.drain_and_leave(grace).await;
        if let Some(supervision) = &self.supervision {
            supervision.stop().await;
        }
    }
}
