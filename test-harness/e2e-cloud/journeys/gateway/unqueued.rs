//! What takes no slot: tokens are counted and templates applied however busy the engines are.

use std::cell::Cell;
use std::time::Duration;

use e2e_cloud::{Client, Cluster, Engine, Options, eventually};
use futures::StreamExt;
use futures::future::join_all;
use reqwest::{Method, Response};
use serde_json::{Value, json};

use super::{CHAT, Script, chat, header, post, received, set};

const ROUTES: [&str; 4] = ["/tokenize", "/detokenize", "/apply-template", "/v1/messages/count_tokens"];
const BODY: &str = "{ \"model\" : \"fake-model\", \"content\":\"h\\u00e9\", \"x\": 1e400 }";
/// At once on a node. Source: .specs/01 CLOUD-2907.
const AT_ONCE: usize = 8;

async fn cluster(nodes: usize) -> (Cluster, Vec<Client>) {
    let control = vec![
        ("ORCHESTRATORD_MODEL_ALIASES", "gpt-4o=fake-model".to_owned()),
        ("ORCHESTRATORD_TASKS_PER_TOKEN", "2".to_owned()),
    ];
    let engine = Engine::Fake { slots: 1, first_token_ms: 5, pace_ms: 50, dialect: "llamacpp" };
    let cluster = Cluster::start(Options { nodes, engine, control, ..Options::default() }).await;
    let engines = (0..nodes).map(|n| Client::new(&cluster.engine_url(n), None)).collect();
    (cluster, engines)
}

fn tokens() -> Script {
    Script::new(200, "application/json").piece("{\"tokens\":[1,2 ,3]}\n")
}

/// Takes a second until it is whole.
fn slow(seconds: u64) -> Script {
    let mut script = tokens().piece(" ");
    script.pause_ms = seconds * 1_000;
    script
}

async fn refused(response: Response) -> (u16, String, Value) {
    let code = header(&response, "x-llorch-error").to_owned();
    (response.status().as_u16(), code, response.json().await.expect("an error in shape"))
}

// CLOUD-2906
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_counted_while_every_slot_is_taken_the_queue_waits_and_the_quota_is_used_up() {
    let (cluster, engines) = cluster(1).await;
    let (client, engine) = (&cluster.client, &engines[0]);
    let mut running =
        client.request(Method::POST, CHAT).json(&chat(5_000)).send().await.unwrap().bytes_stream();
    assert!(running.next().await.unwrap().is_ok());
    let waiting = tokio::spawn(client.request(Method::POST, CHAT).json(&chat(5)).send());
    eventually("one waits", Duration::from_secs(5), || async {
        let list = client.get_json("/v2/tasks?state=queued").await?;
        (list["tasks"].as_array()?.len() == 1).then_some(())
    })
    .await;
    let third = post(client, CHAT, chat(5).to_string()).await;
    assert_eq!(refused(third).await.1, "RATE_LIMITED", "the quota is used up");

    let mut script = tokens();
    script.headers.push(("x-engine".into(), b"yes".to_vec()));
    set(engine, &script).await;
    for path in ROUTES {
        let request = client.request(Method::POST, &format!("{path}?a=b")).header("x-title", "t");
        let answer = request.header("content-type", "application/json").body(BODY).send().await.unwrap();
        assert_eq!((answer.status().as_u16(), header(&answer, "x-engine")), (200, "yes"), "{path}");
        assert_eq!(header(&answer, "x-llorch-node"), "gpu-node-1", "{path}");
        assert!(!header(&answer, "x-request-id").is_empty(), "{path}");
        assert!(answer.headers().get("x-llorch-task-id").is_none(), "it is no task: {path}");
        assert_eq!(&answer.bytes().await.unwrap()[..], script.bytes(), "{path}");
        let seen = received(engine).await;
        assert_eq!(seen.len(), 1, "{path}");
        assert_eq!((seen[0].path.as_str(), seen[0].query.as_deref()), (path, Some("a=b")));
        assert_eq!(String::from_utf8_lossy(&seen[0].body), BODY, "{path}");
        assert_eq!(
            (seen[0].header("x-title").as_deref(), seen[0].header("authorization")),
            (Some("t"), None)
        );
        assert!(seen[0].header("traceparent").is_some(), "{path}");
    }
    let aliased = post(client, "/tokenize", r#"{"model":"gpt-4o","content":"x"}"#).await;
    assert_eq!(aliased.status(), 200);
    let seen = received(engine).await;
    assert_eq!(String::from_utf8_lossy(&seen[0].body), r#"{"model":"fake-model","content":"x"}"#);
    // What the client did wrong is the engine's word.
    set(engine, &Script::new(400, "application/json").piece("{\"error\":{\"message\":\"no content\"}}"))
        .await;
    let wrong = post(client, "/tokenize", BODY).await;
    assert_eq!((wrong.status().as_u16(), header(&wrong, "x-llorch-error")), (400, ""));
    assert_eq!(&wrong.bytes().await.unwrap()[..], b"{\"error\":{\"message\":\"no content\"}}");

    let tasks = client.get_json("/v2/tasks?limit=500").await.unwrap();
    assert_eq!(tasks["tasks"].as_array().unwrap().len(), 2, "{tasks}");
    assert!(running.next().await.unwrap().is_ok(), "who has the slot goes on");
    waiting.abort();
}

// CLOUD-2907
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_many_run_at_once_on_a_node_and_a_place_is_free_again_when_its_client_has_gone() {
    let (cluster, engines) = cluster(1).await;
    set(&engines[0], &slow(2)).await;
    let answers = join_all((0..AT_ONCE + 4).map(|_| post(&cluster.client, "/tokenize", BODY))).await;
    let (good, full): (Vec<_>, Vec<_>) = answers.into_iter().partition(|answer| answer.status() == 200);
    assert_eq!((good.len(), full.len()), (AT_ONCE, 4));
    for answer in full {
        assert_eq!(header(&answer, "retry-after"), "1");
        let (status, code, body) = refused(answer).await;
        assert_eq!((status, code.as_str()), (503, "OVERLOADED"), "{body}");
    }
    set(&engines[0], &slow(60)).await;
    let stuck: Vec<_> = (0..AT_ONCE)
        .map(|_| {
            let client = cluster.client.clone();
            tokio::spawn(async move { post(&client, "/tokenize", BODY).await })
        })
        .collect();
    let came = Cell::new(0);
    eventually("all are with the engine", Duration::from_secs(10), || async {
        came.set(came.get() + received(&engines[0]).await.len());
        (came.get() == AT_ONCE).then_some(())
    })
    .await;
    assert_eq!(post(&cluster.client, "/tokenize", BODY).await.status(), 503, "every place is taken");
    stuck.iter().for_each(tokio::task::JoinHandle::abort);
    set(&engines[0], &tokens()).await;
    eventually("the places are free", Duration::from_secs(5), || async {
        (post(&cluster.client, "/tokenize", BODY).await.status() == 200).then_some(())
    })
    .await;
}

// CLOUD-2906
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_node_answers_for_one_that_does_not_and_what_nobody_has_is_said_so() {
    let (mut cluster, engines) = cluster(2).await;
    for engine in &engines {
        set(engine, &tokens()).await;
    }
    let (status, code, _) = refused(post(&cluster.client, "/tokenize", r#"{"model":"none"}"#).await).await;
    assert_eq!((status, code.as_str()), (404, "MODEL_NOT_AVAILABLE"));
    let (status, code, body) = refused(post(&cluster.client, "/tokenize", "{}").await).await;
    assert_eq!((status, code.as_str(), &body["error"]["param"]), (400, "INVALID_PARAMS", &json!("model")));
    // An engine without the route.
    for engine in &engines {
        set(
            engine,
            &Script::new(404, "application/json").piece("{\"error\":{\"message\":\"File Not Found\"}}"),
        )
        .await;
    }
    let (status, code, body) = refused(post(&cluster.client, "/v1/messages/count_tokens", BODY).await).await;
    assert_eq!((status, code.as_str(), &body["type"]), (400, "UNSUPPORTED", &json!("error")), "{body}");
    for engine in &engines {
        set(engine, &tokens()).await;
    }
    // A dead engine, and then a dead node, that nobody knows of yet.
    cluster.nodes[0].engine.as_mut().unwrap().kill();
    for _ in 0..6 {
        let answer = post(&cluster.client, "/tokenize", BODY).await;
        assert_eq!((answer.status().as_u16(), header(&answer, "x-llorch-node")), (200, "gpu-node-2"));
    }
    cluster.nodes[0].daemon.as_mut().unwrap().kill();
    for _ in 0..6 {
        let answer = post(&cluster.client, "/tokenize", BODY).await;
        assert_eq!((answer.status().as_u16(), header(&answer, "x-llorch-node")), (200, "gpu-node-2"));
    }
}
