//! The body of an answer that another process sends: read as far as a bound, and no further.
//!
//! The one way in which bodies are read of what is called over HTTP; `clippy.toml` forbids those that
//! have no bound.

use std::pin::pin;

use bytes::{Buf, Bytes};
use http_body_util::BodyExt;
use hyper::body::Body;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why there is no whole body.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    #[error("its answer is longer than {most} bytes")]
    TooLong { most: usize },
    #[error("its answer was cut off")]
    Lost(#[source] BoxError),
}

/// The whole body, of at most `most` bytes. Of a longer one no more is kept than that, and the rest is not
/// awaited. However small the pieces are in which it comes, it takes no more than twice its bytes.
pub async fn read_at_most<B>(body: B, most: usize) -> Result<Bytes, BodyError>
where
    B: Body,
    B::Error: Into<BoxError>,
{
    // Said beforehand, nothing of it need be read.
    if body.size_hint().lower() > most as u64 {
        return Err(BodyError::TooLong { most });
    }
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(0);
    let mut body = pin!(body);
    // What is only announced takes no memory.
    let mut bytes = Vec::with_capacity(announced);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| BodyError::Lost(error.into()))?;
        let Ok(mut piece) = frame.into_data() else { continue };
        if piece.remaining() > most - bytes.len() {
            return Err(BodyError::TooLong { most });
        }
        while piece.has_remaining() {
            let part = piece.chunk();
            bytes.extend_from_slice(part);
            let taken = part.len();
            piece.advance(taken);
        }
    }
    Ok(bytes.into())
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use hyper::body::Frame;

    use super::*;

    /// So many pieces of two bytes each.
    struct Pieces(usize);

    impl Body for Pieces {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            let Some(left) = self.0.checked_sub(1) else { return Poll::Ready(None) };
            self.0 = left;
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"ab")))))
        }
    }

    // CLOUD-2720
    // CLOUD-2768
    #[tokio::test]
    async fn a_body_in_small_pieces_is_one_piece_of_memory_and_no_longer_than_its_bound() {
        let read = read_at_most(Pieces(1_000), 2_000).await.unwrap();
        assert_eq!(read, "ab".repeat(1_000));
        let refused = read_at_most(Pieces(1_001), 2_001).await;
        assert!(matches!(refused, Err(BodyError::TooLong { most: 2_001 })), "{refused:?}");
    }
}
