//! Entries of models: what an operator says of them, beside what the nodes report.
//!
//! An entry names the digest that a model must have, and whether it may be placed. Entries are
//! few and change rarely: they are kept in one file, written anew as a whole at each change.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use pool_registry_types::snapshot::ClusterSnapshot;
use pool_registry_types::{Digest, ErrorBody, ErrorCode, ModelRef, NodeId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Most entries.
const MAX_ENTRIES: usize = 10_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub(crate) enum ModelState {
    #[default]
    #[serde(alias = "active", alias = "ACTIVE")]
    Active,
    /// It is not placed any more.
    #[serde(alias = "retired", alias = "RETIRED")]
    Retired,
}

/// One model as its operator describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct ModelEntry {
    pub(crate) model_id: ModelRef,
    /// What the model's file must be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) digest: Option<Digest>,
    /// For people: where it comes from, what it is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) description: Option<String>,
    #[serde(default)]
    pub(crate) state: ModelState,
}

/// `POST /v2/catalog/models/{id}/verify`.
#[derive(Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Verification {
    pub(crate) model_id: ModelRef,
    pub(crate) digest: Digest,
    /// At least one node has the model on disk, and every one has this digest.
    pub(crate) verified: bool,
    pub(crate) nodes: Vec<NodeDigest>,
}

#[derive(Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct NodeDigest {
    pub(crate) node_id: NodeId,
    pub(crate) digest: Digest,
    pub(crate) matches: bool,
}

/// All entries.
#[derive(Debug)]
pub(crate) struct Catalog {
    file: PathBuf,
    entries: Mutex<BTreeMap<ModelRef, ModelEntry>>,
    /// Held while the disk is written to; readers never wait for it.
    writing: Mutex<()>,
}

/// The file of entries cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", file.display())]
pub(crate) struct CatalogError {
    file: PathBuf,
    #[source]
    source: io::Error,
}

impl Catalog {
    /// Reads the file of entries, where there is one.
    pub(crate) fn open(folder: &Path) -> Result<Self, CatalogError> {
        atomic_file::remove_drafts(folder);
        let file = folder.join("catalog.json");
        let failed = |source| CatalogError { file: file.clone(), source };
        let entries: Vec<ModelEntry> = match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::from).map_err(failed)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(failed(error)),
        };
        let entries = entries.into_iter().map(|entry| (entry.model_id.clone(), entry)).collect();
        Ok(Self { file, entries: Mutex::new(entries), writing: Mutex::default() })
    }

    pub(crate) fn list(&self) -> Vec<ModelEntry> {
        self.entries.lock().values().cloned().collect()
    }

    /// Errors: `NOT_FOUND`.
    pub(crate) fn get(&self, model: &ModelRef) -> Result<ModelEntry, ErrorBody> {
        self.entries.lock().get(model).cloned().ok_or_else(|| unknown(model))
    }

    /// Takes an entry in. Returns whether it is a new one.
    pub(crate) fn put(&self, entry: ModelEntry) -> Result<bool, ErrorBody> {
        self.change(|entries| {
            if entries.len() >= MAX_ENTRIES && !entries.contains_key(&entry.model_id) {
                let message = format!("the catalog holds {MAX_ENTRIES} entries, which is the most");
                return Err(ErrorBody::new(ErrorCode::Overloaded, message));
            }
            Ok(entries.insert(entry.model_id.clone(), entry).is_none())
        })
    }

    /// Errors: `NOT_FOUND`.
    pub(crate) fn set_state(&self, model: &ModelRef, state: ModelState) -> Result<ModelEntry, ErrorBody> {
        self.change(|entries| {
            let entry = entries.get_mut(model).ok_or_else(|| unknown(model))?;
            entry.state = state;
            Ok(entry.clone())
        })
    }

    /// Errors: `NOT_FOUND`.
    pub(crate) fn remove(&self, model: &ModelRef) -> Result<(), ErrorBody> {
        self.change(|entries| entries.remove(model).map(|_| ()).ok_or_else(|| unknown(model)))
    }

    /// Changes the entries and writes them down; what cannot be written is not changed.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut BTreeMap<ModelRef, ModelEntry>) -> Result<T, ErrorBody>,
    ) -> Result<T, ErrorBody> {
        let _one = self.writing.lock();
        let mut changed = self.entries.lock().clone();
        let result = change(&mut changed)?;
        self.write(&changed).map_err(|error| {
            tracing::error!(file = %self.file.display(), %error, "the catalog cannot be written");
            ErrorBody::new(ErrorCode::Internal, "the catalog cannot be written, see the server's log")
        })?;
        *self.entries.lock() = changed;
        Ok(result)
    }

    fn write(&self, entries: &BTreeMap<ModelRef, ModelEntry>) -> io::Result<()> {
        let list: Vec<&ModelEntry> = entries.values().collect();
        Ok(atomic_file::replace(&self.file, &serde_json::to_vec_pretty(&list)?, atomic_file::BY_UMASK)?)
    }

    /// Compares the entry's digest with what the nodes report. Errors: `NOT_FOUND`, and
    /// `INVALID_PARAMS` for an entry without a digest.
    pub(crate) fn verify(&self, model: &ModelRef, view: &ClusterSnapshot) -> Result<Verification, ErrorBody> {
        let entry = self.get(model)?;
        let digest = entry.digest.ok_or_else(|| {
            ErrorBody::new(ErrorCode::InvalidParams, format!("digest: the entry of {model} has none"))
        })?;
        let staged = view.nodes().flat_map(|(node, _)| {
            let of_model = node.models.iter().filter(|staged| staged.model_id == *model);
            of_model.map(|staged| NodeDigest {
                node_id: node.node_id.clone(),
                digest: staged.digest.clone(),
                matches: staged.digest == digest,
            })
        });
        let nodes: Vec<NodeDigest> = staged.collect();
        let verified = !nodes.is_empty() && nodes.iter().all(|node| node.matches);
        Ok(Verification { model_id: model.clone(), digest, verified, nodes })
    }
}

fn unknown(model: &ModelRef) -> ErrorBody {
    ErrorBody::new(ErrorCode::NotFound, format!("no entry of model {model}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(name: &str) -> ModelRef {
        ModelRef::new(name).unwrap()
    }

    // CLOUD-3013
    #[test]
    fn a_state_is_taken_in_either_case_and_kept_as_before() {
        for text in ["Retired", "retired", "RETIRED"] {
            let state: ModelState = serde_json::from_str(&format!("{text:?}")).unwrap();
            assert_eq!(serde_json::to_string(&state).unwrap(), "\"Retired\"");
        }
    }

    // CLOUD-1622
    #[test]
    fn entries_are_there_again_after_a_restart_and_a_damaged_file_stops_the_start() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let catalog = Catalog::open(folder).unwrap();
        let entry = |name| ModelEntry {
            model_id: model(name),
            digest: None,
            description: None,
            state: ModelState::Active,
        };
        assert_eq!(catalog.put(entry("a")), Ok(true));
        assert_eq!(catalog.put(entry("a")), Ok(false));
        catalog.put(entry("b")).unwrap();
        catalog.set_state(&model("a"), ModelState::Retired).unwrap();
        catalog.remove(&model("b")).unwrap();
        assert_eq!(catalog.remove(&model("b")).unwrap_err().code, ErrorCode::NotFound);
        let again = Catalog::open(folder).unwrap();
        assert_eq!(again.list(), [ModelEntry { state: ModelState::Retired, ..entry("a") }]);
        fs::write(folder.join("catalog.json"), "[{").unwrap();
        assert!(Catalog::open(folder).unwrap_err().to_string().contains("catalog.json"));
    }
}
