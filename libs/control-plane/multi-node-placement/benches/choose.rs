//! How long one placement takes among many pools: choose, and the index's update after it.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use multi_node_placement::{Availability, Candidate, PoolIndex, Strategy, TaskShape, choose};
use pool_registry_types::pool::EngineKind;
use pool_registry_types::{ModelRef, NodeId, PoolId, PoolKey};

fn fleet(pools: u32) -> (PoolIndex, ModelRef) {
    let model = ModelRef::new("m").expect("a valid model ref");
    let mut index = PoolIndex::new(Strategy::LeastLoaded);
    for n in 0..pools {
        let node = NodeId::new(&format!("node-{}", n / 8)).expect("a valid node id");
        let pool = PoolId::new(&format!("pool-{}", n % 8)).expect("a valid pool id");
        index.upsert(Candidate {
            key: PoolKey::new(node, pool),
            availability: Availability::Placeable,
            engine: Some(EngineKind::LlamaCpp),
            models: vec![model.clone()],
            ctx_max: Some(8192),
            device_mask: None,
            labels: Arc::default(),
            slots_total: 8,
            slots_busy: n % 8,
            held: false,
            vram_free_bytes: Some(u64::from(n) << 20),
            load_estimate_ms: None,
            fits_now: true,
            passes_on: true,
        });
    }
    (index, model)
}

fn placement(c: &mut Criterion) {
    let mut group = c.benchmark_group("place_and_reserve");
    for pools in [1_000, 10_000] {
        let (mut index, model) = fleet(pools);
        group.bench_function(BenchmarkId::from_parameter(pools), |b| {
            b.iter(|| {
                let choice = choose(&index, &TaskShape::plain(&model)).expect("a free pool");
                let mut candidate = index.get(&choice.pool).expect("the chosen pool").clone();
                candidate.slots_busy = (candidate.slots_busy + 1) % 8;
                index.upsert(candidate);
                black_box(choice)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, placement);
criterion_main!(benches);
