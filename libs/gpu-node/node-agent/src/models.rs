//! The models on this node's disk: a folder each, with a manifest that says what is in it.
//!
//! A model is copied into a folder that starts with a dot, read back, and renamed into place: what
//! has a name is whole and was verified. A copy that was interrupted goes on where it stopped.
//! Everything here blocks on the disk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use atomic_file::WriteError;
use pool_registry_types::node::StagedModel;
use pool_registry_types::{Digest, ModelRef};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::download::{self, DownloadError, FreeBytes, Hub, PIECE_BYTES, check_space, free_bytes};
use crate::model_lock::{ModelLock, Outgrown};
use crate::source::ModelSource;

const MANIFEST: &str = "manifest.json";
/// What a copy under way was begun from.
const ORIGIN: &str = "origin.json";
const PIECE: usize = 1024 * 1024;

/// What a model's folder holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub model_id: ModelRef,
    pub digest: Digest,
    pub bytes: u64,
    /// The file's name in the folder.
    pub file: String,
    /// Where it was copied from.
    pub source: String,
}

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

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Origin {
    source: PathBuf,
    bytes: u64,
    modified_ns: u128,
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
        let path = self.folder.join(folder_name(model)).join(&manifest.file);
        expect(&path, &manifest.digest, digest_of(&path)?)?;
        Ok(manifest)
    }

    /// One process stages a model at a time. The lock goes with the process.
    fn lock(&self, model: &ModelRef) -> Result<ModelLock, ModelError> {
        fs::create_dir_all(&self.folder).map_err(disk(&self.folder))?;
        let path = self.folder.join(format!(".{}.lock", folder_name(model)));
        let lock = ModelLock::take(&path).map_err(disk(&path))?;
        lock.ok_or_else(|| ModelError::Busy(model.clone()))
    }

    /// Copies a file in as a model. `expected` is what its content must be; `progress` is told
    /// the bytes done and the bytes to do.
    pub fn stage(
        &self,
        model: &ModelRef,
        source: &Path,
        expected: Option<&Digest>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Staged, ModelError> {
        let source = source.canonicalize().map_err(disk(source))?;
        let about = fs::metadata(&source).map_err(disk(&source))?;
        if !about.is_file() {
            return Err(ModelError::NoFile(source));
        }
        let name = source.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if [MANIFEST, ORIGIN].contains(&name.as_str()) {
            return Err(ModelError::Name(source));
        }
        let _one = self.lock(model)?;
        if let Some(here) = self.get(model) {
            let is = digest_of(&source)?;
            if here.digest != is {
                return Err(ModelError::Taken { model: model.clone(), digest: here.digest });
            }
            expected.map_or(Ok(()), |expected| expect(&source, expected, is))?;
            if self.verify(model).is_ok() {
                return Ok(Staged::WasHere(here));
            }
            // What is here is damaged: it is copied anew.
        }
        let modified = about.modified().ok().and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
        let origin = Origin {
            source: source.clone(),
            bytes: about.len(),
            modified_ns: modified.unwrap_or_default().as_nanos(),
        };
        let staging = self.folder.join(format!(".{}.staging", folder_name(model)));
        let copy = staging.join(&name);
        let origin_file = staging.join(ORIGIN);
        let before = fs::read(&origin_file).ok().and_then(|text| serde_json::from_slice(&text).ok());
        if before.as_ref() != Some(&origin) {
            // Nothing, or the beginning of something else.
            let _ = fs::remove_dir_all(&staging);
            fs::create_dir_all(&staging).map_err(disk(&staging))?;
            write(&origin_file, &origin)?;
        }
        let missing = about.len().saturating_sub(fs::metadata(&copy).map_or(0, |copy| copy.len()));
        let copied = check_space(&staging, missing, self.free)
            .map_err(ModelError::from)
            .and_then(|()| copy_on(&source, &copy, about.len(), progress));
        let (digest, resumed_at, copied) = match copied {
            Ok(copied) => copied,
            Err(error) => {
                self.give_up(&staging, &error);
                return Err(error);
            }
        };
        if copied != about.len() {
            let _ = fs::remove_dir_all(&staging);
            return Err(ModelError::Changed { path: source, expected: about.len(), copied });
        }
        let checked = match expected {
            Some(expected) => expect(&source, expected, digest.clone()),
            None => Ok(()),
        };
        let manifest = Manifest {
            model_id: model.clone(),
            digest,
            bytes: about.len(),
            file: name,
            source: source.display().to_string(),
        };
        // What was written is read again, before anything is said of it.
        if let Err(error) = checked.and_then(|()| expect(&copy, &manifest.digest, digest_of(&copy)?)) {
            let _ = fs::remove_dir_all(&staging);
            return Err(error);
        }
        self.show(&staging, &manifest)?;
        Ok(Staged::Copied { manifest, resumed_at })
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
        let one = self.lock(model)?;
        if let Some(here) = self.get(model) {
            if expected.is_some_and(|expected| *expected != here.digest) {
                return Err(ModelError::Taken { model: model.clone(), digest: here.digest });
            }
            return Ok(Staged::WasHere(here));
        }
        let remote = download::resolve(client, hub, source).await?;
        let remote = remote.expect("files on this machine are staged, not fetched");
        let plain = Path::new(&remote.file).file_name().is_some_and(|name| name == remote.file.as_str());
        if !plain || [MANIFEST, ORIGIN].contains(&remote.file.as_str()) {
            return Err(ModelError::Name(remote.file.into()));
        }
        let staging = self.folder.join(format!(".{}.staging", folder_name(model)));
        if let Some(bytes) = one.outgrown(&remote.url) {
            let begun = fs::metadata(staging.join(&remote.file)).map_or(0, |part| part.len());
            check_space(&self.folder, bytes.saturating_sub(begun), self.free)?;
        }
        fs::create_dir_all(&staging).map_err(disk(&staging))?;
        let path = staging.join(&remote.file);
        let fetched = download::download(client, hub, &remote, &path, self.free, progress).await;
        let resumed_at = match fetched.map_err(ModelError::from) {
            Ok(resumed_at) => resumed_at,
            Err(error) => {
                let bytes = fs::metadata(&path).map_or(0, |part| part.len());
                self.give_up(&staging, &error);
                if error.is_no_space() && bytes > 0 {
                    let bytes = bytes.saturating_add(PIECE_BYTES);
                    one.remember(Some(&Outgrown { url: remote.url, bytes }));
                }
                return Err(error);
            }
        };
        one.remember(None);
        let (own, manifest) = (
            self.clone(),
            Manifest {
                model_id: model.clone(),
                digest: Digest::new(&format!("sha256:{}", "0".repeat(64))).expect("a digest of zeros"),
                bytes: 0,
                file: remote.file,
                source: remote.url,
            },
        );
        let expected = expected.cloned().or(remote.digest);
        let take_in = move || own.take_in(&staging, manifest, expected.as_ref());
        let done = owned_tasks::blocking("digest of a model", take_in).await;
        let manifest = done.unwrap_or_else(|panicked| Err(disk(&path)(io::Error::other(panicked))))?;
        Ok(Staged::Copied { manifest, resumed_at })
    }

    /// Verifies a whole download and shows it.
    fn take_in(
        &self,
        staging: &Path,
        mut manifest: Manifest,
        expected: Option<&Digest>,
    ) -> Result<Manifest, ModelError> {
        let path = staging.join(&manifest.file);
        manifest.digest = digest_of(&path)?;
        manifest.bytes = fs::metadata(&path).map_err(disk(&path))?.len();
        if let Some(expected) = expected
            && let Err(error) = expect(&path, expected, manifest.digest.clone())
        {
            let _ = fs::remove_dir_all(staging);
            return Err(error);
        }
        self.show(staging, &manifest)?;
        Ok(manifest)
    }

    /// Where no space is left, a beginning is in the way; elsewhere it is gone on from.
    fn give_up(&self, staging: &Path, error: &ModelError) {
        if error.is_no_space() {
            // What cannot be removed is begun anew at the next try.
            let _ = fs::remove_dir_all(staging);
        }
    }

    /// Gives what was staged its name.
    fn show(&self, staging: &Path, manifest: &Manifest) -> Result<(), ModelError> {
        write(&staging.join(MANIFEST), manifest)?;
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

/// The manifest of a folder whose file is there in full length.
fn whole(folder: &Path) -> Option<Manifest> {
    let manifest: Manifest = serde_json::from_slice(&fs::read(folder.join(MANIFEST)).ok()?).ok()?;
    // A name with a folder in it would lead elsewhere.
    let plain = Path::new(&manifest.file).file_name().is_some_and(|name| name == manifest.file.as_str());
    let length = fs::metadata(folder.join(&manifest.file)).ok()?.len();
    (plain && length == manifest.bytes).then_some(manifest)
}

/// Reads a file and compares it with its digest.
pub(crate) fn check_digest(path: &Path, expected: &Digest) -> Result<(), ModelError> {
    expect(path, expected, digest_of(path)?)
}

fn expect(path: &Path, expected: &Digest, is: Digest) -> Result<(), ModelError> {
    if *expected == is {
        return Ok(());
    }
    Err(ModelError::Digest { path: path.to_owned(), expected: expected.clone(), is })
}

fn digest(hash: Sha256) -> Digest {
    let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Digest::new(&format!("sha256:{hex}")).expect("a SHA-256 makes a digest")
}

fn digest_of(path: &Path) -> Result<Digest, ModelError> {
    let mut hash = Sha256::new();
    io::copy(&mut File::open(path).map_err(disk(path))?, &mut hash).map_err(disk(path))?;
    Ok(digest(hash))
}

/// Copies what is missing. Returns the digest of the whole source, where the copy went on, and how
/// many bytes the source had.
fn copy_on(
    source: &Path,
    copy: &Path,
    bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(Digest, u64, u64), ModelError> {
    let mut from = File::open(source).map_err(disk(source))?;
    let mut to = OpenOptions::new().create(true).append(true).open(copy).map_err(disk(copy))?;
    let mut resumed_at = to.metadata().map_err(disk(copy))?.len();
    if resumed_at > bytes {
        to.set_len(0).map_err(disk(copy))?;
        resumed_at = 0;
    }
    let mut hash = Sha256::new();
    // The source is read whole: its digest is wanted, and only what is missing is written.
    let mut piece = vec![0; PIECE];
    let mut done = 0;
    from.seek(SeekFrom::Start(0)).map_err(disk(source))?;
    loop {
        let read = from.read(&mut piece).map_err(disk(source))?;
        if read == 0 {
            break;
        }
        hash.update(&piece[..read]);
        let end = done + read as u64;
        if end > resumed_at {
            let skip = usize::try_from(resumed_at.saturating_sub(done)).unwrap_or(read);
            to.write_all(&piece[skip..read]).map_err(disk(copy))?;
        }
        done = end;
        progress(done, bytes);
    }
    to.sync_all().map_err(disk(copy))?;
    Ok((digest(hash), resumed_at, done))
}

fn write(path: &Path, value: &impl Serialize) -> Result<(), ModelError> {
    let text = serde_json::to_vec_pretty(value).map_err(io::Error::from).map_err(disk(path))?;
    Ok(atomic_file::replace(path, &text, atomic_file::BY_UMASK)?)
}

#[cfg(test)]
mod tests {
    use super::*;

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
