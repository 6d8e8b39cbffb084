//! Clients that go away, whatever their requests are at by then: nothing goes on for nobody.

use std::time::{Duration, Instant};

use e2e_cloud::{Client, Cluster, Engine, Options, eventually};
use futures::StreamExt;
use futures::future::join_all;
use reqwest::{Method, RequestBuilder};
use serde_json::json;
use tokio::sync::watch;

use super::{CHAT, busy, chat, is_idle};

const CLIENTS: usize = 120;
/// Longest until nothing of theirs is left.
const SOON: Duration = Duration::from_secs(10);

fn engine(slots: u32) -> Engine {
    Engine::Fake { slots, first_token_ms: 300, pace_ms: 50, dialect: "vllm" }
}

async fn cluster(nodes: usize, slots: u32) -> (Cluster, Vec<Client>) {
    let cluster = Cluster::start(Options { nodes, engine: engine(slots), ..Options::default() }).await;
    let engines = (0..nodes).map(|n| Client::new(&cluster.engine_url(n), None)).collect();
    (cluster, engines)
}

fn stream(client: &Client) -> RequestBuilder {
    client.request(Method::POST, CHAT).json(&chat(5_000))
}

fn whole(client: &Client) -> RequestBuilder {
    client.request(Method::POST, "/v1/embeddings").json(&json!({"input": "x", "model": "fake-model"}))
}

/// Until so many requests are with the engine and so many wait here.
async fn until(cluster: &Cluster, engine: &Client, at_engine: u64, queued: usize) {
    eventually("the requests are where they are to be", SOON, || async {
        let list = cluster.client.get_json("/v2/tasks?limit=500&state=queued").await?;
        let is_so = busy(engine).await? == at_engine && list["tasks"].as_array()?.len() == queued;
        is_so.then_some(())
    })
    .await;
}

// CLOUD-2903
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_queued_in_prefill_streaming_or_whole_leaves_no_slot_taken() {
    let (cluster, engines) = cluster(1, 1).await;
    let (client, engine) = (&cluster.client, &engines[0]);
    // Streaming.
    let mut running = stream(client).send().await.unwrap().bytes_stream();
    assert!(running.next().await.unwrap().is_ok());
    // Queued, one of each kind.
    let queued = [stream(client), whole(client)].map(|request| tokio::spawn(request.send()));
    until(&cluster, engine, 1, 2).await;
    queued.iter().for_each(tokio::task::JoinHandle::abort);
    until(&cluster, engine, 1, 0).await;
    assert!(running.next().await.unwrap().is_ok(), "the one that runs goes on");
    drop(running);
    is_idle(&cluster, &engines, SOON).await;
    // In prefill, and a whole answer that is being made.
    cluster.fault(0, json!({"kind": "hang", "after": 0})).await;
    for request in [stream(client), whole(client)] {
        let asked = tokio::spawn(request.send());
        until(&cluster, engine, 1, 0).await;
        asked.abort();
        is_idle(&cluster, &engines, SOON).await;
    }
    cluster.fault(0, json!({"kind": "none"})).await;
    assert_eq!(whole(client).send().await.unwrap().status(), 200, "the slot serves others");
}

// CLOUD-2903
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_and_twenty_clients_that_leave_at_once_leave_nothing_behind() {
    let (cluster, engines) = cluster(2, 8).await;
    let (leave, left) = watch::channel(false);
    let clients = (0..CLIENTS).map(|n| {
        // Each on a connection of its own.
        let client = Client::new(&cluster.client.base, cluster.client.token.as_deref());
        let mut left = left.clone();
        tokio::spawn(async move {
            let request = if n % 3 == 0 { whole(&client) } else { stream(&client) };
            let asking = async {
                let response = request.send().await.expect("an answer");
                assert_eq!(response.status(), 200);
                let mut pieces = response.bytes_stream();
                while let Some(piece) = pieces.next().await {
                    piece.expect("an orderly end");
                }
            };
            tokio::select! {
                () = asking => false,
                _ = left.wait_for(|left| *left) => true,
            }
        })
    });
    let clients: Vec<_> = clients.collect();
    eventually("all slots are taken, and most of them wait", SOON, || async {
        let at_engines = busy(&engines[0]).await? + busy(&engines[1]).await?;
        let list = cluster.client.get_json("/v2/tasks?limit=500&state=queued").await?;
        (at_engines == 16 && list["tasks"].as_array()?.len() >= 60).then_some(())
    })
    .await;
    let gone = Instant::now();
    leave.send_replace(true);
    let left = join_all(clients).await.into_iter().filter(|left| *left.as_ref().unwrap()).count();
    is_idle(&cluster, &engines, SOON).await;
    eprintln!("{left} of {CLIENTS} left at once; idle {} ms later", gone.elapsed().as_millis());
    assert!(left >= 76, "{left}");
    let answers = join_all((0..16).map(|_| whole(&cluster.client).send())).await;
    assert!(answers.into_iter().all(|answer| answer.unwrap().status() == 200));
}

/// Slots that the real engine works on.
async fn working(engine: &Client) -> Option<usize> {
    let slots = engine.get_json("/slots").await?;
    Some(slots.as_array()?.iter().filter(|slot| slot["is_processing"] == true).count())
}

// CLOUD-2903
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_real_engine_works_for_no_client_that_has_left_whole_or_streaming() {
    const SLOTS: u32 = 2;
    let options = Options { nodes: 1, engine: Engine::TinyLong { slots: SLOTS }, ..Options::default() };
    let cluster = Cluster::start(options).await;
    let engine = Client::new(&cluster.engine_url(0), None);
    let ask = |stream: bool, tokens: u32| {
        let body = json!({
            "model": "tiny", "messages": [{"role": "user", "content": "Once upon a time"}],
            "max_tokens": tokens, "ignore_eos": true, "temperature": 0, "stream": stream,
        });
        cluster.client.request(Method::POST, CHAT).json(&body)
    };
    for stream in [false, true] {
        // Two that run and two that wait for them.
        let asked: Vec<_> = (0..4).map(|_| tokio::spawn(ask(stream, 8_000).send())).collect();
        eventually("it works for two of them", SOON, || async {
            (working(&engine).await? == 2).then_some(())
        })
        .await;
        let left = Instant::now();
        drop(asked.into_iter().map(|asked| asked.abort()).collect::<Vec<()>>());
        eventually("it works for nobody, and no slot is taken", SOON, || async {
            let node = cluster.client.node("gpu-node-1").await?;
            let tasks = cluster.client.get_json("/v2/tasks?limit=500&state=queued").await?;
            let is_free = node.pools[0].slots_free == SLOTS && node.running_attempts.is_empty();
            (is_free && working(&engine).await? == 0 && tasks["tasks"].as_array()?.is_empty()).then_some(())
        })
        .await;
        eprintln!(
            "streaming: {stream}: the engine is idle {} ms after they left",
            left.elapsed().as_millis()
        );
    }
    assert_eq!(ask(false, 4).send().await.unwrap().status(), 200, "the slots serve others");
}
