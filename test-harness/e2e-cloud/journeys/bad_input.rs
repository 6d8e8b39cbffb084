//! Bad input of every kind: the code of the contract, a message that names the culprit, no
//! panic and no hang.

use std::process::Command;
use std::time::Duration;

use e2e_cloud::cluster::TOKEN;
use e2e_cloud::process::program;
use e2e_cloud::{Cluster, Options, Process, eventually};
use reqwest::Method;
use serde_json::{Value, json};

// CLOUD-1105
// CLOUD-1201
// CLOUD-1210
// CLOUD-2350
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_bad_request_is_refused_by_code_and_name() {
    let cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    // Unknown models are queued for one node timeout after the start.
    let unknown = json!({"model_ref": "unknown", "prompt": "x"});
    eventually("the grace for unknown models is over", Duration::from_secs(8), || async {
        (cluster.client.refused(&unknown).await.0 == 503).then_some(())
    })
    .await;
    let submit = |body: &str| (Method::POST, "/v2/tasks".to_owned(), body.to_owned());
    let get = |path: &str| (Method::GET, path.to_owned(), String::new());
    let register = |change: fn(&mut Value)| {
        let mut body = json!({
            "node_id": "x", "machine_id": "m", "boot_id": "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11",
            "address": "http://127.0.0.1:1", "version": "0",
        });
        change(&mut body);
        (Method::POST, "/v2/nodes/register".to_owned(), body.to_string())
    };
    let huge = format!(r#"{{"model_ref":"fake-model","prompt":"{}"}}"#, "x".repeat(5 * 1024 * 1024));
    let deep = "(".repeat(50_000);
    let deep = format!(r#"{{"model_ref":"fake-model","prompt":"x","grammar":"root ::= {deep}"}}"#);
    let stops = format!(r#"{{"model_ref":"fake-model","prompt":"x","stop":["{}"]}}"#, "x".repeat(70_000));
    /// Request (method, path, body), status, code, and what the message names.
    type Case<'c> = ((Method, String, String), u16, &'c str, &'c str);
    let cases: Vec<Case<'_>> = vec![
        (submit("{"), 400, "INVALID_PARAMS", "EOF"),
        (submit(""), 400, "INVALID_PARAMS", "EOF"),
        (submit("[]"), 400, "INVALID_PARAMS", "expected"),
        (submit(r#"["m"]"#), 400, "INVALID_PARAMS", "expected an object"),
        (
            (Method::POST, "/v2/artifacts".into(), "[".repeat(200) + &"]".repeat(200)),
            400,
            "INVALID_PARAMS",
            "nested deeper than 127",
        ),
        (submit("{} {}"), 400, "INVALID_PARAMS", "model_ref"),
        (submit(r#"{"model_ref":"m","prompt":"x"} x"#), 400, "INVALID_PARAMS", "follows"),
        (submit(r#"{"model_ref":"m","prompt":"x","max_token":1}"#), 400, "INVALID_PARAMS", "max_token"),
        (submit(r#"{"model_ref":"m","prompt":"x","max_tokens":-1}"#), 400, "INVALID_PARAMS", "max_tokens"),
        (submit(r#"{"model_ref":"m","prompt":"x","max_tokens":0}"#), 400, "INVALID_PARAMS", "max_tokens"),
        (submit(r#"{"model_ref":"m","prompt":7}"#), 400, "INVALID_PARAMS", "prompt"),
        (submit(r#"{"model_ref":"m"}"#), 400, "INVALID_PARAMS", "prompt"),
        (submit(r#"{"model_ref":"a b","prompt":"x"}"#), 400, "INVALID_PARAMS", "model_ref"),
        (
            submit(r#"{"model_ref":"m","messages":[{"role":"robot","content":"x"}]}"#),
            400,
            "INVALID_PARAMS",
            "messages[0].role",
        ),
        (submit(r#"{"model_ref":"m","prompt":"x","temperature":9}"#), 400, "INVALID_PARAMS", "temperature"),
        (submit(r#"{"model_ref":"m","prompt":"x","task_id":"a/b"}"#), 400, "INVALID_PARAMS", "task_id"),
        (
            submit(r#"{"model_ref":"m","prompt":"x","engine":"openai","grammar":"x"}"#),
            400,
            "UNSUPPORTED",
            "grammar",
        ),
        (submit(&deep), 400, "INVALID_PARAMS", "grammar: nested 50000 deep"),
        (submit(&stops), 400, "INVALID_PARAMS", "stop: "),
        (submit(r#"{"model_ref":"unknown","prompt":"x"}"#), 503, "MODEL_NOT_AVAILABLE", "gpu-node-1"),
        // CLOUD-3001
        (submit(r#"{"model_ref":"unknown","prompt":"x"}"#), 503, "MODEL_NOT_AVAILABLE", "(models: "),
        (submit(&huge), 413, "PAYLOAD_TOO_LARGE", "4194304"),
        (get("/v2/tasks/not-a-uuid"), 400, "INVALID_PARAMS", "task_id"),
        (get("/v2/tasks/..%2f..%2fetc"), 400, "INVALID_PARAMS", "task_id"),
        (get("/v2/tasks/7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11"), 404, "NOT_FOUND", "7f3b1c52"),
        (get("/v2/tasks/7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11/events"), 404, "NOT_FOUND", "7f3b1c52"),
        // CLOUD-3009
        (get("/v2/nowhere"), 404, "NOT_FOUND", "/docs/"),
        ((Method::PUT, "/v2/tasks".into(), String::new()), 405, "METHOD_NOT_ALLOWED", "method"),
        (register(|b| b["node_id"] = json!("a/b")), 400, "INVALID_PARAMS", "node_id"),
        (register(|b| b["node_id"] = json!("n".repeat(64))), 400, "INVALID_PARAMS", "node_id"),
        (register(|b| b["address"] = json!("http://me:pw@host:1")), 400, "INVALID_PARAMS", "address"),
        (register(|b| b["address"] = json!("file:///etc/passwd")), 400, "INVALID_PARAMS", "address"),
        (register(|b| b["boot_id"] = json!(5)), 400, "INVALID_PARAMS", "boot_id"),
        // CLOUD-3005
        (register(|b| b["node_id"] = json!("gpu-node-1")), 409, "NODE_ID_CONFLICT", "POOL_MANAGERD_NODE_ID"),
        (
            (
                Method::POST,
                "/v2/nodes/ghost/heartbeat".into(),
                r#"{"epoch":"e","seq":1,"timestamp":""}"#.into(),
            ),
            404,
            "NODE_UNKNOWN",
            "unknown",
        ),
        (
            (
                Method::POST,
                "/v2/nodes/a%2Fb/heartbeat".into(),
                r#"{"epoch":"e","seq":1,"timestamp":""}"#.into(),
            ),
            400,
            "INVALID_PARAMS",
            "node_id",
        ),
        (
            (
                Method::POST,
                "/v2/nodes/gpu-node-1/heartbeat".into(),
                r#"{"epoch":"e","seq":-1,"timestamp":""}"#.into(),
            ),
            400,
            "INVALID_PARAMS",
            "seq",
        ),
        (
            (Method::DELETE, "/v2/nodes/gpu-node-1?epoch=".into(), String::new()),
            400,
            "INVALID_PARAMS",
            "epoch",
        ),
    ];
    for ((method, path, body), status, code, names) in cases {
        let shown: String = body.chars().take(80).collect();
        let request = cluster
            .client
            .request(method.clone(), &path)
            .header("content-type", "application/json")
            // After a refused body the server closes the connection: each case has its own.
            .header("connection", "close")
            .body(body);
        let response = request.timeout(Duration::from_secs(5)).send().await;
        let response = response.unwrap_or_else(|error| panic!("{method} {path} {shown}: {error}"));
        let is = response.status().as_u16();
        let answer: Value = response.json().await.unwrap_or_default();
        assert_eq!((is, answer["code"].as_str()), (status, Some(code)), "{method} {path} {shown}: {answer}");
        let message = answer["message"].as_str().unwrap();
        assert!(message.contains(names), "{method} {path} {shown}: {message:?} does not name {names:?}");
    }
    let log = cluster.control.as_ref().unwrap().log();
    assert!(!log.contains("panicked") && !log.contains(TOKEN), "{log}");
    let good = cluster.client.run(cluster.task(2)).await;
    good.check();
    assert!(good.completed());
}

// CLOUD-1210
// CLOUD-2351
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_node_refuses_what_is_not_for_it() {
    let cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    // It asks the control plane no more, which would end what it does not know.
    cluster.wait_ready(0).await;
    let view = cluster.client.node("gpu-node-1").await.unwrap();
    let node = cluster.node_client(0);
    let infer = |change: fn(&mut Value)| {
        let mut body = json!({
            "task_id": "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11", "attempt_id": "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b12",
            "node_id": "gpu-node-1", "boot_id": view.boot_id, "log_id": "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b13",
            "first_index": 0, "task": {"model_ref": "fake-model", "prompt": "x", "max_tokens": 1},
        });
        change(&mut body);
        body
    };
    let cases = [
        (infer(|b| b["node_id"] = json!("other")), "pool-0", 409, "WRONG_NODE"),
        (infer(|b| b["boot_id"] = b["task_id"].clone()), "pool-0", 409, "WRONG_NODE"),
        (infer(|_| {}), "ghost", 503, "POOL_UNREADY"),
        (infer(|_| {}), "a%2Fb", 400, "INVALID_PARAMS"),
        (infer(|b| b["first_index"] = json!(-1)), "pool-0", 400, "INVALID_PARAMS"),
        (infer(|b| b["task"]["grammar"] = json!("(".repeat(65))), "pool-0", 400, "INVALID_PARAMS"),
        (infer(|_| {}), "pool-0", 200, ""),
        (infer(|_| {}), "pool-0", 409, "ATTEMPT_DUPLICATE"),
    ];
    for (body, pool, status, code) in cases {
        let response = node.post(&format!("/v2/pools/{pool}/infer"), &body).await;
        assert_eq!(response.status().as_u16(), status, "{body}");
        if status == 200 {
            let text = response.text().await.unwrap();
            assert!(text.contains("event: end") && text.contains(": report-seq "), "{text}");
        } else {
            let answer: Value = response.json().await.unwrap();
            assert_eq!(answer["code"], code, "{answer}");
        }
    }
}

// CLOUD-2352
// CLOUD-2943
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_bad_handoff_file_is_named_and_never_bound() {
    let cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    let dir = &cluster.nodes[0].runtime_dir;
    let good =
        r#"{"pool_id":"POOL","replica_id":"r0","engine":"llamacpp","url":"URL","slots":1,"model_ref":"m"}"#;
    // Bound, and nobody listens: no other test has it meanwhile.
    let unheard = tokio::net::TcpSocket::new_v4().unwrap();
    unheard.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let dead = format!("http://{}", unheard.local_addr().unwrap());
    let file = |pool: &str, url: &str| good.replace("POOL", pool).replace("URL", url);
    let cases = [
        ("half-r0.json", r#"{"pool_id":"half","#.to_owned(), "EOF"),
        ("named-r1.json", file("named", &dead), "named-r0.json"),
        ("host-r0.json", file("host", "http://10.9.8.7:1"), "POOL_MANAGERD_ENGINE_HOSTS"),
        ("slots-r0.json", file("slots", &dead).replace(":1,\"model", ":0,\"model"), "slots"),
        ("engine-r0.json", file("engine", &dead).replace("llamacpp", "abacus"), "abacus"),
        ("big-r0.json", " ".repeat(70_000), "65536"),
        ("pid-r0.json", file("pid", &dead).replace("\"slots\"", "\"pid\":4194000,\"slots\""), "4194000"),
        ("away-r0.json", file("away", &dead), "refused"),
    ];
    for (name, content, _) in &cases {
        std::fs::write(dir.join(name), content).unwrap();
    }
    let node = cluster.node_client(0);
    let problems = eventually("every problem is shown", Duration::from_secs(6), || async {
        let problems = node.get_json("/v2/pools").await?["handoff_problems"].clone();
        (problems.as_object()?.len() == cases.len()).then_some(problems)
    })
    .await;
    for (name, _, names) in &cases {
        let problem = problems[name].as_str().unwrap_or_default();
        assert!(problem.contains(names), "{name}: {problem:?} does not name {names:?}");
    }
    // The control plane has all of it too: those that are of a pool are that pool, and the one that is
    // bound and cannot be reached has its problem there only.
    let bound = ["away-r0.json"];
    let of_pools = ["host", "slots", "engine", "pid", "away"];
    let list = eventually("the control plane shows them", Duration::from_secs(6), || async {
        let list = cluster.client.get_json("/v2/pools").await?;
        let shown = list["problems"].as_array()?.len();
        let failed = list["pools"].as_array()?.iter().filter(|pool| pool["state"] == "failed").count();
        (shown == cases.len() - bound.len() && failed == of_pools.len()).then_some(list)
    })
    .await;
    for (name, _, names) in cases.iter().filter(|(name, ..)| !bound.contains(name)) {
        let problems = list["problems"].as_array().unwrap();
        let problem = problems.iter().find(|problem| problem["file"] == *name).unwrap();
        assert_eq!((&problem["node_id"], &problem["kind"]), (&json!("gpu-node-1"), &json!("handoff")));
        assert!(problem["message"].as_str().unwrap().contains(names), "{name}: {problem}");
    }
    for pool in list["pools"].as_array().unwrap() {
        let (id, error) = (pool["pool_id"].as_str().unwrap(), pool["last_error"].as_str());
        let expected = cases.iter().find(|(name, ..)| of_pools.contains(&id) && name.starts_with(id));
        match expected {
            Some((.., names)) => assert!(error.unwrap().contains(names) && pool["ready"] == false, "{pool}"),
            None => assert!(error.is_none() && pool["ready"] == true, "only the good one serves: {pool}"),
        }
    }
    // A file that becomes valid is bound then, and one of an engine that another file has not before that goes.
    let url = cluster.engine_url(0);
    std::fs::write(dir.join("half-r0.json"), file("half", &url)).unwrap();
    eventually("the engine counts once", Duration::from_secs(3), || async {
        let problems = node.get_json("/v2/pools").await?["handoff_problems"].clone();
        let problem = problems["half-r0.json"].as_str()?;
        problem.contains("pool-0-r0.json has the same engine").then_some(())
    })
    .await;
    std::fs::remove_file(dir.join("pool-0-r0.json")).unwrap();
    eventually("the mended file is bound", Duration::from_secs(3), || async {
        let pools = cluster.client.node("gpu-node-1").await?.pools;
        let ready: Vec<_> = pools.iter().filter(|pool| pool.report.ready).collect();
        matches!(ready[..], [pool] if pool.report.pool_id.as_str() == "half").then_some(())
    })
    .await;
}

// CLOUD-2353
// CLOUD-2946
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_cannot_be_says_why_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let file = dir.path().join("a-file");
    std::fs::write(&file, "x").unwrap();
    let file = file.to_string_lossy().into_owned();
    type Case<'c> = (&'c str, Vec<(&'c str, &'c str)>, &'c str);
    let cases: Vec<Case<'_>> = vec![
        ("orchestratord", vec![("ORCHESTRATORD_ADDR", &taken)], "ORCHESTRATORD_ADDR"),
        ("orchestratord", vec![("ORCHESTRATORD_CLOUD_PROFILE", "true")], "LLORCH_API_TOKEN"),
        ("orchestratord", vec![("ORCHESTRATORD_CLOUD_PROFILE", "yes")], "cloud-profile"),
        ("orchestratord", vec![("ORCHESTRATORD_ADDR", "0.0.0.0:1")], "ORCHESTRATORD_ADDR"),
        ("orchestratord", vec![("ORCHESTRATORD_NODE_TIMEOUT_SECS", "5")], "ORCHESTRATORD_NODE_TIMEOUT_SECS"),
        ("orchestratord", vec![("LLORCH_API_TOKEN", "short")], "LLORCH_API_TOKEN"),
        ("orchestratord", vec![("LLORCH_API_TOKEN_FILE", "/nowhere")], "LLORCH_API_TOKEN_FILE"),
        ("orchestratord", vec![("ORCHESTRATORD_RUNTIME_DIR", &file)], "ORCHESTRATORD_RUNTIME_DIR"),
        ("orchestratord", vec![("ORCHESTRATORD_DATA_DIR", &file)], "ORCHESTRATORD_DATA_DIR"),
        (
            "pool-managerd",
            vec![
                ("LLORCH_API_TOKEN", TOKEN),
                ("ORCHESTRATORD_URL", "http://127.0.0.1:1"),
                ("POOL_MANAGERD_STATE_DIR", &file),
            ],
            "POOL_MANAGERD_STATE_DIR",
        ),
        ("pool-managerd", vec![], "LLORCH_API_TOKEN"),
        ("pool-managerd", vec![("LLORCH_API_TOKEN", TOKEN)], "ORCHESTRATORD_URL"),
        (
            "pool-managerd",
            vec![("LLORCH_API_TOKEN", TOKEN), ("ORCHESTRATORD_URL", "localhost")],
            "ORCHESTRATORD_URL",
        ),
        (
            "pool-managerd",
            vec![("LLORCH_API_TOKEN", TOKEN), ("ORCHESTRATORD_URL", "http://10.1.2.3:8080")],
            "POOL_MANAGERD_ADVERTISE_URL",
        ),
        (
            "pool-managerd",
            vec![
                ("LLORCH_API_TOKEN", TOKEN),
                ("ORCHESTRATORD_URL", "http://127.0.0.1:1"),
                ("POOL_MANAGERD_ADDR", &taken),
            ],
            "POOL_MANAGERD_ADDR",
        ),
    ];
    for (n, (name, variables, names)) in cases.into_iter().enumerate() {
        let mut command = Command::new(program(name));
        // Whatever listens at the addresses of the defaults is none of these cases.
        command.env("ORCHESTRATORD_ADDR", "127.0.0.1:0").env("POOL_MANAGERD_ADDR", "127.0.0.1:0");
        command.current_dir(dir.path()).envs(variables.iter().copied());
        let mut daemon = Process::start(command, &dir.path().join(format!("{n}.log")));
        let status = tokio::task::block_in_place(|| daemon.wait(Duration::from_secs(10)));
        let log = daemon.log();
        assert!(!status.success(), "{name} {variables:?} started");
        assert!(log.contains(names), "{name} {variables:?}: {log:?} does not name {names:?}");
        assert!(!log.contains("panicked") && !log.contains(TOKEN), "{log}");
    }
}

// CLOUD-2203
#[test]
fn print_config_shows_what_is_in_force_and_hides_tokens() {
    for name in ["orchestratord", "pool-managerd"] {
        let output = Command::new(program(name))
            .arg("--print-config")
            .env("LLORCH_API_TOKEN", TOKEN)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && text.contains("_ADDR=127.0.0.1:"), "{text}");
        assert!(text.contains("LLORCH_API_TOKEN=(hidden)") && !text.contains(TOKEN), "{text}");
    }
}
