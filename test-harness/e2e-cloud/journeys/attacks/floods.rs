//! Floods that no client library would send, each on both daemons.

use std::time::Duration;

use e2e_cloud::cluster::{TOKEN, tokens_file};
use e2e_cloud::hostile::{Flood, Target};
use e2e_cloud::process::raise_file_limit;
use e2e_cloud::{Client, Cluster, Options, eventually};
use fastrand::Rng;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::Instant;
use uuid::Uuid;

use super::{MOST_MIB, Watch, right_requests_during};

/// How long each is poured.
const EACH: Duration = Duration::from_millis(1_200);
const SOON: Duration = Duration::from_secs(20);
/// Files that a daemon has beside those of connections.
const OWN_FILES: usize = 64;

fn say(name: &str, what: &str, watch: &Watch) {
    println!(
        "{name}, {what}: {} right requests, p99 {} ms, at most {} MiB resident",
        watch.took.len(),
        watch.p99().as_millis(),
        watch.most_mib
    );
}

fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |files| files.count())
}

// CLOUD-2773
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_of_frames_heads_chunks_and_fields_fill_neither_memory_nor_files_of_a_daemon() {
    raise_file_limit();
    let cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    let control =
        (cluster.client.clone(), cluster.port, cluster.control.as_ref().unwrap().pid(), "/v2/tasks");
    let daemon = cluster.nodes[0].daemon.as_ref().unwrap().pid();
    let node = (cluster.node_client(0), cluster.nodes[0].port, daemon, "/v2/pools");
    let mut random = Rng::with_seed(1);
    for (name, (client, port, pid, path)) in [("orchestratord", control), ("pool-managerd", node)] {
        for flood in Flood::ALL {
            let target = Target { port, token: TOKEN.into(), until: Instant::now() + EACH };
            let pouring = flood.pour(&target, &mut random);
            let (taken, watch) = right_requests_during(&client, path, pid, pouring).await;
            say(name, &format!("{flood:?} ({} MiB taken)", taken >> 20), &watch);
            assert!(watch.most_mib < MOST_MIB, "{name}, {flood:?}: {} MiB", watch.most_mib);
        }
        eventually("its files are closed", SOON, || async { (open_files(pid) < OWN_FILES).then_some(()) })
            .await;
    }
    let transcript = cluster.client.run(cluster.task(4)).await;
    transcript.check();
    assert!(transcript.completed());
}

const CLIENT: &str = "test-token-of-one-client";
const ANOTHER: &str = "test-token-of-another-client";

// CLOUD-2774
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_makes_very_much_of_everything_takes_little_and_nothing_of_another_ones() {
    raise_file_limit();
    let (_folder, file) = tokens_file(&[(CLIENT, "client"), (ANOTHER, "client")]);
    let control = vec![("LLORCH_API_TOKEN_FILE", file), ("ORCHESTRATORD_MAX_CONNECTIONS", "256".to_owned())];
    let cluster = Cluster::start(Options { nodes: 1, control, ..Options::default() }).await;
    let (client, another) =
        (Client::new(&cluster.client.base, Some(CLIENT)), Client::new(&cluster.client.base, Some(ANOTHER)));
    let pid = cluster.control.as_ref().unwrap().pid();
    let put = another.post("/v2/artifacts", &json!({ "another's": true })).await;
    let artifact = put.json::<Value>().await.unwrap()["id"].as_str().expect("a digest").to_owned();
    let excess = async {
        let mut random = Rng::with_seed(1);
        for _ in 0..1_000 {
            let task = json!({
                "model_ref": format!("nobody-has-{}", random.u64(..)), "prompt": "x",
                "session_id": Uuid::from_u128(random.u128(..)), "deadline_ms": 1_000,
            });
            // Taken or refused, with an answer.
            let answer = client.request(Method::POST, "/v2/tasks").timeout(SOON).json(&task).send().await;
            assert!(answer.is_ok(), "{answer:?}");
            let put = client.request(Method::POST, "/v2/artifacts").timeout(SOON).json(&random.u64(..));
            assert_eq!(put.send().await.expect("an answer").status(), 201);
        }
        // Very many connections on which it was let in: those beyond its share are refused, and others' are not.
        let (mut held, mut refused) = (Vec::new(), 0);
        for _ in 0..250 {
            let mut socket = TcpStream::connect(("127.0.0.1", cluster.port)).await.unwrap();
            let ask = format!("GET /v2/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {CLIENT}\r\n\r\n");
            let _ = socket.write_all(ask.as_bytes()).await;
            let status = tokio::time::timeout(SOON, super::status(&mut socket)).await.unwrap();
            assert!([0, 200, 429].contains(&status), "{status}");
            refused += usize::from(status != 200);
            held.push(socket);
        }
        for _ in 0..10 {
            let fresh = Client::new(&another.base, Some(ANOTHER));
            assert_eq!(fresh.get("/v2/nodes").await.expect("an answer").status(), 200);
        }
        refused
    };
    let (refused, watch) = right_requests_during(&cluster.client, "/v2/pools", pid, excess).await;
    say("orchestratord", &format!("much of everything, {refused} connections of 250 refused"), &watch);
    assert!(watch.most_mib < MOST_MIB, "{} MiB", watch.most_mib);
    assert!(refused >= 250 - 128, "{refused}");
    let kept = another.get(&format!("/v2/artifacts/{artifact}")).await.unwrap();
    assert_eq!(kept.status(), 200);
}

/// Lists that nobody reads.
const UNREAD: usize = 40;

// CLOUD-2771
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_lists_that_nobody_reads_take_what_is_allowed_and_no_more() {
    raise_file_limit();
    let (_folder, file) = tokens_file(&[(CLIENT, "client")]);
    let control = vec![("LLORCH_API_TOKEN_FILE", file)];
    let cluster = Cluster::start(Options { nodes: 1, control, ..Options::default() }).await;
    let client = cluster.client.clone();
    // Nodes whose lists are long.
    let models: Vec<String> = (0..4_096).map(|n| format!("{}-{n}", "x".repeat(200))).collect();
    let pool = |n: u32| json!({ "pool_id": format!("p{n}"), "state": "ready", "ready": true, "engine": "vllm", "models": models });
    for n in 0..3 {
        let id = format!("long-{n}");
        let register = json!({
            "node_id": id, "machine_id": "m", "boot_id": Uuid::new_v4(), "address": "http://127.0.0.1:9", "version": "0",
        });
        let answer = client.post("/v2/nodes/register", &register).await;
        let epoch = answer.json::<Value>().await.unwrap()["epoch"].clone();
        let beat = json!({ "epoch": epoch, "seq": 1, "timestamp": "", "pools": [pool(0), pool(1)] });
        assert_eq!(client.post(&format!("/v2/nodes/{id}/heartbeat"), &beat).await.status(), 200);
    }
    let list = client.get("/v2/nodes").await.unwrap().bytes().await.unwrap().len();
    assert!(list > 5_000_000, "{list}");
    let pid = cluster.control.as_ref().unwrap().pid();
    let unread = async {
        let (mut held, mut statuses) = (Vec::new(), Vec::new());
        for n in 0..UNREAD {
            let mut socket = TcpStream::connect(("127.0.0.1", cluster.port)).await.unwrap();
            let path = if n % 2 == 0 { "/v2/nodes" } else { "/v2/pools" };
            let ask = format!("GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {CLIENT}\r\n\r\n");
            socket.write_all(ask.as_bytes()).await.unwrap();
            // One after the other: to make one takes long here, and right requests are to be answered meanwhile.
            statuses.push(super::status(&mut socket).await);
            held.push(socket);
        }
        // Whoever reads is answered.
        let whole = client.get("/v2/nodes").await.unwrap().bytes().await.unwrap();
        assert!(whole.len() > 5_000_000, "{}", whole.len());
        statuses
    };
    let (statuses, watch) = right_requests_during(&client, "/v2/tasks", pid, unread).await;
    let there = statuses.iter().filter(|status| **status == 200).count();
    say("orchestratord", &format!("{UNREAD} lists of {} KiB unread, {there} were made", list >> 10), &watch);
    assert!(statuses.iter().all(|status| [200, 503].contains(status)), "{statuses:?}");
    assert!(there < UNREAD, "what the kernel takes is not much");
    assert!(watch.most_mib < MOST_MIB, "{} MiB", watch.most_mib);
}
