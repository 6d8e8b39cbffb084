//! A page of Prometheus text, made anew from the facts at each scrape.
//!
//! Nothing is kept between scrapes, so a series whose subject is gone is gone too, and no
//! number can be stale.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::auth::Refusals;
use crate::connections::Counts;
use crate::telemetry;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use prometheus::{Encoder, GaugeVec, IntCounterVec, Opts, Registry, TextEncoder};

/// Collects samples and renders them.
#[derive(Debug, Default)]
pub struct Page {
    registry: Registry,
    counters: BTreeMap<&'static str, IntCounterVec>,
    gauges: BTreeMap<&'static str, GaugeVec>,
}

type Labels<'a> = [(&'static str, &'a str)];

impl Page {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a sample of a counter; `name` ends with `_total`. Label names are the same for all
    /// samples of one name.
    pub fn counter(&mut self, name: &'static str, help: &str, labels: &Labels<'_>, value: u64) -> &mut Self {
        let registry = &self.registry;
        let vec = self.counters.entry(name).or_insert_with(|| {
            let vec =
                IntCounterVec::new(Opts::new(name, help), &names(labels)).expect("a well-formed metric name");
            registry.register(Box::new(vec.clone())).expect("each name once");
            vec
        });
        vec.with_label_values(&values(labels)).inc_by(value);
        self
    }

    /// Adds a sample of a gauge.
    pub fn gauge(&mut self, name: &'static str, help: &str, labels: &Labels<'_>, value: f64) -> &mut Self {
        let registry = &self.registry;
        let vec = self.gauges.entry(name).or_insert_with(|| {
            let vec =
                GaugeVec::new(Opts::new(name, help), &names(labels)).expect("a well-formed metric name");
            registry.register(Box::new(vec.clone())).expect("each name once");
            vec
        });
        // A sum of no numbers is -0: readers are shown 0.
        vec.with_label_values(&values(labels)).set(value + 0.0);
        self
    }

    /// What the daemon's edge has turned away. `labels` are those of the daemon.
    pub fn edge(&mut self, refusals: &Refusals, connections: &Counts, labels: &Labels<'_>) -> &mut Self {
        let load = |of: &AtomicU64| of.load(Ordering::Relaxed);
        for (code, count) in refusals.all() {
            let labels = [labels, &[("code", code.as_str())]].concat();
            self.counter("llorch_refused_calls_total", "Calls that were not let through.", &labels, count);
        }
        let closed = [
            ("over_limit", &connections.over_limit),
            ("made_room", &connections.made_room),
            ("failed_handshake", &connections.failed_handshakes),
            ("slow", &connections.slow),
            ("idle", &connections.idle),
            ("stalled", &connections.stalled),
        ];
        for (why, count) in closed {
            let labels = [labels, &[("why", why)]].concat();
            self.counter(
                "llorch_closed_connections_total",
                "Connections that were closed.",
                &labels,
                load(count),
            );
        }
        self
    }

    /// What the process says of itself: its longest turn, and what its log has lost. `labels` are those of
    /// the daemon.
    pub fn process(&mut self, labels: &Labels<'_>) -> &mut Self {
        self.gauge(
            "llorch_longest_poll_seconds",
            "CPU time of the longest turn on a thread for streams, of one in 64.",
            labels,
            owned_tasks::longest_poll().as_secs_f64(),
        );
        self.counter(
            "llorch_log_lines_lost_total",
            "Lines of the log that standard error did not take.",
            labels,
            telemetry::lines_lost(),
        )
    }

    /// The answer to `GET /metrics`.
    pub fn render(&self) -> Response {
        let encoder = TextEncoder::new();
        let mut text = Vec::new();
        match encoder.encode(&self.registry.gather(), &mut text) {
            Ok(()) => ([(header::CONTENT_TYPE, encoder.format_type().to_owned())], text).into_response(),
            Err(error) => {
                tracing::error!(%error, "the metrics cannot be encoded");
                axum::http::StatusCode::INTERNAL_SERVER_ERROR.into_response()
            }
        }
    }
}

fn names(labels: &Labels<'_>) -> Vec<&'static str> {
    labels.iter().map(|(name, _)| *name).collect()
}

fn values<'a>(labels: &Labels<'a>) -> Vec<&'a str> {
    labels.iter().map(|(_, value)| *value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-3010
    #[tokio::test]
    async fn a_gauge_shows_no_negative_zero() {
        let mut page = Page::new();
        page.gauge("llorch_a", "A.", &[], -0.0).gauge("llorch_b", "B.", &[], -1.5);
        let body = axum::body::to_bytes(page.render().into_body(), 4096).await.unwrap();
        let text = String::from_utf8(body.to_vec()).unwrap();
        assert!(text.contains("\nllorch_a 0\n") && text.contains("\nllorch_b -1.5\n"), "{text}");
    }
}
