//! Readers that stand still, and those that are too many, while others want to read.

use std::time::Duration;

use e2e_cloud::cluster::{TOKEN, tokens_file};
use e2e_cloud::{Client, Cluster, Engine, Options, eventually};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const SOON: Duration = Duration::from_secs(30);
const OWNER: &str = "test-token-of-the-owner";

async fn reads_nothing(port: u16, task: &str) -> TcpStream {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let ask = format!(
        "GET /v2/tasks/{task}/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
    );
    // It may be closed for another by now; else its answer has begun.
    let _ = socket.write_all(ask.as_bytes()).await;
    let _ = tokio::time::timeout(SOON, socket.read_exact(&mut [0; 12])).await.expect("an answer, or an end");
    socket
}

async fn submitted(client: &Client, task: &Value) -> String {
    let answer = client.post("/v2/tasks", task).await;
    assert_eq!(answer.status(), 202);
    answer.json::<Value>().await.unwrap()["task_id"].as_str().unwrap().to_owned()
}

// CLOUD-2766
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_that_stand_still_make_room_where_connections_are_short_and_keep_nobody_out() {
    let most = 48;
    let engine = Engine::Fake { slots: 4, first_token_ms: 0, pace_ms: 0, dialect: "llamacpp" };
    let control = vec![("ORCHESTRATORD_MAX_CONNECTIONS", most.to_string())];
    let cluster = Cluster::start(Options { nodes: 1, engine, control, ..Options::default() }).await;
    // Longer than the kernel takes of a connection that is not read.
    let mut tasks = Vec::new();
    for _ in 0..2 {
        tasks.push(submitted(&cluster.client, &cluster.task(80_000)).await);
    }
    for id in &tasks {
        let whole = cluster.client.follow(id, None, usize::MAX).await;
        whole.check();
        assert!(whole.completed(), "{:?}", whole.error());
    }
    let mut stopped = Vec::new();
    for n in 0..2 * most {
        stopped.push(reads_nothing(cluster.port, &tasks[n % 2]).await);
    }
    // Each on a connection of its own. The first ones may have to wait until it shows who stands still.
    for n in 0..2 * most {
        eventually(&format!("the fresh connection {n} is answered"), SOON, || async {
            let fresh = Client::new(&cluster.client.base, Some(TOKEN));
            let asked = tokio::time::timeout(Duration::from_secs(2), fresh.get("/v2/nodes")).await;
            (asked.ok()?.ok()?.status() == 200).then_some(())
        })
        .await;
    }
    let page = cluster.client.get("/metrics").await.unwrap().text().await.unwrap();
    let closed = "llorch_closed_connections_total{why=\"stalled\"} ";
    let count: u64 = page.lines().find_map(|line| line.strip_prefix(closed)).unwrap().parse().unwrap();
    println!("{count} readers that stood still have made room for {} fresh connections", 2 * most);
    assert!(count > 0, "{page}");
    cluster.wait_online(0).await;
}

// CLOUD-2763
// CLOUD-2775
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_submits_a_task_reads_it_however_many_others_do() {
    let (_folder, file) = tokens_file(&[(OWNER, "client")]);
    let control = vec![("LLORCH_API_TOKEN_FILE", file)];
    let engine = Engine::Fake { slots: 1, first_token_ms: 3_000, pace_ms: 0, dialect: "llamacpp" };
    let cluster = Cluster::start(Options { nodes: 1, engine, control, ..Options::default() }).await;
    let owner = Client::new(&cluster.client.base, Some(OWNER));
    let mut task = cluster.task(10);
    task["task_id"] = "00000000-0000-4000-8000-000000000015".into();
    let id = submitted(&owner, &task).await;
    let mut others = Vec::new();
    for _ in 0..64 {
        let response = cluster.client.get(&format!("/v2/tasks/{id}/events")).await.unwrap();
        assert_eq!(response.status(), 200);
        others.push(response);
    }
    let refused = cluster.client.get(&format!("/v2/tasks/{id}/events")).await.unwrap();
    assert_eq!(refused.status(), 429);
    // The same again attaches to it, and reads it.
    let transcript = owner.run(task).await;
    transcript.check();
    assert!(transcript.completed() && transcript.task_id == id, "{transcript:?}");
}
