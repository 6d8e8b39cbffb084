//! Two hundred streams, what their readers and the engines saw, and what the daemons count.
//!
//! Each task has words of its own, so that no token of another one, or of an earlier life of the control
//! plane, goes unnoticed.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use e2e_cloud::{Client, Cluster, Engine, Network, Options, Transcript, eventually};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// Milliseconds between two tokens.
pub(super) const PACE_MS: u64 = 500;
/// Words from the first one of a task to the first one of the next.
const APART: u32 = 400;
pub(super) const TASKS: u32 = 200;
/// The last of them begin when the others have tokens, and have none yet when something happens.
const LATE: u32 = 20;
pub(super) const NODES: usize = 3;
/// Of each node.
pub(super) const SLOTS: u32 = 70;
/// As many requests as a fake engine remembers.
const REMEMBERED: usize = 1024;

/// Three nodes with slots for all, and the time-outs as they are by default.
pub(super) fn fleet(network: Option<Arc<Network>>) -> Options {
    let control = vec![
        ("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "10".to_owned()),
        ("ORCHESTRATORD_NODE_TIMEOUT_SECS", "30".to_owned()),
    ];
    let engine = Engine::Fake { slots: SLOTS, first_token_ms: 150, pace_ms: PACE_MS, dialect: "llamacpp" };
    Options { nodes: NODES, engine, control, network, ..Options::default() }
}

/// So many tokens take about so long.
pub(super) fn tokens_in(span: Duration) -> u32 {
    u32::try_from(span.as_millis()).expect("a short span") / u32::try_from(PACE_MS).expect("a short pace")
}

/// One task and its reader.
#[derive(Debug)]
struct Run {
    first: u32,
    continues: bool,
    reader: JoinHandle<Transcript>,
}

/// Tasks under way.
#[derive(Debug)]
pub(super) struct Streams {
    tokens: u32,
    runs: Vec<Run>,
}

/// What one reader saw.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) continues: bool,
    pub(super) transcript: Transcript,
    whole: String,
}

impl Streams {
    /// Half of the tasks with these numbers may be continued.
    pub(super) fn begin(cluster: &Cluster, numbers: Range<u32>, tokens: u32) -> Self {
        assert!(tokens < APART);
        let mut streams = Self { tokens, runs: Vec::new() };
        streams.add(cluster, numbers);
        streams
    }

    fn add(&mut self, cluster: &Cluster, numbers: Range<u32>) {
        for n in numbers {
            let (client, mut task) = (cluster.client.clone(), cluster.task(self.tokens));
            let continues = n % 2 == 0;
            // The engine goes on where the prompt ends.
            task["prompt"] = json!(format!("w{} ", n * APART));
            task["recovery"] = json!(if continues { "continue" } else { "fail" });
            let reader = tokio::spawn(async move { client.run(task).await });
            self.runs.push(Run { first: n * APART + 1, continues, reader });
        }
    }

    /// Two hundred, most of them with tokens and the rest just begun.
    pub(super) async fn under_way(cluster: &Cluster, tokens: u32) -> Self {
        let mut streams = Self::begin(cluster, 0..TASKS - LATE, tokens);
        running(cluster, TASKS - LATE).await;
        // Each has more than one token.
        tokio::time::sleep(Duration::from_millis(PACE_MS)).await;
        streams.add(cluster, TASKS - LATE..TASKS);
        running(cluster, TASKS).await;
        streams
    }

    pub(super) async fn end(self) -> Vec<Seen> {
        let mut seen = Vec::new();
        for Run { first, continues, reader } in self.runs {
            let transcript = reader.await.expect("a client does not panic");
            let whole = (first..first + self.tokens).map(|n| format!("w{n} ")).collect();
            seen.push(Seen { continues, transcript, whole });
        }
        seen
    }

    /// Nobody reads them any more.
    pub(super) fn leave(self) {
        self.runs.iter().for_each(|run| run.reader.abort());
    }
}

impl Seen {
    /// Complete, without gap or repeat.
    pub(super) fn is_whole(&self) -> bool {
        self.transcript.check();
        let text = self.transcript.text();
        assert!(self.whole.starts_with(&text), "a gap, a repeat or a splice: {text:?} of {:?}", self.whole);
        self.transcript.completed() && text == self.whole
    }

    /// As far as it came: a broken reader's stream has no end.
    pub(super) fn has_no_splice(&self) -> bool {
        self.whole.starts_with(&self.transcript.text())
    }

    /// Whether an attempt after its first one sent tokens.
    pub(super) fn was_placed_again(&self) -> bool {
        self.transcript.replaced_at.is_some()
    }
}

/// Waits until so many tasks are with their engines: one that is on its way there is dispatched too.
async fn running(cluster: &Cluster, tasks: u32) {
    eventually("all tasks run", Duration::from_secs(20), || async {
        let dispatched = metric(&cluster.client, "llorch_attempts_running").await? >= f64::from(tasks);
        (dispatched && busy(cluster).await >= u64::from(tasks)).then_some(())
    })
    .await;
}

/// The sum of all series of the metric whose labels contain nothing else than what is asked.
async fn sum(client: &Client, name: &str, label: &str) -> Option<f64> {
    let page = client.get("/metrics").await.ok()?.text().await.ok()?;
    let samples = page.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let is_it = rest.starts_with(' ') || rest.starts_with('{') && rest.contains(label);
        is_it.then(|| rest.rsplit(' ').next()?.parse::<f64>().ok())?
    });
    Some(samples.sum())
}

pub(super) async fn metric(client: &Client, name: &str) -> Option<f64> {
    sum(client, name, "").await
}

/// Links of the control plane that stand so.
pub(super) async fn links(cluster: &Cluster, state: &str) -> f64 {
    sum(&cluster.client, "llorch_links", &format!("state=\"{state}\"")).await.unwrap_or_default()
}

/// What the metric of all nodes is together.
pub(super) async fn of_nodes(cluster: &Cluster, name: &str) -> f64 {
    let mut all = 0.0;
    for n in 0..cluster.nodes.len() {
        let asked = async || metric(&cluster.node_client(n), name).await;
        all += cluster.on_node(n, asked).await.expect("the node's metrics");
    }
    all
}

async fn engine(cluster: &Cluster, n: usize, path: &str) -> Value {
    let url = cluster.engine_url(n);
    let asked = async || Client::new(&url, None).get_json(path).await;
    cluster.on_node(n, asked).await.expect("the engine's answer")
}

/// The attempts whose prompts the engines were given so far, one entry for each prompt.
pub(super) async fn prompts(cluster: &Cluster) -> Vec<String> {
    let mut prompts = Vec::new();
    for n in 0..cluster.nodes.len() {
        let seen = engine(cluster, n, "/fake/seen").await;
        let requests = seen["requests"].as_array().expect("a list");
        assert!(requests.len() < REMEMBERED, "the engine forgets");
        let completions = requests.iter().filter(|request| request["path"] == "/completion");
        prompts.extend(completions.map(|request| request["request_id"].as_str().expect("an id").to_owned()));
    }
    let attempts: BTreeSet<&String> = prompts.iter().collect();
    assert_eq!(attempts.len(), prompts.len(), "an attempt was begun twice");
    prompts
}

/// Slots that the engines have in use.
pub(super) async fn busy(cluster: &Cluster) -> u64 {
    let mut all = 0;
    for n in 0..cluster.nodes.len() {
        all += engine(cluster, n, "/fake/busy").await["busy"].as_u64().expect("a count");
    }
    all
}

/// Waits until all links are up and nothing runs.
pub(super) async fn quiet(cluster: &Cluster, patience: Duration) {
    eventually("all links are up and nothing runs", patience, || async {
        let up = links(cluster, "up").await;
        (up >= 3.0 && busy(cluster).await == 0).then_some(())
    })
    .await;
    for n in 0..cluster.nodes.len() {
        cluster.wait_online(n).await;
    }
}
