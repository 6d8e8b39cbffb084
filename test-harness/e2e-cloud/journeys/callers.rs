//! Who calls and how: pages of other origins, containers, tokens with limits, clients that leave; and what
//! they are told of their requests.

use std::process::Command;
use std::time::Duration;

use e2e_cloud::cluster::{Cluster, Options, TOKEN};
use e2e_cloud::process::{free_port, program};
use e2e_cloud::{Client, Engine, Process, eventually};
use futures::StreamExt;
use reqwest::{Method, Response};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const CHAT: &str = "/v1/chat/completions";
const ORIGIN: &str = "https://ui.example";

fn chat(tokens: u32) -> Value {
    json!({"model": "fake-model", "stream": true, "max_tokens": tokens, "messages": [{"role": "user", "content": "hi"}]})
}

fn header<'r>(response: &'r Response, name: &str) -> &'r str {
    response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

// CLOUD-2885
// CLOUD-2886
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_of_a_listed_origin_reads_every_answer_and_asks_beforehand_without_a_key() {
    let control = vec![
        ("ORCHESTRATORD_CORS_ORIGINS", ORIGIN.to_owned()),
        ("ORCHESTRATORD_V1_BODY_BYTES", "2000".to_owned()),
    ];
    let cluster = Cluster::start(Options { nodes: 1, control, ..Options::default() }).await;
    let (client, nobody) = (&cluster.client, Client::new(&cluster.client.base, None));
    let from = |client: &Client, method: Method, path: &str, origin: &str| {
        client.request(method, path).header("origin", origin)
    };
    for path in [CHAT, "/v1/models", "/v1/messages", "/tokenize"] {
        let asked = from(&nobody, Method::OPTIONS, path, ORIGIN)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type,x-stainless-os")
            .send()
            .await
            .unwrap();
        assert_eq!((asked.status().as_u16(), header(&asked, "access-control-allow-origin")), (200, ORIGIN));
        assert_eq!(
            header(&asked, "access-control-allow-headers"),
            "authorization,content-type,x-stainless-os",
            "{path}"
        );
        assert!(header(&asked, "access-control-allow-methods").contains("POST"), "{path}");
    }
    let good = from(client, Method::POST, CHAT, ORIGIN).json(&chat(2));
    let lacking = from(client, Method::POST, CHAT, ORIGIN).json(&json!({"model": "none", "messages": []}));
    let long = from(client, Method::POST, CHAT, ORIGIN).body("x".repeat(3_000));
    for (request, status) in [
        (good, 200),
        (from(&nobody, Method::POST, CHAT, ORIGIN).json(&chat(1)), 401),
        (from(client, Method::GET, "/v1/nothing", ORIGIN), 404),
        (lacking, 404),
        (from(client, Method::GET, CHAT, ORIGIN), 405),
        (long, 413),
        (from(client, Method::GET, "/v1/models", ORIGIN), 200),
    ] {
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), status);
        assert_eq!(header(&answer, "access-control-allow-origin"), ORIGIN, "{status}");
        let readable = header(&answer, "access-control-expose-headers");
        for name in ["x-llorch-task-id", "x-request-id", "x-llorch-error", "retry-after", "x-ratelimit-"] {
            assert!(readable.contains(name), "{status}: {readable}");
        }
        // What a client names in its reports, with or without a task.
        let named = header(&answer, "x-request-id");
        let id = Some(header(&answer, "x-llorch-task-id")).filter(|id| !id.is_empty());
        assert_eq!(named, id.unwrap_or(header(&answer, "x-correlation-id")), "{status}");
        assert_eq!(header(&answer, "request-id"), named, "{status}");
        assert!(!named.is_empty(), "{status}");
    }
    for path in [CHAT, "/v1/models"] {
        let other = from(&nobody, Method::OPTIONS, path, "https://other.example")
            .header("access-control-request-method", "POST");
        let answer = other.send().await.unwrap();
        assert_eq!(header(&answer, "access-control-allow-origin"), "", "{path}");
    }
}

// CLOUD-2884
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_home_is_called_by_the_names_that_are_written_down_and_its_refusal_says_where() {
    let start = |dir: &std::path::Path, port: u16, hosts: &str| {
        let mut command = Command::new(program("orchestratord"));
        command
            .env("ORCHESTRATORD_ADDR", format!("127.0.0.1:{port}"))
            .env("ORCHESTRATORD_RUNTIME_DIR", dir.join("engines"))
            .env("ORCHESTRATORD_ALLOWED_HOSTS", hosts);
        Process::start(command, &dir.join("orchestratord.log"))
    };
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let _daemon = start(dir.path(), port, "host.docker.internal,llm.lan");
    let client = Client::new(&format!("http://127.0.0.1:{port}"), None);
    let asked = async |host: &str, path: &str| {
        let answer = client.request(Method::GET, path).header("host", host).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    eventually("it answers", Duration::from_secs(20), || async {
        client.get_json("/v1/models").await.map(drop)
    })
    .await;
    for host in ["host.docker.internal", "host.docker.internal:8080", "LLM.lan:1", "localhost:8080"] {
        for path in ["/v1/models", "/v2/nodes"] {
            assert_eq!(asked(host, path).await.0, 200, "{host} {path}");
        }
    }
    for host in ["evil.example", "llm.lan.evil.example", "a.llm.lan", "docker.internal"] {
        for path in ["/v1/models", "/v2/nodes"] {
            let (status, text) = asked(host, path).await;
            assert!(status == 403 && text.contains("ORCHESTRATORD_ALLOWED_HOSTS"), "{host}: {text}");
        }
    }
    for wrong in ["*.lan", "llm.lan:8080", "http://llm.lan"] {
        let mut daemon = start(dir.path(), free_port(), wrong);
        let status = tokio::task::block_in_place(|| daemon.wait(Duration::from_secs(10)));
        let log = daemon.log();
        assert!(!status.success() && log.contains("ORCHESTRATORD_ALLOWED_HOSTS"), "{wrong}: {log}");
    }
}

// CLOUD-2883
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_with_limits_is_told_what_they_leave_it_on_streams_and_refusals_too() {
    let control = vec![
        ("ORCHESTRATORD_TASKS_PER_TOKEN", "2".to_owned()),
        ("ORCHESTRATORD_REQUESTS_PER_SECOND", "1000".to_owned()),
    ];
    let cluster = Cluster::start(Options { nodes: 1, control, ..Options::default() }).await;
    let client = &cluster.client;
    let begin = async || client.request(Method::POST, CHAT).json(&chat(500)).send().await.unwrap();
    let left = |response: &Response| {
        ["limit", "remaining"].map(|of| header(response, &format!("x-ratelimit-{of}-requests")).to_owned())
    };
    let first = begin().await;
    assert_eq!((first.status().as_u16(), left(&first)), (200, ["2".to_owned(), "1".to_owned()]));
    let second = begin().await;
    assert_eq!(left(&second), ["2", "0"]);
    let refused = begin().await;
    assert_eq!((refused.status().as_u16(), left(&refused)), (429, ["2".to_owned(), "0".to_owned()]));
    let wait: u64 = header(&refused, "retry-after").parse().unwrap();
    assert!((1..=120).contains(&wait), "{wait}");
    assert!(header(&refused, "x-backoff-ms").parse::<u64>().unwrap() > 0);
    assert_eq!(refused.json::<Value>().await.unwrap()["error"]["code"], "rate_limit_exceeded");
    drop((first, second));
    eventually("both places are free again", Duration::from_secs(5), || async {
        let models = client.get("/v1/models").await.ok()?;
        (left(&models) == ["2", "2"]).then_some(())
    })
    .await;
    let ours = client.get("/v2/nodes").await.unwrap();
    assert_eq!(left(&ours), ["", ""], "our own API has no such headers");
    let unbounded = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    let answer = unbounded.client.get("/v1/models").await.unwrap();
    assert_eq!(left(&answer), ["", ""]);
}

// CLOUD-2881
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_shows_what_it_has_cost_also_when_its_stream_is_gone() {
    let control = vec![("ORCHESTRATORD_EVENT_LOG_BYTES", "0".to_owned())];
    let cluster = Cluster::start(Options { nodes: 1, control, ..Options::default() }).await;
    let client = &cluster.client;
    let cost = async |id: &str| {
        let view = client.get_json(&format!("/v2/tasks/{id}")).await.expect("its view");
        let cost = ["tokens_in", "tokens_out", "finish_reason"].map(|field| view[field].clone());
        (view["state"].as_str().unwrap_or_default().to_owned(), cost)
    };
    let ended = async |id: &str| {
        eventually("the task has ended", Duration::from_secs(5), || async {
            let (state, cost) = cost(id).await;
            (state != "running" && state != "queued").then_some((state, cost))
        })
        .await
    };
    let accepted = client.post("/v2/tasks", &cluster.task(6)).await;
    let id = accepted.json::<Value>().await.unwrap()["task_id"].as_str().unwrap().to_owned();
    assert_eq!(ended(&id).await, ("completed".to_owned(), [Value::Null, json!(6), json!("length")]));

    let begin = async |tokens: u32| {
        let answer = client.request(Method::POST, CHAT).json(&chat(tokens)).send().await.unwrap();
        (header(&answer, "x-llorch-task-id").to_owned(), answer)
    };
    let (id, answer) = begin(7).await;
    assert!(answer.text().await.unwrap().ends_with("data: [DONE]\n\n"));
    assert_eq!(ended(&id).await, ("completed".to_owned(), [Value::Null, json!(7), json!("length")]));
    let whole = client.post("/v1/embeddings", &json!({"input": "a b c", "model": "fake-model"})).await;
    let id = header(&whole, "x-llorch-task-id").to_owned();
    assert_eq!(ended(&id).await.1, [json!(3), Value::Null, Value::Null]);

    // What says no usage is counted: of a client that leaves, and of an engine that dies.
    let (id, answer) = begin(500).await;
    let mut pieces = answer.bytes_stream();
    assert!(pieces.next().await.unwrap().is_ok());
    eventually("it is counted while it runs", Duration::from_secs(5), || async {
        let (state, cost) = cost(&id).await;
        (state == "running" && cost[1].as_u64() > Some(3)).then_some(())
    })
    .await;
    drop(pieces);
    let (state, left) = ended(&id).await;
    assert_eq!((state.as_str(), &left[2]), ("canceled", &Value::Null));
    assert!((4..500).contains(&left[1].as_u64().unwrap()), "{left:?}");
    cluster.fault(0, json!({"kind": "cut", "after": 3})).await;
    let (id, answer) = begin(9).await;
    assert!(answer.text().await.unwrap().contains("WORKER_RESET"));
    assert_eq!(ended(&id).await, ("failed".to_owned(), [Value::Null, json!(3), Value::Null]));
}

/// A client on a connection of its own, which can say that it sends nothing more.
async fn submit(cluster: &Cluster, task: &Value, id: &str) -> TcpStream {
    let mut task = task.clone();
    task["task_id"] = json!(id);
    let body = task.to_string();
    let mut socket = TcpStream::connect(("127.0.0.1", cluster.port)).await.unwrap();
    let head = format!(
        "POST /v2/tasks HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nAccept: text/event-stream\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut read = vec![0; 4096];
    let patience = Duration::from_secs(10);
    let length = tokio::time::timeout(patience, socket.read(&mut read)).await.expect("in time").unwrap();
    assert!(read[..length].starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&read[..length]));
    socket
}

// CLOUD-2887
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_is_to_be_canceled_unread_ends_with_its_last_reader_and_another_goes_on() {
    let engine = Engine::Fake { slots: 2, first_token_ms: 50, pace_ms: 20, dialect: "llamacpp" };
    let cluster = Cluster::start(Options { nodes: 1, engine, ..Options::default() }).await;
    let client = &cluster.client;
    let state = async |id: &str| {
        client.get_json(&format!("/v2/tasks/{id}")).await?["state"].as_str().map(str::to_owned)
    };
    let becomes = async |id: &str, wanted: &str| {
        eventually(&format!("{id} is {wanted}"), Duration::from_secs(15), || async {
            (state(id).await.as_deref() == Some(wanted)).then_some(())
        })
        .await;
    };
    let id = |n: u32| format!("7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b{n:02}");
    let mut leaving = cluster.task(2_000);
    leaving["on_disconnect"] = json!("cancel");
    // A FIN is a departure, and so is a connection that is gone.
    let mut finished = submit(&cluster, &leaving, &id(1)).await;
    finished.shutdown().await.unwrap();
    becomes(&id(1), "canceled").await;
    let gone = submit(&cluster, &leaving, &id(2)).await;
    drop(gone);
    becomes(&id(2), "canceled").await;

    // Another reader keeps it, and the last one takes it along, also where the first read nothing.
    let submitter = submit(&cluster, &leaving, &id(3)).await;
    let other = client.get(&format!("/v2/tasks/{}/events", id(3))).await.unwrap();
    let mut other = other.bytes_stream();
    assert!(other.next().await.unwrap().is_ok());
    drop(submitter);
    for _ in 0..10 {
        assert!(other.next().await.unwrap().is_ok(), "it goes on");
    }
    assert_eq!(state(&id(3)).await.as_deref(), Some("running"));
    drop(other);
    becomes(&id(3), "canceled").await;
    let accepted = client.post("/v2/tasks", &leaving).await.json::<Value>().await.unwrap();
    let unread = accepted["task_id"].as_str().unwrap();
    becomes(unread, "running").await;
    let first = client.get(&format!("/v2/tasks/{unread}/events")).await.unwrap();
    drop(first);
    becomes(unread, "canceled").await;

    // Queued ones too; and where nothing is asked for nothing is lost by a client that goes.
    for _ in 0..2 {
        assert_eq!(client.post("/v2/tasks", &cluster.task(100)).await.status(), 202);
    }
    let mut queued = leaving.clone();
    queued["task_id"] = json!(id(5));
    let asked = client.request(Method::POST, "/v2/tasks").header("accept", "text/event-stream");
    let reading = asked.json(&queued).send().await.unwrap();
    becomes(&id(5), "queued").await;
    drop(reading);
    becomes(&id(5), "canceled").await;
    // And who has only ended its own side reads on (CLOUD-2986).
    let mut plain = submit(&cluster, &cluster.task(200), &id(4)).await;
    plain.shutdown().await.unwrap();
    let mut rest = String::new();
    let read = tokio::time::timeout(Duration::from_secs(30), plain.read_to_string(&mut rest));
    read.await.expect("it is closed behind its end").unwrap();
    assert!(rest.contains("event: end"), "{rest}");
    becomes(&id(4), "completed").await;
    let (status, body) = {
        let mut wrong = cluster.task(1);
        wrong["on_disconnect"] = json!("stop");
        client.refused(&wrong).await
    };
    assert_eq!((status, body["code"].as_str()), (400, Some("INVALID_PARAMS")));
    assert!(body["message"].as_str().unwrap().contains("on_disconnect"), "{body}");
}
