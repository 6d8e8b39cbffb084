//! The lock of a model's folder, and what a disk that became full has shown of the model's source.
//!
//! A source that does not say its length is found not to fit only once the disk is full, and what
//! was written is removed then. How long it was at least stands in the lock's own file, so that
//! neither the next try nor the next process fills the disk again for it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::shared_lock::SharedLock;

/// How long it counts what a full disk has shown: a source may have become smaller.
const COUNTS_FOR: Duration = Duration::from_secs(3600);

/// A source that has not found room.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Outgrown {
    pub(crate) url: String,
    /// It is at least so long.
    pub(crate) bytes: u64,
}

/// Held by whoever stages or removes the model. It goes with its process.
#[derive(Debug)]
pub(crate) struct ModelLock {
    lock: SharedLock,
    path: PathBuf,
}

impl ModelLock {
    /// Nothing where another has it. Errors: the disk's.
    pub(crate) fn take(path: &Path) -> io::Result<Option<Self>> {
        let lock = SharedLock::take(path)?;
        Ok(lock.map(|lock| Self { lock, path: path.to_owned() }))
    }

    /// Whether it is still ours.
    pub(crate) fn is_held(&self) -> bool {
        self.lock.is_held()
    }

    /// Bytes that the source has at least, where a full disk has shown so of late.
    pub(crate) fn outgrown(&self, url: &str) -> Option<u64> {
        let age = fs::metadata(&self.path).ok()?.modified().ok()?.elapsed().ok()?;
        let outgrown: Outgrown = serde_json::from_slice(&fs::read(&self.path).ok()?).ok()?;
        (outgrown.url == url && age < COUNTS_FOR).then_some(outgrown.bytes)
    }

    /// Writes it down, or that there is nothing of the kind. What cannot be written is found out again.
    pub(crate) fn remember(&self, outgrown: Option<&Outgrown>) {
        let text = outgrown.and_then(|outgrown| serde_json::to_vec(outgrown).ok()).unwrap_or_default();
        if let Err(error) = fs::write(&self.path, text) {
            tracing::debug!(file = %self.path.display(), %error, "how much space a model needs is not kept");
        }
    }
}
