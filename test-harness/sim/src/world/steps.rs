//! The steps of a schedule: each fault as it begins and as it ends.

use pool_registry_types::node::Intent;

use super::{Heal, What, World};
use crate::draw::{LinkFault, NodeFault, Step};

impl World {
    pub(super) fn step(&mut self, step: &Step) {
        self.note(|_| format!("-- {step:?}"));
        match *step {
            Step::Submit { task } => self.submit(task, false),
            Step::SubmitAgain { task } => self.submit(task, true),
            Step::Cancel { task } => self.cancel(task),
            Step::CrashNode { node, down_ms } => {
                self.coverage.hit("fault: node crashed");
                self.crash_node(node, down_ms);
            }
            Step::LeaveNode { node, down_ms } => self.leave_node(node, down_ms),
            Step::StopNode { node, for_ms } => {
                if self.nodes[node].core.is_some() {
                    self.coverage.hit("fault: node stopped");
                    self.links_are_troubled(node, false);
                    self.nodes[node].stopped += 1;
                    self.after_ms(for_ms, What::Heal(Heal::Stop { node }));
                }
            }
            Step::Partition { node, to_cp, to_node, for_ms } => {
                self.coverage.hit(match (to_cp, to_node) {
                    (true, true) => "fault: partition both ways",
                    (true, false) => "fault: partition towards the control plane",
                    _ => "fault: partition towards the node",
                });
                self.links_are_troubled(node, to_cp);
                self.links[node].to_cp += u32::from(to_cp);
                self.links[node].to_node += u32::from(to_node);
                self.after_ms(for_ms, What::Heal(Heal::Partition { node, to_cp, to_node }));
            }
            Step::LoseHeartbeats { for_ms } => {
                self.coverage.hit("fault: heartbeats of all nodes lost");
                self.heartbeats_lost += 1;
                self.after_ms(for_ms, What::Heal(Heal::Heartbeats));
            }
            Step::KillEngine { node, down_ms } => {
                self.coverage.hit("fault: engine killed");
                self.kill_engine(node, down_ms);
            }
            Step::HangEngine { node, for_ms } => {
                self.coverage.hit("fault: engine hung");
                self.hang_engine(node);
                self.after_ms(for_ms, What::Heal(Heal::HangEngine { node }));
            }
            Step::SlowEngine { node, for_ms } => {
                self.coverage.hit("fault: engine slow");
                self.nodes[node].slow += 1;
                self.after_ms(for_ms, What::Heal(Heal::SlowEngine { node }));
            }
            Step::ForeignLoad { node, slots, for_ms } => {
                self.coverage.hit("fault: foreign load");
                self.nodes[node].foreign = slots;
                self.after_ms(for_ms, What::Heal(Heal::ForeignLoad { node }));
            }
            Step::SickEngine { node, for_ms } => {
                self.coverage.hit("fault: engine sick");
                self.nodes[node].sick += 1;
                self.after_ms(for_ms, What::Heal(Heal::SickEngine { node }));
            }
            Step::BusyEngine { node, for_ms } => {
                self.coverage.hit("fault: engine busy");
                self.nodes[node].busy += 1;
                self.after_ms(for_ms, What::Heal(Heal::BusyEngine { node }));
            }
            Step::Drain { node } => self.want(node, Intent::Draining),
            Step::Resume { node } => self.want(node, Intent::Serving),
            Step::ClockStep { node, by_ms } => {
                self.coverage.hit("fault: clock stepped");
                self.clocks[node] += by_ms;
            }
            Step::Twin { node } => self.twin(node),
            Step::RestartControl { down_ms } => {
                if self.control.is_some() && self.stall_until.is_none() {
                    self.coverage.hit("fault: control plane restarted");
                    self.links_lose_control(true);
                    self.stop_control();
                    self.after_ms(down_ms, What::ControlBack);
                }
            }
            Step::NodeFault { node, fault, for_ms } => {
                self.coverage.hit(match fault {
                    NodeFault::Denies => "fault: node denies",
                    NodeFault::Rejects => "fault: node rejects",
                    NodeFault::Fails => "fault: node fails",
                    NodeFault::Refuses(_) => "fault: node refuses",
                    NodeFault::Resets => "fault: node resets",
                    NodeFault::SaysNothing => "fault: node says nothing",
                });
                self.links_are_troubled(node, false);
                let (present, lasting) = &mut self.node_faults[node];
                *present = Some(fault);
                *lasting += 1;
                self.credentials(node, fault != NodeFault::Denies);
                self.after_ms(for_ms, What::Heal(Heal::NodeFault { node }));
            }
            Step::Shortage { for_ms } => {
                self.coverage.hit("fault: own shortage");
                (0..self.nodes.len()).for_each(|node| self.links_are_troubled(node, false));
                self.shortage += 1;
                self.after_ms(for_ms, What::Heal(Heal::Shortage));
            }
            Step::DoubleReports { node, for_ms } => {
                self.coverage.hit("fault: reports doubled");
                self.double_reports[node] += 1;
                self.after_ms(for_ms, What::Heal(Heal::DoubleReports { node }));
            }
            Step::ShutdownControl { grace_ms, down_ms } => self.shut_down(grace_ms, down_ms),
            Step::Retire { model, for_ms } => {
                self.coverage.hit("fault: model retired");
                self.retire(model, true);
                self.after_ms(for_ms, What::Heal(Heal::Retire { model }));
            }
            Step::DeleteSession { session } => self.delete_session(session),
            Step::Link { node, fault, for_ms } => self.link_fault(node, fault, for_ms),
            Step::AllLinks { for_ms } => {
                self.coverage.hit("fault: all links cut");
                for node in 0..self.nodes.len() {
                    self.link_fault(node, LinkFault::Cut { up: true, down: true }, for_ms);
                }
            }
            Step::PowerLoss { down_ms } => {
                if self.control.is_some() && self.stall_until.is_none() {
                    self.coverage.hit("fault: control plane lost its power");
                    let life = self.lives;
                    self.links_lose_control(false);
                    self.stop_control();
                    self.after_ms(28_000, What::LifeDue { life });
                    self.after_ms(down_ms, What::ControlBack);
                }
            }
            Step::StallControl { for_ms } => {
                let until = self.now + std::time::Duration::from_millis(for_ms);
                // A shorter one within a longer one ends nothing.
                self.loads.disturbed = self.loads.disturbed.max(Some(until));
                if self.control.is_some() && self.stall_until.is_none() {
                    self.coverage.hit("fault: control plane stalled");
                    (0..self.nodes.len()).for_each(|node| self.links_are_troubled(node, false));
                    let until = self.now + std::time::Duration::from_millis(for_ms);
                    self.stall_until = Some(until);
                    self.oracle.stalled_until = until;
                    self.oracle.stall_total_ms += for_ms;
                    self.after_ms(for_ms, What::Heal(Heal::Stall));
                }
            }
        }
    }

    pub(super) fn heal(&mut self, heal: Heal) {
        match heal {
            Heal::Partition { node, to_cp, to_node } => {
                self.links[node].to_cp -= u32::from(to_cp);
                self.links[node].to_node -= u32::from(to_node);
                self.links[node].healed = self.now;
                self.watches[node].ends(self.now);
                self.release_held(node);
                self.release_links(node);
            }
            Heal::Stop { node } => {
                self.watches[node].ends(self.now);
                self.continue_node(node);
            }
            Heal::Link { node, fault } => self.link_heals(node, fault),
            Heal::Heartbeats => self.heartbeats_lost -= 1,
            Heal::HangEngine { node } => self.nodes[node].hung = self.nodes[node].hung.saturating_sub(1),
            Heal::SlowEngine { node } => self.nodes[node].slow -= 1,
            Heal::SickEngine { node } => self.nodes[node].sick -= 1,
            Heal::ForeignLoad { node } => self.nodes[node].foreign = 0,
            Heal::BusyEngine { node } => self.nodes[node].busy -= 1,
            Heal::NodeFault { node } => {
                self.watches[node].ends(self.now);
                let (present, lasting) = &mut self.node_faults[node];
                *lasting -= 1;
                if *lasting == 0 {
                    let denied = *present == Some(NodeFault::Denies);
                    *present = None;
                    self.credentials(node, true);
                    // A rotation of tokens is finished here, or there.
                    if denied && self.random.bool() {
                        self.tokens_changed();
                    }
                }
            }
            Heal::Shortage => {
                self.shortage -= 1;
                let now = self.now;
                self.watches.iter_mut().for_each(|watch| watch.ends(now));
            }
            Heal::DoubleReports { node } => self.double_reports[node] -= 1,
            Heal::Retire { model } => self.retire(model, false),
            Heal::Stall => {
                self.stall_until = None;
                let now = self.now;
                self.watches.iter_mut().for_each(|watch| watch.ends(now));
                // What is due comes before the mailbox.
                let (timers, messages): (Vec<What>, Vec<What>) = std::mem::take(&mut self.stalled)
                    .into_iter()
                    .partition(|what| matches!(what, What::ControlTimer { .. } | What::LaneTimer { .. }));
                self.unread_links = self.links_that_brought(&messages);
                for what in timers.into_iter().chain(messages) {
                    self.handle(what);
                }
                self.unread_links.clear();
            }
        }
    }
}

pub(super) fn is_for_control(what: &What) -> bool {
    matches!(
        what,
        What::CallArrives { .. }
            | What::ControlTimer { .. }
            | What::RelayTimer { .. }
            | What::ReadDue { .. }
            | What::ResumeDue { .. }
            | What::Fence { .. }
            | What::StreamArrives { .. }
            | What::ProbeAnswered { .. }
            | What::IntentAnswered { .. }
            | What::Step(
                Step::Submit { .. }
                    | Step::SubmitAgain { .. }
                    | Step::Cancel { .. }
                    | Step::Drain { .. }
                    | Step::Resume { .. }
                    | Step::Twin { .. }
                    | Step::ShutdownControl { .. }
                    | Step::Retire { .. }
                    | Step::DeleteSession { .. }
            )
            | What::CutOff { .. }
            | What::DownArrives { .. }
            | What::LinkBroke { .. }
            | What::PostTaken { .. }
            | What::PostEnds { .. }
            | What::LiveAnswered { .. }
            | What::LaneTimer { .. }
            | What::LinkSays { .. }
            | What::Heal(Heal::Retire { .. } | Heal::NodeFault { .. })
    )
}
