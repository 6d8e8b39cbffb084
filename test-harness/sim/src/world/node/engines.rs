//! Engines: what they make of attempts, how they fail, and how a node looks at them.

use attempt_link::content::FrameTokens;
use node_core::{Ending, Ends, Piece};

use super::*;
use crate::draw::{HeardBy, LinkFault, Step};

impl World {
    pub(crate) fn engine_back(&mut self, node: usize) {
        let plan = self.plan.nodes[node].clone();
        let now = self.now;
        let Some(core) = self.nodes[node].core.as_mut() else { return };
        for (replica_id, model) in replicas(&plan) {
            let pool_id = pool_of(&replica_id);
            let spec = ReplicaSpec {
                replica_id: replica_id.clone(),
                engine: kind_of(node),
                engine_version: None,
                url: "http://engine".into(),
                models: vec![ModelRef::new(&format!("m{model}")).expect("a valid model")],
                engine_names: BTreeMap::new(),
                names_from_engine: false,
                slots: plan.slots,
                ctx_max: None,
                device_mask: None,
                warning: None,
            };
            core.bind(now, &pool_id, spec).expect("replicas of a pool agree");
            core.engine_began(&pool_id, &replica_id);
        }
        self.nodes[node].engine_down = false;
        self.oracle.engine_is_new(&self.node_id(node));
        self.observe(node);
        self.pump(node);
    }

    /// The node looks at its engines.
    pub(super) fn observe(&mut self, node: usize) {
        let (now, all) = (self.now, replicas(&self.plan.nodes[node]));
        let sim = &mut self.nodes[node];
        sim.looks += 1;
        let (down, silent) = (sim.engine_down, sim.busy > 0);
        // A look that is not answered takes three seconds, and one more passes until the next.
        let late = silent && !sim.looks.is_multiple_of(4);
        for (replica, _) in all {
            let pool_id = pool_of(&replica);
            let Some(core) = self.nodes[node].core.as_mut() else { return };
            let readiness = match (down, silent) {
                (true, _) => Readiness::Gone("connection refused".into()),
                (false, true) => Readiness::Silent("no answer in time".into()),
                (false, false) => Readiness::Ready,
            };
            let was_ready = core.is_ready(&pool_id, &replica);
            if down || !late {
                core.observed(now, &pool_id, &replica, readiness);
            }
            let is_back = !was_ready && core.is_ready(&pool_id, &replica);
            core.expire_releases(now);
            if is_back {
                // Whoever comes back after it was away may be another engine.
                self.oracle.engine_is_new(&self.node_id(node));
            }
            self.count(node, &replica);
        }
        self.check_busy(node);
    }

    /// The node asks how busy an engine is.
    pub(super) fn count(&mut self, node: usize, replica: &ReplicaId) {
        let now = self.now;
        let sim = &mut self.nodes[node];
        let running = sim.runs.values().filter(|run| run.replica == *replica).count();
        let ghosts = sim.ghosts.values().filter(|(ghost, _)| ghost == replica).count();
        let Some(core) = sim.core.as_mut() else { return };
        let count = u32::try_from(running + ghosts).unwrap_or(u32::MAX) + sim.foreign;
        let busy = if sim.busy > 0 || sim.engine_down { Busy::NoAnswer } else { Busy::Reported(count) };
        core.counted(now, now, &pool_of(replica), replica, busy);
    }

    /// An engine that brings bytes is never taken for dead, and one that works has its model.
    fn check_busy(&mut self, node: usize) {
        let (now, sim) = (self.now, &self.nodes[node]);
        let Some(core) = sim.core.as_ref().filter(|_| sim.busy > 0 && !sim.engine_down) else { return };
        let works = sim.runs.values().any(|run| pool_of(&run.replica) == pool_id());
        if sim.stopped > 0 || !works {
            return;
        }
        let reports = core.pool_reports(now);
        let Some(report) = reports.iter().find(|report| report.pool_id == pool_id()) else { return };
        let was_ready = report.state != PoolState::Loadable && !report.replicas.is_empty();
        let mut broken = Ok(());
        if was_ready && !report.draining && !report.state.has_model() {
            broken = Err(format!("n{node} works, and its pool is {:?}", report.state));
        }
        self.coverage.hit("core: busy engine kept its model");
        self.check(broken);
    }

    /// The engine goes on for a while with what was broken off.
    pub(crate) fn haunt(&mut self, node: usize, attempt: AttemptId, replica: ReplicaId) {
        let boot = self.nodes[node].boot;
        self.nodes[node].ghosts.insert(attempt, (replica, self.now));
        let drawn = self.random.u64(10..=500);
        // Now and then it takes long to notice.
        let after = if drawn.is_multiple_of(8) { drawn * 16 } else { drawn };
        if after > 500 {
            self.coverage.hit("core: slot kept by the engine's word");
        }
        self.after_ms(after, What::SlotReleased { node, boot, attempt });
    }

    /// [4] An engine never works on more requests than it has slots, those broken off included.
    pub(super) fn check_slots(&mut self, node: usize, replica: &ReplicaId) {
        let sim = &self.nodes[node];
        let running = sim.runs.values().filter(|run| run.replica == *replica).count();
        // Without the engine's word a slot is kept for 30 s: a node that was stopped may have had none.
        let kept = |since: &Moment| self.now < *since + Duration::from_secs(30);
        let ghosts = sim.ghosts.values().filter(|(ghost, since)| ghost == replica && kept(since)).count();
        let slots = self.plan.nodes[node].slots as usize;
        if running + ghosts > slots {
            self.check(Err(format!("[4] the engine of n{node} works on {running} and {ghosts} of {slots}")));
        }
    }

    pub(crate) fn kill_engine(&mut self, node: usize, down_ms: u64) {
        let boot = self.nodes[node].boot;
        if self.nodes[node].core.is_none() || self.nodes[node].engine_down {
            return;
        }
        self.note(|_| format!("n{node}: the engine dies"));
        self.engines_end(node, None);
        if let Some(run) = self.supervised_engine(node) {
            return self.engine_gone(node, run);
        }
        self.fail_runs(node);
        self.after_ms(down_ms, What::EngineBack { node, boot });
        self.pump(node);
    }

    /// The engine is down: what runs on it dies.
    pub(crate) fn fail_runs(&mut self, node: usize) {
        self.nodes[node].engine_down = true;
        self.nodes[node].ghosts.clear();
        self.observe(node);
        let runs: Vec<AttemptId> = self.nodes[node].runs.keys().copied().collect();
        for attempt in runs {
            let verdict = self.nodes[node].core.as_ref().map(|core| core.verdict(&attempt));
            let crash = match verdict {
                Some(Verdict::Known(crash)) => crash,
                Some(Verdict::Awaited) | None => None,
            };
            let error =
                ErrorBody::new(ErrorCode::WorkerReset, "the engine died").with_cause(EndCause::EngineDied);
            self.end_run(node, attempt, Last::Error(ErrorBody { crash, ..error }), true);
        }
    }

    /// The engines of the node end; by a signal of their own where one of them has crashed.
    fn engines_end(&mut self, node: usize, signal: Option<&'static str>) {
        let (now, all) = (self.now, replicas(&self.plan.nodes[node]));
        let Some(core) = self.nodes[node].core.as_mut() else { return };
        for (replica, _) in all {
            core.engine_ended(now, &pool_of(&replica), &replica, signal);
        }
    }

    /// What runs now never moves again; what comes while the engine hangs neither.
    pub(crate) fn hang_engine(&mut self, node: usize) {
        self.nodes[node].hung += 1;
        for run in self.nodes[node].runs.values_mut() {
            run.hung = true;
        }
    }

    pub(super) fn engine_step(&mut self, node: usize, attempt: AttemptId) {
        let boot = self.nodes[node].boot;
        let pace = self.plan.pace_ms * if self.nodes[node].slow > 0 { 20 } else { 1 };
        let Some(run) = self.nodes[node].runs.get_mut(&attempt) else { return };
        if run.hung || run.stuck {
            return;
        }
        if matches!(run.via, Via::Link { .. }) && self.is_stuck(attempt) {
            return self.stands_still_at(node, attempt);
        }
        if !self.has_room(node, attempt) {
            return;
        }
        if self.nodes[node].sick > 0 {
            let error = ErrorBody::new(ErrorCode::WorkerReset, "HTTP 500").with_cause(EndCause::Engine5xx);
            return self.end_run(node, attempt, Last::Error(error), true);
        }
        let Some(run) = self.nodes[node].runs.get_mut(&attempt) else { return };
        if run.poison || run.crashes {
            let down_ms = self.random.u64(500..4_000);
            if run.crashes {
                self.note(|_| format!("n{node}: the engine crashes"));
                self.engines_end(node, Some("SIGSEGV"));
            }
            return self.kill_engine(node, down_ms);
        }
        if run.differs {
            let error = ErrorBody::new(ErrorCode::WorkerReset, "the replay differs");
            let error = error.with_cause(EndCause::ReplayDiffers);
            return self.end_run(node, attempt, Last::Error(error), false);
        }
        let (via, i, task) = (run.via, run.next, run.task);
        let (log, with_ids) = (run.log, run.with_ids);
        if self.plan.tasks[self.names[&task]].bad {
            self.coverage.hit("task: bad for every engine");
            let error =
                ErrorBody::new(ErrorCode::WorkerReset, "a bad request").with_cause(EndCause::Engine5xx);
            return self.end_run(node, attempt, Last::Error(error), true);
        }
        let Some(run) = self.nodes[node].runs.get_mut(&attempt) else { return };
        if i >= run.tokens {
            return self.end_run(node, attempt, Last::End(i), true);
        }
        run.next += 1;
        let now = self.now;
        if let Some(core) = self.nodes[node].core.as_mut() {
            core.heard(now, &attempt);
        }
        let odd = self.plan.nodes[node].odd;
        self.voices.entry(task).or_insert(odd);
        let node_id = self.node_id(node);
        let pad = self.padding(node, via);
        let is_taken = match via {
            Via::Conn(_) => {
                let made = token(log, attempt, &node_id, i, with_ids, pad);
                self.append(node, attempt, via, (i, made, true), Vec::new())
            }
            Via::Link { .. } => {
                let made = token(log, attempt, &node_id, i, false, pad);
                let ids = u32::try_from(i).unwrap_or(u32::MAX);
                let tokens = FrameTokens { total: ids + 1, ids: vec![ids] };
                let tokens = if with_ids { vec![(i, tokens)] } else { Vec::new() };
                self.append(node, attempt, via, (i, made, true), tokens)
            }
        };
        if !is_taken {
            self.coverage.hit("stream: too long for its node");
            if let Some(run) = self.nodes[node].runs.get_mut(&attempt) {
                run.next = i;
            }
            let error = ErrorBody::new(ErrorCode::PayloadTooLarge, "too long");
            return self.end_run(node, attempt, Last::Error(error), false);
        }
        let wait = self.random.u64(..=pace);
        self.after_ms(wait, What::EngineStep { node, boot, attempt });
    }

    /// The last words of an attempt: the final frame and the closing comment.
    pub(super) fn end_run(&mut self, node: usize, attempt: AttemptId, last: Last, idle: bool) {
        let Some(run) = self.nodes[node].runs.remove(&attempt) else { return };
        let now = self.now;
        let Some(core) = self.nodes[node].core.as_mut() else { return };
        let seq = if idle { core.ended(&attempt) } else { core.ended_before_release(now, &attempt) };
        if !idle {
            self.haunt(node, attempt, run.replica.clone());
        }
        let ended_well = matches!(last, Last::End(_));
        if ended_well && let Some(core) = self.nodes[node].core.as_mut() {
            core.cleared(&attempt);
        }
        if let Via::Link { .. } = run.via {
            return self.end_by_link(node, attempt, &run, last, seq);
        }
        let Via::Conn(conn) = run.via else { return };
        let mut frame = Vec::new();
        match &last {
            Last::End(i) => write_frame(&mut frame, Some((&run.log, *i)), "end", "{}"),
            Last::Error(error) => {
                let data = serde_json::to_string(error).expect("an error is always JSON");
                write_frame(&mut frame, None, "error", &data);
            }
        }
        let seq = format!(": report-seq {seq}\n\n").into_bytes();
        // What does not fit any more goes with the last bytes, which are always taken.
        let last = if self.append(node, attempt, run.via, (run.next, frame.clone(), true), Vec::new()) {
            Piece::new(run.next + 1, seq, Ends::default())
        } else {
            let mut ends = Ends::default();
            ends.push(frame.len());
            Piece::new(run.next, [frame, seq].concat(), ends)
        };
        self.finish(node, attempt, run.via, Some(last), Ending::default());
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.node_open = false;
            conn.ended_at_node = true;
            // An end behind a break is had by a resume only, as long as its node has room for it.
            conn.ended_well = ended_well && !conn.unreliable && !conn.broken;
        }
    }

    /// The same of an attempt on a link, which says apart what is no frame.
    fn end_by_link(&mut self, node: usize, attempt: AttemptId, run: &Run, last: Last, report_seq: u64) {
        let (piece, error) = match last {
            Last::End(i) => {
                let (mut frame, mut ends) = (Vec::new(), Ends::default());
                write_frame(&mut frame, Some((&run.log, i)), "end", "{}");
                ends.push(frame.len());
                (Some(Piece::new(run.next, frame, ends)), None)
            }
            Last::Error(error) => (None, Some(error)),
        };
        self.finish(node, attempt, run.via, piece, Ending { error, report_seq });
    }

    /// Bytes that a token is longer by: on a link now and then more than its turn.
    fn padding(&mut self, node: usize, via: Via) -> usize {
        let is_long = matches!(via, Via::Link { .. })
            && self.plan.links.long_frames > 0
            && self.linking.u32(..1_000) < self.plan.links.long_frames;
        if !is_long {
            return 0;
        }
        self.coverage.hit("link: record in parts");
        if self.linking.u8(..16) == 0 && self.now.as_millis() < self.plan.horizon_ms {
            // While its parts are joined.
            let (wait, for_ms) = (self.linking.u64(1..20), self.linking.u64(100..3_000));
            let cut = LinkFault::Cut { up: true, down: true };
            let fault = if self.linking.bool() { cut } else { LinkFault::Reset(HeardBy::Both) };
            self.after_ms(wait, What::Step(Step::Link { node, fault, for_ms }));
        }
        self.linking.usize(11_000..90_000)
    }

    pub(crate) fn cancel_run(&mut self, node: usize, attempt: AttemptId) {
        let error = ErrorBody::new(ErrorCode::Canceled, "canceled").with_cause(EndCause::Canceled);
        self.end_run(node, attempt, Last::Error(error), false);
    }
}
