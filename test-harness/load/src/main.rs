//! The benchmark: the two daemons beside the bare fake engine, in one run.
//!
//! Every figure that depends on the machine has its baseline in the same run: the engine alone,
//! asked by the same client. Repetitions alternate between the two; medians are printed. It
//! reports and does not assess: only wrong answers make it fail.

#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

mod core;
mod cpu;
mod heartbeats;
mod http;
mod placement;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use e2e_cloud::{Cluster, Engine, Options};
use futures::future::join_all;
use serde_json::json;

use crate::http::{Caller, Seen};

/// Slots of the one engine: more than the most clients.
const SLOTS: u32 = 1024;

/// Measures the added cost of both hops.
#[derive(Debug, Parser)]
struct Arguments {
    /// Repetitions of each measurement; the median is printed.
    #[arg(long, default_value_t = 3)]
    repetitions: usize,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Only the burst of tasks over unequal nodes, strategy by strategy.
    #[arg(long)]
    placement: bool,
    /// Only the control core: what one event costs it, by the number of nodes.
    #[arg(long)]
    core: bool,
    /// Only these measurements of the daemons.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Measurement>,
    /// How many nodes, for `--core`.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 100, 1_000, 10_000])]
    nodes: Vec<usize>,
}

/// What is measured through both daemons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Measurement {
    Paced,
    FirstToken,
    OneToken,
    Tokens,
    Heartbeats,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    println!("{}", cpu::machine());
    if arguments.core {
        core::measure(&arguments.nodes);
        return ExitCode::SUCCESS;
    }
    if arguments.placement {
        placement::measure(arguments.repetitions).await;
        return ExitCode::SUCCESS;
    }
    let engine = Engine::Fake { slots: SLOTS, first_token_ms: 0, pace_ms: 0, dialect: "llamacpp" };
    let control = vec![
        ("LLORCH_LOG", "warn".to_owned()),
        ("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "10".to_owned()),
        ("ORCHESTRATORD_NODE_TIMEOUT_SECS", "30".to_owned()),
    ];
    let cluster = Cluster::start(Options { nodes: 1, engine, control, ..Options::default() }).await;
    let bare = Caller::engine(&cluster.engine_url(0));
    let ours = Caller::cluster(&cluster.client.base, e2e_cloud::cluster::TOKEN);
    let wanted = |of| arguments.only.is_empty() || arguments.only.contains(&of);
    // Before the load, whose ended tasks are kept for their readers.
    if wanted(Measurement::Paced) {
        let idle = memory(&cluster);
        let open = open_streams(&cluster, &ours, &arguments).await;
        for (daemon, idle, open) in [("orchestratord", idle.0, open.0), ("pool-managerd", idle.1, open.1)] {
            println!("resident memory, {daemon}: idle {idle:.1} MB, with 500 open streams {open:.1} MB");
        }
    }
    for clients in [1, 32].into_iter().filter(|_| wanted(Measurement::FirstToken)) {
        let added = first_tokens(&bare, &ours, clients, &arguments).await;
        println!(
            "added time to first token, {clients:>2} clients: p50 {:.2} ms, p99 {:.2} ms (bare engine: p50 {:.2} ms, p99 {:.2} ms)",
            added.p50_ms, added.p99_ms, added.bare_p50_ms, added.bare_p99_ms
        );
    }
    if wanted(Measurement::OneToken) {
        one_token_tasks(&cluster, &bare, &ours, &arguments).await;
    }
    if wanted(Measurement::Tokens) {
        tokens(&cluster, &bare, &ours, &arguments).await;
    }
    if wanted(Measurement::Heartbeats) {
        heartbeats::measure(&cluster, &arguments.seconds).await;
    }
    ExitCode::SUCCESS
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn quantile(sorted: &[f64], permille: usize) -> f64 {
    sorted
        .get((sorted.len() * permille / 1000).min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or(f64::NAN)
}

struct Added {
    p50_ms: f64,
    p99_ms: f64,
    bare_p50_ms: f64,
    bare_p99_ms: f64,
}

async fn first_tokens(bare: &Caller, ours: &Caller, clients: usize, arguments: &Arguments) -> Added {
    let (mut p50, mut p99, mut bare50, mut bare99) = (vec![], vec![], vec![], vec![]);
    for _ in 0..arguments.repetitions {
        let base = sample(bare, clients, 1, arguments.seconds).await;
        let full = sample(ours, clients, 1, arguments.seconds).await;
        let of = |seen: &[Seen], permille| {
            let mut all: Vec<f64> = seen.iter().map(|s| s.first_token.as_secs_f64() * 1e3).collect();
            all.sort_by(f64::total_cmp);
            quantile(&all, permille)
        };
        bare50.push(of(&base, 500));
        bare99.push(of(&base, 990));
        p50.push(of(&full, 500) - of(&base, 500));
        p99.push(of(&full, 990) - of(&base, 990));
    }
    Added {
        p50_ms: median(p50),
        p99_ms: median(p99),
        bare_p50_ms: median(bare50),
        bare_p99_ms: median(bare99),
    }
}

/// Runs `clients` callers one request after another for some seconds.
async fn sample(caller: &Caller, clients: usize, tokens: u32, seconds: u64) -> Vec<Seen> {
    let end = Instant::now() + Duration::from_secs(seconds);
    let runs = (0..clients).map(|_| {
        let caller = caller.clone();
        tokio::spawn(async move {
            let mut all = Vec::new();
            while Instant::now() < end {
                all.push(caller.run(tokens).await);
            }
            all
        })
    });
    join_all(runs).await.into_iter().flat_map(|run| run.expect("a client does not panic")).collect()
}

async fn one_token_tasks(cluster: &Cluster, bare: &Caller, ours: &Caller, arguments: &Arguments) {
    let (mut base, mut full, mut control, mut node) = (vec![], vec![], vec![], vec![]);
    for _ in 0..arguments.repetitions {
        let start = Instant::now();
        base.push(sample(bare, 64, 1, arguments.seconds).await.len() as f64 / start.elapsed().as_secs_f64());
        let (before, start) = (cpu_of(cluster), Instant::now());
        let tasks = sample(ours, 64, 1, arguments.seconds).await.len() as f64;
        full.push(tasks / start.elapsed().as_secs_f64());
        let after = cpu_of(cluster);
        control.push((after.0 - before.0).as_secs_f64() * 1e6 / tasks);
        node.push((after.1 - before.1).as_secs_f64() * 1e6 / tasks);
    }
    let (base, full) = (median(base), median(full));
    println!(
        "one-token tasks, 64 clients: {full:.0}/s (bare engine {base:.0}/s, ratio {:.2}); CPU a task: orchestratord {:.0} µs, pool-managerd {:.0} µs",
        full / base,
        median(control),
        median(node)
    );
}

async fn tokens(cluster: &Cluster, bare: &Caller, ours: &Caller, arguments: &Arguments) {
    const TOKENS: u32 = 256;
    let (mut base, mut full, mut control, mut node) = (vec![], vec![], vec![], vec![]);
    let count = |seen: &[Seen]| seen.iter().map(|s| s.tokens as f64).sum::<f64>();
    for _ in 0..arguments.repetitions {
        let start = Instant::now();
        base.push(count(&sample(bare, 64, TOKENS, arguments.seconds).await) / start.elapsed().as_secs_f64());
        let (before, start) = (cpu_of(cluster), Instant::now());
        let tokens = count(&sample(ours, 64, TOKENS, arguments.seconds).await);
        full.push(tokens / start.elapsed().as_secs_f64());
        let after = cpu_of(cluster);
        control.push((after.0 - before.0).as_secs_f64() * 1e6 / tokens);
        node.push((after.1 - before.1).as_secs_f64() * 1e6 / tokens);
    }
    let (base, full) = (median(base), median(full));
    println!(
        "tokens, 64 streams of {TOKENS}: {full:.0}/s (bare engine {base:.0}/s, ratio {:.2}); CPU a token: orchestratord {:.2} µs, pool-managerd {:.2} µs",
        full / base,
        median(control),
        median(node)
    );
}

/// What 500 streams of 10 tokens a second cost. Returns both daemons' resident memory while they are
/// open, in MB.
async fn open_streams(cluster: &Cluster, ours: &Caller, arguments: &Arguments) -> (f64, f64) {
    cluster.fault(0, json!({"kind": "slow", "pace_ms": 100})).await;
    let repetitions = u64::try_from(arguments.repetitions).expect("a small number");
    // Long enough for all measurements, what comes before and a machine that is slow.
    let tokens = u32::try_from((repetitions * arguments.seconds + 25) * 10).expect("minutes at most");
    let runs: Vec<_> = (0..500)
        .map(|_| {
            let ours = ours.clone();
            tokio::spawn(async move { ours.run(tokens).await })
        })
        .collect();
    e2e_cloud::eventually("500 streams are open", Duration::from_secs(20), || async {
        let node = cluster.client.node("gpu-node-1").await?;
        (node.running_attempts.len() >= 500).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let memory = memory(cluster);
    let (mut control, mut node, mut pace) = (vec![], vec![], vec![]);
    for _ in 0..arguments.repetitions {
        let (before, seen, start) = (cpu_of(cluster), ours.tokens_seen(), Instant::now());
        tokio::time::sleep(Duration::from_secs(arguments.seconds)).await;
        let after = cpu_of(cluster);
        let seen = (ours.tokens_seen() - seen) as f64;
        control.push((after.0 - before.0).as_secs_f64() * 1e6 / seen);
        node.push((after.1 - before.1).as_secs_f64() * 1e6 / seen);
        pace.push(seen / start.elapsed().as_secs_f64());
    }
    println!(
        "paced tokens, 500 streams of 10 a second: {:.0}/s; CPU a token: orchestratord {:.1} µs, pool-managerd {:.1} µs",
        median(pace),
        median(control),
        median(node)
    );
    let expected = usize::try_from(tokens).expect("a small number");
    for run in runs {
        assert_eq!(run.await.expect("a client does not panic").tokens, expected);
    }
    cluster.fault(0, json!({"kind": "none"})).await;
    memory
}

fn daemons(cluster: &Cluster) -> (u32, u32) {
    let control = cluster.control.as_ref().expect("a running control plane").pid();
    let node = cluster.nodes[0].daemon.as_ref().expect("a running node").pid();
    (control, node)
}

fn cpu_of(cluster: &Cluster) -> (Duration, Duration) {
    let (control, node) = daemons(cluster);
    (cpu::time_of(control), cpu::time_of(node))
}

fn memory(cluster: &Cluster) -> (f64, f64) {
    let (control, node) = daemons(cluster);
    (cpu::resident_mb(control), cpu::resident_mb(node))
}
