//! What is chosen, and that the choice is what a walk over every pool says.

use std::collections::BTreeMap;
use std::sync::Arc;

use pool_registry_types::engines::EngineSet;
use pool_registry_types::placement::{Labels, PlacementConstraints, Refusal};
use pool_registry_types::pool::EngineKind;
use pool_registry_types::{LabelName, ModelRef, NodeId, PoolId, PoolKey};
use proptest::prelude::{Just, any, prop, prop_assert, prop_assert_eq, proptest};
use proptest::strategy::Strategy as _;

use super::Strategy;
use super::*;

fn key(node: &str, pool: &str) -> PoolKey {
    PoolKey::new(NodeId::new(node).unwrap(), PoolId::new(pool).unwrap())
}

fn model(name: &str) -> ModelRef {
    ModelRef::new(name).unwrap()
}

fn pool(node: &str, busy: u32, total: u32) -> Candidate {
    Candidate {
        key: key(node, "pool-0"),
        availability: Availability::Placeable,
        engine: Some(EngineKind::LlamaCpp),
        models: vec![model("m")],
        ctx_max: Some(4096),
        device_mask: None,
        labels: Arc::default(),
        slots_total: total,
        slots_busy: busy,
        held: false,
        vram_free_bytes: None,
        load_estimate_ms: None,
        fits_now: true,
        passes_on: true,
    }
}

fn index(pools: impl IntoIterator<Item = Candidate>) -> PoolIndex {
    index_by(Strategy::LeastLoaded, pools)
}

fn index_by(strategy: Strategy, pools: impl IntoIterator<Item = Candidate>) -> PoolIndex {
    let mut index = PoolIndex::new(strategy);
    for pool in pools {
        index.upsert(pool);
    }
    index
}

fn label(name: &str) -> LabelName {
    LabelName::new(name).unwrap()
}

fn in_zone(zone: &str, pool: Candidate) -> Candidate {
    Candidate { labels: Arc::new(Labels::from([(label("zone"), label(zone))])), ..pool }
}

fn constraints(json: &str) -> PlacementConstraints {
    serde_json::from_str(json).unwrap()
}

/// The node that the task gets, or why it gets none.
fn node_for(index: &PoolIndex, shape: &TaskShape<'_>) -> Result<String, NoPlacement> {
    choose(index, shape).map(|choice| choice.pool.node_id.to_string())
}

fn shape<'a>(model: &'a ModelRef, tried: &'a [PoolKey]) -> TaskShape<'a> {
    TaskShape { tried, ..TaskShape::plain(model) }
}

// CLOUD-1706
#[test]
fn the_pool_with_the_smallest_share_of_busy_slots_is_taken() {
    let index = index([pool("a", 3, 8), pool("b", 1, 4), pool("c", 1, 2)]);
    assert_eq!(choose(&index, &shape(&model("m"), &[])).unwrap().pool, key("b", "pool-0"));
}

// CLOUD-1707
#[test]
fn equal_shares_go_to_the_most_free_vram_and_then_by_turn() {
    let with = |node, vram| Candidate { vram_free_bytes: vram, ..pool(node, 0, 4) };
    let index_of = |pools: Vec<Candidate>| index(pools);
    let m = model("m");
    let chosen = |pools| choose(&index_of(pools), &shape(&m, &[])).unwrap().pool.node_id.to_string();
    let mib = |n: u64| Some(n << 20);
    assert_eq!(chosen(vec![with("a", mib(100)), with("b", mib(300)), with("c", None)]), "b");
    // One after the other, each free again before the next comes; the last readings differ by noise.
    let mut index = index_of(vec![with("b", mib(300)), with("a", mib(310)), with("c", mib(290))]);
    let taken: Vec<String> = (0..6)
        .map(|_| {
            let pool = choose(&index, &shape(&m, &[])).unwrap().pool;
            let name: &'static str =
                ["a", "b", "c"].into_iter().find(|n| *n == pool.node_id.as_str()).unwrap();
            index.taken(&pool);
            index.upsert(Candidate { slots_busy: 1, ..with(name, mib(300)) });
            index.upsert(with(name, mib(300)));
            name.to_owned()
        })
        .collect();
    assert_eq!(taken, ["a", "b", "c", "a", "b", "c"]);
}

// CLOUD-1002
#[test]
fn the_same_pool_id_on_two_nodes_is_two_pools() {
    let index = index([pool("a", 4, 4), pool("b", 0, 4)]);
    assert_eq!(choose(&index, &shape(&model("m"), &[])).unwrap().pool, key("b", "pool-0"));
    assert_eq!(index.placeable(&model("m")).count(), 2);
}

// CLOUD-1708
#[test]
fn a_tried_pool_waits_for_an_untried_one_even_a_full_one() {
    let m = model("m");
    let tried = [key("a", "pool-0")];
    let index = index([pool("a", 0, 4), pool("b", 4, 4)]);
    assert_eq!(choose(&index, &shape(&m, &tried)), Err(NoPlacement::Full));
}

// CLOUD-2847
#[test]
fn a_body_that_is_passed_on_goes_to_nodes_that_do_so() {
    let m = model("m");
    let other = model("other");
    let older = Candidate { passes_on: false, ..pool("a", 0, 4) };
    let passes = TaskShape { passes_on: true, ..shape(&m, &[]) };
    let of_older = index([older.clone()]);
    assert_eq!(node_for(&of_older, &passes), Err(NoPlacement::NoPool));
    let of_other = TaskShape { passes_on: true, ..TaskShape::plain(&other) };
    assert_eq!((of_older.lack(&passes), of_older.lack(&of_other)), (Some(Lack::PassesOn), None));
    let both = index([older, pool("b", 3, 4)]);
    assert_eq!((node_for(&both, &passes), both.lack(&passes)), (Ok("b".into()), None));
    assert_eq!(node_for(&both, &shape(&m, &[])), Ok("a".into()));
}

// CLOUD-1709
#[test]
fn a_tried_pool_is_taken_again_after_the_backoff_when_nothing_else_fits() {
    let m = model("m");
    let tried = [key("a", "pool-0")];
    let other_engine = Candidate { engine: Some(EngineKind::OpenAi), ..pool("b", 0, 4) };
    let index = index([pool("a", 0, 4), other_engine]);
    let engines = EngineSet::from_iter([EngineKind::LlamaCpp]);
    let waiting = TaskShape { engines, may_repeat: false, ..shape(&m, &tried) };
    assert_eq!(choose(&index, &waiting), Err(NoPlacement::BackingOff));
    let over = TaskShape { may_repeat: true, ..waiting };
    assert_eq!(choose(&index, &over).unwrap().pool, key("a", "pool-0"));
}

// CLOUD-1710
#[test]
fn unknown_context_fits_and_a_short_one_does_not() {
    let m = model("m");
    let unknown = Candidate { ctx_max: None, ..pool("b", 3, 4) };
    let index = index([pool("a", 0, 4), unknown]);
    let long = TaskShape { ctx: Some(8192), ..shape(&m, &[]) };
    assert_eq!(choose(&index, &long).unwrap().pool, key("b", "pool-0"));
}

// CLOUD-1712
#[test]
fn the_refusals_are_counted_for_people() {
    let m = model("m");
    let index = index([
        pool("a", 4, 4),
        Candidate { availability: Availability::Offline, ..pool("b", 0, 4) },
        Candidate { models: vec![model("other")], ..pool("c", 0, 4) },
    ]);
    assert_eq!(
        count_refusals(&index, &shape(&m, &[])),
        "pools: 1 on an offline node, 1 without the model, 1 full"
    );
}

// CLOUD-1715
#[test]
fn each_strategy_takes_pools_in_its_own_order() {
    let with = |node, busy, vram| Candidate { vram_free_bytes: Some(vram), ..pool(node, busy, 4) };
    let pools = || [with("a", 2, 30), with("b", 1, 10), with("c", 3, 20)];
    let m = model("m");
    let first = |strategy| node_for(&index_by(strategy, pools()), &shape(&m, &[])).unwrap();
    assert_eq!(first(Strategy::LeastLoaded), "b");
    assert_eq!(first(Strategy::MostFreeVram), "a");
    let mut turns = index_by(Strategy::RoundRobin, pools());
    let taken: Vec<String> = (0..6)
        .map(|_| {
            let choice = choose(&turns, &shape(&m, &[])).unwrap();
            turns.taken(&choice.pool);
            choice.pool.node_id.to_string()
        })
        .collect();
    assert_eq!(taken, ["a", "b", "c", "a", "b", "c"]);
    let any = index_by(Strategy::Random, pools());
    let mut drawn = BTreeMap::new();
    for draw in 0..300 {
        *drawn.entry(node_for(&any, &TaskShape { draw, ..shape(&m, &[]) }).unwrap()).or_insert(0) += 1;
    }
    assert_eq!(drawn.into_values().collect::<Vec<_>>(), [100, 100, 100], "every pool is drawn as often");
}

// CLOUD-1716
#[test]
fn a_pin_is_never_left() {
    let m = model("m");
    let pin = constraints(r#"{"mode":"pin","node_id":"b"}"#);
    let shape = TaskShape { constraints: Some(&pin), ..shape(&m, &[]) };
    assert_eq!(node_for(&index([pool("a", 0, 4), pool("b", 3, 4)]), &shape).unwrap(), "b");
    assert_eq!(node_for(&index([pool("a", 0, 4), pool("b", 4, 4)]), &shape), Err(NoPlacement::Full));
    assert_eq!(node_for(&index([pool("a", 0, 4)]), &shape), Err(NoPlacement::NoPool));
    // Also not when it has failed there: it is tried there again.
    let tried = [key("b", "pool-0")];
    let again = TaskShape { tried: &tried, ..shape };
    assert_eq!(node_for(&index([pool("a", 0, 4), pool("b", 3, 4)]), &again).unwrap(), "b");
}

// CLOUD-1717
#[test]
fn preferred_pools_come_first_and_avoided_ones_last_and_without_fallback_only_they_count() {
    let m = model("m");
    let pools = || [pool("a", 0, 4), pool("b", 1, 4), pool("c", 2, 4)];
    let of = |json: &str, index: &PoolIndex| {
        let constraints = constraints(json);
        node_for(index, &TaskShape { constraints: Some(&constraints), ..shape(&m, &[]) })
    };
    let free = index(pools());
    assert_eq!(of(r#"{"prefer_pools":["c/pool-0"]}"#, &free).unwrap(), "c");
    assert_eq!(of(r#"{"mode":"prefer","node_id":"b"}"#, &free).unwrap(), "b");
    assert_eq!(of(r#"{"avoid_pools":["a/pool-0"]}"#, &free).unwrap(), "b");
    let full = index([pool("a", 0, 4), pool("b", 4, 4), pool("c", 4, 4)]);
    assert_eq!(of(r#"{"prefer_pools":["c/pool-0"]}"#, &full).unwrap(), "a");
    let strict = r#"{"mode":"prefer","prefer_pools":["c/pool-0"],"allow_fallback":false}"#;
    assert_eq!(of(strict, &full), Err(NoPlacement::Full));
    assert_eq!(of(r#"{"avoid_pools":["pool-0"]}"#, &full).unwrap(), "a", "nothing else is left");
    assert_eq!(of(r#"{"avoid_pools":["pool-0"],"allow_fallback":false}"#, &full), Err(NoPlacement::NoPool));
}

// CLOUD-1718
#[test]
fn labels_and_device_masks_are_required_exactly() {
    let m = model("m");
    let masked = Candidate { device_mask: Some("GPU1".into()), ..in_zone("b", pool("b", 3, 4)) };
    let index = index([in_zone("a", pool("a", 0, 4)), masked, pool("c", 0, 4)]);
    let of = |json: &str| {
        let constraints = constraints(json);
        node_for(&index, &TaskShape { constraints: Some(&constraints), ..shape(&m, &[]) })
    };
    assert_eq!(of(r#"{"require_labels":{"zone":"b"}}"#).unwrap(), "b");
    assert_eq!(of(r#"{"require_device_mask":"GPU1"}"#).unwrap(), "b");
    assert_eq!(of(r#"{"require_labels":{"zone":"b","tier":"x"}}"#), Err(NoPlacement::NoPool));
    assert_eq!(of(r#"{"require_device_mask":"GPU0"}"#), Err(NoPlacement::NoPool));
}

// CLOUD-1719
#[test]
fn a_session_goes_back_to_its_warm_pool_while_that_is_free() {
    let m = model("m");
    let warm = key("c", "pool-0");
    let shape = TaskShape { warm: Some(&warm), ..shape(&m, &[]) };
    assert_eq!(node_for(&index([pool("a", 0, 4), pool("c", 3, 4)]), &shape).unwrap(), "c");
    assert_eq!(node_for(&index([pool("a", 0, 4), pool("c", 4, 4)]), &shape).unwrap(), "a");
}

// CLOUD-1720
#[test]
fn tasks_of_a_session_spread_over_the_values_of_a_label() {
    let m = model("m");
    let index = index([
        in_zone("x", pool("a", 0, 4)),
        in_zone("x", pool("b", 0, 4)),
        in_zone("y", pool("c", 2, 4)),
        pool("d", 3, 4),
    ]);
    let spread_by = constraints(r#"{"spread_by":"zone"}"#);
    let of = |counts: &[(Option<&str>, u32)]| {
        let spread: Spread = counts.iter().map(|(zone, n)| (zone.map(label), *n)).collect();
        node_for(
            &index,
            &TaskShape { constraints: Some(&spread_by), spread: Some(&spread), ..shape(&m, &[]) },
        )
    };
    assert_eq!(of(&[]).unwrap(), "a");
    assert_eq!(of(&[(Some("x"), 1)]).unwrap(), "c");
    assert_eq!(of(&[(Some("x"), 1), (Some("y"), 1)]).unwrap(), "d");
    assert_eq!(of(&[(Some("x"), 1), (Some("y"), 1), (None, 2)]).unwrap(), "a");
}

// CLOUD-1721
#[test]
fn a_tripped_pool_is_not_taken_and_says_so() {
    let m = model("m");
    let index = index([Candidate { availability: Availability::Tripped, ..pool("a", 0, 4) }]);
    let refusals: Vec<_> = explain(&index, &shape(&m, &[])).map(|verdict| verdict.refusal).collect();
    assert_eq!(refusals, [Some(Refusal::Tripped)]);
    assert_eq!(choose(&index, &shape(&m, &[])), Err(NoPlacement::NoPool));
}

fn any_candidate() -> impl proptest::strategy::Strategy<Value = Candidate> {
    (
        0_u8..6,
        0_u8..2,
        prop::sample::select(vec![
            Availability::Placeable,
            Availability::Placeable,
            Availability::Placeable,
            Availability::Offline,
            Availability::Suspect,
            Availability::Draining,
            Availability::NotReady,
            Availability::Loading,
            Availability::Loadable,
            Availability::Tripped,
        ]),
        any::<bool>(),
        prop::sample::subsequence(vec![model("m"), model("n")], 0..=2),
        prop::option::of(prop::sample::select(vec![512_u32, 4096])),
        (0_u32..5, 0_u32..5),
        prop::bool::weighted(0.1),
        prop::option::of(0_u64..3),
    )
        .prop_map(|(node, pool_id, availability, llama, models, ctx_max, (total, busy), held, vram)| {
            Candidate {
                key: key(&format!("n{node}"), &format!("p{pool_id}")),
                availability,
                engine: Some(if llama { EngineKind::LlamaCpp } else { EngineKind::OpenAi }),
                models,
                ctx_max,
                device_mask: None,
                labels: if llama {
                    Arc::new(Labels::from([(label("zone"), label("x"))]))
                } else {
                    Arc::default()
                },
                slots_total: total,
                slots_busy: busy,
                held,
                vram_free_bytes: vram,
                load_estimate_ms: None,
                fits_now: true,
                passes_on: true,
            }
        })
}

proptest! {
    // CLOUD-1711
    /// The index may be updated in any order; the choice is what a walk over all pools says.
    #[test]
    fn the_choice_agrees_with_the_walk_over_every_pool(
        facts in prop::collection::vec(any_candidate(), 0..30),
        removed in prop::collection::vec((0_u8..6, 0_u8..2), 0..4),
        tried in prop::collection::vec((0_u8..6, 0_u8..2), 0..4),
        engines in prop::sample::select(vec![EngineSet::ALL, EngineSet::from_iter([EngineKind::LlamaCpp])]),
        ctx in prop::option::of(Just(1024_u32)),
        may_repeat in any::<bool>(),
        preference in prop::option::of(prop::sample::select(vec![
            r#"{"mode":"pin","node_id":"n1"}"#,
            r#"{"require_labels":{"zone":"x"}}"#,
            r#"{"mode":"prefer","prefer_pools":["p1"],"allow_fallback":false}"#,
            r#"{"prefer_pools":["n2/p0"],"avoid_pools":["p1"]}"#,
            r#"{"avoid_pools":["p1"],"allow_fallback":false}"#,
        ])),
        (strategy, draw) in (prop::sample::select(Strategy::ALL.to_vec()), any::<u64>()),
    ) {
        let (_, strategy) = strategy;
        let mut index = PoolIndex::new(strategy);
        for fact in facts {
            index.upsert(fact);
        }
        for (node, pool_id) in removed {
            index.remove(&key(&format!("n{node}"), &format!("p{pool_id}")));
        }
        let tried: Vec<PoolKey> =
            tried.into_iter().map(|(n, p)| key(&format!("n{n}"), &format!("p{p}"))).collect();
        let m = model("m");
        let preference = preference.map(constraints);
        let constraints = preference.as_ref();
        let shape = TaskShape { engines, ctx, constraints, tried: &tried, may_repeat, draw, ..TaskShape::plain(&m) };
        let walked: Vec<_> =
            explain(&index, &shape).map(|verdict| (&verdict.candidate.key, verdict.refusal)).collect();
        let mut counts: BTreeMap<Refusal, u32> = BTreeMap::new();
        walked.iter().filter_map(|(_, refusal)| *refusal).for_each(|r| *counts.entry(r).or_default() += 1);
        let parts: Vec<String> = counts.iter().map(|(refusal, n)| format!("{n} {refusal}")).collect();
        let reported = if parts.is_empty() { "no pools known".into() } else { format!("pools: {}", parts.join(", ")) };
        prop_assert_eq!(count_refusals(&index, &shape), reported);
        let loadable = |c: &Candidate| c.availability == Availability::Loadable && c.models.contains(&m);
        prop_assert_eq!(index.has_loadable(&m), index.all().any(loadable));
        // The free ones are those that a walk finds, each once.
        let free = index.of_model(&m).into_iter().flat_map(|pools| pools.free(draw));
        let mut free: Vec<&PoolKey> = free.map(|row| &index.at(row).unwrap().key).collect();
        free.sort();
        let takes = |c: &&Candidate| c.availability == Availability::Placeable && c.has_free_slot() && c.models.contains(&m);
        prop_assert_eq!(free, index.all().filter(takes).map(|c| &c.key).collect::<Vec<_>>());
        let eligible: Vec<&PoolKey> =
            walked.iter().filter(|(_, refusal)| refusal.is_none()).map(|(key, _)| *key).collect();
        let full = walked.iter().any(|(_, refusal)| *refusal == Some(Refusal::SlotsFull));
        let again: Vec<&PoolKey> = walked
            .iter()
            .filter(|(key, refusal)| *refusal == Some(Refusal::Tried) && index.get(key).unwrap().has_free_slot())
            .map(|(key, _)| *key)
            .collect();
        let tried_at_all = walked.iter().any(|(_, refusal)| *refusal == Some(Refusal::Tried));
        match choose(&index, &shape) {
            Ok(choice) if !eligible.is_empty() => {
                prop_assert!(eligible.contains(&&choice.pool));
                let share = |key: &PoolKey| {
                    let c = index.get(key).unwrap();
                    f64::from(c.slots_busy) / f64::from(c.slots_total)
                };
                if strategy == Strategy::LeastLoaded && constraints.is_none() {
                    for other in &eligible {
                        prop_assert!(share(&choice.pool) <= share(other) + 1e-6);
                    }
                }
                let avoided = |key: &PoolKey| constraints.is_some_and(|w| w.avoids(key));
                prop_assert!(!avoided(&choice.pool) || eligible.iter().all(|key| avoided(key)));
            }
            Ok(choice) => prop_assert!(may_repeat && !full && again.contains(&&choice.pool)),
            Err(no) => {
                prop_assert!(eligible.is_empty());
                match no {
                    NoPlacement::NoPool => prop_assert!(!full && !tried_at_all),
                    NoPlacement::Full => prop_assert!(full || (may_repeat && tried_at_all && again.is_empty())),
                    NoPlacement::BackingOff => prop_assert!(!may_repeat && !full && tried_at_all),
                }
            }
        }
    }
}
