//! The callback of handoff events: each change of the runtime directory updates the node's pools,
//! and through them the session says it to the control plane at once.

use std::sync::Arc;

use handoff_watcher::Change;
use node_agent::Agent;
use tokio::sync::mpsc;

/// Feeds the changes to the node until the watcher ends.
pub(crate) async fn follow(agent: Arc<Agent>, mut changes: mpsc::Receiver<Change>) {
    while let Some(change) = changes.recv().await {
        agent.on_handoff(change);
    }
}
