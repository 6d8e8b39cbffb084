//! Requests as clients may write them, byte by byte over a socket of their own.

use std::time::{Duration, Instant};

use e2e_cloud::cluster::TOKEN;
use e2e_cloud::{Cluster, Options, eventually};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::time::timeout;

use super::{CHAT, fake, header};

const PATIENCE: Duration = Duration::from_secs(20);
const EMBED: &str = r#"{"input":"abc","model":"fake-model"}"#;
/// Longest body of the cluster here.
const BODY_BYTES: usize = 1024 * 1024;

async fn cluster() -> Cluster {
    let control = vec![
        ("ORCHESTRATORD_MODEL_ALIASES", "org/small:1=fake-model,a%b=fake-model".to_owned()),
        ("ORCHESTRATORD_V1_BODY_BYTES", BODY_BYTES.to_string()),
    ];
    Cluster::start(Options { nodes: 1, engine: fake(4), control, ..Options::default() }).await
}

fn head(line: &str, more: &str) -> String {
    format!("{line}\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n{more}\r\n")
}

async fn connect(cluster: &Cluster) -> TcpStream {
    TcpStream::connect(("127.0.0.1", cluster.port)).await.expect("it listens")
}

/// Reads an answer whose connection is closed behind it.
async fn to_end(socket: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut read = Vec::new();
    let reading = timeout(PATIENCE, socket.read_to_end(&mut read)).await.expect("an answer in time");
    reading.expect("an orderly close");
    String::from_utf8_lossy(&read).into_owned()
}

/// Sends what the requests consist of, each piece by itself. Returns the whole answer.
async fn ask(cluster: &Cluster, pieces: &[&str], pause: Duration) -> String {
    let mut socket = connect(cluster).await;
    socket.set_nodelay(true).expect("a TCP socket");
    for piece in pieces {
        socket.write_all(piece.as_bytes()).await.expect("it is read");
        tokio::time::sleep(pause).await;
    }
    to_end(&mut socket).await
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_default()
}

fn is_embedded(answer: &str) {
    assert_eq!(status(answer), 200, "{answer}");
    assert!(answer.contains("\"embedding\":[3.0"), "{answer}");
}

// CLOUD-2904
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_may_wait_for_a_word_come_in_chunks_or_slowly_and_by_an_old_client() {
    let cluster = cluster().await;
    let close = "Connection: close\r\nContent-Type: application/json\r\n";
    let length = format!("{close}Content-Length: {}\r\n", EMBED.len());

    let mut socket = connect(&cluster).await;
    let waiting = head("POST /v1/embeddings HTTP/1.1", &format!("{length}Expect: 100-continue\r\n"));
    socket.write_all(waiting.as_bytes()).await.unwrap();
    let mut word = [0; 25];
    timeout(PATIENCE, socket.read_exact(&mut word)).await.expect("a word in time").unwrap();
    assert_eq!(&word, b"HTTP/1.1 100 Continue\r\n\r\n");
    socket.write_all(EMBED.as_bytes()).await.unwrap();
    is_embedded(&to_end(&mut socket).await);

    let chunked = head("POST /v1/embeddings HTTP/1.1", &format!("{close}Transfer-Encoding: chunked\r\n"));
    let chunks: String = EMBED.chars().map(|c| format!("1;ext=x\r\n{c}\r\n")).collect();
    is_embedded(&ask(&cluster, &[&chunked, &chunks, "0\r\nTrailer: x\r\n\r\n"], Duration::ZERO).await);

    let begun = Instant::now();
    let plain = head("POST /v1/embeddings HTTP/1.1", &length);
    let letters: Vec<String> = EMBED.chars().map(String::from).collect();
    let pieces: Vec<&str> =
        std::iter::once(plain.as_str()).chain(letters.iter().map(String::as_str)).collect();
    is_embedded(&ask(&cluster, &pieces, Duration::from_millis(100)).await);
    assert!(begun.elapsed() > Duration::from_secs(3), "it was slow");

    let old = head("POST /v1/embeddings HTTP/1.0", &format!("Content-Length: {}\r\n", EMBED.len()));
    let answer = ask(&cluster, &[&old, EMBED], Duration::ZERO).await;
    assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
    is_embedded(&answer);
    let body = r#"{"model":"fake-model","stream":true,"max_tokens":3,"messages":[]}"#;
    let old = head(&format!("POST {CHAT} HTTP/1.0"), &format!("Content-Length: {}\r\n", body.len()));
    let answer = ask(&cluster, &[&old, body], Duration::ZERO).await;
    assert!(answer.starts_with("HTTP/1.0 200") && !answer.to_lowercase().contains("chunked"), "{answer}");
    assert!(answer.ends_with("data: [DONE]\n\n"), "{answer}");

    for kind in
        ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-8", "nonsense"]
    {
        let other = head(
            "POST /v1/embeddings HTTP/1.1",
            &format!("Connection: close\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n", EMBED.len()),
        );
        // The engine reads JSON whatever it is called, or says itself that it does not.
        let answer = ask(&cluster, &[&other, EMBED], Duration::ZERO).await;
        let is_json = kind.contains("json");
        assert_eq!(status(&answer) == 200, is_json, "{kind}: {answer}");
        assert!(
            answer.to_lowercase().contains("x-llorch-node: gpu-node-1"),
            "the engine was asked: {answer}"
        );
    }
}

/// Sends a body that is too long until the answer is there. Returns the answer and how much was sent.
async fn sends_on(cluster: &Cluster, head: String, piece: Vec<u8>) -> (String, usize) {
    async fn until_whole(mut read: OwnedReadHalf) -> String {
        let mut all = Vec::new();
        let mut piece = [0; 4096];
        // Until the body of the error: what becomes of the connection then is another question.
        while !all.windows(3).any(|end| end == b"\"}}") {
            match timeout(PATIENCE, read.read(&mut piece)).await.expect("an answer in time") {
                Ok(0) | Err(_) => break,
                Ok(n) => all.extend_from_slice(&piece[..n]),
            }
        }
        String::from_utf8_lossy(&all).into_owned()
    }
    let (read, mut write) = connect(cluster).await.into_split();
    let answer = tokio::spawn(until_whole(read));
    write.write_all(head.as_bytes()).await.unwrap();
    let mut sent = 0;
    while !answer.is_finished() && sent < 400 * 1024 * 1024 && write.write_all(&piece).await.is_ok() {
        sent += piece.len();
    }
    (answer.await.unwrap(), sent)
}

// CLOUD-2904
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_is_too_long_is_told_so_while_its_client_still_sends() {
    let cluster = cluster().await;
    let announced = head(&format!("POST {CHAT} HTTP/1.1"), "Content-Length: 419430400\r\n");
    let (answer, sent) = sends_on(&cluster, announced, vec![b' '; 64 * 1024]).await;
    assert_eq!(status(&answer), 413, "{answer} after {sent} bytes");
    assert!(answer.contains("PAYLOAD_TOO_LARGE") && sent < 100 * 1024 * 1024, "{answer} after {sent} bytes");
    let chunked = head(&format!("POST {CHAT} HTTP/1.1"), "Transfer-Encoding: chunked\r\n");
    let piece = [b"10000\r\n".as_slice(), &[b' '; 0x1_0000], b"\r\n"].concat();
    let (answer, sent) = sends_on(&cluster, chunked, piece).await;
    assert_eq!(status(&answer), 413, "{answer} after {sent} bytes");
    // One that is a little too long is read to its end, and its connection serves on.
    let mut socket = connect(&cluster).await;
    let little = head(&format!("POST {CHAT} HTTP/1.1"), &format!("Content-Length: {}\r\n", BODY_BYTES + 1));
    socket.write_all(little.as_bytes()).await.unwrap();
    socket.write_all(&vec![b' '; BODY_BYTES + 1]).await.unwrap();
    let last = head(
        "POST /v1/embeddings HTTP/1.1",
        &format!("Connection: close\r\nContent-Length: {}\r\n", EMBED.len()),
    );
    socket.write_all(last.as_bytes()).await.unwrap();
    socket.write_all(EMBED.as_bytes()).await.unwrap();
    let answers = to_end(&mut socket).await;
    assert_eq!((status(&answers), answers.matches("HTTP/1.1 ").count()), (413, 2), "{answers}");
    // None of it is held.
    eventually("no body is held", PATIENCE, || async {
        let page = cluster.client.get("/metrics").await.ok()?.text().await.ok()?;
        let line = page.lines().find(|line| line.starts_with("llorch_queue_bytes "))?;
        line.ends_with(" 0").then_some(())
    })
    .await;
}

// CLOUD-2904
// CLOUD-2840
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_request_of_a_route_is_refused_in_the_shape_of_its_api() {
    let cluster = cluster().await;
    let ask = async |method: &str, path: &str, more: &str, body: &str| {
        let more = format!("Connection: close\r\nContent-Length: {}\r\n{more}", body.len());
        let answer =
            ask(&cluster, &[&head(&format!("{method} {path} HTTP/1.1"), &more), body], Duration::ZERO).await;
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        let body: Value = serde_json::from_str(body).unwrap_or_default();
        (status(&answer), head.to_lowercase(), body)
    };
    for coding in ["gzip", "br", "zstd", "gzip, identity"] {
        let (status, _, body) = ask("POST", CHAT, &format!("Content-Encoding: {coding}\r\n"), EMBED).await;
        assert_eq!(
            (status, body["error"]["type"].as_str()),
            (415, Some("invalid_request_error")),
            "{coding}: {body}"
        );
    }
    let (status, ..) = ask("POST", "/v1/embeddings", "Content-Encoding: identity\r\n", EMBED).await;
    assert_eq!(status, 200, "as it is");
    for two in [
        r#"{"model":"fake-model","model":"fake-model"}"#,
        r#"{"model":"fake-model","mod\u0065l":"other"}"#,
        r#"{"\u006d\u006f\u0064\u0065\u006c":"fake-model","x":1,"model":null}"#,
    ] {
        let (status, _, body) = ask("POST", CHAT, "", two).await;
        assert_eq!((status, body["error"]["param"].as_str()), (400, Some("model")), "{two}: {body}");
    }
    let escaped = r#"{"input":"abc","\u006d\u006fd\u0065l":"fake\u002dmodel"}"#;
    assert_eq!(ask("POST", "/v1/embeddings", "", escaped).await.0, 200);
    for bad in ["", "[]", "nonsense", "{\"model\":\"fake-model\"}x", "\u{feff}{\"model\":\"fake-model\"}"] {
        let (status, head, body) = ask("POST", CHAT, "", bad).await;
        assert_eq!((status, body["error"]["code"].as_str()), (400, Some("INVALID_PARAMS")), "{bad}: {body}");
        assert!(head.contains("x-llorch-error: invalid_params"), "{head}");
    }
    for path in
        ["/v1", "/v1/", "/v1/nothing", "/v1/audio/speech", "/v1/chat/completions/", "/v1/images/generations"]
    {
        for method in ["GET", "POST", "DELETE"] {
            let (status, _, body) = ask(method, path, "", "").await;
            assert_eq!(
                (status, body["error"]["code"].as_str()),
                (404, Some("NOT_FOUND")),
                "{method} {path}: {body}"
            );
        }
    }
    let (status, _, body) = ask("POST", "/v1/messages/nothing", "", "").await;
    assert_eq!(
        (status, &body["type"], &body["error"]["type"]),
        (404, &"error".into(), &"not_found_error".into())
    );
    for (method, path, allow) in [
        ("GET", CHAT, "allow: post"),
        ("DELETE", "/v1/messages", "allow: post"),
        ("PUT", "/tokenize", "allow: post"),
        ("POST", "/v1/models", "allow: get,head"),
        ("DELETE", "/v1/models/org/small:1", "allow: get,head"),
    ] {
        let (status, head, body) = ask(method, path, "", "").await;
        assert_eq!(status, 405, "{method} {path}: {body}");
        assert!(head.lines().any(|line| line == allow), "{method} {path}: {head}");
        assert!(body["error"]["type"].is_string(), "{method} {path}: {body}");
    }
}

// CLOUD-2845
// CLOUD-2905
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_of_models_may_have_slashes_colons_and_percent_signs() {
    let cluster = cluster().await;
    let list = cluster.client.get_json("/v1/models").await.unwrap();
    let names: Vec<&str> = list["data"].as_array().unwrap().iter().filter_map(|m| m["id"].as_str()).collect();
    assert_eq!(names, ["a%b", "fake-model", "org/small:1"]);
    for (path, id) in [
        ("/v1/models/org/small:1", "org/small:1"),
        ("/v1/models/org%2Fsmall%3A1", "org/small:1"),
        ("/v1/models/a%25b", "a%b"),
        ("/v1/models/fake-model", "fake-model"),
    ] {
        let one = cluster.client.get(path).await.unwrap();
        assert_eq!(one.status(), 200, "{path}");
        let one: Value = one.json().await.unwrap();
        let listed = list["data"].as_array().unwrap().iter().find(|model| model["id"] == id);
        assert_eq!(Some(&one), listed, "{path}");
    }
    for path in ["/v1/models/org", "/v1/models/org/small", "/v1/models/org/small:1/", "/v1/models/"] {
        let none = cluster.client.get(path).await.unwrap();
        assert_eq!(
            (none.status().as_u16(), header(&none, "content-type")),
            (404, "application/json"),
            "{path}"
        );
        let body: Value = none.json().await.unwrap();
        assert!(body["error"]["message"].is_string(), "{path}: {body}");
    }
    let named = r#"{"input":"abc","model":"org/small:1"}"#;
    let answer = super::post(&cluster.client, "/v1/embeddings", named).await;
    assert_eq!(answer.status(), 200);
}
