//! Both daemons as a release build that knows how it is used: built once so that it records how it runs,
//! put under load with each kind of request, and built again by what was recorded.
//!
//! The compiler then lays out together what runs together, which is what a request costs most: its way
//! leads through more code than a processor keeps at hand. See decision 0040 for the figures.

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;

use crate::steps::{Failed, host, output, run, say};
use crate::up;

const DAEMONS: [&str; 2] = ["orchestratord", "pool-managerd"];
/// The program that puts them under load, and its engine: they are built without any profile.
const DRIVERS: [&str; 2] = ["load", "fake-engine"];
const COMPILER: &str = "mend what the compiler says";
const RUSTUP: &str = "run `rustup component add llvm-tools`";

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Seconds of each kind of request while the daemons record how they run.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
}

/// Where the finished programs lie.
pub(crate) fn folder() -> PathBuf {
    up::target("profiled").join("bin")
}

pub(crate) fn execute(options: &Options) -> Result<(), Failed> {
    let host = host()?;
    let merge = merge_program(&host)?;
    let work = up::target("profiled");
    let (records, profile) = (work.join("records"), work.join("profile"));
    // What failed or was stopped leaves nothing that looks finished.
    clear(&folder())?;
    clear(&records)?;
    say("build that records how it runs");
    // With the same settings as what comes of it: functions go by names that their settings are part of.
    build(&work.join("recording"), &host, &format!("-Cprofile-generate={}", records.display()))?;
    run(release_of(&DRIVERS).env_remove("CARGO_BUILD_TARGET"), COMPILER)?;
    say("load");
    let place = work.join("recording/bin");
    clear(&place)?;
    copy(&work.join("recording").join(&host).join("release"), &place, &DAEMONS)?;
    copy(&up::target("release"), &place, &DRIVERS)?;
    let seconds = options.seconds.to_string();
    // With the lines of the log that operators have.
    run(
        Command::new(place.join("load"))
            .args(["--train", "--log", "info", "--seconds", &seconds])
            .env_remove("LLVM_PROFILE_FILE"),
        "see above what did not run",
    )?;
    say("build by what was recorded");
    run(
        Command::new(merge).arg("merge").arg("--output").arg(&profile).arg(&records),
        "the daemons have recorded nothing that can be read",
    )?;
    // From the ground up: cargo does not look whether a profile has changed.
    let built = work.join("built");
    clear(&built)?;
    build(&built, &host, &format!("-Cprofile-use={}", profile.display()))?;
    copy(&built.join(&host).join("release"), &folder(), &DAEMONS)?;
    copy(&up::target("release"), &folder(), &DRIVERS)?;
    // Nothing of these serves the next time.
    clear(&built)?;
    clear(&records)?;
    say(&format!("both programs are in {}", folder().display()));
    Ok(())
}

/// A release build of these packages.
fn release_of(packages: &[&str]) -> Command {
    let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    build.args(["build", "--locked", "--release"]);
    build.args(packages.iter().flat_map(|name| ["--package", name]));
    build
}

/// Builds both daemons. Naming the host as target keeps the flag from programs that run while building.
/// Flags of the environment count too, those of cargo's configuration files do not.
fn build(target: &Path, host: &str, flag: &str) -> Result<(), Failed> {
    // In this form a path may have blanks.
    let between = "\u{1f}";
    let given = match (std::env::var("CARGO_ENCODED_RUSTFLAGS"), std::env::var("RUSTFLAGS")) {
        (Ok(encoded), _) => encoded,
        (_, Ok(flags)) => flags.split_whitespace().collect::<Vec<_>>().join(between),
        _ => String::new(),
    };
    let flags = if given.is_empty() { flag.to_owned() } else { [&given, flag].join(between) };
    let mut build = release_of(&DAEMONS);
    build.args(["--target", host]).env("CARGO_TARGET_DIR", target).env("CARGO_ENCODED_RUSTFLAGS", flags);
    run(&mut build, COMPILER)
}

/// The program that makes one profile of what was recorded: that of this compiler, which may write it in
/// its own way.
fn merge_program(host: &str) -> Result<PathBuf, Failed> {
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]), "rustc must be there")?;
    let program = Path::new(sysroot.trim()).join("lib/rustlib").join(host).join("bin/llvm-profdata");
    if !program.exists() {
        say("component llvm-tools of the toolchain");
        run(Command::new("rustup").args(["component", "add", "llvm-tools"]), RUSTUP)?;
    }
    if program.exists() {
        Ok(program)
    } else {
        Err(Failed(format!("{} is not there: {RUSTUP}", program.display())))
    }
}

/// An empty folder.
fn clear(folder: &Path) -> Result<(), Failed> {
    let failed = |error: std::io::Error| Failed(format!("{}: {error}", folder.display()));
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    std::fs::create_dir_all(folder).map_err(failed)
}

fn copy(from: &Path, to: &Path, names: &[&str]) -> Result<(), Failed> {
    for name in names {
        let (from, to) = (from.join(name), to.join(name));
        std::fs::copy(&from, &to).map_err(|error| Failed(format!("{}: {error}", from.display())))?;
    }
    Ok(())
}
