//! What is believed of nodes that refuse, fail, or are not the ones at fault.

use std::process::Command;

use e2e_cloud::client::changes_during;
use e2e_cloud::{FakeNode, NodeAnswer};
use pool_registry_types::node::Liveness;
use reqwest::Method;
use tokio::net::TcpStream;

use super::*;

// ---- nodes that refuse or fail ----

/// How long the refusing nodes are watched.
const WATCHED: Duration = Duration::from_secs(20);

// CLOUD-1314
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_rotation_of_tokens_costs_no_task_and_is_over_as_soon_as_it_is_finished() {
    const OLD: &str = TOKEN;
    const NEW: &str = "test-token-that-is-new";
    let dir = tempfile::tempdir().unwrap();
    let set = |name: &str, tokens: &[&str]| {
        let (path, draft) = (dir.path().join(name), dir.path().join(format!("{name}.new")));
        std::fs::write(&draft, tokens.join("\n")).unwrap();
        std::fs::rename(draft, &path).unwrap();
        path.display().to_string()
    };
    // What is first in a file is sent.
    let control = vec![("LLORCH_API_TOKEN_FILE", set("control", &[NEW, OLD]))];
    let both = set("both", &[OLD, NEW]);
    let old = set("old", &[OLD]);
    let files = [&old, &old, &old, &both];
    let node = files.into_iter().enumerate().map(|(n, file)| (n, "LLORCH_API_TOKEN_FILE", file.clone()));
    let node = node.collect();
    let cluster = Cluster::start(Options { control, node, ..fleet(4, quick(4)) }).await;
    let behind = ["gpu-node-1", "gpu-node-2", "gpu-node-3"];
    let following = cluster.client.request(Method::GET, "/v2/events").send().await.unwrap();
    let (changes, transcripts) =
        tokio::join!(changes_during(following, WATCHED), all_are_served(&cluster, 24));
    assert!(transcripts.iter().all(|transcript| transcript.node() == Some("gpu-node-4")));
    for id in behind {
        let of_node = changes.iter().filter(|(name, data)| name == "node" && data["node_id"] == id);
        let liveness: Vec<&Value> = of_node.map(|(_, data)| &data["liveness"]).collect();
        assert_eq!(liveness, ["suspect"], "{id} within {WATCHED:?}");
        let reason = cluster.client.node(id).await.unwrap().reason.unwrap_or_default();
        assert!(reason.contains("401"), "{id}: {reason}");
    }
    set("control", &[OLD, NEW]);
    eventually("the control plane has taken its tokens", Duration::from_secs(4), || async {
        let log = std::fs::read_to_string(cluster.log("orchestratord")).unwrap_or_default();
        log.contains("the file of tokens is read again").then_some(())
    })
    .await;
    let finished = Instant::now();
    for n in 0..behind.len() {
        cluster.wait_liveness(n, Liveness::Online, SOON).await;
    }
    let back = finished.elapsed();
    eprintln!("all online {} ms after the rotation was finished", back.as_millis());
    assert!(back <= Duration::from_secs(2), "{back:?}");
}

/// Three nodes that answer like this beside a good one.
async fn beside_three(cluster: &Cluster, answer: NodeAnswer) -> Vec<FakeNode> {
    let ids = (1..=3).map(|n| format!("bad-{n}"));
    let joining =
        ids.map(|id| async move { FakeNode::join(&cluster.client, &id, "fake-model", answer).await });
    join_all(joining).await
}

/// They are asked, and 24 tasks are served all the same, by the good one.
async fn cost_no_task(cluster: &Cluster, answer: NodeAnswer) -> Vec<FakeNode> {
    let nodes = beside_three(cluster, answer).await;
    let start = Instant::now();
    let transcripts = all_are_served(cluster, 24).await;
    let asked: Vec<usize> = nodes.iter().map(FakeNode::asked).collect();
    eprintln!("beside {answer:?}: 24 tasks in {} ms, asked {asked:?} times", start.elapsed().as_millis());
    assert!(asked.iter().all(|times| *times > 0), "{answer:?}: they attract nothing: {asked:?}");
    assert!(transcripts.iter().all(|transcript| transcript.node() == Some("gpu-node-1")));
    nodes
}

async fn leave(cluster: &Cluster, nodes: Vec<FakeNode>) {
    for node in nodes {
        node.leave(&cluster.client).await;
    }
}

// CLOUD-1315
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_fail_before_they_take_anything_cost_no_task_and_are_left_alone() {
    let cluster = Cluster::start(fleet(1, quick(4))).await;
    let nodes = cost_no_task(&cluster, NodeAnswer::Nothing).await;
    leave(&cluster, nodes).await;
    let nodes = cost_no_task(&cluster, NodeAnswer::Status(500)).await;
    each_trips(&cluster, &nodes).await;
}

/// While tasks come, each of the nodes is left alone at some time.
async fn each_trips(cluster: &Cluster, nodes: &[FakeNode]) {
    let tripped = std::cell::RefCell::new(std::collections::BTreeSet::new());
    eventually("each has tripped its breaker", SOON, || async {
        all_are_served(cluster, 1).await;
        let shown = cluster.client.nodes().await;
        let open = shown.iter().filter(|node| node.pools.iter().any(|pool| pool.tripped));
        tripped.borrow_mut().extend(open.map(|node| node.node_id.to_string()));
        (tripped.borrow().len() == nodes.len()).then_some(())
    })
    .await;
}

// CLOUD-1550
// CLOUD-1551
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nodes_no_before_it_takes_a_task_is_not_believed_before_another_was_asked() {
    let cluster = Cluster::start(fleet(1, quick(4))).await;
    for status in [400, 413] {
        let nodes = cost_no_task(&cluster, NodeAnswer::Status(status)).await;
        // They find wrong what another one takes.
        each_trips(&cluster, &nodes).await;
        leave(&cluster, nodes).await;
    }
    let nodes = cost_no_task(&cluster, NodeAnswer::Status(409)).await;
    for id in nodes.iter().map(|node| &node.id) {
        let node = cluster.client.node(id).await.unwrap();
        assert!(!node.pools[0].tripped, "a conflict counts against nobody");
    }
}

// CLOUD-1314
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_no_route_for_attempts_is_suspect_whatever_it_reports() {
    let cluster = Cluster::start(fleet(1, quick(4))).await;
    for node in &cost_no_task(&cluster, NodeAnswer::Status(404)).await {
        let view = cluster.client.node(&node.id).await.unwrap();
        let reason = view.reason.unwrap_or_default();
        assert!(view.liveness == Liveness::Suspect && reason.contains("404"), "{:?} {reason}", view.liveness);
    }
}

// ---- what is no fault of a node ----

// CLOUD-1704
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_pinned_to_a_node_that_dies_ends_by_its_pin_though_the_model_is_gone_too() {
    // Some time between suspect and offline.
    let control = vec![("ORCHESTRATORD_NODE_TIMEOUT_SECS", "5".to_owned())];
    let cluster = Cluster::start(Options { control, ..fleet(1, quick(4)) }).await;
    cluster.nodes[0].daemon.as_ref().unwrap().signal(Signal::SIGSTOP);
    assert_eq!(cluster.wait_not_online(0, SOON).await, Liveness::Suspect);
    let transcript = cluster.client.run(pinned(&cluster, "gpu-node-1")).await;
    transcript.check();
    eprintln!("pinned to a suspect node: waited {} ms", transcript.took.as_millis());
    assert_eq!(transcript.error(), Some("NODE_UNAVAILABLE"), "{:?}", transcript.events.last());
}

/// Descriptors that a control plane which is short of them may have beside those in use.
const FREE_FILES: usize = 8;

fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).expect("the process lives").count()
}

// CLOUD-1316
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_without_descriptors_blames_no_node_and_loses_no_task() {
    let cluster = Cluster::start(Options { control: patient(), ..fleet(1, quick(4)) }).await;
    let pid = cluster.control.as_ref().unwrap().pid();
    let mut connection = Connection::open(cluster.port, TOKEN).await;
    // Its link is up by this, and the connection there that orders go by.
    assert!(cluster.client.run(cluster.task(3)).await.completed());
    // Whoever lowers it later: by itself a control plane keeps a quarter of its descriptors from connections.
    let files = open_files(pid) + FREE_FILES;
    let limit = format!("--nofile={files}:");
    let lowered = Command::new("prlimit").args(["--pid", &pid.to_string(), &limit]).status();
    assert!(lowered.expect("prlimit (util-linux) runs").success());
    let mut idle = Vec::new();
    for _ in 0..FREE_FILES + 32 {
        idle.push(TcpStream::connect(("127.0.0.1", cluster.port)).await.expect("the backlog has room"));
    }
    eventually("its descriptors are used up", SOON, || async { (open_files(pid) >= files).then_some(()) })
        .await;
    // The node's link is there, and with it the connection that orders go by: tasks need no other one.
    let mut tasks = Vec::new();
    for _ in 0..4 {
        let (status, accepted) = connection.json("POST", "/v2/tasks", Some(&cluster.task(3))).await;
        assert_eq!(status, 202, "{accepted}");
        tasks.push(path_of(&accepted));
    }
    let start = Instant::now();
    for task in &tasks {
        let mut state = Value::Null;
        while state != "completed" {
            assert!(start.elapsed() < SOON, "{task} is {state}");
            state = connection.json("GET", task, None).await.1["state"].take();
            let (_, node) = connection.json("GET", "/v2/nodes/gpu-node-1", None).await;
            assert_eq!(node["liveness"], "online", "{node}");
        }
    }
    assert!(open_files(pid) >= files, "they were not used up all the time");
    eprintln!("4 tasks without a free descriptor of {files} took {} ms", start.elapsed().as_millis());
    drop(idle);
}
