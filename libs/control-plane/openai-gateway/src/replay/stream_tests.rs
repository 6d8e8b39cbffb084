//! The comparer as it is wired: two attempts through two relays into one log, cut anywhere, with a death and
//! a resumed link at every event.

use std::time::Duration;

use pool_registry_types::{
    AttemptId, ErrorBody, ErrorCode, LogId, Moment, NodeId, PoolId, PoolKey, ReplicaId,
};
use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use task_stream::{Action, AnswerHead, Assignment, AttemptDeadlines, HoldBudget, HowEnded, Relay, TaskLog};

use super::*;
use crate::events::EventKind;
use crate::replay::tests::{Client, Script, dresses, read, scripts, stream, whole};

const NOW: Moment = Moment::from_millis(7);

fn id<T: DeserializeOwned>(n: u8) -> T {
    let text = format!("00000000-0000-4000-8000-{n:012}");
    serde_json::from_value(Value::from(text)).expect("an id")
}

/// How what a node sends lies in records, and behind which of them its link is resumed.
#[derive(Debug, Clone)]
struct Way {
    counts: Vec<usize>,
    is_resumed: Vec<bool>,
    /// Events that come again then.
    again: Vec<usize>,
}

fn ways() -> impl Strategy<Value = Way> {
    let counts = prop::collection::vec(1_usize..4, 1..6);
    let is_resumed = prop::collection::vec(any::<bool>(), 1..6);
    let again = prop::collection::vec(0_usize..3, 1..4);
    (counts, is_resumed, again).prop_map(|(counts, is_resumed, again)| Way { counts, is_resumed, again })
}

fn log(script: &Script) -> TaskLog {
    let route = if script.is_chat { OpenAiRoute::ChatCompletions } else { OpenAiRoute::Completions };
    let mut log = TaskLog::new(id::<LogId>(9));
    log.compare_with(Box::new(StreamReplay::new(route)));
    log
}

/// The relay of an attempt that was just taken.
fn begin(log: &mut TaskLog, n: u8) -> Relay {
    let long = Duration::from_secs(60);
    let assignment = Assignment {
        task_id: id(1),
        attempt: id::<AttemptId>(n),
        log: log.id(),
        pool: PoolKey::new(NodeId::new("n0").unwrap(), PoolId::new("p").unwrap()),
        first_index: log.next_index(),
        attempt_number: n.into(),
        queue_wait_ms: 0,
        warm_replica: None,
        keeps_ids: false,
        deadlines: AttemptDeadlines { acceptance: long, first_token: long, token_idle: long, silence: long },
        task_deadline: None,
        stops_overdue: true,
    };
    log.open(assignment.attempt);
    let mut relay = Relay::linked(NOW, assignment).passing_on(HoldBudget::new(usize::MAX));
    relay.accepted(NOW, ReplicaId::new("r0").unwrap(), 1);
    relay
}

fn head(relay: &mut Relay) {
    let headers = vec![("content-type".to_owned(), "text/event-stream".to_owned())];
    relay.head(AnswerHead { status: 200, headers });
}

fn flush(relay: &mut Relay, log: &mut TaskLog) {
    relay.flush(NOW, |staged| staged.append_to(log));
}

/// Sends the events on their way.
fn send(relay: &mut Relay, log: &mut TaskLog, events: &[Vec<u8>], way: &Way) {
    let frames = |relay: &mut Relay, from: usize, upto: usize| {
        let count = u32::try_from(upto - from).unwrap();
        relay.frames(NOW, from as u64, count, &events[from..upto].concat().into());
    };
    let (mut counts, mut resumed) = (way.counts.iter().cycle(), way.is_resumed.iter().cycle());
    let mut again = way.again.iter().cycle();
    let mut at = 0;
    head(relay);
    while at < events.len() {
        let upto = events.len().min(at + counts.next().unwrap());
        frames(relay, at, upto);
        at = upto;
        flush(relay, log);
        if *resumed.next().unwrap()
            && let Some(from) = relay.resume()
        {
            assert_eq!(from, at as u64, "what was taken is not asked for again");
            head(relay);
            frames(relay, at - again.next().unwrap().min(&at), at);
            flush(relay, log);
        }
    }
}

fn actions(relay: &mut Relay) -> Vec<Action> {
    std::iter::from_fn(|| relay.next_action()).collect()
}

fn how(actions: &[Action]) -> Option<&HowEnded> {
    actions.iter().find_map(|action| match action {
        Action::Ended { how, .. } => Some(how),
        _ => None,
    })
}

/// The first attempt's engine dies behind these events. Returns what its relay has reported.
fn lose(log: &mut TaskLog, events: &[Vec<u8>], way: &Way) -> Vec<Action> {
    let mut relay = begin(log, 1);
    send(&mut relay, log, events, way);
    relay.error(ErrorBody::new(ErrorCode::WorkerReset, "the engine died"));
    relay.over(3);
    flush(&mut relay, log);
    log.fence(id::<AttemptId>(1));
    actions(&mut relay)
}

/// What a client has read.
fn seen(log: &TaskLog, script: &Script) -> Client {
    let bytes = log.read_from(0, usize::MAX).into_bytes();
    let mut client = Client::default();
    read(script, &bytes, bytes.len().max(1)).iter().for_each(|event| client.take(&event.bytes));
    client
}

fn has_content(script: &Script, events: &[Vec<u8>]) -> bool {
    read(script, &events.concat(), 1_000).iter().any(|event| event.kind == EventKind::Content)
}

/// The events of a stream up to each of its bytes at which another one is whole.
fn deaths(events: &[Vec<u8>]) -> Vec<usize> {
    let ends = events.iter().scan(0, |end, event| {
        *end += event.len();
        Some(*end)
    });
    let ends: Vec<usize> = ends.collect();
    let bytes = events.concat().len();
    let mut deaths: Vec<usize> =
        (0..=bytes).map(|death| ends.iter().filter(|end| **end <= death).count()).collect();
    deaths.dedup();
    deaths
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    // CLOUD-2864
    #[test]
    fn a_client_sees_one_stream_wherever_its_first_attempt_dies_and_links_are_resumed(
        script in scripts(), first in dresses(), second in dresses(), way in ways(), second_way in ways(),
    ) {
        let events = stream(&script, &first, "a");
        let again = stream(&script, &second, "bb");
        for death in deaths(&events) {
            let mut log = log(&script);
            let reported = lose(&mut log, &events[..death], &way);
            let is_over = death == events.len();
            prop_assert_eq!(reported.contains(&Action::CannotBeRepeated), is_over);
            prop_assert!(matches!(how(&reported), Some(HowEnded::NodeError(_))));
            if is_over {
                prop_assert_eq!(seen(&log, &script), whole(&script, &first, "a"));
                continue;
            }
            let has_begun = has_content(&script, &events[..death]);
            prop_assert_eq!(log.is_catching_up(), has_begun);
            let mut relay = begin(&mut log, 2);
            send(&mut relay, &mut log, &again, &second_way);
            relay.over(5);
            flush(&mut relay, &mut log);
            let reported = actions(&mut relay);
            prop_assert_eq!(how(&reported), Some(&HowEnded::Finished), "death behind {} events", death);
            prop_assert!(log.is_finished());
            let expected = if has_begun { (&first, "a") } else { (&second, "bb") };
            prop_assert_eq!(seen(&log, &script), whole(&script, expected.0, expected.1), "death behind {}", death);
        }
    }

    // CLOUD-2863
    #[test]
    fn of_another_stream_nothing_stands_in_the_log_and_its_attempt_is_stopped(
        script in scripts(), first in dresses(), second in dresses(), way in ways(), second_way in ways(),
        at in any::<prop::sample::Index>(), death in any::<prop::sample::Index>(),
    ) {
        let events = stream(&script, &first, "a");
        // Behind some of its text, and before its end.
        let death = 1 + death.index(events.len() - 1);
        let mut log = log(&script);
        lose(&mut log, &events[..death], &way);
        let before = seen(&log, &script);
        let known = before.texts[if script.is_chat { 1 } else { 2 }].chars().count();
        prop_assume!(known > 0 && death < events.len());
        let mut other: Vec<char> = script.content.chars().collect();
        other[at.index(known)] = 'z';
        let other = script.saying(other.into_iter().collect());
        let mut relay = begin(&mut log, 2);
        send(&mut relay, &mut log, &stream(&other, &second, "b"), &second_way);
        let reported = actions(&mut relay);
        prop_assert!(matches!(how(&reported), Some(HowEnded::Differs(_))), "{:?}", reported);
        prop_assert!(reported.contains(&Action::Stop));
        prop_assert_eq!(seen(&log, &script), before);
        prop_assert!(!log.is_finished());
    }
}

// CLOUD-2863
#[test]
fn a_piece_that_is_no_event_makes_a_stream_that_cannot_be_repeated() {
    let mut replay = StreamReplay::new(OpenAiRoute::ChatCompletions);
    let event = json!({"choices": [{"index": 0, "delta": {"content": "a"}}]});
    replay.passed(&Bytes::from(format!("data: {event}\n\n")));
    assert!(replay.may_begin() && replay.len_bytes() > 0);
    replay.passed(&Bytes::from_static(b"data: {\"cho"));
    assert!(!replay.may_begin());
}

// CLOUD-2864
#[test]
fn carriage_returns_that_end_a_piece_end_its_event() {
    let mut replay = StreamReplay::new(OpenAiRoute::Completions);
    for word in ["a", "b"] {
        let event = json!({"choices": [{"index": 0, "text": word}]});
        replay.passed(&Bytes::from(format!("data: {event}\r\r")));
    }
    assert!(replay.may_begin());
    replay.begin();
    let event = json!({"choices": [{"index": 0, "text": "abc"}]});
    let new = replay.compare(&Bytes::from(format!("data: {event}\r\r"))).unwrap();
    assert_eq!(new, "data: {\"choices\":[{\"index\":0,\"text\":\"c\"}]}\r\r");
    assert!(replay.has_caught_up());
}
