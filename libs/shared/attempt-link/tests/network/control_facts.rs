//! The control plane's end, rule by rule.

use std::time::Duration;

use attempt_link::content::{Acceptance, Bye, ByeReason, End, Hello, Position, write_positions};
use attempt_link::control::{
    Action, ConnectionEnd, ControlLane, Interrupted, LaneState, Lost, PostId, PostOutcome, PostRequest,
};
use attempt_link::wire::{ControlAnswer, ControlBody, LifeId, StartsBody, read_single, read_starts};
use attempt_link::{Kind, RecordHead};
use pool_registry_types::{AttemptId, BootId, Moment, NodeId, ReplicaId};
use serde::Serialize;
use uuid::Uuid;

use crate::world::start;

const BOOT: BootId = BootId(Uuid::from_u128(7));

/// A lane, its time, and what it asked for and was not looked at.
struct Lane {
    lane: ControlLane,
    now: u64,
    actions: Vec<Action>,
}

fn id(number: u128) -> AttemptId {
    AttemptId(Uuid::from_u128(number))
}

fn record(kind: Kind, number: u64, first: u64, count: u32, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    RecordHead::new(kind, number, first, count).write_one(&mut out, bytes);
    out
}

fn json(kind: Kind, number: u64, first: u64, value: &impl Serialize) -> Vec<u8> {
    record(kind, number, first, 0, &serde_json::to_vec(value).unwrap())
}

fn hello(boot_id: BootId) -> Vec<u8> {
    let hello = Hello { node_id: NodeId::new("n0").unwrap(), boot_id, version: "1".into() };
    json(Kind::Hello, 0, 0, &hello)
}

fn accepted(number: u64) -> Vec<u8> {
    let acceptance = Acceptance { replica_id: ReplicaId::new("r0").unwrap(), report_seq: 1 };
    json(Kind::Accepted, number, 0, &acceptance)
}

fn alive(positions: &[(u64, u64)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_positions(&mut bytes, positions.iter().map(|&(number, next)| Position { number, next }));
    record(Kind::Alive, 0, 0, u32::try_from(positions.len()).unwrap(), &bytes)
}

impl Lane {
    /// A lane that has just begun to dial.
    fn dialling() -> Self {
        let lane = ControlLane::new(Moment::from_millis(1_000), LifeId(Uuid::from_u128(1)), 3, BOOT);
        Self { lane, now: 1_000, actions: Vec::new() }.taken()
    }

    /// A lane whose link is up and whose first POST was answered.
    fn up() -> Self {
        let mut this = Self::dialling();
        this.receive(1, hello(BOOT));
        this.answer_all();
        this.actions.clear();
        this
    }

    fn at(&self) -> Moment {
        Moment::from_millis(self.now)
    }

    fn taken(mut self) -> Self {
        self.take();
        self
    }

    fn take(&mut self) {
        while let Some(action) = self.lane.next_action() {
            self.actions.push(action);
        }
    }

    fn receive(&mut self, n: u64, bytes: Vec<u8>) {
        self.lane.received(self.at(), n, bytes.into());
        self.take();
    }

    fn closed(&mut self, n: u64, end: ConnectionEnd) {
        self.lane.closed(self.at(), n, end);
        self.take();
    }

    fn start(&mut self, number: u128) {
        self.lane.start(self.at(), start(number, "hello"));
        self.take();
    }

    fn cancel(&mut self, attempt: AttemptId) {
        self.lane.cancel(self.at(), attempt);
        self.take();
    }

    fn sent(&mut self, post: PostId) {
        self.lane.post_sent(self.at(), post);
        self.take();
    }

    fn end(&mut self, post: PostId, outcome: PostOutcome) {
        self.lane.post_ended(self.at(), post, outcome);
        self.take();
    }

    /// Time passes, and each deadline in it is kept.
    fn pass(&mut self, millis: u64) {
        let end = self.now + millis;
        while self.lane.next_deadline().as_millis() <= end {
            self.now = self.now.max(self.lane.next_deadline().as_millis());
            self.lane.timer(self.at());
            self.take();
        }
        self.now = end;
    }

    /// The POSTs that were asked for, and were not looked at.
    fn posts(&mut self) -> Vec<(PostId, PostRequest)> {
        let (posts, others) = std::mem::take(&mut self.actions)
            .into_iter()
            .partition(|action| matches!(action, Action::Post { .. }));
        self.actions = others;
        let post = |action| match action {
            Action::Post { id, request, .. } => (id, request),
            other => panic!("{other:?}"),
        };
        posts.into_iter().map(post).collect()
    }

    fn control(&mut self) -> (PostId, ControlBody) {
        let control = |(id, request)| match request {
            PostRequest::Control(body) => Some((id, body)),
            _ => None,
        };
        let mut posts: Vec<_> = self.posts().into_iter().filter_map(control).collect();
        assert_eq!(posts.len(), 1, "one control POST");
        posts.remove(0)
    }

    fn starts(&mut self) -> (PostId, StartsBody) {
        let starts = |(id, request)| match request {
            PostRequest::Starts(body) => Some((id, read_starts(&body).unwrap())),
            _ => None,
        };
        let mut posts: Vec<_> = self.posts().into_iter().filter_map(starts).collect();
        assert_eq!(posts.len(), 1, "one POST of starts");
        posts.remove(0)
    }

    fn answer_all(&mut self) {
        loop {
            let posts = self.posts();
            if posts.is_empty() {
                return;
            }
            for (post, _) in posts {
                self.sent(post);
                self.end(post, PostOutcome::Answered(ControlAnswer::default()));
            }
        }
    }

    /// An attempt that is accepted on the link `n`. Returns its number.
    fn running(&mut self, attempt: u128, n: u64) -> u64 {
        self.start(attempt);
        let (post, body) = self.starts();
        let number = body.start[0].as_ref().unwrap().facts.number;
        self.sent(post);
        self.end(post, PostOutcome::Answered(ControlAnswer::default()));
        self.receive(n, accepted(number));
        self.actions.clear();
        number
    }

    fn frames(&mut self, number: u64, first: u64, count: u32) {
        self.receive(1, record(Kind::Frames, number, first, count, b"frames"));
    }

    fn dials(&self) -> Vec<u64> {
        let dial = |action: &Action| match action {
            Action::Dial(query) => Some(query.n),
            _ => None,
        };
        self.actions.iter().filter_map(dial).collect()
    }

    fn did(&mut self, expected: &Action) -> bool {
        let before = self.actions.len();
        self.actions.retain(|action| action != expected);
        self.actions.len() + 1 == before
    }
}

fn secs(secs: u64) -> u64 {
    secs * 1_000
}

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
    let (post, body) = lane.control();
    assert_eq!(body.resume.len(), 0, "the thread's gate is asked first");
    lane.end(post, PostOutcome::Answered(ControlAnswer::default()));
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
    assert!(lane.did(&Action::OtherBoot { boot_id: other }));
    assert!(lane.did(&Action::Lost { attempt: id(1), reason: Lost::OtherBoot }));
    lane.actions.clear();
    lane.pass(secs(30));
    assert!(lane.dials().is_empty(), "it is not dialled before it registers");
    lane.lane.registered(lane.at(), other);
    lane.take();
    assert_eq!(lane.dials().len(), 1);
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
    assert_eq!(body.start.len(), 64);
    let numbers: Vec<u64> = body.start.iter().map(|start| start.as_ref().unwrap().facts.number).collect();
    assert!(numbers.is_sorted() && numbers[0] > 1);
    (100..110).for_each(|number| lane.lane.start(lane.at(), start(number, &"x".repeat(50_000))));
    lane.take();
    lane.end(post, PostOutcome::Answered(ControlAnswer::default()));
    let (post, body) = lane.starts();
    assert_eq!(body.start.len(), 34 + 4, "256 KiB");
    lane.cancel(id(1));
    assert_eq!(lane.control().1.cancel, [id(1)], "control does not wait for starts");
    lane.end(post, PostOutcome::Answered(ControlAnswer::default()));
    assert_eq!(lane.starts().1.start.len(), 5);
}

// CLOUD-2605
#[test]
fn a_large_payload_goes_alone_and_holds_up_no_others() {
    let mut lane = Lane::up();
    lane.lane.start(lane.at(), start(1, &"x".repeat(70_000)));
    lane.start(2);
    let posts = lane.posts();
    let [(_, PostRequest::Single { attempt, body }), (_, PostRequest::Starts(_))] = posts.as_slice() else {
        panic!("{posts:?}")
    };
    let read = read_single(&body.concat().into()).unwrap();
    assert_eq!((*attempt, read.start.unwrap().payload), (id(1), start(1, &"x".repeat(70_000)).payload));
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
        start.facts.task_id = pool_registry_types::TaskId(Uuid::from_u128(50));
        lane.lane.start(lane.at(), start);
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

// CLOUD-2603
#[test]
fn with_its_number_go_the_parts_of_an_attempt() {
    let mut lane = Lane::up();
    let number = lane.running(1, 1);
    let head = RecordHead { more: true, ..RecordHead::new(Kind::Frames, number, 0, 1) };
    let mut bytes = Vec::new();
    head.write_one(&mut bytes, b"half of a frame");
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
    lane.pass(Duration::from_secs(1).as_millis().try_into().unwrap());
    let n = *lane.dials().last().unwrap();
    lane.receive(n, hello(BOOT));
    let (_, body) = lane.starts();
    assert_eq!(body.start[0].as_ref().unwrap().facts.deadline_ms, Some(599_000));
}
