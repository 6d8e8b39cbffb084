//! What an operator orders of one pool: drain, reload, purge.
//!
//! An engine that was found through a handoff file was started by somebody else: the node lets
//! its pool drain and opens it again, and says that it cannot change or remove it. What the node
//! has started itself is its supervisor's to change.

use std::time::Duration;

use pool_registry_types::pool::{PoolDrain, PoolOrdered, PoolPurge, PoolReload};
use pool_registry_types::{ErrorBody, ErrorCode, PoolId};

use crate::node::Node;

impl Node {
    /// Errors: `NOT_FOUND`.
    pub fn order_drain(&self, pool_id: &PoolId, drain: PoolDrain) -> Result<PoolOrdered, ErrorBody> {
        let known = self.agent().drain_pool(pool_id, drain.deadline_ms.map(Duration::from_millis));
        self.ordered(pool_id, known)
    }

    /// Opens the pool again. Errors: `NOT_FOUND`, `INVALID_PARAMS`, and
    /// `UNSUPPORTED` for another model.
    pub async fn order_reload(
        &self,
        pool_id: &PoolId,
        reload: &PoolReload,
    ) -> Result<PoolOrdered, ErrorBody> {
        reload.check()?;
        if let Some(supervision) = self.supervising(pool_id) {
            supervision.reload(pool_id, reload).await?;
            // It takes work again, as soon as something of it does.
            self.agent().reopen_pool(pool_id);
            return self.ordered(pool_id, true);
        }
        if reload.new_model_ref.is_some() {
            return Err(self.not_ours(pool_id, "new_model_ref: another model is loaded"));
        }
        let known = self.agent().reopen_pool(pool_id);
        self.ordered(pool_id, known)
    }

    /// Errors: `NOT_FOUND` and `UNSUPPORTED`.
    pub fn order_purge(&self, pool_id: &PoolId, purge: PoolPurge) -> Result<PoolOrdered, ErrorBody> {
        if let Some(supervision) = self.supervising(pool_id) {
            supervision.purge(pool_id, purge)?;
            return self.ordered(pool_id, true);
        }
        self.ordered(pool_id, true)?;
        Err(self.not_ours(pool_id, "an engine is removed"))
    }

    /// A task waits for a pool that is `loadable`. Errors: `NOT_FOUND`.
    pub fn order_load(&self, pool_id: &PoolId) -> Result<PoolOrdered, ErrorBody> {
        if let Some(supervision) = self.supervising(pool_id) {
            supervision.load(pool_id)?;
        }
        self.ordered(pool_id, true)
    }

    fn not_ours(&self, pool_id: &PoolId, what: &str) -> ErrorBody {
        let message =
            format!("{what} where the engine was started: this node only found it, by its handoff file");
        ErrorBody::new(ErrorCode::Unsupported, message).at(&self.agent().identity().node_id, pool_id)
    }

    fn ordered(&self, pool_id: &PoolId, known: bool) -> Result<PoolOrdered, ErrorBody> {
        let node_id = self.agent().identity().node_id;
        let pool = self.agent().pools().into_iter().find(|pool| pool.pool_id == *pool_id).filter(|_| known);
        let pool = pool.ok_or_else(|| {
            ErrorBody::new(ErrorCode::NotFound, format!("no pool {pool_id} on this node"))
                .at(&node_id, pool_id)
        })?;
        Ok(PoolOrdered { node_id, pool_id: pool.pool_id, state: pool.state, drain: pool.drain })
    }
}
