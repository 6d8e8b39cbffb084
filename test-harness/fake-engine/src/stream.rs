//! The streams of the dialects, token by token.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream;
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;

use crate::engine::{Engine, Kind};
use crate::fault::Fault;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// llama.cpp's `/completion`.
    Llama,
    /// `/v1/completions`.
    Completion,
    /// `/v1/chat/completions`.
    Chat,
    /// TGI's `/generate_stream`: the last token brings the end.
    Tgi,
    /// Triton's `/generate_stream`: the end is that of the message.
    Triton,
}

impl Dialect {
    /// The word `n`, whose token has the id `n`; the answer has `count` tokens by now, and no more
    /// after the last.
    fn token(self, letter: char, n: u64, count: u64, last: bool) -> String {
        let word = format!("{letter}{n} ");
        match self {
            Self::Llama => {
                format!(
                    "data: {{\"index\":0,\"content\":\"{word}\",\"tokens\":[{n}],\"stop\":false,\"tokens_predicted\":{count}}}\n\n"
                )
            }
            Self::Completion => {
                format!("data: {{\"choices\":[{{\"text\":\"{word}\",\"finish_reason\":null}}]}}\n\n")
            }
            Self::Chat => {
                format!(
                    "data: {{\"choices\":[{{\"delta\":{{\"content\":\"{word}\"}},\"finish_reason\":null}}]}}\n\n"
                )
            }
            Self::Tgi => {
                let end = if last {
                    format!(
                        "\"generated_text\":\"…\",\"details\":{{\"finish_reason\":\"length\",\"generated_tokens\":{count},\"seed\":null}}"
                    )
                } else {
                    "\"generated_text\":null,\"details\":null".to_owned()
                };
                format!(
                    "data:{{\"index\":{count},\"token\":{{\"id\":{n},\"text\":\"{word}\",\"logprob\":-0.5,\"special\":false}},{end}}}\n\n"
                )
            }
            Self::Triton => {
                format!(
                    "data: {{\"model_name\":\"fake\",\"model_version\":\"1\",\"text_output\":\"{word}\"}}\n\n"
                )
            }
        }
    }

    /// What follows the last token, where anything does.
    fn end(self, tokens: u64) -> Option<String> {
        Some(match self {
            Self::Tgi | Self::Triton => return None,
            Self::Llama => {
                format!(
                    "data: {{\"content\":\"\",\"stop\":true,\"stop_type\":\"limit\",\"tokens_predicted\":{tokens}}}\n\n"
                )
            }
            Self::Completion | Self::Chat => format!(
                "data: {{\"choices\":[{{\"text\":\"\",\"delta\":{{}},\"finish_reason\":\"length\"}}],\"usage\":{{\"completion_tokens\":{tokens}}}}}\n\ndata: [DONE]\n\n"
            ),
        })
    }
}

/// The token that ends the thoughts.
const END_OF_THOUGHTS: u64 = 100_000;

/// What a token is written as.
pub(crate) fn text_of(id: u64) -> String {
    if id == END_OF_THOUGHTS { "</think>\n\n".to_owned() } else { format!("w{id} ") }
}

struct Answer {
    engine: Arc<Engine>,
    dialect: Dialect,
    fault: Fault,
    tokens: u64,
    /// The number of the first word.
    first: u64,
    /// Words so far.
    next: u64,
    /// Tokens so far: the end of thoughts is one too.
    made: u64,
    pace: Duration,
    slot: Option<OwnedSemaphorePermit>,
    over: bool,
    /// Tokens that it still thinks.
    thoughts: u64,
    /// The delimiter that ends them is still to come.
    delimiters: bool,
}

impl Drop for Answer {
    fn drop(&mut self) {
        // Broken off, it works on until it notices.
        if let Fault::Lingers { ms } = self.fault
            && let Some(slot) = self.slot.take()
        {
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(ms)).await;
                drop(slot);
            });
        }
    }
}

/// What a prompt of ours ends with: the number of the word that comes next. A list of a text and
/// ids is read by its last id, a text by the last of the words that it ends with.
pub(crate) fn first_word(prompt: &Value) -> u64 {
    if let Some(parts) = prompt.as_array() {
        let ids = parts.iter().filter_map(Value::as_u64).filter(|id| *id != END_OF_THOUGHTS);
        return ids.max().map_or(0, |id| id + 1);
    }
    let text = prompt.as_str().unwrap_or_default();
    let last = text.strip_suffix(' ').and_then(|text| text.rsplit(['w', ' ']).next());
    last.and_then(|number| number.parse::<u64>().ok()).map_or(0, |n| n + 1)
}

/// Answers a request with `tokens` tokens from word `first` on, or with the fault that is set.
pub(crate) async fn answer(engine: Arc<Engine>, dialect: Dialect, tokens: u64, first: u64) -> Response {
    let fault = *engine.fault.lock();
    if let Some(refusal) = refusal(&engine, dialect, fault) {
        return refusal;
    }
    let pace = match fault {
        Fault::Slow { pace_ms } | Fault::Steps { pace_ms } => Duration::from_millis(pace_ms),
        _ => engine.pace,
    };
    let thoughts = match fault {
        Fault::Thinks { tokens } => tokens.saturating_sub(first),
        _ => 0,
    };
    // A delimiter ends the thoughts; whoever goes on after them has had it.
    let delimiters = matches!(fault, Fault::Thinks { tokens } if first <= tokens);
    let answer = Answer {
        engine,
        dialect,
        fault,
        tokens,
        first,
        next: 0,
        made: 0,
        pace,
        slot: None,
        over: false,
        thoughts,
        delimiters,
    };
    let body =
        stream::unfold(answer, |mut answer| async move { answer.step().await.map(|piece| (piece, answer)) });
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(body)).into_response()
}

/// What a fault answers instead of anything else; nothing for faults of later.
pub(crate) fn refusal(engine: &Engine, dialect: Dialect, fault: Fault) -> Option<Response> {
    match fault {
        Fault::Error500 => {
            let body = json!({"error": {"code": 500, "message": "a fake failure", "type": "server_error"}});
            Some((StatusCode::INTERNAL_SERVER_ERROR, Json(body)).into_response())
        }
        Fault::ContextTooLong => Some(refuse_as_too_long(engine, dialect)),
        Fault::Status { status } => {
            let words = match status {
                404 => "The model `x` does not exist.",
                405 => "Method Not Allowed",
                _ => "refused on demand",
            };
            let body = json!({"error": {"message": words, "type": "Refusal", "code": status}});
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::IM_A_TEAPOT);
            Some((status, Json(body)).into_response())
        }
        Fault::WrongContentType => {
            Some(([(header::CONTENT_TYPE, "text/html")], "<html>no stream</html>").into_response())
        }
        Fault::Refuse => {
            // A body that fails at once closes the connection before its end.
            let broken = stream::once(async { Err::<Bytes, _>(std::io::Error::other("refused on demand")) });
            Some((StatusCode::OK, Body::from_stream(broken)).into_response())
        }
        _ => None,
    }
}

/// Each engine's own words for a prompt that does not fit.
pub(crate) fn refuse_as_too_long(engine: &Engine, dialect: Dialect) -> Response {
    let tgi = "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8192. Given: 9000 `inputs` tokens and 16 `max_new_tokens`";
    let body = match (engine.kind, dialect) {
        (Kind::Tgi, Dialect::Tgi) => {
            return refused_in_a_stream(&json!({"error": tgi, "error_type": "validation"}));
        }
        (Kind::Tgi, _) => {
            return refused_in_a_stream(&json!({"error": {"message": tgi, "http_status_code": 422}}));
        }
        (Kind::Triton, _) => json!({"error": "Prompt length (9000) exceeds maximum input length (8192)."}),
        (Kind::Vllm | Kind::Openai, _) => {
            json!({"error": {"message": "This model's maximum context length is 8192 tokens. However, you requested 9016 tokens (9000 in the messages, 16 in the completion).", "type": "BadRequestError", "param": null, "code": 400}})
        }
        (Kind::Llamacpp, _) => {
            json!({"error": {"code": 400, "message": "request (9000 tokens) exceeds the available context size (8192 tokens)", "type": "exceed_context_size_error"}})
        }
    };
    (StatusCode::BAD_REQUEST, Json(body)).into_response()
}

/// A refusal whose status says that all is well.
pub(crate) fn refused_in_a_stream(error: &Value) -> Response {
    ([(header::CONTENT_TYPE, "text/event-stream")], format!("data:{error}\n\n")).into_response()
}

impl Answer {
    async fn step(&mut self) -> Option<Result<Bytes, std::io::Error>> {
        if self.over {
            return None;
        }
        if self.slot.is_none() {
            self.slot = Some(self.engine.slots.take().await);
            wait(self.engine.first_token).await;
        } else if matches!(self.fault, Fault::Steps { .. }) {
            let step = self.engine.steps.next(Instant::now(), self.pace);
            tokio::time::sleep_until(step.into()).await;
        } else {
            wait(self.pace).await;
        }
        match self.fault {
            Fault::Hang { after } if self.next >= after => std::future::pending().await,
            Fault::Cut { after } if self.next >= after => {
                self.over = true;
                return Some(Err(std::io::Error::other("cut on demand")));
            }
            Fault::CleanClose { after } if self.next >= after => return None,
            Fault::Huge => {
                self.over = true;
                return Some(Ok(Bytes::from(format!("data: {{\"x\":\"{}\"}}\n\n", "y".repeat(3 << 19)))));
            }
            _ => {}
        }
        if self.made == self.tokens {
            self.over = true;
            self.slot = None;
            return self.dialect.end(self.tokens).map(|end| Ok(Bytes::from(end)));
        }
        if let Fault::Long { bytes } = self.fault {
            self.made += 1;
            let text = "y".repeat(bytes);
            let event = format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n");
            return Some(Ok(event.into()));
        }
        let letter = if self.fault == Fault::OtherWords { 'x' } else { 'w' };
        if self.delimiters && self.thoughts == 0 {
            self.delimiters = false;
            self.made += 1;
            let count = self.made;
            let delimiter = match self.dialect {
                Dialect::Llama => format!(
                    "data: {{\"content\":\"</think>\\n\\n\",\"tokens\":[{END_OF_THOUGHTS}],\"stop\":false,\"tokens_predicted\":{count}}}\n\n"
                ),
                // The server has taken it out.
                _ => "data: {\"choices\":[{\"delta\":{\"content\":\"\"}}]}\n\n".to_owned(),
            };
            return Some(Ok(Bytes::from(delimiter)));
        }
        let n = self.first + self.next;
        self.next += 1;
        self.made += 1;
        let thinks = self.thoughts > 0;
        self.thoughts = self.thoughts.saturating_sub(1);
        if thinks && self.dialect == Dialect::Chat {
            return Some(Ok(Bytes::from(format!(
                "data: {{\"choices\":[{{\"delta\":{{\"content\":null,\"reasoning_content\":\"w{n} \"}}}}]}}\n\n"
            ))));
        }
        let last = self.made == self.tokens;
        let token = self.dialect.token(letter, n, self.made, last);
        if last && self.dialect == Dialect::Tgi {
            // The end was written: the slot is free.
            self.over = true;
            self.slot = None;
        }
        Some(Ok(Bytes::from(token)))
    }
}

async fn wait(span: Duration) {
    if !span.is_zero() {
        tokio::time::sleep(span).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_that_ends_with_our_words_is_continued() {
        assert_eq!(first_word(&json!("once upon a time")), 0);
        assert_eq!(first_word(&json!("once upon a timew0 w1 w12 ")), 13);
        assert_eq!(first_word(&json!(["once upon a time", 0, 1, 7])), 8);
        assert_eq!(first_word(&json!(["once upon a time"])), 0);
    }
}
