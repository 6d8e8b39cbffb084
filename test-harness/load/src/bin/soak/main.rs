//! The soak: both daemons with hostile and honest peers side by side, for as long as one likes.
//!
//! Hostile ones fill whatever a peer can fill (`hostile.rs`); honest ones run tasks and look at the
//! cluster meanwhile. What it draws follows from its seed; when what happens, does not. It prints memory and
//! the times of honest requests, and each invariant that broke, with how often it did and when first:
//! with any, it ends with 1.

#![expect(clippy::print_stdout, reason = "its figures are its result")]

mod hostile;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Parser;
use e2e_cloud::cluster::TOKEN;
use e2e_cloud::{Client, Cluster, Engine, Options};
use pool_registry_types::node::Liveness;
use tokio::task::JoinSet;

use crate::hostile::{HOSTILE, Target};

/// Resident memory that a daemon may have at any time, MiB. With defaults, where all bounds are filled.
const MOST_MIB: u64 = 500;
/// Connections that the control plane may have; the hostile ones want more.
const MOST_CONNECTIONS: usize = 512;
/// How long an honest request may take before it counts as not answered.
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_secs(1);
const SAY_EVERY: Duration = Duration::from_secs(10);
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
}

/// What was seen so far.
#[derive(Debug)]
struct Seen {
    begun: Instant,
    broken: BTreeMap<String, (u64, Duration)>,
    /// Of honest requests, milliseconds.
    took: Vec<u128>,
    tasks: u64,
    /// By the daemons' names.
    most_mib: BTreeMap<String, u64>,
}

/// The same for all who see.
#[derive(Debug, Clone)]
struct Record(Arc<Mutex<Seen>>);

impl Record {
    fn with<T>(&self, change: impl FnOnce(&mut Seen) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn broke(&self, what: impl Into<String>) {
        self.with(|seen| {
            let since = seen.begun.elapsed();
            seen.broken.entry(what.into()).or_insert((0, since)).0 += 1;
        });
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let Arguments { seed, minutes } = Arguments::parse();
    let folder = tempfile::tempdir().expect("a folder for the tokens");
    let tokens = folder.path().join("tokens.toml");
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
        ("LLORCH_LOG", "error".to_owned()),
    ];
    let engine = Engine::Fake { slots: 16, first_token_ms: 20, pace_ms: 2, dialect: "llamacpp" };
    let cluster = Cluster::start(Options { nodes: 2, engine, control, ..Options::default() }).await;
    let record = Record(Arc::new(Mutex::new(Seen {
        begun: Instant::now(),
        broken: BTreeMap::new(),
        took: Vec::new(),
        tasks: 0,
        most_mib: BTreeMap::new(),
    })));
    println!("seed {seed}, {minutes} minutes, {} kinds of hostile peers", HOSTILE.len());
    let end = Instant::now() + Duration::from_secs(minutes * 60);
    let mut running = JoinSet::new();
    let target = Target { control: cluster.port, node: cluster.nodes[0].port };
    for (n, (_, attack)) in HOSTILE.into_iter().enumerate() {
        let mut random = fastrand::Rng::with_seed(seed.wrapping_mul(1_000).wrapping_add(n as u64));
        running.spawn(async move {
            while Instant::now() < end {
                attack(target, random.fork()).await;
            }
        });
    }
    for _ in 0..4 {
        running.spawn(run_tasks(cluster.client.clone(), cluster.task(20), record.clone(), end));
    }
    running.spawn(look(cluster.client.clone(), record.clone(), end));
    watch(&cluster, &record, end).await;
    while let Some(ended) = running.join_next().await {
        if let Err(error) = ended {
            record.broke(format!("a peer of the soak has failed: {error}"));
        }
    }
    // What hostile peers have left does not keep honest ones out afterwards.
    let transcript = cluster.client.run(cluster.task(20)).await;
    if !transcript.completed() {
        record.broke("no task completes after all hostile peers have gone");
    }
    finish(&record)
}

/// Runs tasks one after the other: each completes, and its stream is whole.
async fn run_tasks(client: Client, task: serde_json::Value, record: Record, end: Instant) {
    while Instant::now() < end {
        let (client, task) = (client.clone(), task.clone());
        let checked = tokio::spawn(async move {
            let transcript = client.run(task).await;
            transcript.check();
            transcript
        });
        match checked.await {
            Ok(transcript) if transcript.completed() => record.with(|seen| seen.tasks += 1),
            Ok(transcript) => {
                let code = transcript.error().unwrap_or("no end").to_owned();
                record.broke(format!("an honest task ends with {code}"));
            }
            Err(_) => record.broke("an honest task has no whole stream, see above"),
        }
    }
}

/// Looks at the cluster, each time on a connection of its own: it is answered, and shows our nodes live.
async fn look(client: Client, record: Record, end: Instant) {
    while Instant::now() < end {
        let fresh = Client::new(&client.base, client.token.as_deref());
        let start = Instant::now();
        match tokio::time::timeout(PATIENCE, fresh.nodes()).await {
            Ok(nodes) if !nodes.is_empty() => {
                record.with(|seen| seen.took.push(start.elapsed().as_millis()));
                let live = |node: &&pool_registry_types::view::NodeView| {
                    node.node_id.as_str().starts_with("gpu-node-") && node.liveness != Liveness::Offline
                };
                if nodes.iter().filter(live).count() < 2 {
                    record.broke("a node of ours is offline");
                }
            }
            _ => record.broke("an honest request is not answered"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Looks at the daemons' memory until the end.
async fn watch(cluster: &Cluster, record: &Record, end: Instant) {
    let mut reported = Instant::now();
    while Instant::now() < end {
        tokio::time::sleep(LOOK_EVERY).await;
        let mut now = Vec::new();
        let control = cluster.control.as_ref().map(|process| ("orchestratord".to_owned(), process.pid()));
        let daemon = |node: &e2e_cloud::cluster::Node| Some((node.id.clone(), node.daemon.as_ref()?.pid()));
        for (name, pid) in control.into_iter().chain(cluster.nodes.iter().filter_map(daemon)) {
            let Some(mib) = resident_mib(pid) else {
                record.broke(format!("{name} has ended"));
                continue;
            };
            now.push(format!("{name} {mib} MiB"));
            record.with(|seen| {
                let most = seen.most_mib.entry(name.clone()).or_default();
                *most = (*most).max(mib);
            });
            if mib > MOST_MIB {
                record.broke(format!("{name} has more than {MOST_MIB} MiB"));
            }
        }
        if reported.elapsed() >= SAY_EVERY {
            reported = Instant::now();
            let (tasks, asked) = record.with(|seen| (seen.tasks, seen.took.len()));
            println!("{}: {tasks} tasks, {asked} requests", now.join(", "));
        }
    }
}

/// Nothing where the process has gone.
fn resident_mib(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? / 1024)
}

fn finish(record: &Record) -> ExitCode {
    record.with(|seen| {
        seen.took.sort_unstable();
        let p99 = seen.took.get(seen.took.len() * 99 / 100).copied().unwrap_or_default();
        for (name, most) in &seen.most_mib {
            println!("{name}: at most {most} MiB");
        }
        println!("honest: {} tasks, {} requests, p99 {p99} ms", seen.tasks, seen.took.len());
        if seen.tasks == 0 || seen.took.is_empty() {
            seen.broken.insert("no honest peer was served".into(), (1, seen.begun.elapsed()));
        }
        for (what, (times, first)) in &seen.broken {
            println!("BROKEN: {what}: {times} times, first after {} s", first.as_secs());
        }
        if seen.broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    })
}
