//! What both daemons do identically at their edges.
//!
//! Logs, the bearer token, correlation ids, errors as answers, bodies as values, listening and
//! stopping. Nothing here knows what a node or a task is.

pub mod answer;
pub mod auth;
pub mod clock;
pub mod config;
pub mod correlation;
pub mod extract;
pub mod metrics;
pub mod serve;
pub mod telemetry;

pub use answer::ApiError;
pub use auth::Tokens;
pub use clock::Clock;
pub use extract::{Body, PathId, RawBody, WrappedBody};
