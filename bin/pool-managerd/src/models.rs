//! `pool-managerd models …`: staging by hand, beside a running daemon or without one.

#![expect(clippy::print_stdout, reason = "a command says what it did")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;
use node_agent::models::{ModelError, Models, Staged};
use pool_registry_types::{Digest, ModelRef};

/// What is done with the models on this node's disk.
#[derive(Debug, Subcommand)]
pub(crate) enum Order {
    /// Copy a file in, verify it, and show it to the cluster. An interrupted copy goes on.
    Stage {
        /// The name by which tasks ask for it.
        model: ModelRef,
        /// The file, also on a mounted share.
        source: PathBuf,
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
}

pub(crate) fn run(order: &Order, folder: &Path) -> ExitCode {
    let models = Models::new(folder);
    let done = match order {
        Order::Stage { model, source, digest } => stage(&models, model, source, digest.as_ref()),
        Order::List => list(&models),
        Order::Verify { model } => verify(&models, model.as_ref()),
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

fn stage(
    models: &Models,
    model: &ModelRef,
    source: &Path,
    digest: Option<&Digest>,
) -> Result<bool, ModelError> {
    let mut said = 0;
    let mut progress = |done: u64, all: u64| {
        let tenths = done * 10 / all.max(1);
        if tenths > said {
            said = tenths;
            println!("{done} of {all} bytes");
        }
    };
    let manifest = match models.stage(model, source, digest, &mut progress)? {
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

fn list(models: &Models) -> Result<bool, ModelError> {
    for manifest in models.list()? {
        println!("{} {} {} bytes", manifest.model_id, manifest.digest, manifest.bytes);
    }
    Ok(true)
}

fn verify(models: &Models, model: Option<&ModelRef>) -> Result<bool, ModelError> {
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
