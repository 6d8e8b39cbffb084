//! The control loop: the one task that owns `ControlCore`.
//!
//! It takes a message from a bounded mailbox, applies it, writes down what it has changed for readers
//! ([`Published`]), hands the effects out and arms the timer anew. What nobody waits for is written down
//! once for all messages that are there. It never awaits the network. Before each message it compares the
//! time with its deadline, so that no flood of messages keeps the clock waiting; and questions that only
//! the core can answer come in a mailbox of their own, one between so many messages, so that no reader
//! keeps a decision waiting. Everything else in this daemon talks to it through [`Control`].

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use daemon_kit::Clock;
use owned_tasks::Turn;
use pool_registry_types::placement::Explanation;
use pool_registry_types::task::Workload;
use pool_registry_types::view::ClusterChange;
use pool_registry_types::{AttemptId, HolderId, Moment, TaskId};
use task_scheduler::{ControlCore, Denied, Effect, Event, HowEnded, Note, ProbeOutcome, ReplyTo};
use task_stream::TaskSpec;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::services::control::{Control, Inbox, Message, Question, Reply};
use crate::services::dispatch::{Closing, Relays};
use crate::services::link::PoolOrder;
use crate::services::notes;
use crate::services::spans::TaskSpans;
use crate::services::streams::Submitted;

/// Messages that are handled before a question is answered, where both wait.
const MESSAGES_A_QUESTION: u32 = 64;
/// Nodes of a cluster in which a span says of each pool why it was not taken: in a larger one the loop would
/// stand still for it.
const EXPLAINED_NODES: usize = 256;

/// What the core says of every pool, for a span.
fn explained(core: &ControlCore, now: Moment, task: TaskId) -> Option<Explanation> {
    let nodes = core.registry().heartbeat_ages(now).take(EXPLAINED_NODES + 1).count();
    (nodes <= EXPLAINED_NODES).then(|| core.explain_task(now, task).ok()).flatten()
}

/// Whether somebody looks next because of it: who is answered, who reads the end of a task, who finds
/// that it is not kept any more.
fn is_seen_at_once(effect: &Effect) -> bool {
    matches!(
        effect,
        Effect::Reply { .. }
            | Effect::CloseAttempt { .. }
            | Effect::CloseTask { .. }
            | Effect::Forget { .. }
            | Effect::Note(Note::TaskEnded(_))
    )
}

/// The loop's own state beside the core.
struct Loop {
    core: ControlCore,
    clock: Clock,
    control: Control,
    relays: Arc<Relays>,
    tracker: TaskTracker,
    replies: HashMap<ReplyTo, Reply>,
    next_reply: u64,
    running: HashMap<AttemptId, Closing>,
    /// Of the task that is being submitted, until its log is opened.
    submitted: Option<(Submitted, Arc<TaskSpec>)>,
    spans: TaskSpans,
    /// When the core was last asked, and what it sent then.
    decided: (Instant, Vec<TaskId>),
    /// Something has happened that is not written down yet, and what followers are to be told of it.
    is_unpublished: bool,
    unpublished_changes: Vec<(Option<HolderId>, ClusterChange)>,
}

/// Runs until `stop`. Relays and probes belong to `tracker`.
pub(crate) async fn run(
    core: ControlCore,
    relays: Arc<Relays>,
    control: Control,
    inbox: Inbox,
    tracker: TaskTracker,
    stop: CancellationToken,
) {
    let clock = relays.clock;
    let mut this = Loop {
        core,
        clock,
        control,
        relays,
        tracker,
        replies: HashMap::new(),
        next_reply: 0,
        running: HashMap::new(),
        submitted: None,
        spans: TaskSpans::default(),
        decided: (Instant::now(), Vec::new()),
        is_unpublished: false,
        unpublished_changes: Vec::new(),
    };
    this.work(inbox, stop).await;
    this.publish();
    for closing in this.running.values() {
        closing.closed.cancel();
    }
    this.control.published.end();
}

impl Loop {
    /// Handles messages and lets time pass, until `stop`.
    async fn work(&mut self, inbox: Inbox, stop: CancellationToken) {
        let Inbox { mut messages, mut questions } = inbox;
        let published = Arc::clone(&self.control.published);
        let (mut since_question, mut turn) = (0, Turn::begin());
        self.apply(Event::Timer);
        while !stop.is_cancelled() {
            // What is due comes first, whatever waits.
            if self.core.next_deadline().is_some_and(|deadline| self.clock.now() >= deadline) {
                self.apply(Event::Timer);
            }
            if since_question < MESSAGES_A_QUESTION
                && let Ok(message) = messages.try_recv()
            {
                since_question += 1;
                self.handle(message);
                // Others on this thread are not kept waiting either.
                if turn.is_long() {
                    self.publish();
                    turn.rest().await;
                }
                continue;
            }
            self.publish();
            let had_messages = std::mem::take(&mut since_question) >= MESSAGES_A_QUESTION;
            published.serve(self.clock.now(), &mut self.core);
            if let Ok(question) = questions.try_recv() {
                self.answer(question);
                turn.rest().await;
                continue;
            }
            if had_messages {
                continue;
            }
            let deadline = self.core.next_deadline().unwrap_or(Moment::NEVER);
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                message = messages.recv() => match message {
                    Some(message) => self.handle(message),
                    None => return,
                },
                Some(question) = questions.recv() => self.answer(question),
                () = published.wanted() => {}
                () = tokio::time::sleep_until(self.clock.instant(deadline).into()) => {}
            }
            // It has slept, mostly.
            turn = Turn::begin();
        }
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Event(event) => self.apply(event),
            Message::Call { event, reply } => {
                let to = self.reply_to(reply);
                self.apply(event(to));
            }
            Message::Submit { spec, payload, held, thread, reply } => {
                let reply = self.reply_to(reply);
                let (owner, trace) = (spec.holder, spec.trace.clone());
                let is_repeatable = spec.passes_on && spec.continuation.is_some();
                let spec: Arc<TaskSpec> = Arc::from(spec);
                let submitted = Submitted { payload, held, owner, trace, thread, is_repeatable };
                self.submitted = Some((submitted, Arc::clone(&spec)));
                self.apply(Event::Submit { reply, spec });
                // A task that was refused, or is there already, has no log opened.
                self.submitted = None;
            }
        }
    }

    fn reply_to(&mut self, reply: Reply) -> ReplyTo {
        self.next_reply += 1;
        let to = ReplyTo(self.next_reply);
        self.replies.insert(to, reply);
        to
    }

    fn answer(&self, question: Question) {
        match question {
            // Whoever asked may have gone.
            Question::Explain(id, reply) => drop(reply.send(self.core.explain_task(self.clock.now(), id))),
            Question::ExplainRequest(spec, reply) => {
                drop(reply.send(self.core.explain_request(&spec)));
            }
        }
    }

    /// One event, and what closing attempts for it brings.
    fn apply(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let published = Arc::clone(&self.control.published);
            let reported = match &event {
                Event::Heartbeat { node_id, .. } => Some(node_id.clone()),
                _ => None,
            };
            let registers = match &event {
                Event::Register { request, .. } => Some(request.clone()),
                _ => None,
            };
            let changed = match &event {
                Event::Register { request, .. } => Some(request.node_id.clone()),
                Event::Deregister { node_id, .. }
                | Event::Want { node_id, .. }
                | Event::IntentDelivered { node_id, .. } => Some(node_id.clone()),
                _ => None,
            };
            if let Event::Ended { attempt, .. } = &event {
                self.running.remove(attempt);
            }
            let now = self.clock.now();
            let begun = Instant::now();
            if let Event::Ended { attempt, .. } = &event {
                self.spans.attempt_ended(*attempt, begun);
            }
            let effects = self.core.apply(now, event);
            let dispatched = |effect: &Effect| match effect {
                Effect::Dispatch(dispatch) => Some(dispatch.task),
                _ => None,
            };
            self.decided = (begun, effects.iter().filter_map(dispatched).collect());
            if !self.decided.1.is_empty() {
                self.relays.measured.placed(begun.elapsed());
            }
            self.is_unpublished = true;
            // Whoever looks next must not see the state before.
            let is_seen = effects.iter().any(is_seen_at_once) || changed.is_some();
            if is_seen {
                self.publish();
            }
            reported.into_iter().for_each(|node_id| published.node_reported(node_id));
            // What was refused has changed nothing.
            let refused = |effect: &Effect| matches!(effect, Effect::Reply { answer: Err(_), .. });
            let is_refused = effects.iter().any(refused);
            let changed = changed.filter(|_| !is_refused);
            if let Some(request) = registers.filter(|_| !is_refused)
                && let Some(links) = self.relays.link.links()
            {
                // Before anything is sent there.
                let link = links.registered(&request);
                events.extend(link.map(|link| Event::Link { node_id: request.node_id, lane: 0, link }));
            }
            changed.into_iter().for_each(|node_id| published.node_changed(node_id));
            for effect in effects {
                self.carry_out(effect, &mut events);
            }
            if is_seen {
                // What those who follow are told of it stood among its effects.
                self.publish();
            }
        }
    }

    /// Writes down what has changed, and tells those who follow.
    fn publish(&mut self) {
        if std::mem::take(&mut self.is_unpublished) {
            self.control.published.take(self.clock.now(), &mut self.core);
        }
        for change in self.unpublished_changes.drain(..) {
            self.control.publish(change);
        }
    }

    fn carry_out(&mut self, effect: Effect, events: &mut VecDeque<Event>) {
        let streams = &self.relays.streams;
        match effect {
            Effect::Reply { to, answer } => {
                if let Some(reply) = self.replies.remove(&to) {
                    // Whoever asked may have gone.
                    let _ = reply.send(answer);
                }
            }
            Effect::OpenLog { task, log } => match self.submitted.take() {
                Some((submitted, spec)) => {
                    streams.open(task, log, submitted);
                    let (core, now, (begun, sent)) = (&self.core, self.clock.now(), &self.decided);
                    let is_sent = sent.contains(&task);
                    let places = || (!is_sent).then(|| explained(core, now, task)).flatten();
                    self.spans.admitted(task, &spec, *begun, places);
                }
                None => tracing::error!(task_id = %task, "a log is opened for a task that nobody submitted"),
            },
            Effect::Dispatch(dispatch) => {
                let trace = &dispatch.spec.trace;
                tracing::debug!(task_id = %dispatch.task, attempt_id = %dispatch.attempt, node_id = %dispatch.pool.node_id, pool_id = %dispatch.pool.pool_id, correlation_id = trace.correlation_id, trace_id = trace.trace_id(), "dispatched");
                let (core, now, begun) = (&self.core, self.clock.now(), self.decided.0);
                self.spans.placed(&dispatch, begun, || explained(core, now, dispatch.task));
                let stream = streams.get(dispatch.task);
                if let Some(stream) = &stream {
                    stream.write(|log| log.open(dispatch.attempt));
                    let spec = &dispatch.spec;
                    let has_tokens = spec.workload == Workload::Completion;
                    stream.measure(|| self.relays.measured.series(&spec.model_ref, has_tokens));
                }
                let thread =
                    stream.map_or_else(|| self.relays.threads.here(), |stream| stream.thread.clone());
                let closing = Closing::default();
                self.running.insert(dispatch.attempt, closing.clone());
                let relay = Arc::clone(&self.relays).run(*dispatch, self.control.clone(), closing);
                owned_tasks::task_on(&self.tracker, &thread, "relay", relay);
            }
            Effect::CloseAttempt { task, attempt, why } => {
                let stream = streams.get(task);
                let trace = stream.as_ref().map(|stream| &stream.trace);
                tracing::info!(task_id = %task, attempt_id = %attempt, ?why, correlation_id = trace.map(|trace| trace.correlation_id.as_str()), trace_id = trace.map(|trace| trace.trace_id()), "an attempt is closed");
                let fence = streams.fence(task, attempt);
                if fence.finished {
                    streams.ended(task);
                }
                if let Some(closing) = self.running.remove(&attempt) {
                    closing.close(why);
                }
                let how = if fence.finished { HowEnded::Finished } else { HowEnded::Closed };
                let (tokens_written, unlogged) = (fence.tokens_written, fence.unlogged);
                let ended = Event::Ended { attempt, tokens_written, unlogged, how, final_report: None };
                events.push_back(ended);
            }
            Effect::CloseTask { task, error } => {
                let stream = streams.get(task);
                let trace = stream.as_ref().map(|stream| &stream.trace);
                tracing::debug!(task_id = %task, code = %error.code, cause = ?error.cause, correlation_id = trace.map(|trace| trace.correlation_id.as_str()), trace_id = trace.map(|trace| trace.trace_id()), "a task ends with an error");
                streams.close(task, &error);
            }
            Effect::Forget { task } => streams.forget(task),
            Effect::Note(note) => {
                if let Note::TaskEnded(end) = &note {
                    self.relays.measured.ended(end);
                    self.spans.ended(end, self.decided.0, || streams.usage(end.key));
                }
                if let Note::Replaced { task, why, code, .. } = &note {
                    self.spans.replaced(*task, why, *code);
                }
                notes::write(&note);
            }
            Effect::Load { pool, address } => {
                let relays = Arc::clone(&self.relays);
                tracing::info!(node_id = %pool.node_id, pool_id = %pool.pool_id, "a pool is asked for");
                owned_tasks::task(&self.tracker, "order of a pool", async move {
                    let ordered =
                        relays.link.order_pool(&address, &pool.pool_id, &PoolOrder::Load, None).await;
                    if let Err(error) = ordered {
                        tracing::warn!(node_id = %pool.node_id, pool_id = %pool.pool_id, %error, "a pool is asked for again later");
                    }
                });
            }
            Effect::DeliverIntent { to, node_id, address, order } => {
                let (relays, control) = (Arc::clone(&self.relays), self.control.clone());
                owned_tasks::task(&self.tracker, "intent", async move {
                    let reported =
                        owned_tasks::caught("intent", relays.link.deliver_intent(&address, &order)).await;
                    let outcome = reported.unwrap_or_else(|panicked| Err(panicked.into()));
                    if let Err(error) = &outcome {
                        tracing::warn!(%node_id, intent = ?order.intent, reason = error.to_string(), "the order goes with the node's next call");
                    }
                    let kept_by_node = outcome.is_ok();
                    control.send(Event::IntentDelivered { reply: to, node_id, order, kept_by_node }).await;
                });
            }
            Effect::Changed { holder, change } => {
                if let ClusterChange::Node { node_id, liveness: None, .. } = &change
                    && let Some(links) = self.relays.link.links()
                {
                    links.gone(node_id);
                }
                self.unpublished_changes.push((holder, change));
            }
            Effect::Probe { node_id, address, authorized } => {
                let (relays, control) = (Arc::clone(&self.relays), self.control.clone());
                owned_tasks::task(&self.tracker, "probe", async move {
                    let probed = owned_tasks::caught("probe", relays.link.probe(&address, authorized)).await;
                    // A defect of ours says nothing of the node.
                    let outcome = probed.unwrap_or(ProbeOutcome::Inconclusive);
                    match &outcome {
                        ProbeOutcome::Failed(reason)
                        | ProbeOutcome::Answered { authorized: Some(Err(Denied(reason))), .. } => {
                            tracing::warn!(%node_id, address, reason, "a probe failed");
                        }
                        ProbeOutcome::Inconclusive => {
                            tracing::warn!(%node_id, address, "a probe could not be made: descriptors, ports or memory are short here");
                        }
                        ProbeOutcome::Answered { .. } => {}
                    }
                    control.send(Event::Probed { node_id, address, outcome }).await;
                });
            }
        }
    }
}
