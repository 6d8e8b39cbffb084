//! The files of one model, in order.
//!
//! A large GGUF is split by llama.cpp's tools into `NAME-00001-of-00003.gguf` and so on, and is loaded by
//! the first of them. Whoever names any part means them all; their digest is that of all bytes one after
//! another, as `cat` would give them, so that one file is the case of a single part.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use pool_registry_types::{Digest, ModelRef};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{ModelError, disk};
use crate::gguf::GgufHeader;

/// Most files of one model.
const MAX_PARTS: u32 = 1_000;
const PIECE: usize = 1024 * 1024;

/// What a model's folder holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub model_id: ModelRef,
    /// Of all its bytes, one file after another.
    pub digest: Digest,
    /// Of all its files.
    pub bytes: u64,
    /// The name in the folder of the file that it is loaded by.
    pub file: String,
    /// All its files in order, where they are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<PartFile>,
    /// Where it was copied from.
    pub source: String,
}

/// One of several files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartFile {
    pub file: String,
    pub bytes: u64,
}

impl Manifest {
    /// What is so many bytes of the files.
    pub(super) fn of(model: &ModelRef, files: &[(String, u64)], digest: Digest, source: String) -> Self {
        let part = |(file, bytes): &(String, u64)| PartFile { file: file.clone(), bytes: *bytes };
        Self {
            model_id: model.clone(),
            digest,
            bytes: files.iter().map(|(_, bytes)| bytes).sum(),
            file: files.first().map(|(file, _)| file.clone()).unwrap_or_default(),
            parts: if files.len() > 1 { files.iter().map(part).collect() } else { Vec::new() },
            source,
        }
    }

    /// Its files in order, with their bytes.
    fn files(&self) -> Vec<(&str, u64)> {
        match self.parts.as_slice() {
            [] => vec![(&self.file, self.bytes)],
            parts => parts.iter().map(|part| (part.file.as_str(), part.bytes)).collect(),
        }
    }

    /// Where its files lie in its folder.
    pub(super) fn paths(&self, folder: &Path) -> Vec<PathBuf> {
        self.files().into_iter().map(|(file, _)| folder.join(file)).collect()
    }

    /// Where every file is there in full length.
    fn is_whole(&self, folder: &Path) -> bool {
        // A file's name leads nowhere else.
        let plain = |file: &str| Path::new(file).file_name().is_some_and(|name| name == file);
        let length = |file: &str| fs::metadata(folder.join(file)).ok().map(|about| about.len());
        let files = self.files();
        files.iter().all(|(file, bytes)| plain(file) && length(file) == Some(*bytes))
            && files.iter().map(|(_, bytes)| bytes).sum::<u64>() == self.bytes
    }
}

/// The manifest of a folder whose files are there in full length.
pub(super) fn whole(folder: &Path) -> Option<Manifest> {
    let text = fs::read(folder.join(super::MANIFEST)).ok()?;
    let manifest: Manifest = serde_json::from_slice(&text).ok()?;
    manifest.is_whole(folder).then_some(manifest)
}

/// The names of all files of the model that the named one is of, in order; its own where it is no part.
pub(crate) fn all_names(file: &str) -> Vec<String> {
    match Part::of(file) {
        Some(part) => (1..=part.count).map(|number| part.named(number)).collect(),
        None => vec![file.to_owned()],
    }
}

/// Whether the name says that it is a part, and not the first.
pub(crate) fn is_later_part(file: &str) -> bool {
    Part::of(file).is_some_and(|part| part.number > 1)
}

/// The same for a path: every part in its folder.
pub(crate) fn all_paths(path: &Path) -> Vec<PathBuf> {
    match path.file_name().and_then(|name| name.to_str()) {
        Some(name) => all_names(name).into_iter().map(|name| path.with_file_name(name)).collect(),
        None => vec![path.to_owned()],
    }
}

/// What the name of a part says.
struct Part<'a> {
    stem: &'a str,
    number: u32,
    count: u32,
    extension: &'a str,
}

impl<'a> Part<'a> {
    fn of(file: &'a str) -> Option<Self> {
        let (name, extension) = file.rsplit_once('.')?;
        if !extension.eq_ignore_ascii_case("gguf") {
            return None;
        }
        let (rest, count) = name.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let digits = |text: &str| {
            let all = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
            all.then(|| text.parse::<u32>().ok()).flatten()
        };
        let (number, count) = (digits(number)?, digits(count)?);
        ((1..=count).contains(&number) && count <= MAX_PARTS).then_some(Self {
            stem,
            number,
            count,
            extension,
        })
    }

    fn named(&self, number: u32) -> String {
        format!("{}-{number:05}-of-{:05}.{}", self.stem, self.count, self.extension)
    }
}

/// That the files are all of the model, by what the first says of itself. What is no GGUF says nothing.
pub(crate) fn check_parts(first: &Path, files: usize) -> Result<(), ModelError> {
    let file = File::open(first).map_err(disk(first))?;
    let Ok(header) = GgufHeader::read(BufReader::new(file)) else { return Ok(()) };
    match header.parts {
        Some(parts) if parts != files as u64 => {
            Err(ModelError::Parts { path: first.to_owned(), parts, found: files })
        }
        _ => Ok(()),
    }
}

/// Reads files and compares them with their digest.
pub(crate) fn check_digest(paths: &[PathBuf], expected: &Digest) -> Result<(), ModelError> {
    expect(&paths[0], expected, digest_of(paths)?)
}

pub(super) fn expect(path: &Path, expected: &Digest, is: Digest) -> Result<(), ModelError> {
    if *expected == is {
        return Ok(());
    }
    Err(ModelError::Digest { path: path.to_owned(), expected: expected.clone(), is })
}

pub(super) fn digest(hash: Sha256) -> Digest {
    let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Digest::new(&format!("sha256:{hex}")).expect("a SHA-256 makes a digest")
}

/// Of all files, one after another.
pub(super) fn digest_of(paths: &[PathBuf]) -> Result<Digest, ModelError> {
    let mut hash = Sha256::new();
    for path in paths {
        io::copy(&mut File::open(path).map_err(disk(path))?, &mut hash).map_err(disk(path))?;
    }
    Ok(digest(hash))
}

/// Copies what is missing of one file. Its bytes go through `hash`. Returns where the copy went on, and how
/// many bytes the source had. `progress` is told the bytes of the file that are done.
pub(super) fn copy_on(
    source: &Path,
    copy: &Path,
    bytes: u64,
    hash: &mut Sha256,
    progress: &mut dyn FnMut(u64),
) -> Result<(u64, u64), ModelError> {
    let mut from = File::open(source).map_err(disk(source))?;
    let mut to = OpenOptions::new().create(true).append(true).open(copy).map_err(disk(copy))?;
    let mut resumed_at = to.metadata().map_err(disk(copy))?.len();
    if resumed_at > bytes {
        to.set_len(0).map_err(disk(copy))?;
        resumed_at = 0;
    }
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
        progress(done);
    }
    to.sync_all().map_err(disk(copy))?;
    Ok((resumed_at, done))
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2681
    #[test]
    fn any_part_names_the_whole_set() {
        let set = ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"];
        for part in set {
            assert_eq!(all_names(part), set);
        }
        assert_eq!(
            all_paths(Path::new("/d/m-00002-of-00002.GGUF"))[0],
            Path::new("/d/m-00001-of-00002.GGUF")
        );
        for whole in [
            "m.gguf",
            "m-1-of-3.gguf",
            "m-00004-of-00003.gguf",
            "m-00000-of-00003.gguf",
            "m-00001-of-00003.bin",
            "m-00001-of-99999.gguf",
        ] {
            assert_eq!(all_names(whole), [whole]);
        }
        assert!(is_later_part(set[1]) && !is_later_part(set[0]) && !is_later_part("m.gguf"));
    }
}
