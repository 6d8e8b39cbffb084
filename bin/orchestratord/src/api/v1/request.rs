//! A client's request on its way to a task: its headers, the facts of its body, and the bytes for an
//! engine.

use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::{HeaderMap, HeaderValue};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use daemon_kit::byte_budget::HeldBytes;
use daemon_kit::correlation::RequestIds;
use daemon_kit::{ApiError, Caller, extract};
use openai_gateway::request::{self, RequestFacts};
use pool_registry_types::engines::EngineKind;
use pool_registry_types::limits::TASK_BYTES;
use pool_registry_types::node::Liveness;
use pool_registry_types::task::{KvHint, Priority, Reasoning, ResumeMode, Workload};
use pool_registry_types::{ErrorBody, ErrorCode, HolderId, ModelRef, SessionId, TaskId};
use sha2::{Digest, Sha256};
use task_stream::{BodyDigest, Lacking, OpenAiRoute, Passage, Payload, PayloadFormat, TaskCaller, TaskSpec};
use uuid::Uuid;

use crate::app::state::AppState;
use crate::services::gateway::StreamRecovery;
use crate::services::streams::IdempotencyKey;

/// Longest wait for an answer that is asked for whole, of which nothing comes before its end. Source:
/// .specs/01 CLOUD-2841.
const WHOLE_WITHIN_MS: u64 = 600_000;
/// The most that a client may ask for, milliseconds: a day.
const MAX_TIMEOUT_MS: u64 = 86_400_000;
const MAX_SESSION_CHARS: usize = 256;

/// A request as it came.
#[derive(Debug)]
pub(crate) struct Call {
    query: Option<String>,
    headers: HeaderMap,
    caller: Caller,
    ids: RequestIds,
    body: Bytes,
    /// What counts for it.
    held: HeldBytes,
}

impl FromRequest<AppState> for Call {
    type Rejection = Response;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, Response> {
        let (mut parts, body) = request.into_parts();
        let Ok(caller) = Caller::from_request_parts(&mut parts, state).await;
        let Some(ids) = parts.extensions.get::<RequestIds>().cloned() else {
            return Err(crate::api::defect().into_response());
        };
        let (query, headers) = (parts.uri.query().map(str::to_owned), parts.headers.clone());
        let head = head_bytes(query.as_deref(), &headers);
        let (most, setting) = state.gateway.most_body_bytes(head);
        let body = extract::body_with_head(Request::from_parts(parts, body), head, most).await;
        let (body, held) = body.map_err(|ApiError(error)| too_long(error, setting).into_response())?;
        Ok(Self { query, headers, caller, ids, body, held })
    }
}

/// What is kept of a head, bytes.
fn head_bytes(query: Option<&str>, headers: &HeaderMap) -> usize {
    let headers = headers.iter().map(|(name, value)| name.as_str().len() + value.len());
    headers.sum::<usize>() + query.map_or(0, str::len)
}

/// The error of a body, with the setting by which it is too long.
fn too_long(error: ErrorBody, setting: &str) -> ApiError {
    if error.code != ErrorCode::PayloadTooLarge {
        return error.into();
    }
    ErrorBody { message: format!("{}, by {setting}", error.message), ..error }.into()
}

impl Call {
    pub(super) fn holder(&self) -> HolderId {
        self.caller.holder_id()
    }

    /// By the client's own bytes, and where they go.
    pub(super) fn digest(&self, route: OpenAiRoute) -> BodyDigest {
        digest(route, self.query.as_deref(), &self.body)
    }

    /// The client's own name for the request. Errors: `INVALID_PARAMS`.
    pub(super) fn idempotency_key(&self) -> Result<Option<IdempotencyKey>, ApiError> {
        const NAME: &str = "idempotency-key";
        let Some(given) = text(&self.headers, NAME)? else { return Ok(None) };
        let wrong = || ErrorBody::invalid(format!("{NAME}: must be 1 to 255 visible characters"));
        IdempotencyKey::new(given).map(Some).ok_or_else(|| wrong().into())
    }
}

/// A request that may become a task.
#[derive(Debug)]
pub(super) struct Admitted {
    pub(super) spec: TaskSpec,
    pub(super) payload: Payload,
    pub(super) held: HeldBytes,
    pub(super) caller: Caller,
    pub(super) stream: bool,
}

/// Reads what is to be known of a request. Errors: `INVALID_PARAMS`, `UNSUPPORTED`, `MODEL_NOT_AVAILABLE`.
pub(super) async fn admit(state: &AppState, route: OpenAiRoute, call: Call) -> Result<Admitted, ApiError> {
    let Call { query, headers, caller, ids, body, mut held } = call;
    let refused = |error: request::RequestError| ApiError::from(error.body());
    let digest = digest(route, query.as_deref(), &body);
    let facts = request::read(route, &body).map_err(refused)?;
    let model = model_of(state, &facts).await?;
    let (body, facts) = if facts.model.as_deref() == Some(model.as_str()) {
        (body, facts)
    } else {
        let body = request::with_model(&body, &facts, model.as_str());
        let facts = request::read(route, &body).map_err(refused)?;
        (body, facts)
    };
    if facts.previous_response_id.is_some() && !is_of_one_replica(state, &model).await? {
        let message =
            "previous_response_id: an earlier response is where it was made, which is not known here";
        return Err(ApiError::new(ErrorCode::Unsupported, message));
    }
    let holder = caller.holder.as_deref();
    let who = holder.map(|who| TaskCaller { name: who.name.clone(), fingerprint: who.fingerprint.clone() });
    let deadline_ms = timeout_ms(&headers)?;
    let continuation = continuation(&headers, state.gateway.recovery, route, &facts)?;
    let lacks = |engine: &EngineKind| !route.is_of(*engine);
    let lacking = EngineKind::ALL.into_iter().filter(lacks);
    let spec = TaskSpec {
        task_id: TaskId(Uuid::new_v4()),
        model_ref: model,
        engines: EngineKind::ALL.into_iter().filter(|engine| !lacks(engine)).collect(),
        lacking: lacking.map(|engine| Lacking { engine, field: route.path().into() }).collect(),
        passes_on: true,
        ctx: None,
        priority: priority(&headers)?,
        placement: None,
        session_id: session(&headers, &facts, caller.holder_id())?,
        kv_hint: KvHint::Reuse,
        workload: match route {
            OpenAiRoute::Embeddings => Workload::Embedding,
            OpenAiRoute::Rerank => Workload::Rerank,
            _ => Workload::Completion,
        },
        max_tokens: facts.output_bound().map(|bound| u32::try_from(bound).unwrap_or(u32::MAX)),
        expected_tokens: None,
        deadline_ms,
        first_token_ms: begins_within_ms(facts.stream),
        token_idle_ms: None,
        continuation,
        reasoning: Reasoning::Keep,
        caller: who,
        holder: caller.holder_id(),
        trace: ids.trace(),
        digest,
    };
    let place = facts.model_place();
    let model_at = place.and_then(|at| Some((u32::try_from(at.start).ok()?, u32::try_from(at.end).ok()?)));
    let headers = passed_on(&headers);
    let passed_head = headers.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>()
        + query.as_deref().map_or(0, str::len);
    let passage = Passage { route, stream: facts.stream, query, headers, model_at };
    let payload = Payload { format: PayloadFormat::OpenAi(Box::new(passage)), bytes: body };
    held.set(payload.bytes.len() + passed_head + TASK_BYTES);
    Ok(Admitted { spec, payload, held, caller, stream: facts.stream })
}

/// The bound of the first byte, where it is not that of first tokens.
fn begins_within_ms(stream: bool) -> Option<u64> {
    (!stream).then_some(WHOLE_WITHIN_MS)
}

/// By the client's own bytes, and where they go.
fn digest(route: OpenAiRoute, query: Option<&str>, body: &[u8]) -> BodyDigest {
    let mut hasher = Sha256::new();
    for part in ["POST ", route.path(), "?", query.unwrap_or_default(), "\n"] {
        hasher.update(part);
    }
    hasher.update(body);
    BodyDigest::new(hasher.finalize().into())
}

/// The model that is asked for, an alias being what it stands for.
async fn model_of(state: &AppState, facts: &RequestFacts) -> Result<ModelRef, ApiError> {
    let gateway = &state.gateway;
    let Some(name) = &facts.model else {
        let missing = || ApiError::from(ErrorBody::invalid("model: is missing"));
        return gateway.default_model.clone().ok_or_else(missing);
    };
    if let Some(model) = gateway.aliases.get(name) {
        return Ok(model.clone());
    }
    match ModelRef::new(name) {
        Ok(model) => Ok(model),
        // No node could have reported it.
        Err(_) => {
            let cluster = state.service_registry.view().await?;
            Err(state.gateway.unknown_model(&cluster, name).into())
        }
    }
}

/// Whether one replica only serves the model.
async fn is_of_one_replica(state: &AppState, model: &ModelRef) -> Result<bool, ApiError> {
    let cluster = state.service_registry.view().await?;
    let live = cluster.nodes().filter(|(node, _)| node.liveness != Liveness::Offline);
    let pools = live.flat_map(|(node, _)| &node.pools).filter(|pool| pool.report.models.contains(model));
    Ok(pools.map(|pool| pool.report.replicas.len()).sum::<usize>() == 1)
}

/// The one value of a header, as text. Errors: several, or none that can be read.
fn text<'h>(headers: &'h HeaderMap, name: &str) -> Result<Option<&'h str>, ApiError> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let wrong =
        || ApiError::from(ErrorBody::invalid(format!("{name}: must be one value of visible characters")));
    if values.next().is_some() {
        return Err(wrong());
    }
    value.to_str().map(|text| Some(text.trim())).map_err(|_| wrong())
}

fn timeout_ms(headers: &HeaderMap) -> Result<Option<u64>, ApiError> {
    const NAME: &str = "x-request-timeout-ms";
    let Some(given) = text(headers, NAME)? else { return Ok(None) };
    let millis = given.parse().ok().filter(|millis| (1..=MAX_TIMEOUT_MS).contains(millis));
    let message = || format!("{NAME}: must be a whole number from 1 to {MAX_TIMEOUT_MS}");
    millis.map(Some).ok_or_else(|| ErrorBody::invalid(message()).into())
}

fn priority(headers: &HeaderMap) -> Result<Priority, ApiError> {
    const NAME: &str = "x-llorch-priority";
    match text(headers, NAME)? {
        None => Ok(Priority::default()),
        Some("interactive") => Ok(Priority::Interactive),
        Some("batch") => Ok(Priority::Batch),
        Some(_) => Err(ErrorBody::invalid(format!("{NAME}: must be interactive or batch")).into()),
    }
}

/// Whether the stream is generated again where it is lost. Errors: `UNSUPPORTED` where the client asks for
/// it and it cannot be, and `INVALID_PARAMS`.
fn continuation(
    headers: &HeaderMap,
    otherwise: StreamRecovery,
    route: OpenAiRoute,
    facts: &RequestFacts,
) -> Result<Option<ResumeMode>, ApiError> {
    const NAME: &str = "x-llorch-recovery";
    let asked = text(headers, NAME)?;
    let recovery = match asked {
        None => otherwise,
        Some(asked) => <StreamRecovery as clap::ValueEnum>::from_str(asked, false)
            .map_err(|_| ErrorBody::invalid(format!("{NAME}: must be continue or fail")))?,
    };
    if recovery == StreamRecovery::Fail {
        return Ok(None);
    }
    match facts.not_replayed(route) {
        None => Ok(Some(ResumeMode::Replay)),
        Some(_) if asked.is_none() => Ok(None),
        Some(reason) => {
            let message = format!("{NAME}: this answer cannot be generated again: {reason}");
            Err(ApiError::new(ErrorCode::Unsupported, message))
        }
    }
}

/// To which session a request belongs, if to any: what a caller calls so is nobody else's.
fn session(
    headers: &HeaderMap,
    facts: &RequestFacts,
    holder: HolderId,
) -> Result<Option<SessionId>, ApiError> {
    const NAME: &str = "x-session-id";
    let given = text(headers, NAME)?;
    let is_good =
        |id: &str| (1..=MAX_SESSION_CHARS).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic());
    if given.is_some_and(|id| !is_good(id)) {
        let message = format!("{NAME}: must be 1 to {MAX_SESSION_CHARS} visible characters");
        return Err(ErrorBody::invalid(message).into());
    }
    let id = given.or(facts.prompt_cache_key.as_deref()).or(facts.user.as_deref());
    let Some(id) = id.filter(|id| !id.is_empty()) else { return Ok(None) };
    let mut hasher = Sha256::new();
    hasher.update(holder.0);
    hasher.update([0]);
    hasher.update(id);
    let hash: [u8; 32] = hasher.finalize().into();
    let (first, _) = hash.split_at(16);
    Ok(<[u8; 16]>::try_from(first).ok().map(|bytes| SessionId(Uuid::new_v8(bytes))))
}

/// What an engine is to have of the client's headers.
fn passed_on(headers: &HeaderMap) -> Vec<(String, String)> {
    let is_for_engines = |name: &str| {
        name.starts_with("openai-")
            || name.starts_with("anthropic-")
            || matches!(name, "x-title" | "content-type")
    };
    let passed = headers.iter().filter(|(name, _)| is_for_engines(name.as_str()));
    // What is no text cannot be told on the way.
    let text = |value: &HeaderValue| std::str::from_utf8(value.as_bytes()).ok().map(str::to_owned);
    passed.filter_map(|(name, value)| Some((name.as_str().to_owned(), text(value)?))).collect()
}

#[cfg(test)]
mod tests {
    use axum::http::header;

    use super::*;

    fn headers(given: &[(&str, &str)]) -> HeaderMap {
        let header = |(name, value): &(&str, &str)| {
            (name.parse::<header::HeaderName>().unwrap(), value.parse::<header::HeaderValue>().unwrap())
        };
        given.iter().map(header).collect()
    }

    // CLOUD-2842
    #[test]
    fn headers_of_ours_are_read_and_a_wrong_one_names_itself() {
        let good = headers(&[("X-Request-Timeout-Ms", "1500"), ("X-LLORCH-Priority", "batch")]);
        assert_eq!((timeout_ms(&good).unwrap(), priority(&good).unwrap()), (Some(1_500), Priority::Batch));
        assert_eq!(
            (timeout_ms(&headers(&[])).unwrap(), priority(&headers(&[])).unwrap()),
            (None, Priority::Interactive)
        );
        for wrong in ["0", "-1", "1.5", "x", "99999999999"] {
            let error = timeout_ms(&headers(&[("x-request-timeout-ms", wrong)])).unwrap_err().0;
            assert!(error.message.starts_with("x-request-timeout-ms: "), "{error}");
        }
        assert!(priority(&headers(&[("x-llorch-priority", "high")])).is_err());
    }

    // CLOUD-2860
    // CLOUD-2861
    #[test]
    fn a_stream_is_generated_again_where_it_can_be_and_refused_at_once_where_that_is_asked_for_in_vain() {
        use StreamRecovery::{Continue, Fail};
        let read = |body: &str| request::read(OpenAiRoute::ChatCompletions, body.as_bytes()).unwrap();
        let exact = read(r#"{"model":"m","stream":true,"temperature":0}"#);
        let drawn = read(r#"{"model":"m","stream":true,"temperature":1}"#);
        let of = |asked: Option<&str>, otherwise, facts| {
            let given = asked.map(|asked| ("X-LLORCH-Recovery", asked));
            let headers = headers(given.as_slice());
            let mode = continuation(&headers, otherwise, OpenAiRoute::ChatCompletions, facts);
            mode.map_err(|error| error.0.code)
        };
        let replay = Ok(Some(ResumeMode::Replay));
        assert_eq!(of(None, Continue, &exact), replay);
        assert_eq!(of(None, Fail, &exact), Ok(None));
        assert_eq!(of(Some("continue"), Fail, &exact), replay);
        assert_eq!(of(Some("fail"), Continue, &exact), Ok(None));
        assert_eq!(of(None, Continue, &drawn), Ok(None));
        assert_eq!(of(Some("continue"), Continue, &drawn), Err(ErrorCode::Unsupported));
        assert_eq!(of(Some("resume"), Continue, &exact), Err(ErrorCode::InvalidParams));
    }

    // CLOUD-2852
    #[test]
    fn a_head_counts_with_its_query_and_a_body_that_is_too_long_names_the_setting() {
        let given = headers(&[("x-title", "tt"), ("openai-beta", "b")]);
        assert_eq!(head_bytes(Some("a=b"), &given), 9 + 12 + 3);
        let long = ErrorBody::new(ErrorCode::PayloadTooLarge, "the body is longer than 5 bytes");
        let ApiError(named) = too_long(long, "ORCHESTRATORD_V1_BODY_BYTES");
        assert_eq!(named.message, "the body is longer than 5 bytes, by ORCHESTRATORD_V1_BODY_BYTES");
        let ApiError(other) = too_long(ErrorBody::invalid("the body was cut off"), "X");
        assert_eq!(other.message, "the body was cut off");
    }

    // CLOUD-2841
    #[test]
    fn a_whole_answer_has_ten_minutes_to_begin_and_a_stream_the_time_of_first_tokens() {
        assert_eq!((begins_within_ms(false), begins_within_ms(true)), (Some(600_000), None));
    }

    // CLOUD-2843
    #[test]
    fn a_session_is_its_callers_and_the_header_says_it_before_the_body() {
        let facts = |body: &str| request::read(OpenAiRoute::ChatCompletions, body.as_bytes()).unwrap();
        let (user, both) = (facts(r#"{"user":"u"}"#), facts(r#"{"user":"u","prompt_cache_key":"k"}"#));
        let (a, b) = (HolderId(Uuid::from_u128(1)), HolderId(Uuid::from_u128(2)));
        let of = |given: &[(&str, &str)], facts, holder| session(&headers(given), facts, holder).unwrap();
        let plain = of(&[], &user, a);
        assert!(plain.is_some());
        assert_eq!(of(&[("x-session-id", "u")], &both, a), plain);
        for other in [of(&[], &user, b), of(&[], &both, a), of(&[("x-session-id", "v")], &user, a)] {
            assert!(other.is_some() && other != plain);
        }
        assert_eq!(of(&[], &facts("{}"), a), None);
        let long = "x".repeat(257);
        for wrong in ["", "a b", &long] {
            assert!(session(&headers(&[("x-session-id", wrong)]), &user, a).is_err(), "{wrong}");
        }
    }

    // CLOUD-2830
    #[test]
    fn an_engine_has_the_headers_of_its_language_and_neither_keys_nor_cookies() {
        let given = headers(&[
            ("OpenAI-Beta", "x"),
            ("anthropic-version", "2023-06-01"),
            ("X-Title", "t"),
            ("content-type", "application/json"),
            ("authorization", "Bearer secret"),
            ("x-api-key", "secret"),
            ("cookie", "a=b"),
            ("x-llorch-priority", "batch"),
        ]);
        let names: Vec<String> = passed_on(&given).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["openai-beta", "anthropic-version", "x-title", "content-type"]);
    }
}
