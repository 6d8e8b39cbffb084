//! A schedule drawn from a seed: the cluster, the clients, the faults.

use std::time::Duration;

use node_core::attempts::{HELD_BYTES, MAX_ATTEMPT_BYTES};
use pool_registry_types::ErrorCode;
use pool_registry_types::placement::PlacementConstraints;
use task_scheduler::{FullLane, Rule, Strategy, Timing};
use task_stream::MAX_LOG_BYTES;

mod links;

/// One rule of those that carry the load, which is switched off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    Core(Rule),
    Link(attempt_link::Rule),
}

impl Mutant {
    pub fn all() -> impl Iterator<Item = Self> {
        Rule::ALL.into_iter().map(Self::Core).chain(attempt_link::Rule::ALL.into_iter().map(Self::Link))
    }

    pub(crate) fn core(this: Option<Self>) -> Option<Rule> {
        match this? {
            Self::Core(rule) => Some(rule),
            Self::Link(_) => None,
        }
    }

    pub(crate) fn link(this: Option<Self>) -> Option<attempt_link::Rule> {
        match this? {
            Self::Link(rule) => Some(rule),
            Self::Core(_) => None,
        }
    }
}

pub use links::{HeardBy, LinkDraws, LinkFault};

/// One thing that happens at a set time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Submit {
        task: usize,
    },
    SubmitAgain {
        task: usize,
    },
    Cancel {
        task: usize,
    },
    CrashNode {
        node: usize,
        down_ms: u64,
    },
    LeaveNode {
        node: usize,
        down_ms: u64,
    },
    StopNode {
        node: usize,
        for_ms: u64,
    },
    Partition {
        node: usize,
        to_cp: bool,
        to_node: bool,
        for_ms: u64,
    },
    LoseHeartbeats {
        for_ms: u64,
    },
    KillEngine {
        node: usize,
        down_ms: u64,
    },
    HangEngine {
        node: usize,
        for_ms: u64,
    },
    SlowEngine {
        node: usize,
        for_ms: u64,
    },
    ForeignLoad {
        node: usize,
        slots: u32,
        for_ms: u64,
    },
    /// Its engine answers every request with an error of its own.
    SickEngine {
        node: usize,
        for_ms: u64,
    },
    /// Its engine answers no look while it works: not whether it is up, nor how busy it is.
    BusyEngine {
        node: usize,
        for_ms: u64,
    },
    /// An operator drains the node, or lets it serve again.
    Drain {
        node: usize,
    },
    Resume {
        node: usize,
    },
    /// The wall clock of the node is set.
    ClockStep {
        node: usize,
        by_ms: i64,
    },
    /// Another process comes with the node's name.
    Twin {
        node: usize,
    },
    RestartControl {
        down_ms: u64,
    },
    StallControl {
        for_ms: u64,
    },
    /// The node itself answers attempts so, whatever its engine can do.
    NodeFault {
        node: usize,
        fault: NodeFault,
        for_ms: u64,
    },
    /// The control plane's own descriptors are used up.
    Shortage {
        for_ms: u64,
    },
    /// The reports of the node name its pools twice.
    DoubleReports {
        node: usize,
        for_ms: u64,
    },
    /// SIGTERM of the control plane: nothing new, then what has not ended is cut off.
    ShutdownControl {
        grace_ms: u64,
        down_ms: u64,
    },
    /// An operator retires a model for a while.
    Retire {
        model: usize,
        for_ms: u64,
    },
    DeleteSession {
        session: u128,
    },
    Link {
        node: usize,
        fault: LinkFault,
        for_ms: u64,
    },
    /// The links of all nodes are cut at once.
    AllLinks {
        for_ms: u64,
    },
    /// The control plane's host loses its power: nobody hears of it.
    PowerLoss {
        down_ms: u64,
    },
}

/// What a node itself makes of an attempt before it takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeFault {
    /// 401: it does not take the control plane's token.
    Denies,
    /// 400.
    Rejects,
    /// 500.
    Fails,
    /// A refusal by its code.
    Refuses(ErrorCode),
    /// It takes the connection and resets it.
    Resets,
    /// It takes the connection and says nothing.
    SaysNothing,
}

impl NodeFault {
    /// With the names by which scenarios call them.
    pub const ALL: [(&'static str, Self); 10] = [
        ("denies", Self::Denies),
        ("rejects", Self::Rejects),
        ("fails", Self::Fails),
        ("exhausted", Self::Refuses(ErrorCode::ReplicaExhausted)),
        ("unready", Self::Refuses(ErrorCode::PoolUnready)),
        ("wrong-node", Self::Refuses(ErrorCode::WrongNode)),
        ("duplicate", Self::Refuses(ErrorCode::AttemptDuplicate)),
        ("draining", Self::Refuses(ErrorCode::Draining)),
        ("resets", Self::Resets),
        ("says-nothing", Self::SaysNothing),
    ];
}

/// A client's task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskPlan {
    pub model: usize,
    pub batch: bool,
    pub tokens: u64,
    pub deadline_ms: Option<u64>,
    /// Kills every engine that works on it, at its first token.
    pub poison: bool,
    /// Every engine answers it with an error of its own.
    pub bad: bool,
    /// Brings every engine that works on it down from within (SIGSEGV), at its first token.
    pub crashes: bool,
    /// Goes on after tokens: from the start with a seed, or from what was sent.
    pub recovery: Option<Replays>,
    pub constraints: Option<PlacementConstraints>,
    pub session: Option<u128>,
}

/// How a task that continues does so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replays {
    FromTheStart,
    FromTheEnd,
    /// From the start, and compared by whoever passes it on: by an engine of the same kind, once, and not
    /// where what was sent has become too much.
    PassedOn,
}

/// Everything that a run needs.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub switched_off: Option<Mutant>,
    pub timing: Timing,
    pub queue_timeout: Duration,
    pub first_token_timeout: Duration,
    pub token_idle_timeout: Duration,
    pub capacity: usize,
    pub full_lane: FullLane,
    pub strategy: Strategy,
    /// Slots of each node's pool, replicas of it, and its model.
    pub nodes: Vec<NodePlan>,
    pub tasks: Vec<TaskPlan>,
    pub steps: Vec<(u64, Step)>,
    /// Faults and clients end here; the cluster then gets time to come to rest.
    pub horizon_ms: u64,
    /// Of a thousand calls: lost, doubled, late.
    pub lost: u32,
    pub doubled: u32,
    pub late: u32,
    /// Of a thousand tokens on their way: lost with their connection. Three times as many come twice, and
    /// eight times as many are cut.
    pub stream_faults: u32,
    /// Of a thousand stops: lost.
    pub lost_stops: u32,
    /// Of a thousand attempts: kept by their nodes over the loss of their connections; and of a thousand
    /// tokens of those on their way: lost with their connection.
    pub kept: u32,
    pub link_breaks: u32,
    /// What all streams of a node may take, bytes.
    pub held_bytes: usize,
    /// Of a thousand pieces of streams: lost, while what follows them comes.
    pub lost_pieces: u32,
    /// Of a thousand answers to dispatches that a node has taken: lost.
    pub lost_answers: u32,
    /// Of a thousand streams that go on after a break: announced by their acceptance once more.
    pub repeated_answers: u32,
    /// Of a thousand pieces of streams: read only together with what comes after them.
    pub late_reads: u32,
    /// Of a thousand pieces at their nodes: nothing is taken there for a while; what a partition holds
    /// back stays at its node as well.
    pub slow_readers: u32,
    pub links: LinkDraws,
    /// What one stream may take in the control plane, and at its node, bytes.
    pub log_bytes: usize,
    pub attempt_bytes: usize,
    /// Readers look at the control plane between its events.
    pub read: bool,
    /// First token and pace of engines, milliseconds, at most.
    pub first_token_ms: u64,
    pub pace_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePlan {
    pub slots: u32,
    pub replicas: u32,
    pub model: usize,
    /// The value of its label `zone`.
    pub zone: u8,
    /// Its engine is of another version: the same seed gives another text.
    pub odd: bool,
    /// The node starts its engine itself, when a task waits for it.
    pub on_demand: bool,
    /// Milliseconds without work after which it is stopped again.
    pub ttl_ms: Option<u64>,
    /// The model of its second pool, which is as large as the first one.
    pub second: Option<usize>,
    /// Its attempts share a link.
    pub link: bool,
}

/// The zones of the simulated cluster.
pub const ZONES: [&str; 2] = ["east", "west"];
/// Turns of a session.
pub const MAX_TURNS: u32 = 8;

/// The schedule of a seed.
pub fn plan(seed: u64, switched_off: Option<Mutant>) -> Plan {
    let mut r = fastrand::Rng::with_seed(seed);
    let node_count = match r.u8(..64) {
        0 => r.usize(20..=200),
        1..=15 => r.usize(1..=20),
        _ => r.usize(1..=6),
    };
    let models = r.usize(1..=2);
    let interval = Duration::from_secs(r.u64(1..=10));
    let node_timeout = interval * r.u32(3..=4);
    let horizon_ms = r.u64(300_000..420_000);
    let mut nodes: Vec<NodePlan> = (0..node_count)
        .map(|_| NodePlan {
            slots: r.u32(1..=8),
            replicas: r.u32(1..=2),
            model: r.usize(..models),
            zone: r.u8(..2),
            odd: r.u8(..6) == 0,
            on_demand: false,
            ttl_ms: None,
            second: None,
            link: false,
        })
        .collect();
    // Drawn beside the rest, so that a seed's other draws are what they always were.
    let mut own = fastrand::Rng::with_seed(seed ^ 0x6c6f_6164);
    for node in &mut nodes {
        if own.u8(..4) == 0 {
            (node.on_demand, node.replicas) = (true, 1);
            node.ttl_ms = own.bool().then(|| own.u64(2_000..60_000));
        }
    }
    let mut peers = fastrand::Rng::with_seed(seed ^ 0x7065_6572);
    for node in &mut nodes {
        node.second = (!node.on_demand && peers.u8(..5) == 0).then(|| peers.usize(..models));
    }
    let mut streams = fastrand::Rng::with_seed(seed ^ 0x6c6f_7374);
    let mut keeping = fastrand::Rng::with_seed(seed ^ 0x6865_6c64);
    let mut losing = fastrand::Rng::with_seed(seed ^ 0x6c6f_7365);
    let busy = r.u8(..3) == 0;
    let task_count = if busy { r.usize(100..160) } else { r.usize(40..80) };
    let tasks = (0..task_count)
        .map(|_| TaskPlan {
            model: r.usize(..models),
            batch: r.u8(..4) == 0,
            tokens: r.u64(1..=20),
            deadline_ms: (r.u8(..8) == 0).then(|| r.u64(500..60_000)),
            poison: r.u8(..60) == 0,
            bad: own.u8(..30) == 0,
            crashes: peers.u8(..40) == 0,
            recovery: match r.u8(..6) {
                0 => Some(Replays::FromTheStart),
                1 => Some(Replays::FromTheEnd),
                _ => None,
            },
            constraints: constraints(&mut r, node_count),
            session: (r.u8(..5) == 0).then(|| r.u128(1..=4)),
        })
        .collect();
    let mut tasks: Vec<TaskPlan> = tasks;
    let mut passing = fastrand::Rng::with_seed(seed ^ 0x7061_7373);
    for task in &mut tasks {
        let may_pass = task.recovery == Some(Replays::FromTheStart) && task.session.is_none();
        if may_pass && passing.bool() {
            task.recovery = Some(Replays::PassedOn);
        }
    }
    let mut steps = Vec::new();
    let mut last = 0;
    for task in 0..task_count {
        // Some come in bursts, some spread over the whole time.
        let at = if r.u8(..3) > 0 && task > 0 { last + r.u64(..300) } else { r.u64(..horizon_ms) };
        last = at;
        steps.push((at, Step::Submit { task }));
        match r.u8(..20) {
            0..=2 => steps.push((at + r.u64(..8_000), Step::Cancel { task })),
            3 => steps.push((at + r.u64(..20_000), Step::SubmitAgain { task })),
            _ => {}
        }
    }
    for _ in 0..r.usize(2..14) {
        let at = r.u64(..horizon_ms);
        let node = r.usize(..node_count);
        let for_ms = if r.bool() { r.u64(50..5_000) } else { r.u64(5_000..90_000) };
        let step = match r.u8(..22) {
            0 | 1 => Step::CrashNode { node, down_ms: for_ms },
            2 => Step::LeaveNode { node, down_ms: for_ms },
            3 | 4 => Step::StopNode { node, for_ms },
            5 => Step::Partition { node, to_cp: true, to_node: true, for_ms },
            6 => Step::Partition { node, to_cp: true, to_node: false, for_ms },
            7 => Step::Partition { node, to_cp: false, to_node: true, for_ms },
            8 => Step::LoseHeartbeats { for_ms },
            9 => Step::KillEngine { node, down_ms: for_ms },
            10 => Step::HangEngine { node, for_ms },
            11 => Step::SlowEngine { node, for_ms },
            12 => Step::ForeignLoad { node, slots: r.u32(1..=8), for_ms },
            13 => Step::SickEngine { node, for_ms },
            14 | 15 => {
                steps.push((at + for_ms, Step::Resume { node }));
                Step::Drain { node }
            }
            16 => Step::ClockStep { node, by_ms: r.i64(-86_400_000..86_400_000) },
            17 => Step::Twin { node },
            18 => Step::SickEngine { node, for_ms: for_ms + 10_000 },
            19 => Step::RestartControl { down_ms: r.u64(10..20_000) },
            _ => Step::StallControl { for_ms: r.u64(1_200..50_000) },
        };
        steps.push((at, step));
    }
    for _ in 0..own.usize(0..4) {
        let node = own.usize(..node_count);
        let step = Step::BusyEngine { node, for_ms: own.u64(1_000..90_000) };
        steps.push((own.u64(..horizon_ms), step));
    }
    of_peers(&mut peers, node_count, models, horizon_ms, node_timeout, &mut steps);
    let noisy = r.u8(..3) == 0;
    let plan = Plan {
        seed,
        switched_off,
        timing: Timing { heartbeat_interval: interval, node_timeout },
        queue_timeout: Duration::from_secs(r.u64(60..150)),
        first_token_timeout: Duration::from_secs(r.u64(5..30)),
        token_idle_timeout: Duration::from_secs(r.u64(3..20)),
        capacity: if busy { r.usize(4..40) } else { 1024 },
        full_lane: if r.u8(..3) == 0 { FullLane::DropLru } else { FullLane::Reject },
        strategy: Strategy::ALL[if r.bool() { 0 } else { r.usize(..4) }].1,
        nodes,
        tasks,
        steps,
        horizon_ms,
        lost: if noisy { r.u32(..80) } else { 2 },
        doubled: if noisy { r.u32(..80) } else { 2 },
        late: if noisy { r.u32(..80) } else { 2 },
        lost_pieces: rarely(&mut losing, 2..30),
        lost_answers: rarely(&mut losing, 20..200),
        repeated_answers: rarely(&mut losing, 200..1_000),
        late_reads: rarely(&mut losing, 50..600),
        slow_readers: rarely(&mut losing, 5..60),
        log_bytes: if losing.u8(..4) == 0 { losing.usize(500..4_000) } else { MAX_LOG_BYTES },
        attempt_bytes: if losing.u8(..3) == 0 { losing.usize(300..3_000) } else { MAX_ATTEMPT_BYTES },
        read: false,
        stream_faults: if streams.u8(..3) == 0 { streams.u32(1..8) } else { 0 },
        lost_stops: if streams.u8(..3) == 0 { streams.u32(50..400) } else { 0 },
        kept: [0, 500, 1_000][keeping.usize(..3)],
        link_breaks: if keeping.bool() { keeping.u32(1..40) } else { 0 },
        held_bytes: match (keeping.bool(), losing.u8(..6) == 0) {
            (true, false) => keeping.usize(10_000..100_000),
            (false, false) => HELD_BYTES,
            // Hardly more than one attempt takes.
            (_, true) => losing.usize(1_500..10_000),
        },
        links: LinkDraws::default(),
        first_token_ms: r.u64(20..3_000),
        pace_ms: r.u64(5..600),
    };
    with_links(plan)
}

fn with_links(mut plan: Plan) -> Plan {
    let is_roomy = (plan.log_bytes, plan.attempt_bytes, plan.held_bytes)
        == (MAX_LOG_BYTES, MAX_ATTEMPT_BYTES, HELD_BYTES);
    plan.links = links::draw(plan.seed, &mut plan.nodes, plan.horizon_ms, is_roomy, &mut plan.steps);
    plan
}

/// A rate out of these in one schedule of four, else nothing.
fn rarely(r: &mut fastrand::Rng, rates: std::ops::Range<u32>) -> u32 {
    if r.u8(..4) == 0 { r.u32(rates) } else { 0 }
}

/// Peers that are hostile or unlucky, drawn beside the rest.
fn of_peers(
    r: &mut fastrand::Rng,
    node_count: usize,
    models: usize,
    horizon_ms: u64,
    node_timeout: Duration,
    steps: &mut Vec<(u64, Step)>,
) {
    for _ in 0..r.usize(0..5) {
        let (at, node) = (r.u64(..horizon_ms), r.usize(..node_count));
        let for_ms = if r.bool() { r.u64(500..8_000) } else { r.u64(8_000..60_000) };
        let step = match r.u8(..12) {
            0..=5 => {
                Step::NodeFault { node, fault: NodeFault::ALL[r.usize(..NodeFault::ALL.len())].1, for_ms }
            }
            6 => Step::NodeFault { node, fault: NodeFault::Denies, for_ms },
            7 => Step::Shortage { for_ms: for_ms.min(10_000) },
            8 => Step::DoubleReports { node, for_ms: for_ms + 20_000 },
            9 => Step::Retire { model: r.usize(..models), for_ms },
            10 => Step::DeleteSession { session: r.u128(1..=4) },
            _ => Step::ShutdownControl { grace_ms: r.u64(100..8_000), down_ms: r.u64(10..10_000) },
        };
        steps.push((at, step));
    }
    // All fall silent at once while one of them cannot be dialled, and has not been for a while.
    if node_count >= 3 && r.u8(..6) == 0 {
        let silent_ms = u64::try_from(node_timeout.as_millis()).unwrap_or(u64::MAX) * 3;
        let (at, node) = (r.u64(..horizon_ms), r.usize(..node_count));
        let undialled_ms = silent_ms * 2 + 30_000;
        steps.push((at, Step::Partition { node, to_cp: false, to_node: true, for_ms: undialled_ms }));
        steps.push((at + silent_ms / 2 + 20_000, Step::LoseHeartbeats { for_ms: silent_ms }));
    }
}

/// The placement constraints of a task, if any. Names of nodes are those of the simulation.
fn constraints(r: &mut fastrand::Rng, node_count: usize) -> Option<PlacementConstraints> {
    let node = r.usize(..node_count);
    let zone = ZONES[r.usize(..2)];
    let json = match r.u8(..24) {
        // Now and then one that does not exist.
        0 => format!(r#"{{"mode":"pin","node_id":"n{}"}}"#, if r.u8(..4) == 0 { 999 } else { node }),
        1 => format!(r#"{{"mode":"pin","pin_pool_id":"n{node}/pool-0"}}"#),
        2 => format!(r#"{{"require_labels":{{"zone":"{zone}"}}}}"#),
        3 => format!(r#"{{"prefer_pools":["n{node}/pool-0"]}}"#),
        4 => format!(r#"{{"avoid_pools":["n{node}/pool-0"],"allow_fallback":{}}}"#, r.bool()),
        5 => format!(r#"{{"mode":"prefer","node_id":"n{node}","allow_fallback":{}}}"#, r.bool()),
        _ => return None,
    };
    Some(serde_json::from_str(&json).expect("well-formed constraints"))
}
