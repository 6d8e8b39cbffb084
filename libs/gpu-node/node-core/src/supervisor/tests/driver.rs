//! GPUs and drivers that are not well.

use super::*;

// CLOUD-2414
#[test]
fn an_engine_whose_gpu_is_sick_takes_nothing_new_before_it_is_started_again() {
    let mut machine = Machine::new(&[("a", plan("a", 400, false))]);
    machine.pass(1_500);
    let run = machine.serving("a").unwrap();
    machine.engines.get_mut(&run).unwrap().running = 1;
    machine.report_use();
    machine.faults += 1;
    machine.look();
    assert!(machine.is_up("a"), "an error of the driver alone is none of the engine's");
    machine.send(Happened::Alarmed { run, line: DRIVER_ERROR.into() });
    assert!(!machine.is_up("a") && machine.engines.contains_key(&run), "what runs may finish");
    machine.engines.get_mut(&run).unwrap().running = 0;
    machine.pass(1_000);
    assert!(machine.state("a").1.unwrap().contains("CUDA error"));
    machine.pass(1_000);
    assert!(machine.is_up("a"));
    machine.healthy = false;
    machine.pass(1_000);
    assert!(!machine.is_up("a"));
    assert!(machine.state("a").1.unwrap().contains("GPU0 is lost"));
    machine.healthy = true;
    machine.pass(3_000);
    assert!(machine.is_up("a"));
}

// CLOUD-2414
#[test]
fn a_line_that_no_driver_confirms_decides_nothing() {
    let mut machine = Machine::new(&[]);
    machine.faults = 3;
    machine.look();
    machine.configure(&[("a", plan("a", 400, false))]);
    machine.pass(1_500);
    let run = machine.serving("a").unwrap();
    for _ in 0..12 {
        machine.send(Happened::Alarmed { run, line: DRIVER_ERROR.into() });
        machine.pass(2_000);
    }
    assert_eq!((machine.serving("a"), machine.starts("a")), (Some(run), 1), "what is older proves nothing");
    // What the driver says in time counts, and what it says later does not.
    machine.pass(6_000);
    machine.faults += 1;
    machine.pass(500);
    assert_eq!(machine.serving("a"), Some(run));
    let mut machine = Machine::new(&[("a", plan("a", 400, false))]);
    machine.pass(1_500);
    let run = machine.serving("a").unwrap();
    machine.send(Happened::Alarmed { run, line: DRIVER_ERROR.into() });
    machine.pass(2_000);
    machine.faults += 1;
    machine.look();
    assert!(!machine.is_up("a"));
}

// CLOUD-2414
#[test]
fn without_a_driver_an_engine_that_serves_is_believed_and_not_its_line() {
    let mut machine = Machine::new(&[]);
    machine.blind = true;
    machine.look();
    machine.configure(&[("a", plan("a", 400, false))]);
    machine.pass(1_500);
    let run = machine.serving("a").unwrap();
    machine.send(Happened::Alarmed { run, line: DRIVER_ERROR.into() });
    machine.pass(3_000);
    assert_eq!(machine.serving("a"), Some(run));
    machine.silent = true;
    machine.report_use();
    assert!(!machine.is_up("a"), "it says so, and serves nobody");
}

// CLOUD-2414
#[test]
fn restarts_for_reported_errors_keep_apart_and_give_no_pool_up() {
    let mut machine = Machine::new(&[("a", PoolPlan { exit_limit: 2, ..plan("a", 400, false) })]);
    let mut pauses = Vec::new();
    let mut report = |machine: &mut Machine| {
        machine.back_after("a");
        let run = machine.serving("a").unwrap();
        machine.faults += 1;
        machine.look();
        machine.send(Happened::Alarmed { run, line: DRIVER_ERROR.into() });
        assert!(!machine.is_up("a"), "a confirmed error takes it out at once");
        pauses.push((machine.back_after("a") - LOAD_MS) / 1_000);
        assert_ne!(machine.state("a").0, PoolState::Failed);
    };
    for _ in 0..7 {
        report(&mut machine);
    }
    machine.pass(3_700_000);
    report(&mut machine);
    // The first after an hour without is made at once.
    let expected = [0, 30, 60, 120, 240, 480, 600, 0];
    for (pause, gap) in pauses.iter().zip(expected) {
        assert!((gap.max(2) - 2..=gap + 1).contains(pause), "{pauses:?}");
    }
    assert_eq!(pauses.len(), expected.len());
}
