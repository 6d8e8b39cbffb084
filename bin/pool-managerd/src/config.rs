//! The settings of a node: every one a flag and an environment variable, checked as a whole.

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use crate::{metrics, models, pools};
use daemon_kit::directories::{Directory, Purpose};
use daemon_kit::health_check::HealthCheck;
use daemon_kit::settings::{Daemon, Own, Shared, SharedError, SharedSettings};
use handoff_watcher::Handoff;
use node_agent::HELD_BYTES;
use node_agent::pools_file::PoolsFile;
use node_agent::settings::{NodeConfig, NodeSettings, NodeSettingsError};
use pool_registry_types::{MachineId, NodeId};

/// The settings as they are given.
#[derive(Debug, clap::Args)]
#[command(about = "Runs on every GPU node: finds engines, serves them to the control plane.")]
pub(crate) struct Settings {
    #[command(subcommand)]
    order: Option<Order>,
    /// This node's name in the cluster [default: the host's name].
    #[arg(long, env = "POOL_MANAGERD_NODE_ID")]
    node_id: Option<NodeId>,
    /// The machine's name [default: the machine id].
    #[arg(long, env = "POOL_MANAGERD_MACHINE_ID")]
    machine_id: Option<MachineId>,
    /// Where the control plane reaches this node [default: the local address of the route to it].
    #[arg(long, env = "POOL_MANAGERD_ADVERTISE_URL")]
    advertise_url: Option<String>,
    /// The control plane, http://host:port.
    #[arg(long, env = "ORCHESTRATORD_URL")]
    orchestratord_url: Option<String>,
    /// Join the cluster at the start.
    #[arg(long, env = "ORCHESTRATORD_REGISTER_ON_STARTUP", default_value_t = true, action = clap::ArgAction::Set)]
    register_on_startup: bool,
    #[command(flatten)]
    own_node: NodeSettings,
    /// The directory of what outlives a reboot: the operator's orders for this node.
    #[arg(long)]
    state_dir: Option<PathBuf>,
    /// Milliseconds between two scans of the runtime directory.
    #[arg(long, env = "POOL_MANAGERD_WATCH_INTERVAL_MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(10..=60_000))]
    watch_interval_ms: u64,
    /// Seconds between two heartbeats, until the control plane's answer says otherwise.
    #[arg(long, env = "POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    heartbeat_interval_secs: u64,
    /// Bytes of attempts' streams that are kept in memory for their readers, all together; beyond it
    /// the oldest that have ended go, then new attempts are refused. What runs goes on, so that each
    /// running attempt may take 8 MiB beyond it.
    #[arg(long, env = "POOL_MANAGERD_HELD_BYTES", default_value_t = HELD_BYTES as u64, value_parser = clap::value_parser!(u64).range(16 * 1024 * 1024..=1024 * 1024 * 1024 * 1024))]
    held_bytes: u64,
    /// Threads on which streams live.
    #[arg(long, env = "POOL_MANAGERD_STREAM_THREADS", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    stream_threads: u16,
    /// The name that the control plane's certificate must be for, where one is asked for.
    #[arg(long, env = "POOL_MANAGERD_TLS_CONTROL_NAME", default_value = "orchestratord")]
    tls_control_name: String,
    #[command(flatten)]
    shared: SharedSettings,
    /// Print the JSON schema of the file of pools and exit.
    #[arg(long)]
    print_pools_schema: bool,
    /// Print the JSON schema of a handoff file and exit.
    #[arg(long)]
    print_handoff_schema: bool,
}

/// What is this daemon's own of the settings that both have.
const OWN: Own = Own {
    name: "pool-managerd",
    prefix: "POOL_MANAGERD",
    foreign: &[],
    addr: "127.0.0.1:9200",
    help: &[
        ("shutdown_grace_secs", "Seconds that running attempts get to finish at SIGTERM"),
        (
            "tls_client_ca",
            "Who signs the control plane's certificate as a client, PEM. With it the control plane must show one",
        ),
        (
            "tls_ca",
            "Who signs the control plane's certificate as a server, PEM [default: the system's authorities]",
        ),
        ("require_tls", "Refuse to serve, and to call the control plane, without TLS"),
    ],
    directories: &[
        Directory { setting: "runtime_dir", purpose: Purpose::Runtime, folder: "engines" },
        Directory { setting: "state_dir", purpose: Purpose::State, folder: "pool-managerd" },
        Directory { setting: "models_dir", purpose: Purpose::State, folder: "models" },
        Directory { setting: "packages_dir", purpose: Purpose::State, folder: "packages" },
        Directory { setting: "logs_dir", purpose: Purpose::Logs, folder: "" },
    ],
    before: &[("addr", "node_id"), ("shutdown_grace_secs", "pools"), ("tls_control_name", "tls_ca")],
};

/// Chores beside the daemon itself.
#[derive(Debug, clap::Subcommand)]
enum Order {
    /// The models on this node's disk: stage, list, verify, remove.
    #[command(subcommand)]
    Models(models::Order),
    /// Files of pools: check one.
    #[command(subcommand)]
    Pools(pools::Order),
    /// Ask the daemon that runs with these settings whether it lives: the exit status is 0 or 1.
    Health(HealthCheck),
    /// Guard one engine. For pool-managerd itself, which speaks to it through its standard input.
    #[command(hide = true)]
    Guard,
}

/// The settings as they hold together.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) shared: Shared,
    pub(crate) node_id: NodeId,
    pub(crate) machine_id: MachineId,
    pub(crate) advertise_url: Option<String>,
    /// Absent: this node joins no cluster.
    pub(crate) control_plane: Option<String>,
    pub(crate) node: NodeConfig,
    pub(crate) state_dir: PathBuf,
    pub(crate) watch_interval: Duration,
    pub(crate) heartbeat_interval: Duration,
    /// What streams that are kept may take together.
    pub(crate) held_bytes: usize,
    pub(crate) stream_threads: usize,
    pub(crate) control_name: String,
}

/// Why the settings do not hold together. Each names the variable.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("POOL_MANAGERD_NODE_ID: the host's name {0:?} is no node id, set one")]
    NodeId(String),
    #[error("ORCHESTRATORD_URL: required unless ORCHESTRATORD_REGISTER_ON_STARTUP is false")]
    NoControlPlane,
    #[error("{variable}: {url:?} is not http://host:port")]
    Url { variable: &'static str, url: String },
    #[error(transparent)]
    Node(#[from] NodeSettingsError),
    #[error("POOL_MANAGERD_STATE_DIR: no directory for it can be written here, set one")]
    NoStateDir,
    #[error("LLORCH_API_TOKEN: a node needs the cluster's token (or LLORCH_API_TOKEN_FILE)")]
    NoToken,
    #[error(transparent)]
    Shared(#[from] SharedError),
    #[error("POOL_MANAGERD_ADVERTISE_URL: {url} is not what is served here, which is {served}")]
    Scheme { url: String, served: &'static str },
    #[error("POOL_MANAGERD_REQUIRE_TLS: ORCHESTRATORD_URL {0} is plain HTTP")]
    PlainControlPlane(String),
    #[error("POOL_MANAGERD_NODE_ID: {0} cannot stand in a certificate, it is no DNS name")]
    NoCertificateName(NodeId),
    #[error(
        "POOL_MANAGERD_ADVERTISE_URL: {advertised} is reached from this machine only, and the control plane {control_plane} is elsewhere"
    )]
    LoopbackAdvertised { advertised: String, control_plane: String },
}

/// The directory, or what the process ends with where there is none.
fn needed<'d>(directory: Option<&'d PathBuf>, setting: &'static str) -> Result<&'d Path, ExitCode> {
    directory.map(PathBuf::as_path).ok_or_else(|| {
        let error = NodeSettingsError::NoDirectory { prefix: OWN.prefix, setting };
        daemon_kit::telemetry::say_fatal(&error);
        ExitCode::from(2)
    })
}

impl Settings {
    fn check_pools(&self, order: &pools::Order) -> Result<ExitCode, ExitCode> {
        let lookup = pools::Lookup {
            models_dir: needed(self.own_node.models_dir(), "MODELS_DIR")?,
            packages_dir: needed(self.own_node.packages_dir(), "PACKAGES_DIR")?,
            forbids_provisioning: self.own_node.forbids_provisioning(),
        };
        Ok(pools::run(order, &lookup))
    }
}

impl Daemon for Settings {
    type Config = Config;
    type Error = ConfigError;
    const OWN: Own = OWN;

    fn shared(&self) -> &SharedSettings {
        &self.shared
    }

    fn chore(&self) -> Option<ExitCode> {
        match &self.order {
            Some(Order::Guard) => Some(node_agent::guard::inside::run()),
            Some(Order::Models(order)) => Some(match needed(self.own_node.models_dir(), "MODELS_DIR") {
                Ok(folder) => models::run(
                    order,
                    folder,
                    &self.own_node.hub(),
                    self.own_node.pools().map(PathBuf::as_path),
                ),
                Err(code) => code,
            }),
            Some(Order::Health(check)) => Some(self.shared.check_health(&OWN, *check)),
            Some(Order::Pools(order)) => Some(self.check_pools(order).unwrap_or_else(|code| code)),
            None => {
                let schema = match (self.print_pools_schema, self.print_handoff_schema) {
                    (true, _) => PoolsFile::schema(),
                    (false, true) => Handoff::schema(),
                    (false, false) => return None,
                };
                daemon_kit::config::print(&schema);
                Some(ExitCode::SUCCESS)
            }
        }
    }

    fn document() -> String {
        crate::api::document()
    }

    fn metrics() -> String {
        daemon_kit::metrics::document("pool-managerd", metrics::FAMILIES, Some(metrics::RENAMED))
    }

    fn check(self) -> Result<Config, ConfigError> {
        let mut shared = self.shared.check(&OWN)?;
        if shared.tokens.is_empty() {
            return Err(ConfigError::NoToken);
        }
        let node_id = match self.node_id {
            Some(node_id) => node_id,
            None => {
                let host = daemon_kit::config::host_name();
                NodeId::new(&host).map_err(|_| ConfigError::NodeId(host))?
            }
        };
        if let Some(spans) = &mut shared.front.spans {
            spans.instance = Some(node_id.to_string());
        }
        let machine_id = self.machine_id.unwrap_or_else(|| machine_id(&node_id));
        let control_plane = match (self.register_on_startup, self.orchestratord_url) {
            (false, _) => None,
            (true, None) => return Err(ConfigError::NoControlPlane),
            (true, Some(url)) => Some(check_url("ORCHESTRATORD_URL", url)?),
        };
        let advertise_url =
            self.advertise_url.map(|url| check_url("POOL_MANAGERD_ADVERTISE_URL", url)).transpose()?;
        let serves_tls = shared.serves_tls();
        if let Some(url) = advertise_url.clone().filter(|url| url.starts_with("https://") != serves_tls) {
            let served = if serves_tls { "https" } else { "http" };
            return Err(ConfigError::Scheme { url, served });
        }
        if let Some(url) = control_plane.clone().filter(|url| url.starts_with("http://"))
            && shared.requires_tls
        {
            return Err(ConfigError::PlainControlPlane(url));
        }
        if serves_tls && !daemon_kit::tls::is_name(node_id.as_str()) {
            return Err(ConfigError::NoCertificateName(node_id));
        }
        let config = Config {
            shared,
            node_id,
            machine_id,
            advertise_url,
            control_plane,
            node: self.own_node.check(OWN.prefix)?,
            state_dir: self.state_dir.ok_or(ConfigError::NoStateDir)?,
            watch_interval: Duration::from_millis(self.watch_interval_ms),
            heartbeat_interval: Duration::from_secs(self.heartbeat_interval_secs),
            held_bytes: usize::try_from(self.held_bytes).unwrap_or(usize::MAX),
            stream_threads: usize::from(self.stream_threads),
            control_name: self.tls_control_name,
        };
        config.check_reachable()?;
        Ok(config)
    }
}

impl Config {
    /// Where the control plane reaches this node, given the port that was bound.
    pub(crate) fn address(&self, bound: SocketAddr) -> String {
        if let Some(url) = &self.advertise_url {
            return url.clone();
        }
        let local = self.control_plane.as_deref().and_then(route_to);
        let ip = match local {
            Some(ip) if bound.ip().is_unspecified() => ip,
            _ => bound.ip(),
        };
        let scheme = if self.shared.serves_tls() { "https" } else { "http" };
        format!("{scheme}://{}", SocketAddr::new(ip, bound.port()))
    }

    fn check_reachable(&self) -> Result<(), ConfigError> {
        let Some(control_plane) = &self.control_plane else { return Ok(()) };
        let advertised = self.address(self.shared.front.addr);
        let is_local = |url: &str| daemon_kit::config::is_this_machine(authority(url));
        if is_local(&advertised) && !is_local(control_plane) {
            return Err(ConfigError::LoopbackAdvertised { advertised, control_plane: control_plane.clone() });
        }
        Ok(())
    }
}

fn authority(url: &str) -> &str {
    url.split_once("://").map_or(url, |(_, rest)| rest)
}

/// The local address from which packets to the URL's host leave. Nothing is sent.
fn route_to(url: &str) -> Option<std::net::IpAddr> {
    let host = authority(url);
    let target = if host.contains(':') { host.to_owned() } else { format!("{host}:80") };
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect(target).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

fn check_url(variable: &'static str, url: String) -> Result<String, ConfigError> {
    let trimmed = url.trim_end_matches('/');
    let good = daemon_kit::config::is_base_url(trimmed);
    if good { Ok(trimmed.to_owned()) } else { Err(ConfigError::Url { variable, url }) }
}

fn machine_id(node_id: &NodeId) -> MachineId {
    let read = std::fs::read_to_string("/etc/machine-id").ok();
    let id = read.and_then(|text| MachineId::new(text.trim()).ok());
    id.unwrap_or_else(|| MachineId::new(node_id.as_str()).expect("a node id has the form of a machine id"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(flags: &[&str]) -> Result<Config, String> {
        let given = daemon_kit::settings::given::<Settings>(flags);
        given.map_err(|e| e.to_string())?.check().map_err(|e| e.to_string())
    }

    const GOOD: [&str; 4] = ["--api-token", "secret-token", "--orchestratord-url", "http://127.0.0.1:8080/"];

    // CLOUD-2101
    #[test]
    fn the_defaults_hold_together_once_token_and_control_plane_are_given() {
        let config = check(&GOOD).unwrap();
        assert_eq!(config.control_plane.as_deref(), Some("http://127.0.0.1:8080"));
        assert_eq!(config.address("127.0.0.1:9207".parse().unwrap()), "http://127.0.0.1:9207");
    }

    // CLOUD-2102
    #[test]
    fn each_contradiction_names_its_variable() {
        let with = |more: &[&'static str]| check(&[&GOOD[..], more].concat()).unwrap_err();
        assert!(check(&["--orchestratord-url", "http://x:1"]).unwrap_err().contains("LLORCH_API_TOKEN"));
        assert!(check(&["--api-token", "secret-token"]).unwrap_err().contains("ORCHESTRATORD_URL"));
        assert!(with(&["--advertise-url", "ftp://x"]).contains("POOL_MANAGERD_ADVERTISE_URL"));
        assert!(with(&["--heartbeat-interval-secs", "0"]).contains("heartbeat-interval-secs"));
        assert!(with(&["--node-id", "a/b"]).contains("node_id"));
        assert!(with(&["--labels", "zone"]).contains("POOL_MANAGERD_LABELS"));
        let labels = check(&[&GOOD[..], &["--labels", "zone=a, tier=fast"]].concat()).unwrap().node.labels;
        assert_eq!(labels.len(), 2);
        assert!(with(&["--labels", "zone=a,zone=b"]).contains("twice"));
        assert!(check(&[&GOOD[..], &["--labels", ""]].concat()).unwrap().node.labels.is_empty());
        assert!(with(&["--require-tls"]).contains("POOL_MANAGERD_REQUIRE_TLS"));
        assert!(with(&["--require-tls", "--tls-cert", "x"]).contains("ORCHESTRATORD_URL"));
        assert!(with(&["--tls-cert", "x", "--node-id", "10.0.0.1"]).contains("POOL_MANAGERD_NODE_ID"));
        assert!(with(&["--tls-cert", "x", "--advertise-url", "http://a:1"]).contains("which is https"));
        assert!(with(&["--advertise-url", "https://a:1"]).contains("which is http"));
        let remote = ["--api-token", "secret-token", "--orchestratord-url", "http://10.1.2.3:8080"];
        assert!(check(&remote).unwrap_err().contains("POOL_MANAGERD_ADVERTISE_URL"));
    }
}
