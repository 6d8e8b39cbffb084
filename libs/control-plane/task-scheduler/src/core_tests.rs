//! A core with the answers to what it asks for; admission, the queue, restarts and what is kept.

use pool_registry_types::error::EndCause;
use pool_registry_types::node::{Capabilities, LiveAnswer};
use pool_registry_types::pool::{EngineKind, PoolReport, PoolState, ReplicaReport};
use pool_registry_types::task::Reasoning;
use pool_registry_types::trace::TraceContext;
use pool_registry_types::{BootId, MachineId, PoolId};
use service_registry::{Denied, ProbeOutcome};
use task_stream::Lacking;

use super::*;

#[path = "core_ends_tests.rs"]
mod ends;
#[path = "core_fleet_tests.rs"]
mod fleet;
#[path = "core_forecast_tests.rs"]
mod forecast;
#[path = "core_holders_tests.rs"]
mod holders;
#[path = "core_links_tests.rs"]
mod links;
#[path = "core_loading_tests.rs"]
mod loading;
#[path = "core_peers_tests.rs"]
mod peers;
#[path = "core_repeating_tests.rs"]
mod repeating;
#[path = "core_steering_tests.rs"]
mod steering;
#[path = "core_waiting_tests.rs"]
mod waiting;

const TIMEOUT_MS: u64 = 30_000;

fn at(millis: u64) -> Moment {
    Moment::from_millis(millis)
}

fn policy() -> Policy {
    Policy {
        timing: Timing {
            heartbeat_interval: Duration::from_secs(10),
            node_timeout: Duration::from_millis(TIMEOUT_MS),
        },
        max_nodes: 100,
        strategy: Strategy::LeastLoaded,
        admission_capacity: 4,
        full_lane: FullLane::Reject,
        sessions: SessionPolicy {
            ttl: Duration::from_secs(600),
            max_turns: 8,
            token_budget: Some(1_000),
            time_budget: None,
        },
        queue_timeout: Duration::from_secs(600),
        first_token_timeout: Duration::from_secs(600),
        token_idle_timeout: Duration::from_secs(60),
        task_retention: Duration::from_secs(600),
        retained_tasks: 100,
        switched_off: None,
    }
}

/// A core and the answers to what it asked for.
struct Bench {
    core: ControlCore,
    now: u64,
    next: u64,
    dispatches: Vec<Dispatch>,
    closed: Vec<AttemptId>,
    node_takes_intents: bool,
    /// What nodes say to the control plane's token.
    authorization: Result<(), Denied>,
    /// When which node was dialled, and whether with the token.
    probes: Vec<(u64, NodeId, bool)>,
    changes: Vec<ClusterChange>,
    /// When each node was asked to load its pool.
    loads: Vec<(u64, String)>,
    terminal: BTreeMap<TaskId, ErrorCode>,
    replies: BTreeMap<ReplyTo, Result<Answer, ErrorBody>>,
    /// All effects so far.
    effects: Vec<Effect>,
    /// Before each event, everything is asked that a reader may ask.
    is_read: bool,
}

impl Bench {
    fn new() -> Self {
        Self {
            core: ControlCore::new(policy(), 7),
            now: 0,
            next: 0,
            dispatches: Vec::new(),
            closed: Vec::new(),
            node_takes_intents: true,
            authorization: Ok(()),
            probes: Vec::new(),
            changes: Vec::new(),
            loads: Vec::new(),
            terminal: BTreeMap::new(),
            replies: BTreeMap::new(),
            effects: Vec::new(),
            is_read: false,
        }
    }

    fn reply(&mut self) -> ReplyTo {
        self.next += 1;
        ReplyTo(self.next)
    }

    fn view(&self, id: TaskId) -> Option<TaskView> {
        self.core.record(id).map(|record| record.view(at(self.now), None))
    }

    fn apply(&mut self, event: Event) {
        if self.is_read {
            self.read_all();
        }
        let effects = self.core.apply(at(self.now), event);
        assert_eq!(self.core.check_order(at(self.now)), Ok(()));
        self.effects.extend_from_slice(&effects);
        for effect in effects {
            match effect {
                Effect::Dispatch(dispatch) => self.dispatches.push(*dispatch),
                Effect::CloseAttempt { attempt, .. } => self.closed.push(attempt),
                Effect::CloseTask { task, error } => {
                    assert_eq!(self.terminal.insert(task, error.code), None, "closed twice");
                }
                Effect::Reply { to, answer } => {
                    assert_eq!(self.replies.insert(to, answer), None, "answered twice");
                }
                Effect::Probe { node_id, address, authorized } => {
                    self.probes.push((self.now, node_id.clone(), authorized));
                    let live = LiveAnswer { boot_id: boot(), node_id: node_id.clone() };
                    let authorized = authorized.then(|| self.authorization.clone());
                    let outcome = ProbeOutcome::Answered { live, authorized };
                    self.apply(Event::Probed { node_id, address, outcome });
                }
                Effect::DeliverIntent { to, node_id, order, .. } => {
                    let kept_by_node = self.node_takes_intents;
                    self.apply(Event::IntentDelivered { reply: to, node_id, order, kept_by_node });
                }
                Effect::Changed { change, .. } => self.changes.push(change),
                Effect::Load { pool, .. } => self.loads.push((self.now, pool.node_id.to_string())),
                Effect::OpenLog { .. } | Effect::Forget { .. } | Effect::Note(_) => {}
            }
        }
    }

    /// All that readers ask, and what is written down for them.
    fn read_all(&mut self) {
        let (now, core) = (at(self.now), &mut self.core);
        let ids: Vec<TaskId> = core.tasks.in_order().map(|(id, _)| *id).collect();
        for id in ids {
            drop((core.record(id), core.explain_task(now, id)));
        }
        drop((core.metrics(now), core.view(now), core.explain_request(&task())));
        drop((core.paces(), core.queue_depths(), core.counters(), core.next_deadline()));
        drop(core.take_changed());
    }

    /// Lets the time come, stopping at each deadline.
    fn advance_to(&mut self, millis: u64) {
        while let Some(next) = self.core.next_deadline()
            && next <= at(millis)
        {
            self.now = next.as_millis();
            self.apply(Event::Timer);
        }
        self.now = millis;
    }

    /// A node with one pool of `slots` slots is there and serves.
    fn join(&mut self, name: &str, slots: u32) {
        let reply = self.reply();
        self.apply(Event::Register { reply, request: register(name), registrar: None });
        self.beat(name, 1, slots, &[]);
    }

    fn beat(&mut self, name: &str, seq: u64, slots: u32, attempts: &[AttemptId]) {
        self.report(name, seq, report(slots, attempts));
    }

    /// The node reports this one pool.
    fn report(&mut self, name: &str, seq: u64, pool: PoolReport) {
        self.report_pools(name, seq, vec![pool]);
    }

    fn report_pools(&mut self, name: &str, seq: u64, pools: Vec<PoolReport>) {
        let epoch = match self.replies.values().rev().find_map(|answer| match answer {
            Ok(Answer::Registered(registered)) if registered.node_id.as_str() == name => {
                Some(&registered.epoch)
            }
            _ => None,
        }) {
            Some(epoch) => epoch.clone(),
            None => Epoch::new("none").unwrap(),
        };
        let beat = Heartbeat {
            epoch,
            seq,
            timestamp: String::new(),
            intent: Intent::Serving,
            intent_order: 0,
            tokens_changed: 0,
            pools,
            gpus: vec![],
            models: vec![],
            problems: vec![],
        };
        let reply = self.reply();
        self.apply(Event::Heartbeat { reply, node_id: NodeId::new(name).unwrap(), beat });
    }

    fn submit(&mut self, task: TaskSpec) -> (TaskId, Result<TaskAccepted, ErrorBody>) {
        let task_id = TaskId(Uuid::from_u128(u128::from(self.next) + 1_000));
        let reply = self.reply();
        self.apply(Event::Submit { reply, spec: Arc::new(TaskSpec { task_id, ..task }) });
        let answer = match self.replies[&reply].clone() {
            Ok(Answer::Submitted(accepted)) => Ok(accepted),
            Ok(other) => panic!("not an answer to a submission: {other:?}"),
            Err(error) => Err(error),
        };
        (task_id, answer)
    }

    fn end(&mut self, attempt: AttemptId, tokens_written: u64, how: HowEnded) {
        self.apply(Event::Ended { attempt, tokens_written, unlogged: 0, how, final_report: None });
    }

    /// The first token and the end of an attempt, after these milliseconds.
    fn serve(&mut self, n: usize, first_token_ms: u64, decode_ms: u64, tokens: u64) {
        let attempt = self.dispatches[n].attempt;
        let replica_id = ReplicaId::new("r0").unwrap();
        self.apply(Event::Accepted { attempt, replica_id, report_seq: 1 });
        self.now += first_token_ms;
        self.apply(Event::Started { attempt });
        self.now += decode_ms;
        self.end(attempt, tokens, HowEnded::Finished);
    }

    fn last_dispatch(&self) -> &Dispatch {
        self.dispatches.last().expect("something was dispatched")
    }

    fn node_of(&self, n: usize) -> &str {
        self.dispatches[n].pool.node_id.as_str()
    }
}

fn boot() -> BootId {
    BootId(Uuid::from_u128(1))
}

fn register(name: &str) -> RegisterRequest {
    RegisterRequest {
        node_id: NodeId::new(name).unwrap(),
        machine_id: MachineId::new("m").unwrap(),
        boot_id: boot(),
        address: format!("http://{name}"),
        version: "0".into(),
        intent: Intent::Serving,
        labels: pool_registry_types::placement::Labels::new(),
        pools: vec![],
        capabilities: Capabilities::default(),
        features: Vec::new(),
    }
}

fn report(slots: u32, attempts: &[AttemptId]) -> PoolReport {
    PoolReport {
        pool_id: PoolId::new("pool-0").unwrap(),
        state: PoolState::Ready,
        ready: true,
        draining: false,
        engine: Some(EngineKind::LlamaCpp),
        engine_version: None,
        models: vec![ModelRef::new("m").unwrap()],
        device_mask: None,
        ctx_max: None,
        vram_free_bytes: None,
        replicas: vec![ReplicaReport {
            replica_id: ReplicaId::new("r0").unwrap(),
            ready: true,
            slots_total: slots,
            slots_free: 0,
            slots_foreign: 0,
            attempts: attempts.to_vec(),
            held: vec![],
        }],
        last_error: None,
        warning: None,
        drain: None,
        supervised: None,
    }
}

fn task() -> TaskSpec {
    TaskSpec {
        task_id: TaskId(Uuid::nil()),
        holder: HolderId::OPEN,
        model_ref: ModelRef::new("m").unwrap(),
        engines: EngineKind::ALL.into_iter().collect(),
        lacking: Vec::new(),
        passes_on: false,
        ctx: None,
        priority: Priority::Interactive,
        placement: None,
        session_id: None,
        kv_hint: KvHint::Reuse,
        workload: Workload::Completion,
        max_tokens: None,
        expected_tokens: None,
        deadline_ms: None,
        first_token_ms: None,
        token_idle_ms: None,
        continuation: None,
        reasoning: Reasoning::Keep,
        caller: None,
        trace: TraceContext::default(),
        digest: BodyDigest::new([0; 32]),
    }
}

fn batch() -> TaskSpec {
    TaskSpec { priority: Priority::Batch, ..task() }
}

fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

fn pinned_to(name: &str) -> TaskSpec {
    let json = format!(r#"{{"mode":"pin","node_id":"{name}"}}"#);
    TaskSpec { placement: Some(serde_json::from_str(&json).unwrap()), ..task() }
}

fn continued() -> TaskSpec {
    TaskSpec { continuation: Some(ResumeMode::Append), ..task() }
}

fn code(answer: Result<TaskAccepted, ErrorBody>) -> Option<ErrorCode> {
    answer.err().map(|error| error.code)
}

// CLOUD-1705
#[test]
fn a_task_is_placed_in_the_apply_that_brings_the_pool() {
    let mut b = Bench::new();
    let (_, answer) = b.submit(task());
    assert_eq!(answer.unwrap().queue_position, None, "nothing could take it");
    assert!(b.dispatches.is_empty());
    b.join("a", 1);
    assert_eq!(b.dispatches.len(), 1);
}

// CLOUD-1401
#[test]
fn four_slots_take_four_tasks_whatever_the_heartbeats_say() {
    let mut b = Bench::new();
    b.join("a", 4);
    for _ in 0..4 {
        b.submit(task()).1.unwrap();
    }
    b.beat("a", 2, 4, &[]);
    b.submit(task()).1.unwrap();
    assert_eq!(b.dispatches.len(), 4);
    b.end(b.dispatches[0].attempt, 1, HowEnded::Finished);
    assert_eq!(b.dispatches.len(), 5);
}

// CLOUD-1701
#[test]
fn a_full_queue_is_refused_with_the_time_to_wait() {
    let mut b = Bench::new();
    b.join("a", 1);
    for _ in 0..5 {
        b.submit(task()).1.unwrap();
    }
    let error = b.submit(task()).1.unwrap_err();
    assert_eq!(error.code, ErrorCode::AdmissionReject);
    assert!(error.retry_after_ms.unwrap() > 0);
    assert!(b.submit(batch()).1.is_ok(), "each priority has its own bound");
}

// CLOUD-1702
#[test]
fn one_start_in_eight_is_batch_while_both_wait() {
    let mut b = Bench::new();
    b.core.policy.admission_capacity = 100;
    b.join("a", 1);
    for _ in 0..20 {
        b.submit(task()).1.unwrap();
    }
    for _ in 0..3 {
        b.submit(batch()).1.unwrap();
    }
    for _ in 0..18 {
        b.end(b.last_dispatch().attempt, 1, HowEnded::Finished);
    }
    let batches: Vec<usize> =
        (0..b.dispatches.len()).filter(|n| b.dispatches[*n].spec.priority == Priority::Batch).collect();
    assert_eq!(batches, vec![8, 16]);
}

// CLOUD-1703
#[test]
fn a_task_waits_no_longer_than_its_deadline() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.submit(task()).1.unwrap();
    let (id, _) = b.submit(TaskSpec { deadline_ms: Some(100), ..task() });
    b.advance_to(99);
    assert!(b.terminal.is_empty());
    b.advance_to(100);
    assert_eq!(b.terminal[&id], ErrorCode::DeadlineExceeded);
}

// CLOUD-1704
#[test]
fn an_unknown_model_is_queued_for_one_node_timeout_after_the_start_and_refused_later() {
    let mut b = Bench::new();
    let (early, answer) = b.submit(task());
    assert!(answer.is_ok());
    b.advance_to(TIMEOUT_MS - 1);
    assert!(b.terminal.is_empty());
    b.advance_to(TIMEOUT_MS);
    assert_eq!(b.terminal[&early], ErrorCode::ModelNotAvailable);
    assert_eq!(b.submit(task()).1.unwrap_err().code, ErrorCode::ModelNotAvailable);
}

// CLOUD-1202
#[test]
fn the_same_task_id_attaches_with_the_same_body_and_conflicts_with_another() {
    let mut b = Bench::new();
    let id = TaskId(Uuid::from_u128(5));
    let mut outcome = |digest: u8| {
        let reply = b.reply();
        let spec = TaskSpec { task_id: id, digest: BodyDigest::new([digest; 32]), ..task() };
        b.apply(Event::Submit { reply, spec: Arc::new(spec) });
        b.replies[&reply].clone()
    };
    assert!(outcome(1).is_ok());
    assert!(outcome(1).is_ok());
    assert_eq!(outcome(2).unwrap_err().code, ErrorCode::TaskConflict);
    assert_eq!(b.core.counters().submitted, 1);
}

// CLOUD-1003
#[test]
fn a_node_that_restarted_ends_its_old_attempts() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.submit(task()).1.unwrap();
    let reply = b.reply();
    let request = RegisterRequest { boot_id: BootId(Uuid::from_u128(2)), ..register("a") };
    b.apply(Event::Register { reply, request, registrar: None });
    assert_eq!(b.closed, vec![b.dispatches[0].attempt]);
}

// CLOUD-1206
#[test]
fn ended_tasks_are_forgotten_after_the_retention() {
    let mut b = Bench::new();
    b.join("a", 1);
    let (id, _) = b.submit(task());
    b.end(b.dispatches[0].attempt, 1, HowEnded::Finished);
    b.advance_to(599_999);
    assert!(b.view(id).is_some());
    b.advance_to(600_000);
    assert!(b.view(id).is_none());
}

// CLOUD-1207
// CLOUD-1209
#[test]
fn only_so_many_ended_tasks_are_kept() {
    let mut b = Bench::new();
    b.join("a", 1);
    let (first, _) = b.submit(task());
    b.end(b.last_dispatch().attempt, 1, HowEnded::Finished);
    for _ in 0..policy().retained_tasks {
        assert!(b.view(first).is_some());
        b.submit(task()).1.unwrap();
        b.end(b.last_dispatch().attempt, 1, HowEnded::Finished);
    }
    assert!(b.view(first).is_none());
}

// CLOUD-1309
#[test]
fn a_broken_stream_asks_for_a_probe_and_makes_nobody_suspect() {
    for how in [HowEnded::Broken("reset".into()), HowEnded::TimedOut(Overdue::Silence)] {
        let mut b = Bench::new();
        b.join("a", 1);
        b.submit(task()).1.unwrap();
        let attempt = b.dispatches[0].attempt;
        let ended = Event::Ended { attempt, tokens_written: 3, unlogged: 0, how, final_report: None };
        let effects = b.core.apply(at(0), ended);
        assert!(effects.iter().any(|effect| matches!(effect, Effect::Probe { .. })));
        assert_eq!(b.core.registry().liveness(&NodeId::new("a").unwrap()), Some(Liveness::Online));
    }
}

#[test]
fn a_draining_control_plane_admits_nothing_new() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.apply(Event::Drain);
    assert_eq!(b.submit(task()).1.unwrap_err().code, ErrorCode::Draining);
}

// CLOUD-1018
#[test]
fn two_lives_of_the_control_plane_give_different_attempt_ids() {
    let ids = |incarnation| {
        let mut core = ControlCore::new(policy(), incarnation);
        core.next_id()
    };
    assert_ne!(ids(1), ids(2));
}

// CLOUD-2668
#[test]
fn what_becomes_of_a_task_and_of_a_node_is_noted_once() {
    let mut b = Bench::new();
    b.join("a", 1);
    b.join("b", 1);
    let (id, _) = b.submit(continued());
    let first = b.last_dispatch().clone();
    b.now = 30;
    b.apply(Event::Started { attempt: first.attempt });
    b.now = 50;
    b.end(first.attempt, 2, HowEnded::Broken("prompt".into()));
    b.advance_to(5_000);
    let second = b.last_dispatch().clone();
    b.now = 5_100;
    b.end(second.attempt, 7, HowEnded::Finished);
    let notes: Vec<Note> = b
        .effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Note(note) => Some(note.clone()),
            _ => None,
        })
        .collect();
    let replaced = notes.iter().filter(|note| matches!(note, Note::Replaced { task, attempt, why: "its stream broke", code: None, .. } if *task == id && *attempt == first.attempt));
    assert_eq!(replaced.count(), 1, "{notes:?}");
    let ends: Vec<&TaskEnd> = notes
        .iter()
        .filter_map(|note| match note {
            Note::TaskEnded(end) => Some(&**end),
            _ => None,
        })
        .collect();
    let [end] = ends[..] else { panic!("{notes:?}") };
    assert_eq!((end.state, end.code, end.attempts, end.sent), (TaskState::Completed, None, 2, 7));
    assert_eq!(
        (end.first_token_ms, end.elapsed_ms, end.pool.as_ref()),
        (Some(30), 5_100, Some(&second.pool))
    );
    let online = |note: &&Note| matches!(note, Note::LivenessChanged { observed, .. } if observed.liveness == Liveness::Online);
    assert_eq!(notes.iter().filter(online).count(), 2, "{notes:?}");
    // A task that never had a place ends with its code.
    b.effects.clear();
    let (_, _) = b.submit(TaskSpec { deadline_ms: Some(100), ..pinned_to("c") });
    b.advance_to(20_000);
    let code = b.effects.iter().find_map(|effect| match effect {
        Effect::Note(Note::TaskEnded(end)) => Some((end.code.is_some(), end.pool.is_none())),
        _ => None,
    });
    assert_eq!(code, Some((true, true)));
}
