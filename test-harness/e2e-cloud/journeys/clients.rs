//! Clients as they come from the package index, unchanged, over two nodes.

use std::time::Duration;

use e2e_cloud::{Client, Cluster, Engine, Options, Process, clients, eventually, real_engine};
use serde_json::json;

/// Slots of each engine, and how many tasks may wait.
const SLOTS: u32 = 2;
const QUEUE: u32 = 3;
/// The model of the pool with embeddings.
const EMBEDDINGS: &str = "tiny-embeddings";

/// Two nodes with the real engine, and beside the first one's a second that makes embeddings.
async fn cluster() -> (Cluster, Process, Vec<(&'static str, String)>) {
    let control = vec![("ORCHESTRATORD_ADMISSION_CAPACITY", QUEUE.to_string())];
    let engine = Engine::TinyLong { slots: SLOTS };
    let cluster = Cluster::start(Options { nodes: 2, engine, control, ..Options::default() }).await;
    let log = cluster.log("embeddings");
    let embeddings = Process::start(real_engine::embeddings(EMBEDDINGS, &cluster.nodes[0].runtime_dir), &log);
    eventually("the model of embeddings can be asked for", Duration::from_secs(30), || async {
        let models = cluster.client.get_json("/v1/models").await?;
        let mut models = models["data"].as_array()?.iter();
        models.any(|model| model["id"] == EMBEDDINGS).then_some(())
    })
    .await;
    let more = vec![
        ("CLUSTER_EMBEDDINGS_MODEL", EMBEDDINGS.to_owned()),
        ("CLUSTER_ENGINES", [0, 1].map(|n| cluster.engine_url(n)).join(",")),
        ("CLUSTER_SLOTS", (2 * SLOTS).to_string()),
        ("CLUSTER_QUEUE", QUEUE.to_string()),
    ];
    (cluster, embeddings, more)
}

// CLOUD-2880
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_openai_anthropic_and_langchain_do_all_they_can_unchanged() {
    let (cluster, _embeddings, more) = cluster().await;
    clients::run("openai_cases.py", &cluster, &more, 23).await;
    clients::run("anthropic_cases.py", &cluster, &more, 7).await;
    clients::run("langchain_cases.py", &cluster, &more, 8).await;
}

// CLOUD-2880
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn anthropics_client_reads_every_event_of_a_stream() {
    let cluster = Cluster::start(Options::default()).await;
    clients::run("anthropic_cases.py", &cluster, &[("CLUSTER_IS_FAKE", "true".to_owned())], 8).await;
}

// CLOUD-2880
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_stream_of_the_real_engine_comes_as_the_engine_sends_it() {
    let engine = Engine::Tiny { slots: SLOTS };
    let cluster = Cluster::start(Options { nodes: 1, engine, ..Options::default() }).await;
    let engine = Client::new(&cluster.engine_url(0), None);
    let body = json!({
        "model": "tiny", "max_tokens": 6, "temperature": 0, "stream": true,
        "messages": [{"role": "user", "content": "once"}],
    });
    let events = async |client: &Client| {
        let text = client.post("/v1/messages", &body).await.text().await.unwrap();
        // Each has an id of its own, and this version leaves the first event out now and then.
        let events = text.split_terminator("\n\n").filter(|event| !event.starts_with("event: message_start"));
        events.map(str::to_owned).collect::<Vec<_>>()
    };
    // The second time its prompt is cached, on both ways.
    events(&engine).await;
    let (ours, direct) = (events(&cluster.client).await, events(&engine).await);
    assert_eq!(ours, direct);
    assert!(ours.last().is_some_and(|event| event.starts_with("event: message_stop")), "{ours:#?}");
}

// CLOUD-2888
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lines_of_the_readme_work_as_they_stand_there() {
    let engine = Engine::Tiny { slots: SLOTS };
    let cluster = Cluster::start(Options { engine, ..Options::default() }).await;
    let lines = clients::readme_lines().replace("smollm2-135m-instruct.q4_1", "tiny");
    assert_eq!(lines.matches("\"tiny\"").count(), 3, "{lines}");
    let output = clients::shell(&cluster, &lines).await;
    let (before, after) = output.split_once("data: [DONE]").expect(&output);
    assert!(before.contains("chat.completion.chunk"), "{output}");
    let (words, task) = after.split_once("event: started").expect(&output);
    assert!(words.split_whitespace().count() >= 16, "what Python prints: {output}");
    assert!(task.contains("event: token") && task.contains("event: end"), "{output}");
}
