//! What goes wrong when a cluster is set up, and where each of it is seen: with the node itself, with the
//! control plane, in the logs and in the metrics.

use std::path::PathBuf;
use std::process::Command;

use e2e_cloud::cluster::TOKEN;
use e2e_cloud::process::{free_port, program};
use e2e_cloud::{Client, Cluster, Options, Process, eventually};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{PATIENCE, value};

/// A node that somebody has set up, with something wrong.
struct Odd {
    id: &'static str,
    client: Client,
    folder: PathBuf,
    daemon: Process,
}

impl Odd {
    fn start(cluster: &Cluster, id: &'static str, settings: &[(&str, String)]) -> Self {
        let folder = cluster.dir.path().join(id);
        std::fs::create_dir_all(&folder).expect("a folder");
        let port = free_port();
        let mut command = Command::new(program("pool-managerd"));
        command
            .env("POOL_MANAGERD_NODE_ID", id)
            .env("POOL_MANAGERD_ADDR", format!("127.0.0.1:{port}"))
            .env("POOL_MANAGERD_RUNTIME_DIR", folder.join("engines"))
            .env("POOL_MANAGERD_STATE_DIR", folder.join("state"))
            .env("POOL_MANAGERD_LOGS_DIR", folder.join("logs"))
            .env("POOL_MANAGERD_MODELS_DIR", folder.join("models"))
            .env("POOL_MANAGERD_PACKAGES_DIR", folder.join("packages"))
            .env("ORCHESTRATORD_URL", &cluster.client.base)
            .env("LLORCH_API_TOKEN", TOKEN)
            .envs(settings.iter().map(|(name, value)| (*name, value)));
        std::fs::create_dir_all(folder.join("engines")).expect("a folder");
        let token = settings.iter().find(|(name, _)| *name == "LLORCH_API_TOKEN");
        let token = token.map_or(TOKEN, |(_, token)| token);
        let client = Client::new(&format!("http://127.0.0.1:{port}"), Some(token));
        // A second one of the name writes beside the first.
        let daemon = Process::start(command, &folder.join("odd.log"));
        Self { id, client, folder, daemon }
    }

    /// It is not ready and says why, its gauge follows, and its log has the reason.
    async fn shows(&self, why: &str, reason: &str) {
        let is_shown = async || {
            let ready = self.client.get("/health/ready").await.ok()?;
            if ready.status() != 503 {
                return None;
            }
            let body: Value = ready.json().await.ok()?;
            let says = body["message"].as_str()?.contains(why);
            let gauge = value(&self.client, "llorch_agent_registered", &[]).await? == 0.0;
            (says && gauge && self.daemon.log().contains(reason)).then_some(())
        };
        eventually(&format!("{} says {why:?}", self.id), PATIENCE, is_shown).await;
    }
}

/// A problem that the control plane shows of a node.
async fn problem(cluster: &Cluster, node_id: &str, what: &str) {
    let is_shown = async || {
        let pools = cluster.client.get_json("/v2/pools").await?;
        let problems = pools["problems"].as_array()?.iter();
        let of_it = problems.filter(|problem| problem["node_id"] == node_id).map(Value::to_string);
        of_it.into_iter().any(|problem| problem.contains(what)).then_some(())
    };
    eventually(&format!("{node_id} has a problem: {what}"), PATIENCE, is_shown).await;
}

// CLOUD-2719
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_a_node_is_seen_with_it_and_at_the_control_plane() {
    let mut cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    let control_log = |cluster: &Cluster| cluster.control.as_ref().expect("a control plane").log();
    let start = |id, settings: &[(&str, String)]| Odd::start(&cluster, id, settings);
    // A wrong token, a wrong port, a URL where something else is, and a name that another node has.
    let wrong_token = start("wrong-token", &[("LLORCH_API_TOKEN", "test-token-of-nobody-here".into())]);
    let closed = format!("http://127.0.0.1:{}", free_port());
    let wrong_port = start("wrong-port", &[("ORCHESTRATORD_URL", closed)]);
    let another = format!("http://127.0.0.1:{}", cluster.nodes[0].port);
    let wrong_url = start("wrong-url", &[("ORCHESTRATORD_URL", another)]);
    let twin = start("twin", &[("POOL_MANAGERD_NODE_ID", "gpu-node-1".into())]);
    // Handoff files that bind nothing, a file of pools that is none, and an engine that is never ready.
    let unbound = start("unbound", &[]);
    std::fs::write(unbound.folder.join("engines/p-r0.json"), "{\"pool_id\": \"p\"}").unwrap();
    let pools = cluster.dir.path().join("wrong-pools.toml");
    std::fs::write(&pools, "").unwrap();
    let wrong_pools = start("wrong-pools", &[("POOL_MANAGERD_POOLS", pools.display().to_string())]);
    let never = cluster.dir.path().join("never.toml");
    let text = "[pools.p]\nengine = \"llamacpp\"\nmodel = \"m\"\nmemory_bytes = 1048576\n\
        [pools.p.provision]\nmode = \"binary\"\nprogram = \"/bin/sh\"\nargs = [\"-c\", \"sleep 1000\", \"{port}\"]\n";
    std::fs::write(&never, text).unwrap();
    let never_ready = start("never-ready", &[("POOL_MANAGERD_POOLS", never.display().to_string())]);
    let online = async |id: &str| {
        let is_online =
            || async { cluster.client.node(id).await.filter(|node| node.reason.is_none()).map(drop) };
        eventually(&format!("{id} is online"), PATIENCE, is_online).await;
    };

    wrong_token.shows("BAD_TOKEN", "BAD_TOKEN").await;
    assert!(cluster.client.node("wrong-token").await.is_none());
    let refused = ["code=\"BAD_TOKEN\"", "route=\"/v2/nodes/register\""];
    assert!(value(&cluster.client, "llorch_refused_calls_total", &refused).await.is_some_and(|n| n > 0.0));
    assert!(control_log(&cluster).contains("127.0.0.1 was refused on /v2/nodes/register: BAD_TOKEN"));
    wrong_port.shows("does not answer", "Connection refused").await;
    wrong_url.shows("NOT_FOUND", "NOT_FOUND").await;
    twin.shows("NODE_ID_CONFLICT", "NODE_ID_CONFLICT").await;
    assert!(control_log(&cluster).contains("a registration was refused"), "{}", control_log(&cluster));

    online("unbound").await;
    problem(&cluster, "unbound", "p-r0.json").await;
    let faulty = value(&unbound.client, "llorch_agent_handoffs_faulty", &[]).await;
    assert!(faulty == Some(1.0) && unbound.daemon.log().contains("p-r0.json"), "{faulty:?}");
    online("wrong-pools").await;
    std::fs::write(&pools, "[pools.p]\nengin = \"llamacpp\"\n").unwrap();
    problem(&cluster, "wrong-pools", "engin").await;
    assert!(wrong_pools.daemon.log().contains("engin"));
    online("never-ready").await;
    let labels = |state: &str| [String::from("node_id=\"never-ready\""), format!("state=\"{state}\"")];
    let loads = async || {
        let labels = labels("loading");
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        let state = value(&cluster.client, "llorch_pool_state", &labels).await? == 1.0;
        let up = value(&cluster.client, "llorch_engine_up", &labels[..1]).await.unwrap_or_default();
        (state && up == 0.0).then_some(())
    };
    eventually("the pool of an engine that is never ready is loading", PATIENCE, loads).await;
    drop((wrong_token, wrong_port, wrong_url, twin));

    // The control plane goes and comes again; one node does not.
    let mut gone = never_ready.daemon;
    gone.signal(Signal::SIGKILL);
    gone.wait(PATIENCE);
    cluster.control.as_mut().expect("a control plane").kill();
    let node = cluster.node_client(0);
    let registered =
        async |wanted: f64| (value(&node, "llorch_agent_registered", &[]).await? == wanted).then_some(());
    eventually("the node misses its control plane", PATIENCE, || registered(0.0)).await;
    assert_eq!(node.get("/health/ready").await.unwrap().status(), 503);
    cluster.start_control();
    cluster.wait_online(0).await;
    eventually("the node has it again", PATIENCE, || registered(1.0)).await;
    let expected = value(&cluster.client, "llorch_node_expected", &["node_id=\"never-ready\""]).await;
    let up = value(&cluster.client, "llorch_node_up", &["node_id=\"never-ready\""]).await;
    assert_eq!((expected, up), (Some(1.0), None), "one of those expected is missing");
}
