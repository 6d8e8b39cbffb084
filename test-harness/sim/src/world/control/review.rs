//! What one event may and must do, seen from outside, and what is needed of the time before it.

use super::super::links::number_of;
use super::*;

impl World {
    /// An attempt by a link that is interrupted has sent tokens and may not go on elsewhere.
    fn is_wrongly_offline(&self, relay: &Relay, node: usize) -> bool {
        let Via::Link(linked) = &relay.via else { return false };
        let log = self.control.as_ref().and_then(|control| control.log(relay.task));
        let has_sent = log.is_some_and(|log| log.next_index() > linked.dispatch.first_index);
        has_sent && linked.dispatch.spec.continuation.is_none() && self.is_interrupted(node)
    }

    /// What one event may and must do, seen from outside.
    pub(super) fn review(&mut self, before: &Before, effects: &[Effect]) {
        let Some(control) = self.control.as_ref() else { return };
        let liveness = |id: &NodeId| control.core.registry().liveness(id);
        let mut broken = None;
        let mut crossed = false;
        if let Some(node_id) = &before.spared
            && liveness(node_id) != Some(Liveness::Online)
        {
            broken = Some(format!("{node_id} is held to what we could not do ourselves"));
        }
        let at_once = |effect: &Effect| matches!(effect, Effect::Reply { answer: Ok(Answer::Intent(_)), .. });
        if let Some((node_id, intent)) = before.want.as_ref().filter(|_| effects.iter().any(at_once)) {
            // Kept for a node that is not known any more.
            self.oracle.wants(node_id, *intent);
        }
        if let Some(node_id) = &before.dialled {
            self.oracle.dialled(node_id);
            if before.let_in && self.oracle.let_in(node_id) {
                self.coverage.hit("core: denied node let us in");
            }
        }
        if let Some(node_id) = &before.dial_failed {
            self.oracle.dial_failed(self.now, node_id);
            if liveness(node_id) == Some(Liveness::Online) {
                broken = Some(format!("[7] {node_id} is online after a failed connection"));
            }
        }
        for effect in effects {
            let Effect::CloseAttempt { attempt, why, .. } = effect else { continue };
            let Some(relay) = control.relays.get(attempt) else { continue };
            let conn = relay.via.conn().and_then(|conn| self.conns.get(&conn));
            let number = number_of(&relay.node_id);
            let node = Some(&self.nodes[number]).filter(|_| conn.is_some() || relay.via.conn().is_none());
            let runs = node.is_some_and(|n| n.runs.contains_key(attempt));
            let is_held =
                node.is_some_and(|n| n.core.as_ref().is_some_and(|core| core.held().has_ended(attempt)));
            let ended_well = conn.is_some_and(|c| c.ended_well && self.links[c.node].is_calm(self.now));
            match why {
                CloseReason::Vanished if runs => {
                    broken = Some(format!("[8] a report ended attempt {attempt}, which runs"));
                }
                CloseReason::Vanished if is_held => {
                    broken = Some(format!("[8] a report ended attempt {attempt}, whose end is kept"));
                }
                CloseReason::Vanished | CloseReason::NodeLeft if ended_well => {
                    broken = Some(format!("[8] a report took the end of attempt {attempt} away"));
                }
                CloseReason::NodeOffline if self.is_wrongly_offline(relay, number) => {
                    broken = Some(format!("[11] {attempt} is closed with its node, whose link may be back"));
                }
                CloseReason::Neighbour => {
                    broken = Some(format!("a broken stream ended its neighbour {attempt}"));
                }
                _ => {}
            }
        }
        for effect in effects {
            match effect {
                Effect::Reply { answer: Ok(Answer::Heartbeat(answer)), .. } => {
                    if let Some(open) =
                        answer.cancel_attempts.iter().find(|id| control.relays.contains_key(id))
                    {
                        broken = Some(format!("attempt {open} is called an orphan and is open"));
                    }
                    crossed |= before.heartbeat.as_ref().is_some_and(|(node_id, _)| {
                        control.relays.values().any(|relay| relay.node_id == *node_id && !relay.accepted)
                    });
                }
                Effect::Reply { answer: Ok(Answer::Registered(answer)), .. }
                    if !self.oracle.epochs.insert(answer.epoch.to_string()) =>
                {
                    broken = Some(format!("epoch {} was given twice", answer.epoch));
                }
                _ => {}
            }
        }
        if let Some((node_id, liveness_before)) = &before.others_of {
            for (other, was) in liveness_before {
                // Only time may change another node while this one speaks.
                if other != node_id && liveness(other) == Some(Liveness::Online) && *was != Liveness::Online {
                    broken = Some(format!("[8] {node_id} speaks, and {other} comes online"));
                }
            }
        }
        if crossed {
            self.coverage.hit("race: report crossed a dispatch");
        }
        if let Some(broken) = broken {
            self.check(Err(broken));
        }
    }
}

/// What is needed of the time before an event to check what it did.
#[derive(Default)]
pub(super) struct Before {
    /// The node and the number of its report.
    pub(super) heartbeat: Option<(NodeId, u64)>,
    /// The number of the last report taken before.
    pub(super) report_seq: Option<u64>,
    /// The models that its pools have, or load, or could load.
    pub(super) models: Vec<ModelRef>,
    /// A pool of it takes nothing, and is not drained.
    pub(super) away: bool,
    pub(super) dial_failed: Option<NodeId>,
    /// What an operator wants of a node.
    pub(super) want: Option<(NodeId, Intent)>,
    pub(super) dialled: Option<NodeId>,
    /// It let the control plane in.
    pub(super) let_in: bool,
    /// It was online, and we could not dial it for want of something of our own.
    pub(super) spared: Option<NodeId>,
    pub(super) others_of: Option<(NodeId, Vec<(NodeId, Liveness)>)>,
}

impl Before {
    pub(super) fn of(event: &Event, control: &Control) -> Self {
        let mut before = Self::default();
        match event {
            Event::Heartbeat { node_id, beat, .. } => {
                before.heartbeat = Some((node_id.clone(), beat.seq));
                before.report_seq = control.core.registry().report_seq(node_id);
                before.away = beat.pools.iter().any(|pool| !pool.ready && !pool.draining);
                let has = beat.pools.iter().filter(|pool| pool.state.has_model());
                before.models = has.flat_map(|pool| pool.models.iter().cloned()).collect();
                if beat.seq % 8 == 0 {
                    let nodes = control.core.view(Moment::ZERO).nodes;
                    let others = nodes.into_iter().map(|n| (n.node_id, n.liveness)).collect();
                    before.others_of = Some((node_id.clone(), others));
                }
            }
            Event::Ended { attempt, how, .. } => {
                let node = control.core.attempt_pool(attempt).map(|pool| pool.node_id.clone());
                let is_online = |id: &NodeId| control.core.registry().liveness(id) == Some(Liveness::Online);
                match how {
                    HowEnded::NeverSent(_)
                    | HowEnded::NoAnswer(_)
                    | HowEnded::TimedOut(Overdue::Acceptance) => before.dial_failed = node,
                    HowEnded::OwnShortage { .. } => before.spared = node.filter(is_online),
                    _ => {}
                }
            }
            Event::Probed { node_id, outcome: ProbeOutcome::Answered { live, authorized }, .. } => {
                let known = control.core.registry().address(node_id);
                if known.is_some_and(|(_, boot_id)| boot_id != live.boot_id) {
                    // Another process answers in its place.
                    before.dial_failed = Some(node_id.clone());
                } else {
                    before.dialled = Some(node_id.clone());
                    before.let_in = *authorized == Some(Ok(()));
                }
            }
            Event::LinkEvidence {
                node_id,
                evidence: LinkEvidence::CannotConnect(_) | LinkEvidence::Quiet(_),
                ..
            } => before.dial_failed = Some(node_id.clone()),
            Event::Want { node_id, intent, .. } => before.want = Some((node_id.clone(), *intent)),
            Event::Probed { node_id, outcome: ProbeOutcome::Failed(_), .. } => {
                before.dial_failed = Some(node_id.clone())
            }
            _ => {}
        }
        before
    }
}

/// What a reader may look at.
pub(super) fn look_at(core: &mut ControlCore, now: Moment, random: &mut fastrand::Rng) {
    match random.u8(..4) {
        0 => drop(core.metrics(now)),
        1 => drop(core.view(now)),
        2 => drop((core.queue_depths(), core.paces(), core.counters())),
        _ => {
            for (id, _) in core.metrics(now).into_iter().take(3) {
                drop((core.record(id), core.explain_task(now, id)));
            }
        }
    }
}
