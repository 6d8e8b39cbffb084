//! The nodes by id, and what is ordered and counted of them.
//!
//! What time does to a node stands in sets ordered by when it is due, so that nothing walks all
//! nodes to find the one. A node is changed in one way only, [`NodeTable::change`], which enters it
//! anew wherever it stands: no verb can make something due sooner and forget to say so. Moments are
//! kept without the lease, which is one or two timeouts for all nodes at once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use pool_registry_types::node::{
    GpuReport, Intent, IntentOrder, Liveness, NodeProblem, RegisterRequest, StagedModel,
};
use pool_registry_types::placement::Labels;
use pool_registry_types::snapshot::ClusterSnapshot;
use pool_registry_types::view::LinkView;
use pool_registry_types::{Epoch, Lookup, Moment, NodeId, PoolId};

use crate::breaker::Breaker;
use crate::liveness::Evidence;
use crate::mismatch::IndexMismatch;
use crate::reservations::{Claims, ClosedAttempts, PoolBook};

use super::places::{ByRegistrar, RegistrarNodes};

/// Nodes by a moment, those of one moment by their numbers.
pub(super) type ByMoment = BTreeMap<(Moment, u64), NodeId>;

/// How much of what readers were last shown of a node has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Unshown {
    Nothing,
    /// Its last sign of life only.
    Life,
    Anything,
}

/// A node as it is known. What each event of its attempts reads stands together, first.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Node {
    pub(super) pools: BTreeMap<PoolId, PoolBook>,
    /// On its slots.
    pub(super) claims: Claims,
    pub(super) closed: ClosedAttempts,
    /// For its streams.
    pub(super) breaker: Breaker,
    /// Its number, which no other node has or had; the table's own.
    pub(super) number: u64,
    pub(super) unshown: Unshown,
    /// As the node says itself.
    pub(super) intent: Intent,
    /// What an operator asked for and the node has not reported yet.
    pub(super) wanted: Option<IntentOrder>,
    /// Where it stands among the others; the table's own.
    pub(super) entries: Entries,
    pub(super) labels: Arc<Labels>,
    /// Whose place it takes, where those are bounded; changed by the table only.
    pub(super) registrar: Option<Arc<str>>,
    pub(super) request: RegisterRequest,
    pub(super) evidence: Evidence,
    pub(super) epoch: Epoch,
    pub(super) last_seq: Option<u64>,
    /// As its last report said.
    pub(super) tokens_changed: u64,
    pub(super) gpus: Vec<GpuReport>,
    pub(super) models: Vec<StagedModel>,
    pub(super) problems: Vec<NodeProblem>,
    /// By its lanes, as it was told last; empty where the node has none.
    pub(super) link: BTreeMap<u16, LinkView>,
}

impl Node {
    /// The node says what it does, and the number of the last order it has taken: one that it
    /// has taken is not outstanding any more.
    pub(super) fn reported(&mut self, intent: Intent, order: u64) {
        self.intent = intent;
        self.wanted = self.wanted.take().filter(|wanted| wanted.number > order);
    }

    /// What the node is to be told: its last order, or what it does anyway.
    pub(super) fn order(&self) -> (Intent, u64) {
        self.wanted.as_ref().map_or((self.intent, 0), |wanted| (wanted.intent, wanted.number))
    }

    /// As of its last change.
    pub(super) fn liveness(&self) -> Liveness {
        self.entries.liveness.unwrap_or_else(|| self.evidence.liveness())
    }

    /// Draining as soon as either side says so, serving when both do.
    pub(super) fn effective_intent(&self, at_once: bool) -> Intent {
        match &self.wanted {
            Some(wanted) if at_once && self.intent == Intent::Serving => wanted.intent,
            _ => self.intent,
        }
    }
}

/// Where one node stands in the ordered sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub(super) struct Entries {
    liveness: Option<Liveness>,
    /// Its last heartbeat, while it may still fall silent.
    silence: Option<Moment>,
    /// Its last sign of life, while it is not offline.
    life: Option<Moment>,
    offline: Option<Moment>,
    /// When it is to be dialled.
    probe: Option<Moment>,
    /// When the pause of its breaker ends.
    rest: Option<Moment>,
    silent: Option<Moment>,
    /// No dial has ever succeeded.
    never_dialled: bool,
}

impl Entries {
    fn of(node: &Node) -> Self {
        let evidence = &node.evidence;
        let live = evidence.offline_since.is_none();
        Self {
            silence: (live && evidence.silent_since.is_none()).then_some(evidence.last_heartbeat),
            life: live.then_some(evidence.last_life),
            offline: evidence.offline_since,
            probe: evidence.next_probe.filter(|_| !evidence.probe_in_flight),
            rest: node.breaker.rests_until(),
            silent: evidence.silent_since,
            liveness: Some(evidence.liveness()),
            never_dialled: !evidence.was_dialled,
        }
    }

    fn is_live_and_silent(&self) -> bool {
        self.silent.is_some() && self.offline.is_none()
    }
}

/// All nodes in the order of what is due, and their counts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Order {
    silence: ByMoment,
    life: ByMoment,
    offline: ByMoment,
    probe: ByMoment,
    rest: ByMoment,
    /// Since when nodes are silent; those for longer than anybody asks are left out.
    silent: ByMoment,
    by_liveness: BTreeMap<Liveness, BTreeSet<NodeId>>,
    live_and_silent: usize,
    /// In the order in which they came.
    never_dialled: BTreeMap<u64, NodeId>,
    places: ByRegistrar,
}

impl Order {
    fn enter(&mut self, number: u64, id: &NodeId, registrar: Option<&Arc<str>>, was: Entries, is: Entries) {
        let id_of = (number, id);
        self.enter_place(id_of, registrar, was, is);
        if was.never_dialled != is.never_dialled {
            if is.never_dialled {
                self.never_dialled.insert(number, id.clone());
            } else {
                self.never_dialled.remove(&number);
            }
        }
        move_entry(&mut self.silence, id_of, was.silence, is.silence);
        move_entry(&mut self.life, id_of, was.life, is.life);
        move_entry(&mut self.offline, id_of, was.offline, is.offline);
        move_entry(&mut self.probe, id_of, was.probe, is.probe);
        move_entry(&mut self.rest, id_of, was.rest, is.rest);
        move_entry(&mut self.silent, id_of, was.silent, is.silent);
        self.live_and_silent -= usize::from(was.is_live_and_silent());
        self.live_and_silent += usize::from(is.is_live_and_silent());
        if was.liveness != is.liveness {
            if let Some(was) = was.liveness.and_then(|was| self.by_liveness.get_mut(&was)) {
                was.remove(id);
            }
            if let Some(is) = is.liveness {
                self.by_liveness.entry(is).or_default().insert(id.clone());
            }
        }
    }

    fn enter_place(
        &mut self,
        id_of: (u64, &NodeId),
        registrar: Option<&Arc<str>>,
        was: Entries,
        is: Entries,
    ) {
        let Some(name) = registrar else { return };
        let places = self.places.entry(Arc::clone(name)).or_default();
        places.nodes += usize::from(is.liveness.is_some());
        places.nodes -= usize::from(was.liveness.is_some());
        move_entry(&mut places.offline, id_of, was.offline, is.offline);
        if places.nodes == 0 {
            self.places.remove(name);
        }
    }
}

fn move_entry(set: &mut ByMoment, (number, id): (u64, &NodeId), was: Option<Moment>, is: Option<Moment>) {
    if was == is {
        return;
    }
    if let Some(was) = was {
        set.remove(&(was, number));
    }
    if let Some(is) = is {
        set.insert((is, number), id.clone());
    }
}

/// The ids whose moments are at least `span` ago, in their own order.
fn due(set: &ByMoment, now: Moment, span: Duration) -> Vec<NodeId> {
    let due = set.iter().take_while(|((at, _), _)| *at + span <= now);
    let mut ids: Vec<NodeId> = due.map(|(_, id)| id.clone()).collect();
    ids.sort_unstable();
    ids
}

fn first(set: &ByMoment, span: Duration) -> Option<Moment> {
    set.first_key_value().map(|((at, _), _)| *at + span)
}

/// All nodes that are known.
#[derive(Debug, Default)]
pub(super) struct NodeTable {
    nodes: Lookup<NodeId, Box<Node>>,
    /// Numbers that were given to nodes.
    numbers: u64,
    order: Order,
    /// What readers were last shown, and the nodes of which that is not true any more.
    shown: ClusterSnapshot,
    unshown: BTreeMap<u64, NodeId>,
}

impl NodeTable {
    pub(super) fn get(&self, id: &NodeId) -> Option<&Node> {
        self.nodes.get(id).map(|node| &**node)
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// All of them in the order of their ids; for readers.
    pub(super) fn in_order(&self) -> impl Iterator<Item = &Node> {
        self.nodes.in_order().map(|(_, node)| &**node)
    }

    /// Takes a node in, in the place of one of the same id.
    pub(super) fn insert(&mut self, mut node: Node) {
        let id = node.request.node_id.clone();
        let before = self.nodes.get(&id);
        node.number = before.map_or(self.numbers, |before| before.number);
        self.numbers += u64::from(before.is_none());
        node.entries = Entries::of(&node);
        node.unshown = Unshown::Anything;
        if let Some(before) = before {
            let registrar = before.registrar.as_ref();
            self.order.enter(before.number, &id, registrar, before.entries, Entries::default());
        }
        self.order.enter(node.number, &id, node.registrar.as_ref(), Entries::default(), node.entries);
        self.unshown.insert(node.number, id.clone());
        self.nodes.insert(id, Box::new(node));
    }

    pub(super) fn remove(&mut self, id: &NodeId) -> Option<Node> {
        let node = self.nodes.remove(id)?;
        self.order.enter(node.number, id, node.registrar.as_ref(), node.entries, Entries::default());
        self.unshown.remove(&node.number);
        self.shown.remove(id);
        Some(*node)
    }

    /// Changes a node that is known.
    pub(super) fn change<T>(&mut self, id: &NodeId, change: impl FnOnce(&mut Node) -> T) -> Option<T> {
        self.change_and_show(id, Unshown::Anything, change)
    }

    /// A known node takes the place of another registrar.
    pub(super) fn set_registrar(&mut self, id: &NodeId, registrar: Option<Arc<str>>) {
        let Some(node) = self.nodes.get_mut(id).filter(|node| node.registrar != registrar) else { return };
        let id_of = (node.number, id);
        self.order.enter_place(id_of, node.registrar.as_ref(), node.entries, Entries::default());
        node.registrar = registrar;
        self.order.enter_place(id_of, node.registrar.as_ref(), Entries::default(), node.entries);
    }

    /// Changes what is given to a known node, which moves it in no order.
    pub(super) fn change_claims<T>(&mut self, id: &NodeId, change: impl FnOnce(&mut Node) -> T) -> Option<T> {
        let node = self.nodes.get_mut(id)?;
        let result = change(node);
        debug_assert_eq!(node.entries, Entries::of(node), "something else was changed");
        if node.unshown == Unshown::Nothing {
            self.unshown.insert(node.number, id.clone());
        }
        node.unshown = Unshown::Anything;
        Some(result)
    }

    /// Takes the claims away from a node that is about to be another one.
    pub(super) fn remove_claims(&mut self, id: &NodeId) -> Option<Claims> {
        self.nodes.get_mut(id).map(|node| std::mem::take(&mut node.claims))
    }

    /// A known node gave a sign of life at `at`.
    pub(super) fn heard(&mut self, id: &NodeId, at: Moment) {
        self.change_and_show(id, Unshown::Life, |node| node.evidence.last_life = at);
    }

    fn change_and_show<T>(
        &mut self,
        id: &NodeId,
        unshown: Unshown,
        change: impl FnOnce(&mut Node) -> T,
    ) -> Option<T> {
        let node = self.nodes.get_mut(id)?;
        let result = change(node);
        let is = Entries::of(node);
        if node.entries != is {
            self.order.enter(node.number, id, node.registrar.as_ref(), node.entries, is);
            node.entries = is;
        }
        if node.unshown == Unshown::Nothing {
            self.unshown.insert(node.number, id.clone());
        }
        node.unshown = node.unshown.max(unshown);
        Some(result)
    }

    /// Changes each node.
    pub(super) fn change_all(&mut self, mut change: impl FnMut(&mut Node)) {
        let ids: Vec<NodeId> = self.nodes.in_order().map(|(id, _)| id.clone()).collect();
        for id in &ids {
            self.change(id, &mut change);
        }
    }

    // ---- what is due ----

    /// Those whose last heartbeat is so long ago that they fall silent.
    pub(super) fn due_silence(&self, now: Moment, span: Duration) -> Vec<NodeId> {
        due(&self.order.silence, now, span)
    }

    /// Those whose last sign of life is so long ago that they are offline.
    pub(super) fn due_offline(&self, now: Moment, lease: Duration) -> Vec<NodeId> {
        due(&self.order.life, now, lease)
    }

    /// Those that are offline for so long.
    pub(super) fn due_forgetting(&self, now: Moment, span: Duration) -> Vec<NodeId> {
        due(&self.order.offline, now, span)
    }

    pub(super) fn due_probes(&self, now: Moment) -> Vec<NodeId> {
        due(&self.order.probe, now, Duration::ZERO)
    }

    /// Those whose breakers' pauses are over.
    pub(super) fn due_rests(&self, now: Moment) -> Vec<NodeId> {
        due(&self.order.rest, now, Duration::ZERO)
    }

    /// The next moment at which any of them is due.
    pub(super) fn next_due(
        &self,
        silence: Duration,
        lease: Duration,
        forgetting: Duration,
    ) -> Option<Moment> {
        let order = &self.order;
        let all = [
            first(&order.silence, silence),
            first(&order.life, lease),
            first(&order.offline, forgetting),
            first(&order.probe, Duration::ZERO),
            first(&order.rest, Duration::ZERO),
        ];
        all.into_iter().flatten().min()
    }

    // ---- counts ----

    pub(super) fn live(&self) -> usize {
        self.order.life.len()
    }

    pub(super) fn live_and_silent(&self) -> usize {
        self.order.live_and_silent
    }

    /// Nodes that fell silent at most so long ago. Time only goes on: what is longer ago is not
    /// asked for again.
    pub(super) fn fell_silent_within(&mut self, now: Moment, span: Duration) -> usize {
        while self.order.silent.first_key_value().is_some_and(|((at, _), _)| now.since(*at) > span) {
            self.order.silent.pop_first();
        }
        self.order.silent.len()
    }

    /// Ids of one liveness, in their order.
    pub(super) fn of_liveness(&self, liveness: Liveness) -> impl Iterator<Item = &NodeId> {
        self.order.by_liveness.get(&liveness).into_iter().flatten()
    }

    /// How many have which liveness, where any has.
    pub(super) fn counts(&self) -> BTreeMap<Liveness, u32> {
        let counts = self.order.by_liveness.iter().filter(|(_, ids)| !ids.is_empty());
        counts.map(|(is, ids)| (*is, u32::try_from(ids.len()).unwrap_or(u32::MAX))).collect()
    }

    /// Of several since the same moment the one that is known for longest.
    pub(super) fn longest_offline(&self) -> Option<&NodeId> {
        self.order.offline.first_key_value().map(|(_, id)| id)
    }

    /// Of those that no dial has ever reached the one that is known for longest.
    pub(super) fn never_dialled(&self) -> Option<&NodeId> {
        self.order.never_dialled.first_key_value().map(|(_, id)| id)
    }

    /// What a registrar has, where it has any node.
    pub(super) fn places_of(&self, registrar: &str) -> Option<&RegistrarNodes> {
        self.order.places.get(registrar)
    }

    // ---- readers ----

    /// All nodes, those made anew that have changed since the last time.
    pub(super) fn snapshot(&mut self, now: Moment) -> ClusterSnapshot {
        for (_, id) in std::mem::take(&mut self.unshown) {
            let Some(node) = self.nodes.get_mut(&id) else { continue };
            let last_evidence = node.evidence.last_life;
            match std::mem::replace(&mut node.unshown, Unshown::Nothing) {
                Unshown::Nothing => {}
                Unshown::Life => self.shown.heard(&id, last_evidence),
                Unshown::Anything => self.shown.put(node.view(), last_evidence),
            }
        }
        self.shown.as_of(now)
    }

    /// Compares what is ordered and counted with a walk over all nodes.
    ///
    /// # Errors
    /// What differs.
    pub(super) fn check(&self) -> Result<(), IndexMismatch> {
        let mut walked = Order::default();
        for (id, node) in self.nodes.in_order() {
            walked.enter(node.number, id, node.registrar.as_ref(), Entries::default(), Entries::of(node));
        }
        // What is left out of these on purpose, and what is empty and there all the same.
        let silent = std::mem::take(&mut walked.silent);
        if !self.order.silent.iter().all(|(at, id)| silent.get(at) == Some(id)) {
            return Err(IndexMismatch::new("silent nodes", &self.order.silent, &silent));
        }
        let mut kept = Order { silent: ByMoment::new(), ..self.order.clone() };
        kept.by_liveness.retain(|_, ids| !ids.is_empty());
        IndexMismatch::unless_equal("nodes by what is due", &kept, &walked)
    }
}
