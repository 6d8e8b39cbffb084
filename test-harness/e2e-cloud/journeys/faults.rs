//! Three nodes with 200 tasks in flight, and everything that can die under them; the clients'
//! transcripts are the evidence.
//!
//! In each round half of the tasks may be continued and half may not. Those that may must all be
//! whole, whatever happened. Of the others, those that had sent no token must be whole too, and the
//! rest end honestly.

use std::time::{Duration, Instant};

use e2e_cloud::{Cluster, Engine, Options};
use nix::sys::signal::Signal;
use pool_registry_types::node::Liveness;
use serde_json::json;
use tokio::sync::RwLock;

const TASKS: usize = 200;
const TOKENS: u32 = 20;
const ROUNDS: u64 = 10;

/// Two hundred streams are enough for two cores: one fault at a time. Slower ones go side by side, and
/// only read.
pub(crate) static ALONE: RwLock<()> = RwLock::const_new(());

/// What became of the tasks of all rounds.
#[derive(Debug, Default)]
struct Tally {
    completed: usize,
    /// Completed although an attempt without a token was lost.
    placed_again: usize,
    /// Completed although an attempt with tokens was lost.
    continued: usize,
    reset: usize,
    /// From the fault to the first token of a task that was placed again, round by round.
    recovered: Vec<Duration>,
}

fn fleet() -> Options {
    let engine = Engine::Fake { slots: 70, first_token_ms: 150, pace_ms: 100, dialect: "llamacpp" };
    Options { nodes: 3, engine, ..Options::default() }
}

/// Starts the tasks, does `harm` at a moment drawn from the seed, reads all streams.
async fn round(
    cluster: &mut Cluster,
    tally: &mut Tally,
    seed: u64,
    allowed: &str,
    timeouts: Option<&serde_json::Value>,
    harm: impl AsyncFnOnce(&mut Cluster),
) {
    let client = cluster.client.clone();
    let runs: Vec<_> = (0..TASKS)
        .map(|n| {
            let (client, mut task) = (client.clone(), cluster.task(TOKENS));
            if let Some(timeouts) = timeouts {
                task["timeouts"] = timeouts.clone();
            }
            task["recovery"] = json!(if n % 2 == 0 { "continue" } else { "fail" });
            tokio::spawn(async move { (n % 2 == 0, client.run(task).await) })
        })
        .collect();
    // The window of the first tokens (150 ms) is hit as well as the streams after it.
    let moment = Duration::from_millis(fastrand::Rng::with_seed(seed).u64(60..1_500));
    tokio::time::sleep(moment).await;
    let harmed = Instant::now();
    harm(cluster).await;
    let whole: String = (0..TOKENS).map(|n| format!("w{n} ")).collect();
    let mut first = None;
    for run in runs {
        let (continues, transcript) = run.await.expect("a client does not panic");
        transcript.check();
        let text = transcript.text();
        assert!(whole.starts_with(&text), "a gap or a repeat: {text:?}");
        first = [first, transcript.replaced_at].into_iter().flatten().min();
        if transcript.completed() {
            assert_eq!(text, whole);
            tally.completed += 1;
            tally.continued += usize::from(transcript.starts() > 1);
            let again = transcript.starts() == 1 && transcript.replaced_at.is_some();
            tally.placed_again += usize::from(again);
        } else {
            assert!(!continues, "it may continue: {:?}", transcript.events.last());
            assert_eq!(transcript.error(), Some(allowed), "{:?}", transcript.events.last());
            assert!(!transcript.tokens().is_empty(), "a task without a token is placed again, never lost");
            tally.reset += 1;
        }
    }
    tally.recovered.extend(first.map(|first| first.saturating_duration_since(harmed)));
}

#[expect(clippy::print_stdout, reason = "the figures of the run are its result")]
fn report(fault: &str, mut tally: Tally) {
    tally.recovered.sort();
    let at = |n: usize| tally.recovered.get(n).map_or("-".into(), |span| format!("{} ms", span.as_millis()));
    println!(
        "| {fault} | {} | {} | {} | {} | 0 | 0 | {} | {} |",
        tally.completed,
        tally.placed_again,
        tally.continued,
        tally.reset,
        at(tally.recovered.len() / 2),
        at(tally.recovered.len().saturating_sub(1)),
    );
    let all = TASKS * usize::try_from(ROUNDS).unwrap();
    assert_eq!(tally.completed + tally.reset, all, "every task has its end");
}

/// What is in the table, for whoever reads the output of one test.
#[expect(clippy::print_stdout, reason = "the figures of the run are its result")]
fn heading() {
    println!(
        "| fault | completed | placed again | continued | reset | lost | doubled | recovery p50 | max |"
    );
}

async fn rounds(
    cluster: &mut Cluster,
    allowed: &str,
    timeouts: Option<serde_json::Value>,
    harm: impl AsyncFn(&mut Cluster),
    mend: impl AsyncFn(&mut Cluster),
) -> Tally {
    let mut tally = Tally::default();
    for seed in 0..ROUNDS {
        round(cluster, &mut tally, seed, allowed, timeouts.as_ref(), &harm).await;
        mend(cluster).await;
        for n in 0..cluster.nodes.len() {
            cluster.wait_online(n).await;
        }
    }
    tally
}

fn lost_something(tally: &Tally) {
    assert!(tally.placed_again > 0, "no round hit the window of the first tokens");
    assert!(tally.continued > 0 && tally.reset > 0, "no round hit a stream");
}

// CLOUD-2320
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_node_loses_no_task_that_may_continue_or_has_sent_no_token() {
    let _alone = ALONE.write().await;
    let mut cluster = Cluster::start(fleet()).await;
    let harm = async |cluster: &mut Cluster| {
        cluster.nodes[0].daemon.as_mut().unwrap().kill();
        // At once, that is before its lease of two silent seconds.
        cluster.wait_not_online(0, Duration::from_millis(1_800)).await;
    };
    let mend = async |cluster: &mut Cluster| {
        cluster.wait_liveness(0, Liveness::Offline, Duration::from_secs(6)).await;
        cluster.start_daemon(0);
    };
    let tally = rounds(&mut cluster, "WORKER_RESET", None, harm, mend).await;
    lost_something(&tally);
    heading();
    report("kill -9 of pool-managerd", tally);
}

// CLOUD-2326
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_comes_back_at_once_takes_part_again_and_nothing_is_lost() {
    let _alone = ALONE.write().await;
    let mut cluster = Cluster::start(fleet()).await;
    let harm = async |cluster: &mut Cluster| {
        cluster.nodes[0].daemon.as_mut().unwrap().kill();
        cluster.start_daemon(0);
        cluster.wait_online(0).await;
    };
    let tally = rounds(&mut cluster, "WORKER_RESET", None, harm, async |_| {}).await;
    lost_something(&tally);
    heading();
    report("a node that comes back at once", tally);
}

// CLOUD-2321
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_engine_loses_no_task_that_may_continue_or_has_sent_no_token() {
    let _alone = ALONE.write().await;
    let mut cluster = Cluster::start(fleet()).await;
    let harm = async |cluster: &mut Cluster| cluster.nodes[0].engine.as_mut().unwrap().kill();
    let mend = async |cluster: &mut Cluster| cluster.start_engine(0);
    let tally = rounds(&mut cluster, "WORKER_RESET", None, harm, mend).await;
    lost_something(&tally);
    heading();
    report("SIGKILL of an engine", tally);
}

// CLOUD-2322
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_engine_loses_no_task_that_may_continue_or_has_sent_no_token() {
    let _alone = ALONE.write().await;
    let mut cluster = Cluster::start(fleet()).await;
    let harm = async |cluster: &mut Cluster| {
        cluster.nodes[0].engine.as_ref().unwrap().signal(Signal::SIGSTOP);
    };
    let mend = async |cluster: &mut Cluster| {
        cluster.nodes[0].engine.as_ref().unwrap().signal(Signal::SIGCONT);
    };
    let timeouts = json!({"first_token_ms": 4_000, "token_idle_ms": 2_000});
    let tally = rounds(&mut cluster, "DECODE_TIMEOUT", Some(timeouts), harm, mend).await;
    lost_something(&tally);
    heading();
    report("a hung engine (SIGSTOP)", tally);
}

// CLOUD-2323
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_node_loses_no_task_that_may_continue_or_has_sent_no_token() {
    let _alone = ALONE.write().await;
    let mut cluster = Cluster::start(fleet()).await;
    let harm = async |cluster: &mut Cluster| {
        cluster.nodes[0].daemon.as_ref().unwrap().signal(Signal::SIGSTOP);
        cluster.wait_not_online(0, Duration::from_secs(4)).await;
    };
    let mend = async |cluster: &mut Cluster| {
        cluster.nodes[0].daemon.as_ref().unwrap().signal(Signal::SIGCONT);
    };
    let tally = rounds(&mut cluster, "WORKER_RESET", None, harm, mend).await;
    lost_something(&tally);
    heading();
    report("SIGSTOP of pool-managerd", tally);
}

// CLOUD-2327
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_either_daemon_loses_nothing() {
    let _alone = ALONE.write().await;
    let mut cluster = Cluster::start(fleet()).await;
    let node = async |cluster: &mut Cluster| {
        let daemon = cluster.nodes[0].daemon.as_mut().unwrap();
        daemon.signal(Signal::SIGTERM);
        let status = tokio::task::block_in_place(|| daemon.wait(Duration::from_secs(15)));
        assert!(status.success(), "{status}:\n{}", daemon.log());
        cluster.start_daemon(0);
    };
    let mut of_node = rounds(&mut cluster, "none", None, node, async |_| {}).await;
    let control = async |cluster: &mut Cluster| {
        // It takes nothing new once it is told to stop: all are to be in flight by then.
        e2e_cloud::eventually("all tasks are admitted", Duration::from_secs(5), || async {
            let tasks = cluster.client.get_json("/v2/tasks?limit=500").await?;
            let young =
                tasks["tasks"].as_array()?.iter().filter(|task| task["age_ms"].as_u64() < Some(5_000));
            (young.count() >= TASKS).then_some(())
        })
        .await;
        let daemon = cluster.control.as_mut().unwrap();
        daemon.signal(Signal::SIGTERM);
        let status = tokio::task::block_in_place(|| daemon.wait(Duration::from_secs(35)));
        assert!(status.success(), "{status}:\n{}", daemon.log());
        cluster.start_control();
    };
    let of_control = rounds(&mut cluster, "none", None, control, async |_| {}).await;
    assert_eq!((of_node.reset, of_control.reset), (0, 0));
    // Whatever was placed again had been refused by the node that was leaving.
    of_node.recovered.clear();
    heading();
    report("restart of pool-managerd (SIGTERM)", of_node);
    report("restart of orchestratord (SIGTERM)", of_control);
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

// CLOUD-2328
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_answers_with_errors_is_left_alone_and_tried_with_one_task() {
    let cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    cluster.fault(0, json!({"kind": "error500"})).await;
    let mut failed = 0;
    // Each task fails at most three times; three failures one after the other trip the pool.
    while !cluster.client.node("gpu-node-1").await.unwrap().pools[0].tripped {
        let transcript = cluster.client.run(cluster.task(2)).await;
        transcript.check();
        assert_eq!(transcript.error(), Some("POOL_UNAVAILABLE"));
        failed += 1;
        assert!(failed < 4, "it does not trip");
    }
    let dry = cluster.client.post("/v2/placement/explain", &cluster.task(2)).await;
    let dry: serde_json::Value = dry.json().await.unwrap();
    assert_eq!(dry["pools"][0]["refusal"], "tripped", "{dry}");
    cluster.fault(0, json!({"kind": "none"})).await;
    let transcript = cluster.client.run(cluster.task(2)).await;
    transcript.check();
    assert!(transcript.completed(), "{:?}", transcript.events.last());
    assert!(!cluster.client.node("gpu-node-1").await.unwrap().pools[0].tripped);
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
