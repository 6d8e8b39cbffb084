//! Hostile inputs for the parsers: the targets of `test-harness/fuzz`, built and run in turn.
//!
//! libFuzzer learns from each branch that an input takes. The branches are counted by code which
//! the compiler adds: options of the stable toolchain, so that only the address sanitizer needs
//! `RUSTC_BOOTSTRAP`. What is found on the way stays in `.cache/fuzz`; the kept inputs in
//! `test-harness/fuzz/corpus` are read and never written.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::steps::{Failed, cache, forget_outer_cargo, host, root, run as step, say};

/// What to feed to what.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Seconds for each target; 0 runs the kept inputs only.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// With the address sanitizer, which is about four times slower.
    #[arg(long)]
    address: bool,
    /// The targets; all of them when none is named.
    targets: Vec<String>,
}

/// Edges, counted in place, and the operands of comparisons.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";
/// One input may take so long, seconds; the process so much memory, and one allocation, MiB.
const TIMEOUT: u64 = 5;
const MEMORY: u64 = 512;
const ALLOCATION: u64 = 64;
/// Longest input, bytes.
const LONGEST: u64 = 4096;
/// How much of a failing target's output is shown, lines.
const TAIL: usize = 40;

fn folder() -> PathBuf {
    root().join("test-harness/fuzz")
}

pub(crate) fn run(options: &Options) -> Result<(), Failed> {
    let targets = choose(&options.targets)?;
    compiler()?;
    say("the fuzz targets, with coverage");
    let programs = build(options.address)?;
    let mut failed = Vec::new();
    for target in &targets {
        match feed(target, &programs.join(target), options) {
            Ok(figures) => println!("{target}: {figures}"),
            Err(Failed(why)) => {
                println!("{target}: FAILED\n{why}");
                failed.push(target.as_str());
            }
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Failed(format!("findings in {}: mend them, and keep each input as a test", failed.join(", "))))
}

fn choose(named: &[String]) -> Result<Vec<String>, Failed> {
    let sources = folder().join("fuzz_targets");
    let mut all: Vec<String> = std::fs::read_dir(&sources)
        .map_err(|error| Failed(format!("{}: {error}", sources.display())))?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".rs").map(str::to_owned))
        .collect();
    all.sort();
    match named.iter().find(|name| !all.contains(name)) {
        Some(unknown) => Err(Failed(format!("there is no target {unknown}: {}", all.join(", ")))),
        None if named.is_empty() => Ok(all),
        None => Ok(named.to_vec()),
    }
}

fn compiler() -> Result<(), Failed> {
    let name = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let found = Command::new(&name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if found.is_ok_and(|status| status.success()) {
        return Ok(());
    }
    Err(Failed::new("libFuzzer needs a C++ compiler: apt-get install --no-install-recommends g++"))
}

/// Builds all targets and says where they are.
fn build(address: bool) -> Result<PathBuf, Failed> {
    let host = host()?;
    // Other flags than the rest has: a folder of its own, or each would build the other anew.
    let target = cache().join("fuzz").join(if address { "target-address" } else { "target" });
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--locked", "--release", "--bins", "--target", &host, "--manifest-path"]);
    cargo.arg(folder().join("Cargo.toml")).env("CARGO_TARGET_DIR", &target);
    if address {
        // The sanitizer comes with the toolchain; only its option is not yet stable.
        cargo.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", format!("{COVERAGE} -Zsanitizer=address"));
    } else {
        cargo.env("RUSTFLAGS", COVERAGE);
    }
    step(&mut cargo, "mend what the compiler says")?;
    Ok(target.join(host).join("release"))
}

/// Runs one target. Returns its figures; an error says what was found and how to see it again.
fn feed(target: &str, program: &Path, options: &Options) -> Result<String, Failed> {
    say(&format!("{target}: {} s", options.seconds));
    let own = cache().join("fuzz").join(target);
    let (found, artifacts) = (own.join("corpus"), own.join("artifacts"));
    for folder in [&found, &artifacts] {
        std::fs::create_dir_all(folder).map_err(|error| Failed(format!("{}: {error}", folder.display())))?;
    }
    let mut fuzzer = Command::new(program);
    if options.seconds == 0 {
        fuzzer.arg("-runs=0");
    } else {
        fuzzer.arg(format!("-max_total_time={}", options.seconds));
    }
    fuzzer.args([
        format!("-timeout={TIMEOUT}"),
        format!("-rss_limit_mb={MEMORY}"),
        format!("-malloc_limit_mb={ALLOCATION}"),
        format!("-max_len={LONGEST}"),
        format!("-artifact_prefix={}/", artifacts.display()),
        "-print_final_stats=1".to_owned(),
    ]);
    let dictionary = folder().join("dictionaries").join(format!("{target}.dict"));
    if dictionary.exists() {
        fuzzer.arg(format!("-dict={}", dictionary.display()));
    }
    // New inputs go to the first folder.
    fuzzer.arg(&found).arg(folder().join("corpus").join(target));
    // What was freed is kept for a while by the sanitizer, and is no leak.
    fuzzer.env("ASAN_OPTIONS", "quarantine_size_mb=16").env("RUST_BACKTRACE", "1");
    forget_outer_cargo(&mut fuzzer);
    let ended = fuzzer.current_dir(root()).stdin(Stdio::null()).stdout(Stdio::null()).output();
    let ended = ended.map_err(|error| Failed(format!("{} cannot be run: {error}", program.display())))?;
    let text = String::from_utf8_lossy(&ended.stderr);
    if ended.status.success() {
        return Ok(figures(&text));
    }
    let artifact = text.lines().find_map(|line| Some(line.split_once("Test unit written to ")?.1.trim()));
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n");
    let again = match artifact {
        Some(artifact) => format!("input:  {artifact}\nreplay: {} {artifact}", program.display()),
        None => format!("it ended with {} and left no input", ended.status),
    };
    Err(Failed(format!("{tail}\n{again}")))
}

/// What libFuzzer says of its run, in one line.
fn figures(text: &str) -> String {
    let stat = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.map_or("?", str::trim)
    };
    let edges = |mark: &str| {
        let line = text.lines().rfind(|line| line.split_whitespace().nth(1) == Some(mark));
        let word = line.and_then(|line| line.split_whitespace().skip_while(|word| *word != "cov:").nth(1));
        word.unwrap_or("?")
    };
    format!(
        "{} runs, {} a second, {} edges after {} at the start, {} new inputs, {} MiB",
        stat("stat::number_of_executed_units"),
        stat("stat::average_exec_per_sec"),
        edges("DONE"),
        edges("INITED"),
        stat("stat::new_units_added"),
        stat("stat::peak_rss_mb"),
    )
}
