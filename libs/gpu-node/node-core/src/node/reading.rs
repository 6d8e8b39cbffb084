//! What can be read of the node: the reports of its pools, and single facts.

use pool_registry_types::node::{GpuMemory, GpuReport, Intent};
use pool_registry_types::pool::PoolReport;
use pool_registry_types::{Moment, PoolId, ReplicaId};

use super::NodeCore;
use super::pools::Circumstances;
use super::replica::Replica;

impl NodeCore {
    pub fn running_count(&self) -> usize {
        self.running.values().filter(|running| !running.over).count()
    }

    pub fn pool_reports(&self, now: Moment) -> Vec<PoolReport> {
        let report = |id: &PoolId| {
            let (pool, declared) = (self.pools.get(id), self.declared.get(id));
            let accepted = |id| self.running.get(id).map(|running| running.accepted);
            let drains = pool.filter(|pool| pool.drain.is_some());
            let around = Circumstances {
                now,
                node_drains: self.intent() == Intent::Draining,
                vram_free_bytes: self.vram_free_bytes(),
                // Only a drain shows it.
                oldest: drains.and_then(|pool| pool.running().filter_map(accepted).min()),
            };
            let drained = self.drains_away.contains_key(id);
            let around =
                Circumstances { node_drains: around.node_drains || (pool.is_none() && drained), ..around };
            match (pool, declared) {
                (Some(pool), declared) => Some(pool.report(id, &around, declared)),
                (None, Some(declared)) => Some(declared.report(id, &around)),
                (None, None) => self.problems.report(id, &around),
            }
        };
        let mut reports: Vec<PoolReport> = self.known_pool_ids().into_iter().filter_map(report).collect();
        self.report_held(&mut reports);
        reports
    }

    /// Free memory of all healthy GPUs, bytes; unknown without any.
    fn vram_free_bytes(&self) -> Option<u64> {
        let free = |gpu: &GpuReport| gpu.vram_total_bytes.saturating_sub(gpu.vram_used_bytes);
        let mut known = self.gpus.iter().filter(|gpu| gpu.memory != GpuMemory::Unknown).peekable();
        known.peek().is_some().then(|| known.map(free).sum())
    }

    pub fn gpus(&self) -> &[GpuReport] {
        &self.gpus
    }

    /// Whether the replica takes attempts.
    pub fn is_ready(&self, pool_id: &PoolId, replica_id: &ReplicaId) -> bool {
        let replica = self.pools.get(pool_id).and_then(|pool| pool.replicas.get(replica_id));
        replica.is_some_and(Replica::is_ready)
    }
}
