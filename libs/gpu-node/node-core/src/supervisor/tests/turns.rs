//! Two pools that share a place, and tasks that ask for them in turns.

use super::*;

/// Milliseconds that a task runs.
const TASK_MS: u64 = 300;

/// When a task of a client in a closed loop comes.
const AFTER_THE_ONE_BEFORE: u64 = u64::MAX;

/// How a run of tasks went.
#[derive(Debug)]
struct Turns {
    loads: [u32; 2],
    took_ms: u64,
    /// Longest that a task waited.
    waited_ms: u64,
}

/// Runs tasks, each `(milliseconds at which it comes, pool)`, as the control plane does: a pool that
/// is not loaded is asked for at once and each 5 s, and a report each `beat_ms` is answered with the
/// pools for which tasks wait. A task at [`AFTER_THE_ONE_BEFORE`] comes when all before it are done.
fn run(tasks: &[(u64, usize)], slots: u32, min_resident: u64, beat_ms: u64) -> Turns {
    const NAMES: [&str; 2] = ["a", "b"];
    let pools = NAMES.map(|name| {
        let plan = PoolPlan { min_resident: Duration::from_secs(min_resident), ..plan(name, 700, true) };
        (name, plan)
    });
    let mut machine = Machine::new(&pools);
    let mut coming: Vec<(u64, usize)> = tasks.to_vec();
    let mut waiting: [Vec<u64>; 2] = [Vec::new(), Vec::new()];
    let mut running: Vec<(u64, RunId)> = Vec::new();
    let mut asked: [Option<u64>; 2] = [None, None];
    let (mut done, mut waited_ms) = (0, 0);
    while done < tasks.len() {
        assert!(machine.now < 300_000, "{done} of {} after {} ms", tasks.len(), machine.now);
        let now = machine.now;
        if let Some((at, _)) = coming.first_mut()
            && *at == AFTER_THE_ONE_BEFORE
            && waiting.iter().all(Vec::is_empty)
            && running.iter().all(|(until, _)| *until <= now)
        {
            *at = now;
        }
        for (_, pool) in coming.extract_if(.., |(at, _)| *at <= now) {
            waiting[pool].push(now);
        }
        for (_, run) in running.extract_if(.., |(until, _)| *until <= now) {
            if let Some(engine) = machine.engines.get_mut(&run) {
                engine.running -= 1;
            }
            done += 1;
        }
        machine.report_use();
        for (pool, name) in NAMES.into_iter().enumerate() {
            if let Some(run) = machine.serving(name) {
                asked[pool] = None;
                while !waiting[pool].is_empty() && machine.engines[&run].running < slots {
                    let engine = machine.engines.get_mut(&run).unwrap();
                    (engine.running, engine.served) = (engine.running + 1, engine.served + 1);
                    running.push((now + TASK_MS, run));
                    waited_ms = waited_ms.max(now - waiting[pool].remove(0));
                }
                machine.report_use();
            } else if !waiting[pool].is_empty() && asked[pool].is_none_or(|at| now >= at + 5_000) {
                asked[pool] = Some(now);
                machine.send(Happened::Load { pool_id: id(name) });
            }
        }
        if now.is_multiple_of(beat_ms) || std::mem::take(&mut machine.asked_waiting) {
            let waited_for = NAMES.into_iter().enumerate().filter(|(pool, _)| !waiting[*pool].is_empty());
            let waited_for = waited_for.map(|(_, name)| id(name)).collect();
            machine.send(Happened::Waiting(waited_for));
        }
        machine.pass(50);
    }
    Turns { loads: NAMES.map(|name| machine.starts(name)), took_ms: machine.now, waited_ms }
}

/// Ten tasks, five for each pool, in an order of its kind, so far apart.
fn tasks(order: u8, gap_ms: u64) -> Vec<(u64, usize)> {
    let pools: [usize; 10] = match order {
        0 => [0, 1, 0, 1, 0, 1, 0, 1, 0, 1],
        1 => [0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
        2 => [1, 0, 0, 1, 1, 0, 1, 0, 0, 1],
        _ => [0, 1, 1, 0, 0, 0, 1, 1, 0, 1],
    };
    pools.into_iter().enumerate().map(|(n, pool)| (n as u64 * gap_ms, pool)).collect()
}

// CLOUD-2421
// CLOUD-2424
#[test]
fn tasks_that_come_in_turns_load_neither_pool_more_than_twice() {
    for beat_ms in [1_000, 10_000] {
        for slots in [1, 4] {
            for min_resident in [5, 60] {
                for order in 0..4 {
                    for gap_ms in [0, 100, 500] {
                        let turns = run(&tasks(order, gap_ms), slots, min_resident, beat_ms);
                        let case = format!(
                            "beat {beat_ms} slots {slots} resident {min_resident} order {order} gap {gap_ms}: {turns:?}"
                        );
                        assert!(turns.loads.iter().all(|loads| *loads <= 2), "{case}");
                        assert!(turns.took_ms <= 12_000, "{case}");
                    }
                    // Farther apart than what counts as idle, loading is worth it: nobody waits long.
                    let turns = run(&tasks(order, 1_500), slots, min_resident, beat_ms);
                    assert!(turns.waited_ms <= 8_000, "order {order} slots {slots}: {turns:?}");
                }
            }
        }
    }
}

// CLOUD-2421
#[test]
fn nobody_starves_beside_a_pool_for_which_tasks_never_cease_to_come() {
    // One task after the other for the first pool, and a single one for the second.
    let mut tasks: Vec<(u64, usize)> = (0..120).map(|n| (n * 250, 0)).collect();
    tasks.push((3_000, 1));
    let turns = run(&tasks, 1, 5, 1_000);
    assert_eq!(turns.loads[1], 1);
    let single = run(&[(3_000, 1)], 1, 5, 1_000);
    assert!(single.waited_ms <= LOAD_MS + 200, "{single:?}");
    assert!(turns.loads[0] <= 2, "and the first one is loaded once more: {turns:?}");
}

// CLOUD-2421
#[test]
#[ignore = "long"]
#[expect(clippy::print_stdout, reason = "the loads are the result")]
fn the_loads_of_a_client_in_a_closed_loop_are_shown() {
    for (order, named) in [(0, "alternating"), (1, "grouped"), (2, "mixed")] {
        for min_resident in [5, 60] {
            let closed = tasks(order, 0).into_iter().map(|(_, pool)| (AFTER_THE_ONE_BEFORE, pool));
            let turns = run(&closed.collect::<Vec<_>>(), 1, min_resident, 1_000);
            println!(
                "one client, ten tasks one after the other, {named}, resident {min_resident} s: {turns:?}"
            );
            assert!(turns.loads.iter().all(|loads| (1..=5).contains(loads)), "{turns:?}");
        }
    }
}
