//! Who gets in: every route with every kind of token, certificates. How tokens change: `hosts.rs`.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use e2e_cloud::cluster::TOKEN;
use e2e_cloud::process::{free_port, program};
use e2e_cloud::{Client, Cluster, Options, eventually};
use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use test_certs::{TestCa, Validity};

/// What a route needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    Open,
    Any,
    Client,
    /// A client, or an operator.
    Look,
    Node,
    /// What the control plane asks of its nodes.
    Control,
    Operator,
    Admin,
}

pub(crate) const CONTROL_PLANE: &[(&str, Need)] = &[
    ("DELETE /v2/catalog/models/{model_id}", Need::Admin),
    ("DELETE /v2/nodes/{node_id}", Need::Node),
    ("DELETE /v2/sessions/{session_id}", Need::Client),
    ("GET /docs", Need::Open),
    ("GET /health/live", Need::Open),
    ("GET /health/ready", Need::Open),
    ("GET /metrics", Need::Any),
    ("GET /nowhere", Need::Any),
    ("GET /openapi.json", Need::Any),
    ("GET /v1/models", Need::Look),
    ("GET /v1/models/{model}", Need::Look),
    ("GET /v2/artifacts/{digest}", Need::Client),
    ("GET /v2/catalog/availability", Need::Look),
    ("GET /v2/catalog/models", Need::Look),
    ("GET /v2/catalog/models/{model_id}", Need::Look),
    ("GET /v2/events", Need::Look),
    ("GET /v2/meta/capabilities", Need::Any),
    ("GET /v2/meta/version", Need::Any),
    ("GET /v2/nodes", Need::Look),
    ("GET /v2/nodes/{node_id}", Need::Look),
    ("GET /v2/observability/targets", Need::Any),
    ("GET /v2/pools", Need::Look),
    ("GET /v2/pools/{pool_id}/health", Need::Look),
    ("GET /v2/pools/{pool_id}/logs", Need::Operator),
    ("GET /v2/sessions/{session_id}", Need::Look),
    ("GET /v2/tasks", Need::Look),
    ("GET /v2/tasks/{task_id}", Need::Look),
    ("GET /v2/tasks/{task_id}/events", Need::Client),
    ("GET /v2/tasks/{task_id}/explain", Need::Look),
    ("POST /apply-template", Need::Client),
    ("POST /detokenize", Need::Client),
    ("POST /tokenize", Need::Client),
    ("POST /v1/chat/completions", Need::Client),
    ("POST /v1/completions", Need::Client),
    ("POST /v1/embeddings", Need::Client),
    ("POST /v1/messages", Need::Client),
    ("POST /v1/messages/count_tokens", Need::Client),
    ("POST /v1/rerank", Need::Client),
    ("POST /v1/responses", Need::Client),
    ("POST /v2/artifacts", Need::Client),
    ("POST /v2/catalog/models", Need::Admin),
    ("POST /v2/catalog/models/{model_id}/state", Need::Admin),
    ("POST /v2/catalog/models/{model_id}/verify", Need::Admin),
    ("POST /v2/nodes/register", Need::Node),
    ("POST /v2/nodes/{node_id}/drain", Need::Operator),
    ("POST /v2/nodes/{node_id}/heartbeat", Need::Node),
    ("POST /v2/nodes/{node_id}/resume", Need::Operator),
    ("POST /v2/placement/explain", Need::Look),
    ("POST /v2/pools/{pool_id}/drain", Need::Operator),
    ("POST /v2/pools/{pool_id}/purge", Need::Admin),
    ("POST /v2/pools/{pool_id}/reload", Need::Operator),
    ("POST /v2/tasks", Need::Client),
    ("POST /v2/tasks/{task_id}/cancel", Need::Look),
    ("PUT /v2/log-level", Need::Admin),
];

const NODE: &[(&str, Need)] = &[
    ("GET /health/live", Need::Open),
    ("GET /health/ready", Need::Open),
    ("GET /metrics", Need::Any),
    ("GET /v2/link", Need::Control),
    ("GET /v2/models", Need::Control),
    ("GET /v2/pools", Need::Control),
    ("GET /v2/pools/{pool_id}/logs", Need::Control),
    ("GET /v2/pools/{pool_id}/status", Need::Control),
    ("POST /v2/attempts", Need::Control),
    ("POST /v2/attempts/control", Need::Control),
    ("POST /v2/attempts/{attempt_id}", Need::Control),
    ("POST /v2/intent", Need::Control),
    ("POST /v2/pools/{pool_id}/drain", Need::Control),
    ("POST /v2/pools/{pool_id}/infer", Need::Control),
    ("POST /v2/pools/{pool_id}/load", Need::Control),
    ("POST /v2/pools/{pool_id}/purge", Need::Control),
    ("POST /v2/pools/{pool_id}/reload", Need::Control),
    ("POST /v2/slotless", Need::Control),
    ("PUT /v2/log-level", Need::Admin),
];

/// Routes that stand in no document.
const UNDOCUMENTED: [&str; 3] = ["GET /docs", "GET /nowhere", "GET /openapi.json"];

const CLIENT_TOKEN: &str = "test-token-of-a-client";
const NODE_TOKEN: &str = "test-token-of-node-7";
const OTHER_NODE_TOKEN: &str = "test-token-of-node-8";
const OPERATOR_TOKEN: &str = "test-token-of-an-operator";
const METRICS_TOKEN: &str = "test-token-of-prometheus";
const CONTROL_TOKEN: &str = "test-token-of-the-control-plane";
const EXPIRED_TOKEN: &str = "test-token-expired";

fn token_file() -> String {
    let entry = |name: &str, token: &str, rest: &str| {
        format!("[[token]]\nname = \"{name}\"\ntoken = \"{token}\"\n{rest}\n")
    };
    entry("admin", TOKEN, "scopes = [\"admin\"]")
        + &entry("control", CONTROL_TOKEN, "scopes = [\"control\"]")
        + &entry("client", CLIENT_TOKEN, "scopes = [\"client\"]")
        + &entry("operator", OPERATOR_TOKEN, "scopes = [\"operator\"]")
        + &entry("metrics", METRICS_TOKEN, "scopes = [\"metrics\"]")
        + &entry("seven", NODE_TOKEN, "scopes = [\"node\"]\nnode_id = \"gpu-node-7\"")
        + &entry("eight", OTHER_NODE_TOKEN, "scopes = [\"node\"]\nnode_id = \"gpu-node-8\"")
        + &entry("old", EXPIRED_TOKEN, "scopes = [\"admin\"]\nexpires = 2026-01-01T00:00:00Z")
}

/// The operations of a document of ours, as `METHOD /path`.
fn operations(document: &Value) -> BTreeSet<String> {
    let paths = document["paths"].as_object().expect("a document has paths");
    let of = |(path, item): (&String, &Value)| {
        let methods = item.as_object().expect("a path has operations").keys();
        methods.map(|method| format!("{} {path}", method.to_uppercase())).collect::<Vec<_>>()
    };
    paths.iter().flat_map(of).collect()
}

/// The path with its parameter filled in.
fn filled(path: &str, id: &str) -> String {
    match path.split_once('{').and_then(|(before, rest)| Some((before, rest.split_once('}')?.1))) {
        Some((before, after)) => format!("{before}{id}{after}"),
        None => path.to_owned(),
    }
}

async fn ask(base: &str, operation: &str, token: Option<&str>) -> (u16, Option<String>, Value) {
    let (method, path) = operation.split_once(' ').expect("a method and a path");
    let id = match path {
        _ if path.contains("/nodes/") => "gpu-node-7",
        _ => "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11",
    };
    let mut client = Client::new(base, None);
    client.token = token.map(str::to_owned);
    let mut request = client.request(method.parse::<Method>().unwrap(), &filled(path, id));
    if method == "POST" {
        request = request.json(&json!({
            "node_id": "gpu-node-7", "machine_id": "m", "boot_id": "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11",
            "address": "http://127.0.0.1:1", "version": "0",
        }));
    }
    let response = request.timeout(Duration::from_secs(10)).send().await.expect("an answer");
    let status = response.status().as_u16();
    let challenge =
        response.headers().get("www-authenticate").map(|value| value.to_str().unwrap().to_owned());
    // Under `/v1` the body has the shape of another API.
    let ours = response.headers().get("x-llorch-error").map(|code| code.to_str().unwrap().to_owned());
    // Streams have no end: only refusals are read.
    let mut body = if [401, 403].contains(&status) { response.json().await.unwrap() } else { Value::Null };
    if let Some(code) = ours {
        body["code"] = code.into();
    }
    (status, challenge, body)
}

/// Asks the operation with every kind of token.
async fn check(base: &str, operation: &str, need: Need) {
    let cases = [
        ("none", None),
        ("bad", Some("test-token-nobody-knows")),
        ("expired", Some(EXPIRED_TOKEN)),
        ("client", Some(CLIENT_TOKEN)),
        ("node", Some(NODE_TOKEN)),
        ("control", Some(CONTROL_TOKEN)),
        ("operator", Some(OPERATOR_TOKEN)),
        ("metrics", Some(METRICS_TOKEN)),
        ("admin", Some(TOKEN)),
        ("wrong node", Some(OTHER_NODE_TOKEN)),
    ];
    for (kind, token) in cases {
        let (status, challenge, body) = ask(base, operation, token).await;
        let code = body["code"].as_str();
        let expected = match (need, kind) {
            (Need::Open, _) => None,
            (_, "none") => Some((401, "MISSING_TOKEN")),
            (_, "bad" | "expired") => Some((401, "BAD_TOKEN")),
            (Need::Any, _) | (_, "admin") => None,
            (Need::Client | Need::Look, "client") | (Need::Look | Need::Operator, "operator") => None,
            (Need::Node, "node") | (Need::Control, "control") => None,
            _ => Some((403, "FORBIDDEN")),
        };
        match expected {
            Some((wanted, wanted_code)) => {
                assert_eq!((status, code), (wanted, Some(wanted_code)), "{operation}, token {kind}: {body}");
                assert_eq!(challenge.is_some(), wanted == 401, "{operation}, token {kind}");
            }
            None => assert!(![401, 403].contains(&status), "{operation}, token {kind}: {status} {body}"),
        }
    }
}

// CLOUD-2501
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_route_lets_through_whom_it_should_and_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.toml");
    std::fs::write(&file, token_file()).unwrap();
    let path = file.display().to_string();
    let cluster = Cluster::start(Options {
        nodes: 1,
        control: vec![("LLORCH_API_TOKEN_FILE", path.clone())],
        node: vec![(0, "LLORCH_API_TOKEN_FILE", path)],
        ..Options::default()
    })
    .await;
    let document = cluster.client.get_json("/openapi.json").await.unwrap();
    let printed = Command::new(program("pool-managerd")).arg("--print-openapi").output().unwrap();
    let of_node: Value = serde_json::from_slice(&printed.stdout).unwrap();
    let node = cluster.node_client(0).base;
    for (base, document, table) in [(&cluster.client.base, &document, CONTROL_PLANE), (&node, &of_node, NODE)]
    {
        let mut routes = operations(document);
        if table == CONTROL_PLANE {
            routes.extend(UNDOCUMENTED.map(str::to_owned));
        }
        let rows: BTreeSet<String> = table.iter().map(|(operation, _)| (*operation).to_owned()).collect();
        assert_eq!(rows, routes, "each route has its row, and each row its route");
        // The node's turn as a drained one comes last: what is asked here must not matter.
        join_all(table.iter().map(|(operation, need)| check(base, operation, *need))).await;
    }
    let metrics = cluster.client.get("/metrics").await.unwrap().text().await.unwrap();
    assert!(
        metrics.contains("llorch_refused_calls_total{code=\"FORBIDDEN\",route=\"/v2/nodes/register\"} "),
        "{metrics}"
    );
}

/// Certificates of a cluster and of those who do not belong.
pub(crate) struct Pki {
    dir: tempfile::TempDir,
    pub(crate) ca: TestCa,
    other: TestCa,
}

impl Pki {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (ca, other) = (TestCa::new("ours").unwrap(), TestCa::new("theirs").unwrap());
        test_certs::write(dir.path(), "ca", ca.pem()).unwrap();
        Self { dir, ca, other }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// Returns the pair of variables' values.
    pub(crate) fn leaf(&self, file: &str, ca: &TestCa, name: &str, validity: Validity) -> (String, String) {
        test_certs::write(self.dir.path(), file, &ca.leaf(&[name, "127.0.0.1"], validity).unwrap()).unwrap();
        (self.path(&format!("{file}.pem")), self.path(&format!("{file}-key.pem")))
    }

    pub(crate) fn variables(
        &self,
        prefix: &str,
        (cert, key): (String, String),
    ) -> Vec<(&'static str, String)> {
        let name = |rest: &str| -> &'static str {
            let names = [
                "ORCHESTRATORD_TLS_CERT",
                "ORCHESTRATORD_TLS_KEY",
                "ORCHESTRATORD_TLS_CLIENT_CA",
                "ORCHESTRATORD_TLS_CA",
                "ORCHESTRATORD_REQUIRE_TLS",
                "POOL_MANAGERD_TLS_CERT",
                "POOL_MANAGERD_TLS_KEY",
                "POOL_MANAGERD_TLS_CLIENT_CA",
                "POOL_MANAGERD_TLS_CA",
                "POOL_MANAGERD_REQUIRE_TLS",
            ];
            let wanted = format!("{prefix}_{rest}");
            names.into_iter().find(|name| *name == wanted).expect("a setting of this name")
        };
        vec![
            (name("TLS_CERT"), cert),
            (name("TLS_KEY"), key),
            (name("TLS_CLIENT_CA"), self.path("ca.pem")),
            (name("TLS_CA"), self.path("ca.pem")),
            (name("REQUIRE_TLS"), "true".into()),
        ]
    }

    /// A control plane with its certificate, and no node yet.
    pub(crate) fn cluster(&self) -> Cluster {
        let own = self.leaf("orchestratord", &self.ca, "orchestratord", Validity::Now);
        let control = self.variables("ORCHESTRATORD", own);
        let mut cluster = Cluster::without_nodes(Options { nodes: 1, control, ..Options::default() });
        let base = format!("https://127.0.0.1:{}", cluster.port);
        cluster.client = Client::with_ca(&base, Some(TOKEN), &self.ca.pem().cert);
        cluster.start_control();
        cluster
    }
}

// CLOUD-2503
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn daemons_that_show_certificates_serve_and_take_new_ones_without_a_restart() {
    let pki = Pki::new();
    let mut cluster = pki.cluster();
    let own = pki.leaf("node", &pki.ca, "gpu-node-1", Validity::Now);
    let node = pki.variables("POOL_MANAGERD", own);
    cluster.options.node = node.into_iter().map(|(name, value)| (0, name, value)).collect();
    cluster.add_node(0);
    cluster.wait_online(0).await;
    let address = cluster.client.node("gpu-node-1").await.unwrap().address;
    assert!(address.starts_with("https://"), "{address}");
    let long = {
        let (client, task) = (cluster.client.clone(), cluster.task(200));
        tokio::spawn(async move { client.run(task).await })
    };
    // A new certificate for both; the stream goes on, and new connections are made with it.
    pki.leaf("orchestratord", &pki.ca, "orchestratord", Validity::Now);
    pki.leaf("node", &pki.ca, "gpu-node-1", Validity::Now);
    let renewed = |name: &str| std::fs::read_to_string(cluster.log(name)).unwrap_or_default();
    eventually("both have taken it", Duration::from_secs(10), || async {
        let both = ["orchestratord", "gpu-node-1"].map(renewed);
        both.iter().all(|log| log.contains("a new certificate is in use")).then_some(())
    })
    .await;
    for _ in 0..3 {
        let fresh = Client::with_ca(&cluster.client.base, Some(TOKEN), &pki.ca.pem().cert);
        assert!(fresh.run(cluster.task(4)).await.completed());
    }
    let long = long.await.unwrap();
    long.check();
    assert!(long.completed());
    // The node lets in nobody but the control plane, whatever token is shown.
    let stranger = Client::with_ca(&address, Some(TOKEN), &pki.ca.pem().cert);
    let refused = stranger.get("/v2/pools").await.unwrap();
    assert_eq!(refused.status(), 403);
    assert!(refused.text().await.unwrap().contains("a TLS certificate for orchestratord is needed"));
}

// CLOUD-2504
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_a_certificate_that_does_not_belong_is_refused_with_the_reason_on_both_sides() {
    let pki = Pki::new();
    let mut cluster = pki.cluster();
    let cases = [
        (
            "foreign",
            &pki.other,
            "gpu-node-1",
            Validity::Now,
            "UnknownIssuer",
            "it does not trust the CA of our certificate",
        ),
        (
            "misnamed",
            &pki.ca,
            "gpu-node-9",
            Validity::Now,
            "is for gpu-node-9, not for gpu-node-1",
            "is for gpu-node-9, not for gpu-node-1",
        ),
        (
            "expired",
            &pki.ca,
            "gpu-node-1",
            Validity::Expired,
            "its certificate has expired",
            "our certificate has expired",
        ),
    ];
    for (n, (file, ca, name, validity, here, there)) in cases.into_iter().enumerate() {
        let own = pki.leaf(file, ca, name, validity);
        let mut command = Command::new(program("pool-managerd"));
        let port = free_port();
        command
            .env("POOL_MANAGERD_NODE_ID", "gpu-node-1")
            .env("POOL_MANAGERD_ADDR", format!("127.0.0.1:{port}"))
            .env("POOL_MANAGERD_RUNTIME_DIR", cluster.dir.path().join(file))
            .env("ORCHESTRATORD_URL", &cluster.client.base)
            .env("LLORCH_API_TOKEN", TOKEN)
            .envs(pki.variables("POOL_MANAGERD", own));
        let log = cluster.log(file);
        let _node = e2e_cloud::Process::start(command, &log);
        let text = |path| std::fs::read_to_string(path).unwrap_or_default();
        eventually(&format!("{file}: the node says why"), Duration::from_secs(15), || async {
            text(&log).contains(there).then_some(())
        })
        .await;
        let control = cluster.log("orchestratord");
        eventually(&format!("{file}: the control plane says why"), Duration::from_secs(5), || async {
            text(&control).contains(here).then_some(())
        })
        .await;
        assert!(cluster.client.nodes().await.is_empty(), "case {n}: it has not joined");
    }
    // One that belongs is let in after all of them.
    let own = pki.leaf("node", &pki.ca, "gpu-node-1", Validity::Now);
    let node = pki.variables("POOL_MANAGERD", own);
    cluster.options.node = node.into_iter().map(|(name, value)| (0, name, value)).collect();
    cluster.add_node(0);
    cluster.wait_online(0).await;
}

// CLOUD-2505
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_audit_log_says_who_did_what_and_metrics_have_a_door_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let audit = dir.path().join("audit.jsonl");
    let file = dir.path().join("tokens.toml");
    std::fs::write(&file, token_file()).unwrap();
    let metrics = format!("127.0.0.1:{}", free_port());
    let cluster = Cluster::start(Options {
        nodes: 1,
        control: vec![
            ("LLORCH_AUDIT_LOG", audit.display().to_string()),
            ("LLORCH_API_TOKEN_FILE", file.display().to_string()),
            ("ORCHESTRATORD_METRICS_ADDR", metrics.clone()),
            ("ORCHESTRATORD_TASKS_PER_TOKEN", "1".into()),
            ("ORCHESTRATORD_REQUESTS_PER_SECOND", "200".into()),
        ],
        ..Options::default()
    })
    .await;
    let open = Client::new(&format!("http://{metrics}"), None);
    let page = open.get("/metrics").await.unwrap();
    assert_eq!(page.status(), 200);
    assert!(page.text().await.unwrap().contains("llorch_refused_calls_total"));
    assert_eq!(open.get("/v2/nodes").await.unwrap().status(), 404, "nothing else is behind it");
    // One task of a token at a time, and the next when it has ended.
    let client = Client::new(&cluster.client.base, Some(CLIENT_TOKEN));
    let first = client.post("/v2/tasks", &cluster.task(400)).await;
    let first: Value = first.json().await.unwrap();
    let (status, body) = client.refused(&cluster.task(1)).await;
    assert_eq!((status, &body["code"]), (429, &json!("RATE_LIMITED")));
    assert_eq!(cluster.client.post("/v2/tasks", &cluster.task(1)).await.status(), 202, "another token's own");
    let cancel = format!("/v2/tasks/{}/cancel", first["task_id"].as_str().unwrap());
    assert_eq!(client.post(&cancel, &json!({})).await.status(), 204);
    assert_eq!(client.post("/v2/tasks", &cluster.task(1)).await.status(), 202);
    let drain = client.post("/v2/nodes/gpu-node-1/drain", &json!({})).await;
    assert_eq!(drain.status(), 403);
    let burst = join_all((0..400).map(|_| client.get("/v2/nodes"))).await;
    let limited = burst.iter().filter(|answer| answer.as_ref().is_ok_and(|a| a.status() == 429)).count();
    assert!(limited > 0, "more than 200 requests a second");
    let wanted: [(&str, &str, u64, Option<&str>); 4] = [
        ("POST", "/v2/tasks", 202, Some("client")),
        ("POST", cancel.as_str(), 204, Some("client")),
        ("POST", "/v2/nodes/gpu-node-1/drain", 403, Some("client")),
        ("POST", "/v2/nodes/register", 200, Some("admin")),
    ];
    let lines = eventually("all of it is written", Duration::from_secs(5), || async {
        let text = std::fs::read_to_string(&audit).unwrap_or_default();
        let lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let has = |(method, path, status, caller): &(&str, &str, u64, Option<&str>)| {
            lines.iter().any(|line| {
                line["method"] == *method
                    && line["path"] == *path
                    && line["status"] == *status
                    && caller.is_none_or(|caller| line["caller"] == caller)
            })
        };
        wanted.iter().all(has).then_some(lines)
    })
    .await;
    let submitted = lines.iter().find(|line| line["path"] == "/v2/tasks" && line["status"] == 202).unwrap();
    assert_eq!(submitted["fingerprint"].as_str().map(str::len), Some(6));
    assert!(
        submitted["peer"].as_str().unwrap().starts_with("127.0.0.1:")
            && submitted["correlation_id"].is_string()
    );
    assert!(!lines.iter().any(|line| line["path"].as_str().is_some_and(|path| path.contains("heartbeat"))));
    assert!(!e2e_cloud::client::holds_secret(&std::fs::read(&audit).unwrap()));
}

// CLOUD-2506
#[test]
fn tokens_are_made_named_and_checked_without_ever_being_an_argument() {
    let run = |arguments: &[&str], input: &str| {
        use std::io::Write;
        let mut child = Command::new(program("orchestratord"))
            .args(arguments)
            .env_remove("LLORCH_API_TOKEN")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // A program that does not read has closed its end.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.success(), text(output.stdout), text(output.stderr))
    };
    let (good, token, _) = run(&["token", "new"], "");
    assert!(good && token.trim().len() == 64, "{token}");
    let (good, named, _) = run(&["token", "fingerprint"], &token);
    assert!(good && named.starts_with("fingerprint ") && !named.contains(token.trim()), "{named}");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.toml");
    std::fs::write(&file, token_file()).unwrap();
    let path = file.display().to_string();
    let (good, listed, _) = run(&["token", "check", &path], "");
    assert!(
        good && listed.contains("seven node only as node gpu-node-7") && listed.contains("EXPIRED"),
        "{listed}"
    );
    assert!(!e2e_cloud::client::holds_secret(listed.as_bytes()));
    std::fs::write(&file, token_file().replace("[\"client\"]", "[\"god\"]")).unwrap();
    let (good, _, error) = run(&["token", "check", &path], "");
    assert!(!good && error.contains("line") && !e2e_cloud::client::holds_secret(error.as_bytes()), "{error}");
    for daemon in ["orchestratord", "pool-managerd"] {
        let output = Command::new(program(daemon)).args(["--api-token", TOKEN]).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains("LLORCH_API_TOKEN"), "{error}");
        assert!(!error.contains(TOKEN), "{error}");
    }
}
