//! The control plane's numbers as Prometheus samples.

use daemon_kit::metric_families;
use daemon_kit::metrics::Page;
use pool_registry_types::NodeId;
use pool_registry_types::node::{GpuHealth, GpuMemory, GpuReport, Liveness};
use pool_registry_types::pool::PoolState;
use pool_registry_types::snapshot::ClusterSnapshot;
use pool_registry_types::task::{Priority, TaskState};
use pool_registry_types::view::{LinkState, NodeView, PoolView};

use task_scheduler::WaitingTasks;

use crate::services::link::LinkTable;
use crate::services::measured::{Measured, OTHER};
use crate::services::published::{AllPaces, Facts};

metric_families! {
    /// All that the control plane says, without what both daemons do.
    FAMILIES;
    LINK_RESUMES: Counter "llorch_link_resumes_total" [] "Times that an interrupted link came up again.";
    LINK_INTERRUPTED_SECONDS: Counter "llorch_link_interrupted_seconds_total" [] "Length of all interruptions of links that are over.";
    LINK_RECORDS_DROPPED: Counter "llorch_link_records_dropped_total" [] "Records of attempts that nobody waits for any more.";
    TASKS_SUBMITTED: Counter "llorch_tasks_submitted_total" [] "Tasks taken in.";
    TASKS_REJECTED: Counter "llorch_tasks_rejected_total" [] "Tasks refused at admission.";
    TASKS_COMPLETED: Counter "llorch_tasks_completed_total" [] "Tasks that ended well.";
    TASKS_FAILED: Counter "llorch_tasks_failed_total" [] "Tasks that ended with an error.";
    TASKS_CANCELED: Counter "llorch_tasks_canceled_total" [] "Tasks ended by their clients.";
    TASKS_RESET: Counter "llorch_tasks_reset_total" [] "Tasks lost with their node or engine after tokens had been sent.";
    DISPATCHES: Counter "llorch_dispatches_total" [] "Attempts sent to nodes.";
    DISPATCHES_REFUSED: Counter "llorch_dispatches_refused_total" [] "Attempts that nodes did not take.";
    REPLACEMENTS: Counter "llorch_replacements_total" [] "Attempts that failed without a token and were placed again.";
    ATTEMPTS_MOVED: Counter "llorch_attempts_moved_total" [] "Attempts taken from nodes that said nothing and could not be dialled, before their time was up.";
    REGISTRATIONS: Counter "llorch_registrations_total" [] "Registrations of nodes.";
    REPORTS_IGNORED: Counter "llorch_reports_ignored_total" [] "Reports with an old number.";
    ATTEMPTS_VANISHED: Counter "llorch_attempts_vanished_total" [] "Attempts that their node no longer listed.";
    ATTEMPTS_ORPHANED: Counter "llorch_attempts_orphaned_total" [] "Attempts of nodes that were not known here.";
    CONTINUATIONS: Counter "llorch_continuations_total" [] "Attempts that went on after tokens of a lost one.";
    REPLAYS_DIFFERED: Counter "llorch_replays_differed_total" [] "Replays that did not begin with what had been sent.";
    TASKS_DROPPED: Counter "llorch_tasks_dropped_total" [] "Tasks dropped from a full queue for newer ones.";
    BREAKER_TRIPS: Counter "llorch_breaker_trips_total" [] "Times that a pool or a node was left alone for its failures.";
    POOL_LOADS_ASKED: Counter "llorch_pool_loads_asked_total" [] "Times that a node was asked to start the engines of a pool.";
    NODE_DENIALS: Counter "llorch_node_denials_total" [] "Attempts that nodes refused for the control plane's token.";
    TASK_CULPRITS: Counter "llorch_task_culprits_total" [] "Tasks that were ended because each alone brought an engine down.";
    OWN_SHORTAGES: Counter "llorch_own_shortages_total" [] "Connections that could not be made for want of descriptors, ports or memory here.";
    CONTROL_STALLS: Counter "llorch_control_stalls_total" [] "Times that the control loop stood still.";
    MASS_SILENCES: Counter "llorch_mass_silences_total" [] "Times that most nodes fell silent at once.";
    QUEUE_FULL: Counter "llorch_queue_full_total" [] "Of the tasks refused at admission, those for which their lane had no room.";
    HEARTBEAT_INTERVAL: Gauge "llorch_heartbeat_interval_seconds" [] "What nodes are told to let pass between two heartbeats.";
    LINKS: Gauge "llorch_links" ["node_id", "state"] "1 for how the link to the node stands.";
    QUEUE_BYTES: Gauge "llorch_queue_bytes" [] "Bytes of requests that are read or wait for an engine.";
    LIVE_LOG_BYTES: Gauge "llorch_live_log_bytes" [] "Bytes of the streams of tasks that have not ended, and of others that are read still.";
    HELD_ANSWER_BYTES: Gauge "llorch_held_answer_bytes" [] "Bytes of answers under /v1 that are held back until they are whole.";
    NODES: Gauge "llorch_nodes" ["liveness"] "Nodes by liveness.";
    QUEUE_TASKS: Gauge "llorch_queue_tasks" ["model", "priority"] "Tasks that wait for a slot.";
    TASKS_OLDEST_WAITING: Gauge "llorch_tasks_oldest_waiting_seconds" [] "Since the admission of the task that has waited longest; 0 where none waits.";
    TASKS_UNPLACEABLE: Gauge "llorch_tasks_unplaceable" [] "Tasks that wait for what no node has or could make.";
    SESSIONS: Gauge "llorch_sessions" [] "Sessions that are known.";
    POOL_TOKENS_PER_SECOND: Gauge "llorch_pool_tokens_per_second" ["node_id", "pool_id"] "Measured pace of one slot.";
    ATTEMPTS_RUNNING: Gauge "llorch_attempts_running" [] "Attempts under way.";
    CONTROL_SUSPECTS_ITSELF: Gauge "llorch_control_suspects_itself" [] "1 while most nodes are silent at once.";
    NODE_EVIDENCE_AGE: Gauge "llorch_node_evidence_age_seconds" ["node_id"] "Since the node's last heartbeat or token.";
    NODE_HEARTBEAT_AGE: Gauge "llorch_node_heartbeat_age_seconds" ["node_id"] "Since the node's last heartbeat.";
    NODE_UP: Gauge "llorch_node_up" ["node_id", "liveness"] "1 for a node that is online, 0 for one that is suspect or offline.";
    NODE_EXPECTED: Gauge "llorch_node_expected" ["node_id"] "1 for each node that has registered and was not forgotten since, whether it is there or not.";
    POOL_SLOTS: Gauge "llorch_pool_slots" ["node_id", "pool_id"] "Slots of the pool; none of a node that is offline.";
    POOL_SLOTS_FREE: Gauge "llorch_pool_slots_free" ["node_id", "pool_id"] "Slots that a task could take; none of a node that is not online.";
    POOL_STATE: Gauge "llorch_pool_state" ["node_id", "pool_id", "state"] "1 for the state that the pool's node reported last.";
    ENGINE_UP: Gauge "llorch_engine_up" ["node_id", "pool_id", "replica_id"] "1 for an engine that takes requests on a node that is not offline.";
    ENGINE_RESTARTS: Counter "llorch_engine_restarts_total" ["node_id", "pool_id"] "Engines of the pool that ended without being told to, since their node started.";
    ENGINE_LOAD: Gauge "llorch_engine_load_seconds" ["node_id", "pool_id"] "From the last start of an engine of the pool to its first good health call.";
    GPU_VRAM_USED: Gauge "llorch_gpu_vram_used_bytes" ["node_id", "device_id"] "Memory in use on the GPU.";
    GPU_VRAM_TOTAL: Gauge "llorch_gpu_vram_total_bytes" ["node_id", "device_id"] "Memory of the GPU.";
    GPU_VRAM_UNACCOUNTED: Gauge "llorch_gpu_vram_unaccounted_bytes" ["node_id", "device_id"] "Memory of processes there that are none of the node's engines.";
    GPU_UTILIZATION: Gauge "llorch_gpu_utilization_ratio" ["node_id", "device_id"] "Share of the time in which the GPU did something, 0 to 1.";
    GPU_POWER: Gauge "llorch_gpu_power_watts" ["node_id", "device_id"] "What the GPU takes.";
    GPU_ENERGY: Counter "llorch_gpu_energy_joules_total" ["node_id", "device_id"] "What the GPU has taken since its driver was loaded.";
    GPU_TEMPERATURE: Gauge "llorch_gpu_temperature_celsius" ["node_id", "device_id"] "Temperature of the GPU.";
    GPU_HEALTH: Gauge "llorch_gpu_health" ["node_id", "device_id", "health"] "1 for how the GPU was when its node reported last.";
    QUEUE_WAIT: Histogram "llorch_queue_wait_seconds" ["model"] LONG "Of ended tasks: from admission to the last dispatch, or to the end.";
    TIME_TO_FIRST_TOKEN: Histogram "llorch_time_to_first_token_seconds" ["model"] LONG "Of ended tasks: from admission to the first token.";
    INTER_TOKEN: Histogram "llorch_inter_token_seconds" ["model"] SHORT "Between two arrivals of tokens of one stream; tokens that come together count once.";
    TASK_DURATION: Histogram "llorch_task_duration_seconds" ["model"] LONG "Of ended tasks: from admission to the end.";
    PLACEMENT: Histogram "llorch_placement_seconds" [] SHORT "What the control loop thought before it sent attempts to nodes.";
    HOP: Histogram "llorch_hop_seconds" [] SHORT "From sending an attempt to its node's word that it has it.";
    TASKS_ENDED: Counter "llorch_tasks_ended_total" ["model", "outcome", "code", "fault"] "Tasks that ended, and whose fault it was where not well: the client's, the cluster's or the engine's.";
    TOKENS_IN: Counter "llorch_tokens_in_total" ["model"] "Tokens of the inputs of ended tasks, where engines say.";
    TOKENS_OUT: Counter "llorch_tokens_out_total" ["model"] "Tokens of answers, as they come.";
    CALLER_TASKS_ENDED: Counter "llorch_caller_tasks_ended_total" ["caller", "outcome"] "Tasks that ended, by the name of the token; with ORCHESTRATORD_METRICS_CALLERS only.";
    CALLER_TOKENS_OUT: Counter "llorch_caller_tokens_out_total" ["caller"] "Pieces of answers that were sent, by the name of the token; with ORCHESTRATORD_METRICS_CALLERS only.";
}

fn liveness(liveness: Liveness) -> &'static str {
    match liveness {
        Liveness::Online => "online",
        Liveness::Suspect => "suspect",
        Liveness::Offline => "offline",
    }
}

pub(crate) fn task_state(state: TaskState) -> &'static str {
    match state {
        TaskState::Queued => "queued",
        TaskState::Running => "running",
        TaskState::Completed => "completed",
        TaskState::Failed => "failed",
        TaskState::Canceled => "canceled",
    }
}

fn pool_state(state: PoolState) -> &'static str {
    match state {
        PoolState::Ready => "ready",
        PoolState::Loading => "loading",
        PoolState::Loadable => "loadable",
        PoolState::Draining => "draining",
        PoolState::Failed => "failed",
        PoolState::Unknown => "unknown",
    }
}

pub(crate) fn gpu_health(health: GpuHealth) -> &'static str {
    match health {
        GpuHealth::Ok => "ok",
        GpuHealth::Degraded => "degraded",
        GpuHealth::Lost => "lost",
        GpuHealth::Unresponsive => "unresponsive",
        GpuHealth::Unknown => "unknown",
    }
}

fn link_state(state: LinkState) -> &'static str {
    match state {
        LinkState::Connecting => "connecting",
        LinkState::Up => "up",
        LinkState::Interrupted => "interrupted",
        LinkState::None => "none",
        LinkState::Unknown => "unknown",
    }
}

/// How the links to nodes stand.
fn links_of(page: &mut Page, links: &LinkTable) {
    for (node_id, state) in links.states() {
        page.gauge(&LINKS, &[node_id.as_str(), link_state(state)], 1.0);
    }
    for (family, value) in [
        (&LINK_RESUMES, links.resumes()),
        (&LINK_INTERRUPTED_SECONDS, links.interrupted_seconds()),
        (&LINK_RECORDS_DROPPED, links.dropped_records()),
    ] {
        page.counter(family, &[], value);
    }
}

/// Which nodes should be there.
pub(crate) fn expected(page: &mut Page, nodes: &[NodeId]) {
    for node_id in nodes {
        page.gauge(&NODE_EXPECTED, &[node_id.as_str()], 1.0);
    }
}

/// Memory that clients fill, as its settings bound it.
pub(crate) fn held(page: &mut Page, queue_bytes: usize, live_log_bytes: usize, held_answer_bytes: usize) {
    page.gauge(&QUEUE_BYTES, &[], queue_bytes as f64);
    page.gauge(&LIVE_LOG_BYTES, &[], live_log_bytes as f64);
    page.gauge(&HELD_ANSWER_BYTES, &[], held_answer_bytes as f64);
}

pub(crate) fn page(
    facts: &Facts,
    paces: &AllPaces,
    view: &ClusterSnapshot,
    links: Option<&LinkTable>,
    (measured, backlog): (&Measured, &WaitingTasks),
) -> Page {
    let mut page = Page::new();
    let c = &facts.counters;
    let own_shortages = c.own_shortages + links.map_or(0, LinkTable::own_shortages);
    for (family, value) in [
        (&TASKS_SUBMITTED, c.submitted),
        (&TASKS_REJECTED, c.rejected),
        (&QUEUE_FULL, c.full),
        (&TASKS_COMPLETED, c.completed),
        (&TASKS_FAILED, c.failed),
        (&TASKS_CANCELED, c.canceled),
        (&TASKS_RESET, c.worker_resets),
        (&DISPATCHES, c.dispatched),
        (&DISPATCHES_REFUSED, c.refused_dispatches),
        (&REPLACEMENTS, c.replaced),
        (&ATTEMPTS_MOVED, c.moved),
        (&REGISTRATIONS, c.registrations),
        (&REPORTS_IGNORED, c.old_reports),
        (&ATTEMPTS_VANISHED, c.vanished),
        (&ATTEMPTS_ORPHANED, c.orphans),
        (&CONTINUATIONS, c.continued),
        (&REPLAYS_DIFFERED, c.replays_differed),
        (&TASKS_DROPPED, c.dropped),
        (&BREAKER_TRIPS, c.trips),
        (&POOL_LOADS_ASKED, c.loads),
        (&NODE_DENIALS, c.denials),
        (&TASK_CULPRITS, c.culprits),
        (&OWN_SHORTAGES, own_shortages),
        (&CONTROL_STALLS, c.stalls),
        (&MASS_SILENCES, c.mass_silences),
    ] {
        page.counter(family, &[], value);
    }
    if let Some(links) = links {
        links_of(&mut page, links);
    }
    for (state, count) in &facts.nodes {
        page.gauge(&NODES, &[liveness(*state)], f64::from(*count));
    }
    let pools = view.nodes().flat_map(|(node, _)| &node.pools);
    measured.reported(pools.flat_map(|pool| &pool.report.models));
    // Also where nothing waits.
    for priority in ["interactive", "batch"] {
        page.add(&QUEUE_TASKS, &[OTHER, priority], 0.0);
    }
    for (model, priority, depth) in &facts.queues {
        let priority = match priority {
            Priority::Interactive => "interactive",
            Priority::Batch => "batch",
        };
        // Several that no node has are one.
        page.add(&QUEUE_TASKS, &[measured.model(model, false), priority], *depth as f64);
    }
    page.gauge(&TASKS_OLDEST_WAITING, &[], backlog.oldest_ms as f64 / 1e3);
    page.gauge(&TASKS_UNPLACEABLE, &[], backlog.stuck as f64);
    page.gauge(&HEARTBEAT_INTERVAL, &[], facts.heartbeat_interval.as_secs_f64());
    page.gauge(&SESSIONS, &[], facts.sessions as f64);
    for (pool, pace) in paces {
        page.gauge(&POOL_TOKENS_PER_SECOND, &[pool.node_id.as_str(), pool.pool_id.as_str()], *pace);
    }
    page.gauge(&ATTEMPTS_RUNNING, &[], facts.running as f64);
    page.gauge(&CONTROL_SUSPECTS_ITSELF, &[], f64::from(u8::from(facts.mass_silence)));
    for (node_id, age_ms) in &facts.heartbeat_ages {
        page.gauge(&NODE_HEARTBEAT_AGE, &[node_id.as_str()], *age_ms as f64 / 1e3);
    }
    for (node, age_ms) in view.nodes() {
        let id = node.node_id.as_str();
        let online = f64::from(u8::from(node.liveness == Liveness::Online));
        page.gauge(&NODE_EVIDENCE_AGE, &[id], age_ms as f64 / 1e3);
        page.gauge(&NODE_UP, &[id, liveness(node.liveness)], online);
        node.pools.iter().for_each(|pool| pool_of(&mut page, node, pool));
        node.gpus.iter().for_each(|gpu| gpu_of(&mut page, id, gpu));
    }
    measured.show(&mut page);
    page
}

fn pool_of(page: &mut Page, node: &NodeView, pool: &PoolView) {
    let (node_id, report) = (node.node_id.as_str(), &pool.report);
    let labels = [node_id, report.pool_id.as_str()];
    let present = node.liveness != Liveness::Offline;
    let slots = if present { pool.slots_total } else { 0 };
    let free = if node.liveness == Liveness::Online { pool.slots_free } else { 0 };
    page.gauge(&POOL_SLOTS, &labels, f64::from(slots));
    page.gauge(&POOL_SLOTS_FREE, &labels, f64::from(free));
    page.gauge(&POOL_STATE, &[node_id, labels[1], pool_state(report.state)], 1.0);
    for replica in &report.replicas {
        let up = f64::from(u8::from(present && replica.ready));
        page.gauge(&ENGINE_UP, &[node_id, labels[1], replica.replica_id.as_str()], up);
    }
    if let Some(supervised) = &report.supervised {
        page.counter(&ENGINE_RESTARTS, &labels, supervised.restarts);
        if let Some(millis) = supervised.load_estimate_ms {
            page.gauge(&ENGINE_LOAD, &labels, millis as f64 / 1e3);
        }
    }
}

fn gpu_of(page: &mut Page, node_id: &str, gpu: &GpuReport) {
    let device = gpu.device_id.to_string();
    let labels = [node_id, device.as_str()];
    page.gauge(&GPU_HEALTH, &[node_id, &device, gpu_health(gpu.health)], 1.0);
    if gpu.memory != GpuMemory::Unknown {
        page.gauge(&GPU_VRAM_USED, &labels, gpu.vram_used_bytes as f64);
        page.gauge(&GPU_VRAM_TOTAL, &labels, gpu.vram_total_bytes as f64);
    }
    if let Some(bytes) = gpu.unaccounted_vram_bytes {
        page.gauge(&GPU_VRAM_UNACCOUNTED, &labels, bytes as f64);
    }
    if let Some(percent) = gpu.utilization_pct {
        page.gauge(&GPU_UTILIZATION, &labels, f64::from(percent) / 100.0);
    }
    if let Some(milliwatts) = gpu.power_mw {
        page.gauge(&GPU_POWER, &labels, f64::from(milliwatts) / 1e3);
    }
    if let Some(millijoules) = gpu.energy_mj {
        page.counter(&GPU_ENERGY, &labels, millijoules / 1_000);
    }
    if let Some(celsius) = gpu.temperature_c {
        page.gauge(&GPU_TEMPERATURE, &labels, f64::from(celsius));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use pool_registry_types::node::{Heartbeat, LiveAnswer, RegisterRequest};
    use pool_registry_types::{BootId, Epoch, ModelRef, Moment, TaskId};
    use serde_json::json;
    use task_scheduler::{Answer, ControlCore, Effect, Event, Note, ProbeOutcome, ReplyTo};
    use task_stream::TaskSpec;
    use uuid::Uuid;

    use super::*;
    use crate::config::Settings;
    use crate::services::attempt_body::tests::spec;

    fn pool() -> serde_json::Value {
        json!({"pool_id": "p", "state": "ready", "ready": true, "engine": "llamacpp", "models": ["m"],
            "replicas": [{"replica_id": "r0", "ready": true, "slots_total": 2}],
            "supervised": {"restarts": 3, "load_estimate_ms": 1500}})
    }

    fn gpu() -> serde_json::Value {
        json!({"device_id": 0, "vram_used_bytes": 1, "vram_total_bytes": 4, "utilization_pct": 50,
            "temperature_c": 60, "power_mw": 250_500, "energy_mj": 7_200_000, "unaccounted_vram_bytes": 1, "health": "ok"})
    }

    struct Bench {
        core: ControlCore,
        now: Moment,
        measured: Measured,
        epochs: HashMap<String, Epoch>,
        /// They are answered.
        probes: bool,
    }

    impl Bench {
        fn apply(&mut self, event: Event) -> Option<Answer> {
            let effects = self.core.apply(self.now, event);
            for effect in &effects {
                match effect {
                    Effect::Note(Note::TaskEnded(end)) => self.measured.ended(end),
                    Effect::Probe { node_id, address, .. } if self.probes => {
                        let live = LiveAnswer { node_id: node_id.clone(), boot_id: BootId(Uuid::nil()) };
                        let outcome = ProbeOutcome::Answered { live, authorized: Some(Ok(())) };
                        let (node_id, address) = (node_id.clone(), address.clone());
                        self.apply(Event::Probed { node_id, address, outcome });
                    }
                    _ => {}
                }
            }
            effects.into_iter().find_map(|effect| match effect {
                Effect::Reply { answer: Ok(answer), .. } => Some(answer),
                _ => None,
            })
        }

        fn join(&mut self, node_id: &str) {
            let request = json!({"node_id": node_id, "machine_id": node_id, "boot_id": Uuid::nil(),
                "address": format!("http://{node_id}"), "version": "0", "pools": [pool()]});
            let request: RegisterRequest = serde_json::from_value(request).unwrap();
            let registers = Event::Register { reply: ReplyTo(1), request, registrar: None };
            let Some(Answer::Registered(answer)) = self.apply(registers) else { panic!("it is refused") };
            self.epochs.insert(node_id.to_owned(), answer.epoch);
            self.beat(node_id, 1);
        }

        fn beat(&mut self, node_id: &str, seq: u64) {
            let beat = json!({"epoch": self.epochs[node_id], "seq": seq, "timestamp": "", "pools": [pool()],
                "gpus": [gpu()]});
            let beat: Heartbeat = serde_json::from_value(beat).unwrap();
            let node_id = NodeId::new(node_id).unwrap();
            self.apply(Event::Heartbeat { reply: ReplyTo(2), node_id, beat });
        }

        fn text(&mut self) -> String {
            let (facts, view) = (Facts::of(&mut self.core, self.now), self.core.snapshot(self.now));
            let backlog = self.core.waiting_tasks(self.now);
            page(&facts, &Vec::new(), &view, None, (&self.measured, &backlog)).text().unwrap()
        }
    }

    fn bench() -> Bench {
        let given = daemon_kit::settings::given::<Settings>(&[]).unwrap();
        let core = ControlCore::new(daemon_kit::settings::Daemon::check(given).unwrap().policy, 1);
        Bench {
            core,
            now: Moment::from_millis(1_000),
            measured: Measured::new(false),
            epochs: HashMap::new(),
            probes: true,
        }
    }

    // CLOUD-2713
    #[test]
    fn what_nodes_report_is_shown_and_an_offline_one_adds_no_capacity() {
        let mut b = bench();
        b.join("a");
        b.join("b");
        let text = b.text();
        for line in [
            "llorch_node_up{liveness=\"online\",node_id=\"a\"} 1",
            "llorch_pool_slots{node_id=\"a\",pool_id=\"p\"} 2",
            "llorch_pool_state{node_id=\"a\",pool_id=\"p\",state=\"ready\"} 1",
            "llorch_engine_up{node_id=\"a\",pool_id=\"p\",replica_id=\"r0\"} 1",
            "llorch_engine_restarts_total{node_id=\"a\",pool_id=\"p\"} 3",
            "llorch_engine_load_seconds{node_id=\"a\",pool_id=\"p\"} 1.5",
            "llorch_gpu_utilization_ratio{device_id=\"0\",node_id=\"a\"} 0.5",
            "llorch_gpu_power_watts{device_id=\"0\",node_id=\"a\"} 250.5",
            "llorch_gpu_energy_joules_total{device_id=\"0\",node_id=\"a\"} 7200",
            "llorch_gpu_health{device_id=\"0\",health=\"ok\",node_id=\"a\"} 1",
            "llorch_node_heartbeat_age_seconds{node_id=\"a\"} 0",
        ] {
            assert!(text.lines().any(|has| has == line), "{line}: {text}");
        }
        b.probes = false;
        for second in 2..=100 {
            b.now = Moment::from_millis(second * 1_000);
            b.apply(Event::Timer);
            b.beat("b", second);
        }
        let text = b.text();
        for line in [
            "llorch_node_up{liveness=\"offline\",node_id=\"a\"} 0",
            "llorch_pool_slots{node_id=\"a\",pool_id=\"p\"} 0",
            "llorch_pool_slots_free{node_id=\"a\",pool_id=\"p\"} 0",
            "llorch_engine_up{node_id=\"a\",pool_id=\"p\",replica_id=\"r0\"} 0",
            "llorch_node_heartbeat_age_seconds{node_id=\"a\"} 99",
        ] {
            assert!(text.lines().any(|has| has == line), "{line}: {text}");
        }
    }

    // CLOUD-2713
    #[test]
    fn a_thousand_nodes_that_come_and_go_and_ten_thousand_invented_names_leave_no_series() {
        let mut b = bench();
        b.join("stays");
        let before = b.text().lines().count();
        for n in 0..1_000 {
            b.join(&format!("node-{n}"));
            let node_id = NodeId::new(format!("node-{n}").as_str()).unwrap();
            b.apply(Event::Deregister { reply: ReplyTo(3), node_id, epoch: None });
        }
        for n in 0..10_000_u128 {
            let model_ref = ModelRef::new(&format!("invented-{n}")).unwrap();
            let spec = TaskSpec { task_id: TaskId(Uuid::from_u128(n + 1)), model_ref, ..spec() };
            b.apply(Event::Submit { reply: ReplyTo(4), spec: Arc::new(spec) });
        }
        let text = b.text();
        assert!(!text.contains("invented-") && !text.contains("node-9"), "{text}");
        assert!(text.lines().count() < before + 120, "{} after {before}: {text}", text.lines().count());
        let queued = text.lines().filter(|line| line.starts_with("llorch_queue_tasks{")).count();
        assert!(queued <= 4, "{text}");
    }
}
