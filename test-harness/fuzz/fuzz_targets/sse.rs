//! Event streams, as they come.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|stream: &[u8]| fuzz::streams::check(stream, 1));
