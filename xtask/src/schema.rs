//! `cargo xtask schema`: both daemons, driven by their own OpenAPI documents.
//!
//! schemathesis makes requests that a document allows and requests that it forbids, and holds the
//! answers against it. What it may ask for stands in the documents; what cannot hold is loosened,
//! with a reason, in `test-harness/schemathesis/schemathesis.toml`. Each document has a cluster of
//! its own, so that neither run meets what the other has drained, and the two run side by side.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use crate::engine;
use crate::steps::{Failed, cache, cargo, read, root, say};
use crate::up::{Started, port, target};

/// The token of the clusters; it guards nothing.
const TOKEN: &str = "token-of-the-driven-clusters";
/// Seconds to drive for, and the least: the phase of single deviations takes up to 17 of them.
const SECONDS: u32 = 120;
const LEAST_SECONDS: u32 = 30;
/// How long a cluster may take to be whole.
const READY_PATIENCE: Duration = Duration::from_secs(60);
/// What a run may take beyond its seconds: reading the document, shrinking, the last answer.
const END_PATIENCE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Requests for each operation in the phases that count them.
const EXAMPLES: &str = "50";
/// Where the shown part of the output begins.
const FAILURES: &str = "FAILURES";
const ERRORS: &str = "ERRORS";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How long to drive, both documents together.
    #[arg(long, default_value_t = SECONDS, value_parser = clap::value_parser!(u32).range(i64::from(LEAST_SECONDS)..=86_400))]
    seconds: u32,
    /// Repeats a run whose output names this seed.
    #[arg(long)]
    seed: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        // In CI the same requests each time: what a new draw finds is mended by whoever draws.
        Self { seconds: SECONDS, seed: Some("1".to_owned()) }
    }
}

/// Whose document is driven.
#[derive(Debug, Clone, Copy)]
enum Driven {
    ControlPlane,
    Node,
}

impl Driven {
    const BOTH: [Self; 2] = [Self::ControlPlane, Self::Node];

    const fn name(self) -> &'static str {
        match self {
            Self::ControlPlane => "orchestratord",
            Self::Node => "pool-managerd",
        }
    }

    fn document(self) -> PathBuf {
        root().join("contracts/openapi").join(format!("{}.json", self.name()))
    }
}

/// One control plane, one node, one fake engine. Fields are dropped in order: the node leaves
/// before the control plane goes.
struct Cluster {
    node: Started,
    _engine: Started,
    control: Started,
    control_url: String,
    node_url: String,
}

/// One document on its way.
struct Run {
    driven: Driven,
    /// Dropped before the cluster that it talks to.
    program: Started,
    cluster: Cluster,
    output: PathBuf,
}

pub(crate) fn run(options: &Options) -> Result<(), Failed> {
    let tools = tools()?;
    say("building both daemons and the fake engine");
    // The same selection as every other chore builds, so that nothing is compiled twice.
    cargo(&["build", "--locked", "--workspace", "--bins"], "mend what the compiler says")?;
    let work = cache().join("schema");
    // What an earlier run left there is of no use.
    let _ = std::fs::remove_dir_all(&work);
    let deadline = Instant::now() + Duration::from_secs(u64::from(options.seconds)) + END_PATIENCE;
    let mut runs = Vec::new();
    for driven in Driven::BOTH {
        let folder = work.join(driven.name());
        std::fs::create_dir_all(&folder).map_err(|error| Failed(format!("{}: {error}", folder.display())))?;
        let mut cluster = Cluster::start(&folder)?;
        cluster.wait_ready()?;
        say(&format!("driving {} for {} s by its document", driven.name(), options.seconds));
        let command = drive(driven, &cluster, &tools, &folder, options)?;
        let program = Started::spawn("schemathesis", command, &folder)?;
        runs.push(Run { driven, program, cluster, output: folder.join("schemathesis.log") });
    }
    let mut failed = Vec::new();
    for mut run in runs {
        let ended = end_of(&mut run.program, deadline);
        // A daemon that died is the cause of whatever was found after it.
        let daemons = run.cluster.check();
        let text = read(&run.output)?;
        if daemons.is_ok() && ended.is_some_and(|status| status.success()) {
            println!("{}: {}", run.driven.name(), counts(&text));
            continue;
        }
        println!("{}", shown(&text));
        failed.push(match (daemons, ended) {
            (Err(Failed(why)), _) => why,
            (Ok(()), None) => format!("{} did not come to an end", run.driven.name()),
            (Ok(()), Some(_)) => format!("{} does not do what its document says", run.driven.name()),
        });
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Failed(format!(
        "{}: mend the document or the daemon; all of it stands in {}",
        failed.join("; "),
        work.display()
    )))
}

/// schemathesis, from the package index into the cache. Returns the folder for `PYTHONPATH`.
fn tools() -> Result<PathBuf, Failed> {
    let folder = cache().join("schemathesis");
    let lock = root().join("test-harness/schemathesis/requirements.lock");
    engine::fetch("schemathesis (wheels of 12 MB)", &folder, &lock)?;
    Ok(folder)
}

fn drive(
    driven: Driven,
    cluster: &Cluster,
    tools: &Path,
    folder: &Path,
    options: &Options,
) -> Result<Command, Failed> {
    let url = match driven {
        Driven::ControlPlane => &cluster.control_url,
        Driven::Node => &cluster.node_url,
    };
    let mut command = Command::new(engine::system_python()?);
    // Paths in its settings are those of the repository; what it keeps goes to the cache.
    command.current_dir(root()).env("PYTHONPATH", tools).env("PYTHONDONTWRITEBYTECODE", "1");
    command.env("LLORCH_API_TOKEN", TOKEN).env("HYPOTHESIS_STORAGE_DIRECTORY", folder.join("hypothesis"));
    command.args(["-m", "schemathesis.cli", "--no-color"]);
    command.args(["--config-file", "test-harness/schemathesis/schemathesis.toml", "run"]);
    command.arg(driven.document()).args(["--url", url, "--checks", "all"]);
    command.args(["--max-examples", EXAMPLES, "--max-time", &options.seconds.to_string()]);
    if let Some(seed) = &options.seed {
        command.args(["--seed", seed]);
    }
    Ok(command)
}

/// The status of a run, or nothing for one that has not ended by the deadline.
fn end_of(program: &mut Started, deadline: Instant) -> Option<ExitStatus> {
    while Instant::now() < deadline {
        if let Some(status) = program.ended() {
            return Some(status);
        }
        std::thread::sleep(LOOK_EVERY);
    }
    None
}

/// From the first failure on; everything where there is none.
fn shown(text: &str) -> &str {
    let from = [ERRORS, FAILURES].iter().filter_map(|word| text.find(&format!("= {word} ="))).min();
    let line = from.and_then(|at| text[..at].rfind('\n')).map_or(0, |at| at + 1);
    &text[line..]
}

/// The line that says how many requests were made.
fn counts(text: &str) -> &str {
    let after = text.lines().skip_while(|line| !line.starts_with("Test cases:")).nth(1);
    after.map_or("it said nothing", str::trim)
}

impl Cluster {
    fn start(folder: &Path) -> Result<Self, Failed> {
        let (control_port, node_port) = (port(0)?, port(0)?);
        let (control_url, node_url) =
            (format!("http://127.0.0.1:{control_port}"), format!("http://127.0.0.1:{node_port}"));
        let runtime_dir = folder.join("engines");
        std::fs::create_dir_all(&runtime_dir)
            .map_err(|error| Failed(format!("{}: {error}", runtime_dir.display())))?;

        let mut command = ours("orchestratord");
        command
            .env("ORCHESTRATORD_CLOUD_PROFILE", "true")
            .env("ORCHESTRATORD_ADDR", format!("127.0.0.1:{control_port}"))
            .env("ORCHESTRATORD_DATA_DIR", folder.join("orchestratord"))
            // Nodes that requests make up are dialled: nothing leaves this machine.
            .env("ORCHESTRATORD_NODE_ADDRESSES", "127.0.0.0/8")
            // They are found out, and the real one comes back, within the run.
            .env("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "1")
            .env("ORCHESTRATORD_NODE_TIMEOUT_SECS", "3")
            // Tasks for models that nobody has end soon, and so do their streams; they are kept
            // for the requests that follow.
            .env("ORCHESTRATORD_QUEUE_TIMEOUT_SECS", "1")
            .env("ORCHESTRATORD_TASK_RETENTION_SECS", "20");
        let control = Started::spawn("orchestratord", command, folder)?;

        let mut command = Command::new(target("debug").join("fake-engine"));
        command.args(["--slots", "4", "--pool-id", "pool-0", "--replica-id", "r0", "--handoff-dir"]);
        command.arg(&runtime_dir);
        let engine = Started::spawn("fake-engine", command, folder)?;

        let mut command = ours("pool-managerd");
        command
            .env("POOL_MANAGERD_NODE_ID", "gpu-node-1")
            .env("POOL_MANAGERD_ADDR", format!("127.0.0.1:{node_port}"))
            .env("POOL_MANAGERD_RUNTIME_DIR", &runtime_dir)
            .env("POOL_MANAGERD_STATE_DIR", folder.join("pool-managerd"))
            .env("POOL_MANAGERD_MODELS_DIR", folder.join("models"))
            .env("POOL_MANAGERD_SHUTDOWN_GRACE_SECS", "2")
            .env("ORCHESTRATORD_URL", &control_url);
        let node = Started::spawn("pool-managerd", command, folder)?;
        Ok(Self { node, _engine: engine, control, control_url, node_url })
    }

    /// Waits until the control plane lists a ready pool.
    fn wait_ready(&mut self) -> Result<(), Failed> {
        let runtime = tokio::runtime::Runtime::new().map_err(|error| Failed(format!("tokio: {error}")))?;
        // Only the first installation in a process can fail.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::new();
        let start = Instant::now();
        while start.elapsed() < READY_PATIENCE {
            self.check()?;
            let request = client
                .get(format!("{}/v2/pools", self.control_url))
                .bearer_auth(TOKEN)
                .timeout(Duration::from_secs(2));
            let pools = runtime.block_on(async { request.send().await?.json::<serde_json::Value>().await });
            let pools = pools.unwrap_or_default();
            if pools["pools"].as_array().is_some_and(|pools| pools.iter().any(|pool| pool["ready"] == true)) {
                return Ok(());
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Err(Failed(format!(
            "no pool is ready after {} s: see the logs in {}",
            READY_PATIENCE.as_secs(),
            cache().join("schema").display()
        )))
    }

    fn check(&mut self) -> Result<(), Failed> {
        self.control.check()?;
        self.node.check()
    }
}

/// A daemon with its token and no setting of the person's own.
fn ours(name: &str) -> Command {
    let mut command = Command::new(target("debug").join(name));
    for (variable, _) in std::env::vars_os() {
        let text = variable.to_string_lossy();
        if ["ORCHESTRATORD_", "POOL_MANAGERD_", "LLORCH_"].iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(&variable);
        }
    }
    // Requests are many and most of them are wrong: only what needs a person is written down.
    command.env("LLORCH_API_TOKEN", TOKEN).env("LLORCH_LOG", "warn");
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_run_is_shown_from_its_failures_on_and_a_good_one_by_its_counts() {
        let failed = "Loaded\n\n==== FAILURES ====\n1. it differs\n";
        assert_eq!(shown(failed), "==== FAILURES ====\n1. it differs\n");
        assert_eq!(shown("cannot be imported\n"), "cannot be imported\n");
        let good = "Test cases:\n  5387 generated, 5387 passed\n\nSeed: 1\n";
        assert_eq!(counts(good), "5387 generated, 5387 passed");
    }
}
