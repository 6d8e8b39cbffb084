//! GGUF headers: whatever one claims, little is allocated, every step of a loop has read
//! something, and the estimate of memory never sinks as more is asked for.

#![no_main]

use std::io::{self, Read};

use libfuzzer_sys::fuzz_target;
use node_agent::gguf::{GgufError, GgufHeader, estimate_bytes};

/// Most bytes that are held for a header: a name and a text of 64 KiB, and three times as much
/// where they are no UTF-8, and the two texts that are kept.
const MAX_HELD: usize = 1024 * 1024;
/// How much of a file is there behind the input.
const BEHIND: usize = 256 * 1024;

/// The input, and behind it its last bytes again and again.
struct File<'a> {
    input: &'a [u8],
    at: usize,
    end: usize,
    /// Calls of `read` with room for something.
    reads: usize,
}

impl Read for File<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        self.reads += 1;
        let count = into.len().min(self.end - self.at);
        let tail = &self.input[self.input.len().saturating_sub(16)..];
        for place in &mut into[..count] {
            let behind = self.at.checked_sub(self.input.len());
            *place = behind.map_or_else(|| self.input[self.at], |behind| tail[behind % tail.len()]);
            self.at += 1;
        }
        Ok(count)
    }
}

fn read(input: &[u8], end: usize) -> Result<GgufHeader, GgufError> {
    let mut file = File { input, at: 0, end, reads: 0 };
    let (header, spent) = fuzz::measure(|| GgufHeader::read(&mut file));
    assert!(spent.highest <= MAX_HELD, "{} bytes held", spent.highest);
    // One that returns nothing ends it.
    assert!(file.reads <= file.at + 1, "{} reads of {} bytes", file.reads, file.at);
    if let Err(GgufError::Truncated(at) | GgufError::Bounds { at, .. }) = &header {
        assert!(usize::try_from(*at).is_ok_and(|at| at <= file.at), "it speaks of byte {at}");
    }
    header
}

fn check(header: &GgufHeader) {
    assert!(matches!(header.version, 2 | 3));
    assert!(header.context() != Some(0));
    let tokens = [0, 1, 8192, u64::from(u32::MAX), u64::MAX / 2, u64::MAX];
    for file_bytes in [0, 1 << 30, u64::MAX] {
        let estimates = tokens.map(|tokens| estimate_bytes(file_bytes, header, tokens));
        assert!(estimates.is_sorted(), "more tokens take less: {estimates:?} of {header:?}");
        assert!(estimates[0] >= file_bytes);
    }
}

fuzz_target!(|input: &[u8]| {
    if input.is_empty() {
        return;
    }
    let exact = read(input, input.len());
    let longer = read(input, input.len() + BEHIND);
    if let Ok(header) = &exact {
        check(header);
        assert_eq!(longer.as_ref().ok(), Some(header), "what follows a header changes it");
    }
    if let Ok(header) = &longer {
        check(header);
    }
});
