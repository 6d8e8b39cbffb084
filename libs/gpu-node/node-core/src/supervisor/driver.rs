//! What GPUs and engines say of a driver that is not well.
//!
//! A lost GPU is acted upon at once. A line of an engine may be the text of a client that the engine
//! prints, so it is only a question: the driver is asked for a while, and without a driver the
//! engine's own health call is. Nothing of it counts towards the limit of exits.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pool_registry_types::Moment;

use crate::supervisor::core::{Supervisor, find};
use crate::supervisor::driver_reports::Report;
use crate::supervisor::event::Ordered;
use crate::supervisor::ledger::DeviceReading;
use crate::supervisor::plan::{Device, ReplicaKey, RunId};
use crate::supervisor::pool::{Blame, Slot};

/// How long a report waits to be confirmed, and the pause between two looks at the GPUs meanwhile.
const CONFIRMED_WITHIN: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_secs(1);

impl Supervisor {
    pub(super) fn devices(
        &mut self,
        now: Moment,
        readings: &BTreeMap<Device, DeviceReading>,
        out: &mut Vec<Ordered>,
    ) {
        self.ledger.observe(readings);
        let lost: BTreeSet<Device> =
            readings.iter().filter(|(_, reading)| !reading.healthy).map(|(device, _)| *device).collect();
        if lost.is_empty() {
            return;
        }
        let mut hit = Vec::new();
        for pool in self.pools.values() {
            let claim = pool.serving.prepared().map(|prepared| &prepared.claim);
            let Some(device) =
                claim.into_iter().flatten().map(|(device, _)| *device).find(|d| lost.contains(d))
            else {
                continue;
            };
            let ready = pool.serving.slots.iter().filter(|slot| slot.stage.is_ready());
            hit.extend(ready.filter_map(|slot| Some((slot.stage.run()?, device))));
        }
        for (run, device) in hit {
            self.leave_for_driver(now, run, format!("{device} is lost or does not answer"), out);
        }
    }

    /// Keeps what an engine that serves has written until it is confirmed or too old.
    pub(super) fn alarmed(&mut self, now: Moment, run: RunId, line: String) {
        let Some((_, pool)) = find(&mut self.pools, run) else { return };
        let serves = |slot: &&mut Slot| slot.stage.run() == Some(run) && slot.stage.is_ready();
        if let Some(slot) = pool.serving.slots.iter_mut().find(serves) {
            slot.report = Some(Report { line, until: now + CONFIRMED_WITHIN, look_at: now });
        }
    }

    /// Acts upon reports that are confirmed by now, and forgets those that were not in time.
    pub(super) fn confirm_reports(&mut self, now: Moment, out: &mut Vec<Ordered>) {
        let gpus = self.ledger.gpus();
        let mut confirmed = Vec::new();
        for slot in self.pools.values_mut().flat_map(|pool| pool.serving.slots.iter_mut()) {
            let Some(mut report) = slot.report.take() else { continue };
            let Some(run) = slot.stage.run().filter(|_| slot.stage.is_ready()) else { continue };
            if is_confirmed(slot, &gpus) {
                confirmed.push((run, report.line));
            } else if now < report.until {
                if report.look_at <= now {
                    report.look_at = now + LOOK_EVERY;
                    out.push(Ordered::LookAtDevices);
                }
                slot.report = Some(report);
            }
        }
        for (run, line) in confirmed {
            if let Some((_, pool)) = find(&mut self.pools, run) {
                pool.reported.add(now);
            }
            self.leave_for_driver(now, run, line, out);
        }
    }

    /// What works with a sick driver or GPU is not trusted: it takes nothing new, may finish,
    /// and is started again.
    fn leave_for_driver(&mut self, now: Moment, run: RunId, why: String, out: &mut Vec<Ordered>) {
        let Some((pool_id, pool)) = find(&mut self.pools, run) else { return };
        let patience = pool.serving.plan.drain_timeout;
        let Some(slot) = pool.serving.slots.iter_mut().find(|slot| slot.stage.run() == Some(run)) else {
            return;
        };
        if !slot.stage.is_ready() {
            return;
        }
        let replica_key = ReplicaKey { pool_id, replica_id: slot.replica_id.clone() };
        let withdrawn = slot.leave(now, patience, Blame::Driver);
        out.extend(withdrawn.map(|run| Ordered::Withdraw { run, replica_key }));
        pool.last_error = Some(why);
    }
}

/// Whether the driver says so too: of the GPUs that the engine claims, or of any where it claims
/// none. Where there is none to ask, an engine that serves is evidence against its line.
fn is_confirmed(slot: &Slot, gpus: &BTreeMap<Device, DeviceReading>) -> bool {
    if gpus.is_empty() {
        return slot.work.silent;
    }
    let claims_any = slot.claim.keys().any(|device| *device != Device::Host);
    let mut own = gpus.iter().filter(|(device, _)| !claims_any || slot.claim.contains_key(device));
    let before = |device: &Device| slot.faults.get(device).copied().unwrap_or(0);
    own.any(|(device, reading)| !reading.healthy || reading.faults > before(device))
}
