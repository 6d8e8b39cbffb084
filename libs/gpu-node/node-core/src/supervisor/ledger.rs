//! Who holds how much memory of which device.
//!
//! A start must fit into the smaller of two amounts: what our own claims leave of the device,
//! and what the driver says is free beyond the reserve, less what engines that are still
//! loading will take. The second one is what makes a start wait while the memory of an engine
//! that has just ended is not released yet, or while a stranger holds it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use pool_registry_types::Moment;

use crate::supervisor::plan::{Claim, Device, RunId};

/// One look at a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceReading {
    /// Unknown where its driver does not tell: then nothing is held against a start.
    pub total_bytes: Option<u64>,
    /// What the driver says is free; unknown where there is none to ask.
    pub free_bytes: Option<u64>,
    /// Whose memory it is, where it has none of its own: the machine's, or that of the same GPU under
    /// another name.
    pub shares: Option<Device>,
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

    /// Where the claim is counted. Two claims that share none of it are in nobody's way.
    pub(super) fn accounts_of(&self, claim: &Claim) -> BTreeSet<Device> {
        claim.keys().map(|device| self.account_of(*device)).collect()
    }

    /// All devices that are counted there, whatever name they were claimed by.
    fn members(&self, account: Device) -> impl Iterator<Item = &Account> {
        let is_member = move |(device, _): &(&Device, &Account)| self.account_of(**device) == account;
        self.accounts.iter().filter(is_member).map(|(_, member)| member)
    }

    fn held(&self, account: Device) -> impl Iterator<Item = &Held> {
        self.members(account).flat_map(|member| member.held.values())
    }

    /// Where what is claimed of the device is counted.
    fn account_of(&self, device: Device) -> Device {
        let reading = self.accounts.get(&device).and_then(|account| account.reading);
        reading.and_then(|reading| reading.shares).unwrap_or(device)
    }

    /// What is claimed of each account, and by which of its devices first.
    fn by_account(&self, claim: &Claim) -> BTreeMap<Device, (u64, Device)> {
        let mut sums = BTreeMap::new();
        for (device, bytes) in claim {
            let (sum, _) = sums.entry(self.account_of(*device)).or_insert((0_u64, *device));
            *sum = sum.saturating_add(*bytes);
        }
        sums
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
        let freed = self.by_account(freed);
        let fits = |(device, (needed, _)): (Device, (u64, Device))| {
            let Some(account) = self.accounts.get(&device) else { return device == Device::Host };
            let Some(reading) = account.reading else { return device == Device::Host };
            let Some(claimable) = self.claimable(&reading) else { return true };
            let more = freed.get(&device).map_or(0, |(bytes, _)| *bytes);
            let released = self.members(device).filter_map(|member| member.released).max();
            let behind = released.is_some_and(|at| now < at + RELEASE_PATIENCE);
            let claimed: u64 = self.held(device).map(|held| held.bytes).sum();
            let by_claims = claimable.saturating_sub(claimed).saturating_add(more);
            let available = self.available(device).unwrap_or(0).saturating_add(more);
            needed <= available || (behind && needed <= by_claims)
        };
        claim.keys().all(|device| self.is_well(*device)) && self.by_account(claim).into_iter().all(fits)
    }

    /// Bytes that could be claimed on the device now; unknown without any figure of it.
    pub(super) fn available(&self, device: Device) -> Option<u64> {
        let account = self.account_of(device);
        let reading = self.accounts.get(&account)?.reading?;
        let claimed: u64 = self.held(account).map(|held| held.bytes).sum();
        let by_claims = self.claimable(&reading)?.saturating_sub(claimed);
        let Some(free) = reading.free_bytes else { return Some(by_claims) };
        let loading: u64 = self.held(account).filter(|held| !held.loaded).map(|held| held.bytes).sum();
        Some(by_claims.min(free.saturating_sub(self.reserve_bytes).saturating_sub(loading)))
    }

    fn claimable(&self, reading: &DeviceReading) -> Option<u64> {
        Some(reading.total_bytes?.saturating_sub(self.reserve_bytes))
    }

    /// Whether the device is seen and takes engines. Nothing is known of host memory on some machines; a GPU
    /// that is not seen is not there.
    fn is_well(&self, device: Device) -> bool {
        let reading = self.accounts.get(&device).and_then(|account| account.reading);
        reading.map_or(device == Device::Host, |reading| reading.healthy)
    }

    /// Whether the claim fits now, with `freed` on top of what is free.
    pub(super) fn fits(&self, claim: &Claim, freed: &Claim) -> Result<(), Shortage> {
        if let Some(device) = claim.keys().find(|device| !self.is_well(**device)) {
            let is_seen = self.accounts.get(device).is_some_and(|account| account.reading.is_some());
            let text = match is_seen {
                true => format!("{device} is lost or does not answer"),
                false => format!("needs {device}, and no such GPU is seen"),
            };
            // A device that is sick says nothing of how much it has.
            return Err(Shortage { for_ever: false, text });
        }
        let freed = self.by_account(freed);
        let mut passing = Ok(());
        for (account, (needed, device)) in self.by_account(claim) {
            let reading = self.accounts.get(&account).and_then(|account| account.reading);
            // Where nothing is known of how much there is, nothing is held against it.
            let Some((reading, claimable)) = reading.and_then(|of| Some((of, self.claimable(&of)?))) else {
                continue;
            };
            let available = self.available(account).unwrap_or(0);
            let with = available.saturating_add(freed.get(&account).map_or(0, |(bytes, _)| *bytes));
            if needed > claimable {
                // Nothing in it changes with what others hold: it stands for as long as the pool does.
                let text = format!(
                    "needs {} on {}: {} in all, {} reserved",
                    mib(needed),
                    named(account, device),
                    mib(reading.total_bytes.unwrap_or(0)),
                    mib(self.reserve_bytes),
                );
                return Err(Shortage { for_ever: true, text });
            }
            if needed > with && passing.is_ok() {
                let text = self.describe(account, device, needed, available, &reading);
                passing = Err(Shortage { for_ever: false, text });
            }
        }
        passing
    }

    fn describe(
        &self,
        account: Device,
        device: Device,
        needed: u64,
        available: u64,
        reading: &DeviceReading,
    ) -> String {
        let held: Vec<String> =
            self.held(account).map(|held| format!("{} {}", held.owner, mib(held.bytes))).collect();
        let held = if held.is_empty() { "none".to_owned() } else { held.join(", ") };
        let free = reading.free_bytes.map_or_else(String::new, |free| format!(", {} free", mib(free)));
        format!(
            "needs {} on {}, {} can be had: {} in all{free}, {} reserved, claimed by {held}",
            mib(needed),
            named(account, device),
            mib(available),
            mib(reading.total_bytes.unwrap_or(0)),
            mib(self.reserve_bytes),
        )
    }

    /// For the invariant that no device is promised twice.
    #[cfg(test)]
    pub(super) fn claimed(&self, device: Device) -> u64 {
        self.held(self.account_of(device)).map(|held| held.bytes).sum()
    }
}

/// A device, with whose memory it has.
fn named(account: Device, device: Device) -> String {
    match account == Device::Host && device != Device::Host {
        true => format!("{device}, which has the machine's memory"),
        false => device.to_string(),
    }
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes / (1024 * 1024))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::plan::GpuUuid;

    const MIB: u64 = 1024 * 1024;

    /// A well device of which nothing else is told.
    fn known() -> DeviceReading {
        DeviceReading { total_bytes: None, free_bytes: None, shares: None, healthy: true, faults: 0 }
    }

    fn reading(total: u64, free: Option<u64>) -> BTreeMap<Device, DeviceReading> {
        let reading =
            DeviceReading { total_bytes: Some(total * MIB), free_bytes: free.map(|f| f * MIB), ..known() };
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
        let silent = DeviceReading { healthy: false, ..known() };
        ledger.observe(&BTreeMap::from([(Device::Gpu(0), silent)]));
        assert!(!ledger.fits(&claim(1), &Claim::new()).unwrap_err().for_ever, "it may come back");
        let elsewhere = Claim::from([(Device::Gpu(7), 1)]);
        assert!(ledger.fits(&elsewhere, &Claim::new()).unwrap_err().to_string().contains("no such GPU"));
    }

    // CLOUD-2693
    #[test]
    fn a_device_whose_memory_nobody_tells_takes_engines_and_one_that_shares_is_counted_where_it_shares() {
        let (gpu, host) = (Device::Gpu(0), Device::Host);
        let uuid = Device::Named(GpuUuid::new("GPU-1").unwrap());
        let mut ledger = Ledger::new(0);
        let named = DeviceReading { shares: Some(gpu), ..known() };
        ledger.observe(&BTreeMap::from([(gpu, known()), (uuid, named)]));
        let of = |device: Device, bytes: u64| Claim::from([(device, bytes * MIB)]);
        let fits =
            |ledger: &Ledger, claim: &Claim| ledger.fits(claim, &Claim::new()).map_err(|s| s.to_string());
        assert_eq!(fits(&ledger, &of(gpu, 1_000_000)), Ok(()), "unknown is not zero");
        assert_eq!(ledger.available(gpu), None);
        // One GPU under two names is one.
        ledger.observe(&BTreeMap::from([(gpu, reading(1000, None)[&gpu]), (uuid, named)]));
        ledger.hold(RunId(1), &of(uuid, 600), "a-r0");
        assert!(fits(&ledger, &of(gpu, 400)).is_ok() && fits(&ledger, &of(gpu, 401)).is_err());
        assert_eq!(ledger.claimed(gpu), 600 * MIB);
        ledger.release(Moment::ZERO, RunId(1));
        // A GPU with the machine's memory, beside an engine without one.
        let (shares, own) = (DeviceReading { shares: Some(host), ..known() }, reading(1000, None)[&gpu]);
        ledger.observe(&BTreeMap::from([(gpu, shares), (uuid, shares), (host, own)]));
        ledger.hold(RunId(2), &of(host, 300), "b-r0");
        ledger.hold(RunId(3), &of(gpu, 300), "c-r0");
        assert!(fits(&ledger, &of(uuid, 400)).is_ok());
        let short = fits(&ledger, &of(uuid, 401)).unwrap_err();
        assert!(
            short.starts_with("needs 401 MiB on GPU-1, which has the machine's memory, 400 MiB"),
            "{short}"
        );
        let both = Claim::from([(host, 200 * MIB), (gpu, 201 * MIB)]);
        assert!(fits(&ledger, &both).is_err(), "together");
        let sick = DeviceReading { healthy: false, ..shares };
        ledger.observe(&BTreeMap::from([(gpu, sick), (host, own)]));
        assert_eq!(fits(&ledger, &of(gpu, 1)), Err("GPU0 is lost or does not answer".to_owned()));
    }
}
