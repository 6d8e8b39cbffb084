//! Another plan for a pool: beside the old engines, after them, and back.

use super::*;

// CLOUD-2430
#[test]
fn a_reload_that_fits_beside_serves_all_the_time() {
    let mut machine = Machine::new(&[("a", plan("a", 400, false))]);
    machine.pass(1_500);
    let old = machine.serving("a").unwrap();
    machine.engines.get_mut(&old).unwrap().running = 1;
    machine.report_use();
    machine.send(Happened::Reload { pool_id: id("a"), plan: Box::new(plan("new", 500, false)) });
    while machine.serving("a") == Some(old) {
        machine.pass(50);
        assert!(machine.is_up("a"), "there is no moment without an engine");
    }
    assert!(machine.engines.contains_key(&old), "what runs on the old one finishes");
    machine.engines.get_mut(&old).unwrap().running = 0;
    machine.pass(500);
    assert!(!machine.engines.contains_key(&old));
    let declared = machine.core.declared(&BTreeMap::new());
    assert_eq!(declared[&id("a")].models[0].as_str(), "model-new");
    assert_eq!(declared[&id("a")].supervised.reload, None);
}

// CLOUD-2431
#[test]
fn a_reload_that_fails_beside_leaves_the_old_one_serving() {
    let mut machine = Machine::new(&[("a", plan("a", 400, false))]);
    machine.pass(1_500);
    let old = machine.serving("a").unwrap();
    machine.broken.insert(500);
    machine.send(Happened::Reload { pool_id: id("a"), plan: Box::new(plan("new", 500, false)) });
    machine.pass(5_000);
    assert_eq!(machine.serving("a"), Some(old));
    let declared = machine.core.declared(&BTreeMap::new());
    let supervised = &declared[&id("a")].supervised;
    assert!(supervised.reload.as_ref().unwrap().error.as_ref().unwrap().contains("exit status 1"));
    assert_eq!((supervised.restarts, machine.engines.len()), (0, 1));
}

// CLOUD-2432
#[test]
fn a_reload_without_room_stops_first_and_goes_back_when_it_fails() {
    for broken in [false, true] {
        let mut machine = Machine::new(&[("a", plan("a", 600, false))]);
        machine.pass(1_500);
        if broken {
            machine.broken.insert(700);
        }
        machine.send(Happened::Reload { pool_id: id("a"), plan: Box::new(plan("new", 700, false)) });
        machine.pass(5_000);
        assert!(machine.is_up("a"));
        let declared = machine.core.declared(&BTreeMap::new());
        let declared = &declared[&id("a")];
        let model = if broken { "model-a" } else { "model-new" };
        assert_eq!(declared.models[0].as_str(), model);
        let error = declared.supervised.reload.as_ref().and_then(|reload| reload.error.as_ref());
        assert_eq!(error.is_some(), broken);
    }
}

// CLOUD-2432
#[test]
fn a_reload_during_one_that_came_after_keeps_the_way_back() {
    for missing in [false, true] {
        let mut machine = Machine::new(&[("a", plan("a", 600, false))]);
        machine.pass(1_500);
        machine.broken.extend([700, 800]);
        machine.send(Happened::Reload { pool_id: id("a"), plan: Box::new(plan("new", 700, false)) });
        machine.pass(200);
        if missing {
            machine.missing.insert(800);
        }
        machine.send(Happened::Reload { pool_id: id("a"), plan: Box::new(plan("newer", 800, false)) });
        machine.pass(10_000);
        let declared = machine.core.declared(&BTreeMap::new());
        assert_eq!(declared[&id("a")].models[0].as_str(), "model-a", "missing: {missing}");
        assert!(machine.is_up("a"));
    }
}

// CLOUD-2430
#[test]
fn the_same_reload_again_changes_nothing_that_is_under_way() {
    let mut machine = Machine::new(&[("a", plan("a", 400, false))]);
    machine.pass(1_500);
    let reload = || Happened::Reload { pool_id: id("a"), plan: Box::new(plan("new", 500, false)) };
    machine.send(reload());
    machine.pass(500);
    machine.send(reload());
    machine.pass(600);
    assert_eq!((machine.preparations, machine.starts[&id("a")]), (2, 2), "one for each plan");
    assert_eq!(machine.core.declared(&BTreeMap::new())[&id("a")].models[0].as_str(), "model-new");
}

// CLOUD-2431
#[test]
fn a_reload_of_an_unloaded_pool_to_a_model_that_is_not_there_changes_nothing() {
    let mut machine = Machine::new(&[("a", plan("a", 400, true))]);
    machine.missing.insert(500);
    machine.send(Happened::Reload { pool_id: id("a"), plan: Box::new(plan("new", 500, true)) });
    machine.pass(100);
    let declared = machine.core.declared(&BTreeMap::new());
    assert_eq!(declared[&id("a")].models[0].as_str(), "model-a");
    assert!(declared[&id("a")].supervised.reload.as_ref().unwrap().error.is_some());
    machine.send(Happened::Reload { pool_id: id("a"), plan: Box::new(plan("newer", 300, true)) });
    machine.pass(3_000);
    assert!(machine.engines.is_empty(), "nobody has asked for it");
    machine.send(Happened::Load { pool_id: id("a") });
    machine.pass(2_000);
    assert!(machine.is_up("a"));
    assert_eq!(machine.core.declared(&BTreeMap::new())[&id("a")].models[0].as_str(), "model-newer");
}

// CLOUD-2958
#[test]
fn what_could_not_be_prepared_is_tried_at_once_when_something_was_mended() {
    let pools = [("a", plan("a", 400, false))];
    let mut machine = Machine::new(&[]);
    machine.missing.insert(400);
    machine.configure(&pools);
    machine.pass(1_000);
    assert_eq!((machine.preparations, machine.engines.len()), (1, 0));
    // The file allows something that no plan tells of.
    machine.configure(&pools);
    assert_eq!(machine.preparations, 2);
    machine.missing.clear();
    machine.send(Happened::Mended);
    assert_eq!(machine.preparations, 3);
    machine.pass(2_000);
    assert!(machine.is_up("a"));
    machine.send(Happened::Mended);
    assert_eq!((machine.preparations, machine.is_up("a")), (3, true), "nothing was wrong");
}

// CLOUD-2432
#[test]
fn going_back_takes_what_the_new_plan_had_published_out_of_service_first() {
    let pair = |mib| PoolPlan { replicas: 2, ..plan("a", mib, false) };
    let mut machine = Machine::new(&[("a", pair(300))]);
    machine.pass(1_500);
    machine.send(Happened::Reload { pool_id: id("a"), plan: Box::new(pair(450)) });
    while machine.engines.values().filter(|engine| engine.bytes == 450 * MIB).count() < 2 {
        machine.pass(50);
    }
    let new: Vec<RunId> = machine.engines.keys().copied().collect();
    machine.engines.get_mut(&new[1]).unwrap().ready_at += 5_000;
    while !machine.engines[&new[0]].published {
        machine.pass(50);
    }
    machine.engines.get_mut(&new[0]).unwrap().running = 1;
    machine.report_use();
    machine.end(new[1], "exit status 1");
    assert!(!machine.engines[&new[0]].published, "it is withdrawn before it is stopped");
    machine.pass(300);
    assert!(machine.engines.contains_key(&new[0]), "what runs on it finishes");
    machine.engines.get_mut(&new[0]).unwrap().running = 0;
    machine.pass(3_000);
    assert!(machine.engines.values().all(|engine| engine.bytes == 300 * MIB && engine.published));
    assert_eq!(machine.engines.len(), 2);
}

// CLOUD-2430
#[test]
fn what_the_old_engines_did_is_not_held_against_those_that_replace_them() {
    let mut machine = Machine::new(&[("a", PoolPlan { exit_limit: 1, ..plan("a", 300, false) })]);
    machine.pass(1_500);
    machine.send(Happened::Reload { pool_id: id("a"), plan: Box::new(plan("new", 400, false)) });
    machine.pass(500);
    machine.kill("a");
    assert_eq!(machine.state("a").0, PoolState::Failed);
    machine.pass(1_500);
    assert!(machine.is_up("a"));
    machine.kill("a");
    machine.pass(2_000);
    assert!(machine.is_up("a"), "the first end of the new one is no storm");
}
