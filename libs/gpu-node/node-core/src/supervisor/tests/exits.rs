//! Engines that end by themselves, and pools that are given up.

use super::*;

// CLOUD-2411
#[test]
fn an_engine_that_ends_is_started_again_after_a_growing_pause() {
    let mut machine = Machine::new(&[("a", plan("a", 400, false))]);
    machine.pass(1_500);
    assert!(machine.is_up("a"));
    let mut pauses = Vec::new();
    for _ in 0..4 {
        let before = machine.now;
        machine.kill("a");
        assert!(!machine.is_up("a"), "a dead engine is withdrawn at once");
        while !machine.is_up("a") {
            machine.pass(50);
        }
        pauses.push(machine.now - before - LOAD_MS);
    }
    assert!(pauses.windows(2).all(|pair| pair[0] < pair[1]), "{pauses:?}");
    assert!(pauses[0] <= 350 && pauses[3] <= 1_750, "{pauses:?}");
}

// CLOUD-2412
#[test]
fn ten_exits_in_a_minute_end_in_a_failed_pool_that_shows_its_last_lines() {
    let mut machine = Machine::new(&[("a", plan("a", 400, false))]);
    for n in 1..=10 {
        while !machine.is_up("a") {
            machine.pass(50);
            assert!(machine.now < 60_000, "only {n} kills in a minute");
        }
        machine.kill("a");
    }
    let (state, error) = machine.state("a");
    assert_eq!(state, PoolState::Failed);
    assert!(error.unwrap().contains("10 times within 60 s"));
    let declared = machine.core.declared(&BTreeMap::new());
    assert_eq!(declared[&id("a")].supervised.log_tail, ["its last line"]);
    machine.pass(59_000);
    assert_eq!(machine.starts("a"), 10, "it stays as it is");
    machine.send(Happened::Revive { pool_id: id("a") });
    machine.pass(2_000);
    assert!(machine.is_up("a"));
}

// CLOUD-2412
#[test]
fn a_pool_that_was_given_up_is_tried_again_after_a_cool_down_that_doubles() {
    let mut machine = Machine::new(&[("a", plan("a", 400, false))]);
    let mut waits = Vec::new();
    for _ in 0..6 {
        machine.wear_out("a");
        let next = machine.core.next_deadline(Moment::from_millis(machine.now)).unwrap();
        let span = next.millis_since(Moment::from_millis(machine.now)) / 1_000;
        assert!(machine.state("a").1.unwrap().contains(&format!("is tried again in {span} s")));
        waits.push((machine.back_after("a") - LOAD_MS) / 1_000);
    }
    assert_eq!(waits, [60, 120, 240, 480, 900, 900]);
    // A life that serves for long enough makes the next one the first again.
    machine.pass(61_000);
    machine.wear_out("a");
    assert_eq!((machine.back_after("a") - LOAD_MS) / 1_000, 60);
    // An order acts at once, and makes it the first again too.
    machine.wear_out("a");
    machine.send(Happened::Revive { pool_id: id("a") });
    assert!(machine.back_after("a") <= LOAD_MS + 100);
    machine.wear_out("a");
    assert_eq!((machine.back_after("a") - LOAD_MS) / 1_000, 60);
}

// CLOUD-2412
#[test]
fn a_purged_pool_is_not_tried_again_although_it_had_been_given_up() {
    let mut machine = Machine::new(&[("a", plan("a", 400, false))]);
    machine.wear_out("a");
    machine.send(Happened::Purge { pool_id: id("a") });
    let starts = machine.starts("a");
    machine.pass(120_000);
    assert_eq!((machine.state("a").0, machine.starts("a")), (PoolState::Failed, starts));
}

// CLOUD-2412
#[test]
fn deaths_with_a_culprit_give_no_pool_up_and_pause_as_others_do() {
    let mut machine = Machine::new(&[("a", PoolPlan { exit_limit: 3, ..plan("a", 400, false) })]);
    let mut pauses = Vec::new();
    for _ in 0..5 {
        machine.back_after("a");
        let run = machine.serving("a").unwrap();
        machine.end_by(run, "it was killed by SIGSEGV", true);
        assert_ne!(machine.state("a").0, PoolState::Failed);
        pauses.push(machine.back_after("a") - LOAD_MS);
    }
    assert!(pauses.windows(2).all(|pair| pair[0] < pair[1]), "{pauses:?}");
    machine.wear_out("a");
    assert!(machine.state("a").1.unwrap().contains("3 times within 60 s"), "those without one count");
}

// CLOUD-2413
#[test]
fn an_engine_that_never_gets_ready_is_stopped_and_counts_as_ended() {
    let slow = PoolPlan { load_timeout: Duration::from_millis(500), ..plan("a", 400, false) };
    let mut machine = Machine::new(&[("a", slow)]);
    machine.pass(1_000);
    assert!(machine.starts("a") >= 1 && !machine.is_up("a"));
    assert!(machine.state("a").1.unwrap().contains("not ready within 0 s"));
}
