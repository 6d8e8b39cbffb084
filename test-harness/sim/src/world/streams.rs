//! What becomes of streams outside of the cores: bytes that are doubled, cut anywhere or lost with their
//! connection, readers who are slow and take little, and attempts that were to stop.

use pool_registry_types::{AttemptId, BootId, LogId, Moment, TaskId};
use task_scheduler::HowEnded;

use super::{Piece, What, World};
use crate::transcript::Transcript;

/// An attempt that the control plane has ended runs no longer than this on a node that is reached.
pub(crate) const STOPPED_WITHIN_MS: u64 = 3_000;
/// A reader looks at its log as often as this, also when nobody wakes it.
const LOOKS_EVERY_MS: u64 = 5_000;

/// What became of the order to stop an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The node has ended it.
    NotNeeded,
    Sent,
    /// It never arrives.
    Lost,
    /// It is kept until its link has brought it, for as long as the control plane lives.
    ByLink {
        life: u64,
    },
}

/// One client's reader of one task, over all lives of the control plane.
#[derive(Debug, Default)]
pub(crate) struct Client {
    /// One for each log that it was shown, in their order.
    pub(crate) transcripts: Vec<Transcript>,
    /// It sleeps until it is woken or looks by itself.
    sleeps: bool,
    /// The look that is to come; those before are void.
    look: u64,
}

impl World {
    /// Sends bytes of a stream to the control plane, as they are or as the schedule spoils them.
    /// `whole` frames may come twice, and what follows them may be cut off and come later.
    pub(crate) fn send_bytes(&mut self, conn: u64, bytes: &[u8], whole: bool) {
        if self.is_drawn(self.plan.lost_pieces) {
            return self.loses(conn);
        }
        let keeps = self.conns.get(&conn).is_some_and(|c| c.keeps);
        if whole && keeps && self.keeping.u32(..1_000) < self.plan.link_breaks {
            return self.breaks(conn);
        }
        let rate = if whole { self.plan.stream_faults } else { 0 };
        let drawn = if rate > 0 { self.streams.u32(..1_000) } else { 1_000 };
        let Some(c) = self.conns.get_mut(&conn).filter(|c| !c.broken) else { return };
        let mut all = std::mem::take(&mut c.tail);
        all.extend_from_slice(bytes);
        if drawn < rate {
            return self.breaks(conn);
        }
        if drawn < rate * 4 {
            all.extend_from_slice(bytes);
            self.coverage.hit("stream: frames doubled");
        } else if drawn < rate * 12 {
            c.tail = all.split_off(self.streams.usize(..all.len()));
            self.coverage.hit("stream: frame cut");
        }
        if !all.is_empty() {
            self.send_piece(conn, Piece::Bytes(all));
        }
    }

    /// The bytes that come next are lost, and nobody notices yet. What was cut off before them comes: what
    /// is lost begins and ends with a frame.
    fn loses(&mut self, conn: u64) {
        let Some(c) = self.conns.get_mut(&conn).filter(|c| !c.broken) else { return };
        (c.unreliable, c.ended_well) = (true, false);
        let tail = std::mem::take(&mut c.tail);
        self.coverage.hit("stream: piece lost");
        if !tail.is_empty() {
            self.send_piece(conn, Piece::Bytes(tail));
        }
    }

    /// The node has taken the attempt, and says so. Where that is lost, it works for nobody: the
    /// connection is reset, or nothing more is heard of it.
    pub(super) fn send_acceptance(&mut self, conn: u64, piece: Piece) {
        if !self.is_drawn(self.plan.lost_answers) {
            return self.send_piece(conn, piece);
        }
        self.coverage.hit("stream: answer lost");
        if let Some(c) = self.conns.get_mut(&conn) {
            (c.broken, c.unreliable) = (true, true);
        }
        if self.losing.bool() {
            self.send_piece(conn, Piece::Answer(Box::new(HowEnded::NoAnswer("connection reset".into()))));
            self.reader_lost(conn);
        }
    }

    pub(super) fn is_drawn(&mut self, rate: u32) -> bool {
        rate > 0 && self.losing.u32(..1_000) < rate
    }

    /// What is on its way is lost, and with it the connection; the node learns it by the stop, or at once
    /// where it keeps the attempt.
    fn breaks(&mut self, conn: u64) {
        let Some(c) = self.conns.get_mut(&conn).filter(|c| !c.broken) else { return };
        (c.broken, c.tail) = (true, Vec::new());
        self.coverage.hit("stream: connection broken");
        self.send_piece(conn, Piece::Reset("connection reset"));
        self.reader_lost(conn);
    }

    /// An attempt that the control plane has ended runs on no node that is reached: its stop arrives
    /// within three seconds, and where that is lost, the answer to the node's first report made after
    /// the end calls it an orphan.
    pub(crate) fn stop_due(
        &mut self,
        node: usize,
        boot: BootId,
        attempt: AttemptId,
        since: Moment,
        stop: Stop,
    ) {
        let sim = &self.nodes[node];
        let Some(run) = sim.runs.get(&attempt).filter(|_| sim.boot == boot) else { return };
        let answered = sim.answered.is_some_and(|made| made > since && made > run.began);
        let is_reached = sim.stopped == 0 && self.links[node].is_calm(self.now);
        let may_be_late = match stop {
            Stop::Lost => true,
            Stop::ByLink { life } => life != self.lives || !self.link_is_well(node),
            Stop::Sent | Stop::NotNeeded => false,
        };
        if answered || (is_reached && !may_be_late) {
            return self.check(Err(format!(
                "[9] attempt {attempt} runs on n{node}, and was ended at {} ms ({stop:?})",
                since.as_millis()
            )));
        }
        if stop == Stop::Lost {
            self.coverage.hit("stream: orphan after a lost stop");
        }
        self.after_ms(STOPPED_WITHIN_MS, What::StopDue { node, boot, attempt, since, stop });
    }

    // ---- readers ----

    /// A log is new: its task's client reads it.
    pub(crate) fn opened(&mut self, task: TaskId, log: LogId) {
        if self.writers.insert(log, Vec::new()).is_some() {
            self.check(Err(format!("[3] log {log} was there before")));
        }
        let client = self.clients.entry(task).or_default();
        if !client.transcripts.is_empty() {
            self.coverage.hit("client: came back to another log");
        }
        let client = self.clients.entry(task).or_default();
        client.transcripts.push(Transcript::of(log));
        let wait = self.streams.u64(..500);
        self.look_after(task, wait);
    }

    /// Something was appended: whoever sleeps is woken, mostly.
    pub(crate) fn wake_client(&mut self, task: TaskId) {
        let Some(client) = self.clients.get_mut(&task).filter(|client| client.sleeps) else { return };
        if self.streams.u8(..8) == 0 {
            return self.coverage.hit("client: waker lost");
        }
        client.sleeps = false;
        let wait = self.streams.u64(..50);
        self.look_after(task, wait);
    }

    fn look_after(&mut self, task: TaskId, ms: u64) {
        let Some(client) = self.clients.get_mut(&task) else { return };
        client.look += 1;
        let look = client.look;
        self.after_ms(ms, What::ClientLooks { task, look });
    }

    pub(crate) fn client_looks(&mut self, task: TaskId, look: u64) {
        if self.clients.get(&task).is_none_or(|client| client.look != look) {
            return;
        }
        // Now and then its buffer holds next to nothing.
        let at_most = if self.streams.u8(..4) == 0 { 1 } else { self.streams.usize(..2_000) };
        match self.client_reads(task, at_most) {
            Ok(Some(true)) => {
                self.coverage.hit("client: reads in pieces");
                let wait = if self.streams.u8(..8) == 0 { self.streams.u64(..8_000) } else { 20 };
                self.look_after(task, wait);
            }
            Ok(Some(false)) => {
                if let Some(client) = self.clients.get_mut(&task) {
                    client.sleeps = true;
                }
                self.look_after(task, LOOKS_EVERY_MS);
            }
            // Whole, or of a life that is over.
            Ok(None) => {}
            Err(broken) => self.check(Err(broken)),
        }
    }

    /// Reads on. Returns whether there was anything; nothing where the log is whole or not there.
    fn client_reads(&mut self, task: TaskId, at_most: usize) -> Result<Option<bool>, String> {
        let log = self.control.as_ref().and_then(|control| control.log(task));
        let client = self.clients.get_mut(&task);
        let transcript = client.and_then(|client| client.transcripts.last_mut());
        let (Some(log), Some(transcript)) = (log, transcript) else { return Ok(None) };
        if transcript.log != Some(log.id()) {
            return Ok(None);
        }
        let writers = self.writers.get(&log.id()).map_or(&[][..], Vec::as_slice);
        let was_more = transcript.read(log, at_most, writers)?;
        Ok(transcript.terminal.is_none().then_some(was_more))
    }

    /// At the end each client has what its log has, to the last frame.
    pub(crate) fn clients_at_rest(&mut self) -> Result<(), String> {
        for task in self.clients.keys().copied().collect::<Vec<_>>() {
            self.client_reads(task, usize::MAX)?;
            let Some(log) = self.control.as_ref().and_then(|control| control.log(task)) else { continue };
            let last = self.clients.get(&task).and_then(|client| client.transcripts.last());
            let Some(last) = last else { continue };
            if last.next != log.next_index() || last.terminal.is_some() != log.is_finished() {
                return Err(format!("[2] the client of {task} has {} of {}", last.next, log.next_index()));
            }
        }
        Ok(())
    }
}
