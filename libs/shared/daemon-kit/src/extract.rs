//! Bodies and path ids as values, or an error that names the field.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use pool_registry_types::task::{INFER_OVERHEAD_BYTES, MAX_BODY_BYTES};
use pool_registry_types::{ErrorCode, NodeId};
use serde::de::DeserializeOwned;

use crate::answer::ApiError;
use crate::auth::Caller;

/// How long a whole body may take to arrive.
const BODY_PATIENCE: Duration = Duration::from_secs(60);

/// The parsed body of a request of a client.
#[derive(Debug)]
pub struct Body<T>(pub T);

/// The parsed body of the hop to a node, which wraps a client's.
#[derive(Debug)]
pub struct WrappedBody<T>(pub T);

/// The bytes of a client's body, as they came.
#[derive(Debug)]
pub struct RawBody(pub Bytes);

impl<S: Send + Sync> FromRequest<S> for RawBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        collect(request, MAX_BODY_BYTES).await.map(Self)
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        read(request, MAX_BODY_BYTES).await.map(Self)
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for WrappedBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        read(request, MAX_BODY_BYTES + INFER_OVERHEAD_BYTES).await.map(Self)
    }
}

async fn read<T: DeserializeOwned>(request: Request, at_most: usize) -> Result<T, ApiError> {
    parse(&collect(request, at_most).await?)
}

async fn collect(request: Request, at_most: usize) -> Result<Bytes, ApiError> {
    let too_large =
        || ApiError::new(ErrorCode::PayloadTooLarge, format!("the body is longer than {at_most} bytes"));
    let body = request.into_body();
    // What announces itself as too long is not read at all.
    if hyper::body::Body::size_hint(&body).lower() > at_most as u64 {
        return Err(too_large());
    }
    let reading = axum::body::to_bytes(body, at_most);
    let Ok(read) = tokio::time::timeout(BODY_PATIENCE, reading).await else {
        let message = format!("the body did not arrive within {} s", BODY_PATIENCE.as_secs());
        return Err(ApiError::new(ErrorCode::InvalidParams, message));
    };
    read.map_err(|error| {
        let cause = std::error::Error::source(&error);
        if cause.is_some_and(|cause| cause.to_string().contains("length limit")) {
            too_large()
        } else {
            ApiError::new(ErrorCode::InvalidParams, "the body was cut off")
        }
    })
}

/// An id in a path, or `INVALID_PARAMS` that names it.
#[derive(Debug)]
pub struct PathId<T>(pub T);

impl<T, S> FromRequestParts<S> for PathId<T>
where
    T: FromStr,
    T::Err: Display,
    S: Send + Sync,
{
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let invalid = |message: String| ApiError::new(ErrorCode::InvalidParams, message);
        let path = Path::<String>::from_request_parts(parts, state).await;
        let Path(text) = path.map_err(|error| invalid(format!("path: {error}")))?;
        text.parse().map(Self).map_err(|error: T::Err| invalid(error.to_string()))
    }
}

/// The node in a path, for which the caller may speak; looked at before the body is read.
#[derive(Debug)]
pub struct OwnNode(pub NodeId);

impl<S: Send + Sync> FromRequestParts<S> for OwnNode {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let PathId(node_id) = PathId::<NodeId>::from_request_parts(parts, state).await?;
        let Ok(caller) = Caller::from_request_parts(parts, state).await;
        caller.may_speak_for(&node_id).map(|()| Self(node_id))
    }
}

/// Parses a JSON object; the error names the place in it.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    // A list would be taken for the fields in the order in which we happen to write them.
    if bytes.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[') {
        return Err(ApiError::new(ErrorCode::InvalidParams, "the body: expected an object, not a list"));
    }
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
