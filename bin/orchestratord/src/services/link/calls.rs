//! The calls of a lane: a GET that never ends, POSTs that are counted while they go, and a look at the
//! node's health call. Each runs in a task of its own, and says with [`Heard`] what has come of it.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use attempt_link::control::{ConnectionEnd, PostId, PostOutcome, PostRequest};
use attempt_link::wire::{ControlAnswer, LinkQuery, MAX_POST_BYTES};
use bytes::Bytes;
use daemon_kit::Tokens;
use daemon_kit::tls::{self, Connector};
use http_body_util::BodyExt;
use hyper::Request;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header;
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use node_registration::body::read_at_most;
use pool_registry_types::{BootId, ErrorBody, ErrorCode, NodeId, routes};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{MAX_ERROR_BYTES, live_answer, own_shortage, was_not_sent};

/// Unused connections to a node are closed after this; shorter than any server's own limit.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// A body goes in pieces of at most so many bytes: what counts is what its connection has taken.
const PIECE_BYTES: usize = 64 * 1024;

/// What calls bring.
#[derive(Debug)]
pub(super) enum Heard {
    Bytes {
        n: u64,
        bytes: Bytes,
    },
    /// A GET has ended; `denied`: with this status. `is_own`: for want of something of our own.
    Closed {
        n: u64,
        end: ConnectionEnd,
        denied: Option<u16>,
        is_own: bool,
    },
    Progress {
        id: PostId,
    },
    Sent {
        id: PostId,
    },
    Answered {
        id: PostId,
        outcome: PostOutcome,
        is_own: bool,
    },
    Live {
        boot_id: BootId,
    },
}

/// Where a call says what it brings, and what ends it.
#[derive(Debug, Clone)]
pub(super) struct Teller {
    pub(super) node_id: NodeId,
    pub(super) to: mpsc::Sender<(NodeId, Heard)>,
    /// Nobody waits for the call any more.
    pub(super) over: CancellationToken,
}

impl Teller {
    async fn tell(&self, heard: Heard) {
        // Without lanes nobody needs to know.
        let _ = self.to.send((self.node_id.clone(), heard)).await;
    }
}

/// What calls are made with.
#[derive(Debug, Clone)]
pub(super) struct Clients {
    kept: Client<Connector, PostBody>,
    /// Keeps no connections.
    fresh: Client<Connector, PostBody>,
    probes: reqwest::Client,
    tokens: Tokens,
}

impl Clients {
    pub(super) fn new(connector: Connector, probes: reqwest::Client, tokens: Tokens) -> Self {
        Self { kept: kept(connector.clone()), fresh: fresh(connector), probes, tokens }
    }

    fn request(&self, request: hyper::http::request::Builder, body: PostBody) -> Option<Request<PostBody>> {
        let request = match self.tokens.authorization() {
            Some(value) => request.header(header::AUTHORIZATION, value),
            None => request,
        };
        request.body(body).ok()
    }

    /// A GET on a connection of its own, until it ends.
    pub(super) async fn get(self, address: String, query: LinkQuery, teller: Teller) {
        let over = teller.over.clone();
        tokio::select! {
            biased;
            () = over.cancelled() => {}
            () = self.read(address, query, teller) => {}
        }
    }

    async fn read(self, address: String, query: LinkQuery, teller: Teller) {
        let n = query.n;
        let closed = |end, denied, is_own| Heard::Closed { n, end, denied, is_own };
        let broken = closed(ConnectionEnd::Broken, None, false);
        let request = Request::get(format!("{address}{}", query.path()));
        let Some(request) = self.request(request, PostBody::empty()) else {
            return teller.tell(broken).await;
        };
        let response = match self.fresh.request(request).await {
            Ok(response) => response,
            Err(error) => {
                let end = if is_refused(&error) { ConnectionEnd::Refused } else { ConnectionEnd::Broken };
                let is_own = own_shortage(&error).is_some();
                tracing::debug!(node_id = %teller.node_id, reason = tls::explain(&error), "a link cannot be opened");
                return teller.tell(closed(end, None, is_own)).await;
            }
        };
        let status = response.status().as_u16();
        if status != 200 {
            tracing::debug!(node_id = %teller.node_id, status, "a link is not taken");
            let denied = Some(status).filter(|status| matches!(status, 401 | 403));
            let end = match code_of(response).await {
                Some(ErrorCode::WrongNode) if status == 409 => ConnectionEnd::WrongBoot,
                Some(ErrorCode::StaleLink) if status == 409 => ConnectionEnd::Stale,
                _ => ConnectionEnd::Broken,
            };
            return teller.tell(closed(end, denied, false)).await;
        }
        let mut body = response.into_body();
        while let Some(Ok(frame)) = body.frame().await {
            if let Ok(bytes) = frame.into_data() {
                teller.tell(Heard::Bytes { n, bytes }).await;
            }
        }
        teller.tell(broken).await;
    }

    /// A POST, until it was answered.
    pub(super) async fn post(
        self,
        address: String,
        id: PostId,
        request: PostRequest,
        fresh: bool,
        teller: Teller,
    ) {
        let (body, mut taken) = PostBody::new(pieces(&request));
        let path = match &request {
            PostRequest::Starts(_) => routes::ATTEMPTS.to_owned(),
            PostRequest::Single { attempt, .. } => routes::attempt(*attempt),
            PostRequest::Control(_) => routes::ATTEMPTS_CONTROL.to_owned(),
        };
        let kind = match &request {
            PostRequest::Single { .. } => "application/octet-stream",
            _ => "application/json",
        };
        let reads_answer = matches!(request, PostRequest::Control(_));
        drop(request);
        let call = Request::post(format!("{address}{path}")).header(header::CONTENT_TYPE, kind);
        let client = if fresh { self.fresh.clone() } else { self.kept.clone() };
        let Some(call) = self.request(call, body) else {
            return teller.tell(Heard::Answered { id, outcome: PostOutcome::NotSent, is_own: false }).await;
        };
        let over = teller.over.clone();
        let mut answered =
            std::pin::pin!(async move { outcome(client.request(call).await, reads_answer).await });
        let (outcome, is_own) = loop {
            tokio::select! {
                biased;
                () = over.cancelled() => return,
                answer = &mut answered => break answer,
                Ok(()) = taken.changed() => {
                    let heard = match *taken.borrow_and_update() {
                        Taken::Some => Heard::Progress { id },
                        Taken::All => Heard::Sent { id },
                    };
                    teller.tell(heard).await;
                }
            }
        };
        teller.tell(Heard::Answered { id, outcome, is_own }).await;
    }

    /// Asks the node whether it lives.
    pub(super) async fn probe_live(self, address: String, teller: Teller) {
        let url = format!("{address}{}", routes::HEALTH_LIVE);
        let Ok(response) = self.probes.get(url).send().await else { return };
        if let Some(live) = live_answer(response).await
            && live.node_id == teller.node_id
        {
            teller.tell(Heard::Live { boot_id: live.boot_id }).await;
        }
    }
}

/// Most that a connection is read at once, bytes: what is kept of a stream lies in blocks of this length,
/// and keeps them.
const READ_BYTES: usize = 64 * 1024;

/// Keeps connections.
pub(super) fn kept<B: Body + Send>(connector: Connector) -> Client<Connector, B>
where
    B::Data: Send,
{
    Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_TIMEOUT)
        .pool_max_idle_per_host(256)
        .http1_max_buf_size(READ_BYTES)
        .build(connector)
}

/// Makes one for each call.
pub(super) fn fresh<B: Body + Send>(connector: Connector) -> Client<Connector, B>
where
    B::Data: Send,
{
    Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(0)
        .http1_max_buf_size(READ_BYTES)
        .build(connector)
}

/// What a refusal says.
async fn code_of(response: hyper::Response<Incoming>) -> Option<ErrorCode> {
    let body = read_at_most(response.into_body(), MAX_ERROR_BYTES).await.ok()?;
    serde_json::from_slice::<ErrorBody>(&body).ok().map(|error| error.code)
}

/// What became of a POST, and whether something of our own was wanting.
async fn outcome(
    answer: Result<hyper::Response<Incoming>, Error>,
    reads_answer: bool,
) -> (PostOutcome, bool) {
    let response = match answer {
        Ok(response) => response,
        Err(error) if was_not_sent(&error) => {
            return (PostOutcome::NotSent, own_shortage(&error).is_some());
        }
        Err(_) => return (PostOutcome::Broken, false),
    };
    let status = response.status().as_u16();
    let Ok(body) = read_at_most(response.into_body(), MAX_POST_BYTES).await else {
        return (PostOutcome::Broken, false);
    };
    let outcome = match status {
        200 if reads_answer => match serde_json::from_slice::<ControlAnswer>(&body) {
            Ok(answer) => PostOutcome::Answered(answer),
            Err(_) => PostOutcome::Status(status),
        },
        200 => PostOutcome::Answered(ControlAnswer::default()),
        409 => match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(error) if error.code == ErrorCode::StaleLink => PostOutcome::Stale,
            _ => PostOutcome::Status(status),
        },
        _ => PostOutcome::Status(status),
    };
    (outcome, false)
}

/// Nobody listens there: the host itself has said so.
fn is_refused(error: &(dyn std::error::Error + 'static)) -> bool {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut kinds =
        causes.filter_map(|cause| cause.downcast_ref::<std::io::Error>()).map(std::io::Error::kind);
    kinds.any(|kind| kind == std::io::ErrorKind::ConnectionRefused)
}

fn pieces(request: &PostRequest) -> Vec<Bytes> {
    match request {
        PostRequest::Starts(body) => vec![body.clone()],
        PostRequest::Single { body, .. } => body.to_vec(),
        PostRequest::Control(body) => {
            vec![serde_json::to_vec(body).expect("ids and numbers are always JSON").into()]
        }
    }
}

/// How much of a body its connection has taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taken {
    Some,
    All,
}

/// A body that says how far it was taken.
#[derive(Debug)]
pub(super) struct PostBody {
    pieces: VecDeque<Bytes>,
    taken: Option<watch::Sender<Taken>>,
}

impl PostBody {
    fn empty() -> Self {
        Self { pieces: VecDeque::new(), taken: None }
    }

    fn new(pieces: Vec<Bytes>) -> (Self, watch::Receiver<Taken>) {
        let (taken, receiver) = watch::channel(Taken::Some);
        let pieces = pieces.into_iter().filter(|piece| !piece.is_empty()).collect();
        (Self { pieces, taken: Some(taken) }, receiver)
    }
}

impl Body for PostBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let Some(mut piece) = self.pieces.pop_front() else { return Poll::Ready(None) };
        if piece.len() > PIECE_BYTES {
            let rest = piece.split_off(PIECE_BYTES);
            self.pieces.push_front(rest);
        }
        let taken = if self.pieces.is_empty() { Taken::All } else { Taken::Some };
        if let Some(sender) = &self.taken {
            sender.send_replace(taken);
        }
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.pieces.iter().map(|piece| piece.len() as u64).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2623
    #[tokio::test]
    async fn a_body_says_how_far_it_was_taken_and_when_all_of_it_was() {
        let (mut body, mut taken) = PostBody::new(vec![vec![1; 10].into(), vec![2; PIECE_BYTES + 5].into()]);
        assert_eq!(body.size_hint().exact(), Some(PIECE_BYTES as u64 + 15));
        let mut lengths = Vec::new();
        while let Some(frame) = body.frame().await {
            lengths.push(frame.unwrap().into_data().unwrap().len());
            assert!(taken.has_changed().unwrap());
            let is_last = lengths.len() == 3;
            assert_eq!(*taken.borrow_and_update() == Taken::All, is_last);
            assert_eq!(body.is_end_stream(), is_last);
        }
        assert_eq!(lengths, [10, PIECE_BYTES, 5]);
    }

    #[test]
    fn only_the_hosts_own_refusal_says_that_nobody_listens() {
        #[derive(Debug, thiserror::Error)]
        #[error("not connected")]
        struct Outer(#[source] std::io::Error);
        let of = |number| is_refused(&Outer(std::io::Error::from_raw_os_error(number)));
        assert!(of(111));
        assert_eq!([110, 113, 104, 24].map(of), [false; 4]);
    }
}
