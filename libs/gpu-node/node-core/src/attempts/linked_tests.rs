//! Attempts on a link: records that are cut out of the pieces, and the window that moves with what was
//! seen.

use attempt_link::content::{AnswerHead, FrameTokens};
use attempt_link::node::Supply;
use pool_registry_types::{ErrorCode, LogId};
use proptest::prelude::*;
use uuid::Uuid;

use super::tests::{at, id, large, piece, start};
use super::*;

const LOG: LogId = LogId(Uuid::from_u128(9));

fn linked(retention: Retention) -> Held {
    let mut held = Held::default();
    held.begin(id(1), start(retention));
    held.link(&id(1), LOG, Cursor::first());
    held
}

fn resume(held: &mut Held, from: u64) -> Result<(), ResumeError> {
    let cursor = held.resume(&id(1), from)?.cursor;
    held.link(&id(1), LOG, cursor);
    Ok(())
}

fn tokens(total: u32, ids: &[u32]) -> FrameTokens {
    FrameTokens { total, ids: ids.to_vec() }
}

/// All that there is: the frames with their indices, the ids of their tokens, and how it stands.
fn supplied(held: &mut Held, most: usize) -> (Vec<String>, Supply) {
    let mut all = Vec::new();
    loop {
        match held.supply(&id(1), most) {
            Supply::Frames { first, count, bytes } => {
                all.push(format!("{first}+{count} {}", std::str::from_utf8(&bytes).unwrap()));
            }
            Supply::TokenIds { first, frames } => all.push(format!("{first} {frames:?}")),
            Supply::Error(error) => all.push(error.code.to_string()),
            other => return (all, other),
        }
    }
}

// CLOUD-2635
#[test]
fn a_piece_is_cut_at_ends_of_frames_and_a_longer_frame_goes_whole() {
    let mut held = linked(Retention::Keep);
    held.append(at(0), &id(1), piece(3, &["aaa", "bbb", "cccccccc", "d", "e"], " works")).unwrap();
    held.append(at(0), &id(1), piece(8, &[], "thought")).unwrap();
    held.append(at(0), &id(1), piece(8, &["f"], "")).unwrap();
    let (records, end) = supplied(&mut held, 6);
    assert_eq!(records, ["3+2 aaabbb", "5+1 cccccccc", "6+2 de", "8+0  works", "8+0 thought", "8+1 f"]);
    assert_eq!(end, Supply::Waiting);
}

// CLOUD-2631
#[test]
fn a_resume_brings_frames_their_ids_the_error_and_the_end_again() {
    let mut held = linked(Retention::Keep);
    // Of one frame the ids are not known.
    let brought = vec![(3, tokens(1, &[7])), (4, tokens(3, &[8, 9])), (6, tokens(5, &[1]))];
    let first = piece(3, &["a", "b", "c", "d"], "").with_tokens(brought);
    held.append(at(0), &id(1), first).unwrap();
    let error = ErrorBody::new(ErrorCode::WorkerReset, "the engine died");
    held.finish(at(1), &id(1), None, Ending { error: Some(error), report_seq: 12 });
    let ids = [
        format!("3 {:?}", [tokens(1, &[7]), tokens(3, &[8, 9])]),
        format!("6 {:?}", [tokens(5, &[1])]),
        format!("4 {:?}", [tokens(3, &[8, 9])]),
    ];
    let whole = (
        vec![ids[0].clone(), ids[1].clone(), "3+4 abcd".into(), "WORKER_RESET".into()],
        Supply::End { next: 7, report_seq: 12 },
    );
    assert_eq!(supplied(&mut held, 100), whole);
    assert_eq!(held.supply(&id(1), 100), Supply::Gone, "all was supplied");
    for _ in 0..2 {
        resume(&mut held, 4).unwrap();
        let rest = [ids[2].clone(), ids[1].clone(), "4+3 bcd".into(), "WORKER_RESET".into()];
        assert_eq!(supplied(&mut held, 100), (rest.to_vec(), whole.1.clone()));
    }
    held.done(&id(1));
    assert_eq!((held.bytes(), held.progress(&id(1))), (0, None));
}

// CLOUD-2640
// CLOUD-1561
#[test]
fn a_window_keeps_what_was_not_seen_and_holds_its_driver_back_until_more_was() {
    let mut held = linked(Retention::Unseen);
    held.append(at(0), &id(1), large(3, MAX_ATTEMPT_BYTES - 1)).unwrap();
    held.append(at(0), &id(1), piece(4, &["b", "c"], "")).unwrap();
    assert!(!held.has_room(&id(1)));
    assert!(!held.seen(&id(1), 4), "it was not even written");
    supplied(&mut held, 100);
    assert!(!held.seen(&id(1), 3) && !held.has_room(&id(1)), "handed over is not seen");
    assert!(held.seen(&id(1), 4) && held.has_room(&id(1)) && held.next_deadline().is_none());
    assert_eq!(resume(&mut held, 3), Err(ResumeError::Gone));
    resume(&mut held, 4).unwrap();
    assert_eq!(supplied(&mut held, 100).0, ["4+2 bc"]);
    held.seen(&id(1), 5);
    resume(&mut held, 5).unwrap();
    assert_eq!(supplied(&mut held, 100).0, ["5+1 c"]);
    held.finish(at(1), &id(1), Some(piece(6, &["end"], "")), Ending { error: None, report_seq: 8 });
    assert_eq!(supplied(&mut held, 100), (vec!["6+1 end".into()], Supply::End { next: 7, report_seq: 8 }));
    // Its end may be asked for until it is done.
    resume(&mut held, 7).unwrap();
    assert_eq!(supplied(&mut held, 100), (vec![], Supply::End { next: 7, report_seq: 8 }));
    assert!(held.has_ended(&id(1)));
}

// CLOUD-2640
#[test]
fn comments_behind_the_last_frame_that_was_seen_come_again() {
    let mut held = linked(Retention::Unseen);
    held.append(at(0), &id(1), piece(3, &["a"], "thought ")).unwrap();
    held.append(at(0), &id(1), piece(4, &[], "thought ")).unwrap();
    supplied(&mut held, 100);
    held.seen(&id(1), 4);
    resume(&mut held, 4).unwrap();
    held.seen(&id(1), 4);
    assert_eq!(supplied(&mut held, 100).0, ["4+0 thought ", "4+0 thought "]);
}

// CLOUD-2603
#[test]
fn what_a_link_cannot_carry_ends_the_attempt_behind_what_it_could() {
    let error = || ErrorBody::new(ErrorCode::Internal, "too long");
    for has_ended in [false, true] {
        let mut held = linked(Retention::Keep);
        let ids = vec![(3, tokens(1, &[1])), (5, tokens(2, &[2]))];
        held.append(at(0), &id(1), piece(3, &["a", "b", "c"], "works").with_tokens(ids)).unwrap();
        held.append(at(0), &id(1), piece(6, &["d"], "")).unwrap();
        let last = || Ending { error: None, report_seq: 4 };
        if has_ended {
            held.finish(at(1), &id(1), Some(piece(7, &["end"], "")), last());
        }
        held.fail(&id(1), 5, error());
        if !has_ended {
            held.append(at(1), &id(1), piece(7, &["e"], "")).unwrap();
            held.finish(at(1), &id(1), Some(piece(8, &["end"], "")), last());
        }
        let mut whole = vec![format!("3 {:?}", [tokens(1, &[1])]), "3+2 ab".into(), "INTERNAL".into()];
        let end = Supply::End { next: 5, report_seq: 4 };
        assert_eq!(supplied(&mut held, 100), (whole.clone(), end.clone()));
        resume(&mut held, 5).unwrap();
        assert_eq!(supplied(&mut held, 100), (whole.split_off(2), end));
        assert_eq!(resume(&mut held, 6), Err(ResumeError::Gone));
        held.done(&id(1));
        assert_eq!(held.bytes(), 0);
    }
}

// CLOUD-1563
#[test]
fn an_attempt_whose_link_is_lost_has_no_reader_and_one_that_was_read_to_its_end_needs_none() {
    let mut held = linked(Retention::Unseen);
    held.unlink(at(5), &id(1));
    assert_eq!((held.supply(&id(1), 9), held.next_deadline()), (Supply::Gone, Some(at(15_005))));
    resume(&mut held, 3).unwrap();
    assert_eq!((held.supply(&id(1), 9), held.next_deadline()), (Supply::Waiting, None));
    held.finish(at(6), &id(1), None, Ending::default());
    assert!(matches!(held.supply(&id(1), 9), Supply::End { .. }));
    held.unlink(at(7), &id(1));
    assert_eq!(held.detached_since(&id(1)), None);
}

// CLOUD-2834
#[test]
fn an_answer_that_is_no_event_stream_has_its_head_first_and_is_counted_in_bytes() {
    let mut held = linked(Retention::Unseen);
    let head = AnswerHead { status: 200, headers: vec![("content-type".into(), "application/json".into())] };
    held.set_head(&id(1), head.clone());
    let bytes = |first, text: &str| Piece::new(first, text.as_bytes().to_vec(), Ends::each_byte(text.len()));
    held.append(at(0), &id(1), bytes(3, "abcdefgh")).unwrap();
    assert_eq!(held.supply(&id(1), 5), Supply::Head(head.clone()));
    assert_eq!(supplied(&mut held, 5), (vec!["3+5 abcde".into(), "8+3 fgh".into()], Supply::Waiting));
    held.append(at(0), &id(1), bytes(11, "ij")).unwrap();
    resume(&mut held, 9).unwrap();
    held.seen(&id(1), 9);
    assert_eq!(held.supply(&id(1), 5), Supply::Head(head));
    assert_eq!(supplied(&mut held, 5).0, ["9+2 gh", "11+2 ij"]);
    held.fail(&id(1), 12, ErrorBody::new(ErrorCode::Internal, "too long"));
    resume(&mut held, 11).unwrap();
    held.supply(&id(1), 5);
    assert_eq!(supplied(&mut held, 5).0, ["11+1 i"]);
    held.finish(at(1), &id(1), None, Ending { error: None, report_seq: 8 });
    assert!(held.seen(&id(1), 12) && held.bytes() < ATTEMPT_BYTES + PIECE_BYTES);
}

proptest! {
    // CLOUD-2631
    // CLOUD-2640
    #[test]
    fn whatever_is_seen_and_resumed_each_frame_comes_with_its_index_and_its_ids(
        steps in prop::collection::vec((0_u8..6, 1_u64..6), 0..120),
        window in any::<bool>(),
    ) {
        let mut held = linked(if window { Retention::Unseen } else { Retention::Keep });
        let (mut made, mut taken, mut ids_to) = (3_u64, 3_u64, 3_u64);
        for (now, (what, n)) in (0..).zip(steps) {
            match what {
                0 | 1 => {
                    let frames: Vec<String> = (made..made + n).map(|index| format!("[{index:4}]")).collect();
                    let frames: Vec<&str> = frames.iter().map(String::as_str).collect();
                    let ids = (made..made + n).map(|index| (index, tokens(u32::try_from(index).unwrap(), &[])));
                    held.append(at(now), &id(1), piece(made, &frames, "").with_tokens(ids.collect())).unwrap();
                    made += n;
                }
                2 | 3 => match held.supply(&id(1), 15) {
                    Supply::Frames { first, count, bytes } => {
                        prop_assert!(first == taken && (1..=2).contains(&count), "{first}+{count} at {taken}");
                        let expected: String =
                            (first..first + u64::from(count)).map(|index| format!("[{index:4}]")).collect();
                        prop_assert_eq!(std::str::from_utf8(&bytes).unwrap(), expected);
                        taken += u64::from(count);
                        prop_assert!(ids_to >= taken, "ids come before their frames");
                    }
                    Supply::TokenIds { first, frames } => {
                        prop_assert_eq!(first, ids_to);
                        for frame in frames {
                            prop_assert_eq!(u64::from(frame.total), ids_to);
                            ids_to += 1;
                        }
                    }
                    other => prop_assert!(other == Supply::Waiting && taken == made),
                },
                4 => { held.seen(&id(1), taken.saturating_sub(n - 1)); }
                _ => {
                    held.unlink(at(now), &id(1));
                    resume(&mut held, taken).unwrap();
                    ids_to = taken;
                }
            }
            let entry = &held.entries[&id(1)];
            let pieces: usize = entry.pieces.iter().map(Piece::cost).sum();
            prop_assert_eq!(held.bytes(), ATTEMPT_BYTES + pieces);
        }
        held.remove(&id(1));
        prop_assert_eq!((held.bytes(), held.next_deadline()), (0, None));
    }
}
