//! `cargo xtask up`: a small cluster on this machine, with a real model that answers.

use std::fs::{File, TryLockError};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures::StreamExt;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pool_registry_types::sse::Decoder;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::engine;
use crate::steps::{Failed, cache, cargo, root, say};

/// Tokens of context per slot, and slots per engine.
const CTX: u32 = 1024;
const SLOTS: u32 = 2;
/// Clusters of one checkout at once, and how far the ports lie apart that they ask for first.
const MOST_RUNS: u16 = 16;
const PORTS_APART: u16 = 100;
/// How long engines may take to load the model and nodes to be ready.
const READY_PATIENCE: Duration = Duration::from_secs(180);
/// How long a process may take to end by itself.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
const SAMPLE: &str = "What is the capital of France? Answer in one sentence.";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// End after the sample, with status 0.
    #[arg(long)]
    once: bool,
    /// orchestratord alone, on one machine.
    #[arg(long, conflicts_with = "nodes")]
    home: bool,
    /// How many nodes.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    nodes: u16,
    /// A GGUF file of your own.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Do not build: both daemons lie where cargo puts them.
    #[arg(long)]
    built: bool,
    /// A llama-server of your own.
    #[arg(long)]
    engine: Option<PathBuf>,
}

/// Where cargo puts programs.
pub(crate) fn target(profile: &str) -> PathBuf {
    let folder = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    root().join(folder).join(profile)
}

/// What serves the model.
enum Serving {
    /// llama.cpp's server from the package index, by our launcher.
    Package { python: PathBuf },
    /// A `llama-server` of the person's own.
    Own { program: PathBuf },
}

/// The directory of one run, and the ports that it asks for first: several may be up in one checkout.
struct RunFolder {
    folder: PathBuf,
    /// Added to each port.
    ports: u16,
    /// Held for as long as the run lasts: the kernel lets go of it however that ends.
    _lock: File,
}

impl RunFolder {
    /// The first that no other run has, emptied: what an earlier run left there is of no use.
    fn take(all: &Path) -> Result<Self, Failed> {
        let failed =
            |path: &Path, error: &dyn std::fmt::Display| Failed(format!("{}: {error}", path.display()));
        std::fs::create_dir_all(all).map_err(|error| failed(all, &error))?;
        for n in 1..=MOST_RUNS {
            let folder = all.join(n.to_string());
            let lock_path = all.join(format!("{n}.lock"));
            let lock = File::create(&lock_path).map_err(|error| failed(&lock_path, &error))?;
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => continue,
                Err(TryLockError::Error(error)) => return Err(failed(&lock_path, &error)),
            }
            match std::fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(failed(&folder, &error));
                }
                _ => {}
            }
            std::fs::create_dir_all(&folder).map_err(|error| failed(&folder, &error))?;
            return Ok(Self { folder, ports: (n - 1) * PORTS_APART, _lock: lock });
        }
        Err(Failed(format!("{MOST_RUNS} clusters are up in this checkout, which is the most")))
    }
}

/// A command whose process is told to end when the thread that starts it ends, however that does.
/// The kernel does it at the word of util-linux's setpriv, as which the process begins.
fn ending_with_us(program: &Path) -> Command {
    let on_path = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path).map(|folder| folder.join("setpriv")).find(|program| program.is_file())
    });
    let Some(setpriv) = on_path else {
        say("there is no setpriv (util-linux): what is started would outlive a SIGKILL of this");
        return Command::new(program);
    };
    let mut command = Command::new(setpriv);
    command.args(["--pdeathsig", "SIGTERM", "--"]).arg(program);
    command
}

/// A started process, ended when dropped.
pub(crate) struct Started {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Started {
    pub(crate) fn spawn(name: &str, mut command: Command, logs: &Path) -> Result<Self, Failed> {
        let log = logs.join(format!("{name}.log"));
        let file =
            std::fs::File::create(&log).map_err(|error| Failed(format!("{}: {error}", log.display())))?;
        let errors = file.try_clone().map_err(|error| Failed(format!("{}: {error}", log.display())))?;
        // A group of its own: Ctrl-C comes to us, and we stop the parts in order.
        command.stdin(Stdio::null()).stdout(file).stderr(errors).process_group(0);
        let child = command.spawn().map_err(|error| Failed(format!("{name} does not start: {error}")))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its status, once it has ended.
    pub(crate) fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    pub(crate) fn check(&mut self) -> Result<(), Failed> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            _ => {
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                let last = log.lines().last().unwrap_or("it said nothing").to_owned();
                Err(Failed(format!("{} has ended: {last} (its log: {})", self.name, self.log.display())))
            }
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Started {
    /// Ends it: by SIGTERM, and by SIGKILL where that does not help.
    pub(crate) fn stop(&mut self) {
        let pid = i32::try_from(self.child.id()).map(Pid::from_raw);
        let signal = |signal| {
            if let Ok(pid) = pid {
                // It may have ended by itself.
                let _ = kill(pid, signal);
            }
        };
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        signal(Signal::SIGTERM);
        let start = Instant::now();
        while start.elapsed() < STOP_PATIENCE {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        signal(Signal::SIGKILL);
        // Killed processes always end.
        let _ = self.child.wait();
    }
}

/// The cluster; fields are dropped in order, so nodes leave before the control plane goes, and its directory
/// is another run's when all have ended.
struct Cluster {
    nodes: Vec<Started>,
    engines: Vec<Started>,
    control: Vec<Started>,
    place: RunFolder,
    url: String,
    token: Option<String>,
    model: String,
}

pub(crate) fn run(options: &Options) -> Result<(), Failed> {
    let runtime = tokio::runtime::Runtime::new().map_err(|error| Failed(format!("tokio: {error}")))?;
    // Only the first installation in a process can fail.
    let _ = rustls::crypto::ring::default_provider().install_default();
    if !options.built {
        say("building both daemons (the first time takes some minutes)");
        // The same selection as every other chore builds, so that nothing is compiled twice.
        cargo(&["build", "--locked", "--workspace", "--bins"], "mend what the compiler says")?;
    }
    let serving = serving(options)?;
    let model = match &options.model {
        Some(path) if path.is_file() => path.clone(),
        Some(path) => return Err(Failed(format!("--model {}: no such file", path.display()))),
        None => engine::model()?,
    };
    // Engines end with the thread that started them: all are started from this one.
    let cluster = start(options, &serving, &model)?;
    runtime.block_on(async {
        tokio::select! {
            outcome = serve(cluster, options) => outcome,
            () = interrupted() => {
                println!("\nstopping");
                Ok(())
            }
        }
    })
}

/// Returns when this is told to end.
pub(crate) async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt), Ok(mut hangup)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()), signal(SignalKind::hangup()))
    else {
        return std::future::pending().await;
    };
    tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {}, _ = hangup.recv() => {} }
}

fn serving(options: &Options) -> Result<Serving, Failed> {
    if let Some(program) = &options.engine {
        if !program.is_file() {
            return Err(Failed(format!("--engine {}: no such file", program.display())));
        }
        return Ok(Serving::Own { program: program.clone() });
    }
    let on_path = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path)
            .map(|folder| folder.join("llama-server"))
            .find(|program| program.is_file())
    });
    match on_path {
        Some(program) => {
            say(&format!("using {}", program.display()));
            Ok(Serving::Own { program })
        }
        None => Ok(Serving::Package { python: engine::python()? }),
    }
}

/// The wanted port, or a free one where somebody has it.
pub(crate) fn port(wanted: u16) -> Result<u16, Failed> {
    let bound = TcpListener::bind(("127.0.0.1", wanted)).or_else(|_| TcpListener::bind(("127.0.0.1", 0)));
    let address = bound.and_then(|listener| listener.local_addr());
    address
        .map(|address| address.port())
        .map_err(|error| Failed(format!("no port is free on loopback: {error}")))
}

fn start(options: &Options, serving: &Serving, model: &Path) -> Result<Cluster, Failed> {
    let place = RunFolder::take(&cache().join("up"))?;
    let (work, ports) = (place.folder.clone(), place.ports);
    let name = model.file_stem().map_or_else(|| "model".into(), |stem| stem.to_string_lossy().to_lowercase());
    let name = name.replace(char::is_whitespace, "-");
    let url = format!("http://127.0.0.1:{}", port(8080 + ports)?);
    let token = (!options.home).then(|| format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple()));
    let mut cluster = Cluster {
        nodes: Vec::new(),
        engines: Vec::new(),
        control: Vec::new(),
        place,
        url,
        token,
        model: name,
    };

    say(if options.home {
        "starting orchestratord (home profile)"
    } else {
        "starting orchestratord (cloud profile)"
    });
    let mut control = ending_with_us(&target("debug").join("orchestratord"));
    control
        .env("ORCHESTRATORD_ADDR", cluster.url.trim_start_matches("http://"))
        .env("ORCHESTRATORD_DATA_DIR", work.join("orchestratord"))
        .env("ORCHESTRATORD_MODELS_DIR", work.join("models"));
    if let Some(token) = &cluster.token {
        control.env("ORCHESTRATORD_CLOUD_PROFILE", "true").env("LLORCH_API_TOKEN", token);
    } else {
        control
            .env("ORCHESTRATORD_CLOUD_PROFILE", "false")
            .env("ORCHESTRATORD_RUNTIME_DIR", work.join("engines"));
        control.env_remove("LLORCH_API_TOKEN").env_remove("LLORCH_API_TOKEN_FILE");
    }
    cluster.control.push(Started::spawn("orchestratord", control, &work)?);

    if options.home {
        say("starting an engine");
        cluster.engines.push(start_engine(
            "engine",
            serving,
            model,
            &cluster.model,
            &work.join("engines"),
            &work,
        )?);
        return Ok(cluster);
    }
    for n in 1..=options.nodes {
        let node = format!("gpu-node-{n}");
        say(&format!("starting {node}: pool-managerd and its engine"));
        let runtime_dir = work.join(&node);
        let engine =
            start_engine(&format!("{node}-engine"), serving, model, &cluster.model, &runtime_dir, &work)?;
        cluster.engines.push(engine);
        let mut daemon = ending_with_us(&target("debug").join("pool-managerd"));
        daemon
            .env("POOL_MANAGERD_NODE_ID", &node)
            .env("POOL_MANAGERD_ADDR", format!("127.0.0.1:{}", port(9200 + ports + n)?))
            .env("POOL_MANAGERD_RUNTIME_DIR", &runtime_dir)
            .env("POOL_MANAGERD_STATE_DIR", work.join(format!("{node}-state")))
            .env("POOL_MANAGERD_MODELS_DIR", work.join(format!("{node}-models")))
            .env("ORCHESTRATORD_URL", &cluster.url)
            .env("LLORCH_API_TOKEN", cluster.token.as_deref().unwrap_or_default());
        cluster.nodes.push(Started::spawn(&node, daemon, &work)?);
    }
    Ok(cluster)
}

fn start_engine(
    name: &str,
    serving: &Serving,
    model: &Path,
    alias: &str,
    runtime_dir: &Path,
    logs: &Path,
) -> Result<Started, Failed> {
    std::fs::create_dir_all(runtime_dir)
        .map_err(|error| Failed(format!("{}: {error}", runtime_dir.display())))?;
    let handoff = runtime_dir.join("pool-0-r0.json");
    match serving {
        Serving::Package { python } => {
            let mut command = Command::new(python);
            command.arg(root().join("deploy/engines/llama_server.py")).arg("--model").arg(model);
            command.args(["--alias", alias, "--slots", &SLOTS.to_string(), "--ctx", &CTX.to_string()]);
            command.args(["--pool-id", "pool-0", "--replica-id", "r0", "--handoff"]).arg(&handoff);
            Started::spawn(name, command, logs)
        }
        Serving::Own { program } => {
            let port = port(0)?;
            let mut command = ending_with_us(program);
            command.arg("--model").arg(model).args([
                "--host",
                "127.0.0.1",
                "--port",
                &port.to_string(),
                "--alias",
                alias,
            ]);
            command.args([
                "--parallel",
                &SLOTS.to_string(),
                "--ctx-size",
                &(CTX * SLOTS).to_string(),
                "--metrics",
                "--slots",
            ]);
            let started = Started::spawn(name, command, logs)?;
            // The node finds out by itself when the engine answers: the file may come first.
            let text = json!({
                "pool_id": "pool-0", "replica_id": "r0", "engine": "llamacpp", "url": format!("http://127.0.0.1:{port}"),
                "model_ref": alias, "pid": started.child.id(),
            });
            atomic_file::replace(&handoff, text.to_string().as_bytes(), atomic_file::BY_UMASK)
                .map_err(|error| Failed(error.to_string()))?;
            Ok(started)
        }
    }
}

async fn serve(mut cluster: Cluster, options: &Options) -> Result<(), Failed> {
    let client = reqwest::Client::builder()
        .no_proxy()
        .connect_timeout(Duration::from_secs(2))
        .build()
        .map_err(|error| Failed(format!("no HTTP client: {error}")))?;
    let wanted = if options.home { 1 } else { u64::from(options.nodes) };
    say("waiting until every node is ready");
    wait_ready(&client, &mut cluster, wanted).await?;
    sample(&client, &cluster).await?;
    if options.once {
        return Ok(());
    }
    print_usage(&cluster);
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        for part in &mut cluster.control {
            part.check()?;
        }
        for ended in take_ended(&mut cluster.engines) {
            say(&format!("{ended}: its node goes on without it"));
        }
        for ended in take_ended(&mut cluster.nodes) {
            say(&format!("{ended}: the cluster goes on with {}", count(cluster.nodes.len(), "node")));
        }
    }
}

/// Takes those out that have ended, and says of each that it has.
fn take_ended(parts: &mut Vec<Started>) -> Vec<String> {
    let gone = |part: &mut Started| part.ended().map(|status| (part.name.clone(), part.pid(), status));
    let ended = parts.iter_mut().filter_map(gone);
    let ended = ended.map(|(name, pid, status)| format!("{name} (pid {pid}) has ended, {status}")).collect();
    parts.retain_mut(|part| part.ended().is_none());
    ended
}

fn count(n: usize, of: &str) -> String {
    match n {
        0 => format!("no {of}: it takes tasks, and they wait"),
        1 => format!("1 {of}"),
        _ => format!("{n} {of}s"),
    }
}

fn authorized(cluster: &Cluster, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
    match &cluster.token {
        Some(token) => request.bearer_auth(token),
        None => request,
    }
}

async fn wait_ready(client: &reqwest::Client, cluster: &mut Cluster, wanted: u64) -> Result<(), Failed> {
    let start = Instant::now();
    loop {
        for part in cluster.control.iter_mut().chain(&mut cluster.engines).chain(&mut cluster.nodes) {
            part.check()?;
        }
        let url = format!("{}/v2/catalog/availability", cluster.url);
        let request = authorized(cluster, client.get(url)).timeout(Duration::from_secs(2));
        if let Ok(response) = request.send().await
            && let Ok(body) = response.json::<Value>().await
        {
            let model = body["models"]
                .as_array()
                .into_iter()
                .flatten()
                .find(|m| m["model_id"] == cluster.model.as_str());
            if model.is_some_and(|model| model["total_nodes"].as_u64() == Some(wanted)) {
                return Ok(());
            }
        }
        if start.elapsed() > READY_PATIENCE {
            return Err(Failed(format!(
                "not ready after {} s: see the logs in {}",
                READY_PATIENCE.as_secs(),
                cluster.place.folder.display()
            )));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Asks the model something, and prints its tokens as they come.
async fn sample(client: &reqwest::Client, cluster: &Cluster) -> Result<(), Failed> {
    say(&format!("asking {}: {SAMPLE}", cluster.model));
    let task = json!({
        "model_ref": cluster.model, "max_tokens": 48, "temperature": 0.0, "seed": 1,
        "messages": [{"role": "user", "content": SAMPLE}],
    });
    let start = Instant::now();
    let failed = |what: String| {
        Failed(format!("the sample failed: {what}; see the logs in {}", cluster.place.folder.display()))
    };
    let request =
        client.post(format!("{}/v2/tasks", cluster.url)).header("accept", "text/event-stream").json(&task);
    let response = authorized(cluster, request).send().await.map_err(|error| failed(error.to_string()))?;
    if !response.status().is_success() {
        return Err(failed(response.text().await.unwrap_or_default()));
    }
    let (mut body, mut decoder) = (response.bytes_stream(), Decoder::new());
    let (mut first, mut place, mut ended) = (None, String::new(), None);
    while let Some(chunk) = body.next().await {
        decoder.push(&chunk.map_err(|error| failed(error.to_string()))?);
        while let Some(frame) = decoder.next_frame().map_err(|error| failed(error.to_string()))? {
            let Some(data) = &frame.data else { continue };
            let data: Value = serde_json::from_str(data).map_err(|error| failed(error.to_string()))?;
            match frame.event {
                "started" => {
                    place = format!("node {} pool {}", text(&data, "node_id"), text(&data, "pool_id"))
                }
                "token" => {
                    first.get_or_insert_with(|| start.elapsed());
                    print!("{}", text(&data, "t"));
                    // A terminal that is gone is no reason to fail.
                    let _ = std::io::stdout().flush();
                }
                "end" => ended = data["tokens_out"].as_u64(),
                "error" => return Err(failed(data.to_string())),
                _ => {}
            }
        }
    }
    let (Some(first), Some(tokens)) = (first, ended) else {
        return Err(failed("the stream ended without an answer".into()));
    };
    println!(
        "\n==> {tokens} tokens from {place}, the first after {} ms, all after {} ms",
        first.as_millis(),
        start.elapsed().as_millis()
    );
    Ok(())
}

fn text<'v>(data: &'v Value, field: &str) -> &'v str {
    data[field].as_str().unwrap_or_default()
}

fn print_usage(cluster: &Cluster) {
    let url = &cluster.url;
    println!("\nThe cluster is up: {url}, the API in the browser: {url}/docs/\n");
    let key = cluster.token.as_deref().unwrap_or("none");
    println!("export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key}\n");
    for line in to_try(&cluster.model) {
        println!("{line}");
    }
    println!();
    if let [node, _, ..] = cluster.nodes.as_slice() {
        println!("Kill a node, also while it answers, and see what becomes of its tasks:\n");
        println!("kill -9 {}   # {}\n", node.pid(), node.name);
    }
    println!("Logs are in {}. Ctrl-C stops everything.", cluster.place.folder.display());
}

/// Lines for a shell that has taken the two variables over: OpenAI's API by hand and by its own client, and a
/// task with its stream.
fn to_try(model: &str) -> [String; 3] {
    let authorized =
        "-H \"Authorization: Bearer $OPENAI_API_KEY\" -H \"Content-Type: application/json\" \\\n ";
    let messages = "[{\"role\": \"user\", \"content\": \"What is the capital of France?\"}]";
    [
        format!(
            "curl -N \"$OPENAI_BASE_URL/chat/completions\" {authorized} -d '{{\"model\": \"{model}\", \"max_tokens\": 32, \"stream\": true, \"messages\": {messages}}}'"
        ),
        format!(
            "python3 -c 'import openai; print(openai.OpenAI().chat.completions.create(model=\"{model}\", max_tokens=32,\n  messages={messages}).choices[0].message.content)'   # pip install openai"
        ),
        format!(
            "curl -N \"${{OPENAI_BASE_URL%/v1}}/v2/tasks\" {authorized} -H \"Accept: text/event-stream\" -d '{{\"model_ref\": \"{model}\", \"max_tokens\": 32, \"prompt\": \"Once upon a time\"}}'"
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::steps::read;

    // CLOUD-3020
    #[test]
    fn two_runs_have_a_directory_and_ports_each_and_the_third_takes_what_the_first_has_left() {
        let all = tempfile::tempdir().unwrap();
        let first = RunFolder::take(all.path()).unwrap();
        let second = RunFolder::take(all.path()).unwrap();
        assert_ne!((&first.folder, first.ports), (&second.folder, second.ports));
        let (folder, ports) = (first.folder.clone(), first.ports);
        std::fs::write(folder.join("left"), "x").unwrap();
        drop(first);
        // A process that a test beside this one forks holds the lock too, until it is a program of its own.
        let end = Instant::now() + Duration::from_secs(10);
        let third = loop {
            let taken = RunFolder::take(all.path()).unwrap();
            if taken.folder == folder || Instant::now() > end {
                break taken;
            }
            drop(taken);
            std::thread::sleep(Duration::from_millis(10));
        };
        assert_eq!((&third.folder, third.ports), (&folder, ports));
        assert!(!folder.join("left").exists(), "it begins empty");
    }

    // CLOUD-3021
    #[test]
    fn what_has_ended_is_named_once_with_its_pid_and_the_others_stay() {
        let logs = tempfile::tempdir().unwrap();
        let sleeping = |name: &str| {
            let mut command = ending_with_us(Path::new("sleep"));
            command.arg("60");
            Started::spawn(name, command, logs.path()).unwrap()
        };
        let mut parts = vec![sleeping("gpu-node-1"), sleeping("gpu-node-2")];
        assert!(take_ended(&mut parts).is_empty());
        let pid = parts[0].pid();
        kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
        parts[0].child.wait().unwrap();
        let reported = take_ended(&mut parts);
        assert!(
            reported.len() == 1 && reported[0].starts_with(&format!("gpu-node-1 (pid {pid}) has ended")),
            "{reported:?}"
        );
        assert_eq!((parts.len(), take_ended(&mut parts).len()), (1, 0));
        assert!(count(0, "node").starts_with("no node"));
    }

    // CLOUD-3022
    #[test]
    fn what_is_started_ends_with_the_thread_that_started_it() {
        let logs = tempfile::tempdir().unwrap();
        let folder = logs.path().to_owned();
        let starting = std::thread::spawn(move || {
            let mut command = ending_with_us(Path::new("sleep"));
            command.arg("60");
            let child = Started::spawn("child", command, &folder).unwrap();
            let name = format!("/proc/{}/comm", child.pid());
            // It has been told by then.
            while std::fs::read_to_string(&name).unwrap().trim() != "sleep" {
                std::thread::sleep(Duration::from_millis(5));
            }
            child
        });
        let mut child = starting.join().unwrap();
        let start = Instant::now();
        while child.ended().is_none() {
            assert!(start.elapsed() < STOP_PATIENCE, "it outlives its thread");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    // CLOUD-2888
    #[test]
    fn the_readme_shows_the_lines_that_up_prints() {
        let readme = read(&root().join("README.md")).unwrap();
        for line in to_try("smollm2-135m-instruct.q4_1") {
            assert!(readme.contains(&format!("\n{line}\n")), "not in README.md:\n{line}");
        }
    }
}
