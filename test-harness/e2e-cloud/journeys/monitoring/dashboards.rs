//! The shipped dashboards: what they ask, a Prometheus that has scraped a cluster answers.

use std::path::Path;
use std::time::Duration;

use e2e_cloud::cluster::TOKEN;
use e2e_cloud::process::program;
use e2e_cloud::{Client, Cluster, Options, eventually};
use serde_json::{Value, json};
use test_certs::{TestCa, Validity};

use super::{PATIENCE, Prometheus, deploy, has_prometheus};

/// Every query of the dashboards, with what Grafana would put in.
fn queries() -> Vec<String> {
    let folder = deploy().join("../grafana/dashboards");
    let files =
        std::fs::read_dir(folder).expect("the shipped dashboards").map(|file| file.expect("a file").path());
    let mut queries = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).expect("a readable file");
        let board: Value =
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        for panel in board["panels"].as_array().expect("panels") {
            for target in panel["targets"].as_array().expect("targets") {
                let query = target["expr"].as_str().expect("a query");
                let query =
                    query.replace("$__rate_interval", "1m").replace("$node", ".*").replace("$model", ".*");
                assert!(!query.contains('$'), "{query}");
                queries.push(query);
            }
        }
    }
    queries
}

/// Two nodes over TLS, one with a GPU and an engine of its own, and tokens that expire.
fn cluster(folder: &Path) -> (Cluster, String) {
    let ca = TestCa::new("ours").unwrap();
    test_certs::write(folder, "ca", ca.pem()).unwrap();
    test_certs::write(folder, "own", &ca.leaf(&["orchestratord", "127.0.0.1"], Validity::Now).unwrap())
        .unwrap();
    let path = |name: &str| folder.join(name).display().to_string();
    let tokens = format!(
        "[[token]]\nname = \"admin\"\ntoken = \"{TOKEN}\"\nscopes = [\"admin\"]\n\
         [[token]]\nname = \"guest\"\ntoken = \"a-token-for-guests\"\nscopes = [\"client\"]\nexpires = 2099-01-01T00:00:00Z\n"
    );
    std::fs::write(folder.join("tokens.toml"), tokens).unwrap();
    let pools = format!(
        "[pools.pool-0]\nengine = \"llamacpp\"\nmodel = \"fake-model\"\nslots = 4\ndevices = [0]\nmemory_bytes = 1073741824\n\
         [pools.pool-0.provision]\nmode = \"binary\"\nprogram = \"{}\"\n\
         args = [\"--addr\", \"127.0.0.1:{{port}}\", \"--model\", \"{{model}}\"]\n",
        program("fake-engine").display(),
    );
    let mut options = Options { nodes: 2, pools: vec![(0, pools)], ..Options::default() };
    options.control = vec![
        ("ORCHESTRATORD_TLS_CERT", path("own.pem")),
        ("ORCHESTRATORD_TLS_KEY", path("own-key.pem")),
        ("ORCHESTRATORD_TLS_CA", path("ca.pem")),
        ("ORCHESTRATORD_METRICS_CALLERS", "true".into()),
        ("LLORCH_API_TOKEN_FILE", path("tokens.toml")),
    ];
    for n in 0..2 {
        options.node.extend([
            (n, "POOL_MANAGERD_TLS_CERT", path("own.pem")),
            (n, "POOL_MANAGERD_TLS_KEY", path("own-key.pem")),
            (n, "POOL_MANAGERD_TLS_CA", path("ca.pem")),
            (n, "LLORCH_API_TOKEN_FILE", path("tokens.toml")),
        ]);
    }
    let driver = program("pool-managerd").with_file_name("libfake_nvml.so");
    assert!(driver.is_file(), "{} is not built: run `cargo build --workspace` first", driver.display());
    std::fs::write(folder.join("gpus.json"), json!({"gpus": [{"used": 1 << 30}]}).to_string()).unwrap();
    options.node.push((0, "POOL_MANAGERD_NVML_LIB", driver.display().to_string()));
    options.node.push((0, "FAKE_NVML_SCRIPT", path("gpus.json")));
    let mut cluster = Cluster::without_nodes(options);
    cluster.client =
        Client::with_ca(&format!("https://127.0.0.1:{}", cluster.port), Some(TOKEN), &ca.pem().cert);
    (cluster, ca.pem().cert.clone())
}

/// Every query of the dashboards has an answer from a cluster that has worked.
pub(crate) async fn all_are_answered() {
    if !has_prometheus() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (mut cluster, ca) = cluster(folder.path());
    cluster.start_control();
    for n in 0..2 {
        cluster.add_node(n);
    }
    for n in 0..2 {
        cluster.wait_online(n).await;
    }
    let prometheus = Prometheus::start_tls(&cluster, Some(&folder.path().join("ca.pem")));
    let node = cluster.client.nodes().await.into_iter().next().expect("a node").address;
    let stranger = |base: &str| Client::with_ca(base, Some("no-such-token-of-ours"), &ca);
    let (control, node) = (stranger(&cluster.client.base), stranger(&node));
    let chat =
        json!({"model": "fake-model", "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]});
    let work = async || {
        cluster.client.run(cluster.task(4)).await.check();
        assert_eq!(cluster.client.post("/v1/chat/completions", &chat).await.status(), 200);
        assert_eq!(control.get("/v2/nodes").await.unwrap().status(), 401);
        assert_eq!(node.get("/v2/pools").await.unwrap().status(), 401);
    };
    work().await;
    let queries = queries();
    assert!(queries.len() > 90, "{} queries", queries.len());
    let unanswered = async || {
        work().await;
        let mut empty = Vec::new();
        for query in &queries {
            if prometheus.query(query).await.is_none_or(|found| found.is_empty()) {
                empty.push(query.as_str());
            }
        }
        empty
    };
    let mut empty = Vec::new();
    for _ in 0..15 {
        tokio::time::sleep(Duration::from_secs(2)).await;
        empty = unanswered().await;
        if empty.is_empty() {
            break;
        }
    }
    assert_eq!(empty, Vec::<&str>::new(), "no answer from Prometheus within {PATIENCE:?}");
    let down = async || {
        let up = prometheus.query("up").await?;
        (up.len() == 3 && up.iter().all(|(_, up)| *up == 1.0)).then_some(())
    };
    eventually("all are scraped over TLS", PATIENCE, down).await;
}
