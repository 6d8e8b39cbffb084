//! The attempts of a lane: what is wanted of each, and what comes of it.

use pool_registry_types::{AttemptId, ErrorBody, ErrorCode, LogId, Moment, TaskId};

use super::link::Link;
use super::posts::PostId;
use super::{
    Action, BEHIND, ControlLane, DONE_WITHIN, GIVE_UP_DIALS, Lost, MAX_DONE, MAX_FRUITLESS, POST_ANSWER,
    UNNAMED,
};
use crate::Rule;
use crate::content::Position;
use crate::records::{Content, Record};
use crate::wire::{MAX_INLINE_BYTES, Start, WriteError, WrittenStart};

/// How far an attempt has come.
#[derive(Debug)]
pub(super) enum Stage {
    /// Its start waits for a POST.
    Queued(Box<Unsent>),
    /// Its start is in a POST that was not answered.
    Posting {
        start: Box<Unsent>,
        post: PostId,
    },
    /// Its start was read, or may have been: the link answers.
    Sent,
    /// It is asked for again, by a POST where there is one. `since`: as long as it can be on this link.
    Resuming {
        post: Option<PostId>,
        since: Moment,
    },
    Accepted,
}

/// Whether a node has a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartTaken {
    /// It was not sent, or its POST was refused.
    No,
    /// How its POST ends will say so.
    UnderWay,
    /// It was read, or its POST broke.
    Maybe,
}

/// A start that goes up, or goes again.
#[derive(Debug)]
pub(super) struct Unsent {
    pub(super) start: Start,
    /// When what is left of its time was written.
    pub(super) since: Moment,
    /// Where it stands in its queue: the oldest first, also when it goes again.
    pub(super) place: u64,
    /// Its payload was looked at once: see [`WrittenStart`].
    pub(super) has_json: bool,
}

impl Unsent {
    pub(super) fn write(&self) -> WrittenStart {
        WrittenStart::checked(&self.start, self.has_json)
    }

    /// Whether it is likely to go alone: what seems short is not written to find that out. Whoever writes
    /// it for its POST finds it longer, where it is.
    fn seems_to_go_alone(&self) -> bool {
        /// Written out a text may take six times as much.
        const SHORT: usize = MAX_INLINE_BYTES / 4;
        let Start { facts, payload } = &self.start;
        let ids = facts.traceparent.len() + facts.tracestate.len() + facts.correlation_id.len();
        let is_short = facts.resume.is_none() && payload.len() + ids <= SHORT;
        !self.has_json || !is_short && self.write().goes_alone()
    }
}

/// What the lane knows of an attempt.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) task_id: TaskId,
    pub(super) log_id: LogId,
    /// By which the link names it; 0 while it has none.
    pub(super) number: u64,
    /// The index behind what was handed out.
    pub(super) taken: u64,
    /// Where it is wanted from; only with [`Rule::OldLinkUnread`] switched off.
    pub(super) reckoned: Option<u64>,
    /// As the node was told last, and that POST was answered.
    pub(super) seen: u64,
    pub(super) stage: Stage,
    /// Since when the node's answer is awaited.
    waits: Option<Moment>,
    /// When a POST that asks for it was answered, and the link did not answer.
    pub(super) asked: Option<Moment>,
    /// It was accepted, now or by an earlier number.
    was_accepted: bool,
    head_taken: bool,
    pub(super) error_taken: bool,
    is_silent: bool,
    /// When it was named last, and whether the last `alive` did.
    named_at: Moment,
    is_named: bool,
    /// Since when the node has more of it than has come.
    behind: Option<Moment>,
    /// Times that it was asked for again since something of it came.
    fruitless: u32,
    /// Its last POST was read, or broke; for as long as its start does not wait again.
    pub(super) may_be_there: bool,
}

/// A start whose attempt the lane has already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the attempt {0} was started before")]
pub struct DuplicateStart(pub AttemptId);

impl ControlLane {
    // ---- what is wanted ----

    /// The attempt is to begin. Its number and what is left of its time are written when it goes.
    /// Errors: the lane has an attempt of this id, which goes on as it was.
    pub fn start(&mut self, now: Moment, start: Start) -> Result<(), DuplicateStart> {
        let attempt = start.facts.attempt_id;
        if self.attempts.contains_key(&attempt) {
            return Err(DuplicateStart(attempt));
        }
        let is_down = match &self.link {
            Link::Closed => true,
            Link::Interrupted(interruption) => interruption.is_lost(),
            Link::Up(_) => false,
        };
        if is_down {
            self.actions.push_back(Action::NeverSent { attempt });
            return Ok(());
        }
        if self.attempts.is_empty() {
            self.first_start(now);
        }
        let facts = &start.facts;
        let entry = Attempt {
            task_id: facts.task_id,
            log_id: facts.log_id,
            number: 0,
            taken: facts.first_index,
            reckoned: None,
            seen: facts.first_index,
            waits: None,
            asked: None,
            was_accepted: false,
            head_taken: false,
            error_taken: false,
            is_silent: false,
            named_at: now,
            is_named: true,
            behind: None,
            fruitless: 0,
            may_be_there: false,
            stage: Stage::Sent,
        };
        self.place += 1;
        let (place, has_json) = (self.place, start.has_json());
        self.attempts.insert(attempt, entry);
        self.enqueue(attempt, Box::new(Unsent { start, since: now, place, has_json }));
        self.advance(now);
        Ok(())
    }

    /// Puts a start where it waits for its POST.
    pub(super) fn enqueue(&mut self, attempt: AttemptId, start: Box<Unsent>) {
        let Some(entry) = self.attempts.get_mut(&attempt) else { return };
        let queue = if start.seems_to_go_alone() { &mut self.large } else { &mut self.queue };
        queue.insert(start.place, attempt);
        (entry.stage, entry.may_be_there) = (Stage::Queued(start), false);
    }

    /// The attempt is to end, whatever became of it. Nothing more of it is handed out.
    pub fn cancel(&mut self, now: Moment, attempt: AttemptId) {
        let removed = self.remove(&attempt);
        match removed.map(|removed| removed.stage) {
            Some(Stage::Queued(_)) => return self.actions.push_back(Action::NeverSent { attempt }),
            Some(Stage::Posting { post, .. }) => self.abandon_single(post),
            _ => {}
        }
        if self.connection().is_some() || self.enforces(Rule::StopKept) {
            self.stops.keep(now, attempt);
        }
        self.advance(now);
    }

    /// The attempt's end is where it belongs: the node need not keep it.
    pub fn done(&mut self, now: Moment, attempt: AttemptId) {
        if !self.enforces(Rule::DoneSent) {
            return;
        }
        if self.done.len() >= MAX_DONE {
            self.done.pop_front();
        }
        self.done.push_back(attempt);
        self.done_due.get_or_insert(now + DONE_WITHIN);
        self.advance(now);
    }

    /// Whether nothing of the attempt's start has gone: of one whose POST is under way nobody knows.
    pub fn is_queued(&self, attempt: AttemptId) -> bool {
        self.attempts.get(&attempt).is_some_and(|entry| matches!(entry.stage, Stage::Queued(_)))
    }

    /// Whether the node may have the attempt's start, which it has not accepted.
    pub fn start_taken(&self, attempt: AttemptId) -> StartTaken {
        match self.attempts.get(&attempt) {
            Some(Attempt { stage: Stage::Posting { .. }, .. }) => StartTaken::UnderWay,
            Some(Attempt { may_be_there: true, .. }) => StartTaken::Maybe,
            _ => StartTaken::No,
        }
    }

    // ---- bookkeeping ----

    /// Attempts of which nothing was sent.
    pub(super) fn unsent(&self) -> usize {
        self.queue.len() + self.large.len()
    }

    pub(super) fn set_stage(&mut self, attempt: AttemptId, stage: Stage) {
        let Some(entry) = self.attempts.get_mut(&attempt) else { return };
        let before = std::mem::replace(&mut entry.stage, stage);
        let now = &entry.stage;
        let running = |stage: &Stage| usize::from(matches!(stage, Stage::Accepted));
        self.running = self.running + running(now) - running(&before);
        if let Stage::Resuming { since, .. } = before {
            self.resuming.remove(&(since, attempt));
        }
        if let Stage::Resuming { since, .. } = now {
            self.resuming.insert((*since, attempt));
        }
    }

    /// The node's answer is awaited from now on, if it was not before.
    pub(super) fn wait(&mut self, now: Moment, attempt: AttemptId) {
        if self.attempts.get(&attempt).is_some_and(|entry| entry.waits.is_none()) {
            self.set_waits(attempt, Some(now));
        }
    }

    /// Since when the node's answer is awaited; nothing where it is not.
    pub(super) fn set_waits(&mut self, attempt: AttemptId, since: Option<Moment>) {
        let Some(entry) = self.attempts.get_mut(&attempt) else { return };
        let before = std::mem::replace(&mut entry.waits, since);
        if let Some(before) = before {
            self.waiting.remove(&(before, attempt));
        }
        self.waiting.extend(since.map(|since| (since, attempt)));
    }

    /// Gives the attempt the next number: what comes under the one before is nobody's.
    pub(super) fn number(&mut self, attempt: AttemptId) -> u64 {
        self.forget_number(attempt);
        self.number += 1;
        if let Some(entry) = self.attempts.get_mut(&attempt) {
            entry.number = self.number;
            self.numbers.insert(self.number, attempt);
        }
        self.number
    }

    /// The number that it is asked for by.
    pub(super) fn number_to_resume(&mut self, attempt: AttemptId) -> u64 {
        match self.attempts.get(&attempt).map_or(0, |entry| entry.number) {
            0 => self.number(attempt),
            known => known,
        }
    }

    fn forget_number(&mut self, attempt: AttemptId) {
        let Some(entry) = self.attempts.get_mut(&attempt) else { return };
        let number = std::mem::take(&mut entry.number);
        self.numbers.remove(&number);
        self.forget_parts(number);
    }

    /// The attempt is over for this lane.
    fn remove(&mut self, attempt: &AttemptId) -> Option<Attempt> {
        if !self.attempts.contains_key(attempt) {
            return None;
        }
        self.forget_number(*attempt);
        self.set_waits(*attempt, None);
        self.to_resume.remove(attempt);
        let removed = self.attempts.remove(attempt)?;
        match removed.stage {
            Stage::Accepted => self.running -= 1,
            Stage::Resuming { since, .. } => {
                self.resuming.remove(&(since, *attempt));
            }
            Stage::Queued(ref start) => {
                self.queue.remove(&start.place);
                self.large.remove(&start.place);
            }
            Stage::Posting { .. } | Stage::Sent => {}
        }
        self.end_turn();
        Some(removed)
    }

    /// Nothing of what runs will come any more.
    pub(super) fn lose_all(&mut self, reason: Lost) {
        let attempts: Vec<AttemptId> = self.attempts.keys().copied().collect();
        for attempt in attempts {
            self.lose(attempt, reason);
        }
    }

    fn lose(&mut self, attempt: AttemptId, reason: Lost) {
        let Some(removed) = self.remove(&attempt) else { return };
        match removed.stage {
            Stage::Queued(_) => self.actions.push_back(Action::NeverSent { attempt }),
            stage => {
                if let Stage::Posting { post, .. } = stage {
                    self.abandon_single(post);
                }
                self.actions.push_back(Action::Lost { attempt, reason });
            }
        }
    }

    /// Another boot knows nothing of what the one before was told.
    pub(super) fn forget_node(&mut self) {
        self.stops.clear();
        self.done.clear();
        self.done_due = None;
        self.unknown_tasks.clear();
        let posts: Vec<PostId> = std::mem::take(&mut self.posts).into_keys().collect();
        self.actions.extend(posts.into_iter().map(|id| Action::AbandonPost { id }));
    }

    // ---- resumes ----

    /// All that the node has, or may have, is asked for on the new link.
    pub(super) fn resume_all(&mut self, now: Moment) {
        let sent = |stage: &Stage| !matches!(stage, Stage::Queued(_) | Stage::Posting { .. });
        let attempts: Vec<AttemptId> =
            self.attempts.iter().filter(|(_, entry)| sent(&entry.stage)).map(|(id, _)| *id).collect();
        for attempt in attempts {
            // Nothing was asked of this link.
            self.set_waits(attempt, None);
            self.set_stage(attempt, Stage::Sent);
            self.resume(now, attempt);
        }
    }

    /// The thread's gate has let this link resume: what waited for it did not wait for the node.
    pub(super) fn resumes_begin(&mut self, now: Moment) {
        for (_, attempt) in std::mem::take(&mut self.resuming) {
            if let Some(Stage::Resuming { since, .. }) =
                self.attempts.get_mut(&attempt).map(|entry| &mut entry.stage)
            {
                *since = now;
                self.resuming.insert((now, attempt));
            }
        }
    }

    /// The link is up, and the node does not say whether it has them.
    pub(super) fn lose_unresumed(&mut self, now: Moment) {
        while let Some((since, attempt)) = self.resuming.first().copied()
            && now >= since + GIVE_UP_DIALS
        {
            self.lose(attempt, Lost::NotResumed);
        }
    }

    /// The attempt is asked for with the next control POST, from what was taken of it.
    pub(super) fn resume(&mut self, now: Moment, attempt: AttemptId) {
        if self.enforces(Rule::NumberRenewed) {
            self.forget_number(attempt);
        }
        let since = match self.attempts.get(&attempt).map(|entry| &entry.stage) {
            Some(Stage::Resuming { since, .. }) => *since,
            _ => now,
        };
        self.set_stage(attempt, Stage::Resuming { post: None, since });
        if let Some(entry) = self.attempts.get_mut(&attempt) {
            (entry.behind, entry.asked) = (None, None);
            self.to_resume.insert(attempt);
        }
    }

    /// The same where the link itself is not at fault. Without end it is no use.
    fn resume_anew(&mut self, now: Moment, attempt: AttemptId) {
        let Some(entry) = self.attempts.get_mut(&attempt) else { return };
        entry.fruitless += 1;
        if entry.fruitless > MAX_FRUITLESS {
            return self.lose(attempt, Lost::Unusable);
        }
        self.resume(now, attempt);
    }

    /// It was never accepted, and never will be.
    pub(super) fn unknown(&mut self, now: Moment, attempt: AttemptId) {
        let Some(removed) = self.remove(&attempt) else { return };
        if removed.was_accepted {
            return self.actions.push_back(Action::Gone { attempt });
        }
        let again = self.unknown_tasks.contains(&removed.task_id);
        self.unknown_tasks.insert(now, removed.task_id);
        self.actions.push_back(Action::Unknown { attempt, again });
    }

    /// It can be written for no POST.
    pub(super) fn refuse_unwritten(&mut self, attempt: AttemptId, error: WriteError) {
        if self.remove(&attempt).is_some() {
            let error = ErrorBody::new(ErrorCode::PayloadTooLarge, error.to_string());
            self.actions.push_back(Action::Refused { attempt, error });
        }
    }

    pub(super) fn gone(&mut self, attempt: AttemptId) {
        if self.remove(&attempt).is_some() {
            self.actions.push_back(Action::Gone { attempt });
        }
    }

    // ---- what comes ----

    /// A record of an attempt. Returns whether it is one that can be.
    pub(super) fn attempt_record(&mut self, now: Moment, record: &Record, content: Content) -> bool {
        let head = record.head;
        let Some(&attempt) = self.numbers.get(&head.number) else { return true };
        let Some(entry) = self.attempts.get_mut(&attempt) else { return true };
        let is_accepted = matches!(entry.stage, Stage::Accepted);
        match content {
            Content::Accepted(acceptance) if !is_accepted => {
                let again = std::mem::replace(&mut entry.was_accepted, true);
                if entry.is_named {
                    entry.named_at = now;
                }
                let task = entry.task_id;
                self.unknown_tasks.remove(&task);
                self.set_waits(attempt, None);
                self.set_stage(attempt, Stage::Accepted);
                self.actions.push_back(match again {
                    true => Action::Resumed { attempt },
                    false => Action::Accepted { attempt, acceptance },
                });
                self.end_turn();
                return true;
            }
            Content::Refused(error) if matches!(entry.stage, Stage::Posting { .. } | Stage::Sent) => {
                let task = entry.task_id;
                self.unknown_tasks.remove(&task);
                self.remove(&attempt);
                self.actions.push_back(Action::Refused { attempt, error });
                return true;
            }
            _ if !is_accepted => {
                self.dropped += 1;
                return true;
            }
            _ => {}
        }
        entry.named_at = now;
        entry.behind = None;
        let (first, taken) = (head.first, entry.taken);
        let Some(next) = first.checked_add(u64::from(head.count)) else { return false };
        if matches!(content, Content::End(_)) && first < taken {
            return false;
        }
        let brings = matches!(content, Content::Frames | Content::TokenIds(_) | Content::End(_));
        if brings && first > taken {
            self.resume_anew(now, attempt);
            return true;
        }
        match content {
            Content::Head(answer) => {
                if !std::mem::replace(&mut entry.head_taken, true) {
                    self.actions.push_back(Action::Head { attempt, head: answer });
                }
            }
            Content::Frames => {
                if next < taken || next == taken && head.count > 0 {
                    return true;
                }
                if next > taken {
                    (entry.taken, entry.fruitless) = (next, 0);
                }
                let bytes = record.bytes.clone();
                self.actions.push_back(Action::Frames { attempt, first, count: head.count, bytes });
            }
            Content::TokenIds(frames) => {
                if next > taken {
                    self.actions.push_back(Action::TokenIds { attempt, first, frames });
                }
            }
            Content::Error(error) => {
                if !std::mem::replace(&mut entry.error_taken, true) {
                    self.actions.push_back(Action::Error { attempt, error });
                }
            }
            Content::End(end) => {
                self.remove(&attempt);
                self.actions.push_back(Action::Ended { attempt, report_seq: end.report_seq });
            }
            // An acceptance that comes twice; a refusal of what was accepted; the link's own kinds.
            _ => self.dropped += 1,
        }
        true
    }

    /// What the node says that runs on this link, behind all that was ready before.
    pub(super) fn alive(&mut self, now: Moment, positions: &[Position]) {
        self.link_works();
        self.link_lives();
        let mut positions = positions.to_vec();
        positions.sort_unstable();
        let named = |number: u64| {
            let at = positions.binary_search_by_key(&number, |position| position.number).ok()?;
            Some(positions[at].next)
        };
        let (mut anew, mut silent) = (Vec::new(), Vec::new());
        let (counts, names) = (self.enforces(Rule::AliveNext), self.enforces(Rule::AliveNames));
        for (id, entry) in &mut self.attempts {
            match entry.stage {
                Stage::Accepted => {}
                // The POST was answered, and the link does not answer.
                Stage::Resuming { post: None, .. }
                    if entry.asked.is_some_and(|at| now >= at + POST_ANSWER) =>
                {
                    anew.push(*id);
                    continue;
                }
                _ => continue,
            }
            match named(entry.number) {
                Some(next) => {
                    (entry.named_at, entry.is_named) = (now, true);
                    if next <= entry.taken {
                        // Whatever it was asked for is there.
                        entry.fruitless = 0;
                    }
                    entry.behind = (counts && next > entry.taken).then(|| entry.behind.unwrap_or(now));
                    if entry.behind.is_some_and(|since| now >= since + BEHIND) {
                        anew.push(*id);
                    }
                }
                None if !names => {}
                None => {
                    let is_overdue = now >= entry.named_at + UNNAMED;
                    if is_overdue && !std::mem::replace(&mut entry.is_silent, true) {
                        silent.push(*id);
                    }
                    if !is_overdue && std::mem::replace(&mut entry.is_named, false) {
                        anew.push(*id);
                    }
                }
            }
        }
        for attempt in anew {
            self.resume_anew(now, attempt);
        }
        self.actions.extend(silent.into_iter().map(|attempt| Action::Silent { attempt }));
    }
}
