//! The file of pools: what a node is to run, as its operator writes it.
//!
//! TOML; a field that nobody knows is an error with its line, because a misspelt one must not
//! be ignored. What the types cannot see is checked as a whole, and each complaint names its
//! field. Nothing of the machine is looked at here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use node_core::supervisor::{Device, GpuUuid};
use pool_registry_types::pool::EngineKind;
use pool_registry_types::{Digest, ModelRef, PoolId};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use utoipa::{PartialSchema, ToSchema};

use crate::source::ModelSource;

/// Largest file of pools that is read, bytes.
pub(crate) const MAX_BYTES: u64 = 1024 * 1024;
/// Most replicas of a pool.
const MAX_REPLICAS: u32 = 64;
/// Memory of each GPU that is left to others unless the file says otherwise, bytes.
const DEFAULT_RESERVE: u64 = 512 * 1024 * 1024;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolsFile {
    #[serde(default)]
    pub provisioning: Provisioning,
    #[serde(default)]
    pub memory: Memory,
    /// Where models come from, by the names that pools use.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, ModelSpec>)]
    pub models: BTreeMap<ModelRef, ModelSpec>,
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, PoolSpec>)]
    pub pools: BTreeMap<PoolId, PoolSpec>,
}

/// What the node may fetch by itself. Off unless allowed here, and nothing at all where
/// `POOL_MANAGERD_FORBID_PROVISIONING` is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Provisioning {
    /// Download models.
    #[serde(default)]
    pub downloads: bool,
    /// Install engines from the package index, each into a folder of its own.
    #[serde(default)]
    pub installs: bool,
}

/// What memory engines may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Bytes of each GPU, and of the machine's memory, that engines leave free.
    #[serde(default = "default_reserve")]
    pub reserve_bytes: u64,
    /// Bytes of the machine's own memory that engines without a GPU may take together; all of
    /// it when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_bytes: Option<u64>,
}

fn default_reserve() -> u64 {
    DEFAULT_RESERVE
}

impl Default for Memory {
    fn default() -> Self {
        Self { reserve_bytes: DEFAULT_RESERVE, host_bytes: None }
    }
}

/// A GPU, or an instance of one (MIG): by the driver's number, or by its UUID (`GPU-…`, `MIG-…`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum GpuName {
    Number(u32),
    Uuid(String),
}

impl GpuName {
    pub(crate) fn number(&self) -> Option<u32> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Uuid(_) => None,
        }
    }

    fn is_instance(&self) -> bool {
        matches!(self, Self::Uuid(uuid) if uuid.starts_with("MIG-"))
    }

    fn is_name(&self) -> bool {
        match self {
            Self::Number(_) => true,
            Self::Uuid(uuid) => {
                (uuid.starts_with("GPU-") || self.is_instance())
                    && uuid.len() > 4
                    && uuid.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'/'))
                    && GpuUuid::new(uuid).is_some()
            }
        }
    }

    /// As the books of memory know it.
    pub(crate) fn device(&self) -> Device {
        let of_uuid = |uuid: &String| GpuUuid::new(uuid).map(Device::Named);
        match self {
            Self::Number(number) => Device::Gpu(*number),
            // What is no UUID is no name of a GPU, and never gets here.
            Self::Uuid(uuid) => of_uuid(uuid).unwrap_or(Device::Gpu(u32::MAX)),
        }
    }
}

impl fmt::Display for GpuName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "GPU{number}"),
            Self::Uuid(uuid) => f.write_str(uuid),
        }
    }
}

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// A path, `file:/…`, `https://…`, `hf:org/repo` or `hf:org/repo/file.gguf`; of a model in several
    /// files (`NAME-00001-of-00003.gguf`) any of them names them all.
    pub source: String,
    /// What its content must be: `sha256:…`, of all its files one after another where they are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// Where the projector comes from that lets the model see or hear, as `source` says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mmproj: Option<String>,
}

/// When the engines of a pool run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LoadWhen {
    #[default]
    Always,
    /// When a task waits; they make room for others when they are idle.
    OnDemand,
}

/// Where the engine itself comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "mode", rename_all = "snake_case", deny_unknown_fields)]
pub enum Provision {
    /// It runs already: at the URL, or announced by a handoff file. Nothing is started.
    External {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        url: Option<String>,
    },
    /// A program: a path, or a name on the PATH.
    Binary {
        program: String,
        /// Its whole command line where it differs from the engine's own. `{port}`, `{model}`,
        /// `{model_path}`, `{mmproj_path}`, `{slots}`, `{ctx}`, `{ctx_total}`, `{pool_id}` and `{replica_id}` are filled in.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        args: Option<Vec<String>>,
    },
    /// An environment of its own from the package index: llama.cpp's server, or vLLM.
    Package {
        /// The package's version; llama.cpp's has a pinned one with its hash.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        version: Option<String>,
    },
}

/// One pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolSpec {
    pub engine: EngineKind,
    /// The name by which tasks ask for it; an entry of `models`, or a model that is staged.
    pub model: ModelRef,
    /// More names by which tasks may ask for it. They stay when another model is loaded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<ModelRef>,
    pub provision: Provision,
    #[serde(default)]
    pub load: LoadWhen,
    /// Tokens of context of one slot; absent: what the model says, at most 8,192.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ctx: Option<u32>,
    /// Requests that one replica serves at a time.
    #[serde(default = "default_slots")]
    pub slots: u32,
    #[serde(default = "one")]
    pub replicas: u32,
    /// Numbers of the GPUs; none: the machine's own memory.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<GpuName>,
    /// What tasks may ask for; absent: made of the devices, as in `GPU0+GPU1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_mask: Option<String>,
    /// Shares of the devices, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tensor_split: Vec<f64>,
    /// One for each replica; absent: any that is free.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// A file with the key that the engine asks for; an absolute path. An engine that is started
    /// here is told of it where it has a flag for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub api_key_file: Option<PathBuf>,
    /// Added to the engine's command line.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flags: Vec<String>,
    /// Bytes that one replica takes; absent: reckoned from the model's file and its context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Seconds without work after which an on-demand pool is unloaded; absent: only to make room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_secs: Option<u64>,
    /// Seconds that an on-demand pool which is never idle keeps its place while others wait.
    #[serde(default = "minute")]
    pub min_resident_secs: u64,
    /// Seconds from the start to the first good health call.
    #[serde(default = "ten_minutes")]
    pub load_timeout_secs: u64,
    /// Seconds that attempts may still run when the engine is unloaded or replaced.
    #[serde(default = "minute")]
    pub drain_timeout_secs: u64,
    /// Seconds from SIGTERM to SIGKILL.
    #[serde(default = "ten")]
    pub stop_grace_secs: u64,
    /// Ends within a minute after which the pool is given up.
    #[serde(default = "ten_exits")]
    pub exit_limit: u32,
    /// The engine outlives `pool-managerd` and is taken over by the next one.
    #[serde(default)]
    pub keep_on_exit: bool,
}

fn default_slots() -> u32 {
    4
}
fn one() -> u32 {
    1
}
fn ten() -> u64 {
    10
}
fn ten_exits() -> u32 {
    10
}
fn minute() -> u64 {
    60
}
fn ten_minutes() -> u64 {
    600
}

/// Why a file of pools is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PoolsFileError {
    #[error("{}: {reason}", path.display())]
    Unreadable { path: PathBuf, reason: String },
    /// With line and column.
    #[error("{0}")]
    Syntax(String),
    #[error("{field}: {what}")]
    Field { field: String, what: String },
}

impl PoolsFile {
    /// Errors: as [`Self::parse`], and that it cannot be read.
    pub fn read(path: &Path) -> Result<Self, PoolsFileError> {
        let read = std::fs::read_to_string(path);
        let unreadable = |error: std::io::Error| PoolsFileError::Unreadable {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        Self::parse(&read.map_err(unreadable)?)
    }

    pub fn parse(text: &str) -> Result<Self, PoolsFileError> {
        // Some editors begin a file with it.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let file: Self = toml::from_str(text)
            .map_err(|error| PoolsFileError::Syntax(error.to_string().trim().to_owned()))?;
        file.check()?;
        Ok(file)
    }

    /// The JSON schema of the file, as JSON.
    pub fn schema() -> String {
        let mut parts = vec![("PoolsFile".to_owned(), Self::schema_itself())];
        Self::schemas(&mut parts);
        let parts: BTreeMap<String, _> = parts.into_iter().collect();
        let document = serde_json::json!({
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "The file of pools of pool-managerd (POOL_MANAGERD_POOLS)",
            "$ref": "#/components/schemas/PoolsFile",
            "components": { "schemas": parts },
        });
        serde_json::to_string_pretty(&document).expect("a schema is always JSON")
    }

    fn schema_itself() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        <Self as PartialSchema>::schema()
    }

    fn check(&self) -> Result<(), PoolsFileError> {
        for (name, model) in &self.models {
            let Some(mmproj) = &model.mmproj else { continue };
            let bad = |what: String| PoolsFileError::Field { field: format!("models.{name}.mmproj"), what };
            let source = ModelSource::parse(mmproj).map_err(|error| bad(error.to_string()))?;
            if matches!(source, ModelSource::Hub { file: None, .. }) {
                return Err(bad("must name the projector's file in the repository".into()));
            }
        }
        let mut ports: BTreeMap<u16, &PoolId> = BTreeMap::new();
        for (id, pool) in &self.pools {
            pool.check(id)?;
            for port in &pool.ports {
                if let Some(other) = ports.insert(*port, id) {
                    return wrong(id, "ports", format!("{port} is pool {other}'s or given twice"));
                }
            }
        }
        Ok(())
    }
}

fn wrong<T>(id: &PoolId, field: &str, what: impl Into<String>) -> Result<T, PoolsFileError> {
    Err(PoolsFileError::Field { field: format!("pools.{id}.{field}"), what: what.into() })
}

impl PoolSpec {
    fn check(&self, id: &PoolId) -> Result<(), PoolsFileError> {
        if !(1..=MAX_REPLICAS).contains(&self.replicas) {
            return wrong(id, "replicas", format!("must be 1 to {MAX_REPLICAS}"));
        }
        if !(1..=handoff_watcher::handoff::MAX_SLOTS).contains(&self.slots) {
            return wrong(id, "slots", format!("must be 1 to {}", handoff_watcher::handoff::MAX_SLOTS));
        }
        if !self.ports.is_empty() && self.ports.len() != usize::try_from(self.replicas).unwrap_or(usize::MAX)
        {
            return wrong(id, "ports", format!("must be {}, one for each replica", self.replicas));
        }
        if self.ports.contains(&0) {
            return wrong(id, "ports", "0 is no port: leave the field out for any free one");
        }
        let unique: BTreeSet<&GpuName> = self.devices.iter().collect();
        if unique.len() != self.devices.len() {
            return wrong(id, "devices", "names a GPU twice");
        }
        let of_uuid = |device: &&GpuName| device.number().is_none();
        if let Some(bad) = self.devices.iter().find(|device| !device.is_name()) {
            return wrong(id, "devices", format!("\"{bad}\" is no number, GPU-… or MIG-…"));
        }
        if ![0, self.devices.len()].contains(&self.devices.iter().filter(of_uuid).count()) {
            return wrong(id, "devices", "engines take numbers or UUIDs, not both");
        }
        if self.devices.len() > 1 && self.devices.iter().any(GpuName::is_instance) {
            return wrong(id, "devices", "a program sees one MIG instance: give each a pool of its own");
        }
        let shares = &self.tensor_split;
        if !shares.is_empty() && shares.len() != self.devices.len() {
            return wrong(id, "tensor_split", "must have one share for each of the devices");
        }
        if shares.iter().any(|share| !share.is_finite() || *share < 0.0)
            || (!shares.is_empty() && shares.iter().sum::<f64>() <= 0.0)
        {
            return wrong(id, "tensor_split", "shares must not be negative, and not all be 0");
        }
        if self.ttl_secs.is_some() && self.load == LoadWhen::Always {
            return wrong(
                id,
                "ttl_secs",
                "only for load = \"on_demand\": what always runs is never unloaded",
            );
        }
        if self.exit_limit == 0 || self.load_timeout_secs == 0 {
            return wrong(id, "exit_limit, load_timeout_secs", "must be at least 1");
        }
        if self.api_key_file.as_ref().is_some_and(|path| !path.is_absolute()) {
            return wrong(id, "api_key_file", "must be an absolute path");
        }
        if self.api_key_file.is_some() && matches!(self.provision, Provision::Package { .. }) {
            return wrong(id, "api_key_file", "an engine from the package index asks for no key");
        }
        if self.env.keys().any(|name| name.is_empty() || name.contains(['=', '\0'])) {
            return wrong(id, "env", "a name must not be empty or hold =");
        }
        if self.device_mask.as_ref().is_some_and(|mask| mask.is_empty() || mask.chars().any(char::is_control))
        {
            return wrong(id, "device_mask", "must be text without control characters");
        }
        match &self.provision {
            Provision::External { .. } if self.load == LoadWhen::OnDemand => {
                wrong(id, "load", "an external engine is not started, so it cannot be loaded on demand")
            }
            Provision::External { .. } if self.replicas != 1 => wrong(
                id,
                "replicas",
                "an external engine is one: give it a pool of its own, or handoff files",
            ),
            Provision::External { .. } if self.keep_on_exit => {
                wrong(id, "keep_on_exit", "an external engine is not started, so it is not kept either")
            }
            Provision::External { url: Some(url) }
                if !url.starts_with("http://") && !url.starts_with("https://") =>
            {
                wrong(id, "provision.url", format!("{url:?} is not http://host:port"))
            }
            Provision::Binary { program, .. } if program.trim().is_empty() => {
                wrong(id, "provision.program", "must be a path or a name on the PATH")
            }
            Provision::Binary { args: None, .. } if self.engine == EngineKind::OpenAi => {
                wrong(id, "provision.args", "needed for engine \"openai\": its command line is not known")
            }
            Provision::Binary { args: Some(args), .. } if !args.iter().any(|arg| arg.contains("{port}")) => {
                wrong(
                    id,
                    "provision.args",
                    "must say {port}, so that the engine listens where it is looked for",
                )
            }
            Provision::Package { version } => match (self.engine, version) {
                (EngineKind::LlamaCpp, _) => Ok(()),
                (EngineKind::Vllm, Some(version)) if is_version(version) => Ok(()),
                (EngineKind::Vllm, _) => {
                    wrong(id, "provision.version", "must pin a version of vllm, as in \"0.11.0\"")
                }
                (other, _) => wrong(
                    id,
                    "provision.mode",
                    format!("there is no package of {other}: llamacpp and vllm have one"),
                ),
            },
            _ => Ok(()),
        }
    }

    /// The models by whose names tasks may ask.
    pub fn models(&self) -> Vec<ModelRef> {
        std::iter::once(&self.model).chain(&self.aliases).cloned().collect()
    }

    /// The devices that tasks may ask for by name.
    pub fn mask(&self) -> Option<String> {
        let named = || self.devices.iter().map(|n| n.to_string()).collect::<Vec<_>>().join("+");
        self.device_mask.clone().or_else(|| (!self.devices.is_empty()).then(named))
    }

    /// The same for the same pool on every start of every build of this version.
    pub fn fingerprint(&self, model: Option<&ModelSpec>) -> u64 {
        let text = serde_json::to_vec(&(self, model)).expect("a pool is always JSON");
        let hash = Sha256::digest(text);
        u64::from_be_bytes(hash[..8].try_into().expect("a SHA-256 has 32 bytes"))
    }
}

fn is_version(text: &str) -> bool {
    !text.is_empty()
        && text.len() < 64
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b".+-_!".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[provisioning]
downloads = true

[models.small]
source = "hf:org/repo/small.gguf"

[pools.pool-0]
engine = "llamacpp"
model = "small"
aliases = ["chat"]
slots = 2
devices = [0, 1]
tensor_split = [3, 1]
provision = { mode = "binary", program = "llama-server" }

[pools.pool-1]
engine = "openai"
model = "other"
load = "on_demand"
ttl_secs = 300
provision = { mode = "binary", program = "serve", args = ["--port", "{port}"] }
"#;

    // CLOUD-2440
    #[test]
    fn a_file_of_pools_is_read_with_its_defaults() {
        let file = PoolsFile::parse(GOOD).unwrap();
        let pool = &file.pools[&PoolId::new("pool-0").unwrap()];
        assert_eq!((pool.replicas, pool.load, pool.exit_limit), (1, LoadWhen::Always, 10));
        assert_eq!(pool.mask().as_deref(), Some("GPU0+GPU1"));
        assert_eq!(pool.models().len(), 2);
        assert_eq!((file.memory.reserve_bytes, file.provisioning.installs), (DEFAULT_RESERVE, false));
        assert_eq!(PoolsFile::parse("").unwrap(), PoolsFile::default());
        assert_eq!(PoolsFile::parse(&format!("\u{feff}{GOOD}")).unwrap(), file);
        let other = PoolSpec { slots: 3, ..pool.clone() };
        assert_ne!(pool.fingerprint(None), other.fingerprint(None));
    }

    // CLOUD-2441
    #[test]
    fn what_is_unknown_is_refused_with_its_line_and_what_contradicts_with_its_field() {
        let error = |text: &str| PoolsFile::parse(text).unwrap_err().to_string();
        let misspelt = error(&GOOD.replace("slots = 2", "slotz = 2"));
        assert!(
            misspelt.contains("line 12") && misspelt.contains("column 1") && misspelt.contains("slotz"),
            "{misspelt}"
        );
        assert!(error("[pools.pool-0").contains("line 1"));
        assert!(error(&GOOD.replace("pool-0", "\"a/b\"")).contains("pool_id"));
        for (old, new, field) in [
            ("slots = 2", "slots = 0", "pools.pool-0.slots"),
            ("small.gguf\"", "small.gguf\"\nmmproj = \"hf:org/repo\"", "models.small.mmproj"),
            ("slots = 2", "replicas = 0", "pools.pool-0.replicas"),
            ("slots = 2", "replicas = 2\nports = [80]", "pools.pool-0.ports"),
            ("slots = 2", "ports = [0]", "pools.pool-0.ports"),
            ("slots = 2", "ttl_secs = 5", "pools.pool-0.ttl_secs"),
            ("devices = [0, 1]", "devices = [0, 0]", "pools.pool-0.devices"),
            ("devices = [0, 1]", "devices = [0, \"GPU-a\"]", "pools.pool-0.devices"),
            ("devices = [0, 1]", "devices = [\"MIG-a\", \"MIG-b\"]", "pools.pool-0.devices"),
            ("devices = [0, 1]", "devices = [\"cuda:0\", \"GPU-a\"]", "pools.pool-0.devices"),
            ("[3, 1]", "[3]", "pools.pool-0.tensor_split"),
            ("[3, 1]", "[0, 0]", "pools.pool-0.tensor_split"),
            ("\"llama-server\"", "\" \"", "pools.pool-0.provision.program"),
            (", args = [\"--port\", \"{port}\"]", "", "pools.pool-1.provision.args"),
            ("\"{port}\"", "\"8080\"", "pools.pool-1.provision.args"),
            (
                "mode = \"binary\", program = \"serve\", args = [\"--port\", \"{port}\"]",
                "mode = \"package\"",
                "pools.pool-1.provision.mode",
            ),
            (
                "mode = \"binary\", program = \"serve\", args = [\"--port\", \"{port}\"]",
                "mode = \"external\"",
                "pools.pool-1.load",
            ),
            (
                "mode = \"binary\", program = \"llama-server\" }",
                "mode = \"external\" }\nkeep_on_exit = true",
                "pools.pool-0.keep_on_exit",
            ),
        ] {
            assert!(GOOD.contains(old), "{old}");
            let reported = error(&GOOD.replace(old, new));
            assert!(reported.starts_with(field), "{new}: {reported}");
        }
    }

    // CLOUD-2442
    #[test]
    fn the_schema_names_every_field_and_refuses_unknown_ones() {
        let schema: serde_json::Value = serde_json::from_str(&PoolsFile::schema()).unwrap();
        let pool = &schema["components"]["schemas"]["PoolSpec"];
        assert_eq!(pool["additionalProperties"], false);
        let whole = serde_json::to_value(PoolsFile::parse(GOOD).unwrap()).unwrap();
        for field in whole["pools"]["pool-0"].as_object().unwrap().keys() {
            assert!(pool["properties"].get(field).is_some(), "{field}");
        }
    }
}
