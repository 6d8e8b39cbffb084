//! How an engine becomes known: by the handoff file of whoever has started it, or in process, by
//! this node's own supervision.
//!
//! Both are one handoff, and from there on the engines are alike. The file of an engine of our own is
//! for other programs: neither what it says nor whether it is there changes anything here.

use std::sync::Arc;

use handoff_watcher::{Change, Fault, Handoff, HandoffName};
use node_core::{Problem, Readiness, Source};
use owned_tasks::{Panicked, caught};
use pool_registry_types::{PoolId, ReplicaId};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use super::{Agent, Watched};
use crate::replica;

impl Agent {
    /// Takes the changes of the runtime directory in until the watcher ends, or this agent stops. A
    /// file whose change cannot be taken has that for a problem until it changes again.
    pub fn follow_handoffs(self: &Arc<Self>, changes: mpsc::Receiver<Change>) {
        let (agent, changes) = (Arc::clone(self), Arc::new(tokio::sync::Mutex::new(changes)));
        let make = move || {
            let (agent, changes) = (Arc::clone(&agent), Arc::clone(&changes));
            async move {
                let mut changes = changes.lock().await;
                loop {
                    let change = tokio::select! {
                        () = agent.stop.cancelled() => return,
                        change = changes.recv() => change,
                    };
                    let Some(change) = change else { return };
                    let file = change.file().to_owned();
                    let taking = caught("change of a handoff", async { agent.on_handoff(change) });
                    if let Err(panicked) = taking.await {
                        let (pool_id, message) = (None, panicked.to_string());
                        let problem = Problem { pool_id, message, is_left_over: false };
                        agent.set_problem(Source::HandoffFile(file), Some(problem));
                    }
                }
            }
        };
        self.loops.start(&self.tracker, "handoffs", &self.stop, make);
    }

    /// Takes a change of the runtime directory in.
    fn on_handoff(self: &Arc<Self>, change: Change) {
        match change {
            Change::Bound { file, handoff } => {
                tracing::info!(file, pool_id = %handoff.pool_id, replica_id = %handoff.replica_id, "handoff seen");
                self.set_problem(Source::HandoffFile(file), None);
                let mut announced = self.announced.lock();
                if announced.seen(&handoff) {
                    self.watch_replica(handoff);
                }
            }
            Change::Unbound { file, handoff } => {
                tracing::info!(file, pool_id = %handoff.pool_id, replica_id = %handoff.replica_id, "handoff gone");
                let mut announced = self.announced.lock();
                if announced.gone(&handoff.name()) {
                    self.stop_watching(&handoff.name());
                }
            }
            Change::Faulty { file, fault, pool_id } => {
                tracing::warn!(file, reason = %fault, "a handoff binds nothing");
                let is_left_over = matches!(fault, Fault::ProcessGone(_));
                let problem = Problem { pool_id, message: fault.to_string(), is_left_over };
                self.set_problem(Source::HandoffFile(file), Some(problem));
            }
            Change::Cleared { file } => {
                self.set_problem(Source::HandoffFile(file), None);
            }
        }
    }

    /// An engine of our own takes attempts from now on. One that its file has announced before, as
    /// that of an earlier daemon's does, stays as it is bound.
    pub(crate) fn announce(self: &Arc<Self>, handoff: Handoff) {
        tracing::info!(pool_id = %handoff.pool_id, replica_id = %handoff.replica_id, "an engine is announced");
        // Held all the while, as where files come and go.
        let mut announced = self.announced.lock();
        announced.announce(handoff.clone());
        let watched = self.replicas.lock();
        let is_watched = watched.get(&handoff.name()).is_some_and(|watched| watched.handoff == handoff);
        drop(watched);
        if !is_watched {
            self.watch_replica(handoff);
        }
    }

    fn watch_replica(self: &Arc<Self>, handoff: Handoff) {
        let (stop, look) = (self.stop.child_token(), Arc::new(Notify::new()));
        {
            let mut replicas = self.replicas.lock();
            let watched =
                Watched { handoff: handoff.clone(), stop: stop.clone(), look: Arc::clone(&look), key: None };
            if let Some(before) = replicas.insert(handoff.name(), watched) {
                before.stop.cancel();
                // What the old words bound serves nothing until the new ones are proven.
                let readiness = Readiness::Failed("its handoff was rewritten".into());
                self.observed(&handoff.pool_id, &handoff.replica_id, readiness);
            }
        }
        let (agent, name) = (Arc::clone(self), handoff.name());
        let (watcher, ended) = (Arc::clone(self), stop.clone());
        let make =
            move || replica::watch(Arc::clone(&watcher), handoff.clone(), ended.clone(), Arc::clone(&look));
        let gone = stop.clone();
        // What a new watch sees is told by itself.
        let send = move |panicked: Option<&Panicked>| {
            if let Some(panicked) = panicked {
                agent.watch_failed(&gone, &name, panicked);
            }
        };
        owned_tasks::start(&self.tracker, "watch of a replica", &stop, make, send);
    }

    /// Nobody looks at the replica: it gets nothing until somebody does.
    pub(super) fn watch_failed(&self, stop: &CancellationToken, name: &HandoffName, panicked: &Panicked) {
        let HandoffName { pool_id, replica_id } = name;
        tracing::error!(%pool_id, %replica_id, "the replica is not ready: its watch has panicked");
        self.observed_unless(stop, pool_id, replica_id, Readiness::Failed(panicked.to_string()));
        self.set_problem_unless(stop, name, Some(panicked.to_string()));
    }

    /// Binds replicas of the pool again that were withdrawn while their handoff files stayed what
    /// they were.
    pub(crate) fn bind_announced(self: &Arc<Self>, pool_id: &PoolId) {
        // Held all the while: no file comes or goes between the look and the watch.
        let announced = self.announced.lock();
        for handoff in announced.files.values().filter(|handoff| handoff.pool_id == *pool_id) {
            let watched = self.replicas.lock().contains_key(&handoff.name());
            if !watched {
                self.watch_replica(handoff.clone());
            }
        }
    }

    /// The replica takes nothing new from now on, whatever its handoff file says.
    pub(crate) fn withdraw(&self, pool_id: &PoolId, replica_id: &ReplicaId) {
        let name = HandoffName { pool_id: pool_id.clone(), replica_id: replica_id.clone() };
        let mut announced = self.announced.lock();
        announced.withdraw(&name);
        self.stop_watching(&name);
    }

    /// Called while what is announced is held.
    fn stop_watching(&self, name: &HandoffName) {
        if let Some(watched) = self.replicas.lock().remove(name) {
            watched.stop.cancel();
        }
        self.set_binding_problem(name, None);
        self.unbind(&name.pool_id, &name.replica_id);
    }
}

#[cfg(test)]
#[path = "handoffs_tests.rs"]
mod tests;
