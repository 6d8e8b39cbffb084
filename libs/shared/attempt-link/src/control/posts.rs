//! The POSTs of a lane: starts in batches or alone, and control, which waits for neither.

use std::collections::BTreeSet;

use bytes::Bytes;
use pool_registry_types::{AttemptId, Moment};

use super::attempts::{Stage, Unsent};
use super::link::{Connection, ResumeTurn};
use super::{
    Action, ControlAnswer, ControlBody, ControlLane, Interrupted, MAX_DONE, MAX_SINGLES, POST_ANSWER,
    POST_RETRY, POST_STUCK, SEEN_EVERY,
};
use crate::Rule;
use crate::wire::{
    LinkKey, MAX_IDS, MAX_SEEN, MAX_STARTS, MAX_STARTS_BYTES, ResumeOrder, Seen, WrittenStart, write_single,
    write_starts,
};

/// Starts, and ids of what is done, that one POST has: a node takes them in one turn of a thread on which
/// streams live. Source: .specs/01 CLOUD-2604.
const STARTS_AT_ONCE: usize = MAX_STARTS / 4;
const DONE_AT_ONCE: usize = MAX_IDS / 8;

/// A POST of a lane; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PostId(u64);

/// What is sent, and where to.
#[derive(Debug, Clone, PartialEq)]
pub enum PostRequest {
    /// `POST /v2/attempts`.
    Starts(Bytes),
    /// `POST /v2/attempts/{attempt_id}`: both pieces are its body.
    Single { attempt: AttemptId, body: [Bytes; 2] },
    /// `POST /v2/attempts/control`.
    Control(ControlBody),
}

/// What became of a POST.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PostOutcome {
    /// 200, with what is said of resumes; nothing of them where it was another POST.
    Answered(ControlAnswer),
    /// `409 STALE_LINK`.
    Stale,
    /// Another status.
    Status(u16),
    /// Its connection could not be made: no byte of it has left.
    NotSent,
    /// Its connection broke.
    Broken,
}

#[derive(Debug)]
enum PostKind {
    Starts {
        attempts: Vec<AttemptId>,
        seen: Vec<(AttemptId, u64)>,
        done: Vec<AttemptId>,
    },
    Single(AttemptId),
    /// `names`: it is the first of its link, behind which another one may go at once.
    Control {
        stops: Vec<AttemptId>,
        resumes: Vec<AttemptId>,
        names: bool,
    },
}

/// A POST that was not answered.
#[derive(Debug)]
pub(super) struct Post {
    n: u64,
    kind: PostKind,
    /// When a byte of it was taken last, or it began.
    progress: Moment,
    /// When the last one was.
    sent: Option<Moment>,
}

impl Post {
    /// The attempts whose starts are in it.
    fn starts(&self) -> Vec<AttemptId> {
        match &self.kind {
            PostKind::Starts { attempts, .. } => attempts.clone(),
            PostKind::Single(attempt) => vec![*attempt],
            PostKind::Control { .. } => Vec::new(),
        }
    }

    pub(super) fn deadline(&self) -> Moment {
        self.sent.map_or(self.progress + POST_STUCK, |sent| sent + POST_ANSWER)
    }
}

impl ControlLane {
    fn key(&self, n: u64) -> LinkKey {
        LinkKey { life: self.life, lane: self.lane, n }
    }

    fn send(&mut self, now: Moment, n: u64, kind: PostKind, request: PostRequest, fresh: bool) -> PostId {
        self.post += 1;
        let id = PostId(self.post);
        // A payload may take its time.
        if !matches!(kind, PostKind::Single(_)) {
            self.undelivered.get_or_insert(now);
        }
        self.posts.insert(id, Post { n, kind, progress: now, sent: None });
        self.actions.push_back(Action::Post { id, request, fresh });
        id
    }

    // ---- what goes ----

    /// Whether no POST of starts is under way on this link.
    pub(super) fn idle_starts(&self, n: u64) -> bool {
        !self.posts.values().any(|post| post.n == n && matches!(post.kind, PostKind::Starts { .. }))
    }

    pub(super) fn has_room_for_single(&self) -> bool {
        self.posts.values().filter(|post| matches!(post.kind, PostKind::Single(_))).count() < MAX_SINGLES
    }

    /// Whether a POST goes even where it says nothing: attempts run, or it is to be shown that one arrives.
    pub(super) fn wants_answers(&self) -> bool {
        let is_wanted = self.attempts.len() > self.unsent() || self.undelivered.is_some() || self.suspected;
        is_wanted && self.enforces(Rule::SeenSent)
    }

    fn idle_control(&self) -> bool {
        !self.posts.values().any(|post| matches!(post.kind, PostKind::Control { names: false, .. }))
    }

    /// Whether a control POST is wanted and may go.
    pub(super) fn has_control_work(&self, connection: &Connection) -> bool {
        let resumes = connection.turn != ResumeTurn::Waiting && !self.to_resume.is_empty();
        (!connection.named || resumes || self.stops.has_unsent()) && self.idle_control()
    }

    pub(super) fn post_control(&mut self, now: Moment) {
        let Some(connection) = self.connection() else { return };
        if now < self.control_after || !self.has_control_work(connection) {
            return;
        }
        let (n, may_resume) = (connection.n, connection.turn != ResumeTurn::Waiting);
        let names = !connection.named && !may_resume;
        let LinkKey { life, lane, n } = self.key(n);
        let stops = self.stops.post(now, PostId(self.post + 1), MAX_IDS);
        let mut resumes = Vec::new();
        while may_resume && resumes.len() < MAX_IDS {
            let Some(attempt) = self.to_resume.pop_first() else { break };
            let number = self.number_to_resume(attempt);
            let Some(entry) = self.attempts.get_mut(&attempt) else { continue };
            let (log_id, from) = (entry.log_id, entry.reckoned.take().unwrap_or(entry.taken));
            // It comes again behind the last frame; whoever goes on forgets the one before.
            entry.error_taken = false;
            self.actions.push_back(Action::Restart { attempt, from });
            resumes.push(ResumeOrder { attempt_id: attempt, log_id, from, number });
        }
        let resumed: Vec<AttemptId> = resumes.iter().map(|resume| resume.attempt_id).collect();
        let kind = PostKind::Control { stops: stops.clone(), resumes: resumed.clone(), names };
        let request = PostRequest::Control(ControlBody { life, lane, n, cancel: stops, resume: resumes });
        let fresh = std::mem::take(&mut self.fresh_control);
        let id = self.send(now, n, kind, request, fresh);
        for attempt in resumed {
            self.posted_resume(attempt, Some(id));
        }
        if let Some(connection) = self.connection_mut() {
            connection.named = true;
        }
    }

    pub(super) fn post_starts(&mut self, now: Moment) {
        let Some(connection) = self.connection() else { return };
        let n = connection.n;
        let seen_due = now >= self.next_seen && self.wants_answers();
        let done_due = self.done_due.is_some_and(|at| now >= at);
        let is_due = !self.queue.is_empty() || seen_due || done_due;
        if now < self.starts_after || !is_due || !self.idle_starts(n) {
            return;
        }
        let (mut attempts, mut starts, mut bytes) = (Vec::new(), Vec::new(), 0);
        let id = PostId(self.post + 1);
        while let Some((place, attempt)) = self.queue.first_key_value().map(|(place, id)| (*place, *id))
            && attempts.len() < STARTS_AT_ONCE
        {
            let Some(written) = self.write(now, attempt) else {
                self.queue.pop_first();
                continue;
            };
            if written.goes_alone() {
                // It was taken for shorter, or its number has made it longer.
                self.queue.pop_first();
                self.large.insert(place, attempt);
                continue;
            }
            bytes += written.bytes();
            if bytes > MAX_STARTS_BYTES {
                break;
            }
            self.queue.pop_first();
            self.posting(attempt, id);
            attempts.push(attempt);
            starts.push(written);
        }
        let mut news = Vec::new();
        if now >= self.next_seen {
            let more =
                self.attempts.iter().filter(|(_, entry)| entry.taken > entry.seen && entry.number != 0);
            news.extend(more.map(|(id, entry)| (*id, entry.number, entry.taken)).take(MAX_SEEN));
            self.next_seen = if news.len() < MAX_SEEN { now + SEEN_EVERY } else { now };
        }
        let positions: Vec<Seen> = news.iter().map(|&(_, number, next)| Seen { number, next }).collect();
        let seen = news.into_iter().map(|(attempt, _, taken)| (attempt, taken)).collect();
        let done: Vec<AttemptId> = self.done.drain(..self.done.len().min(DONE_AT_ONCE)).collect();
        self.done_due = (!self.done.is_empty()).then_some(now);
        let body = write_starts(self.key(n), &starts, &positions, &done)
            .expect("a POST is filled up to its bounds only");
        let fresh = std::mem::take(&mut self.fresh_starts);
        self.send(now, n, PostKind::Starts { attempts, seen, done }, PostRequest::Starts(body), fresh);
    }

    pub(super) fn post_singles(&mut self, now: Moment) {
        let Some(connection) = self.connection() else { return };
        let n = connection.n;
        while now >= self.starts_after
            && self.has_room_for_single()
            && let Some((_, attempt)) = self.large.pop_first()
        {
            let Some(written) = self.write(now, attempt) else { continue };
            let body = match write_single(self.key(n), &written) {
                Ok(body) => body,
                Err(error) => {
                    self.refuse_unwritten(attempt, error);
                    continue;
                }
            };
            let request = PostRequest::Single { attempt, body };
            let id = self.send(now, n, PostKind::Single(attempt), request, false);
            self.posting(attempt, id);
        }
    }

    /// Writes a start as it goes now: under a new number, with what is left of its time.
    fn write(&mut self, now: Moment, attempt: AttemptId) -> Option<WrittenStart> {
        let number = self.number(attempt);
        let Stage::Queued(unsent) = &mut self.attempts.get_mut(&attempt)?.stage else { return None };
        let Unsent { start, since, .. } = &mut **unsent;
        start.facts.number = number;
        if let Some(left) = &mut start.facts.deadline_ms {
            *left = left.saturating_sub(now.millis_since(*since));
        }
        *since = now;
        Some(unsent.write())
    }

    /// The attempt is asked for by this POST, or by one that was answered.
    fn posted_resume(&mut self, attempt: AttemptId, by: Option<PostId>) {
        if let Some(Stage::Resuming { post, .. }) =
            self.attempts.get_mut(&attempt).map(|entry| &mut entry.stage)
        {
            *post = by;
        }
    }

    fn posting(&mut self, attempt: AttemptId, post: PostId) {
        let Some(entry) = self.attempts.get_mut(&attempt) else { return };
        if let Stage::Queued(start) = std::mem::replace(&mut entry.stage, Stage::Sent) {
            entry.stage = Stage::Posting { start, post };
        }
    }

    // ---- what becomes of it ----

    /// Bytes of the POST were taken by its connection.
    pub fn post_progress(&mut self, now: Moment, id: PostId) {
        if let Some(post) = self.posts.get_mut(&id) {
            post.progress = now;
        }
    }

    /// The last byte of the POST was taken by its connection.
    pub fn post_sent(&mut self, now: Moment, id: PostId) {
        let Some(post) = self.posts.get_mut(&id) else { return };
        if post.sent.is_some() {
            return;
        }
        post.sent = Some(now);
        let (attempts, starts) = match &post.kind {
            PostKind::Control { resumes, .. } => (resumes.clone(), false),
            _ => (post.starts(), true),
        };
        self.undelivered.get_or_insert(now);
        for attempt in attempts {
            let waits = match self.attempts.get(&attempt).map(|entry| &entry.stage) {
                Some(Stage::Posting { post, .. } | Stage::Resuming { post: Some(post), .. }) => *post == id,
                _ => false,
            };
            if waits {
                self.wait(now, attempt);
                if starts {
                    self.actions.push_back(Action::Sent { attempt });
                }
            }
        }
    }

    /// The POST has come to an end.
    pub fn post_ended(&mut self, now: Moment, id: PostId, outcome: PostOutcome) {
        if matches!(outcome, PostOutcome::Answered(_)) {
            // An answer says so too.
            self.post_sent(now, id);
        }
        let Some(post) = self.posts.remove(&id) else { return };
        let arrived = matches!(outcome, PostOutcome::Answered(_) | PostOutcome::Stale);
        if arrived {
            self.undelivered = None;
            self.answered_at = now;
            if std::mem::take(&mut self.suspected) {
                self.actions.push_back(Action::OrdersArrive);
            }
        }
        match outcome {
            PostOutcome::Answered(answer) => self.answered(now, id, post, &answer),
            PostOutcome::Stale => self.stale(now, id, post),
            PostOutcome::Status(status) => {
                self.actions.push_back(Action::PostStatus { status });
                self.undo(now, id, post, false);
                if matches!(status, 401 | 403) {
                    self.replace(now);
                }
            }
            PostOutcome::NotSent => {
                self.actions.push_back(Action::CannotConnect);
                self.requeue(id, post.starts());
                if self.is_current(post.n) {
                    (self.starts_after, self.control_after) = (now + POST_RETRY, now + POST_RETRY);
                }
                self.undo(now, id, post, false);
            }
            PostOutcome::Broken => self.undo(now, id, post, true),
        }
        self.advance(now);
    }

    /// It was read; the link answers.
    fn answered(&mut self, now: Moment, id: PostId, post: Post, answer: &ControlAnswer) {
        match post.kind {
            PostKind::Starts { attempts, seen, .. } => {
                for (attempt, next) in seen {
                    if let Some(entry) = self.attempts.get_mut(&attempt) {
                        entry.seen = entry.seen.max(next);
                    }
                }
                self.starts_sent(now, id, post.n, attempts);
            }
            PostKind::Single(attempt) => self.starts_sent(now, id, post.n, vec![attempt]),
            PostKind::Control { stops, resumes, .. } => {
                for stop in stops {
                    self.stops.remove(&stop);
                }
                let unknown: BTreeSet<&AttemptId> = answer.unknown.iter().collect();
                let gone: BTreeSet<&AttemptId> = answer.gone.iter().collect();
                for attempt in resumes {
                    if !self.is_resuming(attempt, id) {
                        continue;
                    }
                    if unknown.contains(&attempt) {
                        self.unknown(now, attempt);
                    } else if gone.contains(&attempt) {
                        self.gone(attempt);
                    } else {
                        self.posted_resume(attempt, None);
                        self.asked(now, attempt);
                    }
                }
            }
        }
    }

    /// The link is to answer.
    fn asked(&mut self, now: Moment, attempt: AttemptId) {
        self.wait(now, attempt);
        if let Some(entry) = self.attempts.get_mut(&attempt) {
            entry.asked = Some(now);
        }
    }

    /// Starts that were read, or may have been.
    fn starts_sent(&mut self, now: Moment, id: PostId, n: u64, attempts: Vec<AttemptId>) {
        let is_current = self.is_current(n);
        for attempt in
            attempts.into_iter().filter(|attempt| self.is_posting(*attempt, id)).collect::<Vec<_>>()
        {
            self.set_sent(attempt, true);
            if !is_current && self.connection().is_some() {
                // What answered them is not read any more.
                self.resume(now, attempt);
            }
        }
    }

    fn set_sent(&mut self, attempt: AttemptId, may_be_there: bool) {
        self.set_stage(attempt, Stage::Sent);
        if let Some(entry) = self.attempts.get_mut(&attempt) {
            entry.may_be_there = may_be_there;
        }
    }

    fn is_posting(&self, attempt: AttemptId, id: PostId) -> bool {
        let stage = self.attempts.get(&attempt).map(|entry| &entry.stage);
        matches!(stage, Some(Stage::Posting { post, .. }) if *post == id)
    }

    fn is_resuming(&self, attempt: AttemptId, id: PostId) -> bool {
        let stage = self.attempts.get(&attempt).map(|entry| &entry.stage);
        matches!(stage, Some(Stage::Resuming { post: Some(post), .. }) if *post == id)
    }

    /// The node does not know its link: stops and what is done counted, the rest was not read.
    fn stale(&mut self, now: Moment, id: PostId, post: Post) {
        self.requeue(id, post.starts());
        let n = post.n;
        if let PostKind::Control { stops, resumes, .. } = post.kind {
            for stop in stops {
                self.stops.remove(&stop);
            }
            self.resume_again(now, id, resumes);
        }
        if self.is_current(n) {
            self.interrupt(now, Interrupted::Stale);
        }
    }

    /// Starts that were not read go under the present link, the oldest first.
    fn requeue(&mut self, id: PostId, attempts: Vec<AttemptId>) {
        for attempt in attempts {
            if !self.is_posting(attempt, id) {
                continue;
            }
            self.set_waits(attempt, None);
            let Some(entry) = self.attempts.get_mut(&attempt) else { continue };
            if let Stage::Posting { start, .. } = std::mem::replace(&mut entry.stage, Stage::Sent) {
                self.enqueue(attempt, start);
            }
        }
    }

    fn resume_again(&mut self, now: Moment, id: PostId, resumes: Vec<AttemptId>) {
        for attempt in resumes {
            if self.is_resuming(attempt, id) {
                self.resume(now, attempt);
            }
        }
    }

    /// Nobody knows whether it was read: starts are asked for, the rest goes again.
    fn undo(&mut self, now: Moment, id: PostId, post: Post, may_be_there: bool) {
        // What went wrong on a link before holds up nothing of this one.
        let retry = if self.is_current(post.n) { now + POST_RETRY } else { now };
        match post.kind {
            PostKind::Starts { attempts, done, .. } => {
                self.starts_after = self.starts_after.max(retry);
                self.fresh_starts = true;
                self.next_seen = now;
                for attempt in done.into_iter().rev().take(MAX_DONE - self.done.len().min(MAX_DONE)) {
                    self.done.push_front(attempt);
                }
                self.done_due = (!self.done.is_empty()).then_some(now);
                self.ask_for(now, id, attempts, may_be_there);
            }
            PostKind::Single(attempt) => self.ask_for(now, id, vec![attempt], may_be_there),
            PostKind::Control { stops, resumes, .. } => {
                self.control_after = self.control_after.max(retry);
                self.fresh_control = true;
                for stop in stops {
                    if self.enforces(Rule::StopKept) {
                        self.stops.again(stop, id);
                    } else {
                        self.stops.remove(&stop);
                    }
                }
                self.resume_again(now, id, resumes);
            }
        }
    }

    /// Starts of a POST that was given up. Those that the link has answered are none of them.
    fn ask_for(&mut self, now: Moment, id: PostId, attempts: Vec<AttemptId>, may_be_there: bool) {
        if !self.enforces(Rule::StartOnce) {
            return self.requeue(id, attempts);
        }
        self.fresh_control = true;
        for attempt in attempts {
            if self.is_posting(attempt, id) {
                self.set_sent(attempt, may_be_there);
                if self.connection().is_some() {
                    self.resume(now, attempt);
                }
            }
        }
    }

    pub(super) fn expire_posts(&mut self, now: Moment) {
        let overdue = |post: &Post| now >= post.deadline();
        while let Some(id) = self.posts.iter().find(|(_, post)| overdue(post)).map(|(id, _)| *id) {
            self.give_up(now, id);
        }
    }

    fn give_up(&mut self, now: Moment, id: PostId) {
        let Some(post) = self.posts.remove(&id) else { return };
        self.actions.push_back(Action::AbandonPost { id });
        if post.progress >= self.answered_at && self.is_current(post.n) {
            self.undelivered.get_or_insert(post.progress);
        }
        self.undo(now, id, post, true);
    }

    /// Control of a link before: what it says goes with the first POST of the new one.
    pub(super) fn abandon_control(&mut self, now: Moment) {
        let is_control = |post: &Post| matches!(post.kind, PostKind::Control { .. });
        while let Some(id) = self.posts.iter().find(|(_, post)| is_control(post)).map(|(id, _)| *id) {
            self.give_up(now, id);
        }
    }

    /// A payload that nobody wants any more need not go up.
    pub(super) fn abandon_single(&mut self, id: PostId) {
        if self.posts.get(&id).is_some_and(|post| matches!(post.kind, PostKind::Single(_))) {
            self.posts.remove(&id);
            self.actions.push_back(Action::AbandonPost { id });
        }
    }
}
