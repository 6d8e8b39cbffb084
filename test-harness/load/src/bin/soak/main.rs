//! The soak: both daemons with hostile and honest peers side by side, for as long as one likes.
//!
//! Hostile ones fill whatever a peer can fill (`hostile.rs`), some kinds at a time, which and for how long
//! being drawn from the seed; honest ones run tasks and look at the cluster meanwhile. What is drawn follows
//! from the seed; when what happens, does not. It prints memory and the times of honest requests, and each
//! invariant that broke, with how often it did and when first, and what was drawn then: with any, it ends
//! with 1.

#![expect(clippy::print_stdout, reason = "its figures are its result")]

mod hostile;
mod seen;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use e2e_cloud::cluster::TOKEN;
use e2e_cloud::process::raise_file_limit;
use e2e_cloud::{Client, Cluster, Engine, Options};
use fastrand::Rng;
use pool_registry_types::node::Liveness;
use pool_registry_types::view::{ClusterView, NodeView};
use serde_json::Value;
use tokio::task::JoinSet;

use crate::hostile::{Attack, Target};
use crate::seen::{Record, open_files, resident_mib, threads};

/// Connections that the control plane may have; the hostile ones want more.
const MOST_CONNECTIONS: usize = 512;
/// Files that it has open beside them: its links and calls to nodes, and connections that have made room and
/// are not closed yet (on a busy machine some hundred and more).
const OTHER_FILES: usize = 512;
const MOST_THREADS: usize = 160;
/// What the settings of a daemon allow, bytes. Defaults.
const QUEUE_BYTES: f64 = (128 << 20) as f64;
const LIVE_LOG_BYTES: f64 = (256 << 20) as f64;
/// How far streams that run may go beyond, once no new task is taken.
const LIVE_LOG_SPARE: f64 = (64 << 20) as f64;
/// How long an honest request may take, tries of it that were closed in front of an answer included, before it
/// counts as not answered.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause before a request is tried again whose connection was closed.
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(50);
const TRIES: u32 = 20;
const LOOK_EVERY: Duration = Duration::from_secs(1);
const SAY_EVERY: Duration = Duration::from_secs(10);
/// Kinds of hostile peers at a time.
const LANES: u64 = 3;
/// How long it may take until everything is as it was, once all hostile peers are gone.
const RECOVERS_WITHIN: Duration = Duration::from_secs(60);
/// Of the nodes of our own the first ones are honest, and the last one's engine is hostile.
const HONEST_NODES: usize = 2;
/// Tokens of the file, by whom they stand for.
pub(crate) const INVENTORS_TOKEN: &str = "test-token-of-an-inventor-of-nodes";
pub(crate) const READERS_TOKEN: &str = "test-token-of-a-reader";

/// Lets hostile and honest peers loose on both daemons.
#[derive(Debug, Parser)]
struct Arguments {
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[arg(long, default_value_t = 2)]
    minutes: u64,
    /// Resident memory that a daemon may have at any time, MiB. With defaults, where all bounds are filled.
    #[arg(long, default_value_t = 500)]
    most_mib: u64,
    /// The kinds of hostile peers, instead of those that are drawn: by their names, as it prints them.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Arguments { seed, minutes, most_mib, only } = Arguments::parse();
    raise_file_limit();
    let attacks: Vec<Attack> =
        Attack::all().into_iter().filter(|attack| only.is_empty() || only.contains(&attack.name())).collect();
    if attacks.is_empty() {
        let names: Vec<String> = Attack::all().iter().map(Attack::name).collect();
        println!("there are: {}", names.join(", "));
        return ExitCode::FAILURE;
    }
    let folder = tempfile::tempdir().expect("a folder for the tokens");
    let cluster = start(folder.path()).await;
    let record = Record::new();
    println!("seed {seed}, {minutes} minutes, {} kinds of hostile peers", attacks.len());
    let end = Instant::now() + Duration::from_secs(minutes * 60);
    let target = Target {
        control: cluster.port,
        node: cluster.nodes[0].port,
        handoffs: cluster.nodes[HONEST_NODES].runtime_dir.clone(),
    };
    let mut running = JoinSet::new();
    for lane in 0..LANES {
        let random = Rng::with_seed(seed.wrapping_mul(LANES).wrapping_add(lane));
        running.spawn(hurt(attacks.clone(), target.clone(), random, record.clone(), end));
    }
    for _ in 0..4 {
        running.spawn(run_tasks(cluster.client.clone(), cluster.task(20), record.clone(), end));
    }
    running.spawn(look(cluster.client.clone(), record.clone(), end));
    watch(&cluster, &record, most_mib, end).await;
    while let Some(ended) = running.join_next().await {
        if let Err(error) = ended {
            record.broke(format!("a peer of the soak has failed: {error}"));
        }
    }
    recover(&cluster, &record).await;
    record.finish(seed)
}

/// Both daemons with defaults but for the number of connections, and one node more with no engine yet.
async fn start(folder: &std::path::Path) -> Cluster {
    let tokens = folder.join("tokens.toml");
    let entry = |(name, token, scope)| {
        format!("[[token]]\nname = \"{name}\"\ntoken = \"{token}\"\nscopes = [\"{scope}\"]\n")
    };
    let entries = [
        ("operator", TOKEN, "admin"),
        ("inventor", INVENTORS_TOKEN, "node"),
        ("reader", READERS_TOKEN, "client"),
    ];
    std::fs::write(&tokens, entries.map(entry).concat()).expect("the tokens can be written");
    let control = vec![
        ("LLORCH_API_TOKEN_FILE", tokens.display().to_string()),
        ("ORCHESTRATORD_MAX_CONNECTIONS", MOST_CONNECTIONS.to_string()),
        // Those of the journeys are shorter than the defaults.
        ("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "10".to_owned()),
        ("ORCHESTRATORD_NODE_TIMEOUT_SECS", "30".to_owned()),
        ("LLORCH_LOG", "error".to_owned()),
    ];
    let engine = Engine::Fake { slots: 16, first_token_ms: 20, pace_ms: 2, dialect: "llamacpp" };
    let mut cluster =
        Cluster::start(Options { nodes: HONEST_NODES, engine, control, ..Options::default() }).await;
    cluster.prepare_node(HONEST_NODES);
    cluster.start_daemon(HONEST_NODES);
    cluster
}

/// Kinds of hostile peers one after the other, as they are drawn.
async fn hurt(attacks: Vec<Attack>, target: Target, mut random: Rng, record: Record, end: Instant) {
    while Instant::now() < end {
        let attack = attacks[random.usize(..attacks.len())];
        let span = Duration::from_millis(random.u64(2_000..6_000));
        let until = (Instant::now() + span).min(end);
        let running = record.begins(attack.name());
        if let Some(bytes) = attack.run(&target, random.fork(), until).await {
            record.sent(attack.name(), bytes);
        }
        drop(running);
    }
}

/// Runs tasks one after the other: each completes, and its stream is whole.
async fn run_tasks(client: Client, task: Value, record: Record, end: Instant) {
    while Instant::now() < end {
        run_task(&client, &task, &record).await;
    }
}

async fn run_task(client: &Client, task: &Value, record: &Record) {
    for _ in 0..TRIES {
        let (client, task) = (client.clone(), task.clone());
        let checked = tokio::spawn(async move {
            let transcript = client.run(task).await;
            let is_answered = transcript.status != 0;
            if is_answered {
                transcript.check();
            }
            (is_answered, transcript)
        });
        match checked.await {
            Ok((false, _)) => {
                // Its connection was a stranger's, and has made room before its request was read.
                record.tried_again();
                tokio::time::sleep(TRY_AGAIN_AFTER).await;
            }
            Ok((true, transcript)) if transcript.completed() => return record.task(transcript.took),
            Ok((true, transcript)) => {
                let code = transcript.error().unwrap_or("no end").to_owned();
                return record.broke(format!("an honest task ends with {code}"));
            }
            Err(_) => return record.broke("an honest task has no whole stream, see above"),
        }
    }
    record.broke("an honest task is not answered");
}

/// Looks at the cluster, each time on a connection of its own: it is answered, and shows our nodes live.
async fn look(client: Client, record: Record, end: Instant) {
    while Instant::now() < end {
        let start = Instant::now();
        let mut tries = 0;
        let seen = loop {
            tries += 1;
            match nodes(&client).await {
                Ok(nodes) => break Ok(nodes),
                Err(why) if start.elapsed() >= PATIENCE => break Err(why),
                Err(_) => record.tried_again(),
            }
            tokio::time::sleep(TRY_AGAIN_AFTER).await;
        };
        match seen {
            Ok(nodes) => {
                record.answered(start.elapsed());
                let live = |node: &&NodeView| {
                    node.node_id.as_str().starts_with("gpu-node-") && node.liveness != Liveness::Offline
                };
                if nodes.iter().filter(live).count() < HONEST_NODES {
                    record.broke("a node of ours is offline");
                }
            }
            Err(why) => {
                println!("try {tries} of a look: {why}");
                record.broke("an honest request is not answered");
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The list of nodes on a connection of its own, or what there was instead of it.
async fn nodes(client: &Client) -> Result<Vec<NodeView>, String> {
    let fresh = Client::new(&client.base, client.token.as_deref());
    let asked = async {
        let response = fresh.get("/v2/nodes").await.map_err(|error| format!("{error:?}"))?;
        let status = response.status();
        let body = response.bytes().await.map_err(|error| format!("{status}, then {error:?}"))?;
        serde_json::from_slice::<ClusterView>(&body).map(|view| view.nodes).map_err(|error| {
            let start = String::from_utf8_lossy(&body[..body.len().min(300)]).into_owned();
            format!("{status}, {} bytes: {error}: {start}", body.len())
        })
    };
    let answer = tokio::time::timeout(PATIENCE, asked).await;
    answer.unwrap_or_else(|_| Err(format!("nothing for {} s", PATIENCE.as_secs())))
}

/// The daemons with their process ids.
fn daemons(cluster: &Cluster) -> Vec<(String, u32)> {
    let control = cluster.control.as_ref().map(|process| ("orchestratord".to_owned(), process.pid()));
    let daemon = |node: &e2e_cloud::cluster::Node| Some((node.id.clone(), node.daemon.as_ref()?.pid()));
    control.into_iter().chain(cluster.nodes.iter().filter_map(daemon)).collect()
}

/// A value of the control plane's metrics; nothing where they are not answered.
async fn metric(client: &Client, name: &str) -> Option<f64> {
    let page = tokio::time::timeout(PATIENCE, client.get("/metrics")).await.ok()?.ok()?.text().await.ok()?;
    let line = page.lines().find(|line| line.starts_with(name))?;
    line.rsplit_once(' ')?.1.parse().ok()
}

/// Looks at what the daemons hold until the end.
async fn watch(cluster: &Cluster, record: &Record, most_mib: u64, end: Instant) {
    let mut reported = Instant::now();
    while Instant::now() < end {
        tokio::time::sleep(LOOK_EVERY).await;
        let mut now = Vec::new();
        for (name, pid) in daemons(cluster) {
            let Some(mib) = resident_mib(pid) else {
                record.broke(format!("{name} has ended"));
                continue;
            };
            let (files, threads) = (open_files(pid), threads(pid));
            now.push(format!("{name} {mib} MiB, {files} files"));
            record.holds(&name, mib, files, threads);
            if mib > most_mib {
                record.broke(format!("{name} has more than {most_mib} MiB"));
            }
            if files > MOST_CONNECTIONS + OTHER_FILES {
                record.broke(format!("{name} has more than {} files open", MOST_CONNECTIONS + OTHER_FILES));
            }
            if threads > MOST_THREADS {
                record.broke(format!("{name} has more than {MOST_THREADS} threads"));
            }
        }
        for (name, most) in
            [("llorch_queue_bytes", QUEUE_BYTES), ("llorch_live_log_bytes", LIVE_LOG_BYTES + LIVE_LOG_SPARE)]
        {
            // That there is an answer is looked at elsewhere.
            if metric(&cluster.client, name).await.is_some_and(|bytes| bytes > most) {
                record.broke(format!("{name} is above {most}"));
            }
        }
        if reported.elapsed() >= SAY_EVERY {
            reported = Instant::now();
            println!("{}: {}", now.join(", "), record.progress());
        }
    }
}

/// Looks whether everything is as it was before, once all hostile peers have gone.
async fn recover(cluster: &Cluster, record: &Record) {
    run_task(&cluster.client, &cluster.task(20), record).await;
    let start = Instant::now();
    let mut left = "nothing is answered".to_owned();
    while start.elapsed() < RECOVERS_WITHIN {
        let queued = metric(&cluster.client, "llorch_queue_bytes").await;
        let slots: u32 =
            cluster.client.nodes().await.iter().flat_map(|node| &node.pools).fold(0, |all, pool| {
                let honest =
                    pool.report.models.iter().any(|model| model.as_str() == cluster.options.engine.model());
                all + if honest { pool.slots_total.saturating_sub(pool.slots_free) } else { 0 }
            });
        if queued == Some(0.0) && slots == 0 {
            println!("as before after {} s", start.elapsed().as_secs());
            left.clear();
            break;
        }
        left = format!("{queued:?} bytes of requests and {slots} slots are still held");
        tokio::time::sleep(LOOK_EVERY).await;
    }
    if !left.is_empty() {
        record.broke(format!(
            "not as before {} s after all hostile peers have gone: {left}",
            RECOVERS_WITHIN.as_secs()
        ));
    }
    for (name, _) in daemons(cluster) {
        let text = std::fs::read_to_string(cluster.log(&name)).unwrap_or_default();
        for line in text.lines().filter(|line| line.contains("defect") || line.contains("panicked")) {
            record.broke(format!("{name} says: {line}"));
        }
    }
}
