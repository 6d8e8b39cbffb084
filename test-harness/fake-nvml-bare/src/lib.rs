//! The fake management library of a driver that knows next to nothing: one GPU without a name,
//! without figures. Every other symbol is missing, as in drivers older than the node's calls.

use std::ffi::{c_uint, c_void};

const SUCCESS: c_uint = 0;
const INVALID_ARGUMENT: c_uint = 2;

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> c_uint {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> c_uint {
    SUCCESS
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCount_v2(count: *mut c_uint) -> c_uint {
    // SAFETY: the caller gives a place for the number.
    unsafe { count.write(1) };
    SUCCESS
}

/// # Safety
/// As nvml.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, device: *mut *mut c_void) -> c_uint {
    if index > 0 {
        return INVALID_ARGUMENT;
    }
    // SAFETY: the caller gives a place for the handle.
    unsafe { device.write(std::ptr::dangling_mut()) };
    SUCCESS
}
