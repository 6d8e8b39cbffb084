//! Each path once, for the routers and for the clients.

use crate::ids::{Epoch, NodeId, PoolId};

pub const TASKS: &str = "/v2/tasks";
pub const TASK: &str = "/v2/tasks/{id}";
pub const TASK_EVENTS: &str = "/v2/tasks/{id}/events";
pub const TASK_CANCEL: &str = "/v2/tasks/{id}/cancel";
pub const TASK_EXPLAIN: &str = "/v2/tasks/{id}/explain";
pub const PLACEMENT_EXPLAIN: &str = "/v2/placement/explain";
pub const SESSION: &str = "/v2/sessions/{id}";
pub const EVENTS: &str = "/v2/events";
pub const NODES: &str = "/v2/nodes";
pub const NODE: &str = "/v2/nodes/{id}";
pub const NODE_REGISTER: &str = "/v2/nodes/register";
pub const NODE_DRAIN: &str = "/v2/nodes/{id}/drain";
pub const NODE_RESUME: &str = "/v2/nodes/{id}/resume";
pub const NODE_HEARTBEAT: &str = "/v2/nodes/{id}/heartbeat";
pub const CATALOG_AVAILABILITY: &str = "/v2/catalog/availability";
pub const CATALOG_MODELS: &str = "/v2/catalog/models";
pub const CATALOG_MODEL: &str = "/v2/catalog/models/{id}";
pub const CATALOG_MODEL_VERIFY: &str = "/v2/catalog/models/{id}/verify";
pub const CATALOG_MODEL_STATE: &str = "/v2/catalog/models/{id}/state";
pub const ARTIFACTS: &str = "/v2/artifacts";
pub const ARTIFACT: &str = "/v2/artifacts/{id}";
pub const META_VERSION: &str = "/v2/meta/version";
pub const META_CAPABILITIES: &str = "/v2/meta/capabilities";
pub const OPENAPI: &str = "/openapi.json";
pub const API_PAGE: &str = "/docs";
pub const METRICS: &str = "/metrics";
pub const HEALTH_LIVE: &str = "/health/live";
pub const HEALTH_READY: &str = "/health/ready";
pub const POOLS: &str = "/v2/pools";
pub const POOL_STATUS: &str = "/v2/pools/{id}/status";
pub const POOL_HEALTH: &str = "/v2/pools/{id}/health";
pub const POOL_DRAIN: &str = "/v2/pools/{id}/drain";
pub const POOL_RELOAD: &str = "/v2/pools/{id}/reload";
pub const POOL_PURGE: &str = "/v2/pools/{id}/purge";
/// Of a node: start the engines of a pool that is `loadable`, a task waits for it.
pub const POOL_LOAD: &str = "/v2/pools/{id}/load";
/// Of a node: what the engines of a pool have written.
pub const POOL_LOGS: &str = "/v2/pools/{id}/logs";
/// Of a node: whether it takes work.
pub const INTENT: &str = "/v2/intent";
/// Of a node: the models on its disk.
pub const MODELS: &str = "/v2/models";
pub const POOL_INFER: &str = "/v2/pools/{id}/infer";

pub fn node(node_id: &NodeId, epoch: &Epoch) -> String {
    format!("{NODES}/{node_id}?epoch={epoch}")
}

pub fn node_heartbeat(node_id: &NodeId) -> String {
    format!("{NODES}/{node_id}/heartbeat")
}

pub fn pool_infer(pool_id: &PoolId) -> String {
    format!("{POOLS}/{pool_id}/infer")
}

/// Headers of our own.
pub mod headers {
    pub const TASK_ID: &str = "x-llorch-task-id";
    /// The number of the last report made before an attempt was accepted.
    pub const REPORT_SEQ: &str = "x-llorch-report-seq";
    pub const REPLICA_ID: &str = "x-llorch-replica-id";
    pub const CORRELATION_ID: &str = "x-correlation-id";
    pub const TRACE_ID: &str = "x-trace-id";
    pub const TRACEPARENT: &str = "traceparent";
    pub const BACKOFF_MS: &str = "x-backoff-ms";
}
