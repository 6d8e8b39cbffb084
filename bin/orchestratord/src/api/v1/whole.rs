//! Whole answers. What is readable of one is all of it, or more than is held back: then the rest follows
//! as it comes. Its bytes stay in the log until the client takes them.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::BoxError;
use axum::body::{Body, HttpBody};
use axum::response::Response;
use bytes::Bytes;
use daemon_kit::ApiError;
use futures::stream;
use hyper::body::{Frame, SizeHint};

use super::answer::{failed, passed};
use super::running::Running;
use crate::api::defect;
use crate::services::streams::ReadPosition;

/// The engine's answer broke off behind what was passed on already.
#[derive(Debug, thiserror::Error)]
#[error("the answer broke off")]
struct BrokeOff;

pub(super) async fn answer(running: Running) -> Result<Response, ApiError> {
    let (bytes, is_over) = running.unread().await;
    rest(running, bytes, is_over)
}

/// The answer, of which so many bytes are here and nothing was read, and whether these are all.
pub(super) fn rest(mut running: Running, bytes: usize, is_over: bool) -> Result<Response, ApiError> {
    let (head, task_id) = (running.head(), running.task_id());
    if is_over && let Some(error) = running.stream.error().cloned() {
        running.finish();
        return Ok(failed(error, task_id, head.as_ref()));
    }
    let head = head.ok_or_else(defect)?;
    if is_over && bytes == 0 {
        running.finish();
        return Ok(passed(&head, task_id, Body::empty()));
    }
    let body = streamed(running);
    let body = if is_over { Body::new(OfSize { body, left: bytes as u64 }) } else { body };
    Ok(passed(&head, task_id, body))
}

/// A body that goes on while its engine writes. Where that fails it breaks off.
fn streamed(running: Running) -> Body {
    let begin = (running, ReadPosition::BEGIN, false);
    Body::from_stream(stream::unfold(begin, |(mut running, at, is_over)| async move {
        if is_over {
            return None;
        }
        let read = running.next_piece(at).await;
        if read.is_last {
            running.finish();
        }
        let failed = read.is_last && running.stream.error().is_some();
        let piece = if failed { Err(BrokeOff) } else { Ok(read.bytes) };
        Some((piece, (running, read.place, read.is_last)))
    }))
}

/// A body whose length is known before it is read.
struct OfSize {
    body: Body,
    left: u64,
}

impl HttpBody for OfSize {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            self.left = self.left.saturating_sub(frame.data_ref().map_or(0, Bytes::len) as u64);
        }
        polled.map_err(BoxError::from)
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
