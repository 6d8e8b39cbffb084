//! Who answers what takes no slot: a replica that is ready, however busy it is.

use pool_registry_types::node::Intent;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::{ErrorBody, ErrorCode, ModelRef, Moment, PoolId, ReplicaId};

use super::NodeCore;

/// A replica that may be asked. Nothing of it is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serving {
    pub pool_id: PoolId,
    pub replica_id: ReplicaId,
    pub engine: EngineKind,
    pub url: String,
    /// The engine's own name for the model.
    pub model: String,
    /// The names are the engine's own: whoever answers at its URL must still have them.
    pub names_from_engine: bool,
}

impl NodeCore {
    /// The least busy replica that is ready, has the model, and whose engine has the route of this path.
    /// Errors: `POOL_UNREADY`, and `UNSUPPORTED` where only engines without the route have the model.
    pub fn serving(
        &self,
        now: Moment,
        model: &ModelRef,
        path: &str,
        has_route: impl Fn(EngineKind) -> bool,
    ) -> Result<Serving, ErrorBody> {
        let refuse = |code, message: String| {
            let mut error = ErrorBody::new(code, message);
            error.node_id = Some(self.identity.node_id.clone());
            Err(error)
        };
        if self.intent() == Intent::Draining {
            return refuse(ErrorCode::PoolUnready, "the node is draining".into());
        }
        let pools = self.pools.iter().filter(|(_, pool)| pool.takes_work());
        let replicas = pools.flat_map(|(id, pool)| pool.replicas.values().map(move |replica| (id, replica)));
        let ready: Vec<_> = replicas
            .filter(|(_, replica)| replica.is_ready() && replica.spec.models.contains(model))
            .collect();
        let able = ready
            .iter()
            .filter(|(_, replica)| has_route(replica.spec.engine) && !replica.is_lacking(now, path));
        let Some((pool_id, replica)) = able.min_by_key(|(_, replica)| replica.busy()) else {
            return match ready.first() {
                Some((_, replica)) => {
                    let message = format!("{path}: {} has no such route", replica.spec.engine.as_str());
                    refuse(ErrorCode::Unsupported, message)
                }
                None => refuse(ErrorCode::PoolUnready, format!("no replica here is ready with {model}")),
            };
        };
        Ok(Serving {
            pool_id: (*pool_id).clone(),
            replica_id: replica.spec.replica_id.clone(),
            engine: replica.spec.engine,
            url: replica.spec.url.clone(),
            model: replica.engine_name(model),
            names_from_engine: replica.spec.names_from_engine,
        })
    }

    /// A request has shown that the replica's engine does not have the path.
    pub fn found_lacking(&mut self, now: Moment, pool_id: &PoolId, replica_id: &ReplicaId, path: &str) {
        let replica = self.pools.get_mut(pool_id).and_then(|pool| pool.replicas.get_mut(replica_id));
        if let Some(replica) = replica {
            replica.lacks(now, path);
        }
    }
}
