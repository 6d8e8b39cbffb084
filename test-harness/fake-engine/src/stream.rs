//! The streams of the dialects, token by token.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream;
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;

use crate::Engine;
use crate::fault::Fault;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// llama.cpp's `/completion`.
    Llama,
    /// `/v1/completions`.
    Completion,
    /// `/v1/chat/completions`.
    Chat,
}

impl Dialect {
    /// The word `n`, whose token has the id `n`; the answer has `count` tokens by now.
    fn token(self, letter: char, n: u64, count: u64) -> String {
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
        }
    }

    fn end(self, tokens: u64) -> String {
        match self {
            Self::Llama => {
                format!(
                    "data: {{\"content\":\"\",\"stop\":true,\"stop_type\":\"limit\",\"tokens_predicted\":{tokens}}}\n\n"
                )
            }
            Self::Completion | Self::Chat => format!(
                "data: {{\"choices\":[{{\"text\":\"\",\"delta\":{{}},\"finish_reason\":\"length\"}}],\"usage\":{{\"completion_tokens\":{tokens}}}}}\n\ndata: [DONE]\n\n"
            ),
        }
    }
}

struct Answer {
    engine: Arc<Engine>,
    dialect: Dialect,
    fault: Fault,
    tokens: u64,
    /// The number of the first word.
    first: u64,
    next: u64,
    pace: Duration,
    slot: Option<OwnedSemaphorePermit>,
    over: bool,
}

/// What a prompt of ours ends with: the number of the word that comes next. A list of a text and
/// ids is read by its last id, a text by the last of the words that it ends with.
pub(crate) fn first_word(prompt: &Value) -> u64 {
    if let Some(parts) = prompt.as_array() {
        return parts.last().and_then(Value::as_u64).map_or(0, |id| id + 1);
    }
    let text = prompt.as_str().unwrap_or_default();
    let last = text.strip_suffix(' ').and_then(|text| text.rsplit(['w', ' ']).next());
    last.and_then(|number| number.parse::<u64>().ok()).map_or(0, |n| n + 1)
}

/// Answers a request with `tokens` tokens from word `first` on, or with the fault that is set.
pub(crate) async fn answer(engine: Arc<Engine>, dialect: Dialect, tokens: u64, first: u64) -> Response {
    let fault = *engine.fault.lock();
    match fault {
        Fault::Error500 => {
            let body = json!({"error": {"code": 500, "message": "a fake failure", "type": "server_error"}});
            return (StatusCode::INTERNAL_SERVER_ERROR, Json(body)).into_response();
        }
        Fault::ContextTooLong => {
            let body = json!({"error": {"code": 400, "message": "request (9000 tokens) exceeds the available context size (8192 tokens)", "type": "exceed_context_size_error"}});
            return (StatusCode::BAD_REQUEST, Json(body)).into_response();
        }
        Fault::WrongContentType => {
            return ([(header::CONTENT_TYPE, "text/html")], "<html>no stream</html>").into_response();
        }
        Fault::Refuse => {
            // A body that fails at once closes the connection before its end.
            let broken = stream::once(async { Err::<Bytes, _>(std::io::Error::other("refused on demand")) });
            return (StatusCode::OK, Body::from_stream(broken)).into_response();
        }
        _ => {}
    }
    let pace = match fault {
        Fault::Slow { pace_ms } => Duration::from_millis(pace_ms),
        _ => engine.pace,
    };
    let answer = Answer { engine, dialect, fault, tokens, first, next: 0, pace, slot: None, over: false };
    let body =
        stream::unfold(answer, |mut answer| async move { answer.step().await.map(|piece| (piece, answer)) });
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(body)).into_response()
}

impl Answer {
    async fn step(&mut self) -> Option<Result<Bytes, std::io::Error>> {
        if self.over {
            return None;
        }
        if self.slot.is_none() {
            self.slot = Some(self.engine.slots.take().await);
            wait(self.engine.first_token).await;
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
            _ => {}
        }
        if self.next == self.tokens {
            self.over = true;
            self.slot = None;
            return Some(Ok(Bytes::from(self.dialect.end(self.tokens))));
        }
        let letter = if self.fault == Fault::OtherWords { 'x' } else { 'w' };
        let n = self.first + self.next;
        self.next += 1;
        let token = self.dialect.token(letter, n, self.next);
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
