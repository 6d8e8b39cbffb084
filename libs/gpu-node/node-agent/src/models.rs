//! The models on this node's disk: a folder each, with a manifest that says what is in it.
//!
//! The folder may be one that several nodes share, and may be read-only: who only reads takes no lock.
//!
//! A model is copied into a folder that starts with a dot, read back, and renamed into place: what
//! has a name is whole and was verified. A copy that was interrupted goes on where it stopped.
//! Everything here blocks on the disk.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use atomic_file::WriteError;
use pool_registry_types::node::StagedModel;
use pool_registry_types::{Digest, ModelRef};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::download::{self, DownloadError, FreeBytes, Hub, PIECE_BYTES, Remote, check_space, free_bytes};
use crate::model_lock::{ModelLock, Outgrown};
use crate::source::ModelSource;

mod files;

pub use files::{Manifest, PartFile};
pub(crate) use files::{all_names, all_paths, check_digest, check_parts, is_later_part};
use files::{copy_on, digest_of, expect, whole};

const MANIFEST: &str = "manifest.json";
/// What a copy under way was begun from.
const ORIGIN: &str = "origin.json";

/// Why a model was not staged, or is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("{}: {source}", path.display())]
    Disk {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is no file", .0.display())]
    NoFile(PathBuf),
    #[error("model {model} is here already, with digest {digest}")]
    Taken { model: ModelRef, digest: Digest },
    #[error("{}: expected {expected}, it is {is}", path.display())]
    Digest { path: PathBuf, expected: Digest, is: Digest },
    #[error("model {0} is not here")]
    Unknown(ModelRef),
    #[error("{} changed while it was copied: {copied} bytes instead of {expected}", path.display())]
    Changed { path: PathBuf, expected: u64, copied: u64 },
    #[error("{}: a model's file must not be called {MANIFEST} or {ORIGIN}", .0.display())]
    Name(PathBuf),
    #[error("model {0} is being staged by another process")]
    Busy(ModelRef),
    #[error("{}: it is one of {parts} parts (split.count), and {found} are there: its files must be called NAME-00001-of-{parts:05}.gguf and so on, all in one folder", path.display())]
    Parts { path: PathBuf, parts: u64, found: usize },
    #[error(transparent)]
    Download(#[from] DownloadError),
}

impl ModelError {
    fn is_no_space(&self) -> bool {
        match self {
            Self::Disk { source, .. } | Self::Download(DownloadError::Disk { source, .. }) => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            Self::Download(DownloadError::NoSpace { .. }) => true,
            _ => false,
        }
    }
}

/// What staging came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Staged {
    Copied {
        manifest: Manifest,
        /// Bytes that an interrupted copy had left.
        resumed_at: u64,
    },
    /// It was here already, with the same content.
    WasHere(Manifest),
}

/// The folder of models.
#[derive(Debug, Clone)]
pub struct Models {
    folder: PathBuf,
    free: FreeBytes,
}

/// One file of a source, as it was when a copy of it was begun.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Origin {
    source: PathBuf,
    bytes: u64,
    modified_ns: u128,
}

impl Origin {
    fn of(source: PathBuf) -> Result<Self, ModelError> {
        let about = fs::metadata(&source).map_err(disk(&source))?;
        if !about.is_file() {
            return Err(ModelError::NoFile(source));
        }
        let modified = about.modified().ok().and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
        Ok(Self { source, bytes: about.len(), modified_ns: modified.unwrap_or_default().as_nanos() })
    }

    /// By which the copy goes.
    fn name(&self) -> String {
        self.source.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

impl From<WriteError> for ModelError {
    fn from(WriteError { path, cause }: WriteError) -> Self {
        Self::Disk { path, source: cause }
    }
}

fn disk<'p>(path: &'p Path) -> impl Fn(io::Error) -> ModelError + 'p {
    move |source| ModelError::Disk { path: path.to_owned(), source }
}

/// A model's name as the name of a folder: what is not plain is written as `%` and two digits.
fn folder_name(model: &ModelRef) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
    let mut name = String::new();
    for (n, b) in model.as_str().bytes().enumerate() {
        if plain(b) || (b == b'.' && n > 0) {
            name.push(char::from(b));
        } else {
            name.push_str(&format!("%{b:02X}"));
        }
    }
    name
}

impl Models {
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), free: free_bytes }
    }

    #[cfg(test)]
    pub(crate) fn with_free_bytes(self, free: FreeBytes) -> Self {
        Self { free, ..self }
    }

    /// The models that are whole, by their manifests; the content is not read.
    pub fn list(&self) -> Result<Vec<Manifest>, ModelError> {
        let listed = match fs::read_dir(&self.folder) {
            Ok(listed) => listed,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(disk(&self.folder)(error)),
        };
        let mut found = Vec::new();
        for entry in listed {
            let path = entry.map_err(disk(&self.folder))?.path();
            let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
            if hidden || !path.is_dir() {
                continue;
            }
            if let Some(manifest) = whole(&path) {
                found.push(manifest);
            }
        }
        found.sort_by(|a, b| a.model_id.cmp(&b.model_id));
        Ok(found)
    }

    /// The same, as the node reports it.
    pub(crate) fn report(&self) -> Result<Vec<StagedModel>, ModelError> {
        let of = |m: Manifest| StagedModel { model_id: m.model_id, digest: m.digest, bytes: m.bytes };
        Ok(self.list()?.into_iter().map(of).collect())
    }

    fn get(&self, model: &ModelRef) -> Option<Manifest> {
        whole(&self.folder.join(folder_name(model)))
    }

    /// Where the model's file lies and what its manifest says, if it is here whole.
    pub(crate) fn find(&self, model: &ModelRef) -> Option<(PathBuf, Manifest)> {
        let manifest = self.get(model)?;
        Some((self.folder.join(folder_name(model)).join(&manifest.file), manifest))
    }

    /// Removes a model and whatever an interrupted copy of it has left. One that is not there is as good.
    pub fn remove(&self, model: &ModelRef) -> Result<(), ModelError> {
        let one = self.lock(model)?;
        one.remember(None);
        let name = folder_name(model);
        for folder in [name.clone(), format!(".{name}.staging"), format!(".{name}.broken")] {
            let folder = self.folder.join(folder);
            match fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(disk(&folder)(error)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Reads a model and compares it with its manifest.
    pub fn verify(&self, model: &ModelRef) -> Result<Manifest, ModelError> {
        let manifest = self.get(model).ok_or_else(|| ModelError::Unknown(model.clone()))?;
        let paths = manifest.paths(&self.folder.join(folder_name(model)));
        check_digest(&paths, &manifest.digest)?;
        Ok(manifest)
    }

    /// One process stages a model at a time. The lock goes with the process.
    fn lock(&self, model: &ModelRef) -> Result<ModelLock, ModelError> {
        fs::create_dir_all(&self.folder).map_err(disk(&self.folder))?;
        let path = self.folder.join(format!(".{}.lock", folder_name(model)));
        let lock = ModelLock::take(&path).map_err(disk(&path))?;
        lock.ok_or_else(|| ModelError::Busy(model.clone()))
    }

    /// Copies a file in as a model; of a model in several files, any of them names them all. `expected` is
    /// what its content must be; `progress` is told the bytes done and the bytes to do.
    pub fn stage(
        &self,
        model: &ModelRef,
        source: &Path,
        expected: Option<&Digest>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Staged, ModelError> {
        // A link's own name is kept: a cache's links lead to files that are named by their content.
        let source = std::path::absolute(source).map_err(disk(source))?;
        let sources = all_paths(&source);
        let origins: Vec<Origin> = sources.iter().cloned().map(Origin::of).collect::<Result<_, _>>()?;
        if origins.iter().any(|origin| is_reserved(&origin.name())) {
            return Err(ModelError::Name(source));
        }
        check_parts(&sources[0], sources.len())?;
        if let Some(here) = self.is_here(model, &sources, expected)? {
            return Ok(here);
        }
        let one = self.lock(model)?;
        if let Some(here) = self.is_here(model, &sources, expected)? {
            return Ok(here);
        }
        let staging = self.staging(model);
        let origin_file = staging.join(ORIGIN);
        let before = fs::read(&origin_file).ok();
        let before: Option<Vec<Origin>> = before.and_then(|text| serde_json::from_slice(&text).ok());
        if before.as_ref() != Some(&origins) {
            // Nothing, or the beginning of something else.
            let _ = fs::remove_dir_all(&staging);
            fs::create_dir_all(&staging).map_err(disk(&staging))?;
            write(&origin_file, &origins)?;
        }
        let (hash, resumed_at) = match self.copy_all(&origins, &staging, progress) {
            Ok(copied) => copied,
            Err(error @ ModelError::Changed { .. }) => {
                let _ = fs::remove_dir_all(&staging);
                return Err(error);
            }
            Err(error) => {
                self.give_up(&staging, &error);
                return Err(error);
            }
        };
        let checked = match expected {
            Some(expected) => expect(&source, expected, hash.clone()),
            None => Ok(()),
        };
        let files: Vec<(String, u64)> = origins.iter().map(|origin| (origin.name(), origin.bytes)).collect();
        let manifest = Manifest::of(model, &files, hash, sources[0].display().to_string());
        // What was written is read again, before anything is said of it.
        if let Err(error) = checked.and_then(|()| check_digest(&manifest.paths(&staging), &manifest.digest)) {
            let _ = fs::remove_dir_all(&staging);
            return Err(error);
        }
        self.show(&one, &staging, &manifest)?;
        Ok(Staged::Copied { manifest, resumed_at })
    }

    /// What is here of the model, where it is what the source has, whole and undamaged: else it is copied
    /// anew. Errors: that something else has its name.
    fn is_here(
        &self,
        model: &ModelRef,
        sources: &[PathBuf],
        expected: Option<&Digest>,
    ) -> Result<Option<Staged>, ModelError> {
        let Some(here) = self.get(model) else { return Ok(None) };
        let is = digest_of(sources)?;
        if here.digest != is {
            return Err(ModelError::Taken { model: model.clone(), digest: here.digest });
        }
        expected.map_or(Ok(()), |expected| expect(&sources[0], expected, is))?;
        Ok(self.verify(model).is_ok().then_some(Staged::WasHere(here)))
    }

    /// Copies what is missing of all files. Returns their digest, and the bytes that an earlier copy had left.
    fn copy_all(
        &self,
        origins: &[Origin],
        staging: &Path,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(Digest, u64), ModelError> {
        let all: u64 = origins.iter().map(|origin| origin.bytes).sum();
        let there = |origin: &Origin| fs::metadata(staging.join(origin.name())).map_or(0, |copy| copy.len());
        let missing = all.saturating_sub(origins.iter().map(there).sum());
        check_space(staging, missing, self.free)?;
        let mut hash = Sha256::new();
        let (mut before, mut resumed_at) = (0, 0);
        for origin in origins {
            let copy = staging.join(origin.name());
            let mut reported = |done| progress(before + done, all);
            let (resumed, copied) = copy_on(&origin.source, &copy, origin.bytes, &mut hash, &mut reported)?;
            if copied != origin.bytes {
                let (path, expected) = (origin.source.clone(), origin.bytes);
                return Err(ModelError::Changed { path, expected, copied });
            }
            before += copied;
            resumed_at += resumed;
        }
        Ok((files::digest(hash), resumed_at))
    }

    /// Where what is under way lies.
    fn staging(&self, model: &ModelRef) -> PathBuf {
        self.folder.join(format!(".{}.staging", folder_name(model)))
    }

    /// Bytes that another process has staged of the model so far, and all where that is known.
    pub fn under_way(&self, model: &ModelRef) -> (u64, Option<u64>) {
        download::under_way(&self.staging(model))
    }

    /// Downloads a model and stages it. What is here under the name already stays, whatever the
    /// source says by now. `progress` is told the bytes done and, where they are known, all.
    pub async fn fetch(
        &self,
        model: &ModelRef,
        source: &ModelSource,
        expected: Option<&Digest>,
        client: &reqwest::Client,
        hub: &Hub<'_>,
        progress: &mut (dyn FnMut(u64, Option<u64>) + Send),
    ) -> Result<Staged, ModelError> {
        if let Some(here) = self.get(model) {
            return taken_as(here, expected);
        }
        let (own, of) = (self.clone(), model.clone());
        let locked = owned_tasks::blocking("lock of a model", move || own.lock(&of)).await;
        let one = locked.unwrap_or_else(|panicked| Err(disk(&self.folder)(io::Error::other(panicked))))?;
        if let Some(here) = self.get(model) {
            return taken_as(here, expected);
        }
        let remotes = download::resolve(client, hub, source).await?;
        let remotes = remotes.expect("files on this machine are staged, not fetched");
        let plain = |file: &str| Path::new(file).file_name().is_some_and(|name| name == file);
        if let Some(remote) = remotes.iter().find(|of| !plain(&of.file) || is_reserved(&of.file)) {
            return Err(ModelError::Name(remote.file.as_str().into()));
        }
        let staging = self.staging(model);
        let url = remotes[0].url.clone();
        if let Some(bytes) = one.outgrown(&url) {
            check_space(&self.folder, bytes.saturating_sub(self.under_way(model).0), self.free)?;
        }
        fs::create_dir_all(&staging).map_err(disk(&staging))?;
        let fetched = download::download_all(client, hub, &remotes, &staging, self.free, progress).await;
        let resumed_at = match fetched.map_err(ModelError::from) {
            Ok(resumed_at) => resumed_at,
            Err(error) => {
                let (bytes, _) = self.under_way(model);
                self.give_up(&staging, &error);
                if error.is_no_space() && bytes > 0 {
                    let bytes = bytes.saturating_add(PIECE_BYTES);
                    one.remember(Some(&Outgrown { url, bytes }));
                }
                return Err(error);
            }
        };
        one.remember(None);
        let (own, model, expected) = (self.clone(), model.clone(), expected.cloned());
        let take_in = move || own.take_in(&one, &model, &remotes, expected.as_ref());
        let done = owned_tasks::blocking("digest of a model", take_in).await;
        let manifest = done.unwrap_or_else(|panicked| Err(disk(&self.folder)(io::Error::other(panicked))))?;
        Ok(Staged::Copied { manifest, resumed_at })
    }

    /// Verifies a whole download and shows it.
    fn take_in(
        &self,
        one: &ModelLock,
        model: &ModelRef,
        remotes: &[Remote],
        expected: Option<&Digest>,
    ) -> Result<Manifest, ModelError> {
        let staging = self.staging(model);
        let taken = self.check_download(&staging, model, remotes, expected);
        let manifest = match taken {
            Ok(manifest) => manifest,
            Err(error) => {
                // It would be the same at every other try.
                if matches!(
                    error,
                    ModelError::Digest { .. } | ModelError::Parts { .. } | ModelError::Changed { .. }
                ) {
                    let _ = fs::remove_dir_all(&staging);
                }
                return Err(error);
            }
        };
        self.show(one, &staging, &manifest)?;
        Ok(manifest)
    }

    /// What was downloaded, as it is by its content.
    fn check_download(
        &self,
        staging: &Path,
        model: &ModelRef,
        remotes: &[Remote],
        expected: Option<&Digest>,
    ) -> Result<Manifest, ModelError> {
        let paths: Vec<PathBuf> = remotes.iter().map(|remote| staging.join(&remote.file)).collect();
        let several = paths.len() > 1;
        for path in &paths {
            let bytes = fs::metadata(path).map_err(disk(path))?.len();
            // Two writers of one file, where a lease was lost, have made it longer.
            if let Some(expected) = download::begun_bytes(path).filter(|expected| *expected != bytes) {
                return Err(ModelError::Changed { path: path.clone(), expected, copied: bytes });
            }
        }
        for (remote, path) in remotes.iter().zip(&paths) {
            // Of one file alone it is the digest of the whole, which is compared below.
            if let Some(of_part) = remote.digest.as_ref().filter(|_| several) {
                check_digest(std::slice::from_ref(path), of_part)?;
            }
        }
        let digest = digest_of(&paths)?;
        let expected = expected.or(remotes[0].digest.as_ref().filter(|_| !several));
        expected.map_or(Ok(()), |expected| expect(&paths[0], expected, digest.clone()))?;
        check_parts(&paths[0], paths.len())?;
        let length = |path: &PathBuf| Ok(fs::metadata(path).map_err(disk(path))?.len());
        let bytes: Vec<u64> = paths.iter().map(length).collect::<Result<_, ModelError>>()?;
        let files: Vec<(String, u64)> = remotes.iter().map(|remote| remote.file.clone()).zip(bytes).collect();
        Ok(Manifest::of(model, &files, digest, remotes[0].url.clone()))
    }

    /// Where no space is left, a beginning is in the way; elsewhere it is gone on from.
    fn give_up(&self, staging: &Path, error: &ModelError) {
        if error.is_no_space() {
            // What cannot be removed is begun anew at the next try.
            let _ = fs::remove_dir_all(staging);
        }
    }

    /// Gives what was staged its name, where the lock is still ours.
    fn show(&self, one: &ModelLock, staging: &Path, manifest: &Manifest) -> Result<(), ModelError> {
        if !one.is_held() {
            return Err(ModelError::Busy(manifest.model_id.clone()));
        }
        write(&staging.join(MANIFEST), manifest)?;
        for path in manifest.paths(staging) {
            download::forget_begun(&path).map_err(disk(staging))?;
        }
        let origin = staging.join(ORIGIN);
        match fs::remove_file(&origin) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(disk(&origin)(error)),
            _ => {}
        }
        atomic_file::flush_folder(staging)?;
        let name = folder_name(&manifest.model_id);
        let place = self.folder.join(&name);
        if place.exists() {
            // It was not whole, or damaged. Nothing is lost before its successor is there.
            let broken = self.folder.join(format!(".{name}.broken"));
            let _ = fs::remove_dir_all(&broken);
            fs::rename(&place, &broken).map_err(disk(&broken))?;
        }
        fs::rename(staging, &place).map_err(disk(&place))?;
        Ok(atomic_file::flush_folder(&self.folder)?)
    }
}

/// By which the projector of a model is staged beside it: another source is another file.
pub fn projector_name(model: &ModelRef, source: &str) -> ModelRef {
    let of = Sha256::digest(source.as_bytes());
    let name = format!("{model}.mmproj-{:02x}{:02x}{:02x}{:02x}", of[0], of[1], of[2], of[3]);
    // One whose name leaves no room for it is shown as taken by its own model.
    ModelRef::new(&name).unwrap_or_else(|_| model.clone())
}

/// Whether a folder of ours has another use for the name.
fn is_reserved(file: &str) -> bool {
    [MANIFEST, ORIGIN].contains(&file)
}

/// What is here under the name already, where it is what is expected.
fn taken_as(here: Manifest, expected: Option<&Digest>) -> Result<Staged, ModelError> {
    match expected.filter(|expected| **expected != here.digest) {
        Some(_) => Err(ModelError::Taken { model: here.model_id, digest: here.digest }),
        None => Ok(Staged::WasHere(here)),
    }
}

fn write(path: &Path, value: &impl Serialize) -> Result<(), ModelError> {
    let text = serde_json::to_vec_pretty(value).map_err(io::Error::from).map_err(disk(path))?;
    Ok(atomic_file::replace(path, &text, atomic_file::BY_UMASK)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: usize = 1024 * 1024;

    fn model(name: &str) -> ModelRef {
        ModelRef::new(name).unwrap()
    }

    struct Bench {
        dir: tempfile::TempDir,
        models: Models,
        source: PathBuf,
    }

    fn bench(content: &[u8]) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("weights.gguf");
        fs::write(&source, content).unwrap();
        Bench { models: Models::new(dir.path().join("models")), dir, source }
    }

    fn stage(b: &Bench, name: &str) -> Result<Staged, ModelError> {
        b.models.stage(&model(name), &b.source, None, &mut |_, _| {})
    }

    // CLOUD-1630
    #[test]
    fn a_staged_model_is_listed_with_its_digest_and_size_and_verified_by_its_content() {
        let b = bench(b"weights");
        assert_eq!(b.models.list().unwrap(), []);
        let Staged::Copied { manifest, resumed_at: 0 } = stage(&b, "hf:org/m.gguf").unwrap() else {
            panic!("it was not copied whole")
        };
        assert_eq!(b.models.list().unwrap(), std::slice::from_ref(&manifest));
        assert_eq!((manifest.bytes, manifest.file.as_str()), (7, "weights.gguf"));
        assert_eq!(b.models.verify(&model("hf:org/m.gguf")).unwrap(), manifest);
        assert_eq!(stage(&b, "hf:org/m.gguf").unwrap(), Staged::WasHere(manifest.clone()));
        let copy = b.dir.path().join("models/hf%3Aorg%2Fm.gguf/weights.gguf");
        fs::write(&copy, b"wEights").unwrap();
        assert!(matches!(b.models.verify(&manifest.model_id), Err(ModelError::Digest { .. })));
        assert!(matches!(stage(&b, "hf:org/m.gguf").unwrap(), Staged::Copied { .. }), "it is mended");
        fs::write(&copy, b"short").unwrap();
        assert_eq!(b.models.list().unwrap(), [], "not whole");
        assert!(matches!(stage(&b, "hf:org/m.gguf").unwrap(), Staged::Copied { .. }));
        assert_eq!(b.models.verify(&manifest.model_id).unwrap(), manifest);
        fs::write(&b.source, b"others!").unwrap();
        assert!(matches!(stage(&b, "hf:org/m.gguf"), Err(ModelError::Taken { .. })));
        assert!(matches!(b.models.verify(&model("none")), Err(ModelError::Unknown(_))));
    }

    // CLOUD-2681
    #[test]
    fn a_model_in_several_files_is_staged_whole_from_any_of_them() {
        let b = bench(b"unused");
        let part = |n: u32| b.dir.path().join(format!("big-{n:05}-of-00003.gguf"));
        for (n, content) in [(1, "one"), (3, "three")] {
            fs::write(part(n), content).unwrap();
        }
        let of = |source: &Path| b.models.stage(&model("big"), source, None, &mut |_, _| {});
        let missing = of(&part(3)).unwrap_err().to_string();
        assert!(missing.contains("big-00002-of-00003.gguf"), "{missing}");
        fs::write(part(2), "two").unwrap();
        let Staged::Copied { manifest, .. } = of(&part(2)).unwrap() else { panic!("it was not copied") };
        assert_eq!((manifest.bytes, manifest.parts.len()), (11, 3));
        assert_eq!(manifest.file, "big-00001-of-00003.gguf");
        fs::write(b.dir.path().join("cat"), "onetwothree").unwrap();
        assert_eq!(manifest.digest, digest_of(&[b.dir.path().join("cat")]).unwrap(), "as cat would give it");
        assert_eq!(of(&part(1)).unwrap(), Staged::WasHere(manifest.clone()));
        let copy = b.dir.path().join("models/big/big-00003-of-00003.gguf");
        fs::write(&copy, "THREE").unwrap();
        assert!(matches!(b.models.verify(&manifest.model_id), Err(ModelError::Digest { .. })));
        assert!(matches!(of(&part(1)).unwrap(), Staged::Copied { .. }), "it is mended");
        assert_eq!(b.models.report().unwrap()[0].bytes, 11);
    }

    // CLOUD-1631
    #[test]
    fn an_interrupted_copy_is_never_shown_and_goes_on_where_it_stopped() {
        let content: Vec<u8> = (0..3 * PIECE + 5).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let b = bench(&content);
        let interrupted = std::panic::catch_unwind(|| {
            let mut pieces = 0;
            let mut stop = |_, _| {
                pieces += 1;
                assert!(pieces < 2, "the process dies here");
            };
            b.models.stage(&model("m"), &b.source, None, &mut stop)
        });
        assert!(interrupted.is_err());
        assert_eq!(b.models.list().unwrap(), []);
        let Staged::Copied { manifest, resumed_at } = stage(&b, "m").unwrap() else { panic!("copied") };
        assert_eq!(resumed_at, 2 * PIECE as u64);
        assert_eq!(b.models.verify(&model("m")).unwrap(), manifest);
        let copy = b.dir.path().join("models/m/weights.gguf");
        assert!(fs::read(copy).unwrap() == content);
    }

    // CLOUD-1631
    #[test]
    fn a_source_that_changed_is_copied_from_its_start_and_a_wrong_one_leaves_nothing() {
        let b = bench(b"0123456789");
        let staging = b.dir.path().join("models/.m.staging");
        fs::create_dir_all(&staging).unwrap();
        fs::write(staging.join("weights.gguf"), b"other").unwrap();
        assert!(matches!(stage(&b, "m").unwrap(), Staged::Copied { resumed_at: 0, .. }));
        let wrong = Digest::new(&format!("sha256:{}", "0".repeat(64))).unwrap();
        let error = b.models.stage(&model("n"), &b.source, Some(&wrong), &mut |_, _| {}).unwrap_err();
        assert!(matches!(error, ModelError::Digest { .. }), "{error}");
        let there = fs::read_dir(b.dir.path().join("models")).unwrap();
        let folders = there.filter(|entry| entry.as_ref().unwrap().path().is_dir());
        assert_eq!(folders.count(), 1, "only m is there");
        let lock = b.models.lock(&model("n")).unwrap();
        assert!(matches!(stage(&b, "n"), Err(ModelError::Busy(_))));
        drop(lock);
        let reserved = b.dir.path().join(MANIFEST);
        fs::write(&reserved, b"x").unwrap();
        let error = b.models.stage(&model("n"), &reserved, None, &mut |_, _| {}).unwrap_err();
        assert!(matches!(error, ModelError::Name(_)));
        assert!(matches!(
            b.models.stage(&model("d"), b.dir.path(), None, &mut |_, _| {}),
            Err(ModelError::NoFile(_))
        ));
    }
}
