//! Heartbeats over HTTP: bodies of 8 pools and 32 attempts, as fast as they are taken.

use std::time::{Duration, Instant};

use e2e_cloud::Cluster;
use futures::future::join_all;
use serde_json::{Value, json};

use crate::cpu;

const NODES: u32 = 8;

pub(crate) async fn measure(cluster: &Cluster, seconds: &u64) {
    let control = cluster.control.as_ref().expect("a running control plane").pid();
    let before = cpu::time_of(control);
    let start = Instant::now();
    let end = start + Duration::from_secs(*seconds);
    let nodes = (0..NODES).map(|n| beat(cluster, n, end));
    let beats: u64 = join_all(nodes).await.into_iter().sum();
    let rate = beats as f64 / start.elapsed().as_secs_f64();
    let cpu = (cpu::time_of(control) - before).as_secs_f64() * 1e6 / beats as f64;
    println!("heartbeats over HTTP, 8 pools and 32 attempts each: {rate:.0}/s, {cpu:.0} µs of CPU each");
}

async fn beat(cluster: &Cluster, n: u32, end: Instant) -> u64 {
    let id = format!("bench-{n}");
    let register = json!({
        "node_id": id, "machine_id": "m", "version": "0", "address": "http://127.0.0.1:1",
        "boot_id": format!("7f3b1c52-64a5-4c56-9e1e-0a3e0f3d{n:04}"),
    });
    let answer: Value =
        cluster.client.post("/v2/nodes/register", &register).await.json().await.expect("an answer");
    let path = format!("/v2/nodes/{id}/heartbeat");
    let mut body = report(n, &answer["epoch"]);
    let mut beats = 0;
    while Instant::now() < end {
        beats += 1;
        body["seq"] = json!(beats);
        let response = cluster.client.post(&path, &body).await;
        assert_eq!(response.status(), 200, "{:?}", response.text().await);
        // The body is read, so that the connection is kept.
        let _answer: Value = response.json().await.expect("an answer");
    }
    beats
}

fn report(n: u32, epoch: &Value) -> Value {
    let attempt = |k: u32| format!("7f3b1c52-64a5-4c56-{n:04}-0a3e0f3d{k:04}");
    let pools: Vec<Value> = (0..8)
        .map(|p| {
            let attempts: Vec<String> = (0..4).map(|k| attempt(p * 4 + k)).collect();
            json!({
                "pool_id": format!("pool-{p}"), "state": "ready", "ready": true, "engine": "llamacpp",
                "models": [format!("bench-model-{p}")], "ctx_max": 8192,
                "replicas": [{"replica_id": "r0", "ready": true, "slots_total": 4, "slots_free": 0, "attempts": attempts}],
            })
        })
        .collect();
    json!({"epoch": epoch, "seq": 0, "timestamp": "2026-01-01T00:00:00Z", "pools": pools, "gpus": []})
}
