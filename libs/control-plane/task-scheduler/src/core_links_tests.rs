//! What the link to a node changes: who is moved, who waits for it, and what makes its node suspect.

use pool_registry_types::view::{LinkState, LinkView};

use super::*;
use crate::event::LinkEvidence;

fn link(b: &mut Bench, state: LinkState) {
    lane(b, 0, state);
}

fn lane(b: &mut Bench, lane: u16, state: LinkState) {
    b.apply(Event::Link { node_id: node("a"), lane, link: LinkView { state, reason: None } });
}

fn liveness(b: &Bench) -> Liveness {
    b.core.registry().liveness(&node("a")).expect("it is known")
}

fn says(b: &mut Bench, evidence: LinkEvidence) {
    b.apply(Event::LinkEvidence { node_id: node("a"), lane: 0, evidence });
}

/// A node with three attempts: one without a token, one that may be continued, and one that may not.
fn three() -> (Bench, [AttemptId; 3]) {
    let mut b = Bench::new();
    b.join("a", 4);
    link(&mut b, LinkState::Up);
    for spec in [task(), continued(), task()] {
        b.submit(spec).1.unwrap();
    }
    let [fresh, continues, started] = [0, 1, 2].map(|n| b.dispatches[n].attempt);
    b.apply(Event::Started { attempt: continues });
    b.apply(Event::Started { attempt: started });
    (b, [fresh, continues, started])
}

// CLOUD-1540
// CLOUD-2653
#[test]
fn a_quiet_link_moves_what_loses_nothing_and_leaves_the_rest_its_time() {
    let (mut b, [fresh, continues, _]) = three();
    link(&mut b, LinkState::Interrupted);
    assert!(b.closed.is_empty(), "an interruption by itself moves nobody");
    says(&mut b, LinkEvidence::Quiet("connection refused".into()));
    b.closed.sort_unstable();
    let mut moved = [fresh, continues];
    moved.sort_unstable();
    assert_eq!(b.closed, moved);
    // It was dialled again at once, and answered.
    b.advance_to(b.now + 2_000);
    assert_eq!(liveness(&b), Liveness::Online);
}

// CLOUD-2652
#[test]
fn a_node_that_goes_offline_while_its_link_is_interrupted_loses_only_what_can_be_placed_elsewhere() {
    let (mut b, [fresh, continues, started]) = three();
    b.advance_to(TIMEOUT_MS - 500);
    link(&mut b, LinkState::Interrupted);
    b.advance_to(TIMEOUT_MS + 1_000);
    assert_eq!(liveness(&b), Liveness::Offline);
    assert_eq!(b.closed.len(), 2);
    assert!(b.closed.contains(&fresh) && b.closed.contains(&continues), "{:?}", b.closed);
    // Its link is not back in time, and says so itself.
    b.end(started, 3, HowEnded::Broken("its link was not back in time".into()));
    assert_eq!(b.terminal.values().collect::<Vec<_>>(), [&ErrorCode::WorkerReset]);
    let (mut b, attempts) = three();
    b.advance_to(TIMEOUT_MS + 1_000);
    assert_eq!(b.closed.len(), attempts.len(), "without an interruption all end");
}

// CLOUD-1541
#[test]
fn an_attempt_that_is_not_listed_has_not_vanished_while_its_link_is_interrupted() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.submit(task()).1.unwrap();
    let attempt = b.dispatches[0].attempt;
    b.apply(Event::Accepted { attempt, replica_id: ReplicaId::new("r0").unwrap(), report_seq: 1 });
    link(&mut b, LinkState::Interrupted);
    b.beat("a", 2, 1, &[]);
    b.advance_to(b.now + 9_000);
    assert!(b.closed.is_empty(), "the resume says what became of it");
    link(&mut b, LinkState::Up);
    b.advance_to(b.now + 2_000);
    assert_eq!(b.closed, [attempt]);
}

// CLOUD-2641
#[test]
fn a_node_that_orders_do_not_reach_is_suspect_until_one_arrives() {
    let (mut b, _) = three();
    says(&mut b, LinkEvidence::OrdersDoNotArrive);
    assert_eq!(liveness(&b), Liveness::Suspect);
    b.beat("a", 2, 4, &[]);
    b.advance_to(b.now + 1_000);
    let reason = b.core.view(at(b.now)).nodes[0].reason.clone();
    assert_eq!(reason.as_deref(), Some("orders do not reach it"), "no heartbeat and no probe lifts it");
    says(&mut b, LinkEvidence::OrdersArrive);
    assert_eq!(liveness(&b), Liveness::Online);
    assert!(b.closed.is_empty(), "{:?}", b.closed);
}

// CLOUD-2626
#[test]
fn a_status_that_denies_and_a_connection_that_cannot_be_made_are_evidence_about_the_node() {
    let (mut b, _) = three();
    b.authorization = Err(Denied("it answers HTTP 401".into()));
    says(&mut b, LinkEvidence::Denied("it answers HTTP 401".into()));
    assert_eq!(liveness(&b), Liveness::Suspect);
    b.authorization = Ok(());
    b.advance_to(b.now + 5_000);
    assert_eq!(liveness(&b), Liveness::Online, "a probe with the token has lifted it");
    says(&mut b, LinkEvidence::CannotConnect("no route".into()));
    assert_eq!(liveness(&b), Liveness::Suspect);
    assert!(b.closed.is_empty(), "its link lives, and goes on");
}

// CLOUD-2680
#[test]
fn a_link_of_several_lanes_stands_as_its_worst_and_moves_nobody_while_one_is_up() {
    let (mut b, _) = three();
    lane(&mut b, 1, LinkState::Up);
    lane(&mut b, 1, LinkState::Interrupted);
    let shown = |b: &Bench| b.core.view(at(b.now)).nodes[0].link.as_ref().map(|link| link.state);
    assert_eq!(shown(&b), Some(LinkState::Interrupted));
    says(&mut b, LinkEvidence::Quiet("connection refused".into()));
    assert!(b.closed.is_empty(), "the other lane brings what runs there");
    link(&mut b, LinkState::Interrupted);
    says(&mut b, LinkEvidence::Quiet("connection refused".into()));
    assert_eq!(b.closed.len(), 2);
    // Orders that do not arrive by one are not said to by another.
    b.advance_to(b.now + 2_000);
    let on = |lane, evidence| Event::LinkEvidence { node_id: node("a"), lane, evidence };
    b.apply(on(1, LinkEvidence::OrdersDoNotArrive));
    says(&mut b, LinkEvidence::OrdersArrive);
    assert_eq!(liveness(&b), Liveness::Suspect);
    b.apply(on(1, LinkEvidence::OrdersArrive));
    assert_eq!(liveness(&b), Liveness::Online);
}
