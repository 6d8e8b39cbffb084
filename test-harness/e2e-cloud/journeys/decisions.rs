//! What peers must not bend: the clock under readers, the answers to writers, the forecast beside a
//! watcher.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use e2e_cloud::cluster::TOKEN;
use e2e_cloud::{Client, Cluster, Connection, Engine, Options, Transcript, eventually};
use futures::future::join_all;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

mod blame;

const SOON: Duration = Duration::from_secs(10);

/// What is measured here is measured by one test at a time.
static ALONE: Mutex<()> = Mutex::const_new(());

fn quick(slots: u32) -> Engine {
    Engine::Fake { slots, first_token_ms: 5, pace_ms: 5, dialect: "llamacpp" }
}

fn fleet(nodes: usize, engine: Engine) -> Options {
    Options { nodes, engine, ..Options::default() }
}

/// Nodes that fall silent within no test, and report only what changes.
fn patient() -> Vec<(&'static str, String)> {
    vec![
        ("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "60".to_owned()),
        ("ORCHESTRATORD_NODE_TIMEOUT_SECS", "180".to_owned()),
    ]
}

fn pinned(cluster: &Cluster, node_id: &str) -> Value {
    let mut task = cluster.task(3);
    task["placement"] = json!({"mode": "pin", "node_id": node_id});
    task
}

/// Submits a task that is to be taken in; returns the answer.
async fn submit(cluster: &Cluster, task: &Value) -> Value {
    let response = cluster.client.post("/v2/tasks", task).await;
    let (status, body) = (response.status(), response.json::<Value>().await.unwrap_or_default());
    assert_eq!(status, 202, "{body}");
    body
}

fn path_of(accepted: &Value) -> String {
    format!("/v2/tasks/{}", accepted["task_id"].as_str().expect("a task has its id"))
}

/// As many tasks at once; each must be served.
async fn all_are_served(cluster: &Cluster, tasks: usize) -> Vec<Transcript> {
    let transcripts = join_all((0..tasks).map(|_| cluster.client.run(cluster.task(3)))).await;
    for transcript in &transcripts {
        transcript.check();
        assert!(transcript.completed(), "{:?}", transcript.events.last());
    }
    transcripts
}

// ---- readers ----

/// With a heartbeat interval of 1 s, and what the reader's own look may add.
const NODE_TIMEOUT: Duration = Duration::from_secs(3);
const SLACK: Duration = Duration::from_millis(1_500);
/// Ended tasks, all of which are looked at for a list that shows none of them: the cheaper its answer
/// is to write, the more the readers ask.
const KEPT: usize = 10_000;
const LISTS: [&str; 4] = ["/v2/tasks?model=of-nobody", "/v2/tasks?state=failed", "/v2/nodes", "/metrics"];

/// Submits tasks that wait for a label which nobody has, and cancels them.
async fn keep_canceled(port: u16, mut task: Value, count: usize) {
    task["placement"] = json!({"require_labels": {"of": "nobody"}});
    let mut connection = Connection::open(port, TOKEN).await;
    for _ in 0..count {
        let (status, accepted) = connection.json("POST", "/v2/tasks", Some(&task)).await;
        assert_eq!(status, 202, "{accepted}");
        let (status, _) = connection.ask("POST", &format!("{}/cancel", path_of(&accepted)), None).await;
        assert_eq!(status, 204);
    }
}

/// Asks for lists in a tight loop until it is over. Returns how many it got.
async fn list_all_the_time(port: u16, first: usize, over: Arc<AtomicBool>) -> usize {
    let mut connection = Connection::open(port, TOKEN).await;
    let mut lists = 0;
    while !over.load(Ordering::Relaxed) {
        // Mostly the first ones.
        let path = LISTS[if lists % 16 == 0 { (first + lists / 16) % LISTS.len() } else { first % 2 }];
        let (status, _) = connection.ask("GET", path, None).await;
        assert_eq!(status, 200, "{path}");
        lists += 1;
    }
    lists
}

/// Runs one task after the other until it is over. Returns how long each took, in order of that.
async fn run_all_the_time(client: Client, task: Value, over: Arc<AtomicBool>) -> Vec<Duration> {
    let mut took = Vec::new();
    while !over.load(Ordering::Relaxed) {
        let transcript = client.run(task.clone()).await;
        assert!(transcript.completed(), "{:?}", transcript.events.last());
        took.push(transcript.took);
    }
    took.sort_unstable();
    took
}

// CLOUD-1771
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_node_is_offline_in_time_however_many_read_and_others_are_placed_meanwhile() {
    let _alone = ALONE.lock().await;
    let cluster = Cluster::start(fleet(2, quick(4))).await;
    let mut keeping = JoinSet::new();
    for _ in 0..8 {
        keeping.spawn(keep_canceled(cluster.port, cluster.task(1), KEPT / 8));
    }
    keeping.join_all().await;
    let alone = run_for_a_while(&cluster).await;
    for readers in [4, 12, 48] {
        let over = Arc::new(AtomicBool::new(false));
        let mut reading = JoinSet::new();
        for n in 0..readers {
            reading.spawn(list_all_the_time(cluster.port, n, Arc::clone(&over)));
        }
        // Both, so that no event of another node lets the time pass.
        let signal = |signal| cluster.nodes.iter().for_each(|n| n.daemon.as_ref().unwrap().signal(signal));
        signal(Signal::SIGSTOP);
        let stopped = Instant::now();
        eventually("the silent nodes are offline", Duration::from_secs(20), || async {
            let node = cluster.client.get_json("/v2/nodes/gpu-node-1").await?;
            (node["liveness"] == "offline").then_some(())
        })
        .await;
        let noticed = stopped.elapsed();
        signal(Signal::SIGCONT);
        cluster.wait_online(0).await;
        cluster.wait_online(1).await;
        let took = run_for_a_while(&cluster).await;
        over.store(true, Ordering::Relaxed);
        let lists: usize = reading.join_all().await.into_iter().sum();
        eprintln!(
            "{readers} readers, {lists} lists: offline after {} ms; tasks of others: {}, without readers: {}",
            noticed.as_millis(),
            shares(&took),
            shares(&alone),
        );
        assert!(noticed <= NODE_TIMEOUT + SLACK, "{readers} readers: {noticed:?}");
    }
}

/// One task after the other for 1.5 s.
async fn run_for_a_while(cluster: &Cluster) -> Vec<Duration> {
    let over = Arc::new(AtomicBool::new(false));
    let task = pinned(cluster, "gpu-node-2");
    let running = tokio::spawn(run_all_the_time(cluster.client.clone(), task, Arc::clone(&over)));
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    over.store(true, Ordering::Relaxed);
    running.await.unwrap()
}

fn shares(took: &[Duration]) -> String {
    let at = |percent: usize| took[took.len() * percent / 100].as_millis();
    format!("{} with p50 {} ms, p99 {} ms", took.len(), at(50), at(99))
}

const WRITERS: usize = 16;
const ROUNDS: usize = 625;
/// One round in so many writes to a node, a session and an artifact too.
const OTHERS_EVERY: usize = 8;

/// A client that writes on one connection and reads on another.
struct Pair {
    writer: Connection,
    reader: Connection,
}

impl Pair {
    async fn write(&mut self, method: &str, path: &str, body: Option<&Value>, wanted: u16) -> Value {
        let (status, answer) = self.writer.json(method, path, body).await;
        assert_eq!(status, wanted, "{method} {path}: {answer}");
        answer
    }

    /// The read that begins after the answer: its status, and a field of its body.
    async fn sees(&mut self, path: &str, wanted: u16, field: &str, value: &str) {
        let (status, body) = self.reader.json("GET", path, None).await;
        assert_eq!((status, &body[field]), (wanted, &json!(value)), "{path}: {body}");
    }

    async fn task(&mut self) {
        let task = json!({"model_ref": "of-nobody", "prompt": "x"});
        let accepted = self.write("POST", "/v2/tasks", Some(&task), 202).await;
        let path = path_of(&accepted);
        self.sees(&path, 200, "state", "queued").await;
        self.write("POST", &format!("{path}/cancel"), None, 204).await;
        self.sees(&path, 200, "state", "canceled").await;
    }

    /// A session with its first task, and an artifact.
    async fn session_and_artifact(&mut self, round: usize) {
        let session = uuid::Uuid::new_v4().to_string();
        let task = json!({"model_ref": "of-nobody", "prompt": "x", "session_id": session});
        let accepted = self.write("POST", "/v2/tasks", Some(&task), 202).await;
        let path = format!("/v2/sessions/{session}");
        self.sees(&path, 200, "session_id", &session).await;
        self.write("DELETE", &path, None, 204).await;
        self.sees(&path, 404, "code", "NOT_FOUND").await;
        self.write("POST", &format!("{}/cancel", path_of(&accepted)), None, 204).await;
        let artifact = json!({"round": round, "of": session});
        let kept = self.write("POST", "/v2/artifacts", Some(&artifact), 201).await;
        let path = format!("/v2/artifacts/{}", kept["id"].as_str().expect("an artifact has its id"));
        self.sees(&path, 200, "of", &session).await;
    }

    async fn node(&mut self, node_id: &str) {
        let path = format!("/v2/nodes/{node_id}");
        let register = json!({
            "node_id": node_id, "machine_id": "m", "boot_id": "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11",
            "address": "http://127.0.0.1:1", "version": "0",
        });
        let registered = self.write("POST", "/v2/nodes/register", Some(&register), 200).await;
        self.sees(&path, 200, "intent", "serving").await;
        let beat = json!({
            "epoch": registered["epoch"], "seq": 1, "timestamp": "",
            "pools": [{"pool_id": "pool-0", "state": "ready", "ready": true, "engine": "llamacpp", "models": ["m"],
                "replicas": [{"replica_id": "r0", "ready": true, "slots_total": 1}]}],
        });
        self.write("POST", &format!("{path}/heartbeat"), Some(&beat), 200).await;
        self.sees(&format!("/v2/pools/pool-0/health?node_id={node_id}"), 200, "state", "ready").await;
        self.write("POST", &format!("{path}/drain"), None, 202).await;
        self.sees(&path, 200, "intent", "draining").await;
        self.write("POST", &format!("{path}/resume"), None, 202).await;
        self.sees(&path, 200, "intent", "serving").await;
        self.write("DELETE", &path, None, 204).await;
        self.sees(&path, 404, "code", "NODE_UNKNOWN").await;
    }
}

// CLOUD-1772
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_reads_after_an_answered_write_sees_it() {
    let _alone = ALONE.lock().await;
    // So long after its start a model that nobody has is waited for.
    let control = vec![("ORCHESTRATORD_NODE_TIMEOUT_SECS", "600".to_owned())];
    let mut cluster = Cluster::without_nodes(Options { control, ..fleet(0, Engine::None) });
    cluster.start_control();
    eventually("the control plane answers", SOON, || async { cluster.client.get_json("/v2/nodes").await })
        .await;
    let (port, start) = (cluster.port, Instant::now());
    let mut clients = JoinSet::new();
    for n in 0..WRITERS {
        clients.spawn(async move {
            let (writer, reader) = (Connection::open(port, TOKEN).await, Connection::open(port, TOKEN).await);
            let mut pair = Pair { writer, reader };
            for round in 0..ROUNDS {
                pair.task().await;
                if round % OTHERS_EVERY == 0 {
                    pair.node(&format!("of-client-{n}")).await;
                    pair.session_and_artifact(round).await;
                }
            }
        });
    }
    clients.join_all().await;
    let reads = WRITERS * (2 * ROUNDS + 8 * ROUNDS.div_ceil(OTHERS_EVERY));
    eprintln!("{reads} reads after writes in {} ms, no miss", start.elapsed().as_millis());
}

const DEADLINE_MS: u64 = 3_500;

// CLOUD-1770
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_watches_a_waiting_task_changes_nobodys_answer() {
    let _alone = ALONE.lock().await;
    let engine = Engine::Fake { slots: 1, first_token_ms: 20, pace_ms: 50, dialect: "llamacpp" };
    let cluster = Cluster::start(fleet(1, engine)).await;
    assert!(cluster.client.run(cluster.task(20)).await.completed(), "a pace is measured");
    let over = Arc::new(AtomicBool::new(false));
    let lists = tokio::spawn(list_all_the_time(cluster.port, 0, Arc::clone(&over)));
    for round in 1..=3 {
        let mut long = cluster.task(400);
        long["expected_tokens"] = json!(400);
        let long = submit(&cluster, &long).await;
        eventually("a report lists what runs", SOON, || async {
            let task = cluster.client.get_json(&path_of(&long)).await?;
            let node = cluster.client.get_json("/v2/nodes/gpu-node-1").await?;
            let listed = node["pools"][0]["report"]["replicas"][0]["attempts"].as_array()?;
            listed.contains(&task["attempts"][0]["attempt_id"]).then_some(())
        })
        .await;
        let waiting = submit(&cluster, &cluster.task(20)).await;
        let id = waiting["task_id"].as_str().unwrap();
        // The reader makes a forecast: its task would start after all of the long one.
        let reported = cluster.client.follow(id, None, 1).await.events.remove(0).2;
        let predicted = reported["predicted_start_ms"].as_u64().expect("a pace was measured");
        assert!(predicted > DEADLINE_MS, "the long one would be over too soon: {reported}");
        let canceled = cluster.client.post(&format!("{}/cancel", path_of(&long)), &json!({})).await;
        assert_eq!(canceled.status(), 204);
        let mut hasty = cluster.task(12);
        hasty["deadline_ms"] = json!(DEADLINE_MS);
        let asked = Instant::now();
        let hasty = submit(&cluster, &hasty).await;
        let ended = cluster.client.follow(hasty["task_id"].as_str().unwrap(), None, usize::MAX).await;
        eprintln!(
            "round {round}: told {predicted} ms before the slot was free; admitted with a deadline of {DEADLINE_MS} ms, ended after {} ms",
            asked.elapsed().as_millis()
        );
        assert!(ended.completed(), "the deadline could be met: {:?}", ended.events.last());
    }
    over.store(true, Ordering::Relaxed);
    lists.await.unwrap();
}

// ---- the queue and the forecast ----

/// Tasks that wait beside the others, and the others.
const WAITING: usize = 2_000;
const OTHERS: usize = 256;
/// How much longer the others may take beside them.
const MOST_TIMES: u32 = 5;

/// Submits tasks that nothing can run, each with a constraint of its own.
async fn wait_without_start(cluster: &Cluster, constraint: fn(usize) -> Value) {
    let mut clients = JoinSet::new();
    for client in 0..8 {
        let (port, task) = (cluster.port, cluster.task(1));
        clients.spawn(async move {
            let mut connection = Connection::open(port, TOKEN).await;
            for n in (client..WAITING).step_by(8) {
                let mut task = task.clone();
                task["placement"] = constraint(n);
                let (status, body) = connection.json("POST", "/v2/tasks", Some(&task)).await;
                assert_eq!(status, 202, "{body}");
            }
        });
    }
    clients.join_all().await;
}

/// Runs the others, sixteen at a time. Returns how long they took together.
async fn time_of_others(cluster: &Cluster) -> Duration {
    let start = Instant::now();
    let lanes = (0..16).map(|_| async {
        for _ in 0..OTHERS / 16 {
            let transcript = cluster.client.run(cluster.task(1)).await;
            assert!(transcript.completed(), "{:?}", transcript.events.last());
        }
    });
    join_all(lanes).await;
    start.elapsed()
}

// CLOUD-1773
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_that_wait_for_something_else_do_not_slow_the_others() {
    let _alone = ALONE.lock().await;
    let engine = Engine::Fake { slots: 4, first_token_ms: 0, pace_ms: 0, dialect: "llamacpp" };
    let control = vec![("ORCHESTRATORD_ADMISSION_CAPACITY", "10000".to_owned())];
    let cluster = Cluster::start(Options { control, ..fleet(1, engine) }).await;
    // The first run makes the connections.
    time_of_others(&cluster).await;
    let alone = time_of_others(&cluster).await;
    let labels: fn(usize) -> Value = |n| json!({"require_labels": {"k": format!("v{n}")}});
    let avoided: fn(usize) -> Value =
        |n| json!({"avoid_pools": ["pool-0", format!("other-{n}")], "allow_fallback": false});
    for (what, constraint) in [("a label", labels), ("avoided pools", avoided)] {
        wait_without_start(&cluster, constraint).await;
        let beside = time_of_others(&cluster).await;
        eprintln!(
            "{OTHERS} tasks: {} ms; beside {WAITING} more that wait, each with {what} of its own: {} ms, {:.2} times",
            alone.as_millis(),
            beside.as_millis(),
            beside.as_secs_f64() / alone.as_secs_f64(),
        );
        assert!(beside < alone * MOST_TIMES, "{what}: {beside:?} instead of {alone:?}");
    }
}

// CLOUD-2314
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_nodes_share_evenly_also_what_comes_one_after_the_other() {
    let cluster = Cluster::start(Options { control: patient(), ..fleet(2, quick(4)) }).await;
    let mut on_first = 0;
    for _ in 0..20 {
        let transcript = cluster.client.run(cluster.task(2)).await;
        assert!(transcript.completed(), "{:?}", transcript.events.last());
        on_first += usize::from(transcript.node() == Some("gpu-node-1"));
    }
    eprintln!("20 tasks one after the other: {on_first} and {}", 20 - on_first);
    assert_eq!(on_first, 10);
}

// CLOUD-1211
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobodys_estimate_refuses_others() {
    const QUEUE_TIMEOUT_SECS: u64 = 60;
    let engine = Engine::Fake { slots: 2, first_token_ms: 20, pace_ms: 200, dialect: "llamacpp" };
    let control = vec![("ORCHESTRATORD_QUEUE_TIMEOUT_SECS", QUEUE_TIMEOUT_SECS.to_string())];
    let cluster = Cluster::start(Options { control, ..fleet(1, engine) }).await;
    assert!(cluster.client.run(cluster.task(4)).await.completed(), "a pace is measured");
    // Without a bound: only the estimate says how long it is.
    let endless = json!({"model_ref": "fake-model", "prompt": "x", "expected_tokens": u32::MAX});
    for _ in 0..2 {
        submit(&cluster, &endless).await;
    }
    eventually("both run", SOON, || async {
        let node = cluster.client.node("gpu-node-1").await?;
        (node.running_attempts.len() == 2).then_some(())
    })
    .await;
    let with_deadline = |deadline_ms: u64| {
        let mut task = cluster.task(1);
        task["deadline_ms"] = json!(deadline_ms);
        task
    };
    let (status, refusal) = cluster.client.refused(&with_deadline(100)).await;
    assert_eq!((status, &refusal["policy_label"]), (429, &json!("deadline")), "{refusal}");
    let retry_after_ms = refusal["retry_after_ms"].as_u64().expect("a time to wait");
    let admitted = submit(&cluster, &with_deadline(30_000)).await;
    eprintln!(
        "retry_after_ms {retry_after_ms} for a deadline of 100 ms; one of 30 s is admitted, predicted to start in {} ms",
        admitted["predicted_start_ms"]
    );
    assert!(retry_after_ms < QUEUE_TIMEOUT_SECS * 1_000, "{refusal}");
}
