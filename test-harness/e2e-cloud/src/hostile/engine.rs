//! An engine that is made to harm the node it stands behind: it answers looks as an engine does, and what
//! it is asked to do with bytes that fill whoever reads them.

use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::connection::message;

/// How it harms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harm {
    /// A million names of models.
    Names,
    /// An event whose line has no end.
    EndlessLine,
    /// Events that say nothing.
    EmptyEvents,
    /// Comments.
    Comments,
    /// Provisional answers, and never a final one.
    Informational,
    /// A head without an end.
    EndlessHead,
    /// A body whose chunks have extensions.
    ChunkExtensions,
    /// Fields behind its body, without an end.
    Trailers,
    /// A document in chunks of a byte.
    SmallChunks,
    /// A document of numbers, as long as one may be.
    Numbers,
    /// The same, with something in it that strict readers refuse.
    OddNumbers,
    /// A document that says it is compressed.
    Compressed,
    /// A refusal without an end.
    EndlessRefusal,
    /// Nothing that is wrong: as long an answer as is kept, to [`LONG_INPUTS`] texts.
    Long,
}

/// Texts to which an engine that answers at length does so.
pub const LONG_INPUTS: usize = 16;
/// Numbers of the vector of each, which are as long as any: few of them make a long answer.
const LONG_VECTOR: usize = 33_000;
const LONG_NUMBER: &str = "-1.1754944e-38";

impl Harm {
    /// Those that are wrong.
    pub const ALL: [Self; 13] = [
        Self::Names,
        Self::EndlessLine,
        Self::EmptyEvents,
        Self::Comments,
        Self::Informational,
        Self::EndlessHead,
        Self::ChunkExtensions,
        Self::Trailers,
        Self::SmallChunks,
        Self::Numbers,
        Self::OddNumbers,
        Self::Compressed,
        Self::EndlessRefusal,
    ];

    /// Whether it is done to embeddings, and not to a completion.
    pub fn is_of_documents(self) -> bool {
        matches!(self, Self::SmallChunks | Self::Numbers | Self::OddNumbers | Self::Compressed)
    }
}

/// The engine, until it is dropped.
#[derive(Debug)]
pub struct HostileEngine {
    sent: Arc<AtomicU64>,
    serving: JoinHandle<()>,
    handoff: PathBuf,
}

impl Drop for HostileEngine {
    fn drop(&mut self) {
        self.serving.abort();
        // The folder may have gone before.
        let _ = std::fs::remove_file(&self.handoff);
    }
}

impl HostileEngine {
    /// Listens, and leaves a handoff in the folder, with the model in so many slots; the pool is named after
    /// the port.
    pub async fn start(harm: Harm, model: &str, handoffs: &Path, slots: u32) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has free ports");
        let at = listener.local_addr().expect("a bound address");
        let pool = format!("evil-{}", at.port());
        let handoff = json!({
            "pool_id": pool, "replica_id": "r0", "engine": "vllm", "url": format!("http://{at}"),
            "slots": slots, "model_ref": model, "ctx_max": 8192,
        });
        let file = handoffs.join(format!("{pool}-r0.json"));
        let beside = file.with_extension("tmp");
        std::fs::write(&beside, handoff.to_string()).expect("a writable folder");
        std::fs::rename(&beside, &file).expect("a writable folder");
        let model = model.to_owned();
        let sent = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&sent);
        let serving = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                while connections.try_join_next().is_some() {}
                connections.spawn(serve(socket, harm, model.clone(), Arc::clone(&count)));
            }
        });
        Self { sent, serving, handoff: file }
    }

    /// Bytes of harm that were taken.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

async fn serve(mut socket: TcpStream, harm: Harm, model: String, sent: Arc<AtomicU64>) -> io::Result<()> {
    let mut read = Vec::new();
    loop {
        let (head, _) = message(&mut socket, &mut read).await?;
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        if path.starts_with("/v1/completions") || path.starts_with("/v1/embeddings") {
            return hurt(&mut socket, harm, &sent).await;
        }
        let answer = match path.as_str() {
            "/v1/models" if harm == Harm::Names => very_many_names().to_owned(),
            "/v1/models" => json!({ "data": [{ "id": model, "object": "model" }] }).to_string(),
            _ => "{}".to_owned(),
        };
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            answer.len()
        );
        socket.write_all(head.as_bytes()).await?;
        socket.write_all(answer.as_bytes()).await?;
    }
}

/// A list of a million models, made once.
fn very_many_names() -> &'static str {
    static LIST: OnceLock<String> = OnceLock::new();
    LIST.get_or_init(|| {
        let mut list = String::from("{\"data\":[");
        for n in 0..1_000_000 {
            let comma = if n > 0 { "," } else { "" };
            // Writing to a String cannot fail.
            let _ = write!(list, "{comma}{{\"id\":\"model-{n}\"}}");
        }
        list + "]}"
    })
}

/// Longest document that a node reads, bytes.
const DOCUMENT_BYTES: usize = 64 * 1024 * 1024;

async fn hurt(socket: &mut TcpStream, harm: Harm, sent: &AtomicU64) -> io::Result<()> {
    let head = |kind: &str, more: &str| format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\n{more}\r\n");
    let chunked = "transfer-encoding: chunked\r\n";
    let stream = head("text/event-stream", chunked);
    let chunk = |bytes: &str| format!("{:x}\r\n{bytes}\r\n", bytes.len());
    let long = "x".repeat(16 * 1024);
    let (begin, then) = match harm {
        // The looks are the harm, and a stream that never says anything.
        Harm::Names => (stream, chunk(": ka\n\n")),
        Harm::EndlessLine => (stream + &chunk("data: {\"choices\":[{\"text\":\""), chunk(&long)),
        Harm::EmptyEvents => (stream, chunk(&"data: {}\n\n".repeat(1_000))),
        Harm::Comments => (stream, chunk(&": ka\n\n".repeat(1_000))),
        Harm::Informational => (String::new(), "HTTP/1.1 102 Processing\r\n\r\n".repeat(500)),
        Harm::EndlessHead => ("HTTP/1.1 200 OK\r\n".into(), format!("x-long: {long}\r\n")),
        Harm::ChunkExtensions => (stream, format!("1;{}\r\n \r\n", "x".repeat(1_000)).repeat(16)),
        Harm::Trailers => {
            (stream + &chunk(": ka\n\n") + "0\r\n", format!("x-long: {}\r\n", "x".repeat(1_000)))
        }
        Harm::SmallChunks => (head("application/json", chunked), "1\r\n \r\n".repeat(10_000)),
        Harm::Numbers | Harm::OddNumbers => {
            let odd = if harm == Harm::OddNumbers { "\"odd\":NaN," } else { "" };
            let begin = format!("{{{odd}\"data\":[");
            return document(socket, sent, &begin, (1, DOCUMENT_BYTES / 2 - 1_000), "1").await;
        }
        Harm::Long => {
            let vectors = (LONG_INPUTS, LONG_VECTOR);
            return document(socket, sent, "{\"data\":[", vectors, LONG_NUMBER).await;
        }
        Harm::Compressed => {
            let head = head("application/json", "content-encoding: gzip\r\ntransfer-encoding: chunked\r\n");
            (head, chunk(&"\0".repeat(16 * 1024)))
        }
        Harm::EndlessRefusal => {
            let refusal = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
            (refusal.to_owned() + &chunk("{\"message\":\""), chunk(&long))
        }
    };
    write(socket, sent, begin.as_bytes()).await?;
    loop {
        write(socket, sent, then.as_bytes()).await?;
        tokio::task::yield_now().await;
    }
}

/// As many vectors of so many numbers each, with the length of it all in front.
async fn document(
    socket: &mut TcpStream,
    sent: &AtomicU64,
    begin: &str,
    (vectors, numbers): (usize, usize),
    number: &str,
) -> io::Result<()> {
    let opened = |n: usize| {
        let comma = if n > 0 { "," } else { "" };
        format!("{comma}{{\"index\":{n},\"embedding\":[{number}")
    };
    let next = format!(",{number}");
    let around: usize = (0..vectors).map(|n| opened(n).len() + "]}".len()).sum();
    let length = begin.len() + around + vectors * (numbers - 1) * next.len() + "]}".len();
    let head =
        format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n");
    write(socket, sent, (head + begin).as_bytes()).await?;
    let many = next.repeat(4 * 1024);
    for n in 0..vectors {
        write(socket, sent, opened(n).as_bytes()).await?;
        let mut left = (numbers - 1) * next.len();
        while left > 0 {
            let piece = left.min(many.len());
            write(socket, sent, &many.as_bytes()[..piece]).await?;
            left -= piece;
        }
        write(socket, sent, b"]}").await?;
    }
    write(socket, sent, b"]}").await
}

async fn write(socket: &mut TcpStream, sent: &AtomicU64, bytes: &[u8]) -> io::Result<()> {
    socket.write_all(bytes).await?;
    sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    Ok(())
}
