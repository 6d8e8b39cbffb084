//! The dialects of engines: one [`Dialect`] each, and nothing about an engine outside of its own
//! file.
//!
//! A dialect is what the engine can do, how it is asked, how its answer is read, how it is looked
//! at, how busy it says it is, and how it is started. [`dialect`] is the only place that lists them.
//! What is sent for a task and how an answer ends is the whole difference between engines;
//! embeddings and ranks are no streams and the same with all: [`documents`].

mod answer;
pub mod client;
pub mod documents;
mod gauges;
mod json;
mod key;
mod llamacpp;
mod openai;
mod refusal;
mod tgi;
mod thoughts;
mod triton;
pub(crate) mod vllm;

#[cfg(test)]
mod conformance_tests;
#[cfg(test)]
mod shapes_tests;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use futures::future::BoxFuture;
use node_core::Busy;
use pool_registry_types::engines::EngineCapabilities;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::task::{Resume, ResumeMode, TaskRequest, unsupported};
use pool_registry_types::{ErrorBody, ErrorCode, ModelRef};
use serde::Serialize;
use serde_json::{Value, json};

pub use self::answer::{Delta, EngineEvent, Reader, Reply};
pub use self::client::{Answer, CallError, Endpoint, EngineClient, Question};
pub use self::key::ApiKey;
pub use self::refusal::{Refusal, Whose};
use self::thoughts::Splitter;
use crate::pools_file::PoolSpec;

/// Bound of one look at whether an engine is up.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// Bound of one look at how busy it is: some answer only between two batches.
pub const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest error body of an engine that is read, bytes.
const MAX_ERROR_BYTES: usize = 16 * 1024;

/// Everything that makes an engine differ from others.
pub struct Dialect {
    pub capabilities: EngineCapabilities,
    /// The request for a completion.
    request: fn(&Asked<'_>) -> Result<EngineRequest, ErrorBody>,
    /// Is it up.
    health: for<'a> fn(&'a Look<'a>) -> BoxFuture<'a, Result<(), NotReady>>,
    /// What does it say of itself.
    facts: for<'a> fn(&'a Look<'a>) -> BoxFuture<'a, Result<EngineFacts, NotReady>>,
    /// How many requests are in it, where it tells.
    busy: Option<for<'a> fn(&'a Look<'a>) -> BoxFuture<'a, Busy>>,
    /// The arguments by which its server is started; without any the file of pools gives them.
    pub command_line: fn(&PoolSpec) -> Vec<String>,
    /// How a server that is started here is told the file with its key.
    pub key_flag: Option<&'static str>,
    /// How a server that is started here is told to keep prompts out of its log; absent for those
    /// that write none unless told to.
    pub quiet: Option<&'static Quiet>,
}

/// The flags that keep prompts out of a server's log.
#[derive(Debug)]
pub struct Quiet {
    /// How it is asked for its flags, one way after the other.
    pub help: &'static [&'static str],
    /// The first of these that it has is given.
    pub flags: &'static [&'static str],
}

impl std::fmt::Debug for Dialect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Dialect").field(&self.capabilities.engine).finish()
    }
}

/// The dialect of an engine.
pub const fn dialect(engine: EngineKind) -> &'static Dialect {
    match engine {
        EngineKind::LlamaCpp => &llamacpp::DIALECT,
        EngineKind::Vllm => &vllm::DIALECT,
        EngineKind::Tgi => &tgi::DIALECT,
        EngineKind::Triton => &triton::DIALECT,
        EngineKind::OpenAi => &openai::DIALECT,
    }
}

/// What is asked of an engine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked<'a> {
    task: &'a TaskRequest,
    /// The engine's own name for the task's model.
    model: &'a str,
    ctx_max: Option<u32>,
    /// What was sent before, where the answer is to go on from it.
    sent: Option<&'a Resume>,
}

impl Asked<'_> {
    fn tokens_left(&self) -> Option<u64> {
        tokens_left(self.task, self.ctx_max, self.sent)
    }
}

/// One look at one engine.
#[derive(Debug, Clone, Copy)]
pub struct Look<'a> {
    pub client: &'a EngineClient,
    pub at: &'a Endpoint,
    /// The models that its handoff names.
    pub models: &'a [ModelRef],
}

impl Look<'_> {
    async fn json(&self, path: &str) -> Result<Value, NotReady> {
        self.client.get_json(self.at, path).await.map_err(|error| NotReady::from_question(path, error))
    }
}

/// What to POST to an engine, below its URL.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineRequest {
    pub path: Cow<'static, str>,
    pub body: Value,
    pub reply: &'static Reply,
    /// What must be asked of the engine before the body is whole.
    pub(crate) preparation: Option<llamacpp::Preparation>,
    /// The ids of the tokens are passed on, so that the stream can be continued from them.
    pub wants_ids: bool,
}

/// A request that the engine has answered.
#[derive(Debug)]
pub struct Sent {
    pub answer: Answer,
    /// How thoughts are told from the text that comes.
    pub splitter: Option<Splitter>,
}

/// Why a request has no answer.
#[derive(Debug)]
pub enum Unsent {
    Call(CallError),
    /// An earlier question, at this path, was refused.
    Refused {
        path: &'static str,
        refusal: Refusal,
    },
}

impl From<CallError> for Unsent {
    fn from(error: CallError) -> Self {
        Self::Call(error)
    }
}

impl EngineRequest {
    /// A request that is whole as it is.
    fn whole(path: impl Into<Cow<'static, str>>, body: Value, reply: &'static Reply) -> Self {
        Self { path: path.into(), body, reply, preparation: None, wants_ids: false }
    }

    /// Sends it, after what must be asked before.
    pub(crate) async fn send(mut self, client: EngineClient, at: Endpoint) -> Result<Sent, Unsent> {
        let splitter = match self.preparation.take() {
            Some(preparation) => preparation.complete(&client, &at, &mut self.body).await?,
            None => None,
        };
        let answer = client.post(&at, &self.path, &self.body).await?;
        Ok(Sent { answer, splitter })
    }
}

/// What an engine says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EngineFacts {
    /// The names by which it takes requests, each with the one that it goes by in them: an alias
    /// is one more name of the same model.
    pub models: BTreeMap<ModelRef, String>,
    /// The one that stands for every name that it does not know.
    pub own_model: Option<String>,
    pub slots: Option<u32>,
    pub ctx_max: Option<u32>,
    pub version: Option<String>,
}

/// Why an engine takes no requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotReady {
    /// It answers that it loads its model.
    Loading,
    /// It says so itself, or cannot be reached.
    Failed(String),
    /// Nothing listens there.
    Gone(String),
    /// It did not answer in time, which busy ones do not either.
    Silent(String),
    /// We could not ask.
    Unasked(String),
}

impl NotReady {
    fn from_question(path: &str, error: Question) -> Self {
        match error {
            Question::Unanswered(error) => error.into(),
            Question::Status(_) | Question::Bad(_) => Self::Failed(format!("{path}: {error}")),
        }
    }
}

impl From<CallError> for NotReady {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Refused(why) => Self::Gone(why),
            CallError::Unreachable(why) | CallError::Lost(why) => Self::Failed(why),
            CallError::Silent(why) => Self::Silent(why),
            CallError::Ours(why) => Self::Unasked(why),
        }
    }
}

/// Sets a field that has a value.
pub(crate) fn set<T: Serialize>(body: &mut Value, name: &str, value: Option<T>) {
    if let Some(value) = value {
        body[name] = json!(value);
    }
}

/// The request for a task, in the engine's dialect. `model` is the engine's own name for the
/// task's; `ctx_max` bounds what has no bound. A replay is asked like a first run; what is appended
/// to goes on from what was sent. Error: `UNSUPPORTED` for what the engine cannot do.
pub fn request(
    engine: EngineKind,
    task: &TaskRequest,
    model: &str,
    ctx_max: Option<u32>,
    resume: Option<&Resume>,
) -> Result<EngineRequest, ErrorBody> {
    if let Some(field) = task.lacks(engine) {
        return Err(unsupported(field, engine));
    }
    if let Some(inputs) = &task.inputs {
        return Ok(documents::request(model, inputs));
    }
    let sent = resume.filter(|resume| resume.mode == ResumeMode::Append);
    (dialect(engine).request)(&Asked { task, model, ctx_max, sent })
}

/// How many tokens may still come; 0 when all were sent and only the end was lost.
pub fn tokens_left(task: &TaskRequest, ctx_max: Option<u32>, sent: Option<&Resume>) -> Option<u64> {
    let bound = task.max_tokens.or(ctx_max).map(u64::from)?;
    Some(bound.saturating_sub(sent.map_or(0, |sent| sent.tokens)))
}

/// One look: is the engine up, and what does it say of itself.
pub async fn probe(engine: EngineKind, look: &Look<'_>) -> Result<EngineFacts, NotReady> {
    let late = || {
        let why = format!("no answer to a health call within {} s", PROBE_TIMEOUT.as_secs());
        Err(NotReady::Silent(why))
    };
    let looking = async {
        (dialect(engine).health)(look).await?;
        facts(engine, look).await
    };
    tokio::time::timeout(PROBE_TIMEOUT, looking).await.unwrap_or_else(|_| late())
}

/// What the engine says of itself, up or not. Who calls bounds the time.
pub async fn facts(engine: EngineKind, look: &Look<'_>) -> Result<EngineFacts, NotReady> {
    (dialect(engine).facts)(look).await
}

/// The engine's busy requests.
pub async fn busy(engine: EngineKind, look: &Look<'_>) -> Busy {
    let Some(ask) = dialect(engine).busy else { return Busy::CannotTell };
    tokio::time::timeout(BUSY_TIMEOUT, ask(look)).await.unwrap_or(Busy::NoAnswer)
}

/// The engine's health call. `loading` is the status by which it says that its model is not in
/// memory yet, if it has one.
async fn health(look: &Look<'_>, loading: Option<u16>) -> Result<(), NotReady> {
    let answer = look.client.get(look.at, "/health").await?;
    let status = answer.status();
    // Read, so that its connection is kept.
    let _ = answer.bytes(MAX_ERROR_BYTES).await;
    match status {
        200..=299 => Ok(()),
        status if Some(status) == loading => Err(NotReady::Loading),
        status => Err(NotReady::Failed(format!("its health call answers HTTP {status}"))),
    }
}

/// A client error of reqwest with its causes and without the URL.
pub(crate) fn describe(error: reqwest::Error) -> String {
    client::with_causes(&error.without_url())
}

/// A count in a document of an engine: at most `u32::MAX`, and 0 is as good as unknown.
fn positive(value: &Value) -> Option<u32> {
    let count = value.as_u64().or_else(|| {
        let float = value.as_f64().filter(|float| float.is_finite() && *float >= 1.0)?;
        format!("{:.0}", float.floor().min(f64::from(u32::MAX))).parse().ok()
    })?;
    Some(u32::try_from(count).unwrap_or(u32::MAX)).filter(|count| *count > 0)
}

/// What a list of models in OpenAI's form says: each name with the one that it goes by, and the
/// first model that is no adapter.
fn listed(list: &Value) -> (BTreeMap<ModelRef, String>, Option<String>) {
    let mut names = BTreeMap::new();
    let mut own = None;
    for model in list["data"].as_array().into_iter().flatten().take(MOST_MODELS) {
        let Some(id) = model["id"].as_str() else { continue };
        if own.is_none() && model["parent"].is_null() {
            own = Some(id.to_owned());
        }
        let aliases = model["aliases"].as_array().into_iter().flatten().filter_map(Value::as_str);
        for name in std::iter::once(id).chain(aliases).filter_map(|name| ModelRef::new(name).ok()) {
            if names.len() < MOST_MODELS {
                names.entry(name).or_insert_with(|| id.to_owned());
            }
        }
    }
    (names, own)
}

/// Names of one engine that are taken.
const MOST_MODELS: usize = 1024;

/// The context of the first model that has one: adapters are listed without it.
fn context(list: &Value) -> Option<u32> {
    let models = list["data"].as_array()?;
    models.iter().find_map(|model| positive(&model["max_model_len"]))
}

/// A model's name as one segment of a path, or as a value of a query.
fn percent_encoded(model: &str) -> String {
    model.bytes().fold(String::new(), |mut path, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            path.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(path, "%{byte:02X}");
        }
        path
    })
}

/// An engine's refusal as ours.
pub async fn refused(answer: Answer) -> Refusal {
    let status = answer.status();
    let body = answer.beginning(MAX_ERROR_BYTES, PROBE_TIMEOUT).await;
    refusal::refusal(status, &String::from_utf8_lossy(&body))
}

/// The end of an attempt whose engine wrote more in one event than is read of one. Every engine
/// would: it is final.
pub fn too_long() -> ErrorBody {
    let most = pool_registry_types::sse::MAX_FRAME_BYTES;
    let message = format!("the engine's answer has one event of more than {most} bytes, which is the most");
    ErrorBody::new(ErrorCode::PayloadTooLarge, message)
}
