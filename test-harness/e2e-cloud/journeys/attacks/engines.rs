//! Engines that harm the node behind which they stand.

use std::time::Duration;

use e2e_cloud::hostile::engine::{Harm, HostileEngine};
use e2e_cloud::process::raise_file_limit;
use e2e_cloud::{Cluster, Options, eventually};
use reqwest::Method;
use serde_json::{Value, json};

use super::{resident_mib, right_requests_during};

const SOON: Duration = Duration::from_secs(30);
/// How long each harms.
const EACH: Duration = Duration::from_millis(1_500);
/// What a node takes of its own, and what it may keep of attempts here, MiB.
const OWN_MIB: u64 = 96;
const HELD_MIB: u64 = 128;
const SLOTS: u32 = 4;

// CLOUD-2776
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_harms_takes_of_its_node_what_the_settings_allow_and_the_others_go_on() {
    raise_file_limit();
    let node = vec![(0, "POOL_MANAGERD_HELD_BYTES", (HELD_MIB << 20).to_string())];
    let cluster = Cluster::start(Options { nodes: 1, node, ..Options::default() }).await;
    let (client, node) = (cluster.client.clone(), cluster.node_client(0));
    let (daemon, control) =
        (cluster.nodes[0].daemon.as_ref().unwrap().pid(), cluster.control.as_ref().unwrap().pid());
    for harm in Harm::ALL.into_iter().filter(|harm| !harm.is_of_documents()) {
        let engine = HostileEngine::start(harm, "evil-model", &cluster.nodes[0].runtime_dir, SLOTS).await;
        let harming = async {
            // Its names are too many for it to become ready; all others do.
            eventually("its pool is shown", SOON, || async {
                let view = client.node("gpu-node-1").await?;
                let pool =
                    view.pools.iter().find(|pool| pool.report.pool_id.as_str().starts_with("evil-"))?;
                let refused = harm == Harm::Names && pool.report.last_error.is_some();
                (refused || pool.report.ready).then_some(())
            })
            .await;
            let mut ids = Vec::new();
            for _ in 0..SLOTS {
                let task = json!({ "model_ref": "evil-model", "prompt": "once", "deadline_ms": 20_000 });
                let answer = client.post("/v2/tasks", &task).await;
                ids.extend(answer.json::<Value>().await.unwrap()["task_id"].as_str().map(str::to_owned));
            }
            tokio::time::sleep(EACH).await;
            // Beside it an engine of the same node does what it is asked.
            let transcript = client.run(cluster.task(4)).await;
            transcript.check();
            assert!(transcript.completed(), "{harm:?}: {:?}", transcript.error());
            for id in ids {
                let cancel = client.request(Method::POST, &format!("/v2/tasks/{id}/cancel")).timeout(SOON);
                let status = cancel.send().await.expect("an answer").status().as_u16();
                assert!([204, 404, 409].contains(&status), "{harm:?}: {status}");
            }
        };
        let ((), watch) = right_requests_during(&node, "/v2/pools", daemon, harming).await;
        println!(
            "pool-managerd, {harm:?} ({} MiB sent): {} right requests, p99 {} ms, at most {} MiB; the control plane {} MiB",
            engine.sent() >> 20,
            watch.took.len(),
            watch.p99().as_millis(),
            watch.most_mib,
            resident_mib(control),
        );
        let most = OWN_MIB + HELD_MIB;
        assert!(watch.most_mib <= most, "{harm:?}: {} MiB, {most} are allowed", watch.most_mib);
        assert!(resident_mib(control) <= OWN_MIB, "{harm:?}");
        drop(engine);
        eventually("its pool is gone", SOON, || async {
            let view = client.node("gpu-node-1").await?;
            (view.pools.len() == 1).then_some(())
        })
        .await;
    }
}
