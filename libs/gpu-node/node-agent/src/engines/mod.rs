//! The dialects of engines: how to ask for a completion, how to read it, how to look at health.
//!
//! A dialect is two pure functions (task → HTTP request, event → [`Said`]) and one probe. What
//! is sent for a task and how an answer ends is the whole difference between engines. Embeddings
//! and ranks are no streams and the same with all: [`documents`].

pub mod documents;
mod gauges;
pub mod llamacpp;
pub mod openai;
pub mod tgi;
pub mod triton;
pub mod vllm;

#[cfg(test)]
mod conformance_tests;

use std::borrow::Cow;
use std::time::Duration;

use pool_registry_types::error::EndCause;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::sse::Frame;
use pool_registry_types::task::{FinishReason, Resume, ResumeMode, TaskRequest, unsupported};
use pool_registry_types::{ErrorBody, ErrorCode, ModelRef};
use serde_json::Value;

/// Bound of one look at an engine.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest error body of an engine that is read, bytes.
const MAX_ERROR_BYTES: usize = 16 * 1024;

/// What to POST to an engine, below its URL.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineRequest {
    pub path: Cow<'static, str>,
    pub body: Value,
    pub reply: Reply,
    /// What must be asked of the engine before the body is whole.
    pub(crate) preparation: Option<llamacpp::Preparation>,
    /// The ids of the tokens are passed on, so that the stream can be continued from them.
    pub wants_ids: bool,
}

impl EngineRequest {
    /// A request that is whole as it is.
    fn whole(path: impl Into<Cow<'static, str>>, body: Value, reply: Reply) -> Self {
        Self { path: path.into(), body, reply, preparation: None, wants_ids: false }
    }

    /// Sends it, after what must be asked before. A refusal of an earlier question is the answer.
    pub(crate) async fn send(
        mut self,
        client: reqwest::Client,
        url: String,
        traceparent: Option<String>,
    ) -> Result<reqwest::Response, reqwest::Error> {
        if let Some(preparation) = self.preparation.take()
            && let Some(refused) = preparation.complete(&client, &url, &mut self.body).await?
        {
            return Ok(refused);
        }
        let mut call = client.post(format!("{url}{}", self.path)).json(&self.body);
        if let Some(traceparent) = traceparent {
            call = call.header("traceparent", traceparent);
        }
        call.send().await
    }
}

/// The shape of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// llama.cpp's `/completion`: ends with `"stop": true`, without a marker.
    LlamaCompletion,
    /// OpenAI's `/v1/completions`.
    OpenAiCompletion,
    /// OpenAI's `/v1/chat/completions`.
    OpenAiChat,
    /// TGI's `/generate_stream`: the last event has the whole text, without a marker.
    Tgi,
    /// Triton's `/generate_stream`: ends by closing.
    Triton,
    /// `/v1/embeddings`: one document.
    Embedding,
    /// `/v1/rerank`: one document.
    Rerank,
}

impl Reply {
    /// No event is the last one: the stream is whole when its message ends in order.
    pub const fn ends_by_closing(self) -> bool {
        matches!(self, Self::Triton)
    }

    /// One JSON document instead of a stream.
    pub const fn is_document(self) -> bool {
        matches!(self, Self::Embedding | Self::Rerank)
    }

    /// What the answer says it is.
    pub const fn media_type(self) -> &'static str {
        if self.is_document() { "application/json" } else { "text/event-stream" }
    }
}

/// What one event of an engine says.
#[derive(Debug, Clone, PartialEq)]
pub enum Said {
    /// Nothing that matters.
    Nothing,
    Text(String),
    /// The last event; it may carry a text too.
    End {
        text: Option<String>,
        tokens_out: u64,
        finish_reason: FinishReason,
    },
    /// The engine gave up.
    Failed(String),
    /// It says in its stream what others say by a status: that it does not take the request.
    Refused(Box<ErrorBody>),
}

/// What an engine says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EngineFacts {
    pub models: Vec<ModelRef>,
    pub slots: Option<u32>,
    pub ctx_max: Option<u32>,
    pub version: Option<String>,
}

/// Why an engine takes no requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotReady {
    /// It answers that it loads its model.
    Loading,
    Failed(String),
}

impl From<String> for NotReady {
    fn from(reason: String) -> Self {
        Self::Failed(reason)
    }
}

pub(crate) use openai::set;

/// The request for a task, in the engine's dialect. `ctx_max` bounds what has no bound. A
/// replay is asked like a first run; what is appended to goes on from what was sent. Error:
/// `UNSUPPORTED` for what the engine cannot do.
pub fn request(
    engine: EngineKind,
    task: &TaskRequest,
    ctx_max: Option<u32>,
    resume: Option<&Resume>,
) -> Result<EngineRequest, ErrorBody> {
    if let Some(field) = task.lacks(engine) {
        return Err(unsupported(field, engine));
    }
    if let Some(inputs) = &task.inputs {
        return Ok(documents::request(task, inputs));
    }
    let sent = resume.filter(|resume| resume.mode == ResumeMode::Append);
    match engine {
        EngineKind::LlamaCpp => Ok(llamacpp::request(task, ctx_max, sent)),
        EngineKind::Vllm => Ok(vllm::request(task, sent)),
        EngineKind::Tgi => Ok(tgi::request(task, sent)),
        EngineKind::Triton => triton::request(task, ctx_max, sent),
        EngineKind::OpenAi => Ok(openai::request(task, ctx_max, sent)),
    }
}

/// How many tokens may still come; 0 when all were sent and only the end was lost.
pub fn tokens_left(task: &TaskRequest, ctx_max: Option<u32>, sent: Option<&Resume>) -> Option<u64> {
    let bound = task.max_tokens.or(ctx_max).map(u64::from)?;
    Some(bound.saturating_sub(sent.map_or(0, |sent| sent.tokens)))
}

/// Reads a stream; remembers what an end event refers back to.
#[derive(Debug)]
pub struct Reader {
    reply: Reply,
    /// Events with data.
    events: u64,
    tokens_out: u64,
    /// Tokens that may come at most, for streams that do not say why they end.
    bound: Option<u64>,
    counted: Option<u64>,
    finish_reason: Option<FinishReason>,
    /// The engine's ids of the tokens since the last text, and its count of all, where they are
    /// wanted. Some tokens bring no text of their own: half a character, or the beginning of a
    /// stop text.
    ids: Option<(Vec<u32>, u64)>,
}

impl Reader {
    pub fn new(reply: Reply, wants_ids: bool) -> Self {
        let ids = wants_ids.then(|| (Vec::new(), 0));
        Self { reply, events: 0, tokens_out: 0, bound: None, counted: None, finish_reason: None, ids }
    }

    #[must_use]
    pub fn bounded_by(mut self, bound: Option<u64>) -> Self {
        self.bound = bound;
        self
    }

    /// The stream has ended in order, after its last whole event. Returns what an end event would
    /// have said where none is written; nothing where that end is none.
    pub fn closed(&self) -> Option<Said> {
        if !self.reply.ends_by_closing() || self.events == 0 {
            return None;
        }
        let cut = self.bound.is_some_and(|bound| self.tokens_out >= bound);
        let finish_reason = if cut { FinishReason::Length } else { FinishReason::Stop };
        Some(Said::End { text: None, tokens_out: self.tokens_out, finish_reason })
    }

    /// The ids of the tokens since they were taken last, and the count of all tokens so far;
    /// nothing where they are not wanted.
    pub fn take_ids(&mut self) -> Option<(Vec<u32>, u64)> {
        self.ids.as_mut().map(|(ids, count)| (std::mem::take(ids), *count))
    }

    pub fn read(&mut self, frame: &Frame<'_>) -> Said {
        let Some(data) = &frame.data else { return Said::Nothing };
        if frame.event == "error" {
            return Said::Failed(data.chars().take(500).collect());
        }
        self.events += 1;
        let said = match self.reply {
            Reply::LlamaCompletion => {
                if let Some((ids, count)) = &mut self.ids {
                    let (new, all) = llamacpp::token_ids(data);
                    *count = all.max(*count + new.len() as u64);
                    ids.extend(new);
                }
                llamacpp::read(data)
            }
            Reply::OpenAiCompletion | Reply::OpenAiChat => openai::read(self, data),
            Reply::Tgi => tgi::read(self, data),
            Reply::Triton => triton::read(data),
            Reply::Embedding | Reply::Rerank => Said::Failed("it streams what is one document".into()),
        };
        if matches!(said, Said::Text(_)) {
            self.tokens_out += 1;
        }
        said
    }
}

/// One look: is the engine up, what does it say of itself, how many requests are in it. `models`
/// are those that its handoff names.
pub async fn probe(
    client: &reqwest::Client,
    engine: EngineKind,
    url: &str,
    models: &[ModelRef],
) -> Result<(EngineFacts, Option<u32>), NotReady> {
    let look = async {
        match engine {
            EngineKind::LlamaCpp => llamacpp::probe(client, url).await,
            EngineKind::Vllm => vllm::probe(client, url).await,
            EngineKind::Tgi => tgi::probe(client, url).await,
            EngineKind::Triton => triton::probe(client, url, models).await,
            EngineKind::OpenAi => Ok(openai::probe(client, url).await?),
        }
    };
    let late =
        || NotReady::Failed(format!("no answer to a health call within {} s", PROBE_TIMEOUT.as_secs()));
    tokio::time::timeout(PROBE_TIMEOUT, look).await.unwrap_or_else(|_| Err(late()))
}

/// The engine's busy requests, where it tells.
pub async fn busy(client: &reqwest::Client, engine: EngineKind, url: &str) -> Option<u32> {
    match engine {
        EngineKind::LlamaCpp => llamacpp::busy(client, url).await,
        EngineKind::Vllm => vllm::busy(client, url).await,
        EngineKind::Tgi => tgi::busy(client, url).await,
        EngineKind::Triton | EngineKind::OpenAi => None,
    }
}

/// The engine's health call. `loading` is the status by which it says that its model is not in
/// memory yet, if it has one.
async fn health(client: &reqwest::Client, url: &str, loading: Option<u16>) -> Result<(), NotReady> {
    let answer = client.get(format!("{url}/health")).send().await.map_err(describe)?;
    match answer.status().as_u16() {
        200..=299 => Ok(()),
        status if Some(status) == loading => Err(NotReady::Loading),
        status => Err(NotReady::Failed(format!("its health call answers HTTP {status}"))),
    }
}

pub(crate) async fn get_json(client: &reqwest::Client, url: String) -> Result<Value, String> {
    let response = client.get(url).send().await.map_err(describe)?;
    let status = response.status();
    if !status.is_success() {
        return Err(format!("HTTP {}", status.as_u16()));
    }
    response.json().await.map_err(|error| format!("unreadable: {}", describe(error)))
}

/// A client error with its causes and without the URL.
pub(crate) fn describe(error: reqwest::Error) -> String {
    let error = error.without_url();
    let causes = std::iter::successors(std::error::Error::source(&error), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

pub(crate) fn model_names(list: &Value) -> Vec<ModelRef> {
    let data = list["data"].as_array().into_iter().flatten();
    data.filter_map(|model| ModelRef::new(model["id"].as_str()?).ok()).collect()
}

/// An engine's refusal as ours: what the request did wrong is the client's, a 5xx the engine's.
pub async fn refusal(response: reqwest::Response) -> ErrorBody {
    let status = response.status().as_u16();
    let text = match tokio::time::timeout(PROBE_TIMEOUT, response.bytes()).await {
        Ok(Ok(bytes)) => String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_ERROR_BYTES)]).into_owned(),
        _ => String::new(),
    };
    refused(status, &serde_json::from_str(&text).unwrap_or_default())
}

/// What engines say of a prompt that does not fit.
const TOO_LONG: [&str; 5] = [
    "maximum context length",
    "exceeds the available context size",
    "`inputs` tokens + `max_new_tokens` must be",
    "`inputs` must have less than",
    "exceeds maximum input length",
];

fn message_of(answer: &Value) -> Option<String> {
    let error = &answer["error"];
    let places = [&error["message"], error, &answer["message"], &answer["detail"]];
    let message = places.into_iter().find_map(Value::as_str)?;
    Some(message.chars().take(500).collect())
}

fn refused(status: u16, answer: &Value) -> ErrorBody {
    let message = message_of(answer).unwrap_or_else(|| "no message".to_owned());
    let error = &answer["error"];
    let too_long = error["type"] == "exceed_context_size_error"
        || error["code"] == "context_length_exceeded"
        || TOO_LONG.iter().any(|text| message.contains(text));
    let (code, cause) = match status {
        503 => (ErrorCode::PoolUnready, None),
        429 => (ErrorCode::ReplicaExhausted, None),
        // TGI's word for a failure of its own.
        424 => (ErrorCode::WorkerReset, Some(EndCause::Engine5xx)),
        // llama.cpp's for a model that was not started for this.
        501 => (ErrorCode::Unsupported, Some(EndCause::Engine4xx)),
        400..=499 if too_long => (ErrorCode::ContextTooLong, Some(EndCause::Engine4xx)),
        400..=499 => (ErrorCode::InvalidParams, Some(EndCause::Engine4xx)),
        _ => (ErrorCode::WorkerReset, Some(EndCause::Engine5xx)),
    };
    let mut body = ErrorBody::new(code, format!("the engine answered {status}: {message}"));
    body.cause = cause;
    body
}

/// An error event: a refusal where a status says so, beside it or in it, else a failure.
fn said_error(status: Option<u16>, event: &Value) -> Said {
    let within = [&event["error"]["http_status_code"], &event["error"]["code"]];
    let within = within.into_iter().find_map(|code| u16::try_from(code.as_u64()?).ok());
    match status.or(within) {
        Some(status @ (400..=423 | 425..=499)) => Said::Refused(Box::new(refused(status, event))),
        _ => Said::Failed(message_of(event).unwrap_or_else(|| "an error without a message".to_owned())),
    }
}
