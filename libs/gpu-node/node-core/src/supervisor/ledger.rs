//! Who holds how much memory of which device.
//!
//! A start must fit into the smaller of two amounts: what our own claims leave of the device,
//! and what the driver says is free beyond the reserve, less what engines that are still
//! loading will take. The second one is what makes a start wait while the memory of an engine
//! that has just ended is not released yet, or while a stranger holds it.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use pool_registry_types::Moment;

use crate::supervisor::plan::{Claim, Device, RunId};

/// One look at a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceReading {
    pub total_bytes: u64,
    /// What the driver says is free; unknown where there is none to ask.
    pub free_bytes: Option<u64>,
    /// Starts are refused on a device that is lost.
    pub healthy: bool,
    /// Errors that the driver has told of it so far.
    pub faults: u64,
}

#[derive(Debug, Clone)]
struct Held {
    bytes: u64,
    /// The engine has loaded: what it holds is in the driver's figures.
    loaded: bool,
    /// Whose it is, for messages.
    owner: String,
}

#[derive(Debug, Clone, Default)]
struct Account {
    reading: Option<DeviceReading>,
    held: BTreeMap<RunId, Held>,
    /// When a claim was given back last: the driver shows it a little later.
    released: Option<Moment>,
}

/// How long the driver may take to show memory free whose engine has ended.
const RELEASE_PATIENCE: Duration = Duration::from_secs(10);

/// Why a start does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shortage {
    /// Never, whoever makes room.
    pub(super) for_ever: bool,
    /// For people.
    text: String,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The books of all devices.
#[derive(Debug, Clone, Default)]
pub(super) struct Ledger {
    /// Bytes of each GPU that nobody may claim.
    reserve_bytes: u64,
    accounts: BTreeMap<Device, Account>,
}

impl Ledger {
    pub(super) fn new(reserve_bytes: u64) -> Self {
        Self { reserve_bytes, accounts: BTreeMap::new() }
    }

    pub(super) fn set_reserve(&mut self, reserve_bytes: u64) {
        self.reserve_bytes = reserve_bytes;
    }

    pub(super) fn observe(&mut self, readings: &BTreeMap<Device, DeviceReading>) {
        for (device, account) in &mut self.accounts {
            if !readings.contains_key(device) {
                account.reading = None;
            }
        }
        for (device, reading) in readings {
            self.accounts.entry(*device).or_default().reading = Some(*reading);
        }
    }

    /// The GPUs that are seen.
    pub(super) fn gpus(&self) -> BTreeMap<Device, DeviceReading> {
        let seen = self.accounts.iter().filter(|(device, _)| **device != Device::Host);
        seen.filter_map(|(device, account)| Some((*device, account.reading?))).collect()
    }

    /// The faults of each GPU so far.
    pub(super) fn faults(&self) -> BTreeMap<Device, u64> {
        self.gpus().into_iter().map(|(device, reading)| (device, reading.faults)).collect()
    }

    pub(super) fn hold(&mut self, run: RunId, claim: &Claim, owner: &str) {
        for (device, bytes) in claim {
            let held = Held { bytes: *bytes, loaded: false, owner: owner.to_owned() };
            self.accounts.entry(*device).or_default().held.insert(run, held);
        }
    }

    /// The engine has loaded.
    pub(super) fn loaded(&mut self, run: RunId) {
        for account in self.accounts.values_mut() {
            if let Some(held) = account.held.get_mut(&run) {
                held.loaded = true;
            }
        }
    }

    pub(super) fn release(&mut self, now: Moment, run: RunId) {
        for account in self.accounts.values_mut() {
            if account.held.remove(&run).is_some() {
                account.released = Some(now);
            }
        }
    }

    /// Whether the claim fits by our books with `freed` on top, and the driver is only behind:
    /// something was given back just now.
    pub(super) fn will_fit(&self, now: Moment, claim: &Claim, freed: &Claim) -> bool {
        claim.iter().all(|(device, needed)| {
            let Some(account) = self.accounts.get(device) else { return *device == Device::Host };
            let Some(reading) = account.reading else { return *device == Device::Host };
            let more = freed.get(device).copied().unwrap_or(0);
            let behind = account.released.is_some_and(|at| now < at + RELEASE_PATIENCE);
            let claimed: u64 = account.held.values().map(|held| held.bytes).sum();
            let by_claims = self.claimable(&reading).saturating_sub(claimed).saturating_add(more);
            let available = self.available(*device).unwrap_or(0).saturating_add(more);
            reading.healthy && (*needed <= available || (behind && *needed <= by_claims))
        })
    }

    /// Bytes that could be claimed on the device now; unknown without any figure of it.
    pub(super) fn available(&self, device: Device) -> Option<u64> {
        let account = self.accounts.get(&device)?;
        let reading = account.reading?;
        let claimed: u64 = account.held.values().map(|held| held.bytes).sum();
        let by_claims = self.claimable(&reading).saturating_sub(claimed);
        let Some(free) = reading.free_bytes else { return Some(by_claims) };
        let loading: u64 = account.held.values().filter(|held| !held.loaded).map(|held| held.bytes).sum();
        Some(by_claims.min(free.saturating_sub(self.reserve_bytes).saturating_sub(loading)))
    }

    fn claimable(&self, reading: &DeviceReading) -> u64 {
        reading.total_bytes.saturating_sub(self.reserve_bytes)
    }

    /// Whether the claim fits now, with `freed` on top of what is free.
    pub(super) fn fits(&self, claim: &Claim, freed: &Claim) -> Result<(), Shortage> {
        for (device, needed) in claim {
            let account = self.accounts.get(device);
            let Some(reading) = account.and_then(|account| account.reading) else {
                // Nothing is known of host memory on some machines; a GPU that is not seen is not there.
                if *device == Device::Host {
                    continue;
                }
                return Err(Shortage {
                    for_ever: false,
                    text: format!("needs {device}, and no such GPU is seen"),
                });
            };
            let available = self.available(*device).unwrap_or(0);
            let with = available.saturating_add(freed.get(device).copied().unwrap_or(0));
            if *needed <= with && reading.healthy {
                continue;
            }
            // A device that is sick says nothing of how much it has.
            let for_ever = reading.healthy && reading.total_bytes > 0 && *needed > self.claimable(&reading);
            return Err(Shortage { for_ever, text: self.describe(*device, *needed, available, &reading) });
        }
        Ok(())
    }

    fn describe(&self, device: Device, needed: u64, available: u64, reading: &DeviceReading) -> String {
        if !reading.healthy {
            return format!("{device} is lost or does not answer");
        }
        let held = self.accounts.get(&device).into_iter().flat_map(|account| account.held.values());
        let held: Vec<String> = held.map(|held| format!("{} {}", held.owner, mib(held.bytes))).collect();
        let held = if held.is_empty() { "none".to_owned() } else { held.join(", ") };
        let free = reading.free_bytes.map_or_else(String::new, |free| format!(", {} free", mib(free)));
        format!(
            "needs {} on {device}, {} can be had: {} in all{free}, {} reserved, claimed by {held}",
            mib(needed),
            mib(available),
            mib(reading.total_bytes),
            mib(self.reserve_bytes),
        )
    }

    /// For the invariant that no device is promised twice.
    #[cfg(test)]
    pub(super) fn claimed(&self, device: Device) -> u64 {
        self.accounts.get(&device).map_or(0, |account| account.held.values().map(|held| held.bytes).sum())
    }
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes / (1024 * 1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn reading(total: u64, free: Option<u64>) -> BTreeMap<Device, DeviceReading> {
        let reading = DeviceReading {
            total_bytes: total * MIB,
            free_bytes: free.map(|f| f * MIB),
            healthy: true,
            faults: 0,
        };
        BTreeMap::from([(Device::Gpu(0), reading)])
    }

    fn claim(bytes: u64) -> Claim {
        Claim::from([(Device::Gpu(0), bytes * MIB)])
    }

    fn fits(ledger: &Ledger, bytes: u64) -> bool {
        ledger.fits(&claim(bytes), &Claim::new()).is_ok()
    }

    // CLOUD-2450
    #[test]
    fn a_start_fits_into_the_smaller_of_our_books_and_the_drivers() {
        let mut ledger = Ledger::new(100 * MIB);
        ledger.observe(&reading(1000, Some(1000)));
        assert!(fits(&ledger, 900) && !fits(&ledger, 901));
        ledger.hold(RunId(1), &claim(400), "a-r0");
        assert!(fits(&ledger, 500) && !fits(&ledger, 501), "it loads: the driver does not show it yet");
        ledger.observe(&reading(1000, Some(600)));
        ledger.loaded(RunId(1));
        assert!(fits(&ledger, 500) && !fits(&ledger, 501), "counted once, not twice");
        ledger.observe(&reading(1000, Some(300)));
        assert!(fits(&ledger, 200) && !fits(&ledger, 201), "a stranger holds memory");
    }

    // CLOUD-2451
    #[test]
    fn memory_that_is_not_released_yet_is_waited_for() {
        let mut ledger = Ledger::new(0);
        ledger.observe(&reading(1000, Some(200)));
        ledger.hold(RunId(1), &claim(800), "a-r0");
        ledger.loaded(RunId(1));
        ledger.release(Moment::ZERO, RunId(1));
        assert!(!fits(&ledger, 800), "our books are free, the device is not");
        let will = |ms| ledger.will_fit(Moment::from_millis(ms), &claim(800), &Claim::new());
        assert!(will(9_000) && !will(11_000), "then it is a stranger's");
        ledger.observe(&reading(1000, Some(1000)));
        assert!(fits(&ledger, 800));
    }

    // CLOUD-2450
    #[test]
    fn a_shortage_says_its_numbers_and_whether_it_is_for_ever() {
        let mut ledger = Ledger::new(100 * MIB);
        ledger.observe(&reading(1000, None));
        ledger.hold(RunId(1), &claim(400), "a-r0");
        let short = ledger.fits(&claim(600), &Claim::new()).unwrap_err();
        assert!(!short.for_ever);
        let text = short.to_string();
        for part in ["600 MiB", "GPU0", "500 MiB", "1000 MiB", "a-r0 400 MiB"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(ledger.fits(&claim(600), &claim(100)).is_ok(), "with what would be freed");
        assert!(ledger.fits(&claim(901), &Claim::new()).unwrap_err().for_ever);
        let silent = DeviceReading { total_bytes: 0, free_bytes: None, healthy: false, faults: 0 };
        ledger.observe(&BTreeMap::from([(Device::Gpu(0), silent)]));
        assert!(!ledger.fits(&claim(1), &Claim::new()).unwrap_err().for_ever, "it may come back");
        let elsewhere = Claim::from([(Device::Gpu(7), 1)]);
        assert!(ledger.fits(&elsewhere, &Claim::new()).unwrap_err().to_string().contains("no such GPU"));
    }
}
