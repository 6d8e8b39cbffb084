//! Who calls from outside: clients with their tasks, operators with their orders.

use pool_registry_types::sse::write_frame;

use super::*;

impl World {
    pub(crate) fn submit(&mut self, task: usize, again: bool) {
        if self.control.is_none() {
            return;
        }
        let plan = self.plan.tasks[task].clone();
        let id = Self::task_id(task);
        self.names.insert(id, task);
        let known = self.oracle.tasks.contains_key(&id);
        if again && known {
            self.coverage.hit("task: submitted twice");
        }
        let model = ModelRef::new(&format!("m{}", plan.model)).expect("a valid model");
        let mut digest = [0; 32];
        digest[..16].copy_from_slice(id.0.as_bytes());
        let spec = TaskSpec {
            passes_on: plan.recovery == Some(Replays::PassedOn),
            task_id: id,
            holder: HolderId::OPEN,
            model_ref: model,
            engines: EngineKind::ALL.into_iter().collect(),
            lacking: Vec::new(),
            ctx: None,
            priority: if plan.batch { Priority::Batch } else { Priority::Interactive },
            placement: plan.constraints,
            session_id: plan.session.map(|session| SessionId(Uuid::from_u128(session))),
            kv_hint: KvHint::Reuse,
            workload: Workload::Completion,
            max_tokens: None,
            expected_tokens: None,
            deadline_ms: plan.deadline_ms,
            first_token_ms: None,
            token_idle_ms: None,
            continuation: plan.recovery.map(|replays| match replays {
                Replays::FromTheStart | Replays::PassedOn => ResumeMode::Replay,
                Replays::FromTheEnd => ResumeMode::Append,
            }),
            reasoning: Reasoning::Keep,
            caller: None,
            trace: TraceContext { correlation_id: id.to_string(), ..Default::default() },
            digest: BodyDigest::new(digest),
        };
        let reply = self.reply_to(To::Client(id));
        self.apply(Event::Submit { reply, spec: Arc::new(spec) });
    }

    // ---- operators ----

    pub(crate) fn want(&mut self, node: usize, intent: Intent) {
        if self.control.is_none() {
            return;
        }
        self.coverage.hit(match intent {
            Intent::Draining => "fault: node drained",
            Intent::Serving => "fault: node resumed",
        });
        let node_id = self.node_id(node);
        let reply = self.reply_to(To::Operator);
        self.apply(Event::Want { reply, node_id, intent });
    }

    pub(crate) fn intent_answered(
        &mut self,
        life: u64,
        node_id: NodeId,
        reply: ReplyTo,
        order: IntentOrder,
        outcome: Result<(), String>,
    ) {
        if self.control.as_ref().is_some_and(|control| control.life == life) {
            let kept_by_node = outcome.is_ok();
            self.apply(Event::IntentDelivered { reply, node_id, order, kept_by_node });
        }
    }

    /// A process with the name of a node that lives comes from elsewhere: it is refused, and the
    /// node does not notice.
    pub(crate) fn twin(&mut self, node: usize) {
        let node_id = self.node_id(node);
        let liveness = self.control.as_ref().and_then(|c| c.core.registry().liveness(&node_id));
        // One that is suspect may have shown itself dead by what it did not say (CLOUD-2690): for all that the
        // control plane can know a node that is cut off both ways is one.
        if liveness != Some(Liveness::Online) {
            return;
        }
        let request = RegisterRequest {
            node_id: node_id.clone(),
            machine_id: MachineId::new("machine").expect("a valid machine id"),
            boot_id: BootId(Uuid::from_u128(u128::MAX)),
            address: "http://twin".into(),
            version: "sim".into(),
            intent: Intent::Serving,
            labels: Labels::new(),
            pools: Vec::new(),
            capabilities: Capabilities::default(),
            features: Vec::new(),
        };
        // What is due by now is let pass before.
        self.apply(Event::Timer);
        let still = self.control.as_ref().and_then(|c| c.core.registry().liveness(&node_id));
        if still != Some(Liveness::Online) {
            return;
        }
        let reply = self.reply_to(To::Twin(node_id));
        self.apply(Event::Register { reply, request, registrar: None });
    }

    pub(crate) fn cancel(&mut self, task: usize) {
        let id = Self::task_id(task);
        if self.control.is_none() || !self.names.contains_key(&id) {
            return;
        }
        match self.oracle.tasks.get(&id) {
            None => {}
            Some(seen) if seen.terminal.is_some() => self.coverage.hit("task: cancel after the end"),
            Some(seen) if seen.open.is_some() => self.coverage.hit("task: canceled while running"),
            Some(_) => self.coverage.hit("task: canceled while queued"),
        }
        self.oracle.canceled(id);
        let reply = self.reply_to(To::Client(id));
        self.apply(Event::Cancel { reply, task_id: id });
    }

    // ---- what else an operator does ----

    pub(crate) fn tokens_changed(&mut self) {
        if self.control.is_some() {
            self.coverage.hit("fault: tokens changed");
            self.apply(Event::TokensChanged);
        }
    }

    pub(crate) fn retire(&mut self, model: usize, retired: bool) {
        self.oracle.retires(model, retired);
        let model = ModelRef::new(&format!("m{model}")).expect("a valid model");
        self.apply(Event::SetRetired { model, retired });
    }

    pub(crate) fn delete_session(&mut self, session: u128) {
        if self.control.is_none() {
            return;
        }
        let reply = self.reply_to(To::Operator);
        self.coverage.hit("task: session deleted");
        self.oracle.session_deleted(session);
        let session_id = SessionId(Uuid::from_u128(session));
        let session = SessionKey { holder: HolderId::OPEN, session_id };
        self.apply(Event::DeleteSession { reply, session });
    }

    /// SIGTERM.
    pub(crate) fn shut_down(&mut self, grace_ms: u64, down_ms: u64) {
        if self.control.is_none() {
            return;
        }
        self.coverage.hit("fault: control plane shut down");
        self.apply(Event::Drain);
        let life = self.lives;
        self.after_ms(grace_ms, What::CutOff { life, down_ms });
    }

    pub(crate) fn cut_off(&mut self, life: u64, down_ms: u64) {
        if self.control.as_ref().is_some_and(|control| control.life == life) {
            self.apply(Event::CutOff);
            // Logs are fenced meanwhile.
            self.after_ms(500, What::ControlEnds { life, down_ms });
        }
    }

    /// [1] what was accepted has its end before the daemon has.
    pub(crate) fn control_ends(&mut self, life: u64, down_ms: u64) {
        if self.control.as_ref().is_none_or(|control| control.life != life) || self.stall_until.is_some() {
            return;
        }
        let ended = self.oracle.at_rest();
        self.check(ended);
        self.stop_control();
        self.after_ms(down_ms, What::ControlBack);
    }

    pub(super) fn close_task(&mut self, task: TaskId, error: &ErrorBody) {
        self.note(|w| format!("t{} ends: {}", w.names[&task], error.code));
        match error.code {
            ErrorCode::DeadlineExceeded => self.coverage.hit("core: deadline exceeded"),
            ErrorCode::DecodeTimeout => self.coverage.hit("core: decode timeout"),
            ErrorCode::PoolUnavailable => self.coverage.hit("core: tries exhausted"),
            ErrorCode::ModelNotAvailable => self.coverage.hit("core: model not available"),
            ErrorCode::NodeUnavailable => self.coverage.hit("core: node unavailable"),
            _ => {}
        }
        if let Some(control) = self.control.as_ref() {
            let closed = self.oracle.closed(self.now, task, error, &control.core, &self.plan);
            if error.code == ErrorCode::InvalidParams {
                self.coverage.hit("task: rejected by every node");
            }
            self.check(closed);
        }
        if error.code == ErrorCode::DeadlineExceeded {
            let asked = self.was_asked_for(task);
            self.check(asked);
        }
        let log = self.control.as_mut().and_then(|c| c.logs.get_mut(&task));
        let Some(log) = log else { return self.check(Err(format!("{task} has no log"))) };
        if log.is_finished() {
            return self.check(Err(format!("[2] {task} is closed a second time")));
        }
        let mut frame = Vec::new();
        let data = serde_json::to_string(error).expect("an error is always JSON");
        write_frame(&mut frame, Some((&log.id(), log.next_index())), "error", &data);
        log.close(frame.into());
        self.read(task);
    }

    pub(super) fn read(&mut self, task: TaskId) {
        if let Some(log) = self.control.as_ref().and_then(|c| c.logs.get(&task)) {
            let writers = self.writers.get(&log.id()).map_or(&[][..], Vec::as_slice);
            let read = self.oracle.read(task, log, writers, self.plan.log_bytes);
            self.check(read);
        }
        self.wake_client(task);
    }
}
