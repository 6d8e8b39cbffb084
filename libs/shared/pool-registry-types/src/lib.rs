//! The vocabulary of the cluster and its wire, shared by both daemons.
//!
//! Everything here is data, or a rule about data that both sides must read alike: identifiers, the
//! bodies that cross the network and their bounds, the tables of errors and of engines, the
//! event-stream format, the view that readers get, what everybody reckons time by (the [`Moment`],
//! and the pauses between tries), and the [`Lookup`], by which the pure crates find without an order. There is no I/O and no clock in this crate, and it knows
//! no state of a cluster. The ideas needed to read it: an id that exists is valid, because its
//! constructor checks; and what the types of a body cannot hold, its `check` finds.

pub mod constraints;
pub mod engines;
pub mod error;
pub mod ids;
mod inputs;
pub mod limits;
mod lookup;
pub mod moment;
pub mod nearest;
mod newer;
pub mod node;
pub mod placement;
pub mod pool;
mod report_bounds;
pub mod retry;
pub mod routes;
pub mod snapshot;
pub mod sse;
pub mod task;
pub mod trace;
pub mod view;

pub use error::{ErrorBody, ErrorCode};
pub use ids::{
    AttemptId, BootId, Digest, Epoch, HolderId, LabelName, LifeId, LogId, MachineId, ModelRef, NodeId,
    PoolId, PoolKey, ReplicaId, SessionId, SessionKey, TaskId,
};
pub use lookup::Lookup;
pub use moment::Moment;
pub use retry::{Backoff, RetryPolicy};
pub use trace::TraceContext;
