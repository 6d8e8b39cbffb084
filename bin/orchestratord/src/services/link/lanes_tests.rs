//! What lanes do for their readers, for the control core, and in their own order.

use attempt_link::content::{Acceptance, Hello};
use attempt_link::records::{Kind, RecordHead};
use attempt_link::wire::{ControlAnswer, StartFacts, StartSpec};
use pool_registry_types::node::{Capabilities, Intent, RegisterRequest};
use pool_registry_types::task::Workload;
use pool_registry_types::{ErrorBody, ErrorCode, LogId, MachineId, ModelRef, PoolId, ReplicaId, TaskId};
use task_stream::{Payload, PayloadFormat};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::*;
use crate::services::link::links::Links;

const BOOT: BootId = BootId(Uuid::from_u128(1));

fn at(millis: u64) -> Moment {
    Moment::from_millis(millis)
}

fn node() -> NodeId {
    NodeId::new("a").unwrap()
}

fn id(n: u128) -> AttemptId {
    AttemptId(Uuid::from_u128(n))
}

fn registers(features: &[&str]) -> RegisterRequest {
    RegisterRequest {
        node_id: node(),
        machine_id: MachineId::new("m").unwrap(),
        boot_id: BOOT,
        address: "http://a".into(),
        version: "0".into(),
        intent: Intent::Serving,
        labels: std::collections::BTreeMap::new(),
        pools: vec![],
        capabilities: Capabilities::default(),
        features: features.iter().map(ToString::to_string).collect(),
    }
}

fn start(n: u128) -> Start {
    let facts = StartFacts {
        number: 0,
        pool_id: PoolId::new("p").unwrap(),
        attempt_id: id(n),
        task_id: TaskId(Uuid::from_u128(n)),
        log_id: LogId(Uuid::from_u128(n)),
        first_index: 0,
        deadline_ms: None,
        replica_hint: None,
        resume: None,
        spec: StartSpec {
            model_ref: ModelRef::new("m").unwrap(),
            workload: Workload::Completion,
            reasoning: None,
            max_tokens: None,
        },
        payload_format: PayloadFormat::Native,
        keep: true,
        traceparent: String::new(),
        correlation_id: String::new(),
        tracestate: String::new(),
        caller: None,
    };
    Start::new(facts, &Payload { format: PayloadFormat::Native, bytes: Bytes::from_static(b"{}") })
}

fn record(head: RecordHead, body: &[u8]) -> Bytes {
    let mut out = Vec::new();
    head.write(&mut out, body, 10 * 1024).unwrap();
    out.into()
}

/// Lanes with one node, and what they are shown by.
struct Bench {
    lanes: Lanes,
    links: Links,
}

impl Bench {
    fn new() -> Self {
        let (links, _) = Links::new(LifeId(Uuid::from_u128(9)), 1);
        links.registered(&registers(&["link"]));
        let mut lanes = Lanes::new(links.life, 0, Arc::clone(&links.table));
        lanes.registered(at(0), &node(), "http://a".into(), BOOT);
        Self { lanes, links }
    }

    /// One whose link is up.
    fn up() -> Self {
        let mut bench = Self::new();
        bench.hello(10);
        for post in bench.posts() {
            let answer = PostOutcome::Answered(ControlAnswer::default());
            bench.lanes.post_ended(at(10), &node(), post, answer, false);
        }
        bench.lanes.events.clear();
        bench
    }

    fn calls(&mut self) -> Vec<Call> {
        std::iter::from_fn(|| self.lanes.next_call()).collect()
    }

    fn posts(&mut self) -> Vec<PostId> {
        let calls = self.calls().into_iter();
        calls.filter_map(|call| if let Call::Post { id, .. } = call { Some(id) } else { None }).collect()
    }

    /// The last dial is answered.
    fn hello(&mut self, now: u64) {
        let dials = self.calls().into_iter();
        let n =
            dials.filter_map(|call| if let Call::Dial { query, .. } = call { Some(query.n) } else { None });
        let n = n.last().expect("it is dialled");
        let hello = Hello { node_id: node(), boot_id: BOOT, version: "0".into() };
        let hello = record(RecordHead::new(Kind::Hello, 0, 0, 0), &serde_json::to_vec(&hello).unwrap());
        self.lanes.received(at(now), &node(), n, hello);
    }

    fn start(&mut self, now: u64, n: u128) -> mpsc::Receiver<Action> {
        let (to, actions) = mpsc::channel(16);
        self.lanes.start(at(now), &node(), start(n), SinkOfLane::new(Arc::new(Recorder(to))));
        actions
    }

    /// What has been told to the core since the last time.
    fn reported(&mut self) -> Vec<Event> {
        self.lanes.events.drain(..).collect()
    }
}

/// Tells a test what a lane has brought.
#[derive(Debug)]
struct Recorder(mpsc::Sender<Action>);

impl AttemptSink for Recorder {
    fn take(&self, _: Moment, action: Action) -> bool {
        self.0.try_send(action).expect("the test has room for it");
        false
    }

    fn flush(&self, _: Moment) {}

    fn release(&self) {}
}

fn heard(actions: &mut mpsc::Receiver<Action>) -> Vec<Action> {
    std::iter::from_fn(|| actions.try_recv().ok()).collect()
}

fn link(state: LinkState, reason: Option<&str>) -> LinkView {
    LinkView { state, reason: reason.map(str::to_owned) }
}

fn links_reported(events: &[Event]) -> Vec<LinkView> {
    let link = |event: &Event| if let Event::Link { link, .. } = event { Some(link.clone()) } else { None };
    events.iter().filter_map(link).collect()
}

fn evidence(events: &[Event]) -> Vec<LinkEvidence> {
    let evidence = |event: &Event| match event {
        Event::LinkEvidence { evidence, .. } => Some(evidence.clone()),
        _ => None,
    };
    events.iter().filter_map(evidence).collect()
}

// CLOUD-2615
// CLOUD-2620
#[test]
fn an_attempt_is_sent_once_its_link_is_up_and_its_reader_hears_all_of_it() {
    let mut bench = Bench::new();
    let mut actions = bench.start(1, 7);
    bench.hello(10);
    let posts = bench.posts();
    assert_eq!(posts.len(), 2, "one names the link, and one has the start");
    bench.lanes.post_sent(at(11), &node(), posts[1]);
    let acceptance = Acceptance { replica_id: ReplicaId::new("r0").unwrap(), report_seq: 3 };
    let accepted = serde_json::to_vec(&acceptance).unwrap();
    bench.lanes.received(at(12), &node(), 1, record(RecordHead::new(Kind::Accepted, 1, 0, 0), &accepted));
    let frames = Bytes::from_static(b"data: x\n\n");
    bench.lanes.received(at(13), &node(), 1, record(RecordHead::new(Kind::Frames, 1, 0, 1), &frames));
    let end = br#"{"report_seq":4}"#;
    bench.lanes.received(at(14), &node(), 1, record(RecordHead::new(Kind::End, 1, 1, 0), end));
    let attempt = id(7);
    assert_eq!(
        heard(&mut actions),
        [
            Action::Sent { attempt },
            Action::Accepted { attempt, acceptance },
            Action::Frames { attempt, first: 0, count: 1, bytes: frames },
            Action::Ended { attempt, report_seq: 4 },
        ]
    );
    assert!(actions.is_closed(), "nothing more comes of it");
    let reported = bench.reported();
    assert_eq!(links_reported(&reported), [link(LinkState::Connecting, None), link(LinkState::Up, None)]);
}

// CLOUD-2664
#[test]
fn an_error_that_came_before_a_break_comes_again_with_the_end_behind_it() {
    let mut bench = Bench::up();
    let mut actions = bench.start(20, 7);
    let posts = bench.posts();
    bench.lanes.post_sent(at(21), &node(), posts[0]);
    let acceptance = Acceptance { replica_id: ReplicaId::new("r0").unwrap(), report_seq: 3 };
    let error = ErrorBody::new(ErrorCode::PayloadTooLarge, "too long");
    let sent = |kind, number, body: &[u8]| record(RecordHead::new(kind, number, 0, 0), body);
    let (accepted, failed) = (serde_json::to_vec(&acceptance).unwrap(), serde_json::to_vec(&error).unwrap());
    for (kind, body) in [(Kind::Accepted, &accepted), (Kind::Error, &failed)] {
        bench.lanes.received(at(22), &node(), 1, sent(kind, 1, body));
    }
    bench.lanes.closed(at(30), &node(), 1, ConnectionEnd::Broken, None, false);
    bench.lanes.timer(at(500));
    bench.hello(510);
    // The first one names the link.
    let number = (0..2).find_map(|_| {
        let mut number = None;
        for call in bench.calls() {
            let Call::Post { id, request: PostRequest::Control(body), .. } = call else { continue };
            number = number.or(body.resume.first().map(|resume| resume.number));
            let answer = PostOutcome::Answered(ControlAnswer::default());
            bench.lanes.post_ended(at(511), &node(), id, answer, false);
        }
        number
    });
    let number = number.unwrap();
    for (kind, body) in [(Kind::Accepted, &accepted), (Kind::Error, &failed)] {
        bench.lanes.received(at(520), &node(), 2, sent(kind, number, body));
    }
    bench.lanes.received(at(521), &node(), 2, sent(Kind::End, number, br#"{"report_seq":4}"#));
    let attempt = id(7);
    assert_eq!(
        heard(&mut actions),
        [
            Action::Sent { attempt },
            Action::Accepted { attempt, acceptance },
            Action::Error { attempt, error: error.clone() },
            Action::Restart { attempt, from: 0 },
            Action::Resumed { attempt },
            Action::Error { attempt, error },
            Action::Ended { attempt, report_seq: 4 },
        ]
    );
}

// CLOUD-2653
#[test]
fn what_was_not_sent_when_the_node_is_gone_ends_as_never_sent() {
    let mut bench = Bench::up();
    let mut sent = bench.start(20, 1);
    let posts = bench.posts();
    bench.lanes.post_sent(at(21), &node(), posts[0]);
    let mut waiting = bench.start(22, 2);
    bench.lanes.closed(at(30), &node(), 1, ConnectionEnd::Broken, None, false);
    bench.lanes.timer(at(500));
    bench.lanes.closed(at(501), &node(), 2, ConnectionEnd::Refused, None, false);
    assert_eq!(heard(&mut waiting), [Action::NeverSent { attempt: id(2) }]);
    assert_eq!(heard(&mut sent), [Action::Sent { attempt: id(1) }], "nobody knows what became of it");
    let reported = bench.reported();
    assert!(matches!(evidence(&reported)[..], [LinkEvidence::Quiet(_)]), "{reported:?}");
    let broke = link(LinkState::Interrupted, Some("its connection broke"));
    assert_eq!(links_reported(&reported), [broke]);
}

// CLOUD-2625
#[test]
fn a_start_whose_post_is_under_way_when_the_node_is_gone_may_have_arrived() {
    let mut bench = Bench::up();
    let mut under_way = bench.start(20, 1);
    assert_eq!(bench.posts().len(), 1, "and nobody has heard that it went");
    bench.lanes.closed(at(30), &node(), 1, ConnectionEnd::Broken, None, false);
    bench.lanes.timer(at(500));
    bench.lanes.closed(at(501), &node(), 2, ConnectionEnd::Refused, None, false);
    assert_eq!(heard(&mut under_way), []);
    assert!(matches!(evidence(&bench.reported())[..], [LinkEvidence::Quiet(_)]));
}

// CLOUD-1316
#[test]
fn what_we_lack_ourselves_is_evidence_against_no_node() {
    let mut bench = Bench::up();
    let _actions = bench.start(20, 1);
    let posts = bench.posts();
    bench.lanes.post_ended(at(21), &node(), posts[0], PostOutcome::NotSent, true);
    assert_eq!(evidence(&bench.reported()), []);
    bench.lanes.closed(at(30), &node(), 1, ConnectionEnd::Broken, None, false);
    bench.lanes.timer(at(500));
    bench.lanes.closed(at(501), &node(), 2, ConnectionEnd::Broken, None, true);
    bench.lanes.timer(at(3_100));
    assert_eq!(evidence(&bench.reported()), []);
    assert_eq!(bench.links.table.own_shortages(), 2);
    let mut bench = Bench::up();
    let _actions = bench.start(20, 1);
    let posts = bench.posts();
    bench.lanes.post_ended(at(21), &node(), posts[0], PostOutcome::NotSent, false);
    assert!(matches!(evidence(&bench.reported())[..], [LinkEvidence::CannotConnect(_)]));
}

// CLOUD-2777
#[test]
fn what_is_kept_of_a_record_that_is_not_whole_counts_until_its_link_is_over() {
    let mut bench = Bench::up();
    let _actions = bench.start(20, 1);
    let counted = Arc::clone(bench.links.table.parts_bytes());
    let bytes = || counted.load(Ordering::Relaxed);
    let head = RecordHead { more: true, ..RecordHead::new(Kind::Frames, 1, 0, 1) };
    let part = record(head, &[b'x'; 5_000]);
    bench.lanes.received(at(21), &node(), 1, part.clone());
    bench.lanes.received(at(22), &node(), 1, part);
    assert_eq!(bytes(), 10_000);
    bench.lanes.closed(at(26), &node(), 1, ConnectionEnd::Broken, None, false);
    assert_eq!(bytes(), 0);
}

// CLOUD-1314
// CLOUD-2656
#[test]
fn a_node_that_does_not_let_us_in_is_denied_by_its_dial_and_a_post_alone_ends_nothing() {
    let mut bench = Bench::up();
    let mut actions = bench.start(20, 1);
    let posts = bench.posts();
    bench.lanes.post_ended(at(21), &node(), posts[0], PostOutcome::Status(401), false);
    assert_eq!(heard(&mut actions), [Action::Restart { attempt: id(1), from: 0 }]);
    assert_eq!(evidence(&bench.reported()), [], "its link may be too old");
    let dials = bench.calls();
    assert!(dials.iter().any(|call| matches!(call, Call::Dial { query, .. } if query.n == 2)), "{dials:?}");
    bench.lanes.closed(at(22), &node(), 2, ConnectionEnd::Broken, Some(401), false);
    assert_eq!(heard(&mut actions), [Action::PostStatus { status: 401 }]);
    assert!(actions.is_closed());
    assert!(matches!(evidence(&bench.reported())[..], [LinkEvidence::Denied(_)]));
}

// CLOUD-2663
#[test]
fn a_start_that_a_node_may_have_had_before_it_let_us_in_no_more_had_no_answer_and_is_stopped() {
    let mut bench = Bench::up();
    let mut broken = bench.start(20, 1);
    let posts = bench.posts();
    bench.lanes.post_ended(at(21), &node(), posts[0], PostOutcome::Broken, false);
    bench.lanes.closed(at(30), &node(), 1, ConnectionEnd::Broken, None, false);
    heard(&mut broken);
    bench.lanes.timer(at(500));
    bench.lanes.closed(at(501), &node(), 2, ConnectionEnd::Broken, Some(401), false);
    assert_eq!(heard(&mut broken), [Action::Lost { attempt: id(1), reason: Lost::NotResumed }]);
    assert!(broken.is_closed());

    let mut bench = Bench::up();
    let mut under_way = bench.start(20, 1);
    let posts = bench.posts();
    bench.lanes.closed(at(30), &node(), 1, ConnectionEnd::Broken, None, false);
    bench.lanes.timer(at(500));
    bench.lanes.closed(at(501), &node(), 2, ConnectionEnd::Broken, Some(401), false);
    assert_eq!(heard(&mut under_way), [], "its POST will tell");
    bench.lanes.post_ended(at(510), &node(), posts[0], PostOutcome::Status(401), false);
    bench.lanes.timer(at(1_100));
    bench.lanes.closed(at(1_101), &node(), 3, ConnectionEnd::Broken, Some(401), false);
    let last = heard(&mut under_way).pop();
    assert_eq!(last, Some(Action::PostStatus { status: 401 }), "its node cannot have it");
    assert!(under_way.is_closed());
}

// CLOUD-2626
#[test]
fn starts_of_a_post_that_was_not_taken_know_its_status_and_are_asked_for() {
    let mut bench = Bench::up();
    let mut actions = bench.start(20, 1);
    let posts = bench.posts();
    bench.lanes.post_ended(at(21), &node(), posts[0], PostOutcome::Status(500), false);
    let attempt = id(1);
    let asked = [Action::PostStatus { status: 500 }, Action::Restart { attempt, from: 0 }];
    assert_eq!(heard(&mut actions), asked);
    let posts = bench.posts();
    let answer = ControlAnswer { unknown: vec![attempt], gone: vec![] };
    bench.lanes.post_ended(at(23), &node(), posts[0], PostOutcome::Answered(answer), false);
    assert_eq!(heard(&mut actions), [Action::Unknown { attempt, again: false }]);
}

// CLOUD-2657
#[test]
fn a_node_that_says_no_hello_is_served_without_a_link_until_it_registers_again() {
    let mut bench = Bench::new();
    let mut actions = bench.start(1, 1);
    bench.lanes.timer(at(1_000));
    assert!(bench.calls().iter().any(|call| matches!(call, Call::ProbeLive { .. })));
    bench.lanes.live_answered(at(1_010), &node(), BootId(Uuid::from_u128(2)));
    bench.lanes.live_answered(at(1_020), &node(), BOOT);
    assert!(bench.links.lane(&node(), id(1)).is_some());
    let mut now = 1_020;
    while heard(&mut actions).is_empty() {
        now = bench.lanes.next_deadline().as_millis().max(now);
        assert!(now < 4_000, "it waits for more than 3 s");
        bench.lanes.timer(at(now));
    }
    assert!(bench.links.lane(&node(), id(1)).is_none());
    let reported = bench.reported();
    assert_eq!(evidence(&reported), [], "it lives");
    let shown = links_reported(&reported);
    assert_eq!(shown.last(), Some(&link(LinkState::None, Some(SAYS_NO_HELLO))));
    assert_eq!(bench.links.registered(&registers(&["link"])), None, "its lane tells");
    assert!(bench.links.lane(&node(), id(1)).is_some());
    // To one that has none, each attempt is a call of its own from its registration on.
    let without = bench.links.registered(&registers(&[])).expect("no lane tells");
    assert_eq!((without.state, without.reason.is_some()), (LinkState::None, true));
    assert!(bench.links.lane(&node(), id(1)).is_none() && bench.links.table.states().is_empty());
}

#[test]
fn a_node_that_is_not_known_any_more_keeps_its_link_until_its_attempts_have_ended() {
    let mut bench = Bench::up();
    let mut actions = bench.start(20, 1);
    bench.calls();
    bench.lanes.gone(at(30), &node());
    assert!(!bench.calls().iter().any(|call| matches!(call, Call::Close { .. })));
    bench.lanes.cancel(at(40), &node(), id(1));
    assert!(bench.calls().contains(&Call::Close { node_id: node(), n: 1 }));
    assert!(heard(&mut actions).is_empty() && actions.is_closed());
    // It comes back in the same boot: no number of its lane was used before.
    bench.lanes.registered(at(50), &node(), "http://b".into(), BOOT);
    let dials: Vec<Call> = bench.calls();
    assert!(
        matches!(&dials[..], [Call::Dial { query, address, .. }] if query.n == 2 && address == "http://b"),
        "{dials:?}"
    );
}

// CLOUD-2658
#[test]
fn after_a_stall_what_has_arrived_is_read_before_anything_is_judged() {
    let mut bench = Bench::up();
    let _actions = bench.start(20, 1);
    let posts = bench.posts();
    bench.lanes.post_sent(at(21), &node(), posts[0]);
    bench.lanes.timer(at(20_000));
    assert_eq!(bench.lanes.next_deadline(), at(20_020));
    let alive = record(RecordHead::new(Kind::Alive, 0, 0, 0), b"");
    bench.lanes.received(at(20_010), &node(), 1, alive);
    bench.lanes.timer(at(20_020));
    assert_eq!(links_reported(&bench.reported()), [], "the link is not interrupted");
    bench.lanes.timer(bench.lanes.next_deadline());
    assert!(!bench.lanes.calls.is_empty(), "its overdue POST is given up");
}

#[test]
fn interruptions_and_what_nobody_waits_for_are_counted() {
    let mut bench = Bench::up();
    bench.lanes.received(at(20), &node(), 1, record(RecordHead::new(Kind::Frames, 77, 0, 1), b"x"));
    bench.lanes.closed(at(1_000), &node(), 1, ConnectionEnd::Broken, None, false);
    bench.hello(4_500);
    let table = &bench.links.table;
    assert_eq!((table.dropped_records(), table.resumes(), table.interrupted_seconds()), (1, 1, 3));
    assert_eq!(table.states(), [(node(), LinkState::Up)]);
}
