//! The one entry to every chore of the repository: `cargo xtask …`.

#![expect(clippy::print_stdout, reason = "a command-line program says what it does")]

mod certs;
mod clients;
mod compose;
mod contracts;
mod dashboards;
mod engine;
mod fuzz;
mod old;
mod release;
mod schema;
mod steps;
mod tidy;
mod up;
mod words;

use std::num::NonZero;
use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::{Parser, Subcommand};

use crate::steps::{Failed, cargo, say};

/// Chores of llama-orch.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Format, lints, unit tests and some schedules of the simulator, within a minute once built: while
    /// working. What counts is `test`.
    Check,
    /// Build both daemons, start a small cluster with a real model, and let it answer.
    Up(up::Options),
    /// Everything that CI runs: format, lints, all tests, contracts, structure, simulator.
    Test {
        /// Only the tests that are too long for each run, and no other step.
        #[arg(long)]
        long: bool,
    },
    /// The same as `test`: the loop before a commit.
    #[command(name = "dev:loop")]
    DevLoop,
    /// Write the OpenAPI documents, the list of metrics and the dashboards from the code, or check that they are as the code says.
    Contracts {
        #[arg(long)]
        check: bool,
    },
    /// Drive both daemons by their OpenAPI documents: what the documents allow, and what they forbid.
    Schema(schema::Options),
    /// Hold crates, documents and requirements against the rules of the house.
    Tidy,
    /// Run the simulator: --seeds N, --seed S, --mutants, --scenarios, --bless.
    Sim {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Measure, as a release build: beside HAProxy before the same fake engines, in one run; `core`: the
    /// control core alone, by the number of nodes; `--profiled`: what `release` has made, beside the same.
    Bench {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Both daemons as a release build that was made by how it runs: in some 20 minutes, and a fifth cheaper
    /// to run. `bench --profiled` measures it.
    Release(release::Options),
    /// Both daemons with hostile and honest peers side by side: --seed S, --minutes N, --only KIND,…;
    /// --release first: as a release build.
    Soak {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Make certificates for trying TLS out: a CA, the control plane's and each node's.
    Certs(certs::Options),
    /// Feed the parsers hostile inputs: needs a C++ compiler.
    Fuzz(fuzz::Options),
    /// The images and the stack of deploy/compose on this machine's container engine: needs root, Docker,
    /// a Compose tool (v2 or later, 1.29, or both) and, where no registry is reached, debootstrap.
    #[command(name = "compose:test")]
    ComposeTest(compose::Options),
    /// Fetch the real engine into the cache.
    Engine,
    /// Fetch the clients of other APIs into the cache.
    Clients,
    /// Build the daemons of the commit before the link into the cache.
    Old,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().chore {
        Chore::Check => all(&CHECK_STEPS),
        Chore::Up(options) => up::run(&options),
        Chore::Test { long: true } => all(&LONG_STEPS),
        Chore::Test { long: false } | Chore::DevLoop => all(&STEPS),
        Chore::Contracts { check } => contracts::run(check),
        Chore::Schema(options) => schema::run(&options),
        Chore::Tidy => tidy::run(),
        Chore::Sim { rest } => sim(&rest),
        Chore::Bench { rest } => bench(&rest),
        Chore::Release(options) => release::execute(&options),
        Chore::Soak { rest } => soak(&rest),
        Chore::Fuzz(options) => fuzz::run(&options),
        Chore::Certs(options) => certs::run(&options),
        Chore::ComposeTest(options) => compose::run_all(&options),
        Chore::Engine => engine::python().map(|_| ()),
        Chore::Clients => clients::python().map(|_| ()),
        Chore::Old => old::build(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failed(why)) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// What a step proves, and how.
type Step = (&'static str, fn() -> Result<(), Failed>);

const FORMAT: Step = ("format", || cargo(&["fmt", "--all", "--check"], "run `cargo fmt --all`"));
const LINTS: Step = ("lints", || {
    cargo(
        &["clippy", "--locked", "--workspace", "--all-targets", "--", "--deny", "warnings"],
        "mend what clippy says",
    )
});

/// What needs no build comes first, then what needs the compiler, then what runs for long. Each
/// step gets what it needs by itself: any of them passes alone, with empty caches.
const STEPS: [Step; 17] = [
    ("structure: crates, arrows, documents, requirements, spawns", tidy::run),
    FORMAT,
    ("licences, bans and sources of the dependencies", deny),
    LINTS,
    ("contracts", || contracts::run(true)),
    ("build", || {
        cargo(&["build", "--locked", "--workspace", "--all-targets"], "mend what the compiler says")
    }),
    ("the real engine, for the end-to-end tests", || engine::python().map(drop)),
    ("the clients of other APIs, for the same", || clients::python().map(drop)),
    ("the daemons of the commit before the link, for the same", old::build),
    // In two steps, so that what failed of either stands at its end.
    ("tests of the crates", || {
        cargo(
            &["test", "--locked", "--workspace", "--lib", "--bins", "--no-fail-fast"],
            "see the failing test above",
        )
    }),
    ("the stages of the shipped log shipper, in its own language", || {
        let manifest = ["--manifest-path", "test-harness/vector-stages/Cargo.toml"];
        let target = ["--target-dir", "target/vector-stages"];
        cargo(&[&["test", "--locked"], &manifest[..], &target[..]].concat(), "see the failing test above")
    }),
    ("journeys, those with the real engine included", || {
        cargo(
            &["test", "--locked", "--workspace", "--test", "*", "--no-fail-fast"],
            "see the failing test above",
        )
    }),
    ("the stack of deploy/compose, on a container engine", compose::step),
    ("documents: both daemons do what they say", || schema::run(&schema::Options::default())),
    ("soak: two minutes of hostile peers beside honest ones", || {
        soak(&["--seed".into(), "1".into(), "--minutes".into(), "2".into()])
    }),
    ("simulator: 10,000 schedules", || sim(&["--seeds".into(), "10000".into()])),
    ("simulator: each rule switched off must be noticed", || sim(&["--mutants".into()])),
];

/// The part of [`STEPS`] that is short: no daemon is started, and no engine.
const CHECK_STEPS: [Step; 5] = [
    FORMAT,
    LINTS,
    ("unit tests", unit_tests),
    ("simulator: scenarios", || sim(&["--scenarios".into()])),
    ("simulator: 200 schedules", || sim(&["--seeds".into(), "200".into()])),
];

/// The crates whose tests `check` leaves out, and why. Any other crate's are in.
const NO_UNIT_TESTS: [(&str, &str); 3] = [
    ("sim", "its tests are schedules, mutants among them: half a minute, and the last steps are the same"),
    ("e2e-cloud", "its journeys start the daemons, and some the real engine: minutes"),
    ("load", "it measures and has no tests; to build it is to build the journeys' library"),
];

fn unit_tests() -> Result<(), Failed> {
    let mut arguments =
        vec!["test", "--locked", "--lib", "--bins", "--tests", "--no-fail-fast", "--workspace"];
    arguments.extend(NO_UNIT_TESTS.iter().flat_map(|(name, _)| ["--exclude", name]));
    // Many of them wait for a time and not for a processor.
    let threads = 2 * std::thread::available_parallelism().map_or(1, NonZero::get);
    let threads = format!("--test-threads={threads}");
    arguments.extend(["--", threads.as_str()]);
    cargo(&arguments, "see the failing test above")
}

/// The tests that take too long for each run: those with `#[ignore = "long"]`.
const LONG_STEPS: [Step; 2] = [
    ("the real engine, for the end-to-end tests", || engine::python().map(drop)),
    ("long tests", || {
        cargo(
            &["test", "--locked", "--workspace", "--no-fail-fast", "--", "--ignored", "--nocapture"],
            "see the failing test above",
        )
    }),
];

/// Runs steps in their order up to the first that fails, which the last line names.
fn all(steps: &[Step]) -> Result<(), Failed> {
    let begun = Instant::now();
    for (n, (name, step)) in steps.iter().enumerate() {
        say(&format!("[{}/{}] {name}", n + 1, steps.len()));
        let start = Instant::now();
        step().map_err(|Failed(why)| Failed(format!("{why}\nfailed at step {} ({name})", n + 1)))?;
        say(&format!("[{}/{}] passed in {} s", n + 1, steps.len(), start.elapsed().as_secs()));
    }
    println!("\neverything passed in {} s", begun.elapsed().as_secs());
    Ok(())
}

/// The version of the checker of dependencies.
const CARGO_DENY: &str = "0.20.2";

fn deny() -> Result<(), Failed> {
    let tools = steps::cache().join("tools");
    let program = tools.join("bin/cargo-deny");
    let version = Command::new(&program).arg("--version").output();
    if !version.is_ok_and(|out| String::from_utf8_lossy(&out.stdout).contains(CARGO_DENY)) {
        say("installing cargo-deny into .cache/tools, once");
        let mut install = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        install.args([
            "install",
            "--quiet",
            "--locked",
            "--force",
            "--profile",
            "dev",
            "--version",
            CARGO_DENY,
            "cargo-deny",
            "--root",
        ]);
        steps::run(
            install.arg(&tools).env("CARGO_TARGET_DIR", tools.join("target")),
            "the crate registry must be reached once",
        )?;
        // The program is all that is used; what it was built from takes half a gigabyte.
        let _ = std::fs::remove_dir_all(tools.join("target"));
    }
    // No build fetches the crates that only other platforms use, and the check reads them all.
    cargo(&["fetch", "--locked", "--quiet"], "the crate registry must be reached once")?;
    // Advisories lie on a host that not every machine reaches.
    steps::run(
        Command::new(program).args(["--offline", "check", "licenses", "bans", "sources"]),
        "see deny.toml",
    )
}

fn sim(rest: &[String]) -> Result<(), Failed> {
    // The features of the whole workspace, so that nothing is built twice, and of it this program.
    cargo(&["build", "--locked", "--quiet", "--workspace", "--bin", "sim"], "mend what the compiler says")?;
    steps::run(Command::new(up::target("debug").join("sim")).args(rest), "see the failing schedule above")
}

fn soak(rest: &[String]) -> Result<(), Failed> {
    let (profile, rest) = match rest.split_first() {
        Some((first, rest)) if first == "--release" => ("release", rest),
        _ => ("debug", rest),
    };
    let mut build = vec!["build", "--locked", "--quiet", "--workspace", "--bins"];
    build.extend((profile == "release").then_some("--release"));
    cargo(&build, "mend what the compiler says")?;
    steps::run(
        Command::new(up::target(profile).join("soak")).args(rest),
        "see the invariants above that broke",
    )
}

fn bench(rest: &[String]) -> Result<(), Failed> {
    let of = rest.first().map(String::as_str);
    if of == Some("--profiled") {
        let load = release::folder().join("load");
        if !load.exists() {
            return Err(Failed(format!("{} is not there: run `cargo xtask release`", load.display())));
        }
        return steps::run(Command::new(load).args(&rest[1..]), "see above what did not run");
    }
    say("release build");
    if of == Some("core") {
        // It needs neither daemon.
        cargo(&["build", "--locked", "--release", "--package", "load"], "mend what the compiler says")?;
        let mut load = Command::new(up::target("release").join("load"));
        return steps::run(load.arg("--core").args(&rest[1..]), "see above what did not run");
    }
    let placement = of == Some("placement");
    cargo(&["build", "--locked", "--release", "--workspace", "--bins"], "mend what the compiler says")?;
    let mut load = Command::new(up::target("release").join("load"));
    if placement {
        load.arg("--placement").args(&rest[1..]);
    } else {
        load.args(rest);
    }
    steps::run(&mut load, "see above what did not run")?;
    say("placements among 1,000 and 10,000 pools");
    cargo(
        &["bench", "--locked", "--package", "multi-node-placement", "--bench", "choose"],
        "see above what did not run",
    )
}
