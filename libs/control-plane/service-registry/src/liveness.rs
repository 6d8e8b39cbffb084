//! From evidence to liveness: three questions, kept apart.
//!
//! *Silent* is about heartbeats and is lifted by a heartbeat; *undialled* is about connections
//! and is lifted by a successful probe; *denied* is about the node's own refusals and is lifted
//! by a probe that the node lets in. A node is suspect while any of them holds, and offline when
//! no evidence of life (a heartbeat with a new number, or a token) came for the node timeout.

use std::collections::BTreeSet;
use std::time::Duration;

use pool_registry_types::node::{LiveAnswer, Liveness};
use pool_registry_types::{Backoff, BootId, Moment, NodeId};

/// Time between two probes of a suspect node. Source: .specs/01 CLOUD-1305.
pub(crate) const PROBE_EVERY: Duration = Duration::from_secs(1);
/// Time between two probes of a node that is well: a firewall shows before a task does. Source: .specs/01
/// CLOUD-2666.
pub(crate) const PROBE_THE_WELL_EVERY: Duration = Duration::from_secs(60);
/// Longest pause between two probes of a node that denies us. Source: .specs/01 CLOUD-1314.
pub(crate) const LONGEST_DENIED_PAUSE: Duration = Duration::from_secs(30);
const DENIED_PAUSES: Backoff = Backoff::new(PROBE_EVERY, LONGEST_DENIED_PAUSE);

/// The two numbers that an operator sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    pub heartbeat_interval: Duration,
    /// At least three heartbeat intervals. Source: .specs/01 CLOUD-1301.
    pub node_timeout: Duration,
}

impl Timing {
    /// A node without a heartbeat for this long is suspect.
    pub fn silence(&self) -> Duration {
        self.heartbeat_interval * 2
    }
}

/// Why a connection to a node is suspect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Suspicion {
    NotDialledYet,
    DialFailed(String),
}

impl std::fmt::Display for Suspicion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotDialledYet => f.write_str("its address was not dialled yet"),
            Self::DialFailed(reason) => write!(f, "dialling its address failed: {reason}"),
        }
    }
}

/// The node itself refuses the control plane: what it says, for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Denied(pub String);

/// What dialling a node has shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// Somebody answered at its address.
    Answered {
        live: LiveAnswer,
        /// Whether the node lets the control plane in; absent where that was not asked.
        authorized: Option<Result<(), Denied>>,
    },
    Failed(String),
    /// We could not dial, for want of something of our own: it says nothing of the node.
    Inconclusive,
}

/// The node itself has refused the control plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Denial {
    pub(crate) reason: String,
    /// Doublings of the pause until the next probe, when this one fails too.
    pub(crate) doublings: u32,
}

/// A node's liveness changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transition {
    pub node_id: NodeId,
    pub to: Liveness,
}

/// Another process elsewhere says that it is the node, while that is taken to be live. A clone must not
/// take a living node's place, and a node that died must not wait for its lease.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Contest {
    boot_id: BootId,
    address: String,
    since: Moment,
    /// A probe was under way at its start: what that says is of the time before.
    ignores_one: bool,
    /// When the first probe since then failed, and whether one did a second later.
    first_failed: Option<Moment>,
    failed_twice: bool,
}

/// The evidence about one node.
#[derive(Debug, Clone)]
pub(crate) struct Evidence {
    pub(crate) last_heartbeat: Moment,
    /// The last heartbeat or token.
    pub(crate) last_life: Moment,
    pub(crate) silent_since: Option<Moment>,
    pub(crate) undialled: Option<Suspicion>,
    /// Since when each dial has succeeded.
    dialled_since: Option<Moment>,
    /// When a dial has succeeded last.
    last_dialled: Moment,
    /// A dial has succeeded at least once.
    pub(crate) was_dialled: bool,
    pub(crate) denied: Option<Denial>,
    /// The lanes of its link by which orders do not reach it, while they live.
    pub(crate) undelivered: BTreeSet<u16>,
    /// When it last let us in, after it had denied us.
    let_in: Moment,
    /// How often it has denied us since it took an attempt: one that lets us in and then denies us
    /// again is asked ever less often.
    denials: u32,
    pub(crate) offline_since: Option<Moment>,
    pub(crate) next_probe: Option<Moment>,
    pub(crate) probe_in_flight: bool,
    contest: Option<Contest>,
}

impl Evidence {
    pub(crate) fn new(now: Moment) -> Self {
        Self {
            last_heartbeat: now,
            last_life: now,
            silent_since: None,
            undialled: Some(Suspicion::NotDialledYet),
            dialled_since: None,
            last_dialled: now,
            was_dialled: false,
            denied: None,
            undelivered: BTreeSet::new(),
            let_in: Moment::ZERO,
            denials: 0,
            offline_since: None,
            next_probe: Some(now),
            probe_in_flight: false,
            contest: None,
        }
    }

    /// Another process says that it is this node. Returns whether this one has shown itself dead since it
    /// first did: two dials failed, without a heartbeat for an interval and without a byte of an attempt.
    pub(crate) fn yields_to(
        &mut self,
        now: Moment,
        boot_id: BootId,
        address: &str,
        heartbeat_interval: Duration,
    ) -> bool {
        let is_it = |contest: &&Contest| contest.boot_id == boot_id && contest.address == address;
        if let Some(contest) = self.contest.as_ref().filter(is_it)
            && self.last_life < contest.since
        {
            return contest.failed_twice && self.last_heartbeat + heartbeat_interval <= now;
        }
        let (ignores_one, address) = (self.probe_in_flight, address.to_owned());
        let contest =
            Contest { boot_id, address, since: now, ignores_one, first_failed: None, failed_twice: false };
        self.contest = Some(contest);
        self.want_probe(now);
        false
    }

    /// A probe has come back.
    fn contested(&mut self, now: Moment, is_there: bool) {
        let Some(contest) = &mut self.contest else { return };
        if std::mem::take(&mut contest.ignores_one) {
            return;
        }
        if is_there {
            self.contest = None;
            return;
        }
        let first = *contest.first_failed.get_or_insert(now);
        contest.failed_twice |= first + PROBE_EVERY <= now;
    }

    pub(crate) fn liveness(&self) -> Liveness {
        if self.offline_since.is_some() {
            Liveness::Offline
        } else if self.silent_since.is_some()
            || self.undialled.is_some()
            || self.denied.is_some()
            || !self.undelivered.is_empty()
        {
            Liveness::Suspect
        } else {
            Liveness::Online
        }
    }

    pub(crate) fn reason(&self) -> Option<String> {
        let silent = self.silent_since.map(|_| "no heartbeat for two intervals".to_owned());
        match self.liveness() {
            Liveness::Online => None,
            Liveness::Suspect => {
                let denied = self.denied.as_ref().map(|denial| denial.reason.clone());
                let undelivered = (!self.undelivered.is_empty()).then(|| "orders do not reach it".to_owned());
                self.undialled.as_ref().map(ToString::to_string).or(denied).or(undelivered).or(silent)
            }
            Liveness::Offline => Some("no evidence of life for the node timeout".into()),
        }
    }

    pub(crate) fn heard(&mut self, now: Moment) {
        self.last_heartbeat = now;
        self.last_life = now;
        self.silent_since = None;
        self.offline_since = None;
        if self.undialled.is_none() && self.denied.is_none() {
            self.next_probe = Some(self.last_dialled + PROBE_THE_WELL_EVERY);
        } else if self.next_probe.is_none() {
            self.next_probe = Some(now);
        }
    }

    /// The node itself has refused an attempt that was sent at `dispatched`.
    pub(crate) fn deny(&mut self, now: Moment, dispatched: Moment, reason: String) {
        if self.denied.is_some() || dispatched < self.let_in {
            return;
        }
        self.probe_by(now + DENIED_PAUSES.after(self.denials));
        self.denials = self.denials.saturating_add(1);
        self.denied = Some(Denial { reason, doublings: self.denials });
    }

    /// It was dialled, and where that was asked it said whether it lets us in.
    pub(crate) fn dialled(&mut self, now: Moment, authorized: Option<Result<(), Denied>>) {
        self.undialled = None;
        self.was_dialled = true;
        self.last_dialled = now;
        self.probe_by(now + PROBE_THE_WELL_EVERY);
        self.dialled_since.get_or_insert(now);
        match authorized {
            Some(Ok(())) if self.denied.take().is_some() => self.let_in = now,
            Some(Err(Denied(reason))) => {
                if let Some(denial) = &mut self.denied {
                    denial.reason = reason;
                }
            }
            Some(Ok(())) | None => {}
        }
    }

    /// A probe has shown that it is there.
    pub(crate) fn probe_answered(&mut self, now: Moment, authorized: Option<Result<(), Denied>>) {
        self.contested(now, true);
        self.dialled(now, authorized);
    }

    /// A probe has failed.
    pub(crate) fn probe_failed(&mut self, now: Moment, reason: String) {
        self.contested(now, false);
        self.not_dialled(reason);
    }

    pub(crate) fn not_dialled(&mut self, reason: String) {
        self.undialled = Some(Suspicion::DialFailed(reason));
        self.dialled_since = None;
    }

    /// The node took an attempt: it lets us in.
    pub(crate) fn took_attempt(&mut self) {
        self.denials = 0;
    }

    /// When a suspect node is to be dialled again, after a probe that has not lifted it; `asked`: that
    /// has shown the token.
    pub(crate) fn next_pause(&mut self, asked: bool) -> Duration {
        match &mut self.denied {
            Some(denial) if self.undialled.is_none() && asked => {
                let pause = DENIED_PAUSES.after(denial.doublings);
                denial.doublings = denial.doublings.saturating_add(1);
                pause
            }
            _ => PROBE_EVERY,
        }
    }

    /// Asks for a probe at once, unless one is on its way.
    pub(crate) fn want_probe(&mut self, now: Moment) {
        self.next_probe = Some(now);
    }

    /// Asks for a probe then, unless one is wanted before.
    pub(crate) fn probe_by(&mut self, at: Moment) {
        self.next_probe = Some(self.next_probe.map_or(at, |wanted| wanted.min(at)));
    }

    /// Whether its failing to be dialled would be news: it is live, and could be dialled for as long.
    pub(crate) fn was_well(&self, now: Moment, span: Duration) -> bool {
        let dialled = self.undialled.is_none() && self.dialled_since.is_some_and(|since| since + span <= now);
        dialled && self.offline_since.is_none()
    }

    /// The tokens of either side have changed: a node that denied us is asked at once.
    pub(crate) fn ask_again(&mut self, now: Moment) {
        self.denials = 0;
        if let Some(denial) = &mut self.denied {
            denial.doublings = 0;
            self.want_probe(now);
        }
    }

    /// A stall of our own is no silence of theirs.
    pub(crate) fn extend(&mut self, stall: Duration, now: Moment) {
        self.last_heartbeat = (self.last_heartbeat + stall).min(now);
        self.last_life = (self.last_life + stall).min(now);
    }
}
