//! Looking at the directory: at change events, and at an interval.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecursiveMode, Watcher};
use owned_tasks::Loops;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::folder::{Change, Folder, Seen, Stamp};
use crate::handoff::{EngineHosts, Fault, MAX_HANDOFF_BYTES, parse, pool_named};
use crate::process;

/// Changes waiting for the receiver; beyond, looking pauses until it has caught up.
const CHANGES: usize = 256;
/// Most files that are looked at.
const MAX_FILES: usize = 1024;

/// Watches one directory.
#[derive(Debug)]
pub struct HandoffWatcher {
    dir: PathBuf,
    hosts: EngineHosts,
    interval: Duration,
}

/// The directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the runtime directory {dir} cannot be made or read")]
pub struct WatchError {
    pub dir: PathBuf,
    #[source]
    pub source: std::io::Error,
}

impl HandoffWatcher {
    /// Makes the directory if it is not there.
    pub fn new(dir: &Path, hosts: EngineHosts, interval: Duration) -> Result<Self, WatchError> {
        let usable = std::fs::create_dir_all(dir)
            .and_then(|()| std::fs::read_dir(dir))
            .and_then(|_| dir.canonicalize());
        match usable {
            Ok(canonical) => Ok(Self { dir: canonical, hosts, interval }),
            Err(source) => Err(WatchError { dir: dir.to_owned(), source }),
        }
    }

    /// The changes of the directory, those of the files present at the start first. One of `loops`;
    /// ends with `stop`, and then so does the handle.
    pub fn start(
        self,
        loops: &Loops,
        stop: CancellationToken,
    ) -> (mpsc::Receiver<Change>, tokio::task::JoinHandle<()>) {
        let (send, receive) = mpsc::channel(CHANGES);
        let Self { dir, hosts, interval } = self;
        let looker = Looker { dir, hosts, folder: Folder::default(), started: BTreeMap::new() };
        let looker = SharedLooker(Arc::new(Mutex::new(looker)));
        let ended = stop.clone();
        let make = move || run(looker.clone(), interval, send.clone(), ended.clone());
        (receive, loops.start(&TaskTracker::new(), "handoff watcher", &stop, make))
    }
}

/// What was seen last outlives a panic: what changes meanwhile is a change at the next look.
#[derive(Debug, Clone)]
struct SharedLooker(Arc<Mutex<Looker>>);

impl SharedLooker {
    async fn look(&self) -> Vec<Change> {
        let looker = Arc::clone(&self.0);
        let look = move || looker.lock().unwrap_or_else(PoisonError::into_inner).look();
        let looked = owned_tasks::blocking("runtime directory", look).await;
        looked.unwrap_or_else(|panicked| panicked.resume())
    }

    fn dir(&self) -> PathBuf {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).dir.clone()
    }
}

async fn run(looker: SharedLooker, interval: Duration, send: mpsc::Sender<Change>, stop: CancellationToken) {
    let dir = looker.dir();
    let (wake, mut wakes) = mpsc::channel::<()>(1);
    let on_event = move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|event| !may_change(&event.kind)) {
            return;
        }
        // One waiting wake-up is enough: a look sees everything.
        let _ = wake.try_send(());
    };
    let watcher = notify::recommended_watcher(on_event).and_then(|mut watcher| {
        watcher.watch(&dir, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    if let Err(error) = &watcher {
        tracing::warn!(%error, dir = %dir.display(), "no change events: looking at the interval only");
    }
    loop {
        for change in looker.look().await {
            if send.send(change).await.is_err() {
                return;
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(interval) => {}
            Some(()) = wakes.recv() => {}
        }
    }
}

/// Whether the event may be of a change. A look opens the directory and its files, which is an
/// event too: it must not cause the next look.
fn may_change(kind: &EventKind) -> bool {
    !matches!(kind, EventKind::Access(access) if *access != AccessKind::Close(AccessMode::Write))
}

/// The part that touches the disk.
#[derive(Debug)]
struct Looker {
    dir: PathBuf,
    hosts: EngineHosts,
    folder: Folder,
    /// When the process of a bound file was seen to have started.
    started: BTreeMap<String, u64>,
}

impl Looker {
    fn look(&mut self) -> Vec<Change> {
        let (mut present, mut changed) = (BTreeSet::new(), Vec::new());
        match std::fs::read_dir(&self.dir) {
            Ok(entries) => {
                for entry in entries.flatten().take(MAX_FILES) {
                    let Ok(file) = entry.file_name().into_string() else { continue };
                    if file.starts_with('.') || !file.ends_with(".json") {
                        continue;
                    }
                    let Some(seen) = self.see(&file) else { continue };
                    if let Some(seen) = seen {
                        changed.push(seen);
                    }
                    present.insert(file);
                }
            }
            Err(error) => {
                // A passing trouble of the file system says nothing about the engines.
                tracing::warn!(%error, dir = %self.dir.display(), "the runtime directory cannot be read");
                return Vec::new();
            }
        }
        for seen in &changed {
            self.started.remove(&seen.file);
        }
        let mut changes = self.folder.look(changed, &|file| present.contains(file));
        changes.extend(self.look_at_processes());
        changes
    }

    /// Nothing when the file is gone; `Some(None)` when it is known already.
    fn see(&self, file: &str) -> Option<Option<Seen>> {
        let path = self.dir.join(file);
        let link = std::fs::symlink_metadata(&path).ok()?;
        let real = path.canonicalize().ok();
        let inside = real.as_ref().is_some_and(|real| real.parent() == Some(self.dir.as_path()));
        let meta = std::fs::metadata(&path).unwrap_or(link);
        let stamp = Stamp {
            modified: meta.modified().ok(),
            len: meta.len(),
            inode: meta.ino(),
            status_changed: (meta.ctime(), meta.ctime_nsec()),
        };
        if self.folder.knows(file, &stamp) {
            return Some(None);
        }
        let mut pool_id = None;
        let content = if !inside || !meta.is_file() {
            Err(Fault::LinkedOut(self.dir.clone()))
        } else if meta.len() > MAX_HANDOFF_BYTES {
            Err(Fault::TooLarge)
        } else {
            match std::fs::read(&path) {
                Ok(bytes) => {
                    let stem = file.trim_end_matches(".json");
                    pool_id = pool_named(stem, &bytes);
                    parse(stem, &bytes, &self.hosts)
                }
                Err(error) => Err(Fault::Unreadable(error.to_string())),
            }
        };
        Some(Some(Seen { file: file.to_owned(), stamp, content, pool_id }))
    }

    fn look_at_processes(&mut self) -> Vec<Change> {
        let mut gone = Vec::new();
        for (file, stamp, handoff) in self.folder.bound() {
            let Some(pid) = handoff.pid else { continue };
            let Ok(ticks) = process::start_ticks(pid) else { continue };
            let same = match (ticks, self.started.get(file)) {
                (None, _) => false,
                (Some(ticks), Some(first)) => ticks == *first,
                (Some(ticks), None) => {
                    let own = stamp.modified.is_none_or(|file| process::is_older_than(ticks, file));
                    if own {
                        self.started.insert(file.to_owned(), ticks);
                    }
                    own
                }
            };
            if !same {
                gone.push((file.to_owned(), pid));
            }
        }
        gone.into_iter().flat_map(|(file, pid)| self.folder.process_gone(&file, pid)).collect()
    }
}

#[cfg(test)]
mod tests {
    use pool_registry_types::PoolId;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    // CLOUD-2010
    #[test]
    fn a_look_does_not_cause_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("p-r0.json"), "{}").unwrap();
        let (send, events) = std::sync::mpsc::channel();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // The test may be over.
            let _ = send.send(event.unwrap().kind);
        })
        .unwrap();
        watcher.watch(folder.path(), RecursiveMode::NonRecursive).unwrap();
        let started = BTreeMap::new();
        let dir = folder.path().canonicalize().unwrap();
        let mut looker = Looker { dir, hosts: EngineHosts::default(), folder: Folder::default(), started };
        looker.look();
        // A change comes after all events of the look.
        std::fs::write(folder.path().join("last"), "").unwrap();
        let mut seen = Vec::new();
        while !seen.iter().any(may_change) {
            seen.push(events.recv_timeout(PATIENCE).unwrap());
        }
        assert!(seen.len() > 1, "the look was an event: {seen:?}");
    }

    fn content(port: u16, more: &str) -> String {
        format!(
            r#"{{"pool_id":"p","replica_id":"r0","engine":"openai","url":"http://127.0.0.1:{port}"{more}}}"#
        )
    }

    async fn next(changes: &mut mpsc::Receiver<Change>) -> Change {
        tokio::time::timeout(PATIENCE, changes.recv())
            .await
            .expect("a change in time")
            .expect("a living watcher")
    }

    fn start(dir: &Path) -> (mpsc::Receiver<Change>, CancellationToken) {
        let stop = CancellationToken::new();
        let watcher = HandoffWatcher::new(dir, EngineHosts::default(), Duration::from_millis(50)).unwrap();
        (watcher.start(&Loops::default(), stop.clone()).0, stop)
    }

    // CLOUD-2006
    #[tokio::test]
    async fn files_are_seen_at_the_start_when_renamed_in_rewritten_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p-r0.json");
        std::fs::write(&file, content(1, "")).unwrap();
        let (mut changes, stop) = start(dir.path());
        assert!(
            matches!(next(&mut changes).await, Change::Bound { handoff, .. } if handoff.url.ends_with(":1"))
        );
        let temporary = dir.path().join(".p-r0.tmp");
        std::fs::write(&temporary, content(2, "")).unwrap();
        std::fs::rename(&temporary, &file).unwrap();
        assert!(
            matches!(next(&mut changes).await, Change::Bound { handoff, .. } if handoff.url.ends_with(":2"))
        );
        std::fs::remove_file(&file).unwrap();
        assert!(matches!(next(&mut changes).await, Change::Unbound { .. }));
        stop.cancel();
    }

    // CLOUD-2005
    #[tokio::test]
    async fn a_replica_whose_process_ends_is_unbound() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = tokio::process::Command::new("sleep").arg("60").kill_on_drop(true).spawn().unwrap();
        let pid = child.id().unwrap();
        std::fs::write(dir.path().join("p-r0.json"), content(1, &format!(r#","pid":{pid}"#))).unwrap();
        let (mut changes, stop) = start(dir.path());
        assert!(matches!(next(&mut changes).await, Change::Bound { .. }));
        child.kill().await.unwrap();
        assert!(matches!(next(&mut changes).await, Change::Unbound { .. }));
        assert_eq!(
            next(&mut changes).await,
            Change::Faulty {
                file: "p-r0.json".into(),
                fault: Fault::ProcessGone(pid),
                pool_id: PoolId::new("p").ok()
            }
        );
        stop.cancel();
    }

    // CLOUD-2002
    #[tokio::test]
    async fn a_link_out_of_the_directory_and_an_oversized_file_bind_nothing() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let outside = other.path().join("p-r0.json");
        std::fs::write(&outside, content(1, "")).unwrap();
        std::os::unix::fs::symlink(&outside, dir.path().join("p-r0.json")).unwrap();
        let (mut changes, stop) = start(dir.path());
        assert_eq!(
            next(&mut changes).await,
            Change::Faulty {
                file: "p-r0.json".into(),
                fault: Fault::LinkedOut(dir.path().canonicalize().unwrap()),
                pool_id: None
            }
        );
        std::fs::write(dir.path().join("q-r0.json"), vec![b' '; 70_000]).unwrap();
        assert_eq!(
            next(&mut changes).await,
            Change::Faulty { file: "q-r0.json".into(), fault: Fault::TooLarge, pool_id: None }
        );
        stop.cancel();
    }
}
