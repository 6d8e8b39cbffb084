//! What ties together all that is done for one request, across processes.

use serde::{Deserialize, Serialize};

/// The trace of a request. It is taken over or drawn where the request comes in, and goes on
/// unchanged with whatever is done for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceContext {
    /// W3C trace context, complete: `00-<32 hex>-<16 hex>-<2 hex>`.
    pub traceparent: String,
    /// 1 to 128 visible ASCII characters.
    pub correlation_id: String,
}
