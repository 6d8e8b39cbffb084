use std::sync::atomic::{AtomicBool, Ordering};

use handoff_watcher::{Change, Fault};
use node_core::{NodeEffect, Readiness, ReplicaSpec};
use node_registration::{CallError, ControlPlane};
use owned_tasks::Panicked;
use pool_registry_types::node::{Capabilities, Heartbeat, HeartbeatAnswer, RegisterAnswer, RegisterRequest};
use pool_registry_types::placement::Labels;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::{BootId, Epoch, MachineId, ModelRef, NodeId};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn agent(folder: &tempfile::TempDir) -> Arc<Agent> {
    let node_id = NodeId::new("a").unwrap();
    let intent_file = IntentFile::new(folder.path(), folder.path(), &node_id);
    let identity = Identity {
        node_id,
        machine_id: MachineId::new("m").unwrap(),
        boot_id: BootId(Uuid::from_u128(1)),
        address: "http://127.0.0.1:9200".into(),
        version: "0".into(),
        labels: Labels::new(),
        capabilities: Capabilities::default(),
        features: Vec::new(),
    };
    Agent::new(identity, Duration::from_secs(10), 1, intent_file, Loops::default())
}

pub(super) async fn until(what: &str, is: impl Fn() -> bool) {
    let waiting = async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "{what}");
}

// CLOUD-1962
#[tokio::test]
async fn each_thread_for_streams_calls_engines_over_connections_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent(&folder);
    let threads = StreamThreads::start(2).unwrap();
    agent.stream_on(threads.clone());
    let client_of = |agent: &Agent| std::ptr::from_ref(agent.client()).addr();
    let mut clients = BTreeSet::from([client_of(&agent)]);
    for thread in threads.iter() {
        for _ in 0..2 {
            let agent = Arc::clone(&agent);
            clients.insert(thread.handle().spawn(async move { client_of(&agent) }).await.unwrap());
        }
    }
    assert_eq!(clients.len(), 3, "one for each thread, and one for all else");
}

// CLOUD-1145
#[tokio::test]
async fn a_replica_whose_watch_panicked_is_not_ready_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent(&folder);
    let name = HandoffName { pool_id: PoolId::new("p").unwrap(), replica_id: ReplicaId::new("r0").unwrap() };
    let spec = ReplicaSpec {
        replica_id: name.replica_id.clone(),
        engine: EngineKind::LlamaCpp,
        engine_version: None,
        url: "http://127.0.0.1:1".into(),
        models: vec![ModelRef::new("m").unwrap()],
        engine_names: BTreeMap::new(),
        names_from_engine: false,
        slots: 1,
        ctx_max: None,
        device_mask: None,
        warning: None,
    };
    let (stop, ready) = (CancellationToken::new(), Some(Readiness::Ready));
    agent.bind_unless(&stop, &name.pool_id, spec, ready).unwrap();
    assert!(agent.is_ready(&name.pool_id, &name.replica_id));
    let panicked = Panicked { name: "watch of a replica", message: "out of bounds".into() };
    agent.watch_failed(&stop, &name, &panicked);
    assert!(!agent.is_ready(&name.pool_id, &name.replica_id));
    let problems = agent.problems();
    let why = &problems["p-r0.json"];
    assert!(why.contains("watch of a replica") && !why.contains("out of bounds"), "{why}");
    // The handoff was rewritten: this watch speaks for nobody any more.
    agent.set_binding_problem(&name, None);
    stop.cancel();
    agent.watch_failed(&stop, &name, &panicked);
    assert!(agent.problems().is_empty());
}

/// A control plane to which the first registration panics.
struct Breaking(AtomicBool);

impl ControlPlane for Breaking {
    async fn register(&self, request: RegisterRequest) -> Result<RegisterAnswer, CallError> {
        assert!(self.0.swap(true, Ordering::Relaxed), "the first call");
        Ok(RegisterAnswer {
            node_id: request.node_id,
            epoch: Epoch::new("e1").unwrap(),
            heartbeat_interval_ms: 2_000,
            node_timeout_ms: 6_000,
            intent: Intent::Serving,
            intent_order: 0,
            life: None,
        })
    }

    async fn heartbeat(&self, _: &NodeId, _: Heartbeat) -> Result<HeartbeatAnswer, CallError> {
        Ok(HeartbeatAnswer {
            heartbeat_interval_ms: 2_000,
            cancel_attempts: Vec::new(),
            waiting: Vec::new(),
            intent: Intent::Serving,
            intent_order: 0,
            observed: None,
        })
    }

    async fn deregister(&self, _: &NodeId, _: &Epoch) -> Result<(), CallError> {
        Ok(())
    }
}

// CLOUD-1145
#[tokio::test]
async fn a_session_goes_on_after_a_call_that_panicked() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent(&folder);
    let session = agent.keep_session(Breaking(AtomicBool::new(false)));
    until("it is registered", || agent.session_problem().is_none()).await;
    agent.drain_and_leave(Duration::ZERO).await;
    assert!(tokio::time::timeout(PATIENCE, session).await.is_ok(), "it ends when the node has left");
}

// CLOUD-1145
#[tokio::test]
async fn what_follows_the_handoffs_ends_with_the_agent_while_the_watcher_lives() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent(&folder);
    let (send, changes) = mpsc::channel(4);
    agent.follow_handoffs(changes);
    let faulty = Change::Faulty { file: "p-r0.json".into(), fault: Fault::TooLarge, pool_id: None };
    send.send(faulty).await.unwrap();
    until("it is taken", || agent.problems().contains_key("p-r0.json")).await;
    agent.stop().await;
    assert!(send.is_closed(), "nobody takes changes any more");
}

// CLOUD-2422
#[tokio::test]
async fn what_tasks_wait_for_is_heard_again_each_time_it_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent(&folder);
    let mut waited_for = agent.waited_for();
    let pools = vec![PoolId::new("p").unwrap()];
    for _ in 0..2 {
        agent.carry_out(vec![NodeEffect::Waiting(pools.clone())]).await;
        assert!(waited_for.has_changed().unwrap(), "the same pools as before renew what was wanted");
        assert!(waited_for.borrow_and_update().iter().eq(&pools));
    }
}
