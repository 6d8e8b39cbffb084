//! Processes put together: one control plane, some nodes, an engine behind each.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use pool_registry_types::node::Liveness;
use tempfile::TempDir;

use crate::client::{Client, holds_secret};
use crate::eventually;
use crate::network::{self, Network};
use crate::process::{Process, free_port, program};
use crate::real_engine;

/// The token of test clusters.
pub const TOKEN: &str = "test-token-of-the-cluster";
/// How long a cluster may take to be whole.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// What stands behind a node.
#[derive(Debug, Clone)]
pub enum Engine {
    Fake {
        slots: u32,
        first_token_ms: u64,
        pace_ms: u64,
        dialect: &'static str,
    },
    /// llama.cpp with the tiny model.
    Tiny {
        slots: u32,
    },
    /// The same with the whole context of the model: an answer can last for half a minute.
    TinyLong {
        slots: u32,
    },
    None,
}

impl Engine {
    /// A fake with four slots that takes its time.
    pub fn steady() -> Self {
        Self::Fake { slots: 4, first_token_ms: 150, pace_ms: 20, dialect: "llamacpp" }
    }

    pub fn model(&self) -> &'static str {
        match self {
            Self::Tiny { .. } | Self::TinyLong { .. } => "tiny",
            _ => "fake-model",
        }
    }
}

/// How a cluster is set up.
#[derive(Debug, Clone)]
pub struct Options {
    pub nodes: usize,
    pub engine: Engine,
    /// Engines of single nodes that differ from it.
    pub other_engines: Vec<(usize, Engine)>,
    /// More variables for the control plane.
    pub control: Vec<(&'static str, String)>,
    /// More variables for single nodes.
    pub node: Vec<(usize, &'static str, String)>,
    /// Files of pools of single nodes, which then run their engines themselves.
    pub pools: Vec<(usize, String)>,
    /// The hosts that they run on; absent: all on this one. The clients' thread is on the control
    /// plane's.
    pub network: Option<Arc<Network>>,
    /// Programs other than this build's: the control plane's, the nodes'.
    pub control_program: Option<PathBuf>,
    pub node_program: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: 2,
            engine: Engine::steady(),
            other_engines: Vec::new(),
            control: Vec::new(),
            node: Vec::new(),
            pools: Vec::new(),
            network: None,
            control_program: None,
            node_program: None,
        }
    }
}

/// One node: its daemon and its engine.
#[derive(Debug)]
pub struct Node {
    pub id: String,
    pub port: u16,
    pub runtime_dir: PathBuf,
    pub daemon: Option<Process>,
    pub engine: Option<Process>,
}

/// A running cluster; everything ends when it is dropped.
#[derive(Debug)]
pub struct Cluster {
    pub options: Options,
    pub dir: TempDir,
    pub port: u16,
    pub control: Option<Process>,
    pub nodes: Vec<Node>,
    pub client: Client,
}

impl Cluster {
    /// Starts everything and waits until all nodes are online with a ready pool.
    pub async fn start(options: Options) -> Self {
        let mut cluster = Self::without_nodes(options);
        cluster.start_control();
        for n in 0..cluster.options.nodes {
            cluster.add_node(n);
        }
        for n in 0..cluster.options.nodes {
            cluster.wait_online(n).await;
        }
        cluster
    }

    /// The folder and the ports, and nothing running.
    pub fn without_nodes(options: Options) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let port = free_port();
        let client = Client::new(&format!("http://127.0.0.1:{port}"), Some(TOKEN));
        Self { options, dir, port, control: None, nodes: Vec::new(), client }
    }

    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.log"))
    }

    /// Starts the control plane in the cloud profile; at the same port again after a death.
    pub fn start_control(&mut self) {
        let daemon = self.options.control_program.clone().unwrap_or_else(|| program("orchestratord"));
        let mut command = match &self.options.network {
            Some(network) => network.control.command(daemon),
            None => Command::new(daemon),
        };
        let host = if self.options.network.is_some() { "0.0.0.0" } else { "127.0.0.1" };
        command
            .env("ORCHESTRATORD_CLOUD_PROFILE", "true")
            .env("ORCHESTRATORD_ADDR", format!("{host}:{}", self.port))
            .env("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "1")
            .env("ORCHESTRATORD_NODE_TIMEOUT_SECS", "3")
            .env("ORCHESTRATORD_DATA_DIR", self.dir.path().join("orchestratord"))
            .envs(self.options.control.iter().map(|(name, value)| (*name, value.as_str())));
        with_token(&mut command);
        self.control = Some(Process::start(command, &self.log("orchestratord")));
    }

    /// Starts node `n` and its engine.
    pub fn add_node(&mut self, n: usize) {
        self.prepare_node(n);
        if let Some((_, text)) = self.options.pools.iter().find(|(of, _)| *of == n) {
            std::fs::write(self.pools_file(n), text).expect("a writable folder");
        } else {
            self.start_engine(n);
        }
        self.start_daemon(n);
    }

    /// The folder and the port of node `n`, and nothing running.
    pub fn prepare_node(&mut self, n: usize) {
        let id = format!("gpu-node-{}", n + 1);
        let runtime_dir = self.dir.path().join(&id);
        std::fs::create_dir_all(&runtime_dir).expect("a writable folder");
        self.nodes.push(Node { id, port: free_port(), runtime_dir, daemon: None, engine: None });
    }

    /// Where the file of pools of node `n` is, if it has one.
    pub fn pools_file(&self, n: usize) -> PathBuf {
        self.dir.path().join(format!("{}-pools.toml", self.nodes[n].id))
    }

    pub fn start_daemon(&mut self, n: usize) {
        let node = &self.nodes[n];
        let daemon = self.options.node_program.clone().unwrap_or_else(|| program("pool-managerd"));
        let (mut command, control) = match &self.options.network {
            Some(network) => {
                (network.nodes[n].command(daemon), format!("http://{}:{}", network::CONTROL, self.port))
            }
            None => (Command::new(daemon), self.client.base.clone()),
        };
        command
            .env("POOL_MANAGERD_NODE_ID", &node.id)
            .env("POOL_MANAGERD_ADDR", format!("{}:{}", self.node_host(n), node.port))
            .env("POOL_MANAGERD_RUNTIME_DIR", &node.runtime_dir)
            .env("POOL_MANAGERD_STATE_DIR", self.dir.path().join(format!("{}-state", node.id)))
            .env("POOL_MANAGERD_MODELS_DIR", self.models_dir(n))
            .env("POOL_MANAGERD_SHUTDOWN_GRACE_SECS", "10")
            .env("ORCHESTRATORD_URL", control);
        if self.pools_file(n).exists() {
            command
                .env("POOL_MANAGERD_POOLS", self.pools_file(n))
                .env("POOL_MANAGERD_LOGS_DIR", self.dir.path().join(format!("{}-logs", node.id)))
                .env("POOL_MANAGERD_PACKAGES_DIR", self.dir.path().join(format!("{}-packages", node.id)));
        }
        let own = self.options.node.iter().filter(|(of, ..)| *of == n);
        command.envs(own.map(|(_, name, value)| (*name, value.as_str())));
        with_token(&mut command);
        let log = self.log(&node.id);
        self.nodes[n].daemon = Some(Process::start(command, &log));
    }

    pub fn start_engine(&mut self, n: usize) {
        let log = self.log(&format!("{}-engine", self.nodes[n].id));
        let own = self.options.other_engines.iter().find(|(of, _)| *of == n).map(|(_, engine)| engine);
        let engine = own.unwrap_or(&self.options.engine);
        let runtime_dir = &self.nodes[n].runtime_dir;
        self.nodes[n].engine = match (&self.options.network, engine) {
            (Some(network), Engine::Fake { .. }) => {
                let command = network.nodes[n].command(program("fake-engine"));
                Some(Process::start(fake_engine(command, engine, runtime_dir), &log))
            }
            _ => start_engine(engine, runtime_dir, &log),
        };
    }

    fn node_host(&self, n: usize) -> String {
        match self.options.network {
            Some(_) => network::node_address(n),
            None => "127.0.0.1".to_owned(),
        }
    }

    /// Where node `n` keeps its models.
    pub fn models_dir(&self, n: usize) -> PathBuf {
        self.dir.path().join(format!("{}-models", self.nodes[n].id))
    }

    /// A client of node `n` itself.
    pub fn node_client(&self, n: usize) -> Client {
        Client::new(&format!("http://{}:{}", self.node_host(n), self.nodes[n].port), Some(TOKEN))
    }

    /// What a client on the host of node `n` is told.
    pub async fn on_node<T: Send>(&self, n: usize, ask: impl AsyncFnOnce() -> T + Send) -> T {
        match &self.options.network {
            Some(network) => network.nodes[n].within(ask),
            None => ask().await,
        }
    }

    /// Where the engine of node `n` listens, by its handoff file.
    pub fn engine_url(&self, n: usize) -> String {
        let file = self.nodes[n].runtime_dir.join("pool-0-r0.json");
        let text = std::fs::read_to_string(file).expect("a handoff file");
        let json: serde_json::Value = serde_json::from_str(&text).expect("a whole handoff file");
        json["url"].as_str().expect("a URL").to_owned()
    }

    /// Sets a fault of the fake engine of node `n`.
    pub async fn fault(&self, n: usize, fault: serde_json::Value) {
        let engine = Client::new(&self.engine_url(n), None);
        assert_eq!(engine.post("/fake/fault", &fault).await.status(), 204);
    }

    /// Waits until node `n` is online with a ready pool.
    pub async fn wait_online(&self, n: usize) {
        let id = &self.nodes[n].id;
        eventually(&format!("{id} is online and ready"), START_PATIENCE, || async {
            let node = self.client.node(id).await?;
            let ready = node.pools.iter().any(|pool| pool.report.ready && pool.slots_free > 0);
            (node.liveness == Liveness::Online && ready).then_some(())
        })
        .await;
    }

    /// Waits until node `n` has heard that it gets tasks: its heartbeats come at their interval from then on.
    pub async fn wait_ready(&self, n: usize) {
        let id = &self.nodes[n].id;
        eventually(&format!("{id} has heard that it is online"), START_PATIENCE, || async {
            (self.node_client(n).get("/health/ready").await.ok()?.status() == 200).then_some(())
        })
        .await;
    }

    /// Waits until node `n` is no longer online.
    pub async fn wait_not_online(&self, n: usize, patience: Duration) -> Liveness {
        let id = &self.nodes[n].id;
        eventually(&format!("{id} is suspect"), patience, || async {
            let liveness = self.client.node(id).await?.liveness;
            (liveness != Liveness::Online).then_some(liveness)
        })
        .await
    }

    pub async fn wait_liveness(&self, n: usize, liveness: Liveness, patience: Duration) {
        let id = &self.nodes[n].id;
        eventually(&format!("{id} is {liveness:?}"), patience, || async {
            (self.client.node(id).await?.liveness == liveness).then_some(())
        })
        .await;
    }

    /// A task for the cluster's model.
    pub fn task(&self, tokens: u32) -> serde_json::Value {
        serde_json::json!({ "model_ref": self.options.engine.model(), "prompt": "once upon a time", "max_tokens": tokens })
    }
}

/// A file of tokens with that of the tests, which may do everything, and these with their scopes. Each is its
/// own holder's, named `holder-0` and so on. Returns the folder, with which the file goes, and its path.
pub fn tokens_file(more: &[(&str, &str)]) -> (TempDir, String) {
    let entry = |name: &str, token: &str, scope: &str| {
        format!("[[token]]\nname = \"{name}\"\ntoken = \"{token}\"\nscopes = [\"{scope}\"]\n")
    };
    let more = more.iter().enumerate().map(|(n, (token, scope))| entry(&format!("holder-{n}"), token, scope));
    let text: String = std::iter::once(entry("admin", TOKEN, "admin")).chain(more).collect();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("tokens.toml");
    std::fs::write(&file, text).expect("a writable folder");
    let path = file.display().to_string();
    (folder, path)
}

/// The clusters' own token, unless the command has a file of tokens.
fn with_token(command: &mut Command) {
    let has_file = command.get_envs().any(|(name, _)| name == "LLORCH_API_TOKEN_FILE");
    if !has_file {
        command.env("LLORCH_API_TOKEN", TOKEN);
    }
}

/// No token in any log of the whole run: looked at when a cluster ends, whatever it was for.
impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let daemons = self.control.iter().chain(self.nodes.iter().filter_map(|node| node.daemon.as_ref()));
        for daemon in daemons {
            let arguments = std::fs::read(format!("/proc/{}/cmdline", daemon.pid())).unwrap_or_default();
            assert!(!holds_secret(&arguments), "a token stands on a command line");
        }
        for entry in std::fs::read_dir(self.dir.path()).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|ext| ext == "log" || ext == "jsonl") {
                let text = std::fs::read(entry.path()).unwrap_or_default();
                assert!(!holds_secret(&text), "{} holds a token", entry.path().display());
            }
        }
    }
}

/// Starts an engine that leaves its handoff in `runtime_dir`.
pub fn start_engine(engine: &Engine, runtime_dir: &Path, log: &Path) -> Option<Process> {
    let command = match engine {
        Engine::None => return None,
        Engine::Fake { .. } => fake_engine(Command::new(program("fake-engine")), engine, runtime_dir),
        Engine::Tiny { slots } => {
            real_engine::command(&real_engine::tiny_model(), "tiny", *slots, 1024, runtime_dir)
        }
        Engine::TinyLong { slots } => {
            real_engine::command(&real_engine::tiny_model(), "tiny", *slots, 8192, runtime_dir)
        }
    };
    Some(Process::start(command, log))
}

/// The command with the arguments of a fake engine.
fn fake_engine(mut command: Command, engine: &Engine, runtime_dir: &Path) -> Command {
    let Engine::Fake { slots, first_token_ms, pace_ms, dialect } = engine else { return command };
    command
        .args(["--slots", &slots.to_string(), "--first-token-ms", &first_token_ms.to_string()])
        .args(["--pace-ms", &pace_ms.to_string(), "--engine", dialect])
        .args(["--pool-id", "pool-0", "--replica-id", "r0", "--handoff-dir"])
        .arg(runtime_dir);
    command
}
