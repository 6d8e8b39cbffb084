//! Who descends from whom, and who belongs to a run. Source of the fields: proc(5).

use std::collections::BTreeMap;

use handoff_watcher::process::parent;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{COMMAND, RUN_TAG};

/// The ids of all processes.
fn all() -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Whether the process was started with this in its environment, or with what begins so.
fn carries(pid: u32, wanted: &str) -> bool {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment.split(|byte| *byte == 0).any(|entry| entry.starts_with(wanted.as_bytes()))
}

/// The process and those that it descends from, the first one of the system left out.
fn lineage(pid: u32) -> impl Iterator<Item = u32> {
    std::iter::successors(Some(pid), |pid| parent(*pid)).take_while(|pid| *pid > 1)
}

/// Everything that descends from the process, itself not included.
pub(crate) fn descendants(of: u32) -> Vec<u32> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for pid in all() {
        if let Some(parent) = parent(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = Vec::new();
    let mut next = vec![of];
    while let Some(pid) = next.pop() {
        for child in children.remove(&pid).unwrap_or_default() {
            found.push(child);
            next.push(child);
        }
    }
    found
}

/// The processes that carry the run tag, or one that begins so, whoever their parent is.
pub(crate) fn tagged(run_tag: &str) -> Vec<u32> {
    let wanted = format!("{RUN_TAG}={run_tag}");
    all().filter(|pid| carries(*pid, &wanted)).collect()
}

/// Whether the process is, or descends from, one of the engines, or carries a run tag of ours.
pub(crate) fn belongs_to(pid: u32, engines: &[u32]) -> bool {
    carries(pid, &format!("{RUN_TAG}=")) || lineage(pid).any(|pid| engines.contains(&pid))
}

/// Whether the process descends from a living guard.
pub(crate) fn is_guarded(pid: u32) -> bool {
    let is_guard = |pid: u32| {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.split(|byte| *byte == 0).nth(1) == Some(COMMAND.as_bytes())
    };
    lineage(pid).skip(1).any(is_guard)
}

/// Sends the signal to each; one that is gone already is as good.
pub(crate) fn signal_all(pids: &[u32], signal: Signal) {
    for pid in pids.iter().filter_map(|pid| i32::try_from(*pid).ok()) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2403
    #[test]
    fn a_child_is_a_descendant_and_carries_its_run_tag() {
        let run_tag = format!("test-{}", std::process::id());
        let mut child =
            std::process::Command::new("sleep").arg("60").env(RUN_TAG, &run_tag).spawn().expect("sleep runs");
        let own = std::process::id();
        // The environment of a process is its own once it runs its program.
        let start = std::time::Instant::now();
        while tagged(&run_tag) != [child.id()] && start.elapsed().as_secs() < 5 {
            std::thread::yield_now();
        }
        let (found, tagged) = (descendants(own), tagged(&run_tag));
        signal_all(&[child.id()], Signal::SIGKILL);
        child.wait().expect("it was killed");
        assert!(found.contains(&child.id()));
        assert_eq!(tagged, [child.id()]);
    }
}
