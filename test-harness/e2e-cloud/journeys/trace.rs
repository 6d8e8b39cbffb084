//! A client's trace and its correlation id: on each way that a task takes they are in the logs of the
//! daemons and reach the engines, which are asked what came with their requests.

mod spans;

use std::path::Path;
use std::time::Duration;

use e2e_cloud::{Client, Cluster, Engine, Home, Options, eventually};
use reqwest::{Method, Response};
use serde_json::{Value, json};

/// Our own lines of requests and attempts, and of other crates what they always log.
const FILTER: &str = "info,daemon_kit=debug,node_agent=debug,orchestratord=debug,pool_managerd=debug";
/// The client's own span.
const SPAN: &str = "00f067aa0ba902b7";
/// What a vendor says of the client's trace.
const STATE: &str = "vendor=t61rcWkgMzE,other=1";
const PATIENCE: Duration = Duration::from_secs(10);

/// What a client calls its request.
#[derive(Debug, Clone, Copy)]
struct Ids {
    trace: &'static str,
    correlation: &'static str,
}

impl Ids {
    /// Sends a request under these ids. Returns its answer, which names both.
    async fn send(self, client: &Client, path: &str, body: &Value) -> Response {
        let request = client
            .request(Method::POST, path)
            .header("traceparent", format!("00-{}-{SPAN}-01", self.trace))
            .header("tracestate", STATE)
            .header("x-correlation-id", self.correlation)
            .timeout(2 * PATIENCE)
            .json(body);
        let response = request.send().await.expect("an answer");
        assert_eq!(response.headers()["x-trace-id"], self.trace);
        assert_eq!(response.headers()["x-correlation-id"], self.correlation);
        response
    }

    /// Submits the task under these ids. Returns its id.
    async fn submit(self, client: &Client, task: &Value) -> String {
        let response = self.send(client, "/v2/tasks", task).await;
        let accepted: Value = response.json().await.expect("JSON");
        accepted["task_id"].as_str().expect("an accepted task").to_owned()
    }

    /// The requests under this correlation id at the engine whose handoff is in this folder.
    async fn asked_of(self, runtime_dir: &Path) -> Vec<Value> {
        self.asked_by(&runtime_dir.join("pool-0-r0.json")).await
    }

    /// Those at the engine of this handoff.
    async fn asked_by(self, handoff: &Path) -> Vec<Value> {
        let handoff = std::fs::read_to_string(handoff).expect("a handoff file");
        let handoff: Value = serde_json::from_str(&handoff).expect("a whole handoff file");
        let engine = Client::new(handoff["url"].as_str().expect("a URL"), None);
        let seen = engine.get_json("/fake/seen").await.expect("what it has seen");
        let requests = seen["requests"].as_array().expect("a list").iter();
        requests.filter(|request| request["correlation_id"] == self.correlation).cloned().collect()
    }

    /// The paths that the engine was asked for by its one attempt, and the `traceparent` that came
    /// with all of them: of the client's trace, under another parent, with what vendors say of it.
    async fn one_attempt_at(self, runtime_dir: &Path) -> (Vec<String>, String) {
        let requests = self.asked_of(runtime_dir).await;
        let of = |request: &Value, name: &str| request[name].as_str().unwrap_or_default().to_owned();
        let (trace, attempt) = (of(&requests[0], "traceparent"), of(&requests[0], "request_id"));
        for request in &requests {
            assert_eq!(
                (of(request, "traceparent"), of(request, "request_id")),
                (trace.clone(), attempt.clone())
            );
            assert_eq!(of(request, "tracestate"), STATE);
        }
        let parts: Vec<&str> = trace.split('-').collect();
        assert_eq!((parts[0], parts[1], parts[3]), ("00", self.trace, "01"), "{trace}");
        assert_ne!(parts[2], SPAN, "each hop has a span of its own");
        assert_eq!(attempt.len(), 36, "an attempt's id: {attempt:?}");
        (requests.iter().map(|request| of(request, "path")).collect(), trace)
    }

    /// Waits for so many lines of the log that say `what` and name both ids.
    async fn wait_logged(self, log: &Path, what: &str, lines: usize) {
        let missing = format!("{lines} lines {what:?} with both ids in {}", log.display());
        eventually(&missing, PATIENCE, || async {
            let text = std::fs::read_to_string(log).unwrap_or_default();
            let named = text.lines().filter(|line| {
                line.contains(what) && line.contains(self.trace) && line.contains(self.correlation)
            });
            (named.count() == lines).then_some(())
        })
        .await;
    }
}

const CHAT: &str = "/v1/chat/completions";

fn chat(tokens: u32) -> Value {
    json!({"model": "fake-model", "stream": true, "max_tokens": tokens, "messages": [{"role": "user", "content": "hi"}]})
}

fn words(to: u32) -> String {
    (0..to).map(|n| format!("w{n} ")).collect()
}

/// Two nodes, the first one with a log in JSON.
async fn cluster() -> Cluster {
    let engine = Engine::Fake { slots: 4, first_token_ms: 10, pace_ms: 20, dialect: "llamacpp" };
    let log = || ("LLORCH_LOG", FILTER.to_owned());
    let mut node: Vec<_> = (0..2).map(|n| (n, log().0, log().1)).collect();
    node.push((0, "LLORCH_LOG_FORMAT", "json".to_owned()));
    Cluster::start(Options { engine, node, control: vec![log()], ..Options::default() }).await
}

/// A task that goes to the first node while that is there.
fn task(cluster: &Cluster, tokens: u32) -> Value {
    let mut task = cluster.task(tokens);
    task["placement"] = json!({"prefer_pools": ["gpu-node-1/pool-0"]});
    task
}

// CLOUD-2667
// CLOUD-2668
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_info_one_id_finds_a_task_in_both_logs_and_the_filter_changes_without_a_restart() {
    let engine = Engine::Fake { slots: 4, first_token_ms: 10, pace_ms: 20, dialect: "llamacpp" };
    let mut cluster = Cluster::start(Options { engine, ..Options::default() }).await;
    let logs = ["gpu-node-1", "gpu-node-2"].map(|id| cluster.log(id));
    let control = cluster.log("orchestratord");
    let ids = Ids { trace: "4bf92f3577b34da6a3ce929d0e0e4711", correlation: "order-info" };
    let ended = |at: &Path| {
        let text = std::fs::read_to_string(at).unwrap_or_default();
        let ends = text
            .lines()
            .filter(|line| line.contains("a task ended") || line.contains("an attempt has ended"));
        ends.map(str::to_owned).collect::<Vec<_>>()
    };
    ids.submit(&cluster.client, &task(&cluster, 3)).await;
    ids.wait_logged(&control, "a task ended", 1).await;
    ids.wait_logged(&logs[0], "an attempt has ended", 1).await;
    let line = ended(&control).remove(0);
    for part in [
        "model=fake-model",
        "gpu-node-1",
        "pool-0",
        "state=Completed",
        "attempts=1",
        "tokens=3",
        "first_token_ms=",
    ] {
        assert!(line.contains(part), "{part}: {line}");
    }
    let is_its_prompt = |line: &str| line.contains(task(&cluster, 3)["prompt"].as_str().unwrap());
    assert!(!is_its_prompt(&line));
    // No line of what goes well, and then again.
    let put = async |client: &Client, filter: &str| {
        let request = client.request(Method::PUT, "/v2/log-level").json(&json!({"filter": filter}));
        request.send().await.unwrap().status().as_u16()
    };
    let node = cluster.node_client(0);
    for client in [&cluster.client, &node] {
        assert_eq!(put(client, "warn").await, 200);
        assert_eq!(put(client, "a=loud").await, 400);
    }
    assert!(cluster.client.run(task(&cluster, 3)).await.completed());
    for client in [&cluster.client, &node] {
        assert_eq!(put(client, "info").await, 200);
    }
    let second = Ids { trace: "4bf92f3577b34da6a3ce929d0e0e4712", correlation: "order-again" };
    second.submit(&cluster.client, &task(&cluster, 3)).await;
    second.wait_logged(&control, "a task ended", 1).await;
    second.wait_logged(&logs[0], "an attempt has ended", 1).await;
    assert_eq!((ended(&control).len(), ended(&logs[0]).len()), (2, 2));
    // A node dies under a task: that it waits again, and what the node is taken for.
    let third = Ids { trace: "4bf92f3577b34da6a3ce929d0e0e4713", correlation: "order-third" };
    let mut long = task(&cluster, 60);
    long["prompt"] = json!("secret words");
    third.submit(&cluster.client, &long).await;
    tokio::time::sleep(Duration::from_millis(5)).await;
    cluster.nodes[0].daemon.as_mut().unwrap().kill();
    third.wait_logged(&control, "a task ended", 1).await;
    let text = std::fs::read_to_string(&control).unwrap();
    let stands = text.lines().find(|line| line.contains("a node gets no tasks")).expect("its liveness");
    assert!(!text.contains("not dialled yet"), "a node that comes is nothing to be warned of");
    for part in ["WARN", "node_id=gpu-node-1", "liveness=suspect", "reason=", "evidence_age_ms="] {
        assert!(stands.contains(part), "{part}: {stands}");
    }
    assert!(!text.contains("secret words"), "no line has a client's words");
}

// CLOUD-1152
// CLOUD-1153
// CLOUD-1943
// CLOUD-2331
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_goes_on_when_its_task_is_placed_again_and_when_it_is_continued() {
    let mut cluster = cluster().await;
    let logs = ["gpu-node-1", "gpu-node-2"].map(|id| cluster.log(id));
    let folders = [0, 1].map(|n| cluster.nodes[n].runtime_dir.clone());
    let control = cluster.log("orchestratord");

    // The first engine never says a word, and its node dies.
    let again = Ids { trace: "4bf92f3577b34da6a3ce929d0e0e4736", correlation: "placed-again" };
    cluster.fault(0, json!({"kind": "hang", "after": 0})).await;
    let id = again.submit(&cluster.client, &task(&cluster, 4)).await;
    eventually("the first engine is asked", PATIENCE, || async {
        (!again.asked_of(&folders[0]).await.is_empty()).then_some(())
    })
    .await;
    again.wait_logged(&logs[0], "an attempt is accepted", 1).await;
    cluster.nodes[0].daemon.as_mut().unwrap().kill();
    let transcript = cluster.client.follow(&id, None, usize::MAX).await;
    transcript.check();
    assert_eq!((transcript.node(), transcript.text()), (Some("gpu-node-2"), words(4)));
    let (first, second) = (again.one_attempt_at(&folders[0]).await, again.one_attempt_at(&folders[1]).await);
    assert_ne!(first.1, second.1, "each attempt has a span of its own");
    again.wait_logged(&logs[1], "an attempt is accepted", 1).await;
    again.wait_logged(&logs[1], "an attempt has ended", 1).await;
    again.wait_logged(&control, "a request is answered", 1).await;
    again.wait_logged(&control, "dispatched", 2).await;

    // The first node dies in the middle of the stream.
    cluster.start_daemon(0);
    cluster.wait_online(0).await;
    cluster.fault(0, json!({"kind": "none"})).await;
    let on = Ids { trace: "0af7651916cd43dd8448eb211c80319c", correlation: "goes-on" };
    let mut continued = task(&cluster, 30);
    continued["recovery"] = json!("continue");
    let id = on.submit(&cluster.client, &continued).await;
    let begun = cluster.client.follow_tokens(&id, 5).await;
    assert_eq!(begun.node(), Some("gpu-node-1"));
    on.wait_logged(&logs[0], "an attempt is accepted", 1).await;
    cluster.nodes[0].daemon.as_mut().unwrap().kill();
    let transcript = cluster.client.follow(&id, None, usize::MAX).await;
    transcript.check();
    assert_eq!((transcript.text(), transcript.starts()), (words(30), 2));
    let (first, second) = (on.one_attempt_at(&folders[0]).await, on.one_attempt_at(&folders[1]).await);
    assert_ne!(first.1, second.1);
    assert_eq!(first.0, ["/completion"]);
    assert_eq!(second.0, ["/detokenize", "/completion"], "what is asked before counts too");
    on.wait_logged(&logs[1], "an attempt has ended", 1).await;
    on.wait_logged(&control, "dispatched", 2).await;

    // In JSON the ids are fields of the line.
    let log = std::fs::read_to_string(&logs[0]).unwrap();
    let accepted = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let accepted: Vec<Value> = accepted.filter(|line| line["message"] == "an attempt is accepted").collect();
    let ids: Vec<_> = accepted.iter().map(|line| (&line["correlation_id"], &line["trace_id"])).collect();
    let both = [again, on].map(|ids| (json!(ids.correlation), json!(ids.trace)));
    assert_eq!(ids, both.each_ref().map(|(correlation, trace)| (correlation, trace)), "{accepted:?}");
    assert_eq!(accepted[1]["task_id"], id.as_str());
}

// CLOUD-1152
// CLOUD-1153
// CLOUD-1943
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_is_passed_on_keeps_its_trace_when_it_is_placed_again() {
    let mut cluster = cluster().await;
    let logs = ["gpu-node-1", "gpu-node-2"].map(|id| cluster.log(id));
    let folders = [0, 1].map(|n| cluster.nodes[n].runtime_dir.clone());
    let control = cluster.log("orchestratord");
    // Whichever engine is asked first says nothing, and its node dies.
    for node in [0, 1] {
        cluster.fault(node, json!({"kind": "hang", "after": 0})).await;
    }
    let ids = Ids { trace: "4bf92f3577b34da6a3ce929d0e0e4736", correlation: "passed-on" };
    let client = cluster.client.clone();
    let asking = tokio::spawn(async move {
        let answer = ids.send(&client, CHAT, &chat(4)).await;
        (answer.headers()["x-llorch-node"].to_str().unwrap().to_owned(), answer.text().await.unwrap())
    });
    let first = eventually("an engine is asked", PATIENCE, || async {
        for (node, folder) in folders.iter().enumerate() {
            if !ids.asked_of(folder).await.is_empty() {
                return Some(node);
            }
        }
        None
    })
    .await;
    let second = 1 - first;
    ids.wait_logged(&logs[first], "an attempt is accepted", 1).await;
    cluster.fault(second, json!({"kind": "none"})).await;
    cluster.nodes[first].daemon.as_mut().unwrap().kill();
    let (node, text) = asking.await.unwrap();
    assert_eq!(node, format!("gpu-node-{}", second + 1));
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    let asked = [ids.one_attempt_at(&folders[0]).await, ids.one_attempt_at(&folders[1]).await];
    assert_ne!(asked[0].1, asked[1].1, "each attempt has a span of its own");
    assert_eq!(asked.map(|(paths, _)| paths), [vec![CHAT.to_owned()], vec![CHAT.to_owned()]]);
    ids.wait_logged(&logs[second], "an attempt is accepted", 1).await;
    ids.wait_logged(&logs[second], "an attempt has ended", 1).await;
    ids.wait_logged(&control, "a request is answered", 1).await;
    ids.wait_logged(&control, "dispatched", 2).await;
}

// CLOUD-1943
// CLOUD-2331
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_reaches_the_engine_and_the_log_in_the_home_profile() {
    let home = Home::start(Engine::steady(), &[("LLORCH_LOG", FILTER)]).await;
    let (client, runtime_dir, log) = (home.client.clone(), home.runtime_dir.clone(), home.log());
    let ids = Ids { trace: "4bf92f3577b34da6a3ce929d0e0e4736", correlation: "at-home" };
    let id = ids.submit(&client, &json!({"model_ref": "fake-model", "prompt": "x", "max_tokens": 4})).await;
    let transcript = client.follow(&id, None, usize::MAX).await;
    transcript.check();
    assert_eq!(transcript.text(), words(4));
    assert_eq!(ids.one_attempt_at(&runtime_dir).await.0, ["/completion"]);
    const LINES: [&str; 4] =
        ["a request is answered", "dispatched", "an attempt is accepted", "an attempt has ended"];
    for what in LINES {
        ids.wait_logged(&log, what, 1).await;
    }
    // A request that is passed on to its engine.
    let ids = Ids { trace: "0af7651916cd43dd8448eb211c80319c", correlation: "passed-on" };
    let answer = ids.send(&client, CHAT, &chat(4)).await;
    assert!(answer.text().await.unwrap().ends_with("data: [DONE]\n\n"));
    assert_eq!(ids.one_attempt_at(&runtime_dir).await.0, [CHAT]);
    for what in LINES {
        ids.wait_logged(&log, what, 1).await;
    }
}
