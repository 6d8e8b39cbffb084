//! Attempts as the control plane relays them: dispatched, read into logs, fenced.

use super::*;

impl World {
    pub(super) fn dispatch(&mut self, life: u64, dispatch: Dispatch) {
        self.note(|w| {
            format!("t{} to {}, attempt {}", w.names[&dispatch.task], dispatch.pool, dispatch.attempt_number)
        });
        self.coverage.dispatches += 1;
        let now = self.now;
        match dispatch.resume {
            Some(ResumeMode::Append) => self.coverage.hit("task: continued from what was sent"),
            Some(ResumeMode::Replay) => self.coverage.hit("task: replayed"),
            None => {}
        }
        if dispatch.spec.placement.as_ref().is_some_and(|constraints| constraints.pinned_node().is_some()) {
            self.coverage.hit("task: pinned");
        }
        if dispatch.warm_replica.is_some() {
            self.coverage.hit("task: of a warm session");
        }
        let Some(control) = self.control.as_mut() else { return };
        let dispatched = self.oracle.dispatched(now, &dispatch, &control.core.view(now));
        if dispatched.is_err() {
            return self.check(dispatched);
        }
        let (task, attempt) = (dispatch.task, dispatch.attempt);
        let Some(log) = control.logs.get_mut(&task) else { return };
        log.open(attempt);
        self.next_conn += 1;
        let conn = self.next_conn;
        let watch = StreamWatch::new(now, dispatch.deadlines, dispatch.task_deadline);
        let first_check = watch.next_deadline();
        let node_id = dispatch.pool.node_id.clone();
        let node: usize = node_id.as_str()[1..].parse().expect("simulated ids are n<number>");
        control.relays.insert(attempt, Relay { task, node_id, conn, watch, accepted: false, last: None });
        self.at(first_check, What::RelayTimer { life, attempt });
        self.conns.insert(
            conn,
            Conn {
                node,
                dispatch,
                life,
                cp_open: true,
                node_open: false,
                not_before: now,
                held: Vec::new(),
                drop_held: false,
                ended_well: false,
            },
        );
        if self.shortage > 0 {
            let how = HowEnded::OwnShortage { reason: "too many open files".into(), everywhere: true };
            self.after_ms(1, What::StreamArrives { conn, piece: Piece::Answer(Box::new(how)) });
        } else if self.links[node].blocked() {
            self.after_ms(2_000, What::StreamArrives { conn, piece: Piece::Reset("connecting timed out") });
        } else {
            let delay = self.delay();
            self.after_ms(delay, What::OpenArrives { conn });
        }
    }

    pub(crate) fn stream_arrives(&mut self, conn: u64, piece: Piece) {
        let Some(c) = self.conns.get(&conn) else { return };
        let (attempt, task, life) = (c.dispatch.attempt, c.dispatch.task, c.life);
        let (open, node_id) = (c.cp_open, c.dispatch.pool.node_id.clone());
        let now = self.now;
        if !open && matches!(piece, Piece::Token(0)) {
            self.coverage.hit("race: first token crossed a close");
        }
        let Some(control) = self.control.as_mut().filter(|control| open && control.life == life) else {
            return;
        };
        let Some(relay) = control.relays.get_mut(&attempt) else { return };
        let Some(_) = control.logs.get_mut(&task) else { return };
        if relay.watch.bytes(now) {
            self.apply(Event::Heard { attempt });
        }
        let Some(control) = self.control.as_mut() else { return };
        let Some(relay) = control.relays.get_mut(&attempt) else { return };
        let Some(log) = control.logs.get_mut(&task) else { return };
        match piece {
            Piece::Headers { report_seq, replica_id } => {
                relay.watch.accepted(now);
                relay.accepted = true;
                self.oracle.accepted(task);
                self.apply(Event::Accepted { attempt, replica_id, report_seq });
            }
            Piece::Refusal(body) => self.end_relay(attempt, HowEnded::Refused(body), None),
            Piece::Answer(how) => self.end_relay(attempt, *how, None),
            Piece::Token(i) => {
                let first = relay.watch.token(now);
                match log.append(attempt, i, format!("token {i}\n").as_bytes()) {
                    Ok(()) => {
                        self.oracle.life.entry(node_id.clone()).and_modify(|l| l.any = now);
                        self.oracle.got_through(now, task, first);
                        self.read(task);
                        let event = if first { Event::Started { attempt } } else { Event::Alive { node_id } };
                        self.apply(event);
                    }
                    Err(refused) => self.check(Err(format!("[3] {task}: {refused}"))),
                }
            }
            Piece::End(i) => {
                if log.finish(attempt, i, b"end\n").is_ok() {
                    relay.last = Some(HowEnded::Finished);
                    self.note(|w| format!("t{} ends: {i} tokens", w.names[&task]));
                    self.read(task);
                }
            }
            Piece::Error(body) => relay.last = Some(HowEnded::NodeError(body)),
            Piece::FinalReport(seq) => {
                let how = relay.last.take().unwrap_or_else(|| HowEnded::Broken("no final frame".into()));
                self.end_relay(attempt, how, Some(seq));
            }
            Piece::KeepAlive => {}
            Piece::Reset(reason) => {
                let how = match relay.last.take() {
                    Some(last) => last,
                    None if relay.accepted => HowEnded::Broken(reason.into()),
                    None => HowEnded::NeverSent(reason.into()),
                };
                self.end_relay(attempt, how, None);
            }
        }
    }

    pub(crate) fn relay_timer(&mut self, life: u64, attempt: AttemptId) {
        let now = self.now;
        let Some(control) = self.control.as_ref().filter(|control| control.life == life) else { return };
        let Some(relay) = control.relays.get(&attempt) else { return };
        match relay.watch.overdue(now) {
            Some(overdue) => {
                let how = relay.last.clone().unwrap_or(HowEnded::TimedOut(overdue));
                self.end_relay(attempt, how, None);
            }
            None => {
                let control = self.control.as_mut().filter(|control| control.life == life);
                let Some(relay) = control.and_then(|control| control.relays.get_mut(&attempt)) else {
                    return;
                };
                let quiet = relay.watch.grows_quiet(now);
                let next = relay.watch.next_deadline();
                self.at(next, What::RelayTimer { life, attempt });
                if quiet {
                    self.apply(Event::Quiet { attempt });
                }
            }
        }
    }

    pub(crate) fn fence(&mut self, life: u64, task: TaskId, attempt: AttemptId) {
        let Some(control) = self.control.as_ref().filter(|control| control.life == life) else { return };
        if let Some(relay) = control.relays.get(&attempt) {
            if relay.last.is_some() || control.logs.get(&task).is_some_and(TaskLog::is_finished) {
                self.coverage.hit("race: end crossed a close");
            }
            self.end_relay(attempt, HowEnded::Closed, None);
        }
    }

    /// Fences the log, tells the core, drops the connection.
    fn end_relay(&mut self, attempt: AttemptId, how: HowEnded, final_report: Option<u64>) {
        let Some(control) = self.control.as_mut() else { return };
        let Some(relay) = control.relays.remove(&attempt) else { return };
        let Some(log) = control.logs.get_mut(&relay.task) else { return };
        let fence = log.fence(attempt);
        let how = if fence.finished { HowEnded::Finished } else { how };
        self.note(|w| format!("t{} attempt over: {}", w.names[&relay.task], brief_end(&how)));
        if let HowEnded::NodeError(body) = &how
            && let Some(crash) = &body.crash
            && crash.suspect
        {
            self.coverage.hit(match crash.suspects {
                1 => "task: crashed an engine alone",
                _ => "task: one of several that may have",
            });
        }
        let failed = self.oracle.ended(self.now, relay.task, attempt, &how, fence.tokens_written);
        self.drop_conn(relay.conn);
        let tokens_written = fence.tokens_written;
        self.apply(Event::Ended { attempt, tokens_written, unlogged: 0, how, final_report });
        if let (Some(pool), Some(control)) = (failed, self.control.as_ref()) {
            let tripped = control.core.registry().pool_facts(&pool).is_some_and(|facts| facts.tripped);
            let early = self.oracle.tripped_early(&pool, tripped);
            self.check(early);
        }
        let poison = self.oracle.poison();
        self.check(poison);
    }

    pub(super) fn drop_conn(&mut self, conn: u64) {
        let delay = self.delay();
        let Some(c) = self.conns.get_mut(&conn) else { return };
        c.cp_open = false;
        if self.links[c.node].blocked() {
            c.drop_held = true;
        } else {
            self.after_ms(delay, What::DropArrives { conn });
        }
    }

    pub(crate) fn probe_answered(
        &mut self,
        life: u64,
        node_id: NodeId,
        address: String,
        outcome: ProbeOutcome,
    ) {
        if self.control.as_ref().is_some_and(|control| control.life == life) {
            self.apply(Event::Probed { node_id, address, outcome });
        }
    }
}
