//! The node's end, rule by rule.

use attempt_link::content::{Hello, Position};
use attempt_link::node::{ConnectionId, GetRefusal, NodeAction, NodeLanes, PostRefusal};
use attempt_link::records::{Content, Kind, Parts, Record, RecordDecoder};
use attempt_link::wire::{
    ControlAnswer, ControlBody, LifeId, LinkKey, LinkQuery, ResumeOrder, Seen, Start, StartsBody,
    WrittenStart, read_single, read_starts, write_single, write_starts,
};
use pool_registry_types::{AttemptId, BootId, ErrorCode, LogId, Moment, NodeId};
use uuid::Uuid;

use crate::host::Host;
use crate::ops::start;

const BOOT: BootId = BootId(Uuid::from_u128(7));

struct Node {
    lanes: NodeLanes,
    host: Host,
    now: u64,
    /// For the next start.
    number: u64,
}

fn life(number: u128) -> LifeId {
    LifeId(Uuid::from_u128(number))
}

fn key(life_number: u128, n: u64) -> LinkKey {
    LinkKey { life: life(life_number), lane: 0, n }
}

fn id(number: u128) -> AttemptId {
    AttemptId(Uuid::from_u128(number))
}

fn decode(bytes: Vec<u8>) -> Vec<Record> {
    let mut decoder = RecordDecoder::new();
    decoder.push(bytes.into());
    std::iter::from_fn(|| decoder.next_record().unwrap()).collect()
}

impl Node {
    /// A node that is registered with life 1.
    fn new() -> Self {
        let hello = Hello { node_id: NodeId::new("n0").unwrap(), boot_id: BOOT, version: "1".into() };
        let mut lanes = NodeLanes::new(hello);
        lanes.registered(life(1));
        Self { lanes, host: Host::default(), now: 1_000, number: 0 }
    }

    /// The same with a link `n = 1` in use.
    fn up() -> (Self, ConnectionId) {
        let mut this = Self::new();
        let link = this.get(key(1, 1)).unwrap();
        this.post(key(1, 1), &[]).unwrap();
        this.read(link);
        this.actions();
        (this, link)
    }

    fn at(&self) -> Moment {
        Moment::from_millis(self.now)
    }

    fn get(&mut self, key: LinkKey) -> Result<ConnectionId, GetRefusal> {
        let query = LinkQuery { boot_id: BOOT, life: key.life, lane: key.lane, n: key.n };
        self.lanes.get(self.at(), &query)
    }

    fn body(&mut self, key: LinkKey, attempts: &[u128]) -> StartsBody {
        let written: Vec<_> = attempts
            .iter()
            .map(|attempt| {
                self.number += 1;
                let Start { mut facts, payload } = start(*attempt, "hello");
                facts.number = self.number;
                WrittenStart::new(&Start { facts, payload })
            })
            .collect();
        read_starts(&write_starts(key, &written, &[], &[]).unwrap()).unwrap()
    }

    fn post(&mut self, key: LinkKey, attempts: &[u128]) -> Result<(), PostRefusal> {
        let body = self.body(key, attempts);
        self.lanes.starts(self.at(), body, &mut self.host)
    }

    fn resume(&mut self, key: LinkKey, orders: &[(u128, u64, u64)]) -> Result<ControlAnswer, PostRefusal> {
        let resume = orders.iter().map(|&(attempt, from, number)| ResumeOrder {
            attempt_id: id(attempt),
            log_id: LogId(Uuid::from_u128(attempt)),
            from,
            number,
        });
        let LinkKey { life, lane, n } = key;
        let body = ControlBody { life, lane, n, cancel: Vec::new(), resume: resume.collect() };
        self.lanes.control(self.at(), &body, &mut self.host)
    }

    fn cancel(&mut self, key: LinkKey, attempt: u128) -> Result<ControlAnswer, PostRefusal> {
        let LinkKey { life, lane, n } = key;
        let body = ControlBody { life, lane, n, cancel: vec![id(attempt)], resume: Vec::new() };
        self.lanes.control(self.at(), &body, &mut self.host)
    }

    fn append(&mut self, attempt: u128, frames: usize, len: usize) {
        for _ in 0..frames {
            self.host.append(&id(attempt), len);
        }
        self.lanes.appended(&id(attempt));
    }

    fn end(&mut self, attempt: u128) {
        self.host.end(&id(attempt));
        self.lanes.appended(&id(attempt));
    }

    /// What the link writes until there is no more, as records.
    fn read(&mut self, link: ConnectionId) -> Vec<Record> {
        let mut out = Vec::new();
        while self.lanes.fill(self.at(), link, &mut out, usize::MAX, &mut self.host) {}
        decode(out)
    }

    fn kinds(&mut self, link: ConnectionId) -> Vec<(Kind, u64)> {
        self.read(link).iter().map(|record| (record.head.kind, record.head.number)).collect()
    }

    fn actions(&mut self) -> Vec<NodeAction> {
        std::iter::from_fn(|| self.lanes.next_action()).collect()
    }

    fn pass(&mut self, millis: u64) {
        self.now += millis;
        self.lanes.timer(self.at(), &mut self.host);
    }
}

fn secs(secs: u64) -> u64 {
    secs * 1_000
}

// CLOUD-2610
#[test]
fn an_offer_gets_its_hello_and_displaces_nothing_before_a_post_names_it() {
    let (mut node, first) = Node::up();
    node.post(key(1, 1), &[1]).unwrap();
    let second = node.get(key(1, 2)).unwrap();
    assert_eq!(node.kinds(second), [(Kind::Hello, 0)]);
    assert_eq!(node.kinds(first), [(Kind::Accepted, 1)], "the one in use goes on");
    let third = node.get(key(1, 3)).unwrap();
    node.resume(key(1, 3), &[]).unwrap();
    let actions = node.actions();
    assert!(actions.contains(&NodeAction::Close(first)) && actions.contains(&NodeAction::Close(second)));
    assert_eq!(node.lanes.attached(), 0, "it begins with no attempts");
    node.append(1, 3, 100);
    assert_eq!(node.kinds(third), [(Kind::Hello, 0)]);
}

// CLOUD-2610
#[test]
fn an_offer_that_nobody_names_ends_after_five_seconds() {
    let (mut node, _) = Node::up();
    let offer = node.get(key(1, 2)).unwrap();
    node.read(offer);
    node.pass(4_999);
    assert_eq!(node.lanes.connections(), 2);
    node.pass(1);
    assert_eq!(node.lanes.connections(), 1);
    assert_eq!(node.resume(key(1, 2), &[]), Err(PostRefusal::Stale));
}

// CLOUD-2611
#[test]
fn a_get_that_is_not_newer_than_the_link_in_use_is_stale() {
    let mut node = Node::new();
    node.get(key(1, 5)).unwrap();
    node.get(key(1, 4)).unwrap();
    assert_eq!(node.get(key(1, 4)), Err(GetRefusal::Stale), "it is offered already");
    node.post(key(1, 5), &[]).unwrap();
    assert_eq!(node.get(key(1, 5)), Err(GetRefusal::Stale));
    assert_eq!(node.get(key(1, 3)), Err(GetRefusal::Stale));
    node.get(key(1, 6)).unwrap();
    let query = LinkQuery { boot_id: BootId(Uuid::from_u128(9)), life: life(1), lane: 0, n: 7 };
    assert_eq!(node.lanes.get(node.at(), &query), Err(GetRefusal::WrongBoot));
}

// CLOUD-2612
#[test]
fn of_a_stale_post_stops_and_what_is_done_count_and_nothing_else() {
    let (mut node, _) = Node::up();
    node.post(key(1, 1), &[1, 2]).unwrap();
    node.end(2);
    node.get(key(1, 2)).unwrap();
    node.post(key(1, 2), &[]).unwrap();
    assert_eq!(node.post(key(1, 1), &[3]), Err(PostRefusal::Stale));
    assert_eq!(node.resume(key(1, 1), &[(1, 0, 9)]), Err(PostRefusal::Stale));
    assert_eq!(node.cancel(key(1, 1), 1), Err(PostRefusal::Stale));
    let mut body = node.body(key(1, 1), &[]);
    body.done = vec![id(2)];
    assert_eq!(node.lanes.starts(node.at(), body, &mut node.host), Err(PostRefusal::Stale));
    assert!(node.host.runs.is_empty(), "{:?}", node.host.runs);
    node.post(key(1, 2), &[3]).unwrap();
    assert!(node.host.is_running(&id(3)), "it was not read before");
}

// CLOUD-2613
#[test]
fn another_life_takes_a_lane_only_if_it_is_the_one_that_the_node_is_registered_with() {
    let (mut node, link) = Node::up();
    node.post(key(1, 1), &[1]).unwrap();
    assert_eq!(node.get(key(2, 9)), Err(GetRefusal::Stale));
    node.lanes.registered(life(2));
    node.get(key(2, 1)).unwrap();
    node.append(1, 1, 100);
    assert!(!node.read(link).is_empty(), "the one before goes on until a POST names the new one");
    node.actions();
    node.post(key(2, 1), &[]).unwrap();
    assert!(node.actions().contains(&NodeAction::Close(link)));
    assert_eq!(node.lanes.attached(), 0);
    assert_eq!(node.post(key(1, 1), &[2]), Err(PostRefusal::Stale));
    assert_eq!(node.get(key(1, 2)), Err(GetRefusal::Stale));
}

// CLOUD-2614
#[test]
fn the_highest_number_of_an_attempt_counts_and_parts_under_the_one_before_are_not_finished() {
    let (mut node, link) = Node::up();
    node.post(key(1, 1), &[3]).unwrap();
    node.append(3, 1, 30_000);
    let mut out = Vec::new();
    assert!(node.lanes.fill(node.at(), link, &mut out, 1, &mut node.host), "a part of it, and more");
    let most = out.len() + 1;
    assert!(node.lanes.fill(node.at(), link, &mut out, most, &mut node.host));
    node.resume(key(1, 1), &[(3, 0, 7)]).unwrap();
    node.resume(key(1, 1), &[(3, 0, 6)]).unwrap();
    let records = node.read(link);
    assert!(records.iter().all(|record| record.head.number == 7), "{records:?}");
    let mut parts = Parts::default();
    let whole: Vec<_> = records.into_iter().filter_map(|record| parts.join(record).unwrap()).collect();
    assert_eq!(
        whole.iter().map(|record| record.head.kind).collect::<Vec<_>>(),
        [Kind::Accepted, Kind::Frames]
    );
    assert_eq!(whole[1].bytes.len(), 30_000);
}

// CLOUD-2622
#[test]
fn a_start_that_cannot_be_read_is_refused_under_its_number_and_the_others_are_taken() {
    let (mut node, link) = Node::up();
    let text = serde_json::to_string(&serde_json::json!({
        "life": life(1), "lane": 0, "n": 1,
        "start": [{"number": 4, "pool_id": "../x"}, {"pool_id": "p"}, 7],
    }));
    let mut body = read_starts(&text.unwrap().into()).unwrap();
    body.start.extend(node.body(key(1, 1), &[1]).start);
    node.lanes.starts(node.at(), body, &mut node.host).unwrap();
    let records = node.read(link);
    let heads: Vec<_> = records.iter().map(|record| (record.head.kind, record.head.number)).collect();
    assert_eq!(heads, [(Kind::Refused, 4), (Kind::Accepted, 1)]);
    let Content::Refused(error) = Content::read(&records[0]).unwrap() else { panic!("it is refused") };
    assert_eq!(error.code, ErrorCode::InvalidParams);
    assert!(error.message.contains("pool_id"), "{}", error.message);
    assert_eq!(node.lanes.unreadable_starts(), 2);
}

// CLOUD-2624
#[test]
fn what_was_stopped_or_asked_for_before_it_came_is_refused_when_it_comes() {
    let (mut node, link) = Node::up();
    node.cancel(key(1, 1), 1).unwrap();
    let answer = node.resume(key(1, 1), &[(2, 0, 20)]).unwrap();
    assert_eq!(answer, ControlAnswer { unknown: vec![id(2)], gone: Vec::new() });
    node.post(key(1, 1), &[1, 2]).unwrap();
    assert_eq!(node.kinds(link), [(Kind::Refused, 1), (Kind::Refused, 2)]);
    assert!(node.host.runs.is_empty());
}

// CLOUD-2631
#[test]
fn a_resume_is_answered_by_the_acceptance_and_everything_from_there_on_with_the_end() {
    let (mut node, link) = Node::up();
    node.post(key(1, 1), &[5]).unwrap();
    node.append(5, 4, 100);
    node.end(5);
    node.read(link);
    let answer = node.resume(key(1, 1), &[(5, 2, 9), (6, 0, 10)]).unwrap();
    assert_eq!(answer.unknown, [id(6)]);
    let records = node.read(link);
    let heads: Vec<_> = records.iter().map(|r| (r.head.kind, r.head.first, r.head.count)).collect();
    assert_eq!(
        heads,
        [(Kind::Accepted, 0, 0), (Kind::TokenIds, 2, 2), (Kind::Frames, 2, 2), (Kind::End, 4, 0)]
    );
    assert_eq!(node.resume(key(1, 1), &[(5, 1, 11)]).unwrap().gone, [id(5)], "that was seen");
}

// CLOUD-2635
#[test]
fn attempts_take_turns_of_ten_kilobytes() {
    let (mut node, link) = Node::up();
    node.post(key(1, 1), &[3, 4]).unwrap();
    node.append(3, 100, 1_000);
    node.append(4, 20, 1_000);
    let records = node.read(link);
    let frames: Vec<_> = records.iter().filter(|record| record.head.kind == Kind::Frames).collect();
    assert!(frames.iter().all(|record| record.bytes.len() <= 10 * 1024));
    let turns: Vec<u64> = frames.iter().map(|record| record.head.number).take(5).collect();
    assert_eq!(turns, [1, 2, 1, 2, 1]);
}

// CLOUD-2635
#[test]
fn a_frame_longer_than_a_turn_goes_in_parts_between_those_of_others() {
    let (mut node, link) = Node::up();
    let attempts: Vec<u128> = (0..12).map(|at| 4 * at + 3).collect();
    node.post(key(1, 1), &attempts).unwrap();
    attempts.iter().for_each(|attempt| node.append(*attempt, 1, 100_000));
    let (mut parts, mut whole) = (Parts::default(), 0);
    for record in node.read(link) {
        assert!(record.bytes.len() <= 10 * 1024);
        whole += usize::from(parts.join(record).unwrap().is_some_and(|r| r.head.kind == Kind::Frames));
        assert!(parts.bytes() <= 7 * 100_000, "seven at a time: {}", parts.bytes());
    }
    assert_eq!(whole, 12);
}

// CLOUD-2634
// CLOUD-2635
#[test]
fn large_frames_that_were_missed_do_not_hold_up_those_that_are_being_written() {
    for resumed_ones_first in [false, true] {
        let (mut node, link) = Node::up();
        let attempts: Vec<u128> = (0..24).map(|at| 4 * at + 3).collect();
        node.post(key(1, 1), &attempts).unwrap();
        attempts.iter().for_each(|attempt| node.append(*attempt, 1, 200_000));
        let orders: Vec<(u128, u64, u64)> =
            attempts.iter().skip(12).zip(50..).map(|(attempt, number)| (*attempt, 0, number)).collect();
        let begin = |node: &mut Node| {
            for _ in 0..40 {
                let mut out = Vec::new();
                node.lanes.fill(node.at(), link, &mut out, 2_000, &mut node.host);
            }
        };
        if !resumed_ones_first {
            begin(&mut node);
        }
        node.resume(key(1, 1), &orders).unwrap();
        let (mut written, mut more) = (0, true);
        while more {
            let mut out = Vec::new();
            more = node.lanes.fill(node.at(), link, &mut out, 20_000, &mut node.host);
            assert!(!more || !out.is_empty(), "there is more, and nothing of it is written");
            written += out.len();
        }
        assert!(written >= 12 * 200_000, "{written}");
    }
}

// CLOUD-2634
#[test]
fn what_was_missed_takes_half_of_what_is_written_while_others_have_something() {
    let (mut node, link) = Node::up();
    node.post(key(1, 1), &[3, 7, 11]).unwrap();
    node.append(3, 100, 1_000);
    node.append(7, 100, 1_000);
    node.resume(key(1, 1), &[(3, 0, 50), (7, 0, 51)]).unwrap();
    node.append(11, 100, 1_000);
    let mut out = Vec::new();
    assert!(node.lanes.fill(node.at(), link, &mut out, 100_000, &mut node.host));
    let (mut late, mut live) = (0, 0);
    for record in decode(out) {
        match record.head {
            head if head.kind != Kind::Frames => {}
            head if head.number >= 50 => late += record.bytes.len(),
            _ => live += record.bytes.len(),
        }
    }
    assert!(late.abs_diff(live) <= 10 * 1024, "{late} and {live}");
}

// CLOUD-2644
#[test]
fn alive_stands_behind_what_was_ready_and_names_what_runs_and_what_is_not_written_yet() {
    let (mut node, link) = Node::up();
    node.post(key(1, 1), &[3, 7, 11]).unwrap();
    node.read(link);
    node.append(3, 2, 100);
    node.append(7, 30, 1_000);
    node.host.runs.get_mut(&id(11)).unwrap().stuck = true;
    node.pass(1_000);
    let mut out = Vec::new();
    node.lanes.fill(node.at(), link, &mut out, 12_000, &mut node.host);
    node.append(7, 30, 1_000);
    node.end(3);
    let mut records = decode(out);
    records.extend(node.read(link));
    let position = records.iter().position(|record| record.head.kind == Kind::Alive).unwrap();
    let before: u32 = records[..position].iter().filter(|r| r.head.number == 2).map(|r| r.head.count).sum();
    assert!(before >= 30 && position + 1 < records.len(), "behind what was ready, before what came later");
    let Content::Alive(named) = Content::read(&records.remove(position)).unwrap() else { panic!() };
    let next = |number| named.iter().find(|position: &&Position| position.number == number).map(|p| p.next);
    assert_eq!((next(2), next(3)), (Some(60), None), "a driver that is not polled is not named");
}

// CLOUD-2644
#[test]
fn alive_comes_each_second_while_attempts_run_and_every_ten_seconds_else() {
    let (mut node, link) = Node::up();
    let alive = |node: &mut Node, seconds: u64| {
        (0..seconds)
            .filter(|_| {
                node.pass(1_000);
                node.post(key(1, 1), &[]).unwrap();
                node.read(link).iter().any(|record| record.head.kind == Kind::Alive)
            })
            .count()
    };
    assert_eq!(alive(&mut node, 20), 2);
    node.post(key(1, 1), &[3]).unwrap();
    assert_eq!(alive(&mut node, 5), 5);
}

// CLOUD-2603
#[test]
fn a_record_that_no_link_can_carry_ends_its_own_attempt_with_an_error_and_no_other() {
    let (mut node, link) = Node::up();
    node.post(key(1, 1), &[3, 7]).unwrap();
    node.append(3, 2, 100);
    node.append(3, 1, 9 << 20);
    node.append(7, 1, 100);
    let of = |records: &[Record], number| -> Vec<(Kind, u64)> {
        let own = records.iter().filter(|record| record.head.number == number);
        own.map(|record| (record.head.kind, record.head.first)).collect()
    };
    let records = node.read(link);
    assert_eq!(of(&records, 1)[1..], [(Kind::Frames, 0), (Kind::Error, 0), (Kind::End, 2)]);
    assert_eq!(of(&records, 2)[1..], [(Kind::Frames, 0)]);
    node.resume(key(1, 1), &[(3, 1, 9)]).unwrap();
    let records = node.read(link);
    assert_eq!(of(&records, 9)[1..], [(Kind::Frames, 1), (Kind::Error, 0), (Kind::End, 2)]);
}

// CLOUD-2659
#[test]
fn a_link_that_takes_nothing_ends_before_its_answers_fill_the_memory() {
    let (mut node, link) = Node::up();
    let mut number = 0;
    let refused = (0..100_000).find_map(|_| {
        number += 1;
        let orders: Vec<_> =
            (1..40).map(|attempt| (attempt, 0, 40 * number + u64::try_from(attempt).unwrap())).collect();
        if number == 1 {
            node.post(key(1, 1), &(1..40).collect::<Vec<_>>()).unwrap();
        }
        node.resume(key(1, 1), &orders).err()
    });
    assert_eq!(refused, Some(PostRefusal::Stale));
    assert!(number < 2_500, "after {number} POSTs");
    assert!(node.actions().contains(&NodeAction::Close(link)));
    assert_eq!(node.lanes.attached(), 0);
}

// CLOUD-2605
#[test]
fn a_start_that_goes_alone_is_refused_where_its_path_names_another_attempt() {
    let (mut node, link) = Node::up();
    let mut start = start(1, "hello");
    start.facts.number = 5;
    let body = write_single(key(1, 1), &WrittenStart::new(&start)).unwrap().concat();
    let body = || read_single(&body.clone().into()).unwrap();
    node.lanes.single(node.at(), id(2), body(), &mut node.host).unwrap();
    assert_eq!(node.kinds(link), [(Kind::Refused, 5)]);
    assert!(node.host.runs.is_empty());
    node.lanes.single(node.at(), id(1), body(), &mut node.host).unwrap();
    assert_eq!(node.kinds(link), [(Kind::Accepted, 5)]);
}

// CLOUD-2655
#[test]
fn a_node_that_leaves_takes_no_get_and_no_start() {
    let (mut node, link) = Node::up();
    node.post(key(1, 1), &[3]).unwrap();
    node.read(link);
    node.append(3, 1, 100);
    node.lanes.leave();
    assert_eq!(node.get(key(1, 2)), Err(GetRefusal::Leaving));
    node.post(key(1, 1), &[7]).unwrap();
    let records = node.read(link);
    let kinds: Vec<Kind> = records.iter().map(|record| record.head.kind).collect();
    assert_eq!(kinds, [Kind::Refused, Kind::Frames, Kind::Bye]);
    assert!(!node.host.is_running(&id(7)));
}

// CLOUD-2644
#[test]
fn what_is_written_to_its_end_has_no_reader_any_more() {
    let (mut node, link) = Node::up();
    node.post(key(1, 1), &[3]).unwrap();
    node.end(3);
    node.read(link);
    assert_eq!(node.lanes.attached(), 0);
    assert!(node.host.runs[&id(3)].detached.is_some(), "the host knows");
}

// CLOUD-2655
#[test]
fn a_node_that_leaves_says_so_behind_everything_that_is_ready() {
    let (mut node, link) = Node::up();
    node.post(key(1, 1), &[3]).unwrap();
    node.append(3, 2, 100);
    node.end(3);
    node.lanes.leave();
    let kinds: Vec<Kind> = node.kinds(link).into_iter().map(|(kind, _)| kind).collect();
    assert_eq!(kinds, [Kind::Accepted, Kind::Frames, Kind::End, Kind::Bye]);
    assert!(node.actions().contains(&NodeAction::Close(link)));
}

// CLOUD-2656
#[test]
fn a_link_whose_credential_does_not_count_takes_no_start_and_goes_on_for_a_minute() {
    let (mut node, link) = Node::up();
    node.post(key(1, 1), &[3]).unwrap();
    node.lanes.credential(node.at(), link, false);
    assert_eq!(node.post(key(1, 1), &[7]), Err(PostRefusal::Credential));
    assert!(!node.host.is_running(&id(7)) && node.host.is_running(&id(3)));
    for _ in 0..59 {
        node.pass(1_000);
        let _ = node.post(key(1, 1), &[]);
        assert!(node.kinds(link).iter().all(|(kind, _)| *kind != Kind::Bye));
    }
    node.pass(1_000);
    assert!(node.kinds(link).contains(&(Kind::Bye, 0)));
    let (mut node, link) = Node::up();
    node.lanes.credential(node.at(), link, false);
    node.lanes.credential(node.at(), link, true);
    node.post(key(1, 1), &[7]).unwrap();
}

// CLOUD-2659
#[test]
fn a_lane_without_a_post_for_nine_seconds_has_no_reader_whatever_its_connection_is() {
    let (mut node, link) = Node::up();
    node.pass(secs(60));
    assert_eq!(node.lanes.connections(), 1, "nothing runs on it");
    node.post(key(1, 1), &[3]).unwrap();
    node.pass(8_999);
    assert_eq!(node.lanes.attached(), 1);
    node.pass(1);
    assert_eq!(node.lanes.attached(), 0);
    let actions = node.actions();
    assert!(actions.contains(&NodeAction::Close(link)) && actions.contains(&NodeAction::PokeSession));
    assert!(node.host.is_running(&id(3)), "a reader that goes ends nothing");
}

// CLOUD-2659
#[test]
fn a_lane_that_loses_its_reader_while_attempts_run_pokes_the_session_and_else_does_not() {
    let (mut node, link) = Node::up();
    node.lanes.closed(node.at(), link, &mut node.host);
    assert!(!node.actions().contains(&NodeAction::PokeSession));
    let (mut node, link) = Node::up();
    node.post(key(1, 1), &[3]).unwrap();
    node.lanes.closed(node.at(), link, &mut node.host);
    assert!(node.actions().contains(&NodeAction::PokeSession));
}

// CLOUD-2640
#[test]
fn what_was_seen_of_an_attached_attempt_is_let_go() {
    let (mut node, link) = Node::up();
    node.post(key(1, 1), &[3]).unwrap();
    node.append(3, 5, 100);
    node.read(link);
    let mut body = node.body(key(1, 1), &[]);
    body.seen = vec![Seen { number: 1, next: 4 }, Seen { number: 99, next: 1 }];
    node.lanes.starts(node.at(), body, &mut node.host).unwrap();
    assert_eq!(node.resume(key(1, 1), &[(3, 3, 60)]).unwrap().gone, [id(3)]);
}
