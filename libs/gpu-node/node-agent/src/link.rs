//! The links of the node: what [`NodeLanes`] decides, with the attempts of the agent behind it.
//!
//! One lock holds all lanes. Whoever polls a link's response fills it, so what is written waits for
//! nobody in between, and a connection that takes nothing is given nothing. A driver that has made
//! something says so without waiting: where the lock is held, the task of the links looks after it.
//!
//! The order of locks is: lanes, then drivers, then the core. No driver runs under the lock of the lanes.

use std::collections::{BTreeMap, HashSet};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use attempt_link::content::{Acceptance, Hello};
use attempt_link::node::{
    AttemptHost, ConnectionId, GetRefusal, NodeAction, NodeLanes, NotResumed, PostRefusal, Progress, Supply,
};
use attempt_link::wire::{ControlAnswer, ControlBody, LinkQuery, ResumeOrder, SingleBody, Start, StartsBody};
use bytes::Bytes;
use futures::Stream;
use node_core::{Cursor, Identity};
use parking_lot::Mutex;
use pool_registry_types::task::{InferRequest, Reasoning, TaskRequest, read_task};
use pool_registry_types::trace::{read_traceparent, read_tracestate};
use pool_registry_types::{AttemptId, ErrorBody, LifeId, Moment, TraceContext};
use task_stream::{Passage, PayloadFormat};
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;
use crate::infer::ReadBy;
use crate::passthrough::PassedRequest;

/// Bytes that are written to a link at a time.
const WRITE_BYTES: usize = 64 * 1024;
/// A driver that was not polled for so long does not live. Source: .specs/01 CLOUD-2644.
const POLLED_WITHIN: Duration = Duration::from_secs(2);
/// Between two looks whether what links were opened with counts still. Source: .specs/01 CLOUD-2656.
const CREDENTIALS_EVERY: Duration = Duration::from_secs(30);
/// The task of the links looks at least as often.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

/// The links of a node.
#[derive(Debug)]
pub(crate) struct Links {
    state: Mutex<State>,
    /// Attempts that have more since their links were told.
    ready: Mutex<HashSet<AttemptId>>,
    /// Something is due sooner, or attempts are ready.
    sooner: Notify,
}

#[derive(Debug)]
struct State {
    lanes: NodeLanes,
    open: BTreeMap<ConnectionId, Open>,
    /// When the task of the links looks next.
    armed: Moment,
}

/// A response that is being written.
struct Open {
    /// Whoever waits for something to write.
    waker: Option<Waker>,
    has_more: bool,
    is_over: bool,
    /// Whether what it was opened with counts still.
    admits: Box<dyn Fn() -> bool + Send>,
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { has_more, is_over, .. } = self;
        f.debug_struct("Open").field("has_more", has_more).field("is_over", is_over).finish_non_exhaustive()
    }
}

impl Links {
    pub(crate) fn new(identity: &Identity) -> Self {
        let hello = Hello {
            node_id: identity.node_id.clone(),
            boot_id: identity.boot_id,
            version: identity.version.clone(),
        };
        let state = State { lanes: NodeLanes::new(hello), open: BTreeMap::new(), armed: Moment::NEVER };
        Self { state: Mutex::new(state), ready: Mutex::default(), sooner: Notify::new() }
    }
}

impl Agent {
    /// A GET of a link. `admits` says whether what it came with counts, as of now. Errors: see
    /// [`GetRefusal`].
    pub fn open_link(
        self: &Arc<Self>,
        query: &LinkQuery,
        admits: impl Fn() -> bool + Send + 'static,
    ) -> Result<LinkReader, GetRefusal> {
        let mut state = self.links.state.lock();
        let id = state.lanes.get(self.now(), query)?;
        let open = Open { waker: None, has_more: false, is_over: false, admits: Box::new(admits) };
        state.open.insert(id, open);
        self.run_lane_actions(&mut state);
        drop(state);
        tracing::debug!(life = %query.life, lane = query.lane, n = query.n, "a link is opened");
        Ok(LinkReader { agent: Arc::clone(self), id })
    }

    /// Starts, what was seen and what is done. Errors: see [`PostRefusal`].
    pub fn take_starts(self: &Arc<Self>, body: StartsBody) -> Result<(), PostRefusal> {
        self.with_lanes(|now, lanes, host| lanes.starts(now, body, host))
    }

    /// A start that came alone. Errors: see [`PostRefusal`].
    pub fn take_start(self: &Arc<Self>, attempt: AttemptId, body: SingleBody) -> Result<(), PostRefusal> {
        self.with_lanes(|now, lanes, host| lanes.single(now, attempt, body, host))
    }

    /// Stops and resumes. Errors: see [`PostRefusal`].
    pub fn take_orders(self: &Arc<Self>, body: &ControlBody) -> Result<ControlAnswer, PostRefusal> {
        self.with_lanes(|now, lanes, host| lanes.control(now, body, host))
    }

    /// Looks whether what each link was opened with counts still.
    pub fn check_links(self: &Arc<Self>) {
        let mut state = self.links.state.lock();
        let State { lanes, open, .. } = &mut *state;
        let now = self.now();
        for (id, link) in open.iter() {
            lanes.credential(now, *id, (link.admits)());
        }
        self.run_lane_actions(&mut state);
    }

    /// The node is registered with this life of a control plane.
    pub fn take_links_of(&self, life: LifeId) {
        self.links.state.lock().lanes.registered(life);
    }

    /// Each link says that the node leaves, and no other one is opened.
    pub(crate) fn leave_links(&self) {
        let mut state = self.links.state.lock();
        state.lanes.leave();
        self.run_lane_actions(&mut state);
    }

    /// There is more of an attempt, or its end.
    pub(crate) fn appended_to_link(&self, attempt: AttemptId) {
        self.links.ready.lock().insert(attempt);
        match self.links.state.try_lock() {
            Some(mut state) => self.run_lane_actions(&mut state),
            None => self.links.sooner.notify_one(),
        }
    }

    fn with_lanes<T>(self: &Arc<Self>, act: impl FnOnce(Moment, &mut NodeLanes, &mut Host<'_>) -> T) -> T {
        let mut state = self.links.state.lock();
        let result = act(self.now(), &mut state.lanes, &mut Host(self));
        self.run_lane_actions(&mut state);
        result
    }

    /// Does what the lanes want done, and wakes whoever has something to write.
    fn run_lane_actions(&self, state: &mut State) {
        for attempt in self.links.ready.lock().drain() {
            state.lanes.appended(&attempt);
        }
        while let Some(action) = state.lanes.next_action() {
            let id = match action {
                NodeAction::Write(id) | NodeAction::Close(id) => id,
                NodeAction::PokeSession => {
                    self.report_now();
                    continue;
                }
            };
            let Some(open) = state.open.get_mut(&id) else { continue };
            open.has_more = true;
            open.is_over |= matches!(action, NodeAction::Close(_));
            if let Some(waker) = open.waker.take() {
                waker.wake();
            }
        }
        let next = state.lanes.next_deadline();
        if next < state.armed {
            state.armed = next;
            self.links.sooner.notify_one();
        }
    }

    /// Until `stop`: what time makes due, and what drivers could not say themselves.
    pub(crate) async fn run_links(self: Arc<Self>, stop: CancellationToken) {
        let mut credentials = interval_at(Instant::now() + CREDENTIALS_EVERY, CREDENTIALS_EVERY);
        credentials.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let next = self.links_due();
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.links.sooner.notified() => {}
                () = tokio::time::sleep(next.since(self.now()).min(LONGEST_PAUSE)) => {}
                _ = credentials.tick() => self.check_links(),
            }
        }
    }

    /// Returns when it is to be called again.
    fn links_due(self: &Arc<Self>) -> Moment {
        let mut state = self.links.state.lock();
        let now = self.now();
        if now >= state.lanes.next_deadline() {
            state.lanes.timer(now, &mut Host(self));
        }
        // Whoever asks is awake.
        state.armed = Moment::ZERO;
        self.run_lane_actions(&mut state);
        state.armed = state.lanes.next_deadline();
        state.armed
    }

    /// Takes an attempt that came over a link, and drives it.
    fn accept_by_link(self: &Arc<Self>, start: &Start) -> Result<Acceptance, ErrorBody> {
        let facts = &start.facts;
        let task = match &facts.payload_format {
            PayloadFormat::Native => read_task(&start.payload),
            PayloadFormat::OpenAi(passage) => return self.pass_on_by_link(start, passage),
        };
        let task = task.map_err(|error| ErrorBody::invalid(format!("payload: {error}")))?;
        let max_tokens = task.max_tokens.or(facts.spec.max_tokens);
        let (node_id, boot_id) = {
            let core = self.core.lock();
            (core.identity().node_id.clone(), core.identity().boot_id)
        };
        let request = InferRequest {
            task_id: facts.task_id,
            attempt_id: facts.attempt_id,
            node_id,
            boot_id,
            log_id: facts.log_id,
            first_index: facts.first_index,
            replica_hint: facts.replica_hint.clone(),
            resume: facts.resume.clone(),
            thoughts: facts.spec.reasoning == Some(Reasoning::Keep),
            task: TaskRequest { max_tokens, ..task },
        };
        let trace = trace_of(start);
        let sent = facts.resume.as_ref().map_or(0, |resume| resume.text.len() + resume.reasoning.len());
        let read_by = ReadBy::Link { keep: facts.keep };
        let (bytes, caller) = (start.payload.len() + sent, facts.caller.as_ref());
        let begun = self.begin(&facts.pool_id, request, bytes, read_by, Some(&trace), caller)?;
        let first = Cursor::first();
        self.with_core(|core, _| core.held_mut().link(&facts.attempt_id, facts.log_id, first));
        self.drive(begun.driver.run());
        Ok(Acceptance { replica_id: begun.replica_id, report_seq: begun.report_seq })
    }

    /// The same of one whose payload is passed on as it came.
    fn pass_on_by_link(self: &Arc<Self>, start: &Start, passage: &Passage) -> Result<Acceptance, ErrorBody> {
        let facts = &start.facts;
        let identity = self.identity();
        let request = PassedRequest {
            task_id: facts.task_id,
            attempt_id: facts.attempt_id,
            node_id: identity.node_id,
            boot_id: identity.boot_id,
            log_id: facts.log_id,
            replica_hint: facts.replica_hint.clone(),
            model: facts.spec.model_ref.clone(),
            passage: passage.clone(),
            body: start.payload.clone(),
        };
        let read_by = ReadBy::Link { keep: facts.keep };
        let (trace, caller) = (trace_of(start), facts.caller.as_ref());
        let (acceptance, _) = self.begin_passing(&facts.pool_id, request, read_by, Some(&trace), caller)?;
        Ok(acceptance)
    }
}

fn trace_of(start: &Start) -> TraceContext {
    let facts = &start.facts;
    let traceparent = read_traceparent(&facts.traceparent).unwrap_or_default();
    let state = read_tracestate([facts.tracestate.as_str()]).filter(|_| !traceparent.is_empty());
    TraceContext {
        traceparent,
        correlation_id: facts.correlation_id.clone(),
        tracestate: state.unwrap_or_default(),
    }
}

/// The agent's attempts, as links use them.
struct Host<'a>(&'a Arc<Agent>);

impl Host<'_> {
    /// There is less in an attempt's window: its driver may go on.
    fn there_is_room(&self, attempt: &AttemptId) {
        if let Some(signals) = self.0.drivers.lock().get(attempt) {
            signals.taken.notify_one();
        }
    }
}

impl AttemptHost for Host<'_> {
    fn accept(&mut self, _: Moment, start: &Start) -> Result<Acceptance, ErrorBody> {
        self.0.accept_by_link(start)
    }

    fn resume(&mut self, _: Moment, order: &ResumeOrder) -> Result<Acceptance, NotResumed> {
        let resumed = self.0.change_held(|core, now| core.resume_by_link(now, order))?;
        self.there_is_room(&order.attempt_id);
        Ok(resumed)
    }

    fn stop(&mut self, _: Moment, attempt: &AttemptId) {
        self.0.stop_attempt(attempt);
    }

    fn done(&mut self, _: Moment, attempt: &AttemptId) {
        self.0.done(attempt);
    }

    fn seen(&mut self, _: Moment, attempt: &AttemptId, next: u64) {
        if self.0.change_held(|core, _| core.held_mut().seen(attempt, next)) {
            self.there_is_room(attempt);
        }
    }

    fn detach(&mut self, _: Moment, attempt: &AttemptId) {
        self.0.change_held(|core, now| core.held_mut().unlink(now, attempt));
    }

    fn fail(&mut self, _: Moment, attempt: &AttemptId, next: u64, error: ErrorBody) {
        self.0.change_held(|core, _| core.held_mut().fail(attempt, next, error));
        if let Some(signals) = self.0.drivers.lock().get(attempt) {
            signals.cancel.cancel();
        }
    }

    fn supply(&mut self, attempt: &AttemptId, most: usize) -> Supply {
        self.0.core.lock().held_mut().supply(attempt, most)
    }

    fn progress(&self, now: Moment, attempt: &AttemptId) -> Option<Progress> {
        let polled_at = self
            .0
            .drivers
            .lock()
            .get(attempt)
            .map(|signals| Moment::from_millis(signals.polled_at.load(Ordering::Relaxed)));
        let (next, ended) = self.0.core.lock().held().progress(attempt)?;
        let lives = polled_at.is_some_and(|at| now.since(at) < POLLED_WITHIN);
        Some(Progress { next, ended, lives })
    }
}

/// The records of one link, which end when the link does. Dropped, the link is closed.
#[derive(Debug)]
pub struct LinkReader {
    agent: Arc<Agent>,
    id: ConnectionId,
}

impl Stream for LinkReader {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let (agent, id) = (&self.agent, self.id);
        let mut out = Vec::new();
        let mut state = agent.links.state.lock();
        loop {
            let Some(open) = state.open.get_mut(&id) else { return Poll::Ready(None) };
            open.has_more = false;
            state.lanes.fill(agent.now(), id, &mut out, WRITE_BYTES, &mut Host(agent));
            agent.run_lane_actions(&mut state);
            let Some(open) = state.open.get_mut(&id) else { return Poll::Ready(None) };
            if !out.is_empty() {
                return Poll::Ready(Some(Ok(out.into())));
            }
            if open.is_over {
                state.open.remove(&id);
                return Poll::Ready(None);
            }
            if !open.has_more {
                open.waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
        }
    }
}

impl Drop for LinkReader {
    fn drop(&mut self) {
        let agent = &self.agent;
        let mut state = agent.links.state.lock();
        state.open.remove(&self.id);
        state.lanes.closed(agent.now(), self.id, &mut Host(agent));
        agent.run_lane_actions(&mut state);
    }
}

#[cfg(test)]
#[path = "link_tests.rs"]
mod tests;
