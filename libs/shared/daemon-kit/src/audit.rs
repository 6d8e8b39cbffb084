//! The audit log: who did what, from where, with which outcome. One JSON object a line.
//!
//! Written are calls that change something, and calls that were refused. What nodes and daemons
//! say to each other all the time (heartbeats, attempts) is not. A thread writes; a request never
//! waits for the disk. What cannot be kept up with is counted, and the count is written.

use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use jiff::Timestamp;
use parking_lot::Mutex;
use pool_registry_types::{ErrorBody, routes};
use serde::Serialize;

use crate::auth::Caller;
use crate::connections::Peer;
use crate::correlation::RequestIds;

/// Lines that may wait for the disk.
const WAITING: usize = 4096;
/// How long the end of a daemon waits for what is to be written.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// The file is looked for at its path again after this: something may have rotated it.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Why there is no audit log.
#[derive(Debug, thiserror::Error)]
#[error("LLORCH_AUDIT_LOG: {path} cannot be written: {source}")]
pub struct AuditError {
    path: String,
    #[source]
    source: std::io::Error,
}

/// Where lines go. Cheap to copy; without a file they go nowhere.
#[derive(Debug, Clone, Default)]
pub struct Audit(Option<Arc<Sink>>);

#[derive(Debug)]
struct Sink {
    /// Absent at the end only.
    lines: Option<SyncSender<Vec<u8>>>,
    lost: Arc<AtomicU64>,
    /// Closed when everything is written.
    written: Mutex<Receiver<()>>,
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.lines = None;
        // A disk that is dead does not keep the daemon.
        let _ = self.written.lock().recv_timeout(LAST_WORDS);
    }
}

#[derive(Serialize)]
struct Line<'l> {
    at: Timestamp,
    method: &'l str,
    path: &'l str,
    status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'static str>,
    /// The token's name; absent where none was shown, or none is configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    caller: Option<&'l str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fingerprint: Option<&'l str>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    certificate: &'l [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation_id: Option<&'l str>,
}

impl Audit {
    /// Appends to the file, which others may rename: it is then made anew. Blocks.
    pub fn open(path: &Path) -> Result<Self, AuditError> {
        let failed = |source| AuditError { path: path.display().to_string(), source };
        let file = append(path).map_err(failed)?;
        let (lines, waiting) = sync_channel(WAITING);
        let (done, written) = sync_channel(0);
        let lost = Arc::new(AtomicU64::new(0));
        let (path, counting) = (path.to_owned(), Arc::clone(&lost));
        let thread = std::thread::Builder::new().name("audit".into());
        // It ends when nobody can write any more.
        let writing = move || {
            write_all(file, &path, &waiting, &counting);
            drop(done);
        };
        thread.spawn(writing).map_err(failed)?;
        Ok(Self(Some(Arc::new(Sink { lines: Some(lines), lost, written: Mutex::new(written) }))))
    }

    fn write(&self, line: &Line<'_>) {
        let Some(sink) = &self.0 else { return };
        let mut text = serde_json::to_vec(line).unwrap_or_default();
        text.push(b'\n');
        if !sink.lines.as_ref().is_some_and(|lines| lines.try_send(text).is_ok()) {
            sink.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn append(path: &Path) -> std::io::Result<std::fs::File> {
    std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

fn write_all(mut file: std::fs::File, path: &PathBuf, waiting: &Receiver<Vec<u8>>, lost: &AtomicU64) {
    let mut complained = false;
    loop {
        let next = waiting.recv_timeout(LOOK_EVERY);
        let same = |file: &std::fs::File| {
            let here = std::fs::metadata(path).map(|about| (about.dev(), about.ino())).ok();
            here.is_some() && here == file.metadata().map(|about| (about.dev(), about.ino())).ok()
        };
        if !same(&file)
            && let Ok(new) = append(path)
        {
            file = new;
        }
        let mut text = match next {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => Vec::new(),
            Err(RecvTimeoutError::Disconnected) => return,
        };
        while let Ok(line) = waiting.try_recv() {
            text.extend_from_slice(&line);
        }
        let missing = lost.swap(0, Ordering::Relaxed);
        if missing > 0 {
            text.extend_from_slice(
                format!("{{\"at\":\"{}\",\"lost_lines\":{missing}}}\n", Timestamp::now()).as_bytes(),
            );
        }
        if text.is_empty() {
            continue;
        }
        match file.write_all(&text) {
            Ok(()) => complained = false,
            Err(error) if !complained => {
                complained = true;
                tracing::error!(%error, path = %path.display(), "the audit log cannot be written");
            }
            Err(_) => {}
        }
    }
}

fn is_chatter(path: &str) -> bool {
    matches!(path, routes::NODE_HEARTBEAT | routes::POOL_INFER)
}

/// Writes a line for each call that changes something or is refused.
pub async fn layer(State(audit): State<Audit>, request: Request, next: Next) -> Response {
    if audit.0.is_none() {
        return next.run(request).await;
    }
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let routed = request.extensions().get::<MatchedPath>().cloned();
    let peer = request.extensions().get::<Arc<Peer>>().cloned();
    let ids = request.extensions().get::<RequestIds>().cloned();
    let response = next.run(request).await;
    let status = response.status();
    let refused =
        [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN, StatusCode::TOO_MANY_REQUESTS].contains(&status);
    let reads = matches!(method, Method::GET | Method::HEAD | Method::OPTIONS);
    let chatter = routed.as_ref().is_some_and(|path| is_chatter(path.as_str()));
    if !refused && (reads || chatter) {
        return response;
    }
    let caller = response.extensions().get::<Caller>();
    let holder = caller.and_then(|caller| caller.holder.as_ref());
    let certificate = peer.as_ref().and_then(|peer| peer.certificate.as_ref());
    audit.write(&Line {
        at: Timestamp::now(),
        method: method.as_str(),
        path: &path,
        status: status.as_u16(),
        code: response.extensions().get::<ErrorBody>().map(|body| body.code.as_str()),
        caller: holder.map(|holder| holder.name.as_str()),
        fingerprint: holder.map(|holder| holder.fingerprint.as_str()),
        certificate: certificate.map_or(&[], |certificate| &certificate.names),
        peer: peer.as_ref().map(|peer| peer.addr.to_string()),
        correlation_id: ids.as_ref().map(|ids| ids.correlation_id.as_str()),
    });
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2505
    #[test]
    fn every_line_is_written_before_the_end_and_a_renamed_file_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (path, old) = (folder.path().join("audit"), folder.path().join("audit.1"));
        let audit = Audit::open(&path).unwrap();
        let write = |path: &str| {
            audit.write(&Line {
                at: Timestamp::UNIX_EPOCH,
                method: "POST",
                path,
                status: 202,
                code: None,
                caller: None,
                fingerprint: None,
                certificate: &[],
                peer: None,
                correlation_id: None,
            });
        };
        let lines = |path: &Path| std::fs::read_to_string(path).unwrap_or_default().lines().count();
        write("/one");
        while lines(&path) < 1 {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::fs::rename(&path, &old).unwrap();
        for _ in 0..1_000 {
            write("/more");
        }
        drop(audit);
        assert_eq!((lines(&old), lines(&path)), (1, 1_000));
        assert!(Audit::open(&folder.path().join("no/such/folder")).is_err());
    }
}
