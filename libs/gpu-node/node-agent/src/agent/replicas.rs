//! The replicas of a node: who looks at each of them, what a look brings, and the slots that are to be
//! released.

use std::sync::Arc;

use handoff_watcher::HandoffName;
use node_core::{BindError, Busy, NodeCore, Problem, Readiness, ReplicaSpec, Source};
use pool_registry_types::pool::EngineKind;
use pool_registry_types::{Moment, PoolId, ReplicaId};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::Agent;
use crate::engines::{ApiKey, Endpoint};
use crate::replica;

impl Agent {
    /// The engine's key, as it was read at the last look.
    pub(crate) fn set_key(&self, name: &HandoffName, key: Option<ApiKey>) {
        let changed = self.replicas.lock().get_mut(name).is_some_and(|watched| {
            let changed = watched.key != key;
            watched.key = key;
            changed
        });
        if changed {
            self.with_core(|core, _| core.key_changed(&name.pool_id, &name.replica_id));
        }
    }

    /// Where a replica is and what it is asked with.
    pub(crate) fn endpoint(&self, name: &HandoffName, url: &str) -> Endpoint {
        let key = self.replicas.lock().get(name).and_then(|watched| watched.key.clone());
        Endpoint { key, ..Endpoint::new(url) }
    }

    /// The replica's engine is looked at now, not at the next tick.
    pub(crate) fn look_now(&self, name: &HandoffName) {
        if let Some(watched) = self.replicas.lock().get(name) {
            watched.look.notify_one();
        }
    }

    pub(crate) fn set_binding_problem(&self, name: &HandoffName, problem: Option<String>) {
        let HandoffName { pool_id, replica_id } = name.clone();
        let problem =
            problem.map(|message| Problem { pool_id: Some(pool_id.clone()), message, is_left_over: false });
        self.set_problem(Source::Replica { pool_id, replica_id }, problem);
    }

    /// The same unless the watch was stopped, as in [`Agent::bind_unless`].
    pub(crate) fn set_problem_unless(
        &self,
        stop: &CancellationToken,
        name: &HandoffName,
        problem: Option<String>,
    ) {
        let _watches = self.replicas.lock();
        if !stop.is_cancelled() {
            self.set_binding_problem(name, problem);
        }
    }

    /// Binds unless the watch was stopped: watches are stopped under the same lock, so a handoff
    /// that is gone or was rewritten never binds late. What the same look says of its readiness
    /// counts in the same step, so that a change takes nothing out of service.
    pub(crate) fn bind_unless(
        &self,
        stop: &CancellationToken,
        pool_id: &PoolId,
        spec: ReplicaSpec,
        readiness: Option<Readiness>,
    ) -> Result<(), BindError> {
        let _watches = self.replicas.lock();
        if stop.is_cancelled() {
            return Ok(());
        }
        let replica_id = spec.replica_id.clone();
        self.change(|core, now| {
            core.bind(now, pool_id, spec)?;
            if let Some(readiness) = readiness {
                core.observed(now, pool_id, &replica_id, readiness);
            }
            Ok(())
        })
    }

    pub(crate) fn observed_unless(
        &self,
        stop: &CancellationToken,
        pool_id: &PoolId,
        replica_id: &ReplicaId,
        readiness: Readiness,
    ) {
        let _watches = self.replicas.lock();
        if !stop.is_cancelled() {
            self.observed(pool_id, replica_id, readiness);
        }
    }

    pub(crate) fn is_ready(&self, pool_id: &PoolId, replica_id: &ReplicaId) -> bool {
        self.core.lock().is_ready(pool_id, replica_id)
    }

    pub(crate) fn counted(&self, pool_id: &PoolId, replica_id: &ReplicaId, began: Moment, busy: Busy) {
        self.change(|core, now| core.counted(now, began, pool_id, replica_id, busy));
    }

    pub(crate) fn observed(&self, pool_id: &PoolId, replica_id: &ReplicaId, readiness: Readiness) {
        self.change(|core, now| core.observed(now, pool_id, replica_id, readiness));
    }

    // ---- slots that are to be released ----

    /// An attempt was broken off: its slot is followed until it is free.
    pub(crate) fn watch_slots(self: &Arc<Self>, name: HandoffName, key: Option<ApiKey>) {
        let mut slot_watchers = self.slot_watchers.lock();
        if let Some(again) = slot_watchers.get(&name) {
            again.notify_one();
            return;
        }
        let again = Arc::new(Notify::new());
        slot_watchers.insert(name.clone(), Arc::clone(&again));
        drop(slot_watchers);
        let agent = Arc::clone(self);
        let make = move || Arc::clone(&agent).follow_releases(name.clone(), key.clone(), Arc::clone(&again));
        // Until it runs again the slots stay taken.
        owned_tasks::start(&self.tracker, "slots that are to be released", &self.stop, make, |_| {});
    }

    async fn follow_releases(self: Arc<Self>, name: HandoffName, key: Option<ApiKey>, again: Arc<Notify>) {
        loop {
            let watching = replica::watch_slots(&self, &name, key.clone(), &again);
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = watching => {}
            }
            // Under the lock: whoever comes now starts another one.
            let mut slot_watchers = self.slot_watchers.lock();
            let more = self.slot_due_at(&name.pool_id, &name.replica_id).is_some();
            if !more || self.stop.is_cancelled() {
                slot_watchers.remove(&name);
                return;
            }
        }
    }

    /// The replica's engine as it is now, which may be another one than an attempt was sent to.
    pub(crate) fn engine_of(&self, name: &HandoffName) -> Option<(EngineKind, Endpoint)> {
        let (engine, url) = self.core.lock().engine_of(&name.pool_id, &name.replica_id)?;
        Some((engine, self.endpoint(name, &url)))
    }

    pub(crate) fn is_watched(&self, name: &HandoffName) -> bool {
        self.slot_watchers.lock().contains_key(name)
    }

    pub(crate) fn slot_due_at(&self, pool_id: &PoolId, replica_id: &ReplicaId) -> Option<Moment> {
        self.core.lock().slot_due_at(pool_id, replica_id)
    }

    pub(crate) fn expire_releases(&self) {
        self.change(NodeCore::expire_releases);
    }

    pub(crate) fn unbind(&self, pool_id: &PoolId, replica_id: &ReplicaId) {
        self.change(|core, now| core.unbind(now, pool_id, replica_id));
    }
}
