//! `cargo xtask compose:test`: the images of `deploy/compose`, and its stack on the container engine of this
//! machine, through what an operator does to it and what happens to it.

mod docker;
mod stack;

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::compose::docker::{Docker, Tool};
use crate::compose::stack::Stack;
use crate::steps::{Failed, cache, cargo, root, run, say};
use crate::up::{interrupted, target};

/// As the Dockerfile and `compose.yaml` name them.
const BUILDER: &str = "rust:1.95.0-slim-bookworm";
const RUNTIME: &str = "debian:bookworm-slim";

#[derive(Debug, Default, clap::Args)]
pub(crate) struct Options {
    /// Let the Dockerfile build the programs, as it does without `BINARIES`; else those are taken that cargo
    /// has built here.
    #[arg(long)]
    long: bool,
    /// Take programs of a release build, and not of the build that the tests have.
    #[arg(long, conflicts_with = "long")]
    release: bool,
}

/// Where the images have their programs from.
#[derive(Clone)]
enum Programs {
    /// A folder of the build's context.
    There(PathBuf),
    /// The Dockerfile builds them, in this image.
    Built { builder: String },
}

/// As a step of `test`: where this machine cannot, that is said, and in CI it is a failure.
pub(crate) fn step() -> Result<(), Failed> {
    let is_ci = std::env::var_os("CI").is_some();
    let mut lacks = docker::lacking();
    if is_ci && lacks.is_empty() {
        // Both are to be had there.
        lacks.extend(Tool::lacking().into_iter().map(Tool::name));
    }
    // One of our own changes how this machine's network forwards: that is for CI, or for whoever asks for it.
    let may_run = is_ci || docker::has_engine();
    if lacks.is_empty() && may_run {
        return run_all(&Options::default());
    }
    let what = match lacks.as_slice() {
        [] => "no container engine runs here; `cargo xtask compose:test` starts one".to_owned(),
        lacks => format!("this machine lacks {}", lacks.join(", ")),
    };
    if is_ci {
        return Err(Failed(format!("CI must run the stack of deploy/compose, and {what}")));
    }
    say(&format!("left out: the stack of deploy/compose does not run, {what}"));
    Ok(())
}

pub(crate) fn run_all(options: &Options) -> Result<(), Failed> {
    let lacks = docker::lacking();
    if !lacks.is_empty() {
        return Err(Failed(format!("this machine lacks {}", lacks.join(", "))));
    }
    let profile = if options.release { "release" } else { "debug" };
    if !options.long {
        let mut build = vec!["build", "--locked", "--quiet", "--workspace", "--bins"];
        build.extend(options.release.then_some("--release"));
        cargo(&build, "mend what the compiler says")?;
    }
    cargo(&["build", "--locked", "--quiet", "--package", "fake-nvml"], "mend what the compiler says")?;
    std::fs::create_dir_all(cache()).map_err(|error| Failed(format!("{}: {error}", cache().display())))?;
    let mut docker = Docker::start()?;
    let runtime_image = docker.base(RUNTIME, |root| docker::debian(root, ""))?;
    let programs = match options.long {
        true => Programs::Built { builder: docker.base(BUILDER, docker::rust)? },
        false => Programs::There(in_context(&target(profile))?),
    };
    let runtime = tokio::runtime::Runtime::new().map_err(|error| Failed(format!("tokio: {error}")))?;
    // Only the first installation in a process can fail.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let tools = Tool::there();
    for (nth, tool) in tools.iter().enumerate() {
        hold_whole_file(*tool, &docker)?;
        let stack = Stack::prepare(&docker, *tool, runtime_image.clone(), programs.clone())?;
        let walk = async {
            let walked = async {
                match nth {
                    0 => stack.walk().await,
                    _ => stack.short_walk().await,
                }
            };
            tokio::select! {
                outcome = walked => outcome,
                () = interrupted() => Err(Failed::new("interrupted")),
            }
        };
        let outcome = stack.build().and_then(|()| runtime.block_on(walk));
        if outcome.is_err() {
            stack.show_logs();
        }
        let down = stack.down();
        outcome.and(down)?;
    }
    for tool in Tool::lacking() {
        say(&format!("not run here: {}", tool.name()));
    }
    say(
        "not run here: the images of the profiles gpu and observability (their part of compose.yaml was read)",
    );
    Ok(())
}

/// Copies both programs into the build's context, without what only debuggers read. Returns their folder as the
/// context names it.
fn in_context(built: &Path) -> Result<PathBuf, Failed> {
    let folder = Path::new("target/images");
    let whole = root().join(folder);
    std::fs::create_dir_all(&whole).map_err(|error| Failed(format!("{}: {error}", whole.display())))?;
    for program in ["orchestratord", "pool-managerd"] {
        let mut strip = Command::new("strip");
        strip.arg("--strip-debug").arg("-o").arg(whole.join(program)).arg(built.join(program));
        run(&mut strip, "Debian: apt-get install binutils")?;
    }
    Ok(folder.to_owned())
}

/// All of `compose.yaml`, the profiles that cannot run here too.
fn hold_whole_file(tool: Tool, docker: &Docker) -> Result<(), Failed> {
    let mut config = tool.command(docker);
    config.arg("--env-file").arg(no_settings()?).arg("--file").arg(file()).args(["--profile", "gpu"]);
    config.args(["--profile", "observability", "config", "--quiet"]);
    run(&mut config, "mend deploy/compose/compose.yaml")
}

/// The file of the stack.
fn file() -> PathBuf {
    root().join("deploy/compose/compose.yaml")
}

/// A file without settings, for the place of an operator's own.
fn no_settings() -> Result<PathBuf, Failed> {
    let path = cache().join("compose.env");
    std::fs::write(&path, "").map_err(|error| Failed(format!("{}: {error}", path.display())))?;
    Ok(path)
}
