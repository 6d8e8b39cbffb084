//! The shell of the relays: attempts dispatched, carried into logs by the production relay, ended and
//! stopped.

use super::super::links::number_of;
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
        let ids = (0..).take(usize::try_from(dispatch.first_index).unwrap_or(usize::MAX));
        if dispatch.resume == Some(ResumeMode::Append)
            && log.token_ids().all(dispatch.first_index) != Some(&ids.collect::<Vec<u32>>())
        {
            return self.check(Err(format!("[3] {task} goes on without the ids of its tokens")));
        }
        let node_id = dispatch.pool.node_id.clone();
        self.writers.entry(dispatch.log).or_default().push(Writer {
            attempt,
            node_id: node_id.clone(),
            first_index: dispatch.first_index,
            number: dispatch.attempt_number,
        });
        if self.has_lane(number_of(&node_id)) {
            self.coverage.hit("link: attempt");
            let relay = task_stream::Relay::linked(now, dispatch.assignment());
            self.relay_begins(Via::Link(Linked::new(dispatch.clone())), relay, &dispatch);
            return self.start_by_link(&dispatch);
        }
        self.send_attempt(life, dispatch);
    }

    fn relay_begins(&mut self, via: Via, relay: task_stream::Relay, dispatch: &Dispatch) {
        let now = self.now;
        let (task, attempt, node_id) = (dispatch.task, dispatch.attempt, dispatch.pool.node_id.clone());
        let stop = Stop::NotNeeded;
        let relay =
            Relay { task, node_id, via, relay, armed: now, accepted: false, unread: Vec::new(), stop };
        if let Some(control) = self.control.as_mut() {
            control.relays.insert(attempt, relay);
        }
        self.act(attempt);
    }

    /// The attempt's lane keeps its stop until it has arrived.
    pub(crate) fn stopped_by_link(&mut self, attempt: AttemptId) {
        let life = self.lives;
        if let Some(relay) = self.control.as_mut().and_then(|control| control.relays.get_mut(&attempt)) {
            relay.stop = Stop::ByLink { life };
        }
    }

    /// Sends the attempt by an exchange of its own.
    fn send_attempt(&mut self, life: u64, dispatch: Dispatch) {
        let (now, node) = (self.now, number_of(&dispatch.pool.node_id));
        let keeps = self.plan.kept > 0 && self.keeping.u32(..1_000) < self.plan.kept;
        self.next_conn += 1;
        let conn = self.next_conn;
        let relay = task_stream::Relay::new(now, dispatch.assignment());
        let begun = dispatch.clone();
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
                ended_at_node: false,
                ended_well: false,
                tail: Vec::new(),
                broken: false,
                unreliable: false,
                slow_until: Moment::ZERO,
                keeps,
                cursor: None,
                closing: Closing::Lost,
            },
        );
        self.relay_begins(Via::Conn(conn), relay, &begun);
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
        let (attempt, life, open) = (c.dispatch.attempt, c.life, c.cp_open);
        if !open && matches!(&piece, Piece::Bytes(bytes) if is_first_token(bytes)) {
            self.coverage.hit("race: first token crossed a close");
        }
        let Some(control) = self.control.as_mut().filter(|control| open && control.life == life) else {
            return;
        };
        let Some(relay) = control.relays.get_mut(&attempt) else { return };
        let piece = match piece {
            Piece::Bytes(bytes) => {
                relay.unread.push(bytes);
                if self.is_drawn(self.plan.late_reads) {
                    let wait = self.losing.u64(1..40);
                    return self.after_ms(wait, What::ReadDue { life, attempt });
                }
                return self.take_in(attempt, None);
            }
            Piece::Reset(reason) if relay.accepted => {
                // What has come before is read first.
                self.read_due(life, attempt);
                if self.resumes(life, attempt, conn) {
                    return;
                }
                Piece::Reset(reason)
            }
            other => other,
        };
        self.take_in(attempt, Some(piece));
    }

    /// What has arrived of an attempt's stream is read, late.
    pub(crate) fn read_due(&mut self, life: u64, attempt: AttemptId) {
        let control = self.control.as_ref().filter(|control| control.life == life);
        let relay = control.and_then(|control| control.relays.get(&attempt));
        match relay {
            Some(Relay { via: Via::Link(_), .. }) => self.take_in_linked(attempt),
            Some(relay) if !relay.unread.is_empty() => self.take_in(attempt, None),
            _ => {}
        }
    }

    /// What its lane has said of an attempt goes through its relay.
    fn take_in_linked(&mut self, attempt: AttemptId) {
        let (now, life) = (self.now, self.lives);
        let Some(relay) = self.control.as_mut().and_then(|control| control.relays.get_mut(&attempt)) else {
            return;
        };
        let Via::Link(linked) = &mut relay.via else { return };
        let mut wrong = Ok(());
        let heard = std::mem::take(&mut linked.heard);
        if heard.is_empty() {
            return;
        }
        for action in heard {
            if let Some(why) = linked.relayed.hear(now, &mut relay.relay, action) {
                wrong = Err(format!("[11] {attempt}: {why}"));
            }
        }
        relay.accepted = linked.relayed.is_accepted();
        self.check(wrong);
        self.flush(attempt);
        let relay = self.control.as_mut().and_then(|control| control.relays.get_mut(&attempt));
        let Some(Relay { node_id, via: Via::Link(linked), .. }) = relay else { return };
        if !linked.relayed.never_sent() {
            return;
        }
        let (node, dispatch) = (number_of(node_id), (*linked.dispatch).clone());
        if !self.has_lane(node) {
            // A node that turns out to have no link is served without.
            return self.send_attempt(life, dispatch);
        }
        if let Some(relay) = self.control.as_mut().and_then(|control| control.relays.get_mut(&attempt)) {
            relay.relay.not_accepted(HowEnded::NeverSent("its link was not up in time".into()));
        }
        self.act(attempt);
    }

    /// What a lane says of its node.
    pub(crate) fn link_says(&mut self, life: u64, event: Event) {
        if self.control.as_ref().is_some_and(|control| control.life == life) {
            if let Event::LinkEvidence { node_id, evidence, .. } = &event {
                self.note(|_| format!("the link of {node_id} says: {evidence:?}"));
            }
            self.apply(event);
        }
    }

    /// What has arrived goes through the attempt's relay at once, and last what else has come.
    fn take_in(&mut self, attempt: AttemptId, piece: Option<Piece>) {
        let now = self.now;
        let Some(control) = self.control.as_mut() else { return };
        let Some(relay) = control.relays.get_mut(&attempt) else { return };
        let unread = std::mem::take(&mut relay.unread);
        if unread.len() > 1 {
            self.coverage.hit("stream: several chunks in one flush");
        }
        unread.iter().for_each(|bytes| relay.relay.chunk(now, bytes));
        match piece {
            None | Some(Piece::Bytes(_)) => {}
            Some(Piece::Headers { report_seq, replica_id }) => {
                relay.accepted = true;
                relay.relay.accepted(now, replica_id, report_seq);
            }
            Some(Piece::Refusal(body)) => relay.relay.not_accepted(HowEnded::Refused(body)),
            Some(Piece::Answer(how)) => relay.relay.not_accepted(*how),
            Some(Piece::Reset(reason)) if relay.accepted => relay.relay.closed(reason.into()),
            Some(Piece::Reset(reason)) => relay.relay.not_accepted(HowEnded::NeverSent(reason.into())),
        }
        self.flush(attempt);
    }

    /// Nothing more has arrived for now: what has goes into the log.
    fn flush(&mut self, attempt: AttemptId) {
        let now = self.now;
        let Some(control) = self.control.as_mut() else { return };
        let Some(relay) = control.relays.get_mut(&attempt) else { return };
        let task = relay.task;
        let Some(log) = control.logs.get_mut(&task) else { return };
        let (before, was_finished) = (log.next_index(), log.is_finished());
        relay.relay.flush(now, |staged| staged.append_to(log));
        let (after, is_finished) = (log.next_index(), log.is_finished());
        if after > before {
            if !is_finished || after - before > 1 {
                self.oracle.got_through(now, task, false);
            }
            if is_finished && !was_finished {
                self.note(|w| format!("t{} ends: {} tokens", w.names[&task], after - 1));
            }
            self.read(task);
            self.passed_on(task, attempt, after);
        }
        self.act(attempt);
    }

    /// What is passed on may have become too much to be generated again, and is that only once.
    fn passed_on(&mut self, task: TaskId, attempt: AttemptId, frames: u64) {
        let plan = &self.plan.tasks[self.names[&task]];
        if plan.recovery != Some(Replays::PassedOn) {
            return;
        }
        let is_too_much = plan.tokens.is_multiple_of(3) && frames * 2 > plan.tokens;
        let is_again = self.oracle.tasks.get(&task).is_some_and(|seen| seen.has_gone_on(attempt));
        if (is_too_much || is_again) && self.oracle.cannot_be_repeated(task) {
            self.coverage.hit("task: cannot be generated again");
            self.apply(Event::CannotBeRepeated { attempt });
        }
    }

    /// Carries out what the attempt's relay asks for.
    fn act(&mut self, attempt: AttemptId) {
        let now = self.now;
        loop {
            let Some(control) = self.control.as_mut() else { return };
            let life = control.life;
            let Some(relay) = control.relays.get_mut(&attempt) else { return };
            let Some(action) = relay.relay.next_action() else { return };
            let (task, node_id) = (relay.task, relay.node_id.clone());
            match action {
                Action::Arm(at) => {
                    relay.armed = at;
                    self.at(at, What::RelayTimer { life, attempt, armed: at });
                }
                Action::Accepted { replica_id, report_seq } => {
                    self.oracle.accepted(now, task);
                    self.apply(Event::Accepted { attempt, replica_id, report_seq });
                }
                Action::Started => {
                    self.oracle.life.entry(node_id).and_modify(|life| life.any = now);
                    self.oracle.got_through(now, task, true);
                    self.apply(Event::Started { attempt });
                }
                Action::Alive => {
                    self.oracle.life.entry(node_id.clone()).and_modify(|life| life.any = now);
                    self.apply(Event::Alive { node_id });
                }
                Action::Quiet => self.apply(Event::Quiet { attempt }),
                Action::Heard => self.apply(Event::Heard { attempt }),
                Action::CannotBeRepeated => self.apply(Event::CannotBeRepeated { attempt }),
                Action::Stop if relay.via.conn().is_none() => {
                    relay.stop = Stop::ByLink { life };
                    self.lane_cancels(number_of(&node_id), attempt);
                }
                Action::Stop => {
                    let conn = relay.via.conn().expect("that of a link is above");
                    let is_lost = self.streams.u32(..1_000) < self.plan.lost_stops;
                    relay.stop = if is_lost { Stop::Lost } else { Stop::Sent };
                    if is_lost {
                        // The node notices nothing.
                        self.coverage.hit("stream: stop lost");
                        self.conns.entry(conn).and_modify(|c| c.cp_open = false);
                    } else {
                        self.drop_conn(conn, Closing::Stop);
                        self.stop_again(conn);
                    }
                }
                Action::Ended { how, final_report } => return self.end_relay(attempt, how, final_report),
            }
        }
    }

    pub(crate) fn relay_timer(&mut self, life: u64, attempt: AttemptId, armed: Moment) {
        let now = self.now;
        let control = self.control.as_mut().filter(|control| control.life == life);
        let relay = control.and_then(|control| control.relays.get_mut(&attempt));
        let Some(relay) = relay.filter(|relay| relay.armed == armed) else { return };
        relay.relay.timer(now);
        self.act(attempt);
    }

    pub(crate) fn fence(&mut self, life: u64, task: TaskId, attempt: AttemptId) {
        let Some(control) = self.control.as_mut().filter(|control| control.life == life) else { return };
        let Some(relay) = control.relays.get_mut(&attempt) else { return };
        // Over at its node, and the last bytes are still to come.
        let conn = relay.via.conn().and_then(|conn| self.conns.get(&conn));
        let has_ended = conn.is_some_and(|c| c.ended_at_node);
        let is_finished = control.logs.get(&task).is_some_and(TaskLog::is_finished);
        relay.relay.close();
        if has_ended || is_finished {
            self.coverage.hit("race: end crossed a close");
        }
        self.act(attempt);
    }

    /// Fences the log and tells the core.
    fn end_relay(&mut self, attempt: AttemptId, how: HowEnded, final_report: Option<u64>) {
        let Some(control) = self.control.as_mut() else { return };
        let Some(relay) = control.relays.remove(&attempt) else { return };
        let Some(log) = control.logs.get_mut(&relay.task) else { return };
        let fence = log.fence(attempt);
        // Not asked of the relay's own code: that is under test.
        let is_the_nodes_own = matches!(
            how,
            HowEnded::Finished
                | HowEnded::Refused(_)
                | HowEnded::Denied(_)
                | HowEnded::Rejected(_)
                | HowEnded::NodeFailed(_)
                | HowEnded::OwnShortage { .. }
                | HowEnded::NeverSent(_)
                | HowEnded::NodeError(_)
        );
        let how = if fence.finished { HowEnded::Finished } else { how };
        let writers = self.writers.get(&log.id()).map_or(&[][..], Vec::as_slice);
        let writer = writers.iter().rfind(|writer| writer.attempt == attempt);
        let has_sent = writer.is_some_and(|writer| fence.tokens_written > writer.first_index);
        if how == HowEnded::TimedOut(Overdue::FirstToken) && has_sent {
            let broken = format!("[7] {attempt} ends for want of a first token, which it has brought");
            return self.check(Err(broken));
        }
        self.note(|w| format!("t{} attempt over: {}", w.names[&relay.task], brief_end(&how)));
        match &how {
            HowEnded::NoAnswer(_) => self.coverage.hit("core: no answer"),
            HowEnded::TooLong => self.coverage.hit("core: stream too long"),
            HowEnded::Broken(reason) if reason.starts_with("frame ") => {
                self.coverage.hit("stream: gap noticed");
            }
            _ => {}
        }
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
        let node = number_of(&relay.node_id);
        match &relay.via {
            Via::Conn(conn) if is_the_nodes_own => self.done(*conn),
            Via::Conn(_) => {}
            Via::Link(linked) => {
                let kept = self.link_attempt_ends(
                    node,
                    attempt,
                    linked.relayed.is_accepted(),
                    &how,
                    fence.tokens_written,
                );
                self.check(kept);
                if linked.relayed.has_ended() {
                    self.link_is_done(node, attempt);
                }
            }
        }
        let (boot, since, stop) = (self.nodes[node].boot, self.now, relay.stop);
        self.after_ms(STOPPED_WITHIN_MS, What::StopDue { node, boot, attempt, since, stop });
        let (tokens_written, unlogged) = (fence.tokens_written, fence.unlogged);
        self.apply(Event::Ended { attempt, tokens_written, unlogged, how, final_report });
        if let (Some(pool), Some(control)) = (failed, self.control.as_ref()) {
            let tripped = control.core.registry().pool_facts(&pool).is_some_and(|facts| facts.tripped);
            let early = self.oracle.tripped_early(&pool, tripped);
            self.check(early);
        }
        let poison = self.oracle.poison();
        self.check(poison);
    }

    /// The record with which the relay of a kept attempt goes on, and its connection.
    pub(crate) fn resume_from(&mut self, life: u64, attempt: AttemptId) -> Option<(u64, u64)> {
        let control = self.control.as_mut().filter(|control| control.life == life)?;
        let relay = control.relays.get_mut(&attempt)?;
        Some((relay.via.conn()?, relay.relay.resume()?))
    }

    /// The end of an attempt has come: its node may drop what it keeps, if that arrives.
    fn done(&mut self, conn: u64) {
        let keeps = self.conns.get(&conn).is_some_and(|c| c.keeps);
        if keeps && self.keeping.u8(..16) == 0 {
            self.coverage.hit("stream: done lost");
            self.conns.entry(conn).and_modify(|c| c.cp_open = false);
        } else {
            self.drop_conn(conn, Closing::Done);
        }
    }

    /// Now and then a stop arrives twice, the second time after whatever came meanwhile.
    fn stop_again(&mut self, conn: u64) {
        let Some(c) = self.conns.get(&conn).filter(|c| c.keeps) else { return };
        let (node, attempt) = (c.node, c.dispatch.attempt);
        if self.keeping.u8(..4) == 0 && !self.links[node].blocked() {
            self.coverage.hit("stream: stop doubled");
            let wait = self.keeping.u64(1..3_000);
            let boot = self.nodes[node].boot;
            self.after_ms(wait, What::StopAgain { node, boot, attempt });
        }
    }

    pub(super) fn drop_conn(&mut self, conn: u64, closing: Closing) {
        let delay = self.delay();
        let Some(c) = self.conns.get_mut(&conn) else { return };
        // What was sent before the end of a process arrives all the same.
        if std::mem::replace(&mut c.cp_open, false) {
            c.closing = closing;
        }
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

fn is_first_token(bytes: &[u8]) -> bool {
    let first = b":0\nevent: token\n";
    bytes.windows(first.len()).any(|window| window == first)
}
