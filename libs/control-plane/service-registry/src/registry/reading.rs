//! What placement, people and metrics see.

use pool_registry_types::Digest;
use pool_registry_types::node::{OPENAI_FEATURE, ObservedLiveness};

use super::*;

impl ServiceRegistry {
    /// Attempts that are reserved on the node.
    pub fn attempts_of(&self, node_id: &NodeId) -> Vec<AttemptId> {
        let known = self.nodes.get(node_id).map(|node| &node.claims);
        let claims = known.or_else(|| self.reservations.of_node(node_id));
        claims.into_iter().flat_map(BTreeMap::keys).copied().collect()
    }

    /// Attempts that are reserved on one of its pools, as it was reported.
    pub fn reserved_on(&self, pool: &PoolKey) -> impl Iterator<Item = &AttemptId> {
        let book = self.nodes.get(&pool.node_id).and_then(|node| node.pools.get(&pool.pool_id));
        book.into_iter().flat_map(|book| &book.reserved)
    }

    pub fn liveness(&self, node_id: &NodeId) -> Option<Liveness> {
        self.nodes.get(node_id).map(Node::liveness)
    }

    /// The same with its reason, for the node itself.
    pub fn observed(&self, node_id: &NodeId) -> Option<ObservedLiveness> {
        let evidence = &self.nodes.get(node_id)?.evidence;
        Some(ObservedLiveness { liveness: evidence.liveness(), reason: evidence.reason() })
    }

    /// Milliseconds since its last heartbeat or token.
    pub fn evidence_age_ms(&self, now: Moment, node_id: &NodeId) -> Option<u64> {
        self.nodes.get(node_id).map(|node| now.millis_since(node.evidence.last_life))
    }

    pub fn address(&self, node_id: &NodeId) -> Option<(&str, BootId)> {
        self.nodes.get(node_id).map(|node| (node.request.address.as_str(), node.request.boot_id))
    }

    /// The number of the last report that was taken.
    pub fn report_seq(&self, node_id: &NodeId) -> Option<u64> {
        self.nodes.get(node_id)?.last_seq
    }

    /// Whether the last attempt to dial the node has failed.
    pub fn dial_failing(&self, node_id: &NodeId) -> bool {
        let undialled = self.nodes.get(node_id).and_then(|node| node.evidence.undialled.as_ref());
        matches!(undialled, Some(Suspicion::DialFailed(_)))
    }

    /// Whether a lane of its link is up, as far as is known.
    pub fn has_lane_up(&self, node_id: &NodeId) -> bool {
        let mut lanes = self.nodes.get(node_id).into_iter().flat_map(|node| node.link.values());
        lanes.any(|lane| lane.state == LinkState::Up)
    }

    /// Whether a lane of its link was up and is dialled again: what runs there may come back with it.
    pub fn is_link_interrupted(&self, node_id: &NodeId) -> bool {
        let mut lanes = self.nodes.get(node_id).into_iter().flat_map(|node| node.link.values());
        lanes.any(|lane| lane.state == LinkState::Interrupted)
    }

    /// Whether the node itself refuses the control plane.
    pub fn is_denied(&self, node_id: &NodeId) -> bool {
        self.nodes.get(node_id).is_some_and(|node| node.evidence.denied.is_some())
    }

    /// Whether the node's streams failed again and again, and none has got through since.
    pub fn has_open_breaker(&self, node_id: &NodeId) -> bool {
        self.nodes.get(node_id).is_some_and(|node| !node.breaker.is_closed())
    }

    /// What the operator says of the node.
    pub fn labels(&self, node_id: &NodeId) -> Option<&Arc<Labels>> {
        self.nodes.get(node_id).map(|node| &node.labels)
    }

    /// What the model is on the node's disk, by its bytes; nothing where that is not known.
    pub fn model_digest(&self, node_id: &NodeId, model: &ModelRef) -> Option<&Digest> {
        let staged = &self.nodes.get(node_id)?.models;
        staged.iter().find(|staged| staged.model_id == *model).map(|staged| &staged.digest)
    }

    /// The facts that placement uses, or nothing for a pool that is not there.
    pub fn pool_facts(&self, key: &PoolKey) -> Option<PoolFacts<'_>> {
        let node = self.nodes.get(&key.node_id)?;
        Some(self.facts(node, node.pools.get(&key.pool_id)?))
    }

    /// The same of all pools of a node.
    pub fn pools_facts(&self, node_id: &NodeId) -> impl Iterator<Item = (&PoolId, PoolFacts<'_>)> {
        let nodes = self.nodes.get(node_id).into_iter();
        nodes.flat_map(|node| node.pools.iter().map(|(id, book)| (id, self.facts(node, book))))
    }

    fn facts<'r>(&self, node: &'r Node, book: &'r PoolBook) -> PoolFacts<'r> {
        PoolFacts {
            report: book.report(),
            ready: book.is_ready(),
            draining: book.is_draining(),
            labels: &node.labels,
            liveness: node.liveness(),
            intent: node.effective_intent(self.enforces(Rule::DrainAtOnce)),
            slots_total: book.slots_total(),
            slots_busy: book.slots_busy(self.enforces(Rule::UnionOfReservations)),
            held: book.held_until.is_some(),
            tripped: node.breaker.blocks() || book.breaker.blocks(),
            passes_on: node.request.features.iter().any(|feature| feature == OPENAI_FEATURE),
        }
    }

    /// When any node last reported a pool that has or loads the model.
    pub fn model_reported(&self, model: &ModelRef) -> Option<Moment> {
        self.models.had(model)
    }

    /// Models that were reported lately and stand beside the name in their order, at most so many on each
    /// side; for messages.
    pub fn models_beside(&self, model: &ModelRef, most: usize) -> impl Iterator<Item = &ModelRef> {
        self.models.beside(model, most)
    }

    /// The kinds of engines that had the model in a report since then.
    pub fn engines_since(&self, model: &ModelRef, since: Moment) -> impl Iterator<Item = EngineKind> {
        self.models.engines(model).filter(move |(_, at)| *at >= since).map(|(engine, _)| engine)
    }

    /// Node ids that are online now, in their order; for messages.
    pub fn online_nodes(&self) -> impl Iterator<Item = &NodeId> {
        self.nodes.of_liveness(Liveness::Online)
    }

    pub fn counts(&self) -> BTreeMap<Liveness, u32> {
        self.nodes.counts()
    }

    /// Milliseconds since each node's last heartbeat.
    pub fn heartbeat_ages(&self, now: Moment) -> impl Iterator<Item = (&NodeId, u64)> {
        self.nodes
            .in_order()
            .map(move |node| (&node.request.node_id, now.millis_since(node.evidence.last_heartbeat)))
    }

    pub fn reservation_count(&self) -> usize {
        self.reservations.all
    }

    /// All nodes for readers; only what has changed since the last time is made anew.
    pub fn snapshot(&mut self, now: Moment) -> ClusterSnapshot {
        self.nodes.snapshot(now)
    }

    /// The same, all of it made anew: what a snapshot is held against.
    pub fn view(&self, now: Moment) -> ClusterView {
        let nodes = self.nodes.in_order().map(|node| NodeView {
            last_evidence_age_ms: now.millis_since(node.evidence.last_life),
            ..node.view()
        });
        ClusterView { nodes: nodes.collect() }
    }
}

impl Node {
    /// A copy for readers, without its age.
    pub(super) fn view(&self) -> NodeView {
        let pools = self.pools.values().map(|book| {
            let total = book.slots_total();
            PoolView {
                slots_total: total,
                slots_free: total.saturating_sub(book.slots_busy(true)),
                reservations: u32::try_from(book.reserved.len()).unwrap_or(u32::MAX),
                tripped: self.breaker.blocks() || book.breaker.blocks(),
                report: book.report().clone(),
            }
        });
        let running: BTreeSet<AttemptId> =
            self.pools.values().flat_map(|book| book.reserved.union(&book.reported)).copied().collect();
        NodeView {
            node_id: self.request.node_id.clone(),
            machine_id: self.request.machine_id.clone(),
            boot_id: self.request.boot_id,
            address: self.request.address.clone(),
            version: self.request.version.clone(),
            liveness: self.evidence.liveness(),
            intent: self.effective_intent(true),
            labels: (*self.labels).clone(),
            reason: self.evidence.reason(),
            link: LinkView::of_lanes(self.link.values()).cloned(),
            last_evidence_age_ms: 0,
            report_seq: self.last_seq,
            pools: pools.collect(),
            gpus: self.gpus.clone(),
            models: self.models.clone(),
            problems: self.problems.clone(),
            capabilities: self.request.capabilities.clone(),
            running_attempts: running.into_iter().collect(),
        }
    }
}
