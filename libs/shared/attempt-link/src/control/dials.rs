//! Dials: GETs that have not said hello.

use bytes::Bytes;
use pool_registry_types::Moment;

use super::link::{Link, is_hello};
use super::{
    Action, ControlLane, DIAL_BOUND, DIAL_EVERY_WHEN_BROKEN, DIAL_EVERY_WHEN_EARLY, Interrupted,
    KNOWN_WITHIN, MAX_DIALS,
};
use crate::records::{Content, RecordDecoder};
use crate::wire::LinkQuery;

/// A GET under way.
#[derive(Debug)]
pub(super) struct Dial {
    began: Moment,
    decoder: RecordDecoder,
}

impl Dial {
    pub(super) fn deadline(&self) -> Moment {
        self.began + DIAL_BOUND
    }
}

/// How a GET ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionEnd {
    /// Nobody listens there.
    Refused,
    /// A dial was answered `409 WRONG_NODE`: the boot that was dialled is over.
    WrongBoot,
    /// A dial was answered `409 STALE_LINK`.
    Stale,
    /// It could not be made, was answered with another status than 200, or broke.
    Broken,
}

impl ControlLane {
    /// Dials, unless as many are under way as may be.
    pub(super) fn dial(&mut self, now: Moment) {
        if let Link::Interrupted(interruption) = &mut self.link {
            interruption.next_dial = interruption.dial_after(now);
        }
        if self.dials.len() >= MAX_DIALS {
            return;
        }
        self.n += 1;
        self.dialled_at = now;
        self.dials.insert(self.n, Dial { began: now, decoder: RecordDecoder::new() });
        let (boot_id, life, lane, n) = (self.boot_id, self.life, self.lane, self.n);
        self.actions.push_back(Action::Dial(LinkQuery { boot_id, life, lane, n }));
    }

    pub(super) fn expire_dials(&mut self, now: Moment) {
        let late = |dial: &Dial| now >= dial.deadline();
        while let Some(n) = self.dials.iter().find(|(_, dial)| late(dial)).map(|(n, _)| *n) {
            self.actions.push_back(Action::Close { n });
            self.dial_failed(now, n, ConnectionEnd::Broken);
        }
    }

    fn dial_failed(&mut self, now: Moment, n: u64, end: ConnectionEnd) {
        let Some(dial) = self.dials.remove(&n) else { return };
        if end == ConnectionEnd::WrongBoot {
            return self.other_boot(None);
        }
        // Whoever has just registered may be dialled before it knows with whom.
        let is_early = end == ConnectionEnd::Stale && now < self.dialling_since + KNOWN_WITHIN;
        if let Link::Interrupted(interruption) = &mut self.link {
            if is_early {
                interruption.next_dial = interruption.next_dial.min(now + DIAL_EVERY_WHEN_EARLY);
            } else {
                let broke = end == ConnectionEnd::Broken && now < dial.deadline();
                if broke && !interruption.dial_failed {
                    let soon = now + DIAL_EVERY_WHEN_BROKEN;
                    interruption.next_dial = interruption.next_dial.min(soon);
                }
                interruption.dial_failed = true;
                interruption.refused |= end == ConnectionEnd::Refused;
            }
        }
        self.move_quiet(now);
        if self.dials.is_empty() {
            // It may have been the one that was waited for.
            self.interrupted_timer(now);
        }
    }

    /// The connection of the GET `n` has ended, or was never made.
    pub fn closed(&mut self, now: Moment, n: u64, end: ConnectionEnd) {
        if self.is_current(n) {
            self.interrupt(now, Interrupted::Broken);
        } else {
            self.dial_failed(now, n, end);
        }
    }

    pub(super) fn dial_received(&mut self, now: Moment, n: u64, bytes: Bytes) {
        let Some(dial) = self.dials.get_mut(&n) else { return };
        dial.decoder.push(bytes);
        let hello = match dial.decoder.next_record() {
            Ok(None) => return,
            Ok(Some(record)) if is_hello(&record) => Content::read(&record).ok(),
            _ => None,
        };
        let Some(Content::Hello(hello)) = hello else {
            self.actions.push_back(Action::Close { n });
            return self.dial_failed(now, n, ConnectionEnd::Broken);
        };
        if hello.boot_id != self.boot_id {
            return self.other_boot(Some(hello.boot_id));
        }
        if let Some(dial) = self.dials.remove(&n) {
            self.adopt(now, n, dial.decoder);
        }
    }
}
