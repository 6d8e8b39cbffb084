//! The settings that both daemons have, and how a daemon reads its settings.
//!
//! A setting without a variable has each daemon's prefix before its name, and a default and some
//! sentences are each daemon's own: those stand in its [`Own`], all else stands here once.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, Args, Command};
use secrecy::SecretString;

use crate::auth::Tokens;
use crate::config;
use crate::directories::{self, Directory};
use crate::front::{FrontSettings, SpanSettings};
use crate::health_check::{HealthCheck, Listening};
use crate::telemetry::{self, LogFormat};
use crate::tls::TlsPaths;
use crate::tokens::TokenError;

/// The shared settings as they are given. One without a variable here has the daemon's prefix before
/// its name; a daemon's [`Own::help`] may say another sentence.
#[derive(Debug, Clone, Args)]
pub struct SharedSettings {
    /// Where this daemon listens.
    #[arg(long, value_parser = config::listen_addr)]
    addr: SocketAddr,
    /// Seconds that what runs gets to finish at SIGTERM.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    shutdown_grace_secs: u64,
    /// This daemon's certificate, PEM, the leaf first; with its key it serves HTTPS. Read again when it changes.
    #[arg(long)]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key, PEM.
    #[arg(long)]
    tls_key: Option<PathBuf>,
    /// Who signs the certificates of those who call, PEM.
    #[arg(long)]
    tls_client_ca: Option<PathBuf>,
    /// Who signs the certificates of those who are called, PEM [default: the system's authorities].
    #[arg(long)]
    tls_ca: Option<PathBuf>,
    /// Refuse to serve, and to call, without TLS.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    require_tls: bool,
    /// A second listener for the metrics and the probes, which asks for no token [default: none].
    #[arg(long, value_parser = config::listen_addr)]
    metrics_addr: Option<SocketAddr>,
    /// Connections at once at most [default: 16384, or what three quarters of the files allow that this
    /// process may open].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    max_connections: Option<u32>,
    /// Bearer tokens, comma-separated; all are accepted, the first is sent. Only as a variable: every
    /// user of the machine can read a command line.
    #[arg(long, env = "LLORCH_API_TOKEN", hide_env_values = true, value_parser = config::secret)]
    api_token: Option<SecretString>,
    /// A file of tokens, one a line or TOML; read again when it changes.
    #[arg(long, env = "LLORCH_API_TOKEN_FILE")]
    api_token_file: Option<PathBuf>,
    /// A file to which a line is appended for each call that changes something or is refused [default: none].
    #[arg(long, env = "LLORCH_AUDIT_LOG")]
    audit_log: Option<PathBuf>,
    /// Log level, or a list of target=level.
    #[arg(long, env = "LLORCH_LOG", default_value = "info", value_parser = telemetry::check_filter)]
    log: String,
    #[arg(long, env = "LLORCH_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
    /// A collector that is sent spans over OTLP, `http://` or `https://` [default: none].
    #[arg(long, env = "LLORCH_OTLP_ENDPOINT", value_parser = config::collector)]
    otlp_endpoint: Option<String>,
    /// Share of the traces that begin here that is recorded, 0 to 1; one that came with a request is where
    /// its `traceparent` says so.
    #[arg(long, env = "LLORCH_OTLP_SAMPLE", default_value_t = 1.0, value_parser = config::share)]
    otlp_sample: f64,
    /// Print what is in force and exit.
    #[arg(long)]
    print_config: bool,
    /// Print the OpenAPI document and exit.
    #[arg(long)]
    print_openapi: bool,
    /// Print what the metrics mean, as Markdown, and exit.
    #[arg(long)]
    print_metrics: bool,
}

/// The shared settings as they hold together.
#[derive(Debug)]
pub struct Shared {
    pub front: FrontSettings,
    pub tokens: Tokens,
    pub requires_tls: bool,
    pub shutdown_grace: Duration,
    pub log: String,
    pub log_format: LogFormat,
}

impl Shared {
    pub fn serves_tls(&self) -> bool {
        self.front.tls.cert.is_some()
    }
}

/// Why the shared settings do not hold together. Each names the variable.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(
        "{prefix}_REQUIRE_TLS: without {prefix}_TLS_CERT and {prefix}_TLS_KEY plain HTTP would be served"
    )]
    NoTls { prefix: &'static str },
}

impl SharedSettings {
    /// Asks the daemon that runs with these settings whether it lives. Nothing else of them is looked at.
    /// Returns the status to exit with.
    pub fn check_health(&self, own: &Own, check: HealthCheck) -> ExitCode {
        check.run(own.prefix, Listening { addr: self.addr, serves_tls: self.tls_cert.is_some() })
    }

    /// Checks the settings, and reads the file of tokens.
    pub fn check(self, own: &Own) -> Result<Shared, SharedError> {
        let tokens = Tokens::load(self.api_token, self.api_token_file)?;
        if self.require_tls && self.tls_cert.is_none() {
            return Err(SharedError::NoTls { prefix: own.prefix });
        }
        let tls = TlsPaths {
            cert: self.tls_cert,
            key: self.tls_key,
            client_ca: self.tls_client_ca,
            ca: self.tls_ca,
        };
        let front = FrontSettings {
            prefix: own.prefix,
            addr: self.addr,
            metrics_addr: self.metrics_addr,
            max_connections: self.max_connections,
            tls,
            audit_log: self.audit_log,
            spans: self.otlp_endpoint.map(|endpoint| SpanSettings {
                service: own.name,
                instance: None,
                export: span_export::Settings { endpoint, sample: self.otlp_sample },
            }),
        };
        Ok(Shared {
            front,
            tokens,
            requires_tls: self.require_tls,
            shutdown_grace: Duration::from_secs(self.shutdown_grace_secs),
            log: self.log,
            log_format: self.log_format,
        })
    }
}

/// What is a daemon's own of the shared settings. Settings are named as their fields are.
#[derive(Debug, Clone, Copy)]
pub struct Own {
    /// The program's name.
    pub name: &'static str,
    /// Of its variables, without an underscore at the end.
    pub prefix: &'static str,
    /// Variables with that prefix that are the other daemon's: nobody has misspelt them.
    pub foreign: &'static [&'static str],
    /// Where it listens unless it is told otherwise.
    pub addr: &'static str,
    /// What is said of a setting.
    pub help: &'static [(&'static str, &'static str)],
    /// Those that are directories: where they are unless they are given.
    pub directories: &'static [Directory],
    /// Where settings are listed: each with the one that it stands before.
    pub before: &'static [(&'static str, &'static str)],
}

impl Own {
    fn adapt(&self, arg: Arg) -> Arg {
        let name = arg.get_id().as_str().to_owned();
        let is_flag = !arg.get_action().takes_values();
        let arg = match arg.get_env() {
            None if !is_flag => arg.env(format!("{}_{}", self.prefix, name.to_ascii_uppercase())),
            _ => arg,
        };
        let arg = match self.help.iter().find(|(of, _)| *of == name) {
            Some((_, sentence)) => arg.help(*sentence),
            None => arg,
        };
        if let Some(directory) = self.directories.iter().find(|directory| directory.setting == name) {
            return match directories::surroundings().place(directory) {
                Some(path) => arg.default_value(path.into_os_string()),
                None => arg,
            };
        }
        if name == "addr" { arg.required(false).default_value(self.addr) } else { arg }
    }
}

/// The command line of a daemon whose settings `S` hold [`SharedSettings`]. All programs of one tree
/// have one version.
fn command<S: Args>(own: &Own) -> Command {
    let command = Command::new(own.name).version(env!("CARGO_PKG_VERSION"));
    let adapted = S::augment_args(command).mut_args(|arg| own.adapt(arg));
    let mut order = names(&adapted);
    for (moved, before) in own.before {
        order.retain(|name| name != moved);
        let at = order.iter().position(|name| name == before).unwrap_or(order.len());
        order.insert(at, (*moved).to_owned());
    }
    // A changed argument becomes the last one: with all of them changed, they are in order.
    let in_place = |command: Command, (n, name)| command.mut_arg(name, |arg| arg.display_order(n));
    order.iter().enumerate().fold(adapted, in_place)
}

fn names(command: &Command) -> Vec<String> {
    command.get_arguments().map(|arg| arg.get_id().as_str().to_owned()).collect()
}

/// A daemon's settings as they are given.
pub trait Daemon: Args {
    /// The settings as they hold together.
    type Config;
    type Error: std::error::Error + 'static;
    const OWN: Own;

    fn shared(&self) -> &SharedSettings;
    /// Does what is asked for beside the daemon itself. Returns the status to exit with, if anything was.
    fn chore(&self) -> Option<ExitCode>;
    /// Its OpenAPI document.
    fn document() -> String;
    /// What its metrics mean, as Markdown.
    fn metrics() -> String;
    /// Checks the settings as a whole.
    fn check(self) -> Result<Self::Config, Self::Error>;
}

/// The settings as these flags and the environment give them; for the tests of a daemon.
pub fn given<D: Daemon>(flags: &[&str]) -> Result<D, clap::Error> {
    D::from_arg_matches(&command::<D>(&D::OWN).try_get_matches_from([D::OWN.name].iter().chain(flags))?)
}

/// Reads flags and environment. `Err`: the settings are wrong, which is printed, or something else
/// was asked for and is done; this is the status to exit with.
pub fn read<D: Daemon>() -> Result<D::Config, ExitCode> {
    let prefix = format!("{}_", D::OWN.prefix);
    let config::Parsed { settings, in_force, defaults } =
        config::parse::<D>(&command::<D>(&D::OWN), &[&prefix, "LLORCH_"], D::OWN.foreign)?;
    if let Some(code) = settings.chore() {
        return Err(code);
    }
    let shared = settings.shared();
    let printed = match shared {
        SharedSettings { print_openapi: true, .. } => Some(D::document()),
        SharedSettings { print_metrics: true, .. } => Some(D::metrics()),
        SharedSettings { print_config: true, .. } => Some(in_force),
        _ => None,
    };
    if let Some(text) = printed {
        config::print(&text);
        return Err(ExitCode::SUCCESS);
    }
    if let Some(warning) = before_others(&D::OWN, &defaults) {
        telemetry::say(warning);
    }
    settings.check().map_err(|error| {
        telemetry::say_fatal(&error);
        ExitCode::from(2)
    })
}

/// What is said where directories are in `.runtime` because it is there. `defaults` are the settings
/// that were not given.
fn before_others(own: &Own, defaults: &[String]) -> Option<String> {
    let around = directories::surroundings();
    let moved = own
        .directories
        .iter()
        .filter(|directory| around.has_before && defaults.iter().any(|name| name == directory.setting));
    let places: Vec<String> = moved
        .map(|directory| {
            let setting = directory.setting.to_ascii_uppercase();
            let place = around.new_place(directory);
            let place =
                place.map_or_else(|| "nowhere yet, set it".to_owned(), |path| path.display().to_string());
            format!("{}_{setting}: {place}", own.prefix)
        })
        .collect();
    let list = places.join(", ");
    (!places.is_empty()).then(|| {
        format!(
            "./.runtime is there and is used, as by earlier versions. Without it the directories are: {list}"
        )
    })
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches;

    use super::*;

    const OWN: Own = Own {
        name: "daemon",
        prefix: "DAEMON",
        foreign: &[],
        addr: "127.0.0.1:7",
        help: &[("tls_ca", "Who signs nodes")],
        directories: &[],
        before: &[("addr", "first"), ("last", "tls_key")],
    };

    #[derive(Debug, Args)]
    struct Settings {
        #[arg(long)]
        first: bool,
        #[command(flatten)]
        shared: SharedSettings,
        #[arg(long, env = "OTHER")]
        last: Option<String>,
    }

    fn given(flags: &[&str]) -> Shared {
        let matches = command::<Settings>(&OWN).get_matches_from(["daemon"].iter().chain(flags));
        let settings = Settings::from_arg_matches(&matches).unwrap();
        settings.shared.check(&OWN).unwrap()
    }

    // CLOUD-2101
    #[test]
    fn shared_settings_have_the_daemons_prefix_default_sentences_and_places() {
        let command = command::<Settings>(&OWN);
        let variables = config::variables(&command);
        assert_eq!(variables[..4], ["DAEMON_ADDR", "DAEMON_SHUTDOWN_GRACE_SECS", "DAEMON_TLS_CERT", "OTHER"]);
        assert!(variables.iter().any(|name| name == "LLORCH_LOG"), "{variables:?}");
        assert!(!variables.iter().any(|name| name.contains("PRINT")), "{variables:?}");
        let order = names(&command);
        assert_eq!(order[..2], ["addr", "first"]);
        let ca = command.get_arguments().find(|arg| arg.get_id() == "tls_ca").unwrap();
        assert_eq!(ca.get_help().unwrap().to_string(), "Who signs nodes");
        assert_eq!(given(&[]).front.addr.to_string(), "127.0.0.1:7");
        assert_eq!(given(&["--addr", "127.0.0.1:8"]).front.addr.to_string(), "127.0.0.1:8");
    }

    #[test]
    fn requiring_tls_without_a_certificate_names_the_variables() {
        let matches = command::<Settings>(&OWN).get_matches_from(["daemon", "--require-tls"]);
        let settings = Settings::from_arg_matches(&matches).unwrap();
        let error = settings.shared.check(&OWN).unwrap_err().to_string();
        assert!(error.starts_with("DAEMON_REQUIRE_TLS: without DAEMON_TLS_CERT"), "{error}");
        assert!(given(&["--require-tls", "--tls-cert", "x"]).requires_tls);
    }
}
