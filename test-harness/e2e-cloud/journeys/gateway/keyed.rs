//! Requests with an `Idempotency-Key`: one answer for all who come with it.

use std::time::Duration;

use e2e_cloud::{Client, Cluster, Engine, Options, eventually};
use futures::future::join_all;
use reqwest::{Method, RequestBuilder, Response};
use serde_json::{Value, json};

use super::{CHAT, PATIENCE, Script, busy, chat, header, is_idle, set};

const EMBED: &str = "/v1/embeddings";
const SOON: Duration = Duration::from_secs(10);
/// The last client of a task may be away so long. Source: .specs/01 CLOUD-2915.
const AWAY: Duration = Duration::from_secs(10);

async fn cluster(
    nodes: usize,
    engine: Engine,
    control: Vec<(&'static str, String)>,
) -> (Cluster, Vec<Client>) {
    let cluster = Cluster::start(Options { nodes, engine, control, ..Options::default() }).await;
    let engines = (0..nodes).map(|n| Client::new(&cluster.engine_url(n), None)).collect();
    (cluster, engines)
}

fn steady(first_token_ms: u64) -> Engine {
    Engine::Fake { slots: 4, first_token_ms, pace_ms: 20, dialect: "vllm" }
}

fn keyed(client: &Client, path: &str, key: &str, body: &Value) -> RequestBuilder {
    client.request(Method::POST, path).header("idempotency-key", key).json(body).timeout(PATIENCE)
}

async fn send(client: &Client, path: &str, key: &str, body: &Value) -> Response {
    keyed(client, path, key, body).send().await.expect("an answer")
}

async fn whole(response: Response) -> (u16, String, Vec<u8>) {
    let (status, task) = (response.status().as_u16(), header(&response, "x-llorch-task-id").to_owned());
    (status, task, response.bytes().await.expect("an orderly end").to_vec())
}

async fn tasks(cluster: &Cluster) -> usize {
    let list = cluster.client.get_json("/v2/tasks?limit=500").await.expect("a list");
    list["tasks"].as_array().expect("tasks").len()
}

fn embed() -> Value {
    json!({"model": "fake-model", "input": "abc"})
}

// CLOUD-2911
// CLOUD-2912
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_with_one_key_have_one_task_and_the_same_bytes_from_the_first_one_on() {
    let (cluster, _) = cluster(1, steady(300), Vec::new()).await;
    let client = &cluster.client;
    // At once, while it streams, and once it has completed.
    let long = chat(60);
    let together = join_all((0..3).map(|_| send(client, CHAT, "stream-1", &long))).await;
    let mut first = together.into_iter();
    let mut reading = first.next().unwrap();
    let begun = reading.chunk().await.unwrap().unwrap();
    let late = whole(send(client, CHAT, "stream-1", &long).await).await;
    let mut answers = vec![late.clone()];
    for response in first {
        answers.push(whole(response).await);
    }
    let task = header(&reading, "x-llorch-task-id").to_owned();
    answers.push((200, task, [&begun[..], &reading.bytes().await.unwrap()].concat()));
    answers.push(whole(send(client, CHAT, "stream-1", &long).await).await);
    assert!(late.2.ends_with(b"data: [DONE]\n\n"), "{}", String::from_utf8_lossy(&late.2));
    assert!(answers.iter().all(|answer| *answer == late), "{} answers", answers.len());
    assert_eq!((answers.len(), tasks(&cluster).await), (5, 1));
    // The same of a whole one.
    let mut answers =
        join_all((0..3).map(|_| async { whole(send(client, EMBED, "whole-1", &embed()).await).await })).await;
    answers.push(whole(send(client, EMBED, "whole-1", &embed()).await).await);
    assert!(answers[0].0 == 200 && answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    assert_eq!(tasks(&cluster).await, 2);
    // Without a key each is its own.
    for _ in 0..2 {
        assert_eq!(client.post(EMBED, &embed()).await.status(), 200);
    }
    assert_eq!(tasks(&cluster).await, 4);
}

// CLOUD-2910
// CLOUD-2911
// CLOUD-2917
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_of_another_request_conflicts_and_one_that_is_none_is_refused_and_none_is_shown() {
    let (cluster, _) = cluster(1, steady(5), Vec::new()).await;
    let client = &cluster.client;
    let secret = "a-key-that-nobody-shows";
    assert_eq!(send(client, EMBED, secret, &embed()).await.status(), 200);
    let other = json!({"model": "fake-model", "input": "abcd"});
    for request in [
        keyed(client, EMBED, secret, &other),
        keyed(client, &format!("{EMBED}?a=b"), secret, &embed()),
        keyed(client, "/v1/rerank", secret, &embed()),
        client
            .request(Method::POST, EMBED)
            .header("idempotency-key", secret)
            .body("{\"model\":\"fake-model\",\"input\":\"abc\" }"),
    ] {
        let refused = request.send().await.unwrap();
        assert_eq!((refused.status().as_u16(), header(&refused, "x-should-retry")), (409, "false"));
        assert_eq!(header(&refused, "x-llorch-error"), "TASK_CONFLICT");
        let body: Value = refused.json().await.unwrap();
        assert_eq!(body["error"]["type"], "invalid_request_error", "{body}");
        assert!(!body.to_string().contains(secret), "{body}");
    }
    let refused = send(client, "/v1/messages", secret, &embed()).await;
    let body: Value = refused.json().await.unwrap();
    assert_eq!(body["type"], "error", "{body}");
    for wrong in ["", "a b", "\u{e9}", &"x".repeat(256)] {
        let refused =
            client.request(Method::POST, EMBED).header("idempotency-key", wrong.as_bytes()).json(&embed());
        let refused = refused.send().await.unwrap();
        assert_eq!(
            (refused.status().as_u16(), header(&refused, "x-llorch-error")),
            (400, "INVALID_PARAMS"),
            "{wrong}"
        );
    }
    let twice = keyed(client, EMBED, "a", &embed()).header("idempotency-key", "b").send().await.unwrap();
    assert_eq!(twice.status(), 400);
    assert_eq!(send(client, EMBED, &"x".repeat(255), &embed()).await.status(), 200);

    let pages = ["/metrics", "/v2/tasks?limit=500", "/v2/nodes", "/v2/pools"]
        .map(async |path| client.get(path).await.expect("an answer").text().await.expect("a body"));
    let shown = join_all(pages).await.concat();
    assert!(!shown.contains(secret));
    for log in ["orchestratord", "gpu-node-1"] {
        let text = std::fs::read_to_string(cluster.log(log)).expect("a log");
        assert!(!text.contains(secret), "{log}");
    }
}

// CLOUD-2913
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_failed_or_was_canceled_or_is_forgotten_frees_its_key() {
    let control = vec![("ORCHESTRATORD_TASK_RETENTION_SECS", "2".to_owned())];
    let (cluster, _) = cluster(1, steady(5), control).await;
    let client = &cluster.client;
    cluster.fault(0, json!({"kind": "cut", "after": 3})).await;
    let cut = whole(send(client, CHAT, "k", &chat(9)).await).await;
    assert!(String::from_utf8_lossy(&cut.2).contains("WORKER_RESET"));
    cluster.fault(0, json!({"kind": "none"})).await;
    cluster.wait_online(0).await;
    let good = whole(send(client, CHAT, "k", &chat(9)).await).await;
    assert!(good.2.ends_with(b"data: [DONE]\n\n") && good.1 != cut.1, "{}", String::from_utf8_lossy(&good.2));
    // Another body with it, once the retention is over.
    eventually("the key is free", SOON, || async {
        (send(client, CHAT, "k", &chat(2_000)).await.status() == 200).then_some(())
    })
    .await;
    // What was asked for just now is read by nobody: canceled, it frees its key too.
    let list = client.get_json("/v2/tasks?state=running").await.unwrap();
    let task = list["tasks"][0]["task_id"].as_str().expect("it runs").to_owned();
    assert_eq!(client.post(&format!("/v2/tasks/{task}/cancel"), &json!({})).await.status(), 204);
    assert_eq!(send(client, CHAT, "k", &chat(3)).await.status(), 200);
}

// CLOUD-2915
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_may_come_again_within_ten_seconds_and_the_last_one_that_stays_away_ends_the_task() {
    let (cluster, engines) = cluster(1, steady(5), Vec::new()).await;
    let client = &cluster.client;
    let long = chat(5_000);
    let begin = async || {
        let mut stream = send(client, CHAT, "k", &long).await;
        let piece = stream.chunk().await.unwrap().unwrap();
        assert!(String::from_utf8_lossy(&piece).contains("w0 "), "from the first byte");
        stream
    };
    let (first, second) = (begin().await, begin().await);
    drop(first);
    drop(second);
    tokio::time::sleep(AWAY / 2).await;
    assert_eq!(busy(&engines[0]).await, Some(1), "it goes on for those who come again");
    let again = begin().await;
    tokio::time::sleep(AWAY + Duration::from_secs(1)).await;
    assert_eq!(busy(&engines[0]).await, Some(1), "somebody reads");
    assert_eq!(tasks(&cluster).await, 1);
    let left = std::time::Instant::now();
    drop(again);
    is_idle(&cluster, &engines, AWAY + SOON).await;
    let after = left.elapsed();
    assert!(after > AWAY - Duration::from_secs(1), "{after:?}");
    // And so is one that still waits for its first byte.
    cluster.fault(0, json!({"kind": "hang", "after": 0})).await;
    let waiting = tokio::spawn(keyed(client, EMBED, "w", &embed()).send());
    eventually("it is with the engine", SOON, || async { (busy(&engines[0]).await? == 1).then_some(()) })
        .await;
    waiting.abort();
    is_idle(&cluster, &engines, AWAY + SOON).await;
}

// CLOUD-2912
// CLOUD-2913
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_dies_under_a_key_is_replaced_unseen_or_ends_it_for_all_and_frees_it() {
    let (mut cluster, _) = cluster(2, steady(3_000), Vec::new()).await;
    let client = cluster.client.clone();
    // Before the first byte.
    let asked: Vec<_> = (0..2)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { whole(send(&client, EMBED, "w", &embed()).await).await })
        })
        .collect();
    let node = eventually("it runs on a node", SOON, || async {
        let nodes = client.nodes().await;
        nodes.iter().find(|node| !node.running_attempts.is_empty()).map(|node| node.node_id.to_string())
    })
    .await;
    let n = usize::from(node == "gpu-node-2");
    cluster.nodes[n].daemon.as_mut().unwrap().kill();
    let answers = join_all(asked).await.into_iter().map(Result::unwrap).collect::<Vec<_>>();
    assert!(answers[0].0 == 200 && answers[0] == answers[1], "{answers:?}");
    assert_eq!(tasks(&cluster).await, 1);
    // After it.
    let mut streams = Vec::new();
    for _ in 0..2 {
        let mut stream = send(&client, CHAT, "s", &chat(3_000)).await;
        stream.chunk().await.unwrap().unwrap();
        streams.push(stream);
    }
    cluster.nodes[1 - n].daemon.as_mut().unwrap().kill();
    for stream in streams {
        let (_, _, rest) = whole(stream).await;
        let rest = String::from_utf8_lossy(&rest).into_owned();
        assert_eq!((rest.matches("WORKER_RESET").count(), rest.contains("[DONE]")), (1, false), "{rest}");
    }
    let other = keyed(&client, CHAT, "s", &chat(4)).timeout(Duration::from_secs(2)).send().await;
    assert!(other.is_err() || other.unwrap().status() != 409, "the key is free");
}

// CLOUD-2914
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_beyond_8_mib_goes_on_for_its_readers_and_frees_its_key_and_a_shorter_one_is_kept_whole() {
    let (cluster, engines) = cluster(1, steady(5), Vec::new()).await;
    let client = &cluster.client;
    let event =
        format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{}\"}}}}]}}\n\n", "x".repeat(64 * 1024));
    let stream = |events: usize| {
        let mut script = Script::new(200, "text/event-stream");
        script.pieces.push((event.clone().into_bytes(), events));
        // Its readers are as fast.
        script.pause_ms = 1;
        script.piece("data: [DONE]\n\n")
    };
    let short = stream(100);
    set(&engines[0], &short).await;
    let first = whole(send(client, CHAT, "short", &chat(9)).await).await;
    assert!(first.2 == short.bytes());
    assert!(whole(send(client, CHAT, "short", &chat(9)).await).await == first, "6 MiB are kept");
    let long = stream(400);
    set(&engines[0], &long).await;
    let (one, two) = tokio::join!(async { whole(send(client, CHAT, "long", &chat(9)).await).await }, async {
        whole(send(client, CHAT, "long", &chat(9)).await).await
    });
    assert!(one.2 == long.bytes() && two.2 == long.bytes(), "{} and {} bytes", one.2.len(), two.2.len());
    let again = whole(send(client, CHAT, "long", &chat(9)).await).await;
    assert!(again.2 == long.bytes() && again.1 != one.1, "it runs anew");
    // Nothing of the long ones is kept.
    eventually("their memory is free", SOON, || async {
        let page = client.get("/metrics").await.ok()?.text().await.ok()?;
        let line = page.lines().find(|line| line.starts_with("llorch_live_log_bytes "))?;
        (line.rsplit_once(' ')?.1.parse::<f64>().ok()? < 1_000_000.0).then_some(())
    })
    .await;
    let mut script = Script::new(200, "application/json");
    script.pieces.push((vec![b' '; 64 * 1024], 200));
    set(&engines[0], &script).await;
    let big = whole(send(client, EMBED, "big", &embed()).await).await;
    assert!(big.2.len() == 200 * 64 * 1024);
    assert!(
        whole(send(client, EMBED, "big", &embed()).await).await.1 != big.1,
        "a whole one of 12 MiB runs anew"
    );
}
