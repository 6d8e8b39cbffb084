//! Checks on configuration that both daemons share.

use std::net::SocketAddr;

/// Warns of variables with one of our prefixes that no setting has, naming the nearest one.
pub fn misspelt<'a>(prefixes: &[&str], known: &[&'a str], set: impl Iterator<Item = String>) -> Vec<(String, &'a str)> {
    let ours = set.filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)));
    let unknown = ours.filter(|name| !known.contains(&name.as_str()));
    unknown
        .filter_map(|name| {
            let nearest = known.iter().min_by_key(|known| distance(&name, known))?;
            Some((name, *nearest))
        })
        .collect()
}

/// The names of all variables that a command line's settings read.
pub fn variables(command: &clap::Command) -> Vec<String> {
    command.get_arguments().filter_map(|arg| arg.get_env()?.to_str().map(str::to_owned)).collect()
}

/// Edits between two texts: inserted, removed or replaced characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// Prints what is in force, a line a setting, secrets hidden.
pub fn describe(command: &clap::Command, matches: &clap::ArgMatches) -> String {
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

/// Whether only this machine reaches the address.
pub fn is_loopback(addr: SocketAddr) -> bool {
    addr.ip().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

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
