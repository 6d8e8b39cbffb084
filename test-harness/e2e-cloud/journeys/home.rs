//! The home profile: one daemon, engines found through local handoff files.

use e2e_cloud::{Engine, Home};
use serde_json::json;

// CLOUD-1021
// CLOUD-1320
// CLOUD-2330
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_daemon_serves_the_same_api_without_a_token() {
    let mut home = Home::start(Engine::steady(), &[]).await;
    let client = home.client.clone();
    let task = json!({"model_ref": "fake-model", "prompt": "x", "max_tokens": 4});
    let transcript = client.run(task.clone()).await;
    transcript.check();
    assert_eq!((transcript.node(), transcript.text().as_str()), (Some("home"), "w0 w1 w2 w3 "));

    let stranger = json!({
        "node_id": "a", "machine_id": "m", "boot_id": "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11",
        "address": "http://127.0.0.1:1", "version": "0",
    });
    let register = client.post("/v2/nodes/register", &stranger).await;
    assert_eq!(register.status(), 503);
    let body: serde_json::Value = register.json().await.unwrap();
    assert_eq!(body["code"], "CLOUD_PROFILE_DISABLED");

    // The one node is steered like any other.
    let drain = client.post("/v2/nodes/home/drain", &json!({})).await;
    assert_eq!(drain.json::<serde_json::Value>().await.unwrap()["kept_by_node"], true);
    assert!(home.runtime_dir.join(".home.draining").exists());
    let mut pinned = task.clone();
    pinned["placement"] = json!({"mode": "pin", "node_id": "home"});
    assert_eq!(client.refused(&pinned).await.1["code"], "NODE_UNAVAILABLE");
    assert_eq!(client.post("/v2/nodes/home/resume", &json!({})).await.status(), 202);
    assert!(client.run(pinned).await.completed());
    let pool = client.post("/v2/pools/pool-0/drain", &json!({})).await;
    assert_eq!(pool.json::<serde_json::Value>().await.unwrap()["state"], "draining");
    assert_eq!(client.post("/v2/pools/pool-0/reload", &json!({})).await.status(), 202);

    // A dead engine: the running task ends honestly, the next waits for the new engine.
    let mut long = task.clone();
    long["max_tokens"] = json!(500);
    let accepted: serde_json::Value = client.post("/v2/tasks", &long).await.json().await.unwrap();
    let id = accepted["task_id"].as_str().unwrap().to_owned();
    assert!(!client.follow(&id, None, 4).await.tokens().is_empty(), "it has sent tokens");
    home.engine.as_mut().unwrap().kill();
    let lost = client.follow(&id, None, usize::MAX).await;
    lost.check();
    assert_eq!(lost.error(), Some("WORKER_RESET"));
    home.start_engine();
    let next = client.run(task).await;
    next.check();
    assert!(next.completed(), "{:?}", next.events.last());
    drop(home.engine.take());
    home.stop().await;
}
