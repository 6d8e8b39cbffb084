//! What one event costs the control core, by the number of nodes.
//!
//! The production [`ControlCore`] is driven directly, under moments of our own, so that what is
//! measured is the decision and nothing beside it. A fleet has 8 pools a node, some ten attempts
//! running on each, and one pool a node whose model has no free slot. Events are made before the
//! clock runs; what they answer is looked at afterwards. Nothing is judged: the table is the result.

use std::collections::{BTreeMap, BTreeSet};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pool_registry_types::node::{Capabilities, Heartbeat, Intent, LiveAnswer, RegisterRequest};
use pool_registry_types::placement::Labels;
use pool_registry_types::pool::{EngineKind, PoolReport, PoolState, ReplicaReport};
use pool_registry_types::task::TaskRequest;
use pool_registry_types::trace::TraceContext;
use pool_registry_types::{
    AttemptId, BootId, Epoch, MachineId, ModelRef, Moment, NodeId, PoolId, ReplicaId, TaskId,
};
use task_scheduler::{
    Answer, ControlCore, Dispatch, Effect, Event, FullLane, HowEnded, Policy, ProbeOutcome, ReplyTo,
    SessionPolicy, Strategy, Timing,
};
use task_stream::{BodyDigest, TaskSpec};
use uuid::Uuid;

use crate::{cpu, median};

const POOLS: usize = 8;
/// Slots of each pool but the last, whose one slot is taken.
const SLOTS: u32 = 4;
/// Models of the pools that have free slots.
const MODELS: usize = 14;
const ATTEMPTS_A_NODE: usize = 10;
/// Events of one kind between two looks at the clock, and how often.
const BATCH: usize = 100;
const BATCHES: usize = 5;

/// The kinds of events, in the order in which they are printed.
const KINDS: [&str; 15] = [
    "alive",
    "accepted",
    "started",
    "quiet",
    "probed",
    "heard",
    "ended",
    "submit + dispatch",
    "submit, waits",
    "ended, next starts",
    "cancel, waiting",
    "cancel, running",
    "heartbeat",
    "timer",
    "view of a changed node",
];

/// Microseconds an event by its kind, and milliseconds of both storms.
type Figures = (BTreeMap<&'static str, Vec<f64>>, [f64; 2]);

pub(crate) fn measure(nodes: &[usize]) {
    let before = cpu::time_of(std::process::id());
    // First, because memory that others gave back is not seen to be taken.
    println!("{:.1} KB more resident a retained task", retained_kb());
    let mut columns: Vec<Figures> = Vec::new();
    for count in nodes {
        columns.push(figures(*count));
    }
    println!("µs an event of the control core, medians of {BATCHES} batches of {BATCH}:");
    print!("{:>24}", "nodes");
    nodes.iter().for_each(|count| print!("{count:>12}"));
    println!();
    for kind in KINDS {
        print!("{kind:>24}");
        for (figures, _) in &columns {
            print!("{:>12.2}", figures.get(kind).map_or(f64::NAN, |values| median(values.clone())));
        }
        println!();
    }
    for (n, storm) in ["storm of new nodes, ms", "storm of restarts, ms"].iter().enumerate() {
        print!("{storm:>24}");
        columns.iter().for_each(|(_, storms)| print!("{:>12.1}", storms[n]));
        println!();
    }
    let spent = cpu::time_of(std::process::id()) - before;
    let resident = cpu::resident_mb(std::process::id());
    println!(
        "a storm: each node registers, is dialled and reports {ATTEMPTS_A_NODE} attempts; of restarts: these were known here"
    );
    println!(
        "processor time of the whole measurement: {:.1} s; resident at the end: {resident:.0} MB",
        spent.as_secs_f64()
    );
}

fn figures(nodes: usize) -> Figures {
    let mut figures = BTreeMap::new();
    let new_nodes = {
        let before = cpu::resident_mb(std::process::id());
        let mut fleet = Fleet::new(nodes);
        let unknown = |node: usize, k: usize| AttemptId(Uuid::from_u128((node * 100 + k + 1) as u128));
        let reported = (0..nodes).map(|n| (0..ATTEMPTS_A_NODE).map(|k| unknown(n, k)).collect()).collect();
        let took = fleet.storm(1, reported);
        // With what readers are shown. Right for the largest fleet of a process only: others take
        // what those before gave back.
        black_box(fleet.core.snapshot(Moment::from_millis(fleet.now)));
        let grown = cpu::resident_mb(std::process::id()) - before;
        println!(
            "{nodes} nodes of {POOLS} pools: {:.1} KB more resident a node",
            grown * 1024.0 / nodes as f64
        );
        took.as_secs_f64() * 1e3
    };
    let mut fleet = Fleet::new(nodes);
    fleet.storm(1, vec![BTreeSet::new(); nodes]);
    fleet.fill();
    for _ in 0..BATCHES {
        fleet.batch(&mut figures);
    }
    let reported = (0..nodes).map(|n| fleet.attempts_of(n)).collect();
    let restarts = fleet.storm(2, reported).as_secs_f64() * 1e3;
    (figures, [new_nodes, restarts])
}

/// What one ended task takes that is kept for readers: in the core alone, without its stream.
fn retained_kb() -> f64 {
    const TASKS: usize = 50_000;
    let mut fleet = Fleet::new(1);
    fleet.storm(1, vec![BTreeSet::new()]);
    let before = cpu::resident_mb(std::process::id());
    let mut records = Vec::new();
    for _ in 0..TASKS {
        let submit = fleet.submission("model-0");
        let effects = fleet.apply(submit);
        let task = fleet.dispatches(effects).pop().expect("a free slot");
        for event in [fleet.accepted(&task), Event::Started { attempt: task.attempt }] {
            fleet.apply(event);
        }
        let ended = fleet.ended(&task, HowEnded::Finished);
        fleet.apply(ended);
        // As the daemon keeps it beside the loop.
        records.extend(fleet.core.record(task.task));
    }
    (cpu::resident_mb(std::process::id()) - before) * 1024.0 / TASKS as f64
}

fn name<T>(text: &str, new: fn(&str) -> Result<T, pool_registry_types::ids::InvalidId>) -> T {
    new(text).expect("a valid name")
}

/// The nodes of the fleet, and the core that knows them.
struct Fleet {
    core: ControlCore,
    now: u64,
    given: u64,
    random: fastrand::Rng,
    ids: Vec<NodeId>,
    epochs: Vec<Option<Epoch>>,
    seq: u64,
    boot: u128,
    /// What runs, by node and pool.
    running: Vec<BTreeMap<PoolId, BTreeSet<AttemptId>>>,
    number_of: BTreeMap<NodeId, usize>,
}

impl Fleet {
    fn new(nodes: usize) -> Self {
        // Long enough that nothing falls silent while the clock stands still between the events.
        let timing =
            Timing { heartbeat_interval: Duration::from_secs(600), node_timeout: Duration::from_secs(1800) };
        let policy = Policy {
            timing,
            max_nodes: nodes,
            strategy: Strategy::LeastLoaded,
            admission_capacity: 1_000_000,
            full_lane: FullLane::Reject,
            sessions: SessionPolicy {
                ttl: Duration::from_secs(600),
                max_turns: 8,
                token_budget: None,
                time_budget: None,
            },
            queue_timeout: Duration::from_secs(3600),
            first_token_timeout: Duration::from_secs(600),
            token_idle_timeout: Duration::from_secs(600),
            task_retention: Duration::from_secs(600),
            retained_tasks: 1_000_000,
            switched_off: None,
        };
        let ids: Vec<NodeId> = (0..nodes).map(|n| name(&format!("node-{n}"), NodeId::new)).collect();
        Self {
            core: ControlCore::new(policy, 7),
            now: 1_000,
            given: 0,
            random: fastrand::Rng::with_seed(7),
            epochs: vec![None; nodes],
            seq: 0,
            boot: 1,
            running: vec![BTreeMap::new(); nodes],
            number_of: ids.iter().cloned().zip(0..).collect(),
            ids,
        }
    }

    fn apply(&mut self, event: Event) -> Vec<Effect> {
        let effects = self.core.apply(Moment::from_millis(self.now), event);
        // As the daemon does after each event.
        black_box(self.core.take_changed());
        effects
    }

    fn reply(&mut self) -> ReplyTo {
        self.given += 1;
        ReplyTo(self.given)
    }

    fn any_node(&mut self) -> usize {
        self.random.usize(..self.ids.len())
    }

    fn address(&self, node: usize) -> String {
        format!("http://{}:9200", self.ids[node])
    }

    fn boot_id(&self, node: usize) -> BootId {
        BootId(Uuid::from_u128((self.boot << 64) | node as u128))
    }

    /// Pools 0 to 6 share the models among neighbouring nodes; the last is of the scarce model.
    fn model(node: usize, pool: usize) -> ModelRef {
        let text = if pool + 1 == POOLS {
            "scarce".to_owned()
        } else {
            format!("model-{}", (node * (POOLS - 1) + pool) % MODELS)
        };
        name(&text, ModelRef::new)
    }

    fn report(node: usize, pool: usize, attempts: Vec<AttemptId>) -> PoolReport {
        let slots_total = if pool + 1 == POOLS { 1 } else { SLOTS };
        PoolReport {
            pool_id: name(&format!("pool-{pool}"), PoolId::new),
            state: PoolState::Ready,
            ready: true,
            draining: false,
            engine: Some(EngineKind::LlamaCpp),
            engine_version: Some("b4000".into()),
            models: vec![Self::model(node, pool)],
            device_mask: Some(format!("GPU{pool}")),
            ctx_max: Some(8192),
            vram_free_bytes: Some(1 << 30),
            replicas: vec![ReplicaReport {
                replica_id: name("r0", ReplicaId::new),
                ready: true,
                slots_total,
                slots_free: 0,
                slots_foreign: 0,
                attempts,
                held: vec![],
            }],
            last_error: None,
            warning: None,
            drain: None,
            supervised: None,
        }
    }

    /// The node's next report: what runs on it.
    fn beat(&mut self, node: usize) -> Event {
        self.seq += 1;
        let pools = (0..POOLS).map(|pool| {
            let id = name(&format!("pool-{pool}"), PoolId::new);
            let attempts = self.running[node].get(&id).into_iter().flatten().copied().collect();
            Self::report(node, pool, attempts)
        });
        let beat = Heartbeat {
            epoch: self.epochs[node].clone().expect("a registered node"),
            seq: self.seq,
            timestamp: "2026-01-01T00:00:00Z".into(),
            intent: Intent::Serving,
            intent_order: 0,
            tokens_changed: 0,
            pools: pools.collect(),
            gpus: Vec::new(),
            models: Vec::new(),
            problems: Vec::new(),
        };
        let reply = self.reply();
        Event::Heartbeat { reply, node_id: self.ids[node].clone(), beat }
    }

    fn attempts_of(&self, node: usize) -> BTreeSet<AttemptId> {
        self.running[node].values().flatten().copied().collect()
    }

    fn register(&mut self, node: usize) -> Event {
        let request = RegisterRequest {
            node_id: self.ids[node].clone(),
            machine_id: name("machine", MachineId::new),
            boot_id: self.boot_id(node),
            address: self.address(node),
            version: "0".into(),
            intent: Intent::Serving,
            labels: Labels::new(),
            pools: Vec::new(),
            capabilities: Capabilities::default(),
            features: Vec::new(),
        };
        Event::Register { reply: self.reply(), request, registrar: None }
    }

    fn probed(&self, node: usize) -> Event {
        let live = LiveAnswer { node_id: self.ids[node].clone(), boot_id: self.boot_id(node) };
        let outcome = ProbeOutcome::Answered { live, authorized: None };
        Event::Probed { node_id: self.ids[node].clone(), address: self.address(node), outcome }
    }

    /// The outcomes of the probes that were asked for.
    fn probes(&self, effects: &[Effect]) -> Vec<Event> {
        let asked = effects.iter().filter_map(|effect| match effect {
            Effect::Probe { node_id, .. } => Some(self.probed(self.number_of[node_id])),
            _ => None,
        });
        asked.collect()
    }

    /// All nodes register in this boot, are dialled, and report these attempts. Returns how long
    /// the core took for it.
    fn storm(&mut self, boot: u128, reported: Vec<BTreeSet<AttemptId>>) -> Duration {
        self.boot = boot;
        let mut took = Duration::ZERO;
        for (node, attempts) in reported.into_iter().enumerate() {
            let register = self.register(node);
            let (answers, first) = self.timed(vec![register]);
            let epoch = answers.iter().find_map(|effect| match effect {
                Effect::Reply { answer: Ok(Answer::Registered(answer)), .. } => Some(answer.epoch.clone()),
                _ => None,
            });
            self.epochs[node] = Some(epoch.expect("a registration is taken"));
            self.running[node] = BTreeMap::from([(name("pool-0", PoolId::new), attempts)]);
            let events = vec![self.probed(node), self.beat(node)];
            let (_, second) = self.timed(events);
            took += first + second;
        }
        took
    }

    /// Applies events, and says how long that took.
    fn timed(&mut self, events: Vec<Event>) -> (Vec<Effect>, Duration) {
        self.now += 1;
        let mut all = Vec::with_capacity(events.len());
        let start = Instant::now();
        for event in events {
            all.push(self.apply(event));
        }
        let took = start.elapsed();
        (all.into_iter().flatten().collect(), took)
    }

    fn submission(&mut self, model: &str) -> Event {
        self.given += 1;
        let task_id = TaskId(Uuid::from_u128(u128::from(self.given)));
        let request = TaskRequest::completion(name(model, ModelRef::new), "x");
        let trace = TraceContext { correlation_id: task_id.to_string(), ..Default::default() };
        let spec = TaskSpec::of(&request, task_id, BodyDigest::new([0; 32]), None, trace);
        Event::Submit { reply: ReplyTo(self.given), spec: Arc::new(spec) }
    }

    fn dispatches(&mut self, effects: Vec<Effect>) -> Vec<Dispatch> {
        let mut found = Vec::new();
        for effect in effects {
            let Effect::Dispatch(dispatch) = effect else { continue };
            let node = self.number_of[&dispatch.pool.node_id];
            let of_pool = self.running[node].entry(dispatch.pool.pool_id.clone()).or_default();
            of_pool.insert(dispatch.attempt);
            found.push(*dispatch);
        }
        found
    }

    fn accepted(&self, dispatch: &Dispatch) -> Event {
        let replica_id = name("r0", ReplicaId::new);
        Event::Accepted { attempt: dispatch.attempt, replica_id, report_seq: self.seq }
    }

    fn ended(&mut self, dispatch: &Dispatch, how: HowEnded) -> Event {
        let node = self.number_of[&dispatch.pool.node_id];
        if let Some(of_pool) = self.running[node].get_mut(&dispatch.pool.pool_id) {
            of_pool.remove(&dispatch.attempt);
        }
        let (attempt, final_report) = (dispatch.attempt, Some(self.seq));
        Event::Ended { attempt, tokens_written: 2, unlogged: 0, how, final_report }
    }

    /// Tasks run on all nodes, and the scarce model has no free slot.
    fn fill(&mut self) {
        for n in 0..self.ids.len() * ATTEMPTS_A_NODE {
            let scarce = n % ATTEMPTS_A_NODE == 0;
            let submit =
                self.submission(&if scarce { "scarce".into() } else { format!("model-{}", n % MODELS) });
            let effects = self.apply(submit);
            for dispatch in self.dispatches(effects) {
                let attempt = dispatch.attempt;
                for event in [self.accepted(&dispatch), Event::Started { attempt }] {
                    self.apply(event);
                }
            }
        }
    }

    fn batch(&mut self, figures: &mut BTreeMap<&'static str, Vec<f64>>) {
        let mut note = |kind, took: Duration, events: usize| {
            figures.entry(kind).or_default().push(took.as_secs_f64() * 1e6 / events as f64);
        };
        let nodes: Vec<usize> = (0..BATCH).map(|_| self.any_node()).collect();

        let alive = nodes.iter().map(|node| Event::Alive { node_id: self.ids[*node].clone() }).collect();
        note("alive", self.timed(alive).1, BATCH);
        note("timer", self.timed((0..BATCH).map(|_| Event::Timer).collect()).1, BATCH);

        // The life of a task.
        let submit = (0..BATCH).map(|n| self.submission(&format!("model-{}", n % MODELS))).collect();
        let (effects, took) = self.timed(submit);
        note("submit + dispatch", took, BATCH);
        let running = self.dispatches(effects);
        assert_eq!(running.len(), BATCH, "there is room for them");
        let accepted = running.iter().map(|dispatch| self.accepted(dispatch)).collect();
        note("accepted", self.timed(accepted).1, BATCH);
        let started = running.iter().map(|dispatch| Event::Started { attempt: dispatch.attempt }).collect();
        note("started", self.timed(started).1, BATCH);
        let quiet = running.iter().map(|dispatch| Event::Quiet { attempt: dispatch.attempt }).collect();
        let (effects, took) = self.timed(quiet);
        note("quiet", took, BATCH);
        let probes = self.probes(&effects);
        let dialled = probes.len();
        let (mut effects, took) = self.timed(probes);
        note("probed", took, dialled);
        // Who fell quiet while its node was dialled wants that once more.
        loop {
            let again: Vec<Event> = self.probes(&effects);
            if again.is_empty() {
                break;
            }
            effects = self.timed(again).0;
        }
        let heard = running.iter().map(|dispatch| Event::Heard { attempt: dispatch.attempt }).collect();
        note("heard", self.timed(heard).1, BATCH);
        let beats = nodes.iter().map(|node| self.beat(*node)).collect();
        note("heartbeat", self.timed(beats).1, BATCH);
        let (to_cancel, to_end) = running.split_at(BATCH / 2);
        let ended = to_end.iter().map(|dispatch| self.ended(dispatch, HowEnded::Finished)).collect();
        note("ended", self.timed(ended).1, to_end.len());
        let cancels: Vec<Event> = to_cancel
            .iter()
            .map(|dispatch| Event::Cancel { reply: self.reply(), task_id: dispatch.task })
            .collect();
        note("cancel, running", self.timed(cancels).1, to_cancel.len());
        let closed = to_cancel.iter().map(|dispatch| self.ended(dispatch, HowEnded::Closed)).collect();
        self.timed(closed);

        self.batch_of_waiting(&mut note);

        black_box(self.core.snapshot(Moment::from_millis(self.now)));
        let mut took = Duration::ZERO;
        for node in nodes.iter().take(10) {
            let beat = self.beat(*node);
            self.apply(beat);
            let start = Instant::now();
            black_box(self.core.snapshot(Moment::from_millis(self.now)));
            took += start.elapsed();
        }
        note("view of a changed node", took, 10);
    }

    /// Tasks of the model that has no free slot.
    fn batch_of_waiting(&mut self, note: &mut impl FnMut(&'static str, Duration, usize)) {
        // One slot a node has what they want.
        let most_ends = BATCH.min(self.ids.len());
        let submit: Vec<Event> = (0..BATCH + most_ends).map(|_| self.submission("scarce")).collect();
        let ids = |event: &Event| match event {
            Event::Submit { spec, .. } => Some(spec.task_id),
            _ => None,
        };
        let waiting: Vec<TaskId> = submit.iter().filter_map(ids).collect();
        let (effects, took) = self.timed(submit);
        note("submit, waits", took, BATCH + most_ends);
        assert!(self.dispatches(effects).is_empty(), "no slot is free");
        let cancels: Vec<Event> = waiting[most_ends..]
            .iter()
            .map(|task_id| Event::Cancel { reply: self.reply(), task_id: *task_id })
            .collect();
        let canceled = cancels.len();
        note("cancel, waiting", self.timed(cancels).1, canceled);
        // As many end as still wait: each makes room for one.
        let pool_id = name(&format!("pool-{}", POOLS - 1), PoolId::new);
        let holders = self.running.iter_mut().filter_map(|pools| pools.get_mut(&pool_id)?.pop_first());
        let holders: Vec<AttemptId> = holders.take(most_ends).collect();
        let ended = holders.iter().map(|attempt| Event::Ended {
            attempt: *attempt,
            tokens_written: 2,
            unlogged: 0,
            how: HowEnded::Finished,
            final_report: Some(self.seq),
        });
        let ended: Vec<Event> = ended.collect();
        let made_room = ended.len();
        let (effects, took) = self.timed(ended);
        note("ended, next starts", took, made_room);
        let next = self.dispatches(effects);
        assert_eq!(next.len(), made_room, "each slot is taken at once");
        let accepted = next.iter().map(|dispatch| self.accepted(dispatch)).collect();
        self.timed(accepted);
    }
}
