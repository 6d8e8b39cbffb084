//! What is promised of links, held against what was done to them.
//!
//! [11] A start is asked of an engine once at most; what is handed out of an attempt is its own; a link
//! that nothing befalls does not break; and one that is away for less than nine seconds, with both ends
//! alive, costs no attempt, whatever becomes of the heartbeats meanwhile.

use std::collections::BTreeSet;
use std::time::Duration;

use attempt_link::control::{Action as LaneAction, Interrupted, LaneState};
use attempt_link::wire::LinkKey;
use pool_registry_types::{AttemptId, BootId, Moment};
use task_scheduler::{HowEnded, Overdue};

use super::super::node::Via;
use super::super::{DoneDue, What, World};
use super::Down;

/// A link that is away for less costs nothing.
const FREE: Duration = Duration::from_millis(8_500);
/// Troubles that follow each other so closely are one: the link may not be back between them.
const APART: Duration = Duration::from_secs(4);
/// What was lost by a trouble is noticed within this after it.
const NOTICED: Duration = Duration::from_secs(15);
/// A stop arrives within this.
const WELL_FOR: Duration = Duration::from_secs(3);
/// What is done arrives within this: a POST that a trouble has swallowed is given up after 5 s and sent again
/// half a second later.
const DONE_ARRIVES: Duration = Duration::from_secs(6);
/// What a node has made is with the control plane within this, also where its link was not told.
const BROUGHT: Duration = Duration::from_secs(6);
/// So long a reader may leave its window full.
const WINDOW: Duration = Duration::from_secs(30);
/// A slot is free so long after the last POST of a control plane that is gone.
const GONE: Duration = Duration::from_secs(27);
/// A link is dialled, answered, and what it has missed is there.
const BACK: Duration = Duration::from_secs(10);

/// What befalls the links of one node.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Watch {
    troubles: u32,
    /// Of the present trouble, or the last one.
    began: Moment,
    ended: Moment,
    /// Until then attempts may be lost.
    excused: Moment,
}

impl Watch {
    pub(crate) fn begins(&mut self, now: Moment) {
        if self.troubles == 0 && now > self.ended + APART {
            self.began = now;
        }
        self.troubles += 1;
    }

    pub(crate) fn ends(&mut self, now: Moment) {
        self.troubles -= 1;
        self.ended = now;
    }

    /// A process was gone or stood still: attempts may be lost by it.
    pub(crate) fn is_excused(&mut self, now: Moment) {
        self.excused = self.excused.max(now + NOTICED);
    }

    pub(crate) fn is_troubled(&self, now: Moment) -> bool {
        self.troubles > 0 || now < self.excused
    }

    /// How long the present trouble lasts.
    pub(crate) fn lasts(&self, now: Moment) -> Duration {
        if self.troubles > 0 { now.since(self.began) } else { Duration::ZERO }
    }

    fn is_calm(&self, now: Moment, since: Duration) -> bool {
        !self.is_troubled(now) && (self.ended == Moment::ZERO || now > self.ended + since)
    }

    fn may_lose(&self, now: Moment) -> bool {
        if now < self.excused {
            return true;
        }
        match self.troubles {
            0 => now < self.ended + NOTICED && self.ended.since(self.began) > FREE,
            _ => now.since(self.began) > FREE,
        }
    }
}

impl World {
    pub(super) fn long_stalled(&self) -> bool {
        let until = self.oracle.stalled_until;
        until != Moment::ZERO && self.now < until + NOTICED
    }

    /// Whether orders reach the node by its link for a while now.
    pub(crate) fn link_is_well(&self, node: usize) -> bool {
        self.control.is_some()
            && self.stall_until.is_none()
            && !self.long_stalled()
            && self.nodes[node].stopped == 0
            && self.node_faults[node].0.is_none()
            && self.watches[node].is_calm(self.now, WELL_FOR)
            && self.links[node].is_calm(self.now)
            && self.up_since(node).is_some_and(|since| self.now > since + WELL_FOR)
    }

    pub(super) fn link_connects(&mut self, node: usize) {
        if self.links[node].blocked() {
            return;
        }
        let others = self
            .gets
            .values()
            .filter(|get| get.node == node && get.life == self.lives && !get.cp_open && get.conn.is_some());
        if others.count() > 1 {
            self.coverage.hit("link: several dials came alive");
        }
    }

    /// [11] A link that nothing befalls does not break.
    pub(super) fn link_interrupted(&mut self, node: usize, reason: Interrupted) {
        self.coverage.hit(match reason {
            Interrupted::Broken => "link: interrupted, broken",
            Interrupted::Silent => "link: interrupted, silent",
            Interrupted::Stale => "link: interrupted, stale",
            Interrupted::Credential => "link: interrupted, credential",
            Interrupted::BadRecord => {
                return self.check(Err(format!("[11] the link of n{node} brings what is no record")));
            }
        });
        let is_spoiled =
            self.gets.values().any(|get| get.node == node && get.life == self.lives && get.spoiled);
        if reason == Interrupted::Silent && self.unread_links.contains(&node) {
            return self.check(Err(format!("[11] the link of n{node} is silent, and has brought something")));
        }
        let is_calm = self.watches[node].is_calm(self.now, NOTICED) && !self.long_stalled();
        if is_calm && !is_spoiled && self.links[node].is_calm(self.now) {
            self.check(Err(format!(
                "[11] the link of n{node} is interrupted ({reason:?}), and nothing befell it"
            )));
        }
    }

    /// [11] What a lane hands out of an attempt is that attempt's own.
    pub(super) fn check_frames(&mut self, attempt: AttemptId, action: &LaneAction) {
        let LaneAction::Frames { bytes, .. } = action else { return };
        let own = format!("\"t\":\"{attempt} ");
        let text = String::from_utf8_lossy(bytes);
        if text.matches("\"t\":\"").count() != text.matches(&own).count() {
            self.check(Err(format!("[11] {attempt} is given frames of another attempt")));
        }
    }

    /// [11] An engine is asked for an attempt once.
    pub(crate) fn engine_is_asked(&mut self, node: usize, attempt: AttemptId) {
        if !self.asked.insert(attempt) {
            self.check(Err(format!("[11] an engine of n{node} is asked for {attempt} a second time")));
        }
    }

    /// [11] How an attempt by a link may end.
    pub(crate) fn link_attempt_ends(
        &self,
        node: usize,
        attempt: AttemptId,
        accepted: bool,
        how: &HowEnded,
        tokens_written: u64,
    ) -> Result<(), String> {
        let may_lose = self.watches[node].may_lose(self.now);
        match how {
            HowEnded::TimedOut(Overdue::FirstToken | Overdue::TokenIdle)
                if self.link_is_well(node) && self.watches[node].is_calm(self.now, NOTICED) =>
            {
                let made = self.nodes[node].made.get(&attempt);
                match made.filter(|(next, at)| *next > tokens_written && self.now > *at + BROUGHT) {
                    Some((next, _)) => Err(format!(
                        "[11] {attempt} is overdue at {tokens_written}, and n{node} has {next} of it"
                    )),
                    None => Ok(()),
                }
            }
            HowEnded::OwnDefect(why) => Err(format!("[11] {attempt} ends by a defect: {why}")),
            // What has ended goes where there is no room for it.
            HowEnded::Broken(why) if why.contains("does not hold it") && self.plan.held_bytes < 1 << 20 => {
                Ok(())
            }
            HowEnded::TimedOut(Overdue::Silence) if self.is_stuck(attempt) => Ok(()),
            HowEnded::Broken(_) | HowEnded::TimedOut(Overdue::Silence) if accepted && !may_lose => {
                Err(format!("[11] {attempt} on n{node} is lost by its link: {how:?}"))
            }
            _ => Ok(()),
        }
    }

    /// [11] At rest each link is up, unless something befell it lately.
    pub(crate) fn links_at_rest(&self) -> Result<(), String> {
        if self.control.is_none() || self.stall_until.is_some() || self.long_stalled() {
            return Ok(());
        }
        for node in 0..self.nodes.len() {
            let is_there = self.nodes[node].core.is_some() && self.nodes[node].stopped == 0;
            let is_calm = self.watches[node].is_calm(self.now, BACK) && self.links[node].is_calm(self.now);
            let has_registered = self.now > self.nodes[node].started + BACK;
            let is_well = is_there && is_calm && has_registered && self.node_faults[node].0.is_none();
            let Some((state, since)) = self.lane_state(node).filter(|_| is_well) else { continue };
            let is_there = matches!(state, LaneState::Up | LaneState::None);
            if !is_there && self.now > since + BACK {
                return Err(format!("[11] the link of n{node} is not up: {state:?}"));
            }
        }
        Ok(())
    }

    /// An attempt's end is in its log: its node is to be told.
    pub(crate) fn link_is_done(&mut self, node: usize, attempt: AttemptId) {
        let (life, boot, boots) = (self.lives, self.nodes[node].boot, self.lane_boots(node));
        self.lane_is_done(node, attempt);
        self.after_ms(5_000, What::DoneDue(DoneDue { life, node, boot, boots, attempt }));
    }

    /// [11] What is done does not stay with a node whose link lives.
    pub(crate) fn done_due(&mut self, due: DoneDue) {
        let DoneDue { life, node, boot, boots, attempt } = due;
        let sim = &self.nodes[node];
        let is_held =
            sim.boot == boot && sim.core.as_ref().is_some_and(|core| core.held().contains(&attempt));
        // A registration that arrives late is one of another boot, which was told nothing.
        if !is_held || life != self.lives || boots != self.lane_boots(node) {
            return;
        }
        if self.link_is_well(node) && self.watches[node].is_calm(self.now, DONE_ARRIVES) {
            return self.check(Err(format!("[11] {attempt} is done, and n{node} keeps it")));
        }
        self.after_ms(5_000, What::DoneDue(due));
    }

    /// [11] A control plane that is gone costs a slot no longer than half a minute, also where nobody
    /// heard that it is gone, and no other one came.
    pub(crate) fn life_due(&mut self, life: u64) {
        if life != self.lives || self.control.is_some() {
            return;
        }
        for node in 0..self.nodes.len() {
            let sim = &self.nodes[node];
            let by_link = sim.runs.values().filter(|run| matches!(run.via, Via::Link { .. }));
            // Its last POST may have been on its way for long.
            let is_posted = self.now < self.wires[node].posted + GONE;
            let is_excused = sim.stopped > 0 || is_posted || self.watches[node].may_lose(self.now);
            if by_link.count() > 0 && !is_excused {
                self.check(Err(format!("[11] n{node} works for a control plane that is gone")));
            }
        }
    }

    /// [11] Nothing is stopped because it is not read while its link lives.
    pub(crate) fn check_window(&mut self, node: usize, attempt: AttemptId) {
        let sim = &self.nodes[node];
        let is_linked = sim.runs.get(&attempt).is_some_and(|run| matches!(run.via, Via::Link { .. }));
        let detached = sim.core.as_ref().and_then(|core| core.held().detached_since(&attempt));
        let is_up = self.up_since(node).is_some_and(|since| self.now > since + WINDOW);
        let is_open = self.control.as_ref().is_some_and(|control| control.is_open(attempt));
        if is_linked && detached.is_none() && is_up && is_open && self.link_is_well(node) {
            self.check(Err(format!("[11] {attempt} is stopped on n{node} for its window, and is read")));
        }
    }

    /// Whether its link is not told of the attempt's frames.
    pub(crate) fn is_unannounced(&self, attempt: AttemptId) -> bool {
        let drawn = u32::try_from(attempt.0.as_u128() % 1_009).unwrap_or(u32::MAX);
        drawn < self.plan.links.unannounced
    }

    /// [11] A link of which nothing comes any more is noticed, also where nothing says so.
    pub(crate) fn dead_due(&mut self, life: u64, node: usize, n: u64) {
        let is_read = self.control.is_some()
            && life == self.lives
            && self.get_of(node, n).is_some_and(|get| self.gets.get(&get).is_some_and(|get| get.cp_open));
        if is_read && self.stall_until.is_none() && !self.long_stalled() {
            self.check(Err(format!("[11] link {n} of n{node} is read, and has been gone for 30 s")));
        }
    }

    /// The nodes of whose links something waits to be read.
    pub(crate) fn links_that_brought(&self, messages: &[What]) -> BTreeSet<usize> {
        let brings = |what: &What| match what {
            What::DownArrives { get, piece: Down::Bytes(_) } => {
                self.gets.get(get).filter(|get| get.cp_open && get.life == self.lives).map(|get| get.node)
            }
            _ => None,
        };
        messages.iter().filter_map(brings).collect()
    }

    /// Whether the attempt's driver is one that stands still.
    pub(crate) fn is_stuck(&self, attempt: AttemptId) -> bool {
        let drawn = u32::try_from(attempt.0.as_u128() % 1_013).unwrap_or(u32::MAX);
        drawn < self.plan.links.stuck
    }

    pub(crate) fn stands_still_at(&mut self, node: usize, attempt: AttemptId) {
        self.coverage.hit("link: driver stands still");
        let (life, boot) = (self.lives, self.nodes[node].boot);
        if let Some(run) = self.nodes[node].runs.get_mut(&attempt) {
            run.stuck = true;
        }
        self.after_ms(15_000, What::StuckDue { life, node, boot, attempt });
    }

    /// [11] An attempt of which its node does not say that it lives is silent.
    pub(crate) fn stuck_due(&mut self, life: u64, node: usize, boot: BootId, attempt: AttemptId) {
        let is_open = self.control.as_ref().is_some_and(|control| control.is_open(attempt));
        if !is_open || life != self.lives || boot != self.nodes[node].boot {
            return;
        }
        let is_up = self.up_since(node).is_some_and(|since| self.now > since + NOTICED);
        if is_up && self.link_is_well(node) && self.watches[node].is_calm(self.now, NOTICED) {
            return self.check(Err(format!("[11] {attempt} stands still on n{node}, and is not given up")));
        }
        self.after_ms(5_000, What::StuckDue { life, node, boot, attempt });
    }

    /// [11] A link that was replaced is not read any more, and the one that replaces it begins with what
    /// it asks for itself. Keys rise, those of lives too.
    pub(crate) fn check_named(&mut self, node: usize, key: LinkKey, ids: &[AttemptId]) {
        let sim = &mut self.nodes[node];
        let before = sim.named.replace(key);
        if before == Some(key) {
            return;
        }
        let Some(core) = sim.core.as_ref() else { return };
        let is_read = |id: &AttemptId| !ids.contains(id) && core.held().detached_since(id).is_none();
        let mut by_link = sim.runs.iter().filter(|(_, run)| matches!(run.via, Via::Link { .. }));
        let broken = if before.is_some_and(|before| before > key) {
            Some(format!("[11] n{node} has read a POST of a link before: {key:?}"))
        } else {
            let left = by_link.find(|(id, _)| is_read(id));
            left.map(|(id, _)| format!("[11] {id} is on a link of n{node} that has not asked for it"))
        };
        self.check(broken.map_or(Ok(()), Err));
    }
}
