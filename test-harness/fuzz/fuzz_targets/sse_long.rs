//! Event streams about as long as the longest frame: what stands before the first `|` of an input
//! is repeated, and what stands after it follows.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pool_registry_types::sse::MAX_FRAME_BYTES;

/// A few hundred pieces for one frame.
const FINEST: usize = 4093;

fuzz_target!(|input: &[u8]| {
    let bar = input.iter().position(|byte| *byte == b'|').unwrap_or(input.len());
    let (part, after) = (&input[..bar], input.get(bar + 1..).unwrap_or_default());
    if part.is_empty() {
        return;
    }
    // A frame of it is too long by at least a byte.
    let mut stream = part.repeat(MAX_FRAME_BYTES / part.len() + 1);
    stream.extend_from_slice(after);
    fuzz::streams::check(&stream, FINEST);
});
