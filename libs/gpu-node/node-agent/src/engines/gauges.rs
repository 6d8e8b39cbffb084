//! Gauges in an engine's metrics, as Prometheus writes them.

/// The sum of a gauge's series, as a count of requests; nothing where it has none. An engine that
/// runs in several processes has one series for each.
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
    // Requests are a small whole number.
    format!("{total:.0}").parse().ok()
}

/// An engine's metrics, where it has any.
async fn read(client: &reqwest::Client, url: &str) -> Option<String> {
    let response = client.get(format!("{url}/metrics")).send().await.ok()?;
    response.status().is_success().then_some(())?;
    response.text().await.ok()
}

/// Requests that the engine works on and those that wait for it, by two of its gauges; the first
/// one must be there.
pub(super) async fn busy(client: &reqwest::Client, url: &str, running: &str, waiting: &str) -> Option<u32> {
    let metrics = read(client, url).await?;
    Some(sum(&metrics, running)? + sum(&metrics, waiting).unwrap_or(0))
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
}
