//! A JSON body as a value, or an error that names the field.

use axum::extract::{FromRequest, Request};
use pool_registry_types::ErrorCode;
use pool_registry_types::task::MAX_BODY_BYTES;
use serde::de::DeserializeOwned;

use crate::answer::ApiError;

/// The parsed body of a request.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let bytes = axum::body::to_bytes(request.into_body(), MAX_BODY_BYTES).await.map_err(|error| {
            let too_large = std::error::Error::source(&error)
                .is_some_and(|cause| cause.to_string().contains("length limit"));
            if too_large {
                let message = format!("the body is longer than {MAX_BODY_BYTES} bytes");
                ApiError::new(ErrorCode::PayloadTooLarge, message)
            } else {
                ApiError::new(ErrorCode::InvalidParams, "the body was cut off")
            }
        })?;
        parse(&bytes).map(Self)
    }
}

/// Parses JSON; the error names the place in it.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let cause = error.into_inner();
        let message = if path == "." { cause.to_string() } else { format!("{path}: {cause}") };
        ApiError::new(ErrorCode::InvalidParams, message)
    })?;
    json.end().map_err(|_| ApiError::new(ErrorCode::InvalidParams, "something follows the JSON body"))?;
    Ok(value)
}
