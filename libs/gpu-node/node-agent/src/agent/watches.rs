//! What is looked at again and again: the GPUs, and the folder of models.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use owned_tasks::blocking;
use pool_registry_types::node::{GpuHealth, GpuReport};

use super::Agent;
use crate::gpu::{self, GpuWatch};
use crate::guard::processes;
use crate::models::Models;

/// Pause between two looks at the GPUs.
const LOOK_AT_GPUS_EVERY: Duration = Duration::from_secs(5);
/// The same on a machine without any, where no engine is to have one: a driver may come later.
const LOOK_FOR_GPUS_EVERY: Duration = Duration::from_secs(30);
/// How long one of them may take.
const GPU_PATIENCE: Duration = Duration::from_secs(3);
/// Pause between two looks at the folder of models.
const LOOK_AT_MODELS_EVERY: Duration = Duration::from_secs(2);

impl Agent {
    /// Looks at the GPUs until the agent stops.
    pub fn watch_gpus(self: &Arc<Self>, watch: GpuWatch) {
        let (agent, watch) = (Arc::clone(self), Arc::new(tokio::sync::Mutex::new(watch)));
        let make = move || Arc::clone(&agent).run_gpu_watch(Arc::clone(&watch));
        self.loops.start(&self.tracker, "GPUs", &self.stop, make);
    }

    async fn run_gpu_watch(self: Arc<Self>, watch: Arc<tokio::sync::Mutex<GpuWatch>>) {
        let mut watch = watch.lock().await;
        let mut healths = BTreeMap::new();
        loop {
            let readings = tokio::select! {
                () = self.stop.cancelled() => return,
                readings = watch.look(GPU_PATIENCE) => readings,
            };
            let engines: Vec<u32> =
                self.replicas.lock().values().filter_map(|watched| watched.handoff.pid).collect();
            let is_ours = |pid: u32| processes::belongs_to(pid, &engines);
            let expected = self.expected_gpus.lock().clone();
            let unseen = expected.iter().filter(|id| readings.iter().all(|of| of.device_id != **id));
            let gpus: Vec<GpuReport> = readings
                .iter()
                .map(|reading| gpu::report(reading, &is_ours))
                .chain(unseen.map(|device_id| gpu::unseen(*device_id)))
                .collect();
            let is_idle = gpus.is_empty();
            for gpu in &gpus {
                let before = healths.insert(gpu.device_id, gpu.health);
                if before.unwrap_or(GpuHealth::Ok) != gpu.health {
                    let problem = gpu.problem.as_deref().unwrap_or("none");
                    tracing::warn!(device_id = gpu.device_id, health = ?gpu.health, problem, "the health of a GPU has changed");
                }
            }
            *self.gpu_faults.lock() =
                readings.iter().map(|reading| (reading.device_id, reading.faults)).collect();
            let found = watch.inventory().to_vec();
            self.change(|core, now| core.gpus_found(now, found));
            self.gpus_observed(gpus);
            self.notify_work_ended();
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.look_at_gpus.notified() => {}
                () = tokio::time::sleep(if is_idle { LOOK_FOR_GPUS_EVERY } else { LOOK_AT_GPUS_EVERY }) => {}
            }
        }
    }

    /// Looks at the folder of models until the agent stops, each look on a blocking thread.
    pub fn watch_models(self: &Arc<Self>, folder: PathBuf) {
        let (agent, models) = (Arc::clone(self), Models::new(folder));
        let make = move || Arc::clone(&agent).run_models_watch(models.clone());
        self.loops.start(&self.tracker, "models", &self.stop, make);
    }

    async fn run_models_watch(self: Arc<Self>, models: Models) {
        let mut problem = None;
        loop {
            let looking = models.clone();
            let looked = tokio::select! {
                () = self.stop.cancelled() => return,
                looked = blocking("folder of models", move || looking.report()) => looked,
            };
            match looked.unwrap_or_else(|panicked| panicked.resume()) {
                Ok(found) => {
                    problem = None;
                    self.change(|core, now| core.models_observed(now, found));
                }
                // What was seen last stands: a share that is away for a moment has not lost its models.
                Err(error) => {
                    let reported = problem.replace(error.to_string());
                    if reported != problem {
                        tracing::warn!(%error, "the folder of models cannot be read");
                    }
                }
            }
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(LOOK_AT_MODELS_EVERY) => {}
            }
        }
    }

    fn gpus_observed(&self, gpus: Vec<GpuReport>) {
        self.change(|core, now| core.gpus_observed(now, gpus));
    }
}
