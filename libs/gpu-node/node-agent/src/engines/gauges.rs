//! Gauges in an engine's metrics, as Prometheus writes them.

use node_core::Busy;

use super::client::{CallError, MAX_ERROR_BYTES, Question};
use super::dialect::Look;

/// The sum of a gauge's series, as a count of requests, at most `u32::MAX`; nothing where it has
/// none. An engine that runs in several processes has one series for each.
pub(super) fn sum(metrics: &str, name: &str) -> Option<u32> {
    let values = metrics.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        // Another gauge may begin with the same name.
        let value = match rest.strip_prefix('{') {
            Some(labels) => &labels[labels.rfind('}')? + 1..],
            None => rest.strip_prefix(' ')?,
        };
        let value: f64 = value.split_whitespace().next()?.parse().ok()?;
        (value.is_finite() && value >= 0.0).then_some(value)
    });
    let total = values.fold(None, |sum: Option<f64>, value| Some(sum.unwrap_or(0.0) + value))?;
    // Requests are whole numbers.
    format!("{:.0}", total.min(f64::from(u32::MAX))).parse().ok()
}

/// Requests that the engine works on and those that wait for it, by two of its gauges; the first
/// one must be there.
pub(super) async fn busy(look: &Look<'_>, running: &str, waiting: &str) -> Busy {
    let answer = match look.client.get(look.at, "/metrics").await {
        Ok(answer) if answer.status() == 200 => answer,
        Ok(answer) => {
            let status = answer.status();
            drop(answer.bytes(MAX_ERROR_BYTES).await);
            return unanswered(&Question::Status(status));
        }
        Err(error) => return unanswered(&Question::Unanswered(error)),
    };
    let Ok(metrics) = answer.bytes(MAX_METRICS_BYTES).await else { return Busy::NoAnswer };
    let metrics = String::from_utf8_lossy(&metrics);
    match sum(&metrics, running) {
        Some(count) => Busy::Reported(count.saturating_add(sum(&metrics, waiting).unwrap_or(0))),
        None => Busy::CannotTell,
    }
}

/// Longest text of metrics that is read, bytes.
const MAX_METRICS_BYTES: usize = 4 * 1024 * 1024;

/// What a question about how busy an engine is says where it has no answer.
pub(super) fn unanswered(error: &Question) -> Busy {
    match error {
        // Nothing is there, and so nothing is busy.
        Question::Unanswered(CallError::Refused(_)) => Busy::Reported(0),
        // It could tell, and does not now.
        Question::Unanswered(_) | Question::Status(408 | 429 | 500 | 502..=599) => Busy::NoAnswer,
        Question::Status(_) | Question::Bad(_) => Busy::CannotTell,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2485
    #[test]
    fn a_gauge_is_read_with_and_without_labels_and_summed_over_its_series() {
        let metrics = "# TYPE vllm:num_requests_waiting gauge\n\
            vllm:num_requests_waiting{engine=\"0\",model_name=\"a b}c\"} 2.0\n\
            vllm:num_requests_waiting{engine=\"1\",model_name=\"m\"} 3.0 1700000000000\n\
            vllm:num_requests_waiting_by_reason{reason=\"capacity\"} 9.0\n\
            tgi_queue_size 4\n\
            broken NaN\n";
        assert_eq!(sum(metrics, "vllm:num_requests_waiting"), Some(5));
        assert_eq!(sum(metrics, "tgi_queue_size"), Some(4));
        assert_eq!(sum(metrics, "tgi_batch_current_size"), None);
        assert_eq!(sum(metrics, "broken"), None);
    }

    // CLOUD-1523
    #[test]
    fn a_gauge_without_measure_is_a_large_one() {
        for absurd in ["4294967295", "4294967296", "18446744073709551615", "1e300"] {
            assert_eq!(sum(&format!("g {absurd}\ng{{x=\"1\"}} 7\n"), "g"), Some(u32::MAX), "{absurd}");
        }
    }
}
