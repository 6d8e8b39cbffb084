//! A task apart from its client's connection: what is known of it, and its bytes.
//!
//! [`TaskSpec`] is what schedulers know of a task: small, copied at little cost, and serialisable.
//! [`Payload`] is what its engine is to work on: opaque bytes that no core reads. [`TaskLog`] keeps
//! the frames of its answer in shared segments, [`Relay`] carries one attempt's stream into it
//! and holds its deadlines. All are values: they do no I/O, read no clock and
//! wake nobody; `orchestratord` and the simulator are shells around the same ones. The ideas needed
//! to read it: *the core holds facts, the stream holds bytes*, and *an attempt ends by what its node
//! reported, or with a stop*.

mod end;
mod frames;
mod hold_budget;
mod log;
mod openai_route;
mod passage;
mod payload;
mod relay;
mod shape;
mod spec;
mod staged;
mod token_ids;
mod watch;

pub use end::{HowEnded, denial};
pub use hold_budget::HoldBudget;
pub use log::{AppendError, Fence, MAX_LOG_BYTES, Read, Segment, TaskLog};
pub use openai_route::{ApiDialect, EndMarker, OpenAiRoute};
pub use passage::{AnswerHead, MAX_PASSED_EVENT_BYTES, Passage, PassedHead};
pub use payload::{Payload, PayloadFormat};
pub use relay::{Action, Assignment, Relay};
pub use spec::{BodyDigest, InvalidDigest, Lacking, TaskCaller, TaskSpec};
pub use staged::{Staged, TokensOfFrame};
pub use token_ids::TokenIds;
pub use watch::{AttemptDeadlines, Overdue, QUIET};
