//! The supervisor over engines that are a few timers: a machine with one GPU and its driver.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pool_registry_types::pool::{EngineKind, PoolState};
use pool_registry_types::{ModelRef, Moment, PoolId};
use proptest::prelude::*;

use super::core::Supervisor;
use super::event::{Happened, Ordered, Work};
use super::ledger::DeviceReading;
use super::plan::{Claim, Device, PoolPlan, Prepared, ReplicaKey, RunId, Unprepared};

mod driver;
mod exits;
mod reloads;
mod turns;

const MIB: u64 = 1024 * 1024;
const TOTAL: u64 = 1_000 * MIB;
/// Milliseconds from a start to the first good health call.
const LOAD_MS: u64 = 1_000;
/// Milliseconds from an engine's end until the driver shows its memory free.
const RELEASE_MS: u64 = 300;

fn id(name: &str) -> PoolId {
    PoolId::new(name).unwrap()
}

fn plan(name: &str, mib: u64, on_demand: bool) -> PoolPlan {
    PoolPlan {
        engine: EngineKind::LlamaCpp,
        models: vec![ModelRef::new(&format!("model-{name}")).unwrap()],
        device_mask: None,
        ctx_max: None,
        replicas: 1,
        on_demand,
        ttl: None,
        min_resident: Duration::from_secs(20),
        load_timeout: Duration::from_secs(30),
        drain_timeout: Duration::from_secs(10),
        exit_limit: 10,
        fingerprint: mib,
    }
}

#[derive(Debug)]
struct Engine {
    replica_key: ReplicaKey,
    bytes: u64,
    ready_at: u64,
    /// It dies then, before it is ready.
    broken: bool,
    published: bool,
    running: u32,
    served: u64,
}

/// A machine. `claims` is what each plan takes, by its fingerprint.
struct Machine {
    core: Supervisor,
    now: u64,
    engines: BTreeMap<RunId, Engine>,
    /// Memory that the driver does not show free yet, and until when.
    releasing: Vec<(u64, u64)>,
    broken: BTreeSet<u64>,
    starts: BTreeMap<PoolId, u32>,
    stopping: Vec<(u64, RunId)>,
    purged: Vec<PoolId>,
    healthy: bool,
    /// Errors that the driver has told.
    faults: u64,
    /// There is no driver.
    blind: bool,
    /// The GPU has the machine's memory, and pools of an odd size have no GPU.
    shared: bool,
    /// No engine answers its health call.
    silent: bool,
    /// Plans whose files are not there.
    missing: BTreeSet<u64>,
    preparations: u32,
    total: u64,
    /// It wants to hear for which pools tasks wait.
    asked_waiting: bool,
}

impl Machine {
    fn new(plans: &[(&str, PoolPlan)]) -> Self {
        let mut machine = Self {
            core: Supervisor::new(0, 7),
            now: 0,
            engines: BTreeMap::new(),
            releasing: Vec::new(),
            broken: BTreeSet::new(),
            starts: BTreeMap::new(),
            stopping: Vec::new(),
            purged: Vec::new(),
            healthy: true,
            faults: 0,
            blind: false,
            shared: false,
            silent: false,
            missing: BTreeSet::new(),
            preparations: 0,
            total: TOTAL,
            asked_waiting: false,
        };
        machine.look();
        machine.configure(plans);
        machine
    }

    fn configure(&mut self, plans: &[(&str, PoolPlan)]) {
        let plans = plans.iter().map(|(name, plan)| (id(name), plan.clone())).collect();
        self.send(Happened::Configured(plans));
    }

    fn look(&mut self) {
        let now = self.now;
        self.releasing.retain(|(until, _)| *until > now);
        // An engine has its memory once it has loaded.
        let loaded = self.engines.values().filter(|engine| engine.ready_at <= now).map(|engine| engine.bytes);
        let used: u64 = loaded.sum::<u64>() + self.releasing.iter().map(|(_, bytes)| bytes).sum::<u64>();
        assert!(used <= self.total, "the GPU is out of memory");
        let reading = DeviceReading {
            total_bytes: Some(self.total),
            free_bytes: Some(self.total - used),
            shares: None,
            healthy: self.healthy,
            faults: self.faults,
        };
        let device = if self.blind || self.shared { Device::Host } else { Device::Gpu(0) };
        let mut readings = BTreeMap::from([(device, reading)]);
        if self.shared {
            let shares =
                DeviceReading { total_bytes: None, free_bytes: None, shares: Some(device), ..reading };
            readings.insert(Device::Gpu(0), shares);
        }
        self.send(Happened::Devices(readings));
    }

    fn send(&mut self, happened: Happened) {
        let orders = self.core.apply(Moment::from_millis(self.now), happened);
        for order in orders {
            match order {
                Ordered::Prepare { pool_id, plan } => {
                    let has_none = self.blind || (self.shared && plan.fingerprint % 2 == 1);
                    let device = if has_none { Device::Host } else { Device::Gpu(0) };
                    let claim = Claim::from([(device, plan.fingerprint * MIB)]);
                    self.preparations += 1;
                    let outcome = match self.missing.contains(&plan.fingerprint) {
                        true => Err(Unprepared { reason: "there is no such model".into() }),
                        false => Ok(Prepared { claim, ctx_max: Some(512) }),
                    };
                    self.send(Happened::Prepared { pool_id, fingerprint: plan.fingerprint, outcome });
                }
                Ordered::Start { run, replica_key, fingerprint } => {
                    *self.starts.entry(replica_key.pool_id.clone()).or_default() += 1;
                    let twin = self.engines.values().find(|engine| engine.replica_key == replica_key);
                    assert!(twin.is_none(), "{replica_key} runs twice");
                    let engine = Engine {
                        replica_key,
                        bytes: fingerprint * MIB,
                        ready_at: self.now + LOAD_MS,
                        broken: self.broken.contains(&fingerprint),
                        published: false,
                        running: 0,
                        served: 0,
                    };
                    self.engines.insert(run, engine);
                }
                Ordered::Publish { run, .. } => {
                    let engine = self.engines.get_mut(&run).expect("what is published lives");
                    assert!(engine.ready_at <= self.now, "published before it is ready");
                    engine.published = true;
                }
                Ordered::Withdraw { run, .. } => {
                    if let Some(engine) = self.engines.get_mut(&run) {
                        engine.published = false;
                    }
                }
                Ordered::Stop { run } => self.stopping.push((self.now + 100, run)),
                Ordered::Purged { pool_id } => self.purged.push(pool_id),
                Ordered::AskWaiting => self.asked_waiting = true,
                Ordered::LookAtDevices => {}
            }
        }
        let claimed = self.core.ledger.claimed(Device::Gpu(0));
        assert!(claimed <= self.total, "{claimed} bytes are promised");
    }

    fn end(&mut self, run: RunId, how: &str) {
        self.end_by(run, how, false);
    }

    fn end_by(&mut self, run: RunId, how: &str, has_culprit: bool) {
        let Some(engine) = self.engines.remove(&run) else { return };
        if engine.ready_at <= self.now {
            self.releasing.push((self.now + RELEASE_MS, engine.bytes));
        }
        let tail = vec!["its last line".into()];
        self.send(Happened::Exited { run, how: how.into(), tail, has_culprit });
    }

    fn pass(&mut self, millis: u64) {
        let end = self.now + millis;
        while self.now < end {
            self.now += 50;
            let now = self.now;
            let over: Vec<RunId> =
                self.stopping.iter().filter(|(at, _)| *at <= now).map(|(_, run)| *run).collect();
            self.stopping.retain(|(at, _)| *at > now);
            for run in over {
                self.end(run, "stopped");
            }
            let due: Vec<(RunId, bool)> = self
                .engines
                .iter()
                .filter(|(_, engine)| engine.ready_at == now)
                .map(|(run, engine)| (*run, engine.broken))
                .collect();
            for (run, broken) in due {
                if broken { self.end(run, "exit status 1") } else { self.send(Happened::Ready { run }) }
            }
            self.look();
            self.report_use();
        }
    }

    fn report_use(&mut self) {
        let work = self.engines.values().filter(|engine| engine.published || engine.running > 0);
        let silent = self.silent;
        let of = |e: &Engine| (e.replica_key.clone(), Work { running: e.running, served: e.served, silent });
        let work = work.map(of).collect();
        self.send(Happened::Used(work));
    }

    fn serving(&self, pool: &str) -> Option<RunId> {
        let of = |(_, engine): &(&RunId, &Engine)| engine.published && engine.replica_key.pool_id == id(pool);
        self.engines.iter().find(of).map(|(run, _)| *run)
    }

    fn is_up(&self, pool: &str) -> bool {
        self.serving(pool).is_some()
    }

    /// Runs a task of some length, with the pool loaded for it as the control plane would.
    fn run_task(&mut self, pool: &str, millis: u64) {
        for _ in 0..2_000 {
            if let Some(run) = self.serving(pool) {
                let engine = self.engines.get_mut(&run).expect("it serves");
                (engine.running, engine.served) = (engine.running + 1, engine.served + 1);
                self.report_use();
                self.pass(millis);
                if let Some(engine) = self.engines.get_mut(&run) {
                    engine.running -= 1;
                }
                return self.report_use();
            }
            self.send(Happened::Load { pool_id: id(pool) });
            self.pass(50);
        }
        panic!("{pool} was never loaded: {:?}", self.core.stages(&id(pool)));
    }

    fn state(&self, pool: &str) -> (PoolState, Option<String>) {
        let declared = self.core.declared(&BTreeMap::new());
        let declared = &declared[&id(pool)];
        (declared.state, declared.last_error.clone())
    }

    fn starts(&self, pool: &str) -> u32 {
        self.starts.get(&id(pool)).copied().unwrap_or(0)
    }

    /// Kills its engine as soon as there is one, until the pool is given up.
    fn wear_out(&mut self, pool: &str) {
        while self.state(pool).0 != PoolState::Failed {
            match self.serving(pool) {
                Some(run) => self.end(run, "killed by signal 9"),
                None => self.pass(50),
            }
        }
    }

    /// The milliseconds until its engine serves again.
    fn back_after(&mut self, pool: &str) -> u64 {
        let begin = self.now;
        while !self.is_up(pool) {
            self.pass(50);
            assert!(self.now < begin + 3_600_000, "it does not come back");
        }
        self.now - begin
    }

    fn kill(&mut self, pool: &str) {
        let run = self.serving(pool).expect("it serves");
        self.end(run, "killed by signal 9");
    }
}

// CLOUD-2420
#[test]
fn a_pool_is_loaded_when_a_task_waits_and_unloaded_when_nothing_does() {
    let ttl = PoolPlan { ttl: Some(Duration::from_secs(3)), ..plan("a", 400, true) };
    let mut machine = Machine::new(&[("a", ttl)]);
    machine.pass(5_000);
    assert_eq!((machine.state("a").0, machine.starts("a")), (PoolState::Loadable, 0));
    machine.run_task("a", 500);
    machine.pass(2_500);
    assert!(machine.is_up("a"));
    machine.pass(1_000);
    assert!(!machine.is_up("a"), "idle for longer than its time to live");
    assert_eq!(machine.state("a").0, PoolState::Loadable);
}

// CLOUD-2693
#[test]
fn an_engine_on_a_gpu_with_the_machines_memory_makes_room_for_one_without_a_gpu() {
    let mut machine = Machine::new(&[]);
    machine.shared = true;
    machine.look();
    machine.configure(&[("a", plan("a", 700, true)), ("b", plan("b", 601, true))]);
    machine.run_task("a", 500);
    assert!(machine.is_up("a"));
    machine.run_task("b", 500);
    assert!(machine.is_up("b") && !machine.is_up("a"), "both have the same memory");
    machine.run_task("a", 500);
    assert!(machine.is_up("a") && !machine.is_up("b"));
}

// CLOUD-2692
#[test]
fn a_pool_that_no_device_has_room_for_says_so_before_a_task_waits_for_it() {
    let mut machine = Machine::new(&[("a", plan("a", 1_200, true)), ("b", plan("b", 900, true))]);
    machine.pass(1_000);
    let (state, error) = machine.state("a");
    assert_eq!(state, PoolState::Loadable);
    let error = error.unwrap();
    assert!(error.starts_with("cannot be loaded: needs 1200 MiB on GPU0"), "{error}");
    assert_eq!(machine.state("b"), (PoolState::Loadable, None));
}

// CLOUD-2422
#[test]
fn a_demand_that_nobody_repeats_is_forgotten() {
    let mut machine = Machine::new(&[("a", plan("a", 900, false)), ("b", plan("b", 900, true))]);
    machine.pass(2_000);
    machine.send(Happened::Load { pool_id: id("b") });
    machine.pass(1_000);
    let (state, error) = machine.state("b");
    assert_eq!(state, PoolState::Loadable, "it is still to be asked for");
    assert!(error.unwrap().contains("needs 900 MiB on GPU0, 100 MiB can be had"));
    machine.pass(15_000);
    assert_eq!((machine.state("b").0, machine.starts("b")), (PoolState::Loadable, 0));
    assert!(machine.is_up("a"), "what always runs makes no room");
}

fn three() -> Machine {
    let pools = [("a", plan("a", 400, true)), ("b", plan("b", 400, true)), ("c", plan("c", 400, true))];
    Machine::new(&pools)
}

// CLOUD-2423
#[test]
fn two_that_fit_are_loaded_once_however_their_tasks_alternate() {
    let mut machine = three();
    for _ in 0..50 {
        machine.run_task("a", 100);
        machine.run_task("b", 100);
    }
    assert_eq!((machine.starts("a"), machine.starts("b")), (1, 1));
    machine.run_task("c", 100);
    assert!(machine.is_up("b") && machine.is_up("c") && !machine.is_up("a"), "the least recently used goes");
}

// CLOUD-2424
#[test]
fn a_pool_that_is_never_idle_makes_room_after_its_time_and_not_before() {
    let mut machine = three();
    machine.run_task("a", 50);
    machine.run_task("b", 50);
    // Both work without a pause.
    let busy: Vec<RunId> = [machine.serving("a"), machine.serving("b")].into_iter().flatten().collect();
    for run in &busy {
        machine.engines.get_mut(run).unwrap().running = 1;
    }
    machine.report_use();
    let asked = machine.now;
    while machine.starts("c") == 0 {
        // As the control plane asks: each 5 s, as long as the pool is loadable.
        if machine.now.is_multiple_of(5_000) && machine.state("c").0 == PoolState::Loadable {
            machine.send(Happened::Load { pool_id: id("c") });
        }
        machine.pass(50);
        // What runs on a withdrawn engine ends after a second.
        for run in &busy {
            if let Some(engine) = machine.engines.get_mut(run).filter(|engine| !engine.published) {
                engine.running = 0;
            }
        }
        assert!(machine.now < asked + 60_000, "it starves");
    }
    assert!(machine.now >= asked + 19_000, "after {} ms already", machine.now - asked);
    assert_eq!([machine.is_up("a"), machine.is_up("b")].iter().filter(|up| **up).count(), 1);
}

// CLOUD-2425
#[test]
fn a_pool_that_was_loaded_for_a_task_is_not_unloaded_before_that_task_came() {
    let mut machine = three();
    machine.run_task("a", 50);
    machine.run_task("b", 50);
    for pool in ["c", "a", "b"] {
        machine.send(Happened::Load { pool_id: id(pool) });
        machine.pass(50);
    }
    machine.pass(1_800);
    assert!(machine.is_up("c"));
    machine.pass(2_000);
    assert!(machine.is_up("c"), "its task is on its way");
}

// CLOUD-2436
#[test]
fn other_limits_of_memory_give_another_chance_to_who_did_not_fit() {
    let mut machine = Machine::new(&[("a", plan("a", 1_200, false))]);
    machine.pass(1_500);
    assert_eq!(machine.core.declared(&BTreeMap::new())[&id("a")].state, PoolState::Failed);
    machine.total = 2 * TOTAL;
    machine.look();
    machine.pass(1_500);
    assert!(!machine.is_up("a"), "it was given up");
    machine.core.reconsider_memory();
    machine.pass(1_500);
    assert!(machine.is_up("a"));
}

// CLOUD-2433
#[test]
fn a_changed_file_touches_only_what_it_changes() {
    let (a, b) = (plan("a", 200, false), plan("b", 300, false));
    let mut machine = Machine::new(&[("a", a.clone()), ("b", b.clone())]);
    machine.pass(1_500);
    let (first, second) = (machine.serving("a"), machine.serving("b"));
    machine.configure(&[
        ("a", a),
        ("b", PoolPlan { ctx_max: Some(9), fingerprint: 301, ..b }),
        ("c", plan("c", 100, false)),
    ]);
    machine.pass(3_000);
    assert_eq!(machine.serving("a"), first);
    assert!(machine.is_up("b") && machine.serving("b") != second && machine.is_up("c"));
    machine.configure(&[("c", plan("c", 100, false))]);
    machine.pass(500);
    assert_eq!(machine.engines.len(), 1, "what is not in the file any more ends");
}

// CLOUD-2434
#[test]
fn a_purge_ends_the_engines_and_a_reload_brings_them_back() {
    let mut machine = Machine::new(&[("a", plan("a", 400, false))]);
    machine.pass(1_500);
    machine.send(Happened::Purge { pool_id: id("a") });
    machine.pass(1_000);
    assert_eq!((machine.purged.as_slice(), machine.engines.len()), ([id("a")].as_slice(), 0));
    assert_eq!(machine.state("a").0, PoolState::Failed);
    machine.send(Happened::Reload { pool_id: id("a"), plan: Box::new(plan("a", 400, false)) });
    machine.pass(1_500);
    assert!(machine.is_up("a"));
}

// CLOUD-2423
#[test]
fn a_pool_short_of_its_second_replica_keeps_nobody_from_memory_that_is_there() {
    let pair = PoolPlan { replicas: 2, ..plan("b", 400, false) };
    let mut machine = Machine::new(&[("a", plan("a", 300, false)), ("b", pair), ("c", plan("c", 200, true))]);
    machine.pass(2_000);
    assert_eq!(machine.core.stages(&id("b")), ["ready", "waiting"], "300 are left, it needs 400");
    machine.run_task("c", 100);
}

// CLOUD-2424
#[test]
fn a_pool_of_which_only_a_part_is_loaded_makes_room_as_well() {
    let pair = PoolPlan { replicas: 2, ..plan("b", 600, true) };
    let mut machine = Machine::new(&[("b", pair), ("c", plan("c", 500, true))]);
    machine.run_task("b", 100);
    let busy = machine.serving("b").unwrap();
    machine.engines.get_mut(&busy).unwrap().running = 1;
    machine.report_use();
    let asked = machine.now;
    while machine.starts("c") == 0 {
        if machine.now.is_multiple_of(5_000) {
            machine.send(Happened::Load { pool_id: id("c") });
        }
        machine.pass(50);
        if let Some(engine) = machine.engines.get_mut(&busy).filter(|engine| !engine.published) {
            engine.running = 0;
        }
        assert!(machine.now < asked + 60_000, "it starves");
    }
}

const DRIVER_ERROR: &str = "CUDA error: an illegal memory access was encountered";

#[derive(Debug, Clone)]
enum Act {
    Load(usize),
    Pass(u64),
    Kill(usize),
    Busy(usize, u32),
    Reload(usize, u64),
    Break(u64),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let one = prop_oneof![
        (0..4_usize).prop_map(Act::Load),
        (1..60_u64).prop_map(|n| Act::Pass(n * 50)),
        (0..4_usize).prop_map(Act::Kill),
        (0..4_usize, 0..2_u32).prop_map(|(n, running)| Act::Busy(n, running)),
        (0..4_usize, 1..10_u64).prop_map(|(n, claim)| Act::Reload(n, claim * 100)),
        (1..10_u64).prop_map(|claim| Act::Break(claim * 100)),
    ];
    proptest::collection::vec(one, 1..60)
}

proptest! {
    // The machine itself asserts that no memory is promised or used twice, that nothing is
    // published before it is ready, and that no replica runs twice. CLOUD-2450
    #[test]
    fn whatever_happens_memory_is_given_once_and_everything_ends_at_a_shutdown(acts in acts()) {
        let names = ["a", "b", "c", "d"];
        let pools = [
            ("a", plan("a", 300, false)), ("b", plan("b", 400, true)),
            ("c", plan("c", 500, true)), ("d", plan("d", 600, true)),
        ];
        let mut machine = Machine::new(&pools);
        for act in acts {
            match act {
                Act::Load(n) => machine.send(Happened::Load { pool_id: id(names[n]) }),
                Act::Pass(millis) => machine.pass(millis),
                Act::Kill(n) => {
                    if let Some(run) = machine.serving(names[n]) { machine.end(run, "killed"); }
                }
                Act::Busy(n, running) => {
                    let pool = id(names[n]);
                    for engine in machine.engines.values_mut().filter(|e| e.replica_key.pool_id == pool) {
                        if engine.published || running == 0 {
                            engine.running = running;
                            engine.served += u64::from(running);
                        }
                    }
                    machine.report_use();
                }
                Act::Reload(n, claim) => {
                    let plan = Box::new(plan(names[n], claim, n > 0));
                    machine.send(Happened::Reload { pool_id: id(names[n]), plan });
                }
                Act::Break(claim) => drop(machine.broken.insert(claim)),
            }
        }
        // Left alone, whoever is asked for gets there: nothing is wedged.
        machine.broken.clear();
        for engine in machine.engines.values_mut() { engine.running = 0; }
        machine.pass(70_000);
        for name in names {
            machine.send(Happened::Revive { pool_id: id(name) });
        }
        machine.pass(2_000);
        for name in ["b", "c", "d"] {
            let declared = machine.core.declared(&BTreeMap::new());
            if declared[&id(name)].supervised.fits {
                machine.run_task(name, 100);
            }
        }
        machine.send(Happened::Shutdown);
        machine.pass(12_000);
        prop_assert!(machine.engines.is_empty(), "{:?}", machine.engines);
        prop_assert_eq!(machine.core.ledger.claimed(Device::Gpu(0)), 0);
    }
}
