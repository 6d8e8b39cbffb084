//! A small process between the daemon and each engine, so that no engine outlives its owner.
//!
//! The guard is this program started again. It is the reaper of everything that descends from
//! its engine, so also what forks, calls setsid and lets its parent die comes back to it. It
//! sees the daemon's end by their socket, and then ends everything, or waits for the next
//! daemon where the engine is to be kept. The guard of an engine ends when nothing of the engine
//! is left. [`inside`] is the process, [`link`] the daemon's end.

pub mod inside;
pub(crate) mod link;
pub(crate) mod output;
pub(crate) mod processes;

use std::path::PathBuf;

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

/// The word by which the program knows that it is to be a guard.
pub(crate) const COMMAND: &str = "guard";
/// The variable by which every process of an engine is known, whoever its parent is.
pub(crate) const RUN_TAG: &str = "LLAMA_ORCH_RUN";

/// What a guard is told first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GuardSpec {
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
    #[serde(rename = "mark")]
    pub run_tag: String,
}

/// What a guard is told after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Order {
    /// End the engine.
    Stop,
}

/// What a guard says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum GuardReport {
    /// To every daemon, first.
    Started {
        pid: u32,
        #[serde(rename = "mark")]
        run_tag: String,
        about: String,
    },
    /// The engine wrote a line in the form of its fatal driver errors.
    Alarm { line: String },
    /// The engine's own process has ended by this signal, unasked; what it has started may live on.
    Crashed { signal: i32 },
    /// Nothing of the engine is left; the guard ends.
    Ended {
        how: String,
        /// Of the engine's own process, where one ended it unasked; an older guard does not say it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signal: Option<i32>,
    },
}

/// The signals by which an engine ends that has met something that it cannot do. Source: .specs/01
/// CLOUD-2416.
const CRASHES: [Signal; 5] =
    [Signal::SIGSEGV, Signal::SIGABRT, Signal::SIGILL, Signal::SIGBUS, Signal::SIGFPE];
/// What a shell adds to the signal that ended its command, for its own exit status. Source: POSIX.
const SHELL_SIGNALS: i32 = 128;

/// The name of the signal, if an engine has crashed by it.
pub(crate) fn crash_name(signal: i32) -> Option<&'static str> {
    CRASHES.into_iter().find(|crash| *crash as i32 == signal).map(Signal::as_str)
}

/// The signal that a script tells of the engine that it had started, by its own exit status.
fn signal_of_status(status: i32) -> Option<i32> {
    status.checked_sub(SHELL_SIGNALS).filter(|signal| crash_name(*signal).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2416
    #[test]
    fn guards_and_daemons_of_two_versions_understand_each_other() {
        let of_old: GuardReport =
            serde_json::from_str(r#"{"ended":{"how":"it was killed by SIGSEGV"}}"#).unwrap();
        assert_eq!(of_old, GuardReport::Ended { how: "it was killed by SIGSEGV".into(), signal: None });
        let plain = GuardReport::Ended { how: "it ended".into(), signal: None };
        assert_eq!(serde_json::to_string(&plain).unwrap(), r#"{"ended":{"how":"it ended"}}"#);
        let crashed = GuardReport::Ended { how: "it ended".into(), signal: Some(11) };
        let read: GuardReport = serde_json::from_str(&serde_json::to_string(&crashed).unwrap()).unwrap();
        assert_eq!(read, crashed);
    }

    // CLOUD-2416
    #[test]
    fn only_the_signals_of_a_crash_are_crashes_also_when_a_script_tells_them() {
        assert_eq!([11, 6, 4, 7, 8].map(|n| crash_name(n).is_some()), [true; 5]);
        assert_eq!([9, 15, 2, 0, -1].map(crash_name), [None; 5]);
        assert_eq!((signal_of_status(139), signal_of_status(134)), (Some(11), Some(6)));
        assert_eq!([0, 1, 11, 128, 137, 143].map(signal_of_status), [None; 6]);
    }

    // CLOUD-1109
    #[test]
    fn a_newer_guard_or_daemon_says_more_and_is_understood() {
        let started = r#"{"started":{"pid":7,"mark":"m","about":"{}","since_ms":5}}"#;
        let expected = GuardReport::Started { pid: 7, run_tag: "m".into(), about: "{}".into() };
        assert_eq!(serde_json::from_str::<GuardReport>(started).unwrap(), expected);
        let ended = r#"{"ended":{"how":"it ended","signal":11,"core":"/tmp/core"}}"#;
        let expected = GuardReport::Ended { how: "it ended".into(), signal: Some(11) };
        assert_eq!(serde_json::from_str::<GuardReport>(ended).unwrap(), expected);
        let guard_spec = r#"{"program":"/bin/true","args":[],"env":[],"log":"/log","log_bytes":1,"grace_ms":2,
            "about":"","mark":"m","nice":5}"#;
        assert_eq!(serde_json::from_str::<GuardSpec>(guard_spec).unwrap().keep_at, None);
    }
}
