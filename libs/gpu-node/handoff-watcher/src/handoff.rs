//! One handoff file: its name, its content, and everything that can be wrong with them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;

use pool_registry_types::nearest::nearest;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::{ModelRef, PoolId, ReplicaId};
use serde::Deserialize;
use serde::de::IgnoredAny;
use utoipa::{PartialSchema, ToSchema};

/// Largest handoff file that is read, bytes.
pub(crate) const MAX_HANDOFF_BYTES: u64 = 64 * 1024;
/// Most slots that a replica may claim.
pub const MAX_SLOTS: u32 = 4096;

/// Which replica a file stands for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HandoffName {
    pub pool_id: PoolId,
    pub replica_id: ReplicaId,
}

impl fmt::Display for HandoffName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.pool_id, self.replica_id)
    }
}

/// What an engine's starter says of it. Unknown fields are ignored: other programs write it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, ToSchema)]
pub struct Handoff {
    /// The file is named `POOL_ID-REPLICA_ID.json`.
    #[schema(value_type = String)]
    pub pool_id: PoolId,
    #[schema(value_type = String)]
    pub replica_id: ReplicaId,
    pub engine: EngineKind,
    /// For people.
    #[serde(default)]
    pub engine_version: Option<String>,
    /// `http://host:port`, optionally with a path; without a trailing slash once parsed.
    pub url: String,
    /// The devices that tasks may ask for by name.
    #[serde(default)]
    pub device_mask: Option<String>,
    /// Tasks that it runs at a time. Asked of the engine when absent.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 4096)]
    pub slots: Option<u32>,
    /// The engine's process: the file counts as long as it lives.
    #[serde(default)]
    pub pid: Option<u32>,
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub model_ref: Option<ModelRef>,
    /// The names by which tasks may ask. Asked of the engine when absent.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub models: Vec<ModelRef>,
    /// Tokens of one slot. Asked of the engine when absent.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub ctx_max: Option<u32>,
    /// A file with the key that the engine asks for; an absolute path.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub api_key_file: Option<PathBuf>,
}

impl Handoff {
    pub fn name(&self) -> HandoffName {
        HandoffName { pool_id: self.pool_id.clone(), replica_id: self.replica_id.clone() }
    }

    /// The JSON schema of the file, as JSON.
    pub fn schema() -> String {
        let mut parts = vec![("Handoff".to_owned(), <Self as PartialSchema>::schema())];
        Self::schemas(&mut parts);
        let parts: BTreeMap<String, _> = parts.into_iter().collect();
        let document = serde_json::json!({
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "A handoff file: POOL_ID-REPLICA_ID.json in the runtime directory of a node",
            "$ref": "#/components/schemas/Handoff",
            "components": { "schemas": parts },
        });
        serde_json::to_string_pretty(&document).expect("a schema is always JSON")
    }

    /// Where the engine is, the same for every way to write it.
    pub(crate) fn address(&self) -> String {
        let lower = self.url.to_ascii_lowercase();
        let (scheme, rest) = lower.split_once("://").unwrap_or(("", &lower));
        let (authority, _) = rest.split_once('/').unwrap_or((rest, ""));
        let path = &self.url[self.url.len() - (rest.len() - authority.len())..];
        let host = authority
            .rsplit_once(':')
            .map_or(authority, |(host, port)| if port.contains(']') { authority } else { host });
        let host = if host == "localhost" { "127.0.0.1" } else { host };
        format!("{scheme}://{host}:{}{path}", self.port())
    }

    /// The port of its address; 0 where that is none.
    pub(crate) fn port(&self) -> u16 {
        let usual = if self.url.to_ascii_lowercase().starts_with("https:") { 443 } else { 80 };
        let authority =
            self.url.split("://").nth(1).and_then(|rest| rest.split('/').next()).unwrap_or_default();
        match authority.rsplit_once(':') {
            Some((_, port)) if !port.contains(']') => port.parse().unwrap_or(0),
            _ => usual,
        }
    }

    /// The model names that the file gives, each once, if it gives any.
    pub fn model_names(&self) -> Vec<ModelRef> {
        let mut seen = BTreeSet::new();
        self.model_ref.iter().chain(&self.models).filter(|name| seen.insert(*name)).cloned().collect()
    }
}

/// Why a file binds nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("larger than {MAX_HANDOFF_BYTES} bytes")]
    TooLarge,
    #[error("not a regular file inside the runtime directory {0}")]
    LinkedOut(PathBuf),
    #[error("not looked at: there are more handoff files than are read")]
    TooMany,
    #[error("cannot be read: {0}")]
    Unreadable(String),
    #[error("not a handoff: {0}")]
    Malformed(String),
    #[error("must be named {expected}.json, after its pool_id and replica_id")]
    WronglyNamed { expected: String },
    #[error("slots: must be between 1 and {MAX_SLOTS}")]
    Slots,
    #[error("url: {0}")]
    Url(String),
    #[error("pid: process {0} is gone, or is not the one that wrote the file")]
    ProcessGone(u32),
    #[error("url: {0} has the same engine, which counts once")]
    SameEngine(String),
}

/// The hosts on which engines may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineHosts(BTreeSet<String>);

impl Default for EngineHosts {
    /// This machine only.
    fn default() -> Self {
        Self(["127.0.0.1", "localhost", "[::1]"].map(str::to_owned).into())
    }
}

impl EngineHosts {
    /// A comma-separated list of host names and addresses.
    pub fn parse(list: &str) -> Self {
        Self(list.split(',').map(|host| host.trim().to_ascii_lowercase()).filter(|h| !h.is_empty()).collect())
    }

    fn allows(&self, host: &str) -> bool {
        self.0.contains(&host.to_ascii_lowercase())
    }
}

/// Reads a file's content. `stem` is its name without `.json`.
pub fn parse(stem: &str, content: &[u8], hosts: &EngineHosts) -> Result<Handoff, Fault> {
    let content = without_mark(content);
    // A struct may also be read from an array, by the order of its fields: that is no contract.
    if !content.trim_ascii_start().starts_with(b"{") {
        return Err(Fault::Malformed("must be a JSON object".into()));
    }
    let mut handoff: Handoff =
        serde_json::from_slice(content).map_err(|error| Fault::Malformed(error.to_string()))?;
    let expected = handoff.name().to_string();
    if stem != expected {
        return Err(Fault::WronglyNamed { expected });
    }
    if handoff.slots.is_some_and(|slots| !(1..=MAX_SLOTS).contains(&slots)) {
        return Err(Fault::Slots);
    }
    if handoff.ctx_max == Some(0) {
        return Err(Fault::Malformed("ctx_max: must be at least 1".into()));
    }
    if handoff.api_key_file.as_ref().is_some_and(|path| !path.is_absolute()) {
        return Err(Fault::Malformed("api_key_file: must be an absolute path".into()));
    }
    check_url(&handoff.url, hosts)?;
    while handoff.url.ends_with('/') {
        handoff.url.pop();
    }
    Ok(handoff)
}

/// Without the mark that some editors begin a file with.
fn without_mark(content: &[u8]) -> &[u8] {
    content.strip_prefix("\u{feff}".as_bytes()).unwrap_or(content)
}

/// The fields of a handoff.
const FIELDS: [&str; 12] = [
    "pool_id",
    "replica_id",
    "engine",
    "engine_version",
    "url",
    "device_mask",
    "slots",
    "pid",
    "model_ref",
    "models",
    "ctx_max",
    "api_key_file",
];
/// Most unknown fields of a file that are told.
const MAX_UNKNOWN: usize = 8;
/// Most characters of one that are told.
const MAX_FIELD_CHARS: usize = 64;

/// The fields that no handoff has, each with the nearest one that there is.
pub(crate) fn unknown_fields(content: &[u8]) -> Vec<String> {
    let read = serde_json::from_slice::<BTreeMap<String, IgnoredAny>>(without_mark(content));
    let fields = read.unwrap_or_default().into_keys().filter(|field| !FIELDS.contains(&field.as_str()));
    let reported = fields.take(MAX_UNKNOWN).map(|field| {
        let field: String = field.chars().take(MAX_FIELD_CHARS).collect();
        match nearest(&field, FIELDS, 1).first() {
            Some(near) => format!("{field:?}, is {near} meant?"),
            None => format!("{field:?}"),
        }
    });
    reported.collect()
}

/// The pool that a file is for by its name and by what it holds, whatever else is wrong with it.
pub fn pool_named(stem: &str, content: &[u8]) -> Option<PoolId> {
    #[derive(Deserialize)]
    struct Named {
        pool_id: PoolId,
        replica_id: ReplicaId,
    }
    let Named { pool_id, replica_id } = serde_json::from_slice(without_mark(content)).ok()?;
    let name = HandoffName { pool_id, replica_id };
    (stem == name.to_string()).then_some(name.pool_id)
}

fn check_url(url: &str, hosts: &EngineHosts) -> Result<(), Fault> {
    let fault = |text: &str| Err(Fault::Url(text.to_owned()));
    let Some(rest) = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://")) else {
        return fault("must start with http:// or https://");
    };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    if authority.contains('@') {
        return fault("must not hold credentials");
    }
    if rest.contains(['?', '#']) || url.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return fault("must be a plain address without query or white space");
    }
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (authority, None),
    };
    let is_port =
        |text: &str| text.bytes().all(|b| b.is_ascii_digit()) && text.parse::<u16>().is_ok_and(|p| p > 0);
    if port.is_some_and(|port| !is_port(port)) {
        return fault("its port must be between 1 and 65535");
    }
    if !hosts.allows(host) {
        return Err(Fault::Url(format!("host {host:?} is not in POOL_MANAGERD_ENGINE_HOSTS")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    // CLOUD-2686
    #[test]
    fn the_schema_knows_every_field_and_no_other() {
        let schema: serde_json::Value = serde_json::from_str(&Handoff::schema()).unwrap();
        let handoff = &schema["components"]["schemas"]["Handoff"];
        let mut fields = FIELDS.to_vec();
        fields.sort_unstable();
        let known: Vec<&String> = handoff["properties"].as_object().unwrap().keys().collect();
        assert_eq!(known, fields);
        assert_eq!(handoff["required"], serde_json::json!(["pool_id", "replica_id", "engine", "url"]));
    }

    // CLOUD-2687
    #[test]
    fn an_address_is_the_same_however_it_is_written() {
        let of = |url: &str| {
            let text = format!(r#"{{"pool_id":"p","replica_id":"r0","engine":"vllm","url":"{url}"}}"#);
            parse("p-r0", text.as_bytes(), &EngineHosts::parse("127.0.0.1,localhost,[::1],gpu")).unwrap()
        };
        for (url, address, port) in [
            ("http://LOCALHOST:8000/", "http://127.0.0.1:8000", 8000),
            ("http://127.0.0.1:8000/A/v1", "http://127.0.0.1:8000/A/v1", 8000),
            ("http://[::1]:81", "http://[::1]:81", 81),
            ("https://gpu", "https://gpu:443", 443),
            ("http://[::1]", "http://[::1]:80", 80),
        ] {
            assert_eq!((of(url).address().as_str(), of(url).port()), (address, port));
        }
    }

    fn file(url: &str, more: &str) -> String {
        format!(r#"{{"pool_id":"pool-0","replica_id":"r0","engine":"llamacpp","url":"{url}"{more}}}"#)
    }

    fn read(stem: &str, content: &str) -> Result<Handoff, Fault> {
        parse(stem, content.as_bytes(), &EngineHosts::default())
    }

    // CLOUD-2001
    #[test]
    fn a_minimal_file_is_enough_and_unknown_fields_are_ignored() {
        let handoff = read("pool-0-r0", &file("http://127.0.0.1:8081/", r#","started_by":"me""#)).unwrap();
        assert_eq!(handoff.url, "http://127.0.0.1:8081");
        assert_eq!((handoff.slots, handoff.model_names().len()), (None, 0));
        let more = r#","model_ref":"a","models":["b","a"]"#;
        let handoff = read("pool-0-r0", &file("http://127.0.0.1:8081", more)).unwrap();
        assert_eq!(format!("{:?}", handoff.model_names()), "[a, b]");
    }

    // CLOUD-2013
    #[test]
    fn a_mark_at_the_start_is_skipped_and_a_field_that_is_none_is_told_with_the_nearest() {
        let marked = format!("\u{feff}{}", file("http://127.0.0.1:8081", r#","slot":3,"started_by":"me""#));
        assert_eq!(read("pool-0-r0", &marked).unwrap().slots, None);
        assert_eq!(pool_named("pool-0-r0", marked.as_bytes()), PoolId::new("pool-0").ok());
        let reported = unknown_fields(marked.as_bytes());
        assert_eq!(reported[0], "\"slot\", is slots meant?");
        assert!(reported.len() == 2 && reported[1].starts_with("\"started_by\""), "{reported:?}");
        let all: BTreeMap<&str, u8> = FIELDS.iter().map(|field| (*field, 0)).collect();
        assert!(unknown_fields(&serde_json::to_vec(&all).unwrap()).is_empty());
        let error =
            read("pool-0-r0", &file("http://127.0.0.1:8081", r#","models":["a b\u0007"]"#)).unwrap_err();
        assert!(error.to_string().contains("a b"), "the name that is refused is told: {error}");
    }

    // CLOUD-2002
    #[test]
    fn each_bad_file_is_refused_for_its_own_reason() {
        let url = "http://127.0.0.1:8081";
        assert!(matches!(read("pool-0-r0", "{\"pool_id\":"), Err(Fault::Malformed(_))));
        assert!(matches!(read("pool-0-r0", "[]"), Err(Fault::Malformed(_))));
        let by_order = r#"["pool-0","r0","vllm",null,"http://localhost",null,1,2,null,[],3]"#;
        assert!(matches!(read("pool-0-r0", by_order), Err(Fault::Malformed(_))));
        assert!(matches!(read("pool-0-r1", &file(url, "")), Err(Fault::WronglyNamed { .. })));
        let relative = file(url, r#","api_key_file":"key""#);
        assert!(
            matches!(read("pool-0-r0", &relative), Err(Fault::Malformed(why)) if why.contains("api_key_file"))
        );
        assert_eq!(read("pool-0-r0", &file(url, r#","slots":0"#)), Err(Fault::Slots));
        assert!(matches!(read("pool-0-r0", &file(url, r#","slots":-1"#)), Err(Fault::Malformed(_))));
        let bad_pool = file(url, "").replace("pool-0", "../etc");
        assert!(matches!(read("../etc-r0", &bad_pool), Err(Fault::Malformed(_))));
        for bad in [
            "ftp://127.0.0.1",
            "http://10.0.0.1:80",
            "http://me:pw@127.0.0.1:80",
            "http://127.0.0.1:0",
            "http://127.0.0.1:+80",
            "http://127.0.0.1:99999",
            "http://127.0.0.1:80/?x=1",
            "http://127.0.0.1.evil.example:80",
        ] {
            assert!(matches!(read("pool-0-r0", &file(bad, "")), Err(Fault::Url(_))), "{bad}");
        }
    }

    // CLOUD-2007
    #[test]
    fn other_hosts_are_taken_when_they_are_allowed() {
        let hosts = EngineHosts::parse("gpu-box, 10.0.0.5");
        assert!(parse("pool-0-r0", file("http://10.0.0.5:8000/base", "").as_bytes(), &hosts).is_ok());
        assert!(parse("pool-0-r0", file("http://127.0.0.1:8000", "").as_bytes(), &hosts).is_err());
    }

    proptest! {
        #[test]
        fn no_content_makes_it_panic(content in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse("pool-0-r0", &content, &EngineHosts::default());
        }
    }
}
