//! Who has registered how many nodes, and which of them give their place to others.
//!
//! Whoever registers may be bounded in how many nodes it has: what one token invents takes no place
//! of another's. Where all places are taken, the nodes go first that were never dialled well, in the
//! order in which they came: nobody but whoever registered them has seen them.

use super::table::ByMoment;
use super::*;

/// Who registers a node, where that is bounded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registrar {
    pub name: Arc<str>,
    /// Nodes that it has at a time at most.
    pub max_nodes: usize,
}

/// The nodes of one registrar.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct RegistrarNodes {
    pub(super) nodes: usize,
    pub(super) offline: ByMoment,
}

/// By their names, those that have any.
pub(super) type ByRegistrar = BTreeMap<Arc<str>, RegistrarNodes>;

impl ServiceRegistry {
    /// Sees to a place for a node that wants to join: among those of its registrar, where an offline one
    /// of its own makes room, and among all.
    pub(super) fn make_room(
        &mut self,
        node_id: &NodeId,
        registrar: Option<&Registrar>,
    ) -> Result<(), NodeConflict> {
        let known = self.nodes.get(node_id);
        let is_known = known.is_some();
        let before = known.and_then(|node| node.registrar.clone());
        if let Some(Registrar { name, max_nodes }) = registrar
            && before.as_ref() != Some(name)
            && self.nodes.places_of(name).is_some_and(|places| places.nodes >= *max_nodes)
        {
            let oldest = self.nodes.places_of(name).and_then(|places| places.offline.first_key_value());
            let oldest = oldest.map(|(_, node_id)| node_id.clone());
            let full = || NodeConflict::RegistrarFull { name: name.to_string(), most: *max_nodes };
            self.forget(oldest.ok_or_else(full)?);
        }
        let max_nodes = self.settings.max_nodes;
        if !is_known && self.nodes.len() >= max_nodes {
            let goes = self.nodes.never_dialled().or(self.nodes.longest_offline()).cloned();
            self.forget(goes.ok_or(NodeConflict::TooMany(max_nodes))?);
        }
        Ok(())
    }

    fn forget(&mut self, node_id: NodeId) {
        self.remove(&node_id);
        self.forgotten.push(node_id);
    }
}
