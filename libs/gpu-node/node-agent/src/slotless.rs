//! Requests that take no slot: how many tokens a text has, and what a template makes of a chat. Engines
//! answer them beside what they generate, so they wait for no slot and none is taken; so many run at once
//! on a node, and whoever comes then is told so.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use handoff_watcher::HandoffName;
use pool_registry_types::{AttemptId, ErrorBody, ErrorCode, TraceContext};
use span_export::{Asked, id_of};
use task_stream::{AnswerHead, SlotlessRequest, line_of, unframed};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use uuid::Uuid;

use crate::agent::Agent;
use crate::driver::first_of_its_process;
use crate::engines::client::{attempt_headers, with_causes};
use crate::engines::{self, Whose};
use crate::passthrough::{MAX_REFUSAL_BYTES, REFUSAL_TIMEOUT, head_of, to_engine};

/// At once on a node. Source: .specs/01 CLOUD-2907.
pub(crate) const AT_ONCE: usize = 8;
/// When one may come again that had no place, milliseconds.
const RETRY_AFTER_MS: u64 = 1_000;
/// Longest wait for the whole answer.
const WITHIN: Duration = Duration::from_secs(60);
/// Longest answer, bytes.
const MAX_ANSWER_BYTES: usize = 8 * 1024 * 1024;

/// One of the places of requests that take no slot, until it is dropped.
#[derive(Debug)]
pub struct SlotlessPlace {
    _permit: OwnedSemaphorePermit,
}

impl Agent {
    /// A place for a request that takes no slot, before its body is read.
    ///
    /// # Errors
    /// `REPLICA_EXHAUSTED` where there is none.
    pub fn slotless_place(&self) -> Result<SlotlessPlace, ErrorBody> {
        let places: &Arc<Semaphore> = &self.slotless;
        Arc::clone(places).try_acquire_owned().map(|_permit| SlotlessPlace { _permit }).map_err(|_| {
            let message = format!("{AT_ONCE} requests that take no slot run here, which is the most");
            ErrorBody::new(ErrorCode::ReplicaExhausted, message).retry_after_ms(RETRY_AFTER_MS)
        })
    }

    /// As [`Agent::pass_slotless`], of what came over HTTP: a line and the body, and so is the answer.
    ///
    /// # Errors
    /// The same, and `INVALID_PARAMS` for a line that is none.
    pub async fn pass_framed(
        &self,
        place: &SlotlessPlace,
        framed: &Bytes,
        trace: &TraceContext,
    ) -> Result<Vec<u8>, ErrorBody> {
        let (request, body) = unframed::<SlotlessRequest>(framed)
            .map_err(|error| ErrorBody::invalid(format!("the body: {error}")))?;
        let (head, bytes) = self.pass_slotless(place, &request, &body, trace).await?;
        Ok([&line_of(&head)[..], &bytes].concat())
    }

    /// Passes a request on to an engine that is ready, and returns what that answers. Dropped, the engine
    /// is not waited for.
    ///
    /// # Errors
    /// Those of [`node_core::NodeCore::serving`]; `INVALID_PARAMS` for a route that takes a slot or a body
    /// that is not what is said of it; `PAYLOAD_TOO_LARGE` for an answer of more than 8 MiB; and what is
    /// not the client's fault.
    pub async fn pass_slotless(
        &self,
        _place: &SlotlessPlace,
        request: &SlotlessRequest,
        body: &Bytes,
        trace: &TraceContext,
    ) -> Result<(AnswerHead, Bytes), ErrorBody> {
        let SlotlessRequest { model, passage } = request;
        let route = passage.route;
        let path = route.path();
        if route.takes_slot() {
            return Err(ErrorBody::invalid(format!("route: {path} takes a slot")));
        }
        let serving =
            self.with_core(|core, now| core.serving(now, model, path, |engine| route.is_of(engine)))?;
        let body = passage.with_model(body, &serving.model);
        let body = body.ok_or_else(|| ErrorBody::invalid("model_at: is not where the model stands"))?;
        let name = HandoffName { pool_id: serving.pool_id, replica_id: serving.replica_id };
        let mut at = self.endpoint(&name, &serving.url);
        let id = AttemptId(Uuid::new_v4());
        let span = Asked::of(trace, "engine request");
        let span_id = span.id().unwrap_or_else(|| id_of(id.0));
        at.headers = attempt_headers(&trace.child(span_id), &id);
        at.headers.extend(to_engine(passage));
        let target = passage.target();
        let unready = |why: String| {
            self.look_now(&name);
            ErrorBody::new(ErrorCode::PoolUnready, why)
        };
        let asking = async {
            let client = self.client();
            let sent = client.pass(&at, &target, body).await;
            let answer = sent.map_err(|error| unready(format!("the engine cannot be asked: {error}")))?;
            if serving.names_from_engine {
                let named = (serving.engine, model.clone(), serving.model.clone());
                first_of_its_process(&answer, client, &at, &named).await.map_err(unready)?;
            }
            let head = head_of(&answer.response);
            if (200..300).contains(&head.status) {
                let bytes = answer.bytes(MAX_ANSWER_BYTES).await.map_err(|error| match error {
                    node_registration::body::BodyError::TooLong { .. } => {
                        let message = format!("the engine's answer is longer than {MAX_ANSWER_BYTES} bytes");
                        ErrorBody::new(ErrorCode::PayloadTooLarge, message)
                    }
                    broken => unready(format!("the answer broke off: {}", with_causes(&broken))),
                })?;
                return Ok((head, bytes));
            }
            let body = answer.beginning(MAX_REFUSAL_BYTES, REFUSAL_TIMEOUT).await;
            let refusal = engines::refusal(head.status, &String::from_utf8_lossy(&body));
            match refusal.whose {
                Whose::Client => Ok((head, body.into())),
                Whose::Missing => {
                    self.with_core(|core, now| {
                        core.found_lacking(now, &name.pool_id, &name.replica_id, path);
                    });
                    Err(ErrorBody::new(
                        ErrorCode::Unsupported,
                        format!("{path}: the engine has no such route"),
                    ))
                }
                _ => Err(ErrorBody::new(ErrorCode::PoolUnready, refusal.error.message)),
            }
        };
        let late = |_| {
            let message = format!("the engine did not answer within {} s", WITHIN.as_secs());
            Err(ErrorBody::new(ErrorCode::DecodeTimeout, message))
        };
        let answered = tokio::time::timeout(WITHIN, asking).await.unwrap_or_else(late);
        span.answered(answered.as_ref().err().map(|error| error.code.as_str()), |span| {
            span.with("gen_ai.request.model", model.to_string())
        });
        answered
    }
}
