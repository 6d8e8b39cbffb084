//! `pool-managerd models …`: staging by hand, beside a running daemon or without one.

#![expect(clippy::print_stdout, reason = "a command says what it did")]

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
pub(crate) use node_agent::download::Hub;
use node_agent::models::{ModelError, Models, Staged, projector_name};
use node_agent::pools_file::{PoolsFile, PoolsFileError};
use node_agent::source::{BadSource, ModelSource};
use pool_registry_types::{Digest, ModelRef, PoolId};

use crate::progress::Progress;

/// Between two looks at a model that another process stages.
const BUSY_PAUSE: Duration = Duration::from_secs(1);

/// What is done with the models on this node's disk.
#[derive(Debug, Subcommand)]
pub(crate) enum Order {
    /// Copy a file in, or download it, verify it, and show it to the cluster. What was
    /// interrupted goes on.
    Stage {
        /// The name by which tasks ask for it.
        model: ModelRef,
        /// A file, also on a mounted share; https://…, hf:org/repo or hf:org/repo/file.gguf. Of a model in
        /// several files any of them.
        source: String,
        /// What its content must be: sha256:…
        #[arg(long)]
        digest: Option<Digest>,
    },
    /// The models that are whole.
    List,
    /// Read models and compare them with what they were when they were staged.
    Verify {
        /// All of them when absent.
        model: Option<ModelRef>,
    },
    /// Remove a model that no pool of the file of pools has.
    Remove {
        /// The name that it was staged under.
        model: ModelRef,
    },
}

/// `pools`: the file of pools, where there is one.
pub(crate) fn run(order: &Order, folder: &Path, hub: &Hub<'_>, pools: Option<&Path>) -> ExitCode {
    let models = Models::new(folder);
    let done = match order {
        Order::Stage { model, source, digest } => stage(&models, model, source, digest.as_ref(), hub),
        Order::List => list(&models),
        Order::Verify { model } => verify(&models, model.as_ref()),
        Order::Remove { model } => remove(&models, model, pools),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            daemon_kit::telemetry::say_fatal(&error);
            ExitCode::FAILURE
        }
    }
}

/// Why a chore was not done.
#[derive(Debug, thiserror::Error)]
enum ChoreError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Source(#[from] BadSource),
    #[error("the HTTP client cannot be made")]
    Client(#[source] io::Error),
    #[error(transparent)]
    PoolsFile(#[from] PoolsFileError),
    #[error("{model} is the model of pool {pool_id} in {}: take it out of there first", pools.display())]
    InUse { model: ModelRef, pool_id: PoolId, pools: PathBuf },
}

fn stage(
    models: &Models,
    model: &ModelRef,
    source: &str,
    digest: Option<&Digest>,
    hub: &Hub<'_>,
) -> Result<bool, ChoreError> {
    let mut progress = Progress::new();
    let source = ModelSource::parse(source)?;
    let staged = loop {
        let staged = match &source {
            ModelSource::File(path) => {
                models.stage(model, path, digest, &mut |done, all| progress.show(done, Some(all)))
            }
            remote => fetch(models, model, remote, digest, hub, &mut progress)?,
        };
        match staged {
            Err(ModelError::Busy(_)) => {
                let (done, all) = models.under_way(model);
                progress.show(done, all);
                std::thread::sleep(BUSY_PAUSE);
            }
            staged => break staged,
        }
    };
    progress.end();
    let staged = staged?;
    let manifest = match staged {
        Staged::Copied { manifest, resumed_at } => {
            if resumed_at > 0 {
                println!("went on at byte {resumed_at}");
            }
            manifest
        }
        Staged::WasHere(manifest) => {
            println!("was here already");
            manifest
        }
    };
    println!("{} {} {} bytes", manifest.model_id, manifest.digest, manifest.bytes);
    Ok(true)
}

fn fetch(
    models: &Models,
    model: &ModelRef,
    remote: &ModelSource,
    digest: Option<&Digest>,
    hub: &Hub<'_>,
    progress: &mut Progress,
) -> Result<Result<Staged, ModelError>, ChoreError> {
    // Only the first installation in a process can fail, and then there is one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(ChoreError::Client)?;
    let client = node_agent::download::client().map_err(io::Error::other);
    let client = client.map_err(ChoreError::Client)?;
    let mut reported = |done: u64, all: Option<u64>| progress.show(done, all);
    Ok(runtime.block_on(models.fetch(model, remote, digest, &client, hub, &mut reported)))
}

fn remove(models: &Models, model: &ModelRef, pools: Option<&Path>) -> Result<bool, ChoreError> {
    if let Some(pools) = pools {
        let file = PoolsFile::read(pools)?;
        let has = |of: &ModelRef| {
            let mmproj = file.models.get(of).and_then(|of| of.mmproj.as_deref());
            of == model || mmproj.is_some_and(|source| projector_name(of, source) == *model)
        };
        let user = file.pools.iter().find(|(_, pool)| has(&pool.model));
        if let Some((pool_id, _)) = user {
            let (model, pool_id, pools) = (model.clone(), pool_id.clone(), pools.to_owned());
            return Err(ChoreError::InUse { model, pool_id, pools });
        }
    }
    let staged = models.list()?.into_iter().find(|manifest| manifest.model_id == *model);
    models.remove(model)?;
    match &staged {
        Some(manifest) => println!("removed {model} {} {} bytes", manifest.digest, manifest.bytes),
        None => println!("{model} is not staged; what an interrupted copy of it had left is gone"),
    }
    Ok(true)
}

fn list(models: &Models) -> Result<bool, ChoreError> {
    for manifest in models.list()? {
        println!("{} {} {} bytes", manifest.model_id, manifest.digest, manifest.bytes);
    }
    Ok(true)
}

fn verify(models: &Models, model: Option<&ModelRef>) -> Result<bool, ChoreError> {
    let wanted = match model {
        Some(model) => vec![model.clone()],
        None => models.list()?.into_iter().map(|manifest| manifest.model_id).collect(),
    };
    let mut good = true;
    for model in wanted {
        match models.verify(&model) {
            Ok(manifest) => println!("good {model} {}", manifest.digest),
            Err(error) => {
                good = false;
                println!("BAD  {model} {error}");
            }
        }
    }
    Ok(good)
}
