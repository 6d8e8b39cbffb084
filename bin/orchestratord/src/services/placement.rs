//! The control loop: the one task that owns `ControlCore`.
//!
//! It takes a letter from a bounded mailbox, applies it, hands the effects out and arms the
//! timer anew. It never awaits the network. Everything else in this daemon talks to it through
//! [`Control`].

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use daemon_kit::Clock;
use pool_registry_types::node::Liveness;
use pool_registry_types::placement::Explanation;
use pool_registry_types::task::{Metrics, Priority, SessionView, TaskPage, TaskRequest, TaskState, TaskView};
use pool_registry_types::view::{ClusterChange, ClusterView};
use pool_registry_types::{AttemptId, ErrorBody, ErrorCode, ModelRef, Moment, PoolKey, SessionId, TaskId};
use task_scheduler::{Answer, ControlCore, Counters, Effect, Event, HowEnded, ReplyTo, TaskFilter};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::services::dispatch::Relays;
use crate::services::link::PoolOrder;

/// Letters that wait for the loop; a full mailbox answers `OVERLOADED`. One letter takes some
/// microseconds, so this is a wait of some ten milliseconds.
const MAILBOX: usize = 8192;
/// Changes that a follower may lag behind before it misses some.
const CHANGES: usize = 4096;
/// A view is copied at most this often.
const VIEW_EVERY: Duration = Duration::from_millis(20);

type Reply = Result<Answer, ErrorBody>;
type Page = Result<TaskPage, ErrorBody>;

enum Mail {
    Tell(Event),
    Call { event: Box<dyn FnOnce(ReplyTo) -> Event + Send>, reply: oneshot::Sender<Reply> },
    View(oneshot::Sender<Arc<ClusterView>>),
    Task(TaskId, oneshot::Sender<Option<TaskView>>),
    Tasks { filter: TaskFilter, after: Option<TaskId>, at_most: usize, reply: oneshot::Sender<Page> },
    Metrics(TaskId, oneshot::Sender<Option<(TaskState, Metrics)>>),
    Session(SessionId, oneshot::Sender<Option<SessionView>>),
    Explain(TaskId, oneshot::Sender<Result<Explanation, ErrorBody>>),
    ExplainRequest(Box<TaskRequest>, oneshot::Sender<Explanation>),
    Facts(oneshot::Sender<Facts>),
}

/// Numbers for the metrics and the probes.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) counters: Counters,
    pub(crate) nodes: Vec<(Liveness, u32)>,
    pub(crate) queues: Vec<(ModelRef, Priority, usize)>,
    pub(crate) running: usize,
    pub(crate) queued: usize,
    pub(crate) sessions: usize,
    /// Node, pool, and tokens a second of one slot there.
    pub(crate) paces: Vec<(PoolKey, f64)>,
    pub(crate) mass_silence: bool,
    pub(crate) draining: bool,
}

/// The way to the control loop.
#[derive(Debug, Clone)]
pub(crate) struct Control {
    mailbox: mpsc::Sender<Mail>,
    changes: broadcast::Sender<ClusterChange>,
}

impl std::fmt::Debug for Mail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Mail")
    }
}

impl Control {
    /// Tells what happened. Waits for room, because it must not be lost.
    pub(crate) async fn tell(&self, event: Event) {
        // The loop ends last; without it nobody needs to know.
        let _ = self.mailbox.send(Mail::Tell(event)).await;
    }

    /// Asks for a decision. Errors: the decision's own, and `OVERLOADED`.
    pub(crate) async fn call(&self, event: impl FnOnce(ReplyTo) -> Event + Send + 'static) -> Reply {
        let (reply, answer) = oneshot::channel();
        self.post(Mail::Call { event: Box::new(event), reply })?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    pub(crate) async fn view(&self) -> Result<Arc<ClusterView>, ErrorBody> {
        self.ask(Mail::View).await
    }

    pub(crate) async fn task(&self, id: TaskId) -> Result<Option<TaskView>, ErrorBody> {
        self.ask(|reply| Mail::Task(id, reply)).await
    }

    /// The list of tasks, newest first.
    pub(crate) async fn tasks(&self, filter: TaskFilter, after: Option<TaskId>, at_most: usize) -> Page {
        self.ask(|reply| Mail::Tasks { filter, after, at_most, reply }).await?
    }

    pub(crate) async fn metrics(&self, id: TaskId) -> Result<Option<(TaskState, Metrics)>, ErrorBody> {
        self.ask(|reply| Mail::Metrics(id, reply)).await
    }

    pub(crate) async fn session(&self, id: SessionId) -> Result<Option<SessionView>, ErrorBody> {
        self.ask(|reply| Mail::Session(id, reply)).await
    }

    pub(crate) async fn explain(&self, id: TaskId) -> Result<Explanation, ErrorBody> {
        self.ask(|reply| Mail::Explain(id, reply)).await?
    }

    pub(crate) async fn explain_request(&self, request: TaskRequest) -> Result<Explanation, ErrorBody> {
        self.ask(|reply| Mail::ExplainRequest(Box::new(request), reply)).await
    }

    /// What changes in the cluster from now on.
    pub(crate) fn follow(&self) -> broadcast::Receiver<ClusterChange> {
        self.changes.subscribe()
    }

    pub(crate) async fn facts(&self) -> Result<Facts, ErrorBody> {
        self.ask(Mail::Facts).await
    }

    async fn ask<T>(&self, mail: impl FnOnce(oneshot::Sender<T>) -> Mail) -> Result<T, ErrorBody> {
        let (reply, answer) = oneshot::channel();
        self.post(mail(reply))?;
        answer.await.map_err(|_| gone())
    }

    fn post(&self, mail: Mail) -> Result<(), ErrorBody> {
        self.mailbox.try_send(mail).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                let message = "the control loop has more to do than it can hold";
                ErrorBody::new(ErrorCode::Overloaded, message).retry_after_ms(100)
            }
            mpsc::error::TrySendError::Closed(_) => gone(),
        })
    }
}

fn gone() -> ErrorBody {
    ErrorBody::new(ErrorCode::Draining, "the control plane is shutting down")
}

/// The loop's own state beside the core.
struct Loop {
    core: ControlCore,
    clock: Clock,
    control: Control,
    relays: Arc<Relays>,
    tracker: TaskTracker,
    replies: HashMap<ReplyTo, oneshot::Sender<Reply>>,
    next_reply: u64,
    running: HashMap<AttemptId, CancellationToken>,
    view: Option<(Moment, Arc<ClusterView>)>,
}

/// The mailbox, made before the loop because others need it first.
pub(crate) fn mailbox() -> (Control, Inbox) {
    let (mailbox, letters) = mpsc::channel(MAILBOX);
    let (changes, _) = broadcast::channel(CHANGES);
    (Control { mailbox, changes }, Inbox(letters))
}

/// The loop's end of the mailbox.
#[derive(Debug)]
pub(crate) struct Inbox(mpsc::Receiver<Mail>);

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
        view: None,
    };
    let Inbox(mut letters) = inbox;
    this.apply(Event::Timer);
    loop {
        let deadline = this.core.next_deadline().unwrap_or(Moment::NEVER);
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            // Mail before timers: a heartbeat that has arrived counts before a lease runs out.
            letter = letters.recv() => match letter {
                Some(letter) => this.open(letter),
                None => break,
            },
            () = tokio::time::sleep_until(clock.instant(deadline).into()) => {
                // Timers may fire up to a millisecond early.
                if clock.now() >= deadline {
                    this.apply(Event::Timer);
                }
            }
        }
    }
    for closed in this.running.values() {
        closed.cancel();
    }
}

impl Loop {
    fn open(&mut self, letter: Mail) {
        match letter {
            Mail::Tell(event) => self.apply(event),
            Mail::Call { event, reply } => {
                self.next_reply += 1;
                let to = ReplyTo(self.next_reply);
                self.replies.insert(to, reply);
                self.apply(event(to));
            }
            // Whoever asked may have gone.
            Mail::View(reply) => drop(reply.send(self.view())),
            Mail::Task(id, reply) => drop(reply.send(self.core.task_view(self.clock.now(), id))),
            Mail::Tasks { filter, after, at_most, reply } => {
                let _ = reply.send(self.core.task_page(self.clock.now(), &filter, after, at_most));
            }
            Mail::Metrics(id, reply) => drop(reply.send(self.core.metrics(self.clock.now(), id))),
            Mail::Session(id, reply) => drop(reply.send(self.core.session_view(self.clock.now(), id))),
            Mail::Explain(id, reply) => drop(reply.send(self.core.explain_task(self.clock.now(), id))),
            Mail::ExplainRequest(request, reply) => drop(reply.send(self.core.explain_request(&request))),
            Mail::Facts(reply) => drop(reply.send(self.facts())),
        }
    }

    /// One event, and what closing attempts for it brings.
    fn apply(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            match &event {
                Event::Ended { attempt, .. } => drop(self.running.remove(attempt)),
                // Whoever is answered looks next, and must not see the state before.
                Event::Register { .. }
                | Event::Deregister { .. }
                | Event::Want { .. }
                | Event::IntentTold { .. } => self.view = None,
                _ => {}
            }
            for effect in self.core.apply(self.clock.now(), event) {
                self.carry_out(effect, &mut events);
            }
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
            Effect::OpenLog { task, log } => streams.open(task, log),
            Effect::Dispatch(dispatch) => {
                tracing::debug!(task_id = %dispatch.task, attempt_id = %dispatch.attempt, node_id = %dispatch.pool.node_id, pool_id = %dispatch.pool.pool_id, "dispatched");
                if let Some(stream) = streams.get(dispatch.task) {
                    stream.write(|log| log.open(dispatch.attempt));
                }
                let closed = CancellationToken::new();
                self.running.insert(dispatch.attempt, closed.clone());
                self.tracker.spawn(Arc::clone(&self.relays).run(*dispatch, self.control.clone(), closed));
            }
            Effect::CloseAttempt { task, attempt, why } => {
                tracing::info!(task_id = %task, attempt_id = %attempt, ?why, "an attempt is closed");
                let fence = streams.fence(task, attempt);
                if fence.finished {
                    streams.ended(task);
                }
                if let Some(closed) = self.running.remove(&attempt) {
                    closed.cancel();
                }
                let how = if fence.finished { HowEnded::Finished } else { HowEnded::Closed };
                let tokens_written = fence.tokens_written;
                let unlogged = streams.get(task).map_or(0, |stream| stream.unlogged());
                let ended = Event::Ended { attempt, tokens_written, unlogged, how, closed_after: None };
                events.push_back(ended);
            }
            Effect::CloseTask { task, error } => {
                tracing::info!(task_id = %task, code = %error.code, reason = error.message, "a task ends with an error");
                streams.close(task, &error);
            }
            Effect::Forget { task } => streams.forget(task),
            Effect::Load { pool, address } => {
                let relays = Arc::clone(&self.relays);
                tracing::info!(node_id = %pool.node_id, pool_id = %pool.pool_id, "a pool is asked for");
                self.tracker.spawn(async move {
                    let ordered = relays.link.order_pool(&address, &pool.pool_id, &PoolOrder::Load).await;
                    if let Err(error) = ordered {
                        tracing::warn!(node_id = %pool.node_id, pool_id = %pool.pool_id, %error, "a pool is asked for again later");
                    }
                });
            }
            Effect::TellIntent { to, node_id, address, order } => {
                let (relays, control) = (Arc::clone(&self.relays), self.control.clone());
                self.tracker.spawn(async move {
                    let outcome = relays.link.tell_intent(&address, &order).await;
                    if let Err(reason) = &outcome {
                        tracing::warn!(%node_id, intent = ?order.intent, reason, "the node is told with its next call");
                    }
                    control.tell(Event::IntentTold { reply: to, node_id, order, outcome }).await;
                });
            }
            // Without followers nobody is told.
            Effect::Changed(change) => drop(self.control.changes.send(change)),
            Effect::Probe { node_id, address } => {
                let (relays, control) = (Arc::clone(&self.relays), self.control.clone());
                self.tracker.spawn(async move {
                    let answer = relays.link.probe(&address).await;
                    if let Err(reason) = &answer {
                        tracing::warn!(%node_id, address, reason, "a probe failed");
                    }
                    control.tell(Event::Probed { node_id, address, answer }).await;
                });
            }
        }
    }

    fn view(&mut self) -> Arc<ClusterView> {
        let now = self.clock.now();
        match &self.view {
            Some((made, view)) if now.since(*made) < VIEW_EVERY => Arc::clone(view),
            _ => {
                let view = Arc::new(self.core.view(now));
                self.view = Some((now, Arc::clone(&view)));
                view
            }
        }
    }

    fn facts(&self) -> Facts {
        Facts {
            counters: self.core.counters(),
            nodes: self.core.registry().counts().into_iter().collect(),
            queues: self.core.queue_depths(),
            running: self.core.running(),
            queued: self.core.queued(),
            sessions: self.core.session_count(),
            paces: self.core.paces(),
            mass_silence: self.core.registry().mass_silence_since().is_some(),
            draining: self.core.is_draining(),
        }
    }
}
