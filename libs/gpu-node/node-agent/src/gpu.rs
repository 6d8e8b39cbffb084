//! What GPUs there are and how full they are, through NVML when there is a driver.
//!
//! A missing driver is a value, not a crash: the node then has no GPU to show. Looks run on a
//! thread of their own, one at a time, so a driver that hangs stalls nothing else.

use std::path::PathBuf;

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use pool_registry_types::node::{GpuCapability, GpuHealth, GpuReport};

/// What is asked about GPUs.
pub trait GpuProbe: Send + Sync + 'static {
    /// What the devices are; asked once.
    fn inventory(&self) -> Vec<GpuCapability>;

    /// How they are now.
    fn look(&self) -> Vec<GpuReport>;
}

/// A fixed answer: a machine without GPUs, or a test's.
#[derive(Debug, Default, Clone)]
pub struct FixedGpus {
    pub inventory: Vec<GpuCapability>,
    pub reports: Vec<GpuReport>,
}

impl GpuProbe for FixedGpus {
    fn inventory(&self) -> Vec<GpuCapability> {
        self.inventory.clone()
    }

    fn look(&self) -> Vec<GpuReport> {
        self.reports.clone()
    }
}

/// NVIDIA's driver.
#[derive(Debug)]
pub struct NvmlGpus {
    nvml: Nvml,
    inventory: Vec<GpuCapability>,
}

impl NvmlGpus {
    /// Loads the driver's library, from `lib` or from where the system keeps it.
    pub fn load(lib: Option<PathBuf>) -> Result<Self, String> {
        let nvml = match &lib {
            Some(path) => Nvml::builder().lib_path(path.as_os_str()).init(),
            None => Nvml::init(),
        };
        let nvml = nvml.map_err(|error| error.to_string())?;
        let count = nvml.device_count().map_err(|error| error.to_string())?;
        let inventory = (0..count).filter_map(|n| capability(&nvml, n)).collect();
        Ok(Self { nvml, inventory })
    }
}

fn capability(nvml: &Nvml, n: u32) -> Option<GpuCapability> {
    let device = nvml.device_by_index(n).ok()?;
    let compute = device.cuda_compute_capability().ok();
    Some(GpuCapability {
        device_id: n,
        uuid: device.uuid().unwrap_or_default(),
        name: device.name().unwrap_or_default(),
        vram_total_bytes: device.memory_info().map(|m| m.total).unwrap_or_default(),
        compute_capability: compute.map(|c| format!("{}.{}", c.major, c.minor)).unwrap_or_default(),
    })
}

impl GpuProbe for NvmlGpus {
    fn inventory(&self) -> Vec<GpuCapability> {
        self.inventory.clone()
    }

    fn look(&self) -> Vec<GpuReport> {
        let look = |known: &GpuCapability| {
            let device = self.nvml.device_by_index(known.device_id).ok();
            let memory = device.as_ref().and_then(|d| d.memory_info().ok());
            GpuReport {
                device_id: known.device_id,
                vram_used_bytes: memory.as_ref().map_or(known.vram_total_bytes, |m| m.used),
                vram_total_bytes: known.vram_total_bytes,
                utilization_pct: device.as_ref().and_then(|d| d.utilization_rates().ok()).map(|u| u.gpu),
                temperature_c: device.as_ref().and_then(|d| d.temperature(TemperatureSensor::Gpu).ok()),
                health: if memory.is_some() { GpuHealth::Ok } else { GpuHealth::Lost },
            }
        };
        self.inventory.iter().map(look).collect()
    }
}

/// The machine's GPUs; without a driver, none, and the log says so once.
pub fn detect(lib: Option<PathBuf>) -> Box<dyn GpuProbe> {
    match NvmlGpus::load(lib) {
        Ok(gpus) => {
            tracing::info!(gpus = gpus.inventory.len(), "GPUs seen through NVML");
            Box::new(gpus)
        }
        Err(reason) => {
            tracing::info!(reason, "no GPU seen");
            Box::new(FixedGpus::default())
        }
    }
}
