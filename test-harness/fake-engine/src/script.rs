//! Answers to the byte, and what was asked to the byte.
//!
//! While a script is set, each POST to the engine is written down as it came and answered with the
//! script's status, headers and pieces, and nobody reads what was asked.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Json, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::engine::Engine;

/// Longest body that is written down.
const MOST_BYTES: usize = 64 * 1024 * 1024;
/// Requests that are written down; the oldest goes first.
const MOST: usize = 64;

/// What every POST is answered with.
#[derive(Debug, Deserialize)]
pub(crate) struct Script {
    status: u16,
    /// Values may be any bytes.
    #[serde(default)]
    headers: Vec<(String, Vec<u8>)>,
    /// Each goes out by itself.
    #[serde(default)]
    pieces: Vec<Piece>,
    /// Before each piece but the first.
    #[serde(default)]
    pause_ms: u64,
    /// The connection breaks behind the last piece.
    #[serde(default)]
    breaks: bool,
}

#[derive(Debug, Clone, Deserialize)]
struct Piece {
    bytes: Vec<u8>,
    /// It comes so often.
    #[serde(default = "once")]
    times: u64,
}

fn once() -> u64 {
    1
}

/// The script that is set, and what has come since.
#[derive(Debug, Default)]
pub(crate) struct Scripted {
    script: Mutex<Option<Arc<Script>>>,
    received: Mutex<VecDeque<Value>>,
}

/// Sets a script; `null` takes it away.
pub(crate) async fn set(State(engine): State<Arc<Engine>>, Json(script): Json<Option<Script>>) -> StatusCode {
    *engine.scripted.script.lock() = script.map(Arc::new);
    engine.scripted.received.lock().clear();
    StatusCode::NO_CONTENT
}

/// What has come since the last look.
pub(crate) async fn received(State(engine): State<Arc<Engine>>) -> Json<Value> {
    let taken = std::mem::take(&mut *engine.scripted.received.lock());
    Json(json!({ "requests": taken }))
}

/// Answers by the script, where one is set.
pub(crate) async fn play(State(engine): State<Arc<Engine>>, request: Request, next: Next) -> Response {
    let script = engine.scripted.script.lock().clone();
    let Some(script) = script.filter(|_| *request.method() == Method::POST) else {
        return next.run(request).await;
    };
    let (parts, body) = request.into_parts();
    let Ok(body) = to_bytes(body, MOST_BYTES).await else {
        return StatusCode::PAYLOAD_TOO_LARGE.into_response();
    };
    let headers: Vec<Value> =
        parts.headers.iter().map(|(name, value)| json!([name.as_str(), value.as_bytes()])).collect();
    let seen = json!({
        "path": parts.uri.path(), "query": parts.uri.query(), "headers": headers, "body": body.as_ref(),
    });
    {
        let mut received = engine.scripted.received.lock();
        if received.len() == MOST {
            received.pop_front();
        }
        received.push_back(seen);
    }
    answer(&script)
}

fn answer(script: &Arc<Script>) -> Response {
    let mut response = Response::new(body(Arc::clone(script)));
    *response.status_mut() = StatusCode::from_u16(script.status).unwrap_or(StatusCode::IM_A_TEAPOT);
    for (name, value) in &script.headers {
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_bytes(value)) {
            response.headers_mut().append(name, value);
        }
    }
    response
}

fn body(script: Arc<Script>) -> Body {
    if script.pieces.is_empty() && !script.breaks {
        return Body::empty();
    }
    Body::from_stream(stream::unfold((script, 0, 0), |(script, piece, time)| async move {
        if (piece, time) != (0, 0) && script.pause_ms > 0 {
            tokio::time::sleep(Duration::from_millis(script.pause_ms)).await;
        }
        let Some(of) = script.pieces.get(piece) else {
            let broken =
                (script.breaks && piece < usize::MAX).then(|| std::io::Error::other("broken on demand"));
            return broken.map(|error| (Err(error), (script, usize::MAX, 0)));
        };
        let bytes = Bytes::copy_from_slice(&of.bytes);
        let next = if time + 1 < of.times { (piece, time + 1) } else { (piece + 1, 0) };
        Some((Ok(bytes), (script, next.0, next.1)))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(text: &str) -> Arc<Script> {
        Arc::new(serde_json::from_str(text).unwrap())
    }

    #[tokio::test]
    async fn an_answer_has_each_piece_as_often_as_it_says() {
        let script = script(
            r#"{"status":202,"headers":[["x-a",[98]],["x-a",[99]]],"pieces":[{"bytes":[1,2],"times":3},{"bytes":[3]}]}"#,
        );
        let response = answer(&script);
        assert_eq!(response.status(), 202);
        assert_eq!(response.headers().get_all("x-a").iter().count(), 2);
        let body = to_bytes(response.into_body(), 100).await.unwrap();
        assert_eq!(&body[..], [1, 2, 1, 2, 1, 2, 3]);
    }

    #[tokio::test]
    async fn an_answer_breaks_behind_its_last_piece_where_it_is_to() {
        let broken = answer(&script(r#"{"status":200,"pieces":[{"bytes":[1]}],"breaks":true}"#));
        assert!(to_bytes(broken.into_body(), 100).await.is_err());
        let empty = answer(&script(r#"{"status":204}"#));
        assert!(to_bytes(empty.into_body(), 100).await.unwrap().is_empty());
    }
}
