//! What nodes say: registration, heartbeats, farewells; and the index that follows from them.

use super::*;

impl ControlCore {
    pub(super) fn register(
        &mut self,
        now: Moment,
        to: ReplyTo,
        request: RegisterRequest,
        effects: &mut Vec<Effect>,
    ) {
        let (node_id, intent) = (request.node_id.clone(), request.intent);
        let answer = match self.registry.register(now, request) {
            Ok(registered) => {
                self.counters.registrations += 1;
                self.close_all(now, &registered.ended, CloseReason::NodeRestarted, effects);
                self.sync_node(&node_id);
                Ok(Answer::Registered(RegisterAnswer {
                    node_id,
                    epoch: registered.epoch,
                    heartbeat_interval_ms: millis(self.policy.timing.heartbeat_interval),
                    node_timeout_ms: millis(self.policy.timing.node_timeout),
                    intent,
                }))
            }
            Err(conflict) => {
                self.counters.conflicts += 1;
                let mut body = ErrorBody::new(ErrorCode::NodeIdConflict, conflict.to_string())
                    .retry_after_ms(millis(self.policy.timing.heartbeat_interval));
                body.node_id = Some(node_id);
                Err(body)
            }
        };
        effects.push(Effect::Reply { to, answer });
    }

    pub(super) fn heartbeat(
        &mut self,
        now: Moment,
        to: ReplyTo,
        node_id: &NodeId,
        beat: Heartbeat,
        effects: &mut Vec<Effect>,
    ) {
        let intent = beat.intent;
        let cancel_attempts = match self.registry.heartbeat(now, node_id, beat) {
            Ok(HeartbeatOutcome::Ignored) => {
                self.counters.old_reports += 1;
                Vec::new()
            }
            Ok(HeartbeatOutcome::Taken { returned, vanished, orphans }) => {
                self.counters.returns += u64::from(returned);
                self.counters.orphans += orphans.len() as u64;
                self.await_ends(now, &vanished);
                self.sync_node(node_id);
                orphans
            }
            Err(unknown) => {
                self.counters.unknown_heartbeats += 1;
                let mut body = ErrorBody::new(ErrorCode::NodeUnknown, unknown.to_string());
                body.node_id = Some(node_id.clone());
                effects.push(Effect::Reply { to, answer: Err(body) });
                return;
            }
        };
        let heartbeat_interval_ms = millis(self.policy.timing.heartbeat_interval);
        let answer = HeartbeatAnswer { heartbeat_interval_ms, cancel_attempts, intent };
        effects.push(Effect::Reply { to, answer: Ok(Answer::Heartbeat(answer)) });
    }

    pub(super) fn deregister(
        &mut self,
        now: Moment,
        to: ReplyTo,
        node_id: &NodeId,
        epoch: Option<&Epoch>,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(ended) = self.registry.deregister(node_id, epoch) {
            self.close_all(now, &ended, CloseReason::NodeLeft, effects);
            self.sync_node(node_id);
        }
        effects.push(Effect::Reply { to, answer: Ok(Answer::Deregistered) });
    }

    /// Brings the index up to what the registry knows of a node's pools.
    pub(super) fn sync_node(&mut self, node_id: &NodeId) {
        let mut keys = self.indexed.remove(node_id).unwrap_or_default();
        keys.extend(self.registry.pool_ids(node_id).map(|pool| PoolKey::new(node_id.clone(), pool.clone())));
        for key in &keys {
            self.sync_pool(key);
        }
    }

    pub(super) fn sync_pool(&mut self, key: &PoolKey) {
        // Who avoids a pool that failed it may take that one again once the others are out.
        if let Some(before) = self.index.get(key) {
            self.stirred.extend(before.models.iter().cloned());
        }
        let Some(facts) = self.registry.pool_facts(key) else {
            self.index.remove(key);
            if let Some(keys) = self.indexed.get_mut(&key.node_id) {
                keys.remove(key);
            }
            return;
        };
        let standing = match (facts.liveness, facts.intent) {
            (Liveness::Offline, _) => Standing::Offline,
            (Liveness::Suspect, _) => Standing::Suspect,
            (Liveness::Online, Intent::Draining) => Standing::Draining,
            (Liveness::Online, Intent::Serving) if facts.report.draining => Standing::Draining,
            (Liveness::Online, Intent::Serving) if !facts.report.ready => Standing::NotReady,
            (Liveness::Online, Intent::Serving) => Standing::Placeable,
        };
        let candidate = Candidate {
            key: key.clone(),
            standing,
            engine: facts.report.engine,
            models: facts.report.models.clone(),
            ctx_max: facts.report.ctx_max,
            slots_total: facts.slots_total,
            slots_busy: facts.slots_busy,
            held: facts.held,
            vram_free_bytes: facts.report.vram_free_bytes,
        };
        if standing == Standing::Placeable && candidate.has_free_slot() {
            self.stirred.extend(candidate.models.iter().cloned());
        }
        self.index.upsert(candidate);
        self.indexed.entry(key.node_id.clone()).or_default().insert(key.clone());
    }

    pub(super) fn note(&mut self, transitions: &[Transition]) {
        for transition in transitions {
            match transition.to {
                Liveness::Online => self.counters.returns += 1,
                Liveness::Suspect => self.counters.suspects += 1,
                Liveness::Offline => self.counters.offlines += 1,
            }
        }
    }
}
