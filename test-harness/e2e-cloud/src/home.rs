//! The home profile: one daemon, and an engine that it finds through its handoff file.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::cluster::{Engine, start_engine};
use crate::process::{free_port, program};
use crate::{Client, Process, eventually};

/// How long the daemon may take to stop, and a model to be found.
const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon of the home profile, open on loopback, and one engine.
#[derive(Debug)]
pub struct Home {
    pub client: Client,
    pub daemon: Process,
    pub engine: Option<Process>,
    /// Where handoff files are.
    pub runtime_dir: PathBuf,
    spec: Engine,
    dir: TempDir,
}

impl Home {
    /// Starts the daemon with these settings beside its own, then the engine, and waits until the
    /// engine's model can be asked for.
    pub async fn start(spec: Engine, settings: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let runtime_dir = dir.path().join("engines");
        let address = format!("127.0.0.1:{}", free_port());
        let mut command = Command::new(program("orchestratord"));
        command
            .env("ORCHESTRATORD_ADDR", &address)
            .env("ORCHESTRATORD_RUNTIME_DIR", &runtime_dir)
            .env("ORCHESTRATORD_DATA_DIR", dir.path().join("data"))
            .env("ORCHESTRATORD_MODELS_DIR", dir.path().join("models"))
            .envs(settings.iter().copied());
        let daemon = Process::start(command, &dir.path().join("orchestratord.log"));
        let client = Client::new(&format!("http://{address}"), None);
        let mut home = Self { client, daemon, engine: None, runtime_dir, spec, dir };
        home.start_engine();
        eventually("the model can be asked for", PATIENCE, || async {
            let models = home.client.get_json("/v2/catalog/availability").await?;
            (models["models"][0]["model_id"] == home.spec.model()).then_some(())
        })
        .await;
        home
    }

    /// Starts the engine, or another one in its place.
    pub fn start_engine(&mut self) {
        self.engine = start_engine(&self.spec, &self.runtime_dir, &self.dir.path().join("engine.log"));
    }

    /// Where what outlives the daemon is.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn log(&self) -> PathBuf {
        self.dir.path().join("orchestratord.log")
    }

    /// Asks the daemon to end, which it does in order.
    pub async fn stop(mut self) {
        self.daemon.signal(Signal::SIGTERM);
        let status = tokio::task::block_in_place(|| self.daemon.wait(PATIENCE));
        assert!(status.success(), "{}", self.daemon.log());
    }
}
