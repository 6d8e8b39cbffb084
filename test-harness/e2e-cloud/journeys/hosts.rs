//! The same journeys, the rotation of tokens among them, on two grounds: all daemons on this machine's loopback,
//! and each on a host of its own with an address of its own. Each says how long it took, by journey and ground.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use e2e_cloud::cluster::TOKEN;
use e2e_cloud::network::{Way, is_possible};
use e2e_cloud::{Client, Cluster, Engine, Network, Options, eventually};
use futures::StreamExt;
use futures::future::join_all;
use nix::sys::signal::Signal;
use pool_registry_types::node::Liveness;
use reqwest::{Method, StatusCode};
use serde_json::json;

use crate::faults::ALONE;

const PATIENCE: Duration = Duration::from_secs(30);

/// Settings of the control plane.
pub(crate) type Settings = [(&'static str, &'static str); 2];

/// A node misses many heartbeats before it is taken for anything but online: no machine here is so busy.
pub(crate) const PATIENT: Settings =
    [("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "1"), ("ORCHESTRATORD_NODE_TIMEOUT_SECS", "60")];
/// What is cut off for some seconds is not offline yet.
const LASTING: Settings =
    [("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "1"), ("ORCHESTRATORD_NODE_TIMEOUT_SECS", "25")];
/// Nodes that are gone are soon offline.
const BRISK: Settings =
    [("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "1"), ("ORCHESTRATORD_NODE_TIMEOUT_SECS", "5")];

fn options(nodes: usize, pace_ms: u64, settings: Settings, network: Option<Arc<Network>>) -> Options {
    let engine = Engine::Fake { slots: 4, first_token_ms: 5, pace_ms, dialect: "llamacpp" };
    let control = settings.map(|(name, value)| (name, value.to_owned())).to_vec();
    Options { nodes, engine, control, network, ..Options::default() }
}

/// Runs a journey on the control plane's host, with so many nodes on theirs, each with an engine of four slots
/// and this pace. Not where networks cannot be made.
pub(crate) fn on_hosts(
    nodes: usize,
    pace_ms: u64,
    settings: Settings,
    journey: impl AsyncFnOnce(Arc<Network>, Cluster) + Send,
) {
    let make = |network| options(nodes, pace_ms, settings, Some(network));
    on_hosts_with(nodes, make, journey);
}

/// The same with options of its own.
fn on_hosts_with(
    nodes: usize,
    make: impl FnOnce(Arc<Network>) -> Options + Send,
    journey: impl AsyncFnOnce(Arc<Network>, Cluster) + Send,
) {
    if !is_possible() {
        return;
    }
    let network = Arc::new(Network::new(nodes));
    network.control.within(async || {
        let cluster = Cluster::start(make(Arc::clone(&network))).await;
        journey(Arc::clone(&network), cluster).await;
    });
}

/// Runs a journey on both grounds, one after the other.
fn on_both(
    what: &str,
    nodes: usize,
    pace_ms: u64,
    settings: Settings,
    journey: impl AsyncFn(Cluster) + Sync,
) {
    on_both_with(what, nodes, |network| options(nodes, pace_ms, settings, network), journey);
}

/// The same with options of its own, made for each ground.
#[expect(clippy::print_stdout, reason = "the figures of the run are its result")]
fn on_both_with(
    what: &str,
    nodes: usize,
    make: impl Fn(Option<Arc<Network>>) -> Options + Sync,
    journey: impl AsyncFn(Cluster) + Sync,
) {
    let start = Instant::now();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async { journey(Cluster::start(make(None)).await).await });
    let loopback = start.elapsed();
    on_hosts_with(nodes, |network| make(Some(network)), async |_, cluster| journey(cluster).await);
    let hosts = start.elapsed() - loopback;
    println!(
        "| {what} | 1 + {nodes} | loopback {:.1} s | hosts {:.1} s |",
        loopback.as_secs_f64(),
        hosts.as_secs_f64()
    );
}

/// All join by themselves and serve; one leaves, one is killed, the others go on.
async fn comes_and_goes(mut cluster: Cluster) {
    let nodes = cluster.nodes.len();
    let online = cluster.client.nodes().await;
    assert_eq!(online.iter().filter(|node| node.liveness == Liveness::Online).count(), nodes);
    for node in &online {
        let mut task = cluster.task(5);
        task["placement"] = json!({"mode": "pin", "node_id": node.node_id});
        let transcript = cluster.client.run(task).await;
        transcript.check();
        assert_eq!((transcript.node(), transcript.completed()), (Some(node.node_id.as_str()), true));
    }
    if nodes > 2 {
        cluster.nodes[0].daemon.as_mut().expect("a daemon").kill();
        cluster.wait_liveness(0, Liveness::Offline, PATIENCE).await;
        assert!(cluster.client.run(cluster.task(5)).await.completed());
        cluster.start_daemon(0);
        cluster.wait_online(0).await;
    }
    let last = nodes - 1;
    let leaving = cluster.nodes[last].daemon.take().expect("a daemon");
    leaving.signal(Signal::SIGTERM);
    let gone = async || (cluster.client.nodes().await.len() == last).then_some(());
    eventually("the node that left is not there", PATIENCE, gone).await;
    if last > 0 {
        assert!(cluster.client.run(cluster.task(5)).await.completed());
    }
}

// CLOUD-2785
#[test]
fn nodes_join_serve_leave_and_are_missed() {
    on_both("join, serve, die, leave", 1, 2, BRISK, comes_and_goes);
    on_both("join, serve, die, leave", 2, 2, BRISK, comes_and_goes);
    on_both("join, serve, die, leave", 5, 2, BRISK, comes_and_goes);
}

/// A thousand tasks that are all different, one after the other and side by side: each node gets its share.
pub(crate) async fn gives_each_its_share(cluster: Cluster) {
    const TASKS: usize = 1_000;
    let nodes = cluster.nodes.len();
    let run = async |n: usize| {
        let mut task = cluster.task(2);
        task["prompt"] = json!(format!("task {n} of its own"));
        let transcript = cluster.client.run(task).await;
        assert!(transcript.completed(), "{:?}", transcript.error());
        transcript.node().expect("a node").to_owned()
    };
    for (how, at_once) in [("one after the other", 1), ("side by side", nodes * 2)] {
        let placed = futures::stream::iter(0..TASKS).map(&run).buffer_unordered(at_once);
        let mut shares: BTreeMap<String, usize> = BTreeMap::new();
        placed.collect::<Vec<_>>().await.into_iter().for_each(|node| *shares.entry(node).or_default() += 1);
        let ideal = TASKS / nodes;
        let fair = shares.values().all(|share| share.abs_diff(ideal) * 10 <= ideal);
        assert!(fair && shares.len() == nodes, "{how}: {shares:?}");
    }
}

/// Streams that may be continued: each is whole, whatever happens to nodes meanwhile.
async fn unharmed(cluster: &Cluster, tokens: u32, harm: impl AsyncFnOnce()) {
    const STREAMS: usize = 8;
    let streams = (0..STREAMS).map(|_| {
        let (client, mut task) = (cluster.client.clone(), cluster.task(tokens));
        task["recovery"] = json!("continue");
        tokio::task::spawn(async move { client.run(task).await })
    });
    let streams: Vec<_> = streams.collect();
    eventually("all run", PATIENCE, || async {
        let running: usize =
            cluster.client.nodes().await.iter().map(|node| node.running_attempts.len()).sum();
        (running == STREAMS).then_some(())
    })
    .await;
    harm().await;
    for transcript in join_all(streams).await {
        let transcript = transcript.expect("a client does not panic");
        transcript.check();
        assert!(transcript.completed(), "{:?}", transcript.error());
        assert_eq!(transcript.tokens().len(), tokens as usize);
    }
}

// CLOUD-2786
#[test]
#[expect(clippy::print_stdout, reason = "the figures of the run are its result")]
fn a_network_that_is_parted_in_any_way_ends_no_stream_that_may_go_on() {
    on_hosts(4, 50, LASTING, async |network, cluster| {
        for (what, way) in [
            ("of one node, what it sends", Way::FromNode(0)),
            ("of one node, what it is sent", Way::ToNode(0)),
            ("of the control plane, what it sends", Way::FromControl),
            ("of the control plane, what it is sent", Way::ToControl),
        ] {
            let start = Instant::now();
            unharmed(&cluster, 100, async || {
                network.cut_way(way);
                match way {
                    Way::FromNode(n) | Way::ToNode(n) => drop(cluster.wait_not_online(n, PATIENCE).await),
                    // Longer than links live that are cut, so that what runs must go on elsewhere or wait.
                    Way::FromControl | Way::ToControl => tokio::time::sleep(Duration::from_secs(12)).await,
                }
                network.mend_way();
            })
            .await;
            for n in 0..4 {
                cluster.wait_online(n).await;
            }
            println!("| lost, {what} | 1 + 4 | hosts {:.1} s |", start.elapsed().as_secs_f64());
        }
        let start = Instant::now();
        unharmed(&cluster, 100, async || {
            network.unplug_node(1);
            network.unplug_node(3);
            cluster.wait_not_online(1, PATIENCE).await;
            cluster.wait_not_online(3, PATIENCE).await;
        })
        .await;
        for n in [1, 3] {
            network.plug_node(n);
            cluster.wait_online(n).await;
        }
        println!("| half of the nodes away | 1 + 4 | hosts {:.1} s |", start.elapsed().as_secs_f64());
    });
}

/// Clients that ask without a pause until they are stopped, and repeat what was refused: 503, no connection, or
/// one that ends before anything of an answer came. An answer that begins must end well.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    clients: Vec<tokio::task::JoinHandle<usize>>,
}

impl Load {
    fn start(client: &Client, task: &serde_json::Value, clients: usize) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let clients = (0..clients).map(|_| {
            let (client, task) = (client.clone(), task.clone());
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            tokio::spawn(async move {
                let mut refused = 0;
                while !stop.load(Ordering::Relaxed) {
                    let request = client.request(Method::POST, "/v2/tasks").json(&task);
                    let response = match request.header("accept", "text/event-stream").send().await {
                        Ok(response) if response.status() == StatusCode::SERVICE_UNAVAILABLE => None,
                        Ok(response) => Some(response),
                        Err(error) if error.is_connect() || error.is_request() => None,
                        Err(error) => panic!("{error:?}"),
                    };
                    let Some(response) = response else {
                        refused += 1;
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    };
                    assert!(response.status().is_success(), "{}", response.status());
                    let text = response.text().await.expect("a whole stream");
                    assert!(text.contains("event: end") && !text.contains("event: error"), "{text}");
                    done.fetch_add(1, Ordering::Relaxed);
                }
                refused
            })
        });
        let clients = clients.collect();
        Self { stop, done, clients }
    }

    /// Waits until so many more have ended well.
    async fn more(&self, tasks: usize) {
        let wanted = self.done.load(Ordering::Relaxed) + tasks;
        eventually("tasks end", PATIENCE, || async {
            (self.done.load(Ordering::Relaxed) >= wanted).then_some(())
        })
        .await;
    }

    /// Returns how many ended well, and how many were refused.
    async fn end(self) -> (usize, usize) {
        self.stop.store(true, Ordering::Relaxed);
        let refused = join_all(self.clients).await.into_iter().map(|client| client.expect("no client fails"));
        (self.done.load(Ordering::Relaxed), refused.sum())
    }
}

/// Each node in turn is told to stop, and started again, while clients go on asking.
async fn rolls(mut cluster: Cluster) {
    let load = Load::start(&cluster.client, &cluster.task(20), 8);
    for n in 0..cluster.nodes.len() {
        load.more(20).await;
        let daemon = cluster.nodes[n].daemon.as_mut().expect("a daemon");
        daemon.signal(Signal::SIGTERM);
        let status = wait_beside(daemon).await;
        assert!(status.success(), "{status}");
        cluster.start_daemon(n);
        cluster.wait_online(n).await;
    }
    load.more(20).await;
    let (done, refused) = load.end().await;
    assert!(
        done >= 20 * (cluster.nodes.len() + 1) && refused == 0,
        "{done} ended well, {refused} were refused"
    );
}

/// Its end, while clients on this thread go on.
async fn wait_beside(daemon: &mut e2e_cloud::Process) -> std::process::ExitStatus {
    let pid = daemon.pid();
    eventually("it ends", PATIENCE, || async {
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        state.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z')).then_some(())
    })
    .await;
    daemon.wait(PATIENCE)
}

// CLOUD-2787
#[test]
fn every_node_is_restarted_under_load_without_a_failed_task() {
    let _alone = ALONE.blocking_read();
    on_both("rolling restart of all nodes", 3, 20, PATIENT, rolls);
}

/// The control plane is told to stop, and started again, while clients repeat what was refused.
async fn restarts(mut cluster: Cluster) {
    let load = Load::start(&cluster.client, &cluster.task(20), 8);
    for _ in 0..3 {
        load.more(20).await;
        let control = cluster.control.as_mut().expect("it runs");
        control.signal(Signal::SIGTERM);
        let status = wait_beside(control).await;
        assert!(status.success(), "{status}");
        // Whatever it had accepted, also what no client heard of.
        let log = control.log();
        let ended: Vec<&str> = log.lines().filter(|line| line.contains("a task ended")).collect();
        let bad = ended.iter().find(|line| !line.contains("state=Completed"));
        assert!(ended.len() >= 20 && bad.is_none(), "{} ended, {bad:?}", ended.len());
        cluster.start_control();
    }
    load.more(20).await;
    let (done, refused) = load.end().await;
    assert!(done >= 80 && refused > 0, "{done} ended well, {refused} were refused");
}

// CLOUD-2787
#[test]
fn the_control_plane_is_restarted_under_clients_that_repeat_and_no_accepted_task_fails() {
    let _alone = ALONE.blocking_read();
    on_both("restarts of the control plane", 2, 20, PATIENT, restarts);
}

/// The files of tokens of a cluster's daemons, one a daemon.
struct TokenFiles {
    folder: tempfile::TempDir,
    nodes: usize,
}

impl TokenFiles {
    fn of(&self, daemon: &str) -> PathBuf {
        self.folder.path().join(daemon)
    }

    /// As the journeys name the daemons' logs too.
    fn daemons(&self) -> impl Iterator<Item = String> {
        let nodes = (1..=self.nodes).map(|n| format!("gpu-node-{n}"));
        std::iter::once("orchestratord".to_owned()).chain(nodes)
    }

    /// In one step, as an operator's tool writes it.
    fn set(&self, daemon: &str, tokens: &[&str]) {
        let path = self.of(daemon);
        let draft = path.with_extension("new");
        std::fs::write(&draft, tokens.join("\n")).expect("a file of tokens");
        std::fs::rename(draft, path).expect("a file of tokens");
    }

    /// A cluster whose daemons all know one token.
    fn options(&self, token: &str, network: Option<Arc<Network>>) -> Options {
        self.daemons().for_each(|daemon| self.set(&daemon, &[token]));
        let file = |daemon: &str| self.of(daemon).display().to_string();
        let mut options = options(self.nodes, 20, PATIENT, network);
        options.control.push(("LLORCH_API_TOKEN_FILE", file("orchestratord")));
        let nodes = self.daemons().skip(1).enumerate();
        options.node = nodes.map(|(n, daemon)| (n, "LLORCH_API_TOKEN_FILE", file(&daemon))).collect();
        options
    }
}

/// A new token takes the place of the old one, step by step (known, sent, alone), under a stream that lives through
/// all of it and clients that ask all the time.
async fn rotates(files: &TokenFiles, mut cluster: Cluster) {
    let (old, new) = (TOKEN, "test-token-that-is-new");
    let pids = |cluster: &Cluster| -> Vec<u32> {
        let nodes = cluster.nodes.iter().map(|node| node.daemon.as_ref());
        let all = std::iter::once(cluster.control.as_ref()).chain(nodes);
        all.map(|daemon| daemon.expect("it runs").pid()).collect()
    };
    let before = pids(&cluster);
    let urls = (0..files.nodes).map(|n| cluster.node_client(n).base);
    let urls: Vec<String> = std::iter::once(cluster.client.base.clone()).chain(urls).collect();
    // Longer than all of it.
    let mut long = cluster.task(10_000);
    let long_id = uuid::Uuid::new_v4();
    long["task_id"] = json!(long_id);
    let long = {
        let client = cluster.client.clone();
        tokio::spawn(async move { client.run(long).await })
    };
    let with_old = Load::start(&cluster.client, &cluster.task(2), 2);
    let all_answer = async |token: &str, wanted: StatusCode| {
        for url in &urls {
            let client = Client::new(url, Some(token));
            eventually("the tokens are as the file says", PATIENCE, || async {
                (client.get("/metrics").await.ok()?.status() == wanted).then_some(())
            })
            .await;
        }
    };
    // The new one is known everywhere before anybody sends it.
    files.daemons().for_each(|daemon| files.set(&daemon, &[old, new]));
    all_answer(new, StatusCode::OK).await;
    with_old.more(10).await;
    files.daemons().for_each(|daemon| files.set(&daemon, &[new, old]));
    cluster.client.token = Some(new.to_owned());
    let with_new = Load::start(&cluster.client, &cluster.task(2), 2);
    let taken = |daemon: &str| {
        let text = std::fs::read_to_string(cluster.log(daemon)).unwrap_or_default();
        text.matches("the file of tokens is read again").count()
    };
    eventually("all send the new one", PATIENCE, || async {
        files.daemons().all(|daemon| taken(&daemon) == 2).then_some(())
    })
    .await;
    let (done, refused) = with_old.end().await;
    assert!(done >= 10 && refused == 0, "{done} ended well, {refused} were refused");
    files.daemons().for_each(|daemon| files.set(&daemon, &[new]));
    all_answer(old, StatusCode::UNAUTHORIZED).await;
    // Tasks go on with the new one alone, and so do the nodes' reports.
    with_new.more(10).await;
    let (done, refused) = with_new.end().await;
    assert!(done >= 10 && refused == 0, "{done} ended well, {refused} were refused");
    for node in cluster.client.nodes().await {
        eventually("a report is taken", PATIENCE, || async {
            let now = cluster.client.node(node.node_id.as_str()).await?;
            (now.report_seq > node.report_seq).then_some(())
        })
        .await;
    }
    let shown = cluster.client.get(&format!("/v2/tasks/{long_id}")).await.expect("an answer");
    let shown: serde_json::Value = shown.json().await.expect("a task");
    let before_cancel = shown["tokens_out"].as_u64().expect("tokens so far");
    let cancel = cluster.client.request(Method::POST, &format!("/v2/tasks/{long_id}/cancel")).send().await;
    assert_eq!(cancel.expect("an answer").status(), StatusCode::NO_CONTENT);
    let long = long.await.expect("a client does not panic");
    long.check();
    assert_eq!((long.error(), long.starts()), (Some("CANCELED"), 1));
    assert!(long.tokens().len() as u64 >= before_cancel && before_cancel > 0, "{before_cancel}");
    assert_eq!(pids(&cluster), before);
    let with_old = Client::new(&urls[0], Some(old)).get("/v2/nodes").await.expect("an answer");
    assert_eq!(with_old.status(), StatusCode::UNAUTHORIZED);
}

// CLOUD-2502
#[test]
fn tokens_are_rotated_without_a_failed_request_and_without_a_restart() {
    let files = TokenFiles { folder: tempfile::tempdir().expect("a folder"), nodes: 2 };
    let make = |network| files.options(TOKEN, network);
    on_both_with("token rotation", files.nodes, make, async |cluster| rotates(&files, cluster).await);
}

// CLOUD-2785
#[test]
fn a_thousand_tasks_are_shared_evenly_on_loopback() {
    // On hosts: `success::placement_considers_all_nodes_and_gives_each_its_share`.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime
        .block_on(async { gives_each_its_share(Cluster::start(options(5, 2, PATIENT, None)).await).await });
}
