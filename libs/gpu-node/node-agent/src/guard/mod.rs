//! A small process between the daemon and each engine, so that no engine outlives its owner.
//!
//! The guard is this program started again. It is the reaper of everything that descends from
//! its engine, so also what forks, calls setsid and lets its parent die comes back to it. It
//! sees the daemon's end by their socket, and then ends everything, or waits for the next
//! daemon where the engine is to be kept. The guard of an engine ends when nothing of the engine
//! is left. [`inside`] is the process, [`link`] the daemon's end.

pub mod inside;
pub mod link;
pub mod output;
pub mod processes;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The word by which the program knows that it is to be a guard.
pub const COMMAND: &str = "guard";
/// The variable by which every process of an engine is known, whoever its parent is.
pub const MARK: &str = "LLAMA_ORCH_RUN";

/// What a guard is told first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Charge {
    pub program: PathBuf,
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    /// Where the engine's output goes.
    pub log: PathBuf,
    /// Bytes after which the file is turned over.
    pub log_bytes: u64,
    /// Milliseconds from SIGTERM to SIGKILL.
    pub grace_ms: u64,
    /// Where the next daemon finds the guard; absent: the engine ends with this one.
    pub keep_at: Option<PathBuf>,
    /// For the next daemon: what it needs to know of the engine.
    pub about: String,
    pub mark: String,
}

/// What a guard is told after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// End the engine.
    Stop,
}

/// What a guard says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// To every daemon, first.
    Started { pid: u32, mark: String, about: String },
    /// The engine wrote a line that speaks of a sick driver or GPU.
    Alarm { line: String },
    /// Nothing of the engine is left; the guard ends.
    Ended { how: String },
}
