//! Asks the daemon that runs with these settings whether it lives: what a container's health check runs,
//! in an image that has no other program to ask with.
//!
//! Of TLS the certificate is not verified. The daemon that is asked is the one that listens at our own
//! address, nothing secret is sent, and of the answer only the status counts; a certificate that is
//! renewed on disk, or is for another name than `127.0.0.1`, is no reason to start a daemon again.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use reqwest::StatusCode;

use crate::config;
use crate::telemetry::say_fatal;

const PATH: &str = "/health/live";

/// The order, with its flags.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct HealthCheck {
    /// Seconds that the answer may take.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=60))]
    timeout_secs: u64,
}

/// Where a daemon with these settings listens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Listening {
    pub(crate) addr: SocketAddr,
    pub(crate) serves_tls: bool,
}

/// Why the daemon does not count as alive.
#[derive(Debug, thiserror::Error)]
enum CheckError {
    #[error("{prefix}_ADDR: with port 0 nobody knows where the daemon listens")]
    AnyPort { prefix: &'static str },
    #[error("{url} cannot be asked")]
    Client {
        url: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("{url} does not answer")]
    NoAnswer {
        url: String,
        // Without the address, which the text has already.
        #[source]
        source: reqwest::Error,
    },
    #[error("{url} answers {status}")]
    Status { url: String, status: StatusCode },
    #[error("the check cannot run")]
    Runtime(#[from] std::io::Error),
}

impl HealthCheck {
    /// Exits with 0 where the daemon answers, and with 1 where it does not, which is said on standard error.
    pub(crate) fn run(self, prefix: &'static str, listening: Listening) -> ExitCode {
        match self.check(prefix, listening) {
            Ok(url) => {
                config::print(&format!("{url} answers"));
                ExitCode::SUCCESS
            }
            Err(error) => {
                say_fatal(&error);
                ExitCode::FAILURE
            }
        }
    }

    fn check(self, prefix: &'static str, listening: Listening) -> Result<String, CheckError> {
        let url = url(prefix, listening)?;
        // Only the first installation in a process can fail.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let client = reqwest::Client::builder()
                .no_proxy()
                .redirect(reqwest::redirect::Policy::none())
                .timeout(Duration::from_secs(self.timeout_secs))
                .tls_danger_accept_invalid_certs(true)
                .build();
            let client = client.map_err(|source| CheckError::Client { url: url.clone(), source })?;
            let answer = client.get(&url).send().await;
            let answer =
                answer.map_err(|e| CheckError::NoAnswer { url: url.clone(), source: e.without_url() })?;
            match answer.status() {
                StatusCode::OK => Ok(url),
                status => Err(CheckError::Status { url, status }),
            }
        })
    }
}

/// By which URL this machine reaches what listens there.
fn url(prefix: &'static str, listening: Listening) -> Result<String, CheckError> {
    let mut addr = listening.addr;
    if addr.port() == 0 {
        return Err(CheckError::AnyPort { prefix });
    }
    match addr.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => addr.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => addr.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    let scheme = if listening.serves_tls { "https" } else { "http" };
    Ok(format!("{scheme}://{addr}{PATH}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2782
    #[test]
    fn a_daemon_that_listens_everywhere_is_asked_on_loopback() {
        let asked = |addr: &str, serves_tls| {
            url("DAEMON", Listening { addr: addr.parse().unwrap(), serves_tls }).map_err(|e| e.to_string())
        };
        assert_eq!(asked("0.0.0.0:8080", false).unwrap(), "http://127.0.0.1:8080/health/live");
        assert_eq!(asked("[::]:8080", true).unwrap(), "https://[::1]:8080/health/live");
        assert_eq!(asked("10.0.0.3:9200", false).unwrap(), "http://10.0.0.3:9200/health/live");
        assert!(asked("0.0.0.0:0", false).unwrap_err().starts_with("DAEMON_ADDR: "));
    }
}
