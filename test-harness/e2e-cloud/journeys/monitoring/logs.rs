//! The log where a shipper takes it up: what `test-harness/vector-stages` and the stages of Alloy here are run
//! over is what the daemons write. Alloy itself is not to be had from a registry: its stages are read from the
//! shipped file, and done here as its document says of each.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use e2e_cloud::{Engine, Home, eventually};
use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::{Value, json};

const RECORDED: &str = include_str!("../../../vector-stages/recorded.jsonl");
const ALLOY: &str = include_str!("../../../../deploy/alloy/config.alloy");
const SOON: Duration = Duration::from_secs(20);

/// What stands in a line, by its message; the state and its reason may differ from task to task.
fn shapes(log: &str) -> BTreeMap<String, BTreeSet<BTreeSet<String>>> {
    let mut shapes: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for line in log.lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        let message = line["message"].as_str().expect("a message").to_owned();
        let keys = line.as_object().expect("an object").keys().cloned().collect();
        shapes.entry(message).or_default().insert(keys);
    }
    shapes
}

// CLOUD-2736
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_recorded_lines_are_those_that_a_daemon_writes() {
    let home = Home::start(Engine::steady(), &[("LLORCH_LOG_FORMAT", "json")]).await;
    let client = home.client.clone();
    for body in [
        json!({"model_ref": "fake-model", "prompt": "x", "max_tokens": 3}),
        json!({"model_ref": "unknown", "prompt": "x", "deadline_ms": 300}),
    ] {
        assert_eq!(client.post("/v2/tasks", &body).await.status(), 202);
    }
    let stranger = client.request(Method::GET, "/v2/nodes").header("origin", "http://evil.example");
    assert_eq!(stranger.send().await.expect("an answer").status(), 403);
    let log = home.log();
    eventually("both tasks have ended", SOON, || async {
        let text = std::fs::read_to_string(&log).ok()?;
        (text.matches("\"a task ended\"").count() == 2).then_some(())
    })
    .await;
    let mut home = home;
    home.engine.as_mut().expect("it runs").kill();
    eventually("its handoff binds nothing", SOON, || async {
        std::fs::read_to_string(&log).ok()?.contains("a handoff binds nothing").then_some(())
    })
    .await;
    home.daemon.signal(Signal::SIGTERM);
    tokio::task::block_in_place(|| home.daemon.wait(SOON));
    let (recorded, written) = (shapes(RECORDED), shapes(&std::fs::read_to_string(&log).expect("its log")));
    for (message, shapes) in &recorded {
        let today =
            written.get(message).unwrap_or_else(|| panic!("{message:?} is not written: {written:#?}"));
        assert!(shapes.is_subset(today), "{message:?} has other fields: {shapes:?}, {today:?}");
    }
}

/// The stages of the one `loki.process`: each one's name, and its text.
fn stages() -> Vec<(&'static str, &'static str)> {
    let (_, rest) = ALLOY.split_once("\nloki.process \"llama_orch\" {\n").expect("what processes lines");
    let (block, _) = rest.split_once("\n}\n").expect("its end");
    let stages =
        block.split("\n\tstage.").map(|stage| stage.trim_start_matches("\tstage.")).filter_map(|stage| {
            let (name, body) = stage.split_once(" {\n")?;
            Some((name, body.split("\n\t}").next()?))
        });
    stages.collect()
}

/// `name = "value"` of a stage's text.
fn pairs(body: &'static str) -> Vec<(&'static str, &'static str)> {
    let parts = body.split(['{', '}', ',', '\n']).map(str::trim);
    let pairs = parts.filter_map(|part| {
        let (name, value) = part.split_once('=')?;
        Some((name.trim(), value.trim().strip_prefix('"')?.strip_suffix('"')?))
    });
    pairs.collect()
}

/// What a line goes on with: labels, structured metadata, and its time.
#[derive(Debug, Default)]
struct Entry {
    labels: BTreeMap<&'static str, String>,
    metadata: BTreeMap<&'static str, String>,
    time: Option<String>,
}

fn processed(line: &str) -> Entry {
    let (mut entry, mut found) = (Entry::default(), BTreeMap::new());
    for (name, body) in stages() {
        let named = |found: &BTreeMap<&str, String>| {
            let values = pairs(body).into_iter();
            values.filter_map(|(to, from)| Some((to, found.get(from)?.clone()))).collect::<BTreeMap<_, _>>()
        };
        match name {
            "static_labels" => {
                entry.labels.extend(pairs(body).into_iter().map(|(name, value)| (name, value.to_owned())));
            }
            // A line that is none stays as it is, and nothing is found in it.
            "json" => {
                let parsed = serde_json::from_str::<Value>(line).unwrap_or_default();
                for (to, from) in pairs(body) {
                    match &parsed[from] {
                        Value::Null => {}
                        Value::String(text) => drop(found.insert(to, text.clone())),
                        other => drop(found.insert(to, other.to_string())),
                    }
                }
            }
            "timestamp" => {
                let of = pairs(body).into_iter().collect::<BTreeMap<_, _>>();
                assert_eq!(of["format"], "RFC3339Nano");
                entry.time = found.get(of["source"]).cloned();
            }
            "labels" => entry.labels.extend(named(&found)),
            "structured_metadata" => entry.metadata.extend(named(&found)),
            other => panic!("no stage is known as {other}"),
        }
    }
    entry
}

// CLOUD-2736
#[test]
fn the_stages_of_alloy_find_in_a_line_what_it_is_found_by() {
    let order: Vec<&str> = stages().iter().map(|(name, _)| *name).collect();
    assert_eq!(order, ["static_labels", "json", "timestamp", "labels", "structured_metadata"]);
    let mut with_task = 0;
    for line in RECORDED.lines() {
        let written: Value = serde_json::from_str(line).expect("a recorded line");
        let entry = processed(line);
        let level = written["level"].as_str().expect("a level").to_owned();
        assert_eq!(entry.labels, BTreeMap::from([("job", "llama-orch".to_owned()), ("level", level)]));
        assert_eq!(entry.time.as_deref(), written["timestamp"].as_str());
        for name in ["task_id", "attempt_id", "trace_id", "correlation_id", "node_id", "pool_id", "code"] {
            assert_eq!(
                entry.metadata.get(name).map(String::as_str),
                written[name].as_str(),
                "{name}: {line}"
            );
        }
        with_task += usize::from(entry.metadata.contains_key("task_id"));
    }
    assert!(with_task >= 2, "{with_task}");
    let text = processed("thread 'main' panicked");
    assert_eq!((text.labels.len(), text.metadata.len(), text.time), (1, 0, None));
}
