//! What a lane keeps beside its attempts, bounded and by age: stops that the node is to be told, and
//! tasks whose last start was never accepted. Nothing here passes over all that is kept.

use std::collections::{BTreeMap, BTreeSet};

use pool_registry_types::{AttemptId, Moment};

use super::posts::PostId;
use super::{MAX_STOPS, STOP_KEPT};

/// Ids and when they came; at most so many, the oldest go first.
#[derive(Debug)]
pub(super) struct Aged<K> {
    since: BTreeMap<K, Moment>,
    order: BTreeSet<(Moment, K)>,
    most: usize,
}

impl<K: Ord + Copy> Aged<K> {
    pub(super) fn new(most: usize) -> Self {
        Self { since: BTreeMap::new(), order: BTreeSet::new(), most }
    }

    pub(super) fn contains(&self, key: &K) -> bool {
        self.since.contains_key(key)
    }

    /// Returns the one that had to go for it.
    pub(super) fn insert(&mut self, now: Moment, key: K) -> Option<K> {
        self.remove(&key);
        let oldest = if self.since.len() >= self.most { self.pop_since(Moment::NEVER) } else { None };
        self.since.insert(key, now);
        self.order.insert((now, key));
        oldest
    }

    pub(super) fn remove(&mut self, key: &K) {
        if let Some(since) = self.since.remove(key) {
            self.order.remove(&(since, *key));
        }
    }

    /// Takes out the oldest one, if it came by then.
    pub(super) fn pop_since(&mut self, by: Moment) -> Option<K> {
        let (since, key) = self.order.first().copied().filter(|(since, _)| *since <= by)?;
        self.order.remove(&(since, key));
        self.since.remove(&key);
        Some(key)
    }

    pub(super) fn clear(&mut self) {
        self.since.clear();
        self.order.clear();
    }
}

/// Attempts that the node is to end, until a POST that says so was answered.
#[derive(Debug)]
pub(super) struct Stops {
    kept: Aged<AttemptId>,
    unsent: BTreeSet<AttemptId>,
    posted: BTreeMap<AttemptId, PostId>,
}

impl Stops {
    pub(super) fn new() -> Self {
        Self { kept: Aged::new(MAX_STOPS), unsent: BTreeSet::new(), posted: BTreeMap::new() }
    }

    pub(super) fn keep(&mut self, now: Moment, attempt: AttemptId) {
        if self.kept.contains(&attempt) {
            return;
        }
        if let Some(oldest) = self.kept.insert(now, attempt) {
            self.remove(&oldest);
        }
        self.unsent.insert(attempt);
    }

    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Those that go up now. What a node has ended by itself meanwhile is none of them.
    pub(super) fn post(&mut self, now: Moment, post: PostId, most: usize) -> Vec<AttemptId> {
        while let Some(attempt) = self.kept.pop_since(now.before(STOP_KEPT)) {
            self.remove(&attempt);
        }
        let mut stops = Vec::new();
        while stops.len() < most
            && let Some(attempt) = self.unsent.pop_first()
        {
            self.posted.insert(attempt, post);
            stops.push(attempt);
        }
        stops
    }

    /// The node was told.
    pub(super) fn remove(&mut self, attempt: &AttemptId) {
        self.kept.remove(attempt);
        self.unsent.remove(attempt);
        self.posted.remove(attempt);
    }

    /// Nobody knows whether it was: it goes up again.
    pub(super) fn again(&mut self, attempt: AttemptId, post: PostId) {
        if self.posted.get(&attempt) == Some(&post) {
            self.posted.remove(&attempt);
            self.unsent.insert(attempt);
        }
    }

    pub(super) fn clear(&mut self) {
        self.kept.clear();
        self.unsent.clear();
        self.posted.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_go_first_and_none_is_kept_beyond_the_bound() {
        let mut aged = Aged::new(2);
        let at = Moment::from_millis;
        assert_eq!((aged.insert(at(1), 1), aged.insert(at(2), 2)), (None, None));
        assert_eq!(aged.insert(at(3), 1), None, "it is younger now");
        assert_eq!(aged.insert(at(4), 3), Some(2));
        assert_eq!((aged.pop_since(at(2)), aged.pop_since(at(3))), (None, Some(1)));
        assert!(aged.contains(&3) && !aged.contains(&1) && !aged.contains(&2));
    }
}
