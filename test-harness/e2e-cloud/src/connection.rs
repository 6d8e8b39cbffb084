//! One HTTP/1.1 connection that is kept: for tests that ask many thousand times, or must not dial
//! anew.

use std::io;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Longest wait for one answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// Room for one read, bytes.
const PIECE: usize = 64 * 1024;

/// A connection to a daemon on this machine.
#[derive(Debug)]
pub struct Connection {
    socket: TcpStream,
    token: String,
    /// What was read and belongs to no answer yet.
    read: Vec<u8>,
}

impl Connection {
    pub async fn open(port: u16, token: &str) -> Self {
        let socket = TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
        socket.set_nodelay(true).expect("a TCP socket");
        Self { socket, token: token.to_owned(), read: Vec::new() }
    }

    /// Sends a request, and returns the status and the body of its answer.
    pub async fn ask(&mut self, method: &str, path: &str, body: Option<&Value>) -> (u16, Vec<u8>) {
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.token,
            body.len(),
        );
        let asking = async {
            self.socket.write_all(request.as_bytes()).await?;
            message(&mut self.socket, &mut self.read).await
        };
        let answer = tokio::time::timeout(PATIENCE, asking).await;
        let answer = answer.unwrap_or_else(|_| panic!("{method} {path}: no answer after {PATIENCE:?}"));
        let (head, body) = answer.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        (status.expect("an answer begins with its status"), body)
    }

    /// The same for an answer of JSON; `null` where it has no body.
    pub async fn json(&mut self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let (status, body) = self.ask(method, path, body).await;
        (status, serde_json::from_slice(&body).unwrap_or_default())
    }
}

/// Reads one message of known length from a socket: its head and its body. What was read beyond it
/// stays in `read`. Errors: those of the socket, and `UnexpectedEof` where it ends before.
pub(crate) async fn message(socket: &mut TcpStream, read: &mut Vec<u8>) -> io::Result<(String, Vec<u8>)> {
    let mut ends = None;
    loop {
        if ends.is_none() {
            ends = head_end(read).map(|end| (end, end + body_length(&read[..end])));
        }
        if let Some((head, end)) = ends.filter(|(_, end)| read.len() >= *end) {
            let text = String::from_utf8_lossy(&read[..head]).into_owned();
            let body = read[head..end].to_vec();
            read.drain(..end);
            return Ok((text, body));
        }
        read.reserve(PIECE);
        if socket.read_buf(read).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4)
}

fn body_length(head: &[u8]) -> usize {
    let text = String::from_utf8_lossy(head);
    let length = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    length.unwrap_or(0)
}
