//! Bodies and path ids as values, or an error that names the field.

use std::fmt::Display;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use http_body_util::BodyExt;
use hyper::body::{Body as _, Frame};
use pool_registry_types::task::{INFER_OVERHEAD_BYTES, MAX_BODY_BYTES};
use pool_registry_types::{ErrorCode, NodeId};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::answer::ApiError;
use crate::byte_budget::{BodyBudgets, ByteBudget, HeldBytes};
use crate::caller::Caller;

/// How long nothing of a body may come.
const BODY_IDLE: Duration = Duration::from_secs(30);
/// How long a body may take to arrive, ...
const BODY_PATIENCE: Duration = Duration::from_secs(60);
/// ... and a second more for so many bytes of it that are here: who sends it a byte at a time holds its room
/// no longer.
const BODY_BYTES_PER_SECOND: usize = 16 * 1024;

/// Bytes of a body that is too long that are read for nothing.
const MOST_DROPPED: usize = 16 * 1024 * 1024;

/// The parsed body of a request of a client.
#[derive(Debug)]
pub struct Body<T>(pub T);

/// The same of a task's: what is read of it counts until what comes with it is dropped.
#[derive(Debug)]
pub struct CountedBody<T>(pub T, pub HeldBytes);

/// The parsed body of a request of a node.
#[derive(Debug)]
pub struct NodeBody<T>(pub T);

/// The same with its length as it came, bytes.
#[derive(Debug)]
pub struct SizedNodeBody<T>(pub T, pub usize);

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
        collect(request, MOST, of_clients).await.map(|(bytes, _)| Self(bytes))
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        read(request, of_clients).await.map(|(value, _)| Self(value))
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for CountedBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        read(request, of_clients).await.map(|(value, held)| Self(value, held))
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for NodeBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        read(request, |budgets| &budgets.nodes).await.map(|(value, _)| Self(value))
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for SizedNodeBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let (body, _) = collect(request, MAX_BODY_BYTES, |budgets| &budgets.nodes).await?;
        Ok(Self(parse(&body)?, body.len()))
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for WrappedBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let (body, _) = collect(request, MAX_BODY_BYTES + INFER_OVERHEAD_BYTES, of_clients).await?;
        Ok(Self { value: parse(&body)?, bytes: body.len() })
    }
}

fn of_clients(budgets: &BodyBudgets) -> &Arc<ByteBudget> {
    &budgets.clients
}

/// The bytes of a client's body of at most so many, and what counts for them. Errors: `INVALID_PARAMS` where
/// it is cut off or too slow, `OVERLOADED` and `PAYLOAD_TOO_LARGE`.
pub async fn body(request: Request, at_most: usize) -> Result<(Bytes, HeldBytes), ApiError> {
    collect(request, at_most, of_clients).await
}

/// The same, with so many bytes of the request's head, which are kept too and count before the body.
pub async fn body_with_head(
    request: Request,
    head: usize,
    at_most: usize,
) -> Result<(Bytes, HeldBytes), ApiError> {
    collect_with(request, head, at_most, of_clients).await
}

/// Whose of the budgets a body counts in.
type Budget = fn(&BodyBudgets) -> &Arc<ByteBudget>;

/// The parsed body, and what counts for its bytes.
async fn read<T: DeserializeOwned>(request: Request, budget: Budget) -> Result<(T, HeldBytes), ApiError> {
    let (bytes, held) = collect(request, MAX_BODY_BYTES, budget).await?;
    Ok((parse(&bytes)?, held))
}

/// The whole body, and what counts for it.
async fn collect(request: Request, at_most: usize, budget: Budget) -> Result<(Bytes, HeldBytes), ApiError> {
    collect_with(request, 0, at_most, budget).await
}

async fn collect_with(
    request: Request,
    head: usize,
    at_most: usize,
    budget: Budget,
) -> Result<(Bytes, HeldBytes), ApiError> {
    let extensions = request.extensions();
    let holder = extensions.get::<Caller>().and_then(|caller| caller.holder.as_deref());
    let holder = holder.map(|holder| holder.id);
    let budgets = extensions.get::<Arc<BodyBudgets>>();
    let mut held = budgets.map(|budgets| budget(budgets).begin(holder)).unwrap_or_default();
    let read = read_behind(request.into_body(), head, at_most, &mut held).await?;
    Ok((read, held))
}

/// The next piece of a body of which so much has come since then.
async fn next_piece(
    body: &mut axum::body::Body,
    began: Instant,
    seen: usize,
) -> Result<Option<Frame<Bytes>>, ApiError> {
    let invalid = |message: String| ApiError::new(ErrorCode::InvalidParams, message);
    let whole = BODY_PATIENCE + Duration::from_secs((seen / BODY_BYTES_PER_SECOND) as u64);
    let left = whole.saturating_sub(began.elapsed());
    match tokio::time::timeout(left.min(BODY_IDLE), body.frame()).await {
        Ok(frame) => frame.transpose().map_err(|_| invalid("the body was cut off".to_owned())),
        Err(_) if left < BODY_IDLE => {
            let bytes = BODY_BYTES_PER_SECOND;
            Err(invalid(format!(
                "the body came too slowly: {seen} bytes of it, where {bytes} a second are due"
            )))
        }
        Err(_) => Err(invalid(format!(
            "nothing came of the body for {} s, after {seen} bytes",
            BODY_IDLE.as_secs()
        ))),
    }
}

/// Reads a whole body of at most so many bytes, each counted before it is kept. Of one that is too long,
/// or for which there is no room, the rest is read and dropped, as far as that is reasonable: who is still
/// sending when the connection is closed hears of no answer.
///
/// # Errors
/// `PAYLOAD_TOO_LARGE`, `OVERLOADED`, and `INVALID_PARAMS` for a body that is cut off or comes too slowly.
pub async fn read_counted(
    body: axum::body::Body,
    at_most: usize,
    held: &mut HeldBytes,
) -> Result<Bytes, ApiError> {
    read_behind(body, 0, at_most, held).await
}

/// The same behind a head of which so many bytes are kept.
async fn read_behind(
    mut body: axum::body::Body,
    head: usize,
    at_most: usize,
    held: &mut HeldBytes,
) -> Result<Bytes, ApiError> {
    let announced = body.size_hint().lower();
    let mut too_long = announced > at_most as u64;
    let room = if too_long { 0 } else { usize::try_from(announced).unwrap_or(0) };
    let (mut bytes, mut seen) = (Vec::with_capacity(room), 0_usize);
    let mut refused = held.add(head).err();
    let began = Instant::now();
    while let Some(frame) = next_piece(&mut body, began, seen).await? {
        let Ok(data) = frame.into_data() else { continue };
        seen = seen.saturating_add(data.len());
        too_long |= seen > at_most;
        if !too_long && refused.is_none() {
            refused = held.add(data.len()).err();
        }
        if !too_long && refused.is_none() {
            bytes.extend_from_slice(&data);
            continue;
        }
        bytes = Vec::new();
        held.set(0);
        if seen > at_most.saturating_add(MOST_DROPPED) {
            break;
        }
    }
    if too_long {
        return Err(ApiError::new(
            ErrorCode::PayloadTooLarge,
            format!("the body is longer than {at_most} bytes"),
        ));
    }
    // Where no length was announced its room has doubled with each piece that did not fit.
    bytes.shrink_to_fit();
    refused.map_or(Ok(bytes.into()), |refused| Err(refused.into()))
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
    // What some programs begin a text with.
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
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

#[cfg(test)]
mod tests {
    use futures::stream;

    use super::*;

    // CLOUD-2013
    #[test]
    fn a_mark_at_the_start_of_a_body_is_skipped_once() {
        let read = |text: &str| parse::<std::collections::BTreeMap<String, u8>>(text.as_bytes());
        assert_eq!(read("\u{feff}{\"a\":1}").unwrap()["a"], 1);
        assert!(read("\u{feff}\u{feff}{}").is_err() && read("\u{feff}[]").is_err());
    }

    /// A body of so many pieces, which looks after each of them at what is counted.
    fn body(pieces: usize, piece: usize, look: impl Fn(usize) + Send + 'static) -> axum::body::Body {
        let pieces = (0..pieces).map(move |n| {
            look(n);
            Ok::<_, std::convert::Infallible>(Bytes::from(vec![b' '; piece]))
        });
        axum::body::Body::from_stream(stream::iter(pieces))
    }

    // CLOUD-2781
    #[tokio::test(start_paused = true)]
    async fn a_body_may_take_long_where_it_keeps_coming_and_no_longer() {
        let every = |seconds: u64, piece: usize| {
            axum::body::Body::from_stream(stream::unfold(0, move |n| async move {
                tokio::time::sleep(Duration::from_secs(seconds)).await;
                (n < 20).then(|| (Ok::<_, std::convert::Infallible>(Bytes::from(vec![b' '; piece])), n + 1))
            }))
        };
        let budget = ByteBudget::new(usize::MAX);
        let read = async |seconds, piece| {
            let began = Instant::now();
            let read = read_counted(every(seconds, piece), 32 << 20, &mut budget.begin(None)).await;
            assert_eq!(budget.held(), 0);
            (read.map(|bytes| bytes.len()).map_err(|refused| refused.0.message), began.elapsed().as_secs())
        };
        // 1 MiB each 29 s for ten minutes.
        assert_eq!(read(29, 1 << 20).await, (Ok(20 << 20), 609));
        let (stopped, after) = read(31, 1 << 20).await;
        assert_eq!(
            (stopped.unwrap_err().as_str(), after),
            ("nothing came of the body for 30 s, after 0 bytes", 30)
        );
        let (trickle, after) = read(10, 100).await;
        assert!(trickle.unwrap_err().contains("too slowly"));
        assert_eq!(after, 60);
    }

    // CLOUD-2725
    #[tokio::test]
    async fn a_body_counts_from_its_first_byte_until_whoever_read_it_lets_it_go() {
        let budget = ByteBudget::new(1_000);
        let mut held = budget.begin(None);
        let seen = Arc::clone(&budget);
        let read =
            read_counted(body(5, 100, move |n| assert_eq!(seen.held(), n * 100)), 500, &mut held).await;
        assert_eq!((read.unwrap().len(), budget.held()), (500, 500));
        // Another one, for which there is no room: nothing of it counts while the rest of it is dropped.
        let (mut second, seen) = (budget.begin(None), Arc::clone(&budget));
        let look = move |n| assert!(n <= 5 || seen.held() == 500, "{n}: {}", seen.held());
        let refused = read_counted(body(20, 100, look), 4_000, &mut second).await.unwrap_err().0;
        assert_eq!((refused.code, refused.retry_after_ms), (ErrorCode::Overloaded, Some(1_000)));
        drop(held);
        assert_eq!(budget.held(), 0);
        // One that is longer than it may be holds nothing either.
        let long = read_counted(body(20, 100, |_| ()), 500, &mut second).await.unwrap_err().0;
        assert_eq!((long.code, budget.held()), (ErrorCode::PayloadTooLarge, 0));
    }

    // CLOUD-2852
    #[tokio::test]
    async fn a_head_counts_before_its_body_and_no_room_is_kept_that_is_not_filled() {
        let budget = ByteBudget::new(1_000);
        let (mut held, seen) = (budget.begin(None), Arc::clone(&budget));
        let look = move |n| assert_eq!(seen.held(), 70 + n * 90);
        let read = read_behind(body(5, 90, look), 70, 500, &mut held).await.unwrap();
        assert_eq!((read.len(), held.bytes()), (450, 520));
        assert_eq!(Vec::from(read).capacity(), 450);
        let mut second = budget.begin(None);
        let refused = read_behind(body(2, 10, |_| ()), 900, 500, &mut second).await.unwrap_err().0;
        assert_eq!((refused.code, second.bytes()), (ErrorCode::Overloaded, 0));
    }
}
