//! Seen from outside: what both daemons show to Prometheus, the files in `deploy` that make something of it, and
//! by what a task is found again. Prometheus and `promtool` are Debian's.

pub(crate) mod dashboards;
mod document;
mod logs;
mod outages;
mod rules;
mod table;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use e2e_cloud::cluster::TOKEN;
use e2e_cloud::{Client, Cluster, Options, Process, eventually};
use nix::sys::signal::Signal;
use reqwest::{Method, Url};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(30);

/// The folder of the shipped files.
fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/prometheus")
}

/// Whether Prometheus is on this machine. Where it is not, that is said, and in CI it is a failure.
fn has_prometheus() -> bool {
    let is_there = |name: &&str| {
        let tried = Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        tried.is_ok_and(|status| status.success())
    };
    let lacks: Vec<&str> = ["prometheus", "promtool"].into_iter().filter(|name| !is_there(name)).collect();
    if lacks.is_empty() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "CI must scrape, and lacks {}", lacks.join(", "));
    e2e_cloud::left_out(&format!("nothing is scraped: this machine lacks {}", lacks.join(", ")));
    false
}

/// A Prometheus with the shipped files, which scrapes this cluster.
struct Prometheus {
    client: Client,
    _process: Process,
}

impl Prometheus {
    fn start(cluster: &Cluster) -> Self {
        Self::start_tls(cluster, None)
    }

    /// The same, with this authority where the cluster speaks TLS: then it scrapes each second.
    fn start_tls(cluster: &Cluster, ca: Option<&Path>) -> Self {
        let folder = cluster.dir.path().join("prometheus");
        std::fs::create_dir(&folder).expect("a folder");
        let mut config = std::fs::read_to_string(deploy().join("prometheus.yml")).expect("the shipped file");
        assert_eq!(config.matches("orchestratord:8080").count(), 2);
        config = config.replace("orchestratord:8080", &format!("127.0.0.1:{}", cluster.port));
        if let Some(ca) = ca {
            let tls = format!("tls_config: {{ca_file: {}}}", ca.display());
            for job in ["orchestratord", "pool-managerd"] {
                let name = format!("job_name: {job}\n");
                config = config.replace(&name, &format!("{name}    scheme: https\n    {tls}\n"));
            }
            let refresh = "        refresh_interval: 10s\n";
            config = config.replace(refresh, &format!("{refresh}        {tls}\n"));
            config = config.replace("url: http:", "url: https:").replace("10s", "1s");
        }
        std::fs::write(folder.join("prometheus.yml"), config).expect("a file");
        std::fs::write(folder.join("token"), TOKEN).expect("a file");
        std::fs::copy(deploy().join("rules.yml"), folder.join("rules.yml")).expect("the shipped file");
        let port = e2e_cloud::process::free_port();
        let mut command = Command::new("prometheus");
        command
            .arg(format!("--config.file={}", folder.join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"));
        let process = Process::start(command, &cluster.log("prometheus"));
        Self { client: Client::new(&format!("http://127.0.0.1:{port}"), None), _process: process }
    }

    /// The series that a query finds: their labels and values.
    async fn query(&self, query: &str) -> Option<Vec<(Value, f64)>> {
        let url = format!("{}/api/v1/query", self.client.base);
        let url = Url::parse_with_params(&url, [("query", query)]).expect("a URL");
        let path = format!("{}?{}", url.path(), url.query().unwrap_or_default());
        let answer = self.client.get_json(&path).await?;
        assert_eq!(answer["status"], "success", "{query}: {answer}");
        let found = answer["data"]["result"].as_array()?.iter().map(|series| {
            let value = series["value"][1].as_str().and_then(|value| value.parse().ok());
            (series["metric"].clone(), value.expect("a number"))
        });
        Some(found.collect())
    }

    /// The nodes that are scraped with success.
    async fn nodes_up(&self) -> Option<BTreeSet<String>> {
        let up = self.query("up{job=\"pool-managerd\"} == 1").await?;
        Some(up.iter().filter_map(|(labels, _)| Some(labels["instance"].as_str()?.to_owned())).collect())
    }
}

/// The value of the one series of this name that has all these labels.
pub(crate) async fn value(client: &Client, name: &str, labels: &[&str]) -> Option<f64> {
    let page = client.get("/metrics").await.ok()?.text().await.ok()?;
    let mut found = page.lines().filter(|line| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|label| line.contains(label))
    });
    found.next()?.rsplit(' ').next()?.parse().ok()
}

// CLOUD-2715
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prometheus_finds_nodes_that_join_and_loses_those_that_leave_within_30_s() {
    if !has_prometheus() {
        return;
    }
    let mut cluster = Cluster::start(Options { nodes: 2, ..Options::default() }).await;
    let prometheus = Prometheus::start(&cluster);
    let id = |n: usize| cluster.nodes[n].id.clone();
    let (first, second) = (id(0), id(1));
    let are_up = async |nodes: &[&String]| {
        let wanted: BTreeSet<String> = nodes.iter().map(ToString::to_string).collect();
        eventually(&format!("{wanted:?} are scraped"), PATIENCE, || async {
            prometheus.nodes_up().await.filter(|up| *up == wanted)
        })
        .await
    };
    are_up(&[&first, &second]).await;
    cluster.client.run(cluster.task(3)).await.check();
    cluster.add_node(2);
    cluster.wait_online(2).await;
    let third = cluster.nodes[2].id.clone();
    are_up(&[&first, &second, &third]).await;
    let left = &mut cluster.nodes[1].daemon.take().expect("a daemon");
    left.signal(Signal::SIGTERM);
    left.wait(PATIENCE);
    are_up(&[&first, &third]).await;
    // Both ways: what the control plane says of a node, and what the node says of itself.
    for (query, nodes) in [
        ("llorch_node_up == 1", vec![&first, &third]),
        ("llorch_node_expected", vec![&first, &second, &third]),
        ("llorch_agent_registered == 1", vec![&first, &third]),
    ] {
        let shows = async || {
            let found = prometheus.query(query).await?;
            let ids: BTreeSet<&str> =
                found.iter().filter_map(|(labels, _)| labels["node_id"].as_str()).collect();
            (ids == nodes.iter().map(|id| id.as_str()).collect()).then_some(())
        };
        eventually(query, PATIENCE, shows).await;
    }
    let missed = async || {
        let found = prometheus.query("ALERTS{alertname=\"NodeMissing\"}").await?;
        found.iter().any(|(labels, _)| labels["node_id"] == second.as_str()).then_some(())
    };
    eventually("the node that left is missed", PATIENCE, missed).await;
    let forget = format!("/v2/nodes/{second}?forget=true");
    let forgotten = cluster.client.request(Method::DELETE, &forget).send().await.unwrap();
    assert_eq!(forgotten.status(), 204);
    assert_eq!(value(&cluster.client, "llorch_node_expected", &[&second]).await, None);
    cluster.control.as_mut().expect("a control plane").kill();
    cluster.start_control();
    cluster.wait_online(2).await;
    let expected = async |id: &str| value(&cluster.client, "llorch_node_expected", &[id]).await;
    assert_eq!((expected(&third).await, expected(&second).await), (Some(1.0), None), "over a restart");
}

// CLOUD-2711
// CLOUD-2712
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_tasks_have_waited_cost_and_come_to_is_counted_once_for_both_apis() {
    let options = Options {
        nodes: 1,
        control: vec![("ORCHESTRATORD_METRICS_CALLERS", "true".into())],
        ..Options::default()
    };
    let cluster = Cluster::start(options).await;
    let client = &cluster.client;
    cluster.client.run(cluster.task(7)).await.check();
    let chat = json!({"model": cluster.options.engine.model(), "max_tokens": 5, "stream": true,
        "messages": [{"role": "user", "content": "hello"}]});
    let chatted = client.post("/v1/chat/completions", &chat).await;
    assert_eq!(chatted.status(), 200);
    let text = chatted.text().await.unwrap();
    let events =
        text.lines().filter(|line| line.starts_with("data: {") && line.contains("\"content\":\"")).count();
    let model = format!("model=\"{}\"", cluster.options.engine.model());
    let ended = ["outcome=\"completed\"", "code=\"none\"", "fault=\"none\"", &model];
    let both = async || (value(client, "llorch_tasks_ended_total", &ended).await? == 2.0).then_some(());
    eventually("both tasks are counted", PATIENCE, both).await;
    for name in [
        "llorch_queue_wait_seconds_count",
        "llorch_time_to_first_token_seconds_count",
        "llorch_task_duration_seconds_count",
        "llorch_hop_seconds_count",
        "llorch_placement_seconds_count",
    ] {
        assert_eq!(value(client, name, &[]).await, Some(2.0), "{name}");
    }
    let out = value(client, "llorch_tokens_out_total", &[&model]).await.expect("tokens");
    assert!(events >= 5 && out == 12.0, "{out} tokens are counted, {events} events came: {text}");
    let gaps = value(client, "llorch_inter_token_seconds_count", &[&model]).await.expect("gaps");
    assert!((1.0..=11.0).contains(&gaps), "{gaps} gaps between arrivals");
    let waits = client.post("/v2/tasks", &json!({"model_ref": "invented", "prompt": "x"})).await;
    assert_eq!(waits.status(), 202);
    let waiting = async || {
        let found =
            value(client, "llorch_queue_tasks", &["model=\"other\"", "interactive"]).await == Some(1.0);
        let stuck = value(client, "llorch_tasks_unplaceable", &[]).await == Some(1.0);
        (found && stuck && value(client, "llorch_tasks_oldest_waiting_seconds", &[]).await? > 0.0)
            .then_some(())
    };
    eventually("a task that waits for what nobody has is seen", PATIENCE, waiting).await;
    let page = client.get("/metrics").await.unwrap().text().await.unwrap();
    assert!(!page.contains("invented"), "{page}");
    let calls = ["route=\"/v2/tasks\"", "method=\"POST\"", "status=\"202\""];
    assert_eq!(value(client, "llorch_http_request_duration_seconds_count", &calls).await, Some(1.0));
    assert!(
        page.contains("\nllorch_caller_tasks_ended_total{caller=\"") && page.contains("\nprocess_open_fds ")
    );
}

// CLOUD-2696
// CLOUD-2697
// CLOUD-2698
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_is_found_by_its_correlation_id_in_lists_and_the_audit_log_and_who_is_refused_in_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let audit = folder.path().join("audit.log");
    let control = vec![("LLORCH_AUDIT_LOG", audit.display().to_string())];
    let cluster = Cluster::start(Options { nodes: 1, control, ..Options::default() }).await;
    let client = &cluster.client;
    for id in ["order-1", "order-2"] {
        let request = client.request(Method::POST, "/v2/tasks").header("x-correlation-id", id);
        let accepted = request.json(&cluster.task(2)).send().await.unwrap();
        assert_eq!(accepted.status(), 202);
    }
    let found = client.get_json("/v2/tasks?correlation_id=order-2").await.unwrap();
    let tasks = found["tasks"].as_array().unwrap();
    assert_eq!((tasks.len(), &tasks[0]["correlation_id"]), (1, &json!("order-2")), "{found}");
    let (id, caller) =
        (tasks[0]["task_id"].as_str().unwrap(), tasks[0]["caller"].as_str().expect("a caller"));
    let view = client.get_json(&format!("/v2/tasks/{id}")).await.unwrap();
    assert_eq!((view["correlation_id"].as_str(), view["caller"].as_str()), (Some("order-2"), Some(caller)));
    let of_nobody = client.get_json("/v2/tasks?caller=nobody").await.unwrap();
    assert_eq!(of_nobody["tasks"], json!([]));
    let of_caller = client.get_json(&format!("/v2/tasks?caller={caller}")).await.unwrap();
    assert_eq!(of_caller["tasks"].as_array().unwrap().len(), 2);
    let written = || async {
        let text = std::fs::read_to_string(&audit).ok()?;
        let mut lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.find(|line| line["correlation_id"] == "order-2" && line["task_id"] == id).map(drop)
    };
    eventually("the audit log names the task", PATIENCE, written).await;
    let stranger = Client::new(&client.base, Some("no-such-token-of-ours"));
    for _ in 0..5 {
        assert_eq!(stranger.post("/v2/nodes/register", &json!({})).await.status(), 401);
    }
    let lines = || {
        let log = cluster.control.as_ref().expect("a control plane").log();
        log.lines()
            .filter(|line| line.contains("127.0.0.1 was refused on /v2/nodes/register: BAD_TOKEN"))
            .count()
    };
    eventually("the log names who was refused", PATIENCE, || async { (lines() > 0).then_some(()) }).await;
    assert_eq!(lines(), 1, "once a minute");
}
