//! Readers that are too many, while others want to read.

use e2e_cloud::cluster::tokens_file;
use e2e_cloud::{Client, Cluster, Engine, Options};
use serde_json::Value;

const OWNER: &str = "test-token-of-the-owner";

async fn submitted(client: &Client, task: &Value) -> String {
    let answer = client.post("/v2/tasks", task).await;
    assert_eq!(answer.status(), 202);
    answer.json::<Value>().await.unwrap()["task_id"].as_str().unwrap().to_owned()
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
