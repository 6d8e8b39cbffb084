//! The audit log: who did what, from where, with which outcome. One JSON object a line.
//!
//! Written are calls that change something, and calls that were refused. What nodes and daemons
//! say to each other all the time (heartbeats, attempts) is not. A thread writes; a request never
//! waits for the disk. What cannot be kept up with is counted, and the count is written; so is what
//! strangers are refused too often, who could fill a disk with it.

use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request};
use axum::http::{Method, StatusCode};
use axum::response::Response;
use jiff::Timestamp;
use owned_tasks::Loops;
use parking_lot::Mutex;
use pool_registry_types::{ErrorBody, ErrorCode, TaskId, routes};
use serde::Serialize;

use crate::connections::Peer;
use crate::correlation::RequestIds;
use crate::tokens::Holder;

/// The status of a call whose client did not wait for the answer.
const CLIENT_GONE: u16 = 499;
/// Longest path that is written, characters.
const LONGEST_PATH: usize = 300;
/// Lines that may wait for the disk.
const WAITING: usize = 4096;
/// Lines of refused callers without a token that is known: so many at once, and so many a second from then
/// on. Source: .specs/01 CLOUD-2778.
const STRANGERS_LINES: u64 = 2_000;
const STRANGERS_LINES_PER_SECOND: u64 = 50;
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
pub(crate) struct Audit(Option<Arc<Sink>>);

#[derive(Debug)]
struct Sink {
    /// Absent at the end only.
    lines: Option<SyncSender<Vec<u8>>>,
    tally: Arc<Tally>,
    strangers: Allowance,
    /// Closed when everything is written.
    written: Mutex<Receiver<()>>,
}

/// Lines that may be written, and when they were counted last.
#[derive(Debug)]
struct Allowance(Mutex<(u64, Instant)>);

impl Allowance {
    fn new(now: Instant) -> Self {
        Self(Mutex::new((STRANGERS_LINES, now)))
    }

    /// Whether one more may be written.
    fn take(&self, now: Instant) -> bool {
        let mut allowance = self.0.lock();
        let (left, counted) = &mut *allowance;
        let seconds = now.saturating_duration_since(*counted).as_secs();
        if seconds > 0 {
            *left =
                left.saturating_add(seconds.saturating_mul(STRANGERS_LINES_PER_SECOND)).min(STRANGERS_LINES);
            *counted = now;
        }
        let may = *left > 0;
        *left = left.saturating_sub(1);
        may
    }
}

/// What the threads count for each other.
#[derive(Debug, Default)]
struct Tally {
    queued: AtomicUsize,
    lost: AtomicU64,
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
    /// Of the task that was submitted, or that the path names.
    #[serde(skip_serializing_if = "Option::is_none")]
    task_id: Option<TaskId>,
}

impl Audit {
    /// Appends to the file, which others may rename: it is then made anew. The writer is one of
    /// `loops`. Blocks.
    pub(crate) fn open(path: &Path, loops: &Loops) -> Result<Self, AuditError> {
        let failed = |source| AuditError { path: path.display().to_string(), source };
        let file = append(path).map_err(failed)?;
        let (lines, queue) = sync_channel(WAITING);
        let (done, written) = sync_channel(0);
        let tally = Arc::new(Tally::default());
        let mut writer =
            Writer { queue, tally: Arc::clone(&tally), path: path.to_owned(), file, _done: done };
        // It ends when nobody can write any more.
        loops.thread("audit log", move || writer.run()).map_err(failed)?;
        let strangers = Allowance::new(Instant::now());
        Ok(Self(Some(Arc::new(Sink { lines: Some(lines), tally, strangers, written: Mutex::new(written) }))))
    }

    /// Refusals have half of the room only: a flood of them displaces nothing else.
    fn write(&self, line: &Line<'_>, refused: bool) {
        let Some(sink) = &self.0 else { return };
        if refused && line.caller.is_none() && !sink.strangers.take(Instant::now()) {
            sink.tally.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut text = serde_json::to_vec(line).unwrap_or_default();
        text.push(b'\n');
        let has_room = !refused || sink.tally.queued.load(Ordering::Relaxed) < WAITING / 2;
        sink.tally.queued.fetch_add(1, Ordering::Relaxed);
        if !(has_room && sink.lines.as_ref().is_some_and(|lines| lines.try_send(text).is_ok())) {
            sink.tally.queued.fetch_sub(1, Ordering::Relaxed);
            sink.tally.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn append(path: &Path) -> std::io::Result<std::fs::File> {
    std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

struct Writer {
    queue: Receiver<Vec<u8>>,
    tally: Arc<Tally>,
    path: PathBuf,
    file: std::fs::File,
    /// Closed when the writer has gone.
    _done: SyncSender<()>,
}

impl Writer {
    fn run(&mut self) {
        let mut complained = false;
        loop {
            let first = match self.queue.recv_timeout(LOOK_EVERY) {
                Ok(line) => Some(line),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if !self.is_in_place()
                && let Ok(new) = append(&self.path)
            {
                self.file = new;
            }
            let lines: Vec<Vec<u8>> = first.into_iter().chain(self.queue.try_iter()).collect();
            self.tally.queued.fetch_sub(lines.len(), Ordering::Relaxed);
            let missing = self.tally.lost.swap(0, Ordering::Relaxed);
            if lines.is_empty() && missing == 0 {
                continue;
            }
            let mut text = Vec::new();
            if missing > 0 {
                // After a write that failed half-way, a line of its own.
                let start = if complained { "\n" } else { "" };
                let at = Timestamp::now();
                text.extend(format!("{start}{{\"at\":\"{at}\",\"lost_lines\":{missing}}}\n").bytes());
            }
            text.extend(lines.concat());
            match self.file.write_all(&text) {
                Ok(()) => complained = false,
                Err(error) => {
                    self.tally.lost.fetch_add(lines.len() as u64 + missing, Ordering::Relaxed);
                    if !std::mem::replace(&mut complained, true) {
                        tracing::error!(%error, path = %self.path.display(), "the audit log cannot be written");
                    }
                }
            }
        }
    }

    /// Whether the file is the one at the path.
    fn is_in_place(&self) -> bool {
        let which = |about: std::fs::Metadata| (about.dev(), about.ino());
        let here = std::fs::metadata(&self.path).map(which).ok();
        here.is_some() && here == self.file.metadata().map(which).ok()
    }
}

fn is_chatter(path: &str) -> bool {
    let attempts =
        matches!(path, routes::ATTEMPTS | routes::ATTEMPT | routes::ATTEMPTS_CONTROL | routes::POOL_INFER);
    attempts || path == routes::NODE_HEARTBEAT
}

/// What the gate finds out about a call.
#[derive(Debug, Clone, Default)]
pub(crate) struct Found {
    pub(crate) holder: Option<Arc<Holder>>,
    pub(crate) refused: Option<ErrorCode>,
}

/// A call that has no answer yet. Dropped without one, its client has gone: what it asked for may
/// have been done, so its line is written too.
#[derive(Debug)]
pub(crate) struct Call {
    audit: Audit,
    method: Method,
    path: String,
    /// Only looks, or one of very many: written when it was refused only.
    is_quiet: bool,
    peer: Option<Arc<Peer>>,
    correlation_id: String,
    found: Found,
    answered: Option<(StatusCode, Option<&'static str>)>,
    task_id: Option<TaskId>,
}

impl Call {
    /// What its line is to say of whoever calls, also where it is not waited for.
    pub(crate) fn found(&mut self, found: Found) {
        self.found = found;
    }

    pub(crate) fn answered(mut self, response: &Response) {
        let code = response.extensions().get::<ErrorBody>().map(|body| body.code.as_str());
        self.answered = Some((response.status(), code));
        let named = [routes::headers::TASK_ID, routes::headers::REQUEST_ID];
        let mut named = named.iter().filter_map(|name| response.headers().get(*name)?.to_str().ok());
        self.task_id = self.task_id.or_else(|| named.find_map(|id| id.parse().ok()));
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let Found { holder, refused } = std::mem::take(&mut self.found);
        let (status, code) = match self.answered {
            Some((status, code)) => (status.as_u16(), code),
            None => (CLIENT_GONE, refused.map(ErrorCode::as_str)),
        };
        let was_refused = refused.is_some() || [403, 429].contains(&status);
        if self.is_quiet && !was_refused {
            return;
        }
        let holder = holder.as_ref();
        let certificate = self.peer.as_ref().and_then(|peer| peer.certificate.as_ref());
        let line = Line {
            at: Timestamp::now(),
            method: self.method.as_str(),
            path: &self.path,
            status,
            code,
            caller: holder.map(|holder| holder.name.as_str()),
            fingerprint: holder.map(|holder| holder.fingerprint.as_str()),
            certificate: certificate.map_or(&[], |certificate| &certificate.names),
            peer: self.peer.as_ref().map(|peer| peer.addr.to_string()),
            correlation_id: Some(&self.correlation_id),
            task_id: self.task_id,
        };
        self.audit.write(&line, was_refused);
    }
}

/// Begins a call whose line is written when it was answered, if it changes something or is refused.
/// Nothing where there is no audit log.
pub(crate) fn begin(audit: &Audit, request: &Request, ids: &RequestIds) -> Option<Call> {
    audit.0.as_ref()?;
    let method = request.method().clone();
    let reads = matches!(method, Method::GET | Method::HEAD | Method::OPTIONS);
    let routed = request.extensions().get::<MatchedPath>();
    let is_quiet = reads || routed.is_some_and(|path| is_chatter(path.as_str()));
    Some(Call {
        audit: audit.clone(),
        method,
        path: request.uri().path().chars().take(LONGEST_PATH).collect(),
        is_quiet,
        peer: request.extensions().get::<Arc<Peer>>().cloned(),
        correlation_id: ids.correlation_id.clone(),
        found: Found::default(),
        answered: None,
        task_id: task_of(request.uri().path()),
    })
}

/// The task that a path is about.
fn task_of(path: &str) -> Option<TaskId> {
    path.strip_prefix(routes::TASKS)?.strip_prefix('/')?.split('/').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Gate;
    use crate::serve::{Edge, with_layers};

    // CLOUD-2505
    #[tokio::test]
    async fn who_hangs_up_before_the_answer_has_a_line_too() {
        use tower::ServiceExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit");
        let audit = Audit::open(&path, &Loops::default()).unwrap();
        let edge = Edge { gate: Gate::open(), audit: audit.clone(), calls: Arc::default(), page: None };
        let routes = axum::Router::new().route("/slow", axum::routing::post(std::future::pending::<&str>));
        let routes = with_layers(routes, edge);
        let request = |method: &str| {
            Request::builder().method(method).uri("/slow").body(axum::body::Body::empty()).unwrap()
        };
        let soon = Duration::from_millis(20);
        assert!(tokio::time::timeout(soon, routes.clone().oneshot(request("POST"))).await.is_err());
        routes.clone().oneshot(request("GET")).await.unwrap();
        drop((routes, audit));
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("\"status\":499") && text.lines().count() == 1, "{text}");
    }

    // CLOUD-2697
    #[tokio::test]
    async fn a_line_names_the_task_that_was_submitted_or_that_its_path_names() {
        use tower::ServiceExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit");
        let audit = Audit::open(&path, &Loops::default()).unwrap();
        let id = "0197a3c0-0000-7000-8000-000000000001";
        let mut routes = axum::Router::new();
        for (path, name, id) in [
            (routes::TASKS, routes::headers::TASK_ID, id),
            ("/v1/completions", routes::headers::REQUEST_ID, id),
            ("/v1/embeddings", routes::headers::REQUEST_ID, "theirs"),
            (routes::TASK_CANCEL, routes::headers::CORRELATION_ID, "c-1"),
        ] {
            routes = routes.route(path, axum::routing::post(move || async move { ([(name, id)], "") }));
        }
        let edge = Edge { gate: Gate::open(), audit: audit.clone(), calls: Arc::default(), page: None };
        let routes = with_layers(routes, edge);
        let cancel = format!("{}/{id}/cancel", routes::TASKS);
        for path in [routes::TASKS, "/v1/completions", &cancel, "/v1/embeddings"] {
            let request = Request::builder().method("POST").uri(path).body(axum::body::Body::empty());
            routes.clone().oneshot(request.unwrap()).await.unwrap();
        }
        drop((routes, audit));
        let text = std::fs::read_to_string(&path).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let named: Vec<_> = lines.map(|line| line["task_id"].as_str().map(str::to_owned)).collect();
        let id = Some(id.to_owned());
        assert_eq!(named, [id.clone(), id.clone(), id, None], "{text}");
    }

    // CLOUD-2778
    #[test]
    fn lines_of_strangers_come_to_an_end_that_those_of_others_do_not_and_some_come_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit");
        let audit = Audit::open(&path, &Loops::default()).unwrap();
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let allowance = Allowance::new(start);
        let takes = |now: Instant| (0..5_000).filter(|_| allowance.take(now)).count();
        assert_eq!((takes(start), takes(start + second / 2)), (2_000, 0));
        assert_eq!((takes(start + second), takes(start + 3 * second)), (50, 100));
        assert_eq!(takes(start + 1_000 * second), 2_000);
        for n in 0..3_000 {
            let line = Line {
                at: Timestamp::UNIX_EPOCH,
                method: "POST",
                path: "/v2/tasks",
                status: 401,
                code: None,
                caller: (n % 2 == 0).then_some("known"),
                fingerprint: None,
                certificate: &[],
                peer: None,
                correlation_id: None,
                task_id: None,
            };
            // No faster than it is written.
            while audit.0.as_ref().unwrap().tally.queued.load(Ordering::Relaxed) > WAITING / 4 {
                std::thread::yield_now();
            }
            audit.write(&line, true);
            audit.write(&Line { caller: None, ..line }, true);
        }
        drop(audit);
        let text = std::fs::read_to_string(&path).unwrap();
        let known = text.lines().filter(|line| line.contains("known")).count();
        let strangers =
            text.lines().filter(|line| line.contains("\"status\":401") && !line.contains("known")).count();
        let lost: usize = text
            .lines()
            .filter_map(|line| {
                line.split_once("\"lost_lines\":")?.1.trim_end_matches('}').parse::<usize>().ok()
            })
            .sum();
        assert_eq!(known, 1_500);
        // What was left out behind the last line is in none.
        assert!((2_000..3_000).contains(&strangers), "{strangers}");
        assert!(lost > 0 && strangers + lost <= 4_500, "{lost}");
    }

    // CLOUD-2505
    #[test]
    fn every_line_is_written_before_the_end_and_a_renamed_file_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (path, old) = (folder.path().join("audit"), folder.path().join("audit.1"));
        let audit = Audit::open(&path, &Loops::default()).unwrap();
        let write = |path: &str| {
            let line = Line {
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
                task_id: None,
            };
            audit.write(&line, false);
        };
        let lines = |path: &Path| std::fs::read_to_string(path).unwrap_or_default().lines().count();
        write("/one");
        let start = std::time::Instant::now();
        while lines(&path) < 1 {
            assert!(start.elapsed() < Duration::from_secs(5), "it is not written");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::fs::rename(&path, &old).unwrap();
        for _ in 0..1_000 {
            write("/more");
        }
        drop(audit);
        assert_eq!((lines(&old), lines(&path)), (1, 1_000));
        assert!(Audit::open(&folder.path().join("no/such/folder"), &Loops::default()).is_err());
    }
}
