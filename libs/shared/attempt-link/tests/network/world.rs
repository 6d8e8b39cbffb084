//! Virtual time, the network, a control plane's shell with its relays, and the oracle over all of it.

use std::collections::{BTreeMap, VecDeque};

use attempt_link::content::Hello;
use attempt_link::control::{Action, ConnectionEnd, ControlLane, LaneState, PostId, PostOutcome, PostRequest};
use attempt_link::node::{ConnectionId, NodeAction, NodeLanes, PostRefusal};
use attempt_link::wire::{
    ControlAnswer, ControlBody, LifeId, LinkQuery, Start, StartFacts, StartSpec, read_single, read_starts,
};
use bytes::Bytes;
use pool_registry_types::task::Workload;
use pool_registry_types::{AttemptId, BootId, LogId, ModelRef, Moment, NodeId, PoolId, TaskId};
use task_stream::PayloadFormat;
use uuid::Uuid;

use crate::host::{FRAME_HEADER, Host};

/// Something that is done to the world.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    Start { frames: u32, every: u64, keep: bool, size: u8 },
    Cancel { which: usize },
    Cut { up: bool, down: bool, millis: u64 },
    Reset { half_open: bool },
    Refuse { millis: u64 },
    LosePosts { millis: u64 },
    LoseAnswers { millis: u64 },
    LatePosts { millis: u64 },
    Stall { millis: u64 },
    Stick { which: usize, millis: u64 },
    Full { millis: u64 },
    RestartControl,
    RestartNode,
    Credential,
    Leave,
}

/// How an attempt ended for the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Over {
    Ended,
    Refused,
    NeverSent,
    Unknown,
    Gone,
    Lost,
    Silent,
    Cancelled,
    /// Its control plane is gone.
    Forgotten,
}

/// A relay: what it has taken, and how it ended.
#[derive(Debug, Default)]
struct Reader {
    next: u64,
    run: Option<u64>,
    ids_to: u64,
    accepted: bool,
    failed: bool,
    over: Option<Over>,
}

#[derive(Debug)]
struct Connection {
    n: u64,
    life: u32,
    node: Option<ConnectionId>,
    /// What is on its way down; nothing is the end.
    down: VecDeque<(u64, Option<Bytes>)>,
    control_open: bool,
    node_open: bool,
}

#[derive(Debug, Clone)]
enum Event {
    Do(Op),
    Append { attempt: AttemptId, run: u64, left: u32, every: u64, size: u8 },
    GetArrives(usize),
    Deliver(usize),
    NodeHears(usize),
    PostSent(u32, PostId),
    PostArrives(u32, PostId, PostRequest),
    PostEnds(u32, PostId, PostOutcome),
    MayResume(u32),
    LiveAnswers(u32),
    Registers,
    Unstick(AttemptId),
}

pub(crate) struct World {
    now: u64,
    random: u64,
    life: u32,
    boot: u32,
    control: ControlLane,
    node: NodeLanes,
    host: Host,
    connections: Vec<Connection>,
    events: BTreeMap<(u64, u64), Event>,
    last_event: u64,
    readers: BTreeMap<AttemptId, Reader>,
    plans: BTreeMap<AttemptId, (u32, u64, u8)>,
    up_cut: u64,
    down_cut: u64,
    refused: u64,
    posts_lost: u64,
    answers_lost: u64,
    posts_late: u64,
    stalled: u64,
    full: u64,
    suspected: bool,
    last_attempt: u128,
    traced: bool,
}

fn at(millis: u64) -> Moment {
    Moment::from_millis(millis)
}

fn life(number: u32) -> LifeId {
    LifeId(Uuid::from_u128(u128::from(number)))
}

fn boot(number: u32) -> BootId {
    BootId(Uuid::from_u128(1_000 + u128::from(number)))
}

fn node(number: u32) -> NodeLanes {
    let node_id = NodeId::new("n0").unwrap();
    NodeLanes::new(Hello { node_id, boot_id: boot(number), version: "1".into() })
}

/// The start of an attempt of its own task.
pub(crate) fn start(id: u128, prompt: &str) -> Start {
    let facts = StartFacts {
        number: 0,
        pool_id: PoolId::new("p").unwrap(),
        attempt_id: AttemptId(Uuid::from_u128(id)),
        task_id: TaskId(Uuid::from_u128(id)),
        log_id: LogId(Uuid::from_u128(id)),
        first_index: 0,
        deadline_ms: Some(600_000),
        replica_hint: None,
        resume: None,
        spec: StartSpec {
            model_ref: ModelRef::new("m").unwrap(),
            workload: Workload::Completion,
            reasoning: None,
            max_tokens: None,
        },
        payload_format: PayloadFormat::Native,
        keep: false,
        traceparent: String::new(),
        correlation_id: String::new(),
        caller: None,
    };
    Start { facts, payload: serde_json::json!({ "prompt": prompt }).to_string().into() }
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let mut node = node(1);
        node.registered(life(1));
        Self {
            now: 1_000,
            random: seed | 1,
            life: 1,
            boot: 1,
            control: ControlLane::new(at(1_000), life(1), 0, boot(1)),
            node,
            host: Host::default(),
            connections: Vec::new(),
            events: BTreeMap::new(),
            last_event: 0,
            readers: BTreeMap::new(),
            plans: BTreeMap::new(),
            up_cut: 0,
            down_cut: 0,
            refused: 0,
            posts_lost: 0,
            answers_lost: 0,
            posts_late: 0,
            stalled: 0,
            full: 0,
            suspected: false,
            last_attempt: 0,
            traced: std::env::var_os("LINK_TRACE").is_some(),
        }
    }

    fn draw(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % below.max(1)
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.draw(100) < percent
    }

    fn after(&mut self, millis: u64, event: Event) {
        self.at(self.now + millis, event);
    }

    fn at(&mut self, when: u64, event: Event) {
        self.last_event += 1;
        self.events.insert((when, self.last_event), event);
    }

    fn delay(&mut self) -> u64 {
        1 + self.draw(8)
    }

    /// Runs the schedule, heals the network, and lets everything come to its end.
    pub(crate) fn run(mut self, ops: Vec<(u64, Op)>) -> Vec<(AttemptId, Over)> {
        for (when, op) in ops {
            self.at(1_000 + when, Event::Do(op));
        }
        self.settle();
        self.run_until(32_000);
        (self.up_cut, self.down_cut, self.refused, self.stalled) = (0, 0, 0, 0);
        (self.posts_lost, self.answers_lost, self.posts_late, self.full) = (0, 0, 0, 0);
        self.run_until(50_000);
        self.at(50_000, Event::Registers);
        self.run_until(110_000);
        self.check_end()
    }

    fn run_until(&mut self, end: u64) {
        let (mut stood, mut steps) = (self.now, 0);
        loop {
            steps = if self.now == stood { steps + 1 } else { 0 };
            stood = self.now;
            assert!(steps < 20_000, "time stands still");
            let event = self.events.first_key_value().map_or(u64::MAX, |((when, _), _)| *when);
            let timer = self.control.next_deadline().as_millis().max(self.stalled);
            let node_timer = self.node.next_deadline().as_millis();
            let next = event.min(timer).min(node_timer).max(self.now);
            if next >= end {
                self.now = end;
                return;
            }
            self.now = next;
            if event <= next {
                let Some((_, event)) = self.events.pop_first() else { return };
                self.handle(event);
            } else if node_timer <= next {
                self.node.timer(at(next), &mut self.host);
            } else {
                self.control.timer(at(next));
            }
            self.settle();
        }
    }

    /// `LINK_TRACE` shows what happens in a schedule that fails.
    fn trace(&self, what: &dyn std::fmt::Debug) {
        if self.traced {
            let text = format!("{what:?}");
            eprintln!("{} {}", self.now, &text[..text.len().min(200)]);
        }
    }

    fn settle(&mut self) {
        self.host.full = self.now < self.full;
        self.host.expire(self.now);
        loop {
            if let Some(action) = self.node.next_action() {
                self.node_action(action);
            } else if let Some(action) = self.control.next_action() {
                self.control_action(action);
            } else if let Some(attempt) = self.host.begun.pop() {
                self.begin(attempt);
            } else {
                break;
            }
        }
        assert!(self.control.held_bytes() <= 32 << 20, "parts take {} bytes", self.control.held_bytes());
        assert!(self.node.connections() <= 10, "{} links are open", self.node.connections());
    }

    fn begin(&mut self, attempt: AttemptId) {
        let (left, every, size) = self.plans[&attempt];
        let Some(run) = self.host.runs.get(&attempt).map(|run| run.run) else { return };
        self.after(every, Event::Append { attempt, run, left, every, size });
    }

    // ---- the node's shell ----

    fn node_action(&mut self, action: NodeAction) {
        self.trace(&action);
        match action {
            NodeAction::Write(id) => {
                let Some(which) = self.connections.iter().position(|c| c.node == Some(id) && c.node_open) else {
                    return;
                };
                let mut out = Vec::new();
                while self.node.fill(at(self.now), id, &mut out, 64 * 1024, &mut self.host) {
                    self.send_down(which, &mut out);
                }
                self.send_down(which, &mut out);
            }
            NodeAction::Close(id) => {
                let which = self.connections.iter().position(|c| c.node == Some(id));
                if let Some(which) = which.filter(|which| self.connections[*which].node_open) {
                    self.connections[which].node_open = false;
                    self.push_down(which, None);
                }
            }
            NodeAction::PokeSession => {}
        }
    }

    fn send_down(&mut self, which: usize, out: &mut Vec<u8>) {
        while !out.is_empty() {
            let most = if self.chance(30) { 1 + self.draw(40) } else { 1 + self.draw(90_000) };
            let piece = usize::try_from(most).unwrap().min(out.len());
            let bytes: Vec<u8> = out.drain(..piece).collect();
            self.push_down(which, Some(bytes.into()));
        }
    }

    fn push_down(&mut self, which: usize, piece: Option<Bytes>) {
        let arrives = self.now + self.delay();
        let connection = &mut self.connections[which];
        let last = connection.down.back().map_or(0, |(at, _)| *at);
        let arrives = arrives.max(last);
        connection.down.push_back((arrives, piece));
        self.at(arrives, Event::Deliver(which));
    }

    // ---- the control plane's shell ----

    fn control_action(&mut self, action: Action) {
        self.trace(&action);
        let life = self.life;
        match action {
            Action::Dial(query) => self.dial(&query),
            Action::Close { n } => {
                for which in 0..self.connections.len() {
                    let connection = &mut self.connections[which];
                    if connection.n == n && connection.life == life && connection.control_open {
                        connection.control_open = false;
                        self.node_hears(which);
                    }
                }
            }
            Action::Post { id, request, .. } => self.post(id, request),
            Action::AbandonPost { .. } | Action::Sent { .. } | Action::Connected => {}
            Action::WantResume => {
                let wait = self.draw(300);
                self.after(wait, Event::MayResume(life));
            }
            Action::ProbeLive => {
                if self.now >= self.up_cut && self.now >= self.down_cut && self.now >= self.refused {
                    self.after(2, Event::LiveAnswers(life));
                }
            }
            Action::NoLink | Action::Bye => self.after(3_000, Event::Registers),
            Action::OtherBoot { .. } => {
                self.suspected = false;
                self.after(3_000, Event::Registers);
            }
            Action::OrdersDoNotArrive => {
                assert!(!std::mem::replace(&mut self.suspected, true), "suspected twice");
            }
            Action::OrdersArrive => {
                assert!(std::mem::take(&mut self.suspected), "never suspected");
            }
            Action::Interrupted { .. }
            | Action::MoveQuiet
            | Action::PostStatus { .. }
            | Action::ResumeOver
            | Action::CannotConnect
            | Action::ReadSockets => {}
            other => self.relay_action(other),
        }
    }

    fn relay_action(&mut self, action: Action) {
        let over = match &action {
            Action::Ended { .. } => Some(Over::Ended),
            Action::Refused { .. } => Some(Over::Refused),
            Action::NeverSent { .. } => Some(Over::NeverSent),
            Action::Unknown { .. } => Some(Over::Unknown),
            Action::Gone { .. } => Some(Over::Gone),
            Action::Lost { .. } => Some(Over::Lost),
            Action::Silent { .. } => Some(Over::Silent),
            _ => None,
        };
        let attempt = match &action {
            Action::Accepted { attempt, .. }
            | Action::Refused { attempt, .. }
            | Action::Restart { attempt, .. }
            | Action::Resumed { attempt }
            | Action::Head { attempt, .. }
            | Action::Frames { attempt, .. }
            | Action::TokenIds { attempt, .. }
            | Action::Error { attempt, .. }
            | Action::Ended { attempt, .. }
            | Action::NeverSent { attempt }
            | Action::Unknown { attempt, .. }
            | Action::Gone { attempt }
            | Action::Lost { attempt, .. }
            | Action::Silent { attempt } => *attempt,
            other => panic!("{other:?} is no relay's"),
        };
        let reader = self.readers.get_mut(&attempt).expect("it was started");
        if reader.over == Some(Over::Cancelled) {
            assert_eq!(over, Some(Over::NeverSent), "something comes of a cancelled attempt: {action:?}");
            reader.over = over;
            return;
        }
        assert_eq!(reader.over, None, "something follows the end of {attempt}: {action:?}");
        match &action {
            Action::Accepted { .. } => {
                assert!(!std::mem::replace(&mut reader.accepted, true), "{attempt} is accepted twice");
            }
            Action::Resumed { .. } => assert!(reader.accepted),
            Action::Restart { from, .. } => assert_eq!(*from, reader.next, "{attempt} begins anew elsewhere"),
            Action::TokenIds { first, frames, .. } => {
                assert!(reader.accepted && *first <= reader.next);
                reader.ids_to = reader.ids_to.max(first + frames.len() as u64);
            }
            Action::Frames { first, count, bytes, .. } => reader.frames(&attempt, *first, *count, bytes),
            Action::Error { .. } => reader.failed = true,
            Action::Ended { .. } => {
                let kind = attempt.0.as_u128() % 4;
                assert_eq!(reader.failed, kind == 2, "the error of {attempt} comes with its end");
                let (frames, ..) = self.plans[&attempt];
                assert_eq!(reader.next, u64::from(frames), "{attempt} is whole");
            }
            Action::Refused { .. } | Action::NeverSent { .. } | Action::Unknown { .. } => {
                assert!(!reader.accepted, "{action:?} of what was accepted");
            }
            _ => {}
        }
        let Some(over) = over else { return };
        reader.over = Some(over);
        match over {
            Over::Ended => self.control.done(at(self.now), attempt),
            Over::Gone | Over::Lost | Over::Silent => self.control.cancel(at(self.now), attempt),
            Over::Unknown | Over::NeverSent | Over::Refused => {
                assert!(!self.host.is_running(&attempt), "{attempt} runs and is {over:?}");
            }
            Over::Cancelled | Over::Forgotten => {}
        }
    }

    fn dial(&mut self, query: &LinkQuery) {
        let which = self.connections.len();
        self.connections.push(Connection {
            n: query.n,
            life: self.life,
            node: None,
            down: VecDeque::new(),
            control_open: true,
            node_open: false,
        });
        let wait = self.delay();
        if self.now < self.refused && self.now >= self.up_cut {
            self.push_down(which, None);
        } else {
            self.at((self.now + wait).max(self.up_cut), Event::GetArrives(which));
        }
    }

    fn node_hears(&mut self, which: usize) {
        let when = (self.now + self.delay()).max(self.up_cut);
        self.at(when, Event::NodeHears(which));
    }

    fn post(&mut self, id: PostId, request: PostRequest) {
        let life = self.life;
        if self.now < self.refused {
            return self.after(1, Event::PostEnds(life, id, PostOutcome::NotSent));
        }
        let taken = self.chance(90) || self.now >= self.up_cut;
        if taken {
            self.after(1, Event::PostSent(life, id));
        }
        let lost = self.now < self.posts_lost && self.chance(60);
        if lost {
            if self.chance(50) {
                self.after(2, Event::PostEnds(life, id, PostOutcome::Broken));
            }
            if self.chance(70) {
                return;
            }
        }
        let late = if self.now < self.posts_late { self.draw(5_000) } else { 0 };
        let when = (self.now + self.delay() + late).max(self.up_cut);
        self.at(when, Event::PostArrives(life, id, request));
    }

    // ---- events ----

    fn handle(&mut self, event: Event) {
        self.trace(&event);
        match event {
            Event::Do(op) => self.act(op),
            Event::Append { attempt, run, left, every, size } => self.append(attempt, run, left, every, size),
            Event::GetArrives(which) => self.get_arrives(which),
            Event::Deliver(which) => self.deliver(which),
            Event::NodeHears(which) => {
                if let Some(id) = self.connections[which].node
                    && std::mem::take(&mut self.connections[which].node_open)
                {
                    self.node.closed(at(self.now), id, &mut self.host);
                }
            }
            Event::PostSent(of, id) if of == self.life => self.control.post_sent(at(self.now), id),
            Event::PostArrives(of, id, request) => self.post_arrives(of, id, request),
            Event::PostEnds(of, id, outcome) if of == self.life => {
                if self.now < self.stalled {
                    return self.at(self.stalled, Event::PostEnds(of, id, outcome));
                }
                self.control.post_ended(at(self.now), id, outcome);
            }
            Event::MayResume(of) if of == self.life => self.control.may_resume(at(self.now)),
            Event::LiveAnswers(of) if of == self.life => self.control.live_answered(at(self.now)),
            Event::Registers => {
                self.node.registered(life(self.life));
                self.control.registered(at(self.now), boot(self.boot));
            }
            Event::Unstick(attempt) => {
                if let Some(run) = self.host.runs.get_mut(&attempt) {
                    run.stuck = false;
                }
            }
            _ => {}
        }
    }

    fn append(&mut self, attempt: AttemptId, run: u64, left: u32, every: u64, size: u8) {
        if self.host.runs.get(&attempt).is_none_or(|held| held.run != run) {
            return;
        }
        if self.host.runs[&attempt].stuck {
            return self.after(500, Event::Append { attempt, run, left, every, size });
        }
        if left == 0 {
            self.host.end(&attempt);
        } else {
            let len = match size {
                0 if self.chance(10) => 200_000 + self.draw(900_000),
                1 => 9_000 + self.draw(30_000),
                _ => 40 + self.draw(200),
            };
            self.host.append(&attempt, usize::try_from(len).unwrap());
            self.after(every, Event::Append { attempt, run, left: left - 1, every, size });
        }
        self.node.appended(&attempt);
    }

    fn get_arrives(&mut self, which: usize) {
        // A socket that was closed long ago mostly reaches nobody.
        if !self.connections[which].control_open && self.chance(50) {
            return;
        }
        let (n, of) = (self.connections[which].n, self.connections[which].life);
        let query = LinkQuery { boot_id: boot(self.boot), life: life(of), lane: 0, n };
        match self.node.get(at(self.now), &query) {
            Ok(id) => {
                self.connections[which].node = Some(id);
                self.connections[which].node_open = true;
            }
            Err(_) => self.push_down(which, None),
        }
        if !self.connections[which].control_open {
            self.node_hears(which);
        }
    }

    fn deliver(&mut self, which: usize) {
        let blocked = self.down_cut.max(self.stalled);
        if self.now < blocked {
            return self.at(blocked, Event::Deliver(which));
        }
        while let Some((_, piece)) = {
            let down = &mut self.connections[which].down;
            down.front().is_some_and(|(at, _)| *at <= self.now).then(|| down.pop_front()).flatten()
        } {
            let Connection { n, life, control_open, node, .. } = self.connections[which];
            if !control_open || life != self.life {
                continue;
            }
            match piece {
                Some(bytes) => self.control.received(at(self.now), n, bytes),
                None => {
                    self.connections[which].control_open = false;
                    let end = if node.is_none() && self.now < self.refused {
                        ConnectionEnd::Refused
                    } else {
                        ConnectionEnd::Broken
                    };
                    self.control.closed(at(self.now), n, end);
                }
            }
            while let Some(action) = self.control.next_action() {
                self.control_action(action);
            }
        }
    }

    fn post_arrives(&mut self, of: u32, id: PostId, request: PostRequest) {
        let now = at(self.now);
        let read = match request {
            PostRequest::Starts(body) => {
                let body = read_starts(&body).expect("it was written by this crate");
                self.node.starts(now, body, &mut self.host).map(|()| ControlAnswer::default())
            }
            PostRequest::Single { body, .. } => {
                let body = Bytes::from(body.concat());
                let body = read_single(&body).expect("it was written by this crate");
                self.node.single(now, body, &mut self.host).map(|()| ControlAnswer::default())
            }
            PostRequest::Control(body) => {
                let json = serde_json::to_vec(&body).unwrap();
                let read: ControlBody = serde_json::from_slice(&json).unwrap();
                assert_eq!(read, body);
                self.node.control(now, &read, &mut self.host)
            }
        };
        let outcome = match read {
            Ok(answer) => PostOutcome::Answered(answer),
            Err(PostRefusal::Stale) => PostOutcome::Stale,
            Err(PostRefusal::Credential) => PostOutcome::Status(401),
        };
        if self.now < self.answers_lost && self.chance(60) {
            return;
        }
        let when = (self.now + self.delay()).max(self.down_cut);
        self.at(when, Event::PostEnds(of, id, outcome));
    }

    fn act(&mut self, op: Op) {
        let now = self.now;
        match op {
            Op::Start { frames, every, keep, size } => self.start(frames, every, keep, size),
            Op::Cancel { which } => {
                let open = self.readers.iter().filter(|(_, reader)| reader.over.is_none());
                let open: Vec<AttemptId> = open.map(|(id, _)| *id).collect();
                if let Some(attempt) = open.get(which % open.len().max(1)).copied() {
                    self.readers.get_mut(&attempt).unwrap().over = Some(Over::Cancelled);
                    self.control.cancel(at(now), attempt);
                }
            }
            Op::Cut { up, down, millis } => {
                if up {
                    self.up_cut = self.up_cut.max(now + millis);
                }
                if down {
                    self.down_cut = self.down_cut.max(now + millis);
                }
            }
            Op::Reset { half_open } => self.reset(half_open),
            Op::Refuse { millis } => self.refused = now + millis,
            Op::LosePosts { millis } => self.posts_lost = now + millis,
            Op::LoseAnswers { millis } => self.answers_lost = now + millis,
            Op::LatePosts { millis } => self.posts_late = now + millis,
            Op::Stall { millis } => self.stalled = now + millis,
            Op::Full { millis } => self.full = now + millis,
            Op::Stick { which, millis } => {
                let running = self.host.runs.len();
                let stuck = self.host.runs.iter_mut().nth(which % running.max(1));
                if let Some((attempt, run)) = stuck {
                    run.stuck = true;
                    let attempt = *attempt;
                    self.after(millis, Event::Unstick(attempt));
                }
            }
            Op::RestartControl => self.restart_control(),
            Op::RestartNode => {
                self.boot += 1;
                self.node = node(self.boot);
                let accepted = std::mem::take(&mut self.host.accepted);
                let last_run = self.host.last_run;
                self.host = Host { accepted, last_run, ..Host::default() };
                for which in 0..self.connections.len() {
                    self.connections[which].node_open = false;
                    self.push_down(which, None);
                }
                self.after(400, Event::Registers);
            }
            Op::Credential => {
                for which in 0..self.connections.len() {
                    if let Some(id) = self.connections[which].node.filter(|_| self.connections[which].node_open) {
                        self.node.credential(at(now), id, false);
                    }
                }
            }
            Op::Leave => self.node.leave(),
        }
    }

    fn reset(&mut self, half_open: bool) {
        for which in 0..self.connections.len() {
            let connection = &mut self.connections[which];
            connection.down.clear();
            let (n, of) = (connection.n, connection.life);
            if !half_open {
                self.node_hears(which);
            }
            if std::mem::take(&mut self.connections[which].control_open) && of == self.life {
                self.control.closed(at(self.now), n, ConnectionEnd::Broken);
            }
        }
    }

    /// The control plane dies and comes back without its memory.
    fn restart_control(&mut self) {
        for reader in self.readers.values_mut() {
            reader.over.get_or_insert(Over::Forgotten);
        }
        for which in 0..self.connections.len() {
            if std::mem::take(&mut self.connections[which].control_open) && self.chance(70) {
                self.node_hears(which);
            }
        }
        self.life += 1;
        self.suspected = false;
        self.control = ControlLane::new(at(self.now), life(self.life), 0, boot(self.boot));
        let wait = self.draw(800);
        self.after(wait, Event::Registers);
    }

    fn start(&mut self, frames: u32, every: u64, keep: bool, size: u8) {
        self.last_attempt += 1;
        let id = self.last_attempt;
        let attempt = AttemptId(Uuid::from_u128(id));
        self.readers.insert(attempt, Reader::default());
        self.plans.insert(attempt, (frames, every, size));
        let prompt = if size == 2 { "x".repeat(80_000) } else { "hello".into() };
        let mut start = start(id, &prompt);
        start.facts.keep = keep;
        self.control.start(at(self.now), start);
    }

    // ---- the oracle ----

    fn check_end(self) -> Vec<(AttemptId, Over)> {
        assert_eq!(self.control.state(), LaneState::Up, "the link is back");
        assert!(!self.suspected, "orders arrive again");
        assert_eq!(self.control.attempts(), 0, "every attempt is over");
        assert_eq!((self.node.attached(), self.control.held_bytes()), (0, 0));
        assert!(self.host.accepted.values().all(|times| *times == 1), "a start is accepted once at most");
        let running: Vec<_> = self.host.runs.keys().filter(|id| self.host.is_running(id)).collect();
        assert!(running.is_empty(), "{running:?} run on");
        let ends = self.readers.iter();
        ends.map(|(id, reader)| (*id, reader.over.unwrap_or_else(|| panic!("{id} has no end")))).collect()
    }
}

impl Reader {
    /// Takes whole frames; each must be the next of this attempt, by the same run.
    fn frames(&mut self, attempt: &AttemptId, first: u64, count: u32, bytes: &Bytes) {
        assert!(self.accepted, "frames before the acceptance");
        assert!(first <= self.next && first + u64::from(count) > self.next, "{first} and {count} at {}", self.next);
        let (mut rest, mut index) = (&bytes[..], first);
        while !rest.is_empty() {
            let number = |at: usize| u64::from_be_bytes(rest[at..at + 8].try_into().unwrap());
            let len = u32::from_be_bytes(rest[24..FRAME_HEADER].try_into().unwrap());
            let whose = u64::try_from(attempt.0.as_u128()).unwrap();
            assert_eq!((number(0), number(16)), (whose, index), "a frame of another attempt or place");
            assert_eq!(*self.run.get_or_insert(number(8)), number(8), "a frame of another run");
            rest = &rest[usize::try_from(len).unwrap()..];
            if index == self.next {
                assert!(attempt.0.as_u128() % 4 != 1 || self.ids_to > index, "its ids come before it");
                self.next += 1;
            }
            index += 1;
        }
        assert_eq!(index, first + u64::from(count), "as many frames as were named");
    }
}
