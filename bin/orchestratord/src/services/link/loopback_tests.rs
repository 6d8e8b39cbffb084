//! Attempts by a real link: the daemon's own relays, lanes and calls, over a socket, to the node's end of
//! a link with a few attempts behind it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use attempt_link::content::{Acceptance, Hello};
use attempt_link::node::{AttemptHost, ConnectionId, NodeAction, NodeLanes, NotResumed, Progress, Supply};
use attempt_link::wire::{
    ControlAnswer, ControlBody, LinkQuery, MAX_POST_BYTES, ResumeOrder, Start, read_single, read_starts,
};
use axum::body::Body as HttpBody;
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use owned_tasks::StreamThreads;
use parking_lot::Mutex;
use pool_registry_types::node::{Capabilities, Intent, LINK_FEATURE, LiveAnswer, RegisterRequest};
use pool_registry_types::sse::write_frame;
use pool_registry_types::task::InferRequest;
use pool_registry_types::{AttemptId, BootId, MachineId, Moment, NodeId};
use task_scheduler::Event;
use task_stream::{AttemptDeadlines, PayloadFormat};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::*;
use crate::services::attempt_body::tests::{dispatch, spec};
use crate::services::control::{self, Control, Inbox, Message};
use crate::services::dispatch::{Closing, Relays};
use crate::services::measured::Measured;
use crate::services::streams::{ReadOutcome, ReadPosition, Streams, Submitted};

const BOOT: BootId = BootId(Uuid::from_u128(4));
const BOUND: Duration = Duration::from_secs(20);
const TOKENS: u64 = 4;

/// An attempt that writes some tokens and its end, of which a few can be read already.
struct Run {
    frames: Vec<Bytes>,
    shown: usize,
    reader: usize,
}

#[derive(Default)]
struct Host {
    runs: BTreeMap<AttemptId, Run>,
    payloads: Vec<Bytes>,
    stopped: Vec<AttemptId>,
    done: Vec<AttemptId>,
    /// Frames that can be read of what begins.
    shown: usize,
}

fn acceptance() -> Acceptance {
    Acceptance { replica_id: ReplicaId::new("r0").unwrap(), report_seq: 3 }
}

impl AttemptHost for Host {
    fn accept(&mut self, _: Moment, start: &Start) -> Result<Acceptance, ErrorBody> {
        let log = start.facts.log_id;
        let frame = |event: &str, index: u64| {
            let mut out = Vec::new();
            write_frame(&mut out, Some((&log, index)), event, &format!("{{\"t\":\"x\",\"i\":{index}}}"));
            Bytes::from(out)
        };
        let mut frames: Vec<Bytes> = (0..TOKENS).map(|index| frame("token", index)).collect();
        frames.push(frame("end", TOKENS));
        self.runs
            .insert(start.facts.attempt_id, Run { shown: self.shown.min(frames.len()), frames, reader: 0 });
        self.payloads.push(start.payload.clone());
        Ok(acceptance())
    }

    fn resume(&mut self, _: Moment, order: &ResumeOrder) -> Result<Acceptance, NotResumed> {
        let run = self.runs.get_mut(&order.attempt_id).ok_or(NotResumed::Unknown)?;
        run.reader = usize::try_from(order.from).unwrap();
        Ok(acceptance())
    }

    fn stop(&mut self, _: Moment, attempt: &AttemptId) {
        self.stopped.push(*attempt);
    }

    fn done(&mut self, _: Moment, attempt: &AttemptId) {
        self.done.push(*attempt);
    }

    fn seen(&mut self, _: Moment, _: &AttemptId, _: u64) {}

    fn detach(&mut self, _: Moment, _: &AttemptId) {}

    fn fail(&mut self, _: Moment, _: &AttemptId, _: u64, _: ErrorBody) {}

    fn supply(&mut self, attempt: &AttemptId, _: usize) -> Supply {
        let Some(run) = self.runs.get_mut(attempt) else { return Supply::Gone };
        let first = run.reader;
        if first < run.shown {
            run.reader = run.shown;
            let count = u32::try_from(run.shown - first).unwrap();
            return Supply::Frames {
                first: first as u64,
                count,
                bytes: run.frames[first..run.shown].concat().into(),
            };
        }
        match run.shown == run.frames.len() {
            true => Supply::End { next: run.shown as u64, report_seq: 8 },
            false => Supply::Waiting,
        }
    }

    fn progress(&self, _: Moment, attempt: &AttemptId) -> Option<Progress> {
        let run = self.runs.get(attempt)?;
        Some(Progress { next: run.shown as u64, ended: run.shown == run.frames.len(), lives: true })
    }
}

/// A node's end of its links behind HTTP.
struct Node {
    clock: Clock,
    lanes: NodeLanes,
    host: Host,
    writers: BTreeMap<ConnectionId, mpsc::UnboundedSender<Bytes>>,
}

type Shared = Arc<Mutex<Node>>;

impl Node {
    fn new() -> Self {
        let hello = Hello { node_id: node_id(), boot_id: BOOT, version: "0".into() };
        let lanes = NodeLanes::new(hello);
        Self { clock: Clock::default(), lanes, host: Host::default(), writers: BTreeMap::new() }
    }

    fn pump(&mut self) {
        let now = self.clock.now();
        self.lanes.timer(now, &mut self.host);
        while let Some(action) = self.lanes.next_action() {
            match action {
                NodeAction::Write(id) => loop {
                    let mut out = Vec::new();
                    let more = self.lanes.fill(now, id, &mut out, 64 * 1024, &mut self.host);
                    let written = self.writers.get(&id).map(|writer| writer.send(out.into()).is_ok());
                    if written == Some(false) {
                        self.lanes.closed(now, id, &mut self.host);
                    }
                    if !more || written != Some(true) {
                        break;
                    }
                },
                NodeAction::Close(id) => drop(self.writers.remove(&id)),
                NodeAction::PokeSession => {}
            }
        }
    }

    /// So many frames can be read from now on.
    fn show(&mut self, frames: usize) {
        for (attempt, run) in &mut self.host.runs {
            run.shown = frames.min(run.frames.len());
            self.lanes.appended(attempt);
        }
        self.pump();
    }

    /// All connections break.
    fn cut(&mut self) {
        for (id, _) in std::mem::take(&mut self.writers) {
            self.lanes.closed(self.clock.now(), id, &mut self.host);
        }
    }

    fn answer(&mut self, read: Result<(), attempt_link::node::PostRefusal>) -> StatusCode {
        self.pump();
        if read.is_ok() { StatusCode::OK } else { StatusCode::CONFLICT }
    }
}

fn node_id() -> NodeId {
    NodeId::new("a").unwrap()
}

async fn link(State(node): State<Shared>, Query(query): Query<LinkQuery>) -> Result<HttpBody, StatusCode> {
    let (writer, pieces) = mpsc::unbounded_channel();
    let mut node = node.lock();
    let now = node.clock.now();
    let id = node.lanes.get(now, &query).map_err(|_| StatusCode::CONFLICT)?;
    node.writers.insert(id, writer);
    node.pump();
    Ok(HttpBody::from_stream(futures::stream::unfold(pieces, |mut pieces| async move {
        let piece: Bytes = pieces.recv().await?;
        Some((Ok::<_, std::convert::Infallible>(piece), pieces))
    })))
}

async fn starts(State(node): State<Shared>, body: Bytes) -> StatusCode {
    let mut node = node.lock();
    let now = node.clock.now();
    let node = &mut *node;
    let read = node.lanes.starts(now, read_starts(&body).unwrap(), &mut node.host);
    node.answer(read)
}

async fn single(State(node): State<Shared>, Path(attempt): Path<AttemptId>, body: Bytes) -> StatusCode {
    let mut node = node.lock();
    let now = node.clock.now();
    let node = &mut *node;
    let read = node.lanes.single(now, attempt, read_single(&body).unwrap(), &mut node.host);
    node.answer(read)
}

async fn orders(
    State(node): State<Shared>,
    Json(body): Json<ControlBody>,
) -> Result<Json<ControlAnswer>, StatusCode> {
    let mut node = node.lock();
    let now = node.clock.now();
    let node = &mut *node;
    let answer = node.lanes.control(now, &body, &mut node.host);
    node.pump();
    answer.map(Json).map_err(|_| StatusCode::CONFLICT)
}

/// An attempt as a call of its own: one token, and the end.
async fn infer(body: Bytes) -> ([(&'static str, &'static str); 2], Vec<u8>) {
    let asked: InferRequest = serde_json::from_slice(&body).unwrap();
    let mut frames = Vec::new();
    write_frame(&mut frames, Some((&asked.log_id, 0)), "token", r#"{"t":"x","i":0}"#);
    write_frame(&mut frames, Some((&asked.log_id, 1)), "end", "{}");
    frames.extend_from_slice(b": report-seq 9\n\n");
    ([(headers::REPLICA_ID, "r0"), (headers::REPORT_SEQ, "3")], frames)
}

/// A control plane's way to one node, and that node.
struct World {
    node: Shared,
    relays: Arc<Relays>,
    control: Control,
    inbox: Inbox,
    closing: Closing,
    stop: CancellationToken,
    tracker: TaskTracker,
    address: String,
    last: u128,
}

impl World {
    async fn new() -> Self {
        let routes = Router::new()
            .route(routes::LINK, get(link))
            .route(routes::ATTEMPTS, post(starts))
            .route(routes::ATTEMPT, post(single))
            .route(routes::ATTEMPTS_CONTROL, post(orders))
            .layer(DefaultBodyLimit::max(MAX_POST_BYTES));
        Self::of(routes).await
    }

    /// One whose node says that it has a link, and has none.
    async fn without_link() -> Self {
        let live = || async { Json(LiveAnswer { node_id: node_id(), boot_id: BOOT }) };
        let routes =
            Router::new().route(routes::HEALTH_LIVE, get(live)).route(routes::POOL_INFER, post(infer));
        Self::of(routes).await
    }

    async fn of(routes: Router<Shared>) -> Self {
        let node = Arc::new(Mutex::new(Node::new()));
        let routes = routes.with_state(Arc::clone(&node));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let ending = stop.clone().cancelled_owned();
        owned_tasks::task(&tracker, "node", async move {
            tokio::select! {
                () = ending => {}
                served = axum::serve(listener, routes).into_future() => served.unwrap(),
            }
        });
        let (ticking, ending) = (Arc::clone(&node), stop.clone());
        owned_tasks::task(&tracker, "node's timer", async move {
            while timeout(Duration::from_millis(50), ending.cancelled()).await.is_err() {
                ticking.lock().pump();
            }
        });
        let clock = Clock::default();
        let tls = ClientTls::new("TEST", None, None).unwrap();
        let threads = StreamThreads::start(1).unwrap();
        let (http, drivers) = HttpLink::new(&tls, Tokens::default(), clock, &threads).unwrap();
        let (control, inbox) = control::mailbox(clock);
        for mut driver in drivers {
            let (control, calls, stop) = (control.clone(), tracker.clone(), stop.clone());
            owned_tasks::task(&tracker, "links", async move { driver.run(control, calls, stop).await });
        }
        node.lock().lanes.registered(http.links.life);
        http.links.registered(&registers(address));
        let streams = Arc::new(Streams::new(1 << 20, usize::MAX));
        let held_answers = task_stream::HoldBudget::new(usize::MAX);
        let link = NodeLink::Http(Box::new(http));
        let relays = Arc::new(Relays {
            clock,
            link,
            streams,
            threads,
            held_answers,
            measured: Arc::new(Measured::new(false)),
        });
        let closing = Closing::default();
        let address = format!("http://{address}");
        Self { node, relays, control, inbox, closing, stop, tracker, address, last: 100 }
    }

    /// An attempt is dispatched. Returns it and its task's stream.
    fn dispatch(&mut self, payload: &[u8]) -> (AttemptId, Arc<crate::services::streams::TaskStream>) {
        self.last += 1;
        let never = Duration::from_secs(100);
        let deadlines =
            AttemptDeadlines { acceptance: never, first_token: never, token_idle: never, silence: never };
        let id = Uuid::from_u128(self.last);
        let attempt = AttemptId(id);
        let dispatch = Dispatch {
            task: pool_registry_types::TaskId(id),
            attempt,
            log: pool_registry_types::LogId(id),
            deadlines,
            address: self.address.clone(),
            ..dispatch(spec())
        };
        let payload = Payload { format: PayloadFormat::Native, bytes: Bytes::copy_from_slice(payload) };
        self.relays.streams.open(dispatch.task, dispatch.log, Submitted::with(payload));
        let stream = self.relays.streams.get(dispatch.task).unwrap();
        stream.write(|log| log.open(attempt));
        let relay = Arc::clone(&self.relays).run(dispatch, self.control.clone(), self.closing.clone());
        owned_tasks::task(&self.tracker, "relay", relay);
        (attempt, stream)
    }

    /// The next event that is about an attempt.
    async fn event(&mut self) -> Event {
        let next = async {
            loop {
                match self.inbox.messages.recv().await.unwrap() {
                    Message::Event(Event::Link { .. } | Event::Alive { .. }) => {}
                    Message::Event(event) => return event,
                    _ => panic!("nobody calls"),
                }
            }
        };
        timeout(BOUND, next).await.expect("an event in time")
    }

    async fn ended(&mut self) -> (HowEnded, Option<u64>, u64) {
        match self.event().await {
            Event::Ended { how, final_report, tokens_written, .. } => (how, final_report, tokens_written),
            other => panic!("not an end: {other:?}"),
        }
    }

    /// Waits until the node is as it should be.
    async fn until(&self, is: impl Fn(&Host) -> bool) {
        let looks = async {
            while !is(&self.node.lock().host) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(BOUND, looks).await.expect("the node hears of it in time");
    }

    async fn end(self) {
        self.stop.cancel();
        self.tracker.close();
        timeout(BOUND, self.tracker.wait()).await.expect("all tasks end");
    }
}

fn registers(address: SocketAddr) -> RegisterRequest {
    RegisterRequest {
        node_id: node_id(),
        machine_id: MachineId::new("m").unwrap(),
        boot_id: BOOT,
        address: format!("http://{address}"),
        version: "0".into(),
        intent: Intent::Serving,
        labels: BTreeMap::new(),
        pools: vec![],
        capabilities: Capabilities::default(),
        features: vec![LINK_FEATURE.into()],
    }
}

fn text(stream: &crate::services::streams::TaskStream) -> String {
    let ReadOutcome::Frames(piece) = stream.read(ReadPosition { frame: 0, part: 0 }) else {
        panic!("nothing is there")
    };
    assert!(piece.is_last);
    String::from_utf8(piece.bytes.to_vec()).unwrap()
}

// CLOUD-2620
// CLOUD-2640
#[tokio::test]
async fn an_attempt_goes_by_a_link_from_its_start_to_its_end_and_the_node_may_let_it_go() {
    let mut world = World::new().await;
    world.node.lock().host.shown = 9;
    let (attempt, stream) = world.dispatch(br#"{"prompt":"x"}"#);
    let accepted = world.event().await;
    assert!(matches!(accepted, Event::Accepted { report_seq: 3, .. }), "{accepted:?}");
    assert!(matches!(world.event().await, Event::Started { .. }));
    assert_eq!(world.ended().await, (HowEnded::Finished, Some(8), TOKENS));
    assert_eq!(text(&stream).matches("event: token").count(), 4);
    world.until(|host| host.done == [attempt]).await;
    assert_eq!(world.node.lock().host.payloads, [Bytes::from_static(br#"{"prompt":"x"}"#)]);
    world.end().await;
}

// CLOUD-2631
// CLOUD-2652
#[tokio::test]
async fn a_link_that_is_cut_goes_on_where_the_log_stands() {
    let mut world = World::new().await;
    world.node.lock().host.shown = 2;
    let (_, stream) = world.dispatch(b"{}");
    assert!(matches!(world.event().await, Event::Accepted { .. }));
    assert!(matches!(world.event().await, Event::Started { .. }));
    world.node.lock().cut();
    world.node.lock().show(9);
    assert_eq!(world.ended().await, (HowEnded::Finished, Some(8), TOKENS));
    let text = text(&stream);
    let places: Vec<_> = (0..=TOKENS).map(|n| text.find(&format!(",\"i\":{n}}}"))).collect();
    assert!(places.is_sorted() && places[0].is_some(), "{text}");
    assert_eq!(text.matches("event: token").count(), 4);
    let table = Arc::clone(&world.relays.link.links().unwrap().table);
    assert_eq!(table.resumes(), 1);
    world.end().await;
}

// CLOUD-2628
#[tokio::test]
async fn an_attempt_that_is_closed_is_stopped_at_its_node() {
    let mut world = World::new().await;
    world.node.lock().host.shown = 1;
    let (attempt, _) = world.dispatch(b"{}");
    assert!(matches!(world.event().await, Event::Accepted { .. }));
    assert!(matches!(world.event().await, Event::Started { .. }));
    world.closing.closed.cancel();
    world.until(|host| host.stopped == [attempt]).await;
    world.end().await;
}

// CLOUD-2605
#[tokio::test]
async fn a_large_payload_goes_alone_and_as_it_came() {
    let mut world = World::new().await;
    world.node.lock().host.shown = 9;
    let payload = format!("{{\"prompt\":\"{}\"}}", "x".repeat(300_000));
    world.dispatch(payload.as_bytes());
    assert!(matches!(world.event().await, Event::Accepted { .. }));
    assert!(matches!(world.event().await, Event::Started { .. }));
    assert_eq!(world.ended().await.0, HowEnded::Finished);
    assert_eq!(world.node.lock().host.payloads, [Bytes::from(payload.into_bytes())]);
    world.end().await;
}

// CLOUD-2657
#[tokio::test]
async fn what_waits_for_a_link_that_never_says_hello_goes_by_a_call_of_its_own() {
    let mut world = World::without_link().await;
    let (_, stream) = world.dispatch(br#"{"model_ref":"m","prompt":"x"}"#);
    assert!(matches!(world.event().await, Event::Accepted { report_seq: 3, .. }));
    assert!(matches!(world.event().await, Event::Started { .. }));
    assert_eq!(world.ended().await, (HowEnded::Finished, Some(9), 1));
    assert_eq!(text(&stream).matches("event: token").count(), 1);
    world.end().await;
}
