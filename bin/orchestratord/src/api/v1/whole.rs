//! Whole answers. What is readable of one is all of it, or more than is held back: then the rest follows
//! as it comes.

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use daemon_kit::ApiError;
use futures::stream;

use super::answer::{failed, passed};
use super::running::Running;
use crate::api::defect;

/// The engine's answer broke off behind what was passed on already.
#[derive(Debug, thiserror::Error)]
#[error("the answer broke off")]
struct BrokeOff;

pub(super) async fn answer(running: Running) -> Result<Response, ApiError> {
    let first = loop {
        match running.stream.pass(0) {
            Ok(first) => break first,
            Err(changed) => changed.await,
        }
    };
    rest(running, first)
}

/// The answer from its first piece on: the bytes, the index behind them, and whether that is all.
pub(super) fn rest(mut running: Running, first: (Bytes, u64, bool)) -> Result<Response, ApiError> {
    let (bytes, mut next, mut is_over) = first;
    let mut all = vec![bytes];
    while !is_over {
        let Ok((bytes, behind, finished)) = running.stream.pass(next) else { break };
        (next, is_over) = (behind, finished);
        all.push(bytes);
    }
    let (head, task_id) = (running.head(), running.task_id());
    if is_over {
        running.finish();
        if let Some(error) = running.stream.error() {
            return Ok(failed(error.clone(), task_id, head.as_ref()));
        }
    }
    let head = head.ok_or_else(defect)?;
    let body = if is_over { Body::from(joined(all)) } else { streamed(running, all, next) };
    Ok(passed(&head, task_id, body))
}

fn joined(mut all: Vec<Bytes>) -> Bytes {
    match all.len() {
        1 => all.pop().unwrap_or_default(),
        _ => all.concat().into(),
    }
}

/// A body that goes on while its engine writes. Where that fails it breaks off.
fn streamed(running: Running, all: Vec<Bytes>, next: u64) -> Body {
    let begun = stream::iter(all.into_iter().map(Ok));
    let rest = stream::unfold((running, next, false), |(mut running, next, is_over)| async move {
        if is_over {
            return None;
        }
        loop {
            let (bytes, behind, finished) = match running.stream.pass(next) {
                Ok(more) => more,
                Err(changed) => {
                    changed.await;
                    continue;
                }
            };
            if finished {
                running.finish();
            }
            let failed = finished && running.stream.error().is_some();
            let piece = if failed { Err(BrokeOff) } else { Ok(bytes) };
            return Some((piece, (running, behind, finished)));
        }
    });
    Body::from_stream(futures::StreamExt::chain(begun, rest))
}
