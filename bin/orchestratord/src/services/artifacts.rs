//! Artifacts: JSON documents by the SHA-256 of their bytes, as files.
//!
//! The bytes are kept as they came, once for all holders who have put them; who they are stands in a
//! file beside them. A document that is there already is not written again; when all together take too
//! much room, the ones that were written first go, for all their holders: of whoever writes, where that one
//! has half of the room, and else of all. What several holders have put is no single one's. How much they
//! take is counted once, at the first writing, and kept in memory from then on.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use parking_lot::Mutex;
use pool_registry_types::{Digest, ErrorBody, ErrorCode, HolderId};
use sha2::{Digest as _, Sha256};

/// Room that all artifacts may take together, bytes.
const MAX_BYTES: u64 = 1024 * 1024 * 1024;
/// Lists and objects within each other: more of them JSON readers refuse, ours among them.
const MAX_DEPTH: usize = 127;
/// What the file of a document's holders is called after its digest.
const HOLDERS: &str = "holders";
/// Most artifacts.
const MAX_FILES: usize = 10_000;

/// The folder of artifacts.
#[derive(Debug)]
pub(crate) struct Artifacts {
    folder: PathBuf,
    at_most: u64,
    files_at_most: usize,
    /// Held by the one that writes; absent before the first.
    kept: Mutex<Option<ArtifactFiles>>,
}

/// The files that there are.
#[derive(Debug, Default)]
struct ArtifactFiles {
    /// In the order in which they were written.
    files: VecDeque<ArtifactFile>,
    bytes: u64,
}

#[derive(Debug)]
struct ArtifactFile {
    path: PathBuf,
    bytes: u64,
    /// Whose it is, where it is one holder's.
    only: Option<HolderId>,
}

impl Artifacts {
    pub(crate) fn new(folder: &Path) -> Self {
        let folder = folder.join("artifacts");
        atomic_file::remove_drafts(&folder);
        Self { folder, at_most: MAX_BYTES, files_at_most: MAX_FILES, kept: Mutex::default() }
    }

    /// Keeps the document, as the holder's too. Blocks on the disk. Errors: `INVALID_PARAMS` for what is
    /// no JSON.
    pub(crate) fn put(&self, holder: HolderId, bytes: &[u8]) -> Result<Digest, ErrorBody> {
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
        self.keep(&mut kept, file, bytes, holder).map_err(|error| {
            tracing::error!(artifact = %digest, %error, "an artifact cannot be written");
            ErrorBody::new(ErrorCode::Internal, "the artifact cannot be written, see the server's log")
        })?;
        Ok(digest)
    }

    /// The holder's document; anybody's where none is given. Blocks on the disk. Errors: `NOT_FOUND`.
    pub(crate) fn get(&self, holder: Option<HolderId>, digest: &Digest) -> Result<Vec<u8>, ErrorBody> {
        let file = self.file(digest);
        let is_there = holder.is_none_or(|holder| holders(&file).contains(&holder));
        let bytes = is_there.then(|| fs::read(file).ok()).flatten();
        bytes.ok_or_else(|| ErrorBody::new(ErrorCode::NotFound, format!("no artifact {digest}")))
    }

    fn file(&self, digest: &Digest) -> PathBuf {
        // A digest holds nothing that could lead out of the folder.
        self.folder.join(format!("{}.json", digest.as_str().trim_start_matches("sha256:")))
    }

    fn keep(
        &self,
        kept: &mut Option<ArtifactFiles>,
        file: PathBuf,
        bytes: &[u8],
        holder: HolderId,
    ) -> io::Result<()> {
        let is_there = file.exists();
        let mut known = if is_there { holders(&file) } else { Vec::new() };
        if known.contains(&holder) {
            return Ok(());
        }
        known.push(holder);
        let lines: String = known.iter().map(|holder| format!("{holder}\n")).collect();
        let beside = file.with_extension(HOLDERS);
        if is_there {
            if let Some(kept) = kept
                && let Some(shared) = kept.files.iter_mut().find(|known| known.path == file)
            {
                shared.only = None;
            }
        } else {
            self.write(kept, file, bytes, holder)?;
        }
        Ok(atomic_file::replace(&beside, lines.as_bytes(), atomic_file::BY_UMASK)?)
    }

    fn write(
        &self,
        kept: &mut Option<ArtifactFiles>,
        file: PathBuf,
        bytes: &[u8],
        holder: HolderId,
    ) -> io::Result<()> {
        let kept = match kept {
            Some(kept) => kept,
            None => kept.insert(ArtifactFiles::in_folder(&self.folder)?),
        };
        let wanted = bytes.len() as u64;
        while kept.bytes + wanted > self.at_most || kept.files.len() >= self.files_at_most {
            let Some(place) = self.next_to_go(kept, holder, wanted) else { break };
            let path = &kept.files[place].path;
            for path in [&path.with_extension(HOLDERS), path] {
                match fs::remove_file(path) {
                    // Somebody else has removed it.
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            kept.bytes -= kept.files.remove(place).map_or(0, |gone| gone.bytes);
        }
        atomic_file::replace(&file, bytes, atomic_file::BY_UMASK)?;
        kept.files.push_back(ArtifactFile { path: file, bytes: wanted, only: Some(holder) });
        kept.bytes += wanted;
        Ok(())
    }

    /// The place of the file that goes for one more of so many bytes, which the holder writes.
    fn next_to_go(&self, kept: &ArtifactFiles, holder: HolderId, wanted: u64) -> Option<usize> {
        let own = || kept.files.iter().filter(|file| file.only == Some(holder));
        let has_half = own().map(|file| file.bytes).sum::<u64>() + wanted > self.at_most / 2
            || own().count() >= self.files_at_most / 2;
        let first_own = kept.files.iter().position(|file| file.only == Some(holder));
        first_own.filter(|_| has_half).or_else(|| (!kept.files.is_empty()).then_some(0))
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
            if entry.path().extension().is_some_and(|kind| kind == HOLDERS) {
                continue;
            }
            let about = entry.metadata()?;
            known.push((about.modified()?, about.len(), entry.path()));
        }
        known.sort();
        let bytes = known.iter().map(|(_, bytes, _)| *bytes).sum();
        let file = |(_, bytes, path): (_, u64, PathBuf)| {
            let holders = holders(&path);
            let only = holders.first().copied().filter(|_| holders.len() == 1);
            ArtifactFile { path, bytes, only }
        };
        Ok(Self { files: known.into_iter().map(file).collect(), bytes })
    }
}

/// Whose the document is. One from before there were holders is nobody's.
fn holders(file: &Path) -> Vec<HolderId> {
    let lines = fs::read_to_string(file.with_extension(HOLDERS)).unwrap_or_default();
    lines.lines().filter_map(|line| line.parse().ok()).collect()
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
    use uuid::Uuid;

    use super::*;

    const ONE: HolderId = HolderId(Uuid::from_u128(1));
    const TWO: HolderId = HolderId(Uuid::from_u128(2));

    // CLOUD-2706
    #[test]
    fn an_artifact_is_one_file_and_there_for_those_who_have_put_it_only() {
        let folder = tempfile::tempdir().unwrap();
        let document = br#"{"a": 1}"#;
        let (artifacts, another) = (Artifacts::new(folder.path()), Artifacts::new(folder.path()));
        let digest = artifacts.put(ONE, document).unwrap();
        let code = |of: &Artifacts, holder| Artifacts::get(of, holder, &digest).err().map(|error| error.code);
        assert_eq!(
            [Some(ONE), Some(TWO), None].map(|h| code(&artifacts, h)),
            [None, Some(ErrorCode::NotFound), None]
        );
        let unknown = Digest::new(&format!("sha256:{}", "0".repeat(64))).unwrap();
        let (hidden, absent) = (artifacts.get(Some(TWO), &digest), artifacts.get(Some(TWO), &unknown));
        let without =
            |error: ErrorBody| error.message.replace(digest.as_str(), "").replace(unknown.as_str(), "");
        assert_eq!(without(hidden.unwrap_err()), without(absent.unwrap_err()), "nothing tells them apart");
        assert_eq!(artifacts.put(TWO, document), Ok(digest.clone()));
        // After a restart too.
        assert_eq!([Some(ONE), Some(TWO)].map(|holder| code(&another, holder)), [None, None]);
        let files = || fs::read_dir(folder.path().join("artifacts")).unwrap().count();
        assert_eq!(files(), 2, "the document, and its holders");
        // From before there were holders: put again, it is whoever's puts it.
        fs::remove_file(another.file(&digest).with_extension(HOLDERS)).unwrap();
        assert_eq!([Some(ONE), None].map(|h| code(&another, h)), [Some(ErrorCode::NotFound), None]);
        another.put(ONE, document).unwrap();
        assert_eq!(code(&another, Some(ONE)), None);
        // Who has made room leaves nothing behind.
        let small = Artifacts { at_most: 9, ..Artifacts::new(folder.path()) };
        small.put(TWO, b"[2]").unwrap();
        assert_eq!((files(), code(&small, Some(ONE))), (2, Some(ErrorCode::NotFound)));
    }

    // CLOUD-2769
    #[test]
    fn whoever_puts_very_many_makes_room_by_its_own_first_and_leaves_others_theirs() {
        let folder = tempfile::tempdir().unwrap();
        let artifacts = Artifacts { at_most: 1_000, files_at_most: 8, ..Artifacts::new(folder.path()) };
        let document = |name: &str, n: usize| format!("[\"{name}\",{n}]").into_bytes();
        let put = |of, name, n| artifacts.put(of, &document(name, n)).unwrap();
        let shared = put(ONE, "shared", 0);
        let own = [put(ONE, "own", 0), put(ONE, "own", 1)];
        put(TWO, "shared", 0);
        // By their number, and by their bytes.
        for n in 0..100 {
            put(TWO, "another", n);
        }
        for n in 0..100 {
            artifacts.put(TWO, format!("[\"{}\",{n}]", "x".repeat(190)).as_bytes()).unwrap();
        }
        let is_there = |of, digest: &Digest| artifacts.get(Some(of), digest).is_ok();
        assert!(own.iter().chain([&shared]).all(|digest| is_there(ONE, digest)));
        assert!(is_there(TWO, &shared), "it is no single one's");
        // As after a restart.
        let again = Artifacts { at_most: 1_000, files_at_most: 8, ..Artifacts::new(folder.path()) };
        for n in 0..100 {
            again.put(TWO, &document("more", n)).unwrap();
        }
        assert!(own.iter().chain([&shared]).all(|digest| again.get(Some(ONE), digest).is_ok()));
        let count = fs::read_dir(folder.path().join("artifacts")).unwrap().count();
        assert!(count <= 2 * 8, "{count}");
    }

    // CLOUD-1623
    // CLOUD-1108
    #[test]
    fn an_artifact_is_read_by_its_digest_and_the_first_ones_make_room() {
        let folder = tempfile::tempdir().unwrap();
        let artifacts = Artifacts { at_most: 30, ..Artifacts::new(folder.path()) };
        let digest = artifacts.put(ONE, br#"{"a": 1}"#).unwrap();
        assert_eq!(
            digest.as_str(),
            "sha256:f9d86028c6e0d64e225186f96acb69338b2c59764df79162107f5c4bb34d1310"
        );
        assert_eq!(artifacts.put(ONE, br#"{"a": 1}"#), Ok(digest.clone()), "the same bytes, the same name");
        assert_eq!(artifacts.get(Some(ONE), &digest).unwrap(), br#"{"a": 1}"#);
        assert_eq!(artifacts.put(ONE, b"{").unwrap_err().code, ErrorCode::InvalidParams);
        let nested = |depth: usize| "[".repeat(depth) + r#""]\"[""# + &"]".repeat(depth);
        assert_eq!(depth(nested(MAX_DEPTH).as_bytes()), MAX_DEPTH);
        let refused = artifacts.put(ONE, nested(MAX_DEPTH + 1).as_bytes()).unwrap_err();
        assert!(refused.message.contains("127"), "{refused}");
        let second = artifacts.put(ONE, br#"{"second": "ten"}"#).unwrap();
        artifacts.put(ONE, br#"{"third": "twelve"}"#).unwrap();
        assert_eq!(artifacts.get(Some(ONE), &digest).unwrap_err().code, ErrorCode::NotFound);
        assert_eq!(artifacts.get(Some(ONE), &second).unwrap_err().code, ErrorCode::NotFound);
    }

    // CLOUD-2758
    #[test]
    fn the_folder_is_walked_once_and_what_is_counted_is_what_a_walk_finds() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Artifacts { at_most: 100, ..Artifacts::new(folder.path()) };
        let artifacts = open();
        let document = |n: usize| format!("\"{n:018}\"");
        let put = |artifacts: &Artifacts, n| artifacts.put(ONE, document(n).as_bytes()).unwrap();
        let first = put(&artifacts, 0);
        // Somebody else writes there: nobody looks.
        fs::write(artifacts.folder.join("other.json"), vec![b' '; 1_000]).unwrap();
        for n in 1..5 {
            put(&artifacts, n);
        }
        assert!(artifacts.get(None, &first).is_ok());
        fs::remove_file(artifacts.folder.join("other.json")).unwrap();
        // One that was removed by hand makes room as well as another.
        fs::remove_file(artifacts.file(&first)).unwrap();
        let last: Vec<Digest> = (5..8).map(|n| put(&artifacts, n)).collect();
        assert!(last.iter().all(|digest| artifacts.get(None, digest).is_ok()));
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
