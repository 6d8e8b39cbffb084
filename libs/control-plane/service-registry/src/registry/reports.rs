//! A node's whole report: what it runs, held against what we think it runs.

use super::*;

/// What a report is held against.
struct Books<'r> {
    claims: &'r Claims,
    /// The numbers of reports count.
    fenced: bool,
    /// A pool that is named twice is one.
    once: bool,
    /// What a node has kept the end of is there.
    held: bool,
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
        let once = self.enforces(Rule::PoolNamedTwice);
        let held = self.enforces(Rule::HeldIsListed);
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
            node.problems = beat.problems;
            let claims = std::mem::take(&mut node.claims);
            let books = Books { claims: &claims, fenced, once, held };
            let (listed, orphans) = node.take_pools(now, beat.seq, beat.pools, &books, models);
            node.closed.forget_before(beat.seq);
            let vanished = claims.iter().filter(|(attempt, claim)| {
                let accepted_after = claim.accepted_after;
                !listed.contains(attempt) && (!fenced || accepted_after.is_some_and(|after| after < beat.seq))
            });
            let vanished = vanished.map(|(attempt, _)| *attempt).collect();
            node.claims = claims;
            let returned = before != Liveness::Online;
            HeartbeatOutcome::Taken { intent: node.order(), returned, vanished, orphans }
        });
        self.review_mass_silence();
        taken.ok_or(NodeNotKnown)
    }
}

impl Node {
    /// Takes the pools of report `seq`. Returns the attempts that it lists, those included whose end the
    /// node has kept, and the orphans: those that run and are not reserved here.
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
                if !books.claims.contains_key(attempt) {
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
            let of_pool = books.claims.iter().filter(|(_, claim)| claim.pool_id == report.pool_id);
            let reserved = of_pool.map(|(attempt, _)| *attempt).collect();
            self.pools.insert(report.pool_id.clone(), PoolBook::new(report, seq, reserved, reported));
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
        if again || away(book.report()) || away(&report) {
            book.breaker = Breaker::default();
        }
        book.renew(report, seq, reported);
    }
}
