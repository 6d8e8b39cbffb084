//! Answers that are passed on as they came: when what of them is shown.

use std::time::Duration;

use pool_registry_types::{AttemptId, ErrorBody, ErrorCode, LogId, PoolId, PoolKey, ReplicaId, TaskId};
use uuid::Uuid;

use super::*;
use crate::log::TaskLog;
use crate::relay::Assignment;
use crate::watch::AttemptDeadlines;

fn attempt(n: u128) -> AttemptId {
    AttemptId(Uuid::from_u128(n))
}

fn at(millis: u64) -> Moment {
    Moment::from_millis(millis)
}

struct Bench {
    relay: Relay,
    log: TaskLog,
    attempt: AttemptId,
}

impl Bench {
    fn new(log: TaskLog, n: u128) -> Self {
        Self::within(log, n, &HoldBudget::new(usize::MAX))
    }

    /// One of those that hold back so much together.
    fn within(log: TaskLog, n: u128, room: &Arc<HoldBudget>) -> Self {
        let long = Duration::from_secs(60);
        let assignment = Assignment {
            task_id: TaskId(Uuid::from_u128(1)),
            keeps_ids: false,
            attempt: attempt(n),
            log: log.id(),
            pool: PoolKey::new(NodeId::new("n0").unwrap(), PoolId::new("p").unwrap()),
            first_index: 0,
            attempt_number: 1,
            queue_wait_ms: 0,
            warm_replica: None,
            deadlines: AttemptDeadlines {
                acceptance: long,
                first_token: long,
                token_idle: long,
                silence: long,
            },
            task_deadline: None,
            stops_overdue: true,
        };
        let relay = Relay::linked(at(0), assignment).passing_on(Arc::clone(room));
        let mut bench = Self { relay, log, attempt: attempt(n) };
        bench.log.open(bench.attempt);
        bench.relay.accepted(at(1), ReplicaId::new("r0").unwrap(), 1);
        bench
    }

    fn fresh() -> Self {
        Self::new(TaskLog::new(LogId(Uuid::from_u128(9))), 1)
    }

    fn head(&mut self, kind: &str) {
        let headers = vec![("content-type".to_owned(), kind.to_owned())];
        self.relay.head(AnswerHead { status: 200, headers });
    }

    fn takes(&mut self, first: u64, count: u32, bytes: &str) -> &mut Self {
        self.relay.frames(at(2), first, count, &Bytes::copy_from_slice(bytes.as_bytes()));
        self.flush()
    }

    fn flush(&mut self) -> &mut Self {
        let log = &mut self.log;
        self.relay.flush(at(2), |staged| staged.append_to(log));
        self
    }

    fn shown(&self) -> String {
        String::from_utf8(self.log.read_from(0, usize::MAX).into_bytes().to_vec()).unwrap()
    }

    fn done(&mut self) -> Vec<Action> {
        let actions = std::iter::from_fn(|| self.relay.next_action());
        actions.filter(|action| !matches!(action, Action::Arm(_) | Action::Accepted { .. })).collect()
    }

    fn end(&mut self) -> Option<HowEnded> {
        self.relay.over(7);
        self.flush();
        self.done().into_iter().find_map(|action| match action {
            Action::Ended { how, .. } => Some(how),
            _ => None,
        })
    }
}

// CLOUD-2833
#[test]
fn a_whole_answer_is_shown_once_it_is_whole_and_one_that_is_cut_leaves_no_trace() {
    let mut bench = Bench::fresh();
    bench.head("application/json");
    bench.takes(0, 5, "{\"a\":").takes(5, 2, "1}");
    assert_eq!((bench.shown().as_str(), bench.log.head()), ("", None));
    assert_eq!(bench.done(), []);
    let error = ErrorBody::new(ErrorCode::WorkerReset, "the engine died");
    bench.relay.error(error.clone());
    assert_eq!(bench.end(), Some(HowEnded::NodeError(error)));
    let fence = bench.log.fence(bench.attempt);
    assert_eq!((fence.tokens_written, fence.finished), (0, false));

    let mut again = Bench::new(bench.log, 2);
    again.head("application/json");
    again.takes(0, 7, "{\"a\":1}");
    assert_eq!(again.end(), Some(HowEnded::Finished));
    assert_eq!((again.shown().as_str(), again.log.is_finished()), ("{\"a\":1}", true));
    assert_eq!(again.log.head().unwrap().node_id.as_str(), "n0");
}

// CLOUD-2833
#[test]
fn an_answer_without_a_body_ends_well_and_one_without_a_head_does_not() {
    let mut bench = Bench::fresh();
    bench.head("text/plain");
    assert_eq!(bench.end(), Some(HowEnded::Finished));
    assert!(bench.log.is_finished() && bench.log.head().is_some());
    let mut bench = Bench::fresh();
    assert!(matches!(bench.end(), Some(HowEnded::Broken(_))));
    let mut bench = Bench::fresh();
    bench.takes(0, 1, "x");
    assert!(matches!(bench.done().last(), Some(Action::Ended { how: HowEnded::Broken(_), .. })));
}

// CLOUD-2833
#[test]
fn what_is_longer_than_is_held_is_shown_as_it_comes() {
    let mut bench = Bench::fresh();
    bench.head("application/json");
    let piece = "x".repeat(MOST_HELD / 2);
    let len = u32::try_from(piece.len()).unwrap();
    bench.takes(0, len, &piece).takes(len.into(), len, &piece);
    assert!(bench.shown().is_empty());
    bench.log = TaskLog::bounded(bench.log.id(), 3 * MOST_HELD);
    bench.log.open(bench.attempt);
    bench.takes(u64::from(len) * 2, 1, "y");
    assert_eq!(bench.shown().len(), 2 * piece.len() + 1);
    assert_eq!(bench.done(), [Action::Started]);
}

// CLOUD-2857
#[test]
fn answers_hold_back_so_much_together_and_one_without_room_is_shown_as_it_comes() {
    let room = HoldBudget::new(10);
    let bench = |n: u128| {
        let mut bench = Bench::within(TaskLog::new(LogId(Uuid::from_u128(n))), n, &room);
        bench.head("application/json");
        bench
    };
    let (mut first, mut second) = (bench(1), bench(2));
    first.takes(0, 6, "{\"a\":1");
    second.takes(0, 4, "{\"b\"");
    assert_eq!((room.held(), first.shown(), second.shown()), (10, String::new(), String::new()));
    second.takes(4, 1, ":");
    assert_eq!((second.shown().as_str(), room.held()), ("{\"b\":", 6), "it counts with its log now");
    // There is room again, and what is shown goes on being shown.
    second.takes(5, 2, "2}");
    assert_eq!((second.shown().as_str(), room.held()), ("{\"b\":2}", 6));
    first.takes(6, 1, "}");
    assert_eq!((first.end(), room.held()), (Some(HowEnded::Finished), 0));
    assert_eq!(first.shown(), "{\"a\":1}");
    let mut cut = bench(3);
    cut.takes(0, 1, "{");
    assert_eq!(room.held(), 1);
    drop(cut);
    assert_eq!(room.held(), 0);
}

// CLOUD-2832
#[test]
fn a_stream_is_shown_from_its_first_event_on_and_each_event_once() {
    let mut bench = Bench::fresh();
    bench.head("text/event-stream");
    bench.takes(0, 1, ": hello\n\n");
    assert_eq!(bench.done(), []);
    assert_eq!(bench.shown(), "");
    bench.takes(1, 1, "data: a\r\n\r\n");
    assert_eq!(bench.shown(), ": hello\n\ndata: a\r\n\r\n");
    assert_eq!(bench.done(), [Action::Started]);
    // Its link was cut: what was taken comes again.
    assert_eq!(bench.relay.resume(), Some(2));
    bench.takes(1, 1, "data: a\r\n\r\n").takes(1, 2, "data: a\r\n\r\ndata: b\n\n").takes(
        3,
        1,
        "data: [DONE]\n\n",
    );
    assert_eq!(bench.shown(), ": hello\n\ndata: a\r\n\r\ndata: b\n\ndata: [DONE]\n\n");
    assert_eq!(bench.end(), Some(HowEnded::Finished));
}

// CLOUD-2832
#[test]
fn a_stream_with_a_gap_or_an_error_is_never_finished() {
    let mut bench = Bench::fresh();
    bench.head("text/event-stream");
    bench.takes(0, 1, "data: a\n\n").takes(2, 1, "data: c\n\n");
    assert!(matches!(bench.done().last(), Some(Action::Ended { how: HowEnded::Broken(_), .. })));
    assert_eq!((bench.shown().as_str(), bench.log.is_finished()), ("data: a\n\n", false));
}
