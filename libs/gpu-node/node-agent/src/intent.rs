//! What the operator wants of this node, kept in a file so that it outlives both daemons.
//!
//! The file is beside the handoff files, which it is none of: its name starts with a dot. No
//! file means serving.

use std::io;
use std::path::{Path, PathBuf};

use pool_registry_types::NodeId;
use pool_registry_types::node::Intent;

/// Where one node's intent is kept.
#[derive(Debug, Clone)]
pub struct IntentFile {
    path: PathBuf,
}

impl IntentFile {
    /// The intent belongs to the node's name, not to the directory, which several may share.
    pub fn new(runtime_dir: &Path, node_id: &NodeId) -> Self {
        Self { path: runtime_dir.join(format!(".{node_id}.draining")) }
    }

    pub(crate) fn read(&self) -> Intent {
        // What cannot be read may be a drain: a node that does nothing is the smaller harm.
        if self.path.try_exists().unwrap_or(true) { Intent::Draining } else { Intent::Serving }
    }

    /// On the disk when it returns.
    pub(crate) fn write(&self, intent: Intent) -> io::Result<()> {
        let text = b"this node takes no work until it is resumed\n";
        let kept = match intent {
            Intent::Draining => atomic_file::replace(&self.path, text, atomic_file::BY_UMASK),
            Intent::Serving => atomic_file::remove(&self.path),
        };
        kept.map_err(io::Error::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-1321
    #[test]
    fn an_intent_is_read_as_it_was_written_and_belongs_to_one_node() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("engines");
        let of = |name: &str| IntentFile::new(&folder, &NodeId::new(name).unwrap());
        assert_eq!(of("a").read(), Intent::Serving);
        of("a").write(Intent::Serving).unwrap();
        of("a").write(Intent::Draining).unwrap();
        assert_eq!((of("a").read(), of("b").read()), (Intent::Draining, Intent::Serving));
        of("a").write(Intent::Serving).unwrap();
        of("a").write(Intent::Serving).unwrap();
        assert_eq!(of("a").read(), Intent::Serving);
    }
}
