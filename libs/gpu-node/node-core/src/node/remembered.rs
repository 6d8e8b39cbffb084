//! Ids that are remembered, for their time and up to a bound.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use pool_registry_types::{AttemptId, Moment};

/// How long an attempt's id is remembered, so that it does not run twice: longer than its start can be
/// on its way. Source: .specs/01 CLOUD-1507.
const REMEMBERED: Duration = Duration::from_secs(600);
/// And how many ids of a kind, the last ones.
const MOST: usize = 1_000_000;

/// The last ids of a kind.
#[derive(Debug, Default)]
pub(super) struct Remembered {
    ids: BTreeSet<AttemptId>,
    order: VecDeque<(Moment, AttemptId)>,
}

impl Remembered {
    pub(super) fn remember(&mut self, now: Moment, attempt: AttemptId) {
        if !self.ids.insert(attempt) {
            return;
        }
        self.order.push_back((now, attempt));
        let is_over = |order: &VecDeque<(Moment, AttemptId)>| {
            order.len() > MOST || order.front().is_some_and(|(at, _)| now >= *at + REMEMBERED)
        };
        while is_over(&self.order)
            && let Some((_, oldest)) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
    }

    pub(super) fn contains(&self, attempt: &AttemptId) -> bool {
        self.ids.contains(attempt)
    }
}
