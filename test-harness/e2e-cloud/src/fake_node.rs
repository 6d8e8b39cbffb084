//! A node that only seems to be one: it registers, reports a ready pool and answers probes, and
//! treats every attempt alike.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pool_registry_types::node::Liveness;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use uuid::Uuid;

use crate::client::Client;
use crate::connection::message;
use crate::eventually;

/// Often enough for an interval of one second.
const BEAT_EVERY: Duration = Duration::from_millis(500);
/// Longest that joining may take.
const JOIN_PATIENCE: Duration = Duration::from_secs(10);

/// What the node says to an attempt, and to all else that needs a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeAnswer {
    /// This status, with an empty object.
    Status(u16),
    /// The connection is closed without a word.
    Nothing,
}

/// A node of the harness's own; gone without a word when dropped.
#[derive(Debug)]
pub struct FakeNode {
    pub id: String,
    asked: Arc<AtomicUsize>,
    running: [JoinHandle<()>; 2],
}

impl FakeNode {
    /// Joins with a ready pool of four slots that has the model, and waits until it is online.
    pub async fn join(control: &Client, id: &str, model: &str, answer: NodeAnswer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has free ports");
        let address = format!("http://{}", listener.local_addr().expect("a bound address"));
        let boot_id = Uuid::new_v4();
        let asked = Arc::new(AtomicUsize::new(0));
        let live = json!({"node_id": id, "boot_id": boot_id}).to_string();
        let serving = tokio::spawn(serve(listener, live, answer, Arc::clone(&asked)));
        let register = json!({
            "node_id": id, "machine_id": "m", "boot_id": boot_id, "address": address, "version": "0",
        });
        let response = control.post("/v2/nodes/register", &register).await;
        assert_eq!(response.status(), 200, "{id} is not let in");
        let registered: Value = response.json().await.expect("the answer to a registration");
        let beating = beat(control.clone(), id.to_owned(), registered["epoch"].clone(), model.to_owned());
        let running = [serving, tokio::spawn(beating)];
        let node = Self { id: id.to_owned(), asked, running };
        eventually(&format!("{id} is online and ready"), JOIN_PATIENCE, || async {
            let view = control.node(id).await?;
            (view.liveness == Liveness::Online && !view.pools.is_empty()).then_some(())
        })
        .await;
        node
    }

    /// How many attempts were sent here.
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }

    /// Leaves the cluster.
    pub async fn leave(self, control: &Client) {
        let path = format!("/v2/nodes/{}", self.id);
        let left = control.request(Method::DELETE, &path).timeout(JOIN_PATIENCE).send().await;
        assert_eq!(left.expect("an answer").status(), 204);
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        self.running.iter().for_each(JoinHandle::abort);
    }
}

async fn serve(listener: TcpListener, live: String, answer: NodeAnswer, asked: Arc<AtomicUsize>) {
    // Connections end with it.
    let mut connections = JoinSet::new();
    while let Ok((socket, _)) = listener.accept().await {
        let (live, asked) = (live.clone(), Arc::clone(&asked));
        connections.spawn(async move {
            // Whoever asked may have gone.
            let _ = serve_one(socket, &live, answer, &asked).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

/// One request a connection.
async fn serve_one(
    mut socket: TcpStream,
    live: &str,
    answer: NodeAnswer,
    asked: &AtomicUsize,
) -> io::Result<()> {
    let (head, _) = message(&mut socket, &mut Vec::new()).await?;
    asked.fetch_add(usize::from(head.starts_with("POST /v2/pools/")), Ordering::Relaxed);
    let is_probe = head.starts_with("GET /health/live ");
    let (status, body) = match answer {
        _ if is_probe => (200, live),
        NodeAnswer::Status(status) => (status, "{}"),
        NodeAnswer::Nothing => return Ok(()),
    };
    let text = format!(
        "HTTP/1.1 {status} \r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len(),
    );
    socket.write_all(text.as_bytes()).await
}

async fn beat(control: Client, id: String, epoch: Value, model: String) {
    let path = format!("/v2/nodes/{id}/heartbeat");
    for seq in 1_u64.. {
        let report = json!({
            "epoch": epoch, "seq": seq, "timestamp": "",
            "pools": [{
                "pool_id": "pool-0", "state": "ready", "ready": true, "engine": "llamacpp",
                "models": [model], "replicas": [{"replica_id": "r0", "ready": true, "slots_total": 4}],
            }],
        });
        // Whether it was taken is seen in the node's liveness.
        let _ = control.request(Method::POST, &path).timeout(BEAT_EVERY).json(&report).send().await;
        tokio::time::sleep(BEAT_EVERY).await;
    }
}
