//! What strangers can do to a daemon's listener, and what right requests feel of it.

#![expect(clippy::print_stdout, reason = "the figures of a run are part of its result")]

mod engines;
mod floods;
mod readers;

use std::process::Command;
use std::time::{Duration, Instant};

use e2e_cloud::cluster::TOKEN;
use e2e_cloud::process::{free_port, program, raise_file_limit};
use e2e_cloud::{Client, Cluster, Options, Process, eventually};
use nix::sys::signal::Signal;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use uuid::Uuid;

/// Resident memory that a daemon may have under attack, MiB.
const MOST_MIB: u64 = 150;

pub(super) fn resident_mib(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("proc(5)");
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).expect("a number") / 1024
}

/// Right requests all the while: how many, how slow, and how large the daemon became.
pub(super) struct Watch {
    pub(super) took: Vec<Duration>,
    pub(super) most_mib: u64,
}

impl Watch {
    pub(super) fn p99(&self) -> Duration {
        self.took[self.took.len() * 99 / 100]
    }
}

/// Asks `path` while the attack runs; each answer must be a good one.
pub(super) async fn right_requests_during<A>(
    client: &Client,
    path: &str,
    pid: u32,
    attack: impl Future<Output = A>,
) -> (A, Watch) {
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let (client, path) = (client.clone(), path.to_owned());
    let asking = tokio::spawn(async move {
        let mut watch = Watch { took: Vec::new(), most_mib: 0 };
        tokio::pin!(stopped);
        loop {
            let start = Instant::now();
            let answer = client.get(&path).await.expect("a right request is answered");
            assert_eq!(answer.status(), 200);
            watch.took.push(start.elapsed());
            watch.most_mib = watch.most_mib.max(resident_mib(pid));
            tokio::select! {
                _ = &mut stopped => break,
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
            }
        }
        watch.took.sort_unstable();
        watch
    });
    let outcome = attack.await;
    // It may have ended by an assertion, which its handle says.
    let _ = stop.send(());
    (outcome, asking.await.expect("right requests are answered"))
}

/// 2,000 connections that send a byte now and then. Returns how many were closed by the daemon.
async fn slow_loris(port: u16) -> usize {
    let mut running = tokio::task::JoinSet::new();
    for n in 0..2_000_u64 {
        running.spawn(async move {
            let Ok(mut socket) = TcpStream::connect(("127.0.0.1", port)).await else { return true };
            let start = b"GET /v2/nodes HTTP/1.1\r\nHost: localhost\r\nX-Slow: ";
            if socket.write_all(start).await.is_err() {
                return true;
            }
            for _ in 0..28 {
                tokio::time::sleep(Duration::from_millis(500 + n % 100)).await;
                if socket.write_all(b"a").await.is_err() {
                    return true;
                }
                let mut byte = [0];
                let read = tokio::time::timeout(Duration::from_millis(1), socket.read(&mut byte)).await;
                if matches!(read, Ok(Ok(0) | Err(_))) {
                    return true;
                }
            }
            false
        });
    }
    running.join_all().await.into_iter().filter(|closed| *closed).count()
}

/// Requests whose headers have 10 MB each. Returns the statuses; 0 where the connection was cut.
async fn huge_headers(port: u16) -> Vec<u16> {
    let mut running = tokio::task::JoinSet::new();
    for _ in 0..50 {
        running.spawn(async move {
            let mut socket = TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
            // The daemon stops reading and closes: both are fine for the rest.
            let _ = socket.write_all(b"GET /v2/nodes HTTP/1.1\r\nHost: localhost\r\nX-Large: ").await;
            let piece = vec![b'a'; 64 * 1024];
            for _ in 0..160 {
                if socket.write_all(&piece).await.is_err() {
                    break;
                }
            }
            status(&mut socket).await
        });
    }
    running.join_all().await
}

/// Bodies that announce 1 GB and send until they are refused. Returns the statuses and the most
/// bytes that one of them could send.
async fn huge_bodies(port: u16, token: &str) -> (Vec<u16>, usize) {
    let mut running = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let head = format!(
            "POST /v2/tasks HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\nContent-Length: 1073741824\r\n\r\n"
        );
        running.spawn(async move {
            let mut socket = TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
            socket.write_all(head.as_bytes()).await.expect("the head is read");
            let (piece, mut sent) = (vec![b'a'; 64 * 1024], 0);
            while sent < 1024 * 1024 * 1024 && socket.write_all(&piece).await.is_ok() {
                sent += piece.len();
            }
            (status(&mut socket).await, sent)
        });
    }
    let (statuses, sent): (Vec<u16>, Vec<usize>) = running.join_all().await.into_iter().unzip();
    (statuses, sent.into_iter().max().unwrap_or(0))
}

async fn status(socket: &mut TcpStream) -> u16 {
    let mut head = [0; 12];
    let read = tokio::time::timeout(Duration::from_secs(20), socket.read_exact(&mut head)).await;
    match read {
        Ok(Ok(_)) => std::str::from_utf8(&head[9..]).ok().and_then(|text| text.parse().ok()).unwrap_or(0),
        Ok(Err(_)) => 0,
        Err(_) => panic!("the daemon neither answers nor closes"),
    }
}

/// 10,000 tokens that are not taken, 200 at a time, one for each caller. Returns how long it took.
async fn wrong_tokens(base: &str, token: impl Fn(usize) -> String) -> Duration {
    let start = Instant::now();
    let mut running = tokio::task::JoinSet::new();
    for guesser in 0..200 {
        let client = Client::new(base, Some(&token(guesser)));
        running.spawn(async move {
            for _ in 0..50 {
                let answer = client.get("/v2/nodes").await.expect("a wrong token is answered");
                assert_eq!(answer.status(), 401);
            }
        });
    }
    running.join_all().await;
    start.elapsed()
}

// CLOUD-2510
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_do_not_keep_a_daemon_from_answering_nor_fill_its_memory() {
    raise_file_limit();
    let cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    let control =
        (cluster.client.clone(), cluster.port, cluster.control.as_ref().unwrap().pid(), "/v2/nodes");
    let daemon = cluster.nodes[0].daemon.as_ref().unwrap().pid();
    let node = (cluster.node_client(0), cluster.nodes[0].port, daemon, "/v2/pools");
    for (name, (client, port, pid, path)) in [("orchestratord", control), ("pool-managerd", node)] {
        let say = |what: &str, watch: &Watch| {
            println!(
                "{name}, {what}: {} right requests, p99 {} ms, at most {} MiB resident",
                watch.took.len(),
                watch.p99().as_millis(),
                watch.most_mib
            );
            assert!(watch.most_mib < MOST_MIB, "{name}, {what}: {} MiB", watch.most_mib);
        };
        let (closed, watch) = right_requests_during(&client, path, pid, slow_loris(port)).await;
        say("2,000 slow connections", &watch);
        assert_eq!(closed, 2_000, "each was closed in its time");
        let (statuses, watch) = right_requests_during(&client, path, pid, huge_headers(port)).await;
        say("50 headers of 10 MB", &watch);
        assert!(statuses.iter().all(|status| [0, 431].contains(status)), "{statuses:?}");
        let token = client.token.clone().unwrap();
        let (outcome, watch) = right_requests_during(&client, path, pid, huge_bodies(port, &token)).await;
        say("8 bodies of 1 GB", &watch);
        let (statuses, most) = outcome;
        assert!(statuses.iter().all(|status| [0, 404, 413].contains(status)), "{statuses:?}");
        assert!(most < 64 * 1024 * 1024, "{most} bytes were taken of one body");
        let guesses = wrong_tokens(&client.base, |guesser| format!("test-token-guess-{guesser}"));
        let (took, watch) = right_requests_during(&client, path, pid, guesses).await;
        say(&format!("10,000 wrong tokens in {} s", took.as_secs()), &watch);
    }
    let metrics = cluster.client.get("/metrics").await.unwrap().text().await.unwrap();
    assert!(
        metrics.contains("llorch_refused_calls_total{code=\"BAD_TOKEN\",route=\"/v2/nodes\"} 10000"),
        "{metrics}"
    );
    assert!(metrics.contains("llorch_closed_connections_total{why=\"slow\"} 2000"), "{metrics}");
    let transcript = cluster.client.run(cluster.task(4)).await;
    transcript.check();
    assert!(transcript.completed());
}

// CLOUD-2760
// CLOUD-2761
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_without_a_token_lock_neither_operators_nor_nodes_out() {
    let most = 64;
    let control = vec![("ORCHESTRATORD_MAX_CONNECTIONS", most.to_string())];
    let cluster = Cluster::start(Options { nodes: 1, control, ..Options::default() }).await;
    let pid = cluster.control.as_ref().unwrap().pid();
    let port = cluster.port;
    let idle = async {
        let mut held = Vec::new();
        // Some of them ask, with no token that is known.
        for n in 0..10 * most {
            let mut socket = TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
            if n % 4 == 0 {
                let ask = b"GET /v2/nodes HTTP/1.1\r\nHost: localhost\r\n\r\n";
                // It may be closed for another by now.
                let _ = socket.write_all(ask).await;
            }
            held.push(socket);
        }
        // Nobody was a stranger before, and each of these comes on a connection of its own.
        for _ in 0..20 {
            let fresh = Client::new(&cluster.client.base, Some(TOKEN));
            assert_eq!(fresh.get("/v2/nodes").await.expect("an answer").status(), 200);
            let transcript = fresh.run(cluster.task(4)).await;
            transcript.check();
            assert!(transcript.completed());
        }
        held.len()
    };
    let (held, watch) = right_requests_during(&cluster.client, "/v2/nodes", pid, idle).await;
    println!("{held} idle connections where {most} have room: p99 {} ms", watch.p99().as_millis());
    let metrics = cluster.client.get("/metrics").await.unwrap().text().await.unwrap();
    assert!(metrics.contains("llorch_closed_connections_total{why=\"over_limit\"} 0"), "{metrics}");
    cluster.wait_online(0).await;
}

// CLOUD-2757
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_of_nodes_has_its_own_places_and_no_other() {
    const NODES_TOKEN: &str = "test-token-of-invented-nodes";
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.toml");
    let tokens =
        // The first is the one that the control plane shows its nodes.
        [("operator", TOKEN, "admin"), ("autoscaler", NODES_TOKEN, "node")].map(|(name, token, scope)| {
            format!("[[token]]\nname = \"{name}\"\ntoken = \"{token}\"\nscopes = [\"{scope}\"]\n")
        });
    std::fs::write(&file, tokens.concat()).unwrap();
    let control = vec![("LLORCH_API_TOKEN_FILE", file.display().to_string())];
    let cluster = Cluster::start(Options { nodes: 1, control, ..Options::default() }).await;
    let register = async |client: &Client, name: String| {
        let body = json!({
            "node_id": name, "machine_id": "m", "boot_id": Uuid::new_v4(), "address": "http://127.0.0.1:9", "version": "0",
        });
        let answer = client.post("/v2/nodes/register", &body).await;
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    let inventor = Client::new(&cluster.client.base, Some(NODES_TOKEN));
    for n in 0..64 {
        assert_eq!(register(&inventor, format!("invented-{n}")).await.0, 200, "{n}");
    }
    let (status, text) = register(&inventor, "invented-64".into()).await;
    assert!(status == 429 && text.contains("RATE_LIMITED") && text.contains("autoscaler"), "{status} {text}");
    assert_eq!(register(&cluster.client, "another".into()).await.0, 200, "another token has its own");
    assert_eq!(register(&inventor, "invented-0".into()).await.0, 200, "one that is known comes again");
    cluster.wait_online(0).await;
}

/// How many lines of its log a daemon has lost, by its metrics.
async fn lines_lost(client: &Client) -> u64 {
    let page = client.get("/metrics").await.unwrap().text().await.unwrap();
    let names = ["llorch_log_lines_lost_total", "llorch_agent_log_lines_lost_total"];
    let line = page.lines().find(|line| names.iter().any(|name| line.starts_with(name)));
    let value = line.and_then(|line| line.rsplit_once(' ')).and_then(|(_, value)| value.parse().ok());
    value.unwrap_or_else(|| panic!("no count of lost lines: {page}"))
}

// CLOUD-1140
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_nobody_reads_stops_neither_daemon() {
    const EXPIRED_TOKEN: &str = "test-token-expired";
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.toml");
    let tokens = [(TOKEN, "2100"), (EXPIRED_TOKEN, "2026")].map(|(token, year)| {
        format!(
            "[[token]]\nname = \"until {year}\"\ntoken = \"{token}\"\nscopes = [\"admin\"]\nexpires = {year}-01-01T00:00:00Z\n"
        )
    });
    std::fs::write(&file, tokens.concat()).unwrap();
    for (name, address, variable, value) in [
        ("orchestratord", "ORCHESTRATORD_ADDR", "ORCHESTRATORD_CLOUD_PROFILE", "true"),
        ("pool-managerd", "POOL_MANAGERD_ADDR", "ORCHESTRATORD_REGISTER_ON_STARTUP", "false"),
    ] {
        let bound = format!("127.0.0.1:{}", free_port());
        let mut command = Command::new(program(name));
        command
            .current_dir(dir.path())
            .env(address, &bound)
            .env(variable, value)
            .env("STATE_DIRECTORY", dir.path().join("state"))
            .env("RUNTIME_DIRECTORY", dir.path().join("run"))
            .env("POOL_MANAGERD_NODE_ID", "gpu-node-1")
            .env("LLORCH_API_TOKEN_FILE", &file);
        let mut daemon = Process::start_unread(command);
        let client = Client::new(&format!("http://{bound}"), Some(TOKEN));
        eventually(&format!("{name} lives"), Duration::from_secs(10), || async {
            client.get("/health/live").await.ok()
        })
        .await;
        // Each is a warning: 10,000 lines, and room for some 600 in the pipe.
        let expired = wrong_tokens(&client.base, |_| EXPIRED_TOKEN.to_owned());
        let (_, watch) = right_requests_during(&client, "/health/live", daemon.pid(), expired).await;
        assert!(watch.most_mib < MOST_MIB, "{name}: {} MiB", watch.most_mib);
        let lost = lines_lost(&client).await;
        println!("{name}: {lost} lines lost, p99 of /health/live {} ms", watch.p99().as_millis());
        assert!(lost > 0, "{name} lost no line");
        daemon.signal(Signal::SIGTERM);
        let status = tokio::task::block_in_place(|| daemon.wait(Duration::from_secs(15)));
        assert!(status.success(), "{name}: {status}");
    }
}
