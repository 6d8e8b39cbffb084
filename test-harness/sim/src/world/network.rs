//! The network: calls that are lost, doubled, late and overtake each other, and connections that keep
//! their order.

use pool_registry_types::Moment;
use task_scheduler::Dispatch;

use super::held::Closing;
use super::{Call, CallAnswer, Caller, Piece, What, World};

/// One connection of an attempt.
#[derive(Debug)]
pub(crate) struct Conn {
    pub(crate) node: usize,
    pub(crate) dispatch: Dispatch,
    pub(crate) life: u64,
    pub(crate) cp_open: bool,
    pub(crate) node_open: bool,
    /// TCP keeps the order: nothing arrives before this.
    pub(crate) not_before: Moment,
    /// What waits for the partition to heal.
    pub(crate) held: Vec<Piece>,
    pub(crate) drop_held: bool,
    /// The node has sent its final frame, or the `end` frame.
    pub(crate) ended_at_node: bool,
    pub(crate) ended_well: bool,
    /// Bytes that were cut off and come with the next ones.
    pub(crate) tail: Vec<u8>,
    /// It was lost on its way: nothing more comes through.
    pub(crate) broken: bool,
    /// Something of it was lost, or stood still at its node: its end may come late or never.
    pub(crate) unreliable: bool,
    /// Until then nothing of it is taken at its node.
    pub(crate) slow_until: Moment,
    /// Its node keeps the attempt, whatever becomes of the connection.
    pub(crate) keeps: bool,
    /// Where its reader stands; absent while there is none.
    pub(crate) cursor: Option<node_core::Cursor>,
    pub(crate) closing: Closing,
}

/// Blocked directions of a node's link, counted.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Link {
    pub(crate) to_cp: u32,
    pub(crate) to_node: u32,
    pub(crate) healed: Moment,
}

impl Link {
    /// Whether streams have flowed for so long that nothing of a partition is still on its way.
    pub(crate) fn is_calm(&self, now: Moment) -> bool {
        !self.blocked() && (self.healed == Moment::ZERO || now.millis_since(self.healed) > 3_000)
    }

    pub(crate) fn blocked(&self) -> bool {
        self.to_cp > 0 || self.to_node > 0
    }
}

impl World {
    fn per_mille(&mut self, rate: u32) -> bool {
        rate > 0 && self.random.u32(..1_000) < rate
    }

    /// Carries a call of a node, or loses it.
    pub(crate) fn send_call(&mut self, caller: Caller, call: Call) {
        self.after_ms(5_000, What::CallTimesOut { caller });
        let blackhole = self.heartbeats_lost > 0 && matches!(call, Call::Heartbeat(_));
        if self.links[caller.node].to_cp > 0 || blackhole {
            return;
        }
        if self.control.is_none() {
            // The connection is refused.
            let delay = self.delay();
            return self.after_ms(delay, What::CallTimesOut { caller });
        }
        if self.per_mille(self.plan.lost) {
            return self.coverage.hit("message: lost");
        }
        if self.per_mille(self.plan.doubled) {
            self.coverage.hit("message: doubled");
            let delay = self.delay() + self.random.u64(..3_000);
            self.after_ms(delay, What::CallArrives { caller, call: call.clone() });
        }
        let call = match call {
            Call::Heartbeat(mut beat) if self.double_reports[caller.node] > 0 => {
                beat.pools.extend(beat.pools.clone());
                Call::Heartbeat(beat)
            }
            call => call,
        };
        let mut delay = self.delay();
        if self.per_mille(self.plan.late) {
            self.coverage.hit("message: late");
            delay += self.random.u64(1_000..9_000);
        }
        self.after_ms(delay, What::CallArrives { caller, call });
    }

    pub(crate) fn send_answer(&mut self, caller: Caller, answer: CallAnswer) {
        if self.links[caller.node].to_node > 0 {
            return;
        }
        if self.per_mille(self.plan.lost) {
            return self.coverage.hit("message: lost");
        }
        let delay = self.delay();
        self.after_ms(delay, What::AnswerArrives { caller, answer });
    }

    /// Sends a piece of a stream to the control plane, in order, or holds it back.
    pub(crate) fn send_piece(&mut self, conn: u64, piece: Piece) {
        let delay = self.delay();
        let Some(c) = self.conns.get_mut(&conn) else { return };
        if self.links[c.node].blocked() {
            c.held.push(piece);
            return;
        }
        let at = (self.now + std::time::Duration::from_millis(delay)).max(c.not_before);
        c.not_before = at;
        self.at(at, What::StreamArrives { conn, piece });
    }

    pub(crate) fn delay(&mut self) -> u64 {
        if self.random.u8(..16) == 0 { self.random.u64(1..200) } else { self.random.u64(1..12) }
    }

    pub(super) fn release_held(&mut self, node: usize) {
        if self.links[node].blocked() {
            return;
        }
        let held: Vec<u64> = self.conns.iter().filter(|(_, c)| c.node == node).map(|(id, _)| *id).collect();
        for conn in held {
            let Some(c) = self.conns.get_mut(&conn) else { continue };
            let (pieces, dropped) = (std::mem::take(&mut c.held), std::mem::take(&mut c.drop_held));
            for piece in pieces {
                self.send_piece(conn, piece);
            }
            if self.plan.slow_readers > 0 {
                self.after_ms(0, What::ReaderBack { conn });
            }
            if dropped {
                let delay = self.delay();
                self.after_ms(delay, What::DropArrives { conn });
            }
        }
    }
}
