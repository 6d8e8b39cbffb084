//! Engines as the field has them: that come back as another model, are too busy to answer, fail
//! one request and not the next, think, and go on with what nobody waits for any more.

#![expect(clippy::print_stdout, reason = "the figures of a run are part of its result")]

use std::time::{Duration, Instant};

use e2e_cloud::process::{Process, program};
use e2e_cloud::{Client, Cluster, Engine, Options, Transcript, eventually};
use serde_json::{Value, json};

/// A fake engine on a port of its own choice, or on the one where another was.
fn engine(cluster: &Cluster, n: usize, port: u16, arguments: &[&str]) -> Process {
    let mut command = std::process::Command::new(program("fake-engine"));
    command.args(["--addr", &format!("127.0.0.1:{port}"), "--pool-id", "pool-0", "--replica-id", "r0"]);
    command.arg("--handoff-dir").arg(&cluster.nodes[n].runtime_dir).args(arguments);
    Process::start(command, &cluster.log(&format!("engine-{n}-{}", arguments.join("-").replace('/', "_"))))
}

/// A cluster of nodes without engines.
async fn empty(nodes: usize) -> Cluster {
    let mut cluster = Cluster::without_nodes(Options { nodes, engine: Engine::None, ..Options::default() });
    cluster.start_control();
    for n in 0..nodes {
        cluster.add_node(n);
    }
    cluster
}

async fn pool(cluster: &Cluster, n: usize) -> Option<Value> {
    cluster.node_client(n).get_json("/v2/pools/pool-0/status").await
}

fn task(model: &str, tokens: u32) -> Value {
    json!({"model_ref": model, "prompt": "once upon a time", "max_tokens": tokens})
}

fn chat(tokens: u32, more: Value) -> Value {
    let messages = json!([{"role": "user", "content": "hi"}]);
    let mut task = json!({"model_ref": "fake-model", "messages": messages, "max_tokens": tokens});
    task.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    task
}

async fn run(cluster: &Cluster, task: Value) -> Transcript {
    let transcript = cluster.client.run(task).await;
    transcript.check();
    transcript
}

fn port_of(url: &str) -> u16 {
    url.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port")
}

// CLOUD-2485
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_comes_back_as_another_one_serves_only_what_it_has() {
    let cluster = empty(1).await;
    let alpha = engine(&cluster, 0, 0, &["--bare", "--model", "alpha", "--slots", "4"]);
    eventually("alpha is served", Duration::from_secs(10), || async {
        pool(&cluster, 0).await.filter(|pool| pool["ready"] == true)
    })
    .await;
    cluster.wait_online(0).await;
    assert_eq!(run(&cluster, task("alpha", 3)).await.text(), "w0 w1 w2 ");
    let port = port_of(&cluster.engine_url(0));
    // The other one is there before the next look: what alpha's reports say is still believed.
    drop(alpha);
    let _beta = engine(&cluster, 0, port, &["--bare", "--model", "beta", "--slots", "1"]);
    let late =
        run(&cluster, json!({"model_ref": "alpha", "prompt": "x", "max_tokens": 3, "deadline_ms": 4_000}))
            .await;
    assert!(!late.completed(), "beta's text for alpha: {:?}", late.text());
    let known = eventually("beta is served", Duration::from_secs(10), || async {
        pool(&cluster, 0).await.filter(|pool| pool["ready"] == true && pool["models"] == json!(["beta"]))
    })
    .await;
    assert_eq!(known["replicas"][0]["slots_total"], 1, "{known}");
    eventually("its model is known", Duration::from_secs(5), || async {
        let models = cluster.client.get_json("/v2/catalog/availability").await?;
        let models = models["models"].as_array()?.clone();
        models.iter().any(|model| model["model_id"] == "beta").then_some(())
    })
    .await;
    assert!(run(&cluster, task("beta", 3)).await.completed());
}

// CLOUD-2495
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_engine_keeps_its_tasks_and_a_stopped_one_is_found_out() {
    let engine = Engine::Fake { slots: 1, first_token_ms: 0, pace_ms: 50, dialect: "vllm" };
    let mut cluster = Cluster::start(Options { nodes: 1, engine, ..Options::default() }).await;
    cluster.fault(0, json!({"kind": "busy", "health_ms": 6_000})).await;
    // 14 s of tokens, a second task that waits all the while, and a report every second.
    let (first, second) = tokio::join!(run(&cluster, cluster.task(280)), async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        run(&cluster, cluster.task(5)).await
    });
    assert!(first.completed() && second.completed(), "{:?} {:?}", first.error(), second.error());
    cluster.fault(0, json!({"kind": "none"})).await;
    cluster.wait_online(0).await;
    let pid = cluster.nodes[0].engine.as_ref().expect("an engine").pid();
    let engine = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("process ids are small"));
    nix::sys::signal::kill(engine, nix::sys::signal::Signal::SIGSTOP).expect("it lives");
    let stopped = Instant::now();
    eventually("a stopped engine is not ready", Duration::from_secs(15), || async {
        pool(&cluster, 0).await.filter(|pool| pool["ready"] == false)
    })
    .await;
    println!("SIGSTOP of an idle engine to not ready: {:.1} s", stopped.elapsed().as_secs_f64());
    nix::sys::signal::kill(engine, nix::sys::signal::Signal::SIGCONT).expect("it lives");
    cluster.wait_online(0).await;
    cluster.nodes[0].engine.take();
}

// CLOUD-1313
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_repeats_its_mistake_does_not_slow_the_others() {
    let engine = Engine::Fake { slots: 4, first_token_ms: 20, pace_ms: 20, dialect: "llamacpp" };
    let cluster = Cluster::start(Options { nodes: 1, engine, ..Options::default() }).await;
    let good = async |cluster: &Cluster| {
        let start = Instant::now();
        let tasks = (0..16).map(|_| run(cluster, cluster.task(15)));
        let all = futures::future::join_all(tasks).await;
        assert!(all.iter().all(Transcript::completed));
        start.elapsed()
    };
    let alone = good(&cluster).await;
    for round in 1..=2 {
        // As long as the others run, one after the other.
        let over = std::sync::atomic::AtomicBool::new(false);
        let poison = async {
            let mut ended = Vec::new();
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                let task = json!({"model_ref": "fake-model", "prompt": "poison", "max_tokens": 2});
                ended.push(run(&cluster, task).await);
            }
            ended
        };
        let others = async {
            // Behind sixteen others the mistake would come when nobody is served any more.
            tokio::time::sleep(Duration::from_millis(50)).await;
            let took = good(&cluster).await;
            over.store(true, std::sync::atomic::Ordering::Relaxed);
            took
        };
        let (beside, poisoned) = tokio::join!(others, poison);
        println!(
            "round {round}: 16 good tasks {} ms, beside the mistake {} ms",
            alone.as_millis(),
            beside.as_millis()
        );
        assert!(poisoned.iter().all(|transcript| transcript.error() == Some("POOL_UNAVAILABLE")));
        assert!(
            beside < alone * 2 + Duration::from_secs(1),
            "16 good tasks took {beside:?} instead of {alone:?}"
        );
        let reported =
            poisoned.iter().filter(|t| t.events.last().is_some_and(|(.., data)| data["retriable"] == false));
        assert!(reported.count() > 0, "the request's own fault is said");
    }
}

// CLOUD-1313
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_died_behind_its_server_is_tripped_by_three_tasks_which_others_serve() {
    let engine = Engine::Fake { slots: 4, first_token_ms: 5, pace_ms: 5, dialect: "vllm" };
    let cluster = Cluster::start(Options { nodes: 2, engine, ..Options::default() }).await;
    cluster.fault(0, json!({"kind": "status", "status": 500})).await;
    let sick = async || cluster.client.node("gpu-node-1").await.expect("it is known").pools[0].clone();
    let mut ran = 0;
    while !sick().await.tripped {
        assert!(ran < 20, "twenty tasks, and it still gets some");
        let transcript = run(&cluster, cluster.task(3)).await;
        assert!(transcript.completed(), "{:?}", transcript.error());
        ran += 1;
    }
    println!("tripped after {ran} tasks, all of them served elsewhere");
    assert!(ran >= 3, "three different tasks, not the tries of one");
    assert!(run(&cluster, cluster.task(3)).await.completed());
}

// CLOUD-2495
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long"]
async fn a_prompt_that_is_read_for_forty_seconds_keeps_its_pool() {
    let engine = Engine::Fake { slots: 1, first_token_ms: 40_000, pace_ms: 10, dialect: "llamacpp" };
    let cluster = Cluster::start(Options { nodes: 1, engine, ..Options::default() }).await;
    // Neither a word about its load nor about its health, and no token: as while it reads a prompt.
    cluster.fault(0, json!({"kind": "busy", "health_ms": 60_000})).await;
    let start = Instant::now();
    let (first, second) = tokio::join!(run(&cluster, cluster.task(5)), async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        run(&cluster, cluster.task(5)).await
    });
    println!("two prompts of 40 s in turn: {:.1} s", start.elapsed().as_secs_f64());
    assert!(first.completed() && second.completed(), "{:?} {:?}", first.error(), second.error());
}

// CLOUD-1520
// CLOUD-1521
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thoughts_are_output_and_the_same_whether_the_stream_may_go_on_or_not() {
    let engine = Engine::Fake { slots: 4, first_token_ms: 5, pace_ms: 30, dialect: "llamacpp" };
    let cluster = Cluster::start(Options { nodes: 2, engine, ..Options::default() }).await;
    for n in 0..2 {
        cluster.fault(n, json!({"kind": "thinks", "tokens": 4})).await;
    }
    let plain = run(&cluster, chat(8, json!({}))).await;
    // The delimiter between them is a token too.
    assert_eq!((plain.reasoning().trim_end(), plain.text().as_str()), ("w0 w1 w2 w3", "w4 w5 w6 "));
    assert_eq!(plain.events.last().unwrap().2["tokens_out"], 8, "thoughts are tokens");
    let raw = run(&cluster, chat(8, json!({"recovery": "continue"}))).await;
    assert_eq!(
        (raw.reasoning(), raw.text()),
        ("w0 w1 w2 w3".into(), plain.text()),
        "no delimiter in the text"
    );

    let dropped = run(&cluster, chat(8, json!({"reasoning": "drop"}))).await;
    assert_eq!((dropped.reasoning(), dropped.text()), (String::new(), plain.text()));
    assert_eq!(dropped.events.last().unwrap().2["tokens_out"], 8);

    // While only thoughts flow, and are left out, the engine works.
    for n in 0..2 {
        cluster.fault(n, json!({"kind": "thinks", "tokens": 80})).await;
    }
    let limits = json!({"reasoning": "drop", "timeouts": {"token_idle_ms": 500, "first_token_ms": 1_000}});
    let long = run(&cluster, chat(82, limits)).await;
    assert!(long.completed(), "{:?}", long.events.last());
    let cut = run(&cluster, chat(10, json!({}))).await;
    assert_eq!((cut.text().as_str(), cut.reasoning().split_whitespace().count()), ("", 10));
    assert_eq!(cut.events.last().unwrap().2["finish_reason"], "length");

    // A reader that comes back in the middle of the thoughts misses none.
    let id = &plain.task_id;
    let ids: Vec<&String> = plain.events.iter().filter_map(|(_, id, _)| id.as_ref()).collect();
    for (n, last) in ids.iter().enumerate() {
        let rest = cluster.client.follow(id, Some(last), usize::MAX).await;
        assert_eq!(rest.events.len(), ids.len() - n - 1, "after {last}");
    }
}

// CLOUD-1521
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_lost_between_thoughts_and_text_goes_on_without_gap_or_delimiter() {
    for after in [2, 5] {
        let engine = Engine::Fake { slots: 4, first_token_ms: 5, pace_ms: 30, dialect: "llamacpp" };
        let mut cluster = Cluster::start(Options { nodes: 2, engine, ..Options::default() }).await;
        for n in 0..2 {
            cluster.fault(n, json!({"kind": "thinks", "tokens": 4})).await;
        }
        let accepted: Value = cluster
            .client
            .post("/v2/tasks", &chat(10, json!({"recovery": "continue"})))
            .await
            .json()
            .await
            .unwrap();
        let id = accepted["task_id"].as_str().unwrap().to_owned();
        // `started`, and then as many thoughts and tokens.
        let begun = cluster.client.follow(&id, None, after + 1).await;
        let node = begun.node().expect("it has begun").to_owned();
        let n = cluster.nodes.iter().position(|node_of| node_of.id == node).unwrap();
        cluster.nodes[n].daemon.take().unwrap().kill();
        let whole = cluster.client.follow(&id, None, usize::MAX).await;
        whole.check();
        assert!(whole.completed(), "{:?}", whole.events.last());
        assert_eq!(
            (whole.reasoning().as_str(), whole.text().as_str()),
            ("w0 w1 w2 w3", "w4 w5 w6 w7 w8 "),
            "after {after}"
        );
        assert_eq!(whole.starts(), 2);
    }
}

// CLOUD-1405
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_is_kept_while_the_engine_works_on_what_was_canceled() {
    let engine = Engine::Fake { slots: 1, first_token_ms: 10, pace_ms: 20, dialect: "llamacpp" };
    let cluster = Cluster::start(Options { nodes: 1, engine, ..Options::default() }).await;
    cluster.fault(0, json!({"kind": "lingers", "ms": 3_000})).await;
    let accepted: Value = cluster.client.post("/v2/tasks", &cluster.task(2_000)).await.json().await.unwrap();
    let id = accepted["task_id"].as_str().unwrap().to_owned();
    cluster.client.follow_tokens(&id, 2).await;
    cluster.client.post(&format!("/v2/tasks/{id}/cancel"), &json!({})).await;
    let canceled = Instant::now();
    eventually("the slot is shown as foreign", Duration::from_secs(2), || async {
        (pool(&cluster, 0).await?["replicas"][0]["slots_foreign"] == 1).then_some(())
    })
    .await;
    let engine = Client::new(&cluster.engine_url(0), None);
    let next = async { run(&cluster, cluster.task(2)).await };
    let watching = async {
        // The engine never has one that waits: nothing is sent to it before its slot is free.
        while canceled.elapsed() < Duration::from_millis(2_800) {
            let busy = engine.get_json("/fake/busy").await.unwrap();
            assert_eq!(busy["waiting"], 0, "{busy}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let (next, ()) = tokio::join!(next, watching);
    assert!(next.completed());
    let waited = canceled.elapsed();
    println!(
        "cancel to the end of the next task, of an engine that goes on for 3 s: {} ms",
        waited.as_millis()
    );
    assert!(waited < Duration::from_secs(6), "{waited:?}");
}

// CLOUD-1526
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_to_engines_are_used_again() {
    for dialect in ["llamacpp", "openai"] {
        let engine = Engine::Fake { slots: 4, first_token_ms: 0, pace_ms: 1, dialect };
        let cluster = Cluster::start(Options { nodes: 1, engine, ..Options::default() }).await;
        let engine = Client::new(&cluster.engine_url(0), None);
        let before = engine.get_json("/fake/busy").await.unwrap()["connections"].as_u64().unwrap();
        for _ in 0..30 {
            assert!(run(&cluster, cluster.task(3)).await.completed());
        }
        let after = engine.get_json("/fake/busy").await.unwrap()["connections"].as_u64().unwrap();
        println!("{dialect}: 30 tasks made {} connections", after - before);
        assert!(after - before <= 3, "{dialect}: {before} to {after}");
    }
}

// CLOUD-1524
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_event_beyond_measure_is_final_and_named() {
    let cluster = Cluster::start(Options { nodes: 3, ..Options::default() }).await;
    for n in 0..3 {
        cluster.fault(n, json!({"kind": "huge"})).await;
    }
    let transcript = run(&cluster, cluster.task(3)).await;
    assert_eq!(transcript.error(), Some("PAYLOAD_TOO_LARGE"));
    let view = cluster.client.get_json(&format!("/v2/tasks/{}", transcript.task_id)).await.unwrap();
    assert_eq!(view["attempts"].as_array().map(Vec::len), Some(1), "tried on no other engine");
}

// CLOUD-2492
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_engine_refuses_its_operator_is_tried_elsewhere_and_shown() {
    let engine = Engine::Fake { slots: 4, first_token_ms: 5, pace_ms: 5, dialect: "vllm" };
    let cluster = Cluster::start(Options { nodes: 2, engine, ..Options::default() }).await;
    for status in [401, 404] {
        cluster.fault(0, json!({"kind": "status", "status": status})).await;
        for _ in 0..4 {
            assert!(run(&cluster, cluster.task(3)).await.completed(), "{status}: another pool has it");
        }
        let shown = eventually("the pool says so", Duration::from_secs(5), || async {
            let pool = pool(&cluster, 0).await?;
            (pool["state"] == "failed" && pool["last_error"].is_string()).then_some(pool)
        })
        .await;
        assert!(shown["last_error"].as_str().unwrap().contains(&status.to_string()), "{shown}");
        cluster.fault(0, json!({"kind": "none"})).await;
        eventually("it is tried again", Duration::from_secs(30), || async {
            pool(&cluster, 0).await.filter(|pool| pool["ready"] == true)
        })
        .await;
        // One that gets through, on that node.
        let mut there = cluster.task(3);
        there["placement"] = json!({"mode": "pin", "node_id": "gpu-node-1"});
        assert!(run(&cluster, there).await.completed());
    }
    // A conflict, a timeout of the request: elsewhere, and against nobody.
    for status in [408, 409] {
        cluster.fault(0, json!({"kind": "status", "status": status})).await;
        for _ in 0..4 {
            assert!(run(&cluster, cluster.task(3)).await.completed(), "{status}");
        }
        let pool = pool(&cluster, 0).await.unwrap();
        assert_eq!(pool["ready"], true, "{status}: {pool}");
    }
    let nodes = cluster.client.get_json("/v2/nodes").await.unwrap();
    assert!(!nodes.to_string().contains("\"tripped\":true"), "{nodes}");
    // A route that one does not have.
    cluster.fault(0, json!({"kind": "status", "status": 405})).await;
    for _ in 0..4 {
        assert!(run(&cluster, cluster.task(3)).await.completed());
    }
    assert_eq!(pool(&cluster, 0).await.unwrap()["ready"], true);
    cluster.fault(1, json!({"kind": "status", "status": 405})).await;
    let nobody = run(&cluster, cluster.task(3)).await;
    assert_eq!(nobody.error(), Some("UNSUPPORTED"), "no pool has it");
}

// CLOUD-2491
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_with_a_key_is_asked_with_the_one_of_its_file_and_nobody_shows_it() {
    let cluster = empty(1).await;
    let file = cluster.dir.path().join("engine-key");
    // It begins as all secrets of the tests do, and is looked for in every log.
    let key = "test-token-of-an-engine";
    std::fs::write(&file, "a-wrong-one\n").unwrap();
    let path = file.display().to_string();
    let arguments = ["--engine", "vllm", "--api-key-file", &path, "--api-key", key];
    let mut command = std::process::Command::new(program("fake-engine"));
    command.args(["--pool-id", "pool-0", "--replica-id", "r0"]).args(arguments);
    command.arg("--handoff-dir").arg(&cluster.nodes[0].runtime_dir);
    let _engine = Process::start(command, &cluster.log("keyed-engine"));
    let shown = eventually("the wrong key is refused", Duration::from_secs(10), || async {
        pool(&cluster, 0).await.filter(|pool| pool["last_error"].is_string())
    })
    .await;
    assert!(shown["last_error"].as_str().unwrap().contains("401"), "{shown}");
    std::fs::write(&file, format!("{key}\n")).unwrap();
    cluster.wait_online(0).await;
    assert!(run(&cluster, task("fake-model", 3)).await.completed());
    std::fs::remove_file(&file).unwrap();
    let gone = eventually("a missing file is named", Duration::from_secs(10), || async {
        pool(&cluster, 0).await.filter(|pool| pool["last_error"].is_string())
    })
    .await;
    assert!(gone["last_error"].as_str().unwrap().contains("api_key_file"), "{gone}");
}
