//! Many seeds, one seed, and the mutants.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;

use crate::coverage::Coverage;
use crate::draw::{self, Mutant};
use crate::world::World;

/// A schedule that broke an invariant.
#[derive(Debug, Clone)]
pub struct Failure {
    pub seed: u64,
    pub what: String,
    pub trace: Vec<String>,
}

/// Runs the schedule of one seed.
pub fn run_seed(
    seed: u64,
    switched_off: Option<Mutant>,
    traced: bool,
) -> (Coverage, Result<Vec<String>, Failure>) {
    let mut plan = draw::plan(seed, switched_off);
    // It must make no difference, and another test shows that it makes none.
    plan.read = seed.is_multiple_of(4);
    let mut world = World::new(plan, traced);
    let outcome = catch_unwind(AssertUnwindSafe(|| world.run()));
    world.close_books();
    let trace = world.take_trace();
    let what = match outcome {
        Ok(Ok(())) => return (world.coverage().clone(), Ok(trace)),
        Ok(Err(what)) => what,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            format!("a panic: {}", text.unwrap_or_else(|| "without a text".into()))
        }
    };
    (world.coverage().clone(), Err(Failure { seed, what, trace }))
}

/// What the control plane does in the schedule of a seed, as one number; with readers that look at
/// it all the time, or without.
pub fn digest(seed: u64, read: bool) -> u64 {
    let mut world = World::new(draw::Plan { read, ..draw::plan(seed, None) }, false);
    // A schedule that breaks an invariant is not what this looks for.
    let _ = world.run();
    world.digest()
}

/// Runs seeds `first..first + count` on all cores. Stops at the first failure. `progress` is
/// called with the number of finished schedules.
pub fn run_seeds(
    first: u64,
    count: u64,
    switched_off: Option<Mutant>,
    progress: &(dyn Fn(u64) + Sync),
) -> (Coverage, Option<Failure>) {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (next, failed, done) = (AtomicU64::new(first), AtomicBool::new(false), AtomicU64::new(0));
    let (send, receive) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (send, next, failed, done) = (send.clone(), &next, &failed, &done);
            scope.spawn(move || {
                let mut coverage = Coverage::default();
                let mut failure = None;
                while !failed.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        break;
                    }
                    let (seen, outcome) = run_seed(seed, switched_off, false);
                    coverage.merge(&seen);
                    if let Err(found) = outcome {
                        failed.store(true, Ordering::Relaxed);
                        failure = Some(found);
                    }
                    progress(done.fetch_add(1, Ordering::Relaxed) + 1);
                }
                // The receiver outlives the scope.
                let _ = send.send((coverage, failure));
            });
        }
    });
    drop(send);
    let mut total = Coverage::default();
    let mut first_failure: Option<Failure> = None;
    for (coverage, failure) in receive {
        total.merge(&coverage);
        if let Some(found) = failure
            && first_failure.as_ref().is_none_or(|known| found.seed < known.seed)
        {
            first_failure = Some(found);
        }
    }
    (total, first_failure)
}

/// Switches each rule off in turn. Returns for each the failure that gave it away, if any did.
pub fn run_mutants(seeds: u64) -> Vec<(Mutant, Option<Failure>)> {
    Mutant::all().map(|mutant| (mutant, run_seeds(1, seeds, Some(mutant), &|_| {}).1)).collect()
}
