use pool_registry_types::{AttemptId, LogId};
use task_stream::{Payload, PayloadFormat, Segment};
use uuid::Uuid;

use super::*;
use crate::services::streams::{Streams, Submitted};

const TASK: TaskId = TaskId(Uuid::from_u128(1));
const ATTEMPT: AttemptId = AttemptId(Uuid::from_u128(2));
const HOLDER: HolderId = HolderId(Uuid::from_u128(3));

fn key(text: &str) -> IdempotencyKey {
    IdempotencyKey::new(text).unwrap()
}

fn digest(n: u8) -> BodyDigest {
    BodyDigest::new([n; 32])
}

async fn new(keys: &Arc<Keys>, text: &str) -> HeldKey {
    match keys.claim((HOLDER, key(text)), digest(1)).await.unwrap() {
        Claim::New(held) => held,
        attached @ Claim::Attached { .. } => panic!("{attached:?}"),
    }
}

async fn attached(keys: &Arc<Keys>, text: &str) -> ReaderPlace {
    match keys.claim((HOLDER, key(text)), digest(1)).await.unwrap() {
        Claim::Attached { task_id: TASK, streams: true, place } => place,
        other => panic!("{other:?}"),
    }
}

/// A task whose answer is passed on and that has begun.
fn opened(streams: &Streams) -> Arc<TaskStream> {
    let passage = task_stream::Passage {
        route: task_stream::OpenAiRoute::ChatCompletions,
        stream: true,
        query: None,
        headers: Vec::new(),
        model_at: None,
    };
    let payload = Payload { format: PayloadFormat::OpenAi(Box::new(passage)), bytes: Bytes::new() };
    streams.open(TASK, LogId(Uuid::from_u128(4)), Submitted::with(payload));
    let stream = streams.get(TASK).unwrap();
    stream.write(|log| log.open(ATTEMPT));
    stream
}

/// As a relay writes.
fn write(stream: &TaskStream, bytes: &[u8]) -> Result<(), task_stream::AppendError> {
    stream.kept.lock().make_way(bytes.len());
    stream.write(|log| {
        let segment = Segment::frame(log.next_index(), Bytes::copy_from_slice(bytes));
        log.append(ATTEMPT, segment)
    })
}

fn finish(stream: &TaskStream) {
    stream
        .write(|log| {
            let segment = Segment::frame(log.next_index(), Bytes::new());
            log.finish(ATTEMPT, segment)
        })
        .unwrap();
}

fn at(frame: u64) -> ReadPosition {
    ReadPosition { frame, part: 0 }
}

fn read(place: &ReaderPlace, from: u64) -> (Vec<u8>, u64, bool) {
    let (mut all, mut next) = (Vec::new(), at(from));
    while let Ok(piece) = place.pass(next) {
        all.extend_from_slice(&piece.bytes);
        next = piece.place;
        if piece.is_last {
            return (all, next.frame, true);
        }
    }
    (all, next.frame, false)
}

// CLOUD-2910
#[test]
fn a_key_has_1_to_255_visible_characters_and_is_not_shown() {
    for good in ["a", "!~", &"x".repeat(255), "8e03978e-40d5-43dd-bc93-6894a57f9324"] {
        assert!(IdempotencyKey::new(good).is_some(), "{good}");
    }
    for bad in ["", " ", "a b", "é", "\u{7f}", &"x".repeat(256)] {
        assert!(IdempotencyKey::new(bad).is_none(), "{bad}");
    }
    assert!(!format!("{:?}", key("secret")).contains("secret"));
}

// CLOUD-2911
// CLOUD-2912
#[tokio::test]
async fn the_same_request_reads_the_same_answer_from_its_first_byte_and_another_conflicts() {
    let (keys, streams) = (Arc::<Keys>::default(), Streams::new(usize::MAX, usize::MAX));
    let held = new(&keys, "k").await;
    let waiting = {
        let keys = Arc::clone(&keys);
        tokio::spawn(async move { attached(&keys, "k").await })
    };
    let stream = opened(&streams);
    let first = stream.keep_for(held, TASK, true);
    write(&stream, b"one").unwrap();
    let second = waiting.await.unwrap();
    assert_eq!(read(&first, 0), (b"one".to_vec(), 1, false));
    write(&stream, b"two").unwrap();
    finish(&stream);
    assert_eq!(read(&first, 1), (b"two".to_vec(), 3, true));
    assert_eq!(read(&second, 0), (b"onetwo".to_vec(), 3, true));
    // Once it has completed too, with nobody there in between.
    for place in [first, second] {
        place.leave();
    }
    streams.ended(TASK);
    assert_eq!(read(&attached(&keys, "k").await, 0).0, b"onetwo");

    let other = keys.claim((HOLDER, key("k")), digest(2)).await.unwrap_err();
    assert_eq!(other.code, ErrorCode::TaskConflict);
    let somebody = (HolderId(Uuid::from_u128(9)), key("k"));
    assert!(matches!(keys.claim(somebody, digest(2)).await, Ok(Claim::New(_))), "its own key");
}

// CLOUD-2913
#[tokio::test]
async fn a_task_that_ends_otherwise_is_forgotten_or_evicted_frees_its_key() {
    let keys = Arc::<Keys>::default();
    let error = ErrorBody::new(ErrorCode::WorkerReset, "x");
    for end in [0, 1, 2, 3] {
        let streams = Streams::new(if end == 1 { 0 } else { usize::MAX }, usize::MAX);
        let stream = opened(&streams);
        let place = stream.keep_for(new(&keys, "k").await, TASK, true);
        write(&stream, b"one").unwrap();
        match end {
            // An error ends it.
            0 => {
                streams.fence(TASK, ATTEMPT);
                streams.close(TASK, &error);
            }
            // There is no room for ended ones.
            1 => {
                finish(&stream);
                streams.ended(TASK);
            }
            // Its retention is over.
            2 => {
                finish(&stream);
                streams.ended(TASK);
                streams.forget(TASK);
            }
            _ => stream.release(),
        }
        drop(new(&keys, "k").await);
        // Whoever reads it reads on.
        let whole = read(&place, 0);
        assert_eq!((whole.0.len(), whole.2), (if end == 3 { 0 } else { 3 }, true), "{end}");
        assert!(keys.0.lock().entries.is_empty() && keys.0.lock().of_holder.is_empty(), "{end}");
    }
    // One that was not admitted, with somebody waiting for it.
    let held = new(&keys, "k").await;
    let waiting = {
        let keys = Arc::clone(&keys);
        tokio::spawn(async move { new(&keys, "k").await })
    };
    tokio::task::yield_now().await;
    drop(held);
    drop(waiting.await.unwrap());
    assert!(keys.0.lock().entries.is_empty());
}

// CLOUD-2914
#[tokio::test]
async fn an_answer_that_grows_beyond_8_mib_lets_go_of_its_beginning_and_key_and_goes_on_for_its_readers() {
    let (keys, streams) = (Arc::<Keys>::default(), Streams::new(usize::MAX, usize::MAX));
    let stream = opened(&streams);
    let first = stream.keep_for(new(&keys, "k").await, TASK, true);
    let second = attached(&keys, "k").await;
    let piece = vec![b'x'; 1024 * 1024 - 1_000];
    for _ in 0..8 {
        write(&stream, &piece).unwrap();
    }
    assert!(streams.live_bytes() > 8 * piece.len(), "it counts as live");
    assert_eq!(read(&first, 0).1, 8);
    let third = attached(&keys, "k").await;
    assert_eq!(read(&third, 0).1, 8);
    third.leave();
    // One that has taken a part of it.
    let part = second.pass(at(2)).ok().map(|piece| piece.place);
    assert_eq!(part, Some(ReadPosition { frame: 2, part: OWN_BYTES }));
    write(&stream, &piece).unwrap();
    drop(new(&keys, "k").await);
    assert_eq!(read(&first, 8).1, 9);
    let all = read(&second, 2);
    assert_eq!((all.0.len(), all.1), (7 * piece.len(), 9), "nothing of it is lost");
    for n in 9..40 {
        write(&stream, &piece).unwrap();
        assert_eq!((read(&first, n).1, read(&second, n).1), (n + 1, n + 1));
    }
    assert!(streams.live_bytes() < 4 * piece.len(), "{}", streams.live_bytes());
    // One that takes no more makes room, the last one does not.
    for n in 40..60 {
        write(&stream, &piece).unwrap();
        assert_eq!(read(&first, n).1, n + 1);
    }
    assert!(second.has_made_room() && !first.has_made_room());
    assert!(second.pass(at(40)).is_ok_and(|piece| piece.is_last));
    let full = (60..80).find_map(|_| write(&stream, &piece).err());
    assert_eq!(full, Some(task_stream::AppendError::Full), "nobody takes anything");
}

// CLOUD-2915
#[tokio::test]
async fn whoever_is_last_to_leave_is_waited_for_until_somebody_comes() {
    let (keys, streams) = (Arc::<Keys>::default(), Streams::new(usize::MAX, usize::MAX));
    let stream = opened(&streams);
    let first = stream.keep_for(new(&keys, "k").await, TASK, true);
    let second = attached(&keys, "k").await;
    write(&stream, b"one").unwrap();
    assert!(first.leave().is_none(), "somebody reads");
    let awaited = second.leave().unwrap();
    assert!(awaited.may_come && awaited.is_alone());
    let third = attached(&keys, "k").await;
    assert!(!awaited.is_alone());
    assert_eq!(read(&third, 0).0, b"one");
    let again = third.leave().unwrap();
    assert!(again.is_alone() && !awaited.is_alone());
    finish(&stream);
    assert!(!again.is_alone(), "it has ended");
    assert!(attached(&keys, "k").await.leave().is_none());
}

// CLOUD-2916
#[tokio::test]
async fn so_many_keys_are_in_use_at_most_and_half_of_them_by_one_caller() {
    let keys = Arc::<Keys>::default();
    let mut held = Vec::new();
    let claim = async |holder: u128, n: usize| {
        keys.claim((HolderId(Uuid::from_u128(holder)), key(&n.to_string())), digest(1)).await
    };
    for holder in [1, 2] {
        for n in 0..MOST_OF_ONE {
            held.push(claim(holder, n).await.unwrap());
        }
        let code = claim(holder, MOST_KEYS).await.unwrap_err().code;
        assert_eq!(code, if holder == 1 { ErrorCode::RateLimited } else { ErrorCode::Overloaded });
    }
    assert_eq!(claim(3, 0).await.unwrap_err().code, ErrorCode::Overloaded);
    held.pop();
    held.push(claim(3, 0).await.unwrap());
    drop(held);
    assert!(keys.0.lock().of_holder.is_empty());
}

// CLOUD-2912
#[tokio::test]
async fn so_many_read_an_answer_at_once() {
    let (keys, streams) = (Arc::<Keys>::default(), Streams::new(usize::MAX, usize::MAX));
    let stream = opened(&streams);
    let mut places = vec![stream.keep_for(new(&keys, "k").await, TASK, true)];
    for _ in 1..MOST_READERS {
        places.push(attached(&keys, "k").await);
    }
    let refused = keys.claim((HOLDER, key("k")), digest(1)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::RateLimited);
    places.pop().unwrap().leave();
    attached(&keys, "k").await;
}
