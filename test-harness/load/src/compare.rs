//! Both hops of ours beside HAProxy's one hop over the same three fake engines, or beside those of another
//! build over engines of their own.
//!
//! Repetitions alternate within one run, because only figures of one run compare; medians are shown. CPU
//! is that of HAProxy, or of all daemons together, as the kernel counts it. The targets are printed
//! beside the figures and judge nothing.

use std::time::{Duration, Instant};

use e2e_cloud::{Client, Cluster, eventually};
use futures::future::join_all;
use serde_json::json;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval_at};

use crate::haproxy::HaProxy;
use crate::http::{Api, Caller, Seen};
use crate::table::{Row, Target};
use crate::{cpu, median, quantile};

/// Streams of the paced measurements, and what each is given a second.
pub(crate) const STREAMS: usize = 500;
pub(crate) const TOKENS_PER_SECOND: u32 = 10;
pub(crate) const PACE_MS: u32 = 1_000 / TOKENS_PER_SECOND;
/// What the streams of a paced measurement last beyond it: they are opened before and closed after.
const MARGIN_SECONDS: u64 = 10;
/// Clients of the measurements without pace.
pub(crate) const CLIENTS: usize = 64;
/// Tokens of a stream without pace.
pub(crate) const LONG: u32 = 256;
/// Where times are measured, each client asks so often: clients that ask without a pause would measure
/// how long they wait for a processor.
const ASKS_EVERY: Duration = Duration::from_millis(20);
/// How long one-token requests run before the memory is looked at again.
const MEMORY_SECONDS: u64 = 60;

/// Which way a request takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Via {
    Baseline,
    Ours,
}

/// What ours is compared with.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Baseline<'c> {
    HaProxy(&'c HaProxy),
    /// Our daemons of another build, whose logs are off.
    Build(&'c Cluster),
}

impl Baseline<'_> {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::HaProxy(_) => "HAProxy",
            Self::Build(_) => "the other build",
        }
    }
}

/// Everything that one run compares.
pub(crate) struct Comparison<'c> {
    pub(crate) cluster: &'c Cluster,
    pub(crate) baseline: Baseline<'c>,
    pub(crate) api: Api,
    /// The engines themselves, taken in turn.
    pub(crate) bare: Caller,
    pub(crate) through_baseline: Caller,
    pub(crate) ours: Caller,
    pub(crate) repetitions: usize,
    pub(crate) seconds: u64,
}

/// CPU time spent; HAProxy is one process, ours are the control plane and the nodes.
#[derive(Debug, Clone, Copy)]
struct Spent {
    control: Duration,
    nodes: Duration,
}

/// What one repetition has cost.
#[derive(Debug, Clone, Copy)]
struct Cost {
    /// Microseconds of CPU a token, or a request.
    control: f64,
    nodes: f64,
    /// Tokens, or requests, a second.
    rate: f64,
    /// Tokens, or requests.
    count: f64,
}

/// The repetitions of one way.
#[derive(Debug, Default)]
struct Costs(Vec<Cost>);

impl Costs {
    fn median(&self, of: impl Fn(&Cost) -> f64) -> f64 {
        median(self.0.iter().map(of).collect())
    }

    fn all(&self) -> f64 {
        self.median(|cost| cost.control + cost.nodes)
    }
}

impl Comparison<'_> {
    fn caller(&self, via: Via) -> &Caller {
        match via {
            Via::Baseline => &self.through_baseline,
            Via::Ours => &self.ours,
        }
    }

    fn spent(&self, via: Via) -> Spent {
        let cluster = match (via, self.baseline) {
            (Via::Baseline, Baseline::HaProxy(haproxy)) => {
                return Spent { control: cpu::time_of(haproxy.pid()), nodes: Duration::ZERO };
            }
            (Via::Baseline, Baseline::Build(cluster)) => cluster,
            (Via::Ours, _) => self.cluster,
        };
        let (control, nodes) = daemons(cluster);
        Spent { control: cpu::time_of(control), nodes: nodes.map(cpu::time_of).sum() }
    }

    /// What `before` and the present moment lie apart, for each of `count`.
    fn cost(&self, via: Via, before: Spent, start: Instant, count: f64) -> Cost {
        let after = self.spent(via);
        let each = |before: Duration, after: Duration| (after - before).as_secs_f64() * 1e6 / count;
        Cost {
            control: each(before.control, after.control),
            nodes: each(before.nodes, after.nodes),
            rate: count / start.elapsed().as_secs_f64(),
            count,
        }
    }

    async fn fault(&self, fault: serde_json::Value) {
        let other = match self.baseline {
            Baseline::HaProxy(_) => None,
            Baseline::Build(cluster) => Some(cluster),
        };
        for cluster in [Some(self.cluster), other].into_iter().flatten() {
            of_all_engines(cluster, &fault).await;
        }
    }

    /// What ours is to be at most: so many times HAProxy's, or so many µs more than without metrics and logs.
    fn target(&self, times: [f64; 2], more: f64) -> Target {
        match (self.baseline, self.api) {
            (Baseline::Build(_), _) => Target::Above(more),
            (Baseline::HaProxy(_), Api::V2) => Target::Ratio(times[0]),
            (Baseline::HaProxy(_), Api::V1) => Target::Ratio(times[1]),
        }
    }

    /// Prints what both have cost, and gives the row.
    fn row(&self, what: &str, unit: &str, baseline: &Costs, ours: &Costs, target: Target) -> Row {
        println!(
            "{what}: {} {:.0}/s; ours {:.0}/s, of the CPU orchestratord {:.2} µs, the nodes {:.2} µs; {:.0} {} each",
            self.baseline.name(),
            baseline.median(|cost| cost.rate),
            ours.median(|cost| cost.rate),
            ours.median(|cost| cost.control),
            ours.median(|cost| cost.nodes),
            ours.0.iter().map(|cost| cost.count).sum::<f64>(),
            unit.trim_start_matches("a ").to_owned() + "s",
        );
        Row::new(format!("{what}, CPU µs {unit}"), ours.all(), baseline.all(), target)
    }

    /// 500 streams of 10 tokens a second: each at its own moments, or all at once.
    pub(crate) async fn paced(&self, in_steps: bool) -> Row {
        let kind = if in_steps { "steps" } else { "slow" };
        self.fault(json!({"kind": kind, "pace_ms": PACE_MS})).await;
        let measured = self.alternating(async |via| {
            let streams = self.open(via, self.seconds).await;
            let caller = self.caller(via);
            let (before, seen, start) = (self.spent(via), caller.tokens_seen(), Instant::now());
            tokio::time::sleep(Duration::from_secs(self.seconds)).await;
            let cost = self.cost(via, before, start, (caller.tokens_seen() - seen) as f64);
            assert!(!streams.iter().any(JoinHandle::is_finished), "a stream ended while it was measured");
            close(streams).await;
            cost
        });
        let (baseline, ours) = measured.await;
        self.fault(json!({"kind": "none"})).await;
        let (what, times) = if in_steps { ("paced in steps", [1.4, 1.4]) } else { ("paced", [1.6, 1.7]) };
        let what = format!("{what}, {STREAMS} x {TOKENS_PER_SECOND} tokens/s");
        self.row(&what, "a token", &baseline, &ours, self.target(times, 2.0))
    }

    /// Opens the paced streams, and returns when each has brought its first token.
    async fn open(&self, via: Via, seconds: u64) -> Vec<JoinHandle<Seen>> {
        let caller = self.caller(via);
        let tokens = u32::try_from(seconds + MARGIN_SECONDS).expect("minutes at most") * TOKENS_PER_SECOND;
        let begun = caller.streams_begun();
        let streams = (0..STREAMS).map(|_| {
            let caller = caller.clone();
            tokio::spawn(async move { caller.run(tokens).await })
        });
        let streams = streams.collect();
        eventually("all streams are open", Duration::from_secs(20), || async {
            (caller.streams_begun() - begun >= STREAMS as u64).then_some(())
        })
        .await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        streams
    }

    /// 64 streams of 256 tokens, one after another and without pace.
    pub(crate) async fn unpaced(&self) -> Row {
        let count = |seen: &[Seen]| seen.iter().map(|seen| seen.tokens as f64).sum();
        let (baseline, ours) = self.loaded(LONG, count).await;
        let target = self.target([4.0, 4.5], 0.1);
        self.row(&format!("unpaced, {CLIENTS} x {LONG}"), "a token", &baseline, &ours, target)
    }

    /// Requests of one token by 64 clients.
    pub(crate) async fn one_token(&self) -> Row {
        let (baseline, ours) = self.loaded(1, |seen| seen.len() as f64).await;
        let target = self.target([3.4, 3.8], 12.0);
        self.row(&format!("one-token requests, {CLIENTS} clients"), "a request", &baseline, &ours, target)
    }

    async fn loaded(&self, tokens: u32, count: impl Fn(&[Seen]) -> f64) -> (Costs, Costs) {
        let measured = self.alternating(async |via| {
            let (before, start) = (self.spent(via), Instant::now());
            let seen = sample(self.caller(via), CLIENTS, tokens, self.seconds).await;
            self.cost(via, before, start, count(&seen))
        });
        measured.await
    }

    /// All repetitions of one measurement, the baseline's and ours in turn.
    async fn alternating(&self, measure: impl AsyncFn(Via) -> Cost) -> (Costs, Costs) {
        let (mut baseline, mut ours) = (Costs::default(), Costs::default());
        for _ in 0..self.repetitions {
            baseline.0.push(measure(Via::Baseline).await);
            ours.0.push(measure(Via::Ours).await);
        }
        (baseline, ours)
    }

    /// What is added to the engines' own time to the first token: p50 and p99.
    pub(crate) async fn first_token(&self, clients: usize, p50_ms: f64, p99_above_ms: f64) -> [Row; 2] {
        let (mut bare, mut baseline, mut ours) = (vec![], vec![], vec![]);
        for _ in 0..self.repetitions {
            let base = self.quantiles(&self.bare, clients).await;
            bare.push(base);
            baseline.push(self.quantiles(&self.through_baseline, clients).await.above(base));
            ours.push(self.quantiles(&self.ours, clients).await.above(base));
        }
        let of = |all: &[Quantiles], which: fn(&Quantiles) -> f64| median(all.iter().map(which).collect());
        println!(
            "time to first token of the bare engines, {clients} clients: p50 {:.2} ms, p99 {:.2} ms",
            of(&bare, |q| q.p50_ms),
            of(&bare, |q| q.p99_ms)
        );
        let name = |which: &str| format!("added time to first token, {clients} clients, {which}, ms");
        let p50 = (of(&ours, |q| q.p50_ms), of(&baseline, |q| q.p50_ms));
        let p99 = (of(&ours, |q| q.p99_ms), of(&baseline, |q| q.p99_ms));
        [
            Row::new(name("p50"), p50.0, p50.1, Target::Most(p50_ms)),
            Row::new(name("p99"), p99.0, p99.1, Target::Above(p99_above_ms)),
        ]
    }

    /// Clients that ask for one token each 20 ms, each at its own moments.
    async fn quantiles(&self, caller: &Caller, clients: usize) -> Quantiles {
        let begin = tokio::time::Instant::now();
        let end = begin + Duration::from_secs(self.seconds);
        let share = ASKS_EVERY / u32::try_from(clients).expect("a few clients");
        let runs = (0_u32..).take(clients).map(|n| {
            let caller = caller.clone();
            tokio::spawn(async move {
                let mut asks = interval_at(begin + share * n, ASKS_EVERY);
                asks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                let mut all = Vec::new();
                while asks.tick().await < end {
                    all.push(caller.run(1).await);
                }
                all
            })
        });
        Quantiles::of(&joined(runs).await)
    }

    /// Resident memory of each daemon: idle, with 500 open streams, after a minute of one-token requests.
    /// First of all measurements, because ended tasks are kept for their readers.
    pub(crate) async fn memory(&self) -> Vec<Row> {
        let mut rows = self.resident("idle", 32.0);
        self.fault(json!({"kind": "slow", "pace_ms": PACE_MS})).await;
        let through_baseline = self.open(Via::Baseline, 0).await;
        let ours = self.open(Via::Ours, 0).await;
        rows.extend(self.resident(&format!("{STREAMS} streams"), 48.0));
        close(through_baseline).await;
        close(ours).await;
        self.fault(json!({"kind": "none"})).await;
        for via in [Via::Baseline, Via::Ours] {
            sample(self.caller(via), CLIENTS, 1, MEMORY_SECONDS).await;
        }
        rows.extend(self.resident(&format!("after {MEMORY_SECONDS} s of one-token requests"), 64.0));
        rows
    }

    /// The longest turns on threads for streams in all that was measured, as the daemons time them: CPU
    /// time of one turn in 64.
    pub(crate) async fn longest_turns(&self) -> [Row; 2] {
        const NAMES: [&str; 2] = ["llorch_longest_poll_seconds", "llorch_agent_longest_poll_seconds"];
        let longest = async |client: Client| {
            let page = client.get("/metrics").await.expect("an answer").text().await.expect("text");
            let value = page
                .lines()
                .find(|line| NAMES.iter().any(|name| line.starts_with(name)))
                .and_then(|line| line.rsplit(' ').next());
            value.and_then(|value| value.parse::<f64>().ok()).expect("the metric") * 1e3
        };
        let control = longest(self.cluster.client.clone()).await;
        let nodes = (0..self.cluster.nodes.len()).map(|n| longest(self.cluster.node_client(n)));
        let nodes = join_all(nodes).await.into_iter().fold(0.0, f64::max);
        [("orchestratord", control), ("of all pool-managerd", nodes)].map(|(who, ms)| {
            Row::new(
                format!("longest turn of a thread for streams, {who}, ms"),
                ms,
                f64::NAN,
                Target::Most(1.0),
            )
        })
    }

    fn resident(&self, when: &str, most: f64) -> Vec<Row> {
        let megabytes = |cluster| {
            let (control, nodes) = daemons(cluster);
            [cpu::resident_mb(control), nodes.map(cpu::resident_mb).fold(0.0, f64::max)]
        };
        let ours = megabytes(self.cluster);
        let baseline = match self.baseline {
            Baseline::HaProxy(haproxy) => [cpu::resident_mb(haproxy.pid()); 2],
            Baseline::Build(cluster) => megabytes(cluster),
        };
        let all =
            ["orchestratord", "the largest pool-managerd"].into_iter().zip(ours.into_iter().zip(baseline));
        let row = |(who, (ours, baseline))| {
            Row::new(format!("resident, {when}, {who}, MB"), ours, baseline, Target::Most(most))
        };
        all.map(row).collect()
    }
}

fn daemons(cluster: &Cluster) -> (u32, impl Iterator<Item = u32>) {
    let control = cluster.control.as_ref().expect("a running control plane").pid();
    let nodes = cluster.nodes.iter();
    (control, nodes.map(|node| node.daemon.as_ref().expect("a running node").pid()))
}

/// Waits for the streams' ends: each is whole, or this panics.
async fn close(streams: Vec<JoinHandle<Seen>>) {
    for stream in streams {
        stream.await.expect("a client does not panic");
    }
}

/// Gives all engines of a cluster this fault.
pub(crate) async fn of_all_engines(cluster: &Cluster, fault: &serde_json::Value) {
    join_all((0..cluster.nodes.len()).map(|n| cluster.fault(n, fault.clone()))).await;
}

/// Runs `clients` callers one request after another for some seconds.
pub(crate) async fn sample(caller: &Caller, clients: usize, tokens: u32, seconds: u64) -> Vec<Seen> {
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
    joined(runs).await
}

/// What all clients have seen.
async fn joined(runs: impl Iterator<Item = JoinHandle<Vec<Seen>>>) -> Vec<Seen> {
    join_all(runs).await.into_iter().flat_map(|run| run.expect("a client does not panic")).collect()
}

/// Times to the first token.
#[derive(Debug, Clone, Copy)]
struct Quantiles {
    p50_ms: f64,
    p99_ms: f64,
}

impl Quantiles {
    fn of(seen: &[Seen]) -> Self {
        let mut all: Vec<f64> = seen.iter().map(|seen| seen.first_token.as_secs_f64() * 1e3).collect();
        all.sort_by(f64::total_cmp);
        Self { p50_ms: quantile(&all, 500), p99_ms: quantile(&all, 990) }
    }

    fn above(self, base: Self) -> Self {
        Self { p50_ms: self.p50_ms - base.p50_ms, p99_ms: self.p99_ms - base.p99_ms }
    }
}
