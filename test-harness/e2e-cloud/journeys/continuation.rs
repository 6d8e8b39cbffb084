//! Streams that lose their node or engine and go on, without gap or repeat.

use std::time::Duration;

use e2e_cloud::{Cluster, Engine, Options, Transcript, eventually};
use serde_json::{Value, json};

fn words(from: u32, to: u32) -> String {
    (from..to).map(|n| format!("w{n} ")).collect()
}

fn steady(dialect: &'static str) -> Engine {
    Engine::Fake { slots: 4, first_token_ms: 10, pace_ms: 20, dialect }
}

/// Runs the task, and kills the daemon of the node that serves it once `after` tokens were read.
async fn lose_the_node(cluster: &mut Cluster, task: Value, after: usize) -> Transcript {
    let accepted: Value = cluster.client.post("/v2/tasks", &task).await.json().await.expect("an answer");
    let id = accepted["task_id"].as_str().expect("an accepted task").to_owned();
    let begun = cluster.client.follow_tokens(&id, after).await;
    let node = begun.node().expect("it has begun").to_owned();
    let n = cluster.nodes.iter().position(|of| of.id == node).expect("one of the nodes");
    cluster.nodes[n].daemon.as_mut().expect("a running daemon").kill();
    let transcript = cluster.client.follow(&id, None, usize::MAX).await;
    cluster.start_daemon(n);
    transcript.check();
    transcript
}

// CLOUD-1531
// CLOUD-1534
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_stream_goes_on_elsewhere_in_each_way_there_is() {
    for dialect in ["llamacpp", "vllm", "tgi", "triton", "openai"] {
        let mut cluster = Cluster::start(Options { engine: steady(dialect), ..Options::default() }).await;
        let mut task = cluster.task(30);
        task["recovery"] = json!("continue");
        let appended = lose_the_node(&mut cluster, task.clone(), 5).await;
        assert_eq!((appended.text(), appended.starts()), (words(0, 30), 2), "{dialect}");
        let end = &appended.events.last().unwrap().2;
        assert_eq!((&end["tokens_out"], &end["finish_reason"]), (&json!(30), &json!("length")), "{end}");
        for n in 0..2 {
            cluster.wait_online(n).await;
        }
        task["determinism"] = json!("strict");
        task["seed"] = json!(7);
        let replayed = lose_the_node(&mut cluster, task, 5).await;
        assert_eq!((replayed.text(), replayed.starts()), (words(0, 30), 2), "{dialect}");
        assert_eq!(replayed.events.last().unwrap().2["tokens_out"], 30);
    }
}

// CLOUD-1535
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_goes_on_from_its_own_template_and_a_prompt_that_was_all_sent_just_ends() {
    let mut cluster = Cluster::start(Options { engine: steady("llamacpp"), ..Options::default() }).await;
    let chat = json!({
        "model_ref": "fake-model", "max_tokens": 20, "recovery": "continue",
        "messages": [{"role": "user", "content": "hello"}],
    });
    let transcript = lose_the_node(&mut cluster, chat, 5).await;
    assert_eq!((transcript.text(), transcript.starts()), (words(0, 20), 2));
    for n in 0..2 {
        cluster.wait_online(n).await;
    }
    // Both engines close the stream after the last token, before the end.
    for n in 0..2 {
        cluster.fault(n, json!({"kind": "clean_close", "after": 6})).await;
    }
    let mut task = cluster.task(6);
    task["recovery"] = json!("continue");
    let transcript = cluster.client.run(task).await;
    transcript.check();
    assert_eq!(transcript.text(), words(0, 6));
    assert!(transcript.completed(), "{:?}", transcript.events.last());
    assert_eq!(transcript.events.last().unwrap().2["tokens_out"], 6);
}

// CLOUD-1533
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_that_says_something_else_is_no_splice() {
    let mut cluster = Cluster::start(Options { engine: steady("llamacpp"), ..Options::default() }).await;
    cluster.fault(1, json!({"kind": "other_words"})).await;
    let mut task = cluster.task(30);
    task["recovery"] = json!("continue");
    task["determinism"] = json!("strict");
    task["seed"] = json!(7);
    task["placement"] = json!({"prefer_pools": ["gpu-node-1/pool-0"]});
    let transcript = lose_the_node(&mut cluster, task.clone(), 5).await;
    assert_eq!(transcript.error(), Some("WORKER_RESET"), "{:?}", transcript.events.last());
    assert!(words(0, 30).starts_with(&transcript.text()) && transcript.starts() == 1);
    let unsupported = json!({
        "model_ref": "fake-model", "prompt": "x", "grammar": "root ::= \"a\"", "recovery": "continue",
    });
    let (status, body) = cluster.client.refused(&unsupported).await;
    assert_eq!((status, &body["code"]), (400, &json!("UNSUPPORTED")), "{body}");
}

/// What became of the streams of one mode.
#[derive(Debug, Default)]
struct Seen {
    equal: usize,
    lost: usize,
    /// Tokens that had been sent when the second attempt began.
    points: Vec<usize>,
}

/// Kills nodes under streams of the real engine, each later in its stream than the one before.
async fn kill_at_each_point(cluster: &mut Cluster, task: &Value, points: usize) -> Seen {
    let undisturbed = cluster.client.run(task.clone()).await;
    undisturbed.check();
    let whole = undisturbed.text();
    let all = undisturbed.tokens().len();
    let mut seen = Seen::default();
    for point in 0..points {
        // At least one node must be left to go on with it.
        eventually("two nodes are there", Duration::from_secs(20), || async {
            let nodes = cluster.client.nodes().await;
            let ready = nodes.iter().filter(|node| {
                node.liveness == pool_registry_types::node::Liveness::Online
                    && node.pools.iter().any(|pool| pool.report.ready && pool.slots_free > 0)
            });
            (ready.count() >= 2).then_some(())
        })
        .await;
        let transcript = lose_the_node(cluster, task.clone(), 1 + point * all * 3 / 5 / points).await;
        assert!(transcript.completed(), "{point}: {:?}", transcript.events.last());
        assert_eq!(transcript.events.last().unwrap().2["tokens_out"], all, "{point}: {}", transcript.text());
        seen.equal += usize::from(transcript.text() == whole);
        let names = transcript.names();
        if let Some(second) = names.iter().skip(1).position(|name| *name == "started") {
            seen.lost += 1;
            seen.points.push(second);
        }
    }
    seen.points.sort_unstable();
    seen
}

#[expect(clippy::print_stdout, reason = "the figures of the run are its result")]
async fn continues_on_the_real_engine(mode: Value) -> Seen {
    let engine = Engine::Tiny { slots: 2 };
    let mut cluster = Cluster::start(Options { nodes: 3, engine, ..Options::default() }).await;
    let mut task = json!({
        "model_ref": "tiny", "prompt": "once upon a time", "max_tokens": 900, "recovery": "continue",
    });
    for (name, value) in mode.as_object().expect("fields of a task") {
        task[name] = value.clone();
    }
    let seen = kill_at_each_point(&mut cluster, &task, POINTS).await;
    println!(
        "{mode}: {} of {POINTS} streams lost their node with tokens sent (after {:?} of 900 tokens), {} of {POINTS} texts equal the undisturbed one, none with a gap or a repeat",
        seen.lost,
        seen.points.first().zip(seen.points.last()),
        seen.equal
    );
    seen
}

/// Points of a stream at which its node is killed.
const POINTS: usize = 50;

// CLOUD-2343
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strict_stream_of_the_real_engine_is_the_same_text_wherever_its_node_dies() {
    let mode = json!({"determinism": "strict", "seed": 7, "temperature": 0.8});
    let seen = continues_on_the_real_engine(mode).await;
    assert_eq!(seen.equal, POINTS);
    assert!(seen.lost * 2 > POINTS, "too few nodes died under their streams: {seen:?}");
}

// CLOUD-2344
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_continued_stream_of_the_real_engine_has_every_token_wherever_its_node_dies() {
    let seen = continues_on_the_real_engine(json!({"temperature": 0.0})).await;
    // From the very tokens that were sent the most probable ones follow again: a token that was
    // lost or doubled at the seam would make another text.
    assert_eq!(seen.equal, POINTS);
    assert!(seen.lost * 2 > POINTS, "too few nodes died under their streams: {seen:?}");
}
