//! The body of an answer that streams. Its head waits a little for the first piece, so that both go out
//! in one write, and whoever reads them wakes up once.

use std::time::Duration;

use axum::BoxError;
use axum::body::Body;
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};

/// Longest wait of a head. Source: .specs/01 CLOUD-1941.
const HEAD_WAITS: Duration = Duration::from_millis(20);

/// The body, once its first piece is there or its head may wait no longer. Dropped before that, the
/// pieces are dropped too. A defect of whoever makes them breaks the body, at whichever piece it shows.
pub async fn stream_body<S, E>(pieces: S) -> Body
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: Into<BoxError> + Send + 'static,
{
    let mut pieces = Box::pin(pieces.fuse());
    let first = owned_tasks::caught("first piece of a stream", pieces.next());
    match tokio::time::timeout(HEAD_WAITS, first).await {
        Ok(Ok(first)) => Body::from_stream(stream::iter(first).chain(pieces)),
        Ok(Err(panicked)) => Body::from_stream(stream::iter([Err::<Bytes, _>(panicked)])),
        Err(_) => Body::from_stream(pieces),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::pin::Pin;
    use std::sync::Arc;
    use std::task::{Context, Poll};

    use axum::response::Response;
    use hyper::server::conn::http1;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tokio::time::{Instant, sleep};

    use super::*;

    /// Two pieces: the first after so long, the second a second later.
    fn pieces(first: Duration) -> impl Stream<Item = Result<Bytes, Infallible>> {
        stream::iter([("first", first), ("second", Duration::from_secs(1))]).then(
            |(piece, after)| async move {
                sleep(after).await;
                Ok(Bytes::from(piece))
            },
        )
    }

    async fn read(client: &mut DuplexStream) -> String {
        let mut bytes = [0; 4096];
        let read = client.read(&mut bytes).await.unwrap();
        String::from_utf8_lossy(&bytes[..read]).into_owned()
    }

    /// What a client reads first, after how long, and what it reads next.
    async fn answer_of(first: Duration) -> (String, Duration, String) {
        let (mut client, server) = tokio::io::duplex(65_536);
        let asked = Instant::now();
        let service = service_fn(move |_| async move {
            Ok::<_, Infallible>(Response::new(stream_body(pieces(first)).await))
        });
        let serving = tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(server), service));
        client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let at_first = read(&mut client).await;
        let after = asked.elapsed();
        let next = read(&mut client).await;
        serving.abort();
        (at_first, after, next)
    }

    // CLOUD-1941
    #[tokio::test(start_paused = true)]
    async fn a_head_goes_out_with_a_first_piece_that_is_there_within_20_ms_and_else_without() {
        for ms in [0, 5, 19] {
            let (at_first, after, next) = answer_of(Duration::from_millis(ms)).await;
            assert!(at_first.starts_with("HTTP/1.1 200") && at_first.contains("first"), "{at_first}");
            assert!(after <= Duration::from_millis(ms + 2), "{after:?}");
            assert!(next.contains("second"), "{next}");
        }
        let (at_first, after, next) = answer_of(Duration::from_secs(30)).await;
        assert!(at_first.starts_with("HTTP/1.1 200") && !at_first.contains("first"), "{at_first}");
        assert!((20..=22).contains(&after.as_millis()), "{after:?}");
        assert!(next.contains("first") && !next.contains("second"), "{next}");
    }

    // CLOUD-1941
    #[tokio::test(start_paused = true)]
    async fn a_stream_without_a_piece_is_an_empty_body() {
        let none = stream::empty::<Result<Bytes, Infallible>>();
        let body = axum::body::to_bytes(stream_body(none).await, 10).await.unwrap();
        assert!(body.is_empty());
    }

    /// Says when it is dropped, and panics when it is asked for a piece, or keeps whoever asks waiting.
    struct Watched {
        _held: Arc<()>,
        is_broken: bool,
    }

    impl Stream for Watched {
        type Item = Result<Bytes, Infallible>;

        fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            assert!(!self.is_broken, "a defect");
            Poll::Pending
        }
    }

    // CLOUD-1941
    #[tokio::test(start_paused = true)]
    async fn whoever_hangs_up_before_the_head_drops_the_pieces() {
        let held = Arc::new(());
        let waiting = stream_body(Watched { _held: Arc::clone(&held), is_broken: false });
        assert!(tokio::time::timeout(HEAD_WAITS / 2, waiting).await.is_err());
        assert_eq!(Arc::strong_count(&held), 1);
    }

    // CLOUD-1941
    #[tokio::test]
    async fn a_defect_at_the_first_piece_breaks_the_body_as_one_at_a_later_piece_does() {
        let body = stream_body(Watched { _held: Arc::default(), is_broken: true }).await;
        let error = axum::body::to_bytes(body, 10).await.unwrap_err();
        assert!(error.to_string().contains("a defect in: first piece of a stream"), "{error}");
    }
}
