//! The control plane's end: when a link is up, and when it is not.

use attempt_link::content::{Bye, ByeReason};
use attempt_link::control::{Action, ConnectionEnd, ControlLane, Interrupted, LaneState, Lost, PostOutcome};
use attempt_link::records::Kind;
use attempt_link::wire::{ControlAnswer, LifeId};
use pool_registry_types::{BootId, Moment};
use uuid::Uuid;

use crate::lane::{BOOT, Lane, accepted, alive, hello, id, json, secs};

// CLOUD-2615
#[test]
fn the_first_hello_wins_the_other_dials_are_closed_and_a_post_names_it_at_once() {
    let mut lane = Lane::dialling();
    assert_eq!(lane.dials(), [1]);
    lane.pass(600);
    assert_eq!(lane.dials(), [1, 2]);
    lane.receive(2, hello(BOOT));
    assert!(lane.did(&Action::Close { n: 1 }) && lane.did(&Action::Connected));
    let (_, body) = lane.control();
    assert_eq!((body.n, body.lane, body.cancel.len(), body.resume.len()), (2, 3, 0, 0));
    lane.receive(1, hello(BOOT));
    assert_eq!(lane.lane.state(), LaneState::Up);
    assert!(!lane.did(&Action::Connected), "the other one is nobody's");
}

// CLOUD-2614
#[test]
fn what_an_older_link_still_brings_is_nobodys() {
    let mut lane = Lane::up();
    let number = lane.running(1, 1);
    lane.closed(1, ConnectionEnd::Broken);
    lane.receive(2, hello(BOOT));
    lane.frames(number, 0, 3);
    lane.receive(1, vec![0xff; 40]);
    assert_eq!((lane.lane.taken(&id(1)), lane.lane.state()), (Some(0), LaneState::Up));
    assert_eq!(lane.lane.dropped_records(), 0, "it is not even read");
}

// CLOUD-2651
#[test]
fn a_broken_link_is_dialled_at_once_then_every_half_second_each_for_one_second() {
    let mut lane = Lane::up();
    lane.closed(1, ConnectionEnd::Broken);
    assert_eq!(lane.dials(), [2]);
    lane.pass(499);
    assert_eq!(lane.dials(), [2]);
    lane.pass(1);
    assert_eq!(lane.dials(), [2, 3]);
    lane.pass(500);
    assert!(lane.did(&Action::Close { n: 2 }));
    assert_eq!(lane.dials(), [2, 3, 4]);
    let mut open = 0_usize;
    lane.pass(secs(5));
    for action in &lane.actions {
        match action {
            Action::Dial(_) => open += 1,
            Action::Close { n } if *n > 2 => open -= 1,
            _ => {}
        }
        assert!(open <= 3, "three are under way at most");
    }
}

// CLOUD-2651
// CLOUD-2652
#[test]
fn a_link_that_says_hello_and_breaks_is_dialled_every_half_second_and_gives_nothing_more_time() {
    let lost = Action::Lost { attempt: id(1), reason: Lost::NotResumed };
    let mut lane = Lane::up();
    lane.running(1, 1);
    lane.closed(1, ConnectionEnd::Broken);
    let end = lane.now + secs(10);
    let mut dialled = 0;
    while lane.now < end {
        assert!(!lane.did(&lost), "at {}", lane.now);
        if let Some(n) = lane.dials().last().copied() {
            dialled += 1;
            lane.actions.clear();
            lane.receive(n, hello(BOOT));
            lane.closed(n, ConnectionEnd::Broken);
        }
        lane.pass(10);
    }
    assert!((19..=21).contains(&dialled), "{dialled} dials in ten seconds");
    lane.pass(secs(2));
    assert!(lane.did(&lost));
    assert!(lane.actions.contains(&Action::MoveQuiet) || lane.lane.attempts() == 0);
}

// CLOUD-2651
#[test]
fn a_link_that_the_node_does_not_know_or_writes_badly_is_dialled_half_a_second_after_the_dial_before() {
    for stale in [true, false] {
        let mut lane = Lane::dialling();
        lane.receive(1, hello(BOOT));
        let (post, _) = lane.control();
        lane.receive(1, alive(&[]));
        lane.actions.clear();
        match stale {
            true => lane.end(post, PostOutcome::Stale),
            false => lane.receive(1, vec![0xff; 40]),
        }
        lane.pass(499);
        assert!(lane.dials().is_empty(), "stale: {stale}");
        lane.pass(1);
        assert_eq!(lane.dials(), [2]);
    }
}

// CLOUD-2652
#[test]
fn a_link_that_says_hello_and_nothing_else_gives_what_ran_no_more_than_its_time() {
    let lost = Action::Lost { attempt: id(1), reason: Lost::NotResumed };
    for answers in [true, false] {
        let mut lane = Lane::up();
        lane.running(1, 1);
        lane.closed(1, ConnectionEnd::Broken);
        let since = lane.now;
        while lane.lane.attempts() > 0 {
            assert!(lane.now < since + secs(15), "answers: {answers}");
            if let Some(n) = lane.dials().last().copied() {
                lane.actions.retain(|action| !matches!(action, Action::Dial(_)));
                lane.receive(n, hello(BOOT));
            }
            if lane.did(&Action::WantResume) {
                lane.lane.may_resume(lane.at());
                lane.take();
            }
            if answers {
                lane.answer_all();
            }
            lane.pass(10);
        }
        assert!(lane.actions.contains(&lost));
    }
}

// CLOUD-2652
#[test]
fn the_last_dials_before_all_is_lost_are_waited_for_without_a_timer_that_is_due_for_ever() {
    let mut lane = Lane::up();
    lane.running(1, 1);
    lane.closed(1, ConnectionEnd::Broken);
    lane.now += 900;
    lane.lane.timer(lane.at());
    lane.pass(8_900);
    // The dial that is due at 9.9 s is thought of when it is too late for it.
    lane.now += 250;
    let mut turns = 0;
    while lane.lane.next_deadline() <= lane.at() {
        lane.lane.timer(lane.at());
        turns += 1;
        assert!(turns < 5, "the timer is due again at once");
    }
}

// CLOUD-2614
#[test]
fn a_lane_that_is_made_anew_in_one_life_goes_on_behind_the_one_before() {
    let mut before = Lane::up();
    before.closed(1, ConnectionEnd::Broken);
    let n = before.lane.last_n();
    let mut lane = ControlLane::new_after(before.at(), LifeId(Uuid::from_u128(1)), 3, BOOT, n);
    let Some(Action::Dial(query)) = lane.next_action() else { panic!("it dials") };
    assert_eq!((n, query.n), (2, 3));
}

// CLOUD-2660
#[test]
fn a_lane_that_is_closed_says_what_becomes_of_each_attempt() {
    let mut lane = Lane::up();
    lane.running(1, 1);
    lane.start(2);
    let (post, _) = lane.starts();
    lane.start(3);
    let left = lane.lane.close();
    let lost = |number| Action::Lost { attempt: id(number), reason: Lost::Closed };
    for expected in [
        Action::Close { n: 1 },
        lost(1),
        lost(2),
        Action::NeverSent { attempt: id(3) },
        Action::AbandonPost { id: post },
    ] {
        assert!(left.contains(&expected), "{expected:?} of {left:?}");
    }
    assert_eq!((left.len(), lane.lane.attempts(), lane.lane.state()), (5, 0, LaneState::None));
    assert_eq!(lane.lane.next_deadline(), Moment::NEVER);
}

// CLOUD-2650
#[test]
fn a_link_without_a_byte_is_interrupted_after_two_and_a_half_seconds_when_something_runs_and_25_when_not() {
    let silent = Action::Interrupted { reason: Interrupted::Silent };
    let mut lane = Lane::up();
    lane.pass(24_999);
    assert!(!lane.did(&silent));
    lane.pass(1);
    assert!(lane.did(&silent));
    let mut lane = Lane::up();
    lane.running(1, 1);
    lane.pass(2_499);
    assert!(!lane.did(&silent));
    lane.pass(1);
    assert!(lane.did(&silent));
}

// CLOUD-2650
#[test]
fn a_start_that_waits_for_its_answer_counts_from_its_post() {
    let silent = Action::Interrupted { reason: Interrupted::Silent };
    let mut lane = Lane::up();
    lane.pass(secs(20));
    lane.start(1);
    let (post, _) = lane.starts();
    lane.sent(post);
    assert!(lane.did(&Action::Sent { attempt: id(1) }));
    lane.end(post, PostOutcome::Answered(ControlAnswer::default()));
    lane.pass(2_499);
    assert!(!lane.did(&silent));
    lane.pass(1);
    assert!(lane.did(&silent));
}

// CLOUD-2650
#[test]
fn a_start_waits_on_while_it_is_asked_for_again() {
    let mut lane = Lane::up();
    lane.start(1);
    let (post, _) = lane.starts();
    lane.sent(post);
    lane.pass(2_000);
    let (post, body) = lane.control();
    assert_eq!(body.resume.len(), 1);
    lane.sent(post);
    lane.pass(500);
    assert!(lane.did(&Action::Interrupted { reason: Interrupted::Silent }), "counted from the start");
}

// CLOUD-2641
#[test]
fn what_did_not_arrive_before_another_post_was_answered_is_no_evidence() {
    let mut lane = Lane::up();
    lane.start(1);
    let (post, _) = lane.starts();
    lane.closed(1, ConnectionEnd::Broken);
    lane.receive(2, hello(BOOT));
    lane.answer_all();
    lane.pass(secs(2));
    lane.receive(2, alive(&[]));
    lane.answer_all();
    lane.pass(secs(3));
    assert!(lane.did(&Action::AbandonPost { id: post }));
    for _ in 0..10 {
        lane.receive(2, alive(&[]));
        lane.pass(secs(1));
        lane.answer_all();
    }
    assert!(!lane.did(&Action::OrdersDoNotArrive));
}

// CLOUD-2652
#[test]
fn what_ran_is_lost_ten_seconds_after_the_interruption_with_the_dials_that_were_under_way_then() {
    let lost = Action::Lost { attempt: id(1), reason: Lost::NotResumed };
    let mut lane = Lane::up();
    lane.running(1, 1);
    lane.closed(1, ConnectionEnd::Broken);
    lane.pass(secs(10) + 400);
    assert!(!lane.did(&lost), "a dial is under way");
    lane.pass(700);
    assert!(lane.did(&lost));
    lane.start(2);
    assert!(lane.did(&Action::NeverSent { attempt: id(2) }), "nobody waits for what is lost");
    lane.actions.clear();
    lane.pass(secs(4));
    assert!(!lane.dials().is_empty(), "it is dialled all the same");
}

// CLOUD-2652
#[test]
fn a_hello_in_time_takes_up_all_that_ran_with_one_post() {
    let mut lane = Lane::up();
    let first = lane.running(1, 1);
    lane.frames(first, 0, 4);
    lane.running(2, 1);
    lane.closed(1, ConnectionEnd::Broken);
    lane.pass(secs(9));
    let n = *lane.dials().last().unwrap();
    lane.actions.clear();
    lane.receive(n, hello(BOOT));
    assert!(lane.did(&Action::WantResume));
    let (_, body) = lane.control();
    assert_eq!(body.resume.len(), 0, "the thread's gate is asked first");
    lane.lane.may_resume(lane.at());
    lane.take();
    let (_, body) = lane.control();
    let orders: Vec<_> = body.resume.iter().map(|order| (order.attempt_id, order.from)).collect();
    assert_eq!(orders, [(id(1), 4), (id(2), 0)]);
    assert!(body.resume.iter().all(|order| order.number > first + 1), "numbers are never used again");
    for order in body.resume {
        lane.receive(n, accepted(order.number));
        assert!(lane.did(&Action::Resumed { attempt: order.attempt_id }));
    }
    assert!(lane.did(&Action::ResumeOver));
}

// CLOUD-2653
#[test]
fn what_loses_nothing_is_moved_at_a_refused_dial_or_after_three_quiet_seconds_with_a_failing_one() {
    let mut lane = Lane::up();
    lane.running(1, 1);
    lane.closed(1, ConnectionEnd::Broken);
    lane.closed(2, ConnectionEnd::Refused);
    assert!(lane.did(&Action::MoveQuiet));
    lane.pass(secs(2));
    assert!(!lane.did(&Action::MoveQuiet), "it is said once");
    let mut lane = Lane::up();
    lane.running(1, 1);
    lane.closed(1, ConnectionEnd::Broken);
    lane.pass(2_999);
    assert!(!lane.did(&Action::MoveQuiet), "a dial has failed, the quiet is short");
    lane.pass(1);
    assert!(lane.did(&Action::MoveQuiet));
}

// CLOUD-2654
#[test]
fn another_boot_ends_all_at_once() {
    let other = BootId(Uuid::from_u128(8));
    let mut lane = Lane::up();
    lane.running(1, 1);
    lane.closed(1, ConnectionEnd::Broken);
    lane.receive(2, hello(other));
    assert!(lane.did(&Action::OtherBoot { boot_id: Some(other) }));
    assert!(lane.did(&Action::Lost { attempt: id(1), reason: Lost::OtherBoot }));
    lane.actions.clear();
    lane.pass(secs(30));
    assert!(lane.dials().is_empty(), "it is not dialled before it registers");
    lane.lane.registered(lane.at(), other);
    lane.take();
    assert_eq!(lane.dials().len(), 1);
    assert!(!lane.did(&Action::OtherBoot { boot_id: Some(other) }), "it is said once");
}

// CLOUD-2654
#[test]
fn a_dial_that_is_answered_by_another_boot_without_a_hello_ends_all_at_once() {
    let mut lane = Lane::up();
    lane.running(1, 1);
    lane.closed(1, ConnectionEnd::Broken);
    lane.closed(2, ConnectionEnd::WrongBoot);
    assert!(lane.did(&Action::OtherBoot { boot_id: None }));
    assert!(lane.did(&Action::Lost { attempt: id(1), reason: Lost::OtherBoot }));
    lane.actions.clear();
    lane.pass(secs(30));
    assert!(lane.dials().is_empty(), "it is not dialled before it registers");
    lane.lane.registered(lane.at(), BootId(Uuid::from_u128(8)));
    lane.take();
    assert_eq!(lane.dials().len(), 1);
    assert!(lane.actions.iter().all(|action| !matches!(action, Action::OtherBoot { .. })), "said once");
}

// CLOUD-2651
#[test]
fn a_first_dial_that_breaks_is_followed_by_another_at_once() {
    let mut lane = Lane::up();
    lane.running(1, 1);
    lane.closed(1, ConnectionEnd::Broken);
    // The listener of a killed process took it before it went.
    lane.closed(2, ConnectionEnd::Broken);
    lane.pass(9);
    assert_eq!(lane.dials().last(), Some(&2));
    lane.pass(1);
    assert_eq!(lane.dials().last(), Some(&3));
    lane.closed(3, ConnectionEnd::Broken);
    lane.pass(499);
    assert_eq!(lane.dials().last(), Some(&3), "only the first one");
    lane.pass(1);
    assert_eq!(lane.dials().last(), Some(&4));
}

// CLOUD-2651
#[test]
fn a_node_that_does_not_know_yet_with_whom_it_is_registered_is_dialled_again_soon() {
    let mut lane = Lane::dialling();
    lane.closed(1, ConnectionEnd::Stale);
    lane.pass(50);
    assert_eq!(lane.dials(), [1, 2]);
    assert!(!lane.did(&Action::MoveQuiet));
    lane.closed(2, ConnectionEnd::Stale);
    lane.pass(secs(1));
    let before = lane.dials().len();
    lane.closed(*lane.dials().last().unwrap(), ConnectionEnd::Stale);
    lane.pass(450);
    assert!(lane.dials().len() <= before + 1, "a second after the registration it is one as any other");
}

// CLOUD-2641
#[test]
fn a_suspicion_is_lifted_where_nothing_more_goes_by_the_link() {
    let suspected = || {
        let mut lane = Lane::up();
        let number = lane.running(1, 1);
        while !lane.did(&Action::OrdersDoNotArrive) {
            lane.receive(1, alive(&[(number, 0)]));
            lane.pass(secs(1));
        }
        lane
    };
    let mut lane = suspected();
    lane.receive(1, json(Kind::Bye, 0, 0, &Bye { reason: ByeReason::Leaving }));
    assert!(lane.did(&Action::OrdersArrive));
    let mut lane = suspected();
    lane.lane.registered(lane.at(), BootId(Uuid::from_u128(8)));
    lane.take();
    assert!(lane.did(&Action::OrdersArrive));
}

// CLOUD-2655
#[test]
fn a_node_that_leaves_is_not_dialled_before_it_registers_again() {
    let mut lane = Lane::up();
    lane.running(1, 1);
    lane.receive(1, json(Kind::Bye, 0, 0, &Bye { reason: ByeReason::Leaving }));
    assert!(lane.did(&Action::Bye) && lane.did(&Action::Lost { attempt: id(1), reason: Lost::Left }));
    lane.pass(secs(30));
    assert_eq!((lane.dials().len(), lane.lane.state()), (0, LaneState::None));
    lane.lane.registered(lane.at(), BOOT);
    lane.take();
    assert_eq!((lane.dials().len(), lane.lane.state()), (1, LaneState::Connecting));
}

// CLOUD-2656
#[test]
fn a_credential_that_does_not_count_any_more_ends_a_link_and_no_attempt() {
    let mut lane = Lane::up();
    lane.running(1, 1);
    lane.receive(1, json(Kind::Bye, 0, 0, &Bye { reason: ByeReason::Credential }));
    assert_eq!(lane.dials(), [2]);
    lane.receive(2, hello(BOOT));
    assert_eq!(lane.lane.attempts(), 1);
    let mut lane = Lane::up();
    lane.running(1, 1);
    lane.start(2);
    let (post, _) = lane.starts();
    lane.end(post, PostOutcome::Status(401));
    assert_eq!(lane.dials(), [2], "a refused POST dials anew while the link goes on");
    assert!(lane.did(&Action::PostStatus { status: 401 }));
    assert_eq!(lane.lane.state(), LaneState::Up);
}

// CLOUD-2657
#[test]
fn a_node_that_lives_and_says_no_hello_for_three_seconds_has_no_link_until_it_registers() {
    let mut lane = Lane::dialling();
    lane.pass(secs(10));
    assert!(!lane.did(&Action::NoLink), "it may not live either");
    assert!(lane.actions.contains(&Action::ProbeLive));
    lane.actions.clear();
    lane.start(1);
    lane.actions.clear();
    let mut lane = Lane::dialling();
    lane.start(1);
    lane.pass(1_500);
    lane.lane.live_answered(lane.at());
    lane.pass(1_499);
    assert!(!lane.did(&Action::NoLink));
    lane.pass(1);
    assert!(lane.did(&Action::NoLink) && lane.did(&Action::NeverSent { attempt: id(1) }));
    let mut lane = Lane::up();
    lane.closed(1, ConnectionEnd::Broken);
    lane.lane.live_answered(lane.at());
    lane.pass(secs(20));
    assert!(!lane.did(&Action::NoLink), "one that has said hello is interrupted");
}

// CLOUD-2658
#[test]
fn after_a_stall_nothing_is_decided_before_what_has_arrived_was_read() {
    let mut lane = Lane::up();
    let number = lane.running(1, 1);
    lane.now += 8_000;
    lane.lane.timer(lane.at());
    lane.take();
    assert!(lane.did(&Action::ReadSockets));
    assert!(!lane.did(&Action::Interrupted { reason: Interrupted::Silent }));
    lane.receive(1, alive(&[(number, 0)]));
    lane.lane.timer(lane.at());
    lane.take();
    assert_eq!(lane.lane.state(), LaneState::Up);
    lane.now += 8_000;
    for _ in 0..2 {
        lane.lane.timer(lane.at());
        lane.take();
    }
    assert!(lane.did(&Action::Interrupted { reason: Interrupted::Silent }), "nothing had arrived");
}

// CLOUD-2658
#[test]
fn no_link_is_silent_before_its_socket_was_read_however_late_that_is_noticed() {
    let mut lane = Lane::up();
    let number = lane.running(1, 1);
    // The process stood still, and goes on just when the link would be silent.
    lane.now = lane.lane.next_deadline().as_millis().max(lane.now + 2_500);
    lane.lane.timer(lane.at());
    lane.take();
    assert!(lane.did(&Action::ReadSockets));
    assert_eq!(lane.lane.state(), LaneState::Up);
    // It stands still once more, before that was done.
    lane.now += 8_000;
    lane.lane.timer(lane.at());
    lane.take();
    assert!(lane.did(&Action::ReadSockets));
    lane.receive(1, alive(&[(number, 0)]));
    lane.lane.timer(lane.at());
    lane.take();
    assert_eq!(lane.lane.state(), LaneState::Up, "it had brought something");
}
