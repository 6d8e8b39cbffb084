//! Requests for streams, as each dialect asks for them.
//!
//! What the real engine refuses is refused here too: an adapter that asks for it must not pass.

use std::sync::Arc;

use axum::extract::{Json, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use nix::sys::signal::{Signal, raise};
use serde_json::{Value, json};

use crate::engine::{CONTEXT, Engine, Kind};
use crate::stream::{self, Dialect};

/// Tokens of an answer whose request sets no number, or allows the whole context.
const DEFAULT_TOKENS: u64 = 16;

fn tokens_of(bound: &Value) -> u64 {
    bound.as_u64().filter(|tokens| *tokens != CONTEXT).unwrap_or(DEFAULT_TOKENS)
}

pub(crate) async fn completion(State(engine): State<Arc<Engine>>, Json(body): Json<Value>) -> Response {
    if let Some(refusal) = poisoned(&body["prompt"]) {
        return refusal;
    }
    obey(&body["prompt"]);
    let tokens = tokens_of(&body["n_predict"]);
    stream::answer(engine, Dialect::Llama, tokens, stream::first_word(&body["prompt"])).await
}

pub(crate) async fn openai_completion(
    State(engine): State<Arc<Engine>>,
    Json(body): Json<Value>,
) -> Response {
    if engine.kind == Kind::Vllm && body["max_tokens"].as_u64() >= Some(CONTEXT) {
        // The prompt needs room too.
        return stream::refuse_as_too_long(&engine, Dialect::Completion);
    }
    let tokens = tokens_of(&body["max_tokens"]);
    stream::answer(engine, Dialect::Completion, tokens, stream::first_word(&body["prompt"])).await
}

pub(crate) async fn openai_chat(State(engine): State<Arc<Engine>>, Json(body): Json<Value>) -> Response {
    let tokens = tokens_of(&body["max_tokens"]);
    stream::answer(engine, Dialect::Chat, tokens, 0).await
}

pub(crate) async fn messages(State(engine): State<Arc<Engine>>, Json(body): Json<Value>) -> Response {
    let tokens = tokens_of(&body["max_tokens"]);
    stream::answer(engine, Dialect::Messages, tokens, 0).await
}

pub(crate) async fn tgi(State(engine): State<Arc<Engine>>, Json(body): Json<Value>) -> Response {
    let parameters = &body["parameters"];
    if let Some(reason) = tgi_refusal(parameters) {
        return stream::refused_in_a_stream(&json!({
            "error": format!("Input validation error: {reason}"),
            "error_type": "validation",
        }));
    }
    if parameters["max_new_tokens"].as_u64() >= Some(CONTEXT) {
        return stream::refuse_as_too_long(&engine, Dialect::Tgi);
    }
    let tokens = tokens_of(&parameters["max_new_tokens"]);
    stream::answer(engine, Dialect::Tgi, tokens, stream::first_word(&body["inputs"])).await
}

fn tgi_refusal(parameters: &Value) -> Option<&'static str> {
    let number = |name: &str| parameters[name].as_f64();
    if number("temperature").is_some_and(|t| t <= 0.0) {
        return Some("`temperature` must be strictly positive");
    }
    if number("top_p").is_some_and(|p| p <= 0.0 || p >= 1.0) {
        return Some("`top_p` must be > 0.0 and < 1.0");
    }
    if number("top_k").is_some_and(|k| k <= 0.0) {
        return Some("`top_k` must be strictly positive");
    }
    (number("max_new_tokens") == Some(0.0)).then_some("`max_new_tokens` must be strictly positive")
}

pub(crate) async fn triton(
    State(engine): State<Arc<Engine>>,
    Path(model): Path<String>,
    Json(body): Json<Value>,
) -> Response {
    let refuse = |message: String| (StatusCode::BAD_REQUEST, Json(json!({"error": message}))).into_response();
    if model != engine.model {
        return refuse(format!("Request for unknown model: '{model}' is not found"));
    }
    if body["max_tokens"].is_null() {
        return refuse("[request id: <id_unknown>] input 'max_tokens' is required".into());
    }
    let tokens = tokens_of(&body["max_tokens"]);
    stream::answer(engine, Dialect::Triton, tokens, stream::first_word(&body["text_input"])).await
}

/// A prompt that this engine cannot do, whoever asks.
fn poisoned(prompt: &Value) -> Option<Response> {
    let body = json!({"error": {"code": 500, "message": "division by zero", "type": "server_error"}});
    let refusal = (StatusCode::INTERNAL_SERVER_ERROR, Json(body)).into_response();
    prompt.as_str().is_some_and(|text| text.contains("poison")).then_some(refusal)
}

/// Prompts that make it write of its driver, or end as by a bad access before it answers.
fn obey(prompt: &Value) {
    let asks = |word: &str| prompt.as_str().is_some_and(|text| text.contains(word));
    if asks("print-driver-error") {
        eprintln!("CUDA error: an illegal memory access was encountered");
    }
    if asks("crash-sigsegv") {
        // Rust's own handler takes the first one for an overflow of the stack, and gives way.
        for _ in 0..2 {
            raise(Signal::SIGSEGV).expect("a process may signal itself");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tgi_refuses_is_refused() {
        for bad in [json!({"temperature": 0.0}), json!({"top_p": 1.0}), json!({"max_new_tokens": 0})] {
            assert!(tgi_refusal(&bad).is_some(), "{bad}");
        }
        assert_eq!(tgi_refusal(&json!({"do_sample": false, "max_new_tokens": null})), None);
    }
}
