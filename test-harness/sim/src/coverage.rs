//! What a set of schedules exercised: a fault or transition that never happened proves nothing.

use std::collections::BTreeMap;
use std::fmt;

/// Everything that must have happened at least once in a run of many seeds.
pub const REQUIRED: &[&str] = &[
    "fault: control plane restarted",
    "fault: control plane stalled",
    "fault: node crashed",
    "fault: node left and came back",
    "fault: node stopped",
    "fault: partition both ways",
    "fault: partition towards the control plane",
    "fault: partition towards the node",
    "fault: heartbeats of all nodes lost",
    "fault: engine killed",
    "fault: engine hung",
    "fault: engine slow",
    "fault: foreign load",
    "fault: engine sick",
    "fault: engine busy",
    "fault: node drained",
    "fault: node resumed",
    "fault: clock stepped",
    "fault: twin registered",
    "fault: node denies",
    "fault: node rejects",
    "fault: node fails",
    "fault: node refuses",
    "fault: node resets",
    "fault: node says nothing",
    "fault: own shortage",
    "fault: reports doubled",
    "fault: control plane shut down",
    "fault: model retired",
    "fault: tokens changed",
    "task: crashed an engine alone",
    "task: one of several that may have",
    "task: rejected by every node",
    "task: session deleted",
    "core: denied node let us in",
    "core: cancel answered at the end",
    "core: read between events",
    "message: lost",
    "message: doubled",
    "message: late",
    "message: overtaken",
    "task: canceled while queued",
    "task: canceled while running",
    "task: cancel after the end",
    "task: submitted twice",
    "task: killed two engines",
    "task: pinned",
    "task: continued from what was sent",
    "task: replayed",
    "task: cannot be generated again",
    "task: bad for every engine",
    "task: of a warm session",
    "race: report crossed a dispatch",
    "race: first token crossed a close",
    "race: end crossed a close",
    "core: node suspect",
    "core: node offline",
    "core: node returned",
    "core: mass silence",
    "core: stall noticed",
    "core: attempt vanished",
    "core: orphan ended",
    "core: unknown heartbeat",
    "core: old report ignored",
    "core: dispatch refused",
    "core: task placed again",
    "core: worker reset",
    "core: task rejected",
    "core: deadline exceeded",
    "core: decode timeout",
    "core: model not available",
    "core: tries exhausted",
    "core: replay differed",
    "core: breaker tripped",
    "core: slot kept by the engine's word",
    "core: busy engine kept its model",
    "core: node unavailable",
    "core: dropped for a newer",
    "core: budget exceeded",
    "core: moved from a silent node",
    "core: drain kept over a restart",
    "core: pool loaded for a task",
    "core: pool unloaded",
    "message: load order lost",
    "stream: connection broken",
    "stream: frames doubled",
    "stream: frame cut",
    "stream: stop lost",
    "stream: orphan after a lost stop",
    "stream: attempt without a reader",
    "stream: stopped without a reader",
    "stream: resumed",
    "stream: end kept for its reader",
    "stream: stop doubled",
    "stream: done lost",
    "stream: piece lost",
    "stream: gap noticed",
    "stream: answer lost",
    "stream: acceptance doubled",
    "stream: several chunks in one flush",
    "stream: reader slow",
    "stream: window full",
    "stream: not held any more",
    "stream: too long for its node",
    "stream: no room for another",
    "core: stream too long",
    "core: no answer",
    "fault: link reset",
    "fault: link cut",
    "fault: all links cut",
    "fault: control plane lost its power",
    "link: attempt",
    "link: up",
    "link: interrupted, broken",
    "link: interrupted, silent",
    "link: interrupted, stale",
    "link: attempt resumed",
    "link: several dials came alive",
    "link: half open at its node",
    "link: half open at the control plane",
    "link: packet lost",
    "link: dial refused",
    "link: dial stale",
    "link: POST lost",
    "link: answer lost",
    "link: POST overtaken",
    "link: POST stale",
    "link: POST of a life before",
    "link: start alone",
    "link: start unknown",
    "link: record in parts",
    "link: cut within a record in parts",
    "link: frames unannounced",
    "link: driver stands still",
    "link: orders do not arrive",
    "link: quiet",
    "link: bye",
    "link: another boot",
    "link: node left with its link down",
    "link: node served without",
    "link: interrupted, credential",
    "link: waits for its turn to resume",
    "client: came back to another log",
    "client: waker lost",
    "client: reads in pieces",
];

/// Counts by name.
#[derive(Debug, Clone, Default)]
pub struct Coverage {
    pub counts: BTreeMap<&'static str, u64>,
    pub dispatches: u64,
    pub events: u64,
    pub simulated_ms: u64,
    pub schedules: u64,
}

impl Coverage {
    pub fn hit(&mut self, name: &'static str) {
        self.add(name, 1);
    }

    pub fn add(&mut self, name: &'static str, n: u64) {
        debug_assert!(REQUIRED.contains(&name), "{name} is not in the list");
        *self.counts.entry(name).or_default() += n;
    }

    pub fn merge(&mut self, other: &Self) {
        for (name, n) in &other.counts {
            *self.counts.entry(name).or_default() += n;
        }
        self.dispatches += other.dispatches;
        self.events += other.events;
        self.simulated_ms += other.simulated_ms;
        self.schedules += other.schedules;
    }

    /// What never happened.
    pub fn missing(&self) -> Vec<&'static str> {
        REQUIRED.iter().filter(|name| self.counts.get(*name).copied().unwrap_or(0) == 0).copied().collect()
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for name in REQUIRED {
            writeln!(f, "  {:>10}  {name}", self.counts.get(name).copied().unwrap_or(0))?;
        }
        write!(
            f,
            "{} schedules, {:.1} simulated hours, {} dispatches, {} events",
            self.schedules,
            self.simulated_ms as f64 / 3.6e6,
            self.dispatches,
            self.events
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-1904
    #[test]
    fn what_never_happened_is_missed() {
        let mut coverage = Coverage::default();
        assert_eq!(coverage.missing(), REQUIRED);
        coverage.hit(REQUIRED[0]);
        assert_eq!(coverage.missing(), &REQUIRED[1..]);
    }
}
