//! What waits says for what, and does not hold a stop; what a query and a body may say.

use std::process::Command;
use std::time::{Duration, Instant};

use e2e_cloud::process::program;
use e2e_cloud::{Cluster, Engine, Options, eventually};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

fn slow() -> Engine {
    Engine::Fake { slots: 1, first_token_ms: 50, pace_ms: 50, dialect: "llamacpp" }
}

async fn submitted(cluster: &Cluster, task: &Value) -> Value {
    let response = cluster.client.post("/v2/tasks", task).await;
    assert_eq!(response.status(), 202);
    response.json().await.unwrap()
}

// CLOUD-2970
// CLOUD-2971
// CLOUD-2972
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_waits_says_for_what_wherever_it_is_looked_at() {
    let cluster = Cluster::start(Options { nodes: 1, engine: slow(), ..Options::default() }).await;
    let first = submitted(&cluster, &cluster.task(60)).await;
    assert_eq!((&first["queue_position"], first.get("waiting_for")), (&json!(0), None), "{first}");
    let second = submitted(&cluster, &cluster.task(2)).await;
    let full = json!({"reason": "slots_full", "pools": {"slots_full": 1}});
    assert_eq!((&second["waiting_for"], &second["queue_position"]), (&full, &json!(0)), "{second}");
    let mut far = cluster.task(2);
    far["placement"] = json!({"require_labels": {"zone": "far"}});
    let third = submitted(&cluster, &far).await;
    let labels = json!({"reason": "labels", "pools": {"labels": 1}});
    assert_eq!((&third["waiting_for"], third.get("queue_position")), (&labels, None), "{third}");
    let path = format!("/v2/tasks/{}", third["task_id"].as_str().unwrap());
    let view = cluster.client.get_json(&path).await.unwrap();
    assert_eq!((&view["waiting_for"], view.get("queue_position")), (&labels, None), "{view}");
    let read = cluster.client.follow(third["task_id"].as_str().unwrap(), None, 1).await;
    let (name, .., metrics) = &read.events[0];
    assert_eq!((name.as_str(), &metrics["waiting_for"]), ("metrics", &labels), "{metrics}");
    assert_eq!(metrics.get("queue_position"), None);
    far["placement"]["wait"] = json!(false);
    let (status, body) = cluster.client.refused(&far).await;
    assert_eq!(
        (status, &body["code"], &body["detail"]),
        (503, &json!("POOL_UNAVAILABLE"), &labels),
        "{body}"
    );
}

// CLOUD-2974
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nothing_could_take_does_not_hold_a_stop_and_what_runs_does() {
    let mut cluster = Cluster::start(Options { nodes: 1, engine: slow(), ..Options::default() }).await;
    let mut far = cluster.task(2);
    far["placement"] = json!({"require_labels": {"zone": "far"}});
    let stuck = submitted(&cluster, &far).await["task_id"].as_str().unwrap().to_owned();
    let (client, task) = (cluster.client.clone(), cluster.task(40));
    let running = tokio::spawn(async move { client.run(task).await });
    let client = cluster.client.clone();
    let waiting = tokio::spawn(async move { client.follow(&stuck, None, usize::MAX).await });
    eventually("the task runs", Duration::from_secs(10), || async {
        cluster.client.nodes().await.iter().any(|node| !node.running_attempts.is_empty()).then_some(())
    })
    .await;
    let begun = Instant::now();
    let control = cluster.control.as_mut().unwrap();
    control.signal(Signal::SIGTERM);
    let status = tokio::task::block_in_place(|| control.wait(Duration::from_secs(25)));
    assert!(status.success() && begun.elapsed() < Duration::from_secs(20), "the grace is 30 s");
    assert!(running.await.unwrap().completed(), "what ran was waited for");
    assert_eq!(waiting.await.unwrap().error(), Some("DRAINING"));
    let log = control.log();
    assert!(log.contains("waiting for tasks to end"), "{log}");
    assert!(log.contains("tasks that no pool could take are ended"), "{log}");
    assert!(!log.contains("the grace is over"), "{log}");
}

// CLOUD-2983
// CLOUD-2984
// CLOUD-2985
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_misspelt_filter_and_a_compressed_body_are_refused_and_streams_are_not_to_be_gathered() {
    let cluster = Cluster::start(Options { nodes: 1, engine: slow(), ..Options::default() }).await;
    let get = async |path: &str| cluster.client.get(path).await.unwrap();
    for path in ["/v2/tasks?limt=5", "/v2/nodes?limit=5", "/v2/pools?node=a", "/v2/catalog/models?x"] {
        let response = get(path).await;
        assert_eq!(response.status(), 400, "{path}");
        let body: Value = response.json().await.unwrap();
        assert!(body["message"].as_str().unwrap().starts_with("query: no parameter is called"), "{body}");
    }
    for path in ["/v2/tasks?limit=5", "/health/live?x=1", "/metrics?x=1", "/v1/models?limit=5"] {
        assert_eq!(get(path).await.status(), 200, "{path}");
    }
    for path in ["/v2/tasks", "/v1/chat/completions", "/v2/nodes/register"] {
        let request = cluster.client.request(reqwest::Method::POST, path);
        let response = request.header("content-encoding", "gzip").body("\u{1f}").send().await.unwrap();
        assert_eq!(response.status(), 415, "{path}");
        assert_eq!(response.headers()["accept-encoding"], "identity");
        let body: Value = response.json().await.unwrap();
        let code = if path.starts_with("/v1") { &body["error"]["code"] } else { &body["code"] };
        assert_eq!(code, "UNSUPPORTED", "{body}");
    }
    let id = submitted(&cluster, &cluster.task(1)).await["task_id"].as_str().unwrap().to_owned();
    for path in [format!("/v2/tasks/{id}/events"), "/v2/events".to_owned()] {
        assert_eq!(get(&path).await.headers()["x-accel-buffering"], "no", "{path}");
    }
}

// CLOUD-2981
#[test]
fn whoever_reads_no_more_of_the_settings_does_not_make_printing_them_fail() {
    for daemon in ["orchestratord", "pool-managerd"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(program(daemon));
        let output = command.arg("--print-config").stdout(writer).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && errors.is_empty(), "{daemon}: {}: {errors}", output.status);
    }
}
