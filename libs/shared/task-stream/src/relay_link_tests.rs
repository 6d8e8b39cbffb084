//! What a node's link says beside frames: that a start was sent, ids of tokens, errors, ends, silence.

use super::*;

fn tokens(total: u64, ids: &[u32]) -> TokensOfFrame {
    TokensOfFrame { total, ids: ids.to_vec() }
}

// CLOUD-1501
#[test]
fn a_start_that_waits_for_its_link_is_not_late_and_one_that_was_sent_is() {
    let mut bench = Bench::linked();
    bench.relay.timer(at(50_000));
    bench.collect();
    assert_eq!(bench.done, []);
    bench.relay.sent(at(60_000));
    assert_eq!(bench.relay.next_action(), Some(Action::Arm(at(65_000))));
    bench.relay.timer(at(65_000));
    bench.collect();
    assert_eq!(bench.done, [Action::Stop, ended(HowEnded::TimedOut(Overdue::Acceptance))]);
}

// CLOUD-1540
#[test]
fn on_a_link_only_the_link_says_that_an_attempt_is_silent() {
    let mut bench = Bench::linked();
    bench.relay.sent(at(1));
    bench.relay.accepted(at(2), replica(), 7);
    bench.take(10, &token(0));
    bench.relay.timer(at(19_000));
    bench.flush(19_000);
    assert_eq!(bench.done, [Action::Accepted { replica_id: replica(), report_seq: 7 }, Action::Started]);
    bench.relay.silent();
    bench.collect();
    assert_eq!(bench.done[2..], [Action::Stop, ended(HowEnded::TimedOut(Overdue::Silence))]);
}

// CLOUD-1534
#[test]
fn on_a_link_the_ids_of_several_frames_come_before_them_and_count_once() {
    let mut bench = Bench::linked();
    bench.relay.accepted(at(1), replica(), 7);
    bench.relay.token_ids(0, [tokens(2, &[7, 8]), tokens(3, &[9]), tokens(4, &[10])]);
    bench.take(2, &[token(0), token(1)].concat());
    // It is read again from the second frame on.
    assert_eq!(bench.relay.resume(), Some(2));
    bench.relay.token_ids(1, [tokens(3, &[9]), tokens(4, &[10]), tokens(6, &[11, 12])]);
    bench.take(3, &[token(1), token(2), token(3)].concat());
    assert_eq!(bench.log.token_ids().all(4), Some([7, 8, 9, 10, 11, 12].as_slice()));
    // A frame without ids has none, and more than a node can mean are none either.
    bench.relay.token_ids(4, [tokens(70_000, &vec![0; MOST_COMING])]);
    bench.take(4, &token(4));
    assert_eq!((bench.log.next_index(), bench.log.token_ids().all(5)), (5, None));
}

// CLOUD-1610
#[test]
fn on_a_link_an_attempt_ends_by_its_end_or_its_error_and_by_neither_is_stopped() {
    let error = ErrorBody::new(ErrorCode::WorkerReset, "the engine died");
    let mut bench = Bench::linked();
    bench.relay.accepted(at(1), replica(), 7);
    bench.take(2, &[token(0), event("end", 1)].concat());
    bench.done.clear();
    bench.relay.over(12);
    bench.flush(3);
    assert_eq!(bench.done, [Action::Ended { how: HowEnded::Finished, final_report: Some(12) }]);
    let mut bench = Bench::linked();
    bench.relay.error(error.clone());
    bench.flush(3);
    assert_eq!(bench.done, [], "the number of the report is awaited");
    // The link breaks before it; both come again.
    assert_eq!(bench.relay.resume(), Some(0));
    bench.relay.error(error.clone());
    bench.relay.over(9);
    bench.flush(4);
    let how = HowEnded::NodeError(error);
    assert_eq!(bench.done, [Action::Ended { how, final_report: Some(9) }]);
    let mut bench = Bench::linked();
    bench.relay.over(9);
    bench.flush(4);
    assert!(
        matches!(&bench.done[..], [Action::Stop, Action::Ended { how: HowEnded::Broken(_), .. }]),
        "{:?}",
        bench.done
    );
}

/// How an attempt ends whose node says these ids of the first frame's tokens, by an exchange and by a link.
fn claimed(total: u64, ids: usize) -> [Option<HowEnded>; 2] {
    let ids = vec![7; ids];
    let end = |bench: &Bench| {
        bench.done.iter().find_map(|action| match action {
            Action::Ended { how, .. } => Some(how.clone()),
            _ => None,
        })
    };
    let mut by_exchange = Bench::accepted(0);
    let listed: Vec<String> = ids.iter().map(u32::to_string).collect();
    by_exchange.take(2, format!(": token-ids {total} {}\n\n", listed.join(",")).as_bytes());
    by_exchange.take(3, &token(0));
    let mut by_link = Bench::linked();
    by_link.relay.accepted(at(1), replica(), 7);
    by_link.relay.token_ids(0, [tokens(total, &ids)]);
    by_link.take(3, &token(0));
    [end(&by_exchange), end(&by_link)]
}

// CLOUD-2724
#[test]
fn a_node_that_names_more_tokens_than_a_frame_can_have_ends_its_attempt_and_nothing_of_it_is_kept() {
    for (total, ids) in [(1, 1), (3, 3), (9, 0), (40, 40)] {
        assert_eq!(claimed(total, ids), [None, None], "{ids} of {total}");
    }
    let lies = [(1, 2), (10_000, 10_000), (5_000, 1), (u64::from(u32::MAX) + 1, 1), (u64::MAX, 0)];
    for (total, ids) in lies {
        for how in claimed(total, ids) {
            assert!(
                matches!(&how, Some(HowEnded::Broken(why)) if why.contains("cannot have brought")),
                "{how:?}"
            );
        }
    }
    // What was left out of the log has tokens too.
    let mut bench = Bench::accepted(0);
    let thoughts = b": thought\n\n".repeat(500);
    bench.take(
        2,
        &[thoughts, b": token-ids 501 ".to_vec(), b"7,".repeat(500), b"7\n\n".to_vec(), token(0)].concat(),
    );
    assert_eq!(bench.log.token_ids().all(1).map(<[u32]>::len), Some(501));
    // They count no less from one frame to the next.
    bench.take(3, &[b": token-ids 500 \n\n".to_vec(), token(1)].concat());
    assert!(
        matches!(bench.done.last(), Some(Action::Ended { how: HowEnded::Broken(_), .. })),
        "{:?}",
        bench.done
    );
}

// CLOUD-2724
#[test]
fn ids_of_a_task_that_is_not_continued_from_them_are_passed_over_and_none_outlive_the_stream() {
    let mut bench = Bench::accepted(0);
    bench.relay = Relay::new(at(0), Assignment { keeps_ids: false, ..assignment(0) });
    bench.take(2, &[b": token-ids 99999 1,2,3\n\n".to_vec(), token(0)].concat());
    bench.relay.token_ids(1, [tokens(7, &vec![0; 1_000])]);
    assert!(bench.relay.reading.coming.is_empty());
    bench.take(3, &token(1));
    assert_eq!((bench.log.next_index(), bench.log.token_ids().count(2)), (2, None));
    let mut bench = Bench::accepted(0);
    bench.take(2, &[b": token-ids 3 1,2,3\n\n".to_vec(), token(0)].concat());
    let running = bench.log.len_bytes();
    bench.take(3, &event("end", 1));
    let (read, segments) = (bench.read(0).len(), 2 * size_of::<Segment>());
    assert!(running >= token(0).len() + 3 * 4 && bench.log.len_bytes() <= read + segments, "{:?}", bench.log);
    assert!(bench.log.is_finished());
}
