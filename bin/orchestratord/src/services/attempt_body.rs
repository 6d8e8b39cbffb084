//! The body of a native attempt on its way to a node: an `InferRequest` in pieces.
//!
//! What is the attempt's own stands before and after the task's payload, whose bytes are shared by
//! all attempts and are neither copied nor read again.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use pool_registry_types::task::{InferRequest, Reasoning, Resume};
use pool_registry_types::{AttemptId, BootId, LogId, NodeId, ReplicaId, TaskId};
use serde::Serialize;
use task_scheduler::Dispatch;
use task_stream::Payload;

/// The fields of an `InferRequest` but for `resume` and `task`.
#[derive(Serialize)]
struct Head<'d> {
    task_id: TaskId,
    attempt_id: AttemptId,
    node_id: &'d NodeId,
    boot_id: BootId,
    log_id: LogId,
    first_index: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    replica_hint: Option<&'d ReplicaId>,
    thoughts: bool,
}

/// An `InferRequest` as JSON; clones share the bytes.
#[derive(Debug, Clone)]
pub(crate) struct AttemptBody {
    pieces: std::vec::IntoIter<Bytes>,
}

impl AttemptBody {
    pub(crate) fn new(dispatch: &Dispatch, payload: &Payload, resume: Option<&Resume>) -> Self {
        let head = Head {
            task_id: dispatch.task,
            attempt_id: dispatch.attempt,
            node_id: &dispatch.pool.node_id,
            boot_id: dispatch.boot_id,
            log_id: dispatch.log,
            first_index: dispatch.first_index,
            replica_hint: dispatch.warm_replica.as_ref(),
            thoughts: dispatch.spec.reasoning == Reasoning::Keep,
        };
        let mut before = serde_json::to_vec(&head).expect("ids and numbers are always JSON");
        // The object goes on: with the task, and what had been sent before.
        before.pop();
        before.extend_from_slice(b",\"task\":");
        let task = match dispatch.max_tokens {
            None => payload.bytes.clone(),
            // The client gave none, so that the field does not come twice.
            Some(bound) => {
                before.extend_from_slice(format!("{{\"max_tokens\":{bound},").as_bytes());
                payload.bytes.slice(1..)
            }
        };
        let after = match resume {
            None => Bytes::from_static(b"}"),
            Some(resume) => {
                let mut after = b",\"resume\":".to_vec();
                serde_json::to_writer(&mut after, resume).expect("texts and numbers are always JSON");
                after.push(b'}');
                after.into()
            }
        };
        Self { pieces: vec![before.into(), task, after].into_iter() }
    }

    /// What has not been taken yet.
    pub(crate) fn pieces(&self) -> &[Bytes] {
        self.pieces.as_slice()
    }

    /// What is left of it, bytes.
    pub(crate) fn len(&self) -> usize {
        self.pieces().iter().map(Bytes::len).sum()
    }

    /// For a node in this process, which gets a message and no bytes.
    pub(crate) fn read(&self) -> Result<InferRequest, serde_json::Error> {
        serde_json::from_slice(&self.pieces().concat())
    }
}

impl Body for AttemptBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.pieces.next().map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces().is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.len() as u64)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use http_body_util::BodyExt;
    use pool_registry_types::task::{ResumeMode, TaskRequest};
    use pool_registry_types::trace::TraceContext;
    use pool_registry_types::{ModelRef, PoolId, PoolKey};
    use task_stream::{AttemptDeadlines, BodyDigest, PayloadFormat, TaskSpec};
    use uuid::Uuid;

    use super::*;

    /// The trace of whoever submits.
    pub(crate) const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    /// The facts of a plain completion.
    pub(crate) fn spec() -> TaskSpec {
        let request = TaskRequest::completion(ModelRef::new("m").unwrap(), "x");
        let trace = TraceContext {
            traceparent: TRACEPARENT.into(),
            correlation_id: "c-1".into(),
            tracestate: "vendor=x".into(),
        };
        TaskSpec::of(&request, TaskId(Uuid::from_u128(1)), BodyDigest::new([0; 32]), None, trace)
    }

    /// The first attempt of the task.
    pub(crate) fn dispatch(spec: TaskSpec) -> Dispatch {
        Dispatch {
            task: spec.task_id,
            attempt: AttemptId(Uuid::from_u128(2)),
            log: LogId(Uuid::from_u128(3)),
            pool: PoolKey::new(NodeId::new("a").unwrap(), PoolId::new("p").unwrap()),
            address: "http://a".into(),
            boot_id: BootId(Uuid::from_u128(4)),
            first_index: 0,
            resume: None,
            warm_replica: None,
            attempt_number: 1,
            queue_wait_ms: 0,
            deadlines: AttemptDeadlines {
                acceptance: Duration::ZERO,
                first_token: Duration::ZERO,
                token_idle: Duration::ZERO,
                silence: Duration::ZERO,
            },
            task_deadline: None,
            stops_overdue: true,
            max_tokens: None,
            spec: spec.into(),
        }
    }

    fn payload() -> Payload {
        let bytes = br#"{"model_ref":"m","prompt":"a prompt that is not copied"}"#;
        Payload { format: PayloadFormat::Native, bytes: bytes.to_vec().into() }
    }

    // CLOUD-1218
    #[test]
    fn all_attempts_share_the_payloads_bytes_with_a_resume_and_a_bound_too() {
        let payload = payload();
        let sent = Resume {
            mode: ResumeMode::Append,
            text: "a".into(),
            reasoning: String::new(),
            token_ids: vec![],
            tokens: 1,
        };
        let plain = AttemptBody::new(&dispatch(spec()), &payload, None);
        let again = AttemptBody::new(&dispatch(spec()), &payload, Some(&sent)).clone();
        for body in [plain, again] {
            assert_eq!(body.pieces()[1].as_ptr(), payload.bytes.as_ptr());
        }
        let bounded = Dispatch { max_tokens: Some(600), ..dispatch(spec()) };
        let bounded = AttemptBody::new(&bounded, &payload, None);
        assert_eq!(bounded.pieces()[1].as_ptr(), payload.bytes[1..].as_ptr());
        assert_eq!(bounded.read().unwrap().task.max_tokens, Some(600));
    }

    #[tokio::test]
    async fn the_length_that_is_announced_is_the_one_that_is_sent() {
        let mut body = AttemptBody::new(&dispatch(spec()), &payload(), None);
        let announced = body.size_hint().exact().unwrap();
        let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
        let left = body.size_hint().exact().unwrap();
        assert_eq!(announced, left + first.len() as u64);
        let rest = body.collect().await.unwrap();
        assert_eq!(rest.to_bytes().len() as u64, left);
    }
}
