//! `PUT /v2/log-level`: what is logged, until the restart.

use axum::Json;
use pool_registry_types::{ErrorBody, ErrorCode, routes as paths};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::answer::ApiError;
use crate::extract::Body;
use crate::telemetry;

/// What is logged.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LogFilter {
    /// A level (`error`, `warn`, `info`, `debug`, `trace`, `off`) or a list of `target=level`, as in `LLORCH_LOG`.
    #[schema(max_length = 4096)]
    filter: String,
}

/// Longest filter, bytes.
const MAX_FILTER: usize = 4096;

/// Changes what the daemon logs, until its restart.
#[utoipa::path(put, path = paths::LOG_LEVEL, tag = "meta", request_body = LogFilter,
    responses((status = 200, body = LogFilter), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
              (status = 403, body = ErrorBody), (status = 413, body = ErrorBody)))]
pub async fn put_log_level(Body(wanted): Body<LogFilter>) -> Result<Json<LogFilter>, ApiError> {
    if wanted.filter.len() > MAX_FILTER {
        let message = format!("filter: longer than {MAX_FILTER} bytes");
        return Err(ApiError::new(ErrorCode::InvalidParams, message));
    }
    let changed = telemetry::change_filter(&wanted.filter);
    changed.map_err(|bad| ApiError::new(ErrorCode::InvalidParams, format!("filter: {bad}")))?;
    Ok(Json(wanted))
}
