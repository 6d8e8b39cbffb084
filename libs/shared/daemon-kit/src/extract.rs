//! Bodies and path ids as values, or an error that names the field.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use http_body_util::BodyExt;
use hyper::body::Body as _;
use pool_registry_types::task::{INFER_OVERHEAD_BYTES, MAX_BODY_BYTES};
use pool_registry_types::{ErrorCode, NodeId};
use serde::de::DeserializeOwned;

use crate::answer::ApiError;
use crate::caller::Caller;

/// How long a whole body may take to arrive.
const BODY_PATIENCE: Duration = Duration::from_secs(60);

/// Bytes of a body that is too long that are read for nothing.
const MOST_DROPPED: usize = 16 * 1024 * 1024;

/// The parsed body of a request of a client.
#[derive(Debug)]
pub struct Body<T>(pub T);

/// The parsed body of the hop to a node, which wraps a client's.
#[derive(Debug)]
pub struct WrappedBody<T> {
    pub value: T,
    /// Its length as it came.
    pub bytes: usize,
}

/// The bytes of a body, as they came: a client's, unless it says how many there may be.
#[derive(Debug)]
pub struct RawBody<const MOST: usize = MAX_BODY_BYTES>(pub Bytes);

impl<S: Send + Sync, const MOST: usize> FromRequest<S> for RawBody<MOST> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        collect(request, MOST).await.map(Self)
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
        let body = collect(request, MAX_BODY_BYTES + INFER_OVERHEAD_BYTES).await?;
        Ok(Self { value: parse(&body)?, bytes: body.len() })
    }
}

async fn read<T: DeserializeOwned>(request: Request, at_most: usize) -> Result<T, ApiError> {
    parse(&collect(request, at_most).await?)
}

/// The bytes of a body of at most so many. Errors: `INVALID_PARAMS` where it is cut off or too slow, and
/// `PAYLOAD_TOO_LARGE`.
pub async fn body(request: Request, at_most: usize) -> Result<Bytes, ApiError> {
    collect(request, at_most).await
}

async fn collect(request: Request, at_most: usize) -> Result<Bytes, ApiError> {
    let reading = read_whole(request.into_body(), at_most);
    tokio::time::timeout(BODY_PATIENCE, reading).await.unwrap_or_else(|_| {
        let message = format!("the body did not arrive within {} s", BODY_PATIENCE.as_secs());
        Err(ApiError::new(ErrorCode::InvalidParams, message))
    })
}

/// Of a body that is too long the rest is read and dropped, as far as that is reasonable: who is
/// still sending when the connection is closed hears of no answer.
async fn read_whole(mut body: axum::body::Body, at_most: usize) -> Result<Bytes, ApiError> {
    let announced = body.size_hint().lower();
    let mut too_long = announced > at_most as u64;
    let room = if too_long { 0 } else { usize::try_from(announced).unwrap_or(0) };
    let (mut bytes, mut seen) = (Vec::with_capacity(room), 0_usize);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| ApiError::new(ErrorCode::InvalidParams, "the body was cut off"))?;
        let Ok(data) = frame.into_data() else { continue };
        seen = seen.saturating_add(data.len());
        too_long |= seen > at_most;
        if !too_long {
            bytes.extend_from_slice(&data);
        } else if seen > at_most.saturating_add(MOST_DROPPED) {
            break;
        }
    }
    if too_long {
        return Err(ApiError::new(
            ErrorCode::PayloadTooLarge,
            format!("the body is longer than {at_most} bytes"),
        ));
    }
    Ok(bytes.into())
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

/// The node in a path, for which the caller is authorized; looked at before the body is read.
#[derive(Debug)]
pub struct OwnNode(pub NodeId);

impl<S: Send + Sync> FromRequestParts<S> for OwnNode {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let PathId(node_id) = PathId::<NodeId>::from_request_parts(parts, state).await?;
        let Ok(caller) = Caller::from_request_parts(parts, state).await;
        caller.authorize_node(&node_id).map(|()| Self(node_id))
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
