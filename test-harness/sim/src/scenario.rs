//! Scenarios in text, each with the golden list of what happens in it.
//!
//! A scenario is a plan written down instead of drawn: a few settings, then steps with their
//! times in milliseconds. Its golden file is the trace of the run; a change of behaviour shows
//! as a difference of text.

#![expect(clippy::print_stdout, reason = "the runner prints the result of each scenario")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use node_core::attempts::{HELD_BYTES, MAX_ATTEMPT_BYTES};
use task_scheduler::{FullLane, Strategy, Timing};
use task_stream::MAX_LOG_BYTES;

use crate::draw::{HeardBy, LinkDraws, LinkFault, NodeFault, NodePlan, Plan, Replays, Step, TaskPlan};
use crate::world::World;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios")
}

/// Runs every scenario; `bless` writes the golden files anew. Returns whether all agree.
pub fn run_all(bless: bool) -> bool {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder())
        .expect("the folder of scenarios is there")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "txt"))
        .collect();
    files.sort();
    let mut good = !files.is_empty();
    for file in files {
        let name = file.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        match run_file(&file, bless) {
            Ok(()) => println!("ok    {name}"),
            Err(why) => {
                println!("FAILED {name}: {why}");
                good = false;
            }
        }
    }
    good
}

fn run_file(file: &Path, bless: bool) -> Result<(), String> {
    let text = std::fs::read_to_string(file).map_err(|e| e.to_string())?;
    let mut world = World::new(parse(&text)?, true);
    let outcome = world.run();
    let mut trace = world.take_trace().join("\n");
    trace.push('\n');
    outcome.map_err(|broken| format!("{broken}\n{trace}"))?;
    let golden = file.with_extension("golden");
    if bless {
        return std::fs::write(&golden, &trace).map_err(|e| e.to_string());
    }
    let expected = std::fs::read_to_string(&golden).map_err(|e| format!("{}: {e}", golden.display()))?;
    let differs = trace.lines().zip(expected.lines()).find(|(is, was)| is != was);
    match differs {
        Some((is, was)) => Err(format!("expected {was:?}, got {is:?} (bless it with --bless)")),
        None if trace.lines().count() != expected.lines().count() => Err("another number of lines".into()),
        None => Ok(()),
    }
}

/// Reads a scenario. Lines: `node slots N [odd] [link]`,
/// `task tokens N [batch] [poison] [bad] [continue] [replay] [pin=nI] [session=N]`, `set <name> <value>`, `at <ms> <step> …`; `#` starts a comment.
pub fn parse(text: &str) -> Result<Plan, String> {
    let mut plan = Plan {
        seed: 1,
        switched_off: None,
        timing: Timing { heartbeat_interval: Duration::from_secs(10), node_timeout: Duration::from_secs(30) },
        queue_timeout: Duration::from_secs(600),
        first_token_timeout: Duration::from_secs(60),
        token_idle_timeout: Duration::from_secs(20),
        capacity: 1024,
        full_lane: FullLane::Reject,
        strategy: Strategy::LeastLoaded,
        nodes: Vec::new(),
        tasks: Vec::new(),
        steps: Vec::new(),
        horizon_ms: 0,
        lost: 0,
        doubled: 0,
        late: 0,
        read: false,
        stream_faults: 0,
        lost_stops: 0,
        kept: 0,
        link_breaks: 0,
        held_bytes: HELD_BYTES,
        lost_pieces: 0,
        lost_answers: 0,
        repeated_answers: 0,
        late_reads: 0,
        slow_readers: 0,
        links: LinkDraws::default(),
        log_bytes: MAX_LOG_BYTES,
        attempt_bytes: MAX_ATTEMPT_BYTES,
        first_token_ms: 2_000,
        pace_ms: 500,
    };
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if !line.is_empty() {
            parse_line(&mut plan, line).ok_or_else(|| format!("line {}: {line:?} is no step", number + 1))?;
        }
    }
    plan.horizon_ms = plan.horizon_ms.max(plan.steps.iter().map(|(at, _)| *at).max().unwrap_or(0));
    Ok(plan)
}

/// What may stand behind a node and a task; a value is behind the equals sign.
const NODE_FLAGS: &[&str] = &["odd", "on_demand", "ttl_ms=", "link"];
const TASK_FLAGS: &[&str] = &["batch", "poison", "bad", "crashes", "continue", "replay", "pin=", "session="];

/// Whether each is one of those, and has a value where it needs one that can be read.
fn are_known(flags: &[&str], known: &[&str]) -> bool {
    flags.iter().all(|flag| match flag.split_once('=') {
        None => known.contains(flag),
        Some((name, value)) => {
            let is_number = name == "pin" || value.parse::<u64>().is_ok();
            known.contains(&format!("{name}=").as_str()) && is_number && !value.is_empty()
        }
    })
}

fn parse_line(plan: &mut Plan, line: &str) -> Option<()> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        ["node", "slots", slots, flags @ ..] if are_known(flags, NODE_FLAGS) => plan.nodes.push(NodePlan {
            slots: slots.parse().ok()?,
            replicas: 1,
            model: 0,
            zone: 0,
            odd: flags.contains(&"odd"),
            on_demand: flags.contains(&"on_demand"),
            ttl_ms: flags.iter().find_map(|flag| flag.strip_prefix("ttl_ms=")?.parse().ok()),
            second: None,
            link: flags.contains(&"link"),
        }),
        ["task", "tokens", tokens, flags @ ..] if are_known(flags, TASK_FLAGS) => plan.tasks.push(TaskPlan {
            model: 0,
            batch: flags.contains(&"batch"),
            tokens: tokens.parse().ok()?,
            deadline_ms: None,
            poison: flags.contains(&"poison"),
            bad: flags.contains(&"bad"),
            crashes: flags.contains(&"crashes"),
            recovery: if flags.contains(&"replay") {
                Some(Replays::FromTheStart)
            } else {
                flags.contains(&"continue").then_some(Replays::FromTheEnd)
            },
            constraints: flags.iter().find_map(|flag| {
                let json = format!(r#"{{"mode":"pin","node_id":"{}"}}"#, flag.strip_prefix("pin=")?);
                serde_json::from_str(&json).ok()
            }),
            session: flags.iter().find_map(|flag| flag.strip_prefix("session=")?.parse().ok()),
        }),
        ["set", "seed", value] => plan.seed = value.parse().ok()?,
        ["set", "horizon_ms", value] => plan.horizon_ms = value.parse().ok()?,
        ["set", "log_bytes", value] => plan.log_bytes = value.parse().ok()?,
        ["set", "attempt_bytes", value] => plan.attempt_bytes = value.parse().ok()?,
        ["set", "kept", value] => plan.kept = value.parse().ok()?,
        ["at", at, step @ ..] => plan.steps.push((at.parse().ok()?, parse_step(step)?)),
        _ => return None,
    }
    Some(())
}

fn parse_step(words: &[&str]) -> Option<Step> {
    let n = |word: &str| word.parse::<u64>().ok();
    let node = |word: &str| word.strip_prefix('n')?.parse::<usize>().ok();
    let task = |word: &str| word.strip_prefix('t')?.parse::<usize>().ok();
    Some(match words {
        ["submit", t] => Step::Submit { task: task(t)? },
        ["cancel", t] => Step::Cancel { task: task(t)? },
        ["crash", i, "down", ms] => Step::CrashNode { node: node(i)?, down_ms: n(ms)? },
        ["leave", i, "down", ms] => Step::LeaveNode { node: node(i)?, down_ms: n(ms)? },
        ["stop", i, "for", ms] => Step::StopNode { node: node(i)?, for_ms: n(ms)? },
        ["partition", i, "for", ms] => {
            Step::Partition { node: node(i)?, to_cp: true, to_node: true, for_ms: n(ms)? }
        }
        ["lose-heartbeats", "for", ms] => Step::LoseHeartbeats { for_ms: n(ms)? },
        ["kill-engine", i, "down", ms] => Step::KillEngine { node: node(i)?, down_ms: n(ms)? },
        ["hang-engine", i, "for", ms] => Step::HangEngine { node: node(i)?, for_ms: n(ms)? },
        ["sick-engine", i, "for", ms] => Step::SickEngine { node: node(i)?, for_ms: n(ms)? },
        ["busy-engine", i, "for", ms] => Step::BusyEngine { node: node(i)?, for_ms: n(ms)? },
        ["drain", i] => Step::Drain { node: node(i)? },
        ["resume", i] => Step::Resume { node: node(i)? },
        ["twin", i] => Step::Twin { node: node(i)? },
        ["restart-control", "down", ms] => Step::RestartControl { down_ms: n(ms)? },
        ["fault", i, name, "for", ms] => {
            let (_, fault) = NodeFault::ALL.into_iter().find(|(known, _)| known == name)?;
            Step::NodeFault { node: node(i)?, fault, for_ms: n(ms)? }
        }
        ["shortage", "for", ms] => Step::Shortage { for_ms: n(ms)? },
        ["double-reports", i, "for", ms] => Step::DoubleReports { node: node(i)?, for_ms: n(ms)? },
        ["shutdown-control", "grace", grace, "down", ms] => {
            Step::ShutdownControl { grace_ms: n(grace)?, down_ms: n(ms)? }
        }
        ["cut-link", i, "for", ms] => {
            let fault = LinkFault::Cut { up: true, down: true };
            Step::Link { node: node(i)?, fault, for_ms: n(ms)? }
        }
        ["reset-link", i] => Step::Link { node: node(i)?, fault: LinkFault::Reset(HeardBy::Both), for_ms: 0 },
        ["lose-answers", i, "for", ms] => {
            Step::Link { node: node(i)?, fault: LinkFault::AnswersLost, for_ms: n(ms)? }
        }
        ["power-loss", "down", ms] => Step::PowerLoss { down_ms: n(ms)? },
        ["stall-control", "for", ms] => Step::StallControl { for_ms: n(ms)? },
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::draw::Mutant;

    // CLOUD-1903
    #[test]
    fn scenarios_agree_with_their_golden_output() {
        assert!(run_all(false));
    }

    // CLOUD-1903
    #[test]
    fn a_step_that_is_none_is_named_by_its_line() {
        assert_eq!(
            parse("node slots 1\nat 5 explode n1").unwrap_err(),
            "line 2: \"at 5 explode n1\" is no step"
        );
        for line in
            ["node slots 1 on-demand", "task tokens 5 posion", "task tokens 5 session=x", "set sede 3"]
        {
            let why = parse(&format!("node slots 1\n{line}")).unwrap_err();
            assert!(why.contains("line 2") && why.contains(line), "{why}");
        }
    }

    // CLOUD-1900
    // CLOUD-1905
    // CLOUD-2662
    #[test]
    fn every_invariant_holds_in_the_first_schedules() {
        let (coverage, failure) = crate::run_seeds(1, 150, None, &|_| {});
        assert_eq!(failure.map(|f| (f.seed, f.what)), None);
        assert!(coverage.dispatches > 1_000);
    }

    // CLOUD-1921
    // CLOUD-1922
    #[test]
    fn streams_are_lost_in_pieces_stand_still_and_grow_too_long_in_the_first_schedules() {
        let (coverage, _) = crate::run_seeds(1, 150, None, &|_| {});
        let is_missed = |name: &&str| coverage.counts.get(name).copied().unwrap_or(0) == 0;
        let kinds = [
            "stream: piece lost",
            "stream: gap noticed",
            "stream: answer lost",
            "stream: acceptance doubled",
            "stream: several chunks in one flush",
            "stream: window full",
            "stream: too long for its node",
            "core: stream too long",
            "core: no answer",
        ];
        assert_eq!(kinds.into_iter().filter(is_missed).collect::<Vec<_>>(), Vec::<&str>::new());
    }

    // CLOUD-2661
    #[test]
    fn links_are_cut_half_open_late_and_left_by_both_ends_in_the_first_schedules() {
        let (coverage, _) = crate::run_seeds(1, 300, None, &|_| {});
        let is_missed = |name: &&str| coverage.counts.get(name).copied().unwrap_or(0) == 0;
        let kinds = [
            "fault: link cut",
            "fault: all links cut",
            "fault: control plane lost its power",
            "link: attempt resumed",
            "link: several dials came alive",
            "link: half open at its node",
            "link: half open at the control plane",
            "link: packet lost",
            "link: POST lost",
            "link: answer lost",
            "link: POST overtaken",
            "link: POST of a life before",
            "link: start unknown",
            "link: cut within a record in parts",
            "link: node left with its link down",
            "link: node served without",
            "link: frames unannounced",
            "link: driver stands still",
        ];
        assert_eq!(kinds.into_iter().filter(is_missed).collect::<Vec<_>>(), Vec::<&str>::new());
    }

    // CLOUD-1770
    #[test]
    fn readers_change_nothing_of_what_the_control_plane_does() {
        for seed in 1..=60 {
            let [quiet, watched] = [false, true].map(|read| crate::runner::digest(seed, read));
            assert_eq!(quiet, watched, "seed {seed}");
        }
    }

    // CLOUD-1902
    #[test]
    fn the_same_seed_is_the_same_run() {
        let trace = |seed| crate::run_seed(seed, None, true).1.unwrap();
        assert_eq!(trace(7), trace(7));
        assert_ne!(trace(7), trace(8));
    }

    // CLOUD-1610
    // CLOUD-1901
    #[test]
    fn every_rule_is_missed_when_it_is_switched_off() {
        let unnoticed: Vec<Mutant> = crate::run_mutants(1_500)
            .into_iter()
            .filter_map(|(mutant, failure)| failure.is_none().then_some(mutant))
            .collect();
        assert_eq!(unnoticed, Vec::<Mutant>::new());
    }
}
