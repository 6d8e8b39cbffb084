//! Watching one replica: from its handoff to its health, until the handoff goes.

use std::sync::Arc;
use std::time::Duration;

use handoff_watcher::Handoff;
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;
use crate::core::{Health, Readiness, ReplicaSpec};
use crate::engines::{self, EngineFacts, NotReady};

/// Pause between two looks at an engine that is not ready.
const LOOK_EVERY_UNREADY: Duration = Duration::from_millis(250);
/// Pause between two looks at a ready one. A stream that cannot reach it says so earlier.
const LOOK_EVERY_READY: Duration = Duration::from_secs(1);

/// Looks at the engine until `stop`. Whoever stops it unbinds the replica.
pub(crate) async fn watch(agent: Arc<Agent>, handoff: Handoff, stop: CancellationToken) {
    let (pool_id, replica_id) = (handoff.pool_id.clone(), handoff.replica_id.clone());
    // A handoff that says everything binds before its engine answers: the pool is loading then.
    let mut bound = bind(&agent, &handoff, EngineFacts::default(), &stop).is_ok();
    // What it leaves open the engine says once it answers.
    let mut known = handoff.engine_version.is_some() && handoff.ctx_max.is_some();
    let models = handoff.model_names();
    let mut last = None;
    loop {
        let looked = tokio::select! {
            () = stop.cancelled() => break,
            looked = engines::probe(agent.client(), handoff.engine, &handoff.url, &models) => looked,
        };
        let (readiness, busy) = match looked {
            Ok((facts, busy)) if !bound || !known => match bind(&agent, &handoff, facts, &stop) {
                Ok(()) => {
                    (bound, known) = (true, true);
                    (Readiness::Ready, busy)
                }
                Err(why) => (Readiness::Failed(why), None),
            },
            Ok((_, busy)) => (Readiness::Ready, busy),
            Err(NotReady::Loading) => (Readiness::Loading, None),
            Err(NotReady::Failed(why)) => (Readiness::Failed(why), None),
        };
        let ready = readiness == Readiness::Ready;
        if last.as_ref() != Some(&readiness) {
            match &readiness {
                Readiness::Failed(reason) => {
                    tracing::warn!(%pool_id, %replica_id, reason, "the replica is not ready")
                }
                Readiness::Loading => tracing::info!(%pool_id, %replica_id, "the engine is loading"),
                Readiness::Ready => {
                    tracing::info!(%pool_id, %replica_id, url = handoff.url, "the replica is ready")
                }
            }
            let problem = match &readiness {
                Readiness::Failed(reason) => Some(reason.clone()),
                Readiness::Ready | Readiness::Loading => None,
            };
            agent.set_binding_problem(&handoff.name(), problem);
            last = Some(readiness.clone());
        }
        if bound {
            agent.observed_unless(&stop, &pool_id, &replica_id, Health { readiness, busy });
        }
        let pause = if ready { LOOK_EVERY_READY } else { LOOK_EVERY_UNREADY };
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Puts handoff and engine together: the handoff's word counts, the engine fills the gaps.
fn bind(
    agent: &Agent,
    handoff: &Handoff,
    facts: EngineFacts,
    stop: &CancellationToken,
) -> Result<(), String> {
    let named = handoff.model_names();
    let models = if named.is_empty() { facts.models } else { named };
    if models.is_empty() {
        return Err("neither the handoff nor the engine names a model".into());
    }
    let slots = handoff.slots.or(facts.slots).filter(|slots| *slots > 0);
    let Some(slots) = slots else {
        return Err("neither the handoff nor the engine says how many slots there are".into());
    };
    let spec = ReplicaSpec {
        replica_id: handoff.replica_id.clone(),
        engine: handoff.engine,
        engine_version: handoff.engine_version.clone().or(facts.version),
        url: handoff.url.clone(),
        models,
        slots,
        ctx_max: handoff.ctx_max.or(facts.ctx_max),
        device_mask: handoff.device_mask.clone(),
    };
    agent.bind(&handoff.pool_id, spec, stop).map_err(|error| error.to_string())
}
