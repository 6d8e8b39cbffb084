//! What is known of an engine's end where an attempt needs it, and where the supervisor does.

use node_core::Verdict;
use node_core::supervisor::ReplicaKey;
use pool_registry_types::AttemptId;
use pool_registry_types::error::EngineCrash;
use tokio::time::Instant;

use crate::agent::Agent;

impl Agent {
    /// An engine of this node's own takes attempts from now on.
    pub(crate) fn engine_began(&self, replica_key: &ReplicaKey) {
        self.with_core(|core, _| core.engine_began(&replica_key.pool_id, &replica_key.replica_id));
    }

    /// It has ended; `signal` is that of a crash. Returns whether one attempt alone may have brought
    /// it about.
    pub(crate) fn engine_ended(&self, replica_key: &ReplicaKey, signal: Option<&'static str>) -> bool {
        let suspects = self.with_core(|core, now| {
            core.engine_ended(now, &replica_key.pool_id, &replica_key.replica_id, signal)
        });
        self.engine_has_ended.notify_waiters();
        suspects == 1
    }

    /// How the attempt's engine has crashed; nothing where it ended in another way, or where that is
    /// not known by `until`.
    pub(crate) async fn crash_of(&self, attempt: &AttemptId, until: Instant) -> Option<EngineCrash> {
        loop {
            let ended = self.engine_has_ended.notified();
            tokio::pin!(ended);
            // From here on no end is missed.
            ended.as_mut().enable();
            if let Verdict::Known(crash) = self.with_core(|core, _| core.verdict(attempt)) {
                return crash;
            }
            if tokio::time::timeout_at(until, ended).await.is_err() {
                return None;
            }
        }
    }
}
