//! Engines from the package index: each in a folder of its own, pinned, nothing system-wide.
//!
//! llama.cpp's server comes as one wheel, checked by its hash, with our own launcher beside it;
//! vLLM by the version that the pool names.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use atomic_file::WriteError;
use owned_tasks::Panicked;
use pool_registry_types::pool::EngineKind;
use tokio::process::Command;

use crate::download::Hub;
use crate::engines::vllm;
use crate::pools_file::{PoolSpec, Provisioning};
use crate::shared_lock::SharedLock;
use crate::supervisor::programs::{ProgramError, on_path, without_secrets};

/// What is installed for llama.cpp, with its hash.
const LLAMACPP_LOCK: &str = include_str!("../../../../../deploy/engines/requirements.lock");
const LLAMACPP_LAUNCHER: &str = include_str!("../../../../../deploy/engines/llama_server.py");
/// Says that an installation is whole, and what of.
const STAMP: &str = "installed.lock";
/// Longest installation. vLLM's is several gigabytes.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(3600);
/// Between two looks at a folder that another process installs into.
pub(super) const BUSY_PAUSE: Duration = Duration::from_secs(1);
/// Longest look at a Python.
const LOOK_TIMEOUT: Duration = Duration::from_secs(20);

/// Where things lie, and what may be fetched.
#[derive(Debug, Clone)]
pub(crate) struct Sources<'a> {
    pub(crate) models_dir: &'a Path,
    pub(crate) packages_dir: &'a Path,
    pub(crate) allowed: Provisioning,
    pub(crate) hub: Hub<'a>,
    pub(crate) client: &'a reqwest::Client,
}

/// Why a packaged engine is not to be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PackageError {
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error("provision: {what} is not installed in {} and provisioning.installs is off; set it to true", folder.display())]
    InstallsOff { what: String, folder: PathBuf },
    #[error("provision: {} is older than Python 3.10; run: apt-get install python3", .0.display())]
    OldPython(PathBuf),
    #[error("provision: Python has no pip; run: apt-get install python3-pip")]
    NoPip,
    #[error("provision: {}: {error}", folder.display())]
    Disk { folder: PathBuf, error: io::Error },
    #[error("provision: {0}")]
    File(WriteError),
    #[error("provision: pip failed: {0}")]
    Pip(String),
    #[error("provision: the installation did not end within an hour")]
    TooSlow,
    #[error("provision: {0}")]
    Panicked(Panicked),
}

impl PackageError {
    /// Whether its operator must do something. All else may do when it is tried again.
    pub(super) fn is_operators(&self) -> bool {
        match self {
            Self::Program(error) => error.is_operators(),
            Self::InstallsOff { .. } | Self::OldPython(_) | Self::NoPip => true,
            Self::Disk { .. } | Self::File(_) | Self::Pip(_) | Self::TooSlow | Self::Panicked(_) => false,
        }
    }
}

/// Program, arguments and environment of a packaged engine; it is installed where it is missing
/// and that is allowed.
pub(crate) async fn package(
    pool: &PoolSpec,
    version: Option<&str>,
    sources: &Sources<'_>,
    progress: &(dyn Fn(String) + Send + Sync),
) -> Result<(PathBuf, Vec<String>, Vec<(String, String)>), PackageError> {
    let python = on_path("python3").await?;
    let wanted = match (pool.engine, version) {
        (EngineKind::LlamaCpp, None) => LLAMACPP_LOCK.to_owned(),
        (EngineKind::LlamaCpp, Some(version)) => format!("xllamacpp=={version}\n"),
        (_, version) => format!("vllm=={}\n", version.unwrap_or_default()),
    };
    let folder = sources.packages_dir.join(folder_name(pool.engine, version));
    let current = tokio::fs::read_to_string(folder.join(STAMP)).await;
    if current.as_ref().ok() != Some(&wanted) {
        if !sources.allowed.installs {
            let line = wanted.lines().find(|line| !line.starts_with('#')).unwrap_or_default();
            let what = line.split_whitespace().next().unwrap_or_default();
            return Err(PackageError::InstallsOff { what: what.to_owned(), folder });
        }
        install(&python, &folder, &wanted, progress).await?;
    }
    let site = folder.join("site");
    let launcher = folder.join("llama_server.py");
    let env = vec![("PYTHONPATH".to_owned(), site.display().to_string())];
    let args: Vec<String> = match pool.engine {
        EngineKind::LlamaCpp => {
            // It belongs to this program, not to the package. The folder may be one that is only read.
            if tokio::fs::read(&launcher).await.ok().as_deref() != Some(LLAMACPP_LAUNCHER.as_bytes()) {
                put(launcher.clone(), LLAMACPP_LAUNCHER.to_owned()).await?;
            }
            let words =
                "--model {model_path} --alias {model} --port {port} --slots {slots} --ctx {ctx} --keep";
            std::iter::once(launcher.display().to_string())
                .chain(words.split(' ').map(str::to_owned))
                .collect()
        }
        _ => {
            let words = ["-m", "vllm.entrypoints.openai.api_server", "--model", "{model_id}"];
            words.into_iter().map(str::to_owned).chain(vllm::options(pool)).collect()
        }
    };
    Ok((python, args, env))
}

/// The folder of an engine's environment below the folder of packages.
pub(crate) fn folder_name(engine: EngineKind, version: Option<&str>) -> String {
    format!("{engine}-{}", version.unwrap_or("pinned"))
}

async fn install(
    python: &Path,
    folder: &Path,
    wanted: &str,
    progress: &(dyn Fn(String) + Send + Sync),
) -> Result<(), PackageError> {
    if !runs(python, "import sys; sys.exit(sys.version_info < (3, 10))").await {
        return Err(PackageError::OldPython(python.to_owned()));
    }
    if !runs(python, "import pip").await {
        return Err(PackageError::NoPip);
    }
    let failed = |error| PackageError::Disk { folder: folder.to_owned(), error };
    // One installation of a folder at a time, whatever pools and daemons there are.
    let parent = folder.parent().unwrap_or(Path::new("."));
    tokio::fs::create_dir_all(parent).await.map_err(failed)?;
    let lock_path = folder.with_extension("lock");
    let lock = loop {
        let path = lock_path.clone();
        let lock = owned_tasks::blocking("lock of an installation", move || SharedLock::take(&path)).await;
        match lock.map_err(PackageError::Panicked)?.map_err(failed)? {
            Some(lock) => break lock,
            None => {
                progress("waits for another process that installs the engine".into());
                tokio::time::sleep(BUSY_PAUSE).await;
            }
        }
    };
    if tokio::fs::read_to_string(folder.join(STAMP)).await.is_ok_and(|have| have == wanted) {
        return Ok(());
    }
    progress("installs the engine from the package index".into());
    // What an interrupted installation has left is no use.
    let _ = tokio::fs::remove_dir_all(folder).await;
    tokio::fs::create_dir_all(folder).await.map_err(failed)?;
    let list = folder.join("requirements.txt");
    tokio::fs::write(&list, wanted).await.map_err(failed)?;
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]);
    if wanted.contains("--hash") {
        pip.args(["--require-hashes", "--only-binary", ":all:", "--no-deps"]);
    }
    pip.args(["--root-user-action", "ignore", "--target"]).arg(folder.join("site"));
    without_secrets(&mut pip);
    pip.arg("--requirement").arg(&list).stdin(Stdio::null()).kill_on_drop(true);
    let ended = tokio::time::timeout(INSTALL_TIMEOUT, pip.output()).await;
    let output = match ended {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Err(failed(error)),
        Err(_) => return Err(PackageError::TooSlow),
    };
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let last: String = text.trim().lines().last().unwrap_or("no message").chars().take(400).collect();
        return Err(PackageError::Pip(last));
    }
    if !lock.is_held() {
        return Err(failed(io::Error::other("another process has taken the installation over")));
    }
    put(folder.join(STAMP), wanted.to_owned()).await
}

/// Replaces a file whole: another start may read it at this moment.
async fn put(path: PathBuf, text: String) -> Result<(), PackageError> {
    let put = move || atomic_file::replace(&path, text.as_bytes(), atomic_file::BY_UMASK);
    let put = owned_tasks::blocking("a package's file", put).await;
    put.map_err(PackageError::Panicked)?.map_err(PackageError::File)
}

/// Whether the code runs to a good end.
async fn runs(python: &Path, code: &str) -> bool {
    let mut command = Command::new(python);
    without_secrets(&mut command);
    command
        .args(["-c", code])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let ended = tokio::time::timeout(LOOK_TIMEOUT, command.status()).await;
    matches!(ended, Ok(Ok(status)) if status.success())
}
