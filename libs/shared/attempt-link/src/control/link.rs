//! The link itself: what comes on it, when it counts as interrupted, and when as lost.

use bytes::Bytes;
use pool_registry_types::{BootId, Moment};

use super::{
    Action, ControlLane, DIAL_EVERY, DIAL_EVERY_WHEN_LOST, GIVE_UP, GIVE_UP_DIALS, Interrupted, Lost,
    MAX_BAD_LINKS, NO_HELLO, PROBE_EVERY, QUIET, REPLACE_EVERY, SILENT_BUSY, SILENT_EMPTY, UNDELIVERABLE,
};
use crate::Rule;
use crate::content::{Bye, ByeReason};
use crate::records::{Content, Kind, Parts, Record, RecordDecoder};

/// Where the link stands.
#[derive(Debug)]
pub(super) enum Link {
    /// Not dialled before the node registers again.
    Closed,
    Interrupted(Interruption),
    Up(Box<Connection>),
}

/// A link that is dialled.
#[derive(Debug)]
pub(super) struct Interruption {
    pub(super) since: Moment,
    /// When the last byte came.
    heard: Moment,
    pub(super) next_dial: Moment,
    /// A dial has failed since.
    pub(super) dial_failed: bool,
    /// A dial was refused: nobody listens there.
    pub(super) refused: bool,
    moved: bool,
    /// What ran was given up.
    lost: bool,
}

impl Interruption {
    pub(super) fn new(now: Moment, heard: Moment, next_dial: Moment) -> Self {
        Self { since: now, heard, next_dial, dial_failed: false, refused: false, moved: false, lost: false }
    }

    /// Whether a dial may begin, and when the one after it.
    pub(super) fn may_dial(&self, now: Moment) -> bool {
        self.lost || now < self.since + GIVE_UP
    }

    pub(super) fn dial_after(&self, now: Moment) -> Moment {
        now + if self.lost { DIAL_EVERY_WHEN_LOST } else { DIAL_EVERY }
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lost
    }
}

/// A link that is up.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) n: u64,
    /// The interruption that its hello ended, until an `alive` or a record of an attempt has come.
    before: Option<Interruption>,
    decoder: RecordDecoder,
    parts: Parts,
    heard: Moment,
    /// The POST that names it was sent.
    pub(super) named: bool,
    pub(super) turn: ResumeTurn,
}

/// Whether all that ran before may be asked for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ResumeTurn {
    None,
    Waiting,
    Granted,
}

impl ControlLane {
    pub(super) fn connection(&self) -> Option<&Connection> {
        match &self.link {
            Link::Up(connection) => Some(connection),
            _ => None,
        }
    }

    pub(super) fn connection_mut(&mut self) -> Option<&mut Connection> {
        match &mut self.link {
            Link::Up(connection) => Some(connection),
            _ => None,
        }
    }

    /// The present link is `n`.
    pub(super) fn is_current(&self, n: u64) -> bool {
        self.connection().is_some_and(|connection| connection.n == n)
    }

    // ---- a link comes up ----

    /// The first hello wins. `decoder` holds what came behind it.
    pub(super) fn adopt(&mut self, now: Moment, n: u64, decoder: RecordDecoder) {
        if let Some(old) = self.connection() {
            // Not read any more, before it is reckoned from where attempts are wanted.
            let old = old.n;
            self.actions.push_back(Action::Close { n: old });
            self.give_turn_back();
        }
        for other in std::mem::take(&mut self.dials).into_keys() {
            self.actions.push_back(Action::Close { n: other });
        }
        let before = match std::mem::replace(&mut self.link, Link::Closed) {
            // What it was about is lost already.
            Link::Interrupted(before) if before.lost => {
                Some(Interruption::new(now, before.heard, before.next_dial))
            }
            Link::Interrupted(before) => Some(before),
            Link::Up(replaced) => replaced.before,
            Link::Closed => None,
        };
        let connection = Connection {
            n,
            before,
            decoder,
            parts: Parts::default(),
            heard: now,
            named: false,
            turn: ResumeTurn::None,
        };
        self.link = Link::Up(Box::new(connection));
        self.greeted = true;
        self.actions.push_back(Action::Connected);
        self.abandon_control(now);
        (self.control_after, self.starts_after) = (now, now);
        // What did not arrive by another link says nothing of this one.
        self.undelivered = None;
        self.resume_all(now);
        if !self.to_resume.is_empty() {
            if let Some(connection) = self.connection_mut() {
                connection.turn = ResumeTurn::Waiting;
            }
            self.actions.push_back(Action::WantResume);
        }
        self.read(now);
        self.advance(now);
    }

    /// The thread's gate lets this link resume.
    pub fn may_resume(&mut self, now: Moment) {
        match self.connection_mut() {
            Some(connection) if connection.turn == ResumeTurn::Waiting => {
                connection.turn = ResumeTurn::Granted
            }
            // It broke meanwhile, and asks anew.
            _ => return,
        }
        self.resumes_begin(now);
        self.advance(now);
        self.end_turn();
    }

    /// Nothing that was asked for is without an answer.
    pub(super) fn end_turn(&mut self) {
        if self.resuming.is_empty()
            && let Some(connection) = self.connection_mut()
            && connection.turn == ResumeTurn::Granted
        {
            connection.turn = ResumeTurn::None;
            self.actions.push_back(Action::ResumeOver);
        }
    }

    fn give_turn_back(&mut self) {
        if let Some(connection) = self.connection_mut()
            && std::mem::replace(&mut connection.turn, ResumeTurn::None) != ResumeTurn::None
        {
            self.actions.push_back(Action::ResumeOver);
        }
    }

    // ---- what comes ----

    /// Bytes of the GET `n`.
    pub fn received(&mut self, now: Moment, n: u64, bytes: Bytes) {
        if let Some(connection) = self.connection_mut().filter(|connection| connection.n == n) {
            connection.heard = now;
            connection.decoder.push(bytes);
            self.read(now);
            self.advance(now);
        } else {
            self.dial_received(now, n, bytes);
        }
    }

    fn read(&mut self, now: Moment) {
        while let Some(connection) = self.connection_mut() {
            match connection.decoder.next_record() {
                Ok(Some(record)) => self.record(now, record),
                Ok(None) => return,
                Err(_) => return self.bad_record(now),
            }
        }
    }

    fn record(&mut self, now: Moment, record: Record) {
        let number = record.head.number;
        if number != 0 && !self.numbers.contains_key(&number) {
            self.dropped += 1;
            return;
        }
        let Some(connection) = self.connection_mut() else { return };
        let record = match connection.parts.join(record) {
            Ok(Some(record)) => record,
            Ok(None) => return,
            Err(_) => return self.bad_record(now),
        };
        let Ok(content) = Content::read(&record) else { return self.bad_record(now) };
        match (number, content) {
            (0, Content::Alive(positions)) => self.alive(now, &positions),
            (0, Content::Bye(bye)) => self.bye(now, bye),
            (0, Content::Hello(_)) => {}
            (0, _) => self.dropped += 1,
            (_, content) => {
                self.link_lives();
                if !self.attempt_record(now, &record, content) {
                    self.bad_record(now);
                }
            }
        }
    }

    /// With its number go the parts of an attempt.
    pub(super) fn forget_parts(&mut self, number: u64) {
        if let Some(connection) = self.connection_mut() {
            connection.parts.forget(number);
        }
    }

    /// The link brings what it is for: its interruption is over.
    pub(super) fn link_lives(&mut self) {
        if let Some(connection) = self.connection_mut() {
            connection.before = None;
        }
    }

    /// Nothing has run on it so far.
    pub(super) fn first_start(&mut self, now: Moment) {
        if let Some(before) = self.connection_mut().and_then(|connection| connection.before.as_mut()) {
            before.since = now;
        }
    }

    fn bad_record(&mut self, now: Moment) {
        self.bad_links += 1;
        self.interrupt(now, Interrupted::BadRecord);
        if self.bad_links >= MAX_BAD_LINKS {
            self.lose_all(Lost::Unusable);
        }
    }

    pub(super) fn link_works(&mut self) {
        self.bad_links = 0;
    }

    fn bye(&mut self, now: Moment, bye: Bye) {
        match bye.reason {
            ByeReason::Leaving => {
                self.close_link();
                self.actions.push_back(Action::Bye);
                self.lose_all(Lost::Left);
            }
            ByeReason::Credential | ByeReason::Unknown => self.interrupt(now, Interrupted::Credential),
        }
    }

    // ---- interruption ----

    /// The link is of no more use. It is dialled at once, but for one that had not lived, and one that
    /// the node does not know or writes badly: half a second after the dial before. An interruption that
    /// was not over goes on.
    pub(super) fn interrupt(&mut self, now: Moment, reason: Interrupted) {
        let Some(connection) = self.connection_mut() else { return };
        let (n, heard, before) = (connection.n, connection.heard, connection.before.take());
        self.give_turn_back();
        self.actions.push_back(Action::Close { n });
        let paused = self.dialled_at + DIAL_EVERY;
        let interruption = match before {
            Some(before) => {
                let since = if self.attempts.is_empty() { now } else { before.since };
                Interruption { since, dial_failed: true, next_dial: paused, ..before }
            }
            None => {
                let is_known = !matches!(reason, Interrupted::Stale | Interrupted::BadRecord);
                Interruption::new(now, heard, if is_known { now } else { paused })
            }
        };
        self.link = Link::Interrupted(interruption);
        self.actions.push_back(Action::Interrupted { reason });
        self.interrupted_timer(now);
    }

    /// Nothing is dialled any more. Orders that did not arrive go another way, or nowhere.
    fn close_link(&mut self) {
        self.undelivered = None;
        if std::mem::take(&mut self.suspected) {
            self.actions.push_back(Action::OrdersArrive);
        }
        self.give_turn_back();
        let n = self.connection().map(|connection| connection.n);
        let dials = std::mem::take(&mut self.dials).into_keys();
        self.actions.extend(n.into_iter().chain(dials).map(|n| Action::Close { n }));
        self.link = Link::Closed;
    }

    pub(super) fn interrupted_timer(&mut self, now: Moment) {
        let Link::Interrupted(interruption) = &self.link else { return };
        let (since, lost) = (interruption.since, interruption.lost || !self.enforces(Rule::GivenUp));
        if !lost && (now >= since + GIVE_UP_DIALS || now >= since + GIVE_UP && self.dials.is_empty()) {
            if let Link::Interrupted(interruption) = &mut self.link {
                interruption.lost = true;
                interruption.next_dial = self.dialled_at + DIAL_EVERY;
            }
            self.lose_all(Lost::NotResumed);
        }
        self.move_quiet(now);
        if self.is_without_link(now) {
            self.close_link();
            self.actions.push_back(Action::NoLink);
            self.lose_all(Lost::NotResumed);
            return;
        }
        if !self.greeted && !self.lives && now >= self.probe_at {
            self.probe_at = now + PROBE_EVERY;
            self.actions.push_back(Action::ProbeLive);
        }
        let Link::Interrupted(interruption) = &mut self.link else { return };
        if now < interruption.next_dial {
            return;
        }
        if interruption.may_dial(now) {
            self.dial(now);
        } else {
            // The dials that are under way are the last ones before all is lost.
            interruption.next_dial = Moment::NEVER;
        }
    }

    /// A node that lives and says no hello.
    fn is_without_link(&self, now: Moment) -> bool {
        !self.greeted && self.lives && now >= self.dialling_since + NO_HELLO
    }

    /// `/health/live` of the node has answered, in the boot that is dialled.
    pub fn live_answered(&mut self, now: Moment) {
        self.lives = true;
        if let Link::Interrupted(_) = self.link {
            self.interrupted_timer(now);
        }
    }

    /// Two ways say that the node is gone.
    pub(super) fn move_quiet(&mut self, now: Moment) {
        let Link::Interrupted(interruption) = &mut self.link else { return };
        let gone = interruption.refused || interruption.dial_failed && now >= interruption.heard + QUIET;
        if gone && !std::mem::replace(&mut interruption.moved, true) {
            self.actions.push_back(Action::MoveQuiet);
        }
    }

    pub(super) fn interruption_deadline(&self, interruption: &Interruption) -> Option<Moment> {
        let Interruption { since, heard, next_dial, dial_failed, moved, lost, .. } = *interruption;
        let end = (!lost && self.enforces(Rule::GivenUp))
            .then(|| if self.dials.is_empty() { since + GIVE_UP } else { since + GIVE_UP_DIALS });
        let quiet = (dial_failed && !moved).then(|| heard + QUIET);
        let probe = (!self.greeted && !self.lives).then_some(self.probe_at);
        let none = (!self.greeted && self.lives).then(|| self.dialling_since + NO_HELLO);
        [next_dial].into_iter().chain(end).chain(quiet).chain(probe).chain(none).min()
    }

    // ---- a link that is up ----

    /// When it counts as silent.
    fn silent_at(&self, connection: &Connection) -> Moment {
        if !self.enforces(Rule::SilenceNoticed) {
            return Moment::NEVER;
        }
        if self.running > 0 {
            return connection.heard + SILENT_BUSY;
        }
        match self.waiting.first() {
            Some((posted, _)) => connection.heard.max(*posted) + SILENT_BUSY,
            None => connection.heard + SILENT_EMPTY,
        }
    }

    pub(super) fn is_silent(&self, now: Moment) -> bool {
        self.connection().is_some_and(|connection| now >= self.silent_at(connection))
    }

    pub(super) fn connection_deadline(&self, connection: &Connection) -> Moment {
        let suspect = self.undelivered.filter(|_| !self.suspected).map(|since| since + UNDELIVERABLE);
        let seen = self.wants_answers().then_some(self.next_seen);
        let idle_starts = self.idle_starts(connection.n).then(|| {
            let retry = (!self.queue.is_empty()).then_some(self.starts_after);
            retry.into_iter().chain(seen).chain(self.done_due).min().map(|at| at.max(self.starts_after))
        });
        let single = (!self.large.is_empty() && self.has_room_for_single()).then_some(self.starts_after);
        let control = self.has_control_work(connection).then_some(self.control_after);
        let silent = self.silent_at(connection);
        suspect
            .into_iter()
            .chain(self.unresumed_at(connection))
            .chain(idle_starts.flatten())
            .chain(single)
            .chain(control)
            .fold(silent, Moment::min)
    }

    /// When the first of those that are asked for is lost, though the link is up.
    fn unresumed_at(&self, connection: &Connection) -> Option<Moment> {
        let (since, _) = self.resuming.first().filter(|_| connection.turn != ResumeTurn::Waiting)?;
        Some(*since + GIVE_UP_DIALS)
    }

    pub(super) fn connected_timer(&mut self, now: Moment) {
        let Some(connection) = self.connection() else { return };
        if now >= self.silent_at(connection) && !self.enforces(Rule::OldLinkUnread) {
            return self.reckon_and_read_on(now);
        }
        if now >= self.silent_at(connection) {
            return self.interrupt(now, Interrupted::Silent);
        }
        if self.unresumed_at(connection).is_some_and(|at| now >= at) {
            self.lose_unresumed(now);
        }
        // The link is not silent: the way down works.
        if !self.suspected && self.undelivered.is_some_and(|since| now >= since + UNDELIVERABLE) {
            self.suspected = true;
            self.actions.push_back(Action::OrdersDoNotArrive);
        }
    }

    /// Only with [`Rule::OldLinkUnread`] switched off.
    fn reckon_and_read_on(&mut self, now: Moment) {
        self.attempts.values_mut().for_each(|entry| entry.reckoned = Some(entry.taken));
        if let Some(connection) = self.connection_mut() {
            connection.heard = now;
        }
        self.dial(now);
    }

    /// What the link was opened with is refused: it is dialled anew, and goes on meanwhile.
    pub(super) fn replace(&mut self, now: Moment) {
        if self.connection().is_some() && self.dials.is_empty() && now >= self.replace_after {
            self.replace_after = now + REPLACE_EVERY;
            self.dial(now);
        }
    }

    // ---- the node ----

    /// The node has registered. In the same boot it is dialled if it was not; in another one all that
    /// ran has ended.
    pub fn registered(&mut self, now: Moment, boot_id: BootId) {
        if boot_id != self.boot_id {
            if !self.boot_is_over {
                self.other_boot(Some(boot_id));
            }
            self.boot_id = boot_id;
        } else if self.connection().is_some() {
            return;
        }
        self.boot_is_over = false;
        if matches!(self.link, Link::Closed) {
            (self.greeted, self.lives) = (false, false);
        }
        (self.dialling_since, self.probe_at) = (now, now + PROBE_EVERY);
        self.bad_links = 0;
        let heard = match &self.link {
            Link::Interrupted(interruption) => interruption.heard,
            _ => now,
        };
        let stays = matches!(&self.link, Link::Interrupted(interruption) if !interruption.lost);
        if !stays {
            self.link = Link::Interrupted(Interruption::new(now, heard, now));
        }
        self.dial(now);
    }

    /// All that was known of the boot before is void.
    pub(super) fn other_boot(&mut self, boot_id: Option<BootId>) {
        self.boot_is_over = true;
        self.close_link();
        self.actions.push_back(Action::OtherBoot { boot_id });
        if self.enforces(Rule::BootEndsAll) {
            self.lose_all(Lost::OtherBoot);
        }
        self.forget_node();
    }

    /// The lane is closed: the process ends, or the node is gone. What runs on the node is not stopped.
    /// Returns what is left to do: connections and POSTs are closed, and each attempt has its end.
    #[must_use]
    pub fn close(&mut self) -> Vec<Action> {
        self.close_link();
        self.lose_all(Lost::Closed);
        self.forget_node();
        self.actions.drain(..).collect()
    }

    /// Bytes that are kept of parts, and the record that says what is `alive` among them.
    pub fn held_bytes(&self) -> usize {
        self.connection().map_or(0, |connection| connection.parts.bytes())
    }
}

/// Whether the record is a link's first one.
pub(super) fn is_hello(record: &Record) -> bool {
    record.head.kind == Kind::Hello && record.head.number == 0 && !record.head.more
}
