//! The dialects of engines: one [`Dialect`] each, and nothing about an engine outside of its own
//! file.
//!
//! A dialect is what the engine can do, how it is asked, how its answer is read, how it is looked
//! at, how busy it says it is, and how it is started. [`dialect`] is the only place that lists them.
//! What is sent for a task and how an answer ends is the whole difference between engines;
//! embeddings and ranks are no streams and the same with all: [`documents`].

mod answer;
pub(crate) mod client;
mod dialect;
pub(crate) mod documents;
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

use std::time::Duration;

use node_core::Busy;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::task::{Resume, ResumeMode, TaskRequest, unsupported};
use pool_registry_types::{ErrorBody, ErrorCode};

pub(crate) use self::answer::{EngineEvent, Reader, Reply};
pub(crate) use self::client::{Answer, CallError, Endpoint, EngineClient};
pub(crate) use self::dialect::Asked;
pub(crate) use self::dialect::{
    Dialect, EngineFacts, EngineRequest, Look, NotReady, Quiet, Sent, tokens_left,
};
pub(crate) use self::json::set;
pub(crate) use self::key::{ApiKey, KeyError};
pub(crate) use self::llamacpp::Unsent;
pub(crate) use self::refusal::{Refusal, Whose, refusal, refused};
pub(crate) use self::thoughts::Delta;

/// Bound of one look at whether an engine is up.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// Bound of one look at how busy it is: some answer only between two batches.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// The dialect of an engine.
pub(crate) const fn dialect(engine: EngineKind) -> &'static Dialect {
    match engine {
        EngineKind::LlamaCpp => &llamacpp::DIALECT,
        EngineKind::Vllm => &vllm::DIALECT,
        EngineKind::Tgi => &tgi::DIALECT,
        EngineKind::Triton => &triton::DIALECT,
        EngineKind::OpenAi => &openai::DIALECT,
    }
}

/// The request for a task, in the engine's dialect. `model` is the engine's own name for the
/// task's; `ctx_max` bounds what has no bound. A replay is asked like a first run; what is appended
/// to goes on from what was sent. Error: `UNSUPPORTED` for what the engine cannot do.
pub(crate) fn request(
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

/// One look: is the engine up, and what does it say of itself.
pub(crate) async fn probe(engine: EngineKind, look: &Look<'_>) -> Result<EngineFacts, NotReady> {
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
pub(crate) async fn facts(engine: EngineKind, look: &Look<'_>) -> Result<EngineFacts, NotReady> {
    (dialect(engine).facts)(look).await
}

/// The engine's busy requests.
pub(crate) async fn busy(engine: EngineKind, look: &Look<'_>) -> Busy {
    let Some(ask) = dialect(engine).busy else { return Busy::CannotTell };
    tokio::time::timeout(BUSY_TIMEOUT, ask(look)).await.unwrap_or(Busy::NoAnswer)
}

/// A client error of reqwest with its causes and without the URL.
pub(crate) fn describe(error: reqwest::Error) -> String {
    client::with_causes(&error.without_url())
}

/// The end of an attempt whose engine wrote more in one event than is read of one. Every engine
/// would: it is final.
pub(crate) fn too_long() -> ErrorBody {
    longer_than(pool_registry_types::sse::MAX_FRAME_BYTES)
}

/// The same, where an event may have so many bytes.
pub(crate) fn longer_than(most: usize) -> ErrorBody {
    let message = format!("the engine's answer has one event of more than {most} bytes, which is the most");
    ErrorBody::new(ErrorCode::PayloadTooLarge, message)
}
