//! What the control plane calls of a node: run an attempt, take an operator's order for the node or
//! one of its pools, answer a probe. Over HTTP, or in process in the home profile. Attempts of a node
//! that has a link share it (`services/link/`).

mod calls;
mod driver;
mod lanes;
mod links;
#[cfg(test)]
mod loopback_tests;
mod names;
mod pool_order;
mod slotless;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use attempt_link::node::Supply;
use bytes::Bytes;
use daemon_kit::tls::{self, ClientTls, Connector};
use daemon_kit::{Clock, Tokens};
use futures::{Stream, StreamExt, stream};
use http_body_util::{BodyStream, Full};
use hyper::Request;
use hyper::header::{self, HeaderValue};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use node_agent::{AttemptReader, Node, PassedRequest, RecordReader, Retention};
use node_registration::body::read_at_most;
use owned_tasks::{Panicked, StreamThread, StreamThreads};
use pool_registry_types::limits::MAX_ANSWER_BYTES;
use pool_registry_types::node::{IntentOrder, LiveAnswer};
use pool_registry_types::pool::PoolOrdered;
use pool_registry_types::routes::{self, headers};
use pool_registry_types::task::Resume;
use pool_registry_types::trace::traceparent;
use pool_registry_types::{ErrorBody, ErrorCode, LifeId, PoolId, ReplicaId, TraceContext};
use span_export::{Kind, Span};
use task_scheduler::{Denied, Dispatch, HowEnded, ProbeOutcome};
use task_stream::{Passage, Payload, denial};
use uuid::Uuid;

use crate::services::attempt_body::AttemptBody;
use crate::services::spans::trace_of;

use calls::{Clients, fresh, kept};
pub(crate) use driver::Driver;
use lanes::Lanes;
pub(crate) use links::{AttemptSink, LinkTable, LinkedAttempt, Links};
use names::NodeNames;
pub(crate) use pool_order::PoolOrder;

/// Bound of connecting to a node. Source: .specs/01 CLOUD-1501.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Bound of a probe, connecting included.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Bound of an order to a node, connecting included.
const ORDER_TIMEOUT: Duration = Duration::from_secs(5);
/// So long a log is handed on at most.
const LOG_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);
/// A connection of a link on which so long nothing is acknowledged is broken.
const LINK_USER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest error body of a node that is read, bytes.
const MAX_ERROR_BYTES: usize = 64 * 1024;
/// Bound of reading it.
const ERROR_BODY_TIMEOUT: Duration = Duration::from_millis(500);

/// Why a call to a node came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// Its text has the causes, and the one that matters in plain words.
    #[error("{}", tls::explain(.0))]
    NoAnswer(reqwest::Error),
    /// The same of an answer that had begun.
    #[error("{}", tls::explain(.0))]
    Broken(hyper::Error),
    #[error("it answers HTTP {0}")]
    Status(u16),
    #[error("it has registered anew")]
    RegisteredAnew,
    /// The node in this process could not write the order down.
    #[error("{0}")]
    NotWritten(std::io::Error),
    #[error(transparent)]
    Defect(#[from] Panicked),
}

/// The bytes of an attempt, or of a log; an error is a broken connection.
pub(crate) type Frames = Pin<Box<dyn Stream<Item = Result<Bytes, LinkError>> + Send>>;

/// A node took an attempt.
pub(crate) struct Taken {
    pub(crate) replica_id: ReplicaId,
    pub(crate) report_seq: u64,
    pub(crate) exchange: Exchange,
}

/// The answer of a node that runs an attempt, as long as it lasts. Who has no use for the rest stops it:
/// the node in this process would go on for a while.
pub(crate) enum Exchange {
    Http(Frames),
    /// Of the node in this process: its bytes are the node's own, and are copied nowhere.
    Local(AttemptReader),
    /// The same of an attempt whose answer is passed on.
    Records(RecordReader),
    /// By the node's link. It begins before the node has taken the attempt.
    Linked(LinkedAttempt),
}

/// What comes of an attempt.
pub(crate) enum Piece {
    Bytes(Bytes),
    Record(Supply),
    /// Something that its lane has brought and its relay has taken already.
    Taken,
}

impl Exchange {
    /// What comes next; an error is a broken connection.
    pub(crate) async fn next(&mut self) -> Option<Result<Piece, LinkError>> {
        match self {
            Self::Http(frames) => frames.next().await.map(|bytes| bytes.map(Piece::Bytes)),
            Self::Local(reader) => reader.next().await.map(|bytes| Ok(Piece::Bytes(bytes))),
            Self::Records(reader) => reader.next().await.map(|supply| Ok(Piece::Record(supply))),
            Self::Linked(attempt) => {
                attempt.changed().await;
                Some(Ok(Piece::Taken))
            }
        }
    }

    /// Whether what comes is still to be read, and not taken by a lane already.
    pub(crate) fn brings_bytes(&self) -> bool {
        !matches!(self, Self::Linked(_))
    }

    /// Ends the attempt at its node. Over HTTP there is no word for that: the end of the connection is
    /// the stop.
    pub(crate) fn stop(self) {
        match self {
            Self::Http(frames) => drop(frames),
            Self::Local(reader) => reader.stop(),
            Self::Records(reader) => reader.stop(),
            Self::Linked(attempt) => attempt.stop(),
        }
    }
}

/// How nodes are reached.
#[derive(Debug)]
pub(crate) enum NodeLink {
    Http(Box<HttpLink>),
    /// The home profile's one node.
    Local(Node),
}

impl NodeLink {
    /// The links of all nodes; none in the home profile.
    pub(crate) fn links(&self) -> Option<&Links> {
        match self {
            Self::Http(http) => Some(&http.links),
            Self::Local(_) => None,
        }
    }

    /// Asks the node to run the attempt. The error is the attempt's end.
    pub(crate) async fn infer(
        &self,
        dispatch: &Dispatch,
        payload: &Payload,
        resume: Option<Resume>,
    ) -> Result<Taken, HowEnded> {
        let body = AttemptBody::new(dispatch, payload, resume.as_ref());
        let node = match self {
            Self::Http(http) => return http.infer(dispatch, body).await,
            Self::Local(node) => node,
        };
        let request = body.read().map_err(|error| HowEnded::OwnDefect(error.to_string()))?;
        // A relay of this process never comes again: what it has taken need not be kept.
        let retention = Retention::Attached;
        let trace = trace_of(dispatch);
        match node.agent().infer(&dispatch.pool.pool_id, request, body.len(), retention, Some(&trace)) {
            Ok(inference) => Ok(Taken {
                replica_id: inference.replica_id,
                report_seq: inference.report_seq,
                exchange: Exchange::Local(inference.reader),
            }),
            Err(error) => Err(HowEnded::refused(error)),
        }
    }

    /// Asks the node in this process to pass a body on to its engine. A node behind HTTP does so by its
    /// link only. The error is the attempt's end.
    pub(crate) fn pass_on(
        &self,
        dispatch: &Dispatch,
        passage: Passage,
        body: Bytes,
    ) -> Result<Taken, HowEnded> {
        let Self::Local(node) = self else {
            let message = "the node has no link, by which such requests go";
            return Err(HowEnded::Refused(ErrorBody::new(ErrorCode::PoolUnready, message)));
        };
        let request = PassedRequest {
            task_id: dispatch.task,
            attempt_id: dispatch.attempt,
            node_id: dispatch.pool.node_id.clone(),
            boot_id: dispatch.boot_id,
            log_id: dispatch.log,
            replica_hint: dispatch.warm_replica.clone(),
            model: dispatch.spec.model_ref.clone(),
            passage,
            body,
        };
        let trace = trace_of(dispatch);
        match node.agent().pass_on(&dispatch.pool.pool_id, request, Some(&trace)) {
            Ok(on) => Ok(Taken {
                replica_id: on.acceptance.replica_id,
                report_seq: on.acceptance.report_seq,
                exchange: Exchange::Records(on.reader),
            }),
            Err(error) => Err(HowEnded::refused(error)),
        }
    }

    /// Tells the node what it is to do from now on; it has written it down when this returns well.
    pub(crate) async fn deliver_intent(&self, address: &str, order: &IntentOrder) -> Result<(), LinkError> {
        match self {
            Self::Http(http) => {
                let body = serde_json::to_value(order).unwrap_or_default();
                let status = http.order(address, routes::INTENT, &body, None).await?.status();
                if status.is_success() { Ok(()) } else { Err(LinkError::Status(status.as_u16())) }
            }
            Self::Local(node) => match node.agent().take_intent(order.clone()).await {
                Ok(true) => Ok(()),
                Ok(false) => Err(LinkError::RegisteredAnew),
                Err(error) => Err(LinkError::NotWritten(error)),
            },
        }
    }

    /// Hands an order to one of the node's pools over, for whoever gives it. Errors: the node's own, and
    /// `NODE_UNAVAILABLE` when it does not answer.
    pub(crate) async fn order_pool(
        &self,
        address: &str,
        pool_id: &PoolId,
        order: &PoolOrder,
        trace: Option<&TraceContext>,
    ) -> Result<PoolOrdered, ErrorBody> {
        let span = match trace {
            Some(trace) => Span::of(trace, "pool order", Kind::Client),
            None => Span::first("pool order", Kind::Client),
        };
        // What is not recorded here is not recorded there either.
        let own =
            TraceContext { traceparent: traceparent(Uuid::new_v4().as_u128(), 1, 0), ..Default::default() };
        let span_id = span.as_ref().map_or(1, Span::id);
        let within = match (trace, &span) {
            (Some(trace), _) => trace.child(span_id),
            (None, Some(span)) => TraceContext { traceparent: span.traceparent(), ..Default::default() },
            (None, None) => own,
        };
        let ordered = self.order_within(address, pool_id, order, &within).await;
        if let Some(span) = span {
            let (name, _) = order.call();
            let span = span.with("llorch.pool_id", pool_id.to_string()).with("llorch.order", name);
            match &ordered {
                Ok(_) => span.end(),
                Err(error) => span.failed(error.code.as_str()).end(),
            }
        }
        ordered
    }

    async fn order_within(
        &self,
        address: &str,
        pool_id: &PoolId,
        order: &PoolOrder,
        within: &TraceContext,
    ) -> Result<PoolOrdered, ErrorBody> {
        let http = match self {
            Self::Http(http) => http,
            Self::Local(node) => {
                return match order {
                    PoolOrder::Drain(drain) => node.order_drain(pool_id, *drain),
                    PoolOrder::Reload(reload) => node.order_reload(pool_id, reload).await,
                    PoolOrder::Purge(purge) => node.order_purge(pool_id, *purge),
                    PoolOrder::Load => node.order_load(pool_id),
                };
            }
        };
        let (path, body) = order.call();
        let path = routes::of_pool(path, pool_id);
        let response = http
            .order(address, &path, &body, Some(within))
            .await
            .map_err(|error| unavailable(error.to_string()))?;
        let status = response.status();
        let bytes = short_body(response).await?;
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(|error| unavailable(error.to_string()));
        }
        Err(refusal(status.as_u16(), &bytes))
    }

    /// What an engine of one of the node's pools has written, as the node hands it out. Errors: the
    /// node's own, and `NODE_UNAVAILABLE` when it does not answer.
    pub(crate) async fn pool_logs(
        &self,
        address: &str,
        pool_id: &PoolId,
        replica_id: Option<&ReplicaId>,
        follow: bool,
    ) -> Result<Frames, ErrorBody> {
        let http = match self {
            Self::Http(http) => http,
            Self::Local(node) => {
                let reader = node.open_log(pool_id, replica_id)?;
                let pieces = stream::unfold(reader, move |mut reader| async move {
                    // Whoever reads looks whether the caller may still read.
                    let piece = reader.next(|| follow).await?;
                    Some((Ok(piece), reader))
                });
                return Ok(Box::pin(pieces));
            }
        };
        // What an id may hold needs no escape.
        let replica = replica_id.map(|id| format!("&replica_id={id}")).unwrap_or_default();
        let path = routes::of_pool(routes::POOL_LOGS, pool_id);
        let url = format!("{address}{path}?follow={follow}{replica}");
        let mut call = http.probes.get(url).timeout(LOG_TIMEOUT);
        if let Some(value) = http.tokens.authorization() {
            call = call.header(header::AUTHORIZATION, value);
        }
        let answered = tokio::time::timeout(ORDER_TIMEOUT, call.send()).await;
        let response = answered
            .map_err(|_| unavailable(format!("no answer within {} s", ORDER_TIMEOUT.as_secs())))?
            .map_err(|error| unavailable(LinkError::NoAnswer(error.without_url()).to_string()))?;
        let status = response.status();
        if !status.is_success() {
            return Err(refusal(status.as_u16(), &short_body(response).await?));
        }
        let pieces = BodyStream::new(reqwest::Body::from(response)).filter_map(|piece| async move {
            match piece {
                Ok(frame) => frame.into_data().ok().map(Ok),
                Err(error) => Some(Err(LinkError::NoAnswer(error.without_url()))),
            }
        });
        Ok(Box::pin(pieces))
    }

    /// Dials the node on a fresh connection, and where that is wanted asks whether it lets us in.
    pub(crate) async fn probe(&self, address: &str, authorized: bool) -> ProbeOutcome {
        match self {
            Self::Http(http) => http.probe(address, authorized).await,
            Self::Local(node) => {
                let identity = node.agent().identity();
                let live = LiveAnswer { node_id: identity.node_id, boot_id: identity.boot_id };
                ProbeOutcome::Answered { live, authorized: authorized.then_some(Ok(())) }
            }
        }
    }
}

fn unavailable(reason: String) -> ErrorBody {
    ErrorBody::new(ErrorCode::NodeUnavailable, format!("the node does not answer: {reason}"))
}

/// The whole of an answer that is not long.
async fn short_body(response: reqwest::Response) -> Result<Bytes, ErrorBody> {
    let body = read_at_most(reqwest::Body::from(response), MAX_ANSWER_BYTES);
    let read = tokio::time::timeout(ORDER_TIMEOUT, body).await;
    let read = read.map_err(|_| unavailable("its answer has no end".into()))?;
    read.map_err(|error| unavailable(tls::explain(&error)))
}

/// Why a node has refused what it was asked for.
fn refusal(status: u16, body: &[u8]) -> ErrorBody {
    let Ok(mut refused) = serde_json::from_slice::<ErrorBody>(body) else {
        return unavailable("something else answers there".into());
    };
    refused.cut();
    // Our own token is not the one it wants: nothing that whoever asked could mend.
    if status == 401 { unavailable(refused.to_string()) } else { refused }
}

/// Nodes behind HTTP.
#[derive(Debug)]
pub(crate) struct HttpLink {
    /// One for each thread for streams: a connection is used where it was made.
    streams: Box<[Client<Connector, AttemptBody>]>,
    /// Keeps no connections.
    fresh: Client<Connector, AttemptBody>,
    /// For requests that take no slot.
    slotless: Client<Connector, Full<Bytes>>,
    probes: reqwest::Client,
    tokens: Tokens,
    links: Links,
}

impl HttpLink {
    /// The first of the tokens is sent. Links are what the drivers, which are to be run, make of them,
    /// one on each thread for streams; names are resolved there.
    pub(crate) fn new(
        tls: &ClientTls,
        tokens: Tokens,
        clock: Clock,
        threads: &StreamThreads,
    ) -> Result<(Self, Vec<Driver>), reqwest::Error> {
        let names = NodeNames(threads.first().handle().clone());
        let threads = threads.iter().count();
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let mut of_links = connector.clone();
        of_links.set_tcp_user_timeout(Some(LINK_USER_TIMEOUT));
        let of_links = tls.connector(of_links, CONNECT_TIMEOUT);
        let connector = tls.connector(connector, CONNECT_TIMEOUT);
        let streams = (0..threads).map(|_| kept(connector.clone())).collect();
        let slotless = kept(connector.clone());
        let fresh = fresh(connector);
        // No kept connections: a probe must show that a new one can be made.
        let probes = reqwest::Client::builder()
            .pool_max_idle_per_host(0)
            .timeout(PROBE_TIMEOUT)
            .dns_resolver(Arc::new(names))
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none());
        let probes = tls.reqwest(probes).build()?;
        let life = LifeId(Uuid::new_v4());
        let (links, orders) = Links::new(life, threads);
        let driver = |(lane, orders)| {
            let lanes = Lanes::new(life, lane, Arc::clone(&links.table));
            // Each has clients of its own: a connection is used where it was made.
            let clients = Clients::new(of_links.clone(), probes.clone(), tokens.clone());
            Driver::new(clock, lanes, clients, orders)
        };
        let drivers = (0..).zip(orders).map(driver).collect();
        Ok((Self { streams, fresh, slotless, probes, tokens, links }, drivers))
    }

    async fn infer(&self, dispatch: &Dispatch, body: AttemptBody) -> Result<Taken, HowEnded> {
        // One span an attempt, however often it is asked for.
        let trace = trace_of(dispatch);
        let first = call(dispatch, &trace, self.tokens.authorization(), body.clone())?;
        let here = StreamThread::current().map_or(0, |thread| thread.index());
        let response = match self.streams[here % self.streams.len()].request(first).await {
            Ok(response) => response,
            Err(error) if was_not_sent(&error) => return Err(not_sent(&error)),
            // A kept connection may have died unseen: only a fresh one says something of the node.
            // Should the node have taken the attempt after all, it refuses it now, at no cost.
            Err(_) => {
                let again = call(dispatch, &trace, self.tokens.authorization(), body)?;
                self.fresh.request(again).await.map_err(|error| {
                    if was_not_sent(&error) {
                        // What was written on the kept one may be what the node died of.
                        match not_sent(&error) {
                            HowEnded::NeverSent(reason) => HowEnded::NoAnswer(reason),
                            ours => ours,
                        }
                    } else {
                        HowEnded::NoAnswer(tls::explain(&error))
                    }
                })?
            }
        };
        let status = response.status();
        if !status.is_success() {
            let body = read_at_most(response.into_body(), MAX_ERROR_BYTES);
            // The status says the most: what stalls after it is not waited for.
            let body = tokio::time::timeout(ERROR_BODY_TIMEOUT, body).await;
            let bytes = body.ok().and_then(Result::ok).unwrap_or_default();
            return Err(HowEnded::answered(status.as_u16(), serde_json::from_slice(&bytes).ok()));
        }
        let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        let report_seq = text(headers::REPORT_SEQ).and_then(|seq| seq.parse().ok());
        let replica_id = text(headers::REPLICA_ID).and_then(|id| ReplicaId::new(id).ok());
        let (Some(report_seq), Some(replica_id)) = (report_seq, replica_id) else {
            return Err(HowEnded::Broken("an answer without its acceptance headers".into()));
        };
        let frames = BodyStream::new(response.into_body()).filter_map(|piece| async move {
            match piece {
                Ok(frame) => frame.into_data().ok().map(Ok),
                Err(error) => Some(Err(LinkError::Broken(error))),
            }
        });
        Ok(Taken { replica_id, report_seq, exchange: Exchange::Http(Box::pin(frames)) })
    }

    async fn order(
        &self,
        address: &str,
        path: &str,
        body: &serde_json::Value,
        within: Option<&TraceContext>,
    ) -> Result<reqwest::Response, LinkError> {
        let mut call = self.probes.post(format!("{address}{path}")).timeout(ORDER_TIMEOUT).json(body);
        if let Some(value) = self.tokens.authorization() {
            call = call.header(header::AUTHORIZATION, value);
        }
        if let Some(within) = within {
            call = call.header(headers::TRACEPARENT, &within.traceparent);
            if !within.correlation_id.is_empty() {
                call = call.header(headers::CORRELATION_ID, &within.correlation_id);
            }
        }
        call.send().await.map_err(|error| LinkError::NoAnswer(error.without_url()))
    }

    async fn probe(&self, address: &str, authorized: bool) -> ProbeOutcome {
        let live = match self.live(address).await {
            Ok(live) => live,
            Err(Unprobed::Node(reason)) => return ProbeOutcome::Failed(reason),
            Err(Unprobed::Ours) => return ProbeOutcome::Inconclusive,
        };
        if !authorized {
            return ProbeOutcome::Answered { live, authorized: None };
        }
        match self.lets_us_in(address).await {
            Ok(authorized) => ProbeOutcome::Answered { live, authorized: Some(authorized) },
            Err(Unprobed::Node(reason)) => ProbeOutcome::Failed(reason),
            Err(Unprobed::Ours) => ProbeOutcome::Inconclusive,
        }
    }

    async fn live(&self, address: &str) -> Result<LiveAnswer, Unprobed> {
        let url = format!("{address}{}", routes::HEALTH_LIVE);
        let response = self.probes.get(url).send().await.map_err(Unprobed::of)?;
        if !response.status().is_success() {
            let reason = format!("its health call answers HTTP {}", response.status().as_u16());
            return Err(Unprobed::Node(reason));
        }
        live_answer(response).await.ok_or_else(|| Unprobed::Node("something else answers there".into()))
    }

    /// Whether the node lets the control plane in, on a route that needs the token that an attempt
    /// needs.
    async fn lets_us_in(&self, address: &str) -> Result<Result<(), Denied>, Unprobed> {
        let mut call = self.probes.get(format!("{address}{}", routes::POOLS));
        if let Some(value) = self.tokens.authorization() {
            call = call.header(header::AUTHORIZATION, value);
        }
        let response = call.send().await.map_err(Unprobed::of)?;
        let status = response.status();
        Ok(if status.is_success() { Ok(()) } else { Err(Denied(denial(status.as_u16(), None))) })
    }
}

/// Who answers at an address; nothing where something else does.
async fn live_answer(response: reqwest::Response) -> Option<LiveAnswer> {
    let body = read_at_most(reqwest::Body::from(response), MAX_ANSWER_BYTES).await.ok()?;
    serde_json::from_slice(&body).ok()
}

/// One attempt as a request.
fn call(
    dispatch: &Dispatch,
    trace: &TraceContext,
    authorization: Option<HeaderValue>,
    body: AttemptBody,
) -> Result<Request<AttemptBody>, HowEnded> {
    let url = format!("{}{}", dispatch.address, routes::of_pool(routes::POOL_INFER, &dispatch.pool.pool_id));
    let mut call = Request::post(url)
        .header(header::CONTENT_TYPE, "application/json")
        .header(headers::TRACEPARENT, &trace.traceparent)
        .header(headers::CORRELATION_ID, &trace.correlation_id);
    if !trace.tracestate.is_empty() {
        call = call.header(headers::TRACESTATE, &trace.tracestate);
    }
    if let Some(value) = authorization {
        call = call.header(header::AUTHORIZATION, value);
    }
    call.body(body).map_err(|error| HowEnded::NeverSent(format!("unusable address: {error}")))
}

/// Why a probe has shown nothing good.
enum Unprobed {
    Node(String),
    /// It says nothing of the node.
    Ours,
}

impl Unprobed {
    fn of(error: reqwest::Error) -> Self {
        if own_shortage(&error).is_some() {
            Self::Ours
        } else {
            Self::Node(tls::explain(&error.without_url()))
        }
    }
}

/// The connection was never made.
fn not_sent(error: &hyper_util::client::legacy::Error) -> HowEnded {
    let reason = tls::explain(error);
    match own_shortage(error) {
        Some(everywhere) => HowEnded::OwnShortage { reason, everywhere },
        None => HowEnded::NeverSent(reason),
    }
}

/// Whether we ourselves are out of descriptors, memory or ports, which is evidence against nobody, and
/// whether no other node can be dialled either: ports run out for each address by itself.
/// Source: .specs/01 CLOUD-1316; the numbers are Linux's EMFILE, ENFILE, ENOMEM, ENOBUFS and EADDRNOTAVAIL.
fn own_shortage(error: &(dyn std::error::Error + 'static)) -> Option<bool> {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut numbers = causes.filter_map(|cause| cause.downcast_ref::<std::io::Error>()?.raw_os_error());
    numbers.find_map(|number| match number {
        24 | 23 | 12 | 105 => Some(true),
        99 => Some(false),
        _ => None,
    })
}

/// No node has read the request.
fn was_not_sent(error: &hyper_util::client::legacy::Error) -> bool {
    error.is_connect() || tls::is_refused(error)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use task_stream::PayloadFormat;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::services::attempt_body::tests::{dispatch, spec};

    const PIECE: &[u8] = &[b' '; 16 * 1024];

    // CLOUD-1146
    // CLOUD-1943
    #[test]
    fn an_attempt_goes_out_under_the_trace_of_whoever_submitted_its_task() {
        let payload = Payload { format: PayloadFormat::Native, bytes: Bytes::from_static(b"{\"a\":1}") };
        // Whichever attempt of the task it is.
        for attempt_number in [1, 2] {
            let dispatch = Dispatch { attempt_number, ..dispatch(spec()) };
            let body = AttemptBody::new(&dispatch, &payload, None);
            let trace = dispatch.spec.trace.child(7);
            let call = call(&dispatch, &trace, None, body).unwrap();
            assert_eq!(call.uri(), "http://a/v2/pools/p/infer");
            assert_eq!(
                call.headers()["traceparent"],
                "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000007-01"
            );
            assert_eq!(call.headers()["x-correlation-id"], "c-1");
            assert_eq!(call.headers()["tracestate"], "vendor=x");
            assert!(!call.headers().contains_key(header::AUTHORIZATION));
        }
    }

    /// Reads one request, which has no more than its head and `{"a":1}` in it.
    async fn read_request(socket: &mut TcpStream) {
        let (mut read, mut buffer) = (Vec::new(), [0; 4096]);
        while !read.ends_with(b"}") {
            let n = socket.read(&mut buffer).await.unwrap();
            assert!(n > 0, "the request breaks off");
            read.extend_from_slice(&buffer[..n]);
        }
    }

    // CLOUD-1944
    #[tokio::test]
    async fn a_node_that_dies_of_what_came_over_a_kept_connection_has_given_no_answer() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let tls = ClientTls::new("TEST", None, None).unwrap();
        let threads = StreamThreads::start(1).unwrap();
        let (http, _drivers) = HttpLink::new(&tls, Tokens::default(), Clock::default(), &threads).unwrap();
        let payload = Payload { format: PayloadFormat::Native, bytes: Bytes::from_static(b"{\"a\":1}") };
        let dispatch = Dispatch { address, ..dispatch(spec()) };
        let infer = || http.infer(&dispatch, AttemptBody::new(&dispatch, &payload, None));
        let node = async {
            let (mut socket, _) = listener.accept().await.unwrap();
            read_request(&mut socket).await;
            let head = "HTTP/1.1 200 OK\r\nx-llorch-report-seq: 1\r\nx-llorch-replica-id: r0\r\n";
            socket.write_all(format!("{head}content-length: 0\r\n\r\n").as_bytes()).await.unwrap();
            socket
        };
        let (taken, mut socket) = tokio::join!(infer(), node);
        let Exchange::Http(frames) = taken.unwrap_or_else(|how| panic!("{how:?}")).exchange else { panic!() };
        assert_eq!(frames.count().await, 0);
        // It reads the next attempt, and is gone.
        let dies = async {
            read_request(&mut socket).await;
            drop((socket, listener));
        };
        let (taken, ()) = tokio::join!(infer(), dies);
        assert!(matches!(taken, Err(HowEnded::NoAnswer(_))), "{:?}", taken.err());
        // Nothing was sent from then on.
        assert!(matches!(infer().await, Err(HowEnded::NeverSent(_))));
    }

    // CLOUD-2720
    #[tokio::test]
    async fn an_answer_to_a_probe_that_does_not_end_is_read_no_further_than_its_bound() {
        let sent = Arc::new(AtomicUsize::new(0));
        let pieces = futures::stream::repeat_with({
            let sent = Arc::clone(&sent);
            move || {
                let all = sent.fetch_add(PIECE.len(), Ordering::Relaxed) + PIECE.len();
                // It is endless for whoever stops in time.
                if all < 64 * MAX_ANSWER_BYTES { Ok(Bytes::from_static(PIECE)) } else { Err("read too far") }
            }
        });
        let answer = hyper::Response::new(reqwest::Body::wrap_stream(pieces));
        assert_eq!(live_answer(answer.into()).await, None);
        assert!(sent.load(Ordering::Relaxed) <= MAX_ANSWER_BYTES + 2 * PIECE.len(), "{sent:?}");
        let live = r#"{"node_id":"a","boot_id":"7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11","newer":1}"#;
        let answer = hyper::Response::new(reqwest::Body::from(live));
        assert_eq!(live_answer(answer.into()).await.unwrap().node_id.as_str(), "a");
    }

    // CLOUD-1316
    #[test]
    fn our_own_shortage_is_known_by_its_number_wherever_it_stands_among_the_causes() {
        #[derive(Debug, thiserror::Error)]
        #[error("not connected")]
        struct Outer(#[source] std::io::Error);
        let of = |number| own_shortage(&Outer(std::io::Error::from_raw_os_error(number)));
        assert_eq!([24, 23, 105, 12].map(of), [Some(true); 4]);
        assert_eq!(of(99), Some(false), "of ports, which are for each address by itself");
        // Refused, unreachable, timed out, reset: the node's or the network's.
        assert_eq!([111, 113, 110, 104].map(of), [None; 4]);
    }
}
