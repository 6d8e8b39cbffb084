//! Pools and replicas as a node reports them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use crate::engines::EngineKind;
use crate::error::ErrorBody;
use crate::ids::{AttemptId, ModelRef, NodeId, PoolId, ReplicaId};
use crate::newer;
use crate::task::MAX_WAIT_MS;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PoolState {
    /// At least one replica takes requests.
    Ready,
    /// Engines are there or about to be, and none has answered its health call yet.
    Loading,
    /// No engine runs; one is started when a task waits for it.
    Loadable,
    Draining,
    Failed,
    /// Something that a newer node says: it takes no tasks.
    #[serde(other)]
    Unknown,
}

impl PoolState {
    /// Whether a pool in this state counts as having its model.
    pub const fn has_model(self) -> bool {
        matches!(self, Self::Ready | Self::Loading | Self::Loadable)
    }
}

/// One pool in a heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolReport {
    pub pool_id: PoolId,
    pub state: PoolState,
    /// Takes requests at this moment.
    pub ready: bool,
    #[serde(default)]
    pub draining: bool,
    /// Absent where it is of a kind that the reader does not know: the pool takes no tasks then.
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineKind>,
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub engine_version: Option<String>,
    #[serde(default, deserialize_with = "newer::entries")]
    #[schema(max_items = 4096)]
    pub models: Vec<ModelRef>,
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub device_mask: Option<String>,
    /// Tokens that one request may hold, prompt and answer together.
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub ctx_max: Option<u32>,
    /// Absent where no GPU is seen: unknown is not zero.
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub vram_free_bytes: Option<u64>,
    #[serde(default, deserialize_with = "newer::entries")]
    #[schema(max_items = 4096)]
    pub replicas: Vec<ReplicaReport>,
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// What its operator should look at although it serves.
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// Present while the pool itself drains, as of this report.
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainProgress>,
    /// What the node that runs the pool's engines says of them; absent for engines that it only
    /// found.
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub supervised: Option<Supervised>,
}

/// A pool whose engines its node starts, watches and stops.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Supervised {
    /// Milliseconds from a start to the first good health call, as measured last; absent before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_estimate_ms: Option<u64>,
    /// Bytes of memory that its engines take together; absent before the model was looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_required_bytes: Option<u64>,
    /// Whether its engines could be started: there is memory for them, or there is when others
    /// make room.
    #[serde(default)]
    pub fits: bool,
    /// Engines that ended without being told to.
    #[serde(default)]
    pub restarts: u64,
    /// Times that it was unloaded to make room, or because nothing needed it.
    #[serde(default)]
    pub unloads: u64,
    /// The last lines of the engine that ended last; empty once one is ready again.
    #[serde(default, deserialize_with = "newer::entries", skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 64)]
    pub log_tail: Vec<String>,
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub reload: Option<PoolReloading>,
    /// What is done before a start: an installation or a download, and how far it has come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preparation: Option<String>,
}

/// A reload that is under way, or that failed last.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct PoolReloading {
    /// The models that it loads; empty when none is under way.
    #[serde(default, deserialize_with = "newer::entries")]
    pub to: Vec<ModelRef>,
    /// The new engines load beside the old ones, which serve until they are ready.
    #[serde(default)]
    pub beside: bool,
    /// Why the last one was given up and the engines before it were kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// How far a drain has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DrainProgress {
    pub tasks_left: u32,
    /// Milliseconds since the oldest of them was accepted; absent without any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest_age_ms: Option<u64>,
    /// Milliseconds until what is left is ended; absent without a deadline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
}

/// `POST /v2/pools/{id}/drain`: no new work; what runs may finish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolDrain {
    /// Milliseconds after which what still runs is ended; absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 86_400_000)]
    pub deadline_ms: Option<u64>,
}

impl PoolDrain {
    /// Errors: `INVALID_PARAMS` for a deadline that is further away than a day.
    pub fn check(&self) -> Result<(), ErrorBody> {
        if self.deadline_ms.is_some_and(|deadline| deadline > MAX_WAIT_MS) {
            let message = format!("deadline_ms: must be at most {MAX_WAIT_MS} milliseconds");
            return Err(ErrorBody::invalid(message));
        }
        Ok(())
    }
}

/// `POST /v2/pools/{id}/reload`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolReload {
    /// Another model than the one it has. It stands on an engine's command line: it must not begin with a
    /// dash, also after `hf:` or `file:`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, min_length = 1, max_length = 255,
        pattern = r"^[^\-\u0000-\u0020\u007f-\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000][^\u0000-\u0020\u007f-\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*$")]
    pub new_model_ref: Option<ModelRef>,
}

impl PoolReload {
    /// Errors: `INVALID_PARAMS` for a model that an engine would take for an option.
    pub fn check(&self) -> Result<(), ErrorBody> {
        let model = self.new_model_ref.as_ref().map_or("", ModelRef::as_str);
        let name = model.strip_prefix("hf:").or_else(|| model.strip_prefix("file:")).unwrap_or(model);
        if name.starts_with('-') {
            return Err(ErrorBody::invalid("new_model_ref: must not begin with a dash"));
        }
        Ok(())
    }
}

/// `POST /v2/pools/{id}/purge`: the pool's engines end, and what is named goes with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolPurge {
    /// The engine's own environment, where the node has installed one.
    #[serde(default)]
    pub engine_files: bool,
    /// The model's files, where the node has staged them.
    #[serde(default)]
    pub model_files: bool,
}

/// `202` of the orders to a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolOrdered {
    pub node_id: NodeId,
    pub pool_id: PoolId,
    pub state: PoolState,
    #[serde(default, deserialize_with = "newer::option", skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainProgress>,
}

/// One engine process in a heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReplicaReport {
    pub replica_id: ReplicaId,
    pub ready: bool,
    pub slots_total: u32,
    /// For people; the control plane computes its own.
    #[serde(default)]
    pub slots_free: u32,
    /// Slots that the engine shows busy with requests that are not ours.
    #[serde(default)]
    pub slots_foreign: u32,
    #[serde(default, deserialize_with = "newer::entries")]
    pub attempts: Vec<AttemptId>,
    /// Attempts that have ended, and whose streams are kept for the control plane until it has them.
    #[serde(default, deserialize_with = "newer::entries", skip_serializing_if = "Vec::is_empty")]
    pub held: Vec<AttemptId>,
}

impl ReplicaReport {
    /// Of a replica that takes no requests and has no slots.
    pub fn without_slots(replica_id: ReplicaId) -> Self {
        Self {
            replica_id,
            ready: false,
            slots_total: 0,
            slots_free: 0,
            slots_foreign: 0,
            attempts: Vec::new(),
            held: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2752
    #[test]
    fn a_model_that_an_engine_would_take_for_an_option_is_no_new_one() {
        let reload = |model: &str| PoolReload { new_model_ref: Some(ModelRef::new(model).unwrap()) };
        for bad in ["-m", "--help", "hf:-org/repo", "file:-x"] {
            let error = reload(bad).check().unwrap_err();
            assert!(error.message.starts_with("new_model_ref: "), "{bad}: {error}");
        }
        for good in ["m-1", "hf:org/-repo", "/models/-m.gguf"] {
            assert_eq!(reload(good).check(), Ok(()), "{good}");
        }
        assert_eq!(PoolReload::default().check(), Ok(()));
    }
}
