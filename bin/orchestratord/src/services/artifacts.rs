//! Artifacts: JSON documents by the SHA-256 of their bytes, as files.
//!
//! The bytes are kept as they came. A document that is there already is not written again; when
//! all together take too much room, the ones that were written first go. How much they take is counted
//! once, at the first writing, and kept in memory from then on.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use parking_lot::Mutex;
use pool_registry_types::{Digest, ErrorBody, ErrorCode};
use sha2::{Digest as _, Sha256};

/// Room that all artifacts may take together, bytes.
const MAX_BYTES: u64 = 1024 * 1024 * 1024;
/// Lists and objects within each other: more of them JSON readers refuse, ours among them.
const MAX_DEPTH: usize = 127;
/// Most artifacts.
const MAX_FILES: usize = 10_000;

/// The folder of artifacts.
#[derive(Debug)]
pub(crate) struct Artifacts {
    folder: PathBuf,
    at_most: u64,
    /// Held by the one that writes; absent before the first.
    kept: Mutex<Option<ArtifactFiles>>,
}

/// The files that there are.
#[derive(Debug, Default)]
struct ArtifactFiles {
    /// With their bytes, in the order in which they were written.
    files: VecDeque<(PathBuf, u64)>,
    bytes: u64,
}

impl Artifacts {
    pub(crate) fn new(folder: &Path) -> Self {
        Self { folder: folder.join("artifacts"), at_most: MAX_BYTES, kept: Mutex::default() }
    }

    /// Keeps the document. Blocks on the disk. Errors: `INVALID_PARAMS` for what is no JSON.
    pub(crate) fn put(&self, bytes: &[u8]) -> Result<Digest, ErrorBody> {
        serde_json::from_slice::<serde::de::IgnoredAny>(bytes)
            .map_err(|error| ErrorBody::new(ErrorCode::InvalidParams, format!("not JSON: {error}")))?;
        if depth(bytes) > MAX_DEPTH {
            let message = format!("nested deeper than {MAX_DEPTH}, which readers refuse");
            return Err(ErrorBody::new(ErrorCode::InvalidParams, message));
        }
        let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let digest = Digest::new(&format!("sha256:{hex}")).expect("a SHA-256 makes a digest");
        let mut kept = self.kept.lock();
        let file = self.file(&digest);
        if !file.exists() {
            self.keep(&mut kept, file.clone(), bytes).map_err(|error| {
                tracing::error!(file = %file.display(), %error, "an artifact cannot be written");
                ErrorBody::new(ErrorCode::Internal, "the artifact cannot be written, see the server's log")
            })?;
        }
        Ok(digest)
    }

    /// Blocks on the disk. Errors: `NOT_FOUND`.
    pub(crate) fn get(&self, digest: &Digest) -> Result<Vec<u8>, ErrorBody> {
        fs::read(self.file(digest))
            .map_err(|_| ErrorBody::new(ErrorCode::NotFound, format!("no artifact {digest}")))
    }

    fn file(&self, digest: &Digest) -> PathBuf {
        // A digest holds nothing that could lead out of the folder.
        self.folder.join(format!("{}.json", digest.as_str().trim_start_matches("sha256:")))
    }

    fn keep(&self, kept: &mut Option<ArtifactFiles>, file: PathBuf, bytes: &[u8]) -> io::Result<()> {
        let kept = match kept {
            Some(kept) => kept,
            None => kept.insert(ArtifactFiles::in_folder(&self.folder)?),
        };
        let wanted = bytes.len() as u64;
        while kept.bytes + wanted > self.at_most || kept.files.len() >= MAX_FILES {
            let Some((oldest, bytes)) = kept.files.front() else { break };
            match fs::remove_file(oldest) {
                // Somebody else has removed it.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            kept.bytes -= bytes;
            kept.files.pop_front();
        }
        atomic_file::replace(&file, bytes, atomic_file::BY_UMASK)?;
        kept.files.push_back((file, wanted));
        kept.bytes += wanted;
        Ok(())
    }
}

impl ArtifactFiles {
    /// As a walk over the folder finds them.
    fn in_folder(folder: &Path) -> io::Result<Self> {
        let mut known: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        let listed = match fs::read_dir(folder) {
            Ok(listed) => listed,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error),
        };
        for entry in listed {
            let entry = entry?;
            let about = entry.metadata()?;
            known.push((about.modified()?, about.len(), entry.path()));
        }
        known.sort();
        let bytes = known.iter().map(|(_, bytes, _)| *bytes).sum();
        Ok(Self { files: known.into_iter().map(|(_, bytes, path)| (path, bytes)).collect(), bytes })
    }
}

/// How deep lists and objects of a JSON text are nested.
fn depth(json: &[u8]) -> usize {
    let (mut depth, mut most, mut in_string, mut escaped) = (0_usize, 0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_string,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                most = most.max(depth);
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-1623
    // CLOUD-1108
    #[test]
    fn an_artifact_is_read_by_its_digest_and_the_first_ones_make_room() {
        let folder = tempfile::tempdir().unwrap();
        let artifacts = Artifacts { at_most: 30, ..Artifacts::new(folder.path()) };
        let digest = artifacts.put(br#"{"a": 1}"#).unwrap();
        assert_eq!(
            digest.as_str(),
            "sha256:f9d86028c6e0d64e225186f96acb69338b2c59764df79162107f5c4bb34d1310"
        );
        assert_eq!(artifacts.put(br#"{"a": 1}"#), Ok(digest.clone()), "the same bytes, the same name");
        assert_eq!(artifacts.get(&digest).unwrap(), br#"{"a": 1}"#);
        assert_eq!(artifacts.put(b"{").unwrap_err().code, ErrorCode::InvalidParams);
        let nested = |depth: usize| "[".repeat(depth) + r#""]\"[""# + &"]".repeat(depth);
        assert_eq!(depth(nested(MAX_DEPTH).as_bytes()), MAX_DEPTH);
        let refused = artifacts.put(nested(MAX_DEPTH + 1).as_bytes()).unwrap_err();
        assert!(refused.message.contains("127"), "{refused}");
        let second = artifacts.put(br#"{"second": "ten"}"#).unwrap();
        artifacts.put(br#"{"third": "twelve"}"#).unwrap();
        assert_eq!(artifacts.get(&digest).unwrap_err().code, ErrorCode::NotFound);
        assert_eq!(artifacts.get(&second).unwrap_err().code, ErrorCode::NotFound);
    }

    // CLOUD-2758
    #[test]
    fn the_folder_is_walked_once_and_what_is_counted_is_what_a_walk_finds() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Artifacts { at_most: 100, ..Artifacts::new(folder.path()) };
        let artifacts = open();
        let document = |n: usize| format!("\"{n:018}\"");
        let put = |artifacts: &Artifacts, n| artifacts.put(document(n).as_bytes()).unwrap();
        let first = put(&artifacts, 0);
        // Somebody else writes there: nobody looks.
        fs::write(artifacts.folder.join("other.json"), vec![b' '; 1_000]).unwrap();
        for n in 1..5 {
            put(&artifacts, n);
        }
        assert!(artifacts.get(&first).is_ok());
        fs::remove_file(artifacts.folder.join("other.json")).unwrap();
        // One that was removed by hand makes room as well as another.
        fs::remove_file(artifacts.file(&first)).unwrap();
        let last: Vec<Digest> = (5..8).map(|n| put(&artifacts, n)).collect();
        assert!(last.iter().all(|digest| artifacts.get(digest).is_ok()));
        let found = ArtifactFiles::in_folder(&artifacts.folder).unwrap();
        let kept = artifacts.kept.lock();
        let kept = kept.as_ref().unwrap();
        assert_eq!((kept.bytes, kept.files.len()), (found.bytes, found.files.len()));
        assert_eq!(kept.bytes, 100);
        // The next process counts them once too.
        let next = open();
        put(&next, 8);
        assert_eq!(next.kept.lock().as_ref().unwrap().files.len(), 5);
    }
}
