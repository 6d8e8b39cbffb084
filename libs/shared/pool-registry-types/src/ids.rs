//! Identifiers, validated when they are made, cheap to clone.
//!
//! A pool's identity is [`PoolKey`]: the node's id and the pool's id together, because a pool
//! id is unique on its node only. Text ids of up to 23 bytes stand where they are used: a table
//! that is asked for one reads no other memory than its own. Longer ones share one allocation
//! between clones.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smol_str::SmolStr;
use utoipa::ToSchema;
use uuid::Uuid;

/// Longest node, machine, pool or replica id, in bytes. Source: .specs/01 CLOUD-1001.
pub(crate) const MAX_NAME_BYTES: usize = 63;
/// Longest model reference, in characters.
pub(crate) const MAX_MODEL_REF_CHARS: usize = 255;

/// Why a text is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidId {
    #[error("{field} must be 1 to {MAX_NAME_BYTES} characters of [A-Za-z0-9._-], the first alphanumeric")]
    Name { field: &'static str },
    #[error(
        "model_ref must be 1 to {MAX_MODEL_REF_CHARS} characters without white space or control characters: {shown:?}"
    )]
    Model { shown: String },
    #[error("{field} must be a UUID")]
    Uuid { field: &'static str },
    #[error("epoch must be 1 to 64 visible ASCII characters")]
    Epoch,
    #[error("digest must be sha256: and 64 hexadecimal digits in lower case")]
    Digest,
}

/// Characters that are shown of a name that is none.
const MAX_SHOWN_CHARS: usize = 64;

impl InvalidId {
    fn model(text: &str) -> Self {
        Self::Model { shown: text.chars().take(MAX_SHOWN_CHARS).collect() }
    }
}

fn is_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=MAX_NAME_BYTES).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

fn is_model_ref(text: &str) -> bool {
    (1..=MAX_MODEL_REF_CHARS).contains(&text.chars().count())
        && !text.chars().any(|c| c.is_control() || c.is_whitespace())
}

/// Length of a SHA-256 in hexadecimal digits.
const SHA256_DIGITS: usize = 64;

fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:").is_some_and(|hex| {
        hex.len() == SHA256_DIGITS && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    })
}

fn is_epoch(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}

macro_rules! text_id {
    // The pattern and the length are the document's, and say what `valid` says. As token trees:
    // the derive would not see through a literal.
    ($(#[$doc:meta])* $name:ident, $valid:expr, $error:expr, $pattern:tt, $longest:tt) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, ToSchema)]
        #[schema(value_type = String, pattern = $pattern, min_length = 1, max_length = $longest)]
        pub struct $name(SmolStr);

        impl $name {
            /// Checks the text and keeps it.
            pub fn new(text: &str) -> Result<Self, InvalidId> {
                if $valid(text) { Ok(Self(SmolStr::new(text))) } else { Err(($error)(text)) }
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::new(text)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                Self::new(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}

text_id!(
    /// One running `pool-managerd`, named by its operator.
    NodeId, is_name, |_: &str| InvalidId::Name { field: "node_id" }, "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", 63
);
text_id!(
    /// The host that a node runs on.
    MachineId, is_name, |_: &str| InvalidId::Name { field: "machine_id" }, "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", 63
);
text_id!(
    /// One engine with one model on one device mask of a node; unique on its node only.
    PoolId, is_name, |_: &str| InvalidId::Name { field: "pool_id" }, "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", 63
);
text_id!(
    /// One engine process of a pool.
    ReplicaId, is_name, |_: &str| InvalidId::Name { field: "replica_id" }, "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", 63
);
text_id!(
    /// The name by which clients ask for a model and engines report it.
    ModelRef, is_model_ref, InvalidId::model,
    r"^[^\u0000-\u0020\u007f-\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+$", 255
);
text_id!(
    /// One registration of a node. Opaque: compared for equality only.
    Epoch, is_epoch, |_: &str| InvalidId::Epoch, "^[!-~]{1,64}$", 64
);
text_id!(
    /// A label's key or value.
    LabelName, is_name, |_: &str| InvalidId::Name { field: "label" }, "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", 63
);
text_id!(
    /// The content of a file: `sha256:` and 64 hexadecimal digits.
    Digest, is_digest, |_: &str| InvalidId::Digest, "^sha256:[0-9a-f]{64}$", 71
);

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $field:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(transparent)]
        #[schema(value_type = Uuid)]
        pub struct $name(pub Uuid);

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Uuid::parse_str(text).map(Self).map_err(|_| InvalidId::Uuid { field: $field })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0.as_hyphenated(), f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0.as_hyphenated(), f)
            }
        }
    };
}

uuid_id!(
    /// What a client asked for, once.
    TaskId, "task_id"
);
uuid_id!(
    /// One try of a task on one pool.
    AttemptId, "attempt_id"
);
uuid_id!(
    /// One life of a node's process.
    BootId, "boot_id"
);
uuid_id!(
    /// One life of a control plane's process, drawn at its start.
    LifeId, "life"
);
uuid_id!(
    /// Tasks that belong together: an affinity key with budgets.
    SessionId, "session_id"
);
uuid_id!(
    /// Whose a task, a session or an artifact is. It is made of what a token is held under, and compared
    /// for equality only; no wire has it.
    HolderId, "holder"
);
uuid_id!(
    /// The stream of one task as one life of the control plane keeps it.
    LogId, "log_id"
);

impl HolderId {
    /// Of all who call where no tokens are configured.
    pub const OPEN: Self = Self(Uuid::nil());
}

impl Default for HolderId {
    fn default() -> Self {
        Self::OPEN
    }
}

/// The identity of a session in the cluster: two holders may give the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionKey {
    pub holder: HolderId,
    pub session_id: SessionId,
}

/// The identity of a pool in the cluster.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolKey {
    pub node_id: NodeId,
    pub pool_id: PoolId,
}

impl PoolKey {
    pub fn new(node_id: NodeId, pool_id: PoolId) -> Self {
        Self { node_id, pool_id }
    }
}

impl fmt::Display for PoolKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.node_id, self.pool_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-1001
    #[test]
    fn a_name_is_63_safe_characters_and_starts_alphanumeric() {
        for good in ["a", "gpu-node-1", "0.x_y-Z", &"n".repeat(63)] {
            assert_eq!(NodeId::new(good).unwrap().as_str(), good);
        }
        for bad in ["", "-a", ".a", "a/b", "a b", "ä", "a\n", &"n".repeat(64)] {
            assert_eq!(NodeId::new(bad), Err(InvalidId::Name { field: "node_id" }), "{bad:?}");
        }
    }

    // CLOUD-1001
    #[test]
    fn an_invalid_name_does_not_come_in_through_json() {
        let error = serde_json::from_str::<PoolId>("\"../etc\"").unwrap_err().to_string();
        assert!(error.contains("pool_id must be"), "{error}");
        assert_eq!(serde_json::from_str::<PoolId>("\"pool\\u002d0\"").unwrap().as_str(), "pool-0");
    }

    // CLOUD-1019
    #[test]
    fn a_model_ref_may_hold_slashes_but_no_white_space() {
        assert!(ModelRef::new("hf:org/repo/file.gguf").is_ok());
        assert_eq!(ModelRef::new("a b"), Err(InvalidId::Model { shown: "a b".into() }));
        assert_eq!(ModelRef::new(""), Err(InvalidId::Model { shown: String::new() }));
    }
}
