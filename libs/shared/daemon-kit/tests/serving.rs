//! Serving and calling, over sockets of this machine.

#![expect(clippy::disallowed_methods, reason = "what a test asks of its own server is read whole")]

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::routing::get;
use axum::{Extension, Router};
use bytes::Bytes;
use daemon_kit::connections::{self as serve, ConnLimits, Counts, Peer, PeerEnd, ServeOptions, Streaming};
use daemon_kit::tls::{ClientTls, OwnCertificate, ServerTls, Tls, TlsPaths, explain, is_refused};
use futures::stream;
use http_body_util::{BodyExt, Empty, Full};
use hyper::Method;
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo};
use owned_tasks::{StreamThread, StreamThreads};
use test_certs::{TestCa, Validity};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const SOON: Duration = Duration::from_secs(5);
/// Of an answer without end.
const PIECE: &[u8] = &[b'x'; 16 * 1024];

/// One that is longer than what sockets take of it.
const WHOLE: &[u8] = &[b'x'; 20 * 1024 * 1024];

struct Rig {
    addr: SocketAddr,
    stop: CancellationToken,
    counts: Arc<Counts>,
    open_streams: Arc<AtomicUsize>,
    /// Bytes of `/pieces`.
    handed_over: Arc<AtomicUsize>,
    server: JoinHandle<io::Result<()>>,
}

struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn rig(limits: ConnLimits, tls: Option<Arc<ServerTls>>, grace: Duration) -> Rig {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (stop, counts, open_streams) = (CancellationToken::new(), Arc::default(), Arc::default());
    let open: Arc<AtomicUsize> = Arc::clone(&open_streams);
    let all_handed_over = Arc::<AtomicUsize>::default();
    let handed_over = Arc::clone(&all_handed_over);
    let app = Router::new()
        .route("/fine", get(|| async { "fine" }))
        .route(
            "/flood",
            get(|| async {
                Body::from_stream(stream::repeat_with(|| Ok::<_, Infallible>(Bytes::from_static(PIECE))))
            }),
        )
        .route(
            "/pieces",
            get(move || async move {
                let handed_over = move || {
                    handed_over.fetch_add(PIECE.len(), Ordering::SeqCst);
                    Ok::<_, Infallible>(Bytes::from_static(PIECE))
                };
                Body::from_stream(stream::repeat_with(handed_over))
            }),
        )
        .route("/whole", get(|| async { WHOLE }))
        .route("/thread", get(thread).post(thread))
        .route("/lines", get(thread).post(thread))
        .route("/lines/whole", get(|| async { WHOLE }))
        .route(
            "/lines/late",
            get(|| async { "" }).post(|body: Bytes| async move {
                // Longer than a body may be on its way.
                tokio::time::sleep(Duration::from_millis(1_500)).await;
                format!("{} bytes, late", body.len())
            }),
        )
        .route(
            "/lines/left",
            get(|Extension(end): Extension<PeerEnd>| async move {
                end.is_departure();
                tokio::time::sleep(SOON).await;
                "too late"
            }),
        )
        .route("/peer", get(|Extension(peer): Extension<Arc<Peer>>| async move { format!("{peer:?}") }))
        .route(
            "/lines/{n}",
            get(move |axum::extract::Path(n): axum::extract::Path<usize>| async move {
                open.fetch_add(1, Ordering::SeqCst);
                let lines = stream::unfold((n, Open(open)), |(left, open)| async move {
                    if left == 0 {
                        return None;
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    Some((Ok::<_, Infallible>("line\n"), (left - 1, open)))
                });
                Body::from_stream(lines)
            }),
        );
    let is_stream = |_: &Method, path: &str| path.starts_with("/lines");
    let streaming = Some(Streaming { threads: StreamThreads::start(1).unwrap(), is_stream });
    let counts_of = Arc::clone(&counts);
    let options = ServeOptions {
        tls,
        limits,
        counts: counts_of,
        streaming,
        answers_after_end: Some(|path| path.starts_with("/lines")),
        ..ServeOptions::default()
    };
    let server = tokio::spawn(serve::run(listener, app, options, stop.clone(), grace));
    Rig { addr, stop, counts, open_streams, handed_over: all_handed_over, server }
}

async fn thread(body: Bytes) -> String {
    format!("{} bytes on {:?}", body.len(), StreamThread::current().map(|thread| thread.index()))
}

/// Certificates in a directory.
struct Pki {
    dir: tempfile::TempDir,
}

impl Pki {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    fn write(&self, name: &str, pem: &test_certs::Pem) {
        test_certs::write(self.dir.path(), name, pem).unwrap();
    }
    fn identity(&self, name: &str) -> Arc<OwnCertificate> {
        let (cert, key) = (self.path(&format!("{name}.pem")), self.path(&format!("{name}-key.pem")));
        Arc::new(OwnCertificate::load("ORCHESTRATORD", &cert, &key).unwrap())
    }
    fn server(&self, name: &str, client_ca: Option<&str>) -> Arc<ServerTls> {
        let ca = client_ca.map(|ca| self.path(ca));
        Arc::new(ServerTls::new("ORCHESTRATORD", self.identity(name), ca.as_deref()).unwrap())
    }
    fn client(&self, ca: &str, name: Option<&str>) -> ClientTls {
        let identity = name.map(|name| self.identity(name));
        ClientTls::new("POOL_MANAGERD", Some(&self.path(ca)), identity).unwrap()
    }
}

fn reqwest_with(tls: &ClientTls) -> reqwest::Client {
    tls.reqwest(reqwest::Client::builder().no_proxy().timeout(SOON)).build().unwrap()
}

async fn text(client: &reqwest::Client, url: String) -> Result<String, String> {
    let ask = async { client.get(url).send().await?.text().await };
    ask.await.map_err(|error: reqwest::Error| explain(&error.without_url()))
}

/// What the socket says until it is closed.
async fn rest(socket: &mut TcpStream) -> String {
    let mut all = Vec::new();
    let mut piece = [0; 4096];
    loop {
        match timeout(SOON, socket.read(&mut piece)).await.expect("the socket stays open") {
            Ok(0) | Err(_) => return String::from_utf8_lossy(&all).into_owned(),
            Ok(n) => all.extend_from_slice(&piece[..n]),
        }
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < SOON, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

// CLOUD-1133
#[tokio::test]
async fn requests_over_tcp_and_tls_know_their_peer() {
    let pki = Pki::new();
    let hosts = ["127.0.0.1".to_owned()];
    test_certs::write_cluster(pki.dir.path(), &["gpu-node-1".to_owned(), "GPU_node-2".to_owned()], &hosts)
        .unwrap();
    let plain = rig(ConnLimits::default(), None, SOON).await;
    let anyone = pki.client("ca.pem", None);
    let answer = text(&reqwest_with(&anyone), format!("http://{}/peer", plain.addr)).await.unwrap();
    assert!(
        answer.starts_with("Peer { addr: 127.0.0.1:") && answer.contains("certificate: None"),
        "{answer}"
    );

    let tls = pki.server("orchestratord", Some("ca.pem"));
    let server = rig(ConnLimits::default(), Some(tls), SOON).await;
    let url = format!("https://{}/peer", server.addr);
    let answer = text(&reqwest_with(&anyone), url.clone()).await.unwrap();
    assert!(answer.contains("certificate: None"), "{answer}");
    for node in ["gpu-node-1", "GPU_node-2"] {
        let client = pki.client("ca.pem", Some(node));
        let answer = text(&reqwest_with(&client), url.clone()).await.unwrap();
        assert!(answer.contains(&format!("names: [\"{node}\"]")), "{answer}");
        let hyper = Client::builder(TokioExecutor::new())
            .build::<_, Full<Bytes>>(client.connector(HttpConnector::new(), SOON));
        let response = hyper.get(url.parse().unwrap()).await.unwrap();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert!(String::from_utf8_lossy(&body).contains(node));
        let response = hyper.get(format!("http://{}/fine", plain.addr).parse().unwrap()).await.unwrap();
        assert_eq!(response.status(), 200);
    }
}

#[tokio::test]
async fn http2_is_chosen_in_the_handshake_and_its_limits_hold() {
    let pki = Pki::new();
    test_certs::write_cluster(pki.dir.path(), &[], &["localhost".to_owned()]).unwrap();
    let limits = ConnLimits { idle: Duration::from_millis(300), ..ConnLimits::default() };
    let server = rig(limits, Some(pki.server("orchestratord", None)), SOON).await;
    let mut config = pki.client("ca.pem", None).config().clone();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let socket = TcpStream::connect(server.addr).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let socket = connector.connect("localhost".try_into().unwrap(), socket).await.unwrap();
    assert_eq!(socket.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut send, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(socket)).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = |path: &str, header: usize| {
        hyper::Request::get(format!("https://localhost{path}"))
            .header("x-long", "x".repeat(header))
            .body(Empty::<Bytes>::new())
            .unwrap()
    };
    let response = send.send_request(request("/fine", 10)).await.unwrap();
    assert_eq!((response.status().as_u16(), response.version()), (200, hyper::Version::HTTP_2));
    let response = send.send_request(request("/fine", 17_000)).await;
    assert!(response.map_or(true, |response| response.status() == 431));
    // Longer than the idle limit: a running request keeps the connection.
    let response = send.send_request(request("/lines/40", 1)).await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes().len(), 200);
    // Idle: closed in good order.
    timeout(SOON, connection).await.expect("it stays open").unwrap().unwrap();
    assert_eq!(server.counts.idle.load(Ordering::Relaxed), 1);
}

// CLOUD-1133
#[tokio::test]
async fn a_new_certificate_serves_the_next_handshake_and_open_streams_go_on() {
    let pki = Pki::new();
    let (old, new) = (TestCa::new("old").unwrap(), TestCa::new("new").unwrap());
    pki.write("old-ca", old.pem());
    pki.write("new-ca", new.pem());
    pki.write("own", &old.leaf(&["127.0.0.1"], Validity::Now).unwrap());
    let identity = pki.identity("own");
    let tls = Arc::new(ServerTls::new("ORCHESTRATORD", Arc::clone(&identity), None).unwrap());
    let server = rig(ConnLimits::default(), Some(tls), SOON).await;
    let stop = CancellationToken::new();
    let following = tokio::spawn(identity.follow(stop.clone()));
    let url = |path: &str| format!("https://{}{path}", server.addr);
    // The clients keep no connections that would outlive the change.
    let knows_old = pki.client("old-ca.pem", None);
    let knows_new = pki.client("new-ca.pem", None);
    let mut stream = reqwest_with(&knows_old).get(url("/lines/200")).send().await.unwrap();
    assert_eq!(stream.chunk().await.unwrap().unwrap(), "line\n");

    // Half of a pair changes nothing.
    let renewed = new.leaf(&["127.0.0.1"], Validity::Now).unwrap();
    std::fs::write(pki.path("own.pem"), &renewed.cert).unwrap();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(text(&reqwest_with(&knows_old), url("/fine")).await.unwrap(), "fine");
    pki.write("own", &renewed);
    let start = Instant::now();
    while text(&reqwest_with(&knows_new), url("/fine")).await.is_err() {
        assert!(start.elapsed() < SOON, "the new certificate is not taken");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let reason = text(&reqwest_with(&knows_old), url("/fine")).await.unwrap_err();
    assert!(reason.contains("a CA that is not trusted here"), "{reason}");
    let mut lines = 1;
    while stream.chunk().await.unwrap().is_some() {
        lines += 1;
    }
    assert_eq!(lines, 200);
    stop.cancel();
    following.await.unwrap();
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// CLOUD-1133
#[tokio::test]
async fn each_failed_handshake_says_why_on_both_sides() {
    // Beside a single subscriber, what other threads log first is nobody's from then on.
    let _other = tracing::Dispatch::new(tracing_subscriber::registry());
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    let _logs = tracing::subscriber::set_default(subscriber);
    let pki = Pki::new();
    let (ca, other) = (TestCa::new("ours").unwrap(), TestCa::new("another").unwrap());
    pki.write("ca", ca.pem());
    pki.write("other-ca", other.pem());
    pki.write("good", &ca.leaf(&["orchestratord", "127.0.0.1"], Validity::Now).unwrap());
    pki.write("expired", &ca.leaf(&["orchestratord", "127.0.0.1"], Validity::Expired).unwrap());
    pki.write("early", &ca.leaf(&["orchestratord", "127.0.0.1"], Validity::NotYet).unwrap());
    pki.write("named", &ca.leaf(&["orchestratord", "10.9.9.9"], Validity::Now).unwrap());
    pki.write("strange", &other.leaf(&["orchestratord", "127.0.0.1"], Validity::Now).unwrap());
    // Server's certificate, client's certificate, what the client says, what the server says.
    let cases = [
        ("expired", None, "its certificate has expired", "our certificate has expired or is not valid yet"),
        (
            "early",
            None,
            "its certificate is not valid yet",
            "our certificate has expired or is not valid yet",
        ),
        ("named", None, "its certificate is for another name", "most likely because of its names"),
        ("strange", None, "from a CA that is not trusted here", "does not trust the CA of our certificate"),
        ("good", Some("expired"), "our certificate has expired or is not valid yet", "has expired"),
        (
            "good",
            Some("strange"),
            "does not trust the CA of our certificate",
            "a CA that is not trusted here",
        ),
    ];
    for (shown, shown_by_client, client_says, server_says) in cases {
        let server = rig(ConnLimits::default(), Some(pki.server(shown, Some("ca.pem"))), SOON).await;
        let client = pki.client("ca.pem", shown_by_client);
        let url = format!("https://{}/fine", server.addr);
        let http = client.reqwest(reqwest::Client::builder().no_proxy()).build().unwrap();
        let error = http.get(&url).send().await.unwrap_err();
        assert!(explain(&error).contains(client_says), "{}", explain(&error));
        assert_eq!(is_refused(&error), shown_by_client.is_some());
        let hyper = Client::builder(TokioExecutor::new())
            .build::<_, Full<Bytes>>(client.connector(HttpConnector::new(), SOON));
        let error = hyper.get(url.parse().unwrap()).await.unwrap_err();
        assert_eq!(
            (is_refused(&error), error.is_connect()),
            (shown_by_client.is_some(), shown_by_client.is_none())
        );
        until("both failures are counted", || server.counts.failed_handshakes.load(Ordering::Relaxed) == 2)
            .await;
        let reported = String::from_utf8(std::mem::take(&mut *log.0.lock().unwrap())).unwrap();
        assert_eq!(reported.lines().count(), 1, "one line a second: {reported}");
        assert!(
            reported.contains(server_says)
                && reported.contains("WARN")
                && reported.contains("peer=127.0.0.1:"),
            "{reported}"
        );
    }
    // HTTP where TLS is spoken, and the other way round.
    let server = rig(ConnLimits::default(), Some(pki.server("good", None)), SOON).await;
    let plain = pki.client("ca.pem", None);
    // CLOUD-3011
    let response = reqwest_with(&plain).get(format!("http://{}/fine", server.addr)).send().await.unwrap();
    assert_eq!(response.status(), 400);
    let answered = response.text().await.unwrap();
    assert!(answered.contains("use https://"), "{answered}");
    until("it is counted", || server.counts.failed_handshakes.load(Ordering::Relaxed) == 1).await;
    let reported = String::from_utf8(std::mem::take(&mut *log.0.lock().unwrap())).unwrap();
    assert!(reported.contains("plain HTTP came to a port that speaks TLS: use https://"), "{reported}");
    let server = rig(ConnLimits::default(), None, SOON).await;
    let reason = text(&reqwest_with(&plain), format!("https://{}/fine", server.addr)).await.unwrap_err();
    assert!(reason.contains("it does not speak TLS"), "{reason}");
}

#[tokio::test]
async fn a_refused_client_hears_why_even_when_it_has_sent_a_long_request() {
    let pki = Pki::new();
    test_certs::write_cluster(pki.dir.path(), &[], &["127.0.0.1".to_owned()]).unwrap();
    pki.write("strange", &TestCa::new("another").unwrap().leaf(&["gpu-node-1"], Validity::Now).unwrap());
    let server = rig(ConnLimits::default(), Some(pki.server("orchestratord", Some("ca.pem"))), SOON).await;
    let client = reqwest_with(&pki.client("ca.pem", Some("strange")));
    for _ in 0..40 {
        let call = client.post(format!("https://{}/fine", server.addr)).body(vec![b'x'; 1 << 20]);
        let error = call.send().await.unwrap_err();
        assert!(is_refused(&error), "{}", explain(&error));
    }
}

#[tokio::test]
async fn a_server_that_never_shakes_hands_is_given_up_in_time() {
    let pki = Pki::new();
    test_certs::write_cluster(pki.dir.path(), &[], &["127.0.0.1".to_owned()]).unwrap();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = pki.client("ca.pem", None);
    let hyper = Client::builder(TokioExecutor::new())
        .build::<_, Full<Bytes>>(client.connector(HttpConnector::new(), Duration::from_millis(200)));
    let url = format!("https://{}/", silent.local_addr().unwrap()).parse().unwrap();
    let error = timeout(SOON, hyper.get(url)).await.unwrap().unwrap_err();
    assert!(error.is_connect() && explain(&error).contains("did not finish in time"), "{}", explain(&error));

    let limits = ConnLimits { handshake: Duration::from_millis(200), ..ConnLimits::default() };
    let server = rig(limits, Some(pki.server("orchestratord", None)), SOON).await;
    let mut socket = TcpStream::connect(server.addr).await.unwrap();
    assert_eq!(rest(&mut socket).await, "");
    assert_eq!(server.counts.failed_handshakes.load(Ordering::Relaxed), 1);
}

// CLOUD-1130
#[tokio::test]
async fn slow_heads_are_closed_in_time_while_others_are_served() {
    let limits = ConnLimits { head: Duration::from_millis(600), ..ConnLimits::default() };
    let server = rig(limits, None, SOON).await;
    let start = Instant::now();
    let mut slow = Vec::new();
    for number in 0..200 {
        let addr = server.addr;
        slow.push(tokio::spawn(async move {
            let mut socket = TcpStream::connect(addr).await.unwrap();
            let begin: &[u8] = match number % 4 {
                0 => b"",
                1 => b"GET /fine HTTP/1.1\r\nHost: x\r\nx-a: ",
                2 => b"PRI * HTTP/2.0\r\n",
                _ => b"GET /fine HTTP/1.1\r\nHost: x\r\n\r\nGET /fi",
            };
            socket.write_all(begin).await.unwrap();
            let (mut reading, mut writing) = socket.into_split();
            let trickle = async {
                // Never enough, until the peer has had enough.
                while number % 4 != 0 && writing.write_all(b"a").await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                std::future::pending::<()>().await;
            };
            let gone = async {
                let mut piece = [0; 1024];
                while reading.read(&mut piece).await.is_ok_and(|n| n > 0) {}
            };
            tokio::select! { () = gone => {}, () = trickle => {} }
        }));
    }
    let client = reqwest::Client::builder().no_proxy();
    let pki = Pki::new();
    test_certs::write_cluster(pki.dir.path(), &[], &[]).unwrap();
    let client = pki.client("ca.pem", None).reqwest(client).build().unwrap();
    let mut served = 0;
    while slow.iter().any(|task| !task.is_finished()) {
        assert_eq!(text(&client, format!("http://{}/fine", server.addr)).await.unwrap(), "fine");
        served += 1;
        assert!(
            start.elapsed() < SOON,
            "{} are still open",
            slow.iter().filter(|t| !t.is_finished()).count()
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // A wrong HTTP/2 preface is a broken connection before it is slow.
    assert!(start.elapsed() >= Duration::from_millis(600) && served > 10);
}

// CLOUD-1130
#[tokio::test]
async fn an_idle_connection_outlives_the_limit_of_heads_and_not_its_own() {
    let limits = ConnLimits {
        head: Duration::from_millis(300),
        idle: Duration::from_millis(900),
        ..ConnLimits::default()
    };
    let server = rig(limits, None, SOON).await;
    let mut socket = TcpStream::connect(server.addr).await.unwrap();
    let ask = b"GET /fine HTTP/1.1\r\nHost: x\r\n\r\n";
    let mut piece = [0; 4096];
    for _ in 0..3 {
        socket.write_all(ask).await.unwrap();
        assert!(socket.read(&mut piece).await.unwrap() > 0);
        tokio::time::sleep(Duration::from_millis(600)).await;
    }
    let start = Instant::now();
    assert_eq!(rest(&mut socket).await, "");
    assert!(start.elapsed() < Duration::from_millis(800), "{:?}", start.elapsed());
    assert_eq!(server.counts.idle.load(Ordering::Relaxed), 1);
}

// CLOUD-2986
#[tokio::test]
async fn a_peer_that_has_ended_its_side_is_answered_where_that_is_no_departure() {
    let server = rig(ConnLimits::default(), None, SOON).await;
    let asked = async |request: String| {
        let mut socket = TcpStream::connect(server.addr).await.unwrap();
        socket.write_all(request.as_bytes()).await.unwrap();
        socket.shutdown().await.unwrap();
        let start = Instant::now();
        (rest(&mut socket).await, start.elapsed())
    };
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    let post = |body: &str| format!("POST /lines HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n{body}");
    // Longer than a body may be on its way.
    let (answer, took) = asked(get("/lines/70")).await;
    assert_eq!(answer.matches("line").count(), 70, "{answer}");
    assert!(took < SOON, "it is closed behind its answer");
    let (answer, _) = asked(post("12345")).await;
    assert!(answer.contains("5 bytes on"), "{answer}");
    let (answer, _) = asked(post("12345").replace("/lines", "/lines/late")).await;
    assert!(answer.contains("5 bytes, late"), "{answer}");
    let (answer, took) = asked(post("123")).await;
    assert!(!answer.contains("200 OK") && took < SOON, "{answer} after {took:?}");
    let (answer, took) = asked(get("/lines/left")).await;
    assert!(answer.is_empty() && took < SOON, "{answer} after {took:?}");
    // Also what fits in no buffer, and is taken more slowly than it is made.
    let mut socket = TcpStream::connect(server.addr).await.unwrap();
    socket.write_all(get("/lines/whole").as_bytes()).await.unwrap();
    socket.shutdown().await.unwrap();
    let mut answer = Vec::new();
    let mut piece = vec![0; 256 * 1024];
    while let Ok(n @ 1..) = timeout(SOON, socket.read(&mut piece)).await.expect("the socket stays open") {
        answer.extend_from_slice(&piece[..n]);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(answer.ends_with(WHOLE), "{} bytes", answer.len());
}

// CLOUD-1130
#[tokio::test]
async fn too_long_a_head_is_answered_with_431() {
    let server = rig(ConnLimits::default(), None, SOON).await;
    for head in [
        format!("GET /fine HTTP/1.1\r\nHost: x\r\nx-long: {}\r\n\r\n", "x".repeat(17_000)),
        format!("GET /fine HTTP/1.1\r\nHost: x\r\n{}\r\n", "x-many: 1\r\n".repeat(120)),
        format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "x".repeat(16_383)),
    ] {
        let mut socket = TcpStream::connect(server.addr).await.unwrap();
        // It may be refused before all is written.
        let _ = socket.write_all(head.as_bytes()).await;
        let answer = rest(&mut socket).await;
        assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    }
    let mut socket = TcpStream::connect(server.addr).await.unwrap();
    let head =
        format!("GET /fine HTTP/1.1\r\nConnection: close\r\nHost: x\r\nx: {}\r\n\r\n", "x".repeat(15_000));
    socket.write_all(head.as_bytes()).await.unwrap();
    assert!(rest(&mut socket).await.starts_with("HTTP/1.1 200"));
}

// CLOUD-1131
#[tokio::test]
async fn for_one_connection_too_many_the_first_stranger_is_closed_and_counted() {
    // Strangers have three of the four.
    let server = rig(ConnLimits { connections: 4, ..ConnLimits::default() }, None, SOON).await;
    let ask = b"GET /fine HTTP/1.1\r\nHost: x\r\n\r\n";
    let mut held = VecDeque::new();
    let mut piece = [0; 4096];
    for n in 0..6_u64 {
        let mut socket = TcpStream::connect(server.addr).await.unwrap();
        socket.write_all(ask).await.unwrap();
        assert!(socket.read(&mut piece).await.unwrap() > 0, "the newest is served");
        held.push_back(socket);
        if held.len() > 3 {
            assert_eq!(rest(&mut held.pop_front().unwrap()).await, "", "the first one makes room");
            assert_eq!(server.counts.made_room.load(Ordering::Relaxed), n - 2);
        }
    }
    assert_eq!(server.counts.over_limit.load(Ordering::Relaxed), 0);
    for socket in &mut held {
        socket.write_all(ask).await.unwrap();
        assert!(socket.read(&mut piece).await.unwrap() > 0, "the others stay");
    }
}

// CLOUD-2728
#[tokio::test]
async fn a_peer_that_takes_nothing_of_an_answer_is_closed_in_time_and_one_that_takes_little_is_not() {
    let stalled = Duration::from_millis(500);
    let often = Duration::from_millis(50);
    let limits = ConnLimits { head: often * 4, idle: often, stalled, ..ConnLimits::default() };
    let server = rig(limits, None, SOON).await;
    let asked = async || {
        let mut socket = TcpStream::connect(server.addr).await.unwrap();
        socket.write_all(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        socket
    };
    let (mut stopped, mut slow) = (asked().await, asked().await);
    let (start, mut piece) = (Instant::now(), vec![0; 256 * 1024]);
    let closed = || server.counts.stalled.load(Ordering::SeqCst);
    while closed() == 0 || start.elapsed() < stalled * 3 {
        assert!(start.elapsed() < SOON, "never closed");
        assert!(slow.read(&mut piece).await.unwrap() > 0);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(closed(), 1);
    // What lies in the buffers of the kernel is still read.
    let all = async { while stopped.read(&mut piece).await.is_ok_and(|read| read > 0) {} };
    timeout(SOON, all).await.expect("its end");
    assert!(slow.read(&mut piece).await.unwrap() > 0);
}

/// An HTTP/2 connection that gives each answer so much room until it is read.
async fn http2(addr: SocketAddr, window: u32) -> hyper::client::conn::http2::SendRequest<Empty<Bytes>> {
    let socket = TokioIo::new(TcpStream::connect(addr).await.unwrap());
    let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    builder.initial_stream_window_size(window).initial_connection_window_size(1024 * 1024);
    let (send, connection) = builder.handshake(socket).await.unwrap();
    tokio::spawn(connection);
    send
}

fn http2_request(addr: SocketAddr, path: &str) -> hyper::Request<Empty<Bytes>> {
    hyper::Request::get(format!("http://{addr}{path}")).body(Empty::new()).unwrap()
}

// CLOUD-2848
#[tokio::test]
async fn a_whole_answer_is_no_idle_connection_while_its_peer_reads_it_however_slowly() {
    let idle = Duration::from_millis(100);
    // What an idle connection would have had, and its end.
    let long = idle + Duration::from_millis(1_300);
    let server = rig(ConnLimits { idle, ..ConnLimits::default() }, None, SOON).await;
    let mut socket = TcpStream::connect(server.addr).await.unwrap();
    socket.write_all(b"GET /whole HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let response = http2(server.addr, 64 * 1024).await.send_request(http2_request(server.addr, "/whole"));
    let response = response.await.unwrap();
    assert_eq!(response.headers()["content-length"], WHOLE.len().to_string().as_str());
    let (mut read, mut piece, mut pauses) = (0, vec![0; 1024 * 1024], 0);
    while read < WHOLE.len() {
        if pauses * WHOLE.len() / 3 <= read {
            pauses += 1;
            tokio::time::sleep(long).await;
        }
        let more = timeout(SOON, socket.read(&mut piece)).await.unwrap().unwrap();
        assert!(more > 0, "cut after {read} bytes");
        read += more;
    }
    let over_http2 = timeout(SOON, response.into_body().collect()).await.unwrap().unwrap().to_bytes();
    assert!(over_http2 == WHOLE);
    // Then it is idle.
    assert_eq!(rest(&mut socket).await, "");
}

// CLOUD-2848
#[tokio::test]
async fn a_peer_that_takes_nothing_of_a_whole_answer_is_closed_as_one_that_takes_nothing_of_a_stream() {
    let (head, idle) = (Duration::from_millis(200), Duration::from_millis(50));
    let limits = ConnLimits { head, idle, stalled: Duration::from_millis(400), ..ConnLimits::default() };
    let server = rig(limits, None, SOON).await;
    let mut socket = TcpStream::connect(server.addr).await.unwrap();
    let start = Instant::now();
    socket.write_all(b"GET /whole HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    until("it is closed", || server.counts.stalled.load(Ordering::SeqCst) == 1).await;
    assert!(start.elapsed() >= Duration::from_millis(400), "{:?}", start.elapsed());
    assert_eq!(server.counts.idle.load(Ordering::SeqCst), 0);
}

// CLOUD-2849
#[tokio::test]
async fn an_answer_over_http2_whose_window_stays_closed_holds_little_and_is_ended_alone() {
    const WINDOW: usize = 128 * 1024;
    let stalled = Duration::from_millis(500);
    let server = rig(ConnLimits { stalled, ..ConnLimits::default() }, None, SOON).await;
    let mut connection = http2(server.addr, u32::try_from(WINDOW).unwrap()).await;
    let mut ask = async |path: &str| {
        connection.send_request(http2_request(server.addr, path)).await.unwrap().into_body()
    };
    let (mut stopped, mut slow) = (ask("/pieces").await, ask("/flood").await);
    let ended = || server.counts.stalled.load(Ordering::SeqCst);
    let start = Instant::now();
    while ended() == 0 || start.elapsed() < stalled * 3 {
        assert!(start.elapsed() < SOON, "never ended");
        assert!(slow.frame().await.unwrap().is_ok(), "who takes little goes on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(ended(), 1);
    let held = server.handed_over.load(Ordering::SeqCst) - WINDOW;
    assert!(held <= 64 * 1024, "{held} bytes are held beside what the peer has");
    // What lies with the peer is still read.
    let mut read = 0;
    let error = loop {
        match timeout(SOON, stopped.frame()).await.unwrap().expect("it is no orderly end") {
            Ok(frame) => read += frame.into_data().unwrap().len(),
            Err(error) => break error,
        }
    };
    assert!(read <= WINDOW && !error.is_timeout(), "{read}: {error}");
    assert_eq!(ask("/fine").await.collect().await.unwrap().to_bytes(), "fine");
    drop((stopped, slow));
}

// CLOUD-1132
#[tokio::test]
async fn at_the_stop_idle_connections_close_and_streams_finish() {
    let server = rig(ConnLimits::default(), None, SOON).await;
    let mut idle = TcpStream::connect(server.addr).await.unwrap();
    idle.write_all(b"GET /fine HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut piece = [0; 4096];
    assert!(idle.read(&mut piece).await.unwrap() > 0);
    let mut fresh = TcpStream::connect(server.addr).await.unwrap();
    let mut streaming = TcpStream::connect(server.addr).await.unwrap();
    streaming.write_all(b"GET /lines/50 HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    assert!(streaming.read(&mut piece).await.unwrap() > 0);
    let start = Instant::now();
    server.stop.cancel();
    assert_eq!((rest(&mut idle).await, rest(&mut fresh).await), (String::new(), String::new()));
    assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
    assert!(rest(&mut streaming).await.ends_with("0\r\n\r\n"));
    timeout(SOON, server.server).await.unwrap().unwrap().unwrap();
    assert!(TcpStream::connect(server.addr).await.is_err());
}

// CLOUD-1132
#[tokio::test]
async fn when_the_grace_is_over_every_request_is_cut_off_and_awaited() {
    let grace = Duration::from_millis(300);
    let server = rig(ConnLimits::default(), None, grace).await;
    let mut first = TcpStream::connect(server.addr).await.unwrap();
    first.write_all(b"GET /lines/100000 HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    // On HTTP/2 hyper runs a request apart from its connection.
    let socket = TcpStream::connect(server.addr).await.unwrap();
    let (mut send, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(socket)).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = hyper::Request::get("http://x/lines/100000").body(Empty::<Bytes>::new()).unwrap();
    let response = send.send_request(request).await.unwrap();
    until("both streams run", || server.open_streams.load(Ordering::SeqCst) == 2).await;
    let start = Instant::now();
    server.stop.cancel();
    timeout(SOON, server.server).await.unwrap().unwrap().unwrap();
    assert!(start.elapsed() >= grace && start.elapsed() < grace * 4, "{:?}", start.elapsed());
    assert_eq!(server.open_streams.load(Ordering::SeqCst), 0);
    assert!(!rest(&mut first).await.ends_with("0\r\n\r\n"));
    assert!(response.into_body().collect().await.is_err());
    let _ = connection.await;
}

fn load(paths: &TlsPaths) -> String {
    let error = Tls::load("ORCHESTRATORD", paths).unwrap_err();
    let causes = std::iter::successors(std::error::Error::source(&error), |cause| (*cause).source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

// CLOUD-1134
#[test]
fn each_wrong_file_names_its_variable_and_itself() {
    let pki = Pki::new();
    let ca = TestCa::new("ours").unwrap();
    pki.write("ca", ca.pem());
    pki.write("a", &ca.leaf(&["a"], Validity::Now).unwrap());
    pki.write("b", &ca.leaf(&["b"], Validity::Now).unwrap());
    std::fs::write(pki.path("empty"), "").unwrap();
    std::fs::write(pki.path("cut"), "-----BEGIN CERTIFICATE-----\nMIIB\n").unwrap();
    std::fs::write(pki.path("noise"), "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n")
        .unwrap();
    let paths = |cert: &str, key: &str| TlsPaths {
        cert: Some(pki.path(cert)),
        key: Some(pki.path(key)),
        ..TlsPaths::default()
    };
    for (cert, key, says) in [
        ("none", "a-key.pem", "ORCHESTRATORD_TLS_CERT: {}/none cannot be read: No such file"),
        ("empty", "a-key.pem", "ORCHESTRATORD_TLS_CERT: {}/empty holds no certificate"),
        ("a-key.pem", "a-key.pem", "ORCHESTRATORD_TLS_CERT: {}/a-key.pem holds no certificate"),
        ("cut", "a-key.pem", "ORCHESTRATORD_TLS_CERT: {}/cut is no PEM file"),
        ("noise", "a-key.pem", "ORCHESTRATORD_TLS_CERT: {}/noise holds a certificate that cannot be used"),
        ("a.pem", "a.pem", "ORCHESTRATORD_TLS_KEY: {}/a.pem holds no private key"),
        ("a.pem", "b-key.pem", "ORCHESTRATORD_TLS_KEY: {}/b-key.pem holds the key of another certificate"),
    ] {
        let says = says.replace("{}", &pki.dir.path().display().to_string());
        let reported = load(&paths(cert, key));
        assert!(reported.starts_with(&says), "{reported}");
    }
    let good = paths("a.pem", "a-key.pem");
    assert!(load(&TlsPaths { key: None, ..good.clone() }).starts_with("ORCHESTRATORD_TLS_KEY: required"));
    assert!(
        load(&TlsPaths { ca: Some(pki.path("empty")), ..good.clone() }).starts_with("ORCHESTRATORD_TLS_CA: ")
    );
    let client_ca = TlsPaths { client_ca: Some(pki.path("ca.pem")), ..TlsPaths::default() };
    assert!(load(&client_ca).starts_with("ORCHESTRATORD_TLS_CERT: required"));
    let all = TlsPaths { ca: Some(pki.path("ca.pem")), client_ca: Some(pki.path("ca.pem")), ..good };
    let tls = Tls::load("ORCHESTRATORD", &all).unwrap();
    let refused = test_certs::write_cluster(pki.dir.path(), &["node.2".to_owned()], &[]).unwrap_err();
    assert!(refused.to_string().contains("node.2"));
    assert!(tls.server.is_some() && !format!("{tls:?}").contains("PRIVATE"));
    assert_eq!(mode(&pki.path("a-key.pem")), 0o600);
}

fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

// CLOUD-1960
#[tokio::test]
async fn streams_are_answered_on_their_threads_and_everything_else_elsewhere() {
    let pki = Pki::new();
    test_certs::write_cluster(pki.dir.path(), &[], &["127.0.0.1".to_owned()]).unwrap();
    let plain = rig(ConnLimits::default(), None, SOON).await;
    let tls = rig(ConnLimits::default(), Some(pki.server("orchestratord", None)), SOON).await;
    let client = reqwest_with(&pki.client("ca.pem", None));
    for base in [format!("http://{}", plain.addr), format!("https://{}", tls.addr)] {
        let answer = async |path: &str, bytes: usize| {
            let sent = client.post(format!("{base}{path}")).body(vec![b'x'; bytes]).send().await.unwrap();
            sent.text().await.unwrap()
        };
        assert_eq!(answer("/lines", 10).await, "10 bytes on Some(0)", "{base}");
        assert_eq!(answer("/thread", 10).await, "10 bytes on None", "{base}");
        assert_eq!(answer("/lines", 300_000).await, "300000 bytes on None", "a body that takes long, {base}");
    }
}
