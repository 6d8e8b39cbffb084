//! From evidence to liveness: two questions, kept apart.
//!
//! *Silent* is about heartbeats and is lifted by a heartbeat; *undialled* is about connections
//! and is lifted by a successful probe. A node is suspect while either holds, and offline when
//! no evidence of life (a heartbeat with a new number, or a token) came for the node timeout.

use std::time::Duration;

use pool_registry_types::node::Liveness;
use pool_registry_types::{Moment, NodeId};

/// Time between two probes of a suspect node. Source: .specs/01 CLOUD-1305.
pub const PROBE_EVERY: Duration = Duration::from_secs(1);

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

/// Why a connection to a node is doubted.
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

/// A node's liveness changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transition {
    pub node_id: NodeId,
    pub to: Liveness,
}

/// The evidence about one node.
#[derive(Debug, Clone)]
pub(crate) struct Evidence {
    pub(crate) last_heartbeat: Moment,
    /// The last heartbeat or token.
    pub(crate) last_life: Moment,
    pub(crate) silent_since: Option<Moment>,
    pub(crate) undialled: Option<Suspicion>,
    pub(crate) offline_since: Option<Moment>,
    pub(crate) next_probe: Option<Moment>,
    pub(crate) probe_in_flight: bool,
}

impl Evidence {
    pub(crate) fn new(now: Moment) -> Self {
        Self {
            last_heartbeat: now,
            last_life: now,
            silent_since: None,
            undialled: Some(Suspicion::NotDialledYet),
            offline_since: None,
            next_probe: Some(now),
            probe_in_flight: false,
        }
    }

    pub(crate) fn liveness(&self) -> Liveness {
        if self.offline_since.is_some() {
            Liveness::Offline
        } else if self.silent_since.is_some() || self.undialled.is_some() {
            Liveness::Suspect
        } else {
            Liveness::Online
        }
    }

    pub(crate) fn reason(&self) -> Option<String> {
        let silent = self.silent_since.map(|_| "no heartbeat for two intervals".to_owned());
        match self.liveness() {
            Liveness::Online => None,
            Liveness::Suspect => self.undialled.as_ref().map(ToString::to_string).or(silent),
            Liveness::Offline => Some("no evidence of life for the node timeout".into()),
        }
    }

    pub(crate) fn heard(&mut self, now: Moment) {
        self.last_heartbeat = now;
        self.last_life = now;
        self.silent_since = None;
        self.offline_since = None;
        if self.undialled.is_none() {
            self.next_probe = None;
        } else if self.next_probe.is_none() {
            self.next_probe = Some(now);
        }
    }

    /// Asks for a probe at once, unless one is on its way.
    pub(crate) fn want_probe(&mut self, now: Moment) {
        self.next_probe = Some(now);
    }

    /// A stall of our own is no silence of theirs.
    pub(crate) fn extend(&mut self, stall: Duration, now: Moment) {
        self.last_heartbeat = (self.last_heartbeat + stall).min(now);
        self.last_life = (self.last_life + stall).min(now);
    }
}
