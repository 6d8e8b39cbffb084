//! The session with the control plane: its calls, one at a time, and what their answers ask for.

use std::sync::Arc;
use std::time::Duration;

use node_core::{BeatFailure, NodeEffect, RegisterFailure};
use node_registration::{CallError, ControlPlane};
use owned_tasks::{blocking, caught};
use pool_registry_types::NodeId;
use pool_registry_types::node::{Intent, IntentOrder, Liveness, ObservedLiveness};
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use super::Agent;

impl Agent {
    /// Keeps the session with the control plane until it has left, and then the handle ends.
    pub fn keep_session(self: &Arc<Self>, control: impl ControlPlane) -> JoinHandle<()> {
        let (agent, control) = (Arc::clone(self), Arc::new(control));
        let make = move || Arc::clone(&agent).run_session(Arc::clone(&control));
        // It leaves before the agent stops; it is its own tracker's, whose end nobody awaits.
        self.loops.start(&TaskTracker::new(), "session", &self.stop, make)
    }

    async fn run_session(self: Arc<Self>, control: Arc<impl ControlPlane>) {
        loop {
            let now = self.now();
            let (due, next, left) = {
                let mut core = self.core.lock();
                (core.due(now), core.next_deadline(), core.session().has_left())
            };
            if left {
                return;
            }
            match due {
                Some(effect) => self.call(&*control, effect).await,
                None => {
                    let pause = next.map_or(Duration::from_secs(3600), |at| at.since(self.now()));
                    tokio::select! {
                        () = self.wake.notified() => {}
                        () = tokio::time::sleep(pause) => {}
                    }
                }
            }
        }
    }

    async fn call(self: &Arc<Self>, control: &impl ControlPlane, effect: NodeEffect) {
        let url = control.url();
        match effect {
            NodeEffect::Register(request) => {
                let node_id = request.node_id.clone();
                let answer = answered(control.register(request)).await;
                match &answer {
                    Ok(answer) => tracing::info!(%node_id, url, epoch = %answer.epoch, "registered"),
                    Err(error) => tracing::warn!(%node_id, url, %error, "not registered, trying again"),
                }
                if let Some(life) = answer.as_ref().ok().and_then(|answer| answer.life) {
                    self.take_links_of(life);
                }
                let now = self.now();
                let effects = self.core.lock().registered(
                    now,
                    answer.map_err(|error| match error {
                        CallError::Refused(body) => RegisterFailure::Refused(body),
                        CallError::Unreachable(why) => RegisterFailure::Unreachable(why),
                    }),
                );
                self.carry_out(effects).await;
            }
            NodeEffect::Heartbeat(mut beat) => {
                beat.timestamp = jiff::Timestamp::now().to_string();
                let node_id = self.core.lock().identity().node_id.clone();
                let answer = answered(control.heartbeat(&node_id, beat)).await;
                let answer = answer.map_err(|error| {
                    if error.is_unknown_node() {
                        tracing::info!(%node_id, "the control plane does not know this node: registering again");
                        return BeatFailure::Unknown;
                    }
                    tracing::warn!(%node_id, url, %error, "a heartbeat failed");
                    BeatFailure::Failed(error.to_string())
                });
                let now = self.now();
                let (effects, news) = {
                    let mut core = self.core.lock();
                    (core.heartbeat_answered(now, answer), core.take_news())
                };
                if let Some(news) = news {
                    note_liveness(&node_id, &news);
                }
                self.carry_out(effects).await;
            }
            NodeEffect::Deregister(epoch) => {
                let node_id = self.core.lock().identity().node_id.clone();
                if let Err(error) = answered(control.deregister(&node_id, &epoch)).await {
                    tracing::warn!(%node_id, url, %error, "not deregistered: the lease will run out");
                }
                self.core.lock().deregistered();
            }
            other => self.carry_out(vec![other]).await,
        }
    }

    /// What the control plane's answers ask for.
    pub(super) async fn carry_out(self: &Arc<Self>, effects: Vec<NodeEffect>) {
        for effect in effects {
            match effect {
                NodeEffect::Cancel(attempt) => self.cancel(&attempt, "the control plane does not know it"),
                NodeEffect::TakeIntent(order) => {
                    // A disk that hangs must not keep the next heartbeat.
                    let agent = Arc::clone(self);
                    owned_tasks::task(&self.tracker, "intent", async move {
                        if let Err(error) = agent.take_intent(order).await {
                            tracing::error!(%error, "the intent cannot be written down, and is not taken");
                        }
                    });
                }
                NodeEffect::Waiting(pools) => {
                    // Where this node runs no engines nobody listens.
                    self.waited_for.send_replace(pools.into_iter().collect());
                }
                NodeEffect::Register(_) | NodeEffect::Heartbeat(_) | NodeEffect::Deregister(_) => {
                    unreachable!("calls are made one at a time, when they are due")
                }
            }
        }
    }

    /// Writes the operator's order down and follows it. Returns whether the order is for this
    /// registration; one that a later one has overtaken has no effect.
    pub async fn take_intent(self: &Arc<Self>, order: IntentOrder) -> std::io::Result<bool> {
        // Whoever asked may go away; what was begun is finished.
        let taking = self.tracker.track_future(Arc::clone(self).write_intent(order));
        let taken = owned_tasks::uninterrupted("intent", taking).await;
        taken.unwrap_or_else(|panicked| Err(std::io::Error::other(panicked)))
    }

    async fn write_intent(self: Arc<Self>, order: IntentOrder) -> std::io::Result<bool> {
        // One at a time: the file must say what the last order says.
        let _one = self.taking_intent.lock().await;
        let (of_now, counts) = {
            let core = self.core.lock();
            (core.session().epoch() == Some(&order.epoch), core.counts(&order))
        };
        if !counts {
            return Ok(of_now);
        }
        self.keep_intent(order.intent).await?;
        let taken = self.change(|core, now| core.set_intent(now, &order));
        if !taken {
            // The node registered anew meanwhile: the file says again what holds.
            let asked = self.core.lock().asked();
            self.keep_intent(asked).await?;
            return Ok(false);
        }
        tracing::info!(intent = ?order.intent, "the operator's intent is taken");
        Ok(true)
    }

    async fn keep_intent(&self, intent: Intent) -> std::io::Result<()> {
        let file = self.intent_file.clone();
        let written = blocking("file of the intent", move || file.write(intent)).await;
        written.unwrap_or_else(|panicked| Err(std::io::Error::other(panicked)))
    }
}

/// One line for each change of what the control plane takes the node for.
fn note_liveness(node_id: &NodeId, news: &ObservedLiveness) {
    let (liveness, reason) = (news.liveness, news.reason.as_deref());
    if liveness == Liveness::Online {
        tracing::info!(%node_id, %liveness, "the control plane sends this node tasks");
    } else {
        tracing::warn!(%node_id, %liveness, reason, "the control plane sends this node no tasks");
    }
}

/// A call that panics is one without an answer: the session must not wait for it for ever.
async fn answered<T>(call: impl Future<Output = Result<T, CallError>>) -> Result<T, CallError> {
    let answer = caught("call to the control plane", call).await;
    answer.unwrap_or_else(|panicked| Err(CallError::Unreachable(panicked.to_string())))
}
