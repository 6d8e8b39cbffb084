//! What each kind of engine can do, through both daemons: a prompt, messages, embeddings, ranks,
//! a cancel, a prompt that does not fit, and how busy it says it is.
//!
//! What is expected is read from the server's own table, so that the table is proven too.

use std::time::Duration;

use e2e_cloud::{Client, Cluster, Engine, Options, Transcript, eventually};
use serde_json::{Value, json};

const DIALECTS: [&str; 5] = ["llamacpp", "vllm", "tgi", "triton", "openai"];

async fn cluster_of(dialect: &'static str) -> Cluster {
    let engine = Engine::Fake { slots: 4, first_token_ms: 5, pace_ms: 5, dialect };
    Cluster::start(Options { nodes: 1, engine, ..Options::default() }).await
}

/// The row of the engine in the table of what they can do.
async fn row(cluster: &Cluster, dialect: &str) -> Value {
    let table = cluster.client.get_json("/v2/meta/capabilities").await.expect("the table");
    let rows = table["engine_capabilities"].as_array().expect("rows");
    rows.iter().find(|row| row["engine"] == dialect).expect("a row for each engine").clone()
}

/// Runs the task where the table says that the engine can; else it must be refused by that field.
async fn run_or_refuse(cluster: &Cluster, task: Value, can: &Value, field: &str) -> Option<Transcript> {
    if can == true {
        let transcript = cluster.client.run(task.clone()).await;
        transcript.check();
        assert!(transcript.completed(), "{task}: {:?}", transcript.events.last());
        return Some(transcript);
    }
    let (status, body) = cluster.client.refused(&task).await;
    assert_eq!((status, body["code"].as_str()), (400, Some("UNSUPPORTED")), "{task}: {body}");
    assert!(body["message"].as_str().is_some_and(|message| message.starts_with(field)), "{body}");
    None
}

// CLOUD-2480
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_engine_does_what_the_table_says_and_refuses_the_rest() {
    for dialect in DIALECTS {
        let cluster = cluster_of(dialect).await;
        let can = row(&cluster, dialect).await;
        // The table is held against what is known of the engines, not only against itself.
        let known = (true, dialect != "triton", !matches!(dialect, "tgi" | "triton"));
        let reported = (&can["completion"] == true, &can["chat"] == true, &can["embedding"] == true);
        assert_eq!((reported, &can["rerank"]), (known, &can["embedding"]), "{dialect}");
        let task = |more: Value| {
            let mut task = json!({ "model_ref": "fake-model", "engine": dialect });
            task.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            task
        };

        let options = json!({"prompt": "hi", "max_tokens": 5, "temperature": 0.0, "seed": 7, "stop": ["zz"]});
        let prompt = run_or_refuse(&cluster, task(options), &can["completion"], "prompt").await;
        let prompt = prompt.expect("every engine goes on from a prompt");
        assert_eq!(prompt.text(), "w0 w1 w2 w3 w4 ", "{dialect}");
        let end = &prompt.events.last().unwrap().2;
        assert_eq!((&end["tokens_out"], &end["finish_reason"]), (&json!(5), &json!("length")), "{dialect}");

        let unbounded = task(json!({"prompt": "hi", "temperature": 0.7, "top_p": 1.0}));
        let unbounded = cluster.client.run(unbounded).await;
        unbounded.check();
        assert!(unbounded.completed(), "{dialect}: {:?}", unbounded.events.last());

        let messages = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0.0, "top_p": 1.0});
        if let Some(chat) = run_or_refuse(&cluster, task(messages), &can["chat"], "messages").await {
            assert_eq!(chat.text(), "w0 w1 ", "{dialect}");
        }

        let texts = json!({"workload": "embedding", "inputs": {"embedding": ["a", "four", "seven77"]}});
        if let Some(embedded) = run_or_refuse(&cluster, task(texts), &can["embedding"], "workload").await {
            assert_eq!(embedded.names(), ["started", "result", "result", "result", "end"], "{dialect}");
            let lengths: Vec<_> =
                embedded.results().iter().map(|result| result["embedding"][0].clone()).collect();
            assert_eq!(lengths, [1.0, 4.0, 7.0].map(|length| json!(length)), "{dialect}");
            assert_eq!(embedded.events.last().unwrap().2["tokens_in"], 3, "{dialect}");
        }

        let documents = json!(["the hen", "the red fox", "a fox"]);
        let rerank =
            json!({"workload": "rerank", "inputs": {"rerank": {"query": "red fox", "documents": documents}}});
        if let Some(ranked) = run_or_refuse(&cluster, task(rerank), &can["rerank"], "workload").await {
            let order: Vec<_> = ranked.results().iter().map(|result| result["document"].clone()).collect();
            assert_eq!(order, [1, 2, 0].map(|document| json!(document)), "{dialect}");
        }
    }
}

// CLOUD-2484
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_reaches_each_engine_and_a_prompt_that_does_not_fit_is_the_clients_fault() {
    for dialect in DIALECTS {
        let cluster = cluster_of(dialect).await;
        let accepted: Value =
            cluster.client.post("/v2/tasks", &cluster.task(2_000)).await.json().await.unwrap();
        let id = accepted["task_id"].as_str().unwrap().to_owned();
        cluster.client.follow_tokens(&id, 3).await;
        let cancel = cluster.client.post(&format!("/v2/tasks/{id}/cancel"), &json!({})).await;
        assert_eq!(cancel.status(), 204);
        let canceled = cluster.client.follow(&id, None, usize::MAX).await;
        canceled.check();
        assert_eq!(canceled.error(), Some("CANCELED"), "{dialect}");
        let engine = Client::new(&cluster.engine_url(0), None);
        eventually(&format!("{dialect} is idle"), Duration::from_secs(3), || async {
            (engine.get_json("/fake/busy").await?["busy"] == 0).then_some(())
        })
        .await;

        cluster.fault(0, json!({"kind": "context_too_long"})).await;
        let refused = cluster.client.run(cluster.task(4)).await;
        refused.check();
        assert_eq!(refused.error(), Some("CONTEXT_TOO_LONG"), "{dialect}");
        let view = cluster.client.get_json(&format!("/v2/tasks/{}", refused.task_id)).await.unwrap();
        assert_eq!(view["attempts"].as_array().map(Vec::len), Some(1), "{dialect}: tried once");

        // A connection that breaks in the middle is a death in every dialect.
        cluster.fault(0, json!({"kind": "cut", "after": 2})).await;
        let cut = cluster.client.run(cluster.task(6)).await;
        cut.check();
        assert_eq!((cut.text().as_str(), cut.error()), ("w0 w1 ", Some("WORKER_RESET")), "{dialect}");
    }
}

// CLOUD-2485
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_tells_is_known_by_version_context_and_load() {
    for (dialect, path, body) in [
        ("llamacpp", "/completion", json!({"prompt": "x", "n_predict": 5_000})),
        ("vllm", "/v1/completions", json!({"prompt": "x", "max_tokens": 5_000})),
        ("tgi", "/generate_stream", json!({"inputs": "x", "parameters": {"max_new_tokens": 5_000}})),
    ] {
        let cluster = cluster_of(dialect).await;
        let pool = || async { Some(cluster.client.node("gpu-node-1").await?.pools.first()?.report.clone()) };
        eventually(&format!("{dialect} is known"), Duration::from_secs(5), || async {
            let pool = pool().await?;
            (pool.engine_version.as_deref() == Some("fake") && pool.ctx_max == Some(8192)).then_some(())
        })
        .await;
        // Somebody else's request, straight to the engine, that takes a slot for long.
        let engine = Client::new(&cluster.engine_url(0), None);
        let foreign = engine.post(path, &body).await;
        assert_eq!(foreign.status(), 200, "{dialect}");
        eventually(&format!("the foreign load of {dialect} is seen"), Duration::from_secs(5), || async {
            (pool().await?.replicas.first()?.slots_foreign == 1).then_some(())
        })
        .await;
        drop(foreign);
        eventually(&format!("{dialect} is all ours again"), Duration::from_secs(5), || async {
            (pool().await?.replicas.first()?.slots_foreign == 0).then_some(())
        })
        .await;
    }
}

// CLOUD-2482
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_document_that_fails_is_tried_again_and_a_half_one_is_never_seen() {
    let cluster = cluster_of("vllm").await;
    let texts =
        json!({"model_ref": "fake-model", "workload": "embedding", "inputs": {"embedding": ["a", "b"]}});
    for fault in ["cut", "clean_close"] {
        cluster.fault(0, json!({"kind": fault, "after": 0})).await;
        let transcript = cluster.client.run(texts.clone()).await;
        transcript.check();
        assert_eq!(
            (transcript.results().len(), transcript.error()),
            (0, Some("POOL_UNAVAILABLE")),
            "{fault}"
        );
        cluster.fault(0, json!({"kind": "none"})).await;
        cluster.wait_online(0).await;
    }
    let whole = cluster.client.run(texts).await;
    whole.check();
    assert_eq!(whole.results().len(), 2);
}
