use pool_registry_types::pool::EngineKind;
use pool_registry_types::{ModelRef, NodeId, PoolId, PoolKey};
use proptest::prelude::*;

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
        standing: Standing::Placeable,
        engine: EngineKind::LlamaCpp,
        models: vec![model("m")],
        ctx_max: Some(4096),
        slots_total: total,
        slots_busy: busy,
        held: false,
        vram_free_bytes: None,
    }
}

fn index(pools: impl IntoIterator<Item = Candidate>) -> PoolIndex {
    let mut index = PoolIndex::new();
    pools.into_iter().for_each(|pool| index.upsert(pool));
    index
}

fn shape<'a>(model: &'a ModelRef, tried: &'a [PoolKey]) -> TaskShape<'a> {
    TaskShape { model, engine: None, ctx: None, tried, may_repeat: true }
}

// CLOUD-1706
#[test]
fn the_pool_with_the_smallest_share_of_busy_slots_is_taken() {
    let index = index([pool("a", 3, 8), pool("b", 1, 4), pool("c", 1, 2)]);
    assert_eq!(choose(&index, &shape(&model("m"), &[])).unwrap().pool, key("b", "pool-0"));
}

// CLOUD-1707
#[test]
fn equal_shares_go_to_the_most_free_vram_and_then_to_the_key() {
    let with = |node, vram| Candidate { vram_free_bytes: vram, ..pool(node, 0, 4) };
    let index_of = |pools: Vec<Candidate>| index(pools);
    let m = model("m");
    let chosen = |pools| choose(&index_of(pools), &shape(&m, &[])).unwrap().pool.node_id.to_string();
    assert_eq!(chosen(vec![with("a", Some(1)), with("b", Some(2)), with("c", None)]), "b");
    assert_eq!(chosen(vec![with("b", Some(2)), with("a", Some(2))]), "a");
}

// CLOUD-1002
#[test]
fn the_same_pool_id_on_two_nodes_is_two_pools() {
    let index = index([pool("a", 4, 4), pool("b", 0, 4)]);
    assert_eq!(choose(&index, &shape(&model("m"), &[])).unwrap().pool, key("b", "pool-0"));
    assert_eq!(index.slots_of(&model("m")), 8);
}

// CLOUD-1708
#[test]
fn a_tried_pool_waits_for_an_untried_one_even_a_full_one() {
    let m = model("m");
    let tried = [key("a", "pool-0")];
    let index = index([pool("a", 0, 4), pool("b", 4, 4)]);
    assert_eq!(choose(&index, &shape(&m, &tried)), Err(NoPlacement::Full));
}

// CLOUD-1709
#[test]
fn a_tried_pool_is_taken_again_after_the_backoff_when_nothing_else_fits() {
    let m = model("m");
    let tried = [key("a", "pool-0")];
    let other_engine = Candidate { engine: EngineKind::OpenAi, ..pool("b", 0, 4) };
    let index = index([pool("a", 0, 4), other_engine]);
    let waiting = TaskShape { engine: Some(EngineKind::LlamaCpp), may_repeat: false, ..shape(&m, &tried) };
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
        Candidate { standing: Standing::Offline, ..pool("b", 0, 4) },
        Candidate { models: vec![model("other")], ..pool("c", 0, 4) },
    ]);
    assert_eq!(
        count_refusals(&index, &shape(&m, &[])),
        "pools: 1 on an offline node, 1 without the model, 1 full"
    );
}

fn any_candidate() -> impl Strategy<Value = Candidate> {
    (
        0_u8..6,
        0_u8..2,
        prop::sample::select(vec![
            Standing::Placeable,
            Standing::Placeable,
            Standing::Placeable,
            Standing::Offline,
            Standing::Suspect,
            Standing::Draining,
            Standing::NotReady,
        ]),
        any::<bool>(),
        prop::sample::subsequence(vec![model("m"), model("n")], 0..=2),
        prop::option::of(prop::sample::select(vec![512_u32, 4096])),
        (0_u32..5, 0_u32..5),
        prop::bool::weighted(0.1),
        prop::option::of(0_u64..3),
    )
        .prop_map(|(node, pool_id, standing, llama, models, ctx_max, (total, busy), held, vram)| {
            Candidate {
                key: key(&format!("n{node}"), &format!("p{pool_id}")),
                standing,
                engine: if llama { EngineKind::LlamaCpp } else { EngineKind::OpenAi },
                models,
                ctx_max,
                slots_total: total,
                slots_busy: busy,
                held,
                vram_free_bytes: vram,
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
        engine in prop::option::of(Just(EngineKind::LlamaCpp)),
        ctx in prop::option::of(Just(1024_u32)),
        may_repeat in any::<bool>(),
    ) {
        let mut index = PoolIndex::new();
        facts.into_iter().for_each(|fact| index.upsert(fact));
        for (node, pool_id) in removed {
            index.remove(&key(&format!("n{node}"), &format!("p{pool_id}")));
        }
        let tried: Vec<PoolKey> =
            tried.into_iter().map(|(n, p)| key(&format!("n{n}"), &format!("p{p}"))).collect();
        let m = model("m");
        let shape = TaskShape { model: &m, engine, ctx, tried: &tried, may_repeat };
        let walked: Vec<_> = explain(&index, &shape).collect();
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
                for other in eligible {
                    prop_assert!(share(&choice.pool) <= share(other) + 1e-6);
                }
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
