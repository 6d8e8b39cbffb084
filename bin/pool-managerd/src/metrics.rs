//! What the node says of itself, as Prometheus samples. All begin with `llorch_agent_`: what the control
//! plane says of nodes has names of its own.

use daemon_kit::metric_families;
use daemon_kit::metrics::Page;
use node_agent::Agent;
use pool_registry_types::node::GpuMemory;
use pool_registry_types::pool::ReplicaReport;

metric_families! {
    /// All that a node says, without what both daemons do.
    FAMILIES;
    ATTEMPTS_ACCEPTED: Counter "llorch_agent_attempts_accepted_total" [] "Attempts that got a slot.";
    ATTEMPTS_REFUSED: Counter "llorch_agent_attempts_refused_total" [] "Attempts that got none.";
    ATTEMPTS_FINISHED: Counter "llorch_agent_attempts_finished_total" [] "Attempts that the engine finished.";
    ATTEMPTS_FAILED: Counter "llorch_agent_attempts_failed_total" [] "Attempts that ended with an error.";
    ATTEMPTS_CANCELED: Counter "llorch_agent_attempts_canceled_total" [] "Attempts whose connection was dropped.";
    TOKENS: Counter "llorch_agent_tokens_total" [] "Tokens, by the engines' own count.";
    ATTEMPTS_RUNNING: Gauge "llorch_agent_attempts_running" [] "Attempts that hold a slot.";
    HELD_BYTES: Gauge "llorch_agent_held_bytes" [] "Memory of attempts' streams that are kept for their readers, bytes.";
    HELD_ATTEMPTS: Gauge "llorch_agent_held_attempts" [] "Attempts whose streams are kept, running or ended.";
    REGISTERED: Gauge "llorch_agent_registered" [] "1 while the control plane hears this node and sends it tasks.";
    HANDOFFS_FAULTY: Gauge "llorch_agent_handoffs_faulty" [] "Handoff files that bind nothing.";
    POOL_READY: Gauge "llorch_agent_pool_ready" ["pool_id"] "1 while the pool takes requests.";
    POOL_SLOTS: Gauge "llorch_agent_pool_slots" ["pool_id"] "Slots of the pool.";
    POOL_SLOTS_FREE: Gauge "llorch_agent_pool_slots_free" ["pool_id"] "Slots that a request could take now.";
    POOL_SLOTS_FOREIGN: Gauge "llorch_agent_pool_slots_foreign" ["pool_id"] "Slots busy with requests that are not ours.";
    GPU_VRAM_USED: Gauge "llorch_agent_gpu_vram_used_bytes" ["device_id"] "Memory in use on the GPU.";
    GPU_VRAM_TOTAL: Gauge "llorch_agent_gpu_vram_total_bytes" ["device_id"] "Memory of the GPU.";
}

/// What was called otherwise in the release before, and is shown under that name for one release more. Names
/// that are the control plane's by now are not among them: one name has one meaning.
pub(crate) const RENAMED: &[(&str, &str)] = &[
    ("llorch_agent_attempts_accepted_total", "llorch_node_attempts_accepted_total"),
    ("llorch_agent_attempts_refused_total", "llorch_node_attempts_refused_total"),
    ("llorch_agent_attempts_finished_total", "llorch_node_attempts_finished_total"),
    ("llorch_agent_attempts_failed_total", "llorch_node_attempts_failed_total"),
    ("llorch_agent_attempts_canceled_total", "llorch_node_attempts_canceled_total"),
    ("llorch_agent_tokens_total", "llorch_node_tokens_total"),
    ("llorch_agent_attempts_running", "llorch_node_attempts_running"),
    ("llorch_agent_held_bytes", "llorch_held_bytes"),
    ("llorch_agent_held_attempts", "llorch_held_attempts"),
    ("llorch_agent_registered", "llorch_node_registered"),
    ("llorch_agent_handoffs_faulty", "llorch_node_handoffs_faulty"),
    ("llorch_agent_pool_ready", "llorch_pool_ready"),
    ("llorch_agent_pool_slots_foreign", "llorch_pool_slots_foreign"),
];

pub(crate) fn page(agent: &Agent) -> Page {
    let (identity, counters) = (agent.identity(), agent.counters());
    let mut page = Page::of_node(identity.node_id.as_str(), RENAMED);
    for (family, value) in [
        (&ATTEMPTS_ACCEPTED, counters.accepted),
        (&ATTEMPTS_REFUSED, counters.refused),
        (&ATTEMPTS_FINISHED, counters.finished),
        (&ATTEMPTS_FAILED, counters.failed),
        (&ATTEMPTS_CANCELED, counters.canceled),
        (&TOKENS, counters.tokens),
    ] {
        page.counter(family, &[], value);
    }
    page.gauge(&ATTEMPTS_RUNNING, &[], agent.running() as f64);
    page.gauge(&HELD_BYTES, &[], agent.held_bytes() as f64);
    page.gauge(&HELD_ATTEMPTS, &[], agent.held_attempts() as f64);
    page.gauge(&REGISTERED, &[], f64::from(u8::from(agent.session_problem().is_none())));
    page.gauge(&HANDOFFS_FAULTY, &[], agent.problems().len() as f64);
    for pool in agent.pools() {
        let labels = [pool.pool_id.as_str()];
        let sum = |of: fn(&ReplicaReport) -> u32| pool.replicas.iter().map(|r| f64::from(of(r))).sum();
        page.gauge(&POOL_READY, &labels, f64::from(u8::from(pool.ready)));
        page.gauge(&POOL_SLOTS, &labels, sum(|r| r.slots_total));
        page.gauge(&POOL_SLOTS_FREE, &labels, sum(|r| r.slots_free));
        page.gauge(&POOL_SLOTS_FOREIGN, &labels, sum(|r| r.slots_foreign));
    }
    for gpu in agent.gpus().iter().filter(|gpu| gpu.memory != GpuMemory::Unknown) {
        let device = gpu.device_id.to_string();
        page.gauge(&GPU_VRAM_USED, &[&device], gpu.vram_used_bytes as f64);
        page.gauge(&GPU_VRAM_TOTAL, &[&device], gpu.vram_total_bytes as f64);
    }
    page
}
