//! The body of an answer that another process sends: read as far as a bound, and no further.
//!
//! The one way in which bodies are read of what is called over HTTP; `clippy.toml` forbids those that
//! have no bound.

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
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

/// The whole body, of at most `most` bytes. Of a longer one no more is kept than that and one piece of
/// the network's, and the rest is not awaited.
pub async fn read_at_most<B>(body: B, most: usize) -> Result<Bytes, BodyError>
where
    B: Body,
    B::Error: Into<BoxError>,
{
    // Said beforehand, nothing of it need be read.
    if body.size_hint().lower() > most as u64 {
        return Err(BodyError::TooLong { most });
    }
    match Limited::new(body, most).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(BodyError::TooLong { most }),
        Err(error) => Err(BodyError::Lost(error)),
    }
}
