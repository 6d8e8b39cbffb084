//! Plain HTTP that comes to a port which speaks TLS: whoever sends it is told so in its own words, instead
//! of with a connection that is closed.

use std::io;

use pool_registry_types::{ErrorBody, ErrorCode};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

/// What is told, also to the log.
pub(crate) const MESSAGE: &str = "plain HTTP came to a port that speaks TLS: use https://";
/// Of a request that is read before it is answered: bytes at once, and how often.
const READ_BYTES: usize = 16 * 1024;
const MOST_READS: usize = 16;

/// Whether the peer's first byte begins a request of HTTP. That of a handshake is 22, and no letter.
/// Source: RFC 8446, 5.1.
pub(crate) async fn is_http(stream: &TcpStream) -> io::Result<bool> {
    let mut first = [0];
    let read = stream.peek(&mut first).await?;
    Ok(read == 1 && first[0].is_ascii_uppercase())
}

/// Answers with 400 and ends the connection.
pub(crate) async fn refuse(mut stream: TcpStream) -> io::Result<()> {
    // What lies unread when a socket is closed has the kernel reset the connection, answer and all.
    let mut read = vec![0; READ_BYTES];
    for _ in 0..MOST_READS {
        match stream.try_read(&mut read) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    let error = ErrorBody::new(ErrorCode::InvalidParams, MESSAGE);
    let body = serde_json::to_string(&error).unwrap_or_default();
    let head = format!(
        "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).await?;
    stream.shutdown().await
}
