//! Downloads of models: resumed where they broke off, and verified before anything is said of them.
//!
//! The beginning that is on the disk counts only together with the server's own validator of what it
//! is a beginning of (a strong ETag, or a time of change): `If-Range` asks the server, and one
//! that answers with the whole starts it over. The digest is reckoned over what lies on the disk. Of a
//! length that nobody says, a disk is filled to what stays free on it and no further.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use node_registration::body::read_at_most;
use pool_registry_types::{Backoff, Digest, RetryPolicy};
use reqwest::header::{self, HeaderMap};
use reqwest::redirect::Policy;
use reqwest::{Client, ClientBuilder, Response, StatusCode, Url};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::AsyncWriteExt;

use crate::engines::client::with_causes;
use crate::models::{all_names, is_later_part};
use crate::source::{ModelSource, check_place};

/// Bound of connecting to a server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest silence of a server that sends.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Tries without a new byte, before a download is given up.
const RETRIES: RetryPolicy =
    RetryPolicy::new(6, Backoff::new(Duration::from_millis(250), Duration::from_secs(8)));
/// Largest page of a list of a repository's files, bytes.
const MAX_LIST: usize = 8 * 1024 * 1024;
/// Most pages of one list.
const MAX_PAGES: usize = 100;
/// Most files of a repository that could be models.
const MAX_FILES: usize = 10_000;
/// Longest wait that a server may ask for. The hub counts its requests in windows of five minutes.
const MAX_WAIT: Duration = Duration::from_secs(300);
/// How the name of a file ends that says what a beginning is of.
const BEGUN: &str = ".begun";
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
    /// How long the hub says it is.
    pub bytes: Option<u64>,
    /// The hub's token goes with the request.
    of_hub: bool,
}

/// Why a download came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    #[error("{url}: HTTP {status}{}", hint(*status))]
    Status { url: String, status: u16 },
    #[error(
        "{url}: its list is longer than {MAX_PAGES} pages of {MAX_LIST} bytes and {MAX_FILES} models: name a file"
    )]
    LongList { url: String },
    #[error("{url}: {reason}")]
    Broken { url: String, reason: String },
    #[error("{repository} has {} models that end in .gguf, name one: {}", .files.len(), .files.join(", "))]
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
        429 => ", it has been asked too often",
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

/// Finds the files that a source names, in order: a model may be several. A file on this machine is none.
pub(crate) async fn resolve(
    client: &Client,
    hub: &Hub<'_>,
    source: &ModelSource,
) -> Result<Option<Vec<Remote>>, DownloadError> {
    let (repository, revision, file) = match source {
        ModelSource::File(_) => return Ok(None),
        ModelSource::Web(url) => return Ok(Some(of_web(url))),
        ModelSource::Hub { repository, revision, file } => (repository, revision, file),
    };
    let endpoint = hub.endpoint.trim_end_matches('/');
    let list_url = format!("{endpoint}/api/models/{repository}/tree/{revision}?recursive=true");
    let wanted: Vec<String> =
        file.iter().flat_map(|file| in_folder_of(file, all_names(name_of(file)))).collect();
    let models = list(client, hub, &list_url, &wanted).await?;
    let path = match file {
        Some(file) => file.clone(),
        None => {
            let name = |path: &str| name_of(path).to_lowercase();
            // A projector goes beside a model, and a later part belongs to its first.
            let is_model = |path: &&String| !name(path).contains("mmproj") && !is_later_part(&name(path));
            match models.keys().filter(is_model).collect::<Vec<_>>().as_slice() {
                [path] => (*path).clone(),
                files => {
                    let files = files.iter().map(|path| (*path).clone()).collect();
                    return Err(DownloadError::WhichFile { repository: repository.clone(), files });
                }
            }
        }
    };
    let remote = |path: String| {
        let known = models.get(&path).cloned().unwrap_or_default();
        let url = format!("{endpoint}/{repository}/resolve/{revision}/{path}");
        Remote {
            url,
            file: name_of(&path).to_owned(),
            digest: known.digest,
            bytes: known.bytes,
            of_hub: true,
        }
    };
    Ok(Some(in_folder_of(&path, all_names(name_of(&path))).into_iter().map(remote).collect()))
}

fn name_of(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// The names as paths beside the given one.
fn in_folder_of(path: &str, names: Vec<String>) -> Vec<String> {
    match path.rsplit_once('/') {
        Some((folder, _)) => names.into_iter().map(|name| format!("{folder}/{name}")).collect(),
        None => names,
    }
}

/// The files of a model on a web server: parts lie beside each other.
fn of_web(url: &str) -> Vec<Remote> {
    let (path, query) = url.split_at(url.find(['?', '#']).unwrap_or(url.len()));
    let (folder, name) = path.rsplit_once('/').unwrap_or((path, ""));
    let remote = |file: String| Remote {
        url: format!("{folder}/{file}{query}"),
        file,
        digest: None,
        bytes: None,
        of_hub: false,
    };
    all_names(name).into_iter().map(remote).collect()
}

/// What the hub says of a file.
#[derive(Debug, Clone, Default)]
struct Known {
    digest: Option<Digest>,
    bytes: Option<u64>,
}

/// The models of a repository by their paths, over all pages of its list, or until all that are wanted are
/// found.
async fn list(
    client: &Client,
    hub: &Hub<'_>,
    first: &str,
    wanted: &[String],
) -> Result<BTreeMap<String, Known>, DownloadError> {
    let mut models = BTreeMap::new();
    let mut next = Some(first.to_owned());
    for _ in 0..MAX_PAGES {
        let Some(url) = next.take() else { return Ok(models) };
        let mut patience = Patience::default();
        let (entries, after) = loop {
            match page(client, hub, &url).await {
                Ok(page) => break page,
                Err(failed) => patience.wait(&url, failed, false).await?,
            }
        };
        for entry in entries.as_array().into_iter().flatten() {
            let Some(path) = entry["path"].as_str().filter(|path| path.to_lowercase().ends_with(".gguf"))
            else {
                continue;
            };
            let oid = entry["lfs"]["oid"].as_str();
            let digest = oid.and_then(|oid| Digest::new(&format!("sha256:{oid}")).ok());
            models.insert(path.to_owned(), Known { digest, bytes: entry["size"].as_u64() });
        }
        if !wanted.is_empty() && wanted.iter().all(|path| models.contains_key(path)) {
            return Ok(models);
        }
        next = after;
        if models.len() > MAX_FILES {
            break;
        }
    }
    match next {
        // One that is named need not be in the list.
        _ if !wanted.is_empty() => Ok(models),
        None if models.len() <= MAX_FILES => Ok(models),
        _ => Err(DownloadError::LongList { url: first.to_owned() }),
    }
}

/// One page of a list, and where the next one is.
async fn page(client: &Client, hub: &Hub<'_>, url: &str) -> Result<(Value, Option<String>), Failed> {
    let broken = |reason: String| DownloadError::Broken { url: url.to_owned(), reason };
    let mut call = client.get(url).timeout(IDLE_TIMEOUT);
    if let Some(token) = hub.token {
        call = call.bearer_auth(token.expose_secret());
    }
    let response = call.send().await.map_err(|error| unsent(url, error))?;
    if !response.status().is_success() {
        return Err(refused(url, &response));
    }
    let after = next_page(response.headers(), url).map_err(|elsewhere| {
        let reason = format!("its list goes on at {elsewhere}, which is another server");
        Failed::ForGood(broken(reason))
    })?;
    let body = read_at_most(reqwest::Body::from(response), MAX_LIST).await;
    let body = body.map_err(|error| Failed::perhaps(broken(with_causes(&error))))?;
    let entries = serde_json::from_slice(&body);
    Ok((entries.map_err(|error| Failed::ForGood(broken(format!("its list is unreadable: {error}"))))?, after))
}

/// Where the list goes on, at the same server: a token goes with the request. Source: RFC 8288, as the hub
/// uses it. Errors: the other server.
fn next_page(headers: &HeaderMap, of: &str) -> Result<Option<String>, String> {
    let Some(next) = linked_next(headers, of) else { return Ok(None) };
    let is_same = Url::parse(of).is_ok_and(|of| of.origin() == next.origin());
    if is_same { Ok(Some(next.to_string())) } else { Err(next.origin().ascii_serialization()) }
}

fn linked_next(headers: &HeaderMap, of: &str) -> Option<Url> {
    let of = Url::parse(of).ok()?;
    let links = headers.get_all(header::LINK).iter().filter_map(|value| value.to_str().ok());
    let next = links.flat_map(|value| value.split(',')).find_map(|link| {
        let (target, about) = link.trim().strip_prefix('<')?.split_once('>')?;
        let about = about.to_lowercase();
        about.split(';').any(|word| matches!(word.trim(), "rel=\"next\"" | "rel=next")).then_some(target)
    })?;
    of.join(next).ok()
}

/// Where it stands what the beginning at `path` is a beginning of.
fn begun_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(BEGUN);
    name.into()
}

/// How long the server has said that the file at `path` is.
pub(crate) fn begun_bytes(path: &Path) -> Option<u64> {
    let text = std::fs::read(begun_path(path)).ok()?;
    serde_json::from_slice::<Begun>(&text).ok()?.bytes
}

/// Once a download is whole nothing needs to be known of its beginning.
pub(crate) fn forget_begun(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(begun_path(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Bytes of the downloads under way in a folder, and all where every one has said its length.
pub(crate) fn under_way(folder: &Path) -> (u64, Option<u64>) {
    let (mut done, mut all, mut begun, mut wanted) = (0_u64, Some(0_u64), 0, 0);
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        match name.strip_suffix(BEGUN) {
            Some(of) => {
                let text = std::fs::read(entry.path()).ok();
                let about: Option<Begun> = text.and_then(|text| serde_json::from_slice(&text).ok());
                all = all
                    .zip(about.and_then(|about| about.bytes))
                    .map(|(sum, bytes)| sum.saturating_add(bytes));
                wanted = all_names(of).len();
                begun += 1;
            }
            None if name.ends_with(".json") => {}
            None => done += entry.metadata().map_or(0, |about| about.len()),
        }
    }
    (done, all.filter(|_| begun > 0 && begun == wanted))
}

/// Where a download stands.
struct Part<'a> {
    path: &'a Path,
    begun: Option<Begun>,
    done: u64,
}

impl Part<'_> {
    fn begun_path(&self) -> PathBuf {
        begun_path(self.path)
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

    /// What is there is all of it: a server that says no length ends with its answer.
    async fn is_whole(&mut self) -> io::Result<()> {
        if let Some(begun) = &mut self.begun {
            begun.bytes = Some(self.done);
            tokio::fs::write(begun_path(self.path), serde_json::to_vec(begun)?).await?;
        }
        Ok(())
    }

    async fn start_over(&mut self, begun: Begun) -> io::Result<()> {
        self.done = 0;
        tokio::fs::write(self.path, b"").await?;
        tokio::fs::write(self.begun_path(), serde_json::to_vec(&begun)?).await?;
        self.begun = Some(begun);
        Ok(())
    }
}

/// Downloads all files of a model into a folder, as [`download`] does each. `progress` is told of all together.
pub(crate) async fn download_all(
    client: &Client,
    hub: &Hub<'_>,
    remotes: &[Remote],
    folder: &Path,
    free: FreeBytes,
    progress: &mut (dyn FnMut(u64, Option<u64>) + Send),
) -> Result<u64, DownloadError> {
    let all: Option<u64> = remotes.iter().map(|remote| remote.bytes).sum();
    if let Some(all) = all.filter(|_| remotes.len() > 1) {
        // Else the disk would be found too small at the last of them.
        check_space(folder, all.saturating_sub(under_way(folder).0), free)?;
    }
    let (mut before, mut resumed_at) = (0, 0);
    for remote in remotes {
        let path = folder.join(&remote.file);
        let several = remotes.len() > 1;
        let mut reported = |done: u64, of_file: Option<u64>| {
            progress(before + done, if several { all } else { of_file.or(all) });
        };
        resumed_at += download(client, hub, remote, &path, free, &mut reported).await?;
        let about = tokio::fs::metadata(&path).await;
        before += about.map_err(|source| DownloadError::Disk { path, source })?.len();
    }
    Ok(resumed_at)
}

/// Downloads into `path`, going on where an earlier try has stopped. Returns how many bytes that
/// had left. `progress` is told the bytes done and, where the server says so, all of them. What it was a
/// beginning of stays beside it until [`forget_begun`]: of several files one that is whole is not fetched
/// again, unless its server has another by now.
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
    let mut patience = Patience::default();
    loop {
        let before = part.done;
        match attempt(client, hub, remote, &mut part, free, progress).await {
            Ok(()) => return Ok(resumed_at),
            Err(failed) => patience.wait(&remote.url, failed, part.done > before).await?,
        }
    }
}

/// How often a server is asked again that does not answer well.
#[derive(Debug, Default)]
struct Patience {
    /// Since it has brought anything.
    failures: u32,
}

impl Patience {
    /// Waits for the next try. Errors: that there is none.
    async fn wait(&mut self, url: &str, failed: Failed, brought_bytes: bool) -> Result<(), DownloadError> {
        let (error, after) = match failed {
            Failed::ForGood(error) => return Err(error),
            Failed::Perhaps { error, after } => (error, after),
        };
        self.failures = if brought_bytes { 0 } else { self.failures + 1 };
        let Some(pause) = RETRIES.pause_after(self.failures) else { return Err(error) };
        let pause = pause.max(after);
        tracing::info!(url, %error, pause_ms = pause.as_millis(), "a download broke off and goes on");
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

enum Failed {
    ForGood(DownloadError),
    /// Another try may do better, once so long has passed.
    Perhaps {
        error: DownloadError,
        after: Duration,
    },
}

impl Failed {
    fn perhaps(error: DownloadError) -> Self {
        Self::Perhaps { error, after: Duration::ZERO }
    }
}

/// Why a request was not sent or not answered.
fn unsent(url: &str, error: reqwest::Error) -> Failed {
    let leads_astray = error.is_redirect();
    let error = DownloadError::Broken { url: url.to_owned(), reason: crate::engines::describe(error) };
    // Its server would say the same again.
    if leads_astray { Failed::ForGood(error) } else { Failed::perhaps(error) }
}

/// Why a server has answered something else, and when it wants to be asked again.
fn refused(url: &str, response: &Response) -> Failed {
    let status = response.status();
    let error = DownloadError::Status { url: url.to_owned(), status: status.as_u16() };
    if status.is_server_error() || matches!(status.as_u16(), 408 | 429) {
        Failed::Perhaps { error, after: retry_after(response.headers()) }
    } else {
        Failed::ForGood(error)
    }
}

/// How long the server wants to be left alone: seconds, or a date of HTTP; never longer than [`MAX_WAIT`].
fn retry_after(headers: &HeaderMap) -> Duration {
    let text = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let until = || {
        let at = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
        Duration::try_from(at.duration_since(jiff::Timestamp::now())).ok()
    };
    let asked = text.trim().parse().ok().map(Duration::from_secs).or_else(until);
    asked.unwrap_or_default().min(MAX_WAIT)
}

async fn attempt(
    client: &Client,
    hub: &Hub<'_>,
    remote: &Remote,
    part: &mut Part<'_>,
    free: FreeBytes,
    progress: &mut (dyn FnMut(u64, Option<u64>) + Send),
) -> Result<(), Failed> {
    let broken = |reason: String| Failed::perhaps(DownloadError::Broken { url: remote.url.clone(), reason });
    let path = part.path.to_owned();
    let disk = |source: io::Error| Failed::ForGood(DownloadError::Disk { path: path.clone(), source });
    // Of a file that is whole already the last byte is asked for: another validator says that it has changed.
    let is_whole = part.done > 0 && part.begun.as_ref().and_then(|begun| begun.bytes) == Some(part.done);
    if is_whole && remote.digest.is_some() {
        // It is compared with what the hub says of it.
        return Ok(());
    }
    let from = if is_whole { part.done - 1 } else { part.done };
    let mut call = client.get(&remote.url).header(header::ACCEPT_ENCODING, "identity");
    if let Some(token) = hub.token.filter(|_| remote.of_hub) {
        call = call.bearer_auth(token.expose_secret());
    }
    if let Some(validator) =
        part.begun.as_ref().and_then(|begun| begun.validator.clone()).filter(|_| part.done > 0)
    {
        call = call.header(header::RANGE, format!("bytes={from}-")).header(header::IF_RANGE, validator);
    }
    let response = call.send().await.map_err(|error| unsent(&remote.url, error))?;
    let status = response.status();
    match status {
        StatusCode::PARTIAL_CONTENT if range_start(response.headers()) == Some(from) => {
            if is_whole {
                return Ok(());
            }
        }
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
        _ => return Err(refused(&remote.url, &response)),
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
        Some(_) => Ok(()),
        None => part.is_whole().await.map_err(disk),
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
