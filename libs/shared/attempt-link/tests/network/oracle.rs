//! What must hold of every attempt, whatever happens to the link.

use attempt_link::control::{Action, LaneState};
use bytes::Bytes;
use pool_registry_types::AttemptId;

use crate::host::FRAME_HEADER;
use crate::world::{World, at};

/// A stop is carried out within this, where the node is reached, milliseconds.
const STOPPED_WITHIN: u64 = 3_000;
/// An attempt without a link has its end within this: its silence, its ten seconds, and the time of a
/// link on which it was asked for then.
const KEPT_WITHOUT_A_LINK: u64 = 26_000;

/// How an attempt ended for the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Over {
    Ended,
    Refused,
    NeverSent,
    Unknown,
    Gone,
    Lost,
    Silent,
    Cancelled,
    /// Its control plane is gone.
    Forgotten,
}

/// A relay: what it has taken, and how it ended.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    pub(crate) began: u64,
    pub(crate) next: u64,
    pub(crate) run: Option<u64>,
    pub(crate) ids_to: u64,
    pub(crate) accepted: bool,
    pub(crate) failed: bool,
    pub(crate) over: Option<Over>,
    /// When the control plane ended it.
    pub(crate) stopped: Option<u64>,
}

impl World {
    /// An attempt's relay is told something.
    pub(crate) fn relay_action(&mut self, action: Action) {
        let over = match &action {
            Action::Ended { .. } => Some(Over::Ended),
            Action::Refused { .. } => Some(Over::Refused),
            Action::NeverSent { .. } => Some(Over::NeverSent),
            Action::Unknown { .. } => Some(Over::Unknown),
            Action::Gone { .. } => Some(Over::Gone),
            Action::Lost { .. } => Some(Over::Lost),
            Action::Silent { .. } => Some(Over::Silent),
            _ => None,
        };
        let Some((attempt, _)) = action.attempt() else { panic!("{action:?} is no relay's") };
        let reader = self.readers.get_mut(&attempt).expect("it was started");
        if reader.over == Some(Over::Cancelled) {
            assert_eq!(over, Some(Over::NeverSent), "something comes of a cancelled attempt: {action:?}");
            reader.over = over;
            return;
        }
        assert_eq!(reader.over, None, "something follows the end of {attempt}: {action:?}");
        match &action {
            Action::Accepted { .. } => {
                assert!(!std::mem::replace(&mut reader.accepted, true), "{attempt} is accepted twice");
            }
            Action::Resumed { .. } => assert!(reader.accepted),
            Action::Restart { from, .. } => assert_eq!(*from, reader.next, "{attempt} begins anew elsewhere"),
            Action::TokenIds { first, frames, .. } => {
                assert!(reader.accepted && *first <= reader.next);
                reader.ids_to = reader.ids_to.max(first + frames.len() as u64);
            }
            Action::Frames { first, count, bytes, .. } => reader.frames(&attempt, *first, *count, bytes),
            Action::Error { .. } => reader.failed = true,
            Action::Ended { .. } => {
                let kind = attempt.0.as_u128() % 4;
                assert_eq!(reader.failed, kind == 2, "the error of {attempt} comes with its end");
                let (frames, ..) = self.plans[&attempt];
                assert_eq!(reader.next, u64::from(frames), "{attempt} is whole");
            }
            Action::Refused { .. } | Action::NeverSent { .. } | Action::Unknown { .. } => {
                assert!(!reader.accepted, "{action:?} of what was accepted");
            }
            _ => {}
        }
        let Some(over) = over else { return };
        reader.over = Some(over);
        match over {
            Over::Ended => self.control.done(at(self.now), attempt),
            Over::Gone | Over::Lost | Over::Silent => {
                reader.stopped = Some(self.now);
                self.control.cancel(at(self.now), attempt);
            }
            Over::Unknown | Over::NeverSent | Over::Refused => {
                assert!(!self.host.is_running(&attempt), "{attempt} runs and is {over:?}");
            }
            Over::Cancelled | Over::Forgotten => {}
        }
    }

    /// What the control plane has ended runs on no node that was reached for three seconds since.
    pub(crate) fn check_stops(&mut self) {
        let faults = [self.up_cut, self.down_cut, self.refused, self.stalled];
        let windows = [self.posts_lost, self.answers_lost, self.posts_late];
        let is_whole = faults.iter().chain(&windows).all(|end| *end < self.now);
        if !is_whole || self.control.state() != LaneState::Up {
            self.whole_since = self.now;
        }
        let since = self.now.saturating_sub(STOPPED_WITHIN);
        if self.whole_since > since {
            return;
        }
        for (attempt, reader) in &self.readers {
            let overdue = reader.stopped.is_some_and(|stopped| stopped <= since);
            assert!(!overdue || !self.host.is_running(attempt), "{attempt} runs on after its stop");
        }
    }

    /// Links that come to nothing keep no attempt.
    pub(crate) fn check_flaps(&self) {
        let since = self.flaps_since;
        let long = self.now < self.flaps && self.now >= since + KEPT_WITHOUT_A_LINK;
        if !long || self.stalled > since {
            return;
        }
        for (attempt, reader) in &self.readers {
            let ran = reader.over.is_none() && reader.began < since;
            assert!(!ran, "{attempt} has no end, and no link for {KEPT_WITHOUT_A_LINK} ms");
        }
    }

    /// The network is whole, and everything has had its time.
    pub(crate) fn check_end(self) -> Vec<(AttemptId, Over)> {
        assert_eq!(self.control.state(), LaneState::Up, "the link is back");
        assert!(!self.suspected, "orders arrive again");
        assert_eq!(self.control.attempts(), 0, "every attempt is over");
        assert_eq!((self.node.attached(), self.control.held_bytes()), (0, 0));
        assert!(self.host.accepted.values().all(|times| *times == 1), "a start is accepted once at most");
        let running: Vec<_> = self.host.runs.keys().filter(|id| self.host.is_running(id)).collect();
        assert!(running.is_empty(), "{running:?} run on");
        let ends = self.readers.iter();
        ends.map(|(id, reader)| (*id, reader.over.unwrap_or_else(|| panic!("{id} has no end")))).collect()
    }
}

impl Reader {
    /// Takes whole frames; each must be the next of this attempt, by the same run.
    fn frames(&mut self, attempt: &AttemptId, first: u64, count: u32, bytes: &Bytes) {
        assert!(self.accepted, "frames before the acceptance");
        assert!(
            first <= self.next && first + u64::from(count) > self.next,
            "{first} and {count} at {}",
            self.next
        );
        let (mut rest, mut index) = (&bytes[..], first);
        while !rest.is_empty() {
            let number = |at: usize| u64::from_be_bytes(rest[at..at + 8].try_into().unwrap());
            let len = u32::from_be_bytes(rest[24..FRAME_HEADER].try_into().unwrap());
            let whose = u64::try_from(attempt.0.as_u128()).unwrap();
            assert_eq!((number(0), number(16)), (whose, index), "a frame of another attempt or place");
            assert_eq!(*self.run.get_or_insert(number(8)), number(8), "a frame of another run");
            rest = &rest[usize::try_from(len).unwrap()..];
            if index == self.next {
                assert!(attempt.0.as_u128() % 4 != 1 || self.ids_to > index, "its ids come before it");
                self.next += 1;
            }
            index += 1;
        }
        assert_eq!(index, first + u64::from(count), "as many frames as were named");
    }
}
