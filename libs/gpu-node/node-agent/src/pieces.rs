//! The body of an engine's answer, piece by piece, and what is taken of it together.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use http_body_util::BodyStream;
use hyper::body::Frame;

use crate::engines::Answer;

pub(crate) type Pieces = Pin<Box<dyn Stream<Item = hyper::Result<Bytes>> + Send>>;

/// Pieces that are taken together when they have arrived already.
pub(crate) const MOST_PIECES_AT_ONCE: usize = 64;
/// A piece that comes so soon after the one before may have more behind it.
pub(crate) const IN_A_ROW: Duration = Duration::from_millis(2);

pub(crate) fn pieces(answer: Answer) -> Pieces {
    let frames = BodyStream::new(answer.response.into_body());
    Box::pin(frames.filter_map(|frame: hyper::Result<Frame<Bytes>>| {
        std::future::ready(frame.map(|frame| frame.into_data().ok()).transpose())
    }))
}

/// Lets the connection hand out its next piece, of which it has one at a time. Comes back once all that is
/// ready on this thread has run; unlike the runtime's own yield it does not look at the sockets before.
pub(crate) async fn behind_what_is_ready() {
    let mut is_back = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut is_back, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
