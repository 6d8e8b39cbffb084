//! The success criteria of the cloud profile, one test each, by their names. Where they say machines, the
//! daemons run on hosts with addresses of their own.

use std::time::{Duration, Instant};

use e2e_cloud::network::node_address;
use e2e_cloud::{Client, Engine, Home, eventually};
use nix::sys::signal::Signal;
use pool_registry_types::node::Liveness;
use pool_registry_types::view::NodeView;
use serde_json::json;

use crate::hosts::{PATIENT, Settings, gives_each_its_share, on_hosts};
use crate::monitoring;

const PATIENCE: Duration = Duration::from_secs(20);

/// As they are where nobody sets them.
const DEFAULTS: Settings =
    [("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "10"), ("ORCHESTRATORD_NODE_TIMEOUT_SECS", "30")];

// CLOUD-2699
#[test]
fn the_daemons_run_on_separate_machines() {
    on_hosts(2, 2, PATIENT, async |_, cluster| {
        for (n, node) in cluster.client.nodes().await.iter().enumerate() {
            assert!(node.address.contains(&format!("//{}:", node_address(n))), "{}", node.address);
            let mut task = cluster.task(5);
            task["placement"] = json!({"mode": "pin", "node_id": node.node_id});
            let transcript = cluster.client.run(task).await;
            transcript.check();
            assert_eq!((transcript.node(), transcript.completed()), (Some(node.node_id.as_str()), true));
        }
    });
}

// CLOUD-2699
#[test]
fn several_nodes_register_automatically_and_leave_by_themselves() {
    on_hosts(5, 2, PATIENT, async |_, mut cluster| {
        let nodes = cluster.client.nodes().await;
        assert_eq!(nodes.iter().filter(|node| node.liveness == Liveness::Online).count(), 5);
        let mut leaving = cluster.nodes[4].daemon.take().expect("a daemon");
        leaving.signal(Signal::SIGTERM);
        leaving.wait(PATIENCE);
        let gone = async || (cluster.client.nodes().await.len() == 4).then_some(());
        eventually("the node that left is not there", PATIENCE, gone).await;
        drop(leaving);
    });
}

// CLOUD-2699
#[test]
fn placement_considers_all_nodes_and_gives_each_its_share() {
    on_hosts(5, 2, PATIENT, async |_, cluster| gives_each_its_share(cluster).await);
}

// CLOUD-2699
#[test]
#[expect(clippy::print_stdout, reason = "the figures of the run are its result")]
fn node_failures_are_detected_within_30_seconds_with_default_settings() {
    // Most nodes are well: else the control plane would suspect itself.
    const NODES: usize = 7;
    /// For whoever looks, on a machine that is busy.
    const LOOK: Duration = Duration::from_secs(3);
    on_hosts(NODES, 2, DEFAULTS, async |network, mut cluster| {
        cluster.nodes[0].daemon.as_mut().expect("a daemon").kill();
        let killed = Instant::now();
        network.unplug_node(1);
        let unplugged = Instant::now();
        let stopped = cluster.nodes[2].daemon.as_ref().expect("a daemon");
        stopped.signal(Signal::SIGSTOP);
        let failed = [("killed", killed), ("unplugged", unplugged), ("stopped", Instant::now())];
        for (n, (how, since)) in failed.into_iter().enumerate() {
            let left = (Duration::from_secs(21) + LOOK).saturating_sub(since.elapsed());
            cluster.wait_not_online(n, left).await;
            println!("{how}: not online after {} s", since.elapsed().as_secs());
        }
        for (n, (how, since)) in failed.into_iter().enumerate() {
            let left = (Duration::from_secs(31) + LOOK).saturating_sub(since.elapsed());
            cluster.wait_liveness(n, Liveness::Offline, left).await;
            println!("{how}: offline after {} s", since.elapsed().as_secs());
        }
        let online = cluster.client.nodes().await.iter().filter(|n| n.liveness == Liveness::Online).count();
        assert_eq!(online, NODES - 3, "nobody else is taken for failed");
        stopped.signal(Signal::SIGCONT);
        network.plug_node(1);
        assert!(cluster.client.run(cluster.task(3)).await.completed());
    });
}

// CLOUD-2699
#[test]
fn authentication_prevents_unauthorized_access() {
    on_hosts(1, 2, PATIENT, async |network, cluster| {
        let node = cluster.client.nodes().await.remove(0).address;
        // From the control plane's host and from the node's, at either daemon.
        let base = format!("http://{}:{}", e2e_cloud::network::CONTROL, cluster.port);
        for host in [&network.control, &network.nodes[0]] {
            host.within(async || {
                for (base, token) in
                    [(&base, None), (&base, Some("a-guess")), (&node, None), (&node, Some("a-guess"))]
                {
                    let client = Client::new(base, token);
                    for path in ["/v2/nodes", "/v2/pools", "/v2/tasks", "/metrics", "/v1/models", "/nowhere"]
                    {
                        assert_eq!(client.get(path).await.expect("an answer").status(), 401, "{base}{path}");
                    }
                    let task = json!({"model_ref": "fake-model", "prompt": "x"});
                    for path in
                        ["/v2/tasks", "/v2/nodes/register", "/v2/pools/pool-0/infer", "/v1/chat/completions"]
                    {
                        assert_eq!(client.post(path, &task).await.status(), 401, "{base}{path}");
                    }
                }
            });
        }
        assert!(cluster.client.run(cluster.task(2)).await.completed());
    });
}

// CLOUD-2699
// CLOUD-2717
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_metrics_are_visible_in_a_central_dashboard() {
    monitoring::dashboards::all_are_answered().await;
}

// CLOUD-2699
#[test]
fn tasks_run_end_to_end_over_several_nodes_and_outlive_one_of_them() {
    on_hosts(3, 20, PATIENT, async |_, mut cluster| {
        let client = cluster.client.clone();
        let chat =
            json!({"model": "fake-model", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]});
        let chatted = client.post("/v1/chat/completions", &chat).await;
        assert_eq!(chatted.status(), 200);
        let mut long = cluster.task(600);
        long["recovery"] = json!("continue");
        let running: Vec<_> = (0..6)
            .map(|_| {
                let (client, task) = (client.clone(), long.clone());
                tokio::spawn(async move { client.run(task).await })
            })
            .collect();
        let busy = async || {
            let nodes = client.nodes().await;
            let running = |node: &NodeView| node.running_attempts.len();
            let all = nodes.iter().map(running).sum::<usize>() == 6;
            (all && nodes.iter().all(|node| running(node) > 0)).then_some(())
        };
        eventually("six run, and each node has some", PATIENCE, busy).await;
        cluster.nodes[1].daemon.as_mut().expect("a daemon").kill();
        for run in running {
            let transcript = run.await.expect("a reader");
            transcript.check();
            assert!(transcript.completed(), "{:?}", transcript.error());
        }
        let went_on = monitoring::value(&client, "llorch_continuations_total", &[]).await;
        assert!(went_on.is_some_and(|attempts| attempts > 0.0), "those of the node that died: {went_on:?}");
    });
}

// CLOUD-2699
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_home_profile_works_as_before() {
    let mut home = Home::start(Engine::steady(), &[]).await;
    let task = json!({"model_ref": "fake-model", "prompt": "x", "max_tokens": 3});
    let transcript = home.client.run(task).await;
    transcript.check();
    assert_eq!((transcript.node(), transcript.completed()), (Some("home"), true));
    let chat =
        json!({"model": "fake-model", "max_tokens": 3, "messages": [{"role": "user", "content": "hi"}]});
    assert_eq!(home.client.post("/v1/chat/completions", &chat).await.status(), 200);
    drop(home.engine.take());
    home.stop().await;
}
