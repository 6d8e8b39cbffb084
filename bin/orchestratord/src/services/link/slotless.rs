//! Requests that take no slot: passed to a node's own route for them, beside its link.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header;
use hyper::{Request, StatusCode};
use node_registration::body::read_at_most;
use pool_registry_types::routes::{self, headers};
use pool_registry_types::{ErrorBody, ErrorCode, TraceContext};
use task_stream::{AnswerHead, SlotlessRequest, line_of, unframed};

use super::{HttpLink, NodeLink, refusal, unavailable};

/// Longest answer of a node: what an engine answers, and the line before it.
const MAX_ANSWER_BYTES: usize = 9 * 1024 * 1024;

impl NodeLink {
    /// What an engine of the node answers. Dropped, it is not waited for.
    ///
    /// # Errors
    /// The node's own, and `NODE_UNAVAILABLE` when it does not answer within that time.
    pub(crate) async fn pass_slotless(
        &self,
        address: &str,
        request: &SlotlessRequest,
        body: &Bytes,
        trace: &TraceContext,
        within: Duration,
    ) -> Result<(AnswerHead, Bytes), ErrorBody> {
        let asking = async {
            match self {
                Self::Http(http) => http.pass_slotless(address, request, body, trace).await,
                Self::Local(node) => {
                    let place = node.agent().slotless_place()?;
                    node.agent().pass_slotless(&place, request, body, trace).await
                }
            }
        };
        let late = |_| Err(unavailable(format!("nothing came within {} ms", within.as_millis())));
        tokio::time::timeout(within, asking).await.unwrap_or_else(late)
    }
}

impl HttpLink {
    async fn pass_slotless(
        &self,
        address: &str,
        request: &SlotlessRequest,
        body: &Bytes,
        trace: &TraceContext,
    ) -> Result<(AnswerHead, Bytes), ErrorBody> {
        let framed = [&line_of(request)[..], body].concat();
        let mut call = Request::post(format!("{address}{}", routes::SLOTLESS))
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(headers::TRACEPARENT, &trace.traceparent)
            .header(headers::CORRELATION_ID, &trace.correlation_id);
        if let Some(value) = self.tokens.authorization() {
            call = call.header(header::AUTHORIZATION, value);
        }
        let call = call.body(Full::new(framed.into())).map_err(|error| unavailable(error.to_string()))?;
        let answer = self.slotless.request(call).await;
        let answer = answer.map_err(|error| unavailable(daemon_kit::tls::explain(&error)))?;
        let status = answer.status();
        let read = read_at_most(answer.into_body(), MAX_ANSWER_BYTES).await;
        let read = read.map_err(|error| unavailable(daemon_kit::tls::explain(&error)))?;
        match status {
            StatusCode::OK => unframed(&read).map_err(|error| unavailable(format!("its answer: {error}"))),
            // An older node has no such route.
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => {
                let message = "the node's version passes on no requests that take no slot";
                Err(ErrorBody::new(ErrorCode::PoolUnready, message))
            }
            _ => Err(refusal(status.as_u16(), &read)),
        }
    }
}
