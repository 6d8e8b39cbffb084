//! The same with the defaults of all settings: what a bound comes to that is filled.

use std::time::Duration;

use e2e_cloud::cluster::tokens_file;
use e2e_cloud::hostile::engine::{Harm, HostileEngine, LONG_INPUTS};
use e2e_cloud::process::raise_file_limit;
use e2e_cloud::{Client, Cluster, Engine, Options, eventually};
use reqwest::Method;
use serde_json::json;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::metric;
use crate::attacks::{Watch, resident_mib, right_requests_during};

/// Resident memory where one bound is filled, MiB.
const ONE_MIB: u64 = 360;
/// And where all are.
const ALL_MIB: u64 = 500;
const SOON: Duration = Duration::from_secs(60);
const HOLDER: &str = "test-token-of-one-holder";
const OTHER: &str = "test-token-of-another-holder";
const QUEUE_BYTES: f64 = (128_u32 << 20) as f64;
/// Prompts of 4 MiB, for which there is no engine: of each holder more than its half has room for.
const PROMPTS: usize = 24;
/// More than fit into `ORCHESTRATORD_LIVE_LOG_BYTES` and `…_EVENT_LOG_BYTES`.
const STREAMS: usize = 44;
const LONG_SLOTS: u32 = 8;
const LIVE_LOG_BYTES: f64 = (256_u32 << 20) as f64;
/// Connections with lists that are not read.
const LISTS: usize = 200;
/// Connections of strangers at once.
const STRANGERS: usize = 4_000;

/// A cluster of a node whose engine makes everybody wait, and one that answers at length.
async fn cluster() -> (Cluster, HostileEngine, TempDir) {
    raise_file_limit();
    let (folder, file) = tokens_file(&[(HOLDER, "client"), (OTHER, "client")]);
    let control = vec![("LLORCH_API_TOKEN_FILE", file)];
    let engine = Engine::Fake { slots: 1, first_token_ms: 600_000, pace_ms: 20, dialect: "llamacpp" };
    let mut cluster = Cluster::start(Options { nodes: 1, engine, control, ..Options::default() }).await;
    cluster.prepare_node(1);
    let long =
        HostileEngine::start(Harm::Long, "long-model", &cluster.nodes[1].runtime_dir, LONG_SLOTS).await;
    cluster.start_daemon(1);
    cluster.wait_online(1).await;
    (cluster, long, folder)
}

async fn watched<A>(cluster: &Cluster, what: &str, most: u64, attack: impl Future<Output = A>) -> A {
    let pid = cluster.control.as_ref().unwrap().pid();
    let before = resident_mib(pid);
    let (outcome, watch) = right_requests_during(&cluster.client, "/v2/pools", pid, attack).await;
    let Watch { most_mib, .. } = watch;
    println!(
        "defaults, {what}: {before} MiB before, at most {most_mib} MiB of {most}; {} right requests, p99 {} ms",
        watch.took.len(),
        watch.p99().as_millis(),
    );
    assert!(most_mib <= most, "{what}: {most_mib} MiB, {most} are allowed");
    outcome
}

/// Streams of 8 MB whose readers read nothing, more than there is room for: the last ones take that of the
/// first. Returns the readers, and the most that the streams took.
async fn fill_logs(cluster: &Cluster, token: &str) -> (Vec<TcpStream>, f64) {
    let inputs: Vec<String> = (0..LONG_INPUTS).map(|n| n.to_string()).collect();
    let task =
        json!({ "model_ref": "long-model", "workload": "embedding", "inputs": { "embedding": inputs } })
            .to_string();
    let ask = format!(
        "POST /v2/tasks HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\nAccept: text/event-stream\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{task}",
        task.len()
    );
    let (mut stopped, mut most) = (Vec::new(), 0.0_f64);
    for _ in 0..STREAMS {
        let mut socket = TcpStream::connect(("127.0.0.1", cluster.port)).await.unwrap();
        socket.write_all(ask.as_bytes()).await.unwrap();
        let mut status = [0; 12];
        socket.read_exact(&mut status).await.unwrap();
        assert_eq!(&status[9..], b"200");
        stopped.push(socket);
        // No more at a time than the engine has slots.
        eventually("the streams that were asked for", SOON, || async {
            let running = metric(&cluster.client, "llorch_attempts_running").await;
            (running < f64::from(LONG_SLOTS)).then_some(())
        })
        .await;
        most = most.max(metric(&cluster.client, "llorch_live_log_bytes").await);
    }
    assert!(most >= 0.85 * LIVE_LOG_BYTES, "{most}");
    (stopped, most)
}

/// Connections that say nothing.
async fn fill_connections(cluster: &Cluster) -> Vec<TcpStream> {
    let mut held = Vec::new();
    for _ in 0..STRANGERS {
        let Ok(mut socket) = TcpStream::connect(("127.0.0.1", cluster.port)).await else { break };
        let _ = socket.write_all(b"GET /v2/nodes HTTP/1.1\r\nX-Half: ").await;
        held.push(socket);
    }
    held
}

/// Prompts of both holders that wait, each taken or told to come again. Returns the bytes that they hold.
async fn fill_queue(cluster: &Cluster) -> f64 {
    let mut task = cluster.task(4);
    task["prompt"] = "x".repeat(4 * 1024 * 1024 - 4096).into();
    let task = task.to_string();
    let mut most = 0.0_f64;
    for token in [HOLDER, OTHER] {
        let client = Client::new(&cluster.client.base, Some(token));
        for _ in 0..PROMPTS {
            let ask = client.request(Method::POST, "/v2/tasks").timeout(SOON);
            let answer =
                ask.header("content-type", "application/json").body(task.clone()).send().await.unwrap();
            assert!(matches!(answer.status().as_u16(), 202 | 503), "{}", answer.status());
        }
        most = most.max(metric(&cluster.client, "llorch_queue_bytes").await);
    }
    assert!(most >= 0.85 * QUEUE_BYTES, "{most}");
    most
}

/// Whole tables that nobody reads, of as many connections as may be.
async fn fill_lists(cluster: &Cluster, token: &str) -> Vec<TcpStream> {
    let ask = format!(
        "GET /v2/tasks?limit=1000 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n"
    );
    let mut held = Vec::new();
    for _ in 0..LISTS {
        let Ok(mut socket) = TcpStream::connect(("127.0.0.1", cluster.port)).await else { break };
        let _ = socket.write_all(ask.repeat(8).as_bytes()).await;
        held.push(socket);
    }
    held
}

// CLOUD-2772
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_defaults_a_bound_that_is_filled_takes_no_more_than_360_mib() {
    let (cluster, long, _folder) = cluster().await;
    let what = format!("{STRANGERS} connections of strangers");
    drop(watched(&cluster, &what, ONE_MIB, fill_connections(&cluster)).await);
    let logs = fill_logs(&cluster, HOLDER);
    let (stopped, live) = watched(&cluster, "streams that are not read", ONE_MIB, logs).await;
    println!("{} streams of {live} bytes at most; the engine sent {} MiB", stopped.len(), long.sent() >> 20);
}

// CLOUD-2772
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_defaults_all_bounds_filled_take_no_more_than_500_mib() {
    let (cluster, _long, _folder) = cluster().await;
    let all = async {
        let strangers = fill_connections(&cluster).await;
        let (stopped, live) = fill_logs(&cluster, HOLDER).await;
        let queued = fill_queue(&cluster).await;
        let lists = fill_lists(&cluster, OTHER).await;
        // All at once for a while.
        tokio::time::sleep(Duration::from_secs(2)).await;
        (strangers.len(), stopped.len(), live, queued, lists.len())
    };
    let filled = watched(&cluster, "all of them", ALL_MIB, all).await;
    println!("strangers, streams, bytes of streams, bytes of prompts, lists: {filled:?}");
}
