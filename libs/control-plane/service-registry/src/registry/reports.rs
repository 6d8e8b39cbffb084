//! A node's whole report: what it runs, held against what we think it runs.

use super::*;

/// What a report is held against.
struct Books<'r> {
    reservations: &'r Reservations,
    of_node: Option<&'r BTreeMap<AttemptId, Reservation>>,
    /// The numbers of reports count.
    fenced: bool,
    /// A pool that is named twice is one.
    once: bool,
    /// What a node has kept the end of is there.
    held: bool,
}

impl Books<'_> {
    fn knows(&self, attempt: &AttemptId) -> bool {
        // Mostly it is of this node.
        self.of_node.is_some_and(|of_node| of_node.contains_key(attempt))
            || self.reservations.contains(attempt)
    }
}

impl ServiceRegistry {
    /// Takes a whole report.
    pub fn heartbeat(
        &mut self,
        now: Moment,
        node_id: &NodeId,
        beat: Heartbeat,
    ) -> Result<HeartbeatOutcome, NodeNotKnown> {
        let node = self.nodes.get(node_id).ok_or(NodeNotKnown)?;
        if node.epoch != beat.epoch {
            return Err(NodeNotKnown);
        }
        if node.last_seq.is_some_and(|last| beat.seq <= last) {
            return Ok(HeartbeatOutcome::Ignored);
        }
        let fenced = self.enforces(Rule::ReportSequence);
        let books = Books {
            reservations: &self.reservations,
            of_node: self.reservations.of_node(node_id),
            fenced,
            once: self.enforces(Rule::PoolNamedTwice),
            held: self.enforces(Rule::HeldIsListed),
        };
        let models = &mut self.models;
        let taken = self.nodes.change(node_id, |node| {
            let before = node.evidence.liveness();
            node.evidence.heard(now);
            node.last_seq = Some(beat.seq);
            if beat.tokens_changed != node.tokens_changed {
                node.tokens_changed = beat.tokens_changed;
                node.evidence.ask_again(now);
            }
            node.reported(beat.intent, beat.intent_order);
            node.gpus = beat.gpus;
            node.models = beat.models;
            let (listed, orphans) = node.take_pools(now, beat.seq, beat.pools, &books, models);
            node.closed.forget_before(beat.seq);
            let vanished = books.of_node.into_iter().flatten().filter(|(attempt, reservation)| {
                let accepted_after = reservation.accepted_after;
                !listed.contains(attempt) && (!fenced || accepted_after.is_some_and(|after| after < beat.seq))
            });
            HeartbeatOutcome::Taken {
                intent: node.order(),
                returned: before != Liveness::Online,
                vanished: vanished.map(|(attempt, _)| *attempt).collect(),
                orphans,
            }
        });
        self.review_mass_silence();
        taken.ok_or(NodeNotKnown)
    }
}

impl Node {
    /// Takes the pools of report `seq`. Returns the attempts that it lists, those included whose end the
    /// node has kept, and the orphans: those that run and that nobody here knows.
    fn take_pools(
        &mut self,
        now: Moment,
        seq: u64,
        reports: Vec<PoolReport>,
        books: &Books<'_>,
        models: &mut Models,
    ) -> (BTreeSet<AttemptId>, Vec<AttemptId>) {
        let mut listed = BTreeSet::new();
        let mut orphans = Vec::new();
        for report in reports {
            // No task can use what an engine of an unknown kind serves.
            if let Some(engine) = report.engine {
                for model in &report.models {
                    // An engine is kept by its reports, whether or not it takes tasks at the moment.
                    models.seen(now, &self.request.node_id, model, engine, report.state.has_model());
                }
            }
            if books.held {
                listed.extend(report.replicas.iter().flat_map(|replica| &replica.held));
            }
            let mut reported = BTreeSet::new();
            for attempt in report.replicas.iter().flat_map(|r| &r.attempts) {
                listed.insert(*attempt);
                if books.fenced && self.closed.explains(attempt, seq) {
                    continue;
                }
                reported.insert(*attempt);
                if !books.knows(attempt) {
                    orphans.push(*attempt);
                }
            }
            self.take_pool(seq, report, reported, books);
        }
        // What the report does not name is not there any more.
        self.pools.retain(|_, book| book.named_in == seq);
        (listed, orphans)
    }

    fn take_pool(&mut self, seq: u64, report: PoolReport, reported: BTreeSet<AttemptId>, books: &Books<'_>) {
        let Some(book) = self.pools.get_mut(&report.pool_id) else {
            let of_pool = books.of_node.into_iter().flatten();
            let of_pool = of_pool.filter(|(_, reservation)| reservation.pool.pool_id == report.pool_id);
            let reserved = of_pool.map(|(attempt, _)| *attempt).collect();
            let (id, breaker) = (report.pool_id.clone(), Breaker::default());
            let book = PoolBook { report, named_in: seq, reserved, reported, held_until: None, breaker };
            self.pools.insert(id, book);
            return;
        };
        let again = book.named_in == seq;
        if again && books.once {
            // Named twice: one pool all the same.
            book.join(report, reported);
            return;
        }
        if again {
            book.reserved.clear();
        }
        // A pool that was away may have another engine: nothing is held against that one.
        let away = |report: &PoolReport| !report.ready && !report.draining;
        if again || away(&book.report) || away(&report) {
            book.breaker = Breaker::default();
        }
        (book.report, book.reported, book.named_in) = (report, reported, seq);
        book.held_until = None;
    }
}
