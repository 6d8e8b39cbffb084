//! Where a client wants its task to run, and why a pool was or was not taken.
//!
//! A constraint is hard (`pin`, `require_…`, `allow_fallback: false`) or soft (`prefer_pools`,
//! `avoid_pools`, `spread_by`); the placement crate decides what follows from it.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use utoipa::ToSchema;

use crate::engines::EngineKind;
use crate::error::ErrorBody;
use crate::ids::{InvalidId, LabelName, ModelRef, NodeId, PoolId, PoolKey, TaskId};

/// Most pools in one list of a request, and most labels.
pub const MAX_CONSTRAINTS: usize = 64;

/// What an operator says of a node: `zone=a`, `tier=fast`.
pub type Labels = BTreeMap<LabelName, LabelName>;

/// Labels without those that this reader cannot take.
pub(crate) fn labels_of_newer<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Labels, D::Error> {
    let mut labels = Labels::new();
    for (name, value) in BTreeMap::<String, Value>::deserialize(deserializer)? {
        if let (Ok(name), Ok(value)) = (LabelName::new(&name), serde_json::from_value(value)) {
            labels.insert(name, value);
        }
    }
    Ok(labels)
}

/// Pools by name: `pool` means every pool of that name, `node/pool` one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PoolSelector {
    pub node_id: Option<NodeId>,
    pub pool_id: PoolId,
}

impl PoolSelector {
    pub fn matches(&self, key: &PoolKey) -> bool {
        self.pool_id == key.pool_id && self.node_id.as_ref().is_none_or(|node| *node == key.node_id)
    }
}

impl FromStr for PoolSelector {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        match text.split_once('/') {
            Some((node, pool)) => Ok(Self { node_id: Some(NodeId::new(node)?), pool_id: PoolId::new(pool)? }),
            None => Ok(Self { node_id: None, pool_id: PoolId::new(text)? }),
        }
    }
}

impl fmt::Display for PoolSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.node_id {
            Some(node) => write!(f, "{node}/{}", self.pool_id),
            None => write!(f, "{}", self.pool_id),
        }
    }
}

impl Serialize for PoolSelector {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PoolSelector {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PlacementMode {
    /// The best pool that fits.
    #[default]
    Auto,
    /// The named node and pools first, and others where `allow_fallback` says so.
    Prefer,
    /// The named node or pool, and never another.
    Pin,
}

/// For the documents only: how a [`PoolSelector`] is written.
#[derive(Debug, ToSchema)]
#[schema(value_type = String, pattern = "^([A-Za-z0-9][A-Za-z0-9._-]{0,62}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
pub struct PoolSelectorText(#[expect(dead_code, reason = "it is never made")] String);

/// `placement` of a task.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlacementConstraints {
    #[serde(default)]
    pub mode: PlacementMode,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_id: Option<NodeId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<PoolSelectorText>)]
    pub pin_pool_id: Option<PoolSelector>,
    /// Taken before all others while they fit and have a free slot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<PoolSelectorText>, max_items = 64)]
    pub prefer_pools: Vec<PoolSelector>,
    /// Taken only when nothing else fits, and never without `allow_fallback`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<PoolSelectorText>, max_items = 64)]
    pub avoid_pools: Vec<PoolSelector>,
    /// Only pools with exactly this device mask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 255)]
    pub require_device_mask: Option<String>,
    /// Only nodes with all of these labels.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub require_labels: Labels,
    /// The running tasks of one session spread evenly over the values of this label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread_by: Option<LabelName>,
    /// Whether a preference may be left.
    #[serde(default = "yes")]
    pub allow_fallback: bool,
    /// False: a task that does not start at once is refused, not queued. One that has started and has to
    /// be placed again waits for that.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub wait: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives it so")]
fn is_true(value: &bool) -> bool {
    *value
}

fn yes() -> bool {
    true
}

impl Default for PlacementConstraints {
    fn default() -> Self {
        Self {
            mode: PlacementMode::Auto,
            node_id: None,
            pin_pool_id: None,
            prefer_pools: Vec::new(),
            avoid_pools: Vec::new(),
            require_device_mask: None,
            require_labels: Labels::new(),
            spread_by: None,
            allow_fallback: true,
            wait: true,
        }
    }
}

impl PlacementConstraints {
    /// Finds contradictions; `has_session` says whether the task belongs to a session.
    pub fn check(&self, has_session: bool) -> Result<(), ErrorBody> {
        let invalid = |message: &str| Err(ErrorBody::invalid(message));
        match self.mode {
            PlacementMode::Pin if self.node_id.is_none() && self.pin_pool_id.is_none() => {
                return invalid("placement.mode: a pin needs node_id or pin_pool_id");
            }
            PlacementMode::Prefer if self.node_id.is_none() && self.prefer_pools.is_empty() => {
                return invalid("placement.mode: prefer needs node_id or prefer_pools");
            }
            PlacementMode::Auto if self.node_id.is_some() => {
                return invalid("placement.node_id: say with mode whether it is a pin or preferred");
            }
            _ => {}
        }
        if self.pin_pool_id.is_some() && self.mode != PlacementMode::Pin {
            return invalid("placement.pin_pool_id: needs mode pin");
        }
        if let (Some(node), Some(of)) =
            (&self.node_id, self.pin_pool_id.as_ref().and_then(|pool| pool.node_id.as_ref()))
            && node != of
        {
            return invalid("placement.pin_pool_id: is on another node than node_id");
        }
        for (field, count) in [
            ("prefer_pools", self.prefer_pools.len()),
            ("avoid_pools", self.avoid_pools.len()),
            ("require_labels", self.require_labels.len()),
        ] {
            if count > MAX_CONSTRAINTS {
                return invalid(&format!("placement.{field}: at most {MAX_CONSTRAINTS}"));
            }
        }
        if self.require_device_mask.as_ref().is_some_and(|mask| mask.is_empty() || mask.len() > 255) {
            return invalid("placement.require_device_mask: must be 1 to 255 bytes");
        }
        if self.spread_by.is_some() && !has_session {
            return invalid("placement.spread_by: spreads the tasks of one session, and needs session_id");
        }
        Ok(())
    }

    /// The one node that the task may run on.
    pub fn pinned_node(&self) -> Option<&NodeId> {
        let of_pool = || self.pin_pool_id.as_ref()?.node_id.as_ref();
        (self.mode == PlacementMode::Pin).then(|| self.node_id.as_ref().or_else(of_pool)).flatten()
    }

    /// Whether the task may run on the pool as far as a pin goes.
    pub fn pin_allows(&self, key: &PoolKey) -> bool {
        self.mode != PlacementMode::Pin
            || (self.node_id.as_ref().is_none_or(|node| *node == key.node_id)
                && self.pin_pool_id.as_ref().is_none_or(|pool| pool.matches(key)))
    }

    pub fn prefers(&self, key: &PoolKey) -> bool {
        (self.mode == PlacementMode::Prefer && self.node_id.as_ref() == Some(&key.node_id))
            || self.prefer_pools.iter().any(|pool| pool.matches(key))
    }

    pub fn avoids(&self, key: &PoolKey) -> bool {
        self.avoid_pools.iter().any(|pool| pool.matches(key))
    }

    /// Whether the task may only run on what it prefers.
    pub fn only_preferred(&self) -> bool {
        !self.allow_fallback && self.mode == PlacementMode::Prefer
    }
}

/// `POST /v2/placement/explain`, and the answer for a task that exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_id: Option<TaskId>,
    pub model_ref: ModelRef,
    /// The pool that the task would get now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub choice: Option<PoolName>,
    /// Why it would get none now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Every pool of the cluster.
    pub pools: Vec<PoolVerdict>,
}

/// A pool's identity in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolName {
    pub node_id: NodeId,
    pub pool_id: PoolId,
}

impl From<&PoolKey> for PoolName {
    fn from(key: &PoolKey) -> Self {
        Self { node_id: key.node_id.clone(), pool_id: key.pool_id.clone() }
    }
}

/// What one pool says to a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolVerdict {
    pub node_id: NodeId,
    pub pool_id: PoolId,
    /// Absent where it is of a kind that the control plane does not know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineKind>,
    pub eligible: bool,
    /// Why not; the first reason that holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Refusal>,
    pub preferred: bool,
    pub avoided: bool,
    /// Holds the session's context.
    pub warm: bool,
    pub slots_total: u32,
    pub slots_busy: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vram_free_bytes: Option<u64>,
}

/// Why one pool is not eligible for a task. The order is the order of the checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    Offline,
    Suspect,
    Draining,
    NotReady,
    /// No engine of it runs; one is started when a task waits that has no other pool.
    NotLoaded,
    /// No engine of it runs, and its node has no memory for one.
    VramShort,
    /// Its engine has failed too often lately.
    Tripped,
    ModelMissing,
    EngineDiffers,
    ContextShort,
    DeviceMask,
    Labels,
    NotPinned,
    NotPreferred,
    Avoided,
    Tried,
    SlotsFull,
}

/// What a task waits for: how many of the pools that have its model refuse it for which reason, as in
/// [`Explanation`]; where no pool has the model, how many of all.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct WaitingFor {
    /// The most common one, of equals the one that is checked last. Absent where no pool refuses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Refusal>,
    pub pools: BTreeMap<Refusal, u32>,
}

impl WaitingFor {
    pub fn of(pools: BTreeMap<Refusal, u32>) -> Self {
        let reason = pools.iter().max_by_key(|(refusal, count)| (**count, **refusal));
        Self { reason: reason.map(|(refusal, _)| *refusal), pools }
    }
}

/// The counts, for people.
impl fmt::Display for WaitingFor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.pools.is_empty() {
            return f.write_str("no pool refuses it");
        }
        for (n, (refusal, count)) in self.pools.iter().enumerate() {
            write!(f, "{}{count} {refusal}", if n == 0 { "pools: " } else { ", " })?;
        }
        Ok(())
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Offline => "on an offline node",
            Self::Suspect => "on a suspect node",
            Self::Draining => "draining",
            Self::NotReady => "not ready",
            Self::NotLoaded => "not loaded",
            Self::VramShort => "without memory for its engine",
            Self::ModelMissing => "without the model",
            Self::EngineDiffers => "with another engine",
            Self::ContextShort => "with too short a context",
            Self::DeviceMask => "with another device mask",
            Self::Labels => "without the labels",
            Self::NotPinned => "that the task is not pinned to",
            Self::NotPreferred => "that the task does not prefer",
            Self::Avoided => "that the task avoids",
            Self::Tripped => "that failed too often lately",
            Self::Tried => "that failed this task before",
            Self::SlotsFull => "full",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(node: &str, pool: &str) -> PoolKey {
        PoolKey::new(NodeId::new(node).unwrap(), PoolId::new(pool).unwrap())
    }

    // CLOUD-1713
    #[test]
    fn a_bare_pool_name_means_every_pool_of_that_name_and_a_pair_means_one() {
        let every: PoolSelector = "pool-0".parse().unwrap();
        assert!(every.matches(&key("a", "pool-0")) && every.matches(&key("b", "pool-0")));
        let one: PoolSelector = "a/pool-0".parse().unwrap();
        assert!(one.matches(&key("a", "pool-0")) && !one.matches(&key("b", "pool-0")));
        assert_eq!(one.to_string(), "a/pool-0");
        assert!("a/b/c".parse::<PoolSelector>().is_err() && "/x".parse::<PoolSelector>().is_err());
    }

    // CLOUD-1714
    #[test]
    fn a_contradictory_constraint_is_refused_by_its_name() {
        let cases: [(&str, &str); 8] = [
            (r#"{"mode":"pin"}"#, "mode"),
            (r#"{"mode":"prefer"}"#, "mode"),
            (r#"{"node_id":"a"}"#, "node_id"),
            (r#"{"pin_pool_id":"p"}"#, "pin_pool_id"),
            (r#"{"mode":"pin","node_id":"a","pin_pool_id":"b/p"}"#, "pin_pool_id"),
            (r#"{"require_device_mask":""}"#, "require_device_mask"),
            (r#"{"spread_by":"zone"}"#, "spread_by"),
            (r#"{"mode":"prefer","prefer_pools":[]}"#, "mode"),
        ];
        for (json, field) in cases {
            let constraints: PlacementConstraints = serde_json::from_str(json).unwrap();
            let error = constraints.check(false).expect_err(json);
            assert!(error.message.contains(field), "{json}: {}", error.message);
        }
        let many: Vec<String> = (0..65).map(|n| format!("p{n}")).collect();
        let constraints: PlacementConstraints =
            serde_json::from_value(serde_json::json!({"avoid_pools": many})).unwrap();
        assert!(constraints.check(false).unwrap_err().message.contains("avoid_pools"));
        let good = r#"{"mode":"pin","pin_pool_id":"a/p","require_labels":{"zone":"a"}}"#;
        let constraints: PlacementConstraints = serde_json::from_str(good).unwrap();
        assert_eq!(constraints.check(false), Ok(()));
        assert_eq!(constraints.pinned_node().map(NodeId::as_str), Some("a"));
    }
}
