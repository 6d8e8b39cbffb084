//! What an operator has to mend: files that are not taken as they stand, and engines that cannot be bound.

use std::collections::BTreeMap;

use pool_registry_types::limits::MAX_PROBLEMS;
use pool_registry_types::node::{NodeProblem, ProblemKind};
use pool_registry_types::pool::{PoolReport, PoolState};
use pool_registry_types::{Moment, PoolId, ReplicaId};

use super::NodeCore;
use super::pools::Circumstances;

/// What a problem is about. Each has at most one at a time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// The file of pools, by its path.
    PoolsFile(String),
    /// A handoff file that cannot be read, or that is of nobody's engine, by its name.
    HandoffFile(String),
    /// An engine that a handoff announces.
    Replica { pool_id: PoolId, replica_id: ReplicaId },
}

impl Source {
    /// Its kind, and the file in which it is mended: a path, or a name in the runtime directory.
    pub fn file(&self) -> (ProblemKind, String) {
        match self {
            Self::PoolsFile(path) => (ProblemKind::PoolsFile, path.clone()),
            Self::HandoffFile(name) => (ProblemKind::Handoff, name.clone()),
            Self::Replica { pool_id, replica_id } => {
                (ProblemKind::Handoff, format!("{pool_id}-{replica_id}.json"))
            }
        }
    }
}

/// What an operator has to mend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The pool that has an engine less by it, where that is known.
    pub pool_id: Option<PoolId>,
    pub message: String,
    /// What the file announces has ended. Where the node runs the pool's engines itself it is nothing to mend.
    pub is_left_over: bool,
}

#[derive(Debug, Default)]
pub(super) struct Problems(BTreeMap<Source, Problem>);

impl Problems {
    /// Pools that have an engine less by one, those of the first so many problems.
    pub(super) fn pools(&self) -> impl Iterator<Item = &PoolId> {
        self.0.values().filter_map(|problem| problem.pool_id.as_ref()).take(MAX_PROBLEMS)
    }

    /// Of a pool that has no engine bound and none to come.
    pub(super) fn report(&self, id: &PoolId, around: &Circumstances) -> Option<PoolReport> {
        let problem = self.0.values().find(|problem| problem.pool_id.as_ref() == Some(id))?;
        let draining = around.node_drains;
        Some(PoolReport {
            pool_id: id.clone(),
            state: if draining { PoolState::Draining } else { PoolState::Failed },
            ready: false,
            draining,
            engine: None,
            engine_version: None,
            models: Vec::new(),
            device_mask: None,
            ctx_max: None,
            vram_free_bytes: around.vram_free_bytes,
            replicas: Vec::new(),
            last_error: Some(problem.message.clone()),
            warning: None,
            drain: None,
            supervised: None,
        })
    }
}

impl NodeCore {
    /// Takes in that something has a problem, or none any more. A change of what is shown is reported at once.
    pub fn set_problem(&mut self, now: Moment, source: Source, problem: Option<Problem>) {
        let is_new = self.problems.0.get(&source) != problem.as_ref() && !self.is_bound(&source);
        match problem {
            Some(problem) => self.problems.0.insert(source, problem),
            None => self.problems.0.remove(&source),
        };
        if is_new {
            self.session.poke(now);
        }
    }

    pub fn problems(&self) -> impl Iterator<Item = (&Source, &Problem)> {
        self.problems.0.iter()
    }

    fn is_bound(&self, source: &Source) -> bool {
        let Source::Replica { pool_id, replica_id } = source else { return false };
        self.pools.get(pool_id).is_some_and(|pool| pool.replicas.contains_key(replica_id))
    }

    /// Those of files, and of engines that are not bound: what is wrong with a bound one is its pool's
    /// `last_error`.
    pub(super) fn problem_reports(&self) -> Vec<NodeProblem> {
        let report = |(source, problem): (&Source, &Problem)| {
            let is_run_here = problem.pool_id.as_ref().is_some_and(|id| self.declared.contains_key(id));
            if self.is_bound(source) || problem.is_left_over && is_run_here {
                return None;
            }
            let (kind, file) = source.file();
            let Problem { pool_id, message, .. } = problem.clone();
            Some(NodeProblem { kind, file, pool_id, message })
        };
        self.problems().filter_map(report).collect()
    }
}

#[cfg(test)]
mod tests {
    use pool_registry_types::Epoch;

    use super::super::tests::{at, pool_id, replica_id, serving};
    use super::*;

    // CLOUD-2943
    #[test]
    fn what_is_to_be_mended_is_reported_once_at_its_pool_or_beside_the_pools() {
        let mut node = serving(1, 1);
        let problem = |pool: Option<&str>| {
            let pool_id = pool.map(|pool| PoolId::new(pool).unwrap());
            Some(Problem { pool_id, message: format!("of {pool:?}"), is_left_over: false })
        };
        node.set_problem(at(0), Source::PoolsFile("/p.toml".into()), problem(None));
        node.set_problem(at(0), Source::HandoffFile("q-r0.json".into()), problem(Some("q")));
        // Bound, and announced beside it.
        for n in [0, 1] {
            let source = Source::Replica { pool_id: pool_id(), replica_id: replica_id(n) };
            node.set_problem(at(0), source, problem(Some("pool-0")));
        }
        let beat = node.report(at(1), Epoch::new("e").unwrap());
        let reported: Vec<_> = beat.problems.iter().map(|it| (it.kind, it.file.as_str())).collect();
        let handoff = ProblemKind::Handoff;
        let expected =
            [(ProblemKind::PoolsFile, "/p.toml"), (handoff, "q-r0.json"), (handoff, "pool-0-r1.json")];
        assert_eq!(reported, expected);
        let pools: Vec<_> =
            beat.pools.iter().map(|it| (it.pool_id.as_str(), it.state, it.last_error.as_deref())).collect();
        let expected = [("pool-0", PoolState::Ready, None), ("q", PoolState::Failed, Some("of Some(\"q\")"))];
        assert_eq!(pools, expected);
        // Such a pool can be drained and opened again as others can.
        let q = PoolId::new("q").unwrap();
        let state = |node: &NodeCore| node.pool_reports(at(1))[1].state;
        assert!(node.drain_pool(at(1), &q, None) && state(&node) == PoolState::Draining);
        assert!(node.reopen_pool(at(1), &q) && state(&node) == PoolState::Failed);
        assert!(!node.drain_pool(at(1), &PoolId::new("nobodys").unwrap(), None));
        // More than a report may have: the file of pools is the last to be left out.
        for n in 0..100 {
            node.set_problem(at(2), Source::HandoffFile(format!("{n}-r0.json")), problem(None));
        }
        let beat = node.report(at(3), Epoch::new("e").unwrap());
        assert_eq!((beat.problems.len(), beat.problems[0].kind), (64, ProblemKind::PoolsFile));
        beat.check().unwrap();
    }
}
