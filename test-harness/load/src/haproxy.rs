//! HAProxy, one hop before the same engines: the yardstick of what a hop costs on this machine.
//!
//! It is Debian's package, a child with a configuration of its own in the cluster's folder, and gone
//! when dropped. Only the benchmark needs it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use e2e_cloud::process::free_port;
use e2e_cloud::{Process, eventually};

/// Where Debian puts it; it is not on everybody's path.
const PROGRAM: &str = "/usr/sbin/haproxy";
const START_PATIENCE: Duration = Duration::from_secs(10);

/// A running HAProxy.
#[derive(Debug)]
pub(crate) struct HaProxy {
    process: Process,
    pub(crate) url: String,
}

/// The program. Errors: what to install.
pub(crate) fn program() -> Result<PathBuf, String> {
    let on_path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = std::env::split_paths(&on_path).map(|folder| folder.join("haproxy"));
    let found = folders.find(|path| path.is_file()).unwrap_or_else(|| PathBuf::from(PROGRAM));
    if found.is_file() {
        return Ok(found);
    }
    Err("HAProxy is the yardstick and is not installed: `apt-get install haproxy`, or measure without it: `--only heartbeats`, `core`, `placement`".into())
}

impl HaProxy {
    /// Starts it before the engines at these URLs, with its files in `folder`, and waits until it takes
    /// connections.
    pub(crate) async fn start(program: &Path, engines: &[String], folder: &Path) -> Self {
        let port = free_port();
        let file = folder.join("haproxy.cfg");
        std::fs::write(&file, configuration(port, engines)).expect("a writable folder");
        let mut command = Command::new(program);
        command.args(["-db", "-f"]).arg(&file);
        let process = Process::start(command, &folder.join("haproxy.log"));
        eventually("HAProxy takes connections", START_PATIENCE, || async {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()
        })
        .await;
        Self { process, url: format!("http://127.0.0.1:{port}") }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }
}

/// Without `http-no-delay` the first token waits 200 ms.
fn configuration(port: u16, engines: &[String]) -> String {
    let servers = engines.iter().enumerate().map(|(n, url)| {
        let address = url.trim_start_matches("http://");
        format!("    server engine-{n} {address}\n")
    });
    let servers: String = servers.collect();
    format!(
        "global
    maxconn 4096
defaults
    mode http
    option http-no-delay
    timeout connect 5s
    timeout client 300s
    timeout server 300s
frontend clients
    bind 127.0.0.1:{port}
    default_backend engines
backend engines
    balance leastconn
{servers}"
    )
}
