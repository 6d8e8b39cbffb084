//! Which handoffs hold now: those of files, and those of engines of this node's own.

use std::collections::BTreeMap;

use handoff_watcher::{Handoff, HandoffName};

/// The handoffs that hold now. One of our own goes before a file of its name.
#[derive(Debug, Default)]
pub(super) struct Announced {
    pub(super) files: BTreeMap<HandoffName, Handoff>,
    own: BTreeMap<HandoffName, Handoff>,
    /// Our own that were withdrawn before their files were seen: a look at the directory that began
    /// before may still tell of them.
    withdrawn: BTreeMap<HandoffName, Handoff>,
}

impl Announced {
    /// A file says this. Returns whether it counts.
    pub(super) fn seen(&mut self, handoff: &Handoff) -> bool {
        let name = handoff.name();
        if self.withdrawn.get(&name) == Some(handoff) {
            return false;
        }
        self.withdrawn.remove(&name);
        self.files.insert(name.clone(), handoff.clone());
        !self.own.contains_key(&name)
    }

    /// The file is gone. Returns whether that counts.
    pub(super) fn gone(&mut self, name: &HandoffName) -> bool {
        self.withdrawn.remove(name);
        self.files.remove(name);
        !self.own.contains_key(name)
    }

    pub(super) fn announce(&mut self, handoff: Handoff) {
        self.withdrawn.remove(&handoff.name());
        self.own.insert(handoff.name(), handoff);
    }

    pub(super) fn withdraw(&mut self, name: &HandoffName) {
        let own = self.own.remove(name);
        // Without a process id a file of the same words may be somebody else's.
        let unseen = own.filter(|own| own.pid.is_some() && self.files.get(name) != Some(own));
        self.withdrawn.extend(unseen.map(|own| (name.clone(), own)));
    }
}
