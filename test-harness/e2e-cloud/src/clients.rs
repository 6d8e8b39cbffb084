//! The clients that people have, as they come from the package index: scripts of `test-harness/clients`,
//! each with cases that print one line.
//!
//! `cargo xtask test` fetches them into the cache beforehand; without them these journeys fail and say so.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use crate::cluster::{Cluster, TOKEN};

/// How long all cases of one script may take.
const PATIENCE: Duration = Duration::from_secs(170);

fn root() -> PathBuf {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.ancestors().nth(2).expect("the crate lies two folders deep").to_owned()
}

fn folder() -> PathBuf {
    let folder = root().join(".cache/clients");
    assert!(
        folder.join("python").exists(),
        "the clients are not fetched: run `cargo xtask clients` once (`cargo xtask test` does)"
    );
    folder
}

/// Runs a script's cases against the cluster, shows them, and panics with those that failed. `more` are
/// further variables. At least `least` cases must have been run.
pub async fn run(script: &str, cluster: &Cluster, more: &[(&str, String)], least: usize) {
    let mut command = Command::new(folder().join("python"));
    command
        .arg(root().join("test-harness/clients").join(script))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("CLUSTER_URL", &cluster.client.base)
        .env("CLUSTER_KEY", TOKEN)
        .env("CLUSTER_MODEL", cluster.options.engine.model())
        // Nothing goes anywhere but to the cluster.
        .env("NO_PROXY", "*")
        .env("LANGSMITH_TRACING", "false")
        .envs(more.iter().map(|(name, value)| (name, value)));
    let ended = ended(script, command).await;
    let (output, errors) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    let cases: Vec<&str> = output.lines().filter(|line| line.starts_with("case ")).collect();
    for line in &cases {
        // Nothing depends on its being read.
        let _ = writeln!(std::io::stderr(), "{script}: {line}");
    }
    let bad: Vec<&&str> = cases.iter().filter(|line| !line.ends_with(" ok")).collect();
    assert!(bad.is_empty() && ended.status.success(), "{script}: {bad:#?}\n{errors}");
    assert!(cases.len() >= least, "{script}: {} cases were run: {output}\n{errors}", cases.len());
}

/// The lines to try of the README, without the one that says where the cluster is.
pub fn readme_lines() -> String {
    let readme = std::fs::read_to_string(root().join("README.md")).expect("the README");
    let (_, block) = readme.split_once("```bash\nexport OPENAI_BASE_URL=").expect("the lines of the README");
    let (block, _) = block.split_once("```").expect("their end");
    let (_, lines) = block.split_once('\n').expect("lines behind the first one");
    lines.to_owned()
}

/// What lines of a shell print that has taken over what `up` prints of the cluster.
pub async fn shell(cluster: &Cluster, lines: &str) -> String {
    let mut command = Command::new("bash");
    command
        .args(["-euo", "pipefail", "-c", lines])
        .env("PYTHONPATH", folder())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("NO_PROXY", "*")
        .env("OPENAI_BASE_URL", format!("{}/v1", cluster.client.base))
        .env("OPENAI_API_KEY", TOKEN);
    let ended = ended("the lines", command).await;
    let errors = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{errors}");
    String::from_utf8_lossy(&ended.stdout).into_owned()
}

async fn ended(what: &str, mut command: Command) -> Output {
    command.stdin(Stdio::null());
    let mut command = tokio::process::Command::from(command);
    command.kill_on_drop(true);
    let ended = tokio::time::timeout(PATIENCE, command.output()).await;
    let ended = ended.unwrap_or_else(|_| panic!("{what}: not ended within {PATIENCE:?}"));
    ended.unwrap_or_else(|error| panic!("{what}: {error}"))
}
