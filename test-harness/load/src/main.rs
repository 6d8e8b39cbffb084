//! The benchmark: the two daemons beside HAProxy, or beside another build of theirs, in one run.
//!
//! Every figure that depends on the machine has its baseline in the same run: HAProxy before the same
//! engines, asked by the same client, and for times the engines alone. Repetitions alternate between
//! them; medians are printed. It reports and does not assess: only wrong answers make it fail.

#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

mod compare;
mod core;
mod cpu;
mod haproxy;
mod heartbeats;
mod http;
mod placement;
mod table;
mod train;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use e2e_cloud::{Cluster, Engine, Options};

use crate::compare::{Baseline, Comparison};
use crate::haproxy::HaProxy;
use crate::http::{Api, Caller};

const NODES: usize = 3;
/// Slots of each engine: more than the most clients.
const SLOTS: u32 = 1024;

/// Measures the added cost of both hops.
#[derive(Debug, Parser)]
struct Arguments {
    /// Repetitions of each measurement; the median is printed.
    #[arg(long, default_value_t = 3)]
    repetitions: usize,
    /// Seconds of each repetition. By default each has at least 60,000 tokens where the daemons serve
    /// 5,000 a second.
    #[arg(long, default_value_t = 12)]
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
    /// In which API the daemons are asked, and what they are compared with.
    #[arg(long, value_enum, default_value_t = Api::V2)]
    api: Api,
    /// The log of the daemons, as `LLORCH_LOG` says it: `info` has a line a task on each of them.
    #[arg(long, default_value = "warn")]
    log: String,
    /// Compare with our daemons of another build, which lie there, with their logs off, and not with HAProxy.
    #[arg(long)]
    beside: Option<PathBuf>,
    /// Measures nothing: each kind of request for so many seconds, and an end in order. What a profile of
    /// the build is taken from.
    #[arg(long)]
    train: bool,
    /// How many nodes, for `--core`.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 100, 1_000, 10_000])]
    nodes: Vec<usize>,
}

/// What is measured through both daemons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Measurement {
    /// Resident memory.
    Memory,
    Paced,
    /// Paced, and all streams at once.
    Steps,
    /// Without pace.
    Tokens,
    OneToken,
    FirstToken,
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
    if arguments.train {
        train::run(cluster(&arguments.log, None).await, arguments.seconds).await;
        return ExitCode::SUCCESS;
    }
    let is_wanted = |of| arguments.only.is_empty() || arguments.only.contains(&of);
    let wanted = Measurement::value_variants().iter().copied().filter(|of| is_wanted(*of));
    // All others are made beside something.
    let compared: Vec<Measurement> = wanted.filter(|of| *of != Measurement::Heartbeats).collect();
    let haproxy =
        match (!compared.is_empty() && arguments.beside.is_none()).then(haproxy::program).transpose() {
            Ok(program) => program,
            Err(why) => {
                eprintln!("{why}");
                return ExitCode::FAILURE;
            }
        };
    let cluster = cluster(&arguments.log, None).await;
    if let Some(program) = haproxy {
        let haproxy = HaProxy::start(&program, &engine_urls(&cluster), cluster.dir.path()).await;
        let url = std::slice::from_ref(&haproxy.url);
        let through = Caller::engines(url, arguments.api);
        compare(&arguments.comparison(&cluster, Baseline::HaProxy(&haproxy), through), &compared).await;
    }
    if let Some(folder) = arguments.beside.as_deref().filter(|_| !compared.is_empty()) {
        let other = self::cluster("off", Some(folder)).await;
        let through = of_cluster(&other, arguments.api);
        compare(&arguments.comparison(&cluster, Baseline::Build(&other), through), &compared).await;
    }
    if is_wanted(Measurement::Heartbeats) {
        heartbeats::measure(&cluster, &arguments.seconds).await;
    }
    ExitCode::SUCCESS
}

/// Three nodes with fake engines; the daemons are this build's, or lie in the folder.
async fn cluster(log: &str, folder: Option<&Path>) -> Cluster {
    let engine = Engine::Fake { slots: SLOTS, first_token_ms: 0, pace_ms: 0, dialect: "llamacpp" };
    let log = ("LLORCH_LOG", log.to_owned());
    let node = (0..NODES).map(|n| (n, log.0, log.1.clone())).collect();
    let control = vec![
        log,
        ("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "10".to_owned()),
        ("ORCHESTRATORD_NODE_TIMEOUT_SECS", "30".to_owned()),
    ];
    let control_program = folder.map(|folder| folder.join("orchestratord"));
    let node_program = folder.map(|folder| folder.join("pool-managerd"));
    let nodes = NODES;
    Cluster::start(Options {
        nodes,
        engine,
        control,
        node,
        control_program,
        node_program,
        ..Options::default()
    })
    .await
}

impl Arguments {
    fn comparison<'c>(
        &self,
        cluster: &'c Cluster,
        baseline: Baseline<'c>,
        through_baseline: Caller,
    ) -> Comparison<'c> {
        Comparison {
            cluster,
            baseline,
            api: self.api,
            bare: Caller::engines(&engine_urls(cluster), self.api),
            through_baseline,
            ours: of_cluster(cluster, self.api),
            repetitions: self.repetitions,
            seconds: self.seconds,
        }
    }
}

fn engine_urls(cluster: &Cluster) -> Vec<String> {
    (0..NODES).map(|n| cluster.engine_url(n)).collect()
}

fn of_cluster(cluster: &Cluster, api: Api) -> Caller {
    Caller::cluster(&cluster.client.base, e2e_cloud::cluster::TOKEN, api)
}

/// Makes these measurements and prints their table.
async fn compare(comparison: &Comparison<'_>, wanted: &[Measurement]) {
    let mut rows = Vec::new();
    for measurement in wanted {
        match measurement {
            Measurement::Memory => rows.extend(comparison.memory().await),
            Measurement::Paced => rows.push(comparison.paced(false).await),
            Measurement::Steps => rows.push(comparison.paced(true).await),
            Measurement::Tokens => rows.push(comparison.unpaced().await),
            Measurement::OneToken => rows.push(comparison.one_token().await),
            Measurement::FirstToken => {
                rows.extend(comparison.first_token(1, 0.12, 0.3).await);
                rows.extend(comparison.first_token(32, 0.30, 0.6).await);
            }
            Measurement::Heartbeats => {}
        }
    }
    rows.extend(comparison.longest_turns().await);
    table::print(comparison.baseline.name(), &rows);
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
