use std::path::Path;

use handoff_watcher::EngineHosts;
use pool_registry_types::pool::PoolState;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::super::tests::{agent, until};
use super::*;
use crate::node::Node;
use crate::supervisor::Settings;

const FILE: &str = "p-r0.json";

fn handoff(port: u16) -> Handoff {
    let text = format!(
        r#"{{"pool_id":"p","replica_id":"r0","engine":"llamacpp","models":["m"],"slots":2,"pid":7,"url":"http://127.0.0.1:{port}"}}"#
    );
    serde_json::from_str(&text).unwrap()
}

fn seen(handoff: &Handoff) -> Change {
    Change::Bound { file: FILE.into(), handoff: handoff.clone() }
}

fn gone(handoff: &Handoff) -> Change {
    Change::Unbound { file: FILE.into(), handoff: handoff.clone() }
}

/// Where the one replica is, as it is bound.
fn bound(agent: &Agent) -> Option<String> {
    let pools = agent.pools();
    assert!(pools.len() <= 1 && pools.iter().all(|pool| pool.replicas.len() == 1), "{pools:?}");
    let pool = pools.first()?;
    Some(agent.core.lock().engine_of(&pool.pool_id, &pool.replicas[0].replica_id)?.1)
}

/// The watch of the one replica, whose end is what a change would bring.
fn watch_of(agent: &Agent, handoff: &Handoff) -> CancellationToken {
    agent.replicas.lock()[&handoff.name()].stop.clone()
}

// CLOUD-2452
#[tokio::test]
async fn an_engine_announced_in_process_and_by_its_file_is_one_replica_which_the_file_does_not_change() {
    let folder = tempfile::tempdir().unwrap();
    let (agent, own) = (agent(&folder), handoff(1));
    agent.announce(own.clone());
    until("it is bound", || bound(&agent).is_some()).await;
    let watch = watch_of(&agent, &own);
    for change in [seen(&own), gone(&own), seen(&handoff(2)), gone(&handoff(2))] {
        agent.on_handoff(change);
        assert_eq!(bound(&agent).as_ref(), Some(&own.url));
        assert!(!watch.is_cancelled(), "it is watched as before");
    }
    agent.withdraw(&own.pool_id, &own.replica_id);
    assert!(watch.is_cancelled() && bound(&agent).is_none());
}

// CLOUD-2407
// CLOUD-2452
#[tokio::test]
async fn an_engine_kept_over_a_restart_stays_bound_when_it_is_announced() {
    let folder = tempfile::tempdir().unwrap();
    let (agent, own) = (agent(&folder), handoff(1));
    agent.on_handoff(seen(&own));
    until("its file binds it", || bound(&agent).is_some()).await;
    let watch = watch_of(&agent, &own);
    agent.announce(own.clone());
    assert!(!watch.is_cancelled(), "nothing has changed");
    agent.on_handoff(gone(&own));
    assert!(bound(&agent).is_some() && !watch.is_cancelled(), "its file is for others from now on");
}

// CLOUD-2452
#[tokio::test]
async fn a_late_look_at_the_directory_brings_back_no_engine_that_was_withdrawn() {
    let folder = tempfile::tempdir().unwrap();
    let (agent, own) = (agent(&folder), handoff(1));
    agent.announce(own.clone());
    until("it is bound", || bound(&agent).is_some()).await;
    agent.withdraw(&own.pool_id, &own.replica_id);
    agent.on_handoff(seen(&own));
    assert!(agent.replicas.lock().is_empty(), "it is about to be stopped");
    agent.on_handoff(gone(&own));
    let next = handoff(2);
    agent.on_handoff(seen(&next));
    assert_eq!(agent.replicas.lock()[&next.name()].handoff, next, "somebody else's engine is one");
}

/// An engine that lists its models and can do nothing else.
async fn engine() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let list = r#"{"data":[{"id":"m"}]}"#;
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{list}",
                list.len()
            );
            let mut request = [0; 2048];
            // A look that is broken off is as good.
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    url
}

/// A node with one pool, whose engine is there already. No watcher looks at its directory.
async fn supervised(folder: &tempfile::TempDir, runtime_dir: &Path, hosts: EngineHosts) -> Node {
    // Another test may have installed it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let pools = folder.path().join("pools.toml");
    let text = format!(
        "[pools.p]\nengine = \"openai\"\nmodel = \"m\"\nprovision = {{ mode = \"external\", url = \"{}\" }}\n",
        engine().await
    );
    std::fs::write(&pools, text).unwrap();
    let settings = Settings {
        pools,
        runtime_dir: runtime_dir.to_owned(),
        engine_hosts: hosts,
        models_dir: folder.path().join("models"),
        packages_dir: folder.path().join("packages"),
        logs_dir: folder.path().join("logs"),
        program: "/proc/self/exe".into(),
        forbid_provisioning: true,
        hub: "http://127.0.0.1:1".into(),
        hub_token: None,
    };
    let (_, hangups) = tokio::sync::watch::channel(0);
    Node::with_engines(agent(folder), settings, hangups, 1).unwrap()
}

// CLOUD-2438
// CLOUD-2452
#[tokio::test]
async fn an_engine_of_the_nodes_own_serves_while_its_handoff_file_cannot_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let in_the_way = folder.path().join("runtime");
    std::fs::write(&in_the_way, "").unwrap();
    let node = supervised(&folder, &in_the_way, EngineHosts::default()).await;
    let is_ready = || node.agent().pools().first().is_some_and(|pool| pool.state == PoolState::Ready);
    until("it serves", is_ready).await;
    std::fs::remove_file(&in_the_way).unwrap();
    std::fs::create_dir(&in_the_way).unwrap();
    let file = in_the_way.join(FILE);
    until("the file is written", || file.exists()).await;
    let written: Handoff = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(written, node.agent().replicas.lock()[&written.name()].handoff, "the same for others");
    assert!(is_ready());
    node.drain_and_leave(std::time::Duration::ZERO).await;
    assert!(!file.exists(), "who reads it then finds nobody");
}

// CLOUD-2007
#[tokio::test]
async fn an_external_engine_of_the_file_of_pools_is_bound_on_allowed_hosts_only() {
    let folder = tempfile::tempdir().unwrap();
    let runtime_dir = folder.path().join("runtime");
    std::fs::create_dir(&runtime_dir).unwrap();
    let node = supervised(&folder, &runtime_dir, EngineHosts::parse("gpu-box")).await;
    until("it says so", || !node.agent().problems().is_empty()).await;
    assert!(node.agent().problems()[FILE].contains("POOL_MANAGERD_ENGINE_HOSTS"));
    assert!(node.agent().replicas.lock().is_empty());
}
