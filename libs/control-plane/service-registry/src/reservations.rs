//! Who holds a slot: the node's report and our own books, as one set.
//!
//! A report carries a number. The node says at an attempt's acceptance, and again at its end,
//! which report came last before it. So a report says nothing about attempts accepted or
//! ended after it, and only a later one can show an attempt *vanished* (we think it runs, the
//! node does not) or an *orphan* (the node runs it, we do not know it).

use std::collections::{BTreeMap, BTreeSet};

use pool_registry_types::pool::{PoolReport, ReplicaReport};
use pool_registry_types::{AttemptId, Moment, NodeId, PoolId, PoolKey};

use crate::breaker::Breaker;

/// The control plane's claim on a slot of a node's pool.
#[derive(Debug, Clone)]
pub(crate) struct Reservation {
    pub(crate) pool_id: PoolId,
    /// The last report before the node accepted; absent until it has.
    pub(crate) accepted_after: Option<u64>,
}

/// All claims on one node.
pub(crate) type Claims = BTreeMap<AttemptId, Reservation>;

/// How many claims there are of all, and those that have outlived their nodes: the others stand with
/// these.
#[derive(Debug, Default)]
pub(crate) struct Reservations {
    outliving: BTreeMap<NodeId, Claims>,
    pub(crate) all: usize,
}

impl Reservations {
    /// The node has gone.
    pub(crate) fn keep(&mut self, node_id: &NodeId, claims: Claims) {
        if !claims.is_empty() {
            self.outliving.insert(node_id.clone(), claims);
        }
    }

    /// The node has come.
    pub(crate) fn take(&mut self, node_id: &NodeId) -> Claims {
        self.outliving.remove(node_id).unwrap_or_default()
    }

    pub(crate) fn insert(&mut self, pool: &PoolKey, attempt: AttemptId, claim: Reservation) {
        self.outliving.entry(pool.node_id.clone()).or_default().insert(attempt, claim);
    }

    pub(crate) fn remove(&mut self, node_id: &NodeId, attempt: &AttemptId) -> Option<Reservation> {
        let of_node = self.outliving.get_mut(node_id)?;
        let claim = of_node.remove(attempt);
        if of_node.is_empty() {
            self.outliving.remove(node_id);
        }
        claim
    }

    pub(crate) fn get_mut(&mut self, node_id: &NodeId, attempt: &AttemptId) -> Option<&mut Reservation> {
        self.outliving.get_mut(node_id)?.get_mut(attempt)
    }

    pub(crate) fn of_node(&self, node_id: &NodeId) -> Option<&Claims> {
        self.outliving.get(node_id)
    }
}

/// One pool as reported, and the slots that are taken in it.
///
/// A pool's row is read with each event of its attempts: the report, which is large, stands apart, and
/// what such an event asks of it is here.
#[derive(Debug, Clone)]
pub(crate) struct PoolBook {
    report: Box<PoolReport>,
    brief: Brief,
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

/// What each event of a pool's attempts asks of its report.
#[derive(Debug, Clone)]
struct Brief {
    ready: bool,
    draining: bool,
    /// Of the replicas that take requests.
    slots_total: u32,
    slots_foreign: u32,
    /// Attempts at replicas that take no requests.
    gone: BTreeSet<AttemptId>,
}

impl Brief {
    fn of(report: &PoolReport) -> Self {
        // A node may say any number.
        let of_ready = |of: fn(&ReplicaReport) -> u32| {
            report.replicas.iter().filter(|replica| replica.ready).map(of).fold(0, u32::saturating_add)
        };
        let gone = report.replicas.iter().filter(|replica| !replica.ready).flat_map(|r| &r.attempts);
        Self {
            ready: report.ready,
            draining: report.draining,
            slots_total: of_ready(|replica| replica.slots_total),
            slots_foreign: of_ready(|replica| replica.slots_foreign),
            gone: gone.copied().collect(),
        }
    }
}

impl PoolBook {
    pub(crate) fn new(
        report: PoolReport,
        named_in: u64,
        reserved: BTreeSet<AttemptId>,
        reported: BTreeSet<AttemptId>,
    ) -> Self {
        Self {
            brief: Brief::of(&report),
            report: Box::new(report),
            named_in,
            reserved,
            reported,
            held_until: None,
            breaker: Breaker::default(),
        }
    }

    pub(crate) fn report(&self) -> &PoolReport {
        &self.report
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.brief.ready
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.brief.draining
    }

    /// The pool as the next report has it.
    pub(crate) fn renew(&mut self, report: PoolReport, named_in: u64, reported: BTreeSet<AttemptId>) {
        self.brief = Brief::of(&report);
        (*self.report, self.named_in, self.reported) = (report, named_in, reported);
        self.held_until = None;
    }

    /// Slots of the replicas that take requests.
    pub(crate) fn slots_total(&self) -> u32 {
        self.brief.slots_total
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
        self.brief = Brief::of(&self.report);
    }

    /// |reported ∪ reserved| + foreign, without the attempts that run at replicas which take no
    /// requests: these have no slots either.
    pub(crate) fn slots_busy(&self, count_reservations: bool) -> u32 {
        let takes_a_slot = |attempt: &&AttemptId| !self.brief.gone.contains(attempt);
        let ours = if !count_reservations {
            self.reported.iter().filter(takes_a_slot).count()
        } else if self.brief.gone.is_empty() {
            // Counted without merging the two: of what was reported most has ended soon after.
            let only_reported = self.reported.iter().filter(|attempt| !self.reserved.contains(attempt));
            self.reserved.len() + only_reported.count()
        } else {
            self.reserved.union(&self.reported).filter(takes_a_slot).count()
        };
        u32::try_from(ours).unwrap_or(u32::MAX).saturating_add(self.brief.slots_foreign)
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
