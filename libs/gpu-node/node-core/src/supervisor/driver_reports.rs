//! What engines report of their driver, and how far apart restarts are kept that follow from it.

use std::time::Duration;

use pool_registry_types::{Backoff, Moment};

/// Between two restarts of a pool for reported errors; begins anew after some time without any.
/// Source: .specs/01 CLOUD-2414.
const GAPS: Backoff = Backoff::new(Duration::from_secs(30), Duration::from_secs(600));
const FORGOTTEN_AFTER: Duration = Duration::from_secs(3600);

/// What an engine has written of its driver.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) line: String,
    /// When it is forgotten unless it is confirmed.
    pub(super) until: Moment,
    pub(super) look_at: Moment,
}

/// The restarts of a pool for errors that its engines reported.
#[derive(Debug, Default)]
pub(super) struct Reported {
    /// The last one, which may still be to come.
    last: Option<Moment>,
    /// Gaps so far.
    gaps: u32,
}

impl Reported {
    /// One more is needed: it is not made before [`Reported::earliest`].
    pub(super) fn add(&mut self, now: Moment) {
        let before = self.last.filter(|last| now < *last + FORGOTTEN_AFTER);
        let Some(last) = before else {
            (self.last, self.gaps) = (Some(now), 0);
            return;
        };
        self.last = Some(now.max(last + GAPS.after(self.gaps)));
        self.gaps = self.gaps.saturating_add(1);
    }

    /// When the engine may start again.
    pub(super) fn earliest(&self) -> Moment {
        self.last.unwrap_or(Moment::ZERO)
    }
}
