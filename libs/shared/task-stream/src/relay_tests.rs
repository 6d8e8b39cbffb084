//! What a relay writes, asks for and ends with, whatever its node sends.

use pool_registry_types::{ErrorCode, NodeId, PoolId};
use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::log::TaskLog;

#[path = "relay_link_tests.rs"]
mod links;
#[path = "relay_resume_tests.rs"]
mod resumes;

const LOG: LogId = LogId(Uuid::from_u128(9));
const ATTEMPT: AttemptId = AttemptId(Uuid::from_u128(1));

fn at(millis: u64) -> Moment {
    Moment::from_millis(millis)
}

fn assignment(first_index: u64) -> Assignment {
    Assignment {
        task_id: TaskId(Uuid::from_u128(1)),
        attempt: ATTEMPT,
        log: LOG,
        pool: PoolKey::new(NodeId::new("n0").unwrap(), PoolId::new("pool-0").unwrap()),
        first_index,
        attempt_number: 1,
        queue_wait_ms: 5,
        warm_replica: None,
        keeps_ids: true,
        deadlines: AttemptDeadlines {
            acceptance: Duration::from_secs(5),
            first_token: Duration::from_secs(60),
            token_idle: Duration::from_secs(20),
            silence: Duration::from_secs(10),
        },
        task_deadline: None,
        stops_overdue: true,
    }
}

fn replica() -> ReplicaId {
    ReplicaId::new("r0").unwrap()
}

fn event(event: &str, index: u64) -> Vec<u8> {
    let mut out = Vec::new();
    write_frame(&mut out, Some((&LOG, index)), event, &format!("{{\"t\":\"x\",\"i\":{index}}}"));
    out
}

fn token(index: u64) -> Vec<u8> {
    event("token", index)
}

/// A relay, its log, and the actions so far but for the arming of timers.
struct Bench {
    relay: Relay,
    log: TaskLog,
    done: Vec<Action>,
    writes: usize,
}

impl Bench {
    fn new(first_index: u64) -> Self {
        let mut log = TaskLog::new(LOG);
        for n in 0..first_index {
            let before = AttemptId(Uuid::from_u128(99));
            if n == 0 {
                log.open(before);
            }
            log.append(before, Segment::frame(n, token(n).into())).unwrap();
            log.keep_ids(n, n + 1, &[u32::try_from(n).unwrap()]);
            if n + 1 == first_index {
                log.fence(before);
            }
        }
        log.open(ATTEMPT);
        Self { relay: Relay::new(at(0), assignment(first_index)), log, done: Vec::new(), writes: 0 }
    }

    /// One whose attempt goes by its node's link.
    fn linked() -> Self {
        let bench = Self::new(0);
        Self { relay: Relay::linked(at(0), assignment(0)), ..bench }
    }

    fn accepted(first_index: u64) -> Self {
        let mut bench = Self::new(first_index);
        bench.relay.accepted(at(1), replica(), 7);
        bench.flush(1);
        bench.done.clear();
        bench
    }

    fn flush(&mut self, now: u64) {
        let (log, writes) = (&mut self.log, &mut self.writes);
        self.relay.flush(at(now), |staged| {
            *writes += usize::from(staged.has_frames());
            staged.append_to(log)
        });
        self.collect();
    }

    fn collect(&mut self) {
        let actions = std::iter::from_fn(|| self.relay.next_action());
        self.done.extend(actions.filter(|action| !matches!(action, Action::Arm(_))));
    }

    fn take(&mut self, now: u64, bytes: &[u8]) {
        self.relay.chunk(at(now), bytes);
        self.flush(now);
    }

    fn read(&self, index: u64) -> String {
        String::from_utf8(self.log.read_from(index, usize::MAX).into_bytes().to_vec()).unwrap()
    }
}

fn ended(how: HowEnded) -> Action {
    Action::Ended { how, final_report: None }
}

#[test]
fn a_stream_is_carried_into_its_log_and_ends_with_the_nodes_last_report_number() {
    let mut bench = Bench::new(0);
    bench.relay.accepted(at(1), replica(), 7);
    bench.flush(1);
    bench.take(2, &token(0));
    bench.take(3, &[token(1), event("end", 2), b": report-seq 12 and more\n\n".to_vec()].concat());
    assert_eq!(
        bench.done,
        [
            Action::Accepted { replica_id: replica(), report_seq: 7 },
            Action::Started,
            Action::Ended { how: HowEnded::Finished, final_report: Some(12) },
        ]
    );
    let text = bench.read(0);
    // CLOUD-3036
    assert!(text.starts_with("event: started\ndata: {\"task_id\":\"00000000-0000-0000-0000-000000000001\",\"queue_wait_ms\":5,\"node_id\":\"n0\""), "{text}");
    let frames = [token(0), token(1), event("end", 2)].concat();
    assert!(text.as_bytes().ends_with(&frames), "{text}");
    assert!(bench.log.is_finished());
}

// CLOUD-1605
#[test]
fn frames_that_were_taken_are_dropped_and_one_beyond_the_next_is_a_gap() {
    let mut bench = Bench::accepted(2);
    // One that lies wholly before, then one that straddles.
    bench.take(2, &[token(0), token(1)].concat());
    assert_eq!((bench.log.next_index(), bench.writes, bench.done.len()), (2, 0, 0));
    bench.take(3, &[token(1), token(2), token(3)].concat());
    assert_eq!(bench.log.next_index(), 4);
    bench.take(4, &[token(2), token(3), token(4)].concat());
    assert!(bench.read(4) == String::from_utf8(token(4)).unwrap());
    bench.take(5, &[token(5), token(7)].concat());
    assert_eq!(bench.log.next_index(), 6, "what came before the gap is kept");
    let gap = HowEnded::Broken("frame 7 came where 6 was next".into());
    assert_eq!(bench.done, [Action::Started, Action::Stop, ended(gap)]);
}

// CLOUD-1534
#[test]
fn the_ids_of_tokens_come_with_their_frames_and_once() {
    let mut bench = Bench::accepted(1);
    bench.take(2, b": token-ids 3 7,8\n\n");
    assert_eq!(bench.writes, 0, "they wait for their frame");
    bench.take(3, &token(1));
    bench.take(4, &[b": token-ids 3 7,8\n\n".to_vec(), token(1)].concat());
    bench.take(5, &[b": token-ids 4 9\n\n".to_vec(), token(2)].concat());
    assert_eq!(bench.log.token_ids().all(3), Some([0, 7, 8, 9].as_slice()));
    bench.take(6, &token(3));
    assert_eq!(bench.log.token_ids().all(4), None, "one frame has not said it");
}

// CLOUD-1612
#[test]
fn what_is_not_for_readers_writes_nothing_and_wakes_nobody() {
    let mut bench = Bench::accepted(0);
    bench.take(2, b": ka\n\n: works\n\nevent: newer\ndata: {}\n\nid: half a fr");
    assert_eq!((bench.writes, bench.log.next_index(), bench.done.len()), (0, 0, 0));
    let mut bench = Bench::accepted(0);
    bench.take(1_500, b": thought\n\n: thought\n\n");
    assert_eq!((bench.log.unlogged(), bench.done.as_slice()), (2, [Action::Alive].as_slice()));
    assert_eq!(bench.writes, 0);
}

// CLOUD-1611
#[test]
fn what_arrives_together_is_one_segment_and_one_write() {
    let mut bench = Bench::accepted(0);
    bench.take(2, &token(0));
    let bytes: Vec<u8> = (1..50).flat_map(token).collect();
    for piece in bytes.chunks(37) {
        bench.relay.chunk(at(3), piece);
    }
    bench.flush(3);
    assert_eq!((bench.writes, bench.log.next_index()), (2, 50));
    assert!(bench.log.len_bytes() < bytes.len() + 1_000, "{}", bench.log.len_bytes());
}

// CLOUD-1610
#[test]
fn every_end_that_is_not_the_nodes_own_says_stop_first() {
    let stopped = |bench: &Bench| {
        let [.., stop, Action::Ended { how, .. }] = bench.done.as_slice() else {
            panic!("no end: {:?}", bench.done)
        };
        assert_eq!(*stop, Action::Stop);
        how.clone()
    };
    let timed_out = |now: u64, bench: &mut Bench| {
        bench.relay.timer(at(now));
        bench.collect();
        stopped(bench)
    };
    assert_eq!(timed_out(5_000, &mut Bench::new(0)), HowEnded::TimedOut(Overdue::Acceptance));
    assert_eq!(timed_out(10_001, &mut Bench::accepted(0)), HowEnded::TimedOut(Overdue::Silence));
    let mut bench = Bench::accepted(0);
    bench.take(59_999, b": ka\n\n");
    assert_eq!(timed_out(60_000, &mut bench), HowEnded::TimedOut(Overdue::FirstToken));
    let mut bench = Bench::accepted(0);
    bench.take(2, &token(0));
    for second in 1..20 {
        bench.take(second * 1_000, b": ka\n\n");
    }
    // A stream that never pauses never lets the timer ring.
    bench.take(20_002, b": ka\n\n");
    assert_eq!(stopped(&bench), HowEnded::TimedOut(Overdue::TokenIdle));
    for bad in [
        "id: x:1\nevent: token\ndata: {}\n\n",
        "event: error\ndata: {\n\n",
        "event: token\ndata: {}\n\n",
        ": report-seq 3\n\n",
    ] {
        let mut bench = Bench::accepted(0);
        bench.take(2, &[token(0), bad.as_bytes().to_vec()].concat());
        if !matches!(stopped(&bench), HowEnded::Broken(_)) || bench.log.next_index() != 1 {
            panic!("{bad:?}: {:?}", bench.done);
        }
    }
    let mut bench = Bench::accepted(0);
    bench.log.fence(ATTEMPT);
    bench.log.open(AttemptId(Uuid::from_u128(2)));
    bench.take(2, &token(0));
    assert_eq!(stopped(&bench), HowEnded::Closed);
    let mut bench = Bench::accepted(0);
    bench.log.append(ATTEMPT, Segment::frame(0, vec![b'x'; crate::MAX_LOG_BYTES - 10].into())).unwrap();
    bench.relay.reading.taken = 1;
    bench.take(2, &event("end", 1));
    assert_eq!(stopped(&bench), HowEnded::TooLong);
    type Ends = [(fn(&mut Relay), HowEnded); 4];
    let ends: Ends = [
        (|relay| relay.close(), HowEnded::Closed),
        (|relay| relay.failed("a panic".into()), HowEnded::OwnDefect("a panic".into())),
        (|relay| relay.closed("reset".into()), HowEnded::Broken("reset".into())),
        (|relay| relay.not_accepted(HowEnded::NoAnswer("reset".into())), HowEnded::NoAnswer("reset".into())),
    ];
    for (end, how) in ends {
        let mut bench = Bench::accepted(0);
        end(&mut bench.relay);
        bench.flush(2);
        assert_eq!(stopped(&bench), how);
    }
}

// CLOUD-1610
#[test]
fn the_nodes_own_end_holds_whatever_follows_it_and_stops_nothing() {
    let error = ErrorBody::new(ErrorCode::WorkerReset, "the engine died");
    let frame = format!("event: error\ndata: {}\n\n", serde_json::to_string(&error).unwrap());
    for (last, how) in
        [(event("end", 0), HowEnded::Finished), (frame.into_bytes(), HowEnded::NodeError(error.clone()))]
    {
        for follow in ["", "data: more\n\n"] {
            let mut bench = Bench::accepted(0);
            bench.relay.chunk(at(2), &[last.clone(), follow.into()].concat());
            bench.relay.closed("reset".into());
            bench.flush(2);
            assert_eq!(bench.done, [ended(how.clone())], "{follow}");
        }
    }
    let mut bench = Bench::new(0);
    bench.relay.not_accepted(HowEnded::Refused(error.clone()));
    bench.collect();
    assert_eq!(bench.done, [ended(HowEnded::Refused(error))]);
}

// CLOUD-1540
#[test]
fn the_timer_is_armed_sooner_where_something_is_due_sooner_and_a_token_leaves_it_alone() {
    let armed = |relay: &mut Relay| {
        let actions: Vec<Action> = std::iter::from_fn(|| relay.next_action()).collect();
        actions.into_iter().filter(|action| !matches!(action, Action::Accepted { .. })).collect::<Vec<_>>()
    };
    let mut bench = Bench::new(0);
    assert_eq!(armed(&mut bench.relay), [Action::Arm(at(5_000))]);
    bench.relay.accepted(at(1_000), replica(), 7);
    assert_eq!(armed(&mut bench.relay), [Action::Arm(at(4_000))]);
    bench.relay.timer(at(4_000));
    assert_eq!(armed(&mut bench.relay), [Action::Quiet, Action::Arm(at(11_000))]);
    bench.relay.chunk(at(5_000), &token(0));
    bench.relay.flush(at(5_000), |staged| staged.append_to(&mut bench.log));
    assert_eq!(armed(&mut bench.relay), [Action::Heard, Action::Started, Action::Arm(at(8_000))]);
    bench.relay.chunk(at(5_500), &token(1));
    bench.relay.flush(at(5_500), |staged| staged.append_to(&mut bench.log));
    assert_eq!(armed(&mut bench.relay), []);
    bench.relay.timer(at(8_000));
    assert_eq!(armed(&mut bench.relay), [Action::Arm(at(8_500))]);
}

// CLOUD-1610
#[test]
fn an_end_that_was_read_and_is_not_in_the_log_is_none() {
    let mut bench = Bench::accepted(0);
    bench.relay.chunk(at(2), &token(0));
    bench.relay.chunk(at(2), &event("end", 1));
    bench.relay.failed("a panic".into());
    bench.collect();
    assert_eq!(bench.done, [Action::Stop, ended(HowEnded::OwnDefect("a panic".into()))]);
    assert!(!bench.log.is_finished());
    // The node's own error was read: it holds whether or not anything is in the log.
    let body = ErrorBody::new(ErrorCode::WorkerReset, "x");
    let frame = format!("event: error\ndata: {}\n\n", serde_json::to_string(&body).unwrap());
    let mut bench = Bench::accepted(0);
    bench.relay.chunk(at(2), frame.as_bytes());
    bench.relay.failed("a panic".into());
    bench.collect();
    assert_eq!(bench.done, [ended(HowEnded::NodeError(body))]);
}

// CLOUD-1610
#[test]
fn an_end_that_readers_have_holds_where_the_attempt_is_closed_after_it_and_an_error_does_not() {
    // As the property below found it, which lets nodes begin before they accept.
    let mut bench = Bench::new(0);
    bench.relay.chunk(at(1), &token(0));
    bench.relay.chunk(at(1), &event("end", 1));
    bench.flush(1);
    assert!(bench.log.is_finished());
    bench.relay.close();
    bench.collect();
    assert_eq!(bench.done, [Action::Started, ended(HowEnded::Finished)]);
    // Read, and not in the log yet.
    let mut bench = Bench::accepted(0);
    bench.relay.chunk(at(2), &event("end", 0));
    bench.relay.close();
    bench.collect();
    assert_eq!(bench.done, [Action::Stop, ended(HowEnded::Closed)]);
    let body = serde_json::to_string(&ErrorBody::new(ErrorCode::WorkerReset, "x")).unwrap();
    let mut bench = Bench::accepted(0);
    bench.take(2, format!("event: error\ndata: {body}\n\n").as_bytes());
    bench.relay.close();
    bench.collect();
    assert_eq!(bench.done, [Action::Stop, ended(HowEnded::Closed)]);
}

#[derive(Debug, Clone)]
enum Input {
    Accepted,
    NotAccepted(HowEnded),
    Chunk(Vec<u8>),
    Flush,
    Closed,
    Resume,
    Timer,
    Close,
    Failed,
}

fn inputs() -> impl Strategy<Value = Input> {
    let body = || ErrorBody::new(ErrorCode::WorkerReset, "x");
    let refused = prop_oneof![
        Just(HowEnded::Refused(body())),
        Just(HowEnded::NeverSent("x".into())),
        Just(HowEnded::NoAnswer("x".into())),
        Just(HowEnded::Broken("x".into())),
    ];
    prop_oneof![
        1 => Just(Input::Accepted),
        1 => refused.prop_map(Input::NotAccepted),
        8 => (0_u64..6).prop_map(|n| Input::Chunk(token(n))),
        1 => (0_u64..6).prop_map(|n| Input::Chunk(event("end", n))),
        1 => prop::collection::vec(any::<u8>(), 0..30).prop_map(Input::Chunk),
        1 => Just(Input::Chunk(format!("event: error\ndata: {}\n\n", serde_json::to_string(&body()).unwrap()).into())),
        1 => Just(Input::Chunk(b": report-seq 4\n\n".to_vec())),
        4 => Just(Input::Flush),
        1 => Just(Input::Closed),
        1 => Just(Input::Resume),
        1 => Just(Input::Timer),
        1 => Just(Input::Close),
        1 => Just(Input::Failed),
    ]
}

proptest! {
    // CLOUD-1605
    // CLOUD-1610
    #[test]
    fn whatever_comes_an_attempt_ends_once_and_is_stopped_where_it_may_run(
        inputs in prop::collection::vec((inputs(), 0_u64..4_000), 0..40),
    ) {
        let mut bench = Bench::new(0);
        let mut now = 0;
        for (input, later) in inputs {
            now += later;
            match input {
                Input::Accepted => bench.relay.accepted(at(now), replica(), 1),
                Input::NotAccepted(how) => bench.relay.not_accepted(how),
                Input::Chunk(bytes) => bench.relay.chunk(at(now), &bytes),
                Input::Flush => bench.flush(now),
                Input::Closed => bench.relay.closed("reset".into()),
                Input::Resume => {
                    let from = bench.relay.resume();
                    prop_assert!(from.is_none_or(|from| from >= bench.log.next_index()), "{:?}", from);
                }
                Input::Timer => bench.relay.timer(at(now)),
                Input::Close => bench.relay.close(),
                Input::Failed => bench.relay.failed("x".into()),
            }
            bench.collect();
        }
        let ends: Vec<usize> = (0..bench.done.len())
            .filter(|n| matches!(bench.done[*n], Action::Ended { .. })).collect();
        prop_assert!(ends.len() <= 1);
        if let [end] = ends[..] {
            prop_assert_eq!(end + 1, bench.done.len(), "nothing follows the end");
            let Action::Ended { how, .. } = &bench.done[end] else { unreachable!() };
            let stopped = bench.done[..end].contains(&Action::Stop);
            // By the node's own word, or with a stop: named one by one, whatever the code says of them.
            let by_the_node = matches!(
                how,
                HowEnded::Finished | HowEnded::Refused(_) | HowEnded::NeverSent(_) | HowEnded::NodeError(_)
            );
            prop_assert_eq!(stopped, !by_the_node, "{:?}", how);
            prop_assert_eq!(bench.log.is_finished(), *how == HowEnded::Finished, "{:?}", how);
        }
        let expected: Vec<u8> = (0..bench.log.next_index()).flat_map(token).collect();
        let text = bench.read(0);
        if let Some(tokens) = text.find("id: ").filter(|_| !bench.log.is_finished()) {
            prop_assert_eq!(&text.as_bytes()[tokens..], expected.as_slice());
        }
    }
}

// CLOUD-2721
#[test]
fn of_what_a_node_says_of_an_end_no_more_is_told_than_is_kept() {
    let long = "€".repeat(300_000);
    let message_bytes = |bench: &Bench| match bench.done.last() {
        Some(Action::Ended { how: HowEnded::NodeError(error) | HowEnded::Refused(error), .. }) => {
            error.message.len()
        }
        Some(Action::Ended { how: HowEnded::Broken(why), .. }) => why.len(),
        other => panic!("{other:?}"),
    };
    let mut bench = Bench::accepted(0);
    let mut frame = Vec::new();
    let error = ErrorBody::new(ErrorCode::WorkerReset, long.clone());
    write_frame(&mut frame, None, "error", &serde_json::to_string(&error).unwrap());
    bench.take(2, &[frame, b": report-seq 3\n\n".to_vec()].concat());
    assert_eq!(message_bytes(&bench), 1_023);
    // An error of ours may quote theirs.
    let mut bench = Bench::accepted(0);
    let mut frame = Vec::new();
    write_frame(
        &mut frame,
        None,
        "error",
        &format!("{{\"code\":\"INTERNAL\",\"message\":\"\",\"retriable\":\"{long}\"}}"),
    );
    bench.take(2, &frame);
    assert!(message_bytes(&bench) <= pool_registry_types::limits::MAX_MESSAGE_BYTES);
    let mut bench = Bench::linked();
    bench.relay.not_accepted(HowEnded::refused(ErrorBody::new(ErrorCode::PoolUnready, long)));
    bench.collect();
    assert_eq!(message_bytes(&bench), 1_023);
}
