//! Looking at the directory: at change events, and at an interval.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use owned_tasks::Loops;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::folder::{Change, Folder, Seen, Stamp};
use crate::handoff::{EngineHosts, Fault, MAX_HANDOFF_BYTES, parse, pool_named, unknown_fields};
use crate::process;

/// Changes waiting for the receiver; beyond, looking pauses until it has caught up.
const CHANGES: usize = 256;
/// Most files that are looked at.
const MAX_FILES: usize = 1024;
/// Most names of handoff files that are told apart at one look.
const MAX_NAMES: usize = 64 * 1024;
/// An empty file that is so young is being written: a file of another program's becomes whole in two steps.
const EMPTY_UNTIL: Duration = Duration::from_secs(1);

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
        let usable = std::fs::create_dir_all(dir).and_then(|()| std::fs::read_dir(dir));
        match usable {
            Ok(_) => Ok(Self { dir: dir.to_owned(), hosts, interval }),
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
        let looker = SharedLooker(Arc::new(Mutex::new(Looker::new(dir, hosts))));
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

    /// Where the directory is now, and its number there; nothing where it cannot be found.
    async fn resolved(&self) -> Option<(PathBuf, u64)> {
        let dir = self.0.lock().unwrap_or_else(PoisonError::into_inner).dir.clone();
        let resolve = move || {
            let dir = dir.canonicalize().ok()?;
            let inode = std::fs::metadata(&dir).ok()?.ino();
            Some((dir, inode))
        };
        owned_tasks::blocking("runtime directory", resolve).await.ok()?
    }
}

async fn run(looker: SharedLooker, interval: Duration, send: mpsc::Sender<Change>, stop: CancellationToken) {
    let (wake, mut wakes) = mpsc::channel::<()>(1);
    let on_event = move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|event| !may_change(&event.kind)) {
            return;
        }
        // One waiting wake-up is enough: a look sees everything.
        let _ = wake.try_send(());
    };
    let mut events = Events { watcher: notify::recommended_watcher(on_event), watched: None };
    loop {
        if let Some((dir, inode)) = looker.resolved().await {
            events.follow(dir, inode);
        }
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

/// The events of the directory, wherever it is: what its path leads to may be exchanged.
#[derive(Debug)]
struct Events {
    watcher: notify::Result<RecommendedWatcher>,
    /// With its number: one that was made anew under its path has no events yet.
    watched: Option<(PathBuf, u64)>,
}

impl Events {
    fn follow(&mut self, dir: PathBuf, inode: u64) {
        if self.watched.as_ref() == Some(&(dir.clone(), inode)) {
            return;
        }
        let followed = match &mut self.watcher {
            Ok(watcher) => {
                if let Some((before, _)) = &self.watched {
                    // One that is gone is not watched any more.
                    let _ = watcher.unwatch(before);
                }
                watcher.watch(&dir, RecursiveMode::NonRecursive).map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = followed {
            tracing::warn!(error, dir = %dir.display(), "no change events: looking at the interval only");
        }
        self.watched = Some((dir, inode));
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
    /// Files whose process lives and seems younger than they are: its id and its port.
    contradicted: BTreeMap<String, (u32, u16)>,
    /// Files that were not looked at last.
    beyond: usize,
}

impl Looker {
    fn new(dir: PathBuf, hosts: EngineHosts) -> Self {
        let (started, contradicted) = (BTreeMap::new(), BTreeMap::new());
        Self { dir, hosts, folder: Folder::default(), started, contradicted, beyond: 0 }
    }
}

impl Looker {
    fn look(&mut self) -> Vec<Change> {
        // What the path leads to is looked at anew: a link of it may have been exchanged.
        let listed = self.dir.canonicalize().and_then(|dir| Ok((std::fs::read_dir(&dir)?, dir)));
        let (entries, dir) = match listed {
            Ok(listed) => listed,
            Err(error) => {
                // A passing trouble of the file system says nothing about the engines.
                tracing::warn!(%error, dir = %self.dir.display(), "the runtime directory cannot be read");
                return Vec::new();
            }
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let handoffs = names.filter(|file| !file.starts_with('.') && file.ends_with(".json"));
        let mut files: Vec<String> = handoffs.take(MAX_NAMES).collect();
        // Those that are bound stay so, however many others come.
        files.sort_by_cached_key(|file| (!self.folder.is_bound(file), file.clone()));
        let (mut present, mut changed) = (BTreeSet::new(), Vec::new());
        let beyond = files.len().saturating_sub(MAX_FILES);
        if let Some(first) = files.get(MAX_FILES) {
            let stamp = Stamp::NONE;
            present.insert(first.clone());
            if !self.folder.knows(first, &stamp) {
                let content = Err(Fault::TooMany);
                changed.push(Seen { file: first.clone(), stamp, content, pool_id: None });
            }
        }
        if self.beyond != beyond {
            tracing::warn!(dir = %self.dir.display(), beyond, "handoff files that are not looked at: there are more than {MAX_FILES}");
            self.beyond = beyond;
        }
        for file in files.drain(..).take(MAX_FILES) {
            let Some(seen) = self.see(&dir, &file) else { continue };
            if let Some(seen) = seen {
                changed.push(seen);
            }
            present.insert(file);
        }
        for seen in &changed {
            self.started.remove(&seen.file);
            self.contradicted.remove(&seen.file);
        }
        self.contradicted.retain(|file, _| present.contains(file));
        self.count_once(&mut changed, &present);
        let mut changes = self.folder.look(changed, &|file| present.contains(file));
        changes.extend(self.look_at_processes());
        changes
    }

    /// Nothing when the file is gone; `Some(None)` when it is known already, or is being written.
    fn see(&self, dir: &Path, file: &str) -> Option<Option<Seen>> {
        let path = dir.join(file);
        let link = std::fs::symlink_metadata(&path).ok()?;
        let real = path.canonicalize().ok();
        // Links may lead to places below the directory, as those of a ConfigMap do.
        let inside = real.as_ref().is_some_and(|real| real.starts_with(dir));
        let meta = std::fs::metadata(&path).unwrap_or(link);
        let stamp = Stamp {
            modified: meta.modified().ok(),
            len: meta.len(),
            inode: meta.ino(),
            status_changed: (meta.ctime(), meta.ctime_nsec()),
        };
        let is_young = || stamp.modified.is_some_and(|at| at.elapsed().is_ok_and(|age| age < EMPTY_UNTIL));
        if self.folder.knows(file, &stamp) || (inside && meta.is_file() && meta.len() == 0 && is_young()) {
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
                    let parsed = parse(stem, &bytes, &self.hosts);
                    if parsed.is_ok() && !self.folder.was_read(file, &stamp) {
                        for field in unknown_fields(&bytes) {
                            tracing::warn!(file, "a handoff has a field that is none: {field}");
                        }
                    }
                    parsed
                }
                Err(error) => Err(Fault::Unreadable(error.to_string())),
            }
        };
        Some(Some(Seen { file: file.to_owned(), stamp, content, pool_id }))
    }

    /// Of several files of one engine the one counts that was there first, else the first by its name.
    fn count_once(&self, changed: &mut [Seen], present: &BTreeSet<String>) {
        let stays = |file: &str| present.contains(file) && !changed.iter().any(|seen| seen.file == file);
        let bound = self.folder.bound().filter(|(file, _, _)| stays(file));
        let mut engines: BTreeMap<String, String> =
            bound.map(|(file, _, handoff)| (handoff.address(), file.to_owned())).collect();
        for seen in changed {
            let Ok(handoff) = &seen.content else { continue };
            // One that was left over is nobody's, and is said to be.
            let is_left_over = |pid: u32| matches!(process::start_ticks(pid), Ok(None));
            if handoff.pid.is_some_and(is_left_over) {
                continue;
            }
            match engines.entry(handoff.address()) {
                Entry::Occupied(other) => seen.content = Err(Fault::SameEngine(other.get().clone())),
                Entry::Vacant(place) => drop(place.insert(seen.file.clone())),
            }
        }
    }

    fn look_at_processes(&mut self) -> Vec<Change> {
        // Whose time spoke against them, and which serve where their file says: clocks jump, and differ.
        let serves = |(_, (pid, port)): &(&String, &(u32, u16))| process::listens(*pid, *port);
        for (file, _) in self.contradicted.iter().filter(serves) {
            self.folder.read_again(file);
        }
        let mut gone = Vec::new();
        for (file, stamp, handoff) in self.folder.bound() {
            let Some(pid) = handoff.pid else { continue };
            let Ok(ticks) = process::start_ticks(pid) else { continue };
            let same = match (ticks, self.started.get(file)) {
                (None, _) => false,
                (Some(ticks), Some(first)) => ticks == *first,
                (Some(ticks), None) => {
                    let is_older = || stamp.modified.is_none_or(|file| process::is_older_than(ticks, file));
                    let own = is_older() || process::listens(pid, handoff.port());
                    if own {
                        self.started.insert(file.to_owned(), ticks);
                    } else {
                        self.contradicted.insert(file.to_owned(), (pid, handoff.port()));
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
        looker(folder.path()).look();
        // A change comes after all events of the look.
        std::fs::write(folder.path().join("last"), "").unwrap();
        let mut seen = Vec::new();
        while !seen.iter().any(may_change) {
            seen.push(events.recv_timeout(PATIENCE).unwrap());
        }
        assert!(seen.len() > 1, "the look was an event: {seen:?}");
    }

    fn looker(dir: &Path) -> Looker {
        Looker::new(dir.to_owned(), EngineHosts::default())
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
                fault: Fault::LinkedOut(dir.path().to_owned()),
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

    fn bound(changes: &[Change]) -> Vec<&str> {
        let is_bound = |change: &&Change| matches!(change, Change::Bound { .. });
        changes.iter().filter(is_bound).map(Change::file).collect()
    }

    // CLOUD-2011
    #[test]
    fn a_directory_that_is_exchanged_behind_its_path_and_links_below_it_are_followed() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let (old, new, link) =
            (folder.path().join("old"), folder.path().join("new"), folder.path().join("link"));
        for (dir, port) in [(&old, 1), (&new, 2)] {
            std::fs::create_dir_all(dir.join("..2026")).unwrap();
            std::fs::write(dir.join("..2026/p-r0.json"), content(port, "")).unwrap();
            symlink("..2026", dir.join("..data")).unwrap();
            symlink("..data/p-r0.json", dir.join("p-r0.json")).unwrap();
        }
        symlink(&old, &link).unwrap();
        let mut looker = looker(&link);
        let urls = |changes: Vec<Change>| -> Vec<String> {
            let url = |change| match change {
                Change::Bound { handoff, .. } => Some(handoff.url),
                _ => None,
            };
            changes.into_iter().filter_map(url).collect()
        };
        assert_eq!(urls(looker.look()), ["http://127.0.0.1:1"]);
        std::fs::remove_file(&link).unwrap();
        symlink(&new, &link).unwrap();
        assert_eq!(urls(looker.look()), ["http://127.0.0.1:2"]);
        // As a ConfigMap is changed.
        std::fs::create_dir(new.join("..2027")).unwrap();
        std::fs::write(new.join("..2027/p-r0.json"), content(3, "")).unwrap();
        symlink("..2027", new.join("..next")).unwrap();
        std::fs::rename(new.join("..next"), new.join("..data")).unwrap();
        assert_eq!(urls(looker.look()), ["http://127.0.0.1:3"]);
    }

    // CLOUD-2011
    #[tokio::test]
    async fn an_exchanged_directory_has_its_events_followed_too() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new, link) =
            (folder.path().join("old"), folder.path().join("new"), folder.path().join("link"));
        for dir in [&old, &new] {
            std::fs::create_dir(dir).unwrap();
        }
        std::os::unix::fs::symlink(&old, &link).unwrap();
        let (mut changes, stop) = start(&link);
        std::fs::write(old.join("p-r0.json"), content(1, "")).unwrap();
        assert!(matches!(next(&mut changes).await, Change::Bound { .. }));
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(&new, &link).unwrap();
        assert!(matches!(next(&mut changes).await, Change::Unbound { .. }));
        std::fs::write(new.join("p-r0.json"), content(2, "")).unwrap();
        assert!(matches!(next(&mut changes).await, Change::Bound { .. }));
        stop.cancel();
    }

    // CLOUD-2012
    #[test]
    fn however_many_other_files_there_are_what_is_bound_stays_and_what_is_not_looked_at_is_said() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..3_000 {
            std::fs::write(dir.path().join(format!("other-{n}.log")), "").unwrap();
        }
        std::fs::write(dir.path().join("p-r0.json"), content(1, "")).unwrap();
        let mut looker = looker(dir.path());
        assert_eq!(bound(&looker.look()), ["p-r0.json"]);
        for n in 0..MAX_FILES {
            std::fs::write(dir.path().join(format!("a{n:04}-r0.json")), "{}").unwrap();
        }
        let changes = looker.look();
        let is_unbound = |change: &Change| matches!(change, Change::Unbound { .. });
        assert!(bound(&changes).is_empty() && !changes.iter().any(is_unbound), "it stays");
        let too_many = Change::Faulty { file: "a1023-r0.json".into(), fault: Fault::TooMany, pool_id: None };
        assert!(changes.contains(&too_many), "{:?}", changes.last());
        assert!(looker.look().is_empty(), "it is said once");
        std::fs::remove_file(dir.path().join("a0000-r0.json")).unwrap();
        let changes = looker.look();
        let read = |change: &Change| matches!(change, Change::Faulty { file, fault: Fault::Malformed(_), .. } if file == "a1023-r0.json");
        assert!(changes.iter().any(read), "there is room for it: {changes:?}");
    }

    // CLOUD-2003
    #[test]
    fn an_empty_file_is_being_written_for_a_second() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p-r0.json");
        std::fs::write(&file, "").unwrap();
        let mut looker = looker(dir.path());
        assert!(looker.look().is_empty());
        let old = std::time::SystemTime::now() - EMPTY_UNTIL;
        std::fs::File::options().write(true).open(&file).unwrap().set_modified(old).unwrap();
        assert!(matches!(&looker.look()[..], [Change::Faulty { fault: Fault::Malformed(_), .. }]));
        std::fs::write(&file, content(1, "")).unwrap();
        assert_eq!(bound(&looker.look()), ["p-r0.json"]);
    }

    // CLOUD-2687
    #[test]
    fn an_engine_that_two_files_have_counts_once_and_for_the_other_when_the_first_goes() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, url: &str| {
            let (pool, replica) = name.split_once('-').unwrap();
            let text =
                format!(r#"{{"pool_id":"{pool}","replica_id":"{replica}","engine":"vllm","url":"{url}"}}"#);
            std::fs::write(dir.path().join(format!("{name}.json")), text).unwrap();
        };
        write("p-r0", "http://127.0.0.1:1");
        write("p-r1", "http://localhost:1/");
        let mut looker = looker(dir.path());
        let changes = looker.look();
        assert_eq!(bound(&changes), ["p-r0.json"]);
        let same = Fault::SameEngine("p-r0.json".into());
        assert!(changes.iter().any(|change| matches!(change, Change::Faulty { file, fault, .. } if file == "p-r1.json" && *fault == same)));
        assert!(looker.look().is_empty(), "it is said once");
        // One that sorts before it does not take its place.
        write("a-r0", "http://127.0.0.1:1");
        assert!(bound(&looker.look()).is_empty());
        std::fs::remove_file(dir.path().join("p-r0.json")).unwrap();
        assert_eq!(bound(&looker.look()), ["a-r0.json"]);
        write("a-r0", "http://127.0.0.1:2");
        assert_eq!(bound(&looker.look()), ["a-r0.json", "p-r1.json"]);
    }

    // CLOUD-2688
    #[test]
    fn a_living_process_is_believed_against_the_clocks_where_its_engine_listens() {
        let dir = tempfile::tempdir().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let file = dir.path().join("p-r0.json");
        let write = || {
            std::fs::write(&file, content(port, &format!(r#","pid":{}"#, std::process::id()))).unwrap();
            // A file server's clock, or this machine's before it was set.
            let old = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
            std::fs::File::options().write(true).open(&file).unwrap().set_modified(old).unwrap();
        };
        write();
        let mut first = looker(dir.path());
        let changes = first.look();
        assert!(matches!(&changes[..], [Change::Bound { .. }]), "{changes:?}");
        // Where nothing listens yet the clocks count, until something does.
        drop(listener);
        let mut second = looker(dir.path());
        let changes = second.look();
        assert!(
            matches!(changes.last(), Some(Change::Faulty { fault: Fault::ProcessGone(_), .. })),
            "{changes:?}"
        );
        assert!(second.look().is_empty());
        let _listener = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
        let changes = [second.look(), second.look()].concat();
        assert!(matches!(&changes[..], [Change::Bound { .. }]), "{changes:?}");
        assert!(second.look().is_empty());
    }
}
