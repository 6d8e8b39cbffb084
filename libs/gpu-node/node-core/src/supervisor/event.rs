//! What the supervisor is told, and what it orders.

use std::collections::{BTreeMap, BTreeSet};

use pool_registry_types::PoolId;

use crate::supervisor::ledger::DeviceReading;
use crate::supervisor::plan::{Device, PoolPlan, Prepared, ReplicaKey, RunId, Unprepared};

/// Something happened.
#[derive(Debug, Clone)]
pub enum Happened {
    /// The file of pools was read. What is not in it any more goes.
    Configured(BTreeMap<PoolId, PoolPlan>),
    Devices(BTreeMap<Device, DeviceReading>),
    /// The outcome of [`Ordered::Prepare`].
    Prepared {
        pool_id: PoolId,
        fingerprint: u64,
        outcome: Result<Prepared, Unprepared>,
    },
    /// The engine answered its health call for the first time.
    Ready {
        run: RunId,
    },
    /// The engine and all of its descendants are gone.
    Exited {
        run: RunId,
        how: String,
        tail: Vec<String>,
        /// It has crashed, and there is one task alone that may have made it. Source: .specs/01
        /// CLOUD-1552.
        has_culprit: bool,
    },
    /// The engine wrote a line in the form of a fatal error of its driver.
    Alarmed {
        run: RunId,
        line: String,
    },
    /// What each replica runs, and whether anything ever did in this life of it.
    Used(BTreeMap<ReplicaKey, Work>),
    /// A task waits for the pool.
    Load {
        pool_id: PoolId,
    },
    /// The pools for which tasks wait at the control plane, loaded ones too; all of them.
    Waiting(BTreeSet<PoolId>),
    /// Another plan for the pool.
    Reload {
        pool_id: PoolId,
        plan: Box<PoolPlan>,
    },
    /// Something is there that a pool may have lacked: what could not be prepared is tried at once.
    Mended,
    /// Start it again after it was given up.
    Revive {
        pool_id: PoolId,
    },
    /// Stop it and remove what belongs to it.
    Purge {
        pool_id: PoolId,
    },
    /// The daemon ends.
    Shutdown,
    Timer,
}

/// What a replica does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    pub running: u32,
    /// Attempts accepted since the replica was bound.
    pub served: u64,
    /// The engine does not answer its health call, or says that it is not well.
    pub silent: bool,
}

/// Something is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ordered {
    /// Find programs and files, install and download what is allowed, and say what it takes.
    Prepare {
        pool_id: PoolId,
        plan: Box<PoolPlan>,
    },
    /// Start an engine and tell when it is ready and when it is gone.
    Start {
        run: RunId,
        replica_key: ReplicaKey,
        fingerprint: u64,
    },
    /// Give it to the node's core: it takes attempts from now on.
    Publish {
        run: RunId,
        replica_key: ReplicaKey,
    },
    /// Take it from there: what runs may finish.
    Withdraw {
        run: RunId,
        replica_key: ReplicaKey,
    },
    Stop {
        run: RunId,
    },
    /// The engines of a purged pool are gone.
    Purged {
        pool_id: PoolId,
    },
    /// Memory was or will be released: look now, not at the next tick.
    LookAtDevices,
    /// What was heard of waiting tasks may be over: hear it anew.
    AskWaiting,
}
