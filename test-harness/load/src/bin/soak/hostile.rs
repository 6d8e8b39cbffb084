//! What hostile peers do, for as long as each is let; nothing of it is awaited to succeed.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use e2e_cloud::Client;
use e2e_cloud::hostile::engine::{Harm, HostileEngine};
use e2e_cloud::hostile::{self, Flood};
use fastrand::Rng;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use uuid::Uuid;

use crate::{INVENTORS_TOKEN, READERS_TOKEN};

/// Longest wait for one answer.
const INSISTS: Duration = Duration::from_secs(5);
/// What the engine that harms is asked for.
const EVIL_MODEL: &str = "evil-model";
/// Its slots.
const EVIL_SLOTS: u32 = 4;

/// Whom they are for.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) control: u16,
    pub(crate) node: u16,
    /// Where the node finds its engines that has hostile ones.
    pub(crate) handoffs: PathBuf,
}

impl Target {
    fn any(&self, random: &mut Rng) -> u16 {
        if random.u8(..4) == 0 { self.node } else { self.control }
    }

    fn client(&self, token: &str) -> Client {
        Client::new(&format!("http://127.0.0.1:{}", self.control), Some(token))
    }
}

/// What a client may do too often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Excess {
    IdleConnections,
    Garbage,
    EndlessBodies,
    Inventions,
    StoppedReaders,
    /// Sessions, models that nobody has, and tasks of both.
    SessionsAndLanes,
    /// Very many artifacts of a few bytes.
    Artifacts,
    /// Followers of what changes, who read nothing.
    Followers,
    /// Long lists that nobody reads.
    UnreadLists,
}

/// One kind of hostile peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Attack {
    Excess(Excess),
    Flood(Flood),
    Engine(Harm),
}

impl Attack {
    pub(crate) fn all() -> Vec<Self> {
        let excesses = [
            Excess::IdleConnections,
            Excess::Garbage,
            Excess::EndlessBodies,
            Excess::Inventions,
            Excess::StoppedReaders,
            Excess::SessionsAndLanes,
            Excess::Artifacts,
            Excess::Followers,
            Excess::UnreadLists,
        ];
        let floods = Flood::ALL.map(Self::Flood);
        excesses.map(Self::Excess).into_iter().chain(floods).chain(Harm::ALL.map(Self::Engine)).collect()
    }

    pub(crate) fn name(&self) -> String {
        match self {
            Self::Excess(excess) => format!("{excess:?}"),
            Self::Flood(flood) => format!("{flood:?}"),
            Self::Engine(harm) => format!("engine:{harm:?}"),
        }
    }

    /// Until its time is over, and not much longer. Returns the bytes that its engine has answered, where it
    /// is one.
    pub(crate) async fn run(self, target: &Target, mut random: Rng, until: Instant) -> Option<u64> {
        match self {
            Self::Flood(flood) => {
                let port = target.any(&mut random);
                let token = if port == target.control { READERS_TOKEN } else { e2e_cloud::cluster::TOKEN };
                let target = hostile::Target { port, token: token.to_owned(), until: until.into() };
                flood.pour(&target, &mut random).await;
            }
            Self::Engine(harm) => return Some(harmed(harm, target, &mut random, until).await),
            Self::Excess(excess) => {
                while Instant::now() < until {
                    excess.once(target, random.fork()).await;
                }
            }
        }
        None
    }
}

impl Excess {
    async fn once(self, target: &Target, mut random: Rng) {
        match self {
            Self::IdleConnections => idle_connections(target, random).await,
            Self::Garbage => garbage(target, random).await,
            Self::EndlessBodies => endless_body(target, random).await,
            Self::Inventions => inventions(target, random).await,
            Self::StoppedReaders => stopped_readers(target, random).await,
            Self::SessionsAndLanes => sessions_and_lanes(target, random).await,
            Self::Artifacts => artifacts(target, random).await,
            Self::Followers => unread("/v2/events", target, random).await,
            Self::UnreadLists => {
                let path = if random.bool() { "/v2/nodes" } else { "/openapi.json" };
                unread(path, target, random).await;
            }
        }
    }
}

/// An engine that harms whoever asks it, behind a node of ours, and tasks for it.
async fn harmed(harm: Harm, target: &Target, random: &mut Rng, until: Instant) -> u64 {
    // Each engine has a place of its own: several may run at a time.
    let engine = HostileEngine::start(harm, EVIL_MODEL, &target.handoffs, EVIL_SLOTS).await;
    let client = target.client(READERS_TOKEN);
    let mut ids = Vec::new();
    while Instant::now() < until {
        if ids.len() < 8 {
            let mut task = json!({ "model_ref": EVIL_MODEL, "deadline_ms": 10_000 });
            if harm.is_of_documents() {
                task["workload"] = "embedding".into();
                task["inputs"] = json!({ "embedding": ["a"] });
            } else {
                task["prompt"] = "once".into();
                task["max_tokens"] = random.u32(1..1_000).into();
            }
            ids.extend(submit(&client, &task).await);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    for id in ids {
        let path = format!("/v2/tasks/{id}/cancel");
        let _ = client.request(Method::POST, &path).timeout(INSISTS).send().await;
    }
    engine.sent()
}

/// The task's id, where it was taken.
async fn submit(client: &Client, task: &Value) -> Option<String> {
    let submit = client.request(Method::POST, "/v2/tasks").timeout(INSISTS).json(task);
    let accepted = submit.send().await.ok()?.json::<Value>().await.ok()?;
    Some(accepted["task_id"].as_str()?.to_owned())
}

/// Very many sessions and models, of small tasks that cannot start.
async fn sessions_and_lanes(target: &Target, mut random: Rng) {
    let client = target.client(READERS_TOKEN);
    for _ in 0..100 {
        let task = json!({
            "model_ref": format!("nobody-has-{}", random.u32(..)), "prompt": "x", "deadline_ms": 2_000,
            "session_id": Uuid::from_u128(random.u128(..)), "task_id": Uuid::from_u128(random.u128(..)),
        });
        if submit(&client, &task).await.is_none() {
            return tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

async fn artifacts(target: &Target, mut random: Rng) {
    let client = target.client(READERS_TOKEN);
    for _ in 0..100 {
        let put = client.request(Method::POST, "/v2/artifacts").timeout(INSISTS);
        if put.json(&random.u64(..)).send().await.is_err() {
            return;
        }
    }
}

/// Asks often, on connections of their own, and reads nothing.
async fn unread(path: &str, target: &Target, mut random: Rng) {
    let ask =
        format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {READERS_TOKEN}\r\n\r\n");
    let mut held = Vec::new();
    for _ in 0..200 {
        let Ok(mut socket) = TcpStream::connect(("127.0.0.1", target.control)).await else { break };
        let _ = socket.write_all(ask.as_bytes()).await;
        held.push(socket);
    }
    tokio::time::sleep(Duration::from_millis(random.u64(500..2_000))).await;
}

/// More of them than there is room for, which say nothing or half a head.
async fn idle_connections(target: &Target, mut random: Rng) {
    let mut held = Vec::new();
    for _ in 0..1_000 {
        let Ok(mut socket) = TcpStream::connect(("127.0.0.1", target.any(&mut random))).await else { break };
        if random.bool() {
            let _ = socket.write_all(b"GET /v2/nodes HTTP/1.1\r\nX-Half: ").await;
        }
        held.push(socket);
    }
    tokio::time::sleep(Duration::from_millis(random.u64(500..3_000))).await;
}

/// Bytes that are no request, and bodies that are no JSON of ours.
async fn garbage(target: &Target, mut random: Rng) {
    let Ok(mut socket) = TcpStream::connect(("127.0.0.1", target.any(&mut random))).await else { return };
    let noise: Vec<u8> = (0..random.usize(1..20_000)).map(|_| random.u8(..)).collect();
    let paths = ["/v2/tasks", "/v2/artifacts", "/v2/placement/explain", "/v2/nodes/register", "/v2/link"];
    let path = paths[random.usize(..paths.len())];
    let token = if random.bool() { READERS_TOKEN } else { INVENTORS_TOKEN };
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        noise.len()
    );
    if random.u8(..4) > 0 && socket.write_all(head.as_bytes()).await.is_err() {
        return;
    }
    let nested = "[".repeat(noise.len());
    let body = if random.u8(..4) == 0 { nested.as_bytes() } else { noise.as_slice() };
    let _ = socket.write_all(body).await;
    let _ = timeout(Duration::from_millis(200), socket.read(&mut [0; 1024])).await;
}

/// Bodies without end, a few at once, as fast as they are taken.
async fn endless_body(target: &Target, mut random: Rng) {
    let path = if random.bool() { "/v2/tasks" } else { "/v2/artifacts" };
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {READERS_TOKEN}\r\nTransfer-Encoding: chunked\r\n\r\n"
    );
    let piece = [b"10000\r\n".as_slice(), " ".repeat(0x10000).as_bytes(), b"\r\n"].concat();
    let mut running = JoinSet::new();
    for _ in 0..4 {
        let pouring = pour(target.control, head.clone(), piece.clone());
        running.spawn(timeout(Duration::from_secs(2), pouring));
    }
    running.join_all().await;
}

/// The piece again and again, until it is not taken any more.
async fn pour(port: u16, head: String, piece: Vec<u8>) -> std::io::Result<()> {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await?;
    socket.write_all(head.as_bytes()).await?;
    loop {
        socket.write_all(&piece).await?;
    }
}

/// Nodes that are none, with models that nobody has.
async fn inventions(target: &Target, mut random: Rng) {
    let client = target.client(INVENTORS_TOKEN);
    for _ in 0..100 {
        let id = format!("invented-{}", random.u64(..));
        let body = json!({
            "node_id": id, "machine_id": "m", "boot_id": Uuid::from_u128(random.u128(..)),
            "address": "http://127.0.0.1:9", "version": "0",
        });
        let register = client.request(Method::POST, "/v2/nodes/register").timeout(INSISTS).json(&body);
        let Ok(answer) = register.send().await else { continue };
        let Ok(registered) = answer.json::<serde_json::Value>().await else { continue };
        if registered["epoch"].is_null() {
            // Its places are taken.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        }
        let long = "x".repeat(random.usize(1..180));
        let mut pool = |n: u32| {
            let models: Vec<String> = (0..4_000).map(|_| format!("{}-{long}", random.u64(..))).collect();
            json!({
                "pool_id": format!("pool-{n}"), "state": "ready", "ready": true, "engine": "llamacpp", "models": models,
                "replicas": [{"replica_id": "r0", "ready": true, "slots_total": 4096}],
            })
        };
        let pools = [pool(0), pool(1)];
        let beat = json!({ "epoch": registered["epoch"], "seq": 1, "timestamp": "", "pools": pools });
        let path = format!("/v2/nodes/{id}/heartbeat");
        let _ = client.request(Method::POST, &path).timeout(INSISTS).json(&beat).send().await;
    }
}

/// Submits a task, and reads it often without taking a byte.
async fn stopped_readers(target: &Target, mut random: Rng) {
    let client = target.client(READERS_TOKEN);
    let task = json!({
        "model_ref": "fake-model", "prompt": "once upon a time", "max_tokens": random.u32(100..1_000),
    });
    let submit = client.request(Method::POST, "/v2/tasks").timeout(INSISTS).json(&task);
    let Ok(answer) = submit.send().await else { return };
    let Ok(accepted) = answer.json::<serde_json::Value>().await else { return };
    let Some(task_id) = accepted["task_id"].as_str() else { return };
    let ask = format!(
        "GET /v2/tasks/{task_id}/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {READERS_TOKEN}\r\n\r\n"
    );
    let mut held = Vec::new();
    for _ in 0..80 {
        let Ok(mut socket) = TcpStream::connect(("127.0.0.1", target.control)).await else { break };
        let _ = socket.write_all(ask.as_bytes()).await;
        held.push(socket);
    }
    tokio::time::sleep(Duration::from_millis(random.u64(500..4_000))).await;
}
