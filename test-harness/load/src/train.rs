//! What a profile of a build is taken from: the work that the daemons are there for, and their end in order.
//!
//! Programs that record how they run write that down when they end by themselves, so they are stopped as
//! an operator stops them.

use std::time::Duration;

use e2e_cloud::Cluster;
use e2e_cloud::process::Signal;
use serde_json::json;

use crate::compare::{CLIENTS, LONG, PACE_MS, STREAMS, TOKENS_PER_SECOND, of_all_engines, sample};
use crate::http::Api;
use crate::of_cluster;

/// A daemon that has recorded writes some megabytes.
const MOST_TO_STOP: Duration = Duration::from_secs(30);

/// Runs each kind of request for so many seconds, in both APIs, and stops the cluster.
pub(crate) async fn run(mut cluster: Cluster, seconds: u64) {
    for api in [Api::V2, Api::V1] {
        let caller = of_cluster(&cluster, api);
        for (clients, tokens) in [(CLIENTS, 1), (CLIENTS, LONG), (1, 1)] {
            let seen = sample(&caller, clients, tokens, seconds).await;
            println!("{api:?}: {} requests of {tokens} tokens by {clients} clients", seen.len());
        }
        of_all_engines(&cluster, &json!({"kind": "slow", "pace_ms": PACE_MS})).await;
        let tokens = u32::try_from(seconds).expect("minutes at most") * TOKENS_PER_SECOND;
        let seen = sample(&caller, STREAMS, tokens, 1).await;
        println!("{api:?}: {} requests of {tokens} tokens at their pace", seen.len());
        of_all_engines(&cluster, &json!({"kind": "none"})).await;
    }
    let nodes = cluster.nodes.iter_mut().filter_map(|node| node.daemon.as_mut());
    for daemon in nodes.chain(cluster.control.as_mut()) {
        daemon.signal(Signal::SIGTERM);
        let status = daemon.wait(MOST_TO_STOP);
        assert!(status.success(), "{status}:\n{}", daemon.log());
    }
}
