//! The registry: nodes by id, reservations by attempt.
//!
//! Verbs come in pairs with what the caller must do: attempts that a verb returns as ended or
//! vanished are still reserved until [`Registry::release`] is called for each of them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pool_registry_types::node::{Heartbeat, Intent, LiveAnswer, Liveness, RegisterRequest};
use pool_registry_types::pool::PoolReport;
use pool_registry_types::view::{ClusterView, NodeView, PoolView};
use pool_registry_types::{AttemptId, BootId, Epoch, ModelRef, Moment, NodeId, PoolId, PoolKey};

use crate::liveness::{Evidence, PROBE_EVERY, Suspicion, Timing, Transition};
use crate::reservations::{ClosedAttempts, PoolBook, Reservation};
use crate::rules::Rule;

/// How long an offline node stays visible.
const FORGET_OFFLINE_AFTER: Duration = Duration::from_secs(24 * 3600);
/// Most nodes that are known at a time. Source: .specs/01 CLOUD-1009.
pub const MAX_NODES: usize = 1024;

/// How a registry behaves.
#[derive(Debug, Clone)]
pub struct Settings {
    pub timing: Timing,
    /// Unique for each life of the control plane.
    pub incarnation: u64,
    /// For the simulator only.
    pub switched_off: Option<Rule>,
}

#[derive(Debug)]
struct Node {
    request: RegisterRequest,
    epoch: Epoch,
    intent: Intent,
    last_seq: Option<u64>,
    evidence: Evidence,
    pools: BTreeMap<PoolId, PoolBook>,
    gpus: Vec<pool_registry_types::node::GpuReport>,
    /// Attempts that hold a reservation on any pool of this node.
    reserved: BTreeSet<AttemptId>,
    closed: ClosedAttempts,
}

/// A registration was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeConflict {
    #[error("node_id {node_id} belongs to a live process at {address}")]
    IdTaken { node_id: NodeId, address: String },
    #[error("{MAX_NODES} nodes are known, which is the most")]
    TooMany,
}

/// The node, or the registration it speaks of, is not known: it must register again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unknown node or an old epoch")]
pub struct NodeNotKnown;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registered {
    pub epoch: Epoch,
    /// Attempts of an earlier boot: they are over.
    pub ended: Vec<AttemptId>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeartbeatOutcome {
    /// An old number: nothing was taken from it.
    Ignored,
    Taken {
        /// The node was suspect or offline before.
        returned: bool,
        /// We thought they ran; the node does not.
        vanished: Vec<AttemptId>,
        /// The node runs them; we do not know them.
        orphans: Vec<AttemptId>,
    },
}

/// What placement needs to know of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolFacts<'r> {
    pub report: &'r PoolReport,
    pub liveness: Liveness,
    pub intent: Intent,
    pub slots_total: u32,
    pub slots_busy: u32,
    pub held: bool,
}

/// All nodes and all reservations.
#[derive(Debug)]
pub struct Registry {
    settings: Settings,
    epochs_given: u64,
    nodes: BTreeMap<NodeId, Node>,
    reservations: BTreeMap<AttemptId, Reservation>,
    /// When a node last reported a pool that has or loads the model.
    models_reported: BTreeMap<ModelRef, Moment>,
    last_dial_failure: Option<Moment>,
    /// Pools whose hold ended by time since the last [`Registry::take_lifted_holds`].
    lifted_holds: Vec<PoolKey>,
    /// Nodes that were dropped since the last [`Registry::take_forgotten`].
    forgotten: Vec<NodeId>,
    /// Most nodes fell silent at once: nobody goes offline before one more timeout.
    mass_silence_since: Option<Moment>,
}

impl Registry {
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            epochs_given: 0,
            nodes: BTreeMap::new(),
            reservations: BTreeMap::new(),
            models_reported: BTreeMap::new(),
            last_dial_failure: None,
            lifted_holds: Vec::new(),
            forgotten: Vec::new(),
            mass_silence_since: None,
        }
    }

    fn enforces(&self, rule: Rule) -> bool {
        self.settings.switched_off != Some(rule)
    }

    // ---- membership ----

    /// Takes a node in. A live id with another boot is a restart when it comes from the same
    /// address, and a conflict otherwise. The node is suspect until its address was dialled.
    pub fn register(&mut self, now: Moment, request: RegisterRequest) -> Result<Registered, NodeConflict> {
        if !self.nodes.contains_key(&request.node_id) && self.nodes.len() >= MAX_NODES {
            self.forget_longest_offline().ok_or(NodeConflict::TooMany)?;
        }
        let known = self.nodes.get(&request.node_id);
        if let Some(node) = known
            && node.request.boot_id != request.boot_id
            && node.request.address != request.address
            && node.evidence.liveness() != Liveness::Offline
        {
            return Err(NodeConflict::IdTaken {
                node_id: request.node_id,
                address: node.request.address.clone(),
            });
        }
        let same_boot = known.is_some_and(|node| node.request.boot_id == request.boot_id);
        let node_id = request.node_id.clone();
        let epoch = self.next_epoch();
        let ended = if same_boot { Vec::new() } else { self.attempts_of(&node_id) };
        if same_boot && let Some(node) = self.nodes.get_mut(&node_id) {
            if node.request.address != request.address {
                node.evidence.undialled = Some(Suspicion::NotDialledYet);
            }
            node.evidence.heard(now);
            node.evidence.want_probe(now);
            node.epoch = epoch.clone();
            node.intent = request.intent;
            node.request = request;
        } else {
            let node = Node {
                epoch: epoch.clone(),
                intent: request.intent,
                last_seq: None,
                evidence: Evidence::new(now),
                pools: BTreeMap::new(),
                gpus: Vec::new(),
                reserved: ended.iter().copied().collect(),
                closed: ClosedAttempts::default(),
                request,
            };
            self.nodes.insert(node_id, node);
        }
        Ok(Registered { epoch, ended })
    }

    /// Makes room: an offline node is worth less than one that wants to join.
    fn forget_longest_offline(&mut self) -> Option<()> {
        let offline = self.nodes.iter().filter_map(|(id, node)| Some((node.evidence.offline_since?, id)));
        let (_, oldest) = offline.min()?;
        let oldest = oldest.clone();
        self.nodes.remove(&oldest);
        self.forgotten.push(oldest);
        Some(())
    }

    fn next_epoch(&mut self) -> Epoch {
        self.epochs_given += 1;
        let text = if self.enforces(Rule::IncarnationInEpoch) {
            format!("{:016x}-{}", self.settings.incarnation, self.epochs_given)
        } else {
            format!("{}", self.epochs_given)
        };
        Epoch::new(&text).expect("hexadecimal digits make an epoch")
    }

    /// Removes a node. With an epoch, only that registration of it; an old one has no effect.
    /// Returns the attempts that ended with it.
    pub fn deregister(&mut self, node_id: &NodeId, epoch: Option<&Epoch>) -> Option<Vec<AttemptId>> {
        let node = self.nodes.get(node_id)?;
        if epoch.is_some_and(|epoch| *epoch != node.epoch) {
            return None;
        }
        self.nodes.remove(node_id);
        Some(self.attempts_of(node_id))
    }

    /// Takes a whole report.
    pub fn heartbeat(
        &mut self,
        now: Moment,
        node_id: &NodeId,
        beat: Heartbeat,
    ) -> Result<HeartbeatOutcome, NodeNotKnown> {
        let fenced = self.enforces(Rule::ReportSequence);
        let node = self.nodes.get_mut(node_id).ok_or(NodeNotKnown)?;
        if node.epoch != beat.epoch {
            return Err(NodeNotKnown);
        }
        if node.last_seq.is_some_and(|last| beat.seq <= last) {
            return Ok(HeartbeatOutcome::Ignored);
        }
        let before = node.evidence.liveness();
        node.evidence.heard(now);
        node.last_seq = Some(beat.seq);
        node.intent = beat.intent;
        node.gpus = beat.gpus;

        let mut listed = BTreeSet::new();
        let mut orphans = Vec::new();
        let mut reserved: BTreeMap<PoolId, BTreeSet<AttemptId>> = BTreeMap::new();
        for attempt in &node.reserved {
            let pool_id = self.reservations[attempt].pool.pool_id.clone();
            reserved.entry(pool_id).or_default().insert(*attempt);
        }
        let mut pools = BTreeMap::new();
        for report in beat.pools {
            for model in report.models.iter().filter(|_| report.state.has_model()) {
                self.models_reported.insert(model.clone(), now);
            }
            let mut reported = BTreeSet::new();
            for attempt in report.replicas.iter().flat_map(|r| &r.attempts) {
                listed.insert(*attempt);
                if fenced && node.closed.explains(attempt, beat.seq) {
                    continue;
                }
                reported.insert(*attempt);
                if !self.reservations.contains_key(attempt) {
                    orphans.push(*attempt);
                }
            }
            let reserved = reserved.remove(&report.pool_id).unwrap_or_default();
            pools.insert(report.pool_id.clone(), PoolBook { report, reserved, reported, held_until: None });
        }
        node.pools = pools;
        node.closed.forget_before(beat.seq);

        let vanished = |attempt: &&AttemptId| {
            let accepted_after = self.reservations[*attempt].accepted_after;
            !listed.contains(*attempt) && (!fenced || accepted_after.is_some_and(|after| after < beat.seq))
        };
        let vanished = node.reserved.iter().filter(vanished).copied().collect();
        self.review_mass_silence();
        Ok(HeartbeatOutcome::Taken { returned: before != Liveness::Online, vanished, orphans })
    }

    // ---- evidence ----

    /// A token of one of the node's attempts arrived: it lives. Never lifts a suspicion.
    pub fn alive(&mut self, now: Moment, node_id: &NodeId) {
        if let Some(node) = self.nodes.get_mut(node_id)
            && node.evidence.offline_since.is_none()
        {
            node.evidence.last_life = node.evidence.last_life.max(now);
        }
    }

    /// A fresh connection to the node failed: suspect at once, and probed.
    pub fn dial_failed(&mut self, now: Moment, node_id: &NodeId, reason: String) -> Option<Transition> {
        if !self.enforces(Rule::EvidenceBeforeLease) {
            return None;
        }
        let node = self.nodes.get_mut(node_id)?;
        self.last_dial_failure = Some(now);
        self.mass_silence_since = None;
        let was = node.evidence.liveness();
        node.evidence.undialled = Some(Suspicion::DialFailed(reason));
        // The failure itself was the probe: the next one comes after a pause.
        let next = now + PROBE_EVERY;
        node.evidence.next_probe = Some(node.evidence.next_probe.map_or(next, |at| at.min(next)));
        (was == Liveness::Online).then(|| Transition { node_id: node_id.clone(), to: Liveness::Suspect })
    }

    /// A stream broke, or something else that a look at the node explains: probe it now.
    pub fn want_probe(&mut self, now: Moment, node_id: &NodeId) {
        if let Some(node) = self.nodes.get_mut(node_id) {
            node.evidence.want_probe(now);
        }
    }

    /// The nodes to dial now, with their addresses. Each is marked as being dialled until
    /// [`Registry::probed`] is told the outcome.
    pub fn take_due_probes(&mut self, now: Moment) -> Vec<(NodeId, String)> {
        let due = self.nodes.iter_mut().filter(|(_, node)| {
            !node.evidence.probe_in_flight && node.evidence.next_probe.is_some_and(|at| at <= now)
        });
        due.map(|(id, node)| {
            node.evidence.probe_in_flight = true;
            node.evidence.next_probe = None;
            (id.clone(), node.request.address.clone())
        })
        .collect()
    }

    /// The outcome of dialling a node at an address. Another node or boot answering there
    /// counts as a failure. A probe's answer never lifts silence.
    pub fn probed(
        &mut self,
        now: Moment,
        node_id: &NodeId,
        address: &str,
        answer: Result<LiveAnswer, String>,
    ) -> Option<Transition> {
        let node = self.nodes.get_mut(node_id)?;
        node.evidence.probe_in_flight = false;
        if node.request.address != address {
            node.evidence.want_probe(now);
            return None;
        }
        let was = node.evidence.liveness();
        let failure = match answer {
            Ok(live) if live.node_id != *node_id => Some(format!("{} answered there", live.node_id)),
            Ok(live) if live.boot_id != node.request.boot_id => Some("another process answered there".into()),
            Ok(_) => None,
            Err(reason) => Some(reason),
        };
        match failure {
            None => node.evidence.undialled = None,
            Some(reason) => {
                node.evidence.undialled = Some(Suspicion::DialFailed(reason));
                self.last_dial_failure = Some(now);
                self.mass_silence_since = None;
            }
        }
        let is = node.evidence.liveness();
        if is == Liveness::Suspect {
            node.evidence.next_probe = Some(now + PROBE_EVERY);
        }
        (is != was).then(|| Transition { node_id: node_id.clone(), to: is })
    }

    /// Our own loop stood still for this long: every lease is extended by as much.
    pub fn stalled(&mut self, now: Moment, stall: Duration) {
        for node in self.nodes.values_mut() {
            node.evidence.extend(stall, now);
        }
        for reported in self.models_reported.values_mut() {
            *reported = (*reported + stall).min(now);
        }
    }

    /// Applies what time alone changes. Nodes that go offline keep their reservations until
    /// they are released one by one.
    pub fn expire(&mut self, now: Moment) -> Vec<Transition> {
        let timing = self.settings.timing;
        let mut transitions = Vec::new();
        let mut fell_silent = false;
        for (id, node) in &mut self.nodes {
            let evidence = &mut node.evidence;
            if evidence.offline_since.is_none()
                && evidence.silent_since.is_none()
                && now >= evidence.last_heartbeat + timing.silence()
            {
                let was = evidence.liveness();
                evidence.silent_since = Some(now);
                evidence.want_probe(now);
                fell_silent = true;
                if was == Liveness::Online {
                    transitions.push(Transition { node_id: id.clone(), to: Liveness::Suspect });
                }
            }
        }
        if fell_silent {
            self.notice_mass_silence(now);
        }
        let lease = self.lease();
        for (id, node) in &mut self.nodes {
            let evidence = &mut node.evidence;
            if evidence.offline_since.is_none() && now >= evidence.last_life + lease {
                evidence.offline_since = Some(now);
                evidence.next_probe = None;
                transitions.push(Transition { node_id: id.clone(), to: Liveness::Offline });
            }
        }
        self.review_mass_silence();
        self.nodes.retain(|id, node| {
            let keep = node.evidence.offline_since.is_none_or(|since| now < since + FORGET_OFFLINE_AFTER);
            if !keep {
                self.forgotten.push(id.clone());
            }
            keep
        });
        self.models_reported.retain(|_, at| now < *at + timing.node_timeout);
        for (node_id, node) in &mut self.nodes {
            for (pool_id, book) in &mut node.pools {
                if book.held_until.is_some_and(|until| until <= now) {
                    book.held_until = None;
                    self.lifted_holds.push(PoolKey::new(node_id.clone(), pool_id.clone()));
                }
            }
        }
        transitions
    }

    /// The pools whose hold ended by time.
    pub fn take_lifted_holds(&mut self) -> Vec<PoolKey> {
        std::mem::take(&mut self.lifted_holds)
    }

    /// The nodes that are not known any more, although they did not leave.
    pub fn take_forgotten(&mut self) -> Vec<NodeId> {
        std::mem::take(&mut self.forgotten)
    }

    /// How long a node may give no evidence of life: one timeout, or two while most are silent.
    fn lease(&self) -> Duration {
        match self.mass_silence_since {
            Some(_) => self.settings.timing.node_timeout * 2,
            None => self.settings.timing.node_timeout,
        }
    }

    fn notice_mass_silence(&mut self, now: Moment) {
        let interval = self.settings.timing.heartbeat_interval;
        let recent = |at: Moment| now.since(at) <= interval;
        let live = self.nodes.values().filter(|n| n.evidence.offline_since.is_none()).count();
        let silent = self.nodes.values().filter(|n| n.evidence.silent_since.is_some_and(recent)).count();
        let dial_failed = self.last_dial_failure.is_some_and(recent);
        if self.enforces(Rule::MassSilence) && live >= 3 && silent * 2 > live && !dial_failed {
            self.mass_silence_since.get_or_insert(now);
        }
    }

    /// The guard ends when at most half of the nodes are silent.
    fn review_mass_silence(&mut self) {
        let live = self.nodes.values().filter(|n| n.evidence.offline_since.is_none()).count();
        let is_silent = |n: &&Node| n.evidence.offline_since.is_none() && n.evidence.silent_since.is_some();
        if self.nodes.values().filter(is_silent).count() * 2 <= live {
            self.mass_silence_since = None;
        }
    }

    /// Since when the control plane suspects itself, because most nodes fell silent at once.
    pub fn mass_silence_since(&self) -> Option<Moment> {
        self.mass_silence_since
    }

    /// When [`Registry::expire`] or [`Registry::take_due_probes`] has something to do next.
    pub fn next_deadline(&self) -> Option<Moment> {
        let timing = self.settings.timing;
        let lease = self.lease();
        let of_node = |node: &Node| {
            let evidence = &node.evidence;
            let liveness = match (evidence.offline_since, evidence.silent_since) {
                (Some(since), _) => since + FORGET_OFFLINE_AFTER,
                (None, Some(_)) => evidence.last_life + lease,
                (None, None) => (evidence.last_heartbeat + timing.silence()).min(evidence.last_life + lease),
            };
            let probe = evidence.next_probe.filter(|_| !evidence.probe_in_flight).unwrap_or(Moment::NEVER);
            let held = node.pools.values().filter_map(|book| book.held_until).min().unwrap_or(Moment::NEVER);
            liveness.min(probe).min(held)
        };
        self.nodes.values().map(of_node).min()
    }

    // ---- slots ----

    /// Claims a slot of a pool for an attempt. The caller has checked that one is free.
    pub fn reserve(&mut self, pool: &PoolKey, attempt: AttemptId) {
        if let Some(node) = self.nodes.get_mut(&pool.node_id) {
            node.reserved.insert(attempt);
            if let Some(book) = node.pools.get_mut(&pool.pool_id) {
                book.reserved.insert(attempt);
            }
        }
        let before =
            self.reservations.insert(attempt, Reservation { pool: pool.clone(), accepted_after: None });
        assert!(before.is_none(), "attempt {attempt} reserved twice");
    }

    /// The node took the attempt after having made the report of this number.
    pub fn accepted(&mut self, attempt: &AttemptId, accepted_after: u64) {
        if let Some(reservation) = self.reservations.get_mut(attempt) {
            reservation.accepted_after = Some(accepted_after);
        }
    }

    /// Gives a claim back. `closed_after` is the node's closing word, when it came: the number
    /// of its last report before the attempt ended. Releasing twice has no effect.
    pub fn release(&mut self, attempt: &AttemptId, closed_after: Option<u64>) -> Option<PoolKey> {
        let reservation = self.reservations.remove(attempt)?;
        let node = self.nodes.get_mut(&reservation.pool.node_id);
        if let Some(node) = node {
            node.reserved.remove(attempt);
            if let Some(book) = node.pools.get_mut(&reservation.pool.pool_id) {
                book.reserved.remove(attempt);
                if closed_after.is_some() {
                    book.reported.remove(attempt);
                }
            }
            if let Some(closed_after) = closed_after {
                node.closed.insert(*attempt, closed_after);
            }
        }
        Some(reservation.pool)
    }

    /// The pool refused a dispatch: it counts as full until its next report or `until`.
    pub fn hold(&mut self, pool: &PoolKey, until: Moment) {
        let book = self.nodes.get_mut(&pool.node_id).and_then(|node| node.pools.get_mut(&pool.pool_id));
        if let Some(book) = book {
            book.held_until = Some(until);
        }
    }

    // ---- reading ----

    /// Attempts that are reserved on the node.
    pub fn attempts_of(&self, node_id: &NodeId) -> Vec<AttemptId> {
        self.reservations.iter().filter(|(_, r)| r.pool.node_id == *node_id).map(|(id, _)| *id).collect()
    }

    pub fn liveness(&self, node_id: &NodeId) -> Option<Liveness> {
        self.nodes.get(node_id).map(|node| node.evidence.liveness())
    }

    pub fn address(&self, node_id: &NodeId) -> Option<(&str, BootId)> {
        self.nodes.get(node_id).map(|node| (node.request.address.as_str(), node.request.boot_id))
    }

    /// The number of the last report that was taken.
    pub fn report_seq(&self, node_id: &NodeId) -> Option<u64> {
        self.nodes.get(node_id)?.last_seq
    }

    pub fn pool_ids(&self, node_id: &NodeId) -> impl Iterator<Item = &PoolId> {
        self.nodes.get(node_id).into_iter().flat_map(|node| node.pools.keys())
    }

    /// The facts that placement uses, or nothing for a pool that is not there.
    pub fn pool_facts(&self, key: &PoolKey) -> Option<PoolFacts<'_>> {
        let node = self.nodes.get(&key.node_id)?;
        let book = node.pools.get(&key.pool_id)?;
        Some(PoolFacts {
            report: &book.report,
            liveness: node.evidence.liveness(),
            intent: node.intent,
            slots_total: book.slots_total(),
            slots_busy: book.slots_busy(self.enforces(Rule::UnionOfReservations)),
            held: book.held_until.is_some(),
        })
    }

    /// When any node last reported a pool that has or loads the model.
    pub fn model_reported(&self, model: &ModelRef) -> Option<Moment> {
        self.models_reported.get(model).copied()
    }

    /// Node ids that are online now; for messages.
    pub fn online_nodes(&self) -> Vec<&NodeId> {
        let online = |node: &&Node| node.evidence.liveness() == Liveness::Online;
        self.nodes.values().filter(online).map(|node| &node.request.node_id).collect()
    }

    pub fn counts(&self) -> BTreeMap<Liveness, u32> {
        let mut counts = BTreeMap::new();
        for node in self.nodes.values() {
            *counts.entry(node.evidence.liveness()).or_default() += 1;
        }
        counts
    }

    pub fn reservation_count(&self) -> usize {
        self.reservations.len()
    }

    /// A copy for readers.
    pub fn view(&self, now: Moment) -> ClusterView {
        let nodes = self.nodes.values().map(|node| {
            let pools = node.pools.values().map(|book| {
                let total = book.slots_total();
                PoolView {
                    slots_total: total,
                    slots_free: total.saturating_sub(book.slots_busy(true)),
                    reservations: u32::try_from(book.reserved.len()).unwrap_or(u32::MAX),
                    report: book.report.clone(),
                }
            });
            let running: BTreeSet<AttemptId> =
                node.pools.values().flat_map(|book| book.reserved.union(&book.reported)).copied().collect();
            NodeView {
                node_id: node.request.node_id.clone(),
                machine_id: node.request.machine_id.clone(),
                boot_id: node.request.boot_id,
                address: node.request.address.clone(),
                version: node.request.version.clone(),
                liveness: node.evidence.liveness(),
                intent: node.intent,
                reason: node.evidence.reason(),
                last_evidence_age_ms: now.millis_since(node.evidence.last_life),
                report_seq: node.last_seq,
                pools: pools.collect(),
                gpus: node.gpus.clone(),
                capabilities: node.request.capabilities.clone(),
                running_attempts: running.into_iter().collect(),
            }
        });
        ClusterView { nodes: nodes.collect() }
    }
}

#[cfg(test)]
#[path = "registry_tests.rs"]
mod tests;
