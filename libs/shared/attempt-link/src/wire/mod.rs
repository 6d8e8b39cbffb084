//! The bodies of the POSTs that go up, and of their answers.
//!
//! Every POST says for which link it is meant ([`LinkKey`]). A start carries its task's payload as it
//! came: in a batch as JSON inside of the JSON, untouched; alone (over [`MAX_INLINE_BYTES`]) behind a
//! line of JSON. What is read shares the bytes of the body. Lists have bounds, which are checked while
//! they are read; fields that are not known are passed over.

mod lists;
mod start;

pub use pool_registry_types::LifeId;
use pool_registry_types::{AttemptId, BootId, LogId, routes};
use serde::{Deserialize, Serialize};

pub use start::{
    MAX_INLINE_BYTES, MAX_LINE_BYTES, SingleBody, SingleError, Start, StartError, StartFacts, StartSpec,
    StartsBody, WriteError, WrittenStart, line_end, read_single, read_starts, write_single, write_starts,
};

/// Most starts of one POST. Source: .specs/01 CLOUD-2604.
pub const MAX_STARTS: usize = 64;
/// Most bytes that the starts of one POST take together.
pub(crate) const MAX_STARTS_BYTES: usize = 256 * 1024;
/// Most positions of one POST, and most ids of each of its other lists.
pub const MAX_SEEN: usize = 16 * 1024;
pub const MAX_IDS: usize = 4 * 1024;
/// Longest body of a POST but one of a single start, bytes: what all of the above may take.
pub const MAX_POST_BYTES: usize = 2 * 1024 * 1024;

/// Which link: `n` rises with each GET of a lane of a life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LinkKey {
    pub life: LifeId,
    /// Of the control plane's threads the one that the link belongs to.
    pub lane: u16,
    pub n: u64,
}

/// The query of `GET /v2/link`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkQuery {
    pub boot_id: BootId,
    pub life: LifeId,
    pub lane: u16,
    pub n: u64,
}

impl LinkQuery {
    pub fn key(&self) -> LinkKey {
        LinkKey { life: self.life, lane: self.lane, n: self.n }
    }

    /// The path with its query.
    pub fn path(&self) -> String {
        let Self { boot_id, life, lane, n } = self;
        format!("{}?boot_id={boot_id}&life={life}&lane={lane}&n={n}", routes::LINK)
    }
}

/// How far an attempt's records were taken, by its number: `[number, next]` on the wire.
pub type Seen = crate::content::Position;

/// `POST /v2/attempts/control`: what does not wait for starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlBody {
    pub life: LifeId,
    pub lane: u16,
    pub n: u64,
    /// Taken before the resumes.
    #[serde(default, deserialize_with = "lists::ids", skip_serializing_if = "Vec::is_empty")]
    pub cancel: Vec<AttemptId>,
    #[serde(default, deserialize_with = "lists::ids", skip_serializing_if = "Vec::is_empty")]
    pub resume: Vec<ResumeOrder>,
}

impl ControlBody {
    pub fn key(&self) -> LinkKey {
        LinkKey { life: self.life, lane: self.lane, n: self.n }
    }
}

/// An attempt is to be read again, from its record `from` on, under another number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeOrder {
    pub attempt_id: AttemptId,
    pub log_id: LogId,
    pub from: u64,
    pub number: u64,
}

/// The answer to a [`ControlBody`]: of its resumes those that the link will not answer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ControlAnswer {
    /// Never accepted, and never will be.
    #[serde(default, deserialize_with = "lists::ids")]
    pub unknown: Vec<AttemptId>,
    /// Accepted once, and not held from there any more.
    #[serde(default, deserialize_with = "lists::ids")]
    pub gone: Vec<AttemptId>,
}

/// The answer to a POST of starts: it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StartsAnswer {}
