//! Both ends of a link over a network that loses, delays, cuts and reorders.

mod host;
mod lane;
mod link_facts;
mod node_facts;
mod ops;
mod oracle;
mod post_facts;
mod world;

use proptest::collection::vec;
use proptest::prelude::*;

use ops::Op;
use oracle::Over;
use world::World;

fn faults() -> impl Strategy<Value = Op> {
    prop_oneof![
        2 => (10_u64..9_000).prop_map(|millis| Op::Cut { up: true, down: true, millis }),
        1 => (10_u64..9_000).prop_map(|millis| Op::Cut { up: true, down: false, millis }),
        1 => (10_u64..9_000).prop_map(|millis| Op::Cut { up: false, down: true, millis }),
        2 => any::<bool>().prop_map(|half_open| Op::Reset { half_open }),
        1 => (100_u64..4_000).prop_map(|millis| Op::LosePosts { millis }),
        1 => (100_u64..4_000).prop_map(|millis| Op::LoseAnswers { millis }),
        1 => (100_u64..4_000).prop_map(|millis| Op::LatePosts { millis }),
        1 => (600_u64..6_000).prop_map(|millis| Op::Stall { millis }),
    ]
}

fn attempts() -> impl Strategy<Value = Op> {
    (1_u32..60, 1_u64..300, any::<bool>(), 0_u8..10).prop_map(|(frames, every, keep, size)| Op::Start {
        frames,
        every,
        keep,
        size,
    })
}

/// What may also happen to a cluster.
fn anything() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => attempts(),
        4 => faults(),
        1 => (8_usize..24).prop_map(|attempts| Op::StartLarge { attempts }),
        3 => (0_usize..40).prop_map(|which| Op::Cancel { which }),
        1 => (100_u64..20_000).prop_map(|millis| Op::Refuse { millis }),
        1 => (9_000_u64..25_000).prop_map(|millis| Op::Cut { up: true, down: true, millis }),
        1 => (0_usize..40, 100_u64..14_000).prop_map(|(which, millis)| Op::Stick { which, millis }),
        1 => (100_u64..5_000).prop_map(|millis| Op::Full { millis }),
        2 => (0_usize..40, any::<bool>()).prop_map(|(which, again)| Op::Misread { which, again }),
        1 => (100_u64..30_000, any::<bool>()).prop_map(|(millis, mute)| Op::Flap { millis, mute }),
        1 => Just(Op::RestartControl),
        1 => Just(Op::RestartNode),
        1 => Just(Op::Credential),
        1 => Just(Op::Leave),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, max_shrink_iters: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    // CLOUD-2660
    #[test]
    fn no_record_is_lost_doubled_or_spliced_and_what_was_ended_ends_on_the_node_whatever_happens(
        ops in vec((0_u64..30_000, anything()), 1..30), seed in any::<u64>()
    ) {
        World::new(seed).run(ops);
    }

    // CLOUD-2652
    #[test]
    fn a_link_that_is_away_for_less_than_nine_seconds_costs_no_attempt(
        starts in vec((0_u64..2_000, attempts()), 1..12),
        fault in faults(), at in 500_u64..6_000, seed in any::<u64>()
    ) {
        let mut ops = starts;
        ops.push((at, fault));
        let ends = World::new(seed).run(ops);
        for (attempt, over) in ends {
            prop_assert!(
                matches!(over, Over::Ended | Over::Unknown | Over::NeverSent),
                "attempt {attempt} is {over:?}"
            );
        }
    }
}
