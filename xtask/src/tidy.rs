//! The rules of the house that no compiler holds.
//!
//! Which crate may depend on which, what a pure crate forbids itself, what the simulator must not be
//! built with, where documents may lie, that every requirement is cited by a test, that every spawn
//! of a daemon has an owner, and that no retired word comes back.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::steps::{Failed, output, read, root};
use crate::words;

/// Each crate with the crates of ours that it may depend on. A new line here wants a decision
/// record.
const ARROWS: &[(&str, &[&str])] = &[
    ("pool-registry-types", &[]),
    ("task-stream", &["pool-registry-types"]),
    ("attempt-link", &["pool-registry-types", "task-stream"]),
    ("openai-gateway", &["pool-registry-types", "task-stream"]),
    ("service-registry", &["pool-registry-types"]),
    ("multi-node-placement", &["pool-registry-types"]),
    ("task-scheduler", &["pool-registry-types", "task-stream", "service-registry", "multi-node-placement"]),
    ("handoff-watcher", &["pool-registry-types", "owned-tasks"]),
    ("node-core", &["pool-registry-types", "attempt-link"]),
    ("node-registration", &["pool-registry-types"]),
    (
        "node-agent",
        &[
            "pool-registry-types",
            "task-stream",
            "attempt-link",
            "node-core",
            "handoff-watcher",
            "node-registration",
            "owned-tasks",
            "span-export",
            "atomic-file",
        ],
    ),
    ("owned-tasks", &["pool-registry-types"]),
    ("span-export", &["pool-registry-types", "owned-tasks"]),
    ("atomic-file", &[]),
    ("daemon-kit", &["pool-registry-types", "owned-tasks", "span-export", "test-certs"]),
    ("test-certs", &["atomic-file"]),
    (
        "orchestratord",
        &[
            "pool-registry-types",
            "task-stream",
            "attempt-link",
            "task-scheduler",
            "openai-gateway",
            "daemon-kit",
            "node-agent",
            "handoff-watcher",
            "node-registration",
            "owned-tasks",
            "span-export",
            "atomic-file",
        ],
    ),
    (
        "pool-managerd",
        &[
            "pool-registry-types",
            "task-stream",
            "attempt-link",
            "handoff-watcher",
            "node-registration",
            "node-agent",
            "daemon-kit",
            "owned-tasks",
        ],
    ),
    ("fake-engine", &["atomic-file"]),
    ("fake-nvml", &[]),
    ("fake-nvml-bare", &[]),
    (
        "sim",
        &[
            "pool-registry-types",
            "task-stream",
            "attempt-link",
            "service-registry",
            "task-scheduler",
            "node-core",
        ],
    ),
    ("e2e-cloud", &["pool-registry-types", "test-certs"]),
    ("load", &["pool-registry-types", "task-stream", "task-scheduler", "e2e-cloud"]),
    ("xtask", &["pool-registry-types", "test-certs", "atomic-file"]),
];

/// Crates without clock, environment and disorder, and what they may use from outside.
const PURE: &[(&str, &[&str])] = &[
    (
        "pool-registry-types",
        &["foldhash", "itoa", "memchr", "serde", "serde_json", "smol_str", "thiserror", "utoipa", "uuid"],
    ),
    ("task-stream", &["bytes", "serde", "serde_json", "thiserror"]),
    ("attempt-link", &["bytes", "serde", "serde_json", "thiserror", "uuid"]),
    ("openai-gateway", &["bytes", "serde", "serde_json", "thiserror"]),
    ("service-registry", &["thiserror"]),
    ("multi-node-placement", &["fixedbitset"]),
    ("task-scheduler", &["thiserror", "uuid"]),
    ("node-core", &["bytes", "thiserror"]),
];

/// Crates that must not be built with these, however far below them: what a core needs of the world
/// it is told.
const WITHOUT: &[(&str, &[&str])] = &[("node-core", WORLD), ("task-scheduler", WORLD), ("sim", WORLD)];
/// A runtime, clients and servers, processes, the driver of GPUs.
const WORLD: &[&str] = &["tokio", "hyper", "reqwest", "rustls", "nix", "nvml-wrapper"];

/// What spawns a task or a thread. A process is spawned by `.spawn()`, without an argument.
const SPAWNS: &[&str] = &[
    "tokio::spawn",
    "task::spawn",
    "spawn_blocking",
    "spawn_local(",
    "spawn_on(",
    "thread::spawn",
    "thread::Builder",
    "thread::scope(",
    ".spawn(",
];
/// The files of the daemons that spawn by themselves, and why nothing ends there unseen.
const OWNERS: &[(&str, &str)] = &[
    ("libs/shared/owned-tasks/src/lib.rs", "the owner of all others"),
    (
        "libs/shared/owned-tasks/src/threads.rs",
        "the threads for streams, each of which runs until the last handle goes",
    ),
    (
        "libs/shared/owned-tasks/src/worker.rs",
        "a thread whose work is caught piece by piece, and which runs until its handle goes",
    ),
    (
        "libs/shared/daemon-kit/src/telemetry.rs",
        "the last lines of a process, whose thread may hang with them",
    ),
    ("libs/shared/daemon-kit/src/connections.rs", "a set of tasks, each of whose ends is looked at"),
    ("libs/gpu-node/node-agent/src/guard/inside.rs", "a process of its own, which the daemon looks after"),
];

/// Where a document may lie.
const DOCUMENTS: &[&str] = &["README.md", ".docs/", ".specs/", "deploy/", "contracts/metrics.md"];
/// What may stand at the top.
const TOP: &[&str] = &[
    "Cargo.toml",
    "Cargo.lock",
    "README.md",
    "bin",
    "libs",
    "contracts",
    "test-harness",
    "xtask",
    ".specs",
    ".docs",
    "deploy",
    ".ci",
    ".cargo",
    ".gitignore",
    "rust-toolchain.toml",
    "rustfmt.toml",
    "clippy.toml",
    ".dockerignore",
    "deny.toml",
];

pub(crate) fn run() -> Result<(), Failed> {
    let mut complaints = Vec::new();
    crates(&mut complaints)?;
    builds(&mut complaints)?;
    let files = tracked()?;
    documents(&files, &mut complaints);
    requirements(&files, &mut complaints)?;
    spawns(&files, &mut complaints)?;
    words::check(&files, &mut complaints)?;
    if complaints.is_empty() {
        println!("tidy: {} crates, {} files", ARROWS.len(), files.len());
        return Ok(());
    }
    complaints.sort();
    Err(Failed(format!("tidy:\n  {}", complaints.join("\n  "))))
}

fn crates(complaints: &mut Vec<String>) -> Result<(), Failed> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["metadata", "--format-version", "1", "--no-deps", "--locked"]);
    let metadata: Value =
        serde_json::from_str(&output(&mut command, "mend Cargo.toml, or commit Cargo.lock")?)
            .map_err(|error| Failed(format!("cargo metadata is unreadable: {error}")))?;
    let allowed: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    let pure: BTreeMap<&str, &[&str]> = PURE.iter().copied().collect();
    let mut seen = BTreeSet::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        seen.insert(name.to_owned());
        let Some(arrows) = allowed.get(name) else {
            complaints.push(format!("crate {name} is not in the table of xtask/src/tidy.rs"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let other = dependency["name"].as_str().unwrap_or_default();
            let ours = allowed.contains_key(other);
            let dev = dependency["kind"] == "dev";
            if ours && !arrows.contains(&other) {
                complaints.push(format!("{name} must not depend on {other}"));
            }
            if let Some(outside) = pure.get(name)
                && !ours
                && !dev
                && !outside.contains(&other)
            {
                complaints.push(format!("{name} is pure and must not use {other}"));
            }
        }
        if pure.contains_key(name) {
            let manifest = PathBuf::from(package["manifest_path"].as_str().unwrap_or_default());
            let lints = manifest.parent().unwrap_or(Path::new(".")).join("clippy.toml");
            let text = std::fs::read_to_string(&lints).unwrap_or_default();
            for ban in [
                "std::time::Instant::now",
                "std::time::SystemTime::now",
                "std::env::var",
                "std::collections::HashMap",
            ] {
                if !text.contains(ban) {
                    complaints.push(format!("the clippy.toml of {name} does not forbid {ban}"));
                }
            }
        }
    }
    for name in allowed.keys().filter(|name| !seen.contains(**name)) {
        complaints.push(format!("{name} stands in the table of xtask/src/tidy.rs and is no crate"));
    }
    Ok(())
}

/// What the crates of [`WITHOUT`] are built with, through others too.
fn builds(complaints: &mut Vec<String>) -> Result<(), Failed> {
    for (name, without) in WITHOUT {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.args(["tree", "--package", name, "--edges", "normal", "--prefix", "none"]);
        command.args(["--format", "{p}", "--locked"]);
        let tree = output(&mut command, "mend Cargo.toml, or commit Cargo.lock")?;
        let found = built_with(&tree, without);
        complaints.extend(found.into_iter().map(|other| format!("{name} must not be built with {other}")));
    }
    Ok(())
}

/// Those of `without` that a tree of cargo's names.
fn built_with<'a>(tree: &str, without: &[&'a str]) -> Vec<&'a str> {
    let packages: BTreeSet<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
    without.iter().copied().filter(|other| packages.contains(other)).collect()
}

fn tracked() -> Result<Vec<String>, Failed> {
    let mut command = Command::new("git");
    command.args(["ls-files", "--cached", "--others", "--exclude-standard"]);
    let text = output(&mut command, "run it in a git checkout")?;
    Ok(text.lines().map(str::to_owned).filter(|file| root().join(file).exists()).collect())
}

fn documents(files: &[String], complaints: &mut Vec<String>) {
    for file in files {
        let top = file.split('/').next().unwrap_or_default();
        if !TOP.contains(&top) {
            complaints.push(format!("{file}: {top} does not belong at the top"));
        }
        if file.ends_with(".md") && !DOCUMENTS.iter().any(|place| file.starts_with(place)) {
            complaints.push(format!(
                "{file}: documents lie in README.md, .docs, .specs and deploy, beside contracts/metrics.md"
            ));
        }
    }
}

/// Every requirement is cited by a test, and every citation has its requirement.
fn requirements(files: &[String], complaints: &mut Vec<String>) -> Result<(), Failed> {
    let spec = ".specs/01_cloud_profile_.md";
    let stated = ids(&read(&root().join(spec))?, "**CLOUD-");
    let mut cited = BTreeSet::new();
    for file in files.iter().filter(|file| file.ends_with(".rs") && !file.starts_with("xtask/")) {
        let text = read(&root().join(file))?;
        let tests = file.contains("test") || file.contains("journeys") || text.contains("#[cfg(test)]");
        for id in ids(&text, "CLOUD-") {
            if !stated.contains(&id) {
                complaints.push(format!("{file}: CLOUD-{id} is not in {spec}"));
            }
            if tests && text.contains(&format!("// CLOUD-{id}\n")) {
                cited.insert(id);
            }
        }
    }
    for id in stated.difference(&cited) {
        complaints.push(format!("{spec}: no test cites CLOUD-{id}"));
    }
    Ok(())
}

/// Whatever the daemons spawn goes through `owned-tasks`.
fn spawns(files: &[String], complaints: &mut Vec<String>) -> Result<(), Failed> {
    for (owner, _) in OWNERS.iter().filter(|(owner, _)| !files.iter().any(|file| file == owner)) {
        complaints.push(format!("{owner} may spawn by the table of xtask/src/tidy.rs and is no file"));
    }
    let is_daemons = |file: &&String| {
        let is_code = file.starts_with("bin/") || file.starts_with("libs/");
        is_code && file.ends_with(".rs") && !file.ends_with("tests.rs") && !file.contains("/tests/")
    };
    for file in files.iter().filter(is_daemons) {
        if OWNERS.iter().any(|(owner, _)| owner == file) {
            continue;
        }
        let found = bare_spawns(&read(&root().join(file))?);
        let complaint = |line| format!("{file}:{line}: spawn it by owned-tasks, so that its panic is seen");
        complaints.extend(found.into_iter().map(complaint));
    }
    Ok(())
}

/// The numbers of the lines that spawn without an owner, before the tests at a file's end.
fn bare_spawns(text: &str) -> Vec<usize> {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let spawns = |line: &str| {
        let code = line.trim_start();
        let is_process = code.contains(".spawn()");
        !code.starts_with("//") && !is_process && SPAWNS.iter().any(|word| code.contains(word))
    };
    let numbered = code.lines().enumerate().filter(|(_, line)| spawns(line));
    numbered.map(|(before, _)| before + 1).collect()
}

/// The four digits after each occurrence of `prefix`.
fn ids(text: &str, prefix: &str) -> BTreeSet<String> {
    let digits =
        |rest: &str| rest.get(..4).filter(|id| id.bytes().all(|b| b.is_ascii_digit())).map(str::to_owned);
    text.match_indices(prefix).filter_map(|(at, _)| digits(&text[at + prefix.len()..])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_crate_is_built_with_is_known_by_its_whole_name() {
        let tree = "sim v0.1.0 (/src/sim)\nclap v4.6.0\ntokio-util v0.7.0\nserde v1.0.0 (*)\n";
        assert_eq!(built_with(tree, &["tokio", "reqwest"]), [""; 0]);
        let tree = format!("{tree}tokio v1.54.0\n");
        assert_eq!(built_with(&tree, &["tokio", "reqwest"]), ["tokio"]);
    }

    #[test]
    fn a_spawn_without_an_owner_is_found_by_its_line() {
        for spawn in [
            "    tokio::spawn(async {});",
            "    tokio::task::spawn(watch());",
            "    self.agent.tracker.spawn(watch());",
            "    let read = tokio::task::spawn_blocking(move || read(&path)).await;",
            "    std::thread::spawn(move || watch());",
            "    let thread = std::thread::Builder::new();",
            "    set.spawn(async move {",
        ] {
            assert_eq!(bare_spawns(&format!("fn start() {{\n{spawn}\n}}\n")), [2], "{spawn}");
        }
    }

    #[test]
    fn owned_tasks_processes_comments_and_tests_are_none() {
        let text = r#"
            // Not tokio::spawn(watch()): nobody would see its panic.
            owned_tasks::task(&tracker, "a probe", probe());
            loops.start(&tracker, "a watch", &stop, make);
            let child = command.spawn()?;
        "#;
        assert_eq!(bare_spawns(text), [0; 0]);
        let tested = "fn start() {}\n#[cfg(test)]\nmod tests {\n    tokio::spawn(watch());\n}\n";
        assert_eq!(bare_spawns(tested), [0; 0]);
    }
}
