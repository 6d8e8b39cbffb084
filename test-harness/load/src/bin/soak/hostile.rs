//! What hostile peers do, once each time they are asked; nothing of it is awaited to succeed.

use std::pin::Pin;
use std::time::Duration;

use e2e_cloud::Client;
use fastrand::Rng;
use reqwest::Method;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use uuid::Uuid;

use crate::{INVENTORS_TOKEN, READERS_TOKEN};

/// Longest that one of them insists.
const INSISTS: Duration = Duration::from_secs(5);

/// The daemons' ports.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    pub(crate) control: u16,
    pub(crate) node: u16,
}

impl Target {
    fn any(self, random: &mut Rng) -> u16 {
        if random.u8(..4) == 0 { self.node } else { self.control }
    }

    fn client(self, token: &str) -> Client {
        Client::new(&format!("http://127.0.0.1:{}", self.control), Some(token))
    }
}

type Attack = fn(Target, Rng) -> Pin<Box<dyn Future<Output = ()> + Send>>;

/// All kinds of them.
pub(crate) const HOSTILE: [(&str, Attack); 5] = [
    ("idle connections", |target, random| Box::pin(idle_connections(target, random))),
    ("garbage", |target, random| Box::pin(garbage(target, random))),
    ("endless bodies", |target, random| Box::pin(endless_body(target, random))),
    ("invented nodes and models", |target, random| Box::pin(inventions(target, random))),
    ("readers that do not read", |target, random| Box::pin(stopped_readers(target, random))),
];

/// More of them than there is room for, which say nothing or half a head.
async fn idle_connections(target: Target, mut random: Rng) {
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
async fn garbage(target: Target, mut random: Rng) {
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
async fn endless_body(target: Target, mut random: Rng) {
    let path = if random.bool() { "/v2/tasks" } else { "/v2/artifacts" };
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {READERS_TOKEN}\r\nTransfer-Encoding: chunked\r\n\r\n"
    );
    let piece = [b"10000\r\n".as_slice(), " ".repeat(0x10000).as_bytes(), b"\r\n"].concat();
    let insist = async {
        let mut socket = TcpStream::connect(("127.0.0.1", target.control)).await?;
        socket.write_all(head.as_bytes()).await?;
        loop {
            socket.write_all(&piece).await?;
        }
    };
    let _: Result<std::io::Result<()>, _> = timeout(INSISTS, insist).await;
}

/// Nodes that are none, with models that nobody has.
async fn inventions(target: Target, mut random: Rng) {
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
        let models: Vec<String> = (0..2_000).map(|_| format!("model-{}", random.u64(..))).collect();
        let beat = json!({
            "epoch": registered["epoch"], "seq": 1, "timestamp": "",
            "pools": [{
                "pool_id": "pool-0", "state": "ready", "ready": true, "engine": "llamacpp", "models": models,
                "replicas": [{"replica_id": "r0", "ready": true, "slots_total": 4096}],
            }],
        });
        let path = format!("/v2/nodes/{id}/heartbeat");
        let _ = client.request(Method::POST, &path).timeout(INSISTS).json(&beat).send().await;
    }
}

/// Submits a task, and reads it often without taking a byte.
async fn stopped_readers(target: Target, mut random: Rng) {
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
