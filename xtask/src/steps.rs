//! Steps of a chore: say what is done, run it, and end with one line that says what to do.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A step failed; the text is the one line for the person.
#[derive(Debug)]
pub(crate) struct Failed(pub(crate) String);

impl Failed {
    pub(crate) fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

/// The repository.
pub(crate) fn root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

/// What may be thrown away: engines, models, logs.
pub(crate) fn cache() -> PathBuf {
    root().join(".cache")
}

pub(crate) fn say(what: &str) {
    println!("==> {what}");
}

/// Runs cargo with its output shown.
pub(crate) fn cargo(arguments: &[&str], remedy: &str) -> Result<(), Failed> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    run(Command::new(program).args(arguments), remedy)
}

/// Runs a command with its output shown.
pub(crate) fn run(command: &mut Command, remedy: &str) -> Result<(), Failed> {
    let shown = show(command);
    forget_outer_cargo(command);
    let status = command.current_dir(root()).stdin(Stdio::null()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Failed(format!("`{shown}` ended with {status}: {remedy}"))),
        Err(error) => Err(Failed(format!("`{shown}` cannot be run ({error}): {remedy}"))),
    }
}

/// Runs a command and returns what it prints.
pub(crate) fn output(command: &mut Command, remedy: &str) -> Result<String, Failed> {
    let shown = show(command);
    forget_outer_cargo(command);
    let output = command.current_dir(root()).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    match output {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => Err(Failed(format!("`{shown}` ended with {}: {remedy}", output.status))),
        Err(error) => Err(Failed(format!("`{shown}` cannot be run ({error}): {remedy}"))),
    }
}

/// This machine's name for the compiler.
pub(crate) fn host() -> Result<String, Failed> {
    let version = output(Command::new("rustc").arg("-vV"), "install the toolchain of rust-toolchain.toml")?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).ok_or_else(|| Failed::new("rustc does not say for which host it is"))
}

/// `cargo run` tells us about this package in variables that some build scripts watch: passed on,
/// they would build the same crates anew at every change between cargo and `cargo xtask`.
pub(crate) fn forget_outer_cargo(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
}

fn show(command: &Command) -> String {
    let name = Path::new(command.get_program()).file_name().unwrap_or(OsStr::new("?"));
    let words = std::iter::once(name).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// A file's text.
pub(crate) fn read(path: &Path) -> Result<String, Failed> {
    std::fs::read_to_string(path)
        .map_err(|error| Failed(format!("{} cannot be read: {error}", path.display())))
}
