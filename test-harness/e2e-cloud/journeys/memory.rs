//! What a peer can fill of the control plane's memory, filled: by clients, by a node that lies, by readers
//! that do not read. Right requests go on meanwhile.

#![expect(clippy::print_stdout, reason = "the figures of a run are part of its result")]

mod defaults;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use e2e_cloud::cluster::{Engine, TOKEN};
use e2e_cloud::process::raise_file_limit;
use e2e_cloud::{Client, Cluster, Options, eventually};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use uuid::Uuid;

use super::attacks::{resident_mib, right_requests_during};

/// What a control plane takes beside what its settings allow, MiB.
const OWN_MIB: u64 = 96;
const SOON: Duration = Duration::from_secs(20);

/// The settings by which memory is bounded here, MiB: smaller than by default, so that they are filled soon.
const QUEUE_MIB: u64 = 64;
const LIVE_MIB: u64 = 32;
const ENDED_MIB: u64 = 24;
/// Of 4 MiB each, at once: three times what there is room for.
const PROMPTS: usize = 24;

async fn cluster(nodes: usize, engine: Engine) -> Cluster {
    raise_file_limit();
    let bytes = |mib: u64| (mib << 20).to_string();
    let control = vec![
        ("ORCHESTRATORD_QUEUE_BYTES", bytes(QUEUE_MIB)),
        ("ORCHESTRATORD_LIVE_LOG_BYTES", bytes(LIVE_MIB)),
        ("ORCHESTRATORD_EVENT_LOG_BYTES", bytes(ENDED_MIB)),
    ];
    Cluster::start(Options { nodes, engine, control, ..Options::default() }).await
}

/// Fills a bound while right requests are made, and says what it came to.
async fn filling<A>(cluster: &Cluster, what: &str, bound_mib: u64, attack: impl Future<Output = A>) -> A {
    let pid = cluster.control.as_ref().unwrap().pid();
    let before = resident_mib(pid);
    let (outcome, watch) = right_requests_during(&cluster.client, "/v2/pools", pid, attack).await;
    println!(
        "{what}: {before} MiB before, at most {} MiB, {} after; {} right requests, p99 {} ms",
        watch.most_mib,
        resident_mib(pid),
        watch.took.len(),
        watch.p99().as_millis(),
    );
    let most = OWN_MIB + bound_mib;
    assert!(watch.most_mib <= most, "{what}: {} MiB, {most} are allowed", watch.most_mib);
    outcome
}

/// A value of the control plane's metrics.
async fn metric(client: &Client, name: &str) -> f64 {
    let page = client.get("/metrics").await.unwrap().text().await.unwrap();
    let line = page.lines().find(|line| line.starts_with(name));
    let value = line.and_then(|line| line.rsplit_once(' ')).and_then(|(_, value)| value.parse().ok());
    value.unwrap_or_else(|| panic!("no {name}: {page}"))
}

// CLOUD-2725
// CLOUD-2729
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prompts_that_wait_take_no_more_than_their_setting_and_the_rest_are_told_to_come_again() {
    let cluster =
        cluster(1, Engine::Fake { slots: 1, first_token_ms: 60_000, pace_ms: 20, dialect: "llamacpp" }).await;
    let mut task = cluster.task(4);
    task["prompt"] = "x".repeat(4 * 1024 * 1024 - 4096).into();
    let (task, client) = (Arc::new(task), cluster.client.clone());
    let attack = async {
        let mut running = tokio::task::JoinSet::new();
        for _ in 0..PROMPTS {
            let (task, client) = (Arc::clone(&task), client.clone());
            running.spawn(async move {
                let answer =
                    client.request(Method::POST, "/v2/tasks").timeout(SOON).json(&*task).send().await;
                let answer = answer.expect("an answer");
                let again = answer.headers().get("retry-after").cloned();
                let status = answer.status().as_u16();
                (status, again, answer.json::<Value>().await.unwrap_or_default())
            });
        }
        running.join_all().await
    };
    // A connection holds up to 64 KiB of each, and parsing a body takes it twice more for a moment.
    let answers = filling(&cluster, &format!("{PROMPTS} prompts of 4 MiB"), QUEUE_MIB, attack).await;
    let taken = answers.iter().filter(|(status, ..)| *status == 202).count();
    // Half of it, of 4 MiB each; where the machine is slow one has ended meanwhile, without a first token.
    assert!((4..=10).contains(&taken), "{taken} were taken");
    for (_, again, body) in answers.iter().filter(|(status, ..)| *status != 202) {
        assert_eq!(
            (body["code"].as_str(), again.as_ref().map(|it| it.as_bytes())),
            (Some("OVERLOADED"), Some(b"1".as_slice())),
            "{body}"
        );
    }
    let held = metric(&client, "llorch_queue_bytes").await;
    assert!(held > 0.0 && held <= (QUEUE_MIB << 19) as f64, "{held}");
    for (_, _, body) in answers.iter().filter(|(status, ..)| *status == 202) {
        let path = format!("/v2/tasks/{}/cancel", body["task_id"].as_str().expect("an id"));
        let status = client.post(&path, &json!({})).await.status().as_u16();
        assert!(status == 204 || status == 409, "{status}");
    }
    eventually("all is given back", SOON, || async {
        (metric(&client, "llorch_queue_bytes").await == 0.0).then_some(())
    })
    .await;
}

// CLOUD-2726
// CLOUD-2727
// CLOUD-2729
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_that_do_not_read_hold_little_of_their_own_and_no_running_task_is_ended_for_them() {
    let cluster =
        cluster(1, Engine::Fake { slots: 4, first_token_ms: 0, pace_ms: 0, dialect: "llamacpp" }).await;
    let client = cluster.client.clone();
    let attack = async {
        let (mut stopped, mut ids) = (Vec::new(), Vec::new());
        for _ in 0..4 {
            let answer = client.post("/v2/tasks", &cluster.task(30_000)).await;
            assert_eq!(answer.status(), 202);
            let id = answer.json::<Value>().await.unwrap()["task_id"].as_str().unwrap().to_owned();
            for _ in 0..60 {
                let mut socket = TcpStream::connect(("127.0.0.1", cluster.port)).await.unwrap();
                let head = format!(
                    "GET /v2/tasks/{id}/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
                );
                socket.write_all(head.as_bytes()).await.unwrap();
                stopped.push(socket);
            }
            ids.push(id);
        }
        for id in &ids {
            let whole = client.follow(id, None, usize::MAX).await;
            whole.check();
            assert!(whole.completed() && whole.tokens().len() == 30_000, "{:?}", whole.error());
        }
        (stopped, ids)
    };
    // 240 connections of 64 KiB each.
    let what = "4 logs with 60 readers each that do not read";
    let (stopped, ids) = filling(&cluster, what, LIVE_MIB + ENDED_MIB + 15, attack).await;
    assert!(metric(&client, "llorch_live_log_bytes").await <= (LIVE_MIB << 20) as f64);
    // One of them goes on, and has every byte.
    let mut late = stopped.into_iter().next().unwrap();
    let (mut all, mut piece) = (Vec::new(), vec![0; 256 * 1024]);
    let start = Instant::now();
    while !all.windows(11).any(|bytes| bytes == b"event: end\n") && start.elapsed() < SOON {
        let read = tokio::time::timeout(SOON, late.read(&mut piece)).await.expect("more").unwrap();
        assert!(read > 0, "it was cut off after {} bytes", all.len());
        all.drain(..all.len().saturating_sub(16));
        all.extend_from_slice(&piece[..read]);
    }
    drop(late);
    drop(ids);
}

/// A node of the test's own: what it answers to every call, without end, and how much of it was taken.
async fn endless(status: &'static str) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let taken = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&taken);
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let count = Arc::clone(&count);
            tokio::spawn(async move {
                let _ = socket.read(&mut [0; 4096]).await;
                let head =
                    format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\n\r\n{{\"node_id\":\"");
                let _ = socket.write_all(head.as_bytes()).await;
                let piece = vec![b'a'; 64 * 1024];
                while socket.write_all(&piece).await.is_ok() {
                    count.fetch_add(piece.len(), Ordering::Relaxed);
                }
            });
        }
    });
    (address, taken)
}

/// Joins under the id from the address. Returns the epoch.
async fn register(client: &Client, id: &str, address: &str) -> Value {
    let request = json!({"node_id": id, "machine_id": "m", "boot_id": Uuid::new_v4(), "address": address, "version": "0"});
    let answer = client.post("/v2/nodes/register", &request).await;
    assert_eq!(answer.status(), 200);
    answer.json::<Value>().await.unwrap()["epoch"].clone()
}

async fn report(client: &Client, id: &str, epoch: &Value, seq: u64, models: &[String]) -> (u16, Value) {
    let beat = json!({
        "epoch": epoch, "seq": seq, "timestamp": "",
        "pools": models.chunks(1_024).enumerate().map(|(n, models)| json!({
            "pool_id": format!("p{n}"), "state": "ready", "ready": true, "engine": "vllm", "models": models,
            "last_error": "e".repeat(10_000),
        })).collect::<Vec<_>>(),
    });
    let answer = client.post(&format!("/v2/nodes/{id}/heartbeat"), &beat).await;
    (answer.status().as_u16(), answer.json().await.unwrap_or_default())
}

// CLOUD-2720
// CLOUD-2721
// CLOUD-2722
// CLOUD-2723
// CLOUD-2729
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_answers_without_end_and_invents_models_takes_little_and_costs_tasks_nothing() {
    let cluster = cluster(1, Engine::steady()).await;
    let client = cluster.client.clone();
    let attack = async {
        for (n, status) in ["200 OK", "401 Unauthorized", "500 Internal Server Error"].into_iter().enumerate()
        {
            let (address, taken) = endless(status).await;
            register(&client, &format!("liar-{n}"), &address).await;
            eventually("its probe is answered", SOON, || async {
                (taken.load(Ordering::Relaxed) > 0).then_some(())
            })
            .await;
            let pause = Instant::now();
            while pause.elapsed() < Duration::from_secs(3) {
                client.run(cluster.task(2)).await.check();
            }
            println!("{status}: {} MiB were taken of its answers", taken.load(Ordering::Relaxed) >> 20);
        }
        let epoch = register(&client, "inventor", "http://127.0.0.1:9").await;
        let names = |prefix: &str, count| (0..count).map(|n| format!("{prefix}-{n}")).collect::<Vec<_>>();
        let (status, body) = report(&client, "inventor", &epoch, 1, &names("all", 100_000)).await;
        assert_eq!((status, body["code"].as_str()), (400, Some("INVALID_PARAMS")), "{body}");
        let mut worst = Duration::ZERO;
        for seq in 2..40 {
            let (status, body) =
                report(&client, "inventor", &epoch, seq, &names(&format!("of-{seq}"), 8_192)).await;
            assert_eq!(status, 200, "{body}");
            let start = Instant::now();
            client.run(cluster.task(2)).await.check();
            worst = worst.max(start.elapsed());
        }
        println!("38 reports of 8,192 new models each: the slowest task took {} ms", worst.as_millis());
        let view = client.get_json("/v2/nodes/inventor").await.unwrap();
        assert_eq!(view["pools"][0]["report"]["last_error"].as_str().map(str::len), Some(1_024));
    };
    filling(&cluster, "a node that answers without end and invents models", 0, attack).await;
}
