//! What an operator orders of one pool: drain, reload, purge.
//!
//! An engine that was found through a handoff file was started by somebody else: the node lets
//! its pool drain and opens it again, and says that it cannot change or remove it.

use std::sync::Arc;
use std::time::Duration;

use pool_registry_types::pool::{PoolDrain, PoolOrdered, PoolReload};
use pool_registry_types::{ErrorBody, ErrorCode, PoolId};

use crate::agent::Agent;

impl Agent {
    /// Errors: `NOT_FOUND`.
    pub fn order_drain(
        self: &Arc<Self>,
        pool_id: &PoolId,
        drain: PoolDrain,
    ) -> Result<PoolOrdered, ErrorBody> {
        let known = self.drain_pool(pool_id, drain.deadline_ms.map(Duration::from_millis));
        self.ordered(pool_id, known)
    }

    /// Opens the pool again. Errors: `NOT_FOUND`, and
    /// `UNSUPPORTED` for another model.
    pub fn order_reload(&self, pool_id: &PoolId, reload: &PoolReload) -> Result<PoolOrdered, ErrorBody> {
        if reload.new_model_ref.is_some() {
            return Err(self.not_ours(pool_id, "new_model_ref: another model is loaded"));
        }
        let known = self.reopen_pool(pool_id);
        self.ordered(pool_id, known)
    }

    /// Errors: `NOT_FOUND` and `UNSUPPORTED`.
    pub fn order_purge(&self, pool_id: &PoolId) -> Result<PoolOrdered, ErrorBody> {
        self.ordered(pool_id, true)?;
        Err(self.not_ours(pool_id, "an engine is removed"))
    }

    fn not_ours(&self, pool_id: &PoolId, what: &str) -> ErrorBody {
        let message =
            format!("{what} where the engine was started: this node only found it, by its handoff file");
        ErrorBody::new(ErrorCode::Unsupported, message).at(&self.identity().node_id, pool_id)
    }

    fn ordered(&self, pool_id: &PoolId, known: bool) -> Result<PoolOrdered, ErrorBody> {
        let node_id = self.identity().node_id;
        let pool = self.pools().into_iter().find(|pool| pool.pool_id == *pool_id).filter(|_| known);
        let pool = pool.ok_or_else(|| {
            ErrorBody::new(ErrorCode::NotFound, format!("no pool {pool_id} on this node"))
                .at(&node_id, pool_id)
        })?;
        Ok(PoolOrdered { node_id, pool_id: pool.pool_id, state: pool.state, drain: pool.drain })
    }
}
