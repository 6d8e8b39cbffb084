//! The simulator as a program: many seeds, one seed with its trace, the mutants.

#![expect(clippy::print_stdout, reason = "a command-line program prints its result")]

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use sim::scenario;

/// Runs the cluster's production cores under virtual time.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many schedules to run.
    #[arg(long, default_value_t = 1_000)]
    seeds: u64,
    /// The first seed of them.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Run one schedule and print what happens in it.
    #[arg(long)]
    seed: Option<u64>,
    /// Switch each rule off in turn: every one must be noticed.
    #[arg(long)]
    mutants: bool,
    /// Run the text scenarios against their golden output.
    #[arg(long)]
    scenarios: bool,
    /// Write the golden output anew.
    #[arg(long)]
    bless: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let good = if let Some(seed) = arguments.seed {
        one(seed)
    } else if arguments.mutants {
        mutants(arguments.seeds)
    } else if arguments.scenarios || arguments.bless {
        scenario::run_all(arguments.bless)
    } else {
        many(arguments.first, arguments.seeds)
    };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn one(seed: u64) -> bool {
    let (coverage, outcome) = sim::run_seed(seed, None, true);
    match outcome {
        Ok(trace) => {
            trace.iter().for_each(|line| println!("{line}"));
            println!("{coverage}\nseed {seed}: every invariant held");
            true
        }
        Err(failure) => {
            failure.trace.iter().for_each(|line| println!("{line}"));
            println!("seed {seed} FAILED {}", failure.what);
            false
        }
    }
}

/// In so many schedules everything that is listed happens.
const ENOUGH: u64 = 1_000;

fn many(first: u64, count: u64) -> bool {
    let start = Instant::now();
    let step = (count / 10).max(1);
    let progress = |done: u64| {
        if done.is_multiple_of(step) {
            println!("  {done} of {count} schedules, {:.0} s", start.elapsed().as_secs_f64());
        }
    };
    let (coverage, failure) = sim::run_seeds(first, count, None, &progress);
    if let Some(failure) = failure {
        println!(
            "seed {} FAILED {}\nsee it with: cargo xtask sim --seed {}",
            failure.seed, failure.what, failure.seed
        );
        return false;
    }
    println!("{coverage}, {:.1} s", start.elapsed().as_secs_f64());
    let missing = coverage.missing();
    if missing.is_empty() {
        return true;
    }
    let is_enough = count >= ENOUGH;
    println!("{}never happened: {}", if is_enough { "FAILED: " } else { "" }, missing.join("; "));
    !is_enough
}

fn mutants(seeds: u64) -> bool {
    // A mutant may trip over an assertion of the core: that is being noticed, not news.
    std::panic::set_hook(Box::new(|_| {}));
    let mut good = true;
    for (mutant, failure) in sim::run_mutants(seeds) {
        match failure {
            Some(failure) => println!("red   without {mutant:?}: seed {} {}", failure.seed, failure.what),
            None => {
                println!("GREEN without {mutant:?}: not noticed in {seeds} schedules");
                good = false;
            }
        }
    }
    good
}
