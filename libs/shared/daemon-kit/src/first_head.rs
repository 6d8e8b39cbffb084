//! Waits for the head of a connection's first request where that costs this process nothing: in the socket.
//! Buffers of hyper's (28 KiB) have only those of whom a whole one has come.

use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Longest head that is waited for, bytes. Sockets have room for more.
/// Source: `tcp(7)`, `tcp_rmem`.
const MOST_BYTES: usize = 16 * 1024;
/// hyper takes no more headers.
const MOST_HEADERS: usize = 100;

/// Resolves as soon as there is something to answer, or nothing more to wait for: a head is whole, too long
/// or none of HTTP/1, or its peer has closed. Nothing is taken off the socket.
///
/// # Errors
/// The connection broke.
pub(crate) async fn arrived(stream: &TcpStream) -> io::Result<()> {
    let mut seen = 0;
    loop {
        if stream.ready(Interest::READABLE).await?.is_read_closed() {
            return Ok(());
        }
        // What is half "would block": so its next piece wakes this, and not what lies there.
        match stream.try_io(Interest::READABLE, || look(stream, &mut seen)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            looked => return looked,
        }
    }
}

/// `seen`: bytes at the look before.
fn look(stream: &TcpStream, seen: &mut usize) -> io::Result<()> {
    let mut bytes = [0; MOST_BYTES];
    let read = recv(stream.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK)?;
    let before = std::mem::replace(seen, read);
    // Read from its start only for the end of a line: one that comes byte by byte costs no more than once a
    // line.
    let says_more = before == 0 || bytes.get(before..read).is_some_and(|new| new.contains(&b'\n'));
    let is_half = (1..MOST_BYTES).contains(&read) && (!says_more || is_half(&bytes[..read]));
    if is_half { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
}

fn is_half(head: &[u8]) -> bool {
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    httparse::Request::new(&mut headers).parse(head).is_ok_and(|parsed| parsed.is_partial())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);
    const WHILE: Duration = Duration::from_millis(50);

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (ours, listener.accept().await.unwrap().0)
    }

    // CLOUD-1130
    #[tokio::test]
    async fn a_head_that_comes_byte_by_byte_is_waited_for_to_its_last() {
        let (mut peer, socket) = pair().await;
        let head = b"\r\nGET /fine HTTP/1.1\r\nHost: x\r\n\r\n";
        let (last, rest) = head.split_last().unwrap();
        let waiting = tokio::spawn(async move { arrived(&socket).await.map(|()| socket) });
        for byte in rest {
            peer.write_all(&[*byte]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(WHILE).await;
        assert!(!waiting.is_finished());
        peer.write_all(&[*last]).await.unwrap();
        let socket = timeout(SOON, waiting).await.unwrap().unwrap().unwrap();
        let mut read = [0; 64];
        assert_eq!(socket.try_read(&mut read).unwrap(), head.len(), "nothing was taken");
    }

    // CLOUD-1130
    #[tokio::test]
    async fn what_is_no_head_or_too_long_or_over_is_not_waited_for() {
        let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(MOST_BYTES));
        let tls = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
        for begin in [&b"PRI * HTTP/2.0\r\n"[..], b"hello\r\n", tls, long.as_bytes()] {
            let (mut peer, socket) = pair().await;
            peer.write_all(begin).await.unwrap();
            timeout(SOON, arrived(&socket)).await.unwrap().unwrap();
        }
        for begin in [&b""[..], b"GET /fine HTTP/1.1\r\n"] {
            let (mut peer, socket) = pair().await;
            peer.write_all(begin).await.unwrap();
            assert!(timeout(WHILE, arrived(&socket)).await.is_err());
            peer.shutdown().await.unwrap();
            timeout(SOON, arrived(&socket)).await.unwrap().unwrap();
        }
    }
}
