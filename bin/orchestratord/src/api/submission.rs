//! What becomes of a client's request: the facts that the core decides by, and the bytes for a node.
//!
//! Both are made here, once. The request itself goes no further.

use daemon_kit::Caller;
use daemon_kit::correlation::RequestIds;
use pool_registry_types::TaskId;
use pool_registry_types::task::{OnDisconnect, Reasoning, TaskRequest};
use sha2::{Digest, Sha256};
use task_stream::{BodyDigest, Payload, PayloadFormat, TaskCaller, TaskSpec};
use uuid::Uuid;

/// The facts of a checked request. Its `task_id` is drawn where it has none.
pub(super) fn facts(request: &mut TaskRequest, caller: &Caller, ids: &RequestIds) -> TaskSpec {
    // Two bodies are the same whether or not they name the task.
    let given = request.task_id.take();
    let digest = digest(request);
    request.task_id = given;
    with_digest(request, digest, caller, ids)
}

/// The facts of a checked request, and what a node needs of it. Mostly both are made of the same bytes,
/// which are written once.
pub(super) fn split(mut request: TaskRequest, caller: &Caller, ids: &RequestIds) -> (TaskSpec, Payload) {
    if !goes_as_it_is(&request) {
        let spec = facts(&mut request, caller, ids);
        return (spec, payload(&for_node(request)));
    }
    let payload = payload(&request);
    let digest = BodyDigest::new(Sha256::digest(&payload.bytes).into());
    (with_digest(&request, digest, caller, ids), payload)
}

fn with_digest(request: &TaskRequest, digest: BodyDigest, caller: &Caller, ids: &RequestIds) -> TaskSpec {
    let task_id = request.task_id.unwrap_or_else(|| TaskId(Uuid::new_v4()));
    let holder = caller.holder.as_deref();
    let shown = holder.map(|who| TaskCaller { name: who.name.clone(), fingerprint: who.fingerprint.clone() });
    let spec = TaskSpec::of(request, task_id, digest, shown, ids.trace());
    TaskSpec { holder: caller.holder_id(), ..spec }
}

/// Whether a node needs all of the request, and the request does not name its task.
fn goes_as_it_is(request: &TaskRequest) -> bool {
    let TaskRequest { task_id, session_id, placement, expected_tokens, reasoning, on_disconnect, .. } =
        request;
    task_id.is_none()
        && session_id.is_none()
        && placement.is_none()
        && expected_tokens.is_none()
        && *reasoning == Reasoning::Keep
        && *on_disconnect == OnDisconnect::Continue
}

/// The request without what a node does not use: an older one would not know it.
fn for_node(request: TaskRequest) -> TaskRequest {
    TaskRequest {
        session_id: None,
        placement: None,
        expected_tokens: None,
        reasoning: Reasoning::Keep,
        on_disconnect: OnDisconnect::Continue,
        ..request
    }
}

/// As the client wrote it and with its defaults.
fn payload(request: &TaskRequest) -> Payload {
    let mut bytes = serde_json::to_vec(request).expect("a task request is always JSON");
    // It may wait for long, and is counted as long as it is.
    bytes.shrink_to_fit();
    Payload { format: PayloadFormat::Native, bytes: bytes.into() }
}

/// Of the request as it was read and is written again, with its defaults: spacing and the order of
/// keys count for nothing. A client's repeated submission is recognized by it.
fn digest(request: &TaskRequest) -> BodyDigest {
    let mut hasher = Sha256::new();
    serde_json::to_writer(&mut hasher, request).expect("a task request is always JSON");
    BodyDigest::new(hasher.finalize().into())
}

#[cfg(test)]
mod tests {
    use pool_registry_types::task::{InferRequest, Recovery, Resume, ResumeMode};
    use pool_registry_types::{ModelRef, ReplicaId, SessionId};
    use task_scheduler::Dispatch;

    use super::*;
    use crate::services::attempt_body::{AttemptBody, tests::dispatch};

    fn read(body: &str) -> TaskRequest {
        serde_json::from_str(body).unwrap()
    }

    fn ids() -> RequestIds {
        RequestIds {
            correlation_id: "c-1".into(),
            traceparent: "00-1-2-01".into(),
            tracestate: String::new(),
        }
    }

    fn spec(mut request: TaskRequest) -> TaskSpec {
        facts(&mut request, &Caller::default(), &ids())
    }

    // CLOUD-1202
    /// The form that the digest is taken of must stay: tasks are recognized by it across versions.
    #[test]
    fn bodies_are_the_same_by_their_sha256_however_they_are_spaced_ordered_and_completed() {
        let plain = r#"{"model_ref":"m","prompt":"hi","temperature":0.1}"#;
        let same = [
            plain,
            "{ \"temperature\": 1e-1,\n\"prompt\": \"\\u0068i\", \"model_ref\": \"m\" }",
            r#"{"model_ref":"m","prompt":"hi","temperature":0.1,"priority":"interactive","stop":[]}"#,
            r#"{"model_ref":"m","prompt":"hi","temperature":0.1,"task_id":"7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11"}"#,
        ];
        for body in same {
            assert_eq!(
                spec(read(body)).digest.to_string(),
                "e12422685ba5c816c94ef07b7401f5bb9af93ec401186532ee5020ff61dff2fe",
                "{body}"
            );
        }
        let others = [
            r#"{"model_ref":"m","prompt":"hi"}"#,
            r#"{"model_ref":"m","prompt":"hi","temperature":0.1,"session_id":"7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11"}"#,
            r#"{"model_ref":"m","prompt":"hi ","temperature":0.1}"#,
        ];
        for body in others {
            assert_ne!(spec(read(body)).digest, spec(read(plain)).digest, "{body}");
        }
    }

    // CLOUD-1146
    #[test]
    fn a_task_has_the_trace_and_the_name_of_who_submitted_it_and_its_own_id_or_a_new_one() {
        let mut request = TaskRequest::completion(ModelRef::new("m").unwrap(), "hi");
        let (first, second) = (spec(request.clone()), spec(request.clone()));
        assert_ne!(first.task_id, second.task_id);
        assert_eq!((first.trace.correlation_id.as_str(), first.caller), ("c-1", None));
        assert_eq!(first.trace.traceparent, "00-1-2-01");
        let own = TaskId(Uuid::from_u128(5));
        request.task_id = Some(own);
        assert_eq!(facts(&mut request, &Caller::default(), &ids()).task_id, own);
        assert_eq!(request.task_id, Some(own), "the request is as it was");
    }

    // CLOUD-1202
    #[test]
    fn a_request_is_split_alike_whether_or_not_a_node_needs_all_of_it() {
        let plain = TaskRequest::completion(ModelRef::new("m").unwrap(), "hi");
        let others = [
            TaskRequest { task_id: Some(TaskId(Uuid::from_u128(5))), ..plain.clone() },
            TaskRequest { session_id: Some(SessionId(Uuid::from_u128(9))), ..plain.clone() },
            TaskRequest {
                placement: Some(serde_json::from_str(r#"{"prefer_pools":["a/p"]}"#).unwrap()),
                ..plain.clone()
            },
            TaskRequest { expected_tokens: Some(3), ..plain.clone() },
            TaskRequest { reasoning: Reasoning::Drop, ..plain.clone() },
            TaskRequest { on_disconnect: OnDisconnect::Cancel, ..plain.clone() },
            plain,
        ];
        for request in others {
            let (split_spec, split_payload) = split(request.clone(), &Caller::default(), &ids());
            let facts = spec(request.clone());
            assert_eq!(TaskSpec { task_id: facts.task_id, ..split_spec }, facts, "{request:?}");
            assert_eq!(split_payload, payload(&for_node(request.clone())), "{request:?}");
        }
    }

    /// What went over the wire before there were payloads.
    fn in_one_piece(dispatch: &Dispatch, task: &TaskRequest, resume: Option<Resume>) -> InferRequest {
        InferRequest {
            task_id: dispatch.task,
            attempt_id: dispatch.attempt,
            node_id: dispatch.pool.node_id.clone(),
            boot_id: dispatch.boot_id,
            log_id: dispatch.log,
            first_index: dispatch.first_index,
            replica_hint: dispatch.warm_replica.clone(),
            resume,
            thoughts: task.reasoning == Reasoning::Keep,
            task: TaskRequest {
                session_id: None,
                placement: None,
                expected_tokens: None,
                reasoning: Reasoning::Keep,
                on_disconnect: OnDisconnect::Continue,
                max_tokens: task.max_tokens.or(dispatch.max_tokens),
                ..task.clone()
            },
        }
    }

    // CLOUD-1218
    #[test]
    fn a_node_reads_the_composed_body_as_one_message_with_the_whole_task() {
        let plain = TaskRequest::completion(ModelRef::new("m").unwrap(), "\"a\u{1f600}\" \\ }\n");
        let rich = TaskRequest {
            task_id: Some(TaskId(Uuid::from_u128(5))),
            session_id: Some(SessionId(Uuid::from_u128(9))),
            placement: Some(serde_json::from_str(r#"{"prefer_pools":["a/p"]}"#).unwrap()),
            temperature: Some(0.1),
            expected_tokens: Some(3),
            max_tokens: Some(7),
            recovery: Recovery::Continue,
            reasoning: Reasoning::Drop,
            on_disconnect: OnDisconnect::Cancel,
            stop: vec!["x".into()],
            ..plain.clone()
        };
        let sent = Resume {
            mode: ResumeMode::Append,
            text: "\"so\" far\n".into(),
            reasoning: "well".into(),
            token_ids: vec![1, 2],
            tokens: 2,
        };
        let hint = ReplicaId::new("r0").unwrap();
        let cases = [(None, None, None), (Some(sent.clone()), None, Some(9)), (Some(sent), Some(hint), None)];
        for task in [plain, rich] {
            for (resume, warm_replica, bound) in cases.clone() {
                // The core sets one only where the client did not.
                let max_tokens = bound.filter(|_| task.max_tokens.is_none());
                let dispatch = Dispatch { warm_replica, max_tokens, ..dispatch(spec(task.clone())) };
                let (_, payload) = split(task.clone(), &Caller::default(), &ids());
                let body = AttemptBody::new(&dispatch, &payload, resume.as_ref());
                assert_eq!(body.read().unwrap(), in_one_piece(&dispatch, &task, resume));
            }
        }
    }
}
