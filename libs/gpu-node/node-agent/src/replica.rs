//! Watching one replica: from its handoff to its health, until the handoff goes.
//!
//! What a handoff leaves open is asked of the engine at each look and holds for the process that
//! was asked: what changed is bound before the next task. Whether the engine is up and how busy it
//! is are two questions, because busy engines answer the second one late.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use handoff_watcher::{Handoff, HandoffName, MAX_SLOTS};
use node_core::{BindError, Busy, Readiness, ReplicaSpec};
use owned_tasks::{Panicked, blocking};
use pool_registry_types::Backoff;
use pool_registry_types::limits::MAX_POOL_MODELS;
use span_export::{Kind, Span};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;
use crate::engines::{self, ApiKey, Endpoint, EngineFacts, KeyError, Look, NotReady};

/// Pause between two looks at an engine that is not ready.
const LOOK_EVERY_UNREADY: Duration = Duration::from_millis(250);
/// Pause between two looks at a ready one. A stream that cannot reach it says so earlier.
const LOOK_EVERY_READY: Duration = Duration::from_secs(1);
/// Pause between two questions how busy it is. llama.cpp notices that the caller of a whole answer
/// has left only after a second in which it delivers no other result, this one's included.
const COUNT_EVERY: Duration = Duration::from_millis(1_500);
/// Between two questions until a slot is released.
const RELEASE_PAUSES: Backoff = Backoff::new(Duration::from_millis(25), COUNT_EVERY);

/// Looks at the engine until `stop`, and at once when told to. Whoever stops it unbinds the replica.
pub(crate) async fn watch(agent: Arc<Agent>, handoff: Handoff, stop: CancellationToken, look: Arc<Notify>) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = async { tokio::join!(watch_health(&agent, &handoff, &stop, &look), watch_load(&agent, &handoff)); } => {}
    }
}

async fn watch_health(agent: &Agent, handoff: &Handoff, stop: &CancellationToken, look: &Notify) {
    let (pool_id, replica_id) = (&handoff.pool_id, &handoff.replica_id);
    // A handoff that says everything binds before its engine answers: the pool is loading then.
    if let Ok(spec) = spec(handoff, None) {
        let _ = agent.bind_unless(stop, pool_id, spec, None);
    }
    let models = handoff.model_names();
    let mut last = None;
    // From the file to the first time that it takes tasks.
    let mut binding = Span::first("handoff binding", Kind::Internal).map(|span| {
        span.with("llorch.pool_id", pool_id.to_string())
            .with("llorch.replica_id", replica_id.to_string())
            .with("gen_ai.provider.name", handoff.engine.as_str())
    });
    loop {
        let readiness = match endpoint(&handoff.url, handoff.api_key_file.as_deref()).await {
            Ok(at) => {
                agent.set_key(&handoff.name(), at.key.clone());
                let look = Look { client: agent.client(), at: &at, models: &models };
                readiness(agent, handoff, stop, engines::probe(handoff.engine, &look).await)
            }
            Err(error) => Some(Readiness::Failed(error.to_string())),
        };
        if let Some(readiness) = readiness {
            agent.observed_unless(stop, pool_id, replica_id, readiness.clone());
            let ready = agent.is_ready(pool_id, replica_id);
            let bound = binding.take_if(|_| ready);
            if let Some(span) = bound {
                span.end();
            }
            let seen = (ready, readiness);
            if last.as_ref() != Some(&seen) {
                say(handoff, ready, &seen.1);
                let problem = match &seen.1 {
                    Readiness::Failed(why) | Readiness::Gone(why) | Readiness::Silent(why) if !ready => {
                        Some(why.clone())
                    }
                    _ => None,
                };
                agent.set_problem_unless(stop, &handoff.name(), problem);
                last = Some(seen);
            }
        }
        let ready = last.as_ref().is_some_and(|(ready, _)| *ready);
        let pause = if ready { LOOK_EVERY_READY } else { LOOK_EVERY_UNREADY };
        tokio::select! {
            () = look.notified() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

fn say(handoff: &Handoff, ready: bool, readiness: &Readiness) {
    let Handoff { pool_id, replica_id, url, .. } = handoff;
    match readiness {
        Readiness::Silent(reason) if ready => {
            tracing::debug!(%pool_id, %replica_id, reason, "a look at the engine was not answered");
        }
        Readiness::Failed(reason) | Readiness::Gone(reason) | Readiness::Silent(reason) => {
            tracing::warn!(%pool_id, %replica_id, reason, "the replica is not ready");
        }
        Readiness::Loading => tracing::info!(%pool_id, %replica_id, "the engine is loading"),
        Readiness::Ready if ready => tracing::info!(%pool_id, %replica_id, url, "the replica is ready"),
        Readiness::Ready => {
            tracing::warn!(%pool_id, %replica_id, url, "the engine is up and refuses requests")
        }
    }
}

/// What a look says. What the engine says of itself is bound with it.
fn readiness(
    agent: &Agent,
    handoff: &Handoff,
    stop: &CancellationToken,
    looked: Result<EngineFacts, NotReady>,
) -> Option<Readiness> {
    let asked = |why: String| format!("{}: {why}", handoff.url);
    Some(match looked {
        Ok(facts) => {
            let bound = spec(handoff, Some(facts)).and_then(|spec| {
                Ok(agent.bind_unless(stop, &handoff.pool_id, spec, Some(Readiness::Ready))?)
            });
            bound.map_or_else(|error| Readiness::Failed(error.to_string()), |()| Readiness::Ready)
        }
        Err(NotReady::Loading) => Readiness::Loading,
        Err(NotReady::Failed(why)) => Readiness::Failed(asked(why)),
        Err(NotReady::Gone(why)) => Readiness::Gone(asked(why)),
        Err(NotReady::Silent(why)) => Readiness::Silent(asked(why)),
        Err(NotReady::Unasked(why)) => {
            tracing::warn!(pool_id = %handoff.pool_id, url = handoff.url, reason = why, "an engine cannot be looked at");
            return None;
        }
    })
}

/// Asks how busy the engine is, for as long as it is watched. While a slot is being released somebody else
/// does: [`watch_slots`].
async fn watch_load(agent: &Agent, handoff: &Handoff) {
    loop {
        tokio::time::sleep(COUNT_EVERY).await;
        if !agent.is_watched(&handoff.name()) {
            count(agent, handoff).await;
        }
    }
}

async fn count(agent: &Agent, handoff: &Handoff) {
    let at = agent.endpoint(&handoff.name(), &handoff.url);
    let look = Look { client: agent.client(), at: &at, models: &[] };
    let began = agent.now();
    let busy = engines::busy(handoff.engine, &look).await;
    agent.counted(&handoff.pool_id, &handoff.replica_id, began, busy);
}

/// Follows the slots of attempts that were broken off until the last one of the replica is given
/// back: by the engine's word, or by time. One task for each replica; `again` tells it of more.
/// `key`: what the engine was asked with, for one whose handoff is gone.
pub(crate) async fn watch_slots(agent: &Agent, name: &HandoffName, key: Option<ApiKey>, again: &Notify) {
    let HandoffName { pool_id, replica_id } = name;
    let mut looks = 0_u32;
    // Its engine may come back elsewhere meanwhile.
    while let Some((engine, mut at)) = agent.engine_of(name) {
        at.key = at.key.or(key.clone());
        let counts_requests = engines::dialect(engine).capabilities.tells_busy;
        if !counts_requests {
            agent.counted(pool_id, replica_id, agent.now(), Busy::CannotTell);
        }
        let Some(until) = agent.slot_due_at(pool_id, replica_id) else { break };
        let until = Instant::now() + until.since(agent.now());
        let next =
            if counts_requests { until.min(Instant::now() + RELEASE_PAUSES.after(looks)) } else { until };
        tokio::select! {
            () = again.notified() => looks = 0,
            () = tokio::time::sleep_until(next) => {}
        }
        if counts_requests {
            let look = Look { client: agent.client(), at: &at, models: &[] };
            let began = agent.now();
            let busy = tokio::time::timeout_at(until, engines::busy(engine, &look)).await;
            agent.counted(pool_id, replica_id, began, busy.unwrap_or(Busy::NoAnswer));
            looks = looks.saturating_add(1);
        }
        agent.expire_releases();
    }
    agent.notify_work_ended();
}

/// Why an engine's key is not known.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EndpointError {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Panicked(#[from] Panicked),
}

/// Where an engine is, with its key as the file has it now.
pub(crate) async fn endpoint(url: &str, key_file: Option<&Path>) -> Result<Endpoint, EndpointError> {
    let key = match key_file {
        None => None,
        Some(path) => {
            let path = path.to_owned();
            Some(blocking("file of a key", move || ApiKey::read(&path)).await??)
        }
    };
    Ok(Endpoint { key, ..Endpoint::new(url) })
}

/// Why a replica is not bound.
#[derive(Debug, thiserror::Error)]
enum Unbound {
    #[error("neither the handoff nor the engine names a model: give the handoff `models`")]
    NoModel,
    #[error(
        "neither the handoff nor the engine says how many slots there are: give the handoff, or its pool, `slots`"
    )]
    NoSlots,
    /// The engine was not asked yet.
    #[error("the handoff does not say how many slots there are")]
    NoSlotsInHandoff,
    #[error(transparent)]
    Refused(#[from] BindError),
}

/// Puts handoff and engine together. Without facts only what the handoff says by itself.
fn spec(handoff: &Handoff, facts: Option<EngineFacts>) -> Result<ReplicaSpec, Unbound> {
    let named = handoff.model_names();
    let asked = facts.is_some();
    let facts = facts.unwrap_or_default();
    let names_from_engine = named.is_empty();
    let mut warning = None;
    let (models, engine_names) = if names_from_engine {
        let listed = facts.models.len();
        if listed > MAX_POOL_MODELS {
            warning =
                Some(format!("the engine lists {listed} models: it serves the first {MAX_POOL_MODELS}"));
        }
        let served = || facts.models.iter().take(MAX_POOL_MODELS);
        let others = served().filter(|(name, own)| name.as_str() != own.as_str());
        (
            served().map(|(name, _)| name.clone()).collect(),
            others.map(|(name, own)| (name.clone(), own.clone())).collect(),
        )
    } else {
        let mut engine_names = BTreeMap::new();
        for name in &named {
            let own = match (facts.models.get(name), &facts.own_model) {
                (Some(own), _) => own,
                (None, Some(own)) => {
                    let listed: Vec<&str> = facts.models.keys().take(8).map(|name| name.as_str()).collect();
                    warning = Some(format!(
                        "the handoff names {name}, the engine lists {}: it is asked for {own}",
                        listed.join(", ")
                    ));
                    own
                }
                (None, None) => continue,
            };
            if own != name.as_str() {
                engine_names.insert(name.clone(), own.clone());
            }
        }
        (named, engine_names)
    };
    if models.is_empty() {
        return Err(Unbound::NoModel);
    }
    let smaller = |file: Option<u32>, engine: Option<u32>| match (file, engine) {
        (Some(file), Some(engine)) => Some(file.min(engine)),
        (file, engine) => file.or(engine),
    };
    let Some(slots) = smaller(handoff.slots, facts.slots) else {
        return Err(if asked { Unbound::NoSlots } else { Unbound::NoSlotsInHandoff });
    };
    Ok(ReplicaSpec {
        replica_id: handoff.replica_id.clone(),
        engine: handoff.engine,
        engine_version: facts.version.or(handoff.engine_version.clone()),
        url: handoff.url.clone(),
        models,
        engine_names,
        names_from_engine,
        slots: slots.clamp(1, MAX_SLOTS),
        ctx_max: smaller(handoff.ctx_max, facts.ctx_max),
        device_mask: handoff.device_mask.clone(),
        warning,
    })
}

#[cfg(test)]
mod tests {
    use pool_registry_types::ModelRef;

    use super::*;

    fn handoff(more: &str) -> Handoff {
        let text = format!(
            r#"{{"pool_id":"p","replica_id":"r0","engine":"vllm","url":"http://127.0.0.1:1"{more}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    fn model(name: &str) -> ModelRef {
        ModelRef::new(name).unwrap()
    }

    fn facts(names: &[(&str, &str)]) -> EngineFacts {
        EngineFacts {
            models: names.iter().map(|(name, own)| (model(name), (*own).to_owned())).collect(),
            own_model: names.first().map(|(_, own)| (*own).to_owned()),
            slots: Some(4),
            ctx_max: Some(8192),
            version: Some("2".into()),
        }
    }

    // CLOUD-2485
    #[test]
    fn what_the_handoff_leaves_out_is_the_engines_and_an_alias_is_asked_for_by_its_model() {
        let spec = spec(&handoff(""), Some(facts(&[("alpha", "alpha"), ("a", "alpha")]))).unwrap();
        assert_eq!(spec.models, [model("a"), model("alpha")]);
        assert_eq!(spec.engine_names, BTreeMap::from([(model("a"), "alpha".to_owned())]));
        assert!(spec.names_from_engine && spec.warning.is_none());
        assert_eq!((spec.slots, spec.ctx_max, spec.engine_version.as_deref()), (4, Some(8192), Some("2")));
    }

    // CLOUD-2485
    #[test]
    fn a_name_of_the_handoff_is_served_with_a_warning_where_the_engine_lists_others() {
        let named = handoff(r#","models":["mine"],"slots":2,"ctx_max":9000,"engine_version":"1""#);
        let seen = spec(&named, Some(facts(&[("org/Alpha", "org/Alpha")]))).unwrap();
        assert_eq!(seen.models, [model("mine")]);
        assert_eq!(seen.engine_names, BTreeMap::from([(model("mine"), "org/Alpha".to_owned())]));
        assert!(seen.warning.as_ref().is_some_and(|why| why.contains("mine") && why.contains("org/Alpha")));
        assert_eq!((seen.slots, seen.ctx_max), (2, Some(8192)), "the smaller of both");
        assert_eq!(seen.engine_version.as_deref(), Some("2"), "of the process that runs");
        let silent = spec(&named, None).unwrap();
        assert_eq!((silent.slots, silent.ctx_max, silent.warning), (2, Some(9000), None));
    }

    // CLOUD-2485
    #[test]
    fn what_neither_says_is_unknown_and_what_is_needed_is_named() {
        let none = EngineFacts { slots: None, ..facts(&[("m", "m")]) };
        // CLOUD-3006
        assert!(
            spec(&handoff(""), Some(none))
                .unwrap_err()
                .to_string()
                .ends_with("give the handoff, or its pool, `slots`")
        );
        assert!(
            spec(&handoff(r#","slots":1"#), Some(EngineFacts::default()))
                .unwrap_err()
                .to_string()
                .contains("model")
        );
        let huge = EngineFacts { slots: Some(u32::MAX), ..facts(&[("m", "m")]) };
        assert_eq!(spec(&handoff(""), Some(huge)).unwrap().slots, MAX_SLOTS);
    }
}
