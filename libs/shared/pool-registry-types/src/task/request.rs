//! What a client asks for: the body of a submission.
//!
//! A client's body rejects unknown fields, because a misspelt option must not be ignored.
//! [`TaskRequest::check`] finds what the types cannot: ranges and contradictions.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::constraints::{self, DecodingConstraint};
use crate::engines::{EngineKind, EngineSet, GrammarForm, capabilities};
use crate::error::{ErrorBody, ErrorCode};
use crate::ids::{ModelRef, SessionId, TaskId};
use crate::inputs::{Inputs, NonEmptyText, Workload};
use crate::placement::PlacementConstraints;

/// Largest request body, bytes. Source: .specs/01 CLOUD-1201.
pub const MAX_BODY_BYTES: usize = 4 * 1024 * 1024;
/// Largest body that is passed on to an engine as it came, bytes: images are in it.
pub const MAX_PASSED_BYTES: usize = 64 * 1024 * 1024;
/// Most texts in `stop`.
pub const MAX_STOP_TEXTS: usize = 16;
/// Most bytes of results that a node sends: a task's log keeps 8 MiB, and its end must fit too.
pub const MAX_RESULT_BYTES: usize = 8 * 1024 * 1024 - 64 * 1024;
/// Longest wait a client may ask for: one day.
pub const MAX_WAIT_MS: u64 = 24 * 3600 * 1000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    #[default]
    Interactive,
    /// Gets at least one start in eight while both wait.
    Batch,
}

impl Priority {
    pub const BOTH: [Self; 2] = [Self::Interactive, Self::Batch];
}

/// How exactly a repeated run must agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Determinism {
    /// With a seed: the same text on every engine of the same kind and version.
    Strict,
    #[default]
    BestEffort,
}

/// What becomes of a task whose node or engine is lost after tokens have been sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Recovery {
    /// It ends with `WORKER_RESET`.
    #[default]
    Fail,
    /// It goes on elsewhere, without gap or repeat.
    Continue,
}

/// How a lost stream goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResumeMode {
    /// From the start; what had been sent is compared byte for byte and not sent again.
    Replay,
    /// From the prompt and what had been sent.
    Append,
}

/// Whether the engine may use what it has cached of the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum KvHint {
    #[default]
    Reuse,
    /// Nothing cached is used, and no replica is preferred for its cache.
    Cold,
}

/// What becomes of what a model thinks before it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reasoning {
    /// It is streamed as `reasoning` events.
    #[default]
    Keep,
    /// It is left out of the stream; its tokens count all the same.
    Drop,
}

/// What becomes of a task whose stream nobody reads any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnDisconnect {
    /// It goes on, and can be read again.
    #[default]
    Continue,
    /// It is canceled when the last client that reads its stream goes away before its end.
    Cancel,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    System,
    User,
    Assistant,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChatMessage {
    pub role: Role,
    pub content: String,
}

/// Time limits of one task, milliseconds; absent: the server's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Timeouts {
    /// From the dispatch to the first token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 86_400_000)]
    pub first_token_ms: Option<u64>,
    /// Between two tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 86_400_000)]
    pub token_idle_ms: Option<u64>,
}

/// `POST /v2/tasks`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TaskRequest {
    /// Makes the request idempotent; drawn by the server when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_id: Option<TaskId>,
    /// Tasks of one session go to the same replica while it is free, and share budgets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<SessionId>,
    #[serde(default)]
    pub workload: Workload,
    pub model_ref: ModelRef,
    /// Only pools with this engine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineKind>,
    /// Only pools whose context holds at least this many tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub ctx: Option<u32>,
    #[serde(default)]
    pub priority: Priority,
    /// Exactly one of `prompt`, `messages` and, for the other workloads, `inputs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_items = 1)]
    pub messages: Option<Vec<ChatMessage>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inputs: Option<Inputs>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub max_tokens: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u32>,
    /// 0 to 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 5)]
    pub temperature: Option<f64>,
    /// 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f64>,
    /// At most 64 KiB together.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<NonEmptyText>, max_items = 16)]
    pub stop: Vec<String>,
    /// GBNF, for llama.cpp; with `"engine": "vllm"` what its guide takes. At most 64 KiB, nested 64 deep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 65536)]
    pub grammar: Option<String>,
    /// Milliseconds from admission to the end of the stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 86_400_000)]
    pub deadline_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeouts: Option<Timeouts>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub determinism: Determinism,
    #[serde(default, skip_serializing_if = "is_default")]
    pub recovery: Recovery,
    #[serde(default, skip_serializing_if = "is_default")]
    pub reasoning: Reasoning,
    #[serde(default, skip_serializing_if = "is_default")]
    pub on_disconnect: OnDisconnect,
    /// The client's own estimate, for predictions only; at most `max_tokens` counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub expected_tokens: Option<u32>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub kv_hint: KvHint,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<PlacementConstraints>,
}

pub(super) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl TaskRequest {
    /// A completion of `prompt` with every option at its default.
    pub fn completion(model_ref: ModelRef, prompt: impl Into<String>) -> Self {
        Self {
            task_id: None,
            workload: Workload::Completion,
            model_ref,
            engine: None,
            ctx: None,
            priority: Priority::Interactive,
            prompt: Some(prompt.into()),
            messages: None,
            inputs: None,
            max_tokens: None,
            seed: None,
            temperature: None,
            top_p: None,
            top_k: None,
            min_p: None,
            stop: Vec::new(),
            grammar: None,
            deadline_ms: None,
            timeouts: None,
            session_id: None,
            determinism: Determinism::BestEffort,
            recovery: Recovery::Fail,
            reasoning: Reasoning::Keep,
            on_disconnect: OnDisconnect::Continue,
            expected_tokens: None,
            kv_hint: KvHint::Reuse,
            placement: None,
        }
    }

    /// Finds what the types cannot. The error is `INVALID_PARAMS` or `UNSUPPORTED` and names the field.
    pub fn check(&self) -> Result<(), ErrorBody> {
        let invalid = |message: String| Err(ErrorBody::invalid(message));
        self.check_input()?;
        for (field, value, most) in
            [("temperature", self.temperature, 5.0), ("top_p", self.top_p, 1.0), ("min_p", self.min_p, 1.0)]
        {
            if let Some(value) = value
                && !(0.0..=most).contains(&value)
            {
                return invalid(format!("{field}: must be between 0 and {most}"));
            }
        }
        for (field, value) in
            [("max_tokens", self.max_tokens), ("ctx", self.ctx), ("expected_tokens", self.expected_tokens)]
        {
            if value == Some(0) {
                return invalid(format!("{field}: must be at least 1"));
            }
        }
        if self.stop.len() > MAX_STOP_TEXTS {
            return invalid(format!("stop: at most {MAX_STOP_TEXTS} texts"));
        }
        if self.stop.iter().any(String::is_empty) {
            return invalid("stop: an empty text would stop at once".into());
        }
        self.check_constraints()?;
        let timeouts = self.timeouts.unwrap_or_default();
        for (field, value) in [
            ("deadline_ms", self.deadline_ms),
            ("timeouts.first_token_ms", timeouts.first_token_ms),
            ("timeouts.token_idle_ms", timeouts.token_idle_ms),
        ] {
            if let Some(value) = value
                && !(1..=MAX_WAIT_MS).contains(&value)
            {
                return invalid(format!("{field}: must be between 1 and {MAX_WAIT_MS} milliseconds"));
            }
        }
        if self.engines().is_empty() {
            // Without a named engine the one that can do most says what is too much.
            let engine = self.engine.unwrap_or(EngineKind::LlamaCpp);
            let field = self.lacks(engine).unwrap_or("engine");
            return Err(unsupported(field, engine));
        }
        match &self.placement {
            Some(constraints) => constraints.check(self.session_id.is_some()),
            None => Ok(()),
        }
    }

    /// That what the engine compiles is within its bounds.
    fn check_constraints(&self) -> Result<(), ErrorBody> {
        let grammar = self.grammar.as_deref().unwrap_or_default();
        constraints::check(DecodingConstraint::Grammar, grammar.as_bytes())
            .map_err(|error| ErrorBody::invalid(format!("grammar: {error}")))?;
        constraints::check(DecodingConstraint::StopList, self.stop.concat().as_bytes())
            .map_err(|error| ErrorBody::invalid(format!("stop: {error}")))
    }

    /// Whether a lost stream is run again from the start: same seed, same text.
    pub fn replays(&self) -> bool {
        self.determinism == Determinism::Strict && self.seed.is_some()
    }

    /// How a stream that was lost after tokens goes on; absent when it does not.
    pub fn continuation(&self) -> Option<ResumeMode> {
        let mode = if self.replays() { ResumeMode::Replay } else { ResumeMode::Append };
        (self.recovery == Recovery::Continue).then_some(mode)
    }

    /// The kinds of engines that can do what the task asks.
    pub fn engines(&self) -> EngineSet {
        let named = |engine: &EngineKind| self.engine.is_none_or(|named| named == *engine);
        let able = EngineKind::ALL.into_iter().filter(|engine| self.lacks(*engine).is_none());
        able.filter(named).collect()
    }

    /// The first field that engines of the kind cannot honour; nothing when they can do it all.
    pub fn lacks(&self, engine: EngineKind) -> Option<&'static str> {
        let can = capabilities(engine);
        let grammar = match can.grammar {
            GrammarForm::Gbnf => true,
            GrammarForm::Ebnf => self.engine == Some(engine),
            GrammarForm::None => false,
        };
        let workload = match self.workload {
            Workload::Completion => true,
            Workload::Embedding => can.embedding,
            Workload::Rerank => can.rerank,
        };
        // What was sent would have to be parsed by the grammar's state, which no engine takes.
        let continues = self.grammar.is_none()
            && if self.messages.is_some() { can.continues_messages } else { can.continues_prompt };
        let appends = self.continuation() == Some(ResumeMode::Append);
        // Only of a prompt: TGI's chat knows no top_k.
        let top_k = can.top_k && !(engine == EngineKind::Tgi && self.messages.is_some());
        let asked_and_lacking = [
            ("workload", !workload),
            ("prompt", self.prompt.is_some() && !can.completion),
            ("messages", self.messages.is_some() && !can.chat),
            ("grammar", self.grammar.is_some() && !grammar),
            ("seed", self.seed.is_some() && !can.seed),
            ("top_k", self.top_k.is_some() && !top_k),
            ("min_p", self.min_p.is_some() && !can.min_p),
            ("recovery", appends && !continues),
        ];
        asked_and_lacking.into_iter().find_map(|(field, lacking)| lacking.then_some(field))
    }

    /// What the task works on, and that the options are those of its workload.
    fn check_input(&self) -> Result<(), ErrorBody> {
        let completes = self.workload == Workload::Completion;
        let invalid = |message: &str| Err(ErrorBody::invalid(message));
        match (completes, &self.prompt, &self.messages, &self.inputs) {
            (true, Some(_), Some(_), _) => {
                return invalid("prompt and messages: give exactly one of them");
            }
            (true, .., Some(_)) => return invalid("inputs: a completion has a prompt or messages"),
            (true, None, None, None) => {
                return invalid("prompt or messages: one of them is required");
            }
            (true, None, Some(messages), None) if messages.is_empty() => {
                return invalid("messages: at least one message is required");
            }
            (true, ..) => return Ok(()),
            (false, None, None, Some(inputs)) => inputs.check(self.workload)?,
            (false, .., None) => return invalid("inputs: required by this workload"),
            (false, ..) => return invalid("prompt and messages: this workload has inputs"),
        }
        let options = [
            ("max_tokens", self.max_tokens.is_some()),
            ("seed", self.seed.is_some()),
            ("temperature", self.temperature.is_some()),
            ("top_p", self.top_p.is_some()),
            ("top_k", self.top_k.is_some()),
            ("min_p", self.min_p.is_some()),
            ("stop", !self.stop.is_empty()),
            ("grammar", self.grammar.is_some()),
            ("recovery", self.recovery == Recovery::Continue),
            ("reasoning", self.reasoning == Reasoning::Drop),
        ];
        match options.into_iter().find(|(_, given)| *given) {
            Some((field, _)) => invalid(&format!("{field}: only of a completion")),
            None => Ok(()),
        }
    }
}

/// The refusal of a task whose `field` an engine cannot honour.
pub fn unsupported(field: &str, engine: EngineKind) -> ErrorBody {
    let message = format!("{field}: {engine} cannot do that with the rest of the task");
    let mut error = ErrorBody::new(ErrorCode::Unsupported, message);
    error.engine = Some(engine);
    error
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
