//! The vocabulary of the cluster and its wire, shared by both daemons.
//!
//! Everything here is data: identifiers that cannot be built wrong, the bodies that cross
//! the network, the table of errors, the event-stream format, the view that readers get, and what
//! everybody reckons time by: the [`Moment`], and the pauses between tries. There
//! is no I/O, no clock and no decision in this crate. The one idea needed to read it: a value that exists is valid, because every constructor checks.

pub mod constraints;
pub mod engines;
pub mod error;
pub mod ids;
mod inputs;
pub mod moment;
mod newer;
pub mod node;
pub mod placement;
pub mod pool;
pub mod retry;
pub mod routes;
pub mod snapshot;
pub mod sse;
pub mod task;
pub mod trace;
pub mod view;

pub use error::{ErrorBody, ErrorCode};
pub use ids::{
    AttemptId, BootId, Digest, Epoch, LabelName, LogId, MachineId, ModelRef, NodeId, PoolId, PoolKey,
    ReplicaId, SessionId, TaskId,
};
pub use moment::Moment;
pub use retry::{Backoff, RetryPolicy};
pub use trace::TraceContext;
