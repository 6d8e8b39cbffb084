//! A directory of handoff files as typed changes.
//!
//! An engine's starter leaves one JSON file per replica in the runtime directory. [`handoff`]
//! says what such a file may hold, [`folder`] turns two looks at the directory into changes;
//! both are pure. [`watch`] does the looking: at every change event of the file system, and at
//! a fixed interval, because some file systems send no events. What a replica is, or whether
//! its engine answers, is not known here.

pub mod folder;
pub mod handoff;
pub mod process;
pub mod watch;

pub use folder::{Change, Folder};
pub use handoff::{EngineHosts, Fault, Handoff, HandoffName, MAX_SLOTS};
pub use watch::HandoffWatcher;
