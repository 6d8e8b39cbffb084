//! The control plane's numbers as Prometheus samples.

use daemon_kit::metrics::Page;
use pool_registry_types::node::Liveness;
use pool_registry_types::snapshot::ClusterSnapshot;
use pool_registry_types::task::Priority;
use pool_registry_types::view::LinkState;

use crate::services::link::LinkTable;
use crate::services::published::{AllPaces, Facts};

fn liveness(liveness: Liveness) -> &'static str {
    match liveness {
        Liveness::Online => "online",
        Liveness::Suspect => "suspect",
        Liveness::Offline => "offline",
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
        let labels = [("node_id", node_id.as_str()), ("state", link_state(state))];
        page.gauge("llorch_links", "1 for how the link to the node stands.", &labels, 1.0);
    }
    for (name, help, value) in [
        ("llorch_link_resumes_total", "Times that an interrupted link came up again.", links.resumes()),
        (
            "llorch_link_interrupted_seconds_total",
            "Length of all interruptions of links that are over.",
            links.interrupted_seconds(),
        ),
        (
            "llorch_link_records_dropped_total",
            "Records of attempts that nobody waits for any more.",
            links.dropped_records(),
        ),
    ] {
        page.counter(name, help, &[], value);
    }
}

/// Memory that clients fill, as its settings bound it.
pub(crate) fn held(page: &mut Page, queue_bytes: usize, live_log_bytes: usize, held_answer_bytes: usize) {
    let help = "Bytes of requests that are read or wait for an engine.";
    page.gauge("llorch_queue_bytes", help, &[], queue_bytes as f64);
    let help = "Bytes of the streams of tasks that have not ended, and of others that are read still.";
    page.gauge("llorch_live_log_bytes", help, &[], live_log_bytes as f64);
    let help = "Bytes of answers under /v1 that are held back until they are whole.";
    page.gauge("llorch_held_answer_bytes", help, &[], held_answer_bytes as f64);
}

pub(crate) fn page(
    facts: &Facts,
    paces: &AllPaces,
    view: &ClusterSnapshot,
    links: Option<&LinkTable>,
) -> Page {
    let mut page = Page::new();
    let c = &facts.counters;
    let own_shortages = c.own_shortages + links.map_or(0, LinkTable::own_shortages);
    for (name, help, value) in [
        ("llorch_tasks_submitted_total", "Tasks taken in.", c.submitted),
        ("llorch_tasks_rejected_total", "Tasks refused at admission.", c.rejected),
        ("llorch_tasks_completed_total", "Tasks that ended well.", c.completed),
        ("llorch_tasks_failed_total", "Tasks that ended with an error.", c.failed),
        ("llorch_tasks_canceled_total", "Tasks ended by their clients.", c.canceled),
        (
            "llorch_tasks_reset_total",
            "Tasks lost with their node or engine after tokens had been sent.",
            c.worker_resets,
        ),
        ("llorch_dispatches_total", "Attempts sent to nodes.", c.dispatched),
        ("llorch_dispatches_refused_total", "Attempts that nodes did not take.", c.refused_dispatches),
        (
            "llorch_replacements_total",
            "Attempts that failed without a token and were placed again.",
            c.replaced,
        ),
        (
            "llorch_attempts_moved_total",
            "Attempts taken from nodes that said nothing and could not be dialled, before their time was up.",
            c.moved,
        ),
        ("llorch_registrations_total", "Registrations of nodes.", c.registrations),
        ("llorch_reports_ignored_total", "Reports with an old number.", c.old_reports),
        ("llorch_attempts_vanished_total", "Attempts that their node no longer listed.", c.vanished),
        ("llorch_attempts_orphaned_total", "Attempts of nodes that were not known here.", c.orphans),
        ("llorch_continuations_total", "Attempts that went on after tokens of a lost one.", c.continued),
        (
            "llorch_replays_differed_total",
            "Replays that did not begin with what had been sent.",
            c.replays_differed,
        ),
        ("llorch_tasks_dropped_total", "Tasks dropped from a full queue for newer ones.", c.dropped),
        (
            "llorch_breaker_trips_total",
            "Times that a pool or a node was left alone for its failures.",
            c.trips,
        ),
        (
            "llorch_pool_loads_asked_total",
            "Times that a node was asked to start the engines of a pool.",
            c.loads,
        ),
        (
            "llorch_node_denials_total",
            "Attempts that nodes refused for the control plane's token.",
            c.denials,
        ),
        (
            "llorch_task_culprits_total",
            "Tasks that were ended because each alone brought an engine down.",
            c.culprits,
        ),
        (
            "llorch_own_shortages_total",
            "Connections that could not be made for want of descriptors, ports or memory here.",
            own_shortages,
        ),
        ("llorch_control_stalls_total", "Times that the control loop stood still.", c.stalls),
        ("llorch_mass_silences_total", "Times that most nodes fell silent at once.", c.mass_silences),
    ] {
        page.counter(name, help, &[], value);
    }
    if let Some(links) = links {
        links_of(&mut page, links);
    }
    for (state, count) in &facts.nodes {
        page.gauge(
            "llorch_nodes",
            "Nodes by liveness.",
            &[("liveness", liveness(*state))],
            f64::from(*count),
        );
    }
    for (model, priority, depth) in &facts.queues {
        let priority = match priority {
            Priority::Interactive => "interactive",
            Priority::Batch => "batch",
        };
        let labels = [("model", model.as_str()), ("priority", priority)];
        page.gauge("llorch_queue_tasks", "Tasks that wait for a slot.", &labels, *depth as f64);
    }
    page.gauge("llorch_sessions", "Sessions that are known.", &[], facts.sessions as f64);
    for (pool, pace) in paces {
        let labels = [("node_id", pool.node_id.as_str()), ("pool_id", pool.pool_id.as_str())];
        page.gauge("llorch_pool_tokens_per_second", "Measured pace of one slot.", &labels, *pace);
    }
    page.gauge("llorch_attempts_running", "Attempts under way.", &[], facts.running as f64);
    page.gauge(
        "llorch_control_suspects_itself",
        "1 while most nodes are silent at once.",
        &[],
        f64::from(u8::from(facts.mass_silence)),
    );
    for (node, age_ms) in view.nodes() {
        let id = node.node_id.as_str();
        let age = age_ms as f64 / 1e3;
        page.gauge(
            "llorch_node_evidence_age_seconds",
            "Since the node's last heartbeat or token.",
            &[("node_id", id)],
            age,
        );
        for pool in &node.pools {
            let labels = [("node_id", id), ("pool_id", pool.report.pool_id.as_str())];
            page.gauge("llorch_pool_slots", "Slots of the pool.", &labels, f64::from(pool.slots_total));
            page.gauge(
                "llorch_pool_slots_free",
                "Slots that a task could take.",
                &labels,
                f64::from(pool.slots_free),
            );
        }
    }
    page
}
