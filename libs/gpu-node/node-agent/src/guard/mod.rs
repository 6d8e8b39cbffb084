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

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-1109
    #[test]
    fn a_newer_guard_or_daemon_says_more_and_is_understood() {
        let started = r#"{"started":{"pid":7,"mark":"m","about":"{}","since_ms":5}}"#;
        let expected = Said::Started { pid: 7, mark: "m".into(), about: "{}".into() };
        assert_eq!(serde_json::from_str::<Said>(started).unwrap(), expected);
        let ended = r#"{"ended":{"how":"it ended","signal":11}}"#;
        assert_eq!(serde_json::from_str::<Said>(ended).unwrap(), Said::Ended { how: "it ended".into() });
        let charge = r#"{"program":"/bin/true","args":[],"env":[],"log":"/log","log_bytes":1,"grace_ms":2,
            "about":"","mark":"m","nice":5}"#;
        assert_eq!(serde_json::from_str::<Charge>(charge).unwrap().keep_at, None);
    }
}
