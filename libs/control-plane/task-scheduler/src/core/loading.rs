//! Waiting tasks start the engines that they need.
//!
//! A node is asked to load a pool when a task waits that no pool takes, or that has waited for
//! long while all are full. The order may be lost, and its node forgets it after a while: as
//! long as the task waits, it is given again. What makes room for what is the node's to decide.

use super::*;

/// Pause before the same pool is asked for again. Source: .specs/01 CLOUD-2426.
const LOAD_AGAIN: Duration = Duration::from_secs(5);
/// How long a task waits for a slot of full pools before another one is loaded, unless loading
/// is known to take longer.
const FULL_PATIENCE: Duration = Duration::from_secs(10);

impl ControlCore {
    /// Asks for the pools that the waiting tasks of the model need.
    pub(super) fn ask_to_load(&mut self, now: Moment, model: &ModelRef, effects: &mut Vec<Effect>) {
        if !self.index.has_loadable(model) {
            return;
        }
        let Some(wanted) = self.pool_to_load(now, model) else { return };
        let again = match wanted {
            Wanted::Now(pool) => {
                let asked = self.loads_asked.get(&pool).copied();
                match asked.filter(|at| *at + LOAD_AGAIN > now) {
                    Some(at) => at + LOAD_AGAIN,
                    None => {
                        self.loads_asked.insert(pool.clone(), now);
                        if let Some((address, _)) = self.registry.address(&pool.node_id) {
                            let address = address.to_owned();
                            self.counters.loads += 1;
                            effects.push(Effect::Load { pool, address });
                        }
                        now + LOAD_AGAIN
                    }
                }
            }
            Wanted::At(at) => at,
        };
        self.load_alarms.insert((again, model.clone()));
    }

    /// The pool that the oldest task needs which has none.
    fn pool_to_load(&self, now: Moment, model: &ModelRef) -> Option<Wanted> {
        let lane = self.queue.lane(model)?;
        let mut soonest: Option<Moment> = None;
        // Few shapes of tasks are in a lane; the first ones speak for all.
        for id in lane.order().into_iter().flat_map(|priority| lane.waiting(priority)).take(MOST_LOOKED_AT) {
            let Some(task) = self.tasks.get(&id) else { continue };
            let Some(shape) = self.shape(now, task, None) else { continue };
            let ToLoad::Load(pool) = choose_to_load(&self.index, &shape) else { continue };
            match choose(&self.index, &shape) {
                Err(NoPlacement::NoPool) => return Some(Wanted::Now(pool.clone())),
                Err(NoPlacement::Full) => {
                    let estimate = self.index.get(pool).and_then(|pool| pool.load_estimate_ms);
                    let patience = estimate.map_or(FULL_PATIENCE, Duration::from_millis).max(FULL_PATIENCE);
                    let at = task.admitted + patience;
                    if at <= now {
                        return Some(Wanted::Now(pool.clone()));
                    }
                    soonest = Some(soonest.map_or(at, |before| before.min(at)));
                }
                Ok(_) | Err(NoPlacement::BackingOff) => {}
            }
        }
        soonest.map(Wanted::At)
    }

    /// Lanes whose pools may have to be asked for again.
    pub(super) fn stir_loads(&mut self, now: Moment) {
        while let Some((at, _)) = self.load_alarms.first()
            && *at <= now
        {
            if let Some((_, model)) = self.load_alarms.pop_first() {
                self.stirred.insert(model);
            }
        }
    }
}

/// Tasks of a lane that are asked what they need.
const MOST_LOOKED_AT: usize = 64;

enum Wanted {
    Now(PoolKey),
    /// Nothing before this.
    At(Moment),
}
