//! What waits says for what, and does not hold a stop.

use std::time::{Duration, Instant};

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
