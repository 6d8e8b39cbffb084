//! What an engine of the node's own has written, and, followed, what it writes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use pool_registry_types::{ErrorBody, ErrorCode, PoolId, ReplicaId};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt, SeekFrom};

use crate::node::Node;

/// Bytes of the log's end that are given.
const LAST_BYTES: u64 = 64 * 1024;
/// Pause between two looks at a log that is followed.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Bytes of one read.
const PIECE: usize = 32 * 1024;

/// Reads the log of one replica, from its last 64 KiB on.
#[derive(Debug)]
pub struct LogReader {
    path: PathBuf,
    file: Option<File>,
    at: u64,
    started: bool,
}

impl Node {
    /// The log of the pool's replica, which must be named where it has several. Errors: `NOT_FOUND`,
    /// and `INVALID_PARAMS` where one is to be named.
    pub fn open_log(&self, pool_id: &PoolId, replica_id: Option<&ReplicaId>) -> Result<LogReader, ErrorBody> {
        let logs = self.logs(pool_id);
        let not_found = |message| Err(ErrorBody::new(ErrorCode::NotFound, message));
        let path = match (replica_id, logs.len()) {
            (_, 0) => not_found(format!("no engine of pool {pool_id} has written here")),
            (Some(replica), _) => match logs.get(replica.as_str()) {
                Some(path) => Ok(path.clone()),
                None => not_found(format!("no replica {replica} of pool {pool_id} has written here")),
            },
            (None, 1) => Ok(logs.into_values().next().unwrap_or_default()),
            (None, _) => {
                let all = logs.into_keys().collect::<Vec<_>>().join(", ");
                Err(ErrorBody::invalid(format!("replica_id: name one of {all}")))
            }
        }?;
        Ok(LogReader { path, file: None, at: 0, started: false })
    }
}

async fn length(path: &Path) -> u64 {
    tokio::fs::metadata(path).await.map_or(0, |about| about.len())
}

impl LogReader {
    /// The next piece; at the log's end it waits for more for as long as `goes_on` says so.
    pub async fn next(&mut self, goes_on: impl Fn() -> bool) -> Option<Bytes> {
        loop {
            if let Some(piece) = self.read().await {
                return Some(piece);
            }
            if !goes_on() {
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
