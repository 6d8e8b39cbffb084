//! Room for answers of known length that their peers have not taken.
//!
//! A list may have some megabytes, and a peer need not read it: so what is long counts from the moment
//! when it is made until its last piece was handed over, and where there is no room for it the answer is
//! that there is none. Streams, and what clients of other APIs are answered, are bounded where they are made.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper::body::{Body as _, Frame, SizeHint};
use pool_registry_types::HolderId;
use pool_registry_types::limits::MAX_UNREAD_ANSWER_BYTES;

use crate::answer::ApiError;
use crate::byte_budget::{ByteBudget, HeldBytes};

/// Longest answer that counts for nothing, and longest piece that is handed over at once, bytes.
const PIECE_BYTES: usize = 64 * 1024;
/// The paths whose answers are made by engines.
const OTHERS: &str = "/v1/";

/// The room of one daemon's answers.
#[derive(Debug, Clone)]
pub(crate) struct AnswerRoom(Arc<ByteBudget>);

impl Default for AnswerRoom {
    fn default() -> Self {
        Self(ByteBudget::of("answers that were not taken", MAX_UNREAD_ANSWER_BYTES))
    }
}

/// Whether answers of the path are made by engines.
pub(crate) fn is_others(path: &str) -> bool {
    path.starts_with(OTHERS)
}

impl AnswerRoom {
    /// Counts an answer that is long.
    pub(crate) fn counted(&self, holder: HolderId, response: Response) -> Response {
        let length = response.body().size_hint().exact().and_then(|bytes| usize::try_from(bytes).ok());
        let Some(length) = length.filter(|length| *length > PIECE_BYTES) else { return response };
        let mut held = self.0.begin(Some(holder));
        // One that is longer than a holder's share has it alone.
        match held.add(length.min(self.0.share())) {
            Ok(()) => response.map(|body| Body::new(Counted { body, rest: Bytes::new(), _held: held })),
            Err(error) => ApiError::from(error).into_response(),
        }
    }
}

/// An answer in pieces, counted until it is dropped.
struct Counted {
    body: Body,
    /// What of the body's last frame was not handed over.
    rest: Bytes,
    _held: HeldBytes,
}

impl hyper::body::Body for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        while self.rest.is_empty() {
            match std::task::ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(bytes) => self.rest = bytes,
                    Err(frame) => return Poll::Ready(Some(Ok(frame))),
                },
                end => return Poll::Ready(end),
            }
        }
        let piece = self.rest.len().min(PIECE_BYTES);
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(piece)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (mut hint, rest) = (self.body.size_hint(), self.rest.len() as u64);
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper.saturating_add(rest));
        }
        hint.set_lower(hint.lower().saturating_add(rest));
        hint
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    // CLOUD-2771
    #[tokio::test]
    async fn long_answers_count_until_they_are_taken_and_for_one_too_many_there_is_no_room() {
        let room = AnswerRoom::default();
        let half = room.0.share();
        let answer = |bytes: usize| room.counted(HolderId::OPEN, "x".repeat(bytes).into_response());
        const LONG: usize = 1024 * 1024;
        assert!(is_others("/v1/models") && !is_others("/v2/tasks"));
        let mut held = Vec::new();
        for _ in 0..half / (1024 * 1024) {
            let answer = answer(LONG);
            assert_eq!(answer.status(), 200);
            held.push(answer);
        }
        assert_eq!(room.0.held(), half);
        let refused = answer(LONG);
        assert_eq!(
            (refused.status().as_u16(), refused.headers()["retry-after"].as_bytes()),
            (503, b"1".as_slice())
        );
        assert_eq!(answer(2 * half).status(), 503);
        assert_eq!(answer(PIECE_BYTES).status(), 200);
        // What is taken piece by piece is whole, and counts until its end.
        let mut first = held.pop().unwrap().into_body();
        let (mut taken, before) = (0, room.0.held());
        while let Some(frame) = first.frame().await {
            let piece = frame.unwrap().into_data().unwrap();
            assert!(piece.len() <= PIECE_BYTES && room.0.held() == before);
            taken += piece.len();
        }
        drop(first);
        assert_eq!((taken, room.0.held()), (1024 * 1024, before - 1024 * 1024));
        held.clear();
        let alone = answer(2 * half);
        assert_eq!((alone.status().as_u16(), room.0.held()), (200, half));
        assert_eq!(alone.into_body().collect().await.unwrap().to_bytes().len(), 2 * half);
        assert_eq!(room.0.held(), 0);
    }
}
