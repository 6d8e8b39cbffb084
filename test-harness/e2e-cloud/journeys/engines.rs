//! Engines that a node runs itself: killed, given up, orphaned, kept, replaced, loaded on demand.

#![expect(clippy::print_stdout, reason = "the figures of a run are part of its result")]

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use e2e_cloud::process::program;
use e2e_cloud::{Client, Cluster, Engine, Options, eventually, real_engine};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// A cluster of one node that runs these pools.
async fn node_with(pools: String) -> Cluster {
    let options = Options { nodes: 1, engine: Engine::None, pools: vec![(0, pools)], ..Options::default() };
    let mut cluster = Cluster::without_nodes(options);
    cluster.start_control();
    cluster.add_node(0);
    cluster
}

/// An entry of a file of pools that runs the fake engine.
fn fake(pool_id: &str, model: &str, more: &str) -> String {
    format!(
        r#"
[pools.{pool_id}]
engine = "llamacpp"
model = "{model}"
slots = 4
{more}
[pools.{pool_id}.provision]
mode = "binary"
program = "{}"
args = ["--addr", "127.0.0.1:{{port}}", "--model", "{{model}}", "--slots", "{{slots}}"]
"#,
        program("fake-engine").display()
    )
}

async fn pool(cluster: &Cluster, pool_id: &str) -> Option<Value> {
    cluster.node_client(0).get_json(&format!("/v2/pools/{pool_id}/status")).await
}

async fn wait_state(cluster: &Cluster, pool_id: &str, state: &str, patience: Duration) -> Value {
    eventually(&format!("{pool_id} is {state}"), patience, || async {
        pool(cluster, pool_id).await.filter(|pool| pool["state"] == state)
    })
    .await
}

fn handoff(cluster: &Cluster, pool_id: &str) -> Option<Value> {
    let file = cluster.nodes[0].runtime_dir.join(format!("{pool_id}-r0.json"));
    serde_json::from_str(&std::fs::read_to_string(file).ok()?).ok()
}

/// As its handoff says, which is written at the moment at which the node begins to serve it.
async fn engine_pid(cluster: &Cluster, pool_id: &str) -> i32 {
    eventually("the handoff of an engine that lives", Duration::from_secs(5), || async {
        let pid = handoff(cluster, pool_id)?["pid"].as_i64()?;
        let pid = i32::try_from(pid).expect("process ids are small");
        Path::new(&format!("/proc/{pid}")).exists().then_some(pid)
    })
    .await
}

fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("the process lives");
}

/// The processes with this variable in their environment.
fn tagged(variable: &str) -> BTreeSet<i32> {
    let pids = std::fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let has = |pid: &i32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == variable.as_bytes())
    };
    pids.filter(has).collect()
}

async fn run(cluster: &Cluster, model: &str, tokens: u32) -> e2e_cloud::Transcript {
    let task = json!({"model_ref": model, "prompt": "once upon a time", "max_tokens": tokens});
    let transcript = cluster.client.run(task).await;
    transcript.check();
    transcript
}

const MINUTE: Duration = Duration::from_secs(60);

// CLOUD-2401
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_engine_is_started_again_while_its_neighbour_serves() {
    let pools = real_engine::pool("pool-a", "tiny-a", "") + &real_engine::pool("pool-b", "tiny-b", "");
    let cluster = node_with(pools).await;
    for pool in ["pool-a", "pool-b"] {
        wait_state(&cluster, pool, "ready", MINUTE).await;
    }
    cluster.wait_online(0).await;
    assert!(run(&cluster, "tiny-a", 16).await.completed());
    let (before, neighbour) = (engine_pid(&cluster, "pool-a").await, engine_pid(&cluster, "pool-b").await);
    send(before, Signal::SIGKILL);
    let killed = Instant::now();
    assert!(run(&cluster, "tiny-a", 16).await.completed(), "a task that comes meanwhile waits");
    let recovered = killed.elapsed();
    assert_ne!(engine_pid(&cluster, "pool-a").await, before);
    assert_eq!(engine_pid(&cluster, "pool-b").await, neighbour);
    assert!(run(&cluster, "tiny-b", 16).await.completed());
    let status = pool(&cluster, "pool-a").await.unwrap();
    assert_eq!(status["supervised"]["restarts"], 1);
    println!("kill -9 of an engine to the end of the next task: {} ms", recovered.as_millis());
    let logs = cluster.node_client(0).get("/v2/pools/pool-a/logs").await.unwrap();
    assert_eq!(logs.status(), 200);
    assert!(logs.text().await.unwrap().contains("listening http://127.0.0.1:"));
}

// CLOUD-2412
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_kills_in_a_minute_end_in_a_failed_pool_until_it_is_reloaded() {
    let cluster = node_with(real_engine::pool("pool-a", "tiny-a", "")).await;
    let start = Instant::now();
    // On a machine that is slow enough the first ones are forgotten before the tenth comes.
    for kill in 1..=30 {
        let state = eventually("it is ready or given up", MINUTE, || async {
            pool(&cluster, "pool-a")
                .await
                .filter(|pool| pool["state"] == "ready" || pool["state"] == "failed")
        })
        .await;
        if state["state"] == "failed" {
            assert!(kill > 10, "given up after {} kills", kill - 1);
            break;
        }
        send(engine_pid(&cluster, "pool-a").await, Signal::SIGKILL);
        eventually("the kill is seen", Duration::from_secs(5), || async {
            pool(&cluster, "pool-a").await.filter(|pool| pool["ready"] == false)
        })
        .await;
    }
    let failed = wait_state(&cluster, "pool-a", "failed", Duration::from_secs(10)).await;
    let took = start.elapsed();
    let error = failed["last_error"].as_str().unwrap();
    assert!(error.contains("10 times within 60 s") && error.contains("SIGKILL"), "{error}");
    let tail = failed["supervised"]["log_tail"].as_array().unwrap();
    assert!(!tail.is_empty() && tail.len() <= 20, "{tail:?}");
    println!("ten kills within {} s", took.as_secs());
    let answer = cluster.node_client(0).post("/v2/pools/pool-a/reload", &json!({})).await;
    assert_eq!(answer.status(), 202);
    wait_state(&cluster, "pool-a", "ready", MINUTE).await;
}

// CLOUD-2406
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grammar_that_speaks_of_a_driver_error_restarts_no_engine() {
    let cluster = node_with(real_engine::pool("pool-a", "tiny-a", "")).await;
    wait_state(&cluster, "pool-a", "ready", MINUTE).await;
    cluster.wait_online(0).await;
    let before = engine_pid(&cluster, "pool-a").await;
    let grammar = "root ::= (\nCUDA error: an illegal memory access was encountered\n";
    for _ in 0..12 {
        let task = json!({"model_ref": "tiny-a", "prompt": "once", "max_tokens": 4, "grammar": grammar});
        let refused = cluster.client.run(task).await;
        refused.check();
        assert!(refused.error().is_some(), "it is no grammar");
    }
    // It is the engine that says no: the text has come to its log, at the beginning of a line.
    let logs = cluster.node_client(0).get("/v2/pools/pool-a/logs").await.unwrap().text().await.unwrap();
    assert!(logs.lines().any(|line| line.starts_with("CUDA error: an illegal")), "{logs}");
    assert!(run(&cluster, "tiny-a", 8).await.completed());
    let status = pool(&cluster, "pool-a").await.unwrap();
    assert_eq!((&status["state"], supervised(&status, "restarts")), (&json!("ready"), 0));
    assert_eq!(engine_pid(&cluster, "pool-a").await, before);
}

// CLOUD-1552, CLOUD-2412, CLOUD-2416
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_that_kills_its_engine_gets_no_second_one_and_gives_no_pool_up() {
    let cluster = node_with(fake("pool-a", "m-a", "exit_limit = 3\n")).await;
    cluster.wait_online(0).await;
    for deaths in 1..=5 {
        wait_state(&cluster, "pool-a", "ready", MINUTE).await;
        let task = json!({"model_ref": "m-a", "prompt": "crash-sigsegv", "max_tokens": 4});
        let ended = cluster.client.run(task).await;
        ended.check();
        assert_eq!(ended.error(), Some("POOL_UNAVAILABLE"), "{:?}", ended.events.last());
        let error = &ended.events.last().unwrap().2;
        assert_eq!(error["retriable"], false, "{error}");
        eventually("the death is counted once", MINUTE, || async {
            pool(&cluster, "pool-a").await.filter(|pool| supervised(pool, "restarts") == deaths)
        })
        .await;
    }
    let status = wait_state(&cluster, "pool-a", "ready", MINUTE).await;
    assert_eq!(supervised(&status, "restarts"), 5);
    assert!(run(&cluster, "m-a", 4).await.completed());
}

// CLOUD-2415
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_its_owner_reads_the_log_of_an_engine() {
    let cluster = node_with(fake("pool-a", "m-a", "")).await;
    wait_state(&cluster, "pool-a", "ready", MINUTE).await;
    let folder = cluster.dir.path().join("gpu-node-1-logs");
    let about = std::fs::metadata(folder.join("pool-a-r0.log")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::mode(&about) & 0o777, 0o600);
}

/// A script that starts helpers in sessions of their own, then becomes the fake engine.
fn forking(folder: &Path) -> String {
    let script = folder.join("forking-engine");
    let text = format!(
        "#!/bin/sh\nsetsid sleep 600 &\nsetsid sh -c 'trap \"\" TERM; sleep 600; sleep 600' &\n(setsid sleep 600 &)\nexec {} \"$@\"\n",
        program("fake-engine").display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    script.display().to_string()
}

fn forking_pool(folder: &Path, tag: &str, more: &str) -> String {
    fake("pool-a", "fork", &format!("env = {{ E2E_MARK = \"{tag}\" }}\n{more}"))
        .replace(&program("fake-engine").display().to_string(), &forking(folder))
}

// CLOUD-2404
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_process_of_an_engine_outlives_its_daemon_or_its_guard() {
    let folder = tempfile::tempdir().unwrap();
    let tag = uuid::Uuid::new_v4().to_string();
    let variable = format!("E2E_MARK={tag}");
    let mut cluster = node_with(forking_pool(folder.path(), &tag, "")).await;
    wait_state(&cluster, "pool-a", "ready", MINUTE).await;
    assert!(tagged(&variable).len() >= 4, "the engine and its helpers: {:?}", tagged(&variable));
    // The daemon dies without a word.
    cluster.nodes[0].daemon.as_mut().unwrap().kill();
    let killed = Instant::now();
    eventually("nothing of the engine is left", Duration::from_secs(3), || async {
        tagged(&variable).is_empty().then_some(())
    })
    .await;
    println!(
        "kill -9 of the daemon to the end of its engine's last process: {} ms",
        killed.elapsed().as_millis()
    );
    // The guard is killed: the daemon sees to what it guarded, and starts anew.
    cluster.start_daemon(0);
    wait_state(&cluster, "pool-a", "ready", MINUTE).await;
    let before = tagged(&variable);
    let engine = engine_pid(&cluster, "pool-a").await;
    send(parent(engine), Signal::SIGKILL);
    eventually("the engine runs anew", MINUTE, || async {
        let now = tagged(&variable);
        (handoff(&cluster, "pool-a").is_some() && now.len() >= 4 && now.is_disjoint(&before)).then_some(())
    })
    .await;
    // SIGTERM ends the daemon and everything else.
    let daemon = cluster.nodes[0].daemon.as_mut().unwrap();
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait(Duration::from_secs(20)).success());
    assert_eq!(tagged(&variable), BTreeSet::new());
    assert_eq!(handoff(&cluster, "pool-a"), None);
}

fn parent(pid: i32) -> i32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process lives");
    let after = stat.rsplit_once(')').expect("a command").1;
    after.split_whitespace().nth(1).and_then(|parent| parent.parse().ok()).expect("a parent")
}

// CLOUD-2407
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_engine_is_taken_over_by_the_next_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let tag = uuid::Uuid::new_v4().to_string();
    let variable = format!("E2E_MARK={tag}");
    let mut cluster = node_with(forking_pool(folder.path(), &tag, "keep_on_exit = true")).await;
    wait_state(&cluster, "pool-a", "ready", MINUTE).await;
    cluster.wait_online(0).await;
    let (engine, all) = (engine_pid(&cluster, "pool-a").await, tagged(&variable));
    let engine_url = handoff(&cluster, "pool-a").unwrap()["url"].as_str().unwrap().to_owned();
    let slow = json!({"kind": "slow", "pace_ms": 50});
    assert_eq!(Client::new(&engine_url, None).post("/fake/fault", &slow).await.status(), 204);
    let client = cluster.client.clone();
    let task = json!({"model_ref": "fork", "prompt": "hi", "max_tokens": 2_000, "deadline_ms": 60_000});
    let running = tokio::spawn(async move { client.run(task).await });
    eventually("the task runs", Duration::from_secs(10), || async {
        pool(&cluster, "pool-a")
            .await
            .filter(|pool| !pool["replicas"][0]["attempts"].as_array().unwrap().is_empty())
    })
    .await;
    // Once by a crash, once by an orderly end.
    cluster.nodes[0].daemon.as_mut().unwrap().kill();
    let lost = running.await.unwrap();
    lost.check();
    assert_eq!(lost.error(), Some("WORKER_RESET"), "its stream has ended");
    cluster.start_daemon(0);
    wait_state(&cluster, "pool-a", "ready", MINUTE).await;
    assert_eq!((engine_pid(&cluster, "pool-a").await, &tagged(&variable)), (engine, &all), "the same engine");
    eventually("its slots are free again", Duration::from_secs(5), || async {
        pool(&cluster, "pool-a").await.filter(|pool| pool["replicas"][0]["slots_free"] == 4)
    })
    .await;
    cluster.wait_online(0).await;
    assert!(run(&cluster, "fork", 4).await.completed());
    let daemon = cluster.nodes[0].daemon.as_mut().unwrap();
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait(Duration::from_secs(20)).success());
    assert_eq!(tagged(&variable), all, "it is kept over an orderly end too");
    // A daemon whose file says something else of the pool ends it and starts what it says.
    let changed = forking_pool(folder.path(), &tag, "");
    std::fs::write(cluster.pools_file(0), changed).unwrap();
    cluster.start_daemon(0);
    eventually("another engine runs", MINUTE, || async {
        let now = tagged(&variable);
        (handoff(&cluster, "pool-a").is_some() && now.len() >= 4 && now.is_disjoint(&all)).then_some(())
    })
    .await;
    let daemon = cluster.nodes[0].daemon.as_mut().unwrap();
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait(Duration::from_secs(20)).success());
    assert_eq!(tagged(&variable), BTreeSet::new());
}

// CLOUD-2408
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_to_a_guard_without_a_daemon_ends_its_engine_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let tag = uuid::Uuid::new_v4().to_string();
    let variable = format!("E2E_MARK={tag}");
    let mut cluster = node_with(forking_pool(folder.path(), &tag, "keep_on_exit = true")).await;
    wait_state(&cluster, "pool-a", "ready", MINUTE).await;
    let guard = parent(engine_pid(&cluster, "pool-a").await);
    cluster.nodes[0].daemon.as_mut().unwrap().kill();
    assert!(tagged(&variable).len() >= 4, "it is kept");
    send(guard, Signal::SIGTERM);
    eventually("nothing of the engine is left", Duration::from_secs(5), || async {
        tagged(&variable).is_empty().then_some(())
    })
    .await;
}

async fn submit_many(
    cluster: &Cluster,
    models: &[&str],
    tokens: u32,
) -> Vec<tokio::task::JoinHandle<e2e_cloud::Transcript>> {
    let mut running = Vec::new();
    for model in models {
        let client = cluster.client.clone();
        let task = json!({"model_ref": model, "prompt": "once upon a time", "max_tokens": tokens});
        running.push(tokio::spawn(async move { client.run(task).await }));
    }
    running
}

async fn all_complete(running: Vec<tokio::task::JoinHandle<e2e_cloud::Transcript>>) {
    for task in running {
        let transcript = task.await.unwrap();
        transcript.check();
        assert!(transcript.completed(), "{:?} {}", transcript.events.last(), transcript.refusal);
    }
}

fn supervised(pool: &Value, count: &str) -> u64 {
    pool["supervised"][count].as_u64().unwrap_or(0)
}

// CLOUD-2421
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_tasks_at_once_for_two_models_that_share_a_place_load_each_at_most_twice() {
    for (slots, resident) in [(1, 5), (4, 60)] {
        let more =
            format!("load = \"on_demand\"\nmemory_bytes = 600000000\nmin_resident_secs = {resident}\n");
        let pools: String = ["a", "b"]
            .map(|name| {
                let pool = fake(&format!("pool-{name}"), &format!("model-{name}"), &more);
                pool.replace("slots = 4", &format!("slots = {slots}"))
            })
            .concat();
        let memory = "[memory]\nreserve_bytes = 0\nhost_bytes = 1000000000\n";
        let cluster = node_with(format!("{memory}{pools}")).await;
        for pool in ["pool-a", "pool-b"] {
            wait_state(&cluster, pool, "loadable", MINUTE).await;
        }
        eventually("the node is known", MINUTE, || async { cluster.client.node("gpu-node-1").await }).await;
        let start = Instant::now();
        let models: Vec<&str> = (0..10).map(|n| ["model-a", "model-b"][n % 2]).collect();
        all_complete(submit_many(&cluster, &models, 8).await).await;
        let mut unloads = Vec::new();
        for name in ["pool-a", "pool-b"] {
            unloads.push(supervised(&pool(&cluster, name).await.unwrap(), "unloads"));
        }
        println!(
            "10 tasks in turns of two models, {slots} slots, resident {resident} s: {} ms, unloads {unloads:?}",
            start.elapsed().as_millis()
        );
        assert!(unloads.iter().all(|count| *count <= 1), "loaded more than twice: {unloads:?}");
    }
}

// CLOUD-2421
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_models_where_two_fit_are_loaded_as_tasks_ask_and_none_is_lost() {
    let more = "load = \"on_demand\"\nmemory_bytes = 400000000\nmin_resident_secs = 2\n";
    let pools: String = ["a", "b", "c"]
        .map(|name| real_engine::pool(&format!("pool-{name}"), &format!("tiny-{name}"), more))
        .concat();
    let memory = "[memory]\nreserve_bytes = 0\nhost_bytes = 1000000000\n";
    let cluster = node_with(format!("{memory}{pools}")).await;
    for pool in ["pool-a", "pool-b", "pool-c"] {
        wait_state(&cluster, pool, "loadable", MINUTE).await;
    }
    eventually("the node is known", MINUTE, || async { cluster.client.node("gpu-node-1").await }).await;
    let unloads = || async {
        let mut counts = Vec::new();
        for name in ["pool-a", "pool-b", "pool-c"] {
            counts.push(supervised(&pool(&cluster, name).await.unwrap(), "unloads"));
        }
        counts
    };
    // One after the other, in turns: both are loaded once and stay.
    let start = Instant::now();
    for n in 0..40 {
        let model = if n % 2 == 0 { "tiny-a" } else { "tiny-b" };
        assert!(run(&cluster, model, 8).await.completed());
    }
    let alternating = start.elapsed();
    assert_eq!(unloads().await, [0, 0, 0]);
    wait_state(&cluster, "pool-c", "loadable", Duration::from_secs(5)).await;
    // The third makes the least recently used go.
    assert!(run(&cluster, "tiny-c", 8).await.completed());
    assert_eq!(unloads().await, [1, 0, 0]);
    // All three at once, more than there are slots: nobody starves, nothing is lost.
    let start = Instant::now();
    let models: Vec<&str> = (0..60).map(|n| ["tiny-a", "tiny-b", "tiny-c"][n % 3]).collect();
    all_complete(submit_many(&cluster, &models, 200).await).await;
    let burst = start.elapsed();
    let counts = unloads().await;
    let total: u64 = counts.iter().sum();
    assert!(total <= 12, "it thrashes: {counts:?}");
    println!(
        "40 tasks in turns of two models: {} ms, no unload; 60 tasks of three models where two fit: {} ms, unloads {counts:?}",
        alternating.as_millis(),
        burst.as_millis()
    );
}

// CLOUD-2435
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_under_load_fails_no_task_and_a_failing_one_changes_nothing() {
    let pools = real_engine::pool("pool-a", "tiny-a", "aliases = [\"chat\"]\ndrain_timeout_secs = 30\n");
    let other = format!("[models.tiny-b]\nsource = \"{}\"\n", real_engine::tiny_model().display());
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.gguf");
    std::fs::write(&broken, b"GGUF\x03\0\0\0cut off").unwrap();
    let broken_model = format!("[models.broken]\nsource = \"{}\"\n", broken.display());
    let cluster = node_with(format!("{other}{broken_model}{pools}")).await;
    wait_state(&cluster, "pool-a", "ready", MINUTE).await;
    cluster.wait_online(0).await;
    let reload = |model: &'static str| {
        let client = cluster.client.clone();
        async move { client.post("/v2/pools/pool-a/reload", &json!({"new_model_ref": model})).await.status() }
    };
    // Load that goes on until the new model serves.
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut clients = Vec::new();
    for _ in 0..4 {
        let (client, stopped) = (cluster.client.clone(), stopped.clone());
        clients.push(tokio::spawn(async move {
            let mut done = 0;
            while !*stopped.borrow() {
                let task = json!({"model_ref": "chat", "prompt": "once upon a time", "max_tokens": 100});
                let transcript = client.run(task).await;
                transcript.check();
                assert!(transcript.completed(), "{:?} {}", transcript.events.last(), transcript.refusal);
                done += 1;
            }
            done
        }));
    }
    let before = engine_pid(&cluster, "pool-a").await;
    assert_eq!(reload("tiny-b").await, 202);
    let status = eventually("the new model serves", MINUTE, || async {
        pool(&cluster, "pool-a").await.filter(|pool| pool["ready"] == true && pool["models"][0] == "tiny-b")
    })
    .await;
    assert_eq!(status["models"], json!(["tiny-b", "chat"]));
    assert!(run(&cluster, "tiny-b", 8).await.completed());
    let after = std::fs::read_dir(&cluster.nodes[0].runtime_dir).unwrap().flatten();
    let handoffs: Vec<String> =
        after.filter_map(|f| f.file_name().into_string().ok()).filter(|f| f.ends_with(".json")).collect();
    assert_eq!(handoffs, ["pool-a-r0.1.json"], "beside the one that it replaces it has another name");
    eventually("the old engine is gone", Duration::from_secs(40), || async {
        (!Path::new(&format!("/proc/{before}")).exists()).then_some(())
    })
    .await;
    // A model that cannot be loaded, and one that is not there, leave the present one serving.
    for (model, reason) in [("broken", "truncated"), ("nowhere", "not staged")] {
        assert_eq!(reload(model).await, 202);
        let status = eventually("the reload is given up", MINUTE, || async {
            pool(&cluster, "pool-a").await.filter(|pool| {
                pool["supervised"]["reload"]["error"].as_str().is_some_and(|error| error.contains(reason))
            })
        })
        .await;
        assert_eq!((&status["models"][0], &status["ready"]), (&json!("tiny-b"), &json!(true)));
    }
    stop.send(true).unwrap();
    let mut done = 0;
    for client in clients {
        done += client.await.unwrap();
    }
    println!("{done} tasks through one reload and two that failed, none with an error");
}

// CLOUD-2445
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_file_is_taken_without_a_restart_and_a_bad_one_says_why_and_changes_nothing() {
    let first = fake("pool-a", "m-a", "");
    let cluster = node_with(first.clone()).await;
    wait_state(&cluster, "pool-a", "ready", MINUTE).await;
    let before = engine_pid(&cluster, "pool-a").await;
    let write = |text: &str| std::fs::write(cluster.pools_file(0), text).unwrap();
    let problem = || async {
        let pools = cluster.node_client(0).get_json("/v2/pools").await?;
        Some(pools["pools_file_problem"].as_str().unwrap_or_default().to_owned())
    };
    write(&format!("{first}slotz = 3\n"));
    let reported = eventually("the mistake is named", Duration::from_secs(5), || async {
        problem().await.filter(|text| text.contains("slotz"))
    })
    .await;
    assert!(reported.contains("line") && reported.contains("column"), "{reported}");
    assert_eq!(engine_pid(&cluster, "pool-a").await, before);
    write(&(first.clone() + &fake("pool-b", "m-b", "")));
    wait_state(&cluster, "pool-b", "ready", MINUTE).await;
    assert_eq!((problem().await.unwrap(), engine_pid(&cluster, "pool-a").await), (String::new(), before));
    write(&fake("pool-b", "m-b", ""));
    eventually("the pool that is not in the file goes", Duration::from_secs(10), || async {
        (pool(&cluster, "pool-a").await.is_none_or(|pool| pool["pool_id"] != "pool-a")).then_some(())
    })
    .await;
    assert_eq!(handoff(&cluster, "pool-a"), None);
}

// CLOUD-2437
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_announces_itself_outlives_a_change_of_its_entry() {
    let entry = |more: &str| {
        format!(
            "[pools.pool-0]\nengine = \"llamacpp\"\nmodel = \"fake-model\"\n{more}provision = {{ mode = \"external\" }}\n"
        )
    };
    let mut cluster = node_with(entry("")).await;
    cluster.options.engine = Engine::steady();
    cluster.start_engine(0);
    cluster.wait_online(0).await;
    std::fs::write(cluster.pools_file(0), entry("drain_timeout_secs = 3\n")).unwrap();
    let log = || std::fs::read_to_string(cluster.log("gpu-node-1")).unwrap_or_default();
    eventually("the change is taken", MINUTE, || async {
        (log().matches("the file of pools is taken").count() == 2).then_some(())
    })
    .await;
    wait_state(&cluster, "pool-0", "ready", Duration::from_secs(10)).await;
    assert!(run(&cluster, "fake-model", 8).await.completed());
}

// CLOUD-2438
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_serves_while_its_handoff_file_cannot_be_written_which_is_done_when_it_can() {
    let cluster = Cluster::without_nodes(Options {
        nodes: 1,
        engine: Engine::None,
        pools: vec![(0, fake("pool-a", "m-a", ""))],
        ..Options::default()
    });
    let in_its_place = cluster.dir.path().join("gpu-node-1/pool-a-r0.json");
    std::fs::create_dir_all(in_its_place.join("something")).unwrap();
    let mut cluster = cluster;
    cluster.start_control();
    cluster.add_node(0);
    let log = || std::fs::read_to_string(cluster.log("gpu-node-1")).unwrap_or_default();
    eventually("it says so", MINUTE, || async { log().contains("is not written").then_some(()) }).await;
    wait_state(&cluster, "pool-a", "ready", Duration::from_secs(15)).await;
    assert!(run(&cluster, "m-a", 8).await.completed());
    std::fs::remove_dir_all(&in_its_place).unwrap();
    eventually("it is written", MINUTE, || async { handoff(&cluster, "pool-a") }).await;
    assert_eq!(log().matches("is not written").count(), 1, "it is said once");
}

// CLOUD-2446
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_missing_thing_is_named_with_what_brings_it() {
    let folder = tempfile::tempdir().unwrap();
    let truncated = folder.path().join("truncated.gguf");
    let whole = std::fs::read(real_engine::tiny_model()).unwrap();
    std::fs::write(&truncated, &whole[..200]).unwrap();
    let page = folder.path().join("page.gguf");
    std::fs::write(&page, b"<html>not found</html>").unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let llama = |id: &str, source: &str, more: &str| {
        let entry = real_engine::pool(id, &format!("m-{id}"), more);
        entry.replace(&real_engine::tiny_model().display().to_string(), source)
    };
    let tiny = real_engine::tiny_model().display().to_string();
    let package =
        "[pools.package]\nengine = \"llamacpp\"\nmodel = \"x\"\nprovision = { mode = \"package\" }\n";
    let big = "memory_bytes = 900000000000000\n";
    let pools = [
        package.to_owned(),
        fake("program", "p", "").replace(&program("fake-engine").display().to_string(), "no-such-program"),
        llama("absent", "/no/such/model.gguf", ""),
        llama("truncated", &truncated.display().to_string(), ""),
        llama("page", &page.display().to_string(), ""),
        llama("remote", "https://host.invalid/m.gguf", ""),
        llama("big", &tiny, big),
        fake("taken", "t", &format!("ports = [{port}]\nexit_limit = 3\n")),
        fake("digest", "d", "")
            + &llama("wrong", &tiny, "").replace(
                &format!("source = \"{tiny}\""),
                &format!("source = \"{tiny}\"\ndigest = \"sha256:{}\"", "0".repeat(64)),
            ),
    ];
    let cluster = node_with(pools.concat()).await;
    let expected = [
        ("package", "installs is off"),
        ("program", "no-such-program is not on the PATH"),
        ("absent", "No such file"),
        ("truncated", "truncated"),
        ("page", "not a GGUF file"),
        ("remote", "downloads is off; run: pool-managerd models stage"),
        ("big", "needs 858306884 MiB on host memory"),
        ("taken", "is in use by another program"),
        ("wrong", "expected sha256:0000"),
    ];
    for (id, part) in expected {
        let status = wait_state(&cluster, id, "failed", Duration::from_secs(20)).await;
        let error = status["last_error"].as_str().unwrap_or_default();
        assert!(error.contains(part), "{id}: {error}");
    }
    assert_eq!(
        wait_state(&cluster, "digest", "ready", MINUTE).await["ready"],
        true,
        "the others' faults do not touch it"
    );
    // A file that is wrong from the start stops the start.
    let mut command = std::process::Command::new(program("pool-managerd"));
    std::fs::write(folder.path().join("bad.toml"), "[pools.a]\nengine = \"llama\"\n").unwrap();
    command
        .env("LLORCH_API_TOKEN", e2e_cloud::cluster::TOKEN)
        .env("ORCHESTRATORD_REGISTER_ON_STARTUP", "false")
        .env("POOL_MANAGERD_POOLS", folder.path().join("bad.toml"));
    let output = command.output().unwrap();
    let reported = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2));
    assert!(reported.contains("POOL_MANAGERD_POOLS") && reported.contains("line 2"), "{reported}");
}

/// A server that sends bytes without saying how many they will be.
async fn endless() -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/endless.gguf", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = [0; 4096];
            let _ = stream.read(&mut head).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\netag: \"a\"\r\nconnection: close\r\n\r\n").await;
            let piece = vec![7; 1024 * 1024];
            for _ in 0..400 {
                if stream.write_all(&piece).await.is_err() {
                    break;
                }
            }
        }
    });
    url
}

// CLOUD-2466
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_leaves_nothing_half_done() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let big = folder.path().join("big.gguf");
    std::fs::File::create(&big).unwrap().set_len(40 * 1024 * 1024).unwrap();
    let is_root = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap()) == 0;
    // A disk of 90 MiB in a mount namespace of its own, which goes with the process.
    let stage = |source: &str| {
        let script = format!(
            "mount -t tmpfs -o size=90m none '{disk}' || exit 99; '{daemon}' models stage m '{source}' --models-dir '{disk}'; code=$?; find '{disk}' -type f -not -name '.*.lock'; exit $code",
            disk = disk.display(),
            daemon = program("pool-managerd").display(),
        );
        let mut command = tokio::process::Command::new("unshare");
        if !is_root {
            command.arg("--map-root-user");
        }
        command.args(["--mount", "sh", "-c", &script]).kill_on_drop(true);
        async move { command.output().await.unwrap() }
    };
    for (source, reported) in
        [(big.display().to_string(), "bytes are needed and"), (endless().await, "No space left on device")]
    {
        let output = stage(&source).await;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains(reported), "{error}");
        let left = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!left.contains(&disk.display().to_string()), "{left}");
    }
}

// CLOUD-2487
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_installed_from_the_package_index_serves_and_one_started_for_it_embeds() {
    let tiny = real_engine::tiny_model();
    let packaged = format!(
        "[provisioning]\ninstalls = true\n[models.packaged]\nsource = \"{}\"\n[pools.packaged]\nengine = \"llamacpp\"\nmodel = \"packaged\"\nslots = 2\nctx = 512\nprovision = {{ mode = \"package\" }}\n",
        tiny.display()
    );
    let cluster =
        node_with(packaged + &real_engine::pool("embeds", "embeds", "flags = [\"--embeddings\"]\n")).await;
    wait_state(&cluster, "embeds", "ready", MINUTE).await;
    cluster.wait_online(0).await;
    let task = json!({"workload": "embedding", "model_ref": "embeds", "inputs": {"embedding": ["once upon", "a time"]}});
    let embedded = cluster.client.run(task).await;
    embedded.check();
    assert!(embedded.completed(), "{:?} {}", embedded.events.last(), embedded.refusal);
    let lengths: Vec<usize> =
        embedded.results().iter().map(|result| result["embedding"].as_array().unwrap().len()).collect();
    assert!(lengths.len() == 2 && lengths[0] == lengths[1] && lengths[0] > 0, "{lengths:?}");
    assert_ne!(embedded.results()[0]["embedding"], embedded.results()[1]["embedding"]);
    wait_state(&cluster, "packaged", "ready", 3 * MINUTE).await;
    assert!(run(&cluster, "packaged", 8).await.completed());
    let status = pool(&cluster, "packaged").await.unwrap();
    assert_eq!((&status["ctx_max"], &status["replicas"][0]["slots_total"]), (&json!(512), &json!(2)));
    // Purged, its environment and its engine are gone; the model is not the node's to remove.
    let purge = json!({"engine_files": true, "model_files": true});
    assert_eq!(cluster.client.post("/v2/pools/packaged/purge", &purge).await.status(), 202);
    let packages = cluster.dir.path().join("gpu-node-1-packages/llamacpp-pinned");
    eventually("the environment is removed", MINUTE, || async { (!packages.exists()).then_some(()) }).await;
    let purged = wait_state(&cluster, "packaged", "failed", MINUTE).await;
    assert!(purged["last_error"].as_str().unwrap().contains("purged"));
    assert!(tiny.exists());
}
