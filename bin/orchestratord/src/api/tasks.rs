//! Tasks: submit, look, follow, cancel.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use daemon_kit::connections::PeerEnd;
use daemon_kit::correlation::RequestIds;
use daemon_kit::{ApiError, Body, Caller, CountedBody, PathId, stream_body};
use pool_registry_types::limits::TASK_BYTES;
use pool_registry_types::placement::Explanation;
use pool_registry_types::routes::headers;
use pool_registry_types::task::{OnDisconnect, TaskAccepted, TaskPage, TaskRequest, TaskState, TaskView};
use pool_registry_types::{ErrorBody, ErrorCode, ModelRef, NodeId, TaskId, routes as paths};
use serde::Deserialize;
use task_scheduler::{TaskFilter, TaskRecord};
use utoipa::IntoParams;

use super::holders::{self, OfHolder, Reach};
use super::query::{Known, NoParameters};
use super::{UNBUFFERED, checked, defect, departs_at_its_end, submission};
use crate::app::state::AppState;
use crate::services::departures::{Admission, Departure};
use crate::services::readers::{self, Follower, Gauge};
use crate::services::usage::TaskUsage;

/// Tasks on one page, unless another number is asked for; and the most.
const PAGE: usize = 50;
const MAX_PAGE: usize = 500;

/// Submits a task.
///
/// The answer is 202 with where its stream is; with `Accept: text/event-stream` it is 200 and the stream
/// itself. The same `task_id` with the same body attaches to the task that is there.
#[utoipa::path(post, path = paths::TASKS, tag = "tasks", request_body = TaskRequest,
    responses((status = 202, body = TaskAccepted), (status = 200, content_type = "text/event-stream"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 413, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody), (status = 404, body = ErrorBody), (status = 410, body = ErrorBody)))]
pub(crate) async fn submit(
    State(state): State<AppState>,
    headers: HeaderMap,
    caller: Caller,
    Extension(ids): Extension<RequestIds>,
    end: Option<Extension<PeerEnd>>,
    CountedBody(request, mut held): CountedBody<TaskRequest>,
) -> Result<Response, ApiError> {
    request.check()?;
    let (holder, cancels) = (caller.holder_id(), request.on_disconnect == OnDisconnect::Cancel);
    // Whoever attaches to a task that is there has no other one.
    let known = request.task_id.is_some_and(|id| state.control.published.task(holder, id).is_some());
    if !known {
        state.streams.check_room()?;
    }
    let permit = if known { None } else { state.quota.task(&caller)? };
    // For what is refused before, nothing is written.
    let (spec, payload) = submission::split(request, &caller, &ids);
    let task_id = spec.task_id;
    let wants_stream = wants_stream(&headers);
    held.add(TASK_BYTES)?;
    held.set(payload.bytes.len() + TASK_BYTES);
    let threads = &state.relays.threads;
    // Where its submitter reads it, or else where there is the least to do.
    let thread = if wants_stream { threads.here() } else { threads.least_loaded().clone() };
    // Whoever hangs up now may have been admitted: the task has its place all the same.
    let (control, streams) = (state.control.clone(), Arc::clone(&state.streams));
    let departure = (cancels && wants_stream)
        .then(|| Departure::of_submitter(control.clone(), Arc::clone(&streams), holder, task_id));
    if departure.is_some() {
        departs_at_its_end(end.as_deref());
    }
    let admitted: Option<Admission> = departure.as_ref().map(Departure::admission);
    let admission = owned_tasks::uninterrupted("admission of a task", async move {
        let answer = control.submit(spec, payload, held, thread).await?;
        let record = control.published.task(holder, task_id);
        if let Some(stream) = record.as_ref().filter(|_| cancels).and_then(|task| streams.get(task.key)) {
            stream.cancel_unread();
        }
        if let Some((record, permit)) = record.zip(permit) {
            streams.hold_permit(record.key, permit);
        }
        if let Some(admitted) = admitted {
            admitted.done().await;
        }
        Ok::<_, ErrorBody>(answer)
    });
    let answered = admission.await.map_err(|_| defect())?;
    let accepted = answered?;
    let mut response = if wants_stream {
        // The task is there, also where its stream cannot be read: whoever hears that hears of which.
        match state.control.published.task(holder, task_id) {
            Some(record) => stream(&state, &caller, &record, (None, false), departure, end.as_deref()).await,
            None => Err(holders::no_task(task_id).into()),
        }
        .unwrap_or_else(IntoResponse::into_response)
    } else {
        (StatusCode::ACCEPTED, Json(accepted)).into_response()
    };
    if let Ok(value) = HeaderValue::from_str(&task_id.to_string()) {
        response.headers_mut().insert(HeaderName::from_static(headers::TASK_ID), value);
    }
    Ok(response)
}

fn wants_stream(map: &HeaderMap) -> bool {
    let accepted = map.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepted.flat_map(|value| value.split(',')).any(|kind| kind.trim().starts_with("text/event-stream"))
}

/// Shows the state of a task, its attempts and its tokens.
#[utoipa::path(get, path = paths::TASK, tag = "tasks", params(("task_id" = Uuid, Path), OfHolder),
    responses((status = 200, body = TaskView), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn get(
    State(state): State<AppState>,
    PathId(id): PathId<TaskId>,
    caller: Caller,
    of: Result<Query<OfHolder>, QueryRejection>,
) -> Result<Json<TaskView>, ApiError> {
    let published = &state.control.published;
    let record = holders::task(&state, &caller, Reach::Metadata, id, &checked(of)?)?;
    let waiting = match record.state {
        TaskState::Queued => published.waiting(&record).await?,
        _ => None,
    };
    let holder = caller.sees_all().then(|| state.tokens.name_of(record.holder)).flatten();
    let TaskUsage { tokens_in, tokens_out, finish_reason } =
        state.streams.usage(record.key).unwrap_or_default();
    let view = record.view(published.now(), waiting);
    Ok(Json(TaskView { holder, tokens_in, tokens_out, finish_reason, ..view }))
}

/// What a list of tasks shows.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Listing {
    #[param(value_type = TaskState, required = false)]
    state: Option<TaskState>,
    /// Of the last attempt.
    #[param(value_type = NodeId, required = false)]
    node_id: Option<NodeId>,
    #[param(value_type = ModelRef, required = false)]
    model: Option<ModelRef>,
    /// By its name; those of all where it is absent. Whoever sees its own tasks only is shown those.
    #[param(value_type = String, required = false)]
    holder: Option<String>,
    /// The name of the token that a task was submitted with.
    #[param(value_type = String, required = false)]
    caller: Option<String>,
    /// Of the request that submitted the task.
    #[param(value_type = String, required = false)]
    correlation_id: Option<String>,
    /// The `next` of the page before.
    #[param(value_type = Uuid, required = false)]
    after: Option<TaskId>,
    /// 1 to 500; 50 when absent.
    #[param(value_type = u32, required = false, minimum = 1, maximum = 500)]
    limit: Option<usize>,
}

/// Lists the tasks that wait, run or are still kept, newest first.
///
/// Page by page, and at most 100 ms old.
#[utoipa::path(get, path = paths::TASKS, tag = "tasks", params(Listing),
    responses((status = 200, body = TaskPage), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    asker: Caller,
    Known(listing): Known<Listing>,
) -> Result<Json<TaskPage>, ApiError> {
    let Listing { state: of_state, node_id, model, holder, caller, correlation_id, after, limit } = listing;
    let limit = limit.unwrap_or(PAGE);
    if !(1..=MAX_PAGE).contains(&limit) {
        let message = format!("limit: must be between 1 and {MAX_PAGE}");
        return Err(ApiError::new(ErrorCode::InvalidParams, message));
    }
    let holder = if asker.sees_all() {
        holder.map(|name| state.tokens.holder_named(&name))
    } else {
        Some(asker.holder_id())
    };
    let filter = TaskFilter { holder, state: of_state, node_id, model, caller, correlation_id };
    let published = &state.control.published;
    let below = match after {
        None => u64::MAX,
        Some(id) => {
            let unknown = || {
                let message = format!("after: task {id} is not kept any more");
                ApiError::new(ErrorCode::NotFound, message)
            };
            let last = match holder {
                Some(holder) => published.task(holder, id),
                None => published.task_by_key(id),
            };
            last.ok_or_else(unknown)?.number
        }
    };
    let name = |of| asker.sees_all().then(|| state.tokens.name_of(of)).flatten();
    Ok(Json(published.list().await?.page(published.now(), &filter, below, limit, name)))
}

/// Explains what every pool says to a task that has not ended.
#[utoipa::path(get, path = paths::TASK_EXPLAIN, tag = "tasks", params(("task_id" = Uuid, Path), OfHolder),
    responses((status = 200, body = Explanation), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn explain(
    State(state): State<AppState>,
    PathId(id): PathId<TaskId>,
    caller: Caller,
    Known(of): Known<OfHolder>,
) -> Result<Json<Explanation>, ApiError> {
    let record = holders::task(&state, &caller, Reach::Metadata, id, &of)?;
    Ok(Json(state.control.explain(record.key).await?))
}

/// Explains what every pool would say to a task that is not submitted.
#[utoipa::path(post, path = paths::PLACEMENT_EXPLAIN, tag = "tasks", request_body = TaskRequest,
    responses((status = 200, body = Explanation), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 413, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn explain_request(
    State(state): State<AppState>,
    caller: Caller,
    Extension(ids): Extension<RequestIds>,
    _: Known<NoParameters>,
    Body(mut request): Body<TaskRequest>,
) -> Result<Json<Explanation>, ApiError> {
    request.check()?;
    Ok(Json(state.control.explain_request(submission::facts(&mut request, &caller, &ids)).await?))
}

/// How a stream is read.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Reading {
    /// With `metrics` each second also while the task runs.
    #[serde(default)]
    verbose: bool,
    /// The name of the task's holder: needed where several have one of this id, and whoever asks sees
    /// them all.
    #[param(value_type = String, required = false)]
    holder: Option<String>,
}

/// Streams the events of a task, from the start or after `Last-Event-ID`.
///
/// Many may read. `token` and `reasoning` (thoughts, which a client that does not know them may pass over)
/// are counted together.
#[utoipa::path(get, path = paths::TASK_EVENTS, tag = "tasks",
    params(("task_id" = Uuid, Path), Reading, ("Last-Event-ID" = Option<String>, Header, description = "id of the last event that was seen")),
    responses((status = 200, content_type = "text/event-stream"), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 410, body = ErrorBody)))]
pub(crate) async fn events(
    State(state): State<AppState>,
    PathId(id): PathId<TaskId>,
    caller: Caller,
    reading: Result<Query<Reading>, QueryRejection>,
    end: Option<Extension<PeerEnd>>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let Reading { verbose, holder } = checked(reading)?;
    let record = holders::task(&state, &caller, Reach::Contents, id, &OfHolder { holder })?;
    let last = headers.get("last-event-id").map(|value| value.to_str().unwrap_or("unreadable"));
    stream(&state, &caller, &record, (last, verbose), None, end.as_deref()).await
}

async fn stream(
    state: &AppState,
    caller: &Caller,
    task: &TaskRecord,
    (last_event_id, verbose): (Option<&str>, bool),
    departure: Option<Departure>,
    end: Option<&PeerEnd>,
) -> Result<Response, ApiError> {
    let gauge = Gauge::new(state.control.clone(), verbose);
    let (stream, next) =
        state.streams.find(task.key, last_event_id).map_err(|error| known_by(task, error))?;
    let permit = stream.reader(caller)?;
    let departure = departure.or_else(|| {
        let (control, streams) = (state.control.clone(), Arc::clone(&state.streams));
        stream.is_canceled_unread().then(|| Departure::of_reader(control, streams, task.holder, task.id))
    });
    if departure.is_some() {
        departs_at_its_end(end);
    }
    let follower = Follower::new(permit, departure);
    let body = stream_body(readers::follow(stream, follower, next, task.key, gauge)).await;
    let kind = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store"), UNBUFFERED];
    Ok((StatusCode::OK, kind, body).into_response())
}

/// A task that went meanwhile is not found under the id that its holder knows.
fn known_by(task: &TaskRecord, error: ErrorBody) -> ErrorBody {
    if error.code == ErrorCode::NotFound { holders::no_task(task.id) } else { error }
}

/// Cancels a task, waiting or running.
///
/// Nothing but its terminal `error CANCELED` follows the answer.
#[utoipa::path(post, path = paths::TASK_CANCEL, tag = "tasks", params(("task_id" = Uuid, Path), OfHolder),
    responses((status = 204), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(crate) async fn cancel(
    State(state): State<AppState>,
    PathId(id): PathId<TaskId>,
    caller: Caller,
    of: Result<Query<OfHolder>, QueryRejection>,
) -> Result<StatusCode, ApiError> {
    let record = holders::task(&state, &caller, Reach::Metadata, id, &checked(of)?)?;
    state.control.cancel(record.key).await.map_err(|error| known_by(&record, error))?;
    Ok(StatusCode::NO_CONTENT)
}
