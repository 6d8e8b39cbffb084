//! How settings are read, shown and checked, whatever they are.

use std::net::SocketAddr;
use std::process::ExitCode;

use pool_registry_types::nearest::distance;
use pool_registry_types::node::Capabilities;
use secrecy::SecretString;

use crate::telemetry;

/// Warns of variables with one of our prefixes that no setting has, naming the nearest one.
pub(crate) fn misspelt<'a>(
    prefixes: &[&str],
    known: &[&'a str],
    set: impl Iterator<Item = String>,
) -> Vec<(String, &'a str)> {
    let ours = set.filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)));
    let unknown = ours.filter(|name| !known.contains(&name.as_str()));
    unknown
        .filter_map(|name| {
            let nearest = nearest(&name, known)?;
            Some((name, nearest))
        })
        .collect()
}

/// The names of all variables that a command line's settings read.
pub(crate) fn variables(command: &clap::Command) -> Vec<String> {
    command.get_arguments().filter_map(|arg| arg.get_env()?.to_str().map(str::to_owned)).collect()
}

/// A value that is never printed.
pub fn secret(text: &str) -> Result<SecretString, std::convert::Infallible> {
    Ok(text.into())
}

/// What a command line and the environment say.
pub(crate) struct Parsed<S> {
    pub(crate) settings: S,
    /// The text of what is in force.
    pub(crate) in_force: String,
    /// The settings that have their defaults.
    pub(crate) defaults: Vec<String>,
}

/// Reads the settings of a command line from flags and environment. Warns of misspelt variables with one of the prefixes, other
/// than the `foreign`. `Err`: what was wrong, or the help that was asked for, is printed, and this is the status to exit with.
pub(crate) fn parse<S: clap::FromArgMatches>(
    command: &clap::Command,
    prefixes: &[&str],
    foreign: &[&str],
) -> Result<Parsed<S>, ExitCode> {
    let parsed = command.clone().try_get_matches().and_then(|matches| {
        if let Some(name) = secret_on_command_line(command, &matches) {
            let message =
                format!("{name}: every user of the machine can read a command line: set the variable\n");
            return Err(clap::Error::raw(clap::error::ErrorKind::ArgumentConflict, message));
        }
        let settings = S::from_arg_matches(&matches)?;
        let is_default =
            |name: &str| matches.value_source(name) == Some(clap::parser::ValueSource::DefaultValue);
        let names = command.get_arguments().map(|arg| arg.get_id().as_str().to_owned());
        let defaults = names.filter(|name| is_default(name)).collect();
        Ok(Parsed { settings, in_force: describe(command, &matches), defaults })
    });
    let known = variables(command);
    let known: Vec<&str> = known.iter().map(String::as_str).chain(foreign.iter().copied()).collect();
    let set = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    let warnings: Vec<String> = misspelt(prefixes, &known, set)
        .into_iter()
        .map(|(name, nearest)| format!("{name}: no setting has this name, is {nearest} meant?"))
        .collect();
    if !warnings.is_empty() {
        telemetry::say(warnings.join("\n"));
    }
    parsed.map_err(|error| {
        // A closed standard error is no reason to fail differently.
        let _ = error.print();
        if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS }
    })
}

/// The variable of a secret that was given as a flag.
fn secret_on_command_line(command: &clap::Command, matches: &clap::ArgMatches) -> Option<String> {
    let given = |arg: &&clap::Arg| {
        let source = matches.value_source(arg.get_id().as_str());
        arg.is_hide_env_values_set() && source == Some(clap::parser::ValueSource::CommandLine)
    };
    let arg = command.get_arguments().find(given)?;
    Some(arg.get_env()?.to_string_lossy().into_owned())
}

/// Prints the text of what is in force. Whoever has read enough of it and closed its end is no failure.
pub fn print(text: &str) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let written = writeln!(out, "{text}").and_then(|()| out.flush());
    if let Err(error) = written.as_ref()
        && error.kind() != std::io::ErrorKind::BrokenPipe
    {
        telemetry::say(format!("standard output: {error}"));
    }
}

/// An address to listen on: `127.0.0.1:8080`, `[::1]:8080`, or a name of this machine's with a port. Of a
/// name with several addresses an IPv4 one is taken, as the defaults are; blocks on the resolver.
pub fn listen_addr(text: &str) -> Result<SocketAddr, UnknownAddr> {
    use std::net::ToSocketAddrs;
    if let Ok(addr) = text.parse() {
        return Ok(addr);
    }
    let unknown = |reason: String| UnknownAddr { text: text.to_owned(), reason };
    let found: Vec<SocketAddr> = match text.to_socket_addrs() {
        Ok(found) => found.collect(),
        Err(error) => return Err(unknown(error.to_string())),
    };
    let first = found.iter().find(|addr| addr.is_ipv4()).or(found.first());
    first.copied().ok_or_else(|| unknown("the name has no address".into()))
}

/// Why a text is no address to listen on.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text:?} is no address and port, as 127.0.0.1:8080 or localhost:8080: {reason}")]
pub struct UnknownAddr {
    text: String,
    reason: String,
}

/// The name that the text is most likely meant to be.
pub fn nearest<'a>(text: &str, names: &[&'a str]) -> Option<&'a str> {
    let text: Vec<char> = text.chars().collect();
    let from_text = |name: &&&str| distance(&text, &name.chars().collect::<Vec<_>>());
    names.iter().min_by_key(from_text).copied()
}

/// The host's name, as the kernel has it.
pub fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .unwrap_or_default()
}

/// What this machine has besides GPUs: cores, and memory in bytes. Source: proc(5).
pub fn machine() -> Capabilities {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let memory = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    });
    Capabilities {
        gpus: Vec::new(),
        cpu_cores: u32::try_from(cores).unwrap_or(u32::MAX),
        ram_total_bytes: memory.unwrap_or(0) * 1024,
    }
}

/// What is in force, a line a setting, secrets hidden.
pub(crate) fn describe(command: &clap::Command, matches: &clap::ArgMatches) -> String {
    let mut lines = Vec::new();
    for arg in command.get_arguments() {
        let Some(variable) = arg.get_env().and_then(|name| name.to_str()) else { continue };
        let value = match matches.get_raw(arg.get_id().as_str()) {
            None => "(unset)".to_owned(),
            Some(_) if arg.is_hide_env_values_set() => "(hidden)".to_owned(),
            Some(values) => values.map(|v| v.to_string_lossy()).collect::<Vec<_>>().join(","),
        };
        lines.push(format!("{variable}={value}"));
    }
    lines.join("\n")
}

/// Whether a URL's host, with or without a port, is this machine by a name or address of its own.
pub fn is_this_machine(authority: &str) -> bool {
    let Ok(authority) = authority.parse::<axum::http::uri::Authority>() else { return false };
    let host = authority.host();
    host.eq_ignore_ascii_case("localhost")
        || host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Whether it is `http://` or `https://` with a host, and nothing after it.
pub fn is_base_url(text: &str) -> bool {
    let host = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    host.is_some_and(|host| !host.is_empty() && !host.contains(['/', '@', '?', '#', ' ']))
}

/// The base URL of a collector of spans.
///
/// # Errors
/// That it is none.
pub fn collector(text: &str) -> Result<String, &'static str> {
    const NONE: &str = "is no http:// or https:// URL with a host, maybe a port and a path, and nothing else";
    let url = reqwest::Url::parse(text).map_err(|_| NONE)?;
    let is_plain = url.username().is_empty() && url.password().is_none() && url.query().is_none();
    let is_url = matches!(url.scheme(), "http" | "https") && url.has_host() && url.fragment().is_none();
    if is_plain && is_url { Ok(text.to_owned()) } else { Err(NONE) }
}

/// A share of something, 0 to 1.
///
/// # Errors
/// That it is none.
pub fn share(text: &str) -> Result<f64, &'static str> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or("is no number from 0 to 1")
}

/// Whether only this machine reaches the address.
pub fn is_loopback(addr: SocketAddr) -> bool {
    addr.ip().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2731
    #[test]
    fn a_collector_is_a_url_and_nothing_else_and_a_share_is_a_share() {
        for good in ["http://tempo:4318", "https://[::1]:4318", "https://otlp.example.org/otlp/"] {
            assert_eq!(collector(good), Ok(good.to_owned()));
        }
        for bad in [
            "",
            "tempo:4318",
            "grpc://tempo:4317",
            "http://",
            "http://u:p@tempo",
            "http://tempo?x=1",
            "http://tempo/#x",
        ] {
            assert!(collector(bad).is_err(), "{bad}");
        }
        assert_eq!(["0", "0.25", "1"].map(share), [Ok(0.0), Ok(0.25), Ok(1.0)]);
        for bad in ["", "-0.1", "1.1", "NaN", "inf", "10%"] {
            assert!(share(bad).is_err(), "{bad}");
        }
    }

    // CLOUD-2982
    #[test]
    fn a_name_of_this_machine_is_an_address_to_listen_on_and_nonsense_is_named() {
        for (text, addr) in
            [("127.0.0.1:8", "127.0.0.1:8"), ("[::1]:9", "[::1]:9"), ("localhost:10", "127.0.0.1:10")]
        {
            assert_eq!(listen_addr(text).unwrap().to_string(), addr);
        }
        for text in ["localhost", "127.0.0.1", "8080", "localhost:99999", ""] {
            let error = listen_addr(text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{text:?} is no address and port")), "{error}");
        }
    }

    // CLOUD-2103
    #[test]
    fn a_misspelt_variable_is_named_with_its_nearest() {
        let known = ["ORCHESTRATORD_ADDR", "ORCHESTRATORD_NODE_TIMEOUT_SECS"];
        let set = ["ORCHESTRATORD_NODE_TIMOUT_SECS", "PATH", "ORCHESTRATORD_ADDR"].map(str::to_owned);
        assert_eq!(
            misspelt(&["ORCHESTRATORD_"], &known, set.into_iter()),
            vec![("ORCHESTRATORD_NODE_TIMOUT_SECS".to_owned(), "ORCHESTRATORD_NODE_TIMEOUT_SECS")]
        );
    }
}
