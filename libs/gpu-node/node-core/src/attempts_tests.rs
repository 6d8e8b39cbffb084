use proptest::prelude::*;
use uuid::Uuid;

use super::*;

pub(super) fn id(n: u128) -> AttemptId {
    AttemptId(Uuid::from_u128(n))
}

pub(super) fn at(ms: u64) -> Moment {
    Moment::from_millis(ms)
}

pub(super) fn start(retention: Retention) -> Start {
    Start {
        pool_id: PoolId::new("p").unwrap(),
        replica_id: ReplicaId::new("r0").unwrap(),
        report_seq: 7,
        first_index: 3,
        retention,
    }
}

fn held(retention: Retention) -> Held {
    let mut held = Held::default();
    held.begin(id(1), start(retention));
    held
}

/// Frames in a row, and what stands behind the last one.
pub(super) fn piece(first: u64, frames: &[&str], behind: &str) -> Piece {
    let (mut bytes, mut ends) = (String::new(), Ends::default());
    for frame in frames {
        bytes.push_str(frame);
        ends.push(bytes.len());
    }
    bytes.push_str(behind);
    Piece::new(first, bytes.into(), ends)
}

pub(super) fn large(first: u64, bytes: usize) -> Piece {
    let mut ends = Ends::default();
    ends.push(bytes);
    Piece::new(first, vec![b'x'; bytes], ends)
}

/// All that there is for the reader.
fn read(held: &mut Held, attempt: u128, cursor: &mut Cursor) -> String {
    let mut all = String::new();
    while let Taken::Bytes(bytes) = held.take(&id(attempt), cursor) {
        all.push_str(std::str::from_utf8(&bytes).unwrap());
    }
    all
}

// CLOUD-1560
#[test]
fn a_reader_that_comes_again_gets_everything_from_its_record_on_with_the_comments_before_it() {
    let mut held = held(Retention::Keep);
    held.append(at(0), &id(1), piece(3, &["a", "ids b"], "thought ")).unwrap();
    held.append(at(0), &id(1), piece(5, &[], "works ")).unwrap();
    held.append(at(0), &id(1), piece(5, &["c"], "")).unwrap();
    held.finish(at(1), &id(1), Some(piece(6, &["end"], " seq 9")), Ending::default());
    assert_eq!(read(&mut held, 1, &mut Cursor::first()), "aids bthought works cend seq 9");
    let from = |held: &mut Held, from| {
        let mut resumed = held.resume(&id(1), from).unwrap();
        assert_eq!((resumed.replica_id.as_str(), resumed.report_seq), ("r0", 7));
        read(held, 1, &mut resumed.cursor)
    };
    assert_eq!(from(&mut held, 3), "aids bthought works cend seq 9");
    assert_eq!(from(&mut held, 4), "ids bthought works cend seq 9");
    assert_eq!(from(&mut held, 5), "thought works cend seq 9");
    assert_eq!(from(&mut held, 7), " seq 9");
    assert_eq!(held.resume(&id(1), 2), Err(ResumeError::Gone));
    assert_eq!(held.resume(&id(1), 8), Err(ResumeError::Gone));
    assert_eq!(held.take(&id(1), &mut Cursor::first()), Taken::Replaced);
    held.done(&id(1));
    assert_eq!((held.bytes(), held.next_deadline()), (0, None));
}

// CLOUD-1560
#[test]
fn bytes_are_handed_over_as_they_were_given() {
    let mut held = held(Retention::Keep);
    let given = vec![b'x'; 5_000];
    let address = given.as_ptr();
    let mut ends = Ends::default();
    ends.push(given.len());
    held.append(at(0), &id(1), Piece::new(3, given, ends)).unwrap();
    let Taken::Bytes(bytes) = held.take(&id(1), &mut Cursor::first()) else { panic!("nothing is there") };
    assert_eq!(bytes.as_ptr(), address);
}

// CLOUD-1562
#[test]
fn an_attached_attempt_keeps_what_was_not_handed_over_and_is_done_with_its_last_byte() {
    let (mut held, mut cursor) = (held(Retention::Attached), Cursor::first());
    held.append(at(0), &id(1), piece(3, &["a"], "")).unwrap();
    held.append(at(0), &id(1), piece(4, &["b"], "")).unwrap();
    assert_eq!(held.take(&id(1), &mut cursor), Taken::Bytes("a".into()));
    assert!(held.detach(at(5), &id(1), &cursor));
    assert_eq!(held.resume(&id(1), 3), Err(ResumeError::Gone));
    let mut cursor = held.resume(&id(1), 4).unwrap().cursor;
    assert_eq!(held.take(&id(1), &mut cursor), Taken::Bytes("b".into()));
    assert_eq!(held.take(&id(1), &mut cursor), Taken::Waiting);
    held.finish(at(9), &id(1), Some(piece(5, &["end"], "")), Ending::default());
    assert_eq!(held.take(&id(1), &mut cursor), Taken::Bytes("end".into()));
    assert!(!held.contains(&id(1)));
    assert_eq!(held.take(&id(1), &mut cursor), Taken::Over);
    assert_eq!((held.bytes(), held.next_deadline()), (0, None));
}

// CLOUD-1561
#[test]
fn a_kept_attempt_ends_as_too_long_and_an_attached_one_holds_its_driver_back() {
    let mut kept = held(Retention::Keep);
    kept.append(at(0), &id(1), large(3, MAX_ATTEMPT_BYTES)).unwrap();
    assert!(kept.has_room(&id(1)));
    assert_eq!(kept.append(at(0), &id(1), piece(4, &["x"], "")), Err(TooLong { most: MAX_ATTEMPT_BYTES }));
    kept.finish(at(0), &id(1), Some(piece(4, &["error"], "")), Ending::default());
    let mut resumed = kept.resume(&id(1), 4).unwrap();
    assert_eq!(read(&mut kept, 1, &mut resumed.cursor), "error");

    let (mut held, mut cursor) = (held(Retention::Attached), Cursor::first());
    held.append(at(0), &id(1), large(3, MAX_ATTEMPT_BYTES - 1)).unwrap();
    assert!(held.has_room(&id(1)) && held.next_deadline().is_none());
    held.append(at(2), &id(1), piece(4, &["x"], "")).unwrap();
    assert!(!held.has_room(&id(1)));
    assert_eq!(held.next_deadline(), Some(at(30_002)));
    assert!(matches!(held.take(&id(1), &mut cursor), Taken::Bytes(_)));
    assert!(held.has_room(&id(1)) && held.next_deadline().is_none());
    held.append(at(3), &id(1), large(5, MAX_ATTEMPT_BYTES)).unwrap();
    assert_eq!(held.expired(at(30_002)), None);
    assert_eq!(held.expired(at(30_003)), Some(id(1)));
    assert_eq!(held.expired(at(30_003)), None);
}

// CLOUD-1563
#[test]
fn an_attempt_without_a_reader_is_stopped_after_fifteen_seconds_unless_one_comes() {
    let mut held = held(Retention::Keep);
    assert!(held.detach(at(1_000), &id(1), &Cursor::first()));
    assert_eq!(held.next_deadline(), Some(at(16_000)));
    let cursor = held.resume(&id(1), 3).unwrap().cursor;
    // The reader that was replaced goes late, which is nothing to the other one.
    assert!(held.detach(at(2_000), &id(1), &Cursor::first()));
    assert_eq!(held.next_deadline(), None);
    assert!(held.detach(at(3_000), &id(1), &cursor));
    assert_eq!(held.expired(at(17_999)), None);
    assert_eq!(held.expired(at(18_000)), Some(id(1)));
    assert_eq!(held.expired(at(99_000)), None, "it is asked to end once");
    held.finish(at(18_010), &id(1), None, Ending::default());
    assert_eq!(held.next_deadline(), Some(at(78_010)));
}

// CLOUD-1564
#[test]
fn what_has_ended_goes_after_a_minute_and_what_runs_is_not_done() {
    let mut held = held(Retention::Keep);
    held.done(&id(1));
    assert!(held.contains(&id(1)));
    held.finish(at(5), &id(1), Some(piece(3, &["end"], "")), Ending::default());
    held.finish(at(6), &id(1), Some(piece(4, &["end"], "")), Ending::default());
    assert!(!held.detach(at(7), &id(1), &Cursor::first()), "nothing goes on");
    assert_eq!(held.expired(at(60_004)), None);
    assert!(held.has_ended(&id(1)));
    assert_eq!(held.expired(at(60_005)), None);
    assert!(!held.contains(&id(1)));
    assert_eq!(held.bytes(), 0);
}

// CLOUD-1568
#[test]
fn who_leaves_waits_two_seconds_for_what_has_ended_to_be_done() {
    let mut held = held(Retention::Keep);
    assert!(!held.awaits_done(at(0)), "what runs is waited for by others");
    held.finish(at(5), &id(1), None, Ending::default());
    assert!(held.awaits_done(at(2_004)) && !held.awaits_done(at(2_005)));
    held.done(&id(1));
    assert!(!held.awaits_done(at(6)));
}

// CLOUD-1565
#[test]
fn beyond_the_bound_the_oldest_that_has_ended_and_is_not_read_goes_first_and_then_nothing_new_comes() {
    let mut held = Held::default();
    held.set_bound(10_000);
    for n in 1..=3 {
        held.begin(id(n), start(Retention::Keep));
        held.append(at(0), &id(n), large(3, 2_000)).unwrap();
    }
    for (now, n) in [(2, 2), (1, 3)] {
        held.finish(at(now), &id(n), None, Ending::default());
        held.detach(at(now), &id(n), &Cursor::first());
    }
    assert!(!held.is_full());
    held.append(at(3), &id(1), large(4, 3_000)).unwrap();
    assert!(held.contains(&id(2)) && !held.contains(&id(3)));
    assert_eq!(held.take_removed().len(), 1, "to be freed by whoever has the time");
    held.append(at(3), &id(1), large(5, 9_000)).unwrap();
    assert!(held.contains(&id(1)) && !held.contains(&id(2)), "what runs stays");
    assert!(held.is_full());
    // What ends beyond the bound is not gone before its reader has had it.
    held.finish(at(4), &id(1), Some(piece(6, &["end"], "")), Ending::default());
    assert!(held.is_full());
    assert!(read(&mut held, 1, &mut Cursor::first()).ends_with("end"));
    assert!(!held.is_full() && !held.contains(&id(1)), "what was read to its end makes room at once");
    // So does what nobody reads any more.
    held.begin(id(4), start(Retention::Keep));
    held.append(at(5), &id(4), large(3, 12_000)).unwrap();
    held.finish(at(6), &id(4), None, Ending::default());
    assert!(held.contains(&id(4)));
    held.detach(at(7), &id(4), &Cursor::first());
    assert!(!held.contains(&id(4)) && held.bytes() == 0);
}

// CLOUD-1565
#[test]
fn a_reader_that_comes_again_keeps_what_has_ended_from_making_room() {
    let mut held = held(Retention::Keep);
    held.set_bound(1_000);
    held.append(at(0), &id(1), large(3, 2_000)).unwrap();
    held.finish(at(1), &id(1), None, Ending::default());
    held.set_bound(10_000);
    held.detach(at(1), &id(1), &Cursor::first());
    let mut cursor = held.resume(&id(1), 3).unwrap().cursor;
    held.set_bound(1_000);
    held.begin(id(2), start(Retention::Keep));
    assert!(held.contains(&id(1)));
    assert_eq!(read(&mut held, 1, &mut cursor).len(), 2_000);
    assert!(!held.contains(&id(1)));
}

// CLOUD-1565
#[test]
fn memory_that_a_piece_takes_beyond_its_bytes_is_counted() {
    let mut held = held(Retention::Keep);
    let mut bytes = Vec::with_capacity(5_000);
    bytes.push(b'x');
    let taken = bytes.capacity();
    held.append(at(0), &id(1), Piece::new(3, bytes, Ends::default())).unwrap();
    assert_eq!(held.bytes(), ATTEMPT_BYTES + taken + PIECE_BYTES);
}

// CLOUD-1565
#[test]
fn a_request_takes_room_until_its_engine_has_it_or_it_has_ended() {
    let mut held = Held::default();
    held.set_bound(10_000);
    for (attempt, ends) in [(1, false), (2, true)] {
        held.begin(id(attempt), start(Retention::Keep));
        held.count_payload(&id(attempt), 9_500);
        assert!(held.is_full(), "of attempt {attempt}");
        if ends {
            held.finish(at(1), &id(attempt), None, Ending::default());
        } else {
            held.count_payload(&id(attempt), 0);
        }
        assert!(!held.is_full(), "of attempt {attempt}");
        assert_eq!(held.bytes(), 512, "of attempt {attempt}");
        held.remove(&id(attempt));
    }
}

proptest! {
    // CLOUD-1560
    // CLOUD-1565
    #[test]
    fn readers_that_come_and_go_see_each_record_once_and_the_books_balance(
        steps in prop::collection::vec((0_u8..5, 0_usize..4), 0..120),
        attached in any::<bool>(),
    ) {
        let mut held = Held::default();
        let retention = if attached { Retention::Attached } else { Retention::Keep };
        held.begin(id(1), start(retention));
        let (mut cursor, mut next, mut seen) = (Cursor::first(), 3_u64, String::new());
        let mut written = String::new();
        for (now, (what, n)) in (0..).zip(steps) {
            match what {
                0 | 1 => {
                    let frames: Vec<String> = (0..n as u64).map(|i| format!("[{}]", next + i)).collect();
                    let frames: Vec<&str> = frames.iter().map(String::as_str).collect();
                    written.push_str(&frames.concat());
                    held.append(at(now), &id(1), piece(next, &frames, "")).unwrap();
                    next += n as u64;
                }
                2 => if let Taken::Bytes(bytes) = held.take(&id(1), &mut cursor) {
                    seen.push_str(std::str::from_utf8(&bytes).unwrap());
                },
                3 => held.count_payload(&id(1), n),
                _ => {
                    held.detach(at(now), &id(1), &cursor);
                    let from = 3 + seen.matches('[').count() as u64;
                    cursor = held.resume(&id(1), from).unwrap().cursor;
                }
            }
            let entry = &held.entries[&id(1)];
            let pieces: usize = entry.pieces.iter().map(Piece::cost).sum();
            prop_assert_eq!(held.bytes(), ATTEMPT_BYTES + entry.payload + pieces);
        }
        seen.push_str(&read(&mut held, 1, &mut cursor));
        prop_assert_eq!(seen, written);
        held.remove(&id(1));
        prop_assert_eq!((held.bytes(), held.next_deadline()), (0, None));
    }
}
