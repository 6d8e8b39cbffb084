//! What nodes say: registration, heartbeats, deregistration; and the index that follows from them.

use service_registry::{IndexMismatch, NodeConflict, PoolFacts, Registrar};

use super::predicting::note_change;
use super::*;

impl ControlCore {
    pub(super) fn register(
        &mut self,
        now: Moment,
        to: ReplyTo,
        request: RegisterRequest,
        registrar: Option<&Registrar>,
        effects: &mut Vec<Effect>,
    ) {
        let node_id = request.node_id.clone();
        let answer = match self.registry.register(now, request, registrar) {
            Ok(registered) => {
                self.counters.registrations += 1;
                self.close_all(now, &registered.ended, CloseReason::NodeRestarted, effects);
                self.sync_node(&node_id);
                Ok(Answer::Registered(RegisterAnswer {
                    node_id,
                    epoch: registered.epoch,
                    heartbeat_interval_ms: millis(self.policy.timing.heartbeat_interval),
                    node_timeout_ms: millis(self.policy.timing.node_timeout),
                    intent: registered.intent.0,
                    intent_order: registered.intent.1,
                    life: None,
                }))
            }
            Err(conflict) => {
                let code = match conflict {
                    NodeConflict::IdTaken { .. } => ErrorCode::NodeIdConflict,
                    NodeConflict::TooMany(_) => ErrorCode::Overloaded,
                    NodeConflict::RegistrarFull { .. } => ErrorCode::RateLimited,
                };
                self.counters.conflicts += u64::from(code == ErrorCode::NodeIdConflict);
                let mut body = ErrorBody::new(code, conflict.to_string())
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
        let reported = beat.intent;
        let (cancel_attempts, intent) = match self.registry.heartbeat(now, node_id, beat) {
            Ok(HeartbeatOutcome::Ignored) => {
                self.counters.old_reports += 1;
                (Vec::new(), (reported, 0))
            }
            Ok(HeartbeatOutcome::Taken { intent, returned, vanished, mut orphans }) => {
                // What runs on another node for all we know is no orphan of this one.
                orphans.retain(|id| self.attempts.get(id).is_none());
                self.counters.returns += u64::from(returned);
                self.counters.orphans += orphans.len() as u64;
                self.await_ends(now, &vanished);
                self.sync_node(node_id);
                self.revive_lanes(now, node_id);
                (orphans, intent)
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
        let answer = HeartbeatAnswer {
            heartbeat_interval_ms,
            waiting: self.waited_for(now, node_id),
            cancel_attempts,
            intent: intent.0,
            intent_order: intent.1,
            observed: self.registry.observed(node_id),
        };
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
            // Its streams may still bring ends that the deregistration has overtaken.
            self.await_ends(now, &ended);
            self.sync_node(node_id);
        }
        effects.push(Effect::Reply { to, answer: Ok(Answer::Deregistered) });
    }

    /// What its link says of a node.
    pub(super) fn link_evidence(
        &mut self,
        now: Moment,
        node_id: &NodeId,
        lane: u16,
        evidence: LinkEvidence,
        effects: &mut Vec<Effect>,
    ) {
        let is_quiet = matches!(evidence, LinkEvidence::Quiet(_));
        let transition = match evidence {
            LinkEvidence::CannotConnect(reason) | LinkEvidence::Quiet(reason) => {
                self.registry.dial_failed(now, node_id, reason)
            }
            LinkEvidence::Denied(reason) => self.registry.denied(now, node_id, now, reason),
            LinkEvidence::OrdersDoNotArrive => self.registry.orders_arrive(node_id, lane, false),
            LinkEvidence::OrdersArrive => self.registry.orders_arrive(node_id, lane, true),
        };
        self.note(transition.as_slice());
        self.sync_node(node_id);
        // What runs there goes by any of its lanes: one that is up may bring it.
        if is_quiet && !self.registry.has_lane_up(node_id) {
            self.move_linked(now, node_id, effects);
        }
    }

    /// An operator wants the node to drain or to serve: it counts here at once, and the node is told.
    pub(super) fn want(&mut self, to: ReplyTo, node_id: NodeId, intent: Intent, effects: &mut Vec<Effect>) {
        match self.registry.want(&node_id, intent) {
            Some((address, order)) => {
                self.sync_node(&node_id);
                effects.push(Effect::DeliverIntent { to, node_id, address, order });
            }
            // It is told when it is back.
            None if self.registry.want_stored(&node_id, intent) => {
                let answer = IntentAnswer { node_id, intent, kept_by_node: false, running: 0 };
                effects.push(Effect::Reply { to, answer: Ok(Answer::Intent(answer)) });
            }
            None => {
                let mut body = ErrorBody::new(ErrorCode::NodeUnknown, format!("no node {node_id}"));
                body.node_id = Some(node_id);
                effects.push(Effect::Reply { to, answer: Err(body) });
            }
        }
    }

    pub(super) fn intent_delivered(
        &mut self,
        to: ReplyTo,
        node_id: NodeId,
        order: &IntentOrder,
        kept_by_node: bool,
        effects: &mut Vec<Effect>,
    ) {
        if kept_by_node {
            self.registry.intent_taken(&node_id, order);
            self.sync_node(&node_id);
        }
        let running = self.registry.attempts_of(&node_id).len();
        let running = u32::try_from(running).unwrap_or(u32::MAX);
        let intent = order.intent;
        let answer = Ok(Answer::Intent(IntentAnswer { node_id, intent, kept_by_node, running }));
        effects.push(Effect::Reply { to, answer });
    }

    /// Brings the index up to what the registry knows of a node's pools.
    pub(super) fn sync_node(&mut self, node_id: &NodeId) {
        self.dirty_pins.insert(node_id.clone());
        self.show_node(node_id);
        // What differs; nothing for a pool that is gone.
        let mut differs: Vec<(PoolId, Option<(Candidate, Shown)>)> = Vec::new();
        let mut known = self.synced.get(node_id).into_iter().flatten().peekable();
        for (id, facts) in self.registry.pools_facts(node_id) {
            while let Some((gone, _)) = known.next_if(|(known, _)| *known < id) {
                differs.push((gone.clone(), None));
            }
            match known.next_if(|(known, _)| *known == id) {
                Some((_, row)) if self.is_synced(*row, &facts) => {}
                _ => {
                    let key = PoolKey::new(node_id.clone(), id.clone());
                    differs.push((id.clone(), Some((candidate_of(key, &facts), Shown::of(&facts)))));
                }
            }
        }
        differs.extend(known.map(|(gone, _)| (gone.clone(), None)));
        if differs.is_empty() {
            return;
        }
        let mut pools = self.synced.get_mut(node_id).map(std::mem::take).unwrap_or_default();
        // Of a pool that is as it was, no lane learns anything.
        let before = differs.iter().filter_map(|(id, _)| self.index.at(*pools.get(id)?));
        self.dirty.extend(before.flat_map(|pool| &pool.models).cloned());
        for (id, is) in differs {
            let key = PoolKey::new(node_id.clone(), id.clone());
            let row = self.show_and_index(&key, pools.remove(&id), is);
            pools.extend(row.map(|row| (id, row)));
        }
        self.keep_synced(node_id, pools);
    }

    fn keep_synced(&mut self, node_id: &NodeId, pools: BTreeMap<PoolId, PoolRow>) {
        if pools.is_empty() {
            self.synced.remove(node_id);
        } else if let Some(known) = self.synced.get_mut(node_id) {
            *known = pools;
        } else {
            self.synced.insert(node_id.clone(), pools);
        }
    }

    /// The pools of a node as the index has them.
    pub(super) fn pools_of(&self, node_id: &NodeId) -> impl Iterator<Item = &Candidate> {
        self.synced.get(node_id).into_iter().flatten().filter_map(|(_, row)| self.index.at(*row))
    }

    fn show_node(&mut self, node_id: &NodeId) {
        let is = self.registry.liveness(node_id).zip(self.registry.intent(node_id));
        if self.shown_nodes.get(node_id).copied() == is {
            return;
        }
        let was = match is {
            Some(is) => self.shown_nodes.insert(node_id.clone(), is),
            None => self.shown_nodes.remove(node_id),
        };
        let (liveness, intent) = is.unzip();
        // One that has just come is dialled first, and that is nothing to be warned of.
        let is_new = was.is_none() && liveness == Some(Liveness::Suspect);
        if liveness != was.map(|(liveness, _)| liveness) && !is_new {
            self.restless.insert(node_id.clone());
        }
        self.changes.push((None, ClusterChange::Node { node_id: node_id.clone(), liveness, intent }));
    }

    /// What the log says of the nodes whose liveness has changed.
    pub(super) fn note_nodes(&mut self, now: Moment, effects: &mut Vec<Effect>) {
        for node_id in std::mem::take(&mut self.restless) {
            // One that left, or is forgotten, is spoken of where that happens.
            let Some(observed) = self.registry.observed(&node_id) else { continue };
            let evidence_age_ms = self.registry.evidence_age_ms(now, &node_id).unwrap_or(0);
            effects.push(Effect::Note(Note::LivenessChanged { node_id, observed, evidence_age_ms }));
        }
    }

    /// Brings the index up to what the registry knows of a pool, as far as that changes between the
    /// reports of its node.
    pub(super) fn sync_pool(&mut self, key: &PoolKey) {
        self.sync_one(key, self.index.row(key), false);
    }

    /// The same of the pool that an attempt runs on.
    pub(super) fn sync_pool_of(&mut self, attempt: &Attempt) {
        self.sync_one(&attempt.pool, self.row_of(attempt), false);
    }

    /// The same of one that was given a task.
    pub(super) fn sync_taken(&mut self, choice: &Choice) {
        let key = &choice.pool;
        if self.registry.has_open_breaker(&key.node_id) {
            self.index.taken(key);
            self.sync_node(&key.node_id);
        } else {
            self.sync_one(key, Some(choice.row), true);
        }
    }

    /// Where the pool of an attempt stands now, if it is still there.
    pub(super) fn row_of(&self, attempt: &Attempt) -> Option<PoolRow> {
        let is_there = self.index.at(attempt.row).is_some_and(|pool| pool.key == attempt.pool);
        if is_there { Some(attempt.row) } else { self.index.row(&attempt.pool) }
    }

    fn sync_one(&mut self, key: &PoolKey, row: Option<PoolRow>, taken: bool) {
        let facts = self.registry.pool_facts(key);
        let known = row.and_then(|row| Some((row, self.index.at(row)?)));
        if let Some(((row, candidate), facts)) = known.zip(facts.as_ref())
            && candidate.availability == availability(facts)
        {
            // What its node reports was compared when it came: only how full it is may differ.
            self.dirty.extend(candidate.models.iter().cloned());
            let (slots_busy, held) = (facts.slots_busy, facts.held);
            if candidate.slots_busy != slots_busy {
                for model in &candidate.models {
                    note_change(&mut self.forecasts, model);
                }
            }
            if taken || (candidate.slots_busy, candidate.held) != (slots_busy, held) {
                self.index.set_slots(row, slots_busy, held, taken);
            }
            return;
        }
        let is = facts.map(|facts| (candidate_of(key.clone(), &facts), Shown::of(&facts)));
        let mut pools = self.synced.get_mut(&key.node_id).map(std::mem::take).unwrap_or_default();
        // Who avoids a pool that failed it may take that one again once the others are out.
        let was = pools.remove(&key.pool_id);
        let models = was.and_then(|row| self.index.at(row)).into_iter().flat_map(|was| &was.models);
        self.dirty.extend(models.cloned());
        if taken {
            self.index.taken(key);
        }
        let row = self.show_and_index(key, was, is);
        pools.extend(row.map(|row| (key.pool_id.clone(), row)));
        self.keep_synced(&key.node_id, pools);
    }

    /// Whether the pool in the row is shown and indexed as these facts are.
    fn is_synced(&self, row: PoolRow, facts: &PoolFacts<'_>) -> bool {
        let shown = self.shown_pools.get(row.place()).and_then(Option::as_ref);
        shown.is_some_and(|shown| shown.is_of(facts))
            && self.index.at(row).is_some_and(|candidate| is_of(candidate, facts))
    }

    pub(super) fn served_by(&self, row: PoolRow) -> Option<Served> {
        self.shown_pools.get(row.place())?.as_ref()?.served
    }

    /// What a pool last served, while it is there.
    pub(super) fn served_at(&mut self, row: PoolRow) -> Option<&mut Option<Served>> {
        Some(&mut self.shown_pools.get_mut(row.place())?.as_mut()?.served)
    }

    /// Compares what is shown and indexed with all that the registry knows.
    ///
    /// # Errors
    /// What differs.
    pub(super) fn check_synced(&self) -> Result<(), IndexMismatch> {
        let mut known = 0;
        for (node_id, _) in self.shown_nodes.in_order() {
            for (id, facts) in self.registry.pools_facts(node_id) {
                let row = self.synced.get(node_id).and_then(|pools| pools.get(id));
                let key = PoolKey::new(node_id.clone(), id.clone());
                let is_indexed =
                    |row: &PoolRow| self.is_synced(*row, &facts) && self.index.row(&key) == Some(*row);
                if !row.is_some_and(is_indexed) {
                    let pool = row.and_then(|row| self.index.at(*row));
                    return Err(IndexMismatch::new(
                        "a pool that is shown and indexed",
                        &pool,
                        &(key, &facts),
                    ));
                }
                known += 1;
            }
        }
        let indexed: usize = self.synced.in_order().map(|(_, pools)| pools.len()).sum();
        IndexMismatch::unless_equal("pools that are shown and indexed", &indexed, &known)?;
        let shown = self.shown_pools.iter().flatten().count();
        IndexMismatch::unless_equal("pools that are shown", &shown, &known)
    }

    /// Shows and indexes what has become of a pool. Returns where it stands, if it is there.
    fn show_and_index(
        &mut self,
        key: &PoolKey,
        was: Option<PoolRow>,
        is: Option<(Candidate, Shown)>,
    ) -> Option<PoolRow> {
        let before = was.and_then(|row| self.shown_pools.get_mut(row.place())?.take());
        if before.as_ref().map(|was| &was.state) != is.as_ref().map(|(_, is)| &is.state) {
            let (state, ready, preparation) = match is.as_ref().map(|(_, is)| is.state.clone()) {
                Some((state, ready, preparation)) => (Some(state), ready, preparation),
                None => (None, false, None),
            };
            let (node_id, pool_id) = (key.node_id.clone(), key.pool_id.clone());
            self.changes.push((None, ClusterChange::Pool { node_id, pool_id, state, ready, preparation }));
        }
        let was = was.and_then(|row| Some((row, self.index.at(row)?)));
        let Some((candidate, shown)) = is else {
            for model in was.into_iter().flat_map(|(_, was)| &was.models) {
                self.forecasts.remove(model);
            }
            self.sessions.cooled(key, &[]);
            self.paces.forget(key);
            self.loads_asked.remove(key);
            self.index.remove(key);
            return None;
        };
        // A replica that was away may have another engine: its cache is another one.
        if before.as_ref().map(|was| &was.ready) != Some(&shown.ready) {
            self.sessions.cooled(key, &shown.ready);
        }
        let availability = candidate.availability;
        if (availability == Availability::Placeable && candidate.has_free_slot())
            || availability == Availability::Loadable
        {
            self.dirty.extend(candidate.models.iter().cloned());
        }
        if availability != Availability::Loadable {
            self.loads_asked.remove(key);
        }
        let row = match was {
            Some((row, was)) if *was == candidate => row,
            _ => {
                forget_forecasts(&mut self.forecasts, was.map(|(_, was)| was), &candidate);
                self.index.upsert(candidate)
            }
        };
        if self.shown_pools.len() <= row.place() {
            self.shown_pools.resize_with(row.place() + 1, || None);
        }
        self.shown_pools[row.place()] = Some(Shown { served: before.and_then(|was| was.served), ..shown });
        Some(row)
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

/// Where a pool comes, goes or gets other slots, what was forecast for its models is worth nothing.
fn forget_forecasts(forecasts: &mut BTreeMap<ModelRef, Forecast>, was: Option<&Candidate>, is: &Candidate) {
    let slots = |c: &Candidate| (c.availability == Availability::Placeable).then_some(c.slots_total);
    if let Some(was) = was
        && (slots(was), &was.models) == (slots(is), &is.models)
    {
        if was.slots_busy != is.slots_busy {
            is.models.iter().for_each(|model| note_change(forecasts, model));
        }
        return;
    }
    for model in was.into_iter().chain([is]).flat_map(|c| &c.models) {
        forecasts.remove(model);
    }
}

/// A pool as it was last shown to followers, and what else is known of it beside the index.
#[derive(Debug)]
pub(super) struct Shown {
    state: (PoolState, bool, Option<String>),
    /// Its replicas that took requests at its last report.
    ready: Vec<ReplicaId>,
    /// What it served last.
    served: Option<Served>,
}

impl Shown {
    fn of(facts: &PoolFacts<'_>) -> Self {
        Self {
            state: (facts.report.state, facts.report.ready, preparation(facts).cloned()),
            ready: ready(facts).cloned().collect(),
            served: None,
        }
    }

    /// Whether [`Shown::of`] these facts is this, whatever it has served.
    fn is_of(&self, facts: &PoolFacts<'_>) -> bool {
        (self.state.0, self.state.1) == (facts.report.state, facts.report.ready)
            && self.state.2.as_ref() == preparation(facts)
            && self.ready.iter().eq(ready(facts))
    }
}

/// A pool as placement is to know it.
fn candidate_of(key: PoolKey, facts: &PoolFacts<'_>) -> Candidate {
    let supervised = facts.report.supervised.as_ref();
    Candidate {
        key,
        availability: availability(facts),
        engine: facts.report.engine,
        models: facts.report.models.clone(),
        ctx_max: facts.report.ctx_max,
        device_mask: facts.report.device_mask.clone(),
        labels: Arc::clone(facts.labels),
        slots_total: facts.slots_total,
        slots_busy: facts.slots_busy,
        held: facts.held,
        vram_free_bytes: facts.report.vram_free_bytes,
        load_estimate_ms: supervised.and_then(|own| own.load_estimate_ms),
        fits_now: fits_now(facts),
        passes_on: facts.passes_on,
    }
}

/// Whether [`candidate_of`] these facts is this.
fn is_of(candidate: &Candidate, facts: &PoolFacts<'_>) -> bool {
    let Candidate {
        key: _,
        availability: stands,
        engine,
        models,
        ctx_max,
        device_mask,
        labels,
        slots_total,
        slots_busy,
        held,
        vram_free_bytes,
        load_estimate_ms,
        fits_now: fits,
        passes_on,
    } = candidate;
    let (report, supervised) = (facts.report, facts.report.supervised.as_ref());
    *stands == availability(facts)
        && (*slots_total, *slots_busy, *held) == (facts.slots_total, facts.slots_busy, facts.held)
        && (*engine, *ctx_max, *vram_free_bytes) == (report.engine, report.ctx_max, report.vram_free_bytes)
        && *load_estimate_ms == supervised.and_then(|own| own.load_estimate_ms)
        && (*fits, *passes_on) == (fits_now(facts), facts.passes_on)
        && *models == report.models
        && *device_mask == report.device_mask
        && labels == facts.labels
}

fn availability(facts: &PoolFacts<'_>) -> Availability {
    match (facts.liveness, facts.intent) {
        (Liveness::Offline, _) => Availability::Offline,
        (Liveness::Suspect, _) => Availability::Suspect,
        (Liveness::Online, Intent::Draining) => Availability::Draining,
        (Liveness::Online, Intent::Serving) if facts.draining => Availability::Draining,
        (Liveness::Online, Intent::Serving) if !facts.ready => unready(facts.report),
        (Liveness::Online, Intent::Serving) if facts.tripped => Availability::Tripped,
        (Liveness::Online, Intent::Serving) => Availability::Placeable,
    }
}

/// What is done before its engine starts.
fn preparation<'r>(facts: &PoolFacts<'r>) -> Option<&'r String> {
    facts.report.supervised.as_ref()?.preparation.as_ref()
}

/// Its replicas that take requests.
fn ready<'r>(facts: &PoolFacts<'r>) -> impl Iterator<Item = &'r ReplicaId> {
    let serves = facts.report.ready || facts.report.draining;
    facts.report.replicas.iter().filter(move |replica| serves && replica.ready).map(|r| &r.replica_id)
}

/// Whether the memory that its engine takes is free already.
fn fits_now(facts: &PoolFacts<'_>) -> bool {
    let needed = facts.report.supervised.as_ref().and_then(|own| own.memory_required_bytes);
    needed.is_none_or(|needed| facts.report.vram_free_bytes.is_none_or(|free| needed <= free))
}

/// How a pool stands that takes no requests at the moment.
fn unready(report: &PoolReport) -> Availability {
    match report.state {
        PoolState::Loading => Availability::Loading,
        PoolState::Loadable if report.supervised.as_ref().is_some_and(|own| own.fits) => {
            Availability::Loadable
        }
        PoolState::Loadable => Availability::NoMemory,
        PoolState::Ready | PoolState::Draining | PoolState::Failed | PoolState::Unknown => {
            Availability::NotReady
        }
    }
}
