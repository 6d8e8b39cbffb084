//! Pauses that keep a fleet from marching in step.

use std::time::Duration;

/// A seeded source of uneven pauses: the same seed gives the same ones.
#[derive(Debug, Clone)]
pub(crate) struct Jitter(u64);

impl Jitter {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// Between nine tenths of the span and the whole of it: early, never late.
    pub(crate) fn spread(&mut self, span: Duration) -> Duration {
        // xorshift64: even enough.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let permille = 900 + u32::try_from(self.0 % 101).unwrap_or(100);
        span.saturating_mul(permille) / 1000
    }
}
