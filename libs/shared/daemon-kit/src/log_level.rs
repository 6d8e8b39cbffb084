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
    /// Levels (`error`, `warn`, `info`, `debug`, `trace`, `off`) and `target=level`, with commas between them.
    #[schema(
        max_length = 4096,
        pattern = "^([A-Za-z_][A-Za-z0-9_:]*=)?(off|error|warn|info|debug|trace)(,([A-Za-z_][A-Za-z0-9_:]*=)?(off|error|warn|info|debug|trace))*$"
    )]
    filter: String,
}

/// Longest filter, bytes.
const MAX_FILTER: usize = 4096;

/// Whether the text is as the document says: what `LLORCH_LOG` may say beside that is for starts.
fn is_filter(text: &str) -> bool {
    let is_target = |target: &str| {
        let begins = target.starts_with(|sign: char| sign.is_ascii_alphabetic() || sign == '_');
        begins && target.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b':'))
    };
    let is_level = |level: &str| ["off", "error", "warn", "info", "debug", "trace"].contains(&level);
    text.split(',').all(|part| match part.split_once('=') {
        Some((target, level)) => is_target(target) && is_level(level),
        None => is_level(part),
    })
}

/// Changes what the daemon logs, until its restart.
#[utoipa::path(put, path = paths::LOG_LEVEL, tag = "meta", request_body = LogFilter,
    responses((status = 200, body = LogFilter), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
              (status = 403, body = ErrorBody), (status = 413, body = ErrorBody)))]
pub async fn put_log_level(Body(wanted): Body<LogFilter>) -> Result<Json<LogFilter>, ApiError> {
    if wanted.filter.len() > MAX_FILTER {
        let message = format!("filter: longer than {MAX_FILTER} bytes");
        return Err(ApiError::new(ErrorCode::InvalidParams, message));
    }
    if !is_filter(&wanted.filter) {
        let message = "filter: must be levels (off, error, warn, info, debug, trace) and target=level, with commas between them";
        return Err(ApiError::new(ErrorCode::InvalidParams, message));
    }
    let changed = telemetry::change_filter(&wanted.filter);
    changed.map_err(|bad| ApiError::new(ErrorCode::InvalidParams, format!("filter: {bad}")))?;
    Ok(Json(wanted))
}
