//! The one place where a daemon reads monotonic time.

use std::time::Instant;

use pool_registry_types::Moment;

/// Counts milliseconds since it was made.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    start: Instant,
}

impl Default for Clock {
    fn default() -> Self {
        Self { start: Instant::now() }
    }
}

impl Clock {
    pub fn now(&self) -> Moment {
        Moment::from_millis(u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// The instant of a moment, for timers. Far moments are clipped to a day.
    pub fn instant(&self, at: Moment) -> Instant {
        const DAY_MS: u64 = 24 * 3600 * 1000;
        let ahead = at.millis_since(self.now()).min(DAY_MS);
        Instant::now() + std::time::Duration::from_millis(ahead)
    }
}
