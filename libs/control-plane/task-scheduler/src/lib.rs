//! The whole control decision: queue, attempts, registry and placement in one value.
//!
//! [`ControlCore`] is told an [`Event`] and the time, and answers with [`Effect`]s; it reads no
//! clock, draws no chance and performs nothing. Tokens never pass through it: they go from a
//! node into a [`task_stream::TaskLog`], and the core learns only of an attempt's acceptance, first token
//! and end. The idea needed to read it: *the core never places a task again on its own belief*.
//! It asks for an attempt to be closed, the relay fences the log, and only the answer to that
//! ([`Event::Ended`]) moves the task on.

mod attempts;
mod core;
mod event;
mod groups;
mod pace;
mod queue;
mod sessions;

pub use attempts::CloseReason;
pub use core::reading::{TaskFilter, TaskList, TaskRecord};
pub use core::waiting::{Waiting, WaitingTasks};
pub use core::{ControlCore, Counters, FullLane, Policy};
pub use event::{Answer, Dispatch, Effect, Event, LinkEvidence, Note, ReplyTo, TaskEnd};
pub use multi_node_placement::Strategy;
pub use service_registry::{Denied, IndexMismatch, ProbeOutcome, Registrar, Rule, Timing};
pub use sessions::SessionPolicy;
pub use task_stream::{HowEnded, Overdue};
