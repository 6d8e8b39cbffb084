//! How many links of one thread take their attempts up again at a time.
//!
//! When many nodes come back at once, each resume brings what was missed in one piece. Links wait their
//! turn, so that what goes on meanwhile is not held up by all of it.

use std::collections::{BTreeSet, VecDeque};

/// Links that resume at a time. Source: .specs/01 CLOUD-2633.
pub const MAX_RESUMING_LINKS: usize = 32;

/// Turns of the links of one thread; `L` names a link.
#[derive(Debug)]
pub struct ResumeGate<L> {
    resuming: BTreeSet<L>,
    waiting: VecDeque<L>,
}

impl<L> Default for ResumeGate<L> {
    fn default() -> Self {
        Self { resuming: BTreeSet::new(), waiting: VecDeque::new() }
    }
}

impl<L: Ord + Clone> ResumeGate<L> {
    /// The link has attempts to resume; says whether it may do so at once.
    #[must_use]
    pub fn ask(&mut self, link: L) -> bool {
        if self.resuming.contains(&link) {
            return true;
        }
        if self.resuming.len() < MAX_RESUMING_LINKS {
            self.waiting.retain(|other| *other != link);
            return self.resuming.insert(link);
        }
        if !self.waiting.contains(&link) {
            self.waiting.push_back(link);
        }
        false
    }

    /// The link has resumed, or is gone. Returns the one that may resume at its place.
    #[must_use]
    pub fn over(&mut self, link: &L) -> Option<L> {
        self.waiting.retain(|other| other != link);
        if !self.resuming.remove(link) {
            return None;
        }
        let next = self.waiting.pop_front()?;
        self.resuming.insert(next.clone());
        Some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2633
    #[test]
    fn at_most_32_links_resume_at_a_time_and_the_others_follow_in_their_order() {
        let mut gate = ResumeGate::default();
        let turns: Vec<bool> = (0..35).map(|link| gate.ask(link)).collect();
        assert_eq!(turns.iter().filter(|turn| **turn).count(), MAX_RESUMING_LINKS);
        assert!(!turns[32] && gate.ask(3), "one that resumes is not turned away");
        assert_eq!(gate.over(&33), None, "one that waits and is gone gives nobody a turn");
        assert_eq!((gate.over(&7), gate.over(&0)), (Some(32), Some(34)));
        assert_eq!((gate.over(&0), gate.over(&1)), (None, None), "nobody waits");
        assert!(gate.ask(0) && !gate.ask(1), "there is room for one");
    }
}
