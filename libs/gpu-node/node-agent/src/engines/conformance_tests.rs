//! One table for all dialects: what engines write, and what that says.
//!
//! The streams have the shapes that the engines' servers write, with their own line ends, empty
//! pieces and odd fields. Each is read in pieces of several lengths, because a network splits
//! where it likes.

use pool_registry_types::error::EndCause;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::sse::Decoder;
use pool_registry_types::task::{ChatMessage, FinishReason, Role, TaskRequest, Workload};
use pool_registry_types::{ErrorCode, ModelRef};
use serde_json::json;

use super::answer::{EngineEvent, Reader, Reply};
use super::thoughts::Delta;
use super::{documents, llamacpp, openai, refusal, request, tgi, triton};

/// What a whole stream says, and how it is taken when it then ends in order.
#[derive(Debug, PartialEq)]
struct Heard {
    reported: Vec<EngineEvent>,
    closed: Option<EngineEvent>,
}

fn hear(reply: &'static Reply, bound: Option<u64>, stream: &str, piece: usize) -> Heard {
    let (mut decoder, mut reader) = (Decoder::lossy(), Reader::new(reply, false).bounded_by(bound));
    let mut reported = Vec::new();
    for piece in stream.as_bytes().chunks(piece) {
        decoder.push(piece);
        while let Some(frame) = decoder.next_frame().unwrap() {
            reported.push(reader.read(&frame));
        }
    }
    assert!(!decoder.has_partial_frame(), "{stream}");
    reported.retain(|reported| {
        *reported != EngineEvent::Nothing && *reported != EngineEvent::Delta(Delta::default())
    });
    Heard { reported, closed: reader.closed() }
}

fn text(text: &str) -> EngineEvent {
    EngineEvent::Delta(Delta::text(text))
}

fn end(last: Option<&str>, tokens_out: u64, finish_reason: FinishReason) -> EngineEvent {
    EngineEvent::End { delta: Delta::text(last.unwrap_or_default()), tokens_out, finish_reason }
}

/// The answers " a b" of each dialect: cut at the bound, and ended by the model.
fn answers() -> Vec<(&'static str, &'static Reply, &'static str, Vec<EngineEvent>)> {
    use FinishReason::{Length, Stop};
    vec![
        (
            "llama.cpp, cut",
            &llamacpp::COMPLETION,
            concat!(
                "data: {\"index\":0,\"content\":\" a\",\"tokens\":[5],\"stop\":false,\"tokens_predicted\":1}\n\n",
                "data: {\"content\":\" b\",\"stop\":false}\n\n",
                "data: {\"content\":\"\",\"stop\":true,\"stop_type\":\"limit\",\"tokens_predicted\":2}\n\n",
            ),
            vec![text(" a"), text(" b"), end(None, 2, Length)],
        ),
        (
            "vLLM, a prompt, cut",
            &openai::COMPLETION,
            concat!(
                "data: {\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"choices\":[{\"index\":0,\"text\":\" a\",\"logprobs\":null,\"finish_reason\":null,\"stop_reason\":null}],\"usage\":null}\n\n",
                "data: {\"id\":\"cmpl-1\",\"choices\":[{\"index\":0,\"text\":\" b\",\"finish_reason\":\"length\"}],\"usage\":null}\n\n",
                "data: {\"id\":\"cmpl-1\",\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"total_tokens\":5,\"completion_tokens\":2}}\n\n",
                "data: [DONE]\n\n",
            ),
            vec![text(" a"), text(" b"), end(None, 2, Length)],
        ),
        (
            "vLLM, messages, ended",
            &openai::CHAT,
            concat!(
                "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n",
                "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\" a b\"},\"finish_reason\":null}]}\n\n",
                "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"\"},\"finish_reason\":\"stop\",\"stop_reason\":null}]}\n\n",
                "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":3,\"total_tokens\":12}}\n\n",
                "data: [DONE]\n\n",
            ),
            vec![text(" a b"), end(None, 3, Stop)],
        ),
        (
            "TGI, a prompt, cut",
            &tgi::GENERATE,
            concat!(
                "data:{\"index\":1,\"token\":{\"id\":5,\"text\":\" a\",\"logprob\":-0.5,\"special\":false},\"generated_text\":null,\"details\":null}\n\n",
                ":\n\n",
                "data:{\"index\":2,\"token\":{\"id\":6,\"text\":\" b\",\"logprob\":-0.5,\"special\":false},\"generated_text\":\" a b\",\"details\":{\"finish_reason\":\"length\",\"generated_tokens\":2,\"seed\":null,\"input_length\":3}}\n\n",
            ),
            vec![text(" a"), end(Some(" b"), 2, Length)],
        ),
        (
            "TGI, a prompt, ended by a delimiter that is no part of the answer",
            &tgi::GENERATE,
            concat!(
                "data: {\"index\":1,\"token\":{\"id\":5,\"text\":\" a\",\"logprob\":-0.5,\"special\":false},\"generated_text\":null,\"details\":null}\r\n\r\n",
                "data: {\"index\":2,\"token\":{\"id\":2,\"text\":\"</s>\",\"logprob\":-0.1,\"special\":true},\"generated_text\":\" a\",\"details\":{\"finish_reason\":\"eos_token\",\"generated_tokens\":2,\"seed\":7}}\r\n\r\n",
            ),
            vec![text(" a"), end(None, 2, Stop)],
        ),
        (
            "TGI, messages, ended",
            &openai::CHAT,
            concat!(
                "data: {\"object\":\"chat.completion.chunk\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\" a\"},\"logprobs\":null,\"finish_reason\":null}],\"usage\":null}\n\n",
                "data: {\"object\":\"chat.completion.chunk\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":null}\n\n",
                "data: [DONE]\n\n",
            ),
            vec![text(" a"), end(None, 1, Stop)],
        ),
    ]
}

// CLOUD-1516
// CLOUD-1518
#[test]
fn each_dialect_is_read_wherever_the_network_splits_it() {
    for (name, reply, stream, reported) in answers() {
        for piece in [1, 2, 7, 64, stream.len()] {
            let heard = hear(reply, Some(2), stream, piece);
            assert_eq!(heard.reported, reported, "{name}, by {piece}");
        }
    }
}

// CLOUD-2483
#[test]
fn a_stream_of_triton_is_whole_when_its_message_is() {
    let stream = concat!(
        "data: {\"model_name\":\"m\",\"model_version\":\"1\",\"sequence_end\":false,\"sequence_id\":0,\"sequence_start\":false,\"text_output\":\" a\"}\n\n",
        "data: {\"model_name\":\"m\",\"text_output\":[\" b\"]}\n\n",
        "data: {\"model_name\":\"m\",\"text_output\":\"\"}\n\n",
    );
    for (bound, reason) in
        [(Some(2), FinishReason::Length), (Some(9), FinishReason::Stop), (None, FinishReason::Stop)]
    {
        for piece in [1, 7, stream.len()] {
            let heard = hear(&triton::GENERATE, bound, stream, piece);
            let closed = Some(end(None, 2, reason));
            assert_eq!(heard, Heard { reported: vec![text(" a"), text(" b")], closed });
        }
    }
}

// CLOUD-1516
#[test]
fn no_other_stream_is_whole_without_its_marker_and_none_without_an_event() {
    for (name, reply, stream, _) in answers() {
        let stream = stream.replace("\r\n", "\n");
        let first = stream.split_inclusive("\n\n").next().unwrap();
        let heard = hear(reply, Some(1), first, 16);
        assert_eq!(heard.closed, None, "{name}");
        assert!(
            heard.reported.iter().all(|reported| matches!(reported, EngineEvent::Delta(_))),
            "{name}: {heard:?}"
        );
    }
    for reply in [&llamacpp::COMPLETION, &openai::CHAT, &tgi::GENERATE, &triton::GENERATE] {
        assert_eq!(hear(reply, Some(1), ": ka\n\n", 3).closed, None, "{reply:?}");
    }
}

// CLOUD-2484
#[test]
fn an_error_in_a_stream_is_a_refusal_where_it_says_so_and_else_a_failure() {
    let refusals = [
        (
            &tgi::GENERATE,
            r#"{"error":"Input validation error: `inputs` must have less than 4096 tokens. Given: 9000","error_type":"validation"}"#,
            ErrorCode::ContextTooLong,
        ),
        (
            &tgi::GENERATE,
            r#"{"error":"Input validation error: `temperature` must be strictly positive","error_type":"validation"}"#,
            ErrorCode::InvalidParams,
        ),
        (
            &tgi::GENERATE,
            r#"{"error":"Model is overloaded","error_type":"overloaded"}"#,
            ErrorCode::ReplicaExhausted,
        ),
        (
            &openai::CHAT,
            r#"{"error":{"message":"Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 9000 `inputs` tokens and 8 `max_new_tokens`","http_status_code":422}}"#,
            ErrorCode::ContextTooLong,
        ),
        (
            &openai::COMPLETION,
            r#"{"error":{"message":"bad grammar","type":"BadRequestError","param":null,"code":400}}"#,
            ErrorCode::InvalidParams,
        ),
    ];
    for (reply, data, code) in refusals {
        match &hear(reply, None, &format!("data: {data}\n\n"), 32).reported[..] {
            [EngineEvent::Refused(refusal)] => assert_eq!(refusal.error.code, code, "{data}"),
            other => panic!("{data}: {other:?}"),
        }
    }
    let failures = [
        (
            &tgi::GENERATE,
            r#"{"error":"Request failed during generation: CUDA error","error_type":"generation"}"#,
        ),
        (&triton::GENERATE, r#"{"error":"Executor failed"}"#),
        (&openai::CHAT, r#"{"error":{"message":"EngineCore died","type":"InternalServerError","code":500}}"#),
        (&llamacpp::COMPLETION, r#"{"error":{"code":500,"message":"out of memory","type":"server_error"}}"#),
        (&tgi::GENERATE, "{"),
        (&triton::GENERATE, "null"),
        (&openai::COMPLETION, "[DONE]"),
    ];
    for (reply, data) in failures {
        let heard = hear(reply, None, &format!("data: {data}\n\n"), 32);
        assert!(matches!(heard.reported[..], [EngineEvent::Failed(_)]), "{data}: {heard:?}");
    }
}

// CLOUD-2484
#[test]
fn a_refused_request_is_the_clients_or_the_engines_fault() {
    let long = "This model's maximum context length is 4096 tokens. However, you requested 9000 tokens";
    let cases = [
        (
            400,
            json!({"error": {"message": long, "type": "BadRequestError", "code": 400}}),
            ErrorCode::ContextTooLong,
        ),
        (400, json!({"object": "error", "message": long, "code": 400}), ErrorCode::ContextTooLong),
        (
            422,
            json!({"error": "`top_p` must be > 0.0 and < 1.0", "error_type": "validation"}),
            ErrorCode::InvalidParams,
        ),
        (424, json!({"error": "Request failed", "error_type": "generation"}), ErrorCode::WorkerReset),
        (
            429,
            json!({"error": "Model is overloaded", "error_type": "overloaded"}),
            ErrorCode::ReplicaExhausted,
        ),
        (
            400,
            json!({"error": "Prompt length (9000) exceeds maximum input length (4096)"}),
            ErrorCode::ContextTooLong,
        ),
        (
            501,
            json!({"error": {"code": 501, "message": "no --reranking", "type": "not_supported_error"}}),
            ErrorCode::Unsupported,
        ),
        (404, json!({"detail": "Not Found"}), ErrorCode::Unsupported),
        (503, json!({"error": {"message": "Loading model"}}), ErrorCode::PoolUnready),
        (500, json!(null), ErrorCode::WorkerReset),
    ];
    for (status, answer, code) in cases {
        let error = refusal::refusal(status, &answer.to_string()).error;
        assert_eq!(error.code, code, "{status} {answer}");
        let final_for_the_client = error.cause == Some(EndCause::Engine4xx);
        let clients =
            matches!(code, ErrorCode::ContextTooLong | ErrorCode::InvalidParams | ErrorCode::Unsupported);
        assert_eq!(final_for_the_client, clients, "{status} {answer}");
    }
}

/// Where each kind of engine is asked for each kind of work; nothing where it is not.
const PATHS: [(EngineKind, [Option<&str>; 4]); 5] = [
    (
        EngineKind::LlamaCpp,
        [Some("/completion"), Some("/v1/chat/completions"), Some("/v1/embeddings"), Some("/v1/rerank")],
    ),
    (
        EngineKind::Vllm,
        [Some("/v1/completions"), Some("/v1/chat/completions"), Some("/v1/embeddings"), Some("/v1/rerank")],
    ),
    (EngineKind::Tgi, [Some("/generate_stream"), Some("/v1/chat/completions"), None, None]),
    (EngineKind::Triton, [Some("/v2/models/m/generate_stream"), None, None, None]),
    (
        EngineKind::OpenAi,
        [Some("/v1/completions"), Some("/v1/chat/completions"), Some("/v1/embeddings"), Some("/v1/rerank")],
    ),
];

// CLOUD-2480
#[test]
fn each_engine_is_asked_at_its_own_place_and_for_nothing_that_it_lacks() {
    use pool_registry_types::task::{Inputs, RerankInputs};
    let prompt = TaskRequest::completion(ModelRef::new("m").unwrap(), "hi");
    let message = ChatMessage { role: Role::User, content: "hi".into() };
    let bare = TaskRequest { prompt: None, ..prompt.clone() };
    let rerank = RerankInputs { query: "q".into(), documents: vec!["a".into()] };
    let tasks = [
        prompt,
        TaskRequest { messages: Some(vec![message]), ..bare.clone() },
        TaskRequest {
            workload: Workload::Embedding,
            inputs: Some(Inputs::Embedding(vec!["a".into()])),
            ..bare.clone()
        },
        TaskRequest { workload: Workload::Rerank, inputs: Some(Inputs::Rerank(rerank)), ..bare },
    ];
    for (engine, paths) in PATHS {
        for (task, path) in tasks.iter().zip(paths) {
            assert_eq!(task.lacks(engine).is_none(), path.is_some(), "{engine}: {task:?}");
            match (request(engine, task, "m", Some(64), None), path) {
                (Ok(request), Some(path)) => {
                    assert_eq!(request.path, path, "{engine}");
                    assert_eq!(request.reply.is_document, task.inputs.is_some(), "{engine}");
                    let document = [&documents::EMBEDDING, &documents::RERANK].contains(&request.reply);
                    assert_eq!(document, task.inputs.is_some(), "{engine}");
                }
                (Err(error), None) => assert_eq!(error.code, ErrorCode::Unsupported, "{engine}"),
                (answer, path) => panic!("{engine}: {answer:?} for {path:?}"),
            }
        }
    }
}
