//! Serves the routes on a listener, over TCP or TLS, with every connection bounded.
//!
//! Each connection is one task with one clock, on a thread for streams where there are such: what is
//! no stream is answered by the runtime that accepts. A peer that was accepted, or has begun the head of
//! a request, has to finish that head in time; a connection without requests is closed after a
//! while; a running request has no bound here, because a stream may last. Whom there is no room for is
//! [`crate::room`]'s to say. hyper's own limit for
//! heads is off: it does not run before a connection's first bytes, it would also close idle
//! connections as fast as slow ones, and HTTP/2 has none.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use axum::response::IntoResponse;
use futures::future::Either;
use futures::{FutureExt, TryFutureExt};
use hyper::body::{Body as _, Incoming};
use hyper::{Method, Request, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use owned_tasks::{Loops, StreamThread, StreamThreads, Unfinished};
use parking_lot::{Mutex, MutexGuard};
use pool_registry_types::ErrorCode;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tower::Service;

pub use crate::activity::PeerEnd;
use crate::activity::{Activity, Answer, Instrumented, Look, ReadBody};
use crate::answer::ApiError;
use crate::first_head;
use crate::handover::Bounded;
use crate::plaintext;
use crate::room::{ConnectionPermit, Found, Room};
use crate::socket::Socket;
use crate::tls::{self, PeerCertificate, ServerTls};

/// Pause after an accept that failed for want of files or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Largest body of a request that is answered on a thread for streams, bytes: a larger one takes longer
/// to read than the streams there may wait.
const MOST_BODY_BYTES: u64 = 256 * 1024;
/// Connections at once where nobody says how many, and files are enough.
/// Source: .specs/01 CLOUD-2762.
const MOST_CONNECTIONS: usize = 16_384;
/// Most bytes of an answer that wait for a peer which takes none, on HTTP/2; on HTTP/1 they are as many as a
/// head may have.
const MOST_UNSENT_BYTES: usize = 64 * 1024;
/// Pause between two looks for connections that stand still.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// At most one line of a kind is logged in this time.
const LOG_EVERY: Duration = Duration::from_secs(1);

/// The bounds of connections.
#[derive(Debug, Clone)]
pub struct ConnLimits {
    /// Connections at once. For one more a stranger is closed, or one that stands still; without one it is
    /// closed itself, at once.
    pub connections: usize,
    /// From accepting to the end of the TLS handshake.
    pub handshake: Duration,
    /// From accepting, or from the first byte of a later head, to the head's end.
    pub head: Duration,
    /// Without any request. Longer than our clients keep connections (60 s), so that they close first.
    pub idle: Duration,
    /// With an answer of which the peer takes nothing.
    pub stalled: Duration,
    /// A request's line and headers, bytes; at least 8192.
    pub head_bytes: u32,
    /// Requests at once on one HTTP/2 connection.
    pub streams: u32,
    /// Between two pings of an HTTP/2 connection, and the longest wait for their answer.
    pub ping: Duration,
}

impl Default for ConnLimits {
    fn default() -> Self {
        Self {
            connections: MOST_CONNECTIONS,
            handshake: Duration::from_secs(5),
            head: Duration::from_secs(10),
            idle: Duration::from_secs(75),
            stalled: Duration::from_secs(600),
            head_bytes: 16 * 1024,
            streams: 256,
            ping: Duration::from_secs(20),
        }
    }
}

/// What became of connections that were not served to their end.
#[derive(Debug, Default)]
pub struct Counts {
    /// Closed because of too many.
    pub over_limit: AtomicU64,
    /// Closed for others, before they had shown a token.
    pub made_room: AtomicU64,
    pub failed_handshakes: AtomicU64,
    /// Closed because a head did not arrive in time.
    pub slow: AtomicU64,
    /// Closed after a while without requests.
    pub idle: AtomicU64,
    /// Closed because their peers took nothing of an answer for long, or while there were too many; on HTTP/2
    /// such an answer alone.
    pub stalled: AtomicU64,
}

/// Where connections live, and which requests are answered there.
#[derive(Debug, Clone)]
pub struct Streaming {
    pub threads: StreamThreads,
    /// By method and path. Everything else is answered elsewhere, so that no stream waits for it.
    pub is_stream: fn(&Method, &str) -> bool,
}

/// How to serve.
#[derive(Debug, Clone, Default)]
pub struct ServeOptions {
    pub tls: Option<Arc<ServerTls>>,
    pub limits: ConnLimits,
    pub counts: Arc<Counts>,
    /// Of the daemon, which is not ready while no connections are accepted.
    pub loops: Loops,
    /// Absent where everything is answered by the runtime that accepts.
    pub streaming: Option<Streaming>,
    /// By path, where a peer that has ended its side of the connection still waits for its answer; elsewhere
    /// it has left.
    pub answers_after_end: Option<fn(&str) -> bool>,
}

/// Who sent a request. In the extensions of each, as `Arc<Peer>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub addr: SocketAddr,
    pub certificate: Option<PeerCertificate>,
}

/// Connections that there may be at once: as many as are asked for, or by default, and no more than leave
/// a quarter of the files that this process may have for everything else.
pub(crate) fn most_connections(wanted: Option<u32>) -> usize {
    let files = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        .map_or(u64::MAX, |(files, _)| files);
    let (most, is_bounded) = within_files(wanted, files);
    if is_bounded {
        tracing::warn!(
            files,
            connections = most,
            "the limit of open files leaves room for fewer connections"
        );
    }
    most
}

/// How many, and whether they are fewer than were asked for.
fn within_files(wanted: Option<u32>, files: u64) -> (usize, bool) {
    let fit = usize::try_from((files - files / 4).max(1)).unwrap_or(usize::MAX);
    let wanted = wanted.and_then(|wanted| usize::try_from(wanted).ok());
    (wanted.unwrap_or(MOST_CONNECTIONS).min(fit), wanted.is_some_and(|wanted| wanted > fit))
}

/// Serves until `stop`. Then nothing new is accepted, idle connections close, running requests
/// get `grace`, and what is left is cut off.
pub async fn run(
    listener: TcpListener,
    app: Router,
    options: ServeOptions,
    stop: CancellationToken,
    grace: Duration,
) -> io::Result<()> {
    let tasks = Tasks::default();
    // Also when this future is dropped.
    let _cut_off = CutOff(tasks.clone());
    let ServeOptions { tls, limits, counts, loops, streaming, answers_after_end } = options;
    let room = Room::new(limits.connections);
    let server = Arc::new(Server {
        // Turns handlers into routes once; from here on a clone is one reference more.
        app: app.with_state(()),
        http: protocols(&limits, Requests::new(tasks.clone(), limits.stalled, Arc::clone(&counts))),
        tls,
        limits,
        counts,
        handshakes: Seldom::default(),
        streaming,
        answers_after_end,
        elsewhere: Handle::current(),
    });
    // The listener and the connections that there are outlive a panic.
    loops.keep("accepting", &stop, || accept(&server, &listener, &room, &tasks, &stop)).await;
    drop(listener);
    if timeout(grace, tasks.ended()).await.is_err() {
        tasks.abort();
        tasks.ended().await;
    }
    Ok(())
}

/// Accepts connections until `stop`.
async fn accept(
    server: &Arc<Server>,
    listener: &TcpListener,
    room: &Arc<Room>,
    tasks: &Tasks,
    stop: &CancellationToken,
) {
    let (crowded, unaccepted) = (Seldom::default(), Seldom::default());
    let mut look = tokio::time::interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = look.tick() => {
                let closed = room.close_too_many_still();
                if closed > 0 {
                    server.counts.stalled.fetch_add(closed as u64, Ordering::Relaxed);
                    tracing::warn!(closed, "too many connections take nothing of their answers");
                }
                continue;
            }
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, addr)) => {
                let (permit, count, what) = match room.find(addr.ip()) {
                    Found::Free(permit) => {
                        Arc::clone(server).connection(stream, addr, stop.clone(), permit, tasks);
                        continue;
                    }
                    Found::InPlaceOf(permit) => {
                        (Some(permit), &server.counts.made_room, "one without a token")
                    }
                    Found::InPlaceOfStill(permit) => {
                        (Some(permit), &server.counts.stalled, "one that takes nothing of an answer")
                    }
                    Found::Full => (None, &server.counts.over_limit, "the newest one"),
                };
                count.fetch_add(1, Ordering::Relaxed);
                if let Some(suppressed) = crowded.turn() {
                    let limit = server.limits.connections;
                    tracing::warn!(peer = %addr, limit, closed = what, suppressed, "too many connections");
                }
                if let Some(permit) = permit {
                    Arc::clone(server).connection(stream, addr, stop.clone(), permit, tasks);
                }
            }
            Err(error) if of_one_connection(&error) => {}
            Err(error) => {
                if let Some(suppressed) = unaccepted.turn() {
                    tracing::error!(%error, suppressed, "connections cannot be accepted");
                }
                tokio::select! { () = sleep(ACCEPT_PAUSE) => {}, () = stop.cancelled() => return }
            }
        }
    }
}

/// The peer went away between its arrival and our accept.
fn of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

fn protocols(limits: &ConnLimits, requests: Requests) -> auto::Builder<Requests> {
    let mut http = auto::Builder::new(requests);
    http.http1()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .max_buf_size(usize::try_from(limits.head_bytes).unwrap_or(usize::MAX));
    http.http2()
        .timer(TokioTimer::new())
        .max_header_list_size(limits.head_bytes)
        .max_concurrent_streams(limits.streams)
        .max_send_buf_size(MOST_UNSENT_BYTES)
        .keep_alive_interval(limits.ping)
        .keep_alive_timeout(limits.ping);
    http
}

struct Server {
    app: Router,
    http: auto::Builder<Requests>,
    tls: Option<Arc<ServerTls>>,
    limits: ConnLimits,
    counts: Arc<Counts>,
    handshakes: Seldom,
    streaming: Option<Streaming>,
    answers_after_end: Option<fn(&str) -> bool>,
    /// The runtime that accepts.
    elsewhere: Handle,
}

/// What a connection's bytes go over.
trait Movable: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    fn socket(&mut self) -> &mut Socket;

    /// The socket, where the bytes in it are those of requests.
    fn plain(&self) -> Option<&Socket>;
}

impl Movable for Socket {
    fn socket(&mut self) -> &mut Socket {
        self
    }

    fn plain(&self) -> Option<&Socket> {
        Some(self)
    }
}

impl Movable for tokio_rustls::server::TlsStream<Socket> {
    fn socket(&mut self) -> &mut Socket {
        self.get_mut().0
    }

    fn plain(&self) -> Option<&Socket> {
        None
    }
}

/// How a connection ended.
enum End {
    Closed,
    Slow,
    Stalled,
    Failed(Box<dyn std::error::Error + Send + Sync>),
}

impl Server {
    /// Begins with a connection that was accepted.
    fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        addr: SocketAddr,
        stop: CancellationToken,
        permit: ConnectionPermit,
        tasks: &Tasks,
    ) {
        // Without it a small answer waits up to 40 ms for the peer's acknowledgement.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection without TCP_NODELAY");
        }
        if self.tls.is_none() {
            let socket = Socket::new(stream);
            return self.serve(socket, Peer { addr, certificate: None }, stop, permit, tasks);
        }
        let all = tasks.clone();
        tasks.add(async move {
            let Some(tls) = &self.tls else { return };
            let shaking_hands = async {
                if plaintext::is_http(&stream).await? {
                    plaintext::refuse(stream).await?;
                    return Ok(None);
                }
                tls.accept(Socket::new(stream)).await.map(Some)
            };
            let handshake = timeout(self.limits.handshake, shaking_hands);
            let outcome = tokio::select! {
                outcome = handshake => outcome,
                () = stop.cancelled() => return,
                () = permit.closed() => return,
            };
            match outcome {
                Ok(Ok(Some((stream, certificate)))) => {
                    Arc::clone(&self).serve(stream, Peer { addr, certificate }, stop, permit, &all);
                }
                Ok(Ok(None)) => self.no_handshake(addr, plaintext::MESSAGE),
                Ok(Err(error)) => self.no_handshake(addr, &tls::explain(&error)),
                Err(_) => self.no_handshake(addr, "it did not finish in time"),
            }
        });
    }

    /// Serves the requests of a connection, on a thread for streams where there are such.
    fn serve<T: Movable>(
        self: Arc<Self>,
        mut io: T,
        peer: Peer,
        stop: CancellationToken,
        permit: ConnectionPermit,
        tasks: &Tasks,
    ) {
        let addr = peer.addr;
        let thread = self.streaming.as_ref().map(|streaming| streaming.threads.least_loaded().clone());
        let load = thread.as_ref().map(StreamThread::load);
        let moves = thread.is_some();
        let serving = async move {
            let since = Instant::now();
            let moved = if moves { io.socket().move_here() } else { Ok(()) };
            let begun = match moved {
                Ok(()) => self.first_head(io.plain(), &permit, &stop).await,
                Err(error) => Err(End::Failed(error.into())),
            };
            let end = match begun {
                Ok(()) => self.requests(since, io, peer, &permit, &stop).await,
                Err(end) => end,
            };
            match end {
                End::Closed => {}
                End::Slow => {
                    self.counts.slow.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(peer = %addr, "a request's head did not arrive in time");
                }
                End::Stalled => {
                    self.counts.stalled.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(peer = %addr, "nothing of an answer was taken for long");
                }
                End::Failed(error) => tracing::debug!(peer = %addr, error, "a connection broke"),
            }
            drop((load, permit));
        };
        match thread {
            Some(thread) => tasks.add_on(&thread, serving),
            None => tasks.add(serving),
        }
    }

    fn no_handshake(&self, addr: SocketAddr, reason: &str) {
        self.counts.failed_handshakes.fetch_add(1, Ordering::Relaxed);
        if let Some(suppressed) = self.handshakes.turn() {
            tracing::warn!(peer = %addr, reason, suppressed, "a TLS handshake failed");
        }
    }

    /// Where a request is answered that is no stream, or takes long to read.
    fn elsewhere(&self, request: &Request<Incoming>) -> Option<Handle> {
        let streaming = self.streaming.as_ref()?;
        let is_small = request.body().size_hint().upper().is_some_and(|bytes| bytes <= MOST_BODY_BYTES);
        let stays = is_small && (streaming.is_stream)(request.method(), request.uri().path());
        (!stays).then(|| self.elsewhere.clone())
    }

    /// Waits for what [`Server::requests`] has to read first, where that is seen from outside.
    async fn first_head(
        &self,
        plain: Option<&Socket>,
        permit: &ConnectionPermit,
        stop: &CancellationToken,
    ) -> Result<(), End> {
        let Some(socket) = plain else { return Ok(()) };
        let arrived = async { first_head::arrived(socket.get()?).await };
        tokio::select! {
            biased;
            arrived = timeout(self.limits.head, arrived) => match arrived {
                Ok(arrived) => arrived.map_err(|error| End::Failed(error.into())),
                Err(_) => Err(End::Slow),
            },
            () = permit.closed() => Err(End::Closed),
            () = stop.cancelled() => Err(End::Closed),
        }
    }

    /// `since`: its first head has been waited for.
    async fn requests<T: Movable>(
        &self,
        since: Instant,
        io: T,
        peer: Peer,
        permit: &ConnectionPermit,
        stop: &CancellationToken,
    ) -> End {
        let (peer, entry) = (Arc::new(peer), Arc::clone(permit.entry()));
        let ConnLimits { head, idle, stalled, .. } = self.limits;
        let activity = Arc::new(Activity::new(since, head, idle, stalled));
        entry.serves(&activity);
        let io = TokioIo::new(Instrumented::new(io, Arc::clone(&activity)));
        let service = hyper::service::service_fn({
            let activity = Arc::clone(&activity);
            move |mut request: Request<Incoming>| {
                let running = Activity::begin(&activity, request.version() == Version::HTTP_2);
                request.extensions_mut().insert(Arc::clone(&peer));
                request.extensions_mut().insert(Arc::clone(&entry));
                let elsewhere = self.elsewhere(&request);
                let request = match self.answers_after_end {
                    Some(does) if does(request.uri().path()) => activity.answer_after_end(request),
                    _ => request.map(ReadBody::from),
                };
                let answer = self.app.clone().call(request);
                let answer = match elsewhere {
                    None => Either::Left(answer),
                    Some(runtime) => {
                        let answered = owned_tasks::elsewhere(&runtime, "request", answer);
                        Either::Right(answered.map(|all| match all {
                            Ok(answer) => answer,
                            Err(Unfinished::Panicked(panicked)) => panicked.resume(),
                            Err(Unfinished::CutOff(_)) => {
                                let error = ApiError::new(ErrorCode::Draining, "the server is shutting down");
                                Ok(error.into_response())
                            }
                        }))
                    }
                };
                // Not an async block, which would hold the answer's future twice.
                // An answer has all the time, as long as its peer takes of it.
                answer.map_ok(move |response| response.map(|body| Answer::new(body, running)))
            }
        });
        let mut connection = pin!(self.http.serve_connection(io, service));
        let mut clock = pin!(sleep_until(since + head));
        let mut stopped = pin!(stop.cancelled());
        let mut closed = pin!(permit.closed());
        let mut stopping = false;
        poll_fn(|cx| {
            loop {
                if !stopping && stopped.as_mut().poll(cx).is_ready() {
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
                // It was looked at before anything was let in, and so wakes this also later.
                if permit.entry().makes_room() && closed.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(End::Closed);
                }
                if let Poll::Ready(outcome) = connection.as_mut().poll(cx) {
                    return Poll::Ready(outcome.map_or_else(End::Failed, |()| End::Closed));
                }
                // Only brought forward here, so that requests set no timers.
                if let Some(until) = activity.until().filter(|until| *until < clock.deadline()) {
                    clock.as_mut().reset(until);
                }
                if clock.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                match activity.look(Instant::now()) {
                    Look::Again(at) => clock.as_mut().reset(at),
                    Look::Idle(at) => {
                        self.counts.idle.fetch_add(1, Ordering::Relaxed);
                        connection.as_mut().graceful_shutdown();
                        clock.as_mut().reset(at);
                    }
                    Look::Over => return Poll::Ready(End::Closed),
                    Look::Slow => return Poll::Ready(End::Slow),
                    Look::Stalled => return Poll::Ready(End::Stalled),
                }
            }
        })
        .await
    }
}

/// The tasks of connections, and of the requests that hyper runs apart on HTTP/2.
#[derive(Clone, Default)]
struct Tasks(Arc<Mutex<JoinSet<()>>>);

impl Tasks {
    fn set(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.0.lock()
    }

    fn add(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tidied().spawn(task);
    }

    fn add_on(&self, thread: &StreamThread, task: impl Future<Output = ()> + Send + 'static) {
        self.tidied().spawn_on(owned_tasks::timed(task), thread.handle());
    }

    /// Without those that have ended.
    fn tidied(&self) -> MutexGuard<'_, JoinSet<()>> {
        let mut set = self.set();
        while let Some(ended) = set.try_join_next() {
            report(ended);
        }
        set
    }

    async fn ended(&self) {
        while let Some(ended) = poll_fn(|cx| self.set().poll_join_next(cx)).await {
            report(ended);
        }
    }

    fn abort(&self) {
        self.set().abort_all();
    }
}

fn report(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection ended by a defect");
    }
}

/// Runs the requests of HTTP/2, each as long as its peer takes of its answer.
#[derive(Clone)]
struct Requests {
    tasks: Tasks,
    stalled: Duration,
    counts: Arc<Counts>,
}

impl Requests {
    fn new(tasks: Tasks, stalled: Duration, counts: Arc<Counts>) -> Self {
        Self { tasks, stalled, counts }
    }
}

impl<F> hyper::rt::Executor<F> for Requests
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, request: F) {
        self.tasks.add(Bounded::new(request, self.stalled, Arc::clone(&self.counts)));
    }
}

struct CutOff(Tasks);

impl Drop for CutOff {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Keeps a log line that others can provoke from filling the log.
#[derive(Default)]
struct Seldom(Mutex<(Option<Instant>, u64)>);

impl Seldom {
    /// `Some`: say it, and that this many were not said since the last.
    fn turn(&self) -> Option<u64> {
        let mut state = self.0.lock();
        let (reported, suppressed) = &mut *state;
        if reported.is_some_and(|reported| reported.elapsed() < LOG_EVERY) {
            *suppressed += 1;
            return None;
        }
        *reported = Some(Instant::now());
        Some(std::mem::take(suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2762
    #[test]
    fn connections_follow_the_limit_of_files() {
        assert_eq!(within_files(None, 1 << 20), (16_384, false));
        assert_eq!(within_files(None, 1024), (768, false));
        assert_eq!(within_files(Some(100_000), 1 << 20), (100_000, false));
        assert_eq!(within_files(Some(100_000), 1024), (768, true));
        assert_eq!(within_files(None, 1), (1, false));
        assert!(within_files(None, u64::MAX).0 == 16_384, "without a limit");
    }
}
