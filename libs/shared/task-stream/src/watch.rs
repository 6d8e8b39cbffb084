//! An attempt's own liveness: its deadlines before, at and between tokens.
//!
//! The relay keeps one [`StreamWatch`] for each attempt, tells it what arrives, and asks when
//! to look again. It is a few numbers, so that a token costs two stores.

use std::time::Duration;

use pool_registry_types::Moment;

/// How long each step of an attempt may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttemptDeadlines {
    /// From the dispatch to the response headers; on a link, from the last byte of the start's POST to
    /// the link's answer. Source: .specs/01 CLOUD-1501.
    pub acceptance: Duration,
    /// From the dispatch to the first token.
    pub first_token: Duration,
    /// Between two tokens.
    pub token_idle: Duration,
    /// Between any two bytes once accepted: the node sends a comment every second. A link says itself
    /// which of its attempts are silent.
    pub silence: Duration,
}

/// A stream without a byte for so long is suspect: three comments are missing.
/// Source: .specs/01 CLOUD-1540.
pub const QUIET: Duration = Duration::from_secs(3);

impl AttemptDeadlines {
    /// None that ever passes.
    pub const UNBOUNDED: Self = {
        let never = Duration::from_secs(100 * 365 * 24 * 3600);
        Self { acceptance: never, first_token: never, token_idle: never, silence: never }
    };
}

/// Which deadline passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Overdue {
    Acceptance,
    FirstToken,
    TokenIdle,
    /// The node itself fell silent.
    Silence,
    /// The task's own deadline.
    Task,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Since when the acceptance is awaited; nothing while the start waits for its link.
    Opening(Option<Moment>),
    Prefill,
    Decoding,
}

/// The deadlines of one attempt, as far as it has come.
#[derive(Debug, Clone)]
pub(crate) struct StreamWatch {
    deadlines: AttemptDeadlines,
    task_deadline: Option<Moment>,
    phase: Phase,
    /// Its link says that it is silent, and nothing here does.
    linked: bool,
    dispatched: Moment,
    last_bytes: Moment,
    last_token: Moment,
    /// That the stream is quiet has been said.
    quiet: bool,
    /// A token has come that a reader sees.
    shown: bool,
}

impl StreamWatch {
    pub(crate) fn new(now: Moment, deadlines: AttemptDeadlines, task_deadline: Option<Moment>) -> Self {
        Self {
            deadlines,
            task_deadline,
            phase: Phase::Opening(Some(now)),
            linked: false,
            dispatched: now,
            last_bytes: now,
            last_token: now,
            quiet: false,
            shown: false,
        }
    }

    /// The watch of an attempt that goes by its node's link: its start waits there.
    pub(crate) fn linked(now: Moment, deadlines: AttemptDeadlines, task_deadline: Option<Moment>) -> Self {
        let watch = Self::new(now, deadlines, task_deadline);
        Self { phase: Phase::Opening(None), linked: true, ..watch }
    }

    /// The last byte of its start was taken: the acceptance is awaited.
    pub(crate) fn sent(&mut self, now: Moment) {
        if let Phase::Opening(_) = self.phase {
            self.phase = Phase::Opening(Some(now));
        }
    }

    pub(crate) fn accepted(&mut self, now: Moment) {
        self.phase = Phase::Prefill;
        self.last_bytes = now;
    }

    /// Returns whether the stream had been quiet before.
    pub(crate) fn bytes(&mut self, now: Moment) -> bool {
        self.last_bytes = now;
        std::mem::take(&mut self.quiet)
    }

    /// Whether an accepted stream has become quiet; says so once.
    pub(crate) fn grows_quiet(&mut self, now: Moment) -> bool {
        let grows = !self.quiet && self.hears_silence() && now >= self.last_bytes + QUIET;
        self.quiet |= grows;
        grows
    }

    /// Returns whether it was the first token that a reader sees.
    pub(crate) fn token(&mut self, now: Moment) -> bool {
        self.unlogged(now);
        !std::mem::replace(&mut self.shown, true)
    }

    /// A token that is left out of the log: the engine decodes.
    pub(crate) fn unlogged(&mut self, now: Moment) {
        self.phase = Phase::Decoding;
        self.last_bytes = now;
        self.last_token = now;
    }

    /// The engine says something that is no token. Before the first one it proves nothing: some
    /// write an empty beginning before they look at the prompt.
    pub(crate) fn works(&mut self, now: Moment) {
        if self.phase == Phase::Decoding {
            self.last_token = now;
        }
    }

    /// Whether a stream without a byte is noticed here.
    fn hears_silence(&self) -> bool {
        !self.linked && !matches!(self.phase, Phase::Opening(_))
    }

    /// The next moment at which [`StreamWatch::overdue`] may say something.
    pub(crate) fn next_deadline(&self) -> Moment {
        let own = match self.phase {
            Phase::Opening(since) => since.map(|since| since + self.deadlines.acceptance),
            Phase::Prefill => Some(self.dispatched + self.deadlines.first_token),
            Phase::Decoding => Some(self.last_token + self.deadlines.token_idle),
        };
        let silence = self.hears_silence().then(|| {
            let silent = self.last_bytes + self.deadlines.silence;
            if self.quiet { silent } else { silent.min(self.last_bytes + QUIET) }
        });
        own.into_iter().chain(silence).chain(self.task_deadline).min().unwrap_or(Moment::NEVER)
    }

    /// The deadline that has passed, if one has.
    pub(crate) fn overdue(&self, now: Moment) -> Option<Overdue> {
        if self.task_deadline.is_some_and(|deadline| now >= deadline) {
            return Some(Overdue::Task);
        }
        if self.hears_silence() && now >= self.last_bytes + self.deadlines.silence {
            return Some(Overdue::Silence);
        }
        match self.phase {
            Phase::Opening(since) => since
                .is_some_and(|since| now >= since + self.deadlines.acceptance)
                .then_some(Overdue::Acceptance),
            Phase::Prefill if now >= self.dispatched + self.deadlines.first_token => {
                Some(Overdue::FirstToken)
            }
            Phase::Decoding if now >= self.last_token + self.deadlines.token_idle => Some(Overdue::TokenIdle),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Moment {
        Moment::from_millis(millis)
    }

    fn watch(task_deadline: Option<u64>) -> StreamWatch {
        let deadlines = AttemptDeadlines {
            acceptance: Duration::from_millis(5),
            first_token: Duration::from_millis(100),
            token_idle: Duration::from_millis(20),
            silence: Duration::from_millis(10),
        };
        StreamWatch::new(at(0), deadlines, task_deadline.map(at))
    }

    // CLOUD-1501
    #[test]
    fn each_phase_has_its_own_deadline() {
        let mut w = watch(None);
        assert_eq!(
            (w.next_deadline(), w.overdue(at(4)), w.overdue(at(5))),
            (at(5), None, Some(Overdue::Acceptance))
        );
        w.accepted(at(4));
        assert_eq!((w.next_deadline(), w.overdue(at(13))), (at(14), None));
        assert_eq!(w.overdue(at(14)), Some(Overdue::Silence));
        w.bytes(at(95));
        assert_eq!((w.next_deadline(), w.overdue(at(100))), (at(100), Some(Overdue::FirstToken)));
        assert!(w.token(at(99)));
        assert!(!w.token(at(100)));
        w.bytes(at(118));
        assert_eq!((w.next_deadline(), w.overdue(at(119))), (at(120), None));
        assert_eq!(w.overdue(at(120)), Some(Overdue::TokenIdle));
    }

    // CLOUD-1520
    #[test]
    fn thoughts_that_are_left_out_and_empty_events_are_signs_of_life_between_tokens() {
        let mut w = watch(None);
        w.accepted(at(1));
        w.works(at(9));
        assert_eq!(w.overdue(at(11)), Some(Overdue::Silence), "no byte of the node");
        w.bytes(at(95));
        w.works(at(95));
        assert_eq!(w.overdue(at(100)), Some(Overdue::FirstToken), "an empty beginning is no token");
        w.unlogged(at(99));
        w.bytes(at(118));
        w.works(at(118));
        assert_eq!(w.overdue(at(127)), None);
        assert!(w.token(at(120)), "the first that a reader sees");
        assert!(!w.token(at(121)));
    }

    // CLOUD-1540
    #[test]
    fn a_stream_grows_quiet_once_and_its_next_byte_says_that_it_was() {
        let long = Duration::from_secs(100);
        let deadlines =
            AttemptDeadlines { acceptance: long, first_token: long, token_idle: long, silence: long };
        let mut w = StreamWatch::new(at(0), deadlines, None);
        assert!(!w.grows_quiet(at(50_000)), "nothing is expected before the acceptance");
        w.accepted(at(1_000));
        assert_eq!(w.next_deadline(), at(4_000));
        assert!(!w.grows_quiet(at(3_999)));
        assert!(w.grows_quiet(at(4_000)) && !w.grows_quiet(at(4_001)));
        assert_eq!(w.next_deadline(), at(100_000), "said once");
        assert!(w.bytes(at(5_000)) && !w.bytes(at(5_001)));
        assert_eq!(w.next_deadline(), at(8_001));
    }

    // CLOUD-1512
    #[test]
    fn the_tasks_deadline_ends_every_phase() {
        let mut w = watch(Some(3));
        assert_eq!((w.next_deadline(), w.overdue(at(3))), (at(3), Some(Overdue::Task)));
        w.accepted(at(1));
        w.token(at(2));
        assert_eq!(w.overdue(at(3)), Some(Overdue::Task));
    }

    // CLOUD-1501
    #[test]
    fn on_a_link_the_acceptance_is_awaited_from_the_last_byte_of_the_start_and_silence_is_the_links() {
        let deadlines = watch(None).deadlines;
        let mut w = StreamWatch::linked(at(0), deadlines, None);
        assert_eq!((w.next_deadline(), w.overdue(at(1_000_000))), (Moment::NEVER, None));
        w.sent(at(50));
        assert_eq!((w.next_deadline(), w.overdue(at(54))), (at(55), None));
        assert_eq!(w.overdue(at(55)), Some(Overdue::Acceptance));
        // Its POST was stale, and it has gone again.
        w.sent(at(53));
        assert_eq!(w.next_deadline(), at(58));
        w.accepted(at(57));
        w.sent(at(57));
        assert_eq!((w.next_deadline(), w.overdue(at(99))), (at(100), None));
        assert_eq!(w.overdue(at(100)), Some(Overdue::FirstToken));
        assert!(w.token(at(99)) && !w.grows_quiet(at(50_000)));
        assert_eq!((w.next_deadline(), w.overdue(at(119))), (at(119), Some(Overdue::TokenIdle)));
        let w = StreamWatch::linked(at(0), deadlines, Some(at(7)));
        assert_eq!((w.next_deadline(), w.overdue(at(7))), (at(7), Some(Overdue::Task)));
    }
}
