//! A burst of tasks of mixed length over three unequal nodes, once for each strategy.
//!
//! What is measured is what clients see: the wait that a task's view names, and how far the
//! prediction of its submission was from it. Every strategy gets the same tasks in the same
//! order, in repetitions that alternate.

use std::collections::BTreeMap;
use std::time::Duration;

use e2e_cloud::{Cluster, Engine, Options};
use futures::future::join_all;
use futures::stream::{self, StreamExt};
use serde_json::{Value, json};

use crate::{median, quantile};

const TASKS: usize = 1_000;
/// Submissions under way at a time.
const AT_ONCE: usize = 64;
const STRATEGIES: [&str; 3] = ["least-loaded", "round-robin", "random"];

/// Slots, and milliseconds a token, of each node.
const NODES: [(u32, u64); 3] = [(16, 5), (8, 10), (4, 20)];

#[derive(Debug, Default)]
struct Figures {
    mean_ms: Vec<f64>,
    p99_ms: Vec<f64>,
    /// Of the predictions that were made: |predicted − actual|, and as a part of the actual wait.
    error_ms: Vec<f64>,
    error_ratio: Vec<f64>,
}

pub(crate) async fn measure(repetitions: usize) {
    let mut all: BTreeMap<&str, Figures> = BTreeMap::new();
    for repetition in 0..repetitions {
        for strategy in STRATEGIES {
            let seen = burst(strategy, repetition as u64).await;
            let figures = all.entry(strategy).or_default();
            let mut waits: Vec<f64> = seen.iter().map(|(_, wait)| *wait).collect();
            waits.sort_by(f64::total_cmp);
            figures.mean_ms.push(waits.iter().sum::<f64>() / waits.len() as f64);
            figures.p99_ms.push(quantile(&waits, 990));
            let predicted = seen.iter().filter_map(|(predicted, wait)| Some(((*predicted)?, *wait)));
            let (errors, ratios): (Vec<f64>, Vec<f64>) = predicted
                .filter(|(_, wait)| *wait > 0.0)
                .map(|(predicted, wait)| ((predicted - wait).abs(), (predicted - wait).abs() / wait))
                .unzip();
            figures.error_ms.push(median(errors));
            figures.error_ratio.push(median(ratios));
        }
    }
    println!(
        "a burst of {TASKS} tasks of 4 to 64 tokens over nodes of {NODES:?} slots and ms a token, medians of {repetitions}:"
    );
    for strategy in STRATEGIES {
        let figures = &all[strategy];
        println!(
            "  {strategy:>12}: wait mean {:.0} ms, p99 {:.0} ms; predicted_start_ms off by {:.0} ms or {:.1} % (medians)",
            median(figures.mean_ms.clone()),
            median(figures.p99_ms.clone()),
            median(figures.error_ms.clone()),
            median(figures.error_ratio.clone()) * 1e2,
        );
    }
}

/// What each task was told at its submission, and how long it waited; milliseconds.
async fn burst(strategy: &str, seed: u64) -> Vec<(Option<f64>, f64)> {
    let engine = |(slots, pace_ms)| Engine::Fake { slots, first_token_ms: 20, pace_ms, dialect: "llamacpp" };
    let other_engines = NODES.iter().enumerate().map(|(n, node)| (n, engine(*node))).collect();
    let control = vec![
        ("LLORCH_LOG", "warn".to_owned()),
        ("ORCHESTRATORD_PLACEMENT_STRATEGY", strategy.to_owned()),
        ("ORCHESTRATORD_ADMISSION_CAPACITY", "2000".to_owned()),
    ];
    let options = Options { nodes: NODES.len(), other_engines, control, ..Options::default() };
    let cluster = Cluster::start(options).await;
    let task = |tokens: u32| {
        let mut task = cluster.task(tokens);
        // Clients know about how long their answers are.
        task["expected_tokens"] = json!(tokens);
        task
    };
    // The paces are measured before.
    join_all((0..56).map(|_| cluster.client.run(task(16)))).await;
    let mut random = fastrand::Rng::with_seed(seed);
    let lengths: Vec<u32> = (0..TASKS).map(|_| random.u32(4..=64)).collect();
    let submissions = stream::iter(lengths).map(|tokens| {
        let (client, task) = (cluster.client.clone(), task(tokens));
        async move {
            let accepted: Value = client.post("/v2/tasks", &task).await.json().await.expect("an answer");
            let id = accepted["task_id"].as_str().expect("it was accepted").to_owned();
            (id, accepted["predicted_start_ms"].as_f64())
        }
    });
    let accepted: Vec<(String, Option<f64>)> = submissions.buffered(AT_ONCE).collect().await;
    e2e_cloud::eventually("all have ended", Duration::from_secs(120), || async {
        let queued = cluster.client.get_json("/v2/tasks?state=queued&limit=1").await?;
        let running = cluster.client.get_json("/v2/tasks?state=running&limit=1").await?;
        let none = |page: &Value| page["tasks"].as_array().is_some_and(Vec::is_empty);
        (none(&queued) && none(&running)).then_some(())
    })
    .await;
    let views = stream::iter(accepted).map(|(id, predicted)| {
        let client = cluster.client.clone();
        async move {
            let view = client.get_json(&format!("/v2/tasks/{id}")).await.expect("a kept task");
            assert_eq!(view["state"], "completed", "{view}");
            (predicted, view["queue_wait_ms"].as_f64().expect("a wait"))
        }
    });
    views.buffered(AT_ONCE).collect().await
}
