//! What GPUs there are and how they are, through NVML when there is a driver.
//!
//! A missing driver is a value, not a crash: the node then has no GPU to show. It is looked for again at each
//! look: a driver may come after the daemon, a GPU be away at the start, an instance be made. All calls into
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
use pool_registry_types::node::{GpuCapability, GpuHealth, GpuMemory, GpuReport};
use tokio::sync::mpsc;

use crate::machine;

/// How long the driver may take to say what devices there are. Drivers without persistence mode
/// take some seconds.
const INVENTORY_TIMEOUT: Duration = Duration::from_secs(10);

/// One look at one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GpuReading {
    pub device_id: u32,
    pub uuid: String,
    /// What the two figures are of.
    pub memory: GpuMemory,
    pub vram_used_bytes: u64,
    pub vram_total_bytes: u64,
    pub utilization_pct: Option<u32>,
    pub temperature_c: Option<u32>,
    pub power_mw: Option<u32>,
    pub energy_mj: Option<u64>,
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

/// One look at all devices.
#[derive(Debug, Clone, Default)]
pub(crate) struct Look {
    /// What they are, those that are lost too.
    pub inventory: Vec<GpuCapability>,
    pub readings: Vec<GpuReading>,
}

/// What is asked about GPUs.
pub(crate) trait GpuProbe: Send {
    /// What the devices are at the start.
    fn inventory(&self) -> Vec<GpuCapability>;

    /// Answers each question with how they are then, until nobody asks any more.
    fn serve(&mut self, questions: &Questions);
}

/// Who wants to know how the GPUs are.
#[derive(Debug)]
pub(crate) struct Questions {
    asked: Receiver<()>,
    answers: mpsc::Sender<Look>,
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
    fn answer(&self, look: Look) -> bool {
        self.is_open.set(false);
        self.answers.blocking_send(look).is_ok()
    }
}

/// NVIDIA's driver.
#[derive(Debug)]
pub(crate) struct NvmlGpus {
    lib: Option<PathBuf>,
    /// Absent while the driver is not there.
    nvml: Option<Nvml>,
    /// Every device that was seen, by its number.
    known: BTreeMap<u32, GpuCapability>,
}

fn open(lib: Option<&PathBuf>) -> Result<Nvml, NvmlError> {
    match lib {
        Some(path) => Nvml::builder().lib_path(path.as_os_str()).init(),
        None => Nvml::init(),
    }
}

impl NvmlGpus {
    /// Loads the driver's library, from `lib` or from where the system keeps it.
    pub(crate) fn load(lib: Option<PathBuf>) -> Self {
        let mut own = Self { lib, nvml: None, known: BTreeMap::new() };
        match open(own.lib.as_ref()) {
            Ok(nvml) => {
                own.survey(&nvml);
                own.nvml = Some(nvml);
            }
            Err(reason) => tracing::info!(%reason, "no GPU driver; it is looked for again"),
        }
        own
    }

    /// Takes in what devices there are now. One that was there and is not stays known, and is lost; an
    /// instance that was taken apart is gone.
    fn survey(&mut self, nvml: &Nvml) {
        // It says nothing of those that are known.
        let Ok(count) = nvml.device_count() else { return };
        let mut instances = Vec::new();
        for n in 0..count.min(FIRST_INSTANCE) {
            let Ok(device) = nvml.device_by_index(n) else { continue };
            self.take(n, &device);
            if self.known.get(&n).is_some_and(|known| known.mig == Some(true)) {
                let most = device.mig_device_count().unwrap_or(0).min(FIRST_INSTANCE);
                for instance in 0..most {
                    if let Ok(instance_device) = device.mig_device_by_index(instance) {
                        let id = FIRST_INSTANCE * (n + 1) + instance;
                        self.take(id, &instance_device);
                        instances.push(id);
                    }
                }
            }
        }
        // Of a GPU that is lost its instances are lost too.
        let is_there = |n: u32| n < count && nvml.device_by_index(n).is_ok();
        self.known.retain(|id, _| {
            *id < FIRST_INSTANCE || instances.contains(id) || !is_there(id / FIRST_INSTANCE - 1)
        });
    }

    fn take(&mut self, id: u32, device: &Device<'_>) {
        let known = self.known.get(&id);
        // A device that fails such questions is sick, and who it is stays as it was.
        let (uuid, mig) = match (answered(device.uuid()), answered(device.mig_mode())) {
            (Ok(uuid), Ok(mig)) => (uuid.unwrap_or_default(), mig.map(|mode| mode.current == 1)),
            _ if known.is_some() => return,
            (uuid, _) => (uuid.ok().flatten().unwrap_or_default(), None),
        };
        if known.is_none_or(|known| (&known.uuid, known.mig) != (&uuid, mig)) {
            let capability = capability(id, uuid, mig, device);
            tracing::info!(device_id = id, uuid = capability.uuid, name = capability.name, "a GPU is seen");
            self.known.insert(id, capability);
        }
    }
}

/// What the driver says; nothing where it has no answer to the question. Errors: it is at fault, or the device.
fn answered<T>(answer: Result<T, NvmlError>) -> Result<Option<T>, NvmlError> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(NvmlError::NotSupported | NvmlError::NoPermission | NvmlError::FailedToLoadSymbol(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Instances of the first GPU are numbered from here on, those of the second from twice as much.
const FIRST_INSTANCE: u32 = 1_000;

/// The device of that number, which may be an instance of one.
fn device_of(nvml: &Nvml, id: u32) -> Result<Device<'_>, NvmlError> {
    match (id / FIRST_INSTANCE).checked_sub(1) {
        None => nvml.device_by_index(id),
        Some(parent) => nvml.device_by_index(parent)?.mig_device_by_index(id % FIRST_INSTANCE),
    }
}

fn capability(id: u32, uuid: String, mig: Option<bool>, device: &Device<'_>) -> GpuCapability {
    let compute = device.cuda_compute_capability().ok();
    let memory = device.memory_info().map(|memory| memory.total);
    GpuCapability {
        device_id: id,
        uuid,
        name: device.name().unwrap_or_default(),
        vram_total_bytes: match memory {
            Ok(total) => total,
            Err(error) if unreported(&error, mig) == Some(GpuMemory::Shared) => {
                machine::memory().map_or(0, |(total, _)| total)
            }
            Err(_) => 0,
        },
        compute_capability: compute.map(|c| format!("{}.{}", c.major, c.minor)).unwrap_or_default(),
        mig,
    }
}

/// What it means that a device's memory is not told; nothing where the device is at fault. Devices without
/// memory of their own (GB10, Jetson) do not support the question, and of a GPU that is split into instances
/// only these are ours to see.
fn unreported(error: &NvmlError, mig: Option<bool>) -> Option<GpuMemory> {
    match error {
        NvmlError::NotSupported if mig != Some(true) => Some(GpuMemory::Shared),
        NvmlError::NotSupported | NvmlError::NoPermission | NvmlError::FailedToLoadSymbol(_) => {
            Some(GpuMemory::Unknown)
        }
        _ => None,
    }
}

/// Whether the driver itself is gone, whatever device was asked for.
fn is_driver_gone(error: &NvmlError) -> bool {
    matches!(error, NvmlError::DriverNotLoaded | NvmlError::Uninitialized | NvmlError::LibRmVersionMismatch)
}

fn read(device: &Device<'_>, known: &GpuCapability) -> Result<GpuReading, NvmlError> {
    let (memory, used, total) = match device.memory_info() {
        Ok(memory) => (GpuMemory::Own, memory.used, memory.total),
        Err(error) => match unreported(&error, known.mig).ok_or(error)? {
            GpuMemory::Shared => {
                let (total, free) = machine::memory().unwrap_or_default();
                (GpuMemory::Shared, total.saturating_sub(free.unwrap_or(total)), total)
            }
            _ => (GpuMemory::Unknown, 0, 0),
        },
    };
    let unknown = match memory {
        GpuMemory::Own => None,
        GpuMemory::Shared => {
            Some("it has the machine's memory, which is the limit of its engines".to_owned())
        }
        GpuMemory::Unknown => {
            Some("the driver does not tell the device's memory: engines start without a check".to_owned())
        }
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
        uuid: known.uuid.clone(),
        memory,
        vram_used_bytes: used,
        vram_total_bytes: total,
        utilization_pct: device.utilization_rates().ok().map(|rates| rates.gpu),
        temperature_c: device.temperature(TemperatureSensor::Gpu).ok(),
        power_mw: device.power_usage().ok(),
        energy_mj: device.total_energy_consumption().ok(),
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
        uuid: known.uuid.clone(),
        memory: if known.vram_total_bytes > 0 { GpuMemory::Own } else { GpuMemory::Unknown },
        // Nothing is free on it.
        vram_used_bytes: known.vram_total_bytes,
        vram_total_bytes: known.vram_total_bytes,
        utilization_pct: None,
        temperature_c: None,
        power_mw: None,
        energy_mj: None,
        ecc_uncorrected: None,
        processes: None,
        health,
        problem: Some(problem),
        faults: 0,
    }
}

impl GpuProbe for NvmlGpus {
    fn inventory(&self) -> Vec<GpuCapability> {
        self.known.values().cloned().collect()
    }

    fn serve(&mut self, questions: &Questions) {
        let mut waiting = questions.next();
        while waiting {
            // A driver that came, or was reloaded, is seen.
            let Some(nvml) = self.nvml.take().or_else(|| open(self.lib.as_ref()).ok()) else {
                let lost = |known| absent(known, GpuHealth::Lost, "the driver is not loaded".into());
                let readings = self.known.values().map(lost).collect();
                let look = Look { inventory: self.inventory(), readings };
                waiting = questions.answer(look) && questions.next();
                continue;
            };
            let mut faults = Faults::default();
            let mut gone = false;
            while waiting && !gone {
                self.survey(&nvml);
                let look = |known: &GpuCapability| {
                    faults.listen(&nvml, known);
                    let read = device_of(&nvml, known.device_id).and_then(|device| read(&device, known));
                    let reading = read.unwrap_or_else(|error| {
                        gone |= is_driver_gone(&error);
                        absent(known, GpuHealth::Lost, error.to_string())
                    });
                    faults.add_to(reading)
                };
                let readings = self.known.values().map(look).collect();
                let look = Look { inventory: self.inventory(), readings };
                waiting = questions.answer(look) && questions.next();
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
#[derive(Default)]
struct Faults<'n> {
    /// One set a device, so that an error is known to be its own.
    sets: BTreeMap<u32, EventSet<'n>>,
    last: BTreeMap<u32, u64>,
    /// Of every number.
    count: BTreeMap<u32, u64>,
}

impl<'n> Faults<'n> {
    /// Devices and drivers that tell no events are not listened to; those of an instance are its GPU's.
    fn listen(&mut self, nvml: &'n Nvml, known: &GpuCapability) {
        if known.device_id >= FIRST_INSTANCE || self.sets.contains_key(&known.device_id) {
            return;
        }
        let listen = || {
            let device = nvml.device_by_index(known.device_id).ok()?;
            let set = nvml.create_event_set().ok()?;
            device.register_events(EventTypes::CRITICAL_XID_ERROR, set).ok()
        };
        if let Some(set) = listen() {
            self.sets.insert(known.device_id, set);
        }
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
        // What happens to a GPU happens to its instances.
        let of = (id / FIRST_INSTANCE).checked_sub(1).unwrap_or(id);
        reading.faults = reading.faults.saturating_add(self.count.get(&of).copied().unwrap_or(0));
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
        uuid: Some(reading.uuid.clone()).filter(|uuid| !uuid.is_empty()),
        memory: reading.memory,
        vram_used_bytes: reading.vram_used_bytes,
        vram_total_bytes: reading.vram_total_bytes,
        utilization_pct: reading.utilization_pct,
        temperature_c: reading.temperature_c,
        power_mw: reading.power_mw,
        energy_mj: reading.energy_mj,
        ecc_uncorrected: reading.ecc_uncorrected,
        unaccounted_vram_bytes: strangers,
        health: reading.health,
        problem: reading.problem.clone(),
    }
}

/// Whether anybody has seen it: [`unseen`] says of others that they are not there.
pub(crate) fn is_seen(gpu: &GpuReport) -> bool {
    *gpu != unseen(gpu.device_id)
}

/// A GPU that engines are to have and that nobody has seen.
pub(crate) fn unseen(device_id: u32) -> GpuReport {
    GpuReport {
        device_id,
        uuid: None,
        memory: GpuMemory::Unknown,
        vram_used_bytes: 0,
        vram_total_bytes: 0,
        utilization_pct: None,
        temperature_c: None,
        power_mw: None,
        energy_mj: None,
        ecc_uncorrected: None,
        unaccounted_vram_bytes: None,
        health: GpuHealth::Lost,
        problem: Some("no such GPU is seen, and the file of pools names it".into()),
    }
}

/// The thread that speaks to the driver, as the rest of the node sees it.
#[derive(Debug)]
pub struct GpuWatch {
    asks: SyncSender<()>,
    answers: mpsc::Receiver<Look>,
    inventory: Vec<GpuCapability>,
    last: Vec<GpuReading>,
    /// A look that has not come back.
    under_way: bool,
}

impl GpuWatch {
    /// Starts the thread, which is one of `loops`, and waits for what devices there are; a driver
    /// that does not say it in time is none, and the log says so.
    pub fn start(lib: Option<PathBuf>, loops: &Loops) -> Self {
        let open = move || -> Box<dyn GpuProbe> { Box::new(NvmlGpus::load(lib.clone())) };
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
                    "the GPU driver does not answer: this node has no GPU until it does"
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
            Ok(Some(Look { inventory, readings })) => {
                self.under_way = false;
                self.inventory = inventory;
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
            Some(seen) => GpuReading {
                memory: seen.memory,
                vram_used_bytes: seen.vram_used_bytes,
                vram_total_bytes: seen.vram_total_bytes,
                ..absent
            },
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
        let readings = inventory.iter().map(lost).collect();
        questions.answer(Look { inventory: inventory.clone(), readings });
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
                let readings = vec![GpuReading { vram_used_bytes: 7, ..reading(None) }];
                questions.answer(Look { inventory: self.inventory(), readings });
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
                questions.answer(Look { inventory: self.inventory(), readings: vec![reading(None)] });
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
