//! What the supervisor's loop and the lives of its engines share.

use std::collections::BTreeMap;

use node_core::supervisor::{ReplicaKey, RunId};
use pool_registry_types::PoolId;
use pool_registry_types::pool::PoolPurge;
use tokio_util::sync::CancellationToken;

use crate::engines::EngineFacts;
use crate::pools_file::PoolsFile;
use crate::supervisor::launch::{Launch, Spec};

#[derive(Debug, Default)]
pub(super) struct State {
    /// The file as it was taken last.
    pub(super) file: PoolsFile,
    pub(super) text: Option<String>,
    /// All plans that the supervisor may still ask for, by fingerprint.
    pub(super) specs: BTreeMap<u64, Spec>,
    pub(super) launches: BTreeMap<u64, Launch>,
    pub(super) lives: BTreeMap<RunId, Life>,
    pub(super) under_way: BTreeMap<PoolId, String>,
    pub(super) purges: BTreeMap<PoolId, PoolPurge>,
    /// Address and process of the engines that have handoff files of ours.
    pub(super) published: BTreeMap<RunId, (String, Option<u32>)>,
    /// Engines whose handoff file could not be written yet.
    pub(super) unwritten: BTreeMap<RunId, ReplicaKey>,
}

/// What the loop knows of a life that is under way.
#[derive(Debug)]
pub(super) struct Life {
    pub(super) stop: CancellationToken,
    /// The daemon ends and the engine does not.
    pub(super) release: CancellationToken,
    pub(super) keep: bool,
    pub(super) fingerprint: u64,
    pub(super) url: String,
    pub(super) pid: Option<u32>,
    pub(super) facts: EngineFacts,
}

impl Life {
    pub(super) fn new(keep: bool, fingerprint: u64) -> Self {
        Self {
            stop: CancellationToken::new(),
            release: CancellationToken::new(),
            keep,
            fingerprint,
            url: String::new(),
            pid: None,
            facts: EngineFacts::default(),
        }
    }
}
