//! Those who follow what changes in the cluster: each is given what it may see, and told how much of
//! that it has missed.
//!
//! All read one channel, in which a slow reader loses the oldest changes, whosever they are. So each
//! change has a number among those of its kind: the cluster's, which all may see, and those of one
//! holder's tasks. Who sees its own only counts the gaps in those two, and so learns nothing of how
//! much others do.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use pool_registry_types::HolderId;
use pool_registry_types::view::ClusterChange;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};

/// Changes that a follower may lag behind before it misses some.
const CHANGES: usize = 4096;

/// What changes in the cluster; of a task with whose it is.
pub(crate) type Change = (Option<HolderId>, ClusterChange);

/// A change with its number among those of its kind, the first one being 1.
type Numbered = (u64, Change);

/// What changes, for those who follow. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Changes(Arc<Mutex<Published>>);

#[derive(Debug)]
struct Published {
    sender: broadcast::Sender<Numbered>,
    /// Of each kind, as long as somebody follows.
    counts: HashMap<Option<HolderId>, u64>,
}

impl Published {
    fn count(&self, kind: Option<HolderId>) -> u64 {
        self.counts.get(&kind).copied().unwrap_or(0)
    }
}

impl Default for Changes {
    fn default() -> Self {
        Self::of(CHANGES)
    }
}

impl Changes {
    fn of(most: usize) -> Self {
        let (sender, _) = broadcast::channel(most);
        Self(Arc::new(Mutex::new(Published { sender, counts: HashMap::new() })))
    }

    pub(crate) fn publish(&self, change: Change) {
        let mut published = self.0.lock();
        if published.sender.receiver_count() == 0 {
            published.counts.clear();
            return;
        }
        let count = published.counts.entry(change.0).or_default();
        *count += 1;
        let number = *count;
        // Without followers nobody is told.
        let _ = published.sender.send((number, change));
    }

    /// Everything from now on, or of tasks this holder's only.
    pub(crate) fn follow(&self, only: Option<HolderId>) -> Follower {
        let published = self.0.lock();
        let receiver = published.sender.subscribe();
        let kinds = [None, only].map(|kind| published.count(kind));
        drop(published);
        let next = VecDeque::new();
        Follower { changes: self.clone(), receiver, only, kinds, has_lagged: false, next }
    }
}

/// What a follower is told.
#[derive(Debug, Clone)]
pub(crate) enum Update {
    Change(ClusterChange),
    /// So many that it may see were lost.
    Missed(u64),
}

/// One who follows.
#[derive(Debug)]
pub(crate) struct Follower {
    changes: Changes,
    receiver: broadcast::Receiver<Numbered>,
    /// Whose tasks it may see; absent: those of all.
    only: Option<HolderId>,
    /// Numbers of the last changes of the cluster and of the holder that it was told of, or has missed.
    kinds: [u64; 2],
    /// Some were lost, of which it is not known whether they were for it.
    has_lagged: bool,
    /// What it is told next.
    next: VecDeque<Update>,
}

impl Follower {
    /// What comes next; nothing where no more will. Dropped before, it has taken nothing.
    pub(crate) async fn next(&mut self) -> Option<Update> {
        loop {
            if let Some(update) = self.next.pop_front() {
                return Some(update);
            }
            if self.has_lagged {
                self.catch_up();
                continue;
            }
            match self.receiver.recv().await {
                Ok(change) => self.take(change),
                Err(RecvError::Lagged(missed)) => self.lagged(missed),
                Err(RecvError::Closed) => return None,
            }
        }
    }

    fn lagged(&mut self, missed: u64) {
        match self.only {
            None => self.next.push_back(Update::Missed(missed)),
            Some(_) => self.has_lagged = true,
        }
    }

    fn take(&mut self, (number, (of, change)): Numbered) {
        let kind = match (of, self.only) {
            (_, None) => return self.next.push_back(Update::Change(change)),
            (None, _) => 0,
            (Some(of), Some(only)) if of == only => 1,
            _ => return,
        };
        self.reached(kind, number - 1);
        self.kinds[kind] = number;
        self.next.push_back(Update::Change(change));
    }

    /// All of the kind up to this number have been, whether or not it was told.
    fn reached(&mut self, kind: usize, number: u64) {
        let missed = number.saturating_sub(self.kinds[kind]);
        self.kinds[kind] = number;
        if missed > 0 {
            self.next.push_back(Update::Missed(missed));
        }
    }

    /// Takes the next change that is there; where there is none, everything that is counted has been.
    fn catch_up(&mut self) {
        let changes = self.changes.clone();
        // Nothing is published meanwhile.
        let published = changes.0.lock();
        match self.receiver.try_recv() {
            Ok(change) => self.take(change),
            Err(TryRecvError::Lagged(_)) => {}
            Err(TryRecvError::Empty | TryRecvError::Closed) => {
                self.has_lagged = false;
                self.reached(0, published.count(None));
                self.reached(1, published.count(self.only));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use pool_registry_types::NodeId;
    use uuid::Uuid;

    use super::*;

    fn holder(n: u128) -> HolderId {
        HolderId(Uuid::from_u128(n))
    }

    fn publish(changes: &Changes, of: Option<HolderId>, times: usize) {
        for _ in 0..times {
            let node_id = NodeId::new("n").unwrap();
            changes.publish((of, ClusterChange::Node { node_id, liveness: None, intent: None }));
        }
    }

    /// What a follower is told now: changes as 0, what it has missed as how many.
    fn updates(follower: &mut Follower) -> Vec<u64> {
        let next = || follower.next().now_or_never().flatten();
        std::iter::from_fn(next)
            .map(|update| match update {
                Update::Change(_) => 0,
                Update::Missed(missed) => missed,
            })
            .collect()
    }

    // CLOUD-2764
    #[test]
    fn a_client_that_reads_slowly_is_told_of_what_it_may_see_and_not_how_much_others_do() {
        let changes = Changes::of(4);
        publish(&changes, None, 3);
        let (mut client, mut all) = (changes.follow(Some(holder(1))), changes.follow(None));
        // Another one's flood, of which nothing was for the client.
        publish(&changes, Some(holder(2)), 100);
        assert_eq!(updates(&mut client), Vec::<u64>::new());
        assert_eq!(updates(&mut all), [96, 0, 0, 0, 0]);
        // Three of its own were lost in the next one, and one of the cluster's; one of its own is there.
        publish(&changes, Some(holder(1)), 3);
        publish(&changes, None, 1);
        publish(&changes, Some(holder(2)), 100);
        publish(&changes, Some(holder(1)), 1);
        assert_eq!(updates(&mut client), [3, 0, 1]);
        // As many as were lost, also where nothing of its own comes behind them.
        publish(&changes, Some(holder(1)), 2);
        publish(&changes, Some(holder(2)), 4);
        assert_eq!(updates(&mut client), [2]);
        publish(&changes, Some(holder(1)), 1);
        publish(&changes, None, 1);
        assert_eq!(updates(&mut client), [0, 0]);
        // Whose changes were counted is forgotten with the last who follows.
        drop((client, all));
        publish(&changes, Some(holder(1)), 1);
        assert!(changes.0.lock().counts.is_empty());
    }
}
