//! What GPUs there are and how they are, through NVML when there is a driver.
//!
//! A missing driver is a value, not a crash: the node then has no GPU to show. All calls into
//! the driver are made by one thread that nobody joins, so a driver that hangs stalls nothing,
//! not even the end of the daemon; its devices are shown as unresponsive until it answers.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::event::EventSet;
use nvml_wrapper::{Device, Nvml};
use owned_tasks::Loops;
use pool_registry_types::node::{GpuCapability, GpuHealth, GpuReport};
use tokio::sync::mpsc;

/// How long the driver may take to say what devices there are. Drivers without persistence mode
/// take some seconds.
const INVENTORY_TIMEOUT: Duration = Duration::from_secs(10);

/// One look at one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GpuReading {
    pub device_id: u32,
    pub vram_used_bytes: u64,
    pub vram_total_bytes: u64,
    pub utilization_pct: Option<u32>,
    pub temperature_c: Option<u32>,
    /// Since the driver was loaded; absent where the device does not count.
    pub ecc_uncorrected: Option<u64>,
    /// Who holds memory, and how many bytes where the driver says so; absent where it does not list.
    pub processes: Option<Vec<(u32, Option<u64>)>>,
    pub health: GpuHealth,
    pub problem: Option<String>,
    /// Errors that the driver has told of the device since it was opened: Xid events, also those
    /// that programs cause, and uncorrected ECC errors. A reading without the device says 0.
    pub faults: u64,
}

/// What is asked about GPUs.
pub(crate) trait GpuProbe: Send {
    /// What the devices are; asked once.
    fn inventory(&self) -> Vec<GpuCapability>;

    /// Answers each question with how they are then, until nobody asks any more.
    fn serve(&mut self, questions: &Questions);
}

/// Who wants to know how the GPUs are.
#[derive(Debug)]
pub(crate) struct Questions {
    asked: Receiver<()>,
    answers: mpsc::Sender<Vec<GpuReading>>,
    /// A question that has no answer yet.
    is_open: Cell<bool>,
}

impl Questions {
    /// Waits for a question; false when there will be none.
    fn next(&self) -> bool {
        self.is_open.set(self.asked.recv().is_ok());
        self.is_open.get()
    }

    /// Whether anybody still listens.
    fn answer(&self, readings: Vec<GpuReading>) -> bool {
        self.is_open.set(false);
        self.answers.blocking_send(readings).is_ok()
    }
}

/// A machine without GPUs.
#[derive(Debug, Default, Clone)]
pub(crate) struct NoGpus;

impl GpuProbe for NoGpus {
    fn inventory(&self) -> Vec<GpuCapability> {
        Vec::new()
    }

    fn serve(&mut self, questions: &Questions) {
        while questions.next() && questions.answer(Vec::new()) {}
    }
}

/// NVIDIA's driver.
#[derive(Debug)]
pub(crate) struct NvmlGpus {
    lib: Option<PathBuf>,
    /// Absent while the driver is gone.
    nvml: Option<Nvml>,
    inventory: Vec<GpuCapability>,
}

fn open(lib: Option<&PathBuf>) -> Result<Nvml, NvmlError> {
    match lib {
        Some(path) => Nvml::builder().lib_path(path.as_os_str()).init(),
        None => Nvml::init(),
    }
}

/// Why no GPU is seen.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GpuError {
    /// It is not there, or cannot be started.
    #[error("no driver: {0}")]
    Driver(NvmlError),
    #[error("the driver does not tell its devices: {0}")]
    Devices(NvmlError),
}

impl NvmlGpus {
    /// Loads the driver's library, from `lib` or from where the system keeps it.
    pub(crate) fn load(lib: Option<PathBuf>) -> Result<Self, GpuError> {
        let nvml = open(lib.as_ref()).map_err(GpuError::Driver)?;
        let count = nvml.device_count().map_err(GpuError::Devices)?;
        let inventory = (0..count).filter_map(|n| capability(&nvml, n)).collect();
        Ok(Self { lib, nvml: Some(nvml), inventory })
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
        mig: device.mig_mode().ok().map(|mode| mode.current == 1),
    })
}

/// Whether the driver itself is gone, whatever device was asked for.
fn is_driver_gone(error: &NvmlError) -> bool {
    matches!(error, NvmlError::DriverNotLoaded | NvmlError::Uninitialized | NvmlError::LibRmVersionMismatch)
}

fn read(device: &Device<'_>, known: &GpuCapability) -> Result<GpuReading, NvmlError> {
    // Without its memory nothing can be decided about a device; all else may be missing. A
    // symbol that this driver lacks is no fault of the device.
    let (used, total, unknown) = match device.memory_info() {
        Ok(memory) => (memory.used, memory.total, None),
        Err(NvmlError::FailedToLoadSymbol(_) | NvmlError::NotSupported) => {
            (0, known.vram_total_bytes, Some("the driver does not tell the device's memory".to_owned()))
        }
        Err(error) => return Err(error),
    };
    let processes = device.running_compute_processes().ok().map(|all| {
        let bytes = |used| match used {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        };
        all.into_iter().map(|process| (process.pid, bytes(process.used_gpu_memory))).collect()
    });
    let ecc_uncorrected = device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile).ok();
    let pending = device.are_pages_pending_retired().unwrap_or(false);
    let problem = match ecc_uncorrected {
        Some(errors) if errors > 0 => {
            Some(format!("{errors} uncorrected ECC errors since the driver was loaded"))
        }
        _ if pending => Some("pages of its memory wait to be retired: reset the device".to_owned()),
        _ => None,
    };
    Ok(GpuReading {
        device_id: known.device_id,
        vram_used_bytes: used,
        vram_total_bytes: total,
        utilization_pct: device.utilization_rates().ok().map(|rates| rates.gpu),
        temperature_c: device.temperature(TemperatureSensor::Gpu).ok(),
        ecc_uncorrected,
        processes,
        health: if problem.is_some() { GpuHealth::Degraded } else { GpuHealth::Ok },
        problem: problem.or(unknown),
        faults: ecc_uncorrected.unwrap_or(0),
    })
}

/// A device that nothing is known of at the moment.
fn absent(known: &GpuCapability, health: GpuHealth, problem: String) -> GpuReading {
    GpuReading {
        device_id: known.device_id,
        // Nothing is free on it.
        vram_used_bytes: known.vram_total_bytes,
        vram_total_bytes: known.vram_total_bytes,
        utilization_pct: None,
        temperature_c: None,
        ecc_uncorrected: None,
        processes: None,
        health,
        problem: Some(problem),
        faults: 0,
    }
}

impl GpuProbe for NvmlGpus {
    fn inventory(&self) -> Vec<GpuCapability> {
        self.inventory.clone()
    }

    fn serve(&mut self, questions: &Questions) {
        let mut waiting = questions.next();
        while waiting {
            // A driver that was reloaded is seen again.
            let Some(nvml) = self.nvml.take().or_else(|| open(self.lib.as_ref()).ok()) else {
                let lost = |known| absent(known, GpuHealth::Lost, "the driver is not loaded".into());
                waiting = questions.answer(self.inventory.iter().map(lost).collect()) && questions.next();
                continue;
            };
            let mut faults = Faults::of(&nvml, &self.inventory);
            let mut gone = false;
            while waiting && !gone {
                let look = |known: &GpuCapability| {
                    let read = nvml.device_by_index(known.device_id).and_then(|device| read(&device, known));
                    let reading = read.unwrap_or_else(|error| {
                        gone |= is_driver_gone(&error);
                        absent(known, GpuHealth::Lost, error.to_string())
                    });
                    faults.add_to(reading)
                };
                let readings = self.inventory.iter().map(look).collect();
                waiting = questions.answer(readings) && questions.next();
            }
        }
    }
}

/// Errors that programs cause and that say nothing of the device. Source: NVIDIA's catalog of
/// Xid errors.
const XIDS_OF_PROGRAMS: [u64; 6] = [13, 31, 43, 45, 68, 109];

/// Events of one device that are taken at one look; what is left comes at the next.
const MOST_EVENTS: usize = 64;

/// The critical errors (Xid) that the driver has told of the devices since it was opened.
struct Faults<'n> {
    /// One set a device, so that an error is known to be its own.
    sets: BTreeMap<u32, EventSet<'n>>,
    last: BTreeMap<u32, u64>,
    /// Of every number.
    count: BTreeMap<u32, u64>,
}

impl<'n> Faults<'n> {
    /// Devices and drivers that tell no events are not listened to.
    fn of(nvml: &'n Nvml, inventory: &[GpuCapability]) -> Self {
        let set = |known: &GpuCapability| {
            let device = nvml.device_by_index(known.device_id).ok()?;
            let set = nvml.create_event_set().ok()?;
            let set = device.register_events(EventTypes::CRITICAL_XID_ERROR, set).ok()?;
            Some((known.device_id, set))
        };
        let sets = inventory.iter().filter_map(set).collect();
        Self { sets, last: BTreeMap::new(), count: BTreeMap::new() }
    }

    /// A device with such an error works on, and is shown as degraded until its driver is reloaded.
    fn add_to(&mut self, mut reading: GpuReading) -> GpuReading {
        let id = reading.device_id;
        if let Some(set) = self.sets.get(&id) {
            // Each wait brings one event, and none is waited for.
            for _ in 0..MOST_EVENTS {
                let Ok(event) = set.wait(0) else { break };
                let Some(xid) = event.event_data.map(number) else { continue };
                tracing::warn!(device_id = id, xid, "the driver reported a GPU error");
                *self.count.entry(id).or_default() += 1;
                if !XIDS_OF_PROGRAMS.contains(&xid) {
                    self.last.insert(id, xid);
                }
            }
        }
        reading.faults = reading.faults.saturating_add(self.count.get(&id).copied().unwrap_or(0));
        if let Some(xid) = self.last.get(&id)
            && reading.health == GpuHealth::Ok
        {
            reading.health = GpuHealth::Degraded;
            reading.problem = Some(format!("the driver has told the error Xid {xid} of it"));
        }
        reading
    }
}

fn number(xid: XidError) -> u64 {
    match xid {
        XidError::Value(xid) => xid,
        XidError::Unknown => 0,
    }
}

/// A reading as the node reports it. `is_ours` says whether a process is one of our engines';
/// what others hold is unaccounted.
pub(crate) fn report(reading: &GpuReading, is_ours: &dyn Fn(u32) -> bool) -> GpuReport {
    let strangers = reading.processes.as_ref().map(|all| {
        let theirs = all.iter().filter(|(pid, _)| !is_ours(*pid)).filter_map(|(_, bytes)| *bytes);
        theirs.fold(0_u64, u64::saturating_add)
    });
    GpuReport {
        device_id: reading.device_id,
        vram_used_bytes: reading.vram_used_bytes,
        vram_total_bytes: reading.vram_total_bytes,
        utilization_pct: reading.utilization_pct,
        temperature_c: reading.temperature_c,
        ecc_uncorrected: reading.ecc_uncorrected,
        unaccounted_vram_bytes: strangers,
        health: reading.health,
        problem: reading.problem.clone(),
    }
}

/// The thread that speaks to the driver, as the rest of the node sees it.
#[derive(Debug)]
pub struct GpuWatch {
    asks: SyncSender<()>,
    answers: mpsc::Receiver<Vec<GpuReading>>,
    inventory: Vec<GpuCapability>,
    last: Vec<GpuReading>,
    /// A look that has not come back.
    under_way: bool,
}

impl GpuWatch {
    /// Starts the thread, which is one of `loops`, and waits for what devices there are; a driver
    /// that does not say it in time is none, and the log says so.
    pub fn start(lib: Option<PathBuf>, loops: &Loops) -> Self {
        let open = move || -> Box<dyn GpuProbe> {
            match NvmlGpus::load(lib.clone()) {
                Ok(gpus) => Box::new(gpus),
                Err(reason) => {
                    tracing::info!(%reason, "no GPU seen");
                    Box::new(NoGpus)
                }
            }
        };
        Self::over(open, loops)
    }

    fn over(mut open: impl FnMut() -> Box<dyn GpuProbe> + Send + 'static, loops: &Loops) -> Self {
        let (asks, asked) = sync_channel(1);
        let (answer, answers) = mpsc::channel(1);
        let (send, inventory) = sync_channel(1);
        let questions = Questions { asked, answers: answer, is_open: Cell::new(false) };
        // Nobody joins it: it may never come back from the driver.
        let spawned = loops.thread("gpu watch", move || serve(&mut open, &send, &questions));
        let inventory: Vec<GpuCapability> = match spawned {
            Ok(()) => inventory.recv_timeout(INVENTORY_TIMEOUT).unwrap_or_else(|_| {
                tracing::error!(
                    seconds = INVENTORY_TIMEOUT.as_secs(),
                    "the GPU driver does not answer: this node has no GPU"
                );
                Vec::new()
            }),
            Err(error) => {
                tracing::error!(%error, "no thread for the GPU driver: this node has no GPU");
                Vec::new()
            }
        };
        if !inventory.is_empty() {
            tracing::info!(gpus = inventory.len(), "GPUs seen through NVML");
        }
        Self { asks, answers, inventory, last: Vec::new(), under_way: false }
    }

    pub fn inventory(&self) -> &[GpuCapability] {
        &self.inventory
    }

    /// One look. Where the driver does not answer in time its devices are unresponsive, with the
    /// memory that was seen last, and it is not asked again before it has answered.
    pub(crate) async fn look(&mut self, patience: Duration) -> Vec<GpuReading> {
        if !self.under_way {
            self.under_way = !matches!(self.asks.try_send(()), Err(TrySendError::Disconnected(())));
        }
        match tokio::time::timeout(patience, self.answers.recv()).await {
            Ok(Some(readings)) => {
                self.under_way = false;
                self.last.clone_from(&readings);
                readings
            }
            Ok(None) | Err(_) => self.inventory.iter().map(|known| self.unresponsive(known)).collect(),
        }
    }

    fn unresponsive(&self, known: &GpuCapability) -> GpuReading {
        let seen = self.last.iter().find(|reading| reading.device_id == known.device_id);
        let absent = absent(known, GpuHealth::Unresponsive, "the driver does not answer".into());
        match seen {
            Some(seen) => GpuReading { vram_used_bytes: seen.vram_used_bytes, ..absent },
            None => absent,
        }
    }
}

fn serve(
    open: &mut impl FnMut() -> Box<dyn GpuProbe>,
    send: &SyncSender<Vec<GpuCapability>>,
    questions: &Questions,
) {
    let mut probe = open();
    let inventory = probe.inventory();
    // A panic has left it without an answer, and nobody asks again before there is one.
    if questions.is_open.get() {
        let lost = |known| absent(known, GpuHealth::Lost, "a defect in its watch, see the log".into());
        questions.answer(inventory.iter().map(lost).collect());
    }
    // Whoever waited has it, or has given up.
    let _ = send.try_send(inventory);
    probe.serve(questions);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(processes: Option<Vec<(u32, Option<u64>)>>) -> GpuReading {
        let known = GpuCapability {
            device_id: 0,
            uuid: "GPU-1".into(),
            name: "fake".into(),
            vram_total_bytes: 1_000,
            compute_capability: "8.6".into(),
            mig: None,
        };
        GpuReading { processes, ..absent(&known, GpuHealth::Ok, String::new()) }
    }

    // CLOUD-2472
    #[test]
    fn memory_of_processes_that_are_not_ours_is_unaccounted() {
        let is_ours = |pid: u32| pid == 1;
        let all = vec![(1, Some(600)), (2, Some(100)), (3, Some(50)), (4, None)];
        assert_eq!(report(&reading(Some(all)), &is_ours).unaccounted_vram_bytes, Some(150));
        assert_eq!(report(&reading(Some(vec![])), &is_ours).unaccounted_vram_bytes, Some(0));
        assert_eq!(report(&reading(None), &is_ours).unaccounted_vram_bytes, None, "unknown is not zero");
    }

    struct Hanging(Receiver<()>);

    impl GpuProbe for Hanging {
        fn inventory(&self) -> Vec<GpuCapability> {
            let of = |reading: GpuReading| GpuCapability {
                device_id: reading.device_id,
                uuid: String::new(),
                name: String::new(),
                vram_total_bytes: 1_000,
                compute_capability: String::new(),
                mig: None,
            };
            vec![of(reading(None))]
        }

        fn serve(&mut self, questions: &Questions) {
            while questions.next() {
                let _ = self.0.recv();
                questions.answer(vec![GpuReading { vram_used_bytes: 7, ..reading(None) }]);
            }
        }
    }

    // CLOUD-2474
    #[tokio::test]
    async fn a_driver_that_hangs_is_unresponsive_until_it_answers() {
        let (release, held) = sync_channel(4);
        let mut held = Some(held);
        let open = move || -> Box<dyn GpuProbe> { Box::new(Hanging(held.take().expect("opened once"))) };
        let mut watch = GpuWatch::over(open, &Loops::default());
        let soon = Duration::from_millis(50);
        release.send(()).unwrap();
        assert_eq!(watch.look(Duration::from_secs(5)).await[0].health, GpuHealth::Ok);
        for _ in 0..3 {
            let hung = watch.look(soon).await;
            assert_eq!((hung[0].health, hung[0].vram_used_bytes), (GpuHealth::Unresponsive, 7));
        }
        release.send(()).unwrap();
        assert_eq!(
            watch.look(Duration::from_secs(5)).await[0].health,
            GpuHealth::Ok,
            "one look was under way, not four"
        );
        assert_eq!(watch.look(soon).await[0].health, GpuHealth::Unresponsive);
    }

    /// Panics at its first question.
    struct Breaking(bool);

    impl GpuProbe for Breaking {
        fn inventory(&self) -> Vec<GpuCapability> {
            Hanging(sync_channel(1).1).inventory()
        }

        fn serve(&mut self, questions: &Questions) {
            while questions.next() {
                assert!(self.0, "the first question");
                questions.answer(vec![reading(None)]);
            }
        }
    }

    // CLOUD-1145
    #[tokio::test]
    async fn a_watch_that_panics_shows_its_devices_as_lost_and_looks_again() {
        let mut again = false;
        let open = move || -> Box<dyn GpuProbe> { Box::new(Breaking(std::mem::replace(&mut again, true))) };
        let loops = Loops::default();
        let mut watch = GpuWatch::over(open, &loops);
        let patience = Duration::from_secs(30);
        let broken = watch.look(patience).await;
        assert_eq!(broken[0].health, GpuHealth::Lost, "{broken:?}");
        assert_eq!(watch.look(patience).await[0].health, GpuHealth::Ok);
        assert_eq!(loops.problem(), None, "it runs again");
    }
}
