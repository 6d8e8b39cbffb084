//! What both daemons do identically at their edges.
//!
//! Settings, logs, tokens and who may call, TLS, connections and their bounds, the audit log,
//! correlation ids, errors as answers, bodies as values, metrics, the common part of the API's
//! document, listening and stopping. Of tasks it knows only how many a token may have at once.

mod activity;
pub mod answer;
mod answer_room;
mod audit;
pub mod auth;
pub mod byte_budget;
pub mod caller;
pub mod calls;
pub mod clock;
pub mod config;
pub mod connections;
pub mod correlation;
pub mod directories;
pub mod directory_lock;
pub mod document;
pub mod extract;
mod first_head;
mod follow;
pub mod front;
mod handover;
pub mod hangups;
pub mod health_check;
pub mod hosts;
pub mod log_level;
pub mod metrics;
mod one_line;
mod plaintext;
pub mod quota;
mod room;
pub mod serve;
pub mod settings;
mod socket;
mod stream_body;
pub mod telemetry;
pub mod tls;
pub mod tokens;

pub use answer::ApiError;
pub use auth::Tokens;
pub use caller::Caller;
pub use clock::Clock;
pub use extract::{Body, CountedBody, NodeBody, OwnNode, PathId, RawBody, SizedNodeBody, WrappedBody};
pub use stream_body::stream_body;
