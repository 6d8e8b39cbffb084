//! The same on llama.cpp itself: two engines that make the same text are one to their client.

use std::time::Duration;

use e2e_cloud::{Cluster, Engine, Options, eventually};
use futures::StreamExt;
use pool_registry_types::node::Liveness;
use reqwest::Method;
use serde_json::{Value, json};

use super::{CHAT, MANY_POINTS, PATIENCE, POINTS, Stream, read, say};

const TOKENS: u32 = 600;

/// A chat as it comes; the node that serves it is killed once so many events were read.
async fn chat(cluster: &mut Cluster, killed_after: Option<usize>) -> (Stream, bool) {
    let body = json!({
        "model": "tiny", "max_tokens": TOKENS, "temperature": 0, "stream": true,
        "messages": [{"role": "user", "content": "once upon a time"}],
    });
    let request = cluster.client.request(Method::POST, CHAT).json(&body).timeout(PATIENCE);
    let response = request.send().await.expect("an answer");
    assert_eq!(response.status(), 200);
    let node = response.headers()["x-llorch-node"].to_str().expect("a name").to_owned();
    let n = cluster.nodes.iter().position(|of| of.id == node).expect("one of the nodes");
    let (mut pieces, mut text, mut was_killed) = (response.bytes_stream(), String::new(), false);
    while let Some(piece) = pieces.next().await {
        text.push_str(std::str::from_utf8(&piece.expect("an orderly end")).expect("text"));
        let events = text.matches("\n\n").count();
        if !was_killed && killed_after.is_some_and(|after| events >= after) && !text.contains("[DONE]") {
            was_killed = true;
            cluster.nodes[n].daemon.as_mut().expect("a running daemon").kill();
        }
    }
    if was_killed {
        cluster.start_daemon(n);
    }
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    let stream = read(&text);
    assert_eq!((stream.errors.len(), stream.ends, stream.finishes), (0, 1, 1), "{text}");
    (stream, was_killed)
}

async fn at_each_point(points: u32) {
    let engine = Engine::Tiny { slots: 2 };
    let mut cluster = Cluster::start(Options { nodes: 2, engine, ..Options::default() }).await;
    let (undisturbed, _) = chat(&mut cluster, None).await;
    assert!(undisturbed.text.len() > 1_000, "{}", undisturbed.text);
    for point in 0..points {
        eventually("two nodes are there", Duration::from_secs(30), || async {
            let nodes = cluster.client.nodes().await;
            let ready = nodes.iter().filter(|node| {
                node.liveness == Liveness::Online
                    && node.pools.iter().any(|pool| pool.report.ready && pool.slots_free > 0)
            });
            (ready.count() == 2).then_some(())
        })
        .await;
        let after = 1 + point * TOKENS / 2 / points;
        let (stream, _) = chat(&mut cluster, usize::try_from(after).ok()).await;
        assert_eq!(stream.text, undisturbed.text, "killed after {after} events");
        assert_eq!(stream.names.len(), 1, "one answer has one id");
    }
    let metrics: String = cluster.client.get("/metrics").await.expect("metrics").text().await.expect("text");
    let of = |name: &str| metrics.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
    let continued: Value = of("llorch_continuations_total ").and_then(|n| n.parse().ok()).unwrap_or_default();
    say(&format!("real engine: {points} chats lost their node, {continued} were generated again"));
    let enough = f64::from(points) / 2.0;
    assert!(continued.as_f64().is_some_and(|continued| continued >= enough), "{continued} of {points}");
}

// CLOUD-2873
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_of_the_real_engine_is_the_same_text_wherever_its_node_dies() {
    at_each_point(POINTS).await;
}

// CLOUD-2873
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long"]
async fn a_chat_of_the_real_engine_is_the_same_text_at_many_points() {
    at_each_point(MANY_POINTS).await;
}
