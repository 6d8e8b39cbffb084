//! The connections of links: a GET each, which keeps its order, and POSTs, which keep none.
//!
//! A direction that is cut holds back what is on its way, as TCP does, until it heals. A connection
//! that is gone takes what is on it along; who does not hear of it has it half open.

use std::time::Duration;

use attempt_link::control::{ConnectionEnd, PostId, PostOutcome, PostRequest};
use attempt_link::node::{ConnectionId, GetRefusal};
use attempt_link::wire::LinkQuery;
use bytes::Bytes;
use pool_registry_types::{BootId, Moment};

use super::super::{Heal, What, World};
use crate::draw::{HeardBy, LinkFault, NodeFault};

/// What is on its way on one connection, bytes, before its node is made to wait.
const SOCKET_BYTES: usize = 100_000;
/// What comes of it at a time.
const READ_BYTES: usize = 16 * 1024;
/// What nobody has acknowledged for so long breaks its connection.
const USER_TIMEOUT: Duration = Duration::from_secs(10);
/// To make a connection takes so long at most, milliseconds.
const CONNECT_TIMEOUT_MS: u64 = 2_000;

/// What comes down a GET.
#[derive(Debug, Clone)]
pub(crate) enum Down {
    Bytes(Bytes),
    /// `denied`: by an answer that does not let us in.
    End(ConnectionEnd, Option<u16>),
}

/// One GET.
#[derive(Debug)]
pub(crate) struct Get {
    pub(crate) node: usize,
    pub(crate) life: u64,
    pub(crate) query: LinkQuery,
    /// As its node has it, and in which boot.
    pub(crate) conn: Option<(BootId, ConnectionId)>,
    pub(crate) cp_open: bool,
    not_before: Moment,
    held: Vec<Down>,
    in_flight: usize,
    full: bool,
    /// The network has lost it: nothing comes through any more.
    dead: bool,
    /// Something has been done to it: it may end by itself.
    pub(crate) spoiled: bool,
}

/// What goes up.
#[derive(Debug)]
pub(crate) enum Up {
    Get(u64),
    End(u64),
    Post { life: u64, id: PostId, request: PostRequest },
}

/// The network of one node's links.
#[derive(Debug, Default)]
pub(crate) struct Wire {
    up_cut: u32,
    down_cut: u32,
    refused: u32,
    mute: u32,
    posts_lost: u32,
    answers_lost: u32,
    posts_late: u32,
    held_up: Vec<Up>,
    held_down: Vec<What>,
    /// The last POST that came, and the life that sent it.
    last_post: Option<(u64, PostId)>,
    /// When it came.
    pub(super) posted: Moment,
}

impl World {
    fn up_is_cut(&self, node: usize) -> bool {
        self.links[node].to_node > 0 || self.wires[node].up_cut > 0
    }

    fn down_is_cut(&self, node: usize) -> bool {
        self.links[node].to_cp > 0 || self.wires[node].down_cut > 0
    }

    fn wait(&mut self) -> u64 {
        if self.linking.u8(..16) == 0 { self.linking.u64(1..200) } else { self.linking.u64(1..12) }
    }

    /// Whatever goes up in its time, or when the way is free.
    fn send_up(&mut self, node: usize, up: Up, late_ms: u64) {
        if self.up_is_cut(node) {
            return self.wires[node].held_up.push(up);
        }
        let wait = self.wait() + late_ms;
        self.after_ms(wait, What::UpArrives { node, up });
    }

    /// The same of what is answered.
    fn answer_down(&mut self, node: usize, what: What) {
        if self.down_is_cut(node) {
            return self.wires[node].held_down.push(what);
        }
        let wait = self.wait();
        self.after_ms(wait, what);
    }

    pub(crate) fn release_links(&mut self, node: usize) {
        if !self.up_is_cut(node) {
            for up in std::mem::take(&mut self.wires[node].held_up) {
                self.send_up(node, up, 0);
            }
        }
        if self.down_is_cut(node) {
            return;
        }
        for what in std::mem::take(&mut self.wires[node].held_down) {
            self.answer_down(node, what);
        }
        for get in self.gets_of(node) {
            let held = self.gets.get_mut(&get).map(|get| std::mem::take(&mut get.held));
            for piece in held.into_iter().flatten() {
                self.carry_down(get, piece);
            }
        }
    }

    fn gets_of(&self, node: usize) -> Vec<u64> {
        self.gets.iter().filter(|(_, get)| get.node == node).map(|(id, _)| *id).collect()
    }

    // ---- GETs, from the control plane ----

    pub(super) fn dial(&mut self, node: usize, query: LinkQuery) {
        self.next_get += 1;
        let id = self.next_get;
        let get = Get {
            node,
            life: self.lives,
            query,
            conn: None,
            cp_open: true,
            not_before: self.now,
            held: Vec::new(),
            in_flight: 0,
            full: false,
            dead: false,
            spoiled: false,
        };
        self.gets.insert(id, get);
        if self.shortage > 0 {
            return self
                .after_ms(1, What::DownArrives { get: id, piece: Down::End(ConnectionEnd::Broken, None) });
        }
        if self.wires[node].refused > 0 && !self.up_is_cut(node) && !self.down_is_cut(node) {
            self.coverage.hit("link: dial refused");
            return self.carry_down(id, Down::End(ConnectionEnd::Refused, None));
        }
        self.send_up(node, Up::Get(id), 0);
    }

    /// The control plane reads it no more.
    pub(super) fn hang_up(&mut self, id: u64) {
        let Some(get) = self.gets.get_mut(&id) else { return };
        get.cp_open = false;
        let (node, dead) = (get.node, get.dead);
        if !dead {
            self.send_up(node, Up::End(id), 0);
        }
    }

    pub(super) fn get_of(&self, node: usize, n: u64) -> Option<u64> {
        let is_it = |(_, get): &(&u64, &Get)| get.node == node && get.life == self.lives && get.query.n == n;
        self.gets.iter().find(is_it).map(|(id, _)| *id)
    }

    /// The control plane's process is gone; unless it was its host, every node hears of it.
    pub(crate) fn links_lose_control(&mut self, is_heard: bool) {
        for id in self.gets.keys().copied().collect::<Vec<_>>() {
            let Some(get) = self.gets.get_mut(&id) else { continue };
            if !std::mem::take(&mut get.cp_open) {
                continue;
            }
            let (node, dead) = (get.node, get.dead);
            if is_heard && !dead {
                self.send_up(node, Up::End(id), 0);
            } else if self.linking.bool() {
                self.lose_get(id, HeardBy::ControlPlane);
            } else if let Some(get) = self.gets.get_mut(&id) {
                // Something between takes what comes, and its node never hears.
                (get.dead, get.spoiled) = (true, true);
            }
        }
    }

    // ---- at the node ----

    pub(crate) fn up_arrives(&mut self, node: usize, up: Up) {
        match up {
            Up::Get(id) => self.get_arrives(node, id),
            Up::End(id) => self.node_loses(id),
            Up::Post { life, id, request } => self.post_arrives(node, life, id, request),
        }
    }

    fn get_arrives(&mut self, node: usize, id: u64) {
        let Some(get) = self.gets.get(&id) else { return };
        let query = get.query;
        let ended = |end, denied| Down::End(end, denied);
        if self.nodes[node].core.is_none() || self.nodes[node].lanes.is_none() {
            self.coverage.hit("link: dial refused");
            return self.carry_down(id, ended(ConnectionEnd::Refused, None));
        }
        if self.wires[node].mute > 0 {
            return;
        }
        if self.node_faults[node].0 == Some(NodeFault::Denies) {
            return self.carry_down(id, ended(ConnectionEnd::Broken, Some(401)));
        }
        let opened = self.at_lanes(node, |now, lanes, _| lanes.get(now, &query));
        match opened {
            Some(Ok(conn)) => {
                let boot = self.nodes[node].boot;
                self.nodes[node].open.insert(conn, id);
                if let Some(get) = self.gets.get_mut(&id) {
                    get.conn = Some((boot, conn));
                }
                self.run_lanes(node);
            }
            Some(Err(refusal)) => {
                let end = match refusal {
                    GetRefusal::WrongBoot => ConnectionEnd::WrongBoot,
                    GetRefusal::Stale => ConnectionEnd::Stale,
                    GetRefusal::Lane | GetRefusal::Leaving => ConnectionEnd::Broken,
                };
                if end == ConnectionEnd::Stale {
                    self.coverage.hit("link: dial stale");
                }
                self.carry_down(id, ended(end, None));
            }
            None => {}
        }
    }

    /// The node's process has the connection no more.
    fn node_loses(&mut self, id: u64) {
        let Some(get) = self.gets.get_mut(&id) else { return };
        let node = get.node;
        let Some((boot, conn)) = get.conn.take() else { return self.forget_get(id) };
        if boot == self.nodes[node].boot && self.nodes[node].open.remove(&conn).is_some() {
            self.at_lanes(node, |now, lanes, host| lanes.closed(now, conn, host));
            self.run_lanes(node);
        }
        self.forget_get(id);
    }

    fn forget_get(&mut self, id: u64) {
        if self.gets.get(&id).is_some_and(|get| !get.cp_open && get.conn.is_none()) {
            self.gets.remove(&id);
        }
    }

    /// What the connection takes of the node's bytes. Returns whether it takes more.
    pub(super) fn takes(&mut self, id: u64, bytes: Vec<u8>) -> bool {
        let mut rest = Bytes::from(bytes);
        while !rest.is_empty() {
            // Cut anywhere on its way.
            let most = if self.linking.u8(..4) == 0 { self.linking.usize(1..60) } else { READ_BYTES };
            let piece = rest.split_to(most.min(rest.len()));
            if let Some(get) = self.gets.get_mut(&id).filter(|get| !get.dead) {
                get.in_flight += piece.len();
            }
            self.carry_down(id, Down::Bytes(piece));
        }
        let Some(get) = self.gets.get_mut(&id) else { return false };
        get.full = get.in_flight > SOCKET_BYTES;
        !get.full
    }

    /// The node's process closes it, once all is written.
    pub(super) fn node_closes(&mut self, id: u64) {
        if let Some(get) = self.gets.get_mut(&id) {
            get.conn = None;
        }
        self.carry_down(id, Down::End(ConnectionEnd::Broken, None));
    }

    /// The node's process is gone.
    pub(crate) fn links_lose_node(&mut self, node: usize) {
        for id in std::mem::take(&mut self.nodes[node].open).into_values() {
            if let Some(get) = self.gets.get_mut(&id) {
                (get.spoiled, get.conn) = (true, None);
            }
            self.carry_down(id, Down::End(ConnectionEnd::Broken, None));
        }
    }

    fn carry_down(&mut self, id: u64, piece: Down) {
        let wait = self.wait();
        let Some(get) = self.gets.get(&id) else { return };
        let is_cut = self.down_is_cut(get.node);
        let now = self.now;
        let Some(get) = self.gets.get_mut(&id).filter(|get| !get.dead) else { return };
        if is_cut {
            return get.held.push(piece);
        }
        let at = (now + Duration::from_millis(wait)).max(get.not_before);
        get.not_before = at;
        self.at(at, What::DownArrives { get: id, piece });
    }

    // ---- at the control plane ----

    pub(crate) fn down_arrives(&mut self, id: u64, piece: Down) {
        let Some(get) = self.gets.get_mut(&id) else { return };
        let (node, n, life, is_dead) = (get.node, get.query.n, get.life, get.dead);
        if let Down::Bytes(bytes) = &piece {
            get.in_flight = get.in_flight.saturating_sub(bytes.len());
            if std::mem::take(&mut get.full)
                && let Some((boot, conn)) = get.conn
            {
                self.after_ms(0, What::LinkTakes { node, boot, conn });
            }
        }
        let Some(get) = self.gets.get_mut(&id) else { return };
        if !get.cp_open || life != self.lives || is_dead || self.control.is_none() {
            return self.forget_get(id);
        }
        match piece {
            Down::Bytes(bytes) => self.lane_received(node, n, bytes),
            Down::End(end, denied) => {
                get.cp_open = false;
                self.forget_get(id);
                self.lane_closed(node, n, end, denied);
            }
        }
    }

    // ---- POSTs ----

    pub(super) fn post(&mut self, node: usize, id: PostId, request: PostRequest, fresh: bool) {
        let life = self.lives;
        let ends = |outcome| What::PostEnds { life, node, id, outcome };
        let wire = &self.wires[node];
        if self.shortage > 0 || wire.refused > 0 && fresh && !self.up_is_cut(node) {
            return self.after_ms(1, ends(PostOutcome::NotSent));
        }
        if self.up_is_cut(node) && (fresh || self.linking.bool()) {
            // Its connection is to be made first.
            return self.after_ms(CONNECT_TIMEOUT_MS, ends(PostOutcome::NotSent));
        }
        if let PostRequest::Single { .. } = &request {
            self.coverage.hit("link: start alone");
            self.after_ms(1, What::PostTaken { life, node, id, whole: false });
        }
        // What a socket has taken, or has no room for.
        if !self.up_is_cut(node) || self.linking.bool() {
            let wait = self.linking.u64(1..5);
            self.after_ms(wait, What::PostTaken { life, node, id, whole: true });
        }
        let (is_lossy, is_late) = (self.wires[node].posts_lost > 0, self.wires[node].posts_late > 0);
        if is_lossy && self.linking.u8(..10) < 6 {
            self.coverage.hit("link: POST lost");
            if self.linking.bool() {
                self.after_ms(2, ends(PostOutcome::Broken));
            }
            if self.linking.u8(..10) < 7 {
                return;
            }
        }
        let most_ms = if self.linking.u8(..4) == 0 { 15_000 } else { 5_000 };
        let late_ms = if is_late { self.linking.u64(..most_ms) } else { 0 };
        self.send_up(node, Up::Post { life, id, request }, late_ms);
    }

    fn post_arrives(&mut self, node: usize, life: u64, id: PostId, request: PostRequest) {
        self.wires[node].posted = self.now;
        let before = self.wires[node].last_post.replace((life, id));
        if before.is_some_and(|before| before > (life, id)) {
            self.coverage.hit("link: POST overtaken");
        }
        if life != self.lives {
            self.coverage.hit("link: POST of a life before");
        }
        if let Some(outcome) = self.take_post(node, request) {
            if outcome == PostOutcome::Stale {
                self.coverage.hit("link: POST stale");
            }
            if self.wires[node].answers_lost > 0 && self.linking.u8(..10) < 7 {
                self.coverage.hit("link: answer lost");
                if self.linking.bool() {
                    return;
                }
                return self
                    .answer_down(node, What::PostEnds { life, node, id, outcome: PostOutcome::Broken });
            }
            self.answer_down(node, What::PostEnds { life, node, id, outcome });
        }
    }

    /// `GET /health/live`.
    pub(super) fn ask_live(&mut self, node: usize) {
        if !self.up_is_cut(node) && self.wires[node].refused == 0 && self.nodes[node].stopped == 0 {
            let (life, boot) = (self.lives, self.nodes[node].boot);
            if self.nodes[node].core.is_some() {
                self.answer_down(node, What::LiveAnswered { life, node, boot });
            }
        }
    }

    // ---- faults ----

    /// The connection is gone, and what is on it. Who writes into it notices in time.
    fn lose_get(&mut self, id: u64, heard_by: HeardBy) {
        let Some(get) = self.gets.get_mut(&id).filter(|get| !get.dead) else { return };
        (get.dead, get.spoiled) = (true, true);
        get.held.clear();
        let (node, n, life, was_open) = (get.node, get.query.n, get.life, get.cp_open);
        match heard_by {
            HeardBy::Node | HeardBy::Both => self.after_ms(1, What::UpArrives { node, up: Up::End(id) }),
            HeardBy::ControlPlane => {
                self.coverage.hit("link: half open at its node");
                let late = u64::try_from(USER_TIMEOUT.as_millis()).unwrap_or(u64::MAX);
                self.after_ms(late, What::UpArrives { node, up: Up::End(id) });
            }
        }
        if heard_by == HeardBy::Node {
            self.coverage.hit("link: half open at the control plane");
            self.after_ms(30_000, What::DeadDue { life, node, n });
        } else if was_open {
            self.after_ms(1, What::LinkBroke { life, node, n, get: id });
        }
    }

    pub(crate) fn link_broke(&mut self, life: u64, node: usize, n: u64, get: u64) {
        let was_open = self.gets.get_mut(&get).is_some_and(|get| std::mem::take(&mut get.cp_open));
        self.forget_get(get);
        if was_open && life == self.lives && self.control.is_some() {
            self.lane_closed(node, n, ConnectionEnd::Broken, None);
        }
    }

    /// What nobody has acknowledged in all that time is given up.
    pub(crate) fn link_unacknowledged(&mut self, node: usize) {
        if self.down_is_cut(node) && self.watches[node].lasts(self.now) >= USER_TIMEOUT {
            for get in self.gets_of(node) {
                self.lose_get(get, HeardBy::Node);
            }
        }
    }

    /// Something begins that may keep what goes by the links of a node.
    pub(crate) fn links_are_troubled(&mut self, node: usize, down: bool) {
        self.watches[node].begins(self.now);
        if down {
            self.at(self.now + USER_TIMEOUT, What::LinkUnacknowledged { node });
        }
    }

    pub(crate) fn link_fault(&mut self, node: usize, fault: LinkFault, for_ms: u64) {
        match fault {
            LinkFault::PacketLost => return self.lose_packet(node),
            LinkFault::Reset(heard_by) => {
                self.coverage.hit("fault: link reset");
                self.links_are_troubled(node, false);
                self.watches[node].ends(self.now);
                for get in self.gets_of(node) {
                    self.lose_get(get, heard_by);
                }
                return;
            }
            LinkFault::Cut { .. } => self.coverage.hit("fault: link cut"),
            _ => {}
        }
        self.links_are_troubled(node, matches!(fault, LinkFault::Cut { down: true, .. }));
        *self.wires[node].count_of(fault) += 1;
        if let LinkFault::Cut { up: true, down: true } = fault {
            self.wires[node].down_cut += 1;
        }
        self.after_ms(for_ms, What::Heal(Heal::Link { node, fault }));
    }

    pub(crate) fn link_heals(&mut self, node: usize, fault: LinkFault) {
        *self.wires[node].count_of(fault) -= 1;
        if let LinkFault::Cut { up: true, down: true } = fault {
            self.wires[node].down_cut -= 1;
        }
        self.watches[node].ends(self.now);
        self.release_links(node);
    }

    /// What follows on one connection waits until it was sent again.
    fn lose_packet(&mut self, node: usize) {
        let wait = Duration::from_millis(self.linking.u64(200..1_000));
        let open = self.gets_of(node);
        if let Some(id) = open.last()
            && let Some(get) = self.gets.get_mut(id)
        {
            self.coverage.hit("link: packet lost");
            get.not_before = get.not_before.max(self.now + wait);
        }
    }
}

impl Wire {
    fn count_of(&mut self, fault: LinkFault) -> &mut u32 {
        match fault {
            LinkFault::Cut { up: true, .. } => &mut self.up_cut,
            LinkFault::Cut { .. } => &mut self.down_cut,
            LinkFault::Refused => &mut self.refused,
            LinkFault::PostsLost => &mut self.posts_lost,
            LinkFault::AnswersLost => &mut self.answers_lost,
            LinkFault::PostsLate => &mut self.posts_late,
            LinkFault::Mute => &mut self.mute,
            LinkFault::Reset(_) | LinkFault::PacketLost => unreachable!("over at once"),
        }
    }
}
