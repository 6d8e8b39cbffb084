//! Downloads of models: resumed where they broke off, and verified before anything is said of them.
//!
//! The beginning that is on the disk counts only together with the server's own validator of what it
//! is a beginning of (a strong ETag, or a time of change): `If-Range` asks the server, and one
//! that answers with the whole starts it over. The digest is reckoned over what lies on the disk. Of a
//! length that nobody says, a disk is filled to what stays free on it and no further.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use node_registration::body::read_at_most;
use pool_registry_types::{Backoff, Digest, RetryPolicy};
use reqwest::header::{self, HeaderMap};
use reqwest::redirect::Policy;
use reqwest::{Client, ClientBuilder, Response, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::AsyncWriteExt;

use crate::engines::client::with_causes;
use crate::source::{ModelSource, check_place};

/// Bound of connecting to a server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest silence of a server that sends.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Tries without a new byte, before a download is given up.
const RETRIES: RetryPolicy =
    RetryPolicy::new(6, Backoff::new(Duration::from_millis(250), Duration::from_secs(8)));
/// Largest list of a repository's files, bytes.
const MAX_LIST: usize = 8 * 1024 * 1024;
/// Bytes that stay free on the disk.
const SPARE_BYTES: u64 = 64 * 1024 * 1024;
/// While bytes arrive the disk is looked at before each so many of them.
pub(crate) const PIECE_BYTES: u64 = 4 * 1024 * 1024;
/// Most redirects of one request.
const MAX_HOPS: usize = 5;

/// The hub that `hf:` sources name.
#[derive(Debug, Clone, Copy)]
pub struct Hub<'a> {
    /// `https://huggingface.co`, or one's own.
    pub endpoint: &'a str,
    pub token: Option<&'a SecretString>,
}

/// A file on a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Remote {
    pub url: String,
    /// The file's name.
    pub file: String,
    /// What the hub says its content is.
    pub digest: Option<Digest>,
    /// The hub's token goes with the request.
    of_hub: bool,
}

/// Why a download came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    #[error("{url}: HTTP {status}{}", hint(*status))]
    Status { url: String, status: u16 },
    #[error("{url}: {reason}")]
    Broken { url: String, reason: String },
    #[error("{repository} has {} files that end in .gguf, name one: {}", .files.len(), .files.join(", "))]
    WhichFile { repository: String, files: Vec<String> },
    #[error("{}: {needed} bytes are needed and {free} are free", folder.display())]
    NoSpace { folder: PathBuf, needed: u64, free: u64 },
    #[error("{}: {source}", path.display())]
    Disk {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

fn hint(status: u16) -> &'static str {
    match status {
        401 | 403 => ", a token may be needed: set HF_TOKEN",
        404 => ", there is no such file",
        _ => "",
    }
}

/// What the beginning on the disk is a beginning of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Begun {
    url: String,
    validator: Option<String>,
    bytes: Option<u64>,
}

/// A client for downloads.
pub fn client() -> reqwest::Result<Client> {
    builder().connect_timeout(CONNECT_TIMEOUT).read_timeout(IDLE_TIMEOUT).build()
}

/// Of clients that follow redirects to where a source could be, and to where the request began.
fn builder() -> ClientBuilder {
    let policy = Policy::custom(|attempt| {
        let origin = attempt.previous().first().map(reqwest::Url::origin);
        if attempt.previous().len() > MAX_HOPS {
            return attempt.error(BadHop(format!("more than {MAX_HOPS} redirects")));
        }
        match check_place(attempt.url()) {
            Err(what) if origin != Some(attempt.url().origin()) => {
                let hop = BadHop(format!(
                    "the redirect to {} {what}",
                    attempt.url().origin().ascii_serialization()
                ));
                attempt.error(hop)
            }
            _ => attempt.follow(),
        }
    });
    Client::builder().redirect(policy)
}

/// Why a redirect is not followed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct BadHop(String);

/// How many bytes the file system of a folder has for us.
pub(crate) type FreeBytes = fn(&Path) -> io::Result<u64>;

/// Bytes that the file system of the folder has for us.
pub(crate) fn free_bytes(folder: &Path) -> io::Result<u64> {
    let about = nix::sys::statvfs::statvfs(folder)?;
    Ok(about.blocks_available() * about.fragment_size())
}

/// Says before anything is written whether so many bytes fit.
pub(crate) fn check_space(folder: &Path, needed: u64, free: FreeBytes) -> Result<(), DownloadError> {
    let disk = |source| DownloadError::Disk { path: folder.to_owned(), source };
    let free = free(folder).map_err(disk)?;
    if free < needed.saturating_add(SPARE_BYTES) {
        return Err(DownloadError::NoSpace { folder: folder.to_owned(), needed, free });
    }
    Ok(())
}

/// Finds the file that a source names; a file on this machine is none.
pub(crate) async fn resolve(
    client: &Client,
    hub: &Hub<'_>,
    source: &ModelSource,
) -> Result<Option<Remote>, DownloadError> {
    let (repository, revision, file) = match source {
        ModelSource::File(_) => return Ok(None),
        ModelSource::Web(url) => {
            let file =
                url.split(['?', '#']).next().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
            let file = file.to_owned();
            return Ok(Some(Remote { url: url.clone(), file, digest: None, of_hub: false }));
        }
        ModelSource::Hub { repository, revision, file } => (repository, revision, file),
    };
    let endpoint = hub.endpoint.trim_end_matches('/');
    let list_url = format!("{endpoint}/api/models/{repository}/tree/{revision}?recursive=true");
    let list = list(client, hub, &list_url).await?;
    let models: Vec<(&str, Option<Digest>)> = list
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let path = entry["path"].as_str().filter(|path| path.ends_with(".gguf"))?;
            let digest =
                entry["lfs"]["oid"].as_str().and_then(|oid| Digest::new(&format!("sha256:{oid}")).ok());
            Some((path, digest))
        })
        .collect();
    let (path, digest) = match (file, models.as_slice()) {
        (Some(file), models) => {
            let known = models.iter().find(|(path, _)| path == file);
            (file.as_str(), known.and_then(|(_, digest)| digest.clone()))
        }
        (None, [(path, digest)]) => (*path, digest.clone()),
        (None, models) => {
            let files = models.iter().map(|(path, _)| (*path).to_owned()).collect();
            return Err(DownloadError::WhichFile { repository: repository.clone(), files });
        }
    };
    let url = format!("{endpoint}/{repository}/resolve/{revision}/{path}");
    let file = path.rsplit('/').next().unwrap_or(path).to_owned();
    Ok(Some(Remote { url, file, digest, of_hub: true }))
}

async fn list(client: &Client, hub: &Hub<'_>, url: &str) -> Result<Value, DownloadError> {
    let broken = |reason: String| DownloadError::Broken { url: url.to_owned(), reason };
    let mut call = client.get(url).timeout(IDLE_TIMEOUT);
    if let Some(token) = hub.token {
        call = call.bearer_auth(token.expose_secret());
    }
    let response = call.send().await.map_err(|error| broken(crate::engines::describe(error)))?;
    let status = response.status().as_u16();
    if !response.status().is_success() {
        return Err(DownloadError::Status { url: url.to_owned(), status });
    }
    let body = read_at_most(reqwest::Body::from(response), MAX_LIST).await;
    let body = body.map_err(|error| broken(with_causes(&error)))?;
    serde_json::from_slice(&body).map_err(|error| broken(format!("its list is unreadable: {error}")))
}

/// Where a download stands.
struct Part<'a> {
    path: &'a Path,
    begun: Option<Begun>,
    done: u64,
}

impl Part<'_> {
    fn begun_path(&self) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(".begun");
        name.into()
    }

    async fn open<'p>(path: &'p Path, url: &str) -> Part<'p> {
        let mut part = Part { path, begun: None, done: 0 };
        let begun = tokio::fs::read(part.begun_path()).await.ok();
        let begun: Option<Begun> = begun.and_then(|text| serde_json::from_slice(&text).ok());
        // Without a validator nothing says what the beginning is of.
        part.begun = begun.filter(|begun| begun.url == url && begun.validator.is_some());
        if part.begun.is_some() {
            part.done = tokio::fs::metadata(path).await.map_or(0, |about| about.len());
        }
        part
    }

    async fn start_over(&mut self, begun: Begun) -> io::Result<()> {
        self.done = 0;
        tokio::fs::write(self.path, b"").await?;
        tokio::fs::write(self.begun_path(), serde_json::to_vec(&begun)?).await?;
        self.begun = Some(begun);
        Ok(())
    }
}

/// Downloads into `path`, going on where an earlier try has stopped. Returns how many bytes that
/// had left. `progress` is told the bytes done and, where the server says so, all of them.
pub(crate) async fn download(
    client: &Client,
    hub: &Hub<'_>,
    remote: &Remote,
    path: &Path,
    free: FreeBytes,
    progress: &mut (dyn FnMut(u64, Option<u64>) + Send),
) -> Result<u64, DownloadError> {
    let mut part = Part::open(path, &remote.url).await;
    let resumed_at = part.done;
    let mut failures = 0;
    loop {
        let before = part.done;
        match attempt(client, hub, remote, &mut part, free, progress).await {
            Ok(()) => {
                // The validator has done its work; one that stays does no harm.
                let _ = tokio::fs::remove_file(part.begun_path()).await;
                return Ok(resumed_at);
            }
            Err(Failed::ForGood(error)) => return Err(error),
            Err(Failed::Perhaps(error)) => {
                failures = if part.done > before { 0 } else { failures + 1 };
                let Some(pause) = RETRIES.pause_after(failures) else { return Err(error) };
                tracing::info!(url = remote.url, done = part.done, %error, "a download broke off and goes on");
                tokio::time::sleep(pause).await;
            }
        }
    }
}

enum Failed {
    ForGood(DownloadError),
    /// Another try may do better.
    Perhaps(DownloadError),
}

async fn attempt(
    client: &Client,
    hub: &Hub<'_>,
    remote: &Remote,
    part: &mut Part<'_>,
    free: FreeBytes,
    progress: &mut (dyn FnMut(u64, Option<u64>) + Send),
) -> Result<(), Failed> {
    let broken = |reason: String| Failed::Perhaps(DownloadError::Broken { url: remote.url.clone(), reason });
    let path = part.path.to_owned();
    let disk = |source: io::Error| Failed::ForGood(DownloadError::Disk { path: path.clone(), source });
    if let Some(all) = part.begun.as_ref().and_then(|begun| begun.bytes)
        && part.done == all
        && all > 0
    {
        return Ok(());
    }
    let mut call = client.get(&remote.url).header(header::ACCEPT_ENCODING, "identity");
    if let Some(token) = hub.token.filter(|_| remote.of_hub) {
        call = call.bearer_auth(token.expose_secret());
    }
    if let Some(validator) =
        part.begun.as_ref().and_then(|begun| begun.validator.clone()).filter(|_| part.done > 0)
    {
        call =
            call.header(header::RANGE, format!("bytes={}-", part.done)).header(header::IF_RANGE, validator);
    }
    let response = call.send().await.map_err(|error| {
        let leads_astray = error.is_redirect();
        match broken(crate::engines::describe(error)) {
            // Its server would say the same again.
            Failed::Perhaps(error) if leads_astray => Failed::ForGood(error),
            failed => failed,
        }
    })?;
    let status = response.status();
    match status {
        StatusCode::PARTIAL_CONTENT if range_start(response.headers()) == Some(part.done) => {}
        StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
            // What is on the disk is a beginning of something else.
            part.start_over(Begun { url: remote.url.clone(), validator: None, bytes: None })
                .await
                .map_err(disk)?;
            return Err(broken(format!("it answers HTTP {} to a range", status.as_u16())));
        }
        status if status.is_success() => {
            let begun = Begun {
                url: remote.url.clone(),
                validator: validator(response.headers()),
                bytes: response.content_length(),
            };
            part.start_over(begun).await.map_err(disk)?;
        }
        status => {
            let error = DownloadError::Status { url: remote.url.clone(), status: status.as_u16() };
            let again = status.is_server_error() || matches!(status.as_u16(), 408 | 429);
            return Err(if again { Failed::Perhaps(error) } else { Failed::ForGood(error) });
        }
    }
    let all = part.begun.as_ref().and_then(|begun| begun.bytes);
    let folder = part.path.parent().unwrap_or(Path::new(".")).to_owned();
    check_space(&folder, all.map_or(0, |all| all.saturating_sub(part.done)), free)
        .map_err(Failed::ForGood)?;
    let look = |needed| check_space(&folder, needed, free);
    receive(response, part, all, &look, progress).await.map_err(|error| match error {
        Received::Disk(source) => disk(source),
        Received::NoSpace(error) => Failed::ForGood(error),
        Received::Broken(reason) => broken(reason),
    })?;
    match all {
        Some(all) if part.done < all => Err(broken(format!("it ended after {} of {all} bytes", part.done))),
        _ => Ok(()),
    }
}

enum Received {
    Disk(io::Error),
    NoSpace(DownloadError),
    Broken(String),
}

async fn receive(
    response: Response,
    part: &mut Part<'_>,
    all: Option<u64>,
    look: &(dyn Fn(u64) -> Result<(), DownloadError> + Send + Sync),
    progress: &mut (dyn FnMut(u64, Option<u64>) + Send),
) -> Result<(), Received> {
    let file = tokio::fs::OpenOptions::new().append(true).create(true).open(part.path).await;
    let mut file = tokio::io::BufWriter::with_capacity(1024 * 1024, file.map_err(Received::Disk)?);
    let mut pieces = response.bytes_stream();
    let mut outcome = Ok(());
    let (mut received, mut looked) = (0, 0);
    while let Some(piece) = pieces.next().await {
        match piece {
            Ok(piece) => {
                if received + piece.len() as u64 > looked {
                    // What was taken is on the disk, or the disk would look freer than it is.
                    file.flush().await.map_err(Received::Disk)?;
                    look(PIECE_BYTES.max(piece.len() as u64)).map_err(Received::NoSpace)?;
                    looked = received + PIECE_BYTES.max(piece.len() as u64);
                }
                file.write_all(&piece).await.map_err(Received::Disk)?;
                received += piece.len() as u64;
                progress(part.done + received, all);
            }
            Err(error) => {
                outcome = Err(Received::Broken(crate::engines::describe(error)));
                break;
            }
        }
    }
    file.flush().await.map_err(Received::Disk)?;
    file.get_ref().sync_all().await.map_err(Received::Disk)?;
    part.done += received;
    outcome
}

/// The first byte that a partial answer brings.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    let range = headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// What `If-Range` may name: a strong ETag, else the time of the last change.
fn validator(headers: &HeaderMap) -> Option<String> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    text(header::ETAG).filter(|tag| !tag.starts_with("W/")).or_else(|| text(header::LAST_MODIFIED))
}

#[cfg(test)]
#[path = "download_tests.rs"]
mod tests;
