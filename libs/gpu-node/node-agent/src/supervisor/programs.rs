//! Programs of others: where they are, and what they must not see.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tokio::process::Command;

use crate::guard::link::COLLECTOR_SECRETS;

/// Why a program is not to be had. Its operator can do something about it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProgramError {
    #[error("provision.program: {name} is no executable file; run: chmod +x {name}")]
    NotExecutable { name: String },
    #[error("provision.program: {name}: {error}")]
    Unusable { name: String, error: io::Error },
    #[error("provision.program: {name} is not on the PATH; {}", how_to_get(name))]
    NotFound { name: String },
    #[error("provision.program: the PATH could not be searched")]
    Unsearched,
}

impl ProgramError {
    /// Whether its operator must do something.
    pub(super) fn is_operators(&self) -> bool {
        !matches!(self, Self::Unsearched)
    }
}

/// [`find_program`] on a thread that may wait for a disk.
pub(crate) async fn on_path(name: &str) -> Result<PathBuf, ProgramError> {
    let (name, path) = (name.to_owned(), std::env::var_os("PATH"));
    let found =
        owned_tasks::blocking("search of the PATH", move || find_program(&name, path.as_deref())).await;
    found.unwrap_or(Err(ProgramError::Unsearched))
}

/// A program by its path, or by its name on the PATH.
pub(crate) fn find_program(name: &str, path: Option<&OsStr>) -> Result<PathBuf, ProgramError> {
    let runs = |path: &Path| {
        std::fs::metadata(path).is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0)
    };
    if name.contains('/') {
        let path = PathBuf::from(name);
        return match std::fs::metadata(&path) {
            Ok(_) if runs(&path) => Ok(path),
            Ok(_) => Err(ProgramError::NotExecutable { name: name.to_owned() }),
            Err(error) => Err(ProgramError::Unusable { name: name.to_owned(), error }),
        };
    }
    let folders = path.map(std::env::split_paths).into_iter().flatten();
    let found = folders.map(|folder| folder.join(name)).find(|path| runs(path));
    found.ok_or_else(|| ProgramError::NotFound { name: name.to_owned() })
}

fn how_to_get(name: &str) -> &'static str {
    match name {
        "llama-server" => "build llama.cpp, or use provision = { mode = \"package\" } with installs = true",
        "vllm" => "run: python3 -m pip install vllm",
        "python3" => "run: apt-get install python3 python3-pip",
        _ => "install it, or give its path",
    }
}

/// What is installed is others' code, and needs none of the daemon's tokens.
pub(crate) fn without_secrets(command: &mut Command) {
    command.env_remove("LLORCH_API_TOKEN").env_remove("LLORCH_API_TOKEN_FILE").env_remove("HF_TOKEN");
    for name in COLLECTOR_SECRETS {
        command.env_remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2444
    #[test]
    fn a_missing_program_is_named_with_what_brings_it() {
        let none = |name: &str| find_program(name, Some(OsStr::new("/nowhere"))).unwrap_err().to_string();
        assert!(none("llama-server").contains("mode = \"package\""));
        assert!(none("/no/such").contains("No such file"));
        let plain = tempfile::NamedTempFile::new().unwrap();
        assert!(none(&plain.path().display().to_string()).contains("chmod +x"));
        assert_eq!(find_program("sh", Some(OsStr::new("/nowhere:/bin"))).unwrap(), PathBuf::from("/bin/sh"));
    }
}
