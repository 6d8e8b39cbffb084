//! What a dialect is made of: what is asked of an engine, and what it says of itself.

use std::borrow::Cow;
use std::collections::BTreeMap;

use futures::future::BoxFuture;
use node_core::Busy;
use pool_registry_types::engines::EngineCapabilities;
use pool_registry_types::task::{Resume, TaskRequest};
use pool_registry_types::{ErrorBody, ModelRef};
use serde_json::Value;

use super::answer::Reply;
use super::client::{Answer, CallError, Endpoint, EngineClient, MAX_ERROR_BYTES, Question};
use super::llamacpp::preparation::{Preparation, Unsent};
use super::thoughts::Splitter;
use crate::pools_file::PoolSpec;

/// Everything that makes an engine differ from others.
pub(crate) struct Dialect {
    pub capabilities: EngineCapabilities,
    /// The request for a completion.
    pub(super) request: fn(&Asked<'_>) -> Result<EngineRequest, ErrorBody>,
    /// Is it up.
    pub(super) health: for<'a> fn(&'a Look<'a>) -> BoxFuture<'a, Result<(), NotReady>>,
    /// What does it say of itself.
    pub(super) facts: for<'a> fn(&'a Look<'a>) -> BoxFuture<'a, Result<EngineFacts, NotReady>>,
    /// How many requests are in it, where it tells.
    pub(super) busy: Option<for<'a> fn(&'a Look<'a>) -> BoxFuture<'a, Busy>>,
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
pub(crate) struct Quiet {
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

/// What is asked of an engine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(super) task: &'a TaskRequest,
    /// The engine's own name for the task's model.
    pub(super) model: &'a str,
    pub(super) ctx_max: Option<u32>,
    /// What was sent before, where the answer is to go on from it.
    pub(super) sent: Option<&'a Resume>,
}

impl Asked<'_> {
    pub(super) fn tokens_left(&self) -> Option<u64> {
        tokens_left(self.task, self.ctx_max, self.sent)
    }
}

/// One look at one engine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look<'a> {
    pub client: &'a EngineClient,
    pub at: &'a Endpoint,
    /// The models that its handoff names.
    pub models: &'a [ModelRef],
}

impl Look<'_> {
    pub(super) async fn json(&self, path: &str) -> Result<Value, NotReady> {
        self.client.get_json(self.at, path).await.map_err(|error| NotReady::from_question(path, error))
    }
}

/// What to POST to an engine, below its URL.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct EngineRequest {
    pub path: Cow<'static, str>,
    pub body: Value,
    pub reply: &'static Reply,
    /// What must be asked of the engine before the body is whole.
    pub(super) preparation: Option<Preparation>,
    /// The ids of the tokens are passed on, so that the stream can be continued from them.
    pub wants_ids: bool,
}

/// A request that the engine has answered.
#[derive(Debug)]
pub(crate) struct Sent {
    pub answer: Answer,
    /// How thoughts are told from the text that comes.
    pub splitter: Option<Splitter>,
}

impl EngineRequest {
    /// A request that is whole as it is.
    pub(super) fn whole(path: impl Into<Cow<'static, str>>, body: Value, reply: &'static Reply) -> Self {
        Self { path: path.into(), body, reply, preparation: None, wants_ids: false }
    }

    /// Sends it, after what must be asked before.
    pub(crate) async fn send(mut self, client: EngineClient, at: Endpoint) -> Result<Sent, Unsent> {
        let splitter = match self.preparation.take() {
            // In a box of its own, because it is large and mostly not needed.
            Some(preparation) => Box::pin(preparation.complete(&client, &at, &mut self.body)).await?,
            None => None,
        };
        let answer = client.post(&at, &self.path, &self.body).await?;
        Ok(Sent { answer, splitter })
    }
}

/// What an engine says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct EngineFacts {
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
pub(crate) enum NotReady {
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

/// How many tokens may still come; 0 when all were sent and only the end was lost.
pub(crate) fn tokens_left(task: &TaskRequest, ctx_max: Option<u32>, sent: Option<&Resume>) -> Option<u64> {
    let bound = task.max_tokens.or(ctx_max).map(u64::from)?;
    Some(bound.saturating_sub(sent.map_or(0, |sent| sent.tokens)))
}

/// The engine's health call. `loading` is the status by which it says that its model is not in
/// memory yet, if it has one.
pub(super) async fn health(look: &Look<'_>, loading: Option<u16>) -> Result<(), NotReady> {
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
