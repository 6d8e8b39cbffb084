//! Nodes and engines that die under load; the clients' transcripts are the witness.

use std::time::{Duration, Instant};

use e2e_cloud::{Cluster, Engine, Options, Transcript};
use nix::sys::signal::Signal;
use pool_registry_types::node::Liveness;
use serde_json::json;

const TASKS: usize = 20;
const TOKENS: u32 = 20;
const ROUNDS: u64 = 10;

/// What became of the tasks of all rounds.
#[derive(Debug, Default)]
struct Tally {
    completed: usize,
    /// Completed although their first attempt was lost.
    placed_again: usize,
    reset: usize,
}

fn fleet() -> Options {
    Options { nodes: 2, engine: Engine::steady(), ..Options::default() }
}

/// Starts the tasks, does `harm` to node 0 at a moment drawn from the seed, reads all streams.
async fn round(
    cluster: &mut Cluster,
    seed: u64,
    task: serde_json::Value,
    harm: impl AsyncFnOnce(&mut Cluster),
) -> Vec<Transcript> {
    let client = cluster.client.clone();
    let runs: Vec<_> = (0..TASKS)
        .map(|_| {
            let (client, task) = (client.clone(), task.clone());
            tokio::spawn(async move { client.run(task).await })
        })
        .collect();
    // The window of the first tokens (150 ms) is hit as well as the streams after it.
    let moment = Duration::from_millis(fastrand::Rng::with_seed(seed).u64(20..900));
    tokio::time::sleep(moment).await;
    harm(cluster).await;
    let mut transcripts = Vec::new();
    for run in runs {
        transcripts.push(run.await.expect("a client does not panic"));
    }
    transcripts
}

/// Every task has its end, whole or honest.
async fn judge(cluster: &Cluster, transcripts: &[Transcript], allowed: &str, tally: &mut Tally) {
    for transcript in transcripts {
        transcript.check();
        let whole: String = (0..TOKENS).map(|n| format!("w{n} ")).collect();
        assert!(whole.starts_with(&transcript.text()), "a gap or a repeat: {:?}", transcript.text());
        if transcript.completed() {
            assert_eq!(transcript.text(), whole);
            tally.completed += 1;
            let view = cluster.client.get_json(&format!("/v2/tasks/{}", transcript.task_id)).await.unwrap();
            tally.placed_again += usize::from(view["attempts"].as_array().unwrap().len() > 1);
        } else {
            assert_eq!(transcript.error(), Some(allowed), "{:?}", transcript.events.last());
            assert!(!transcript.tokens().is_empty(), "a task without a token is placed again, never lost");
            tally.reset += 1;
        }
    }
}

#[expect(clippy::print_stdout, reason = "the figures of the run are its result")]
fn report(fault: &str, tally: &Tally) {
    println!(
        "{fault}: {ROUNDS} rounds of {TASKS} tasks: {} completed ({} of them placed again), {} ended honestly, 0 lost, 0 doubled",
        tally.completed, tally.placed_again, tally.reset
    );
    assert_eq!(tally.completed + tally.reset, TASKS * usize::try_from(ROUNDS).unwrap());
    assert!(tally.placed_again > 0, "no round hit the window of the first tokens");
}

// CLOUD-2320
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_node_loses_no_task_that_has_sent_no_token() {
    let mut cluster = Cluster::start(fleet()).await;
    let mut tally = Tally::default();
    for seed in 0..ROUNDS {
        let task = cluster.task(TOKENS);
        let transcripts = round(&mut cluster, seed, task, async |cluster: &mut Cluster| {
            cluster.nodes[0].daemon.as_mut().unwrap().kill();
            let killed = Instant::now();
            cluster.wait_not_online(0, Duration::from_millis(1_500)).await;
            assert!(
                killed.elapsed() < Duration::from_millis(1_500),
                "suspect at once: {:?}",
                killed.elapsed()
            );
        })
        .await;
        judge(&cluster, &transcripts, "WORKER_RESET", &mut tally).await;
        if seed == 0 {
            cluster.wait_liveness(0, Liveness::Offline, Duration::from_secs(4)).await;
        }
        cluster.start_daemon(0);
        cluster.wait_online(0).await;
    }
    report("kill -9 of pool-managerd", &tally);
}

// CLOUD-2321
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_engine_loses_no_task_that_has_sent_no_token() {
    let mut cluster = Cluster::start(fleet()).await;
    let mut tally = Tally::default();
    for seed in 0..ROUNDS {
        let task = cluster.task(TOKENS);
        let transcripts = round(&mut cluster, seed, task, async |cluster: &mut Cluster| {
            cluster.nodes[0].engine.as_mut().unwrap().kill();
        })
        .await;
        judge(&cluster, &transcripts, "WORKER_RESET", &mut tally).await;
        cluster.start_engine(0);
        cluster.wait_online(0).await;
    }
    report("SIGKILL of an engine", &tally);
}

// CLOUD-2322
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_engine_loses_no_task_that_has_sent_no_token() {
    let mut cluster = Cluster::start(fleet()).await;
    let mut tally = Tally::default();
    for seed in 0..ROUNDS {
        let mut task = cluster.task(TOKENS);
        task["timeouts"] = json!({"first_token_ms": 1_500, "token_idle_ms": 1_000});
        let transcripts = round(&mut cluster, seed, task, async |cluster: &mut Cluster| {
            cluster.nodes[0].engine.as_ref().unwrap().signal(Signal::SIGSTOP);
        })
        .await;
        judge(&cluster, &transcripts, "DECODE_TIMEOUT", &mut tally).await;
        cluster.nodes[0].engine.as_ref().unwrap().signal(Signal::SIGCONT);
        cluster.wait_online(0).await;
    }
    report("a hung engine", &tally);
}

// CLOUD-2323
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_node_loses_no_task_that_has_sent_no_token() {
    // A frozen node is found out by its silence, which takes ten seconds: two clusters share the rounds.
    let half = async |first: u64, last: u64| {
        let mut cluster = Cluster::start(fleet()).await;
        let mut tally = Tally::default();
        for seed in first..last {
            let task = cluster.task(TOKENS);
            let transcripts = round(&mut cluster, seed, task, async |cluster: &mut Cluster| {
                cluster.nodes[0].daemon.as_ref().unwrap().signal(Signal::SIGSTOP);
                cluster.wait_not_online(0, Duration::from_secs(4)).await;
            })
            .await;
            judge(&cluster, &transcripts, "WORKER_RESET", &mut tally).await;
            cluster.nodes[0].daemon.as_ref().unwrap().signal(Signal::SIGCONT);
            cluster.wait_online(0).await;
        }
        tally
    };
    let (a, b) = tokio::join!(half(0, ROUNDS / 2), half(ROUNDS / 2, ROUNDS));
    let tally = Tally {
        completed: a.completed + b.completed,
        placed_again: a.placed_again + b.placed_again,
        reset: a.reset + b.reset,
    };
    report("SIGSTOP of pool-managerd", &tally);
}

// CLOUD-1516
// CLOUD-2324
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_failure_of_an_engine_ends_as_the_contract_says() {
    let engine = Engine::Fake { slots: 4, first_token_ms: 5, pace_ms: 5, dialect: "llamacpp" };
    let cluster = Cluster::start(Options { nodes: 1, engine, ..Options::default() }).await;
    let cases = [
        (json!({"kind": "cut", "after": 3}), "WORKER_RESET"),
        (json!({"kind": "clean_close", "after": 3}), "WORKER_RESET"),
        (json!({"kind": "hang", "after": 3}), "DECODE_TIMEOUT"),
        (json!({"kind": "cut", "after": 0}), "POOL_UNAVAILABLE"),
        (json!({"kind": "clean_close", "after": 0}), "POOL_UNAVAILABLE"),
        (json!({"kind": "refuse"}), "POOL_UNAVAILABLE"),
        (json!({"kind": "error500"}), "POOL_UNAVAILABLE"),
        (json!({"kind": "wrong_content_type"}), "POOL_UNAVAILABLE"),
        (json!({"kind": "hang", "after": 0}), "DECODE_TIMEOUT"),
        (json!({"kind": "context_too_long"}), "CONTEXT_TOO_LONG"),
    ];
    for (fault, code) in cases {
        cluster.fault(0, fault.clone()).await;
        let mut task = cluster.task(6);
        task["timeouts"] = json!({"first_token_ms": 400, "token_idle_ms": 400});
        let transcript = cluster.client.run(task).await;
        transcript.check();
        assert_eq!(transcript.error(), Some(code), "{fault}");
        cluster.fault(0, json!({"kind": "none"})).await;
        cluster.wait_online(0).await;
    }
    cluster.fault(0, json!({"kind": "slow", "pace_ms": 60})).await;
    let slow = cluster.client.run(cluster.task(5)).await;
    slow.check();
    assert!(slow.completed());
}

// CLOUD-2325
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unhealthy_engine_is_not_used_until_it_is_well() {
    let cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    cluster.fault(0, json!({"kind": "unhealthy"})).await;
    let state = e2e_cloud::eventually("the pool is not ready", Duration::from_secs(4), || async {
        let node = cluster.client.node("gpu-node-1").await?;
        Some(node.pools.iter().find(|pool| !pool.report.ready)?.report.state)
    })
    .await;
    assert_eq!(state, pool_registry_types::pool::PoolState::Loading, "503 is llama.cpp's word for it");
    cluster.fault(0, json!({"kind": "none"})).await;
    cluster.wait_online(0).await;
}
