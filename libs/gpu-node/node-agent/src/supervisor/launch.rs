//! From a pool of the file to a command line: which program, which model, which memory.
//!
//! What is missing is named together with the line that brings it. Nothing is fetched here
//! unless the file allows it and the daemon does not forbid it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use node_core::supervisor::{Claim, Device, Prepared, ReplicaKey};
use owned_tasks::Panicked;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::{Digest, ErrorBody, ErrorCode, ModelRef, PoolId};
use tokio::process::Command;

use crate::engines::client::with_causes;
use crate::engines::{Quiet, dialect};
use crate::gguf::{self, GgufError, GgufHeader};
use crate::models::{Manifest, ModelError, Models, all_paths, projector_name};
use crate::pools_file::{GpuName, ModelSpec, PoolSpec, Provision};
use crate::source::{BadSource, ModelSource};
use crate::supervisor::programs::{ProgramError, on_path, without_secrets};
use crate::supervisor::provision::{self, BUSY_PAUSE, PackageError, Sources};

/// Context of one slot where the file says nothing and the model could do more: models say what
/// they were trained for, which would fill a GPU with cache.
const DEFAULT_CTX: u32 = 8192;

/// Longest answer of a program to the question for its flags: some load all of Python's libraries
/// for it.
const HELP_TIMEOUT: Duration = Duration::from_secs(60);

/// A pool of the file with what the file says of its model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Spec {
    pub(crate) pool: PoolSpec,
    pub(crate) model: Option<ModelSpec>,
}

impl Spec {
    pub(crate) fn fingerprint(&self) -> u64 {
        self.pool.fingerprint(self.model.as_ref())
    }
}

/// How the engines of a pool are started.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Launch {
    /// They run already; the URL, where the file names it.
    External {
        url: Option<String>,
    },
    Program(Box<Program>),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Program {
    program: PathBuf,
    /// With `{port}` and other places to fill in.
    args: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    /// The model's file, or the name by which the engine finds it itself.
    model_path: PathBuf,
    /// What lets the model see or hear.
    mmproj_path: Option<PathBuf>,
    /// Tokens of one slot.
    ctx: Option<u32>,
}

/// Why a pool cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrepareError {
    /// An order may have crossed a change of the file.
    #[error("its plan is not known any more: give the order again")]
    UnknownPlan,
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Package(#[from] PackageError),
    #[error(transparent)]
    Source(#[from] BadSource),
    #[error(
        "model: {0} has no entry in [models] and is not staged; run: pool-managerd models stage {0} FILE"
    )]
    NotStaged(ModelRef),
    #[error(
        "model: {model} is not staged and provisioning.downloads is off; run: pool-managerd models stage {model} {origin}"
    )]
    DownloadsOff { model: ModelRef, origin: String },
    #[error(
        "model: {model} is staged with {staged}, expected {expected}: purge it, or give the new one another name"
    )]
    StagedOther { model: ModelRef, staged: Digest, expected: Digest },
    #[error("model: {0}")]
    Model(ModelError),
    #[error("model: {}: {error}", path.display())]
    Unopened { path: PathBuf, error: io::Error },
    #[error("model: {}: {}", path.display(), with_causes(error))]
    Header { path: PathBuf, error: GgufError },
    #[error("model: {} is a projector (mmproj), which goes beside a model: name it as mmproj in [models] and the model as source", .0.display())]
    Projector(PathBuf),
    #[error("mmproj: {} is no projector: its GGUF says {}", path.display(), kind.as_deref().unwrap_or("nothing of what it is"))]
    NoProjector { path: PathBuf, kind: Option<String> },
    #[error(
        "mmproj: the command line of the pool's engine takes none: say {{mmproj_path}} in provision.args"
    )]
    NoPlaceForProjector,
    #[error("model: its digest could not be reckoned")]
    NoDigest,
    #[error("model: its header could not be read")]
    NoHeader,
    #[error(transparent)]
    Panicked(#[from] Panicked),
}

impl PrepareError {
    /// Whether its operator must do something. All else may do when it is tried again.
    pub(super) fn is_operators(&self) -> bool {
        match self {
            Self::Package(error) => error.is_operators(),
            Self::Program(error) => error.is_operators(),
            Self::UnknownPlan
            | Self::Source(_)
            | Self::NotStaged(_)
            | Self::DownloadsOff { .. }
            | Self::StagedOther { .. }
            | Self::Unopened { .. }
            | Self::Projector(_)
            | Self::NoProjector { .. }
            | Self::NoPlaceForProjector
            | Self::Model(ModelError::Parts { .. })
            | Self::Header { .. } => true,
            Self::Model(_) | Self::NoDigest | Self::NoHeader | Self::Panicked(_) => false,
        }
    }
}

/// Why the pool cannot be given the model of `next`, where that is known before anything is prepared: a
/// command line of the file's own is as its operator wrote it, and may name no model, or one that nobody
/// knows; and a file that is on no disk and comes from nowhere cannot be loaded. `lacks` is why the model's
/// file is not there.
pub(crate) fn reload_refusal(next: &Spec, lacks: Option<&PrepareError>) -> Option<ErrorBody> {
    let finds_itself = match &next.pool.provision {
        Provision::Binary { args: Some(args), .. } => {
            let names = |place: &str| args.iter().chain(&next.pool.flags).any(|word| word.contains(place));
            if !["{model_path}", "{model_id}", "{model}"].into_iter().any(names) {
                let message = "new_model_ref: the pool's args have no {model_path}, {model_id} or {model} in them: its engine would go on with the model that it has";
                return Some(ErrorBody::new(ErrorCode::Unsupported, message));
            }
            !names("{model_path}") && next.model.is_some()
        }
        _ => !loads_file(next),
    };
    if finds_itself {
        return None;
    }
    lacks.map(|error| ErrorBody::invalid(format!("new_model_ref: {error}")))
}

/// Whether its engine, on a command line of ours, loads a file; others find their models by name.
pub(super) fn loads_file(spec: &Spec) -> bool {
    spec.pool.engine == EngineKind::LlamaCpp
}

/// Why the model's file is not there, where it is on no disk and comes from no server.
pub(super) async fn lacks_file(spec: &Spec, models_dir: &Path) -> Option<PrepareError> {
    let name = &spec.pool.model;
    let Some(model) = &spec.model else {
        let is_staged = staged(models_dir, name).await.is_some();
        return (!is_staged).then(|| PrepareError::NotStaged(name.clone()));
    };
    match ModelSource::parse(&model.source) {
        Ok(ModelSource::File(path)) => {
            let about = tokio::fs::metadata(&path).await;
            about.err().map(|error| PrepareError::Unopened { path, error })
        }
        Ok(_) => None,
        Err(error) => Some(error.into()),
    }
}

/// Finds everything that a start needs. `progress` is told what takes its time.
pub(crate) async fn prepare(
    spec: &Spec,
    sources: &Sources<'_>,
    progress: &(dyn Fn(String) + Send + Sync),
) -> Result<(Prepared, Launch), PrepareError> {
    let pool = &spec.pool;
    let found = match &pool.provision {
        Provision::External { url } => {
            return Ok((Prepared::default(), Launch::External { url: url.clone() }));
        }
        Provision::Binary { program, args } => {
            (on_path(program).await?, args.clone().unwrap_or_else(|| arguments(pool)), Vec::new())
        }
        Provision::Package { version } => {
            provision::package(pool, version.as_deref(), sources, progress).await?
        }
    };
    let (program, mut args, mut env) = found;
    // A command line of the file's own is as its operator wants it.
    let is_ours = !matches!(pool.provision, Provision::Binary { args: Some(_), .. });
    if let Some(quiet) = dialect(pool.engine).quiet.filter(|_| is_ours) {
        progress("asks the engine for its flags".into());
        let flag = quiet_flag(&program, &args, &env, quiet).await;
        args.extend(flag.map(str::to_owned));
    }
    let mmproj = spec.model.as_ref().and_then(|model| model.mmproj.as_deref());
    if mmproj.is_some() && is_ours && loads_file(spec) {
        args.extend(["--mmproj", "{mmproj_path}"].map(str::to_owned));
    }
    args.extend(pool.flags.iter().cloned());
    let says = |place: &str| args.iter().any(|arg| arg.contains(place));
    if mmproj.is_some() && !says("{mmproj_path}") {
        return Err(PrepareError::NoPlaceForProjector);
    }
    let model = if says("{model_path}") { Some(model_file(spec, sources, progress).await?) } else { None };
    let mmproj_path = match mmproj {
        Some(source) => Some(projector(&spec.pool.model, source, sources, progress).await?),
        None => None,
    };
    let model_path = match &model {
        Some(files) => files.path().to_owned(),
        None => PathBuf::from(model_name(spec)),
    };
    let reported = model.as_ref().and_then(|files| files.header.as_ref()?.context());
    let ctx = pool.ctx.or(reported.map(|ctx| ctx.min(DEFAULT_CTX)));
    let memory = match (pool.memory_bytes, &model) {
        (Some(bytes), _) => Some(bytes),
        (None, Some(files)) => {
            let beside = mmproj_path.as_slice();
            let bytes = bytes_of(files.paths.iter().chain(beside)).await;
            let slots = u64::from(pool.slots);
            let estimate =
                |header| gguf::estimate_bytes(bytes?, header, u64::from(ctx.unwrap_or(0)) * slots).into();
            files.header.as_ref().and_then(estimate)
        }
        (None, None) => None,
    };
    env.extend(devices_env(pool));
    env.extend(pool.env.iter().map(|(name, value)| (name.clone(), value.clone())));
    let program = Program { program, args, env, model_path, mmproj_path, ctx };
    Ok((Prepared { claim: claim(pool, memory), ctx_max: ctx }, Launch::Program(Box::new(program))))
}

/// The flag by which the program is told to keep prompts out of its log, where its help has one.
async fn quiet_flag(
    program: &Path,
    args: &[String],
    env: &[(String, String)],
    quiet: &Quiet,
) -> Option<&'static str> {
    // The words before its options say which server it is to be.
    let words = args.iter().take_while(|arg| !arg.starts_with("--") && !arg.contains('{'));
    let words: Vec<&String> = words.collect();
    for help in quiet.help {
        let mut command = Command::new(program);
        without_secrets(&mut command);
        command
            .args(&words)
            .arg(help)
            .envs(env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let Ok(Ok(output)) = tokio::time::timeout(HELP_TIMEOUT, command.output()).await else { continue };
        let text = String::from_utf8_lossy(&output.stdout);
        let shown: Vec<&str> =
            text.split(|sign: char| sign.is_whitespace() || matches!(sign, ',' | '[' | ']')).collect();
        let flag = quiet.flags.iter().copied().find(|flag| shown.contains(flag));
        if flag.is_some() {
            return flag;
        }
    }
    tracing::info!(program = %program.display(), "the engine's help has no flag that keeps prompts out of its log");
    None
}

/// The devices by the numbers that the file gives them, which are the driver's own.
fn devices_env(pool: &PoolSpec) -> Vec<(String, String)> {
    if pool.devices.is_empty() {
        return Vec::new();
    }
    let of_device = |device: &GpuName| device.number().map_or_else(|| device.to_string(), |n| n.to_string());
    let list = pool.devices.iter().map(of_device).collect::<Vec<_>>().join(",");
    vec![("CUDA_DEVICE_ORDER".into(), "PCI_BUS_ID".into()), ("CUDA_VISIBLE_DEVICES".into(), list)]
}

/// What one replica takes, by the shares of its devices.
fn claim(pool: &PoolSpec, memory: Option<u64>) -> Claim {
    let Some(bytes) = memory else { return Claim::new() };
    if pool.devices.is_empty() {
        return Claim::from([(Device::Host, bytes)]);
    }
    // Shares in thousandths: exact enough for gigabytes, and whole numbers.
    let thousandths = |share: f64| format!("{:.0}", share * 1_000.0).parse::<u64>().unwrap_or(0);
    let shares: Vec<u64> = match pool.tensor_split.is_empty() {
        true => vec![1_000; pool.devices.len()],
        false => pool.tensor_split.iter().map(|share| thousandths(*share)).collect(),
    };
    let whole = shares.iter().sum::<u64>().max(1);
    let part = |share: u64| {
        u64::try_from(u128::from(bytes) * u128::from(share) / u128::from(whole)).unwrap_or(bytes)
    };
    pool.devices.iter().zip(&shares).map(|(device, share)| (device.device(), part(*share))).collect()
}

/// The model as it is staged, looked for on a thread that may wait for a disk.
async fn staged(models_dir: &Path, name: &ModelRef) -> Option<(PathBuf, Manifest)> {
    let (models, name) = (Models::new(models_dir), name.clone());
    owned_tasks::blocking("search of a model", move || models.find(&name)).await.ok().flatten()
}

/// The command line of engines that are known.
fn arguments(pool: &PoolSpec) -> Vec<String> {
    let dialect = dialect(pool.engine);
    let mut args = (dialect.command_line)(pool);
    if let Some((flag, path)) = dialect.key_flag.zip(pool.api_key_file.as_ref()) {
        args.extend([flag.to_owned(), path.display().to_string()]);
    }
    args
}

impl Program {
    /// Tokens of one slot, where they are known.
    pub(crate) fn ctx(&self) -> Option<u32> {
        self.ctx
    }

    /// The command line of one replica.
    pub(crate) fn command(&self, spec: &Spec, replica_key: &ReplicaKey, port: u16) -> (PathBuf, Vec<String>) {
        let ctx = self.ctx.map_or_else(|| "0".to_owned(), |ctx| ctx.to_string());
        let total = self.ctx.map_or(0, |ctx| u64::from(ctx) * u64::from(spec.pool.slots));
        let placeholders = BTreeMap::from([
            ("{port}", port.to_string()),
            ("{model}", spec.pool.model.to_string()),
            ("{model_path}", self.model_path.display().to_string()),
            ("{model_id}", model_name(spec)),
            ("{mmproj_path}", self.mmproj_path.as_deref().unwrap_or(Path::new("")).display().to_string()),
            ("{slots}", spec.pool.slots.to_string()),
            ("{ctx}", ctx),
            ("{ctx_total}", total.to_string()),
            ("{pool_id}", replica_key.pool_id.to_string()),
            ("{replica_id}", replica_key.replica_id.to_string()),
        ]);
        let fill = |arg: &String| {
            placeholders.iter().fold(arg.clone(), |text, (name, value)| text.replace(name, value))
        };
        (self.program.clone(), self.args.iter().map(fill).collect())
    }
}

/// The model as engines that fetch it themselves call it.
fn model_name(spec: &Spec) -> String {
    match &spec.model {
        Some(model) => {
            let text = model.source.as_str();
            text.strip_prefix("hf:").or_else(|| text.strip_prefix("file:")).unwrap_or(text).to_owned()
        }
        None => spec.pool.model.to_string(),
    }
}

/// A model's files on this machine, in order, and the header of the first where it has one.
#[derive(Debug)]
pub(super) struct ModelFiles {
    paths: Vec<PathBuf>,
    header: Option<GgufHeader>,
}

impl ModelFiles {
    /// The file that it is loaded by.
    fn path(&self) -> &Path {
        &self.paths[0]
    }
}

/// Bytes of all files together, where each can be asked.
async fn bytes_of(paths: impl Iterator<Item = &PathBuf>) -> Option<u64> {
    let mut bytes = 0_u64;
    for path in paths {
        bytes = bytes.saturating_add(tokio::fs::metadata(path).await.ok()?.len());
    }
    Some(bytes)
}

/// Finds the model's files; they are fetched where that is allowed.
pub(super) async fn model_file(
    spec: &Spec,
    sources: &Sources<'_>,
    progress: &(dyn Fn(String) + Send + Sync),
) -> Result<ModelFiles, PrepareError> {
    let name = &spec.pool.model;
    let path = match &spec.model {
        None => match staged(sources.models_dir, name).await {
            Some((path, _)) => path,
            None => return Err(PrepareError::NotStaged(name.clone())),
        },
        Some(model) => found(name, &model.source, model.digest.as_ref(), sources, progress).await?,
    };
    let paths = all_paths(&path);
    let header = match spec.pool.engine {
        EngineKind::LlamaCpp => {
            let header = read_header(&paths[0]).await?;
            if header.is_projector() {
                return Err(PrepareError::Projector(path));
            }
            check_parts_of(&paths).await?;
            Some(header)
        }
        _ => None,
    };
    Ok(ModelFiles { paths, header })
}

/// The projector that goes beside the model, found as a model is.
async fn projector(
    model: &ModelRef,
    source: &str,
    sources: &Sources<'_>,
    progress: &(dyn Fn(String) + Send + Sync),
) -> Result<PathBuf, PrepareError> {
    let path = found(&projector_name(model, source), source, None, sources, progress).await?;
    let header = read_header(&path).await?;
    if header.is_projector() {
        return Ok(path);
    }
    Err(PrepareError::NoProjector { path, kind: header.kind.or(header.architecture) })
}

/// The file that a source names, on this machine.
async fn found(
    name: &ModelRef,
    source: &str,
    digest: Option<&Digest>,
    sources: &Sources<'_>,
    progress: &(dyn Fn(String) + Send + Sync),
) -> Result<PathBuf, PrepareError> {
    match ModelSource::parse(source)? {
        ModelSource::File(path) => {
            if let Some(expected) = digest {
                verify_in_place(&path, expected).await?;
            }
            Ok(path)
        }
        remote => downloaded(name, source, digest, &remote, sources, progress).await,
    }
}

/// The model of a server: as it is staged, or downloaded where that is allowed.
async fn downloaded(
    name: &ModelRef,
    origin: &str,
    expected: Option<&Digest>,
    remote: &ModelSource,
    sources: &Sources<'_>,
    progress: &(dyn Fn(String) + Send + Sync),
) -> Result<PathBuf, PrepareError> {
    let models = Models::new(sources.models_dir);
    let shown = |done: u64, all: Option<u64>| {
        let all = all.map_or_else(|| "?".into(), |all| (all / 1_048_576).to_string());
        format!("{} of {all} MiB", done / 1_048_576)
    };
    loop {
        if let Some((path, manifest)) = staged(sources.models_dir, name).await {
            return match expected.filter(|expected| **expected != manifest.digest) {
                None => Ok(path),
                Some(expected) => Err(PrepareError::StagedOther {
                    model: name.clone(),
                    staged: manifest.digest,
                    expected: expected.clone(),
                }),
            };
        }
        if !sources.allowed.downloads {
            return Err(PrepareError::DownloadsOff { model: name.clone(), origin: origin.to_owned() });
        }
        let mut reported =
            |done: u64, all: Option<u64>| progress(format!("downloads {name}: {}", shown(done, all)));
        match models.fetch(name, remote, expected, sources.client, &sources.hub, &mut reported).await {
            Ok(_) => {}
            Err(ModelError::Busy(_)) => {
                let (looking, model) = (models.clone(), name.clone());
                let look = move || looking.under_way(&model);
                let (done, all) = owned_tasks::blocking("look at a download", look).await?;
                progress(format!("another process downloads {name}: {}", shown(done, all)));
                tokio::time::sleep(BUSY_PAUSE).await;
            }
            Err(error) => return Err(PrepareError::Model(error)),
        }
    }
}

async fn verify_in_place(path: &Path, expected: &Digest) -> Result<(), PrepareError> {
    let (paths, expected) = (all_paths(path), expected.clone());
    let check = move || crate::models::check_digest(&paths, &expected);
    let checked = owned_tasks::blocking("digest of a model", check).await;
    checked.map_err(|_| PrepareError::NoDigest)?.map_err(PrepareError::Model)
}

/// That every file that the first one speaks of is there.
async fn check_parts_of(paths: &[PathBuf]) -> Result<(), PrepareError> {
    for path in paths {
        if let Err(error) = tokio::fs::metadata(path).await {
            return Err(PrepareError::Unopened { path: path.clone(), error });
        }
    }
    let (first, files) = (paths[0].clone(), paths.len());
    let check = move || crate::models::check_parts(&first, files);
    owned_tasks::blocking("parts of a model", check).await?.map_err(PrepareError::Model)
}

async fn read_header(path: &Path) -> Result<GgufHeader, PrepareError> {
    let path = path.to_owned();
    let read = move || {
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) => return Err(PrepareError::Unopened { path, error }),
        };
        GgufHeader::read(BufReader::new(file)).map_err(|error| PrepareError::Header { path, error })
    };
    owned_tasks::blocking("header of a model", read).await.unwrap_or(Err(PrepareError::NoHeader))
}

/// For messages: where a pool's replica writes.
pub(crate) fn log_path(logs_dir: &Path, pool_id: &PoolId, replica_id: &str) -> PathBuf {
    logs_dir.join(format!("{pool_id}-{replica_id}.log"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(text: &str) -> PoolSpec {
        let head = "[pools.p]\nengine = \"llamacpp\"\nmodel = \"m\"\nslots = 2\n";
        let file = crate::pools_file::PoolsFile::parse(&format!("{head}{text}")).unwrap();
        file.pools.into_values().next().unwrap()
    }

    // CLOUD-2443
    #[test]
    fn devices_and_shares_reach_the_command_line_the_environment_and_the_claim() {
        let pool = pool(
            "devices = [1, 3]\ntensor_split = [3, 1]\nprovision = { mode = \"binary\", program = \"x\" }",
        );
        let args = arguments(&pool);
        assert!(args.join(" ").ends_with("--n-gpu-layers 999 --tensor-split 3,1"), "{args:?}");
        assert_eq!(devices_env(&pool)[1], ("CUDA_VISIBLE_DEVICES".into(), "1,3".into()));
        assert_eq!(claim(&pool, Some(400)), Claim::from([(Device::Gpu(1), 300), (Device::Gpu(3), 100)]));
        assert_eq!(claim(&pool, None), Claim::new());
        // An instance of a GPU, or one by its identity.
        let pool = self::pool("devices = [\"MIG-a-1\"]\nprovision = { mode = \"binary\", program = \"x\" }");
        assert_eq!(devices_env(&pool)[1], ("CUDA_VISIBLE_DEVICES".into(), "MIG-a-1".into()));
        let named = Device::Named(node_core::supervisor::GpuUuid::new("MIG-a-1").unwrap());
        assert_eq!(
            (claim(&pool, Some(400)), pool.mask()),
            (Claim::from([(named, 400)]), Some("MIG-a-1".into()))
        );
    }

    // CLOUD-2443
    #[test]
    fn places_of_a_command_line_are_filled_in() {
        let pool = pool("provision = { mode = \"binary\", program = \"x\" }");
        let program = Program {
            program: "x".into(),
            args: arguments(&pool),
            env: Vec::new(),
            model_path: "/m.gguf".into(),
            mmproj_path: None,
            ctx: Some(512),
        };
        let replica_key = ReplicaKey {
            pool_id: PoolId::new("p").unwrap(),
            replica_id: pool_registry_types::ReplicaId::new("r0").unwrap(),
        };
        let (_, args) = program.command(&Spec { pool, model: None }, &replica_key, 81);
        assert_eq!(
            args.join(" "),
            "--model /m.gguf --alias m --host 127.0.0.1 --port 81 --parallel 2 --ctx-size 1024 --metrics --slots"
        );
    }

    // CLOUD-3016
    #[test]
    fn a_command_line_that_names_no_model_or_one_that_nobody_knows_is_given_no_other() {
        let next = |provision: &str, engine: EngineKind| {
            let mut pool = pool(&format!("provision = {{ {provision} }}"));
            pool.engine = engine;
            Spec { pool, model: None }
        };
        let of_args = |args: &str| {
            next(&format!("mode = \"binary\", program = \"x\", args = {args}"), EngineKind::LlamaCpp)
        };
        let refused = |spec: &Spec, is_there: bool| {
            let lacks = PrepareError::NotStaged(ModelRef::new("m").unwrap());
            reload_refusal(spec, Some(&lacks).filter(|_| !is_there))
        };
        let code = |spec: &Spec, is_there| refused(spec, is_there).map(|error| error.code);
        let fixed = of_args("[\"--model\", \"/m.gguf\", \"{port}\"]");
        assert_eq!(code(&fixed, true), Some(ErrorCode::Unsupported));
        let binary = next("mode = \"binary\", program = \"x\"", EngineKind::LlamaCpp);
        let package = next("mode = \"package\"", EngineKind::LlamaCpp);
        for spec in [
            of_args("[\"--alias={model}\", \"{port}\"]"),
            of_args("[\"{model_path}\", \"{port}\"]"),
            binary,
            package,
        ] {
            let error = refused(&spec, false).unwrap();
            assert_eq!(error.code, ErrorCode::InvalidParams);
            assert!(error.message.starts_with("new_model_ref: model: m has no entry"), "{error}");
            assert_eq!(code(&spec, true), None);
        }
        let mut by_id = of_args("[\"--model={model_id}\", \"{port}\"]");
        by_id.model = Some(ModelSpec { source: "org/m".into(), digest: None, mmproj: None });
        for finds_itself in [by_id, next("mode = \"binary\", program = \"x\"", EngineKind::Vllm)] {
            assert_eq!(code(&finds_itself, false), None);
        }
    }

    // CLOUD-3016
    #[tokio::test]
    async fn a_model_lacks_its_file_where_it_is_on_no_disk_and_comes_from_no_server() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path().join("here.gguf");
        std::fs::write(&here, "x").unwrap();
        let gone = folder.path().join("gone.gguf").display().to_string();
        let lacks = async |source: Option<&str>| {
            let model = source.map(|source| ModelSpec { source: source.into(), digest: None, mmproj: None });
            let pool = pool("provision = { mode = \"package\" }");
            lacks_file(&Spec { pool, model }, folder.path()).await.map(|error| error.to_string())
        };
        assert!(lacks(None).await.unwrap().contains("models stage m FILE"));
        assert!(lacks(Some(&gone)).await.unwrap().contains(&format!("{gone}: No such file")));
        assert_eq!(lacks(Some(&here.display().to_string())).await, None);
        assert_eq!(lacks(Some("hf:org/m")).await, None, "it is fetched");
    }

    /// A GGUF of so many bytes with one entry that is a text.
    fn gguf(key: &str, value: &str, bytes: usize) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(0_u64.to_le_bytes());
        out.extend(1_u64.to_le_bytes());
        for text in [key, value] {
            out.extend((text.len() as u64).to_le_bytes());
            out.extend(text.as_bytes());
            if text == key {
                out.extend(8_u32.to_le_bytes());
            }
        }
        out.resize(bytes, 0);
        out
    }

    // CLOUD-2681
    // CLOUD-2683
    #[tokio::test]
    async fn all_files_of_a_model_and_its_projector_are_reckoned_and_given_to_the_engine() {
        // Only the first installation in a process can fail.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        for n in 1..=2 {
            let content = gguf("general.architecture", "llama", 1_000);
            std::fs::write(at(&format!("m-0000{n}-of-00002.gguf")), content).unwrap();
        }
        std::fs::write(at("alone.gguf"), gguf("general.architecture", "llama", 2_000)).unwrap();
        std::fs::write(at("mmproj.gguf"), gguf("general.type", "mmproj", 500)).unwrap();
        let client = crate::download::client().unwrap();
        let look = async |provision: &str, file: &str, mmproj: Option<&str>| {
            let pool =
                pool(&format!("provision = {{ mode = \"binary\", program = \"/bin/true\"{provision} }}"));
            let model = ModelSpec { source: at(file), digest: None, mmproj: mmproj.map(at) };
            let spec = Spec { pool, model: Some(model) };
            let sources = Sources {
                models_dir: folder.path(),
                packages_dir: folder.path(),
                allowed: crate::pools_file::Provisioning::default(),
                hub: crate::download::Hub { endpoint: "", token: None },
                client: &client,
            };
            let (prepared, launch) =
                prepare(&spec, &sources, &|_| {}).await.map_err(|error| error.to_string())?;
            let Launch::Program(program) = launch else { panic!("it is a program") };
            let replica_key = ReplicaKey {
                pool_id: PoolId::new("p").unwrap(),
                replica_id: pool_registry_types::ReplicaId::new("r0").unwrap(),
            };
            let (_, args) = program.command(&spec, &replica_key, 81);
            Ok::<_, String>((prepared.claim[&Device::Host], args.join(" ")))
        };
        let (alone, _) = look("", "alone.gguf", None).await.unwrap();
        let (set, args) = look("", "m-00002-of-00002.gguf", None).await.unwrap();
        assert_eq!(set, alone, "both files count");
        assert!(args.contains("m-00001-of-00002.gguf") && !args.contains("mmproj"), "{args}");
        let (beside, args) = look("", "m-00001-of-00002.gguf", Some("mmproj.gguf")).await.unwrap();
        assert_eq!(beside, set + 500);
        assert!(args.contains(&format!("--mmproj {}", at("mmproj.gguf"))), "{args}");
        let own = ", args = [\"{port}\", \"{model_path}\"]";
        for (provision, file, mmproj, part) in [
            ("", "mmproj.gguf", None, "is a projector (mmproj)"),
            ("", "alone.gguf", Some("alone.gguf"), "is no projector: its GGUF says llama"),
            (own, "alone.gguf", Some("mmproj.gguf"), "say {mmproj_path} in provision.args"),
            ("", "m-00001-of-00003.gguf", None, "m-00001-of-00003.gguf: No such file"),
        ] {
            let error = look(provision, file, mmproj).await.unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    // CLOUD-2415
    #[tokio::test]
    async fn the_flag_that_keeps_prompts_out_of_a_log_is_the_one_that_the_help_has() {
        let quiet = dialect(EngineKind::Vllm).quiet.unwrap();
        let folder = tempfile::tempdir().unwrap();
        // Each is asked `serve --help` first, and shows what it has; the last one only to who looks
        // for it.
        let programs = [
            (
                "old",
                "serve\\ --help) echo '  [--disable-log-requests] [--port PORT]';;",
                Some("--disable-log-requests"),
            ),
            (
                "new",
                "serve\\ --help) echo '  --enable-log-requests, --no-enable-log-requests';;",
                Some("--no-enable-log-requests"),
            ),
            (
                "grouped",
                "serve\\ --help) echo groups;; *=log-requests) echo '--no-enable-log-requests';;",
                Some("--no-enable-log-requests"),
            ),
            ("without", "*) echo '  --disable-log-requests-of-others';;", None),
        ];
        for (name, cases, expected) in programs {
            let path = folder.path().join(name);
            std::fs::write(&path, format!("case \"$*\" in {cases} esac\n")).unwrap();
            let script = path.display().to_string();
            let args = [script.as_str(), "serve", "{model_id}", "--port", "{port}"].map(str::to_owned);
            assert_eq!(quiet_flag(Path::new("/bin/sh"), &args, &[], quiet).await, expected, "{name}");
        }
    }
}
