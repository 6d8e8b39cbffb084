//! Watching one replica: from its handoff to its health, until the handoff goes.

use std::sync::Arc;
use std::time::Duration;

use handoff_watcher::Handoff;
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;
use crate::core::{Health, ReplicaSpec};
use crate::engines::{self, EngineFacts};

/// Pause between two looks at an engine that is not ready.
const LOOK_EVERY_UNREADY: Duration = Duration::from_millis(250);
/// Pause between two looks at a ready one. Its death is noticed earlier, by the streams.
const LOOK_EVERY_READY: Duration = Duration::from_secs(1);

/// Looks at the engine until `stop`. Whoever stops it unbinds the replica.
pub(crate) async fn watch(agent: Arc<Agent>, handoff: Handoff, stop: CancellationToken) {
    let (pool_id, replica_id) = (handoff.pool_id.clone(), handoff.replica_id.clone());
    let mut bound = false;
    let mut last_problem = None;
    loop {
        let looked = tokio::select! {
            () = stop.cancelled() => break,
            looked = engines::probe(agent.client(), handoff.engine, &handoff.url) => looked,
        };
        let (problem, busy) = match looked {
            Ok((facts, busy)) if !bound => match bind(&agent, &handoff, facts, &stop) {
                Ok(()) => {
                    bound = true;
                    (None, busy)
                }
                Err(why) => (Some(why), None),
            },
            Ok((_, busy)) => (None, busy),
            Err(why) => (Some(why), None),
        };
        let ready = problem.is_none();
        if last_problem != problem {
            match &problem {
                Some(reason) => tracing::warn!(%pool_id, %replica_id, reason, "the replica is not ready"),
                None => tracing::info!(%pool_id, %replica_id, url = handoff.url, "the replica is ready"),
            }
            agent.set_binding_problem(&handoff.name(), problem.clone().filter(|_| !bound));
            last_problem = problem.clone();
        }
        if bound {
            let health = Health { ready: problem.map_or(Ok(()), Err), busy };
            agent.observed_unless(&stop, &pool_id, &replica_id, health);
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
