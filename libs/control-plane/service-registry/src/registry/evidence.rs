//! Signs of life and of death, and what time makes of them.

use super::*;

/// How long an offline node stays visible.
const FORGET_OFFLINE_AFTER: Duration = Duration::from_secs(24 * 3600);

impl ServiceRegistry {
    /// A token of one of the node's attempts arrived: it lives. Never lifts a suspicion.
    pub fn alive(&mut self, now: Moment, node_id: &NodeId) {
        let Some(node) = self.nodes.get(node_id) else { return };
        if node.evidence.offline_since.is_none() && node.evidence.last_life < now {
            self.nodes.heard(node_id, now);
        }
    }

    /// A fresh connection to the node failed: suspect at once, and probed.
    pub fn dial_failed(&mut self, now: Moment, node_id: &NodeId, reason: String) -> Option<Transition> {
        if !self.enforces(Rule::EvidenceBeforeLease) {
            return None;
        }
        self.count_dial_failure(now, node_id);
        let was = self.nodes.change(node_id, |node| {
            let was = node.evidence.liveness();
            node.evidence.not_dialled(reason);
            // The failure itself was the probe: the next one comes after a pause.
            node.evidence.probe_by(now + PROBE_EVERY);
            was
        });
        (was? == Liveness::Online).then(|| Transition { node_id: node_id.clone(), to: Liveness::Suspect })
    }

    /// Only the failure of a node that was well says that the network, and not we, may be at fault.
    fn count_dial_failure(&mut self, now: Moment, node_id: &NodeId) {
        let span = self.settings.timing.heartbeat_interval;
        let was_well = self.nodes.get(node_id).is_some_and(|node| node.evidence.was_well(now, span));
        if was_well || !self.enforces(Rule::GuardEndsByTheWell) {
            self.last_dial_failure = Some(now);
            self.mass_silence_since = None;
        }
    }

    /// The node itself refused an attempt (401, 403, 404) that was sent at `dispatched`: suspect,
    /// until a probe shows that it lets us in.
    pub fn denied(
        &mut self,
        now: Moment,
        node_id: &NodeId,
        dispatched: Moment,
        reason: String,
    ) -> Option<Transition> {
        if !self.enforces(Rule::DeniedIsSuspect) {
            return None;
        }
        let (was, is) = self.nodes.change(node_id, |node| {
            let was = node.evidence.liveness();
            node.evidence.deny(now, dispatched, reason);
            (was, node.evidence.liveness())
        })?;
        (is != was).then(|| Transition { node_id: node_id.clone(), to: is })
    }

    /// How one lane of its link stands now.
    pub fn link_stands(&mut self, node_id: &NodeId, lane: u16, link: LinkView) {
        self.nodes.change(node_id, |node| drop(node.link.insert(lane, link)));
    }

    /// Whether orders reach the node by a lane of its link, while that lives. One that they do not reach is
    /// suspect until one is answered: no heartbeat and no probe lifts that.
    pub fn orders_arrive(&mut self, node_id: &NodeId, lane: u16, arrive: bool) -> Option<Transition> {
        let (was, is) = self.nodes.change(node_id, |node| {
            let was = node.evidence.liveness();
            if arrive {
                node.evidence.undelivered.remove(&lane);
            } else {
                node.evidence.undelivered.insert(lane);
            }
            (was, node.evidence.liveness())
        })?;
        (is != was).then(|| Transition { node_id: node_id.clone(), to: is })
    }

    /// The tokens that we send have changed: who denied the old ones may let the new ones in.
    pub fn tokens_changed(&mut self, now: Moment) {
        self.nodes.change_all(|node| node.evidence.ask_again(now));
    }

    /// A stream broke, or something else that a look at the node explains: probe it now.
    pub fn want_probe(&mut self, now: Moment, node_id: &NodeId) {
        self.nodes.change(node_id, |node| node.evidence.want_probe(now));
    }

    /// The nodes to dial now, with their addresses, and whether to show our token there. Each is
    /// marked as being dialled until [`ServiceRegistry::probed`] is told the outcome.
    pub fn take_due_probes(&mut self, now: Moment) -> Vec<(NodeId, String, bool)> {
        let mut probes = Vec::new();
        for id in self.nodes.due_probes(now) {
            let asked = self.nodes.change(&id, |node| {
                node.evidence.probe_in_flight = true;
                node.evidence.next_probe = None;
                (node.request.address.clone(), node.evidence.denied.is_some())
            });
            probes.extend(asked.map(|(address, authorized)| (id, address, authorized)));
        }
        probes
    }

    /// The outcome of dialling a node at an address. Another node or boot answering there
    /// counts as a failure. A probe's answer never lifts silence.
    pub fn probed(
        &mut self,
        now: Moment,
        node_id: &NodeId,
        address: &str,
        outcome: ProbeOutcome,
    ) -> Option<Transition> {
        let node = self.nodes.get(node_id)?;
        if node.request.address != address {
            self.nodes.change(node_id, |node| {
                node.evidence.probe_in_flight = false;
                node.evidence.want_probe(now);
            });
            return None;
        }
        let was = node.evidence.liveness();
        let (failure, authorized) = match outcome {
            ProbeOutcome::Inconclusive => {
                self.nodes.change(node_id, |node| {
                    node.evidence.probe_in_flight = false;
                    if was != Liveness::Offline {
                        node.evidence.probe_by(now + PROBE_EVERY);
                    }
                });
                return None;
            }
            ProbeOutcome::Failed(reason) => (Some(reason), None),
            ProbeOutcome::Answered { live, .. } if live.node_id != *node_id => {
                (Some(format!("{} answered there", live.node_id)), None)
            }
            ProbeOutcome::Answered { live, .. } if live.boot_id != node.request.boot_id => {
                (Some("another process answered there".into()), None)
            }
            ProbeOutcome::Answered { authorized, .. } => (None, authorized),
        };
        if failure.is_some() {
            self.count_dial_failure(now, node_id);
        }
        let is = self.nodes.change(node_id, |node| {
            node.evidence.probe_in_flight = false;
            let asked = authorized.is_some();
            match failure {
                None => node.evidence.probe_answered(now, authorized),
                Some(reason) => node.evidence.probe_failed(now, reason),
            }
            let is = node.evidence.liveness();
            if is == Liveness::Suspect {
                let pause = node.evidence.next_pause(asked);
                node.evidence.probe_by(now + pause);
            }
            is
        })?;
        (is != was).then(|| Transition { node_id: node_id.clone(), to: is })
    }

    /// Our own loop stood still for this long: every lease is extended by as much.
    pub fn stalled(&mut self, now: Moment, stall: Duration) {
        self.nodes.change_all(|node| node.evidence.extend(stall, now));
        self.models.extend(stall, now);
    }

    /// Applies what time alone changes. Nodes that go offline keep their reservations until
    /// they are released one by one.
    pub fn expire(&mut self, now: Moment) -> Vec<Transition> {
        let timing = self.settings.timing;
        let mut transitions = Vec::new();
        let silent = self.nodes.due_silence(now, timing.silence());
        let fell_silent = !silent.is_empty();
        for id in silent {
            let was = self.nodes.change(&id, |node| {
                let was = node.evidence.liveness();
                node.evidence.silent_since = Some(now);
                node.evidence.want_probe(now);
                was
            });
            if was == Some(Liveness::Online) {
                transitions.push(Transition { node_id: id, to: Liveness::Suspect });
            }
        }
        if fell_silent {
            self.notice_mass_silence(now);
        }
        for id in self.nodes.due_offline(now, self.lease()) {
            self.nodes.change(&id, |node| {
                node.evidence.offline_since = Some(now);
                node.evidence.next_probe = None;
            });
            transitions.push(Transition { node_id: id, to: Liveness::Offline });
        }
        self.review_mass_silence();
        for id in self.nodes.due_forgetting(now, FORGET_OFFLINE_AFTER) {
            self.remove(&id);
            self.forgotten.push(id);
        }
        self.models.expire(now, self.lease());
        for node_id in self.nodes.due_rests(now) {
            let pools = self.nodes.change(&node_id, |node| {
                node.breaker.rest(now);
                node.pools.keys().map(|id| PoolKey::new(node_id.clone(), id.clone())).collect::<Vec<_>>()
            });
            self.lifted_holds.extend(pools.into_iter().flatten());
        }
        while let Some((at, _)) = self.pool_alarms.first()
            && *at <= now
            && let Some((_, key)) = self.pool_alarms.pop_first()
        {
            let is_there = self.change_pool(&key, |book| {
                book.held_until = book.held_until.filter(|until| *until > now);
                book.breaker.rest(now);
            });
            self.lifted_holds.extend(is_there.map(|()| key));
        }
        transitions
    }

    /// The pools whose hold or breaker ended by time.
    pub fn take_lifted_holds(&mut self) -> Vec<PoolKey> {
        std::mem::take(&mut self.lifted_holds)
    }

    /// The nodes that are not known any more, although they did not leave.
    pub fn take_forgotten(&mut self) -> Vec<NodeId> {
        std::mem::take(&mut self.forgotten)
    }

    /// How long a node may give no evidence of life, and a model be in no report: one timeout, or two
    /// while most are silent.
    pub fn lease(&self) -> Duration {
        match self.mass_silence_since {
            Some(_) => self.settings.timing.node_timeout * 2,
            None => self.settings.timing.node_timeout,
        }
    }

    fn notice_mass_silence(&mut self, now: Moment) {
        let interval = self.settings.timing.heartbeat_interval;
        let dial_failed = self.last_dial_failure.is_some_and(|at| now.since(at) <= interval);
        let (live, silent) = (self.nodes.live(), self.nodes.fell_silent_within(now, interval));
        if self.enforces(Rule::MassSilence) && live >= 3 && silent * 2 > live && !dial_failed {
            self.mass_silence_since.get_or_insert(now);
        }
    }

    /// The guard ends when at most half of the nodes are silent.
    pub(super) fn review_mass_silence(&mut self) {
        if self.nodes.live_and_silent() * 2 <= self.nodes.live() {
            self.mass_silence_since = None;
        }
    }

    /// Since when the control plane suspects itself, because most nodes fell silent at once.
    pub fn mass_silence_since(&self) -> Option<Moment> {
        self.mass_silence_since
    }

    /// When [`ServiceRegistry::expire`] or [`ServiceRegistry::take_due_probes`] has something to do next.
    pub fn next_deadline(&self) -> Option<Moment> {
        let silence = self.settings.timing.silence();
        let of_nodes = self.nodes.next_due(silence, self.lease(), FORGET_OFFLINE_AFTER);
        of_nodes.into_iter().chain(self.pool_alarms.first().map(|(at, _)| *at)).min()
    }

    /// Compares what is ordered and counted with a walk over everything, for the simulator and tests.
    ///
    /// # Errors
    /// What differs.
    pub fn check_order(&self) -> Result<(), IndexMismatch> {
        self.nodes.check()?;
        self.models.check()?;
        let is_silent = |n: &&Node| n.evidence.offline_since.is_none() && n.evidence.silent_since.is_some();
        let silent = self.nodes.in_order().filter(is_silent).count();
        let live = self.nodes.in_order().filter(|n| n.evidence.offline_since.is_none()).count();
        let kept = (self.nodes.live(), self.nodes.live_and_silent());
        IndexMismatch::unless_equal("live nodes, and the silent ones", &kept, &(live, silent))?;
        for node in self.nodes.in_order().filter(|_| self.enforces(Rule::PoolNamedTwice)) {
            for (pool_id, book) in &node.pools {
                let of_pool = node.claims.iter().filter(|(_, claim)| claim.pool_id == *pool_id);
                let walked = of_pool.map(|(attempt, _)| *attempt).collect();
                IndexMismatch::unless_equal("reservations of a pool", &book.reserved, &walked)?;
            }
        }
        let (silence, lease) = (self.settings.timing.silence(), self.lease());
        let of_node = |node: &Node| {
            let evidence = &node.evidence;
            let liveness = match (evidence.offline_since, evidence.silent_since) {
                (Some(since), _) => since + FORGET_OFFLINE_AFTER,
                (None, Some(_)) => evidence.last_life + lease,
                (None, None) => (evidence.last_heartbeat + silence).min(evidence.last_life + lease),
            };
            let probe = evidence.next_probe.filter(|_| !evidence.probe_in_flight).unwrap_or(Moment::NEVER);
            liveness.min(probe).min(node.breaker.rests_until().unwrap_or(Moment::NEVER))
        };
        let of_pool = self.pool_alarms.first().map(|(at, _)| *at);
        let walked = self.nodes.in_order().map(of_node).chain(of_pool).min();
        IndexMismatch::unless_equal("the next deadline", &self.next_deadline(), &walked)
    }
}
