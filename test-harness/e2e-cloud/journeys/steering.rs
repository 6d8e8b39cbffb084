//! What operators and clients steer: drains, pins, labels, sessions, the queue, and what is shown.

use std::time::Duration;

use e2e_cloud::{Client, Cluster, Engine, Options, eventually};
use nix::sys::signal::Signal;
use pool_registry_types::node::{Intent, Liveness};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(5);

fn quick(slots: u32) -> Engine {
    Engine::Fake { slots, first_token_ms: 5, pace_ms: 5, dialect: "llamacpp" }
}

fn fleet(nodes: usize, engine: Engine) -> Options {
    Options { nodes, engine, ..Options::default() }
}

fn pinned(cluster: &Cluster, node_id: &str) -> Value {
    let mut task = cluster.task(3);
    task["placement"] = json!({"mode": "pin", "node_id": node_id});
    task
}

async fn post(client: &Client, path: &str, body: Value) -> (u16, Value) {
    let response = client.post(path, &body).await;
    (response.status().as_u16(), response.json().await.unwrap_or_default())
}

async fn intent_of(cluster: &Cluster, n: usize) -> Option<Intent> {
    Some(cluster.client.node(&cluster.nodes[n].id).await?.intent)
}

// CLOUD-1320
// CLOUD-1321
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_node_stays_drained_over_restarts_of_both_daemons_until_it_is_resumed() {
    let mut cluster = Cluster::start(fleet(2, quick(4))).await;
    let (status, body) = post(&cluster.client, "/v2/nodes/gpu-node-1/drain", json!({})).await;
    assert_eq!((status, &body["kept_by_node"]), (202, &json!(true)), "{body}");
    let elsewhere = async |cluster: &Cluster| {
        for _ in 0..3 {
            let transcript = cluster.client.run(cluster.task(2)).await;
            transcript.check();
            assert_eq!(transcript.node(), Some("gpu-node-2"));
        }
    };
    elsewhere(&cluster).await;
    cluster.nodes[0].daemon.as_mut().unwrap().kill();
    cluster.start_daemon(0);
    cluster.control.as_mut().unwrap().kill();
    cluster.start_control();
    cluster.wait_online(1).await;
    cluster.wait_liveness(0, Liveness::Online, SOON).await;
    assert_eq!(intent_of(&cluster, 0).await, Some(Intent::Draining));
    elsewhere(&cluster).await;
    let (status, _) = post(&cluster.client, "/v2/nodes/gpu-node-1/resume", json!({})).await;
    assert_eq!(status, 202);
    let transcript = cluster.client.run(pinned(&cluster, "gpu-node-1")).await;
    transcript.check();
    assert!(transcript.completed());
    let (status, body) = post(&cluster.client, "/v2/nodes/nobody/drain", json!({})).await;
    assert_eq!((status, &body["code"]), (404, &json!("NODE_UNKNOWN")));
}

// CLOUD-1322
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_does_not_answer_is_drained_here_at_once_and_told_when_it_speaks() {
    let cluster = Cluster::start(fleet(1, quick(4))).await;
    cluster.nodes[0].daemon.as_ref().unwrap().signal(Signal::SIGSTOP);
    let (status, body) = post(&cluster.client, "/v2/nodes/gpu-node-1/drain", json!({})).await;
    assert_eq!((status, &body["kept_by_node"]), (202, &json!(false)), "{body}");
    assert_eq!(intent_of(&cluster, 0).await, Some(Intent::Draining));
    cluster.nodes[0].daemon.as_ref().unwrap().signal(Signal::SIGCONT);
    let node = cluster.node_client(0);
    eventually("the node has taken it over", SOON, || async {
        (node.get_json("/v2/pools").await?["intent"] == "draining").then_some(())
    })
    .await;
}

// CLOUD-1751
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_pinned_to_a_drained_node_is_refused_and_a_waiting_one_ends() {
    let cluster = Cluster::start(fleet(
        2,
        Engine::Fake { slots: 1, first_token_ms: 5, pace_ms: 50, dialect: "llamacpp" },
    ))
    .await;
    let mut long = pinned(&cluster, "gpu-node-1");
    long["max_tokens"] = json!(60);
    let client = cluster.client.clone();
    let running = tokio::spawn(async move { client.run(long).await });
    eventually("it runs", SOON, || async {
        let node = cluster.client.node("gpu-node-1").await?;
        (node.running_attempts.len() == 1).then_some(())
    })
    .await;
    let (client, task) = (cluster.client.clone(), pinned(&cluster, "gpu-node-1"));
    let waiting = tokio::spawn(async move { client.run(task).await });
    eventually("it waits", SOON, || async {
        let tasks = cluster.client.get_json("/v2/tasks?state=queued").await?;
        (tasks["tasks"].as_array()?.len() == 1).then_some(())
    })
    .await;
    post(&cluster.client, "/v2/nodes/gpu-node-1/drain", json!({})).await;
    let waited = waiting.await.unwrap();
    waited.check();
    assert_eq!(waited.error(), Some("NODE_UNAVAILABLE"));
    let (status, body) = cluster.client.refused(&pinned(&cluster, "gpu-node-1")).await;
    assert_eq!(
        (status, &body["code"], &body["node_id"]),
        (503, &json!("NODE_UNAVAILABLE"), &json!("gpu-node-1"))
    );
    let ran = running.await.unwrap();
    ran.check();
    assert!(ran.completed(), "what runs may finish: {:?}", ran.events.last());
}

// CLOUD-1751
// CLOUD-1752
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_pinned_to_a_suspect_node_waits_and_runs_when_it_is_back_or_ends_when_it_is_dead() {
    // A node timeout of six intervals, so that there is time between suspect and offline.
    let control = vec![("ORCHESTRATORD_NODE_TIMEOUT_SECS", "6".to_owned())];
    let mut cluster = Cluster::start(Options { control, ..fleet(2, quick(4)) }).await;
    cluster.nodes[0].daemon.as_ref().unwrap().signal(Signal::SIGSTOP);
    cluster.wait_not_online(0, SOON).await;
    let (client, task) = (cluster.client.clone(), pinned(&cluster, "gpu-node-1"));
    let waiting = tokio::spawn(async move { client.run(task).await });
    eventually("it waits", SOON, || async {
        let tasks = cluster.client.get_json("/v2/tasks?state=queued").await?;
        (tasks["tasks"].as_array()?.len() == 1).then_some(())
    })
    .await;
    cluster.nodes[0].daemon.as_ref().unwrap().signal(Signal::SIGCONT);
    let transcript = waiting.await.unwrap();
    transcript.check();
    assert_eq!((transcript.completed(), transcript.node()), (true, Some("gpu-node-1")));
    cluster.wait_online(0).await;
    cluster.nodes[0].daemon.as_mut().unwrap().kill();
    let transcript = cluster.client.run(pinned(&cluster, "gpu-node-1")).await;
    transcript.check();
    assert_eq!(transcript.error(), Some("NODE_UNAVAILABLE"), "the other node is free, and is not its node");
    let (status, body) = cluster.client.refused(&pinned(&cluster, "gpu-node-1")).await;
    assert_eq!((status, &body["code"]), (503, &json!("NODE_UNAVAILABLE")));
}

// CLOUD-1753
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_pinned_to_an_unknown_node_waits_for_it_after_the_start_and_is_refused_later() {
    let mut cluster = Cluster::without_nodes(fleet(1, quick(4)));
    cluster.start_control();
    eventually("the control plane answers", SOON, || async {
        cluster.client.get_json("/v2/nodes").await.map(|_| ())
    })
    .await;
    let (client, task) = (cluster.client.clone(), pinned(&cluster, "gpu-node-1"));
    let early = tokio::spawn(async move { client.run(task).await });
    cluster.add_node(0);
    let transcript = early.await.unwrap();
    transcript.check();
    assert!(transcript.completed(), "the node has come: {:?}", transcript.events.last());
    let body = eventually("the grace is over", SOON, || async {
        let (status, body) = cluster.client.refused(&pinned(&cluster, "nobody")).await;
        (status == 503).then_some(body)
    })
    .await;
    assert_eq!(body["code"], "NODE_UNAVAILABLE");
}

// CLOUD-1007
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delete_that_arrives_late_does_not_remove_the_newer_registration() {
    let cluster = Cluster::start(fleet(1, quick(1))).await;
    let register = json!({
        "node_id": "late", "machine_id": "m", "boot_id": "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11",
        "address": "http://127.0.0.1:1", "version": "0",
    });
    let epoch = async || {
        let (status, body) = post(&cluster.client, "/v2/nodes/register", register.clone()).await;
        assert_eq!(status, 200, "{body}");
        body["epoch"].as_str().unwrap().to_owned()
    };
    let (old, new) = (epoch().await, epoch().await);
    let delete = async |epoch: &str| {
        let path = format!("/v2/nodes/late?epoch={epoch}");
        cluster.client.request(reqwest::Method::DELETE, &path).send().await.unwrap().status().as_u16()
    };
    assert_eq!(delete(&old).await, 204);
    let status = async || cluster.client.get("/v2/nodes/late").await.unwrap().status().as_u16();
    assert_eq!(status().await, 200, "the old epoch has no effect");
    assert_eq!(delete(&new).await, 204);
    eventually("it is gone", SOON, || async { (status().await == 404).then_some(()) }).await;
}

// CLOUD-1002
// CLOUD-1624
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_pool_id_on_two_nodes_is_two_pools_and_a_bare_name_is_ambiguous() {
    let cluster = Cluster::start(fleet(2, quick(2))).await;
    let pools = cluster.client.get_json("/v2/pools").await.unwrap();
    assert_eq!(pools["pools"].as_array().unwrap().len(), 2);
    let health = cluster.client.get("/v2/pools/pool-0/health").await.unwrap();
    assert_eq!(health.status(), 409);
    assert_eq!(health.json::<Value>().await.unwrap()["code"], "POOL_AMBIGUOUS");
    let health = cluster.client.get_json("/v2/pools/pool-0/health?node_id=gpu-node-2").await.unwrap();
    assert_eq!(
        (&health["node_id"], &health["ready"], &health["slots_total"]),
        (&json!("gpu-node-2"), &json!(true), &json!(2))
    );
    let mut task = cluster.task(2);
    task["placement"] = json!({"prefer_pools": ["gpu-node-2/pool-0"]});
    for _ in 0..3 {
        assert_eq!(cluster.client.run(task.clone()).await.node(), Some("gpu-node-2"));
    }
    task["placement"] = json!({"avoid_pools": ["gpu-node-2/pool-0"]});
    assert_eq!(cluster.client.run(task.clone()).await.node(), Some("gpu-node-1"));
    task["placement"] = json!({"avoid_pools": ["pool-0"], "allow_fallback": false});
    let dry = cluster.client.post("/v2/placement/explain", &task).await.json::<Value>().await.unwrap();
    let refusals: Vec<&str> =
        dry["pools"].as_array().unwrap().iter().filter_map(|pool| pool["refusal"].as_str()).collect();
    assert_eq!(refusals, ["avoided", "avoided"], "{dry}");
    assert_eq!(dry["choice"], Value::Null);
}

// CLOUD-1718
// CLOUD-1720
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn labels_are_required_and_a_sessions_tasks_spread_over_them() {
    let label = |n, value: &str| (n, "POOL_MANAGERD_LABELS", format!("zone={value},tier=fast"));
    let node = vec![label(0, "east"), label(1, "east"), label(2, "west")];
    let engine = Engine::Fake { slots: 8, first_token_ms: 1_500, pace_ms: 1, dialect: "llamacpp" };
    let cluster = Cluster::start(Options { node, ..fleet(3, engine) }).await;
    let mut task = cluster.task(2);
    task["placement"] = json!({"require_labels": {"zone": "west", "tier": "fast"}});
    let runs = (0..4).map(|_| cluster.client.run(task.clone()));
    for transcript in futures::future::join_all(runs).await {
        assert_eq!(transcript.node(), Some("gpu-node-3"));
    }
    task["session_id"] = json!("7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11");
    task["placement"] = json!({"spread_by": "zone"});
    let runs = (0..4).map(|_| cluster.client.run(task.clone()));
    let spread = futures::future::join_all(runs).await;
    let west = spread.iter().filter(|transcript| transcript.node() == Some("gpu-node-3")).count();
    assert_eq!(west, 2, "half of them in each zone, though one zone has two of three nodes");
}

// CLOUD-1715
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn round_robin_takes_nodes_in_turn() {
    let control = vec![("ORCHESTRATORD_PLACEMENT_STRATEGY", "round-robin".to_owned())];
    let cluster = Cluster::start(Options { control, ..fleet(3, quick(4)) }).await;
    let mut nodes = Vec::new();
    for _ in 0..6 {
        nodes.push(cluster.client.run(cluster.task(1)).await.node().unwrap().to_owned());
    }
    assert_eq!(nodes[..3], nodes[3..], "{nodes:?}");
    nodes.sort();
    nodes.dedup();
    assert_eq!(nodes.len(), 3);
}

// CLOUD-1719
// CLOUD-1740
// CLOUD-1741
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_stays_on_its_replica_and_within_its_budgets() {
    let control = vec![
        ("ORCHESTRATORD_SESSION_MAX_TURNS", "4".to_owned()),
        ("ORCHESTRATORD_SESSION_TOKEN_BUDGET", "20".to_owned()),
    ];
    let cluster = Cluster::start(Options { control, ..fleet(3, quick(4)) }).await;
    let id = "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11";
    let path = format!("/v2/sessions/{id}");
    let turn = |tokens: u32| {
        let mut task = cluster.task(tokens);
        task["session_id"] = json!(id);
        task
    };
    assert_eq!(cluster.client.get(&path).await.unwrap().status(), 404);
    let warmth = |transcript: &e2e_cloud::Transcript| {
        let started = transcript.events.iter().find(|(name, ..)| name == "started").unwrap();
        started.2["kv_warmth"].as_bool().unwrap()
    };
    let first = cluster.client.run(turn(5)).await;
    first.check();
    assert!(!warmth(&first));
    for _ in 0..2 {
        let next = cluster.client.run(turn(5)).await;
        assert_eq!((next.node(), warmth(&next)), (first.node(), true));
    }
    let view = eventually("the last turn is accounted for", SOON, || async {
        let view = cluster.client.get_json(&path).await?;
        (view["tokens_used"] == 15).then_some(view)
    })
    .await;
    assert_eq!(view["turns"], 3, "{view}");
    assert_eq!((&view["tokens_budget_remaining"], &view["kv_warmth"]), (&json!(5), &json!(true)));
    let (status, body) = cluster.client.refused(&turn(6)).await;
    assert_eq!((status, &body["code"]), (429, &json!("BUDGET_EXCEEDED")), "{body}");
    assert!(cluster.client.run(turn(1)).await.completed());
    let (status, body) = cluster.client.refused(&turn(1)).await;
    assert_eq!((status, &body["code"]), (429, &json!("BUDGET_EXCEEDED")), "its turns are used: {body}");
    let delete = async || {
        cluster.client.request(reqwest::Method::DELETE, &path).send().await.unwrap().status().as_u16()
    };
    assert_eq!((delete().await, delete().await), (204, 404));
    let anew = cluster.client.run(turn(5)).await;
    anew.check();
    assert!(anew.completed() && !warmth(&anew));
}

// CLOUD-1734
// CLOUD-1736
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiting_client_is_told_its_place_and_a_deadline_that_cannot_be_met_is_refused() {
    let engine = Engine::Fake { slots: 1, first_token_ms: 20, pace_ms: 50, dialect: "llamacpp" };
    let cluster = Cluster::start(fleet(1, engine)).await;
    let measured = cluster.client.run(cluster.task(20)).await;
    measured.check();
    let running = cluster.client.post("/v2/tasks", &cluster.task(40)).await;
    assert_eq!(running.status(), 202);
    let before = cluster.client.post("/v2/tasks", &cluster.task(20)).await;
    let before: Value = before.json().await.unwrap();
    let (position, predicted) = (&before["queue_position"], before["predicted_start_ms"].as_u64().unwrap());
    assert_eq!(position, 0);
    assert!((800..=8_000).contains(&predicted), "40 tokens of 50 ms and more run before it: {predicted}");
    let mut hasty = cluster.task(2);
    hasty["deadline_ms"] = json!(200);
    let (status, body) = cluster.client.refused(&hasty).await;
    assert_eq!(
        (status, &body["code"], &body["policy_label"]),
        (429, &json!("ADMISSION_REJECT"), &json!("deadline"))
    );
    let waited = cluster.client.run(cluster.task(2)).await;
    waited.check();
    let metrics: Vec<&Value> =
        waited.events.iter().filter(|(name, ..)| name == "metrics").map(|(.., data)| data).collect();
    let positions: Vec<u64> = metrics.iter().filter_map(|m| m["queue_position"].as_u64()).collect();
    assert!(positions.first() == Some(&1) && positions.is_sorted_by(|a, b| a >= b), "{positions:?}");
    assert!(metrics.iter().all(|m| m["predicted_start_ms"].is_u64()), "{metrics:?}");
    // A verbose reader hears how it stands also while the task runs.
    let long: Value = cluster.client.post("/v2/tasks", &cluster.task(50)).await.json().await.unwrap();
    let path = long["streams"]["sse_verbose"].as_str().unwrap();
    let verbose = cluster.client.follow_at(path).await;
    verbose.check();
    let names = verbose.names();
    let first = names.iter().position(|name| *name == "token").unwrap();
    assert!(names[first..].contains(&"metrics"), "{names:?}");
}

// CLOUD-1735
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_may_drop_the_task_that_waits_longest() {
    let control = vec![
        ("ORCHESTRATORD_ADMISSION_CAPACITY", "2".to_owned()),
        ("ORCHESTRATORD_ADMISSION_POLICY", "drop-lru".to_owned()),
    ];
    let engine = Engine::Fake { slots: 1, first_token_ms: 20, pace_ms: 40, dialect: "llamacpp" };
    let cluster = Cluster::start(Options { control, ..fleet(1, engine) }).await;
    let mut ids = Vec::new();
    for _ in 0..4 {
        let accepted: Value = cluster.client.post("/v2/tasks", &cluster.task(20)).await.json().await.unwrap();
        ids.push(accepted["task_id"].as_str().unwrap().to_owned());
    }
    for (n, id) in ids.iter().enumerate() {
        let transcript = cluster.client.follow(id, None, usize::MAX).await;
        transcript.check();
        let expected = (n == 1).then_some("QUEUE_FULL_DROP_LRU");
        assert_eq!(transcript.error(), expected, "task {n}");
    }
}

// CLOUD-1760
// CLOUD-1761
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_are_listed_and_changes_of_the_cluster_are_followed() {
    let cluster = Cluster::start(fleet(2, quick(4))).await;
    let client = cluster.client.clone();
    let follower = tokio::spawn(async move { client.follow_changes("/v2/events", 3, SOON).await });
    // A follower hears what happens after it has come.
    let changes = async {
        let mut seen = 0;
        while !follower.is_finished() {
            cluster.client.run(cluster.task(1)).await.check();
            seen += 1;
            assert!(seen < 100, "the follower hears nothing");
        }
        seen
    };
    let ran = changes.await;
    let events = follower.await.unwrap();
    assert!(events.iter().any(|(name, data)| name == "task" && data["state"] == "completed"), "{events:?}");
    let page = cluster.client.get_json("/v2/tasks?state=completed&limit=1").await.unwrap();
    assert_eq!(page["tasks"].as_array().unwrap().len(), 1);
    if ran > 2
        && let Some(next) = page["next"].as_str()
    {
        let second = cluster.client.get_json(&format!("/v2/tasks?limit=1&after={next}")).await.unwrap();
        assert_ne!(second["tasks"][0]["task_id"], page["tasks"][0]["task_id"]);
    }
    for (query, field) in
        [("limit=0", "limit"), ("state=unknown", "state"), ("after=x", "after"), ("node_id=a/b", "node_id")]
    {
        let response = cluster.client.get(&format!("/v2/tasks?{query}")).await.unwrap();
        assert_eq!(response.status(), 400, "{query}");
        let body: Value = response.json().await.unwrap();
        assert!(body["message"].as_str().unwrap().contains(field), "{body}");
    }
    let id = page["tasks"][0]["task_id"].as_str().unwrap();
    assert_eq!(cluster.client.get(&format!("/v2/tasks/{id}/explain")).await.unwrap().status(), 404);
}

// CLOUD-1620
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_drains_with_progress_until_its_deadline_and_is_opened_again() {
    let engine = Engine::Fake { slots: 2, first_token_ms: 5, pace_ms: 50, dialect: "llamacpp" };
    let cluster = Cluster::start(fleet(1, engine)).await;
    let (client, long) = (cluster.client.clone(), cluster.task(2_000));
    let running = tokio::spawn(async move { client.run(long).await });
    eventually("it runs", SOON, || async {
        (cluster.client.node("gpu-node-1").await?.running_attempts.len() == 1).then_some(())
    })
    .await;
    let order = |what: &str| format!("/v2/pools/pool-0/{what}");
    let (status, body) = post(&cluster.client, &order("drain"), json!({"deadline_ms": 1_500})).await;
    assert_eq!((status, &body["drain"]["tasks_left"]), (202, &json!(1)), "{body}");
    assert!(body["drain"]["deadline_ms"].as_u64().unwrap() <= 1_500);
    let pool = eventually("the drain is seen", SOON, || async {
        let health = cluster.client.get_json("/v2/pools/pool-0/health").await?;
        (health["draining"] == true).then_some(health)
    })
    .await;
    assert_eq!((&pool["ready"], &pool["state"]), (&json!(false), &json!("draining")));
    let transcript = running.await.unwrap();
    transcript.check();
    assert_eq!(
        transcript.error(),
        Some("WORKER_RESET"),
        "the deadline ended it: {:?}",
        transcript.events.last()
    );
    let (status, body) = post(&cluster.client, &order("reload"), json!({"new_model_ref": "other"})).await;
    assert_eq!((status, &body["code"]), (400, &json!("UNSUPPORTED")), "{body}");
    let (status, body) = post(&cluster.client, &order("purge"), json!({})).await;
    assert_eq!((status, &body["code"]), (400, &json!("UNSUPPORTED")), "{body}");
    let (status, _) = post(&cluster.client, &order("reload"), json!({})).await;
    assert_eq!(status, 202);
    let transcript = cluster.client.run(cluster.task(2)).await;
    transcript.check();
    assert!(transcript.completed());
    let (status, body) = post(&cluster.client, "/v2/pools/none/drain", json!({})).await;
    assert_eq!((status, &body["code"]), (404, &json!("NOT_FOUND")));
}

// CLOUD-1621
// CLOUD-1622
// CLOUD-1630
// CLOUD-1632
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_staged_model_is_seen_verified_and_retired_by_its_entry() {
    let mut cluster = Cluster::start(fleet(1, quick(4))).await;
    let source = cluster.dir.path().join("weights.gguf");
    std::fs::write(&source, b"weights").unwrap();
    let folder = cluster.models_dir(0);
    let models = |words: &[&str]| {
        let output = std::process::Command::new(e2e_cloud::process::program("pool-managerd"))
            .args(["models"])
            .args(words)
            .env("POOL_MANAGERD_MODELS_DIR", &folder)
            .output()
            .unwrap();
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.success(), text)
    };
    let path = source.to_str().unwrap();
    let wrong = format!("sha256:{}", "0".repeat(64));
    let (good, text) = models(&["stage", "fake-model", path, "--digest", &wrong]);
    assert!(!good && text.contains("expected"), "{text}");
    assert_eq!(models(&["list"]), (true, String::new()));
    // Of the seven bytes "weights".
    let digest = "sha256:9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c";
    let (good, text) = models(&["stage", "fake-model", path]);
    assert!(good && text.contains("7 bytes"), "{text}");
    assert!(text.contains(digest), "{text}");
    assert!(models(&["verify"]).1.starts_with("good fake-model"));
    let staged = eventually("the node reports it", SOON, || async {
        let models = cluster.client.get_json("/v2/catalog/availability").await?;
        let model = models["models"].as_array()?.iter().find(|m| m["model_id"] == "fake-model")?.clone();
        Some(model["staged"].as_array()?.first()?.clone())
    })
    .await;
    assert_eq!(
        (&staged["node_id"], &staged["digest"], &staged["bytes"]),
        (&json!("gpu-node-1"), &json!(digest), &json!(7))
    );

    let entry = json!({"model_id": "fake-model", "digest": digest, "description": "for tests"});
    assert_eq!(post(&cluster.client, "/v2/catalog/models", entry.clone()).await.0, 201);
    assert_eq!(post(&cluster.client, "/v2/catalog/models", entry).await.0, 200);
    let (_, verified) = post(&cluster.client, "/v2/catalog/models/fake-model/verify", json!({})).await;
    assert_eq!(
        (&verified["verified"], &verified["nodes"][0]["matches"]),
        (&json!(true), &json!(true)),
        "{verified}"
    );
    let retire = json!({"state": "Retired"});
    assert_eq!(post(&cluster.client, "/v2/catalog/models/fake-model/state", retire).await.0, 200);
    let refused = async |cluster: &Cluster| {
        eventually("the model is refused", SOON, || async {
            let (status, body) = cluster.client.refused(&cluster.task(1)).await;
            (status == 503).then(|| body["message"].as_str().unwrap_or_default().to_owned())
        })
        .await
    };
    assert!(refused(&cluster).await.contains("retired"));
    cluster.control.as_mut().unwrap().kill();
    cluster.start_control();
    cluster.wait_online(0).await;
    assert!(refused(&cluster).await.contains("retired"), "the entry outlives the control plane");
    let request = cluster.client.request(reqwest::Method::DELETE, "/v2/catalog/models/fake-model");
    assert_eq!(request.send().await.unwrap().status(), 204);
    assert!(cluster.client.run(cluster.task(1)).await.completed());
    let (good, text) = models(&["remove", "fake-model"]);
    assert!(good && text.starts_with(&format!("removed fake-model {digest}")), "{text}");
    assert_eq!(models(&["list"]), (true, String::new()));
    assert_eq!(cluster.client.get("/v2/catalog/models/fake-model").await.unwrap().status(), 404);
}

// CLOUD-1623
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_artifact_comes_back_byte_for_byte() {
    let cluster = Cluster::start(fleet(1, quick(1))).await;
    let document = br#"{ "plan" : [1,2,   3] }"#;
    let kept = cluster.client.request(reqwest::Method::POST, "/v2/artifacts").body(document.as_slice());
    let kept = kept.send().await.unwrap();
    assert_eq!(kept.status(), 201);
    let kept: Value = kept.json().await.unwrap();
    let path = format!("/v2/artifacts/{}", kept["id"].as_str().unwrap());
    let again = cluster.client.get(&path).await.unwrap();
    assert_eq!(again.bytes().await.unwrap().as_ref(), document);
    let none = format!("/v2/artifacts/sha256:{}", "0".repeat(64));
    assert_eq!(cluster.client.get(&none).await.unwrap().status(), 404);
    assert_eq!(cluster.client.get("/v2/artifacts/..%2f..%2fetc").await.unwrap().status(), 400);
    let bad = cluster.client.request(reqwest::Method::POST, "/v2/artifacts").body("{");
    assert_eq!(bad.send().await.unwrap().status(), 400);
}
