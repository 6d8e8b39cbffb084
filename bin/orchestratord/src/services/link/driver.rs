//! The shell of the lanes: their calls, their timer, and the way to the control loop.
//!
//! One task for each [`Lanes`], which takes orders from whoever runs attempts, and what calls bring, and
//! waits for nobody: what the control loop is to be told waits here for room.

use std::collections::BTreeMap;
use std::time::Duration;

use attempt_link::control::PostId;
use daemon_kit::Clock;
use owned_tasks::Turn;
use pool_registry_types::{Moment, NodeId};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::calls::{Clients, Heard, Teller};
use super::lanes::{Call, Lanes};
use super::links::Order;
use crate::services::control::Control;

/// What calls have brought and lanes have not taken; beyond it sockets wait.
const MOST_HEARD: usize = 256;
/// Orders, or things heard, that are taken before the time is looked at.
const MOST_AT_ONCE: usize = 64;
/// What a stopping lane waits for its POSTs at most: they hold the stops of what was cut off.
const STOP_BOUND: Duration = Duration::from_secs(1);

/// The lanes of one thread and all that they need.
#[derive(Debug)]
pub(crate) struct Driver {
    clock: Clock,
    lanes: Lanes,
    clients: Clients,
    orders: mpsc::UnboundedReceiver<Order>,
    heard: mpsc::Receiver<(NodeId, Heard)>,
    teller: mpsc::Sender<(NodeId, Heard)>,
    gets: BTreeMap<(NodeId, u64), CancellationToken>,
    posts: BTreeMap<(NodeId, PostId), CancellationToken>,
}

impl Driver {
    pub(super) fn new(
        clock: Clock,
        lanes: Lanes,
        clients: Clients,
        orders: mpsc::UnboundedReceiver<Order>,
    ) -> Self {
        let (teller, heard) = mpsc::channel(MOST_HEARD);
        let (gets, posts) = (BTreeMap::new(), BTreeMap::new());
        Self { clock, lanes, clients, orders, heard, teller, gets, posts }
    }

    /// Runs until `stop`, and then until what was ordered before has gone. Calls belong to `tracker`.
    pub(crate) async fn run(&mut self, control: Control, tracker: TaskTracker, stop: CancellationToken) {
        let mut end = Moment::NEVER;
        let mut turn = Turn::begin();
        loop {
            self.carry_out(&tracker);
            if end != Moment::NEVER && (self.posts.is_empty() || self.clock.now() >= end) {
                break;
            }
            let deadline = self.clock.instant(self.lanes.next_deadline().min(end));
            turn.wait(async {
                tokio::select! {
                    biased;
                    () = control.send_first(self.lanes.events()) => {}
                    Some(order) = self.orders.recv() => self.take_orders(order),
                    Some(heard) = self.heard.recv() => self.take_heard(heard),
                    () = tokio::time::sleep_until(deadline.into()) => {}
                    () = stop.cancelled(), if end == Moment::NEVER => {
                        end = self.clock.now() + STOP_BOUND;
                    }
                }
            })
            .await;
            // Neither orders nor sockets keep the time waiting, nor others on this thread.
            self.lanes.timer(self.clock.now());
            turn.rest().await;
        }
        self.lanes.close(self.clock.now());
        self.carry_out(&tracker);
    }

    fn take_orders(&mut self, first: Order) {
        let (now, turn) = (self.clock.now(), Turn::begin());
        self.order(now, first);
        for _ in 1..MOST_AT_ONCE {
            if turn.is_long() {
                return;
            }
            let Ok(order) = self.orders.try_recv() else { return };
            self.order(now, order);
        }
    }

    fn take_heard(&mut self, first: (NodeId, Heard)) {
        let (now, turn) = (self.clock.now(), Turn::begin());
        self.hear(now, first);
        for _ in 1..MOST_AT_ONCE {
            if turn.is_long() {
                return;
            }
            let Ok(heard) = self.heard.try_recv() else { return };
            self.hear(now, heard);
        }
    }

    fn order(&mut self, now: Moment, order: Order) {
        match order {
            Order::Registered { node_id, address, boot_id } => {
                self.lanes.registered(now, &node_id, address, boot_id);
            }
            Order::Gone { node_id } => self.lanes.gone(now, &node_id),
            Order::Start { node_id, start, sink } => self.lanes.start(now, &node_id, *start, sink),
            Order::Cancel { node_id, attempt } => self.lanes.cancel(now, &node_id, attempt),
            Order::Done { node_id, attempt } => self.lanes.done(now, &node_id, attempt),
        }
    }

    fn hear(&mut self, now: Moment, (node_id, heard): (NodeId, Heard)) {
        match heard {
            Heard::Bytes { n, bytes } => self.lanes.received(now, &node_id, n, bytes),
            Heard::Closed { n, end, denied, is_own } => {
                self.gets.remove(&(node_id.clone(), n));
                self.lanes.closed(now, &node_id, n, end, denied, is_own);
            }
            Heard::Progress { id } => self.lanes.post_progress(now, &node_id, id),
            Heard::Sent { id } => self.lanes.post_sent(now, &node_id, id),
            Heard::Answered { id, outcome, is_own } => {
                self.posts.remove(&(node_id.clone(), id));
                self.lanes.post_ended(now, &node_id, id, outcome, is_own);
            }
            Heard::Live { boot_id } => self.lanes.live_answered(now, &node_id, boot_id),
        }
    }

    fn teller(&self, node_id: NodeId) -> Teller {
        Teller { node_id, to: self.teller.clone(), over: CancellationToken::new() }
    }

    fn carry_out(&mut self, tracker: &TaskTracker) {
        while let Some(call) = self.lanes.next_call() {
            match call {
                Call::Dial { node_id, address, query } => {
                    let teller = self.teller(node_id.clone());
                    self.gets.insert((node_id, query.n), teller.over.clone());
                    owned_tasks::task(tracker, "link", self.clients.clone().get(address, query, teller));
                }
                Call::Close { node_id, n } => over(self.gets.remove(&(node_id, n))),
                Call::Post { node_id, address, id, request, fresh } => {
                    let teller = self.teller(node_id.clone());
                    self.posts.insert((node_id, id), teller.over.clone());
                    let post = self.clients.clone().post(address, id, request, fresh, teller);
                    owned_tasks::task(tracker, "post of a link", post);
                }
                Call::Abandon { node_id, id } => over(self.posts.remove(&(node_id, id))),
                Call::ProbeLive { node_id, address } => {
                    let probe = self.clients.clone().probe_live(address, self.teller(node_id));
                    owned_tasks::task(tracker, "probe of a link", probe);
                }
            }
        }
    }
}

fn over(call: Option<CancellationToken>) {
    if let Some(over) = call {
        over.cancel();
    }
}
