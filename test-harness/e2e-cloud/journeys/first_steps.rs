//! What somebody does first: the clusters that `cargo xtask up` starts, the lines that `cargo xtask certs`
//! prints, the client of the documents, and what the page of the API is filled with.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use e2e_cloud::cluster::TOKEN;
use e2e_cloud::process::{free_port, program};
use e2e_cloud::{Client, Cluster, Engine, Options, Process, eventually};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
/// How long all that a killed `up` has started may take to end.
const GONE_WITHIN: Duration = Duration::from_secs(40);

fn root() -> PathBuf {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.ancestors().nth(2).expect("the crate lies two folders deep").to_owned()
}

/// A `llama-server` by its flags, which is the fake engine.
fn llama_server(folder: &Path) -> PathBuf {
    let path = folder.join("llama-server");
    let script = format!(
        "#!/bin/bash\nwhile [ $# -gt 0 ]; do case \"$1\" in --port) port=$2;; --alias) alias=$2;; esac; shift; done\nexec {} --addr 127.0.0.1:$port --model $alias --slots 2\n",
        program("fake-engine").display()
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A running `cargo xtask up` over fake engines, without its builds.
struct Up {
    process: Process,
}

impl Up {
    fn start(folder: &Path, name: &str) -> Self {
        let mut command = Command::new(program("xtask"));
        let model = folder.join("fake.gguf");
        fs::write(&model, "GGUF").unwrap();
        let built = program("xtask");
        command.args(["up", "--built", "--engine"]).arg(llama_server(folder)).arg("--model").arg(model);
        // The folder of the profile lies in it.
        command.env("CARGO_TARGET_DIR", built.ancestors().nth(2).expect("a folder of programs"));
        Self { process: Process::start(command, &folder.join(format!("{name}.log"))) }
    }

    async fn waits_for(&self, what: &str, text: &str) {
        eventually(what, SOON, || async { self.process.log().contains(text).then_some(()) }).await;
    }

    /// What the line says behind these words.
    fn after(&self, words: &str) -> String {
        let log = self.process.log();
        let (_, rest) = log.split_once(words).unwrap_or_else(|| panic!("no {words:?} in {log}"));
        rest.split_whitespace().next().unwrap_or_default().to_owned()
    }

    fn children(&self) -> Vec<u32> {
        children(self.process.pid())
    }
}

/// The processes whose parent is this one.
fn children(parent: u32) -> Vec<u32> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        fields.split_whitespace().nth(1) == Some(parent.to_string().as_str())
    })
    .collect()
}

/// Whether it runs; one that nobody has awaited yet does not.
fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

async fn all_are_gone(what: &str, pids: &[u32]) {
    eventually(what, GONE_WITHIN, || async { pids.iter().all(|pid| !runs(*pid)).then_some(()) }).await;
}

// CLOUD-3020
// CLOUD-3021
// CLOUD-3022
// CLOUD-3023
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_clusters_are_up_in_one_checkout_outlive_a_node_and_end_with_their_command() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [first, mut second] = [0, 1].map(|n| Up::start(folders[n].path(), "up"));
    for up in [&first, &second] {
        up.waits_for("the cluster is up", "Ctrl-C stops everything").await;
    }
    let urls = [&first, &second].map(|up| up.after("The cluster is up: ").trim_end_matches(',').to_owned());
    assert_ne!(urls[0], urls[1]);
    assert_ne!(first.after("Logs are in "), second.after("Logs are in "));
    // The node that the banner names.
    let killed: i32 = first.after("kill -9 ").parse().unwrap();
    assert!(first.process.log().contains(&format!("kill -9 {killed}   # gpu-node-1")));
    assert!(first.children().contains(&u32::try_from(killed).unwrap()), "it is the node itself");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(killed), Signal::SIGKILL).unwrap();
    first.waits_for("the end is reported", &format!("gpu-node-1 (pid {killed}) has ended")).await;
    assert!(first.process.log().contains("the cluster goes on with 1 node"), "{}", first.process.log());
    let key = first.after("OPENAI_API_KEY=");
    let client = Client::new(&urls[0], Some(&key));
    let task = json!({"model_ref": "fake", "prompt": "once", "max_tokens": 4});
    let transcript = client.run(task).await;
    assert!(transcript.completed(), "{:?} {}", transcript.events.last(), transcript.refusal);
    // However the command dies.
    let (of_first, of_second) = (first.children(), second.children());
    assert!(of_first.len() >= 4 && of_second.len() == 5, "{of_first:?} {of_second:?}");
    first.process.signal(Signal::SIGKILL);
    all_are_gone("all of the killed one have ended", &of_first).await;
    second.process.signal(Signal::SIGHUP);
    let begun = Instant::now();
    let status = tokio::task::block_in_place(|| second.process.wait(GONE_WITHIN));
    assert!(status.success(), "{status} after {:?}: {}", begun.elapsed(), second.process.log());
    all_are_gone("all of the other have ended", &of_second).await;
}

// CLOUD-3024
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lines_that_certs_prints_start_a_cluster_with_tls() {
    let folder = tempfile::tempdir().unwrap();
    let mut certs = Command::new(program("xtask"));
    certs.args(["certs", "--node", "a", "--node", "b", "--out"]).arg(folder.path().join("certs"));
    let output = certs.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (_, lines) = text.split_once("\n\n").expect("lines behind the first one");
    // Other ports than everybody's, and a directory of its own.
    let mut lines = lines.to_owned();
    for port in ["8080", "9200", "9201"] {
        lines = lines.replace(port, &free_port().to_string());
    }
    let (start, look) = lines.trim_end().rsplit_once('\n').unwrap();
    let bin = program("orchestratord");
    let path = std::env::var("PATH").unwrap_or_default();
    let script = format!(
        "set -u\ntrap 'kill $(jobs -p); wait' EXIT\n{start}\nfor _ in $(seq 600); do [ $({} -s | grep -o '\"online\"' | wc -l) = 2 ] && echo all is well && exit 0; sleep 0.1; done; exit 1\n",
        look.trim()
    );
    let mut shell = Command::new("bash");
    shell.current_dir(folder.path()).args(["-c", &script]);
    shell.env("PATH", format!("{}:{path}", bin.parent().unwrap().display()));
    let mut shell = Process::start(shell, &folder.path().join("lines.log"));
    let status = tokio::task::block_in_place(|| shell.wait(Duration::from_secs(90)));
    assert!(status.success() && shell.log().contains("all is well"), "{text}\n{}", shell.log());
}

/// The client of `.docs/API.md`.
fn client_of_the_documents() -> String {
    let page = fs::read_to_string(root().join(".docs/API.md")).expect("the page");
    let (_, client) = page.split_once("```python\n").expect("a client");
    client.split_once("```").expect("its end").0.to_owned()
}

// CLOUD-3035
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_of_the_documents_has_20_lines_and_prints_what_the_model_says() {
    let client = client_of_the_documents();
    let lines = client.lines().filter(|line| !line.trim().is_empty()).count();
    assert!(lines <= 20, "{lines} lines");
    let cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    let model = cluster.options.engine.model().to_owned();
    let run = async |model: &str| {
        let mut python = Command::new("python3");
        python.args(["-c", &client]).env("NO_PROXY", "*").env("LLORCH_MODEL", model);
        python.env("LLORCH_URL", &cluster.client.base).env("LLORCH_API_TOKEN", TOKEN);
        tokio::process::Command::from(python).kill_on_drop(true).output().await.unwrap()
    };
    let output = tokio::time::timeout(SOON, run(&model)).await.expect("an end in time");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    let task = json!({"model_ref": model, "max_tokens": 64,
        "messages": [{"role": "user", "content": "What is the capital of France?"}]});
    let transcript = cluster.client.run(task).await;
    assert!(transcript.completed() && !transcript.text().is_empty());
    assert_eq!(String::from_utf8_lossy(&output.stdout), transcript.text());
    let refused = tokio::time::timeout(SOON, run("nowhere")).await.expect("an end in time");
    assert!(!refused.status.success(), "a task that fails is no success");
}

// CLOUD-3033
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_page_is_filled_with_works_as_it_stands_there() {
    let cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    let document = cluster.client.get_json("/openapi.json").await.unwrap();
    let page = Client::new(&cluster.client.base, None);
    let script = page.get("/docs/swagger-initializer.js").await.unwrap().text().await.unwrap();
    // As the page does.
    let models = cluster.client.get_json("/v1/models").await.unwrap();
    let model = models["data"][0]["id"].as_str().unwrap();
    assert!(script.contains("/v1/models") && script.contains("\"smollm2-135m\""), "{script}");
    let filled = document.to_string().replace("\"smollm2-135m\"", &json!(model).to_string());
    let filled: Value = serde_json::from_str(&filled).unwrap();
    let mut tried = 0;
    for (path, methods) in filled["paths"].as_object().unwrap() {
        let content = &methods["post"]["requestBody"]["content"]["application/json"];
        // The first one is what the page shows.
        let Some((_, first)) = content["examples"].as_object().and_then(|all| all.iter().next()) else {
            continue;
        };
        let is_clients = path.starts_with("/v1/") || path.contains("/tasks") || path.contains("placement");
        if is_clients {
            let (body, ends) = (&first["value"], Instant::now() + SOON);
            let response = cluster.client.post(path, body).await;
            let (status, task) = (response.status(), response.headers().get("x-llorch-task-id").cloned());
            let text = response.text().await.unwrap();
            // The engine of this test makes no vectors and knows one dialect.
            let is_engines = path.starts_with("/v1/") && (status == 400 || status == 404);
            assert!(status.is_success() || is_engines, "{path} {body}: {status} {text}");
            tried += usize::from(status.is_success());
            if let Some(task) = task.filter(|_| path == "/v2/tasks") {
                let transcript = cluster.client.follow(task.to_str().unwrap(), None, usize::MAX).await;
                assert!(transcript.completed() && Instant::now() < ends, "{:?}", transcript.events.last());
                // CLOUD-3036
                let (_, started) = transcript
                    .events
                    .iter()
                    .find_map(|(name, _, data)| (name == "started").then_some((name, data)))
                    .expect("an event started");
                assert_eq!(started["task_id"].as_str(), task.to_str().ok());
            }
        }
    }
    assert!(tried >= 3, "{tried} were tried");
}

// CLOUD-3003
// CLOUD-3004
// CLOUD-3015
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_names_where_it_calls_and_warns_of_no_engine_that_it_has_ended_itself() {
    let (nobody, engine) = (free_port(), free_port());
    let (control, engine) = (format!("http://127.0.0.1:{nobody}"), format!("http://127.0.0.1:{engine}"));
    let pools = format!(
        "[pools.own]\nengine = \"llamacpp\"\nmodel = \"fake\"\nslots = 2\n[pools.own.provision]\nmode = \"binary\"\nprogram = \"{}\"\nargs = [\"--addr\", \"127.0.0.1:{{port}}\", \"--model\", \"{{model}}\"]\n",
        program("fake-engine").display()
    );
    let options = Options {
        nodes: 1,
        engine: Engine::None,
        pools: vec![(0, pools)],
        node: vec![(0, "ORCHESTRATORD_URL", control.clone())],
        ..Options::default()
    };
    let mut cluster = Cluster::without_nodes(options);
    cluster.add_node(0);
    let file = json!({"pool_id": "gone", "replica_id": "r0", "engine": "llamacpp", "url": engine});
    fs::write(cluster.nodes[0].runtime_dir.join("gone-r0.json"), file.to_string()).unwrap();
    let log = cluster.log(&cluster.nodes[0].id);
    let line = |words: &str| {
        let text = fs::read_to_string(&log).unwrap_or_default();
        text.lines().find(|line| line.contains(words)).map(str::to_owned)
    };
    let refused =
        eventually("a call has failed", SOON, || async { line("not registered, trying again") }).await;
    assert!(refused.contains(&control), "{refused}");
    let not_ready =
        eventually("a look has failed", SOON, || async { line("the replica is not ready") }).await;
    assert!(not_ready.contains(&engine), "{not_ready}");
    eventually("its own engine serves", SOON, || async {
        line("the replica is ready").filter(|line| line.contains("own"))
    })
    .await;
    let daemon = cluster.nodes[0].daemon.as_mut().expect("it runs");
    daemon.signal(Signal::SIGTERM);
    tokio::task::block_in_place(|| daemon.wait(GONE_WITHIN));
    let ended = line("an engine is ended").expect("a line of its end");
    assert!(ended.contains("INFO"), "{ended}");
    assert_eq!(line("an engine is gone"), None);
}

// CLOUD-3008
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_nobody_knows_is_not_logged_as_drained() {
    let cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    for order in ["drain", "resume"] {
        let unknown = cluster.client.post(&format!("/v2/nodes/ghost/{order}"), &json!({})).await;
        assert_eq!(unknown.status(), 404);
        let known = cluster.client.post(&format!("/v2/nodes/gpu-node-1/{order}"), &json!({})).await;
        assert_eq!(known.status(), 202);
    }
    // Lines are written by a thread of their own, in their order.
    let log = || cluster.control.as_ref().expect("it runs").log();
    let lines = ["a node is drained", "a node is resumed"];
    eventually("both lines", SOON, || async { lines.iter().all(|line| log().contains(line)).then_some(()) })
        .await;
    assert!(!log().contains("ghost"), "{}", log());
}
