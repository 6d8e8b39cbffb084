//! Who calls and how: pages of other origins, containers, tokens with limits, clients that leave; and what
//! they are told of their requests.

use std::process::Command;
use std::time::Duration;

use e2e_cloud::cluster::{Cluster, Options};
use e2e_cloud::process::{free_port, program};
use e2e_cloud::{Client, Process, eventually};
use reqwest::{Method, Response};
use serde_json::{Value, json};

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
