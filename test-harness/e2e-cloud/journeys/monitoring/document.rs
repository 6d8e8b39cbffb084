//! `.docs/MONITORING.md`, done as it stands there.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use e2e_cloud::process::{free_port, program};
use e2e_cloud::{Client, Cluster, Options, Process, eventually};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{PATIENCE, has_prometheus};

/// The commands of the document, part by part.
fn commands() -> Vec<String> {
    let text = include_str!("../../../../.docs/MONITORING.md");
    let parts =
        text.split("```bash\n").skip(1).map(|part| part.split("```").next().unwrap_or_default().to_owned());
    parts.collect()
}

// CLOUD-2718
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_follows_the_document_has_figures_and_an_alert() {
    if !has_prometheus() {
        return;
    }
    let (_folder, tokens) = e2e_cloud::cluster::tokens_file(&[]);
    let control = vec![("LLORCH_API_TOKEN_FILE", tokens.clone())];
    let node = (0..2).map(|n| (n, "LLORCH_API_TOKEN_FILE", tokens.clone())).collect();
    let mut cluster = Cluster::start(Options { control, node, ..Options::default() }).await;
    let web = format!("127.0.0.1:{}", free_port());
    let folder = cluster.dir.path().join("monitoring");
    let parts = commands();
    let [places, token, files, runs, asks, alert] = &parts[..] else { panic!("{} parts", parts.len()) };
    for name in ["CONTROL", "TOKENS", "WEB", "FOLDER"] {
        assert!(places.lines().any(|line| line.starts_with(&format!("{name}="))), "{name}: {places}");
    }
    // Of the example's places this test has its own.
    let shell = |script: &str| {
        let mut shell = Command::new("bash");
        let daemons = program("orchestratord");
        let path = format!("{}:{}", daemons.parent().unwrap().display(), std::env::var("PATH").unwrap());
        shell.args(["-euc", script]).current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."));
        shell.env("PATH", path).env("CONTROL", format!("127.0.0.1:{}", cluster.port));
        shell.env("TOKENS", &tokens).env("WEB", &web).env("FOLDER", &folder);
        shell
    };
    let run = |script: &str| {
        let done = shell(script).output().expect("a shell");
        let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert!(done.status.success(), "{script}: {out}{err}");
        out.into_owned()
    };
    run(token);
    run(files);
    // As a process of this test's, and not of a shell that has ended.
    let prometheus = format!("exec {}", runs.trim().trim_end_matches('&'));
    let _prometheus = Process::start(shell(&prometheus), &cluster.log("prometheus"));
    let client = Client::new(&format!("http://{web}"), None);
    let up = async || {
        let found = client.get_json("/api/v1/query?query=sum(up)").await?;
        (found["data"]["result"][0]["value"][1] == "3").then_some(())
    };
    eventually("the control plane and both nodes are scraped", 2 * PATIENCE, up).await;
    let answers = run(asks);
    assert!(answers.contains("gpu-node-1") && answers.contains("\"NodeOffline\""), "{answers}");
    cluster.nodes[0].daemon.as_mut().expect("a daemon").signal(Signal::SIGKILL);
    let came = async || {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let answered = client.get_json("/api/v1/alerts").await?;
        let all = answered["data"]["alerts"].as_array()?.clone();
        let is_it =
            |alert: &Value| alert["labels"]["alertname"] == "NodeOffline" && alert["state"] == "firing";
        all.iter().any(is_it).then_some(())
    };
    eventually("the node that died has an alert", 3 * PATIENCE, came).await;
    let alerts = run(alert);
    assert!(alerts.contains("Node gpu-node-1 is offline"), "{alerts}");
}
