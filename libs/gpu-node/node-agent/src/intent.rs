//! What the operator wants of this node, kept in a file so that it outlives both daemons, and the
//! machine's next start: in the state directory, not beside the handoff files. No file means serving.

use std::io;
use std::path::{Path, PathBuf};

use pool_registry_types::NodeId;
use pool_registry_types::node::Intent;

const TEXT: &[u8] = b"this node takes no work until it is resumed\n";

/// Where one node's intent is kept.
#[derive(Debug, Clone)]
pub struct IntentFile {
    path: PathBuf,
    /// Where earlier versions have kept it: beside the handoff files.
    before: PathBuf,
}

impl IntentFile {
    /// The intent belongs to the node's name, not to the directory, which several may share.
    pub fn new(state_dir: &Path, runtime_dir: &Path, node_id: &NodeId) -> Self {
        Self {
            path: state_dir.join(format!("{node_id}.draining")),
            before: runtime_dir.join(format!(".{node_id}.draining")),
        }
    }

    /// Moves a file that lies where it was kept before.
    pub(crate) fn read(&self) -> Intent {
        // What cannot be read may be a drain: a node that does nothing is the smaller harm.
        if self.before.try_exists().unwrap_or(true) {
            match self.write(Intent::Draining) {
                Ok(()) => {
                    tracing::info!(from = %self.before.display(), to = %self.path.display(), "the file of the intent is moved")
                }
                Err(error) => {
                    tracing::error!(%error, from = %self.before.display(), to = %self.path.display(), "the file of the intent cannot be moved, and holds where it is")
                }
            }
            return Intent::Draining;
        }
        if self.path.try_exists().unwrap_or(true) { Intent::Draining } else { Intent::Serving }
    }

    /// On the disk when it returns.
    pub(crate) fn write(&self, intent: Intent) -> io::Result<()> {
        match intent {
            Intent::Draining => {
                if let Some(folder) = self.path.parent() {
                    std::fs::create_dir_all(folder)?;
                }
                atomic_file::replace(&self.path, TEXT, atomic_file::BY_UMASK)?;
            }
            Intent::Serving => atomic_file::remove(&self.path)?,
        }
        // Only now: at no moment is there neither.
        atomic_file::remove(&self.before)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(folder: &Path, name: &str) -> IntentFile {
        IntentFile::new(&folder.join("state"), &folder.join("engines"), &NodeId::new(name).unwrap())
    }

    // CLOUD-1321
    #[test]
    fn an_intent_is_read_as_it_was_written_and_belongs_to_one_node() {
        let folder = tempfile::tempdir().unwrap();
        let of = |name: &str| of(folder.path(), name);
        assert_eq!(of("a").read(), Intent::Serving);
        of("a").write(Intent::Serving).unwrap();
        of("a").write(Intent::Draining).unwrap();
        assert_eq!((of("a").read(), of("b").read()), (Intent::Draining, Intent::Serving));
        of("a").write(Intent::Serving).unwrap();
        of("a").write(Intent::Serving).unwrap();
        assert_eq!(of("a").read(), Intent::Serving);
    }

    // CLOUD-2948
    #[test]
    fn an_intent_beside_the_handoff_files_is_moved_and_outlives_their_directory() {
        let folder = tempfile::tempdir().unwrap();
        let engines = folder.path().join("engines");
        std::fs::create_dir_all(&engines).unwrap();
        std::fs::write(engines.join(".a.draining"), "as before").unwrap();
        assert_eq!(of(folder.path(), "a").read(), Intent::Draining);
        assert!(!engines.join(".a.draining").exists());
        std::fs::remove_dir_all(&engines).unwrap();
        assert_eq!(of(folder.path(), "a").read(), Intent::Draining);
        of(folder.path(), "a").write(Intent::Serving).unwrap();
        assert_eq!(of(folder.path(), "a").read(), Intent::Serving);
    }
}
