//! Each path once, for the routers and for the clients.

use crate::ids::{AttemptId, Epoch, NodeId, PoolId, TaskId};

pub const TARGETS: &str = "/v2/observability/targets";
pub const TASKS: &str = "/v2/tasks";
pub const TASK: &str = "/v2/tasks/{task_id}";
pub const TASK_EVENTS: &str = "/v2/tasks/{task_id}/events";
pub const TASK_CANCEL: &str = "/v2/tasks/{task_id}/cancel";
pub const TASK_EXPLAIN: &str = "/v2/tasks/{task_id}/explain";
pub const PLACEMENT_EXPLAIN: &str = "/v2/placement/explain";
pub const SESSION: &str = "/v2/sessions/{session_id}";
pub const EVENTS: &str = "/v2/events";
pub const NODES: &str = "/v2/nodes";
pub const NODE: &str = "/v2/nodes/{node_id}";
pub const NODE_REGISTER: &str = "/v2/nodes/register";
pub const NODE_DRAIN: &str = "/v2/nodes/{node_id}/drain";
pub const NODE_RESUME: &str = "/v2/nodes/{node_id}/resume";
pub const NODE_HEARTBEAT: &str = "/v2/nodes/{node_id}/heartbeat";
pub const CATALOG_AVAILABILITY: &str = "/v2/catalog/availability";
pub const CATALOG_MODELS: &str = "/v2/catalog/models";
pub const CATALOG_MODEL: &str = "/v2/catalog/models/{model_id}";
pub const CATALOG_MODEL_VERIFY: &str = "/v2/catalog/models/{model_id}/verify";
pub const CATALOG_MODEL_STATE: &str = "/v2/catalog/models/{model_id}/state";
pub const ARTIFACTS: &str = "/v2/artifacts";
pub const ARTIFACT: &str = "/v2/artifacts/{digest}";
pub const META_VERSION: &str = "/v2/meta/version";
pub const META_CAPABILITIES: &str = "/v2/meta/capabilities";
pub const LOG_LEVEL: &str = "/v2/log-level";
pub const OPENAPI: &str = "/openapi.json";
pub const API_PAGE: &str = "/docs";
pub const METRICS: &str = "/metrics";
pub const HEALTH_LIVE: &str = "/health/live";
pub const HEALTH_READY: &str = "/health/ready";
pub const POOLS: &str = "/v2/pools";
pub const POOL_STATUS: &str = "/v2/pools/{pool_id}/status";
pub const POOL_HEALTH: &str = "/v2/pools/{pool_id}/health";
pub const POOL_DRAIN: &str = "/v2/pools/{pool_id}/drain";
pub const POOL_RELOAD: &str = "/v2/pools/{pool_id}/reload";
pub const POOL_PURGE: &str = "/v2/pools/{pool_id}/purge";
/// Of a node: start the engines of a pool that is `loadable`, a task waits for it.
pub const POOL_LOAD: &str = "/v2/pools/{pool_id}/load";
/// What the engines of a pool have written: of their node, and by the control plane of any.
pub const POOL_LOGS: &str = "/v2/pools/{pool_id}/logs";
/// Of a node: whether it takes work.
pub const INTENT: &str = "/v2/intent";
/// Of a node: the models on its disk.
pub const MODELS: &str = "/v2/models";
pub const POOL_INFER: &str = "/v2/pools/{pool_id}/infer";
/// Of a node: the response that all attempts of a thread of the control plane share.
pub const LINK: &str = "/v2/link";
/// Of a node: starts, what was seen, and what is done.
pub const ATTEMPTS: &str = "/v2/attempts";
/// Of a node: one start whose payload is large.
pub const ATTEMPT: &str = "/v2/attempts/{attempt_id}";
/// Of a node: stops and resumes.
pub const ATTEMPTS_CONTROL: &str = "/v2/attempts/control";
/// Of a node: a request that takes no slot, passed on to an engine.
pub const SLOTLESS: &str = "/v2/slotless";

pub fn node(node_id: &NodeId, epoch: &Epoch) -> String {
    format!("{NODES}/{node_id}?epoch={epoch}")
}

pub fn node_heartbeat(node_id: &NodeId) -> String {
    NODE_HEARTBEAT.replace("{node_id}", node_id.as_str())
}

/// The path of one pool's route.
pub fn of_pool(route: &str, pool_id: &PoolId) -> String {
    route.replace("{pool_id}", pool_id.as_str())
}

/// The path of a start that goes alone.
pub fn attempt(attempt_id: AttemptId) -> String {
    ATTEMPT.replace("{attempt_id}", &attempt_id.to_string())
}

pub fn task_events(task_id: TaskId) -> String {
    TASK_EVENTS.replace("{task_id}", &task_id.to_string())
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
    pub const TRACESTATE: &str = "tracestate";
    /// To engines: the id of the attempt.
    pub const REQUEST_ID: &str = "x-request-id";
    pub const BACKOFF_MS: &str = "x-backoff-ms";
    /// The node that has answered.
    pub const NODE: &str = "x-llorch-node";
    /// Our own code, on errors in the shapes of other APIs.
    pub const ERROR: &str = "x-llorch-error";
    /// Where clients of Anthropic's API show their token.
    pub const API_KEY: &str = "x-api-key";
    /// As [`REQUEST_ID`], where clients of Anthropic's API look for it.
    pub const ANTHROPIC_REQUEST_ID: &str = "request-id";
    /// Whether whoever was refused should come again.
    pub const SHOULD_RETRY: &str = "x-should-retry";
    /// What a token's limits leave of requests, as OpenAI's clients read it.
    pub const RATE_LIMIT: &str = "x-ratelimit-limit-requests";
    pub const RATE_REMAINING: &str = "x-ratelimit-remaining-requests";
    pub const RATE_RESET: &str = "x-ratelimit-reset-requests";
    /// Of ours, what pages of other origins may read.
    pub const FOR_CLIENTS: [&str; 13] = [
        TASK_ID,
        REQUEST_ID,
        ANTHROPIC_REQUEST_ID,
        NODE,
        ERROR,
        CORRELATION_ID,
        TRACE_ID,
        "retry-after",
        BACKOFF_MS,
        SHOULD_RETRY,
        RATE_LIMIT,
        RATE_REMAINING,
        RATE_RESET,
    ];
}
