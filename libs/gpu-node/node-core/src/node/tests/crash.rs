//! The ends of engines, and whose attempts they may be.

use super::*;

fn crash(node: &NodeCore, n: u128) -> Option<(String, u32, bool)> {
    match node.verdict(&attempt(n)) {
        Verdict::Known(crash) => crash.map(|crash| (crash.signal, crash.suspects, crash.suspect)),
        Verdict::Awaited => panic!("the end of attempt {n} is not known"),
    }
}

// CLOUD-2416
#[test]
fn a_crash_names_the_attempts_of_the_last_two_seconds_the_same_to_all() {
    let mut node = serving(1, 8);
    node.engine_began(&pool_id(), &replica_id(0));
    accept_at(&mut node, 1_000, 1).unwrap();
    accept_at(&mut node, 3_000, 2).unwrap();
    accept_at(&mut node, 4_000, 3).unwrap();
    accept_at(&mut node, 4_500, 4).unwrap();
    accept_at(&mut node, 4_600, 5).unwrap();
    // One ends well, one never came to its engine, one is broken off: only this one may have done it.
    node.cleared(&attempt(3));
    node.ended(&attempt(3));
    node.cleared(&attempt(4));
    node.ended_before_release(at(4_700), &attempt(5));
    assert_eq!(node.verdict(&attempt(1)), Verdict::Awaited);
    assert_eq!(node.engine_ended(at(5_000), &pool_id(), &replica_id(0), Some("SIGSEGV")), 2);
    node.ended(&attempt(5));
    assert_eq!(crash(&node, 1), Some(("SIGSEGV".into(), 2, false)), "it had run for 4 s");
    assert_eq!(crash(&node, 2), Some(("SIGSEGV".into(), 2, true)));
    assert_eq!(crash(&node, 4), Some(("SIGSEGV".into(), 2, false)));
    let again = node.engine_ended(at(5_100), &pool_id(), &replica_id(0), Some("SIGSEGV"));
    assert_eq!(again, 0, "an end is told once");
}

// CLOUD-2416
#[test]
fn an_end_that_is_no_crash_or_another_engines_names_nobody() {
    let mut node = serving(1, 8);
    accept_at(&mut node, 0, 1).unwrap();
    assert_eq!(crash(&node, 1), None, "of an engine that was not started here nothing is waited for");
    node.engine_began(&pool_id(), &replica_id(0));
    accept_at(&mut node, 100, 2).unwrap();
    assert_eq!(node.engine_ended(at(200), &pool_id(), &replica_id(0), None), 0);
    assert_eq!(crash(&node, 2), None);
    // The next one of the replica has nothing of the one before.
    node.engine_began(&pool_id(), &replica_id(0));
    accept_at(&mut node, 1_000, 3).unwrap();
    assert_eq!(node.verdict(&attempt(3)), Verdict::Awaited);
    assert_eq!(node.engine_ended(at(1_500), &pool_id(), &replica_id(0), Some("SIGABRT")), 1);
    assert_eq!(crash(&node, 3), Some(("SIGABRT".into(), 1, true)));
}
