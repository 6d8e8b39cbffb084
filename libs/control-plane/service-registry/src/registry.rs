//! The registry: nodes by id, each with the claims on its slots.
//!
//! Verbs come in pairs with what the caller must do: attempts that a verb returns as ended or
//! vanished are still reserved until [`ServiceRegistry::release`] is called for each of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use pool_registry_types::node::{Heartbeat, Intent, IntentOrder, LINK_FEATURE, Liveness, RegisterRequest};
use pool_registry_types::placement::Labels;
use pool_registry_types::pool::{EngineKind, PoolReport};
use pool_registry_types::snapshot::ClusterSnapshot;
use pool_registry_types::view::{ClusterView, LinkState, LinkView, NodeView, PoolView};
use pool_registry_types::{AttemptId, BootId, Epoch, ModelRef, Moment, NodeId, PoolId, PoolKey, TaskId};

use crate::breaker::Breaker;
use crate::liveness::{Evidence, PROBE_EVERY, ProbeOutcome, Suspicion, Timing, Transition};
use crate::mismatch::IndexMismatch;
use crate::reservations::{Claims, ClosedAttempts, PoolBook, Reservation, Reservations};
use crate::rules::Rule;

mod evidence;
mod models;
mod places;
mod reading;
mod reports;
mod slots;
mod table;

use models::Models;
pub use places::Registrar;
use table::{Entries, Node, NodeTable, Unshown};

/// How a registry behaves.
#[derive(Debug, Clone)]
pub struct Settings {
    pub timing: Timing,
    /// Most nodes that are known at a time. Source: .specs/01 CLOUD-1009.
    pub max_nodes: usize,
    /// Unique for each life of the control plane.
    pub incarnation: u64,
    /// For the simulator only.
    pub switched_off: Option<Rule>,
}

/// A registration was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeConflict {
    #[error(
        "node_id {node_id} belongs to a live process at {address}: give one of the two another POOL_MANAGERD_NODE_ID"
    )]
    IdTaken { node_id: NodeId, address: String },
    #[error("{0} nodes are known, which is the most")]
    TooMany(usize),
    #[error("the token {name} has {most} nodes, which is the most")]
    RegistrarFull { name: String, most: usize },
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
        /// The node runs them and they are not reserved there; whether they are elsewhere, the caller
        /// knows.
        orphans: Vec<AttemptId>,
    },
}

/// What placement needs to know of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolFacts<'r> {
    pub report: &'r PoolReport,
    /// As that report says.
    pub ready: bool,
    pub draining: bool,
    pub labels: &'r Arc<Labels>,
    pub liveness: Liveness,
    pub intent: Intent,
    pub slots_total: u32,
    pub slots_busy: u32,
    pub held: bool,
    /// A breaker, its own or its node's, lets nothing through.
    pub tripped: bool,
    /// Its node passes bodies on to engines as they come.
    pub passes_on: bool,
}

/// All nodes and all reservations.
#[derive(Debug)]
pub struct ServiceRegistry {
    settings: Settings,
    epochs_given: u64,
    orders_given: u64,
    /// Orders for nodes that went before they took them; they hold when the nodes are back.
    stored_orders: BTreeMap<NodeId, IntentOrder>,
    nodes: NodeTable,
    reservations: Reservations,
    models: Models,
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
            nodes: NodeTable::default(),
            reservations: Reservations::default(),
            models: Models::default(),
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
    /// address, and a conflict otherwise, until the node that has it has shown itself dead. The node is suspect until its address was dialled. It takes
    /// one of its registrar's places, where those are bounded.
    pub fn register(
        &mut self,
        now: Moment,
        request: RegisterRequest,
        registrar: Option<&Registrar>,
    ) -> Result<Registered, NodeConflict> {
        if let Some(address) = self.is_taken(now, &request) {
            return Err(NodeConflict::IdTaken { node_id: request.node_id, address });
        }
        self.make_room(&request.node_id, registrar)?;
        let registrar = registrar.map(|registrar| Arc::clone(&registrar.name));
        let known = self.nodes.get(&request.node_id);
        let same_boot = known.is_some_and(|node| node.request.boot_id == request.boot_id);
        // An operator's order is for the node, not for one life of it.
        let before = known.and_then(|node| node.wanted.clone());
        let node_id = request.node_id.clone();
        let epoch = self.next_epoch();
        let ended = if same_boot { Vec::new() } else { self.attempts_of(&node_id) };
        if same_boot {
            self.nodes.set_registrar(&node_id, registrar);
            self.nodes.change(&node_id, |node| {
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
                if !request.features.iter().any(|feature| feature == LINK_FEATURE) {
                    node.link.clear();
                }
                node.request = request;
            });
        } else {
            let before = before.or_else(|| self.stored_orders.remove(&node_id));
            let wanted = before.filter(|wanted| wanted.intent != request.intent);
            let claims = match self.nodes.remove_claims(&node_id) {
                Some(claims) => claims,
                None => self.reservations.take(&node_id),
            };
            self.nodes.insert(Node {
                registrar,
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
                problems: Vec::new(),
                link: BTreeMap::new(),
                breaker: Breaker::default(),
                claims,
                closed: ClosedAttempts::default(),
                number: 0,
                entries: Entries::default(),
                unshown: Unshown::Nothing,
                request,
            });
        }
        let intent = self.nodes.get(&node_id).map_or((Intent::Serving, 0), Node::order);
        Ok(Registered { epoch, intent, ended })
    }

    /// Where the node is that has the id, while it is not known to be dead.
    fn is_taken(&mut self, now: Moment, request: &RegisterRequest) -> Option<String> {
        let node = self.nodes.get(&request.node_id)?;
        let is_live = node.evidence.liveness() != Liveness::Offline;
        let is_another = node.request.boot_id != request.boot_id && node.request.address != request.address;
        if !is_live || !is_another {
            return None;
        }
        let interval = self.settings.timing.heartbeat_interval;
        self.nodes.change(&request.node_id, |node| {
            let evidence = &mut node.evidence;
            let yields = evidence.yields_to(now, request.boot_id, &request.address, interval);
            (!yields).then(|| node.request.address.clone())
        })?
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
        let Some(node) = self.nodes.remove(node_id) else { return };
        self.reservations.keep(node_id, node.claims);
        let Some(order) = node.wanted else { return };
        if self.stored_orders.len() >= self.settings.max_nodes {
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

    // ---- intent ----

    /// An operator wants the node to drain or to serve. Returns where to send the order, or
    /// nothing for a node that is not known.
    pub fn want(&mut self, node_id: &NodeId, intent: Intent) -> Option<(String, IntentOrder)> {
        let number = self.orders_given + 1;
        let reported = self.nodes.change(node_id, |node| {
            let order = IntentOrder { epoch: node.epoch.clone(), number, intent };
            node.wanted = Some(order.clone());
            (node.request.address.clone(), order)
        });
        self.orders_given += u64::from(reported.is_some());
        reported
    }

    /// The node says that it has taken the order. The order stands until a report says so too:
    /// one that was made before may still be on its way.
    pub fn intent_taken(&mut self, node_id: &NodeId, order: &IntentOrder) {
        self.nodes.change(node_id, |node| {
            if node.wanted.as_ref() == Some(order) {
                node.intent = order.intent;
            }
        });
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
