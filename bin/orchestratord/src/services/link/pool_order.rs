//! What an operator orders of a pool, as its node takes it.

use pool_registry_types::pool::{PoolDrain, PoolPurge, PoolReload};
use pool_registry_types::routes;

/// What an operator orders of a pool.
#[derive(Debug, Clone)]
pub(crate) enum PoolOrder {
    Drain(PoolDrain),
    Reload(PoolReload),
    Purge(PoolPurge),
    /// A task waits for the pool.
    Load,
}

impl PoolOrder {
    /// The path of the call, and its body.
    pub(super) fn call(&self) -> (&'static str, serde_json::Value) {
        let json = |body: Result<_, _>| body.unwrap_or_default();
        match self {
            Self::Drain(drain) => (routes::POOL_DRAIN, json(serde_json::to_value(drain))),
            Self::Reload(reload) => (routes::POOL_RELOAD, json(serde_json::to_value(reload))),
            Self::Purge(purge) => (routes::POOL_PURGE, json(serde_json::to_value(purge))),
            Self::Load => (routes::POOL_LOAD, serde_json::json!({})),
        }
    }
}
