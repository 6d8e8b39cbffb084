//! The same traces at a collector: one connected whole from the client's span to the engine's request.

use std::path::PathBuf;
use std::process::Command;

use e2e_cloud::collector::{Received, assert_connected};
use e2e_cloud::process::program;
use e2e_cloud::{Collector, Process};
use futures::future::join_all;
use tempfile::TempDir;

use super::*;

const ENGINE: Engine = Engine::Fake { slots: 4, first_token_ms: 50, pace_ms: 30, dialect: "llamacpp" };
const TOKENS: u32 = 200;
/// A word of every prompt, which no span may have.
const SECRET: &str = "melancholy";

/// What serves, with two engines: a cluster of two nodes, or one daemon.
enum Ground {
    Cloud(Box<Cluster>),
    Home { home: Box<Home>, second: Option<Process>, folder: TempDir },
}

impl Ground {
    async fn cloud(collector: &Collector) -> Self {
        let own = || ("LLORCH_OTLP_ENDPOINT", collector.url.clone());
        let node = (0..2).map(|n| (n, own().0, own().1)).collect();
        let options = Options { engine: ENGINE, node, control: vec![own()], ..Options::default() };
        Self::Cloud(Box::new(Cluster::start(options).await))
    }

    async fn home(collector: &Collector) -> Self {
        let home = Home::start(ENGINE, &[("LLORCH_OTLP_ENDPOINT", &collector.url)]).await;
        let mut ground =
            Self::Home { home: Box::new(home), second: None, folder: tempfile::tempdir().expect("a folder") };
        ground.start(1).await;
        ground
    }

    fn client(&self) -> Client {
        match self {
            Self::Cloud(cluster) => cluster.client.clone(),
            Self::Home { home, .. } => home.client.clone(),
        }
    }

    fn handoff(&self, n: usize) -> PathBuf {
        match self {
            Self::Cloud(cluster) => cluster.nodes[n].runtime_dir.join("pool-0-r0.json"),
            Self::Home { home, .. } => home.runtime_dir.join(format!("pool-{n}-r0.json")),
        }
    }

    async fn fault(&self, n: usize, fault: Value) {
        let handoff = std::fs::read_to_string(self.handoff(n)).expect("a handoff file");
        let handoff: Value = serde_json::from_str(&handoff).expect("a whole handoff file");
        let engine = Client::new(handoff["url"].as_str().expect("a URL"), None);
        assert_eq!(engine.post("/fake/fault", &fault).await.status(), 204);
    }

    /// Ends an engine where it stands.
    fn kill(&mut self, n: usize) {
        match self {
            Self::Cloud(cluster) => cluster.nodes[n].engine.as_mut().unwrap().kill(),
            Self::Home { home, .. } if n == 0 => home.engine.as_mut().unwrap().kill(),
            Self::Home { second, .. } => second.as_mut().unwrap().kill(),
        }
    }

    /// Starts an engine, and waits until it takes tasks.
    async fn start(&mut self, n: usize) {
        match self {
            Self::Cloud(cluster) => cluster.start_engine(n),
            Self::Home { home, .. } if n == 0 => home.start_engine(),
            Self::Home { home, second, folder } => {
                let mut command = Command::new(program("fake-engine"));
                command.args(["--slots", "4", "--first-token-ms", "50", "--pace-ms", "30"]);
                command.args(["--engine", "llamacpp", "--pool-id", "pool-1", "--replica-id", "r0"]);
                command.arg("--handoff-dir").arg(&home.runtime_dir);
                *second = Some(Process::start(command, &folder.path().join("engine.log")));
            }
        }
        let client = self.client();
        eventually("both engines are ready", 2 * PATIENCE, || async {
            let pools = client.get_json("/v2/pools").await?;
            let pools = pools["pools"].as_array().expect("a list").clone();
            (pools.iter().filter(|pool| pool["ready"] == true).count() == 2).then_some(())
        })
        .await;
    }

    /// Waits until one of the engines is asked; which one.
    async fn asked(&self, ids: Ids) -> usize {
        eventually("an engine is asked", PATIENCE, || async {
            for n in [0, 1] {
                if !ids.asked_by(&self.handoff(n)).await.is_empty() {
                    return Some(n);
                }
            }
            None
        })
        .await
    }
}

/// A stream under these ids, by either API.
async fn ask(client: Client, ids: Ids, is_v1: bool) -> String {
    if is_v1 {
        let mut body = chat(TOKENS);
        body["temperature"] = json!(0);
        body["messages"][0]["content"] = json!(SECRET);
        return ids.send(&client, CHAT, &body).await.text().await.expect("a whole stream");
    }
    let task =
        json!({"model_ref": "fake-model", "prompt": SECRET, "max_tokens": TOKENS, "recovery": "continue"});
    let id = ids.submit(&client, &task).await;
    let transcript = client.follow(&id, None, usize::MAX).await;
    transcript.check();
    assert_eq!(transcript.text(), words(TOKENS));
    transcript.text()
}

/// A task whose first engine dies, before its first token or in the middle. Returns the trace, and what the
/// other engine was shown to be its caller.
async fn one_trace(
    ground: &mut Ground,
    collector: &Collector,
    ids: Ids,
    is_v1: bool,
    is_continued: bool,
) -> (Vec<Received>, String) {
    if !is_continued {
        for n in [0, 1] {
            ground.fault(n, json!({"kind": "hang", "after": 0})).await;
        }
    }
    let asking = tokio::spawn(ask(ground.client(), ids, is_v1));
    let first = ground.asked(ids).await;
    if is_continued {
        tokio::time::sleep(Duration::from_millis(600)).await;
    } else {
        tokio::time::sleep(Duration::from_millis(100)).await;
        ground.fault(1 - first, json!({"kind": "none"})).await;
    }
    ground.kill(first);
    let text = asking.await.expect("the client has its text");
    assert_eq!(text.matches(" w199 ").count() + text.matches("\"w199 ").count(), 1, "{text}");
    let again = if is_continued { "continuation" } else { "retry" };
    let request = if is_v1 { "POST /v1/chat/completions" } else { "POST /v2/tasks" };
    let names = [
        (request, 1),
        ("task", 1),
        ("queue", 1),
        (again, 1),
        ("placement", 2),
        ("attempt", 2),
        ("dispatch", 2),
        ("first token", 2),
        ("stream", 1 + usize::from(is_continued)),
        ("node attempt", 2),
        ("engine request", 2),
    ];
    let trace = collector.wait(ids.trace, &names).await;
    let all = names.iter().map(|(_, count)| count).sum::<usize>();
    assert_eq!(trace.len(), all, "and nothing else: {trace:#?}");
    let asked = ids.asked_by(&ground.handoff(1 - first)).await;
    let caller = asked[0]["traceparent"].as_str().expect("a header").to_owned();
    ground.start(first).await;
    ground.fault(first, json!({"kind": "none"})).await;
    (trace, caller)
}

/// Every span of the trace is where it belongs.
fn check(trace: &[Received], caller: &str, ids: Ids, again: &str, services: [&str; 2]) {
    assert_connected(trace, SPAN);
    let shown = format!("{trace:?}");
    for secret in [SECRET, "w7 ", "hi"] {
        assert!(!shown.contains(&format!("\"{secret}\"")) && !shown.contains(SECRET), "{shown}");
    }
    let of = |name: &str| {
        let mut spans: Vec<&Received> = trace.iter().filter(|span| span.name == name).collect();
        spans.sort_by_key(|span| span.from);
        spans
    };
    let request = trace.iter().find(|span| span.name.starts_with("POST ")).expect("the request's");
    assert_eq!((request.parent.as_str(), request.of("llorch.correlation_id")), (SPAN, ids.correlation));
    let task = of("task")[0];
    assert_eq!((&task.parent, task.failed, task.of("llorch.state")), (&request.id, false, "completed"));
    assert_eq!((task.of("llorch.attempts"), task.of("gen_ai.request.model")), ("2", "fake-model"));
    assert_eq!(task.of("gen_ai.usage.output_tokens"), TOKENS.to_string());
    assert!(task.of("llorch.first_token_ms").parse::<u64>().expect("milliseconds") < 20_000, "{task:?}");
    let attempts = of("attempt");
    for attempt in &attempts {
        assert_eq!((&attempt.parent, attempt.service.as_str()), (&task.id, services[0]));
        assert_eq!(attempt.of("llorch.task_id"), task.of("llorch.task_id"));
    }
    assert!(attempts[0].failed && !attempts[1].failed, "{attempts:#?}");
    assert!(attempts[1].events.contains(&"first token".to_owned()));
    assert_ne!(
        (attempts[0].of("llorch.node_id"), attempts[0].of("llorch.pool_id")),
        (attempts[1].of("llorch.node_id"), attempts[1].of("llorch.pool_id"))
    );
    let waited = of(again)[0];
    assert_eq!((&waited.parent, &waited.links), (&task.id, &vec![attempts[0].id.clone()]));
    assert!(!waited.of("llorch.why").is_empty(), "{waited:?}");
    assert_eq!(waited.of("llorch.resume").is_empty(), again == "retry");
    let placements = of("placement");
    assert_eq!((placements[0].of("llorch.pools"), placements[0].of("llorch.refusals")), ("2", ""));
    assert!(!placements[1].of("llorch.refusals").is_empty(), "{:?}", placements[1]);
    for (attempt, node) in attempts.iter().zip(of("node attempt")) {
        assert_eq!((&node.parent, node.service.as_str()), (&attempt.id, services[1]));
        assert_eq!(node.of("llorch.attempt_id"), attempt.of("llorch.attempt_id"));
        assert_eq!(node.of("gen_ai.request.model"), "fake-model");
        assert_eq!(node.of("llorch.caller"), attempt.of("llorch.caller"));
        if services[0] != services[1] {
            assert!(!node.of("llorch.caller").is_empty(), "{node:?}");
            assert_eq!(node.instance, attempt.of("llorch.node_id"));
        }
        let engine = trace.iter().find(|span| span.name == "engine request" && span.parent == node.id);
        let engine = engine.expect("the request to its engine");
        assert_eq!(engine.failed, attempt.failed);
        if !engine.failed {
            assert_eq!(
                caller,
                format!("00-{}-{}-01", ids.trace, engine.id),
                "the engine's own goes on there"
            );
        }
    }
}

async fn both_apis(mut ground: Ground, collector: &Collector, services: [&str; 2]) {
    const CASES: [(&str, bool, bool); 4] = [
        ("4bf92f3577b34da6a3ce929d0e0e4721", false, false),
        ("4bf92f3577b34da6a3ce929d0e0e4722", false, true),
        ("4bf92f3577b34da6a3ce929d0e0e4723", true, false),
        ("4bf92f3577b34da6a3ce929d0e0e4724", true, true),
    ];
    for (trace, is_v1, is_continued) in CASES {
        let ids = Ids { trace, correlation: &trace[28..] };
        let (spans, caller) = one_trace(&mut ground, collector, ids, is_v1, is_continued).await;
        check(&spans, &caller, ids, if is_continued { "continuation" } else { "retry" }, services);
    }
    // What no trace of a client's is about.
    let bound = collector.wait_for("handoff binding").await;
    assert_eq!((bound.service.as_str(), bound.parent.as_str(), bound.failed), (services[1], "", false));
}

// CLOUD-2732
// CLOUD-2733
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_connected_trace_over_both_apis_across_a_retry_and_a_continuation_in_the_cloud() {
    let collector = Collector::start().await;
    let ground = Ground::cloud(&collector).await;
    both_apis(ground, &collector, ["orchestratord", "pool-managerd"]).await;
}

// CLOUD-2732
// CLOUD-2733
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_connected_trace_over_both_apis_across_a_retry_and_a_continuation_at_home() {
    let collector = Collector::start().await;
    let ground = Ground::home(&collector).await;
    both_apis(ground, &collector, ["orchestratord", "orchestratord"]).await;
}

// CLOUD-2734
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_takes_connections_and_never_answers_keeps_nobody_waiting() {
    // The kernel takes the connections: nobody accepts them.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", silent.local_addr().expect("its address"));
    let engine = Engine::Fake { slots: 64, first_token_ms: 0, pace_ms: 0, dialect: "llamacpp" };
    let home = Home::start(engine, &[("LLORCH_OTLP_ENDPOINT", url.as_str())]).await;
    let task = json!({"model_ref": "fake-model", "prompt": "x", "max_tokens": 4});
    let begun = std::time::Instant::now();
    // Some 8,000 spans, of which 4,096 wait.
    for _ in 0..20 {
        let tasks = (0..60).map(|_| home.client.run(task.clone()));
        for transcript in join_all(tasks).await {
            assert_eq!(transcript.text(), words(4));
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    eventually("what finds no room is counted as lost", PATIENCE, || async {
        let page = home.client.get("/metrics").await.ok()?.text().await.ok()?;
        let lost = page.lines().find_map(|line| line.strip_prefix("llorch_spans_lost_total "))?;
        (lost.parse::<f64>().ok()? > 1000.0).then_some(())
    })
    .await;
    // Its end waits for no answer either.
    home.stop().await;
}

// CLOUD-2734
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_is_away_keeps_nobody_waiting_and_what_is_lost_is_counted() {
    let collector = Collector::start().await;
    let settings = [("LLORCH_OTLP_ENDPOINT", collector.url.as_str())];
    let home = Home::start(Engine::steady(), &settings).await;
    let ids = |trace| Ids { trace, correlation: "order-lost" };
    let lost = async || {
        let page = home.client.get("/metrics").await.ok()?.text().await.ok()?;
        page.lines().find_map(|line| line.strip_prefix("llorch_spans_lost_total ")?.parse::<f64>().ok())
    };
    let task = json!({"model_ref": "fake-model", "prompt": "x", "max_tokens": 4});
    let run = async |trace| {
        let begun = std::time::Instant::now();
        let id = ids(trace).submit(&home.client, &task).await;
        let transcript = home.client.follow(&id, None, usize::MAX).await;
        transcript.check();
        assert_eq!(transcript.text(), words(4));
        assert!(begun.elapsed() < Duration::from_secs(5), "it waited for nobody");
    };
    run("4bf92f3577b34da6a3ce929d0e0e4731").await;
    let whole =
        [("task", 1), ("POST /v2/tasks", 1), ("engine request", 1), ("node attempt", 1), ("attempt", 1)];
    collector.wait("4bf92f3577b34da6a3ce929d0e0e4731", &whole).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(lost().await, Some(0.0));
    collector.refuse(true);
    run("4bf92f3577b34da6a3ce929d0e0e4732").await;
    eventually("they are counted as lost", PATIENCE, || async { lost().await.filter(|lost| *lost >= 10.0) })
        .await;
    let line = || {
        let log = std::fs::read_to_string(home.log()).unwrap_or_default();
        log.lines().filter(|line| line.contains("a collector has not taken spans")).count()
    };
    assert_eq!(line(), 1, "one line a minute");
    let log = std::fs::read_to_string(home.log()).expect("its log");
    assert!(log.contains("why=\"it answers 503"), "{log}");
    // It is back: what comes from now on arrives.
    collector.refuse(false);
    run("4bf92f3577b34da6a3ce929d0e0e4733").await;
    collector.wait("4bf92f3577b34da6a3ce929d0e0e4733", &[("task", 1)]).await;
    assert!(collector.trace("4bf92f3577b34da6a3ce929d0e0e4732").is_empty());
    // The last ones are sent at the daemon's end.
    run("4bf92f3577b34da6a3ce929d0e0e4734").await;
    home.stop().await;
    collector.wait("4bf92f3577b34da6a3ce929d0e0e4734", &[("task", 1)]).await;
}

// CLOUD-2730
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn traces_are_recorded_where_their_client_says_so_and_else_by_share() {
    let collector = Collector::start().await;
    let settings = [("LLORCH_OTLP_ENDPOINT", collector.url.as_str()), ("LLORCH_OTLP_SAMPLE", "0")];
    let home = Home::start(Engine::steady(), &settings).await;
    let body = chat(3);
    let ask = async |traceparent: Option<&str>| {
        let mut request = home.client.request(Method::POST, CHAT).json(&body);
        if let Some(traceparent) = traceparent {
            request = request.header("traceparent", traceparent);
        }
        let answer = request.send().await.expect("an answer");
        let trace = answer.headers()["x-trace-id"].to_str().expect("an id").to_owned();
        assert!(answer.text().await.expect("a stream").ends_with("data: [DONE]\n\n"));
        trace
    };
    let own = ask(None).await;
    let unwanted = ask(Some("00-4bf92f3577b34da6a3ce929d0e0e4741-00f067aa0ba902b7-00")).await;
    let wanted = ask(Some("00-4bf92f3577b34da6a3ce929d0e0e4742-00f067aa0ba902b7-01")).await;
    let spans = collector.wait(&wanted, &[("task", 1), ("engine request", 1)]).await;
    assert_connected(&spans, SPAN);
    assert!(collector.all().iter().all(|span| span.trace == wanted), "nothing of {own} and {unwanted}");
    // Whoever is not let in takes no place among them.
    let refused = home.client.request(Method::POST, CHAT).header("origin", "http://evil.example");
    let refused = refused.header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4743-00f067aa0ba902b7-01");
    assert_eq!(refused.json(&body).send().await.expect("an answer").status(), 403);
    let last = ask(Some("00-4bf92f3577b34da6a3ce929d0e0e4744-00f067aa0ba902b7-01")).await;
    collector.wait(&last, &[("task", 1), ("engine request", 1)]).await;
    assert!(collector.trace("4bf92f3577b34da6a3ce929d0e0e4743").is_empty());
    // A task that never found a place has its wait, and what it was that there is none.
    let ids = Ids { trace: "4bf92f3577b34da6a3ce929d0e0e4745", correlation: "order-nowhere" };
    let id =
        ids.submit(&home.client, &json!({"model_ref": "unknown", "prompt": "x", "deadline_ms": 300})).await;
    let spans = collector
        .wait(ids.trace, &[("POST /v2/tasks", 1), ("task", 1), ("queue", 1), ("placement", 1)])
        .await;
    assert_connected(&spans, SPAN);
    let of = |name: &str| spans.iter().find(|span| span.name == name).expect("it is there").clone();
    assert_eq!((spans.len(), of("task").of("error.type")), (4, "DEADLINE_EXCEEDED"));
    assert_eq!(
        (of("task").of("llorch.task_id"), of("placement").of("llorch.pools_eligible")),
        (id.as_str(), "0")
    );
    assert!(of("queue").to - of("queue").from >= 250_000_000, "{:?}", of("queue"));
    // By default there is no collector.
    let quiet = Home::start(Engine::steady(), &[]).await;
    assert!(!std::fs::read_to_string(quiet.log()).expect("its log").contains("spans"));
}

// CLOUD-2735
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_done_to_pools_has_spans_of_both_daemons() {
    let collector = Collector::start().await;
    let own = || ("LLORCH_OTLP_ENDPOINT", collector.url.clone());
    let pools = format!(
        "[pools.own]\nengine = \"llamacpp\"\nmodel = \"fake-model\"\nslots = 2\n[pools.own.provision]\nmode = \"binary\"\n\
         program = \"{}\"\nargs = [\"--addr\", \"127.0.0.1:{{port}}\", \"--model\", \"{{model}}\"]\n",
        program("fake-engine").display()
    );
    let options = Options {
        nodes: 1,
        engine: Engine::None,
        pools: vec![(0, pools)],
        node: vec![(0, own().0, own().1)],
        control: vec![own()],
        ..Options::default()
    };
    let cluster = Cluster::start(options).await;
    let started = collector.wait_for("engine start").await;
    assert_eq!((started.of("llorch.pool_id"), started.failed, started.parent.as_str()), ("own", false, ""));
    assert_eq!(started.service, "pool-managerd");
    collector.wait_for("handoff binding").await;
    let ids = Ids { trace: "4bf92f3577b34da6a3ce929d0e0e4751", correlation: "order-drain" };
    let answer = ids.send(&cluster.client, "/v2/pools/own/drain", &json!({"deadline_ms": 1000})).await;
    assert_eq!(answer.status(), 202);
    let names = [("POST /v2/pools/{pool_id}/drain", 2), ("pool order", 1)];
    let spans = collector.wait(ids.trace, &names).await;
    assert_connected(&spans, SPAN);
    let order = spans.iter().find(|span| span.name == "pool order").expect("it is there");
    let at_node = spans.iter().find(|span| span.service == "pool-managerd").expect("the node's");
    assert_eq!((&at_node.parent, order.of("llorch.pool_id"), order.failed), (&order.id, "own", false));
}
