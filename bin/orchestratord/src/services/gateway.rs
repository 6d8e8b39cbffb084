//! What the gateway for the clients of other APIs knows beside the cluster: names of models, and when
//! they were first seen here.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use parking_lot::Mutex;
use pool_registry_types::nearest::nearest;
use pool_registry_types::node::Liveness;
use pool_registry_types::snapshot::ClusterSnapshot;
use pool_registry_types::{ErrorBody, ErrorCode, ModelRef};

/// Most models whose first moment is remembered.
const MAX_SEEN: usize = 10_000;
/// Names that a message names, and those among which the nearest are looked for.
/// Source: .specs/01 CLOUD-3001.
const MAX_NAMED: usize = 8;
const MAX_COMPARED: usize = 512;
/// Characters of an unknown name that are repeated.
const MAX_NAME_CHARS: usize = 256;

/// What becomes of a stream whose attempt is lost after its first event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum StreamRecovery {
    /// Where it makes the same again, by its own words, it is generated again and goes on.
    Continue,
    /// It ends with an error.
    Fail,
}

/// The settings of the gateway, and what it remembers.
#[derive(Debug)]
pub(crate) struct Gateway {
    /// Names that clients use, each with the model that it stands for.
    pub(crate) aliases: BTreeMap<String, ModelRef>,
    /// Of requests that name none.
    pub(crate) default_model: Option<ModelRef>,
    /// Longest body, bytes.
    body_bytes: usize,
    /// Most of all requests of one token, bytes.
    token_bytes: usize,
    /// Of requests that do not say it themselves.
    pub(crate) recovery: StreamRecovery,
    /// When each name was first listed, seconds since 1970.
    seen: Mutex<BTreeMap<String, i64>>,
}

/// A name under which a model can be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NamedModel {
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: i64,
}

/// Why a list of aliases is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no alias=model with two names of models")]
pub(crate) struct AliasError(String);

impl Gateway {
    pub(crate) fn new(
        aliases: BTreeMap<String, ModelRef>,
        default_model: Option<ModelRef>,
        body_bytes: usize,
        queue_bytes: usize,
        recovery: StreamRecovery,
    ) -> Self {
        let token_bytes = queue_bytes / 2;
        Self { aliases, default_model, body_bytes, token_bytes, recovery, seen: Mutex::default() }
    }

    /// Longest body behind a head of so many bytes, and the setting that says so. One for which there is
    /// never room is too long, and does not come again and again.
    pub(crate) fn most_body_bytes(&self, head: usize) -> (usize, &'static str) {
        let room = self.token_bytes.saturating_sub(head);
        if room < self.body_bytes {
            (room, "half of ORCHESTRATORD_QUEUE_BYTES")
        } else {
            (self.body_bytes, "ORCHESTRATORD_V1_BODY_BYTES")
        }
    }

    /// `a=b,…`. Errors: [`AliasError`].
    pub(crate) fn aliases(list: &str) -> Result<BTreeMap<String, ModelRef>, AliasError> {
        let alias = |text: &str| {
            let wrong = || AliasError(text.to_owned());
            let (alias, model) = text.split_once('=').ok_or_else(wrong)?;
            ModelRef::new(alias.trim()).map_err(|_| wrong())?;
            Ok((alias.trim().to_owned(), ModelRef::new(model.trim()).map_err(|_| wrong())?))
        };
        list.split(',').map(str::trim).filter(|text| !text.is_empty()).map(alias).collect()
    }

    /// The aliases, and the models that they and the setting of the default model name.
    pub(crate) fn names(&self) -> BTreeSet<ModelRef> {
        let aliases = self.aliases.keys().filter_map(|alias| ModelRef::new(alias).ok());
        aliases.chain(self.aliases.values().cloned()).chain(self.default_model.clone()).collect()
    }

    /// Says that nobody has the name, and which names there are, the nearest first.
    pub(crate) fn unknown_model(&self, cluster: &ClusterSnapshot, name: &str) -> ErrorBody {
        let models = self.models(cluster);
        let names = models.iter().map(|model| model.id.as_str()).take(MAX_COMPARED);
        let near = nearest(name, names, MAX_NAMED);
        let near = if near.is_empty() { "none".into() } else { near.join(", ") };
        let name: String = name.chars().take(MAX_NAME_CHARS).collect();
        let message = format!("no node has the model {name} (models: {near})");
        ErrorBody::new(ErrorCode::ModelNotAvailable, message)
    }

    /// The models of all nodes that are not offline, those that could be loaded too, and their aliases.
    pub(crate) fn models(&self, cluster: &ClusterSnapshot) -> Vec<NamedModel> {
        let live = cluster.nodes().filter(|(node, _)| node.liveness != Liveness::Offline);
        let reported = live.flat_map(|(node, _)| &node.pools).flat_map(|pool| &pool.report.models);
        let mut names: BTreeSet<&str> = reported.map(ModelRef::as_str).collect();
        for (alias, model) in &self.aliases {
            if names.contains(model.as_str()) {
                names.insert(alias);
            }
        }
        let (now, mut seen) = (Timestamp::now().as_second(), self.seen.lock());
        let named = names.into_iter().map(|id| {
            let created = match seen.get(id) {
                Some(first) => *first,
                None if seen.len() < MAX_SEEN => *seen.entry(id.to_owned()).or_insert(now),
                None => now,
            };
            NamedModel { id: id.to_owned(), created }
        });
        named.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2852
    #[test]
    fn a_body_for_which_there_is_never_room_is_too_long() {
        let of = |body, queue| Gateway::new(BTreeMap::new(), None, body, queue, StreamRecovery::Continue);
        let most = |body, queue, head| of(body, queue).most_body_bytes(head);
        assert_eq!(most(100, 1_000, 10), (100, "ORCHESTRATORD_V1_BODY_BYTES"));
        assert_eq!(most(600, 1_000, 10), (490, "half of ORCHESTRATORD_QUEUE_BYTES"));
        assert_eq!(most(600, 1_000, 700).0, 0);
    }

    // CLOUD-3001
    #[test]
    fn whoever_asks_for_a_model_that_nobody_has_is_told_so_within_a_bound() {
        let aliases = Gateway::aliases("gpt-4o=qwen").unwrap();
        let gateway = Gateway::new(aliases, None, 1, 1, StreamRecovery::Continue);
        let names: Vec<String> = gateway.names().iter().map(ToString::to_string).collect();
        assert_eq!(names, ["gpt-4o", "qwen"]);
        let error = gateway.unknown_model(&ClusterSnapshot::default(), &"x".repeat(100_000));
        assert_eq!(error.code, ErrorCode::ModelNotAvailable);
        assert!(error.message.ends_with("(models: none)") && error.message.len() < 400, "{error}");
    }

    // CLOUD-2845
    #[test]
    fn aliases_are_pairs_of_names() {
        let aliases = Gateway::aliases("gpt-4o = qwen, gpt-4o-mini=org/small:1 ,").unwrap();
        let pairs: Vec<(&str, &str)> = aliases.iter().map(|(a, m)| (a.as_str(), m.as_str())).collect();
        assert_eq!(pairs, [("gpt-4o", "qwen"), ("gpt-4o-mini", "org/small:1")]);
        for wrong in ["a", "a=", "=b"] {
            assert!(Gateway::aliases(wrong).is_err(), "{wrong}");
        }
    }
}
