//! Nodes that come, go, and come back.

use std::time::{Duration, Instant};

use e2e_cloud::cluster::TOKEN;
use e2e_cloud::{Client, Cluster, Engine, Options, eventually};
use nix::sys::signal::Signal;
use pool_registry_types::node::Liveness;
use pool_registry_types::pool::EngineKind;
use serde_json::{Value, json};

// CLOUD-2310
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_control_plane_has_its_nodes_back_within_one_interval() {
    let engine = Engine::Fake { slots: 4, first_token_ms: 20, pace_ms: 50, dialect: "llamacpp" };
    let mut cluster = Cluster::start(Options { nodes: 2, engine, ..Options::default() }).await;
    let running = cluster.client.post("/v2/tasks", &cluster.task(2_000)).await;
    assert_eq!(running.status(), 202);
    cluster.control.as_mut().unwrap().kill();
    cluster.start_control();
    let started = Instant::now();
    // Two heartbeat intervals bound the test: one is the promise, and starting takes its time too.
    for n in 0..2 {
        cluster.wait_online(n).await;
    }
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    for n in 0..2 {
        let engine = Client::new(&cluster.engine_url(n), None);
        eventually("what ran before is stopped", Duration::from_secs(5), || async {
            let slots = engine.get_json("/slots").await?;
            slots.as_array()?.iter().all(|slot| slot["is_processing"] == false).then_some(())
        })
        .await;
    }
    let transcript = cluster.client.run(cluster.task(3)).await;
    transcript.check();
    assert!(transcript.completed());
}

// CLOUD-2311
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_told_to_stop_finishes_its_work_and_leaves() {
    let mut cluster = Cluster::start(Options::default()).await;
    let client = cluster.client.clone();
    let task = cluster.task(40);
    let reading = tokio::spawn(async move { client.run(task).await });
    eventually("the task runs", Duration::from_secs(5), || async {
        cluster.client.nodes().await.iter().any(|node| !node.running_attempts.is_empty()).then_some(())
    })
    .await;
    let busy =
        cluster.client.nodes().await.iter().position(|node| !node.running_attempts.is_empty()).unwrap();
    let daemon = cluster.nodes[busy].daemon.as_mut().unwrap();
    daemon.signal(Signal::SIGTERM);
    let status = tokio::task::block_in_place(|| daemon.wait(Duration::from_secs(15)));
    assert!(status.success(), "{status}:\n{}", daemon.log());
    let transcript = reading.await.unwrap();
    transcript.check();
    assert!(transcript.completed(), "{:?}", transcript.names());
    let id = cluster.nodes[busy].id.clone();
    assert!(cluster.client.node(&id).await.is_none(), "it has deregistered");
    cluster.start_daemon(busy);
    cluster.wait_online(busy).await;
}

// CLOUD-2312
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_control_plane_finishes_what_runs_and_takes_nothing_new() {
    let mut cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    let client = cluster.client.clone();
    let task = cluster.task(60);
    let reading = tokio::spawn(async move { client.run(task).await });
    eventually("the task runs", Duration::from_secs(5), || async {
        cluster.client.nodes().await.iter().any(|node| !node.running_attempts.is_empty()).then_some(())
    })
    .await;
    cluster.control.as_ref().unwrap().signal(Signal::SIGTERM);
    let (status, body) = eventually("new tasks are refused", Duration::from_secs(2), || async {
        let (status, body) = cluster.client.refused(&cluster.task(1)).await;
        (status == 503).then_some((status, body))
    })
    .await;
    assert_eq!((status, body["code"].as_str()), (503, Some("DRAINING")));
    let transcript = reading.await.unwrap();
    transcript.check();
    assert!(transcript.completed());
    let status =
        tokio::task::block_in_place(|| cluster.control.as_mut().unwrap().wait(Duration::from_secs(10)));
    assert!(status.success());
}

// CLOUD-1942
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_that_stops_cuts_off_what_runs_by_its_links_and_logs_no_panic() {
    let control = vec![("ORCHESTRATORD_SHUTDOWN_GRACE_SECS", "1".to_owned())];
    let mut cluster = Cluster::start(Options { control, ..Options::default() }).await;
    let task = cluster.task(2_000);
    let accepted: Value = cluster.client.post("/v2/tasks", &task).await.json().await.unwrap();
    let id = accepted["task_id"].as_str().unwrap().to_owned();
    let begun = cluster.client.follow_tokens(&id, 2).await;
    let busy = cluster.nodes.iter().position(|node| begun.node() == Some(&node.id)).unwrap();
    // The other one has gone without a word.
    cluster.nodes[1 - busy].daemon.as_mut().unwrap().kill();
    let control = cluster.control.as_mut().unwrap();
    control.signal(Signal::SIGTERM);
    let status = tokio::task::block_in_place(|| control.wait(Duration::from_secs(10)));
    assert!(status.success() && !control.log().contains("panicked"), "{}", control.log());
    let engine = Client::new(&cluster.engine_url(busy), None);
    // A node that heard nothing would keep the attempt for 15 s and longer.
    eventually("the attempt is stopped at its engine", Duration::from_secs(5), || async {
        (engine.get_json("/fake/busy").await?["busy"] == 0).then_some(())
    })
    .await;
}

// CLOUD-2313
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_node_is_suspect_and_then_offline_and_comes_back() {
    let cluster = Cluster::start(Options::default()).await;
    cluster.nodes[0].daemon.as_ref().unwrap().signal(Signal::SIGSTOP);
    let stopped = Instant::now();
    cluster.wait_not_online(0, Duration::from_secs(3)).await;
    cluster.wait_liveness(0, Liveness::Offline, Duration::from_secs(5)).await;
    assert!(stopped.elapsed() < Duration::from_secs(5), "{:?}", stopped.elapsed());
    let view = cluster.client.node(&cluster.nodes[0].id).await.unwrap();
    assert!(view.reason.is_some());
    cluster.nodes[0].daemon.as_ref().unwrap().signal(Signal::SIGCONT);
    cluster.wait_online(0).await;
}

// CLOUD-2314
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn load_spreads_over_equal_nodes() {
    let cluster = Cluster::start(Options::default()).await;
    let runs = (0..8).map(|_| cluster.client.run(cluster.task(20)));
    let transcripts = futures::future::join_all(runs).await;
    let on_first = transcripts.iter().filter(|t| t.node() == Some("gpu-node-1")).count();
    transcripts.iter().for_each(e2e_cloud::Transcript::check);
    assert_eq!(on_first, 4, "four slots each, eight tasks");
}

// CLOUD-2315
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_engine_is_seen_and_a_removed_one_is_not_used() {
    let mut cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    let file = cluster.nodes[0].runtime_dir.join("pool-0-r0.json");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    let client = cluster.client.clone();
    eventually("the pool is gone", Duration::from_secs(2), || async {
        client.node("gpu-node-1").await?.pools.is_empty().then_some(())
    })
    .await;
    std::fs::write(&file, text).unwrap();
    cluster.wait_online(0).await;
    cluster.nodes[0].engine.as_mut().unwrap().kill();
    eventually("a dead engine's pool is gone", Duration::from_secs(3), || async {
        client.node("gpu-node-1").await?.pools.iter().all(|pool| !pool.report.ready).then_some(())
    })
    .await;
}

// CLOUD-1101
// CLOUD-1110
// CLOUD-1113
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_daemons_want_the_token() {
    let cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    let node = format!("http://127.0.0.1:{}", cluster.nodes[0].port);
    for base in [&cluster.client.base, &node] {
        for (token, code) in [(None, "MISSING_TOKEN"), (Some("a-wrong-token"), "BAD_TOKEN")] {
            let client = Client::new(base, token);
            for path in ["/v2/nodes", "/v2/pools", "/metrics", "/openapi.json", "/v2/tasks/x", "/nowhere"] {
                let response = client.get(path).await.unwrap();
                assert_eq!(response.status(), 401, "{base}{path}");
                assert!(response.headers().contains_key("www-authenticate"));
                assert!(response.headers().contains_key("x-correlation-id"));
                let body: serde_json::Value = response.json().await.unwrap();
                assert_eq!(body["code"], code);
                assert!(body["correlation_id"].is_string());
            }
            assert_eq!(client.get("/health/live").await.unwrap().status(), 200);
        }
        assert_eq!(Client::new(base, Some(TOKEN)).get("/metrics").await.unwrap().status(), 200);
    }
}

// CLOUD-2316
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_and_a_second_node_of_the_same_name_do_not_join() {
    let mut cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    let boot_id = cluster.client.node("gpu-node-1").await.unwrap().boot_id;
    for (name, token, problem) in
        [("twin", TOKEN, "NODE_ID_CONFLICT"), ("stranger", "another-token", "BAD_TOKEN")]
    {
        let port = e2e_cloud::process::free_port();
        let runtime_dir = cluster.dir.path().join(name);
        let mut command = std::process::Command::new(e2e_cloud::process::program("pool-managerd"));
        command
            .env("POOL_MANAGERD_NODE_ID", if name == "twin" { "gpu-node-1" } else { name })
            .env("POOL_MANAGERD_ADDR", format!("127.0.0.1:{port}"))
            .env("POOL_MANAGERD_RUNTIME_DIR", &runtime_dir)
            .env("ORCHESTRATORD_URL", &cluster.client.base)
            .env("LLORCH_API_TOKEN", token);
        let daemon = e2e_cloud::Process::start(command, &cluster.log(name));
        let client = Client::new(&format!("http://127.0.0.1:{port}"), Some(token));
        let message = eventually("the refusal is shown", Duration::from_secs(5), || async {
            let response = client.get("/health/ready").await.ok()?;
            assert_eq!(response.status(), 503);
            let body: serde_json::Value = response.json().await.ok()?;
            let message = body["message"].as_str()?.to_owned();
            message.contains(problem).then_some(message)
        })
        .await;
        assert!(message.contains("not part of the cluster"), "{message}");
        drop(daemon);
    }
    let nodes = cluster.client.nodes().await;
    assert_eq!((nodes.len(), nodes[0].boot_id), (1, boot_id));
    let transcript = cluster.client.run(cluster.task(2)).await;
    transcript.check();
    assert!(transcript.completed());
    cluster.nodes[0].daemon.as_mut().unwrap().kill();
}

// CLOUD-2665
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_cannot_be_dialled_hears_of_it_says_so_and_is_ready_once_it_can() {
    let cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    // The address that it gives leads nowhere until something listens there.
    let (own, given) = (e2e_cloud::process::free_port(), e2e_cloud::process::free_port());
    let mut command = std::process::Command::new(e2e_cloud::process::program("pool-managerd"));
    command
        .env("POOL_MANAGERD_NODE_ID", "walled-in")
        .env("POOL_MANAGERD_ADDR", format!("127.0.0.1:{own}"))
        .env("POOL_MANAGERD_ADVERTISE_URL", format!("http://127.0.0.1:{given}"))
        .env("POOL_MANAGERD_RUNTIME_DIR", cluster.dir.path().join("walled-in"))
        .env("ORCHESTRATORD_URL", &cluster.client.base)
        .env("LLORCH_API_TOKEN", TOKEN);
    let daemon = e2e_cloud::Process::start(command, &cluster.log("walled-in"));
    let client = Client::new(&format!("http://127.0.0.1:{own}"), Some(TOKEN));
    let says = |part: &'static str| {
        let client = client.clone();
        async move {
            let response = client.get("/health/ready").await.ok()?;
            let body: Value = response.json().await.ok()?;
            body["message"].as_str().is_some_and(|message| message.contains(part)).then_some(())
        }
    };
    let reason = "the control plane takes it for suspect: dialling its address failed";
    eventually("it says why it gets no tasks", Duration::from_secs(10), || says(reason)).await;
    assert_eq!(client.get("/health/ready?local=true").await.unwrap().status(), 200, "it is well itself");
    let gauge = client.get("/metrics").await.unwrap().text().await.unwrap();
    for name in ["llorch_agent_registered", "llorch_node_registered"] {
        assert!(gauge.contains(&format!("\n{name}{{node_id=\"walled-in\"}} 0\n")), "{gauge}");
    }
    let forward = e2e_cloud::process::program("tcp-proxy");
    let mut proxy = std::process::Command::new(forward);
    proxy.arg(format!("127.0.0.1:{given}=127.0.0.1:{own}"));
    let _proxy = e2e_cloud::Process::start(proxy, &cluster.log("proxy"));
    eventually("it is ready", Duration::from_secs(15), || async {
        (client.get("/health/ready").await.ok()?.status() == 200).then_some(())
    })
    .await;
    let log = std::fs::read_to_string(cluster.log("walled-in")).unwrap();
    for line in ["the control plane sends this node no tasks", "the control plane sends this node tasks"] {
        assert_eq!(log.matches(line).count(), 1, "{line}: {log}");
    }
    drop(daemon);
}

/// A node of a name that is taken, which tries again each second; its engine is the first node's.
fn twin(cluster: &Cluster, boots: u32) -> e2e_cloud::Process {
    let name = format!("twin-{boots}");
    let runtime_dir = cluster.dir.path().join(&name);
    std::fs::create_dir_all(&runtime_dir).unwrap();
    for file in std::fs::read_dir(&cluster.nodes[0].runtime_dir).unwrap().flatten() {
        if file.path().extension().is_some_and(|extension| extension == "json") {
            std::fs::copy(file.path(), runtime_dir.join(file.file_name())).unwrap();
        }
    }
    let mut command = std::process::Command::new(e2e_cloud::process::program("pool-managerd"));
    command
        .env("POOL_MANAGERD_NODE_ID", "gpu-node-1")
        .env("POOL_MANAGERD_ADDR", format!("127.0.0.1:{}", e2e_cloud::process::free_port()))
        .env("POOL_MANAGERD_RUNTIME_DIR", &runtime_dir)
        .env("POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS", "1")
        .env("ORCHESTRATORD_URL", &cluster.client.base)
        .env("LLORCH_API_TOKEN", TOKEN);
    e2e_cloud::Process::start(command, &cluster.log(&name))
}

// CLOUD-2690
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_stopped_under_a_stream_keeps_its_place_and_a_dead_one_leaves_it_to_its_successor() {
    use nix::sys::signal::kill;
    let control = vec![("ORCHESTRATORD_NODE_TIMEOUT_SECS", "30".to_owned())];
    let mut cluster = Cluster::start(Options { nodes: 1, control, ..Options::default() }).await;
    let boot_id = cluster.client.node("gpu-node-1").await.unwrap().boot_id;
    let pid =
        nix::unistd::Pid::from_raw(i32::try_from(cluster.nodes[0].daemon.as_ref().unwrap().pid()).unwrap());
    let client = cluster.client.clone();
    let task = cluster.task(400);
    let streamed = tokio::spawn(async move { client.run(task).await });
    tokio::time::sleep(Duration::from_millis(500)).await;
    kill(pid, Signal::SIGSTOP).unwrap();
    let clone = twin(&cluster, 1);
    tokio::time::sleep(Duration::from_secs(3)).await;
    kill(pid, Signal::SIGCONT).unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(
        cluster.client.node("gpu-node-1").await.unwrap().boot_id,
        boot_id,
        "a living node keeps its place"
    );
    let transcript = streamed.await.unwrap();
    transcript.check();
    assert!(transcript.completed(), "{:?}", transcript.events.last());
    // It dies, and the other takes its place long before the lease is over.
    let died = Instant::now();
    cluster.nodes[0].daemon.as_mut().unwrap().kill();
    eventually("the successor is taken", Duration::from_secs(20), || async {
        let node = cluster.client.node("gpu-node-1").await?;
        (node.boot_id != boot_id && node.liveness == Liveness::Online).then_some(())
    })
    .await;
    assert!(died.elapsed() < Duration::from_secs(15), "half of the lease: {:?}", died.elapsed());
    let transcript = cluster.client.run(cluster.task(4)).await;
    assert!(transcript.completed(), "{:?}", transcript.events.last());
    drop(clone);
}

// CLOUD-1515
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_answers_before_prefill_and_shows_that_it_lives() {
    let engine = Engine::Fake { slots: 1, first_token_ms: 2_500, pace_ms: 1, dialect: "llamacpp" };
    // An attempt that the control plane does not know is ended at the next heartbeat: none comes here.
    let control = vec![
        ("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "60".to_owned()),
        ("ORCHESTRATORD_NODE_TIMEOUT_SECS", "180".to_owned()),
    ];
    let cluster = Cluster::start(Options { nodes: 1, engine, control, ..Options::default() }).await;
    // It has heard that it gets tasks, and does not ask any more.
    cluster.wait_ready(0).await;
    let view = cluster.client.node("gpu-node-1").await.unwrap();
    let body = serde_json::json!({
        "task_id": "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11", "attempt_id": "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b12",
        "node_id": "gpu-node-1", "boot_id": view.boot_id, "log_id": "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b13",
        "first_index": 5, "task": {"model_ref": "fake-model", "prompt": "x", "max_tokens": 1},
    });
    let asked = Instant::now();
    let response = cluster.node_client(0).post("/v2/pools/pool-0/infer", &body).await;
    assert!(asked.elapsed() < Duration::from_secs(1), "the headers came after {:?}", asked.elapsed());
    assert_eq!(response.status(), 200);
    assert!(response.headers().contains_key("x-llorch-report-seq"));
    assert_eq!(response.headers()["x-llorch-replica-id"], "r0");
    let text = response.text().await.unwrap();
    assert_eq!(text.matches(": ka\n\n").count(), 2, "{text}");
    assert!(text.contains("2b13:5\nevent: token\n") && text.contains("2b13:6\nevent: end\n"), "{text}");
    assert!(text.trim_end().lines().last().unwrap().starts_with(": report-seq "), "{text}");
}

// CLOUD-2354
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_documented_route_is_served_and_the_page_needs_no_other_host() {
    let cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    let document = cluster.client.get_json("/openapi.json").await.unwrap();
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.len() >= 12, "{paths:?}");
    for (path, methods) in paths {
        for method in methods.as_object().unwrap().keys() {
            let method = reqwest::Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            let path = path.replace("{id}", "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11");
            let request = cluster.client.request(method.clone(), &path).timeout(Duration::from_secs(5));
            let response = request.send().await.unwrap();
            let kind = response.headers().get("content-type").and_then(|kind| kind.to_str().ok());
            if kind == Some("text/event-stream") {
                // It has no end of its own.
                assert_eq!(response.status(), 200, "{method} {path}");
                continue;
            }
            let text = response.text().await.unwrap();
            assert!(
                !text.contains("no such path") && !text.contains("METHOD_NOT_ALLOWED"),
                "{method} {path}: {text}"
            );
        }
    }
    let open = Client::new(&cluster.client.base, None);
    let page = open.get("/docs/").await.unwrap().text().await.unwrap();
    assert!(
        page.contains("swagger-initializer.js") && !page.contains("http://") && !page.contains("https://"),
        "{page}"
    );
    let script = open.get("/docs/swagger-initializer.js").await.unwrap().text().await.unwrap();
    assert!(script.contains("/openapi.json") && script.contains("Authorization"));
    assert_eq!(open.get("/docs/swagger-ui-bundle.js").await.unwrap().status(), 200);
}

// CLOUD-1109
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_kind_of_engine_costs_its_own_pool_only() {
    let cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    let register = json!({
        "node_id": "newer", "machine_id": "m", "boot_id": "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11",
        "address": "http://127.0.0.1:1", "version": "9",
    });
    let response = cluster.client.post("/v2/nodes/register", &register).await;
    assert_eq!(response.status(), 200);
    let epoch = response.json::<Value>().await.unwrap()["epoch"].clone();
    let pool = |pool_id: &str, engine: &str| {
        json!({
            "pool_id": pool_id, "state": "ready", "ready": true, "engine": engine, "models": ["of-newer"],
            "replicas": [{"replica_id": "r0", "ready": true, "slots_total": 1}],
        })
    };
    let beat = json!({
        "epoch": epoch, "seq": 1, "timestamp": "",
        "pools": [pool("later", "sglang"), pool("known", "llamacpp"), {"kind": "not a pool"}],
        "gpus": [{"device_id": "cxl:0"}],
    });
    let response = cluster.client.post("/v2/nodes/newer/heartbeat", &beat).await;
    assert_eq!(response.status(), 200);
    let node = cluster.client.node("newer").await.unwrap();
    let shown: Vec<_> =
        node.pools.iter().map(|pool| (pool.report.pool_id.as_str(), pool.report.engine)).collect();
    assert_eq!(shown, [("known", Some(EngineKind::LlamaCpp)), ("later", None)]);
}
