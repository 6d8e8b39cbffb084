//! Who holds a slot: the node's report and our own books, as one set.
//!
//! A report carries a number. The node says at an attempt's acceptance, and again at its end,
//! which report came last before it. So a report says nothing about attempts accepted or
//! ended after it, and only a later one can show an attempt *vanished* (we think it runs, the
//! node does not) or an *orphan* (the node runs it, we do not know it).

use std::collections::{BTreeMap, BTreeSet};

use pool_registry_types::pool::{PoolReport, ReplicaReport};
use pool_registry_types::{AttemptId, Lookup, Moment, NodeId, PoolKey};

use crate::breaker::Breaker;

/// The control plane's claim on a slot.
#[derive(Debug, Clone)]
pub(crate) struct Reservation {
    pub(crate) pool: PoolKey,
    /// The last report before the node accepted; absent until it has.
    pub(crate) accepted_after: Option<u64>,
}

/// All claims, by node and attempt. A claim may outlive its node.
#[derive(Debug, Default)]
pub(crate) struct Reservations {
    by_node: Lookup<NodeId, BTreeMap<AttemptId, Reservation>>,
    node_of: Lookup<AttemptId, NodeId>,
}

impl Reservations {
    /// Panics where the attempt has a claim already.
    pub(crate) fn insert(&mut self, attempt: AttemptId, pool: &PoolKey) {
        let before = self.node_of.insert(attempt, pool.node_id.clone());
        assert!(before.is_none(), "attempt {attempt} reserved twice");
        let reservation = Reservation { pool: pool.clone(), accepted_after: None };
        self.by_node.get_or_insert_with(pool.node_id.clone(), BTreeMap::new).insert(attempt, reservation);
    }

    pub(crate) fn remove(&mut self, attempt: &AttemptId) -> Option<Reservation> {
        let node_id = self.node_of.remove(attempt)?;
        let of_node = self.by_node.get_mut(&node_id)?;
        let reservation = of_node.remove(attempt);
        if of_node.is_empty() {
            self.by_node.remove(&node_id);
        }
        reservation
    }

    pub(crate) fn contains(&self, attempt: &AttemptId) -> bool {
        self.node_of.contains_key(attempt)
    }

    pub(crate) fn get_mut(&mut self, attempt: &AttemptId) -> Option<&mut Reservation> {
        self.by_node.get_mut(self.node_of.get(attempt)?)?.get_mut(attempt)
    }

    /// Those of a node, whether or not it is known.
    pub(crate) fn of_node(&self, node_id: &NodeId) -> Option<&BTreeMap<AttemptId, Reservation>> {
        self.by_node.get(node_id)
    }

    pub(crate) fn len(&self) -> usize {
        self.node_of.len()
    }
}

/// One pool as reported, and the slots that are taken in it.
#[derive(Debug, Clone)]
pub(crate) struct PoolBook {
    pub(crate) report: PoolReport,
    /// The number of that report.
    pub(crate) named_in: u64,
    pub(crate) reserved: BTreeSet<AttemptId>,
    /// Attempts of the last report that have not ended since.
    pub(crate) reported: BTreeSet<AttemptId>,
    /// Refused a dispatch: counts as full until the next report or this moment.
    pub(crate) held_until: Option<Moment>,
    /// For what its engine answers.
    pub(crate) breaker: Breaker,
}

impl PoolBook {
    /// Slots of the replicas that take requests.
    pub(crate) fn slots_total(&self) -> u32 {
        self.of_ready(|replica| replica.slots_total)
    }

    /// Sums over the ready replicas; a node may say any number.
    fn of_ready(&self, of: fn(&ReplicaReport) -> u32) -> u32 {
        self.report.replicas.iter().filter(|replica| replica.ready).map(of).fold(0, u32::saturating_add)
    }

    /// A report that names the pool once more: its replicas and attempts are this pool's too.
    pub(crate) fn join(&mut self, again: PoolReport, reported: BTreeSet<AttemptId>) {
        self.reported.extend(reported);
        for model in again.models {
            if !self.report.models.contains(&model) {
                self.report.models.push(model);
            }
        }
        for replica in again.replicas {
            match self.report.replicas.iter_mut().find(|known| known.replica_id == replica.replica_id) {
                None => self.report.replicas.push(replica),
                Some(known) => known.attempts.extend(replica.attempts),
            }
        }
    }

    fn slots_foreign(&self) -> u32 {
        self.of_ready(|replica| replica.slots_foreign)
    }

    /// |reported ∪ reserved| + foreign, without the attempts that run at replicas which take no
    /// requests: these have no slots either.
    pub(crate) fn slots_busy(&self, count_reservations: bool) -> u32 {
        let gone: BTreeSet<&AttemptId> =
            self.report.replicas.iter().filter(|replica| !replica.ready).flat_map(|r| &r.attempts).collect();
        let takes_a_slot = |attempt: &&AttemptId| !gone.contains(attempt);
        let ours = if count_reservations {
            self.reserved.union(&self.reported).filter(takes_a_slot).count()
        } else {
            self.reported.iter().filter(takes_a_slot).count()
        };
        u32::try_from(ours).unwrap_or(u32::MAX).saturating_add(self.slots_foreign())
    }
}

/// Attempts that ended with a final report number, and that number.
#[derive(Debug, Clone, Default)]
pub(crate) struct ClosedAttempts(BTreeMap<AttemptId, u64>);

impl ClosedAttempts {
    pub(crate) fn insert(&mut self, attempt: AttemptId, final_report: u64) {
        self.0.insert(attempt, final_report);
    }

    /// Whether a report of this number may still list the attempt although it has ended.
    pub(crate) fn explains(&self, attempt: &AttemptId, seq: u64) -> bool {
        self.0.get(attempt).is_some_and(|final_report| seq <= *final_report)
    }

    /// Forgets what no later report can list any more.
    pub(crate) fn forget_before(&mut self, seq: u64) {
        self.0.retain(|_, final_report| seq <= *final_report);
    }
}
