//! Streams that nodes keep: every attempt's bytes go through its node's buffer, by the production code,
//! and from there over its connection. Of those that are kept a lost connection ends nothing: the
//! control plane asks for the rest, or the node stops what nobody reads.

use std::time::Duration;

use attempt_link::content::FrameTokens;
use node_core::{Cursor, Ending, Ends, Piece, Taken};
use pool_registry_types::{AttemptId, BootId, Moment};

use super::node::Via;
use super::{Piece as Sent, What, World};

/// An attempt without a reader is stopped after 15 s, one that has ended is dropped after 60 s; the
/// node looks at least once a second.
const DETACHED_WITHIN: Duration = Duration::from_millis(17_000);
const DROPPED_WITHIN: Duration = Duration::from_millis(62_000);
/// One whose reader leaves its window full is stopped after 30 s.
const FULL_WITHIN: Duration = Duration::from_millis(32_000);
/// A control plane tries as often to have a stream resumed.
const RESUMES_EVERY_MS: u64 = 500;

/// The last that a control plane has to do with an attempt's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Closing {
    /// It orders the attempt's end.
    Stop,
    /// It has the attempt's end.
    Done,
    /// It is no more.
    Lost,
}

/// How long a node may keep something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keeps {
    Detached,
    Ended,
}

impl World {
    /// The driver of an attempt has made a frame, or comments, which go on to the reader if there is one.
    /// Returns whether it was taken: what a node keeps of an attempt is bounded.
    pub(super) fn append(
        &mut self,
        node: usize,
        attempt: AttemptId,
        via: Via,
        made: (u64, Vec<u8>, bool),
        tokens: Vec<(u64, FrameTokens)>,
    ) -> bool {
        let now = self.now;
        let (first, bytes, is_frame) = made;
        let mut ends = Ends::default();
        if is_frame {
            ends.push(bytes.len());
        }
        let Some(core) = self.nodes[node].core.as_mut() else { return true };
        let len = bytes.len();
        let is_taken =
            core.held_mut().append(now, &attempt, Piece::new(first, bytes, ends).with_tokens(tokens)).is_ok();
        let keeps = self.keeps(via);
        let (most, mut fits) = (self.plan.attempt_bytes, is_taken);
        if let Some(run) = self.nodes[node].runs.get_mut(&attempt) {
            // By a count of its own.
            fits = !keeps || run.made + len <= most;
            run.made += if is_taken { len } else { 0 };
        }
        if fits != is_taken {
            self.check(Err(format!(
                "[10] of attempt {attempt} n{node} keeps {most} bytes and takes {len} more: {is_taken}"
            )));
        }
        self.made_more(node, attempt, via, is_frame);
        self.check_held(node);
        is_taken
    }

    /// Whether the node keeps all of the attempt. One that runs on without a connection is kept.
    fn keeps(&self, via: Via) -> bool {
        match via {
            Via::Conn(conn) => self.conns.get(&conn).is_none_or(|c| c.keeps),
            Via::Link { keep } => keep,
        }
    }

    /// Whoever reads is told; a link's notice of frames may be lost.
    fn made_more(&mut self, node: usize, attempt: AttemptId, via: Via, is_frame: bool) {
        let progress = self.nodes[node].core.as_ref().and_then(|core| core.held().progress(&attempt));
        if let (Via::Link { .. }, Some((next, _))) = (via, progress) {
            let now = self.now;
            self.nodes[node].made.insert(attempt, (next, now));
        }
        match via {
            Via::Conn(conn) => self.hand_over(node, attempt, conn),
            Via::Link { .. } if is_frame && self.is_unannounced(attempt) => {
                self.coverage.hit("link: frames unannounced");
            }
            Via::Link { .. } => self.appended_to_link(node, attempt),
        }
    }

    /// Whether the driver of an attempt may go on, its reader being close enough behind. It looks again
    /// where it may not.
    pub(super) fn has_room(&mut self, node: usize, attempt: AttemptId) -> bool {
        let (boot, now, most) = (self.nodes[node].boot, self.now, self.plan.attempt_bytes);
        let sim = &mut self.nodes[node];
        let (Some(core), Some(run)) = (sim.core.as_ref(), sim.runs.get_mut(&attempt)) else { return false };
        let (has_room, unread) = (core.held().has_room(&attempt), run.made.saturating_sub(run.taken));
        if has_room {
            run.full_since = None;
            let is_read_out =
                matches!(run.via, Via::Conn(conn) if self.conns.get(&conn).is_some_and(|c| !c.keeps));
            if is_read_out && unread >= most {
                self.check(Err(format!(
                    "[10] n{node} goes on with {attempt}, {unread} bytes before its reader"
                )));
            }
            return true;
        }
        let since = *run.full_since.get_or_insert(now);
        self.coverage.hit("stream: window full");
        if now > since + FULL_WITHIN {
            // What is due now comes first.
            self.pump(node);
            if self.nodes[node].runs.contains_key(&attempt) {
                self.check(Err(format!(
                    "[10] {attempt} is held back on n{node} since {} ms",
                    since.as_millis()
                )));
            }
        }
        self.after_ms(200, What::EngineStep { node, boot, attempt });
        false
    }

    /// The driver has ended; its last bytes were appended but for these.
    pub(super) fn finish(
        &mut self,
        node: usize,
        attempt: AttemptId,
        via: Via,
        last: Option<Piece>,
        ending: Ending,
    ) {
        let now = self.now;
        let Some(core) = self.nodes[node].core.as_mut() else { return };
        let is_frame = last.is_some();
        core.held_mut().finish(now, &attempt, last, ending);
        self.made_more(node, attempt, via, is_frame);
        self.check_held(node);
        let boot = self.nodes[node].boot;
        if self.nodes[node].core.as_ref().is_some_and(|core| core.held().has_ended(&attempt)) {
            self.nodes[node].ended.push(attempt);
            self.at(
                now + DROPPED_WITHIN,
                What::HeldDue { node, boot, attempt, since: now, keeps: Keeps::Ended },
            );
        }
    }

    /// What the reader has not had yet goes over its connection.
    fn hand_over(&mut self, node: usize, attempt: AttemptId, conn: u64) {
        if self.stands_still(conn) {
            return;
        }
        loop {
            let Some(cursor) = self.conns.get_mut(&conn).and_then(|c| c.cursor.as_mut()) else { return };
            let Some(core) = self.nodes[node].core.as_mut() else { return };
            let Taken::Bytes(bytes) = core.held_mut().take(&attempt, cursor) else { return };
            if let Some(run) = self.nodes[node].runs.get_mut(&attempt) {
                run.taken += bytes.len();
            }
            let is_token = bytes.windows(TOKEN.len()).any(|window| window == TOKEN);
            self.send_bytes(conn, &bytes, is_token);
        }
    }

    /// Whether nothing is taken of an attempt for now: its connection is full, or becomes so.
    fn stands_still(&mut self, conn: u64) -> bool {
        if self.plan.slow_readers == 0 || self.conns.get(&conn).is_none_or(|c| c.cursor.is_none()) {
            return false;
        }
        let begins = self.is_drawn(self.plan.slow_readers);
        let most = if self.losing.u8(..4) == 0 { 60_000 } else { 10_000 };
        let wait = Duration::from_millis(self.losing.u64(100..most));
        let Some(c) = self.conns.get_mut(&conn) else { return false };
        let stands = c.slow_until > self.now || self.links[c.node].blocked();
        if !stands && !begins {
            return false;
        }
        (c.unreliable, c.ended_well) = (true, false);
        if !stands {
            self.coverage.hit("stream: reader slow");
            c.slow_until = self.now + wait;
            let back = c.slow_until;
            self.at(back, What::ReaderBack { conn });
        }
        true
    }

    /// Something is taken again of an attempt.
    pub(super) fn reader_back(&mut self, conn: u64) {
        if let Some(c) = self.conns.get(&conn) {
            self.hand_over(c.node, c.dispatch.attempt, conn);
        }
    }

    /// The connection of an attempt is gone at its node. One that is kept goes on without a reader.
    pub(super) fn reader_lost(&mut self, conn: u64) {
        let now = self.now;
        let Some(c) = self.conns.get_mut(&conn).filter(|c| c.keeps) else { return };
        let (node, attempt) = (c.node, c.dispatch.attempt);
        let Some(cursor) = c.cursor.take() else { return };
        self.detach(now, node, attempt, &cursor);
    }

    pub(super) fn detach(&mut self, now: Moment, node: usize, attempt: AttemptId, cursor: &Cursor) {
        let boot = self.nodes[node].boot;
        let Some(core) = self.nodes[node].core.as_mut() else { return };
        if core.held_mut().detach(now, &attempt, cursor) {
            self.coverage.hit("stream: attempt without a reader");
            let due = What::HeldDue { node, boot, attempt, since: now, keeps: Keeps::Detached };
            self.at(now + DETACHED_WITHIN, due);
        }
        self.pump(node);
    }

    /// The link of an attempt is gone, or has had all of it.
    pub(super) fn link_detached(&mut self, node: usize, attempt: AttemptId) {
        let (now, boot) = (self.now, self.nodes[node].boot);
        let Some(core) = self.nodes[node].core.as_ref() else { return };
        if core.held().detached_since(&attempt) == Some(now) && !core.held().has_ended(&attempt) {
            self.coverage.hit("stream: attempt without a reader");
            let due = What::HeldDue { node, boot, attempt, since: now, keeps: Keeps::Detached };
            self.at(now + DETACHED_WITHIN, due);
        }
        self.pump(node);
    }

    // ---- the control plane's side ----

    /// The connection of a kept attempt has broken: its node is asked for the rest. Returns whether it
    /// will be.
    pub(super) fn resumes(&mut self, life: u64, attempt: AttemptId, conn: u64) -> bool {
        let keeps = self.conns.get(&conn).is_some_and(|c| c.keeps && c.cp_open);
        if keeps {
            let wait = self.keeping.u64(1..=RESUMES_EVERY_MS);
            self.after_ms(wait, What::ResumeDue { life, attempt });
        }
        keeps
    }

    pub(crate) fn resume_due(&mut self, life: u64, attempt: AttemptId) {
        let Some((conn, from)) = self.resume_from(life, attempt) else { return };
        let Some(c) = self.conns.get(&conn) else { return };
        if self.links[c.node].blocked() {
            return self.after_ms(RESUMES_EVERY_MS, What::ResumeDue { life, attempt });
        }
        let delay = self.delay();
        self.after_ms(delay, What::ResumeArrives { conn, from });
    }

    // ---- the node's side ----

    pub(super) fn resume_arrives(&mut self, node: usize, conn: u64, from: u64) {
        let Some(c) = self.conns.get(&conn) else { return };
        let attempt = c.dispatch.attempt;
        let now = self.now;
        let resumed = self.nodes[node].core.as_mut().map(|core| core.resume(now, &attempt, from));
        let Some(c) = self.conns.get_mut(&conn) else { return };
        (c.broken, c.tail, c.slow_until) = (false, Vec::new(), Moment::ZERO);
        match resumed {
            Some(Ok(resumed)) => {
                c.cursor = Some(resumed.cursor);
                self.coverage.hit("stream: resumed");
                if c.ended_at_node {
                    self.coverage.hit("stream: end kept for its reader");
                }
                if self.is_drawn(self.plan.repeated_answers) {
                    self.coverage.hit("stream: acceptance doubled");
                    let (report_seq, replica_id) = (resumed.report_seq, resumed.replica_id);
                    self.send_piece(conn, Sent::Headers { report_seq, replica_id });
                }
                self.hand_over(node, attempt, conn);
                self.pump(node);
            }
            // Another boot, or too late.
            Some(Err(_)) | None => {
                c.keeps = false;
                self.coverage.hit("stream: not held any more");
                self.send_piece(conn, Sent::Reset("not held any more"));
            }
        }
    }

    /// The connection of a kept attempt is closed, for the reason that the control plane has left.
    pub(super) fn closing_arrives(&mut self, node: usize, attempt: AttemptId, closing: Closing) {
        let now = self.now;
        let Some(core) = self.nodes[node].core.as_mut() else { return };
        match closing {
            Closing::Done => core.held_mut().done(&attempt),
            Closing::Lost => {}
            Closing::Stop => {
                core.stopped(now, &attempt);
                if let Some(run) = self.nodes[node].runs.remove(&attempt) {
                    if let Some(core) = self.nodes[node].core.as_mut() {
                        core.ended_before_release(now, &attempt);
                    }
                    self.haunt(node, attempt, run.replica);
                }
            }
        }
    }

    // ---- the oracle ----

    /// [10] What a node keeps is bounded: what has ended goes before the bound is passed.
    fn check_held(&mut self, node: usize) {
        let sim = &mut self.nodes[node];
        let Some(core) = sim.core.as_ref() else { return };
        let held = core.held();
        sim.ended.retain(|attempt| held.has_ended(attempt));
        // What has ended and has a reader on its way may stay.
        let unread = |attempt: &&AttemptId| held.detached_since(attempt).is_some();
        let broken =
            (held.bytes() > held.bound()).then(|| sim.ended.iter().find(unread)).flatten().map(|ended| {
                format!(
                    "[10] n{node} keeps {} bytes of {} and {ended}, which has ended and nobody reads",
                    held.bytes(),
                    held.bound()
                )
            });
        self.check(broken.map_or(Ok(()), Err));
    }

    /// [10] Nothing runs without a reader, or is kept after its end, for longer than its time.
    pub(crate) fn held_due(
        &mut self,
        node: usize,
        boot: BootId,
        attempt: AttemptId,
        since: Moment,
        keeps: Keeps,
    ) {
        let sim = &self.nodes[node];
        let Some(core) = sim.core.as_ref().filter(|_| sim.boot == boot) else { return };
        let is_kept = match keeps {
            Keeps::Detached => {
                core.held().detached_since(&attempt) == Some(since) && sim.runs.contains_key(&attempt)
            }
            Keeps::Ended => core.held().has_ended(&attempt),
        };
        if !is_kept {
            return;
        }
        if sim.stopped > 0 {
            return self.after_ms(3_000, What::HeldDue { node, boot, attempt, since, keeps });
        }
        self.check(Err(format!(
            "[10] n{node} keeps attempt {attempt} since {} ms ({keeps:?})",
            since.as_millis()
        )));
    }
}

const TOKEN: &[u8] = b"\nevent: token\n";
