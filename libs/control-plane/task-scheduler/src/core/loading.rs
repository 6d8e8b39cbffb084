//! Waiting tasks start the engines that they need.
//!
//! A node is asked to load a pool when a task waits that no pool takes, or that has waited for
//! long while all are full. The order may be lost, and its node forgets it after a while: as
//! long as the task waits, it is given again. What makes room for what is the node's to decide.

use pool_registry_types::PoolId;
use pool_registry_types::placement::Refusal;

use super::placing::asks_for_the_same;
use super::*;

/// Pause before the same pool is asked for again. Source: .specs/01 CLOUD-2426.
const LOAD_AGAIN: Duration = Duration::from_secs(5);
/// How long a task waits for a slot of full pools, or for one that loads, before another one is
/// loaded, unless loading is known to take longer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Orders after which a pool that is still not loading comes after others.
const UNANSWERED_LIMIT: u32 = 3;
/// Tasks of a lane that are asked what they need, and different ones among them.
const MOST_WALKED: usize = 256;
const MOST_DIFFERENT: usize = 16;

/// What was asked of a pool since it became loadable.
#[derive(Debug, Clone, Copy)]
pub(super) struct LoadAsked {
    last: Moment,
    times: u32,
}

impl ControlCore {
    /// Asks for the pools that the waiting tasks of the model need.
    pub(super) fn ask_to_load(&mut self, now: Moment, model: &ModelRef, effects: &mut Vec<Effect>) {
        if !self.index.has_loadable(model) {
            return;
        }
        let (wanted, mut again) = self.pools_to_load(now, model);
        for pool in wanted {
            let asked = self.loads_asked.get(&pool).copied();
            if asked.is_some() && !self.enforces(Rule::LoadRepeated) {
                continue;
            }
            again = again.min(now + LOAD_AGAIN);
            let times = asked.map_or(1, |asked| asked.times.saturating_add(1));
            self.loads_asked.insert(pool.clone(), LoadAsked { last: now, times });
            if let Some((address, _)) = self.registry.address(&pool.node_id) {
                let address = address.to_owned();
                self.counters.loads += 1;
                effects.push(Effect::Load { pool, address });
            }
        }
        if again != Moment::NEVER
            && let Some(before) = self.load_alarm_of.insert(model.clone(), again)
        {
            self.load_alarms.remove(&(before, model.clone()));
        }
        if again != Moment::NEVER {
            self.load_alarms.insert((again, model.clone()));
        }
    }

    /// The pools that waiting tasks need and that were not asked for just now, and when to look
    /// again if nothing happens.
    fn pools_to_load(&self, now: Moment, model: &ModelRef) -> (BTreeSet<PoolKey>, Moment) {
        let (mut wanted, mut again) = (BTreeSet::new(), Moment::NEVER);
        let Some(lane) = self.queue.lane(model) else { return (wanted, again) };
        let unanswered =
            |pool: &PoolKey| self.loads_asked.get(pool).is_some_and(|asked| asked.times >= UNANSWERED_LIMIT);
        for priority in lane.order() {
            // What was looked at for one task is so for the next that asks for the same.
            let mut looked_at: Vec<&TaskSpec> = Vec::new();
            for id in lane.waiting(priority).take(MOST_WALKED) {
                let Some(task) = self.tasks.get(&id) else { continue };
                let Some(spec) = task.spec.as_deref() else { continue };
                if task.tried.is_empty() {
                    if looked_at.iter().any(|other| asks_for_the_same(spec, other)) {
                        continue;
                    }
                    if looked_at.len() >= MOST_DIFFERENT {
                        break;
                    }
                    looked_at.push(spec);
                }
                let Some(shape) = self.shape(now, task, None) else { continue };
                let ToLoad { best: Some(pool), under_way } = choose_to_load(&self.index, &shape, &unanswered)
                else {
                    continue;
                };
                let at = match choose(&self.index, &shape) {
                    Err(NoPlacement::NoPool) if !under_way => now,
                    Err(NoPlacement::NoPool | NoPlacement::Full) => {
                        let estimate = self.index.get(pool).and_then(|pool| pool.load_estimate_ms);
                        let patience = estimate.map_or(PATIENCE, Duration::from_millis).max(PATIENCE);
                        task.admitted + patience
                    }
                    Ok(_) | Err(NoPlacement::BackingOff) => continue,
                };
                let after_the_last = self.loads_asked.get(pool).map(|asked| asked.last + LOAD_AGAIN);
                let at = after_the_last.map_or(at, |last| at.max(last));
                if at <= now {
                    wanted.insert(pool.clone());
                } else {
                    again = again.min(at);
                }
            }
        }
        (wanted, again)
    }

    /// The pools of the node that it loads on demand and for which a task waits: one that it could
    /// run now, or when a slot is free.
    pub(super) fn waited_for(&self, now: Moment, node_id: &NodeId) -> Vec<PoolId> {
        let waits = |pool: &&Candidate| {
            pool.load_estimate_ms.is_some()
                && pool.models.iter().any(|model| self.is_waited_for(now, model, &pool.key))
        };
        self.pools_of(node_id).filter(waits).map(|pool| pool.key.pool_id.clone()).collect()
    }

    fn is_waited_for(&self, now: Moment, model: &ModelRef, key: &PoolKey) -> bool {
        let Some(lane) = self.queue.lane(model) else { return false };
        let waiting = lane.order().into_iter().flat_map(|priority| lane.waiting(priority));
        // Many that ask for the same must not hide the one that does not.
        let mut looked_at: Vec<&TaskSpec> = Vec::new();
        waiting.take(MOST_WALKED).any(|id| {
            let Some(task) = self.tasks.get(&id) else { return false };
            let Some(spec) = task.spec.as_deref() else { return false };
            if task.tried.is_empty() {
                if looked_at.iter().any(|other| asks_for_the_same(spec, other)) {
                    return false;
                }
                if looked_at.len() < MOST_DIFFERENT {
                    looked_at.push(spec);
                }
            }
            let verdict = self.shape(now, task, None).and_then(|shape| explain_one(&self.index, key, &shape));
            verdict.is_some_and(|verdict| {
                matches!(verdict.refusal, None | Some(Refusal::SlotsFull | Refusal::NotLoaded))
            })
        })
    }

    /// Lanes whose pools may have to be asked for again.
    pub(super) fn wake_loads(&mut self, now: Moment) {
        while let Some((at, _)) = self.load_alarms.first()
            && *at <= now
        {
            if let Some((_, model)) = self.load_alarms.pop_first() {
                self.load_alarm_of.remove(&model);
                self.dirty.insert(model);
            }
        }
    }
}
