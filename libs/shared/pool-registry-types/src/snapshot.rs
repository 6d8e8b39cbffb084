//! What readers see of the cluster at one moment, shared with the moments before and after it.
//!
//! A snapshot is a list of pieces, each a list of nodes in the order of their ids; a copy shares
//! all pieces, and a change makes anew only the piece that it touches. So what one changed node
//! costs grows with the size of a piece and the number of pieces, not with the cluster. How long
//! ago a node gave a sign of life is reckoned from the moment of the snapshot when somebody reads.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::ids::{ModelRef, NodeId, PoolId};
use crate::moment::Moment;
use crate::node::Liveness;
use crate::view::{
    CatalogAvailability, ClusterView, ModelAvailability, ModelReadiness, NodeView, PoolOfNode, ProblemOfNode,
    StagedAt,
};

/// Most nodes of one piece; about the square root of the most nodes that there are.
const PIECE: usize = 128;

/// One node of a snapshot.
#[derive(Debug, Clone, PartialEq)]
struct Entry {
    /// Its age is not filled in.
    node: Arc<NodeView>,
    /// The last heartbeat or token.
    last_evidence: Moment,
}

/// All nodes as of one moment.
#[derive(Debug, Clone, Default)]
pub struct ClusterSnapshot {
    at: Moment,
    /// None of them is empty.
    pieces: Vec<Arc<Vec<Entry>>>,
}

impl ClusterSnapshot {
    /// The same nodes as of a later moment.
    #[must_use]
    pub fn as_of(&self, at: Moment) -> Self {
        Self { at, pieces: self.pieces.clone() }
    }

    /// Takes a node in, or in the place of what it was. Its age is left out of account.
    pub fn put(&mut self, node: NodeView, last_evidence: Moment) {
        let at = self.piece_of(&node.node_id);
        let entry = Entry { node: Arc::new(node), last_evidence };
        let Some(piece) = self.pieces.get_mut(at) else {
            self.pieces.push(Arc::new(vec![entry]));
            return;
        };
        let piece = Arc::make_mut(piece);
        match position(piece, &entry.node.node_id) {
            Ok(known) => piece[known] = entry,
            Err(place) => piece.insert(place, entry),
        }
        if piece.len() > PIECE {
            let rest = piece.split_off(PIECE / 2);
            self.pieces.insert(at + 1, Arc::new(rest));
        }
    }

    /// A known node gave a sign of life, and nothing else of it has changed.
    pub fn heard(&mut self, node_id: &NodeId, last_evidence: Moment) {
        let at = self.piece_of(node_id);
        let Some(piece) = self.pieces.get_mut(at) else { return };
        if let Ok(known) = position(piece, node_id) {
            Arc::make_mut(piece)[known].last_evidence = last_evidence;
        }
    }

    pub fn remove(&mut self, node_id: &NodeId) {
        let at = self.piece_of(node_id);
        let Some(piece) = self.pieces.get_mut(at) else { return };
        if let Ok(known) = position(piece, node_id) {
            Arc::make_mut(piece).remove(known);
            if piece.is_empty() {
                self.pieces.remove(at);
            }
        }
    }

    /// The last piece that begins at or before the node; the first where none does.
    fn piece_of(&self, node_id: &NodeId) -> usize {
        let begins =
            |piece: &Arc<Vec<Entry>>| piece.first().is_some_and(|first| first.node.node_id <= *node_id);
        self.pieces.partition_point(begins).saturating_sub(1)
    }

    fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.pieces.iter().flat_map(|piece| piece.iter())
    }

    /// The nodes in the order of their ids, each with the milliseconds since its last sign of life,
    /// which its view does not say.
    pub fn nodes(&self) -> impl Iterator<Item = (&NodeView, u64)> {
        self.entries().map(|entry| (&*entry.node, self.at.millis_since(entry.last_evidence)))
    }

    pub fn has_node(&self, node_id: &NodeId) -> bool {
        self.pieces.get(self.piece_of(node_id)).is_some_and(|piece| position(piece, node_id).is_ok())
    }

    pub fn node(&self, node_id: &NodeId) -> Option<NodeView> {
        let piece = self.pieces.get(self.piece_of(node_id))?;
        let entry = &piece[position(piece, node_id).ok()?];
        Some(self.view_of(entry))
    }

    fn view_of(&self, entry: &Entry) -> NodeView {
        let last_evidence_age_ms = self.at.millis_since(entry.last_evidence);
        NodeView { last_evidence_age_ms, ..(*entry.node).clone() }
    }

    /// A copy of everything.
    pub fn view(&self) -> ClusterView {
        ClusterView { nodes: self.entries().map(|entry| self.view_of(entry)).collect() }
    }

    /// All pools with their nodes.
    pub fn pools(&self) -> impl Iterator<Item = PoolOfNode> + '_ {
        self.nodes().flat_map(|(node, _)| node.pools.iter().map(move |pool| node.pool(pool)))
    }

    /// The files of all nodes that are not taken as they stand.
    pub fn problems(&self) -> impl Iterator<Item = ProblemOfNode> + '_ {
        self.nodes().flat_map(|(node, _)| node.problems())
    }

    /// The pools of this name, on the node where one is named, each with its node's address.
    pub fn pools_named(&self, pool_id: &PoolId, node_id: Option<&NodeId>) -> Vec<(PoolOfNode, String)> {
        let of = |entry: &&Entry| node_id.is_none_or(|node_id| entry.node.node_id == *node_id);
        let found = self.entries().filter(of).flat_map(|entry| {
            let named = entry.node.pools.iter().filter(|pool| pool.report.pool_id == *pool_id);
            named.map(|pool| (entry.node.pool(pool), entry.node.address.clone()))
        });
        found.collect()
    }

    /// Which models can be asked for right now, and where they are.
    pub fn availability(&self) -> CatalogAvailability {
        #[derive(Default)]
        struct Found<'v> {
            ready: BTreeSet<&'v NodeId>,
            loadable: BTreeSet<&'v NodeId>,
            capacity: u32,
            staged: Vec<StagedAt>,
        }
        let mut models: BTreeMap<&ModelRef, Found<'_>> = BTreeMap::new();
        for (node, _) in self.nodes().filter(|(node, _)| node.liveness != Liveness::Offline) {
            for staged in &node.models {
                models.entry(&staged.model_id).or_default().staged.push(StagedAt {
                    node_id: node.node_id.clone(),
                    digest: staged.digest.clone(),
                    bytes: staged.bytes,
                });
            }
            for pool in &node.pools {
                let (serves, loads) = (node.serves(pool), node.loads(pool));
                for model in pool.report.models.iter().filter(|_| serves || loads) {
                    let found = models.entry(model).or_default();
                    if serves {
                        found.ready.insert(&node.node_id);
                        found.capacity = found.capacity.saturating_add(pool.slots_total);
                    } else {
                        found.loadable.insert(&node.node_id);
                    }
                }
            }
        }
        let models = models.into_iter().map(|(model, found)| {
            let (state, nodes) = match (found.ready.is_empty(), found.loadable.is_empty()) {
                (false, _) => (Some(ModelReadiness::Ready), found.ready),
                (true, false) => (Some(ModelReadiness::Loadable), found.loadable),
                (true, true) => (None, found.ready),
            };
            ModelAvailability {
                model_id: model.clone(),
                state,
                total_nodes: u32::try_from(nodes.len()).unwrap_or(u32::MAX),
                nodes: nodes.into_iter().cloned().collect(),
                total_capacity: found.capacity,
                staged: found.staged,
            }
        });
        CatalogAvailability { models: models.collect() }
    }
}

fn position(piece: &[Entry], node_id: &NodeId) -> Result<usize, usize> {
    piece.binary_search_by(|entry| entry.node.node_id.cmp(node_id))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::ids::{BootId, MachineId};
    use crate::node::{Capabilities, Intent};
    use crate::placement::Labels;

    fn node(n: u16, version: u16) -> NodeView {
        NodeView {
            node_id: NodeId::new(&format!("n{n}")).unwrap(),
            machine_id: MachineId::new("m").unwrap(),
            boot_id: BootId(Uuid::nil()),
            address: String::new(),
            version: version.to_string(),
            liveness: Liveness::Online,
            intent: Intent::Serving,
            labels: Labels::new(),
            reason: None,
            link: None,
            last_evidence_age_ms: 0,
            report_seq: None,
            pools: Vec::new(),
            gpus: Vec::new(),
            models: Vec::new(),
            problems: Vec::new(),
            capabilities: Capabilities::default(),
            running_attempts: Vec::new(),
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Put(u16, u16),
        Heard(u16, u16),
        Remove(u16),
        Share,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0_u16..400, any::<u16>()).prop_map(|(n, v)| Step::Put(n, v)),
            2 => (0_u16..400, 0_u16..900).prop_map(|(n, at)| Step::Heard(n, at)),
            2 => (0_u16..400).prop_map(Step::Remove),
            1 => Just(Step::Share),
        ]
    }

    proptest! {
        // CLOUD-1775
        /// Whatever comes and goes, a snapshot is what a list made anew would be, and one that was
        /// shared before stays as it was.
        #[test]
        fn a_snapshot_is_what_a_list_made_anew_would_be(steps in prop::collection::vec(step(), 1..900)) {
            let (mut snapshot, mut nodes) = (ClusterSnapshot::default(), BTreeMap::new());
            let mut shared = Vec::new();
            let expected = |nodes: &BTreeMap<NodeId, (NodeView, Moment)>| {
                let aged = nodes.values().map(|(node, heard)| NodeView {
                    last_evidence_age_ms: Moment::from_millis(1_000).millis_since(*heard),
                    ..node.clone()
                });
                ClusterView { nodes: aged.collect() }
            };
            for step in steps {
                match step {
                    Step::Put(n, version) => {
                        snapshot.put(node(n, version), Moment::ZERO);
                        nodes.insert(node(n, 0).node_id, (node(n, version), Moment::ZERO));
                    }
                    Step::Heard(n, at) => {
                        let at = Moment::from_millis(at.into());
                        snapshot.heard(&node(n, 0).node_id, at);
                        nodes.entry(node(n, 0).node_id).and_modify(|(_, heard)| *heard = at);
                    }
                    Step::Remove(n) => {
                        snapshot.remove(&node(n, 0).node_id);
                        nodes.remove(&node(n, 0).node_id);
                    }
                    Step::Share => shared.push((snapshot.as_of(Moment::from_millis(1_000)), expected(&nodes))),
                }
                prop_assert!(snapshot.pieces.iter().all(|piece| (1..=PIECE).contains(&piece.len())));
            }
            shared.push((snapshot.as_of(Moment::from_millis(1_000)), expected(&nodes)));
            for (snapshot, view) in shared {
                for known in &view.nodes {
                    prop_assert_eq!(snapshot.node(&known.node_id), Some(known.clone()));
                }
                prop_assert_eq!(snapshot.view(), view);
            }
        }
    }
}
