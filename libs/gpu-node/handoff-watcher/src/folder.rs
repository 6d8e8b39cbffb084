//! Two looks at the directory become a list of changes.

use std::collections::BTreeMap;
use std::time::SystemTime;

use pool_registry_types::PoolId;

use crate::handoff::{Fault, Handoff};

/// What tells one version of a file from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    pub modified: Option<SystemTime>,
    pub len: u64,
    pub inode: u64,
    /// When its content, owner or mode last changed: seconds and nanoseconds.
    pub status_changed: (i64, i64),
}

impl Stamp {
    /// Of a file that was not looked at.
    pub(crate) const NONE: Self = Self { modified: None, len: 0, inode: 0, status_changed: (0, 0) };
}

/// One file at one look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The file's name with its ending.
    pub file: String,
    pub stamp: Stamp,
    pub content: Result<Handoff, Fault>,
    /// The pool that it names, where that much of it can be read.
    pub pool_id: Option<PoolId>,
}

/// What happened to a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A valid file is new, has become valid, or says something else now.
    Bound { file: String, handoff: Handoff },
    /// A file that was valid is gone, has become faulty, or its process is gone.
    Unbound { file: String, handoff: Handoff },
    /// A file binds nothing, and why; with the pool that it would have an engine for, where it names one.
    Faulty { file: String, fault: Fault, pool_id: Option<PoolId> },
    /// A faulty file is gone.
    Cleared { file: String },
}

impl Change {
    /// The file's name with its ending.
    pub fn file(&self) -> &str {
        match self {
            Self::Bound { file, .. }
            | Self::Unbound { file, .. }
            | Self::Faulty { file, .. }
            | Self::Cleared { file } => file,
        }
    }
}

#[derive(Debug)]
struct Entry {
    stamp: Stamp,
    content: Result<Handoff, Fault>,
}

/// The directory as it was at the last look.
#[derive(Debug, Default)]
pub struct Folder {
    entries: BTreeMap<String, Entry>,
}

impl Folder {
    /// Whether the content of this version is known already, so that it need not be read.
    pub fn knows(&self, file: &str, stamp: &Stamp) -> bool {
        self.entries.get(file).is_some_and(|entry| {
            // What could not be read may be readable now, and the other file of an engine may be gone.
            let is_passing = matches!(entry.content, Err(Fault::Unreadable(_) | Fault::SameEngine(_)));
            entry.stamp == *stamp && !is_passing
        })
    }

    /// Whether this version was read before, whatever came of it.
    pub(crate) fn was_read(&self, file: &str, stamp: &Stamp) -> bool {
        self.entries.get(file).is_some_and(|entry| entry.stamp == *stamp)
    }

    pub(crate) fn is_bound(&self, file: &str) -> bool {
        self.entries.get(file).is_some_and(|entry| entry.content.is_ok())
    }

    /// The valid files, with their stamps.
    pub fn bound(&self) -> impl Iterator<Item = (&str, &Stamp, &Handoff)> {
        self.entries
            .iter()
            .filter_map(|(file, entry)| Some((file.as_str(), &entry.stamp, entry.content.as_ref().ok()?)))
    }

    /// Faulty files and what is wrong with them.
    pub fn faults(&self) -> impl Iterator<Item = (&str, &Fault)> {
        self.entries.iter().filter_map(|(file, entry)| Some((file.as_str(), entry.content.as_ref().err()?)))
    }

    /// Takes a look in: `changed` are the new versions, `present` the names of all files.
    pub fn look(&mut self, changed: Vec<Seen>, present: &dyn Fn(&str) -> bool) -> Vec<Change> {
        let mut changes = Vec::new();
        let gone: Vec<String> = self.entries.keys().filter(|file| !present(file)).cloned().collect();
        for file in gone {
            match self.entries.remove(&file).map(|entry| entry.content) {
                Some(Ok(handoff)) => changes.push(Change::Unbound { file, handoff }),
                Some(Err(_)) => changes.push(Change::Cleared { file }),
                None => {}
            }
        }
        for seen in changed {
            self.replace(seen, &mut changes);
        }
        changes
    }

    /// The file is read again at the next look.
    pub(crate) fn read_again(&mut self, file: &str) {
        if let Some(entry) = self.entries.get_mut(file) {
            entry.stamp = Stamp::NONE;
        }
    }

    /// The process of a bound file is gone.
    pub(crate) fn process_gone(&mut self, file: &str, pid: u32) -> Vec<Change> {
        let mut changes = Vec::new();
        if let Some(entry) = self.entries.get(file) {
            let pool_id = entry.content.as_ref().ok().map(|handoff| handoff.pool_id.clone());
            let content = Err(Fault::ProcessGone(pid));
            let seen = Seen { file: file.to_owned(), stamp: entry.stamp, content, pool_id };
            self.replace(seen, &mut changes);
        }
        changes
    }

    fn replace(&mut self, seen: Seen, changes: &mut Vec<Change>) {
        let Seen { file, stamp, content, pool_id } = seen;
        let before = self.entries.insert(file.clone(), Entry { stamp, content: content.clone() });
        let before = before.map(|entry| entry.content);
        if before.as_ref() == Some(&content) {
            return;
        }
        match (before, content) {
            (Some(Ok(old)), Err(fault)) => {
                changes.push(Change::Unbound { file: file.clone(), handoff: old });
                changes.push(Change::Faulty { file, fault, pool_id });
            }
            (_, Err(fault)) => changes.push(Change::Faulty { file, fault, pool_id }),
            (_, Ok(handoff)) => changes.push(Change::Bound { file, handoff }),
        }
    }
}

#[cfg(test)]
mod tests {
    use pool_registry_types::pool::EngineKind;
    use pool_registry_types::{PoolId, ReplicaId};

    use super::*;

    fn handoff(port: u16) -> Handoff {
        Handoff {
            pool_id: PoolId::new("pool-0").unwrap(),
            replica_id: ReplicaId::new("r0").unwrap(),
            engine: EngineKind::LlamaCpp,
            engine_version: None,
            url: format!("http://127.0.0.1:{port}"),
            device_mask: None,
            slots: None,
            pid: Some(7),
            model_ref: None,
            models: vec![],
            ctx_max: None,
            api_key_file: None,
        }
    }

    fn seen(len: u64, content: Result<Handoff, Fault>) -> Seen {
        Seen {
            file: "pool-0-r0.json".into(),
            stamp: Stamp { modified: None, len, inode: 1, status_changed: (0, 0) },
            content,
            pool_id: None,
        }
    }

    fn names(changes: &[Change]) -> Vec<&'static str> {
        changes
            .iter()
            .map(|change| match change {
                Change::Bound { .. } => "bound",
                Change::Unbound { .. } => "unbound",
                Change::Faulty { .. } => "faulty",
                Change::Cleared { .. } => "cleared",
            })
            .collect()
    }

    // CLOUD-2003
    #[test]
    fn a_half_written_file_is_reported_and_bound_when_it_is_whole() {
        let mut folder = Folder::default();
        let half = seen(1, Err(Fault::Malformed("cut".into())));
        assert_eq!(names(&folder.look(vec![half], &|_| true)), ["faulty"]);
        assert_eq!(names(&folder.look(vec![seen(2, Ok(handoff(1)))], &|_| true)), ["bound"]);
    }

    // CLOUD-2004
    #[test]
    fn a_rewritten_file_is_bound_anew_and_a_removed_one_unbound() {
        let mut folder = Folder::default();
        folder.look(vec![seen(1, Ok(handoff(1)))], &|_| true);
        assert_eq!(names(&folder.look(vec![seen(2, Ok(handoff(1)))], &|_| true)), [""; 0], "the same words");
        assert_eq!(names(&folder.look(vec![seen(3, Ok(handoff(2)))], &|_| true)), ["bound"]);
        assert_eq!(names(&folder.look(vec![], &|_| false)), ["unbound"]);
    }

    // CLOUD-2005
    #[test]
    fn a_dead_process_unbinds_until_the_file_is_rewritten() {
        let mut folder = Folder::default();
        folder.look(vec![seen(1, Ok(handoff(1)))], &|_| true);
        assert_eq!(names(&folder.process_gone("pool-0-r0.json", 7)), ["unbound", "faulty"]);
        assert!(
            folder
                .knows("pool-0-r0.json", &Stamp { modified: None, len: 1, inode: 1, status_changed: (0, 0) })
        );
        assert_eq!(names(&folder.look(vec![seen(2, Ok(handoff(1)))], &|_| true)), ["bound"]);
    }

    // CLOUD-2009
    #[test]
    fn a_faulty_file_that_goes_is_cleared() {
        let mut folder = Folder::default();
        folder.look(vec![seen(1, Err(Fault::TooLarge))], &|_| true);
        assert_eq!(folder.faults().count(), 1);
        assert_eq!(names(&folder.look(vec![], &|_| false)), ["cleared"]);
    }
}
