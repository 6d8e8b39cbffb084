//! The bearer tokens of a daemon: what they are, how they are read, whom one belongs to.
//!
//! A token is known by its SHA-256 digest and compared in constant time, so neither its content
//! nor its length can be measured. A list has one of two forms: plain (a token may do everything),
//! or TOML, where each has a name, scopes, an expiry and a node.

use std::path::Path;

use jiff::Timestamp;
use pool_registry_types::{HolderId, NodeId};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use uuid::Uuid;

/// Shortest token that is taken, bytes.
pub const MIN_TOKEN_BYTES: usize = 8;
/// Longest file of tokens that is read, bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;
/// Nodes that a token may register whose file does not say how many, and that is for nodes only.
/// Source: .specs/01 CLOUD-2757.
const DEFAULT_MAX_NODES: u32 = 64;
const BY_LIST: &str = "LLORCH_API_TOKEN";
const BY_FILE: &str = "LLORCH_API_TOKEN_FILE";

/// Why the configured tokens are no tokens. No message holds one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error(
        "{origin}: {place}: a token must be at least {MIN_TOKEN_BYTES} visible ASCII characters without a comma"
    )]
    Malformed { origin: String, place: String },
    #[error("LLORCH_API_TOKEN_FILE: {path} cannot be read: {reason}")]
    Unreadable { path: String, reason: String },
    #[error("{origin}: {reason}")]
    Toml { origin: String, reason: String },
    /// Of a file that was given by itself, and not by the setting.
    #[error("{path} cannot be read: {reason}")]
    UnreadableFile { path: String, reason: String },
    #[error("{origin} holds no token")]
    Empty { origin: String },
    #[error("{origin}: {place}: the same token as {other}")]
    Twice { origin: String, place: String, other: String },
}

/// What a token lets its holder do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Tasks, sessions and artifacts of its own, and looking at the cluster.
    Client,
    /// Registering as a node and reporting.
    Node,
    /// What a control plane asks of its nodes. Worth nothing at a control plane, since every node
    /// hears the token that is sent to it.
    Control,
    /// Looking at everything but contents (prompts, tokens, artifacts), engines' logs, drain, resume,
    /// reload, and the cancel of any task.
    Operator,
    /// What every token opens: the metrics of either daemon, where to scrape them, and the API's document.
    Metrics,
    /// Everything.
    Admin,
}

impl Scope {
    /// As it stands in the file.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Node => "node",
            Self::Control => "control",
            Self::Operator => "operator",
            Self::Metrics => "metrics",
            Self::Admin => "admin",
        }
    }

    /// All of them, as they stand in the file.
    fn listed() -> String {
        let all = <Self as clap::ValueEnum>::value_variants();
        all.iter().map(|scope| format!("\"{}\"", scope.as_str())).collect::<Vec<_>>().join(", ")
    }
}

/// Who holds a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Of a file of TOML; of a plain token its fingerprint, wherever it stands.
    pub name: String,
    /// Whose its tasks, sessions and artifacts are: that of all tokens of the name, so that one can be
    /// replaced by another; of a plain token its own.
    pub id: HolderId,
    /// The first six hexadecimal digits of the token's SHA-256: names it and tells nothing of it.
    pub fingerprint: String,
    scopes: Vec<Scope>,
    /// The only node that it authorizes; absent: any.
    pub node_id: Option<NodeId>,
    /// Nodes that it may have registered at a time; absent: any number.
    pub max_nodes: Option<u32>,
    pub expires: Option<Timestamp>,
}

impl Holder {
    pub fn has(&self, scope: Scope) -> bool {
        self.scopes.iter().any(|has| *has == scope || *has == Scope::Admin)
    }

    pub fn has_expired(&self, now: Timestamp) -> bool {
        has_expired(self.expires, now)
    }

    pub fn scopes(&self) -> &[Scope] {
        &self.scopes
    }
}

#[derive(Debug)]
struct Known {
    digest: [u8; 32],
    holder: std::sync::Arc<Holder>,
}

/// The tokens that are in force together.
#[derive(Debug, Default)]
pub struct TokenSet {
    known: Vec<Known>,
    /// Those that are there in full, with their ends.
    sendable: Vec<(SecretString, Option<Timestamp>)>,
}

/// Whether a token is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Known(std::sync::Arc<Holder>),
    Expired(std::sync::Arc<Holder>),
    Unknown,
}

impl TokenSet {
    /// From `LLORCH_API_TOKEN` (comma-separated) and the text of `LLORCH_API_TOKEN_FILE`.
    pub fn parse(list: Option<&str>, file: Option<&str>) -> Result<Self, TokenError> {
        Self::parse_as(BY_FILE, list, file)
    }

    /// A file of tokens by itself; blocks. Errors name it.
    pub fn check_file(path: &Path) -> Result<Self, TokenError> {
        let text = Self::read_file(path).map_err(|error| match error {
            TokenError::Unreadable { path, reason } => TokenError::UnreadableFile { path, reason },
            other => other,
        })?;
        Self::parse_as(&path.display().to_string(), None, Some(&text))
    }

    /// `origin` is what errors call the file.
    fn parse_as(origin: &str, list: Option<&str>, file: Option<&str>) -> Result<Self, TokenError> {
        let mut set = Self::default();
        if let Some(list) = list {
            let found = list.split(',').map(str::trim).filter(|token| !token.is_empty());
            set.add_plain(found, BY_LIST, "token")?;
        }
        match file {
            None => {}
            Some(text) if is_toml(text) => set.add_toml(text, origin)?,
            Some(text) => {
                let lines = text.lines().map(str::trim);
                set.add_plain(
                    lines.filter(|line| !line.is_empty() && !line.starts_with('#')),
                    origin,
                    "line",
                )?;
            }
        }
        Ok(set)
    }

    /// The text of the file of tokens; blocks.
    pub fn read_file(path: &Path) -> Result<String, TokenError> {
        use std::io::Read;
        let failed = |error: std::io::Error| TokenError::Unreadable {
            path: path.display().to_string(),
            reason: error.to_string(),
        };
        let mut text = String::new();
        let file = std::fs::File::open(path).map_err(failed)?;
        file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
        if text.len() as u64 > MAX_FILE_BYTES {
            return Err(failed(std::io::Error::other("it is longer than 1 MiB")));
        }
        // Some editors begin a file with it.
        Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
    }

    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Whose things they are that the name's holder has. A name that is in force for no token may be that
    /// of one that was, or the id itself.
    pub(crate) fn holder_named(&self, name: &str) -> HolderId {
        let known = self.holders().find(|holder| holder.name == name).map(|holder| holder.id);
        known.or_else(|| name.parse().ok()).unwrap_or_else(|| id_of_name(name))
    }

    pub fn holders(&self) -> impl Iterator<Item = &Holder> {
        self.known.iter().map(|known| known.holder.as_ref())
    }

    /// The token to send to the other daemon: the first that is there in full and has not expired.
    pub(crate) fn to_send(&self, now: Timestamp) -> Option<&SecretString> {
        self.sendable.iter().find(|(_, end)| !has_expired(*end, now)).map(|(token, _)| token)
    }

    /// Every digest is compared, whichever matches.
    pub(crate) fn look_up(&self, token: &str, now: Timestamp) -> Verdict {
        let given = digest(token);
        let mut found = None;
        for known in &self.known {
            if bool::from(known.digest.ct_eq(&given)) {
                found = Some(&known.holder);
            }
        }
        match found {
            None => Verdict::Unknown,
            Some(holder) if holder.has_expired(now) => Verdict::Expired(holder.clone()),
            Some(holder) => Verdict::Known(holder.clone()),
        }
    }

    fn add_plain<'a>(
        &mut self,
        tokens: impl Iterator<Item = &'a str>,
        origin: &str,
        word: &str,
    ) -> Result<(), TokenError> {
        let before = self.known.len();
        for (n, token) in tokens.enumerate() {
            let place = format!("{word} {}", n + 1);
            if !is_token(token) {
                return Err(TokenError::Malformed { origin: origin.to_owned(), place });
            }
            let holder = Holder {
                name: fingerprint(token),
                id: holder_id("token", &digest(token)),
                fingerprint: fingerprint(token),
                scopes: vec![Scope::Admin],
                node_id: None,
                max_nodes: None,
                expires: None,
            };
            // One that stands in the list and in the file is one.
            if self.find(&digest(token)).is_none() {
                self.add(digest(token), holder);
            }
            self.sendable.push((token.into(), None));
        }
        if self.known.len() == before { Err(TokenError::Empty { origin: origin.to_owned() }) } else { Ok(()) }
    }

    fn add_toml(&mut self, text: &str, origin: &str) -> Result<(), TokenError> {
        let origin = || origin.to_owned();
        let file: TokenFile = toml::from_str(text).map_err(|error| {
            // Its excerpt of the text could hold a token.
            let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            let place = line.map_or_else(String::new, |line| format!("line {line}: "));
            TokenError::Toml { origin: origin(), reason: format!("{place}{}", in_words(error.message())) }
        })?;
        if file.token.is_empty() {
            return Err(TokenError::Empty { origin: origin() });
        }
        for entry in file.token {
            let place = entry.name.clone();
            let wrong = |what: &str| {
                Err(TokenError::Toml { origin: origin(), reason: format!("token {place:?}: {what}") })
            };
            let digest = match (&entry.token, &entry.sha256) {
                (Some(token), None) if is_token(token.expose_secret()) => digest(token.expose_secret()),
                (Some(_), None) => return Err(TokenError::Malformed { origin: origin(), place }),
                (None, Some(hex)) => match from_hex(hex) {
                    Some(digest) => digest,
                    None => return wrong("sha256 must be 64 hexadecimal digits"),
                },
                _ => return wrong("give either token or sha256"),
            };
            if entry.scopes.is_empty() {
                return wrong(&format!("scopes must name at least one of {}", Scope::listed()));
            }
            if entry.node_id.is_some() && entry.scopes != [Scope::Node] {
                return wrong("node_id binds a token whose only scope is \"node\"");
            }
            let is_of_nodes = entry.scopes.contains(&Scope::Node) && !entry.scopes.contains(&Scope::Admin);
            let max_nodes = match (entry.max_nodes, &entry.node_id) {
                (None, None) if is_of_nodes => Some(DEFAULT_MAX_NODES),
                (None, _) => None,
                (Some(most), None) if is_of_nodes && most > 0 => Some(most),
                (Some(_), _) => {
                    return wrong(
                        "max_nodes is at least 1, of a token with the scope \"node\", without \"admin\" and node_id",
                    );
                }
            };
            let expires = match entry.expires.as_ref().map(|at| at.to_string().parse::<Timestamp>()) {
                None => None,
                Some(Ok(at)) => Some(at),
                Some(Err(_)) => {
                    return wrong("expires must be a time with its zone, as 2027-01-31T00:00:00Z");
                }
            };
            if let Some(other) = self.find(&digest) {
                let other = other.name.clone();
                return Err(TokenError::Twice { origin: origin(), place, other });
            }
            let fingerprint = hex(&digest)[..6].to_owned();
            let holder = Holder {
                id: id_of_name(&entry.name),
                name: entry.name,
                fingerprint,
                scopes: entry.scopes,
                node_id: entry.node_id,
                max_nodes,
                expires,
            };
            self.add(digest, holder);
            self.sendable.extend(entry.token.map(|token| (token, expires)));
        }
        Ok(())
    }

    fn find(&self, digest: &[u8; 32]) -> Option<&Holder> {
        self.known.iter().find(|known| known.digest == *digest).map(|known| known.holder.as_ref())
    }

    fn add(&mut self, digest: [u8; 32], holder: Holder) {
        self.known.push(Known { digest, holder: holder.into() });
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenFile {
    #[serde(default)]
    token: Vec<TokenEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenEntry {
    name: String,
    token: Option<SecretString>,
    /// In the place of the token: it is accepted, and never sent.
    sha256: Option<String>,
    #[serde(default)]
    scopes: Vec<Scope>,
    node_id: Option<NodeId>,
    max_nodes: Option<u32>,
    expires: Option<toml::value::Datetime>,
}

fn id_of_name(name: &str) -> HolderId {
    holder_id("name", name.as_bytes())
}

/// The first half of a SHA-256: nobody can make a name or a token that is another holder's.
fn holder_id(kind: &str, of: &[u8]) -> HolderId {
    let mut hasher = Sha256::new();
    hasher.update(kind.as_bytes());
    hasher.update([0]);
    hasher.update(of);
    let whole: [u8; 32] = hasher.finalize().into();
    let (mut half, first) = ([0; 16], whole.as_chunks::<16>().0);
    half.copy_from_slice(&first[0]);
    HolderId(Uuid::from_bytes(half))
}

fn has_expired(end: Option<Timestamp>, now: Timestamp) -> bool {
    end.is_some_and(|at| at <= now)
}

/// TOML begins with a table; a plain token does not begin with a bracket.
fn is_toml(text: &str) -> bool {
    let mut lines = text.lines().map(str::trim);
    lines.find(|line| !line.is_empty() && !line.starts_with('#')).is_some_and(|line| line.starts_with('['))
}

fn is_token(token: &str) -> bool {
    let good = |b: u8| b.is_ascii_graphic() && b != b',';
    token.len() >= MIN_TOKEN_BYTES && token.bytes().all(good) && !token.starts_with(['#', '['])
}

/// A message of the parser without the quoted values that it may repeat.
fn in_words(message: &str) -> String {
    let words = message.split(['"', '`']).next().unwrap_or_default().trim_end();
    match words {
        // Nothing else in the file is one of several.
        "unknown variant" => format!("unknown scope: there are {}", Scope::listed()),
        "unknown field" => {
            "unknown field: the file has entries [[token]] of name, token or sha256, scopes, node_id, max_nodes and expires".into()
        }
        _ => words.to_owned(),
    }
}

/// The SHA-256 of a token in hexadecimal digits, as `sha256` in the file wants it.
pub fn sha256(token: &str) -> String {
    hex(&digest(token))
}

/// Names a token without telling anything of it.
pub fn fingerprint(token: &str) -> String {
    sha256(token)[..6].to_owned()
}

/// A new token: 32 bytes of the system's randomness, as 64 hexadecimal digits.
pub fn generate() -> Result<SecretString, getrandom::Error> {
    let mut bytes = [0_u8; 32];
    getrandom::fill(&mut bytes)?;
    Ok(hex(&bytes).into())
}

/// The entry of a token in the file of tokens. It has the token, and so is a secret.
pub fn entry(name: &str, token: &SecretString, scopes: &[Scope]) -> SecretString {
    let text = |text: &str| toml::Value::String(text.into()).to_string();
    let scopes: Vec<String> = scopes.iter().map(|scope| text(scope.as_str())).collect();
    let (name, token) = (text(name), text(token.expose_secret()));
    format!("[[token]]\nname = {name}\ntoken = {token}\nscopes = [{}]", scopes.join(", ")).into()
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut bytes = [0; 32];
    for (n, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * n..2 * n + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn known(set: &TokenSet, token: &str) -> Option<String> {
        match set.look_up(token, at("2026-06-01T00:00:00Z")) {
            Verdict::Known(holder) => Some(holder.name.clone()),
            Verdict::Expired(_) | Verdict::Unknown => None,
        }
    }

    // CLOUD-1110
    #[test]
    fn every_token_of_both_places_is_known_and_the_first_is_sent() {
        let set =
            TokenSet::parse(Some("first-token, second-token"), Some("# old\nthird-token\nfirst-token\n"))
                .unwrap();
        assert_eq!(set.to_send(Timestamp::now()).unwrap().expose_secret(), "first-token");
        assert_eq!(known(&set, "first-token").as_deref(), Some(fingerprint("first-token").as_str()));
        assert_eq!(known(&set, "third-token").as_deref(), Some(fingerprint("third-token").as_str()));
        assert_eq!(set.holders().count(), 3);
        for bad in ["first-toke", "first-token2", "", "FIRST-TOKEN"] {
            assert_eq!(known(&set, bad), None, "{bad}");
        }
    }

    // CLOUD-2702
    #[test]
    fn a_holder_is_a_name_of_toml_or_one_plain_token_wherever_it_stands() {
        let id = |set: &TokenSet, token: &str| match set.look_up(token, at("2026-06-01T00:00:00Z")) {
            Verdict::Known(holder) => holder.id,
            other => panic!("{other:?}"),
        };
        let plain = TokenSet::parse(Some("first-token,second-token"), None).unwrap();
        let prepended = TokenSet::parse(Some("new-token-0,first-token"), Some("second-token")).unwrap();
        assert_eq!(id(&plain, "first-token"), id(&prepended, "first-token"));
        assert_eq!(id(&plain, "second-token"), id(&prepended, "second-token"));
        assert_ne!(id(&plain, "first-token"), id(&plain, "second-token"));
        let entry = |name: &str, token: &str| {
            format!("[[token]]\nname = \"{name}\"\ntoken = \"{token}\"\nscopes = [\"client\"]\n")
        };
        let fingerprint = fingerprint("first-token");
        let text =
            entry("shop", "old-of-shop") + &entry("shop", "new-of-shop") + &entry(&fingerprint, "of-thief");
        let set = TokenSet::parse(None, Some(&text)).unwrap();
        assert_eq!(id(&set, "old-of-shop"), id(&set, "new-of-shop"), "so one is replaced by another");
        assert_ne!(id(&set, "of-thief"), id(&plain, "first-token"), "a name is no token");
        assert_eq!(set.holder_named("shop"), id(&set, "new-of-shop"));
        assert_eq!(plain.holder_named("shop"), id(&set, "new-of-shop"), "also when it is gone");
        assert_eq!(plain.holder_named(&fingerprint), id(&plain, "first-token"));
        assert_eq!(set.holder_named(&id(&plain, "first-token").to_string()), id(&plain, "first-token"));
        assert!([&plain, &set].iter().all(|set| set.holders().all(|holder| holder.id != HolderId::OPEN)));
    }

    // CLOUD-1111
    #[test]
    fn a_short_or_empty_token_stops_the_start() {
        for bad in ["short", "", " , ", "with space", "tökenxxxxx", "[brackets]"] {
            assert!(TokenSet::parse(Some(bad), None).is_err(), "{bad:?}");
            assert!(TokenSet::parse(None, Some(&bad.replace('[', "#"))).is_err(), "{bad:?}");
        }
        assert!(TokenSet::parse(None, None).unwrap().is_empty());
    }

    const FILE: &str = r#"
        # The control plane's own comes first.
        [[token]]
        name = "control"
        token = "token-of-the-control-plane"
        scopes = ["admin"]
        [[token]]
        name = "node one"
        sha256 = "DIGEST"
        scopes = ["node"]
        node_id = "gpu-node-1"
        [[token]]
        name = "ci"
        token = "token-of-ci"
        scopes = ["client"]
        expires = 2026-06-02T00:00:00Z
    "#;

    // CLOUD-2013
    #[test]
    fn a_mark_at_the_start_of_the_file_is_no_part_of_a_token() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        std::fs::write(&path, "\u{feff}first-token\n").unwrap();
        let set = TokenSet::check_file(&path).unwrap();
        assert!(matches!(set.look_up("first-token", at("2026-06-01T00:00:00Z")), Verdict::Known(_)));
    }

    // CLOUD-1119
    #[test]
    fn a_file_of_toml_gives_names_scopes_nodes_and_ends() {
        let text = FILE.replace("DIGEST", &sha256("token-of-node-1"));
        let set = TokenSet::parse(None, Some(&text)).unwrap();
        assert_eq!(
            set.to_send(at("2026-06-01T00:00:00Z")).unwrap().expose_secret(),
            "token-of-the-control-plane"
        );
        let Verdict::Known(node) = set.look_up("token-of-node-1", at("2026-06-01T00:00:00Z")) else {
            panic!("it is known by its digest")
        };
        assert_eq!(
            (node.name.as_str(), node.fingerprint.as_str()),
            ("node one", fingerprint("token-of-node-1").as_str())
        );
        assert_eq!(node.node_id, Some(NodeId::new("gpu-node-1").unwrap()));
        assert!(node.has(Scope::Node) && !node.has(Scope::Client) && !node.has(Scope::Admin));
        assert_eq!(known(&set, "token-of-ci").as_deref(), Some("ci"));
        let ends =
            text.replacen("scopes = [\"admin\"]", "scopes = [\"admin\"]\nexpires = 2026-05-01T00:00:00Z", 1);
        let next = TokenSet::parse(None, Some(&ends)).unwrap();
        assert_eq!(next.to_send(at("2026-06-01T00:00:00Z")).unwrap().expose_secret(), "token-of-ci");
        let late = set.look_up("token-of-ci", at("2026-06-02T00:00:00Z"));
        assert!(matches!(late, Verdict::Expired(_)));
        let Verdict::Known(control) = set.look_up("token-of-the-control-plane", at("2026-06-01T00:00:00Z"))
        else {
            panic!("it is known")
        };
        assert!([Scope::Client, Scope::Node, Scope::Admin].iter().all(|scope| control.has(*scope)));
    }

    // CLOUD-2757
    #[test]
    fn a_token_of_nodes_that_is_bound_to_none_is_bounded_in_their_number() {
        let most = |more: &str| {
            let text = format!("[[token]]\nname = \"x\"\ntoken = \"token-of-x\"\n{more}");
            let set = TokenSet::parse(None, Some(&text));
            set.map(|set| set.holders().next().unwrap().max_nodes).map_err(|error| error.to_string())
        };
        assert_eq!(most("scopes = [\"node\"]"), Ok(Some(64)));
        assert_eq!(most("scopes = [\"node\", \"client\"]\nmax_nodes = 500"), Ok(Some(500)));
        for unbounded in
            ["[\"node\"]\nnode_id = \"a\"", "[\"admin\"]", "[\"client\"]", "[\"node\", \"admin\"]"]
        {
            assert_eq!(most(&format!("scopes = {unbounded}")), Ok(None), "{unbounded}");
        }
        for bad in [
            "[\"node\"]\nmax_nodes = 0",
            "[\"client\"]\nmax_nodes = 1",
            "[\"node\"]\nnode_id = \"a\"\nmax_nodes = 1",
            "[\"admin\"]\nmax_nodes = 1",
        ] {
            let error = most(&format!("scopes = {bad}")).unwrap_err();
            assert!(error.contains("max_nodes is at least 1"), "{bad}: {error}");
        }
        let plain = TokenSet::parse(Some("plain-token"), None).unwrap();
        assert_eq!(plain.holders().next().unwrap().max_nodes, None);
    }

    // CLOUD-2701
    #[test]
    fn an_entry_that_is_made_is_read_as_it_was_meant_whatever_its_name() {
        let token = generate().unwrap();
        for name in ["ann", "a \"quoted\" \\ name", "line\nbreak = 1"] {
            let made = entry(name, &token, &[Scope::Client, Scope::Operator]);
            let set = TokenSet::parse(None, Some(made.expose_secret())).unwrap();
            assert_eq!(known(&set, token.expose_secret()).as_deref(), Some(name));
            let holder = set.holders().next().unwrap();
            assert_eq!(holder.scopes(), [Scope::Client, Scope::Operator]);
            assert!(holder.has(Scope::Operator) && !holder.has(Scope::Admin) && !holder.has(Scope::Node));
        }
    }

    // CLOUD-1114
    #[test]
    fn what_is_wrong_in_a_file_is_named_and_no_token_shown() {
        let entry = |more: &str| format!("[[token]]\nname = \"x\"\ntoken = \"secret-of-x\"\n{more}");
        let scopes = "scopes = [\"client\"]\n";
        let cases = [
            (entry(""), "scopes must name"),
            (
                entry("scopes = [\"god\"]"),
                "line 4: unknown scope: there are \"client\", \"node\", \"control\", \"operator\", \"metrics\", \"admin\"",
            ),
            (entry(&format!("{scopes}colour = 1")), "line 5: unknown field"),
            (entry(&format!("{scopes}node_id = \"a\"")), "node_id binds"),
            (entry(&format!("{scopes}sha256 = \"00\"")), "either token or sha256"),
            (entry(&format!("{scopes}expires = 2027-01-01")), "with its zone"),
            (entry(scopes) + &entry(scopes), "the same token as x"),
            ("[[token]]\nname = \"x\"\ntoken = \"secret\nscopes = [\"client\"]".into(), "line 3"),
            (
                "[[token]]\nname = \"x\"\nsha256 = \"secret-of-x\"\nscopes = [\"client\"]".into(),
                "64 hexadecimal",
            ),
            ("[[token]]\nname = \"x\"\ntoken = \"secret\"\nscopes = [\"client\"]".into(), "at least 8"),
            ("[other]".into(), "line 1: unknown field"),
        ];
        for (text, part) in cases {
            let error = TokenSet::parse(None, Some(&text)).unwrap_err().to_string();
            assert!(error.contains(part) && !error.contains("secret"), "{part}: {error}");
        }
    }

    // CLOUD-3012
    #[test]
    fn a_file_that_is_checked_is_named_as_it_was_given() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.toml");
        let named = path.display().to_string();
        let wrong = || TokenSet::check_file(&path).unwrap_err().to_string();
        assert!(wrong().starts_with(&format!("{named} cannot be read: ")), "{}", wrong());
        for text in ["[[token]]\nname = \"a\"\ntoken = \"12345678\"\nscopes = [\"god\"]", "short", ""] {
            std::fs::write(&path, text).unwrap();
            assert!(wrong().starts_with(&named) && !wrong().contains("LLORCH"), "{}", wrong());
        }
        std::fs::write(&path, "long-enough").unwrap();
        assert_eq!(TokenSet::check_file(&path).unwrap().holders().count(), 1);
    }

    // CLOUD-1112
    #[test]
    fn tokens_are_not_printed_and_new_ones_differ() {
        let set = TokenSet::parse(Some("very-secret"), None).unwrap();
        assert!(!format!("{set:?}").contains("secret"));
        let (one, other) = (generate().unwrap(), generate().unwrap());
        assert_eq!(one.expose_secret().len(), 64);
        assert_ne!(one.expose_secret(), other.expose_secret());
        assert!(TokenSet::parse(Some(one.expose_secret()), None).is_ok());
    }
}
