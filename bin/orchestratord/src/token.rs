//! `orchestratord token`: bearer tokens are made, named and checked here. None is ever an argument.

use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

use daemon_kit::config;
use daemon_kit::telemetry::say_fatal;
use daemon_kit::tokens::{self, Scope, TokenSet};
use jiff::Timestamp;
use secrecy::ExposeSecret;

/// Longest token that is read, bytes.
const LONGEST: u64 = 4096;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Order {
    /// Print a new token: 32 bytes of the system's randomness; with a scope, as an entry of a file.
    New {
        /// What it lets its holder do; more than one may be given.
        #[arg(long, value_enum)]
        scope: Vec<Scope>,
        /// Whose it is: two tokens of one name are one holder's [default: the scope and the fingerprint].
        #[arg(long, requires = "scope")]
        name: Option<String>,
    },
    /// Read a token from standard input, and print its fingerprint and its SHA-256.
    Fingerprint,
    /// Check a file of tokens, and print what it lets whom do.
    Check { file: PathBuf },
}

pub(crate) fn run(order: &Order) -> ExitCode {
    let done = match order {
        Order::New { scope, name } => make(scope, name.as_deref()),
        Order::Fingerprint => fingerprint(),
        Order::Check { file } => TokenSet::check_file(file).map(|set| print_all(&set)).map_err(Box::from),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say_fatal(error.as_ref());
            ExitCode::from(2)
        }
    }
}

type Done = Result<(), Box<dyn std::error::Error>>;

fn make(scopes: &[Scope], name: Option<&str>) -> Done {
    let token = tokens::generate()?;
    let Some(first) = scopes.first() else {
        config::print(token.expose_secret());
        return Ok(());
    };
    let own = || format!("{} {}", first.as_str(), tokens::fingerprint(token.expose_secret()));
    let name = name.map_or_else(own, str::to_owned);
    config::print(tokens::entry(&name, &token, scopes).expose_secret());
    Ok(())
}

fn fingerprint() -> Done {
    let mut text = String::new();
    std::io::stdin().take(LONGEST).read_to_string(&mut text)?;
    let token = text.trim();
    if token.is_empty() {
        return Err("standard input holds no token".into());
    }
    config::print(&format!("fingerprint {}\nsha256 {}", tokens::fingerprint(token), tokens::sha256(token)));
    Ok(())
}

fn print_all(set: &TokenSet) {
    let now = Timestamp::now();
    for holder in set.holders() {
        let scopes: Vec<&str> = holder.scopes().iter().map(|scope| scope.as_str()).collect();
        let node = holder.node_id.as_ref().map_or_else(String::new, |id| format!(" only as node {id}"));
        let most = holder.max_nodes.map_or_else(String::new, |most| format!(" at most {most} nodes"));
        let end = match holder.expires {
            None => String::new(),
            Some(at) if holder.has_expired(now) => format!(" EXPIRED {at}"),
            Some(at) => format!(" until {at}"),
        };
        config::print(&format!(
            "{} {} {}{node}{most}{end}",
            holder.fingerprint,
            holder.name,
            scopes.join(",")
        ));
    }
}
