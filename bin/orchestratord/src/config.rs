//! The settings of the control plane: every one a flag and an environment variable, checked as
//! a whole before anything binds.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use axum::http::HeaderValue;
use daemon_kit::directories::{Directory, Purpose};
use daemon_kit::health_check::HealthCheck;
use daemon_kit::hosts::{AllowedHosts, HostError};
use daemon_kit::settings::{Daemon, Own, Shared, SharedError, SharedSettings};
use node_agent::settings::{NodeConfig, NodeSettings, NodeSettingsError};
use pool_registry_types::ModelRef;
use pool_registry_types::task::MAX_PASSED_BYTES;
use task_scheduler::{FullLane, Policy, SessionPolicy, Strategy, Timing};

use crate::services::addresses::{NodeAddresses, PlaceError};
use crate::services::gateway::{AliasError, Gateway, StreamRecovery};
use crate::token;

/// The settings as they are given.
#[derive(Debug, clap::Args)]
#[command(about = "Queues tasks for language models and places them on the nodes that have them.")]
pub(crate) struct Settings {
    #[command(subcommand)]
    order: Option<Order>,
    /// false: one machine, engines found through local handoff files. true: nodes register.
    #[arg(long, env = "ORCHESTRATORD_CLOUD_PROFILE", default_value_t = false, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    cloud_profile: bool,
    /// Seconds without a sign of life after which a node is offline; at least three heartbeat intervals.
    #[arg(long, env = "ORCHESTRATORD_NODE_TIMEOUT_SECS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    node_timeout_secs: u64,
    /// Seconds between two heartbeats of a node.
    #[arg(long, env = "ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    heartbeat_interval_secs: u64,
    /// Which of the pools that fit a task gets it.
    #[arg(long, env = "ORCHESTRATORD_PLACEMENT_STRATEGY", default_value = "least-loaded", value_parser = strategy_parser())]
    placement_strategy: Strategy,
    /// Waiting tasks per model and priority.
    #[arg(long, env = "ORCHESTRATORD_ADMISSION_CAPACITY", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    admission_capacity: u32,
    /// What becomes of a task that comes to a full queue: it is refused, or the one that waits
    /// longest is dropped for it.
    #[arg(long, env = "ORCHESTRATORD_ADMISSION_POLICY", default_value = "reject")]
    admission_policy: AdmissionPolicy,
    /// Seconds that a session lives without being used.
    #[arg(long, env = "ORCHESTRATORD_SESSION_TTL_SECS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    session_ttl_secs: u64,
    /// Tasks of one session at most.
    #[arg(long, env = "ORCHESTRATORD_SESSION_MAX_TURNS", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    session_max_turns: u32,
    /// Tokens of all answers of one session at most [default: no limit].
    #[arg(long, env = "ORCHESTRATORD_SESSION_TOKEN_BUDGET", value_parser = clap::value_parser!(u64).range(1..))]
    session_token_budget: Option<u64>,
    /// Seconds of running of all tasks of one session at most [default: no limit].
    #[arg(long, env = "ORCHESTRATORD_SESSION_TIME_BUDGET_SECS", value_parser = clap::value_parser!(u64).range(1..))]
    session_time_budget_secs: Option<u64>,
    /// Seconds that a task waits for a slot at most.
    #[arg(long, env = "ORCHESTRATORD_QUEUE_TIMEOUT_SECS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    queue_timeout_secs: u64,
    /// Seconds from a dispatch to its first token at most.
    #[arg(long, env = "ORCHESTRATORD_FIRST_TOKEN_TIMEOUT_SECS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    first_token_timeout_secs: u64,
    /// Seconds between two tokens at most.
    #[arg(long, env = "ORCHESTRATORD_TOKEN_IDLE_TIMEOUT_SECS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    token_idle_timeout_secs: u64,
    /// Seconds that an ended task can be read.
    #[arg(long, env = "ORCHESTRATORD_TASK_RETENTION_SECS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    task_retention_secs: u64,
    /// Bytes that the streams of ended tasks take together at most; each is a byte of memory. 0 keeps none.
    #[arg(long, env = "ORCHESTRATORD_EVENT_LOG_BYTES", default_value_t = 32 * 1024 * 1024)]
    event_log_bytes: u64,
    /// Bytes of requests that are read or wait for an engine at most, half of them of one token; beyond it
    /// they answer `503 OVERLOADED`.
    #[arg(long, env = "ORCHESTRATORD_QUEUE_BYTES", default_value_t = 128 * 1024 * 1024, value_parser = clap::value_parser!(u64).range(16 * 1024 * 1024..))]
    queue_bytes: u64,
    /// Bytes of the streams of tasks that have not ended, and of those that are read still, beyond which new
    /// tasks answer `503 OVERLOADED`.
    #[arg(long, env = "ORCHESTRATORD_LIVE_LOG_BYTES", default_value_t = 256 * 1024 * 1024, value_parser = clap::value_parser!(u64).range(1024 * 1024..))]
    live_log_bytes: u64,
    /// Bytes of answers under /v1 that are held back until they are whole at most, 8 MiB of one; beyond it an
    /// answer passes as it comes, and is not asked for again where it breaks off. 0 holds none.
    #[arg(long, env = "ORCHESTRATORD_HELD_ANSWER_BYTES", default_value_t = 256 * 1024 * 1024)]
    held_answer_bytes: u64,
    /// Seconds after which a connection is closed whose peer takes nothing of what is to be written.
    #[arg(long, env = "ORCHESTRATORD_STALLED_WRITE_SECS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    stalled_write_secs: u64,
    /// Nodes that are known at a time at most; each with eight pools takes some 16 KB of memory.
    #[arg(long, env = "ORCHESTRATORD_MAX_NODES", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    max_nodes: u32,
    /// Ended tasks that can be read at a time at most; each takes some 3 KB of memory beside its stream.
    #[arg(long, env = "ORCHESTRATORD_RETAINED_TASKS", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    retained_tasks: u32,
    /// Threads on which streams live [default: one for two cores, four at most].
    #[arg(long, env = "ORCHESTRATORD_STREAM_THREADS", value_parser = clap::value_parser!(u16).range(1..=256))]
    stream_threads: Option<u16>,
    /// The directory of what outlives this process: entries of models, artifacts, and in the home profile
    /// the operator's orders.
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Of the home profile, where this machine is the one node.
    #[command(flatten)]
    home: NodeSettings,
    #[command(flatten)]
    shared: SharedSettings,
    /// Origins whose pages may call, comma-separated [default: none].
    #[arg(long, env = "ORCHESTRATORD_CORS_ORIGINS")]
    cors_origins: Option<String>,
    /// Without tokens: names of hosts by which this daemon may be called besides this machine's own,
    /// comma-separated, whatever the port [default: none].
    #[arg(long, env = "ORCHESTRATORD_ALLOWED_HOSTS")]
    allowed_hosts: Option<String>,
    /// Requests a second of one holder of client tokens at most [default: no limit].
    #[arg(long, env = "ORCHESTRATORD_REQUESTS_PER_SECOND")]
    requests_per_second: Option<NonZeroU32>,
    /// Tasks of one holder that wait or run at most [default: no limit].
    #[arg(long, env = "ORCHESTRATORD_TASKS_PER_TOKEN", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    tasks_per_token: Option<u32>,
    /// Names of models that clients use for others: alias=model, comma-separated [default: none].
    #[arg(long, env = "ORCHESTRATORD_MODEL_ALIASES")]
    model_aliases: Option<String>,
    /// The model of a request under /v1 that names none [default: such a request is refused].
    #[arg(long, env = "ORCHESTRATORD_DEFAULT_MODEL")]
    default_model: Option<ModelRef>,
    /// Longest body of a request under /v1, bytes; never more than half of ORCHESTRATORD_QUEUE_BYTES.
    #[arg(long, env = "ORCHESTRATORD_V1_BODY_BYTES", default_value_t = 32 * 1024 * 1024, value_parser = clap::value_parser!(u64).range(1..=MAX_PASSED_BYTES as u64))]
    v1_body_bytes: u64,
    /// Whether a stream under /v1 that is lost is generated again and goes on, where it makes the same again: continue or fail.
    #[arg(long, env = "ORCHESTRATORD_V1_RECOVERY", default_value = "continue")]
    v1_recovery: StreamRecovery,
    /// Whether the metrics tell callers apart, by the names of their tokens.
    #[arg(long, env = "ORCHESTRATORD_METRICS_CALLERS", default_value_t = false, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    metrics_callers: bool,
    /// Where nodes may be: networks (10.0.0.0/8), addresses, names or *.suffixes, comma-separated [default: anywhere].
    #[arg(long, env = "ORCHESTRATORD_NODE_ADDRESSES")]
    node_addresses: Option<String>,
}

/// What is this daemon's own of the settings that both have.
const OWN: Own = Own {
    name: "orchestratord",
    prefix: "ORCHESTRATORD",
    foreign: &["ORCHESTRATORD_URL", "ORCHESTRATORD_REGISTER_ON_STARTUP"],
    addr: "127.0.0.1:8080",
    help: &[
        ("shutdown_grace_secs", "Seconds that running tasks get to finish at SIGTERM"),
        (
            "tls_client_ca",
            "Who signs the certificates of nodes, PEM. With it a node must show one that is for its node id",
        ),
        (
            "tls_ca",
            "Who signs the certificates of the nodes as servers, PEM [default: the system's authorities]",
        ),
        ("require_tls", "Refuse to serve, and to call nodes, without TLS"),
    ],
    directories: &[
        Directory { setting: "data_dir", purpose: Purpose::State, folder: "orchestratord" },
        Directory { setting: "runtime_dir", purpose: Purpose::Runtime, folder: "engines" },
        Directory { setting: "models_dir", purpose: Purpose::State, folder: "models" },
        Directory { setting: "packages_dir", purpose: Purpose::State, folder: "packages" },
        Directory { setting: "logs_dir", purpose: Purpose::Logs, folder: "" },
    ],
    before: &[
        ("addr", "cloud_profile"),
        ("cors_origins", "api_token"),
        ("allowed_hosts", "api_token"),
        ("requests_per_second", "api_token"),
        ("tasks_per_token", "api_token"),
        ("node_addresses", "api_token"),
    ],
};

/// Chores beside the daemon itself.
#[derive(Debug, clap::Subcommand)]
enum Order {
    /// The bearer tokens: make one, name one, check a file of them.
    #[command(subcommand)]
    Token(token::Order),
    /// Ask the daemon that runs with these settings whether it lives: the exit status is 0 or 1.
    Health(HealthCheck),
    /// Guard one engine. For orchestratord itself, which speaks to it through its standard input.
    #[command(hide = true)]
    Guard,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum AdmissionPolicy {
    Reject,
    DropLru,
}

fn strategy_parser() -> impl clap::builder::TypedValueParser<Value = Strategy> {
    use clap::builder::TypedValueParser;
    let names = clap::builder::PossibleValuesParser::new(Strategy::ALL.map(|(name, _)| name));
    names.map(|text| {
        let found = Strategy::ALL.into_iter().find(|(name, _)| *name == text);
        found.expect("only these names are let through").1
    })
}

/// The settings as they hold together.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) shared: Shared,
    /// This machine as the one node; absent: the cloud profile, where nodes register.
    pub(crate) home: Option<NodeConfig>,
    pub(crate) policy: Policy,
    pub(crate) event_log_bytes: usize,
    pub(crate) queue_bytes: usize,
    pub(crate) live_log_bytes: usize,
    pub(crate) held_answer_bytes: usize,
    pub(crate) stalled_write: Duration,
    pub(crate) stream_threads: usize,
    pub(crate) data_dir: PathBuf,
    pub(crate) origins: Vec<HeaderValue>,
    pub(crate) hosts: AllowedHosts,
    pub(crate) requests_per_second: Option<NonZeroU32>,
    pub(crate) tasks_per_token: Option<usize>,
    pub(crate) node_addresses: NodeAddresses,
    pub(crate) gateway: Gateway,
    /// Whether metrics tell callers apart.
    pub(crate) metrics_callers: bool,
}

/// Why the settings do not hold together. Each names the variable.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error(
        "ORCHESTRATORD_NODE_TIMEOUT_SECS: {timeout} is less than three times ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS, which is {interval}"
    )]
    TimeoutShort { timeout: u64, interval: u64 },
    #[error(
        "LLORCH_API_TOKEN: the cloud profile needs a token (or LLORCH_API_TOKEN_FILE); orchestratord token new makes one"
    )]
    CloudNeedsToken,
    #[error(
        "ORCHESTRATORD_ADDR: {0} is reached from other machines and needs LLORCH_API_TOKEN (or LLORCH_API_TOKEN_FILE)"
    )]
    OpenToNetwork(SocketAddr),
    #[error(transparent)]
    Shared(#[from] SharedError),
    #[error(transparent)]
    Home(#[from] NodeSettingsError),
    #[error("ORCHESTRATORD_POOLS: in the cloud profile the nodes run the engines: POOL_MANAGERD_POOLS there")]
    CloudRunsNoEngines,
    #[error("ORCHESTRATORD_DATA_DIR: no directory for it can be written here, set one")]
    NoDataDir,
    #[error("ORCHESTRATORD_CORS_ORIGINS: {0:?} is no origin, as https://host:port")]
    Origin(String),
    #[error("ORCHESTRATORD_ALLOWED_HOSTS: {0}")]
    Host(#[from] HostError),
    #[error("ORCHESTRATORD_MODEL_ALIASES: {0}")]
    Aliases(#[from] AliasError),
    #[error("ORCHESTRATORD_NODE_ADDRESSES: {0}")]
    NodeAddresses(#[from] PlaceError),
}

impl Daemon for Settings {
    type Config = Config;
    type Error = ConfigError;
    const OWN: Own = OWN;

    fn shared(&self) -> &SharedSettings {
        &self.shared
    }

    fn chore(&self) -> Option<ExitCode> {
        match self.order.as_ref()? {
            Order::Token(order) => Some(token::run(order)),
            Order::Health(check) => Some(self.shared.check_health(&OWN, *check)),
            Order::Guard => Some(node_agent::guard::inside::run()),
        }
    }

    fn document() -> String {
        crate::app::router::document()
    }

    fn metrics() -> String {
        daemon_kit::metrics::document("orchestratord", crate::metrics::FAMILIES, None)
    }

    fn check(self) -> Result<Config, ConfigError> {
        let (timeout, interval) = (self.node_timeout_secs, self.heartbeat_interval_secs);
        if timeout < interval * 3 {
            return Err(ConfigError::TimeoutShort { timeout, interval });
        }
        let shared = self.shared.check(&OWN)?;
        if shared.tokens.is_empty() && self.cloud_profile {
            return Err(ConfigError::CloudNeedsToken);
        }
        let addr = shared.front.addr;
        if shared.tokens.is_empty() && !daemon_kit::config::is_loopback(addr) {
            return Err(ConfigError::OpenToNetwork(addr));
        }
        let home = match self.cloud_profile {
            false => Some(self.home.check(OWN.prefix)?),
            true if self.home.pools().is_some() => return Err(ConfigError::CloudRunsNoEngines),
            true => None,
        };
        let data_dir = self.data_dir.ok_or(ConfigError::NoDataDir)?;
        let origins = self.cors_origins.as_deref().map(origins).transpose()?.unwrap_or_default();
        let settings = ["ORCHESTRATORD_ALLOWED_HOSTS", "ORCHESTRATORD_CORS_ORIGINS"];
        let hosts = AllowedHosts::parse(settings, self.allowed_hosts.as_deref().unwrap_or_default())?;
        let node_addresses = self.node_addresses.as_deref().unwrap_or_default();
        let needs_https = shared.requires_tls || shared.front.tls.client_ca.is_some();
        let node_addresses = NodeAddresses::parse(node_addresses, needs_https)?;
        let aliases = self.model_aliases.as_deref().map(Gateway::aliases).transpose()?.unwrap_or_default();
        let body_bytes = usize::try_from(self.v1_body_bytes).unwrap_or(usize::MAX);
        let queue_bytes = usize::try_from(self.queue_bytes).unwrap_or(usize::MAX);
        let gateway = Gateway::new(aliases, self.default_model, body_bytes, queue_bytes, self.v1_recovery);
        let policy = Policy {
            timing: Timing {
                heartbeat_interval: Duration::from_secs(interval),
                node_timeout: Duration::from_secs(timeout),
            },
            max_nodes: self.max_nodes as usize,
            strategy: self.placement_strategy,
            admission_capacity: self.admission_capacity as usize,
            full_lane: match self.admission_policy {
                AdmissionPolicy::Reject => FullLane::Reject,
                AdmissionPolicy::DropLru => FullLane::DropLru,
            },
            sessions: SessionPolicy {
                ttl: Duration::from_secs(self.session_ttl_secs),
                max_turns: self.session_max_turns,
                token_budget: self.session_token_budget,
                time_budget: self.session_time_budget_secs.map(Duration::from_secs),
            },
            queue_timeout: Duration::from_secs(self.queue_timeout_secs),
            first_token_timeout: Duration::from_secs(self.first_token_timeout_secs),
            token_idle_timeout: Duration::from_secs(self.token_idle_timeout_secs),
            task_retention: Duration::from_secs(self.task_retention_secs),
            retained_tasks: self.retained_tasks as usize,
            switched_off: None,
        };
        Ok(Config {
            shared,
            home,
            policy,
            metrics_callers: self.metrics_callers,
            event_log_bytes: usize::try_from(self.event_log_bytes).unwrap_or(usize::MAX),
            queue_bytes,
            live_log_bytes: usize::try_from(self.live_log_bytes).unwrap_or(usize::MAX),
            held_answer_bytes: usize::try_from(self.held_answer_bytes).unwrap_or(usize::MAX),
            stalled_write: Duration::from_secs(self.stalled_write_secs),
            stream_threads: self.stream_threads.map_or_else(default_stream_threads, usize::from),
            data_dir,
            origins,
            hosts,
            requests_per_second: self.requests_per_second,
            tasks_per_token: self.tasks_per_token.map(|tasks| tasks as usize),
            node_addresses,
            gateway,
        })
    }
}

fn origins(list: &str) -> Result<Vec<HeaderValue>, ConfigError> {
    let origin = |text: &str| {
        let wrong = || ConfigError::Origin(text.to_owned());
        if !daemon_kit::config::is_base_url(text) || text.contains('*') {
            return Err(wrong());
        }
        HeaderValue::from_str(text).map_err(|_| wrong())
    };
    list.split(',').map(str::trim).filter(|text| !text.is_empty()).map(origin).collect()
}

/// One carries some 30,000 tokens a second that come one by one, and those that share it share its turns.
fn default_stream_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (cores / 2).clamp(1, 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(flags: &[&str]) -> Result<Config, String> {
        let given = daemon_kit::settings::given::<Settings>(flags);
        given.map_err(|e| e.to_string())?.check().map_err(|e| e.to_string())
    }

    // CLOUD-2201
    // CLOUD-2982
    #[test]
    fn the_cloud_profile_is_a_flag_with_or_without_a_value() {
        let profile = |flags: &[&str]| daemon_kit::settings::given::<Settings>(flags).unwrap().cloud_profile;
        assert!(profile(&["--cloud-profile"]) && profile(&["--cloud-profile", "--addr", "localhost:8080"]));
        assert!(
            profile(&["--cloud-profile", "true"]) && !profile(&["--cloud-profile=false"]) && !profile(&[])
        );
    }

    #[test]
    fn the_defaults_are_the_home_profile_on_loopback_without_a_token() {
        let config = check(&[]).unwrap();
        assert!(config.home.is_some() && config.shared.tokens.is_empty());
        assert_eq!(config.shared.front.addr.to_string(), "127.0.0.1:8080");
        assert_eq!(config.policy.timing.node_timeout, Duration::from_secs(30));
        assert_eq!((config.policy.max_nodes, config.policy.retained_tasks), (10_000, 10_000));
        assert_eq!(config.event_log_bytes, 32 << 20);
        assert_eq!((config.queue_bytes, config.live_log_bytes), (128 << 20, 256 << 20));
        assert_eq!(config.held_answer_bytes, 256 << 20);
        assert_eq!(config.stalled_write, Duration::from_secs(600));
    }

    // CLOUD-1301
    // CLOUD-2202
    // CLOUD-2941
    // CLOUD-2942
    #[test]
    fn each_contradiction_names_its_variable() {
        let error = |flags: &[&str]| check(flags).unwrap_err();
        assert!(error(&["--cloud-profile", "true"]).contains("LLORCH_API_TOKEN"));
        assert!(error(&["--addr", "0.0.0.0:8080"]).contains("ORCHESTRATORD_ADDR"));
        assert!(error(&["--node-timeout-secs", "29"]).contains("ORCHESTRATORD_NODE_TIMEOUT_SECS"));
        assert!(error(&["--admission-capacity", "0"]).contains("admission-capacity"));
        let cloud = ["--cloud-profile", "true", "--api-token", "secret-token", "--pools", "x"];
        assert!(error(&cloud).contains("POOL_MANAGERD_POOLS"));
        assert!(
            error(&["--pools", "/nowhere/pools.toml"]).contains("ORCHESTRATORD_POOLS: /nowhere/pools.toml")
        );
        assert!(error(&["--labels", "zone"]).contains("ORCHESTRATORD_LABELS"));
        assert!(error(&["--addr", "nonsense"]).contains("addr"));
        assert!(error(&["--placement-strategy", "best"]).contains("most-free-vram"));
        assert!(error(&["--admission-policy", "maybe"]).contains("drop-lru"));
        assert!(error(&["--require-tls"]).contains("ORCHESTRATORD_REQUIRE_TLS"));
        assert!(error(&["--cors-origins", "*"]).contains("ORCHESTRATORD_CORS_ORIGINS"));
        let host = error(&["--allowed-hosts", "llm.lan,http://x"]);
        assert!(host.contains("ORCHESTRATORD_ALLOWED_HOSTS") && host.contains("http://x"), "{host}");
        assert!(error(&["--model-aliases", "a"]).contains("ORCHESTRATORD_MODEL_ALIASES"));
        assert!(error(&["--node-addresses", "10.0.0.0/99"]).contains("ORCHESTRATORD_NODE_ADDRESSES"));
        assert!(error(&["--session-max-turns", "0"]).contains("session-max-turns"));
        for bound in ["max-nodes", "retained-tasks", "queue-bytes", "live-log-bytes", "stalled-write-secs"] {
            assert!(error(&[&format!("--{bound}"), "0"]).contains(bound));
        }
        // No ended stream is kept.
        assert_eq!(check(&["--event-log-bytes", "0"]).unwrap().event_log_bytes, 0);
        assert_eq!(
            check(&["--placement-strategy", "round-robin"]).unwrap().policy.strategy,
            Strategy::RoundRobin
        );
        assert!(
            check(&["--cloud-profile", "true", "--api-token", "secret-token", "--addr", "0.0.0.0:1"]).is_ok()
        );
    }
}
