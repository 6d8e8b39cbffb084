//! What an engine's refusal means, and whose it is.
//!
//! A request that is wrong is its client's. A key or a model that the engine does not know is its
//! operator's: the client can do nothing about it, and another pool may well have it. A route that
//! is not there is something that this engine cannot do. Everything else is the engine's own.

use std::borrow::Cow;
use std::time::Duration;

use pool_registry_types::error::EndCause;
use pool_registry_types::{ErrorBody, ErrorCode};

use super::client::{Answer, MAX_ERROR_BYTES};
use super::json::Json;

/// Longest wait for what an engine says of its refusal.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(3);
/// Characters of what an engine wrote that are shown.
const SHOWN: usize = 500;

/// Whose a refusal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whose {
    /// Final: every engine would say so.
    Client,
    /// The engine failed.
    Engine,
    /// It is busy, or not there yet.
    Busy,
    /// It does not let us in, or does not have what its operator said that it has.
    Operator,
    /// It was not built or started for this.
    Missing,
    /// Nobody's: another engine may take it.
    Nobody,
}

/// A refusal as the control plane hears of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Refusal {
    pub whose: Whose,
    pub error: ErrorBody,
}

/// What engines say of a prompt that does not fit, in lower case: fragments that follow each other.
/// The wordings are those that the engines' own sources have today and had before.
const TOO_LONG: [(&str, &[&str]); 29] = [
    ("llama.cpp", &["exceeds the available context size"]),
    ("llama.cpp", &["larger than the max context size"]),
    ("llama.cpp", &["input prompt is too big compared to kv size"]),
    // The physical batch, for what cannot be split.
    ("llama.cpp", &["input", "is too large to process"]),
    ("vLLM", &["maximum context length is"]),
    ("vLLM", &["maximum embedding input length is"]),
    ("vLLM", &["prompt (", "longer than the maximum model length of"]),
    ("vLLM", &["is too long to fit into the model"]),
    ("vLLM", &["exceeds model's maximum context length"]),
    ("vLLM", &["prompt length", "exceeds the max_model_len"]),
    ("vLLM", &["length (", "exceeds max_model_len"]),
    // What is left for the answer when the prompt is taken off.
    ("vLLM", &["max_tokens must be at least 1, got -"]),
    ("SGLang", &["is longer than the model's context length"]),
    ("SGLang", &["exceeds the model's maximum context length"]),
    ("SGLang", &["input length (", "exceeds the maximum allowed length"]),
    ("SGLang", &["prompt is too long after expanding"]),
    ("SGLang", &["does not fit the context length of"]),
    ("TGI", &["`inputs` tokens + `max_new_tokens` must be"]),
    ("TGI", &["`inputs` must have less than"]),
    ("TensorRT-LLM", &["prompt length (", "should not exceed max_"]),
    ("TensorRT-LLM", &["prompt length (", "exceeds maximum input length"]),
    ("TensorRT-LLM", &["prompt length (", "exceeds maximum sequence length"]),
    ("TensorRT-LLM", &["encoder length (", "exceeds maximum encoder input length"]),
    ("TensorRT-LLM", &["length (", "is greater than `max_seq_len`"]),
    ("TensorRT-LLM", &["`default_max_tokens` (-"]),
    ("Ollama", &["input length exceeds the context length"]),
    ("LM Studio", &["tokens to keep from the initial prompt is greater than the context length"]),
    ("TabbyAPI", &["prompt length", "greater than", "max_seq_len"]),
    ("TabbyAPI", &["context length", "greater than max_seq_len"]),
];

/// What engines say of a model or an adapter that they do not have.
const NO_SUCH_MODEL: [&[&str]; 12] = [
    &["model", "does not exist"],
    &["model", "not found"],
    &["model", "is not loaded"],
    &["model name", "is missing"],
    &["model name", "is not running"],
    &["unknown model"],
    &["invalid model name"],
    &["no such model"],
    &["adapter", "not loaded"],
    &["adapter", "has never been loaded"],
    &["adapter", "not found"],
    &["adapter", "cannot be found"],
];

/// What llama.cpp's server says of what it was not started for, and the flag that it is started with for it.
const STARTED_WITHOUT: [(&[&str], &str); 2] = [
    (&["server does not support embeddings"], "--embeddings"),
    (&["server does not support reranking"], "--reranking"),
];

/// The code of OpenAI's API for it.
const NO_MODEL: &str = "model_not_found";

/// Characters within which a refusal says that there is no such model.
const NAMES_IT_WITHIN: usize = 240;

/// Whether the fragments stand in the text, one after the other.
fn has(text: &str, fragments: &[&str]) -> bool {
    let mut rest = text;
    fragments.iter().all(|fragment| match rest.find(fragment) {
        Some(at) => {
            rest = &rest[at + fragment.len()..];
            true
        }
        None => false,
    })
}

fn message_of(answer: Json<'_>) -> Option<String> {
    let error = answer.get("error");
    let places =
        [error.get("message"), error, answer.get("message"), answer.get("detail"), answer.get("details")];
    places.into_iter().find_map(Json::word).map(Cow::into_owned)
}

/// An engine's refusal as ours.
pub(crate) async fn refused(answer: Answer) -> Refusal {
    let status = answer.status();
    let body = answer.beginning(MAX_ERROR_BYTES, REFUSAL_TIMEOUT).await;
    refusal(status, &String::from_utf8_lossy(&body))
}

/// An engine's refusal: its status, and its body as far as it was read.
pub(crate) fn refusal(status: u16, body: &str) -> Refusal {
    match Json::object(body) {
        Some(answer) => classify_answer(status, answer),
        None => by_status(status, body.trim(), Named::default()),
    }
}

/// What a refusal says beside its message.
#[derive(Debug, Clone, Copy, Default)]
struct Named {
    context: bool,
    model: bool,
}

fn classify_answer(status: u16, answer: Json<'_>) -> Refusal {
    let error = if answer.get("error").is_object() { answer.get("error") } else { answer };
    let is = |field: &str, values: &[&str]| {
        error.get(field).text().is_some_and(|text| values.contains(&text.as_ref()))
    };
    let named = Named {
        context: is("type", &["exceed_context_size_error"])
            || is("code", &["context_length_exceeded"])
            || is("param", &["input_tokens", "input_text"]),
        model: is("code", &[NO_MODEL]) || (is("param", &["model"]) && status == 404),
    };
    by_status(status, &message_of(answer).unwrap_or_default(), named)
}

fn by_status(status: u16, message: &str, named: Named) -> Refusal {
    let words = message.to_lowercase();
    let too_long = named.context || TOO_LONG.iter().any(|(_, fragments)| has(&words, fragments));
    // Further behind they may be the client's own words, which some repeat.
    let begins: String = words.chars().take(NAMES_IT_WITHIN).collect();
    let no_model = named.model || NO_SUCH_MODEL.iter().any(|fragments| has(&begins, fragments));
    let (whose, code, cause) = match status {
        503 => (Whose::Busy, ErrorCode::PoolUnready, None),
        429 => (Whose::Busy, ErrorCode::ReplicaExhausted, None),
        401 | 402 | 403 | 407 => (Whose::Operator, ErrorCode::WorkerReset, Some(EndCause::EngineDenied)),
        408 | 409 | 421 | 425 => (Whose::Nobody, ErrorCode::WorkerReset, None),
        // TGI's word for a failure of its own.
        424 => (Whose::Engine, ErrorCode::WorkerReset, Some(EndCause::Engine5xx)),
        400 | 404 | 422 if no_model => {
            (Whose::Operator, ErrorCode::WorkerReset, Some(EndCause::EngineDenied))
        }
        404 | 405 | 501 => (Whose::Missing, ErrorCode::Unsupported, Some(EndCause::Engine4xx)),
        // Some say so with the status of a failure.
        400..=500 if too_long => (Whose::Client, ErrorCode::ContextTooLong, Some(EndCause::Engine4xx)),
        413 => (Whose::Client, ErrorCode::PayloadTooLarge, Some(EndCause::Engine4xx)),
        400..=499 => (Whose::Client, ErrorCode::InvalidParams, Some(EndCause::Engine4xx)),
        _ => (Whose::Engine, ErrorCode::WorkerReset, Some(EndCause::Engine5xx)),
    };
    let message = if message.is_empty() { "no message".into() } else { shown(message) };
    let remedy = match STARTED_WITHOUT.iter().find(|(fragments, _)| has(&words, fragments)) {
        Some((_, flag)) if whose == Whose::Missing => format!("; its pool needs flags = [\"{flag}\"]"),
        _ => String::new(),
    };
    let mut error = ErrorBody::new(code, format!("the engine answered {status}: {message}{remedy}"));
    error.cause = cause;
    Refusal { whose, error }
}

/// As much of an engine's words as is shown.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(SHOWN).collect()
}

/// The words of an error event, as they are shown.
pub(super) fn reported(event: Json<'_>) -> String {
    message_of(event).map_or_else(|| "an error without a message".to_owned(), |text| shown(&text))
}

/// The refusal that an error event is, where a status says so, beside it or in it. Any other is a
/// failure.
pub(super) fn in_stream(event: Json<'_>) -> Option<Refusal> {
    let error = event.get("error");
    let by_type = match event.get("error_type").text().as_deref() {
        Some("validation" | "template_error" | "tool_error") => Some(422),
        Some("overloaded") => Some(429),
        _ => None,
    };
    let by_code = [
        error,
        error.get("http_status_code"),
        error.get("code"),
        error.get("status_code"),
        event.get("code"),
        event.get("status_code"),
    ];
    let by_code = by_code.into_iter().find_map(|code| u16::try_from(code.count()?).ok());
    // Without a status its words decide.
    let refused = match by_type.or(by_code) {
        Some(status) => classify_answer(status, event),
        None => {
            // Words of a model that is not there may be about anything else that is not found.
            let no_model = [error, event].iter().any(|it| it.get("code").text().as_deref() == Some(NO_MODEL));
            let mut refused = classify_answer(if no_model { 404 } else { 500 }, event);
            if refused.whose == Whose::Engine {
                return None;
            }
            refused.error.message = format!("the engine answered: {}", reported(event));
            refused
        }
    };
    (refused.whose != Whose::Engine).then_some(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whose(status: u16, body: &str) -> (Whose, ErrorCode) {
        let refusal = refusal(status, body);
        (refusal.whose, refusal.error.code)
    }

    // CLOUD-2494
    #[test]
    fn a_context_that_is_too_long_is_known_by_the_words_of_each_engine() {
        let reported = [
            (
                400,
                "request (9000 tokens) exceeds the available context size (8192 tokens), try increasing it",
            ),
            (
                400,
                "the request exceeds the available context size. try increasing the context size or enable context shift",
            ),
            (500, "Input prompt is too big compared to KV size. Please try increasing KV size."),
            (400, "input (9000 tokens) is larger than the max context size (8192 tokens). skipping"),
            (500, "input is larger than the max context size. skipping"),
            (
                500,
                "input (900 tokens) is too large to process. increase the physical batch size (current batch size: 512)",
            ),
            (500, "input is too large to process. increase the physical batch size"),
            (
                400,
                "This model's maximum context length is 8192 tokens. However, your prompt contains at least 9000 input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input prompt.",
            ),
            (
                400,
                "This model's maximum context length is 8192 tokens. However, you requested 9016 tokens (9000 in the messages, 16 in the completion). Please reduce the length of the messages or completion.",
            ),
            (
                400,
                "'max_tokens' or 'max_completion_tokens' is too large: 9000. This model's maximum context length is 8192 tokens and your request has 12 input tokens (9000 > 8192 - 12).",
            ),
            (
                400,
                "this model's maximum context length is 8192 tokens, but the prompt contains 9000 input tokens",
            ),
            (
                400,
                "The decoder prompt (length 9000) is longer than the maximum model length of 8192. Make sure that `max_model_len` is no smaller than the number of text tokens.",
            ),
            (
                400,
                "The decoder prompt (length 8192) plus the number of requested output tokens (at least 1) is longer than the maximum model length of 8192.",
            ),
            (
                400,
                "The prompt (total length 9000) is too long to fit into the model (context length 8192). Make sure that",
            ),
            (400, "Input length (9000) exceeds model's maximum context length (8192)."),
            (400, "The engine prompt length 9000 exceeds the max_model_len 8192. Please reduce prompt."),
            (400, "prompt_token_ids length (9000) exceeds max_model_len (8192)."),
            (
                400,
                "This model's maximum embedding input length is 512 tokens. However, you requested 600 tokens in the input for embedding generation.",
            ),
            (400, "max_tokens must be at least 1, got -808."),
            (400, "The input (9000 tokens) is longer than the model's context length (8192 tokens)."),
            (
                400,
                "Requested token count exceeds the model's maximum context length of 8192 tokens. You requested a total of 9016 tokens",
            ),
            (
                400,
                "Input length (9000 tokens) exceeds the maximum allowed length (8186 tokens). Use a shorter input or enable --allow-auto-truncate.",
            ),
            (400, "Multimodal prompt is too long after expanding multimodal tokens."),
            (400, "the prompt has 9000 tokens, which does not fit the context length of 8192 tokens"),
            (
                422,
                "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8192. Given: 9000 `inputs` tokens and 16 `max_new_tokens`",
            ),
            (422, "Input validation error: `inputs` must have less than 4096 tokens. Given: 9000"),
            (
                400,
                "The sum of prompt length (9000.0), query length (0) should not exceed max_num_tokens (8192)",
            ),
            (
                400,
                "The sum of prompt length (9000) and query length (0) max_tokens (16) should not exceed max_seq_len (8192)",
            ),
            (
                500,
                "Encountered an error when fetching new request: Prompt length (9000) exceeds maximum input length (8192). Set log level to info",
            ),
            (400, "Cannot process new request: Prompt length (9000) exceeds maximum sequence length (8192)"),
            (400, "Encoder length (9000) exceeds maximum encoder input length (512)."),
            (400, "`prompt_token_ids` length (9000) is greater than `max_seq_len` (8192)"),
            (
                400,
                "`default_max_tokens` (-808) must be greater than 0, `default_max_tokens` (-808) = max_seq_len (8192) - `splited_prompt_len` (9000)",
            ),
            (400, "the input length exceeds the context length"),
            (400, "Prompt length 9000 is greater than max_seq_len 8192"),
        ];
        for (status, text) in reported {
            let nested = serde_json::json!({"error": {"message": text, "code": status}}).to_string();
            let flat = serde_json::json!({"object": "error", "message": text, "code": status}).to_string();
            let plain = serde_json::json!({"error": text}).to_string();
            for body in [nested, flat, plain, text.to_owned()] {
                assert_eq!(whose(status, &body), (Whose::Client, ErrorCode::ContextTooLong), "{body}");
            }
        }
        for body in [
            r#"{"error":{"type":"exceed_context_size_error","message":"?","code":400}}"#,
            r#"{"error":{"code":"context_length_exceeded","message":"?"}}"#,
            r#"{"error":{"param":"input_tokens","message":"too much"}}"#,
        ] {
            assert_eq!(whose(400, body), (Whose::Client, ErrorCode::ContextTooLong), "{body}");
        }
    }

    // CLOUD-2494
    #[test]
    fn words_that_only_sound_like_it_are_taken_for_what_they_are() {
        let client = (Whose::Client, ErrorCode::InvalidParams);
        for (status, text, expected) in [
            (400, "max_tokens must be at least 1, got 0.", client),
            (
                400,
                "max_tokens=9000 cannot be greater than max_total_tokens=8192. Please request fewer output tokens.",
                client,
            ),
            (422, "Input validation error: `max_new_tokens` must be <= 8192. Given: 9000", client),
            (
                422,
                "Input validation error: `truncate` must be strictly positive and less than 8192. Given: 0",
                client,
            ),
            (400, "instances array exceeds maximum size of 4", client),
            (413, "maximum allowed size of 25 MB", (Whose::Client, ErrorCode::PayloadTooLarge)),
            (
                429,
                "this request exceeds the model's maximum context length of tokens per minute",
                (Whose::Busy, ErrorCode::ReplicaExhausted),
            ),
            (500, "Context size has been exceeded.", (Whose::Engine, ErrorCode::WorkerReset)),
            (503, "The request queue is full.", (Whose::Busy, ErrorCode::PoolUnready)),
        ] {
            let body = serde_json::json!({"error": {"message": text}}).to_string();
            assert_eq!(whose(status, &body), expected, "{text}");
        }
    }

    // CLOUD-2492
    #[test]
    fn a_key_or_a_model_that_the_engine_does_not_know_is_the_operators() {
        for (status, body) in [
            (401, r#"{"error":"Unauthorized"}"#),
            (401, ""),
            (403, r#"{"error":{"message":"this feature is disabled","type":"feature_disabled"}}"#),
            (
                404,
                r#"{"error":{"message":"The model `x` does not exist.","type":"NotFoundError","param":"model","code":404}}"#,
            ),
            (
                404,
                r#"{"object":"error","message":"The model `x` does not exist.","type":"NotFoundError","code":404}"#,
            ),
            (404, r#"{"error":{"message":"?","code":"model_not_found"}}"#),
            (400, r#"{"error":{"message":"model 'x' not found","type":"invalid_request_error"}}"#),
            (400, r#"{"error":{"message":"model name is missing from the request"}}"#),
            (400, r#"{"error":"Request for unknown model: 'x' is not found"}"#),
            (400, r#"{"error":"The following requested LoRA adapters are not loaded: x"}"#),
            (400, r#"{"error":{"message":"/chat/completions: Invalid model name passed in model=x."}}"#),
            (404, r#"{"error":"model \"x\" not found, try pulling it first"}"#),
        ] {
            let refusal = refusal(status, body);
            let seen = (refusal.whose, refusal.error.code, refusal.error.cause);
            assert_eq!(
                seen,
                (Whose::Operator, ErrorCode::WorkerReset, Some(EndCause::EngineDenied)),
                "{body}"
            );
        }
    }

    // CLOUD-2492
    #[test]
    fn words_of_the_client_that_an_engine_repeats_are_not_the_operators() {
        let echo = format!("1 validation error: messages: {}the model was not found", "x ".repeat(200));
        let body = serde_json::json!({"error": {"message": echo}}).to_string();
        assert_eq!(whose(400, &body), (Whose::Client, ErrorCode::InvalidParams));
        // What stands behind many words of another kind counts.
        let long =
            format!("{}Prompt length (9000) exceeds maximum input length (8192)", "in ensemble, ".repeat(80));
        let body = serde_json::json!({ "error": long }).to_string();
        assert_eq!(whose(500, &body), (Whose::Client, ErrorCode::ContextTooLong));
    }

    // CLOUD-2494
    #[test]
    fn an_error_event_without_a_status_is_known_by_its_words() {
        let code = |event: &str| {
            in_stream(Json::object(event).unwrap()).map(|refusal| (refusal.whose, refusal.error.code))
        };
        let too_long = Some((Whose::Client, ErrorCode::ContextTooLong));
        let denied = Some((Whose::Operator, ErrorCode::WorkerReset));
        for (event, expected) in [
            (
                r#"{"error":"Encountered an error when fetching new request: Prompt length (9000) exceeds maximum input length (8192)"}"#,
                too_long,
            ),
            (
                r#"{"error":{"message":"This model's maximum context length is 8192 tokens.","code":"context_length_exceeded"}}"#,
                too_long,
            ),
            (r#"{"error":{"message":"?","code":"model_not_found"}}"#, denied),
            (r#"{"error":{"message":"CUDA out of memory","code":"internal"}}"#, None),
            (r#"{"error":500,"message":"boom"}"#, None),
            (r#"{"error":true}"#, None),
            (r#"{"error":"Model runner failed: the image token was not found in the prompt"}"#, None),
        ] {
            assert_eq!(code(event), expected, "{event}");
        }
    }

    // CLOUD-3007
    #[test]
    fn what_the_engine_was_not_started_for_comes_with_the_flag_that_its_pool_needs() {
        for (what, flag) in [("embeddings", "--embeddings"), ("reranking", "--reranking")] {
            let body = format!(
                r#"{{"error":{{"code":501,"message":"This server does not support {what}. Start it with `{flag}`"}}}}"#
            );
            let refused = refusal(501, &body);
            assert_eq!((refused.whose, refused.error.code), (Whose::Missing, ErrorCode::Unsupported));
            let remedy = format!("; its pool needs flags = [\"{flag}\"]");
            assert!(refused.error.message.ends_with(&remedy), "{}", refused.error);
        }
        assert!(!refusal(501, "not implemented").error.message.contains("flags"));
    }

    // CLOUD-2488
    #[test]
    fn a_route_that_is_not_there_is_something_that_the_engine_cannot_do() {
        for (status, body) in [
            (404, r#"{"detail":"Not Found"}"#),
            (404, ""),
            (404, r#"{"error":{"message":"File Not Found","type":"not_found_error","code":404}}"#),
            (405, r#"{"detail":"Method Not Allowed"}"#),
            (
                501,
                r#"{"error":{"code":501,"message":"This server does not support embeddings","type":"not_supported_error"}}"#,
            ),
        ] {
            assert_eq!(whose(status, body), (Whose::Missing, ErrorCode::Unsupported), "{status} {body}");
        }
    }

    // CLOUD-2493
    #[test]
    fn a_conflict_or_a_timeout_of_the_request_is_nobodys() {
        for status in [408, 409] {
            let refusal = refusal(status, r#"{"error":"busy with something else"}"#);
            assert_eq!((refusal.whose, refusal.error.cause), (Whose::Nobody, None), "{status}");
        }
    }
}
