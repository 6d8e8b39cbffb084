//! Engines that a node runs itself: killed, given up, orphaned, kept.

#![expect(clippy::print_stdout, reason = "the figures of a run are part of its result")]

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use e2e_cloud::process::program;
use e2e_cloud::{Client, Cluster, Engine, Options, eventually, real_engine};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

mod on_demand;
mod provisioning;

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

fn supervised(pool: &Value, count: &str) -> u64 {
    pool["supervised"][count].as_u64().unwrap_or(0)
}

const MINUTE: Duration = Duration::from_secs(60);

// CLOUD-2401
// CLOUD-2709
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
    // By the control plane too.
    let logs = cluster.client.get("/v2/pools/pool-a/logs").await.unwrap();
    assert_eq!(logs.status(), 200);
    assert!(logs.text().await.unwrap().contains("listening http://127.0.0.1:"));
    let unknown = cluster.client.get("/v2/pools/pool-a/logs?replica_id=nobody").await.unwrap();
    assert_eq!(unknown.status(), 404);
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

// CLOUD-2689
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handoff_file_goes_with_its_engine_and_another_ones_under_its_name_stays() {
    let cluster = node_with([fake("own", "m", ""), fake("other", "n", "")].concat()).await;
    for pool_id in ["own", "other"] {
        wait_state(&cluster, pool_id, "ready", MINUTE).await;
    }
    let mut theirs = handoff(&cluster, "other").unwrap();
    theirs["url"] = json!("http://127.0.0.1:9");
    let file = |pool_id: &str| cluster.nodes[0].runtime_dir.join(format!("{pool_id}-r0.json"));
    std::fs::write(file("other"), theirs.to_string()).unwrap();
    for pool_id in ["own", "other"] {
        let purge = json!({"engine_files": true});
        let answer = cluster.client.post(&format!("/v2/pools/{pool_id}/purge"), &purge).await;
        assert_eq!(answer.status(), 202);
        wait_state(&cluster, pool_id, "failed", MINUTE).await;
    }
    eventually("its own file goes", MINUTE, || async { (!file("own").exists()).then_some(()) }).await;
    assert_eq!(handoff(&cluster, "other"), Some(theirs), "the other one stays");
}
