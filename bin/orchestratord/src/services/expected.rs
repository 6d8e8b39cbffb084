//! The nodes that should be there: those that have registered and were not forgotten since, whether they are
//! there or not. Kept in a file, so that one which is missing is missed after a restart too.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use owned_tasks::blocking;
use parking_lot::Mutex;
use pool_registry_types::{ErrorBody, ErrorCode, NodeId};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// The file is written again after this, where it could not be.
const AGAIN_AFTER: Duration = Duration::from_secs(10);

/// The file of them cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", file.display())]
pub(crate) struct ExpectedError {
    file: PathBuf,
    #[source]
    source: io::Error,
}

/// All of them.
#[derive(Debug)]
pub(crate) struct ExpectedNodes {
    file: PathBuf,
    at_most: usize,
    nodes: Mutex<BTreeSet<NodeId>>,
    changed: Notify,
    /// Held while the disk is written to; readers never wait for it.
    writing: Arc<tokio::sync::Mutex<()>>,
}

impl ExpectedNodes {
    /// Reads the file of them, where there is one. Blocks. `at_most`: so many are kept.
    pub(crate) fn open(folder: &Path, at_most: usize) -> Result<Self, ExpectedError> {
        let file = folder.join("expected-nodes.json");
        let failed = |source| ExpectedError { file: file.clone(), source };
        let nodes = match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::from).map_err(failed)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeSet::new(),
            Err(error) => return Err(failed(error)),
        };
        let (nodes, changed) = (Mutex::new(nodes), Notify::new());
        Ok(Self { file, at_most, nodes, changed, writing: Arc::default() })
    }

    pub(crate) fn all(&self) -> Vec<NodeId> {
        self.nodes.lock().iter().cloned().collect()
    }

    /// The node has registered. Written down soon.
    pub(crate) fn registered(&self, node_id: &NodeId) {
        let mut nodes = self.nodes.lock();
        if nodes.contains(node_id) {
            return;
        }
        if nodes.len() >= self.at_most {
            tracing::warn!(%node_id, most = self.at_most, "no more nodes are expected: forget some that will not come again");
            return;
        }
        nodes.insert(node_id.clone());
        self.changed.notify_one();
    }

    /// The node need not be there any more. Written down when this returns, and also where nobody waits for that.
    ///
    /// # Errors
    /// `INTERNAL` where it cannot be written: then it is expected still.
    pub(crate) async fn forget(self: &Arc<Self>, node_id: &NodeId) -> Result<(), ErrorBody> {
        self.write(Some(node_id.clone())).await.map_err(|error| {
            tracing::error!(file = %self.file.display(), error, "the list of expected nodes cannot be written");
            ErrorBody::new(ErrorCode::Internal, "the list of nodes cannot be written, see the server's log")
        })
    }

    /// Writes down what changes, until `stop`, and once at its start for what may have changed before.
    pub(crate) async fn keep(self: Arc<Self>, stop: CancellationToken) {
        loop {
            let written = self.write(None).await;
            if let Err(error) = &written {
                tracing::warn!(file = %self.file.display(), error, "the list of expected nodes is written again later");
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.changed.notified() => {}
                () = tokio::time::sleep(AGAIN_AFTER), if written.is_err() => {}
            }
        }
    }

    /// Writes them down where the file does not have them as they are, without one that is forgotten. All of it
    /// happens, one after another, whoever waits.
    async fn write(self: &Arc<Self>, forgotten: Option<NodeId>) -> Result<(), String> {
        let (this, one) = (Arc::clone(self), Arc::clone(&self.writing).lock_owned().await);
        let written = blocking("list of nodes", move || {
            let _one = one;
            let gone = forgotten.filter(|node_id| this.nodes.lock().remove(node_id));
            let written = this.write_down();
            if let (Err(_), Some(node_id)) = (&written, gone) {
                this.nodes.lock().insert(node_id);
            }
            written
        });
        match written.await {
            Ok(written) => written.map_err(|error| error.to_string()),
            Err(panicked) => Err(panicked.to_string()),
        }
    }

    fn write_down(&self) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(&*self.nodes.lock())?;
        if fs::read(&self.file).is_ok_and(|has| has == text) {
            return Ok(());
        }
        Ok(atomic_file::replace(&self.file, &text, atomic_file::BY_UMASK)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: &str) -> NodeId {
        NodeId::new(id).unwrap()
    }

    // CLOUD-2714
    #[tokio::test]
    async fn a_node_that_registered_is_expected_over_a_restart_until_it_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Arc::new(ExpectedNodes::open(folder.path(), 2).unwrap());
        let (expected, stop) = (open(), CancellationToken::new());
        let keeping = tokio::spawn(Arc::clone(&expected).keep(stop.clone()));
        for id in ["a", "b", "a", "too-many"] {
            expected.registered(&node(id));
        }
        assert_eq!(expected.all(), [node("a"), node("b")]);
        let is_written = async || {
            while open().all().len() < 2 {
                tokio::task::yield_now().await
            }
        };
        tokio::time::timeout(Duration::from_secs(5), is_written()).await.expect("it is written down");
        expected.forget(&node("a")).await.unwrap();
        expected.forget(&node("never")).await.unwrap();
        assert_eq!(open().all(), [node("b")], "at once");
        stop.cancel();
        keeping.await.unwrap();
        std::fs::remove_dir_all(folder.path()).unwrap();
        std::fs::write(folder.path(), "no folder").unwrap();
        assert_eq!(expected.forget(&node("b")).await.unwrap_err().code, ErrorCode::Internal);
        assert_eq!(expected.all(), [node("b")], "what cannot be written has not changed");
        std::fs::remove_file(folder.path()).unwrap();
    }

    // CLOUD-2714
    #[test]
    fn a_file_that_is_no_list_is_named_and_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("expected-nodes.json");
        std::fs::write(&file, "[\"a b\"]").unwrap();
        let error = ExpectedNodes::open(folder.path(), 2).unwrap_err().to_string();
        assert!(error.contains("expected-nodes.json: "), "{error}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "[\"a b\"]");
    }
}
