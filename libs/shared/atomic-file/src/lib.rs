//! Replaces a file so that a reader sees the old or the new one, whole, also after a crash.
//!
//! The bytes go to a file beside it, whose name starts with a dot so that who watches the folder
//! passes over it; that is flushed to the disk, renamed, and then the folder is flushed, since a name
//! is on the disk when its folder is. Everything here blocks on the disk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Who may read and write is the process's umask's to say.
pub const BY_UMASK: u32 = 0o666;
/// Read by everybody, written by the owner.
pub const PUBLIC: u32 = 0o644;
/// For secrets: the owner alone.
pub const OWNER_ONLY: u32 = 0o600;

/// What could not be written, and why.
#[derive(Debug, thiserror::Error)]
#[error("{}: {cause}", path.display())]
pub struct WriteError {
    pub path: PathBuf,
    pub cause: io::Error,
}

impl From<WriteError> for io::Error {
    fn from(error: WriteError) -> Self {
        Self::new(error.cause.kind(), error)
    }
}

/// Replaces `path`, or makes it, its folder included; it is on the disk when this returns. `mode` is
/// the new file's, less what the umask takes. Where two replace a file at once, one of them wins whole.
///
/// # Errors
/// What was there is still there; but for the last flush, after which either may be there.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), WriteError> {
    swap(path, bytes, mode, true)?;
    flush_folder(folder_of(path))
}

fn swap(path: &Path, bytes: &[u8], mode: u32, flushed: bool) -> Result<(), WriteError> {
    let failed = |cause| WriteError { path: path.to_owned(), cause };
    fs::create_dir_all(folder_of(path)).map_err(failed)?;
    let draft = draft_of(path);
    let written = write(&draft, bytes, mode, flushed).and_then(|()| fs::rename(&draft, path));
    if let Err(cause) = written {
        // Why it failed is what matters.
        let _ = fs::remove_file(&draft);
        return Err(failed(cause));
    }
    Ok(())
}

/// The same for what nobody needs after a crash: nothing is flushed, so that no slow disk is waited for.
///
/// # Errors
/// What was there is still there.
pub fn replace_in_memory(path: &Path, bytes: &[u8], mode: u32) -> Result<(), WriteError> {
    swap(path, bytes, mode, false)
}

/// Removes `path`, where it is; on the disk when this returns.
///
/// # Errors
/// It may still be there.
pub fn remove(path: &Path) -> Result<(), WriteError> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            return Err(WriteError { path: path.to_owned(), cause });
        }
        // What is not there may be so for a moment only: an earlier flush may have failed.
        _ => {}
    }
    match flush_folder(folder_of(path)) {
        Err(error) if error.cause.kind() == io::ErrorKind::NotFound => Ok(()),
        flushed => flushed,
    }
}

/// Removes what writers that were killed have left in the folder, which no reader sees. To be called before
/// anybody writes there: a write that is under way would fail. What cannot be removed is left.
pub fn remove_drafts(folder: &Path) {
    // A folder that is not there has none.
    let Ok(entries) = fs::read_dir(folder) else { return };
    let drafts = entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(is_draft));
    for draft in drafts {
        // It takes room, and harms nobody.
        let _ = fs::remove_file(draft.path());
    }
}

/// Whether [`draft_of`] makes such names.
fn is_draft(name: &str) -> bool {
    let numbers = name.strip_prefix('.').and_then(|name| name.strip_suffix(".tmp")?.rsplit_once('.'));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    numbers
        .and_then(|(_, numbers)| numbers.split_once('-'))
        .is_some_and(|(a, b)| is_number(a) && is_number(b))
}

/// Puts on the disk which names are in the folder.
///
/// # Errors
/// The system's; the names are as they were made, and may be lost in a crash.
pub fn flush_folder(folder: &Path) -> Result<(), WriteError> {
    let flushed = File::open(folder).and_then(|folder| match folder.sync_all() {
        // A file system that cannot do it for a folder: its names are as safe as they get there.
        Err(cause) if matches!(cause.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {
            Ok(())
        }
        flushed => flushed,
    });
    flushed.map_err(|cause| WriteError { path: folder.to_owned(), cause })
}

fn folder_of(path: &Path) -> &Path {
    // The parent of a bare name is the empty path, which cannot be opened.
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// No two writers share one, neither in a process nor of two.
fn draft_of(path: &Path) -> PathBuf {
    static DRAFTS: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let n = DRAFTS.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".{name}.{}-{n}.tmp", std::process::id()))
}

fn write(draft: &Path, bytes: &[u8], mode: u32, flushed: bool) -> io::Result<()> {
    // One that a killed process of the same number has left may be open to others: it is not reused.
    match fs::remove_file(draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(draft)?;
    file.write_all(bytes)?;
    if flushed { file.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    // CLOUD-1947
    #[test]
    fn what_a_killed_writer_has_left_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.json");
        replace(&file, b"whole", BY_UMASK).unwrap();
        for _ in 0..2 {
            fs::write(draft_of(&file), b"hal").unwrap();
        }
        let others = [".a.json", ".a.json.tmp", ".a.7.tmp", ".a.-7.tmp", "a.json.1-2.tmp", ".a.x-2.tmp"];
        others.iter().for_each(|name| fs::write(dir.path().join(name), b"").unwrap());
        remove_drafts(dir.path());
        let mut left = names(dir.path());
        left.sort();
        let mut expected: Vec<&str> = others.iter().copied().chain(["a.json"]).collect();
        expected.sort_unstable();
        assert_eq!(left, expected);
        remove_drafts(&dir.path().join("none"));
    }

    #[test]
    fn a_file_is_made_with_its_folder_and_replaced_whole_with_nothing_left_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/entries.json");
        replace(&path, b"a longer text", OWNER_ONLY).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, OWNER_ONLY);
        replace(&path, b"short", OWNER_ONLY).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"short");
        assert_eq!(names(path.parent().unwrap()), ["entries.json"]);
    }

    #[test]
    fn a_reader_who_has_the_old_file_open_reads_it_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        replace(&path, b"old", BY_UMASK).unwrap();
        let reader = File::open(&path).unwrap();
        replace(&path, b"new", BY_UMASK).unwrap();
        assert_eq!(io::read_to_string(reader).unwrap(), "old");
    }

    #[test]
    fn many_writers_at_once_leave_one_whole_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let texts: Vec<String> = (0..8).map(|n| n.to_string().repeat(100_000)).collect();
        std::thread::scope(|scope| {
            for text in &texts {
                scope.spawn(|| replace(&path, text.as_bytes(), BY_UMASK).unwrap());
            }
        });
        assert!(texts.contains(&fs::read_to_string(&path).unwrap()));
        assert_eq!(names(dir.path()), ["f"]);
    }

    #[test]
    fn what_cannot_be_written_is_named_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("taken");
        fs::create_dir_all(path.join("by-a-folder")).unwrap();
        let error = replace(&path, b"x", BY_UMASK).unwrap_err();
        assert!(error.to_string().starts_with(&format!("{}: ", path.display())), "{error}");
        assert_eq!(names(dir.path()), ["taken"]);
        let error = remove(&path).unwrap_err();
        assert_eq!(error.path, path);
    }

    #[test]
    fn removing_what_is_not_there_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        replace(&path, b"x", PUBLIC).unwrap();
        remove(&path).unwrap();
        remove(&path).unwrap();
        remove(&dir.path().join("nowhere/f")).unwrap();
        assert_eq!(names(dir.path()), [""; 0]);
    }
}
