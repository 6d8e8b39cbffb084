//! A fake of NVIDIA's management library: two GPUs, or what a script says, through the calls
//! that the node makes. It is loaded as the real one is, so the node's own path runs.
//!
//! The script is a JSON file, named in `FAKE_NVML_SCRIPT` and read at every call. It stands
//! beside the real library, never instead of it. Source of names, numbers and layouts: nvml.h.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};

use serde::Deserialize;

const SUCCESS: c_uint = 0;
const TIMEOUT: c_uint = 10;
const XID_CRITICAL_ERROR: c_ulonglong = 8;
const INVALID_ARGUMENT: c_uint = 2;
const NOT_SUPPORTED: c_uint = 3;
const NO_PERMISSION: c_uint = 4;
const NOT_FOUND: c_uint = 6;
const INSUFFICIENT_SIZE: c_uint = 7;
const DRIVER_NOT_LOADED: c_uint = 9;
const GPU_IS_LOST: c_uint = 15;

const GIB: u64 = 1024 * 1024 * 1024;

#[derive(Deserialize, Clone, Copy, PartialEq, Default)]
#[serde(rename_all = "snake_case")]
enum State {
    #[default]
    Ok,
    Lost,
    /// Calls do not come back while it is set.
    Hang,
}

#[derive(Deserialize, Clone, Copy, PartialEq, Default)]
#[serde(rename_all = "snake_case")]
enum Answer {
    #[default]
    Amount,
    /// As GPUs answer that have the machine's memory.
    NotSupported,
    /// As a GPU answers that is split into instances.
    NoPermission,
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Script {
    driver: State,
    gpus: Vec<Gpu>,
}

#[derive(Deserialize, Clone)]
#[serde(default, deny_unknown_fields)]
struct Gpu {
    name: String,
    total: u64,
    used: u64,
    utilization: u32,
    temperature: u32,
    /// Milliwatts and millijoules.
    power: u32,
    energy: u64,
    compute: (i32, i32),
    /// Absent: the device does not count.
    ecc_uncorrected: Option<u64>,
    processes: Vec<(u32, u64)>,
    state: State,
    mig: bool,
    /// Absent: made of its number.
    uuid: Option<String>,
    memory: Answer,
    /// What it is split into.
    instances: Vec<Gpu>,
    /// Errors that are told once each, in this order.
    xids: Vec<u64>,
}

impl Default for Gpu {
    fn default() -> Self {
        Self {
            name: "Fake RTX 3090".into(),
            total: 24 * GIB,
            used: GIB,
            utilization: 37,
            temperature: 61,
            power: 123_000,
            energy: 4_500_000,
            compute: (8, 6),
            ecc_uncorrected: None,
            processes: Vec::new(),
            state: State::Ok,
            mig: false,
            uuid: None,
            memory: Answer::Amount,
            instances: Vec::new(),
            xids: Vec::new(),
        }
    }
}

impl Default for Script {
    fn default() -> Self {
        Self { driver: State::Ok, gpus: vec![Gpu::default(), Gpu::default()] }
    }
}

/// The script as it stands. A test writes it whole, by a rename; without one there are two GPUs.
fn script() -> Script {
    let Some(path) = std::env::var_os("FAKE_NVML_SCRIPT") else { return Script::default() };
    let Ok(text) = std::fs::read(&path) else { return Script::default() };
    serde_json::from_slice(&text).expect("the script of the fake library is JSON that it knows")
}

/// The script while the driver answers.
fn driver() -> Result<Script, c_uint> {
    loop {
        let script = script();
        match script.driver {
            State::Ok => return Ok(script),
            State::Lost => return Err(DRIVER_NOT_LOADED),
            State::Hang => std::thread::sleep(std::time::Duration::from_millis(50)),
        }
    }
}

/// Of an instance the handle has its GPU's in its lower bits and its own number and one above them.
const INSTANCE: usize = 1 << 16;

/// A handle is the device's number and one, so that none is null.
fn gpu(device: *mut c_void) -> Result<Gpu, c_uint> {
    let script = driver()?;
    let (of, instance) = (device as usize % INSTANCE, device as usize / INSTANCE);
    let gpu = of.checked_sub(1).and_then(|n| script.gpus.get(n)).ok_or(INVALID_ARGUMENT)?;
    match (gpu.state, instance.checked_sub(1)) {
        (State::Lost, _) => Err(GPU_IS_LOST),
        (_, None) => Ok(gpu.clone()),
        (_, Some(n)) => gpu.instances.get(n).cloned().ok_or(NOT_FOUND),
    }
}

fn answer(result: Result<(), c_uint>) -> c_uint {
    result.err().unwrap_or(SUCCESS)
}

/// Writes a text with its final zero, as much of it as there is room for.
///
/// # Safety
/// `into` must have room for `length` bytes.
unsafe fn write_text(text: &str, into: *mut c_char, length: c_uint) {
    let room = (length as usize).saturating_sub(1);
    let bytes = &text.as_bytes()[..text.len().min(room)];
    // SAFETY: the caller has promised the room, and one byte of it is left for the zero.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), into, bytes.len());
        into.add(bytes.len()).write(0);
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> c_uint {
    answer(driver().map(|_| ()))
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> c_uint {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlErrorString(_error: c_uint) -> *const c_char {
    c"a fake error".as_ptr()
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetDriverVersion(into: *mut c_char, length: c_uint) -> c_uint {
    // SAFETY: the caller gives a buffer and its length.
    answer(driver().map(|_| unsafe { write_text("580.00", into, length) }))
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCount_v2(count: *mut c_uint) -> c_uint {
    // SAFETY: the caller gives a place for the number.
    answer(driver().map(|script| unsafe { count.write(script.gpus.len() as c_uint) }))
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, device: *mut *mut c_void) -> c_uint {
    let handle = (index as usize + 1) as *mut c_void;
    // SAFETY: the caller gives a place for the handle.
    answer(gpu(handle).map(|_| unsafe { device.write(handle) }))
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetName(device: *mut c_void, into: *mut c_char, length: c_uint) -> c_uint {
    // SAFETY: the caller gives a buffer and its length.
    answer(gpu(device).map(|gpu| unsafe { write_text(&gpu.name, into, length) }))
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUUID(device: *mut c_void, into: *mut c_char, length: c_uint) -> c_uint {
    answer(gpu(device).map(|gpu| {
        let uuid = gpu.uuid.unwrap_or_else(|| format!("GPU-fake-{}", device as usize - 1));
        // SAFETY: the caller gives a buffer and its length.
        unsafe { write_text(&uuid, into, length) }
    }))
}

#[repr(C)]
#[derive(Debug)]
pub struct Memory {
    version: c_uint,
    total: c_ulonglong,
    reserved: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(device: *mut c_void, memory: *mut Memory) -> c_uint {
    answer(gpu(device).and_then(|gpu| {
        match gpu.memory {
            Answer::Amount => {}
            Answer::NotSupported => return Err(NOT_SUPPORTED),
            Answer::NoPermission => return Err(NO_PERMISSION),
        }
        // SAFETY: the caller gives a structure of this layout.
        let memory = unsafe { &mut *memory };
        (memory.total, memory.reserved) = (gpu.total, 0);
        (memory.used, memory.free) = (gpu.used, gpu.total.saturating_sub(gpu.used));
        Ok(())
    }))
}

#[repr(C)]
#[derive(Debug)]
pub struct Utilization {
    gpu: c_uint,
    memory: c_uint,
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUtilizationRates(
    device: *mut c_void,
    rates: *mut Utilization,
) -> c_uint {
    // SAFETY: the caller gives a structure of this layout.
    answer(gpu(device).map(|gpu| unsafe { rates.write(Utilization { gpu: gpu.utilization, memory: 0 }) }))
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTemperature(
    device: *mut c_void,
    _sensor: c_uint,
    into: *mut c_uint,
) -> c_uint {
    // SAFETY: the caller gives a place for the number.
    answer(gpu(device).map(|gpu| unsafe { into.write(gpu.temperature) }))
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPowerUsage(device: *mut c_void, into: *mut c_uint) -> c_uint {
    // SAFETY: the caller gives a place for the number.
    answer(gpu(device).map(|gpu| unsafe { into.write(gpu.power) }))
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTotalEnergyConsumption(device: *mut c_void, into: *mut u64) -> c_uint {
    // SAFETY: the caller gives a place for the number.
    answer(gpu(device).map(|gpu| unsafe { into.write(gpu.energy) }))
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTotalEccErrors(
    device: *mut c_void,
    _error: c_uint,
    _counter: c_uint,
    into: *mut c_ulonglong,
) -> c_uint {
    answer(gpu(device).and_then(|gpu| {
        let errors = gpu.ecc_uncorrected.ok_or(NOT_SUPPORTED)?;
        // SAFETY: the caller gives a place for the number.
        unsafe { into.write(errors) };
        Ok(())
    }))
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCudaComputeCapability(
    device: *mut c_void,
    major: *mut c_int,
    minor: *mut c_int,
) -> c_uint {
    answer(gpu(device).map(|gpu| {
        // SAFETY: the caller gives places for both numbers.
        unsafe { (major.write(gpu.compute.0), minor.write(gpu.compute.1)) };
    }))
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigMode(
    device: *mut c_void,
    current: *mut c_uint,
    pending: *mut c_uint,
) -> c_uint {
    answer(gpu(device).map(|gpu| {
        // SAFETY: the caller gives places for both numbers.
        unsafe { (current.write(c_uint::from(gpu.mig)), pending.write(c_uint::from(gpu.mig))) };
    }))
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMaxMigDeviceCount(device: *mut c_void, count: *mut c_uint) -> c_uint {
    const MOST: c_uint = 7;
    // SAFETY: the caller gives a place for the number.
    answer(gpu(device).map(|gpu| unsafe { count.write(if gpu.mig { MOST } else { 0 }) }))
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigDeviceHandleByIndex(
    device: *mut c_void,
    index: c_uint,
    instance: *mut *mut c_void,
) -> c_uint {
    let handle = (device as usize % INSTANCE + (index as usize + 1) * INSTANCE) as *mut c_void;
    // SAFETY: the caller gives a place for the handle.
    answer(gpu(handle).map(|_| unsafe { instance.write(handle) }))
}

#[repr(C)]
#[derive(Debug)]
pub struct Process {
    pid: c_uint,
    used: c_ulonglong,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    device: *mut c_void,
    count: *mut c_uint,
    into: *mut Process,
) -> c_uint {
    answer(gpu(device).and_then(|gpu| {
        // SAFETY: the caller gives a place for the number, with the room of its list in it.
        let room = unsafe { count.read() } as usize;
        // SAFETY: as above.
        unsafe { count.write(gpu.processes.len() as c_uint) };
        if room < gpu.processes.len() {
            return Err(INSUFFICIENT_SIZE);
        }
        for (n, (pid, used)) in gpu.processes.iter().enumerate() {
            let process =
                Process { pid: *pid, used: *used, gpu_instance: u32::MAX, compute_instance: u32::MAX };
            // SAFETY: the list has room for all of them.
            unsafe { into.add(n).write(process) };
        }
        Ok(())
    }))
}

/// What a set listens to, and how many errors of it were told.
#[derive(Debug, Default)]
struct EventSet {
    device: usize,
    reported: usize,
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetCreate(set: *mut *mut c_void) -> c_uint {
    // SAFETY: the caller gives a place for the handle.
    answer(driver().map(|_| unsafe { set.write(Box::into_raw(Box::<EventSet>::default()).cast()) }))
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceRegisterEvents(
    device: *mut c_void,
    _events: c_ulonglong,
    set: *mut c_void,
) -> c_uint {
    // SAFETY: the set is one of ours.
    answer(gpu(device).map(|_| unsafe { (*set.cast::<EventSet>()).device = device as usize }))
}

#[repr(C)]
#[derive(Debug)]
pub struct EventData {
    device: *mut c_void,
    kind: c_ulonglong,
    data: c_ulonglong,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetWait_v2(
    set: *mut c_void,
    into: *mut EventData,
    _timeout_ms: c_uint,
) -> c_uint {
    // SAFETY: the set is one of ours, and nobody else uses it meanwhile.
    let set = unsafe { &mut *set.cast::<EventSet>() };
    let device = set.device as *mut c_void;
    answer(gpu(device).and_then(|gpu| {
        let xid = *gpu.xids.get(set.reported).ok_or(TIMEOUT)?;
        set.reported += 1;
        let data = EventData {
            device,
            kind: XID_CRITICAL_ERROR,
            data: xid,
            gpu_instance: u32::MAX,
            compute_instance: u32::MAX,
        };
        // SAFETY: the caller gives a structure of this layout.
        unsafe { into.write(data) };
        Ok(())
    }))
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetFree(set: *mut c_void) -> c_uint {
    // SAFETY: it was made by nvmlEventSetCreate and is freed once.
    drop(unsafe { Box::from_raw(set.cast::<EventSet>()) });
    SUCCESS
}
