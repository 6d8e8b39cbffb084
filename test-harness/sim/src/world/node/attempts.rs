//! Attempts as they come to a node and leave it.

use attempt_link::wire::Start;

use super::*;

impl World {
    pub(super) fn open_arrives(&mut self, node: usize, conn: u64) {
        let Some(c) = self.conns.get(&conn) else { return };
        let (dispatch, keeps) = (c.dispatch.clone(), c.keeps);
        let plan = &self.plan.tasks[self.names[&dispatch.task]];
        let (tokens, poison, crashes) = (plan.tokens, plan.poison, plan.crashes);
        let with_ids = plan.recovery == Some(Replays::FromTheEnd);
        let hung = self.nodes[node].hung > 0;
        let boot = self.nodes[node].boot;
        let now = self.now;
        let replays = dispatch.resume == Some(ResumeMode::Replay);
        let voice = self.voices.get(&dispatch.task).copied();
        let differs = replays && voice.is_some_and(|odd| odd != self.plan.nodes[node].odd);
        let Some(core) = self.nodes[node].core.as_mut() else {
            return self.send_piece(conn, Piece::Reset("connection refused"));
        };
        if let (Some(fault), _) = self.node_faults[node] {
            return self.answer_badly(conn, fault);
        }
        let ask = Ask {
            node_id: &dispatch.pool.node_id,
            boot_id: dispatch.boot_id,
            attempt: dispatch.attempt,
            model: Some(&dispatch.spec.model_ref),
            task: Some(dispatch.task),
            hint: None,
            first_index: dispatch.first_index,
            retention: if keeps { Retention::Keep } else { Retention::Attached },
        };
        match core.accept(now, &dispatch.pool.pool_id, &ask) {
            Err(refusal) => {
                if refusal.code == ErrorCode::ReplicaExhausted && core.held().is_full() {
                    self.coverage.hit("stream: no room for another");
                }
                self.send_piece(conn, Piece::Refusal(refusal));
            }
            Ok(accepted) => {
                let run = Run {
                    via: Via::Conn(conn),
                    task: dispatch.task,
                    log: dispatch.log,
                    began: now,
                    with_ids,
                    differs,
                    replica: accepted.replica_id.clone(),
                    next: dispatch.first_index,
                    made: 0,
                    taken: 0,
                    full_since: None,
                    tokens,
                    stuck: false,
                    poison,
                    crashes,
                    hung,
                };
                self.engine_is_asked(node, dispatch.attempt);
                self.nodes[node].runs.insert(dispatch.attempt, run);
                self.check_slots(node, &accepted.replica_id);
                if let Some(c) = self.conns.get_mut(&conn) {
                    (c.node_open, c.cursor) = (true, Some(Cursor::first()));
                }
                let report_seq = accepted.report_seq;
                self.send_acceptance(conn, Piece::Headers { report_seq, replica_id: accepted.replica_id });
                let slow = if self.nodes[node].slow > 0 { 20 } else { 1 };
                // What was sent before comes once more, and is swallowed.
                let again = if replays { dispatch.first_index * self.plan.pace_ms / 4 } else { 0 };
                let first = self.random.u64(..=self.plan.first_token_ms) * slow + again;
                self.after_ms(first, What::EngineStep { node, boot, attempt: dispatch.attempt });
                self.after_ms(1_000, What::KeepAlive { conn });
            }
        }
    }

    /// The node has taken an attempt that came over a link.
    pub(crate) fn begin_by_link(&mut self, node: usize, start: &Start, replica: ReplicaId) {
        let facts = &start.facts;
        let (now, boot, attempt) = (self.now, self.nodes[node].boot, facts.attempt_id);
        let plan = &self.plan.tasks[self.names[&facts.task_id]];
        let replays = facts.resume.as_ref().is_some_and(|resume| resume.mode == ResumeMode::Replay);
        let voice = self.voices.get(&facts.task_id).copied();
        let run = Run {
            via: Via::Link { keep: facts.keep },
            task: facts.task_id,
            log: facts.log_id,
            began: now,
            with_ids: plan.recovery == Some(Replays::FromTheEnd),
            differs: replays && voice.is_some_and(|odd| odd != self.plan.nodes[node].odd),
            replica: replica.clone(),
            next: facts.first_index,
            made: 0,
            taken: 0,
            full_since: None,
            tokens: plan.tokens,
            stuck: false,
            poison: plan.poison,
            crashes: plan.crashes,
            hung: self.nodes[node].hung > 0,
        };
        self.engine_is_asked(node, attempt);
        self.nodes[node].runs.insert(attempt, run);
        self.check_slots(node, &replica);
        let slow = if self.nodes[node].slow > 0 { 20 } else { 1 };
        let again = if replays { facts.first_index * self.plan.pace_ms / 4 } else { 0 };
        let first = self.random.u64(..=self.plan.first_token_ms) * slow + again;
        self.after_ms(first, What::EngineStep { node, boot, attempt });
    }

    /// The node itself does not take the attempt.
    fn answer_badly(&mut self, conn: u64, fault: NodeFault) {
        let how = match fault {
            NodeFault::Denies => HowEnded::Denied("it answers HTTP 401".into()),
            NodeFault::Rejects => {
                HowEnded::Rejected(ErrorBody::new(ErrorCode::InvalidParams, "it does not know a field"))
            }
            NodeFault::Fails => HowEnded::NodeFailed("it answers HTTP 500".into()),
            NodeFault::Refuses(code) => HowEnded::Refused(ErrorBody::new(code, "not now")),
            NodeFault::Resets => HowEnded::NoAnswer("connection reset".into()),
            NodeFault::SaysNothing => return,
        };
        self.send_piece(conn, Piece::Answer(Box::new(how)));
    }

    pub(super) fn keep_alive(&mut self, conn: u64) {
        if let Some(c) = self.conns.get(&conn).filter(|c| c.node_open) {
            // Nothing goes past what stands still.
            if c.slow_until <= self.now {
                self.send_bytes(conn, b": ka\n\n", false);
            }
            self.after_ms(1_000, What::KeepAlive { conn });
        }
    }

    /// The control plane has dropped the connection: the engine's request is dropped too.
    pub(super) fn drop_arrives(&mut self, node: usize, conn: u64) {
        let Some(c) = self.conns.remove(&conn) else { return };
        let (attempt, now) = (c.dispatch.attempt, self.now);
        if c.keeps {
            self.closing_arrives(node, attempt, c.closing);
            if let Some(cursor) = c.cursor.filter(|_| c.closing == Closing::Lost) {
                self.detach(now, node, attempt, &cursor);
            }
            return;
        }
        if let Some(core) = self.nodes[node].core.as_mut().filter(|_| c.node_open || c.ended_at_node) {
            core.stopped(now, &attempt);
        }
        if c.node_open
            && let Some(run) = self.nodes[node].runs.remove(&attempt)
        {
            if let Some(core) = self.nodes[node].core.as_mut() {
                core.ended_before_release(now, &attempt);
            }
            self.haunt(node, attempt, run.replica);
        }
    }
}
