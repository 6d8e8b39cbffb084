//! A daemon dies, or the control plane's host is gone, under two hundred streams.

use std::sync::Arc;
use std::time::{Duration, Instant};

use e2e_cloud::{Cluster, Network, eventually, network};

use super::load::{NODES, SLOTS, Seen, Streams, TASKS, busy, fleet, prompts, quiet, tokens_in};
use crate::faults::ALONE;

// CLOUD-2673
// CLOUD-2674
// CLOUD-2675
// CLOUD-2676
#[test]
fn a_daemon_or_a_host_that_is_gone_leaves_no_splice_and_no_slot_in_use() {
    if !network::is_possible() {
        return;
    }
    let _alone = ALONE.blocking_read();
    std::thread::scope(|scope| {
        let ways = [
            ("a killed node", scope.spawn(killed_node)),
            ("a killed control plane", scope.spawn(killed_control_plane)),
            ("a host without power", scope.spawn(host_without_power)),
            ("a host away for 20 s", scope.spawn(host_away)),
        ];
        let failed: Vec<&str> =
            ways.into_iter().filter_map(|(way, run)| run.join().is_err().then_some(way)).collect();
        assert!(failed.is_empty(), "see above: {failed:?}");
    });
}

#[expect(clippy::print_stdout, reason = "the figures of the run are its result")]
fn say(what: &str) {
    println!("{what}");
}

/// Of streams that end, which may not be whole: those that had sent tokens and may not be continued.
/// Returns how many were lost.
fn lost(seen: &[Seen]) -> usize {
    let broken = seen.iter().filter(|seen| !seen.is_whole());
    broken
        .inspect(|seen| {
            let end = seen.transcript.events.last();
            assert!(!seen.continues, "it may continue: {end:?}");
            assert_eq!(seen.transcript.error(), Some("WORKER_RESET"), "{end:?}");
            assert!(!seen.transcript.tokens().is_empty(), "lost without a token: {end:?}");
        })
        .count()
}

fn killed_node() {
    let network = Arc::new(Network::new(NODES));
    network.control.within(async || {
        let mut cluster = Cluster::start(fleet(Some(Arc::clone(&network)))).await;
        let streams = Streams::under_way(&cluster, tokens_in(Duration::from_secs(6))).await;
        let killed = Instant::now();
        cluster.nodes[0].daemon.as_mut().expect("a running daemon").kill();
        // Far before any heartbeat is missed: they are ten seconds apart.
        cluster.wait_not_online(0, Duration::from_secs(2)).await;
        let noticed = killed.elapsed();
        let seen = streams.end().await;
        let lost = lost(&seen);
        let again = seen.iter().filter_map(|seen| seen.transcript.replaced_at).min();
        let again = again.expect("streams of the node go on elsewhere").saturating_duration_since(killed);
        say(&format!(
            "a killed node: suspect after {noticed:?}, a token elsewhere after {again:?}, {lost} lost"
        ));
        assert!(again < Duration::from_secs(3), "{again:?}");
        assert!(lost > 0, "no stream of the node had tokens");
    });
}

/// Tasks of the second life.
const LATER: u32 = 40;

fn killed_control_plane() {
    let network = Arc::new(Network::new(NODES));
    network.control.within(async || {
        let mut cluster = Cluster::start(fleet(Some(Arc::clone(&network)))).await;
        // Nothing ends them but a stop.
        let streams = Streams::under_way(&cluster, tokens_in(Duration::from_secs(100))).await;
        let prompts_before = prompts(&cluster).await.len();
        cluster.control.as_mut().expect("a running daemon").kill();
        let killed = Instant::now();
        cluster.start_control();
        assert!(killed.elapsed() < Duration::from_secs(1));
        for seen in streams.end().await {
            assert!(seen.has_no_splice() && !seen.transcript.completed(), "{:?}", seen.transcript.text());
        }
        cluster.wait_online(0).await;
        let online = killed.elapsed();
        let later = Streams::begin(&cluster, TASKS..TASKS + LATER, tokens_in(Duration::from_secs(10)));
        eventually("the orphans are stopped", Duration::from_secs(15).saturating_sub(killed.elapsed()), || async {
            (busy(&cluster).await <= u64::from(LATER)).then_some(())
        })
        .await;
        let stopped = killed.elapsed();
        for seen in later.end().await {
            assert!(seen.is_whole(), "{:?}", seen.transcript.events.last());
            assert_eq!(seen.transcript.starts(), 1);
        }
        quiet(&cluster, Duration::from_secs(15)).await;
        for n in 0..NODES {
            let node = cluster.client.node(&cluster.nodes[n].id).await.expect("a known node");
            assert_eq!(node.pools[0].slots_free, SLOTS, "{}", node.node_id);
        }
        let prompts = prompts(&cluster).await.len() - prompts_before;
        say(&format!("a killed control plane: a node is back after {online:?}, the orphans stopped after {stopped:?}, {prompts} prompts for {LATER} tasks"));
        assert_eq!(prompts, LATER as usize);
    });
}

fn host_without_power() {
    let network = Arc::new(Network::new(NODES));
    network.control.within(async || {
        let cluster = Cluster::start(fleet(Some(Arc::clone(&network)))).await;
        let streams = Streams::under_way(&cluster, tokens_in(Duration::from_secs(100))).await;
        assert_eq!(busy(&cluster).await, u64::from(TASKS));
        network.unplug_control();
        let gone = Instant::now();
        // Nine seconds without a POST, fifteen without a reader; and the time to stop, and to see it.
        eventually("the slots are free", Duration::from_secs(25), || async {
            (busy(&cluster).await == 0).then_some(())
        })
        .await;
        say(&format!("a host without power: the slots are free after {:?}", gone.elapsed()));
        streams.leave();
    });
}

fn host_away() {
    const AWAY: Duration = Duration::from_secs(20);
    let network = Arc::new(Network::new(NODES));
    network.control.within(async || {
        let cluster = Cluster::start(fleet(Some(Arc::clone(&network)))).await;
        let streams = Streams::under_way(&cluster, tokens_in(AWAY + Duration::from_secs(4))).await;
        network.unplug_control();
        tokio::time::sleep(AWAY).await;
        network.plug_control();
        let back = Instant::now();
        let seen = streams.end().await;
        let lost = lost(&seen);
        let again = seen.iter().filter_map(|seen| seen.transcript.replaced_at);
        let again: Vec<Duration> = again.map(|at| at.saturating_duration_since(back)).collect();
        say(&format!(
            "a host away for 20 s: {lost} lost, {} placed again {:?} to {:?} after it was back, all ended after {:?}",
            again.len(),
            again.iter().min(),
            again.iter().max(),
            back.elapsed()
        ));
        quiet(&cluster, Duration::from_secs(25)).await;
    });
}
