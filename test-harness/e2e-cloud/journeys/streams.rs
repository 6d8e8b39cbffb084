//! A task's stream, as many readers see it.

use std::time::Duration;

use e2e_cloud::{Cluster, Engine, Options, eventually};
use serde_json::json;

fn quick() -> Options {
    let engine = Engine::Fake { slots: 4, first_token_ms: 20, pace_ms: 5, dialect: "llamacpp" };
    Options { nodes: 1, engine, ..Options::default() }
}

// CLOUD-1208
// CLOUD-2301
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_goes_in_and_its_tokens_come_out() {
    let cluster = Cluster::start(Options::default()).await;
    let transcript = cluster.client.run(cluster.task(5)).await;
    transcript.check();
    assert_eq!(transcript.names(), ["started", "token", "token", "token", "token", "token", "end"]);
    assert_eq!(transcript.text(), "w0 w1 w2 w3 w4 ");
    let end = &transcript.events.last().unwrap().2;
    assert_eq!((end["tokens_out"].as_u64(), end["finish_reason"].as_str()), (Some(5), Some("length")));
    let view = cluster.client.get_json(&format!("/v2/tasks/{}", transcript.task_id)).await.unwrap();
    assert_eq!(view["state"], "completed");
    assert_eq!(view["attempts"][0]["outcome"], "finished");
}

// CLOUD-2302
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_dialect_and_both_kinds_of_prompt_are_spoken() {
    for dialect in ["llamacpp", "vllm", "tgi", "openai"] {
        let engine = Engine::Fake { slots: 2, first_token_ms: 5, pace_ms: 1, dialect };
        let cluster = Cluster::start(Options { nodes: 1, engine, ..Options::default() }).await;
        let prompt = cluster.client.run(cluster.task(3)).await;
        prompt.check();
        assert_eq!(prompt.text(), "w0 w1 w2 ", "{dialect}");
        let chat = json!({
            "model_ref": "fake-model", "max_tokens": 2, "temperature": 0.0,
            "messages": [{"role": "user", "content": "hi"}],
        });
        let chat = cluster.client.run(chat).await;
        chat.check();
        assert_eq!(chat.text(), "w0 w1 ", "{dialect}");
    }
}

// CLOUD-2303
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_resumes_at_every_position() {
    let cluster = Cluster::start(quick()).await;
    let whole = cluster.client.run(cluster.task(12)).await;
    whole.check();
    let ids: Vec<String> = whole.events.iter().filter_map(|(_, id, _)| id.clone()).collect();
    assert_eq!(ids.len(), 13);
    for (n, id) in ids.iter().enumerate() {
        let rest = cluster.client.follow(&whole.task_id, Some(id), usize::MAX).await;
        assert_eq!(rest.status, 200);
        let seen: Vec<String> = rest.events.iter().filter_map(|(_, id, _)| id.clone()).collect();
        assert_eq!(seen, ids[n + 1..], "after {id}");
    }
    let again = cluster.client.follow(&whole.task_id, None, usize::MAX).await;
    assert_eq!(again.bytes, whole.bytes, "a reader that comes after the end sees the same bytes");
    for bad in ["nonsense", "6b1a4e0c-4f0c-8d2e-9a3b-000000000001:3", &format!("{}9", ids[12])] {
        let refused = cluster.client.follow(&whole.task_id, Some(bad), usize::MAX).await;
        assert_eq!(
            (refused.status, refused.refusal["code"].as_str()),
            (410, Some("EVENTS_EXPIRED")),
            "{bad}"
        );
    }
}

// CLOUD-2304
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_come_and_go_without_effect_on_the_task() {
    let engine = Engine::Fake { slots: 4, first_token_ms: 50, pace_ms: 20, dialect: "llamacpp" };
    let cluster = Cluster::start(Options { nodes: 1, engine, ..Options::default() }).await;
    let accepted: serde_json::Value =
        cluster.client.post("/v2/tasks", &cluster.task(40)).await.json().await.unwrap();
    let id = accepted["task_id"].as_str().unwrap().to_owned();
    assert_eq!(accepted["streams"]["sse"], format!("/v2/tasks/{id}/events"));
    // One leaves after three events and comes back where it was, two read all, one of them late.
    let (leaving, reading) =
        tokio::join!(cluster.client.follow(&id, None, 3), cluster.client.follow(&id, None, usize::MAX));
    let last = leaving.events.last().unwrap().1.clone();
    let resumed = cluster.client.follow(&id, last.as_deref(), usize::MAX).await;
    reading.check();
    assert_eq!(reading.tokens().len(), 40);
    assert_eq!([leaving.tokens(), resumed.tokens()].concat(), reading.tokens());
    let late = cluster.client.follow(&id, None, usize::MAX).await;
    assert_eq!(late.bytes, reading.bytes);
}

// CLOUD-2305
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_slows_only_itself() {
    let engine = Engine::Fake { slots: 4, first_token_ms: 0, pace_ms: 0, dialect: "llamacpp" };
    let cluster = Cluster::start(Options { nodes: 1, engine, ..Options::default() }).await;
    let accepted: serde_json::Value =
        cluster.client.post("/v2/tasks", &cluster.task(20_000)).await.json().await.unwrap();
    let id = accepted["task_id"].as_str().unwrap().to_owned();
    // Opened and not read: its socket fills up.
    let slow = cluster.client.get(&format!("/v2/tasks/{id}/events")).await.unwrap();
    let quick = cluster.client.follow(&id, None, usize::MAX).await;
    quick.check();
    assert_eq!(quick.tokens().len(), 20_000);
    assert_eq!(slow.bytes().await.unwrap(), quick.bytes);
}

// CLOUD-2306
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_reaches_the_engine_and_ends_the_stream() {
    let cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    let accepted: serde_json::Value =
        cluster.client.post("/v2/tasks", &cluster.task(500)).await.json().await.unwrap();
    let id = accepted["task_id"].as_str().unwrap().to_owned();
    let before = cluster.client.follow(&id, None, 4).await;
    assert_eq!(before.tokens().len(), 3);
    let cancel = format!("/v2/tasks/{id}/cancel");
    assert_eq!(cluster.client.post(&cancel, &json!({})).await.status(), 204);
    assert_eq!(cluster.client.post(&cancel, &json!({})).await.status(), 204, "idempotent");
    let after = cluster.client.follow(&id, None, usize::MAX).await;
    after.check();
    assert_eq!(after.error(), Some("CANCELED"));
    let engine = e2e_cloud::Client::new(&cluster.engine_url(0), None);
    eventually("the engine's slot is free", Duration::from_secs(2), || async {
        let slots = engine.get_json("/slots").await?;
        slots.as_array()?.iter().all(|slot| slot["is_processing"] == false).then_some(())
    })
    .await;
    eventually("the control plane sees all slots free", Duration::from_secs(3), || async {
        (cluster.client.node("gpu-node-1").await?.pools[0].slots_free == 4).then_some(())
    })
    .await;
}

// CLOUD-2307
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_task_id_attaches_and_another_body_conflicts() {
    let cluster = Cluster::start(quick()).await;
    let mut task = cluster.task(3);
    task["task_id"] = json!("7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11");
    let first = cluster.client.run(task.clone()).await;
    let second = cluster.client.run(task.clone()).await;
    assert_eq!(first.bytes, second.bytes);
    task["max_tokens"] = json!(4);
    let (status, body) = cluster.client.refused(&task).await;
    assert_eq!((status, body["code"].as_str()), (409, Some("TASK_CONFLICT")));
}

// CLOUD-1103
// CLOUD-2308
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_says_when_to_come_back() {
    let engine = Engine::Fake { slots: 1, first_token_ms: 50, pace_ms: 50, dialect: "llamacpp" };
    let control = vec![("ORCHESTRATORD_ADMISSION_CAPACITY", "2".to_owned())];
    let cluster = Cluster::start(Options { nodes: 1, engine, control, ..Options::default() }).await;
    let mut positions = Vec::new();
    for _ in 0..3 {
        let response = cluster.client.post("/v2/tasks", &cluster.task(40)).await;
        assert_eq!(response.status(), 202);
        let body: serde_json::Value = response.json().await.unwrap();
        positions.push(body["queue_position"].as_u64().unwrap());
    }
    assert_eq!(positions, [0, 0, 1]);
    let response = cluster.client.post("/v2/tasks", &cluster.task(40)).await;
    assert_eq!(response.status(), 429);
    assert!(
        response.headers().contains_key("retry-after") && response.headers().contains_key("x-backoff-ms")
    );
    let body: serde_json::Value = response.json().await.unwrap();
    assert_eq!(
        (body["code"].as_str(), body["policy_label"].as_str()),
        (Some("ADMISSION_REJECT"), Some("reject"))
    );
    let mut batch = cluster.task(1);
    batch["priority"] = json!("batch");
    assert_eq!(
        cluster.client.post("/v2/tasks", &batch).await.status(),
        202,
        "each priority has its own bound"
    );
}
