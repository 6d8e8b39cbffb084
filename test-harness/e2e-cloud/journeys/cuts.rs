//! What stands between the daemons is cut, reset, refused or stopped under two hundred streams, a
//! daemon dies, or a host is gone.
//!
//! The daemons run on hosts of their own where the network is what fails, with the time-outs as they
//! are by default; all clusters of a journey run side by side. A machine that cannot have such networks
//! leaves them out, and says so.

mod hosts;
mod load;
mod loss;
mod old;

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use e2e_cloud::process::{free_port, program};
use e2e_cloud::{Cluster, Network, Process, eventually, network};
use nix::sys::signal::Signal;

use crate::faults::ALONE;
use load::{NODES, Streams, TASKS, fleet, links, metric, of_nodes, prompts, quiet, tokens_in};

/// What the streams take beside the fault.
const BESIDE: Duration = Duration::from_secs(6);
/// From a mended network to links that are up: a dial comes every half second.
const BACK_WITHIN: Duration = Duration::from_secs(3);

/// What lies between the daemons, and what becomes of it.
trait Between {
    fn harm(&self);
    fn mend(&self);
}

/// Nothing passes.
struct Cut(Arc<Network>);

impl Between for Cut {
    fn harm(&self) {
        self.0.cut();
    }
    fn mend(&self) {
        self.0.mend();
    }
}

/// What stands is reset, what is new is refused.
struct Refuse(Arc<Network>);

impl Between for Refuse {
    fn harm(&self) {
        self.0.refuse();
    }
    fn mend(&self) {
        self.0.refuse_no_more();
    }
}

/// What stands is reset once, what is new passes.
struct ResetOnce(Arc<Network>);

impl Between for ResetOnce {
    fn harm(&self) {
        self.0.reset();
    }
    fn mend(&self) {}
}

/// A proxy stands still.
struct Stop<'p>(&'p Process);

impl Between for Stop<'_> {
    fn harm(&self) {
        self.0.signal(Signal::SIGSTOP);
    }
    fn mend(&self) {
        self.0.signal(Signal::SIGCONT);
    }
}

/// What a round has cost.
#[derive(Debug)]
struct Cost {
    /// Prompts beyond one a task.
    more_prompts: usize,
    /// Attempts that were moved by decision 0006.
    moved: f64,
    resumes: f64,
    interrupted_seconds: f64,
    placed_again: usize,
    reset: usize,
}

/// Runs two hundred streams with the fault in their midst. Every stream must be whole, but for those
/// that may end with `WORKER_RESET`, where any may.
#[expect(clippy::print_stdout, reason = "the figures of the run are its result")]
async fn round(
    cluster: &Cluster,
    what: &str,
    span: Duration,
    may_reset: bool,
    between: &impl Between,
) -> Cost {
    let begun = Instant::now();
    let numbers = async || {
        let of = async |name| metric(&cluster.client, name).await.expect("the control plane's metrics");
        let moved = of("llorch_attempts_moved_total").await;
        let resumes = of("llorch_link_resumes_total").await;
        (prompts(cluster).await.len(), moved, resumes, of("llorch_link_interrupted_seconds_total").await)
    };
    let before = numbers().await;
    let streams = Streams::under_way(cluster, tokens_in(span + BESIDE)).await;
    between.harm();
    let over = tokio::time::sleep(span);
    let mut over = pin!(over);
    if span >= Duration::from_secs(5) {
        // Half a second before its end.
        tokio::time::sleep(span.saturating_sub(Duration::from_millis(500))).await;
        let interrupted = links(cluster, "interrupted").await;
        assert!(interrupted >= 3.0, "{what}: {interrupted} links are interrupted");
        if span < Duration::from_secs(10) {
            let held = of_nodes(cluster, "llorch_held_attempts").await;
            assert!(held >= f64::from(TASKS), "{what}: {held} attempts are held");
            assert!(of_nodes(cluster, "llorch_held_bytes").await > held * 512.0, "{what}");
        }
    }
    over.as_mut().await;
    between.mend();
    let mended = Instant::now();
    eventually("all links are up", BACK_WITHIN, || async {
        (links(cluster, "up").await >= 3.0).then_some(())
    })
    .await;
    let back = mended.elapsed();
    let (mut reset, mut placed_again) = (0, 0);
    let mut again = Vec::new();
    for seen in streams.end().await {
        again.extend(seen.transcript.replaced_at.map(|at| at.saturating_duration_since(mended)));
        if seen.is_whole() {
            placed_again += usize::from(seen.was_placed_again());
            assert!(
                seen.continues || seen.transcript.starts() == 1,
                "{what}: what may not go on went on elsewhere: {:?}",
                seen.transcript.names()
            );
            continue;
        }
        let end = seen.transcript.events.last();
        assert!(may_reset && !seen.continues, "{what}: continues {}: {end:?}", seen.continues);
        assert_eq!(seen.transcript.error(), Some("WORKER_RESET"), "{what}: {end:?}");
        assert!(!seen.transcript.tokens().is_empty(), "{what}: lost without a token: {end:?}");
        reset += 1;
    }
    quiet(cluster, Duration::from_secs(20)).await;
    let after = numbers().await;
    let cost = Cost {
        more_prompts: after.0 - before.0 - TASKS as usize,
        moved: after.1 - before.1,
        resumes: after.2 - before.2,
        interrupted_seconds: after.3 - before.3,
        placed_again,
        reset,
    };
    let (soonest, latest) = (again.iter().min(), again.iter().max());
    println!(
        "{what}: back after {back:?}, placed again {soonest:?} to {latest:?} after the end, round of {:?}: {cost:?}",
        begun.elapsed()
    );
    assert!(cost.more_prompts as f64 <= cost.moved, "{what}: {cost:?}");
    cost
}

/// The rounds that each way of cutting goes through.
async fn cut_for_a_while(cluster: &Cluster, way: &str, between: &impl Between) {
    let second = round(cluster, &format!("{way} for 1 s"), Duration::from_secs(1), false, between).await;
    assert_eq!(second.more_prompts, 0, "{way}: {second:?}");
    for seconds in [5_u32, 9] {
        let span = Duration::from_secs(seconds.into());
        let cost = round(cluster, &format!("{way} for {seconds} s"), span, false, between).await;
        assert!(cost.resumes >= 3.0, "{way}: {cost:?}");
        let interrupted = NODES as f64 * f64::from(seconds - 3);
        assert!(cost.interrupted_seconds >= interrupted, "{way}: {cost:?}");
    }
    let span = Duration::from_secs(15);
    let cost = round(cluster, &format!("{way} for 15 s"), span, true, between).await;
    assert!(cost.reset > 0, "{way}: what has sent tokens and may not go on is lost: {cost:?}");
}

// CLOUD-2670
// CLOUD-2671
// CLOUD-2672
// CLOUD-2677
#[test]
fn links_that_are_cut_for_some_seconds_cost_no_stream() {
    if !network::is_possible() {
        return;
    }
    let _alone = ALONE.blocking_read();
    std::thread::scope(|scope| {
        let ways = [
            ("dropped", scope.spawn(dropped)),
            ("reset and refused", scope.spawn(reset_and_refused)),
            ("a stopped proxy", scope.spawn(stopped_proxy)),
        ];
        let failed: Vec<&str> =
            ways.into_iter().filter_map(|(way, run)| run.join().is_err().then_some(way)).collect();
        assert!(failed.is_empty(), "see above: {failed:?}");
    });
}

fn dropped() {
    let network = Arc::new(Network::new(NODES));
    network.control.within(async || {
        let cluster = Cluster::start(fleet(Some(Arc::clone(&network)))).await;
        cut_for_a_while(&cluster, "dropped", &Cut(Arc::clone(&network))).await;
    });
}

fn reset_and_refused() {
    let network = Arc::new(Network::new(NODES));
    network.control.within(async || {
        let cluster = Cluster::start(fleet(Some(Arc::clone(&network)))).await;
        let (once, refuse) = (ResetOnce(Arc::clone(&network)), Refuse(Arc::clone(&network)));
        let reset = round(&cluster, "reset once", Duration::from_secs(1), false, &once).await;
        assert!(reset.resumes >= 3.0, "{reset:?}");
        assert_eq!((reset.more_prompts, reset.placed_again), (0, 0), "{reset:?}");
        for (seconds, may_reset) in [(1, false), (5, false), (9, false), (15, true)] {
            let span = Duration::from_secs(seconds);
            let cost = round(&cluster, &format!("refused for {seconds} s"), span, may_reset, &refuse).await;
            assert!(cost.resumes >= 3.0, "{cost:?}");
        }
    });
}

fn stopped_proxy() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let mut cluster = Cluster::without_nodes(fleet(None));
        cluster.start_control();
        let to_control = free_port();
        let mut ways = vec![format!("127.0.0.1:{to_control}=127.0.0.1:{}", cluster.port)];
        for n in 0..NODES {
            cluster.prepare_node(n);
            let to_node = free_port();
            ways.push(format!("127.0.0.1:{to_node}=127.0.0.1:{}", cluster.nodes[n].port));
            let own = [
                (n, "ORCHESTRATORD_URL", format!("http://127.0.0.1:{to_control}")),
                (n, "POOL_MANAGERD_ADVERTISE_URL", format!("http://127.0.0.1:{to_node}")),
            ];
            cluster.options.node.extend(own);
        }
        let mut command = std::process::Command::new(program("tcp-proxy"));
        command.args(ways);
        let proxy = Process::start(command, &cluster.log("tcp-proxy"));
        for n in 0..NODES {
            cluster.start_engine(n);
            cluster.start_daemon(n);
            cluster.wait_online(n).await;
        }
        cut_for_a_while(&cluster, "a stopped proxy", &Stop(&proxy)).await;
    });
}
