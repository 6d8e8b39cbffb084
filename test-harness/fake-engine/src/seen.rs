//! What requests said of who asks: the trace and the ids that came with them.

use std::collections::VecDeque;
use std::sync::Arc;

use axum::extract::{Json, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::engine::Engine;

/// Requests that are remembered; the oldest goes first.
const MOST: usize = 1024;
/// What is remembered of a request beside its path, by the name that it is shown under.
const HEADERS: [(&str, &str); 4] = [
    ("traceparent", "traceparent"),
    ("tracestate", "tracestate"),
    ("correlation_id", "x-correlation-id"),
    ("request_id", "x-request-id"),
];

/// The newest requests, the last one at the end.
#[derive(Debug, Default)]
pub(crate) struct Seen(Mutex<VecDeque<Value>>);

impl Seen {
    fn push(&self, request: Value) {
        let mut seen = self.0.lock();
        if seen.len() == MOST {
            seen.pop_front();
        }
        seen.push_back(request);
    }
}

/// Remembers what asks for something, and every look that carries a trace.
pub(crate) async fn remember(State(engine): State<Arc<Engine>>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    if *request.method() == Method::POST || headers.contains_key("traceparent") {
        let mut seen = json!({"path": request.uri().path()});
        for (shown, name) in HEADERS {
            seen[shown] = json!(headers.get(name).and_then(|value| value.to_str().ok()));
        }
        engine.seen.push(seen);
    }
    next.run(request).await
}

/// For tests: what was remembered.
pub(crate) async fn seen(State(engine): State<Arc<Engine>>) -> Json<Value> {
    Json(json!({"requests": *engine.seen.0.lock()}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_more_requests_than_are_remembered_the_newest_are_shown() {
        let seen = Seen::default();
        (0..=MOST).for_each(|n| seen.push(json!(n)));
        let kept = seen.0.lock();
        assert_eq!((kept.len(), kept.front(), kept.back()), (MOST, Some(&json!(1)), Some(&json!(MOST))));
    }
}
