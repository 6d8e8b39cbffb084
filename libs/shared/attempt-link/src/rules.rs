//! The rules of the link that carry the load, by name.
//!
//! Each can be switched off, one at a time, for one purpose: the simulator shows that its invariants
//! notice. Production never does. Source: .specs/01 CLOUD-1901.

/// One rule of the link that must not be lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// An attempt that is asked for anew gets a number that was never used.
    NumberRenewed,
    /// Nothing is read of a link any more before it is reckoned from where its attempts are wanted.
    OldLinkUnread,
    /// A start whose POST was given up is asked for, and not sent again.
    StartOnce,
    /// A POST goes every two seconds while attempts run, with what was seen.
    SeenSent,
    /// A node hears what is done.
    DoneSent,
    /// A stop that could not be delivered is kept for the next POST, or the next link.
    StopKept,
    /// More of an attempt than has come, as `alive` says, causes a resume.
    AliveNext,
    /// What `alive` names no more is asked for, and silent.
    AliveNames,
    /// Another boot ends all that ran.
    BootEndsAll,
    /// After a stall what has arrived is read before anything is judged.
    SocketsFirst,
    /// A link on which nothing comes is interrupted.
    SilenceNoticed,
    /// What ran on an interrupted link is lost in time.
    GivenUp,
    /// A POST whose link is neither in use nor offered is not read.
    StaleRefused,
    /// A link begins with no attempts.
    LinkBeginsEmpty,
    /// A lane that brings no POST has no reader.
    PostsProveReader,
    /// What was said to be never accepted never is.
    UnknownRemembered,
}

impl Rule {
    pub const ALL: [Self; 16] = [
        Self::NumberRenewed,
        Self::OldLinkUnread,
        Self::StartOnce,
        Self::SeenSent,
        Self::DoneSent,
        Self::StopKept,
        Self::AliveNext,
        Self::AliveNames,
        Self::BootEndsAll,
        Self::SocketsFirst,
        Self::SilenceNoticed,
        Self::GivenUp,
        Self::StaleRefused,
        Self::LinkBeginsEmpty,
        Self::PostsProveReader,
        Self::UnknownRemembered,
    ];
}
