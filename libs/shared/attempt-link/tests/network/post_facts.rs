//! The control plane's end: what goes up, and what comes of an attempt.

use attempt_link::content::{End, Position};
use attempt_link::control::{
    Action, ConnectionEnd, DuplicateStart, Interrupted, LaneState, Lost, PostOutcome, PostRequest,
};
use attempt_link::records::{Kind, RecordHead};
use attempt_link::wire::{ControlAnswer, MAX_LINE_BYTES, read_single, read_starts};
use pool_registry_types::{ErrorBody, ErrorCode, TaskId};
use uuid::Uuid;

use crate::lane::{BOOT, Lane, accepted, alive, hello, id, json, secs};
use crate::ops::start;

// CLOUD-2621
#[test]
fn one_post_of_starts_is_under_way_and_the_next_takes_what_is_ready_up_to_its_bounds() {
    let mut lane = Lane::up();
    lane.start(1);
    let (post, body) = lane.starts();
    assert_eq!(body.start.len(), 1);
    (2..100).for_each(|number| lane.start(number));
    assert!(lane.posts().is_empty());
    lane.end(post, PostOutcome::Answered(ControlAnswer::default()));
    let (post, body) = lane.starts();
    assert_eq!(body.start.len(), 16, "what a node takes in one turn");
    let numbers: Vec<u64> = body.start.iter().map(|start| start.as_ref().unwrap().facts.number).collect();
    assert!(numbers.is_sorted() && numbers[0] > 1);
    for number in 100..110 {
        lane.lane.start(lane.at(), start(number, &"x".repeat(50_000))).unwrap();
    }
    lane.take();
    let mut posts = vec![post];
    let counts = std::iter::from_fn(|| {
        lane.end(posts.pop()?, PostOutcome::Answered(ControlAnswer::default()));
        let (post, body) = lane.starts();
        posts.push(post);
        Some(body.start.len())
    });
    let counts: Vec<usize> = counts.take(6).collect();
    assert_eq!(counts, [16, 16, 16, 16, 16, 2 + 5], "the last one has 256 KiB");
    let post = posts[0];
    lane.cancel(id(1));
    assert_eq!(lane.control().1.cancel, [id(1)], "control does not wait for starts");
    lane.end(post, PostOutcome::Answered(ControlAnswer::default()));
    assert_eq!(lane.starts().1.start.len(), 5);
}

// CLOUD-2605
#[test]
fn a_large_payload_goes_alone_and_holds_up_no_others() {
    let mut lane = Lane::up();
    lane.lane.start(lane.at(), start(1, &"x".repeat(70_000))).unwrap();
    lane.start(2);
    let posts = lane.posts();
    let [(_, PostRequest::Single { attempt, body }), (_, PostRequest::Starts(_))] = posts.as_slice() else {
        panic!("{posts:?}")
    };
    let read = read_single(&body.concat().into()).unwrap();
    assert_eq!((*attempt, read.start.unwrap().payload), (id(1), start(1, &"x".repeat(70_000)).payload));
}

// CLOUD-2605
#[test]
fn a_payload_that_is_no_json_goes_alone_and_one_that_can_be_written_for_no_post_is_refused() {
    let mut lane = Lane::up();
    let mut broken = start(1, "hello");
    broken.payload = "1},{\"number\":9".into();
    lane.lane.start(lane.at(), broken.clone()).unwrap();
    lane.take();
    let posts = lane.posts();
    let [(_, PostRequest::Single { body, .. })] = posts.as_slice() else { panic!("{posts:?}") };
    assert_eq!(read_single(&body.concat().into()).unwrap().start.unwrap().payload, broken.payload);
    let mut long = start(2, "hello");
    long.facts.traceparent = "x".repeat(MAX_LINE_BYTES);
    lane.lane.start(lane.at(), long).unwrap();
    lane.take();
    let refused = |action: &Action| matches!(action, Action::Refused { attempt, .. } if *attempt == id(2));
    assert!(lane.actions.iter().any(refused) && lane.posts().is_empty());
    assert_eq!(lane.lane.attempts(), 1);
}

// CLOUD-2623
#[test]
fn a_post_is_given_up_two_seconds_after_its_last_byte_or_five_without_one_and_its_starts_are_asked_for() {
    let mut lane = Lane::up();
    lane.start(1);
    let (post, _) = lane.starts();
    lane.sent(post);
    lane.pass(1_999);
    assert!(!lane.did(&Action::AbandonPost { id: post }));
    lane.pass(1);
    assert!(lane.did(&Action::AbandonPost { id: post }));
    let (_, body) = lane.control();
    assert_eq!((body.resume.len(), body.resume[0].from), (1, 0));
    let mut lane = Lane::up();
    lane.start(1);
    let (post, _) = lane.starts();
    lane.pass(3_000);
    lane.lane.post_progress(lane.at(), post);
    lane.pass(4_999);
    assert!(!lane.did(&Action::AbandonPost { id: post }));
    lane.pass(1);
    assert!(lane.did(&Action::AbandonPost { id: post }));
}

// CLOUD-2620
#[test]
fn a_start_that_the_link_has_answered_is_not_asked_for_whatever_became_of_its_post() {
    let mut lane = Lane::up();
    lane.start(1);
    let (post, body) = lane.starts();
    lane.receive(1, accepted(body.start[0].as_ref().unwrap().facts.number));
    lane.end(post, PostOutcome::Broken);
    assert!(lane.posts().iter().all(|(_, request)| !matches!(request, PostRequest::Control(_))));
}

// CLOUD-2624
#[test]
fn a_start_that_never_came_is_free_once_and_the_next_of_its_task_here_is_not() {
    let mut lane = Lane::up();
    for (attempt, again) in [(1, false), (2, true)] {
        let mut start = start(attempt, "hello");
        start.facts.task_id = TaskId(Uuid::from_u128(50));
        lane.lane.start(lane.at(), start).unwrap();
        lane.take();
        lane.pass(500);
        let (post, _) = lane.starts();
        lane.end(post, PostOutcome::Broken);
        let (post, _) = lane.control();
        let answer = ControlAnswer { unknown: vec![id(attempt)], gone: Vec::new() };
        lane.end(post, PostOutcome::Answered(answer));
        assert!(lane.did(&Action::Unknown { attempt: id(attempt), again }), "{again}");
    }
}

// CLOUD-2632
#[test]
fn an_attempt_that_is_not_held_from_where_it_is_wanted_is_gone() {
    let mut lane = Lane::up();
    lane.running(1, 1);
    lane.closed(1, ConnectionEnd::Broken);
    lane.receive(2, hello(BOOT));
    let (post, _) = lane.control();
    lane.end(post, PostOutcome::Answered(ControlAnswer::default()));
    lane.lane.may_resume(lane.at());
    lane.take();
    let (post, _) = lane.control();
    let answer = ControlAnswer { unknown: Vec::new(), gone: vec![id(1)] };
    lane.end(post, PostOutcome::Answered(answer));
    assert!(lane.did(&Action::Gone { attempt: id(1) }));
    assert_eq!(lane.lane.attempts(), 0);
}

// CLOUD-2625
#[test]
fn a_task_cancelled_while_its_start_waits_was_never_sent() {
    let mut lane = Lane::up();
    lane.start(1);
    let (post, _) = lane.starts();
    lane.start(2);
    lane.cancel(id(2));
    assert!(lane.did(&Action::NeverSent { attempt: id(2) }));
    lane.cancel(id(1));
    assert_eq!(lane.control().1.cancel, [id(1)], "of that one nobody knows");
    lane.end(post, PostOutcome::Answered(ControlAnswer::default()));
    assert!(lane.posts().is_empty());
}

// CLOUD-2626
#[test]
fn another_status_than_200_is_the_nodes_and_its_starts_are_asked_for() {
    let mut lane = Lane::up();
    lane.start(1);
    let (post, _) = lane.starts();
    lane.end(post, PostOutcome::Status(500));
    assert!(lane.did(&Action::PostStatus { status: 500 }));
    assert_eq!(lane.control().1.resume.len(), 1);
    assert_eq!(lane.lane.attempts(), 1);
}

// CLOUD-2626
#[test]
fn a_post_without_a_connection_was_not_sent_and_its_starts_wait() {
    let mut lane = Lane::up();
    lane.start(1);
    let (post, _) = lane.starts();
    lane.end(post, PostOutcome::NotSent);
    assert!(lane.did(&Action::CannotConnect) && lane.posts().is_empty());
    lane.pass(500);
    assert_eq!(lane.starts().1.start.len(), 1);
}

// CLOUD-2627
#[test]
fn starts_of_a_stale_post_were_not_read_and_go_under_the_present_link() {
    let mut lane = Lane::up();
    lane.start(1);
    let (old, body) = lane.starts();
    let number = body.start[0].as_ref().unwrap().facts.number;
    lane.closed(1, ConnectionEnd::Broken);
    lane.receive(2, hello(BOOT));
    lane.answer_all();
    lane.end(old, PostOutcome::Stale);
    let (_, body) = lane.starts();
    let start = body.start[0].as_ref().unwrap();
    assert_eq!((body.key.n, start.facts.attempt_id), (2, id(1)));
    assert!(start.facts.number > number, "a number is never used again");
    assert_eq!(lane.lane.state(), LaneState::Up, "it is evidence against nobody");
}

// CLOUD-2621
#[test]
fn a_post_of_an_older_link_that_comes_to_nothing_does_not_hold_up_the_starts_of_this_one() {
    for given_up in [true, false] {
        let mut lane = Lane::up();
        lane.start(1);
        let (old, _) = lane.starts();
        lane.sent(old);
        lane.closed(1, ConnectionEnd::Broken);
        lane.receive(2, hello(BOOT));
        lane.answer_all();
        if given_up {
            lane.pass(2_000);
            assert!(lane.did(&Action::AbandonPost { id: old }));
            lane.answer_all();
        } else {
            lane.end(old, PostOutcome::NotSent);
            let (_, body) = lane.starts();
            assert_eq!(body.start.len(), 1, "what was not sent goes under this link at once");
            lane.answer_all();
            continue;
        }
        lane.start(2);
        assert_eq!(lane.starts().1.start.len(), 1);
    }
}

// CLOUD-2628
#[test]
fn a_stop_that_could_not_be_delivered_goes_in_the_first_control_post_of_the_next_link() {
    let mut lane = Lane::up();
    lane.running(1, 1);
    lane.running(2, 1);
    lane.closed(1, ConnectionEnd::Broken);
    lane.cancel(id(1));
    assert!(lane.posts().is_empty());
    lane.receive(2, hello(BOOT));
    let (post, body) = lane.control();
    assert_eq!((body.cancel, body.resume.len()), (vec![id(1)], 0));
    lane.end(post, PostOutcome::Broken);
    lane.pass(500);
    let again = lane.posts().into_iter().filter_map(|(_, request)| match request {
        PostRequest::Control(body) => Some(body.cancel),
        _ => None,
    });
    assert_eq!(again.collect::<Vec<_>>(), [[id(1)]], "until it is answered");
}

// CLOUD-2630
#[test]
fn frames_that_came_before_are_dropped_and_a_gap_asks_for_the_attempt_anew() {
    let mut lane = Lane::up();
    let number = lane.running(1, 1);
    lane.frames(number, 0, 3);
    lane.frames(number, 1, 2);
    lane.frames(number, 2, 3);
    let handed = lane.actions.iter().filter_map(|action| match action {
        Action::Frames { first, count, .. } => Some((*first, *count)),
        _ => None,
    });
    assert_eq!(handed.collect::<Vec<_>>(), [(0, 3), (2, 3)], "what straddles is handed on");
    lane.frames(number, 7, 1);
    let (_, body) = lane.control();
    assert_eq!((body.resume[0].from, lane.lane.taken(&id(1))), (5, Some(5)));
    lane.frames(number, 5, 1);
    assert_eq!(lane.lane.taken(&id(1)), Some(5), "its old number is nobody's");
    assert_eq!(lane.lane.dropped_records(), 1);
    lane.receive(1, accepted(number));
    assert!(!lane.did(&Action::Resumed { attempt: id(1) }));
    lane.receive(1, accepted(body.resume[0].number));
    lane.frames(body.resume[0].number, 5, 1);
    assert_eq!(lane.lane.taken(&id(1)), Some(6));
}

// CLOUD-2630
#[test]
fn an_attempt_that_brings_nothing_but_gaps_is_given_up() {
    let mut lane = Lane::up();
    let mut number = lane.running(1, 1);
    for _ in 0..3 {
        lane.frames(number, 7, 1);
        let (post, body) = lane.control();
        number = body.resume[0].number;
        lane.end(post, PostOutcome::Answered(ControlAnswer::default()));
        lane.receive(1, accepted(number));
    }
    lane.frames(number, 7, 1);
    assert!(lane.did(&Action::Lost { attempt: id(1), reason: Lost::Unusable }));
}

// CLOUD-2631
#[test]
fn an_end_counts_behind_the_last_frame_only() {
    let mut lane = Lane::up();
    let number = lane.running(1, 1);
    lane.frames(number, 0, 3);
    lane.receive(1, json(Kind::End, number, 4, &End { report_seq: 9 }));
    let (_, body) = lane.control();
    assert_eq!(body.resume[0].from, 3);
    let number = body.resume[0].number;
    lane.receive(1, accepted(number));
    lane.frames(number, 3, 1);
    lane.receive(1, json(Kind::End, number, 4, &End { report_seq: 9 }));
    assert!(lane.did(&Action::Ended { attempt: id(1), report_seq: 9 }));
}

// CLOUD-2631
#[test]
fn an_end_that_lies_before_what_was_taken_is_a_bad_record_and_no_end() {
    let mut lane = Lane::up();
    let number = lane.running(1, 1);
    lane.frames(number, 0, 3);
    lane.receive(1, json(Kind::End, number, 2, &End { report_seq: 9 }));
    assert!(lane.did(&Action::Interrupted { reason: Interrupted::BadRecord }));
    assert_eq!(lane.lane.taken(&id(1)), Some(3));
}

// CLOUD-2630
#[test]
fn an_attempt_that_is_named_again_each_time_it_was_asked_for_is_of_use() {
    let mut lane = Lane::up();
    let mut number = lane.running(1, 1);
    for _ in 0..6 {
        lane.receive(1, alive(&[]));
        let (post, body) = lane.control();
        number = body.resume[0].number;
        lane.end(post, PostOutcome::Answered(ControlAnswer::default()));
        lane.receive(1, accepted(number));
        lane.receive(1, alive(&[(number, 0)]));
        assert_eq!(lane.lane.attempts(), 1);
        lane.now += 1_000;
    }
    assert_ne!(number, 1);
}

// CLOUD-2620
#[test]
fn a_second_start_of_an_attempt_is_an_error_and_touches_nothing_of_the_first() {
    let mut lane = Lane::up();
    let number = lane.running(1, 1);
    assert_eq!(lane.lane.start(lane.at(), start(1, "hello")), Err(DuplicateStart(id(1))));
    lane.take();
    assert!(lane.actions.is_empty(), "{:?}", lane.actions);
    lane.frames(number, 0, 1);
    assert_eq!(lane.lane.taken(&id(1)), Some(1));
}

// CLOUD-2643
// CLOUD-2664
#[test]
fn an_error_is_told_once_and_once_more_where_its_stream_goes_on_and_a_silence_once() {
    let mut lane = Lane::up();
    let number = lane.running(1, 1);
    let error = ErrorBody::new(ErrorCode::WorkerReset, "the engine died");
    for _ in 0..2 {
        lane.receive(1, json(Kind::Error, number, 0, &error));
    }
    lane.receive(1, json(Kind::End, number, 2, &End { report_seq: 9 }));
    let (post, body) = lane.control();
    lane.end(post, PostOutcome::Answered(ControlAnswer::default()));
    lane.receive(1, accepted(body.resume[0].number));
    for _ in 0..2 {
        lane.receive(1, json(Kind::Error, body.resume[0].number, 0, &error));
    }
    let count = |lane: &Lane, of: &dyn Fn(&Action) -> bool| lane.actions.iter().filter(|one| of(one)).count();
    assert_eq!(count(&lane, &|action| matches!(action, Action::Error { .. })), 2);
    for _ in 0..15 {
        lane.now += 1_000;
        lane.receive(1, alive(&[]));
        for (post, request) in lane.posts() {
            lane.end(post, PostOutcome::Answered(ControlAnswer::default()));
            if let PostRequest::Control(body) = request {
                body.resume.iter().for_each(|order| lane.receive(1, accepted(order.number)));
            }
        }
    }
    assert_eq!(count(&lane, &|action| matches!(action, Action::Silent { .. })), 1);
}

// CLOUD-2603
#[test]
fn with_its_number_go_the_parts_of_an_attempt() {
    let mut lane = Lane::up();
    let number = lane.running(1, 1);
    let head = RecordHead { more: true, ..RecordHead::new(Kind::Frames, number, 0, 1) };
    let mut bytes = Vec::new();
    head.write_one(&mut bytes, b"half of a frame").unwrap();
    lane.receive(1, bytes);
    assert_eq!(lane.lane.held_bytes(), 15);
    lane.cancel(id(1));
    assert_eq!(lane.lane.held_bytes(), 0);
}

// CLOUD-2614
#[test]
fn a_bad_record_closes_the_link_and_a_node_that_writes_nothing_else_is_of_no_use() {
    let mut lane = Lane::up();
    lane.running(1, 1);
    let mut n = 1;
    for _ in 0..4 {
        lane.receive(n, vec![0xff; 40]);
        assert!(lane.did(&Action::Interrupted { reason: Interrupted::BadRecord }));
        lane.pass(500);
        n = *lane.dials().last().unwrap();
        lane.receive(n, hello(BOOT));
        assert_eq!(lane.lane.attempts(), 1);
    }
    lane.receive(n, vec![0xff; 40]);
    assert!(lane.did(&Action::Lost { attempt: id(1), reason: Lost::Unusable }));
}

// CLOUD-2640
#[test]
fn what_was_seen_goes_up_every_two_seconds_while_attempts_run_and_not_else() {
    let mut lane = Lane::up();
    lane.pass(secs(20));
    assert!(lane.posts().is_empty());
    let number = lane.running(1, 1);
    lane.frames(number, 0, 5);
    lane.pass(1_999);
    lane.receive(1, alive(&[(number, 5)]));
    assert!(lane.posts().is_empty());
    lane.pass(1);
    let (post, body) = lane.starts();
    assert_eq!(body.seen, [Position { number, next: 5 }]);
    lane.end(post, PostOutcome::Answered(ControlAnswer::default()));
    lane.receive(1, alive(&[(number, 5)]));
    lane.pass(secs(2));
    assert_eq!(lane.starts().1.seen, [], "empty if need be");
}

// CLOUD-2640
#[test]
fn what_was_seen_goes_with_no_start_before_its_two_seconds() {
    let mut lane = Lane::up();
    let number = lane.running(1, 1);
    lane.frames(number, 0, 5);
    lane.start(2);
    let (post, body) = lane.starts();
    assert_eq!((body.start.len(), body.seen.len()), (1, 0));
    lane.end(post, PostOutcome::Answered(ControlAnswer::default()));
    lane.pass(1_999);
    lane.receive(1, alive(&[(number, 5)]));
    assert!(lane.posts().is_empty());
    lane.pass(1);
    assert_eq!(lane.starts().1.seen.len(), 1, "a start does not put it off");
}

// CLOUD-2640
#[test]
fn what_is_done_beyond_what_is_kept_is_let_go_by_the_node_alone() {
    let mut lane = Lane::dialling();
    for number in 0..70_000 {
        lane.lane.done(lane.at(), id(number));
    }
    lane.receive(1, hello(BOOT));
    let mut done = Vec::new();
    loop {
        let bodies: Vec<_> = lane.posts();
        if bodies.is_empty() {
            break;
        }
        for (post, request) in bodies {
            if let PostRequest::Starts(body) = request {
                done.extend(read_starts(&body).unwrap().done);
            }
            lane.end(post, PostOutcome::Answered(ControlAnswer::default()));
        }
        lane.pass(1);
    }
    assert_eq!((done.len(), done.last()), (64 * 1024, Some(&id(69_999))));
}

// CLOUD-2640
#[test]
fn what_is_done_goes_up_within_half_a_second_and_again_when_it_may_not_have_come() {
    let mut lane = Lane::up();
    lane.lane.done(lane.at(), id(1));
    lane.pass(500);
    let (post, body) = lane.starts();
    assert_eq!(body.done, [id(1)]);
    lane.end(post, PostOutcome::Broken);
    lane.pass(500);
    assert_eq!(lane.starts().1.done, [id(1)]);
}

// CLOUD-2641
#[test]
fn orders_that_do_not_arrive_for_five_seconds_while_the_link_lives_are_evidence_that_an_answer_lifts() {
    let mut lane = Lane::up();
    let number = lane.running(1, 1);
    let mut last = None;
    for second in 0..8 {
        lane.receive(1, alive(&[(number, 0)]));
        lane.pass(secs(1));
        last = lane.posts().pop().map(|(id, _)| id).or(last);
        assert_eq!(lane.actions.contains(&Action::OrdersDoNotArrive), second >= 6, "{second}");
    }
    lane.end(last.unwrap(), PostOutcome::Answered(ControlAnswer::default()));
    assert!(lane.did(&Action::OrdersArrive));
}

// CLOUD-2642
#[test]
fn an_attempt_that_has_more_than_comes_for_two_seconds_is_asked_for_anew() {
    let mut lane = Lane::up();
    let number = lane.running(1, 1);
    lane.frames(number, 0, 2);
    for second in 0..3 {
        assert!(lane.posts().iter().all(|(_, post)| !matches!(post, PostRequest::Control(_))), "{second}");
        lane.receive(1, alive(&[(number, 3)]));
        lane.now += 1_000;
    }
    assert_eq!(lane.control().1.resume[0].from, 2);
}

// CLOUD-2643
#[test]
fn an_attempt_that_is_not_named_any_more_is_asked_for_once_and_silent_after_ten_seconds() {
    let silent = Action::Silent { attempt: id(1) };
    let mut lane = Lane::up();
    let number = lane.running(1, 1);
    lane.receive(1, alive(&[(number, 0)]));
    lane.now += 1_000;
    lane.receive(1, alive(&[]));
    let (_, body) = lane.control();
    lane.receive(1, accepted(body.resume[0].number));
    for _ in 0..8 {
        lane.now += 1_000;
        lane.receive(1, alive(&[]));
        assert!(!lane.did(&silent));
        assert!(lane.posts().iter().all(|(_, post)| !matches!(post, PostRequest::Control(_))), "once");
    }
    lane.now += 1_000;
    lane.receive(1, alive(&[]));
    assert!(lane.did(&silent));
}

// CLOUD-2640
#[test]
fn a_deadline_goes_up_as_what_is_left_of_it() {
    let mut lane = Lane::up();
    lane.closed(1, ConnectionEnd::Broken);
    lane.start(1);
    lane.pass(secs(1));
    let n = *lane.dials().last().unwrap();
    lane.receive(n, hello(BOOT));
    let (_, body) = lane.starts();
    assert_eq!(body.start[0].as_ref().unwrap().facts.deadline_ms, Some(599_000));
}
