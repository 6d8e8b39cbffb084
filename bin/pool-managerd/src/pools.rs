//! `pool-managerd pools`: files of pools, before a daemon reads them.

#![expect(clippy::print_stdout, reason = "a command says what it found")]

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;
use node_agent::pools_file::{PoolsFile, PoolsFileError};
use node_agent::supervisor::{self, Finding};

/// What is done with a file of pools.
#[derive(Debug, Subcommand)]
pub(crate) enum Order {
    /// Say what a node would say of the file, and fetch and start nothing. Devices and memory are not
    /// looked at: engines that run have some of them.
    Check {
        /// As POOL_MANAGERD_POOLS would name it.
        file: PathBuf,
    },
}

/// Where a node looks for what engines need.
#[derive(Debug)]
pub(crate) struct Lookup<'a> {
    pub(crate) models_dir: &'a Path,
    pub(crate) packages_dir: &'a Path,
    pub(crate) forbids_provisioning: bool,
}

/// Why a file was not checked, or is not taken.
#[derive(Debug, thiserror::Error)]
enum CheckError {
    #[error("{}: {error}", file.display())]
    File { file: PathBuf, error: PoolsFileError },
    #[error("the runtime cannot be made")]
    Runtime(#[source] io::Error),
    #[error("the HTTP client cannot be made")]
    Client(#[source] io::Error),
}

pub(crate) fn run(order: &Order, lookup: &Lookup<'_>) -> ExitCode {
    let Order::Check { file } = order;
    match check(file, lookup) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            daemon_kit::telemetry::say_fatal(&error);
            ExitCode::FAILURE
        }
    }
}

/// Prints a line for each pool. Returns whether all of them could be started.
fn check(path: &Path, lookup: &Lookup<'_>) -> Result<bool, CheckError> {
    let file = PoolsFile::read(path).map_err(|error| CheckError::File { file: path.to_owned(), error })?;
    // Only the first installation in a process can fail, and this is the first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let checking =
        supervisor::check(&file, lookup.models_dir, lookup.packages_dir, lookup.forbids_provisioning);
    let found = runtime.map_err(CheckError::Runtime)?.block_on(checking);
    let mut good = true;
    for (pool_id, finding) in found.map_err(|error| CheckError::Client(io::Error::other(error)))? {
        match finding {
            Finding::Ready => println!("good {pool_id}"),
            Finding::Fetched(what) => println!("good {pool_id}, once the node has fetched {what}"),
            Finding::Lacking(why) => {
                good = false;
                println!("BAD  {pool_id} {why}");
            }
        }
    }
    if file.pools.is_empty() {
        println!("{} has no pools", path.display());
    }
    Ok(good)
}
