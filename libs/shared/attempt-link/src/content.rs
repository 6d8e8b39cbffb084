//! What the records of a link say, as values.

use pool_registry_types::{BootId, NodeId, ReplicaId};
use serde::{Deserialize, Serialize};

/// Of [`Kind::Hello`](crate::records::Kind::Hello).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub node_id: NodeId,
    pub boot_id: BootId,
    pub version: String,
}

/// Of [`Kind::Accepted`](crate::records::Kind::Accepted), also where an attempt is read again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acceptance {
    pub replica_id: ReplicaId,
    /// The number of the last report made before the node took the attempt.
    pub report_seq: u64,
}

/// Of [`Kind::Head`](crate::records::Kind::Head).
pub use task_stream::AnswerHead;

/// Of [`Kind::End`](crate::records::Kind::End).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// The number of the last report made before the end.
    pub report_seq: u64,
}

/// Of [`Kind::Bye`](crate::records::Kind::Bye).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bye {
    pub reason: ByeReason,
}

/// Why a node closes a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ByeReason {
    /// The node stops: it is not dialled before it has registered again.
    Leaving,
    /// What the link was opened with does not count any more: it is dialled anew, with what counts now.
    Credential,
    /// Something that a newer node says.
    #[serde(other)]
    Unknown,
}

/// How far an attempt has come: `next` is the index behind its last frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    pub number: u64,
    pub next: u64,
}

/// The ids of the tokens that one frame brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameTokens {
    /// All tokens of the task, this frame's included.
    pub total: u32,
    pub ids: Vec<u32>,
}

/// Appends the JSON of a record's bytes.
pub(crate) fn to_json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("ids, numbers and texts are always JSON")
}
