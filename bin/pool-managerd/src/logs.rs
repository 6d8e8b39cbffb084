//! `GET /v2/pools/{id}/logs`: what an engine has written, and, followed, what it writes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use daemon_kit::{ApiError, Caller, PathId, Tokens};
use futures::stream;
use pool_registry_types::{ErrorBody, ErrorCode, PoolId, ReplicaId, routes as paths};
use serde::Deserialize;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt, SeekFrom};
use utoipa::IntoParams;

use crate::state::AppState;

/// Bytes of the log's end that are given.
const LAST_BYTES: u64 = 64 * 1024;
/// Pause between two looks at a log that is followed.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Bytes of one read.
const PIECE: usize = 32 * 1024;

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Which {
    /// Needed where the pool has several replicas.
    #[param(value_type = ReplicaId, required = false)]
    replica_id: Option<ReplicaId>,
    /// Goes on until the client goes away.
    #[serde(default)]
    follow: bool,
}

/// What an engine of the pool has written last.
#[utoipa::path(get, path = paths::POOL_LOGS, params(("pool_id" = PoolId, Path), Which),
    responses((status = 200, content_type = "text/plain"), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub(crate) async fn logs(
    State(node): State<AppState>,
    PathId(id): PathId<PoolId>,
    caller: Caller,
    which: Result<Query<Which>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(which) = which.map_err(|bad| ApiError::new(ErrorCode::InvalidParams, bad.body_text()))?;
    let logs = node.own.logs(&id);
    let path = match (&which.replica_id, logs.len()) {
        (_, 0) => Err(ApiError::new(ErrorCode::NotFound, format!("no engine of pool {id} has written here"))),
        (Some(replica), _) => logs.get(replica.as_str()).cloned().ok_or_else(|| {
            ApiError::new(ErrorCode::NotFound, format!("no replica {replica} of pool {id} has written here"))
        }),
        (None, 1) => Ok(logs.into_values().next().unwrap_or_default()),
        (None, _) => {
            let all = logs.into_keys().collect::<Vec<_>>().join(", ");
            Err(ApiError::new(ErrorCode::InvalidParams, format!("replica_id: name one of {all}")))
        }
    }?;
    let admitted = (node.tokens.clone(), caller);
    let reading = Reading { path, file: None, at: 0, follow: which.follow, started: false, admitted };
    let pieces = stream::unfold(reading, |mut reading| async move {
        reading.next().await.map(|piece| (Ok::<_, std::io::Error>(piece), reading))
    });
    Ok((
        [(header::CONTENT_TYPE, "text/plain; charset=utf-8"), (header::CACHE_CONTROL, "no-store")],
        Body::from_stream(pieces),
    )
        .into_response())
}

struct Reading {
    path: PathBuf,
    file: Option<File>,
    at: u64,
    follow: bool,
    started: bool,
    admitted: (Tokens, Caller),
}

async fn length(path: &Path) -> u64 {
    tokio::fs::metadata(path).await.map_or(0, |about| about.len())
}

impl Reading {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(piece) = self.read().await {
                return Some(piece);
            }
            let (tokens, caller) = &self.admitted;
            if !self.follow || !tokens.still_admit(caller) {
                return None;
            }
            tokio::time::sleep(LOOK_EVERY).await;
            if length(&self.path).await < self.at {
                // It was turned over: the new file is read from its beginning.
                (self.file, self.at) = (None, 0);
            }
        }
    }

    async fn read(&mut self) -> Option<Bytes> {
        if self.file.is_none() {
            let mut file = File::open(&self.path).await.ok()?;
            if !self.started {
                self.started = true;
                self.at = length(&self.path).await.saturating_sub(LAST_BYTES);
                file.seek(SeekFrom::Start(self.at)).await.ok()?;
            }
            self.file = Some(file);
        }
        let mut piece = vec![0; PIECE];
        let read = self.file.as_mut()?.read(&mut piece).await.ok()?;
        piece.truncate(read);
        self.at += read as u64;
        (read > 0).then(|| Bytes::from(piece))
    }
}
