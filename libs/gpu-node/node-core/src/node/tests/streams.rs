//! The streams that are kept, as reports and acceptance see them.

use super::*;
use crate::attempts::{Cursor, Piece};

/// What an attempt has made, so many bytes in one frame.
fn made(bytes: usize) -> Piece {
    let mut ends = crate::Ends::default();
    ends.push(bytes);
    Piece::new(0, vec![b'x'; bytes].into(), ends)
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
    node.held_mut().finish(at(1), &attempt(1), Some(made(4)));
    node.ended_before_release(at(1), &attempt(2));
    assert_eq!(lists(&node), (vec![], vec![attempt(1), attempt(2)]));
    node.held_mut().done(&attempt(1));
    node.stopped(&attempt(2));
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
    node.held_mut().finish(at(1), &attempt(1), None);
    accept(&mut node, 2).unwrap();
    assert_eq!(node.pool_reports(at(0))[0].warning, None);
}

// CLOUD-1563
#[test]
fn a_node_asks_for_the_end_of_what_nobody_reads_when_it_is_due() {
    let mut node = serving(1, 4);
    while node.due(at(0)).is_some() {}
    accept(&mut node, 1).unwrap();
    node.held_mut().detach(at(0), &attempt(1), &Cursor::first());
    assert!(node.next_deadline().is_some_and(|due| due <= at(15_000)));
    let unread: Vec<NodeEffect> = std::iter::from_fn(|| node.due(at(15_000)))
        .filter(|effect| matches!(effect, NodeEffect::Unread(_)))
        .take(2)
        .collect();
    assert_eq!(unread, [NodeEffect::Unread(attempt(1))]);
}
