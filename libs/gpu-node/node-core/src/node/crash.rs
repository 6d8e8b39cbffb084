//! Which attempts an engine had just been given when it crashed.
//!
//! Only engines that this node has started are watched: of others nobody here sees how they end. An
//! end is recorded once, so that every attempt that it has broken is told the same.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use pool_registry_types::error::EngineCrash;
use pool_registry_types::{AttemptId, Moment, PoolId, ReplicaId};

/// Attempts that were accepted within this span before an engine's end may have brought it about.
/// Source: .specs/01 CLOUD-2416.
const SUSPECT_FOR: Duration = Duration::from_secs(2);

/// How the engine of an attempt has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It has not, as far as is known here.
    Awaited,
    /// Nothing more will be known. Without a crash it ended in another way, or unseen.
    Known(Option<EngineCrash>),
}

#[derive(Debug)]
struct End {
    at: Moment,
    /// As in `SIGSEGV`; absent where it did not crash.
    signal: Option<&'static str>,
    suspects: BTreeSet<AttemptId>,
}

/// The engines of one replica, one after the other.
#[derive(Debug, Default)]
struct Watched {
    runs: bool,
    /// Attempts that the present engine was given lately and has not finished well.
    accepted: VecDeque<(Moment, AttemptId)>,
    last_end: Option<End>,
}

/// The engines that this node has started.
#[derive(Debug, Default)]
pub(super) struct Engines(BTreeMap<(PoolId, ReplicaId), Watched>);

impl Engines {
    pub(super) fn accepted(&mut self, now: Moment, replica_key: &(PoolId, ReplicaId), attempt: AttemptId) {
        let Some(engine) = self.0.get_mut(replica_key).filter(|engine| engine.runs) else { return };
        while engine.accepted.front().is_some_and(|(at, _)| *at + SUSPECT_FOR < now) {
            engine.accepted.pop_front();
        }
        engine.accepted.push_back((now, attempt));
    }

    /// Forgets the engines of pools that are not there any more.
    pub(super) fn keep(&mut self, is_there: impl Fn(&PoolId) -> bool) {
        self.0.retain(|(pool_id, _), engine| engine.runs || is_there(pool_id));
    }

    pub(super) fn began(&mut self, replica_key: (PoolId, ReplicaId)) {
        self.0.entry(replica_key).or_default().runs = true;
    }

    /// The engine has ended; `signal` is that of a crash. Returns how many attempts may have brought
    /// the crash about.
    pub(super) fn ended(
        &mut self,
        now: Moment,
        replica_key: &(PoolId, ReplicaId),
        signal: Option<&'static str>,
    ) -> usize {
        let Some(engine) = self.0.get_mut(replica_key).filter(|engine| engine.runs) else { return 0 };
        let late =
            std::mem::take(&mut engine.accepted).into_iter().filter(|(at, _)| now <= *at + SUSPECT_FOR);
        let suspects: BTreeSet<AttemptId> = match signal {
            Some(_) => late.map(|(_, attempt)| attempt).collect(),
            None => BTreeSet::new(),
        };
        let count = suspects.len();
        engine.runs = false;
        engine.last_end = Some(End { at: now, signal, suspects });
        count
    }

    /// Whatever ends the engine later, it was not this attempt.
    pub(super) fn cleared(&mut self, replica_key: &(PoolId, ReplicaId), attempt: &AttemptId) {
        if let Some(engine) = self.0.get_mut(replica_key) {
            engine.accepted.retain(|(_, id)| id != attempt);
        }
    }

    /// How the engine has ended that the attempt was given to at `accepted`.
    pub(super) fn verdict(
        &self,
        accepted: Moment,
        replica_key: &(PoolId, ReplicaId),
        attempt: &AttemptId,
    ) -> Verdict {
        let Some(engine) = self.0.get(replica_key) else { return Verdict::Known(None) };
        // An older end was that of another engine.
        match engine.last_end.as_ref().filter(|end| accepted <= end.at) {
            Some(end) => Verdict::Known(end.signal.map(|signal| EngineCrash {
                signal: signal.to_owned(),
                suspects: u32::try_from(end.suspects.len()).unwrap_or(u32::MAX),
                suspect: end.suspects.contains(attempt),
            })),
            None if engine.runs => Verdict::Awaited,
            None => Verdict::Known(None),
        }
    }
}
