//! How much the reports of one token's nodes take together, where its nodes are bounded.
//!
//! Whoever may register nodes may have them report, and what they reported last is kept as long as they are
//! known. One report has bounds of its own; sixty-four of them would be too much. Nodes whose token is not
//! bounded, and their reports, are the operator's.

use std::collections::{BTreeMap, HashMap};

use parking_lot::Mutex;
use pool_registry_types::limits::{MAX_REPORTED_BYTES, REPORTED_ITEM_BYTES};
use pool_registry_types::node::Heartbeat;
use pool_registry_types::{ErrorBody, ErrorCode, HolderId, NodeId};

/// What the last reports of nodes come to, by whose the nodes are.
#[derive(Debug, Default)]
pub(crate) struct ReportShares(Mutex<HashMap<HolderId, BTreeMap<NodeId, usize>>>);

/// What a report of so many bytes takes, bytes: the text, and what each thing in it costs beside.
pub(crate) fn cost(beat: &Heartbeat, body_bytes: usize) -> usize {
    let of_pools: usize = beat.pools.iter().map(|pool| 1 + pool.models.len() + pool.replicas.len()).sum();
    let items = of_pools + beat.models.len() + beat.gpus.len() + beat.problems.len();
    body_bytes.saturating_add(items.saturating_mul(REPORTED_ITEM_BYTES))
}

impl ReportShares {
    /// Whether there is room for so many bytes of the node's.
    ///
    /// # Errors
    /// `RATE_LIMITED` with the token's name.
    pub(crate) fn check(
        &self,
        holder: HolderId,
        name: &str,
        node_id: &NodeId,
        bytes: usize,
    ) -> Result<(), ErrorBody> {
        let all = self.0.lock();
        let own = all.get(&holder).into_iter().flatten();
        let others: usize = own.filter(|(id, _)| *id != node_id).map(|(_, bytes)| bytes).sum();
        if others.saturating_add(bytes) <= MAX_REPORTED_BYTES {
            return Ok(());
        }
        let message = format!(
            "the reports of the nodes of the token {name} take more than {MAX_REPORTED_BYTES} bytes together, which is the most"
        );
        Err(ErrorBody::new(ErrorCode::RateLimited, message))
    }

    /// Nodes of the holder's that are not known any more take nothing.
    pub(crate) fn retain(&self, holder: HolderId, is_known: impl Fn(&NodeId) -> bool) {
        if let Some(own) = self.0.lock().get_mut(&holder) {
            own.retain(|id, _| is_known(id));
        }
    }

    /// The last report of a node that is known takes so much from now on.
    pub(crate) fn set(&self, holder: HolderId, node_id: NodeId, bytes: usize) {
        self.0.lock().entry(holder).or_default().insert(node_id, bytes);
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    // CLOUD-2779
    #[test]
    fn reports_of_one_tokens_nodes_have_one_room_and_nodes_that_have_gone_take_none_of_it() {
        let shares = ReportShares::default();
        let (one, other) = (HolderId(Uuid::from_u128(1)), HolderId(Uuid::from_u128(2)));
        let node = |n: usize| NodeId::new(&format!("n{n}")).unwrap();
        let third = MAX_REPORTED_BYTES / 3;
        let set = |holder, n, bytes| {
            shares.check(holder, "autoscaler", &node(n), bytes)?;
            shares.set(holder, node(n), bytes);
            Ok::<_, ErrorBody>(())
        };
        for n in 0..3 {
            set(one, n, third).unwrap();
        }
        set(one, 1, third / 2).unwrap();
        set(one, 1, third).unwrap();
        set(other, 7, MAX_REPORTED_BYTES).unwrap();
        let refused = set(one, 3, third).unwrap_err();
        assert_eq!(refused.code, ErrorCode::RateLimited);
        assert!(refused.message.contains("autoscaler"), "{refused}");
        // The first one is not known any more.
        shares.retain(one, |id| *id != node(0));
        set(one, 3, third).unwrap();
        set(one, 4, third).unwrap_err();
        set(one, 3, 0).unwrap();
        set(one, 4, third).unwrap();
    }

    // CLOUD-2779
    #[test]
    fn a_report_costs_its_text_and_each_thing_in_it() {
        let beat: Heartbeat = serde_json::from_str(
            r#"{"epoch":"e","seq":1,"timestamp":"","pools":[{"pool_id":"p","state":"ready","ready":true,"engine":"vllm",
                "models":["a","b"],"replicas":[{"replica_id":"r0","ready":true,"slots_total":4}]}]}"#,
        )
        .unwrap();
        assert_eq!(cost(&beat, 100), 100 + 4 * REPORTED_ITEM_BYTES);
    }
}
