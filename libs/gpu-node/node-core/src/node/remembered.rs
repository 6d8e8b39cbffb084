//! Ids that are remembered, up to a bound.

use std::collections::{BTreeSet, VecDeque};

use pool_registry_types::AttemptId;

/// How many attempt ids are remembered, so that none runs twice. Source: .specs/01 CLOUD-1507.
const REMEMBERED_ATTEMPTS: usize = 10_000;

/// The last ids of a kind.
#[derive(Debug, Default)]
pub(super) struct Remembered {
    ids: BTreeSet<AttemptId>,
    order: VecDeque<AttemptId>,
}

impl Remembered {
    pub(super) fn remember(&mut self, attempt: AttemptId) {
        if !self.ids.insert(attempt) {
            return;
        }
        self.order.push_back(attempt);
        if self.order.len() > REMEMBERED_ATTEMPTS
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
    }

    pub(super) fn contains(&self, attempt: &AttemptId) -> bool {
        self.ids.contains(attempt)
    }
}
