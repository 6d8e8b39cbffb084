//! The home profile: one daemon, engines found through local handoff files.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use e2e_cloud::process::{free_port, program};
use e2e_cloud::{Client, Engine, Home, Process, eventually};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

// CLOUD-1021
// CLOUD-1320
// CLOUD-2330
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_daemon_serves_the_same_api_without_a_token() {
    let mut home = Home::start(Engine::steady(), &[]).await;
    let client = home.client.clone();
    let task = json!({"model_ref": "fake-model", "prompt": "x", "max_tokens": 4});
    let transcript = client.run(task.clone()).await;
    transcript.check();
    assert_eq!((transcript.node(), transcript.text().as_str()), (Some("home"), "w0 w1 w2 w3 "));

    let stranger = json!({
        "node_id": "a", "machine_id": "m", "boot_id": "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11",
        "address": "http://127.0.0.1:1", "version": "0",
    });
    let register = client.post("/v2/nodes/register", &stranger).await;
    assert_eq!(register.status(), 503);
    let body: serde_json::Value = register.json().await.unwrap();
    assert_eq!(body["code"], "CLOUD_PROFILE_DISABLED");

    // The one node is steered like any other.
    let drain = client.post("/v2/nodes/home/drain", &json!({})).await;
    assert_eq!(drain.json::<serde_json::Value>().await.unwrap()["kept_by_node"], true);
    assert!(home.data_dir().join("home.draining").exists());
    let mut pinned = task.clone();
    pinned["placement"] = json!({"mode": "pin", "node_id": "home"});
    assert_eq!(client.refused(&pinned).await.1["code"], "NODE_UNAVAILABLE");
    assert_eq!(client.post("/v2/nodes/home/resume", &json!({})).await.status(), 202);
    assert!(client.run(pinned).await.completed());
    let pool = client.post("/v2/pools/pool-0/drain", &json!({})).await;
    assert_eq!(pool.json::<serde_json::Value>().await.unwrap()["state"], "draining");
    assert_eq!(client.post("/v2/pools/pool-0/reload", &json!({})).await.status(), 202);

    // A dead engine: the running task ends honestly, the next waits for the new engine.
    let mut long = task.clone();
    long["max_tokens"] = json!(500);
    let accepted: serde_json::Value = client.post("/v2/tasks", &long).await.json().await.unwrap();
    let id = accepted["task_id"].as_str().unwrap().to_owned();
    assert!(!client.follow(&id, None, 4).await.tokens().is_empty(), "it has sent tokens");
    home.engine.as_mut().unwrap().kill();
    let lost = client.follow(&id, None, usize::MAX).await;
    lost.check();
    assert_eq!(lost.error(), Some("WORKER_RESET"));
    home.start_engine();
    let next = client.run(task).await;
    next.check();
    assert!(next.completed(), "{:?}", next.events.last());
    drop(home.engine.take());
    home.stop().await;
}

const PATIENCE: Duration = Duration::from_secs(30);

/// A daemon that is told of no directory: its service manager has one for each purpose, below `home`.
fn of_user(home: &Path, port: u16) -> Command {
    let mut command = Command::new(program("orchestratord"));
    command
        .current_dir(home)
        .env("ORCHESTRATORD_ADDR", format!("127.0.0.1:{port}"))
        .env("STATE_DIRECTORY", home.join("state"))
        .env("RUNTIME_DIRECTORY", home.join("run"))
        .env("LOGS_DIRECTORY", home.join("logs"));
    command
}

/// The same program by another one, whose arguments have a line of the shell that begins `$DAEMON`.
fn under(program: &str, arguments: &[&str], command: &Command) -> Command {
    let mut outer = Command::new(program);
    outer.args(arguments).env("DAEMON", command.get_program()).env("SHELL", "/bin/sh");
    outer.current_dir(command.get_current_dir().expect("it has one"));
    outer.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    outer
}

async fn stop(mut daemon: Process) {
    daemon.signal(Signal::SIGTERM);
    let status = tokio::task::block_in_place(|| daemon.wait(PATIENCE));
    assert!(status.success(), "{}", daemon.log());
}

async fn ready_pool(client: &Client, pool_id: &str) -> Value {
    eventually("the pool is ready", PATIENCE, || async {
        let pool = client.get_json(&format!("/v2/pools/{pool_id}/health")).await?;
        (pool["ready"] == true).then_some(pool)
    })
    .await
}

// CLOUD-2940
// CLOUD-2941
// CLOUD-2947
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_nothing_a_file_of_pools_and_one_command_are_a_served_model() {
    let folder = tempfile::tempdir().unwrap();
    let (home, port) = (folder.path(), free_port());
    let engine = program("fake-engine");
    let file = format!(
        "[pools.pool-0]\nengine = \"llamacpp\"\nmodel = \"mine\"\nslots = 2\nprovision = {{ mode = \"binary\", program = \"{}\", args = [\"--addr\", \"127.0.0.1:{{port}}\", \"--model\", \"{{model}}\", \"--slots\", \"{{slots}}\"] }}\n",
        engine.display()
    );
    assert_eq!(file.lines().count(), 5);
    std::fs::write(home.join("pools.toml"), file).unwrap();
    let start = || {
        let mut command = of_user(home, port);
        command.env("ORCHESTRATORD_POOLS", home.join("pools.toml")).env("ORCHESTRATORD_LABELS", "zone=a");
        Process::start(command, &home.join("orchestratord.log"))
    };
    let daemon = start();
    let client = Client::new(&format!("http://127.0.0.1:{port}"), None);
    ready_pool(&client, "pool-0").await;
    let task = json!({"model_ref": "mine", "prompt": "x", "max_tokens": 4,
        "placement": {"require_labels": {"zone": "a"}}});
    let transcript = client.run(task.clone()).await;
    transcript.check();
    assert!(transcript.completed() && transcript.node() == Some("home"), "{:?}", transcript.events.last());
    let line = daemon.log();
    for named in
        ["orchestratord starts", "url=", "data_dir=", "runtime_dir=", "models_dir=", "logs_dir=", "pools="]
    {
        assert!(line.contains(named), "{named}: {line}");
    }

    // Of two daemons over its directories the second is told who has them (CLOUD-2949).
    let mut second = of_user(home, free_port());
    second.env("ORCHESTRATORD_DATA_DIR", home.join("second"));
    let mut second = Process::start(second, &home.join("second.log"));
    let status = tokio::task::block_in_place(|| second.wait(PATIENCE));
    let printed = second.log();
    assert!(!status.success(), "{printed}");
    let own = format!("is used by orchestratord, pid {}", daemon.pid());
    assert!(
        printed.contains("ORCHESTRATORD_RUNTIME_DIR: the directory") && printed.contains(&own),
        "{printed}"
    );

    // It is supervised as on a node: what dies is started again, and its output can be read.
    let before = engine_pid(home);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(before), Signal::SIGKILL).unwrap();
    eventually("another engine serves", PATIENCE, || async {
        let handoff = handoff(home)?;
        (handoff["pid"].as_i64()? != i64::from(before)).then_some(())
    })
    .await;
    ready_pool(&client, "pool-0").await;
    assert!(client.run(task.clone()).await.completed());
    assert_eq!(client.get("/v2/pools/pool-0/logs").await.unwrap().status(), 200);
    // Nobody is waited for who has ended its side of what may be quiet for days (CLOUD-2986).
    let mut follower = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let request = format!("GET /v2/pools/pool-0/logs?follow=true HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n");
    follower.write_all(request.as_bytes()).await.unwrap();
    let mut first = [0; 12];
    tokio::time::timeout(PATIENCE, follower.read_exact(&mut first)).await.unwrap().unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    follower.shutdown().await.unwrap();
    let mut rest = Vec::new();
    let read = tokio::time::timeout(PATIENCE, follower.read_to_end(&mut rest));
    read.await.expect("its connection is closed").unwrap();
    for (model, status) in [("other", 400), ("mine", 202)] {
        let reload = client.post("/v2/pools/pool-0/reload", &json!({"new_model_ref": model})).await;
        assert_eq!(reload.status(), status, "{model}");
    }

    // Its engines end with it.
    let last = engine_pid(home);
    stop(daemon).await;
    assert!(!Path::new(&format!("/proc/{last}")).exists(), "engine {last} outlived its daemon");
}

// CLOUD-2943
// CLOUD-2976
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_a_sighup_each_file_is_read_again_and_on_a_terminal_the_daemon_stops() {
    let folder = tempfile::tempdir().unwrap();
    let (home, port) = (folder.path(), free_port());
    let (tokens, pools) = (home.join("tokens"), home.join("pools.toml"));
    std::fs::write(&tokens, "a-token-that-stays\n").unwrap();
    std::fs::write(&pools, "").unwrap();
    // Also where the tests run on a terminal it is away from that.
    let mut command = under("sh", &["-c", "trap '' HUP; exec \"$DAEMON\""], &of_user(home, port));
    command.env("LLORCH_API_TOKEN_FILE", &tokens).env("ORCHESTRATORD_POOLS", &pools);
    let daemon = Process::start(command, &home.join("orchestratord.log"));
    let base = format!("http://127.0.0.1:{port}");
    let client = Client::new(&base, Some("a-token-that-stays"));
    eventually("it serves", PATIENCE, || client.get_json("/v2/pools")).await;
    let logged = async |lines: [&str; 2]| {
        daemon.signal(Signal::SIGHUP);
        eventually("a line for each file", PATIENCE, || async {
            let log = daemon.log();
            lines.iter().all(|line| log.contains(line)).then_some(())
        })
        .await;
    };
    logged(["the file of tokens is read again", "the file of pools was read again: nothing in it is new"])
        .await;
    std::fs::write(&tokens, "a-token-that-stays\na-token-that-comes\n").unwrap();
    std::fs::write(&pools, "[pools.pool-0]\nengine = 7\n").unwrap();
    logged(["tokens=2", "the file of pools is not taken, what was there before stands"]).await;
    let comes = Client::new(&base, Some("a-token-that-comes"));
    assert_eq!(comes.get("/v2/pools").await.unwrap().status(), 200);
    logged(["tokens=2", "the file of pools is still not taken"]).await;
    let shown = async |expected: Value| {
        eventually("what is to be mended is shown", PATIENCE, || async {
            let problems = client.get_json("/v2/pools").await?["problems"].take();
            let found = problems.as_array().into_iter().flatten().map(|problem| {
                let message = problem["message"].as_str().unwrap_or_default().to_owned();
                (json!([problem["kind"], problem["file"]]), message)
            });
            let found: Vec<(Value, String)> = found.collect();
            let names: Vec<&Value> = found.iter().map(|(name, _)| name).collect();
            (json!(names) == expected).then_some(found)
        })
        .await
    };
    let of_pools = json!(["pools_file", pools.to_string_lossy()]);
    std::fs::write(home.join("run/engines/p-r0.json"), "{").unwrap();
    let found = shown(json!([of_pools, ["handoff", "p-r0.json"]])).await;
    assert!(found[0].1.contains("engine") && found[1].1.starts_with("not a handoff"), "{found:?}");
    std::fs::write(&pools, "").unwrap();
    std::fs::remove_file(home.join("run/engines/p-r0.json")).unwrap();
    eventually("all is mended", PATIENCE, || async {
        client.get_json("/v2/pools").await?["problems"].is_null().then_some(())
    })
    .await;
    stop(daemon).await;

    // The tests may run where it is ignored.
    let arguments = [
        "--default-signal=HUP",
        "script",
        "--quiet",
        "--flush",
        "--return",
        "--command",
        "exec \"$DAEMON\"",
        "/dev/null",
    ];
    let command = under("env", &arguments, &of_user(home, port));
    let mut terminal = Process::start(command, &home.join("terminal.log"));
    let client = Client::new(&base, None);
    eventually("it serves", PATIENCE, || client.get_json("/v2/pools")).await;
    let pid = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", terminal.pid())).unwrap();
    let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
    nix::sys::signal::kill(pid, Signal::SIGHUP).unwrap();
    let status = tokio::task::block_in_place(|| terminal.wait(PATIENCE));
    assert!(status.success() && terminal.log().contains("stopping"), "{}", terminal.log());
}

fn handoff(home: &Path) -> Option<Value> {
    let text = std::fs::read_to_string(home.join("run/engines/pool-0-r0.json")).ok()?;
    serde_json::from_str(&text).ok()
}

fn engine_pid(home: &Path) -> i32 {
    let pid = handoff(home).expect("a handoff file")["pid"].as_i64().expect("a process id");
    i32::try_from(pid).expect("process ids are small")
}

// CLOUD-2945
// CLOUD-2948
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_outlives_the_runtime_directory_and_a_working_directory_of_before_serves_as_before() {
    let folder = tempfile::tempdir().unwrap();
    let (home, port) = (folder.path(), free_port());
    let client = Client::new(&format!("http://127.0.0.1:{port}"), None);
    let log = home.join("orchestratord.log");
    let lives = || eventually("it is the one node", PATIENCE, || async { client.node("home").await });
    let is_draining = || {
        eventually("it drains", PATIENCE, || async {
            let node = client.node("home").await?;
            (serde_json::to_value(node.intent).unwrap() == "draining").then_some(())
        })
    };
    let daemon = Process::start(of_user(home, port), &log);
    lives().await;
    assert_eq!(client.post("/v2/nodes/home/drain", &json!({})).await.status(), 202);
    is_draining().await;
    stop(daemon).await;
    std::fs::remove_dir_all(home.join("run")).unwrap();
    let daemon = Process::start(of_user(home, port), &log);
    is_draining().await;
    stop(daemon).await;
    assert!(!daemon_says(&log, "./.runtime is there"), "nothing is there of before");

    // Where versions before have kept everything.
    let before = home.join("before");
    let engines = before.join(".runtime/engines");
    std::fs::create_dir_all(&engines).unwrap();
    std::fs::write(engines.join(".home.draining"), "this node takes no work until it is resumed\n").unwrap();
    let mut engine = Command::new(program("fake-engine"));
    engine.args(["--pool-id", "pool-0", "--replica-id", "r0", "--handoff-dir"]).arg(&engines);
    let _engine = Process::start(engine, &home.join("engine.log"));
    let mut command = of_user(home, port);
    command.current_dir(&before);
    let daemon = Process::start(command, &log);
    is_draining().await;
    assert!(!engines.join(".home.draining").exists());
    assert!(before.join(".runtime/orchestratord/home.draining").exists());
    assert_eq!(client.post("/v2/nodes/home/resume", &json!({})).await.status(), 202);
    ready_pool(&client, "pool-0").await;
    assert!(client.run(json!({"model_ref": "fake-model", "prompt": "x", "max_tokens": 2})).await.completed());
    stop(daemon).await;
    let text = std::fs::read_to_string(&log).unwrap();
    assert_eq!(text.matches("./.runtime is there").count(), 1, "{text}");
    assert!(text.contains(&home.join("state/orchestratord").display().to_string()), "{text}");
    assert!(!before.join(".runtime/orchestratord/home.draining").exists());
}

fn daemon_says(log: &Path, what: &str) -> bool {
    std::fs::read_to_string(log).unwrap_or_default().contains(what)
}
