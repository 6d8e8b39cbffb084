//! Streams that break and go on: nothing is missing, nothing comes twice.

use super::*;

// CLOUD-1560
#[test]
fn a_relay_goes_on_in_another_stream_of_its_attempt_without_gap_or_repeat() {
    let mut bench = Bench::accepted(0);
    bench.take(2, &[token(0), b": thought\n\n: thought\n\n".to_vec(), token(1)[..20].to_vec()].concat());
    bench.relay.closed("connection reset".into());
    assert_eq!(bench.relay.resume(), Some(1));
    bench.flush(3);
    let thoughts = b": thought\n\n: thought\n\n: thought\n\n";
    bench.take(4, &[thoughts.to_vec(), token(1), b": thought\n\n".to_vec()].concat());
    assert_eq!((bench.log.next_index(), bench.log.unlogged()), (2, 4));
    assert_eq!(bench.relay.resume(), Some(2));
    bench.take(5, &[b": thought\n\n".to_vec(), token(2), event("end", 3)].concat());
    assert_eq!((bench.log.next_index(), bench.log.unlogged()), (4, 4));
    // The number behind the final frame was lost.
    assert_eq!(bench.relay.resume(), Some(4));
    bench.take(6, b": report-seq 8\n\n");
    let end = Action::Ended { how: HowEnded::Finished, final_report: Some(8) };
    assert_eq!(bench.done.last(), Some(&end));
    assert_eq!(bench.relay.resume(), None);
}

/// A node's stream: its bytes, and where each record begins in them.
fn stream(thoughts: &[u8], fails: bool) -> (Vec<u8>, Vec<usize>) {
    let (mut bytes, mut begins) = (Vec::new(), vec![0]);
    for (index, before) in (0..).zip(thoughts) {
        bytes.extend(b": thought\n\n".repeat(usize::from(*before)));
        bytes.extend(format!(": token-ids {} {}\n\n", index + 1, index + 70).bytes());
        bytes.extend(token(index));
        begins.push(bytes.len());
    }
    if fails {
        let body = serde_json::to_string(&ErrorBody::new(ErrorCode::WorkerReset, "x")).unwrap();
        bytes.extend(format!("event: error\ndata: {body}\n\n").bytes());
    } else {
        bytes.extend(event("end", thoughts.len() as u64));
        begins.push(bytes.len());
    }
    bytes.extend(b": report-seq 8\n\n");
    (bytes, begins)
}

proptest! {
    // CLOUD-1920
    #[test]
    fn a_stream_that_breaks_anywhere_and_is_resumed_comes_whole_and_once(
        thoughts in prop::collection::vec(0_u8..3, 0..5),
        fails in any::<bool>(),
        cuts in prop::collection::vec(
            (prop_oneof![2 => 0_usize..160, 1 => Just(usize::MAX)], any::<bool>(), any::<bool>()), 0..6),
    ) {
        let (bytes, begins) = stream(&thoughts, fails);
        let (mut bench, mut at_byte) = (Bench::accepted(0), 0_usize);
        for (cut, flushes, breaks) in cuts {
            let upto = at_byte.saturating_add(cut).min(bytes.len());
            bench.relay.chunk(at(2), &bytes[at_byte..upto]);
            at_byte = upto;
            if flushes {
                bench.flush(2);
            }
            if breaks {
                bench.relay.closed("reset".into());
                let Some(from) = bench.relay.resume() else { break };
                at_byte = begins[usize::try_from(from).unwrap()];
            }
        }
        bench.relay.chunk(at(3), &bytes[at_byte..]);
        bench.flush(3);
        let how = if fails {
            HowEnded::NodeError(ErrorBody::new(ErrorCode::WorkerReset, "x"))
        } else {
            HowEnded::Finished
        };
        let end = Action::Ended { how, final_report: Some(8) };
        let ends = bench.done.iter().filter(|action| matches!(action, Action::Ended { .. } | Action::Stop));
        prop_assert_eq!(ends.collect::<Vec<_>>(), [&end]);
        let tokens = thoughts.len() as u64;
        prop_assert_eq!(bench.log.next_index(), tokens + u64::from(!fails));
        prop_assert_eq!(bench.log.unlogged(), thoughts.iter().map(|n| u64::from(*n)).sum::<u64>());
        let ids: Vec<u32> = (70..).take(thoughts.len()).collect();
        // Nothing goes on from those of a stream that has ended.
        let ids = if fails { Some(ids.as_slice()) } else { (tokens == 0).then_some(&[][..]) };
        prop_assert_eq!(bench.log.token_ids().all(tokens), ids);
        let expected: Vec<u8> = (0..tokens).flat_map(token).collect();
        let text = bench.read(0);
        let from = text.find("id: ").unwrap_or(text.len());
        prop_assert!(text.as_bytes()[from..].starts_with(&expected), "{}", text);
    }
}

// CLOUD-1920
#[test]
fn an_acceptance_that_comes_again_changes_nothing() {
    let mut bench = Bench::accepted(0);
    bench.take(2, &token(0));
    bench.done.clear();
    bench.relay.accepted(at(3), replica(), 7);
    bench.collect();
    assert_eq!(bench.done, []);
    for second in 1..70 {
        bench.take(second * 1_000, &token(second));
    }
    assert!(!bench.done.iter().any(|action| matches!(action, Action::Ended { .. })), "{:?}", bench.done);
    bench.relay.accepted(at(69_500), replica(), 7);
    bench.relay.timer(at(70_000));
    bench.collect();
    assert!(!bench.done.iter().any(|action| matches!(action, Action::Ended { .. })), "{:?}", bench.done);
}

// CLOUD-1920
#[test]
fn an_error_that_was_read_before_its_stream_broke_comes_again_with_its_number() {
    let (bytes, _) = stream(&[], true);
    let mut bench = Bench::accepted(0);
    bench.relay.chunk(at(2), &bytes);
    assert_eq!(bench.relay.resume(), Some(0));
    bench.take(3, b": ka\n\n");
    assert_eq!(bench.done, [], "the number was of what comes again");
    bench.take(4, &bytes);
    let how = HowEnded::NodeError(ErrorBody::new(ErrorCode::WorkerReset, "x"));
    assert_eq!(bench.done, [Action::Ended { how, final_report: Some(8) }]);
}
