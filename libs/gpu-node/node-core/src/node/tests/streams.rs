//! The streams that are kept, as reports and acceptance see them.

use attempt_link::node::NotResumed;
use attempt_link::wire::ResumeOrder;
use pool_registry_types::LogId;

use super::*;
use crate::attempts::{Cursor, Ending, Piece, ResumeError, Taken};

/// What an attempt has made, so many bytes in one frame.
fn made(bytes: usize) -> Piece {
    let mut ends = crate::Ends::default();
    ends.push(bytes);
    Piece::new(0, vec![b'x'; bytes], ends)
}

/// Whoever reads an attempt that has ended has all of it.
pub(super) fn read_to_its_end(node: &mut NodeCore, n: u128) {
    node.held_mut().finish(at(1), &attempt(n), None, Ending::default());
    let mut cursor = Cursor::first();
    while let Taken::Bytes(_) = node.held_mut().take(&attempt(n), &mut cursor) {}
}

// CLOUD-1566
#[test]
fn a_report_lists_what_runs_and_what_has_ended_and_is_kept_and_never_one_twice() {
    let mut node = serving(1, 4);
    accept(&mut node, 1).unwrap();
    accept(&mut node, 2).unwrap();
    let lists = |node: &NodeCore| {
        let replica = node.pool_reports(at(1))[0].replicas[0].clone();
        (replica.attempts, replica.held)
    };
    assert_eq!(lists(&node), (vec![attempt(1), attempt(2)], vec![]));
    node.ended(&attempt(1));
    // No report falls between the end and the last bytes.
    assert_eq!(lists(&node), (vec![attempt(2)], vec![attempt(1)]));
    node.held_mut().finish(at(1), &attempt(1), Some(made(4)), Ending::default());
    node.ended_before_release(at(1), &attempt(2));
    assert_eq!(lists(&node), (vec![], vec![attempt(1), attempt(2)]));
    node.held_mut().done(&attempt(1));
    node.stopped(at(1), &attempt(2));
    assert_eq!(lists(&node), (vec![], vec![]));
}

// CLOUD-1565
#[test]
fn a_node_whose_memory_for_streams_is_full_refuses_what_is_new_and_says_why() {
    let mut node = serving(1, 4);
    node.bound_held(4_000);
    accept(&mut node, 1).unwrap();
    node.held_mut().append(at(0), &attempt(1), made(4_000)).unwrap();
    assert_eq!(accept(&mut node, 2), Err(ErrorCode::ReplicaExhausted));
    let warning = node.pool_reports(at(0))[0].warning.clone().unwrap();
    assert!(warning.contains("the most is 4000"), "{warning}");
    node.ended(&attempt(1));
    read_to_its_end(&mut node, 1);
    accept(&mut node, 2).unwrap();
    assert_eq!(node.pool_reports(at(0))[0].warning, None);
}

// CLOUD-1507
#[test]
fn an_id_is_remembered_for_ten_minutes_whatever_became_of_it() {
    let mut node = serving(1, 4);
    accept(&mut node, 1).unwrap();
    node.held_mut().finish(at(0), &attempt(1), None, Ending::default());
    node.held_mut().done(&attempt(1));
    node.ended(&attempt(1));
    node.stopped(at(0), &attempt(2));
    // What is too old goes when another one comes.
    accept_at(&mut node, 599_999, 11).unwrap();
    node.stopped(at(599_999), &attempt(12));
    for n in [1, 2] {
        assert_eq!(accept_at(&mut node, 599_999, n), Err(ErrorCode::AttemptDuplicate));
    }
    accept_at(&mut node, 600_000, 21).unwrap();
    node.stopped(at(600_000), &attempt(22));
    for n in [1, 2] {
        accept_at(&mut node, 600_000, n).unwrap();
    }
}

// CLOUD-2632
// CLOUD-2624
#[test]
fn a_link_goes_on_with_an_attempt_of_its_log_only_and_what_was_never_accepted_stays_unknown() {
    let mut node = serving(1, 4);
    accept(&mut node, 1).unwrap();
    let log = |n| LogId(Uuid::from_u128(n));
    let order = |n, log_id| ResumeOrder { attempt_id: attempt(n), log_id, from: 0, number: 5 };
    assert_eq!(node.resume_by_link(at(1), &order(1, log(7))), Err(NotResumed::Gone), "it is an exchange's");
    node.held_mut().link(&attempt(1), log(7), Cursor::first());
    assert_eq!(node.resume_by_link(at(1), &order(1, log(8))), Err(NotResumed::Gone));
    assert!(node.resume_by_link(at(1), &order(1, log(7))).is_ok());
    for now in 1..3 {
        assert_eq!(node.resume_by_link(at(now), &order(2, log(7))), Err(NotResumed::Unknown));
    }
    assert_eq!(accept(&mut node, 2), Err(ErrorCode::AttemptDuplicate));
}

// CLOUD-1507
// CLOUD-1567
#[test]
fn whatever_else_is_asked_for_an_attempt_that_was_accepted_is_known_and_is_not_accepted_again() {
    let mut node = serving(1, 4);
    accept(&mut node, 1).unwrap();
    for n in 100..10_200 {
        assert_eq!(node.resume(at(1), &attempt(n), 0), Err(ResumeError::Unknown));
        node.stopped(at(1), &attempt(n));
    }
    assert!(node.resume(at(1), &attempt(1), 0).is_ok());
    assert_eq!(accept(&mut node, 1), Err(ErrorCode::AttemptDuplicate));
    assert_eq!(accept(&mut node, 10_199), Err(ErrorCode::AttemptDuplicate), "it was asked for before");
    // Also of ten thousand that were accepted since, the first is known while it runs or is held.
    for n in 20_000..30_100 {
        accept(&mut node, n).unwrap();
        node.held_mut().finish(at(1), &attempt(n), None, Ending::default());
        node.held_mut().done(&attempt(n));
        node.ended(&attempt(n));
    }
    assert_eq!(accept(&mut node, 1), Err(ErrorCode::AttemptDuplicate), "it runs");
    node.ended(&attempt(1));
    node.held_mut().finish(at(1), &attempt(1), Some(made(4)), Ending::default());
    assert!(node.resume(at(1), &attempt(1), 0).is_ok(), "it is held");
    assert_eq!(accept(&mut node, 1), Err(ErrorCode::AttemptDuplicate));
}

// CLOUD-1566
#[test]
fn what_a_pool_has_made_is_listed_also_when_the_pool_is_gone() {
    let mut node = serving(1, 4);
    accept(&mut node, 1).unwrap();
    node.unbind(at(1), &pool_id(), &replica_id(0));
    node.held_mut().finish(at(1), &attempt(1), Some(made(4)), Ending::default());
    node.ended(&attempt(1));
    let reports = node.pool_reports(at(1));
    assert_eq!(reports[0].replicas[0].held, [attempt(1)]);
    assert!(!reports[0].ready && reports[0].replicas[0].slots_total == 0);
    node.held_mut().done(&attempt(1));
    assert!(node.pool_reports(at(1)).is_empty());
}
