//! What llama.cpp is asked before a completion is whole: messages are written out by its model's
//! template, and what was sent before is put behind the prompt.

use std::time::Duration;

use pool_registry_types::error::EndCause;
use pool_registry_types::task::Resume;
use pool_registry_types::{ErrorBody, ErrorCode};
use serde_json::{Value, json};

use crate::engines::client::{Answer, CallError, Endpoint, EngineClient, percent_encoded};
use crate::engines::json::document;
use crate::engines::refusal::{Refusal, Whose, refused};
use crate::engines::thoughts::{Splitter, Template};

/// What `/completion` cannot take as it is: messages, and what was sent before.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Preparation {
    /// To be written out by the model's own template; absent where there is a prompt.
    pub(super) messages: Option<Value>,
    pub(super) prompt: String,
    pub(super) sent: Option<Resume>,
    /// Thoughts were left out of what was sent.
    pub(super) drops_thoughts: bool,
    /// For the questions: an engine with several models asks which.
    pub(super) model: String,
}

/// Why a request has no answer.
#[derive(Debug)]
pub(crate) enum Unsent {
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

/// Longest wait for a question that precedes the request: a router may load the model for it.
const PREPARATION_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest answer to one, bytes: a prompt that is written out.
const MAX_PREPARATION_BYTES: usize = 16 * 1024 * 1024;

impl Preparation {
    /// Fills in the body's prompt. Returns how thoughts are told from the text that comes.
    pub(in crate::engines) async fn complete(
        self,
        client: &EngineClient,
        at: &Endpoint,
        body: &mut Value,
    ) -> Result<Option<Splitter>, Unsent> {
        let mut prompt = self.prompt.clone();
        let mut splitter = None;
        if let Some(messages) = &self.messages {
            let written = self.ask(client, at, APPLY_TEMPLATE, json!({ "messages": messages })).await?;
            let Some(written) = written["prompt"].as_str() else { return Err(unwritten()) };
            prompt = written.to_owned();
            splitter = match self.template(client, at).await? {
                Template::Plain => None,
                Template::Delimited(delimiters) => {
                    // Where they are control tokens it leaves them out of its text unless told to
                    // keep them.
                    body["preserved_tokens"] = json!([delimiters.open, delimiters.close]);
                    Some(Splitter::after(delimiters, &prompt))
                }
                Template::Unknown => return Err(cannot(ErrorCode::Unsupported, UNKNOWN_DELIMITERS)),
            };
        }
        let Some(sent) = &self.sent else {
            body["prompt"] = json!(prompt);
            return Ok(splitter);
        };
        // The very tokens are better than their text, which may be cut into others; but only
        // where they are all there, and where they read as what was sent.
        if !sent.token_ids.is_empty() {
            let written = self.ask(client, at, "/detokenize", json!({ "tokens": sent.token_ids })).await?;
            let mut read = splitter.clone();
            if let Some(text) = written["content"].as_str()
                && self.reads_as_sent(text, read.as_mut(), sent)
            {
                let ids = sent.token_ids.iter().map(|id| json!(id));
                body["prompt"] = std::iter::once(json!(prompt)).chain(ids).collect();
                return Ok(read);
            }
        }
        let Some(splitter) = splitter else {
            body["prompt"] = json!(prompt + &sent.text);
            return Ok(None);
        };
        if self.drops_thoughts {
            // What the model had thought is not known any more: from the text alone it would go on
            // to another one.
            return Err(cannot(ErrorCode::WorkerReset, FORGOTTEN));
        }
        let (written, read) = splitter.written_out(&sent.reasoning, &sent.text);
        body["prompt"] = json!(prompt + &written);
        Ok(Some(read))
    }

    fn reads_as_sent(&self, raw: &str, splitter: Option<&mut Splitter>, sent: &Resume) -> bool {
        let Some(splitter) = splitter else { return raw == sent.text };
        let read = splitter.push(raw);
        read.text == sent.text && (self.drops_thoughts || read.thought == sent.reasoning)
    }

    async fn template(&self, client: &EngineClient, at: &Endpoint) -> Result<Template, Unsent> {
        // A router has one for each model; what serves a single one passes the question over.
        let path = format!("/props?model={}", percent_encoded(&self.model));
        let props = read_answer(PROPS, in_time(client.get(at, &path)).await?).await?;
        // Not told, it may be any.
        Ok(props["chat_template"].as_str().map_or(Template::Unknown, Template::of))
    }

    async fn ask(
        &self,
        client: &EngineClient,
        at: &Endpoint,
        path: &'static str,
        mut question: Value,
    ) -> Result<Value, Unsent> {
        question["model"] = json!(self.model);
        read_answer(path, in_time(client.post(at, path, &question)).await?).await
    }
}

pub(super) const APPLY_TEMPLATE: &str = "/apply-template";
pub(super) const PROPS: &str = "/props";

/// The answer to a question before the request.
async fn read_answer(path: &'static str, answer: Answer) -> Result<Value, Unsent> {
    if !(200..300).contains(&answer.status()) {
        return Err(Unsent::Refused { path, refusal: refused(answer).await });
    }
    let reading = async {
        let bytes = answer.bytes(MAX_PREPARATION_BYTES).await;
        bytes.map_err(|error| CallError::Lost(error.to_string()))
    };
    Ok(document(&in_time(reading).await?).unwrap_or_default())
}

/// The engine did not write the messages out.
fn unwritten() -> Unsent {
    let error = ErrorBody::new(ErrorCode::WorkerReset, "the engine's template gave no prompt");
    let error = error.with_cause(EndCause::Engine5xx);
    Unsent::Refused { path: APPLY_TEMPLATE, refusal: Refusal { whose: Whose::Engine, error } }
}

const UNKNOWN_DELIMITERS: &str = "recovery: the model's template shows that it thinks, and not in a way that is known \
    here, so that its messages cannot be continued as text";
const FORGOTTEN: &str = "the stream cannot go on: the thoughts before it were left out, and their tokens are not \
    all known";

/// A refusal of our own.
fn cannot(code: ErrorCode, message: &str) -> Unsent {
    let mut error = ErrorBody::new(code, message);
    if code == ErrorCode::WorkerReset {
        error.cause = Some(EndCause::ReplayDiffers);
    }
    Unsent::Refused { path: APPLY_TEMPLATE, refusal: Refusal { whose: Whose::Client, error } }
}

async fn in_time<T>(asking: impl Future<Output = Result<T, CallError>>) -> Result<T, CallError> {
    let late = |_| Err(CallError::Silent("a question before the request was not answered in time".into()));
    tokio::time::timeout(PREPARATION_TIMEOUT, asking).await.unwrap_or_else(late)
}
