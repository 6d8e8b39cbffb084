//! Everything a node does short of serving HTTP, for `pool-managerd` and for the home profile.
//!
//! `node-core` decides (pools, slots, the session, engines) and is told the time; the simulator
//! drives it as it is. [`agent`] is the shell around it: it watches replicas, keeps the session, and
//! runs attempts on engines ([`infer`]) in their dialects ([`engines`]); [`Node`] owns it together with
//! the supervision of the engines that the node runs itself ([`supervisor`]), and [`Assembly`] puts it
//! together for both daemons by the settings that both have ([`settings`]). What a node does not
//! know is the cluster: it never sees another node or a queue.

mod agent;
mod assembly;
mod attempt_log;
mod crash;
pub mod download;
mod driver;
mod engines;
pub mod gguf;
pub mod gpu;
pub mod guard;
mod infer;
mod intent;
mod link;
mod logs;
mod machine;
mod model_lock;
pub mod models;
mod node;
mod orders;
mod passthrough;
mod pieces;
pub mod pools_file;
mod records;
mod replica;
pub mod settings;
mod shared_lock;
mod slot;
mod slotless;
pub mod source;
pub mod supervisor;

pub use crate::agent::Agent;
pub use crate::assembly::{Assembled, Assembly, AssemblyError};
pub use crate::infer::{AttemptReader, ExchangeBody, Inference};
pub use crate::intent::IntentFile;
pub use crate::link::LinkReader;
pub use crate::logs::LogReader;
pub use crate::node::Node;
pub use crate::passthrough::PassedRequest;
pub use crate::records::{PassedOn, RecordReader};
pub use crate::slotless::SlotlessPlace;
pub use node_core::attempts::HELD_BYTES;
pub use node_core::{Identity, Retention};
