//! One packet in a hundred is lost between the hosts.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use e2e_cloud::{Cluster, Network, Options, network, old};

use super::load::{NODES, PACE_MS, Streams, TASKS, fleet};
use crate::faults::ALONE;

/// What the streams take.
const TOKENS: u32 = 40;
const LOST_ONE_IN: u32 = 100;
/// A link counts as interrupted only after this.
const SILENT: Duration = Duration::from_millis(2_500);

/// Between two tokens of a stream.
struct Gaps {
    median: Duration,
    p99: Duration,
    longest: Duration,
}

impl fmt::Display for Gaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { median, p99, longest } = self;
        write!(f, "median {median:.1?}, p99 {p99:.1?}, longest {longest:.1?}")
    }
}

/// Two hundred streams over such a network, each of which must be whole.
fn gaps(options: impl FnOnce(Arc<Network>) -> Options) -> Gaps {
    let network = Arc::new(Network::new(NODES));
    let options = options(Arc::clone(&network));
    let mut gaps: Vec<Duration> = network.control.within(async || {
        let cluster = Cluster::start(options).await;
        let streams = Streams::begin(&cluster, 0..TASKS, TOKENS);
        network.lose_one_in(LOST_ONE_IN);
        let mut gaps = Vec::new();
        for seen in streams.end().await {
            assert!(seen.is_whole(), "{:?}", seen.transcript.events.last());
            assert_eq!(seen.transcript.starts(), 1, "{:?}", seen.transcript.names());
            let at = &seen.transcript.tokens_at;
            gaps.extend(at.windows(2).map(|pair| pair[1].duration_since(pair[0])));
        }
        gaps
    });
    gaps.sort();
    let of = |thousandths: usize| gaps[(gaps.len() - 1) * thousandths / 1000];
    Gaps { median: of(500), p99: of(990), longest: of(1000) }
}

// CLOUD-2679
#[test]
#[expect(clippy::print_stdout, reason = "the figures of the run are its result")]
fn lost_packets_end_no_stream_and_interrupt_no_link() {
    if !network::is_possible() {
        return;
    }
    let _alone = ALONE.blocking_read();
    std::thread::scope(|scope| {
        let exchanges = old::program("pool-managerd").map(|program| {
            scope.spawn(|| gaps(|network| Options { node_program: Some(program), ..fleet(Some(network)) }))
        });
        let link = gaps(|network| fleet(Some(network)));
        println!("one packet in {LOST_ONE_IN} lost, a token each {PACE_MS} ms, by the link: {link}");
        assert!(link.longest < SILENT + Duration::from_millis(PACE_MS), "a link stood still: {link}");
        if let Some(exchanges) = exchanges {
            let exchanges = exchanges.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            println!("and call by call: {exchanges}");
        }
    });
}
