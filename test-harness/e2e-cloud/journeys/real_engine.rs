//! The same journeys on llama.cpp itself, with the tiny model.

use std::time::Duration;

use e2e_cloud::{Client, Cluster, Engine, Options, eventually, real_engine};
use serde_json::json;

// CLOUD-2340
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_engine_answers_the_same_bytes_twice() {
    let cluster =
        Cluster::start(Options { nodes: 2, engine: Engine::Tiny { slots: 2 }, ..Options::default() }).await;
    let mut task = cluster.task(32);
    task["temperature"] = json!(0.0);
    task["seed"] = json!(7);
    let first = cluster.client.run(task.clone()).await;
    let second = cluster.client.run(task.clone()).await;
    for transcript in [&first, &second] {
        transcript.check();
        assert!(transcript.completed(), "{:?}", transcript.events.last());
        let end = &transcript.events.last().unwrap().2;
        assert_eq!(end["tokens_out"], 32);
        assert_eq!(end["finish_reason"], "length");
    }
    assert!(first.text().split_whitespace().count() >= 16, "{:?}", first.text());
    assert_eq!(first.text(), second.text());
    let chat = json!({
        "model_ref": "tiny", "max_tokens": 8, "temperature": 0.0,
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
    });
    let chat = cluster.client.run(chat).await;
    chat.check();
    assert!(chat.completed() && !chat.text().is_empty());
}

// CLOUD-2341
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_engine_says_what_is_too_long_and_stops_what_is_canceled() {
    let cluster =
        Cluster::start(Options { nodes: 1, engine: Engine::Tiny { slots: 2 }, ..Options::default() }).await;
    let node = cluster.client.node("gpu-node-1").await.unwrap();
    assert_eq!((node.pools[0].slots_total, node.pools[0].report.ctx_max), (2, Some(1024)));
    let mut long = cluster.task(4);
    long["prompt"] = json!("word ".repeat(4_000));
    let refused = cluster.client.run(long).await;
    refused.check();
    assert_eq!(refused.error(), Some("CONTEXT_TOO_LONG"));
    let accepted: serde_json::Value =
        cluster.client.post("/v2/tasks", &cluster.task(900)).await.json().await.unwrap();
    let id = accepted["task_id"].as_str().unwrap();
    assert_eq!(cluster.client.post(&format!("/v2/tasks/{id}/cancel"), &json!({})).await.status(), 204);
    let canceled = cluster.client.follow(id, None, usize::MAX).await;
    canceled.check();
    let engine = Client::new(&cluster.engine_url(0), None);
    eventually("the engine is idle", Duration::from_secs(3), || async {
        let slots = engine.get_json("/slots").await?;
        slots.as_array()?.iter().all(|slot| slot["is_processing"] == false).then_some(())
    })
    .await;
}

// CLOUD-2342
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_node_with_a_real_engine_loses_no_queued_task() {
    let mut cluster =
        Cluster::start(Options { nodes: 2, engine: Engine::Tiny { slots: 1 }, ..Options::default() }).await;
    let client = cluster.client.clone();
    let task = cluster.task(200);
    let runs: Vec<_> = (0..10)
        .map(|_| {
            let (client, task) = (client.clone(), task.clone());
            tokio::spawn(async move { client.run(task).await })
        })
        .collect();
    eventually("tasks run", Duration::from_secs(10), || async {
        client.nodes().await.iter().any(|node| !node.running_attempts.is_empty()).then_some(())
    })
    .await;
    cluster.nodes[0].daemon.as_mut().unwrap().kill();
    let mut completed = 0;
    for run in runs {
        let transcript = run.await.unwrap();
        transcript.check();
        if transcript.completed() {
            completed += 1;
        } else {
            assert_eq!(transcript.error(), Some("WORKER_RESET"));
            assert!(!transcript.tokens().is_empty());
        }
    }
    assert!(completed >= 9, "{completed} of 10 completed, and one slot was lost");
}

/// A cluster of one node that runs the engine itself, once it is ready.
async fn supervised() -> Cluster {
    let pools = vec![(0, real_engine::pool("pool-0", "tiny", ""))];
    let options = Options { nodes: 1, engine: Engine::Tiny { slots: 2 }, pools, ..Options::default() };
    Cluster::start(options).await
}

async fn pool(cluster: &Cluster) -> serde_json::Value {
    cluster.node_client(0).get_json("/v2/pools/pool-0/status").await.expect("its status")
}

// CLOUD-1210
// CLOUD-1216
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_engine_takes_every_real_grammar() {
    let cluster = supervised().await;
    let grammars = real_engine::grammars();
    assert_eq!(grammars.len(), 50);
    let mut refused = Vec::new();
    for (name, grammar) in grammars {
        let mut task = cluster.task(8);
        task["grammar"] = json!(grammar);
        let transcript = cluster.client.run(task).await;
        if !transcript.completed() {
            refused.push(format!("{name}: {:?} {}", transcript.events.last(), transcript.refusal));
        }
    }
    assert!(refused.is_empty(), "{refused:#?}");
    let pool = pool(&cluster).await;
    assert_eq!((pool["state"].as_str(), pool["supervised"]["restarts"].as_u64()), (Some("ready"), Some(0)));
}

/// Grammars at which a real engine dies, or compiles for minutes.
pub(crate) fn hostile_grammars() -> Vec<String> {
    let doubled: String =
        (0..40).map(|rule| format!("a{rule} ::= a{0} \"x\" | a{0} \"y\"\n", rule + 1)).collect();
    vec![
        format!("root ::= a0\n{doubled}a40 ::= \"z\""),
        "root ::= a{0,1999}\na ::= \"a\"?".to_owned(),
        "root ::= a root \"x\"\na ::= \"a\"?".to_owned(),
        "root ::= ".to_owned() + &"(".repeat(50_000),
        "root ::= \"a\"".to_owned() + &"?".repeat(60_000),
        "root ::= ".to_owned() + &"\"a\"{0,2000} ".repeat(4_000),
        format!("root ::= \"{}\"", "a".repeat(70_000)),
    ]
}

// CLOUD-1210
// CLOUD-1216
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grammars_that_would_kill_or_stop_a_real_engine_do_not_reach_it() {
    let cluster = supervised().await;
    for attack in hostile_grammars() {
        // A pool fails after four requests that each kill its engine.
        for _ in 0..4 {
            let mut task = cluster.task(4);
            task["grammar"] = json!(attack);
            let (status, body) = cluster.client.refused(&task).await;
            assert_eq!((status, body["code"].as_str()), (400, Some("INVALID_PARAMS")), "{body}");
            assert!(body["message"].as_str().is_some_and(|text| text.starts_with("grammar: ")), "{body}");
        }
    }
    let pool = pool(&cluster).await;
    assert_eq!((pool["state"].as_str(), pool["supervised"]["restarts"].as_u64()), (Some("ready"), Some(0)));
    let transcript = cluster.client.run(cluster.task(4)).await;
    transcript.check();
    assert!(transcript.completed());
}
