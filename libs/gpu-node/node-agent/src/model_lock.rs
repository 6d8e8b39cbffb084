//! The lock of a model's folder, and what a disk that became full has shown of the model's source.
//!
//! A source that does not say its length is found not to fit only once the disk is full, and what
//! was written is removed then. How long it was at least stands in the lock's own file, so that
//! neither the next try nor the next process fills the disk again for it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

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
    file: File,
    path: PathBuf,
}

impl ModelLock {
    /// Nothing where another has it. Errors: the disk's.
    pub(crate) fn take(path: &Path) -> io::Result<Option<Self>> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self { file, path: path.to_owned() })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Bytes that the source has at least, where a full disk has shown so of late.
    pub(crate) fn outgrown(&self, url: &str) -> Option<u64> {
        let age = self.file.metadata().ok()?.modified().ok()?.elapsed().ok()?;
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
