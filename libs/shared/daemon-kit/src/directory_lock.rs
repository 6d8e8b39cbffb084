//! One daemon for a directory: two of them over one would count engines twice, write over each other's
//! files, and remove them when they end.
//!
//! The lock is the kernel's and ends with its process, however that ends. What stands in the file is for
//! people: nobody acts on it. A directory in which nothing can be written, or whose file system has no locks,
//! is not guarded, and the log says so.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::config::host_name;

/// The file that is locked, in the directory.
const NAME: &str = ".llama-orch.lock";
/// How long the one before may take that is just ending.
const PATIENCE: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Longest text of a holder that is shown, bytes.
const MAX_SHOWN: u64 = 200;

/// A directory that this process alone uses, until it is dropped.
#[derive(Debug)]
pub struct DirectoryLock(File);

/// A directory that another daemon uses.
#[derive(Debug, thiserror::Error)]
#[error("{prefix}_{setting}: the directory {} is used by {holder}: give one of the two another directory", path.display())]
pub struct InUse {
    prefix: &'static str,
    setting: &'static str,
    path: PathBuf,
    holder: String,
}

impl DirectoryLock {
    /// Takes the directory, which is made where it is missing. `setting` is the variable without the daemon's
    /// `prefix`, `who` what others are told of this daemon. None: the directory cannot be guarded.
    ///
    /// # Errors
    /// Another process has it, and does not end within 2 s.
    pub async fn hold(
        prefix: &'static str,
        setting: &'static str,
        path: &Path,
        who: &str,
    ) -> Result<Option<Self>, InUse> {
        let start = Instant::now();
        loop {
            let mut file = match open(path) {
                Ok(file) => file,
                Err(error) => return Ok(unguarded(setting, path, &error)),
            };
            match file.try_lock() {
                Ok(()) => {
                    let text = format!("{who}, pid {} on {}\n", std::process::id(), host_name());
                    let written = file.set_len(0).and_then(|()| file.write_all(text.as_bytes()));
                    if let Err(error) = written {
                        tracing::warn!(path = %path.display(), %error, "who uses the directory is not written down");
                    }
                    return Ok(Some(Self(file)));
                }
                Err(TryLockError::Error(error)) => return Ok(unguarded(setting, path, &error)),
                Err(TryLockError::WouldBlock) if start.elapsed() < PATIENCE => sleep(LOOK_EVERY).await,
                Err(TryLockError::WouldBlock) => {
                    let holder = holder(&mut file);
                    return Err(InUse { prefix, setting, path: path.to_owned(), holder });
                }
            }
        }
    }
}

impl Drop for DirectoryLock {
    fn drop(&mut self) {
        // Nobody is shown for a holder who is none any more. The file stays: whoever waits for it has it open.
        let _ = self.0.set_len(0);
    }
}

fn open(path: &Path) -> io::Result<File> {
    std::fs::create_dir_all(path)?;
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path.join(NAME))
}

fn unguarded(setting: &str, path: &Path, error: &io::Error) -> Option<DirectoryLock> {
    tracing::warn!(setting, path = %path.display(), %error, "nothing keeps a second daemon from this directory");
    None
}

/// What the holder says of itself.
fn holder(file: &mut File) -> String {
    let mut text = Vec::new();
    // Where it cannot be read, or is not written yet, somebody has it all the same.
    let _ = file.rewind().and_then(|()| file.take(MAX_SHOWN).read_to_end(&mut text));
    let text = String::from_utf8_lossy(&text);
    let shown: String = text.trim().chars().filter(|char| !char.is_control()).collect();
    if shown.is_empty() { "another daemon".into() } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn hold(path: &Path, who: &str) -> Result<Option<DirectoryLock>, InUse> {
        DirectoryLock::hold("DAEMON", "RUNTIME_DIR", path, who).await
    }

    // CLOUD-2949
    #[tokio::test(start_paused = true)]
    async fn one_process_has_a_directory_and_a_second_one_is_told_who() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("made/for it");
        let first = hold(&path, "pool-managerd gpu-node-1").await.unwrap();
        assert!(first.is_some());
        let refused = hold(&path, "pool-managerd gpu-node-2").await.unwrap_err().to_string();
        let pid = std::process::id();
        for part in
            ["DAEMON_RUNTIME_DIR: ", "made/for it is used by pool-managerd gpu-node-1, pid", &pid.to_string()]
        {
            assert!(refused.contains(part), "{refused}");
        }
        // One that ends meanwhile is waited for.
        let (second, ()) = tokio::join!(hold(&path, "a second"), async {
            sleep(PATIENCE / 2).await;
            drop(first);
        });
        assert!(second.unwrap().is_some());
        assert!(std::fs::read(path.join(NAME)).unwrap().is_empty(), "nobody has it");
    }

    // CLOUD-2949
    #[tokio::test]
    async fn a_directory_that_cannot_be_written_is_not_guarded() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert!(hold(&file.join("below"), "who").await.unwrap().is_none());
    }
}
