//! Virtual time, the network, a control plane's shell with its relays, and the oracle over all of it.

use std::collections::{BTreeMap, VecDeque};

use attempt_link::content::Hello;
use attempt_link::control::{Action, ConnectionEnd, ControlLane, PostId, PostOutcome, PostRequest};
use attempt_link::node::{ConnectionId, GetRefusal, NodeAction, NodeLanes, PostRefusal};
use attempt_link::wire::{ControlAnswer, ControlBody, LifeId, LinkQuery, read_single, read_starts};
use bytes::Bytes;
use pool_registry_types::{AttemptId, BootId, Moment, NodeId};
use uuid::Uuid;

use crate::host::Host;
use crate::ops::Op;
use crate::oracle::{Over, Reader};

/// What a connection has on its way, and what a node writes at a time, bytes.
const SOCKET_BYTES: usize = 100_000;
const FILL_BYTES: usize = 32 * 1024;
/// Two a second, and those at once after what is done to the link.
const MAX_DIALS_IN_TEN_SECONDS: usize = 80;

#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) n: u64,
    pub(crate) life: u32,
    pub(crate) node: Option<ConnectionId>,
    /// What is on its way down; nothing is the end.
    pub(crate) down: VecDeque<(u64, Option<Bytes>)>,
    /// The node has more for it than it takes.
    pub(crate) blocked: bool,
    pub(crate) control_open: bool,
    pub(crate) node_open: bool,
    /// Bytes of its hello that are still to come, where nothing comes behind it.
    pub(crate) hello_left: Option<usize>,
    pub(crate) refused: Option<GetRefusal>,
}

#[derive(Debug, Clone)]
pub(crate) enum Event {
    Do(Op),
    Append { attempt: AttemptId, run: u64, left: u32, every: u64, size: u8 },
    GetArrives(usize),
    Deliver(usize),
    NodeHears(usize),
    Breaks(usize),
    PostSent(u32, PostId),
    PostArrives(u32, PostId, PostRequest),
    PostEnds(u32, PostId, PostOutcome),
    MayResume(u32),
    LiveAnswers(u32),
    Registers,
    Unstick(AttemptId),
}

pub(crate) struct World {
    pub(crate) now: u64,
    pub(crate) random: u64,
    pub(crate) life: u32,
    pub(crate) boot: u32,
    pub(crate) control: ControlLane,
    pub(crate) node: NodeLanes,
    pub(crate) host: Host,
    pub(crate) connections: Vec<Connection>,
    pub(crate) events: BTreeMap<(u64, u64), Event>,
    pub(crate) last_event: u64,
    pub(crate) readers: BTreeMap<AttemptId, Reader>,
    pub(crate) plans: BTreeMap<AttemptId, (u32, u64, u8)>,
    pub(crate) up_cut: u64,
    pub(crate) down_cut: u64,
    pub(crate) refused: u64,
    pub(crate) posts_lost: u64,
    pub(crate) answers_lost: u64,
    pub(crate) posts_late: u64,
    pub(crate) stalled: u64,
    pub(crate) full: u64,
    /// Links come to nothing until then, and since when.
    pub(crate) flaps: u64,
    pub(crate) flaps_since: u64,
    pub(crate) flaps_mute: bool,
    /// Of the last dials.
    pub(crate) dialled: VecDeque<u64>,
    pub(crate) suspected: bool,
    pub(crate) whole_since: u64,
    pub(crate) last_attempt: u128,
    pub(crate) traced: bool,
}

pub(crate) fn at(millis: u64) -> Moment {
    Moment::from_millis(millis)
}

pub(crate) fn life(number: u32) -> LifeId {
    LifeId(Uuid::from_u128(u128::from(number)))
}

pub(crate) fn boot(number: u32) -> BootId {
    BootId(Uuid::from_u128(1_000 + u128::from(number)))
}

fn says(number: u32) -> Hello {
    Hello { node_id: NodeId::new("n0").unwrap(), boot_id: boot(number), version: "1".into() }
}

pub(crate) fn node(number: u32) -> NodeLanes {
    NodeLanes::new(says(number))
}

/// Of a link's first record.
fn hello_bytes(boot: u32) -> usize {
    attempt_link::records::HEADER_BYTES + serde_json::to_vec(&says(boot)).unwrap().len()
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
            flaps: 0,
            flaps_since: 0,
            flaps_mute: false,
            dialled: VecDeque::new(),
            suspected: false,
            whole_since: 0,
            last_attempt: 0,
            #[expect(clippy::disallowed_methods, reason = "a person asks for it")]
            traced: std::env::var_os("LINK_TRACE").is_some(),
        }
    }

    pub(crate) fn draw(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % below.max(1)
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.draw(100) < percent
    }

    pub(crate) fn after(&mut self, millis: u64, event: Event) {
        self.at(self.now + millis, event);
    }

    pub(crate) fn at(&mut self, when: u64, event: Event) {
        self.last_event += 1;
        self.events.insert((when, self.last_event), event);
    }

    pub(crate) fn delay(&mut self) -> u64 {
        1 + self.draw(8)
    }

    /// Runs the schedule, heals the network, and lets everything come to its end.
    pub(crate) fn run(mut self, ops: Vec<(u64, Op)>) -> Vec<(AttemptId, Over)> {
        for (when, op) in ops {
            self.at(1_000 + when, Event::Do(op));
        }
        self.act_on_all();
        self.run_until(32_000);
        // What is on its way comes when its cut would have ended.
        self.whole_since = self.up_cut.max(self.down_cut).max(self.stalled).max(self.now);
        (self.up_cut, self.down_cut, self.refused, self.stalled) = (0, 0, 0, 0);
        (self.posts_lost, self.answers_lost, self.posts_late, self.full, self.flaps) = (0, 0, 0, 0, 0);
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
            self.act_on_all();
        }
    }

    /// `LINK_TRACE` shows what happens in a schedule that fails.
    fn trace(&self, what: &dyn std::fmt::Debug) {
        if self.traced {
            let text = format!("{what:?}");
            eprintln!("{} {}", self.now, &text[..text.len().min(200)]);
        }
    }

    fn act_on_all(&mut self) {
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
        self.check_stops();
        self.check_flaps();
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
                let Some(which) = self.connections.iter().position(|c| c.node == Some(id) && c.node_open)
                else {
                    return;
                };
                self.write(which, id);
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

    /// The connection takes what the node has for it, until so much is on its way.
    fn write(&mut self, which: usize, id: ConnectionId) {
        loop {
            let down = &self.connections[which].down;
            let on_its_way: usize = down.iter().flat_map(|(_, piece)| piece).map(Bytes::len).sum();
            self.connections[which].blocked = on_its_way > SOCKET_BYTES;
            if self.connections[which].blocked {
                return;
            }
            let mut out = Vec::new();
            let more = self.node.fill(at(self.now), id, &mut out, FILL_BYTES, &mut self.host);
            assert!(!more || !out.is_empty(), "there is more, and nothing of it is written");
            self.send_down(which, &mut out);
            if !more {
                return;
            }
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

    pub(crate) fn push_down(&mut self, which: usize, piece: Option<Bytes>) {
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
            Action::OtherBoot { .. } => self.after(3_000, Event::Registers),
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

    fn dial(&mut self, query: &LinkQuery) {
        let which = self.connections.len();
        self.connections.push(Connection {
            n: query.n,
            life: self.life,
            node: None,
            down: VecDeque::new(),
            blocked: false,
            control_open: true,
            node_open: false,
            hello_left: None,
            refused: None,
        });
        self.dialled.push_back(self.now);
        if self.dialled.len() > MAX_DIALS_IN_TEN_SECONDS {
            let first = self.dialled.pop_front();
            assert!(first.is_none_or(|first| self.now > first + 10_000), "it dials without a pause");
        }
        let wait = self.delay();
        if self.now < self.refused && self.now >= self.up_cut {
            self.push_down(which, None);
        } else {
            self.at((self.now + wait).max(self.up_cut), Event::GetArrives(which));
        }
    }

    pub(crate) fn node_hears(&mut self, which: usize) {
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
            Event::Breaks(which) => {
                self.node_hears(which);
                self.push_down(which, None);
            }
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
                30 => 20_000 + self.draw(200_000),
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
                if self.now < self.flaps {
                    self.connections[which].hello_left = Some(hello_bytes(self.boot));
                    if !self.flaps_mute {
                        let wait = 1 + self.draw(40);
                        self.after(wait, Event::Breaks(which));
                    }
                }
            }
            Err(refusal) => {
                self.connections[which].refused = Some(refusal);
                self.push_down(which, None);
            }
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
            let Connection { n, life, control_open, node, hello_left, .. } = self.connections[which];
            if !control_open || life != self.life {
                continue;
            }
            let piece = match (piece, hello_left) {
                (Some(_), Some(0)) => continue,
                (Some(mut bytes), Some(left)) => {
                    bytes.truncate(left);
                    self.connections[which].hello_left = Some(left - bytes.len());
                    Some(bytes)
                }
                (piece, _) => piece,
            };
            match piece {
                Some(bytes) => self.control.received(at(self.now), n, bytes),
                None => {
                    self.connections[which].control_open = false;
                    let end = match self.connections[which].refused {
                        Some(GetRefusal::WrongBoot) => ConnectionEnd::WrongBoot,
                        Some(GetRefusal::Stale) => ConnectionEnd::Stale,
                        None if node.is_none() && self.now < self.refused => ConnectionEnd::Refused,
                        _ => ConnectionEnd::Broken,
                    };
                    self.control.closed(at(self.now), n, end);
                }
            }
            while let Some(action) = self.control.next_action() {
                self.control_action(action);
            }
        }
        let Connection { node, node_open, blocked, .. } = self.connections[which];
        if let Some(id) = node.filter(|_| node_open && blocked) {
            self.write(which, id);
        }
    }

    fn post_arrives(&mut self, of: u32, id: PostId, request: PostRequest) {
        let now = at(self.now);
        let read = match request {
            PostRequest::Starts(body) => {
                let body = read_starts(&body).expect("it was written by this crate");
                self.node.starts(now, body, &mut self.host).map(|()| ControlAnswer::default())
            }
            PostRequest::Single { attempt, body } => {
                let body = Bytes::from(body.concat());
                let body = read_single(&body).expect("it was written by this crate");
                self.node.single(now, attempt, body, &mut self.host).map(|()| ControlAnswer::default())
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
}
