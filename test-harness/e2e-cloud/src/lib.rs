//! A cluster of real processes for end-to-end journeys: the two daemons as they ship, engines
//! fake or real, and clients that write down what they saw.
//!
//! Nothing here looks into a daemon: what is asserted is what came over HTTP, and the clients'
//! transcripts are the evidence. Waits are for conditions and bounded.

pub mod client;
pub mod clients;
pub mod cluster;
pub mod collector;
pub mod connection;
pub mod fake_node;
pub mod home;
pub mod hostile;
pub mod network;
pub mod old;
pub mod process;
pub mod real_engine;

pub use client::{Client, Transcript};
pub use cluster::{Cluster, Engine, Options};
pub use collector::Collector;
pub use connection::Connection;
pub use fake_node::{FakeNode, NodeAnswer};
pub use home::Home;
pub use network::Network;
pub use process::Process;

use std::io::Write;
use std::time::{Duration, Instant};

/// Says that something is not tested here, and why, also where a passing test's output is not shown.
pub fn left_out(why: &str) {
    // Nothing depends on its being read.
    let _ = writeln!(std::io::stderr(), "LEFT OUT: {why}");
}

/// Waits until `look` finds something; panics with `what` after `patience`.
pub async fn eventually<T, F>(what: &str, patience: Duration, mut look: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let start = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(start.elapsed() < patience, "not within {patience:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
