//! The rules that carry the load, by name.
//!
//! Each rule can be switched off, one at a time, for one purpose: the simulator shows that its
//! invariants notice. Production never sets one. Source: .specs/01 CLOUD-1901.

/// One rule of the control plane that must not be lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// Free slots count the union of reported attempts and reservations.
    UnionOfReservations,
    /// Attempts have deadlines of their own, before and between tokens.
    AttemptDeadlines,
    /// A report that crossed a dispatch makes no false vanished attempt and no false orphan.
    ReportSequence,
    /// A report that overtook the end of a stream does not take the end away.
    ReportPatience,
    /// The timer is armed anew after every event.
    TimerRearmed,
    /// A refused dispatch costs no try.
    RefusalIsFree,
    /// Epochs are unique over restarts of the control plane.
    IncarnationInEpoch,
    /// One broken stream does not kill its neighbours.
    OwnLiveness,
    /// A failed connection makes a node suspect before its lease runs out.
    EvidenceBeforeLease,
    /// The control plane suspects itself when most nodes fall silent.
    MassSilence,
    /// The relay fences the log before the core places the task again.
    FenceBeforePlace,
    /// A task that killed two engines is not given a third.
    PoisonLimit,
    /// What fails again and again gets one attempt at a time until one gets through.
    Breakers,
    /// A pinned task runs on its node or not at all.
    PinsHold,
    /// Nothing new is sent to a node that an operator drains, also before the node says so.
    DrainAtOnce,
    /// A continued stream goes on where the log stands.
    ContinueAtTheLog,
    /// A pool that is not loaded is asked for again as long as a task waits for it.
    LoadRepeated,
    /// The tries of one task count once against a pool.
    TaskCountsOnce,
    /// A node that refuses the control plane itself is suspect until it lets it in.
    DeniedIsSuspect,
    /// A node's own failure before it took an attempt costs the task no try.
    NodeFailureIsFree,
    /// A node's 400 before it took an attempt is asked of another node before it is believed.
    RejectionIsAskedElsewhere,
    /// A task that alone brought an engine down is given no other.
    CulpritIsFinal,
    /// Two tasks of which one brought an engine down never run on one engine.
    SuspectsApart,
    /// A pinned task waits for its suspect node, whatever becomes of the model meanwhile.
    PinBeforeLease,
    /// Only the fresh failure of a node that was well ends the guard of mass silence.
    GuardEndsByTheWell,
    /// A pool that a report names twice is one pool.
    PoolNamedTwice,
    /// What we could not do ourselves is held against no node and costs no try.
    OwnShortageIsNoEvidence,
    /// An attempt that takes too long is stopped at its node too.
    OverdueIsStopped,
    /// An attempt whose end its node has kept has not vanished.
    HeldIsListed,
    /// A stream of which it is said that it cannot be generated again is not.
    UnrepeatableIsFinal,
    /// What was passed on is generated again by an engine of the same kind, with the same model.
    RepeatedByTheSameKind,
}

impl Rule {
    pub const ALL: [Self; 31] = [
        Self::UnionOfReservations,
        Self::AttemptDeadlines,
        Self::ReportSequence,
        Self::ReportPatience,
        Self::TimerRearmed,
        Self::RefusalIsFree,
        Self::IncarnationInEpoch,
        Self::OwnLiveness,
        Self::EvidenceBeforeLease,
        Self::MassSilence,
        Self::FenceBeforePlace,
        Self::PoisonLimit,
        Self::Breakers,
        Self::PinsHold,
        Self::DrainAtOnce,
        Self::ContinueAtTheLog,
        Self::LoadRepeated,
        Self::TaskCountsOnce,
        Self::DeniedIsSuspect,
        Self::NodeFailureIsFree,
        Self::RejectionIsAskedElsewhere,
        Self::CulpritIsFinal,
        Self::SuspectsApart,
        Self::PinBeforeLease,
        Self::GuardEndsByTheWell,
        Self::PoolNamedTwice,
        Self::OwnShortageIsNoEvidence,
        Self::OverdueIsStopped,
        Self::HeldIsListed,
        Self::UnrepeatableIsFinal,
        Self::RepeatedByTheSameKind,
    ];
}
