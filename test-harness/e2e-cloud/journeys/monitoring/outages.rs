//! What breaks off while a cluster works, and where it is seen: a firewall, a cable, a token of one side.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use e2e_cloud::cluster::TOKEN;
use e2e_cloud::{Client, Cluster, Engine, Network, Options, eventually, network};
use serde_json::{Value, json};

use super::value;

/// Longer than a node that is well is left undialled.
const DIALLED: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(30);

/// What the node says of itself: whether it is ready, and why not, and its gauge.
async fn says(cluster: &Cluster, n: usize) -> Option<(u16, String, f64)> {
    let client = cluster.node_client(n);
    cluster
        .on_node(n, async || {
            let ready = client.get("/health/ready").await.ok()?;
            let (status, body) = (ready.status().as_u16(), ready.json::<Value>().await.unwrap_or_default());
            let registered = value(&client, "llorch_agent_registered", &[]).await?;
            Some((status, body["message"].as_str().unwrap_or_default().to_owned(), registered))
        })
        .await
}

/// The node is not ready, and says this.
async fn is_unready(cluster: &Cluster, n: usize, why: &str, patience: Duration) {
    eventually(&format!("node {n} says {why:?}"), patience, || async {
        let (status, reason, registered) = says(cluster, n).await?;
        (status == 503 && reason.contains(why) && registered == 0.0).then_some(())
    })
    .await;
}

/// The node gets tasks, and knows it.
async fn is_well(cluster: &Cluster, n: usize) {
    eventually(&format!("node {n} gets tasks"), DIALLED, || async {
        let (status, _, registered) = says(cluster, n).await?;
        (status == 200 && registered == 1.0).then_some(())
    })
    .await;
    assert_eq!(up(&cluster.client, n, "online").await, Some(1.0));
}

/// `llorch_node_up` of the node, where it stands so.
async fn up(client: &Client, n: usize, liveness: &str) -> Option<f64> {
    let labels = [format!("node_id=\"gpu-node-{}\"", n + 1), format!("liveness=\"{liveness}\"")];
    value(client, "llorch_node_up", &labels.each_ref().map(String::as_str)).await
}

/// The reason that the control plane shows of a node that gets no tasks, which its log has too.
async fn reason(cluster: &Cluster, n: usize, patience: Duration) -> String {
    let id = &cluster.nodes[n].id;
    let reason = eventually(&format!("{id} gets no tasks, for a reason"), patience, || async {
        let node = cluster.client.node(id).await?;
        if up(&cluster.client, n, "online").await.is_some() {
            return None;
        }
        node.reason
    })
    .await;
    let log = std::fs::read_to_string(cluster.log("orchestratord")).unwrap_or_default();
    let line = log.lines().filter(|line| line.contains("a node gets no tasks") && line.contains(id.as_str()));
    assert!(line.count() >= 1, "{log}");
    reason
}

// CLOUD-2666
// CLOUD-2719
#[test]
fn a_firewall_before_an_idle_and_before_a_busy_node_is_seen_and_breaks_off_no_stream() {
    if !network::is_possible() {
        return;
    }
    let network = Arc::new(Network::new(2));
    network.control.within(async || {
        let engine = Engine::Fake { slots: 4, first_token_ms: 10, pace_ms: 100, dialect: "llamacpp" };
        let options = Options { engine, network: Some(Arc::clone(&network)), ..Options::default() };
        let cluster = Cluster::start(options).await;
        let mut task = cluster.task(800);
        task["placement"] = json!({"prefer_pools": ["gpu-node-2/pool-0"]});
        let client = cluster.client.clone();
        let stream = tokio::spawn(async move { client.run(task).await });
        eventually("the second node is busy", SOON, || async {
            let node = cluster.client.node("gpu-node-2").await?;
            node.pools.iter().any(|pool| pool.slots_free < pool.slots_total).then_some(())
        })
        .await;
        for n in [0, 1] {
            is_well(&cluster, n).await;
            network.close_node(n);
        }
        for n in [0, 1] {
            let why = reason(&cluster, n, DIALLED).await;
            // Its heartbeats go on: it hears what it is taken for.
            is_unready(&cluster, n, &why, SOON).await;
        }
        for n in [0, 1] {
            network.open_node(n);
        }
        for n in [0, 1] {
            is_well(&cluster, n).await;
        }
        let transcript = stream.await.expect("a reader");
        transcript.check();
        assert_eq!((transcript.tokens().len(), transcript.starts()), (800, 1), "{:?}", transcript.error());
    });
}

// CLOUD-2719
#[test]
fn a_cable_that_is_pulled_under_a_stream_is_seen_at_both_ends() {
    if !network::is_possible() {
        return;
    }
    let network = Arc::new(Network::new(2));
    network.control.within(async || {
        let engine = Engine::Fake { slots: 4, first_token_ms: 10, pace_ms: 50, dialect: "llamacpp" };
        let options = Options { engine, network: Some(Arc::clone(&network)), ..Options::default() };
        let cluster = Cluster::start(options).await;
        for n in [0, 1] {
            is_well(&cluster, n).await;
        }
        let mut task = cluster.task(300);
        task["placement"] = json!({"prefer_pools": ["gpu-node-1/pool-0"]});
        task["recovery"] = json!("continue");
        let accepted: Value = cluster.client.post("/v2/tasks", &task).await.json().await.expect("JSON");
        let id = accepted["task_id"].as_str().expect("an accepted task").to_owned();
        cluster.client.follow_tokens(&id, 5).await;
        network.unplug_node(0);
        let link = ["node_id=\"gpu-node-1\"", "state=\"interrupted\""];
        eventually("its link is interrupted", SOON, || async {
            (value(&cluster.client, "llorch_links", &link).await? == 1.0).then_some(())
        })
        .await;
        reason(&cluster, 0, SOON).await;
        // The node is alone, and says that.
        is_unready(&cluster, 0, "the last heartbeat was not taken: ", SOON).await;
        let node_log = std::fs::read_to_string(cluster.log("gpu-node-1")).unwrap_or_default();
        assert!(node_log.contains("heartbeat"), "{node_log}");
        let transcript = cluster.client.follow(&id, None, usize::MAX).await;
        transcript.check();
        assert_eq!((transcript.tokens().len(), transcript.starts()), (300, 2), "{:?}", transcript.error());
        eventually("it counts as offline", SOON, || async { up(&cluster.client, 0, "offline").await }).await;
        network.plug_node(0);
        is_well(&cluster, 0).await;
    });
}

// CLOUD-2719
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_one_side_has_changed_is_seen_at_both_and_heals_with_the_other() {
    const NEW: &str = "test-token-of-one-side-only";
    let dir = tempfile::tempdir().expect("a folder");
    let [control, node] = ["control.tokens", "node.tokens"].map(|name| dir.path().join(name));
    let set = |path: &Path, tokens: &[&str]| {
        std::fs::write(path.with_extension("new"), tokens.join("\n")).expect("a writable folder");
        std::fs::rename(path.with_extension("new"), path).expect("a writable folder");
    };
    for path in [&control, &node] {
        set(path, &[TOKEN]);
    }
    let mut cluster = Cluster::start(Options {
        nodes: 1,
        control: vec![("LLORCH_API_TOKEN_FILE", control.display().to_string())],
        node: vec![(0, "LLORCH_API_TOKEN_FILE", node.display().to_string())],
        ..Options::default()
    })
    .await;
    is_well(&cluster, 0).await;
    // The node takes the new one only: it is let in no more, nor does it let the control plane in.
    set(&node, &[NEW]);
    let with_new = Client::new(&cluster.node_client(0).base, Some(NEW));
    eventually("the node is refused, and says so", SOON, || async {
        let ready: Value = with_new.get("/health/ready").await.ok()?.json().await.ok()?;
        let is_shown = ready["message"].as_str()?.contains("BAD_TOKEN");
        let gauge = value(&with_new, "llorch_agent_registered", &[]).await? == 0.0;
        (is_shown && gauge).then_some(())
    })
    .await;
    let refused = ["code=\"BAD_TOKEN\"", "route=\"/v2/nodes/{node_id}/heartbeat\""];
    let counted = value(&cluster.client, "llorch_refused_calls_total", &refused).await;
    assert!(counted.is_some_and(|calls| calls > 0.0), "{counted:?}");
    let log = cluster.control.as_ref().expect("it runs").log();
    assert!(log.contains("was refused on /v2/nodes/{node_id}/heartbeat: BAD_TOKEN"), "{log}");
    reason(&cluster, 0, SOON).await;
    // The control plane follows.
    set(&control, &[NEW]);
    cluster.client = Client::new(&cluster.client.base, Some(NEW));
    eventually("the node gets tasks again", SOON, || async {
        (with_new.get("/health/ready").await.ok()?.status() == 200).then_some(())
    })
    .await;
    assert!(cluster.client.run(cluster.task(3)).await.completed());
}
