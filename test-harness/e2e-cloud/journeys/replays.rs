//! Streams of `/v1` whose node, engine or link is lost under them, at several points of each: what makes the
//! same again by its own words is read to its end as if nothing had been, all others end with one error.
//!
//! Of two replicas one is lost. The other one comes once all streams are on the first, so that every point
//! is hit. What comes over HTTP is the only evidence.

mod real;

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use e2e_cloud::cluster::start_engine;
use e2e_cloud::process::{free_port, program};
use e2e_cloud::{Client, Cluster, Engine, Options, Process, eventually};
use futures::StreamExt;
use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::faults::ALONE;

/// Points of a stream in each run, ...
const POINTS: u32 = 5;
/// ... and in a long one.
const MANY_POINTS: u32 = 50;
const TOKENS: u32 = 240;
const PACE_MS: u64 = 30;
const FIRST_TOKEN_MS: u64 = 300;
/// From the first stream's beginning to the last one's.
const SPREAD: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(90);

/// What happens to what serves the streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    NodeKilled,
    EngineKilled,
    /// It answers whether it is up, and makes nothing.
    EngineHung,
    EngineStopped,
    LinkCut(Duration),
}

impl Fault {
    /// It is noticed by the bound between tokens only.
    fn is_silence(self) -> bool {
        matches!(self, Self::EngineHung | Self::EngineStopped)
    }

    /// Of streams that are lost by it.
    fn code(self) -> &'static str {
        if self.is_silence() { "DECODE_TIMEOUT" } else { "WORKER_RESET" }
    }

    /// The bounds of first tokens and between tokens, where they are not those by default.
    fn limits(self) -> Vec<(&'static str, String)> {
        let limits =
            [("ORCHESTRATORD_FIRST_TOKEN_TIMEOUT_SECS", "3"), ("ORCHESTRATORD_TOKEN_IDLE_TIMEOUT_SECS", "2")];
        let own = limits.into_iter().filter(|_| self.is_silence());
        own.map(|(name, value)| (name, value.to_owned())).collect()
    }
}

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// A stream that is the same each time.
    Exact(&'static str),
    Drawn,
    /// No stream.
    Whole,
}

impl Asked {
    fn path(self) -> &'static str {
        match self {
            Self::Exact(path) => path,
            Self::Drawn => CHAT,
            Self::Whole => "/v1/embeddings",
        }
    }

    fn body(self) -> Value {
        let messages = json!([{"role": "user", "content": "hi"}]);
        let mut body = json!({"model": "fake-model", "stream": true, "max_tokens": TOKENS});
        match self {
            Self::Exact(CHAT) => (body["messages"], body["temperature"]) = (messages, json!(0)),
            Self::Exact(_) => (body["prompt"], body["seed"]) = (json!("x"), json!(7)),
            Self::Drawn => (body["messages"], body["temperature"]) = (messages, json!(1)),
            Self::Whole => body = json!({"model": "fake-model", "input": "abc"}),
        }
        body
    }
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// What one client has read.
#[derive(Debug)]
struct Answer {
    asked: Asked,
    status: u16,
    text: String,
    /// Its last byte came.
    at: Instant,
}

/// What a stream is to its reader.
#[derive(Debug, Default)]
struct Stream {
    text: String,
    /// The codes of errors.
    errors: Vec<String>,
    finishes: usize,
    usages: usize,
    ends: usize,
    names: Vec<String>,
    has_last_error: bool,
}

fn read(text: &str) -> Stream {
    let mut stream = Stream::default();
    for event in text.split_terminator("\n\n").filter(|event| !event.starts_with(':')) {
        let data = event.strip_prefix("data: ").unwrap_or_else(|| panic!("{event:?} in {text}"));
        stream.has_last_error = false;
        if data == "[DONE]" {
            stream.ends += 1;
            continue;
        }
        let data: Value = serde_json::from_str(data).unwrap_or_else(|error| panic!("{error}: {data}"));
        if data["error"].is_object() {
            stream.errors.push(data["error"]["code"].as_str().unwrap_or_default().to_owned());
            stream.has_last_error = true;
            continue;
        }
        let choice = &data["choices"][0];
        let piece = choice["delta"]["content"].as_str().or(choice["text"].as_str());
        stream.text.push_str(piece.unwrap_or_default());
        stream.finishes += usize::from(choice["finish_reason"].is_string());
        stream.usages += usize::from(data["usage"].is_object());
        stream.names.extend(data["id"].as_str().map(str::to_owned));
    }
    stream.names.dedup();
    stream
}

fn words() -> String {
    (0..TOKENS).map(|n| format!("w{n} ")).collect()
}

impl Answer {
    fn is_whole(&self) {
        if self.asked == Asked::Whole {
            let body: Value = serde_json::from_str(&self.text).unwrap_or_default();
            assert_eq!((self.status, &body["data"][0]["embedding"][0]), (200, &json!(3.0)), "{}", self.text);
            return;
        }
        let stream = read(&self.text);
        assert_eq!((self.status, stream.errors.len()), (200, 0), "{:?}: {}", self.asked, self.text);
        assert_eq!(stream.text, words(), "{:?}: {}", self.asked, self.text);
        assert_eq!((stream.finishes, stream.usages, stream.ends), (1, 1, 1), "{}", self.text);
        assert!(self.text.ends_with("data: [DONE]\n\n"), "{}", self.text);
    }

    /// It had begun, and ends with one error in its dialect.
    fn is_lost(&self, code: &str) {
        let stream = read(&self.text);
        assert_eq!(
            (self.status, stream.errors, stream.ends),
            (200, vec![code.to_owned()], 0),
            "{}",
            self.text
        );
        assert!(stream.has_last_error && stream.finishes == 0, "{}", self.text);
        assert!(words().starts_with(&stream.text) && !stream.text.is_empty(), "{}", self.text);
    }
}

/// Asks, and counts a stream that has begun.
fn ask(client: &Client, asked: Asked, after: Duration, begun: &Arc<AtomicUsize>) -> JoinHandle<Answer> {
    let (client, begun) = (client.clone(), Arc::clone(begun));
    tokio::spawn(async move {
        tokio::time::sleep(after).await;
        let request = client.request(Method::POST, asked.path()).json(&asked.body()).timeout(PATIENCE);
        let response = request.send().await.expect("an answer");
        let status = response.status().as_u16();
        let (mut pieces, mut bytes) = (response.bytes_stream(), Vec::new());
        while let Some(piece) = pieces.next().await {
            if bytes.is_empty() {
                begun.fetch_add(1, Ordering::Relaxed);
            }
            bytes.extend_from_slice(&piece.expect("an orderly end"));
        }
        let text = String::from_utf8(bytes).expect("engines write text");
        Answer { asked, status, text, at: Instant::now() }
    })
}

/// Begins streams one after the other, brings the second replica, and then the fault while whole answers
/// are under way too. Returns all answers.
async fn round(
    client: &Client,
    points: u32,
    second: impl AsyncFnOnce(),
    harm: impl AsyncFnOnce(),
) -> Vec<Answer> {
    let begun = Arc::new(AtomicUsize::new(0));
    let mut runs = Vec::new();
    for point in 0..points {
        let after = SPREAD * point / points;
        let exact = Asked::Exact(if point % 2 == 0 { CHAT } else { COMPLETIONS });
        runs.push(ask(client, exact, after, &begun));
        runs.push(ask(client, Asked::Drawn, after, &begun));
    }
    tokio::time::sleep(SPREAD).await;
    eventually("all streams have begun", Duration::from_secs(20), || async {
        (begun.load(Ordering::Relaxed) == runs.len()).then_some(())
    })
    .await;
    second().await;
    for _ in 0..points {
        runs.push(ask(client, Asked::Whole, Duration::ZERO, &begun));
        tokio::time::sleep(Duration::from_millis(FIRST_TOKEN_MS) / points).await;
    }
    let harmed = Instant::now();
    harm().await;
    let mut answers = Vec::new();
    for run in runs {
        answers.push(run.await.expect("a client does not panic"));
    }
    let early = answers.iter().filter(|answer| answer.asked != Asked::Whole && answer.at < harmed).count();
    assert_eq!(early, 0, "streams had ended before the fault");
    answers
}

/// Every exact stream and every whole answer is complete, and of the others none that had begun.
fn check(answers: &[Answer], fault: Fault) {
    for answer in answers {
        match answer.asked {
            Asked::Drawn if fault != Fault::LinkCut(SHORT_CUT) => answer.is_lost(fault.code()),
            _ => answer.is_whole(),
        }
    }
}

fn engine() -> Engine {
    Engine::Fake { slots: 512, first_token_ms: FIRST_TOKEN_MS, pace_ms: PACE_MS, dialect: "llamacpp" }
}

/// A counter or gauge of the control plane.
async fn metric(client: &Client, name: &str) -> f64 {
    let text = client.get("/metrics").await.expect("metrics").text().await.expect("text");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{name} is not in {text}"))
}

async fn cloud(fault: Fault, points: u32) {
    let _alone = ALONE.read().await;
    let mut cluster =
        Cluster::without_nodes(Options { engine: engine(), control: fault.limits(), ..Options::default() });
    cluster.start_control();
    // The way between the control plane and the first node, in both directions.
    let (to_control, to_node) = (free_port(), free_port());
    cluster.prepare_node(0);
    cluster.options.node = vec![
        (0, "ORCHESTRATORD_URL", format!("http://127.0.0.1:{to_control}")),
        (0, "POOL_MANAGERD_ADVERTISE_URL", format!("http://127.0.0.1:{to_node}")),
    ];
    let mut command = Command::new(program("tcp-proxy"));
    command.arg(format!("127.0.0.1:{to_control}=127.0.0.1:{}", cluster.port));
    command.arg(format!("127.0.0.1:{to_node}=127.0.0.1:{}", cluster.nodes[0].port));
    let proxy = Process::start(command, &cluster.log("tcp-proxy"));
    cluster.start_engine(0);
    cluster.start_daemon(0);
    cluster.wait_online(0).await;
    let client = cluster.client.clone();
    let cluster = tokio::sync::Mutex::new(cluster);
    let answers = round(
        &client,
        points,
        async || {
            let mut cluster = cluster.lock().await;
            cluster.add_node(1);
            cluster.wait_online(1).await;
        },
        async || {
            let mut cluster = cluster.lock().await;
            match fault {
                Fault::NodeKilled => cluster.nodes[0].daemon.as_mut().expect("a daemon").kill(),
                Fault::EngineKilled => cluster.nodes[0].engine.as_mut().expect("an engine").kill(),
                Fault::EngineHung => {
                    cluster.fault(0, json!({"kind": "frozen"})).await;
                    // The streams are over by then; whole answers have no bound so near.
                    tokio::time::sleep(Duration::from_secs(6)).await;
                    cluster.fault(0, json!({"kind": "none"})).await;
                }
                Fault::EngineStopped => {
                    let engine = cluster.nodes[0].engine.as_ref().expect("an engine");
                    engine.signal(Signal::SIGSTOP);
                    tokio::time::sleep(Duration::from_secs(6)).await;
                    engine.signal(Signal::SIGCONT);
                }
                Fault::LinkCut(span) => {
                    proxy.signal(Signal::SIGSTOP);
                    tokio::time::sleep(span).await;
                    proxy.signal(Signal::SIGCONT);
                }
            }
        },
    )
    .await;
    let is_unseen = fault == Fault::LinkCut(SHORT_CUT);
    check(&answers, fault);
    let continued = metric(&client, "llorch_continuations_total").await;
    let lost = metric(&client, "llorch_tasks_reset_total").await;
    say(&format!("{fault:?} at {points} points: {continued} streams generated again, {lost} resets"));
    // An attempt that its node did not take counts too.
    let at_least = if is_unseen { 0.0 } else { f64::from(points) };
    assert!(continued >= at_least && (continued > 0.0) == (at_least > 0.0), "{continued} of {at_least}");
}

/// One daemon with two engines.
async fn home(fault: Fault, points: u32) {
    let _alone = ALONE.read().await;
    let dir = tempfile::tempdir().expect("a temporary folder");
    let runtime_dir = dir.path().join("engines");
    let port = free_port();
    let mut command = Command::new(program("orchestratord"));
    command
        .env("ORCHESTRATORD_ADDR", format!("127.0.0.1:{port}"))
        .env("ORCHESTRATORD_RUNTIME_DIR", &runtime_dir)
        .envs(fault.limits());
    let _daemon = Process::start(command, &dir.path().join("orchestratord.log"));
    let client = Client::new(&format!("http://127.0.0.1:{port}"), None);
    let ready = async |pools: usize| {
        eventually("the pools are ready", Duration::from_secs(20), || async {
            let node = client.node("home").await?;
            (node.pools.iter().filter(|pool| pool.report.ready).count() == pools).then_some(())
        })
        .await;
    };
    let mut first = start_engine(&engine(), &runtime_dir, &dir.path().join("engine.log")).expect("an engine");
    ready(1).await;
    let handoff = std::fs::read_to_string(runtime_dir.join("pool-0-r0.json")).expect("a handoff file");
    let handoff: Value = serde_json::from_str(&handoff).expect("a whole handoff file");
    let url = handoff["url"].as_str().expect("a URL").to_owned();
    let mut second = None;
    let answers = round(
        &client,
        points,
        async || {
            let mut command = Command::new(program("fake-engine"));
            command
                .args(["--slots", "512", "--first-token-ms", &FIRST_TOKEN_MS.to_string()])
                .args(["--pace-ms", &PACE_MS.to_string(), "--pool-id", "pool-1", "--replica-id", "r0"])
                .arg("--handoff-dir")
                .arg(&runtime_dir);
            second = Some(Process::start(command, &dir.path().join("second.log")));
            ready(2).await;
        },
        async || match fault {
            Fault::EngineKilled => first.kill(),
            Fault::EngineHung => {
                let engine = Client::new(&url, None);
                assert_eq!(engine.post("/fake/fault", &json!({"kind": "frozen"})).await.status(), 204);
                tokio::time::sleep(Duration::from_secs(6)).await;
                assert_eq!(engine.post("/fake/fault", &json!({"kind": "none"})).await.status(), 204);
            }
            Fault::EngineStopped => {
                first.signal(Signal::SIGSTOP);
                tokio::time::sleep(Duration::from_secs(6)).await;
                first.signal(Signal::SIGCONT);
            }
            Fault::NodeKilled | Fault::LinkCut(_) => unreachable!("there is one process, and no link"),
        },
    )
    .await;
    check(&answers, fault);
    let continued = metric(&client, "llorch_continuations_total").await;
    say(&format!("{fault:?} at home, at {points} points: {continued} streams generated again"));
    assert!(continued >= f64::from(points), "{continued} of {points}");
}

#[expect(clippy::print_stdout, reason = "the figures of the run are its result")]
fn say(line: &str) {
    println!("{line}");
}

/// Nobody notices it.
const SHORT_CUT: Duration = Duration::from_secs(1);
/// Longer than a link is waited for.
const LONG_CUT: Duration = Duration::from_secs(15);

/// Each fault as a test at some points, and as a long one at many.
macro_rules! faults {
    ($($run:ident($fault:expr): $name:ident, $long:ident;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                $run($fault, POINTS).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            #[ignore = "long"]
            async fn $long() {
                $run($fault, MANY_POINTS).await;
            }
        )*
    };
}

// CLOUD-2870
// CLOUD-2871
// CLOUD-2872
faults! {
    cloud(Fault::NodeKilled): a_killed_node_is_not_noticed, a_killed_node_is_not_noticed_at_many_points;
    cloud(Fault::EngineKilled): a_killed_engine_is_not_noticed, a_killed_engine_is_not_noticed_at_many_points;
    cloud(Fault::EngineHung): a_hung_engine_is_not_noticed, a_hung_engine_is_not_noticed_at_many_points;
    cloud(Fault::EngineStopped): a_stopped_engine_is_not_noticed, a_stopped_engine_is_not_noticed_at_many_points;
    cloud(Fault::LinkCut(SHORT_CUT)): a_link_cut_for_a_second_is_not_noticed, a_link_cut_for_a_second_is_not_noticed_at_many_points;
    cloud(Fault::LinkCut(LONG_CUT)): a_link_cut_for_long_is_not_noticed, a_link_cut_for_long_is_not_noticed_at_many_points;
    home(Fault::EngineKilled): a_killed_engine_at_home_is_not_noticed, a_killed_engine_at_home_is_not_noticed_at_many_points;
    home(Fault::EngineHung): a_hung_engine_at_home_is_not_noticed, a_hung_engine_at_home_is_not_noticed_at_many_points;
    home(Fault::EngineStopped): a_stopped_engine_at_home_is_not_noticed, a_stopped_engine_at_home_is_not_noticed_at_many_points;
}

/// A cluster of two nodes whose streams begin on the first one.
async fn pair(control: Vec<(&'static str, String)>) -> Cluster {
    let mut cluster = Cluster::without_nodes(Options { engine: engine(), control, ..Options::default() });
    cluster.start_control();
    cluster.add_node(0);
    cluster.wait_online(0).await;
    cluster
}

// CLOUD-2860
// CLOUD-2863
// CLOUD-2865
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_generated_again_or_comes_out_otherwise_ends_with_an_error() {
    let _alone = ALONE.read().await;
    let mut cluster = pair(Vec::new()).await;
    let client = cluster.client.clone();
    let send = |headers: &[(&'static str, &'static str)], body: Value| {
        let mut request = client.request(Method::POST, CHAT).json(&body).timeout(PATIENCE);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let begun = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&begun);
        let run = tokio::spawn(async move {
            let response = request.send().await.expect("an answer");
            let status = response.status().as_u16();
            let (mut pieces, mut bytes) = (response.bytes_stream(), Vec::new());
            while let Some(piece) = pieces.next().await {
                bytes.extend_from_slice(&piece.expect("an orderly end"));
                count.store(1, Ordering::Relaxed);
            }
            let text = String::from_utf8(bytes).expect("text");
            Answer { asked: Asked::Drawn, status, text, at: Instant::now() }
        });
        (run, begun)
    };
    let (exact, drawn) = (Asked::Exact(CHAT).body(), Asked::Drawn.body());
    let (refused, _) = send(&[("x-llorch-recovery", "continue")], drawn);
    let refused = refused.await.expect("an answer");
    let error: Value = serde_json::from_str(&refused.text).unwrap_or_default();
    assert_eq!((refused.status, &error["error"]["code"]), (400, &json!("UNSUPPORTED")), "{}", refused.text);
    let runs = [
        // Its client does not want it.
        send(&[("x-llorch-recovery", "fail")], exact.clone()),
        // The other engine has other words.
        send(&[("x-llorch-recovery", "continue")], exact),
    ];
    for (_, begun) in &runs {
        eventually("a stream has begun", Duration::from_secs(10), || async {
            (begun.load(Ordering::Relaxed) == 1).then_some(())
        })
        .await;
    }
    cluster.add_node(1);
    cluster.wait_online(1).await;
    cluster.fault(1, json!({"kind": "other_words"})).await;
    cluster.nodes[0].daemon.as_mut().expect("a daemon").kill();
    for (run, _) in runs {
        run.await.expect("an answer").is_lost("WORKER_RESET");
    }
    let differed = metric(&client, "llorch_replays_differed_total").await;
    assert_eq!((metric(&client, "llorch_continuations_total").await, differed), (1.0, 1.0));
}

// CLOUD-2866
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_hears_comments_between_events_while_its_stream_waits_for_a_replica() {
    let _alone = ALONE.read().await;
    let mut cluster = pair(Vec::new()).await;
    let client = cluster.client.clone();
    let begun = Arc::new(AtomicUsize::new(0));
    let run = ask(&client, Asked::Exact(CHAT), Duration::ZERO, &begun);
    eventually("the stream has begun", Duration::from_secs(10), || async {
        (begun.load(Ordering::Relaxed) == 1).then_some(())
    })
    .await;
    // The one that is left is of another kind, and would say it otherwise.
    let other = Engine::Fake { slots: 4, first_token_ms: 0, pace_ms: 0, dialect: "vllm" };
    cluster.options.other_engines.push((1, other));
    cluster.add_node(1);
    cluster.wait_online(1).await;
    cluster.nodes[0].daemon.as_mut().expect("a daemon").kill();
    tokio::time::sleep(Duration::from_secs(12)).await;
    cluster.start_daemon(0);
    let answer = run.await.expect("a client does not panic");
    answer.is_whole();
    let comments: Vec<&str> = answer.text.split("\n\n").filter(|event| event.starts_with(':')).collect();
    assert_eq!(comments, [": waiting"], "one in twelve seconds: {}", answer.text);
}
