//! A lock between processes, also of several machines that share a folder.
//!
//! The system's own lock, which goes with its process. Some file servers have none: there it is a lease, a
//! file beside it with its holder's name, renewed while it is held and taken over by others once it is not.
//! How old a lease is is told by the server's clock alone: its time of change against that of a file written
//! now.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use nix::libc;
use owned_tasks::Loops;

/// How a lease is kept.
#[derive(Debug, Clone, Copy)]
struct Times {
    /// Between two renewals.
    renewed: Duration,
    /// After it a lease is nobody's.
    lapses: Duration,
    /// Between taking over a lapsed lease and being sure of it: another may have seen the same.
    confirmed: Duration,
}

const TIMES: Times = Times {
    renewed: Duration::from_secs(10),
    lapses: Duration::from_secs(60),
    confirmed: Duration::from_secs(1),
};

/// Held until it is dropped.
#[derive(Debug)]
pub(crate) struct SharedLock(Held);

#[derive(Debug)]
enum Held {
    /// It goes with the file's descriptor.
    Locked {
        _file: File,
    },
    Leased(Lease),
}

impl SharedLock {
    /// Takes the lock whose file is at `path`; nothing where another has it. Blocks on the disk, and for a
    /// second where a lease has lapsed. Errors: the disk's.
    pub(crate) fn take(path: &Path) -> io::Result<Option<Self>> {
        Self::take_by(path, File::try_lock, TIMES)
    }

    fn take_by(
        path: &Path,
        try_lock: fn(&File) -> Result<(), TryLockError>,
        times: Times,
    ) -> io::Result<Option<Self>> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        match try_lock(&file) {
            Ok(()) => Ok(Some(Self(Held::Locked { _file: file }))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) if has_no_locks(&error) => {
                let lease = Lease::take(&with_suffix(path, ".lease"), times)?;
                Ok(lease.map(|lease| Self(Held::Leased(lease))))
            }
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Whether it is still ours: a lease lapses when its holder was stopped for long.
    pub(crate) fn is_held(&self) -> bool {
        match &self.0 {
            Held::Locked { .. } => true,
            Held::Leased(lease) => lease.is_ours(),
        }
    }
}

/// Whether the file system knows no locks, or its server does not answer for them.
fn has_no_locks(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
        || matches!(error.raw_os_error(), Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// A file that its holder renews.
#[derive(Debug)]
struct Lease {
    path: PathBuf,
    holder: Arc<str>,
    lost: Arc<AtomicBool>,
    /// Its end ends the thread that renews it.
    _end: Sender<()>,
}

impl Lease {
    fn take(path: &Path, times: Times) -> io::Result<Option<Self>> {
        let holder: Arc<str> = format!("pid {} {}\n", std::process::id(), uuid::Uuid::new_v4()).into();
        // What is written now says what the server's clock is now.
        let own = with_suffix(path, &format!(".{}", uuid::Uuid::new_v4().simple()));
        fs::write(&own, holder.as_bytes())?;
        let taken = take_lease(path, &own, &holder, times);
        // It is the lease by now, or of no use.
        let _ = fs::remove_file(&own);
        if !taken? {
            return Ok(None);
        }
        let lost = Arc::new(AtomicBool::new(false));
        let (end, ended) = channel();
        let (of, by, says) = (path.to_owned(), Arc::clone(&holder), Arc::clone(&lost));
        let renew = move || {
            while matches!(ended.recv_timeout(times.renewed), Err(RecvTimeoutError::Timeout)) {
                match renew(&of, &by) {
                    Ok(true) => {}
                    Ok(false) => {
                        says.store(true, Ordering::Release);
                        return;
                    }
                    // It lapses if it cannot be renewed for long.
                    Err(error) => tracing::warn!(file = %of.display(), %error, "a lease was not renewed"),
                }
            }
        };
        Loops::default().thread("lease", renew)?;
        Ok(Some(Self { path: path.to_owned(), holder, lost, _end: end }))
    }

    fn is_ours(&self) -> bool {
        !self.lost.load(Ordering::Acquire) && is_of(&self.path, &self.holder)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if is_of(&self.path, &self.holder)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(file = %self.path.display(), %error, "a lease stays until it lapses");
        }
    }
}

/// Makes `own` the lease where there is none, or one that has lapsed.
fn take_lease(path: &Path, own: &Path, holder: &str, times: Times) -> io::Result<bool> {
    match fs::hard_link(own, path) {
        Ok(()) => return Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        // A server without links: the name is made only where it is not there.
        Err(_) => match OpenOptions::new().write(true).create_new(true).open(path) {
            Ok(mut file) => return file.write_all(holder.as_bytes()).map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        },
    }
    let changed = |path: &Path| fs::metadata(path).and_then(|about| about.modified());
    let renewed_at = match changed(path) {
        Ok(renewed_at) => renewed_at,
        // Given back just now: there is another try.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    // One from the future has a clock that was set back since: it lapses once that is reached.
    if changed(own)?.duration_since(renewed_at).unwrap_or_default() <= times.lapses {
        return Ok(false);
    }
    fs::rename(own, path)?;
    std::thread::sleep(times.confirmed);
    Ok(is_of(path, holder))
}

fn is_of(path: &Path, holder: &str) -> bool {
    fs::read_to_string(path).is_ok_and(|text| text == holder)
}

/// False where it is another's by now.
fn renew(path: &Path, holder: &str) -> io::Result<bool> {
    let mut file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    if text != holder {
        return Ok(false);
    }
    file.seek(SeekFrom::Start(0))?;
    file.write_all(holder.as_bytes())?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without_locks(_: &File) -> Result<(), TryLockError> {
        Err(TryLockError::Error(io::Error::from_raw_os_error(libc::ENOLCK)))
    }

    fn take(path: &Path, times: Times) -> Option<SharedLock> {
        SharedLock::take_by(path, without_locks, times).unwrap()
    }

    // CLOUD-2685
    #[test]
    fn where_there_are_no_locks_a_lease_is_held_by_one_and_goes_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".m.lock");
        let first = take(&path, TIMES).unwrap();
        assert!(first.is_held() && take(&path, TIMES).is_none());
        drop(first);
        let second = take(&path, TIMES).unwrap();
        drop(second);
        let names: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [".m.lock"], "nothing else is left");
    }

    // CLOUD-2685
    #[test]
    fn a_lease_that_is_not_renewed_is_taken_over_and_its_holder_notices() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".m.lock");
        let ms = Duration::from_millis;
        let stopped = Times { renewed: Duration::from_secs(3_600), lapses: ms(20), confirmed: ms(1) };
        let dead = take(&path, stopped).unwrap();
        std::thread::sleep(ms(100));
        let next = take(&path, stopped).expect("it has lapsed");
        assert!(next.is_held() && !dead.is_held());
        // Its end takes nothing from the next one.
        drop(dead);
        assert!(next.is_held());
        drop(next);
        let renewed = Times { renewed: ms(5), lapses: ms(400), confirmed: ms(1) };
        let living = take(&path, renewed).unwrap();
        for _ in 0..8 {
            std::thread::sleep(ms(100));
            assert!(take(&path, renewed).is_none(), "it is renewed");
        }
        assert!(living.is_held());
    }
}
