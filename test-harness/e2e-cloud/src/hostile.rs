//! What hostile peers send to a daemon, as bytes: floods that no client library would send.
//!
//! Each insists until the daemon closes, or its time is over, and expects nothing. What is asserted is
//! seen on the daemon, and by those who ask it rightly meanwhile.

pub mod engine;
mod frames;

use std::io;

use fastrand::Rng;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use self::frames::{Flags, Kind, begin, frame, head};

/// Whom a flood is for.
#[derive(Debug, Clone)]
pub struct Target {
    pub port: u16,
    /// A token that the daemon knows.
    pub token: String,
    pub until: Instant,
}

/// A way to fill something of a daemon's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flood {
    /// Streams that are begun and reset, as fast as they are taken.
    Http2Resets,
    /// A head without an end.
    Http2Continuations,
    /// Pings and settings, whose answers nobody reads.
    Http2Pings,
    /// Streams whose bodies never come, on many connections.
    Http2Streams,
    /// Data without bytes.
    Http2EmptyData,
    /// Answers for which there is never a window.
    Http2NoWindow,
    /// Bodies of which one half comes.
    HalfBodies,
    /// Chunks of a byte, with extensions.
    ChunkExtensions,
    /// Fields behind a body, without an end.
    Trailers,
    /// Requests one behind the other, whose answers nobody reads.
    Pipeline,
    /// Bodies that are announced and asked for, and do not come.
    Expectations,
    /// Heads with as many fields as go into one, and values of every kind.
    OddHeads,
}

impl Flood {
    pub const ALL: [Self; 12] = [
        Self::Http2Resets,
        Self::Http2Continuations,
        Self::Http2Pings,
        Self::Http2Streams,
        Self::Http2EmptyData,
        Self::Http2NoWindow,
        Self::HalfBodies,
        Self::ChunkExtensions,
        Self::Trailers,
        Self::Pipeline,
        Self::Expectations,
        Self::OddHeads,
    ];

    /// Connections that it uses at once.
    fn connections(self) -> usize {
        match self {
            Self::Http2Continuations | Self::Trailers | Self::ChunkExtensions => 8,
            Self::Http2Resets | Self::Http2Pings | Self::Http2EmptyData | Self::Pipeline => 4,
            Self::Http2Streams | Self::Http2NoWindow | Self::OddHeads => 24,
            Self::HalfBodies | Self::Expectations => 64,
        }
    }

    /// Insists until the target's time is over. Returns the bytes that the daemon has taken.
    pub async fn pour(self, target: &Target, random: &mut Rng) -> u64 {
        let mut running = tokio::task::JoinSet::new();
        for _ in 0..self.connections() {
            let (target, mut random) = (target.clone(), random.fork());
            running.spawn(async move {
                let mut sent = 0;
                while Instant::now() < target.until {
                    let once = self.once(&target, &mut random, &mut sent);
                    // A daemon that closes is asked again.
                    let _ = timeout_at(target.until, once).await;
                    tokio::task::yield_now().await;
                }
                sent
            });
        }
        running.join_all().await.into_iter().sum()
    }

    /// On one connection, until it is closed.
    async fn once(self, target: &Target, random: &mut Rng, sent: &mut u64) -> io::Result<()> {
        let mut socket = TcpStream::connect(("127.0.0.1", target.port)).await?;
        let mut write = Writer { socket: &mut socket, sent };
        match self {
            Self::Http2Resets => write.resets(target).await,
            Self::Http2Continuations => write.continuations(target).await,
            Self::Http2Pings => write.pings().await,
            Self::Http2Streams => write.streams(target).await,
            Self::Http2EmptyData => write.empty_data(target).await,
            Self::Http2NoWindow => write.no_window(target).await,
            Self::HalfBodies => {
                let path = if random.bool() { "/v2/tasks" } else { "/v1/chat/completions" };
                let ask = post(path, target, "Content-Length: 1048576\r\n");
                write.all(ask.as_bytes()).await?;
                write.all(&vec![b' '; 512 * 1024]).await?;
                write.rest().await
            }
            Self::ChunkExtensions => {
                write.all(post("/v2/tasks", target, "Transfer-Encoding: chunked\r\n").as_bytes()).await?;
                let piece = format!("1;{}\r\n \r\n", "x".repeat(random.usize(1..2_000)));
                write.for_ever(piece.repeat(32).as_bytes()).await
            }
            Self::Trailers => {
                write.all(post("/v2/tasks", target, "Transfer-Encoding: chunked\r\n").as_bytes()).await?;
                write.all(b"1\r\n \r\n0\r\n").await?;
                write.for_ever(format!("X-{}: {}\r\n", random.u32(..), "x".repeat(1_000)).as_bytes()).await
            }
            Self::Pipeline => {
                let ask = format!(
                    "GET /v2/nodes HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\r\n",
                    target.token
                );
                write.for_ever(ask.repeat(64).as_bytes()).await
            }
            Self::Expectations => {
                let ask =
                    post("/v2/artifacts", target, "Content-Length: 4000000\r\nExpect: 100-continue\r\n");
                write.all(ask.as_bytes()).await?;
                write.rest().await
            }
            Self::OddHeads => {
                let odd = ["", " ", "\t", "\u{e9}\u{e9}", "%00", "-1", "1e999", "00-0-0-0", "\"", "{}"];
                let mut ask = format!(
                    "GET /v2/tasks?limit=500 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n",
                    target.token
                );
                for name in ["X-Correlation-Id", "Traceparent", "Last-Event-ID", "Accept", "Idempotency-Key"]
                {
                    for _ in 0..random.usize(..4) {
                        let value = odd[random.usize(..odd.len())].repeat(random.usize(..200));
                        ask.push_str(&format!("{name}: {value}\r\n"));
                    }
                }
                for n in 0..random.usize(..120) {
                    ask.push_str(&format!("X-{n}: {}\r\n", "x".repeat(random.usize(..500))));
                }
                write.all(ask.as_bytes()).await?;
                write.all(b"\r\n").await?;
                write.socket.shutdown().await?;
                write.rest().await
            }
        }
    }
}

fn post(path: &str, target: &Target, headers: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\n{headers}\r\n",
        target.token
    )
}

/// A connection, and what was written to it.
struct Writer<'w> {
    socket: &'w mut TcpStream,
    sent: &'w mut u64,
}

impl Writer<'_> {
    async fn all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes).await?;
        *self.sent += bytes.len() as u64;
        Ok(())
    }

    async fn for_ever(&mut self, bytes: &[u8]) -> io::Result<()> {
        loop {
            self.all(bytes).await?;
            tokio::task::yield_now().await;
        }
    }

    /// Reads until the daemon closes.
    async fn rest(&mut self) -> io::Result<()> {
        let mut piece = [0; 4096];
        while self.socket.read(&mut piece).await? > 0 {}
        Ok(())
    }

    async fn resets(&mut self, target: &Target) -> io::Result<()> {
        self.all(&begin(&[])).await?;
        let head = head("GET", "/v2/nodes", &target.token);
        let mut stream = 1;
        loop {
            let mut batch = Vec::new();
            for _ in 0..100 {
                batch.extend(frame(Kind::Headers, Flags::END_STREAM | Flags::END_HEADERS, stream, &head));
                batch.extend(frame(Kind::Reset, 0, stream, &8_u32.to_be_bytes()));
                stream += 2;
            }
            self.all(&batch).await?;
            tokio::task::yield_now().await;
        }
    }

    async fn continuations(&mut self, target: &Target) -> io::Result<()> {
        self.all(&begin(&[])).await?;
        self.all(&frame(Kind::Headers, 0, 1, &head("GET", "/v2/nodes", &target.token))).await?;
        // A literal field, never indexed: x: a…
        let mut field = vec![0x10, 1, b'x', 100];
        field.extend([b'a'; 100]);
        self.for_ever(&frame(Kind::Continuation, 0, 1, &field.repeat(100))).await
    }

    async fn pings(&mut self) -> io::Result<()> {
        self.all(&begin(&[])).await?;
        let both = [frame(Kind::Ping, 0, 0, &[0; 8]), frame(Kind::Settings, 0, 0, &[])].concat();
        self.for_ever(&both.repeat(500)).await
    }

    async fn streams(&mut self, target: &Target) -> io::Result<()> {
        self.all(&begin(&[])).await?;
        let head = head("POST", "/v2/tasks", &target.token);
        for n in 0..2_000_u32 {
            self.all(&frame(Kind::Headers, Flags::END_HEADERS, 2 * n + 1, &head)).await?;
        }
        self.rest().await
    }

    async fn empty_data(&mut self, target: &Target) -> io::Result<()> {
        self.all(&begin(&[])).await?;
        self.all(&frame(Kind::Headers, Flags::END_HEADERS, 1, &head("POST", "/v2/tasks", &target.token)))
            .await?;
        self.for_ever(&frame(Kind::Data, 0, 1, &[]).repeat(500)).await
    }

    async fn no_window(&mut self, target: &Target) -> io::Result<()> {
        // SETTINGS_INITIAL_WINDOW_SIZE = 0.
        self.all(&begin(&[0, 4, 0, 0, 0, 0])).await?;
        let head = head("GET", "/openapi.json", &target.token);
        for n in 0..256_u32 {
            let flags = Flags::END_STREAM | Flags::END_HEADERS;
            self.all(&frame(Kind::Headers, flags, 2 * n + 1, &head)).await?;
        }
        self.rest().await
    }
}
