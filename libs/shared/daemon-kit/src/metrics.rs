//! A page of Prometheus text: samples of what is now, made anew from the facts at each scrape, beside what is
//! counted while it happens.
//!
//! A sample's series is gone with its subject, and no sample can be stale. Each name is a [`Family`] of a
//! table, from which `contracts/metrics.md` is made.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::auth::Tokens;
use crate::calls::Calls;
use crate::connections::Counts;
use crate::telemetry;
use crate::tls::OwnCertificate;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Encoder, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry, TextEncoder,
};

/// What the numbers of a family mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// All series of one name.
#[derive(Debug)]
pub struct Family {
    /// As the control plane says it. A node says `llorch_agent_` where this begins with `llorch_`.
    pub name: &'static str,
    pub kind: Kind,
    pub help: &'static str,
    /// In the order of a sample's values. A node has `node_id` before them.
    pub labels: &'static [&'static str],
    /// Upper bounds of a histogram's buckets, seconds.
    pub buckets: &'static [f64],
}

/// Seconds of calls and of what tasks wait for: 1 ms to 10 minutes.
pub const LONG: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
    600.0,
];
/// Seconds of what is decided or passed on: 10 µs to 2.5 s.
pub const SHORT: &[f64] = &[
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
    1.0, 2.5,
];

/// Makes a constant of each family, and the table of them all.
#[macro_export]
macro_rules! metric_families {
    ($(#[$about:meta])* $table:ident; $($constant:ident: $kind:ident $name:literal [$($label:literal),*] $($buckets:ident)? $help:literal;)*) => {
        $(pub(crate) const $constant: $crate::metrics::Family = $crate::metrics::Family {
            name: $name,
            kind: $crate::metrics::Kind::$kind,
            help: $help,
            labels: &[$($label),*],
            buckets: $crate::metric_families!(@ $($buckets)?),
        };)*
        $(#[$about])*
        pub const $table: &[&$crate::metrics::Family] = &[$(&$constant),*];
    };
    (@) => { &[] };
    (@ $buckets:ident) => { $crate::metrics::$buckets };
}

metric_families! {
    /// What both daemons say of their edges and their processes.
    COMMON;
    HTTP_REQUEST_DURATION: Histogram "llorch_http_request_duration_seconds" ["route", "method", "status"] LONG "From the head of a request to the head of its answer.";
    REFUSED_CALLS: Counter "llorch_refused_calls_total" ["code", "route"] "Calls that were refused for whoever made them: without a good token, a scope or a certificate, or too often.";
    CLOSED_CONNECTIONS: Counter "llorch_closed_connections_total" ["why"] "Connections that were closed.";
    LONGEST_POLL: Gauge "llorch_longest_poll_seconds" [] "CPU time of the longest turn on a thread for streams, of one in 64.";
    LOG_LINES_LOST: Counter "llorch_log_lines_lost_total" [] "Lines of the log that standard error did not take.";
    SPANS_LOST: Counter "llorch_spans_lost_total" [] "Spans that no collector has: it was away, too slow, or refused them.";
    CERTIFICATE_EXPIRY: Gauge "llorch_certificate_expiry_seconds" [] "Until this daemon's certificate expires; negative once it has.";
    TOKEN_EXPIRY: Gauge "llorch_token_expiry_seconds" [] "Until the next of this daemon's tokens expires, where one does. `orchestratord token check FILE` says which.";
    BUILD_INFO: Gauge "llorch_build_info" ["version"] "1 for the version that runs.";
}

impl Family {
    /// Of the values of its labels, kept by whoever counts.
    pub fn counter(&self) -> IntCounterVec {
        let vec = IntCounterVec::new(Opts::new(self.name, self.help), self.labels);
        vec.expect("a well-formed family of a table")
    }

    /// The same of a histogram.
    pub fn histogram(&self) -> HistogramVec {
        let options = HistogramOpts::new(self.name, self.help).buckets(self.buckets.to_vec());
        HistogramVec::new(options, self.labels).expect("a well-formed family of a table")
    }

    fn gauge(&self) -> GaugeVec {
        GaugeVec::new(Opts::new(self.name, self.help), self.labels).expect("a well-formed family of a table")
    }
}

const CLUSTER_PREFIX: &str = "llorch_";
const AGENT_PREFIX: &str = "llorch_agent_";

/// Under which name a node shows a family: what it says of itself is not what the control plane says of it.
fn agent_name(name: &str) -> String {
    match name.strip_prefix(CLUSTER_PREFIX) {
        Some(rest) if !name.starts_with(AGENT_PREFIX) => format!("{AGENT_PREFIX}{rest}"),
        _ => name.to_owned(),
    }
}

/// Collects samples and renders them.
#[derive(Debug, Default)]
pub struct Page {
    registry: Registry,
    counters: BTreeMap<&'static str, IntCounterVec>,
    gauges: BTreeMap<&'static str, GaugeVec>,
    /// Of a node: names with those that they had before, under which they are shown too.
    renamed: Option<&'static [(&'static str, &'static str)]>,
}

impl Page {
    /// The control plane's.
    pub fn new() -> Self {
        Self::default()
    }

    /// A node's: each series has its id. `renamed`: names as they are now, with what they were before.
    pub fn of_node(node_id: &str, renamed: &'static [(&'static str, &'static str)]) -> Self {
        let labels = [("node_id".to_owned(), node_id.to_owned())].into();
        let registry = Registry::new_custom(None, Some(labels)).expect("a well-formed label");
        Self { registry, renamed: Some(renamed), ..Self::default() }
    }

    /// Adds to a counter. The values are those of its labels, in their order.
    pub fn counter(&mut self, family: &Family, labels: &[&str], value: u64) -> &mut Self {
        let registry = &self.registry;
        let vec = self.counters.entry(family.name).or_insert_with(|| {
            let vec = family.counter();
            registry.register(Box::new(vec.clone())).expect("each name once");
            vec
        });
        vec.with_label_values(labels).inc_by(value);
        self
    }

    /// Sets a gauge.
    pub fn gauge(&mut self, family: &Family, labels: &[&str], value: f64) -> &mut Self {
        // A sum of no numbers is -0: readers are shown 0.
        self.series(family, labels).set(value + 0.0);
        self
    }

    /// Adds to a gauge, where several of what is told apart elsewhere are one series here.
    pub fn add(&mut self, family: &Family, labels: &[&str], value: f64) -> &mut Self {
        self.series(family, labels).add(value);
        self
    }

    fn series(&mut self, family: &Family, labels: &[&str]) -> prometheus::Gauge {
        let registry = &self.registry;
        let vec = self.gauges.entry(family.name).or_insert_with(|| {
            let vec = family.gauge();
            registry.register(Box::new(vec.clone())).expect("each name once");
            vec
        });
        vec.with_label_values(labels)
    }

    /// Shows what is counted elsewhere.
    pub fn held<C: Collector + Clone + 'static>(&mut self, collector: &C) -> &mut Self {
        self.registry.register(Box::new(collector.clone())).expect("each name once");
        self
    }

    /// What the daemon's edge has answered and turned away.
    pub fn edge(&mut self, calls: &Calls, connections: &Counts) -> &mut Self {
        self.held(&calls.durations).held(&calls.refused);
        let load = |of: &AtomicU64| of.load(Ordering::Relaxed);
        let closed = [
            ("over_limit", &connections.over_limit),
            ("made_room", &connections.made_room),
            ("failed_handshake", &connections.failed_handshakes),
            ("slow", &connections.slow),
            ("idle", &connections.idle),
            ("stalled", &connections.stalled),
        ];
        for (why, count) in closed {
            self.counter(&CLOSED_CONNECTIONS, &[why], load(count));
        }
        self
    }

    /// What is to be renewed. The tokens are the daemon's own, and those of who calls it.
    pub fn expiries(&mut self, own: Option<&OwnCertificate>, tokens: &Tokens) -> &mut Self {
        let now = Timestamp::now();
        let left = |at: Timestamp| at.duration_since(now).as_secs_f64();
        if let Some(at) = own.and_then(OwnCertificate::expires) {
            self.gauge(&CERTIFICATE_EXPIRY, &[], left(at));
        }
        if let Some(at) = tokens.next_expiry(now) {
            self.gauge(&TOKEN_EXPIRY, &[], left(at));
        }
        self
    }

    /// What the process says of itself: its longest turn, what its log has lost, and what the kernel counts.
    /// `version`: of the daemon. Blocks.
    fn process(&mut self, version: &str) -> &mut Self {
        self.gauge(&LONGEST_POLL, &[], owned_tasks::longest_poll().as_secs_f64());
        self.gauge(&BUILD_INFO, &[version], 1.0);
        self.registry.register(Box::new(ProcessCollector::for_self())).expect("each name once");
        self.counter(&SPANS_LOST, &[], span_export::lost());
        self.counter(&LOG_LINES_LOST, &[], telemetry::lines_lost())
    }

    /// In the format of Prometheus.
    pub fn text(&self) -> prometheus::Result<String> {
        let mut families = self.registry.gather();
        if let Some(renamed) = self.renamed {
            let mut before = Vec::new();
            for family in &mut families {
                family.set_name(agent_name(family.name()));
                // The registry puts the node's behind the others.
                for metric in family.mut_metric() {
                    let mut labels = metric.take_label();
                    labels.sort_by(|a, b| a.name().cmp(b.name()));
                    metric.set_label(labels);
                }
                for (_, old) in renamed.iter().filter(|(now, _)| *now == family.name()) {
                    let mut copy = family.clone();
                    copy.set_name((*old).to_owned());
                    before.push(copy);
                }
            }
            families.extend(before);
        }
        TextEncoder::new().encode_to_string(&families)
    }

    /// The answer to `GET /metrics` of a daemon of this version. The kernel is asked of the process, which may
    /// take its time: on a thread that may wait.
    pub async fn render(mut self, version: &'static str) -> Response {
        let text = owned_tasks::blocking("metrics", move || self.process(version).text()).await;
        match text.map_err(|panicked| panicked.to_string()).and_then(|text| text.map_err(|e| e.to_string())) {
            Ok(text) => {
                let kind = TextEncoder::new().format_type().to_owned();
                ([(header::CONTENT_TYPE, kind)], text).into_response()
            }
            Err(error) => {
                tracing::error!(error, "the metrics cannot be encoded");
                axum::http::StatusCode::INTERNAL_SERVER_ERROR.into_response()
            }
        }
    }
}

/// The part of `contracts/metrics.md` that is a daemon's: its own families and those of both daemons.
/// `renamed`: as [`Page::of_node`] has them; nothing for the control plane.
pub fn document(
    daemon: &str,
    families: &[&Family],
    renamed: Option<&[(&'static str, &'static str)]>,
) -> String {
    let mut all: Vec<&&Family> = families.iter().chain(COMMON).collect();
    all.sort_by_key(|family| family.name);
    let mut text = format!("## `{daemon}`\n\n| Name | Kind | Labels | Meaning |\n|---|---|---|---|\n");
    for family in all {
        let (name, node_id) = match renamed {
            Some(_) => (agent_name(family.name), Some("node_id")),
            None => (family.name.to_owned(), None),
        };
        let labels: Vec<String> =
            node_id.iter().chain(family.labels).map(|label| format!("`{label}`")).collect();
        let (kind, help) = (family.kind.as_str(), family.help);
        // Writing to text cannot fail.
        let _ = writeln!(text, "| `{name}` | {kind} | {} | {help} |", labels.join(", "));
    }
    for (now, old) in renamed.into_iter().flatten() {
        let _ = writeln!(text, "| `{old}` | | | Until the next release, for `{now}`. |");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Family = Family { name: "llorch_a", kind: Kind::Gauge, help: "A.", labels: &[], buckets: &[] };
    const B: Family =
        Family { name: "llorch_b", kind: Kind::Gauge, help: "B.", labels: &["of"], buckets: &[] };

    // CLOUD-3010
    #[test]
    fn a_gauge_shows_no_negative_zero() {
        let mut page = Page::new();
        page.gauge(&A, &[], -0.0).gauge(&B, &["x"], -1.5).add(&B, &["x"], -1.0);
        let text = page.text().unwrap();
        assert!(text.contains("\nllorch_a 0\n") && text.contains("\nllorch_b{of=\"x\"} -2.5\n"), "{text}");
    }

    // CLOUD-2711
    #[test]
    fn what_a_node_says_of_itself_has_its_id_and_a_name_of_its_own_and_what_was_renamed_stands_beside() {
        let mut page = Page::of_node("n1", &[("llorch_agent_a", "llorch_node_a")]);
        page.gauge(&A, &[], 1.0).gauge(&B, &["x"], 2.0);
        page.edge(&Calls::default(), &Counts::default()).process("1.2.3");
        let text = page.text().unwrap();
        for line in [
            "llorch_agent_a{node_id=\"n1\"} 1",
            "llorch_node_a{node_id=\"n1\"} 1",
            "llorch_agent_b{node_id=\"n1\",of=\"x\"} 2",
            "llorch_agent_closed_connections_total{node_id=\"n1\",why=\"idle\"} 0",
            "llorch_agent_build_info{node_id=\"n1\",version=\"1.2.3\"} 1",
            "# TYPE process_resident_memory_bytes gauge",
        ] {
            assert!(text.lines().any(|has| has == line), "{line}: {text}");
        }
        let mut samples = text.lines().filter(|line| !line.starts_with('#'));
        assert!(samples.all(|line| line.contains("node_id=\"n1\"")), "{text}");
        let document = document("pool-managerd", &[&B], Some(&[("llorch_agent_b", "llorch_old_b")]));
        assert!(document.contains("| `llorch_agent_b` | gauge | `node_id`, `of` | B. |\n"), "{document}");
        assert!(document.contains("`llorch_old_b`") && document.contains("`llorch_agent_build_info`"));
    }
}
