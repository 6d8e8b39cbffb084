//! Tasks that wait for pools whose engines do not run.

use pool_registry_types::pool::Supervised;

use super::*;

// CLOUD-2424
#[test]
fn a_node_is_told_for_which_of_its_loaded_pools_tasks_wait() {
    let mut b = Bench::new();
    let loaded = || {
        let supervised = Supervised { load_estimate_ms: Some(500), ..Supervised::default() };
        PoolReport { supervised: Some(supervised), ..report(1, &[]) }
    };
    let waiting = |b: &mut Bench, seq| {
        b.report("a", seq, loaded());
        let answer = b.replies.values().rev().find_map(|answer| match answer {
            Ok(Answer::Heartbeat(answer)) => Some(answer.waiting.clone()),
            _ => None,
        });
        answer.unwrap()
    };
    b.join("a", 1);
    assert!(waiting(&mut b, 2).is_empty());
    b.submit(task()).1.unwrap();
    assert!(waiting(&mut b, 3).is_empty(), "it runs, and nobody waits");
    b.submit(task()).1.unwrap();
    assert_eq!(waiting(&mut b, 4), [pool_registry_types::PoolId::new("pool-0").unwrap()]);
    b.end(b.dispatches[0].attempt, 1, HowEnded::Finished);
    assert!(waiting(&mut b, 5).is_empty());
}

pub(super) fn unloaded(state: PoolState, fits: bool) -> PoolReport {
    let supervised = Supervised { fits, ..Supervised::default() };
    let report = report(0, &[]);
    PoolReport { state, ready: false, replicas: vec![], supervised: Some(supervised), ..report }
}

impl Bench {
    fn join_unloaded(&mut self, name: &str, fits: bool) {
        let reply = self.reply();
        self.apply(Event::Register { reply, request: register(name), registrar: None });
        self.report(name, 1, unloaded(PoolState::Loadable, fits));
    }

    fn asked(&self) -> Vec<&str> {
        self.loads.iter().map(|(_, name)| name.as_str()).collect()
    }
}

// CLOUD-2426
#[test]
fn a_waiting_task_has_its_pool_loaded_and_asks_again_until_it_is() {
    let mut b = Bench::new();
    b.join_unloaded("a", true);
    assert_eq!(b.asked(), [""; 0], "nobody waits");
    b.submit(task()).1.unwrap();
    b.submit(task()).1.unwrap();
    assert_eq!(b.asked(), ["a"], "once for both");
    b.advance_to(11_000);
    assert_eq!(b.asked(), ["a"; 3], "an order may be lost");
    b.report("a", 2, unloaded(PoolState::Loading, true));
    b.advance_to(21_000);
    assert_eq!(b.asked(), ["a"; 3], "it loads");
    b.report("a", 3, report(2, &[]));
    assert_eq!(b.dispatches.len(), 2);
    b.advance_to(29_000);
    assert_eq!(b.asked(), ["a"; 3]);
}

// CLOUD-2427
#[test]
fn a_pool_without_memory_is_not_asked_for_and_one_that_fits_at_once_is_preferred() {
    let mut b = Bench::new();
    b.join_unloaded("a", false);
    b.submit(task()).1.unwrap();
    assert_eq!(b.asked(), [""; 0]);
    let explained = b.core.explain_request(&task());
    assert_eq!(explained.pools[0].refusal, Some(pool_registry_types::placement::Refusal::VramShort));
    b.join_unloaded("b", true);
    assert_eq!(b.asked(), ["b"]);
}

// CLOUD-2428
#[test]
fn a_second_pool_is_loaded_when_a_task_has_waited_long_for_a_full_one() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join_unloaded("b", true);
    b.submit(task()).1.unwrap();
    b.submit(task()).1.unwrap();
    assert_eq!((b.dispatches.len(), b.asked().len()), (1, 0), "a slot may be free soon");
    b.advance_to(9_900);
    assert_eq!(b.asked(), [""; 0]);
    b.advance_to(10_100);
    assert_eq!(b.asked(), ["b"]);
}

// CLOUD-2429
#[test]
fn a_loadable_pool_counts_as_having_its_model() {
    let mut b = Bench::new();
    b.join_unloaded("a", true);
    let mut seq = 1;
    for second in (5..60).step_by(5) {
        b.advance_to(second * 1_000);
        seq += 1;
        b.report("a", seq, unloaded(PoolState::Loadable, true));
    }
    assert!(b.submit(task()).1.is_ok());
    assert_eq!(b.asked(), ["a"]);
}

// CLOUD-2481
#[test]
fn what_no_engine_of_the_model_can_do_is_refused_at_once() {
    let mut b = Bench::new();
    let reply = b.reply();
    b.apply(Event::Register { reply, request: register("a"), registrar: None });
    b.report("a", 1, PoolReport { engine: Some(EngineKind::OpenAi), ..report(2, &[]) });
    let lacking = Lacking { engine: EngineKind::OpenAi, field: "grammar".into() };
    let engines = [EngineKind::LlamaCpp].into_iter().collect();
    let guided = TaskSpec { engines, lacking: vec![lacking], ..task() };
    assert!(b.submit(guided.clone()).1.is_ok(), "other nodes may still come back");
    b.advance_to(TIMEOUT_MS + 1);
    b.report("a", 2, PoolReport { engine: Some(EngineKind::OpenAi), ..report(2, &[]) });
    let error = b.submit(guided.clone()).1.unwrap_err();
    assert_eq!((error.code, error.engine), (ErrorCode::Unsupported, Some(EngineKind::OpenAi)));
    assert!(error.message.starts_with("grammar"), "{error}");
    b.join("b", 2);
    assert!(b.submit(guided).1.is_ok());
    assert_eq!((b.dispatches.len(), b.node_of(0)), (1, "b"));
}

// CLOUD-1109
#[test]
fn a_pool_of_an_unknown_kind_of_engine_gets_no_task_and_promises_no_model() {
    let mut b = Bench::new();
    let reply = b.reply();
    b.apply(Event::Register { reply, request: register("a"), registrar: None });
    b.report("a", 1, PoolReport { engine: None, ..report(2, &[]) });
    assert!(b.submit(task()).1.is_ok(), "other nodes may still come back");
    b.advance_to(TIMEOUT_MS + 1);
    b.report("a", 2, PoolReport { engine: None, ..report(2, &[]) });
    assert_eq!(b.submit(task()).1.unwrap_err().code, ErrorCode::ModelNotAvailable);
    assert!(b.dispatches.is_empty());
}

// CLOUD-2439
#[test]
fn followers_are_told_how_far_the_preparation_of_a_pool_has_come() {
    let mut b = Bench::new();
    b.join_unloaded("a", true);
    let at = |text: &str| {
        let preparation = Some(text.to_owned());
        let supervised = Supervised { fits: true, preparation, ..Supervised::default() };
        PoolReport { supervised: Some(supervised), ..unloaded(PoolState::Loading, true) }
    };
    b.changes.clear();
    for (seq, text) in [(2, "1 of 9 MiB"), (3, "1 of 9 MiB"), (4, "8 of 9 MiB")] {
        b.report("a", seq, at(text));
    }
    b.report("a", 5, report(2, &[]));
    let reported = b.changes.iter().filter_map(|change| match change {
        ClusterChange::Pool { preparation, .. } => Some(preparation.as_deref()),
        _ => None,
    });
    assert_eq!(reported.collect::<Vec<_>>(), [Some("1 of 9 MiB"), Some("8 of 9 MiB"), None]);
}

// CLOUD-2847
#[test]
fn a_body_that_is_passed_on_is_refused_where_nodes_are_older_and_placed_where_one_is_not() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.advance_to(TIMEOUT_MS + 1);
    b.report("a", 2, report(2, &[]));
    let passes = TaskSpec { passes_on: true, ..task() };
    assert_eq!(b.submit(passes.clone()).1.unwrap_err().code, ErrorCode::Unsupported);
    let reply = b.reply();
    let request = RegisterRequest { features: vec!["openai".into()], ..register("b") };
    b.apply(Event::Register { reply, request, registrar: None });
    b.report("b", 1, report(1, &[]));
    b.submit(passes).1.unwrap();
    assert_eq!(b.last_dispatch().pool.node_id.as_str(), "b");
}

// CLOUD-2843
#[test]
fn a_session_of_a_body_that_is_passed_on_has_no_bounds_and_is_warm_all_the_same() {
    let mut b = Bench::new();
    let reply = b.reply();
    b.apply(Event::Register {
        reply,
        request: RegisterRequest { features: vec!["openai".into()], ..register("a") },
        registrar: None,
    });
    b.report("a", 1, report(2, &[]));
    let session = Some(pool_registry_types::SessionId(Uuid::from_u128(7)));
    for n in 0..20 {
        b.submit(TaskSpec { passes_on: true, session_id: session, ..task() }).1.unwrap();
        assert_eq!(b.last_dispatch().warm_replica.is_some(), n > 0, "{n}");
        b.serve(n, 1, 1, 1);
    }
}
