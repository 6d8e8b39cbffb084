//! The registry: nodes by id, reservations by attempt.
//!
//! Verbs come in pairs with what the caller must do: attempts that a verb returns as ended or
//! vanished are still reserved until [`ServiceRegistry::release`] is called for each of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use pool_registry_types::node::{Heartbeat, Intent, IntentOrder, Liveness, RegisterRequest, StagedModel};
use pool_registry_types::placement::Labels;
use pool_registry_types::pool::{EngineKind, PoolReport};
use pool_registry_types::view::{ClusterView, NodeView, PoolView};
use pool_registry_types::{AttemptId, BootId, Epoch, ModelRef, Moment, NodeId, PoolId, PoolKey, TaskId};

use crate::breaker::Breaker;
use crate::liveness::{Evidence, PROBE_EVERY, ProbeOutcome, Suspicion, Timing, Transition};
use crate::reservations::{ClosedAttempts, PoolBook, Reservation};
use crate::rules::Rule;

mod evidence;
mod reading;
mod slots;

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
    /// As the node says itself.
    intent: Intent,
    /// What an operator asked for and the node has not reported yet.
    wanted: Option<IntentOrder>,
    labels: Arc<Labels>,
    last_seq: Option<u64>,
    /// As its last report said.
    tokens_changed: u64,
    evidence: Evidence,
    pools: BTreeMap<PoolId, PoolBook>,
    gpus: Vec<pool_registry_types::node::GpuReport>,
    models: Vec<StagedModel>,
    /// For its streams.
    breaker: Breaker,
    /// Attempts that hold a reservation on any pool of this node.
    reserved: BTreeSet<AttemptId>,
    closed: ClosedAttempts,
}

impl Node {
    /// The node says what it does, and the number of the last order it has taken: one that it
    /// has taken is not outstanding any more.
    fn reported(&mut self, intent: Intent, order: u64) {
        self.intent = intent;
        self.wanted = self.wanted.take().filter(|wanted| wanted.number > order);
    }

    /// What the node is to be told: its last order, or what it does anyway.
    fn order(&self) -> (Intent, u64) {
        self.wanted.as_ref().map_or((self.intent, 0), |wanted| (wanted.intent, wanted.number))
    }

    /// Draining as soon as either side says so, serving when both do.
    fn effective_intent(&self, at_once: bool) -> Intent {
        match &self.wanted {
            Some(wanted) if at_once && self.intent == Intent::Serving => wanted.intent,
            _ => self.intent,
        }
    }
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
    /// What the node is to do, and the number of the order; as it said itself, or as an
    /// operator asked for meanwhile.
    pub intent: (Intent, u64),
    /// Attempts of an earlier boot: they are over.
    pub ended: Vec<AttemptId>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeartbeatOutcome {
    /// An old number: nothing was taken from it.
    Ignored,
    Taken {
        /// What the node is to do from now on, and the number of the order.
        intent: (Intent, u64),
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
    pub labels: &'r Arc<Labels>,
    pub liveness: Liveness,
    pub intent: Intent,
    pub slots_total: u32,
    pub slots_busy: u32,
    pub held: bool,
    /// A breaker, its own or its node's, lets nothing through.
    pub tripped: bool,
}

/// All nodes and all reservations.
#[derive(Debug)]
pub struct ServiceRegistry {
    settings: Settings,
    epochs_given: u64,
    orders_given: u64,
    /// Orders for nodes that went before they took them; they hold when the nodes are back.
    stored_orders: BTreeMap<NodeId, IntentOrder>,
    nodes: BTreeMap<NodeId, Node>,
    reservations: BTreeMap<AttemptId, Reservation>,
    /// When a node last reported a pool that has or loads the model.
    models_reported: BTreeMap<ModelRef, Moment>,
    /// The kinds of its engines, and when each was last reported.
    engines_reported: BTreeMap<ModelRef, BTreeMap<EngineKind, Moment>>,
    last_dial_failure: Option<Moment>,
    /// When holds and breakers of pools end.
    pool_alarms: BTreeSet<(Moment, PoolKey)>,
    /// Pools whose hold or breaker ended by time since the last [`ServiceRegistry::take_lifted_holds`].
    lifted_holds: Vec<PoolKey>,
    /// Nodes that were dropped since the last [`ServiceRegistry::take_forgotten`].
    forgotten: Vec<NodeId>,
    /// Most nodes fell silent at once: nobody goes offline before one more timeout.
    mass_silence_since: Option<Moment>,
}

impl ServiceRegistry {
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            epochs_given: 0,
            orders_given: 0,
            stored_orders: BTreeMap::new(),
            nodes: BTreeMap::new(),
            reservations: BTreeMap::new(),
            models_reported: BTreeMap::new(),
            engines_reported: BTreeMap::new(),
            last_dial_failure: None,
            pool_alarms: BTreeSet::new(),
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
            // It takes orders under the new epoch from now on: one that was not reported is sent anew.
            node.intent = request.intent;
            node.wanted = node.wanted.take().map(|wanted| IntentOrder { epoch: epoch.clone(), ..wanted });
            node.labels = Arc::new(request.labels.clone());
            node.request = request;
        } else {
            // An operator's order is for the node, not for one life of it.
            let before = self.nodes.get(&node_id).and_then(|node| node.wanted.clone());
            let before = before.or_else(|| self.stored_orders.remove(&node_id));
            let wanted = before.filter(|wanted| wanted.intent != request.intent);
            let node = Node {
                epoch: epoch.clone(),
                intent: request.intent,
                wanted: wanted.map(|wanted| IntentOrder { epoch: epoch.clone(), ..wanted }),
                labels: Arc::new(request.labels.clone()),
                last_seq: None,
                tokens_changed: 0,
                evidence: Evidence::new(now),
                pools: BTreeMap::new(),
                gpus: Vec::new(),
                models: Vec::new(),
                breaker: Breaker::default(),
                reserved: ended.iter().copied().collect(),
                closed: ClosedAttempts::default(),
                request,
            };
            self.nodes.insert(node_id.clone(), node);
        }
        let intent = self.nodes.get(&node_id).map_or((Intent::Serving, 0), Node::order);
        Ok(Registered { epoch, intent, ended })
    }

    /// Makes room: an offline node is worth less than one that wants to join.
    fn forget_longest_offline(&mut self) -> Option<()> {
        let offline = self.nodes.iter().filter_map(|(id, node)| Some((node.evidence.offline_since?, id)));
        let (_, oldest) = offline.min()?;
        let oldest = oldest.clone();
        self.remove(&oldest);
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
        self.remove(node_id);
        Some(self.attempts_of(node_id))
    }

    /// Forgets a node, but not what is wanted of it.
    fn remove(&mut self, node_id: &NodeId) {
        let Some(order) = self.nodes.remove(node_id).and_then(|node| node.wanted) else { return };
        if self.stored_orders.len() >= MAX_NODES {
            let oldest = self.stored_orders.iter().min_by_key(|(_, order)| order.number);
            let oldest = oldest.map(|(node_id, _)| node_id.clone());
            oldest.iter().for_each(|node_id| drop(self.stored_orders.remove(node_id)));
        }
        self.stored_orders.insert(node_id.clone(), order);
    }

    /// Changes the order that is kept for a node which is not known any more. Returns whether there
    /// is one.
    pub fn want_stored(&mut self, node_id: &NodeId, intent: Intent) -> bool {
        let Some(order) = self.stored_orders.get_mut(node_id) else { return false };
        self.orders_given += 1;
        (order.number, order.intent) = (self.orders_given, intent);
        true
    }

    /// Takes a whole report.
    pub fn heartbeat(
        &mut self,
        now: Moment,
        node_id: &NodeId,
        beat: Heartbeat,
    ) -> Result<HeartbeatOutcome, NodeNotKnown> {
        let fenced = self.enforces(Rule::ReportSequence);
        let once = self.enforces(Rule::PoolNamedTwice);
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
        if beat.tokens_changed != node.tokens_changed {
            node.tokens_changed = beat.tokens_changed;
            node.evidence.ask_again(now);
        }
        node.reported(beat.intent, beat.intent_order);
        node.gpus = beat.gpus;
        node.models = beat.models;

        let mut listed = BTreeSet::new();
        let mut orphans = Vec::new();
        let mut reserved: BTreeMap<PoolId, BTreeSet<AttemptId>> = BTreeMap::new();
        for attempt in &node.reserved {
            let pool_id = self.reservations[attempt].pool.pool_id.clone();
            reserved.entry(pool_id).or_default().insert(*attempt);
        }
        let mut pools: BTreeMap<PoolId, PoolBook> = BTreeMap::new();
        for report in beat.pools {
            // No task can use what an engine of an unknown kind serves.
            if let Some(engine) = report.engine {
                for model in &report.models {
                    if report.state.has_model() {
                        self.models_reported.insert(model.clone(), now);
                    }
                    // Kept by its reports, whether or not it takes tasks at the moment.
                    self.engines_reported.entry(model.clone()).or_default().insert(engine, now);
                }
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
            if once && let Some(book) = pools.get_mut(&report.pool_id) {
                // Named twice: one pool all the same.
                book.join(report, reported);
                continue;
            }
            let reserved = reserved.remove(&report.pool_id).unwrap_or_default();
            let before = node.pools.remove(&report.pool_id);
            // A pool that was away may have another engine: nothing is held against that one.
            let away = |report: &PoolReport| !report.ready && !report.draining;
            let same = before.filter(|book| !away(&book.report) && !away(&report));
            let breaker = same.map(|book| book.breaker).unwrap_or_default();
            let book = PoolBook { report, reserved, reported, held_until: None, breaker };
            pools.insert(book.report.pool_id.clone(), book);
        }
        node.pools = pools;
        node.closed.forget_before(beat.seq);

        let vanished = |attempt: &&AttemptId| {
            let accepted_after = self.reservations[*attempt].accepted_after;
            !listed.contains(*attempt) && (!fenced || accepted_after.is_some_and(|after| after < beat.seq))
        };
        let vanished = node.reserved.iter().filter(vanished).copied().collect();
        let intent = node.order();
        self.review_mass_silence();
        Ok(HeartbeatOutcome::Taken { intent, returned: before != Liveness::Online, vanished, orphans })
    }

    // ---- intent ----

    /// An operator wants the node to drain or to serve. Returns where to send the order, or
    /// nothing for a node that is not known.
    pub fn want(&mut self, node_id: &NodeId, intent: Intent) -> Option<(String, IntentOrder)> {
        let node = self.nodes.get_mut(node_id)?;
        self.orders_given += 1;
        let order = IntentOrder { epoch: node.epoch.clone(), number: self.orders_given, intent };
        node.wanted = Some(order.clone());
        Some((node.request.address.clone(), order))
    }

    /// The node says that it has taken the order. The order stands until a report says so too:
    /// one that was made before may still be on its way.
    pub fn intent_taken(&mut self, node_id: &NodeId, order: &IntentOrder) {
        if let Some(node) = self.nodes.get_mut(node_id)
            && node.wanted.as_ref() == Some(order)
        {
            node.intent = order.intent;
        }
    }

    /// Whether the node takes new work as far as anybody wants it to.
    pub fn intent(&self, node_id: &NodeId) -> Option<Intent> {
        let at_once = self.enforces(Rule::DrainAtOnce);
        self.nodes.get(node_id).map(|node| node.effective_intent(at_once))
    }
}

#[cfg(test)]
#[path = "registry_tests.rs"]
mod tests;
