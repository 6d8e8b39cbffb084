//! Nodes that start their engines when tasks wait: the production `Supervisor` over engines that
//! are a few timers, each on a node of its own.

use std::collections::BTreeMap;
use std::time::Duration;

use node_core::supervisor::{Happened, Ordered, PoolPlan, Prepared, RunId, Supervisor, Work};
use pool_registry_types::{ModelRef, PoolId, ReplicaId};

use super::node::kind_of;
use super::{What, World};

/// The engine of a supervised node.
#[derive(Debug)]
pub(crate) struct Supervision {
    supervisor: Supervisor,
    /// The engine that lives, loaded or not.
    engine: Option<RunId>,
}

impl World {
    pub(super) fn start_supervision(&mut self, node: usize) {
        let plan = &self.plan.nodes[node];
        let pool = PoolPlan {
            engine: kind_of(node),
            models: vec![ModelRef::new(&format!("m{}", plan.model)).expect("a valid model")],
            device_mask: None,
            ctx_max: None,
            replicas: 1,
            on_demand: true,
            ttl: plan.ttl_ms.map(Duration::from_millis),
            min_resident: Duration::from_secs(20),
            load_timeout: Duration::from_secs(15),
            drain_timeout: Duration::from_secs(10),
            exit_limit: 50,
            fingerprint: 1,
        };
        let pool_id = PoolId::new("pool-0").expect("a valid pool id");
        let supervisor = Supervisor::new(0, self.random.u64(..));
        self.nodes[node].supervision = Some(Supervision { supervisor, engine: None });
        self.supervise(node, Happened::Configured(BTreeMap::from([(pool_id, pool)])));
    }

    /// Tells the node's supervisor what happened, and does what it asks for.
    pub(super) fn supervise(&mut self, node: usize, happened: Happened) {
        let now = self.now;
        let mut next = Some(happened);
        while let Some(happened) = next.take() {
            let sim = &mut self.nodes[node];
            let (Some(core), Some(own)) = (sim.core.as_mut(), sim.supervision.as_mut()) else { return };
            let replica_key = |((pool_id, replica_id), (running, served))| {
                (
                    node_core::supervisor::ReplicaKey { pool_id, replica_id },
                    Work { running, served, silent: false },
                )
            };
            let mut orders =
                own.supervisor.apply(now, Happened::Used(core.work().into_iter().map(replica_key).collect()));
            orders.extend(own.supervisor.apply(now, happened));
            for order in orders {
                match order {
                    Ordered::Prepare { pool_id, plan } => {
                        let outcome = Ok(Prepared::default());
                        next = Some(Happened::Prepared { pool_id, fingerprint: plan.fingerprint, outcome });
                    }
                    Ordered::Withdraw { .. } => {
                        self.withdraw(node);
                        next = Some(Happened::Timer);
                    }
                    other => self.obey_supervisor(node, other),
                }
            }
        }
        let sim = &mut self.nodes[node];
        if let (Some(core), Some(own)) = (sim.core.as_mut(), sim.supervision.as_ref()) {
            core.declare(now, own.supervisor.declared(&BTreeMap::new()));
        }
    }

    fn withdraw(&mut self, node: usize) {
        let now = self.now;
        let (pool_id, replica_id) = (PoolId::new("pool-0"), ReplicaId::new("r0"));
        if let (Some(core), Ok(pool_id), Ok(replica_id)) =
            (self.nodes[node].core.as_mut(), pool_id, replica_id)
        {
            core.unbind(now, &pool_id, &replica_id);
        }
    }

    fn obey_supervisor(&mut self, node: usize, order: Ordered) {
        let boot = self.nodes[node].boot;
        match order {
            Ordered::Start { run, .. } => {
                self.note(|_| format!("n{node}: an engine starts"));
                if let Some(own) = self.nodes[node].supervision.as_mut() {
                    assert!(own.engine.is_none(), "an engine starts beside another one");
                    own.engine = Some(run);
                }
                // Now and then one dies while it loads, or takes longer than it may.
                let what = match self.random.u8(..16) {
                    0 => What::EngineGone { node, boot, run },
                    _ => What::EngineLoaded { node, boot, run },
                };
                let after = if self.random.u8(..16) == 0 { 20_000 } else { self.random.u64(100..6_000) };
                self.after_ms(after, what);
            }
            Ordered::Publish { .. } => {
                self.coverage.hit("core: pool loaded for a task");
                self.engine_back(node);
            }
            Ordered::Stop { run } => {
                self.coverage.hit("core: pool unloaded");
                let after = self.random.u64(10..500);
                self.after_ms(after, What::EngineGone { node, boot, run });
            }
            Ordered::Prepare { .. }
            | Ordered::Withdraw { .. }
            | Ordered::Purged { .. }
            | Ordered::LookAtDevices
            | Ordered::AskWaiting => {}
        }
    }

    pub(super) fn engine_loaded(&mut self, node: usize, run: RunId) {
        if self.nodes[node].supervision.as_ref().is_some_and(|own| own.engine == Some(run)) {
            self.supervise(node, Happened::Ready { run });
            self.pump(node);
        }
    }

    /// The process of the engine is gone, with whatever still ran on it.
    pub(super) fn engine_gone(&mut self, node: usize, run: RunId) {
        let Some(own) = self.nodes[node].supervision.as_mut() else { return };
        if own.engine != Some(run) {
            return;
        }
        own.engine = None;
        self.fail_runs(node);
        self.supervise(
            node,
            Happened::Exited { run, how: "it ended".into(), tail: Vec::new(), has_culprit: false },
        );
        self.pump(node);
    }

    /// The life that the node's engine has, where the node has started it.
    pub(super) fn supervised_engine(&self, node: usize) -> Option<RunId> {
        self.nodes[node].supervision.as_ref()?.engine
    }
}
