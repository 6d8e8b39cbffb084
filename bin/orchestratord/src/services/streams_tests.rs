//! What is kept of streams and of payloads, how long, and what readers get of it.

use task_stream::{PayloadFormat, Segment};
use uuid::Uuid;

use super::*;

fn payload(bytes: usize) -> Payload {
    Payload { format: PayloadFormat::Native, bytes: vec![b'x'; bytes].into() }
}

fn ended(streams: &Streams, n: u128, bytes: usize) -> TaskId {
    let (task, attempt) = (TaskId(Uuid::from_u128(n)), AttemptId(Uuid::from_u128(n)));
    streams.open(task, LogId(Uuid::from_u128(n)), Submitted::with(payload(0)));
    let stream = streams.get(task).unwrap();
    stream.write(|log| {
        log.open(attempt);
        log.finish(attempt, Segment::frame(0, vec![b'x'; bytes].into())).unwrap();
    });
    streams.ended(task);
    streams.ended(task);
    task
}

fn code(streams: &Streams, task: TaskId) -> Option<ErrorCode> {
    streams.find(task, None).err().map(|error| error.code)
}

// CLOUD-3014
#[test]
fn a_place_in_a_stream_that_is_none_is_told_why() {
    let streams = Streams::new(1_000, usize::MAX);
    let (task, log) = (ended(&streams, 1, 10), LogId(Uuid::from_u128(1)));
    assert_eq!(streams.find(task, Some(&format!("{log}:0"))).unwrap().1, 1);
    for (id, why) in [
        ("17", "<uuid>:<number>"),
        (format!("{log}:7").as_str(), "no such event yet"),
        (format!("{}:0", LogId(Uuid::from_u128(2))).as_str(), "of another stream"),
    ] {
        let error = streams.find(task, Some(id)).err().unwrap();
        assert_eq!(error.code, ErrorCode::EventsExpired);
        assert!(error.message.starts_with("Last-Event-ID") && error.message.contains(why), "{error}");
    }
}

// CLOUD-1534
#[test]
fn what_was_sent_is_read_from_the_log_with_its_ids_where_they_are_all_known() {
    let (task, attempt) = (TaskId(Uuid::from_u128(1)), AttemptId(Uuid::from_u128(1)));
    let streams = Streams::new(1_000, usize::MAX);
    streams.open(task, LogId(Uuid::from_u128(1)), Submitted::with(payload(0)));
    let stream = streams.get(task).unwrap();
    stream.write(|log| log.open(attempt));
    for (n, text) in ["{\"t\":\"a \\\"b\\\"\",\"i\":0}", "{\"t\":\" c\",\"i\":1}"].iter().enumerate() {
        let mut frame = Vec::new();
        if n == 0 {
            write_frame(&mut frame, None, "started", "{\"t\":\"not a token\"}");
        }
        write_frame(&mut frame, Some((&LogId(Uuid::from_u128(1)), n as u64)), "token", text);
        stream.write(|log| log.append(attempt, Segment::frame(n as u64, frame.into()))).unwrap();
    }
    stream.write(|log| log.keep_ids(0, 2, &[7, 8]));
    let sent = stream.sent(ResumeMode::Append);
    assert_eq!((sent.text.as_str(), sent.token_ids.len(), sent.tokens), ("a \"b\" c", 0, 2));
    stream.write(|log| log.keep_ids(1, 3, &[9]));
    let sent = stream.sent(ResumeMode::Append);
    assert_eq!((sent.token_ids, sent.tokens), (vec![7, 8, 9], 3));
    // Half a character has a token and no frame, and its id never comes.
    let half = Segment::frame(2, "event: token\ndata: {\"t\":\"x\",\"i\":2}\n\n".into());
    stream.write(|log| log.append(attempt, half)).unwrap();
    stream.write(|log| log.keep_ids(2, 5, &[10]));
    let sent = stream.sent(ResumeMode::Append);
    assert_eq!((sent.token_ids.len(), sent.tokens), (0, 5));
}

// CLOUD-1609
#[test]
fn a_task_that_comes_again_under_its_id_is_not_evicted_for_the_one_before() {
    let streams = Streams::new(350, usize::MAX);
    // The second has ended before the first in the core's books, and is forgotten first.
    let (first, second) = (ended(&streams, 1, 100), ended(&streams, 2, 100));
    streams.forget(second);
    streams.open(second, LogId(Uuid::from_u128(9)), Submitted::with(payload(0)));
    // Room is made twice: of the first, and of what was the second's.
    let third = ended(&streams, 3, 100);
    let fourth = ended(&streams, 4, 100);
    assert_eq!(code(&streams, first), Some(ErrorCode::EventsExpired));
    assert_eq!([second, third, fourth].map(|task| code(&streams, task)), [None; 3]);
    assert!(streams.get(second).unwrap().payload().is_some(), "it runs");
}

// CLOUD-1217
#[test]
fn a_payload_is_kept_until_its_task_ends_however_it_ends_and_no_longer() {
    let streams = Streams::new(1_000, usize::MAX);
    let attempt = AttemptId(Uuid::from_u128(1));
    for closed in [false, true] {
        let task = TaskId(Uuid::from_u128(u128::from(closed)));
        let payload = payload(10);
        let bytes = payload.bytes.clone();
        streams.open(task, LogId(Uuid::from_u128(1)), Submitted::with(payload));
        let stream = streams.get(task).unwrap();
        stream.write(|log| log.open(attempt));
        assert_eq!(stream.payload().unwrap().bytes.as_ptr(), bytes.as_ptr());
        streams.fence(task, attempt);
        assert!(stream.payload().is_some(), "another attempt may need it");
        assert!(!bytes.is_unique());
        if closed {
            streams.close(task, &ErrorBody::new(ErrorCode::Canceled, "canceled"));
        } else {
            streams.ended(task);
        }
        assert_eq!(stream.payload(), None);
        assert!(bytes.is_unique(), "the bytes are free");
    }
}

// CLOUD-1609
#[test]
fn ended_streams_take_so_much_room_and_the_oldest_goes_first() {
    // Each takes 100 bytes and what its segment costs.
    let streams = Streams::new(400, usize::MAX);
    let tasks: Vec<TaskId> = (1..=3).map(|n| ended(&streams, n, 100)).collect();
    assert_eq!(code(&streams, tasks[0]), Some(ErrorCode::EventsExpired));
    assert_eq!(code(&streams, tasks[1]), None);
    streams.forget(tasks[0]);
    streams.forget(tasks[1]);
    assert_eq!(code(&streams, tasks[1]), Some(ErrorCode::NotFound));
    let fourth = ended(&streams, 4, 100);
    assert_eq!((code(&streams, tasks[2]), code(&streams, fourth)), (None, None), "forgotten ones left room");
}

/// What a reader gets from here on, and whether that was the end.
fn rest(stream: &TaskStream, mut place: ReadPosition) -> (Vec<u8>, Vec<usize>) {
    let (mut all, mut pieces) = (Vec::new(), Vec::new());
    while let ReadOutcome::Frames(piece) = stream.read(place) {
        all.extend_from_slice(&piece.bytes);
        pieces.push(piece.bytes.len());
        place = piece.place;
        if piece.is_last {
            break;
        }
    }
    (all, pieces)
}

const BEGIN: ReadPosition = ReadPosition { frame: 0, part: 0 };

// CLOUD-2726
#[test]
fn a_reader_has_little_of_its_own_however_long_a_frame_is_and_gets_every_byte() {
    let streams = Streams::new(usize::MAX, usize::MAX);
    let (task, attempt) = (TaskId(Uuid::from_u128(1)), AttemptId(Uuid::from_u128(1)));
    streams.open(task, LogId(Uuid::from_u128(1)), Submitted::with(payload(0)));
    let stream = streams.get(task).unwrap();
    stream.write(|log| log.open(attempt));
    let mut expected = Vec::new();
    let lengths = [700_000, 10].into_iter().chain(std::iter::repeat_n(900, 200)).chain([66_000, 1, 3_000]);
    for (n, length) in (0_u64..).zip(lengths) {
        let letter = |at: u64| b'a' + u8::try_from((at + n) % 26).unwrap();
        let bytes: Vec<u8> = (0..length).map(letter).collect();
        expected.extend_from_slice(&bytes);
        stream.write(|log| log.append(attempt, Segment::frame(n, bytes.into()))).unwrap();
    }
    let (read, pieces) = rest(&stream, BEGIN);
    assert!(read == expected, "every byte, once and in order");
    assert!(pieces.iter().all(|piece| *piece <= READ_BYTES), "{pieces:?}");
    // What is copied is short: all but what lies in the log in one piece.
    let ReadOutcome::Frames(first) = stream.read(BEGIN) else { panic!("nothing is there") };
    assert_eq!((first.bytes.len(), first.place), (OWN_BYTES, ReadPosition { frame: 0, part: OWN_BYTES }));
    assert!(first.bytes.is_unique(), "the long frame is not held by it");
    assert!(matches!(stream.read(ReadPosition { frame: 10_000, part: 0 }), ReadOutcome::Nothing(_)));
}

// CLOUD-2727
#[test]
fn what_runs_counts_as_live_and_beyond_the_bound_no_new_task_is_taken_and_none_is_ended() {
    let streams = Streams::new(usize::MAX, 1_000);
    let (task, attempt) = (TaskId(Uuid::from_u128(1)), AttemptId(Uuid::from_u128(1)));
    streams.open(task, LogId(Uuid::from_u128(1)), Submitted::with(payload(0)));
    let stream = streams.get(task).unwrap();
    stream.write(|log| log.open(attempt));
    assert_eq!((streams.live_bytes(), streams.check_room()), (0, Ok(())));
    stream.write(|log| log.append(attempt, Segment::frame(0, vec![b'x'; 5_000].into()))).unwrap();
    assert!(streams.live_bytes() >= 5_000);
    let refused = streams.check_room().unwrap_err();
    assert_eq!((refused.code, refused.retry_after_ms), (ErrorCode::Overloaded, Some(1_000)));
    stream.write(|log| log.append(attempt, Segment::frame(1, vec![b'y'; 5_000].into()))).unwrap();
    assert_eq!(rest(&stream, BEGIN).0.len(), 10_000, "it goes on");
    stream.write(|log| log.finish(attempt, Segment::frame(2, "z".into()))).unwrap();
    streams.ended(task);
    assert_eq!((streams.live_bytes(), streams.check_room()), (0, Ok(())));
    // Whatever ends it.
    streams.open(TaskId(Uuid::from_u128(2)), LogId(Uuid::from_u128(2)), Submitted::with(payload(0)));
    streams.forget(TaskId(Uuid::from_u128(2)));
    drop(stream);
    streams.forget(task);
    assert_eq!(streams.live_bytes(), 0);
}

// CLOUD-2727
#[test]
fn a_stream_that_is_read_when_it_makes_room_counts_until_it_is_read_or_memory_is_short() {
    let streams = Streams::new(0, 12_000);
    // Nobody reads it: it is gone with its end.
    ended(&streams, 1, 5_000);
    assert_eq!(streams.live_bytes(), 0);
    // These are held by readers when they end.
    let read = |n: u128| {
        let task = TaskId(Uuid::from_u128(n));
        streams.open(task, LogId(Uuid::from_u128(n)), Submitted::with(payload(0)));
        let stream = streams.get(task).unwrap();
        stream.write(|log| {
            log.open(AttemptId(Uuid::from_u128(n)));
            log.finish(AttemptId(Uuid::from_u128(n)), Segment::frame(0, vec![b'x'; 5_000].into())).unwrap();
        });
        streams.ended(task);
        stream
    };
    let (first, second) = (read(2), read(3));
    assert_eq!(code(&streams, TaskId(Uuid::from_u128(2))), Some(ErrorCode::EventsExpired));
    assert!(streams.live_bytes() >= 10_000);
    // The first is read again; the other one has stood still for longer then.
    assert_eq!(rest(&first, BEGIN).0.len(), 5_000);
    let third = read(4);
    assert!(matches!(second.read(BEGIN), ReadOutcome::Released));
    assert_eq!((rest(&first, BEGIN).0.len(), rest(&third, BEGIN).0.len()), (5_000, 5_000));
    assert_eq!(streams.check_room(), Ok(()));
    drop((first, second, third));
    assert_eq!(streams.live_bytes(), 0);
}

// CLOUD-2725
#[test]
fn what_counts_for_a_payload_counts_until_its_task_has_ended() {
    let (streams, budget) = (Streams::new(1_000, usize::MAX), daemon_kit::byte_budget::ByteBudget::new(100));
    let task = TaskId(Uuid::from_u128(1));
    let mut held = budget.begin(None);
    held.add(60).unwrap();
    streams.open(task, LogId(Uuid::from_u128(1)), Submitted { held, ..Submitted::with(payload(60)) });
    assert_eq!(budget.held(), 60);
    streams.close(task, &ErrorBody::new(ErrorCode::Canceled, "canceled"));
    assert_eq!((budget.held(), streams.get(task).is_some()), (0, true));
}

fn passed(bytes: usize, stream: bool) -> Payload {
    let passage = task_stream::Passage {
        route: task_stream::OpenAiRoute::Responses,
        stream,
        query: None,
        headers: Vec::new(),
        model_at: None,
    };
    Payload { format: PayloadFormat::OpenAi(Box::new(passage)), bytes: vec![b'x'; bytes].into() }
}

fn open_passed(streams: &Streams, n: u128) -> (TaskId, AttemptId, Arc<TaskStream>) {
    let (task, attempt) = (TaskId(Uuid::from_u128(n)), AttemptId(Uuid::from_u128(n)));
    streams.open(task, LogId(Uuid::from_u128(n)), Submitted::with(passed(0, true)));
    let stream = streams.get(task).unwrap();
    stream.write(|log| log.open(attempt));
    (task, attempt, stream)
}

// CLOUD-2854
#[test]
fn the_reader_of_an_answer_that_is_passed_on_has_little_of_its_own_and_what_it_has_read_is_let_go() {
    let streams = Streams::new(usize::MAX, usize::MAX);
    let (_, attempt, stream) = open_passed(&streams, 1);
    let lengths = [1_000_000, 10, 4_096, 9_000, 3];
    let mut expected = Vec::new();
    for (n, length) in (0_u64..).zip(lengths) {
        let letter = |at: u64| b'a' + u8::try_from((at + n) % 26).unwrap();
        let bytes: Vec<u8> = (0..length).map(letter).collect();
        expected.extend_from_slice(&bytes);
        stream.write(|log| log.append(attempt, Segment::frame(n, bytes.into()))).unwrap();
    }
    stream.write(|log| log.finish(attempt, Segment::frame(5, Bytes::new()))).unwrap();
    assert_eq!(stream.unread().ok(), Some((expected.len(), true)));
    let (mut place, mut all, mut lasts) = (ReadPosition::BEGIN, Vec::new(), 0);
    while lasts == 0 {
        let Ok(piece) = stream.pass(place) else { panic!("nothing is there") };
        assert!(piece.bytes.len() <= OWN_BYTES && piece.bytes.is_unique(), "{}", piece.bytes.len());
        assert!(place.frame == 0 || streams.live_bytes() < 20_000, "the long one was read");
        all.extend_from_slice(&piece.bytes);
        place = piece.place;
        lasts += usize::from(piece.is_last);
    }
    assert!(all == expected, "every byte, once and in order");
    assert!(streams.live_bytes() < 20_000, "no more than the short ones: {}", streams.live_bytes());
}

// CLOUD-2855
#[test]
fn an_ended_answer_that_is_passed_on_takes_no_room_of_others_and_all_of_it_goes_with_its_reader() {
    let streams = Streams::new(10_000, usize::MAX);
    let other = ended(&streams, 9, 5_000);
    let write = |n: u64, (_, attempt, stream): &(TaskId, AttemptId, Arc<TaskStream>)| {
        stream.write(|log| log.append(*attempt, Segment::frame(n, vec![b'x'; 100_000].into()))).unwrap();
    };
    // It ends before it was read.
    let first = open_passed(&streams, 1);
    write(0, &first);
    first.2.write(|log| log.finish(first.1, Segment::frame(1, Bytes::new()))).unwrap();
    streams.ended(first.0);
    assert_eq!(code(&streams, other), None, "it stays");
    assert!(streams.live_bytes() >= 100_000, "it counts until it was read");
    streams.release(first.0);
    assert_eq!((streams.live_bytes(), streams.get(first.0).is_none()), (0, true));
    // Its reader goes while it runs: nothing is kept of what is written until it ends.
    let second = open_passed(&streams, 2);
    write(0, &second);
    streams.release(second.0);
    assert_eq!(streams.live_bytes(), 0);
    write(1, &second);
    assert_eq!((streams.live_bytes(), streams.fence(second.0, second.1).tokens_written), (0, 2));
    streams.close(second.0, &ErrorBody::new(ErrorCode::Canceled, "canceled"));
    assert_eq!((streams.live_bytes(), streams.get(second.0).is_none()), (0, true));
    assert_eq!(code(&streams, second.0), Some(ErrorCode::EventsExpired));
}
