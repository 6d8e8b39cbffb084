//! The dashboards of Grafana in `deploy/grafana/dashboards`, made from the tables here.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::steps::{Failed, read, root};

/// One picture: its title, its unit, and what it asks, each with how a series is named.
struct Panel(&'static str, Unit, &'static [(&'static str, &'static str)]);

#[derive(Clone, Copy)]
enum Unit {
    Number,
    PerSecond,
    Seconds,
    Bytes,
    Share,
    Celsius,
    Watts,
}

impl Unit {
    /// As Grafana calls it.
    fn name(self) -> &'static str {
        match self {
            Self::Number => "short",
            Self::PerSecond => "ops",
            Self::Seconds => "s",
            Self::Bytes => "bytes",
            Self::Share => "percentunit",
            Self::Celsius => "celsius",
            Self::Watts => "watt",
        }
    }
}

/// A dashboard: its name and title, and the variables that its panels have.
struct Dashboard {
    name: &'static str,
    title: &'static str,
    /// A variable's name, and the series and the label whose values it has.
    variables: &'static [(&'static str, &'static str, &'static str)],
    panels: &'static [Panel],
}

const DASHBOARDS: [Dashboard; 4] = [
    Dashboard { name: "cluster", title: "llama-orch: cluster", variables: &[], panels: CLUSTER },
    Dashboard {
        name: "node",
        title: "llama-orch: node",
        variables: &[("node", "llorch_node_up", "node_id")],
        panels: NODE,
    },
    Dashboard {
        name: "model",
        title: "llama-orch: model",
        variables: &[("model", "llorch_tasks_ended_total", "model")],
        panels: MODEL,
    },
    Dashboard { name: "slo", title: "llama-orch: service levels", variables: &[], panels: SLO },
];

const CLUSTER: &[Panel] = &[
    Panel(
        "Nodes",
        Unit::Number,
        &[("sum by (liveness) (llorch_nodes)", "{{liveness}}"), ("count(llorch_node_expected)", "expected")],
    ),
    Panel(
        "Slots",
        Unit::Number,
        &[
            ("sum(llorch_pool_slots)", "slots"),
            ("sum(llorch_pool_slots_free)", "free"),
            ("llorch_attempts_running", "attempts running"),
        ],
    ),
    Panel(
        "Tokens",
        Unit::PerSecond,
        &[
            ("sum by (model) (rate(llorch_tokens_out_total[$__rate_interval]))", "out, {{model}}"),
            ("sum by (model) (rate(llorch_tokens_in_total[$__rate_interval]))", "in, {{model}}"),
        ],
    ),
    Panel(
        "Ended tasks",
        Unit::PerSecond,
        &[(
            "sum by (outcome, code, fault) (rate(llorch_tasks_ended_total[$__rate_interval]))",
            "{{outcome}} {{code}} ({{fault}})",
        )],
    ),
    Panel(
        "Waiting tasks",
        Unit::Number,
        &[
            ("sum by (model, priority) (llorch_queue_tasks)", "{{model}}, {{priority}}"),
            ("llorch_tasks_unplaceable", "for what no node has"),
        ],
    ),
    Panel(
        "Oldest waiting task",
        Unit::Seconds,
        &[("llorch_tasks_oldest_waiting_seconds", "since its admission")],
    ),
    Panel(
        "Admission",
        Unit::PerSecond,
        &[
            ("rate(llorch_tasks_submitted_total[$__rate_interval])", "submitted"),
            ("rate(llorch_tasks_rejected_total[$__rate_interval])", "rejected"),
            ("rate(llorch_queue_full_total[$__rate_interval])", "rejected for a full queue"),
            ("rate(llorch_tasks_dropped_total[$__rate_interval])", "dropped"),
            ("rate(llorch_tasks_completed_total[$__rate_interval])", "completed"),
            ("rate(llorch_tasks_failed_total[$__rate_interval])", "failed"),
            ("rate(llorch_tasks_canceled_total[$__rate_interval])", "canceled"),
            ("rate(llorch_tasks_reset_total[$__rate_interval])", "lost after tokens"),
        ],
    ),
    Panel(
        "Attempts",
        Unit::PerSecond,
        &[
            ("rate(llorch_dispatches_total[$__rate_interval])", "sent"),
            ("rate(llorch_dispatches_refused_total[$__rate_interval])", "not taken"),
            ("rate(llorch_replacements_total[$__rate_interval])", "placed again"),
            ("rate(llorch_continuations_total[$__rate_interval])", "continued"),
            ("rate(llorch_attempts_moved_total[$__rate_interval])", "moved"),
            ("rate(llorch_attempts_vanished_total[$__rate_interval])", "vanished"),
            ("rate(llorch_attempts_orphaned_total[$__rate_interval])", "orphaned"),
            ("rate(llorch_replays_differed_total[$__rate_interval])", "replays that differed"),
        ],
    ),
    Panel(
        "Placement and hop, p99",
        Unit::Seconds,
        &[
            (
                "histogram_quantile(0.99, sum by (le) (rate(llorch_placement_seconds_bucket[$__rate_interval])))",
                "placement",
            ),
            (
                "histogram_quantile(0.99, sum by (le) (rate(llorch_hop_seconds_bucket[$__rate_interval])))",
                "hop",
            ),
        ],
    ),
    Panel(
        "Control plane",
        Unit::Number,
        &[
            ("increase(llorch_control_stalls_total[$__rate_interval])", "stalls"),
            ("increase(llorch_mass_silences_total[$__rate_interval])", "mass silences"),
            ("llorch_control_suspects_itself", "suspects itself"),
            ("increase(llorch_own_shortages_total[$__rate_interval])", "own shortages"),
            ("increase(llorch_log_lines_lost_total[$__rate_interval])", "log lines lost"),
            ("increase(llorch_spans_lost_total[$__rate_interval])", "spans lost"),
            ("llorch_sessions", "sessions"),
            ("llorch_build_info", "version {{version}}"),
        ],
    ),
    Panel(
        "Membership",
        Unit::Number,
        &[
            ("increase(llorch_registrations_total[$__rate_interval])", "registrations"),
            ("increase(llorch_reports_ignored_total[$__rate_interval])", "reports ignored"),
            ("increase(llorch_node_denials_total[$__rate_interval])", "refused by nodes"),
            ("increase(llorch_breaker_trips_total[$__rate_interval])", "breaker trips"),
            ("increase(llorch_task_culprits_total[$__rate_interval])", "tasks that bring engines down"),
            ("increase(llorch_pool_loads_asked_total[$__rate_interval])", "loads asked for"),
        ],
    ),
    Panel(
        "Links",
        Unit::Number,
        &[
            ("sum by (state) (llorch_links)", "{{state}}"),
            ("increase(llorch_link_resumes_total[$__rate_interval])", "resumed"),
            ("increase(llorch_link_interrupted_seconds_total[$__rate_interval])", "seconds interrupted"),
            ("increase(llorch_link_records_dropped_total[$__rate_interval])", "records dropped"),
        ],
    ),
    Panel(
        "Memory",
        Unit::Bytes,
        &[
            ("llorch_queue_bytes", "requests"),
            ("llorch_live_log_bytes", "live streams"),
            ("llorch_held_answer_bytes", "answers held back"),
            ("process_resident_memory_bytes{job=\"orchestratord\"}", "resident"),
        ],
    ),
    Panel(
        "Calls, p99",
        Unit::Seconds,
        &[(
            "histogram_quantile(0.99, sum by (route, method, le) (rate(llorch_http_request_duration_seconds_bucket[$__rate_interval])))",
            "{{method}} {{route}}",
        )],
    ),
    Panel(
        "Refused calls and closed connections",
        Unit::PerSecond,
        &[
            (
                "sum by (code, route) (rate(llorch_refused_calls_total[$__rate_interval]))",
                "{{code}} {{route}}",
            ),
            ("sum by (why) (rate(llorch_closed_connections_total[$__rate_interval]))", "closed: {{why}}"),
        ],
    ),
    Panel(
        "Longest turn of a thread for streams",
        Unit::Seconds,
        &[("llorch_longest_poll_seconds", "CPU time")],
    ),
    Panel(
        "To be renewed in",
        Unit::Seconds,
        &[
            ("llorch_certificate_expiry_seconds", "certificate of {{instance}}"),
            ("llorch_token_expiry_seconds", "the first token"),
        ],
    ),
];

const NODE: &[Panel] = &[
    Panel(
        "Up",
        Unit::Number,
        &[
            ("llorch_node_up{node_id=~\"$node\"}", "{{node_id}}, {{liveness}}"),
            ("llorch_agent_registered{node_id=~\"$node\"}", "{{node_id}}, as it says"),
            ("llorch_agent_build_info{node_id=~\"$node\"}", "{{node_id}}, version {{version}}"),
        ],
    ),
    Panel(
        "Since its last sign",
        Unit::Seconds,
        &[
            ("llorch_node_heartbeat_age_seconds{node_id=~\"$node\"}", "{{node_id}}, heartbeat"),
            ("llorch_heartbeat_interval_seconds", "between two heartbeats"),
            ("llorch_node_evidence_age_seconds{node_id=~\"$node\"}", "{{node_id}}, heartbeat or token"),
        ],
    ),
    Panel(
        "Pools",
        Unit::Number,
        &[
            ("llorch_pool_state{node_id=~\"$node\"}", "{{pool_id}}: {{state}}"),
            ("llorch_agent_pool_ready{node_id=~\"$node\"}", "{{pool_id}}: ready, as the node says"),
        ],
    ),
    Panel(
        "Slots",
        Unit::Number,
        &[
            ("llorch_agent_pool_slots{node_id=~\"$node\"}", "{{pool_id}}: slots"),
            ("llorch_agent_pool_slots_free{node_id=~\"$node\"}", "{{pool_id}}: free"),
            ("llorch_agent_pool_slots_foreign{node_id=~\"$node\"}", "{{pool_id}}: busy with others"),
        ],
    ),
    Panel(
        "Pace of one slot",
        Unit::PerSecond,
        &[("llorch_pool_tokens_per_second{node_id=~\"$node\"}", "{{pool_id}}")],
    ),
    Panel(
        "Engines",
        Unit::Number,
        &[
            ("llorch_engine_up{node_id=~\"$node\"}", "{{pool_id}}/{{replica_id}} up"),
            (
                "increase(llorch_engine_restarts_total{node_id=~\"$node\"}[$__rate_interval])",
                "{{pool_id}} restarts",
            ),
            ("llorch_agent_handoffs_faulty{node_id=~\"$node\"}", "handoffs that bind nothing"),
        ],
    ),
    Panel(
        "Loading an engine",
        Unit::Seconds,
        &[("llorch_engine_load_seconds{node_id=~\"$node\"}", "{{pool_id}}")],
    ),
    Panel(
        "Attempts",
        Unit::PerSecond,
        &[
            ("rate(llorch_agent_attempts_accepted_total{node_id=~\"$node\"}[$__rate_interval])", "accepted"),
            ("rate(llorch_agent_attempts_refused_total{node_id=~\"$node\"}[$__rate_interval])", "refused"),
            ("rate(llorch_agent_attempts_finished_total{node_id=~\"$node\"}[$__rate_interval])", "finished"),
            ("rate(llorch_agent_attempts_failed_total{node_id=~\"$node\"}[$__rate_interval])", "failed"),
            ("rate(llorch_agent_attempts_canceled_total{node_id=~\"$node\"}[$__rate_interval])", "canceled"),
            ("llorch_agent_attempts_running{node_id=~\"$node\"}", "running"),
            ("llorch_agent_held_attempts{node_id=~\"$node\"}", "held"),
        ],
    ),
    Panel(
        "Tokens",
        Unit::PerSecond,
        &[("rate(llorch_agent_tokens_total{node_id=~\"$node\"}[$__rate_interval])", "{{node_id}}")],
    ),
    Panel(
        "Memory of GPUs",
        Unit::Bytes,
        &[
            ("llorch_gpu_vram_used_bytes{node_id=~\"$node\"}", "GPU {{device_id}}: used"),
            ("llorch_gpu_vram_total_bytes{node_id=~\"$node\"}", "GPU {{device_id}}: all"),
            ("llorch_gpu_vram_unaccounted_bytes{node_id=~\"$node\"}", "GPU {{device_id}}: of others"),
            (
                "llorch_agent_gpu_vram_used_bytes{node_id=~\"$node\"}",
                "GPU {{device_id}}: used, as the node says",
            ),
            (
                "llorch_agent_gpu_vram_total_bytes{node_id=~\"$node\"}",
                "GPU {{device_id}}: all, as the node says",
            ),
        ],
    ),
    Panel(
        "GPUs at work",
        Unit::Share,
        &[("llorch_gpu_utilization_ratio{node_id=~\"$node\"}", "GPU {{device_id}}")],
    ),
    Panel(
        "Temperature of GPUs",
        Unit::Celsius,
        &[("llorch_gpu_temperature_celsius{node_id=~\"$node\"}", "GPU {{device_id}}")],
    ),
    Panel(
        "Power of GPUs",
        Unit::Watts,
        &[
            ("llorch_gpu_power_watts{node_id=~\"$node\"}", "GPU {{device_id}}"),
            (
                "rate(llorch_gpu_energy_joules_total{node_id=~\"$node\"}[$__rate_interval])",
                "GPU {{device_id}}, by its energy",
            ),
        ],
    ),
    Panel(
        "Health of GPUs",
        Unit::Number,
        &[("llorch_gpu_health{node_id=~\"$node\"}", "GPU {{device_id}}: {{health}}")],
    ),
    Panel(
        "Memory of the daemon",
        Unit::Bytes,
        &[
            ("llorch_agent_held_bytes{node_id=~\"$node\"}", "streams held"),
            ("process_resident_memory_bytes{node_id=~\"$node\"}", "resident"),
        ],
    ),
    Panel(
        "Its edge",
        Unit::PerSecond,
        &[
            (
                "sum by (route, method, status) (rate(llorch_agent_http_request_duration_seconds_count{node_id=~\"$node\"}[$__rate_interval]))",
                "{{method}} {{route}} {{status}}",
            ),
            (
                "sum by (code, route) (rate(llorch_agent_refused_calls_total{node_id=~\"$node\"}[$__rate_interval]))",
                "{{code}} {{route}}",
            ),
            (
                "sum by (why) (rate(llorch_agent_closed_connections_total{node_id=~\"$node\"}[$__rate_interval]))",
                "closed: {{why}}",
            ),
            (
                "rate(llorch_agent_log_lines_lost_total{node_id=~\"$node\"}[$__rate_interval])",
                "log lines lost",
            ),
            ("rate(llorch_agent_spans_lost_total{node_id=~\"$node\"}[$__rate_interval])", "spans lost"),
        ],
    ),
    Panel(
        "Longest turn of a thread for streams",
        Unit::Seconds,
        &[("llorch_agent_longest_poll_seconds{node_id=~\"$node\"}", "{{node_id}}")],
    ),
    Panel(
        "To be renewed in",
        Unit::Seconds,
        &[
            ("llorch_agent_certificate_expiry_seconds{node_id=~\"$node\"}", "certificate of {{node_id}}"),
            ("llorch_agent_token_expiry_seconds{node_id=~\"$node\"}", "the first token"),
        ],
    ),
];

const MODEL: &[Panel] = &[
    Panel(
        "Time to first token",
        Unit::Seconds,
        &[
            (
                "histogram_quantile(0.5, sum by (le) (rate(llorch_time_to_first_token_seconds_bucket{model=~\"$model\"}[$__rate_interval])))",
                "p50",
            ),
            (
                "histogram_quantile(0.99, sum by (le) (rate(llorch_time_to_first_token_seconds_bucket{model=~\"$model\"}[$__rate_interval])))",
                "p99",
            ),
        ],
    ),
    Panel(
        "Between tokens",
        Unit::Seconds,
        &[
            (
                "histogram_quantile(0.5, sum by (le) (rate(llorch_inter_token_seconds_bucket{model=~\"$model\"}[$__rate_interval])))",
                "p50",
            ),
            (
                "histogram_quantile(0.99, sum by (le) (rate(llorch_inter_token_seconds_bucket{model=~\"$model\"}[$__rate_interval])))",
                "p99",
            ),
        ],
    ),
    Panel(
        "Wait in the queue",
        Unit::Seconds,
        &[
            (
                "histogram_quantile(0.5, sum by (le) (rate(llorch_queue_wait_seconds_bucket{model=~\"$model\"}[$__rate_interval])))",
                "p50",
            ),
            (
                "histogram_quantile(0.99, sum by (le) (rate(llorch_queue_wait_seconds_bucket{model=~\"$model\"}[$__rate_interval])))",
                "p99",
            ),
        ],
    ),
    Panel(
        "Whole task",
        Unit::Seconds,
        &[
            (
                "histogram_quantile(0.5, sum by (le) (rate(llorch_task_duration_seconds_bucket{model=~\"$model\"}[$__rate_interval])))",
                "p50",
            ),
            (
                "histogram_quantile(0.99, sum by (le) (rate(llorch_task_duration_seconds_bucket{model=~\"$model\"}[$__rate_interval])))",
                "p99",
            ),
        ],
    ),
    Panel(
        "Tokens",
        Unit::PerSecond,
        &[
            (
                "sum by (model) (rate(llorch_tokens_out_total{model=~\"$model\"}[$__rate_interval]))",
                "out, {{model}}",
            ),
            (
                "sum by (model) (rate(llorch_tokens_in_total{model=~\"$model\"}[$__rate_interval]))",
                "in, {{model}}",
            ),
        ],
    ),
    Panel(
        "Ended tasks",
        Unit::PerSecond,
        &[(
            "sum by (outcome, code) (rate(llorch_tasks_ended_total{model=~\"$model\"}[$__rate_interval]))",
            "{{outcome}} {{code}}",
        )],
    ),
    Panel(
        "Waiting tasks",
        Unit::Number,
        &[("sum by (priority) (llorch_queue_tasks{model=~\"$model\"})", "{{priority}}")],
    ),
];

const SLO: &[Panel] = &[
    Panel(
        "Tasks that did not fail by our fault, last hour",
        Unit::Share,
        &[(
            "1 - (sum(rate(llorch_tasks_ended_total{fault=~\"cluster|engine\"}[1h])) or vector(0)) / sum(rate(llorch_tasks_ended_total[1h]))",
            "share",
        )],
    ),
    Panel(
        "First token within 2.5 s, last hour",
        Unit::Share,
        &[(
            "sum by (model) (rate(llorch_time_to_first_token_seconds_bucket{le=\"2.5\"}[1h])) / sum by (model) (rate(llorch_time_to_first_token_seconds_count[1h]))",
            "{{model}}",
        )],
    ),
    Panel(
        "Next token within 250 ms, last hour",
        Unit::Share,
        &[(
            "sum by (model) (rate(llorch_inter_token_seconds_bucket{le=\"0.25\"}[1h])) / sum by (model) (rate(llorch_inter_token_seconds_count[1h]))",
            "{{model}}",
        )],
    ),
    Panel(
        "Nodes there, of those expected",
        Unit::Share,
        &[("sum(llorch_node_up) / count(llorch_node_expected)", "share")],
    ),
    Panel(
        "Ended tasks by fault",
        Unit::PerSecond,
        &[("sum by (fault) (rate(llorch_tasks_ended_total[$__rate_interval]))", "{{fault}}")],
    ),
    Panel(
        "By caller",
        Unit::PerSecond,
        &[
            (
                "sum by (caller, outcome) (rate(llorch_caller_tasks_ended_total[$__rate_interval]))",
                "tasks of {{caller}}, {{outcome}}",
            ),
            (
                "sum by (caller) (rate(llorch_caller_tokens_out_total[$__rate_interval]))",
                "tokens of {{caller}}",
            ),
        ],
    ),
];

/// Columns of Grafana's grid, and those of one panel.
const COLUMNS: usize = 24;
const WIDTH: usize = 8;
const HEIGHT: usize = 8;

impl Dashboard {
    fn path(&self) -> PathBuf {
        root().join("deploy/grafana/dashboards").join(format!("{}.json", self.name))
    }

    fn text(&self) -> String {
        let source = json!({"type": "prometheus", "uid": "${datasource}"});
        let mut variables = vec![json!({"name": "datasource", "type": "datasource", "query": "prometheus"})];
        variables.extend(self.variables.iter().map(|(name, series, label)| {
            json!({"name": name, "type": "query", "datasource": source, "refresh": 2, "multi": true,
                "includeAll": true, "allValue": ".*", "current": {"text": "All", "value": "$__all"},
                "query": {"query": format!("label_values({series}, {label})"), "refId": "A"}})
        }));
        let panels: Vec<Value> =
            self.panels.iter().enumerate().map(|(n, panel)| panel.json(n, &source)).collect();
        let board = json!({"uid": format!("llorch-{}", self.name), "title": self.title, "tags": ["llama-orch"],
            "schemaVersion": 39, "version": 1, "editable": false, "timezone": "browser", "refresh": "10s",
            "time": {"from": "now-1h", "to": "now"}, "templating": {"list": variables}, "panels": panels});
        format!("{board:#}\n")
    }
}

impl Panel {
    fn json(&self, n: usize, source: &Value) -> Value {
        let Self(title, unit, queries) = self;
        let each_row = COLUMNS / WIDTH;
        let place = json!({"x": n % each_row * WIDTH, "y": n / each_row * HEIGHT, "w": WIDTH, "h": HEIGHT});
        let targets = queries.iter().zip('A'..).map(|((query, legend), letter)| {
            json!({"refId": letter.to_string(), "expr": query, "legendFormat": legend, "datasource": source})
        });
        json!({"id": n + 1, "type": "timeseries", "title": title, "gridPos": place, "datasource": source,
            "fieldConfig": {"defaults": {"unit": unit.name(), "min": 0}, "overrides": []},
            "targets": targets.collect::<Vec<_>>()})
    }
}

/// Writes the dashboards, or checks that they stand as the tables say.
pub(crate) fn run(check: bool) -> Result<(), Failed> {
    for dashboard in &DASHBOARDS {
        let (path, text) = (dashboard.path(), dashboard.text());
        if check {
            if read(&path)? != text {
                let name = dashboard.name;
                return Err(Failed(format!(
                    "the dashboard {name} is not what its table says: run `cargo xtask contracts` and commit it"
                )));
            }
        } else {
            std::fs::write(&path, text).map_err(|error| Failed(format!("{}: {error}", path.display())))?;
            println!("wrote {}", path.strip_prefix(root()).unwrap_or(&path).display());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    // CLOUD-2717
    #[test]
    fn every_family_that_a_daemon_shows_stands_in_a_panel_and_no_panel_asks_for_another() {
        let contract = std::fs::read_to_string(root().join("contracts/metrics.md")).expect("the contract");
        let rows =
            contract.lines().filter(|row| row.starts_with("| `") && !row.contains("Until the next release"));
        let shown: BTreeSet<&str> = rows.filter_map(|row| row.split('`').nth(1)).collect();
        assert!(shown.len() > 90, "{}", shown.len());
        let queries: Vec<&str> = DASHBOARDS
            .iter()
            .flat_map(|board| board.panels)
            .flat_map(|panel| panel.2)
            .map(|(query, _)| *query)
            .collect();
        let words =
            queries.iter().flat_map(|query| query.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')));
        let names = words.filter(|word| word.starts_with("llorch_"));
        let family = |name: &'static str| {
            ["_bucket", "_count", "_sum"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name)
        };
        let asked: BTreeSet<&str> = names.map(family).collect();
        let missing: Vec<_> = shown.difference(&asked).collect();
        assert_eq!(missing, Vec::<&&str>::new(), "they stand in no panel");
        assert_eq!(asked.difference(&shown).collect::<Vec<_>>(), Vec::<&&str>::new(), "no daemon shows them");
    }
}
