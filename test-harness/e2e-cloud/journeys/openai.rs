//! Clients of OpenAI's and Anthropic's APIs, unchanged: what they send is what an engine gets, and what
//! they get is what it has sent.

use std::process::Command;
use std::time::Duration;

use e2e_cloud::cluster::{Cluster, Options, TOKEN, start_engine};
use e2e_cloud::process::{free_port, program};
use e2e_cloud::{Client, Engine, Process, eventually};
use futures::StreamExt;
use nix::sys::signal::Signal;
use reqwest::{Method, Response};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
/// What a client may write, and nobody on the way is to write anew.
const ODD_CHAT: &str = "{ \"model\" :\"fake-model\",\n \"x\": 1.50, \"max_tokens\": 5, \"stream\":true, \"messages\":[{\"role\":\"user\",\"content\":\"h\\u00e9\"}] }";

fn chat(tokens: u32) -> Value {
    json!({"model": "fake-model", "stream": true, "max_tokens": tokens, "messages": [{"role": "user", "content": "hi"}]})
}

async fn raw(client: &Client, path: &str, body: &'static str) -> Response {
    let request = client.request(Method::POST, path).header("content-type", "application/json").body(body);
    request.timeout(Duration::from_secs(30)).send().await.expect("an answer")
}

/// Sends it and waits for the head only.
async fn begin(client: &Client, path: &str, body: &Value) -> Response {
    client.request(Method::POST, path).json(body).send().await.expect("an answer")
}

fn header<'r>(response: &'r Response, name: &str) -> &'r str {
    response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

async fn busy(engine: &Client) -> Option<u64> {
    engine.get_json("/fake/busy").await?["busy"].as_u64()
}

async fn error(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    (status, serde_json::from_slice(&response.bytes().await.unwrap_or_default()).unwrap_or_default())
}

// CLOUD-2830
// CLOUD-2838
// CLOUD-2839
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_goes_to_an_engine_as_it_came_and_its_answer_comes_back_so_with_our_names_in_its_head() {
    let cluster = Cluster::start(Options::default()).await;
    let (client, engine) = (&cluster.client, Client::new(&cluster.engine_url(0), None));
    for (path, body) in [
        (CHAT, ODD_CHAT),
        ("/v1/completions", r#"{"model":"fake-model","prompt":"x","stream":true,"max_tokens":3}"#),
        ("/v1/embeddings", r#"{"input":["a","bcd"], "model":"fake-model"}"#),
        ("/v1/rerank", r#"{"query":"fox","documents":["a fox","a hen"],"model":"fake-model"}"#),
    ] {
        let (ours, direct) = (raw(client, path, body).await, raw(&engine, path, body).await);
        assert_eq!(
            (ours.status(), header(&ours, "content-type")),
            (direct.status(), header(&direct, "content-type"))
        );
        let task = header(&ours, "x-llorch-task-id").to_owned();
        assert!(!task.is_empty() && header(&ours, "x-request-id") == task, "{path}");
        assert!(header(&ours, "x-llorch-node").starts_with("gpu-node-"), "{path}");
        if body.contains("stream") {
            assert_eq!(
                (header(&ours, "cache-control"), header(&ours, "x-accel-buffering")),
                ("no-cache", "no")
            );
        }
        assert_eq!(ours.bytes().await.unwrap(), direct.bytes().await.unwrap(), "{path}");
        // It is a task like any other, and its content is nobody else's.
        eventually("the task has ended", Duration::from_secs(5), || async {
            let view = client.get_json(&format!("/v2/tasks/{task}")).await?;
            (view["state"] == "completed").then_some(())
        })
        .await;
        assert_eq!(client.get(&format!("/v2/tasks/{task}/events")).await.unwrap().status(), 410, "{path}");
    }
}

// CLOUD-2840
// CLOUD-2844
// CLOUD-2845
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_are_listed_and_every_refusal_has_the_shape_of_its_api() {
    let control = vec![
        ("ORCHESTRATORD_MODEL_ALIASES", "gpt-4o=fake-model".to_owned()),
        ("ORCHESTRATORD_DEFAULT_MODEL", "fake-model".to_owned()),
    ];
    let cluster = Cluster::start(Options { nodes: 1, control, ..Options::default() }).await;
    let client = &cluster.client;
    let list = client.get_json("/v1/models").await.unwrap();
    let names: Vec<&str> = list["data"].as_array().unwrap().iter().filter_map(|m| m["id"].as_str()).collect();
    assert_eq!((names, &list["object"]), (vec!["fake-model", "gpt-4o"], &json!("list")));
    let one = client.get_json("/v1/models/fake-model").await.unwrap();
    assert_eq!((&one["object"], &one["created"]), (&json!("model"), &list["data"][0]["created"]));
    for body in [json!({"input": "x", "model": "gpt-4o"}), json!({"input": "x"})] {
        let answer = client.post("/v1/embeddings", &body).await;
        assert_eq!(
            (answer.status().as_u16(), answer.json::<Value>().await.unwrap()["model"].clone()),
            (200, json!("fake-model"))
        );
    }

    let (status, body) = error(client.get("/v1/models/none").await.unwrap()).await;
    assert_eq!((status, &body["error"]["code"]), (404, &json!("model_not_found")));
    let (status, body) = error(client.post(CHAT, &json!({"model": "none", "messages": []})).await).await;
    assert_eq!(
        (status, &body["error"]["code"], &body["error"]["type"]),
        (404, &json!("model_not_found"), &json!("invalid_request_error"))
    );
    let wrong = raw(client, CHAT, r#"{"model":"a","mod\u0065l":"b"}"#).await;
    assert_eq!(header(&wrong, "x-llorch-error"), "INVALID_PARAMS");
    let (status, body) = error(wrong).await;
    assert_eq!((status, &body["error"]["param"]), (400, &json!("model")));
    let (status, body) = error(client.get("/v1/nothing").await.unwrap()).await;
    assert_eq!((status, &body["error"]["code"]), (404, &json!("NOT_FOUND")));
    let method = client.get(CHAT).await.unwrap();
    assert_eq!(header(&method, "allow"), "POST");
    assert_eq!(error(method).await.0, 405);
    let late = client.request(Method::POST, CHAT).header("x-request-timeout-ms", "soon").json(&chat(1));
    assert_eq!(error(late.send().await.unwrap()).await.0, 400);
    let packed = client.request(Method::POST, CHAT).header("content-encoding", "gzip").json(&chat(1));
    assert_eq!(error(packed.send().await.unwrap()).await.0, 415);

    let nobody = Client::new(&client.base, None);
    let (status, body) = error(nobody.post(CHAT, &chat(1)).await).await;
    assert_eq!((status, &body["error"]["code"]), (401, &json!("invalid_api_key")));
    let (status, body) = error(nobody.post("/v1/messages", &chat(1)).await).await;
    assert_eq!(
        (status, &body["type"], &body["error"]["type"]),
        (401, &json!("error"), &json!("authentication_error"))
    );
    let keyed = nobody.request(Method::POST, CHAT).header("x-api-key", TOKEN).json(&chat(2));
    assert_eq!(keyed.send().await.unwrap().status(), 200);
    let keyed = nobody.request(Method::GET, "/v2/nodes").header("x-api-key", TOKEN);
    assert_eq!(keyed.send().await.unwrap().status(), 401, "only where that is the custom");
    // What this engine has no route for ends by its own word, and in shape.
    let (status, body) = error(client.post("/v1/messages", &chat(1)).await).await;
    assert_eq!((status, &body["error"]["type"]), (400, &json!("invalid_request_error")), "{body}");
}

// CLOUD-2833
// CLOUD-2846
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_dies_has_one_error_and_no_end_and_a_whole_answer_that_is_cut_is_asked_for_again() {
    let cluster = Cluster::start(Options::default()).await;
    let client = &cluster.client;
    for n in 0..2 {
        cluster.fault(n, json!({"kind": "cut", "after": 3})).await;
    }
    let stream = begin(client, CHAT, &chat(9)).await;
    assert_eq!(stream.status(), 200);
    let text = stream.text().await.unwrap();
    let events: Vec<&str> = text.split_terminator("\n\n").collect();
    assert_eq!(events.len(), 4, "{text}");
    let last: Value = serde_json::from_str(events[3].strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(
        (&last["error"]["code"], &last["error"]["type"]),
        (&json!("WORKER_RESET"), &json!("server_error"))
    );
    assert!(!text.contains("[DONE]"), "{text}");
    // Half of an answer that is no stream is nothing: only one of the two is well, and it answers.
    cluster.fault(1, json!({"kind": "none"})).await;
    for _ in 0..4 {
        let answer = client.post("/v1/embeddings", &json!({"input": "x", "model": "fake-model"})).await;
        assert_eq!((answer.status().as_u16(), header(&answer, "x-llorch-node")), (200, "gpu-node-2"));
        assert_eq!(answer.json::<Value>().await.unwrap()["data"][0]["embedding"][0], 1.0);
    }
    // What an engine refuses is its own word, whatever the route.
    cluster.fault(1, json!({"kind": "context_too_long"})).await;
    cluster.fault(0, json!({"kind": "context_too_long"})).await;
    let (status, body) = error(client.post(CHAT, &chat(1)).await).await;
    assert_eq!((status, &body["error"]["type"]), (400, &json!("exceed_context_size_error")));
}

// CLOUD-2837
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_is_noticed_at_once_streaming_in_prefill_and_queued() {
    let engine = Engine::Fake { slots: 1, first_token_ms: 100, pace_ms: 50, dialect: "vllm" };
    let cluster = Cluster::start(Options { nodes: 1, engine, ..Options::default() }).await;
    let (client, engine) = (&cluster.client, Client::new(&cluster.engine_url(0), None));
    let is_idle = || async {
        eventually("the engine is idle", Duration::from_secs(5), || async {
            (busy(&engine).await? == 0).then_some(())
        })
        .await;
        eventually("nothing runs or waits", Duration::from_secs(5), || async {
            let tasks = client.get_json("/v2/tasks?limit=500").await?;
            let over = |task: &Value| task["state"] != "running" && task["state"] != "queued";
            tasks["tasks"].as_array()?.iter().all(over).then_some(())
        })
        .await;
    };
    let mut running = begin(client, CHAT, &chat(2_000)).await.bytes_stream();
    assert!(running.next().await.unwrap().is_ok());
    let queued = {
        let request = client.request(Method::POST, CHAT).json(&chat(2_000));
        tokio::spawn(request.timeout(Duration::from_secs(1)).send())
    };
    assert!(queued.await.unwrap().is_err(), "its status waits");
    drop(running);
    is_idle().await;
    cluster.fault(0, json!({"kind": "hang", "after": 0})).await;
    let prefill = client.request(Method::POST, CHAT).json(&chat(2)).timeout(Duration::from_secs(1));
    assert!(prefill.send().await.is_err());
    let whole = json!({"input": "x", "model": "fake-model"});
    let whole = client.request(Method::POST, "/v1/embeddings").json(&whole).timeout(Duration::from_secs(1));
    assert!(whole.send().await.is_err());
    is_idle().await;
}

// CLOUD-2854
// CLOUD-2858
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_events_and_long_whole_answers_pass_as_they_came_and_leave_nothing_behind() {
    let cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    let (client, engine) = (&cluster.client, Client::new(&cluster.engine_url(0), None));
    let patient = async |client: &Client, path: &str, body: &Value| {
        let request = client.request(Method::POST, path).json(body).timeout(Duration::from_secs(60));
        let answer = request.send().await.expect("an answer");
        assert_eq!(answer.status(), 200, "{path}");
        answer.bytes().await.expect("all of it")
    };
    for bytes in [300_000, 4 * 1024 * 1024] {
        cluster.fault(0, json!({"kind": "long", "bytes": bytes})).await;
        let ours = patient(client, CHAT, &chat(2)).await;
        assert!(ours.len() > 2 * bytes && ours.ends_with(b"data: [DONE]\n\n"), "{}", ours.len());
        assert!(ours == patient(&engine, CHAT, &chat(2)).await, "{bytes}");
    }
    cluster.fault(0, json!({"kind": "none"})).await;
    for inputs in [10, 250_000] {
        let body = json!({"model": "fake-model", "input": vec!["a"; inputs]});
        let ours = patient(client, "/v1/embeddings", &body).await;
        println!("{inputs} inputs: an answer of {} bytes", ours.len());
        assert!(ours == patient(&engine, "/v1/embeddings", &body).await, "{inputs}");
    }
    eventually("nothing is held", Duration::from_secs(5), || async {
        let page = client.get("/metrics").await.ok()?.text().await.ok()?;
        let is_zero = |name: &str| page.lines().any(|line| line == format!("{name} 0"));
        ["llorch_live_log_bytes", "llorch_held_answer_bytes", "llorch_queue_bytes"]
            .into_iter()
            .all(is_zero)
            .then_some(())
    })
    .await;
}

// CLOUD-2838
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_waits_hears_comments_with_an_empty_line_behind_them_until_its_first_event() {
    let engine = Engine::Fake { slots: 1, first_token_ms: 0, pace_ms: 100, dialect: "llamacpp" };
    let cluster = Cluster::start(Options { nodes: 1, engine, ..Options::default() }).await;
    let client = &cluster.client;
    let mut first = begin(client, CHAT, &chat(160)).await.bytes_stream();
    assert!(first.next().await.unwrap().is_ok());
    let waiting = begin(client, CHAT, &chat(2)).await;
    assert_eq!(
        (waiting.status().as_u16(), header(&waiting, "content-type")),
        (200, "text/event-stream; charset=utf-8")
    );
    while let Some(piece) = first.next().await {
        assert!(!String::from_utf8_lossy(&piece.unwrap()).contains("\n:"), "no comment between events");
    }
    let text = waiting.text().await.unwrap();
    assert!(text.starts_with(": queued 0\n\n"), "{text}");
    let events: Vec<&str> = text.split_terminator("\n\n").filter(|event| !event.starts_with(':')).collect();
    assert_eq!((events.len(), events.last()), (4, Some(&"data: [DONE]")), "{text}");
}

// CLOUD-2830
// CLOUD-2839
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_home_profile_serves_them_too() {
    let dir = tempfile::tempdir().unwrap();
    let runtime_dir = dir.path().join("engines");
    let port = free_port();
    let mut command = Command::new(program("orchestratord"));
    command
        .env("ORCHESTRATORD_ADDR", format!("127.0.0.1:{port}"))
        .env("ORCHESTRATORD_RUNTIME_DIR", &runtime_dir);
    let mut daemon = Process::start(command, &dir.path().join("orchestratord.log"));
    let client = Client::new(&format!("http://127.0.0.1:{port}"), None);
    let steady = Engine::steady();
    let mut engine = start_engine(&steady, &runtime_dir, &dir.path().join("engine.log"));
    eventually("the model can be asked for", Duration::from_secs(20), || async {
        let models = client.get_json("/v1/models").await?;
        (models["data"][0]["id"] == "fake-model").then_some(())
    })
    .await;
    let stream = raw(&client, CHAT, ODD_CHAT).await;
    assert_eq!((stream.status().as_u16(), header(&stream, "x-llorch-node")), (200, "home"));
    let text = stream.text().await.unwrap();
    assert!(text.contains("w0 ") && text.ends_with("data: [DONE]\n\n"), "{text}");
    let answer = client.post("/v1/embeddings", &json!({"input": "abc", "model": "fake-model"})).await;
    assert_eq!(answer.json::<Value>().await.unwrap()["data"][0]["embedding"][0], 3.0);
    let mut cut = begin(&client, CHAT, &chat(500)).await.bytes_stream();
    assert!(cut.next().await.unwrap().is_ok());
    engine.as_mut().unwrap().kill();
    let mut rest = Vec::new();
    while let Some(piece) = cut.next().await {
        rest.extend_from_slice(&piece.unwrap());
    }
    let rest = String::from_utf8(rest).unwrap();
    assert!(rest.contains("\"WORKER_RESET\"") && !rest.contains("[DONE]"), "{rest}");
    daemon.signal(Signal::SIGTERM);
    let status = tokio::task::block_in_place(|| daemon.wait(Duration::from_secs(10)));
    assert!(status.success(), "{}", daemon.log());
}

// CLOUD-2830
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_real_engine_answers_in_its_own_words() {
    let cluster =
        Cluster::start(Options { nodes: 1, engine: Engine::Tiny { slots: 2 }, ..Options::default() }).await;
    let (client, engine) = (&cluster.client, Client::new(&cluster.engine_url(0), None));
    let body = r#"{"model":"tiny","prompt":"once","max_tokens":8,"temperature":0,"stream":false}"#;
    let text = async |client: &Client| {
        let answer = raw(client, "/v1/completions", body).await;
        assert_eq!(answer.status(), 200);
        answer.json::<Value>().await.unwrap()["choices"][0].clone()
    };
    assert_eq!(text(client).await, text(&engine).await);
    let chat = json!({"model": "tiny", "max_tokens": 8, "temperature": 0, "stream": true, "messages": [{"role": "user", "content": "once"}]});
    let stream = begin(client, CHAT, &chat).await.text().await.unwrap();
    assert!(stream.ends_with("data: [DONE]\n\n"), "{stream}");
}
