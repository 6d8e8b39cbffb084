//! Who may call: one layer for both daemons.
//!
//! Each route needs something ([`Need`]) that the daemon's own table says; what the table does not
//! know needs everything. Open without a token are the liveness and readiness probes and the
//! static API page, which asks for the token itself.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use owned_tasks::blocking;
use parking_lot::{Mutex, RwLock};
use pool_registry_types::{ErrorBody, ErrorCode, HolderId, routes};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::answer::{ApiError, is_page};
use crate::audit::Found;
use crate::caller::Caller;
use crate::connections::Peer;
use crate::follow::follow;
use crate::hosts::AllowedHosts;
use crate::quota::Quota;
use crate::room::ConnectionEntry;
use crate::tokens::{Holder, Scope, TokenError, TokenSet, Verdict};

/// A refused token is answered so much later: guessing is slow, and nobody else waits for it.
const REFUSAL_PAUSE: Duration = Duration::from_millis(250);

/// What a route needs of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Nothing.
    Open,
    /// A token that is known, whatever it may do.
    Any,
    Scope(Scope),
    /// One of the two.
    Either([Scope; 2]),
}

impl Need {
    /// One of them is enough; none where no scope is asked for.
    pub(crate) fn scopes(&self) -> &[Scope] {
        match self {
            Self::Open | Self::Any => &[],
            Self::Scope(scope) => std::slice::from_ref(scope),
            Self::Either(scopes) => scopes,
        }
    }
}

/// What each route needs: its method and its path as it is routed.
pub(crate) type Needs = fn(&Method, &str) -> Need;

struct Shared {
    set: RwLock<Arc<TokenSet>>,
    list: Option<SecretString>,
    /// With what was found there last.
    file: Option<(PathBuf, Mutex<Result<String, TokenError>>)>,
    /// How often they were taken anew.
    changes: watch::Sender<u64>,
}

/// The tokens of a daemon, as they are by now. Never printed.
#[derive(Clone)]
pub struct Tokens(Arc<Shared>);

impl Default for Tokens {
    /// None: everything is open.
    fn default() -> Self {
        Self::of(TokenSet::default(), None, None)
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokens({})", self.0.set.read().holders().count())
    }
}

impl Tokens {
    fn of(set: TokenSet, list: Option<SecretString>, file: Option<(PathBuf, String)>) -> Self {
        let file = file.map(|(path, text)| (path, Mutex::new(Ok(text))));
        let changes = watch::Sender::new(0);
        Self(Arc::new(Shared { set: RwLock::new(Arc::new(set)), list, file, changes }))
    }

    /// From `LLORCH_API_TOKEN` and `LLORCH_API_TOKEN_FILE`. Neither given: none. Blocks on the file.
    pub fn load(list: Option<SecretString>, file: Option<PathBuf>) -> Result<Self, TokenError> {
        let text = file.as_deref().map(TokenSet::read_file).transpose()?;
        let set = TokenSet::parse(list.as_ref().map(|list| list.expose_secret()), text.as_deref())?;
        Ok(Self::of(set, list, file.zip(text)))
    }

    pub fn is_empty(&self) -> bool {
        self.0.set.read().is_empty()
    }

    /// The header by which this daemon shows itself to the other one, as of now.
    pub fn authorization(&self) -> Option<HeaderValue> {
        let set = Arc::clone(&self.0.set.read());
        let mut value =
            HeaderValue::from_str(&format!("Bearer {}", set.to_send(Timestamp::now())?.expose_secret()))
                .ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    /// Follows the file until `stop`. Tokens change all at once; a file that is wrong or gone
    /// changes nothing, and the log says why. Running requests are not touched.
    pub async fn follow(self, stop: CancellationToken) {
        let Some((path, reported)) = &self.0.file else { return };
        let read = || {
            let path = path.clone();
            async move {
                let read = blocking("file of tokens", move || TokenSet::read_file(&path)).await;
                read.unwrap_or_else(|panicked| panicked.resume())
            }
        };
        follow(reported, stop, read, |text, _| self.take(text)).await;
    }

    fn take(&self, text: &Result<String, TokenError>) {
        let list = self.0.list.as_ref().map(|list| list.expose_secret());
        let text = text.as_ref().map_err(TokenError::clone);
        match text.and_then(|text| TokenSet::parse(list, Some(text))) {
            Ok(set) => {
                tracing::info!(tokens = set.holders().count(), "the file of tokens is read again");
                *self.0.set.write() = Arc::new(set);
                self.0.changes.send_modify(|times| *times += 1);
            }
            Err(error) => {
                tracing::error!(%error, "the file of tokens is not taken, the tokens before stand");
            }
        }
    }

    /// Tells each time that they were taken anew, until `stop`; and once at its start, for what may
    /// have changed before.
    pub async fn notify_changes<F: Future<Output = ()>>(self, stop: CancellationToken, send: impl Fn() -> F) {
        let mut changes = self.0.changes.subscribe();
        loop {
            send().await;
            tokio::select! {
                () = stop.cancelled() => return,
                // The sender lives as long as this does.
                _ = changes.changed() => {}
            }
        }
    }

    /// Whether the caller's token is one still, the same holder's and with the same scopes. For answers
    /// that have no end; whoever was let in without a token stays.
    pub fn still_admit(&self, caller: &Caller) -> bool {
        self.still_know(caller, |known, shown| known.id == shown.id && known.scopes() == shown.scopes())
    }

    /// Whether it is one still that has this scope.
    pub fn still_admit_to(&self, caller: &Caller, scope: Scope) -> bool {
        self.still_know(caller, |known, _| known.has(scope))
    }

    fn still_know(&self, caller: &Caller, may: impl Fn(&Holder, &Holder) -> bool) -> bool {
        let Some(holder) = &caller.holder else { return true };
        let (set, now) = (Arc::clone(&self.0.set.read()), Timestamp::now());
        let is_same = |known: &Holder| known.fingerprint == holder.fingerprint;
        set.holders().any(|known| is_same(known) && !known.has_expired(now) && may(known, holder))
    }

    /// When the next of them expires, if one does. Those that have are nobody's any more.
    pub fn next_expiry(&self, now: Timestamp) -> Option<Timestamp> {
        let set = Arc::clone(&self.0.set.read());
        set.holders().filter_map(|holder| holder.expires).filter(|at| *at > now).min()
    }

    /// Whose things those of this name are.
    pub fn holder_named(&self, name: &str) -> HolderId {
        self.0.set.read().holder_named(name)
    }

    /// By which a holder is shown, and named: its id where no token of it is in force. None of the open
    /// one.
    pub fn name_of(&self, id: HolderId) -> Option<String> {
        if id == HolderId::OPEN {
            return None;
        }
        let set = Arc::clone(&self.0.set.read());
        let known = set.holders().find(|holder| holder.id == id).map(|holder| holder.name.clone());
        Some(known.unwrap_or_else(|| id.to_string()))
    }

    /// Who shows these headers.
    ///
    /// # Errors
    /// `MISSING_TOKEN` without the header; `BAD_TOKEN` for anything but one known token.
    pub fn authenticate(&self, headers: &HeaderMap, now: Timestamp) -> Result<Arc<Holder>, ApiError> {
        let missing =
            || ApiError::new(ErrorCode::MissingToken, "send the header Authorization: Bearer <token>");
        let mut values = headers.get_all(header::AUTHORIZATION).iter();
        let value = values.next().ok_or_else(missing)?;
        if values.next().is_some() {
            return Err(bad());
        }
        let value = value.to_str().map_err(|_| bad())?;
        let (scheme, token) = value.split_once(' ').ok_or_else(bad)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(bad());
        }
        self.holder(token.trim(), now)
    }

    /// Whose token this is.
    ///
    /// # Errors
    /// `BAD_TOKEN`.
    fn holder(&self, token: &str, now: Timestamp) -> Result<Arc<Holder>, ApiError> {
        let set = Arc::clone(&self.0.set.read());
        match set.look_up(token, now) {
            Verdict::Known(holder) => Ok(holder),
            Verdict::Expired(holder) => {
                tracing::warn!(
                    name = holder.name,
                    fingerprint = holder.fingerprint,
                    "an expired token was shown"
                );
                Err(ApiError::new(ErrorCode::BadToken, "this token has expired"))
            }
            Verdict::Unknown => Err(bad()),
        }
    }
}

fn bad() -> ApiError {
    ApiError::new(ErrorCode::BadToken, "this token is not known")
}

/// What the layer decides by.
#[derive(Debug, Clone)]
pub struct Gate {
    pub tokens: Tokens,
    pub needs: Needs,
    /// The certificate of a client must verify, and be for this name, on everything but open routes.
    pub certificate: Option<String>,
    /// A node must show a certificate of its own name.
    pub nodes_show_certificates: bool,
    /// Bounds of what clients ask; nodes have none.
    pub quota: Option<Arc<Quota>>,
    /// Origins whose pages may call.
    pub origins: Vec<HeaderValue>,
    /// By which names it may be called without tokens.
    pub hosts: AllowedHosts,
    /// In which shape other APIs than ours have our errors.
    pub shapes: Option<Shapes>,
}

/// How the errors of another API's paths look.
#[derive(Debug, Clone, Copy)]
pub struct Shapes {
    /// Whether a path is of another API: there the header `x-api-key` is as good as `Authorization`.
    pub is_theirs: fn(&str) -> bool,
    /// The error, answered with this status, in the shape of the path; nothing for one of ours.
    pub shape: fn(&str, StatusCode, &ErrorBody) -> Option<Response>,
}

/// What is open in every daemon.
pub(crate) fn is_open(path: &str) -> bool {
    path == routes::HEALTH_LIVE || path == routes::HEALTH_READY || is_page(path)
}

impl Gate {
    /// Lets everything through: for listeners that only show what everybody may see.
    pub fn open() -> Self {
        Self {
            tokens: Tokens::default(),
            needs: |_, _| Need::Open,
            certificate: None,
            nodes_show_certificates: false,
            quota: None,
            origins: Vec::new(),
            hosts: AllowedHosts::default(),
            shapes: None,
        }
    }

    fn need(&self, request: &Request) -> Need {
        if is_open(request.uri().path()) {
            return Need::Open;
        }
        match request.extensions().get::<MatchedPath>() {
            Some(path) => (self.needs)(request.method(), path.as_str()),
            // Nothing is routed there: whoever is known may hear so.
            None => Need::Any,
        }
    }

    /// Without tokens, a page of some site in a browser of this machine could call: its origin, or
    /// the name by which it believes to call its own host, gives it away. That name stands in the
    /// header `Host`, in the request's target, or in both.
    fn check_local(&self, request: &Request) -> Result<(), ApiError> {
        let headers = request.headers();
        let foreign_page = headers.get_all(header::ORIGIN).iter().any(|origin| {
            let parts = origin.to_str().ok().and_then(|text| text.split_once("://"));
            let is_own = parts
                .is_some_and(|(scheme, host)| ["http", "https"].contains(&scheme) && self.hosts.has(host));
            !is_own && !self.origins.contains(origin)
        });
        let named = request.uri().authority().map(|authority| Some(authority.as_str()));
        let named =
            named.into_iter().chain(headers.get_all(header::HOST).iter().map(|host| host.to_str().ok()));
        let hosts: Vec<bool> = named.map(|host| host.is_some_and(|host| self.hosts.has(host))).collect();
        if hosts.is_empty() || hosts.contains(&false) {
            return Err(ApiError::new(ErrorCode::Forbidden, self.hosts.refusal_of_host()));
        }
        if foreign_page {
            return Err(ApiError::new(ErrorCode::Forbidden, self.hosts.refusal_of_page()));
        }
        Ok(())
    }

    /// The token as clients of another API show it. The header of ours counts first.
    fn api_key<'r>(&self, request: &'r Request) -> Option<&'r str> {
        let is_theirs = self.shapes.is_some_and(|shapes| (shapes.is_theirs)(request.uri().path()));
        let headers = request.headers();
        if !is_theirs || headers.contains_key(header::AUTHORIZATION) {
            return None;
        }
        let mut shown = headers.get_all(routes::headers::API_KEY).iter();
        let (only, None) = (shown.next()?, shown.next()) else { return None };
        only.to_str().ok().map(str::trim)
    }

    fn caller(&self, request: &Request) -> Caller {
        let peer = request.extensions().get::<Arc<Peer>>().cloned();
        Caller { holder: None, peer, nodes_show_certificates: self.nodes_show_certificates }
    }

    /// Learns who calls on the way, as far as it comes. Returns how many requests its rate leaves it, where
    /// that is bounded.
    fn check(&self, need: Need, request: &Request, caller: &mut Caller) -> Result<Option<u32>, ApiError> {
        if need == Need::Open {
            return Ok(None);
        }
        if let Some(wanted) = &self.certificate {
            let certificate = caller.peer.as_ref().and_then(|peer| peer.certificate.as_ref());
            if !certificate.is_some_and(|certificate| certificate.is_for(wanted)) {
                let has = certificate.map_or_else(|| "none".into(), |has| has.names.join(", "));
                let message = format!("a TLS certificate for {wanted} is needed here, shown was: {has}");
                return Err(ApiError::new(ErrorCode::Forbidden, message));
            }
        }
        // That this is allowed is decided at the start: only this machine reaches the listener.
        if self.tokens.is_empty() {
            return self.check_local(request).map(|()| None);
        }
        let now = Timestamp::now();
        let holder = match self.api_key(request) {
            Some(key) => self.tokens.holder(key, now)?,
            None => self.tokens.authenticate(request.headers(), now)?,
        };
        caller.holder = Some(Arc::clone(&holder));
        let wanted = need.scopes();
        if !wanted.is_empty() && !wanted.iter().any(|scope| holder.has(*scope)) {
            let names: Vec<String> = wanted.iter().map(|scope| format!("\"{}\"", scope.as_str())).collect();
            let message = format!("this token is without the scope {}", names.join(" or "));
            return Err(ApiError::new(ErrorCode::Forbidden, message));
        }
        match self.quota.as_ref().filter(|_| wanted.contains(&Scope::Client)) {
            Some(quota) => quota.request(holder.id),
            None => Ok(None),
        }
    }

    /// Tells a client of another API what its limits leave it, in the headers that it knows.
    fn show_limits(&self, caller: &Caller, left: Option<u32>, response: &mut Response) {
        if let Some(limits) = self.quota.as_ref().and_then(|quota| quota.limits(caller, left)) {
            limits.show(response.headers_mut());
        }
    }
}

/// What the gate has found out about a request.
#[derive(Debug)]
pub(crate) struct Admission {
    /// For its line in the audit log.
    pub(crate) found: Found,
    /// Whose what is made for the request is.
    pub(crate) holder: HolderId,
    /// Whose limits the answer shows, and what they leave where that is known.
    limits: Option<(Caller, Option<u32>)>,
    pub(crate) refused: Option<ApiError>,
}

impl Admission {
    /// Puts on the answer what its client is shown.
    pub(crate) fn finish(&self, gate: &Gate, response: &mut Response) {
        if let Some((caller, left)) = &self.limits {
            gate.show_limits(caller, *left, response);
        }
    }
}

/// Decides whether the request goes on to its handler, which is told who calls.
pub(crate) fn admit(gate: &Gate, request: &mut Request) -> Admission {
    let need = gate.need(request);
    let mut caller = gate.caller(request);
    let mut checked = gate.check(need, request, &mut caller);
    // Whoever lacks a scope has shown who it is all the same.
    if need != Need::Open
        && (checked.is_ok() || caller.holder.is_some())
        && let Some(entry) = request.extensions().get::<Arc<ConnectionEntry>>()
        && let Err(too_many) = entry.let_in((!caller.is_admin()).then(|| caller.holder_id()))
        && checked.is_ok()
    {
        checked = Err(ApiError::new(ErrorCode::RateLimited, too_many.to_string()));
    }
    let (holder, holder_id) = (caller.holder.clone(), caller.holder_id());
    let shows_limits = gate.shapes.is_some_and(|shapes| (shapes.is_theirs)(request.uri().path()));
    let (left, refused) = match checked {
        Ok(left) => (left, None),
        Err(error) => ((error.0.code == ErrorCode::RateLimited).then_some(0), Some(error)),
    };
    let limits = shows_limits.then(|| (caller.clone(), left));
    if refused.is_none() {
        request.extensions_mut().insert(caller);
    }
    let found = Found { holder, refused: refused.as_ref().map(|error| error.0.code) };
    Admission { found, holder: holder_id, limits, refused }
}

/// The answer to whom the gate has not let through.
pub(crate) async fn refuse(error: ApiError) -> Response {
    if matches!(error.0.code, ErrorCode::MissingToken | ErrorCode::BadToken) {
        tokio::time::sleep(REFUSAL_PAUSE).await;
    }
    error.into_response()
}

#[cfg(test)]
mod tests {
    use pool_registry_types::NodeId;

    use super::*;

    fn code(tokens: &Tokens, values: &[&str]) -> Option<ErrorCode> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        tokens.authenticate(&headers, Timestamp::now()).err().map(|error| error.0.code)
    }

    // CLOUD-1110
    #[test]
    fn the_header_must_be_one_and_a_bearer_token() {
        let tokens = Tokens::load(Some("first-token, second-token".into()), None).unwrap();
        assert_eq!(tokens.authorization().unwrap(), "Bearer first-token");
        assert_eq!(code(&tokens, &["Bearer first-token"]), None);
        assert_eq!(code(&tokens, &["bearer second-token"]), None);
        assert_eq!(code(&tokens, &[]), Some(ErrorCode::MissingToken));
        for bad in
            ["Bearer", "Bearer ", "first-token", "Basic first-token", "Bearer first-token, second-token"]
        {
            assert_eq!(code(&tokens, &[bad]), Some(ErrorCode::BadToken), "{bad}");
        }
        assert_eq!(code(&tokens, &["Bearer first-token", "Bearer first-token"]), Some(ErrorCode::BadToken));
    }

    // CLOUD-1145
    #[tokio::test(start_paused = true)]
    async fn what_follows_a_file_knows_what_was_taken_before_it_was_started_again() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let write = |token: &str| std::fs::write(&file, token).unwrap();
        write("old-token-of-ours\n");
        let tokens = Tokens::load(None, Some(file.path().to_owned())).unwrap();
        let pass =
            || tokio::time::timeout(Duration::from_secs(3), tokens.clone().follow(CancellationToken::new()));
        write("new-token-of-ours\n");
        // Cut off after a while, as by a panic.
        assert!(pass().await.is_err());
        assert_eq!(tokens.authorization().unwrap(), "Bearer new-token-of-ours");
        write("old-token-of-ours\n");
        assert!(pass().await.is_err());
        assert_eq!(tokens.authorization().unwrap(), "Bearer old-token-of-ours");
    }

    // CLOUD-1115
    #[tokio::test(start_paused = true)]
    async fn a_file_that_changes_is_taken_whole_and_a_bad_one_not_at_all() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, "old-token-of-ours\n").unwrap();
        let tokens = Tokens::load(None, Some(file.path().to_owned())).unwrap();
        let stop = CancellationToken::new();
        let following = tokio::spawn(tokens.clone().follow(stop.clone()));
        let pass = || tokio::time::sleep(Duration::from_secs(3));
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, HeaderValue::from_static("Bearer old-token-of-ours"));
        let holder = tokens.authenticate(&headers, Timestamp::now()).ok();
        let caller = Caller { holder, ..Caller::default() };
        assert!(tokens.still_admit(&caller));
        let old = || code(&tokens, &["Bearer old-token-of-ours"]);
        let new = || code(&tokens, &["Bearer new-token-of-ours"]);
        assert_eq!((old(), new()), (None, Some(ErrorCode::BadToken)));
        std::fs::write(&file, "new-token-of-ours\nold-token-of-ours\n").unwrap();
        pass().await;
        assert_eq!(new(), None);
        assert_eq!(old(), None);
        assert_eq!(tokens.authorization().unwrap(), "Bearer new-token-of-ours");
        assert!(tokens.still_admit(&caller), "it stands in another line, and still stands");
        std::fs::write(&file, "new-token-of-ours\nshort\n").unwrap();
        pass().await;
        assert_eq!((old(), new()), (None, None), "a bad file changes nothing");
        std::fs::write(&file, "new-token-of-ours\n").unwrap();
        pass().await;
        assert_eq!((old(), new()), (Some(ErrorCode::BadToken), None));
        assert!(!tokens.still_admit(&caller) && tokens.still_admit(&Caller::default()));
        stop.cancel();
        following.await.unwrap();
    }

    // CLOUD-2707
    #[test]
    fn an_answer_without_an_end_ends_when_its_token_becomes_another_holders_or_may_do_something_else() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let write = |name: &str, scopes: &str| {
            let text =
                format!("[[token]]\nname = \"{name}\"\ntoken = \"token-of-shop\"\nscopes = [{scopes}]");
            std::fs::write(&file, &text).unwrap();
            text
        };
        write("shop", "\"client\"");
        let tokens = Tokens::load(None, Some(file.path().to_owned())).unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, HeaderValue::from_static("Bearer token-of-shop"));
        let holder = tokens.authenticate(&headers, Timestamp::now()).ok();
        let caller = Caller { holder, ..Caller::default() };
        assert_eq!((caller.sees_all(), caller.is_admin()), (false, false));
        assert_eq!(tokens.name_of(caller.holder_id()).as_deref(), Some("shop"));
        for (name, scopes) in [("inn", "\"client\""), ("shop", "\"client\", \"operator\"")] {
            tokens.take(&Ok(write(name, scopes)));
            assert!(!tokens.still_admit(&caller), "{name} {scopes}");
            assert!(tokens.still_admit_to(&caller, Scope::Client));
        }
        let gone = caller.holder_id();
        tokens.take(&Ok(write("inn", "\"client\"")));
        assert_eq!(tokens.holder_named(&tokens.name_of(gone).unwrap()), gone, "by its id when it is gone");
        assert!(Caller::default().sees_all() && Caller::default().is_admin());
        assert_eq!(tokens.name_of(Caller::default().holder_id()), None);
    }

    // CLOUD-1118
    // CLOUD-2751
    #[test]
    fn without_tokens_a_page_of_another_site_may_not_call() {
        let origins = vec![HeaderValue::from_static("https://pages.example")];
        let hosts = AllowedHosts::parse(["HOSTS", "ORIGINS"], "llm.lan").unwrap();
        let gate = Gate { needs: |_, _| Need::Any, origins, hosts, ..Gate::open() };
        let ask = |target: &str, headers: &[(&str, &str)]| {
            let mut request = Request::builder().uri(target);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            let request = request.body(axum::body::Body::empty()).unwrap();
            gate.check(Need::Any, &request, &mut Caller::default()).is_ok()
        };
        let may = |host: &str, origin: Option<&str>| {
            let headers: Vec<_> = [("host", Some(host)), ("origin", origin)]
                .into_iter()
                .filter_map(|(n, v)| Some((n, v?)))
                .collect();
            ask("/v2/tasks", &headers)
        };
        for host in ["localhost:8080", "127.0.0.1:8080", "[::1]:8080", "localhost"] {
            assert!(may(host, None), "{host}");
        }
        assert!(may("localhost:8080", Some("http://127.0.0.1:3000")));
        assert!(may("localhost:8080", Some("https://pages.example")));
        // CLOUD-2884
        assert!(may("llm.lan:8080", None) && may("llm.lan", Some("http://llm.lan:3000")));
        for origin in [
            "https://evil.example",
            "null",
            "http://localhost.evil.example",
            "evil-extension://localhost",
            "file://localhost",
        ] {
            assert!(!may("localhost:8080", Some(origin)), "{origin}");
        }
        assert!(!may("evil.example:8080", None), "a name that was made to point here");
        // HTTP/2 names the host in its target, HTTP/1.1 may.
        assert!(ask("http://localhost:8080/v2/tasks", &[]));
        assert!(ask("http://localhost:8080/v2/tasks", &[("host", "localhost:8080")]));
        for (target, host) in [
            ("http://evil.example:8080/v2/tasks", None),
            ("http://evil.example:8080/v2/tasks", Some("localhost")),
            ("http://localhost:8080/v2/tasks", Some("evil.example")),
            ("/v2/tasks", None),
        ] {
            let host = host.map(|host| ("host", host));
            assert!(!ask(target, host.as_slice()), "{target} {host:?}");
        }
        assert!(!ask("/v2/tasks", &[("host", "localhost"), ("host", "evil.example")]));
        assert!(!ask(
            "/v2/tasks",
            &[("host", "localhost"), ("origin", "http://localhost"), ("origin", "http://evil.example")],
        ));
    }

    // CLOUD-1116
    #[test]
    fn a_bound_token_and_a_certificate_speak_for_their_node_only() {
        let node = |id: &str| NodeId::new(id).unwrap();
        let text = "[[token]]\nname = \"n\"\ntoken = \"token-of-node\"\nscopes = [\"node\"]\nnode_id = \"a\"";
        let set = TokenSet::parse(None, Some(text)).unwrap();
        let Verdict::Known(holder) = set.look_up("token-of-node", Timestamp::now()) else { panic!() };
        let bound = Caller { holder: Some(holder), ..Caller::default() };
        assert!(bound.authorize_node(&node("a")).is_ok());
        assert_eq!(bound.authorize_node(&node("b")).unwrap_err().0.code, ErrorCode::Forbidden);
        let with = |certificate| Caller {
            peer: Some(Arc::new(Peer { addr: "127.0.0.1:1".parse().unwrap(), certificate })),
            nodes_show_certificates: true,
            ..Caller::default()
        };
        let shown = || Some(crate::tls::PeerCertificate { names: vec!["a".into(), "localhost".into()] });
        assert!(with(shown()).authorize_node(&node("a")).is_ok());
        let error = with(shown()).authorize_node(&node("b")).unwrap_err().0;
        assert!(error.message.contains("is for a, localhost, not for b"), "{}", error.message);
        assert!(with(None).authorize_node(&node("a")).is_err());
        assert!(Caller::default().authorize_node(&node("b")).is_ok());
    }
}
